//! Calls that make descriptors: the program gets the numbers it would get without us.
//!
//! Linux gives out the lowest free number, and none from RLIMIT_NOFILE on. Our own descriptors (doorbells, a
//! segment's memfd, the arena's) are numbered high, so nobody notices them before the program has nearly as
//! many. From then on:
//!
//! | the program's new number | what happens |
//! | --- | --- |
//! | comes near ours | no more upgrades; idle connections go back to TCP, some with each call |
//! | is above one of ours | everything that can be given back is, and it gets the lowest number after all |
//! | is none (EMFILE) | likewise, and the call is made once more |
//!
//! A call costs one comparison more while none of that is so.

use super::data::{alias, hook};
use super::process;
use crate::fd_table;
use crate::hook::{errno, set_errno};
use crate::real::real;
use engine::{arena, internal_fds, lgr, sys};
use libc::{DIR, FILE, c_char, c_int, c_uint};

/// Numbers looked at, and connections given up, for each call that comes near ours. As many as there can be
/// of ours are given back before the program's numbers reach them.
const LOOK: u32 = 64;
const MOST: usize = 8;

/// Makes a call that gives a new descriptor.
#[inline]
pub fn made(call: impl Fn() -> c_int) -> c_int {
    made_from(0, call)
}

/// Makes a call that gives a new descriptor, not below `from`.
#[inline]
pub fn made_from(from: c_int, call: impl Fn() -> c_int) -> c_int {
    let r = number(from, call);
    super::ready::numbered(r);
    r
}

#[inline]
fn number(from: c_int, call: impl Fn() -> c_int) -> c_int {
    let r = call();
    if r >= 0 && r < internal_fds::alarm() {
        if internal_fds::is_tight() && r < internal_fds::alarm() / 4 * 3 {
            // The lowest free number is far from ours again.
            internal_fds::set_tight(false);
        }
        return r;
    }
    if r >= 0 {
        near(r, from)
    } else if full() {
        retry(&call, from)
    } else {
        r
    }
}

/// Whether the call has failed for want of a number.
#[inline]
fn full() -> bool {
    matches!(errno(), libc::EMFILE | libc::ENFILE)
}

/// Whether what is ours may be touched here: not in a child that runs in its parent's memory, and not where
/// a system call might kill.
fn may_give_back() -> bool {
    internal_fds::count() != 0 && process::is_owner() && !super::direct::sandboxed()
}

#[cold]
fn retry(call: &dyn Fn() -> c_int, from: c_int) -> c_int {
    let e = errno();
    if !give_all_back(i32::MAX) {
        set_errno(e);
        return -1;
    }
    set_errno(e);
    let r = call();
    if r >= 0 { near(r, from) } else { r }
}

/// The program has got `r`, which is near ours or above; the number that it is to have.
#[cold]
fn near(r: c_int, from: c_int) -> c_int {
    if !may_give_back() {
        return r;
    }
    let e = errno();
    internal_fds::set_tight(true);
    fd_table::give_back(LOOK, MOST);
    let r = if is_above(r, from) && give_all_back(r) { lowest(r, from) } else { r };
    internal_fds::set_alarm();
    set_errno(e);
    r
}

/// Whether a number of ours is lower: without us the program might have got it.
fn is_above(r: c_int, from: c_int) -> bool {
    internal_fds::next(from.max(0) as u32).is_some_and(|n| (n as c_int) < r)
}

/// Gives back all that can be, up to the number `r`. Whether there are fewer of ours within the limit than before.
fn give_all_back(r: c_int) -> bool {
    let lowest = internal_fds::next(0).map_or(c_int::MAX, |n| n as c_int);
    if !may_give_back() || u64::try_from(lowest).is_ok_and(|n| n >= sys::fd_limit()) {
        return false;
    }
    internal_fds::set_tight(true);
    let before = internal_fds::count();
    fd_table::give_back(fd_table::all_numbers(), usize::MAX);
    lgr::give_back_fds();
    if lowest <= r {
        arena::make_way(r);
    }
    internal_fds::set_alarm();
    internal_fds::count() < before || internal_fds::next(0).map_or(c_int::MAX, |n| n as c_int) > lowest
}

/// The same open file under the lowest free number from `from` on. The program knows of `r` not yet, so nothing else names it.
fn lowest(r: c_int, from: c_int) -> c_int {
    let n = sys::dup_lowest(r, from);
    if n < 0 {
        return r;
    }
    let (keep, drop) = if n < r { (n, r) } else { (r, n) };
    sys::close(drop);
    keep
}

/// Makes a call that gives two descriptors.
///
/// # Safety
/// `fds` is what the program gave.
unsafe fn made_two(fds: *mut c_int, call: impl Fn() -> c_int) -> c_int {
    // The first number shows whether the call has found any.
    let r = made(|| if call() == 0 { 0 } else { -1 });
    if r == 0 {
        for i in 0..2 {
            // SAFETY: the kernel has written both.
            let p = unsafe { fds.add(i) };
            // SAFETY: as above.
            let fd = unsafe { p.read() };
            // SAFETY: as above.
            unsafe { p.write(made(|| fd)) };
        }
    }
    r
}

hook! {
    /// socket(2).
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
        let r = made(|| real!(socket(domain => c_int, kind => c_int, protocol => c_int) -> c_int));
        let stream = kind & !(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) == libc::SOCK_STREAM;
        let inet = matches!(domain, libc::AF_INET | libc::AF_INET6);
        fd_table::set_tcp(r, stream && inet && matches!(protocol, 0 | libc::IPPROTO_TCP));
        r
    }
}

hook! {
    /// socketpair(2).
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, fds: *mut c_int) -> c_int {
        let kernel = || real!(socketpair(domain => c_int, kind => c_int, protocol => c_int, fds => *mut c_int) -> c_int);
        // SAFETY: the program's own arguments.
        unsafe { made_two(fds, kernel) }
    }
}

hook! {
    /// pipe(2).
    fn pipe(fds: *mut c_int) -> c_int {
        let kernel = || real!(pipe(fds => *mut c_int) -> c_int);
        // SAFETY: the program's own arguments.
        unsafe { made_two(fds, kernel) }
    }
}

hook! {
    /// pipe2(2).
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int {
        let kernel = || real!(pipe2(fds => *mut c_int, flags => c_int) -> c_int);
        // SAFETY: the program's own arguments.
        unsafe { made_two(fds, kernel) }
    }
}

hook! {
    /// open(2). Variadic; the mode is passed in a register, and is anything where there is none.
    fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        made(|| real!(open(path => *const c_char, flags => c_int, mode => c_uint) -> c_int))
    }
}

hook! {
    /// open64(2).
    fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        made(|| real!(open64(path => *const c_char, flags => c_int, mode => c_uint) -> c_int))
    }
}
alias! {
    __open = open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    __open64 = open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
}

hook! {
    /// openat(2).
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        made(|| real!(openat(dir => c_int, path => *const c_char, flags => c_int, mode => c_uint) -> c_int))
    }
}

hook! {
    /// openat64(2).
    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
        made(|| real!(openat64(dir => c_int, path => *const c_char, flags => c_int, mode => c_uint) -> c_int))
    }
}

hook! {
    /// open(2) of programs built with checks.
    fn __open_2(path: *const c_char, flags: c_int) -> c_int {
        made(|| real!(__open_2(path => *const c_char, flags => c_int) -> c_int))
    }
}

hook! {
    /// open64(2) of programs built with checks.
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
        made(|| real!(__open64_2(path => *const c_char, flags => c_int) -> c_int))
    }
}

hook! {
    /// eventfd(2).
    fn eventfd(first: c_uint, flags: c_int) -> c_int {
        made(|| real!(eventfd(first => c_uint, flags => c_int) -> c_int))
    }
}

hook! {
    /// timerfd_create(2).
    fn timerfd_create(clock: c_int, flags: c_int) -> c_int {
        made(|| real!(timerfd_create(clock => c_int, flags => c_int) -> c_int))
    }
}

/// Makes a call that gives an object with a descriptor of its own, or null.
fn opened<T>(call: impl Fn() -> *mut T) -> *mut T {
    let p = call();
    if !p.is_null() || !full() {
        return p;
    }
    let e = errno();
    let again = give_all_back(c_int::MAX);
    set_errno(e);
    if again { call() } else { p }
}

hook! {
    /// fopen(3).
    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE {
        opened(|| real!(fopen(path => *const c_char, mode => *const c_char) -> *mut FILE))
    }
}

hook! {
    /// fopen64(3).
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE {
        opened(|| real!(fopen64(path => *const c_char, mode => *const c_char) -> *mut FILE))
    }
}

hook! {
    /// opendir(3).
    fn opendir(path: *const c_char) -> *mut DIR {
        opened(|| real!(opendir(path => *const c_char) -> *mut DIR))
    }
}
