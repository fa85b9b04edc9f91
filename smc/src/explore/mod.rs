//! Every state that two ends, their holders and the kernel can come to, within bounds.
//!
//! loom (`models.rs`) looks at orderings: what one thread sees of another's stores. It can't look at much more than
//! one direction at a time. This looks at what loom can't: both directions at once, either end or both going back to
//! TCP at any time, FIN, close, reset, an end with two holders, and death between any two accesses. Accesses are
//! taken to be sequentially consistent here; that they may be is what loom's models show.
//!
//! The functions of `handshake/switch.rs`, `wait/doorbell.rs` and `ring/` are the product's own, and each access of
//! theirs to the page is a step ([`traced`]). `end` does with them what `conn/` does. All states are visited once,
//! by their 128-bit hash, breadth first, so that what is told of a failure is a shortest way to it.
//!
//! What keeps the states few: a call is made of parts (`world::Op`), and who comes to the next part forgets what it has
//! seen in the last; words of the slot are steps only where another holder lives who might see them; a lock is taken in
//! one step with the first access under it, and given back in one with the last, since the lock keeps out those who could
//! tell; and holders are alike, so that of two states that differ in who is who one stands for both. A dead holder is
//! counted off at once, as by one who looks, but for one that was killed while it counted itself off: that stays counted.
//!
//! Two things are one step here and are not in the product: that the kernel takes bytes from, or gives them to, a
//! holder and that this counts them. A holder that is killed between the two leaves a count that is wrong to the
//! others; nothing but the kernel's own counts could tell them.
//!
//! In each state in which nobody is in the middle of a call, nobody may sleep for what is there (`end::due`); in
//! each step the bytes that come are those that were sent, in order, and an end of the stream comes after all of
//! them.

mod end;
#[allow(missing_docs, reason = "as std has them")]
pub mod traced;
mod world;

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use crate::rules::Rule;
use world::{At, LOG, Op, World, has, why};

thread_local! {
    static DROPPED: Cell<Option<Rule>> = const { Cell::new(None) };
}

/// Whether the rule is followed in this test.
pub fn holds(r: Rule) -> bool {
    DROPPED.get() != Some(r)
}

/// What can happen next; read when a way is told.
#[allow(dead_code, reason = "by Debug")]
#[derive(Clone, Copy, Debug)]
enum Step {
    Thread(u8, Op),
    Kill(u8),
    /// The kernel closes what a dead end had: 1 TCP, 2 the doorbell.
    Kernel(u8, u8),
}

/// How a step went.
enum Went {
    To(Box<World>),
    Blocked(u8),
    Broke(&'static str),
}

fn make(w: &World, t: u8, op: Op) -> Went {
    let th = &w.threads[t as usize];
    let begins = th.at == At::Idle;
    world::enter(w);
    if begins {
        world::with(|w| {
            let e = w.threads[t as usize].end as usize;
            match op {
                Op::Leave => w.end[e].may[1] -= 1,
                Op::Stop => w.end[e].may[2] -= 1,
                Op::Keep => w.end[e].may[3] -= 1,
                _ => {}
            }
            let orphan = w.end[e].orphan;
            let th = &mut w.threads[t as usize];
            th.at = At::In(op);
            th.late = orphan;
        });
    }
    traced::begin(&th.log[..th.n as usize]);
    let next = end::Call::run(th.end as usize, t, op);
    traced::end(|r| {
        if let Some(b) = r.broken {
            return Went::Broke(b);
        }
        if let Some(why) = r.blocked {
            return Went::Blocked(why);
        }
        let over = r.after.is_none();
        let mut after = r.after.take().unwrap_or_else(world::snapshot);
        let end = after.threads[t as usize].end as usize;
        let th = &mut after.threads[t as usize];
        if over {
            (th.n, th.log) = (0, [0; LOG]);
            th.at = match next {
                Some(part) => At::In(part),
                None if op == Op::CloseBell => At::Over,
                None => At::Idle,
            };
            if next.is_none() && std::mem::take(&mut th.late) {
                after.end[end].orphan = false;
            }
        } else {
            assert!(r.log.len() <= LOG, "a longer log is needed");
            th.n = r.log.len() as u8;
            th.log[..r.log.len()].copy_from_slice(&r.log);
        }
        Went::To(after)
    })
}

fn kill(w: &World, t: u8) -> Box<World> {
    let mut w = Box::new(*w);
    w.deaths -= 1;
    let e = w.threads[t as usize].end as usize;
    let within = matches!(w.threads[t as usize].at, At::In(_));
    let th = &mut w.threads[t as usize];
    let had = std::mem::take(&mut th.has);
    (th.at, th.n, th.log, th.late) = (At::Dead, 0, [0; LOG], false);
    let others =
        |what| w.threads[..w.count as usize].iter().any(|o| o.end as usize == e && o.has & what != 0);
    // What nobody else has the kernel closes.
    let closing = [has::TCP, has::BELL].into_iter().filter(|b| had & b != 0 && !others(*b)).sum::<u8>();
    let alone = !others(has::ALL);
    let end = &mut w.end[e];
    end.closing |= closing;
    end.ghosts += u8::from(had & (has::COUNT | has::SEAT) == has::COUNT && !alone);
    end.slot.lock.iter_mut().filter(|l| **l == t + 1).for_each(|l| *l = 0);
    end.slot.asleep = 0;
    end.orphan = within && !alone;
    end.dead = alone;
    w
}

fn kernel(w: &World, e: u8, what: u8) -> Box<World> {
    let mut w = Box::new(*w);
    w.end[e as usize].closing &= !what;
    if what == has::TCP && !w.end[e as usize].closed {
        w.close_tcp(e as usize);
    }
    w
}

fn may_begin(w: &World, t: u8) -> impl Iterator<Item = Op> {
    let e = w.threads[t as usize].end as usize;
    let end = w.end[e];
    let (early, endless, holders) = (w.early, w.endless, w.holders(e));
    [Op::Send, Op::Recv, Op::Leave, Op::Stop, Op::Keep, Op::Shut, Op::Close].into_iter().filter(move |op| {
        match op {
            Op::Send => end.may[0] > 0 && !end.tx_over,
            Op::Recv => !end.rx_over && !end.handed,
            Op::Leave => end.may[1] > 0,
            Op::Stop => end.may[2] > 0,
            Op::Keep => end.may[3] > 0,
            Op::Shut => !endless && !end.tcp.fin && !end.tx_over && (early || end.may[0] == 0),
            // Who leaves the connection to another may do so at any time.
            Op::Close => !endless && (early || holders > 1 || end.tx_over && (end.rx_over || end.handed)),
            _ => false,
        }
    })
}

/// The peer is no more: a reader that calls again and again comes to the end.
fn drains(w: &World) -> Result<(), &'static str> {
    for t in 0..w.count {
        let th = &w.threads[t as usize];
        let (end, peer) = (&w.end[th.end as usize], &w.end[1 - th.end as usize]);
        let gone = peer.closed && !w.has_bell(1 - th.end as usize);
        if th.at != At::Idle || !gone || end.rx_over || end.handed {
            continue;
        }
        let mut at = Box::new(*w);
        for _ in 0..400 {
            if at.end[th.end as usize].rx_over {
                break;
            }
            let op = match at.threads[t as usize].at {
                At::In(op) => op,
                _ => Op::Recv,
            };
            match make(&at, t, op) {
                Went::To(after) => at = after,
                Went::Blocked(_) => break,
                Went::Broke(b) => return Err(b),
            }
        }
        if !at.end[th.end as usize].rx_over {
            return Err("a reader never comes to the end");
        }
    }
    Ok(())
}

/// What was found.
#[derive(Debug)]
struct Found {
    states: usize,
    broken: Option<String>,
}

/// 128 bits of a state, by two products; the set takes 64 of them as they are.
#[derive(Default)]
struct Mix(u64, u64);

impl Mix {
    fn add(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.1 = (self.1 ^ v).wrapping_mul(0xd6e8_feb8_6659_fd93).rotate_left(29);
    }

    /// All bits take part in all others (the end of MurmurHash3).
    fn done(mut v: u64) -> u64 {
        v = (v ^ v >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        v = (v ^ v >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        v ^ v >> 33
    }
}

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for c in bytes.chunks(8) {
            let mut b = [0; 8];
            b[..c.len()].copy_from_slice(c);
            self.add(u64::from_le_bytes(b));
        }
    }

    fn write_u128(&mut self, v: u128) {
        self.0 = v as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type Seen = HashSet<u128, BuildHasherDefault<Mix>>;

fn key(w: &World) -> u128 {
    let mut h = Mix(1, 2);
    w.canonical().as_ref().unwrap_or(w).hash(&mut h);
    u128::from(Mix::done(h.0)) << 64 | u128::from(Mix::done(h.1))
}

fn explore(start: World) -> Found {
    let mut seen = Seen::default();
    let mut came: Vec<(u32, Step)> = vec![(0, Step::Kernel(0, 0))];
    let mut layer = vec![(Box::new(start), 0u32)];
    seen.insert(key(&start));
    while !layer.is_empty() {
        let mut next = Vec::new();
        for (w, at) in layer {
            let mut to = |w: Box<World>, s: Step| {
                if seen.insert(key(&w)) {
                    came.push((at, s));
                    next.push((w, came.len() as u32 - 1));
                }
            };
            let mut sleepers = Vec::new();
            let mut broken = None;
            let mut busy = false;
            for t in 0..w.count {
                let th = &w.threads[t as usize];
                let begun = match th.at {
                    At::In(op) => Some(op),
                    At::Idle => None,
                    _ => continue,
                };
                let begin = begun.is_none().then(|| may_begin(&w, t)).into_iter().flatten();
                for op in begun.into_iter().chain(begin) {
                    match make(&w, t, op) {
                        Went::To(after) => {
                            busy |= begun.is_some();
                            to(after, Step::Thread(t, op));
                        }
                        Went::Blocked(why) if begun.is_some() => sleepers.push((th.end as usize, why)),
                        Went::Blocked(_) => {}
                        Went::Broke(b) => broken = Some((b, Step::Thread(t, op))),
                    }
                }
                if w.deaths > 0 {
                    to(kill(&w, t), Step::Kill(t));
                }
            }
            for e in 0..2u8 {
                for what in [has::TCP, has::BELL] {
                    if w.end[e as usize].closing & what != 0 {
                        busy = true;
                        to(kernel(&w, e, what), Step::Kernel(e, what));
                    }
                }
            }
            if !busy && broken.is_none() {
                // Whoever holds READER sleeps in TCP, and who waits for it with it.
                let crowd = sleepers.iter().any(|(_, y)| *y != why::LOCK);
                let orphan = w.end.iter().any(|e| e.orphan);
                broken = sleepers
                    .iter()
                    .filter(|(_, y)| *y != why::LOCK || !crowd)
                    .find_map(|(e, y)| end::due(&w, *e, *y).filter(|_| !orphan))
                    .map(|b| (b, Step::Kernel(0, 0)));
            }
            if !busy
                && broken.is_none()
                && let Err(b) = drains(&w)
            {
                broken = Some((b, Step::Kernel(0, 0)));
            }
            if let Some((b, last)) = broken {
                let mut way = vec![last];
                let mut i = at;
                while i != 0 {
                    way.push(came[i as usize].1);
                    i = came[i as usize].0;
                }
                let mut text = format!("{b}\n");
                for s in way.iter().rev() {
                    let _ = writeln!(text, "  {s:?}");
                }
                let _ = write!(
                    text,
                    "{:?}\nrst {} threads {:?}",
                    w.end,
                    w.rst,
                    w.threads.map(|t| (t.end, t.at, t.n))
                );
                return Found { states: seen.len(), broken: Some(text) };
            }
        }
        layer = next;
    }
    Found { states: seen.len(), broken: None }
}

mod tests;
