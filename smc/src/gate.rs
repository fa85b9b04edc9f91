//! The gate of a direction: calls that are in the kernel for it, who is about to switch it, and who forbids that.
//!
//! The hard idea: bytes that a call moves inside the kernel count for the stream's offset, so a direction switches only when
//! none is inside, and none comes while that is looked at. And what forbids a switch (the program does something that the
//! ring can't carry, or is about to give the socket away) must either come before the look, or find the switch made and
//! undo it. Each of the three writes one word and looks at another's, with a fence between:
//!
//! ```text
//! call        count in, look at the mode                   count off when it is over
//! switch      mode GATE, look at the counts, at the bar    mode RING or READY, or back to TCP
//! bar         bar, look at the mode                        still TCP: there is no switch any more
//! ```

#[cfg(not(smc_weak))]
use crate::sync::fence;
use crate::sync::{AtomicU32, Ordering::*};

/// The fence of all three, and of whoever else writes one word and looks at another: one of the two sees what the other has
/// written. The twin under `cfg(smc_weak)` must fail the models.
#[inline(always)]
pub fn between() {
    #[cfg(not(smc_weak))]
    fence(SeqCst);
}

/// A call goes inside if the `mode` is `open`; [`leave`] must follow then.
#[inline(always)]
pub fn enter(inside: &AtomicU32, mode: &AtomicU32, open: u32) -> bool {
    inside.fetch_add(1, Relaxed);
    // ORDERING [gate] fence; pairs with the fence in `shut`. Here: count in, look at the mode. There: shut, look at the
    // counts. Either the call is seen inside, or it sees the gate and turns back. Model: loom_gate_against_calls.
    between();
    // Acquire: what the switch has left, if the mode is another.
    let goes = mode.load(Acquire) == open;
    if !goes {
        leave(inside);
    }
    goes
}

/// The call is over, and what it has moved is counted.
#[inline(always)]
pub fn leave(inside: &AtomicU32) {
    // ORDERING [gate] Release; pairs with the Acquire in `is_empty`. Carries: the byte count.
    inside.fetch_sub(1, Release);
}

/// Nobody goes inside from now on; [`is_empty`] and [`is_barred`] are to be asked next.
#[inline]
pub fn shut(mode: &AtomicU32, gate: u32) {
    mode.store(gate, Relaxed);
    // ORDERING [gate] fence; pairs with the fences in `enter` and in `bar`.
    between();
}

/// Whether no call is inside, of those that are counted here.
#[inline]
pub fn is_empty(inside: &AtomicU32) -> bool {
    // ORDERING [gate] Acquire; pairs with the Release in `leave`.
    inside.load(Acquire) == 0
}

/// The `bits` speak against a switch from now on. One that is under way is to be looked for next, in the mode.
#[inline]
pub fn bar(barred: &AtomicU32, bits: u32) {
    barred.fetch_or(bits, Relaxed);
    // ORDERING [gate] fence; pairs with the fence in `shut`. Here: bar, look at the mode. There: shut, look at the bar.
    // Either the switch is seen, or it is given up. Model: loom_gate_against_a_bar.
    between();
}

/// Whether something speaks against the switch.
#[inline]
pub fn is_barred(barred: &AtomicU32) -> bool {
    // Relaxed: after the fence of `shut` it counts.
    barred.load(Relaxed) != 0
}
