//! What the death of the peer looks like, and which errors are told from here.
//!
//! TCP resets a connection when an end closes, or dies, with bytes unread. Those may lie in the ring, of which the
//! peer's kernel knows nothing. A peer that closes asks for the reset itself (`close.rs`). A killed one can't, and its
//! kernel sends FIN: then ECONNRESET is told from here, when TCP would tell it, once, and to whoever asks first.
//!
//! Of a death three things are seen, in any order and by any thread: the FIN or RST, the end of file on the
//! doorbell, and that no file leads to the peer's TCP socket any more (sock_diag). What they mean:
//!
//! - The moment is TCP's. Nothing is told before FIN or RST is here: a process that ends closes its descriptors in turn,
//!   and another may hold the socket for long.
//! - An RST is the kernel's to tell.
//! - A FIN is a reset if bytes of ours are unread, the peer has not said where it stops reading (who closes in
//!   order says so first, and all who shut down the other direction only go on reading), and nobody is left to
//!   read them: the doorbell is at its end, or no file leads to the socket. Otherwise it is the end of the stream.
//!
//! When both ends have sent FIN no file leads to the peer's socket though it lives and reads on: the kernel has done with
//! it (TIME_WAIT, CLOSE). Nor does an RST follow any more, whatever is unread. So who shuts his direction says so first
//! (PEER_SHUT), and a FIN that was announced is the end of the stream, and nothing else, for one who has shut his.
//!
//! The slot's word `reset`:
//!
//! | word | meaning | becomes |
//! | --- | --- | --- |
//! | 0 | nothing of that kind: in state CLOSE the kernel has had an RST | DOOMED, at the end of the doorbell with bytes unread; HALF; SHUT; an errno |
//! | HALF | the FIN is here and the peer lives: only the doorbell can tell of its death now. An RST after a FIN is EPIPE (tcp_reset) | EPIPE, at the end of the doorbell with bytes unread |
//! | TAIL | our stream has left the ring with bytes unread, so nobody listens to the doorbell: each send looks for the FIN | as 0; 0, when all is read |
//! | SHUT | our direction is shut by the program, so a FIN ends in state CLOSE as well | as 0; TOLD, by the RST, or by the FIN of a peer that has shut its direction too |
//! | DOOMED | FIN or RST will come. Our direction is shut, so that a FIN hangs up, which wakes every sleeper as RST does; senders find no room | ECONNRESET, by the FIN; TOLD, by the RST |
//! | an errno | poll shows what it shows of a reset socket | TOLD, by the call that tells it: EPIPE by none that reads |
//! | TOLD | all is the kernel's again | |
//!
//! An error that a call of ours has taken out of the kernel, which tells each but once, gets here in the same way.

use super::waiting::Woke;
use super::{Mapped, Socket};
use crate::arena::{Slot, reset, tx_mode};
use crate::handshake::unix;
use crate::lock;
use crate::ring;
use crate::sync::Ordering::*;
use crate::sys;
use crate::wait::doorbell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const EAGAIN: isize = -(libc::EAGAIN as isize);
const EPIPE: u32 = libc::EPIPE as u32;

/// Whether there are bytes in our ring that the peer has not read and has not said it will not.
pub(super) fn left_unread(s: &Slot, m: &Mapped<'_>) -> bool {
    doorbell::stopped(m.peer).is_none()
        && ring::writable(&m.peer.rx, s.tx.prod.load(Relaxed), m.txbuf.size())
            .is_ok_and(|(free, _)| free < m.txbuf.size())
}

/// Whether the doorbell is at its end; rings may lie before it.
#[cold]
pub(super) fn bell_ends(m: &Mapped<'_>) -> bool {
    let mut p = [libc::pollfd { fd: m.bell, events: libc::POLLRDHUP, revents: 0 }];
    sys::poll(&mut p, Some(0)) > 0 && p[0].revents & (libc::POLLRDHUP | libc::POLLHUP) != 0
}

/// Minus the errno that any call is to tell, if there is one; it is told by this.
#[inline]
pub(super) fn owed(s: &Slot) -> Option<isize> {
    // Relaxed, here and below: the word says all there is to say; of several that find an errno one tells.
    if s.reset.load(Relaxed) == 0 { None } else { take_owed(s) }
}

/// As [`owed`], for a read of TCP by `fd`: what has come is read before the error, as after an RST.
#[inline]
pub(super) fn owed_to_reader(s: &Slot, fd: i32) -> Option<isize> {
    if s.reset.load(Relaxed) == 0 || has_bytes(s, fd) { None } else { take_owed(s) }
}

#[cold]
fn has_bytes(s: &Slot, fd: i32) -> bool {
    // Not FIONREAD, which stops at urgent data.
    reset::is_errno(s.reset.load(Relaxed))
        && sys::recv_small(fd, &mut [0; 1], libc::MSG_PEEK | libc::MSG_DONTWAIT) > 0
}

#[cold]
fn take_owed(s: &Slot) -> Option<isize> {
    let e = s.reset.load(Relaxed);
    let is_ours = reset::is_errno(e)
        && e != EPIPE
        && s.reset.compare_exchange(e, reset::TOLD, Relaxed, Relaxed).is_ok();
    is_ours.then_some(-(e as isize))
}

impl Socket {
    /// Whether an error is to be told.
    #[inline]
    pub fn owes_reset(&self) -> bool {
        self.slot().is_some_and(|s| reset::is_errno(s.reset.load(Relaxed)))
    }

    /// Whether the kernel's FIN may be a reset: such a connection's state is not the kernel's alone to tell.
    #[inline]
    pub fn may_be_reset(&self) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        if s.is_remote() {
            // What a peer on another host has not read its service tells of.
            return reset::is_errno(s.reset.load(Relaxed));
        }
        match s.reset.load(Relaxed) {
            reset::TOLD => false,
            0 | reset::TAIL | reset::SHUT => left_unread(s, &m),
            reset::HALF => false,
            _ => true,
        }
    }

    /// The peer's doorbell has ended with bytes of ours unread.
    pub(super) fn doom(&self, fd: i32, s: &Slot) {
        // Before the kernel is told, which then says there is room: see `look_at`.
        let closed = sys::tcp_is_closed(fd);
        let both_shut = closed && self.mapped().is_some_and(|m| doorbell::was_shut(m.me));
        let doom = |w: u32| match w {
            0 | reset::TAIL | reset::HALF if closed => Some(reset::TOLD),
            reset::SHUT if both_shut => Some(reset::TOLD),
            0 | reset::TAIL | reset::SHUT => Some(reset::DOOMED),
            reset::HALF => Some(EPIPE),
            _ => None,
        };
        if s.reset.fetch_update(Relaxed, Relaxed, doom).is_ok() {
            sys::shutdown(fd, libc::SHUT_WR);
        }
    }

    /// The doorbell being at its end, bytes were put into the ring at `at`: if the peer had read all before them and its
    /// FIN is here, TCP would answer these with an RST behind a FIN.
    pub(super) fn sent_to_nobody(&self, fd: i32, s: &Slot, m: &Mapped<'_>, at: u64) {
        if m.peer.rx.cons.load(Relaxed) == at && sys::tcp_has_ended(fd) {
            halve(s);
        }
    }

    /// Our stream leaves the ring.
    pub(super) fn leaves_tail(&self, s: &Slot, m: &Mapped<'_>) {
        if left_unread(s, m) {
            let _ = s.reset.compare_exchange(0, reset::TAIL, Relaxed, Relaxed);
        }
    }

    /// The program shuts its direction.
    pub(super) fn shut(&self) {
        if let Some(s) = self.slot()
            && self.is_mapped()
        {
            let shut = |w: u32| is_open(w).then_some(reset::SHUT);
            let _ = s.reset.fetch_update(Relaxed, Relaxed, shut);
        }
    }

    /// The kernel may have said that the stream ends: whether an error is to be told from here.
    #[inline]
    pub fn judge(&self, fd: i32) -> bool {
        self.may_be_reset() && self.judge_end(fd)
    }

    #[cold]
    fn judge_end(&self, fd: i32) -> bool {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return false };
        let was = s.reset.load(Relaxed);
        if reset::is_errno(was) {
            return true;
        }
        if !sys::tcp_has_ended(fd)
            || is_open(was) && sys::tcp_is_closed(fd)
            || lock::held_by_me(&s.tx.lock)
            || lock::held_by_me(&s.rx.lock)
        {
            return false;
        }
        let mut p = [libc::pollfd { fd, events: 0, revents: 0 }];
        let _ = sys::poll(&mut p, Some(0));
        let both_shut = was == reset::SHUT && doorbell::was_shut(m.me);
        if p[0].revents & libc::POLLERR != 0 || both_shut || !left_unread(s, &m) {
            // The kernel's to tell. (Without a doorbell a peer that lives may have read all after all.)
            self.leave_to_kernel(s);
            return false;
        }
        if was != reset::DOOMED && !self.is_deserted(s, &m) {
            halve(s);
            return false;
        }
        self.peer_gone(fd, s, &m);
        self.doom(fd, s);
        let reset = libc::ECONNRESET as u32;
        if s.reset.compare_exchange(reset::DOOMED, reset, Relaxed, Relaxed).is_ok() {
            self.set_changed();
        }
        self.owes_reset()
    }

    /// Whether nobody is left who could read what is in our ring, the FIN being here.
    fn is_deserted(&self, s: &Slot, m: &Mapped<'_>) -> bool {
        s.rx.deaf.load(Relaxed) == 0 && bell_ends(m) || !peer_is_held(s)
    }

    /// The kernel tells an error, or has told one: after an RST nothing more goes into the ring.
    #[cold]
    pub fn kernel_tells(&self, fd: i32) {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return };
        if sys::tcp_is_closed(fd) && !lock::held_by_me(&s.tx.lock) && !lock::held_by_me(&s.rx.lock) {
            self.leave_to_kernel(s);
            self.peer_gone(fd, s, &m);
        }
    }

    /// The connection's end is as the kernel tells it.
    fn leave_to_kernel(&self, s: &Slot) {
        let leave = |w: u32| (w == reset::DOOMED || w == reset::SHUT).then_some(reset::TOLD);
        if s.reset.fetch_update(Relaxed, Relaxed, leave).is_ok() {
            self.set_changed();
        }
    }

    /// A call of ours, of which the program does not hear, has ended with `r`: an error of the socket is the
    /// program's, and the kernel does not tell it again.
    #[cold]
    pub(super) fn keep_error(&self, s: &Slot, r: isize) {
        let e = i32::try_from(-r).unwrap_or(0);
        if !matches!(
            e,
            libc::ECONNRESET | libc::ECONNABORTED | libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH
        ) {
            return;
        }
        let keep = |w: u32| {
            matches!(w, 0 | reset::TAIL | reset::HALF | reset::SHUT | reset::DOOMED).then_some(e as u32)
        };
        if s.reset.fetch_update(Relaxed, Relaxed, keep).is_ok() {
            self.set_changed();
        }
    }

    /// What a read of TCP into `iov` has to say, where the kernel said `n`.
    #[inline]
    pub(super) fn hear(&self, fd: i32, s: &Slot, n: isize, iov: &[libc::iovec]) -> isize {
        if n > 0 || n == EAGAIN { n } else { self.hear_end(fd, s, n, iov) }
    }

    #[cold]
    fn hear_end(&self, fd: i32, s: &Slot, n: isize, iov: &[libc::iovec]) -> isize {
        if n != 0 {
            self.kernel_tells(fd);
            return n;
        }
        if iov.iter().all(|v| v.iov_len == 0) {
            return 0;
        }
        if self.judge(fd) {
            return owed(s).unwrap_or(0);
        }
        if is_open(s.reset.load(Relaxed))
            && let Some(m) = self.mapped()
            && s.tx.mode.load(Relaxed) == tx_mode::RING
            && !s.is_remote()
            && sys::tcp_has_ended(fd)
            && !self.is_deserted(s, &m)
        {
            // The end of a stream whose other direction goes on.
            halve(s);
        }
        0
    }

    /// SO_ERROR, where the kernel said `n`.
    pub fn so_error(&self, fd: i32, n: i32) -> i32 {
        let Some(s) = self.slot() else { return n };
        if n != 0 {
            self.kernel_tells(fd);
        } else if self.judge(fd) {
            return owed(s).map_or_else(|| if tell_pipe(s) { libc::EPIPE } else { 0 }, |e| -e as i32);
        }
        n
    }

    /// Before a send by TCP of a connection whose word is not 0: what the send says, or that the kernel is to be
    /// asked. A doomed connection has no room until its FIN is here.
    #[cold]
    pub(super) fn send_fated(&self, fd: i32, s: &Slot, nonblock: bool, partial: bool) -> Option<isize> {
        loop {
            if !self.judge(fd) && !self.may_be_reset() {
                let _ = s.reset.compare_exchange(reset::TAIL, 0, Relaxed, Relaxed);
            }
            if let Some(e) = owed(s) {
                return Some(e);
            }
            if s.reset.load(Relaxed) != reset::DOOMED {
                // EPIPE is what it says, with the signal.
                let _ = tell_pipe(s);
                return None;
            }
            if nonblock {
                return Some(EAGAIN);
            }
            // Errors and hang-ups only.
            if let Woke::Err(e) = self.wait_kernel(fd, s, 0, partial) {
                return Some(e);
            }
        }
    }
}

/// Whether neither end is known to have ended.
fn is_open(word: u32) -> bool {
    word == 0 || word == reset::TAIL
}

/// The peer's FIN is here and says nothing of its death.
fn halve(s: &Slot) {
    let half = |w: u32| is_open(w).then_some(reset::HALF);
    let _ = s.reset.fetch_update(Relaxed, Relaxed, half);
}

/// Tells EPIPE, if that is owed.
fn tell_pipe(s: &Slot) -> bool {
    s.reset.compare_exchange(EPIPE, reset::TOLD, Relaxed, Relaxed).is_ok()
}

/// Whether a file leads to the peer's TCP socket; true where the kernel does not say.
#[cold]
fn peer_is_held(s: &Slot) -> bool {
    let address = |a: &[crate::sync::AtomicU32; 4], port: u32| {
        let mut raw = [0u8; 16];
        for (to, w) in raw.chunks_exact_mut(4).zip(a) {
            to.copy_from_slice(&w.load(Relaxed).to_ne_bytes());
        }
        let ip = match (s.family.load(Relaxed), raw.first_chunk()) {
            (4, Some(v4)) => IpAddr::V4(Ipv4Addr::from(*v4 as [u8; 4])),
            _ => IpAddr::V6(Ipv6Addr::from(raw)).to_canonical(),
        };
        SocketAddr::new(ip, port as u16)
    };
    let local = address(&s.local_addr, s.local_port.load(Relaxed));
    let peer = address(&s.peer_addr, s.peer_port.load(Relaxed));
    // Our own end is asked for as well: if even that is not known, this is not its network namespace any more.
    unix::tcp_is_held(peer, local) != Ok(false) || !matches!(unix::tcp_owner(local, peer), Ok(Some(_)))
}
