//! What the service does with a connection's TCP stream: CLC messages at its start, and the end.
//!
//! A message is looked at where it lies, and taken only when it is known to be one: bytes that are none are the
//! program's. Nothing here waits, and nothing takes an error out of the socket that the program is to hear of.

use smc::sys;
use smc::wire::smcr::clc::{self, Decoded, Message};

/// The longest CLC message has fewer bytes.
const MOST: usize = 2048;

/// Up to `n` bytes of what has come, left where they are.
pub fn peek(fd: i32, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n.min(MOST)];
    // Asked for first: of a socket with an error and no bytes, recv(2) would take the error.
    let some = sys::ioctl_int(fd, libc::FIONREAD).is_ok_and(|n| n > 0);
    let n = if some { sys::recv_small(fd, &mut bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT) } else { 0 };
    bytes.truncate(usize::try_from(n).unwrap_or(0));
    bytes
}

/// Takes `n` bytes that were looked at.
pub fn take(fd: i32, n: usize) {
    let mut bytes = vec![0; n];
    let _ = sys::recv_small(fd, &mut bytes, libc::MSG_DONTWAIT);
}

/// Sends a message; false: TCP did not take all of it. At the start of a stream there is room.
#[must_use]
pub fn send(fd: i32, m: &Message) -> bool {
    send_bytes(fd, &clc::encode(m))
}

/// Sends few bytes; false: TCP did not take all of them.
#[must_use]
pub fn send_bytes(fd: i32, bytes: &[u8]) -> bool {
    sys::send_small(fd, bytes, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) == bytes.len() as isize
}

/// What lies at the start of a stream that has gone back to TCP, where a late message may still come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing, or too little to tell.
    Unknown,
    /// A CLC message; it is taken.
    Message,
    /// The program's bytes.
    Program,
}

/// Looks, and takes a late message.
pub fn start(fd: i32) -> Start {
    let bytes = peek(fd, MOST);
    match clc::decode(&bytes) {
        _ if bytes.is_empty() => Start::Unknown,
        Ok(Decoded::NeedTotal(_)) => Start::Unknown,
        Ok(Decoded::Message(_, n)) => {
            take(fd, n);
            Start::Message
        }
        Err(_) => Start::Program,
    }
}

/// Whether the peer's FIN is here.
pub fn has_ended(fd: i32) -> bool {
    let mut p = [libc::pollfd { fd, events: libc::POLLRDHUP, revents: 0 }];
    sys::poll(&mut p, Some(0)) > 0 && p[0].revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Whether a close of the socket would be a reset, as the program has asked for.
pub fn resets_at_close(fd: i32) -> bool {
    let mut l = [0u8; 8];
    sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut l) == Ok(8)
        && l.get(..4).is_some_and(|on| on != [0; 4])
        && l.get(4..) == Some(&[0; 4])
}

/// Resets the connection: the peer hears it at once.
pub fn reset(fd: i32) {
    sys::disconnect(fd);
}
