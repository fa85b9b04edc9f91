//! How long to look before sleeping: a budget that is learned from how often looking has paid.
//!
//! A sleep and its wake-up cost some tens of microseconds on both sides, a look some nanoseconds, so a wait
//! looks for a while first. Each waiter has a [`Habit`]: a look that paid pulls the budget towards a few
//! times what it took; after some misses in a row few waits look for long.
//!
//! Where both ends have begun to sleep each waits for the other's wake-up, which what was learned from answers of a
//! running peer does not last for: without more they would sleep for ever, at each turn. So after a miss a wait looks for
//! as long as it may, and so do the few among the short ones. Whose look pays is awake for the next, and then the
//! other's pays as well.
//!
//! After a few microseconds, and from the start when the peer was last seen on this very CPU, each look is
//! followed by sched_yield(2): whoever else could run does, the peer among them, and two runnable
//! neighbours are what makes the scheduler move one of them to an idle CPU. Two that sleep and wake each
//! other stay together for ever.
//!
//! How long the yield takes tells who else is there:
//!
//! | it takes | the CPU | what follows |
//! | --- | --- | --- |
//! | less than a switch | is ours alone | the next wait looks for a while before it yields |
//! | a few switches | is a *crowd*'s, that waits as we do | the next wait yields at once |
//! | a good part of a slice, several times | is somebody's who computes | no yields for some time; after short looks, in a crowd, sleeps |
//!
//! What a crowd does with the time is not taken off the budget. Who sleeps is preferred when it wakes; who yields to
//! somebody who computes waits for its turn. So does, now and then, who yields beside such as sleep: if a crowd took that
//! for somebody who computes, all of it would sleep, and each would be woken for each message.

use crate::config::config;
use crate::section;
use crate::sys;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Nanoseconds of plain looking before looks yield the CPU.
const PURE_NS: u64 = 4_000;
/// A round that took longer was not alone on its CPU.
const PREEMPTED_NS: u64 = 20_000;
/// A yield that took longer let somebody else run: it is more than a call, and less than two switches.
const SWITCHED_NS: u64 = 1_000;
/// A yield that took longer let somebody compute.
const SLICE_NS: u64 = 600_000;
/// One such yield may be a crowd's. So it takes a third one before so many quick ones: among 24 threads on two CPUs, all of
/// which wait for each other, 1 yield in 10,000 or fewer is a third; beside two that compute, 1 in 4.
const SLOW: u32 = 8;
/// If none did for so many times as long, it is taken for chance.
const CHANCE: u64 = 8;
/// Nobody yields then for as long again, and each time in a row that it is not chance for twice as long as before, up
/// to so many doublings.
const DOUBLINGS: u32 = 6;
/// Until then nobody in this process yields. As the next: a hint, Relaxed, and a lost update does no harm.
static NO_YIELDS: AtomicU64 = AtomicU64::new(0);
/// Times in a row.
static TIMES: AtomicU32 = AtomicU32::new(0);
/// In [`Habit::ns`]: the last yield found a crowd.
const CROWD: u32 = 1 << 31;
/// The budget after misses.
const SHORT_NS: u64 = 1_000;
/// How often the kernel is asked as well, where it must be.
const KERNEL_NS: u64 = 10_000;
/// Misses in a row after which looking is short.
const MISSES: u32 = 4;
/// Short waits before one that looks for long all the same: these at first, twice as many each time, these at last.
const LEAST_SHORT: u32 = 8;
const MOST_SHORT: u32 = 64;

/// How long a wait for one message of many leaves the peer alone.
const GATHER_NS: u64 = 1_000;
/// Only where answers come about as fast: the budget learned from such.
const GATHER_LEARNED_NS: u64 = 8_000 + 8 * GATHER_NS;

/// What a waiter has learned. Hints only: Relaxed, and a lost update does no harm.
#[derive(Debug)]
#[repr(C)]
pub struct Habit {
    /// The budget, and [`CROWD`].
    ns: AtomicU32,
    misses: AtomicU32,
    /// How many of the last yields let somebody compute: each counts [`SLOW`], and each that did not takes one off.
    slow: AtomicU32,
}

/// One wait that looks.
#[derive(Debug)]
pub struct Spin<'a> {
    habit: &'a Habit,
    start: u64,
    last: u64,
    kernel: u64,
    budget: u64,
    /// Nanoseconds until the caller's own time is over.
    left: u64,
    /// Nanoseconds of this wait in which others ran.
    others: u64,
    max: u64,
    beside: bool,
    crowd: bool,
}

impl Default for Habit {
    fn default() -> Self {
        Self::new()
    }
}

impl Habit {
    /// Nothing learned: the first wait looks for `SMC_SPIN_US`.
    pub const fn new() -> Self {
        Habit { ns: AtomicU32::new(0), misses: AtomicU32::new(0), slow: AtomicU32::new(0) }
    }

    /// Forgets.
    pub fn reset(&self) {
        self.ns.store(0, Relaxed);
        self.misses.store(0, Relaxed);
    }

    /// Looking begins, for `left` ns at most; `None`: do not look. `beside`: the peer is on this CPU.
    pub fn begin(&self, beside: bool, left: Option<u64>) -> Option<Spin<'_>> {
        let max = u64::from(config().spin_us) * 1000;
        let (word, misses) = (self.ns.load(Relaxed), self.misses.load(Relaxed));
        let learned = u64::from(word & !CROWD);
        let crowd = word & CROWD != 0;
        // In a crowd it is the CPU that the peer waits for, and that is had by a sleep as well.
        let usual = if learned == 0 { max } else { learned.min(max) };
        let budget = match misses {
            0 => usual,
            1..=MISSES if crowd => usual,
            1..=MISSES => max,
            _ if crowd && misses.is_multiple_of(LEAST_SHORT) => usual,
            _ if !crowd && retries(misses - MISSES) => max,
            _ => usual.min(SHORT_NS),
        };
        let left = left.unwrap_or(u64::MAX);
        if budget.min(left) == 0 {
            return None;
        }
        let start = sys::now_ns();
        if beside && barred(start) {
            return None;
        }
        Some(Spin {
            habit: self,
            start,
            last: start,
            kernel: start,
            budget,
            left,
            others: 0,
            max,
            beside,
            crowd,
        })
    }
}

/// Whether the wait after so many misses beyond [`MISSES`] looks for long all the same.
fn retries(short: u32) -> bool {
    short.is_multiple_of(MOST_SHORT) || short >= LEAST_SHORT && short.is_power_of_two()
}

/// Whether yields would let somebody compute who does so at that time.
#[inline]
fn barred(now: u64) -> bool {
    // Relaxed: a hint, that may come late.
    now < NO_YIELDS.load(Relaxed)
}

impl Spin<'_> {
    /// It has come.
    pub fn paid(self) {
        let learned = u64::from(self.habit.ns.load(Relaxed) & !CROWD);
        let took = self.last.saturating_sub(self.start).saturating_sub(self.others) * 4 + 8_000;
        let crowd = if self.crowd { CROWD } else { 0 };
        self.habit.ns.store(((learned * 3 + took) / 4).min(self.max) as u32 | crowd, Relaxed);
        self.habit.misses.store(0, Relaxed);
    }

    /// Before the first look of a wait for one message of many: each look takes the line that the peer writes to away from
    /// its CPU, and costs the peer more than the message does. So it is left alone for as long as some take. No time is
    /// lost: those that come meanwhile are read at once.
    pub fn gather(&mut self) {
        let answers = u64::from(self.habit.ns.load(Relaxed) & !CROWD);
        if answers > GATHER_LEARNED_NS {
            return;
        }
        while self.last - self.start < GATHER_NS && self.last - self.start < self.left {
            for _ in 0..8 {
                std::hint::spin_loop();
            }
            self.last = sys::now_ns().max(self.last);
        }
    }

    /// A look has found nothing: look again? Counts the miss if not.
    pub fn again(&mut self) -> bool {
        if section::is_deferred() {
            // A signal: it is for the caller to open a window.
            return false;
        }
        let now = sys::now_ns();
        let misses = self.habit.misses.load(Relaxed);
        if now.saturating_sub(self.last) > PREEMPTED_NS && !self.beside && !self.crowd {
            // Others want this CPU, and not such as wait: looking does not pay now.
            self.habit.misses.store(misses.max(MISSES).wrapping_add(1), Relaxed);
            return false;
        }
        let elapsed = now.saturating_sub(self.start);
        let barred = barred(now);
        if elapsed > self.left
            || elapsed.saturating_sub(self.others) > self.budget
            || barred && self.crowd && elapsed > PURE_NS
        {
            self.habit.misses.store(misses.wrapping_add(1), Relaxed);
            return false;
        }
        self.last = now;
        if !barred && (self.beside || self.crowd || elapsed > PURE_NS) {
            sys::yield_cpu();
            self.yielded(sys::now_ns().saturating_sub(now));
        } else {
            for _ in 0..8 {
                std::hint::spin_loop();
            }
        }
        true
    }

    /// A yield took so long.
    fn yielded(&mut self, ns: u64) {
        let crowd = ns > SWITCHED_NS;
        self.others += ns.saturating_sub(SWITCHED_NS);
        let slow = self.habit.slow.load(Relaxed);
        if ns <= SLICE_NS {
            if slow > 0 {
                self.habit.slow.store(slow - 1, Relaxed);
            }
        } else if slow <= SLOW {
            self.habit.slow.store(slow + SLOW, Relaxed);
        } else {
            let quiet = self.last.saturating_sub(NO_YIELDS.load(Relaxed));
            let times = if quiet > ns * CHANCE { 0 } else { (TIMES.load(Relaxed) + 1).min(DOUBLINGS) };
            TIMES.store(times, Relaxed);
            NO_YIELDS.store(self.last + ns + (ns << times), Relaxed);
        }
        if crowd != self.crowd {
            self.crowd = crowd;
            let word = self.habit.ns.load(Relaxed);
            self.habit.ns.store(if crowd { word | CROWD } else { word & !CROWD }, Relaxed);
        }
    }

    /// Whether it is time to ask the kernel as well.
    pub fn kernel_due(&mut self) -> bool {
        let due = self.last.saturating_sub(self.kernel) > KERNEL_NS;
        if due {
            self.kernel = self.last;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wait in which a yield took so long, and which was of use.
    fn wait(h: &Habit, ns: u64) {
        let mut spin = h.begin(false, None).expect("a budget");
        spin.yielded(ns);
        spin.paid();
    }

    #[test]
    fn a_miss_is_followed_by_long_looks_and_many_by_few() {
        let h = Habit::new();
        let max = u64::from(config().spin_us) * 1000;
        let budget = || h.begin(false, None).expect("a budget").budget;
        assert_eq!(budget(), max, "nothing learned");
        h.begin(false, None).expect("a budget").paid();
        for _ in 0..20 {
            h.begin(false, None).expect("a budget").paid();
        }
        let learned = budget();
        assert!(learned < max / 2, "answers come at once: {learned}");
        let mut long = Vec::new();
        for misses in 1..200 {
            h.misses.store(misses, Relaxed);
            match budget() {
                b if b == max => long.push(misses - MISSES.min(misses)),
                b => assert_eq!(b, SHORT_NS),
            }
        }
        assert_eq!(long, [0, 0, 0, 0, 8, 16, 32, 64, 128, 192]);
        // In a crowd a wake-up is not what is waited for.
        h.ns.fetch_or(CROWD, Relaxed);
        let long = (1..40).filter(|n| {
            h.misses.store(*n, Relaxed);
            budget() == learned
        });
        assert_eq!(long.collect::<Vec<_>>(), [1, 2, 3, 4, 8, 16, 24, 32]);
    }

    #[test]
    fn a_peer_that_feeds_is_left_alone_only_if_it_is_fast() {
        let h = Habit::new();
        let gathers = |learned: u64| {
            h.ns.store(learned as u32, Relaxed);
            let mut spin = h.begin(false, None).expect("a budget");
            spin.gather();
            spin.last - spin.start
        };
        assert!(gathers(GATHER_LEARNED_NS) >= GATHER_NS);
        assert_eq!(gathers(GATHER_LEARNED_NS + 1), 0);
    }

    #[test]
    fn yields_tell_who_else_is_there() {
        let h = Habit::new();
        let crowd = || h.begin(false, None).is_some_and(|s| s.crowd);
        wait(&h, SWITCHED_NS / 2);
        assert!(!crowd());
        wait(&h, SWITCHED_NS * 10);
        assert!(crowd(), "remembered for the next wait");
        wait(&h, SWITCHED_NS / 2);
        assert!(!crowd(), "nobody else is there any more");

        // What others did with the time is not taken off the budget.
        let mut spin = h.begin(false, None).expect("a budget");
        spin.start -= spin.budget + 10_000;
        assert!(!spin.again());
        let mut spin = h.begin(false, None).expect("a budget");
        (spin.start, spin.others) = (spin.start - spin.budget - 10_000, 1_000_000);
        assert!(spin.again());

        // Somebody computes: no yields for a time, for longer each time in a row, and by chance never for long.
        let slice = SLICE_NS * 10;
        // Two of them may be chance, and none follows from those that came before many quick ones.
        for _ in 0..3 {
            wait(&h, slice);
            wait(&h, slice);
            assert!(!barred(sys::now_ns()));
            (0..2 * SLOW).for_each(|_| wait(&h, SWITCHED_NS * 10));
        }
        wait(&h, slice);
        wait(&h, slice);
        let bars: Vec<u64> = (0..12)
            .map(|_| {
                let mut spin = h.begin(false, None).expect("a budget");
                spin.last = NO_YIELDS.load(Relaxed).max(spin.last) + slice;
                spin.yielded(slice);
                NO_YIELDS.load(Relaxed) - spin.last - slice
            })
            .collect();
        assert!(bars.is_sorted() && bars[11] == slice << DOUBLINGS, "{bars:?}");
        let now = sys::now_ns();
        assert!(barred(now) && h.begin(true, None).is_none(), "beside the peer only a sleep helps");
        let mut spin = h.begin(false, None).expect("looking without yields");
        spin.start -= PURE_NS * 2;
        assert!(!spin.again());
        spin.last = NO_YIELDS.load(Relaxed) + slice * CHANCE * 2;
        spin.yielded(slice);
        assert_eq!(NO_YIELDS.load(Relaxed) - spin.last, slice * 2);
        NO_YIELDS.store(0, Relaxed);
    }
}
