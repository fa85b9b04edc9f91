//! Rings of io_uring that carry epoll_ctl(2) and nothing else are followed; any other sends the process to TCP.
//!
//! Event loops (libuv from 1.46 on) have a ring for each loop, by which they change their epoll set in batches. Such a
//! ring moves no bytes. What it does to sets of ours is done here, by the hook of epoll_ctl, before the kernel sees it:
//!
//! | at | what is done |
//! | --- | --- |
//! | io_uring_setup | a ring whose entries the kernel reads in io_uring_enter alone gets an entry of `fd_table`, as an epoll set does, and a mapping of ours of its submission queue; any other: all connections go to TCP, before the call |
//! | io_uring_enter | the entries that this call may submit are read; is each of them a NOP or an EPOLL_CTL without any flag, those are done here if one of them names a set or a connection of ours |
//! | | each entry that was done becomes one whose completion says what epoll_ctl has said |
//! | | is one of them anything else, or the ring none that we know: all connections go to TCP, before the call |
//! | io_uring_register | what would hide later submissions: likewise |
//! | close, dup, dup2, close_range, fork | as for any entry; the mapping goes with the last number |
//!
//! # The result
//!
//! The kernel is to make the completion: it numbers them, wakes who waits for them, and knows what becomes of those for
//! which there is no room. So the entry is written over in place, all but `user_data` and what is zero anyway:
//!
//! | epoll_ctl has said | the entry becomes | which has that result for sure, since |
//! | --- | --- | --- |
//! | 0 | NOP | it does nothing |
//! | EBADF | EPOLL_CTL on the number -1 | there is none |
//! | EEXIST | ADD of B to A, two empty sets of our own | A has held B since they were made |
//! | ELOOP | ADD of A to B | A holds B |
//! | ENOENT | DEL of A from B | B holds nothing |
//! | EINVAL | DEL of A from A | no set holds itself |
//! | anything else (ENOMEM, ENOSPC, EPERM) | it stays, and all connections go to TCP first | the kernel is asked again, and what it says then is true of sets that it alone has |
//!
//! (From 6.10 on NOP gives any result that it is told to. These do on every kernel that has EPOLL_CTL, and are one way
//! for all.) None of them changes anything, so they may be met once more: if the call takes none of them or only some
//! (EAGAIN, EBUSY), the next finds NOPs, which are left as they are, and calls on A and B, which are not sets of the
//! program's and fail again as they are to.
//!
//! # A thread that reads the queue
//!
//! libuv up to 1.48 has a second ring for each loop, for files, with IORING_SETUP_SQPOLL: a thread of the kernel's reads its
//! queue, so that nobody can look first. Such a ring, if the thread is to sleep soon, is made without that flag. Its queue
//! says for ever that the thread sleeps (IORING_SQ_NEED_WAKEUP), which is a bit that nobody but such a thread changes, so
//! that a program calls io_uring_enter after each change of the queue, as it has to with a thread that sleeps. This call submits what there is, as
//! the thread would have done, and has the result that it would have had. So it does when the connections are on TCP for
//! good, only without a look.
//!
//! # What holds it together
//!
//! The queue is the program's memory as much as the kernel's, so that words of it are loaded as atomics, each index is
//! held against the number of entries, and no more is submitted than was looked at. From the look to the end of the
//! submission the ring is locked: of two threads that enter at a time one would find the other's entries done already,
//! but the kernel would take from the queue what neither has seen. It does not sleep meanwhile, for a call that may wait
//! for completions is made in two: to submit, and, without the lock, to wait. The kernel does the same in one.
//!
//! A program that gives up entries which a failed call has not taken finds them done all the same.

use super::direct::{go_quiet, quiet};
use super::epoll;
use super::making::made;
use crate::fd_table::{self, Ref};
use crate::hook::{errno, set_errno, settings};
use engine::fd::Fd;
use engine::reason::Reason;
use engine::{lock, sys};
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_DEL, c_int, c_long, epoll_event};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};

// include/uapi/linux/io_uring.h
const SETUP_SQPOLL: u32 = 1 << 1;
const SETUP_CQSIZE: u32 = 1 << 3;
const SETUP_CLAMP: u32 = 1 << 4;
const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_TASKRUN_FLAG: u32 = 1 << 9;
const SETUP_NO_SQARRAY: u32 = 1 << 16;
/// Flags with which the entries are 64 bytes of the kernel's, and are read by nobody but a call that submits them.
/// IORING_SETUP_SUBMIT_ALL is not among them: see [`Ring::act`].
const FOLLOWED: u32 = SETUP_CQSIZE | SETUP_CLAMP | SETUP_COOP_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_NO_SQARRAY;
/// Those that go with IORING_SETUP_SQPOLL.
const FOLLOWED_POLLED: u32 = SETUP_SQPOLL | SETUP_CQSIZE | SETUP_CLAMP | SETUP_NO_SQARRAY;
/// A thread that sleeps after at most so many ms without work does so nearly always (libuv's: 10). One that is to stay
/// awake is what its program wants.
const NAP_MS: std::ops::RangeInclusive<u32> = 1..=100;
/// IORING_FEAT_FAST_POLL, of 5.7: the kernel has EPOLL_CTL, which is of 5.6.
const FEATURES: u32 = 1 << 5;
const OFF_SQ_RING: usize = 0;
const OFF_SQES: usize = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_SQ_WAKEUP: u32 = 1 << 1;
const ENTER_SQ_WAIT: u32 = 1 << 2;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
/// In the queue's flags: the thread that reads it sleeps.
const SQ_NEED_WAKEUP: u32 = 1 << 0;
/// IORING_REGISTER_BUFFERS to IORING_UNREGISTER_PERSONALITY: buffers, files, eventfds, a probe, credentials. What an
/// entry does with them is another operation, or has one of the fields that [`Sqe::is_plain`] wants to be zero.
const REGISTERED: std::ops::RangeInclusive<u32> = 0..=10;
const OP_NOP: u8 = 0;
pub(super) const OP_EPOLL_CTL: u8 = 29;
/// IORING_MAX_ENTRIES.
pub(super) const MOST_ENTRIES: u32 = 32768;
/// No offset in the part of a ring that comes before its entries is as large.
const FAR: u32 = 1 << 20;

/// struct io_uring_params.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq_head: u32,
    sq_tail: u32,
    sq_mask: u32,
    sq_count: u32,
    sq_flags: u32,
    sq_dropped: u32,
    sq_array: u32,
    sq_more: [u32; 3],
    cq: [u32; 10],
}
const _: () = assert!(size_of::<Params>() == 120 && std::mem::offset_of!(Params, sq_array) == 64);

/// struct io_uring_sqe, as words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sqe([u64; 8]);
const SQE: usize = 64;
/// Where the word is that belongs to the program alone, `user_data`, and the first of those that are zero anyway.
const USER_DATA: usize = 4;

impl Sqe {
    fn opcode(&self) -> u8 {
        self.0[0] as u8
    }

    /// Whether it is as simple as its kind can be: no flags and no `ioprio`; `buf_index`, `personality` and
    /// `splice_fd_in` are zero.
    fn is_plain(&self) -> bool {
        self.0[0] & 0xffff_ff00 == 0 && self.0[5] == 0
    }

    /// What EPOLL_CTL is told: the set, the operation, the number, the event.
    fn control(&self) -> (c_int, c_int, c_int, *mut epoll_event) {
        let [head, off, addr, len, ..] = self.0;
        ((head >> 32) as c_int, len as c_int, off as c_int, addr as usize as *mut epoll_event)
    }

    /// An EPOLL_CTL; `user_data` and what is zero anyway are left out.
    fn controls(set: c_int, op: c_int, fd: c_int) -> [u64; USER_DATA] {
        let head = u64::from(set as u32) << 32 | u64::from(OP_EPOLL_CTL);
        [head, u64::from(fd as u32), std::ptr::from_ref(&NO_EVENT).addr() as u64, u64::from(op as u32)]
    }
}

/// What an ADD that will fail is told of; the kernel reads it before it fails.
static NO_EVENT: [u64; 2] = [0; 2];

/// What the entries say that a call may submit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batch {
    /// Nothing about what is ours: the kernel alone.
    Foreign,
    /// EPOLL_CTL on sets or connections of ours.
    Ours,
    /// Something else.
    Other,
}

/// A ring: its submission queue, in a mapping of ours.
#[derive(Debug)]
pub struct Ring {
    /// Held from the look at entries to the end of their submission.
    lock: AtomicU32,
    /// The mappings of the queue and of the entries, and how long the first is.
    queue: AtomicUsize,
    queue_len: AtomicUsize,
    sqes: AtomicUsize,
    /// As many entries, a power of two.
    entries: AtomicU32,
    /// Where the words are in the queue.
    head: AtomicU32,
    tail: AtomicU32,
    /// Where the queue's flags are, if the program thinks that a thread of the kernel reads it; else 0.
    polled: AtomicU32,
    /// Where the indices are; 0: entries are taken in their order (IORING_SETUP_NO_SQARRAY).
    array: AtomicU32,
}

impl Default for Ring {
    fn default() -> Self {
        Self::new()
    }
}

impl Ring {
    /// An unused one.
    pub const fn new() -> Self {
        Ring {
            lock: AtomicU32::new(0),
            queue: AtomicUsize::new(0),
            queue_len: AtomicUsize::new(0),
            sqes: AtomicUsize::new(0),
            entries: AtomicU32::new(0),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            polled: AtomicU32::new(0),
            array: AtomicU32::new(0),
        }
    }

    /// It is the ring `fd`, as the kernel has described it; `polled`: the program has asked for a thread that reads the
    /// queue. False: it can't be mapped.
    fn map(&self, fd: c_int, p: &Params, polled: bool) -> bool {
        let array = if p.flags & SETUP_NO_SQARRAY == 0 { p.sq_array } else { 0 };
        let flags = if polled { p.sq_flags } else { 0 };
        let places = [p.sq_head, p.sq_tail, array, flags];
        if !p.sq_entries.is_power_of_two()
            || p.sq_entries > MOST_ENTRIES
            || places.iter().any(|at| at % 4 != 0 || *at >= FAR)
            || (array == 0) != (p.flags & SETUP_NO_SQARRAY != 0)
            || (flags == 0) == polled
        {
            return false;
        }
        let indices = if array == 0 { 0 } else { p.sq_entries };
        let queue_len = (p.sq_head.max(p.sq_tail).max(flags) + 4).max(array + indices * 4) as usize;
        // IORING_FEAT_SINGLE_MMAP or not: the submission queue is what lies at this offset.
        let Some(queue) = sys::map_shared(fd, queue_len, OFF_SQ_RING) else { return false };
        let Some(sqes) = sys::map_shared(fd, p.sq_entries as usize * SQE, OFF_SQES) else {
            // SAFETY: mapped above, and nobody else has it.
            unsafe { sys::unmap(queue, queue_len) };
            return false;
        };
        // Relaxed: published by the table, as the entry's other words.
        self.queue.store(queue, Relaxed);
        self.queue_len.store(queue_len, Relaxed);
        self.sqes.store(sqes, Relaxed);
        self.entries.store(p.sq_entries, Relaxed);
        self.head.store(p.sq_head, Relaxed);
        self.tail.store(p.sq_tail, Relaxed);
        self.array.store(array, Relaxed);
        self.polled.store(flags, Relaxed);
        if polled {
            // Relaxed, both: the program has the ring when this call returns. The kernel's changes are of other bits.
            ANY_POLLED.store(true, Relaxed);
            self.word(flags).fetch_or(SQ_NEED_WAKEUP, Relaxed);
        }
        true
    }

    /// The last number is closed, and nobody uses it.
    pub fn clear(&self) {
        let (queue, sqes) = (self.queue.swap(0, Relaxed), self.sqes.swap(0, Relaxed));
        if queue != 0 {
            // SAFETY: mapped in `map` with that length; the last reference to the entry is gone.
            unsafe { sys::unmap(queue, self.queue_len.load(Relaxed)) };
            // SAFETY: as above.
            unsafe { sys::unmap(sqes, self.entries.load(Relaxed) as usize * SQE) };
        }
    }

    /// In a forked child, which has the ring with its parent: the lock is each one's own.
    pub fn after_fork_child(&self) {
        self.lock.store(0, Relaxed);
    }

    /// Whether the program thinks that a thread of the kernel reads the queue.
    fn is_polled(&self) -> bool {
        self.polled.load(Relaxed) != 0
    }

    /// The lock. `None`: a handler has come between a look and its submission (before the first upgrade they are not made
    /// to wait).
    fn locked(&self) -> Option<lock::Guard<'_>> {
        (!lock::held_by_me(&self.lock)).then(|| lock::lock(&self.lock))
    }

    /// Looks at the `n` entries from `head` on, and does what is ours: how many are to be submitted, and whether each of
    /// them has been done. `None`: the connections must leave first.
    fn pass(&self, head: u32, n: u32) -> Option<(u32, bool)> {
        match self.look(head, n) {
            Batch::Foreign => Some((n, false)),
            Batch::Ours => self.act(head, n).map(|n| (n, true)),
            Batch::Other => None,
        }
    }

    /// A word of the queue.
    fn word(&self, at: u32) -> &AtomicU32 {
        let p = self.queue.load(Relaxed) + at as usize;
        // SAFETY: `map` has made the mapping long enough for the places that it keeps, which are aligned as it is; it
        // is there as long as the entry, on which the caller has a reference. Others write it: an atomic.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU32>(p) }
    }

    /// A word of an entry.
    fn sqe_word(&self, index: u32, word: usize) -> &AtomicU64 {
        let index = index & (self.entries.load(Relaxed) - 1);
        let p = self.sqes.load(Relaxed) + index as usize * SQE + (word % (SQE / 8)) * 8;
        // SAFETY: inside the mapping of so many entries, by the mask and the remainder; else as above.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(p) }
    }

    /// How many entries wait to be submitted, and the position of the first.
    fn waiting(&self) -> (u32, u32) {
        // Relaxed: the kernel moves it, in calls that are over or wait for our lock.
        let head = self.word(self.head.load(Relaxed)).load(Relaxed);
        // Acquire: pairs with the program's release of the entries that it has filled, as the kernel's own load does.
        let tail = self.word(self.tail.load(Relaxed)).load(Acquire);
        (tail.wrapping_sub(head).min(self.entries.load(Relaxed)), head)
    }

    /// The index of the entry at a position; `None`: there is none.
    fn index(&self, at: u32) -> Option<u32> {
        let entries = self.entries.load(Relaxed);
        let slot = at & (entries - 1);
        match self.array.load(Relaxed) {
            0 => Some(slot),
            // Relaxed: written before the tail.
            array => Some(self.word(array + slot * 4).load(Relaxed)).filter(|i| *i < entries),
        }
    }

    /// The entry of an index, each word read once.
    fn read(&self, index: u32) -> Sqe {
        // Relaxed: written before the tail.
        Sqe(std::array::from_fn(|word| self.sqe_word(index, word).load(Relaxed)))
    }

    /// Another entry in the place of one: see the module.
    fn rewrite(&self, index: u32, with: [u64; USER_DATA]) {
        for (word, value) in with.into_iter().enumerate() {
            // Relaxed: the kernel reads it in a call that this thread makes, or that waits for our lock.
            self.sqe_word(index, word).store(value, Relaxed);
        }
    }

    /// What the `n` entries from `head` on say.
    fn look(&self, head: u32, n: u32) -> Batch {
        let mut batch = Batch::Foreign;
        for i in 0..n {
            let Some(index) = self.index(head.wrapping_add(i)) else { return Batch::Other };
            let sqe = self.read(index);
            match sqe.opcode() {
                OP_NOP if sqe.is_plain() => {}
                OP_EPOLL_CTL if sqe.is_plain() => {
                    let (set, _, fd, _) = sqe.control();
                    if fd_table::epoll(set).is_some() || fd_table::stream(fd).is_some() {
                        batch = Batch::Ours;
                    }
                }
                _ => return Batch::Other,
            }
        }
        batch
    }

    /// Does what the `n` entries from `head` on say, all in their order. How many of them are to be submitted; `None`:
    /// one has failed in a way that only the kernel can tell the program of.
    ///
    /// Where the event can't be read the kernel refuses the entry, and takes none of those after it in this call (since
    /// it is not told to by IORING_SETUP_SUBMIT_ALL): nor are they done here.
    fn act(&self, head: u32, n: u32) -> Option<u32> {
        for i in 0..n {
            let index = self.index(head.wrapping_add(i))?;
            let sqe = self.read(index);
            if sqe.opcode() != OP_EPOLL_CTL {
                continue;
            }
            let (set, op, fd, event) = sqe.control();
            if op != EPOLL_CTL_DEL && !sys::is_accessible(event.addr(), size_of::<epoll_event>(), false) {
                return Some(i + 1);
            }
            // SAFETY: what the program tells epoll_ctl(2), as far as that looks at it.
            let r = unsafe { epoll::epoll_ctl(set, op, fd, event) };
            self.rewrite(index, if r == 0 { [OP_NOP.into(), 0, 0, 0] } else { failing(errno())? });
        }
        Some(n)
    }
}

/// There is, or was, a ring of which the program thinks that a thread of the kernel reads it.
static ANY_POLLED: AtomicBool = AtomicBool::new(false);

/// Two sets of our own that fail as they are asked to: see the module. -1: they are not made yet.
static PAIR: [AtomicI32; 2] = [const { AtomicI32::new(-1) }; 2];
static PAIR_LOCK: AtomicU32 = AtomicU32::new(0);

/// A and B.
fn pair() -> Option<[c_int; 2]> {
    let _g = lock::lock(&PAIR_LOCK);
    // Relaxed, here and below: under the lock.
    let made = PAIR.each_ref().map(|n| n.load(Relaxed));
    // Both: another thread may have been between the two stores when this process was forked.
    if made.iter().all(|n| *n >= 0) {
        return Some(made);
    }
    let both = [sys::epoll_create().ok()?, sys::epoll_create().ok()?];
    let [a, b] = both.each_ref().map(Fd::raw);
    if sys::epoll_ctl(a, EPOLL_CTL_ADD, b, 0, 0) != 0 {
        return None;
    }
    // They stay, also for those who are forked.
    std::mem::forget(both);
    for (n, fd) in PAIR.iter().zip([a, b]) {
        n.store(fd, Relaxed);
    }
    Some([a, b])
}

/// In a forked child: whoever held the lock is not there.
pub fn after_fork_child() {
    PAIR_LOCK.store(0, Relaxed);
}

/// An entry that fails with `e`.
fn failing(e: c_int) -> Option<[u64; USER_DATA]> {
    if e == libc::EBADF {
        return Some(Sqe::controls(-1, EPOLL_CTL_DEL, -1));
    }
    if !matches!(e, libc::EEXIST | libc::ELOOP | libc::ENOENT | libc::EINVAL) {
        return None;
    }
    let [a, b] = pair()?;
    Some(match e {
        libc::EEXIST => Sqe::controls(a, EPOLL_CTL_ADD, b),
        libc::ELOOP => Sqe::controls(b, EPOLL_CTL_ADD, a),
        libc::ENOENT => Sqe::controls(b, EPOLL_CTL_DEL, a),
        _ => Sqe::controls(a, EPOLL_CTL_DEL, a),
    })
}

/// The program does by io_uring what nobody can follow. errno is its own.
#[cold]
fn lost() {
    if !quiet() && !settings().disable {
        let e = errno();
        go_quiet(Reason::AsyncIo);
        set_errno(e);
    }
}

/// io_uring_setup(2); `kernel` makes it with parameters at the address that it is given.
pub fn setup(params: *mut Params, kernel: impl Fn(usize) -> c_long) -> c_long {
    if quiet() || settings().disable {
        return kernel(params.addr());
    }
    if !sys::is_accessible(params.addr(), size_of::<Params>(), true) {
        lost();
        return kernel(params.addr());
    }
    // SAFETY: the program's parameters, which it vouches for to the kernel; they are there.
    let asked = unsafe { params.read_unaligned() };
    let polled = asked.flags & SETUP_SQPOLL != 0;
    let known = if polled { FOLLOWED_POLLED } else { FOLLOWED };
    if asked.flags & !known != 0 || polled && !NAP_MS.contains(&asked.sq_thread_idle) {
        lost();
        return kernel(params.addr());
    }
    // A copy, so that what is made is what was looked at.
    let mut p = Params { flags: asked.flags & !SETUP_SQPOLL, ..asked };
    let at = (&raw mut p).expose_provenance();
    let fd = made(|| kernel(at) as c_int);
    if fd < 0 {
        return fd.into();
    }
    if p.features & FEATURES == 0 || !fd_table::add_ring(fd, |r| r.map(fd, &p, polled)) {
        // Nothing has been submitted yet.
        lost();
        if polled {
            sys::close(fd);
            return kernel(params.addr());
        }
    }
    p.flags |= asked.flags & SETUP_SQPOLL;
    // SAFETY: as above; the kernel would have written them.
    unsafe { params.write_unaligned(p) };
    fd.into()
}

/// What io_uring_enter(2) is told, but for the ring and how to wait.
#[derive(Clone, Copy, Debug)]
pub struct Enter {
    /// Entries to submit, at most.
    pub submit: u32,
    /// Completions to wait for.
    pub min: u32,
    /// IORING_ENTER_….
    pub flags: u32,
}

/// io_uring_enter(2) on `fd`; `kernel` makes it.
pub fn enter(fd: c_int, call: Enter, kernel: impl Fn(Enter) -> c_long) -> c_long {
    if call.flags & ENTER_REGISTERED_RING != 0 {
        lost();
        return enter_registered(call, &kernel);
    }
    match fd_table::ring(fd) {
        Some(e) if e.ring.is_polled() => return enter_polled(e, call, &kernel),
        Some(e) if !quiet() && call.flags & !(ENTER_GETEVENTS | ENTER_EXT_ARG) == 0 => {
            return enter_followed(e, call, &kernel);
        }
        Some(_known) => lost(),
        // Something else that we know, or nothing, is no ring, as the kernel will say.
        None if quiet() || fd_table::lookup(fd).is_some() || sys::getfl(fd) < 0 => {}
        None => lost(),
    }
    kernel(call)
}

/// On a ring that is named by something else than its number: one whose thread sleeps, or none that it has, is submitted
/// to as far as it goes.
fn enter_registered(call: Enter, kernel: &dyn Fn(Enter) -> c_long) -> c_long {
    if call.flags & ENTER_SQ_WAKEUP == 0 || !ANY_POLLED.load(Relaxed) {
        return kernel(call);
    }
    let flags = ENTER_REGISTERED_RING | ENTER_SQ_WAKEUP;
    let r = kernel(Enter { submit: i32::MAX as u32, min: 0, flags });
    if r < 0 { r } else { waited(call, kernel) }
}

/// What is left of a call on a ring that is read by a thread: all count as submitted.
fn waited(call: Enter, kernel: &dyn Fn(Enter) -> c_long) -> c_long {
    let flags = call.flags & !(ENTER_SQ_WAKEUP | ENTER_SQ_WAIT);
    let r = if flags & !ENTER_REGISTERED_RING == 0 { 0 } else { kernel(Enter { submit: 0, flags, ..call }) };
    if call.submit == 0 { r } else { call.submit.into() }
}

/// On a ring that is submitted to in calls.
fn enter_followed(e: Ref, call: Enter, kernel: &dyn Fn(Enter) -> c_long) -> c_long {
    if call.submit == 0 {
        drop(e);
        return kernel(call);
    }
    let before = errno();
    let Some(guard) = e.ring.locked() else {
        drop(e);
        lost();
        return kernel(call);
    };
    let (waiting, head) = e.ring.waiting();
    let Some((n, done)) = e.ring.pass(head, waiting.min(call.submit)) else {
        drop(guard);
        drop(e);
        set_errno(before);
        lost();
        return kernel(call);
    };
    set_errno(before);
    // The kernel waits only if it has taken as many as it was to.
    let waits = n == call.submit && call.flags & ENTER_GETEVENTS != 0;
    if waits && done && call.min <= n {
        // All complete as they are submitted, or at once after: there is nothing to sleep for.
        return kernel(call);
    }
    let r = kernel(Enter { submit: n, min: 0, flags: 0 });
    drop(guard);
    drop(e);
    if !waits || r != c_long::from(n) {
        return r;
    }
    // What has been submitted is the result, whatever becomes of the wait.
    kernel(Enter { submit: 0, ..call });
    set_errno(before);
    r
}

/// On a ring of which the program thinks that a thread of the kernel's reads it: this call does what that would do, also
/// when nobody looks any more.
#[cold]
fn enter_polled(e: Ref, call: Enter, kernel: &dyn Fn(Enter) -> c_long) -> c_long {
    let before = errno();
    loop {
        let Some(guard) = e.ring.locked() else { break };
        let (waiting, head) = e.ring.waiting();
        let passed = if quiet() { Some((waiting, false)) } else { e.ring.pass(head, waiting) };
        set_errno(before);
        let Some((n, _)) = passed else {
            drop(guard);
            lost();
            continue;
        };
        if n == 0 {
            break;
        }
        let r = kernel(Enter { submit: n, min: 0, flags: 0 });
        if r <= 0 {
            return r;
        }
    }
    drop(e);
    waited(call, kernel)
}

/// io_uring_register(2) is about to be called: whether what is submitted later can still be seen.
pub fn register(fd: c_int, op: u32) {
    // IORING_REGISTER_RING_FDS makes names for rings that are no numbers; what is new may do anything. A ring that is
    // named so already has the top bit set, and is in no table.
    if !REGISTERED.contains(&op) && !quiet() && (fd < 0 || sys::getfl(fd) >= 0) {
        lost();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says to an entry, done as a system call.
    fn said(words: [u64; USER_DATA]) -> isize {
        let (set, op, fd, event) = Sqe([words[0], words[1], words[2], words[3], 0, 0, 0, 0]).control();
        // SAFETY: no event, or NO_EVENT.
        unsafe { sys::epoll_ctl_raw(set, op, fd, event) }
    }

    #[test]
    fn entries_fail_as_they_are_to_and_again() {
        for _ in 0..3 {
            for e in [libc::EBADF, libc::EEXIST, libc::ELOOP, libc::ENOENT, libc::EINVAL] {
                let words = failing(e).expect("one that is known");
                assert_eq!(words[0] as u8, OP_EPOLL_CTL);
                assert_eq!(said(words), -(e as isize));
            }
        }
        assert_eq!(failing(libc::ENOSPC), None);
    }

    #[test]
    fn what_is_plain() {
        let mut sqe = Sqe([0; 8]);
        sqe.0[..USER_DATA].copy_from_slice(&Sqe::controls(7, EPOLL_CTL_ADD, 9));
        assert!(sqe.is_plain() && sqe.opcode() == OP_EPOLL_CTL);
        assert_eq!((sqe.control().0, sqe.control().1, sqe.control().2), (7, EPOLL_CTL_ADD, 9));
        for (word, bit) in [(0, 8), (0, 15), (0, 16), (0, 31), (5, 0), (5, 16), (5, 32)] {
            let mut s = sqe;
            s.0[word] |= 1 << bit;
            assert!(!s.is_plain(), "{word} {bit}");
        }
        sqe.0[USER_DATA] = u64::MAX;
        assert!(sqe.is_plain());
    }
}
