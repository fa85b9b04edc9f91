//! An owned file descriptor that is closed by the kernel call, never by libc's `close`.
//!
//! libc's `close` is one of the names our library exports: std's `OwnedFd` would come back through our hook.
//! Descriptors that live longer than one function are numbered high ([`Fd::raise`]), so that a program which
//! counts on getting the lowest free number sees what it would see without us, and are known to
//! [`crate::internal_fds`], so that a program that closes all descriptors spares them.

#![allow(unsafe_code)]

use crate::{internal_fds, rawcall};

/// Owns one open descriptor of this process; closed on drop.
#[derive(Debug)]
pub struct Fd(i32);

impl Fd {
    /// Takes over `fd`, which must be open and owned by nobody else: it is closed with this value.
    #[must_use]
    pub const fn from_raw(fd: i32) -> Self {
        Fd(fd)
    }

    /// The number, for the kernel's use while `self` lives.
    #[must_use]
    pub const fn raw(&self) -> i32 {
        self.0
    }

    /// The same open file under a number of at least `base`, close-on-exec; the old number is free again.
    pub fn raise(self, base: i32) -> Result<Fd, i32> {
        // SAFETY: F_DUPFD_CLOEXEC takes an integer and touches no memory.
        unsafe { rawcall!(libc::SYS_fcntl, self.0, libc::F_DUPFD_CLOEXEC, base) }
            .map(|n| {
                internal_fds::add(n as i32);
                Fd(n as i32)
            })
            // EINVAL: `base` is beyond the limit on open files; to the caller the same as having none left.
            .map_err(|e| if e == libc::EINVAL { libc::EMFILE } else { e })
    }

    /// Clears `O_NONBLOCK` on the open file.
    pub fn make_blocking(&self) -> Result<(), i32> {
        // SAFETY: F_GETFL takes nothing and touches no memory.
        let flags = unsafe { rawcall!(libc::SYS_fcntl, self.0, libc::F_GETFL) }?;
        // SAFETY: F_SETFL takes an integer and touches no memory.
        unsafe { rawcall!(libc::SYS_fcntl, self.0, libc::F_SETFL, flags as i32 & !libc::O_NONBLOCK) }
            .map(drop)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // Before the close: afterwards the number may be the program's.
        internal_fds::remove(self.0);
        // SAFETY: this value owns the descriptor, so no one else's is closed. Linux frees the number whatever
        // the call returns, so there is nothing to retry.
        let _ = unsafe { rawcall!(libc::SYS_close, self.0) };
    }
}
