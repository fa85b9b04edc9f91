//! The armed word: who must ring whom, and who must leave the ring.
//!
//! | word | set by | cleared by |
//! | --- | --- | --- |
//! | `RX_ARMED` | the owner, before it sleeps for bytes | the peer that will ring; the owner when it looks again |
//! | `TX_ARMED` | the owner, before it sleeps for space | likewise |
//! | `RX_STOP` | the owner, once | nobody |
//! | `RX_ASK` | the owner, once, before it looks where to stop | nobody |
//! | `PEER_LEFT` | the peer, once | nobody |
//! | `PEER_SHUT` | the peer, before the FIN of a shutdown(2) | nobody |
//!
//! Stop and the armed bits share one word, so the one fence that a publication needs covers both: after it
//! the producer knows whether somebody sleeps *and* whether the bytes it just published will be read.

use crate::mem::layout::{SidePage, TxLine, ctl};
use crate::ring;
use crate::rules::{Rule, holds};
use crate::sync::{AtomicU32, AtomicU64, Ordering, Ordering::*, fence};

/// The orderings of [bell.order]; the twin under `cfg(smc_weak)` must fail the model.
#[cfg(not(smc_weak))]
const ORDER: [Ordering; 2] = [Release, Acquire];
#[cfg(smc_weak)]
const ORDER: [Ordering; 2] = [Relaxed, Relaxed];

/// What a publication owes.
#[must_use]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owed {
    /// Ring the peer's doorbell.
    pub ring: bool,
    /// The peer has asked to go back to TCP.
    pub stop: bool,
}

/// Rings that an end owes its peer: [`Rings::OWED`], and a count of the notes above it. A holder notes a ring before it
/// takes the peer's armed bit, and pays it by ringing. One that is killed in between leaves it owed, and the next
/// publication of another holder rings.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Rings(pub(crate) AtomicU64);

impl Rings {
    /// A ring is noted and not paid: it is on its way, or its holder was killed. No bit of [`ctl`].
    pub const OWED: u64 = 1 << 8;

    // Relaxed throughout: noted under a direction's lock, whose hand-over carries it; what is paid too late costs a
    // ring.

    /// The word.
    #[inline(always)]
    pub fn load(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Whether a ring is owed.
    #[inline]
    pub fn is_owed(&self) -> bool {
        self.load() & Self::OWED != 0
    }

    /// A ring will be owed.
    #[cold]
    #[inline(never)]
    pub fn note(&self) {
        let noted = |w: u64| Some(w.wrapping_add(2 * Self::OWED) | Self::OWED);
        let _ = self.0.fetch_update(Relaxed, Relaxed, noted);
    }

    /// Rings. All that was noted before is paid; a note that came meanwhile is not.
    ///
    /// `taken`: whether whoever noted has taken its armed bit by now, or was killed, which it has if the directions' locks
    /// are free. If not, the peer might arm once more after this ring, and that bit be taken by one who is killed with no
    /// note left. So the ring stays owed then: the next publication rings, at worst for nothing.
    pub fn pay<T>(&self, taken: impl FnOnce() -> bool, ring: impl FnOnce() -> T) -> T {
        let noted = self.load();
        let paid = noted & Self::OWED != 0 && taken();
        let r = ring();
        if paid {
            let _ = self.0.compare_exchange(noted, noted & !Self::OWED, Relaxed, Relaxed);
        }
        r
    }
}

/// After a cursor was published: does `peer` wait for it (`bit`), has it asked to stop?
///
/// `wake` false leaves an armed peer armed: what it waits for has not come yet (too little space).
#[inline]
pub fn after_publish(peer: &SidePage, bit: u32, wake: bool) -> Owed {
    after_publish_with(peer, bit, wake, || 0, || ())
}

/// As [`after_publish`], for an end with `rings`.
#[inline(always)]
pub fn after_publish_for(peer: &SidePage, bit: u32, wake: bool, rings: &Rings) -> Owed {
    after_publish_with(peer, bit, wake, || rings.load(), || rings.note())
}

/// As [`after_publish`]; `owes` is what [`Rings`] holds, and `note` is called before the armed bit is taken, after
/// which nobody else knows of the ring.
#[inline(always)]
pub fn after_publish_with(
    peer: &SidePage,
    bit: u32,
    wake: bool,
    owes: impl FnOnce() -> u64,
    note: impl FnOnce(),
) -> Owed {
    // ORDERING [bell.recheck] fence; pairs with the fence in `arm` and in `stop`. Here: store the cursor,
    // load ctl. There: store ctl, load the cursor. One of the two loads sees the other's store.
    #[cfg(not(smc_weak))]
    fence(SeqCst);
    let word = peer.ctl.ctl.load(Relaxed);
    let owes = owes();
    if (u64::from(word) | owes) & (u64::from(bit | ctl::RX_STOP | ctl::RX_ASK) | Rings::OWED) == 0 {
        return Owed::default();
    }
    let taken = wake && word & bit != 0 && {
        note();
        peer.ctl.ctl.fetch_and(!bit, AcqRel) & bit != 0
    };
    // ORDERING [bell.stop] Acquire; pairs with the Release in `stop`. Carries: stop_at and cons.
    fence(Acquire);
    let stop = word & (ctl::RX_STOP | ctl::RX_ASK) != 0 && holds(Rule::HeedAfterPublish);
    Owed { ring: taken || owes & Rings::OWED != 0, stop }
}

/// The bytes before `prod` are the peer's to read; with them it learns how many doorbells were `rang` before, of whichever
/// connections.
#[inline(always)]
pub fn publish(me: &TxLine, prod: u64, rang: &AtomicU32) {
    // ORDERING [bell.order] Release; pairs with the Acquire in `rang`. Carries: those rings, which are in the kernel.
    // Model: loom_bell_order.
    me.rang.store(rang.load(Relaxed), ORDER[0]);
    ring::publish(me, prod, false);
}

/// A doorbell has been rung.
#[inline]
pub fn has_rung(rang: &AtomicU32) {
    // Relaxed: what comes after it in this thread, or in one that it tells, is published with it.
    rang.fetch_add(1, Relaxed);
}

/// How many doorbells the peer's process had rung at this one before it produced what a look before this has found.
#[inline]
pub fn rang(peer: &TxLine) -> u32 {
    // ORDERING [bell.order] Acquire; pairs with the Release in `publish`.
    peer.rang.load(ORDER[1])
}

/// After a word of this end's was changed that its own sleepers look at before they sleep: the caller looks for them next.
#[inline]
pub fn after_change() {
    // ORDERING [bell.recheck] fence; pairs with the fence in `arm`. Here: store the mode, load writers. There: store
    // writers, load the mode. One of the two sees the other's store. Model: loom_shutdown_wakes.
    #[cfg(not(smc_weak))]
    fence(SeqCst);
}

/// Arms `bits`. The caller looks at what it waits for after this, and sleeps only if it has not come.
#[inline]
pub fn arm(me: &SidePage, bits: u32) {
    me.ctl.ctl.fetch_or(bits, AcqRel);
    // ORDERING [bell.recheck] fence; pairs with the fence in `after_publish`.
    fence(SeqCst);
}

/// Takes `bits` back: the owner looks by itself again.
#[inline]
pub fn disarm(me: &SidePage, bits: u32) {
    if me.ctl.ctl.load(Relaxed) & bits != 0 {
        me.ctl.ctl.fetch_and(!bits, Relaxed);
    }
}

/// Before the owner looks how far the ring is filled and stops there: what it does not see then was published by
/// a peer that sees this.
pub fn ask(me: &SidePage) {
    me.ctl.ctl.fetch_or(ctl::RX_ASK, AcqRel);
    // ORDERING [bell.recheck] fence; pairs with the fence in `after_publish`. Here: store ctl, load the cursor.
    // There: store the cursor, load ctl. One of the two loads sees the other's store.
    #[cfg(not(smc_weak))]
    fence(SeqCst);
}

/// Asks the peer to leave the ring at `stop_at`. The caller consumes up to there and no further. False: the
/// peer has left already, at a cursor of its own.
#[must_use]
pub fn stop(me: &SidePage, stop_at: u64) -> bool {
    me.rx.stop_at.store(stop_at, Relaxed);
    // ORDERING [bell.stop] AcqRel; pairs with the Acquire in `after_publish` and with `leave`, the other
    // read-modify-write of this word: of stop and leave one is first, and both sides agree which.
    let first = mark(me, ctl::RX_STOP, ctl::PEER_LEFT);
    // ORDERING [bell.recheck] fence; pairs with the fence in `after_publish`.
    fence(SeqCst);
    first
}

/// Tells `peer` that the stream leaves the ring; the cursor must be published with LEFT right after. False:
/// the peer has asked to stop before, and that holds instead.
#[must_use]
pub fn leave(peer: &SidePage) -> bool {
    // ORDERING [bell.stop] AcqRel; see `stop`.
    mark(peer, ctl::PEER_LEFT, ctl::RX_STOP)
}

/// Sets `bit` unless `other` is set: only one of the two ever is.
fn mark(side: &SidePage, bit: u32, other: u32) -> bool {
    side.ctl
        .ctl
        .fetch_update(AcqRel, Acquire, |w| (w & other == 0 || !holds(Rule::OneWord)).then_some(w | bit))
        .is_ok()
}

/// Tells `peer` that this end shuts its sending direction, before its FIN does.
pub fn shut(peer: &SidePage) {
    // Relaxed: TCP carries the edge. Who looks has seen the FIN, which is sent after this.
    peer.ctl.ctl.fetch_or(ctl::PEER_SHUT, Relaxed);
}

/// Whether the peer has shut its sending direction; asked once its FIN is here.
pub fn was_shut(me: &SidePage) -> bool {
    me.ctl.ctl.load(Relaxed) & ctl::PEER_SHUT != 0
}

/// Whether `peer` has asked to stop, or is about to.
#[inline]
pub fn asked(peer: &SidePage) -> bool {
    // Relaxed: whoever acts on it reads the word again, see `leave` and `stopped`.
    peer.ctl.ctl.load(Relaxed) & (ctl::RX_STOP | ctl::RX_ASK) != 0
}

/// Whether a stream that is in the ring is to leave it: `peer` has [asked](asked), or a holder of this end that was killed
/// had begun to leave. The peer may know already, so nothing more goes into the ring, and whoever finds this leaves.
#[inline]
pub fn is_to_leave(peer: &SidePage) -> bool {
    let begun = if holds(Rule::FinishLeave) { ctl::PEER_LEFT } else { 0 };
    // Relaxed: as in `asked`.
    peer.ctl.ctl.load(Relaxed) & (ctl::RX_STOP | ctl::RX_ASK | begun) != 0
}

/// Whether `peer` has asked to stop, and where.
pub fn stopped(peer: &SidePage) -> Option<u64> {
    // ORDERING [bell.stop] Acquire; pairs with the Release in `stop`. Carries: stop_at.
    (peer.ctl.ctl.load(Acquire) & ctl::RX_STOP != 0).then(|| peer.rx.stop_at.load(Relaxed))
}
