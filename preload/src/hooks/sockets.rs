//! connect, listen, accept, shutdown, close and the options.

use super::data::{alias, hook};
use super::making::made;
use crate::fd_table::{self, Ref};
use crate::hook::{errno, fail};
use crate::real::real;
use crate::remote;
use engine::arena::each;
use engine::conn::Side;
use engine::reason::Reason;
use engine::sys;
use libc::{c_int, c_ulong, c_void, sockaddr, socklen_t};
use std::sync::atomic::Ordering::Relaxed;

/// `fd` has been connected, or is being.
pub fn connected(fd: c_int) {
    // An entry may be left from a socket that was closed by a system call which nobody could see. One that has not
    // begun to be upgraded is as good as a new one: whatever was counted too little keeps it on TCP.
    let known = fd_table::stream(fd).is_some_and(|e| e.sock.is_same(fd));
    if !known && (fd_table::is_tcp(fd) || sys::is_tcp(fd)) {
        remote::look(fd);
        fd_table::add_stream(fd, Side::Connect, false);
        remote::look_again(fd, false);
    }
}

/// Both directions back to TCP, for good, before something that the ring can't carry. What is in the ring
/// already is still read from there.
pub fn back_to_tcp(e: &Ref, fd: c_int, why: Reason) {
    leave(e, fd, why, true);
}

/// As [`back_to_tcp`], before somebody reads who does not see the ring: its bytes go into TCP, by the peer.
pub fn empty_into_tcp(e: &Ref, fd: c_int, why: Reason) {
    leave(e, fd, why, false);
}

fn leave(e: &Ref, fd: c_int, why: Reason, keep: bool) {
    e.sock.keep_word(fd, why);
    // The stop first: a peer that finds our stream gone from the ring goes to sleep in the kernel.
    e.sock.stop_rx(why, keep);
    e.sock.leave_tx(fd, why);
    e.sock.bar(why);
    e.sock.follow(fd);
    if e.sock.take_changed() {
        super::epoll::resync(e, fd);
    }
}

/// As [`empty_into_tcp`], before somebody writes to `fd` as well who does not know us: what this end has sent is in the
/// ring or in TCP by then.
pub fn hand_over(e: &Ref, fd: c_int, why: Reason) {
    e.sock.set_handed();
    empty_into_tcp(e, fd, why);
    e.sock.settle(fd);
}

/// As [`hand_over`], before somebody in this process reads and writes by a way that we do not see. True: a
/// [relay](super::relay) has the connection, and no number of this process names it any more.
pub fn hand_over_here(e: &Ref, fd: c_int, why: Reason) -> bool {
    let relayed = super::relay::take_over(e, fd);
    if !relayed {
        hand_over(e, fd, why);
    }
    relayed
}

hook! {
    /// connect(2).
    fn connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
        remote::offer(fd);
        let r = real!(connect(fd => c_int, addr => *const sockaddr, len => socklen_t) -> c_int);
        if len < 2 || !(r == 0 || matches!(errno(), libc::EINPROGRESS | libc::EINTR)) {
            return r;
        }
        // SAFETY: the kernel has read `len` bytes there: it has begun to connect.
        let family = c_int::from(unsafe { (*addr).sa_family });
        if r == 0 && family == libc::AF_UNSPEC {
            // Disconnected: the fd may become another connection, which stays on TCP.
            if let Some(e) = fd_table::stream(fd) {
                e.sock.disconnected(fd, Reason::SocketOption);
                if e.sock.take_changed() {
                    super::epoll::resync(&e, fd);
                }
            }
        } else if matches!(family, libc::AF_INET | libc::AF_INET6) {
            let e = errno();
            // A program may hear of the end of a connect by a second one, which says 0 once, or try again with a socket
            // that was refused: it is known by then, and may be in sets of epoll.
            if !fd_table::stream(fd).is_some_and(|s| s.sock.take_connecting()) {
                connected(fd);
            }
            if r != 0
                && let Some(s) = fd_table::stream(fd)
            {
                s.sock.set_connecting();
            }
            crate::hook::set_errno(e);
        }
        r
    }
}
alias! { __connect = connect(fd: c_int, addr: *const sockaddr, len: socklen_t) -> c_int; }

hook! {
    /// listen(2).
    fn listen(fd: c_int, backlog: c_int) -> c_int {
        remote::offer_listener(fd);
        real!(listen(fd => c_int, backlog => c_int) -> c_int)
    }
}

hook! {
    /// accept(2).
    fn accept(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
        let r = made(|| real!(accept(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t) -> c_int));
        if r >= 0 {
            accepted(fd, r, 0);
        }
        r
    }
}

hook! {
    /// accept4(2).
    fn accept4(fd: c_int, addr: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int {
        let r = made(|| real!(accept4(fd => c_int, addr => *mut sockaddr, len => *mut socklen_t, flags => c_int) -> c_int));
        if r >= 0 {
            accepted(fd, r, flags);
        }
        r
    }
}

/// `fd` has come from `listener`. What a listener of MPTCP gives may be TCP.
fn accepted(listener: c_int, fd: c_int, flags: c_int) {
    if fd_table::is_tcp(listener) || sys::is_tcp(fd) {
        remote::look(fd);
        fd_table::add_stream(fd, Side::Accept, flags & libc::SOCK_NONBLOCK != 0);
        remote::look_again(fd, true);
    }
}

hook! {
    /// shutdown(2).
    fn shutdown(fd: c_int, how: c_int) -> c_int {
        let e = fd_table::stream(fd);
        if let Some(e) = &e {
            e.sock.before_shutdown(fd, how);
        }
        let how_now = match how {
            libc::SHUT_WR | libc::SHUT_RDWR if e.as_ref().is_some_and(|e| e.sock.shuts_later()) => {
                if how == libc::SHUT_WR { None } else { Some(libc::SHUT_RD) }
            }
            how => Some(how),
        };
        let r = how_now.map_or(0, |how| real!(shutdown(fd => c_int, how => c_int) -> c_int));
        if let Some(e) = &e {
            let error = errno();
            e.sock.after_shutdown(how);
            if e.sock.take_changed() {
                super::epoll::resync(e, fd);
            }
            crate::hook::set_errno(error);
        }
        r
    }
}

hook! {
    /// close(2).
    fn close(fd: c_int) -> c_int {
        if engine::internal_fds::contains(fd) {
            return fail(libc::EBADF);
        }
        let gone = fd_table::before_close(fd);
        let r = real!(close(fd => c_int) -> c_int);
        let e = errno();
        drop(gone);
        crate::hook::set_errno(e);
        r
    }
}
alias! { __close = close(fd: c_int) -> c_int; }

/// asm-generic/socket.h.
const SO_BUF_LOCK: c_int = 72;
/// linux/tcp.h.
const TCP_INQ: c_int = 36;

/// Options after which the kernel does with the stream what the ring can't.
fn needs_tcp(level: c_int, name: c_int) -> Option<Reason> {
    const TCP_ULP: c_int = 31;
    const TCP_REPAIR: c_int = 19;
    match (level, name) {
        (
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER
            | libc::SO_ATTACH_BPF
            | libc::SO_TIMESTAMPING
            | libc::SO_PEEK_OFF
            | libc::SO_MAX_PACING_RATE,
        ) => Some(Reason::SocketOption),
        (libc::IPPROTO_TCP, TCP_ULP) => Some(Reason::Ulp),
        (libc::IPPROTO_TCP, TCP_REPAIR) => Some(Reason::SocketOption),
        _ => None,
    }
}

/// Whether a value of SO_MAX_PACING_RATE bounds what may be sent in a second.
///
/// # Safety
/// `val` is what the program passed as the address of `len` bytes.
unsafe fn is_pace(val: *const c_void, len: socklen_t) -> bool {
    if len < 4 {
        return false;
    }
    // SAFETY: as the caller vouches; the first half of eight bytes says as much of a value that is all ones.
    unsafe { crate::hook::given(val.cast::<[u8; 4]>()) }
        .is_some_and(|v| i32::from_ne_bytes(*v) != engine::conn::UNPACED)
}

hook! {
    /// setsockopt(2).
    fn setsockopt(fd: c_int, level: c_int, name: c_int, val: *const c_void, len: socklen_t) -> c_int {
        let e = fd_table::stream(fd);
        if let Some(e) = &e
            && let Some(why) = needs_tcp(level, name)
            // SAFETY: the program's own argument.
            && (name != libc::SO_MAX_PACING_RATE || unsafe { is_pace(val, len) })
        {
            back_to_tcp(e, fd, why);
        }
        let r = real!(setsockopt(fd => c_int, level => c_int, name => c_int, val => *const c_void, len => socklen_t) -> c_int);
        if r == 0
            && (level, name) == (libc::IPPROTO_TCP, TCP_INQ)
            && len >= 4
            && let Some(s) = e.as_ref().and_then(|e| e.sock.slot())
        {
            // SAFETY: the kernel has read 4 bytes there.
            if unsafe { val.cast::<i32>().read_unaligned() } != 0 {
                s.rx.with_each.fetch_or(each::COUNT, Relaxed);
            } else {
                s.rx.with_each.fetch_and(!each::COUNT, Relaxed);
            }
        }
        if r == 0
            && level == libc::SOL_SOCKET
            && let Some(e) = &e
            && let Some(s) = e.sock.slot()
        {
            match (name, len as usize) {
                (libc::SO_RCVTIMEO | libc::SO_SNDTIMEO, 16..) => {
                    // SAFETY: the kernel has read 16 bytes there.
                    let tv = unsafe { val.cast::<[u8; 16]>().read_unaligned() };
                    let word = if name == libc::SO_RCVTIMEO { &s.rcvtimeo_us } else { &s.sndtimeo_us };
                    word.store(engine::conn::timeval_us(&tv), Relaxed);
                }
                (libc::SO_TIMESTAMP | libc::SO_TIMESTAMPNS, 4..) => {
                    // SAFETY: the kernel has read 4 bytes there.
                    let on = unsafe { val.cast::<i32>().read_unaligned() } != 0;
                    let kind = if name == libc::SO_TIMESTAMP { each::MICROSECONDS } else { each::NANOSECONDS };
                    let rest = s.rx.with_each.load(Relaxed) & each::COUNT;
                    s.rx.with_each.store(if on { rest | kind } else { rest }, Relaxed);
                }
                (
                    libc::SO_SNDBUF | libc::SO_RCVBUF | libc::SO_SNDBUFFORCE | libc::SO_RCVBUFFORCE | SO_BUF_LOCK,
                    4..,
                ) => e.sock.read_buffers(fd),
                (libc::SO_RCVLOWAT, 4..) => {
                    // SAFETY: the kernel has read 4 bytes there.
                    let n = unsafe { val.cast::<i32>().read_unaligned() };
                    s.rcvlowat.store(n.max(1) as u32, Relaxed);
                    s.rx.tcp_lowat.store(n.max(1) as u32, Relaxed);
                    if n > 1 && !e.sock.rx_in_ring() {
                        e.sock.stop_rx(Reason::SocketOption, true);
                    } else if e.sock.look_at(fd).ready & libc::POLLIN as u32 != 0 || e.sock.more_behind_tcp(fd) {
                        // As tcp_set_rcvlowat, which tells who waits of bytes that now suffice. The kernel does that where
                        // there are some in TCP as well, but not any more once those alone are read.
                        super::epoll::comes_anew(e);
                    }
                }
                _ => {}
            }
        }
        r
    }
}

hook! {
    /// getsockopt(2): TCP_INFO counts the bytes that went through memory; SO_ERROR knows of a reset that the
    /// kernel does not.
    fn getsockopt(fd: c_int, level: c_int, name: c_int, val: *mut c_void, len: *mut socklen_t) -> c_int {
        const TCP_ZEROCOPY_RECEIVE: c_int = 35;
        if level == libc::IPPROTO_TCP
            && name == TCP_ZEROCOPY_RECEIVE
            && let Some(e) = fd_table::stream(fd)
        {
            // Not an option but a way to receive: the kernel's own pages.
            back_to_tcp(&e, fd, Reason::SocketOption);
        }
        let r = real!(getsockopt(fd => c_int, level => c_int, name => c_int, val => *mut c_void, len => *mut socklen_t) -> c_int);
        if r == 0
            && level == libc::IPPROTO_TCP
            && name == libc::TCP_INFO
            && let Some(e) = fd_table::stream(fd)
            && let Some(s) = e.sock.slot()
        {
            // tcpi_bytes_acked and tcpi_bytes_received (linux/tcp.h).
            // SAFETY: the kernel has written *len bytes.
            let n = unsafe { *len } as usize;
            for (at, more) in [(120usize, s.shm_tx().saturating_sub(e.sock.unsent().unwrap_or(0))), (128, s.shm_rx())] {
                if n >= at + 8 {
                    // SAFETY: inside the n bytes.
                    let p = unsafe { val.cast::<u8>().add(at).cast::<u64>() };
                    // SAFETY: as above.
                    let v = unsafe { p.read_unaligned() };
                    // SAFETY: as above.
                    unsafe { p.write_unaligned(v + more) };
                }
            }
        }
        if r == 0
            && level == libc::SOL_SOCKET
            && name == libc::SO_RCVLOWAT
            && let Some(e) = fd_table::stream(fd)
            && let Some(s) = e.sock.slot()
            // SAFETY: the kernel has written *len bytes.
            && unsafe { *len } >= 4
            && s.rx.tcp_lowat.load(Relaxed) != s.rcvlowat.load(Relaxed)
        {
            // SAFETY: as above, at least 4.
            unsafe { val.cast::<u32>().write_unaligned(s.rcvlowat.load(Relaxed)) };
        }
        if r == 0
            && level == libc::SOL_SOCKET
            && name == libc::SO_ERROR
            && let Some(e) = fd_table::stream(fd)
            // SAFETY: the kernel has written *len bytes.
            && unsafe { *len } >= 4
        {
            // SAFETY: as above, at least 4.
            let kernel = unsafe { val.cast::<c_int>().read_unaligned() };
            // SAFETY: as above.
            unsafe { val.cast::<c_int>().write_unaligned(e.sock.so_error(fd, kernel)) };
        }
        r
    }
}

const SIOCATMARK: c_ulong = 0x8905;

hook! {
    /// ioctl(2). It is variadic; the one argument is passed in a register, as the ABI has it.
    fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
        let kernel = || real!(ioctl(fd => c_int, request => c_ulong, arg => *mut c_void) -> c_int);
        let Some(e) = fd_table::stream(fd) else { return kernel() };
        match request {
            libc::FIONBIO => {
                let r = kernel();
                if r == 0 && let Some(s) = e.sock.slot() {
                    // SAFETY: the kernel has read an int there.
                    let on = unsafe { arg.cast::<c_int>().read_unaligned() } != 0;
                    s.nonblock.store(on.into(), Relaxed);
                }
                r
            }
            libc::FIONREAD => {
                let r = kernel();
                if r == 0 {
                    // SAFETY: the kernel has written an int there.
                    let in_tcp = unsafe { arg.cast::<c_int>().read_unaligned() };
                    if let Some(n) = e.sock.unread(in_tcp.max(0) as u64) {
                        // SAFETY: as above.
                        unsafe { arg.cast::<c_int>().write_unaligned(n.min(c_int::MAX as u64) as c_int) };
                    }
                }
                r
            }
            libc::TIOCOUTQ => {
                let r = kernel();
                if r == 0 && let Some(n) = e.sock.unsent() {
                    // SAFETY: the kernel has written an int there.
                    let k = unsafe { arg.cast::<c_int>().read_unaligned() };
                    // SAFETY: as above.
                    unsafe { arg.cast::<c_int>().write_unaligned(k.saturating_add(n as c_int)) };
                }
                r
            }
            SIOCATMARK => {
                let r = kernel();
                if r == 0 && e.sock.unread(0).is_some_and(|n| n > 0) {
                    // Bytes in the ring come before anything urgent, which only TCP carries.
                    // SAFETY: the kernel has written an int there.
                    unsafe { arg.cast::<c_int>().write_unaligned(0) };
                }
                r
            }
            libc::FIOASYNC => {
                back_to_tcp(&e, fd, Reason::AsyncIo);
                kernel()
            }
            _ => kernel(),
        }
    }
}
alias! { __ioctl = ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int; }
