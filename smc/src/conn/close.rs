//! The end of a connection, or of this process's part in it.
//!
//! | end | what the peer must see | how |
//! | --- | --- | --- |
//! | shutdown(WR) | the bytes, then EOF | the stream leaves the ring, then the kernel's FIN |
//! | close, all read | the bytes, then EOF; EPIPE when it writes | as above; stop, so that its bytes meet a closed TCP socket |
//! | close, bytes unread | ECONNRESET | SO_LINGER 0 before the kernel's close, as TCP sends RST; then stop |
//! | close, a call of another thread under way | nothing yet | the socket lives on under a number of ours until the call is over |
//! | close, another process holds it | nothing | nothing but this process's doorbell fd and mapping go |
//! | exit without close | as close | as close, for each connection that no other process holds |
//! | killed, all read | the bytes, then what the kernel says: EOF | the doorbell's end of file tells |
//! | killed, bytes unread | the bytes, then ECONNRESET | the peer sees by the cursors what the dead has not read (`fate.rs`) |
#![allow(unsafe_code)]

use super::patience::Patience;
use super::{Mapped, Socket, phase};
use crate::arena::{self, Slot, rx_mode, tx_mode};
use crate::counts;
use crate::handshake::switch;
use crate::lock;
use crate::mem::layout::ctl;
use crate::reason::Reason;
use crate::ring;
use crate::sync::Ordering::*;
use crate::sys;
use crate::wait::doorbell;

/// The kernel takes `left` bytes more at once, if it lets us: SO_SNDBUF may be smaller than what the program has sent, in
/// the ring. On TCP all of that would be the kernel's by now, and a close would not wait.
#[cold]
fn make_room(fd: i32, left: u64) {
    /// As much as anybody may ask for where net.core.wmem_max is what the kernel makes it.
    const UNPRIVILEGED: u64 = 212_992;
    let mut b = [0u8; 4];
    if sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &mut b) != Ok(4) {
        return;
    }
    let queued = sys::ioctl_int(fd, libc::TIOCOUTQ).map_or(0, |n| n.max(0) as u64);
    // The kernel counts what it needs for a byte, which is more than one, and doubles what it is given for that.
    let (now, want) = (u64::from(u32::from_ne_bytes(b)), queued + left);
    let set = |name, n: u64| {
        let n = n.min(i32::MAX as u64 / 2) as i32;
        sys::setsockopt(fd, libc::SOL_SOCKET, name, &n.to_ne_bytes()) >= 0
    };
    if now < 2 * want && !set(libc::SO_SNDBUFFORCE, want) && now < 2 * want.min(UNPRIVILEGED) {
        set(libc::SO_SNDBUF, want);
    }
}

/// TCP resets when it is closed with bytes unread.
fn reset_at_close(fd: i32) {
    // struct linger { l_onoff = 1, l_linger = 0 }
    let mut l = [0u8; 8];
    l[..4].copy_from_slice(&1i32.to_ne_bytes());
    let _ = sys::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, &l);
}

/// The last holder of a candidate goes: it has stayed on TCP.
fn tell_candidate(s: &Slot) {
    if let Ok(why) = Reason::try_from(s.reason.load(Relaxed)) {
        crate::report::log_fallback(s, why);
    }
}

impl Socket {
    /// Before the kernel's shutdown(2).
    pub fn before_shutdown(&self, fd: i32, how: i32) {
        if how == libc::SHUT_WR || how == libc::SHUT_RDWR {
            self.end_tx(fd);
            self.shut();
            self.tell_shut();
        }
        if matches!(how, libc::SHUT_RD | libc::SHUT_RDWR) && self.phase.load(Relaxed) == phase::MAPPED {
            self.stop_rx(Reason::PeerGone, true);
        }
    }

    /// The peer is to know a FIN that is sent by shutdown(2) from one that is sent by this end's death.
    pub(super) fn tell_shut(&self) {
        if let Some(m) = self.mapped() {
            doorbell::shut(m.peer);
        }
    }

    /// After the kernel's shutdown(2): own threads that sleep on the doorbell for what has ended must hear of
    /// it, and find the kernel ready to tell them.
    pub fn after_shutdown(&self, how: i32) {
        let Some(s) = self.slot() else { return };
        if self.phase.load(Relaxed) != phase::MAPPED {
            return;
        }
        doorbell::after_change();
        let reads = matches!(how, libc::SHUT_RD | libc::SHUT_RDWR) && s.is_slept_on();
        let writes = how == libc::SHUT_WR && s.wait.writers.load(Relaxed) != 0;
        if writes {
            // The doorbell is about to fall silent for the other direction as well.
            self.stop_rx(Reason::PeerGone, true);
        }
        if (reads || writes)
            && let Some(bell) = self.bell()
        {
            s.rx.deaf.store(1, Relaxed);
            sys::shutdown(bell, libc::SHUT_RD);
        }
    }

    /// The sending direction ends: what is in the ring stays readable, what must go by TCP goes.
    fn end_tx(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        let Some(m) = self.mapped() else {
            // Not to be upgraded any more in this direction; the other may.
            return;
        };
        let mut ring_it = false;
        {
            let _g = lock::lock(&s.tx.lock);
            match s.tx.mode.load(Relaxed) {
                tx_mode::RING => ring_it = self.leave_ring(fd, s, &m),
                tx_mode::ANNOUNCED => {
                    let _ = switch::leave(m.me, m.peer, 0);
                    s.tx.mode.store(tx_mode::DONE, Release);
                }
                tx_mode::TCP => s.tx.mode.store(tx_mode::DONE, Release),
                _ => {}
            }
            self.set_changed();
        }
        if ring_it {
            self.ring_peer(s, &m);
        }
        self.pay_rings(s);
        self.finish_flush(fd);
    }

    /// What the peer would not take from the ring must be in TCP before its FIN. Bounded: a peer that has not taken it
    /// within five seconds loses what the kernel has no room for, as it would by TCP_USER_TIMEOUT.
    fn finish_flush(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        if s.tx.mode.load(Acquire) == tx_mode::FLUSH {
            make_room(fd, s.tx.prod.load(Relaxed).saturating_sub(s.tx.flush.load(Relaxed)));
            self.progress(fd);
        }
        let mut patience = Patience::new(5_000_000_000);
        while s.tx.mode.load(Acquire) == tx_mode::FLUSH {
            let at = s.tx.flush.load(Relaxed);
            let list = &mut [libc::pollfd { fd, events: libc::POLLOUT, revents: 0 }];
            let Some(ready) = patience.poll(list) else { return };
            self.progress(fd);
            if ready && s.tx.flush.load(Relaxed) == at {
                patience.tire();
            }
        }
    }

    /// Before the kernel's close(2) of the last fd that this process has for the socket. Returns whether
    /// this process is the last holder.
    pub fn before_close(&self, fd: i32) -> bool {
        let Some(s) = self.slot() else { return true };
        let candidate = self.is_candidate();
        self.bar_handshake();
        self.closed.store(1, Release);
        if s.holders.load(Acquire) > 1 && !self.is_plain() {
            // The last of the living has the last word.
            let _ = self.bury_dead(s);
        }
        if self.let_go(s) > 1 {
            return false;
        }
        if candidate {
            tell_candidate(s);
        }
        self.last_leaves(fd);
        true
    }

    /// The last holder is about to let the kernel close the socket.
    fn last_leaves(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        if self.phase.load(Relaxed) == phase::MAPPED
            && let Some(m) = self.mapped()
        {
            // A service that saw the stream leave the ring would send FIN before it hears of the close.
            if s.is_served() && self.has_unread(s, &m) {
                return reset_at_close(fd);
            }
            self.end_tx(fd);
            let mut unread = false;
            {
                let _g = lock::lock(&s.rx.lock);
                if matches!(s.rx.mode.load(Relaxed), rx_mode::RING | rx_mode::READY)
                    && s.wait.peer_gone.load(Relaxed) != arena::gone::MISBEHAVED
                {
                    if s.rx.stopped.load(Relaxed) == super::rx::STOPPING {
                        let _ = self.settle_stop(s, &m);
                    }
                    let cons = s.rx.cons.load(Relaxed);
                    let look = || ring::readable(&m.peer.tx, cons, m.rxbuf.size()).is_ok_and(|r| r.bytes > 0);
                    // A peer that is asked to stop may have the kernel take what it has not found room for, though
                    // all ends in a reset: it is asked after that. (Behind a FIN it has no part in it.)
                    unread = look() && !sys::tcp_is_shut(fd);
                    if !unread && s.rx.stopped.load(Relaxed) == 0 {
                        let _ = doorbell::stop(m.me, cons);
                    }
                    // What has come meanwhile.
                    unread |= look();
                }
            }
            if unread {
                reset_at_close(fd);
            }
        }
    }

    fn has_unread(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        let _g = lock::lock(&s.rx.lock);
        s.rx.mode.load(Relaxed) == rx_mode::RING
            && ring::readable(&m.peer.tx, s.rx.cons.load(Relaxed), m.rxbuf.size()).is_ok_and(|r| r.bytes > 0)
    }

    /// The program closes its last fd of the socket, `fd`, while calls are under way: as in the kernel the socket
    /// lives until they are over, under a number of ours. False: there is none to be had.
    pub fn park(&self, fd: i32) -> bool {
        if self.is_parked() {
            return true;
        }
        let own = sys::dup_high(fd);
        if own < 0 {
            return false;
        }
        crate::internal_fds::add(own);
        counts::park_as(&self.parked, own as u32 + 1);
        true
    }

    /// Whether the socket has a number of ours, which is closed when nobody in this process uses it any more.
    pub fn is_parked(&self) -> bool {
        self.parked.load(Acquire) != 0
    }

    /// The number of the socket that the program knows, or knew, as `fd`.
    #[inline]
    pub fn fd_now(&self, fd: i32) -> i32 {
        match counts::parked_as(&self.parked) {
            0 => fd,
            own => own as i32 - 1,
        }
    }

    /// Nobody uses a parked socket any more: what close(2) would have done. `None`: it is not parked.
    pub fn close_parked(&self) -> Option<bool> {
        if self.parked.load(Acquire) == 0 {
            return None;
        }
        let own = self.fd_now(-1);
        let last = self.before_close(own);
        crate::internal_fds::remove(own);
        sys::close(own);
        self.parked.store(0, Relaxed);
        Some(last)
    }

    /// In a forked child: the calls that keep a parked socket are the parent's. With no number of the program's for it
    /// (`named` is false) the child has no part in it: true.
    pub fn unpark_in_child(&self, named: bool) -> bool {
        if !self.is_parked() {
            return false;
        }
        let own = self.fd_now(-1);
        crate::internal_fds::remove(own);
        sys::close(own);
        self.parked.store(0, Relaxed);
        if named {
            return false;
        }
        if let Some(s) = self.slot() {
            let _ = self.let_go(s);
        }
        self.finish(false);
        true
    }

    /// Whether this process holds descriptors for the connection beside its own.
    pub fn holds_fds(&self) -> bool {
        self.phase.load(Relaxed) == phase::HANDSHAKE || !self.established.load(Acquire).is_null()
    }

    /// The program needs the numbers of our descriptors: gives up a handshake under way, and a connection
    /// with nothing in its ring goes back to TCP for good. True: nothing here has a say any more, and the
    /// caller lets go of it. Waits for nobody, so a connection that a thread sleeps in stays as it is.
    pub fn give_back(&self, fd: i32) -> bool {
        let Some(s) = self.slot() else { return false };
        if s.holders.load(Acquire) != 1 || s.is_slept_on() || self.is_parked() {
            return false;
        }
        if self.phase.load(Relaxed) == phase::HANDSHAKE {
            if let Some(_g) = lock::try_lock(&self.handshake_lock) {
                // SAFETY: under handshake_lock.
                unsafe { *self.handshake.get() = None };
                self.postpone();
            }
            return false;
        }
        let Some(m) = self.mapped().filter(|_| !s.is_served()) else { return false };
        if lock::held_by_me(&s.rx.lock) || lock::held_by_me(&s.tx.lock) {
            return false;
        }
        {
            let _g = lock::lock(&s.rx.lock);
            if s.rx.mode.load(Relaxed) == rx_mode::RING {
                let cons = s.rx.cons.load(Relaxed);
                let Ok(r) = ring::readable(&m.peer.tx, cons, m.rxbuf.size()) else { return false };
                if r.bytes > 0 {
                    return false;
                }
                if r.left {
                    // The peer has gone back to TCP before us.
                    s.rx.mode.store(rx_mode::DONE, Release);
                    self.set_changed();
                }
            }
        }
        self.progress(fd);
        self.leave_tx(fd, Reason::NoFds);
        self.stop_rx(Reason::NoFds, true);
        self.bar(Reason::NoFds);
        matches!(s.rx.mode.load(Acquire), rx_mode::TCP | rx_mode::DONE)
            && matches!(s.tx.mode.load(Acquire), tx_mode::TCP | tx_mode::DONE)
    }

    /// After [`give_back`](Self::give_back), when no fd leads here any more. Returns whether this process is the
    /// last holder.
    pub fn given_back(&self) -> bool {
        self.slot().is_none_or(|s| self.let_go(s) <= 1)
    }

    /// This process has no fd of the socket any more, which lives on with another holder. Returns whether there is none.
    pub fn abandon(&self) -> bool {
        self.bar_handshake();
        self.closed.store(1, Release);
        self.given_back()
    }

    /// Back on TCP for somebody who does not know us: nothing may be left on the way.
    pub fn settle(&self, fd: i32) {
        self.finish_flush(fd);
    }

    /// The process ends without closing `fd`: a sibling that shares the socket holds it alone then; if there is
    /// none it is as if it were closed.
    pub fn exiting(&self, fd: i32) {
        let fd = self.fd_now(fd);
        let Some(s) = self.slot() else { return };
        if self.let_go(s) != 1 {
            return;
        }
        if self.is_candidate() {
            tell_candidate(s);
        }
        if !lock::held_by_me(&s.tx.lock) && !lock::held_by_me(&s.rx.lock) {
            self.last_leaves(fd);
        }
    }

    /// An exec is about to close `fd`, if it succeeds; [`stays`](Self::stays) if not. What the peer has asked
    /// back into TCP goes there, and what it has not taken yet it reads from the ring.
    pub fn exec_closes(&self, fd: i32) {
        if let Some(s) = self.slot()
            && self.let_go(s) == 1
        {
            self.end_tx(fd);
        }
    }

    /// Whether it would be upgraded, and nobody was found for it until now.
    fn is_candidate(&self) -> bool {
        matches!(self.phase.load(Relaxed), phase::COUNTING | phase::HANDSHAKE) && self.tries.load(Relaxed) > 0
    }

    fn bar_handshake(&self) {
        if let Some(_g) = lock::try_lock(&self.handshake_lock) {
            // SAFETY: under handshake_lock.
            unsafe { *self.handshake.get() = None };
        }
        if self.phase.load(Relaxed) == phase::HANDSHAKE {
            self.phase.store(phase::OFF, Relaxed);
        }
    }

    /// The kernel has disconnected the socket (connect(2) to AF_UNSPEC): it has sent RST, and what the socket
    /// becomes next is none of our business.
    #[cold]
    pub fn disconnected(&self, fd: i32, why: Reason) {
        self.bar(why);
        self.leave_tx(fd, why);
        self.stop_rx(why, false);
        let Some(s) = self.slot().filter(|_| self.phase.load(Relaxed) == phase::MAPPED) else { return };
        {
            let _g = lock::lock(&s.tx.lock);
            s.tx.mode.store(tx_mode::DONE, Release);
        }
        let _g = lock::lock(&s.rx.lock);
        s.rx.mode.store(rx_mode::DONE, Release);
        s.reset.store(arena::reset::TOLD, Relaxed);
        self.set_changed();
    }

    /// Whether going back to TCP would change anything: it is not forbidden yet, or a direction is in the ring, or on
    /// its way there, and has not been told to leave. (One direction may have been kept on TCP, which forbids the ring
    /// from then on, while the other is in it.)
    pub fn can_leave(&self) -> bool {
        let Some(s) = self.slot() else { return false };
        let sends = matches!(s.tx.mode.load(Acquire), tx_mode::RING | tx_mode::ANNOUNCED);
        let receives = matches!(s.rx.mode.load(Acquire), rx_mode::RING | rx_mode::READY)
            && s.rx.stopped.load(Relaxed) == 0
            && self.mapped().is_some_and(|m| m.me.ctl.ctl.load(Relaxed) & ctl::PEER_LEFT == 0);
        s.barred.load(Relaxed) == 0 || sends || receives
    }

    /// A child of a fork is about to change what its parent's epoll sets have of the connection, which is on TCP.
    pub fn sets_change_hands(&self) {
        if let Some(s) = self.slot() {
            s.barred.fetch_or(2, Relaxed);
        }
    }

    /// Whether that has happened.
    #[inline]
    pub fn sets_changed_hands(&self) -> bool {
        self.slot().is_some_and(|s| s.barred.load(Relaxed) & 2 != 0)
    }

    /// Nobody in this process uses the socket any more: what is left is given back. `last` is what
    /// [`before_close`](Self::before_close) said.
    pub fn finish(&self, last: bool) {
        let est = self.established.swap(std::ptr::null_mut(), AcqRel);
        if !est.is_null() {
            // SAFETY: made by Box::into_raw in `adopt`; nobody uses the socket any more.
            let est = unsafe { Box::from_raw(est) };
            crate::internal_fds::remove(est.bell.raw());
            let mut est = est;
            if est.buffers.rx().1 > crate::config::config().rmb_size {
                super::BULK.fetch_sub(1, Relaxed);
            }
            if last
                && let Some(s) = self.slot()
                && matches!(s.rx.mode.load(Relaxed), rx_mode::RING | rx_mode::READY)
            {
                // The kernel has reset the connection, see `last_leaves`: what the peer sends now meets that.
                let page = est.buffers.page();
                let _ = doorbell::stop(&page.side[est.buffers.side() as usize], s.rx.cons.load(Relaxed));
            } else if !last {
                // Another process goes on with the buffers: the peer must not be told that we are done.
                est.buffers.set_shared(true);
            }
            drop(est);
        }
        let slot = self.slot.swap(std::ptr::null_mut(), AcqRel);
        // SAFETY: null or a slot of the arena, which is never unmapped.
        if let Some(s) = unsafe { slot.as_ref() }
            && last
        {
            arena::give(s);
        }
        self.phase.store(phase::OFF, Relaxed);
    }
}
