//! The arena: per-connection state that must survive `fork`, and what `smc ss` looks at.
//!
//! A process that has a candidate connection maps one sparse memfd (`smc-arena`) shared; children inherit
//! the mapping, so both copies of a forked socket meet in the same [`Slot`]: same cursors, same locks, same
//! holder count. The fd stays open (close-on-exec, numbered high) so that `smc ss` can read the slots
//! through `/proc/PID/fd`.
//!
//! Slots hold numbers only, never pointers: what a corrupted sibling writes here can spoil its own sockets,
//! not this process's memory. Whoever uses a cursor of a slot as an index masks it with the ring's size.
//!
//! ```text
//! memfd:  | Header (4096) | Slot 0 | Slot 1 | …            sparse, a slot costs memory when first used
//!           └ at 1024: sums over the connections that are gone (`smc stats`)
//! free slots form a stack: header.free = tag(32) | index+1 (32), slot.next links them
//! ```
#![allow(unsafe_code)]

use crate::rawsys::syscall6;
use crate::sync::{AtomicU32, AtomicU64, Ordering::*};
use std::sync::atomic::{AtomicI32, AtomicPtr};

/// First word of the arena: "SMCARENA".
pub const MAGIC: u64 = u64::from_be_bytes(*b"SMCARENA");
/// Layout version; `smc ss` refuses another.
pub const VERSION: u32 = 2;
/// Bytes before the first slot.
pub const HEADER_SIZE: usize = 4096;
/// Bytes a slot takes.
pub const SLOT_SIZE: usize = 512;
/// Slots in an arena.
pub const SLOTS: usize = 1 << 17;
/// Name of the memfd, as `/proc/PID/fd` shows it: `/memfd:smc-arena (deleted)`.
pub const MEMFD_NAME: &str = "smc-arena";

/// How a direction of a connection moves its bytes: values of [`TxState::mode`].
pub mod tx_mode {
    /// By TCP, counted.
    pub const TCP: u32 = 0;
    /// A thread is trying to announce; other senders wait for the lock.
    pub const GATE: u32 = 1;
    /// Announced; the bytes before the switch offset still go by TCP.
    pub const ANNOUNCED: u32 = 2;
    /// By the ring.
    pub const RING: u32 = 3;
    /// Off the ring; the bytes the receiver will not take from it go by TCP first.
    pub const FLUSH: u32 = 4;
    /// Back on TCP for good.
    pub const DONE: u32 = 5;
}

/// Values of `wait.peer_gone`.
pub mod gone {
    /// All that follows from it is done.
    pub const KNOWN: u32 = 1;
    /// The peer has published something impossible.
    pub const MISBEHAVED: u32 = 2;
    /// What follows is being done, or its holder was killed.
    pub const BEGUN: u32 = 3;
}

/// Values of the field `reset` of [`Slot`]: how the connection's end is told, see `conn/fate.rs`. All others are an errno that is
/// to be told.
pub mod reset {
    /// The peer had shut its direction and lived: its FIN says nothing of its death any more.
    pub const HALF: u32 = 1 << 16;
    /// The program has shut its own direction.
    pub const SHUT: u32 = 2 << 16;
    /// The peer's doorbell ended with bytes of ours unread: the FIN will be a reset.
    pub const DOOMED: u32 = 3 << 16;
    /// Told, or the kernel's to tell.
    pub const TOLD: u32 = 4 << 16;
    /// Our stream has left the ring with bytes unread.
    pub const TAIL: u32 = 5 << 16;

    /// Whether an error is to be told.
    #[inline]
    #[must_use]
    pub const fn is_errno(word: u32) -> bool {
        word != 0 && word < HALF
    }
}

/// Values of [`Slot::remote`]: who is behind the peer's side of the page, see `conn/remote.rs`.
pub mod remote {
    /// The peer itself.
    pub const NO: u32 = 0;
    /// The service, for a peer on another host.
    pub const SERVED: u32 = 1;
    /// The service was, and the stream is on TCP.
    pub const WAS: u32 = 2;
}

/// Values of [`RxState::mode`].
pub mod rx_mode {
    /// By TCP, counted.
    pub const TCP: u32 = 0;
    /// A thread is trying to declare itself ready.
    pub const GATE: u32 = 1;
    /// Ready: the sender may announce; bytes still come by TCP.
    pub const READY: u32 = 2;
    /// From the ring.
    pub const RING: u32 = 3;
    /// Back on TCP for good.
    pub const DONE: u32 = 4;
}

/// Values of [`Slot::state`].
pub mod slot_state {
    /// On the free stack.
    pub const FREE: u32 = 0;
    /// In use.
    pub const LIVE: u32 = 1;
}

/// The sending direction. `lock` guards everything below it that is not a counter.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct TxState {
    /// Robust lock word, see [`crate::lock`].
    pub lock: AtomicU32,
    /// See [`tx_mode`].
    pub mode: AtomicU32,
    /// 1: a call that does not wait has been told that there is no space: the ring's end is the buffer's end.
    pub told_full: AtomicU32,
    /// Free space was too little for the last sender: an edge is owed when it comes back.
    pub blocked: AtomicU32,
    /// Bytes given to TCP.
    pub tcp: AtomicU64,
    /// Own copy of the producer cursor.
    pub prod: AtomicU64,
    /// Last seen consumer cursor of the peer.
    pub cons_seen: AtomicU64,
    /// TCP offset of the switch, valid from ANNOUNCED on.
    pub switch_at: AtomicU64,
    /// In FLUSH: the first ring byte still to go by TCP.
    pub flush: AtomicU64,
    /// Messages (calls) sent by the ring.
    pub msgs: AtomicU64,
}

/// See [`RxState::with_each`].
pub mod each {
    /// The time, SO_TIMESTAMP.
    pub const MICROSECONDS: u32 = 1;
    /// The time, SO_TIMESTAMPNS.
    pub const NANOSECONDS: u32 = 2;
    /// How many bytes are left, TCP_INQ.
    pub const COUNT: u32 = 4;
}

/// The receiving direction.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct RxState {
    /// Robust lock word.
    pub lock: AtomicU32,
    /// See [`rx_mode`].
    pub mode: AtomicU32,
    /// 1: this side has shut its own doorbell, whose end of file says nothing of the peer.
    pub deaf: AtomicU32,
    /// Robust lock word: the one reader of TCP while READY.
    pub reader: AtomicU32,
    /// Bytes taken from TCP.
    pub tcp: AtomicU64,
    /// Own consumer cursor.
    pub cons: AtomicU64,
    /// Own stop cursor, valid unless `stopped` is 0.
    pub stop_at: AtomicU64,
    /// 1: this side asked the sender to go back to TCP at `stop_at`. 2: it is about to; if its holder was killed
    /// meanwhile, the next one under the lock does it.
    pub stopped: AtomicU32,
    /// 1: TCP became readable though the stream is in the ring.
    pub suspect: AtomicU32,
    /// Messages (calls) received from the ring.
    pub msgs: AtomicU64,
    /// What goes with each message that is received: bits of [`each`].
    pub with_each: AtomicU32,
    /// SO_RCVLOWAT as the kernel has it, which is less while a part of the bytes is in the ring.
    pub tcp_lowat: AtomicU32,
}

/// Waiting, and its counters.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct WaitState {
    /// Robust lock word.
    pub lock: AtomicU32,
    /// Whether the doorbell showed end of file: the peer is gone or has let go. Of [`gone`]; 0: it has not.
    pub peer_gone: AtomicU32,
    /// Threads that sleep on the doorbell in a blocking send.
    pub writers: AtomicU32,
    /// Waits that ended by polling.
    pub polled: AtomicU64,
    /// Waits that slept.
    pub slept: AtomicU64,
    /// Doorbells rung by this side.
    pub doorbells: AtomicU64,
    /// How long to look before sleeping.
    pub habit: crate::wait::polling::Habit,
    /// Rings owed.
    pub rings: crate::wait::doorbell::Rings,
}

/// One connection (one open file description), as all processes that share it see it.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Slot {
    /// See [`slot_state`].
    pub state: AtomicU32,
    /// Link of the free stack: index + 1.
    next: AtomicU32,
    /// Processes that hold the socket and share this slot.
    pub holders: AtomicU32,
    /// Process that created the slot or was last seen to use it alone.
    pub pid: AtomicU32,
    /// 0: connecting end, 1: accepting end.
    pub role: AtomicU32,
    /// Why the connection is on TCP: code of a [`crate::reason::Reason`], 0 none.
    pub reason: AtomicU32,
    /// 1: the open file description is non-blocking.
    pub nonblock: AtomicU32,
    /// Best mode reached: 0 TCP, 1 SHM, 2 RDMA.
    pub best: AtomicU32,
    /// 1: may not be upgraded (again), see `reason`.
    ///
    /// 2: a child of a fork has changed epoll sets of its parent's in which it is, see `preload/src/hooks/epoll/links.rs`.
    pub barred: AtomicU32,
    /// Ring size in bytes, 0 while there is none.
    pub ring_size: AtomicU32,
    /// Pid of the peer process once upgraded.
    pub peer_pid: AtomicU32,
    /// Address family: 0 unknown yet, 4 or 6.
    pub family: AtomicU32,
    /// Local port.
    pub local_port: AtomicU32,
    /// Remote port.
    pub peer_port: AtomicU32,
    /// Local address, network order, IPv4 in the first word.
    pub local_addr: [AtomicU32; 4],
    /// Remote address.
    pub peer_addr: [AtomicU32; 4],
    /// SO_RCVTIMEO in microseconds, 0 none.
    pub rcvtimeo_us: AtomicU64,
    /// SO_SNDTIMEO in microseconds, 0 none.
    pub sndtimeo_us: AtomicU64,
    /// SO_RCVLOWAT.
    pub rcvlowat: AtomicU32,
    /// See [`reset`].
    pub reset: AtomicU32,
    /// SO_COOKIE: which socket this is, whatever its number.
    pub cookie: AtomicU64,
    /// Upgrades that completed in at least one direction.
    pub upgrades: AtomicU32,
    /// Ways back to TCP, end of connection not counted.
    pub downgrades: AtomicU32,
    /// Sending direction.
    pub tx: TxState,
    /// Receiving direction.
    pub rx: RxState,
    /// Waiting.
    pub wait: WaitState,
    /// Who the holders are.
    pub seats: Seats,
    /// See [`remote`].
    pub remote: AtomicU32,
    /// 1: the program has shut its direction, and the service says so to the kernel when all has gone.
    pub shut_later: AtomicU32,
}

/// Holders of a socket that can have a name of their own.
pub const SEATS: usize = 8;

/// See [`crate::conn`], `holders.rs`.
#[derive(Debug)]
#[repr(C)]
pub struct Seats {
    /// Token and pid of a holder; 0: free.
    pub who: [AtomicU64; SEATS],
    /// Its threads in the kernel; the last are those of all holders without a seat.
    pub inside: [Inside; SEATS + 1],
}

/// A process's threads that are in the kernel for a connection. Whoever finds it dead clears them.
#[derive(Debug)]
#[repr(C)]
pub struct Inside {
    /// In mode TCP, receivers, and pollers that sleep on the TCP fd alone.
    pub rx: AtomicU32,
    /// In mode TCP, senders.
    pub tx: AtomicU32,
    /// Asleep on the doorbell.
    pub asleep: AtomicU32,
}

/// First page of the arena.
#[derive(Debug)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// Bytes per slot.
    pub slot_size: AtomicU32,
    /// Slots ever used; the rest of the file has never been touched.
    pub used: AtomicU32,
    tokens: AtomicU32,
    free: AtomicU64,
    /// The namespace whose pids name holders; 0 unknown.
    home: AtomicU64,
    /// Where the last search for slots without a living holder ended.
    swept: AtomicU32,
}

const _: () = {
    assert!(size_of::<Slot>() <= SLOT_SIZE);
    assert!(size_of::<Header>() <= HEADER_SIZE);
    assert!(std::mem::align_of::<Slot>() == 64);
};

/// The mapping of this process and those it was forked from; null until first needed.
static BASE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
/// Its fd, open for `smc ss` alone; -1: not any more, or not yet.
static FD: AtomicI32 = AtomicI32::new(-1);

/// The program needs the fd's number: it moves beyond `number`, or is closed and `smc ss` does without.
pub fn make_way(number: i32) {
    // Relaxed: whoever takes the number out owns it.
    let fd = FD.swap(-1, Relaxed);
    if fd < 0 {
        return;
    }
    let old = crate::fd::Fd::from_raw(fd);
    if number < fd {
        // It is not in the way.
        FD.store(fd, Relaxed);
        std::mem::forget(old);
    } else if let Ok(new) = old.raise(number.saturating_add(1)) {
        FD.store(new.raw(), Relaxed);
        std::mem::forget(new);
    }
}

fn header(base: *mut u8) -> &'static Header {
    // SAFETY: `base` is the start of a mapping of HEADER_SIZE + SLOTS * SLOT_SIZE bytes that is never
    // unmapped; a Header is atomics only, valid for every bit pattern, and fits (asserted above).
    unsafe { &*base.cast::<Header>() }
}

/// Sums over the connections that are gone.
#[cfg(not(smc_loom))]
fn totals(base: *mut u8) -> &'static crate::stats::TotalsPage {
    // SAFETY: TOTALS_OFFSET and the page lie within the first HEADER_SIZE bytes of the mapping and beyond the
    // Header (asserted in stats::page), so the result is in bounds.
    let page = unsafe { base.add(crate::stats::TOTALS_OFFSET) };
    // SAFETY: as above; never unmapped, aligned (page plus 1024), atomics only, valid for every bit pattern.
    unsafe { &*page.cast::<crate::stats::TotalsPage>() }
}

fn slot_at(base: *mut u8, i: u32) -> &'static Slot {
    let i = (i as usize) & (SLOTS - 1);
    // SAFETY: i < SLOTS, so the slot lies in the mapping, which is never unmapped; it is aligned because
    // HEADER_SIZE and SLOT_SIZE are multiples of 64 and the mapping is page aligned; atomics only.
    unsafe { &*base.add(HEADER_SIZE + i * SLOT_SIZE).cast::<Slot>() }
}

/// Maps the arena.
#[cold]
fn map() -> Option<*mut u8> {
    let len = HEADER_SIZE + SLOTS * SLOT_SIZE;
    // SAFETY: the name is a NUL-terminated constant.
    let fd = unsafe {
        syscall6(
            libc::SYS_memfd_create,
            c"smc-arena".as_ptr() as usize,
            libc::MFD_CLOEXEC as usize,
            0,
            0,
            0,
            0,
        )
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: plain fd operations on the fd made above.
    let high = unsafe {
        syscall6(
            libc::SYS_fcntl,
            fd as usize,
            libc::F_DUPFD_CLOEXEC as usize,
            crate::sys::fd_base() as usize,
            0,
            0,
            0,
        )
    };
    let fd = if high >= 0 {
        // SAFETY: `fd` is ours and has been duplicated.
        unsafe { syscall6(libc::SYS_close, fd as usize, 0, 0, 0, 0, 0) };
        high
    } else {
        fd
    };
    // SAFETY: plain fd operation.
    let r = unsafe { syscall6(libc::SYS_ftruncate, fd as usize, len, 0, 0, 0, 0) };
    let p = if r < 0 {
        r
    } else {
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_SHARED | libc::MAP_NORESERVE) as usize;
        // SAFETY: a new mapping at an address the kernel chooses.
        unsafe { syscall6(libc::SYS_mmap, 0, len, prot, flags, fd as usize, 0) }
    };
    if p < 0 {
        // SAFETY: `fd` is ours.
        unsafe { syscall6(libc::SYS_close, fd as usize, 0, 0, 0, 0, 0) };
        return None;
    }
    let p = p as *mut u8;
    let h = header(p);
    h.slot_size.store(SLOT_SIZE as u32, Relaxed);
    h.version.store(VERSION, Relaxed);
    h.home.store(crate::sys::pid_namespace(), Relaxed);
    // ORDERING [arena.publish] Release by the exchange below; pairs with the Acquire loads of BASE. Carries: the header.
    h.magic.store(MAGIC, Release);
    match BASE.compare_exchange(std::ptr::null_mut(), p, AcqRel, Acquire) {
        Ok(_) => {
            crate::internal_fds::add(fd as i32);
            FD.store(fd as i32, Relaxed);
            Some(p)
        }
        Err(other) => {
            // SAFETY: nobody has seen this mapping or fd.
            unsafe { syscall6(libc::SYS_munmap, p as usize, len, 0, 0, 0, 0) };
            // SAFETY: as above.
            unsafe { syscall6(libc::SYS_close, fd as usize, 0, 0, 0, 0, 0) };
            Some(other)
        }
    }
}

/// A number that no other fork or holder in this arena has, but for wrap-around; never 0.
pub fn token() -> u32 {
    let base = BASE.load(Acquire);
    if base.is_null() {
        return 0;
    }
    // Relaxed: only that each gets another one matters.
    match header(base).tokens.fetch_add(1, Relaxed).wrapping_add(1) {
        0 => token(),
        n => n,
    }
}

/// 0: not known yet, 1: yes, 2: no.
static AT_HOME: AtomicU32 = AtomicU32::new(0);

/// Whether this process's pids are those by which holders are named.
pub fn at_home() -> bool {
    match AT_HOME.load(Relaxed) {
        0 => {
            let base = BASE.load(Acquire);
            let home = if base.is_null() { 0 } else { header(base).home.load(Relaxed) };
            let yes = home != 0 && home == crate::sys::pid_namespace();
            if !base.is_null() {
                AT_HOME.store(if yes { 1 } else { 2 }, Relaxed);
            }
            yes
        }
        n => n == 1,
    }
}

/// In a fork's child, which may be in another namespace, and soon in a sandbox.
pub fn after_fork_child() {
    AT_HOME.store(0, Relaxed);
    let _ = at_home();
}

/// From so many slots on, those whose holders were all killed are looked for.
const SWEEP_FROM: u32 = 256;
/// Slots looked at each time that a fresh one would be taken.
const SWEEP: u32 = 4;

/// Gives back slots that nobody can give back any more.
#[cold]
fn sweep(base: *mut u8) {
    let h = header(base);
    let used = h.used.load(Relaxed).min(SLOTS as u32);
    if used < SWEEP_FROM {
        return;
    }
    for _ in 0..SWEEP {
        let s = slot_at(base, h.swept.fetch_add(1, Relaxed) % used);
        // Nobody who is alive can have it in use, nor come to hold it; `give` is done once.
        // ORDERING [arena.slot] Acquire; pairs with the Release in `reset`.
        if s.state.load(Acquire) == slot_state::LIVE && s.is_abandoned() {
            give(s);
        }
    }
}

/// Takes a free slot; `None` when the arena cannot be had or is full.
pub fn take() -> Option<&'static Slot> {
    // ORDERING [arena.publish] Acquire; pairs with the exchange in `map`.
    let mut base = BASE.load(Acquire);
    if base.is_null() {
        base = map()?;
    }
    let h = header(base);
    // ORDERING [arena.free] Acquire; pairs with the Release exchange in `give`. Carries: slot.next.
    let mut top = h.free.load(Acquire);
    if top as u32 == 0 {
        sweep(base);
        top = h.free.load(Acquire);
    }
    let slot = loop {
        let i = top as u32;
        if i == 0 {
            let n = h.used.fetch_add(1, Relaxed);
            if n as usize >= SLOTS {
                h.used.fetch_sub(1, Relaxed);
                return None;
            }
            break slot_at(base, n);
        }
        let s = slot_at(base, i - 1);
        let next = u64::from(s.next.load(Relaxed)) | ((top >> 32).wrapping_add(1) << 32);
        match h.free.compare_exchange_weak(top, next, AcqRel, Acquire) {
            Ok(_) => break s,
            Err(t) => top = t,
        }
    };
    slot.reset();
    Some(slot)
}

/// Gives a slot back. The caller is its last user in all processes.
pub fn give(slot: &'static Slot) {
    let base = BASE.load(Acquire);
    if base.is_null() || slot.state.swap(slot_state::FREE, AcqRel) == slot_state::FREE {
        return;
    }
    #[cfg(not(smc_loom))]
    totals(base).add(slot);
    let off = (slot as *const Slot as usize).wrapping_sub(base as usize + HEADER_SIZE);
    let i = (off / SLOT_SIZE) as u32 + 1;
    let h = header(base);
    let mut top = h.free.load(Relaxed);
    loop {
        slot.next.store(top as u32, Relaxed);
        let new = u64::from(i) | ((top >> 32).wrapping_add(1) << 32);
        // ORDERING [arena.free] Release; pairs with the Acquire in `take`.
        match h.free.compare_exchange_weak(top, new, Release, Relaxed) {
            Ok(_) => return,
            Err(t) => top = t,
        }
    }
}

impl Slot {
    /// All words to their start values.
    fn reset(&self) {
        let words = [
            &self.role,
            &self.reason,
            &self.nonblock,
            &self.best,
            &self.barred,
            &self.ring_size,
            &self.peer_pid,
            &self.family,
            &self.local_port,
            &self.peer_port,
            &self.upgrades,
            &self.downgrades,
            &self.tx.lock,
            &self.tx.mode,
            &self.tx.blocked,
            &self.rx.lock,
            &self.rx.mode,
            &self.rx.reader,
            &self.rx.with_each,
            &self.rx.stopped,
            &self.rx.suspect,
            &self.wait.lock,
            &self.wait.peer_gone,
            &self.wait.writers,
            &self.rx.deaf,
            &self.reset,
            &self.remote,
            &self.shut_later,
            &self.tx.told_full,
        ];
        for w in words {
            w.store(0, Relaxed);
        }
        let longs = [
            &self.rcvtimeo_us,
            &self.sndtimeo_us,
            &self.tx.tcp,
            &self.tx.prod,
            &self.tx.cons_seen,
            &self.tx.switch_at,
            &self.tx.flush,
            &self.tx.msgs,
            &self.wait.rings.0,
            &self.rx.tcp,
            &self.rx.cons,
            &self.rx.stop_at,
            &self.rx.msgs,
            &self.wait.polled,
            &self.wait.slept,
            &self.wait.doorbells,
        ];
        for w in longs {
            w.store(0, Relaxed);
        }
        for seat in &self.seats.who {
            seat.store(0, Relaxed);
        }
        for n in &self.seats.inside {
            n.rx.store(0, Relaxed);
            n.tx.store(0, Relaxed);
            n.asleep.store(0, Relaxed);
        }
        self.rcvlowat.store(1, Relaxed);
        self.rx.tcp_lowat.store(1, Relaxed);
        self.wait.habit.reset();
        self.holders.store(1, Relaxed);
        self.pid.store(crate::sys::own_pid(), Relaxed);
        // ORDERING [arena.slot] Release; pairs with the Acquire in `sweep`. Carries: the words above. (`smc ss`
        // copies the slot with pread, and may show one that is half made.)
        self.state.store(slot_state::LIVE, Release);
    }

    /// The sending direction's bytes by ring: the producer cursor.
    pub fn shm_tx(&self) -> u64 {
        self.tx.prod.load(Relaxed)
    }

    /// The receiving direction's bytes by ring: the consumer cursor.
    pub fn shm_rx(&self) -> u64 {
        self.rx.cons.load(Relaxed)
    }
}
