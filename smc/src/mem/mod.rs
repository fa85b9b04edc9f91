//! Memory that two processes share: mappings, their layout, and how they are cut into buffers.

pub mod layout;
pub mod region;
pub mod rmb;
#[cfg(not(smc_loom))]
pub mod short;
