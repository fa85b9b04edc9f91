//! Both sides of the CLC handshake against each other, by every outcome that their drivers can bring about.

use super::rendezvous::*;
use crate::wire::smcr::clc::{
    self, Endpoint, FirstContact, Local, Malformed, Media, Message, OfferV1, OfferV2,
};
use crate::wire::smcr::clc::{Decline, PartV2, Proposal};
use crate::wire::smcr::{Diagnosis, Eid, Few, Gid, Mtu, PeerId, RmbeSize, Version};

fn eid() -> Eid {
    Eid::user("ONE").unwrap()
}

fn proposal(v2: bool) -> Proposal {
    let offer = OfferV2 {
        release: 1,
        max_conns: 255,
        max_links: 2,
        eids: Few::of(&[Eid::user("OTHER").unwrap(), eid()]).unwrap(),
        ..OfferV2::default()
    };
    Proposal {
        version: if v2 { Version::V2 } else { Version::V1 },
        local: Local { peer: PeerId([1; 8]), ..Local::default() },
        area: None,
        v1: (!v2).then(OfferV1::default),
        v2: v2.then_some(offer),
    }
}

fn endpoint(v2: bool, first_contact: bool) -> Endpoint {
    let first = FirstContact { os: 2, release: 1, max_conns: 16, max_links: 1, ..FirstContact::default() };
    Endpoint {
        first_contact,
        local: Local::default(),
        qpn: 5,
        rkey: 6,
        rmbe: 1,
        token: 7,
        size: RmbeSize::default(),
        mtu: Mtu::B1024,
        rmb: 8,
        psn: 9,
        v2: v2.then(|| PartV2 { eid: eid(), first: first_contact.then_some(first), gids: Few::new() }),
    }
}

/// Hands a message over as TCP would: some bytes at a time, never more than are wanted.
fn hand(to: &mut Rendezvous, m: &Message) -> Step {
    let bytes = clc::encode(m);
    let mut seen = 0;
    loop {
        let wants = to.wants();
        assert!(wants > seen && wants <= bytes.len(), "{seen} {wants} {}", bytes.len());
        seen = wants;
        if let Some(step) = to.handle_bytes(&bytes[..seen], 0) {
            assert_eq!(seen, bytes.len());
            return step;
        }
    }
}

fn sent(step: Step) -> Message {
    match step {
        Step::Send(m) => m,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_outcome() {
    for v2 in [false, true] {
        for first in [false, true] {
            for stage in 0..5 {
                one(v2, first, stage);
            }
        }
    }
}

/// A handshake in which the driver of one side fails at some stage; at 4, nobody's does.
fn one(v2: bool, first: bool, stage: u8) {
    let (mut c, step) = Rendezvous::propose(proposal(v2), 0);
    let mut s = Rendezvous::listen(PeerId([2; 8]), 0);
    assert_eq!(hand(&mut s, &sent(step)), Step::Choose(c_proposal(v2)));
    assert_eq!(s.wants(), 0);
    let e = endpoint(v2, first);
    let choice = if stage == 0 { Err(Diagnosis::NO_DEVICE) } else { Ok(e) };
    let accept = sent(s.chosen(choice, 0));
    let step = hand(&mut c, &accept);
    if stage == 0 {
        return declined_by(&s, &accept, Diagnosis::NO_DEVICE, &c, step);
    }
    assert_eq!(step, Step::Prepare(e));
    if stage == 1 {
        let steps = c.prepared(Err((Diagnosis::SYNC_ERROR, true)), 0);
        let m = sent(steps.into_iter().next().unwrap());
        let step = hand(&mut s, &m);
        assert_eq!(step, Step::Fallback(Diagnosis::PEER_DECLINED, true));
        assert!(c.is_over() && s.is_over());
        return;
    }
    let mut steps = c.prepared(Ok(Some(e)), 0).into_iter();
    let confirm = sent(steps.next().unwrap());
    assert_eq!(steps.next(), Some(if first { Step::Link } else { Step::Done }));
    assert_eq!(hand(&mut s, &confirm), Step::Prepare(e));
    let prepared = if stage == 2 { Err((Diagnosis::NO_MEMORY, false)) } else { Ok(None) };
    let steps = s.prepared(prepared, 0);
    if stage == 2 {
        // Too late for the client to take it as a message of the handshake: it sees it by peeking.
        assert_eq!(declined(&sent(steps[0].clone())), Some(Diagnosis::NO_MEMORY));
        assert!(s.is_over() && c.wants() == 0);
        return;
    }
    if !first {
        assert_eq!(steps, [Step::Done]);
        assert!(c.is_over() && s.is_over());
        return;
    }
    assert_eq!(steps, [Step::Link]);
    if stage == 3 {
        let m = sent(c.linked(Err(Diagnosis::TIMEOUT_CONFIRM_LINK)));
        assert_eq!(declined(&m), Some(Diagnosis::TIMEOUT_CONFIRM_LINK));
        return assert!(c.is_over());
    }
    assert_eq!(c.linked(Ok(())), Step::Done);
    assert_eq!(s.linked(Ok(())), Step::Done);
    assert!(c.is_over() && s.is_over() && c.deadline().is_none());
}

/// What comes out of the wire: version 2 always has the area.
fn c_proposal(v2: bool) -> Proposal {
    let p = proposal(v2);
    Proposal { area: v2.then(Default::default), ..p }
}

fn declined_by(from: &Rendezvous, m: &Message, why: Diagnosis, to: &Rendezvous, step: Step) {
    assert_eq!(declined(m), Some(why));
    assert_eq!(step, Step::Fallback(Diagnosis::PEER_DECLINED, false));
    assert!(from.is_over() && to.is_over());
}

#[test]
fn an_accept_that_was_not_offered_is_declined() {
    let first = FirstContact { release: 1, max_conns: 16, max_links: 1, ..FirstContact::default() };
    let v2 =
        |eid, first| Endpoint { v2: Some(PartV2 { eid, first, gids: Few::new() }), ..endpoint(true, true) };
    let cases = [
        (proposal(false), endpoint(true, true), Diagnosis::VERSION_MISMATCH),
        (proposal(true), endpoint(false, true), Diagnosis::VERSION_MISMATCH),
        (proposal(true), v2(Eid::user("THIRD").unwrap(), Some(first)), Diagnosis::NO_UEID),
        (proposal(true), v2(eid(), Some(FirstContact { release: 2, ..first })), Diagnosis::RELEASE),
        (proposal(true), v2(eid(), Some(FirstContact { max_links: 3, ..first })), Diagnosis::MAX_LINKS),
        (proposal(true), v2(eid(), Some(FirstContact { max_links: 0, ..first })), Diagnosis::MAX_LINKS),
        (proposal(true), v2(eid(), Some(FirstContact { max_conns: 15, ..first })), Diagnosis::MAX_CONNS),
    ];
    for (p, a, why) in cases {
        let (mut c, _) = Rendezvous::propose(p, 0);
        let step = hand(&mut c, &Message::Accept(a));
        assert_eq!(declined(&sent(step)), Some(why));
        assert!(c.is_over());
    }
    let only_d = Proposal { v1: Some(OfferV1 { media: Media::D, ..OfferV1::default() }), ..proposal(false) };
    let (mut c, _) = Rendezvous::propose(only_d, 0);
    let step = hand(&mut c, &Message::Accept(endpoint(false, true)));
    assert_eq!(declined(&sent(step)), Some(Diagnosis::VERSION_MISMATCH));
}

#[test]
fn messages_out_of_turn_and_other_bytes_break_it() {
    let decline =
        Decline { peer: PeerId::default(), diagnosis: Diagnosis::NO_DEVICE, out_of_sync: true, v2: None };
    for (m, client, server) in [
        (Message::Proposal(proposal(true)), false, true),
        (Message::Accept(endpoint(true, true)), true, false),
        (Message::Confirm(endpoint(true, true)), false, false),
        (Message::Decline(decline), true, true),
    ] {
        let (mut c, _) = Rendezvous::propose(proposal(true), 0);
        let mut s = Rendezvous::listen(PeerId::default(), 0);
        assert_eq!(hand(&mut c, &m) == Step::Broken(Malformed::Type), !client, "{m:?}");
        assert_eq!(hand(&mut s, &m) == Step::Broken(Malformed::Type), !server, "{m:?}");
    }
    let (mut c, _) = Rendezvous::propose(proposal(true), 0);
    assert_eq!(c.handle_bytes(b"HTTP/1.1", 0), Some(Step::Broken(Malformed::Eyecatcher)));
    // The answer to a Confirm that does not repeat the Accept.
    let mut s = Rendezvous::listen(PeerId::default(), 0);
    hand(&mut s, &Message::Proposal(proposal(true)));
    let _ = s.chosen(Ok(endpoint(true, true)), 0);
    let step = hand(&mut s, &Message::Confirm(endpoint(true, false)));
    assert_eq!(declined(&sent(step)), Some(Diagnosis::VERSION_MISMATCH));
}

/// A client may make its first call long after it has connected; the server has time to choose all the same.
#[test]
fn a_proposal_that_comes_late_has_its_time() {
    let mut s = Rendezvous::listen(PeerId([0; 8]), 0);
    let bytes = clc::encode(&Message::Proposal(proposal(true)));
    assert_eq!(s.handle_bytes(&bytes[..clc::HEADER_LEN], 60_000), None);
    assert!(matches!(s.handle_bytes(&bytes, 60_000), Some(Step::Choose(_))));
    assert_eq!((s.tick(60_000), s.deadline()), (None, Some(72_000)));
}

#[test]
fn silence_leads_back_to_tcp() {
    let (mut c, _) = Rendezvous::propose(proposal(true), 100);
    assert_eq!((c.tick(6_099), c.deadline()), (None, Some(6_100)));
    assert_eq!(declined(&sent(c.tick(6_100).unwrap())), Some(Diagnosis::PEER_NO_SMC));
    assert_eq!((c.tick(99_999), c.deadline()), (None, None));
}

#[test]
fn gids_and_eids() {
    let o = proposal(true).v2.unwrap();
    assert_eq!(common_eid(&o, &[eid()]), Some(eid()));
    assert_eq!(common_eid(&o, &[]), None);
    assert_eq!(o.gid, Gid::default());
}
