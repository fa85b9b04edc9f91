//! All that the ends of a connection share with each other, with their own holders and with the kernel.

use std::cell::RefCell;

use super::traced;
use crate::mem::layout::{ConnPage, LEFT};

/// Bytes of a ring.
pub const SIZE: u64 = 2;

/// Why a step can't be made now.
pub mod why {
    pub const LOCK: u8 = 1;
    /// Asleep for bytes: on the doorbell, in TCP, on both.
    pub const BELL_RX: u8 = 2;
    pub const TCP_RX: u8 = 3;
    pub const BOTH: u8 = 4;
    /// Asleep for space: in the ring, in TCP.
    pub const BELL_TX: u8 = 5;
    pub const TCP_TX: u8 = 6;
    /// Others have still to see the doorbell's bytes.
    pub const CROWD: u8 = 7;
}

/// `tx.mode` and `rx.mode` as in the arena; READY has TCP's place in the receiving direction.
pub mod mode {
    pub const TCP: u8 = 0;
    pub const ANNOUNCED: u8 = 1;
    pub const RING: u8 = 2;
    pub const FLUSH: u8 = 3;
    pub const DONE: u8 = 4;
}

pub const TX: usize = 0;
pub const RX: usize = 1;
pub const READER: usize = 2;
/// `wait.lock`.
pub const WAIT: usize = 3;

/// What the holders of one end share: their slot in the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    pub tx: u8,
    pub sent: u8,
    pub switch_at: u8,
    pub prod: u8,
    pub flush: u8,
    pub rx: u8,
    pub taken: u8,
    pub cons: u8,
    pub stopped: u8,
    pub stop_at: u8,
    /// Holder's thread + 1.
    pub lock: [u8; 4],
    /// Rings noted, and whether one is owed.
    pub noted: u8,
    pub owed: bool,
    pub asleep: u8,
    pub gone: bool,
    pub reset: u8,
}

/// One direction of TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tcp {
    pub q: [u8; 6],
    pub n: u8,
    pub fin: bool,
}

/// An end beside its slot: the kernel's part, what its program may still do, and what it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct End {
    pub slot: Slot,
    /// Page words as producer and consumer.
    pub page: [u8; 6],
    /// The outgoing ring.
    pub data: [u8; SIZE as usize],
    pub tcp: Tcp,
    /// Its TCP socket is closed.
    pub closed: bool,
    /// Bytes in its doorbell, and its holders that have a descriptor of it.
    pub bell: u8,
    pub bells: u8,
    pub holders: u8,
    /// What it may still do: send, leave, stop, stop and keep.
    pub may: [u8; 4],
    /// Bytes given to the stream; of these, those whose call has returned.
    pub made: u8,
    pub acked: u8,
    /// Bytes had of the peer's stream.
    pub got: u8,
    pub tx_over: bool,
    pub rx_over: bool,
    /// It has asked for the ring's bytes by TCP, to be read by others.
    pub handed: bool,
    /// All of it was killed: what the kernel still has to close (1 TCP, 2 doorbell).
    pub dead: bool,
    pub closing: u8,
    /// A holder was killed in an operation, and no other has begun one since.
    pub orphan: bool,
}

/// What a thread is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum At {
    #[default]
    Idle,
    In(Op),
    Over,
    Dead,
}

/// What a program may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Send,
    Recv,
    Leave,
    Stop,
    Keep,
    Shut,
    Close,
}

/// Longest log.
pub const LOG: usize = 120;

/// A thread of a holder; here each holder has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Thread {
    pub end: u8,
    pub at: At,
    pub n: u8,
    pub log: [u8; LOG],
    /// Its operation began when a sibling was dead already.
    pub late: bool,
}

/// Everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub end: [End; 2],
    pub rst: bool,
    pub threads: [Thread; 3],
    pub count: u8,
    pub deaths: u8,
    /// Bytes TCP takes.
    pub cap: u8,
    /// Whether holders share an end, and so each access to the slot is a step.
    pub shared: bool,
    /// Ends may close before they have read and sent all.
    pub early: bool,
    /// Ends neither shut down nor close.
    pub endless: bool,
}

impl World {
    pub fn new(ends: &[u8]) -> World {
        let mut w = World {
            end: [End::default(); 2],
            rst: false,
            threads: [Thread { end: 0, at: At::Idle, n: 0, log: [0; LOG], late: false }; 3],
            count: ends.len() as u8,
            deaths: 0,
            cap: 6,
            shared: ends.len() > 2,
            early: false,
            endless: false,
        };
        for (t, e) in w.threads.iter_mut().zip(ends) {
            t.end = *e;
            w.end[*e as usize].bells += 1;
            w.end[*e as usize].holders += 1;
        }
        for e in &mut w.end {
            // Both ends are ready to follow an announcement.
            e.page[4] = 1;
        }
        w
    }

    /// TCP has something to say to the reader at `e`.
    pub fn tcp_readable(&self, e: usize) -> bool {
        let t = &self.end[1 - e].tcp;
        t.n > 0 || t.fin || self.rst
    }

    pub fn tcp_writable(&self, e: usize) -> bool {
        self.end[e].tcp.n < self.cap || self.rst
    }

    /// The doorbell of `e` is readable: a ring or its end.
    pub fn bell_readable(&self, e: usize) -> bool {
        self.end[e].bell > 0 || self.end[1 - e].bells == 0
    }

    /// A byte by TCP from `e`: 0 taken, 1 no room, 2 the connection is gone.
    pub fn push(&mut self, e: usize, v: u8) -> u8 {
        if self.end[1 - e].closed {
            self.rst = true;
        }
        let cap = self.cap;
        let t = &mut self.end[e].tcp;
        if self.rst || t.fin {
            return 2;
        }
        if t.n >= cap {
            return 1;
        }
        t.q[t.n as usize] = v;
        t.n += 1;
        0
    }

    /// The reader at `e` takes a byte.
    pub fn pop(&mut self, e: usize) -> Option<u8> {
        let t = &mut self.end[1 - e].tcp;
        (t.n > 0).then(|| {
            let v = t.q[0];
            t.q.rotate_left(1);
            t.n -= 1;
            t.q[t.n as usize..].fill(0);
            v
        })
    }

    /// Nobody has the lock, or a dead one.
    pub fn is_free(&self, e: usize, lock: usize) -> bool {
        let owner = self.end[e].slot.lock[lock];
        owner == 0 || self.threads[owner as usize - 1].at == At::Dead
    }

    /// The kernel closes the TCP socket of `e`.
    pub fn close_tcp(&mut self, e: usize, reset: bool) {
        if reset || self.end[1 - e].tcp.n > 0 {
            self.rst = true;
        }
        self.end[e].tcp.fin = true;
        self.end[e].closed = true;
    }
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new(&[]));
    static PAGE: &'static ConnPage = Box::leak(Box::default());
}

pub fn page() -> &'static ConnPage {
    PAGE.with(|p| *p)
}

pub fn with<T>(f: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with_borrow_mut(f)
}

fn small(v: u64) -> u8 {
    (v & 127) as u8 | ((v & LEFT != 0) as u8) << 7
}

fn large(v: u8) -> u64 {
    u64::from(v & 127) | if v >> 7 != 0 { LEFT } else { 0 }
}

/// Makes `w` the world.
pub fn enter(w: &World) {
    for (side, e) in page().side.iter().zip(&w.end) {
        let [prod, switch_at, cons, stop_at, ready, ctl] = e.page;
        side.tx.prod.set_raw(large(prod));
        side.tx.switch_at.set_raw(large(switch_at));
        side.rx.cons.set_raw(large(cons));
        side.rx.stop_at.set_raw(large(stop_at));
        side.rx.ready.set_raw(ready.into());
        side.ctl.ctl.set_raw(ctl.into());
    }
    with(|x| *x = *w);
}

/// The world as it is.
pub fn snapshot() -> Box<World> {
    let mut w = Box::new(with(|w| *w));
    for (side, e) in page().side.iter().zip(&mut w.end) {
        e.page = [
            small(side.tx.prod.raw()),
            small(side.tx.switch_at.raw()),
            small(side.rx.cons.raw()),
            small(side.rx.stop_at.raw()),
            side.rx.ready.raw() as u8,
            side.ctl.ctl.raw() as u8,
        ];
    }
    w
}

/// An access to what the holders of an end share: a step if there are several.
pub fn shared(f: impl Fn(&mut World) -> u8) -> u8 {
    if with(|w| w.shared) { traced::step(|| Ok(with(&f))) } else { traced::joined(|| with(&f)) }
}

/// A step that is always one.
pub fn step(f: impl Fn(&mut World) -> u8) -> u8 {
    traced::step(|| Ok(with(&f)))
}

/// A step that can be made once `f` gives something.
pub fn await_step(why: u8, f: impl Fn(&mut World) -> Option<u8>) -> u8 {
    traced::step(|| with(&f).ok_or(why))
}

/// What goes with the access before it.
pub fn also(f: impl Fn(&mut World)) {
    traced::joined(|| {
        with(&f);
        0
    });
}
