//! Those who wait, and what they are told: a set's sleepers.
//!
//! Each twin has the one edge of its model weakened: the fence of `Sleepers::watch` left out.

use super::model;
use crate::wait::sleepers::Sleepers;
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;

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
