//! fd numbers: dup and its kin, fcntl, ranges, stdio, and fds that leave the process.

use super::data::{alias, hook};
use super::making::{made, made_from};
use super::relay::{Begins, NoRelay, Relay, take_over};
use super::sockets::{back_to_tcp, hand_over, hand_over_here};
use crate::fd_table::{self, Ref};
use crate::hook::{errno, fail, given, plausible, set_errno};
use crate::real::real;
use engine::fd::Fd;
use engine::internal_fds;
use engine::reason::Reason;
use libc::{FILE, c_char, c_int, c_uint, msghdr};
use std::sync::atomic::Ordering::Relaxed;

/// `new` is a duplicate of `old`, whose entry the caller had before it was made: nobody has moved its numbers since.
fn duplicated(e: Option<Ref>, old: c_int, new: c_int) {
    fd_table::set_tcp(new, fd_table::is_tcp(old));
    let Some(e) = e else { return };
    if new <= 2 {
        super::process::placed(new);
        // Standard input or output: stdio and exec'd programs use it without us.
        if take_over(&e, new) {
            return;
        }
        hand_over(&e, old, Reason::LowFd);
        // The peer has ended its stream in the ring: nobody can move that any more, so it is read from there.
        if !e.sock.rx_in_ring() && !e.sock.strands(false) {
            return;
        }
    }
    fd_table::install(new, &e);
}

hook! {
    /// dup(2).
    fn dup(fd: c_int) -> c_int {
        if internal_fds::contains(fd) {
            return fail(libc::EBADF);
        }
        let e = fd_table::lookup(fd);
        let r = made(|| real!(dup(fd => c_int) -> c_int));
        if r >= 0 {
            duplicated(e, fd, r);
        }
        r
    }
}

/// dup2 and dup3 over `new`: what was there is closed, as close(2) would.
fn over(old: c_int, new: c_int, kernel: impl FnOnce() -> c_int) -> c_int {
    if internal_fds::contains(old) || internal_fds::contains(new) {
        return fail(libc::EBADF);
    }
    if old == new || engine::sys::getfl(old) < 0 {
        return kernel();
    }
    let entry = fd_table::lookup(old);
    let gone = fd_table::before_close(new);
    let r = kernel();
    let e = errno();
    drop(gone);
    if r >= 0 {
        super::ready::numbered(r);
        duplicated(entry, old, r);
    }
    set_errno(e);
    r
}

hook! {
    /// dup2(2).
    fn dup2(old: c_int, new: c_int) -> c_int {
        over(old, new, || real!(dup2(old => c_int, new => c_int) -> c_int))
    }
}
alias! { __dup2 = dup2(old: c_int, new: c_int) -> c_int; }

hook! {
    /// dup3(2).
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
        over(old, new, || real!(dup3(old => c_int, new => c_int, flags => c_int) -> c_int))
    }
}

hook! {
    /// fcntl(2). Variadic; its one argument is passed in a register.
    fn fcntl(fd: c_int, cmd: c_int, arg: usize) -> c_int {
        if internal_fds::contains(fd) {
            return fail(libc::EBADF);
        }
        let kernel = || real!(fcntl(fd => c_int, cmd => c_int, arg => usize) -> c_int);
        if let libc::F_DUPFD | libc::F_DUPFD_CLOEXEC = cmd {
            let e = fd_table::lookup(fd);
            let r = made_from(arg as c_int, kernel);
            if r >= 0 {
                duplicated(e, fd, r);
            }
            return r;
        }
        let r = kernel();
        if r >= 0 {
            after_fcntl(fd, cmd, arg);
        }
        r
    }
}

fn after_fcntl(fd: c_int, cmd: c_int, arg: usize) {
    if cmd != libc::F_SETFL {
        return;
    }
    let Some(e) = fd_table::stream(fd) else { return };
    if let Some(s) = e.sock.slot() {
        s.nonblock.store((arg as c_int & libc::O_NONBLOCK != 0).into(), Relaxed);
    }
    if arg as c_int & libc::O_ASYNC != 0 {
        back_to_tcp(&e, fd, Reason::AsyncIo);
    }
}
alias! {
    fcntl64 = fcntl(fd: c_int, cmd: c_int, arg: usize) -> c_int;
    __fcntl = fcntl(fd: c_int, cmd: c_int, arg: usize) -> c_int;
}

/// Closes `first..=last` but for our internal fds.
fn close_all(first: c_uint, last: c_uint, flags: c_int, close: impl Fn(c_uint, c_uint) -> c_int) -> c_int {
    const UNSHARE: c_int = 2;
    const CLOEXEC: c_int = 4;
    // In a table of the thread's own nothing is closed that we have in ours.
    let split = flags & UNSHARE != 0 && super::direct::table_splits();
    if first > last || flags & CLOEXEC != 0 {
        return close(first, last);
    }
    fd_table::forget_tcp(first, last);
    let mut gone = Vec::new();
    let mut at = first;
    while let Some(fd) = fd_table::next_in(at, last).filter(|_| !split) {
        if let Some(r) = fd_table::before_close(fd as c_int) {
            gone.push(r);
        }
        at = fd + 1;
    }
    let mut at = first;
    let mut r = 0;
    while at <= last {
        let stop = internal_fds::next(at).filter(|i| *i <= last);
        match stop {
            Some(i) if i == at => {}
            Some(i) => r = close(at, i - 1),
            None => {
                r = close(at, last);
                break;
            }
        }
        if r < 0 {
            break;
        }
        at = stop.unwrap_or(last).saturating_add(1);
    }
    let e = errno();
    drop(gone);
    set_errno(e);
    r
}

hook! {
    /// close_range(2).
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        close_all(first, last, flags, |a, b| real!(close_range(a => c_uint, b => c_uint, flags => c_int) -> c_int))
    }
}

hook! {
    /// closefrom(3).
    fn closefrom(first: c_int) -> () {
        // glibc's closefrom takes a negative number as 0.
        let first = first.max(0) as c_uint;
        let r = close_all(first, c_uint::MAX, 0, |a, b| real!(close_range(a => c_uint, b => c_uint, 0 => c_int) -> c_int));
        if r < 0 {
            real!(closefrom(first as c_int => c_int) -> ());
        }
    }
}

hook! {
    /// fdopen(3): stdio reads and writes by names that can't be hooked.
    fn fdopen(fd: c_int, mode: *const c_char) -> *mut FILE {
        if let Some(e) = fd_table::stream(fd) {
            hand_over_here(&e, fd, Reason::Stdio);
        }
        real!(fdopen(fd => c_int, mode => *const c_char) -> *mut FILE)
    }
}

hook! {
    /// fclose(3) closes its fd by a name that can't be hooked.
    fn fclose(f: *mut FILE) -> c_int {
        // SAFETY: the program's FILE.
        let fd = if f.is_null() { -1 } else { unsafe { libc::fileno(f) } };
        let gone = fd_table::before_close(fd);
        let r = real!(fclose(f => *mut FILE) -> c_int);
        let e = errno();
        drop(gone);
        set_errno(e);
        r
    }
}

/// A message on its way over a Unix socket, with connections in it.
pub struct Passing {
    /// Its control data, with a relay's end in the place of each connection that has one.
    control: Vec<u8>,
    relays: Vec<(Relay, Fd)>,
}

impl Passing {
    /// The message as it is to be sent.
    pub fn message(&mut self, m: &msghdr) -> msghdr {
        msghdr { msg_control: self.control.as_mut_ptr().cast(), ..*m }
    }

    /// It has been sent, or not.
    pub fn done(self, sent: bool) {
        let e = errno();
        for (mut r, _end) in self.relays {
            if sent { r.inherits() } else { r.undo() }
        }
        set_errno(e);
    }
}

/// The connection is about to be passed: the relay that the receiver is to have, if it takes one and there can be one.
/// Fails if there is none for want of memory or descriptors, and what is unread would be found by nobody.
fn passed(e: &Ref, fd: c_int) -> Result<Option<(Relay, Fd)>, NoRelay> {
    let relay = |begins| if e.has_heir() { Err(NoRelay::Never) } else { Relay::new(e, fd, begins) };
    if e.sock.strands(false) {
        if let Ok(r) = relay(Begins::AtItsWord) {
            return Ok(Some(r));
        }
    } else if e.sock.strands(true) {
        // Armed before the peer is asked back: so it rings when it does that, in its next call.
        e.sock.on_bell(fd);
        e.sock.arm(libc::POLLIN as u32);
        if let Ok(r) = relay(Begins::with_the_peer(e)) {
            e.sock.set_handed();
            back_to_tcp(e, fd, Reason::FdPassed);
            return Ok(Some(r));
        }
    }
    hand_over(e, fd, Reason::FdPassed);
    // The peer may have ended its stream just before it was asked for the rest.
    if !e.sock.strands(false) {
        return Ok(None);
    }
    match relay(Begins::AtItsWord) {
        Ok(r) => Ok(Some(r)),
        Err(NoRelay::Never) => Ok(None),
        refused => refused.map(Some),
    }
}

/// The connections of ours that a message carries in its control data: each with the place of its number, which is in
/// the message's memory.
fn each_carried(msg: *const msghdr, mut f: impl FnMut(&msghdr, &Ref, *mut c_int, c_int)) {
    if fd_table::is_empty() {
        return;
    }
    // SAFETY: the program's message, or what it passes as one.
    let Some(m) = (unsafe { given(msg) }) else { return };
    if m.msg_controllen < size_of::<libc::cmsghdr>() || !plausible(m.msg_control, m.msg_controllen) {
        return;
    }
    let end = m.msg_control as usize + m.msg_controllen;
    // SAFETY: the program vouches for its control buffer.
    let mut c = unsafe { libc::CMSG_FIRSTHDR(m) };
    while !c.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers inside the buffer.
        let h = unsafe { &*c };
        if h.cmsg_level == libc::SOL_SOCKET && h.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: data of this header.
            let data = unsafe { libc::CMSG_DATA(c) };
            // What says that it goes on beyond the buffer is refused by the kernel.
            let n = (c as usize).saturating_add(h.cmsg_len as usize).min(end).saturating_sub(data as usize)
                / size_of::<c_int>();
            for i in 0..n.min(253) {
                // SAFETY: inside cmsg_len.
                let at = unsafe { data.cast::<c_int>().add(i) };
                // SAFETY: as above.
                let fd = unsafe { at.read_unaligned() };
                if let Some(e) = fd_table::stream(fd) {
                    f(m, &e, at, fd);
                }
            }
        }
        // SAFETY: as above.
        c = unsafe { libc::CMSG_NXTHDR(m, c) };
    }
}

/// A message leaves over a Unix socket: connections that travel in it are the receiver's as well. Of one with bytes that
/// nobody would move into TCP for the receiver, it gets a [relay](super::relay)'s end: then what is to be sent is not
/// the program's message. Fails if there is none for want of memory or descriptors: nothing is to be sent then.
pub fn leaving_with(msg: *const msghdr) -> Result<Option<Passing>, NoRelay> {
    let mut passing: Option<Passing> = None;
    let mut refused = None;
    each_carried(msg, |m, e, at, fd| {
        let r = match passed(e, fd) {
            Ok(Some(r)) => r,
            Ok(None) => return,
            Err(why) => {
                refused = Some(why);
                return;
            }
        };
        let p = passing.get_or_insert_with(|| {
            // SAFETY: the program vouches for its control buffer.
            let all = unsafe { std::slice::from_raw_parts(m.msg_control.cast::<u8>(), m.msg_controllen) };
            Passing { control: all.to_vec(), relays: Vec::new() }
        });
        let from = at as usize - m.msg_control as usize;
        if let Some(place) = p.control.get_mut(from..from + size_of::<c_int>()) {
            place.copy_from_slice(&r.1.raw().to_ne_bytes());
        }
        p.relays.push(r);
    });
    let Some(why) = refused else { return Ok(passing) };
    if let Some(p) = passing {
        p.done(false);
    }
    Err(why)
}

/// As [`leaving_with`], of a message that the kernel sends as it is, some time.
pub fn leaving_in_a_ring(msg: *const msghdr) {
    each_carried(msg, |_, e, _, fd| hand_over(e, fd, Reason::FdPassed));
}
