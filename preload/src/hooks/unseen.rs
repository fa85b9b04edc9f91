//! Rings of io_uring that were made by instructions.
//!
//! What the rings of syscall(2) and of liburing's functions do is seen ([`super::uring`], [`super::liburing`]). A program
//! that has liburing linked into it, or found its functions by dlsym(3), makes and enters rings of which no hook hears,
//! and may give them a connection that it has used by libc's calls until then. But a ring is a descriptor. So before a
//! connection is upgraded, descriptors that we have not seen made are looked at. If one of them is a ring, the connection
//! stays on TCP, and all others go there for good, as with a ring of syscall(2).
//!
//! A look makes no more than [`MOST`] system calls, or twice as many, of which none waits for a file system. It goes on
//! where the last one has ended: most programs have fewer descriptors that are no sockets, so that one look sees them
//! all. A process in which liburing itself is called is not looked at, for there a ring is nothing unknown.
//!
//! Not found: rings that are made after the last connection was upgraded, and where there is no /proc.

use super::direct::{go_quiet, why_quiet};
use crate::fd_table;
use engine::reason::Reason;
use engine::{conn, internal_fds, sys};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// Numbers that the kernel is asked of in one look.
const MOST: u32 = 32;
/// As many free numbers above all that we know: there is nothing behind them. (A new descriptor gets the lowest that is
/// free.)
const GAP: u32 = 4;
/// Where the next look begins.
static NEXT: AtomicU32 = AtomicU32::new(0);
/// One has been found.
static FOUND: AtomicBool = AtomicBool::new(false);
/// It has been found, and there may be connections that are to go to TCP.
static DUE: AtomicBool = AtomicBool::new(false);

/// Before main.
pub fn start() {
    conn::on_handshake(before_handshake);
}

/// What speaks against upgrading a connection, which is in the table. It may be called under locks.
fn before_handshake() -> Option<Reason> {
    if let Some(why) = why_quiet() {
        return Some(why);
    }
    // Relaxed, here and below: any thread may find it, once more or a little later.
    if !FOUND.load(Relaxed) {
        if super::liburing::is_used() || !is_there_one() {
            return None;
        }
        FOUND.store(true, Relaxed);
        DUE.store(true, Relaxed);
    }
    Some(Reason::AsyncIo)
}

/// Under no lock: what is to follow when one has been found.
pub fn follow() {
    if DUE.load(Relaxed) && DUE.swap(false, Relaxed) {
        go_quiet(Reason::AsyncIo);
    }
}

/// Whether one of the numbers whose turn it is names a ring that nobody has told us of.
fn is_there_one() -> bool {
    let known = fd_table::all_numbers();
    // Relaxed: two threads may look at the same numbers.
    let (start, mut asked, mut gap) = (NEXT.load(Relaxed), 0, 0);
    let mut at = start;
    loop {
        if !fd_table::is_foreign(at as i32)
            || fd_table::is_tcp(at as i32)
            || internal_fds::contains(at as i32)
        {
            gap = 0;
        } else {
            let flags = sys::getfl(at as i32);
            asked += 1;
            gap = if flags < 0 { gap + 1 } else { 0 };
            // A ring's are O_RDWR. The name takes longer.
            if flags >= 0 && flags as i32 & libc::O_ACCMODE == libc::O_RDWR && sys::is_ring(at as i32) {
                return true;
            }
        }
        at += 1;
        if at >= known && gap >= GAP {
            // All of them have been looked at, if it began with the first.
            if start == 0 {
                break;
            }
            (at, gap) = (0, 0);
        }
        if asked >= MOST || at == start {
            break;
        }
    }
    NEXT.store(if asked >= MOST { at } else { 0 }, Relaxed);
    false
}
