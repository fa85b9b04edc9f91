//! What the machine can do at best: two processes and a piece of shared memory, nothing around them.
//!
//! `line`: a number goes to the other process in one cache line and comes back in another. No exchange of
//! messages can be faster. `ring`: the simplest ring of bytes that is right, a copy in and a copy out; both sides
//! only ever look, nobody sleeps.

use std::cell::UnsafeCell;
use std::io::{self, Error};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

const SIZE: usize = 256 << 10;

#[repr(C, align(128))]
struct Line(AtomicU64);

/// What both processes see. All zeroes is its beginning.
#[repr(C)]
struct Shared {
    there: Line,
    back: Line,
    over: Line,
    bytes: UnsafeCell<[u8; SIZE]>,
}

/// Shared memory and a second process that has run `other`, waited for when dropped.
struct Pair {
    shared: *mut Shared,
    child: i32,
}

impl Pair {
    fn new(other: impl FnOnce(*mut Shared)) -> io::Result<Self> {
        let (prot, how) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, nowhere in particular.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Shared>(), prot, how, -1, 0) };
        if p == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        // SAFETY: this process has one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            other(p.cast());
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(0) };
        }
        if child < 0 { Err(Error::last_os_error()) } else { Ok(Self { shared: p.cast(), child }) }
    }

    fn shared(&self) -> &Shared {
        // SAFETY: mapped for good; both processes touch only atomics and the inside of a cell.
        unsafe { &*self.shared }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.shared().over.0.store(1, Release);
        // SAFETY: our child, which ends when it sees `over`.
        unsafe { libc::waitpid(self.child, std::ptr::null_mut(), 0) };
    }
}

/// Looks until `done`, as the other side may need this very CPU: now and then it is given away.
fn look(mut done: impl FnMut() -> bool) {
    let mut n = 0u32;
    while !done() {
        std::hint::spin_loop();
        n += 1;
        if n.is_multiple_of(10_000) {
            std::thread::yield_now();
        }
    }
}

/// Round trips of a cache line, in nanoseconds.
pub fn line(time: Duration) -> io::Result<Vec<u32>> {
    let pair = Pair::new(|p| {
        // SAFETY: mapped by the parent before it forked.
        let s = unsafe { &*p };
        let mut last = 0;
        while s.over.0.load(Relaxed) == 0 {
            look(|| s.there.0.load(Acquire) != last || s.over.0.load(Relaxed) != 0);
            last = s.there.0.load(Acquire);
            s.back.0.store(last, Release);
        }
    })?;
    let s = pair.shared();
    let mut took = Vec::with_capacity(1 << 20);
    let start = Instant::now();
    let mut last = start;
    while last - start < time {
        let n = took.len() as u64 + 1;
        s.there.0.store(n, Release);
        look(|| s.back.0.load(Acquire) == n);
        let now = Instant::now();
        took.push((now - last).as_nanos() as u32);
        last = now;
    }
    Ok(took)
}

/// Copies of `size` bytes through a ring, per second. `size` divides the ring.
pub fn ring(time: Duration, size: usize) -> io::Result<f64> {
    if size == 0 || !SIZE.is_multiple_of(size) {
        return Err(Error::from(io::ErrorKind::InvalidInput));
    }
    let pair = Pair::new(|p| {
        // SAFETY: as above.
        let s = unsafe { &*p };
        let (mut cons, mut prod) = (0u64, 0u64);
        let mut to = vec![0u8; size];
        loop {
            look(|| {
                prod = if cons < prod { prod } else { s.there.0.load(Acquire) };
                cons < prod || s.over.0.load(Acquire) != 0
            });
            if cons == prod {
                return;
            }
            // SAFETY: the piece lies within the ring; the producer does not touch it before `back` passes it.
            unsafe {
                let from = s.bytes.get().cast::<u8>().add(cons as usize % SIZE);
                std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), size);
            }
            std::hint::black_box(&mut to);
            cons += size as u64;
            s.back.0.store(cons, Release);
        }
    })?;
    let s = pair.shared();
    let (mut prod, mut cons) = (0u64, 0u64);
    let from = vec![7u8; size];
    let start = Instant::now();
    while !(prod / size as u64).is_multiple_of(64) || start.elapsed() < time {
        if prod - cons == SIZE as u64 {
            look(|| {
                cons = s.back.0.load(Acquire);
                prod - cons < SIZE as u64
            });
        }
        // SAFETY: the piece lies within the ring; the consumer does not touch it before `there` passes it.
        unsafe {
            let to = s.bytes.get().cast::<u8>().add(prod as usize % SIZE);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, size);
        }
        prod += size as u64;
        s.there.0.store(prod, Release);
    }
    look(|| s.back.0.load(Acquire) == prod);
    Ok((prod / size as u64) as f64 / start.elapsed().as_secs_f64())
}
