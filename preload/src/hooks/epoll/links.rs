//! The sets a connection is in, and what the kernel knows of it there: kept in step with the program's
//! `epoll_ctl` calls and with the connection's switching.
//!
//! Lock order: a connection's [`Members`] → one set. Nothing here drops a reference to an entry under a lock.
//!
//! | connection | TCP fd in the kernel's set | doorbell in the kernel's set |
//! | --- | --- | --- |
//! | on TCP | the program's events and data; with EPOLLET or EPOLLONESHOT, while it may be upgraded, our data | no |
//! | may use the ring | our data; without EPOLLOUT while it sends by the ring | EPOLLIN, EPOLLET |
//! | moves ring bytes back into TCP | our data; with EPOLLOUT, asked for or not | EPOLLIN, EPOLLET |
//! | on TCP again | as on TCP; with EPOLLET or EPOLLONESHOT still our data | no |
//!
//! A change of what the kernel knows makes it tell what is ready once more. With EPOLLET that would be an edge where
//! nothing has happened, so what it knows of such members changes as seldom as can be: TCP has no edges of its own
//! while the ring is in use, and EPOLLOUT may stay.

use super::set::{BELL, ET, EXCLUSIVE, Inner, Locked, Member, ONESHOT, OUT, Set, data_of, nobody, ours};
use crate::fd_table::{self, Entry, Kind, Ref};
use engine::conn::{Sets, Socket};
use engine::lock;
use engine::reason::Reason;
use engine::sys;
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, epoll_event};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering::*};

const ENOENT: isize = -(libc::ENOENT as isize);
const EEXIST: isize = -(libc::EEXIST as isize);
const EINVAL: isize = -(libc::EINVAL as isize);
/// What may come with EPOLLEXCLUSIVE (fs/eventpoll.c, EPOLLEXCLUSIVE_OK_BITS).
const WITH_EXCLUSIVE: u32 =
    (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLERR | libc::EPOLLHUP | libc::EPOLLWAKEUP) as u32
        | ET
        | EXCLUSIVE;

/// TCP sockets that were put into a set before they were connected, in all sets.
static EARLY: AtomicU32 = AtomicU32::new(0);

/// The connection is in `set` as member `id`.
#[derive(Clone, Copy, Debug)]
struct Link {
    set: &'static Entry,
    id: u32,
}

/// The epoll sets a connection is in.
#[derive(Debug)]
pub struct Members {
    lock: AtomicU32,
    count: AtomicU32,
    /// Events of the doorbell since it was emptied.
    rings: AtomicU32,
    links: UnsafeCell<Vec<Link>>,
}

// SAFETY: `links` is touched only under `lock`, or in a forked child that has one thread.
unsafe impl Sync for Members {}

/// The links, locked.
struct Links<'a> {
    of: &'a Members,
    _guard: lock::Guard<'a>,
}

impl std::ops::Deref for Links<'_> {
    type Target = Vec<Link>;
    fn deref(&self) -> &Vec<Link> {
        // SAFETY: the guard is held, so no other reference exists.
        unsafe { &*self.of.links.get() }
    }
}

impl std::ops::DerefMut for Links<'_> {
    fn deref_mut(&mut self) -> &mut Vec<Link> {
        // SAFETY: as above.
        unsafe { &mut *self.of.links.get() }
    }
}

impl Drop for Links<'_> {
    fn drop(&mut self) {
        self.of.count.store(self.len() as u32, Release);
    }
}

impl Default for Members {
    fn default() -> Self {
        Self::new()
    }
}

impl Members {
    /// In no set.
    pub const fn new() -> Self {
        Members {
            lock: AtomicU32::new(0),
            count: AtomicU32::new(0),
            rings: AtomicU32::new(0),
            links: UnsafeCell::new(Vec::new()),
        }
    }

    /// Whether it is in a set.
    pub fn is_in_any(&self) -> bool {
        self.count.load(Acquire) != 0
    }

    /// In no set any more. Sets do not look at the connection after this.
    pub fn clear(&self) {
        if self.count.load(Acquire) == 0 {
            return;
        }
        let Some(mut links) = self.locked() else { return };
        while let Some(l) = links.pop() {
            if let Some(mut set) = l.set.set.locked() {
                forget(&mut set, l, &links);
            }
        }
    }

    /// In a forked child: no other thread holds the lock.
    pub fn after_fork_child(&self) {
        if self.lock.swap(0, Relaxed) != 0 {
            // SAFETY: the child has one thread, this one. Another of the parent's was changing the list.
            std::mem::forget(std::mem::take(unsafe { &mut *self.links.get() }));
            self.count.store(0, Relaxed);
        }
    }

    /// In a process that has none of its parent's sets.
    pub fn forsake(&self) {
        self.lock.store(0, Relaxed);
        // SAFETY: the process has one thread, this one.
        std::mem::forget(std::mem::take(unsafe { &mut *self.links.get() }));
        self.count.store(0, Relaxed);
    }

    /// Counts an event of the doorbell; how many there were since it was emptied.
    pub(super) fn rings(&self) -> u32 {
        self.rings.fetch_add(1, Relaxed) + 1
    }

    /// The doorbell is being emptied.
    pub(super) fn emptied(&self) {
        self.rings.store(0, Relaxed);
    }

    /// What is known of waits for the sets. Waits for no lock: its caller has one, under which nothing may be waited for.
    pub(super) fn sets(&self) -> Sets {
        if self.count.load(Acquire) == 0 {
            return Sets::None;
        }
        let Some(guard) = lock::try_lock(&self.lock) else { return Sets::Unattended };
        let links = Links { of: self, _guard: guard };
        if links.iter().any(|l| l.set.set.is_waited_for()) { Sets::WaitedFor } else { Sets::Unattended }
    }

    /// Whether no other set relies on the connection's doorbell.
    pub(super) fn alone(&self) -> bool {
        self.count.load(Acquire) <= 1
    }

    /// `None` if this is a signal handler that has interrupted the holder.
    fn locked(&self) -> Option<Links<'_>> {
        if lock::held_by_me(&self.lock) {
            return None;
        }
        Some(Links { of: self, _guard: lock::lock(&self.lock) })
    }
}

/// What the kernel is to know of a member's TCP fd: events and data. `keep`: better what it knows already.
fn registration(m: &Member, id: u32, sock: &Socket, keep: bool) -> (u32, u64) {
    // What the kernel takes for the end of the stream may be a reset: it is looked at first.
    let ring = sock.needs_bell()
        || sock.owes_reset()
        || (m.events | m.kernel_events) & EXCLUSIVE == 0 && sock.may_be_reset();
    // What has been told of these must be known before the first switch, and changes of theirs are edges.
    let tracked =
        m.events & (ET | ONESHOT) != 0 && (!sock.is_plain() || keep && m.kernel_data == data_of(id, false));
    if !ring && !m.disabled && !tracked && !ours(m.data) {
        return (m.events, m.data);
    }
    let mut events = m.events & !EXCLUSIVE;
    if ring && sock.flushing() {
        events |= libc::EPOLLOUT as u32;
    } else if ring && m.events & ET == 0 && sock.look_at(m.fd).from_kernel & libc::POLLOUT as u32 == 0 {
        events &= !(OUT | libc::EPOLLWRBAND as u32);
    }
    (events, data_of(id, false))
}

/// The connection leaves a set. Some programs have it in one for each wait, and in none when they move bytes.
fn note_wait(set: &Set, sock: &Socket) {
    if set.is_waited_for() {
        sock.note_wait();
    }
}

/// epoll_ctl(2) on a connection, with both locks held for the change. Minus errno on failure.
///
/// # Safety
/// `event` is what the program gave.
pub(super) unsafe fn control(
    e: &Ref,
    sock: &Ref,
    epfd: i32,
    op: i32,
    fd: i32,
    event: *mut epoll_event,
) -> isize {
    if op != EPOLL_CTL_DEL {
        sock.sock.meet(fd);
    }
    // SAFETY: the program's own arguments.
    let raw = || unsafe { control_raw(epfd, op, fd, event) };
    let size = size_of::<epoll_event>();
    if op != EPOLL_CTL_DEL
        && !crate::hooks::direct::sandboxed()
        && !sys::is_accessible(event as usize, size, false)
    {
        return raw();
    }
    if e.set.is_foreign() {
        // The process that forked us knows nothing of what we change in the set: the kernel must say it all.
        if sock.sock.can_leave() {
            crate::hooks::sockets::back_to_tcp(sock, fd, Reason::ForkShared);
        } else {
            sock.sock.follow(fd);
        }
        sock.sock.sets_change_hands();
    }
    let (Some(mut links), false) = (sock.members.locked(), event.is_null() && op != EPOLL_CTL_DEL) else {
        return raw();
    };
    e.set.is_called(epfd);
    let Some(mut set) = e.set.locked() else { return raw() };
    let at = links
        .iter()
        .position(|l| l.set.id() == e.id() && set.get(l.id).is_some_and(|m| m.fd == fd && !m.ghost));
    let parked = at.and_then(|at| set.get(links.get(at)?.id)).is_some_and(|m| m.parked);
    if op == EPOLL_CTL_DEL && at.is_some() {
        note_wait(&e.set, &sock.sock);
    }
    let r = match (op, at) {
        (EPOLL_CTL_DEL | EPOLL_CTL_MOD, Some(_)) if parked => ENOENT,
        (EPOLL_CTL_DEL, Some(at)) if links.get(at).is_some_and(|l| park(&mut set, *l)) => 0,
        (EPOLL_CTL_DEL, _) => {
            let r = raw();
            if let (0, Some(at)) = (r, at) {
                let l = links.swap_remove(at);
                forget(&mut set, l, &links);
            }
            r
        }
        (EPOLL_CTL_ADD, _) => {
            // SAFETY: not null; the program vouches for it.
            let ev = unsafe { event.read_unaligned() };
            if ev.events & EXCLUSIVE != 0 && ev.events & !WITH_EXCLUSIVE != 0 {
                return raw();
            }
            if ev.events & EXCLUSIVE != 0 && sock.sock.can_leave() {
                // Which of several sets wakes up is the kernel's choice, so the bytes must be in TCP.
                drop(set);
                drop(links);
                if crate::hooks::relay::take_over(sock, fd) {
                    return raw();
                }
                crate::hooks::sockets::empty_into_tcp(sock, fd, Reason::SocketOption);
                // SAFETY: as for this call.
                return unsafe { control(e, sock, epfd, op, fd, event) };
            }
            if parked && let Some(l) = at.and_then(|at| links.get(at)).copied() {
                if ev.events & EXCLUSIVE == 0 && unpark(&mut set, l, sock, epfd, ev.events, ev.u64) {
                    return finish(set, links, e, sock, epfd, fd);
                }
                unregister(&mut set, l, epfd);
            }
            insert(e, sock, &mut set, &mut links, epfd, fd, ev.events, ev.u64, None)
        }
        (EPOLL_CTL_MOD, Some(at)) => {
            // SAFETY: not null; the program vouches for it.
            let ev = unsafe { event.read_unaligned() };
            match links.get(at) {
                Some(l) => modify(&mut set, *l, sock, epfd, ev.events, ev.u64),
                None => raw(),
            }
        }
        _ => raw(),
    };
    if r < 0 || op == EPOLL_CTL_DEL {
        return r;
    }
    finish(set, links, e, sock, epfd, fd)
}

/// After a member was added or changed: its doorbell, and those who sleep. 0.
fn finish(mut set: Locked<'_>, links: Links<'_>, e: &Ref, sock: &Ref, epfd: i32, fd: i32) -> isize {
    let attached = attach_all(&mut set, e.entry(), epfd, &links);
    if set.is_hot() && e.set.others_sleep() {
        set.hand_over(epfd);
    }
    drop(set);
    drop(links);
    match attached {
        Ok(false) => {}
        // Old rings in it would make a nested set look readable.
        Ok(true) => super::rang(sock, fd, None),
        Err(()) => no_room(sock, fd),
    }
    0
}

/// The program takes a member out. If its connection uses the ring, the kernel is not told, since many
/// programs put it in again at once; false if it must be.
fn park(set: &mut Inner, l: Link) -> bool {
    let Some(m) = set.get(l.id) else { return false };
    m.parked = m.bell.is_some() && !m.inherited && m.kernel_data != m.data && !m.disabled;
    m.parked
}

/// The program puts it in again. False: the kernel does not have it any more.
fn unpark(set: &mut Inner, l: Link, sock: &Ref, epfd: i32, events: u32, data: u64) -> bool {
    let Some(m) = set.get(l.id) else { return false };
    if m.unregistered {
        return false;
    }
    (m.events, m.data) = (events, data);
    let (ev, dt) = registration(m, l.id, &sock.sock, false);
    if dt == data {
        return false;
    }
    let same = (ev, dt) == (m.kernel_events, m.kernel_data);
    if (!same || events & (ET | ONESHOT) != 0) && sys::epoll_ctl(epfd, EPOLL_CTL_MOD, m.fd, ev, dt) != 0 {
        return false;
    }
    (m.kernel_events, m.kernel_data) = (ev, dt);
    m.parked = false;
    m.fresh = true;
    true
}

/// What the program believes already: a parked member is not in the kernel's set.
fn unregister(set: &mut Inner, l: Link, epfd: i32) {
    if let Some(m) = set.get(l.id)
        && !std::mem::replace(&mut m.unregistered, true)
    {
        let _ = sys::epoll_ctl(epfd, EPOLL_CTL_DEL, m.fd, 0, 0);
    }
}

/// # Safety
/// `event` is what the program gave.
unsafe fn control_raw(epfd: i32, op: i32, fd: i32, event: *mut epoll_event) -> isize {
    // SAFETY: the kernel checks the pointer.
    unsafe { sys::epoll_ctl_raw(epfd, op, fd, event) }
}

/// Adds a member. `known`: the kernel has it already, with these events and data.
#[allow(clippy::too_many_arguments)]
fn insert(
    e: &Ref,
    sock: &Ref,
    set: &mut Inner,
    links: &mut Links<'_>,
    epfd: i32,
    fd: i32,
    events: u32,
    data: u64,
    known: Option<(u32, u64)>,
) -> isize {
    let Some(id) = set.add() else { return -(libc::ENOMEM as isize) };
    let Some(m) = set.get(id) else { return -(libc::ENOMEM as isize) };
    m.fd = fd;
    m.entry = Some(sock.entry());
    m.events = events;
    m.data = data;
    let (ev, dt) = known.unwrap_or_else(|| registration(m, id, &sock.sock, false));
    if dt != data {
        e.set.sleepers.watch();
    }
    let r = if known.is_some() { 0 } else { sys::epoll_ctl(epfd, EPOLL_CTL_ADD, fd, ev, dt) };
    if r < 0 {
        set.remove(id);
        return r;
    }
    m.kernel_events = ev;
    m.kernel_data = dt;
    // The kernel had dropped an older one: its fd was closed behind our back.
    while let Some(old) =
        links.iter().position(|l| l.set.id() == e.id() && set.get(l.id).is_some_and(|m| m.fd == fd))
    {
        let l = links.swap_remove(old);
        forget(set, l, links);
    }
    set.set_on_tcp(id, !sock.sock.rx_in_ring());
    links.push(Link { set: e.entry(), id });
    // Now, before the set relies on the doorbell: see `Socket::unarm`.
    links.of.count.store(links.len() as u32, Release);
    0
}

fn modify(set: &mut Inner, l: Link, sock: &Ref, epfd: i32, events: u32, data: u64) -> isize {
    let Some(m) = set.get(l.id) else { return ENOENT };
    // The kernel may not know that it is exclusive any more.
    if (m.events | events) & EXCLUSIVE != 0 {
        return EINVAL;
    }
    let old = (m.events, m.data, m.disabled);
    (m.events, m.data, m.disabled) = (events, data, false);
    let (ev, dt) = registration(m, l.id, &sock.sock, false);
    if dt != data {
        l.set.set.sleepers.watch();
    }
    // What the kernel knows does not change and needs no new look: only the ring's side does.
    let same = (ev, dt) == (m.kernel_events, m.kernel_data) && dt != data;
    if !same || (old.0 | events) & (ET | ONESHOT) != 0 {
        let r = sys::epoll_ctl(epfd, EPOLL_CTL_MOD, m.fd, ev, dt);
        if r < 0 {
            (m.events, m.data, m.disabled) = old;
            return r;
        }
    }
    m.kernel_events = ev;
    m.kernel_data = dt;
    m.fresh = true;
    0
}

/// Takes a member out of its set, and its doorbell out of the kernel's. `rest` are the connection's other links.
fn forget(set: &mut Inner, l: Link, rest: &[Link]) {
    detach(set, l, rest);
    set.remove(l.id);
}

/// The doorbell of member `l` leaves the kernel's set, or is known there by another fd of the description.
fn detach(set: &mut Inner, l: Link, rest: &[Link]) {
    let Some(m) = set.get(l.id) else { return };
    let (bell, inherited) = (m.bell.take(), m.inherited);
    let Some(fd) = m.entry.and_then(|e| e.sock.bell()) else { return };
    if bell != Some(l.id) || inherited {
        return;
    }
    let Some(epfd) = l.set.set.fd(l.set) else { return };
    let mut heir = None;
    for other in rest.iter().filter(|o| o.set.id() == l.set.id() && o.id != l.id) {
        if let Some(o) = set.get(other.id)
            && o.bell == bell
        {
            o.bell = Some(*heir.get_or_insert(other.id));
        }
    }
    match heir {
        Some(id) => sys::epoll_ctl(epfd, EPOLL_CTL_MOD, fd, BELL, data_of(id, true)),
        None => sys::epoll_ctl(epfd, EPOLL_CTL_DEL, fd, 0, 0),
    };
}

/// Puts the doorbells of the connection's members of one set into it, where they are needed and missing, and
/// makes the members hot. Whether one has been put in; fails if the kernel has no room.
fn attach_all(set: &mut Inner, e: &'static Entry, epfd: i32, links: &[Link]) -> Result<bool, ()> {
    let mut new = false;
    let mut shared = links.iter().filter(|l| l.set.id() == e.id()).find_map(|l| set.get(l.id)?.bell);
    for l in links.iter().filter(|l| l.set.id() == e.id()) {
        let Some(m) = set.get(l.id) else { continue };
        let Some(sock) = m.entry.map(|e| &e.sock) else { continue };
        if !sock.needs_bell() {
            continue;
        }
        let Some(bell) = sock.bell() else { continue };
        if m.bell.is_none() {
            if shared.is_none() {
                e.set.sleepers.watch();
                let mut r = sys::epoll_ctl(epfd, EPOLL_CTL_ADD, bell, BELL, data_of(l.id, true));
                if r == EEXIST {
                    r = sys::epoll_ctl(epfd, EPOLL_CTL_MOD, bell, BELL, data_of(l.id, true));
                }
                if r < 0 {
                    return Err(());
                }
                shared = Some(l.id);
                new = true;
            }
            m.bell = shared;
            sock.set_watched(true);
        }
        set.heat(l.id);
    }
    Ok(new)
}

/// A direction has switched, space is owed, or the doorbell has come or gone: brings the sets into step.
#[cold]
pub fn resync(r: &Ref, fd: i32) {
    if r.members.count.load(Acquire) == 0 {
        return;
    }
    let Some(mut links) = r.members.locked() else { return };
    let blocked = r.sock.take_blocked();
    let mut room = true;
    let all: &mut Vec<Link> = &mut links;
    let mut i = 0;
    while let Some(l) = all.get(i).copied() {
        i += 1;
        let (Some(mut set), Some(epfd)) = (l.set.set.locked(), l.set.set.fd(l.set)) else { continue };
        if !bring_into_step(&mut set, l, &r.sock, epfd, blocked) {
            forget(&mut set, l, all);
            i -= 1;
            all.swap_remove(i);
            continue;
        }
        if r.sock.needs_bell() {
            room &= attach_all(&mut set, l.set, epfd, all).is_ok();
        } else {
            detach(&mut set, l, all);
        }
        if set.is_hot() && l.set.set.others_sleep() {
            set.hand_over(epfd);
        }
    }
    if !r.sock.needs_bell() {
        r.sock.set_watched(false);
    }
    drop(links);
    if !room {
        no_room(r, fd);
    }
}

/// Tells the kernel what it is to know of one member. False: it has dropped it.
fn bring_into_step(set: &mut Inner, l: Link, sock: &Socket, epfd: i32, blocked: bool) -> bool {
    set.set_on_tcp(l.id, !sock.rx_in_ring());
    let Some(m) = set.get(l.id) else { return false };
    if m.parked {
        unregister(set, l, epfd);
        return false;
    }
    m.space_owed |= blocked;
    let (ev, dt) = registration(m, l.id, sock, true);
    let same = (ev, dt) == (m.kernel_events, m.kernel_data);
    if !same {
        // It tells of all that is ready by now.
        m.fresh = false;
    }
    // Who was told of no space in the ring is told by the kernel now, which is made to look.
    let out = sock.look_at(m.fd).from_kernel & libc::POLLOUT as u32 != 0;
    let owed = m.events & ET != 0 && m.events & OUT != 0 && out && m.space_owed;
    if same && !owed || m.ghost {
        return true;
    }
    if dt == m.data && ev == m.kernel_events && !m.inherited && sock.sets_changed_hands() {
        // The data alone would change, and a child of ours has put in its own, which is not to be undone. If it has
        // not, ours stays, and is translated as before.
        return true;
    }
    m.space_owed &= !owed;
    if dt != m.data {
        l.set.set.sleepers.watch();
    }
    let r = if (ev | m.kernel_events) & EXCLUSIVE != 0 {
        // The kernel changes no exclusive registration.
        sys::epoll_ctl(epfd, EPOLL_CTL_DEL, m.fd, 0, 0);
        sys::epoll_ctl(epfd, EPOLL_CTL_ADD, m.fd, ev, dt)
    } else {
        sys::epoll_ctl(epfd, EPOLL_CTL_MOD, m.fd, ev, dt)
    };
    if r == 0 {
        (m.kernel_events, m.kernel_data) = (ev, dt);
    }
    r != ENOENT
}

/// The doorbell does not fit into the kernel's set (fs.epoll.max_user_watches, memory): back to TCP.
#[cold]
fn no_room(r: &Ref, fd: i32) {
    if r.sock.can_leave() && !crate::hooks::relay::take_over(r, fd) {
        crate::hooks::sockets::empty_into_tcp(r, fd, Reason::NoFds);
    }
}

/// A doorbell has rung, or a sleeper elsewhere has taken the ring: every set the connection is in looks at
/// it again. `own` is the set of the caller, which looks by itself.
pub(super) fn touch(r: &Ref, own: Option<usize>) {
    if r.members.count.load(Acquire) == 0 {
        return;
    }
    let Some(links) = r.members.locked() else { return };
    for l in links.iter() {
        let Some(mut set) = l.set.set.locked() else { continue };
        set.heat(l.id);
        if own != Some(l.set.id())
            && l.set.set.others_sleep()
            && let Some(epfd) = l.set.set.fd(l.set)
        {
            set.hand_over(epfd);
        }
    }
}

/// What is in the ring counts as having come now: with EPOLLET it is told once more.
pub fn comes_anew(r: &Ref) {
    if r.members.count.load(Acquire) == 0 {
        return;
    }
    if let Some(links) = r.members.locked() {
        for l in links.iter() {
            if let Some(mut set) = l.set.set.locked()
                && let Some(m) = set.get(l.id)
            {
                m.fresh = true;
            }
        }
    }
    touch(r, None);
}

/// A sleeper has emptied the doorbell of `fd`'s connection (see [`engine::conn::on_drained`]).
pub(super) fn drained(fd: i32) {
    if let Some(r) = fd_table::stream(fd) {
        touch(&r, None);
    }
}

/// Whether one of the connection's sets has it from this process.
fn stays_in_a_set(r: &Ref) -> bool {
    let Some(links) = r.members.locked() else { return false };
    links.iter().any(|l| {
        l.set.set.locked().is_some_and(|mut set| set.get(l.id).is_some_and(|m| !m.parked && !m.inherited))
    })
}

/// The last fd of the description in this process is about to be closed. `stays`: the description lives on.
pub fn before_close(r: &Ref, fd: i32, stays: bool) {
    if r.members.count.load(Acquire) == 0 {
        return;
    }
    let shared = r.sock.slot().is_some_and(|s| s.holders.load(Acquire) > 1);
    if shared && stays_in_a_set(r) {
        // The kernel keeps it in the set, and nobody will tell the set of the ring: the kernel must.
        crate::hooks::sockets::back_to_tcp(r, fd, Reason::ForkShared);
    }
    let elsewhere = stays || shared || r.sock.was_handed();
    let Some(mut links) = r.members.locked() else { return };
    while let Some(l) = links.pop() {
        let Some(mut set) = l.set.set.locked() else { continue };
        if elsewhere
            && let Some(epfd) = l.set.set.fd(l.set)
            && let Some(m) = set.get(l.id)
            && !m.ghost
            && !m.inherited
        {
            // Another process, a message or a call under way keeps the description, and with it the kernel keeps the registration.
            if m.parked {
                unregister(&mut set, l, epfd);
            } else if m.kernel_data != m.data && !r.sock.sets_changed_hands() {
                let _ = sys::epoll_ctl(epfd, EPOLL_CTL_MOD, m.fd, m.events & !EXCLUSIVE, m.data);
            }
        }
        forget(&mut set, l, &links);
    }
    r.sock.set_watched(false);
}

/// The connection is on TCP for good: its sets forget it, if the kernel knows of it there what the program said.
pub fn let_go(r: &Ref) -> bool {
    if r.members.count.load(Acquire) == 0 {
        return true;
    }
    let Some(mut links) = r.members.locked() else { return false };
    for l in links.iter() {
        let Some(mut set) = l.set.set.locked() else { return false };
        let plain = set.get(l.id).is_some_and(|m| {
            (m.kernel_events, m.kernel_data) == (m.events, m.data)
                && !(m.disabled || m.parked || m.ghost || m.inherited)
        });
        if !plain {
            return false;
        }
    }
    while let Some(l) = links.pop() {
        if let Some(mut set) = l.set.set.locked() {
            forget(&mut set, l, &links);
        }
    }
    true
}

/// A member of a set as the program has it, for another socket under the same number.
#[derive(Debug)]
pub struct Seat {
    epfd: i32,
    fd: i32,
    events: u32,
    data: u64,
}

impl Seat {
    /// What `fd` names now is put into the set.
    pub fn take(&self) {
        // There is room: the kernel has given up as much in `leave`.
        let _ = sys::epoll_ctl(self.epfd, EPOLL_CTL_ADD, self.fd, self.events, self.data);
    }
}

/// The connection leaves all its sets, also in the kernel, before its numbers name another socket: the seats that it
/// had. `None`: a set is in use by a handler's caller, or can't be told; nothing has changed.
///
/// What the process that forked us has put into a set stays there if others than this process may use it: they hold the
/// connection (else `alone`), or the set. They are told of it as ever, and only this process knows of it no more.
///
/// The caller has [taken](fd_table::Moves) its numbers. So he is the only one to lock several sets at a time.
pub fn leave(r: &Ref, _: &fd_table::Taken, alone: bool) -> Option<Vec<Seat>> {
    if !r.members.is_in_any() {
        return Some(Vec::new());
    }
    let mut links = r.members.locked()?;
    let mut sets: Vec<(&'static Entry, i32, Locked<'_>)> = Vec::new();
    for l in links.iter() {
        if !sets.iter().any(|s| s.0.id() == l.set.id()) {
            sets.push((l.set, l.set.set.fd(l.set)?, l.set.set.locked()?));
        }
    }
    let theirs = |set: &Set, m: &Member| m.inherited && (set.is_foreign() || !alone);
    let mut seats = Vec::new();
    for l in links.iter() {
        let (_, epfd, set) = sets.iter_mut().find(|s| s.0.id() == l.set.id())?;
        let m = set.get(l.id)?;
        if theirs(&l.set.set, m) {
            continue;
        }
        if m.ghost || m.events & EXCLUSIVE != 0 || ours(m.data) {
            return None;
        }
        let (events, data) = match m.disabled {
            false => (m.events, m.data),
            // EPOLLONESHOT has fired. Of another socket the kernel can't be told that: it would tell of its errors.
            true => (m.events & (ET | ONESHOT), nobody()),
        };
        if !m.parked {
            seats.push(Seat { epfd: *epfd, fd: m.fd, events, data });
        }
    }
    while let Some(l) = links.pop() {
        let Some((_, epfd, set)) = sets.iter_mut().find(|s| s.0.id() == l.set.id()) else { continue };
        if let Some(m) = set.get(l.id)
            && !theirs(&l.set.set, m)
        {
            // With its doorbell, which a member that was inherited leaves to the other process.
            m.inherited = false;
            if !m.unregistered {
                let _ = sys::epoll_ctl(*epfd, EPOLL_CTL_DEL, m.fd, 0, 0);
            }
        }
        forget(set, l, &links);
    }
    Some(seats)
}

/// One of several fds of the description is closed: the kernel keeps what is registered under it.
pub fn fd_gone(r: &Ref, fd: i32) {
    if r.members.count.load(Acquire) == 0 {
        return;
    }
    let Some(mut links) = r.members.locked() else { return };
    let mut ghosts = false;
    for i in (0..links.len()).rev() {
        let Some(l) = links.get(i).copied() else { continue };
        let Some(mut set) = l.set.set.locked() else { continue };
        let Some(m) = set.get(l.id).filter(|m| m.fd == fd) else { continue };
        if !m.parked {
            m.ghost = true;
            ghosts = true;
        } else {
            if let Some(epfd) = l.set.set.fd(l.set) {
                unregister(&mut set, l, epfd);
            }
            links.swap_remove(i);
            forget(&mut set, l, &links);
        }
    }
    drop(links);
    if ghosts && !r.sock.needs_bell() {
        // The kernel's registration can't be changed any more, so the connection must not be.
        r.sock.bar(Reason::Internal);
    }
}

impl Set {
    /// The last fd of the set is closed and nobody uses it.
    pub fn clear(&self) {
        let Some(mut set) = self.locked() else { return };
        EARLY.fetch_sub(set.early.len() as u32, Relaxed);
        let entries = set.take_all();
        drop(set);
        for e in entries {
            if let Some(mut links) = e.members.locked() {
                let before = links.len();
                links.retain(|l| !std::ptr::eq(&l.set.set, self));
                if links.len() < before {
                    note_wait(self, &e.sock);
                }
            }
        }
    }
}

// ---- sockets that are not connections yet

/// The program has put `fd`, which is no connection of ours, into a set: it may become one.
#[cold]
pub(super) fn early(e: &Ref, fd: i32, events: u32, data: u64) {
    if !unconnected_tcp(fd) {
        return;
    }
    let Some(mut set) = e.set.locked() else { return };
    match set.early.iter_mut().find(|x| x.0 == fd) {
        Some(x) => *x = (fd, events, data),
        None => {
            set.early.push((fd, events, data));
            EARLY.fetch_add(1, Relaxed);
        }
    }
}

/// The program changes (`Some`) or takes back (`None`) such an entry.
pub(super) fn early_changed(e: &Ref, fd: i32, to: Option<(u32, u64)>) {
    if EARLY.load(Relaxed) == 0 {
        return;
    }
    let Some(mut set) = e.set.locked() else { return };
    if let Some(at) = set.early.iter().position(|x| x.0 == fd) {
        match (to, set.early.get_mut(at)) {
            (Some((events, data)), Some(x)) => *x = (fd, events, data),
            _ => {
                set.early.swap_remove(at);
                EARLY.fetch_sub(1, Relaxed);
            }
        }
    }
}

fn unconnected_tcp(fd: i32) -> bool {
    let int = |name| {
        let mut b = [0u8; 4];
        (sys::getsockopt(fd, libc::SOL_SOCKET, name, &mut b) == Ok(4)).then(|| i32::from_ne_bytes(b))
    };
    int(libc::SO_PROTOCOL) == Some(libc::IPPROTO_TCP) && int(libc::SO_ACCEPTCONN) == Some(0)
}

/// `fd` has just become a connection: the sets it was put into before learn of it.
pub fn adopt(r: &Ref, fd: i32) {
    if EARLY.load(Relaxed) == 0 {
        return;
    }
    fd_table::each(Kind::Epoll, |e| {
        let Some(mut links) = r.members.locked() else { return };
        let Some(mut set) = e.set.locked() else { return };
        let Some(at) = set.early.iter().position(|x| x.0 == fd) else { return };
        let (_, events, data) = set.early.swap_remove(at);
        EARLY.fetch_sub(1, Relaxed);
        let Some(epfd) = e.set.fd(e.entry()) else { return };
        // Only if it is still there: the number may have been closed and be another socket's by now.
        if events & EXCLUSIVE == 0 && sys::epoll_ctl(epfd, EPOLL_CTL_MOD, fd, events, data) == 0 {
            insert(e, r, &mut set, &mut links, epfd, fd, events, data, Some((events, data)));
            if let Some(l) = links.last().copied() {
                let _ = bring_into_step(&mut set, l, &r.sock, epfd, false);
            }
        }
    });
}
