//! syscall(2), and what a program says before it locks itself in.
//!
//! libuv closes fds with `syscall(SYS_close, …)`, others read or poll that way. For the calls that we hook
//! by name, the number leads to the same hook. A context of Linux AIO moves bytes where nobody can follow, and so
//! does a ring of io_uring with which a program does more than `uring.rs` knows of: every connection of the process
//! goes back to TCP first. So it does before a seccomp filter is set, which might kill the process for a system call
//! of ours.

use super::data::hook;
use super::{data, epoll, fdops, process, ready, sockets, uring};
use crate::fd_table;
use crate::real::real;
use engine::gate;
use engine::once::Once;
use engine::reason::Reason;
use libc::{c_int, c_long, c_void};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Why no connection of this process is upgraded any more, if so.
static QUIET: Once<Reason> = Once::new();
/// The process is in a sandbox, where a system call of ours might kill it.
static SANDBOXED: AtomicBool = AtomicBool::new(false);

/// Whether new connections are left alone.
pub fn quiet() -> bool {
    QUIET.get().is_some()
}

/// Why they are, for a connection that is in the table.
pub fn why_quiet() -> Option<Reason> {
    // ORDERING [quiet] fence; pairs with the fence in `go_quiet`: this sees why, or that sees the connection in the table.
    // Model: loom_quiet_against_a_newcomer.
    gate::between();
    QUIET.get().copied()
}

/// Whether system calls of our own are to be avoided.
pub fn sandboxed() -> bool {
    SANDBOXED.load(Relaxed)
}

/// Before and after the call that sets a filter. What would be told at the end is told now.
fn enter_sandbox<R: Default + PartialOrd>(call: impl FnOnce() -> R) -> R {
    go_quiet(Reason::Sandbox);
    if !sandboxed() {
        crate::hook::write_stats();
    }
    let before = SANDBOXED.swap(true, Relaxed);
    let r = call();
    if r < R::default() {
        SANDBOXED.store(before, Relaxed);
    }
    r
}

/// All connections go back to TCP and stay there.
pub fn go_quiet(why: Reason) {
    QUIET.get_or_init(|| why);
    // ORDERING [quiet] fence; pairs with the fence in `why_quiet`.
    gate::between();
    let _ = engine::sys::gettid();
    crate::remote::withdraw(false);
    // Where both ends are this process's, one must not leave the ring before the other has asked for its bytes.
    for fd in fd_table::numbers() {
        if let Some(e) = fd_table::stream(fd)
            && !super::relay::take_over(&e, fd)
        {
            e.sock.stop_rx(why, false);
        }
    }
    for fd in fd_table::numbers() {
        if let Some(e) = fd_table::stream(fd) {
            sockets::hand_over(&e, fd, why);
        }
    }
}

/// The calling thread is about to get a descriptor table of its own. If others go on with the old one, a number
/// names different things in different threads from then on, and ours would be wrong for some of them: the
/// process has its connections on TCP from then on. False: there are no others.
pub fn table_splits() -> bool {
    let alone = engine::sys::threads() == Some(1);
    if !alone {
        go_quiet(Reason::FdPassed);
    }
    !alone
}

hook! {
    /// unshare(2).
    fn unshare(flags: c_int) -> c_int {
        if flags & libc::CLONE_FILES != 0 {
            table_splits();
        }
        real!(unshare(flags => c_int) -> c_int)
    }
}

hook! {
    /// prctl(2).
    fn prctl(op: c_int, a: usize, b: usize, c: usize, d: usize) -> c_int {
        let kernel = || real!(prctl(op => c_int, a => usize, b => usize, c => usize, d => usize) -> c_int);
        if op == libc::PR_SET_SECCOMP { enter_sandbox(kernel) } else { kernel() }
    }
}

/// Whether these are the operation and argument of a seccomp(2) that takes effect.
fn is_filter(operation: usize, arg: usize) -> bool {
    match operation as u32 {
        libc::SECCOMP_SET_MODE_STRICT => true,
        libc::SECCOMP_SET_MODE_FILTER => arg != 0,
        _ => false,
    }
}

/// Bytes of a signal mask as the kernel has it.
const MASK: usize = 8;

/// The mask in the sixth argument of pselect6: the address of a pair of mask and size. `None`: one that the kernel
/// refuses.
///
/// # Safety
/// `pair` is 0 or the program's.
unsafe fn mask_of(pair: usize) -> Option<*const libc::sigset_t> {
    if pair == 0 {
        return Some(std::ptr::null());
    }
    // SAFETY: as the caller vouches.
    let [mask, size] = *unsafe { crate::hook::given(pair as *const [usize; 2]) }?;
    (mask == 0 || size == MASK).then_some(mask as *const _)
}

hook! {
    /// syscall(2). Variadic; its arguments are passed as the ABI passes seven plain ones.
    fn syscall(nr: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long {
        let fd = a as c_int;
        let kernel = || real!(syscall(nr => c_long, a => usize, b => usize, c => usize, d => usize, e => usize, f => usize) -> c_long);
        #[allow(unused_unsafe, reason = "real! has its own, for hooks that are not in a block of their own")]
        // SAFETY: in all arms: the arguments are the program's own, in the types of the call named.
        unsafe {
            match nr {
                libc::SYS_close => sockets::close(fd) as c_long,
                libc::SYS_read => data::read(fd, b as *mut c_void, c) as c_long,
                libc::SYS_write => data::write(fd, b as *const c_void, c) as c_long,
                libc::SYS_readv => data::readv(fd, b as *const _, c as c_int) as c_long,
                libc::SYS_writev => data::writev(fd, b as *const _, c as c_int) as c_long,
                // The offset comes in two halves, of which the first is all of it here.
                libc::SYS_preadv2 => data::preadv2(fd, b as *const _, c as c_int, d as i64, f as c_int) as c_long,
                libc::SYS_pwritev2 => data::pwritev2(fd, b as *const _, c as c_int, d as i64, f as c_int) as c_long,
                libc::SYS_recvfrom => data::recvfrom(fd, b as *mut c_void, c, d as c_int, e as *mut _, f as *mut _) as c_long,
                libc::SYS_sendto => data::sendto(fd, b as *const c_void, c, d as c_int, e as *const _, f as u32) as c_long,
                libc::SYS_recvmsg => data::recvmsg(fd, b as *mut _, c as c_int) as c_long,
                libc::SYS_sendmsg => data::sendmsg(fd, b as *const _, c as c_int) as c_long,
                libc::SYS_recvmmsg => data::recvmmsg(fd, b as *mut _, c as u32, d as c_int, e as *mut _).into(),
                libc::SYS_sendmmsg => data::sendmmsg(fd, b as *mut _, c as u32, d as c_int).into(),
                libc::SYS_sendfile => data::sendfile(fd, b as c_int, c as *mut _, d) as c_long,
                libc::SYS_splice => data::splice(fd, b as *mut _, c as c_int, d as *mut _, e, f as u32) as c_long,
                libc::SYS_connect => sockets::connect(fd, b as *const _, c as u32).into(),
                libc::SYS_accept => sockets::accept(fd, b as *mut _, c as *mut _).into(),
                libc::SYS_accept4 => sockets::accept4(fd, b as *mut _, c as *mut _, d as c_int).into(),
                libc::SYS_shutdown => sockets::shutdown(fd, b as c_int).into(),
                libc::SYS_setsockopt => sockets::setsockopt(fd, b as c_int, c as c_int, d as *const _, e as u32).into(),
                libc::SYS_getsockopt => sockets::getsockopt(fd, b as c_int, c as c_int, d as *mut _, e as *mut _).into(),
                libc::SYS_ioctl => sockets::ioctl(fd, b as libc::c_ulong, c as *mut _).into(),
                libc::SYS_fcntl => fdops::fcntl(fd, b as c_int, c).into(),
                libc::SYS_dup => fdops::dup(fd).into(),
                libc::SYS_dup3 => fdops::dup3(fd, b as c_int, c as c_int).into(),
                libc::SYS_rt_sigaction if d == MASK => super::signals::by_number(fd, b as *const _, c as *mut _).into(),
                libc::SYS_unshare => unshare(fd).into(),
                libc::SYS_close_range => fdops::close_range(a as u32, b as u32, c as c_int).into(),
                libc::SYS_epoll_create1 => epoll::epoll_create1(fd).into(),
                libc::SYS_epoll_ctl => epoll::epoll_ctl(fd, b as c_int, c as c_int, d as *mut _).into(),
                libc::SYS_epoll_pwait => epoll::epoll_pwait(fd, b as *mut _, c as c_int, d as c_int, e as *const _).into(),
                libc::SYS_epoll_pwait2 => epoll::epoll_pwait2(fd, b as *mut _, c as c_int, d as *const _, e as *const _).into(),
                // libc's own functions pass the mask on with the kernel's size of it, which is all that is read.
                libc::SYS_ppoll if (d == 0 || e == MASK) && (c == 0 || engine::sys::readable(c)) => ready::ppoll(a as *mut _, b as _, c as *mut _, d as *const _).into(),
                libc::SYS_pselect6 if e == 0 || engine::sys::readable(e) => match mask_of(f) {
                    Some(mask) => ready::pselect(fd, b as *mut _, c as *mut _, d as *mut _, e as *const _, mask).into(),
                    None => kernel(),
                },
                #[cfg(target_arch = "x86_64")]
                // libc's select reads the time itself, where the kernel answers EFAULT.
                libc::SYS_select if e == 0 || engine::sys::readable(e) => ready::select(fd, b as *mut _, c as *mut _, d as *mut _, e as *mut _).into(),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_dup2 => fdops::dup2(fd, b as c_int).into(),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_poll => ready::poll(a as *mut _, b as _, c as c_int).into(),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_epoll_wait => epoll::epoll_wait(fd, b as *mut _, c as c_int, d as c_int).into(),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_epoll_create => epoll::epoll_create(fd).into(),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_fork => process::forking(kernel),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_vfork => process::vfork().into(),
                libc::SYS_clone if a & libc::CLONE_VM as usize == 0 => process::forking(kernel),
                libc::SYS_clone3 if engine::sys::readable(a) && *(a as *const u64) & libc::CLONE_VM as u64 == 0 => process::forking(kernel),
                libc::SYS_execveat => process::execveat(fd, b as *const _, c as *const _, d as *const _, e as c_int).into(),
                libc::SYS_io_uring_setup => uring::setup(b as *mut _, |b| real!(syscall(nr => c_long, a => usize, b => usize, c => usize, d => usize, e => usize, f => usize) -> c_long)),
                libc::SYS_io_uring_enter => uring::enter(fd, uring::Enter { submit: b as u32, min: c as u32, flags: d as u32 }, |n| real!(syscall(nr => c_long, a => usize, n.submit as usize => usize, n.min as usize => usize, n.flags as usize => usize, e => usize, f => usize) -> c_long)),
                libc::SYS_io_uring_register => {
                    uring::register(fd, b as u32);
                    kernel()
                }
                libc::SYS_execve => process::execve(a as *const _, b as *const _, c as *const _).into(),
                _ => {
                    match nr {
                        // Other operations, and a filter that is not there, only ask.
                        libc::SYS_seccomp if is_filter(a, c) => return enter_sandbox(kernel),
                        libc::SYS_io_setup => go_quiet(Reason::AsyncIo),
                        _ => {}
                    }
                    kernel()
                }
            }
        }
    }
}
