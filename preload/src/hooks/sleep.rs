//! Windows: where a call on a connection sleeps, in libc's own calls, so that it is a cancellation point as the
//! program's call on TCP would be, and where handlers of the program's run (`engine::section`).
//!
//! A thread may be left for good in one: by cancellation, or by a handler that jumps (siglongjmp). Both unwind through
//! our frames and run no destructors there: what the thread holds is let go of by a handler of the kind that
//! pthread_cleanup_push sets up (pthread.h), which glibc and musl both export as the functions below. Cancellation
//! calls it, and so does glibc's siglongjmp when it leaves its frame (`_longjmp_unwind`).

use crate::fd_table::{Entry, Ref};
use crate::hook::{errno, set_errno, to_kernel};
use crate::real::real;
use engine::conn::Nap;
use engine::section::{self, Held, Ran};
use libc::{c_int, c_void, msghdr, nfds_t, pollfd, sigset_t, size_t, ssize_t, timespec};

/// struct _pthread_cleanup_buffer, or musl's __ptcb: four words at most.
#[repr(C)]
struct Cleanup([usize; 4]);

unsafe extern "C" {
    fn _pthread_cleanup_push(
        buffer: *mut Cleanup,
        handler: unsafe extern "C" fn(*mut c_void),
        arg: *mut c_void,
    );
    fn _pthread_cleanup_pop(buffer: *mut Cleanup, run: c_int);
}

unsafe extern "C" fn left(held: *mut c_void) {
    // SAFETY: on the stack of the thread that is leaving, below the frame that the handler belongs to: `window` has
    // not returned, so its argument is alive.
    let held = unsafe { &mut *held.cast::<Held<'_>>() };
    section::abandon(|| {
        (held.undo)();
        if let Some(sock) = held.sock {
            // SAFETY: every Socket of the shim is inside an Entry, on which the call that will not return has a
            // reference.
            unsafe { Entry::forsake(sock) };
        }
    });
}

/// Called once, before the first connection.
pub fn start() {
    engine::conn::sleep_with(nap);
    engine::conn::send_with(send);
    engine::conn::recv_with(recv);
    section::window_with(window);
}

/// Calls `f` where handlers of the program's run. errno stays what it was.
fn window(held: &mut Held<'_>, f: &mut dyn FnMut(Ran) -> isize) -> isize {
    let mut cleanup = Cleanup([0; 4]);
    let before = errno();
    // SAFETY: `cleanup` and `held` stay where they are until the pop.
    unsafe { _pthread_cleanup_push(&raw mut cleanup, left, std::ptr::from_mut(held).cast()) };
    let since = section::ran();
    let n = section::open();
    let r = f(since);
    section::close(n);
    // SAFETY: pushed above, in this frame.
    unsafe { _pthread_cleanup_pop(&raw mut cleanup, 0) };
    set_errno(before);
    r
}

/// A call of libc's that waits for several things, in a window: its result, and errno if that is below zero. `undo`
/// lets go of all that the caller has. With `may_end`, a handler that has run by now, while the caller looked, ends it.
pub fn wait_in_window(undo: &mut dyn FnMut(), may_end: bool, call: &dyn Fn() -> c_int) -> c_int {
    let r = window(&mut Held { sock: None, undo }, &mut |since| {
        if may_end && since.any() { -(libc::EINTR as isize) } else { to_kernel(call() as isize) }
    });
    crate::hook::to_libc(r) as c_int
}

/// [`wait_in_window`] for a call that has one reference and no more.
pub fn wait_with(e: &Ref, call: &dyn Fn() -> c_int) -> c_int {
    wait_in_window(&mut || e.entry().release(), false, call)
}

/// # Safety
/// `m` describes readable memory.
unsafe fn send(fd: c_int, m: &msghdr, flags: c_int) -> isize {
    to_kernel(real!(sendmsg(fd => c_int, std::ptr::from_ref(m) => *const msghdr, flags => c_int) -> ssize_t))
}

/// # Safety
/// `m` describes writable memory.
unsafe fn recv(fd: c_int, m: &mut msghdr, flags: c_int) -> isize {
    to_kernel(real!(recvmsg(fd => c_int, std::ptr::from_mut(m) => *mut msghdr, flags => c_int) -> ssize_t))
}

fn nap(n: &Nap) -> isize {
    let r = if n.polls() {
        let ts = n
            .left
            .map(|ns| timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 });
        let p = ts.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let mut list = n.list();
        real!(ppoll(list.as_mut_ptr() => *mut pollfd, 2 => nfds_t, p => *const timespec, std::ptr::null() => *const sigset_t) -> c_int)
            as ssize_t
    } else {
        let mut b = [0u8; 1];
        real!(recv(n.bell => c_int, b.as_mut_ptr().cast() => *mut c_void, 1 => size_t, libc::MSG_PEEK => c_int) -> ssize_t)
    };
    to_kernel(r)
}
