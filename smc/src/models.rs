//! loom models of the protocols between two processes, on the real code; in `models/` those within one.
//!
//! Each runs every interleaving (preemption bound 2) that loom's memory model allows. With
//! `--cfg smc_weak` the fences of `after_publish` and of `ask` are left out, and `loom_ring_and_doorbell` and
//! `loom_switch_stop_that_keeps` must fail: so it is known that they see what they are for. What is taken away
//! from the others is said where it is.

#![allow(unsafe_code)]

use crate::handshake::switch::{self, TcpTake};
use crate::mem::layout::{ConnPage, ctl};
use crate::ring;
use crate::wait::doorbell;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;
use std::collections::VecDeque;

mod counts;
mod gate;
mod waiting;

/// Something that is not atomic. loom fails the model if two use it at the same time, or one without seeing what the
/// other did.
struct Thing(UnsafeCell<u32>);

impl Thing {
    fn new(value: u32) -> Self {
        Thing(UnsafeCell::new(value))
    }

    fn get(&self) -> u32 {
        // SAFETY: loom checks that nobody writes the cell at the same time.
        self.0.with(|p| unsafe { *p })
    }

    fn set(&self, value: u32) {
        // SAFETY: loom checks that nobody reads or writes the cell at the same time.
        self.0.with_mut(|p| unsafe { *p = value });
    }
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut b = loom::model::Builder::new();
    b.preemption_bound = Some(2);
    b.max_branches = 20_000;
    b.check(f);
}

/// A ring of `SIZE` bytes whose bytes loom watches for races.
const SIZE: u64 = 4;

struct Shared {
    page: ConnPage,
    data: [UnsafeCell<u8>; SIZE as usize],
    bell: [Notify; 2],
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Shared {
            page: ConnPage::default(),
            data: std::array::from_fn(|_| UnsafeCell::new(0)),
            bell: [Notify::new(), Notify::new()],
        })
    }

    fn put(&self, cursor: u64, byte: u8) {
        // SAFETY: loom checks that nobody reads or writes the cell at the same time.
        self.data[(cursor % SIZE) as usize].with_mut(|p| unsafe { *p = byte });
    }

    fn get(&self, cursor: u64) -> u8 {
        // SAFETY: as above.
        self.data[(cursor % SIZE) as usize].with(|p| unsafe { *p })
    }
}

/// Edges: ring.publish, ring.free, bell.recheck. A producer fills a ring smaller than its stream, sleeping
/// for space; a consumer empties it, sleeping for bytes. Nobody sleeps for ever, no byte is read early. With `rewind` the
/// producer begins the buffer anew at that place when it is empty.
fn stream_through_the_ring(n_all: u64, rewind: Option<u64>) {
    model(move || {
        let sh = Shared::new();
        // SAFETY: nothing is copied by it.
        let buffer = unsafe { ring::Buffer::new(std::ptr::dangling_mut(), SIZE as usize) };
        let other = sh.clone();
        let producer = thread::spawn(move || {
            let (me, peer) = (&other.page.side[0], &other.page.side[1]);
            let mut prod = 0;
            while prod < n_all {
                let free = |p| ring::writable(&peer.rx, p, SIZE).expect("a correct peer").0;
                if free(prod) == 0 {
                    doorbell::arm(me, ctl::TX_ARMED);
                    if free(prod) == 0 {
                        other.bell[0].wait();
                    }
                    continue;
                }
                let n = free(prod).min(if rewind.is_some() { 1 } else { n_all - prod });
                let at = match rewind {
                    Some(start) => {
                        ring::place(&me.tx, &peer.rx, prod, n, &buffer.starting_at(start), || true)
                    }
                    None => prod,
                };
                for i in 0..n {
                    other.put(at + i, (prod + i) as u8);
                }
                prod += n;
                ring::publish(&me.tx, prod, false);
                if doorbell::after_publish(peer, ctl::RX_ARMED, true).ring {
                    other.bell[1].notify();
                }
            }
        });
        let (me, peer) = (&sh.page.side[1], &sh.page.side[0]);
        let mut cons = 0;
        while cons < n_all {
            let look = |c| ring::readable(&peer.tx, c, SIZE).expect("a correct peer").bytes;
            let n = look(cons);
            if n == 0 {
                doorbell::arm(me, ctl::RX_ARMED);
                if look(cons) == 0 {
                    sh.bell[1].wait();
                }
                continue;
            }
            for i in 0..n {
                assert_eq!(sh.get(ring::at(&peer.tx, cons + i)), (cons + i) as u8);
            }
            cons += n;
            ring::release(&me.rx, cons);
            if doorbell::after_publish(peer, ctl::TX_ARMED, true).ring {
                sh.bell[0].notify();
            }
        }
        producer.join().expect("no panic");
    });
}

/// TCP as far as it matters: bytes in order, and everything before a send is seen by whoever reads it.
type Tcp = Mutex<VecDeque<u8>>;

/// The sending side of the switch, as `conn/tx.rs` runs it.
struct Sender<'a> {
    sh: &'a Shared,
    tcp: &'a Tcp,
    sent: u64,
    at: Option<u64>,
    prod: u64,
    back: bool,
}

impl Sender<'_> {
    fn tcp_send(&mut self, b: u8) {
        self.tcp.lock().expect("no poison").push_back(b);
        self.sent += 1;
    }

    /// The peer has asked.
    fn obey(&mut self) {
        if !self.back && doorbell::asked(&self.sh.page.side[1]) {
            self.leave();
        }
    }

    fn send(&mut self, b: u8) {
        let (me, peer) = (&self.sh.page.side[0], &self.sh.page.side[1]);
        if self.back {
            return self.tcp_send(b);
        }
        match self.at {
            None => {
                if switch::is_ready(peer) {
                    self.at = Some(self.sent + 1);
                    switch::announce(me, self.sent + 1);
                }
                self.tcp_send(b);
            }
            Some(at) if self.sent < at => self.tcp_send(b),
            Some(_) => {
                self.sh.put(self.prod, b);
                self.prod += 1;
                ring::publish(&me.tx, self.prod, false);
                let owed = doorbell::after_publish(peer, ctl::RX_ARMED, true);
                if owed.stop {
                    self.leave();
                }
            }
        }
    }

    /// As `leave_ring`: what the peer will not take from the ring moves into TCP.
    fn leave(&mut self) {
        if self.at.is_some() && !self.back {
            let (me, peer) = (&self.sh.page.side[0], &self.sh.page.side[1]);
            if switch::leave(me, peer, self.prod) {
                let _ = doorbell::after_publish(peer, ctl::RX_ARMED, true);
            } else {
                let at = switch::stop_at(peer, self.prod, SIZE).expect("not left, so stopped");
                for c in at..self.prod {
                    // Written by this thread, and the peer does not write: a plain read.
                    let b = self.sh.get(c);
                    self.tcp_send(b);
                }
            }
            self.back = true;
        }
    }
}

/// The receiving side, as `conn/rx.rs` runs it: one step, the byte taken if any.
struct Receiver<'a> {
    sh: &'a Shared,
    tcp: &'a Tcp,
    taken: u64,
    cons: u64,
    in_ring: bool,
    done: bool,
    asked: bool,
    stop: Option<u64>,
}

impl<'a> Receiver<'a> {
    fn new(sh: &'a Shared, tcp: &'a Tcp) -> Self {
        Receiver { sh, tcp, taken: 0, cons: 0, in_ring: false, done: false, asked: false, stop: None }
    }

    fn tcp_take_one(&mut self) -> Option<u8> {
        let b = self.tcp.lock().expect("no poison").pop_front();
        self.taken += u64::from(b.is_some());
        b
    }

    fn step(&mut self) -> Option<u8> {
        let peer = &self.sh.page.side[0];
        if self.done {
            return self.tcp_take_one();
        }
        if self.in_ring {
            let r = switch::ring_take(peer, self.cons, SIZE, self.stop).expect("a correct peer");
            if r.bytes > 0 {
                let b = self.sh.get(self.cons);
                self.cons += 1;
                ring::release(&self.sh.page.side[1].rx, self.cons);
                return Some(b);
            }
            self.done = r.left;
            return None;
        }
        if switch::announced(peer) == Some(self.taken) {
            self.in_ring = true;
            return None;
        }
        let seen = self.tcp.lock().expect("no poison").len();
        if seen == 0 {
            return None;
        }
        match switch::tcp_take(peer, self.taken, seen) {
            TcpTake::EnterRing => {
                self.in_ring = true;
                None
            }
            TcpTake::End => None,
            TcpTake::Take(n) => {
                assert!(n >= 1);
                self.tcp_take_one()
            }
        }
    }
}

/// Edges: ring.publish, bell.recheck, bell.stop. Both directions' beginnings are over: the sender puts `n` bytes
/// into the ring and calls no more; the receiver stops meanwhile, once it has `k`, and keeps what is in the ring.
/// All the bytes come to it all the same, in order.
fn stop_that_keeps(n: u8, k: usize) {
    model(move || {
        let sh = Shared::new();
        let tcp: Arc<Tcp> = Arc::new(Mutex::new(VecDeque::new()));
        let (sh2, tcp2) = (sh.clone(), tcp.clone());
        let sender = thread::spawn(move || {
            let mut s = Sender { sh: &sh2, tcp: &tcp2, sent: 1, at: Some(1), prod: 0, back: false };
            for b in 0..n {
                s.send(b);
            }
        });
        let mut r = Receiver::new(&sh, &tcp);
        (r.in_ring, r.taken) = (true, 1);
        let mut got = Vec::new();
        while got.len() < k {
            match r.step() {
                Some(b) => got.push(b),
                None => thread::yield_now(),
            }
        }
        r.stop = switch::stop(&sh.page.side[1], &sh.page.side[0], r.cons, SIZE, true, |_| ());
        sender.join().expect("no panic");
        // Nobody moves anything any more. A step that takes nothing may be the one from the ring to TCP.
        for _ in 0..n + 2 {
            got.extend(r.step());
        }
        assert_eq!(got, (0..n).collect::<Vec<_>>());
    });
}

#[test]
fn loom_switch_stop_that_keeps() {
    stop_that_keeps(2, 0);
    stop_that_keeps(3, 1);
}

/// Edges: switch.ready, switch.announce, ring.publish, bell.recheck, bell.stop. `leave_after`: the sender goes
/// back to TCP before that byte; `stop_after`: the receiver asks back once it has so many, keeping what is
/// in the ring or not. All bytes arrive once and in order.
fn switch_model(n: u8, leave_after: Option<u8>, stop_after: Option<(usize, bool)>) {
    model(move || {
        let sh = Shared::new();
        let tcp: Arc<Tcp> = Arc::new(Mutex::new(VecDeque::new()));
        let (sh2, tcp2) = (sh.clone(), tcp.clone());
        switch::ready(&sh.page.side[1]);
        let sender = thread::spawn(move || {
            let mut s = Sender { sh: &sh2, tcp: &tcp2, sent: 0, at: None, prod: 0, back: false };
            for b in 0..n {
                if leave_after == Some(b) {
                    s.leave();
                }
                s.send(b);
            }
            // A sender that sleeps is woken by the stop's doorbell and moves the bytes then.
            while stop_after.is_some() && s.at.is_some() && !s.back {
                s.obey();
                thread::yield_now();
            }
        });
        let mut r = Receiver::new(&sh, &tcp);
        let mut got = Vec::new();
        while got.len() < n as usize {
            if let Some((k, keep)) = stop_after
                && got.len() >= k
                && !r.asked
            {
                r.asked = true;
                r.stop = switch::stop(&sh.page.side[1], &sh.page.side[0], r.cons, SIZE, keep, |_| ());
                if r.stop.is_some() && !r.in_ring && switch::announced(&sh.page.side[0]).is_none() {
                    r.done = true;
                }
            }
            match r.step() {
                Some(b) => got.push(b),
                None => thread::yield_now(),
            }
        }
        if stop_after.is_some() && !r.asked {
            let _ = switch::stop(&sh.page.side[1], &sh.page.side[0], r.cons, SIZE, true, |_| ());
        }
        sender.join().expect("no panic");
        assert_eq!(got, (0..n).collect::<Vec<_>>());
        assert!(tcp.lock().expect("no poison").is_empty(), "no byte is left over");
    });
}

#[test]
fn loom_ring_and_doorbell() {
    stream_through_the_ring(SIZE + 2, None);
}

/// Models that hold without the fence as well: the switch is found out later then, by the stop's own
/// doorbell.
#[cfg(not(smc_weak))]
mod more {
    use super::{SIZE, stream_through_the_ring, switch_model};

    #[test]
    fn loom_rewind() {
        stream_through_the_ring(4, Some(0));
        stream_through_the_ring(4, Some(SIZE - 1));
    }

    #[test]
    fn loom_switch_stopped_by_the_receiver() {
        switch_model(4, None, Some((1, true)));
        switch_model(4, None, Some((2, false)));
    }

    #[test]
    fn loom_switch_up() {
        switch_model(4, None, None);
    }

    #[test]
    fn loom_switch_up_and_back_by_the_sender() {
        switch_model(4, Some(2), None);
        switch_model(4, Some(3), None);
    }

    #[test]
    fn loom_switch_left_and_stopped_at_once() {
        switch_model(4, Some(3), Some((1, true)));
        switch_model(4, Some(3), Some((2, false)));
    }

    #[test]
    fn loom_switch_stopped_before_it_began() {
        switch_model(3, None, Some((0, true)));
    }
}
