//! How long calls that are not to wait may wait for peers, all connections of the process together.
//!
//! A call that is not to wait may have to for what a correct peer does within a moment: TCP takes the last bytes of a
//! ring before a close. A peer that means harm, or a thousand of them, would stop a program that way for each
//! connection anew. So these waits draw on one account: it holds [`MOST`], and fills up again by one 64th of the
//! time that goes by.

use crate::sync::{AtomicU64, Ordering::Relaxed};
use crate::sys;

/// What a full account holds, in nanoseconds.
const MOST: u64 = 6_000_000_000;
/// Nanoseconds that go by until one that was spent is back.
const PRICE: u64 = 64;
/// Granted even where nothing is left.
const LEAST: u64 = 50_000_000;

/// A poll at most.
const ROUND: u64 = 100_000_000;

/// When the account will be full again.
static FULL_AT: AtomicU64 = AtomicU64::new(0);

/// What may be spent at `now`, of `want`.
fn granted(full_at: u64, now: u64, want: u64) -> u64 {
    let left = MOST.saturating_sub(full_at.saturating_sub(now) / PRICE);
    want.min(left.max(LEAST))
}

/// When an account that was full, or will be, at `full_at` is so after `ns` more were spent until `now`.
fn after(full_at: u64, now: u64, ns: u64) -> u64 {
    full_at.max(now).saturating_add(ns.saturating_mul(PRICE)).min(now.saturating_add(MOST * PRICE))
}

/// What is left of a wait, in nanoseconds.
#[derive(Debug)]
pub(super) struct Patience(u64);

impl Patience {
    /// For up to `want` nanoseconds in all, as far as the account allows.
    pub(super) fn new(want: u64) -> Self {
        // Relaxed, here and below: a sum that carries nothing else.
        Patience(granted(FULL_AT.load(Relaxed), sys::now_ns(), want))
    }

    /// poll(2), which a signal may end early; whether something is ready. `None`: the time is over.
    pub(super) fn poll(&mut self, list: &mut [libc::pollfd]) -> Option<bool> {
        let mut r = 0;
        self.sleep(ROUND, |ns| r = sys::poll(list, Some(ns))).then_some(r > 0)
    }

    /// Calls `f` with how long it may sleep, `round` at most; false: the time is over.
    pub(super) fn sleep(&mut self, round: u64, f: impl FnOnce(u64)) -> bool {
        if self.0 == 0 {
            return false;
        }
        let start = sys::now_ns();
        f(self.0.min(round));
        let now = sys::now_ns();
        let spent = now.saturating_sub(start);
        self.0 = self.0.saturating_sub(spent);
        let _ = FULL_AT.fetch_update(Relaxed, Relaxed, |at| Some(after(at, now, spent)));
        true
    }

    /// Sleeps for a moment; false: the time is over.
    pub(super) fn nap(&mut self) -> bool {
        const NAP: u64 = 50_000;
        let rest = self.0;
        self.0 = NAP.min(rest);
        let slept = self.poll(&mut []).is_some();
        self.0 = rest.saturating_sub(NAP);
        slept
    }

    /// What was ready was of no use: as if a round had been waited.
    pub(super) fn tire(&mut self) {
        self.0 = self.0.saturating_sub(ROUND);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_waits_in_vain_cost_a_64th_of_the_time() {
        const WANT: u64 = 5_000_000_000;
        let (mut full_at, mut now, mut waited) = (0, 1u64 << 40, 0u64);
        let start = now;
        for _ in 0..10_000 {
            let ns = granted(full_at, now, WANT);
            assert!(ns >= LEAST);
            now += ns;
            waited += ns;
            full_at = after(full_at, now, ns);
            // The program does something else.
            now += 1_000_000_000;
        }
        assert!(waited <= MOST + (now - start) / PRICE + 10_000 * LEAST, "{waited} of {}", now - start);
    }

    #[test]
    fn who_has_not_waited_has_all_of_it() {
        assert_eq!(granted(0, 5, MOST), MOST);
        let full_at = after(0, 1000, MOST);
        assert_eq!(granted(full_at, 1000, MOST), LEAST);
        assert_eq!(granted(full_at, 1000 + MOST * PRICE, MOST), MOST);
    }
}
