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
//! ```

use engine::rawsys::syscall6;
use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicU64, Ordering::*};

const CLASSES: usize = 12;
const MIN: usize = 32;
const CHUNK: usize = 64 << 10;
const ADDR: u64 = (1 << 48) - 1;

static HEAD: [AtomicU64; CLASSES] = [const { AtomicU64::new(0) }; CLASSES];

/// See the module.
#[derive(Debug)]
pub struct Own;

fn class(layout: &Layout) -> Option<usize> {
    let n = layout.size().max(layout.align()).max(MIN).next_power_of_two();
    let c = (n / MIN).trailing_zeros() as usize;
    (c < CLASSES).then_some(c)
}

fn map(len: usize) -> *mut u8 {
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    // SAFETY: a new private mapping at an address the kernel chooses.
    let p = unsafe { syscall6(libc::SYS_mmap, 0, len, prot, flags, usize::MAX, 0) };
    if p < 0 { std::ptr::null_mut() } else { p as *mut u8 }
}

fn pages(n: usize) -> usize {
    (n + 4095) & !4095
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
        let new = ((head & !ADDR).wrapping_add(1 << 48)) | next;
        match HEAD[c].compare_exchange_weak(head, new, AcqRel, Acquire) {
            Ok(_) => return p,
            Err(h) => head = h,
        }
    }
}

/// Maps a chunk for the class, keeps its first block, puts the rest on the stack.
#[cold]
fn refill(c: usize) -> *mut u8 {
    let size = MIN << c;
    let p = map(CHUNK);
    if p.is_null() {
        return p;
    }
    // All but the first go on the stack, which any thread may use at once.
    for i in 1..CHUNK / size {
        push(c, p.wrapping_add(i * size));
    }
    p
}

// SAFETY: blocks of a class are at least as large and as aligned as asked (powers of two, carved from page
// aligned chunks), are handed out once until given back, and large ones are mappings of their own.
unsafe impl GlobalAlloc for Own {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class(&layout) {
            Some(c) => pop(c),
            None if layout.align() <= 4096 => map(pages(layout.size())),
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
