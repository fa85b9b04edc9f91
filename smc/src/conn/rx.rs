//! The receiving direction: TCP, ready for the switch, the ring, and the way back.
//!
//! While READY there is one reader at a time, and it peeks before it takes: bytes that were in the TCP
//! queue before the look at the announcement are bytes before the switch offset; of those after it only
//! the ones up to N are taken. So no read runs past N, whatever the sender does meanwhile.
#![allow(unsafe_code)]

use super::patience::Patience;
use super::tx::Iov;
use super::waiting::{What, Woke};
use super::{Kernel, Mapped, Socket, fate};
use crate::arena::{Slot, rx_mode, tx_mode};
use crate::gate;
use crate::handshake::switch::{self, TcpTake};
use crate::lock;
use crate::mem::layout::{LEFT, ctl};
use crate::once::Once;
use crate::reason::Reason;
use crate::ring::{self, Readable};
use crate::section;
use crate::sync::Ordering::*;
use crate::sys;
use crate::wait::doorbell;

const EAGAIN: isize = -(libc::EAGAIN as isize);
const EINTR: isize = -(libc::EINTR as isize);
const ECONNRESET: isize = -(libc::ECONNRESET as isize);

/// In `rx.stopped`: noted, and perhaps not told yet.
pub(super) const STOPPING: u32 = 2;

/// Flags of recv(2) with which it is not content with what there is, or does not take it.
const UNCOMMON: i32 = libc::MSG_PEEK | libc::MSG_WAITALL | libc::MSG_TRUNC;

/// How a part of a call is received by TCP where that may sleep.
static RECV: Once<unsafe fn(i32, &mut libc::msghdr, i32) -> isize> = Once::new();

/// Names the function that receives a part of a call by TCP: recvmsg(2), and its result or minus an errno. It may
/// end the thread (cancellation). The first call counts.
pub fn recv_with(f: unsafe fn(i32, &mut libc::msghdr, i32) -> isize) {
    let _ = RECV.set(f);
}

/// recvmsg(2) of a part of a call that may sleep.
///
/// # Safety
/// `iov` describes writable memory.
unsafe fn recv_part(fd: i32, iov: &[libc::iovec], flags: i32) -> isize {
    let mut m = sys::zeroed_msghdr();
    m.msg_iov = iov.as_ptr().cast_mut();
    m.msg_iovlen = iov.len();
    match RECV.get() {
        // SAFETY: as the caller vouches.
        Some(f) => unsafe { f(fd, &mut m, flags) },
        // SAFETY: as the caller vouches.
        None => unsafe { sys::recv_iov(fd, iov, flags) },
    }
}

enum Take {
    Bytes(usize),
    Empty,
    NotRing,
    Reset,
}

impl Socket {
    /// recv(2), read(2) and their kin. `kernel` does the whole call on TCP.
    ///
    /// Blocks as the socket and `flags` say. Returns bytes, 0 at the end of the stream, or minus an errno.
    ///
    /// # Safety
    /// `iov` describes writable memory.
    #[inline]
    pub unsafe fn recv(&self, fd: i32, iov: &[libc::iovec], flags: i32, kernel: Kernel<'_>) -> isize {
        let Some(s) = self.slot() else { return self.in_kernel(kernel) };
        let mode = s.rx.mode.load(Acquire);
        let odd = flags & (libc::MSG_OOB | libc::MSG_ERRQUEUE) != 0;
        if odd || mode == rx_mode::DONE && s.tx.mode.load(Relaxed) == tx_mode::DONE {
            if !odd && let Some(e) = fate::owed_to_reader(s, self.fd_now(fd)) {
                return e;
            }
            let n = self.in_kernel(kernel);
            return if odd { n } else { self.hear(fd, s, n, iov) };
        }
        let v = Iov::new(iov);
        // Nearly always there is the ring, something in it, and that will do. Whatever else is so, the loop finds out
        // by itself.
        if mode == rx_mode::RING
            && flags & UNCOMMON == 0
            && v.total != 0
            && s.rcvlowat.load(Relaxed) <= 1
            && let Some(m) = self.mapped()
        {
            match self.take(s, &m, self.fd_now(fd), &v, 0, 0) {
                Take::Bytes(n) => return n as isize,
                Take::Reset => return ECONNRESET,
                Take::Empty | Take::NotRing => {}
            }
        }
        // SAFETY: as the caller vouches.
        unsafe { self.recv_on(fd, s, v, flags, kernel) }
    }

    /// A receive that has not found its bytes in the ring at once. Out of line, for what it needs is not to be
    /// paid by who does without.
    ///
    /// # Safety
    /// `v` describes writable memory.
    #[inline(never)]
    unsafe fn recv_on(&self, fd: i32, s: &Slot, v: Iov<'_>, flags: i32, kernel: Kernel<'_>) -> isize {
        let nonblock = flags & libc::MSG_DONTWAIT != 0 || s.nonblock.load(Relaxed) != 0;
        let all = flags & libc::MSG_WAITALL != 0;
        let peek = flags & libc::MSG_PEEK != 0;
        let mut done = 0usize;
        let mut deadline = None;
        let asked = fd;
        loop {
            let fd = self.fd_now(asked);
            let mode = s.rx.mode.load(Acquire);
            if mode != rx_mode::RING
                && matches!(s.tx.mode.load(Relaxed), tx_mode::RING | tx_mode::FLUSH)
                && let Err(e) = self.heed(fd, s, nonblock, &mut deadline, done > 0)
            {
                return if done > 0 { done as isize } else { e };
            }
            let r = match mode {
                rx_mode::RING => {
                    let Some(m) = self.mapped() else { return self.in_kernel(kernel) };
                    // A blocking call waits for SO_RCVLOWAT bytes, MSG_WAITALL for all (sock_rcvlowat).
                    let low = u64::from(s.rcvlowat.load(Relaxed)).max(1);
                    let target = if all { v.total as u64 } else { low.min(v.total as u64) };
                    let need = if peek { target.min(super::waiting::high_water(m.most_unread())) } else { 1 };
                    if peek && !nonblock && s.rx.suspect.load(Relaxed) == 0 && !self.has(s, &m, need) {
                        match self.wait(fd, s, &m, What::Rx(need), &mut deadline, false) {
                            Woke::Look => continue,
                            // What is there is shown at a time-out or a signal, if anything is.
                            Woke::Err(e) if !self.has(s, &m, 1) => return e,
                            Woke::Err(_) => {}
                        }
                    }
                    match self.take_out_of_line(s, &m, fd, &v, done, flags) {
                        Take::Bytes(n) => {
                            done += n;
                            if peek && done < v.total {
                                // SAFETY: as the caller vouches.
                                return (done + unsafe { self.peek_on(s, &m, fd, &v, done, flags) }) as isize;
                            }
                            if peek || nonblock && !all || done as u64 >= target {
                                return done as isize;
                            }
                            continue;
                        }
                        Take::NotRing => continue,
                        Take::Reset => ECONNRESET,
                        Take::Empty if s.rx.suspect.load(Relaxed) != 0 => {
                            match self.take_stray(fd, s, &v, done, flags) {
                                Some(r) => r,
                                None => continue,
                            }
                        }
                        Take::Empty if nonblock && self.glance(fd, s, &m) => continue,
                        Take::Empty if nonblock => {
                            self.obey(fd);
                            EAGAIN
                        }
                        Take::Empty => match self.wait(fd, s, &m, What::Rx(1), &mut deadline, done > 0) {
                            Woke::Look => continue,
                            Woke::Err(e) => e,
                        },
                    }
                }
                _ if done == 0
                    && let Some(e) = fate::owed_to_reader(s, fd) =>
                {
                    return e;
                }
                rx_mode::TCP if done == 0 => match self.recv_tcp(fd, s, flags, v.total, kernel) {
                    Some(r) => {
                        self.note_dry(r);
                        return self.hear(fd, s, r, v.iov);
                    }
                    None => continue,
                },
                rx_mode::READY | rx_mode::GATE => match self.recv_ready(fd, s, &v, done, flags, nonblock) {
                    Some(n) if n > 0 => {
                        done += n as usize;
                        if done == v.total || peek || (!all && s.rx.mode.load(Relaxed) != rx_mode::RING) {
                            return done as isize;
                        }
                        if !all {
                            return (done + self.take_more(s, fd, &v, done, flags)) as isize;
                        }
                        continue;
                    }
                    Some(r) => r,
                    None => continue,
                },
                _ if done == 0 && fd == asked => return self.hear(fd, s, self.in_kernel(kernel), v.iov),
                _ => {
                    let part = v.part(done, v.total - done);
                    // SAFETY: part of the caller's iovecs.
                    self.in_kernel(&mut || unsafe { recv_part(fd, &part, flags) })
                }
            };
            if r > 0 {
                return (done + r as usize) as isize;
            }
            if done == 0 {
                return if mode == rx_mode::RING { r } else { self.hear(fd, s, r, v.iov) };
            }
            self.keep_error(s, r);
            return done as isize;
        }
    }

    /// Whether `need` bytes can be read, or the stream has left the ring.
    fn has(&self, s: &Slot, m: &Mapped<'_>, need: u64) -> bool {
        s.rx.mode.load(Acquire) != rx_mode::RING
            || self.look(s, m).map_or(true, |r| r.bytes >= need || r.left)
    }

    /// A peek has seen all of the ring and wants more: if the stream has left the ring, it goes on in TCP.
    /// (Whoever peeks until a whole message is there would peek for ever.)
    ///
    /// # Safety
    /// `v` describes writable memory.
    #[cold]
    unsafe fn peek_on(
        &self,
        s: &Slot,
        m: &Mapped<'_>,
        fd: i32,
        v: &Iov<'_>,
        done: usize,
        flags: i32,
    ) -> usize {
        if !self.look(s, m).is_ok_and(|r| r.left && r.bytes == done as u64) {
            return 0;
        }
        let wait = if flags & libc::MSG_WAITALL != 0 { 0 } else { libc::MSG_DONTWAIT };
        let part = v.part(done, v.total - done);
        // SAFETY: part of the caller's iovecs.
        let n = self.in_kernel(&mut || unsafe { recv_part(fd, &part, flags | wait) });
        self.keep_error(s, n);
        n.max(0) as usize
    }

    /// A peek has seen the last `tcp` bytes that come by TCP, and the stream goes on in the ring, and may come
    /// back from there: what is there is shown too.
    #[allow(clippy::too_many_arguments, reason = "one place, and all of them differ")]
    #[cold]
    fn peek_into_ring(
        &self,
        s: &Slot,
        m: &Mapped<'_>,
        fd: i32,
        v: &Iov<'_>,
        done: usize,
        tcp: usize,
        flags: i32,
    ) -> usize {
        let Ok(r) = self.look(s, m) else { return 0 };
        let n = r.bytes.min((v.total - done) as u64) as usize;
        let show = flags & libc::MSG_TRUNC == 0;
        if show {
            let mut at = m.rx_at(s.rx.cons.load(Relaxed));
            v.pieces(done, n, |p, k| {
                // SAFETY: the program's writable memory; n bytes are readable, and only the one reader of TCP,
                // which this is, takes the stream into the ring, so that nobody consumes them meanwhile.
                unsafe { m.rxbuf.copy_out(at, p, k) };
                at += k as u64;
            });
        }
        let want = v.total - done - n;
        if !r.left || n as u64 != r.bytes || want == 0 {
            return n;
        }
        // What follows lies behind the bytes by TCP that were shown already.
        let queued = sys::ioctl_int(fd, libc::FIONREAD).map_or(0, |q| q.max(0) as usize);
        let mut rest = vec![0u8; queued.min(tcp.saturating_add(want))];
        let into = [libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() }];
        // SAFETY: our own buffer.
        let got = unsafe { sys::recv_iov(fd, &into, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        self.keep_error(s, got);
        let more = usize::try_from(got).unwrap_or(0).saturating_sub(tcp);
        if show {
            let mut at = tcp;
            v.pieces(done + n, more, |p, k| {
                // SAFETY: the program's writable memory; `rest` has `tcp + more` bytes.
                unsafe { std::ptr::copy_nonoverlapping(rest[at..at + k].as_ptr(), p, k) };
                at += k;
            });
        }
        n + more
    }

    /// What the ring has at once, after the last TCP bytes of the same call.
    fn take_more(&self, s: &Slot, fd: i32, v: &Iov<'_>, done: usize, flags: i32) -> usize {
        match self.mapped() {
            Some(m) if flags & libc::MSG_PEEK == 0 => {
                match self.take_out_of_line(s, &m, fd, v, done, flags) {
                    Take::Bytes(n) => n,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// A counted read of TCP before the switch is in sight. `None`: the mode has changed, look again.
    fn recv_tcp(&self, fd: i32, s: &Slot, flags: i32, bytes: usize, kernel: Kernel<'_>) -> Option<isize> {
        self.advance(fd, s);
        if let Some(nothing) = self.await_start(fd, s, flags, bytes) {
            return Some(nothing);
        }
        if !gate::enter(&self.inside(s).rx, &s.rx.mode, rx_mode::TCP) {
            return None;
        }
        let mut undo = || gate::leave(&self.inside(s).rx);
        let n = section::window(self, &mut undo, &mut |_| kernel());
        if n > 0 && flags & libc::MSG_PEEK == 0 {
            s.rx.tcp.fetch_add(n as u64, Relaxed);
            self.bytes.fetch_add(n as u64, Relaxed);
        }
        gate::leave(&self.inside(s).rx);
        Some(n)
    }

    /// READY: one reader peeks, looks for the announcement, takes what lies before N.
    #[cold]
    fn recv_ready(
        &self,
        fd: i32,
        s: &Slot,
        v: &Iov<'_>,
        done: usize,
        flags: i32,
        nonblock: bool,
    ) -> Option<isize> {
        if s.rx.mode.load(Acquire) == rx_mode::GATE {
            // Its holder has the lock and does not sleep.
            drop(lock::lock(&s.rx.lock));
            return None;
        }
        let Some(m) = self.mapped() else { return Some(EAGAIN) };
        // While another thread reads, its bytes are as good as taken.
        let g = match lock::try_lock(&s.rx.reader) {
            Some(g) => Some(g),
            // A handler of this thread's has interrupted its peek, which has taken nothing, and will look again.
            None if lock::held_by_me(&s.rx.reader) => None,
            None if nonblock => return Some(EAGAIN),
            None => {
                // It sleeps with the lock: who waits for that is interrupted like who waits for bytes.
                let strict = done > 0 || s.rcvtimeo_us.load(Relaxed) != 0;
                let n = section::window(self, &mut || (), &mut |since| {
                    let n = if since.ends(strict) { EINTR } else { lock::wait(&s.rx.reader) };
                    if n == EINTR && !since.restarts(strict) { EINTR } else { 0 }
                });
                return if n < 0 { Some(n) } else { None };
            }
        };
        if s.rx.mode.load(Acquire) != rx_mode::READY {
            return None;
        }
        let mut have = s.rx.tcp.load(Relaxed);
        if switch::announced(m.peer) == Some(have) {
            self.enter_ring(s);
            return None;
        }
        let want = v.total - done;
        // With MSG_TRUNC the address is not used, and may be none.
        let trunc = flags & libc::MSG_TRUNC;
        let peek_flags = libc::MSG_PEEK | trunc | if nonblock { libc::MSG_DONTWAIT } else { 0 };
        let part = v.part(done, want);
        // Who never comes back leaves the lock to others: it has taken nothing.
        let mut undo = || {
            if g.is_some() {
                lock::give_up(&s.rx.reader);
            }
        };
        let mut handled = false;
        let seen = section::window(self, &mut undo, &mut |since| {
            // SAFETY: part of the caller's iovecs; a peek overwrites nothing that is not read again below.
            let n = unsafe { recv_part(fd, &part, peek_flags) };
            handled = since.any();
            n
        });
        let fd = self.fd_now(fd);
        if seen < 0 {
            return Some(seen);
        }
        if handled {
            // The handler may have read on this connection as well.
            return None;
        }
        let n = match switch::tcp_take(m.peer, have, seen as usize) {
            TcpTake::EnterRing => {
                self.enter_ring(s);
                return None;
            }
            TcpTake::End => return Some(0),
            TcpTake::Take(n) => n,
        };
        if flags & libc::MSG_PEEK != 0 {
            let last = switch::announced(m.peer) == Some(have + n as u64);
            let more = if last { self.peek_into_ring(s, &m, fd, v, done + n, n, flags) } else { 0 };
            return Some((n + more) as isize);
        }
        // SAFETY: part of the caller's iovecs.
        let r = unsafe { sys::recv_iov(fd, &v.part(done, n), libc::MSG_DONTWAIT | trunc) };
        if r > 0 {
            have += r as u64;
            s.rx.tcp.store(have, Relaxed);
            if switch::announced(m.peer) == Some(have) {
                self.enter_ring(s);
            }
        }
        drop(g);
        if r == EAGAIN && !nonblock {
            // Others have taken the direction to TCP and its bytes meanwhile, which needs no lock of ours.
            return None;
        }
        Some(r)
    }

    /// TCP has been read up to N: the stream goes on in the ring.
    fn enter_ring(&self, s: &Slot) {
        let _g = lock::lock(&s.rx.lock);
        if s.rx.mode.load(Relaxed) == rx_mode::READY {
            s.rx.mode.store(rx_mode::RING, Release);
            self.count_upgrade(s);
            self.set_changed();
            // Threads that sleep on the doorbell since READY expect to be rung.
            if s.is_slept_on()
                && let Some(m) = self.mapped()
            {
                doorbell::arm(m.me, ctl::RX_ARMED);
            }
        }
    }

    /// What this side may read from the ring now.
    #[inline(always)]
    pub(super) fn look(&self, s: &Slot, m: &Mapped<'_>) -> Result<Readable, ring::PeerMisbehaved> {
        let stop = (s.rx.stopped.load(Acquire) != 0).then(|| s.rx.stop_at.load(Relaxed));
        switch::ring_look(m.peer, &self.promised, &s.rx.cons, m.rxbuf.size(), stop)
    }

    /// The program has been told of `bytes` from `cons` on, and may count on finding them: a peer that takes them
    /// back, so that a read which was not to wait waits for ever, is found out by [`Socket::look`].
    #[inline(always)]
    pub(super) fn promise(&self, cons: u64, bytes: u64) {
        switch::promise(&self.promised, cons + bytes);
    }

    /// What TCP_INQ tells: the bytes that are here and unread; 1 where there are none and the stream has ended
    /// (tcp_inq_hint, net/ipv4/tcp.c).
    pub fn left_to_read(&self, fd: i32) -> u64 {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return 0 };
        if s.rx.mode.load(Acquire) == rx_mode::RING
            && let Ok(r) = self.look(s, &m)
            && !r.left
        {
            return r.bytes;
        }
        let fd = self.fd_now(fd);
        let in_tcp = sys::ioctl_int(fd, libc::FIONREAD).unwrap_or(0) as u64;
        match self.unread(in_tcp).unwrap_or(in_tcp) {
            0 => sys::tcp_has_ended(fd).into(),
            n => n,
        }
    }

    /// Copies out of the ring what is there.
    #[inline(always)]
    fn take(&self, s: &Slot, m: &Mapped<'_>, fd: i32, v: &Iov<'_>, done: usize, flags: i32) -> Take {
        // Without the lock the own cursor may be an old one, which makes the peer's look impossible.
        if let Ok(Readable { bytes: 0, left: false }) = self.look(s, m) {
            return Take::Empty;
        }
        let g = lock::lock(&s.rx.lock);
        if s.rx.mode.load(Relaxed) != rx_mode::RING {
            return Take::NotRing;
        }
        let r = match self.look(s, m) {
            Ok(r) => r,
            Err(_) => {
                drop(g);
                self.misbehaved(fd, s);
                return Take::Reset;
            }
        };
        if r.bytes == 0 {
            if !r.left {
                return Take::Empty;
            }
            self.out_of_ring(s, m, fd, g);
            return Take::NotRing;
        }
        let cons = s.rx.cons.load(Relaxed);
        let n = r.bytes.min((v.total - done) as u64) as usize;
        if flags & libc::MSG_TRUNC == 0 {
            let mut at = m.rx_at(cons);
            v.pieces(done, n, |p, k| {
                // SAFETY: the program's writable memory; n bytes are readable.
                unsafe { m.rxbuf.copy_out(at, p, k) };
                at += k as u64;
            });
        }
        if flags & libc::MSG_PEEK != 0 {
            self.promise(cons, n as u64);
            return Take::Bytes(n);
        }
        s.rx.msgs.store(s.rx.msgs.load(Relaxed) + 1, Relaxed);
        let owed = self.consume(s, m, cons + n as u64, r.bytes - n as u64);
        drop(g);
        if owed.ring {
            self.ring_peer(s, m);
        }
        if owed.stop {
            self.obey(fd);
        }
        Take::Bytes(n)
    }

    /// Under the rx lock, at the cursor where the ring ends.
    #[cold]
    #[inline(never)]
    pub(super) fn out_of_ring(&self, s: &Slot, m: &Mapped<'_>, fd: i32, g: lock::Guard<'_>) {
        if s.rx.stopped.load(Relaxed) == STOPPING {
            // Not before here: the bytes below its cursor are this side's in any case.
            let first = self.settle_stop(s, m);
            drop(g);
            if first {
                self.ring_peer(s, m);
            }
            return;
        }
        s.rx.mode.store(rx_mode::DONE, Release);
        self.set_tcp_mark(fd, s, s.rcvlowat.load(Relaxed));
        self.set_changed();
    }

    #[inline(never)]
    fn take_out_of_line(
        &self,
        s: &Slot,
        m: &Mapped<'_>,
        fd: i32,
        v: &Iov<'_>,
        done: usize,
        flags: i32,
    ) -> Take {
        self.take(s, m, fd, v, done, flags)
    }

    /// Under the rx lock: frees the ring up to `cons`; what is owed to the peer.
    #[inline(always)]
    pub(super) fn consume(&self, s: &Slot, m: &Mapped<'_>, cons: u64, left: u64) -> doorbell::Owed {
        s.rx.cons.store(cons, Relaxed);
        ring::release(&m.me.rx, cons);
        // A sender that sleeps for space is woken when there is enough to be worth it.
        let most = m.most_unread();
        let enough = most.saturating_sub(left) >= super::waiting::low_water(most);
        doorbell::after_publish_for(m.peer, ctl::TX_ARMED, enough, &s.wait.rings)
    }

    /// TCP became readable though the stream is in the ring: somebody writes behind our peer's back, or
    /// the peer ended without a word. The kernel says which. `None`: nothing there.
    #[cold]
    fn take_stray(&self, fd: i32, s: &Slot, v: &Iov<'_>, done: usize, flags: i32) -> Option<isize> {
        s.rx.suspect.store(0, Relaxed);
        if s.is_served() {
            // TCP's stream is the service's.
            return None;
        }
        let m = self.mapped()?;
        let trunc = flags & libc::MSG_TRUNC;
        let mut p = [libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 }];
        if sys::poll(&mut p, Some(0)) == 0 || self.look(s, &m).is_ok_and(|r| r.bytes > 0 || r.left) {
            // An error that is there is told once only, and after the bytes.
            return None;
        }
        // SAFETY: part of the caller's iovecs; a peek overwrites nothing that is not read again below.
        let mut n = unsafe {
            let peek = libc::MSG_PEEK | libc::MSG_DONTWAIT | trunc;
            sys::recv_iov(fd, &v.part(done, v.total - done), peek)
        };
        // What a peer sends by TCP comes after it has left the ring: the ring says so now, if that is what was seen.
        // (TCP carries the edge: the cursor was stored before the bytes were sent.)
        if n == EAGAIN || n >= 0 && self.look(s, &m).is_ok_and(|r| r.bytes > 0 || r.left) {
            return None;
        }
        if n > 0 && flags & libc::MSG_PEEK == 0 {
            // SAFETY: part of the caller's iovecs.
            n = unsafe { sys::recv_iov(fd, &v.part(done, n as usize), libc::MSG_DONTWAIT | trunc) };
            if n == EAGAIN {
                // Another thread has taken them since.
                return None;
            }
        }
        if n == 0
            && done == 0
            && self.judge(fd)
            && let Some(e) = fate::owed(s)
        {
            return Some(e);
        }
        if n < 0 {
            self.kernel_tells(fd);
        }
        // The end must be told again at the next call.
        if n <= 0 {
            s.rx.suspect.store(1, Relaxed);
        }
        Some(n)
    }

    /// For FIONREAD, `in_tcp` being what the kernel says: bytes of the ring and of TCP, as far as one follows on
    /// the other. `None`: the kernel is right.
    pub fn unread(&self, in_tcp: u64) -> Option<u64> {
        let s = self.slot()?;
        let m = self.mapped()?;
        match s.rx.mode.load(Acquire) {
            // A stream that has left the ring goes on in TCP.
            rx_mode::RING => self.look(s, &m).ok().map(|r| r.bytes + if r.left { in_tcp } else { 0 }),
            // One that has been announced and whose last byte by TCP is here goes on in the ring.
            rx_mode::READY if switch::announced(m.peer)? <= s.rx.tcp.load(Relaxed) + in_tcp => {
                self.look(s, &m).ok().map(|r| in_tcp + r.bytes)
            }
            _ => None,
        }
    }

    /// Whether bytes lie in the ring that nobody would move into TCP if this side stopped now: the sender has left the
    /// ring or is gone, or this side has stopped already and has kept them; with `idle`, also a sender that does not wait
    /// for the connection, and would move them when it uses it again. Whoever does not see the ring would do without
    /// them, or wait for them, perhaps for ever.
    pub fn strands(&self, idle: bool) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        match s.rx.mode.load(Acquire) {
            rx_mode::RING => {}
            rx_mode::READY if switch::announced(m.peer).is_some() => {}
            _ => return false,
        }
        let Ok(r) = self.look(s, &m) else { return false };
        r.bytes > 0
            && (r.left || s.rx.stopped.load(Acquire) != 0 || m.peer_gone() || idle && !self.peer_waits(s, &m))
    }

    /// Whether a call of the peer's waits for the connection: the stop will ring, and it obeys. Armed is also what an
    /// epoll set has left so, whose thread is anywhere by now. So it is rung once for nothing: who waits arms again.
    fn peer_waits(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        const LONG: u64 = 20_000_000;
        let armed = || m.peer.ctl.ctl.load(Relaxed) & (ctl::RX_ARMED | ctl::TX_ARMED);
        let bit = match armed() {
            0 => return false,
            any if any & ctl::RX_ARMED != 0 => ctl::RX_ARMED,
            _ => ctl::TX_ARMED,
        };
        {
            let _g = lock::lock(&s.tx.lock);
            s.wait.rings.note();
            // ORDERING [bell.recheck] AcqRel; as in `after_publish`: who takes the bit rings.
            m.peer.ctl.ctl.fetch_and(!bit, AcqRel);
        }
        self.ring_peer(s, m);
        let mut patience = Patience::new(LONG);
        while armed() & bit == 0 {
            if !patience.nap() {
                return false;
            }
        }
        true
    }

    /// Whether the receiving direction is in the ring.
    pub fn rx_in_ring(&self) -> bool {
        self.slot().is_some_and(|s| s.rx.mode.load(Acquire) == rx_mode::RING)
    }

    /// Under the rx lock, with a stop that a killed holder has noted and may not have told: tells it (once more does
    /// no harm). True: the peer is to be rung.
    #[cold]
    pub(super) fn settle_stop(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        let first = doorbell::stop(m.me, s.rx.stop_at.load(Relaxed));
        s.rx.stopped.store(first.into(), Release);
        self.set_changed();
        first
    }

    /// Before a sleep: a holder that was killed may have noted a cursor and not published it, or owe a ring. Whoever
    /// is in the middle of that has the lock.
    #[inline]
    pub(super) fn amend(&self, s: &Slot, m: &Mapped<'_>) {
        let (prod, cons) = (m.me.tx.prod.load(Relaxed) & !LEFT, m.me.rx.cons.load(Relaxed));
        if prod != s.tx.prod.load(Relaxed) || cons != s.rx.cons.load(Relaxed) || s.wait.rings.is_owed() {
            self.amend_slowly(s, m);
        }
    }

    #[cold]
    fn amend_slowly(&self, s: &Slot, m: &Mapped<'_>) {
        if lock::held_by_me(&s.tx.lock) || lock::held_by_me(&s.rx.lock) {
            return;
        }
        let mut ring = false;
        {
            let _g = lock::lock(&s.rx.lock);
            let cons = s.rx.cons.load(Relaxed);
            if m.me.rx.cons.load(Relaxed) != cons {
                ring |= self.consume(s, m, cons, 0).ring;
            }
        }
        {
            let _g = lock::lock(&s.tx.lock);
            let prod = s.tx.prod.load(Relaxed);
            if s.tx.mode.load(Relaxed) == tx_mode::RING && m.me.tx.prod.load(Relaxed) != prod {
                ring::publish(&m.me.tx, prod, false);
                ring |= self.produced(s, m).ring;
            }
        }
        if ring || s.wait.rings.is_owed() {
            self.ring_peer(s, m);
        }
    }

    /// The stream has left the ring and all of it is read: the rest is TCP's, as the next read would find.
    #[cold]
    pub fn follow(&self, fd: i32) {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return };
        if s.rx.mode.load(Acquire) != rx_mode::RING || lock::held_by_me(&s.rx.lock) {
            return;
        }
        let g = lock::lock(&s.rx.lock);
        if s.rx.mode.load(Relaxed) == rx_mode::RING && self.look(s, &m).is_ok_and(|r| r.left && r.bytes == 0)
        {
            self.out_of_ring(s, &m, fd, g);
        }
    }

    /// Asks the sender back to TCP. With `keep`, what is in the ring is still read from there, and what comes
    /// after by TCP, whatever the sender does meanwhile; without, what is in the ring is moved into TCP by the
    /// sender, at its next call (this process will not see the ring any more).
    #[cold]
    pub fn stop_rx(&self, why: Reason, keep: bool) {
        let Some(s) = self.slot() else { return };
        if s.is_served() && why != Reason::PeerGone {
            return;
        }
        if matches!(s.rx.mode.load(Acquire), rx_mode::TCP | rx_mode::GATE) {
            self.bar(why);
            // [gate]: another thread may be about to be ready, which is undone here then.
            if s.rx.mode.load(Acquire) == rx_mode::TCP {
                return;
            }
        }
        let Some(m) = self.mapped() else { return };
        // A peer that is gone moves nothing any more.
        let gone = s.wait.peer_gone.load(Relaxed) != 0 || m.peer_gone();
        let keep = keep || gone;
        {
            let g = lock::lock(&s.rx.lock);
            let mode = s.rx.mode.load(Relaxed);
            if mode == rx_mode::TCP {
                return;
            }
            if s.rx.stopped.load(Relaxed) == STOPPING && self.settle_stop(s, &m) {
                drop(g);
                self.ring_peer(s, &m);
                return;
            }
            if mode == rx_mode::DONE || s.rx.stopped.load(Relaxed) != 0 {
                // The peer may have gone by where this side stops: that stays.
                return;
            }
            let cons = s.rx.cons.load(Relaxed);
            // Noted before the peer knows: if this process is killed between the two, a forked sibling that went on
            // in the ring would read there what the sender moves into TCP.
            let note = |at| {
                s.rx.stop_at.store(at, Relaxed);
                s.rx.stopped.store(STOPPING, Release);
            };
            let stop_at = match switch::stop(m.me, m.peer, cons, m.rxbuf.size(), keep, note) {
                Some(at) => at,
                // The sender has left the ring by itself; what is in it is read from there.
                None if !gone => return s.rx.stopped.store(0, Release),
                // It may have been about to, or have said so only: it ends where the ring does.
                None => cons + ring::readable(&m.peer.tx, cons, m.rxbuf.size()).map_or(0, |r| r.bytes),
            };
            s.rx.stop_at.store(stop_at, Relaxed);
            s.rx.stopped.store(1, Release);
            if mode == rx_mode::READY && switch::announced(m.peer).is_none() {
                // Not announced, and whoever announces now finds the stop at 0 after its first publication.
                s.rx.mode.store(rx_mode::DONE, Release);
            }
            if mode == rx_mode::RING && stop_at == cons {
                s.rx.mode.store(rx_mode::DONE, Release);
            }
            s.reason.store(why.code(), Relaxed);
            self.set_changed();
        }
        // The sender may sleep with bytes in the ring that are now its to move.
        self.ring_peer(s, &m);
    }
}
