//! Every link group of this process, by peer.
//!
//! Readers take no lock: a shard is one pointer to an immutable list, read under an epoch guard
//! (crossbeam-epoch). Writers copy the list, change the copy, and swap the pointer; the old list is freed when
//! every reader that may still look at it has left. Whether a group found on a list can be *joined* is the
//! word of its [`Seat`]; lists may be a moment old, seats never are.
//!
//! Adding has two stages: [`Registry::reserve`] puts a seat on the list under the group's key, so that nobody
//! else builds the same group, and [`Reservation::publish`] fills it once the group is complete. A reservation
//! that is dropped takes its seat away again.
//!
//! fork: the child has one thread, and other threads of the parent may have been anywhere in here. So nothing
//! is repaired: [`after_fork_child`] forgets the whole registry (it leaks) and the next use makes an empty
//! one. The epoch collector belongs to the registry, so that a thread which is pinned for ever in the child's
//! copy holds up nothing new.

#![allow(unsafe_code)]

use super::{
    LgrKey, LinkGroup, Member,
    seat::{Look, Seat},
};
use crossbeam_epoch::{Atomic, Collector, Guard, Owned, Shared};
use std::{
    ptr,
    sync::{
        Arc,
        // std's under loom as well: statics; what loom checks is the Seat.
        atomic::{
            AtomicPtr, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

const SHARDS: usize = 64;

type List = Vec<Arc<Entry>>;

/// One link group's place.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) key: LgrKey,
    /// Unique in this process.
    pub(super) id: u64,
    pub(super) seat: Seat<Arc<LinkGroup>>,
}

/// See the file's head.
pub(crate) struct Registry {
    shards: [Atomic<List>; SHARDS],
    collector: Collector,
    next_id: AtomicU64,
}

/// What [`Registry::find`] or [`Registry::reserve`] came upon.
#[derive(Debug)]
pub(crate) enum Found {
    /// A link group, joined.
    Group(Member),
    /// Another thread is building it.
    Reserved,
    /// No such group.
    Nothing,
}

static CURRENT: AtomicPtr<Registry> = AtomicPtr::new(ptr::null_mut());

/// The registry of this process.
pub(crate) fn current() -> &'static Registry {
    // ORDERING [registry.current] Acquire; pairs with the AcqRel compare_exchange below.
    // Carries: the registry's contents.
    let now = CURRENT.load(Acquire);
    if !now.is_null() {
        // SAFETY: a registry is never freed once it is in CURRENT.
        return unsafe { &*now };
    }
    let made = Box::into_raw(Box::new(Registry::new()));
    // ORDERING [registry.current] AcqRel: Release of what was made, Acquire of what another thread made.
    match CURRENT.compare_exchange(ptr::null_mut(), made, AcqRel, Acquire) {
        // SAFETY: from Box::into_raw, and from now on never freed.
        Ok(_) => unsafe { &*made },
        Err(other) => {
            // SAFETY: `made` came from Box::into_raw above and was never shown to anybody.
            drop(unsafe { Box::from_raw(made) });
            // SAFETY: a registry is never freed once it is in CURRENT.
            unsafe { &*other }
        }
    }
}

/// In the child of a fork: forgets all link groups. Allocates nothing and takes no lock.
pub(crate) fn after_fork_child() {
    // ORDERING [registry.current] Release: nothing to carry; the child has one thread.
    CURRENT.store(ptr::null_mut(), Release);
}

impl Registry {
    fn new() -> Registry {
        Registry {
            shards: std::array::from_fn(|_| Atomic::null()),
            collector: Collector::new(),
            next_id: AtomicU64::new(1),
        }
    }

    fn shard(&self, key: &LgrKey) -> &Atomic<List> {
        // Instance and number are left out: a connecting end looks by process alone.
        let mixed = (key.pid as u32 ^ key.uid.rotate_left(16)).wrapping_mul(0x9e37_79b9);
        &self.shards[(mixed >> 26) as usize % SHARDS]
    }

    /// Runs `f` while lists that it reads can't be freed.
    fn pinned<R>(&self, f: impl FnOnce(&Guard) -> R) -> R {
        // A participant for this call only: no thread-local, whose destructor would run in who knows what
        // state of the program. A handshake can afford it.
        let me = self.collector.register();
        f(&me.pin())
    }

    fn list<'g>(shard: &Atomic<List>, guard: &'g Guard) -> (Shared<'g, List>, &'g [Arc<Entry>]) {
        // ORDERING [registry.list] Acquire; pairs with the AcqRel compare_exchange in change.
        // Carries: the list and its entries.
        let now = shard.load(Acquire, guard);
        // SAFETY: null, or a list that was published whole and is freed only after this guard is gone.
        (now, unsafe { now.as_ref() }.map_or(&[], |l| l.as_slice()))
    }

    /// Replaces a shard's list by what `f` makes of it, unless `f` makes nothing; `f` may run several times.
    fn change<E>(
        &self,
        shard: &Atomic<List>,
        guard: &Guard,
        mut f: impl FnMut(&[Arc<Entry>]) -> Result<List, E>,
    ) -> Result<(), E> {
        loop {
            let (now, list) = Self::list(shard, guard);
            let next = Owned::new(f(list)?);
            // ORDERING [registry.list] AcqRel: Release of the new list; Acquire of the next if we lost.
            if shard.compare_exchange(now, next, AcqRel, Acquire, guard).is_ok() {
                if !now.is_null() {
                    // SAFETY: `now` is off the shard, so no new reader finds it; those who have it are pinned.
                    unsafe { guard.defer_destroy(now) };
                }
                guard.flush();
                return Ok(());
            }
        }
    }

    fn join(&'static self, entry: &Arc<Entry>) -> Found {
        match entry.seat.look() {
            Look::Joined(group) => Found::Group(Member::joined(self, entry.clone(), group)),
            Look::Reserved => Found::Reserved,
            Look::Closed => Found::Nothing,
        }
    }

    /// The first group on `list` that `want` accepts and that can be joined; else whether one is being built.
    fn first(&'static self, list: &[Arc<Entry>], want: impl Fn(&LgrKey) -> bool) -> Found {
        let mut found = Found::Nothing;
        for entry in list.iter().rev().filter(|e| want(&e.key)) {
            match self.join(entry) {
                Found::Nothing => {}
                Found::Reserved => found = Found::Reserved,
                group => return group,
            }
        }
        found
    }

    /// The newest group under a key that is like `key` as far as `want` asks; pid and uid must be alike.
    pub(crate) fn find(&'static self, key: &LgrKey, want: impl Fn(&LgrKey) -> bool) -> Found {
        self.pinned(|guard| {
            let (_, list) = Self::list(self.shard(key), guard);
            self.first(list, want)
        })
    }

    /// Reserves a place for the group of `key`; if there is one already, or another thread has it reserved,
    /// that is what comes back.
    pub(crate) fn reserve(&'static self, key: LgrKey) -> Result<Reservation, Found> {
        // Relaxed: only uniqueness is asked of it.
        let id = self.next_id.fetch_add(1, Relaxed);
        let entry = Arc::new(Entry { key, id, seat: Seat::reserve() });
        self.pinned(|guard| {
            self.change(self.shard(&key), guard, |list| match self.first(list, |k| *k == key) {
                Found::Nothing => Ok(list.iter().chain([&entry]).cloned().collect()),
                found => Err(found),
            })
        })?;
        Ok(Reservation { registry: self, entry: Some(entry) })
    }

    /// Takes the entry off its list; once or several times is the same.
    pub(super) fn remove(&self, entry: &Entry) {
        self.pinned(|guard| {
            let _ = self.change(self.shard(&entry.key), guard, |list| {
                if !list.iter().any(|e| e.id == entry.id) {
                    return Err(());
                }
                Ok(list.iter().filter(|e| e.id != entry.id).cloned().collect())
            });
        });
    }

    /// Joins every group for a moment and shows it to `f`.
    pub(crate) fn each(&'static self, mut f: impl FnMut(&Arc<LinkGroup>)) {
        let mut members = Vec::new();
        self.pinned(|guard| {
            for shard in &self.shards {
                for entry in Self::list(shard, guard).1 {
                    if let Found::Group(m) = self.join(entry) {
                        members.push(m);
                    }
                }
            }
        });
        members.iter().for_each(|m| f(m.group()));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        for shard in &mut self.shards {
            // SAFETY: `&mut self`: nobody reads any more, and the pointer came from Owned::new or is null.
            drop(unsafe { std::mem::replace(shard, Atomic::null()).try_into_owned() });
        }
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

/// A place on the list with nobody in it yet; taken away again on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    registry: &'static Registry,
    entry: Option<Arc<Entry>>,
}

impl Reservation {
    /// Fills the place with the group that `build` makes; the caller is its first member.
    pub(crate) fn publish(mut self, build: impl FnOnce(&Arc<Entry>) -> LinkGroup) -> Option<Member> {
        let entry = self.entry.take()?;
        let group = Arc::new(build(&entry));
        // SAFETY: a seat has one Reservation, which is used up here, so this is its only publish.
        unsafe { entry.seat.publish(group.clone()) };
        Some(Member::joined(self.registry, entry, group))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.registry.remove(&entry);
        }
    }
}
