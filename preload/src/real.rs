//! libc's own functions behind our hooks, found with `dlsym(RTLD_NEXT)`.
//!
//! They are called, not the kernel, wherever the program's call goes through untouched: they are its
//! cancellation points, and another preloaded library may stand behind us.
//!
//! All are found when the library starts: dlsym takes the loader's lock, which the child of a fork finds locked
//! for ever if another thread was in dlopen at the fork. A hook that runs before finds its own.

use libc::c_char;
use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A function of libc.
#[repr(C)]
pub struct Real {
    name: *const c_char,
    at: AtomicUsize,
}

// SAFETY: `name` is a string literal, which is never written.
unsafe impl Sync for Real {}

unsafe extern "C" {
    // The linker's names for the two ends of the section that `entry!` fills.
    #[link_name = "__start_smc_real"]
    static FIRST: Real;
    #[link_name = "__stop_smc_real"]
    static END: Real;
}

impl Real {
    pub const fn new(name: &'static CStr) -> Self {
        Real { name: name.as_ptr(), at: AtomicUsize::new(0) }
    }

    /// Where the function is; 0 if libc has none of that name.
    #[inline]
    pub fn get(&self) -> usize {
        // Relaxed: the value is the same whoever stores it, and code needs no publication.
        match self.found() {
            0 => self.find(),
            p => p,
        }
    }

    /// Where the function is, if it has been found; else 0.
    #[inline]
    pub fn found(&self) -> usize {
        // Relaxed: as in `get`.
        self.at.load(Relaxed)
    }

    #[cold]
    fn find(&self) -> usize {
        // SAFETY: NUL-terminated; dlsym may be called at any time after the loader has started.
        let p = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name) } as usize;
        if p == 0 {
            // SAFETY: always; the program is not to find our failure there.
            unsafe { libc::dlerror() };
        }
        self.at.store(p, Relaxed);
        p
    }
}

/// Finds all of them.
pub fn start() {
    let mut p = &raw const FIRST;
    while p < &raw const END {
        // SAFETY: within the section, which holds `Real` and nothing else: `entry!` alone names it.
        unsafe { &*p }.get();
        p = p.wrapping_add(1);
    }
}

/// `entry!(name)`: the [`Real`] of that name.
macro_rules! entry {
    ($name:ident) => {{
        #[used]
        #[unsafe(link_section = "smc_real")]
        static ENTRY: $crate::real::Real = $crate::real::Real::new({
            const NAME: &str = concat!(stringify!($name), "\0");
            match std::ffi::CStr::from_bytes_with_nul(NAME.as_bytes()) {
                Ok(c) => c,
                Err(_) => panic!("no inner NUL"),
            }
        });
        &ENTRY
    }};
}
pub(crate) use entry;

/// `real!(name(args) -> ret)`: calls libc's function of that name and type.
macro_rules! real {
    ($name:ident($($a:expr => $t:ty),* $(,)?) -> $r:ty) => {{
        let p = $crate::real::entry!($name).get();
        if p == 0 {
            $crate::hook::fail::<$r>(libc::ENOSYS)
        } else {
            $crate::real::real_at!(p, $name($($a => $t),*) -> $r)
        }
    }};
}
pub(crate) use real;

/// [`real!`] where the function has been found: at `p`, which is not 0.
macro_rules! real_at {
    ($p:ident, $name:ident($($a:expr => $t:ty),* $(,)?) -> $r:ty) => {{
        // SAFETY: libc exports $name with this C signature (its manual page).
        let f: unsafe extern "C" fn($($t),*) -> $r = unsafe { std::mem::transmute::<usize, _>($p) };
        // SAFETY: the arguments are the program's own, passed on.
        unsafe { f($($a),*) }
    }};
}
pub(crate) use real_at;
