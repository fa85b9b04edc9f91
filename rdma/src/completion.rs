//! A completion queue and its channel.
//!
//! To sleep: arm, poll once more, and only if there is nothing sleep on [`CompletionQueue::fd`]: what comes after the
//! arming makes it readable (ibv_req_notify_cq(3)). Armed for *solicited* ones it leaves send completions alone.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{ibv_comp_channel, ibv_cq, ibv_wc, ibv_wc_opcode, ibv_wc_status};

use crate::device::{Device, high, set_nonblocking};
use crate::{check, failed};

/// What has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number that the request was given.
    pub id: u64,
    /// Of which queue pair.
    pub qpn: u32,
    /// A receive; otherwise a send or write.
    pub received: bool,
    /// Bytes received.
    pub len: u32,
    /// The verbs status if it failed: the queue pair is in error then.
    pub error: Option<u32>,
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    cq: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
    device: Arc<Device>,
}

// SAFETY: libibverbs locks a completion queue inside, and only `drop` takes the pointers back.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue that holds so many completions.
    pub fn new(device: &Arc<Device>, entries: i32) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let channel = unsafe { rdma_sys::ibv_create_comp_channel(device.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(|| failed("ibv_create_comp_channel"))?;
        // SAFETY: the channel was just made, and nobody else has it.
        unsafe { (*channel.as_ptr()).fd = high((*channel.as_ptr()).fd) };
        let none = std::ptr::null_mut();
        // SAFETY: context and channel live; vector 0 is always there.
        let cq = unsafe { rdma_sys::ibv_create_cq(device.as_ptr(), entries, none, channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let e = failed("ibv_create_cq");
            // SAFETY: made above, and no queue uses it.
            unsafe { rdma_sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(e);
        };
        let queue = Arc::new(Self { cq, channel, device: device.clone() });
        // SAFETY: the channel's descriptor is open and ours.
        unsafe { set_nonblocking(queue.fd()) }?;
        Ok(queue)
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn as_ptr(&self) -> *mut ibv_cq {
        self.cq.as_ptr()
    }

    /// Becomes readable once what was armed for has come.
    #[must_use]
    pub fn fd(&self) -> i32 {
        // SAFETY: the channel lives as long as this; its descriptor does not change.
        unsafe { (*self.channel.as_ptr()).fd }
    }

    /// The next completion makes [`Self::fd`] readable, or only the next solicited or failed one.
    pub fn arm(&self, solicited_only: bool) -> io::Result<()> {
        // SAFETY: the queue lives.
        check("ibv_req_notify_cq", unsafe {
            rdma_sys::ibv_req_notify_cq(self.as_ptr(), i32::from(solicited_only))
        })
    }

    /// Takes what has made [`Self::fd`] readable; false: nothing has.
    pub fn woken(&self) -> io::Result<bool> {
        let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the channel lives and does not block; both places are valid for the answer.
        if unsafe { rdma_sys::ibv_get_cq_event(self.channel.as_ptr(), &mut cq, &mut context) } != 0 {
            let e = failed("ibv_get_cq_event");
            return if e.kind() == io::ErrorKind::WouldBlock { Ok(false) } else { Err(e) };
        }
        // SAFETY: the channel serves this queue only, so the event is this queue's; acknowledged once.
        unsafe { rdma_sys::ibv_ack_cq_events(self.as_ptr(), 1) };
        Ok(true)
    }

    /// What has completed, in order, as many as `out` has room for. Returns how many.
    pub fn poll(&self, out: &mut Vec<Completion>) -> io::Result<usize> {
        const BATCH: usize = 16;
        // SAFETY: numbers, for which zeros are values.
        let mut wc: [ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives, and there is room for as many as are asked for.
        let n = unsafe { rdma_sys::ibv_poll_cq(self.as_ptr(), BATCH as i32, wc.as_mut_ptr()) };
        let n = usize::try_from(n).map_err(|_| failed("ibv_poll_cq"))?;
        out.extend(wc.iter().take(n).map(|w| {
            let ok = w.status == ibv_wc_status::IBV_WC_SUCCESS;
            Completion {
                id: w.wr_id,
                qpn: w.qp_num,
                // Of a failed one the opcode is not set: who posted knows by the number.
                received: ok && w.opcode & ibv_wc_opcode::IBV_WC_RECV != 0,
                len: w.byte_len,
                error: (!ok).then_some(w.status),
            }
        }));
        Ok(n)
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: made by `new`; queue pairs hold an Arc of this, so none is left; all its events are acknowledged.
        unsafe { rdma_sys::ibv_destroy_cq(self.cq.as_ptr()) };
        // SAFETY: made by `new`, and its only queue is gone.
        unsafe { rdma_sys::ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

/// Until one of these can be read, or so many milliseconds have passed; -1: no end. A signal ends it early.
pub fn sleep(fds: &[i32], timeout: i32) -> io::Result<()> {
    let mut fds: Vec<_> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: a list of as many entries as are told.
    let rc = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
    let e = io::Error::last_os_error();
    if rc < 0 && e.kind() != io::ErrorKind::Interrupted { Err(e) } else { Ok(()) }
}
