//! epoll: the kernel's sets with doorbells in them, and a look at the hot connections in front.
//!
//! The kernel's epoll set stays the truth: it holds what the program put in, and in addition the doorbell of
//! each connection that uses the ring. So listeners, timers, pipes, plain TCP, HUP, nesting and fork are the
//! kernel's. `epoll_wait` looks at the *hot* members of the set in user space first; the others are armed,
//! which costs nothing until their doorbell rings.
//!
//! | member of a connection that uses the ring | who finds out that it is ready | it becomes |
//! | --- | --- | --- |
//! | cold: armed, and looked at after that | the peer rings, the kernel's set wakes | hot, when the ring is taken |
//! | hot | each `epoll_wait` of the set looks | cold, when armed with nothing there: before a sleep, or after many empty looks; disabled, when reported with EPOLLONESHOT |
//! | disabled | nobody; kernel events are swallowed | hot, by EPOLL_CTL_MOD |
//! | parked: taken out by the program, and still known to the kernel | nobody; the first kernel event takes it out there too | hot, when the program puts it in again |
//!
//! Hot as well: just added or modified, just switched, just found full by a writer.
//!
//! # Why no wake-up is lost
//!
//! A cold member is armed, or its ring is on the way, or it is hot:
//!
//! - `[bell.recheck]` (see `engine::wait::doorbell`): arm, fence, look; against publish, fence, look at the
//!   armed word. One of the two sees the other's store.
//! - The doorbell is edge-triggered in the kernel's set: each ring is an edge, and is kept until a wait takes
//!   it. Whoever empties the doorbell instead (another set, a poll, a blocking call on the same connection)
//!   makes the member hot in every set, after emptying it and before it arms for itself. Nobody but a ring
//!   takes the armed bits back while a set relies on them.
//! - If a thread sleeps on a set, all its members are cold, or another thread is inside `epoll_wait` of that
//!   set. A thread that leaves while others sleep, and whoever makes a member hot while others sleep, arms
//!   what is hot, looks, and *kicks* the set if something is there: the doorbell's registration is modified
//!   to ask for writability too, which a Unix socket always has, and that is an edge.
//! - `[epoll.watch]`: a set without such members sleeps in the kernel at once, but counted; the first member
//!   that needs a doorbell sees the count or is seen by the sleeper.
//! - A set in another set, a poll or a select is taken to have a sleeper always.
//!
//! Nor is one made up. A doorbell may ring with nothing for the program: an end that goes back to TCP rings before its
//! bytes come there, and one that asks its peer back rings whether that is armed or not. A wait on the set itself empties
//! it and sleeps on. From outside the kernel's set looks readable: who looks there, at any depth, empties such doorbells
//! before; who sleeps there waits for the set by poll(2), and takes nothing from it before he has emptied them.
//!
//! Kernel events do not starve: while members are ready the kernel is asked every few waits, whenever some
//! time has passed, as long as it has something, before polling, and at once where a ring can't say all that
//! was asked (the peer has left it, or one direction is on TCP). When the kernel fills a result the next one
//! begins with the members.
//!
//! # Order
//!
//! Who sends on one connection and then on another may count on the first being told of no later: the kernel has what is
//! ready in a list, in the order in which it came. Of the first, A, and the second, B, which is hot and found ready:
//!
//! - A is on TCP: the kernel is asked before a result from the ring goes out as long as connections of the set are.
//! - A is cold: its doorbell was rung before B's bytes were produced. With those their process says how many doorbells
//!   it has rung at ours (`[bell.order]`); when that has changed the kernel is asked before B is told of. (It counts the
//!   pair's doorbells, not the set's: at worst it is asked in vain.)
//! - A is hot and was looked at before B: it is looked at again before the result goes out, if there is room.

mod links;
mod set;

pub use links::{Members, Seat, adopt, before_close, comes_anew, fd_gone, leave, let_go, resync};
pub use set::Set;

use super::data::hook;
use super::making::made;
use super::sleep::{wait_in_window, wait_with};
use crate::fd_table::{self, Entry, Ref};
use crate::hook::to_libc;
use crate::real::real;
use engine::conn::{Sets, Socket};
use engine::sys;
use libc::{c_int, epoll_event, sigset_t, timespec};
use set::{Locked, Look, Out, Rung, is_bell, ours};
use std::cell::Cell;

hook! {
    /// epoll_create(2).
    fn epoll_create(size: c_int) -> c_int {
        created(made(|| real!(epoll_create(size => c_int) -> c_int)))
    }
}

hook! {
    /// epoll_create1(2).
    fn epoll_create1(flags: c_int) -> c_int {
        created(made(|| real!(epoll_create1(flags => c_int) -> c_int)))
    }
}

fn created(fd: c_int) -> c_int {
    if fd >= 0 {
        engine::conn::on_drained(links::drained);
        fd_table::add_epoll(fd);
    }
    fd
}

hook! {
    /// epoll_ctl(2).
    fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: *mut epoll_event) -> c_int {
        let plain = || real!(epoll_ctl(epfd => c_int, op => c_int, fd => c_int, event => *mut epoll_event) -> c_int);
        let e = fd_table::epoll(epfd);
        match (fd_table::stream(fd), e) {
            (None, None) => plain(),
            // SAFETY: the program's own arguments.
            (Some(s), Some(e)) => to_libc(unsafe { links::control(&e, &s, epfd, op, fd, event) }) as c_int,
            (Some(s), None) => {
                let mut r = plain();
                if r == 0 && op == libc::EPOLL_CTL_ADD {
                    // A set that we know nothing of could not be woken by the ring.
                    if s.sock.strands(true) {
                        // What is in it then is the relay's end.
                        sys::epoll_ctl(epfd, libc::EPOLL_CTL_DEL, fd, 0, 0);
                        let relayed = super::relay::take_over(&s, fd);
                        r = plain();
                        if relayed {
                            return r;
                        }
                    }
                    super::sockets::empty_into_tcp(&s, fd, engine::reason::Reason::AsyncIo);
                }
                r
            }
            (None, Some(e)) => {
                let inner = fd_table::epoll(fd);
                if let Some(inner) = &inner {
                    inner.set.set_nested();
                }
                let r = plain();
                if r == 0 {
                    if let Some(inner) = inner.as_ref().filter(|_| op == libc::EPOLL_CTL_ADD) {
                        e.set.contains(inner.entry());
                        show_outside(inner);
                    }
                    // SAFETY: the kernel has read it, if it is not null.
                    let ev = unsafe { event.as_ref() }.map(|_| unsafe { event.read_unaligned() });
                    match (op, ev) {
                        (libc::EPOLL_CTL_ADD, Some(v)) => links::early(&e, fd, v.events, v.u64),
                        (libc::EPOLL_CTL_MOD, Some(v)) => links::early_changed(&e, fd, Some((v.events, v.u64))),
                        _ => links::early_changed(&e, fd, None),
                    }
                }
                r
            }
        }
    }
}

/// How a program waits: which call, with its own notion of time and its signal mask.
#[derive(Clone, Copy)]
enum Call {
    Wait(c_int),
    Pwait(c_int, *const sigset_t),
    Pwait2(*const timespec, *const sigset_t),
}

/// Milliseconds in which `ns` fit.
fn to_ms(ns: Option<u64>) -> c_int {
    match ns {
        Some(ns) => ns.div_ceil(1_000_000).min(c_int::MAX as u64) as c_int,
        None => -1,
    }
}

impl Call {
    /// The time-out in nanoseconds, `None` for none. Fails for a time that the kernel refuses.
    fn time(&self) -> Result<Option<u64>, ()> {
        match *self {
            Call::Wait(ms) | Call::Pwait(ms, _) => Ok((ms >= 0).then_some(ms as u64 * 1_000_000)),
            // SAFETY: the program's timespec, or null.
            Call::Pwait2(ts, _) => match unsafe { ts.as_ref() } {
                None => Ok(None),
                Some(t) if t.tv_sec >= 0 && (0..1_000_000_000).contains(&t.tv_nsec) => {
                    Ok(Some((t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64)))
                }
                Some(_) => Err(()),
            },
        }
    }

    /// The call as the program made it.
    fn whole(&self, epfd: c_int, events: *mut epoll_event, max: c_int) -> c_int {
        match *self {
            Call::Wait(ms) => {
                real!(epoll_wait(epfd => c_int, events => *mut epoll_event, max => c_int, ms => c_int) -> c_int)
            }
            Call::Pwait(ms, mask) => {
                real!(epoll_pwait(epfd => c_int, events => *mut epoll_event, max => c_int, ms => c_int, mask => *const sigset_t) -> c_int)
            }
            Call::Pwait2(ts, mask) => {
                real!(epoll_pwait2(epfd => c_int, events => *mut epoll_event, max => c_int, ts => *const timespec, mask => *const sigset_t) -> c_int)
            }
        }
    }

    /// Sleeps until the set has something, which is left there, or as long as is left.
    fn until_readable(&self, epfd: c_int, left: Option<u64>) -> c_int {
        let mask = match *self {
            Call::Wait(_) => std::ptr::null(),
            Call::Pwait(_, mask) | Call::Pwait2(_, mask) => mask,
        };
        super::ready::until_readable(epfd, left, mask)
    }

    /// The call with the time that is left.
    fn rest(&self, epfd: c_int, events: *mut epoll_event, max: c_int, left: Option<u64>) -> c_int {
        match *self {
            Call::Wait(_) => Call::Wait(to_ms(left)).whole(epfd, events, max),
            Call::Pwait(_, mask) => Call::Pwait(to_ms(left), mask).whole(epfd, events, max),
            Call::Pwait2(_, mask) => {
                let ts = left.map(|n| timespec {
                    tv_sec: (n / 1_000_000_000) as i64,
                    tv_nsec: (n % 1_000_000_000) as i64,
                });
                let p = ts.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
                Call::Pwait2(p, mask).whole(epfd, events, max)
            }
        }
    }
}

hook! {
    /// epoll_wait(2).
    fn epoll_wait(epfd: c_int, events: *mut epoll_event, max: c_int, ms: c_int) -> c_int {
        // SAFETY: the program's own arguments.
        unsafe { wait(epfd, events, max, Call::Wait(ms)) }
    }
}

hook! {
    /// epoll_pwait(2).
    fn epoll_pwait(epfd: c_int, events: *mut epoll_event, max: c_int, ms: c_int, mask: *const sigset_t) -> c_int {
        // SAFETY: the program's own arguments.
        unsafe { wait(epfd, events, max, Call::Pwait(ms, mask)) }
    }
}

hook! {
    /// epoll_pwait2(2).
    fn epoll_pwait2(epfd: c_int, events: *mut epoll_event, max: c_int, ts: *const timespec, mask: *const sigset_t) -> c_int {
        // SAFETY: the program's own arguments.
        unsafe { wait(epfd, events, max, Call::Pwait2(ts, mask)) }
    }
}

/// # Safety
/// `events` is writable for `max` entries.
#[inline]
unsafe fn wait(epfd: c_int, events: *mut epoll_event, max: c_int, call: Call) -> c_int {
    let Some(e) = fd_table::epoll(epfd) else { return call.whole(epfd, events, max) };
    if events as usize >= sys::USER_END || max <= 0 || max > c_int::MAX / size_of::<epoll_event>() as c_int {
        return wait_with(&e, &|| call.whole(epfd, events, max));
    }
    e.set.is_called(epfd);
    e.set.note_wait();
    let inner = e.set.has_inner() && show_inner(&e);
    // SAFETY: as the caller vouches.
    let out = unsafe { Out::new(events, max as usize) };
    if inner || e.set.is_watching() {
        return Waiting { e: &e, epfd, out, call, asked: Cell::new(false), more: Cell::new(false) }.run(None);
    }
    e.set.sleepers.fall_asleep();
    let asked = !e.set.is_watching();
    let n = if asked { asleep(&e, false, &|| call.whole(epfd, events, max)) } else { 0 };
    e.set.sleepers.wake_up();
    if asked && (n <= 0 || !e.set.is_watching()) {
        return n;
    }
    // A connection has switched meanwhile.
    Waiting { e: &e, epfd, out, call, asked: Cell::new(asked), more: Cell::new(false) }
        .run(asked.then_some(n as usize))
}

/// A wait of libc's for the set, which has been told that a thread falls asleep.
fn asleep(e: &Ref, looked: bool, call: &dyn Fn() -> c_int) -> c_int {
    let mut undo = || {
        e.set.sleepers.wake_up();
        e.entry().release();
    };
    wait_in_window(&mut undo, looked, call)
}

/// A wait on a set whose members may be ready in the ring.
struct Waiting<'a> {
    e: &'a Ref,
    epfd: c_int,
    out: Out,
    call: Call,
    /// The kernel has been asked in this wait.
    asked: Cell<bool>,
    /// It may have been told since to look for more.
    more: Cell<bool>,
}

impl Waiting<'_> {
    /// `kernel` entries are in the result already, as the kernel gave them; `None`: it was not asked.
    fn run(&self, kernel: Option<usize>) -> c_int {
        let room = size_of::<epoll_event>();
        if kernel.is_none_or(|k| k == 0)
            && !super::direct::sandboxed()
            && !sys::is_accessible(self.out.ptr() as usize, room, true)
        {
            return self.nowhere();
        }
        self.wait(kernel)
    }

    /// The program's array can't be written: that is an error if there is something to write.
    #[cold]
    fn nowhere(&self) -> c_int {
        let mut one = epoll_event { events: 0, u64: 0 };
        // SAFETY: one entry, which lives over the wait.
        let out = unsafe { Out::new(&raw mut one, 1) };
        let n = Waiting { out, asked: Cell::new(false), more: Cell::new(false), ..*self }.wait(None);
        if n > 0 { crate::hook::fail(libc::EFAULT) } else { n }
    }

    /// See [`run`](Self::run).
    fn wait(&self, kernel: Option<usize>) -> c_int {
        let Ok(time) = self.call.time() else { return self.whole() };
        let now = sys::now_ns();
        let deadline = time.map(|t| now.saturating_add(t));
        let set = &self.e.set;
        let mut k = kernel;
        let mut looked = false;
        if k.is_none() {
            let Some(mut s) = set.locked() else { return self.whole() };
            if s.kernel_due(now) && s.is_hot() {
                drop(s);
                k = Some(self.ask_kernel(0));
            } else {
                // The first look is under the same lock: most waits end with it.
                if let Some(n) = self.result_unasked(s, Look::Fresh) {
                    return n;
                }
                looked = true;
            }
        }
        loop {
            if !std::mem::take(&mut looked)
                && let Some(n) = self.result(k, Look::Fresh)
            {
                return n;
            }
            let left = deadline.map(|d| d.saturating_sub(sys::now_ns()));
            if left == Some(0) {
                // A look, and the kernel's word; no sleep.
                let (p, max) = (self.out.ptr(), self.out.max as c_int);
                let n = wait_with(self.e, &|| self.call.rest(self.epfd, p, max, Some(0)));
                // Asked once more it would say the same once more, under data of the program's that are not ours to merge.
                self.asked.set(true);
                return if n < 0 { n } else { self.last_look(n as usize) };
            }
            if let Some(n) = self.spin(left) {
                return n;
            }
            {
                let Some(mut s) = set.locked() else { return self.whole() };
                if s.arm_hot() {
                    k = None;
                    continue;
                }
                set.sleepers.fall_asleep();
            }
            let left = deadline.map(|d| d.saturating_sub(sys::now_ns()));
            let (p, max) = (self.out.ptr(), self.out.max as c_int);
            if set.has_inner() && rings_inside(self.e.entry()) {
                let n = asleep(self.e, true, &|| self.call.until_readable(self.epfd, left));
                set.sleepers.wake_up();
                if n < 0 {
                    return n;
                }
                // What has woken it may have been a doorbell in an inner set, with nothing for the program, and another
                // may ring while the first is emptied.
                show_inner(self.e);
                k = Some(if has_something(self.e, self.epfd) { self.ask_kernel(0) } else { 0 });
                continue;
            }
            let n = asleep(self.e, true, &|| self.call.rest(self.epfd, p, max, left));
            set.sleepers.wake_up();
            if n <= 0 {
                return n;
            }
            self.asked.set(true);
            k = Some(n as usize);
        }
    }

    /// This is a signal handler that has interrupted a wait on the same set: what the kernel has.
    #[cold]
    fn whole(&self) -> c_int {
        let (p, max) = (self.out.ptr(), self.out.max as c_int);
        let n = wait_with(self.e, &|| self.call.whole(self.epfd, p, max));
        let mut kept = 0;
        for i in 0..n.max(0) as usize {
            let (events, data) = self.out.read(i);
            if !ours(data) {
                self.out.write(kept, events, data);
                kept += 1;
            }
        }
        if n < 0 { n } else { kept as c_int }
    }

    /// What the kernel has, into the result from entry `from` on.
    fn ask_kernel(&self, from: usize) -> usize {
        self.asked.set(true);
        self.more.set(false);
        let rest = self.out.max.saturating_sub(from);
        // SAFETY: a part of the program's array, as for `wait`.
        let n = unsafe { sys::epoll_poll(self.epfd, self.out.ptr().wrapping_add(from), rest) };
        n.max(0) as usize
    }

    /// The result made of `kernel` entries and the hot members, if there is any.
    fn result(&self, kernel: Option<usize>, look: Look) -> Option<c_int> {
        let k = kernel.map_or(0, |k| self.take_rings(0, k));
        let mut s = self.e.set.locked()?;
        if kernel.is_none() {
            return self.result_unasked(s, look);
        }
        s.kernel_said(k);
        self.result_under(s, k, look)
    }

    /// The same, the kernel not having been asked just now.
    #[inline]
    fn result_unasked<'s>(&'s self, mut s: Locked<'s>, look: Look) -> Option<c_int> {
        if s.kernel_comes_first() {
            drop(s);
            return self.result(Some(self.ask_kernel(0)), look);
        }
        self.result_under(s, 0, look)
    }

    /// The same, under the set's lock, of `k` kernel entries that are no doorbells.
    #[inline]
    fn result_under<'s>(&'s self, mut s: Locked<'s>, k: usize, look: Look) -> Option<c_int> {
        let set = &self.e.set;
        let mut n = s.fill(self.out, k, look);
        let mut k = k;
        if s.is_behind() {
            (s, n, k) = self.catch_up(s, n, look)?;
        }
        if n == 0 {
            return None;
        }
        // Not twice of what it has: that would be told twice.
        if (!self.asked.get() || k == 0 && self.more.get())
            && n < self.out.max
            && let Some(number) = s.is_partial()
        {
            // The end of a stream, for one, is in the kernel.
            drop(s);
            let k = self.ask_kernel(n);
            let k = self.take_rings(n, k);
            s = set.locked()?;
            s.kernel_said(k);
            n = s.add_kernel(self.out, n, k, number);
        }
        if s.is_hot() && set.others_sleep() {
            s.hand_over(self.epfd);
        }
        Some(n as c_int)
    }

    /// The kernel is asked before the result, which has `n` entries, goes on; so many then, the last of them the kernel's.
    #[cold]
    fn catch_up<'s>(
        &'s self,
        mut s: Locked<'s>,
        mut n: usize,
        look: Look,
    ) -> Option<(Locked<'s>, usize, usize)> {
        let mut k = 0;
        // Twice at most: peers that go on ringing are not to be waited for.
        for again in [true, false] {
            if !s.is_behind() {
                break;
            }
            let of = s.before_catching_up();
            drop(s);
            k = self.take_rings(n, self.ask_kernel(n));
            s = self.e.set.locked()?;
            s.kernel_said(k);
            n = s.go_on(self.out, n, k, of, look, again);
        }
        Some((s, n, k))
    }

    /// The result of a wait that may not sleep.
    fn last_look(&self, kernel: usize) -> c_int {
        if let Some(n) = self.result(Some(kernel), Look::Fresh) {
            return n;
        }
        if self.e.set.others_sleep()
            && let Some(mut s) = self.e.set.locked()
        {
            s.hand_over(self.epfd);
        }
        0
    }

    /// Takes the doorbells out of the kernel's entries and does what they ask for; how many entries remain.
    /// The entries begin at `from`.
    fn take_rings(&self, from: usize, kernel: usize) -> usize {
        let (mut kept, mut first) = (from, true);
        for i in from..from + kernel {
            let (events, data) = self.out.read(i);
            if !ours(data) || !is_bell(data) {
                let events = if ours(data) { self.attend(events, data) } else { events };
                self.out.write(kept, events, data);
                kept += 1;
                continue;
            }
            let Some(mut s) = self.e.set.locked() else { continue };
            let rung = s.rung(self.epfd, events, data);
            if first {
                first = false;
                if let Some(r) = &rung {
                    r.entry.sock.count_wait(true);
                }
                s.rouse(self.e.set.others_sleep());
            }
            drop(s);
            if let Some(rung) = rung {
                self.obey(rung);
            }
        }
        kept - from
    }

    fn obey(&self, rung: Rung) {
        let Some((r, fd)) = named(rung.entry, rung.fd) else { return };
        if rung.empty_it {
            self.more.set(true);
            return rang(&r, fd, Some(self.e.id()));
        }
        r.sock.obey(fd);
        if !r.members.alone() {
            links::touch(&r, Some(self.e.id()));
        }
        if r.sock.take_changed() {
            resync(&r, fd);
            self.more.set(true);
        }
    }

    /// TCP says something of a connection: its ring bytes that go back into TCP may fit now, and what the kernel
    /// takes for the end of the stream may be a reset. The events as they are to be taken.
    fn attend(&self, events: u32, data: u64) -> u32 {
        let member = self.e.set.locked().and_then(|mut s| {
            s.unregister_parked(self.epfd, data);
            s.get(data as u32).map(|m| (m.entry, m.fd))
        });
        let ends = events & !set::OUT != 0;
        if let Some((Some(entry), fd)) = member
            && (entry.sock.flushing() || ends && entry.sock.is_mapped())
            && let Some((r, fd)) = named(entry, fd)
        {
            if r.sock.flushing() {
                progress(&r, fd);
            }
            if events & libc::EPOLLERR as u32 != 0 {
                let all = events | whole_reset(fd);
                r.sock.kernel_tells(fd);
                if r.sock.take_changed() {
                    resync(&r, fd);
                }
                return all;
            }
            if r.sock.judge(fd) && r.sock.take_changed() {
                resync(&r, fd);
            }
        }
        events
    }

    /// Polls for a while, if that has been of use; the result if it is this time.
    fn spin(&self, left: Option<u64>) -> Option<c_int> {
        let beside = {
            let s = self.e.set.locked()?;
            if !s.is_hot() {
                return None;
            }
            s.beside_peer()
        };
        if !self.asked.get()
            && let Some(n) = self.result(Some(self.ask_kernel(0)), Look::Fresh)
        {
            return Some(n);
        }
        let mut spin = self.e.set.habit.begin(beside, left)?;
        loop {
            let k = spin.kernel_due().then(|| self.ask_kernel(0));
            if let Some(n) = self.result(k, Look::Polling) {
                spin.paid();
                return Some(n);
            }
            if !spin.again() {
                return None;
            }
        }
    }
}

/// What belongs to an error that the kernel has told of `fd`: a reset is seen in parts by who looks at the wrong moment,
/// and TCP_INFO waits for the whole (see `ready::whole_resets`).
#[cold]
fn whole_reset(fd: c_int) -> u32 {
    let _ = sys::tcp_bytes(fd);
    let (asked, always) = (libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP, libc::POLLERR | libc::POLLHUP);
    let mut p = [libc::pollfd { fd, events: asked, revents: 0 }];
    let _ = sys::poll(&mut p, Some(0));
    // The bits of poll and epoll are the same; `merge` leaves those that the program asked for.
    (p[0].revents & (asked | always)) as u32
}

/// A reference to a connection, and a number of it: `fd`, if it still is.
fn named(entry: &'static Entry, fd: c_int) -> Option<(Ref, c_int)> {
    let fd = fd_table::number_of(entry.id(), fd)?;
    fd_table::stream(fd).filter(|r| r.id() == entry.id()).map(|r| (r, fd))
}

/// The doorbell of a connection has rung in a poll or a set: empties it, obeys it, and tells the other sets.
pub(super) fn rang(r: &Ref, fd: c_int, own: Option<usize>) {
    r.members.emptied();
    r.sock.on_bell(fd);
    links::touch(r, own);
    if r.sock.take_changed() {
        resync(r, fd);
    }
}

/// Ring bytes that go back into TCP: as many as it takes now.
pub(super) fn progress(r: &Ref, fd: c_int) {
    r.sock.progress(fd);
    if r.sock.take_changed() {
        resync(r, fd);
    }
}

/// Members of a nested set whose doorbells are looked after under one lock.
const NESTED: usize = 64;

/// Sets in sets in sets: at most so many (EP_MAX_NESTS, fs/eventpoll.c, and the innermost).
const DEEPEST: u32 = 5;

/// Calls `f` for a set and those in it, as deep as they go.
fn each_inside(e: &'static Entry, deep: u32, f: &mut dyn FnMut(&'static Entry)) {
    f(e);
    if deep == 1 || !e.set.has_inner() {
        return;
    }
    let mut at = 0;
    loop {
        // One at a time: no two sets are locked at once.
        let inner = e.set.locked().and_then(|s| s.inner_sets.get(at).copied());
        let Some(inner) = inner else { return };
        at += 1;
        each_inside(inner, deep - 1, f);
    }
}

/// Whether the set, or one in it, has doorbells.
fn rings_inside(e: &'static Entry) -> bool {
    let mut any = false;
    each_inside(e, DEEPEST, &mut |inner| any |= inner.set.is_watching());
    any
}

/// The set is about to be looked at from outside (another set, poll, select): the kernel must know what is
/// ready in it, from now on always, and no more than that. Whether it, or a set in it, has doorbells.
fn show_outside(e: &Ref) -> bool {
    e.set.set_nested();
    show_all(e.entry())
}

/// A poll or select has the set in its list: [`show_outside`].
pub(super) fn show_to_poll(e: &Ref) -> bool {
    each_inside(e.entry(), DEEPEST, &mut |inner| inner.set.note_wait());
    show_outside(e)
}

/// What the engine asks before a connection goes to the ring.
fn sets_of(sock: &Socket) -> Sets {
    // SAFETY: connections of the shim are all in entries, and it makes no streams of `smc::net`.
    unsafe { Entry::of(sock) }.members.sets()
}

/// Called once, before the first connection.
pub fn start() {
    engine::conn::on_sets(sets_of);
}

fn show_all(e: &'static Entry) -> bool {
    let mut any = false;
    each_inside(e, DEEPEST, &mut |inner| {
        if inner.set.is_watching() {
            any = true;
            show(inner);
        }
    });
    any
}

/// The kernel says that the set `fd` has something: whether that is so for the program as well. It may have been a
/// doorbell that has rung with nothing for the program, as when the peer goes back to TCP; that is emptied then, and
/// the kernel asked again.
#[cold]
pub(super) fn has_something(e: &Ref, fd: c_int) -> bool {
    let (mut any, mut ready) = (false, false);
    each_inside(e.entry(), DEEPEST, &mut |inner| {
        if inner.set.is_watching() {
            any = true;
            ready |= inner.set.locked().is_none_or(|mut s| s.has_pending());
        }
    });
    if !any || ready {
        return true;
    }
    show_all(e.entry());
    let mut p = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }];
    sys::poll(&mut p, Some(0)) != 0
}

#[cold]
fn show(e: &'static Entry) {
    let Some(epfd) = e.set.fd(e) else { return };
    let mut from = Some(0);
    while let Some(at) = from {
        let mut rung = [const { None }; NESTED];
        let mut room = rung.iter_mut();
        from = e.set.locked().and_then(|mut s| {
            s.stale(epfd, at, NESTED, |member, fd| {
                if let Some(r) = room.next() {
                    *r = Some((member, fd));
                }
            })
        });
        for (member, fd) in rung.into_iter().flatten() {
            if let Some((r, fd)) = named(member, fd) {
                rang(&r, fd, Some(e.id()));
            }
        }
    }
    if let Some(mut s) = e.set.locked()
        && s.is_hot()
    {
        s.hand_over(epfd);
    }
}

/// The sets in this one are about to be looked at by the kernel. Whether one of them has doorbells.
#[cold]
fn show_inner(e: &Ref) -> bool {
    let mut any = false;
    each_inside(e.entry(), DEEPEST, &mut |inner| {
        inner.set.note_wait();
        if inner.id() != e.id() && inner.set.is_watching() {
            any = true;
            show(inner);
        }
    });
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_never_too_few() {
        assert_eq!(to_ms(None), -1);
        assert_eq!(to_ms(Some(0)), 0);
        assert_eq!(to_ms(Some(1)), 1);
        assert_eq!(to_ms(Some(1_000_000)), 1);
        assert_eq!(to_ms(Some(1_000_001)), 2);
        assert_eq!(to_ms(Some(u64::MAX)), c_int::MAX);
    }
}
