//! TCP connections that move their bytes through memory.
//!
//! Programs use [`net`], which is like `std::net`, and perhaps [`stats`]; what these show of other modules ([`reason`],
//! [`LinkGroup`]) is part of it. All the rest is the engine that they and the shim, `libsmc.so`, have in common: it is
//! public for the shim's sake, and may change with any version.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`net`] | streams and listeners for programs |
//! | [`conn`] | one connection: both directions, the switch to the ring and back, waiting |
//! | [`ring`] | the byte ring |
//! | [`smcr`] | SMC-R between hosts: what to say and what to make of what is heard; no I/O |
//! | [`wait`] | the doorbell's arming protocol |
//! | [`mem`], [`lgr`] | shared segments, the connection page, buffers; link groups |
//! | [`section`] | where a signal handler of the program's may run, and where it waits |
//! | [`handshake`], [`wire`] | finding the peer without a byte in the TCP stream; CLC messages |
//! | [`option`] | whether a peer on another host speaks SMC |
//! | [`arena`] | what must survive fork, and what `smc ss` shows |
//! | [`config`], [`report`], [`reason`] | settings; what a process tells; why a connection is on TCP |
//! | [`stats`] | reading the counters of this host's processes: `smc ss`, `smc stats` |
//! | [`sys`], [`rawsys`], [`sync`], [`once`] | the doors to the kernel and to atomics; values made at first use |
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(not(smc_loom))]
pub mod arena;
#[cfg(not(smc_loom))]
pub mod config;
#[cfg(not(smc_loom))]
pub mod conn;
#[cfg(all(test, not(smc_loom)))]
mod explore;
pub mod fd;
pub mod handshake;
pub mod internal_fds;
pub mod lgr;
#[cfg(not(smc_loom))]
pub mod lock;
pub mod mem;
#[cfg(all(test, smc_loom))]
mod models;
#[cfg(not(smc_loom))]
pub mod net;
#[cfg(not(smc_loom))]
pub mod once;
#[cfg(not(smc_loom))]
pub mod option;
pub mod rawsys;
pub mod reason;
pub mod remote;
#[cfg(not(smc_loom))]
pub mod report;
pub mod ring;
mod rules;
#[cfg(not(smc_loom))]
pub mod section;
pub mod smcr;
#[cfg(not(smc_loom))]
pub mod stats;
pub mod sync;
#[cfg(not(smc_loom))]
pub mod sys;
pub mod wait;
pub mod wire;

pub use lgr::LinkGroup;
