//! The peer's side of a connection's page, as the service plays it; and the rings, as a device may have them.
//!
//! The program's side is written by this process, and by those it was forked into: it is checked like a peer's all the
//! same. What the doorbell needs is in `smc::wait::doorbell`.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use smc::mem::layout::{ConnPage, SidePage, ctl};
use smc::remote::Conn;
use smc::ring::{self, Buffer, PeerMisbehaved, Readable};
use smc::wait::doorbell;
use smc::{handshake::switch, sys};

use crate::device::Domain;
use crate::memory::{Access, Region};

/// See the module.
///
/// Invariant: `conn` is as libsmc.so gave it: page and rings stay mapped as long as this lives.
#[derive(Debug)]
pub struct Page {
    conn: Conn,
}

// SAFETY: the page is atomics and the rings are only copied, by whatever thread; the mapping belongs to none.
unsafe impl Send for Page {}

impl Page {
    /// # Safety
    /// `conn.page`, `tx` and `rx` are mapped, the rings for `ring` bytes, as long as what this makes lives.
    #[must_use]
    pub unsafe fn new(conn: Conn) -> Self {
        Self { conn }
    }

    /// The connection as it was given.
    #[must_use]
    pub fn conn(&self) -> &Conn {
        &self.conn
    }

    fn sides(&self) -> &[SidePage; 2] {
        // SAFETY: mapped, by the invariant; atomics only, for which every pattern is a value.
        let page: &ConnPage = unsafe { &*self.conn.page };
        &page.side
    }

    fn pair(&self) -> (&SidePage, &SidePage) {
        let [a, b] = self.sides();
        if self.conn.side == 0 { (b, a) } else { (a, b) }
    }

    fn me(&self) -> &SidePage {
        self.pair().0
    }

    fn program(&self) -> &SidePage {
        self.pair().1
    }

    /// Bytes in each ring.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.conn.ring as u64
    }

    /// What the program has sent beyond `seen`.
    pub fn sent(&self, seen: u64) -> Result<Readable, PeerMisbehaved> {
        ring::readable(&self.program().tx, seen, self.size())
    }

    /// Up to where the program has read, `produced` being there.
    pub fn taken(&self, produced: u64) -> Result<u64, PeerMisbehaved> {
        ring::writable(&self.program().rx, produced, self.size()).map(|(_, cons)| cons)
    }

    /// Makes what has come up to `produced` readable.
    pub fn publish(&self, produced: u64) {
        self.me().hint.cpu.store(sys::cpu(), std::sync::atomic::Ordering::Relaxed);
        ring::publish(&self.me().tx, produced, false);
        self.ring_if(ctl::RX_ARMED, true);
    }

    /// The place of what was sent up to `cons` is free.
    pub fn free(&self, cons: u64, written: u64) {
        ring::release(&self.me().rx, cons);
        let room = self.size() - (written - cons).min(self.size());
        self.ring_if(ctl::TX_ARMED, room >= self.size() / 4);
    }

    fn ring_if(&self, bit: u32, wake: bool) {
        if doorbell::after_publish(self.program(), bit, wake).ring {
            let _ = sys::ring(self.conn.bell);
        }
    }

    /// The peer's stream leaves the ring at `produced`.
    pub fn leave(&self, produced: u64) {
        // False: the program has stopped before, and reads no further in any case.
        let _ = switch::leave(self.me(), self.program(), produced);
        let _ = sys::ring(self.conn.bell);
    }

    /// Asks the program's stream back to TCP from `at` on. False: it has left the ring already.
    #[must_use]
    pub fn stop(&self, at: u64) -> bool {
        let first = doorbell::stop(self.me(), at);
        let _ = sys::ring(self.conn.bell);
        first
    }

    /// Before a sleep: the program's next bytes ring, and with `room` what it takes.
    pub fn arm(&self, room: bool) {
        doorbell::arm(self.me(), ctl::RX_ARMED | if room { ctl::TX_ARMED } else { 0 });
    }

    /// Looking again.
    pub fn disarm(&self) {
        doorbell::disarm(self.me(), ctl::RX_ARMED | ctl::TX_ARMED);
    }

    /// Takes the rings of the doorbell. False: it has ended, and so has the program's part.
    #[must_use]
    pub fn answer_bell(&self) -> bool {
        let mut b = [0; 64];
        loop {
            match sys::recv_small(self.conn.bell, &mut b, libc::MSG_DONTWAIT) {
                0 => return false,
                n if n > 0 => {}
                n => return n == -(libc::EAGAIN as isize) || n == -(libc::EINTR as isize),
            }
        }
    }

    /// Sends by TCP what the program has put into the ring from `at` to `end`; how much TCP took, or minus an errno.
    pub fn move_into_tcp(&self, at: u64, end: u64) -> isize {
        // SAFETY: the ring is mapped, and its size a power of two, as libsmc.so has it.
        let ring = unsafe { Buffer::new(self.conn.tx, self.conn.ring) };
        let (base, len) = ring.span(at, (end - at).min(self.size()) as usize);
        let iov = [libc::iovec { iov_base: base.cast(), iov_len: len }];
        // SAFETY: a part of the ring, mapped while this lives.
        unsafe { sys::send_iov(self.conn.tcp, &iov, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    }

    /// The rings as the device may have them: the one that the peer writes into, and the one that is sent from.
    pub fn register(&self, domain: &Arc<Domain>) -> io::Result<(Arc<Region>, Arc<Region>)> {
        let (rx, tx, len) = (self.conn.rx, self.conn.tx, self.conn.ring);
        // SAFETY: mapped while this lives, shared, and the caller drops the regions before.
        let rmb = unsafe { Region::over(domain, rx, len, Access::PeerWrites) }?;
        // SAFETY: as above.
        let buffer = unsafe { Region::over(domain, tx, len, Access::Local) }?;
        Ok((rmb, buffer))
    }
}
