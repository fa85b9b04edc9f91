//! One TCP connection that is, or may become, faster than TCP.
//!
//! A [`Socket`] stands for an open file description. What must survive fork is in its arena [`Slot`]; what
//! belongs to this process (mappings, the doorbell fd, the handshake under way) is here.
//!
//! ```text
//! phase    COUNTING ── threshold ──> HANDSHAKE ── Done ──> MAPPED
//!             │  ^──── fork, retry ─────┘ Failed              (tx and rx then switch each on its own)
//!             └──────────────────────> OFF <──────────────────┘ barred
//!
//! rx.mode  TCP ─> READY ─ TCP read up to N ─> RING ─ left, or stopped and empty ─> DONE
//! tx.mode  TCP ─> ANNOUNCED(N) ─ TCP sent N ─> RING ─ leave ─> DONE
//!                                               └── peer stopped ─> FLUSH ─> DONE
//! ```
//!
//! Going back to TCP is always the same act, whatever the cause (close, shutdown, a call that the ring can't
//! carry, the peer's death): the stream leaves the ring at a cursor, and what comes after is the kernel's:
//! bytes, FIN or RST.
#![allow(unsafe_code)]

mod bounds;
mod close;
mod fate;
mod forced;
mod holders;
mod native;
mod patience;
pub mod remote;
mod rx;
mod spans;
mod tx;
mod waiting;

pub use rx::recv_with;
pub use spans::{Lent, Reserved, SharedSlice};
pub use tx::{Kernel, send_with};
pub use waiting::{Nap, on_drained, sleep_with};

use crate::arena::{self, Slot, each, rx_mode, tx_mode};
use crate::config::{Threshold, config};
use crate::counts;
use crate::gate;
use crate::handshake::local::{Established, Rendezvous, RendezvousConfig, Step};
use crate::lock;
use crate::mem::layout::SidePage;
use crate::once::Once;
use crate::reason::Reason;
use crate::ring::Buffer;
use crate::section;
use crate::sync::{AtomicU32, AtomicU64, Ordering::*};
use crate::sys;
use std::cell::UnsafeCell;
use std::sync::atomic::AtomicPtr;

/// The connecting or the accepting end.
pub use crate::handshake::Side;

/// Values of `phase`.
mod phase {
    pub const COUNTING: u32 = 0;
    pub const HANDSHAKE: u32 = 1;
    pub const MAPPED: u32 = 2;
    pub const OFF: u32 = 3;
}

/// A connection that has moved so much, in messages of this size on average, moves bulk.
const BULK_BYTES: u64 = 64 << 10;
const BULK_MESSAGE: u64 = 8 << 10;
/// Connections of this process with large rings: beyond these, all get small ones.
const MOST_BULK: u32 = 64;
static BULK: AtomicU32 = AtomicU32::new(0);

/// Looks for the peer at every call so many times, then ever more seldom: [`spacing`].
const EAGER_TRIES: u32 = 24;
/// Most calls between two looks.
const MAX_SPACING: u32 = 128;
/// Looks before the peer is taken to have no libsmc.
const MAX_TRIES: u32 = 96;

/// From so many bytes on a sender gives the handshake time, and again after each so many more: [`Socket::hold`].
const HOLD_FROM: u64 = 128 << 10;
const HOLD_EVERY: u64 = 64 << 10;
/// So long at a time and so often while the handshake is under way; while nobody has answered yet, less.
const HOLD_NS: u64 = 100_000;
const MOST_HOLDS: u32 = 32;
const UNMET_HOLD_NS: u64 = 30_000;
const MOST_UNMET_HOLDS: u32 = 8;
/// A sender that may block then sleeps so long at a time and so often, for a peer that is not on a CPU.
const HOLD_NAP_NS: u64 = 200_000;
const MOST_HOLD_NAPS: u32 = 50;

/// Who hears of an upgrade before it happens.
static UPGRADE: Once<fn()> = Once::new();

/// Names the function to call before a connection has memory: from then on a call may hold what a handler of the same
/// thread's would wait for. The first call counts.
pub fn on_upgrade(f: fn()) {
    let _ = UPGRADE.set(f);
}

/// Who may object to an upgrade.
static HANDSHAKE: Once<fn() -> Option<Reason>> = Once::new();

/// Names the function that is asked before a connection looks for its peer: what it says keeps the connection on TCP for
/// good. It is called under locks. The first call counts.
pub fn on_handshake(f: fn() -> Option<Reason>) {
    let _ = HANDSHAKE.set(f);
}

/// What is known of the sets of epoll that a connection is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sets {
    /// It is in none that we know.
    None,
    /// The program has waited for one of them in a call that we have seen.
    WaitedFor,
    /// It has not, so far.
    Unattended,
}

/// Who knows the sets of a connection.
static SETS: Once<fn(&Socket) -> Sets> = Once::new();

/// Names the function that knows a connection's sets of epoll. It must not wait for a lock. The first call counts.
pub fn on_sets(f: fn(&Socket) -> Sets) {
    let _ = SETS.set(f);
}

/// So many calls in a row that find nothing to read come from a program that looks again and again. One that waits by
/// instructions of its own finds something at nearly every call after its wait.
const DRY: u32 = 32;

/// Calls from the `n`th look to the next.
fn spacing(n: u32) -> u32 {
    if n <= EAGER_TRIES {
        1
    } else {
        1u32.checked_shl((n - EAGER_TRIES) / 2).map_or(MAX_SPACING, |s| s.min(MAX_SPACING))
    }
}

/// In `changed`: a direction has switched.
const CHANGED: u32 = 1;

/// What a connection may have of its own instead of the process's settings.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// When it has proved worth an upgrade.
    pub upgrade_after: Threshold,
    /// Bytes of a ring, a power of two; 0: by what it moves.
    pub ring_size: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { upgrade_after: config().upgrade_after, ring_size: 0 }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Socket {
    slot: AtomicPtr<Slot>,
    phase: AtomicU32,
    /// Guards `handshake`; only ever tried.
    handshake_lock: AtomicU32,
    handshake: UnsafeCell<Option<Rendezvous>>,
    established: AtomicPtr<Established>,
    ops: AtomicU32,
    bytes: AtomicU64,
    /// [`Tuning`]: bytes after which an upgrade is tried, and the ring that is wanted.
    after: AtomicU64,
    ring_size: AtomicU32,
    next_try: AtomicU32,
    tries: AtomicU32,
    /// Bytes at which a sender next gives the handshake time, and how often it has.
    hold_at: AtomicU64,
    holds: AtomicU32,
    hold_naps: AtomicU32,
    /// [`CHANGED`]: a direction has switched or the doorbell has come or gone; the shim clears it.
    /// [`forced::FORCED`]: every call has a look here.
    changed: AtomicU32,
    /// Calls until the next [forced downgrade](forced); tests only.
    forced_in: AtomicU32,
    /// 1: an epoll set of this process has the doorbell in it and trusts it to stay armed.
    watched: AtomicU32,
    /// The last fd of this process has been closed; its number may be another's by now.
    closed: AtomicU32,
    /// An fd of our own, plus one, under which the socket lives on for calls that were under way when the
    /// program closed its last. 0: none.
    parked: AtomicU32,
    /// Calls of this process that sleep for room to send, and for nothing else of the connection's.
    outward: AtomicU32,
    /// Its peer may be on another host, and no call has asked yet, or its stream may begin with a message, see
    /// `remote.rs`.
    wanted: AtomicU32,
    /// 1: it was handed to a program or process that does not count as a holder.
    handed: AtomicU32,
    /// Calls without waiting that have found nothing.
    idle: AtomicU32,
    /// Waits to read since the last send, and what was sent then.
    fed: AtomicU32,
    sent_then: AtomicU64,
    /// Calls that armed the doorbell for a set that is told of edges.
    rearms: AtomicU32,
    /// How much the peer had taken when a sender last looked.
    cons_then: AtomicU64,
    /// The producer cursor up to which the program knows of bytes in the ring.
    promised: AtomicU64,
    /// The fork that counted its child as a holder last.
    fork: AtomicU32,
    /// This process among the holders: its token, 0 if it has no seat, and where its calls are counted.
    token: AtomicU32,
    seat: AtomicU32,
    /// The program has been seen waiting for this connection, or needs no wait: see [`Socket::is_waited_unseen`].
    waited: AtomicU32,
    /// Reads of TCP in a row that have found nothing.
    dry: AtomicU32,
    /// The connect that has begun it is under way, as far as the program has heard.
    connecting: AtomicU32,
    /// Looks for other holders since this process was alone.
    looks: AtomicU32,
    /// Slot counters when this process came to the slot (fork), not its own traffic.
    base: [AtomicU64; 4],
}

// SAFETY: `handshake` is touched only under `handshake_lock`; all else is atomic.
unsafe impl Sync for Socket {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Socket {}

/// What poll or epoll would report, and which of these bits the kernel must be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// `POLLIN`, `POLLOUT` as the ring has them; `POLLERR` for an error that the kernel does not tell (any more).
    pub ready: u32,
    /// `POLLIN`, `POLLOUT` bits for which the kernel's word on the TCP fd counts.
    pub from_kernel: u32,
}

/// A connection's numbers for the statistics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Best mode: 0 TCP, 1 SHM, 2 RDMA.
    pub best: u32,
    /// Reason code, 0 none.
    pub reason: u32,
    /// Bytes: ring_tx, ring_rx, tcp_tx, tcp_rx.
    pub bytes: [u64; 4],
    /// Waits that ended by polling.
    pub polled: u64,
    /// Waits that slept.
    pub slept: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Upgrades.
    pub upgrades: u32,
    /// Downgrades.
    pub downgrades: u32,
}

/// The mapped half of a connection as the data path uses it.
#[derive(Clone, Copy)]
struct Mapped<'a> {
    me: &'a SidePage,
    peer: &'a SidePage,
    txbuf: Buffer,
    rxbuf: Buffer,
    bell: i32,
    /// Doorbells that this process has rung at the peer's.
    rang: &'a AtomicU32,
}

impl Mapped<'_> {
    /// Most bytes that the peer leaves unread in the ring.
    fn most_unread(&self) -> u64 {
        bounds::most(&self.peer.tx, &self.me.rx, self.rxbuf.size())
    }

    /// The place in the ring of `cursor`, before which or at which bytes can be read.
    #[inline(always)]
    fn rx_at(&self, cursor: u64) -> u64 {
        crate::ring::at(&self.peer.tx, cursor)
    }

    /// Whether the peer's end of the doorbell is closed; rings may still be on it.
    fn peer_gone(&self) -> bool {
        let mut p = [libc::pollfd { fd: self.bell, events: 0, revents: 0 }];
        sys::poll(&mut p, Some(0)) > 0 && p[0].revents & (libc::POLLHUP | libc::POLLERR) != 0
    }
}

impl Default for Socket {
    fn default() -> Self {
        Self::new()
    }
}

impl Socket {
    /// An unused one; [`init`](Self::init) makes it a connection.
    pub const fn new() -> Self {
        Socket {
            slot: AtomicPtr::new(std::ptr::null_mut()),
            phase: AtomicU32::new(phase::OFF),
            handshake_lock: AtomicU32::new(0),
            handshake: UnsafeCell::new(None),
            established: AtomicPtr::new(std::ptr::null_mut()),
            ops: AtomicU32::new(0),
            bytes: AtomicU64::new(0),
            after: AtomicU64::new(0),
            ring_size: AtomicU32::new(0),
            next_try: AtomicU32::new(0),
            tries: AtomicU32::new(0),
            hold_at: AtomicU64::new(0),
            holds: AtomicU32::new(0),
            hold_naps: AtomicU32::new(0),
            changed: AtomicU32::new(0),
            forced_in: AtomicU32::new(0),
            watched: AtomicU32::new(0),
            closed: AtomicU32::new(0),
            parked: AtomicU32::new(0),
            outward: AtomicU32::new(0),
            wanted: AtomicU32::new(0),
            handed: AtomicU32::new(0),
            idle: AtomicU32::new(0),
            fed: AtomicU32::new(0),
            sent_then: AtomicU64::new(0),
            rearms: AtomicU32::new(0),
            cons_then: AtomicU64::new(0),
            promised: AtomicU64::new(0),
            fork: AtomicU32::new(0),
            token: AtomicU32::new(0),
            seat: AtomicU32::new(0),
            waited: AtomicU32::new(0),
            dry: AtomicU32::new(0),
            connecting: AtomicU32::new(0),
            looks: AtomicU32::new(0),
            base: [const { AtomicU64::new(0) }; 4],
        }
    }

    /// Starts a connection; false when there is no room in the arena (then it is not tracked).
    pub fn init(&self, role: Side, nonblock: bool) -> bool {
        self.init_with(role, nonblock, Tuning::default())
    }

    /// [`init`](Self::init) with settings of its own.
    pub fn init_with(&self, role: Side, nonblock: bool, tuning: Tuning) -> bool {
        let Some(slot) = arena::take() else { return false };
        slot.cookie.store(0, Relaxed);
        slot.role.store(role as u32, Relaxed);
        slot.nonblock.store(nonblock.into(), Relaxed);
        slot.reason.store(Reason::TooShort.code(), Relaxed);
        self.bytes.store(0, Relaxed);
        self.cons_then.store(0, Relaxed);
        self.promised.store(0, Relaxed);
        self.first_holder(slot);
        self.hold_at.store(HOLD_FROM, Relaxed);
        for w in [&self.ops, &self.tries, &self.holds, &self.hold_naps, &self.changed, &self.watched] {
            w.store(0, Relaxed);
        }
        for w in [&self.closed, &self.parked, &self.handed, &self.idle, &self.fork, &self.looks] {
            w.store(0, Relaxed);
        }
        for w in [&self.waited, &self.dry, &self.connecting] {
            w.store(0, Relaxed);
        }
        for w in &self.base {
            w.store(0, Relaxed);
        }
        self.next_try.store(tuning.upgrade_after.ops, Relaxed);
        self.after.store(tuning.upgrade_after.bytes, Relaxed);
        self.ring_size.store(tuning.ring_size, Relaxed);
        self.force();
        self.expect_peer();
        self.phase.store(phase::COUNTING, Relaxed);
        // ORDERING [socket.slot] Release; pairs with the Acquire in `slot`. Carries: the words above.
        self.slot.store(std::ptr::from_ref(slot).cast_mut(), Release);
        true
    }

    /// It is about to be handed to a program or process that does not count as a holder, and may outlive its
    /// last fd and holder that we know of.
    pub fn set_handed(&self) {
        self.handed.store(1, Relaxed);
    }

    /// See [`Socket::set_handed`].
    pub fn was_handed(&self) -> bool {
        self.handed.load(Relaxed) != 0
    }

    /// The shared half. A connection that was never initialised has none.
    #[inline]
    pub fn slot(&self) -> Option<&Slot> {
        // ORDERING [socket.slot] Acquire; pairs with the Release in `init`.
        let p = self.slot.load(Acquire);
        // SAFETY: null or a slot of the arena, which is never unmapped.
        unsafe { p.as_ref() }
    }

    /// Whether `fd` is certainly this very socket. Only one whose upgrade has begun knows that.
    pub fn is_same(&self, fd: i32) -> bool {
        let cookie = self.slot().map_or(0, |s| s.cookie.load(Relaxed));
        cookie != 0 && cookie == sys::cookie(fd)
    }

    #[inline]
    fn mapped(&self) -> Option<Mapped<'_>> {
        // ORDERING [socket.mapped] Acquire; pairs with the Release in `adopt`. Carries: the Established.
        let p = self.established.load(Acquire);
        // SAFETY: null, or a Box that lives until `finish`, which runs when nobody uses this socket.
        let est = unsafe { p.as_ref() }?;
        let side = est.buffers.side();
        let page = est.buffers.page();
        let (tp, tn) = est.buffers.tx();
        let (rp, rn) = est.buffers.rx();
        Some(Mapped {
            me: &page.side[side as usize],
            peer: &page.side[1 - side as usize],
            // SAFETY: ConnBuffers vouches for the ranges while it lives; powers of two by its check.
            txbuf: unsafe { Buffer::new(tp, tn) }.starting_at(est.buffers.start()),
            // SAFETY: as above.
            rxbuf: unsafe { Buffer::new(rp, rn) },
            bell: est.bell.raw(),
            rang: est.buffers.lgr().rang(),
        })
    }

    /// The doorbell's fd, once there is one.
    pub fn bell(&self) -> Option<i32> {
        self.mapped().map(|m| m.bell)
    }

    /// Whether there is anything to do after a call that moved bytes: see [`call_ends`](Self::call_ends)
    /// and [`take_changed`](Self::take_changed).
    #[inline]
    pub fn has_changed(&self) -> bool {
        self.changed.load(Relaxed) != 0
    }

    /// Whether a direction has switched since the last call.
    #[inline]
    pub fn take_changed(&self) -> bool {
        self.has_changed() && self.changed.fetch_and(!CHANGED, AcqRel) & CHANGED != 0
    }

    fn set_changed(&self) {
        self.changed.fetch_or(CHANGED, Release);
    }

    /// May not be upgraded (any more) for `why`; says nothing about directions that are in the ring.
    pub fn bar(&self, why: Reason) {
        if let Some(s) = self.slot() {
            gate::bar(&s.barred, 1);
            s.reason.store(why.code(), Relaxed);
        }
        if self.phase.load(Relaxed) != phase::MAPPED {
            self.phase.store(phase::OFF, Relaxed);
        }
        if let Some(_g) = lock::try_lock(&self.handshake_lock) {
            // SAFETY: under handshake_lock.
            unsafe { *self.handshake.get() = None };
        }
    }

    /// Hands the program's call to the kernel. Handlers run meanwhile, and may leave by a jump.
    fn in_kernel(&self, kernel: Kernel<'_>) -> isize {
        section::window(self, &mut || (), &mut |_| kernel())
    }

    /// As [`section::window`], for what may sleep for room to send and no more.
    fn window_outward(&self, undo: &mut dyn FnMut(), f: &mut dyn FnMut(section::Ran) -> isize) -> isize {
        self.goes_outward(true);
        let mut both = || {
            undo();
            self.goes_outward(false);
        };
        let n = section::window(self, &mut both, f);
        self.goes_outward(false);
        n
    }

    /// A call begins to sleep for room to send, or has ceased to.
    fn goes_outward(&self, begins: bool) {
        if begins {
            counts::sleeps(&self.outward);
        } else {
            counts::wakes(&self.outward);
        }
    }

    /// Calls of this process that sleep until they can send, and are not to be told of anything else. Each finds the
    /// socket by [`fd_now`](Self::fd_now) when it goes on.
    pub fn outward(&self) -> &AtomicU32 {
        &self.outward
    }

    /// A call that moves bytes begins: count it, and move the upgrade on.
    #[inline]
    fn advance(&self, fd: i32, s: &Slot) {
        self.meet(fd);
        match self.phase.load(Relaxed) {
            phase::OFF => {}
            phase::MAPPED => self.advance_mapped(fd, s),
            p => {
                let ops = self.ops.fetch_add(1, Relaxed) + 1;
                if ops >= self.next_try.load(Relaxed)
                    || (p == phase::COUNTING
                        && self.bytes.load(Relaxed) >= self.after.load(Relaxed)
                        && self.tries.load(Relaxed) == 0)
                {
                    self.advance_handshake(fd, s, ops, true);
                }
            }
        }
    }

    /// Whether the peer has answered. `counted`: a look that counts towards giving up.
    #[cold]
    fn advance_handshake(&self, fd: i32, s: &Slot, ops: u32, counted: bool) -> bool {
        // Never waits: another thread, or the code this signal handler interrupted, is at it already.
        let Some(_g) = lock::try_lock(&self.handshake_lock) else { return false };
        // SAFETY: under handshake_lock.
        let hs = unsafe { &mut *self.handshake.get() };
        if s.barred.load(Relaxed) != 0 {
            *hs = None;
            self.phase.store(phase::OFF, Relaxed);
            return false;
        }
        if s.holders.load(Acquire) != 1 && !self.bury_dead(s) {
            // Another process holds it since a fork: look again later.
            *hs = None;
            s.reason.store(Reason::ForkShared.code(), Relaxed);
            self.postpone();
            return false;
        }
        if self.phase.load(Relaxed) == phase::COUNTING {
            if self.is_waited_unseen(fd, s) {
                s.reason.store(Reason::CountMismatch.code(), Relaxed);
                self.next_try.store(ops.saturating_add(1), Relaxed);
                return false;
            }
            if crate::internal_fds::is_tight() {
                s.reason.store(Reason::NoFds.code(), Relaxed);
                self.tries.fetch_max(1, Relaxed);
                self.postpone();
                return false;
            }
            if crate::mem::short::is_short() {
                s.reason.store(Reason::NoMemory.code(), Relaxed);
                self.tries.fetch_max(1, Relaxed);
                self.postpone();
                return false;
            }
            match self.start(fd, s) {
                Ok(r) => *hs = Some(r),
                Err(Reason::TooShort) => {
                    self.tries.fetch_max(1, Relaxed);
                    self.postpone();
                    return false;
                }
                Err(why) => {
                    self.give_up(s, hs, why);
                    return false;
                }
            }
            self.phase.store(phase::HANDSHAKE, Relaxed);
        }
        let Some(r) = hs.as_mut() else { return false };
        match r.step() {
            Step::Pending => {
                let met = r.met();
                if counted {
                    // Who has answered is there: its next call is waited for as long as it takes.
                    let n = (self.tries.load(Relaxed) + 1).min(if met { MAX_TRIES } else { u32::MAX });
                    self.tries.store(n, Relaxed);
                    if n > MAX_TRIES {
                        self.give_up(s, hs, Reason::PeerNoSmc);
                        return false;
                    }
                    self.next_try.store(ops.saturating_add(spacing(n)), Relaxed);
                }
                s.reason.store(Reason::PeerNoSmc.code(), Relaxed);
                met
            }
            Step::Failed(why) => {
                // Of a connection that was reset the kernel knows nothing, and that is no want of sock_diag.
                let reset = why == Reason::NoSockDiag && sys::tcp_is_closed(fd);
                self.give_up(s, hs, if reset { Reason::PeerGone } else { why });
                false
            }
            Step::Done(est) => {
                *hs = None;
                self.adopt(fd, s, est);
                self.advance_mapped(fd, s);
                true
            }
        }
    }

    /// connect(2) goes on behind the call.
    pub fn set_connecting(&self) {
        self.connecting.store(1, Relaxed);
    }

    /// connect(2) was called: whether one was under way for this very socket, which is no new one then.
    pub fn take_connecting(&self) -> bool {
        self.connecting.swap(0, Relaxed) != 0
    }

    /// A wait for this connection by a call that we see.
    #[inline]
    pub fn note_wait(&self) {
        // Relaxed, as all of `waited` and `dry`: they say how the program goes about it, and order nothing.
        if self.waited.load(Relaxed) == 0 {
            self.waited.store(1, Relaxed);
        }
    }

    /// A read of TCP has returned `r`.
    #[inline]
    fn note_dry(&self, r: isize) {
        let dry = self.dry.load(Relaxed);
        if r == -(libc::EAGAIN as isize) {
            self.dry.store(dry.saturating_add(1), Relaxed);
        } else if dry != 0 && dry < DRY {
            self.dry.store(0, Relaxed);
        }
    }

    /// Whether the program may wait for this connection by instructions of its own, as Bun does in epoll_pwait2 and
    /// programs that use Rust's crate `rustix` in all calls: it would sleep on TCP while the bytes lie in the ring, and
    /// no count tells, since a wait moves nothing. So it must be seen to need none, or to wait by calls that we see: its
    /// set has been waited for, it has stood in a list of poll or select, its calls block, or it looks again and again.
    /// Nearly every program has been seen so before its connection is worth an upgrade; for the others this is asked at
    /// each call from then on, and makes a system call only while it is not known to be non-blocking.
    #[cold]
    fn is_waited_unseen(&self, fd: i32, s: &Slot) -> bool {
        if self.waited.load(Relaxed) != 0 || self.dry.load(Relaxed) >= DRY {
            return false;
        }
        match SETS.get().map_or(Sets::WaitedFor, |f| f(self)) {
            Sets::WaitedFor => self.note_wait(),
            Sets::Unattended => return true,
            Sets::None => {
                // FIONBIO may have been set by an instruction as well.
                if s.nonblock.load(Relaxed) == 0 {
                    let fl = sys::getfl(fd);
                    s.nonblock.store((fl >= 0 && fl as i32 & libc::O_NONBLOCK != 0).into(), Relaxed);
                }
                return s.nonblock.load(Relaxed) != 0;
            }
        }
        false
    }

    /// A sender of bulk gives the handshake time. The kernel would take megabytes meanwhile, and all of them
    /// would go by TCP; so it lets the peer come to its next calls, which is what the handshake needs. Bounded
    /// by the constants, for a peer that does not call.
    #[cold]
    fn hold(&self, fd: i32, s: &Slot, block: bool) {
        let n = self.holds.load(Relaxed);
        self.holds.store(n + 1, Relaxed);
        self.hold_at.store(self.bytes.load(Relaxed).saturating_add(HOLD_EVERY), Relaxed);
        let ops = self.ops.load(Relaxed);
        let start = sys::now_ns();
        loop {
            let met = match self.phase.load(Relaxed) {
                phase::HANDSHAKE => self.advance_handshake(fd, s, ops, false),
                phase::MAPPED => {
                    self.advance_mapped(fd, s);
                    if self.mapped().is_none_or(|m| crate::handshake::switch::is_ready(m.peer)) {
                        return;
                    }
                    true
                }
                _ => return,
            };
            if section::is_deferred() {
                return;
            }
            let (most, ns) = if met { (MOST_HOLDS, HOLD_NS) } else { (MOST_UNMET_HOLDS, UNMET_HOLD_NS) };
            if n >= most {
                return;
            }
            if sys::now_ns().saturating_sub(start) < ns {
                sys::yield_cpu();
            } else if !block
                || !met
                || self.hold_naps.fetch_add(1, Relaxed) >= MOST_HOLD_NAPS
                || sys::poll(&mut [], Some(HOLD_NAP_NS)) < 0
            {
                return;
            }
        }
    }

    /// No handshake for now; after as many calls again it may begin.
    fn postpone(&self) {
        let ops = self.ops.load(Relaxed);
        self.phase.store(phase::COUNTING, Relaxed);
        self.next_try.store(ops.saturating_mul(2).max(ops.saturating_add(4)), Relaxed);
    }

    fn start(&self, fd: i32, s: &Slot) -> Result<Rendezvous, Reason> {
        // What socket(2) was asked for is not always what was made: mptcpize(8), BPF.
        if !sys::is_tcp(fd) {
            return Err(Reason::Ulp);
        }
        let ends = self.identify(fd, s)?;
        if !config().allows(crate::report::program(), &ends) {
            return Err(if config().disable { Reason::Disabled } else { Reason::Excluded });
        }
        if let Some(why) = HANDSHAKE.get().and_then(|f| f()) {
            return Err(why);
        }
        if wants_ancillary(fd) {
            return Err(Reason::SocketOption);
        }
        let side = if s.role.load(Relaxed) == 0 { Side::Connect } else { Side::Accept };
        let c = config();
        Rendezvous::new(
            side,
            fd,
            RendezvousConfig {
                ring_size: self.ring_wanted(side),
                mem_limit: c.mem_limit,
                fd_base: sys::fd_base(),
            },
        )
    }

    /// Both ends' addresses, as policy compares them, and into the slot.
    fn identify(&self, fd: i32, s: &Slot) -> Result<[(u128, u16); 2], Reason> {
        s.cookie.store(sys::cookie(fd), Relaxed);
        // No peer yet (a connect under way), or not any more.
        let (fam, local, lport) = sys::sockaddr(fd, false).ok_or(Reason::TooShort)?;
        let (_, peer, pport) = sys::sockaddr(fd, true).ok_or(Reason::TooShort)?;
        s.family.store(fam, Relaxed);
        s.local_port.store(lport.into(), Relaxed);
        s.peer_port.store(pport.into(), Relaxed);
        for i in 0..4 {
            s.local_addr[i].store(local[i], Relaxed);
            s.peer_addr[i].store(peer[i], Relaxed);
        }
        Ok([(wide(fam, local), lport), (wide(fam, peer), pport)])
    }

    /// Bytes wanted in each ring. The connecting end says what it takes the connection for; the accepting end
    /// bounds it.
    fn ring_wanted(&self, side: Side) -> usize {
        let own = self.ring_size.load(Relaxed);
        if own != 0 {
            return own as usize;
        }
        let (bytes, ops) = (self.bytes.load(Relaxed), u64::from(self.ops.load(Relaxed)));
        let bulk = side == Side::Accept || bytes >= BULK_BYTES && bytes / ops.max(1) >= BULK_MESSAGE;
        let c = config();
        if bulk && BULK.load(Relaxed) < MOST_BULK { c.bulk_rmb_size } else { c.rmb_size }
    }

    fn give_up(&self, s: &Slot, hs: &mut Option<Rendezvous>, why: Reason) {
        *hs = None;
        s.reason.store(why.code(), Relaxed);
        s.barred.fetch_or(1, Relaxed);
        self.phase.store(phase::OFF, Relaxed);
        crate::report::log_fallback(s, why);
        // Nothing has switched, but somebody wants to hear of it.
        if cfg!(feature = "tracing") || why == Reason::AsyncIo {
            self.set_changed();
        }
    }

    /// The peer's address, as [`sys::sockaddr`] tells it: the kernel forgets it once both ends have sent FIN (TCP_CLOSE).
    pub fn peer_address(&self) -> Option<(u32, [u32; 4], u16)> {
        let s = self.slot()?;
        let words = [0, 1, 2, 3].map(|i: usize| s.peer_addr[i].load(Relaxed));
        Some((s.family.load(Relaxed), words, s.peer_port.load(Relaxed) as u16))
    }

    /// The handshake is done: the mappings and the doorbell are this socket's.
    fn adopt(&self, fd: i32, s: &Slot, est: Box<Established>) {
        crate::internal_fds::add(est.bell.raw());
        let ring = est.buffers.rx().1;
        s.ring_size.store(ring as u32, Relaxed);
        if ring > config().rmb_size {
            BULK.fetch_add(1, Relaxed);
        }
        s.peer_pid.store(est.peer_pid as u32, Relaxed);
        s.pid.store(sys::getpid() as u32, Relaxed);
        s.reason.store(0, Relaxed);
        self.read_options(fd, s);
        if let Some(f) = UPGRADE.get() {
            f();
        }
        // ORDERING [socket.mapped] Release; pairs with the Acquire in `mapped`.
        self.established.store(Box::into_raw(est), Release);
        self.read_buffers(fd);
        self.phase.store(phase::MAPPED, Release);
        self.set_changed();
        if sys::tcp_is_shut(fd) {
            // It was not mapped then.
            self.tell_shut();
        }
    }

    /// Mapped, but a direction may still have to say that it is ready.
    #[inline]
    fn advance_mapped(&self, fd: i32, s: &Slot) {
        if s.rx.mode.load(Relaxed) == rx_mode::TCP && s.barred.load(Relaxed) == 0 {
            self.try_ready(fd, s);
        }
    }

    /// Declares the receiving direction ready, if nobody is inside the kernel for it and the counts agree.
    #[cold]
    fn try_ready(&self, fd: i32, s: &Slot) {
        let Some(m) = self.mapped() else { return };
        if !self.alone(s) || s.wait.peer_gone.load(Relaxed) != 0 || lock::held_by_me(&s.rx.lock) {
            return;
        }
        let Some(_g) = lock::try_lock(&s.rx.lock) else { return };
        if s.rx.mode.load(Relaxed) != rx_mode::TCP {
            return;
        }
        gate::shut(&s.rx.mode, rx_mode::GATE);
        let mut next = rx_mode::TCP;
        if !gate::is_barred(&s.barred) && s.nobody_inside(|n| &n.rx) {
            match self.rx_counts_agree(fd, s) {
                Some(true) => next = rx_mode::READY,
                Some(false) => self.bar(Reason::CountMismatch),
                None => {}
            }
        }
        if next == rx_mode::READY {
            self.read_options(fd, s);
            if s.rcvlowat.load(Relaxed) != 1 {
                self.bar(Reason::SocketOption);
                next = rx_mode::TCP;
            }
        }
        s.rx.mode.store(next, Release);
        if next == rx_mode::READY {
            self.set_changed();
            crate::handshake::switch::ready(m.me);
        }
    }

    /// Options that the kernel knew before the ring must obey them.
    fn read_options(&self, fd: i32, s: &Slot) {
        let mut tv = [0u8; 16];
        for (name, word) in [(libc::SO_RCVTIMEO, &s.rcvtimeo_us), (libc::SO_SNDTIMEO, &s.sndtimeo_us)] {
            if sys::getsockopt(fd, libc::SOL_SOCKET, name, &mut tv) == Ok(16) {
                word.store(timeval_us(&tv), Relaxed);
            }
        }
        let mut n = [0u8; 4];
        if sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &mut n) == Ok(4) {
            s.rcvlowat.store(u32::from_ne_bytes(n), Relaxed);
            s.rx.tcp_lowat.store(u32::from_ne_bytes(n), Relaxed);
        }
        let on = |level, name| {
            let mut n = [0u8; 4];
            sys::getsockopt(fd, level, name, &mut n) == Ok(4) && n != [0; 4]
        };
        let time = match () {
            () if on(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS) => each::NANOSECONDS,
            () if on(libc::SOL_SOCKET, libc::SO_TIMESTAMP) => each::MICROSECONDS,
            () => 0,
        };
        let count = if on(libc::IPPROTO_TCP, TCP_INQ) { each::COUNT } else { 0 };
        s.rx.with_each.store(time | count, Relaxed);
        let fl = sys::getfl(fd);
        if fl >= 0 {
            s.nonblock.store((fl as i32 & libc::O_NONBLOCK != 0).into(), Relaxed);
        }
    }

    /// read = tcpi_bytes_received - SIOCINQ, read until stable. `None`: it would not hold still.
    fn rx_counts_agree(&self, fd: i32, s: &Slot) -> Option<bool> {
        for _ in 0..4 {
            let (_, before) = sys::tcp_bytes(fd)?;
            let queued = sys::ioctl_int(fd, libc::FIONREAD).ok()?;
            let (_, after) = sys::tcp_bytes(fd)?;
            if before == after {
                let more = after.wrapping_sub(queued as u64).wrapping_sub(s.rx.tcp.load(Relaxed));
                // The peer's FIN counts as a byte: nothing will come, but the other direction may go on.
                return if more == 1 && ended(fd) { None } else { Some(more == 0) };
            }
        }
        None
    }

    /// written = tcpi_bytes_acked + SIOCOUTQ (less the SYN on the connecting end), read until stable.
    /// `None`: it would not hold still.
    fn tx_counts_agree(&self, fd: i32, s: &Slot) -> Option<bool> {
        let syn = u64::from(s.role.load(Relaxed) == 0);
        for _ in 0..4 {
            let (before, _) = sys::tcp_bytes(fd)?;
            let queued = sys::ioctl_int(fd, libc::TIOCOUTQ).ok()?;
            let (after, _) = sys::tcp_bytes(fd)?;
            if before == after {
                return Some((after + queued as u64).wrapping_sub(syn) == s.tx.tcp.load(Relaxed));
            }
        }
        None
    }

    /// Both directions are on TCP for good: nothing here has a say any more.
    #[inline]
    pub fn is_plain(&self) -> bool {
        let Some(s) = self.slot() else { return true };
        let phase = self.phase.load(Relaxed);
        phase == phase::OFF
            || (s.tx.mode.load(Relaxed) == tx_mode::DONE && s.rx.mode.load(Relaxed) == rx_mode::DONE)
    }

    /// Whether either direction is in the ring or may enter it at any time.
    #[inline]
    pub fn is_mapped(&self) -> bool {
        self.phase.load(Relaxed) == phase::MAPPED
    }

    /// Numbers of this process's part in the connection.
    pub fn totals(&self) -> Totals {
        let Some(s) = self.slot() else { return Totals::default() };
        let now = [s.shm_tx(), s.shm_rx(), s.tx.tcp.load(Relaxed), s.rx.tcp.load(Relaxed)];
        let mut bytes = [0; 4];
        for i in 0..4 {
            bytes[i] = now[i].saturating_sub(self.base[i].load(Relaxed));
        }
        Totals {
            best: s.best.load(Relaxed),
            reason: s.reason.load(Relaxed),
            bytes,
            polled: s.wait.polled.load(Relaxed),
            slept: s.wait.slept.load(Relaxed),
            doorbells: s.wait.doorbells.load(Relaxed),
            upgrades: s.upgrades.load(Relaxed),
            downgrades: s.downgrades.load(Relaxed),
        }
    }

    /// In the child of the fork of that token: what is the parent's alone is dropped.
    pub fn after_fork_child(&self, token: u32) {
        self.take_own_seat(token);
        // Calls under way are the parent's.
        self.outward.store(0, Relaxed);
        // A rendezvous that another thread was in the middle of may be half-changed: it is forgotten, its
        // fds go at exec or exit. Any other is dropped, which closes our copies and tells the peer nothing.
        let quiet = self.handshake_lock.swap(0, Relaxed) == 0;
        // SAFETY: the child has one thread, this one.
        let hs = unsafe { &mut *self.handshake.get() }.take();
        if !quiet {
            std::mem::forget(hs);
        }
        if self.phase.load(Relaxed) == phase::HANDSHAKE {
            self.phase.store(phase::COUNTING, Relaxed);
            self.next_try.store(self.ops.load(Relaxed) + 4, Relaxed);
        }
        if let Some(s) = self.slot() {
            let now = [s.shm_tx(), s.shm_rx(), s.tx.tcp.load(Relaxed), s.rx.tcp.load(Relaxed)];
            for (b, n) in self.base.iter().zip(now) {
                b.store(n, Relaxed);
            }
        }
    }
}

/// linux/tcp.h.
const TCP_INQ: i32 = 36;

/// SO_MAX_PACING_RATE of a socket that may send as fast as it can: all bits set, in 4 bytes or in 8.
pub const UNPACED: i32 = -1;

/// Whether an option asks for what the ring does not carry beside the bytes, or does not do with them. It may have been
/// set before the socket was a connection, or on the listener that it comes from.
fn wants_ancillary(fd: i32) -> bool {
    let on = |level, name, off: i32| {
        let mut v = [0u8; 4];
        sys::getsockopt(fd, level, name, &mut v) == Ok(4) && i32::from_ne_bytes(v) != off
    };
    on(libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 0)
        || on(libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)
        || on(libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, UNPACED)
}

/// Whether the peer's FIN is in.
fn ended(fd: i32) -> bool {
    let mut p = [libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 }];
    sys::poll(&mut p, Some(0)) == 1 && p[0].revents & libc::POLLRDHUP != 0
}

/// A struct timeval's microseconds.
pub fn timeval_us(tv: &[u8; 16]) -> u64 {
    let long = |i: usize| {
        i64::from_ne_bytes([
            tv[i],
            tv[i + 1],
            tv[i + 2],
            tv[i + 3],
            tv[i + 4],
            tv[i + 5],
            tv[i + 6],
            tv[i + 7],
        ])
    };
    (long(0).max(0) as u64).saturating_mul(1_000_000).saturating_add(long(8).max(0) as u64)
}

/// An address as policy compares it: IPv4 as mapped IPv6.
fn wide(family: u32, a: [u32; 4]) -> u128 {
    let b: Vec<u8> = a.iter().flat_map(|w| w.to_ne_bytes()).collect();
    if family == 4 {
        std::net::Ipv4Addr::new(b[0], b[1], b[2], b[3]).to_ipv6_mapped().to_bits()
    } else {
        let mut o = [0u8; 16];
        o.copy_from_slice(&b);
        u128::from_be_bytes(o)
    }
}
