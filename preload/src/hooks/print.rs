//! dprintf and vdprintf: libc writes what they print by a name that can't be hooked.
//!
//! The text is made by libc's vsnprintf and goes the way of write(2). dprintf is variadic, so it is caught in
//! assembly that makes the `va_list` of the platform's C ABI (System V x86-64 3.5.7, AAPCS64 appendix B).

use super::data::{self, hook};
use super::variadic::variadic;
use crate::fd_table;
use crate::hook::fail;
use crate::real::real;
use libc::{c_char, c_int, c_void, size_t, ssize_t};

/// A `va_list` as C passes it: a pointer to the structure, on both architectures.
type VaList = *mut c_void;

/// Bytes of the structure. A call that reads the arguments changes it, so each gets a copy.
const VA_LIST: usize = if cfg!(target_arch = "aarch64") { 32 } else { 24 };

// stdio.h, and bits/stdio2.h of glibc.
unsafe extern "C" {
    fn vsnprintf(s: *mut c_char, n: size_t, format: *const c_char, list: VaList) -> c_int;
    fn __vsnprintf_chk(
        s: *mut c_char,
        n: size_t,
        flag: c_int,
        size: size_t,
        format: *const c_char,
        list: VaList,
    ) -> c_int;
}

/// # Safety
/// As vsnprintf(3); `list` is left as it was. A `flag` above 0 asks for the checks of _FORTIFY_SOURCE.
unsafe fn format_to(text: &mut [u8], flag: c_int, format: *const c_char, list: VaList) -> c_int {
    let mut copy = [0u64; VA_LIST / 8];
    // SAFETY: `list` is a va_list, so VA_LIST bytes of plain data.
    unsafe { std::ptr::copy_nonoverlapping(list.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), VA_LIST) };
    let (s, n, list) = (text.as_mut_ptr().cast(), text.len(), copy.as_mut_ptr().cast());
    if flag > 0 {
        // SAFETY: `text` is writable for its length, the rest is the program's.
        unsafe { __vsnprintf_chk(s, n, flag, n, format, list) }
    } else {
        // SAFETY: as above.
        unsafe { vsnprintf(s, n, format, list) }
    }
}

/// vdprintf(3) to a connection of ours.
///
/// # Safety
/// As vdprintf(3).
unsafe fn print(fd: c_int, flag: c_int, format: *const c_char, list: VaList) -> c_int {
    let mut small = [0u8; 1024];
    let mut large = Vec::new();
    // SAFETY: as the caller vouches.
    let n = unsafe { format_to(&mut small, flag, format, list) };
    let Ok(len) = usize::try_from(n) else { return n };
    let mut text = &small[..len.min(small.len())];
    if len >= small.len() {
        // vsnprintf ends it with a NUL.
        large.resize(len + 1, 0u8);
        // SAFETY: as above.
        if unsafe { format_to(&mut large, flag, format, list) } != n {
            return fail(libc::EINVAL);
        }
        text = &large[..len];
    }
    // As stdio does: until all is written, and -1 if it can't be.
    while !text.is_empty() {
        // SAFETY: our own text.
        let w: ssize_t = unsafe { data::write(fd, text.as_ptr().cast(), text.len()) };
        if w < 0 {
            return -1;
        }
        text = &text[w as usize..];
    }
    n
}

fn ours(fd: c_int) -> bool {
    fd_table::stream(fd).is_some_and(|e| !e.sock.is_plain())
}

hook! {
    /// vdprintf(3).
    fn vdprintf(fd: c_int, format: *const c_char, list: VaList) -> c_int {
        if ours(fd) {
            // SAFETY: as the program vouches.
            return unsafe { print(fd, 0, format, list) };
        }
        real!(vdprintf(fd => c_int, format => *const c_char, list => VaList) -> c_int)
    }
}

hook! {
    /// vdprintf(3) as _FORTIFY_SOURCE calls it.
    fn __vdprintf_chk(fd: c_int, flag: c_int, format: *const c_char, list: VaList) -> c_int {
        if ours(fd) {
            // SAFETY: as the program vouches.
            return unsafe { print(fd, flag, format, list) };
        }
        real!(__vdprintf_chk(fd => c_int, flag => c_int, format => *const c_char, list => VaList) -> c_int)
    }
}

/// The `va_list` structure.
#[cfg(target_arch = "x86_64")]
#[repr(C)]
struct List {
    gp_offset: u32,
    fp_offset: u32,
    overflow_arg_area: *mut c_void,
    reg_save_area: *mut c_void,
}

/// The `va_list` structure.
#[cfg(target_arch = "aarch64")]
#[repr(C)]
struct List {
    stack: *mut c_void,
    gr_top: *mut c_void,
    vr_top: *mut c_void,
    gr_offs: i32,
    vr_offs: i32,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const _: () = assert!(size_of::<List>() == VA_LIST);

/// The list of a call with `named` arguments before the variable ones. `registers`: the integer argument
/// registers and behind them the vector ones, 16 bytes each.
#[cfg(target_arch = "x86_64")]
fn list(registers: *mut u64, stack: *mut c_void, named: usize) -> List {
    List {
        gp_offset: named as u32 * 8,
        fp_offset: 48,
        overflow_arg_area: stack,
        reg_save_area: registers.cast(),
    }
}

/// As above.
#[cfg(target_arch = "aarch64")]
fn list(registers: *mut u64, stack: *mut c_void, named: usize) -> List {
    let gr_top = registers.wrapping_add(8);
    List {
        stack,
        gr_top: gr_top.cast(),
        vr_top: gr_top.wrapping_add(16).cast(),
        gr_offs: -(8 * (8 - named as i32)),
        vr_offs: -128,
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
extern "C" fn plain(registers: *mut u64, stack: *mut c_void) -> c_int {
    let mut list = list(registers, stack, 2);
    // SAFETY: the entry has stored all argument registers; int dprintf(int, const char *, ...).
    unsafe {
        let (fd, format) = (registers.read() as c_int, registers.add(1).read() as *const c_char);
        vdprintf(fd, format, (&raw mut list).cast())
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
extern "C" fn checked(registers: *mut u64, stack: *mut c_void) -> c_int {
    let mut list = list(registers, stack, 3);
    // SAFETY: as above; int __dprintf_chk(int, int, const char *, ...).
    unsafe {
        let (fd, flag) = (registers.read() as c_int, registers.add(1).read() as c_int);
        __vdprintf_chk(fd, flag, registers.add(2).read() as *const c_char, (&raw mut list).cast())
    }
}

variadic! {
    /// dprintf(3).
    dprintf => plain;
    /// dprintf(3) as _FORTIFY_SOURCE calls it.
    __dprintf_chk => checked;
}
