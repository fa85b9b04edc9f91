//! Those who wait, and what they are told: doorbells of several connections, a shutdown, a set's sleepers, a promise.
//!
//! Each twin has the one edge of its model weakened: the fences of `after_change` and of `Sleepers::watch` left out, the
//! orderings of bell.order and rx.promise relaxed.

use super::{SIZE, Shared, model};
use crate::handshake::switch;
use crate::mem::layout::ctl;
use crate::ring;
use crate::sync::{AtomicU32, AtomicU64, Ordering::*};
use crate::wait::{doorbell, sleepers::Sleepers};
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;

/// Edge: bell.order. A peer rings the doorbell of another connection before each byte that it sends by this one. Whoever
/// has asked the kernel for doorbells, then finds a byte, and no ring before it that is newer than his question, has
/// been told of all rings before that byte. The kernel here orders nothing.
#[test]
fn loom_bell_order() {
    model(|| {
        let sh = Shared::new();
        let kernel = Arc::new(AtomicU32::new(0));
        let (other, bell) = (sh.clone(), kernel.clone());
        let peer = thread::spawn(move || {
            let rang = AtomicU32::new(0);
            for n in 1..=2 {
                bell.store(n, Relaxed);
                doorbell::has_rung(&rang);
                doorbell::publish(&other.page.side[0].tx, n.into(), &rang);
            }
        });
        let tx = &sh.page.side[0].tx;
        // As `before_catching_up`, the question, and `add_hot`.
        let before = doorbell::rang(tx);
        let told = kernel.load(Relaxed);
        let found = ring::readable(tx, 0, SIZE).expect("a correct peer").bytes;
        if found > 0 && doorbell::rang(tx) == before {
            assert!(u64::from(told) >= found, "a ring came before what is told first");
        }
        peer.join().expect("no panic");
    });
}

/// Edge: bell.recheck, within an end. A thread is about to sleep for room when another shuts the direction: it sees
/// that, or is woken. As `begin_sleep` and `after_shutdown`.
#[test]
fn loom_shutdown_wakes() {
    const RING: u32 = 3;
    const DONE: u32 = 5;
    model(|| {
        let sh = Shared::new();
        let words = Arc::new((AtomicU32::new(RING), AtomicU32::new(0)));
        let (other, w) = (sh.clone(), words.clone());
        let writer = thread::spawn(move || {
            let (mode, writers) = &*w;
            writers.fetch_add(1, Relaxed);
            doorbell::arm(&other.page.side[0], ctl::TX_ARMED);
            if mode.load(Relaxed) == RING {
                other.bell[0].wait();
            }
        });
        let (mode, writers) = &*words;
        mode.store(DONE, Release);
        doorbell::after_change();
        if writers.load(Relaxed) != 0 {
            sh.bell[0].notify();
        }
        writer.join().expect("no panic");
    });
}

/// Edge: epoll.watch. A thread is about to sleep on a set, another gives the kernel data of ours for the set and then looks
/// for sleepers, as `finish` does. The thread knows of our data before it sleeps, or is woken; and it knows in any case
/// when the kernel gives it some.
#[test]
fn loom_watch_against_a_sleeper() {
    /// As `insert` and `finish`.
    fn add(s: &(Sleepers, Mutex<bool>, Notify)) {
        s.0.watch();
        *s.1.lock().expect("no poison") = true;
        if s.0.are_there() {
            s.2.notify();
        }
    }
    model(|| {
        let set = Arc::new((Sleepers::new(), Mutex::new(false), Notify::new()));
        let (s, t) = (set.clone(), set.clone());
        let waiter = thread::spawn(move || {
            if s.0.is_watching() {
                return;
            }
            s.0.fall_asleep();
            if !s.0.is_watching() {
                s.2.wait();
                assert!(!*s.1.lock().expect("no poison") || s.0.is_watching());
            }
            s.0.wake_up();
        });
        // Of two, one may find the set watched already.
        let second = thread::spawn(move || add(&t));
        add(&set);
        waiter.join().expect("no panic");
        second.join().expect("no panic");
        assert!(!set.0.are_there());
    });
}

/// Edge: rx.promise. One thread polls and promises the program what it sees, without the lock; another receives under it,
/// and does not find a correct peer to have taken anything back. (A look without the lock may be of cursors that do not
/// belong together, and finds the peer impossible: whoever looks so takes it for a reason to look under the lock.) As
/// `look_at` and `take`.
#[test]
fn loom_promise() {
    struct Receiver {
        sh: Arc<Shared>,
        promised: AtomicU64,
        cons: AtomicU64,
        lock: Mutex<()>,
    }
    impl Receiver {
        fn look(&self) -> Result<ring::Readable, ring::PeerMisbehaved> {
            switch::ring_look(&self.sh.page.side[0], &self.promised, &self.cons, SIZE, None)
        }

        fn poll(&self) {
            let cons = self.cons.load(Relaxed);
            if let Ok(r) = self.look()
                && r.bytes > 0
            {
                switch::promise(&self.promised, cons + r.bytes);
            }
        }

        fn take(&self, most: u64) {
            let _g = self.lock.lock().expect("no poison");
            let n = self.look().expect("a correct peer").bytes.min(most);
            self.cons.store(self.cons.load(Relaxed) + n, Relaxed);
        }
    }
    model(|| {
        let sh = Shared::new();
        let (promised, cons, lock) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(()));
        let r = Arc::new(Receiver { sh: sh.clone(), promised, cons, lock });
        let peer = thread::spawn(move || {
            for n in 1..=2 {
                ring::publish(&sh.page.side[0].tx, n, false);
            }
        });
        let q = r.clone();
        let poller = thread::spawn(move || {
            q.poll();
            q.poll();
        });
        r.take(1);
        r.take(2);
        poller.join().expect("no panic");
        peer.join().expect("no panic");
    });
}
