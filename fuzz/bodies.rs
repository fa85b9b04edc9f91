//! What a peer can say, made of random bytes: the bodies of the fuzz targets, and of the tests that run them on a
//! fixed choice of inputs (`smc/tests/any_input.rs`). Each asserts what must hold whatever the bytes are.

use smc::{
    handshake::{
        Rendezvous, RendezvousConfig, Side, Step,
        switch::{self, TcpTake},
        unix,
    },
    mem::{
        layout::{ConnPage, LAYOUT_VERSION, SidePage},
        region::Region,
        rmb::{Extent, Grant, Rmb, ring_size},
    },
    ring,
    wait::doorbell,
    wire::clc::{self, Accept, Confirm, Decline, Decoded, Message, Proposal, Sender},
};
use std::{
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::atomic::Ordering::Relaxed,
};

/// Numbers off the front of the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((b, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *b
    }

    /// Often one at which something ends or begins.
    fn number(&mut self) -> u64 {
        let near = |n: u64, by: u8| n.wrapping_add(u64::from(by)).wrapping_sub(128);
        match self.byte() {
            0 => 0,
            1 => u64::MAX,
            2 => near(1 << 63, self.byte()),
            3 => near(1 << 16, self.byte()),
            n @ 4..=63 => 1 << n,
            n @ 64..=127 => u64::from(n & 63),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }
}

/// A message, or not: as many bytes are asked for as there are in it, and it reads back as it was.
pub fn decode(data: &[u8]) {
    match clc::decode(data) {
        Ok(Decoded::NeedTotal(n)) => assert!(n > data.len() && n <= clc::MAX_LEN),
        Ok(Decoded::Message(m, n)) => {
            assert!(n <= data.len() && n <= clc::MAX_LEN);
            let again = clc::encode(&m);
            assert_eq!(clc::decode(again.as_bytes()), Ok(Decoded::Message(m, again.as_bytes().len())));
        }
        Err(_) => {}
    }
}

/// What sock_diag answers.
pub fn diag(data: &[u8]) {
    let (a, b) = ("127.0.0.1:1".parse().expect("an address"), "[::1]:2".parse().expect("an address"));
    for (local, peer) in [(a, a), (a, b), (b, b)] {
        let _ = unix::parse_diag(data, local, peer);
    }
}

/// The shared page as the peer writes it, both sides of it, between any two steps of ours.
pub fn page(data: &[u8]) {
    let mut i = Input(data);
    let (page, size) = (ConnPage::default(), 1u64 << 16);
    let [me, peer] = &page.side;
    let (mut cons, mut prod, mut taken) = (0u64, 0u64, 0u64);
    while !i.0.is_empty() {
        match i.byte() % 12 {
            0 => peer.tx.prod.store(i.number(), Relaxed),
            1 => peer.rx.cons.store(i.number(), Relaxed),
            2 => peer.rx.stop_at.store(i.number(), Relaxed),
            3 => peer.tx.switch_at.store(i.number(), Relaxed),
            4 => scribble(&page.side[usize::from(i.byte() & 1)], &mut i),
            5 => {
                if let Ok(r) = switch::ring_take(peer, cons, size, None) {
                    assert!(r.bytes <= size);
                    cons += r.bytes;
                    ring::release(&me.rx, cons);
                }
            }
            6 => {
                let stop = cons + i.number() % (size + 1);
                if let Ok(r) = switch::ring_take(peer, cons, size, Some(stop)) {
                    assert!(cons + r.bytes <= stop, "nothing beyond the stop");
                }
            }
            7 => {
                if let Ok((free, seen)) = ring::writable(&peer.rx, prod, size) {
                    assert!(free <= size && prod.wrapping_sub(seen) == size - free);
                    prod += i.number() % (free + 1);
                    ring::publish(&me.tx, prod, false);
                    let _ = doorbell::after_publish(peer, 1, true);
                }
            }
            8 => {
                let seen = i.number() as usize % (1 << 20);
                match switch::tcp_take(peer, taken, seen) {
                    TcpTake::Take(n) => {
                        assert!(n > 0 && n <= seen);
                        taken += n as u64;
                    }
                    TcpTake::End => assert_eq!(seen, 0),
                    TcpTake::EnterRing => {}
                }
            }
            9 => {
                if let Some(at) = switch::stop_at(peer, prod, size) {
                    assert!(prod.wrapping_sub(at) <= size, "only what is in the ring is moved");
                }
            }
            10 => {
                if let Some(at) = switch::stop(me, peer, cons, size, i.byte() & 1 != 0, |_| ()) {
                    assert!(at >= cons && at - cons <= size);
                }
            }
            _ => {
                let _ = (switch::leave(me, peer, prod), switch::is_ready(peer), doorbell::asked(peer));
                doorbell::disarm(me, 3);
                doorbell::arm(me, 1);
            }
        }
    }
}

fn scribble(side: &SidePage, i: &mut Input<'_>) {
    side.tx.prod.store(i.number(), Relaxed);
    side.tx.switch_at.store(i.number(), Relaxed);
    side.rx.cons.store(i.number(), Relaxed);
    side.rx.stop_at.store(i.number(), Relaxed);
    side.rx.ready.store(i.number() as u32, Relaxed);
    side.ctl.ctl.store(i.number() as u32, Relaxed);
    side.hint.cpu.store(i.number() as u32, Relaxed);
    side.hint.detached.store(i.number() as u32, Relaxed);
}

/// An owner's memory, cut up for a peer that writes what it likes into the pages: buffers that we use are given out
/// to nobody else, and new ones are zero.
pub fn segment(data: &[u8]) {
    let mut i = Input(data);
    let rmb = Rmb::default();
    let mut live: Vec<Grant> = Vec::new();
    for _ in 0..64 {
        if i.0.is_empty() {
            break;
        }
        match i.byte() % 4 {
            0 => {
                let ring = ring_size(i.number() as usize % (1 << 18));
                let Ok(g) = rmb.allocate(ring, i.number(), 32 << 20, 100) else { continue };
                let extent = *g.buffers.extent();
                assert!(extent.fits(g.buffers.segment().region.len()));
                let side = &g.buffers.page().side[0];
                assert_eq!((side.tx.prod.load(Relaxed), side.ctl.ctl.load(Relaxed)), (0, 0));
                for other in &live {
                    let (a, b) = (other.buffers.segment(), g.buffers.segment());
                    assert!(
                        a.number != b.number || apart(other.buffers.extent(), &extent),
                        "given out twice"
                    );
                }
                live.push(g);
            }
            1 if !live.is_empty() => {
                let g = live.swap_remove(usize::from(i.byte()) % live.len());
                g.buffers.detach(1);
                rmb.give(g.ticket);
            }
            2 if !live.is_empty() => {
                let g = &live[usize::from(i.byte()) % live.len()];
                g.buffers.page().side.iter().for_each(|s| scribble(s, &mut i));
            }
            _ => {
                // What an Accept says of a segment.
                let extent = Extent {
                    page: i.number() as usize,
                    rings: [i.number() as usize, i.number() as usize],
                    ring_size: i.number() as usize,
                };
                if extent.fits(1 << 22) {
                    assert!(extent.rings.iter().all(|r| r + extent.ring_size <= 1 << 22));
                    assert!(extent.page + size_of::<ConnPage>() <= 1 << 22);
                }
            }
        }
    }
}

fn apart(a: &Extent, b: &Extent) -> bool {
    let parts =
        |e: &Extent| [(e.page, size_of::<ConnPage>()), (e.rings[0], e.ring_size), (e.rings[1], e.ring_size)];
    parts(a).iter().all(|x| parts(b).iter().all(|y| x.0 + x.1 <= y.0 || y.0 + y.1 <= x.0))
}

/// One end of a handshake, against one that says anything: messages in any order, right and wrong in any field,
/// bytes that are no message, memory of any kind.
pub fn rendezvous(data: &[u8]) {
    let mut i = Input(data);
    let Some((c, a)) = tcp() else { return };
    let side = if i.byte() & 1 == 0 { Side::Accept } else { Side::Connect };
    let (ours, theirs) = if side == Side::Connect { (&c, &a) } else { (&a, &c) };
    let (Ok(from), Ok(to)) = (c.local_addr(), c.peer_addr()) else { return };
    let name = unix::Name::of(from, to);
    let config = RendezvousConfig { ring_size: 1 << 16, mem_limit: 64 << 20, fd_base: 100 };
    let listener = if side == Side::Accept { unix::listen(&name, 100).ok() } else { None };
    let Ok(mut real) = Rendezvous::new(side, ours.as_raw_fd(), config) else { return };
    let talk = match &listener {
        Some(l) => {
            let _ = real.step();
            unix::accept(l, 100)
        }
        None => unix::connector(100).and_then(|fd| unix::connect(&fd, &name).map(|()| fd)),
    };
    let Ok(talk) = talk else { return };
    for _ in 0..6 {
        if let Step::Done(est) = real.step() {
            let n = est.buffers.tx().1;
            assert!(n == est.buffers.rx().1 && n <= ring_size(config.ring_size));
            return;
        }
        let sender = Sender {
            layout_version: if i.byte() < 240 { LAYOUT_VERSION } else { i.number() as u32 },
            role: if i.byte() < 240 { side.peer() } else { side },
            instance: i.number(),
            pid: i.number() as u32,
            cookie: if i.byte() < 240 { unix::cookie(theirs.as_raw_fd()).unwrap_or(0) } else { i.number() },
        };
        let kind = i.byte();
        let right = Extent::at(1 << 16, 1 << 16);
        let message = match kind % 5 {
            0 => Message::Proposal(Proposal {
                sender,
                ring_size: i.number() as u32,
                known_instance: i.number(),
                known_lgr: i.number(),
                known_segments: i.number(),
            }),
            1 => Message::Accept(Accept {
                sender,
                lgr: i.number(),
                segment: u32::from(i.byte() & 63),
                first_contact: i.byte() < 200,
                segment_size: if i.byte() < 200 { 4 << 20 } else { i.number() },
                page: if i.byte() < 200 { right.page as u64 } else { i.number() },
                rings: if i.byte() < 200 { right.rings.map(|r| r as u64) } else { [i.number(), i.number()] },
                ring_size: if i.byte() < 100 { 1 << 16 } else { i.number() as u32 },
            }),
            2 => Message::Confirm(Confirm { sender, lgr: i.number(), segment: i.number() as u32 }),
            3 => Message::Decline(Decline { instance: i.number(), diagnosis: 1, out_of_sync: kind > 127 }),
            _ => {
                let n = usize::from(i.byte()).min(i.0.len());
                let _ = unix::send(&talk, &i.0[..n], None);
                continue;
            }
        };
        let memory = if i.byte() < 200 { Region::create(4 << 20, u64::MAX).ok() } else { None };
        let fd = memory.as_ref().filter(|_| kind % 5 == 1 || kind > 250).map(|(_, fd)| fd);
        let _ = unix::send(&talk, clc::encode(&message).as_bytes(), fd);
    }
}

/// A connection that leaves no TIME_WAIT behind.
fn tcp() -> Option<(TcpStream, TcpStream)> {
    let l = TcpListener::bind("127.0.0.1:0").ok()?;
    let c = TcpStream::connect(l.local_addr().ok()?).ok()?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let (p, n) = ((&raw const linger).cast(), size_of::<libc::linger>() as u32);
    // SAFETY: one struct linger, which lives over the call.
    unsafe { libc::setsockopt(c.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, p, n) };
    Some((c, l.accept().ok()?.0))
}
