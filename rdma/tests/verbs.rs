//! Two queue pairs over two devices: bytes written by one are where the other looks for them.
#![allow(clippy::unwrap_used)]

mod world;

use std::sync::Arc;

use smc_rdma::completion::{Completion, CompletionQueue};
use smc_rdma::device::{self, Domain, Event};
use smc_rdma::memory::{Access, Region};
use smc_rdma::queue_pair::{Depth, Piece, QueuePair, Remote};
use world::{End, ends, fill, is_filled};

struct Side {
    domain: Arc<Domain>,
    queue: Arc<CompletionQueue>,
    qp: QueuePair,
    /// Of its own, which only it writes; and one that the peer writes.
    own: Arc<Region>,
    rmb: Arc<Region>,
}

const LEN: usize = 1 << 20;
const DEPTH: Depth = Depth { send: 32, recv: 8 };

fn side(end: &End) -> Side {
    let domain = Domain::new(&end.device).unwrap();
    let queue = CompletionQueue::new(&end.device, 64).unwrap();
    let qp = QueuePair::new(&domain, &queue, (1, end.gid.index), DEPTH, 44).unwrap();
    let own = Region::new(&domain, LEN, Access::Local).unwrap();
    let rmb = Region::new(&domain, LEN, Access::PeerWrites).unwrap();
    qp.attach(&own).unwrap();
    qp.attach(&rmb).unwrap();
    Side { domain, queue, qp, own, rmb }
}

fn pair() -> ([End; 2], Side, Side) {
    let ends = ends();
    let (a, b) = (side(&ends[0]), side(&ends[1]));
    for (me, other, end) in [(&a, &b, &ends[1]), (&b, &a, &ends[0])] {
        let mtu = ends[0].device.mtu(1).unwrap().unwrap().min(ends[1].device.mtu(1).unwrap().unwrap());
        let psn = other.qp.number();
        me.qp
            .ready_to_receive(&Remote { qpn: other.qp.number(), gid: end.gid.gid, psn, mtu, hop_limit: 1 })
            .unwrap();
        me.qp.ready_to_send(me.qp.number()).unwrap();
    }
    (ends, a, b)
}

/// The next completion, slept for on the channel.
fn next(queue: &CompletionQueue) -> Completion {
    let mut out = Vec::new();
    loop {
        queue.arm(false).unwrap();
        let mut one = Vec::new();
        // As the queue may hold more than one, what is left is found by the next call.
        if queue.poll(&mut one).unwrap() > 0 {
            out.extend(one);
            assert_eq!(out.len(), 1, "more than was awaited: {out:?}");
            return out[0];
        }
        let mut fd = libc::pollfd { fd: queue.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, and its place.
        assert_eq!(unsafe { libc::poll(&mut fd, 1, 60_000) }, 1, "nothing has completed");
        while queue.woken().unwrap() {}
    }
}

fn piece(region: &Arc<Region>, offset: usize, len: u32) -> Piece<'_> {
    Piece { region, offset, len }
}

#[test]
#[ignore = "needs RDMA devices"]
fn bytes_written_are_there_when_the_send_behind_them_is() {
    let (_ends, a, b) = pair();
    const CHUNK: usize = 64 << 10;
    let mut bytes = vec![0; CHUNK];
    for round in 0..64u64 {
        let offset = round as usize % (LEN / CHUNK) * CHUNK;
        fill(round * CHUNK as u64, &mut bytes);
        assert!(a.own.put(offset, &bytes));
        b.qp.post_receive(round, &piece(&b.own, 0, 64)).unwrap();
        let to = (b.rmb.rkey(), b.rmb.address() + offset as u64);
        a.qp.post_write(1, &piece(&a.own, offset, CHUNK as u32), to).unwrap();
        a.qp.post_send(2, &piece(&a.own, offset, 44)).unwrap();
        let got = next(&b.queue);
        assert_eq!((got.id, got.received, got.len, got.error), (round, true, 44, None));
        let mut there = vec![0; CHUNK];
        assert!(b.rmb.get(offset, &mut there) && there == bytes, "round {round}");
        let sent = next(&a.queue);
        assert_eq!((sent.id, sent.received, sent.error), (2, false, None));
        let mut said = [0; 44];
        assert!(b.own.get(0, &mut said) && is_filled(round * CHUNK as u64, &said));
    }
}

#[test]
#[ignore = "needs RDMA devices"]
fn a_receiver_that_is_late_has_not_failed() {
    let (_ends, a, b) = pair();
    assert!(a.own.put(0, b"patience"));
    a.qp.post_send(1, &piece(&a.own, 0, 8)).unwrap();
    // RNR: the sender tries again until there is a receive.
    let mut early = Vec::new();
    a.queue.poll(&mut early).unwrap();
    assert_eq!(early, []);
    b.qp.post_receive(7, &piece(&b.own, 0, 64)).unwrap();
    assert_eq!(next(&b.queue).len, 8);
    assert_eq!(next(&a.queue).error, None);
}

#[test]
#[ignore = "needs RDMA devices"]
fn what_the_peer_may_not_write_it_does_not() {
    let (ends, a, b) = pair();
    let secret = [0x5a; 64];
    assert!(b.own.put(0, &secret) && a.own.put(0, &[1; 64]));
    // Not open to peers; the right key of the wrong region would not do either.
    a.qp.post_write(1, &piece(&a.own, 0, 64), (b.rmb.rkey(), b.own.address())).unwrap();
    let failed = next(&a.queue);
    assert_eq!((failed.id, failed.error.is_some()), (1, true));
    let mut there = [0; 64];
    assert!(b.own.get(0, &mut there) && there == secret);
    // The victim's device tells of it, and the queue pair is no use any more.
    let event = ends[1].device.event().unwrap();
    assert!(matches!(event, None | Some(Event::QueuePair(_))), "{event:?}");
    a.qp.fail().unwrap();
}

#[test]
#[ignore = "needs RDMA devices"]
fn failing_flushes_what_is_posted() {
    let (_ends, a, b) = pair();
    for i in 0..4 {
        a.qp.post_receive(i, &piece(&a.own, 0, 64)).unwrap();
    }
    a.qp.fail().unwrap();
    let mut all = Vec::new();
    while all.len() < 4 {
        a.queue.poll(&mut all).unwrap();
    }
    assert!(all.iter().all(|c| c.error.is_some()));
    // A peer that sends all the same learns it by its retries; to post to a dead queue pair is no crash.
    let _ = b.qp.post_send(1, &piece(&b.own, 0, 8));
}

#[test]
#[ignore = "needs RDMA devices"]
fn pieces_are_checked_before_the_device_sees_them() {
    let (_ends, a, b) = pair();
    let other = Region::new(&a.domain, 4096, Access::Local).unwrap();
    for bad in
        [piece(&other, 0, 8), piece(&a.own, LEN - 4, 8), piece(&a.own, usize::MAX, 8), piece(&b.own, 0, 8)]
    {
        assert!(a.qp.post_send(1, &bad).is_err());
        assert!(a.qp.post_receive(1, &bad).is_err());
    }
    assert!(a.qp.attach(&b.own).is_err());
    assert!(!a.own.put(LEN, &[0]) && !a.own.get(LEN - 1, &mut [0; 2]));
}

#[test]
#[ignore = "needs RDMA devices"]
fn destroying_goes_in_any_order() {
    let (ends, a, b) = pair();
    let Side { domain, queue, qp, own, rmb } = a;
    drop(ends);
    drop((domain, own, queue, rmb));
    assert!(qp.number() > 0);
    drop(qp);
    drop(b);
}

#[test]
#[ignore = "needs RDMA devices"]
fn devices_are_found_by_name() {
    let ends = ends();
    let names = device::names().unwrap();
    assert!(ends.iter().all(|e| names.iter().any(|n| n == e.device.name())));
    assert!(device::Device::open("no-such-device").is_err());
    assert_ne!(ends[0].gid.mac, ends[1].gid.mac);
}
