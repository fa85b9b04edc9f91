//! Memory that a device reads, and writes for a peer.
//!
//! A peer may write at any moment, so there is no slice of it: bytes are copied in and out.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{ibv_access_flags, ibv_mr};

use crate::device::Domain;
use crate::failed;

/// Who may do what with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only the own device: send buffers, and the buffers of receives.
    Local,
    /// The peer as well, who writes: an RMB.
    PeerWrites,
}

/// Registered memory: a mapping of its own, zeroed, or another's.
///
/// `at..at + len` is mapped, and `mr` registered for it, as long as this lives.
#[derive(Debug)]
pub struct Region {
    at: NonNull<u8>,
    len: usize,
    mr: NonNull<ibv_mr>,
    access: Access,
    /// The mapping goes with this.
    own: bool,
    domain: Arc<Domain>,
    /// Who answers for the mapping, of one that is registered once more.
    _of: Option<Arc<Self>>,
}

// SAFETY: the mapping belongs to no thread, and what is in it is only copied, never referred to.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent copies are as concurrent as those of the device.
unsafe impl Sync for Region {}

impl Region {
    /// A new one of so many bytes.
    pub fn new(domain: &Arc<Domain>, len: usize, access: Access) -> io::Result<Arc<Self>> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever there is room.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(failed("mmap"));
        }
        // A child's copy would break the tie between the addresses and the pages that the device knows.
        // SAFETY: the whole of the mapping that was just made.
        unsafe { libc::madvise(at, len, libc::MADV_DONTFORK) };
        // SAFETY: the whole of the mapping, which goes with what this makes.
        let made = unsafe { Self::register(domain, at.cast(), len, access, true, None) };
        if made.is_err() {
            // SAFETY: the mapping that was just made; nothing refers to it.
            unsafe { libc::munmap(at, len) };
        }
        made
    }

    /// Memory of somebody else's.
    ///
    /// # Safety
    /// `at..at + len` is mapped, readable and writable, as long as the region lives; nobody has a slice of it. The
    /// mapping is shared, so that a forked child's is the same memory.
    pub unsafe fn over(
        domain: &Arc<Domain>,
        at: *mut u8,
        len: usize,
        access: Access,
    ) -> io::Result<Arc<Self>> {
        // SAFETY: as the caller vouches.
        unsafe { Self::register(domain, at, len, access, false, None) }
    }

    /// The same memory in another domain, on another device perhaps.
    pub fn again(self: &Arc<Self>, domain: &Arc<Domain>) -> io::Result<Arc<Self>> {
        let at = self.at.as_ptr();
        // SAFETY: by this one's invariant it is mapped as long as this one lives, which the new one holds.
        unsafe { Self::register(domain, at, self.len, self.access, false, Some(self.clone())) }
    }

    /// # Safety
    /// `at..at + len` is mapped, readable and writable, as long as what this makes lives; `own`: it goes with that.
    unsafe fn register(
        domain: &Arc<Domain>,
        at: *mut u8,
        len: usize,
        access: Access,
        own: bool,
        of: Option<Arc<Self>>,
    ) -> io::Result<Arc<Self>> {
        let rights = match access {
            Access::Local => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE,
            Access::PeerWrites => {
                ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE
            }
        };
        let start = NonNull::new(at).ok_or_else(|| io::Error::other("memory at address 0"))?;
        // SAFETY: the domain lives, and the range is mapped, readable and writable.
        let mr = unsafe { rdma_sys::ibv_reg_mr(domain.as_ptr(), at.cast(), len, rights.0 as i32) };
        let mr = NonNull::new(mr).ok_or_else(|| failed("ibv_reg_mr"))?;
        Ok(Arc::new(Self { at: start, len, mr, access, own, domain: domain.clone(), _of: of }))
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address, as a peer has to name it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// What a peer has to show.
    #[must_use]
    pub fn rkey(&self) -> u32 {
        // SAFETY: the registration lives as long as this.
        unsafe { (*self.mr.as_ptr()).rkey }
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.mr.as_ptr()).lkey }
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Whether so many bytes from there lie inside.
    #[must_use]
    pub fn has(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies bytes in; false: they do not fit, and nothing was copied.
    #[must_use]
    pub fn put(&self, offset: usize, bytes: &[u8]) -> bool {
        let fits = self.has(offset, bytes.len());
        if fits {
            // SAFETY: inside the mapping, as `fits` says, and `bytes` is not of it: no slice of it exists anywhere.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.as_ptr().add(offset), bytes.len())
            };
        }
        fits
    }

    /// Copies bytes out; false: there are not so many, and nothing was copied.
    ///
    /// A peer that writes what it should not gives other bytes, any of which are a value of `u8`; who has seen the
    /// cursor behind them (a completion, polled before) sees them whole: RC delivers a WRITE before a SEND behind it.
    #[must_use]
    pub fn get(&self, offset: usize, to: &mut [u8]) -> bool {
        let fits = self.has(offset, to.len());
        if fits {
            // SAFETY: as in `put`.
            unsafe { std::ptr::copy_nonoverlapping(self.at.as_ptr().add(offset), to.as_mut_ptr(), to.len()) };
        }
        fits
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered by `new`. Queue pairs that use it hold an Arc, so none of them is left.
        let rc = unsafe { rdma_sys::ibv_dereg_mr(self.mr.as_ptr()) };
        // A device that still has it may still write to it: the pages stay then.
        if rc == 0 && self.own {
            // SAFETY: mapped by `new`, and nothing refers to it any more.
            unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
        }
    }
}
