//! What every hook shares: errno, the kernel's result convention, and the start of the library.

use engine::{config, report};

/// Sets errno.
pub fn set_errno(e: i32) {
    // SAFETY: libc gives each thread a valid errno location.
    unsafe { *libc::__errno_location() = e };
}

/// errno.
pub fn errno() -> i32 {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}

/// A result type of libc in which -1 (or NULL) says "failed, see errno".
pub trait Failed {
    /// The failure value.
    const FAILED: Self;
}
impl Failed for i32 {
    const FAILED: i32 = -1;
}
impl Failed for i64 {
    const FAILED: i64 = -1;
}
impl Failed for isize {
    const FAILED: isize = -1;
}
/// A signal handler: SIG_ERR.
impl Failed for usize {
    const FAILED: usize = usize::MAX;
}
impl Failed for *mut libc::FILE {
    const FAILED: *mut libc::FILE = std::ptr::null_mut();
}
impl Failed for *mut libc::DIR {
    const FAILED: *mut libc::DIR = std::ptr::null_mut();
}
impl Failed for *mut libc::c_void {
    const FAILED: *mut libc::c_void = std::ptr::null_mut();
}
impl Failed for () {
    const FAILED: () = ();
}

/// Fails with `e`.
#[cold]
pub fn fail<R: Failed>(e: i32) -> R {
    set_errno(e);
    R::FAILED
}

/// libc's convention to the kernel's: -1 becomes minus errno.
#[inline]
pub fn to_kernel(n: isize) -> isize {
    if n < 0 { -(errno() as isize) } else { n }
}

/// The kernel's convention to libc's; errno is touched on failure only.
#[inline]
pub fn to_libc(n: isize) -> isize {
    if n < 0 { fail(-n as i32) } else { n }
}

/// Whether the kernel would find memory there, as far as that shows without a system call: the first page
/// and the upper half belong to no program. An address that merely is not mapped is a fault of the program
/// that the kernel answers with EFAULT and a look with SIGSEGV; docs/SOCKET_API.md says so.
#[inline]
pub fn plausible<T>(p: *const T, bytes: usize) -> bool {
    let at = p as usize;
    at >= 4096 && at.checked_add(bytes).is_some_and(|end| end <= 1 << 47)
}

/// What `p` points to; `None` where the kernel would find nothing, as far as that shows.
///
/// # Safety
/// `p` is the program's, as it gives it to the kernel, or null.
#[inline]
pub unsafe fn given<'a, T>(p: *const T) -> Option<&'a T> {
    // SAFETY: not null; the program vouches for it.
    plausible(p, size_of::<T>()).then(|| unsafe { &*p })
}

/// Whether the library has been switched off for this process.
#[inline]
pub fn disabled() -> bool {
    settings().disable || crate::hooks::direct::quiet()
}

/// The settings, read at the first socket.
#[inline]
pub fn settings() -> &'static config::Config {
    config::init(&env, &mut |line| report::say(format!("{line}\n").as_bytes()))
}

fn env(name: &str) -> Option<Vec<u8>> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: NUL-terminated; the result is read at once. The program may change its environment in
    // another thread; settings are read at the first socket, as libc itself reads its own.
    let p = unsafe { libc::getenv(name.as_ptr()) };
    if p.is_null() {
        return None;
    }
    // SAFETY: getenv returns a NUL-terminated string.
    Some(unsafe { std::ffi::CStr::from_ptr(p) }.to_bytes().to_vec())
}

/// At the end of the process: the statistics, if asked for.
pub fn write_stats() {
    let Some(path) = settings().stats.as_ref() else { return };
    let pid = engine::sys::getpid().to_string();
    let mut out = Vec::with_capacity(path.len() + 8);
    let mut i = 0;
    while i < path.len() {
        if path[i..].starts_with(b"%p") {
            out.extend_from_slice(pid.as_bytes());
            i += 2;
        } else {
            out.push(path[i]);
            i += 1;
        }
    }
    let sums = report::Sums::new();
    crate::fd_table::sum_up(&sums);
    let json = sums.json();
    if !engine::sys::may_write(json.len()) {
        return;
    }
    if let Ok(p) = std::ffi::CString::new(out)
        && !engine::sys::write_file(&p, json.as_bytes())
    {
        report::say(b"libsmc: SMC_STATS: the file can't be written\n");
    }
}
