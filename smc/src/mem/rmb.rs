//! RMBs: segments cut into the buffers of connections.
//!
//! The accepting end owns the memory of a link group. A segment is cut into blocks, one for each connection:
//!
//! ```text
//!  0     1792                                                 whole pages of 4 KiB
//!  |      | ring 1→0 ………………… | page | ring 0→1 ………………… |      |
//!                       ^ of 4096 bytes: 1792 | 512 | 1792
//! ```
//!
//! The page of the connection has a memory page in common with the end of one ring and the start of the other. There
//! is where each producer begins its ring as long as messages are small (`crate::ring::place`): a connection that has
//! little to say at a time keeps one memory page, and a thousand of them as many entries of a TLB.
//!
//! The hard idea is reuse. A buffer may serve a new connection only when *both* ends have let go of it, and
//! it must be zero by then, with no late zeroing that could wipe the new user's bytes:
//!
//! 1. An end that lets go sets its `detached` mark in the page. If it finds the other's mark set already, it
//!    is the last user and gives the ring memory back to the kernel *before* it sets its own, but for the page that
//!    has the marks: what the rings have of that it zeroes.
//! 2. The owner's buffers come back to it over [`Rmb::give`], a list without a lock, since a drop may happen
//!    anywhere. They are reused only once both marks are seen, and zeroed once more under the allocator's
//!    lock, before anybody hears of them: both ends may have let go at the same moment, each believing that
//!    the other would be the last.
//!
//! An end that dies without detaching leaves its buffers out of use until the link group ends, which for a
//! dead process is soon.
//!
//! Answers to RFC 7609 sections 2.1 and 4.1 to 4.3 (RMB, RMBE).

#![allow(unsafe_code)]

use super::{
    layout::{CONN_PAGE_SIZE, ConnPage},
    region::{MAX_SEGMENT, Region, RegionError, SEGMENT_GRAIN},
};
use crate::{fd::Fd, sync::AtomicU64};
use std::{
    ptr::NonNull,
    // The list of returned buffers is std's under loom as well: push and take-all, see `Returned`.
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{
            AtomicPtr,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

/// Smallest ring.
pub const MIN_RING: usize = 16 << 10;
/// Largest ring.
pub const MAX_RING: usize = 4 << 20;
/// Segments a link group may have in its life; their numbers are bits of a CLC message's word.
pub const MAX_SEGMENTS: u32 = u64::BITS;

const CLASSES: usize = (MAX_RING / MIN_RING).ilog2() as usize + 1;
const FIRST_SEGMENT: usize = 4 << 20;
/// What blocks are multiples of.
const UNIT: usize = 4096;
/// Bytes that each ring has in the unit in which the page lies, see the file's head.
pub const WINDOW: usize = (UNIT - CONN_PAGE_SIZE) / 2;
/// Free blocks of a size whose last memory page is not given back: they are likely to be wanted again soon.
const KEPT: usize = 64;

/// The ring size that serves a wish: a power of two between [`MIN_RING`] and [`MAX_RING`].
#[must_use]
pub fn ring_size(wanted: usize) -> usize {
    wanted.clamp(MIN_RING, MAX_RING).next_power_of_two()
}

fn class(ring: usize) -> usize {
    (ring / MIN_RING).ilog2() as usize
}

/// Where one connection's buffers lie in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset of the [`ConnPage`].
    pub page: usize,
    /// Offsets of the rings; index 0 carries what the connecting end sends.
    pub rings: [usize; 2],
    /// Bytes in each ring.
    pub ring_size: usize,
}

impl Extent {
    /// Of the block at `block`, a multiple of 4096.
    #[must_use]
    pub const fn at(block: usize, ring_size: usize) -> Extent {
        let page = block + WINDOW + ring_size;
        Extent { page, rings: [page + CONN_PAGE_SIZE, block + WINDOW], ring_size }
    }

    /// Bytes of a block with rings of that size.
    const fn block_size(ring: usize) -> usize {
        2 * ring + UNIT
    }

    /// Where the block begins.
    const fn block(&self) -> usize {
        self.rings[1] - WINDOW
    }

    /// Whether it is a block inside a segment of `len` bytes. A peer's numbers pass through here before they become
    /// pointers.
    #[must_use]
    pub fn fits(&self, len: usize) -> bool {
        let size = self.ring_size;
        size.is_power_of_two()
            && (MIN_RING..=MAX_RING).contains(&size)
            && self.rings[1] % UNIT == WINDOW
            && self.block().checked_add(Self::block_size(size)).is_some_and(|end| end <= len)
            && *self == Self::at(self.block(), size)
    }
}

/// A mapped segment of a link group.
#[derive(Debug)]
pub struct Segment {
    /// Its number in the link group, below [`MAX_SEGMENTS`]; never given twice.
    pub number: u32,
    /// The mapping.
    pub region: Region,
}

/// Buffers inside a segment that is kept mapped by them.
///
/// Invariant: `extent.fits(segment.region.len())`, and `page` and `rings` are where its parts begin: looked up once,
/// since each call on a connection asks for all three.
#[derive(Clone, Debug)]
pub struct Buffers {
    page: NonNull<ConnPage>,
    rings: [NonNull<u8>; 2],
    segment: Arc<Segment>,
    extent: Extent,
}

// SAFETY: the pointers lead into the region of `segment`, which is Send and is kept mapped by it.
unsafe impl Send for Buffers {}
// SAFETY: as above; what they lead to is atomics, or bytes that only ring cursors give access to.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// The buffers at `extent`, if they lie in the segment.
    #[must_use]
    pub fn new(segment: Arc<Segment>, extent: Extent) -> Option<Buffers> {
        if !extent.fits(segment.region.len()) {
            return None;
        }
        let page = segment.region.part(extent.page, CONN_PAGE_SIZE)?.cast();
        let [a, b] = extent.rings.map(|at| segment.region.part(at, extent.ring_size));
        Some(Buffers { page, rings: [a?, b?], segment, extent })
    }

    /// The segment they lie in.
    #[must_use]
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Where they lie in it.
    #[must_use]
    pub const fn extent(&self) -> &Extent {
        &self.extent
    }

    /// The page of the connection.
    #[inline]
    #[must_use]
    pub fn page(&self) -> &ConnPage {
        // SAFETY: inside the mapping and aligned to CONN_PAGE_SIZE ≥ its alignment (invariant of Buffers);
        // a ConnPage is atomics only, for which every byte pattern is a value and which the other process may
        // write at any time. The mapping lives as long as `self.segment`, hence as the borrow.
        unsafe { self.page.as_ref() }
    }

    /// Start of ring `i` (0: what the connecting end sends) and its size.
    #[must_use]
    pub fn ring(&self, i: usize) -> (*mut u8, usize) {
        (self.rings[i & 1].as_ptr(), self.extent.ring_size)
    }

    /// Bytes of the rings that do not lie in the page's unit: two parts of whole units.
    const fn outside(&self) -> [(usize, usize); 2] {
        let (block, n) = (self.extent.block(), self.extent.ring_size);
        [(block, n), (block + n + UNIT, n)]
    }

    /// Gives the rings' memory back to the kernel. For the last user only.
    fn give_back(&self) {
        for (at, n) in self.outside() {
            self.segment.region.give_back(at, n);
        }
        self.zero_windows();
    }

    /// Zeroes the rings and the page. For the allocator only, while nobody else uses them.
    fn zero(&self) {
        for (at, n) in self.outside() {
            self.segment.region.zero(at, n);
        }
        self.zero_windows();
        self.zero_page();
    }

    /// What the rings have of the page's unit.
    fn zero_windows(&self) {
        let [a, b] = self.rings.map(NonNull::as_ptr);
        let low = b.wrapping_add(self.extent.ring_size - WINDOW);
        // SAFETY: the first bytes of the one ring and the last of the other, inside the mapping; no reference to them
        // exists.
        unsafe { a.write_bytes(0, WINDOW) };
        // SAFETY: as above.
        unsafe { low.write_bytes(0, WINDOW) };
    }

    #[cfg(not(smc_loom))]
    fn zero_page(&self) {
        let words = self.page.cast::<[AtomicU64; CONN_PAGE_SIZE / 8]>();
        // SAFETY: as in `page`: inside, aligned, atomics only.
        for word in unsafe { words.as_ref() } {
            // Relaxed: the page is published by the Accept message, whose way through the kernel orders it.
            word.store(0, Relaxed);
        }
    }

    #[cfg(smc_loom)]
    fn zero_page(&self) {
        let _: Option<AtomicU64> = None; // loom's atomics are no shared memory; the models do not come here.
    }

    /// Side `i` (0: the connecting end) lets go: see the file's head, step 1.
    pub fn detach(&self, i: usize) {
        let_go(self.page(), i, || self.give_back());
    }

    /// Declares that neither side uses the buffers: the peer never came to know of them, or never will.
    pub fn abandon(&self) {
        for side in &self.page().side {
            // ORDERING [detach.reuse] Release, as in let_go.
            side.hint.detached.store(1, Release);
        }
    }

    fn is_free(&self) -> bool {
        nobody_left(self.page())
    }
}

/// The orderings of [detach.reuse]; the twin under `cfg(smc_weak)` must fail the models below.
#[cfg(not(smc_weak))]
const DETACH: crate::sync::Ordering = Release;
#[cfg(smc_weak)]
const DETACH: crate::sync::Ordering = Relaxed;

/// Side `i` lets go of the buffers of `page`. If the other did already, `give_back` makes holes first.
fn let_go(page: &ConnPage, i: usize, give_back: impl FnOnce()) {
    let [a, b] = &page.side;
    let (mine, theirs) = if i == 0 { (a, b) } else { (b, a) };
    // ORDERING [detach.reuse] Acquire; pairs with the Release store of the other side's `detached`.
    // Carries: its last accesses to the rings, which come before we make holes.
    if theirs.hint.detached.load(Acquire) != 0 {
        give_back();
    }
    // ORDERING [detach.reuse] Release; pairs with the Acquire loads above and in nobody_left.
    // Carries: our last accesses to the rings, and the holes. Model: loom_detach.
    mine.hint.detached.store(1, DETACH);
}

/// Whether both sides have let go.
fn nobody_left(page: &ConnPage) -> bool {
    // ORDERING [detach.reuse] Acquire; pairs with the Release store in let_go. Carries: each side's last
    // accesses to the rings, and the holes it made; zeroing them and using them anew comes after.
    page.side.iter().all(|s| s.hint.detached.load(Acquire) != 0)
}

/// Why no buffers were given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Another thread is allocating at this moment: try again.
    Busy,
    /// This link group has had all the segments it can have: use another.
    Exhausted,
    /// The memory limit.
    Limit,
    /// The kernel refused.
    Sys(i32),
}

/// Buffers for one connection, and what the peer needs to reach them.
#[derive(Debug)]
pub struct Grant {
    /// The buffers, zeroed.
    pub buffers: Buffers,
    /// The way back to the allocator.
    pub ticket: Ticket,
    /// The segment's memfd, for a peer that does not have the segment.
    pub memfd: Option<Arc<Fd>>,
}

/// One link group's memory, on the side that owns it.
#[derive(Debug, Default)]
pub struct Rmb {
    synced: Mutex<Synced>,
    returned: Returned,
}

#[derive(Debug, Default)]
struct Synced {
    cuts: Vec<Cut>,
    /// Segments ever made; the number of the next.
    made: u32,
    /// Given back by us, not yet seen to be let go by the peer.
    pending: Vec<Buffers>,
}

/// A segment and how far it is cut up.
#[derive(Debug)]
struct Cut {
    segment: Arc<Segment>,
    /// For peers that do not have the segment. Kept for the newest segment only, so that a link group costs
    /// one descriptor: a peer that opens several connections at once asks for it several times.
    memfd: Option<Arc<Fd>>,
    /// Where the next block begins.
    next: usize,
    /// Buffers that have served and are free, by size class.
    free: [Vec<Extent>; CLASSES],
    /// Buffers given out.
    live: usize,
}

impl Rmb {
    /// Buffers with rings of `ring` bytes (see [`ring_size`]), in a segment that the peer has (bit n of
    /// `peer_has`: segment n) or can be given. `limit`: bytes of segments this process may map.
    ///
    /// Does not wait: [`Refused::Busy`] while another thread is in here.
    pub fn allocate(&self, ring: usize, peer_has: u64, limit: u64, fd_base: i32) -> Result<Grant, Refused> {
        let mut synced = try_lock(&self.synced).ok_or(Refused::Busy)?;
        self.returned.take_all(|b| synced.pending.push(b));
        synced.collect();
        synced.trim(peer_has);
        let (buffers, memfd) = match synced.cut(ring, peer_has) {
            Some(found) => found,
            None => {
                synced.grow(ring, limit, fd_base)?;
                synced.cut(ring, peer_has).ok_or(Refused::Limit)?
            }
        };
        let ticket = Ticket::new(buffers.clone());
        Ok(Grant { buffers, ticket, memfd })
    }

    /// Takes buffers back, once this side has detached from them (or left that to others). No lock, no
    /// allocation: safe wherever a connection may be dropped, also between fork and exec.
    pub fn give(&self, ticket: Ticket) {
        self.returned.push(ticket);
    }

    /// Lets the descriptor go: whoever asks for the segment from now on gets a new one. Does not wait.
    pub fn give_back_fd(&self) {
        if let Some(mut s) = try_lock(&self.synced) {
            s.cuts.iter_mut().for_each(|c| c.memfd = None);
        }
    }

    /// Segments mapped now, and bytes in them; zeros while another thread allocates.
    #[must_use]
    pub fn segments(&self) -> (usize, u64) {
        try_lock(&self.synced)
            .map_or((0, 0), |s| (s.cuts.len(), s.cuts.iter().map(|c| c.segment.region.len() as u64).sum()))
    }
}

/// The lock, or `None` while another thread has it: nothing in a handshake waits. A panic under the lock can
/// leave no half-made state behind that matters (lists of plain offsets), so poison is passed over.
pub(crate) fn try_lock<T>(m: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match m.try_lock() {
        Ok(g) => Some(g),
        Err(TryLockError::Poisoned(p)) => Some(p.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Synced {
    /// Moves what both sides have let go to the free lists.
    fn collect(&mut self) {
        let cuts = &mut self.cuts;
        self.pending.retain(|b| {
            if !b.is_free() {
                return true;
            }
            if let Some(cut) = cuts.iter_mut().find(|c| c.segment.number == b.segment.number) {
                cut.live -= 1;
                let free = &mut cut.free[class(b.extent.ring_size)];
                if free.len() >= KEPT {
                    // Nobody looks at its marks any more.
                    cut.segment.region.give_back(b.extent.block() + b.extent.ring_size, UNIT);
                }
                free.push(b.extent);
            }
            false
        });
    }

    /// Drops segments that are idle and that the peer neither has nor can get any more.
    fn trim(&mut self, peer_has: u64) {
        self.cuts.retain(|c| c.live > 0 || c.reachable(peer_has));
    }

    fn cut(&mut self, ring: usize, peer_has: u64) -> Option<(Buffers, Option<Arc<Fd>>)> {
        self.cuts.iter_mut().filter(|c| c.reachable(peer_has)).find_map(|c| {
            let buffers = c.take(ring)?;
            let memfd = if c.peer_has(peer_has) { None } else { c.memfd.clone() };
            Some((buffers, memfd))
        })
    }

    /// Adds a segment, twice as large as the last, or as large as the limit lets it be.
    fn grow(&mut self, ring: usize, limit: u64, fd_base: i32) -> Result<(), Refused> {
        if self.made >= MAX_SEGMENTS {
            return Err(Refused::Exhausted);
        }
        let least = segment_for(ring);
        let mut size = FIRST_SEGMENT.checked_shl(self.made).unwrap_or(MAX_SEGMENT).clamp(least, MAX_SEGMENT);
        let (region, memfd) = loop {
            match Region::create(size, limit) {
                Ok(made) => break made,
                Err(RegionError::Limit) if size > least => size /= 2,
                Err(RegionError::Limit | RegionError::Unfit) => return Err(Refused::Limit),
                Err(RegionError::Sys(e)) => return Err(Refused::Sys(e)),
            }
        };
        let memfd = memfd.raise(fd_base).map_err(Refused::Sys)?;
        for older in &mut self.cuts {
            older.memfd = None;
        }
        self.cuts.push(Cut {
            next: 0,
            segment: Arc::new(Segment { number: self.made, region }),
            memfd: Some(Arc::new(memfd)),
            free: Default::default(),
            live: 0,
        });
        self.made += 1;
        Ok(())
    }
}

/// The smallest segment that holds one pair of rings of `ring` bytes.
fn segment_for(ring: usize) -> usize {
    let mut size = SEGMENT_GRAIN;
    while size < Extent::block_size(ring) {
        size *= 2;
    }
    size
}

impl Cut {
    fn peer_has(&self, peer_has: u64) -> bool {
        peer_has >> self.segment.number & 1 != 0
    }

    fn reachable(&self, peer_has: u64) -> bool {
        self.peer_has(peer_has) || self.memfd.is_some()
    }

    /// Buffers from the free list or from the part that was never cut; zeroed.
    fn take(&mut self, ring: usize) -> Option<Buffers> {
        let (extent, used) = match self.free[class(ring)].pop() {
            Some(extent) => (extent, true),
            None => (self.fresh(ring)?, false),
        };
        let buffers = Buffers::new(self.segment.clone(), extent)?;
        // Still under the allocator's lock and before anybody knows of these buffers. What a peer that lies has written
        // where nothing was cut yet is its own secret; only of the page it is made sure.
        if used {
            buffers.zero()
        } else {
            buffers.zero_page()
        }
        self.live += 1;
        Some(buffers)
    }

    fn fresh(&mut self, ring: usize) -> Option<Extent> {
        let extent = Extent::at(self.next, ring);
        if !extent.fits(self.segment.region.len()) {
            return None;
        }
        self.next += Extent::block_size(ring);
        Some(extent)
    }
}

/// The right to give buffers back, once. Made with the buffers, so that giving back allocates nothing.
#[derive(Debug)]
pub struct Ticket(Box<Node>);

#[derive(Debug)]
struct Node {
    buffers: Buffers,
    next: *mut Node,
}

impl Ticket {
    fn new(buffers: Buffers) -> Ticket {
        Ticket(Box::new(Node { buffers, next: std::ptr::null_mut() }))
    }
}

// SAFETY: `next` is null, or a node that belongs to the list; a Ticket off the list has it null.
unsafe impl Send for Ticket {}
// SAFETY: as above; nothing is changed through `&Ticket`.
unsafe impl Sync for Ticket {}

/// A list that anybody pushes to and one takes whole. Nothing is ever popped singly, hence no ABA.
#[derive(Debug, Default)]
struct Returned {
    head: AtomicPtr<Node>,
}

impl Returned {
    fn push(&self, ticket: Ticket) {
        let node = Box::into_raw(ticket.0);
        let mut head = self.head.load(Relaxed);
        loop {
            // SAFETY: `node` came from a Box and is not on the list yet, so it is ours alone.
            unsafe { (*node).next = head };
            // ORDERING [rmb.returned] Release; pairs with the Acquire swap in take_all. Carries: the node.
            match self.head.compare_exchange_weak(head, node, Release, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    fn take_all(&self, mut each: impl FnMut(Buffers)) {
        // ORDERING [rmb.returned] Acquire; pairs with the Release push. Carries: all nodes on the list (each
        // push is a read-modify-write, so the chain of releases is unbroken).
        let mut head = self.head.swap(std::ptr::null_mut(), Acquire);
        while !head.is_null() {
            // SAFETY: the swap took the whole list from everybody else; each node came from a Box in push.
            let node = unsafe { Box::from_raw(head) };
            head = node.next;
            each(node.buffers);
        }
    }
}

impl Drop for Returned {
    fn drop(&mut self) {
        self.take_all(drop);
    }
}

#[cfg(all(test, not(smc_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: i32 = 100;

    fn take(rmb: &Rmb, ring: usize, has: u64) -> Grant {
        rmb.allocate(ring, has, u64::MAX, BASE).unwrap()
    }

    #[test]
    fn the_second_needs_no_memfd_and_nothing_overlaps() {
        let rmb = Rmb::default();
        let a = take(&rmb, MIN_RING, 0);
        assert!(a.memfd.is_some());
        let b = take(&rmb, MIN_RING, 1);
        assert!(b.memfd.is_none());
        assert!(Arc::ptr_eq(a.buffers.segment(), b.buffers.segment()));
        assert_ne!(a.buffers.extent().page, b.buffers.extent().page);
        assert!(a.buffers.extent().rings[0] + MIN_RING <= b.buffers.extent().rings[1]);
        let c = take(&rmb, MIN_RING, 0);
        assert!(c.memfd.is_some(), "asked for by a peer that has it not yet");
    }

    #[test]
    fn reused_only_when_both_have_let_go_and_then_zero() {
        let rmb = Rmb::default();
        let a = take(&rmb, MIN_RING, 0);
        let extent = *a.buffers.extent();
        for i in 0..2 {
            // SAFETY: inside the buffers, which live; nobody else uses them.
            unsafe { a.buffers.ring(i).0.write_bytes(0x55, MIN_RING) };
        }
        a.buffers.page().side[0].tx.prod.store(9, Relaxed);
        a.buffers.detach(1);
        let peer = a.buffers.clone();
        rmb.give(a.ticket);
        let b = take(&rmb, MIN_RING, 1);
        assert_ne!(*b.buffers.extent(), extent, "the peer still uses it");
        // A last write of the peer's, then it lets go.
        // SAFETY: as above.
        unsafe { peer.ring(0).0.write_bytes(0x66, MIN_RING) };
        peer.detach(0);
        let c = take(&rmb, MIN_RING, 1);
        assert_eq!(*c.buffers.extent(), extent);
        for i in 0..2 {
            let (p, n) = c.buffers.ring(i);
            // SAFETY: as above.
            assert!((0..n).all(|k| unsafe { p.add(k).read_volatile() } == 0));
        }
        assert_eq!(c.buffers.page().side[0].tx.prod.load(Relaxed), 0);
        assert!(c.buffers.page().side.iter().all(|s| s.hint.detached.load(Relaxed) == 0));
    }

    #[test]
    fn both_at_once_is_zeroed_by_the_allocator() {
        let rmb = Rmb::default();
        let a = take(&rmb, MIN_RING, 0);
        // SAFETY: inside the buffers, which live; nobody else uses them.
        unsafe { a.buffers.ring(1).0.write_bytes(0x55, MIN_RING) };
        a.buffers.abandon(); // marks without holes, as two simultaneous detaches leave it
        rmb.give(a.ticket);
        let b = take(&rmb, MIN_RING, 1);
        // SAFETY: as above.
        assert_eq!(unsafe { b.buffers.ring(1).0.read_volatile() }, 0);
    }

    #[test]
    fn grows_by_doubling_segments() {
        let rmb = Rmb::default();
        let grants: Vec<_> = (0..40).map(|_| take(&rmb, 256 << 10, u64::MAX)).collect();
        let (n, bytes) = rmb.segments();
        assert!(n >= 3, "{n} segments");
        assert_eq!(bytes, (0..n).map(|i| (FIRST_SEGMENT << i) as u64).sum::<u64>());
        let fds = synced_fds(&rmb);
        assert_eq!(fds, 1, "one descriptor however many segments");
        assert_eq!(grants.len(), 40);
        assert_eq!(take(&Rmb::default(), MAX_RING, 0).buffers.segment().region.len(), 16 << 20);
    }

    fn synced_fds(rmb: &Rmb) -> usize {
        try_lock(&rmb.synced).unwrap().cuts.iter().filter(|c| c.memfd.is_some()).count()
    }

    #[test]
    fn idle_segments_out_of_the_peers_reach_go() {
        let rmb = Rmb::default();
        let grants: Vec<_> = (0..10).map(|_| take(&rmb, 256 << 10, u64::MAX)).collect();
        assert_eq!(rmb.segments().0, 2);
        for g in grants {
            g.buffers.abandon();
            rmb.give(g.ticket);
        }
        take(&rmb, MIN_RING, 0);
        assert_eq!(rmb.segments().0, 1);
    }

    #[test]
    fn the_limit_makes_small_segments_and_then_none() {
        let rmb = Rmb::default();
        let limit = super::super::region::mapped_bytes() + (1 << 20);
        // Other tests map and unmap meanwhile, so only what can't be otherwise is asked.
        assert_eq!(rmb.allocate(MAX_RING, 0, 1 << 20, BASE).err(), Some(Refused::Limit));
        if let Ok(g) = rmb.allocate(MIN_RING, 0, limit, BASE) {
            assert!(g.buffers.segment().region.len() <= 1 << 20);
        }
    }

    #[test]
    fn no_more_than_64_segments() {
        let rmb = Rmb::default();
        try_lock(&rmb.synced).unwrap().made = MAX_SEGMENTS;
        assert_eq!(rmb.allocate(MIN_RING, 0, u64::MAX, BASE).err(), Some(Refused::Exhausted));
    }

    #[test]
    fn busy_while_another_allocates() {
        let rmb = Rmb::default();
        let guard = rmb.synced.lock();
        assert_eq!(rmb.allocate(MIN_RING, 0, u64::MAX, BASE).err(), Some(Refused::Busy));
        drop(guard);
        take(&rmb, MIN_RING, 0);
    }

    #[test]
    fn sizes() {
        assert_eq!(ring_size(0), MIN_RING);
        assert_eq!(ring_size(100_000), 128 << 10);
        assert_eq!(ring_size(usize::MAX), MAX_RING);
        assert_eq!((class(MIN_RING), class(MAX_RING)), (0, CLASSES - 1));
    }

    #[test]
    fn unfit_extents() {
        let good = Extent::at(65536, MIN_RING);
        let len = 1 << 20;
        assert!(good.fits(len));
        assert_eq!((good.rings[1], good.page), (65536 + 1792, 65536 + 1792 + MIN_RING));
        let end = len - Extent::block_size(MIN_RING);
        assert!(Extent::at(end, MIN_RING).fits(len) && !Extent::at(end + 4096, MIN_RING).fits(len));
        let [a, b] = good.rings;
        let bad = [
            Extent { page: good.page + 64, ..good },
            Extent { page: len, ..good },
            Extent { page: usize::MAX & !511, ..good },
            Extent { rings: [a, a], ..good },
            Extent { rings: [a, b + 4096], ..good },
            Extent { rings: [a + 4096, b], ..good },
            Extent { rings: [a, usize::MAX & !4095], ..good },
            Extent { rings: [a, (usize::MAX & !4095) + 1792], ..good },
            Extent { rings: [a, 0], ..good },
            Extent { rings: [b, a], ..good },
            Extent::at(65536 + 64, MIN_RING),
            Extent { ring_size: MIN_RING + 1, ..good },
            Extent { ring_size: MIN_RING / 2, ..good },
            Extent { ring_size: 2 * MIN_RING, ..good },
            Extent { ring_size: usize::MAX, ..good },
            Extent { ring_size: 0, ..good },
        ];
        for e in bad {
            assert!(!e.fits(len), "{e:?}");
        }
    }

    #[test]
    fn a_block_that_is_not_wanted_soon_keeps_no_memory() {
        let rmb = Rmb::default();
        let grants: Vec<_> = (0..KEPT + 10).map(|_| take(&rmb, MIN_RING, u64::MAX)).collect();
        for g in &grants {
            g.buffers.page().side[0].tx.prod.store(9, Relaxed);
        }
        let pages: Vec<Buffers> = grants.iter().map(|g| g.buffers.clone()).collect();
        for g in grants {
            g.buffers.abandon();
            rmb.give(g.ticket);
        }
        take(&rmb, MAX_RING, u64::MAX);
        let gone = pages.iter().filter(|b| b.page().side[0].tx.prod.load(Relaxed) == 0).count();
        assert_eq!(gone, 10);
    }

    proptest! {
        #[test]
        fn any_numbers_fit_or_not_but_never_overflow(page: usize, a: usize, b: usize, n: usize, len: usize) {
            let _ = Extent { page, rings: [a, b], ring_size: n }.fits(len);
            let _ = Extent { page, rings: [a, b & !4095 | WINDOW], ring_size: n }.fits(len);
        }
    }
}

/// Letting go, on the real functions, with loom's cells as the rings: an access, a hole and a reuse that are
/// not ordered fail the model.
#[cfg(all(test, smc_loom))]
mod loom_models {
    use super::*;
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    /// One cell for what each side touches; holes and reuse touch both.
    struct Shared {
        page: ConnPage,
        rings: [UnsafeCell<u8>; 2],
    }

    fn wipe(s: &Shared) {
        // SAFETY: exclusive if the protocol is right, which is what loom checks.
        s.rings.iter().for_each(|r| r.with_mut(|p| unsafe { *p = 0 }));
    }

    fn use_and_let_go(s: &Shared, i: usize) {
        // SAFETY: each side has a cell of its own; others wait until it let go, which is what loom checks.
        s.rings[i].with_mut(|p| unsafe { *p = 0x55 });
        let_go(&s.page, i, || wipe(s));
    }

    /// [detach.reuse]: both sides let go while the allocator looks; no hole hits the next user's bytes.
    #[test]
    fn loom_detach() {
        let mut b = loom::model::Builder::new();
        b.preemption_bound = Some(3);
        b.check(|| {
            let s = Arc::new(Shared {
                page: ConnPage::default(),
                rings: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let t = s.clone();
            let peer = thread::spawn(move || use_and_let_go(&t, 0));
            let t = s.clone();
            let owner = thread::spawn(move || use_and_let_go(&t, 1));
            let reuse = |s: &Shared| {
                wipe(s);
                // SAFETY: as in `use_and_let_go`, for the next connection.
                s.rings[0].with_mut(|p| unsafe { *p = 0x77 });
            };
            let early = nobody_left(&s.page);
            if early {
                reuse(&s);
            }
            peer.join().unwrap();
            owner.join().unwrap();
            assert!(nobody_left(&s.page));
            if early {
                // SAFETY: the threads are gone.
                s.rings[0].with(|p| assert_eq!(unsafe { *p }, 0x77, "no late hole"));
            }
        });
    }
}
