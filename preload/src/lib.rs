//! libsmc.so: the shim. It knows sockets and libc, no protocol; the engine knows the protocol, no libc.
//!
//! A hook is a few lines: look the fd up, handle or call libc's own, map the result. For an fd that is not
//! ours that is one load and one branch. The shim prints nothing, starts no thread and opens no file unless
//! asked to; it uses its own memory ([`alloc`]), never the program's malloc, so that a hook may run in a
//! signal handler that interrupted malloc.

#![cfg_attr(test, allow(dead_code, reason = "hooks are exported outside tests only"))]

mod alloc;
mod deep;
mod fd_table;
mod hook;
mod hooks;
mod probes;
mod real;
mod remote;

#[cfg(not(test))]
#[global_allocator]
static ALLOC: alloc::Own = alloc::Own;

/// Tells a program that is linked with the engine itself (`smc::net`) that the shim is here, which then has all of the
/// connections. The number is that of what both agree on.
#[cfg(not(test))]
#[unsafe(no_mangle)]
pub extern "C" fn smc_preload_version() -> u32 {
    1
}
