//! Sockets of the kernel's SMC, and what it says of them.
#![allow(dead_code)]

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::FromRawFd;

use crate::world::End;

pub const IPPROTO_SMC: i32 = 256;

fn address(at: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    // SAFETY: numbers, for which zeros are values.
    let mut a: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    a.sin_family = libc::AF_INET as u16;
    a.sin_port = port.to_be();
    a.sin_addr.s_addr = u32::from(at).to_be();
    a
}

fn socket(proto: i32, at: Ipv4Addr) -> io::Result<i32> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, proto) };
    let a = address(at, 0);
    // SAFETY: an address, and its size.
    let rc = unsafe { libc::bind(fd, (&raw const a).cast(), size_of_val(&a) as u32) };
    if fd < 0 || rc < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// A listener of the kernel's SMC.
pub fn listener(at: Ipv4Addr) -> TcpListener {
    let fd = socket(IPPROTO_SMC, at).unwrap();
    // SAFETY: a socket of ours.
    assert_eq!(unsafe { libc::listen(fd, 16) }, 0);
    // SAFETY: as above, and nobody else has it.
    unsafe { TcpListener::from_raw_fd(fd) }
}

/// A connection: TCP's (0), or the kernel's SMC.
pub fn dial(proto: i32, from: &End, to: SocketAddrV4) -> TcpStream {
    let fd = socket(proto, from.address).unwrap();
    let a = address(*to.ip(), to.port());
    // SAFETY: an address, and its size.
    let rc = unsafe { libc::connect(fd, (&raw const a).cast(), size_of_val(&a) as u32) };
    assert_eq!(rc, 0, "{}", io::Error::last_os_error());
    // SAFETY: a socket of ours that nobody else has.
    unsafe { TcpStream::from_raw_fd(fd) }
}

pub fn port_of(l: &TcpListener) -> u16 {
    l.local_addr().unwrap().port()
}

/// What the kernel says a connection is, by its port and the peer's: 0 SMC-R, 1 fallen back, 2 SMC-D.
pub fn mode(port: u16, peer: u16) -> Option<u8> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 4) };
    let mut request = [0u8; 16 + 56];
    let len = request.len() as u32;
    request[0..4].copy_from_slice(&len.to_ne_bytes());
    request[4..6].copy_from_slice(&20u16.to_ne_bytes()); // SOCK_DIAG_BY_FAMILY
    request[6..8].copy_from_slice(&0x301u16.to_ne_bytes()); // request, dump
    request[16] = 43; // AF_SMC
    request[17..20].fill(0);
    // SAFETY: bytes, and how many.
    assert_eq!(unsafe { libc::send(fd, request.as_ptr().cast(), request.len(), 0) }, request.len() as isize);
    let mut found = None;
    'all: loop {
        let mut bytes = vec![0u8; 1 << 16];
        // SAFETY: a buffer, and its size.
        let n = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        let mut rest = &bytes[..usize::try_from(n).unwrap()];
        while rest.len() >= 16 {
            let len = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes(rest[4..6].try_into().unwrap());
            if kind == 3 || kind == 2 {
                break 'all;
            }
            let m = &rest[16..len];
            let ports = [u16::from_be_bytes([m[4], m[5]]), u16::from_be_bytes([m[6], m[7]])];
            if ports == [port, peer] {
                found = Some(m[2]);
            }
            rest = &rest[((len + 3) & !3).min(rest.len())..];
        }
    }
    // SAFETY: a descriptor of ours.
    unsafe { libc::close(fd) };
    found
}
