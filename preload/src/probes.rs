//! Functions for uprobes: they do nothing, and are called when something becomes of a connection.
//!
//! ```text
//!  bpftrace -e 'uprobe:/usr/lib/x86_64-linux-gnu/libsmc.so:smc_probe_fallback { printf("%d -> %d: %x\n", arg0, arg1, arg2) }'
//! ```
//!
//! Names and arguments are a contract (docs/TROUBLESHOOTING.md). They are exported, so that they are found in a library
//! that was stripped; each has a number of its own in it, so that no linker makes one of the three.

use std::hint::black_box;

use engine::report::{Probes, set_probes};

/// A connection is in the ring, for the first time: local port, peer's port, bytes in a ring.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn smc_probe_upgraded(_local: u32, _peer: u32, _ring: u32) {
    black_box(1u32);
}

/// A direction goes back to TCP: local port, peer's port, the code of the reason or 0.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn smc_probe_downgraded(_local: u32, _peer: u32, _reason: u32) {
    black_box(2u32);
}

/// A connection stays on TCP: local port, peer's port, the code of the reason.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn smc_probe_fallback(_local: u32, _peer: u32, _reason: u32) {
    black_box(3u32);
}

/// Called once, before the first connection.
pub fn start() {
    set_probes(Probes {
        upgraded: smc_probe_upgraded,
        downgraded: smc_probe_downgraded,
        fallback: smc_probe_fallback,
    });
}
