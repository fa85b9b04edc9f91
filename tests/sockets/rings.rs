//! Rings of io_uring: those that carry changes of epoll sets and no more, by which event loops make them in batches,
//! and what becomes of connections once such a ring carries anything else.

use crate::{
    Scenario,
    aside::number,
    log, s,
    sys::{self, Res, show, show_epoll},
    world::{Conn, World},
};
use libc::{
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLLOUT, epoll_event,
};
use std::{
    os::fd::AsRawFd as _,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(one_by_one).stays(),
    s!(errors_in_a_batch).stays(),
    s!(edges_and_one_shots).stays(),
    s!(more_than_are_submitted).stays(),
    s!(an_event_that_is_nowhere).stays(),
    s!(sets_in_sets).stays(),
    s!(entries_out_of_order).stays(),
    s!(waits_for_what_is_not_there).stays(),
    s!(duplicates_and_numbers_again).stays(),
    s!(used_by_a_child).procs().stays(),
    s!(threads_that_share_one).stays(),
    s!(before_the_connection_is).stays(),
    s!(beside_one_that_a_thread_reads).stays(),
    s!(read_by_a_thread_then_it_moves_bytes),
    s!(read_by_a_thread_that_is_awake).plain(),
    s!(with_flags_that_nobody_knows).plain(),
    s!(then_it_moves_bytes),
    s!(then_it_polls),
    s!(then_it_closes),
    s!(moves_bytes_among_changes),
    s!(linked_changes),
    s!(under_a_registered_number),
    s!(refused_by_the_file),
    s!(unseen_before_the_connection_is).plain(),
    s!(unseen_among_many_files).plain(),
    s!(unseen_in_the_middle),
    s!(unseen_found_by_dlsym).plain(),
];

/// A ring made by its system calls alone.
pub struct Uring {
    pub fd: i32,
    sq: *mut u8,
    cq: *mut u8,
    sqes: *mut u8,
    p: [u32; 30],
    /// By instructions, that no library hears of.
    unseen: bool,
}

// SAFETY: its pointers are to mappings that nobody takes away; who fills it sees to it that he is alone.
unsafe impl Sync for Uring {}

const OP_POLL_ADD: u8 = 6;
const OP_CLOSE: u8 = 19;
const OP_SEND: u8 = 26;
const OP_RECV: u8 = 27;
const OP_EPOLL_CTL: u8 = 29;
const OP_NOP: u8 = 0;
const GETEVENTS: usize = 1;
const SQPOLL: u32 = 2;

/// An event where it stays until the kernel has read it.
type Event = Box<epoll_event>;

fn event(events: i32, data: u64) -> Event {
    Box::new(epoll_event { events: events as u32, u64: data })
}

/// struct io_uring_sqe.
pub fn entry(opcode: u8, fd: i32, off: u64, addr: u64, len: u32, data: u64) -> [u8; 64] {
    let mut sqe = [0u8; 64];
    sqe[0] = opcode;
    sqe[4..8].copy_from_slice(&fd.to_ne_bytes());
    sqe[8..16].copy_from_slice(&off.to_ne_bytes());
    sqe[16..24].copy_from_slice(&addr.to_ne_bytes());
    sqe[24..28].copy_from_slice(&len.to_ne_bytes());
    sqe[32..40].copy_from_slice(&data.to_ne_bytes());
    sqe
}

/// An EPOLL_CTL.
fn change(set: i32, op: i32, fd: i32, e: &epoll_event, data: u64) -> [u8; 64] {
    entry(OP_EPOLL_CTL, set, fd as u64, std::ptr::from_ref(e) as u64, op as u32, data)
}

/// A system call that moves no numbers of descriptors but a ring's.
fn call(unseen: bool, nr: i64, a: [usize; 6]) -> Res {
    if !unseen {
        return number(nr, a);
    }
    // SAFETY: a ring's, whose parameters are the caller's.
    let r = unsafe { sys::by_instruction(nr, a) };
    if r < 0 { Err(-r as i32) } else { Ok(r) }
}

impl Uring {
    pub fn new() -> Result<Uring, i32> {
        Self::with(8)
    }

    fn with(entries: usize) -> Result<Uring, i32> {
        Self::made(entries, 0, 0)
    }

    fn made(entries: usize, flags: u32, idle: u32) -> Result<Uring, i32> {
        Self::made_so(entries, flags, idle, false)
    }

    fn made_so(entries: usize, flags: u32, idle: u32, unseen: bool) -> Result<Uring, i32> {
        // struct io_uring_params: 10 words, then the offsets of the two rings, 10 words each.
        let mut p = [0u32; 30];
        (p[2], p[4]) = (flags, idle);
        let how = [entries, p.as_mut_ptr() as usize, 0, 0, 0, 0];
        let fd = call(unseen, libc::SYS_io_uring_setup, how)? as i32;
        let map = |len: u32, at: i64| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a fresh mapping of what the kernel has made for this.
            unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, libc::MAP_SHARED, fd, at) }.cast()
        };
        let (sq, cq) = (map(p[16] + p[0] * 4, 0), map(p[25] + p[1] * 16, 0x800_0000));
        Ok(Uring { fd, sq, cq, sqes: map(p[0] * 64, 0x1000_0000), p, unseen })
    }

    fn word(&self, base: *mut u8, at: u32) -> &AtomicU32 {
        // SAFETY: an offset that the kernel gave, inside the mapping, of an aligned word.
        unsafe { &*base.add(at as usize).cast::<AtomicU32>() }
    }

    /// Fills entry `index` of the queue and puts it at the queue's end.
    fn put_at(&self, index: u32, sqe: [u8; 64]) {
        // SAFETY: one of the entries.
        unsafe { self.sqes.add(index as usize * 64).copy_from(sqe.as_ptr(), 64) };
        let tail = self.word(self.sq, self.p[11]);
        let (t, mask) =
            (tail.load(Ordering::Acquire), self.word(self.sq, self.p[12]).load(Ordering::Relaxed));
        self.word(self.sq, self.p[16] + (t & mask) * 4).store(index, Ordering::Relaxed);
        // Pairs with the kernel's acquiring load: the entry and its index come first.
        tail.store(t + 1, Ordering::Release);
    }

    fn put(&self, sqe: [u8; 64]) {
        let t = self.word(self.sq, self.p[11]).load(Ordering::Relaxed);
        self.put_at(t & (self.p[0] - 1), sqe);
    }

    fn enter(&self, submit: usize, min: usize, flags: usize) -> Res {
        call(self.unseen, libc::SYS_io_uring_enter, [self.fd as usize, submit, min, flags, 0, 0])
    }

    /// The next completion: data and result.
    fn next(&self) -> Option<(u64, i32)> {
        let head = self.word(self.cq, self.p[20]);
        let (h, mask) =
            (head.load(Ordering::Acquire), self.word(self.cq, self.p[22]).load(Ordering::Relaxed));
        if h == self.word(self.cq, self.p[21]).load(Ordering::Acquire) {
            return None;
        }
        // struct io_uring_cqe: data (8 bytes), res, flags.
        let at = self.p[25] + (h & mask) * 16;
        let word = |i: u32| self.word(self.cq, at + i * 4).load(Ordering::Relaxed);
        let cqe = (u64::from(word(0)) | u64::from(word(1)) << 32, word(2) as i32);
        head.store(h + 1, Ordering::Release);
        Some(cqe)
    }

    /// All completions that there are.
    fn told(&self) -> String {
        let mut all = Vec::new();
        while let Some((data, r)) = self.next() {
            all.push(format!("{data}:{}", if r < 0 { sys::errno_name(-r) } else { r.to_string() }));
        }
        all.join(" ")
    }

    /// Submits all of these and tells what came of it.
    fn batch(&self, all: &[[u8; 64]]) -> String {
        for sqe in all {
            self.put(*sqe);
        }
        let r = self.enter(all.len(), all.len(), GETEVENTS);
        format!("{} -> {}", show(r), self.told())
    }

    /// To the thread that reads the queue, as libuv does it: it is woken where it says that it sleeps.
    fn post(&self, sqe: [u8; 64]) {
        const SQ_WAKEUP: usize = 2;
        self.put(sqe);
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.word(self.sq, self.p[14]).load(Ordering::Acquire) & 1 != 0 {
            let r = self.enter(0, 0, SQ_WAKEUP);
            if r != Ok(0) {
                log!("woken {}", show(r));
            }
        }
    }

    /// The next completion, as soon as there is one.
    fn comes(&self) -> String {
        for _ in 0..4000 {
            if let Some((data, r)) = self.next() {
                return format!("{data}:{}", if r < 0 { sys::errno_name(-r) } else { r.to_string() });
            }
            sys::sleep_ms(5);
        }
        "nothing came".into()
    }

    /// One operation on memory.
    pub fn run(&self, opcode: u8, fd: i32, b: &mut [u8]) -> Res {
        self.put(entry(opcode, fd, 0, b.as_mut_ptr() as u64, b.len() as u32, 0));
        self.enter(1, 1, GETEVENTS)?;
        let (_, r) = self.next().ok_or(libc::EAGAIN)?;
        if r < 0 { Err(-r) } else { Ok(r.into()) }
    }

    /// One change of a set.
    fn ctl(&self, set: i32, op: i32, fd: i32, events: i32, data: u64) -> String {
        self.batch(&[change(set, op, fd, &event(events, data), 1 << 40 | 5)])
    }
}

/// A ring, unless the kernel has none to give.
fn ring() -> Option<Uring> {
    match Uring::new() {
        Ok(u) => Some(u),
        Err(e) => {
            log!("io_uring_setup {}", sys::errno_name(e));
            None
        }
    }
}

fn now(set: i32) -> String {
    show_epoll(sys::epoll_wait(set, 64, 0))
}

fn soon(set: i32) -> String {
    show_epoll(sys::epoll_wait(set, 64, 10_000))
}

/// The set tells of bytes that come, and of none when they are read.
fn tells(w: &World, c: &mut Conn, set: i32) {
    w.start_far(c, "put 300");
    log!("{}", soon(set));
    log!("{} {}, then {}", w.finish(), c.get(300), now(set));
}

fn one_by_one(w: &World) {
    let mut c = w.pair();
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    log!("MOD {}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN, 1));
    log!("DEL {}", u.ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0));
    log!("ADD {}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    log!("ADD {}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLOUT, 2));
    tells(w, &mut c, set);
    log!("MOD {}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN | EPOLLOUT, 3));
    log!("{}", now(set));
    log!("MOD {}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN, 4));
    tells(w, &mut c, set);
    log!("DEL {}", u.ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("none {}", now(set));
    log!("DEL {}", u.ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0));
    log!("ADD {}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, u64::MAX));
    log!("{} {}", now(set), c.get(10));
    // By the call, what the ring has done, and the other way round.
    log!("{}", show(sys::epoll_ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN as u32, 6)));
    log!("{}", show(sys::epoll_ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0)));
    sys::epoll_add(set, c.fd, EPOLLIN, 7);
    log!("ADD {}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 8));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn errors_in_a_batch(w: &World) {
    let (mut c, mut d) = (w.pair(), w.pair());
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let closed = sys::dup(c.fd).expect("dup") as i32;
    sys::close(closed).expect("close");
    let e = event(EPOLLIN, 1);
    let f = event(EPOLLIN, 2);
    // errno is the program's.
    // SAFETY: this thread's own.
    unsafe { *libc::__errno_location() = 77 };
    let told = u.batch(&[
        change(set, EPOLL_CTL_ADD, c.fd, &e, 10),
        change(set, EPOLL_CTL_ADD, c.fd, &f, 11),
        change(set, EPOLL_CTL_ADD, closed, &e, 12),
        change(set, EPOLL_CTL_MOD, d.fd, &f, 13),
        entry(OP_NOP, -1, 0, 0, 0, 14),
        change(set, EPOLL_CTL_ADD, d.fd, &f, 15),
    ]);
    log!("{told}, errno {}", sys::errno());
    tells(w, &mut c, set);
    tells(w, &mut d, set);
    log!(
        "{}",
        u.batch(&[
            change(set, 77, c.fd, &e, 20),
            change(set, EPOLL_CTL_ADD, set, &e, 21),
            change(c.fd, EPOLL_CTL_ADD, d.fd, &e, 22),
            change(-1, EPOLL_CTL_ADD, d.fd, &e, 23),
            change(set, EPOLL_CTL_DEL, -1, &e, 24),
            change(set, EPOLL_CTL_DEL, d.fd, &e, 25),
            change(set, EPOLL_CTL_DEL, d.fd, &e, 26),
            change(set, EPOLL_CTL_ADD, d.fd, &f, u64::MAX),
        ])
    );
    tells(w, &mut d, set);
    // Many times over: what makes an entry fail is as good as new.
    for _ in 0..20 {
        let told = u.batch(&[
            change(set, EPOLL_CTL_ADD, c.fd, &f, 30),
            change(set, EPOLL_CTL_MOD, c.fd, &f, 31),
            change(set, EPOLL_CTL_ADD, set, &f, 32),
        ]);
        if told != "3 -> 30:EEXIST 31:0 32:EINVAL" {
            log!("{told}");
        }
    }
    tells(w, &mut c, set);
    w.still_good(&mut d);
}

fn edges_and_one_shots(w: &World) {
    let (mut c, mut d) = (w.pair(), w.pair());
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let (edge, once) = (event(EPOLLIN | EPOLLET, 1), event(EPOLLIN | EPOLLONESHOT, 2));
    let told =
        u.batch(&[change(set, EPOLL_CTL_ADD, c.fd, &edge, 1), change(set, EPOLL_CTL_ADD, d.fd, &once, 2)]);
    log!("{told}");
    for _ in 0..3 {
        w.far(&c, "put 100");
        c.arrived(100);
        log!("{} then {}", soon(set), now(set));
    }
    log!("{}", c.get(300));
    w.far(&d, "put 100");
    d.arrived(100);
    log!("{} then {}", soon(set), now(set));
    w.far(&d, "put 100");
    d.arrived(200);
    log!("disabled {}", now(set));
    // What is there is told anew of both.
    w.far(&c, "put 50");
    c.arrived(50);
    log!("{} then {}", soon(set), now(set));
    let told =
        u.batch(&[change(set, EPOLL_CTL_MOD, d.fd, &once, 3), change(set, EPOLL_CTL_MOD, c.fd, &edge, 4)]);
    log!("{told}: {} then {}", soon(set), now(set));
    log!("{} {}", c.get(50), d.get(200));
    w.still_good(&mut c);
    w.still_good(&mut d);
}

/// What is not submitted is not done.
fn more_than_are_submitted(w: &World) {
    let all: Vec<Conn> = (0..4).map(|_| w.pair()).collect();
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    for c in &all {
        w.far(c, "put 10");
        c.arrived(10);
    }
    let events: Vec<_> = (0..4).map(|i| event(EPOLLIN, i)).collect();
    for (i, c) in all.iter().enumerate() {
        u.put(change(set, EPOLL_CTL_ADD, c.fd, &events[i], i as u64));
    }
    log!("none {}: {} {}", show(u.enter(0, 0, 0)), u.told(), now(set));
    log!("two {}: {} {}", show(u.enter(2, 0, 0)), u.told(), now(set));
    log!("one {}: {} {}", show(u.enter(1, 1, GETEVENTS)), u.told(), now(set));
    log!("more {}: {} {}", show(u.enter(7, 7, GETEVENTS)), u.told(), now(set));
    log!("more {}: {} {}", show(u.enter(7, 7, GETEVENTS)), u.told(), now(set));
    for mut c in all {
        log!("{}", c.get(10));
        w.still_good(&mut c);
    }
    // Round and round the queue.
    let d = w.pair();
    for i in 0..50 {
        let op = if i % 2 == 0 { EPOLL_CTL_ADD } else { EPOLL_CTL_DEL };
        let told = u.ctl(set, op, d.fd, EPOLLIN, 9);
        if told != format!("1 -> {}:0", 1u64 << 40 | 5) {
            log!("{i} {told}");
        }
    }
}

/// The kernel takes no more after an entry that it can't read.
fn an_event_that_is_nowhere(w: &World) {
    let (mut c, mut d) = (w.pair(), w.pair());
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let e = event(EPOLLIN, 1);
    let f = event(EPOLLIN, 2);
    for at in [0, 8, 1 << 63] {
        u.put(change(set, EPOLL_CTL_ADD, c.fd, &e, 1));
        u.put(entry(OP_EPOLL_CTL, set, d.fd as u64, at, EPOLL_CTL_ADD as u32, 2));
        u.put(change(set, EPOLL_CTL_ADD, d.fd, &f, 3));
        log!("{}: {}", show(u.enter(3, 3, GETEVENTS)), u.told());
        w.far(&d, "put 10");
        d.arrived(10);
        log!("{}", now(set));
        log!("{}: {}", show(u.enter(1, 1, GETEVENTS)), u.told());
        log!("{} {}", show_epoll(sys::epoll_wait(set, 1, 0)), d.get(10));
        // No event is read for this.
        let del = |fd| entry(OP_EPOLL_CTL, set, fd as u64, at, EPOLL_CTL_DEL as u32, 4);
        log!("{}", u.batch(&[del(c.fd), del(d.fd)]));
    }
    w.still_good(&mut c);
}

fn sets_in_sets(w: &World) {
    let mut c = w.pair();
    let Some(u) = ring() else { return };
    let (a, b) = (sys::epoll_create(), sys::epoll_create());
    let e = event(EPOLLIN, 1);
    log!(
        "{}",
        u.batch(&[
            change(a, EPOLL_CTL_ADD, b, &e, 1),
            change(b, EPOLL_CTL_ADD, c.fd, &e, 2),
            change(b, EPOLL_CTL_ADD, a, &e, 3),
            change(a, EPOLL_CTL_ADD, b, &e, 4),
        ])
    );
    w.start_far(&c, "put 300");
    log!("{}", soon(a));
    log!("{} {} {}", w.finish(), now(b), c.get(300));
    log!("{} {}", now(a), now(b));
    log!("{}", u.batch(&[change(a, EPOLL_CTL_DEL, b, &e, 1), change(a, EPOLL_CTL_DEL, b, &e, 2)]));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{} {} {}", now(a), now(b), c.get(10));
    w.still_good(&mut c);
}

/// The queue names entries in any order, and one that there is not.
fn entries_out_of_order(w: &World) {
    let mut c = w.pair();
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let e = event(EPOLLIN, 1);
    u.put_at(5, change(set, EPOLL_CTL_ADD, c.fd, &e, 1));
    u.put_at(2, change(set, EPOLL_CTL_DEL, c.fd, &e, 2));
    u.put_at(7, change(set, EPOLL_CTL_DEL, c.fd, &e, 3));
    u.put_at(0, change(set, EPOLL_CTL_ADD, c.fd, &e, 4));
    log!("{}: {}", show(u.enter(4, 4, GETEVENTS)), u.told());
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// A call that submits and waits for more than that completes: a signal ends the wait, and the result is what was
/// submitted.
fn waits_for_what_is_not_there(w: &World) {
    extern "C" fn nothing(_: i32) {}
    let mut c = w.pair();
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let e = event(EPOLLIN, 1);
    sys::on_signal(libc::SIGUSR1, nothing, 0);
    let me = sys::this_thread();
    let t = crate::world::later(100, move || {
        for _ in 0..20 {
            sys::signal_thread(me, libc::SIGUSR1);
            sys::sleep_ms(20);
        }
    });
    u.put(change(set, EPOLL_CTL_ADD, c.fd, &e, 1));
    log!("{}: {}", show(u.enter(1, 3, GETEVENTS)), u.told());
    t.join().expect("signals were sent");
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn duplicates_and_numbers_again(w: &World) {
    let mut c = w.pair();
    let Some(mut u) = ring() else { return };
    let set = sys::epoll_create();
    let (first, other) = (u.fd, sys::dup(u.fd).expect("dup") as i32);
    log!("closed {}", show(sys::close(first)));
    let e = event(EPOLLIN, 1);
    u.put(change(set, EPOLL_CTL_ADD, c.fd, &e, 1));
    log!("{}: {}", show(u.enter(1, 1, GETEVENTS)), u.told());
    u.fd = other;
    log!("{}: {}", show(u.enter(1, 1, GETEVENTS)), u.told());
    tells(w, &mut c, set);
    // Its number is a connection's, a file's, another ring's.
    let d = w.pair();
    log!("{}", sys::dup2(d.fd, other).is_ok());
    u.put(change(set, EPOLL_CTL_DEL, c.fd, &e, 2));
    log!("no ring: {}", show(u.enter(1, 1, GETEVENTS)));
    tells(w, &mut c, set);
    let Some(v) = ring() else { return };
    log!("{}", sys::dup2(v.fd, other).is_ok());
    log!("{}", show(sys::close_range(v.fd as u32, v.fd as u32)));
    u = Uring { fd: other, ..v };
    log!("{}", u.ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0));
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 4));
    tells(w, &mut c, set);
    log!("{}", show(sys::close(other)));
    log!("{}", show(u.enter(0, 0, 0)));
    w.still_good(&mut c);
}

/// The child has the ring with its parent; what it changes is by its own numbers.
fn used_by_a_child(w: &World) {
    let mut c = w.pair();
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    let mut end = c.end;
    let pid = sys::fork(|| {
        let own = sys::epoll_create();
        log!("{}", u.ctl(own, EPOLL_CTL_ADD, end.fd, EPOLLIN, 2));
        log!("{}", u.ctl(own, EPOLL_CTL_ADD, end.fd, EPOLLIN, 3));
        log!("{}", soon(own));
        log!("{} {} {}", end.get(100), now(own), end.put(50));
        log!("{}", u.ctl(own, EPOLL_CTL_DEL, end.fd, 0, 0));
        0
    });
    w.far(&c, "put 100");
    log!("{}", sys::wait(pid));
    c.rx += 100;
    c.tx += 50;
    log!("far {}", w.far(&c, "get 50"));
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    tells(w, &mut c, set);
    log!("{}", u.ctl(set, EPOLL_CTL_DEL, c.fd, 0, 0));
    w.still_good(&mut c);
}

/// Each thread fills an entry under the program's lock and submits one outside of it, no matter whose. Its connection has
/// bytes waiting, so that its set shows whether the change was made as it is to be.
fn threads_that_share_one(w: &World) {
    let all: Vec<Conn> = (0..4).map(|_| w.pair()).collect();
    let Ok(u) = Uring::with(64) else { return };
    let sets: Vec<i32> = all.iter().map(|_| sys::epoll_create()).collect();
    let filling = Mutex::new(());
    let told = Mutex::new((0, 0));
    let wrong = AtomicU32::new(0);
    for c in &all {
        w.far(c, "put 10");
        c.arrived(10);
    }
    std::thread::scope(|s| {
        for (c, set) in all.iter().zip(&sets) {
            let (u, filling, told, wrong) = (&u, &filling, &told, &wrong);
            s.spawn(move || {
                let e = event(EPOLLIN, 7);
                for i in 0..301 {
                    let op = if i % 2 == 0 { EPOLL_CTL_ADD } else { EPOLL_CTL_DEL };
                    let fill = || {
                        let _g = filling.lock().expect("no panic");
                        u.put(change(*set, op, c.fd, &e, 1));
                    };
                    fill();
                    while !u.enter(1, 0, 0).is_ok_and(|n| n == 1) {}
                    // Mine has been submitted by me, or by one whose own is still there: until all are.
                    let mut t = told.lock().expect("no panic");
                    while let Some((_, r)) = u.next() {
                        t.0 += 1;
                        t.1 += i32::from(r != 0);
                    }
                    drop(t);
                    // The next change of this set comes after this one.
                    while u.word(u.sq, u.p[10]).load(Ordering::Acquire)
                        != u.word(u.sq, u.p[11]).load(Ordering::Acquire)
                    {
                        std::thread::yield_now();
                    }
                    let found = sys::epoll_wait(*set, 1, 0).map(|v| v.len());
                    if found != Ok(usize::from(op == EPOLL_CTL_ADD)) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    log!("{:?} {} wrong {wrong:?}", told.lock().expect("no panic"), u.told());
    for (mut c, set) in all.into_iter().zip(sets) {
        log!("{}", c.get(10));
        tells(w, &mut c, set);
        w.still_good(&mut c);
    }
}

/// As event loops have it: the ring is older than the connection, which is put into the set before it is upgraded.
fn before_the_connection_is(w: &World) {
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    let mut c = w.cold_on("4");
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    // Only a set that has been seen waited for lets its connections go to the ring.
    log!("{}", now(set));
    w.warm(&mut c, 200);
    tells(w, &mut c, set);
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN | EPOLLOUT, 2));
    log!("{}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN | EPOLLOUT, 2));
    log!("{}", now(set));
    log!("{}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN, 3));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// A connection in a set by a ring, with bytes that have come before the ring carries anything else.
fn in_a_set(w: &World) -> Option<(Conn, Uring, i32)> {
    let mut c = w.pair();
    let u = ring()?;
    let set = sys::epoll_create();
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    tells(w, &mut c, set);
    w.far(&c, "put 500");
    c.arrived(500);
    Some((c, u, set))
}

fn then_it_moves_bytes(w: &World) {
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    let mut b = [0; 500];
    let r = u.run(OP_RECV, c.fd, &mut b);
    log!("recv {} {}", c.checked(r, &b), now(set));
    for _ in 0..3 {
        let mut b = c.next(1000);
        log!("send {}", show(u.run(OP_SEND, c.fd, &mut b)));
        log!("far {}", w.far(&c, "get 1000"));
        w.far(&c, "put 1000");
        c.arrived(1000);
        let mut b = [0; 1000];
        let r = u.run(OP_RECV, c.fd, &mut b);
        log!("recv {} {}", c.checked(r, &b), now(set));
    }
    log!("{}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN, 2));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn then_it_polls(w: &World) {
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    let poll = |data| {
        let mut sqe = entry(OP_POLL_ADD, c.fd, 0, 0, 0, data);
        sqe[28..32].copy_from_slice(&(libc::POLLIN as u32).to_ne_bytes());
        sqe
    };
    let (first, second) = (poll(8), poll(9));
    log!("{}", u.batch(&[first]));
    log!("{} {}", c.get(500), now(set));
    w.start_far(&c, "delayput 200 50");
    log!("{}", u.batch(&[second]));
    log!("{} {}", w.finish(), c.get(200));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn then_it_closes(w: &World) {
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    log!("{}", c.get(500));
    let b = c.next(100);
    log!("{}", show(sys::send(c.fd, &b, libc::MSG_NOSIGNAL)));
    log!("{}", u.batch(&[entry(OP_CLOSE, c.fd, 0, 0, 0, 8)]));
    log!("{} {}", show(sys::send(c.fd, &b, libc::MSG_NOSIGNAL)), now(set));
    log!("far {}", w.far(&c, "drain"));
    // The number is another connection's.
    let mut d = w.pair();
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, d.fd, EPOLLIN, 2));
    tells(w, &mut d, set);
    w.still_good(&mut d);
}

fn moves_bytes_among_changes(w: &World) {
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    let mut b = [0u8; 500];
    let e = event(EPOLLIN | EPOLLOUT, 2);
    let told = u.batch(&[
        change(set, EPOLL_CTL_ADD, c.fd, &e, 1),
        change(set, EPOLL_CTL_MOD, c.fd, &e, 2),
        entry(OP_RECV, c.fd, 0, b.as_mut_ptr() as u64, 500, 3),
        change(set, EPOLL_CTL_DEL, c.fd, &e, 4),
        change(set, EPOLL_CTL_DEL, c.fd, &e, 5),
    ]);
    // When the bytes came into TCP is nobody's to say.
    let mut told: Vec<_> = told.split(' ').collect();
    told.sort_unstable();
    log!("{told:?} {}", c.checked(Ok(500), &b));
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 3));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// One that fails takes those after it along.
fn linked_changes(w: &World) {
    const IOSQE_IO_LINK: u8 = 4;
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    let e = event(EPOLLIN, 2);
    let mut first = change(set, EPOLL_CTL_ADD, c.fd, &e, 1);
    first[1] = IOSQE_IO_LINK;
    log!("{}", u.batch(&[first, change(set, EPOLL_CTL_DEL, c.fd, &e, 2)]));
    log!("{} {}", soon(set), c.get(500));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn under_a_registered_number(w: &World) {
    const REGISTER_RING_FDS: usize = 20;
    const ENTER_REGISTERED_RING: usize = 16;
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    // struct io_uring_rsrc_update: where (anywhere), reserved, what.
    let mut at = [u64::from(u32::MAX), u.fd as u64];
    let r = number(
        libc::SYS_io_uring_register,
        [u.fd as usize, REGISTER_RING_FDS, at.as_mut_ptr() as usize, 1, 0, 0],
    );
    log!("{}", show(r));
    if r.is_ok() {
        let mut b = [0u8; 500];
        u.put(entry(OP_RECV, c.fd, 0, b.as_mut_ptr() as u64, 500, 3));
        let index = at[0] as u32 as usize;
        let r = number(libc::SYS_io_uring_enter, [index, 1, 1, GETEVENTS | ENTER_REGISTERED_RING, 0, 0]);
        log!("{}: {} {}", show(r), u.told(), c.checked(Ok(500), &b));
    } else {
        log!("{}", c.get(500));
    }
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// A file can't be waited for. That is told by the kernel alone.
fn refused_by_the_file(w: &World) {
    let Some((mut c, u, set)) = in_a_set(w) else { return };
    let file = std::fs::File::open("/proc/self/exe").expect("it runs");
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, file.as_raw_fd(), EPOLLIN, 2));
    log!("{} {}", soon(set), c.get(500));
    log!("{}", u.ctl(set, EPOLL_CTL_MOD, c.fd, EPOLLIN, 3));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// A loop of libuv's up to 1.48: one ring for files, with a thread of the kernel's, in the loop's set; one for changes.
fn beside_one_that_a_thread_reads(w: &World) {
    let files = match Uring::made(8, SQPOLL, 10) {
        Ok(u) => u,
        Err(e) => return log!("io_uring_setup {}", sys::errno_name(e)),
    };
    log!("flags {} idle {} entries {} {}", files.p[2], files.p[4], files.p[0], files.p[1]);
    let Some(u) = ring() else { return };
    let set = sys::epoll_create();
    sys::epoll_add(set, files.fd, EPOLLIN, 9);
    let mut c = w.pair();
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    tells(w, &mut c, set);
    for i in 0..20 {
        files.post(entry(OP_NOP, -1, 0, 0, 0, i));
        log!("{} {}", soon(set), files.comes());
    }
    // All of a queue at once, and changes by it, of which one is refused and one ends a submission.
    for i in 0..7 {
        files.put(entry(OP_NOP, -1, 0, 0, 0, i));
    }
    files.post(entry(OP_NOP, -1, 0, 0, 0, 7));
    log!("{}", (0..8).map(|_| files.comes()).collect::<Vec<_>>().join(" "));
    let e = event(EPOLLIN, 2);
    files.put(change(set, EPOLL_CTL_ADD, c.fd, &e, 1));
    files.put(entry(OP_EPOLL_CTL, set, c.fd as u64, 0, EPOLL_CTL_ADD as u32, 2));
    files.post(change(set, EPOLL_CTL_MOD, c.fd, &e, 3));
    log!("{}", (0..3).map(|_| files.comes()).collect::<Vec<_>>().join(" "));
    tells(w, &mut c, set);
    log!("waits {}", show(files.enter(5, 0, GETEVENTS | 4)));
    log!("{} {}", show(sys::close(files.fd)), now(set));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

fn read_by_a_thread_then_it_moves_bytes(w: &World) {
    let Ok(u) = Uring::made(8, SQPOLL, 10) else { return };
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    for n in [500, 300, 200] {
        let mut b = vec![0u8; n];
        u.post(entry(OP_RECV, c.fd, 0, b.as_mut_ptr() as u64, n as u32, 3));
        log!("{} {}", u.comes(), c.checked(Ok(n as i64), &b));
        let b = c.next(n);
        u.post(entry(OP_SEND, c.fd, 0, b.as_ptr() as u64, n as u32, 4));
        log!("{} far {}", u.comes(), w.far(&c, &format!("get {n}")));
        w.far(&c, "put 300");
        c.arrived(300);
        if n == 300 {
            let r = c.get(100);
            log!("{r}");
        }
    }
    log!("{}", c.get(300));
    w.still_good(&mut c);
}

/// Once woken it reads the queue, and nobody calls it.
fn read_by_a_thread_that_is_awake(w: &World) {
    let Ok(u) = Uring::made(8, SQPOLL, 60_000) else { return };
    // It begins by falling asleep.
    u.post(entry(OP_NOP, -1, 0, 0, 0, 100));
    log!("{}", u.comes());
    for i in 0..20 {
        u.put(entry(OP_NOP, -1, 0, 0, 0, i));
        log!("{}", u.comes());
    }
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    let mut b = vec![0u8; 500];
    u.post(entry(OP_RECV, c.fd, 0, b.as_mut_ptr() as u64, 500, 3));
    log!("{} {}", u.comes(), c.checked(Ok(500), &b));
    w.still_good(&mut c);
}

/// Flags of which nothing is known here.
fn with_flags_that_nobody_knows(w: &World) {
    const SINGLE_ISSUER_AND_SUBMIT_ALL: u32 = 1 << 12 | 1 << 7;
    let Ok(u) = Uring::made(8, SINGLE_ISSUER_AND_SUBMIT_ALL, 0) else { return };
    let set = sys::epoll_create();
    let mut c = w.pair();
    log!("{}", u.ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN, 1));
    tells(w, &mut c, set);
    w.still_good(&mut c);
}

/// A ring made by instructions, unless the kernel has none to give.
fn unseen() -> Option<Uring> {
    match Uring::made_so(8, 0, 0, true) {
        Ok(u) => Some(u),
        Err(e) => {
            log!("io_uring_setup {}", sys::errno_name(e));
            None
        }
    }
}

/// Bytes by libc's calls, by the ring, and again, each way.
fn in_turn(w: &World, c: &mut Conn, u: &Uring) {
    for n in 0..3 {
        w.still_good(c);
        let b = c.next(700);
        u.put(entry(OP_SEND, c.fd, 0, b.as_ptr() as u64, 700, n));
        log!("{} {}", show(u.enter(1, 1, GETEVENTS)), u.comes());
        log!("far {}", w.far(c, "get 700"));
        let mut b = [0; 400];
        u.put(entry(OP_RECV, c.fd, 0, b.as_mut_ptr() as u64, 400, n));
        log!("{}", show(u.enter(1, 0, 0)));
        w.start_far(c, "put 400");
        log!("{} {}", u.comes(), w.finish());
        log!("{}", c.checked(Ok(400), &b));
    }
}

/// As a program does that has liburing linked into it.
fn unseen_before_the_connection_is(w: &World) {
    let Some(u) = unseen() else { return };
    let mut c = w.pair();
    in_turn(w, &mut c, &u);
    in_turn(w, &mut w.pair(), &u);
}

/// Its number is that of a file which has been closed, among those of others.
fn unseen_among_many_files(w: &World) {
    let open = || std::fs::File::options().read(true).write(true).open("/dev/null").expect("a file");
    let mut files: Vec<_> = (0..60).map(|_| open()).collect();
    let sockets: Vec<_> = (0..20).map(|_| sys::unix_pair(libc::SOCK_STREAM)).collect();
    drop(files.remove(47));
    let Some(u) = unseen() else { return };
    // The ring's turn comes, if not at once, with one of these.
    for _ in 0..8 {
        w.still_good(&mut w.pair());
    }
    let mut c = w.pair();
    in_turn(w, &mut c, &u);
    for s in sockets {
        let _ = s.map(sys::close);
    }
}

/// A connection is in memory; the ring is found when there is another.
fn unseen_in_the_middle(w: &World) {
    let mut c = w.pair();
    w.still_good(&mut c);
    let Some(u) = unseen() else { return };
    w.still_good(&mut c);
    w.still_good(&mut w.pair());
    w.still_good(&mut w.pair());
    in_turn(w, &mut c, &u);
}

/// The functions are liburing's, but the loader has not bound them.
fn unseen_found_by_dlsym(w: &World) {
    let Some(mut r) = crate::liburing::Ring::found() else { return };
    let mut c = w.pair();
    for _ in 0..3 {
        w.still_good(&mut c);
        crate::liburing::moves(w, &mut c, &mut r);
    }
}
