//! select and pselect, as polls of the same fds.
//!
//! A set of fds without a connection that may use the ring goes to libc as it is. What the bits mean is
//! fs/select.c's: readable is POLLIN, POLLHUP or POLLERR; writable is POLLOUT or POLLERR; exceptional is
//! POLLPRI. An fd that is not open makes the whole call fail. select leaves the time that was left.
//!
//! The kernel looks at no bits beyond its table of the process's descriptors, so a program may say that its sets are
//! longer than they are: `select(getdtablesize(), …)` with an `fd_set`. Our descriptors, numbered high, make that table
//! longer than the program's own would; hence [`SPAN`].

use super::super::data::{alias, hook};
use super::{Found, Watches, nanoseconds, wait};
use crate::fd_table;
use crate::hook::{fail, given, plausible};
use crate::real::real;
use engine::{internal_fds, sys};
use libc::{c_int, c_short, fd_set, pollfd, sigset_t, timespec, timeval};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

const READ: c_short = libc::POLLRDNORM | libc::POLLRDBAND | libc::POLLIN | libc::POLLHUP | libc::POLLERR;
const WRITE: c_short = libc::POLLWRBAND | libc::POLLWRNORM | libc::POLLOUT | libc::POLLERR;
const EXCEPT: c_short = libc::POLLPRI;
const MEANS: [c_short; 3] = [READ, WRITE, EXCEPT];
/// What poll is asked for; errors and hang-ups come unasked.
const ASKS: [c_short; 3] = [libc::POLLIN | libc::POLLRDBAND, libc::POLLOUT | libc::POLLWRBAND, libc::POLLPRI];

const BITS: usize = usize::BITS as usize;
const FEW: usize = 64;

/// Bits that are looked at: as many as an `fd_set` has; or as many as the kernel's table would have, a power of two,
/// were only the program's descriptors in it.
static SPAN: AtomicI32 = AtomicI32::new(libc::FD_SETSIZE as c_int);

/// The program has descriptor `fd`.
#[inline]
pub fn numbered(fd: c_int) {
    // Relaxed, here and below: the program knows of `fd` only after this.
    let span = SPAN.load(Relaxed);
    // Some come to a program by ways that are not seen (SCM_RIGHTS, say), and have the next numbers.
    if fd >= span - span / 16 {
        widen(fd);
    }
}

#[cold]
fn widen(fd: c_int) {
    let n = (fd as u32 + fd as u32 / 8).next_power_of_two();
    SPAN.fetch_max(c_int::try_from(n).unwrap_or(c_int::MAX), Relaxed);
}

/// How many bits of `n` count.
fn spanned(n: c_int) -> c_int {
    if n <= libc::FD_SETSIZE as c_int { n } else { counted(n) }
}

#[cold]
fn counted(n: c_int) -> c_int {
    /// The program's high numbers that it was started with are known.
    static KNOWN: AtomicBool = AtomicBool::new(false);
    if !KNOWN.load(Relaxed) {
        if let Some(fd) = highest(libc::FD_SETSIZE as c_int, n) {
            numbered(fd);
        }
        KNOWN.store(true, Relaxed);
    }
    n.min(SPAN.load(Relaxed))
}

/// The program's highest descriptor in `from..to`.
fn highest(from: c_int, to: c_int) -> Option<c_int> {
    let mut list = [pollfd { fd: -1, events: 0, revents: 0 }; 256];
    let mut top = None;
    let mut at = from;
    while at < to {
        let n = list.len().min((to - at) as usize);
        for (p, fd) in list[..n].iter_mut().zip(at..) {
            *p = pollfd { fd, events: 0, revents: 0 };
        }
        // Of a number that is not open poll says so. Should it fail, all count.
        if sys::poll(&mut list[..n], Some(0)) < 0 {
            return Some(to - 1);
        }
        let open = |p: &&pollfd| p.revents & libc::POLLNVAL == 0 && !internal_fds::contains(p.fd);
        top = list[..n].iter().rfind(open).map(|p| p.fd).or(top);
        at += n as c_int;
    }
    top
}

/// The program's three sets: words of bits, as many as hold `n`.
#[derive(Clone, Copy, Debug)]
struct Sets {
    sets: [*mut usize; 3],
    n: usize,
}

impl Sets {
    fn words(&self) -> usize {
        self.n.div_ceil(BITS)
    }

    /// Word `w` of set `i`, without the bits beyond `n`.
    fn word(&self, i: usize, w: usize) -> usize {
        let Some(p) = self.sets.get(i).filter(|p| !p.is_null()) else { return 0 };
        let beyond = (w + 1) * BITS;
        let keep = if beyond <= self.n { usize::MAX } else { usize::MAX >> (beyond - self.n) };
        // SAFETY: w < words(), and the program's set holds as many: the kernel reads whole words too.
        unsafe { p.add(w).read_unaligned() & keep }
    }

    fn set_word(&self, i: usize, w: usize, bits: usize) {
        if let Some(p) = self.sets.get(i).filter(|p| !p.is_null()) {
            // SAFETY: as in `word`; the kernel writes whole words too.
            unsafe { p.add(w).write_unaligned(bits) }
        }
    }

    /// Calls `f(fd, events)` for each fd that is in a set.
    fn each(&self, mut f: impl FnMut(c_int, c_short)) {
        for w in 0..self.words() {
            let of = [self.word(0, w), self.word(1, w), self.word(2, w)];
            let mut any = of[0] | of[1] | of[2];
            while any != 0 {
                let bit = any.trailing_zeros();
                any &= any - 1;
                let mut events = 0;
                for (word, ask) in of.iter().zip(ASKS) {
                    if word >> bit & 1 != 0 {
                        events |= ask;
                    }
                }
                f((w * BITS) as c_int + bit as c_int, events);
            }
        }
    }

    /// Writes the answer: `fds` is in the order of `each`. How many bits are set.
    fn answer(&self, fds: &[pollfd]) -> c_int {
        let mut n = 0;
        let mut rest = fds.iter().peekable();
        for w in 0..self.words() {
            let mut out = [0usize; 3];
            while let Some(p) = rest.next_if(|p| p.fd as usize / BITS == w) {
                let bit = p.fd as usize % BITS;
                for i in 0..3 {
                    if p.revents & MEANS[i] != 0 && self.word(i, w) >> bit & 1 != 0 {
                        out[i] |= 1 << bit;
                        n += 1;
                    }
                }
            }
            for (i, bits) in out.into_iter().enumerate() {
                self.set_word(i, w, bits);
            }
        }
        n
    }
}

hook! {
    /// select(2).
    fn select(n: c_int, r: *mut fd_set, w: *mut fd_set, x: *mut fd_set, tv: *mut timeval) -> c_int {
        let n = spanned(n);
        let plain = || real!(select(n => c_int, r => *mut fd_set, w => *mut fd_set, x => *mut fd_set, tv => *mut timeval) -> c_int);
        if fd_table::is_empty() {
            return plain();
        }
        // SAFETY: the program's, or null.
        let time = match unsafe { given(tv) } {
            None if tv.is_null() => None,
            None => return plain(),
            Some(t) if t.tv_sec >= 0 && t.tv_usec >= 0 => {
                Some((t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add((t.tv_usec as u64).saturating_mul(1000)))
            }
            Some(_) => return plain(),
        };
        let start = if tv.is_null() { 0 } else { sys::now_ns() };
        match waited(n, [r, w, x], time, std::ptr::null(), plain) {
            (r, true) => r,
            (r, false) => {
                if let Some(t) = time {
                    let left = t.saturating_sub(sys::now_ns().saturating_sub(start)) / 1000;
                    // SAFETY: not null, since there is a time; the program's.
                    unsafe { *tv = timeval { tv_sec: (left / 1_000_000) as i64, tv_usec: (left % 1_000_000) as i64 } };
                }
                r
            }
        }
    }
}
alias! { __select = select(n: c_int, r: *mut fd_set, w: *mut fd_set, x: *mut fd_set, tv: *mut timeval) -> c_int; }

hook! {
    /// pselect(2).
    fn pselect(n: c_int, r: *mut fd_set, w: *mut fd_set, x: *mut fd_set, ts: *const timespec, mask: *const sigset_t) -> c_int {
        let n = spanned(n);
        let plain = || real!(pselect(n => c_int, r => *mut fd_set, w => *mut fd_set, x => *mut fd_set, ts => *const timespec, mask => *const sigset_t) -> c_int);
        if fd_table::is_empty() {
            return plain();
        }
        // SAFETY: the program's, or null.
        match unsafe { nanoseconds(ts) } {
            Ok(time) => waited(n, [r, w, x], time, mask, plain).0,
            Err(()) => plain(),
        }
    }
}

/// The call's result, and whether libc has made it all.
fn waited(
    n: c_int,
    sets: [*mut fd_set; 3],
    time: Option<u64>,
    mask: *const sigset_t,
    plain: impl Fn() -> c_int,
) -> (c_int, bool) {
    if n <= 0 {
        return (plain(), true);
    }
    let sets = Sets { sets: sets.map(|s| s.cast()), n: n as usize };
    if sets.sets.iter().any(|s| !s.is_null() && !plausible(*s, sets.words() * size_of::<usize>())) {
        return (plain(), true);
    }
    let (mut all, mut ours) = (0, false);
    sets.each(|fd, _| {
        all += 1;
        ours |= fd_table::lookup(fd).is_some();
    });
    if !ours {
        return (plain(), true);
    }
    let mut few = [pollfd { fd: -1, events: 0, revents: 0 }; FEW];
    let mut many;
    let fds: &mut [pollfd] = if all <= FEW {
        &mut few[..all]
    } else {
        many = vec![pollfd { fd: -1, events: 0, revents: 0 }; all];
        &mut many
    };
    let mut at = 0;
    sets.each(|fd, events| {
        if let Some(p) = fds.get_mut(at) {
            *p = pollfd { fd, events, revents: 0 };
        }
        at += 1;
    });
    let mut watches = Watches::none();
    match watches.scan(fds) {
        Found::Nothing => return (plain(), true),
        Found::Tcp if time == Some(0) => return (watches.on_tcp(&plain), true),
        Found::Tcp if watches.pin() => return (watches.on_tcp(&plain), true),
        _ => {}
    }
    let start = sys::now_ns();
    loop {
        let left = time.map(|t| t.saturating_sub(sys::now_ns().saturating_sub(start)));
        let r = wait(fds, &mut watches, left, mask);
        if r < 0 {
            return (r, false);
        }
        if fds.iter().any(|p| p.revents & libc::POLLNVAL != 0) {
            return (fail(libc::EBADF), false);
        }
        // A hang-up of an fd that is only asked for writing, say: poll speaks of it, select does not.
        let unasked = |p: &pollfd| {
            p.revents != 0 && !(0..3).any(|i| p.events & ASKS[i] != 0 && p.revents & MEANS[i] != 0)
        };
        if r > 0 && left != Some(0) && fds.iter().all(|p| p.revents == 0 || unasked(p)) {
            fds.iter_mut().filter(|p| unasked(p)).for_each(|p| p.fd = !p.fd);
            continue;
        }
        fds.iter_mut().filter(|p| p.fd < 0).for_each(|p| p.fd = !p.fd);
        return (sets.answer(fds), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fd: c_int, revents: c_short) -> pollfd {
        pollfd { fd, events: 0, revents }
    }

    #[test]
    fn sets_become_a_list_and_back() {
        let mut r = [1usize << 3 | 1 << 63, 1 << 2 | 1 << 9];
        let mut w = [1usize << 3, 0];
        let sets = Sets { sets: [r.as_mut_ptr(), w.as_mut_ptr(), std::ptr::null_mut()], n: BITS + 5 };
        let mut seen = Vec::new();
        sets.each(|fd, e| seen.push((fd, e)));
        // Bit 73 lies beyond n.
        assert_eq!(seen, [(3, ASKS[0] | ASKS[1]), (63, ASKS[0]), (66, ASKS[0])]);
        let n = sets.answer(&[entry(3, libc::POLLIN), entry(63, libc::POLLHUP), entry(66, 0)]);
        assert_eq!(n, 2);
        assert_eq!(r, [1 << 3 | 1 << 63, 0]);
        assert_eq!(w, [0, 0]);
    }

    #[test]
    fn an_error_is_readable_and_writable() {
        let (mut r, mut w, mut x) = ([2usize], [2usize], [2usize]);
        let sets = Sets { sets: [r.as_mut_ptr(), w.as_mut_ptr(), x.as_mut_ptr()], n: 2 };
        assert_eq!(sets.answer(&[entry(1, libc::POLLERR)]), 2);
        assert_eq!((r, w, x), ([2], [2], [0]));
        let mut r = [2usize];
        let sets = Sets { sets: [r.as_mut_ptr(), w.as_mut_ptr(), std::ptr::null_mut()], n: 2 };
        assert_eq!(sets.answer(&[entry(1, libc::POLLHUP)]), 1);
        assert_eq!((r, w), ([2], [0]));
    }
}
