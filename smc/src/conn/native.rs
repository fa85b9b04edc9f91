//! What a program that is linked with the engine calls ([`crate::net`]): the shim's hooks without the shim.
//!
//! There is no libc between: what goes by TCP goes by the system call itself. Handlers of the program's are not
//! deferred, since nobody may call these functions in one: they are no more async-signal-safe than std's.
//!
//! Leaving for good ([`leave_for_good`](Socket::leave_for_good)) differs from what the shim does for a program that
//! does not know us. The caller reads what is in the ring itself, so that nothing depends on the peer's next call:
//!
//! ```text
//! stop that keeps ── the ring's rest is read here ──> rx DONE ─┐
//! leave the ring  ── FLUSH, if the peer has stopped ─> tx DONE ─┴─> plain TCP, `detach`
//! ```
#![allow(unsafe_code)]

use super::{Socket, Tuning, phase};
use crate::arena::{Slot, rx_mode, tx_mode};
use crate::handshake::{Side, switch};
use crate::reason::Reason;
use crate::stats::ConnectionInfo;
use crate::sync::Ordering::*;
use crate::sys;
use std::io::{IoSlice, IoSliceMut};

/// IOV_MAX (limits.h): more are not looked at, as std does it.
const MOST_PIECES: usize = 1024;
/// Of so many calls that arm, one looks how many rings lie unread.
const THIN: u32 = 32;
const EAGAIN: isize = -(libc::EAGAIN as isize);

fn read_only<'a>(bufs: &'a [IoSlice<'_>]) -> &'a [libc::iovec] {
    let bufs = &bufs[..bufs.len().min(MOST_PIECES)];
    // SAFETY: IoSlice has the layout of struct iovec (its documentation); as many as there are, for as long.
    unsafe { std::slice::from_raw_parts(bufs.as_ptr().cast(), bufs.len()) }
}

fn writable<'a>(bufs: &'a mut [IoSliceMut<'_>]) -> &'a [libc::iovec] {
    let n = bufs.len().min(MOST_PIECES);
    // SAFETY: IoSliceMut has the layout of struct iovec (its documentation); as many as there are, for as long.
    unsafe { std::slice::from_raw_parts(bufs.as_mut_ptr().cast_const().cast(), n) }
}

impl Socket {
    /// sendmsg(2) of `bufs`: bytes taken, or minus an errno. No SIGPIPE.
    #[inline]
    pub fn send_slices(&self, fd: i32, bufs: &[IoSlice<'_>], flags: i32) -> isize {
        let (v, flags) = (read_only(bufs), flags | libc::MSG_NOSIGNAL);
        // SAFETY: slices, readable for the whole of the call.
        unsafe { self.send(fd, v, flags, &mut || sys::send_iov(fd, v, flags)) }
    }

    /// recvmsg(2) into `bufs`: bytes, 0 at the end of the stream, or minus an errno.
    #[inline]
    pub fn recv_slices(&self, fd: i32, bufs: &mut [IoSliceMut<'_>], flags: i32) -> isize {
        let v = writable(bufs);
        // SAFETY: slices, writable and ours alone for the whole of the call.
        unsafe { self.recv(fd, v, flags, &mut || sys::recv_iov(fd, v, flags)) }
    }

    /// Takes up to `n` bytes of the stream and drops them (MSG_TRUNC, tcp(7)).
    pub fn skip(&self, fd: i32, n: usize, flags: i32) -> isize {
        let v = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: n }];
        let flags = flags | libc::MSG_TRUNC;
        // SAFETY: with MSG_TRUNC neither the engine nor the kernel writes to the address.
        unsafe { self.recv(fd, &v, flags, &mut || sys::recv_iov(fd, &v, flags)) }
    }

    /// Begins with a connection that has been used already, or is being made: which end it is and what it has moved is
    /// asked of the kernel. False: that can't be told, or it has begun to end; it stays the kernel's.
    pub fn adopt_stream(&self, fd: i32, nonblock: bool, tuning: Tuning) -> bool {
        if sys::tcp_is_connecting(fd) {
            return self.init_with(Side::Connect, nonblock, tuning);
        }
        if !sys::is_tcp(fd) || !sys::tcp_is_established(fd) {
            return false;
        }
        let Some((written, connected)) = sys::tcp_written(fd) else { return false };
        let (Some((_, received)), Ok(unread)) = (sys::tcp_bytes(fd), sys::ioctl_int(fd, libc::FIONREAD))
        else {
            return false;
        };
        let side = if connected { Side::Connect } else { Side::Accept };
        if !self.init_with(side, nonblock, tuning) {
            return false;
        }
        let Some(s) = self.slot() else { return false };
        // A byte that came between the two questions makes the count too small, which shows before the upgrade.
        s.tx.tcp.store(written, Relaxed);
        s.rx.tcp.store(received.saturating_sub(unread.max(0) as u64), Relaxed);
        self.base[2].store(written, Relaxed);
        self.base[3].store(s.rx.tcp.load(Relaxed), Relaxed);
        true
    }

    /// Whether calls wait; the kernel has been told.
    pub fn note_nonblocking(&self, on: bool) {
        if let Some(s) = self.slot() {
            s.nonblock.store(on.into(), Relaxed);
        }
    }

    /// A time-out in microseconds, 0 none, for receiving or sending; the kernel has been told.
    pub fn note_timeout(&self, send: bool, us: u64) {
        if let Some(s) = self.slot() {
            if send { &s.sndtimeo_us } else { &s.rcvtimeo_us }.store(us, Relaxed);
        }
    }

    /// The connection as `smc ss` shows it.
    pub fn info(&self) -> Option<ConnectionInfo> {
        self.slot().map(ConnectionInfo::of)
    }

    /// What is sent from now on goes by TCP, and so does what is received, once the ring's rest is read
    /// ([`is_in_ring`](Self::is_in_ring)) and TCP has taken what the peer would not ([`flushing`](Self::flushing)).
    pub fn leave_for_good(&self, fd: i32, why: Reason) {
        // The stop first: a peer that finds our stream gone from the ring goes to sleep in the kernel.
        self.stop_rx(why, true);
        self.leave_tx(fd, why);
        self.bar(why);
    }

    /// After [`leave_for_good`](Self::leave_for_good): whether bytes in the ring come before those in TCP.
    pub fn is_in_ring(&self) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        match s.rx.mode.load(Acquire) {
            rx_mode::RING => true,
            // Behind the last bytes by TCP, of which each is here: a sender that fills its ring has sent them.
            rx_mode::READY => {
                switch::announced(m.peer).is_some()
                    && s.rx.stopped.load(Acquire) != 0
                    && s.rx.stop_at.load(Relaxed) != s.rx.cons.load(Relaxed)
            }
            _ => false,
        }
    }

    /// Waits for what has been sent by TCP, and is not here yet.
    pub fn await_tcp(&self, fd: i32) {
        let mut p = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }];
        let _ = sys::poll(&mut p, None);
    }

    /// A sender waits until TCP takes bytes that have left the ring. Minus an errno: it did not, EAGAIN among them.
    pub fn flush_left(&self, fd: i32) -> isize {
        let Some(s) = self.slot() else { return 0 };
        while s.tx.mode.load(Acquire) == tx_mode::FLUSH {
            self.progress(fd);
            if s.tx.mode.load(Acquire) != tx_mode::FLUSH {
                break;
            }
            if s.nonblock.load(Relaxed) != 0 {
                return EAGAIN;
            }
            if let super::waiting::Woke::Err(e) = self.wait_kernel(fd, s, libc::POLLOUT, true) {
                return e;
            }
        }
        0
    }

    /// For sets that are told of edges and in which the doorbell and TCP both are (mio, tokio): a call that does not wait
    /// has found no bytes (POLLIN) or no room (POLLOUT), and its caller is about to wait for an event. Arms for that. True:
    /// it has come meanwhile, so look again. `first`: also whether TCP has something to say that the ring does not
    /// know of; once for each call, since what it is the call finds out.
    ///
    /// No wake-up is lost: armed, fence, look, against publish, fence, look at the armed word (`[bell.recheck]`); and a ring is an
    /// edge of the doorbell, which the kernel reports as long as there are bytes in it. Nobody takes the last of them:
    /// `thin_bell`.
    pub fn rearm(&self, fd: i32, events: u32, first: bool) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        if self.rearms.fetch_add(1, Relaxed).is_multiple_of(THIN) {
            self.thin_bell(m.bell);
        }
        self.arm(events);
        if self.look_at(fd).ready & events != 0 || self.ask_bell(fd, s, &m) {
            return true;
        }
        let mut p = [libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 }];
        let stray = first
            && events & libc::POLLIN as u32 != 0
            && s.rx.mode.load(Acquire) == rx_mode::RING
            && sys::poll(&mut p, Some(0)) > 0;
        if stray {
            self.kernel_readable();
        }
        stray
    }

    /// Takes rings that lie unread, but for one: a peer's rings always find room, and an edge that a set has not
    /// reported yet still finds a byte.
    #[cold]
    fn thin_bell(&self, bell: i32) {
        let unread = sys::ioctl_int(bell, libc::FIONREAD).unwrap_or(0).max(0) as usize;
        let mut spare = [0u8; 256];
        if let n @ 2.. = unread.min(spare.len()) {
            let _ = sys::recv_small(bell, &mut spare[..n - 1], libc::MSG_DONTWAIT);
        }
    }

    /// A connection that is plain TCP again is not followed any more; its descriptor stays as it is. Nobody may be in a
    /// call on it.
    pub fn detach(&self) {
        if self.phase.load(Relaxed) == phase::HANDSHAKE {
            self.bar(Reason::PeerGone);
        }
        let last = self.given_back();
        self.finish(last);
    }

    /// Whether this thread has what a reservation holds.
    #[cold]
    pub fn is_reserved_here(&self) -> bool {
        let mine = |s: &Slot| crate::lock::held_by_me(&s.tx.lock) || crate::lock::held_by_me(&s.rx.lock);
        self.slot().is_some_and(mine)
    }
}
