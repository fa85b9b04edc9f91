//! The only door to atomics: std's, or loom's under `--cfg smc_loom`.
//!
//! Protocol code (`ring`, `wait/doorbell`, `handshake/switch`) names these types only, so that the very
//! code that ships is what the loom models run.

#[cfg(not(smc_loom))]
pub use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, fence};

#[cfg(smc_loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, fence};

pub use std::sync::atomic::Ordering;

/// The atomics of the connection page. In the engine's own tests they stop before each access, where
/// `explore` lets the other end go on; everywhere else they are those above.
pub mod page {
    #[cfg(all(test, not(smc_loom)))]
    pub use crate::explore::traced::{AtomicU32, AtomicU64};

    #[cfg(not(all(test, not(smc_loom))))]
    pub use super::{AtomicU32, AtomicU64};
}

/// Loads that are SeqCst.
///
/// loom takes SeqCst accesses for AcqRel ones and knows SeqCst fences. There a fence before the load stands for what
/// SeqCst is for: a load does not miss a SeqCst store that came before it. It is more than that, for it covers stores of
/// any ordering; so that the stores on both sides are SeqCst is said where they are, and no model sees it.
/// The weakened twin (`cfg(smc_weak)`) is the load as loom takes it.
pub trait LoadSeqCst {
    /// What it holds.
    type Value;

    /// Loads it.
    fn load_seq_cst(&self) -> Self::Value;
}

impl LoadSeqCst for AtomicU32 {
    type Value = u32;

    #[inline(always)]
    fn load_seq_cst(&self) -> u32 {
        #[cfg(all(smc_loom, not(smc_weak)))]
        fence(Ordering::SeqCst);
        self.load(Ordering::SeqCst)
    }
}

impl<T> LoadSeqCst for AtomicPtr<T> {
    type Value = *mut T;

    #[inline(always)]
    fn load_seq_cst(&self) -> *mut T {
        #[cfg(all(smc_loom, not(smc_weak)))]
        fence(Ordering::SeqCst);
        self.load(Ordering::SeqCst)
    }
}
