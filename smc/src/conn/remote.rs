//! A connection to another host: the service (`crate::remote`) plays the peer's side of the page.
//!
//! The connection enters the ring at the program's first call that could move or wait for bytes, before any of them, and
//! in the process that makes that call. From then on all is as on one host: the peer is another thread. Whether it can
//! keep the bytes off TCP the service finds out meanwhile, by the CLC handshake on the TCP stream; if not it asks the
//! stream back to TCP, as any peer may, and what was written goes there, in order.
//!
//! ```text
//! remote   NO ── first call, peer known ──> SERVED ── service lets go: TCP ──> WAS
//! ```
//!
//! A peer is known by `SMC_PEERS`, or by the TCP option (`crate::option`). The option is a *promise* of both ends': the
//! peer speaks CLC at the start of the stream, whatever becomes of this end. So what comes in between is answered as the
//! protocol has it, by a Decline, and before any byte of the program's (`Socket::refuse`).
//!
//! What differs while SERVED, for TCP's stream is the handshake's and not the program's:
//!
//! - What the kernel says of TCP's reading end counts only when the stream has left the ring.
//! - The service has a descriptor of the socket: FIN and RST follow the last byte by RDMA. A shutdown of the sending
//!   direction is said to the kernel by the service, and a close is the service's.
//! - There is no way back for an option or a descriptor that is passed on: see `Socket::cannot_leave`.
#![allow(unsafe_code)]

use super::patience::Patience;
use super::{Mapped, Socket, phase};
use crate::arena::{Slot, remote, reset, rx_mode, tx_mode};
use crate::config::config;
use crate::fd::Fd;
use crate::gate;
use crate::handshake::Side;
use crate::handshake::local::{self, Established};
use crate::lgr::{self, Asked, ConnBuffers};
use crate::lock;
use crate::mem::rmb::{Buffers, Grant, Refused, ring_size};
use crate::once::Once;
use crate::option;
use crate::reason::Reason;
use crate::remote::{Conn, says};
use crate::section;
use crate::sync::{AtomicU32, Ordering::*};
use crate::sys;
use crate::wire::smcr::clc::{self, Decline, Decoded, Message};
use crate::wire::smcr::{Diagnosis, PeerId};

/// Values of [`Socket::wanted`]; 0: nothing is.
const WANTED: u32 = 1;
/// This end can't, and the listed peer does not know: what its stream begins with may be a CLC message.
const SIFTED: u32 = 2;
/// Why a connection does not enter the ring for a peer on another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum No {
    /// Its peer is not known to speak SMC.
    Concern,
    /// It might, but for this.
    Because(Reason),
    /// Its peer was promised SMC, and was told that there is none, for this.
    Refused(Reason),
    /// It has accepted a connection of a listed peer, which may have asked or may yet, and can't for this.
    Unasked(Reason),
}

impl From<Reason> for No {
    fn from(why: Reason) -> Self {
        Self::Because(why)
    }
}

/// How long the peer's first message may take, in nanoseconds: as in the kernel.
const CLC_WAIT: u64 = 6_000_000_000;
/// Bytes that begin like a CLC message and do not go on are the program's after so long.
const START_WAIT: u64 = 2_000_000_000;
/// How long the process that a server forked waits for its parent to close the connection. Between the two calls of the
/// parent is nothing but what else runs on its CPU.
const ALONE_WAIT: u64 = 1_000_000_000;
/// How long it sleeps at a time: a parent that is killed wakes nobody.
const ALONE_ROUND: u64 = 20_000_000;
/// The longest CLC message has fewer bytes.
const MOST_CLC: usize = 2048;

/// Looks for memory that another thread is about to make.
const MOST_TURNS: u32 = 10_000;

/// Hands a connection to the service, or says why not.
pub type Serve = fn(&Conn) -> Result<(), Reason>;

static SERVE: Once<Serve> = Once::new();

/// Names the function that hands a connection to the service. The first call counts.
pub fn serve_with(f: Serve) {
    let _ = SERVE.set(f);
}

/// 1: this process has, or has been forked with, a connection that the service has had. A process without one does not
/// look at the slots' words.
static ANY: AtomicU32 = AtomicU32::new(0);

/// What the service keeps of a connection: its memory, and which side of the page it plays.
struct Held {
    buffers: Buffers,
    side: Side,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.buffers.detach(self.side as usize);
    }
}

/// The service is done with what it was given as `hold`.
///
/// # Safety
/// `hold` is [`Conn::hold`] of a connection that was taken over, and this is said once.
pub unsafe fn release(hold: usize) {
    // SAFETY: made by `hand_to_service` from a Box, and given back once, as the caller vouches.
    drop(unsafe { Box::from_raw(hold as *mut Held) });
}

impl Slot {
    /// Whether the service plays the peer's side.
    #[inline]
    pub(super) fn is_served(&self) -> bool {
        ANY.load(Relaxed) != 0 && self.remote.load(Relaxed) == remote::SERVED
    }

    /// Whether the service plays the peer's side, or did.
    #[inline]
    pub(super) fn is_remote(&self) -> bool {
        ANY.load(Relaxed) != 0 && self.remote.load(Relaxed) != remote::NO
    }
}

impl Socket {
    /// A new connection: its peer may be on another host.
    pub(super) fn expect_peer(&self) {
        self.wanted.store((option::is_in_use() || !config().peers.is_empty()).into(), Relaxed);
    }

    /// Before a call that moves bytes or waits for them: if the peer is known to speak SMC, the connection enters the
    /// ring.
    #[inline]
    pub fn meet(&self, fd: i32) {
        if self.wanted.load(Relaxed) != 0 {
            self.meet_peer(fd);
        }
    }

    #[cold]
    fn meet_peer(&self, fd: i32) {
        let Some(s) = self.slot() else { return };
        // Whoever comes second waits: no byte goes by TCP while it is not known whether any may.
        let _h = lock::lock(&self.handshake_lock);
        match self.wanted.load(Relaxed) {
            WANTED => {}
            SIFTED => {
                self.sift(fd, s);
                return;
            }
            _ => return,
        }
        if self.phase.load(Relaxed) != phase::COUNTING {
            return self.decline(fd, s, Reason::SocketOption);
        }
        let begun = self.begin(fd, s);
        match begun {
            // There is no peer yet, or another process holds the socket as well.
            Err(No::Because(Reason::TooShort | Reason::ForkShared)) => {}
            Ok(()) | Err(No::Concern) => self.wanted.store(0, Relaxed),
            Err(No::Because(why) | No::Refused(why) | No::Unasked(why)) => {
                let wanted = if matches!(begun, Err(No::Unasked(_))) { SIFTED } else { 0 };
                self.wanted.store(wanted, Relaxed);
                s.reason.store(why.code(), Relaxed);
                crate::report::log_fallback(s, why);
            }
        }
    }

    /// Before the program does what the ring can't carry: if the peer was promised SMC, it is told that there is none; what
    /// a listed one has sent is taken out of the stream. An exec leaves that to another process that holds the connection, if
    /// there is one.
    pub fn keep_word(&self, fd: i32, why: Reason) {
        let is_wanted = || match self.wanted.load(Relaxed) {
            SIFTED => is_out_of_sight(why),
            wanted => wanted == WANTED,
        };
        let Some(s) = self.slot().filter(|_| is_wanted()) else { return };
        let _h = lock::lock(&self.handshake_lock);
        let others = why == Reason::Exec && s.holders.load(Acquire) != 1 && !self.bury_dead(s);
        if is_wanted() && !others {
            self.decline(fd, s, why);
        }
    }

    /// Under the handshake's lock. Nobody asks again.
    #[cold]
    fn decline(&self, fd: i32, s: &Slot, why: Reason) {
        self.wanted.store(0, Relaxed);
        if option::is_in_use() && option::take(fd) {
            return self.refuse(fd, s, why);
        }
        let may_ask = |ends: [(u128, u16); 2]| {
            is_listed(fd, ends[1].0) && config().allows(crate::report::program(), &ends)
        };
        if config().peers.is_empty()
            || s.role.load(Relaxed) == 0
            || !ends(fd).is_some_and(may_ask)
            || !self.untouched(fd, s)
        {
            return;
        }
        self.unasked(s);
        if is_out_of_sight(why) {
            // Of a peer that says nothing in that time it is not known whether it will, and who reads then has its message.
            let _ = turn_down(fd, true, why);
        } else {
            s.reason.store(why.code(), Relaxed);
            self.wanted.store(SIFTED, Relaxed);
        }
    }

    /// What is taken out of the start of the stream from now on is in the kernel's counts and not in ours.
    fn unasked(&self, s: &Slot) {
        s.barred.fetch_or(1, Relaxed);
        self.phase.store(phase::OFF, Relaxed);
    }

    /// Under the handshake's lock.
    fn begin(&self, fd: i32, s: &Slot) -> Result<(), No> {
        let ends = ends(fd).ok_or(No::Because(Reason::TooShort))?;
        // Also of a peer on this host: who was promised SMC may be the kernel's.
        let promised = option::is_in_use() && option::ask(fd);
        if !promised && !is_listed(fd, ends[1].0) {
            return Err(No::Concern);
        }
        let mut entered = self.enter(fd, s, &ends, promised);
        if entered == Err(Reason::ForkShared) && self.is_alone_soon(s) {
            entered = self.enter(fd, s, &ends, promised);
        }
        match entered {
            Err(why) if promised => {
                self.refuse(fd, s, why);
                Err(No::Refused(why))
            }
            // Not asked for, or not yet.
            Err(why @ (Reason::Excluded | Reason::TooShort)) => Err(No::Because(why)),
            Err(why) if s.role.load(Relaxed) != 0 && self.untouched(fd, s) => {
                self.unasked(s);
                Err(No::Unasked(why))
            }
            entered => Ok(entered?),
        }
    }

    /// Another process holds the socket as well: sleeps until it does not, as it is between a server's fork and its
    /// close of the connection that the child serves. False: it has kept it, or this process has no time.
    #[cold]
    fn is_alone_soon(&self, s: &Slot) -> bool {
        let mut patience = Patience::new(ALONE_WAIT);
        loop {
            // ORDERING [holders] Acquire; pairs with the AcqRel of who was counted off. One that goes after this has
            // changed the word by the time the kernel compares it, or wakes us (`let_go`).
            let n = s.holders.load(Acquire);
            if n == 1 || self.bury_dead(s) {
                return true;
            }
            if !patience.sleep(ALONE_ROUND, |ns| _ = sys::futex_wait(&s.holders, n, Some(ns))) {
                return false;
            }
        }
    }

    /// This process has let go, and one is left: it may wait for that.
    pub(super) fn wake_last(&self, s: &Slot) {
        if self.wanted.load(Relaxed) != 0 {
            sys::futex_wake(&s.holders, i32::MAX as u32);
        }
    }

    /// A read by TCP begins, of a stream that may begin with a CLC message. Waits as the read would; what the read is to
    /// return, if there is nothing for it.
    #[inline]
    pub(super) fn await_start(&self, fd: i32, s: &Slot, flags: i32, bytes: usize) -> Option<isize> {
        if self.wanted.load(Relaxed) != SIFTED || bytes == 0 { None } else { self.sift_first(fd, s, flags) }
    }

    #[cold]
    fn sift_first(&self, asked: i32, s: &Slot, flags: i32) -> Option<isize> {
        let mut patience = Patience::new(START_WAIT);
        let flags = libc::MSG_PEEK | flags & libc::MSG_DONTWAIT;
        loop {
            let fd = self.fd_now(asked);
            // All that may be said of a read without bytes is said of this one: it waits like that, and ends like that.
            let n = section::window(self, &mut || (), &mut |_| sys::recv_small(fd, &mut [0], flags));
            if n <= 0 {
                return if n < 0 { Some(n) } else { None };
            }
            let _h = lock::lock(&self.handshake_lock);
            if self.wanted.load(Relaxed) != SIFTED {
                return None;
            }
            // The rest of what has begun may come, or be none. poll(2) would say at once that something is there.
            if self.sift(self.fd_now(asked), s) == Sifted::Part && !patience.nap() {
                self.wanted.store(0, Relaxed);
            }
        }
    }

    /// Under the handshake's lock: takes CLC messages out of the start of the stream. A Proposal is declined, unless
    /// the program's bytes went first: those say as much to a peer that waits for an Accept.
    fn sift(&self, fd: i32, s: &Slot) -> Sifted {
        let mut bytes = [0; MOST_CLC];
        loop {
            // A process that shares the socket has read what is the program's.
            if s.rx.tcp.load(Relaxed) != 0 {
                self.wanted.store(0, Relaxed);
                return Sifted::Known;
            }
            match clc::decode(peek(fd, &mut bytes)) {
                Ok(Decoded::Message(m, n)) => {
                    sys::recv_small(fd, &mut vec![0; n], NOW);
                    if matches!(m, Message::Decline(_)) {
                        self.wanted.store(0, Relaxed);
                        return Sifted::Known;
                    }
                    if s.tx.tcp.load(Relaxed) == 0 {
                        let why = Reason::try_from(s.reason.load(Relaxed)).unwrap_or(Reason::HandshakeFailed);
                        let _ = tell(fd, why);
                    }
                    // Who has given up meanwhile has said so behind it.
                }
                Ok(Decoded::NeedTotal(_)) => return Sifted::Part,
                Err(_) => {
                    self.wanted.store(0, Relaxed);
                    return Sifted::Known;
                }
            }
        }
    }

    /// Into the ring.
    fn enter(&self, fd: i32, s: &Slot, ends: &[(u128, u16); 2], promised: bool) -> Result<(), Reason> {
        let _t = lock::lock(&s.tx.lock);
        let _r = lock::lock(&s.rx.lock);
        self.may_begin(fd, s, ends)?;
        self.identify(fd, s)?;
        self.close_gates(s)?;
        let served = match self.untouched(fd, s) {
            true => self.hand_to_service(fd, s, [ends[0].0, ends[1].0], promised),
            false => Err(Reason::CountMismatch),
        };
        let to = |ring, tcp| if served.is_ok() { ring } else { tcp };
        s.tx.mode.store(to(tx_mode::RING, tx_mode::TCP), Release);
        s.rx.mode.store(to(rx_mode::RING, rx_mode::TCP), Release);
        served
    }

    /// The peer was promised SMC, and this end can't: it is told so before any byte of the program's, and the connection
    /// goes by TCP. Who has connected tells it at once. Who has accepted waits for the peer's Proposal, which is not the
    /// program's to read; if it does not come in time the connection is reset, rather than that the program reads it
    /// later. Both only while nobody has moved a byte in another way.
    #[cold]
    fn refuse(&self, fd: i32, s: &Slot, why: Reason) {
        // What was said here is in the kernel's counts and not in ours.
        s.barred.fetch_or(1, Relaxed);
        self.phase.store(phase::OFF, Relaxed);
        if self.untouched(fd, s) && !turn_down(fd, s.role.load(Relaxed) != 0, why) {
            self.was_reset(s, libc::ECONNRESET as u32);
            sys::disconnect(fd);
        }
    }

    /// Whether anything but the peer is against it.
    fn may_begin(&self, fd: i32, s: &Slot, ends: &[(u128, u16); 2]) -> Result<(), Reason> {
        if !config().allows(crate::report::program(), ends) {
            return Err(Reason::Excluded);
        }
        if s.holders.load(Acquire) != 1 && !self.bury_dead(s) {
            return Err(Reason::ForkShared);
        }
        if !sys::is_tcp(fd) {
            return Err(Reason::Ulp);
        }
        if s.barred.load(Relaxed) != 0 || super::wants_ancillary(fd) {
            return Err(Reason::SocketOption);
        }
        if crate::internal_fds::is_tight() { Err(Reason::NoFds) } else { Ok(()) }
    }

    /// No call is inside the kernel for either direction, and none goes there.
    fn close_gates(&self, s: &Slot) -> Result<(), Reason> {
        gate::shut(&s.tx.mode, tx_mode::GATE);
        gate::shut(&s.rx.mode, rx_mode::GATE);
        let empty = s.nobody_inside(|n| &n.tx) && s.nobody_inside(|n| &n.rx);
        if empty && !gate::is_barred(&s.barred) {
            return Ok(());
        }
        s.tx.mode.store(tx_mode::TCP, Release);
        s.rx.mode.store(rx_mode::TCP, Release);
        Err(Reason::TooShort)
    }

    /// Whether no byte has moved yet.
    fn untouched(&self, fd: i32, s: &Slot) -> bool {
        s.tx.tcp.load(Relaxed) == 0
            && s.rx.tcp.load(Relaxed) == 0
            && self.tx_counts_agree(fd, s) == Some(true)
            && self.rx_counts_agree(fd, s) == Some(true)
    }

    fn hand_to_service(
        &self,
        fd: i32,
        s: &Slot,
        [local, peer]: [u128; 2],
        promised: bool,
    ) -> Result<(), Reason> {
        let serve = SERVE.get().ok_or(Reason::NoRdma)?;
        let side = if s.role.load(Relaxed) == 0 { Side::Connect } else { Side::Accept };
        let (Grant { buffers, ticket, .. }, member) = memory()?;
        // Whatever fails from here on: both sides let go, and the memory is free again.
        let held = Box::new(Held { buffers: buffers.clone(), side: side.peer() });
        let ends = ConnBuffers::new(side, buffers.clone(), Some(ticket), member);
        let (bell, theirs) = doorbell()?;
        let tcp = match sys::dup_high(fd) {
            n if n < 0 => return Err(Reason::NoFds),
            n => Fd::from_raw(n),
        };
        let hold = Box::into_raw(held);
        let conn = Conn {
            tcp: tcp.raw(),
            bell: theirs.raw(),
            fd,
            side: side as u32,
            promised: promised.into(),
            cookie: s.cookie.load(Relaxed),
            page: buffers.page(),
            tx: buffers.ring(side as usize).0,
            rx: buffers.ring(side as usize ^ 1).0,
            ring: buffers.ring(0).1,
            hold: hold as usize,
            local: local.to_be_bytes(),
            peer: peer.to_be_bytes(),
        };
        let est = Established { side, bell, buffers: ends, peer_pid: 0, peer_uid: 0 };
        // Before the service has it: it may say at once what has become of it.
        ANY.store(1, Relaxed);
        s.remote.store(remote::SERVED, Release);
        if let Err(why) = serve(&conn) {
            s.remote.store(remote::NO, Relaxed);
            // SAFETY: made above, and not taken over.
            unsafe { release(hold as usize) };
            return Err(why);
        }
        // They are the service's now.
        std::mem::forget((tcp, theirs));
        self.adopt(fd, s, Box::new(est));
        s.reason.store(Reason::PeerNoSmc.code(), Relaxed);
        Ok(())
    }

    /// The service says what has become of the connection, see [`says`].
    pub fn service_says(&self, fd: i32, what: u32, value: u32) {
        let Some(s) = self.slot() else { return };
        match what {
            says::RDMA => {
                s.reason.store(0, Relaxed);
                s.best.store(2, Relaxed);
                s.upgrades.fetch_add(1, Relaxed);
                crate::report::probe_upgraded(s);
            }
            says::TCP => {
                if let Ok(why) = Reason::try_from(value) {
                    s.reason.store(value, Relaxed);
                    // It was on RDMA before, and its link is gone.
                    if s.best.load(Relaxed) == 2 {
                        s.downgrades.fetch_add(1, Relaxed);
                    }
                    crate::report::log_fallback(s, why);
                }
                let _g = lock::lock(&s.tx.lock);
                s.remote.store(remote::WAS, Release);
                self.shut_now(fd, s);
            }
            _ => self.was_reset(s, value),
        }
        self.set_changed();
    }

    /// As a reset by TCP: what is here is read, then the error is told, once.
    fn was_reset(&self, s: &Slot, errno: u32) {
        let told = |w: u32| (!reset::is_errno(w) && w != reset::TOLD).then_some(errno);
        let _ = s.reset.fetch_update(Relaxed, Relaxed, told);
        let _g = lock::lock(&s.tx.lock);
        s.remote.store(remote::WAS, Release);
        if s.tx.mode.load(Relaxed) != tx_mode::DONE {
            s.tx.mode.store(tx_mode::DONE, Release);
        }
    }

    /// Something asks for TCP, which the peer would not read: the connection ends as a reset, rather than that bytes go
    /// astray, or go by the ring what the kernel was to encrypt. A program that inherits a descriptor mostly does nothing
    /// with it, a stalled writer waits, and of a set that a fork shares the worst is an event too many.
    #[cold]
    pub(super) fn cannot_leave(&self, fd: i32, s: &Slot, why: Reason) {
        if matches!(why, Reason::Exec | Reason::Stalled | Reason::ForkShared) {
            return;
        }
        self.was_reset(s, libc::ECONNRESET as u32);
        {
            let _g = lock::lock(&s.rx.lock);
            s.rx.mode.store(rx_mode::DONE, Release);
        }
        s.reason.store(why.code(), Relaxed);
        self.set_changed();
        // The service hears of it by the socket.
        sys::disconnect(fd);
        crate::report::log_fallback(s, why);
    }

    /// The service has changed the page: does what it asks for, and leaves the ring where the stream has.
    pub fn attend(&self, fd: i32) {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return };
        self.progress(fd);
        self.leave_empty(fd, s, &m);
    }

    /// The stream that has left the ring goes on in TCP at once, though nobody reads: what the kernel says counts again.
    fn leave_empty(&self, fd: i32, s: &Slot, m: &Mapped<'_>) {
        let g = lock::lock(&s.rx.lock);
        if s.rx.mode.load(Relaxed) == rx_mode::RING && self.look(s, m).is_ok_and(|r| r.left && r.bytes == 0) {
            self.out_of_ring(s, m, fd, g);
        }
    }

    /// Whether the kernel's word on TCP's reading end does not count: TCP is the service's.
    #[inline]
    pub fn hides_tcp(&self) -> bool {
        self.slot().is_some_and(|s| s.is_served() && s.rx.mode.load(Acquire) == rx_mode::RING)
    }

    /// The program shuts its sending direction. True: the service tells the kernel, when all has gone.
    pub fn shuts_later(&self) -> bool {
        let Some(s) = self.slot() else { return false };
        if !s.is_remote() {
            return false;
        }
        let _g = lock::lock(&s.tx.lock);
        let later = s.is_served() || s.tx.mode.load(Relaxed) == tx_mode::FLUSH;
        if later {
            s.shut_later.store(1, Relaxed);
        }
        later
    }

    /// Under the tx lock: what [`Self::shuts_later`] has put off, if nothing goes before it any more.
    pub(super) fn shut_now(&self, fd: i32, s: &Slot) {
        let gone = matches!(s.tx.mode.load(Relaxed), tx_mode::DONE);
        if gone && s.shut_later.swap(0, Relaxed) != 0 {
            sys::shutdown(fd, libc::SHUT_WR);
        }
    }

    /// Whether the program has shut the direction and the kernel does not know yet: a send is EPIPE.
    #[inline]
    pub(super) fn is_shut(&self, s: &Slot) -> bool {
        s.shut_later.load(Relaxed) != 0
    }

    /// As the kernel does with a send to a direction that is shut: EPIPE, and the signal unless `flags` say no.
    #[cold]
    pub(super) fn broken_pipe(&self, flags: i32) -> isize {
        if flags & libc::MSG_NOSIGNAL == 0 {
            sys::raise(libc::SIGPIPE);
        }
        -(libc::EPIPE as isize)
    }
}

/// Address and port of this end and of the peer's, if there is one.
fn ends(fd: i32) -> Option<[(u128, u16); 2]> {
    let ((family, local, lport), (_, peer, pport)) = (sys::sockaddr(fd, false)?, sys::sockaddr(fd, true)?);
    Some([(super::wide(family, local), lport), (super::wide(family, peer), pport)])
}

/// Whether the peer is listed, and another host's.
fn is_listed(fd: i32, peer: u128) -> bool {
    config().is_peer(peer) && (config().test_remote || local::is_elsewhere(fd))
}

/// Whether reads follow that we do not see.
fn is_out_of_sight(why: Reason) -> bool {
    use Reason::{AsyncIo, Exec, FdPassed, LowFd, Sandbox, Splice, Stdio};
    matches!(why, AsyncIo | Exec | FdPassed | LowFd | Sandbox | Splice | Stdio)
}

/// A connection that nobody keeps an eye on: if its peer was promised SMC, it is told that there is none.
pub fn decline_unknown(fd: i32, accepted: bool, why: Reason) {
    if option::is_in_use() && option::take(fd) && !turn_down(fd, accepted, why) {
        sys::disconnect(fd);
    }
}

/// Declines, when it is time to. False: it can't.
#[cold]
fn turn_down(fd: i32, accepted: bool, why: Reason) -> bool {
    match accepted {
        false => tell(fd, why),
        true => match first_message(fd) {
            First::Declined | First::None => true,
            First::Other => tell(fd, why),
            First::Late => false,
        },
    }
}

/// Sends a Decline; false: TCP did not take it.
fn tell(fd: i32, why: Reason) -> bool {
    let diagnosis = Diagnosis(why.code());
    let decline = Decline { peer: PeerId([0; 8]), diagnosis, out_of_sync: false, v2: None };
    let bytes = clc::encode(&Message::Decline(decline));
    sys::send_small(fd, &bytes, NOW | libc::MSG_NOSIGNAL) == bytes.len() as isize
}

const NOW: i32 = libc::MSG_DONTWAIT;

/// What has come, left where it is.
fn peek(fd: i32, bytes: &mut [u8; MOST_CLC]) -> &[u8] {
    // Asked for first: of a socket with an error and no bytes, recv(2) would take the error.
    let some = sys::ioctl_int(fd, libc::FIONREAD).is_ok_and(|n| n > 0);
    let n = if some { sys::recv_small(fd, bytes, libc::MSG_PEEK | NOW) } else { 0 };
    bytes.get(..usize::try_from(n).unwrap_or(0)).unwrap_or_default()
}

/// What is known of the start of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sifted {
    /// From here on it is the program's.
    Known,
    /// Nothing has come, or less than tells.
    Part,
}

/// What the peer's stream begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// A Decline; it is taken.
    Declined,
    /// Another message; it is taken.
    Other,
    /// Bytes that are no message, or the end: the program's.
    None,
    /// Nothing for as long as may be waited for.
    Late,
}

/// Waits for the peer's first message. How long all calls of a process may do so together is bounded.
fn first_message(fd: i32) -> First {
    let mut patience = Patience::new(CLC_WAIT);
    let mut bytes = [0; MOST_CLC];
    loop {
        let seen = peek(fd, &mut bytes);
        let some = !seen.is_empty();
        match clc::decode(seen) {
            Ok(Decoded::Message(m, n)) => {
                sys::recv_small(fd, &mut vec![0; n], NOW);
                return if matches!(m, Message::Decline(_)) { First::Declined } else { First::Other };
            }
            Ok(Decoded::NeedTotal(_)) => {}
            Err(_) => return First::None,
        }
        let mut p = [libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 }];
        match patience.poll(&mut p) {
            None => return First::Late,
            Some(true) if p[0].revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0 => {
                return First::None;
            }
            // Not all of it has come.
            Some(true) if some => patience.tire(),
            Some(_) => {}
        }
    }
}

/// The link group of this process with its own service.
fn own_memory() -> Result<lgr::Member, Reason> {
    // Not the one that a connection of this process with itself has, whose memory is handed on.
    let instance = lgr::instance() ^ 1 << 63;
    for _ in 0..MOST_TURNS {
        match lgr::owned(sys::getpid(), sys::uid(), instance) {
            Asked::Group(member) => return Ok(member),
            Asked::Busy => sys::yield_cpu(),
        }
    }
    Err(Reason::NoMemory)
}

/// Page and rings, zeroed.
fn memory() -> Result<(Grant, lgr::Member), Reason> {
    let c = config();
    for _ in 0..MOST_TURNS {
        let member = own_memory()?;
        let rmb = member.group().rmb().ok_or(Reason::Internal)?;
        // Nobody asks for the memfd.
        match rmb.allocate(ring_size(c.rmb_size), u64::MAX, c.mem_limit, sys::fd_base()) {
            Ok(grant) => return Ok((grant, member)),
            Err(Refused::Busy) => sys::yield_cpu(),
            Err(Refused::Exhausted) => member.group().retire(),
            Err(Refused::Limit | Refused::Sys(libc::ENOMEM)) => return Err(Reason::NoMemory),
            Err(Refused::Sys(_)) => return Err(Reason::NoFds),
        }
    }
    Err(Reason::NoMemory)
}

/// Both ends of a doorbell, numbered high.
fn doorbell() -> Result<(Fd, Fd), Reason> {
    let (a, b) = sys::socketpair().map_err(|_| Reason::NoFds)?;
    let [a, b] = [a, b].map(Fd::from_raw);
    let base = sys::fd_base();
    let high = |fd: Fd| fd.raise(base).map_err(|_| Reason::NoFds);
    Ok((high(a)?, high(b)?))
}
