//! One shared mapping: a sealed memfd, made here or received from a peer.
//!
//! The hard idea: a mapping that the peer could truncate is a SIGBUS waiting in our data path. A segment is
//! therefore sealed against shrinking, growing and further sealing *before* it is passed, and a received one
//! is refused unless the kernel says that it carries these seals, lives on shmem, and has the size claimed.
//! After that no act of the peer can make a page of the mapping go away.
//!
//! Memory is touched only by use: nothing is populated. [`Region::give_back`] makes holes again
//! (`MADV_REMOVE`), which needs no descriptor.

#![allow(unsafe_code)]

use crate::{fd::Fd, rawcall};
use std::{
    ptr::NonNull,
    // Process-wide counters are std's under loom as well: a loom atomic can't be a static, and no protocol
    // hangs on them.
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

/// Largest segment, made or accepted.
pub const MAX_SEGMENT: usize = 256 << 20;
/// Segments are multiples of this, the largest page size Linux has on our machines.
pub const SEGMENT_GRAIN: usize = 64 << 10;

const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Why there is no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// The process's memory limit would be exceeded.
    Limit,
    /// A received descriptor is not a sealed memfd of the size claimed.
    Unfit,
    /// The kernel refused.
    Sys(i32),
}

/// Bytes of segments that this process has mapped.
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// Bytes of segments that this process has mapped now.
#[must_use]
pub fn mapped_bytes() -> u64 {
    // Relaxed: a counter.
    MAPPED.load(Relaxed)
}

/// A share of the process's memory limit; given back on drop.
#[derive(Debug)]
struct Share(u64);

impl Share {
    fn take(bytes: u64, limit: u64) -> Result<Share, RegionError> {
        // Relaxed: a counter; the read-modify-write alone keeps the sum below the limit.
        MAPPED
            .fetch_update(Relaxed, Relaxed, |now| now.checked_add(bytes).filter(|&sum| sum <= limit))
            .map(|_| Share(bytes))
            .map_err(|_| RegionError::Limit)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.0, Relaxed);
    }
}

/// A shared, readable and writable mapping of a sealed memfd.
///
/// Invariant: `base..base+len` is mapped from construction to drop, at one place, and no page in it can be
/// taken away by truncation (seals). Its bytes may change at any time by another process's hand, so no
/// reference to them is ever formed here; users go through raw pointers or atomics.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    _share: Share,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Region` hands out raw pointers only.
unsafe impl Send for Region {}
// SAFETY: as above; no method writes through `&self` without saying who else may touch the bytes.
unsafe impl Sync for Region {}

impl Region {
    /// Makes a segment of `len` bytes, sealed, and maps it. The descriptor is for passing to the peer.
    pub fn create(len: usize, limit: u64) -> Result<(Region, Fd), RegionError> {
        let share = Share::take(len as u64, limit)?;
        let fd = memfd().map_err(RegionError::Sys)?;
        // SAFETY: ftruncate takes integers and touches no memory.
        unsafe { rawcall!(libc::SYS_ftruncate, fd.raw(), len) }.map_err(RegionError::Sys)?;
        // SAFETY: F_ADD_SEALS takes an integer and touches no memory.
        unsafe { rawcall!(libc::SYS_fcntl, fd.raw(), libc::F_ADD_SEALS, SEALS) }.map_err(RegionError::Sys)?;
        Ok((map(&fd, len, share)?, fd))
    }

    /// Maps a segment that a peer passed and says is `claimed` bytes long.
    pub fn receive(fd: &Fd, claimed: u64, limit: u64) -> Result<Region, RegionError> {
        let len = usize::try_from(claimed).map_err(|_| RegionError::Unfit)?;
        if len == 0 || len > MAX_SEGMENT || !len.is_multiple_of(SEGMENT_GRAIN) {
            return Err(RegionError::Unfit);
        }
        // SAFETY: F_GET_SEALS takes nothing and touches no memory.
        let seals = unsafe { rawcall!(libc::SYS_fcntl, fd.raw(), libc::F_GET_SEALS) }
            .map_err(|_| RegionError::Unfit)?;
        if seals as i32 & SEALS != SEALS || !on_shmem(fd)? || size(fd)? != claimed {
            return Err(RegionError::Unfit);
        }
        map(fd, len, Share::take(claimed, limit)?)
    }

    /// Bytes mapped.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: a region has at least one grain. For clippy's sake.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where `at..at+len` begins, if all of it is inside.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Option<NonNull<u8>> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `at` is at most `self.len`, so the result is inside the mapping or one past its end
        // (invariant of Region), and a mapping is never larger than isize::MAX.
        Some(unsafe { self.base.add(at) })
    }

    /// Gives the memory of `at..at+len` back to the kernel; it reads as zero afterwards. False: nothing was
    /// done, the part is not made of whole pages or the kernel can't (memory locked by `mlockall`).
    ///
    /// For parts that no one uses: who else may touch them is the caller's to know.
    pub fn give_back(&self, at: usize, len: usize) -> bool {
        let page = page_size();
        // madvise rounds a length up to whole pages; that would wipe a neighbour.
        if !at.is_multiple_of(page) || !len.is_multiple_of(page) {
            return false;
        }
        let Some(start) = self.part(at, len) else { return false };
        // SAFETY: the part is inside our own mapping (checked), consists of whole pages, and holds no Rust
        // object that anybody has a reference to.
        unsafe { rawcall!(libc::SYS_madvise, start.as_ptr(), len, libc::MADV_REMOVE) }.is_ok()
    }

    /// Makes `at..at+len` read as zero: by giving it back, or by stores where that can't be.
    pub fn zero(&self, at: usize, len: usize) {
        if self.give_back(at, len) {
            return;
        }
        let Some(start) = self.part(at, len) else { return };
        // SAFETY: the part is inside the mapping (checked) and writable; no reference to it exists.
        unsafe { start.as_ptr().write_bytes(0, len) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `map` obtained, unmapped once; whoever had a pointer into it held
        // the region alive through an Arc.
        #[cfg(not(smc_tsan))]
        let _ = unsafe { rawcall!(libc::SYS_munmap, self.base.as_ptr(), self.len) };
        // `cargo xtask stress`: ThreadSanitizer must hear that other memory may come there, which it does in libc.
        // SAFETY: as above.
        #[cfg(smc_tsan)]
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.len)
        };
    }
}

fn memfd() -> Result<Fd, i32> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let create = |flags: u32| {
        // SAFETY: the name is a NUL-terminated string that outlives the call, which only reads it.
        unsafe { rawcall!(libc::SYS_memfd_create, c"smc-rmb".as_ptr(), flags) }
            .map(|n| Fd::from_raw(n as i32))
    };
    // Kernels before 6.3 do not know NOEXEC_SEAL; later ones may insist on it (sysctl vm.memfd_noexec).
    create(flags | libc::MFD_NOEXEC_SEAL).or_else(|e| if e == libc::EINVAL { create(flags) } else { Err(e) })
}

fn map(fd: &Fd, len: usize, share: Share) -> Result<Region, RegionError> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place the kernel chooses (no MAP_FIXED) replaces no memory of ours.
    let at = unsafe { rawcall!(libc::SYS_mmap, 0, len, prot, libc::MAP_SHARED, fd.raw(), 0) }
        .map_err(RegionError::Sys)?;
    let base = NonNull::new(at as *mut u8).ok_or(RegionError::Sys(libc::ENOMEM))?;
    Ok(Region { base, len, _share: share })
}

fn size(fd: &Fd) -> Result<u64, RegionError> {
    // SAFETY: `stat` is plain integers, for which all-zero is a value.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: fstat writes one `struct stat` of the kernel's layout, which libc's type is on 64-bit Linux.
    unsafe { rawcall!(libc::SYS_fstat, fd.raw(), &raw mut st) }.map_err(RegionError::Sys)?;
    u64::try_from(st.st_size).map_err(|_| RegionError::Unfit)
}

/// Whether the file is on shmem. hugetlbfs has seals as well, but there a page can be missing when touched.
fn on_shmem(fd: &Fd) -> Result<bool, RegionError> {
    // SAFETY: `statfs` is plain integers, for which all-zero is a value.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatfs writes one `struct statfs` of the kernel's layout, which libc's is on 64-bit Linux.
    unsafe { rawcall!(libc::SYS_fstatfs, fd.raw(), &raw mut fs) }.map_err(RegionError::Sys)?;
    Ok(fs.f_type as u64 == libc::TMPFS_MAGIC as u64)
}

/// The kernel's page size.
fn page_size() -> usize {
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: every thread computes the same number.
    match SIZE.load(Relaxed) {
        0 => {
            // SAFETY: getauxval reads the auxiliary vector that the kernel left to the process.
            let n = unsafe { libc::getauxval(libc::AT_PAGESZ) } as usize;
            let n = if n.is_power_of_two() { n } else { 4096 };
            SIZE.store(n, Relaxed);
            n
        }
        n => n,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_LIMIT: u64 = u64::MAX;

    /// A memfd of `len` bytes with `seals`.
    fn made(len: usize, seals: i32) -> Fd {
        let fd = memfd().unwrap();
        // SAFETY: no memory is touched.
        unsafe { rawcall!(libc::SYS_ftruncate, fd.raw(), len) }.unwrap();
        // SAFETY: no memory is touched.
        unsafe { rawcall!(libc::SYS_fcntl, fd.raw(), libc::F_ADD_SEALS, seals) }.unwrap();
        fd
    }

    #[test]
    fn both_mappings_show_the_same_bytes_and_holes_are_zero() {
        let (a, fd) = Region::create(1 << 20, NO_LIMIT).unwrap();
        let b = Region::receive(&fd, 1 << 20, NO_LIMIT).unwrap();
        drop(fd);
        // SAFETY: inside the mapping, which lives; nobody else writes in this test.
        unsafe { a.part(4096, 1).unwrap().as_ptr().write_volatile(7) };
        // SAFETY: as above.
        assert_eq!(unsafe { b.part(4096, 1).unwrap().as_ptr().read_volatile() }, 7);
        assert!(b.give_back(4096, 4096));
        // SAFETY: as above.
        assert_eq!(unsafe { a.part(4096, 1).unwrap().as_ptr().read_volatile() }, 0);
        assert!(!a.give_back(64, 4096), "not whole pages");
        assert!(!a.give_back(0, 64), "not whole pages");
        assert!(a.part(1 << 20, 1).is_none() && a.part(usize::MAX, 2).is_none());
    }

    #[test]
    fn an_unfit_segment_is_refused() {
        let receive = |fd: &Fd, n| Region::receive(fd, n, NO_LIMIT).err();
        let n = 1 << 20;
        assert_eq!(receive(&made(n, 0), n as u64), Some(RegionError::Unfit), "no seals");
        let half = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        assert_eq!(receive(&made(n, half), n as u64), Some(RegionError::Unfit), "can be sealed further");
        assert_eq!(receive(&made(n, SEALS), 2 * n as u64), Some(RegionError::Unfit), "another size");
        assert_eq!(receive(&made(n, SEALS), 0), Some(RegionError::Unfit));
        assert_eq!(receive(&made(n, SEALS), u64::MAX), Some(RegionError::Unfit));
        assert_eq!(receive(&made(n + 4096, SEALS), n as u64 + 4096), Some(RegionError::Unfit), "odd size");
        let sealed_for_reading = made(n, SEALS | libc::F_SEAL_WRITE);
        assert_eq!(receive(&sealed_for_reading, n as u64), Some(RegionError::Sys(libc::EPERM)));
        let null = Fd::from_raw(
            // SAFETY: the path is a NUL-terminated string that outlives the call.
            unsafe { rawcall!(libc::SYS_openat, libc::AT_FDCWD, c"/dev/zero".as_ptr(), libc::O_RDWR) }
                .unwrap() as i32,
        );
        assert_eq!(receive(&null, n as u64), Some(RegionError::Unfit), "not a memfd");
        assert_eq!(receive(&made(n, SEALS), n as u64), None);
    }

    #[test]
    fn the_limit_holds() {
        assert_eq!(Region::create(1 << 20, (1 << 20) - 1).err(), Some(RegionError::Limit));
    }
}
