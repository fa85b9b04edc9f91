//! The byte ring: a power-of-two buffer that one side fills and the other empties.
//!
//! Cursors are 64-bit counts of bytes that never wrap; `cursor & (size - 1)` is the place in the buffer.
//! `prod - cons` bytes are readable, the rest is free. The bytes are copied first and the cursor is
//! published after, with Release; the other side loads it with Acquire before it touches the bytes.
//!
//! A cursor that comes from the peer is loaded once and checked here: `0 <= prod - cons <= size`, or it is
//! [`PeerMisbehaved`]. The memory itself may change under the copy when the peer is hostile; only bytes are
//! copied, so that harms nobody but the connection.
//! RFC 7609 section 4.3; `net/smc/smc_tx.c`, `smc_rx.c`.
#![allow(unsafe_code)]

use crate::mem::layout::{LEFT, RxLine, TxLine};
use crate::sync::Ordering::*;

/// The peer published something impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerMisbehaved;

/// What a consumer may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readable {
    /// Bytes from the consumer cursor on.
    pub bytes: u64,
    /// The stream leaves the ring after them.
    pub left: bool,
}

/// What is readable beyond `cons` in a ring of `size` bytes filled by `peer`.
#[inline]
pub fn readable(peer: &TxLine, cons: u64, size: u64) -> Result<Readable, PeerMisbehaved> {
    // ORDERING [ring.publish] Acquire; pairs with the Release in `publish`. Carries: the bytes before prod.
    let word = peer.prod.load(Acquire);
    let bytes = (word & !LEFT).wrapping_sub(cons);
    if bytes > size { Err(PeerMisbehaved) } else { Ok(Readable { bytes, left: word & LEFT != 0 }) }
}

/// Free bytes of a ring of `size` bytes with `prod` produced; and the consumer cursor seen.
#[inline]
pub fn writable(peer: &RxLine, prod: u64, size: u64) -> Result<(u64, u64), PeerMisbehaved> {
    // ORDERING [ring.free] Acquire; pairs with the Release in `release`. Carries: the peer's copy out of
    // the bytes before cons is over, so they may be overwritten.
    let cons = peer.cons.load(Acquire);
    let used = prod.wrapping_sub(cons);
    if used > size { Err(PeerMisbehaved) } else { Ok((size - used, cons)) }
}

/// Makes the bytes before `prod` readable; `left` says that the stream leaves the ring there.
#[inline]
pub fn publish(me: &TxLine, prod: u64, left: bool) {
    // ORDERING [ring.publish] Release; pairs with the Acquire in `readable`.
    me.prod.store(prod | if left { LEFT } else { 0 }, Release);
}

/// Frees the bytes before `cons`.
#[inline]
pub fn release(me: &RxLine, cons: u64) {
    // ORDERING [ring.free] Release; pairs with the Acquire in `writable`.
    me.cons.store(cons, Release);
}

/// The buffer of a ring, mapped in this process.
///
/// Invariant: `base` is valid for reads and writes of `size` bytes as long as the connection's buffers are
/// held; `size` is a power of two.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    base: *mut u8,
    size: usize,
}

impl Buffer {
    /// A buffer at `base`.
    ///
    /// # Safety
    /// The invariant of the type must hold while the value is used.
    pub unsafe fn new(base: *mut u8, size: usize) -> Self {
        debug_assert!(size.is_power_of_two());
        Buffer { base, size }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Copies `n` bytes at `src` to the place of `cursor`.
    ///
    /// # Safety
    /// `src` is readable for `n` bytes, which are free in the ring: `n <= size`.
    #[inline]
    pub unsafe fn copy_in(&self, cursor: u64, src: *const u8, n: usize) {
        let n = n.min(self.size);
        let at = cursor as usize & (self.size - 1);
        let first = n.min(self.size - at);
        // SAFETY: at + first <= size by construction; `src` as the caller vouches; the program's memory and
        // the mapping do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(src, self.base.add(at), first) };
        if first < n {
            // SAFETY: n - first <= size; the rest of `src`.
            unsafe { std::ptr::copy_nonoverlapping(src.add(first), self.base, n - first) };
        }
    }

    /// Copies `n` bytes at the place of `cursor` to `dst`.
    ///
    /// # Safety
    /// `dst` is writable for `n` bytes; `n <= size`.
    #[inline]
    pub unsafe fn copy_out(&self, cursor: u64, dst: *mut u8, n: usize) {
        let n = n.min(self.size);
        let at = cursor as usize & (self.size - 1);
        let first = n.min(self.size - at);
        // SAFETY: at + first <= size by construction; `dst` as the caller vouches.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), dst, first) };
        if first < n {
            // SAFETY: n - first <= size; the rest of `dst`.
            unsafe { std::ptr::copy_nonoverlapping(self.base, dst.add(first), n - first) };
        }
    }

    /// The contiguous part at `cursor`, at most `n` bytes: pointer and length, for the kernel to read or fill.
    pub fn span(&self, cursor: u64, n: usize) -> (*mut u8, usize) {
        let at = cursor as usize & (self.size - 1);
        // The pointer stays inside the buffer: at < size.
        (self.base.wrapping_add(at), n.min(self.size - at))
    }
}
