//! Which fd numbers of this process are ours, so that a program that closes "all" fds does not close them.
//!
//! A fixed bitmap by number, without locks: it is looked at by `close`, `dup2`, `close_range`, also between
//! fork and exec.
//!
//! Ours are numbered high, but below the program's limit. When its own numbers come near ([`alarm`]) the shim
//! gives ours back, and takes none ([`is_tight`]) until there is room again.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::*};

/// Numbers above this are not protected.
const MAX: usize = 1 << 20;
static BITS: [AtomicU64; MAX / 64] = [const { AtomicU64::new(0) }; MAX / 64];
static COUNT: AtomicU64 = AtomicU64::new(0);
static ALARM: AtomicI32 = AtomicI32::new(i32::MAX);
static TIGHT: AtomicBool = AtomicBool::new(false);

/// Marks `fd` as ours.
pub fn add(fd: i32) {
    mark(fd);
    // ORDERING [fds.alarm] AcqRel; pairs with the swap in `set_alarm`. Carries: the bit.
    ALARM.fetch_min(before(fd), AcqRel);
}

fn mark(fd: i32) {
    if let Some(w) = BITS.get(fd as usize / 64)
        && w.fetch_or(1 << (fd as usize % 64), Relaxed) & (1 << (fd as usize % 64)) == 0
    {
        COUNT.fetch_add(1, Relaxed);
    }
}

/// Some numbers before `lowest`: from there on the program's are too close to ours.
fn before(lowest: i32) -> i32 {
    lowest - (lowest / 8).max(8)
}

/// A number of the program's from this on calls for giving back some of ours.
#[inline]
pub fn alarm() -> i32 {
    // Relaxed: an estimate, that may be too low or late.
    ALARM.load(Relaxed)
}

/// Of those that are ours, the numbers that a forked child is not to keep open: what is behind them ends with the
/// process that made them.
static OWN: [AtomicU64; MAX / 64] = [const { AtomicU64::new(0) }; MAX / 64];

/// As [`add`], for one that a forked child closes. It can't be given back, so it does not count for the alarm.
pub fn add_unshared(fd: i32) {
    mark(fd);
    if let Some(w) = OWN.get(fd as usize / 64) {
        w.fetch_or(1 << (fd as usize % 64), Relaxed);
    }
}

/// In a forked child: closes what is its parent's alone.
#[cfg(not(smc_loom))]
pub fn close_unshared() {
    let mut at = 0;
    while let Some(fd) = next(at) {
        at = fd + 1;
        if is_unshared(fd) {
            remove(fd as i32);
            crate::sys::close(fd as i32);
        }
    }
}

fn is_unshared(fd: u32) -> bool {
    OWN.get(fd as usize / 64).is_some_and(|w| w.load(Relaxed) & 1 << (fd % 64) != 0)
}

/// Ours have become fewer: the alarm is what the rest asks for.
pub fn set_alarm() {
    // ORDERING [fds.alarm] AcqRel; pairs with the `fetch_min` in `add`: what was lost here is seen by `next`.
    ALARM.swap(i32::MAX, AcqRel);
    let mut lowest = next(0);
    while let Some(fd) = lowest.filter(|fd| is_unshared(*fd)) {
        lowest = next(fd + 1);
    }
    if let Some(lowest) = lowest {
        ALARM.fetch_min(before(lowest as i32), AcqRel);
    }
}

/// Whether the program needs its numbers for itself.
#[inline]
pub fn is_tight() -> bool {
    // Relaxed: a hint.
    TIGHT.load(Relaxed)
}

/// See [`is_tight`].
pub fn set_tight(on: bool) {
    TIGHT.store(on, Relaxed);
}

/// `fd` is about to be closed by ourselves.
pub fn remove(fd: i32) {
    if let Some(w) = OWN.get(fd as usize / 64) {
        w.fetch_and(!(1 << (fd as usize % 64)), Relaxed);
    }
    if let Some(w) = BITS.get(fd as usize / 64)
        && w.fetch_and(!(1 << (fd as usize % 64)), Relaxed) & (1 << (fd as usize % 64)) != 0
    {
        COUNT.fetch_sub(1, Relaxed);
    }
}

/// Whether `fd` is ours.
#[inline]
pub fn contains(fd: i32) -> bool {
    fd >= 0 && BITS.get(fd as usize / 64).is_some_and(|w| w.load(Relaxed) & (1 << (fd as usize % 64)) != 0)
}

/// How many are ours.
pub fn count() -> u64 {
    COUNT.load(Relaxed)
}

/// The lowest internal fd number `>= from`, if any.
pub fn next(from: u32) -> Option<u32> {
    if count() == 0 {
        return None;
    }
    let mut i = from as usize / 64;
    let mut w = BITS.get(i)?.load(Relaxed) & (!0u64 << (from % 64));
    loop {
        if w != 0 {
            return Some((i * 64) as u32 + w.trailing_zeros());
        }
        i += 1;
        w = BITS.get(i)?.load(Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn finds_what_was_added() {
        // Far from the numbers that other tests of this process open.
        let (a, b) = (900_070, 905_000);
        super::add(a);
        super::add(b);
        assert!(super::contains(a) && !super::contains(a + 1));
        assert_eq!(super::next(900_000), Some(a as u32));
        assert_eq!(super::next(a as u32 + 1), Some(b as u32));
        assert!(super::alarm() < a);
        super::remove(a);
        super::remove(b);
        assert_eq!(super::next(900_000), None);
        super::add_unshared(900_003);
        assert!(super::contains(900_003));
        super::set_alarm();
        // Others of this process may have numbers of their own meanwhile.
        assert_ne!(super::alarm(), super::before(900_003), "it can't be given back");
        super::remove(900_003);
        assert!(!super::is_unshared(900_003));
        super::set_alarm();
        assert!(super::next(0).map_or(i32::MAX, |n| n as i32) >= super::alarm());
    }
}
