//! read, write and their kin.
//!
//! Each hook hands the engine the program's memory as iovecs and a closure that makes the very call the
//! program made; the engine moves bytes through the ring or calls the closure.

use crate::fd_table::{self, Ref};
use crate::hook::{fail, given, to_kernel, to_libc};
use crate::real::{entry, real, real_at};
use engine::arena::each;
use engine::reason::Reason;
use engine::section;
use libc::{c_int, c_void, iovec, msghdr, off_t, size_t, sockaddr, socklen_t, ssize_t, timespec};
use std::sync::atomic::Ordering::Relaxed;

/// The kernel moves at most this much in one call (MAX_RW_COUNT in include/linux/fs.h).
const MOST: usize = 0x7fff_f000;

fn iov(p: *const c_void, n: usize) -> [iovec; 1] {
    [iovec { iov_base: p.cast_mut(), iov_len: n.min(MOST) }]
}

/// Whether read and write refuse the length: all of it must be memory, though at most MOST of it are moved. (recv and
/// send look at those only.)
#[inline]
fn too_long(e: &Ref, p: *const c_void, n: usize) -> bool {
    n > MOST && !crate::hook::plausible(p, n) && !e.sock.is_plain()
}

/// The program's iovec array; `None` if the kernel is to refuse it.
unsafe fn iovs<'a>(p: *const iovec, n: usize) -> Option<&'a [iovec]> {
    if n == 0 || n > 1024 || !crate::hook::plausible(p, n * size_of::<iovec>()) {
        return None;
    }
    // SAFETY: the program vouches for its array, as it does to the kernel.
    Some(unsafe { std::slice::from_raw_parts(p, n) })
}

/// After a call on a connection: what else its switching needs.
#[inline]
fn settle(e: &Ref, fd: c_int) {
    if e.sock.has_changed() {
        e.sock.call_ends(fd);
        if e.sock.take_changed() {
            crate::deep::look();
            super::unseen::follow();
            super::epoll::resync(e, fd);
        }
    }
}

/// Whether the kernel would find memory where each begins, as far as that shows. Not where it ends: a program may say
/// of a buffer near the end of its memory that it is longer than that, and where the kernel draws the line depends on the
/// machine (five levels of page tables).
#[inline]
fn plausible(v: &[iovec]) -> bool {
    v.iter().all(|i| i.iov_len == 0 || crate::hook::plausible(i.iov_base, 1))
}

#[inline]
unsafe fn receive(
    e: &Ref,
    fd: c_int,
    v: &[iovec],
    flags: c_int,
    mut kernel: impl FnMut() -> ssize_t,
) -> ssize_t {
    // With MSG_TRUNC the bytes are dropped and the address is not used (tcp(7)).
    if !plausible(v) && flags & libc::MSG_TRUNC == 0 && !e.sock.is_plain() {
        return fail(libc::EFAULT);
    }
    // SAFETY: the program vouches for its memory.
    let n = unsafe { e.sock.recv(fd, v, flags, &mut || to_kernel(kernel())) };
    settle(e, fd);
    to_libc(n)
}

#[inline]
unsafe fn transmit(
    e: &Ref,
    fd: c_int,
    v: &[iovec],
    flags: c_int,
    mut kernel: impl FnMut() -> ssize_t,
) -> ssize_t {
    if !plausible(v) && !e.sock.is_plain() {
        return fail(libc::EFAULT);
    }
    // SAFETY: the program vouches for its memory.
    let n = unsafe { e.sock.send(fd, v, flags, &mut || to_kernel(kernel())) };
    settle(e, fd);
    to_libc(n)
}

macro_rules! hook {
    ($(#[$m:meta])* fn $name:ident($($a:ident: $t:ty),* $(,)?) -> $r:ty $body:block) => {
        $(#[$m])*
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name($($a: $t),*) -> $r $body
    };
}
pub(crate) use hook;

/// A hook whose first argument is an fd. One that is no connection of ours goes on to libc with the arguments where
/// they are: no frame is made for it. For one that is, `$e` is its entry and `$kernel` makes the call.
macro_rules! fd_hook {
    ($(#[$m:meta])* fn $name:ident($fd:ident: $f:ty, $($a:ident: $t:ty),* $(,)?) -> $r:ty |$e:ident, $kernel:ident| $body:block) => {
        $(#[$m])*
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $name($fd: $f, $($a: $t),*) -> $r {
            #[inline(never)]
            unsafe extern "C" fn ours($fd: $f, $($a: $t),*) -> $r {
                let $kernel = move || real!($name($fd => $f, $($a => $t),*) -> $r);
                let Some($e) = fd_table::stream($fd) else { return $kernel() };
                $body
            }
            if fd_table::is_foreign($fd) {
                let p = entry!($name).found();
                if p != 0 {
                    return real_at!(p, $name($fd => $f, $($a => $t),*) -> $r);
                }
            }
            // SAFETY: the program's own arguments.
            unsafe { ours($fd, $($a),*) }
        }
    };
}

fd_hook! {
    /// read(2).
    fn read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t |e, kernel| {
        if n == 0 {
            return 0;
        }
        if too_long(&e, buf, n) {
            return fail(libc::EFAULT);
        }
        // SAFETY: the program vouches for `buf`.
        unsafe { receive(&e, fd, &iov(buf, n), 0, kernel) }
    }
}

fd_hook! {
    /// readv(2).
    fn readv(fd: c_int, v: *const iovec, n: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for its arrays.
        match unsafe { iovs(v, n as usize) } {
            // SAFETY: as above.
            Some(list) => unsafe { receive(&e, fd, list, 0, kernel) },
            None => kernel(),
        }
    }
}

/// A positioned call of the second kind without a position (offset -1): the flags of recv and send that its own
/// stand for. `None`: the kernel's to refuse.
fn as_flags(offset: off_t, flags: c_int) -> Option<c_int> {
    const KNOWN: c_int = libc::RWF_HIPRI | libc::RWF_DSYNC | libc::RWF_SYNC | libc::RWF_NOWAIT;
    let wait = if flags & libc::RWF_NOWAIT != 0 { libc::MSG_DONTWAIT } else { 0 };
    (offset == -1 && flags & !KNOWN == 0).then_some(wait)
}

fd_hook! {
    /// preadv2(2): at offset -1 it is readv.
    fn preadv2(fd: c_int, v: *const iovec, n: c_int, off: off_t, flags: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for its arrays.
        match (as_flags(off, flags), unsafe { iovs(v, n as usize) }) {
            // SAFETY: as above.
            (Some(f), Some(list)) => unsafe { receive(&e, fd, list, f, kernel) },
            _ => kernel(),
        }
    }
}

fd_hook! {
    /// pwritev2(2): at offset -1 it is writev.
    fn pwritev2(fd: c_int, v: *const iovec, n: c_int, off: off_t, flags: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for its arrays.
        match (as_flags(off, flags), unsafe { iovs(v, n as usize) }) {
            // SAFETY: as above.
            (Some(f), Some(list)) => unsafe { transmit(&e, fd, list, f, kernel) },
            _ => kernel(),
        }
    }
}

fd_hook! {
    /// recv(2).
    fn recv(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for `buf`.
        unsafe { receive(&e, fd, &iov(buf, n), flags, kernel) }
    }
}

fd_hook! {
    /// recvfrom(2).
    fn recvfrom(fd: c_int, buf: *mut c_void, n: size_t, flags: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> ssize_t |e, kernel| {
        let mut asked = false;
        // SAFETY: the program vouches for `buf`.
        let r = unsafe {
            receive(&e, fd, &iov(buf, n), flags, || {
                asked = true;
                kernel()
            })
        };
        if r < 0 || asked || addr.is_null() {
            return r;
        }
        // SAFETY: the program vouches for `len`.
        match unsafe { no_name(len) } {
            Ok(()) => r,
            Err(errno) => fail(errno),
        }
    }
}

/// TCP names no sender: the address has length 0. As in the kernel the bytes are gone where that can't be said
/// (move_addr_to_user, net/socket.c).
///
/// # Safety
/// `len` is the program's, as it gives it to the kernel.
unsafe fn no_name(len: *mut socklen_t) -> Result<(), c_int> {
    if !crate::hook::plausible(len, size_of::<socklen_t>()) {
        return Err(libc::EFAULT);
    }
    // SAFETY: not null; the program vouches for it.
    let given = unsafe { *len } as c_int;
    if given < 0 {
        return Err(libc::EINVAL);
    }
    // SAFETY: as above.
    unsafe { *len = 0 };
    Ok(())
}

/// A control message behind those that are there, as far as there is room (put_cmsg, net/core/scm.c).
///
/// # Safety
/// `m` is the program's message, with `room` bytes for control messages, of which `msg_controllen` are used.
#[cold]
unsafe fn put_control(m: &mut msghdr, room: usize, level: c_int, kind: c_int, data: &[u8]) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let (used, whole) = (m.msg_controllen, HEADER + data.len());
    let left = room.saturating_sub(used);
    let n = whole.min(left);
    if n < whole {
        m.msg_flags |= libc::MSG_CTRUNC;
    }
    if m.msg_control.is_null() || n < HEADER {
        return;
    }
    let header = libc::cmsghdr { cmsg_len: n, cmsg_level: level, cmsg_type: kind };
    // SAFETY: `n` bytes of the program's, unused; sources of HEADER and n - HEADER bytes.
    unsafe {
        let at = m.msg_control.cast::<u8>().add(used);
        at.cast::<libc::cmsghdr>().write_unaligned(header);
        std::ptr::copy_nonoverlapping(data.as_ptr(), at.add(HEADER), n - HEADER);
    }
    m.msg_controllen = used + whole.next_multiple_of(size_of::<usize>()).min(left);
}

/// What TCP has to say with each message, in its order (tcp_recvmsg, net/ipv4/tcp.c): the time, and how much is left.
///
/// # Safety
/// `m` is the program's message, with `room` bytes for control messages, of which none is used.
#[cold]
unsafe fn put_all(m: &mut msghdr, room: usize, e: &Ref, fd: c_int, kinds: u32, n: isize) {
    const TCP_CM_INQ: c_int = 36;
    if kinds & (each::MICROSECONDS | each::NANOSECONDS) != 0 && n > 0 {
        let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writable.
        unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
        let micro = kinds & each::MICROSECONDS != 0;
        let kind = if micro { libc::SCM_TIMESTAMP } else { libc::SCM_TIMESTAMPNS };
        let part = if micro { now.tv_nsec / 1000 } else { now.tv_nsec };
        let mut time = [0u8; 16];
        time[..8].copy_from_slice(&now.tv_sec.to_ne_bytes());
        time[8..].copy_from_slice(&part.to_ne_bytes());
        // SAFETY: as the caller vouches.
        unsafe { put_control(m, room, libc::SOL_SOCKET, kind, &time) };
    }
    if kinds & each::COUNT != 0 {
        let left = e.sock.left_to_read(fd).min(i32::MAX as u64) as i32;
        // SAFETY: as the caller vouches.
        unsafe { put_control(m, room, libc::IPPROTO_TCP, TCP_CM_INQ, &left.to_ne_bytes()) };
    }
}

fd_hook! {
    /// recvmsg(2).
    fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program's own argument.
        let Some(&m) = (unsafe { given(msg) }) else { return kernel() };
        let named = !m.msg_name.is_null();
        if named && (m.msg_namelen as c_int) < 0 {
            return kernel();
        }
        // No vector: an end, an error and EAGAIN are told as for one of length 0, and the kernel does not know the ring.
        let none = iov(std::ptr::null(), 0);
        // SAFETY: the program vouches for its arrays.
        let list = match unsafe { iovs(m.msg_iov, m.msg_iovlen) } {
            Some(list) => list,
            None if m.msg_iovlen == 0 => &none,
            None => return kernel(),
        };
        let mut asked = false;
        // SAFETY: as above.
        let r = unsafe {
            receive(&e, fd, list, flags, || {
                asked = true;
                kernel()
            })
        };
        if r >= 0 && !asked {
            // TCP has no ancillary data but these, and names no sender.
            let room = m.msg_controllen;
            let namelen = if named { 0 } else { m.msg_namelen };
            // The one flag of the call that comes back in the message (____sys_recvmsg, net/socket.c).
            let said = flags & libc::MSG_CMSG_CLOEXEC;
            let mut m = msghdr { msg_flags: said, msg_controllen: 0, msg_namelen: namelen, ..m };
            let kinds = e.sock.slot().map_or(0, |s| s.rx.with_each.load(Relaxed));
            if kinds != 0 {
                // SAFETY: the program's message.
                unsafe { put_all(&mut m, room, &e, fd, kinds, r) };
            }
            // SAFETY: not null; the program's.
            unsafe { msg.write(m) };
        }
        r
    }
}

fd_hook! {
    /// write(2).
    fn write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t |e, kernel| {
        if too_long(&e, buf, n) {
            return fail(libc::EFAULT);
        }
        // SAFETY: the program vouches for `buf`.
        unsafe { transmit(&e, fd, &iov(buf, n), 0, kernel) }
    }
}

fd_hook! {
    /// writev(2).
    fn writev(fd: c_int, v: *const iovec, n: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for its arrays.
        match unsafe { iovs(v, n as usize) } {
            // SAFETY: as above.
            Some(list) => unsafe { transmit(&e, fd, list, 0, kernel) },
            None => kernel(),
        }
    }
}

fd_hook! {
    /// send(2).
    fn send(fd: c_int, buf: *const c_void, n: size_t, flags: c_int) -> ssize_t |e, kernel| {
        // SAFETY: the program vouches for `buf`.
        unsafe { transmit(&e, fd, &iov(buf, n), flags, kernel) }
    }
}

/// Whether the kernel takes what is given as an address to send to (move_addr_to_kernel, net/socket.c), as far as that
/// shows. TCP then ignores it.
fn may_be_address(p: *const c_void, len: socklen_t) -> bool {
    let len = len as usize;
    p.is_null() || len == 0 || len <= size_of::<libc::sockaddr_storage>() && crate::hook::plausible(p, len)
}

hook! {
    /// sendto(2). TCP ignores the address of a connected socket.
    fn sendto(fd: c_int, buf: *const c_void, n: size_t, flags: c_int, addr: *const sockaddr, len: socklen_t) -> ssize_t {
        let kernel = move || real!(sendto(fd => c_int, buf => *const c_void, n => size_t, flags => c_int, addr => *const sockaddr, len => socklen_t) -> ssize_t);
        match fd_table::stream(fd) {
            Some(_) if !may_be_address(addr.cast(), len) => kernel(),
            // SAFETY: the program vouches for `buf`.
            Some(e) => unsafe { transmit(&e, fd, &iov(buf, n), flags, kernel) },
            None => {
                let r = kernel();
                if r >= 0 && flags & libc::MSG_FASTOPEN != 0 {
                    super::sockets::connected(fd);
                }
                r
            }
        }
    }
}

hook! {
    /// sendmsg(2).
    fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t {
        let kernel = move || real!(sendmsg(fd => c_int, msg => *const msghdr, flags => c_int) -> ssize_t);
        let Some(e) = fd_table::stream(fd) else {
            let mut p = match super::fdops::leaving_with(msg) {
                Ok(Some(p)) => p,
                Ok(None) => return kernel(),
                // Of the errors for want of something sendmsg(2) has this one.
                Err(_) => return crate::hook::fail(libc::ENOMEM),
            };
            // SAFETY: not null, or nothing would leave with it; the program's.
            let m = p.message(unsafe { &*msg });
            // It may block, with what the relays hold, and nothing is locked.
            let n = section::open();
            let r = real!(sendmsg(fd => c_int, &raw const m => *const msghdr, flags => c_int) -> ssize_t);
            section::close(n);
            p.done(r >= 0);
            return r;
        };
        // SAFETY: the program's own argument.
        let Some(m) = (unsafe { given(msg) }) else { return kernel() };
        // A longer one is cut, but none that is negative (copy_msghdr_from_user, net/socket.c).
        let most = size_of::<libc::sockaddr_storage>() as socklen_t;
        if (m.msg_namelen as c_int) < 0 && !m.msg_name.is_null()
            || !may_be_address(m.msg_name, m.msg_namelen.min(most))
        {
            return kernel();
        }
        if m.msg_controllen != 0 && !e.sock.is_plain() {
            // An option for this message alone, or one that TCP refuses: the kernel's to say.
            e.sock.leave_tx(fd, Reason::SocketOption);
        }
        // SAFETY: the program vouches for its arrays.
        match unsafe { iovs(m.msg_iov, m.msg_iovlen) } {
            // SAFETY: as above.
            Some(list) => unsafe { transmit(&e, fd, list, flags, kernel) },
            None => kernel(),
        }
    }
}

hook! {
    /// __read_chk: read(2) of a program built with _FORTIFY_SOURCE.
    fn __read_chk(fd: c_int, buf: *mut c_void, n: size_t, have: size_t) -> ssize_t {
        if n > have {
            return real!(__read_chk(fd => c_int, buf => *mut c_void, n => size_t, have => size_t) -> ssize_t);
        }
        // SAFETY: the program's arguments.
        unsafe { read(fd, buf, n) }
    }
}

hook! {
    /// __recv_chk.
    fn __recv_chk(fd: c_int, buf: *mut c_void, n: size_t, have: size_t, flags: c_int) -> ssize_t {
        if n > have {
            return real!(__recv_chk(fd => c_int, buf => *mut c_void, n => size_t, have => size_t, flags => c_int) -> ssize_t);
        }
        // SAFETY: the program's arguments.
        unsafe { recv(fd, buf, n, flags) }
    }
}

hook! {
    /// __recvfrom_chk.
    fn __recvfrom_chk(fd: c_int, buf: *mut c_void, n: size_t, have: size_t, flags: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> ssize_t {
        if n > have {
            return real!(__recvfrom_chk(fd => c_int, buf => *mut c_void, n => size_t, have => size_t, flags => c_int, addr => *mut sockaddr, len => *mut socklen_t) -> ssize_t);
        }
        // SAFETY: the program's arguments.
        unsafe { recvfrom(fd, buf, n, flags, addr, len) }
    }
}

macro_rules! alias {
    ($($alias:ident = $target:ident($($a:ident: $t:ty),*) -> $r:ty;)*) => {$(
        #[doc = concat!("Another name that glibc exports for `", stringify!($target), "`.")]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "C" fn $alias($($a: $t),*) -> $r {
            // SAFETY: the program's arguments, passed on.
            unsafe { $target($($a),*) }
        }
    )*};
}
pub(crate) use alias;

alias! {
    __read = read(fd: c_int, buf: *mut c_void, n: size_t) -> ssize_t;
    __write = write(fd: c_int, buf: *const c_void, n: size_t) -> ssize_t;
    preadv64v2 = preadv2(fd: c_int, v: *const iovec, n: c_int, off: off_t, flags: c_int) -> ssize_t;
    pwritev64v2 = pwritev2(fd: c_int, v: *const iovec, n: c_int, off: off_t, flags: c_int) -> ssize_t;
    __send = send(fd: c_int, buf: *const c_void, n: size_t, flags: c_int) -> ssize_t;
}

/// struct mmsghdr.
#[repr(C)]
pub struct MMsg {
    hdr: msghdr,
    len: u32,
}

/// How long recvmmsg may go on; `None` if the kernel is to refuse it.
///
/// # Safety
/// `t` is the program's, as it gives it to the kernel, or null.
unsafe fn until(t: *const timespec) -> Option<u64> {
    if t.is_null() {
        return Some(u64::MAX);
    }
    // SAFETY: the program's own argument.
    let t = unsafe { given(t) }?;
    let second = 0..1_000_000_000;
    (t.tv_sec >= 0 && second.contains(&t.tv_nsec)).then(|| {
        let span = (t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64);
        engine::sys::now_ns().saturating_add(span)
    })
}

hook! {
    /// recvmmsg(2): on a connection, one recvmsg after the other, as the kernel does it. The end of the stream is a
    /// message like others, and the time that is left is written back.
    fn recvmmsg(fd: c_int, v: *mut MMsg, n: u32, flags: c_int, timeout: *mut timespec) -> c_int {
        let kernel = || real!(recvmmsg(fd => c_int, v => *mut MMsg, n => u32, flags => c_int, timeout => *mut timespec) -> c_int);
        if fd_table::stream(fd).is_none() || !crate::hook::plausible(v, n.min(1024) as usize * size_of::<MMsg>()) {
            return kernel();
        }
        // SAFETY: the program's own argument.
        let Some(end) = (unsafe { until(timeout) }) else { return kernel() };
        let mut done = 0;
        while done < n.min(1024) {
            let wait = flags & !libc::MSG_WAITFORONE;
            let f = if done > 0 && flags & libc::MSG_WAITFORONE != 0 { wait | libc::MSG_DONTWAIT } else { wait };
            // SAFETY: element of the program's array.
            let m = unsafe { &mut *v.add(done as usize) };
            // SAFETY: the program's message.
            let r = unsafe { recvmsg(fd, &mut m.hdr, f) };
            if r < 0 {
                return if done > 0 { done as c_int } else { -1 };
            }
            m.len = r as u32;
            done += 1;
            if timeout.is_null() {
                continue;
            }
            let left = end.saturating_sub(engine::sys::now_ns());
            let left_of = timespec { tv_sec: (left / 1_000_000_000) as i64, tv_nsec: (left % 1_000_000_000) as i64 };
            // SAFETY: not null; the program's.
            unsafe { *timeout = left_of };
            if left == 0 {
                break;
            }
        }
        done as c_int
    }
}

hook! {
    /// sendmmsg(2).
    fn sendmmsg(fd: c_int, v: *mut MMsg, n: u32, flags: c_int) -> c_int {
        let there = crate::hook::plausible(v, n.min(1024) as usize * size_of::<MMsg>());
        if fd_table::stream(fd).is_none() || !there {
            let mut passing = Vec::new();
            let mut n = n;
            for i in 0..if there { n.min(1024) as usize } else { 0 } {
                // SAFETY: element of the program's array.
                let hdr = unsafe { &raw mut (*v.add(i)).hdr };
                match super::fdops::leaving_with(hdr) {
                    Ok(Some(mut p)) => {
                        // SAFETY: as above.
                        let program = unsafe { hdr.read() };
                        // SAFETY: as above; put back below.
                        unsafe { hdr.write(p.message(&program)) };
                        passing.push((i, hdr, program, p));
                    }
                    Ok(None) => {}
                    // As `sendmsg`; those before it are sent.
                    Err(_) if i == 0 => return crate::hook::fail(libc::ENOMEM),
                    Err(_) => {
                        n = i as u32;
                        break;
                    }
                }
            }
            let held = section::open();
            let r = real!(sendmmsg(fd => c_int, v => *mut MMsg, n => u32, flags => c_int) -> c_int);
            section::close(held);
            for (i, hdr, program, p) in passing {
                // SAFETY: element of the program's array.
                unsafe { hdr.write(program) };
                p.done(i < r.max(0) as usize);
            }
            return r;
        }
        let mut done = 0;
        while done < n.min(1024) {
            // SAFETY: element of the program's array.
            let m = unsafe { &mut *v.add(done as usize) };
            // SAFETY: the program's message.
            let r = unsafe { sendmsg(fd, &m.hdr, flags) };
            if r < 0 {
                return if done > 0 { done as c_int } else { -1 };
            }
            m.len = r as u32;
            done += 1;
        }
        done as c_int
    }
}

/// Bytes that sendfile and splice copy at a time.
const COPY: usize = 64 << 10;

hook! {
    /// sendfile(2) to or from a connection whose stream the kernel does not have: by copying.
    fn sendfile(out: c_int, input: c_int, off: *mut off_t, n: size_t) -> ssize_t {
        let kernel = move || real!(sendfile(out => c_int, input => c_int, off => *mut off_t, n => size_t) -> ssize_t);
        let Some(e) = fd_table::stream(out) else { return kernel() };
        if e.sock.is_plain() {
            return kernel();
        }
        // Of all that is no file the kernel takes some and refuses most (pipes, sockets): its own affair.
        if n > 0 && !engine::sys::is_file(input) {
            e.sock.leave_tx(out, Reason::Splice);
            settle(&e, out);
            drop(e);
            return kernel();
        }
        // Each piece is a call of its own, between which handlers may run.
        drop(e);
        let mut pos = if off.is_null() { None } else {
            // SAFETY: not null; the program's.
            Some(unsafe { *off })
        };
        let mut buf = vec![0u8; COPY.min(n.max(1))];
        let mut done = 0usize;
        while done < n {
            let k = (n - done).min(buf.len());
            let got = match pos {
                Some(p) => real!(pread(input => c_int, buf.as_mut_ptr().cast() => *mut c_void, k => size_t, p => off_t) -> ssize_t),
                None => real!(read(input => c_int, buf.as_mut_ptr().cast() => *mut c_void, k => size_t) -> ssize_t),
            };
            if got <= 0 {
                if got < 0 && done == 0 {
                    return -1;
                }
                break;
            }
            // SAFETY: our own buffer.
            let sent = unsafe { write(out, buf.as_ptr().cast(), got as usize) };
            let sent_n = sent.max(0);
            match pos.as_mut() {
                Some(p) => *p += sent_n as off_t,
                None if sent_n < got => {
                    // Not taken: the file's position goes back to it.
                    real!(lseek(input => c_int, (sent_n - got) as off_t => off_t, libc::SEEK_CUR => c_int) -> isize);
                }
                None => {}
            }
            done += sent_n as usize;
            if sent < got {
                if done == 0 {
                    return -1;
                }
                break;
            }
        }
        if let Some(p) = pos {
            // SAFETY: not null, see above.
            unsafe { *off = p };
        }
        done as ssize_t
    }
}
alias! { sendfile64 = sendfile(out: c_int, input: c_int, off: *mut off_t, n: size_t) -> ssize_t; }

hook! {
    /// splice(2): the pipe's end is the kernel's; the connection's end is read or written by copying.
    fn splice(input: c_int, ioff: *mut off_t, out: c_int, ooff: *mut off_t, n: size_t, flags: u32) -> ssize_t {
        let kernel = move || real!(splice(input => c_int, ioff => *mut off_t, out => c_int, ooff => *mut off_t, n => size_t, flags => u32) -> ssize_t);
        let plain = |fd: c_int| fd_table::stream(fd).is_none_or(|e| e.sock.is_plain());
        if plain(input) && plain(out) {
            return kernel();
        }
        let pipe = engine::sys::is_pipe(input) || engine::sys::is_pipe(out);
        const FLAGS: u32 = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MORE | libc::SPLICE_F_GIFT;
        // Neither a pipe nor a connection has positions.
        if n == 0 || !pipe || flags & !FLAGS != 0 || !ioff.is_null() || !ooff.is_null() {
            // Refused, and nothing is moved.
            return kernel();
        }
        // Whether it is mapped; else it stays on TCP.
        let mapped = |fd: c_int| {
            fd_table::stream(fd).is_some_and(|e| {
                e.sock.is_mapped() || {
                    e.sock.bar(Reason::Splice);
                    // Another thread may have been about to map it.
                    e.sock.is_mapped()
                }
            })
        };
        if mapped(input) {
            return splice_in(input, out, n, flags);
        }
        if mapped(out) {
            return splice_out(input, out, n, flags);
        }
        kernel()
    }
}

/// From a connection into a pipe: as much as the pipe takes at once.
fn splice_in(sock: c_int, pipe: c_int, n: usize, flags: u32) -> ssize_t {
    let dontwait = if flags & libc::SPLICE_F_NONBLOCK != 0 { libc::MSG_DONTWAIT } else { 0 };
    let cap = engine::sys::pipe_room(pipe).min(n).min(COPY);
    if cap == 0 {
        // The pipe is full: wait for it as splice does, unless told not to.
        if dontwait != 0 {
            return fail(libc::EAGAIN);
        }
        let mut p = [libc::pollfd { fd: pipe, events: libc::POLLOUT, revents: 0 }];
        let r = engine::sys::poll(&mut p, None);
        return if r < 0 { to_libc(r) } else { splice_in(sock, pipe, n, flags) };
    }
    let mut p = [libc::pollfd { fd: pipe, events: libc::POLLOUT, revents: 0 }];
    if engine::sys::poll(&mut p, Some(0)) > 0 && p[0].revents & libc::POLLERR != 0 {
        // Nobody reads the pipe: said before a byte is taken.
        // SAFETY: no pointers.
        unsafe { libc::raise(libc::SIGPIPE) };
        return fail(libc::EPIPE);
    }
    let mut buf = vec![0u8; cap];
    // SAFETY: our own buffer.
    let got = unsafe { recv(sock, buf.as_mut_ptr().cast(), cap, dontwait) };
    if got <= 0 {
        return got;
    }
    let mut at = 0usize;
    while at < got as usize {
        let r = real!(write(pipe => c_int, buf[at..].as_ptr().cast() => *const c_void, got as usize - at => size_t) -> ssize_t);
        if r < 0 {
            if crate::hook::errno() == libc::EAGAIN {
                // Another writer took the room: the bytes are out of the stream, they must get in.
                let mut p = [libc::pollfd { fd: pipe, events: libc::POLLOUT, revents: 0 }];
                let _ = engine::sys::poll(&mut p, None);
                continue;
            }
            return if at > 0 { at as ssize_t } else { -1 };
        }
        at += r as usize;
    }
    got
}

/// From a pipe into a connection: looked at with tee into nothing is not possible, so what the
/// connection does not take at once is waited for.
fn splice_out(input: c_int, sock: c_int, n: usize, flags: u32) -> ssize_t {
    let nonblock = flags & libc::SPLICE_F_NONBLOCK != 0;
    if nonblock {
        let mut p = [libc::pollfd { fd: input, events: libc::POLLIN, revents: 0 }];
        if engine::sys::poll(&mut p, Some(0)) == 0 {
            return fail(libc::EAGAIN);
        }
    }
    if let Some(e) = fd_table::stream(sock)
        && e.sock.look_at(sock) == (engine::conn::Look { ready: 0, from_kernel: libc::POLLIN as u32 })
        && (nonblock
            || e.sock.slot().is_some_and(|s| s.nonblock.load(std::sync::atomic::Ordering::Relaxed) != 0))
    {
        return fail(libc::EAGAIN);
    }
    let mut buf = vec![0u8; n.min(16 << 10)];
    let got =
        real!(read(input => c_int, buf.as_mut_ptr().cast() => *mut c_void, buf.len() => size_t) -> ssize_t);
    if got <= 0 {
        return got;
    }
    let mut at = 0usize;
    while at < got as usize {
        // SAFETY: our own buffer.
        let r = unsafe { write(sock, buf[at..].as_ptr().cast(), got as usize - at) };
        if r >= 0 {
            at += r as usize;
            continue;
        }
        if crate::hook::errno() != libc::EAGAIN {
            return if at > 0 { at as ssize_t } else { -1 };
        }
        let mut p = [libc::pollfd { fd: sock, events: libc::POLLOUT, revents: 0 }];
        // SAFETY: our own list.
        unsafe { super::ready::poll(p.as_mut_ptr(), 1, -1) };
    }
    got
}
