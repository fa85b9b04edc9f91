//! A lock for shared memory: futex based, works across forked processes, recovers from a killed owner.
//!
//! The word is the owner's thread id, or 0, plus [`WAITERS`] when somebody may sleep on it:
//!
//! | word | meaning | who leaves it |
//! | --- | --- | --- |
//! | 0 | free | anyone: exchange to own tid |
//! | tid | held, nobody waits | the owner stores 0; a waiter adds WAITERS |
//! | tid + WAITERS | held, somebody may sleep | the owner stores 0 and wakes; or, if the owner is dead, a waiter takes over |
//!
//! Critical sections under it are short (a copy, a few words): nothing sleeps while it holds one.
//! What a lock guards stays valid word by word when its owner is killed in between: cursors are published
//! last, so a half-done copy has never happened for the peer.
#![allow(unsafe_code)]

use crate::sync::{AtomicU32, Ordering::*};
use crate::sys;

/// Somebody may sleep on the word.
pub const WAITERS: u32 = 1 << 31;

/// The lock is held while this lives.
#[must_use]
#[derive(Debug)]
pub struct Guard<'a> {
    word: &'a AtomicU32,
}

/// Takes the lock, sleeping if needed.
#[inline(always)]
pub fn lock(word: &AtomicU32) -> Guard<'_> {
    let me = sys::gettid();
    // ORDERING [lock.word] Acquire; pairs with the Release in Guard::drop. Carries: what the lock guards.
    if word.compare_exchange(0, me, Acquire, Relaxed).is_err() {
        lock_slow(word, me);
    }
    Guard { word }
}

/// Takes the lock if it is free.
#[inline]
pub fn try_lock(word: &AtomicU32) -> Option<Guard<'_>> {
    word.compare_exchange(0, sys::gettid(), Acquire, Relaxed).ok().map(|_| Guard { word })
}

/// Whether this very thread holds the lock: a signal handler has interrupted the holder.
#[inline]
pub fn held_by_me(word: &AtomicU32) -> bool {
    word.load(Relaxed) & !WAITERS == sys::gettid()
}

/// Waits for the lock, without taking it, until it may be free, a signal comes, or a while is over: 0, or minus an
/// errno. For a lock that its owner sleeps with; `lock` is for the others.
#[cold]
pub fn wait(word: &AtomicU32) -> isize {
    let w = word.load(Relaxed);
    if w & !WAITERS == 0
        || w & WAITERS == 0 && word.compare_exchange(w, w | WAITERS, Relaxed, Relaxed).is_err()
    {
        return 0;
    }
    let n = sys::futex_wait(word, w | WAITERS, Some(50_000_000));
    if n == -(libc::ETIMEDOUT as isize) && !sys::thread_alive(w & !WAITERS) {
        // ORDERING [lock.word] Acquire; pairs with the Release in Guard::drop. The dead owner's, for whoever is next.
        let _ = word.compare_exchange(w | WAITERS, 0, Acquire, Relaxed);
        sys::futex_wake(word, i32::MAX as u32);
    }
    if n == -(libc::EINTR as isize) { n } else { 0 }
}

/// Gives a lock of this thread's back whose guard will not be dropped: its call is not coming back.
#[cold]
pub fn give_up(word: &AtomicU32) {
    drop(Guard { word });
}

#[cold]
fn lock_slow(word: &AtomicU32, me: u32) {
    for _ in 0..100 {
        if word.load(Relaxed) == 0 && word.compare_exchange(0, me, Acquire, Relaxed).is_ok() {
            return;
        }
        std::hint::spin_loop();
    }
    // The time-out only serves to find a dead owner; a live one always wakes us. Sections are short, so the first is.
    let mut patience = 1_000_000;
    loop {
        let w = word.load(Relaxed);
        if w & !WAITERS == 0 {
            // WAITERS stays set: other sleepers may be left, the worst is one wake too many.
            if word.compare_exchange(w, me | WAITERS, Acquire, Relaxed).is_ok() {
                return;
            }
            continue;
        }
        if w & WAITERS == 0 && word.compare_exchange(w, w | WAITERS, Relaxed, Relaxed).is_err() {
            continue;
        }
        if sys::futex_wait(word, w | WAITERS, Some(patience)) == -(libc::ETIMEDOUT as isize) {
            if !sys::thread_alive(w & !WAITERS)
                && word.compare_exchange(w | WAITERS, me | WAITERS, Acquire, Relaxed).is_ok()
            {
                return;
            }
            patience = (patience * 2).min(50_000_000);
        }
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        // ORDERING [lock.word] Release; pairs with the Acquire exchanges above.
        if self.word.swap(0, Release) & WAITERS != 0 {
            sys::futex_wake(self.word, 1);
        }
    }
}
