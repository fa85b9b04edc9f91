//! The ring's own memory, lent to a program that is linked with the engine: space to fill before it is sent, and bytes
//! to look at before they are consumed.
//!
//! The memory is the peer's as well. So nobody gets a `&[u8]` or `&mut [u8]` of it: those say that nobody else writes
//! meanwhile, which the compiler relies on and the peer need not keep. A [`SharedSlice`] is an address and a length
//! with copies in and out, and is handed to the kernel as it is (read from a file straight into the ring, write from
//! the ring to a file). What was looked at once may have changed when it is looked at again: copy, then check.
//!
//! | holder | lock | ends by |
//! | --- | --- | --- |
//! | [`Reserved`] | the sender's | `commit`, or drop: nothing was sent |
//! | [`Lent`] | the reader's | `consume`, or drop: nothing was read |
//!
//! Both locks belong to a thread, and other threads wait for them: they are held for as long as a long write or
//! read would hold them.
#![allow(unsafe_code)]

use super::waiting::{What, Woke, low_water};
use super::{Mapped, Socket, bounds};
use crate::arena::{Slot, rx_mode, tx_mode};
use crate::lock::{self, Guard};
use crate::ring;
use crate::sync::Ordering::*;
use crate::wait::doorbell;
use std::marker::PhantomData;
use std::ptr;

const EAGAIN: isize = -(libc::EAGAIN as isize);
const ECONNRESET: isize = -(libc::ECONNRESET as isize);

/// Memory that somebody else may change at any time.
///
/// Invariant: `at` is valid for reads and writes of `len` bytes for `'a`; no reference of Rust's points there.
#[derive(Clone, Copy, Debug)]
pub struct SharedSlice<'a> {
    at: *mut u8,
    len: usize,
    lives: PhantomData<&'a ()>,
}

impl<'a> SharedSlice<'a> {
    fn new(at: *mut u8, len: usize) -> Self {
        SharedSlice { at, len, lives: PhantomData }
    }

    /// Memory of the program's own, seen as if it were shared.
    pub fn of(own: &'a mut [u8]) -> Self {
        Self::new(own.as_mut_ptr(), own.len())
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address: valid for reads and writes of `len` bytes while this lives, and changed by others meanwhile. For
    /// calls of the kernel's.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.at
    }

    /// The part from `at` on, at most `n` bytes of it.
    #[must_use]
    pub fn part(&self, at: usize, n: usize) -> SharedSlice<'a> {
        let at = at.min(self.len);
        Self::new(self.at.wrapping_add(at), n.min(self.len - at))
    }

    /// Copies as much of `from` as fits; how much.
    pub fn write(&self, from: &[u8]) -> usize {
        let n = from.len().min(self.len);
        // SAFETY: `n` bytes of each; a slice of the program's does not overlap memory that nothing of Rust's refers to.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.at, n) };
        n
    }

    /// Copies as much as `to` has room for; how much.
    pub fn read(&self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.len);
        // SAFETY: as in `write`. What changes meanwhile is copied as it is found.
        unsafe { ptr::copy_nonoverlapping(self.at, to.as_mut_ptr(), n) };
        n
    }

    /// The byte at `i` as it is now.
    #[must_use]
    pub fn get(&self, i: usize) -> Option<u8> {
        // SAFETY: below `len`; volatile, so that it is read once, whatever is done with the value.
        (i < self.len).then(|| unsafe { self.at.add(i).read_volatile() })
    }

    /// Sets the byte at `i`; false: there is none.
    pub fn set(&self, i: usize, byte: u8) -> bool {
        if i < self.len {
            // SAFETY: below `len`.
            unsafe { self.at.add(i).write_volatile(byte) };
        }
        i < self.len
    }

    /// Sets all bytes.
    pub fn fill(&self, byte: u8) {
        // SAFETY: `len` bytes, valid for writes.
        unsafe { ptr::write_bytes(self.at, byte, self.len) };
    }

    /// readv(2) from `fd` into `slices`, straight into the memory: bytes, or minus an errno.
    pub fn read_from(slices: &[SharedSlice<'_>], fd: i32) -> isize {
        Self::vectored(libc::SYS_readv, slices, fd)
    }

    /// writev(2) of `slices` to `fd`, straight from the memory: bytes, or minus an errno.
    pub fn write_to(slices: &[SharedSlice<'_>], fd: i32) -> isize {
        Self::vectored(libc::SYS_writev, slices, fd)
    }

    fn vectored(call: i64, slices: &[SharedSlice<'_>], fd: i32) -> isize {
        let mut v = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; 2];
        let mut n = 0;
        for (to, s) in v.iter_mut().zip(slices.iter().filter(|s| !s.is_empty())) {
            *to = libc::iovec { iov_base: s.at.cast(), iov_len: s.len };
            n += 1;
        }
        // SAFETY: `n` iovecs, each valid for reads and writes.
        unsafe { crate::rawsys::syscall6(call, fd as usize, v.as_ptr() as usize, n, 0, 0, 0) }
    }
}

/// A part of a ring from place `at` on: two pieces, of which the second is empty unless it goes over the ring's end.
fn pieces<'a>(buffer: &ring::Buffer, at: u64, n: usize) -> [SharedSlice<'a>; 2] {
    let (p, first) = buffer.span(at, n);
    let (q, rest) = buffer.span(at + first as u64, n - first);
    [SharedSlice::new(p, first), SharedSlice::new(q, rest)]
}

/// Free space of the ring, this thread's to fill.
#[must_use]
pub struct Reserved<'a> {
    sock: &'a Socket,
    slot: &'a Slot,
    m: Mapped<'a>,
    at: u64,
    len: usize,
    fd: i32,
    /// Of the thread, and dropped by it.
    guard: Guard<'a>,
}

impl Reserved<'_> {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The space.
    #[must_use]
    pub fn pieces(&self) -> [SharedSlice<'_>; 2] {
        pieces(&self.m.txbuf, ring::at(&self.m.me.tx, self.at), self.len)
    }

    /// Sends the first `n` bytes, at most all. What a peer that wants out of the ring will not take is left to
    /// [`Socket::flush_left`].
    pub fn commit(self, n: usize) {
        let Reserved { sock, slot: s, m, at, len, fd, guard } = self;
        let n = n.min(len);
        if n == 0 {
            return;
        }
        // As in `put`: own copy first.
        s.tx.prod.store(at + n as u64, Relaxed);
        s.tx.msgs.store(s.tx.msgs.load(Relaxed) + 1, Relaxed);
        m.publish(at + n as u64);
        let mut owed = sock.produced(s, &m);
        if owed.stop {
            owed.ring |= sock.leave_ring(fd, s, &m);
            sock.count_downgrade(s);
        }
        let check = super::tx::looks_after(s);
        drop(guard);
        let gone = owed.ring && sock.ring_peer(s, &m) == -(libc::EPIPE as isize);
        if gone || check && sock.is_idle(&m) {
            sock.ask_after(fd, s, &m, at);
        }
    }
}

/// Bytes of the ring, this thread's to consume.
#[must_use]
pub struct Lent<'a> {
    sock: &'a Socket,
    slot: &'a Slot,
    m: Mapped<'a>,
    at: u64,
    len: usize,
    /// Bytes in the ring.
    all: u64,
    fd: i32,
    /// Of the thread, and dropped by it.
    guard: Guard<'a>,
}

impl Lent<'_> {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[must_use]
    pub fn pieces(&self) -> [SharedSlice<'_>; 2] {
        pieces(&self.m.rxbuf, self.m.rx_at(self.at), self.len)
    }

    /// Consumes the first `n` bytes, at most all.
    pub fn consume(self, n: usize) {
        let Lent { sock, slot: s, m, at, len, all, fd, guard } = self;
        let n = n.min(len);
        if n == 0 {
            return;
        }
        s.rx.msgs.store(s.rx.msgs.load(Relaxed) + 1, Relaxed);
        let owed = sock.consume(s, &m, at + n as u64, all - n as u64);
        drop(guard);
        if owed.ring {
            sock.ring_peer(s, &m);
        }
        if owed.stop {
            sock.obey(fd);
        }
    }
}

impl Socket {
    /// Space for `want` bytes, or for a quarter of the ring if that is less; up to `want`. Waits for it as a send
    /// would. `None`: the stream does not go by the ring now. Fails with minus an errno.
    pub fn reserve(&self, fd: i32, want: usize) -> Result<Option<Reserved<'_>>, isize> {
        let mut deadline = None;
        loop {
            let Some(s) = self.slot() else { return Ok(None) };
            if s.tx.mode.load(Acquire) != tx_mode::RING {
                return Ok(None);
            }
            let Some(m) = self.mapped() else { return Ok(None) };
            let guard = lock::lock(&s.tx.lock);
            if s.tx.mode.load(Relaxed) != tx_mode::RING {
                continue;
            }
            if doorbell::is_to_leave(m.peer) {
                drop(guard);
                // Leaves the ring.
                self.progress(fd);
                continue;
            }
            let (at, size) = (s.tx.prod.load(Relaxed), m.txbuf.size());
            let Ok((free, cons)) = ring::writable(&m.peer.rx, at, size) else {
                drop(guard);
                self.misbehaved(fd, s);
                return Err(ECONNRESET);
            };
            s.tx.cons_seen.store(cons, Relaxed);
            let most = bounds::most(&m.me.tx, &m.peer.rx, size);
            let free = most.saturating_sub(size - free);
            if free >= low_water(most).min(want as u64).max(1) {
                let len = free.min(want as u64) as usize;
                // Where it is stays so while the lock is held.
                let _ = m.place(s, at, len as u64);
                return Ok(Some(Reserved { sock: self, slot: s, m, at, len, fd, guard }));
            }
            s.tx.blocked.store(1, Relaxed);
            drop(guard);
            if s.nonblock.load(Relaxed) != 0 {
                if self.glance(fd, s, &m) {
                    continue;
                }
                s.tx.told_full.store(1, Relaxed);
                return Err(EAGAIN);
            }
            if let Woke::Err(e) = self.wait(fd, s, &m, What::Tx, &mut deadline, false) {
                return Err(e);
            }
        }
    }

    /// The bytes that are in the ring, at most `most`; waits for none. `None`: there are none, or the stream does not
    /// go by the ring now, which a receive finds out. Fails with minus an errno.
    pub fn lend(&self, fd: i32, most: usize) -> Result<Option<Lent<'_>>, isize> {
        let (Some(s), Some(m)) = (self.slot(), self.mapped()) else { return Ok(None) };
        if s.rx.mode.load(Acquire) != rx_mode::RING || most == 0 {
            return Ok(None);
        }
        let guard = lock::lock(&s.rx.lock);
        if s.rx.mode.load(Relaxed) != rx_mode::RING {
            return Ok(None);
        }
        let Ok(r) = self.look(s, &m) else {
            drop(guard);
            self.misbehaved(fd, s);
            return Err(ECONNRESET);
        };
        if r.bytes == 0 {
            return Ok(None);
        }
        let (at, len) = (s.rx.cons.load(Relaxed), r.bytes.min(most as u64) as usize);
        self.promise(at, r.bytes);
        Ok(Some(Lent { sock: self, slot: s, m, at, len, all: r.bytes, fd, guard }))
    }
}
