//! poll and select: the program's list with doorbells added.
//!
//! A list without a connection that may use the ring goes to libc as it is; connections that are on TCP are
//! pinned there while the call may sleep. Otherwise:
//!
//! ```text
//! look at the rings ── something ready ──> merge with a look at the kernel ──> return
//!   │ nothing
//! poll for a while (spin.rs)
//!   │ nothing
//! enter each doorbell as a sleeper, arm, look again   [bell.recheck], see engine::wait::doorbell
//!   │ nothing
//! ppoll over the list (without POLLOUT of TCP where the stream is in the ring) and the doorbells
//!   │
//! leave; empty the doorbells that rang; merge; again with the time that is left
//! ```
//!
//! Doorbells are entered in the order of their connections' addresses and each once, so that two threads
//! that wait for the same ones do not wait for each other.
//!
//! An epoll fd in the list is the kernel's to judge; its hot members are armed first (`epoll::show_to_poll`).

mod select;

pub use select::{numbered, pselect, select};

use super::data::{alias, hook};
use super::epoll;
use super::sleep::wait_in_window;
use super::spin::Habit;
use crate::fd_table::{self, Ref};
use crate::hook::{fail, given, set_errno};
use crate::real::real;
use engine::reason::Reason;
use engine::sys;
use libc::{c_int, c_short, nfds_t, pollfd, sigset_t, size_t, timespec};

const IN: c_short = libc::POLLIN | libc::POLLRDNORM;
const OUT: c_short = libc::POLLOUT | libc::POLLWRNORM;
/// What the kernel says of TCP's reading end.
const HIDDEN: c_short = IN | libc::POLLRDHUP | libc::POLLPRI | libc::POLLRDBAND;
const ALWAYS: c_short = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;

/// Connections, and poll entries, that need no allocation.
const FEW: usize = 16;
const FEW_FDS: usize = 64;
/// Polls answered by the ring alone between looks at the kernel.
const KERNEL_TURNS: u32 = 8;

thread_local! {
    static HABIT: Habit = const { Habit::new() };
    static TURNS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

hook! {
    /// poll(2).
    fn poll(fds: *mut pollfd, n: nfds_t, ms: c_int) -> c_int {
        let plain = || real!(poll(fds => *mut pollfd, n => nfds_t, ms => c_int) -> c_int);
        // SAFETY: the program's own arguments.
        let Some(list) = (unsafe { slice(fds, n) }) else { return plain() };
        let mut watches = Watches::none();
        match watches.scan(list) {
            Found::Nothing => plain(),
            Found::Tcp if ms == 0 => plain(),
            Found::Tcp if watches.pin() => watches.on_tcp(&plain),
            _ => wait(list, &mut watches, (ms >= 0).then_some(ms as u64 * 1_000_000), std::ptr::null()),
        }
    }
}
alias! { __poll = poll(fds: *mut pollfd, n: nfds_t, ms: c_int) -> c_int; }

hook! {
    /// ppoll(2).
    fn ppoll(fds: *mut pollfd, n: nfds_t, ts: *const timespec, mask: *const sigset_t) -> c_int {
        let plain = || real!(ppoll(fds => *mut pollfd, n => nfds_t, ts => *const timespec, mask => *const sigset_t) -> c_int);
        // SAFETY: the program's own arguments.
        let Some(list) = (unsafe { slice(fds, n) }) else { return plain() };
        // SAFETY: as above.
        let Ok(time) = (unsafe { nanoseconds(ts) }) else { return plain() };
        let mut watches = Watches::none();
        match watches.scan(list) {
            Found::Nothing => plain(),
            Found::Tcp if time == Some(0) => watches.on_tcp(&plain),
            Found::Tcp if watches.pin() => watches.on_tcp(&plain),
            _ => wait(list, &mut watches, time, mask),
        }
    }
}

hook! {
    /// What poll is with _FORTIFY_SOURCE: `len` bytes are at `fds`.
    fn __poll_chk(fds: *mut pollfd, n: nfds_t, ms: c_int, len: size_t) -> c_int {
        if len / size_of::<pollfd>() < n as usize {
            return real!(__poll_chk(fds => *mut pollfd, n => nfds_t, ms => c_int, len => size_t) -> c_int);
        }
        // SAFETY: the program's own arguments.
        unsafe { poll(fds, n, ms) }
    }
}

hook! {
    /// What ppoll is with _FORTIFY_SOURCE.
    fn __ppoll_chk(fds: *mut pollfd, n: nfds_t, ts: *const timespec, mask: *const sigset_t, len: size_t) -> c_int {
        if len / size_of::<pollfd>() < n as usize {
            return real!(__ppoll_chk(fds => *mut pollfd, n => nfds_t, ts => *const timespec, mask => *const sigset_t, len => size_t) -> c_int);
        }
        // SAFETY: the program's own arguments.
        unsafe { ppoll(fds, n, ts, mask) }
    }
}

/// The list, if any of it can be ours.
///
/// # Safety
/// `fds` is the program's array of `n`, or what it passes as one.
#[inline]
unsafe fn slice<'a>(fds: *mut pollfd, n: nfds_t) -> Option<&'a mut [pollfd]> {
    if fd_table::is_empty()
        || n > c_int::MAX as nfds_t
        || !crate::hook::plausible(fds, n as usize * size_of::<pollfd>())
    {
        return None;
    }
    // SAFETY: as the caller vouches; the kernel writes there as well.
    Some(unsafe { std::slice::from_raw_parts_mut(fds, n as usize) })
}

/// The time-out; fails for one that the kernel refuses.
///
/// # Safety
/// `ts` is null or the program's.
unsafe fn nanoseconds(ts: *const timespec) -> Result<Option<u64>, ()> {
    if ts.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller vouches.
    match unsafe { given(ts) } {
        None => Err(()),
        Some(t) if t.tv_sec >= 0 && (0..1_000_000_000).contains(&t.tv_nsec) => {
            Ok(Some((t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64)))
        }
        Some(_) => Err(()),
    }
}

/// What a list has in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// No connection of ours.
    Nothing,
    /// Connections on TCP.
    Tcp,
    /// A connection that may use the ring, or a set that such are in.
    Ring,
}

/// How a connection in the list is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the kernel's word on the TCP fd.
    Kernel,
    /// As above, and it stays on TCP meanwhile.
    Pinned,
    /// By the ring and its doorbell as well.
    Ring,
}

/// A connection in the list.
#[derive(Debug)]
struct Watch {
    e: Ref,
    fd: c_int,
    /// Its place in the list.
    at: usize,
    way: Way,
    /// The doorbell is entered; its place in the kernel's list. Of several watches of one connection, one.
    bell: Option<usize>,
    armed: u32,
}

/// The connections in a list.
struct Watches {
    few: [Option<Watch>; FEW],
    many: Vec<Option<Watch>>,
    n: usize,
    /// fds in the list that are not connections of ours.
    others: usize,
    /// Epoll sets among them that have doorbells, in them or in sets in them.
    sets: usize,
}

impl Watches {
    fn none() -> Self {
        Watches { few: [const { None }; FEW], many: Vec::new(), n: 0, others: 0, sets: 0 }
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Watch> {
        self.list().iter_mut().flatten()
    }

    fn list(&mut self) -> &mut [Option<Watch>] {
        if self.many.is_empty() {
            let n = self.n.min(FEW);
            &mut self.few[..n]
        } else {
            &mut self.many
        }
    }

    fn push(&mut self, w: Watch) {
        if self.n < FEW {
            self.few[self.n] = Some(w);
        } else {
            if self.n == FEW {
                self.many.extend(self.few.iter_mut().map(Option::take));
            }
            self.many.push(Some(w));
        }
        self.n += 1;
    }

    #[inline]
    fn scan(&mut self, fds: &[pollfd]) -> Found {
        for (at, p) in fds.iter().enumerate() {
            if p.fd < 0 {
                continue;
            }
            match fd_table::lookup(p.fd) {
                None => self.others += 1,
                Some(e) if e.is_set() => {
                    self.others += 1;
                    self.sets += usize::from(epoll::show_to_poll(&e));
                }
                Some(e) if e.is_stream() => {
                    e.sock.note_wait();
                    e.sock.meet(p.fd);
                    e.sock.obey(p.fd);
                    self.push(Watch { e, fd: p.fd, at, way: Way::Kernel, bell: None, armed: 0 })
                }
                Some(_) => self.others += 1,
            }
        }
        if self.sets > 0 {
            Found::Ring
        } else if self.n == 0 {
            Found::Nothing
        } else if self.all().any(|w| w.e.sock.needs_bell() || w.e.sock.may_be_reset()) {
            Found::Ring
        } else {
            Found::Tcp
        }
    }

    /// Keeps the connections on TCP; false if one has begun to switch.
    fn pin(&mut self) -> bool {
        let mut all = true;
        for w in self.all() {
            if w.e.sock.pin_tcp() {
                w.way = Way::Pinned;
            } else if w.e.sock.bell().is_some() && w.e.sock.needs_bell() {
                all = false;
            }
        }
        if !all {
            self.unpin();
        }
        all
    }

    fn unpin(&mut self) {
        for w in self.all() {
            if w.way == Way::Pinned {
                w.e.sock.unpin_tcp();
                w.way = Way::Kernel;
            }
        }
    }

    /// The program's call, made by libc, with the connections as they are. No longer [pinned](Self::pin) after it.
    fn on_tcp(&mut self, plain: &dyn Fn() -> c_int) -> c_int {
        let r = wait_in_window(&mut || self.abandon(), false, plain);
        self.unpin();
        r
    }

    /// The call will not come back.
    #[cold]
    fn abandon(&mut self) {
        self.leave(&[]);
        drop(std::mem::replace(self, Watches::none()));
    }

    /// Whether a ring has something that the list asks for.
    fn ring_ready(&mut self, fds: &[pollfd]) -> bool {
        self.all().any(|w| ring_bits(&w.e, fds, w.at) != 0)
    }

    /// Does what peers have asked for meanwhile, of which the doorbells that were emptied told. Whether there was anything.
    fn obey(&mut self) -> bool {
        let mut any = false;
        for w in self.all().filter(|w| w.e.sock.is_to_obey()) {
            w.e.sock.obey(w.e.sock.fd_now(w.fd));
            any |= !w.e.sock.is_to_obey();
        }
        any
    }

    fn beside_peer(&mut self) -> bool {
        self.all().find(|w| w.e.sock.needs_bell()).is_some_and(|w| w.e.sock.beside_peer())
    }

    /// Whether the answer needs the kernel's word, though a ring has something.
    fn ask_kernel(&mut self, fds: &[pollfd]) -> bool {
        self.others > 0 || self.all().any(|w| !w.e.sock.tcp_silent(wants(fds, w.at)))
    }

    /// Becomes a sleeper on each connection: doorbells entered and armed, or pinned to TCP. False: the kernel has refused a
    /// look at a doorbell (a signal, no memory), which is no word on the peer; look again.
    fn enter(&mut self, fds: &[pollfd], mut bell_at: usize) -> bool {
        self.list().sort_unstable_by_key(|w| w.as_ref().map_or(usize::MAX, |w| w.e.id()));
        let mut last = 0;
        let mut whole = true;
        for w in self.all() {
            w.way = Way::Kernel;
            w.armed = wants(fds, w.at);
            if !w.e.sock.needs_bell() {
                if w.e.sock.pin_tcp() {
                    w.way = Way::Pinned;
                    continue;
                }
                if !w.e.sock.needs_bell() {
                    continue;
                }
            }
            if w.e.id() != last {
                last = w.e.id();
                // False: the peer is gone, and all that comes now comes by the kernel.
                if !w.e.sock.poll_enter(w.e.sock.fd_now(w.fd), w.armed) {
                    whole &= w.e.sock.is_peer_gone();
                    continue;
                }
                w.bell = Some(bell_at);
                bell_at += 1;
            }
            w.way = Way::Ring;
            w.e.sock.arm(w.armed);
        }
        whole
    }

    /// The sleep is over, or does not take place. `kernel` is the list that was slept on.
    fn leave(&mut self, kernel: &[pollfd]) {
        for w in self.all() {
            if w.way == Way::Pinned {
                w.e.sock.unpin_tcp();
            }
            w.way = Way::Kernel;
            if let Some(b) = w.bell.take() {
                w.e.sock.poll_leave(w.armed);
                if kernel.get(b).is_some_and(|p| p.revents != 0) {
                    w.e.sock.count_wait(true);
                    epoll::rang(&w.e, w.e.sock.fd_now(w.fd), None);
                }
            }
            if w.e.sock.flushing() && kernel.get(w.at).is_some_and(|p| p.revents & OUT != 0) {
                epoll::progress(&w.e, w.e.sock.fd_now(w.fd));
            }
            if w.e.sock.take_changed() {
                epoll::resync(&w.e, w.fd);
            }
        }
    }

    /// All connections go back to TCP.
    #[cold]
    fn back_to_tcp(&mut self) {
        for w in self.all() {
            super::sockets::back_to_tcp(&w.e, w.fd, Reason::NoFds);
        }
    }

    /// The list for the kernel: the program's, with TCP's POLLOUT only where it counts, and the doorbells.
    fn kernel_list(&mut self, fds: &[pollfd], out: &mut [pollfd]) -> usize {
        let mut n = fds.len();
        for (o, p) in out.iter_mut().zip(fds) {
            *o = pollfd { fd: p.fd, events: p.events, revents: 0 };
        }
        for w in self.all() {
            if let Some(o) = out.get_mut(w.at) {
                o.fd = w.e.sock.fd_now(w.fd);
                if w.e.sock.flushing() {
                    o.events |= libc::POLLOUT;
                } else if w.e.sock.look_at(w.fd).from_kernel & libc::POLLOUT as u32 == 0 {
                    o.events &= !(OUT | libc::POLLWRBAND);
                }
                if w.e.sock.hides_tcp() {
                    o.events &= !HIDDEN;
                }
            }
            if let (Some(b), Some(fd)) = (w.bell, w.e.sock.bell())
                && let Some(o) = out.get_mut(b)
            {
                *o = pollfd { fd, events: libc::POLLIN, revents: 0 };
                n = n.max(b + 1);
            }
        }
        n
    }

    /// The kernel takes a set for readable when a doorbell in it has rung, which need not be for the program.
    fn judge_sets(&self, kernel: &mut [pollfd]) {
        if self.sets == 0 {
            return;
        }
        for p in kernel.iter_mut().filter(|p| p.revents & IN != 0) {
            if fd_table::epoll(p.fd).is_some_and(|e| !epoll::has_something(&e, p.fd)) {
                p.revents = 0;
            }
        }
    }

    /// The answer: the kernel's list merged with the rings. How many fds have something.
    fn merge(&mut self, fds: &mut [pollfd], kernel: &mut [pollfd]) -> c_int {
        self.judge_sets(kernel);
        for (p, k) in fds.iter_mut().zip(kernel.iter()) {
            p.revents = k.revents;
        }
        for w in self.all() {
            let Some(mut k) = kernel.get(w.at).copied() else { continue };
            if w.e.sock.hides_tcp() {
                k.revents &= !(HIDDEN | libc::POLLHUP);
            }
            if k.revents & libc::POLLERR != 0 {
                w.e.sock.kernel_tells(w.e.sock.fd_now(w.fd));
            } else if k.revents & (IN | libc::POLLRDHUP | libc::POLLHUP) != 0 {
                // What the kernel takes for the end of the stream may be a reset; the ring says so then.
                let _ = w.e.sock.judge(w.e.sock.fd_now(w.fd));
            }
            let ring = ring_bits(&w.e, fds, w.at);
            if k.revents & IN != 0 {
                w.e.sock.kernel_readable();
            }
            if let Some(p) = fds.get_mut(w.at) {
                // `k.events` has no POLLOUT where the kernel's does not count, except to move ring bytes.
                let mine = match k.revents & libc::POLLHUP {
                    0 if w.e.sock.flushing() => k.revents & !OUT,
                    0 => k.revents,
                    // A socket that has hung up is writable, as tcp_poll has it.
                    _ => k.revents | OUT,
                };
                p.revents = mine & (p.events | ALWAYS) | ring;
            }
        }
        fds.iter().filter(|p| p.revents != 0).count() as c_int
    }
}

/// poll's bits that the program wants of the list's entry `at`, as the engine names them.
fn wants(fds: &[pollfd], at: usize) -> u32 {
    let e = fds.get(at).map_or(0, |p| p.events);
    let mut bits = 0;
    if e & IN != 0 {
        bits |= libc::POLLIN as u32;
    }
    if e & OUT != 0 {
        bits |= libc::POLLOUT as u32;
    }
    bits
}

/// What the ring has of what entry `at` asks for.
fn ring_bits(e: &Ref, fds: &[pollfd], at: usize) -> c_short {
    fds.get(at).map_or(0, |p| widen(e.sock.look_at(p.fd).ready) & (p.events | ALWAYS))
}

/// TCP reports the NORM bits along with POLLIN and POLLOUT (net/ipv4/tcp.c, tcp_poll).
fn widen(ready: u32) -> c_short {
    let mut b = 0;
    if ready & libc::POLLIN as u32 != 0 {
        b |= IN;
    }
    if ready & libc::POLLOUT as u32 != 0 {
        b |= OUT;
    }
    // A reset that only the engine knows of: what tcp_poll reports of a socket that was reset.
    if ready & libc::POLLERR as u32 != 0 {
        b |= IN | OUT | libc::POLLERR | libc::POLLHUP | libc::POLLRDHUP;
    }
    b
}

/// Waits for a list with connections that may use the ring. `mask` holds while it sleeps.
#[cold]
fn wait(fds: &mut [pollfd], watches: &mut Watches, time: Option<u64>, mask: *const sigset_t) -> c_int {
    let need = fds.len() + watches.n;
    let mut few = [pollfd { fd: -1, events: 0, revents: 0 }; FEW_FDS];
    let mut many;
    let list: &mut [pollfd] = if need <= FEW_FDS {
        &mut few[..need]
    } else {
        many = vec![pollfd { fd: -1, events: 0, revents: 0 }; need];
        &mut many
    };
    let deadline = time.map(|t| sys::now_ns().saturating_add(t));
    let n_fds = fds.len();
    loop {
        let ready = watches.ring_ready(fds);
        let left = deadline.map(|d| d.saturating_sub(sys::now_ns()));
        if ready || left == Some(0) {
            return answer(fds, watches, &mut list[..n_fds], ready, mask);
        }
        if let Some(n) = polled(fds, watches, &mut list[..n_fds], left) {
            return n;
        }
        if !watches.enter(fds, n_fds) || watches.ring_ready(fds) || watches.obey() {
            watches.leave(&[]);
            continue;
        }
        let n = watches.kernel_list(fds, list);
        let left = deadline.map(|d| d.saturating_sub(sys::now_ns()));
        let r = sleep(watches, &mut list[..n], left, mask);
        let e = crate::hook::errno();
        if r > 0 && whole_resets(&list[..n]) {
            let _ = sys::poll(&mut list[..n], Some(0));
        }
        watches.leave(if r > 0 { &list[..n] } else { &[] });
        if r < 0 {
            if e == libc::EINVAL && n > n_fds {
                // The kernel takes no more entries than there may be fds (RLIMIT_NOFILE): do without doorbells.
                watches.back_to_tcp();
                continue;
            }
            set_errno(e);
            return r;
        }
        if r == 0 {
            list.iter_mut().for_each(|p| p.revents = 0);
        }
        if r > 0 && watches.all().any(|w| w.e.sock.owes_reset()) {
            // The kernel has been told since, and has more to say.
            continue;
        }
        let found = watches.merge(fds, &mut list[..n_fds]);
        if found > 0 || r == 0 {
            return found;
        }
    }
}

/// Something is ready in a ring, or there is no time left: the kernel's word is added.
fn answer(
    fds: &mut [pollfd],
    watches: &mut Watches,
    list: &mut [pollfd],
    ready: bool,
    mask: *const sigset_t,
) -> c_int {
    let turn = TURNS.with(|t| {
        t.set(t.get().wrapping_add(1));
        t.get()
    });
    watches.kernel_list(fds, list);
    if !ready || turn.is_multiple_of(KERNEL_TURNS) || watches.ask_kernel(fds) {
        // Without a mask no signal can be waiting for this very call.
        let r = if mask.is_null() { look(list) } else { sleep(watches, list, Some(0), mask) as isize };
        if r < 0 {
            return if mask.is_null() { fail(-r as c_int) } else { -1 };
        }
        watches.leave(list);
    }
    watches.merge(fds, list)
}

/// A look at the kernel while polling, where a sleeper would still sleep.
fn look(list: &mut [pollfd]) -> isize {
    let r = sys::poll(list, Some(0));
    if whole_resets(list) { sys::poll(list, Some(0)) } else { r }
}

/// A reset sets the error first and the state after (tcp_reset, net/ipv4/tcp_input.c), and wakes at the end, so a
/// sleeper sees all of it. Who looks because a doorbell has rung may see a part. It holds the socket's lock from
/// before to after, and TCP_INFO takes that lock: who has seen an error sees the whole after that. True: there is
/// one, look again.
fn whole_resets(list: &[pollfd]) -> bool {
    let mut any = false;
    for p in list.iter().filter(|p| p.revents & libc::POLLERR != 0) {
        let _ = sys::tcp_bytes(p.fd);
        any = true;
    }
    any
}

/// Polls for a while, if that has been of use; the answer if it is this time.
fn polled(
    fds: &mut [pollfd],
    watches: &mut Watches,
    list: &mut [pollfd],
    left: Option<u64>,
) -> Option<c_int> {
    if watches.n == 0 {
        return None;
    }
    let beside = watches.beside_peer();
    HABIT.with(|habit| {
        let mut spin = habit.begin(beside, left)?;
        loop {
            let ready = watches.ring_ready(fds);
            let kernel = spin.kernel_due();
            if ready || kernel {
                watches.kernel_list(fds, list);
                if (kernel || watches.ask_kernel(fds)) && look(list) > 0 {
                    watches.leave(list);
                }
                let n = watches.merge(fds, list);
                if n > 0 {
                    spin.paid();
                    watches.all().for_each(|w| w.e.sock.count_wait(false));
                    return Some(n);
                }
            }
            if !spin.again() {
                return None;
            }
        }
    })
}

/// Sleeps in libc's ppoll until the epoll set has something, or as long as is left.
pub(super) fn until_readable(epfd: c_int, left: Option<u64>, mask: *const sigset_t) -> c_int {
    let ts = left.map(to_timespec);
    let p = ts.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut set = pollfd { fd: epfd, events: libc::POLLIN, revents: 0 };
    let fds = &raw mut set;
    real!(ppoll(fds => *mut pollfd, 1 => nfds_t, p => *const timespec, mask => *const sigset_t) -> c_int)
}

fn to_timespec(ns: u64) -> timespec {
    timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

/// Sleeps in libc's ppoll: its cancellation point, its signal mask, its EINTR.
fn sleep(watches: &mut Watches, list: &mut [pollfd], left: Option<u64>, mask: *const sigset_t) -> c_int {
    let ts = left.map(to_timespec);
    let p = ts.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let (fds, n) = (list.as_mut_ptr(), list.len() as nfds_t);
    let call = || real!(ppoll(fds => *mut pollfd, n => nfds_t, p => *const timespec, mask => *const sigset_t) -> c_int);
    wait_in_window(&mut || watches.abandon(), left != Some(0), &call)
}
