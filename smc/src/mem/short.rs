//! No memory: whether the process has been refused address space for small things.
//!
//! The shim's allocator then lives on what it has kept back (`preload/src/alloc.rs`), which is enough for the connections
//! that are in the ring and for no others: no upgrade begins until the kernel maps memory again.
#![allow(unsafe_code)]

use crate::rawcall;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Relaxed throughout: a hint.
static SHORT: AtomicBool = AtomicBool::new(false);

/// As much as the allocator asks for at once, four times over.
const PROBE: usize = 256 << 10;

/// A mapping was refused.
pub fn note() {
    SHORT.store(true, Relaxed);
}

/// Whether mappings are refused.
#[inline]
pub fn is_short() -> bool {
    SHORT.load(Relaxed) && !recovers()
}

/// Whether there is memory again.
#[cold]
fn recovers() -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new private mapping at an address the kernel chooses.
    let Ok(at) = (unsafe { rawcall!(libc::SYS_mmap, 0, PROBE, prot, flags, -1isize, 0) }) else {
        return false;
    };
    // SAFETY: mapped just now, and used by nobody.
    let _ = unsafe { rawcall!(libc::SYS_munmap, at, PROBE) };
    SHORT.store(false, Relaxed);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_short_recovers_when_there_is_memory() {
        assert!(!is_short());
        note();
        assert!(SHORT.load(Relaxed));
        assert!(!is_short());
        assert!(!SHORT.load(Relaxed));
    }
}
