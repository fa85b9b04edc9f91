//! The switch between TCP and the ring, by byte offset: the decisions, without I/O.
//!
//! Per direction, S sends and R receives; `tcp` is the byte stream that TCP carries, `ring` the one that
//! the ring carries. The program's stream is
//!
//! ```text
//!   tcp[0 .. N]   ring[0 .. P]   tcp[N ..]
//! ```
//!
//! with N announced by S before it sends the last byte before N, and P published by S (with LEFT) when the
//! stream leaves the ring, or set by R (stop) as the last ring byte that R will take. R follows with two
//! rules only:
//!
//! 1. of TCP take nothing beyond N; at N go to the ring ([`tcp_take`]);
//! 2. of the ring take nothing beyond P; at P go back to TCP ([`ring_take`]).
//!
//! Rule 1 needs care: R must not have read past N when it learns of N. So it peeks, then looks for the
//! announcement, then takes: what was in the TCP queue *before* the look was sent before the announcement
//! if the look does not see one (S announces before it sends), and all of it then lies before N.
//!
//! Stop and LEFT may cross: both set a bit of one word by read-modify-write, and the first decides.
//! S finds the stop with the same fence that its publication needs for the
//! doorbell: either R saw the bytes when it chose P, or S sees the stop and moves the bytes from P on
//! into TCP, ahead of all later ones ([`stop_at`]).
//!
//! A stop that *keeps* what is in the ring must not leave bytes behind that R has not seen and of which S does
//! not know: S may not come back for long. So R asks first ([`doorbell::ask`]), then looks how far the ring is
//! filled, then stops there. An S whose bytes R did not see finds the question after its publication, while it
//! still is in the call that sent them: if it is there before the stop it leaves, so that R reads them from the
//! ring, and if it is after, it moves them into TCP or takes them back.
//!
//! `models.rs` runs these very functions with loom, and `explore` in every state of both directions at once, with
//! either end or one of its holders killed at any step, against a model of TCP. `Rule` names what each line is for.

use crate::mem::layout::SidePage;
use crate::ring::{self, PeerMisbehaved, Readable};
use crate::rules::{Rule, holds};
use crate::sync::{AtomicU64, Ordering, Ordering::*};
use crate::wait::doorbell;

/// The orderings of [rx.promise]; the twin under `cfg(smc_weak)` must fail the model.
#[cfg(not(smc_weak))]
const PROMISE: [Ordering; 2] = [Release, Acquire];
#[cfg(smc_weak)]
const PROMISE: [Ordering; 2] = [Relaxed, Relaxed];

/// S: "the stream leaves TCP at offset `at`". Precedes the send of the byte before `at`.
pub fn announce(me: &SidePage, at: u64) {
    // ORDERING [switch.announce] Release; pairs with the Acquire in `announced`. TCP itself carries the
    // edge as well: whoever has read a byte that was sent after this sees it.
    me.tx.switch_at.store(at + 1, Release);
}

/// R: the offset that the peer announced.
pub fn announced(peer: &SidePage) -> Option<u64> {
    // ORDERING [switch.announce] Acquire; pairs with the Release in `announce`.
    peer.tx.switch_at.load(Acquire).checked_sub(1)
}

/// R: "announce when you like". From now on it follows rule 1.
pub fn ready(me: &SidePage) {
    // ORDERING [switch.ready] Release; pairs with the Acquire in `is_ready`. Carries: the mode of R.
    me.rx.ready.store(1, Release);
}

/// S: whether the peer follows an announcement.
pub fn is_ready(peer: &SidePage) -> bool {
    // ORDERING [switch.ready] Acquire; pairs with the Release in `ready`.
    peer.rx.ready.load(Acquire) != 0 && !doorbell::asked(peer)
}

/// What R does with bytes it has peeked at in TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpTake {
    /// The stream goes on in the ring.
    EnterRing,
    /// Take so many.
    Take(usize),
    /// TCP has ended.
    End,
}

/// R: `taken` bytes have been taken from TCP, `seen` more have been peeked at (0: the end). Looks for the
/// announcement now, after the peek.
pub fn tcp_take(peer: &SidePage, taken: u64, seen: usize) -> TcpTake {
    match announced(peer) {
        Some(at) if at <= taken => TcpTake::EnterRing,
        _ if seen == 0 => TcpTake::End,
        Some(at) if holds(Rule::TakeToN) => TcpTake::Take((at - taken).min(seen as u64) as usize),
        _ => TcpTake::Take(seen),
    }
}

/// R: what may be taken from the ring, `stop` being the own stop cursor. `left` with 0 bytes: back to TCP.
#[inline]
pub fn ring_take(
    peer: &SidePage,
    cons: u64,
    size: u64,
    stop: Option<u64>,
) -> Result<Readable, PeerMisbehaved> {
    let r = ring::readable(&peer.tx, cons, size)?;
    Ok(match stop.map(|at| at.saturating_sub(cons)) {
        Some(until) if r.bytes >= until && holds(Rule::TakeToStop) => Readable { bytes: until, left: true },
        _ => r,
    })
}

/// As [`ring_take`], by a thread of R that may look without R's lock, at R's own cursor `cons`. A peer that has taken back
/// what was [promised](promise) is found out.
#[inline(always)]
pub fn ring_look(
    peer: &SidePage,
    promised: &AtomicU64,
    cons: &AtomicU64,
    size: u64,
    stop: Option<u64>,
) -> Result<Readable, PeerMisbehaved> {
    // ORDERING [rx.promise] Acquire; pairs with the Release in `promise`. Carries: that `prod` was no less.
    let promised = promised.load(PROMISE[1]);
    let cons = cons.load(Relaxed);
    let r = ring_take(peer, cons, size, stop)?;
    if cons + r.bytes < promised && stop.is_none() { Err(PeerMisbehaved) } else { Ok(r) }
}

/// The program has been told that the ring is filled up to `cursor`.
#[inline(always)]
pub fn promise(promised: &AtomicU64, cursor: u64) {
    // ORDERING [rx.promise] Release; pairs with the Acquire in `ring_look`. A late store of a lower cursor than another
    // thread's promises less, and no more. Model: loom_promise.
    promised.store(cursor, PROMISE[0]);
}

/// R: leaves the ring at the last byte it has seen (`keep`), or at once. Returns the stop cursor; `None`:
/// the sender has left the ring by itself, and R reads on to its cursor. `note` gets the cursor before the peer does:
/// whoever shares the end with an R that is killed in here stops at that same cursor.
pub fn stop(
    me: &SidePage,
    peer: &SidePage,
    cons: u64,
    size: u64,
    keep: bool,
    note: impl FnOnce(u64),
) -> Option<u64> {
    let seen = if keep {
        if holds(Rule::AskFirst) {
            doorbell::ask(me);
        }
        ring::readable(&peer.tx, cons, size).map_or(0, |r| r.bytes)
    } else {
        0
    };
    note(cons + seen);
    doorbell::stop(me, cons + seen).then_some(cons + seen)
}

/// S: the stream leaves the ring at `prod`. False: R has asked to stop before; S does what that asks for.
#[must_use]
pub fn leave(me: &SidePage, peer: &SidePage, prod: u64) -> bool {
    let first = doorbell::leave(peer);
    if first && holds(Rule::SayLeft) {
        ring::publish(&me.tx, prod, true);
    }
    first
}

/// S, having seen a stop, with `prod` bytes produced: the first ring byte that must go by TCP.
pub fn stop_at(peer: &SidePage, prod: u64, size: u64) -> Option<u64> {
    // An impossible cursor harms the liar only: nothing is moved.
    doorbell::stopped(peer)
        .map(|at| if prod.wrapping_sub(at) > size || !holds(Rule::MoveBeyondStop) { prod } else { at })
}
