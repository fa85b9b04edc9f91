//! Link groups: a pair of processes that share memory, and how long that lasts.
//!
//! A [`LinkGroup`] is built at first contact and joined by subsequent ones. On the accepting end it owns the
//! memory ([`Rmb`]); on the connecting end it maps what it was given. A process that is both has two.
//!
//! Lifetime, from the outside in:
//!
//! | held by | is | ends |
//! |---|---|---|
//! | a connection's [`ConnBuffers`] | a member of the group (counted in its seat) and an `Arc` | when the connection lets go |
//! | the registry | the seat, with one `Arc` while it has members | the last member takes it out and unregisters |
//! | anybody | an `Arc<LinkGroup>` | mappings go with the last one |
//!
//! [`LinkGroup::terminate`] marks and unregisters; it waits for nobody and frees nothing. No field of a
//! group becomes empty under a reader: there is no "cleared" state, only the last reference.
//! There is no idle cache either: the last connection's end is the group's.

mod buffers;
pub(crate) mod registry;
mod seat;

pub use buffers::ConnBuffers;

use crate::sync::AtomicU32 as Plain;
use crate::{
    mem::rmb::{Rmb, Segment, try_lock},
    rawcall,
};
use registry::{Entry, Found, Registry};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Which end owns a link group's memory.
///
/// ```
/// let ours = smc::LinkGroup::all().iter().filter(|g| g.key().owner == smc::Owner::Local).count();
/// # println!("{ours}");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// We do: our ends of the connections are accepted ones.
    Local,
    /// The peer does.
    Remote,
}

/// Which link group: the pair of processes, and whose memory.
///
/// ```
/// fn show(key: &smc::LgrKey) {
///     println!("process {} of user {}", key.pid, key.uid);
/// }
/// # smc::LinkGroup::all().iter().for_each(|g| show(g.key()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LgrKey {
    /// The peer's process id, as the kernel says it (`SO_PEERCRED`).
    pub pid: i32,
    /// The peer's user, as the kernel says it.
    pub uid: u32,
    /// The peer's instance: random, new after exec and fork.
    pub instance: u64,
    /// Who owns the memory.
    pub owner: Owner,
    /// `Remote`: the owner's number for the group. `Local`: 0, since we use whichever we have.
    pub number: u64,
}

/// A pair of processes and the memory they share (RFC 7609, section 2.3). It is built at first contact, joined by
/// subsequent ones, and ends with its last connection.
///
/// ```
/// // No connection to come shares memory with this peer's process as it is.
/// for group in smc::LinkGroup::all().iter().filter(|g| g.key().uid == 1000) {
///     group.terminate();
/// }
/// ```
#[derive(Debug)]
pub struct LinkGroup {
    entry: Arc<Entry>,
    registry: &'static Registry,
    memory: Memory,
    /// Doorbells of its connections that this process has rung.
    rang: Plain,
}

#[derive(Debug)]
enum Memory {
    /// Cut up here.
    Own(Rmb),
    /// Received from the peer, who cuts it up.
    Mapped(Mutex<Vec<Arc<Segment>>>),
}

impl LinkGroup {
    /// The link groups of this process as they are now.
    ///
    /// ```
    /// for group in smc::LinkGroup::all() {
    ///     println!("{:?}", group.key());
    /// }
    /// ```
    #[must_use]
    pub fn all() -> Vec<Arc<LinkGroup>> {
        let mut all = Vec::new();
        each(|g| all.push(g.clone()));
        all
    }

    /// Who the peer is.
    ///
    /// ```
    /// for group in smc::LinkGroup::all() {
    ///     println!("process {}", group.key().pid);
    /// }
    /// ```
    #[must_use]
    pub fn key(&self) -> &LgrKey {
        &self.entry.key
    }

    /// The number under which the owner of the memory knows the group.
    ///
    /// ```
    /// for group in smc::LinkGroup::all() {
    ///     println!("group {} of the process that owns it", group.number());
    /// }
    /// ```
    #[must_use]
    pub fn number(&self) -> u64 {
        match self.entry.key.owner {
            Owner::Local => self.entry.id,
            Owner::Remote => self.entry.key.number,
        }
    }

    /// Doorbells of its connections that this process has rung.
    #[inline]
    pub(crate) fn rang(&self) -> &Plain {
        &self.rang
    }

    /// Takes no more connections, and is found by nobody. Connections that it has keep it alive, and can see
    /// it by [`LinkGroup::is_terminated`]. Any number of times.
    ///
    /// ```
    /// for group in smc::LinkGroup::all() {
    ///     group.terminate();
    /// }
    /// ```
    pub fn terminate(&self) {
        if self.entry.seat.terminate() {
            self.retire();
        }
    }

    /// Whether [`LinkGroup::terminate`] was called.
    ///
    /// ```
    /// let live = smc::LinkGroup::all().iter().filter(|g| !g.is_terminated()).count();
    /// # println!("{live}");
    /// ```
    #[must_use]
    pub fn is_terminated(&self) -> bool {
        self.entry.seat.is_terminated()
    }

    /// Off the registry, without the mark: its connections live on, the next one builds another group.
    pub(crate) fn retire(&self) {
        self.registry.remove(&self.entry);
    }

    /// Segments mapped, and bytes in them; zeros while another thread changes them.
    ///
    /// ```
    /// let bytes: u64 = smc::LinkGroup::all().iter().map(|g| g.segments().1).sum();
    /// # println!("{bytes}");
    /// ```
    #[must_use]
    pub fn segments(&self) -> (usize, u64) {
        match &self.memory {
            Memory::Own(rmb) => rmb.segments(),
            Memory::Mapped(m) => try_lock(m).map_or((0, 0), |segments| {
                (segments.len(), segments.iter().map(|s| s.region.len() as u64).sum())
            }),
        }
    }

    /// The allocator, if the memory is ours.
    pub(crate) fn rmb(&self) -> Option<&Rmb> {
        match &self.memory {
            Memory::Own(rmb) => Some(rmb),
            Memory::Mapped(_) => None,
        }
    }

    /// Segments that were received, as bits; `None` while another thread changes them.
    pub(crate) fn mapped_mask(&self) -> Option<u64> {
        self.with_mapped(|segments| segments.iter().fold(0, |bits, s| bits | 1u64 << s.number))
    }

    /// Runs `f` on the received segments; `None` while another thread has them, or if the memory is ours.
    pub(crate) fn with_mapped<R>(&self, f: impl FnOnce(&mut Vec<Arc<Segment>>) -> R) -> Option<R> {
        match &self.memory {
            Memory::Own(_) => None,
            Memory::Mapped(m) => try_lock(m).map(|mut segments| f(&mut segments)),
        }
    }
}

/// A link group joined: counted until dropped.
#[derive(Debug)]
pub(crate) struct Member {
    registry: &'static Registry,
    entry: Arc<Entry>,
    /// `None` only inside drop.
    group: Arc<LinkGroup>,
}

impl Member {
    fn joined(registry: &'static Registry, entry: Arc<Entry>, group: Arc<LinkGroup>) -> Member {
        Member { registry, entry, group }
    }

    pub(crate) fn group(&self) -> &Arc<LinkGroup> {
        &self.group
    }
}

impl Drop for Member {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: a Member is made for one publish or join, and drops once.
        if let Some(seated) = unsafe { self.entry.seat.leave() } {
            self.registry.remove(&self.entry);
            drop(seated);
        }
    }
}

/// What came of asking for a link group.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Here it is.
    Group(Member),
    /// Another thread is building it: ask again.
    Busy,
}

/// Whether the kernel's word on a peer's process id tells it from others: a process in a pid namespace that we
/// can't see is 0, like every other there.
pub(crate) const fn is_known(pid: i32) -> bool {
    pid != 0
}

/// The instance under which a link group is kept: the peer's own word, if the kernel vouches for the process.
/// If not, one that no other connection has: who knows another process's instance must not join its memory.
pub(crate) fn vouched(pid: i32, instance: u64) -> u64 {
    static ALONE: AtomicU64 = AtomicU64::new(0);
    // Relaxed: only uniqueness is asked of it.
    if is_known(pid) { instance } else { ALONE.fetch_add(1, Relaxed) }
}

/// The group in which we own the memory that `peer` (pid, uid, instance) uses; built if there is none.
pub(crate) fn owned(pid: i32, uid: u32, instance: u64) -> Asked {
    let registry = registry::current();
    let instance = vouched(pid, instance);
    let key = LgrKey { pid, uid, instance, owner: Owner::Local, number: 0 };
    match registry.find(&key, |k| *k == key) {
        Found::Group(m) => return Asked::Group(m),
        Found::Reserved => return Asked::Busy,
        Found::Nothing => {}
    }
    let memory = Memory::Own(Rmb::default());
    match registry.reserve(key) {
        Ok(r) => r
            .publish(|entry| LinkGroup { entry: entry.clone(), registry, memory, rang: Plain::new(0) })
            .map_or(Asked::Busy, Asked::Group),
        Err(Found::Group(m)) => Asked::Group(m),
        Err(_) => Asked::Busy,
    }
}

/// The newest group in which the process (pid, uid) owns memory that we have mapped.
pub(crate) fn any_mapped(pid: i32, uid: u32) -> Option<Member> {
    if !is_known(pid) {
        return None;
    }
    let key = LgrKey { pid, uid, instance: 0, owner: Owner::Remote, number: 0 };
    let same_process = |k: &LgrKey| k.pid == pid && k.uid == uid && k.owner == Owner::Remote;
    match registry::current().find(&key, same_process) {
        Found::Group(m) => Some(m),
        Found::Reserved | Found::Nothing => None,
    }
}

/// The group `key` whose memory the peer owns. If there is none, `first` maps its first segment; what `first`
/// fails with comes back.
pub(crate) fn mapped<E>(key: LgrKey, first: impl FnOnce() -> Result<Arc<Segment>, E>) -> Result<Asked, E> {
    let registry = registry::current();
    match registry.reserve(key) {
        Ok(reservation) => {
            let memory = Memory::Mapped(Mutex::new(vec![first()?]));
            let member = reservation.publish(|entry| LinkGroup {
                entry: entry.clone(),
                registry,
                memory,
                rang: Plain::new(0),
            });
            Ok(member.map_or(Asked::Busy, Asked::Group))
        }
        Err(Found::Group(m)) => Ok(Asked::Group(m)),
        Err(_) => Ok(Asked::Busy),
    }
}

/// Shows every link group of this process to `f`.
pub fn each(f: impl FnMut(&Arc<LinkGroup>)) {
    registry::current().each(f);
}

/// Lets the descriptors go that are kept for peers to come. Does not wait.
pub fn give_back_fds() {
    each(|g| {
        if let Some(rmb) = g.rmb() {
            rmb.give_back_fd();
        }
    });
}

static INSTANCE: AtomicU64 = AtomicU64::new(0);

/// This process image's instance: random, never 0, new after exec and fork.
#[must_use]
pub fn instance() -> u64 {
    // Relaxed: one number; whoever sets it first sets it for all.
    match INSTANCE.load(Relaxed) {
        0 => {
            let fresh = random() | 1;
            INSTANCE.compare_exchange(0, fresh, Relaxed, Relaxed).map_or_else(|now| now, |_| fresh)
        }
        n => n,
    }
}

/// In the child of a fork, before anything else here is used: a new instance, and no link groups. What the
/// child inherited stays mapped for as long as the connections it inherited hold it. Takes no lock and
/// allocates nothing.
pub fn after_fork_child() {
    INSTANCE.store(0, Relaxed);
    registry::after_fork_child();
}

#[allow(unsafe_code)]
fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: getrandom writes up to 8 bytes into the 8 that are ours.
    let got = unsafe { rawcall!(libc::SYS_getrandom, bytes.as_mut_ptr(), bytes.len(), libc::GRND_NONBLOCK) };
    if got == Ok(bytes.len()) {
        return u64::from_ne_bytes(bytes);
    }
    // The pool is not ready (early boot) or getrandom is forbidden. Uniqueness is all that is asked: an
    // instance is no secret. Process id, address space layout and time do.
    // SAFETY: getpid takes nothing and changes nothing.
    let pid = unsafe { rawcall!(libc::SYS_getpid) }.unwrap_or(0) as u64;
    let time = std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64);
    let place = bytes.as_ptr() as u64;
    (time ^ pid.rotate_left(40) ^ place.rotate_left(20)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(all(test, not(smc_loom)))]
mod tests;
