//! POSIX AIO: libc's threads read and write by names that can't be hooked, so the stream goes back to TCP first.

use super::data::{alias, hook};
use super::sockets::hand_over_here;
use crate::fd_table;
use crate::real::real;
use engine::reason::Reason;
use libc::{aiocb, c_int, c_void};

/// The kernel is about to move bytes of `fd`.
fn outside(fd: c_int) {
    let Some(e) = fd_table::stream(fd) else { return };
    if !e.sock.is_plain() {
        let errno = crate::hook::errno();
        hand_over_here(&e, fd, Reason::AsyncIo);
        crate::hook::set_errno(errno);
    }
}

/// # Safety
/// `cb` is null or the program's control block.
unsafe fn asynchronous(cb: *const aiocb) {
    // SAFETY: as the caller vouches.
    if let Some(cb) = unsafe { cb.as_ref() } {
        outside(cb.aio_fildes);
    }
}

hook! {
    /// aio_read(3).
    fn aio_read(cb: *mut aiocb) -> c_int {
        // SAFETY: the program's control block.
        unsafe { asynchronous(cb) };
        real!(aio_read(cb => *mut aiocb) -> c_int)
    }
}

hook! {
    /// aio_write(3).
    fn aio_write(cb: *mut aiocb) -> c_int {
        // SAFETY: the program's control block.
        unsafe { asynchronous(cb) };
        real!(aio_write(cb => *mut aiocb) -> c_int)
    }
}

hook! {
    /// lio_listio(3).
    fn lio_listio(mode: c_int, list: *const *mut aiocb, n: c_int, then: *mut c_void) -> c_int {
        if !list.is_null() {
            for i in 0..n.max(0) as usize {
                // SAFETY: the program's array of n, as it vouches to libc.
                let cb = unsafe { *list.add(i) };
                // SAFETY: null, or a control block of the program's.
                unsafe { asynchronous(cb) };
            }
        }
        real!(lio_listio(mode => c_int, list => *const *mut aiocb, n => c_int, then => *mut c_void) -> c_int)
    }
}

alias! {
    aio_read64 = aio_read(cb: *mut aiocb) -> c_int;
    aio_write64 = aio_write(cb: *mut aiocb) -> c_int;
    lio_listio64 = lio_listio(mode: c_int, list: *const *mut aiocb, n: c_int, then: *mut c_void) -> c_int;
}
