//! Who uses a thing, and who takes it away: `counts.rs`.
//!
//! The twins have loads where SeqCst ones were that are Acquire, as loom takes them, and count off with Relaxed.

use super::{Thing, model};
use crate::counts::{self, Counted};
use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::*};
use loom::sync::Arc;
use loom::thread;

/// An entry as `fd_table.rs` has it, one number that names it, and what the number names in the kernel.
struct Table {
    refs: AtomicU32,
    cell: AtomicPtr<u32>,
    outward: AtomicU32,
    parked: AtomicU32,
    socket: Thing,
    kept: Thing,
}

impl Table {
    /// With `refs` references.
    fn new(refs: u32) -> Arc<Self> {
        Arc::new(Table {
            refs: AtomicU32::new(refs),
            cell: AtomicPtr::new(ENTRY),
            outward: AtomicU32::new(0),
            parked: AtomicU32::new(0),
            socket: Thing::new(1),
            kept: Thing::new(0),
        })
    }

    /// As `take_ref`, a use of the socket, and `release`.
    fn call(&self) {
        // ORDERING [table.publish] Acquire, as in `lookup`.
        let p = self.cell.load(Acquire);
        if p != ENTRY {
            return;
        }
        match counts::count_in(&self.refs, &self.cell, p) {
            Counted::Yes => assert!(matches!(self.socket.get(), 1 | 2)),
            Counted::Late => {}
            Counted::No => return,
        }
        assert!(off(&self.refs) > 1, "the number has a reference");
    }

    /// As `Moves::take`: `mine` references are not calls'.
    fn take(&self, mine: u32) -> bool {
        let mut patience = 2;
        let park = || {
            self.kept.set(1);
            counts::park_as(&self.parked, 1);
            true
        };
        let wait = |_| {
            patience -= 1;
            thread::yield_now();
            patience > 0
        };
        counts::is_free(&self.refs, &self.outward, mine, park, wait)
    }
}

/// The twins of the two models below have this one edge whole: they are to fail by what they are for.
fn off(refs: &AtomicU32) -> usize {
    if cfg!(smc_weak) { refs.fetch_sub(1, AcqRel) as usize } else { counts::count_off(refs) }
}

/// The entry and the mark: addresses that nobody looks into.
const ENTRY: *mut u32 = std::ptr::without_provenance_mut(8);
const MOVING: *mut u32 = std::ptr::without_provenance_mut(16);

/// Edge: table.move. Calls come by a number while it is moved: none is in the socket while its number becomes another
/// thing's, and whoever comes after that finds the other.
fn moved_against_calls(callers: usize, calls: usize) {
    model(move || {
        // The number's, and the mover's.
        let t = Table::new(2);
        let others: Vec<_> = (0..callers)
            .map(|_| {
                let t = t.clone();
                thread::spawn(move || (0..calls).for_each(|_| t.call()))
            })
            .collect();
        assert!(counts::mark(&t.cell, ENTRY, MOVING));
        if t.take(2) {
            t.socket.set(2);
        }
        // As `Taken` is dropped.
        t.cell.store(ENTRY, Release);
        others.into_iter().for_each(|o| o.join().expect("no panic"));
        assert_eq!(t.refs.load(Relaxed), 2);
    });
}

#[test]
fn loom_move_against_a_call() {
    moved_against_calls(1, 2);
    moved_against_calls(2, 1);
}

/// Edges: table.outward, socket.parked. A call is on its way, sleeps and wakes while the number is moved: it finds the
/// socket where it is, and never in the number when that is another thing's.
#[test]
fn loom_move_against_a_sleeper() {
    model(|| {
        // The number's, the mover's, and the call's.
        let t = Table::new(3);
        let u = t.clone();
        let call = thread::spawn(move || {
            for _ in 0..2 {
                counts::sleeps(&u.outward);
                counts::wakes(&u.outward);
                match counts::parked_as(&u.parked) {
                    0 => assert_eq!(u.socket.get(), 1, "not another's"),
                    _ => assert_eq!(u.kept.get(), 1, "open"),
                }
            }
            off(&u.refs);
        });
        assert!(counts::mark(&t.cell, ENTRY, MOVING));
        if t.take(2) {
            t.socket.set(2);
        }
        call.join().expect("no panic");
    });
}

/// Edges: entry.refs, handles, holders. Each uses the thing and goes; the last one has it for itself. Of references
/// and handles, which are counted with words of two sizes.
#[test]
fn loom_last_out() {
    struct Shared<C>(C, [Thing; 3]);
    fn leave<C: counts::Count>(s: &Shared<C>, i: usize) -> bool {
        s.1[i].set(1);
        let last = counts::count_off(&s.0) == 1;
        if last {
            s.1.iter().for_each(|t| t.set(0));
        }
        last
    }
    fn all<C: counts::Count + Send + Sync + 'static>(count: C) {
        let s = Arc::new(Shared(count, std::array::from_fn(|_| Thing::new(0))));
        let others: Vec<_> = (1..3)
            .map(|i| {
                let s = s.clone();
                thread::spawn(move || leave(&s, i))
            })
            .collect();
        let mine = usize::from(leave(&s, 0));
        let theirs: usize = others.into_iter().map(|o| usize::from(o.join().expect("no panic"))).sum();
        assert_eq!(mine + theirs, 1, "one is the last");
    }
    model(|| all(AtomicU32::new(3)));
    model(|| all(AtomicUsize::new(3)));
}

/// Edges: handles, holders. Whoever finds himself alone has what the others did; as `Handle::into_tcp` and
/// `Socket::alone`.
#[test]
fn loom_only_one() {
    model(|| {
        let s = Arc::new((AtomicU32::new(3), Thing::new(0), Thing::new(0)));
        let (t, u) = (s.clone(), s.clone());
        let one = thread::spawn(move || {
            t.1.set(1);
            counts::count_off(&t.0);
        });
        let two = thread::spawn(move || {
            u.2.set(1);
            counts::count_off(&u.0);
        });
        if counts::is_only(&s.0) {
            assert_eq!((s.1.get(), s.2.get()), (1, 1));
        }
        one.join().expect("no panic");
        two.join().expect("no panic");
        assert!(counts::is_only(&s.0));
    });
}
