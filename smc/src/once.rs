//! A value made at first use, without a lock: whoever comes while another makes it makes one of its own,
//! and all use the one that was put in place first.
//!
//! std's `OnceLock` waits for the maker. A hook must not: it may run in a signal handler that interrupted
//! the maker, and the maker may have left by `longjmp`, or been a thread that a fork did not take along.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, Ordering::*};

/// See the module. Meant for statics: the value is never dropped.
#[derive(Debug)]
pub struct Once<T> {
    value: AtomicPtr<T>,
    owns: PhantomData<T>,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Sync + Send + 'static> Once<T> {
    /// The value, made by `make` if there is none.
    #[inline]
    pub fn get_or_init(&'static self, make: impl FnOnce() -> T) -> &'static T {
        match self.get() {
            Some(v) => v,
            None => self.set(make()),
        }
    }

    /// The value, if there is one.
    #[inline]
    pub fn get(&'static self) -> Option<&'static T> {
        // ORDERING [once] Acquire; pairs with the exchange in `set`. Carries: the value.
        let p = self.value.load(Acquire);
        // SAFETY: null, or a leaked Box that nobody changes or frees.
        unsafe { p.as_ref() }
    }

    /// Puts a value in place if there is none yet; the one in place.
    #[cold]
    pub fn set(&'static self, value: T) -> &'static T {
        let mine = Box::into_raw(Box::new(value));
        // ORDERING [once] AcqRel: Release of our value for `get`, Acquire of another's if we lost.
        match self.value.compare_exchange(std::ptr::null_mut(), mine, AcqRel, Acquire) {
            // SAFETY: leaked above, for good.
            Ok(_) => unsafe { &*mine },
            Err(other) => {
                // SAFETY: nobody has seen it.
                drop(unsafe { Box::from_raw(mine) });
                // SAFETY: not null, as the exchange failed; otherwise as in `get`.
                unsafe { &*other }
            }
        }
    }
}

impl<T> Once<T> {
    /// An empty one.
    pub const fn new() -> Self {
        Once { value: AtomicPtr::new(std::ptr::null_mut()), owns: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_first_value_stays_even_if_making_one_nests() {
        static O: super::Once<u32> = super::Once::new();
        assert_eq!(O.get(), None);
        // As a signal handler does that interrupts the maker.
        assert_eq!(*O.get_or_init(|| *O.get_or_init(|| 1) + 1), 1);
        assert_eq!(*O.get_or_init(|| 7), 1);
    }
}
