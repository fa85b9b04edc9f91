//! TCP connections that move their bytes through memory.
//!
//! Programs use [`net`], which is like `std::net`, and perhaps [`stats`], [`LinkGroup`] and [`reason`]. All the rest is
//! the engine that they and the shim, `libsmc.so`, have in common: it is public for the shim's sake, hidden in these pages,
//! and may change with any version.
//!
//! | module | what lives there |
//! | --- | --- |
//! | [`net`] | streams and listeners for programs |
//! | [`stats`] | reading the counters of this host's processes: `smc ss`, `smc stats` |
//! | [`reason`] | why a connection is on TCP |
//! | `conn` | one connection: both directions, the switch to the ring and back, waiting |
//! | `ring` | the byte ring |
//! | `smcr` | SMC-R between hosts: what to say and what to make of what is heard; no I/O |
//! | `wait` | the doorbell's arming protocol |
//! | `mem`, `lgr` | shared segments, the connection page, buffers; [`LinkGroup`] |
//! | `section` | where a signal handler of the program's may run, and where it waits |
//! | `handshake`, `wire` | finding the peer without a byte in the TCP stream; CLC messages |
//! | `option`, `remote` | whether a peer on another host speaks SMC; the service that carries connections there |
//! | `arena` | what must survive fork, and what `smc ss` shows |
//! | `config`, `report` | settings; what a process tells |
//! | `counts` | who uses a thing, and who may take it away |
//! | `sys`, `rawsys`, `sync`, `once`, `lock`, `fd`, `internal_fds` | the doors to the kernel and to atomics; values made at first use; locks; descriptors of ours |
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod arena;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod config;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod conn;
#[doc(hidden)]
pub mod counts;
#[cfg(all(test, not(smc_loom)))]
mod explore;
#[doc(hidden)]
pub mod fd;
#[doc(hidden)]
pub mod gate;
#[doc(hidden)]
pub mod handshake;
#[doc(hidden)]
pub mod internal_fds;
#[doc(hidden)]
pub mod lgr;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod mem;
#[cfg(all(test, smc_loom))]
mod models;
#[cfg(not(smc_loom))]
pub mod net;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod once;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod option;
#[doc(hidden)]
pub mod rawsys;
pub mod reason;
#[doc(hidden)]
pub mod remote;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod report;
#[doc(hidden)]
pub mod ring;
mod rules;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod section;
#[doc(hidden)]
pub mod smcr;
#[cfg(not(smc_loom))]
pub mod stats;
#[doc(hidden)]
pub mod sync;
#[cfg(not(smc_loom))]
#[doc(hidden)]
pub mod sys;
#[doc(hidden)]
pub mod wait;
#[doc(hidden)]
pub mod wire;

pub use lgr::{LgrKey, LinkGroup, Owner};
