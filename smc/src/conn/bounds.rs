//! SO_SNDBUF and SO_RCVBUF: how much of a ring a writer may fill.
//!
//! A program that sets SO_SNDBUF expects a write that does not wait to stop after about that much. On TCP the bytes that
//! nobody has read lie in the sender's queue, up to its SO_SNDBUF, and in the receiver's, up to its SO_RCVBUF; and one
//! segment is taken whole where either has room for a part of it (net/ipv4/tcp.c, tcp_sendmsg). So many may lie in a ring
//! that has room for them. It is never less than TCP would have taken: two programs that rely on TCP's buffers would wait
//! for each other.
//!
//! | SO_SNDBUF | SO_RCVBUF of the peer | bytes |
//! | --- | --- | --- |
//! | not set | any | what the ring holds; TCP's own bound is some megabytes (tcp_wmem) |
//! | set | not set | both, the peer's being what TCP lets it grow to with nobody reading |
//! | set | set | both |
//!
//! Which of them the program has set SO_BUF_LOCK tells (socket(7), since Linux 5.15), also where a listener's were handed
//! down. Each end says its own in the connection's page; both work the bound out of that, since the reader must not wait
//! for more than the writer may write.

use super::Socket;
use crate::mem::layout::{RxLine, TxLine};
use crate::sync::Ordering::Relaxed;
use crate::sys;

/// The largest segment of the loopback device, whose MTU is 64 KiB.
const SEGMENT: u64 = 64 << 10;
/// For a peer that has not set SO_RCVBUF: twice the kernel's tcp_rmem\[1\], as much as it was seen to grow to while nobody
/// read.
const UNSET: u64 = 256 << 10;
/// asm-generic/socket.h, and what it gives (SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK, linux/socket.h).
const SO_BUF_LOCK: i32 = 72;
const SNDBUF_IS_SET: u32 = 1;
const RCVBUF_IS_SET: u32 = 2;

/// Most bytes that may lie unread in a ring of `size`, which `tx` fills and `rx` empties.
#[inline(always)]
pub(super) fn most(tx: &TxLine, rx: &RxLine, size: u64) -> u64 {
    // Relaxed, here and below: a bound, which says nothing of any bytes.
    match tx.sndbuf.load(Relaxed) {
        0 => size,
        n => bounded(n, rx.rcvbuf.load(Relaxed), size),
    }
}

#[cold]
fn bounded(sndbuf: u32, rcvbuf: u32, size: u64) -> u64 {
    let peers = if rcvbuf == 0 { UNSET } else { rcvbuf.into() };
    size.min(u64::from(sndbuf) + peers + SEGMENT)
}

impl Socket {
    /// The program has set SO_SNDBUF or SO_RCVBUF, or may have before there was a ring.
    #[cold]
    pub fn read_buffers(&self, fd: i32) {
        let Some(m) = self.mapped() else { return };
        let int = |name| {
            let mut n = [0u8; 4];
            let got = sys::getsockopt(fd, libc::SOL_SOCKET, name, &mut n) == Ok(4);
            if got { u32::from_ne_bytes(n) } else { 0 }
        };
        let set = int(SO_BUF_LOCK);
        let of = |bit, name| if set & bit != 0 { int(name) } else { 0 };
        m.me.tx.sndbuf.store(of(SNDBUF_IS_SET, libc::SO_SNDBUF), Relaxed);
        m.me.rx.rcvbuf.store(of(RCVBUF_IS_SET, libc::SO_RCVBUF), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.18 took on the loopback with nobody reading, by 64 KiB or by 1000 bytes at a time, the larger.
    #[test]
    fn never_less_than_tcp_takes() {
        const RING: u64 = 4 << 20;
        for (sndbuf, rcvbuf, took) in [
            (16_384, 0, 195_395),
            (16_384, 16_384, 69_176),
            (4608, 2304, 39_893),
            (131_072, 131_072, 163_000),
            (400_000, 0, 546_512),
        ] {
            let most = bounded(sndbuf, rcvbuf, RING);
            assert!(most >= took && most < RING, "{sndbuf} {rcvbuf}: {most}");
        }
        assert_eq!(bounded(u32::MAX, u32::MAX, RING), RING);
        assert_eq!(bounded(4608, 2304, 16_384), 16_384);
    }
}
