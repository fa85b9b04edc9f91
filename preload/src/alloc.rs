//! The shim's own memory: lock-free size classes over mmap.
//!
//! Hooks run in signal handlers, before main, and in children of multi-threaded processes; the program's
//! malloc may be held by the very code that was interrupted, or be replaced by one that uses sockets. A
//! lock-free stack per size class has none of these troubles: nothing is ever held.
//!
//! ```text
//! class c: blocks of 32 << c bytes (32 B … 64 KiB); larger ones are mapped for themselves
//! head   : tag (16) | address (48), the tag changes at each pop, so a block that was taken and came back
//!          between the look and the exchange is noticed (ABA)
//! fresh  : blocks left (16) | address (48) of the piece that is being cut into blocks
//! ```
//!
//! A program that has used up its address space (RLIMIT_AS) may be able to live with that; a library in it that can't
//! have a few bytes would be its end. So some chunks are kept back in the library's own data, where they cost nothing
//! until they are touched. Who asks for more than a chunk is told no, and must be able to do without.
//!
//! A block is cut off when it is wanted, so what a process does not use it does not touch: a program that has nothing to
//! do with sockets would pay for each page at its start.

use engine::rawsys::syscall6;
use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};

const CLASSES: usize = 12;
const MIN: usize = 32;
const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;
const ADDR: u64 = (1 << 48) - 1;
const ONE: u64 = 1 << 48;
/// Class of the blocks that are a page.
const PAGES: usize = (PAGE / MIN).trailing_zeros() as usize;

/// Blocks that were given back.
static HEAD: [AtomicU64; CLASSES] = [const { AtomicU64::new(0) }; CLASSES];
/// Blocks that were never handed out.
static FRESH: [AtomicU64; CLASSES] = [const { AtomicU64::new(0) }; CLASSES];

/// See the module.
#[derive(Debug)]
pub struct Own;

fn class(layout: &Layout) -> Option<usize> {
    let n = layout.size().max(layout.align()).max(MIN).next_power_of_two();
    let c = (n / MIN).trailing_zeros() as usize;
    (c < CLASSES).then_some(c)
}

/// Chunks kept back, on a page of their own.
#[repr(C, align(4096))]
struct Reserve(UnsafeCell<[[u8; CHUNK]; RESERVED]>);

// SAFETY: each chunk is handed out once, by the count `TAKEN`, and is its owner's from then on.
unsafe impl Sync for Reserve {}

const RESERVED: usize = 16;
static RESERVE: Reserve = Reserve(UnsafeCell::new([[0; CHUNK]; RESERVED]));
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// A chunk of the kernel's, or one that was kept back.
fn chunk() -> *mut u8 {
    let p = map(CHUNK);
    if !p.is_null() {
        return p;
    }
    engine::mem::short::note();
    // Relaxed: nobody has written to a chunk before it is taken, and each is taken once.
    let take = |n: usize| (n < RESERVED).then_some(n + 1);
    TAKEN
        .fetch_update(Relaxed, Relaxed, take)
        .map_or(std::ptr::null_mut(), |n| RESERVE.0.get().cast::<u8>().wrapping_add(n * CHUNK))
}

fn map(len: usize) -> *mut u8 {
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    // SAFETY: a new private mapping at an address the kernel chooses.
    let p = unsafe { syscall6(libc::SYS_mmap, 0, len, prot, flags, usize::MAX, 0) };
    if p < 0 { std::ptr::null_mut() } else { p as *mut u8 }
}

/// A chunk that was told to nobody.
fn give_back(chunk: *mut u8) {
    let kept = RESERVE.0.get().addr();
    if (kept..kept + RESERVED * CHUNK).contains(&chunk.addr()) {
        // Not to be unmapped: a hole in the library's data would be anybody's. Its pages serve as such.
        (0..CHUNK / PAGE).for_each(|i| push(PAGES, chunk.wrapping_add(i * PAGE)));
        return;
    }
    // SAFETY: mapped just now, with this length, and told to nobody.
    unsafe { syscall6(libc::SYS_munmap, chunk as usize, CHUNK, 0, 0, 0, 0) };
}

fn pages(n: usize) -> usize {
    n.next_multiple_of(PAGE)
}

fn push(c: usize, block: *mut u8) {
    // SAFETY: a block is at least MIN bytes, 8-aligned, and ours: its first word is the link. It is written
    // atomically because a racing pop may still read it.
    let link = unsafe { AtomicU64::from_ptr(block.cast()) };
    let mut head = HEAD[c].load(Relaxed);
    loop {
        link.store(head & ADDR, Relaxed);
        let new = (head & !ADDR) | block as u64;
        match HEAD[c].compare_exchange_weak(head, new, Release, Relaxed) {
            Ok(_) => return,
            Err(h) => head = h,
        }
    }
}

fn pop(c: usize) -> *mut u8 {
    let mut head = HEAD[c].load(Acquire);
    loop {
        let p = (head & ADDR) as *mut u8;
        if p.is_null() {
            return refill(c);
        }
        // SAFETY: blocks are never unmapped, so the word can be read even if another thread has just taken
        // the block; then the exchange fails.
        let next = unsafe { AtomicU64::from_ptr(p.cast()) }.load(Relaxed) & ADDR;
        let new = ((head & !ADDR).wrapping_add(ONE)) | next;
        match HEAD[c].compare_exchange_weak(head, new, AcqRel, Acquire) {
            Ok(_) => return p,
            Err(h) => head = h,
        }
    }
}

/// A block that nobody has had yet.
#[cold]
fn refill(c: usize) -> *mut u8 {
    let size = MIN << c;
    let mut fresh = FRESH[c].load(Relaxed);
    loop {
        if fresh >= ONE {
            // A piece is cut once in the life of the process, so a value never comes back.
            // ORDERING [alloc.piece] Acquire; pairs with the Release that brings the piece; other threads' cuts between
            // are read-modify-writes, so they pass it on. Carries: the end of its use as a page, if it was one.
            match FRESH[c].compare_exchange_weak(fresh, fresh - ONE + size as u64, Acquire, Relaxed) {
                Ok(_) => return (fresh & ADDR) as *mut u8,
                Err(f) => fresh = f,
            }
            continue;
        }
        let (piece, len) = if c < PAGES { (pop(PAGES), PAGE) } else { (chunk(), CHUNK) };
        if piece.is_null() {
            return piece;
        }
        let rest = (len / size - 1) as u64 * ONE;
        let next = (piece as u64 + size as u64) & ADDR;
        // ORDERING [alloc.piece] Release; pairs with the Acquire of who cuts a block off.
        match FRESH[c].compare_exchange(fresh, rest | next, Release, Relaxed) {
            Ok(_) => return piece,
            Err(f) => fresh = f,
        }
        // Another thread has brought one.
        if c < PAGES {
            push(PAGES, piece);
        } else {
            give_back(piece);
        }
    }
}

// SAFETY: blocks of a class are at least as large and as aligned as asked (powers of two, carved from page
// aligned chunks), are handed out once until given back, and large ones are mappings of their own.
unsafe impl GlobalAlloc for Own {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class(&layout) {
            Some(c) => pop(c),
            None if layout.align() <= PAGE => map(pages(layout.size())),
            None => std::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        match class(&layout) {
            Some(c) => push(c, p),
            None => {
                // SAFETY: mapped by `alloc` with this very length.
                unsafe { syscall6(libc::SYS_munmap, p as usize, pages(layout.size()), 0, 0, 0, 0) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every block is one thread's alone from its allocation to its end, of whatever class.
    #[test]
    fn blocks_do_not_overlap() {
        let work = |me: u64| {
            let mut mine = std::collections::VecDeque::new();
            let mut seed = me;
            for i in 0..20_000u64 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let size = (seed >> 33) as usize % 3000 + (seed >> 60) as usize / 15 * 66_000 + 16;
                let layout = Layout::from_size_align(size, 8).expect("a layout");
                let mark = me << 32 | i;
                // SAFETY: the layout has a size; the block is written within it.
                let p = unsafe { Own.alloc(layout) };
                assert!(!p.is_null() && (p as usize).is_multiple_of(size.next_power_of_two().min(PAGE)));
                let ends = [p, p.wrapping_add(size - 8)].map(|p| p.cast::<u64>());
                // SAFETY: as above: the first and the last eight bytes.
                ends.iter().for_each(|p| unsafe { p.write_unaligned(mark) });
                mine.push_back((ends, layout, mark));
                if mine.len() > 200 || i > 19_000 {
                    let (ends, layout, mark) = mine.pop_front().expect("some");
                    for p in ends {
                        // SAFETY: not given back yet.
                        assert_eq!(unsafe { p.read_unaligned() }, mark);
                    }
                    // SAFETY: allocated above with this layout, and given back once.
                    unsafe { Own.dealloc(ends[0].cast(), layout) };
                }
            }
        };
        std::thread::scope(|s| (1..5).for_each(|me| _ = s.spawn(move || work(me))));
    }
}
