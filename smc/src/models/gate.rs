//! Who switches a direction, who is inside the kernel for it, and who forbids the switch: `gate.rs`.
//!
//! The twins lack the fence.

use super::{Thing, model};
use crate::gate;
use crate::sync::{AtomicU32, Ordering::*};
use loom::sync::Arc;
use loom::thread;

const TCP: u32 = 0;
const GATE: u32 = 1;
const RING: u32 = 2;

/// A direction, whose bytes are counted by those who move them.
struct Direction {
    mode: AtomicU32,
    barred: AtomicU32,
    inside: [AtomicU32; 2],
    bytes: [Thing; 2],
}

impl Direction {
    fn new() -> Arc<Self> {
        Arc::new(Direction {
            mode: AtomicU32::new(TCP),
            barred: AtomicU32::new(0),
            inside: std::array::from_fn(|_| AtomicU32::new(0)),
            bytes: std::array::from_fn(|_| Thing::new(0)),
        })
    }

    /// As `send_tcp` and `recv_tcp`, of holder `i`. Whether it has moved a byte.
    fn call(&self, i: usize) -> bool {
        if !gate::enter(&self.inside[i], &self.mode, TCP) {
            return false;
        }
        self.bytes[i].set(self.bytes[i].get() + 1);
        gate::leave(&self.inside[i]);
        true
    }

    /// As `try_announce` and `try_ready`: the offset of the switch, if it is made.
    fn switch(&self) -> Option<u32> {
        gate::shut(&self.mode, GATE);
        if gate::is_barred(&self.barred) || !self.inside.iter().all(gate::is_empty) {
            self.mode.store(TCP, Release);
            return None;
        }
        let at = self.bytes.iter().map(Thing::get).sum();
        self.mode.store(RING, Release);
        Some(at)
    }
}

/// Edge: gate. Calls of two holders, one of whom has another thread that switches the direction: it does so at the offset
/// that all bytes make which go by TCP.
#[test]
fn loom_gate_against_calls() {
    model(|| {
        let d = Direction::new();
        let others: Vec<_> = (0..2)
            .map(|i| {
                let d = d.clone();
                thread::spawn(move || (0..2).map(|_| u32::from(d.call(i))).sum::<u32>())
            })
            .collect();
        let at = d.switch();
        let moved: u32 = others.into_iter().map(|o| o.join().expect("no panic")).sum();
        assert!(at.is_none_or(|at| at == moved), "{at:?} of {moved}");
    });
}

/// Edge: gate. Who forbids a switch and finds the direction on TCP can rely on that; else it has been switched, or is about
/// to be. As `leave_tx` and `stop_rx` against `try_announce` and `try_ready`.
#[test]
fn loom_gate_against_a_bar() {
    model(|| {
        let d = Direction::new();
        let other = d.clone();
        let bars = thread::spawn(move || {
            gate::bar(&other.barred, 1);
            other.mode.load(Acquire) == TCP
        });
        let switched = d.switch().is_some() || d.switch().is_some();
        assert!(!(bars.join().expect("no panic") && switched), "it was to stay on TCP");
    });
}

/// Edge: quiet. A connection comes into the table while all that are in it are sent to TCP: it is met there, or finds out
/// before its handshake. As `install` and `why_quiet` against `go_quiet`.
#[test]
fn loom_quiet_against_a_newcomer() {
    model(|| {
        let words = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let other = words.clone();
        let comes = thread::spawn(move || {
            let [quiet, cell] = &*other;
            cell.store(1, Release);
            gate::between();
            quiet.load(Relaxed) != 0
        });
        let [quiet, cell] = &*words;
        quiet.store(1, Release);
        gate::between();
        let met = cell.load(Relaxed) != 0;
        assert!(comes.join().expect("no panic") || met, "it was to stay on TCP");
    });
}
