//! Counts of those who use a thing, and who looks at them: references, handles, holders.
//!
//! The hard idea: who goes must have done all that he did before the last one goes on alone. The words are kept by
//! those whose they are.

use crate::sync::{AtomicU32, AtomicUsize, Ordering};

/// The ordering of [`count_off`]; the twin under `cfg(smc_weak)` must fail the models.
#[cfg(not(smc_weak))]
const OFF: Ordering = Ordering::AcqRel;
#[cfg(smc_weak)]
const OFF: Ordering = Ordering::Relaxed;

/// The ordering of [`is_only`]; likewise.
#[cfg(not(smc_weak))]
const ALONE: Ordering = Ordering::Acquire;
#[cfg(smc_weak)]
const ALONE: Ordering = Ordering::Relaxed;

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
