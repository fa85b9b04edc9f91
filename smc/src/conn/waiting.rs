//! Waiting for the ring: poll for a while, then arm and sleep on the doorbell.
//!
//! Several threads, in several processes after a fork, may sleep on one doorbell, and a ring is one byte.
//! The byte is looked at, not taken, so it wakes them all; it is taken by whoever next goes to sleep, and
//! only when nobody else is asleep: a thread that the byte has woken but that has not run yet must still
//! find it.
#![allow(unsafe_code)]

use super::{Look, Mapped, Socket, bounds, fate};
use crate::arena::{Slot, gone, reset, rx_mode, tx_mode};
use crate::gate;
use crate::lock;
use crate::mem::layout::ctl;
use crate::once::Once;
use crate::reason::Reason;
use crate::ring;
use crate::section;
use crate::sync::Ordering::*;
use crate::sys;
use crate::wait::doorbell;

const EAGAIN: isize = -(libc::EAGAIN as isize);
const EINTR: isize = -(libc::EINTR as isize);
/// A sender that may be waiting for itself gives the ring up after so many nanoseconds without movement. This
/// is no time-out of a wake-up: those all come by the doorbell. It decides what nobody can know, whether the
/// program will read before its write is over.
const PATIENCE: u64 = 50_000_000;
/// Waits to read without a send between, from which on a wait lets some messages come together.
const FED: u32 = 32;
/// Calls without waiting that find nothing, from one look at the doorbell to the next.
const GLANCE: u32 = 32;
/// Reads of a doorbell, one after the other, that find something. A peer rings once for each time this side arms.
const MOST_DRAINS: u32 = 64;
const POLLIN: u32 = libc::POLLIN as u32;
const POLLOUT: u32 = libc::POLLOUT as u32;

/// What a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// So many bytes to read, or an end.
    Rx(u64),
    /// Space to write.
    Tx,
    /// Bytes by TCP, while this side's ring has some that the peer may yet ask back into TCP.
    Tcp,
}

/// Whether the peer was last seen on this very CPU; says where we are. (The line stays in both CPUs' caches as long as
/// neither end moves.)
fn beside(m: &Mapped<'_>) -> bool {
    let cpu = sys::cpu();
    if m.me.hint.cpu.load(Relaxed) != cpu {
        m.me.hint.cpu.store(cpu, Relaxed);
    }
    m.peer.hint.cpu.load(Relaxed) == cpu
}

impl What {
    fn bits(self) -> u32 {
        match self {
            What::Rx(_) => ctl::RX_ARMED,
            What::Tx => ctl::TX_ARMED,
            // A peer that stops rings in any case.
            What::Tcp => 0,
        }
    }
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woke {
    /// Look again.
    Look,
    /// EINTR, or EAGAIN for a time-out.
    Err(isize),
}

/// Free space from which a sender is told that it may write: a quarter of the ring.
#[inline]
pub(super) fn low_water(size: u64) -> u64 {
    size / 4
}

/// Bytes that a reader may count on finding in the ring at once: a writer that waits for space does not
/// fill it further.
#[inline]
pub(super) fn high_water(size: u64) -> u64 {
    size - low_water(size)
}

/// POLLMSG, of which TCP never says anything (tcp_poll): a list that has it waits for errors, and no more.
const NEVER: i16 = 0x400;

/// A sleep on the doorbell.
#[derive(Clone, Copy, Debug)]
pub struct Nap {
    /// The doorbell.
    pub bell: i32,
    /// The TCP socket.
    pub fd: i32,
    /// Events of the TCP socket to wait for as well, by ppoll(2); 0: the doorbell alone, by recv(2).
    pub events: i16,
    /// Nanoseconds, if the socket has a time-out; by ppoll.
    pub left: Option<u64>,
}

impl Nap {
    /// Whether [`Nap::list`] is to be waited for.
    pub fn polls(&self) -> bool {
        self.events != 0
    }

    /// What to wait for: the doorbell, and what the kernel says of TCP.
    pub fn list(&self) -> [libc::pollfd; 2] {
        [
            libc::pollfd { fd: self.bell, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: self.fd, events: self.events, revents: 0 },
        ]
    }

    fn sleep(&self) -> isize {
        if self.polls() {
            sys::poll(&mut self.list(), self.left)
        } else {
            sys::recv_small(self.bell, &mut [0u8; 1], libc::MSG_PEEK)
        }
    }
}

/// How to sleep, if not by the kernel's calls themselves.
static SLEEP: Once<fn(&Nap) -> isize> = Once::new();

/// Names the function that sleeps: recv(2) of one byte with MSG_PEEK on the doorbell, or ppoll(2) of
/// [`Nap::list`] where it [polls](Nap::polls), and their result or minus an errno. It may end the thread
/// (cancellation). The first call counts.
pub fn sleep_with(f: fn(&Nap) -> isize) {
    let _ = SLEEP.set(f);
}

/// Who hears that a sleeper has emptied a doorbell that is also in an epoll set: given the TCP fd.
static DRAINED: Once<fn(i32)> = Once::new();

/// Names the function to call when a sleeper has emptied the doorbell of a [watched](Socket::set_watched)
/// connection. The first call counts.
pub fn on_drained(f: fn(i32)) {
    let _ = DRAINED.set(f);
}

impl Socket {
    fn rx_ready(&self, s: &Slot, m: &Mapped<'_>, need: u64) -> bool {
        // Another thread may be stopping: a sender that obeys rings whoever is armed by then, and who arms after that
        // sees the mark, which is in the same word.
        // The peer can write that word too: what it says counts once the lock under which it is set is free.
        let mut stopped = s.rx.stopped.load(Relaxed) != 0;
        if !stopped && m.me.ctl.ctl.load(Relaxed) & ctl::RX_STOP != 0 && !lock::held_by_me(&s.rx.lock) {
            drop(lock::lock(&s.rx.lock));
            stopped = s.rx.stopped.load(Relaxed) != 0;
        }
        if stopped || s.rx.mode.load(Acquire) != rx_mode::RING {
            return true;
        }
        // Asked back to TCP: that comes first, nobody else may do it.
        if self.must_obey(s, m) {
            return true;
        }
        let cons = s.rx.cons.load(Relaxed);
        ring::readable(&m.peer.tx, cons, m.rxbuf.size()).map_or(true, |r| r.bytes >= need || r.left)
    }

    fn tx_ready(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        if s.tx.mode.load(Acquire) != tx_mode::RING || doorbell::is_to_leave(m.peer) {
            return true;
        }
        let size = m.txbuf.size();
        let most = bounds::most(&m.me.tx, &m.peer.rx, size);
        ring::writable(&m.peer.rx, s.tx.prod.load(Relaxed), size)
            .map_or(true, |(free, _)| most.saturating_sub(size - free) >= low_water(most))
    }

    fn ready(&self, s: &Slot, m: &Mapped<'_>, what: What) -> bool {
        match what {
            What::Rx(need) => self.rx_ready(s, m, need),
            What::Tx => self.tx_ready(s, m),
            What::Tcp => self.must_obey(s, m) || !self.owes(s, m),
        }
    }

    /// The peer has asked to go back to TCP, and this side has not done so; or it has begun to and was killed.
    fn must_obey(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        s.tx.mode.load(Relaxed) == tx_mode::RING && doorbell::is_to_leave(m.peer)
    }

    /// Whether there are bytes in the ring that the peer has not taken: it may still ask for them by TCP, as it
    /// does before it hands the connection to another program.
    fn owes(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        match s.tx.mode.load(Acquire) {
            tx_mode::RING => {
                let prod = s.tx.prod.load(Relaxed);
                ring::writable(&m.peer.rx, prod, m.txbuf.size()).is_ok_and(|(free, _)| free < m.txbuf.size())
            }
            tx_mode::FLUSH => true,
            _ => false,
        }
    }

    /// Before a read in the kernel: what the peer asks for is done, and if it may still ask for something the
    /// thread sleeps where it hears of that as well as of TCP. Minus an errno: the read ends with that.
    #[cold]
    pub(super) fn heed(
        &self,
        fd: i32,
        s: &Slot,
        nonblock: bool,
        deadline: &mut Option<u64>,
        partial: bool,
    ) -> Result<(), isize> {
        let Some(m) = self.mapped() else { return Ok(()) };
        loop {
            self.obey(fd);
            if nonblock || !self.owes(s, &m) {
                return Ok(());
            }
            let mut p = [libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 }];
            if sys::poll(&mut p, Some(0)) != 0 {
                return Ok(());
            }
            if let Woke::Err(e) = self.wait(fd, s, &m, What::Tcp, deadline, partial) {
                return Err(e);
            }
        }
    }

    /// A blocking call waits. `deadline` (ns, monotonic) is set at the first wait if the socket has one;
    /// `partial` says that the call has moved bytes already.
    #[cold]
    pub(super) fn wait(
        &self,
        fd: i32,
        s: &Slot,
        m: &Mapped<'_>,
        what: What,
        deadline: &mut Option<u64>,
        partial: bool,
    ) -> Woke {
        let us = match what {
            What::Rx(_) | What::Tcp => s.rcvtimeo_us.load(Relaxed),
            What::Tx => s.sndtimeo_us.load(Relaxed),
        };
        if us != 0 && deadline.is_none() {
            *deadline = Some(sys::now_ns().saturating_add(us.saturating_mul(1000)));
        }
        if self.must_obey(s, m) {
            self.progress(fd);
            return Woke::Look;
        }
        if what != What::Tcp && self.spin(s, m, what) {
            return Woke::Look;
        }
        let bits = what.bits();
        self.amend(s, m);
        if !self.begin_sleep(fd, s, m, bits, what) {
            return Woke::Look;
        }
        s.wait.slept.fetch_add(1, Relaxed);
        let mut left = deadline.map(|t| t.saturating_sub(sys::now_ns()));
        let stall = (what == What::Tx && self.may_stall(fd, s, m)).then(|| m.peer.rx.cons.load(Relaxed));
        if stall.is_some() {
            left = Some(left.map_or(PATIENCE, |t| t.min(PATIENCE)));
        }
        // Bytes that have left the ring go by TCP when it takes them, whatever this thread waits for.
        let flush = if s.tx.mode.load(Relaxed) == tx_mode::FLUSH { libc::POLLOUT } else { 0 };
        let events = match what {
            What::Tcp => libc::POLLIN | libc::POLLRDHUP | flush,
            // A signal ends a call that has moved bytes, also one that restarts calls: not by recv(2) then.
            // Who waits for room hears of the peer by the doorbell alone, here as in recv(2): the FIN of one that has shut its
            // direction and reads on is there all the time, and would end each sleep at once, before its time is over.
            What::Tx if flush != 0 || left.is_some() || partial => NEVER | flush,
            What::Rx(_) if flush != 0 || left.is_some() || partial => libc::POLLRDHUP | flush,
            _ => 0,
        };
        let nap = Nap { bell: m.bell, fd, events, left };
        // As in the kernel (sock_intr_errno, include/net/sock.h), and a call that has moved bytes ends with them.
        let strict = deadline.is_some() || partial;
        let mut undo = || self.end_sleep(s, m, bits);
        let r = section::window(self, &mut undo, &mut |since| {
            if since.ends(strict) {
                // It came while this thread looked.
                return EINTR;
            }
            match SLEEP.get().map_or_else(|| nap.sleep(), |f| f(&nap)) {
                0 if nap.polls() => EAGAIN,
                n if n > 0 && nap.polls() => 1,
                // recv(2), which the program called, is restarted then; ppoll never is.
                EINTR if nap.polls() && since.restarts(strict) => 1,
                n => n,
            }
        });
        self.end_sleep(s, m, bits);
        let fd = self.fd_now(fd);
        if flush != 0 {
            self.progress(fd);
        }
        if let Some(cons) = stall
            && r == EAGAIN
            && deadline.is_none_or(|t| t > sys::now_ns())
            && self.closed.load(Relaxed) == 0
        {
            if m.peer.rx.cons.load(Relaxed) == cons && self.may_stall(fd, s, m) {
                self.spill(fd, s, m);
            }
            return Woke::Look;
        }
        if self.closed.load(Acquire) != 0 {
            // Closed by another thread meanwhile: the number may be another socket's. The end of the
            // stream, as the kernel's blocked call sees it when the peer closes in turn.
            return Woke::Err(if what != What::Tx { 0 } else { -(libc::EPIPE as isize) });
        }
        match r {
            0 => {
                self.peer_gone(fd, s, m);
                Woke::Look
            }
            EINTR => Woke::Err(EINTR),
            EAGAIN if deadline.is_some() => Woke::Err(EAGAIN),
            n => {
                // TCP was reset beneath two ends that live, by the administrator say (ss -K): that ends each sleep from
                // now on, so it is to be told.
                if n > 0 && nap.polls() && what != What::Tcp && !self.ready(s, m, what) {
                    self.kernel_tells(fd);
                }
                Woke::Look
            }
        }
    }

    /// Whether this sender may wait for itself: the peer's bytes lie unread here, so that it may be waiting for
    /// space in turn, or both ends are in this process (whose calls that do not wait have not been told that
    /// there is no space: then there is none).
    fn may_stall(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> bool {
        let alone = s.peer_pid.load(Relaxed) == sys::getpid() as u32 && s.tx.told_full.load(Relaxed) == 0;
        alone
            || match s.rx.mode.load(Acquire) {
                rx_mode::RING => self.look(s, m).is_ok_and(|r| r.bytes > 0),
                _ => sys::ioctl_int(fd, libc::FIONREAD).is_ok_and(|n| n > 0),
            }
    }

    /// Nothing has moved for a while and maybe nothing will: TCP's buffers, which hold more, take over. A peer
    /// that waits for space is woken, so that it sees that its bytes lie unread as well.
    #[cold]
    fn spill(&self, fd: i32, s: &Slot, m: &Mapped<'_>) {
        self.leave_tx(fd, Reason::Stalled);
        if doorbell::after_publish(m.peer, ctl::TX_ARMED, true).ring {
            self.ring_peer(s, m);
        }
    }

    /// Looks for a while; true if it has come.
    fn spin(&self, s: &Slot, m: &Mapped<'_>, what: What) -> bool {
        let beside = beside(m);
        let Some(mut spin) = s.wait.habit.begin(beside, None) else {
            return self.ready(s, m, what);
        };
        let mut next = None;
        if let What::Rx(_) = what
            && !beside
        {
            if !self.is_fed(s) {
                let at = ring::at(&m.peer.tx, s.rx.cons.load(Relaxed));
                next = Some(m.rxbuf.span(at, 1).0);
            } else {
                spin.gather();
            }
        }
        loop {
            for _ in 0..24 {
                // The bytes come from the peer's CPU while the cursor does, and not after it. (Not if one message follows
                // the other: that would take a line from the peer into which it writes more.)
                if let Some(p) = next {
                    sys::prefetch(p);
                }
                if self.ready(s, m, what) {
                    s.wait.polled.fetch_add(1, Relaxed);
                    spin.paid();
                    return true;
                }
                std::hint::spin_loop();
            }
            if !spin.again() {
                return false;
            }
        }
    }

    /// Whether this side has waited to read for some time without a send between: the peer sends one message after the
    /// other.
    fn is_fed(&self, s: &Slot) -> bool {
        // Hints, Relaxed: a lost update does no harm.
        let sent = s.tx.prod.load(Relaxed);
        let n = if self.sent_then.swap(sent, Relaxed) == sent { self.fed.load(Relaxed) + 1 } else { 0 };
        self.fed.store(n.min(FED), Relaxed);
        n >= FED
    }

    /// Registers a sleeper: takes stale rings, arms, looks once more. False: it has come, do not sleep.
    fn begin_sleep(&self, fd: i32, s: &Slot, m: &Mapped<'_>, bits: u32, what: What) -> bool {
        if !self.enter_asleep(fd, s, m) {
            return false;
        }
        if what == What::Tx {
            self.begin_writing(s);
        }
        doorbell::arm(m.me, bits);
        if self.ready(s, m, what) {
            self.end_sleep(s, m, bits);
            return false;
        }
        true
    }

    /// Counts this thread as asleep, with an empty doorbell. False: the peer is gone, or nothing could be learnt.
    fn enter_asleep(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> bool {
        /// Between looks for the dead, and until nameless ones count no more.
        const LOOK: u32 = 256;
        const ENOUGH: u32 = 20_000;
        let mut turns = 0u32;
        let mut drains = 0u32;
        loop {
            let g = lock::lock(&s.wait.lock);
            let mut b = [0u8; 64];
            let others = s.is_slept_on();
            let flags = libc::MSG_DONTWAIT | if others { libc::MSG_PEEK } else { 0 };
            match sys::recv_small(m.bell, &mut b, flags) {
                EAGAIN => {
                    self.inside(s).asleep.fetch_add(1, Relaxed);
                    drop(g);
                    if drains > 0 {
                        self.tell_drained(fd);
                    }
                    return true;
                }
                n if n > 0 && !others && drains < MOST_DRAINS => drains += 1,
                n if n > 0 && !others => {
                    // It would go on for as long as the peer likes, and this thread has other connections.
                    drop(g);
                    self.misbehaved(fd, s);
                    return false;
                }
                n if n > 0 => {
                    // Woken threads have still to see the byte. One that never will was killed: it is counted off, and
                    // where nobody knows its name all are after a while, at worst a spurious wake-up for the rest.
                    drop(g);
                    turns += 1;
                    if turns.is_multiple_of(LOOK) {
                        s.bury();
                    }
                    if turns > ENOUGH {
                        s.seats.inside.iter().for_each(|n| n.asleep.store(0, Relaxed));
                    }
                    sys::yield_cpu();
                }
                _ => {
                    drop(g);
                    // An error says nothing of the peer (a signal, no memory): then this thread looks again, and does
                    // not sleep meanwhile.
                    if fate::bell_ends(m) {
                        self.peer_gone(fd, s, m);
                    }
                    return false;
                }
            }
        }
    }

    /// A sleeper is there for room alone; [`end_sleep`](Self::end_sleep) counts it off.
    fn begin_writing(&self, s: &Slot) {
        s.wait.writers.fetch_add(1, Relaxed);
        self.goes_outward(true);
    }

    fn end_sleep(&self, s: &Slot, m: &Mapped<'_>, bits: u32) {
        if bits == ctl::TX_ARMED {
            let _ = s.wait.writers.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
            self.goes_outward(false);
        }
        let rise = || _ = self.inside(s).asleep.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
        // Rung, or armed by nobody.
        if m.me.ctl.ctl.load(Relaxed) & bits == 0 {
            return rise();
        }
        let alone = || {
            rise();
            !s.is_slept_on() && !self.is_watched()
        };
        self.disarm_alone(s, m, bits, alone);
    }

    /// Takes `bits` back if nobody else relies on them, which `alone` says.
    ///
    /// Who comes to rely on them is counted under the lock before he arms: another thread or process that sleeps
    /// ([`enter_asleep`](Self::enter_asleep)), an epoll set ([`set_watched`](Self::set_watched)), a forked child
    /// ([`before_fork`](Self::before_fork)). So he is seen here, or arms after this.
    fn disarm_alone(&self, s: &Slot, m: &Mapped<'_>, bits: u32, alone: impl FnOnce() -> bool) {
        let _g = lock::lock(&s.wait.lock);
        if alone() && s.holders.load(Relaxed) == 1 {
            doorbell::disarm(m.me, bits);
        }
    }

    /// Says whether an epoll set trusts the doorbell to stay armed: then nobody else disarms it.
    pub fn set_watched(&self, on: bool) {
        // See `disarm_alone`.
        let _g = self.slot().map(|s| lock::lock(&s.wait.lock));
        self.watched.store(on.into(), Release);
    }

    /// Whether an epoll set of this process has the doorbell in it.
    #[inline]
    pub fn is_watched(&self) -> bool {
        self.watched.load(Acquire) != 0
    }

    /// A ring that an epoll set may have been waiting for was taken by somebody else.
    #[cold]
    fn tell_drained(&self, fd: i32) {
        if self.is_watched()
            && let Some(f) = DRAINED.get()
        {
            f(fd);
        }
    }

    /// Whether the peer was last seen on this very CPU, so that polling can't pay; says where we are.
    pub fn beside_peer(&self) -> bool {
        self.mapped().is_some_and(|m| beside(&m))
    }

    /// Whether bytes that have left the ring still have to go by TCP, when it takes them.
    #[inline]
    pub fn flushing(&self) -> bool {
        self.slot().is_some_and(|s| s.tx.mode.load(Acquire) == tx_mode::FLUSH)
    }

    /// The doorbell says end of file: the peer has let go of the connection, or died. What it published is
    /// read; everything after is the kernel's word on the TCP connection.
    #[cold]
    pub(super) fn peer_gone(&self, fd: i32, s: &Slot, m: &Mapped<'_>) {
        // All of it can be done again, and is: a holder that is killed in here leaves it begun.
        match s.wait.peer_gone.compare_exchange(0, gone::BEGUN, AcqRel, Acquire) {
            Ok(_) | Err(gone::BEGUN) => {}
            _ => return,
        }
        self.stop_rx(Reason::PeerGone, true);
        let unread;
        {
            let _g = lock::lock(&s.tx.lock);
            unread = s.rx.deaf.load(Relaxed) == 0 && fate::left_unread(s, m);
            match s.tx.mode.load(Relaxed) {
                // Nobody hears the doorbell any more.
                tx_mode::RING => _ = self.leave_ring(fd, s, m),
                tx_mode::ANNOUNCED => s.tx.mode.store(tx_mode::DONE, Release),
                _ => {}
            }
        }
        s.reason.store(Reason::PeerGone.code(), Relaxed);
        s.barred.fetch_or(1, Relaxed);
        if unread {
            self.doom(fd, s);
        }
        let _ = s.wait.peer_gone.compare_exchange(gone::BEGUN, gone::KNOWN, AcqRel, Relaxed);
        self.set_changed();
    }

    /// A call that does not wait has found nothing: now and then it asks whether the peer is still there, since
    /// a program may do nothing else. True: it is not, look again.
    #[inline]
    pub(super) fn glance(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> bool {
        let n = self.idle.load(Relaxed).wrapping_add(1);
        self.idle.store(n, Relaxed);
        n.is_multiple_of(GLANCE) && self.ask_bell(fd, s, m)
    }

    #[cold]
    pub(super) fn ask_bell(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> bool {
        // Not by reading: rings that nobody has taken may lie before the end.
        self.amend(s, m);
        if s.wait.peer_gone.load(Relaxed) != 0 || !fate::bell_ends(m) {
            return false;
        }
        self.peer_gone(fd, s, m);
        true
    }

    /// Does what the peer has asked for and what is half done: called when the doorbell rang and from waits.
    #[cold]
    pub fn progress(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        let Some(m) = self.mapped() else { return };
        if lock::held_by_me(&s.tx.lock) {
            return;
        }
        let g = lock::lock(&s.tx.lock);
        let mut ring = false;
        match s.tx.mode.load(Relaxed) {
            tx_mode::RING if doorbell::is_to_leave(m.peer) => {
                ring = self.leave_ring(fd, s, &m);
                self.count_downgrade(s);
            }
            tx_mode::FLUSH => {
                let _ = self.flush(fd, s, &m);
            }
            _ => {}
        }
        drop(g);
        if ring || s.wait.rings.is_owed() {
            self.ring_peer(s, &m);
        }
    }

    /// The doorbell of an epoll set or a poll became readable: takes the bytes (unless other threads have
    /// still to see them) and does what the peer has asked for.
    pub fn on_bell(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        let Some(m) = self.mapped() else { return };
        let mut gone = false;
        {
            let _g = lock::lock(&s.wait.lock);
            if !s.is_slept_on() {
                let mut b = [0u8; 64];
                let r = sys::recv_small(m.bell, &mut b, libc::MSG_DONTWAIT);
                // Also behind rings, with which a set has told of it: an edge that does not come again.
                gone = r == 0 || r != EAGAIN && fate::bell_ends(&m);
            } else {
                let mut b = [0u8; 1];
                gone |= sys::recv_small(m.bell, &mut b, libc::MSG_DONTWAIT | libc::MSG_PEEK) == 0;
            }
        }
        if gone {
            self.peer_gone(fd, s, &m);
        }
        self.obey(fd);
    }

    /// Does what the peer has asked for, if it has.
    #[inline]
    pub fn obey(&self, fd: i32) {
        if let (Some(s), Some(m)) = (self.slot(), self.mapped())
            && (s.tx.mode.load(Relaxed) == tx_mode::FLUSH || self.must_obey(s, &m))
        {
            self.progress(fd);
        }
    }

    /// Whether the peer has asked for something that is not done yet.
    #[inline]
    pub fn is_to_obey(&self) -> bool {
        self.slot().zip(self.mapped()).is_some_and(|(s, m)| self.must_obey(s, &m))
    }

    /// The one epoll set that trusts the doorbell looks by itself again: no ring is needed meanwhile. `alone`: no other
    /// set does; one that is about to says so by [`set_watched`](Self::set_watched) after it can be seen here.
    pub fn unarm(&self, alone: impl FnOnce() -> bool) {
        const ALL: u32 = ctl::RX_ARMED | ctl::TX_ARMED;
        if let (Some(m), Some(s)) = (self.mapped(), self.slot())
            && m.me.ctl.ctl.load(Relaxed) & ALL != 0
        {
            self.disarm_alone(s, &m, ALL, || !s.is_slept_on() && alone());
        }
    }

    /// Whether SO_RCVLOWAT's bytes are there where TCP has a part of them and the ring the other. If not, the
    /// kernel is told to report TCP's part when it is large enough.
    #[cold]
    fn mark_is_reached(&self, fd: i32, s: &Slot, low: u64) -> bool {
        let fd = self.fd_now(fd);
        let Ok(in_tcp) = sys::ioctl_int(fd, libc::FIONREAD) else { return true };
        let total = self.unread(in_tcp as u64);
        if total.is_some_and(|t| t >= low) {
            return true;
        }
        let in_ring = total.map_or(0, |t| t.saturating_sub(in_tcp as u64));
        self.set_tcp_mark(fd, s, (low - in_ring) as u32);
        false
    }

    /// SO_RCVLOWAT for the bytes in TCP. The kernel looks at them when it is set (tcp_set_rcvlowat).
    pub(super) fn set_tcp_mark(&self, fd: i32, s: &Slot, low: u32) {
        if s.rx.tcp_lowat.load(Relaxed) != low {
            s.rx.tcp_lowat.store(low, Relaxed);
            sys::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &low.to_ne_bytes());
        }
    }

    /// What poll would say, without a system call unless SO_RCVLOWAT is set.
    #[inline]
    pub fn look_at(&self, fd: i32) -> Look {
        let all = Look { ready: 0, from_kernel: POLLIN | POLLOUT };
        let Some(s) = self.slot() else { return all };
        let Some(m) = self.mapped() else { return all };
        // The kernel's POLLIN always counts: the end of the stream, or bytes behind our back.
        let mut l = Look { ready: 0, from_kernel: if self.hides_tcp() { 0 } else { POLLIN } };
        let fate = s.reset.load(Relaxed);
        if reset::is_errno(fate) {
            l.ready |= libc::POLLERR as u32;
        }
        let low = u64::from(s.rcvlowat.load(Relaxed)).max(1);
        let low = if low == 1 { 1 } else { low.min(high_water(m.most_unread())) };
        let mode = s.rx.mode.load(Acquire);
        if mode == rx_mode::RING {
            // Before the look, which may be at a later one: promised is no more than there was.
            let cons = s.rx.cons.load(Relaxed);
            match self.look(s, &m) {
                // The ring is empty and the stream has left it: TCP decides.
                Ok(r) if r.left && r.bytes == 0 && low == 1 => {}
                Ok(r) if r.left && low > 1 => {
                    if self.mark_is_reached(fd, s, low) {
                        l.ready |= POLLIN;
                    }
                }
                Ok(r) if r.bytes >= low || r.left => {
                    l.ready |= POLLIN;
                    self.promise(cons, r.bytes);
                }
                Ok(_) => {}
                Err(_) => l.ready |= POLLIN,
            }
        } else if low > 1 && self.mark_is_reached(fd, s, low) {
            l.ready |= POLLIN;
        }
        match s.tx.mode.load(Acquire) {
            tx_mode::RING if self.tx_ready(s, &m) => l.ready |= POLLOUT,
            tx_mode::RING | tx_mode::FLUSH => {}
            // The kernel's direction is shut, and the program is not to know yet.
            _ if fate == reset::DOOMED => {}
            _ => l.from_kernel |= POLLOUT,
        }
        l
    }

    /// Whether there are bytes in the ring behind the last ones by TCP, which are here and unread: the kernel does
    /// not know of them, and has told of the others.
    #[cold]
    pub fn more_behind_tcp(&self, fd: i32) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        s.rx.mode.load(Acquire) == rx_mode::READY
            && self.look(s, &m).is_ok_and(|r| r.bytes > 0)
            && sys::ioctl_int(fd, libc::FIONREAD).is_ok_and(|n| n > 0 && self.unread(n as u64).is_some())
    }

    /// Whether the kernel has nothing to say of `events` on the TCP fd that the ring does not know: both
    /// directions are in the ring and neither end has begun to leave it. (An end that closes, shuts down,
    /// resets or sends urgent data leaves the ring before it tells the kernel; a killed one is heard of at
    /// the next sleep.)
    #[inline]
    pub fn tcp_silent(&self, events: u32) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        s.rx.mode.load(Relaxed) == rx_mode::RING
            && (s.tx.mode.load(Relaxed) == tx_mode::RING
                || events & POLLOUT == 0 && s.tx.mode.load(Relaxed) == tx_mode::TCP)
            && m.peer.tx.prod.load(Relaxed) & crate::mem::layout::LEFT == 0
            && !doorbell::asked(m.peer)
            && m.me.ctl.ctl.load(Relaxed) & (ctl::RX_STOP | ctl::PEER_LEFT) == 0
            && s.wait.peer_gone.load(Relaxed) == 0
            && s.rx.suspect.load(Relaxed) == 0
    }

    /// The kernel says that TCP is readable: if the stream is in the ring and has not left it, somebody
    /// must look at TCP once the ring is empty.
    pub fn kernel_readable(&self) {
        let Some(s) = self.slot() else { return };
        if s.rx.mode.load(Acquire) == rx_mode::RING {
            s.rx.suspect.store(1, Relaxed);
        }
    }

    /// Whether the doorbell is armed for all of `events`: nobody has rung it since.
    pub fn is_armed(&self, events: u32) -> bool {
        let rx = if events & POLLIN != 0 { ctl::RX_ARMED } else { 0 };
        let tx = if events & POLLOUT != 0 { ctl::TX_ARMED } else { 0 };
        self.mapped().is_some_and(|m| m.me.ctl.ctl.load(Acquire) & (rx | tx) == rx | tx)
    }

    /// Whether the peer has asked to go back to TCP: then it rings whether this side is armed or not.
    #[inline]
    pub fn is_asked(&self) -> bool {
        self.mapped().is_some_and(|m| doorbell::asked(m.peer))
    }

    /// How many doorbells the peer's process had rung at this one before it produced what a look before this has found.
    #[inline]
    pub fn rang(&self) -> u32 {
        self.mapped().map_or(0, |m| doorbell::rang(&m.peer.tx))
    }

    /// Producer's and consumer's cursors as they stand: they change when something has happened. That the stream
    /// leaves the ring is nothing new to read.
    #[inline]
    pub fn activity(&self) -> (u64, u64) {
        match self.mapped() {
            Some(m) => {
                (m.peer.tx.prod.load(Acquire) & !crate::mem::layout::LEFT, m.peer.rx.cons.load(Acquire))
            }
            None => (0, 0),
        }
    }

    /// Whether a sender has found the ring full since the last call: the edge is owed when space is back.
    #[inline]
    pub fn take_blocked(&self) -> bool {
        self.slot().is_some_and(|s| s.tx.blocked.load(Relaxed) != 0 && s.tx.blocked.swap(0, Relaxed) != 0)
    }

    /// Whether bytes can be in or enter the ring, so that a sleeper must have the doorbell in its set.
    #[inline]
    pub fn needs_bell(&self) -> bool {
        let Some(s) = self.slot() else { return false };
        if !self.is_mapped() {
            return false;
        }
        matches!(s.rx.mode.load(Acquire), rx_mode::READY | rx_mode::RING)
            || matches!(s.tx.mode.load(Acquire), tx_mode::RING | tx_mode::FLUSH | tx_mode::ANNOUNCED)
    }

    /// For poll, select and epoll: arms for POLLIN and POLLOUT in `events`; the caller looks after this.
    pub fn arm(&self, events: u32) {
        if let (Some(m), Some(s)) = (self.mapped(), self.slot()) {
            self.amend(s, &m);
            let rx = if events & POLLIN != 0 { ctl::RX_ARMED } else { 0 };
            let tx = if events & POLLOUT != 0 { ctl::TX_ARMED } else { 0 };
            if rx | tx != 0 {
                doorbell::arm(m.me, rx | tx);
            }
        }
    }

    /// Whether the peer's end is known: what comes now comes by the kernel.
    pub fn is_peer_gone(&self) -> bool {
        self.slot().is_none_or(|s| s.wait.peer_gone.load(Relaxed) != 0)
    }

    /// A poll or select is about to sleep for `events` with the doorbell in its list. False: the peer is gone, or nothing
    /// could be learnt; look again.
    pub fn poll_enter(&self, fd: i32, events: u32) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return true };
        let entered = self.enter_asleep(fd, s, &m);
        if entered && events & (POLLIN | POLLOUT) == POLLOUT {
            self.begin_writing(s);
        }
        entered
    }

    /// The poll has returned.
    pub fn poll_leave(&self, events: u32) {
        if let (Some(s), Some(m)) = (self.slot(), self.mapped()) {
            let rx = if events & POLLIN != 0 { ctl::RX_ARMED } else { 0 };
            let tx = if events & POLLOUT != 0 { ctl::TX_ARMED } else { 0 };
            self.end_sleep(s, &m, rx | tx);
        }
    }

    /// A poll sleeps on the TCP fd alone: no switch to the ring meanwhile. True if that holds; then
    /// [`unpin_tcp`](Self::unpin_tcp) must follow.
    pub fn pin_tcp(&self) -> bool {
        let Some(s) = self.slot() else { return false };
        gate::enter(&self.inside(s).rx, &s.rx.mode, rx_mode::TCP)
    }

    /// Ends [`pin_tcp`](Self::pin_tcp).
    pub fn unpin_tcp(&self) {
        if let Some(s) = self.slot() {
            gate::leave(&self.inside(s).rx);
        }
    }

    /// Counts a wait of a poll or epoll: it ended by polling, or slept.
    pub fn count_wait(&self, slept: bool) {
        if let Some(s) = self.slot() {
            let w = if slept { &s.wait.slept } else { &s.wait.polled };
            w.fetch_add(1, Relaxed);
        }
    }
}
