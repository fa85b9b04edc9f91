//! The system call instruction, and nothing else.
//!
//! This crate runs inside a library that exports `socket`, `close`, `poll` and their like. libc's wrappers of
//! those names would lead back into our own hooks, and they write `errno`, which belongs to the program. So
//! the kernel is called directly: a result below zero is `-errno`, and nothing else is touched. libc's
//! wrappers are also where a thread may be cancelled; a call made here is never a cancellation point.

#![allow(unsafe_code)]

use std::arch::asm;

/// Makes system call `nr`; the result, or `-errno`.
///
/// # Safety
///
/// What the call does to memory, descriptors and the process is the caller's to justify: each pointer among
/// the arguments must be valid for what call `nr` reads or writes through it.
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn syscall6(nr: i64, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> isize {
    let ret: isize;
    // SAFETY: the x86-64 Linux call convention: number in rax, arguments in rdi rsi rdx r10 r8 r9, result in
    // rax; the instruction overwrites rcx and r11. No stack is used. Memory effects are the caller's promise;
    // without `nomem` the compiler assumes that any memory may change.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr as isize => ret,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    ret
}

/// Makes system call `nr`; the result, or `-errno`.
///
/// # Safety
///
/// What the call does to memory, descriptors and the process is the caller's to justify: each pointer among
/// the arguments must be valid for what call `nr` reads or writes through it.
#[cfg(target_arch = "aarch64")]
#[inline]
pub unsafe fn syscall6(nr: i64, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> isize {
    let ret: isize;
    // SAFETY: the AArch64 Linux call convention: number in x8, arguments in x0..x5, result in x0; all other
    // registers are kept. No stack is used. Memory effects are the caller's promise.
    unsafe {
        asm!(
            "svc #0",
            in("x8") nr,
            inlateout("x0") a as isize => ret,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
            options(nostack)
        );
    }
    ret
}

/// The result of a call as `Ok(value)` or `Err(errno)`.
#[inline]
pub const fn check(ret: isize) -> Result<usize, i32> {
    // The kernel's own bound on error values (MAX_ERRNO); an address may be negative as isize.
    if ret < 0 && ret >= -4095 { Err(-ret as i32) } else { Ok(ret as usize) }
}

/// [`syscall6`] through [`check`], for calls of up to six arguments; those left out are zero.
///
/// The caller writes `unsafe` and the argument for it, as for [`syscall6`].
#[macro_export]
#[doc(hidden)]
macro_rules! rawcall {
    ($nr:expr) => { $crate::rawcall!(@ $nr, 0, 0, 0, 0, 0, 0) };
    ($nr:expr, $a:expr) => { $crate::rawcall!(@ $nr, $a, 0, 0, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr) => { $crate::rawcall!(@ $nr, $a, $b, 0, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr) => { $crate::rawcall!(@ $nr, $a, $b, $c, 0, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr) => { $crate::rawcall!(@ $nr, $a, $b, $c, $d, 0, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr) => { $crate::rawcall!(@ $nr, $a, $b, $c, $d, $e, 0) };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => {
        $crate::rawcall!(@ $nr, $a, $b, $c, $d, $e, $f)
    };
    (@ $nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => {
        $crate::rawsys::check($crate::rawsys::syscall6(
            $nr as i64, $a as usize, $b as usize, $c as usize, $d as usize, $e as usize, $f as usize,
        ))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_and_an_error() {
        // SAFETY: getpid takes nothing and changes nothing.
        let pid = unsafe { rawcall!(libc::SYS_getpid) };
        assert_eq!(pid, Ok(std::process::id() as usize));
        // SAFETY: closing a descriptor that can't exist changes nothing.
        let bad = unsafe { rawcall!(libc::SYS_close, -1i32) };
        assert_eq!(bad, Err(libc::EBADF));
    }

    #[test]
    fn addresses_above_the_error_range_are_values() {
        assert_eq!(check(-4096), Ok(usize::MAX - 4095));
        assert_eq!(check(-4095), Err(4095));
    }
}
