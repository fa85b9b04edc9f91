//! One epoll set as we see it: its members, the hot ones among them, and what a wait makes of both.
//!
//! Everything in [`Inner`] is under the set's lock, which is held for looks and for `epoll_ctl`, never over
//! a sleep, and never while a reference to an entry is dropped. A member's entry is safe to look at as long
//! as the member is in the set: an entry leaves all its sets, under their locks, before it is retired.

use crate::fd_table::{self, Entry};
use engine::lock;
use engine::sys;
use engine::wait::sleepers::Sleepers;
use libc::epoll_event;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::*};

pub(super) const IN: u32 = (libc::EPOLLIN | libc::EPOLLRDNORM) as u32;
pub(super) const OUT: u32 = (libc::EPOLLOUT | libc::EPOLLWRNORM) as u32;
/// What the kernel says of TCP's reading end.
const HIDDEN: u32 = IN | (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLPRI | libc::EPOLLRDBAND) as u32;
/// Reported whether asked for or not.
const ALWAYS: u32 = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
pub(super) const ET: u32 = libc::EPOLLET as u32;
pub(super) const ONESHOT: u32 = libc::EPOLLONESHOT as u32;
pub(super) const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;
/// What the doorbell is registered with, and when a sleeper is to be kicked.
pub(super) const BELL: u32 = (libc::EPOLLIN | libc::EPOLLRDHUP) as u32 | ET;
const KICK: u32 = libc::EPOLLOUT as u32 | BELL;

/// Rings that may lie in a doorbell before they are taken out. Edges come all the same.
const RINGS: u32 = 16;
/// Looks in a row that find a member empty before it is armed and left to the doorbell: so many, and
const COOL: u32 = 64;
/// so many for each hot member as long as they are [`FEW`], where one of them is ready at a time: then those that are as busy
/// as the others stay hot. A look costs about 1/200 of a ring and what the ring's receiver does.
const COOL_TURNS: u32 = 4;
const FEW: usize = 128;
/// Waits between looks at the kernel while hot members are ready, and nanoseconds.
const KERNEL_WAITS: u32 = 8;
const KERNEL_NS: u64 = 50_000;

/// Low half of our epoll data: bit 31 says doorbell, then 11 bits of generation, then the member's index.
const BELL_BIT: u32 = 1 << 31;
const INDEX: u32 = (1 << 20) - 1;
const GENERATIONS: u32 = (1 << 11) - 1;

static MAGIC: AtomicU32 = AtomicU32::new(0);

/// High half of our epoll data, chosen once per process: no user-space address and no small number has it.
#[inline]
pub(super) fn magic() -> u32 {
    let m = MAGIC.load(Relaxed);
    if m != 0 { m } else { choose_magic() }
}

#[cold]
fn choose_magic() -> u32 {
    let m = sys::random_u32() & 0x3fff_ffff | 0x4000_0000;
    MAGIC.compare_exchange(0, m, Relaxed, Relaxed).err().unwrap_or(m)
}

/// Whether epoll data is, or looks like, ours.
#[inline]
pub(super) fn ours(data: u64) -> bool {
    (data >> 32) as u32 == magic()
}

/// Whether epoll data names a doorbell rather than a TCP fd.
pub(super) fn is_bell(data: u64) -> bool {
    data as u32 & BELL_BIT != 0
}

/// The data under which the kernel knows a member's TCP fd, or its doorbell.
pub(super) fn data_of(id: u32, bell: bool) -> u64 {
    u64::from(magic()) << 32 | u64::from(id | if bell { BELL_BIT } else { 0 })
}

/// The data of a registration of which nobody is told: no member has this index.
pub(super) fn nobody() -> u64 {
    data_of(INDEX, false)
}

/// epoll's bits for poll's `POLLIN` and `POLLOUT`, as TCP has them.
#[inline]
pub(super) fn widen(ready: u32) -> u32 {
    let mut b = 0;
    if ready & libc::POLLIN as u32 != 0 {
        b |= IN;
    }
    if ready & libc::POLLOUT as u32 != 0 {
        b |= OUT;
    }
    // A reset that only the engine knows of: what tcp_poll reports of a socket that was reset.
    if ready & libc::POLLERR as u32 != 0 {
        b |= IN | OUT | (libc::EPOLLERR | libc::EPOLLHUP | libc::EPOLLRDHUP) as u32;
    }
    b
}

/// poll's `POLLIN` and `POLLOUT` for epoll's bits.
#[inline]
pub(super) fn narrow(events: u32) -> u32 {
    let mut b = 0;
    if events & IN != 0 {
        b |= libc::POLLIN as u32;
    }
    if events & OUT != 0 {
        b |= libc::POLLOUT as u32;
    }
    b
}

/// What to report of a TCP fd's kernel events: `ring` is ready there, `tcp_out` says whether the kernel's
/// word on writing counts, `wanted` is what the program asked for. A socket that has hung up takes no bytes, which
/// is not waited for: it counts as writable, whether the kernel was asked for that or not.
pub(super) fn merge(kernel: u32, ring: u32, tcp_out: bool, wanted: u32) -> u32 {
    let kernel = match kernel & libc::EPOLLHUP as u32 {
        0 if tcp_out => kernel,
        0 => kernel & !(OUT | libc::EPOLLWRBAND as u32),
        _ => kernel | OUT,
    };
    (kernel | ring) & (wanted | ALWAYS)
}

/// Which look of a wait this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// At the beginning or after a sleep: members found empty cool down.
    Fresh,
    /// While polling: counted as a wait that polling has answered.
    Polling,
}

/// The program's array of results.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    p: *mut epoll_event,
    pub max: usize,
}

impl Out {
    /// # Safety
    /// `p` is writable for `max` entries while this is used.
    pub(super) unsafe fn new(p: *mut epoll_event, max: usize) -> Self {
        Out { p, max }
    }

    pub(super) fn ptr(&self) -> *mut epoll_event {
        self.p
    }

    pub(super) fn read(&self, i: usize) -> (u32, u64) {
        debug_assert!(i < self.max);
        // SAFETY: i < max; the kernel has written entry i.
        let e = unsafe { self.p.add(i).read_unaligned() };
        (e.events, e.u64)
    }

    pub(super) fn write(&self, i: usize, events: u32, data: u64) {
        if i < self.max {
            // SAFETY: i < max.
            unsafe { self.p.add(i).write_unaligned(epoll_event { events, u64: data }) };
        }
    }
}

/// An fd that the program has put into the set.
#[derive(Debug)]
pub(super) struct Member {
    pub live: bool,
    generation: u32,
    /// The connection; `None` for an fd that is not one but whose data looked like ours.
    pub entry: Option<&'static Entry>,
    pub fd: i32,
    /// What the program said.
    pub events: u32,
    pub data: u64,
    /// What the kernel knows.
    pub kernel_events: u32,
    pub kernel_data: u64,
    /// Id under which the doorbell is in the kernel's set: own, or that of another fd of the description.
    pub bell: Option<u32>,
    kicked: bool,
    /// What its doorbell was armed for last.
    armed: u32,
    hot: bool,
    on_tcp: bool,
    resting: bool,
    /// EPOLLONESHOT has fired.
    pub disabled: bool,
    /// Taken out by the program, which tends to put it in again: the kernel has not been told.
    pub parked: bool,
    /// The kernel has been told after all, since it had an event.
    pub unregistered: bool,
    /// The number was closed while the description lives: the kernel can't be told anything about it.
    pub ghost: bool,
    /// Made by the process that forked us, which goes on using the kernel's set.
    pub inherited: bool,
    /// Edges owed (EPOLLET): whatever is ready; space.
    pub fresh: bool,
    pub space_owed: bool,
    /// The producer's cursor at the last report.
    seen: u64,
    /// The result in which it was last looked at and found empty, and the producer's cursor then.
    looked: (u64, u64),
    /// What the peer had [rung](engine::conn::Socket::rang) when the kernel was last asked for that.
    rang: u32,
    empty: u32,
    /// Where the member is in the result that is being made.
    result: (u64, usize),
}

impl Member {
    /// Whether the ring alone says what there is to say.
    fn tcp_silent(&self) -> bool {
        self.disabled || self.entry.is_none_or(|e| e.sock.tcp_silent(self.events))
    }

    fn new(generation: u32) -> Self {
        Member {
            live: true,
            generation,
            entry: None,
            fd: -1,
            events: 0,
            data: 0,
            kernel_events: 0,
            kernel_data: 0,
            bell: None,
            kicked: false,
            armed: 0,
            hot: false,
            on_tcp: false,
            resting: false,
            disabled: false,
            parked: false,
            unregistered: false,
            ghost: false,
            inherited: false,
            fresh: true,
            space_owed: false,
            seen: u64::MAX,
            looked: (0, 0),
            rang: 0,
            empty: 0,
            result: (0, 0),
        }
    }

    /// What a wait would report now, and the producer's cursor before the look: if more comes after, the
    /// cursor differs at the next look.
    #[inline]
    fn pending(&mut self) -> (u32, u64) {
        let Some(e) = self.entry else { return (0, 0) };
        if self.disabled || self.parked {
            return (0, 0);
        }
        let (prod, _) = e.sock.activity();
        let ring = e.sock.look_at(self.fd);
        let mut bits = widen(ring.ready) & self.events;
        if self.events & ET != 0 && bits & IN == 0 && prod != self.seen && e.sock.more_behind_tcp(self.fd) {
            bits |= IN & self.events;
        }
        if self.events & OUT != 0 && bits & OUT == 0 && ring.from_kernel & libc::POLLOUT as u32 == 0 {
            // As tcp_poll sets SOCK_NOSPACE: who has been told "no space" will be told when there is.
            self.space_owed = true;
        }
        if bits == 0 || self.events & ET == 0 {
            return (bits, prod);
        }
        let edge = self.fresh || bits & IN != 0 && prod != self.seen || bits & OUT != 0 && self.space_owed;
        if !edge {
            return (0, prod);
        }
        let kernels = self.events & OUT != 0 && ring.from_kernel & libc::POLLOUT as u32 != 0;
        if bits & OUT == 0 && kernels && is_writable(self.fd) {
            // An edge tells of all that is ready, and the kernel has told of this before: it tells of edges of its own.
            bits |= OUT & self.events;
        }
        (bits, prod)
    }

    /// It is being reported.
    fn reported(&mut self, bits: u32, prod: u64) {
        self.fresh = false;
        self.seen = prod;
        self.empty = 0;
        if bits & OUT != 0 {
            self.space_owed = false;
        }
        if self.events & ONESHOT != 0 {
            self.disabled = true;
        }
    }

    /// Arms the doorbell for what is waited for and not there. The caller looks again after this.
    fn arm(&mut self) {
        let Some(e) = self.entry else { return };
        if self.disabled || self.parked {
            return;
        }
        let mut bits = 0;
        if self.events & IN != 0 {
            bits |= libc::POLLIN as u32;
        }
        // With space there, nobody waits for it: a writer that finds none says so, and the member is hot.
        if self.events & OUT != 0 && e.sock.look_at(self.fd).ready & libc::POLLOUT as u32 == 0 {
            bits |= libc::POLLOUT as u32;
        }
        self.armed = bits;
        e.sock.arm(bits);
    }

    /// Whether its doorbell may lie rung: somebody has taken an armed bit, or the peer has asked for something, which
    /// takes none. (The ring itself may still be on its way.)
    fn may_be_rung(&self) -> bool {
        let wants = narrow(self.events) & libc::POLLIN as u32 | self.armed;
        !self.disabled
            && !self.parked
            && wants != 0
            && self.entry.is_some_and(|e| !e.sock.is_armed(wants) || e.sock.is_asked())
    }
}

/// Whether the kernel would take bytes.
#[cold]
fn is_writable(fd: i32) -> bool {
    let mut p = [libc::pollfd { fd, events: libc::POLLOUT, revents: 0 }];
    sys::poll(&mut p, Some(0)) > 0 && p[0].revents & libc::POLLOUT != 0
}

/// See the module.
#[derive(Debug)]
pub struct Set {
    lock: AtomicU32,
    fd: AtomicI32,
    /// Threads that are asleep in the kernel on this set.
    pub(super) sleepers: Sleepers,
    /// The set is in another set, a poll or a select: its members stay armed outside of waits.
    nested: AtomicU32,
    /// Other sets are in this one.
    has_inner: AtomicU32,
    /// The program has waited for it by a call that we see.
    waited: AtomicU32,
    /// The process that forked us, which may use it as well; 0: it is our own.
    parent: AtomicI32,
    pub(super) habit: super::super::spin::Habit,
    inner: UnsafeCell<Inner>,
}

// SAFETY: `inner` is touched only under `lock`, or in a forked child that has one thread; all else is atomic.
unsafe impl Sync for Set {}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct Inner {
    pub members: Vec<Member>,
    free: Vec<u32>,
    hot: Vec<u32>,
    /// Ids of those that were hot when a thread went to sleep.
    resting: Vec<u32>,
    /// Where in `hot` the next wait begins.
    turn: usize,
    waits: u32,
    kernel_at: u64,
    kernel_filled: bool,
    ring_first: bool,
    /// The kernel had something else than doorbells when last asked.
    kernel_had: bool,
    result: u64,
    /// A hot member may have something to say in the kernel.
    partly: bool,
    /// The kernel may have a ring that was on its way before what a hot member has.
    behind: bool,
    /// Members that the kernel tells of.
    on_tcp: u32,
    /// TCP sockets that are in the set but not connected yet: fd, events, data.
    pub early: Vec<(i32, u32, u64)>,
    /// Epoll sets that were put into this one; some may be closed by now.
    pub inner_sets: Vec<&'static Entry>,
}

/// The set, locked.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    inner: *mut Inner,
    _guard: lock::Guard<'a>,
}

impl std::ops::Deref for Locked<'_> {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        // SAFETY: the guard is held, so no other reference exists.
        unsafe { &*self.inner }
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        // SAFETY: as above.
        unsafe { &mut *self.inner }
    }
}

impl Set {
    /// An unused one.
    pub const fn new() -> Self {
        Set {
            lock: AtomicU32::new(0),
            fd: AtomicI32::new(-1),
            sleepers: Sleepers::new(),
            nested: AtomicU32::new(0),
            has_inner: AtomicU32::new(0),
            waited: AtomicU32::new(0),
            parent: AtomicI32::new(0),
            habit: super::super::spin::Habit::new(),
            inner: UnsafeCell::new(Inner {
                members: Vec::new(),
                free: Vec::new(),
                hot: Vec::new(),
                resting: Vec::new(),
                turn: 0,
                waits: 0,
                kernel_at: 0,
                ring_first: false,
                kernel_filled: false,
                kernel_had: false,
                result: 0,
                on_tcp: 0,
                partly: false,
                behind: false,
                inner_sets: Vec::new(),
                early: Vec::new(),
            }),
        }
    }

    /// It is the epoll fd `fd` from now on.
    pub fn init(&self, fd: i32) {
        self.fd.store(fd, Relaxed);
        self.sleepers.reset();
        for w in [&self.nested, &self.has_inner, &self.waited] {
            w.store(0, Relaxed);
        }
        self.parent.store(0, Relaxed);
    }

    /// In a forked child: no other thread, no sleeper; the kernel's set is shared with the parent.
    pub fn after_fork_child(&self, parent: i32) {
        // SAFETY: the child has one thread, this one.
        let inner = unsafe { &mut *self.inner.get() };
        self.sleepers.forget();
        self.parent.store(parent, Relaxed);
        if self.lock.swap(0, Relaxed) != 0 {
            // Another thread of the parent was changing it: not to be trusted, not even to be freed.
            for v in [&mut inner.free, &mut inner.hot, &mut inner.resting].map(std::mem::take) {
                std::mem::forget(v);
            }
            std::mem::forget(std::mem::take(&mut inner.members));
            std::mem::forget(std::mem::take(&mut inner.early));
            std::mem::forget(std::mem::take(&mut inner.inner_sets));
            return;
        }
        for i in 0..inner.members.len() {
            let m = &mut inner.members[i];
            m.inherited = true;
            m.fresh = true;
            inner.heat(i as u32);
        }
    }

    /// The set; `None` if this is a signal handler that has interrupted its holder.
    #[inline]
    pub(super) fn locked(&self) -> Option<Locked<'_>> {
        if lock::held_by_me(&self.lock) {
            return None;
        }
        let guard = lock::lock(&self.lock);
        Some(Locked { inner: self.inner.get(), _guard: guard })
    }

    /// Whether the process that forked us may use it, with members of its own.
    pub(super) fn is_foreign(&self) -> bool {
        // Relaxed: set before there was a second thread. A parent that is gone, as a daemon's is, uses nothing.
        let parent = self.parent.load(Relaxed);
        parent != 0 && sys::getppid() == parent
    }

    /// The epoll fd as the program names it now.
    pub(super) fn is_called(&self, fd: i32) {
        if self.fd.load(Relaxed) != fd {
            self.fd.store(fd, Relaxed);
        }
    }

    /// A wait for it, or for what it is in, by a call that we see.
    #[inline]
    pub(super) fn note_wait(&self) {
        // Relaxed: it says how the program goes about it, and orders nothing.
        if self.waited.load(Relaxed) == 0 {
            self.waited.store(1, Relaxed);
        }
    }

    /// Whether there was one: instructions of the program's own may make all its waits.
    pub(super) fn is_waited_for(&self) -> bool {
        self.waited.load(Relaxed) != 0
    }

    /// The epoll fd, if it is still that of the set's entry.
    pub(super) fn fd(&self, entry: &'static Entry) -> Option<i32> {
        let fd = self.fd.load(Relaxed);
        fd_table::names(fd, entry.id()).then_some(fd)
    }

    /// Whether results may carry our data.
    #[inline]
    pub(super) fn is_watching(&self) -> bool {
        self.sleepers.is_watching()
    }

    /// `inner`, another set, has been put into this one.
    pub(super) fn contains(&self, inner: &'static Entry) {
        if let Some(mut s) = self.locked()
            && !s.inner_sets.iter().any(|e| e.id() == inner.id())
        {
            s.inner_sets.push(inner);
            self.has_inner.store(1, Release);
        }
    }

    /// Whether there are other sets in this one.
    #[inline]
    pub(super) fn has_inner(&self) -> bool {
        self.has_inner.load(Acquire) != 0
    }

    /// Another set, a poll or a select looks at this one.
    pub(super) fn set_nested(&self) {
        self.nested.store(1, SeqCst);
    }

    /// Whether somebody relies on the doorbells alone.
    #[inline]
    pub(super) fn others_sleep(&self) -> bool {
        self.sleepers.are_there() || self.nested.load(SeqCst) != 0
    }
}

impl Default for Set {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    /// The member of an id, if it is still the one that was meant.
    pub(super) fn get(&mut self, id: u32) -> Option<&mut Member> {
        let m = self.members.get_mut((id & INDEX) as usize)?;
        (m.live && m.generation == (id >> 20) & GENERATIONS).then_some(m)
    }

    /// A new member; its id. `None`: there are a million.
    pub(super) fn add(&mut self) -> Option<u32> {
        let i = match self.free.pop() {
            Some(i) => i,
            None if self.members.len() >= INDEX as usize => return None,
            None => {
                let mut m = Member::new(0);
                m.live = false;
                self.members.push(m);
                self.members.len() as u32 - 1
            }
        };
        let m = self.members.get_mut(i as usize)?;
        let generation = (m.generation + 1) & GENERATIONS;
        *m = Member::new(generation);
        Some(generation << 20 | i)
    }

    /// Whether what the member's peer sends comes by TCP.
    pub(super) fn set_on_tcp(&mut self, id: u32, on: bool) {
        if let Some(m) = self.get(id)
            && std::mem::replace(&mut m.on_tcp, on) != on
        {
            self.on_tcp = if on { self.on_tcp + 1 } else { self.on_tcp.saturating_sub(1) };
        }
    }

    /// Whether the ring has something, but the kernel must be asked before it is told of: who sends on one connection and then
    /// on another counts on that order, and the first may go by TCP.
    pub(super) fn kernel_comes_first(&mut self) -> bool {
        !self.ring_first && self.on_tcp > 0 && {
            let members = &mut self.members;
            self.hot.iter().any(|i| members.get_mut(*i as usize).is_some_and(|m| m.pending().0 != 0))
        }
    }

    /// Forgets a member.
    pub(super) fn remove(&mut self, id: u32) {
        self.set_on_tcp(id, false);
        if let Some(m) = self.get(id) {
            m.live = false;
            m.entry = None;
            let was_hot = std::mem::take(&mut m.hot);
            let i = id & INDEX;
            if was_hot && let Some(at) = self.hot.iter().position(|h| *h == i) {
                self.hot.swap_remove(at);
            }
            self.free.push(i);
        }
    }

    /// Takes all members out: their entries.
    pub(super) fn take_all(&mut self) -> Vec<&'static Entry> {
        let mut entries = Vec::new();
        for i in 0..self.members.len() {
            let m = &mut self.members[i];
            if m.live {
                entries.extend(m.entry);
                let id = m.generation << 20 | i as u32;
                self.remove(id);
            }
        }
        self.early.clear();
        self.inner_sets.clear();
        entries
    }

    /// From now on waits look at the member.
    pub(super) fn heat(&mut self, id: u32) {
        let i = id & INDEX;
        if let Some(m) = self.members.get_mut(i as usize)
            && m.live
            && !m.hot
            && !m.disabled
            && !m.parked
            && m.entry.is_some()
            && m.bell.is_some()
            && m.events & (IN | OUT) != 0
        {
            m.hot = true;
            m.empty = 0;
            self.hot.push(i);
        }
    }

    pub(super) fn is_hot(&self) -> bool {
        !self.hot.is_empty()
    }

    /// Whether polling can't pay because the first hot connection's peer is on this CPU.
    pub(super) fn beside_peer(&self) -> bool {
        let first = self.hot.first().and_then(|i| self.members.get(*i as usize));
        first.and_then(|m| m.entry).is_some_and(|e| e.sock.beside_peer())
    }

    /// A wait begins: whether the kernel must be asked before the hot members.
    pub(super) fn kernel_due(&mut self, now: u64) -> bool {
        self.waits = self.waits.wrapping_add(1);
        // It had the whole of the last result: the ring's turn.
        self.ring_first = std::mem::take(&mut self.kernel_filled);
        if self.ring_first {
            return false;
        }
        let due = self.kernel_had
            || self.waits.is_multiple_of(KERNEL_WAITS)
            || now.saturating_sub(self.kernel_at) > KERNEL_NS;
        if due {
            self.kernel_at = now;
        }
        due
    }

    /// What the kernel said when it was asked: entries that are no doorbells.
    pub(super) fn kernel_said(&mut self, entries: usize) {
        self.kernel_had = entries > 0;
    }

    /// Makes the result of a wait: the kernel's first `kernel` entries of `out` translated, then hot members.
    pub(super) fn fill(&mut self, out: Out, kernel: usize, look: Look) -> usize {
        self.result += 1;
        let n = self.translate_all(out, 0, 0, kernel);
        self.kernel_filled = n > 0 && n == out.max;
        self.partly = false;
        self.behind = false;
        if self.hot.is_empty() || n >= out.max { n } else { self.add_hot(out, n, look, kernel == 0) }
    }

    /// Whether the kernel should be asked as well for what the last result has.
    pub(super) fn is_partial(&mut self) -> Option<u64> {
        std::mem::take(&mut self.partly).then_some(self.result)
    }

    /// Adds the kernel's entries from `n` on to the result of that number, which has `n` so far.
    pub(super) fn add_kernel(&mut self, out: Out, n: usize, kernel: usize, result: u64) -> usize {
        if self.result != result {
            // Another thread has made a result meanwhile; ours gets a new number.
            self.result += 1;
        }
        self.translate_all(out, n, n, kernel)
    }

    fn translate_all(&mut self, out: Out, mut n: usize, from: usize, kernel: usize) -> usize {
        for i in from..from + kernel {
            let (events, data) = out.read(i);
            if !ours(data) {
                if n != i {
                    out.write(n, events, data);
                }
                n += 1;
            } else if self.translate(out, n, events, data) {
                n += 1;
            }
        }
        n
    }

    /// An event of a TCP fd that the kernel knows under our data. False: nothing the program asked for, or
    /// in the result already.
    fn translate(&mut self, out: Out, n: usize, mut events: u32, data: u64) -> bool {
        let result = self.result;
        // A registration that outlives its member (another process holds the socket) has nobody to tell.
        let Some(m) = self.get(data as u32) else { return false };
        let again = m.result.0 == result && m.result.1 < n;
        if m.disabled && !again || m.parked || is_bell(data) {
            return false;
        }
        let mut bits = events;
        let mut prod = 0;
        if let Some(e) = m.entry {
            prod = e.sock.activity().0;
            if e.sock.hides_tcp() {
                events &= !HIDDEN;
            }
            let ring = e.sock.look_at(m.fd);
            bits = merge(events, widen(ring.ready), ring.from_kernel & libc::POLLOUT as u32 != 0, m.events);
            if bits == 0 {
                return false;
            }
            if events & IN != 0 {
                e.sock.kernel_readable();
            }
        }
        m.reported(bits, prod);
        if again {
            let (before, data) = out.read(m.result.1);
            out.write(m.result.1, before | bits, data);
            return false;
        }
        m.result = (result, n);
        out.write(n, bits, m.data);
        true
    }

    /// Whether the result is not to go on before the kernel is asked: a hot member has something that came after its
    /// peer had rung a doorbell.
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    /// The kernel is about to be asked. The number of the result, and how many are hot.
    pub(super) fn before_catching_up(&mut self) -> (u64, usize) {
        self.behind = false;
        let Inner { members, hot, .. } = self;
        for i in hot.iter() {
            if let Some(m) = members.get_mut(*i as usize)
                && let Some(e) = m.entry
            {
                m.rang = e.sock.rang();
            }
        }
        (self.result, self.hot.len())
    }

    /// Goes on with the result that [`before_catching_up`](Self::before_catching_up) said, which has `n` entries, after the kernel has
    /// given `kernel` more and doorbells. `again`: it may be behind once more.
    pub(super) fn go_on(
        &mut self,
        out: Out,
        n: usize,
        kernel: usize,
        of: (u64, usize),
        look: Look,
        again: bool,
    ) -> usize {
        let other = self.result != of.0;
        if other {
            // Another thread has made a result meanwhile; ours gets a new number.
            self.result += 1;
        }
        let k = self.translate_all(out, n, n, kernel);
        if k >= out.max || self.hot.is_empty() || other && n > 0 {
            return k;
        }
        if self.hot.len() > of.1 {
            // Those whose doorbells have rung come first.
            self.turn = of.1;
        }
        self.add_hot(out, k, look, again && kernel == 0)
    }

    /// Adds what is ready of the hot members, in turn. `ordered`: up to one before which the kernel must be asked. (Not if
    /// it has been asked and has something: it would say that again.)
    fn add_hot(&mut self, out: Out, mut n: usize, look: Look, ordered: bool) -> usize {
        let Inner { members, hot, turn, result, partly, behind, .. } = self;
        let from = n;
        let mut at = if *turn < hot.len() { *turn } else { 0 };
        let mut left = hot.len();
        while left > 0 && n < out.max && !hot.is_empty() {
            left -= 1;
            if at >= hot.len() {
                at = 0;
            }
            let Some(m) = hot.get(at).and_then(|i| members.get_mut(*i as usize)) else { break };
            let mut keep = !m.disabled && !m.parked;
            if m.result.0 != *result {
                *partly |= !m.tcp_silent();
                let (bits, prod) = m.pending();
                if ordered && bits & IN != 0 && m.entry.is_some_and(|e| e.sock.rang() != m.rang) {
                    *behind = true;
                    break;
                }
                if bits != 0 {
                    m.reported(bits, prod);
                    m.result = (*result, n);
                    out.write(n, bits, m.data);
                    n += 1;
                    keep = !m.disabled;
                    if look == Look::Polling
                        && let Some(e) = m.entry
                    {
                        e.sock.count_wait(false);
                    }
                } else {
                    m.looked = (*result, prod);
                    if look != Look::Polling {
                        m.empty += 1;
                        if m.empty >= COOL && (hot.len() > FEW || m.empty >= COOL_TURNS * hot.len() as u32) {
                            m.arm();
                            keep = m.pending().0 != 0;
                        }
                    }
                }
            }
            if keep {
                at += 1;
            } else {
                m.hot = false;
                hot.swap_remove(at);
            }
        }
        *turn = at;
        if n > from && self.hot.len() > 1 { self.add_late(out, n) } else { n }
    }

    /// A member that was found empty before another was found ready may have got something before that one did.
    #[inline(never)]
    fn add_late(&mut self, out: Out, mut n: usize) -> usize {
        let Inner { members, hot, result, .. } = self;
        hot.retain(|i| {
            let Some(m) = members.get_mut(*i as usize) else { return false };
            let moved = |e: &Entry| e.sock.activity().0 != m.looked.1;
            if n >= out.max || m.looked.0 != *result || m.result.0 == *result || !m.entry.is_some_and(moved) {
                return true;
            }
            let (bits, prod) = m.pending();
            if bits != 0 {
                m.reported(bits, prod);
                m.result = (*result, n);
                out.write(n, bits, m.data);
                n += 1;
            }
            m.hot = !m.disabled;
            m.hot
        });
        n
    }

    /// Before a sleep: arms all hot members and looks again. Those with nothing are cold then, that is the
    /// doorbell's. True: one has something.
    pub(super) fn arm_hot(&mut self) -> bool {
        let Inner { members, hot, resting, .. } = self;
        let mut ready = false;
        hot.retain(|i| {
            let Some(m) = members.get_mut(*i as usize) else { return false };
            m.arm();
            // ORDERING [bell.recheck]: the fence is in `Doorbell::arm`; this is the look after it.
            m.hot = m.pending().0 != 0;
            ready |= m.hot;
            if !m.hot && !m.resting && !m.parked {
                m.resting = true;
                resting.push(m.generation << 20 | i);
            }
            m.hot
        });
        ready
    }

    /// A doorbell has ended a sleep: the others that were hot before it are looked at again as well, and
    /// need no ring meanwhile, unless other threads rely on that.
    pub(super) fn rouse(&mut self, others_sleep: bool) {
        let mut resting = std::mem::take(&mut self.resting);
        for id in resting.drain(..) {
            let Some(m) = self.get(id) else { continue };
            m.resting = false;
            if others_sleep {
                continue;
            }
            let empty = m.empty;
            if let Some(e) = m.entry {
                e.sock.unarm(|| e.members.alone());
            }
            self.heat(id);
            if let Some(m) = self.get(id) {
                m.empty = empty;
            }
        }
        self.resting = resting;
    }

    /// A wait ends, or a member has become hot, while others rely on the doorbells: arms the hot members,
    /// and wakes one sleeper if one of them has something already.
    pub(super) fn hand_over(&mut self, epfd: i32) {
        let mut owed = None;
        for i in 0..self.hot.len() {
            let Some(m) = self.hot.get(i).and_then(|i| self.members.get_mut(*i as usize)) else { return };
            m.arm();
            if m.pending().0 != 0 && owed.is_none() {
                owed = m.bell;
            }
        }
        if let Some(bell) = owed {
            self.kick(epfd, bell);
        }
    }

    /// Makes the kernel's set readable: a Unix socket is always writable, so asking for that is an edge.
    fn kick(&mut self, epfd: i32, bell: u32) {
        if let Some(m) = self.get(bell)
            && let Some(fd) = m.entry.and_then(|e| e.sock.bell())
        {
            m.kicked = true;
            let _ = sys::epoll_ctl(epfd, libc::EPOLL_CTL_MOD, fd, KICK, data_of(bell, true));
        }
    }

    /// Whether a ring has something that the program is to be told of.
    pub(super) fn has_pending(&mut self) -> bool {
        self.members.iter_mut().any(|m| m.live && m.pending().0 != 0)
    }

    /// Doorbells that make the kernel's set readable with nothing behind them: a kick is taken back; rings
    /// go to `f`, for at most `max` members from number `from` on. The number to go on with, if there are more.
    pub(super) fn stale(
        &mut self,
        epfd: i32,
        from: usize,
        max: usize,
        mut f: impl FnMut(&'static Entry, i32),
    ) -> Option<usize> {
        let mut left = max;
        for i in from..self.members.len() {
            let m = self.members.get_mut(i)?;
            let id = m.generation << 20 | i as u32;
            let Some(e) = m.entry.filter(|_| m.live && m.bell == Some(id)) else { continue };
            if !m.kicked && !m.may_be_rung() {
                continue;
            }
            if left == 0 {
                return Some(i);
            }
            left -= 1;
            if std::mem::take(&mut m.kicked)
                && let Some(fd) = e.sock.bell()
            {
                let _ = sys::epoll_ctl(epfd, libc::EPOLL_CTL_MOD, fd, BELL, data_of(id, true));
            }
            self.heat(id);
            if let Some(m) = self.members.get(i) {
                f(e, m.fd);
            }
        }
        None
    }

    /// The kernel has an event of a member that the program has taken out: now it must be told.
    pub(super) fn unregister_parked(&mut self, epfd: i32, data: u64) {
        if let Some(m) = self.get(data as u32)
            && m.parked
            && !m.unregistered
        {
            m.unregistered = true;
            let _ = sys::epoll_ctl(epfd, libc::EPOLL_CTL_DEL, m.fd, 0, 0);
        }
    }

    /// An event of a doorbell has been taken. A kick that comes after this is seen by the look that follows
    /// in the same wait.
    pub(super) fn rung(&mut self, epfd: i32, events: u32, data: u64) -> Option<Rung> {
        let id = data as u32 & !BELL_BIT;
        let m = self.get(id)?;
        let entry = m.entry?;
        if std::mem::take(&mut m.kicked)
            && let Some(fd) = entry.sock.bell()
        {
            let _ = sys::epoll_ctl(epfd, libc::EPOLL_CTL_MOD, fd, BELL, data_of(id, true));
        }
        let ended = events & (ALWAYS | libc::EPOLLRDHUP as u32) != 0;
        let rung = Rung { entry, fd: m.fd, empty_it: entry.members.rings() >= RINGS || ended };
        self.heat(id);
        Some(rung)
    }
}

/// A doorbell has rung.
#[derive(Debug)]
pub(super) struct Rung {
    pub entry: &'static Entry,
    pub fd: i32,
    /// The rings must be taken out, or there will be no more.
    pub empty_it: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_told_from_the_programs() {
        let d = data_of(5 << 20 | 7, true);
        assert!(ours(d) && is_bell(d));
        assert!(ours(data_of(7, false)) && !is_bell(data_of(7, false)));
        for theirs in [0u64, 7, u64::MAX, 0x7fff_ffff_f000, 0xffff_ffff] {
            assert!(!ours(theirs), "{theirs:x}");
        }
    }

    #[test]
    fn a_kernel_event_is_merged_with_the_ring() {
        let (i, o) = (libc::EPOLLIN as u32, libc::EPOLLOUT as u32);
        let hup = libc::EPOLLHUP as u32;
        // TCP is always writable: not the program's business while it sends by the ring.
        assert_eq!(merge(o, 0, false, i | o), 0);
        assert_eq!(merge(o, 0, true, i | o), o);
        assert_eq!(merge(i | hup, 0, false, i), i | hup);
        assert_eq!(merge(hup, widen(i), false, i | o), i | o | hup);
    }

    #[test]
    fn ids_outlive_no_member() {
        let set = Set::new();
        let mut s = set.locked().expect("free");
        let a = s.add().expect("room");
        assert!(s.get(a).is_some());
        s.remove(a);
        assert!(s.get(a).is_none());
        let b = s.add().expect("room");
        assert_eq!(a & INDEX, b & INDEX);
        assert!(s.get(a).is_none() && s.get(b).is_some());
    }
}
