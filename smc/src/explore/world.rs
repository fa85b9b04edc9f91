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
    pub writers: u8,
    pub gone: u8,
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
    /// It is to be reset when it is closed (SO_LINGER 0).
    pub linger: bool,
    /// Bytes in its doorbell.
    pub bell: u8,
    /// It has shut its own doorbell (`deaf`).
    pub deaf: bool,
    /// Holders that were killed when they had left their seat and not counted themselves off.
    pub ghosts: u8,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    #[default]
    Idle,
    In(Op),
    Over,
    Dead,
}

/// What a thread waits for on the doorbell: bytes, space, bytes by TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    Rx,
    Tx,
    Tcp,
}

/// What a program may call, and then the parts of those calls: a part begins with nothing but what its name says,
/// so what a thread has seen before is forgotten, and many ways to it are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    Send,
    Recv,
    Leave,
    Stop,
    Keep,
    Shut,
    Close,
    Take,
    Ready,
    Kernel,
    /// A ring is owed; then `obey`.
    Owe {
        obey: bool,
    },
    Obey,
    Progress,
    WaitWritable,
    Wait(What),
    Nap(What),
    Asleep {
        what: What,
        flush: bool,
    },
    Woken {
        what: What,
        flush: bool,
        ended: bool,
    },
    Flushed {
        ended: bool,
    },
    Gone,
    GoneTx,
    Finish {
        close: bool,
    },
    ShutFd,
    ShutBell,
    Deafen,
    LastLook,
    CloseFd {
        last: bool,
    },
    CloseBell,
}

/// What a holder has of its end.
pub mod has {
    /// A descriptor of the TCP socket, and of the doorbell.
    pub const TCP: u8 = 1;
    pub const BELL: u8 = 2;
    /// It is counted, and has a seat, by which its death is noticed.
    pub const COUNT: u8 = 4;
    pub const SEAT: u8 = 8;
    pub const ALL: u8 = 15;
}

/// Longest log.
pub const LOG: usize = 120;

/// A thread of a holder; here each holder has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Thread {
    pub end: u8,
    pub at: At,
    /// See [`has`].
    pub has: u8,
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
    /// Whether end 0 has two holders.
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
            threads: [Thread { end: 0, at: At::Idle, has: 0, n: 0, log: [0; LOG], late: false }; 3],
            count: ends.len() as u8,
            deaths: 0,
            cap: 6,
            shared: ends.len() > 2,
            early: false,
            endless: false,
        };
        for (t, e) in w.threads.iter_mut().zip(ends) {
            (t.end, t.has) = (*e, has::ALL);
        }
        for e in &mut w.end {
            // Both ends are ready to follow an announcement.
            e.page[4] = 1;
        }
        w
    }

    fn holders_with(&self, e: usize, what: u8) -> usize {
        let of = |t: &&Thread| t.end as usize == e && t.has & what != 0;
        self.threads[..self.count as usize].iter().filter(of).count()
    }

    /// The count of holders; the dead have been counted off by who looks.
    pub fn holders(&self, e: usize) -> usize {
        self.holders_with(e, has::COUNT) + self.end[e].ghosts as usize
    }

    /// Whether somebody has a descriptor of the doorbell at `e`.
    pub fn has_bell(&self, e: usize) -> bool {
        self.end[e].closing & has::BELL != 0 || self.holders_with(e, has::BELL) > 0
    }

    /// Whether several that live and have not closed share `e`: then each access to its slot is a step.
    pub fn crowded(&self, e: usize) -> bool {
        let of = |t: &&Thread| t.end as usize == e && !matches!(t.at, At::Over | At::Dead);
        self.shared && e == 0 && self.threads[..self.count as usize].iter().filter(of).count() > 1
    }

    /// A holder's descriptor of the TCP socket is closed, by itself.
    pub fn close_fd(&mut self, e: usize, t: usize) {
        self.threads[t].has &= !has::TCP;
        if self.holders_with(e, has::TCP) == 0 {
            self.close_tcp(e);
        }
    }

    /// Holders are alike: of two worlds that differ in who is who, one stands for both.
    pub fn canonical(&self) -> Option<World> {
        (self.shared && self.threads[1] < self.threads[0]).then(|| {
            let mut w = *self;
            w.threads.swap(0, 1);
            for owner in &mut w.end[0].slot.lock {
                *owner = [0, 2, 1][*owner as usize];
            }
            w
        })
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
        self.end[e].bell > 0 || self.bell_ends(e)
    }

    /// The doorbell of `e` is at its end.
    pub fn bell_ends(&self, e: usize) -> bool {
        self.end[e].deaf || !self.has_bell(1 - e)
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

    /// Nobody has the lock. (That of a dead one is free.)
    pub fn is_free(&self, e: usize, lock: usize) -> bool {
        self.end[e].slot.lock[lock] == 0
    }

    /// The kernel closes the TCP socket of `e`.
    pub fn close_tcp(&mut self, e: usize) {
        if self.end[e].linger || self.end[1 - e].tcp.n > 0 {
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

/// An access to what the holders of `e` share: a step if there are several.
pub fn shared(e: usize, f: impl Fn(&mut World) -> u8) -> u8 {
    if with(|w| w.crowded(e)) { traced::step(|| Ok(with(&f))) } else { traced::joined(|| with(&f)) }
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
