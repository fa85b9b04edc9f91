//! fd number → what we know of it. The look-up for an fd that is not ours is one load and one branch.
//!
//! Entries come from chunks that are never unmapped, so a stale pointer reads an entry, if not the right
//! one; a reference is taken only from a count above zero and counts only if the table still says the same
//! after it was taken. An entry is reused when its count is zero.
//!
//! | holder | references |
//! | --- | --- |
//! | each fd number in the table | 1 |
//! | each call under way | 1 |
//!
//! The last fd may be closed while calls are under way in other threads. The kernel keeps a socket until they
//! are over, and so does this table: the socket is parked under a number of ours, and ends with the last
//! reference.
//!
//! The numbers of a connection may be made to name another socket ([`Moves`]). While that is done they name
//! [`MOVING`], of which nobody gets a reference, and who looks one up waits. It is done only if no call is under way
//! that has one of the connection.

use crate::hooks::epoll::{Members, Set};
use crate::hooks::uring::Ring;
use engine::conn::Socket;
use engine::counts::{self, Counted};
use engine::report::Sums;
use engine::section::{self, Section};
use std::alloc::Layout;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// fds above this are passed through.
const MAX_FD: usize = 1 << 20;
static TABLE: [AtomicPtr<Entry>; MAX_FD] = [const { AtomicPtr::new(std::ptr::null_mut()) }; MAX_FD];
/// Numbers of sockets that were made as TCP's, until they are closed: [`is_tcp`].
static TCP: [AtomicU64; MAX_FD / 64] = [const { AtomicU64::new(0) }; MAX_FD / 64];
static ENDED: Sums = Sums::new();
/// No entry above this number.
static HIGHEST: AtomicU32 = AtomicU32::new(0);
/// Numbers that name an entry: counted before they do, and off when they no longer do.
static NAMED: AtomicU32 = AtomicU32::new(0);
/// What a number names while it is being moved. Its count stays zero.
static MOVING: Entry = Entry::new();
/// Held while numbers name [`MOVING`], and over a fork: the child would have nobody to move them on.
static MOVES: AtomicU32 = AtomicU32::new(0);

/// What an fd is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A TCP connection.
    Stream = 1,
    /// An epoll set.
    Epoll = 2,
    /// A ring of io_uring.
    Ring = 3,
}

/// An open file description of ours.
#[derive(Debug)]
pub struct Entry {
    refs: AtomicU32,
    kind: AtomicU32,
    /// fd numbers of this process that name it.
    fds: AtomicU32,
    /// What `before_close` said.
    last: AtomicU32,
    next_free: AtomicPtr<Entry>,
    /// A descriptor of ours, plus one, whose close tells a relay to begin: 0: none.
    heir: AtomicU32,
    /// The connection.
    pub sock: Socket,
    /// The epoll sets the connection is in.
    pub members: Members,
    /// The epoll set.
    pub set: Set,
    /// The ring of io_uring.
    pub ring: Ring,
}

impl Entry {
    /// Whether it is a connection.
    #[inline]
    pub fn is_stream(&self) -> bool {
        self.kind.load(Relaxed) == Kind::Stream as u32
    }

    /// Whether it is an epoll set.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.kind.load(Relaxed) == Kind::Epoll as u32
    }

    /// `word` is closed with the connection, or with the process. One that there is already goes first: its relay shares
    /// with this one from now on, as two processes share a connection.
    pub fn leave_to(&self, word: engine::fd::Fd) {
        // Relaxed: whoever takes the number out owns it.
        let old = self.heir.swap(word.raw() as u32 + 1, Relaxed);
        std::mem::forget(word);
        drop(heir(old));
    }

    /// Whether a relay is to go on with the connection.
    pub fn has_heir(&self) -> bool {
        self.heir.load(Relaxed) != 0
    }

    /// See [`Ref::id`].
    pub fn id(&'static self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Drops a reference whose holder can't any more.
    ///
    /// # Safety
    /// `sock` is part of an entry, and a reference of it is the caller's to drop.
    pub unsafe fn forsake(sock: &Socket) {
        // SAFETY: as the caller vouches.
        release(unsafe { Self::of(sock) });
    }

    /// The entry of a connection.
    ///
    /// # Safety
    /// `sock` is part of an entry.
    pub unsafe fn of(sock: &Socket) -> &'static Entry {
        let e = std::ptr::from_ref(sock).cast::<u8>().wrapping_sub(std::mem::offset_of!(Entry, sock));
        // SAFETY: as the caller vouches; entries are never unmapped.
        unsafe { &*e.cast::<Entry>() }
    }

    /// Drops a reference whose holder can't any more, and which is the caller's to drop. In a section.
    pub fn release(&'static self) {
        release(self);
    }

    const fn new() -> Self {
        Entry {
            refs: AtomicU32::new(0),
            kind: AtomicU32::new(0),
            fds: AtomicU32::new(0),
            last: AtomicU32::new(0),
            next_free: AtomicPtr::new(std::ptr::null_mut()),
            heir: AtomicU32::new(0),
            sock: Socket::new(),
            members: Members::new(),
            set: Set::new(),
            ring: Ring::new(),
        }
    }
}

/// What [`Entry::leave_to`] has kept.
fn heir(word: u32) -> Option<engine::fd::Fd> {
    word.checked_sub(1).map(|fd| engine::fd::Fd::from_raw(fd as i32))
}

/// A counted reference. Whoever has one is in a section: no handler of the program's comes in between.
#[derive(Debug)]
pub struct Ref(&'static Entry, Section);

impl std::ops::Deref for Ref {
    type Target = Entry;
    #[inline]
    fn deref(&self) -> &Entry {
        self.0
    }
}

impl Clone for Ref {
    fn clone(&self) -> Self {
        self.0.refs.fetch_add(1, Relaxed);
        Ref(self.0, self.1.clone())
    }
}

impl Ref {
    /// The entry. It is never unmapped, but another description's once the last reference is gone.
    pub fn entry(&self) -> &'static Entry {
        self.0
    }

    /// The entry's address: the same for all fds of a description.
    pub fn id(&self) -> usize {
        std::ptr::from_ref(self.0) as usize
    }
}

impl Drop for Ref {
    #[inline]
    fn drop(&mut self) {
        // The section ends after this.
        release(self.0);
    }
}

#[inline]
fn release(e: &'static Entry) {
    // ORDERING [entry.refs] AcqRel; pairs with itself: what others did with the entry is done before it is reused.
    if counts::count_off(&e.refs) == 1 {
        retire(e);
    }
}

/// Says whether `fd` is a socket that was made as TCP's.
#[inline]
pub fn set_tcp(fd: i32, yes: bool) {
    let Some(w) = TCP.get(fd as usize / 64) else { return };
    let bit = 1 << (fd as usize % 64);
    // Relaxed: a number is told to others by the program, which orders that.
    if (w.load(Relaxed) & bit != 0) == yes {
        return;
    }
    if yes {
        HIGHEST.fetch_max(fd as u32, Relaxed);
        w.fetch_or(bit, Relaxed);
    } else {
        w.fetch_and(!bit, Relaxed);
    }
}

/// Whether `fd` is known to be TCP's without asking the kernel. Wrong only for a number that was closed behind our
/// back and came again by something else than socket(2); hence the upgrade asks the kernel all the same.
#[inline]
pub fn is_tcp(fd: i32) -> bool {
    TCP.get(fd as usize / 64).is_some_and(|w| w.load(Relaxed) & (1 << (fd as usize % 64)) != 0)
}

/// Whether `fd` has no entry: one load, one branch.
#[inline(always)]
pub fn is_foreign(fd: i32) -> bool {
    // Relaxed: nothing is read through it. Who goes on looks it up.
    TABLE.get(fd as usize).is_none_or(|cell| cell.load(Relaxed).is_null())
}

/// The entry of `fd`, if it is ours.
#[inline(always)]
pub fn lookup(fd: i32) -> Option<Ref> {
    let cell = TABLE.get(fd as usize)?;
    // ORDERING [table.publish] Acquire; pairs with the swap in `install`.
    let p = cell.load(Acquire);
    if p.is_null() {
        return None;
    }
    take_ref(cell, p)
}

/// Whether no number is ours: what a call names need not be looked at.
#[inline]
pub fn is_empty() -> bool {
    // Relaxed: a number that the caller knows of was counted before he got it.
    NAMED.load(Relaxed) == 0
}

/// The entry of `fd`, if it is a connection.
#[inline(always)]
pub fn stream(fd: i32) -> Option<Ref> {
    lookup(fd).filter(|e| e.kind.load(Relaxed) == Kind::Stream as u32)
}

/// The entry of `fd`, if it is an epoll set.
#[inline]
pub fn epoll(fd: i32) -> Option<Ref> {
    lookup(fd).filter(|e| e.is_set())
}

/// The entry of `fd`, if it is a ring of io_uring.
#[inline]
pub fn ring(fd: i32) -> Option<Ref> {
    lookup(fd).filter(|e| e.kind.load(Relaxed) == Kind::Ring as u32)
}

#[inline(always)]
fn take_ref(cell: &AtomicPtr<Entry>, p: *mut Entry) -> Option<Ref> {
    let section = section::enter();
    // SAFETY: entries are never unmapped (see the module).
    let e: &'static Entry = unsafe { &*p };
    match counts::count_in(&e.refs, cell, p) {
        Counted::Yes => return Some(Ref(e, section)),
        Counted::Late => release(e),
        Counted::No => {}
    }
    take_ref_on(cell, p, section)
}

#[cold]
fn take_ref_on(cell: &AtomicPtr<Entry>, mut p: *mut Entry, section: Section) -> Option<Ref> {
    loop {
        if is_moving(p) && !wait_for_moves() {
            return None;
        }
        // SAFETY: entries are never unmapped (see the module).
        let e: &'static Entry = unsafe { &*p };
        match counts::count_in(&e.refs, cell, p) {
            Counted::Yes => return Some(Ref(e, section)),
            Counted::Late => release(e),
            Counted::No => {}
        }
        p = cell.load(Acquire);
        if p.is_null() {
            return None;
        }
    }
}

// ---- the pool

const CHUNK: usize = 64;
const CHUNKS: usize = 4096;
static POOL: [AtomicPtr<[Entry; CHUNK]>; CHUNKS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS];
static USED: AtomicU32 = AtomicU32::new(0);
static FREE: AtomicPtr<Entry> = AtomicPtr::new(std::ptr::null_mut());
static POOL_LOCK: AtomicU32 = AtomicU32::new(0);

/// Made where it stays: a thread's stack may be too small for a chunk. `None`: there is no memory, and what the program
/// has opened is the kernel's alone.
fn new_chunk() -> Option<Box<[Entry; CHUNK]>> {
    let layout = Layout::new::<[Entry; CHUNK]>();
    // SAFETY: the layout has a size.
    let chunk = unsafe { std::alloc::alloc(layout) }.cast::<Entry>();
    if chunk.is_null() {
        return None;
    }
    for i in 0..CHUNK {
        // SAFETY: the i-th of CHUNK entries of the allocation.
        let entry = unsafe { chunk.add(i) };
        // SAFETY: as above; nobody has it yet.
        unsafe { entry.write(Entry::new()) };
    }
    // SAFETY: allocated above as a box allocates, and all entries are written.
    Some(unsafe { Box::from_raw(chunk.cast()) })
}

fn entry_at(i: usize) -> Option<&'static Entry> {
    let cell = POOL.get(i / CHUNK)?;
    let mut p = cell.load(Acquire);
    if p.is_null() {
        let fresh = Box::into_raw(new_chunk()?);
        match cell.compare_exchange(std::ptr::null_mut(), fresh, AcqRel, Acquire) {
            Ok(_) => p = fresh,
            Err(other) => {
                // SAFETY: nobody has seen it.
                drop(unsafe { Box::from_raw(fresh) });
                p = other;
            }
        }
    }
    // SAFETY: a chunk is never freed.
    Some(unsafe { &(*p)[i % CHUNK] })
}

/// A fresh entry with one reference. `None`: none can be had; the fd is passed through then.
fn fresh(kind: Kind) -> Option<Ref> {
    let section = section::enter();
    let e = {
        let _g = pool_lock()?;
        let top = FREE.load(Relaxed);
        if top.is_null() {
            let i = USED.load(Relaxed) as usize;
            let e = entry_at(i)?;
            USED.store(i as u32 + 1, Release);
            e
        } else {
            // SAFETY: entries are never unmapped.
            let e: &'static Entry = unsafe { &*top };
            FREE.store(e.next_free.load(Relaxed), Relaxed);
            e
        }
    };
    e.kind.store(kind as u32, Relaxed);
    e.fds.store(0, Relaxed);
    e.last.store(1, Relaxed);
    e.refs.store(1, Release);
    Some(Ref(e, section))
}

/// In a section.
fn pool_lock() -> Option<engine::lock::Guard<'static>> {
    if engine::lock::held_by_me(&POOL_LOCK) { None } else { Some(engine::lock::lock(&POOL_LOCK)) }
}

/// The last reference is gone.
#[cold]
fn retire(e: &'static Entry) {
    match e.kind.swap(0, AcqRel) {
        1 => {
            ENDED.add(&e.sock.totals());
            // First: epoll sets look at the connection as long as it is in them.
            e.members.clear();
            let parked = e.sock.close_parked();
            e.sock.finish(parked.unwrap_or(e.last.load(Relaxed) != 0));
            drop(heir(e.heir.swap(0, Relaxed)));
        }
        2 => e.set.clear(),
        3 => e.ring.clear(),
        _ => {}
    }
    // A signal handler that interrupted the pool loses the entry; rather that than a dead-lock.
    if let Some(_g) = pool_lock() {
        e.next_free.store(FREE.load(Relaxed), Relaxed);
        FREE.store(std::ptr::from_ref(e).cast_mut(), Relaxed);
    }
}

// ---- numbers come and go

/// `fd` is a new connection.
pub fn add_stream(fd: i32, role: engine::conn::Side, nonblock: bool) {
    // Standard input, output and error are handed to other programs and to stdio: never ours.
    if fd <= 2 || fd as usize >= MAX_FD || crate::hook::disabled() {
        return;
    }
    crate::deep::look();
    crate::hooks::unseen::follow();
    forget(fd);
    if let Some(r) = fresh(Kind::Stream)
        && r.sock.init(role, nonblock)
    {
        install(fd, &r);
        crate::hooks::epoll::adopt(&r, fd);
    }
}

/// `fd` is a new epoll set.
pub fn add_epoll(fd: i32) {
    if fd < 0 || fd as usize >= MAX_FD || crate::hook::disabled() {
        return;
    }
    forget(fd);
    if let Some(r) = fresh(Kind::Epoll) {
        r.set.init(fd);
        install(fd, &r);
    }
}

/// `fd` is a new ring of io_uring, which `map` maps. False: it is not followed.
pub fn add_ring(fd: i32, map: impl FnOnce(&Ring) -> bool) -> bool {
    if fd < 0 || fd as usize >= MAX_FD {
        return false;
    }
    forget(fd);
    let Some(r) = fresh(Kind::Ring).filter(|r| map(&r.ring)) else { return false };
    install(fd, &r);
    true
}

/// `fd` names `r` from now on.
pub fn install(fd: i32, r: &Ref) {
    let Some(cell) = TABLE.get(fd as usize) else { return };
    r.0.fds.fetch_add(1, Relaxed);
    HIGHEST.fetch_max(fd as u32, Relaxed);
    r.0.refs.fetch_add(1, Relaxed);
    NAMED.fetch_add(1, Relaxed);
    let old = swap(cell, std::ptr::from_ref(r.0).cast_mut());
    if !old.is_null() {
        NAMED.fetch_sub(1, Relaxed);
        // SAFETY: the table held a reference on it, which is now ours to drop.
        release(unsafe { &*old });
    }
}

/// What `cell` named, which names `to` from now on; a number that is being moved is waited for.
#[inline]
fn swap(cell: &AtomicPtr<Entry>, to: *mut Entry) -> *mut Entry {
    let mut old = cell.load(Relaxed);
    loop {
        if is_moving(old) && !wait_for_moves() {
            return std::ptr::null_mut();
        }
        // ORDERING [table.publish] AcqRel; pairs with the Acquire in `lookup`. Carries: the entry's words.
        match cell.compare_exchange(old, to, AcqRel, Relaxed) {
            Ok(_) => return old,
            Err(now) => old = now,
        }
    }
}

/// `fd` is about to be closed by the program (or replaced by dup2): call before the kernel does it. The
/// returned reference must be dropped after.
#[inline]
pub fn before_close(fd: i32) -> Option<Ref> {
    set_tcp(fd, false);
    let cell = TABLE.get(fd as usize)?;
    if cell.load(Relaxed).is_null() {
        return None;
    }
    let section = section::enter();
    let p = swap(cell, std::ptr::null_mut());
    if p.is_null() {
        return None;
    }
    NAMED.fetch_sub(1, Relaxed);
    // SAFETY: entries are never unmapped; the table's reference is ours now.
    let r = Ref(unsafe { &*p }, section);
    if r.fds.fetch_sub(1, AcqRel) == 1 {
        if r.kind.load(Relaxed) == Kind::Stream as u32 {
            // More references than ours: calls are under way, in which the kernel's socket would live on.
            let stays =
                r.sock.is_parked() || r.refs.load(Acquire) > 1 && r.sock.is_mapped() && r.sock.park(fd);
            crate::hooks::epoll::before_close(&r, fd, stays);
            if !stays {
                let last = r.sock.before_close(fd);
                r.last.store(last.into(), Release);
            }
        }
    } else if r.kind.load(Relaxed) == Kind::Stream as u32 {
        crate::hooks::epoll::fd_gone(&r, fd);
    }
    Some(r)
}

/// The kernel reused `fd` though we never saw it closed (a raw system call): forget the old entry.
fn forget(fd: i32) {
    drop(before_close_stale(fd));
}

fn before_close_stale(fd: i32) -> Option<Ref> {
    let cell = TABLE.get(fd as usize)?;
    let section = section::enter();
    let p = swap(cell, std::ptr::null_mut());
    if p.is_null() {
        return None;
    }
    NAMED.fetch_sub(1, Relaxed);
    // SAFETY: as in before_close.
    let r = Ref(unsafe { &*p }, section);
    r.fds.fetch_sub(1, AcqRel);
    Some(r)
}

/// Where `give_back` goes on.
static TURN: AtomicU32 = AtomicU32::new(0);

static GIVING: AtomicU32 = AtomicU32::new(0);

/// Looks at `look` numbers, in turn, and has at most `most` connections give up the descriptors that we hold
/// for them; how many did.
pub fn give_back(look: u32, most: usize) -> usize {
    let _section = section::enter();
    // One thread at a time; another goes without.
    let Some(_g) = engine::lock::try_lock(&GIVING) else { return 0 };
    let end = HIGHEST.load(Relaxed) + 1;
    let mut given = 0;
    for _ in 0..look.min(end) {
        if given >= most {
            break;
        }
        // Relaxed: any order does.
        let fd = (TURN.fetch_add(1, Relaxed) % end) as i32;
        if let Some(r) = stream(fd).filter(|r| r.sock.holds_fds()) {
            given += usize::from(let_go(fd, r));
        }
    }
    given
}

/// How many numbers there are to look at.
pub fn all_numbers() -> u32 {
    HIGHEST.load(Relaxed) + 1
}

/// The connection goes back to TCP, and no number leads to its entry any more: a thread that still has a
/// reference finds it on TCP, and the last one closes the doorbell. Under `GIVING`.
fn let_go(fd: i32, r: Ref) -> bool {
    let done = r.sock.give_back(fd);
    if r.sock.take_changed() {
        crate::hooks::epoll::resync(&r, fd);
    }
    if !done || !crate::hooks::epoll::let_go(&r) {
        return false;
    }
    unname(&r);
    r.last.store(r.sock.given_back().into(), Release);
    true
}

/// No number leads to the entry any more.
fn unname(r: &Ref) {
    let mut at = 0;
    while let Some(n) = (at..=HIGHEST.load(Relaxed) as i32).find(|n| names(*n, r.id())) {
        at = n + 1;
        let p = std::ptr::from_ref(r.entry()).cast_mut();
        let Some(cell) = TABLE.get(n as usize) else { break };
        if cell.compare_exchange(p, std::ptr::null_mut(), AcqRel, Relaxed).is_ok() {
            NAMED.fetch_sub(1, Relaxed);
            // SAFETY: the table held a reference on it, which is now ours to drop.
            release(unsafe { &*p });
            r.fds.fetch_sub(1, AcqRel);
        }
    }
}

// ---- numbers are moved

fn is_moving(p: *mut Entry) -> bool {
    std::ptr::eq(p, &MOVING)
}

/// A number that is being moved has been met: waits until it is something again. False: it is this very thread that
/// moves it, to which it is a number like any other.
#[cold]
fn wait_for_moves() -> bool {
    if engine::lock::held_by_me(&MOVES) {
        return false;
    }
    drop(engine::lock::lock(&MOVES));
    true
}

/// The right to move numbers: one thread at a time has it.
#[derive(Debug)]
pub struct Moves(#[allow(dead_code, reason = "its drop")] engine::lock::Guard<'static>);

/// The numbers of a connection, marked: until this is dropped they name nothing, and other threads wait that use them.
#[derive(Debug)]
pub struct Taken {
    e: Ref,
    numbers: Vec<i32>,
}

/// Calls in which other threads have the connection, and which take no longer, are waited for.
const SHORT_NS: u64 = 5_000_000;

impl Moves {
    /// In a section.
    pub fn begin() -> Option<Moves> {
        (!engine::lock::held_by_me(&MOVES)).then(|| Moves(engine::lock::lock(&MOVES)))
    }

    /// All numbers that name `e`, which is `fd`, if nobody uses it but the caller, who has one reference, and calls that
    /// sleep until they can send: those keep the socket that they have, under a number of ours. `None`: another thread is
    /// in another call on it that waits, and nothing has changed.
    ///
    /// A number that comes to name `e` meanwhile comes of a call that has a reference.
    pub fn take(&self, e: &Ref, fd: i32) -> Option<Taken> {
        let p = std::ptr::from_ref(e.entry()).cast_mut();
        let mut t = Taken { e: e.clone(), numbers: Vec::new() };
        for fd in 0..=HIGHEST.load(Relaxed) {
            let mark = std::ptr::from_ref(&MOVING).cast_mut();
            if counts::mark(&TABLE[fd as usize], p, mark) {
                t.numbers.push(fd as i32);
            }
        }
        // The numbers', the caller's, and `t`'s.
        let mine = t.numbers.len() as u32 + 2;
        let mut until = None;
        let wait = |parked: bool| {
            let now = engine::sys::now_ns();
            if !parked && now > *until.get_or_insert(now + SHORT_NS) {
                return false;
            }
            engine::sys::yield_cpu();
            true
        };
        counts::is_free(&e.refs, e.sock.outward(), mine, || e.sock.park(fd), wait).then_some(t)
    }
}

impl Taken {
    /// The numbers.
    pub fn numbers(&self) -> &[i32] {
        &self.numbers
    }

    /// They name something else from now on, of which we know nothing, and the connection lives on in another process
    /// only, or until the calls are over that sleep on it. It is in no epoll set.
    pub fn for_good(mut self) {
        let e = self.e.entry();
        for fd in std::mem::take(&mut self.numbers) {
            e.fds.fetch_sub(1, AcqRel);
            NAMED.fetch_sub(1, Relaxed);
            TABLE[fd as usize].store(std::ptr::null_mut(), Release);
            // The table held a reference on it.
            release(e);
        }
        if !e.sock.is_parked() {
            e.last.store(e.sock.abandon().into(), Release);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let p = std::ptr::from_ref(self.e.entry()).cast_mut();
        for fd in &self.numbers {
            // ORDERING [table.publish] Release; pairs with the Acquire in `lookup`, as in `swap`.
            TABLE[*fd as usize].store(p, Release);
        }
    }
}

/// The lowest fd of ours (the program's, not internal) in `from..=to`.
pub fn next_in(from: u32, to: u32) -> Option<u32> {
    let to = to.min(HIGHEST.load(Relaxed)) as usize;
    (from as usize..=to).find(|i| !TABLE[*i].load(Relaxed).is_null()).map(|i| i as u32)
}

/// The numbers `from..=to` are closed.
pub fn forget_tcp(from: u32, to: u32) {
    for fd in from..=to.min(HIGHEST.load(Relaxed)) {
        set_tcp(fd as i32, false);
    }
}

/// Calls `f` for every live entry of a kind.
pub fn each(kind: Kind, mut f: impl FnMut(&Ref)) {
    let used = USED.load(Acquire) as usize;
    for i in 0..used {
        let Some(e) = entry_at(i) else { return };
        if e.kind.load(Relaxed) != kind as u32 {
            continue;
        }
        let section = section::enter();
        let mut n = e.refs.load(Relaxed);
        while n != 0 {
            match e.refs.compare_exchange_weak(n, n + 1, Acquire, Relaxed) {
                Ok(_) => {
                    f(&Ref(e, section));
                    break;
                }
                Err(m) => n = m,
            }
        }
    }
}

/// Everything that this process has done, ended or not.
pub fn sum_up(into: &Sums) {
    into.merge(&ENDED);
    each(Kind::Stream, |r| into.add(&r.sock.totals()));
}

/// The fork of that token is about to happen; [`after_fork`] or [`after_fork_child`] follows.
pub fn before_fork(token: u32) {
    std::mem::forget(engine::lock::lock(&MOVES));
    each(Kind::Stream, |r| r.sock.before_fork(token));
}

/// The fork has happened, or not.
pub fn after_fork() {
    engine::lock::give_up(&MOVES);
}

/// It failed.
pub fn fork_failed(token: u32) {
    each(Kind::Stream, |r| r.sock.fork_failed(token));
}

/// Its child is `pid`.
pub fn forked(token: u32, pid: u32) {
    each(Kind::Stream, |r| r.sock.forked(token, pid));
}

/// In its child, made by process `parent`: its own counts start.
pub fn after_fork_child(token: u32, parent: i32) {
    POOL_LOCK.store(0, Relaxed);
    GIVING.store(0, Relaxed);
    MOVES.store(0, Relaxed);
    ENDED.clear();
    each(Kind::Stream, |r| {
        r.sock.after_fork_child(token);
        r.members.after_fork_child();
        // The word is the parent's to give.
        drop(heir(r.heir.swap(0, Relaxed)));
        if r.sock.unpark_in_child(r.fds.load(Relaxed) != 0) {
            r.kind.store(0, Relaxed);
        }
    });
    each(Kind::Epoll, |r| r.set.after_fork_child(parent));
    each(Kind::Ring, |r| r.ring.after_fork_child());
}

/// In a process that was forked for the connection `r` alone, which it has as `fd`: all else is forgotten, and no books
/// are kept of it, for its descriptors are the parent's copies and are closed in silence.
pub fn only(r: &Ref, fd: i32) {
    POOL_LOCK.store(0, Relaxed);
    GIVING.store(0, Relaxed);
    MOVES.store(0, Relaxed);
    for cell in &TABLE[..=HIGHEST.load(Relaxed) as usize] {
        cell.store(std::ptr::null_mut(), Relaxed);
    }
    r.members.forsake();
    r.heir.store(0, Relaxed);
    // `r` itself; calls of the parent's threads have theirs in the parent.
    r.refs.store(1, Relaxed);
    r.fds.store(0, Relaxed);
    install(fd, r);
}

/// Whether `fd` names the entry of that [id](Ref::id). Takes no reference, so it may be asked under a lock.
#[inline]
pub fn names(fd: i32, id: usize) -> bool {
    id != 0 && TABLE.get(fd as usize).is_some_and(|c| c.load(Acquire) as usize == id)
}

/// A number that names the entry of that id, by preference `fd`.
pub fn number_of(id: usize, fd: i32) -> Option<i32> {
    if names(fd, id) {
        return Some(fd);
    }
    (0..=HIGHEST.load(Relaxed) as i32).find(|n| names(*n, id))
}

/// The numbers of all our fds.
pub fn numbers() -> Vec<i32> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(fd) = next_in(at, u32::MAX) {
        out.push(fd as i32);
        at = fd + 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_tcps_until_it_is_closed() {
        // Far from the numbers that other tests of this process open.
        let (a, b) = (900_063, 900_064);
        set_tcp(a, true);
        set_tcp(b, true);
        assert!(is_tcp(a) && is_tcp(b) && !is_tcp(b + 1));
        assert!(before_close(a).is_none() && !is_tcp(a) && is_tcp(b));
        set_tcp(a, true);
        forget_tcp(0, u32::MAX);
        assert!(!is_tcp(a) && !is_tcp(b));
        set_tcp(-1, true);
        assert!(!is_tcp(-1) && !is_tcp(MAX_FD as i32));
    }
}
