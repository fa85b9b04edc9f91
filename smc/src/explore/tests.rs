//! The bounds within which all is looked at, and each rule dropped in turn.

use super::world::{End, World, mode};
use super::{DROPPED, explore};
use crate::rules::Rule;
use std::io::Write as _;

/// An end may send so many bytes, and leave, stop, stop and keep so often.
fn may(w: &mut World, e: usize, may: [u8; 4]) {
    w.end[e].may = may;
}

/// Two ends, each of one thread, that begin on TCP.
fn two(a: [u8; 4], b: [u8; 4]) -> World {
    let mut w = World::new(&[0, 1]);
    may(&mut w, 0, a);
    may(&mut w, 1, b);
    w
}

/// As [`two`], with both directions in the ring.
fn two_in_ring(a: [u8; 4], b: [u8; 4]) -> World {
    in_ring(two(a, b))
}

/// A byte has gone by TCP each way, and both directions are in the ring.
fn in_ring(mut w: World) -> World {
    for e in &mut w.end {
        let slot = super::world::Slot {
            tx: mode::RING,
            rx: mode::RING,
            sent: 1,
            switch_at: 1,
            taken: 1,
            ..Default::default()
        };
        *e = End { slot, page: [0, 2, 0, 0, 1, 0], made: 1, acked: 1, got: 1, ..*e };
    }
    w
}

/// End 0 has two holders, of whom each does what it likes.
fn three_in_ring(a: [u8; 4], b: [u8; 4]) -> World {
    let mut w = World::new(&[0, 0, 1]);
    may(&mut w, 0, a);
    may(&mut w, 1, b);
    one_way(in_ring(w))
}

/// As [`three_in_ring`], of a stream that does not end: what the holders do with each other is all in it.
fn endless(a: [u8; 4], b: [u8; 4]) -> World {
    let mut w = three_in_ring(a, b);
    w.endless = true;
    w
}

/// Ends may close, and shut their direction, before they have read and sent all.
fn early(mut w: World) -> World {
    w.early = true;
    w
}

/// Only one direction is used, if only one end sends: who does not send does not shut its own, nor read the other.
fn one_way(mut w: World) -> World {
    let sends = w.end.map(|e| e.may[0] > 0);
    for (e, s) in w.end.iter_mut().zip(sends) {
        e.tx_over = !s;
        e.rx_over = s;
    }
    w
}

fn deaths(mut w: World, n: u8) -> World {
    w.deaths = n;
    w
}

fn tell(name: &str, states: usize, t: std::time::Instant) {
    // Not by `print`, which the test harness keeps for itself.
    let _ =
        writeln!(std::io::stderr(), "explore {name}: {states} states, {:.1} s", t.elapsed().as_secs_f64());
}

#[track_caller]
fn holds(name: &str, w: World) {
    let t = std::time::Instant::now();
    let f = explore(w);
    tell(name, f.states, t);
    if let Some(b) = f.broken {
        panic!("{name}, after {} states: {b}", f.states);
    }
}

/// Whether something breaks without the rule.
#[track_caller]
fn missed(rule: Rule, w: World) {
    let t = std::time::Instant::now();
    DROPPED.set(Some(rule));
    let f = explore(w);
    DROPPED.set(None);
    tell(&format!("without {rule:?}"), f.states, t);
    assert!(f.broken.is_some(), "{rule:?} is not missed in {} states", f.states);
}

#[test]
fn explore_one_way() {
    holds("one way, left and stopped", two([3, 1, 0, 0], [0, 0, 0, 1]));
    let mut w = two([3, 0, 0, 0], [0, 0, 1, 0]);
    w.early = true;
    holds("one way, closed early", w);
    let mut w = two([2, 1, 0, 0], [0, 0, 0, 1]);
    w.cap = 1;
    holds("one way, TCP full", w);
}

#[test]
fn explore_both_ways() {
    holds("both ways", two([2, 0, 0, 0], [2, 0, 0, 0]));
    holds("both ways, left and stopped", two_in_ring([1, 1, 0, 0], [1, 0, 0, 0]));
    holds("both ways, stopped twice", two_in_ring([0, 0, 0, 1], [1, 0, 0, 1]));
}

#[test]
fn explore_death() {
    holds("killed", deaths(two([2, 0, 0, 0], [0, 0, 0, 1]), 1));
    holds("killed, both ways", deaths(two_in_ring([1, 0, 0, 0], [1, 0, 0, 0]), 1));
}

#[test]
fn explore_holders() {
    holds("a sender's holder killed", deaths(endless([2, 0, 0, 0], [0; 4]), 1));
    holds("a leaver's holder killed", deaths(endless([1, 1, 0, 0], [0; 4]), 1));
}

#[test]
fn explore_holders_that_read() {
    holds("a reader's holder killed", deaths(endless([0; 4], [2, 0, 0, 0]), 1));
    holds("a stopper's holder killed", deaths(endless([0, 0, 0, 1], [1, 0, 0, 0]), 1));
}

#[test]
fn explore_holders_to_the_end() {
    holds("holders send, shut and close", three_in_ring([1, 0, 0, 0], [0; 4]));
    holds("holders send and leave", three_in_ring([1, 1, 0, 0], [0; 4]));
    holds("holders send, any closes early", early(three_in_ring([1, 0, 0, 0], [0; 4])));
}

#[test]
fn explore_holders_that_read_to_the_end() {
    holds("holders read and close", three_in_ring([0; 4], [1, 0, 0, 0]));
    holds("holders read, any closes early", early(three_in_ring([0; 4], [1, 0, 0, 0])));
}

#[test]
#[ignore = "minutes"]
fn explore_holders_killed_at_the_end() {
    holds("a holder killed at the end of what they send", deaths(three_in_ring([1, 0, 0, 0], [0; 4]), 1));
    holds(
        "a holder killed at the end of what they read",
        early(deaths(three_in_ring([0; 4], [1, 0, 0, 0]), 1)),
    );
    holds("a holder and the peer killed", deaths(endless([0; 4], [0; 4]), 2));
}

#[test]
fn explore_without_each_rule() {
    missed(Rule::AnnounceFirst, two([2, 0, 0, 0], [0; 4]));
    missed(Rule::PeekFirst, two([3, 1, 0, 0], [0; 4]));
    missed(Rule::TakeToN, two([3, 1, 0, 0], [0; 4]));
    missed(Rule::TakeToStop, one_way(two_in_ring([2, 0, 0, 0], [0, 0, 0, 1])));
    missed(Rule::AskFirst, two_in_ring([2, 0, 0, 0], [0, 0, 0, 1]));
    missed(Rule::OneWord, two_in_ring([2, 1, 0, 0], [0, 0, 0, 1]));
    missed(Rule::HeedAfterPublish, two_in_ring([2, 0, 0, 0], [0, 0, 0, 1]));
    missed(Rule::MoveBeyondStop, two_in_ring([2, 0, 0, 0], [0, 0, 0, 1]));
    missed(Rule::SayLeft, two_in_ring([2, 1, 0, 0], [0; 4]));
    missed(Rule::Recheck, two_in_ring([1, 0, 0, 0], [0; 4]));
    missed(Rule::DisarmAlone, endless([0; 4], [2, 0, 0, 0]));
    missed(Rule::StopRings, two_in_ring([3, 0, 0, 0], [0, 0, 1, 0]));
}

#[test]
fn explore_without_what_the_killed_leave() {
    missed(Rule::EndOfTheDead, deaths(two([2, 0, 0, 0], [0, 0, 0, 1]), 1));
    missed(Rule::BytesBeforeReset, deaths(two_in_ring([1, 0, 0, 0], [1, 0, 0, 1]), 1));
    missed(Rule::NoteRing, deaths(endless([2, 0, 0, 0], [0; 4]), 1));
}

#[test]
fn explore_without_what_killed_holders_leave() {
    missed(Rule::NoteStop, deaths(endless([0, 0, 0, 1], [1, 0, 0, 0]), 1));
    missed(Rule::Republish, deaths(endless([0; 4], [3, 0, 0, 0]), 1));
    missed(Rule::FinishLeave, deaths(endless([1, 1, 0, 0], [0; 4]), 1));
    missed(Rule::NoteLeave, deaths(endless([1, 1, 0, 0], [0; 4]), 1));
    missed(Rule::PayRings, deaths(endless([1, 1, 0, 0], [0; 4]), 1));
    missed(Rule::TakenFirst, deaths(three_in_ring([1, 0, 0, 0], [0; 4]), 1));
    missed(Rule::FinishGone, deaths(endless([0; 4], [0; 4]), 2));
    missed(Rule::LastLeaves, early(three_in_ring([0; 4], [1, 0, 0, 0])));
    missed(Rule::ShutWakes, three_in_ring([3, 0, 0, 0], [0; 4]));
}
