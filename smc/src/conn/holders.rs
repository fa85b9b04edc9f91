//! Who holds the socket: the processes that share a [`Slot`] since a fork.
//!
//! [`Slot::holders`] is the count, and what decides. A process that is killed can't take itself off it, so
//! beside the count stand *seats* with names, by which another holder finds the dead and counts them off:
//!
//! ```text
//! seat       0 ── fork announced ──> token ── parent, child know pid ─> token | pid ──> 0   left, by its holder
//!            ^                                                              │
//!            └──── counters cleared, counted off ──── BURIED <── dead ──────┘            by whoever finds it
//! ```
//!
//! The count errs to one side only. It is raised before a fork and lowered after its seat has been left, so it
//! is never below the truth; who is killed between those two steps, or before it has a name, or found no
//! seat, stays counted, and the connection stays as it is. A name is a pid of the namespace in which the arena
//! was made; processes in others neither give names nor judge by them. A pid in use again counts as alive.

use super::Socket;
use crate::arena::{self, Inside, SEATS, Slot};
use crate::counts;
use crate::gate;
use crate::lock;
use crate::sync::{AtomicU32, Ordering::*};
use crate::sys;

/// A seat whose holder was found dead, until it is cleared.
const BURIED: u64 = u64::MAX;

fn word(token: u32, pid: u32) -> u64 {
    u64::from(token) << 32 | u64::from(pid)
}

fn token_of(word: u64) -> u32 {
    (word >> 32) as u32
}

/// The name of process `pid`, which is this one, if it may give itself one.
fn own_name(pid: u32) -> u32 {
    if arena::at_home() { pid } else { 0 }
}

impl Slot {
    /// Takes a seat; the one without a name, that all share, if none is free.
    fn sit(&self, token: u32, pid: u32) -> usize {
        let free = |i: &usize| {
            let n = &self.seats.inside[*i];
            // Calls of the last holder that are still in the kernel count until they return.
            [&n.rx, &n.tx, &n.asleep].iter().all(|n| n.load(Relaxed) == 0)
                && self.seats.who[*i].compare_exchange(0, word(token, pid), AcqRel, Relaxed).is_ok()
        };
        (0..SEATS).find(free).unwrap_or(SEATS)
    }

    fn seat_of(&self, token: u32) -> Option<usize> {
        (0..SEATS).find(|i| {
            let w = self.seats.who[*i].load(Acquire);
            token != 0 && w != BURIED && token_of(w) == token
        })
    }

    /// Leaves the seat, whatever its name has become meanwhile. False: it was not there.
    fn rise(&self, token: u32) -> bool {
        let own = |w: u64| (w != BURIED && token != 0 && token_of(w) == token).then_some(0);
        self.seats.who.iter().any(|seat| seat.fetch_update(AcqRel, Acquire, own).is_ok())
    }

    /// The names of all holders, if each has one.
    fn names(&self) -> Option<Vec<u32>> {
        let mut names = Vec::new();
        for seat in &self.seats.who {
            match seat.load(Acquire) {
                0 => {}
                w if w == BURIED || w as u32 == 0 => return None,
                w => names.push(w as u32),
            }
        }
        (names.len() == self.holders.load(Acquire) as usize).then_some(names)
    }

    /// Whether nobody is left who holds it: all have names, and all are dead.
    pub(crate) fn is_abandoned(&self) -> bool {
        arena::at_home()
            && self.names().is_some_and(|n| !n.is_empty() && n.iter().all(|pid| sys::process_gone(*pid)))
    }

    /// Counts the dead off.
    #[cold]
    pub(super) fn bury(&self) {
        if !arena::at_home() {
            return;
        }
        let me = sys::getpid() as u32;
        for (i, seat) in self.seats.who.iter().enumerate() {
            let w = seat.load(Acquire);
            let pid = w as u32;
            if w == 0 || w == BURIED || pid == 0 || pid == me || !sys::process_gone(pid) {
                continue;
            }
            // One of all who have found it dead goes on, and only if the seat is still the dead one's.
            if seat.compare_exchange(w, BURIED, AcqRel, Relaxed).is_ok() {
                self.seats.inside[i].rx.store(0, Relaxed);
                self.seats.inside[i].tx.store(0, Relaxed);
                self.seats.inside[i].asleep.store(0, Relaxed);
                seat.store(0, Release);
                // ORDERING [holders] AcqRel; pairs with the Acquire of who finds itself alone. Carries: the
                // counters above.
                counts::count_off(&self.holders);
            }
        }
    }

    /// Whether no thread, of any holder, is in the kernel for what `of` says.
    pub(super) fn nobody_inside(&self, of: impl Fn(&Inside) -> &AtomicU32) -> bool {
        self.seats.inside.iter().all(|n| gate::is_empty(of(n)))
    }

    /// Whether any thread, of any holder, sleeps on the doorbell.
    pub(super) fn is_slept_on(&self) -> bool {
        // Relaxed: raised under `wait.lock`, which carries it to whoever decides by it; who rises counts too long at most.
        self.seats.inside.iter().any(|n| n.asleep.load(Relaxed) != 0)
    }
}

impl Socket {
    /// This process's calls in the kernel.
    #[inline]
    pub(super) fn inside<'a>(&self, s: &'a Slot) -> &'a Inside {
        &s.seats.inside[(self.seat.load(Relaxed) as usize).min(SEATS)]
    }

    /// The creator of the slot, whose pid is in it since it was taken, sits down.
    pub(super) fn first_holder(&self, s: &Slot) {
        let token = arena::token();
        self.token.store(token, Relaxed);
        self.seat.store(s.sit(token, own_name(s.pid.load(Relaxed))) as u32, Relaxed);
    }

    /// Whether no other process holds the socket. Looks for dead ones now and then.
    pub(super) fn alone(&self, s: &Slot) -> bool {
        // ORDERING [holders] Acquire; pairs with the AcqRel of who was counted off.
        counts::is_only(&s.holders) || self.look_for_dead(s)
    }

    #[cold]
    fn look_for_dead(&self, s: &Slot) -> bool {
        let n = self.looks.fetch_add(1, Relaxed).wrapping_add(1);
        n.is_power_of_two() && self.bury_dead(s)
    }

    /// Looks for dead holders at once; whether this process is alone now.
    #[cold]
    pub(super) fn bury_dead(&self, s: &Slot) -> bool {
        s.bury();
        let alone = counts::is_only(&s.holders);
        if alone {
            self.looks.store(0, Relaxed);
            s.pid.store(sys::getpid() as u32, Relaxed);
        }
        alone
    }

    /// This process holds the socket no more; how many did, with it.
    pub(super) fn let_go(&self, s: &Slot) -> u32 {
        let _ = s.rise(self.token.swap(0, Relaxed));
        // ORDERING [holders] AcqRel; pairs with the Acquire in `alone`. Carries: our last writes to the slot.
        let before = counts::count_off(&s.holders) as u32;
        if before == 2 {
            self.wake_last(s);
        }
        if before == 2
            && let Some(names) = s.names()
            && let [pid] = names[..]
        {
            // For those who look at the slot from outside.
            s.pid.store(pid, Relaxed);
        }
        before
    }

    /// Before the fork of that token, in the parent: one process more will hold the socket.
    pub fn before_fork(&self, token: u32) {
        if let Some(s) = self.slot() {
            s.holders.fetch_add(1, AcqRel);
            // Who has not seen that has taken the child's arming back before the child is there (`disarm_alone`).
            drop(lock::lock(&s.wait.lock));
            let _ = s.sit(token, 0);
            self.fork.store(token, Relaxed);
        }
    }

    /// That fork failed.
    pub fn fork_failed(&self, token: u32) {
        if let Some(s) = self.slot()
            && token != 0
            && (s.rise(token) || self.fork.load(Relaxed) == token)
        {
            self.fork.store(0, Relaxed);
            s.holders.fetch_sub(1, AcqRel);
        }
    }

    /// That fork's child is `pid`: from now on its death is noticed. Said by both.
    pub fn forked(&self, token: u32, pid: u32) {
        if let Some(s) = self.slot()
            && arena::at_home()
            && let Some(i) = s.seat_of(token)
        {
            let named = word(token, pid);
            let _ = s.seats.who[i].compare_exchange(word(token, 0), named, AcqRel, Relaxed);
        }
    }

    /// Whether no other process holds the socket now, dead ones not counted.
    pub fn is_alone(&self) -> bool {
        self.slot().is_none_or(|s| counts::is_only(&s.holders) || self.bury_dead(s))
    }

    /// In a process that was made for this socket alone by the fork of that token: one of its holders.
    pub fn takes_part(&self, token: u32) {
        self.after_fork_child(token);
        let _ = self.unpark_in_child(true);
        self.set_watched(false);
    }

    /// The child of that fork is about to end without having had a part in it: it counts no more, from now on. (One
    /// without a seat stays counted, as if it had been killed.)
    pub fn takes_no_part(&self, token: u32) {
        if let Some(s) = self.slot()
            && s.rise(token)
        {
            s.holders.fetch_sub(1, AcqRel);
        }
    }

    /// An exec that was to end this process's part in it has failed.
    pub fn stays(&self) {
        if let Some(s) = self.slot() {
            s.holders.fetch_add(1, AcqRel);
            let (token, at) = (arena::token(), self.seat.load(Relaxed) as usize);
            // The same seat, for calls of other threads are counted there.
            if let Some(seat) = s.seats.who.get(at)
                && seat
                    .compare_exchange(0, word(token, own_name(sys::getpid() as u32)), AcqRel, Relaxed)
                    .is_ok()
            {
                self.token.store(token, Relaxed);
            }
        }
    }

    /// In the child of that fork: its own seat.
    pub(super) fn take_own_seat(&self, token: u32) {
        let Some(s) = self.slot() else { return };
        if let Some(i) = s.seat_of(token) {
            self.token.store(token, Relaxed);
            self.seat.store(i as u32, Relaxed);
            // Its name as well: the parent gives it one only where it sees the fork, and forkpty(3) forks inside libc.
            self.forked(token, own_name(sys::getpid() as u32));
        } else if token != 0 && self.fork.load(Relaxed) == token {
            // Counted, without a seat.
            self.token.store(0, Relaxed);
            self.seat.store(SEATS as u32, Relaxed);
        } else {
            // Not counted: it came in another thread of the parent, after `before_fork` and before the fork.
            s.holders.fetch_add(1, AcqRel);
            self.first_holder(s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn slot() -> &'static Slot {
        arena::take().expect("an arena")
    }

    /// A slot held by this process and, in this order, by processes of these pids.
    fn held_with(pids: &[u32]) -> (&'static Slot, Socket) {
        let (s, me) = (slot(), Socket::new());
        me.first_holder(s);
        for pid in pids {
            s.holders.fetch_add(1, Relaxed);
            s.sit(arena::token(), *pid);
        }
        (s, me)
    }

    /// Dead, and not waited for.
    fn zombie() -> Child {
        let mut c = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("cat");
        c.kill().expect("a child of ours");
        while !sys::process_gone(c.id()) {
            std::thread::yield_now();
        }
        c
    }

    #[test]
    fn the_dead_are_counted_off_once() {
        let mut dead = zombie();
        let (s, me) = held_with(&[dead.id(), dead.id()]);
        s.seats.inside[1].rx.store(1, Relaxed);
        s.seats.inside[2].asleep.store(1, Relaxed);
        assert_eq!(s.holders.load(Relaxed), 3);
        std::thread::scope(|t| (0..4).for_each(|_| _ = t.spawn(|| s.bury())));
        assert_eq!(s.holders.load(Relaxed), 1);
        assert!(s.nobody_inside(|n| &n.rx) && !s.is_slept_on(), "its calls as well");
        assert!(me.bury_dead(s));
        assert_eq!(me.let_go(s), 1);
        dead.wait().expect("a child of ours");
        arena::give(s);
    }

    #[test]
    fn the_living_and_the_nameless_stay() {
        let mut alive = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("cat");
        let (s, me) = held_with(&[alive.id(), 0]);
        assert!(!me.bury_dead(s) && !s.is_abandoned());
        assert_eq!(s.holders.load(Relaxed), 3);
        alive.kill().expect("a child of ours");
        alive.wait().expect("a child of ours");
        assert!(!me.bury_dead(s), "one has no name");
        assert_eq!(s.holders.load(Relaxed), 2);
        arena::give(s);
    }

    #[test]
    fn whoever_remains_is_the_owner() {
        let other = std::os::unix::process::parent_id();
        let (s, me) = held_with(&[other]);
        assert_eq!(s.pid.load(Relaxed), std::process::id());
        assert_eq!(me.let_go(s), 2);
        assert_eq!(s.pid.load(Relaxed), other);
        arena::give(s);
    }

    #[test]
    fn only_the_dead_are_left() {
        let mut dead = zombie();
        let (s, me) = held_with(&[dead.id()]);
        assert!(!s.is_abandoned());
        me.let_go(s);
        assert!(s.is_abandoned());
        dead.wait().expect("a child of ours");
        arena::give(s);
    }

    #[test]
    fn more_holders_than_seats() {
        let (s, me) = held_with(&[1; SEATS + 3]);
        assert_eq!(s.holders.load(Relaxed) as usize, SEATS + 4);
        assert_eq!(s.sit(arena::token(), 1), SEATS);
        assert!(s.names().is_none());
        assert_eq!(me.let_go(s) as usize, SEATS + 4);
        arena::give(s);
    }

    #[test]
    fn a_seat_is_not_reused_while_calls_are_inside() {
        let (s, me) = held_with(&[]);
        s.seats.inside[0].tx.store(1, Relaxed);
        me.let_go(s);
        assert_eq!(s.sit(arena::token(), 1), 1);
        s.seats.inside[0].tx.store(0, Relaxed);
        assert_eq!(s.sit(arena::token(), 1), 0);
        arena::give(s);
    }
}
