//! An RC queue pair: RESET → INIT → RTR → RTS, and ERR at its end.
//!
//! The values are those that Linux SMC uses (`net/smc/smc_ib.c`): infinitely many RNR retries, since a receiver that is
//! late has not failed; seven retries of a packet, after which the link is lost. Receives are posted in INIT, before a
//! peer can send.
//!
//! Work is posted against *attached* regions: the queue pair holds them until it is destroyed, so that the device never
//! reads or writes memory that is gone.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rdma_sys::{
    ibv_access_flags, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask as mask, ibv_qp_state, ibv_send_flags,
};
use rdma_sys::{ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wr_opcode};
use smc::wire::smcr::{Gid, Mtu};

use crate::completion::CompletionQueue;
use crate::device::Domain;
use crate::memory::Region;
use crate::{check, failed};

/// How large the queues are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Sends and writes that are under way.
    pub send: u32,
    /// Receives that are posted.
    pub recv: u32,
}

/// The other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its queue pair.
    pub qpn: u32,
    /// Its port.
    pub gid: Gid,
    /// Its first packet sequence number.
    pub psn: u32,
    /// The smaller of both ends' MTU.
    pub mtu: Mtu,
    /// Routers that may lie between.
    pub hop_limit: u8,
}

/// A piece of an attached region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The region.
    pub region: &'a Arc<Region>,
    /// Where in it.
    pub offset: usize,
    /// How many bytes.
    pub len: u32,
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Region {}

/// A queue pair.
#[derive(Debug)]
pub struct QueuePair {
    qp: NonNull<ibv_qp>,
    inline: u32,
    port: u8,
    gid_index: u8,
    /// By their addresses here.
    attached: Mutex<HashMap<usize, Arc<Region>>>,
    domain: Arc<Domain>,
    queue: Arc<CompletionQueue>,
}

// SAFETY: libibverbs locks a queue pair's queues inside, and only `drop` takes the pointer back.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// A queue pair on a port, in INIT: receives may be posted. What fits into a request of up to `inline` bytes is
    /// sent from it, if the device can.
    pub fn new(
        domain: &Arc<Domain>,
        queue: &Arc<CompletionQueue>,
        (port, gid_index): (u8, u8),
        depth: Depth,
        inline: u32,
    ) -> io::Result<Self> {
        if !Arc::ptr_eq(domain.device(), queue.device()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "domain and queue of two devices"));
        }
        let mut init = ibv_qp_init(queue, depth, inline);
        // SAFETY: domain and queue live and are of one device; `init` is filled in.
        let mut qp = unsafe { rdma_sys::ibv_create_qp(domain.as_ptr(), &mut init) };
        if qp.is_null() && inline > 0 {
            init = ibv_qp_init(queue, depth, 0);
            // SAFETY: as above.
            qp = unsafe { rdma_sys::ibv_create_qp(domain.as_ptr(), &mut init) };
        }
        let qp = NonNull::new(qp).ok_or_else(|| failed("ibv_create_qp"))?;
        let inline = init.cap.max_inline_data.min(inline);
        let (domain, queue) = (domain.clone(), queue.clone());
        let qp = Self { qp, inline, port, gid_index, attached: Mutex::default(), domain, queue };
        let mut attr = attr(ibv_qp_state::IBV_QPS_INIT);
        attr.port_num = port;
        attr.qp_access_flags =
            (ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE).0;
        qp.modify(
            attr,
            mask::IBV_QP_STATE | mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS,
        )?;
        Ok(qp)
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        // SAFETY: it lives as long as this; its number does not change.
        unsafe { (*self.qp.as_ptr()).qp_num }
    }

    /// The queue of its completions.
    #[must_use]
    pub fn completions(&self) -> &Arc<CompletionQueue> {
        &self.queue
    }

    /// Bytes that are sent from the request itself.
    #[must_use]
    pub fn inline(&self) -> u32 {
        self.inline
    }

    fn modify(&self, mut attr: ibv_qp_attr, what: mask) -> io::Result<()> {
        // SAFETY: the queue pair lives; of `attr` only what `what` says is read, and that is set.
        check("ibv_modify_qp", unsafe { rdma_sys::ibv_modify_qp(self.qp.as_ptr(), &mut attr, what.0 as i32) })
    }

    /// INIT → RTR: it receives from that peer.
    pub fn ready_to_receive(&self, to: &Remote) -> io::Result<()> {
        let mut a = attr(ibv_qp_state::IBV_QPS_RTR);
        a.path_mtu = to.mtu as u32;
        a.dest_qp_num = to.qpn;
        a.rq_psn = to.psn;
        a.max_dest_rd_atomic = 1;
        a.min_rnr_timer = 5;
        a.ah_attr.is_global = 1;
        a.ah_attr.port_num = self.port;
        a.ah_attr.grh.dgid.raw = to.gid.0;
        a.ah_attr.grh.sgid_index = self.gid_index;
        a.ah_attr.grh.hop_limit = to.hop_limit;
        self.modify(
            a,
            mask::IBV_QP_STATE
                | mask::IBV_QP_AV
                | mask::IBV_QP_PATH_MTU
                | mask::IBV_QP_DEST_QPN
                | mask::IBV_QP_RQ_PSN
                | mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | mask::IBV_QP_MIN_RNR_TIMER,
        )
    }

    /// RTR → RTS: it sends, beginning with that packet sequence number.
    pub fn ready_to_send(&self, psn: u32) -> io::Result<()> {
        let mut a = attr(ibv_qp_state::IBV_QPS_RTS);
        a.timeout = 15;
        a.retry_cnt = 7;
        a.rnr_retry = 7;
        a.sq_psn = psn;
        a.max_rd_atomic = 1;
        self.modify(
            a,
            mask::IBV_QP_STATE
                | mask::IBV_QP_TIMEOUT
                | mask::IBV_QP_RETRY_CNT
                | mask::IBV_QP_RNR_RETRY
                | mask::IBV_QP_SQ_PSN
                | mask::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// Ends it from any state: what is under way completes with an error, and the peer's next message fails.
    pub fn fail(&self) -> io::Result<()> {
        self.modify(attr(ibv_qp_state::IBV_QPS_ERR), mask::IBV_QP_STATE)
    }

    /// Holds a region for as long as this lives.
    pub fn attach(&self, region: &Arc<Region>) -> io::Result<()> {
        if !Arc::ptr_eq(region.domain(), &self.domain) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region of another domain"));
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        attached.insert(Arc::as_ptr(region) as usize, region.clone());
        Ok(())
    }

    /// Lets go of a region for which no work is under way.
    pub fn detach(&self, region: &Arc<Region>) {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        attached.remove(&(Arc::as_ptr(region) as usize));
    }

    /// The piece as the device has it, if it lies in an attached region.
    fn sge(&self, p: &Piece<'_>) -> io::Result<ibv_sge> {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let is_attached = attached.contains_key(&(Arc::as_ptr(p.region) as usize));
        if !is_attached || !p.region.has(p.offset, p.len as usize) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a piece that is not attached"));
        }
        Ok(ibv_sge { addr: p.region.address() + p.offset as u64, length: p.len, lkey: p.region.lkey() })
    }

    /// Posts a receive.
    pub fn post_receive(&self, id: u64, into: &Piece<'_>) -> io::Result<()> {
        let mut sge = self.sge(into)?;
        let mut wr = ibv_recv_wr { wr_id: id, next: std::ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair lives, request and list are copied before this returns, and what they point to is an
        // attached region: it outlives the queue pair.
        check("ibv_post_recv", unsafe { rdma_sys::ibv_post_recv(self.qp.as_ptr(), &mut wr, &mut bad) })
    }

    /// Posts a WRITE to the peer's memory. Without a completion of its own, unless it fails: that of a SEND behind it
    /// tells of it too.
    pub fn post_write(&self, id: u64, from: &Piece<'_>, (rkey, address): (u32, u64)) -> io::Result<()> {
        let mut wr = request(id, ibv_wr_opcode::IBV_WR_RDMA_WRITE);
        wr.wr.rdma = rdma_sys::rdma_t { remote_addr: address, rkey };
        self.post(wr, self.sge(from)?)
    }

    /// Posts a SEND, solicited, with a completion. `inline`: the bytes are taken now, and the piece is free at once.
    pub fn post_send(&self, id: u64, from: &Piece<'_>) -> io::Result<()> {
        let mut wr = request(id, ibv_wr_opcode::IBV_WR_SEND);
        let inline = from.len <= self.inline;
        wr.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0
            | ibv_send_flags::IBV_SEND_SOLICITED.0
            | if inline { ibv_send_flags::IBV_SEND_INLINE.0 } else { 0 };
        self.post(wr, self.sge(from)?)
    }

    fn post(&self, mut wr: ibv_send_wr, mut sge: ibv_sge) -> io::Result<()> {
        wr.sg_list = &mut sge;
        wr.num_sge = 1;
        let mut bad = std::ptr::null_mut();
        // SAFETY: as in `post_receive`.
        check("ibv_post_send", unsafe { rdma_sys::ibv_post_send(self.qp.as_ptr(), &mut wr, &mut bad) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by `new`. After this the device uses none of the attached regions, which are let go behind it.
        unsafe { rdma_sys::ibv_destroy_qp(self.qp.as_ptr()) };
    }
}

fn attr(state: ibv_qp_state::Type) -> ibv_qp_attr {
    // SAFETY: numbers and bytes, for which zeros are values.
    let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
    attr.qp_state = state;
    attr
}

fn request(id: u64, opcode: rdma_sys::ibv_wr_opcode::Type) -> ibv_send_wr {
    // SAFETY: numbers and pointers, for which zeros are values.
    let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = id;
    wr.opcode = opcode;
    wr
}

fn ibv_qp_init(queue: &Arc<CompletionQueue>, depth: Depth, inline: u32) -> rdma_sys::ibv_qp_init_attr {
    // SAFETY: numbers and pointers, for which zeros are values.
    let mut init: rdma_sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
    init.send_cq = queue.as_ptr();
    init.recv_cq = queue.as_ptr();
    init.qp_type = rdma_sys::ibv_qp_type::IBV_QPT_RC;
    init.cap.max_send_wr = depth.send;
    init.cap.max_recv_wr = depth.recv;
    init.cap.max_send_sge = 1;
    init.cap.max_recv_sge = 1;
    init.cap.max_inline_data = inline;
    init
}
