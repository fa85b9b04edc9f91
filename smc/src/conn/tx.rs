//! The sending direction: TCP, the announcement of the switch, the ring, and the way back.
//!
//! The announcement: with the TCP queue empty and nobody else inside the kernel, the sender says "the
//! stream leaves TCP at offset N", N at least one byte beyond what has been sent, then sends the bytes up to
//! N by TCP, and goes on in the ring. Those last TCP bytes carry the announcement (they wake a reader that
//! sleeps in the kernel, and whoever has read them sees the announcement).
#![allow(unsafe_code)]

use super::waiting::{What, Woke};
use super::{Mapped, Socket, bounds, fate};
use crate::arena::{Slot, tx_mode};
use crate::gate;
use crate::handshake::switch;
use crate::lock;
use crate::mem::layout::ctl;
use crate::once::Once;
use crate::reason::Reason;
use crate::ring;
use crate::sync::Ordering::*;
use crate::sys;
use crate::wait::doorbell;

const EAGAIN: isize = -(libc::EAGAIN as isize);
const EINTR: isize = -(libc::EINTR as isize);
const ECONNRESET: isize = -(libc::ECONNRESET as isize);
const EPIPE: isize = -(libc::EPIPE as isize);

/// Flags of send(2) that ask for what only TCP has; TCP ignores all that it does not know.
const ODD: i32 = libc::MSG_OOB | libc::MSG_ZEROCOPY | libc::MSG_FASTOPEN;

/// Most bytes of the message that announces the switch that still go by TCP: kept whole if they are few.
const LAST_BY_TCP: usize = 64 << 10;

/// Messages into the ring from one look whether the peer takes any to the next.
const CHECK: u64 = 32;

/// Before the switch a blocking call of more is several to the kernel: it would be inside for all of it.
const PIECE: usize = 256 << 10;

/// The call as the kernel would do it: its result, or minus an errno.
pub type Kernel<'a> = &'a mut dyn FnMut() -> isize;

/// iovecs with a part already done.
#[derive(Clone, Copy)]
pub(super) struct Iov<'a> {
    pub iov: &'a [libc::iovec],
    pub total: usize,
}

impl<'a> Iov<'a> {
    #[inline]
    pub fn new(iov: &'a [libc::iovec]) -> Self {
        let total = match iov {
            // What read and write give: no loop, which the compiler would make a wide one.
            [one] => one.iov_len,
            many => many.iter().map(|v| v.iov_len).fold(0, usize::saturating_add),
        };
        Iov { iov, total }
    }

    /// Calls `f(pointer, length)` for the pieces of the `n` bytes from `skip` on.
    #[inline(always)]
    pub fn pieces(&self, skip: usize, n: usize, mut f: impl FnMut(*mut u8, usize)) {
        match self.iov {
            [v] => {
                let k = v.iov_len.saturating_sub(skip).min(n);
                if k != 0 {
                    f(v.iov_base.cast::<u8>().wrapping_add(skip), k);
                }
            }
            _ => self.many_pieces(skip, n, &mut f),
        }
    }

    #[inline(never)]
    fn many_pieces(&self, mut skip: usize, mut n: usize, f: &mut dyn FnMut(*mut u8, usize)) {
        for v in self.iov {
            if n == 0 {
                return;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let k = (v.iov_len - skip).min(n);
            f(v.iov_base.cast::<u8>().wrapping_add(skip), k);
            n -= k;
            skip = 0;
        }
    }

    /// The iovecs of the `n` bytes from `skip` on.
    pub fn part(&self, skip: usize, n: usize) -> Vec<libc::iovec> {
        let mut out = Vec::with_capacity(self.iov.len().min(1024));
        self.pieces(skip, n, |p, k| {
            if out.len() < 1024 {
                out.push(libc::iovec { iov_base: p.cast(), iov_len: k });
            }
        });
        out
    }
}

/// How a part of a call is sent by TCP where that may sleep.
static SEND: Once<unsafe fn(i32, &libc::msghdr, i32) -> isize> = Once::new();

/// Names the function that sends a part of a call by TCP: sendmsg(2), and its result or minus an errno. It may
/// end the thread (cancellation). The first call counts.
pub fn send_with(f: unsafe fn(i32, &libc::msghdr, i32) -> isize) {
    let _ = SEND.set(f);
}

/// sendmsg(2) of a part of a call that may sleep.
///
/// # Safety
/// `iov` describes readable memory.
unsafe fn send_part(fd: i32, iov: &[libc::iovec], flags: i32) -> isize {
    let mut m = sys::zeroed_msghdr();
    m.msg_iov = iov.as_ptr().cast_mut();
    m.msg_iovlen = iov.len();
    match SEND.get() {
        // SAFETY: as the caller vouches.
        Some(f) => unsafe { f(fd, &m, flags) },
        // SAFETY: as the caller vouches.
        None => unsafe { sys::send_iov(fd, iov, flags) },
    }
}

impl Mapped<'_> {
    /// Under the tx lock: where the `n` bytes from `prod` on, which are free, go.
    #[inline(always)]
    pub(super) fn place(&self, s: &Slot, prod: u64, n: u64) -> u64 {
        // The ring of an end on another host is laid out as this one, by a device that knows of no origin.
        let may = || !s.is_remote();
        ring::place(&self.me.tx, &self.peer.rx, prod, n, &self.txbuf, may)
    }

    /// The bytes before `prod` are the peer's to read; with them it learns what was rung before.
    #[inline(always)]
    pub(super) fn publish(&self, prod: u64) {
        doorbell::publish(&self.me.tx, prod, self.rang);
    }
}

enum Put {
    Bytes(usize),
    Full,
    NotRing,
    Reset,
}

impl Socket {
    /// send(2), write(2) and their kin. `kernel` does the whole call on TCP.
    ///
    /// Blocks as the socket and `flags` say. Returns bytes taken or minus an errno.
    ///
    /// # Safety
    /// `iov` describes readable memory.
    #[inline]
    pub unsafe fn send(&self, fd: i32, iov: &[libc::iovec], flags: i32, kernel: Kernel<'_>) -> isize {
        let Some(s) = self.slot() else { return self.in_kernel(kernel) };
        let mode = s.tx.mode.load(Acquire);
        if mode == tx_mode::DONE && s.reset.load(Relaxed) == 0 {
            self.pay_rings(s);
            return self.window_outward(&mut || (), &mut |_| kernel());
        }
        if matches!(mode, tx_mode::FLUSH | tx_mode::DONE) && self.is_shut(s) {
            return self.broken_pipe(flags);
        }
        let v = Iov::new(iov);
        if v.total == 0 || flags & ODD != 0 {
            // SAFETY: as the caller vouches.
            return unsafe { self.send_odd(fd, s, v, flags, kernel) };
        }
        let nonblock = flags & libc::MSG_DONTWAIT != 0 || s.nonblock.load(Relaxed) != 0;
        let mut done = 0;
        // Nearly always there is the ring, and space in it. Whatever else is so, the loop finds out by itself.
        if s.tx.mode.load(Acquire) == tx_mode::RING
            && let Some(m) = self.mapped()
        {
            match self.put(s, &m, self.fd_now(fd), &v, 0, !nonblock) {
                Put::Bytes(n) if n == v.total => return n as isize,
                Put::Bytes(n) => done = n,
                Put::Reset => return ECONNRESET,
                Put::Full | Put::NotRing => {}
            }
        }
        // SAFETY: as the caller vouches.
        unsafe { self.send_on(fd, s, v, done, flags, nonblock, kernel) }
    }

    /// A send of which `done` bytes have been taken. Out of line, for what it needs is not to be paid by who
    /// does without.
    ///
    /// # Safety
    /// `v` describes readable memory.
    #[inline(never)]
    #[expect(clippy::too_many_arguments, reason = "all that a call has come to know")]
    unsafe fn send_on(
        &self,
        fd: i32,
        s: &Slot,
        v: Iov<'_>,
        mut done: usize,
        flags: i32,
        nonblock: bool,
        kernel: Kernel<'_>,
    ) -> isize {
        let mut deadline = None;
        let asked = fd;
        loop {
            let fd = self.fd_now(asked);
            let r = match s.tx.mode.load(Acquire) {
                tx_mode::RING => {
                    let Some(m) = self.mapped() else { return self.in_kernel(kernel) };
                    match self.put_out_of_line(s, &m, fd, &v, done, !nonblock) {
                        Put::Bytes(n) => {
                            done += n;
                            if done == v.total {
                                return done as isize;
                            }
                            continue;
                        }
                        Put::Full if nonblock && self.glance(fd, s, &m) => continue,
                        Put::Full if nonblock => {
                            if done == 0 && s.tx.told_full.load(Relaxed) == 0 {
                                s.tx.told_full.store(1, Relaxed);
                            }
                            EAGAIN
                        }
                        Put::Full => match self.wait(fd, s, &m, What::Tx, &mut deadline, done > 0) {
                            Woke::Look => continue,
                            Woke::Err(e) => e,
                        },
                        Put::NotRing => continue,
                        Put::Reset => ECONNRESET,
                    }
                }
                _ if s.reset.load(Relaxed) != 0
                    && let Some(e) = self.send_fated(fd, s, nonblock, done > 0) =>
                {
                    e
                }
                tx_mode::TCP => match self.send_tcp(fd, s, &v, done, flags, !nonblock, kernel) {
                    Some(n) if n > 0 => {
                        done += n as usize;
                        let more = s.tx.mode.load(Relaxed) != tx_mode::TCP
                            || !nonblock && n as usize == PIECE && may_send(fd);
                        if done < v.total && more {
                            continue;
                        }
                        return done as isize;
                    }
                    Some(n) => n,
                    None => continue,
                },
                tx_mode::DONE if done == 0 && fd == asked => {
                    self.pay_rings(s);
                    return self.window_outward(&mut || (), &mut |_| kernel());
                }
                // An error is for the next call to report: what has gone is this one's result.
                tx_mode::DONE if done > 0 && !may_send(fd) => return done as isize,
                tx_mode::DONE => {
                    let quiet = if done > 0 { libc::MSG_NOSIGNAL } else { 0 };
                    let part = v.part(done, v.total - done);
                    // SAFETY: part of the caller's iovecs.
                    self.window_outward(&mut || (), &mut |_| unsafe { send_part(fd, &part, flags | quiet) })
                }
                _ => match self.send_between(fd, s, &v, done, flags) {
                    EAGAIN if !nonblock => match self.wait_kernel(fd, s, libc::POLLOUT, done > 0) {
                        Woke::Look => continue,
                        Woke::Err(e) => e,
                    },
                    n if n >= 0 => {
                        done += n as usize;
                        if done == v.total {
                            return done as isize;
                        }
                        continue;
                    }
                    e => e,
                },
            };
            if r >= 0 {
                return (done + r as usize) as isize;
            }
            if done == 0 {
                return r;
            }
            self.keep_error(s, r);
            return done as isize;
        }
    }

    /// Flags the ring can't carry, and empty sends: the kernel answers, on TCP.
    #[cold]
    unsafe fn send_odd(&self, fd: i32, s: &Slot, v: Iov<'_>, flags: i32, kernel: Kernel<'_>) -> isize {
        if v.total != 0 {
            let why = if flags & libc::MSG_OOB != 0 { Reason::Urgent } else { Reason::Zerocopy };
            if flags & libc::MSG_ZEROCOPY != 0 {
                // Who sends so also waits for the kernel's word that it is done, among what he waits for to read.
                self.stop_rx(why, true);
                self.bar(why);
            }
            self.leave_tx(fd, why);
        }
        if !gate::enter(&self.inside(s).tx, &s.tx.mode, tx_mode::TCP) {
            return self.in_kernel(kernel);
        }
        let n = self.send_inside(s, kernel);
        if n > 0 {
            s.tx.tcp.fetch_add(n as u64, Relaxed);
        }
        gate::leave(&self.inside(s).tx);
        n
    }

    /// The kernel's part of a send that is counted in. One that never comes back is counted out; what the kernel
    /// has taken of it nobody knows, which the counts will show: the connection stays on TCP.
    fn send_inside(&self, s: &Slot, kernel: Kernel<'_>) -> isize {
        let mut undo = || gate::leave(&self.inside(s).tx);
        self.window_outward(&mut undo, &mut |_| kernel())
    }

    /// A sender sleeps until the kernel says one of `events` of TCP. `partial`: the call has moved bytes.
    #[cold]
    pub(super) fn wait_kernel(&self, fd: i32, s: &Slot, events: i16, partial: bool) -> Woke {
        let us = s.sndtimeo_us.load(Relaxed);
        let strict = partial || us != 0;
        let n = self.window_outward(&mut || (), &mut |since| {
            if since.ends(strict) {
                return EINTR;
            }
            let mut p = [libc::pollfd { fd, events, revents: 0 }];
            match sys::poll(&mut p, (us != 0).then_some(us * 1000)) {
                EINTR if since.restarts(strict) => 1,
                n => n,
            }
        });
        match n {
            0 => Woke::Err(EAGAIN),
            n if n < 0 => Woke::Err(n),
            _ => Woke::Look,
        }
    }

    /// A counted send by TCP, or the announcement. `None`: the mode has changed, look again.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "inlined into its only caller")]
    fn send_tcp(
        &self,
        fd: i32,
        s: &Slot,
        v: &Iov<'_>,
        done: usize,
        flags: i32,
        block: bool,
        kernel: Kernel<'_>,
    ) -> Option<isize> {
        self.advance(fd, s);
        if self.bytes.load(Relaxed) >= self.hold_at.load(Relaxed) {
            self.hold(fd, s, block);
        }
        if self.phase.load(Relaxed) == super::phase::MAPPED
            && let Some(r) = self.try_announce(fd, s, v, done, flags)
        {
            return Some(r);
        }
        if !gate::enter(&self.inside(s).tx, &s.tx.mode, tx_mode::TCP) {
            // The gate is short: its holder has the lock.
            drop(lock::lock(&s.tx.lock));
            return None;
        }
        let left = v.total - done;
        let pieces = block && left > PIECE && self.phase.load(Relaxed) != super::phase::OFF;
        let n = if done == 0 && !pieces {
            self.send_inside(s, kernel)
        } else {
            // The call has taken bytes: what goes wrong from here on is the next one's to hear.
            let flags = if done > 0 { flags | libc::MSG_NOSIGNAL } else { flags };
            let part = v.part(done, if pieces { PIECE } else { left });
            // SAFETY: part of the caller's iovecs.
            self.send_inside(s, &mut || unsafe { send_part(fd, &part, flags) })
        };
        if n > 0 {
            s.tx.tcp.fetch_add(n as u64, Relaxed);
            self.bytes.fetch_add(n as u64, Relaxed);
        }
        gate::leave(&self.inside(s).tx);
        Some(n)
    }

    /// Announces the switch with this message, if all is quiet. `None`: not now.
    #[cold]
    fn try_announce(&self, fd: i32, s: &Slot, v: &Iov<'_>, done: usize, flags: i32) -> Option<isize> {
        let m = self.mapped()?;
        if !switch::is_ready(m.peer)
            || s.barred.load(Relaxed) != 0
            || !self.alone(s)
            || s.wait.peer_gone.load(Relaxed) != 0
        {
            return None;
        }
        let g = lock::try_lock(&s.tx.lock)?;
        if s.tx.mode.load(Relaxed) != tx_mode::TCP {
            return None;
        }
        gate::shut(&s.tx.mode, tx_mode::GATE);
        let quiet = !gate::is_barred(&s.barred) && s.nobody_inside(|n| &n.tx);
        let agree = if quiet { self.tx_counts_agree(fd, s) } else { None };
        if agree != Some(true) {
            if agree == Some(false) {
                self.bar(Reason::CountMismatch);
            }
            s.tx.mode.store(tx_mode::TCP, Release);
            return None;
        }
        let sent = s.tx.tcp.load(Relaxed);
        let k = (v.total - done).min(LAST_BY_TCP);
        let at = sent + k as u64;
        s.tx.switch_at.store(at, Relaxed);
        switch::announce(m.me, at);
        // SAFETY: part of the caller's iovecs.
        let n = unsafe { sys::send_iov(fd, &v.part(done, k), last_flags(flags)) };
        if n > 0 {
            s.tx.tcp.store(sent + n as u64, Relaxed);
        } else {
            self.keep_error(s, n);
        }
        let all = n == k as isize;
        if all {
            push(fd);
        }
        s.tx.mode.store(if all { tx_mode::RING } else { tx_mode::ANNOUNCED }, Release);
        self.set_changed();
        if all {
            self.count_upgrade(s);
        }
        drop(g);
        if n > 0 { Some(n) } else { None }
    }

    /// The stream goes back to TCP. (Between hosts that is the end of the connection, or of a handshake.)
    pub(super) fn count_downgrade(&self, s: &Slot) {
        if !s.is_remote() {
            s.downgrades.fetch_add(1, Relaxed);
            crate::report::probe_downgraded(s);
        }
    }

    pub(super) fn count_upgrade(&self, s: &Slot) {
        if s.best.swap(1, Relaxed) == 0 {
            s.upgrades.fetch_add(1, Relaxed);
            crate::report::probe_upgraded(s);
        }
    }

    /// ANNOUNCED, FLUSH or GATE: bytes by TCP under the lock, without blocking.
    #[cold]
    fn send_between(&self, fd: i32, s: &Slot, v: &Iov<'_>, done: usize, flags: i32) -> isize {
        let _g = lock::lock(&s.tx.lock);
        match s.tx.mode.load(Relaxed) {
            tx_mode::ANNOUNCED => {
                let left = s.tx.switch_at.load(Relaxed).saturating_sub(s.tx.tcp.load(Relaxed));
                let k = (v.total - done).min(left as usize);
                // SAFETY: part of the caller's iovecs.
                let n = unsafe { sys::send_iov(fd, &v.part(done, k), last_flags(flags)) };
                if n > 0 {
                    s.tx.tcp.fetch_add(n as u64, Relaxed);
                    if n as u64 == left {
                        push(fd);
                        s.tx.mode.store(tx_mode::RING, Release);
                        self.count_upgrade(s);
                        self.set_changed();
                    }
                }
                n
            }
            tx_mode::FLUSH => match self.mapped() {
                Some(m) => self.flush(fd, s, &m),
                None => 0,
            },
            _ => 0,
        }
    }

    /// Copies into the ring what fits. With `whole`, a message that will fit once there is the space that a
    /// sleeping sender is woken for waits for it: readers see it in one piece, as they nearly always do on
    /// TCP with its larger buffers. (A reader that is content with a piece of the last message, and closes,
    /// would otherwise leave its writer with a broken pipe.)
    #[inline(always)]
    fn put(&self, s: &Slot, m: &Mapped<'_>, fd: i32, v: &Iov<'_>, done: usize, whole: bool) -> Put {
        let size = m.txbuf.size();
        let g = lock::lock(&s.tx.lock);
        if s.tx.mode.load(Relaxed) != tx_mode::RING {
            return Put::NotRing;
        }
        if doorbell::is_to_leave(m.peer) {
            // Nothing more into the ring: what the kernel says of these bytes is the answer.
            let ring = self.leave_ring(fd, s, m);
            self.count_downgrade(s);
            drop(g);
            if ring {
                self.ring_peer(s, m);
            }
            return Put::NotRing;
        }
        let prod = s.tx.prod.load(Relaxed);
        let want = (v.total - done) as u64;
        let most = bounds::most(&m.me.tx, &m.peer.rx, size);
        let mut free = most.saturating_sub(prod.wrapping_sub(s.tx.cons_seen.load(Relaxed)));
        if free < want {
            match ring::writable(&m.peer.rx, prod, size) {
                Ok((f, cons)) => {
                    free = most.saturating_sub(size - f);
                    s.tx.cons_seen.store(cons, Relaxed);
                }
                Err(_) => {
                    drop(g);
                    self.misbehaved(fd, s);
                    return Put::Reset;
                }
            }
        }
        let low = super::waiting::low_water(most);
        let n = if whole && want <= low && free < want { 0 } else { want.min(free) as usize };
        if n == 0 {
            // Whoever watches for space must hear that there is none, before the program asks epoll again.
            s.tx.blocked.store(1, Relaxed);
            if self.is_watched() {
                self.set_changed();
            }
            drop(g);
            return Put::Full;
        }
        let mut to = m.place(s, prod, n as u64);
        v.pieces(done, n, |p, k| {
            // SAFETY: the program's readable memory; n bytes are free.
            unsafe { m.txbuf.copy_in(to, p, k) };
            to += k as u64;
        });
        let at = prod + n as u64;
        // Own copy first: if this process is killed between the two, a forked sibling goes on after bytes
        // that are complete in the ring, and its next publication covers them.
        s.tx.prod.store(at, Relaxed);
        s.tx.msgs.store(s.tx.msgs.load(Relaxed) + 1, Relaxed);
        m.publish(at);
        let mut owed = self.produced(s, m);
        let mut taken = n;
        if owed.stop {
            owed.ring |= self.leave_ring(fd, s, m);
            self.count_downgrade(s);
            taken -= self.take_back(s, prod, at);
        }
        let check = looks_after(s);
        drop(g);
        if owed.ring && self.ring_peer(s, m) == EPIPE || check && self.is_idle(m) {
            self.ask_after(fd, s, m, prod);
        }
        if taken == 0 { Put::NotRing } else { Put::Bytes(taken) }
    }

    /// Under the tx lock, after the ring was left with a publication from `prod` to `at`: bytes of it that the
    /// peer will not take from the ring and TCP does not take either are not sent yet. How many.
    #[cold]
    fn take_back(&self, s: &Slot, prod: u64, at: u64) -> usize {
        let flushed = s.tx.flush.load(Relaxed);
        if s.tx.mode.load(Relaxed) != tx_mode::FLUSH || !(prod..=at).contains(&flushed) {
            // Earlier calls' bytes are among them.
            return 0;
        }
        s.tx.mode.store(tx_mode::DONE, Release);
        (at - flushed) as usize
    }

    #[inline(never)]
    fn put_out_of_line(
        &self,
        s: &Slot,
        m: &Mapped<'_>,
        fd: i32,
        v: &Iov<'_>,
        done: usize,
        whole: bool,
    ) -> Put {
        self.put(s, m, fd, v, done, whole)
    }

    #[cold]
    pub(super) fn ring_peer(&self, s: &Slot, m: &Mapped<'_>) -> isize {
        s.wait.doorbells.fetch_add(1, Relaxed);
        // EAGAIN: unread rings are there already. EPIPE: the peer let go; its end of file tells us. A ring that the kernel
        // has no memory for would be a wake-up that is lost: nobody else knows that it is due.
        let refused = |r: isize| matches!(i32::try_from(-r), Ok(libc::ENOBUFS | libc::ENOMEM | libc::EINTR));
        // Without another holder nobody goes on after a death.
        let is_free = |word| lock::try_lock(word).is_some();
        let taken = || s.holders.load(Relaxed) == 1 || is_free(&s.tx.lock) && is_free(&s.rx.lock);
        let r = s.wait.rings.pay(taken, || {
            loop {
                match sys::ring(m.bell) {
                    r if refused(r) => sys::yield_cpu(),
                    r => return r,
                }
            }
        });
        doorbell::has_rung(m.rang);
        r
    }

    /// Every so many messages: whether the peer has taken nothing since the last time. A program that only sends would
    /// not hear of its death before the ring is full.
    #[cold]
    pub(super) fn is_idle(&self, m: &Mapped<'_>) -> bool {
        let cons = m.peer.rx.cons.load(Relaxed);
        self.cons_then.swap(cons, Relaxed) == cons
    }

    /// After bytes were put into the ring, at `at`, the peer may be gone.
    #[cold]
    pub(super) fn ask_after(&self, fd: i32, s: &Slot, m: &Mapped<'_>, at: u64) {
        if fate::bell_ends(m) && s.rx.deaf.load(Relaxed) == 0 {
            self.sent_to_nobody(fd, s, m, at);
            self.peer_gone(fd, s, m);
        }
    }

    /// Under the tx lock, in RING: the stream leaves the ring. If the peer has said where it stops taking from
    /// it, the rest goes by TCP; if not, it takes all. True: ring the peer, once the lock is free.
    #[cold]
    #[must_use]
    pub(super) fn leave_ring(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> bool {
        let prod = s.tx.prod.load(Relaxed);
        self.set_changed();
        let left = switch::leave(m.me, m.peer, prod);
        // Threads of the peer that sleep until the ring has bytes go to TCP now. The ring is noted before the mode says that
        // all is done: a holder that is killed up to there has left the mark, with which the next call of another does
        // this again (`doorbell::is_to_leave`), and one that is killed after that owes the ring (`pay_rings`).
        let ring = self.produced(s, m).ring;
        if left {
            self.leaves_tail(s, m);
            s.tx.mode.store(tx_mode::DONE, Release);
            return ring;
        }
        // Not left, so stopped: of the two one is set.
        s.tx.flush.store(switch::stop_at(m.peer, prod, m.txbuf.size()).unwrap_or(prod), Relaxed);
        s.tx.mode.store(tx_mode::FLUSH, Release);
        let _ = self.flush(fd, s, m);
        ring
    }

    /// The stream has left the ring: rings the peer if a holder that was killed had yet to, before anything goes by TCP,
    /// where a peer that sleeps for the ring would not see it.
    #[inline]
    pub(super) fn pay_rings(&self, s: &Slot) {
        if s.wait.rings.is_owed()
            && let Some(m) = self.mapped()
        {
            self.ring_peer(s, &m);
        }
    }

    /// Under the tx lock, after a publication: what is owed, also by a holder that was killed before it rang.
    #[inline(always)]
    pub(super) fn produced(&self, s: &Slot, m: &Mapped<'_>) -> doorbell::Owed {
        doorbell::after_publish_for(m.peer, ctl::RX_ARMED, true, &s.wait.rings)
    }

    /// Under the tx lock, in FLUSH: ring bytes beyond the stop go by TCP. EAGAIN: some are left.
    #[cold]
    pub(super) fn flush(&self, fd: i32, s: &Slot, m: &Mapped<'_>) -> isize {
        let prod = s.tx.prod.load(Relaxed);
        loop {
            let at = s.tx.flush.load(Relaxed);
            let left = prod.wrapping_sub(at);
            if left == 0 || left > m.txbuf.size() {
                s.tx.mode.store(tx_mode::DONE, Release);
                self.set_changed();
                self.shut_now(fd, s);
                return 0;
            }
            let mut state = [libc::pollfd { fd, events: libc::POLLOUT, revents: 0 }];
            let _ = sys::poll(&mut state, Some(0));
            if state[0].revents & (libc::POLLERR | libc::POLLHUP) != 0 {
                // The connection is gone. The error stays in the kernel for the program's next call.
                s.tx.mode.store(tx_mode::DONE, Release);
                self.set_changed();
                return 0;
            }
            let (p, n) = m.txbuf.span(ring::at(&m.me.tx, at), left as usize);
            let iov = [libc::iovec { iov_base: p.cast(), iov_len: n }];
            // SAFETY: a part of our ring, mapped while the connection is.
            let r = unsafe { sys::send_iov(fd, &iov, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
            if r < 0 {
                if r != EAGAIN && r != -(libc::EINTR as isize) {
                    // The connection is gone since the look above, and what the kernel had to say of it is said.
                    self.keep_error(s, r);
                    s.tx.mode.store(tx_mode::DONE, Release);
                    self.set_changed();
                    return 0;
                }
                return EAGAIN;
            }
            s.tx.flush.store(at + r as u64, Relaxed);
        }
    }

    /// The sending direction goes back to TCP now. What is in the ring is read from there first.
    #[cold]
    pub fn leave_tx(&self, fd: i32, why: Reason) {
        let Some(s) = self.slot() else { return };
        if s.is_served() {
            return self.cannot_leave(fd, s, why);
        }
        if matches!(s.tx.mode.load(Acquire), tx_mode::TCP | tx_mode::GATE) {
            self.bar(why);
            // [gate]: another thread may be about to switch, which is undone here then.
            if s.tx.mode.load(Acquire) == tx_mode::TCP {
                return;
            }
        }
        let Some(m) = self.mapped() else { return };
        let g = lock::lock(&s.tx.lock);
        let mut ring = false;
        match s.tx.mode.load(Relaxed) {
            tx_mode::RING => {
                ring = self.leave_ring(fd, s, &m);
                self.count_downgrade(s);
                s.reason.store(why.code(), Relaxed);
            }
            tx_mode::ANNOUNCED => {
                // The offset may never be reached; if the program goes on by TCP it will be, and then the
                // stream leaves the ring before its first byte, whether by this or by a stop at 0.
                let _ = switch::leave(m.me, m.peer, 0);
                s.tx.mode.store(tx_mode::DONE, Release);
                s.reason.store(why.code(), Relaxed);
            }
            _ => {}
        }
        self.set_changed();
        drop(g);
        if ring {
            self.ring_peer(s, &m);
        }
    }

    /// Bytes that TCP_OUTQ would show: not yet taken by the peer.
    pub fn unsent(&self) -> Option<u64> {
        let s = self.slot()?;
        let m = self.mapped()?;
        if !matches!(s.tx.mode.load(Acquire), tx_mode::RING | tx_mode::FLUSH) {
            return None;
        }
        let prod = s.tx.prod.load(Relaxed);
        ring::writable(&m.peer.rx, prod, m.txbuf.size()).ok().map(|(free, _)| m.txbuf.size() - free)
    }

    /// The peer published something impossible: this connection ends, nothing else does.
    #[cold]
    pub(super) fn misbehaved(&self, fd: i32, s: &Slot) {
        s.reason.store(Reason::PeerMisbehaved.code(), Relaxed);
        s.barred.fetch_or(1, Relaxed);
        s.wait.peer_gone.store(crate::arena::gone::MISBEHAVED, Release);
        s.tx.mode.store(tx_mode::DONE, Release);
        s.rx.mode.store(crate::arena::rx_mode::DONE, Release);
        s.reset.store(crate::arena::reset::TOLD, Relaxed);
        self.set_changed();
        sys::disconnect(fd);
        crate::report::log_fallback(s, Reason::PeerMisbehaved);
    }
}

/// Under the tx lock, after a message: whether the peer is to be looked after.
#[inline(always)]
pub(super) fn looks_after(s: &Slot) -> bool {
    s.tx.msgs.load(Relaxed).is_multiple_of(CHECK)
}

/// Flags for the last bytes by TCP: they wait for nothing that comes after, because it comes by the ring.
fn last_flags(flags: i32) -> i32 {
    (flags | libc::MSG_DONTWAIT) & !libc::MSG_MORE
}

/// All that TCP holds back (MSG_MORE before, TCP_CORK, Nagle) is sent: no later byte would push it along.
/// Setting TCP_NODELAY does that, even to a corked socket (tcp(7)).
fn push(fd: i32) {
    let mut was = [0u8; 4];
    let _ = sys::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &mut was);
    let _ = sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32.to_ne_bytes());
    if was == [0; 4] {
        let _ = sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &was);
    }
}

/// Whether a send would not fail at once: an error stays in the kernel for the program's next call.
#[cold]
fn may_send(fd: i32) -> bool {
    let mut p = [libc::pollfd { fd, events: libc::POLLOUT, revents: 0 }];
    sys::poll(&mut p, Some(0)) >= 0 && p[0].revents & (libc::POLLERR | libc::POLLHUP) == 0
}
