//! Verbs for libsmc: what a link of SMC-R is made of.
//!
//! | module | one object of verbs each |
//! | --- | --- |
//! | [`device`] | a device, its ports and their GIDs; what it tells of itself (async events) |
//! | [`memory`] | memory that the device may read and a peer may write |
//! | [`completion`] | a completion queue and the channel that wakes a sleeper |
//! | [`queue_pair`] | an RC queue pair, from RESET to RTS and to its end |
//! | [`session`] | all of them: one connection, of a client or a server |
//! | [`service`] | the thread behind `libsmc.so`: all of a process's connections to other hosts |
//!
//! This is a library of its own, loaded when the first link to another host is wanted: `libsmc.so` has no need of
//! rdma-core. What is loaded is asked for its [`smc_rdma_abi`] first.
//!
//! Lifetimes are counted: a queue pair holds its completion queue, its protection domain and every region that was
//! attached to it, these hold the device. So destroying works in any order, and nothing is unmapped under a device.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod completion;
pub mod device;
pub mod memory;
pub mod queue_pair;
pub mod service;
pub mod session;

use std::io;

/// Version of what this library offers to libsmc.
pub const ABI: u32 = smc::remote::ABI;

/// The version, for who has loaded this by name.
// SAFETY: no other symbol of this name is linked: it is the library's own prefix.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub extern "C" fn smc_rdma_abi() -> u32 {
    ABI
}

/// The error of a verb that sets errno.
fn failed(verb: &str) -> io::Error {
    let e = io::Error::last_os_error();
    io::Error::new(e.kind(), format!("{verb}: {e}"))
}

/// The error of a verb that returns errno.
fn check(verb: &str, errno: i32) -> io::Result<()> {
    if errno == 0 {
        return Ok(());
    }
    let e = io::Error::from_raw_os_error(errno.abs());
    Err(io::Error::new(e.kind(), format!("{verb}: {e}")))
}
