//! Threads that sleep in the kernel on an epoll set, and whether what the kernel gives them needs translation.
//!
//! The hard idea: a set is *watched* from the moment the kernel is given data of ours for it. A thread that sleeps does so
//! either knowing that, and translates what it gets, or counted, and then whoever gave the kernel our data knows of it and
//! has it woken by the doorbells. It counts itself and looks; the other says so, fences, and looks at the count.

use crate::sync::{AtomicU32, LoadSeqCst, Ordering::*, fence};

/// Of one set.
#[derive(Debug)]
pub struct Sleepers {
    /// The kernel knows members under our data, or did.
    watching: AtomicU32,
    /// Threads asleep in the kernel on this set, or about to be.
    asleep: AtomicU32,
}

impl Sleepers {
    /// None, and the kernel has the program's data.
    #[cfg(not(smc_loom))]
    #[must_use]
    pub const fn new() -> Self {
        Sleepers { watching: AtomicU32::new(0), asleep: AtomicU32::new(0) }
    }

    /// The same; loom's atomics are made at run time.
    #[cfg(smc_loom)]
    #[must_use]
    pub fn new() -> Self {
        Sleepers { watching: AtomicU32::new(0), asleep: AtomicU32::new(0) }
    }

    /// As new, for a set that nobody has yet.
    pub fn reset(&self) {
        self.watching.store(0, Relaxed);
        self.forget();
    }

    /// In a forked child, which has no other thread.
    pub fn forget(&self) {
        self.asleep.store(0, Relaxed);
    }

    /// Whether results may carry our data.
    #[inline]
    pub fn is_watching(&self) -> bool {
        self.watching.load_seq_cst() != 0
    }

    /// Before the kernel is given our data for the first time.
    pub fn watch(&self) {
        if self.watching.load(Relaxed) == 0 {
            self.watching.store(1, SeqCst);
        }
        // ORDERING [epoll.watch] fence; pairs with the SeqCst increment in `fall_asleep`. Here: store
        // watching, load asleep. There: store asleep, load watching. Either the sleeper translates what it
        // gets, or we know of it. Model: loom_watch_against_a_sleeper.
        #[cfg(not(smc_weak))]
        fence(SeqCst);
    }

    /// A thread is about to sleep in the kernel, unless it finds the set watched after this.
    #[inline]
    pub fn fall_asleep(&self) {
        // ORDERING [epoll.watch] SeqCst; pairs with the fence in `watch`.
        self.asleep.fetch_add(1, SeqCst);
    }

    /// It is back.
    #[inline]
    pub fn wake_up(&self) {
        // Never below zero: a forked child starts at none.
        let _ = self.asleep.fetch_update(SeqCst, Relaxed, |n| n.checked_sub(1));
    }

    /// Whether threads sleep.
    #[inline]
    pub fn are_there(&self) -> bool {
        // Not as in `is_watching`: here the fence in `watch` is what counts, in the model too.
        self.asleep.load(SeqCst) != 0
    }
}

impl Default for Sleepers {
    fn default() -> Self {
        Self::new()
    }
}
