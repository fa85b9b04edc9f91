//! Both ends of a link group, with links that fail at any moment: they never disagree for good.

use std::collections::VecDeque;

use super::group::*;
use super::*;
use crate::wire::smcr::llc::{Body, DeleteReason, Llc, Malformed};
use crate::wire::smcr::{Gid, Mac, Mtu, Version};
use proptest::collection::vec;
use proptest::prelude::*;

/// A side and what its driver has.
struct Side {
    group: Group,
    number: u32,
    next: u32,
    /// Queue pairs: own number, the peer's once it is connected, whether they may send and receive.
    qps: [Option<Port>; LINKS],
    said_active: [bool; LINKS],
    /// Something may come late by a link that was lost.
    fenced: bool,
    deleted: Vec<usize>,
    confirmed: Vec<usize>,
    asked: usize,
    answered: usize,
    ready: bool,
    ended: Option<Ended>,
    can_make: bool,
}

fn port(side: u32, n: u32) -> Port {
    Port {
        mac: Mac([2, 0, 0, 0, side as u8, 1]),
        gid: Gid([side as u8; 16]),
        qpn: n,
        psn: n,
        mtu: Mtu::B1024,
    }
}

fn key(qpn: u32, buffer: usize) -> Key {
    Key { rkey: qpn << 8 | buffer as u32, addr: u64::from(qpn) << 32 | buffer as u64 }
}

struct World {
    sides: [Side; 2],
    /// On their way: side that sent, own queue pair, the peer's, bytes.
    wire: [VecDeque<(u32, u32, Vec<u8>)>; 2],
    /// Queue pairs whose failure a side has yet to see.
    failing: [Vec<u32>; 2],
    now: Ms,
}

impl World {
    fn new(version: Version, max_links: u8) -> Self {
        let ports = [port(0, 1000), port(1, 2000)];
        let side = |i: usize| {
            let (own, peer) = (ports[i], ports[1 - i]);
            let role = if i == 0 { Role::Server } else { Role::Client };
            let terms = Terms { role, version, max_links, max_conns: 255 };
            Side {
                group: Group::first_contact(terms, (own, peer), key(own.qpn, 0), key(peer.qpn, 0), 0),
                number: i as u32,
                next: own.qpn + 1,
                qps: [Some(own), None, None],
                said_active: [false; LINKS],
                fenced: false,
                deleted: Vec::new(),
                confirmed: vec![0],
                asked: 0,
                answered: 0,
                ready: false,
                ended: None,
                can_make: true,
            }
        };
        let sides = [side(0), side(1)];
        Self { sides, wire: Default::default(), failing: Default::default(), now: 0 }
    }

    /// What the driver does, until there is nothing left.
    fn act(&mut self, i: usize) {
        while let Some(action) = self.sides[i].group.poll_action() {
            let s = &mut self.sides[i];
            match action {
                Action::Send(slot, llc) => {
                    let (_, own, peer) =
                        s.group.ends(slot).map_or((0, s.qps[slot], None), |(n, o, p)| (n, Some(o), p));
                    if let (Some(own), Some(peer)) = (own, peer) {
                        self.wire[i].push_back((own.qpn, peer.qpn, llc.encode()));
                    }
                }
                Action::Make(slot, _) => {
                    let own = port(s.number, s.next);
                    s.next += 1;
                    let keys = (0..s.group.buffers()).map(|b| key(own.qpn, b)).collect();
                    let made = s.can_make.then_some(Made { own, target: Gid([1; 16]), keys });
                    if s.group.link_made(slot, made, self.now) {
                        s.qps[slot] = Some(own);
                    }
                }
                Action::Connect(slot, _) | Action::ReadyToSend(slot) => assert!(s.qps[slot].is_some()),
                Action::Active(slot) => {
                    assert!(!s.said_active[slot] && s.qps[slot].is_some());
                    s.said_active[slot] = true;
                }
                Action::Lost(slot, to) => {
                    assert!(s.qps[slot].is_some(), "lost what there was not");
                    assert!(to.is_none_or(|t| t != slot && s.said_active[t]));
                    s.qps[slot] = None;
                    s.fenced |= s.said_active[slot];
                    s.said_active[slot] = false;
                }
                Action::Confirmed(b, done) => {
                    s.answered += 1;
                    if done {
                        s.confirmed.push(b);
                    }
                }
                Action::Gone => s.fenced = false,
                Action::Asked(_) => s.group.add_link(self.now),
                Action::Deleted(b) => s.deleted.push(b),
                Action::Ready => {
                    assert!(!s.ready);
                    s.ready = true;
                }
                Action::Ended(why) => {
                    assert!(s.ended.is_none());
                    s.ended = Some(why);
                }
            }
        }
    }

    fn deliver(&mut self, from: usize) -> bool {
        let Some((_, to, bytes)) = self.wire[from].pop_front() else { return false };
        let s = &mut self.sides[1 - from];
        if let Some(slot) = s.qps.iter().position(|q| q.is_some_and(|q| q.qpn == to)) {
            s.group.handle_bytes(slot, &bytes, self.now);
        }
        self.act(1 - from);
        true
    }

    /// A link fails: what is on its way by it is lost, and both ends will see it.
    fn fail(&mut self, i: usize, slot: usize) {
        let Some((_, own, peer)) = self.sides[i].group.ends(slot) else { return };
        let peer = peer.map_or(0, |p| p.qpn);
        for wire in &mut self.wire {
            wire.retain(|(a, b, _)| {
                *a != own.qpn && *b != own.qpn && (peer == 0 || *a != peer && *b != peer)
            });
        }
        self.failing[i].push(own.qpn);
        self.failing[1 - i].push(peer);
    }

    fn see_failure(&mut self, i: usize) -> bool {
        let Some(qpn) = self.failing[i].pop() else { return false };
        let s = &mut self.sides[i];
        if let Some(slot) = s.qps.iter().position(|q| q.is_some_and(|q| q.qpn == qpn)) {
            s.group.link_failed(slot, self.now);
        }
        self.act(i);
        true
    }

    fn tick(&mut self, by: Ms) {
        self.now += by;
        for i in 0..2 {
            self.sides[i].group.tick(self.now);
            self.act(i);
        }
    }

    fn add_buffer(&mut self, i: usize) {
        let s = &mut self.sides[i];
        let b = s.group.buffers();
        let mut keys = [None; LINKS];
        for (k, q) in keys.iter_mut().zip(&s.qps) {
            *k = q.map(|q| key(q.qpn, b));
        }
        if s.group.add_buffer(keys, self.now).is_some() {
            s.asked += 1;
        }
        self.act(i);
    }

    /// All messages and failures, and all deadlines but keepalives.
    fn settle(&mut self) {
        for _ in 0..40 {
            while (0..2).any(|i| self.deliver(i) || self.see_failure(i)) {}
            self.tick(1000);
        }
    }

    /// The links that a side believes active, as pairs of queue pairs, its own first or second.
    fn links(&self, i: usize) -> Vec<(u32, u32)> {
        let g = &self.sides[i].group;
        let mut all: Vec<_> = g
            .active()
            .filter_map(|s| g.ends(s))
            .map(|(_, own, peer)| (own.qpn, peer.map_or(0, |p| p.qpn)))
            .map(|(own, peer)| if i == 0 { (own, peer) } else { (peer, own) })
            .collect();
        all.sort_unstable();
        all
    }
}

fn start(version: Version, max_links: u8) -> World {
    let mut w = World::new(version, max_links);
    w.act(0);
    w.act(1);
    w
}

fn run(w: &mut World) {
    while w.deliver(0) || w.deliver(1) {}
}

fn versions() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V1), Just(Version::V2)]
}

/// Whatever happens, from the start or from when all links are there, in the end both ends believe in the same links
/// and keys.
fn agree(version: Version, links: u8, whole: bool, acts: &[(usize, u8, usize)]) {
    let mut w = start(version, links);
    if whole {
        run(&mut w);
    }
    for (i, act, slot) in acts.iter().copied() {
        match act {
            0..=4 => drop(w.deliver(i)),
            5 => drop(w.see_failure(i)),
            6 => w.fail(i, slot),
            7 => w.add_buffer(i),
            8 if i == 0 => w.sides[0].group.add_link(w.now),
            8 => w.sides[1].group.ask_link(&[]),
            9 => w.sides[i].can_make = slot > 0,
            10 => w.tick(500 * slot as Ms),
            _ => w.sides[i].group.delete_link(slot, DeleteReason::OPERATOR, w.now),
        }
        w.act(0);
        w.act(1);
    }
    w.settle();
    let ended = [w.sides[0].ended, w.sides[1].ended];
    if ended == [None, None] {
        assert_eq!(w.links(0), w.links(1));
        assert!(!w.links(0).is_empty() && w.sides[0].ready && w.sides[1].ready);
        for i in 0..2 {
            assert!(!w.sides[i].fenced);
            // Nobody waits for an answer any more, and whoever may write knows how, on every link.
            assert_eq!(w.sides[i].asked, w.sides[i].answered);
            let (own, peer) = (&w.sides[i], &w.sides[1 - i].group);
            for slot in peer.active() {
                let (_, _, far) = peer.ends(slot).unwrap();
                let qpn = far.unwrap().qpn;
                for b in &own.confirmed {
                    let known = (0..RMBS).filter_map(|x| peer.peer_key(x, slot));
                    assert_eq!(known.filter(|k| *k == key(qpn, *b)).count(), 1, "buffer {} on {}", b, qpn);
                }
            }
        }
    } else {
        // It ended for want of links or answers, never because an end took the other for a liar.
        let all = ended.iter().flatten();
        assert!(all.clone().all(|e| matches!(e, Ended::NoLink | Ended::Timeout)), "{:?}", ended);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn both_ends_agree_in_the_end(version in versions(), links in 1..4u8, whole in any::<bool>(),
                                  acts in vec((0..2usize, 0..12u8, 0..LINKS), 0..120)) {
        agree(version, links, whole, &acts);
    }

    /// Anything may come: no panic, and links that are not there are not used.
    #[test]
    fn whatever_comes(version in versions(), seed in vec((0..LINKS, any::<(u8, u8, u8)>(), vec(any::<u8>(), 40)), 0..40),
                      server in any::<bool>()) {
        let mut w = start(version, 3);
        run(&mut w);
        let i = usize::from(!server);
        for (slot, (kind, flags, link), mut body) in seed {
            body[0] = link % 3;
            body[28 - 1] = link % 3;
            let mut bytes = match version {
                Version::V1 => vec![kind % 10, 44, 0, flags],
                Version::V2 => vec![0x20 | (kind % 10), 44, 0, flags],
            };
            bytes.extend(body);
            w.sides[i].group.handle_bytes(slot, &bytes, w.now);
            w.act(i);
            w.tick(100);
        }
    }
}

#[test]
fn first_contact_with_a_second_link() {
    for version in [Version::V1, Version::V2] {
        let mut w = start(version, 2);
        run(&mut w);
        assert_eq!(w.links(0), [(1000, 2000), (1001, 2001)], "{version:?}");
        assert_eq!(w.links(1), w.links(0));
        assert!(w.sides.iter().all(|s| s.ready && s.ended.is_none()));
        // The keys of the first buffers are known there as well.
        for i in 0..2 {
            let g = &w.sides[i].group;
            assert!(g.active().all(|s| g.peer_key(0, s).is_some()));
        }
    }
}

#[test]
fn a_client_without_a_second_device_rejects_at_once() {
    let mut w = start(Version::V2, 2);
    w.sides[1].can_make = false;
    run(&mut w);
    assert_eq!(w.links(0), [(1000, 2000)]);
    assert_eq!(w.links(1), w.links(0));
    assert!(w.sides.iter().all(|s| s.ready) && w.now == 0);
    // And a server that has none says so, for the client waits for it.
    let mut w = start(Version::V1, 2);
    w.sides[0].can_make = false;
    run(&mut w);
    assert!(w.sides.iter().all(|s| s.ready) && w.now == 0);
}

#[test]
fn many_buffers_get_their_keys_on_a_new_link() {
    for version in [Version::V1, Version::V2] {
        let mut w = start(version, 2);
        w.sides[0].can_make = false;
        run(&mut w);
        for _ in 0..5 {
            w.add_buffer(0);
        }
        for _ in 0..2 {
            w.add_buffer(1);
        }
        run(&mut w);
        w.sides[0].can_make = true;
        w.sides[0].group.add_link(0);
        w.act(0);
        run(&mut w);
        assert_eq!(w.links(1).len(), 2);
        let g = &w.sides[1].group;
        for b in 0..6 {
            assert!(g.active().all(|s| g.peer_key(b, s).is_some()), "{version:?} {b}");
        }
    }
}

#[test]
fn failover_names_the_other_link_and_a_new_one_can_be_added() {
    let mut w = start(Version::V2, 2);
    run(&mut w);
    w.fail(1, 0);
    w.settle();
    assert_eq!(w.links(0), [(1001, 2001)]);
    assert_eq!(w.links(1), w.links(0));
    w.sides[0].group.add_link(w.now);
    w.act(0);
    run(&mut w);
    assert_eq!(w.links(0), [(1001, 2001), (1002, 2002)]);
    assert_eq!(w.links(1), w.links(0));
}

/// The end that has lost a link hears when the other's is gone, by whichever link is left.
#[test]
fn a_lost_link_is_known_to_be_gone_at_both_ends() {
    for (i, version) in [(0, Version::V1), (1, Version::V1), (0, Version::V2), (1, Version::V2)] {
        let mut w = start(version, 2);
        run(&mut w);
        // The other end has not noticed.
        w.sides[i].group.link_failed(0, w.now);
        w.act(i);
        assert!(w.sides[i].fenced);
        run(&mut w);
        assert!(w.sides.iter().all(|s| !s.fenced && s.group.active().eq([1])), "{version:?} {i}");
        // One that never answers is taken to be gone when no packet can be on its way any more.
        let mut w = start(version, 2);
        run(&mut w);
        w.sides[i].group.link_failed(0, w.now);
        w.act(i);
        w.wire = Default::default();
        w.tick(1_999);
        assert!(w.sides[i].fenced);
        w.tick(1);
        assert!(!w.sides[i].fenced);
    }
}

/// What goes down with a link is said by the other: that it is lost, and that a key is no good.
#[test]
fn what_goes_down_with_a_link_is_said_again() {
    let mut w = start(Version::V2, 3);
    run(&mut w);
    w.sides[0].group.add_link(w.now);
    w.act(0);
    run(&mut w);
    assert_eq!(w.links(0).len(), 3);
    w.add_buffer(1);
    run(&mut w);
    w.sides[1].group.delete_buffer(1);
    w.sides[1].group.link_failed(0, w.now);
    w.sides[1].group.link_failed(1, w.now);
    w.act(1);
    // All but the last link's messages.
    w.wire[1].retain(|(own, ..)| *own == 2002);
    run(&mut w);
    assert_eq!(w.links(0), [(1002, 2002)]);
    assert_eq!(w.sides[0].deleted, [1]);
    assert!(w.sides.iter().all(|s| !s.fenced && s.ended.is_none()));
}

/// A key on its way would miss the link that is offered meanwhile: the offer waits.
#[test]
fn an_offer_waits_for_a_key_that_is_being_told() {
    let mut w = start(Version::V2, 2);
    w.sides[1].can_make = false;
    run(&mut w);
    w.sides[1].can_make = true;
    w.add_buffer(1);
    w.sides[0].group.add_link(w.now);
    w.act(0);
    assert!(w.deliver(0), "the offer comes before the answer");
    run(&mut w);
    assert_eq!(w.links(0).len(), 2);
    assert!(w.sides[0].group.active().all(|s| w.sides[0].group.peer_key(1, s).is_some()));
}

#[test]
fn a_client_asks_for_a_link() {
    for version in [Version::V1, Version::V2] {
        let mut w = start(version, 2);
        w.sides[1].can_make = false;
        run(&mut w);
        assert!(w.sides[1].group.lacks_link());
        w.sides[1].can_make = true;
        w.sides[1].group.ask_link(&[Gid([7; 16])]);
        w.act(1);
        run(&mut w);
        assert_eq!(w.links(0).len(), 2, "{version:?}");
        assert!(!w.sides[1].group.lacks_link());
    }
}

/// A Confirm may name a buffer by its key on a link that is lost meanwhile; but not for longer than the buffer is there.
#[test]
fn a_buffer_is_known_by_its_key_on_a_link_that_was_lost() {
    let mut w = start(Version::V2, 2);
    run(&mut w);
    w.add_buffer(1);
    run(&mut w);
    let has = |w: &World, qpn| w.sides[0].group.peer_has(key(qpn, 1));
    assert_eq!([has(&w, 2000), has(&w, 2001), has(&w, 2002)], [Some(1), Some(1), None]);
    w.fail(1, 0);
    w.settle();
    assert_eq!([has(&w, 2000), has(&w, 2001)], [Some(1), Some(1)]);
    w.sides[1].group.delete_buffer(1);
    w.act(1);
    run(&mut w);
    assert_eq!([has(&w, 2000), has(&w, 2001)], [None, None]);
}

#[test]
fn silence_is_noticed() {
    let mut w = start(Version::V1, 1);
    run(&mut w);
    w.tick(30_000);
    // Both ask; both answer.
    assert!(w.wire.iter().all(|q| q.len() == 1));
    run(&mut w);
    w.tick(2_000);
    assert!(w.sides.iter().all(|s| s.ended.is_none()));
    w.tick(30_000);
    w.wire = Default::default();
    w.tick(2_000);
    assert!(w.sides.iter().all(|s| s.ended == Some(Ended::NoLink)));
}

#[test]
fn confirm_link_that_does_not_come_ends_it() {
    let mut w = start(Version::V2, 2);
    w.wire = Default::default();
    w.tick(1_999);
    assert_eq!([w.sides[0].ended, w.sides[1].ended], [None, None]);
    w.tick(1);
    assert_eq!([w.sides[0].ended, w.sides[1].ended], [Some(Ended::Timeout), None]);
    w.tick(2_000);
    assert_eq!(w.sides[1].ended, Some(Ended::Timeout));
}

#[test]
fn termination_is_told_and_lies_end_it() {
    let mut w = start(Version::V2, 2);
    run(&mut w);
    w.sides[0].group.terminate(DeleteReason::PROGRAM);
    w.act(0);
    run(&mut w);
    assert_eq!(w.sides[0].ended, Some(Ended::Here));
    assert_eq!(w.sides[1].ended, Some(Ended::Peer(DeleteReason::PROGRAM)));

    let mut w = start(Version::V2, 2);
    run(&mut w);
    w.sides[1].group.handle_bytes(0, &[0x2f; 44], 0);
    w.act(1);
    assert_eq!(w.sides[1].ended, Some(Ended::Misbehaved(Misbehaved::Llc(Malformed::Type))));
    run(&mut w);
    assert_eq!(w.sides[0].ended, Some(Ended::Peer(DeleteReason::VIOLATION)));
}

#[test]
fn a_link_confirmed_by_somebody_else_is_not_taken() {
    let mut w = start(Version::V2, 2);
    let (_, _, bytes) = w.wire[0].pop_front().unwrap();
    let mut llc = Llc::decode(&bytes).unwrap();
    if let Body::ConfirmLink(c) = &mut llc.body {
        c.qpn += 1;
    }
    w.sides[1].group.handle_bytes(0, &llc.encode(), 0);
    w.act(1);
    assert_eq!(w.sides[1].ended, Some(Ended::Misbehaved(Misbehaved::OtherLink)));
}

#[test]
fn a_buffer_is_confirmed_though_the_link_fails_while_another_is_deleted() {
    agree(Version::V2, 3, true, &[(0, 6, 0), (0, 11, 1), (0, 0, 0), (0, 7, 0), (0, 0, 0)]);
}

#[test]
fn a_link_is_deleted_by_the_answer_about_it_and_no_other() {
    let mut w = start(Version::V2, 3);
    run(&mut w);
    w.sides[0].group.add_link(w.now);
    w.act(0);
    run(&mut w);
    w.sides[0].group.link_failed(2, w.now);
    w.sides[0].group.delete_link(1, DeleteReason::OPERATOR, w.now);
    w.act(0);
    assert!(w.deliver(0) && w.deliver(1));
    assert_eq!([w.links(0).len(), w.links(1).len()], [2, 2], "the peer was told of the failure only");
    run(&mut w);
    assert_eq!(w.links(0), [(1000, 2000)]);
    assert_eq!(w.links(1), w.links(0));
}

#[test]
fn an_answer_about_a_buffer_that_is_gone_is_not_to_the_next_in_its_place() {
    let mut w = start(Version::V2, 1);
    run(&mut w);
    w.add_buffer(1);
    w.sides[1].group.delete_buffer(1);
    w.add_buffer(1);
    assert!(w.deliver(1) && w.deliver(0));
    assert!(!w.sides[1].confirmed.contains(&1), "the peer has heard of the first only");
    run(&mut w);
    assert!(w.sides[1].confirmed.contains(&1));
}
