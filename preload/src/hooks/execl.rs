//! execl, execlp and execle: variadic, so they are caught in assembly.
//!
//! The C ABIs pass variadic pointers as they pass named ones: in the argument registers, then on the stack.
//! Each entry stores the registers beside each other and hands their address and that of the stack
//! arguments on; the list becomes an array, as libc itself makes one (posix/execl.c), for the hooks of
//! execv, execvp and execve. On another architecture libc's own functions stay in place.

use super::process;
use super::variadic::variadic;
use libc::{c_char, c_int};

type CStr = *const c_char;

/// Argument registers for integers.
const REGISTERS: usize = if cfg!(target_arch = "aarch64") { 8 } else { 6 };

/// The arguments of a variadic call.
struct Args {
    registers: *const CStr,
    stack: *const CStr,
    next: usize,
}

impl Args {
    /// # Safety
    /// The caller has passed that many.
    unsafe fn next(&mut self) -> CStr {
        let i = self.next;
        self.next += 1;
        let p = if i < REGISTERS {
            self.registers.wrapping_add(i)
        } else {
            self.stack.wrapping_add(i - REGISTERS)
        };
        // SAFETY: the program passed this argument, see the module for where it is.
        unsafe { p.read() }
    }

    /// The arguments up to and with the null pointer that ends them.
    ///
    /// # Safety
    /// As its manual page has it, the call has a null pointer at the end.
    unsafe fn list(&mut self) -> Vec<CStr> {
        let mut argv = Vec::with_capacity(16);
        loop {
            // SAFETY: not beyond the null pointer.
            let p = unsafe { self.next() };
            argv.push(p);
            if p.is_null() {
                return argv;
            }
        }
    }
}

extern "C" fn list(registers: *const CStr, stack: *const CStr) -> c_int {
    let mut a = Args { registers, stack, next: 0 };
    // SAFETY: the program's arguments of execl(3).
    unsafe {
        let path = a.next();
        process::execv(path, a.list().as_ptr())
    }
}

extern "C" fn list_path(registers: *const CStr, stack: *const CStr) -> c_int {
    let mut a = Args { registers, stack, next: 0 };
    // SAFETY: the program's arguments of execlp(3).
    unsafe {
        let file = a.next();
        process::execvp(file, a.list().as_ptr())
    }
}

extern "C" fn list_environment(registers: *const CStr, stack: *const CStr) -> c_int {
    let mut a = Args { registers, stack, next: 0 };
    // SAFETY: the program's arguments of execle(3): the environment follows the null pointer.
    unsafe {
        let path = a.next();
        let argv = a.list();
        process::execve(path, argv.as_ptr(), a.next().cast())
    }
}

variadic! {
    /// execl(3).
    execl => list;
    /// execlp(3).
    execlp => list_path;
    /// execle(3).
    execle => list_environment;
}
