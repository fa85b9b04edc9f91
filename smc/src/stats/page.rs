//! Sums over connections that are gone.
//!
//! One page lies in the arena's first page, shared by all processes that share the arena (`smc stats`);
//! another one in a process's own memory serves `SMC_STATS`. Words only grow; they are counters, so Relaxed
//! everywhere: nothing is read because of them.

use crate::arena::Slot;
use crate::stats::Totals;
use crate::sync::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Where the page lies in the arena's first page.
pub const TOTALS_OFFSET: usize = 1024;

/// Different reasons that are counted; those that come later are not.
const REASONS: usize = 64;

/// How often one reason was given.
#[derive(Debug)]
#[repr(C)]
pub struct ReasonCount {
    /// Code of the reason, 0: this entry is free.
    pub code: AtomicU32,
    /// How often.
    pub count: AtomicU32,
}

/// The sums. Zero is a valid start, so untouched memory will do.
#[derive(Debug)]
#[repr(C)]
pub struct TotalsPage {
    /// Connections by best mode: TCP, SHM, RDMA.
    pub connections: [AtomicU64; 3],
    /// Bytes sent, by mode.
    pub tx: [AtomicU64; 3],
    /// Bytes received, by mode.
    pub rx: [AtomicU64; 3],
    /// Waits that ended by polling.
    pub polled: AtomicU64,
    /// Waits that slept.
    pub slept: AtomicU64,
    /// Doorbells rung.
    pub doorbells: AtomicU64,
    /// Upgrades.
    pub upgrades: AtomicU64,
    /// Ways back to TCP.
    pub downgrades: AtomicU64,
    /// Reasons, each in the first entry that had its code or none.
    pub fallback: [ReasonCount; REASONS],
}

/// Bytes a [`TotalsPage`] takes.
pub const TOTALS_SIZE: usize = 14 * 8 + REASONS * 8;

const _: () = {
    assert!(size_of::<TotalsPage>() == TOTALS_SIZE);
    assert!(size_of::<crate::arena::Header>() <= TOTALS_OFFSET);
    assert!(TOTALS_OFFSET + TOTALS_SIZE <= crate::arena::HEADER_SIZE);
};

impl Default for TotalsPage {
    fn default() -> Self {
        Self::new()
    }
}

impl TotalsPage {
    /// All zero.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            connections: [const { AtomicU64::new(0) }; 3],
            tx: [const { AtomicU64::new(0) }; 3],
            rx: [const { AtomicU64::new(0) }; 3],
            polled: AtomicU64::new(0),
            slept: AtomicU64::new(0),
            doorbells: AtomicU64::new(0),
            upgrades: AtomicU64::new(0),
            downgrades: AtomicU64::new(0),
            fallback: [const { ReasonCount { code: AtomicU32::new(0), count: AtomicU32::new(0) } }; REASONS],
        }
    }

    /// Adds a connection whose last holder lets go of it now.
    pub fn add(&self, slot: &Slot) {
        let best = (slot.best.load(Relaxed) as usize).min(2);
        let ring = |cursor: u64| cursor & !crate::mem::layout::LEFT;
        let add = |to: &AtomicU64, n: u64| _ = to.fetch_add(n, Relaxed);
        add(&self.connections[best], 1);
        add(&self.tx[best], ring(slot.tx.prod.load(Relaxed)));
        add(&self.rx[best], ring(slot.rx.cons.load(Relaxed)));
        add(&self.tx[0], slot.tx.tcp.load(Relaxed));
        add(&self.rx[0], slot.rx.tcp.load(Relaxed));
        add(&self.polled, slot.wait.polled.load(Relaxed));
        add(&self.slept, slot.wait.slept.load(Relaxed));
        add(&self.doorbells, slot.wait.doorbells.load(Relaxed));
        add(&self.upgrades, slot.upgrades.load(Relaxed).into());
        add(&self.downgrades, slot.downgrades.load(Relaxed).into());
        // A reason from before a successful upgrade is no fallback.
        if best == 0 || slot.downgrades.load(Relaxed) > 0 {
            self.fallback(slot.reason.load(Relaxed));
        }
    }

    /// Counts a reason; 0 is none.
    pub fn fallback(&self, code: u32) {
        if code == 0 {
            return;
        }
        for entry in &self.fallback {
            let seen = entry.code.load(Relaxed);
            let now = match seen {
                // Somebody else may take the free entry first, perhaps for the same reason.
                0 => entry.code.compare_exchange(0, code, Relaxed, Relaxed).map_or_else(|now| now, |_| code),
                seen => seen,
            };
            if now == code {
                entry.count.fetch_add(1, Relaxed);
                return;
            }
        }
    }

    /// The sums as they are now.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let three = |a: &[AtomicU64; 3]| [a[0].load(Relaxed), a[1].load(Relaxed), a[2].load(Relaxed)];
        let mut t = Totals {
            connections: three(&self.connections),
            tx: three(&self.tx),
            rx: three(&self.rx),
            polled: self.polled.load(Relaxed),
            slept: self.slept.load(Relaxed),
            doorbells: self.doorbells.load(Relaxed),
            upgrades: self.upgrades.load(Relaxed),
            downgrades: self.downgrades.load(Relaxed),
            ..Totals::default()
        };
        for e in &self.fallback {
            let (code, n) = (e.code.load(Relaxed), e.count.load(Relaxed));
            if code != 0 && n != 0 {
                t.fallback.insert(code, n.into());
            }
        }
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_one_by_one_and_none_is_not() {
        let page = TotalsPage::new();
        [5, 0, 9, 5].into_iter().for_each(|code| page.fallback(code));
        assert_eq!(page.totals().fallback, [(5, 2), (9, 1)].into());
    }

    #[test]
    fn more_reasons_than_entries_are_left_out() {
        let page = TotalsPage::new();
        (1..=REASONS as u32 + 9).for_each(|code| page.fallback(code));
        assert_eq!(page.totals().fallback.len(), REASONS);
    }
}
