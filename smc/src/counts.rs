//! Counts of those who use a thing, and who looks at them: references, handles, holders, calls that sleep.
//!
//! The hard idea: who comes must not be missed by who takes the thing away, and who goes must have done all that he
//! did before the last one goes on alone. Three protocols, all of words that their owners keep elsewhere:
//!
//! ```text
//! by number    count_in: count, look at the number      is_free: mark the number, look at the count
//! asleep       wakes: count off, look where it is       is_free: say where it is, look at the count
//! last out     count_off by each                        count_off that was the last, or is_only
//! ```

use crate::sync::{
    AtomicPtr, AtomicU32, AtomicUsize, LoadSeqCst, Ordering,
    Ordering::{Acquire, Relaxed, SeqCst},
};

/// The ordering of [`count_off`]; the twin under `cfg(smc_weak)` must fail the models.
#[cfg(not(smc_weak))]
const OFF: Ordering = Ordering::AcqRel;
#[cfg(smc_weak)]
const OFF: Ordering = Relaxed;

/// The ordering of [`is_only`]; likewise.
#[cfg(not(smc_weak))]
const ALONE: Ordering = Acquire;
#[cfg(smc_weak)]
const ALONE: Ordering = Relaxed;

/// What became of a call that wanted a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// It has one.
    Yes,
    /// It was counted, but the number says something else by now: it counts itself off again.
    Late,
    /// It was not: there was none left, or the count has changed meanwhile.
    No,
}

/// Counts a call in that has found `p` in the number's `cell`, whose count is `refs`.
#[inline(always)]
pub fn count_in<T>(refs: &AtomicU32, cell: &AtomicPtr<T>, p: *mut T) -> Counted {
    // Nearly always nobody else counts at this moment.
    let n = refs.load(Relaxed);
    // ORDERING [table.move] SeqCst, both; pairs with `mark` and `is_free`. Here: count, look at the number. There: mark
    // the number, look at the count. Either the call is counted, or it finds the number marked and waits.
    // Model: loom_move_against_a_call.
    if n == 0 || refs.compare_exchange(n, n + 1, SeqCst, Relaxed).is_err() {
        return Counted::No;
    }
    if cell.load_seq_cst() == p { Counted::Yes } else { Counted::Late }
}

/// A number that names `p` names `mark` from now on. False: it does not name `p`.
#[inline]
pub fn mark<T>(cell: &AtomicPtr<T>, p: *mut T, mark: *mut T) -> bool {
    // ORDERING [table.move] SeqCst; pairs with `count_in`.
    cell.load(Relaxed) == p && cell.compare_exchange(p, mark, SeqCst, Relaxed).is_ok()
}

/// Whether nobody uses a thing whose numbers are all marked, and which has `mine` references beside those of calls, but
/// calls that sleep outward: those find it where `park` leaves it, which says whether it could. `wait`, which is told
/// whether it is parked, waits a moment, or says that it has been long enough.
pub fn is_free(
    refs: &AtomicU32,
    outward: &AtomicU32,
    mine: u32,
    mut park: impl FnMut() -> bool,
    mut wait: impl FnMut(bool) -> bool,
) -> bool {
    let mut parked = false;
    loop {
        // No call comes to it any more. As many as there are now were all asleep a moment later: so each of them is, or
        // was then.
        // ORDERING [table.move] SeqCst; pairs with `count_in`.
        let n = refs.load_seq_cst();
        let asleep = asleep(outward);
        if n == mine + asleep {
            if asleep == 0 || parked {
                return true;
            }
            // Once more: one may have woken up before it could find the socket there. It sends and ends, or sleeps.
            parked = park();
            if !parked {
                return false;
            }
            continue;
        }
        if !wait(parked) {
            return false;
        }
    }
}

/// A call begins to sleep outward.
#[inline]
pub fn sleeps(outward: &AtomicU32) {
    // ORDERING [table.outward] SeqCst, as in `wakes`.
    outward.fetch_add(1, SeqCst);
}

/// It has ceased to, and looks next [where](parked_as) the socket is.
#[inline]
pub fn wakes(outward: &AtomicU32) {
    // ORDERING [table.outward] SeqCst; pairs with `asleep` and `park_as`. Here: count off, look where the socket is.
    // There: say where it is, look at the count. Model: loom_move_against_a_sleeper.
    outward.fetch_sub(1, SeqCst);
}

/// How many sleep.
#[inline]
pub fn asleep(outward: &AtomicU32) -> u32 {
    // ORDERING [table.outward] SeqCst; pairs with `wakes`.
    outward.load_seq_cst()
}

/// The socket is to be found as `number`, not 0, from now on.
pub fn park_as(parked: &AtomicU32, number: u32) {
    // ORDERING [socket.parked] SeqCst, a Release among others; pairs with the load in `parked_as`. Carries: that the
    // number is open. [table.outward]; pairs with `wakes`.
    parked.store(number, SeqCst);
}

/// The number as which the socket is to be found; 0: that which the program knows.
#[inline]
pub fn parked_as(parked: &AtomicU32) -> u32 {
    // ORDERING [socket.parked] SeqCst, an Acquire among others; pairs with the store in `park_as`. [table.outward]; a
    // call that was counted when that looked sees it here.
    parked.load_seq_cst()
}

/// A count, of either size.
pub trait Count {
    /// Lowers it by one; what it was.
    fn lower(&self, how: Ordering) -> usize;
    /// What it is.
    fn look(&self, how: Ordering) -> usize;
}

impl Count for AtomicU32 {
    #[inline(always)]
    fn lower(&self, how: Ordering) -> usize {
        self.fetch_sub(1, how) as usize
    }
    #[inline(always)]
    fn look(&self, how: Ordering) -> usize {
        self.load(how) as usize
    }
}

impl Count for AtomicUsize {
    #[inline(always)]
    fn lower(&self, how: Ordering) -> usize {
        self.fetch_sub(1, how)
    }
    #[inline(always)]
    fn look(&self, how: Ordering) -> usize {
        self.load(how)
    }
}

/// Counts one off; how many there were with it. Whoever finds 1 was the last, and has before it what the others did.
#[inline(always)]
pub fn count_off(count: &impl Count) -> usize {
    // AcqRel, of [entry.refs], [handles] and [holders]: what each did before it went is carried to the last, and to
    // `is_only`. Models: loom_last_out, loom_only_one.
    count.lower(OFF)
}

/// Whether nobody is counted but the caller, who then has before it what the others did.
#[inline(always)]
pub fn is_only(count: &impl Count) -> bool {
    // Acquire, of [handles] and [holders]; pairs with the AcqRel in `count_off`.
    count.look(ALONE) == 1
}
