//! A seat: the counted word that says whether a link group can be joined, and who must clear it away.
//!
//! ```text
//!            reserve            publish              join            leave (not last)
//!  (nothing) ───────▶ RESERVED ───────▶ LIVE, n = 1 ─────▶ n + 1 … n ─────▶ n - 1
//!                        │                  │ leave (last): takes the value out
//!                        ▼ dropped          ▼
//!                     (nothing)           GONE: n = 0, never joined again
//!
//!  terminate: LIVE ─▶ LIVE + TERMINATED: no more joins; members stay until they leave.
//! ```
//!
//! The hard idea: while `n` is above zero the value is there and nobody changes it, so a member may look at it
//! without a lock; whoever brings `n` to zero is alone with it, and takes it out. A reader who found the seat
//! through a list that is being changed may join late, or not at all, but never finds half a value:
//! two-stage add, and access against termination, are this one word. (Lessons: RDMA/cm 2020, net/smc 2021.)

#![allow(unsafe_code)]

use crate::sync::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use cell::Slot;

const TERMINATED: u64 = 1 << 63;
const LIVE: u64 = 1 << 62;
const COUNT: u64 = LIVE - 1;

/// Orderings of the two edges; the twin under `cfg(smc_weak)` must fail the models below.
#[cfg(not(smc_weak))]
const PUBLISH: crate::sync::Ordering = Release;
#[cfg(smc_weak)]
const PUBLISH: crate::sync::Ordering = Relaxed;
#[cfg(not(smc_weak))]
const LEAVE: crate::sync::Ordering = AcqRel;
#[cfg(smc_weak)]
const LEAVE: crate::sync::Ordering = Relaxed;

/// What [`Seat::look`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look<T> {
    /// Joined: the caller owes one [`Seat::leave`].
    Joined(T),
    /// Somebody is building what belongs here.
    Reserved,
    /// Terminated or gone; what is wanted must be built anew.
    Closed,
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Seat<T> {
    word: AtomicU64,
    /// `None` unless `word` counts a member. Written by `publish`, before anybody can join, and by the
    /// `leave` that brings the count to zero, after everybody left; read by members only.
    slot: Slot<T>,
}

// SAFETY: the slot is the only part that is not Sync by itself. Clones of the T in it are handed to other
// threads and the T itself may be dropped on another thread than it came from, hence both bounds. Access to it
// is ordered by the word as the file's head says.
unsafe impl<T: Send + Sync> Sync for Seat<T> {}

impl<T: Clone> Seat<T> {
    /// A reserved seat: found by others, joined by nobody.
    pub(crate) fn reserve() -> Self {
        Seat { word: AtomicU64::new(0), slot: Slot::new() }
    }

    /// Seats the value; the caller is the first member and owes one [`Seat::leave`].
    ///
    /// # Safety
    ///
    /// Called at most once in a seat's life.
    pub(crate) unsafe fn publish(&self, value: T) {
        // SAFETY: the word is RESERVED, so no member exists, and by the caller's promise no other publish.
        unsafe { self.slot.set(value) };
        // ORDERING [seat.publish] Release; pairs with the Acquire compare_exchange in look.
        // Carries: the value in the slot.
        self.word.store(LIVE | 1, PUBLISH);
    }

    /// Joins, if there is something to join.
    pub(crate) fn look(&self) -> Look<T> {
        let mut word = self.word.load(Relaxed);
        loop {
            if word == 0 {
                return Look::Reserved;
            }
            if word & TERMINATED != 0 || word & COUNT == 0 {
                return Look::Closed;
            }
            // ORDERING [seat.publish] Acquire; pairs with the Release store in publish (other joins and
            // leaves between are read-modify-writes and carry it on). Carries: the value in the slot.
            match self.word.compare_exchange_weak(word, word + 1, Acquire, Relaxed) {
                // SAFETY: we are counted, so nobody writes the slot until our leave.
                Ok(_) => return unsafe { self.slot.copy() }.map_or(Look::Closed, Look::Joined),
                Err(now) => word = now,
            }
        }
    }

    /// Leaves. The last to leave gets the value: it clears the seat away and drops what was seated.
    ///
    /// # Safety
    ///
    /// Once for each publish and each `Look::Joined`.
    pub(crate) unsafe fn leave(&self) -> Option<T> {
        // ORDERING [seat.leave] AcqRel; pairs with itself. Carries: each member's last look at the slot, to
        // the one who takes the value out.
        let before = self.word.fetch_sub(1, LEAVE);
        if before & COUNT != 1 {
            return None;
        }
        // SAFETY: the count is zero and LIVE stays set, so nobody joins and nobody publishes: we are alone.
        unsafe { self.slot.take() }
    }

    /// No more joins. True for the one call that did it.
    pub(crate) fn terminate(&self) -> bool {
        // Relaxed: it carries no data; the read-modify-write alone decides who was first.
        self.word.fetch_or(TERMINATED, Relaxed) & TERMINATED == 0
    }

    /// Whether [`Seat::terminate`] was called. A hint: it may be a moment old.
    pub(crate) fn is_terminated(&self) -> bool {
        self.word.load(Relaxed) & TERMINATED != 0
    }
}

#[cfg(not(smc_loom))]
mod cell {
    use std::cell::UnsafeCell;

    #[derive(Debug)]
    pub(super) struct Slot<T>(UnsafeCell<Option<T>>);

    impl<T: Clone> Slot<T> {
        pub(super) fn new() -> Self {
            Slot(UnsafeCell::new(None))
        }

        /// # Safety
        /// No other access to the slot at the same time.
        pub(super) unsafe fn set(&self, value: T) {
            // SAFETY: exclusive, by the caller's promise.
            unsafe { *self.0.get() = Some(value) }
        }

        /// # Safety
        /// No write to the slot at the same time.
        pub(super) unsafe fn copy(&self) -> Option<T> {
            // SAFETY: only read meanwhile, by the caller's promise.
            unsafe { (*self.0.get()).clone() }
        }

        /// # Safety
        /// No other access to the slot at the same time.
        pub(super) unsafe fn take(&self) -> Option<T> {
            // SAFETY: exclusive, by the caller's promise.
            unsafe { (*self.0.get()).take() }
        }
    }
}

/// loom's cell, which fails a model when accesses are not ordered.
#[cfg(smc_loom)]
mod cell {
    use loom::cell::UnsafeCell;

    #[derive(Debug)]
    pub(super) struct Slot<T>(UnsafeCell<Option<T>>);

    impl<T: Clone> Slot<T> {
        pub(super) fn new() -> Self {
            Slot(UnsafeCell::new(None))
        }

        /// # Safety
        /// No other access to the slot at the same time.
        pub(super) unsafe fn set(&self, value: T) {
            // SAFETY: exclusive, by the caller's promise, which loom checks.
            self.0.with_mut(|p| unsafe { *p = Some(value) });
        }

        /// # Safety
        /// No write to the slot at the same time.
        pub(super) unsafe fn copy(&self) -> Option<T> {
            // SAFETY: only read meanwhile, by the caller's promise, which loom checks.
            self.0.with(|p| unsafe { (*p).clone() })
        }

        /// # Safety
        /// No other access to the slot at the same time.
        pub(super) unsafe fn take(&self) -> Option<T> {
            // SAFETY: exclusive, by the caller's promise, which loom checks.
            self.0.with_mut(|p| unsafe { (*p).take() })
        }
    }
}

#[cfg(all(test, not(smc_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_life() {
        let seat = Seat::reserve();
        assert_eq!(seat.look(), Look::Reserved);
        // SAFETY: the only publish of this seat.
        unsafe { seat.publish(5) };
        assert_eq!(seat.look(), Look::Joined(5));
        // SAFETY: for the join.
        assert_eq!(unsafe { seat.leave() }, None);
        // SAFETY: for the publish.
        assert_eq!(unsafe { seat.leave() }, Some(5));
        assert_eq!(seat.look(), Look::Closed);
    }

    #[test]
    fn terminated_keeps_members_and_takes_no_more() {
        let seat = Seat::reserve();
        // SAFETY: the only publish of this seat.
        unsafe { seat.publish(5) };
        assert!(seat.terminate());
        assert!(!seat.terminate());
        assert!(seat.is_terminated());
        assert_eq!(seat.look(), Look::Closed);
        // SAFETY: for the publish.
        assert_eq!(unsafe { seat.leave() }, Some(5));
    }
}

/// The real code above under loom's scheduler. `RUSTFLAGS="--cfg smc_loom" cargo test -p smc --lib loom`; with
/// `--cfg smc_weak` added, each of them must fail.
#[cfg(all(test, smc_loom))]
mod loom_models {
    use super::*;
    use loom::{sync::Arc, thread};

    fn model(f: impl Fn() + Sync + Send + 'static) {
        let mut b = loom::model::Builder::new();
        b.preemption_bound = Some(3);
        b.check(f);
    }

    /// [seat.publish]: a reader that finds the seat early joins whole or not at all.
    #[test]
    fn loom_publish_against_join() {
        model(|| {
            let seat = Arc::new(Seat::reserve());
            let s = seat.clone();
            let reader = thread::spawn(move || {
                if let Look::Joined(v) = s.look() {
                    assert_eq!(v, 5);
                    // SAFETY: for the join.
                    let _ = unsafe { s.leave() };
                }
            });
            // SAFETY: the only publish of this seat.
            unsafe { seat.publish(5) };
            reader.join().unwrap();
            // SAFETY: for the publish. The reader has left.
            assert_eq!(unsafe { seat.leave() }, Some(5));
        });
    }

    /// [seat.leave]: exactly one of those who leave takes the value, after all others looked their last.
    #[test]
    fn loom_last_leave_against_join() {
        model(|| {
            let seat = Arc::new(Seat::reserve());
            // SAFETY: the only publish of this seat, before any other thread knows it.
            unsafe { seat.publish(5) };
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let s = seat.clone();
                    thread::spawn(move || match s.look() {
                        Look::Joined(v) => {
                            assert_eq!(v, 5);
                            // SAFETY: for the join.
                            usize::from(unsafe { s.leave() }.is_some())
                        }
                        Look::Reserved => panic!("it was published"),
                        Look::Closed => 0,
                    })
                })
                .collect();
            // SAFETY: for the publish.
            let mine = usize::from(unsafe { seat.leave() }.is_some());
            let theirs: usize = readers.into_iter().map(|r| r.join().unwrap()).sum();
            assert_eq!(mine + theirs, 1, "one and only one clears the seat away");
            assert_eq!(seat.look(), Look::Closed);
        });
    }

    /// terminate() while a connection holds its reference: one terminator is first, members keep the value,
    /// nobody joins afterwards.
    #[test]
    fn loom_terminate_against_members() {
        model(|| {
            let seat = Arc::new(Seat::reserve());
            // SAFETY: the only publish of this seat, before any other thread knows it.
            unsafe { seat.publish(5) };
            let s = seat.clone();
            let other = thread::spawn(move || {
                let first = s.terminate();
                assert_eq!(s.look(), Look::Closed);
                first
            });
            let s = seat.clone();
            let member = thread::spawn(move || match s.look() {
                Look::Joined(v) => {
                    assert_eq!(v, 5);
                    // SAFETY: for the join.
                    unsafe { s.leave() }.is_some()
                }
                _ => false,
            });
            // SAFETY: for the publish.
            let mine = unsafe { seat.leave() }.is_some();
            let first = seat.terminate();
            assert!(first ^ other.join().unwrap());
            assert!(mine ^ member.join().unwrap());
        });
    }
}
