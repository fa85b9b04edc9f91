//! The kernel calls of the data path, made directly: libc's names may be our own hooks, and errno is the
//! program's. Everything here returns the kernel's word: a value, or minus an errno.
#![allow(unsafe_code)]

use crate::rawsys::syscall6;
use crate::sync::AtomicU32;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// This thread's id, cached; [`section::forget_tid`](crate::section::forget_tid) after fork.
#[inline]
pub fn gettid() -> u32 {
    crate::section::tid(load_tid)
}

#[cold]
fn load_tid() -> u32 {
    // SAFETY: no arguments.
    unsafe { syscall6(libc::SYS_gettid, 0, 0, 0, 0, 0, 0) as u32 }
}

/// In a forked child: the process id has changed.
pub fn forget_pid() {
    PID.store(0, Relaxed);
}

/// getppid(2).
pub fn getppid() -> i32 {
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_getppid, 0, 0, 0, 0, 0, 0) as i32 }
}

/// This process.
pub fn getpid() -> i32 {
    // SAFETY: no arguments.
    unsafe { syscall6(libc::SYS_getpid, 0, 0, 0, 0, 0, 0) as i32 }
}

/// 0: not known.
static PID: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// This process's id, cached; [`forget_pid`] after fork. In a child that runs in its parent's memory, the parent's.
#[inline]
pub fn own_pid() -> u32 {
    // Relaxed: the value is the same whoever stores it.
    match PID.load(Relaxed) {
        0 => {
            let pid = getpid() as u32;
            PID.store(pid, Relaxed);
            pid
        }
        pid => pid,
    }
}

/// Whether a thread of that id is there (it may have been reused: then the caller only waits longer). The first thread
/// of a process that was killed is not, though its parent, maybe the caller, has not waited for it.
pub fn thread_alive(tid: u32) -> bool {
    // SAFETY: signal 0 only asks.
    let r = unsafe { syscall6(libc::SYS_tkill, tid as usize, 0, 0, 0, 0, 0) };
    r != -(libc::ESRCH as isize) && !has_ended(tid)
}

/// Whether no process of that id is left but, at most, what its parent has not waited for: its files are
/// closed.
pub fn process_gone(pid: u32) -> bool {
    // SAFETY: signal 0 only asks.
    let r = unsafe { syscall6(libc::SYS_kill, pid as usize, 0, 0, 0, 0, 0) };
    r == -(libc::ESRCH as isize) || has_ended(pid)
}

/// Whether all threads of the process have ended, though its parent has not waited for it. False: it has not, or the
/// id is none of a process.
fn has_ended(pid: u32) -> bool {
    // SAFETY: no pointers.
    let fd = unsafe { syscall6(libc::SYS_pidfd_open, pid as usize, 0, 0, 0, 0, 0) };
    if fd < 0 {
        return fd == -(libc::ESRCH as isize);
    }
    // Readable once the last of its threads has ended (pidfd_open(2)), which closes files before that.
    let mut p = [libc::pollfd { fd: fd as i32, events: libc::POLLIN, revents: 0 }];
    let gone = poll(&mut p, Some(0)) > 0;
    close(fd as i32);
    gone
}

/// The pid namespace that this process is in, as a number; 0 unknown.
pub fn pid_namespace() -> u64 {
    namespace(c"/proc/self/ns/pid")
}

/// The pid namespace that children of this process are in; 0 unknown.
pub fn pid_namespace_of_children() -> u64 {
    namespace(c"/proc/self/ns/pid_for_children")
}

/// readlink(2): how many bytes of the link's text are in `b`; 0: there is no such link.
fn read_link(path: &std::ffi::CStr, b: &mut [u8]) -> usize {
    let at = libc::AT_FDCWD as usize;
    // SAFETY: the path is NUL-terminated, `b` writable for its length.
    let n = unsafe {
        syscall6(libc::SYS_readlinkat, at, path.as_ptr() as usize, b.as_mut_ptr() as usize, b.len(), 0, 0)
    };
    n.max(0) as usize
}

fn namespace(path: &std::ffi::CStr) -> u64 {
    let mut b = [0u8; 64];
    let n = read_link(path, &mut b);
    // "pid:[4026531836]"
    let digits = b.iter().take(n).filter(|c| c.is_ascii_digit());
    digits.fold(0u64, |v, c| v.wrapping_mul(10).wrapping_add(u64::from(c - b'0')))
}

/// futex(2) FUTEX_WAIT on a shared word; `ns` bounds the sleep.
pub fn futex_wait(word: &AtomicU32, expect: u32, ns: Option<u64>) -> isize {
    let ts = ns.map(timespec);
    let p = ts.as_ref().map_or(0, |t| t as *const _ as usize);
    // SAFETY: `word` and `ts` live over the call.
    unsafe {
        syscall6(
            libc::SYS_futex,
            word as *const _ as usize,
            libc::FUTEX_WAIT as usize,
            expect as usize,
            p,
            0,
            0,
        )
    }
}

/// futex(2) FUTEX_WAKE.
pub fn futex_wake(word: &AtomicU32, n: u32) {
    // SAFETY: `word` is a valid address.
    unsafe {
        syscall6(libc::SYS_futex, word as *const _ as usize, libc::FUTEX_WAKE as usize, n as usize, 0, 0, 0)
    };
}

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

/// CLOCK_MONOTONIC in nanoseconds (vDSO).
pub fn now_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// The CPU this thread runs on, plus one; 0 unknown.
pub fn cpu() -> u32 {
    // SAFETY: no arguments.
    (unsafe { libc::sched_getcpu() } + 1) as u32
}

/// Asks for the cache line at `p`, which may be any address.
#[inline(always)]
pub fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch(p.cast(), std::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// sched_yield(2).
pub fn yield_cpu() {
    // SAFETY: no arguments.
    unsafe { syscall6(libc::SYS_sched_yield, 0, 0, 0, 0, 0, 0) };
}

/// close(2).
pub fn close(fd: i32) -> isize {
    // SAFETY: closing a number is memory safe; the caller owns the fd.
    unsafe { syscall6(libc::SYS_close, fd as usize, 0, 0, 0, 0, 0) }
}

/// A duplicate for ourselves, numbered high and close-on-exec.
pub fn dup_high(fd: i32) -> i32 {
    let base = fd_base() as usize;
    // SAFETY: no pointers.
    (unsafe { syscall6(libc::SYS_fcntl, fd as usize, libc::F_DUPFD_CLOEXEC as usize, base, 0, 0, 0) }) as i32
}

/// A doorbell's byte: send(2), never blocking, never a signal.
pub fn ring(bell: i32) -> isize {
    let b = [1u8];
    let f = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as usize;
    // SAFETY: `b` is readable for one byte.
    unsafe { syscall6(libc::SYS_sendto, bell as usize, b.as_ptr() as usize, 1, f, 0, 0) }
}

/// recv(2) into a small own buffer.
pub fn recv_small(fd: i32, buf: &mut [u8], flags: i32) -> isize {
    // SAFETY: `buf` is writable for its length.
    unsafe {
        syscall6(libc::SYS_recvfrom, fd as usize, buf.as_mut_ptr() as usize, buf.len(), flags as usize, 0, 0)
    }
}

/// send(2) of few bytes.
pub fn send_small(fd: i32, bytes: &[u8], flags: i32) -> isize {
    // SAFETY: `bytes` is readable for its length.
    unsafe {
        syscall6(libc::SYS_sendto, fd as usize, bytes.as_ptr() as usize, bytes.len(), flags as usize, 0, 0)
    }
}

/// connect(2) to AF_UNSPEC: resets a TCP connection (tcp_disconnect); the peer hears ECONNRESET.
pub fn disconnect(fd: i32) {
    let unspec = [0u8; 16];
    // SAFETY: a readable sockaddr of 16 bytes.
    unsafe { syscall6(libc::SYS_connect, fd as usize, unspec.as_ptr() as usize, 16, 0, 0, 0) };
}

/// recvmsg(2) with plain iovecs.
///
/// # Safety
/// The iovecs must describe writable memory.
pub unsafe fn recv_iov(fd: i32, iov: &[libc::iovec], flags: i32) -> isize {
    let mut m: libc::msghdr = crate::sys::zeroed_msghdr();
    m.msg_iov = iov.as_ptr().cast_mut();
    m.msg_iovlen = iov.len();
    // SAFETY: `m` describes `iov`, which the caller vouches for.
    unsafe { syscall6(libc::SYS_recvmsg, fd as usize, &raw mut m as usize, flags as usize, 0, 0, 0) }
}

/// sendmsg(2) with plain iovecs.
///
/// # Safety
/// The iovecs must describe readable memory.
pub unsafe fn send_iov(fd: i32, iov: &[libc::iovec], flags: i32) -> isize {
    let mut m: libc::msghdr = crate::sys::zeroed_msghdr();
    m.msg_iov = iov.as_ptr().cast_mut();
    m.msg_iovlen = iov.len();
    // SAFETY: `m` describes `iov`, which the caller vouches for.
    unsafe { syscall6(libc::SYS_sendmsg, fd as usize, &raw const m as usize, flags as usize, 0, 0, 0) }
}

/// An empty msghdr.
pub fn zeroed_msghdr() -> libc::msghdr {
    // SAFETY: msghdr is plain data; all zero is valid.
    unsafe { std::mem::zeroed() }
}

/// shutdown(2).
pub fn shutdown(fd: i32, how: i32) {
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_shutdown, fd as usize, how as usize, 0, 0, 0, 0) };
}

/// ppoll(2); `ns` None waits for ever. The signal mask is left alone.
pub fn poll(fds: &mut [libc::pollfd], ns: Option<u64>) -> isize {
    let mut ts = ns.map(timespec);
    let p = ts.as_mut().map_or(0, |t| t as *mut _ as usize);
    // SAFETY: `fds` and `ts` live over the call and are writable.
    unsafe { syscall6(libc::SYS_ppoll, fds.as_mut_ptr() as usize, fds.len(), p, 0, 8, 0) }
}

/// ioctl(2) that fills an int.
pub fn ioctl_int(fd: i32, request: u64) -> Result<i32, isize> {
    let mut v = 0i32;
    // SAFETY: `v` is writable for an int.
    let r = unsafe { syscall6(libc::SYS_ioctl, fd as usize, request as usize, &raw mut v as usize, 0, 0, 0) };
    if r < 0 { Err(r) } else { Ok(v) }
}

/// getsockopt(2) into `buf`; the length filled.
pub fn getsockopt(fd: i32, level: i32, name: i32, buf: &mut [u8]) -> Result<usize, isize> {
    let mut len = buf.len() as u32;
    // SAFETY: `buf` is writable for `len`.
    let r = unsafe {
        syscall6(
            libc::SYS_getsockopt,
            fd as usize,
            level as usize,
            name as usize,
            buf.as_mut_ptr() as usize,
            &raw mut len as usize,
            0,
        )
    };
    if r < 0 { Err(r) } else { Ok((len as usize).min(buf.len())) }
}

/// setsockopt(2).
pub fn setsockopt(fd: i32, level: i32, name: i32, val: &[u8]) -> isize {
    // SAFETY: `val` is readable for its length.
    unsafe {
        syscall6(
            libc::SYS_setsockopt,
            fd as usize,
            level as usize,
            name as usize,
            val.as_ptr() as usize,
            val.len(),
            0,
        )
    }
}

/// Whether the eight bytes at `at` can be read. The kernel reads a new signal mask before it finds that what is to
/// be done with it (-1) is nothing that there is (kernel/signal.c): EFAULT, or else EINVAL.
pub fn readable(at: usize) -> bool {
    // SAFETY: no mask is changed, and of memory that can't be read the kernel only says so.
    let r = unsafe { syscall6(libc::SYS_rt_sigprocmask, -1i32 as usize, at, 0, 8, 0, 0) };
    at != 0 && r != -(libc::EFAULT as isize)
}

/// F_GETFL.
pub fn getfl(fd: i32) -> isize {
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_fcntl, fd as usize, libc::F_GETFL as usize, 0, 0, 0, 0) }
}

/// getsockname(2) or getpeername(2): family (4, 6), address in network order, port.
pub fn sockaddr(fd: i32, peer: bool) -> Option<(u32, [u32; 4], u16)> {
    let mut b = [0u8; 128];
    let mut len = b.len() as u32;
    let nr = if peer { libc::SYS_getpeername } else { libc::SYS_getsockname };
    // SAFETY: `b` is writable for `len`.
    let r = unsafe { syscall6(nr, fd as usize, b.as_mut_ptr() as usize, &raw mut len as usize, 0, 0, 0) };
    if r < 0 {
        return None;
    }
    let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    let port = u16::from_be_bytes([b[2], b[3]]);
    match i32::from(u16::from_ne_bytes([b[0], b[1]])) {
        libc::AF_INET => Some((4, [word(4), 0, 0, 0], port)),
        libc::AF_INET6 => Some((6, [word(8), word(12), word(16), word(20)], port)),
        _ => None,
    }
}

/// Whether the peer's FIN, or an RST, is in: by the state of TCP_INFO (net/tcp_states.h). Poll says the same of a socket
/// whose own end has shut its receiving direction.
///
/// Poll shows a FIN, as the end of the stream and perhaps as a hang-up, while the kernel is about to change the state
/// (tcp_fin). TCP_INFO takes the socket's lock, under which that happens, but reads the state before it
/// (tcp_get_info, net/ipv4/tcp.c): so a second look knows what poll has shown before the first.
pub fn tcp_has_ended(fd: i32) -> bool {
    let ended = || !matches!(tcp_state(fd), None | Some(1 | 4 | 5)); // ESTABLISHED, FIN_WAIT1, FIN_WAIT2
    ended() || ended()
}

/// Whether this end has sent its FIN: by the state of TCP_INFO.
pub fn tcp_is_shut(fd: i32) -> bool {
    !matches!(tcp_state(fd), Some(1 | 8)) // ESTABLISHED, CLOSE_WAIT
}

/// Whether it is in state CLOSE: after an RST, or when both ends have sent FIN.
pub fn tcp_is_closed(fd: i32) -> bool {
    tcp_state(fd) == Some(7)
}

fn tcp_state(fd: i32) -> Option<u8> {
    let mut b = [0u8; 8];
    let n = getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut b);
    matches!(n, Ok(1..)).then_some(b[0])
}

/// tcpi_bytes_acked and tcpi_bytes_received of TCP_INFO (linux/tcp.h).
pub fn tcp_bytes(fd: i32) -> Option<(u64, u64)> {
    let mut b = [0u8; 192];
    let n = getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut b).ok()?;
    let long = |i: usize| {
        u64::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3], b[i + 4], b[i + 5], b[i + 6], b[i + 7]])
    };
    (n >= 136).then(|| (long(120), long(128)))
}

/// What a connection has given to TCP so far, and whether it is the connecting end, whose SYN the kernel counts as a
/// byte: by TCP_INFO and SIOCOUTQ, read until they hold still. `None`: the kernel does not say (before 4.19).
pub fn tcp_written(fd: i32) -> Option<(u64, bool)> {
    let long = |b: &[u8; 232], i: usize| {
        u64::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3], b[i + 4], b[i + 5], b[i + 6], b[i + 7]])
    };
    for _ in 0..4 {
        let (mut b, mut after) = ([0u8; 232], [0u8; 232]);
        let n = getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut b).ok()?;
        let queued = ioctl_int(fd, libc::TIOCOUTQ).ok()?;
        getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut after).ok()?;
        // tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_bytes_sent, tcpi_bytes_retrans (linux/tcp.h).
        let told = |b: &[u8; 232]| {
            let unsent = u32::from_ne_bytes([b[144], b[145], b[146], b[147]]);
            (long(b, 120), unsent, long(b, 200), long(b, 208))
        };
        if n < 216 || told(&b) != told(&after) {
            if n < 216 {
                return None;
            }
            continue;
        }
        let (acked, unsent, sent, again) = told(&b);
        let written = sent.wrapping_sub(again).wrapping_add(unsent.into());
        return match (acked + queued as u64).wrapping_sub(written) {
            0 => Some((written, false)),
            1 => Some((written, true)),
            _ => None,
        };
    }
    None
}

/// The state of TCP_INFO is ESTABLISHED.
pub fn tcp_is_established(fd: i32) -> bool {
    tcp_state(fd) == Some(1)
}

/// A connect(2) is under way: SYN_SENT.
pub fn tcp_is_connecting(fd: i32) -> bool {
    tcp_state(fd) == Some(2)
}

/// libc's recvmsg(2), which may be a hook: bytes, or minus an errno.
pub fn libc_recv(fd: i32, bufs: &mut [std::io::IoSliceMut<'_>], flags: i32) -> isize {
    let mut m = zeroed_msghdr();
    m.msg_iov = bufs.as_mut_ptr().cast();
    m.msg_iovlen = bufs.len().min(1024);
    // SAFETY: `m` describes slices, of the layout of struct iovec, that are writable for the whole of the call.
    libc_result(unsafe { libc::recvmsg(fd, &raw mut m, flags) })
}

/// libc's sendmsg(2), which may be a hook: bytes, or minus an errno.
pub fn libc_send(fd: i32, bufs: &[std::io::IoSlice<'_>], flags: i32) -> isize {
    let mut m = zeroed_msghdr();
    m.msg_iov = bufs.as_ptr().cast_mut().cast();
    m.msg_iovlen = bufs.len().min(1024);
    // SAFETY: `m` describes slices, of the layout of struct iovec, that are readable for the whole of the call.
    libc_result(unsafe { libc::sendmsg(fd, &raw const m, flags) })
}

fn libc_result(n: isize) -> isize {
    if n < 0 { -(std::io::Error::last_os_error().raw_os_error().unwrap_or(0) as isize) } else { n }
}

/// Whether both are numbers of one open file, as far as the kernel says (kcmp(2)).
pub fn same_file(a: i32, b: i32) -> bool {
    const KCMP_FILE: usize = 0;
    let me = getpid() as usize;
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_kcmp, me, me, KCMP_FILE, a as usize, b as usize, 0) == 0 }
}

/// An eventfd(2) whose count is 1, so that it is readable always; of our own numbers.
pub fn readable_eventfd() -> Result<crate::fd::Fd, i32> {
    let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK;
    // SAFETY: no pointers.
    let fd = crate::rawsys::check(unsafe { syscall6(libc::SYS_eventfd2, 1, flags as usize, 0, 0, 0, 0) })?;
    crate::fd::Fd::from_raw(fd as i32).raise(fd_base())
}

/// `fd` as std has it. The owner of `keeper` keeps it open.
pub(crate) fn borrow<T>(keeper: &T, fd: i32) -> std::os::fd::BorrowedFd<'_> {
    let _ = keeper;
    // SAFETY: open for as long as `keeper` is borrowed, which its owner sees to.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

/// `fd` as std's TCP socket, which is not closed with the result. Its owner keeps it open meanwhile, or gives it away by
/// this.
pub(crate) fn lend_tcp(fd: i32) -> std::mem::ManuallyDrop<std::net::TcpStream> {
    use std::os::fd::FromRawFd as _;
    // SAFETY: open, and the owner's (`net::core`), which alone calls this.
    std::mem::ManuallyDrop::new(unsafe { std::net::TcpStream::from_raw_fd(fd) })
}

/// listen(2) once more, with another backlog.
pub fn listen(fd: i32, backlog: i32) -> isize {
    // SAFETY: no pointers.
    unsafe { syscall6(libc::SYS_listen, fd as usize, backlog as usize, 0, 0, 0, 0) }
}

/// Has `prepare`, `parent` and `child` called around each fork(2) of this process (pthread_atfork(3)).
pub fn at_fork(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) -> bool {
    let (prepare, parent, child): (unsafe extern "C" fn(), unsafe extern "C" fn(), unsafe extern "C" fn()) =
        (prepare, parent, child);
    // SAFETY: functions that are there for as long as they may be called: libc drops the handlers of a library when
    // it is unloaded.
    unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) == 0 }
}

/// Has `f` called when the process ends in order (atexit(3)).
pub fn at_exit(f: extern "C" fn()) -> bool {
    // SAFETY: as in `at_fork`; the handlers of a library that is unloaded run at that moment.
    unsafe { libc::atexit(f) == 0 }
}

/// Whether libsmc.so is in this process, which then has all TCP connections that are made by libc's calls.
pub fn is_preloaded() -> bool {
    // SAFETY: a NUL-terminated name; the result is compared only.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"smc_preload_version".as_ptr()) };
    !found.is_null()
}

/// A soft limit as it is now; none if the kernel will not say.
fn limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut lim = [u64::MAX; 2];
    // SAFETY: `lim` is a struct rlimit.
    unsafe { syscall6(libc::SYS_prlimit64, 0, resource as usize, 0, lim.as_mut_ptr() as usize, 0, 0) };
    lim[0]
}

/// Whether a file may be written up to `len` bytes: beyond RLIMIT_FSIZE the kernel kills (SIGXFSZ).
pub fn may_write(len: usize) -> bool {
    limit(libc::RLIMIT_FSIZE) >= len as u64
}

/// Where internal fds are numbered from: high, out of the program's way, within its limit as it is now
/// (programs lower and raise it).
pub fn fd_base() -> i32 {
    let soft = limit(libc::RLIMIT_NOFILE);
    if soft >= 4096 { (soft / 2).min(32768) as i32 } else { (soft - soft / 4) as i32 }
}

/// RLIMIT_NOFILE: no new fd has this number or one above.
pub fn fd_limit() -> u64 {
    limit(libc::RLIMIT_NOFILE)
}

/// Duplicates `fd` to the lowest free number from `from` on, close-on-exec as it is; minus errno on failure.
pub fn dup_lowest(fd: i32, from: i32) -> i32 {
    // SAFETY: plain fd operation.
    let flags = unsafe { syscall6(libc::SYS_fcntl, fd as usize, libc::F_GETFD as usize, 0, 0, 0, 0) };
    let cmd = if flags & libc::FD_CLOEXEC as isize != 0 { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
    // SAFETY: as above.
    unsafe { syscall6(libc::SYS_fcntl, fd as usize, cmd as usize, from as usize, 0, 0, 0) as i32 }
}

/// Where this program's file is.
pub fn exe_path() -> Vec<u8> {
    let mut b = vec![0u8; 4096];
    let n = read_link(c"/proc/self/exe", &mut b);
    b.truncate(n);
    b
}

/// A line to descriptor 2, whatever that is: [`crate::report::say`] looks first.
pub fn write_stderr(line: &[u8]) {
    // SAFETY: `line` is readable for its length.
    unsafe { syscall6(libc::SYS_write, 2, line.as_ptr() as usize, line.len(), 0, 0, 0) };
}

/// Writes a whole file anew; false if that can't be done.
pub fn write_file(path: &std::ffi::CStr, data: &[u8]) -> bool {
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_CLOEXEC;
    // SAFETY: `path` is NUL-terminated.
    let fd = unsafe {
        syscall6(
            libc::SYS_openat,
            libc::AT_FDCWD as usize,
            path.as_ptr() as usize,
            flags as usize,
            0o644,
            0,
            0,
        )
    };
    if fd < 0 {
        return false;
    }
    let mut rest = data;
    while !rest.is_empty() {
        // SAFETY: `rest` is readable for its length.
        let n =
            unsafe { syscall6(libc::SYS_write, fd as usize, rest.as_ptr() as usize, rest.len(), 0, 0, 0) };
        if n <= 0 {
            break;
        }
        rest = &rest[n as usize..];
    }
    close(fd as i32);
    rest.is_empty()
}

/// Free bytes of a pipe: its capacity less what is queued; 64 KiB if it is not a pipe.
pub fn pipe_room(fd: i32) -> usize {
    // SAFETY: no pointers.
    let cap = unsafe { syscall6(libc::SYS_fcntl, fd as usize, libc::F_GETPIPE_SZ as usize, 0, 0, 0, 0) };
    match (cap, ioctl_int(fd, libc::FIONREAD)) {
        (c, Ok(q)) if c > 0 => (c as usize).saturating_sub(q as usize),
        _ => 64 << 10,
    }
}

/// Whether `fd` is a pipe.
pub fn is_pipe(fd: i32) -> bool {
    // SAFETY: no pointers.
    (unsafe { syscall6(libc::SYS_fcntl, fd as usize, libc::F_GETPIPE_SZ as usize, 0, 0, 0, 0) }) >= 0
}

/// Whether `fd` is a regular file or a block device.
pub fn is_file(fd: i32) -> bool {
    // SAFETY: plain data; all zero is valid.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` is writable.
    let r = unsafe { syscall6(libc::SYS_fstat, fd as usize, &raw mut st as usize, 0, 0, 0, 0) };
    r == 0 && matches!(st.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFBLK)
}

/// Whether `fd` is a ring of io_uring, by its name in /proc. False also where there is none.
pub fn is_ring(fd: i32) -> bool {
    let Ok(path) = std::ffi::CString::new(format!("/proc/self/fd/{fd}")) else { return false };
    let mut b = [0u8; 32];
    let n = read_link(&path, &mut b);
    b[..n] == *b"anon_inode:[io_uring]"
}

/// Threads of this process: the links of its task folder beyond those that every folder has
/// (proc_task_getattr, fs/proc/base.c). Needs no descriptor, which another thread might close. `None`: no /proc.
pub fn threads() -> Option<u64> {
    // SAFETY: plain data; all zero is valid.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    let path = c"/proc/self/task".as_ptr() as usize;
    let at = libc::AT_FDCWD as usize;
    // SAFETY: the path is NUL-terminated, `st` is writable.
    let r = unsafe { syscall6(libc::SYS_newfstatat, at, path, &raw mut st as usize, 0, 0, 0) };
    (r == 0).then(|| (st.st_nlink as u64).saturating_sub(2))
}

const PAGE: usize = 4096;

/// Pages that were found accessible, and how, the last of each colour.
static FOUND: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

/// No user space on any machine is that large.
pub const USER_END: usize = 1 << 56;

/// Whether a program's pointer can be read, or written: asked of the kernel once for each page, as long as
/// others do not push it out. A kernel that can't say (before 5.14) counts as a yes.
#[inline]
pub fn is_accessible(at: usize, len: usize, write: bool) -> bool {
    // Nearly always: in one page, and that is known. (A null pointer is in page 0, which is not asked for here.)
    let page = at / PAGE;
    at % PAGE + len <= PAGE && page != 0 && found(page).load(Relaxed) == known(page, write)
        || ask_accessible(at, len, write)
}

/// Where a page is remembered.
#[inline]
fn found(page: usize) -> &'static AtomicUsize {
    &FOUND[page % FOUND.len()]
}

/// What is remembered of it.
#[inline]
fn known(page: usize, write: bool) -> usize {
    (page + 1) << 1 | usize::from(write)
}

#[cold]
fn ask_accessible(at: usize, len: usize, write: bool) -> bool {
    if at == 0 || at >= USER_END {
        return false;
    }
    let populate = |page: usize| {
        let advice = if write { MADV_POPULATE_WRITE } else { MADV_POPULATE_READ };
        loop {
            // SAFETY: populating pages changes no byte of them, and fails where there are none.
            let r = unsafe { syscall6(libc::SYS_madvise, page * PAGE, PAGE, advice, 0, 0, 0) };
            if let Some(good) = populated(r) {
                return good;
            }
        }
    };
    (at / PAGE..=(at + len.max(1) - 1) / PAGE).all(|page| {
        let (found, this) = (found(page), known(page, write));
        // Relaxed: a memory of what was asked; nothing else depends on it.
        if found.load(Relaxed) == this {
            return true;
        }
        // Memory of our own is good: if it is not said to be, the kernel does not know the question.
        let good = populate(page) || !populate(std::ptr::from_ref(&found).addr() / PAGE);
        if good {
            found.store(this, Relaxed);
        }
        good
    })
}

/// What madvise(2) says of a page by its result; `None`: ask again. ENOMEM and EFAULT say that there is none, EINVAL that
/// it has other permissions (or, before 5.14, nothing). Others say nothing of the page. EINTR comes where somebody
/// else is asked first whether the call may be made (seccomp_unotify(2)), and a signal comes meanwhile.
fn populated(r: isize) -> Option<bool> {
    match i32::try_from(-r) {
        Ok(libc::EINTR) => None,
        Ok(libc::ENOMEM | libc::EFAULT | libc::EINVAL) => Some(false),
        _ => Some(true),
    }
}

const MADV_POPULATE_READ: usize = 22;
const MADV_POPULATE_WRITE: usize = 23;

/// A mapping, shared and to be written, of `len` bytes at `offset` of what `fd` is.
pub fn map_shared(fd: i32, len: usize, offset: usize) -> Option<usize> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address the kernel chooses.
    let r = unsafe {
        syscall6(libc::SYS_mmap, 0, len, prot as usize, libc::MAP_SHARED as usize, fd as usize, offset)
    };
    crate::rawsys::check(r).ok()
}

/// Takes a mapping away.
///
/// # Safety
/// It is a mapping of the caller's of that length, and nobody uses it any more.
pub unsafe fn unmap(at: usize, len: usize) {
    // SAFETY: as the caller vouches.
    unsafe { syscall6(libc::SYS_munmap, at, len, 0, 0, 0, 0) };
}

/// An epoll set of our own numbers.
pub fn epoll_create() -> Result<crate::fd::Fd, i32> {
    // SAFETY: no pointers.
    let r = unsafe { syscall6(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC as usize, 0, 0, 0, 0, 0) };
    crate::fd::Fd::from_raw(crate::rawsys::check(r)? as i32).raise(fd_base())
}

/// epoll_ctl(2).
pub fn epoll_ctl(epfd: i32, op: i32, fd: i32, events: u32, data: u64) -> isize {
    let mut ev = libc::epoll_event { events, u64: data };
    // SAFETY: `ev` lives over the call.
    unsafe { epoll_ctl_raw(epfd, op, fd, &raw mut ev) }
}

/// epoll_ctl(2). The kernel knows no EINTR of it, but gives that where it asks somebody else first whether the call may be
/// made (seccomp_unotify(2)) and a signal comes meanwhile. Nobody expects it.
///
/// # Safety
/// `event` is what the kernel may read, or be refused.
pub unsafe fn epoll_ctl_raw(epfd: i32, op: i32, fd: i32, event: *mut libc::epoll_event) -> isize {
    loop {
        // SAFETY: as the caller vouches.
        let r = unsafe {
            syscall6(libc::SYS_epoll_ctl, epfd as usize, op as usize, fd as usize, event as usize, 0, 0)
        };
        if r != -(libc::EINTR as isize) {
            return r;
        }
    }
}

/// What an epoll set has at once: epoll_pwait(2) with timeout 0 and no mask.
///
/// # Safety
/// `events` is writable for `max` entries.
pub unsafe fn epoll_poll(epfd: i32, events: *mut libc::epoll_event, max: usize) -> isize {
    let max = max.min(i32::MAX as usize / size_of::<libc::epoll_event>());
    // SAFETY: as the caller vouches.
    unsafe { syscall6(libc::SYS_epoll_pwait, epfd as usize, events as usize, max, 0, 0, 8) }
}

/// Whether each signal handler that the program has, but for `counted`, is of the kind after which a system call is
/// restarted (SA_RESTART), so that one of them has run if any has.
pub fn handlers_restart(counted: usize) -> bool {
    /// struct sigaction of the kernel: handler, flags, restorer, mask.
    const LEN: usize = 4;
    (1..=64).all(|sig| {
        let mut act = [0usize; LEN];
        // SAFETY: `act` is writable for a struct sigaction of the kernel with a mask of 8 bytes.
        let r = unsafe { syscall6(libc::SYS_rt_sigaction, sig, 0, act.as_mut_ptr() as usize, 8, 0, 0) };
        let none = [libc::SIG_DFL, libc::SIG_IGN].contains(&act[0]) || act[0] == counted;
        r < 0 || none || act[1] & libc::SA_RESTART as usize != 0
    })
}

/// This process's real user.
pub fn uid() -> u32 {
    // SAFETY: no arguments.
    unsafe { syscall6(libc::SYS_getuid, 0, 0, 0, 0, 0, 0) as u32 }
}

/// Sends this thread a signal, as the kernel does for a call of its own.
pub fn raise(signal: i32) {
    // SAFETY: no pointers.
    unsafe {
        syscall6(libc::SYS_tgkill, getpid() as usize, gettid() as usize, signal as usize, 0, 0, 0);
    }
}

/// A pair of connected Unix stream sockets, close-on-exec; or an errno.
pub fn socketpair() -> Result<(i32, i32), i32> {
    let mut fds = [0i32; 2];
    let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as usize;
    // SAFETY: `fds` is writable for two ints.
    let r = unsafe {
        syscall6(libc::SYS_socketpair, libc::AF_UNIX as usize, kind, 0, fds.as_mut_ptr() as usize, 0, 0)
    };
    if r < 0 { Err(-r as i32) } else { Ok((fds[0], fds[1])) }
}

/// Random bytes, or time and pid where the kernel has none yet.
pub fn random_u32() -> u32 {
    let mut v = 0u32;
    // SAFETY: `v` is writable for 4 bytes.
    let n = unsafe {
        syscall6(libc::SYS_getrandom, &raw mut v as usize, 4, libc::GRND_NONBLOCK as usize, 0, 0, 0)
    };
    if n == 4 { v } else { (now_ns() as u32).wrapping_mul(0x9e37_79b1) ^ getpid() as u32 }
}

/// SO_PROTOCOL: whether `fd` is a TCP socket (not UDP, not MPTCP, not Unix). Its family is not asked for: a socket of
/// another family whose protocol happens to have TCP's number stays in the kernel, since no upgrade begins without
/// addresses of IP ([`sockaddr`]).
pub fn is_tcp(fd: i32) -> bool {
    let mut p = [0u8; 4];
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, &mut p) == Ok(4)
        && i32::from_ne_bytes(p) == libc::IPPROTO_TCP
}

/// SO_COOKIE: a number that no other socket of this kernel has; 0 if `fd` is no socket.
pub fn cookie(fd: i32) -> u64 {
    const SO_COOKIE: i32 = 57;
    let mut b = [0u8; 8];
    match getsockopt(fd, libc::SOL_SOCKET, SO_COOKIE, &mut b) {
        Ok(8) => u64::from_ne_bytes(b),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_says_of_a_page_counts() {
        let said = |e: i32| populated(-(e as isize));
        assert_eq!(said(0), Some(true));
        assert_eq!([libc::ENOMEM, libc::EFAULT, libc::EINVAL].map(said), [Some(false); 3]);
        assert_eq!([libc::EPERM, libc::ENOSYS].map(said), [Some(true); 2]);
        assert_eq!(said(libc::EINTR), None, "asked again");
    }

    #[test]
    fn pages_are_found_and_missed() {
        let (there, page) = (0u64, PAGE);
        assert!(is_accessible((&raw const there).addr(), 8, true));
        assert!(!is_accessible(page * 3, 8, false), "below what a process may map");
        let text = (populated as *const ()).addr();
        assert!(is_accessible(text, 8, false) && !is_accessible(text, 8, true), "code is not written to");
    }
}
