//! The byte ring: a power-of-two buffer that one side fills and the other empties.
//!
//! Cursors are 64-bit counts of bytes that never wrap; `(cursor - origin) & (size - 1)` is the place in the buffer.
//! The origin is the producer's to choose while the ring is empty ([`place`]): so messages that are read as they come
//! stay in one [`WINDOW`] of the buffer, and a connection keeps as much memory as it needs at once, not all of its ring.
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

/// Bytes of the buffer that are used again and again as long as the consumer keeps up. The producer looks for that once in
/// as many, since the consumer's cursor is in another CPU's cache.
pub const WINDOW: u64 = if cfg!(smc_loom) { 1 } else { crate::mem::rmb::WINDOW as u64 };
/// How often it looks beyond them.
const OFTEN: u64 = if cfg!(smc_loom) { 1 } else { 512 };

/// Where the producer of `buffer` puts the `n` ≥ 1 bytes from `prod` on, which are free: where it is, or, if the consumer
/// has taken all and `may` says so, where the buffer [starts](Buffer::starting_at) or is in one piece.
#[inline]
pub fn place(
    me: &TxLine,
    peer: &RxLine,
    prod: u64,
    n: u64,
    buffer: &Buffer,
    may: impl FnOnce() -> bool,
) -> u64 {
    let at = at(me, prod);
    let from = at.wrapping_sub(buffer.start);
    let inside = if from < WINDOW {
        from + n <= WINDOW
    } else {
        // Powers of two: the byte before and the last one lie in the same piece, of which one begins behind the window.
        let beyond = from - WINDOW;
        beyond.wrapping_sub(1) ^ beyond.wrapping_add(n - 1) < OFTEN
    };
    if inside || !may() { at } else { rewind(me, peer, prod, at, n, buffer) }
}

#[cold]
#[inline(never)]
fn rewind(me: &TxLine, peer: &RxLine, prod: u64, at: u64, n: u64, buffer: &Buffer) -> u64 {
    let to = if n <= WINDOW { buffer.start } else { 0 };
    // ORDERING [ring.free] Acquire, as in `writable`.
    if at & (buffer.size() - 1) == to || peer.cons.load(Acquire) != prod {
        return at;
    }
    // ORDERING [ring.publish] Relaxed: `publish` of what is put there comes after it, and carries it. A consumer that reads
    // bytes before `prod` is not given another origin meanwhile: it has not released them. Model: loom_rewind.
    me.origin.store(prod.wrapping_sub(to), Relaxed);
    to
}

/// The place of `cursor` in the buffer of the producer of `tx`; for a consumer, of bytes that [`readable`] has shown. (Any
/// number of a hostile peer's is a place: [`Buffer`] takes it by its size.)
#[inline]
pub fn at(tx: &TxLine, cursor: u64) -> u64 {
    cursor.wrapping_sub(tx.origin.load(Relaxed))
}

/// The buffer of a ring, mapped in this process. Its functions take places, which are [`at`]'s of cursors.
///
/// Invariant: `base` is valid for reads and writes of `size` bytes as long as the connection's buffers are
/// held; `size` is a power of two.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    base: *mut u8,
    size: usize,
    start: u64,
}

impl Buffer {
    /// A buffer at `base`.
    ///
    /// # Safety
    /// The invariant of the type must hold while the value is used.
    pub unsafe fn new(base: *mut u8, size: usize) -> Self {
        debug_assert!(size.is_power_of_two());
        Buffer { base, size, start: 0 }
    }

    /// The same for a producer, who begins it at that place, from which [`WINDOW`] bytes are in one piece.
    #[must_use]
    pub fn starting_at(self, start: u64) -> Self {
        Buffer { start, ..self }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Copies `n` bytes at `src` to place `at`.
    ///
    /// # Safety
    /// `src` is readable for `n` bytes, which are free in the ring: `n <= size`.
    #[inline]
    pub unsafe fn copy_in(&self, at: u64, src: *const u8, n: usize) {
        let n = n.min(self.size);
        let at = at as usize & (self.size - 1);
        let first = n.min(self.size - at);
        // SAFETY: at + first <= size by construction; `src` as the caller vouches; the program's memory and
        // the mapping do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(src, self.base.add(at), first) };
        if first < n {
            // SAFETY: n - first <= size; the rest of `src`.
            unsafe { std::ptr::copy_nonoverlapping(src.add(first), self.base, n - first) };
        }
    }

    /// Copies `n` bytes at place `at` to `dst`.
    ///
    /// # Safety
    /// `dst` is writable for `n` bytes; `n <= size`.
    #[inline]
    pub unsafe fn copy_out(&self, at: u64, dst: *mut u8, n: usize) {
        let n = n.min(self.size);
        let at = at as usize & (self.size - 1);
        let first = n.min(self.size - at);
        // SAFETY: at + first <= size by construction; `dst` as the caller vouches.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), dst, first) };
        if first < n {
            // SAFETY: n - first <= size; the rest of `dst`.
            unsafe { std::ptr::copy_nonoverlapping(self.base, dst.add(first), n - first) };
        }
    }

    /// The contiguous part at place `at`, at most `n` bytes: pointer and length, for the kernel to read or fill.
    pub fn span(&self, at: u64, n: usize) -> (*mut u8, usize) {
        let at = at as usize & (self.size - 1);
        // The pointer stays inside the buffer: at < size.
        (self.base.wrapping_add(at), n.min(self.size - at))
    }
}

#[cfg(all(test, not(smc_loom)))]
mod tests {
    use super::*;

    const SIZE: u64 = 16 << 10;
    /// Where the two rings of a connection begin.
    const STARTS: [u64; 2] = [0, SIZE - WINDOW];

    fn buffer(start: u64) -> Buffer {
        // SAFETY: nothing is copied by it.
        unsafe { Buffer::new(std::ptr::dangling_mut(), SIZE as usize) }.starting_at(start)
    }

    /// Sends messages of `n` bytes, which are taken when `behind` of them are in the ring; the places, counted from the
    /// start if they belong there.
    fn places(n: u64, behind: u64, may: bool) -> Vec<u64> {
        STARTS.iter().flat_map(|start| places_from(*start, n, behind, may)).collect()
    }

    fn places_from(start: u64, n: u64, behind: u64, may: bool) -> Vec<u64> {
        let (tx, rx) = (TxLine::default(), RxLine::default());
        (0..200)
            .map(|i| {
                let prod = i * n;
                if i % behind == 0 {
                    release(&rx, prod);
                }
                assert!(writable(&rx, prod, SIZE).is_ok_and(|(free, _)| free >= n));
                let to = place(&tx, &rx, prod, n, &buffer(start), || may);
                publish(&tx, prod + n, false);
                assert_eq!(at(&tx, prod), to, "the consumer looks there");
                if may && n <= WINDOW { to.wrapping_sub(start) % SIZE } else { to % SIZE }
            })
            .collect()
    }

    #[test]
    fn messages_that_are_taken_as_they_come_stay_in_a_window() {
        let all = places(100, 1, true);
        assert!(all.iter().all(|at| at + 100 <= WINDOW), "{all:?}");
        // One at the end of the window is followed by one at the start, not by a byte beyond.
        for n in [1, 64, WINDOW / 4, WINDOW] {
            assert!(places(n, 1, true).iter().all(|at| at + n <= WINDOW), "{n}");
        }
        // Larger ones are each at the buffer's own start, in one piece.
        assert!(places(WINDOW + 1, 1, true).iter().all(|at| *at == 0));
        // With three in the ring it takes what those are in.
        assert!(places(1000, 3, true).iter().all(|at| at + 1000 <= 4 * WINDOW));
    }

    #[test]
    fn large_and_small_ones_find_their_way_back() {
        for start in STARTS {
            let (tx, rx) = (TxLine::default(), RxLine::default());
            let mut prod = 0;
            let mut send = |n| {
                let to = place(&tx, &rx, prod, n, &buffer(start), || true);
                prod += n;
                publish(&tx, prod, false);
                release(&rx, prod);
                to % SIZE
            };
            assert_eq!(send(10), start);
            assert_eq!(send(3 * WINDOW), 0);
            assert_eq!(send(SIZE), 0);
            let back: Vec<_> = (0..2 * OFTEN).map(|_| send(1)).collect();
            assert!(back.contains(&start), "{back:?}");
        }
    }

    #[test]
    fn bytes_that_are_in_the_ring_stay_where_they_are() {
        let kinds = [(100, 7), (1000, 3), (WINDOW, 3), (2 * WINDOW, 2), (1, 200)];
        for ((n, behind), start) in kinds.iter().flat_map(|k| STARTS.map(|s| (*k, s))) {
            let (tx, rx) = (TxLine::default(), RxLine::default());
            let mut model = vec![0u8; SIZE as usize];
            let mut cons = 0;
            for i in 0..200 {
                let prod = i * n;
                if i % behind == behind - 1 {
                    release(&rx, prod);
                    cons = prod;
                }
                let to = place(&tx, &rx, prod, n, &buffer(start), || true);
                (0..n).for_each(|k| model[((to + k) % SIZE) as usize] = (prod + k) as u8);
                publish(&tx, prod + n, false);
                for c in cons..prod + n {
                    assert_eq!(model[(at(&tx, c) % SIZE) as usize], c as u8);
                }
            }
        }
    }

    #[test]
    fn a_ring_that_may_not_be_rewound_is_walked_through() {
        let all = places(1000, 1, false);
        let walked: Vec<_> = (0..200).map(|i| i * 1000 % SIZE).collect();
        assert_eq!(all, [&walked[..], &walked].concat());
    }
}
