//! Who uses a thing, and who takes it away: `counts.rs`.
//!
//! The twins count off with Relaxed.

use super::{Thing, model};
use crate::counts;
use crate::sync::{AtomicU32, AtomicUsize};
use loom::sync::Arc;
use loom::thread;

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
