//! The only door to atomics: std's, or loom's under `--cfg smc_loom`.
//!
//! Protocol code (`ring`, `wait/doorbell`, `handshake/switch`) names these types only, so that the very
//! code that ships is what the loom models run.

#[cfg(not(smc_loom))]
pub use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, fence};

#[cfg(smc_loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, fence};

pub use std::sync::atomic::Ordering;

/// The atomics of the connection page. In the engine's own tests they stop before each access, where
/// `explore` lets the other end go on; everywhere else they are those above.
pub mod page {
    #[cfg(all(test, not(smc_loom)))]
    pub use crate::explore::traced::{AtomicU32, AtomicU64};

    #[cfg(not(all(test, not(smc_loom))))]
    pub use super::{AtomicU32, AtomicU64};
}
