//! liburing: what its rings are about to do with connections.
//!
//! liburing enters the kernel by instructions of its own, so that no hook of syscall(2) sees it. But the entries of its
//! rings lie in a structure of its interface until a function of its is to submit them, and those are the loader's to
//! bind, to us first. So each of these functions looks at what it is about to submit, and goes on:
//!
//! | an entry | what is done before |
//! | --- | --- |
//! | that names a connection of ours, or registers one as a file | it goes to TCP for good, as before AIO |
//! | that names an epoll set of ours, or changes one | all connections do |
//! | that sends a message with connections in it | they go to TCP for good, as at sendmsg |
//! | any other: files, timers, accept, sockets that we do not know | nothing |
//!
//! A database that reads its files so keeps its connections in memory. The kernel knows nothing of an entry before it is
//! submitted, also where a thread of its own reads the queue (IORING_SETUP_SQPOLL), since liburing publishes the queue's
//! tail there and not before.
//!
//! A program that has liburing in itself calls that, without the loader and without us; so does one that finds the
//! functions by dlsym(3). docs/SOCKET_API.md says what becomes of these. Not among the names are io_uring_setup,
//! io_uring_enter and io_uring_register, of which many libraries have some of their own, that fail in other ways.
//!
//! # The way on
//!
//! A hook's stub keeps the arguments, has [`before`] look and say where liburing's own function is, and jumps there with
//! the caller's return address. Where it is depends on who calls: one that was there when the program started is found
//! for good. Another library may have been loaded by dlopen(3) with a liburing of its own, in a scope of its own in which
//! RTLD_NEXT does not look, and may be unloaded again: what was found for a caller holds as long as nothing is unloaded.

use super::direct::{self, quiet};
use super::fdops;
use super::sockets::hand_over_here;
use super::uring::{MOST_ENTRIES, OP_EPOLL_CTL};
use crate::fd_table;
use crate::hook::{errno, set_errno, settings};
use engine::lock;
use engine::reason::Reason;
use engine::sys::is_accessible;
use libc::{Dl_info, c_char, c_int, c_void};
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};

// include/uapi/linux/io_uring.h
const SETUP_SQE128: u32 = 1 << 10;
const FIXED_FILE: u8 = 1 << 0;
const OP_SENDMSG: u8 = 9;
const OP_FILES_UPDATE: u8 = 20;
const OP_SPLICE: u8 = 30;
const OP_TEE: u8 = 33;
const OP_SENDMSG_ZC: u8 = 48;
/// IORING_MAX_FIXED_FILES.
const MOST_FILES: usize = 1 << 20;

/// struct io_uring of liburing.h, as far as it tells of what waits to be submitted. Its interface: versions 2.0 to 2.15
/// have these members at these places.
#[repr(C)]
struct Ring {
    /// How far the kernel has read.
    khead: *const AtomicU32,
    ktail: *const AtomicU32,
    kring_mask: *const u32,
    kring_entries: *const u32,
    kflags: *const AtomicU32,
    kdropped: *const AtomicU32,
    array: *const u32,
    sqes: *const Sqe,
    sqe_head: u32,
    /// How far the program has filled entries; they are taken in their order.
    sqe_tail: u32,
    more: [u64; 15],
    /// IORING_SETUP_…
    flags: u32,
}
const _: () = assert!(std::mem::offset_of!(Ring, sqe_tail) == 68 && std::mem::offset_of!(Ring, flags) == 192);

/// struct io_uring_sqe.
#[derive(Clone, Copy)]
#[repr(C)]
struct Sqe {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: c_int,
    off: u64,
    addr: u64,
    len: u32,
    op_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd_in: c_int,
    rest: [u64; 2],
}
const _: () = assert!(size_of::<Sqe>() == 64);

/// The kernel is about to use `fd`.
fn outside(fd: c_int) {
    if let Some(e) = fd_table::stream(fd) {
        if !e.sock.is_plain() {
            hand_over_here(&e, fd, Reason::AsyncIo);
        }
    } else if fd_table::epoll(fd).is_some() {
        direct::go_quiet(Reason::AsyncIo);
    }
}

/// The program's numbers of `n` files.
///
/// # Safety
/// As the program vouches for them.
unsafe fn files(list: *const c_int, n: usize) {
    if n <= MOST_FILES && is_accessible(list.addr(), n * size_of::<c_int>(), false) {
        for i in 0..n {
            // SAFETY: one of the n.
            outside(unsafe { list.add(i).read_unaligned() });
        }
    }
}

fn look(sqe: &Sqe) {
    if sqe.flags & FIXED_FILE == 0 {
        outside(sqe.fd);
    }
    match sqe.opcode {
        OP_SPLICE | OP_TEE => outside(sqe.splice_fd_in),
        OP_EPOLL_CTL if fd_table::stream(sqe.off as c_int).is_some() => direct::go_quiet(Reason::AsyncIo),
        // SAFETY: an entry's, for the kernel to read.
        OP_FILES_UPDATE => unsafe { files(sqe.addr as usize as *const _, sqe.len as usize) },
        OP_SENDMSG | OP_SENDMSG_ZC => fdops::leaving_in_a_ring(sqe.addr as usize as *const _),
        _ => {}
    }
}

/// Looks at what `ring` has to submit. False: that is no ring of liburing's.
///
/// # Safety
/// The program's ring, as it gives it to liburing, which reads the same.
unsafe fn submitted(ring: *const Ring) -> bool {
    let there = |at: usize, n| at.is_multiple_of(4) && is_accessible(at, n, false);
    if !there(ring.addr(), size_of::<Ring>()) {
        return false;
    }
    // SAFETY: it is there, and as the caller vouches: nobody else fills entries while one submits them.
    let r = unsafe { &*ring };
    if ![r.khead.addr(), r.kring_mask.addr(), r.kring_entries.addr()].into_iter().all(|at| there(at, 4)) {
        return false;
    }
    // SAFETY: they are there; made by io_uring_queue_mmap(3), and only the first is written since, by the kernel.
    let (head, mask, entries) = unsafe { ((*r.khead).load(Relaxed), *r.kring_mask, *r.kring_entries) };
    let n = r.sqe_tail.wrapping_sub(head);
    if !entries.is_power_of_two() || entries > MOST_ENTRIES || mask != entries - 1 || n > entries {
        return false;
    }
    let shift = u32::from(r.flags & SETUP_SQE128 != 0);
    (0..n).all(|i| {
        let index = (head.wrapping_add(i) & mask) << shift;
        let sqe = r.sqes.wrapping_add(index as usize);
        let there = there(sqe.addr(), size_of::<Sqe>());
        if there {
            // SAFETY: it is there, one of the program's entries.
            look(&unsafe { sqe.read() });
        }
        there
    })
}

/// Where it stops to be asked: nothing is ours.
fn idle() -> bool {
    fd_table::is_empty() || quiet() || settings().disable
}

/// The functions that are led on, by the first argument of [`before`].
static NAMES: [&CStr; 17] = [
    c"io_uring_submit",
    c"io_uring_submit_and_wait",
    c"io_uring_submit_and_wait_timeout",
    c"io_uring_submit_and_wait_min_timeout",
    c"io_uring_submit_and_wait_reg",
    c"io_uring_submit_and_get_events",
    c"io_uring_wait_cqes",
    c"io_uring_wait_cqes_min_timeout",
    c"io_uring_wait_cqe_timeout",
    c"io_uring_register_files",
    c"io_uring_register_files_tags",
    c"io_uring_register_files_update",
    c"io_uring_register_files_update_tag",
    c"io_uring_queue_init",
    c"io_uring_queue_init_params",
    c"io_uring_queue_init_mem",
    c"io_uring_queue_mmap",
];
const REGISTER: usize = 9;
const UPDATE: usize = 11;
const MAKE: usize = 13;

/// A function that makes a ring, or one of those above, has been called.
static USED: AtomicBool = AtomicBool::new(false);

/// Whether the program's rings may be those of a liburing whose functions come by here.
pub fn is_used() -> bool {
    // Relaxed: a thread that has made a ring has made this known to itself; others learn of the ring from it.
    USED.load(Relaxed)
}

/// Where they are for all callers, if the program was started with liburing.
static STARTED_WITH: [AtomicUsize; NAMES.len()] = [const { AtomicUsize::new(0) }; NAMES.len()];

/// Before main: what is there now stays.
pub fn start() {
    // SAFETY: NUL-terminated; dlsym may be called at any time after the loader has started.
    let find = |name: &CStr| unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) } as usize;
    if find(NAMES[0]) != 0 {
        for (at, name) in STARTED_WITH.iter().zip(NAMES) {
            // Relaxed: code needs no publication.
            at.store(find(name), Relaxed);
        }
    }
    // SAFETY: always; the program is not to find our failure there.
    unsafe { libc::dlerror() };
}

/// `which` is called with `args` (its first six) from `caller`: where it goes on.
unsafe extern "C" fn before(which: usize, args: *const [usize; 6], caller: usize) -> usize {
    // SAFETY: the stub's, on the stack.
    let [ring, a, b, c, d, _] = unsafe { *args };
    let e = errno();
    if !idle() {
        match which {
            // A ring of which nothing is known yet, and in which nothing is.
            MAKE.. => {}
            // SAFETY: (ring, files, n), (ring, files, tags, n): the program's.
            REGISTER => unsafe { files(a as *const c_int, b & u32::MAX as usize) },
            // SAFETY: as above.
            n if n < UPDATE && n > REGISTER => unsafe { files(a as *const c_int, c & u32::MAX as usize) },
            // SAFETY: (ring, from, files, n), (ring, from, files, tags, n): the program's.
            UPDATE => unsafe { files(b as *const c_int, c & u32::MAX as usize) },
            // SAFETY: as above.
            n if n > UPDATE => unsafe { files(b as *const c_int, d & u32::MAX as usize) },
            _ => {
                // SAFETY: the program's ring.
                if !unsafe { submitted(ring as *const Ring) } {
                    direct::go_quiet(Reason::AsyncIo);
                }
            }
        }
    }
    // Relaxed: code needs no publication.
    let at = match STARTED_WITH[which].load(Relaxed) {
        0 => found_for(which, caller),
        at => at,
    };
    if !USED.load(Relaxed) && !is_own(caller, at) {
        USED.store(true, Relaxed);
    }
    set_errno(e);
    at
}

/// Whether the caller is liburing itself, one of whose functions calls another: that has been found by dlsym(3), else it
/// would have come by here.
#[cold]
fn is_own(caller: usize, at: usize) -> bool {
    let base = |at| library_of(at).map(|(_, base)| base);
    base(caller) == base(at)
}

/// What has been found for a caller: `which`, its address, how many libraries had been unloaded, and where it goes on.
static LAST: [AtomicUsize; 4] = [const { AtomicUsize::new(0) }; 4];
static LAST_LOCK: AtomicU32 = AtomicU32::new(0);

/// In a forked child: whoever held the lock is not there.
pub fn after_fork_child() {
    LAST_LOCK.store(0, Relaxed);
}

#[cold]
fn found_for(which: usize, caller: usize) -> usize {
    let now = crate::deep::counts()[1] as usize;
    let key = [which, caller, now];
    if let Some(_g) = lock::try_lock(&LAST_LOCK) {
        // Relaxed: under the lock.
        let [w, c, n, at] = LAST.each_ref().map(|word| word.load(Relaxed));
        if at != 0 && [w, c, n] == key {
            return at;
        }
    }
    let at = find(NAMES[which], caller);
    if at == 0 {
        return missing as *const () as usize;
    }
    if let Some(_g) = lock::try_lock(&LAST_LOCK) {
        for (word, value) in LAST.iter().zip([which, caller, now, at]) {
            word.store(value, Relaxed);
        }
    }
    at
}

/// The library that an address lies in: its path and where it begins.
fn library_of(at: usize) -> Option<(*const c_char, *mut c_void)> {
    // SAFETY: plain old data, of which all zeroes is a value.
    let mut info: Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for.
    (unsafe { libc::dladdr(at as *const c_void, &mut info) } != 0).then_some((info.dli_fname, info.dli_fbase))
}

/// liburing's function of this name for who calls from `caller`, as the loader would have bound it without us: in the
/// program's scope, then among what the caller's own library has brought. 0: there is none.
fn find(name: &CStr, caller: usize) -> usize {
    // SAFETY: NUL-terminated; called by a program that runs.
    let mut at = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) } as usize;
    if at == 0
        && let Some((path, _)) = library_of(caller)
    {
        at = symbol_of(path, name);
    }
    for soname in [c"liburing.so.2", c"liburing.so.1"] {
        if at == 0 {
            at = symbol_of(soname.as_ptr(), name);
        }
    }
    // SAFETY: always; the program is not to find our failures there.
    unsafe { libc::dlerror() };
    at
}

/// A library's symbol, if the library is loaded; 0: it is not, or has none of that name but ours, which the program's
/// own scope has.
fn symbol_of(path: *const c_char, name: &CStr) -> usize {
    // SAFETY: NUL-terminated; nothing is loaded.
    let handle = crate::real::real!(dlopen(path => *const c_char, libc::RTLD_LAZY | libc::RTLD_NOLOAD => c_int) -> *mut c_void);
    if handle.is_null() {
        return 0;
    }
    // SAFETY: a handle, and NUL-terminated.
    let at = unsafe { libc::dlsym(handle, name.as_ptr()) } as usize;
    // SAFETY: opened above. Its owner, the caller of the function that is looked for, keeps it loaded.
    unsafe { libc::dlclose(handle) };
    let base = |at| library_of(at).map(|(_, base)| base);
    if at == 0 || base(at) == base(missing as *const () as usize) { 0 } else { at }
}

extern "C" fn missing() -> c_int {
    -libc::ENOSYS
}

/// Entries that keep the arguments, ask [`before`], and jump.
macro_rules! led {
    ($($(#[$m:meta])* $name:ident = $which:literal;)*) => {$(
        $(#[$m])*
        #[cfg(target_arch = "x86_64")]
        #[unsafe(naked)]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name() -> c_int {
            // 56 bytes and the return address keep the stack aligned to 16.
            core::arch::naked_asm!(
                ".cfi_startproc",
                "sub rsp, 56",
                ".cfi_adjust_cfa_offset 56",
                "mov [rsp], rdi",
                "mov [rsp + 8], rsi",
                "mov [rsp + 16], rdx",
                "mov [rsp + 24], rcx",
                "mov [rsp + 32], r8",
                "mov [rsp + 40], r9",
                "mov edi, {which}",
                "mov rsi, rsp",
                "mov rdx, [rsp + 56]",
                "call {before}",
                "mov rdi, [rsp]",
                "mov rsi, [rsp + 8]",
                "mov rdx, [rsp + 16]",
                "mov rcx, [rsp + 24]",
                "mov r8, [rsp + 32]",
                "mov r9, [rsp + 40]",
                "add rsp, 56",
                ".cfi_adjust_cfa_offset -56",
                "jmp rax",
                ".cfi_endproc",
                which = const $which,
                before = sym before,
            )
        }

        $(#[$m])*
        #[cfg(target_arch = "aarch64")]
        #[unsafe(naked)]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name() -> c_int {
            core::arch::naked_asm!(
                ".cfi_startproc",
                "stp x29, x30, [sp, #-64]!",
                ".cfi_adjust_cfa_offset 64",
                ".cfi_rel_offset x29, 0",
                ".cfi_rel_offset x30, 8",
                "stp x0, x1, [sp, #16]",
                "stp x2, x3, [sp, #32]",
                "stp x4, x5, [sp, #48]",
                "mov x0, #{which}",
                "add x1, sp, #16",
                "mov x2, x30",
                "bl {before}",
                "mov x16, x0",
                "ldp x0, x1, [sp, #16]",
                "ldp x2, x3, [sp, #32]",
                "ldp x4, x5, [sp, #48]",
                "ldp x29, x30, [sp], #64",
                ".cfi_adjust_cfa_offset -64",
                ".cfi_restore x29",
                ".cfi_restore x30",
                "br x16",
                ".cfi_endproc",
                which = const $which,
                before = sym before,
            )
        }
    )*};
}

led! {
    /// io_uring_submit(3).
    io_uring_submit = 0;
    /// io_uring_submit_and_wait(3).
    io_uring_submit_and_wait = 1;
    /// io_uring_submit_and_wait_timeout(3).
    io_uring_submit_and_wait_timeout = 2;
    /// io_uring_submit_and_wait_min_timeout(3).
    io_uring_submit_and_wait_min_timeout = 3;
    /// io_uring_submit_and_wait_reg(3).
    io_uring_submit_and_wait_reg = 4;
    /// io_uring_submit_and_get_events(3).
    io_uring_submit_and_get_events = 5;
    /// io_uring_wait_cqes(3), which submits.
    io_uring_wait_cqes = 6;
    /// io_uring_wait_cqes_min_timeout(3), which submits.
    io_uring_wait_cqes_min_timeout = 7;
    /// io_uring_wait_cqe_timeout(3), which submits where the kernel has no time-outs of its own for it.
    io_uring_wait_cqe_timeout = 8;
    /// io_uring_register_files(3).
    io_uring_register_files = 9;
    /// io_uring_register_files_tags(3).
    io_uring_register_files_tags = 10;
    /// io_uring_register_files_update(3).
    io_uring_register_files_update = 11;
    /// io_uring_register_files_update_tag(3).
    io_uring_register_files_update_tag = 12;
    /// io_uring_queue_init(3).
    io_uring_queue_init = 13;
    /// io_uring_queue_init_params(3).
    io_uring_queue_init_params = 14;
    /// io_uring_queue_init_mem(3).
    io_uring_queue_init_mem = 15;
    /// io_uring_queue_mmap(3).
    io_uring_queue_mmap = 16;
}
