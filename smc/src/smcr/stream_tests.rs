//! Two ends of a stream, memory and links of a model that loses links: no byte is lost, doubled or overwritten.
//!
//! A WRITE copies when it is *delivered*, from the send buffer as it is then: a place that is used again before its
//! completion shows up as a wrong byte. A link that fails drops what was not delivered and the completions of what
//! was; what it dropped may still come late, until the peer's end of it is known to be gone.

use std::collections::VecDeque;

use super::stream::*;
use super::*;
use crate::wire::smcr::cdc::{Cdc, Closing, Cursor, Producer};
use proptest::collection::vec;
use proptest::prelude::*;

struct End {
    stream: Stream,
    buffer: Vec<u8>,
    rmb: Vec<u8>,
    /// Posted, not delivered.
    posted: VecDeque<Transmit>,
    /// Delivered, completion not seen.
    arrived: VecDeque<u16>,
    /// Of a link that was lost: where, and the bytes as they were.
    late: VecDeque<(usize, Vec<u8>)>,
    put: u64,
    got: u64,
}

impl End {
    fn new(sizes: Sizes) -> Self {
        Self {
            stream: Stream::new(sizes, 7),
            buffer: vec![0; sizes.send as usize],
            rmb: vec![0; sizes.own as usize],
            posted: VecDeque::new(),
            arrived: VecDeque::new(),
            late: VecDeque::new(),
            put: 0,
            got: 0,
        }
    }

    fn write(&mut self, most: u32) {
        let (at, n) = self.stream.room();
        let n = n.min(most);
        for i in 0..n {
            self.buffer[(at + i) as usize] = byte(self.put);
            self.put += 1;
        }
        self.stream.wrote(n);
    }

    fn read(&mut self, most: u32) {
        let (at, n) = self.stream.readable();
        let n = n.min(most);
        for i in 0..n {
            assert_eq!(self.rmb[(at + i) as usize], byte(self.got), "byte {}", self.got);
            self.got += 1;
        }
        self.stream.took(n);
    }

    fn post(&mut self) -> bool {
        match self.stream.poll_transmit() {
            Some(t) => {
                self.posted.push_back(t);
                true
            }
            None => false,
        }
    }

    fn complete(&mut self) -> bool {
        match self.arrived.pop_front() {
            Some(seq) => {
                self.stream.completed(seq);
                true
            }
            None => false,
        }
    }
}

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn deliver(from: &mut End, to: &mut End) -> bool {
    let Some(t) = from.posted.pop_front() else { return false };
    write(from, to, &t);
    let cdc = Cdc::decode(&t.cdc.encode()).unwrap();
    to.stream.handle_cdc(&cdc).unwrap();
    if !cdc.flags.failover {
        from.arrived.push_back(cdc.seq);
    }
    true
}

fn write(from: &End, to: &mut End, t: &Transmit) {
    for w in t.writes.iter() {
        let bytes = &from.buffer[w.from as usize..][..w.len as usize];
        to.rmb[w.to as usize..][..w.len as usize].copy_from_slice(bytes);
    }
}

/// The link fails. `landed`: of the first message that was not delivered, the WRITEs have got through.
fn fail(a: &mut End, b: &mut End, landed: bool) {
    if landed && let Some(t) = a.posted.front().copied() {
        write(a, b, &t);
    }
    for e in [a, b] {
        for t in std::mem::take(&mut e.posted) {
            let bytes = |w: &Write| e.buffer[w.from as usize..][..w.len as usize].to_vec();
            e.late.extend(t.writes.iter().map(|w| (w.to as usize, bytes(w))));
        }
        e.arrived.clear();
        e.stream.failover();
    }
}

/// A packet of a lost link comes late.
fn late(from: &mut End, to: &mut End) {
    if let Some((at, bytes)) = from.late.pop_front() {
        to.rmb[at..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// Nothing of a lost link will come any more.
fn gone(a: &mut End, b: &mut End) {
    for e in [a, b] {
        e.late.clear();
        e.stream.old_link_gone();
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u32),
    Read(u32),
    Post,
    Deliver,
    Complete,
    Fail(bool),
    Late,
    Gone,
}

fn act_on(x: &mut End, y: &mut End, act: Act) {
    match act {
        Act::Write(n) => x.write(n),
        Act::Read(n) => x.read(n),
        Act::Post => drop(x.post()),
        Act::Deliver => drop(deliver(x, y)),
        Act::Complete => drop(x.complete()),
        Act::Fail(landed) => fail(x, y, landed),
        Act::Late => late(x, y),
        Act::Gone => gone(x, y),
    }
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1..20u32).prop_map(Act::Write),
        4 => (1..20u32).prop_map(Act::Read),
        6 => Just(Act::Post),
        6 => Just(Act::Deliver),
        6 => Just(Act::Complete),
        1 => any::<bool>().prop_map(Act::Fail),
        1 => Just(Act::Late),
        1 => Just(Act::Gone),
    ]
}

/// Until nothing moves any more; readers read all.
fn settle(a: &mut End, b: &mut End) {
    gone(a, b);
    loop {
        let mut moved = false;
        for turn in 0..2 {
            let (x, y) = if turn == 0 { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
            while x.post() {
                moved = true;
            }
            while deliver(x, y) {
                moved = true;
            }
            while x.complete() {
                moved = true;
            }
            while y.stream.readable().1 > 0 {
                y.read(u32::MAX);
                moved = true;
            }
        }
        if !moved {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_arrives_once(acts in vec((any::<bool>(), act()), 0..400), last in vec((any::<bool>(), act()), 0..40),
                               send in 1..20u32, ring_a in 1..20u32, ring_b in 1..20u32, half in any::<bool>()) {
        let mut a = End::new(Sizes { send, peer: ring_b, own: ring_a });
        let mut b = End::new(Sizes { send: send + 3, peer: ring_a, own: ring_b });
        for (swap, act) in acts {
            let (x, y) = if swap { (&mut b, &mut a) } else { (&mut a, &mut b) };
            act_on(x, y, act);
        }
        // Whatever has happened: what was written arrives, and then the end, and nobody is left waiting.
        if half {
            a.stream.shutdown();
            b.stream.shutdown();
        }
        settle(&mut a, &mut b);
        prop_assert_eq!((a.got, b.got), (b.put, a.put));
        prop_assert_eq!(a.stream.at_end(), half);
        a.stream.close();
        b.stream.close();
        for (swap, act) in last {
            let (x, y) = if swap { (&mut b, &mut a) } else { (&mut a, &mut b) };
            act_on(x, y, act);
        }
        settle(&mut a, &mut b);
        prop_assert!(a.stream.at_end() && b.stream.at_end());
        prop_assert!(a.stream.is_over() && b.stream.is_over());
        prop_assert!(!a.stream.is_reset() && !b.stream.is_reset());
        prop_assert_eq!(a.stream.in_flight() + b.stream.in_flight(), 0);
    }

    /// A hostile peer: anything may be said; the answer is an error or a state in which the sums still hold.
    #[test]
    fn whatever_the_peer_says(said in vec((any::<[u16; 3]>(), 0..24u32, 0..24u32, any::<(u8, u8)>(), 0..12u32), 0..100)) {
        let sizes = Sizes { send: 16, peer: 16, own: 8 };
        let mut s = Stream::new(sizes, 1);
        for ([seq, pw, cw], p, c, (flags, closing), n) in said {
            let mut bytes = Cdc {
                seq: seq % 8,
                token: 1,
                prod: Cursor { wrap: pw % 3, count: p },
                cons: Cursor { wrap: cw % 3, count: c },
                ..Cdc::default()
            }
            .encode();
            (bytes[24], bytes[25]) = (flags, closing & flags);
            if s.handle_cdc(&Cdc::decode(&bytes).unwrap()).is_err() {
                return Ok(());
            }
            let (at, len) = s.readable();
            prop_assert!(at + len <= sizes.own);
            s.took(n);
            let (at, len) = s.room();
            prop_assert!(at + len <= sizes.send);
            s.wrote(n.min(len));
            if let Some(t) = s.poll_transmit() {
                prop_assert!(t.writes.iter().all(|w| w.from + w.len <= sizes.send && w.to + w.len <= sizes.peer));
                if !t.cdc.flags.failover {
                    s.completed(t.cdc.seq);
                }
            }
            if n == 11 {
                s.failover();
            }
        }
    }
}

/// The end of a stream that goes down with its link, with bytes before it: both are said again, and until then neither
/// has arrived.
#[test]
fn what_was_said_of_the_end_is_said_again() {
    let sizes = Sizes { send: 16, peer: 16, own: 16 };
    let (mut a, mut b) = (End::new(sizes), End::new(sizes));
    a.write(5);
    a.stream.shutdown();
    assert!(a.post() && a.stream.said().done_writing);
    fail(&mut a, &mut b, false);
    assert!(a.stream.in_flight() > 0 && !a.stream.said().done_writing);
    settle(&mut a, &mut b);
    assert!(b.stream.at_end() && b.got == 5 && a.stream.in_flight() == 0);
}

/// What a message of the lost link was for is not overwritten one lap later, as long as that may still come.
#[test]
fn a_late_packet_finds_its_own_bytes() {
    let sizes = Sizes { send: 32, peer: 16, own: 16 };
    let (mut a, mut b) = (End::new(sizes), End::new(sizes));
    a.write(4);
    a.post();
    fail(&mut a, &mut b, false);
    a.write(28);
    let mut moved = true;
    while moved {
        moved = a.post() | deliver(&mut a, &mut b) | b.post() | deliver(&mut b, &mut a) | b.complete();
        b.read(u32::MAX);
    }
    assert_eq!(b.got, 16, "a lap, and no more");
    a.stream.old_link_gone();
    settle(&mut a, &mut b);
    assert_eq!(b.got, 32);
}

fn cdc(seq: u16) -> Cdc {
    Cdc { seq, token: 1, ..Cdc::default() }
}

#[test]
fn data_that_was_lost_behind_a_completion_ends_the_connection() {
    let mut s = Stream::new(Sizes { send: 16, peer: 16, own: 16 }, 1);
    s.handle_cdc(&cdc(5)).unwrap();
    let failover = |seq| Cdc { flags: Producer { failover: true, ..Producer::default() }, ..cdc(seq) };
    assert_eq!(s.handle_cdc(&failover(5)), Ok(Heard::default()));
    assert_eq!(s.handle_cdc(&failover(6)), Ok(Heard { reset: true, ..Heard::default() }));
    assert!(s.is_reset());
    let t = s.poll_transmit().unwrap();
    assert!(t.cdc.closing.abort && s.is_over());
}

#[test]
fn impossible_cursors() {
    let s = Stream::new(Sizes { send: 16, peer: 16, own: 16 }, 1);
    let said = |prod, cons| s.clone().handle_cdc(&Cdc { prod, cons, ..cdc(1) });
    let (zero, at) = (Cursor::default(), |wrap, count| Cursor { wrap, count });
    assert_eq!(said(at(0, 16), zero), Err(Misbehaved::Offset));
    assert_eq!(said(at(1, 1), zero), Err(Misbehaved::Cursor));
    assert_eq!(said(zero, at(0, 1)), Err(Misbehaved::Cursor));
    assert!(said(at(1, 0), zero).is_ok());
    let mut s = s.clone();
    s.handle_cdc(&Cdc { closing: Closing { done_writing: true, ..Closing::default() }, ..cdc(1) }).unwrap();
    assert_eq!(s.handle_cdc(&Cdc { prod: at(0, 1), ..cdc(2) }), Err(Misbehaved::DataAfterEnd));
}

#[test]
fn an_old_message_says_nothing() {
    let mut s = Stream::new(Sizes { send: 16, peer: 16, own: 16 }, 1);
    s.handle_cdc(&Cdc { prod: Cursor { wrap: 0, count: 4 }, ..cdc(1) }).unwrap();
    let old = Cdc { prod: Cursor { wrap: 0, count: 9 }, ..cdc(0) };
    assert_eq!(s.handle_cdc(&old), Ok(Heard::default()));
    assert_eq!(s.readable(), (0, 4));
}

#[test]
fn a_writer_that_fills_the_ring_says_so_and_is_told_of_room() {
    let sizes = Sizes { send: 1 << 16, peer: 1 << 14, own: 1 << 14 };
    let (mut a, mut b) = (End::new(sizes), End::new(sizes));
    a.write(1 << 15);
    assert!(a.post() && a.posted[0].cdc.flags.blocked);
    assert!(deliver(&mut a, &mut b) && !b.post());
    // A tenth of the ring is worth a message; less is not.
    b.read(100);
    assert!(!b.post());
    b.read(2000);
    assert!(b.post());
    assert!(deliver(&mut b, &mut a) && a.post());
    // A message of its own carries what the window update would have.
    let t = a.posted[0];
    assert_eq!(t.writes.iter().map(|w| w.len).sum::<u32>(), 2100);
    assert_eq!(t.cdc.prod, Cursor { wrap: 1, count: 2100 });
}

#[test]
fn close_with_unread_bytes_is_an_abort() {
    let sizes = Sizes { send: 16, peer: 16, own: 16 };
    let (mut a, mut b) = (End::new(sizes), End::new(sizes));
    a.write(5);
    a.post();
    deliver(&mut a, &mut b);
    b.stream.close();
    b.post();
    assert_eq!(b.posted[0].cdc.closing, Closing { abort: true, ..Closing::default() });
    deliver(&mut b, &mut a);
    assert!(a.stream.is_reset() && a.stream.writes_ended());
    a.stream.close();
    a.post();
    assert!(a.stream.is_over() && b.stream.is_over());
}

/// Without a link the stream goes on where the peer says, if that can be.
#[test]
fn a_peer_may_lack_what_is_still_here_and_no_more() {
    let mut s = Stream::new(Sizes { send: 4096, peer: 4096, own: 4096 }, 1);
    s.wrote(100);
    let first = s.poll_transmit().expect("bytes to send").cdc.seq;
    s.wrote(50);
    assert!(s.poll_transmit().is_some());
    assert_eq!([0, 60, 150, 151].map(|at| s.resume_at(at)), [Some(0), Some(60), Some(150), None]);
    assert!(s.completed(first));
    assert_eq!([0, 99, 100, 150].map(|at| s.resume_at(at)), [None, None, Some(100), Some(150)]);
}
