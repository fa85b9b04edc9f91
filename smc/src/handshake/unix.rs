//! The kernel calls of the rendezvous: abstract Unix sockets, passed descriptors, and who a peer is.
//!
//! The hard idea is trust. Anybody in the network namespace may bind an abstract name or connect to one, so
//! finding somebody there proves nothing. The kernel knows two things that can't be forged: the credentials
//! of a Unix socket's peer (`SO_PEERCRED`), and, by `sock_diag`, which user owns a TCP socket of this
//! namespace. [`tcp_owner`] asks for the second with the exact 4-tuple.
//!
//! Every call here is made with `MSG_DONTWAIT` or on a non-blocking socket: nothing waits. Errors are errno
//! values.

#![allow(unsafe_code)]

use crate::{fd::Fd, rawcall};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const NONBLOCK: i32 = libc::SOCK_NONBLOCK;
const CLOEXEC: i32 = libc::SOCK_CLOEXEC;

/// `AF_INET` and friends where the kernel wants bytes.
const INET: u8 = libc::AF_INET as u8;
const INET6: u8 = libc::AF_INET6 as u8;

/// Runs a call again while a signal interrupts it. Bounded, since nothing here may hang; calls that do not
/// wait are not interrupted in practice.
fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, i32>) -> Result<T, i32> {
    for _ in 0..16 {
        match call() {
            Err(libc::EINTR) => {}
            done => return done,
        }
    }
    Err(libc::EAGAIN)
}

/// An abstract Unix socket address.
#[derive(Clone)]
pub struct Name {
    addr: libc::sockaddr_un,
    len: usize,
}

impl Name {
    /// The rendezvous name of a TCP connection: the connecting end's address first.
    #[must_use]
    pub fn of(connecting: SocketAddr, accepting: SocketAddr) -> Name {
        Name::new(&format!("libsmc.1.{}.{}", hex(connecting), hex(accepting)))
    }

    fn new(text: &str) -> Name {
        // SAFETY: `sockaddr_un` is plain integers, for which all-zero is a value.
        let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        addr.sun_family = libc::AF_UNIX as u16;
        // Byte 0 stays 0: an abstract name, which lives and dies with its socket.
        let room = addr.sun_path.iter_mut().skip(1);
        let used = room.zip(text.bytes()).map(|(to, from)| *to = from as libc::c_char).count();
        Name { addr, len: std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + used }
    }
}

fn hex(a: SocketAddr) -> String {
    match a.ip() {
        IpAddr::V4(ip) => format!("{:08x}-{:04x}", u32::from(ip), a.port()),
        IpAddr::V6(ip) => format!("{:032x}-{:04x}", u128::from(ip), a.port()),
    }
}

/// A Unix stream socket; non-blocking, since connect() on a blocking one may wait for room in the backlog.
fn stream(base: i32) -> Result<Fd, i32> {
    let kind = libc::SOCK_STREAM | CLOEXEC | NONBLOCK;
    // SAFETY: socket() takes integers.
    let fd = unsafe { rawcall!(libc::SYS_socket, libc::AF_UNIX, kind, 0) }?;
    Fd::from_raw(fd as i32).raise(base)
}

/// A non-blocking listener at `name`.
pub fn listen(name: &Name, base: i32) -> Result<Fd, i32> {
    let fd = stream(base)?;
    // SAFETY: bind reads `len` bytes of the address, which `name` holds.
    unsafe { rawcall!(libc::SYS_bind, fd.raw(), &raw const name.addr, name.len) }?;
    // SAFETY: listen takes integers. The backlog leaves room for strangers beside the one peer.
    unsafe { rawcall!(libc::SYS_listen, fd.raw(), 16) }?;
    Ok(fd)
}

/// The next connection in the queue, in blocking mode; `EAGAIN` if there is none.
pub fn accept(listener: &Fd, base: i32) -> Result<Fd, i32> {
    // SAFETY: accept4 without an address writes nothing.
    let fd = uninterrupted(|| unsafe { rawcall!(libc::SYS_accept4, listener.raw(), 0, 0, CLOEXEC) })?;
    Fd::from_raw(fd as i32).raise(base)
}

/// A socket for [`connect`]. No descriptors come this way.
pub fn connector(base: i32) -> Result<Fd, i32> {
    let fd = stream(base)?;
    refuse_fds(&fd);
    Ok(fd)
}

/// From now on the peer can send no descriptors (Linux 6.16). Before that those that nobody asks for are closed by
/// the kernel, in our thread, and to close what a stranger has made may take long.
pub fn refuse_fds(fd: &Fd) {
    const SO_PASSRIGHTS: i32 = 83;
    let off = 0i32;
    let (p, len) = (&raw const off, size_of::<i32>());
    // SAFETY: setsockopt reads one int. Kernels that do not know the option say so, and nothing has changed.
    let _ = unsafe { rawcall!(libc::SYS_setsockopt, fd.raw(), libc::SOL_SOCKET, SO_PASSRIGHTS, p, len) };
}

/// Connects to `name`; may be tried again on the same socket after an error.
pub fn connect(fd: &Fd, name: &Name) -> Result<(), i32> {
    // SAFETY: connect reads `len` bytes of the address, which `name` holds.
    uninterrupted(|| unsafe { rawcall!(libc::SYS_connect, fd.raw(), &raw const name.addr, name.len) })
        .map(drop)
}

/// Ends both directions. What arrived before can still be received; nothing more can be sent by either end.
pub fn shutdown(fd: &Fd) {
    // SAFETY: shutdown takes integers.
    let _ = unsafe { rawcall!(libc::SYS_shutdown, fd.raw(), libc::SHUT_RDWR) };
}

/// A socket option that is a plain structure of integers.
fn option<T: Copy + Default>(fd: i32, name: i32) -> Result<T, i32> {
    let mut value = T::default();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: getsockopt writes at most `len` bytes into `value` and one socklen_t into `len`; T is made of
    // integers by the callers below, for which every byte pattern is a value.
    unsafe { rawcall!(libc::SYS_getsockopt, fd, libc::SOL_SOCKET, name, &raw mut value, &raw mut len) }?;
    if len as usize == size_of::<T>() { Ok(value) } else { Err(libc::EINVAL) }
}

/// Who is at the other end of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cred {
    /// Process id; 0 if it is in a process namespace that we can't see.
    pub pid: i32,
    /// User.
    pub uid: u32,
}

/// `SO_PEERCRED`: who connected, or who called listen().
pub fn peer_cred(fd: &Fd) -> Result<Cred, i32> {
    // struct ucred: pid, uid, gid.
    let [pid, uid, _gid] = option::<[u32; 3]>(fd.raw(), libc::SO_PEERCRED)?;
    Ok(Cred { pid: pid as i32, uid })
}

/// What the kernel says for users that have no number in our user namespace (`/proc/sys/kernel/overflowuid`).
const OVERFLOW_UID: u32 = 65534;

/// Whether `uid` may be several users: all those whom our user namespace does not know.
#[must_use]
pub fn stands_for_many(uid: u32) -> bool {
    uid == OVERFLOW_UID && !uid_map().is_some_and(|map| knows_everybody(&map))
}

/// `/proc/self/uid_map`; where there is no /proc nobody can say.
fn uid_map() -> Option<[u8; 128]> {
    let path = c"/proc/self/uid_map".as_ptr();
    // SAFETY: the path is a NUL-terminated string that outlives the call, which only reads it.
    let fd = unsafe { rawcall!(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDONLY | libc::O_CLOEXEC) };
    let fd = Fd::from_raw(fd.ok()? as i32);
    let mut text = [0u8; 128];
    // SAFETY: read writes at most 128 bytes, which `text` has.
    uninterrupted(|| unsafe { rawcall!(libc::SYS_read, fd.raw(), text.as_mut_ptr(), text.len()) }).ok()?;
    Some(text)
}

/// Whether a uid_map is the one of the first user namespace: every number is that user.
fn knows_everybody(map: &[u8]) -> bool {
    let words = map.split(|b| b.is_ascii_whitespace() || *b == 0).filter(|w| !w.is_empty());
    words.eq([b"0".as_slice(), b"0", b"4294967295"])
}

/// `SO_COOKIE`: the kernel's number for a socket, unique while the system runs.
pub fn cookie(fd: i32) -> Result<u64, i32> {
    option(fd, libc::SO_COOKIE)
}

/// `getsockname`, with IPv4 in IPv6 made IPv4.
pub fn local_addr(fd: i32) -> Result<SocketAddr, i32> {
    address(fd, libc::SYS_getsockname)
}

/// `getpeername`, with IPv4 in IPv6 made IPv4.
pub fn peer_addr(fd: i32) -> Result<SocketAddr, i32> {
    address(fd, libc::SYS_getpeername)
}

fn address(fd: i32, call: libc::c_long) -> Result<SocketAddr, i32> {
    // struct sockaddr_in6 is the larger: family(2) port(2) flowinfo(4) addr(16) scope(4);
    // struct sockaddr_in: family(2) port(2) addr(4).
    let mut raw = [0u8; 28];
    let mut len = raw.len() as libc::socklen_t;
    // SAFETY: both calls write at most `len` bytes to `raw` and the true length to `len`.
    unsafe { rawcall!(call, fd, raw.as_mut_ptr(), &raw mut len) }?;
    let [f0, f1, p0, p1, rest @ ..] = raw;
    let port = u16::from_be_bytes([p0, p1]);
    let ip = match (i32::from(u16::from_ne_bytes([f0, f1])), rest.first_chunk(), rest[4..].first_chunk()) {
        (libc::AF_INET, Some(v4), _) => IpAddr::V4(Ipv4Addr::from(*v4 as [u8; 4])),
        (libc::AF_INET6, _, Some(v6)) => IpAddr::V6(Ipv6Addr::from(*v6 as [u8; 16])).to_canonical(),
        _ => return Err(libc::EAFNOSUPPORT),
    };
    Ok(SocketAddr::new(ip, port))
}

/// Room for descriptors in one control message. More than any message of ours carries, so that a peer which
/// sends too many is noticed; what does not fit is closed by the kernel.
const MAX_FDS: usize = 4;
/// `CMSG_LEN(0)` on 64-bit Linux: length (8), level (4), type (4).
const CMSG_HEAD: usize = 16;

/// Control data, aligned as `struct cmsghdr` is.
#[repr(C, align(8))]
struct Control([u8; CMSG_HEAD + 4 * MAX_FDS]);

/// Sends what the socket takes now, `fd` with its first byte. `EAGAIN`: nothing was taken.
pub fn send(sock: &Fd, bytes: &[u8], fd: Option<&Fd>) -> Result<usize, i32> {
    let mut control = Control([0; CMSG_HEAD + 4 * MAX_FDS]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: `msghdr` is integers and pointers, for which all-zero is a value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if let Some(fd) = fd {
        let len = CMSG_HEAD + 4;
        control.0[..8].copy_from_slice(&(len as u64).to_ne_bytes());
        control.0[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        control.0[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
        control.0[16..20].copy_from_slice(&fd.raw().to_ne_bytes());
        msg.msg_control = control.0.as_mut_ptr().cast();
        msg.msg_controllen = len as _;
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: sendmsg reads the message header, the bytes and the control data, all of which outlive the call.
    uninterrupted(|| unsafe { rawcall!(libc::SYS_sendmsg, sock.raw(), &raw const msg, flags) })
}

/// Receives up to `bytes.len()` bytes; passed descriptors are added to `fds`. `Ok(0)`: end of stream.
/// `EAGAIN`: nothing there now. `EMSGSIZE`: more descriptors came than there is room for.
pub fn recv(sock: &Fd, bytes: &mut [u8], fds: &mut Vec<Fd>) -> Result<usize, i32> {
    let mut control = Control([0; CMSG_HEAD + 4 * MAX_FDS]);
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: `msghdr` is integers and pointers, for which all-zero is a value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = control.0.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: recvmsg writes into the bytes, the control data and the header, within the lengths given, all of
    // which outlive the call.
    let n = uninterrupted(|| unsafe { rawcall!(libc::SYS_recvmsg, sock.raw(), &raw mut msg, flags) })?;
    let controls = control.0.get(..msg.msg_controllen as usize).unwrap_or_default();
    collect_fds(controls, fds);
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(libc::EMSGSIZE);
    }
    Ok(n)
}

/// Takes over every descriptor in the control data of a successful recvmsg.
fn collect_fds(mut controls: &[u8], fds: &mut Vec<Fd>) {
    while let Some((head, rest)) = controls.split_first_chunk::<CMSG_HEAD>() {
        let word = |at: usize| head.get(at..at + 4).and_then(|w| w.try_into().ok()).map(i32::from_ne_bytes);
        let len = head.first_chunk().map_or(0, |l| u64::from_ne_bytes(*l)) as usize;
        let data = rest.get(..len.saturating_sub(CMSG_HEAD)).unwrap_or_default();
        if (word(8), word(12)) == (Some(libc::SOL_SOCKET), Some(libc::SCM_RIGHTS)) {
            let numbers = data.chunks_exact(4).filter_map(|w| w.try_into().ok()).map(i32::from_ne_bytes);
            fds.extend(numbers.map(Fd::from_raw));
        }
        let step = len.max(CMSG_HEAD).next_multiple_of(8);
        controls = controls.get(step..).unwrap_or_default();
    }
}

/// A TCP socket of this network namespace, as `sock_diag` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpOwner {
    /// The user who made the socket.
    pub uid: u32,
    /// Its `SO_COOKIE`.
    pub cookie: u64,
    /// Whether it is in state ESTABLISHED.
    pub established: bool,
    /// Whether a file leads to it.
    pub held: bool,
}

/// Who owns the TCP socket whose own address is `local` and whose peer is `peer`. `Ok(None)`: there is none
/// with exactly these addresses. A socket bound to a device is not found.
pub fn tcp_owner(local: SocketAddr, peer: SocketAddr) -> Result<Option<TcpOwner>, i32> {
    look_up(&netlink()?, local, peer, 0)
}

/// Whether a file leads to the TCP socket whose own address is `local` and whose peer is `peer`. The end of the
/// stream from there having come, false says that it was closed, or that its holder has died.
///
/// close(2) sends FIN or RST and after that lets go of the file, both under the socket's lock (`__tcp_close`).
/// INET_DIAG_INFO takes that lock, but the file is looked at first (`inet_sk_diag_fill`): so who has seen the FIN asks
/// twice, and the second answer holds.
pub fn tcp_is_held(local: SocketAddr, peer: SocketAddr) -> Result<bool, i32> {
    let netlink = netlink()?;
    let _ = look_up(&netlink, local, peer, WITH_INFO)?;
    Ok(look_up(&netlink, local, peer, 0)?.is_some_and(|o| o.held))
}

fn netlink() -> Result<Fd, i32> {
    let kind = libc::SOCK_RAW | CLOEXEC;
    // SAFETY: socket() takes integers.
    let fd = unsafe { rawcall!(libc::SYS_socket, libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) }?;
    Ok(Fd::from_raw(fd as i32))
}

fn look_up(netlink: &Fd, local: SocketAddr, peer: SocketAddr, more: u8) -> Result<Option<TcpOwner>, i32> {
    if local.is_ipv6() {
        return ask(netlink, INET6, local, peer, more);
    }
    // An IPv4 connection may be held by an AF_INET6 socket with mapped addresses. Linux finds it under AF_INET
    // all the same; the other family is asked as well, in case a kernel sees that differently.
    match ask(netlink, INET, local, peer, more) {
        Ok(None) => Ok(ask(netlink, INET6, local, peer, more).unwrap_or(None)),
        found => found,
    }
}

const NLMSG_HEAD: usize = 16;
const REQUEST: usize = NLMSG_HEAD + 56;
/// `SOCK_DIAG_BY_FAMILY`, `NLM_F_REQUEST`, `NLMSG_ERROR`.
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const TCP_ESTABLISHED: u8 = 1;
/// `1 << (INET_DIAG_INFO - 1)`.
const WITH_INFO: u8 = 2;

fn ask(
    netlink: &Fd,
    family: u8,
    local: SocketAddr,
    peer: SocketAddr,
    more: u8,
) -> Result<Option<TcpOwner>, i32> {
    let request = diag_request(family, local, peer, more);
    let send_to = |bytes: &[u8]| {
        let (p, n, flags) = (bytes.as_ptr(), bytes.len(), libc::MSG_DONTWAIT);
        // SAFETY: sendto reads `n` bytes; without an address it goes to the kernel.
        unsafe { rawcall!(libc::SYS_sendto, netlink.raw(), p, n, flags, 0, 0) }
    };
    uninterrupted(|| send_to(&request))?;
    // The kernel answers while it handles the request, so the answer is there.
    let mut reply = [0u8; 1024];
    let (p, room, flags) = (reply.as_mut_ptr(), reply.len(), libc::MSG_DONTWAIT);
    // SAFETY: recvfrom writes at most `room` bytes at `p`.
    let n = uninterrupted(|| unsafe { rawcall!(libc::SYS_recvfrom, netlink.raw(), p, room, flags, 0, 0) })?;
    parse_diag(reply.get(..n).unwrap_or_default(), local, peer)
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`, for one exact 4-tuple.
fn diag_request(family: u8, local: SocketAddr, peer: SocketAddr, more: u8) -> [u8; REQUEST] {
    let mut r = [0u8; REQUEST];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(to) = r.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(0, &(REQUEST as u32).to_ne_bytes());
    put(4, &BY_FAMILY.to_ne_bytes());
    put(6, &NLM_F_REQUEST.to_ne_bytes());
    put(8, &1u32.to_ne_bytes()); // sequence
    put(16, &[family, libc::IPPROTO_TCP as u8, more, 0]);
    put(20, &u32::MAX.to_ne_bytes()); // any state
    put(24, &local.port().to_be_bytes());
    put(26, &peer.port().to_be_bytes());
    put(28, &diag_address(family, local.ip()));
    put(44, &diag_address(family, peer.ip()));
    put(64, &[0xff; 8]); // INET_DIAG_NOCOOKIE
    r
}

fn diag_address(family: u8, ip: IpAddr) -> [u8; 16] {
    match (family, ip) {
        (INET6, IpAddr::V4(ip)) => ip.to_ipv6_mapped().octets(),
        (_, IpAddr::V6(ip)) => ip.octets(),
        (_, IpAddr::V4(ip)) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
    }
}

/// What sock_diag answers: `struct nlmsghdr` and `struct inet_diag_msg`, or an error. Public for the fuzzer.
pub fn parse_diag(reply: &[u8], local: SocketAddr, peer: SocketAddr) -> Result<Option<TcpOwner>, i32> {
    fn at<const N: usize>(reply: &[u8], at: usize) -> Result<[u8; N], i32> {
        reply.get(at..).and_then(|r| r.first_chunk::<N>()).copied().ok_or(libc::EPROTO)
    }
    let kind = u16::from_ne_bytes(at(reply, 4)?);
    if kind == NLMSG_ERROR {
        return match i32::from_ne_bytes(at(reply, NLMSG_HEAD)?).wrapping_neg() {
            libc::ENOENT => Ok(None),
            e => Err(e),
        };
    }
    if kind != BY_FAMILY {
        return Err(libc::EPROTO);
    }
    let [family, state, ..] = at::<4>(reply, 16)?;
    let ports = (u16::from_be_bytes(at(reply, 20)?), u16::from_be_bytes(at(reply, 22)?));
    let exact = ports == (local.port(), peer.port())
        && same(family, at(reply, 24)?, local.ip())
        && same(family, at(reply, 40)?, peer.ip());
    // Without a connection of these addresses the kernel finds a listener, which is nobody's other end.
    Ok(exact.then_some(TcpOwner {
        cookie: u64::from(u32::from_ne_bytes(at(reply, 60)?))
            | u64::from(u32::from_ne_bytes(at(reply, 64)?)) << 32,
        uid: u32::from_ne_bytes(at(reply, 80)?),
        established: state == TCP_ESTABLISHED,
        held: u32::from_ne_bytes(at(reply, 84)?) != 0,
    }))
}

fn same(family: u8, raw: [u8; 16], ip: IpAddr) -> bool {
    diag_address(family, ip) == raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{
        net::{TcpListener, TcpStream},
        os::fd::AsRawFd,
    };

    fn pair(at: &str) -> (TcpStream, TcpStream) {
        let l = TcpListener::bind(at).unwrap();
        let c = TcpStream::connect(l.local_addr().unwrap()).unwrap();
        (c, l.accept().unwrap().0)
    }

    #[test]
    fn the_kernel_names_the_other_end() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let (c, a) = pair(at);
            let (l, p) = (local_addr(c.as_raw_fd()).unwrap(), peer_addr(c.as_raw_fd()).unwrap());
            assert_eq!((l, p), (c.local_addr().unwrap(), c.peer_addr().unwrap()));
            let owner = tcp_owner(p, l).unwrap().unwrap();
            assert_eq!(owner.cookie, cookie(a.as_raw_fd()).unwrap());
            assert!(owner.established && owner.held);
            // SAFETY: takes nothing.
            assert_eq!(owner.uid as usize, unsafe { rawcall!(libc::SYS_getuid) }.unwrap());
        }
    }

    #[test]
    fn a_closed_socket_is_held_by_nobody() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let (c, a) = pair(at);
            let (l, p) = (c.local_addr().unwrap(), c.peer_addr().unwrap());
            let other = a.try_clone().unwrap();
            a.shutdown(std::net::Shutdown::Write).unwrap();
            drop(a);
            assert_eq!(tcp_is_held(p, l), Ok(true), "by another descriptor");
            drop(other);
            assert_eq!(tcp_is_held(p, l), Ok(false));
            assert_eq!(tcp_is_held(l, p), Ok(true));
        }
    }

    #[test]
    fn a_listener_is_nobodys_other_end() {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = l.local_addr().unwrap();
        assert_eq!(tcp_owner(here, "127.0.0.1:9".parse().unwrap()), Ok(None));
        assert_eq!(tcp_owner("127.0.0.1:9".parse().unwrap(), "127.0.0.1:9".parse().unwrap()), Ok(None));
        assert_eq!(tcp_owner("[::1]:9".parse().unwrap(), "[::1]:10".parse().unwrap()), Ok(None));
    }

    #[test]
    fn bytes_and_a_descriptor() {
        let name = Name::new("libsmc.test.bytes-and-a-descriptor");
        let listener = listen(&name, 100).unwrap();
        assert!(listener.raw() >= 100);
        assert_eq!(accept(&listener, 100).err(), Some(libc::EAGAIN));
        let a = connector(100).unwrap();
        connect(&a, &name).unwrap();
        let b = accept(&listener, 100).unwrap();
        assert_eq!(peer_cred(&a).unwrap().pid, std::process::id() as i32);
        assert_eq!(peer_cred(&b), peer_cred(&a));
        let mut fds = Vec::new();
        let mut buf = [0; 3];
        assert_eq!(recv(&b, &mut buf, &mut fds), Err(libc::EAGAIN));
        assert_eq!(send(&a, b"hello", Some(&listener)), Ok(5));
        assert_eq!(recv(&b, &mut buf, &mut fds), Ok(3));
        assert_eq!(recv(&b, &mut buf, &mut fds), Ok(2));
        assert_eq!(fds.len(), 1);
        assert_eq!(
            connect(&connector(100).unwrap(), &Name::new("libsmc.test.nobody")),
            Err(libc::ECONNREFUSED)
        );
        shutdown(&a);
        assert_eq!(recv(&b, &mut buf, &mut fds), Ok(0));
        assert_eq!(send(&b, b"x", None), Err(libc::EPIPE));
    }

    #[test]
    fn the_overflow_user_is_nobody_in_particular() {
        assert!(knows_everybody(b"         0          0 4294967295\n\0\0"));
        for map in ["", "0 1000 1", "0 0 4294967294", "0 100000 65536", "0 0 4294967295 1 1 1"] {
            assert!(!knows_everybody(map.as_bytes()), "{map}");
        }
        assert!(!stands_for_many(0) && !stands_for_many(1000));
    }

    #[test]
    fn names_differ_by_every_part_and_fit() {
        let v6: SocketAddr = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
        let name = Name::of(v6, v6);
        assert!(name.len <= size_of::<libc::sockaddr_un>());
        let text: Vec<u8> = name.addr.sun_path.iter().map(|&c| c as u8).collect();
        assert!(
            text.starts_with(b"\0libsmc.1.ffff") && text.windows(6).filter(|w| w == b"f-ffff").count() == 2
        );
    }

    proptest! {
        #[test]
        fn any_reply_is_survived(reply in proptest::collection::vec(any::<u8>(), 0..128)) {
            let here = "127.0.0.1:1".parse().unwrap();
            let _ = parse_diag(&reply, here, here);
        }

        // Numbers no process has open, so that nothing is closed by the values' drop.
        #[test]
        fn any_control_data_is_survived(data in proptest::collection::vec(0x70..0x7fu8, 0..64)) {
            let mut fds = Vec::new();
            collect_fds(&data, &mut fds);
        }
    }
}
