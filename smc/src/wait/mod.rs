//! Waiting: polling mode and interrupt mode, as NAPI has them.
//!
//! While a side looks at the ring its peer only publishes cursors. Before it sleeps it *arms*: sets its
//! armed bit, fences, looks once more. The peer publishes, fences, looks at the bits; one of the two sees
//! the other's store, so no wake-up is lost and none depends on a timer.

pub mod doorbell;
#[cfg(not(smc_loom))]
pub mod polling;
pub mod sleepers;
