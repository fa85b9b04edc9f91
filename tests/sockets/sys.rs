//! Socket calls as libc has them, with the results a scenario can print.
//!
//! Every call goes through the libc *symbol* (that is what a preloaded library replaces) and gives
//! `Ok(return value)` or `Err(errno)`. Nothing is retried, nothing is hidden: a short count stays short.
#![allow(dead_code)]

use libc::{c_int, c_void};
use std::{
    fmt::Write as _,
    io, mem, ptr,
    sync::{
        Mutex,
        atomic::{AtomicI32, Ordering},
    },
    time::{Duration, Instant},
};

/// A return value, or the errno.
pub type Res = Result<i64, i32>;

/// The current errno.
pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// What a call has returned.
pub fn res(r: impl Into<i64>) -> Res {
    let r = r.into();
    if r < 0 { Err(errno()) } else { Ok(r) }
}

/// The name of an errno that sockets give.
pub fn errno_name(e: i32) -> String {
    let n = match e {
        libc::EAGAIN => "EAGAIN",
        libc::EBADF => "EBADF",
        libc::EMFILE => "EMFILE",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ECONNRESET => "ECONNRESET",
        libc::EPIPE => "EPIPE",
        libc::EINTR => "EINTR",
        libc::EINVAL => "EINVAL",
        libc::EFAULT => "EFAULT",
        libc::ENOTCONN => "ENOTCONN",
        libc::EISCONN => "EISCONN",
        libc::EINPROGRESS => "EINPROGRESS",
        libc::EALREADY => "EALREADY",
        libc::EADDRINUSE => "EADDRINUSE",
        libc::EEXIST => "EEXIST",
        libc::ENOENT => "ENOENT",
        libc::EPERM => "EPERM",
        libc::ESPIPE => "ESPIPE",
        libc::ENOTSOCK => "ENOTSOCK",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ENOTTY => "ENOTTY",
        libc::EMSGSIZE => "EMSGSIZE",
        libc::ELOOP => "ELOOP",
        libc::EDESTADDRREQ => "EDESTADDRREQ",
        libc::ENOBUFS => "ENOBUFS",
        libc::ENOMEM => "ENOMEM",
        libc::ECONNABORTED => "ECONNABORTED",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EACCES => "EACCES",
        0 => "0",
        _ => return format!("errno {e}"),
    };
    n.into()
}

/// How a result stands in the transcript.
pub fn show(r: Res) -> String {
    match r {
        Ok(n) => n.to_string(),
        Err(e) => errno_name(e),
    }
}

/// A socket address of either family, as the kernel wants it.
#[derive(Clone, Copy)]
pub struct Addr {
    store: libc::sockaddr_storage,
    len: libc::socklen_t,
}

impl Addr {
    /// An empty one, to be filled by the kernel.
    pub fn empty() -> Self {
        // SAFETY: all-zero is a valid sockaddr_storage.
        let store = unsafe { mem::zeroed() };
        Addr { store, len: size_of::<libc::sockaddr_storage>() as _ }
    }

    /// An IPv4 address.
    pub fn v4(ip: [u8; 4], port: u16) -> Self {
        let mut a = Addr::empty();
        let sin = libc::sockaddr_in {
            sin_family: libc::AF_INET as _,
            sin_port: port.to_be(),
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip) },
            sin_zero: [0; 8],
        };
        // SAFETY: sockaddr_storage is large and aligned enough for every socket address.
        unsafe { ptr::write((&raw mut a.store).cast(), sin) };
        a.len = size_of::<libc::sockaddr_in>() as _;
        a
    }

    /// `::1`, or `::` when `any`.
    pub fn v6(any: bool, port: u16) -> Self {
        let mut ip = [0; 16];
        ip[15] = u8::from(!any);
        let mut a = Addr::empty();
        let sin = libc::sockaddr_in6 {
            sin6_family: libc::AF_INET6 as _,
            sin6_port: port.to_be(),
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: ip },
            sin6_scope_id: 0,
        };
        // SAFETY: as in `v4`.
        unsafe { ptr::write((&raw mut a.store).cast(), sin) };
        a.len = size_of::<libc::sockaddr_in6>() as _;
        a
    }

    /// An abstract Unix name.
    pub fn abstract_unix(name: &str) -> Self {
        let mut a = Addr::empty();
        // SAFETY: all-zero is a valid sockaddr_un.
        let mut sun: libc::sockaddr_un = unsafe { mem::zeroed() };
        sun.sun_family = libc::AF_UNIX as _;
        for (d, s) in sun.sun_path[1..].iter_mut().zip(name.bytes()) {
            *d = s as _;
        }
        // SAFETY: as in `v4`.
        unsafe { ptr::write((&raw mut a.store).cast(), sun) };
        a.len = (2 + 1 + name.len()) as _;
        a
    }

    /// AF_INET, AF_INET6, ...
    pub fn family(&self) -> c_int {
        c_int::from(self.store.ss_family)
    }

    /// The port; both families keep it at the same place.
    pub fn port(&self) -> u16 {
        // SAFETY: sin_port lies in the storage's first 8 bytes in both families; any bytes are a valid u16.
        let sin: libc::sockaddr_in = unsafe { ptr::read((&raw const self.store).cast()) };
        u16::from_be(sin.sin_port)
    }

    /// The address without the port.
    pub fn ip(&self) -> String {
        match self.family() {
            libc::AF_INET => {
                // SAFETY: the family says that a sockaddr_in was stored.
                let sin: libc::sockaddr_in = unsafe { ptr::read((&raw const self.store).cast()) };
                std::net::Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes()).to_string()
            }
            libc::AF_INET6 => {
                // SAFETY: the family says that a sockaddr_in6 was stored.
                let sin: libc::sockaddr_in6 = unsafe { ptr::read((&raw const self.store).cast()) };
                std::net::Ipv6Addr::from(sin.sin6_addr.s6_addr).to_string()
            }
            f => format!("family {f}"),
        }
    }

    /// What the kernel stored, as a length.
    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn raw(&self) -> *const libc::sockaddr {
        (&raw const self.store).cast()
    }

    fn raw_mut(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.store).cast()
    }
}

/// A TCP socket, or of any other kind by `ty`.
pub fn socket(family: c_int, ty: c_int) -> Res {
    // SAFETY: no pointers.
    res(unsafe { libc::socket(family, ty, 0) })
}

pub fn bind(fd: i32, a: &Addr) -> Res {
    // SAFETY: the address is `a.len` bytes of live memory.
    res(unsafe { libc::bind(fd, a.raw(), a.len) })
}

pub fn listen(fd: i32, backlog: c_int) -> Res {
    // SAFETY: no pointers.
    res(unsafe { libc::listen(fd, backlog) })
}

pub fn connect(fd: i32, a: &Addr) -> Res {
    // SAFETY: as in `bind`.
    res(unsafe { libc::connect(fd, a.raw(), a.len) })
}

pub fn accept(fd: i32, from: Option<&mut Addr>) -> Res {
    let (p, l) = match from {
        Some(a) => (a.raw_mut(), &raw mut a.len),
        None => (ptr::null_mut(), ptr::null_mut()),
    };
    // SAFETY: both pointers are null, or an address and its capacity.
    res(unsafe { libc::accept(fd, p, l) })
}

pub fn accept4(fd: i32, flags: c_int) -> Res {
    // SAFETY: null pointers are allowed.
    res(unsafe { libc::accept4(fd, ptr::null_mut(), ptr::null_mut(), flags) })
}

pub fn getsockname(fd: i32) -> Result<Addr, i32> {
    let mut a = Addr::empty();
    let (p, l) = (a.raw_mut(), &raw mut a.len);
    // SAFETY: an address and its capacity.
    res(unsafe { libc::getsockname(fd, p, l) }).map(|_| a)
}

pub fn getpeername(fd: i32) -> Result<Addr, i32> {
    let mut a = Addr::empty();
    let (p, l) = (a.raw_mut(), &raw mut a.len);
    // SAFETY: an address and its capacity.
    res(unsafe { libc::getpeername(fd, p, l) }).map(|_| a)
}

pub fn shutdown(fd: i32, how: c_int) -> Res {
    // SAFETY: no pointers.
    res(unsafe { libc::shutdown(fd, how) })
}

pub fn close(fd: i32) -> Res {
    // SAFETY: scenarios own the fds they close.
    res(unsafe { libc::close(fd) })
}

pub fn read(fd: i32, b: &mut [u8]) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::read(fd, b.as_mut_ptr().cast(), b.len()) } as i64)
}

pub fn write(fd: i32, b: &[u8]) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::write(fd, b.as_ptr().cast(), b.len()) } as i64)
}

pub fn recv(fd: i32, b: &mut [u8], flags: c_int) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::recv(fd, b.as_mut_ptr().cast(), b.len(), flags) } as i64)
}

pub fn send(fd: i32, b: &[u8], flags: c_int) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::send(fd, b.as_ptr().cast(), b.len(), flags) } as i64)
}

/// The calls with a pointer that is no memory: `which` is read, write, recv or send.
pub fn with_bad_pointer(which: &str, fd: i32, n: usize) -> Res {
    let p = ptr::without_provenance_mut::<c_void>(1);
    // SAFETY: the point of the call: the kernel answers EFAULT for an address that is not mapped.
    res(unsafe {
        match which {
            "read" => libc::read(fd, p, n),
            "write" => libc::write(fd, p, n),
            "recv" => libc::recv(fd, p, n, 0),
            _ => libc::send(fd, p, n, libc::MSG_NOSIGNAL),
        }
    } as i64)
}

/// `recv` without a buffer, for MSG_TRUNC.
pub fn recv_discard(fd: i32, n: usize, flags: c_int) -> Res {
    // SAFETY: with MSG_TRUNC TCP does not touch the buffer.
    res(unsafe { libc::recv(fd, ptr::null_mut(), n, flags) } as i64)
}

pub fn recvfrom(fd: i32, b: &mut [u8], flags: c_int, from: &mut Addr) -> Res {
    let (p, l) = (from.raw_mut(), &raw mut from.len);
    // SAFETY: the buffer is live and this long; an address and its capacity.
    res(unsafe { libc::recvfrom(fd, b.as_mut_ptr().cast(), b.len(), flags, p, l) } as i64)
}

pub fn sendto(fd: i32, b: &[u8], flags: c_int, to: Option<&Addr>) -> Res {
    let (p, l) = to.map_or((ptr::null(), 0), |a| (a.raw(), a.len));
    // SAFETY: the buffer is live and this long; an address and its length, or null.
    res(unsafe { libc::sendto(fd, b.as_ptr().cast(), b.len(), flags, p, l) } as i64)
}

fn iovs(bufs: &mut [&mut [u8]]) -> Vec<libc::iovec> {
    bufs.iter_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() }).collect()
}

fn iovs_const(bufs: &[&[u8]]) -> Vec<libc::iovec> {
    bufs.iter().map(|b| libc::iovec { iov_base: b.as_ptr() as *mut c_void, iov_len: b.len() }).collect()
}

pub fn readv(fd: i32, bufs: &mut [&mut [u8]]) -> Res {
    let v = iovs(bufs);
    // SAFETY: the vector describes live, exclusive buffers.
    res(unsafe { libc::readv(fd, v.as_ptr(), v.len() as _) } as i64)
}

pub fn writev(fd: i32, bufs: &[&[u8]]) -> Res {
    let v = iovs_const(bufs);
    // SAFETY: the vector describes live buffers that are only read.
    res(unsafe { libc::writev(fd, v.as_ptr(), v.len() as _) } as i64)
}

/// `writev` with a count of the caller's choice and no vector to speak of.
pub fn writev_count(fd: i32, count: c_int) -> Res {
    let v = vec![libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; count.max(1) as usize];
    // SAFETY: the vector is at least as long as a positive count.
    res(unsafe { libc::writev(fd, v.as_ptr(), count) } as i64)
}

/// preadv, pwritev, preadv2 and pwritev2 on something without a position.
pub fn positioned(which: &str, fd: i32, b: &mut [u8], offset: i64) -> Res {
    let v = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() };
    // SAFETY: one live, exclusive buffer.
    res(unsafe {
        match which {
            "pread" => libc::pread(fd, b.as_mut_ptr().cast(), b.len(), offset),
            "pwrite" => libc::pwrite(fd, b.as_ptr().cast(), b.len(), offset),
            "preadv" => libc::preadv(fd, &v, 1, offset),
            "pwritev" => libc::pwritev(fd, &v, 1, offset),
            "preadv2" => libc::preadv2(fd, &v, 1, offset, 0),
            _ => libc::pwritev2(fd, &v, 1, offset, 0),
        }
    } as i64)
}

pub fn lseek(fd: i32) -> Res {
    // SAFETY: no pointers.
    res(unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) })
}

/// What `recvmsg` reports beside the bytes.
pub struct Received {
    pub result: Res,
    pub name_len: u32,
    pub control_len: usize,
    pub flags: c_int,
    pub fds: Vec<i32>,
    /// What TCP_INQ tells.
    pub left: Vec<i32>,
}

pub fn recvmsg(fd: i32, bufs: &mut [&mut [u8]], flags: c_int) -> Received {
    let mut v = iovs(bufs);
    let mut name = Addr::empty();
    let mut control = [0u64; 16];
    // SAFETY: all-zero is a valid msghdr.
    let mut m: libc::msghdr = unsafe { mem::zeroed() };
    m.msg_name = name.raw_mut().cast();
    m.msg_namelen = name.len;
    m.msg_iov = v.as_mut_ptr();
    m.msg_iovlen = v.len();
    m.msg_control = control.as_mut_ptr().cast();
    m.msg_controllen = size_of_val(&control);
    // SAFETY: every pointer in the header is live and as long as it says.
    let result = res(unsafe { libc::recvmsg(fd, &mut m, flags) } as i64);
    let (mut fds, mut left) = (Vec::new(), Vec::new());
    if result.is_ok() {
        // SAFETY: the header is as the kernel filled it.
        let mut c = unsafe { libc::CMSG_FIRSTHDR(&m) };
        while !c.is_null() {
            // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers inside the control buffer.
            let h = unsafe { *c };
            if (h.cmsg_level, h.cmsg_type) == (libc::IPPROTO_TCP, 36) {
                // SAFETY: as above.
                let data = unsafe { libc::CMSG_DATA(c) }.cast::<i32>();
                // SAFETY: a message of TCP_INQ holds an int.
                left.push(unsafe { data.read_unaligned() });
            }
            if (h.cmsg_level, h.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                // SAFETY: as above.
                let data = unsafe { libc::CMSG_DATA(c) }.cast::<i32>();
                // SAFETY: an SCM_RIGHTS message holds at least one fd.
                fds.push(unsafe { data.read_unaligned() });
            }
            // SAFETY: `c` is a header of `m`.
            c = unsafe { libc::CMSG_NXTHDR(&m, c) };
        }
    }
    Received { result, name_len: m.msg_namelen, control_len: m.msg_controllen, flags: m.msg_flags, fds, left }
}

pub fn sendmsg(fd: i32, bufs: &[&[u8]], flags: c_int, pass: Option<i32>) -> Res {
    with_msg(bufs, pass, |m| {
        // SAFETY: every pointer in the header is live and as long as it says.
        res(unsafe { libc::sendmsg(fd, m, flags) } as i64)
    })
}

/// One message by sendmmsg, with a descriptor in it.
pub fn sendmmsg_passing(fd: i32, text: &[u8], pass: i32) -> Res {
    with_msg(&[text], Some(pass), |m| {
        let mut one = libc::mmsghdr { msg_hdr: *m, msg_len: 0 };
        // SAFETY: one message, whose pointers are live and as long as it says.
        res(unsafe { libc::sendmmsg(fd, &mut one, 1, 0) })
    })
}

fn with_msg(bufs: &[&[u8]], pass: Option<i32>, send: impl FnOnce(&libc::msghdr) -> Res) -> Res {
    let mut v = iovs_const(bufs);
    let mut control = [0u64; 4];
    // SAFETY: all-zero is a valid msghdr.
    let mut m: libc::msghdr = unsafe { mem::zeroed() };
    m.msg_iov = v.as_mut_ptr();
    m.msg_iovlen = v.len();
    if let Some(pass) = pass {
        m.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic on a constant.
        m.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
        // SAFETY: the control buffer holds one header and one fd.
        unsafe {
            let c = libc::CMSG_FIRSTHDR(&m);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(c).cast::<i32>().write_unaligned(pass);
        }
    }
    send(&m)
}

/// Sends each buffer as one message; gives the count and each message's length.
pub fn sendmmsg(fd: i32, bufs: &[&[u8]]) -> (Res, Vec<u32>) {
    let mut v: Vec<_> = bufs.iter().flat_map(|b| iovs_const(&[b])).collect();
    // SAFETY: all-zero is a valid mmsghdr.
    let mut m: Vec<libc::mmsghdr> = v.iter().map(|_| unsafe { mem::zeroed() }).collect();
    for (m, v) in m.iter_mut().zip(&mut v) {
        m.msg_hdr.msg_iov = v;
        m.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the headers point to live vectors.
    let r = res(unsafe { libc::sendmmsg(fd, m.as_mut_ptr(), m.len() as _, 0) });
    (r, m.iter().map(|m| m.msg_len).collect())
}

pub fn recvmmsg(fd: i32, bufs: &mut [&mut [u8]], flags: c_int) -> (Res, Vec<u32>) {
    let mut v = iovs(bufs);
    // SAFETY: all-zero is a valid mmsghdr.
    let mut m: Vec<libc::mmsghdr> = v.iter().map(|_| unsafe { mem::zeroed() }).collect();
    for (m, v) in m.iter_mut().zip(&mut v) {
        m.msg_hdr.msg_iov = v;
        m.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the headers point to live, exclusive buffers; no time-out.
    let r = res(unsafe { libc::recvmmsg(fd, m.as_mut_ptr(), m.len() as _, flags as _, ptr::null_mut()) });
    (r, m.iter().map(|m| m.msg_len).collect())
}

pub fn sendfile(out: i32, file: i32, offset: Option<&mut i64>, n: usize) -> Res {
    let p = offset.map_or(ptr::null_mut(), |o| o as *mut i64);
    // SAFETY: null, or a live offset.
    res(unsafe { libc::sendfile(out, file, p, n) } as i64)
}

pub fn splice(from: i32, to: i32, n: usize, flags: u32) -> Res {
    // SAFETY: null offsets are allowed.
    res(unsafe { libc::splice(from, ptr::null_mut(), to, ptr::null_mut(), n, flags) } as i64)
}

pub fn open(path: &std::ffi::CStr) -> Res {
    // SAFETY: NUL-terminated.
    res(unsafe { libc::open(path.as_ptr(), libc::O_RDWR) })
}

/// Sets RLIMIT_NOFILE, soft and hard.
pub fn nofile(n: u64) {
    let l = libc::rlimit { rlim_cur: n, rlim_max: n };
    // SAFETY: a live structure.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &l) }, 0, "setrlimit");
}

/// Sets RLIMIT_NOFILE, soft only; what it was.
pub fn nofile_for_now(n: u64) -> u64 {
    let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a live structure.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut l) }, 0, "getrlimit");
    let was = std::mem::replace(&mut l.rlim_cur, n);
    // SAFETY: a live structure.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &l) }, 0, "setrlimit");
    was
}

pub fn pipe() -> [i32; 2] {
    let mut p = [0; 2];
    // SAFETY: room for two fds.
    assert_eq!(unsafe { libc::pipe2(p.as_mut_ptr(), libc::O_CLOEXEC) }, 0, "pipe");
    p
}

pub fn unix_pair(ty: c_int) -> [i32; 2] {
    let mut p = [0; 2];
    // SAFETY: room for two fds.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, ty, 0, p.as_mut_ptr()) }, 0, "socketpair");
    p
}

pub fn setsockopt(fd: i32, level: c_int, name: c_int, v: c_int) -> Res {
    // SAFETY: an int and its size.
    res(unsafe { libc::setsockopt(fd, level, name, (&raw const v).cast(), 4) })
}

pub fn getsockopt(fd: i32, level: c_int, name: c_int) -> Res {
    let (mut v, mut l) = (0i32, 4u32);
    // SAFETY: an int and its size.
    res(unsafe { libc::getsockopt(fd, level, name, (&raw mut v).cast(), &mut l) }).map(|_| i64::from(v))
}

/// The pending error, which the call clears, by name.
pub fn so_error(fd: i32) -> String {
    match getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR) {
        Ok(e) => errno_name(e as i32),
        Err(e) => format!("getsockopt: {}", errno_name(e)),
    }
}

pub fn set_linger(fd: i32, on: bool, secs: c_int) -> Res {
    let v = libc::linger { l_onoff: c_int::from(on), l_linger: secs };
    let n = size_of_val(&v) as _;
    // SAFETY: a linger and its size.
    res(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const v).cast(), n) })
}

pub fn get_linger(fd: i32) -> (i32, i32) {
    let mut v = libc::linger { l_onoff: -1, l_linger: -1 };
    let mut n = size_of_val(&v) as _;
    // SAFETY: a linger and its size.
    unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw mut v).cast(), &mut n) };
    (v.l_onoff, v.l_linger)
}

pub fn set_timeout(fd: i32, name: c_int, t: Duration) -> Res {
    let v = libc::timeval { tv_sec: t.as_secs() as _, tv_usec: t.subsec_micros() as _ };
    let n = size_of_val(&v) as _;
    // SAFETY: a timeval and its size.
    res(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const v).cast(), n) })
}

pub fn tcp_info(fd: i32) -> Result<libc::tcp_info, i32> {
    // SAFETY: all-zero is a valid tcp_info.
    let mut v: libc::tcp_info = unsafe { mem::zeroed() };
    let mut n = size_of_val(&v) as _;
    // SAFETY: a tcp_info and its size.
    res(unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut v).cast(), &mut n) })
        .map(|_| v)
}

pub fn ioctl(fd: i32, req: libc::c_ulong, v: c_int) -> Result<c_int, i32> {
    let mut v = v;
    // SAFETY: the requests used here read or write one int.
    res(unsafe { libc::ioctl(fd, req, &mut v) }).map(|_| v)
}

/// Bytes that can be read at once.
pub fn fionread(fd: i32) -> Result<c_int, i32> {
    ioctl(fd, libc::FIONREAD, -1)
}

pub fn fcntl(fd: i32, cmd: c_int, arg: c_int) -> Res {
    // SAFETY: commands with an int argument only.
    res(unsafe { libc::fcntl(fd, cmd, arg) })
}

pub fn set_nonblocking(fd: i32, on: bool) {
    let f = fcntl(fd, libc::F_GETFL, 0).expect("F_GETFL") as c_int;
    let f = if on { f | libc::O_NONBLOCK } else { f & !libc::O_NONBLOCK };
    fcntl(fd, libc::F_SETFL, f).expect("F_SETFL");
}

pub fn dup(fd: i32) -> Res {
    // SAFETY: no pointers.
    res(unsafe { libc::dup(fd) })
}

pub fn dup2(fd: i32, to: i32) -> Res {
    // SAFETY: scenarios own the fd that is replaced.
    res(unsafe { libc::dup2(fd, to) })
}

pub fn dup3(fd: i32, to: i32, flags: c_int) -> Res {
    // SAFETY: scenarios own the fd that is replaced.
    res(unsafe { libc::dup3(fd, to, flags) })
}

pub fn close_range_flags(from: u32, to: u32, flags: u32) -> Res {
    // SAFETY: no pointers; the scenario owns what it closes.
    res(unsafe { libc::close_range(from, to, flags as c_int) })
}

pub fn close_range(from: u32, to: u32) -> Res {
    // SAFETY: only used in a child that owns nothing above `from`.
    res(unsafe { libc::close_range(from, to, 0) })
}

/// poll(2) on one fd: the revents, 0 for a time-out.
pub fn poll1(fd: i32, events: i16, timeout_ms: c_int) -> Result<i16, i32> {
    let mut p = [libc::pollfd { fd, events, revents: 0 }];
    poll(&mut p, timeout_ms).map(|_| p[0].revents)
}

pub fn poll(p: &mut [libc::pollfd], timeout_ms: c_int) -> Res {
    // SAFETY: a live array of this length.
    res(unsafe { libc::poll(p.as_mut_ptr(), p.len() as _, timeout_ms) })
}

fn timespec(t: Duration) -> libc::timespec {
    libc::timespec { tv_sec: t.as_secs() as _, tv_nsec: t.subsec_nanos() as _ }
}

pub fn ppoll(p: &mut [libc::pollfd], t: Duration, mask: Option<&libc::sigset_t>) -> Res {
    let t = timespec(t);
    let m = mask.map_or(ptr::null(), |m| m as *const _);
    // SAFETY: a live array of this length, a live time and mask.
    res(unsafe { libc::ppoll(p.as_mut_ptr(), p.len() as _, &t, m) })
}

/// Three fd sets, as bits after the call.
pub struct Sets {
    pub read: bool,
    pub write: bool,
    pub except: bool,
}

fn fd_set(fd: i32) -> libc::fd_set {
    // SAFETY: all-zero is an empty set; scenario fds are below FD_SETSIZE.
    unsafe {
        let mut s: libc::fd_set = mem::zeroed();
        libc::FD_SET(fd, &mut s);
        s
    }
}

/// select(2), or pselect(2), for all three conditions of one fd.
pub fn select1(fd: i32, t: Duration, p: bool) -> (Res, Sets) {
    let (mut r, mut w, mut e) = (fd_set(fd), fd_set(fd), fd_set(fd));
    let rc = if p {
        let t = timespec(t);
        // SAFETY: live sets and time.
        unsafe { libc::pselect(fd + 1, &mut r, &mut w, &mut e, &t, ptr::null()) }
    } else {
        let mut t = libc::timeval { tv_sec: t.as_secs() as _, tv_usec: t.subsec_micros() as _ };
        // SAFETY: live sets and time.
        unsafe { libc::select(fd + 1, &mut r, &mut w, &mut e, &mut t) }
    };
    // SAFETY: live sets.
    let s = unsafe {
        Sets { read: libc::FD_ISSET(fd, &r), write: libc::FD_ISSET(fd, &w), except: libc::FD_ISSET(fd, &e) }
    };
    (res(rc), s)
}

/// select(2) for reading on many fds: the ready ones, and what is left of the time.
pub fn select_read(fds: &[i32], t: Duration) -> (Res, Vec<i32>, Duration) {
    // SAFETY: all-zero is an empty set.
    let mut r: libc::fd_set = unsafe { mem::zeroed() };
    for &fd in fds {
        // SAFETY: scenario fds are below FD_SETSIZE.
        unsafe { libc::FD_SET(fd, &mut r) };
    }
    let mut t = libc::timeval { tv_sec: t.as_secs() as _, tv_usec: t.subsec_micros() as _ };
    let max = fds.iter().max().map_or(0, |m| m + 1);
    // SAFETY: a live set and time.
    let rc = res(unsafe { libc::select(max, &mut r, ptr::null_mut(), ptr::null_mut(), &mut t) });
    // SAFETY: a live set.
    let ready = fds.iter().copied().filter(|&fd| unsafe { libc::FD_ISSET(fd, &r) }).collect();
    (rc, ready, Duration::from_micros(t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64))
}

pub fn epoll_create() -> i32 {
    // SAFETY: no pointers.
    res(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).expect("epoll_create1") as i32
}

pub fn epoll_ctl(ep: i32, op: c_int, fd: i32, events: u32, data: u64) -> Res {
    let mut e = libc::epoll_event { events, u64: data };
    // SAFETY: a live event.
    res(unsafe { libc::epoll_ctl(ep, op, fd, &mut e) })
}

pub fn epoll_add(ep: i32, fd: i32, events: c_int, data: u64) {
    epoll_ctl(ep, libc::EPOLL_CTL_ADD, fd, events as u32, data).expect("EPOLL_CTL_ADD");
}

/// epoll_wait(2): (data, events) in ascending order of data.
pub fn epoll_wait(ep: i32, max: usize, timeout_ms: c_int) -> Result<Vec<(u64, u32)>, i32> {
    let mut e = vec![libc::epoll_event { events: 0, u64: 0 }; max];
    // SAFETY: room for `max` events.
    epolled(unsafe { libc::epoll_wait(ep, e.as_mut_ptr(), max as _, timeout_ms) }, &e)
}

pub fn epoll_pwait(ep: i32, timeout_ms: c_int, mask: &libc::sigset_t) -> Result<Vec<(u64, u32)>, i32> {
    let mut e = vec![libc::epoll_event { events: 0, u64: 0 }; 64];
    // SAFETY: room for 64 events, a live mask.
    epolled(unsafe { libc::epoll_pwait(ep, e.as_mut_ptr(), 64, timeout_ms, mask) }, &e)
}

fn epolled(r: c_int, e: &[libc::epoll_event]) -> Result<Vec<(u64, u32)>, i32> {
    let n = res(r)? as usize;
    let mut v: Vec<_> = e[..n].iter().map(|e| (e.u64, e.events)).collect();
    v.sort_unstable();
    Ok(v)
}

/// poll and epoll events by name (the numbers are the same).
pub fn events(e: u32) -> String {
    let names: &[(c_int, &str)] = &[
        (libc::EPOLLIN, "IN"),
        (libc::EPOLLPRI, "PRI"),
        (libc::EPOLLOUT, "OUT"),
        (libc::EPOLLERR, "ERR"),
        (libc::EPOLLHUP, "HUP"),
        (libc::EPOLLRDHUP, "RDHUP"),
        (i32::from(libc::POLLNVAL), "NVAL"),
        (libc::EPOLLRDNORM, "RDNORM"),
        (libc::EPOLLWRNORM, "WRNORM"),
        (libc::EPOLLRDBAND, "RDBAND"),
        (libc::EPOLLWRBAND, "WRBAND"),
    ];
    let v: Vec<_> = names.iter().filter(|(b, _)| e & *b as u32 != 0).map(|n| n.1).collect();
    if v.is_empty() { "-".into() } else { v.join("|") }
}

pub fn show_poll(r: Result<i16, i32>) -> String {
    r.map_or_else(errno_name, |e| events(e as u16 as u32))
}

/// `data:EVENTS ...` as epoll_wait gave them.
pub fn show_epoll(r: Result<Vec<(u64, u32)>, i32>) -> String {
    match r {
        Err(e) => errno_name(e),
        Ok(v) if v.is_empty() => "none".into(),
        Ok(v) => v.iter().fold(String::new(), |mut s, (d, e)| {
            let _ = write!(s, "{}{d}:{}", if s.is_empty() { "" } else { " " }, events(*e));
            s
        }),
    }
}

/// Where the transcript goes: stdout, or in a child the pipe that its parent's `wait` empties.
pub static LOG_FD: AtomicI32 = AtomicI32::new(1);

/// The reading ends of our children's transcripts.
static CHILDREN: Mutex<Vec<(i32, i32)>> = Mutex::new(Vec::new());

/// fork(2) whose child runs `f` and exits with its value, by exit(3) so that at-exit work is done.
///
/// What the child logs stands in the transcript where its parent waits for it, whatever the order of events.
pub fn fork(f: impl FnOnce() -> i32) -> i32 {
    let p = pipe();
    set_nonblocking(p[0], true);
    // SAFETY: the child runs only code that works after fork: libc calls and the allocator.
    match res(unsafe { libc::fork() }).expect("fork") {
        0 => {
            let _ = close(p[0]);
            LOG_FD.store(p[1], Ordering::Relaxed);
            let code = f();
            // SAFETY: no pointers.
            unsafe { libc::exit(code) }
        }
        pid => {
            let _ = close(p[1]);
            CHILDREN.lock().expect("no panic under it").push((pid as i32, p[0]));
            pid as i32
        }
    }
}

/// Waits for a child: `exit N` or `signal N`, after its transcript.
pub fn wait(pid: i32) -> String {
    let mut st = 0;
    while let Err(e) = {
        // SAFETY: a live status.
        res(unsafe { libc::waitpid(pid, &mut st, 0) })
    } {
        if e != libc::EINTR {
            return errno_name(e);
        }
    }
    let mut children = CHILDREN.lock().expect("no panic under it");
    if let Some(i) = children.iter().position(|c| c.0 == pid) {
        let (_, log) = children.swap_remove(i);
        let mut b = vec![0; 1 << 16];
        while let Ok(n @ 1..) = read(log, &mut b) {
            let _ = write(LOG_FD.load(Ordering::Relaxed), &b[..n as usize]);
        }
        let _ = close(log);
    }
    if libc::WIFEXITED(st) {
        format!("exit {}", libc::WEXITSTATUS(st))
    } else {
        format!("signal {}", libc::WTERMSIG(st))
    }
}

pub fn kill(pid: i32, sig: c_int) {
    // SAFETY: no pointers; only children and ourselves are named.
    res(unsafe { libc::kill(pid, sig) }).expect("kill");
}

/// Sets a handler; `flags` as SA_RESTART.
pub fn on_signal(sig: c_int, handler: extern "C" fn(c_int), flags: c_int) {
    // SAFETY: all-zero is a valid sigaction with an empty mask.
    let mut a: libc::sigaction = unsafe { mem::zeroed() };
    a.sa_sigaction = handler as *const () as usize;
    a.sa_flags = flags;
    // SAFETY: a live action whose handler lives for ever.
    res(unsafe { libc::sigaction(sig, &a, ptr::null_mut()) }).expect("sigaction");
}

/// The default action again.
pub fn default_signal(sig: c_int) {
    // SAFETY: no pointers.
    unsafe { libc::signal(sig, libc::SIG_DFL) };
}

/// A mask of one signal.
pub fn sigset(sig: c_int) -> libc::sigset_t {
    // SAFETY: all-zero is a valid set and both calls fill it.
    unsafe {
        let mut s: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut s);
        libc::sigaddset(&mut s, sig);
        s
    }
}

pub fn mask_signal(how: c_int, sig: c_int) {
    let s = sigset(sig);
    // SAFETY: a live set.
    unsafe { libc::pthread_sigmask(how, &s, ptr::null_mut()) };
}

/// This thread, for `signal_thread`.
pub fn this_thread() -> u64 {
    // SAFETY: no pointers.
    unsafe { libc::pthread_self() as u64 }
}

pub fn signal_thread(t: u64, sig: c_int) {
    // SAFETY: the thread is alive: scenarios join it later.
    unsafe { libc::pthread_kill(t as libc::pthread_t, sig) };
}

pub fn sleep_ms(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// Runs `f` and says whether it took at least `ms` (a little less is granted: kernel ticks).
pub fn took_at_least<T>(ms: u64, f: impl FnOnce() -> T) -> (T, bool) {
    let t = Instant::now();
    let r = f();
    (r, t.elapsed() + Duration::from_millis(ms / 20 + 1) >= Duration::from_millis(ms))
}

pub fn is_socket(fd: i32) -> bool {
    // SAFETY: all-zero is a valid stat, which the call fills.
    unsafe {
        let mut s: libc::stat = mem::zeroed();
        libc::fstat(fd, &mut s) == 0 && s.st_mode & libc::S_IFMT == libc::S_IFSOCK
    }
}

/// Direct system calls, behind libc's back.
pub fn syscall_write(fd: i32, b: &[u8]) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::syscall(libc::SYS_write, fd, b.as_ptr(), b.len()) })
}

pub fn syscall_read(fd: i32, b: &mut [u8]) -> Res {
    // SAFETY: the buffer is live and this long.
    res(unsafe { libc::syscall(libc::SYS_read, fd, b.as_mut_ptr(), b.len()) })
}

/// A system call by an instruction of the program's own, of which no library knows: the result, or minus errno.
///
/// # Safety
/// As for the call.
pub unsafe fn by_instruction(nr: i64, a: [usize; 6]) -> i64 {
    let r: i64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as the caller vouches; the kernel changes these registers, and memory as the call does.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") nr => r,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "svc #0",
            in("x8") nr,
            inlateout("x0") a[0] as i64 => r,
            in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
            options(nostack)
        );
    }
    r
}
