//! Tests of the rendezvous with a peer that misbehaves: the test plays the other end by hand.

#![allow(unsafe_code)]

use super::*;
use crate::mem::rmb::MIN_RING;
use std::{
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
};

const CONFIG: RendezvousConfig = RendezvousConfig { ring_size: 1 << 16, mem_limit: u64::MAX, fd_base: 200 };

fn tcp() -> (TcpStream, TcpStream) {
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let c = TcpStream::connect(l.local_addr().unwrap()).unwrap();
    (c, l.accept().unwrap().0)
}

fn rendezvous(side: Side, s: &TcpStream) -> Rendezvous {
    Rendezvous::new(side, s.as_raw_fd(), CONFIG).unwrap()
}

fn reason(step: Step) -> Option<Reason> {
    match step {
        Step::Failed(reason) => Some(reason),
        Step::Pending | Step::Done(_) => None,
    }
}

/// The end that the test plays.
struct Puppet {
    tcp: TcpStream,
    side: Side,
    fd: Fd,
    fds: Vec<Fd>,
}

impl Puppet {
    /// Plays the connecting end against a real accepting one.
    fn connecting() -> (Puppet, Rendezvous, TcpStream) {
        let (c, a) = tcp();
        let name = unix::Name::of(c.local_addr().unwrap(), c.peer_addr().unwrap());
        let listener = unix::listen(&name, 200).unwrap();
        let mut real = rendezvous(Side::Accept, &a);
        assert!(matches!(real.step(), Step::Pending));
        let fd = unix::accept(&listener, 200).unwrap();
        (Puppet { tcp: c, side: Side::Connect, fd, fds: Vec::new() }, real, a)
    }

    /// Plays the accepting end against a real connecting one.
    fn accepting() -> (Puppet, Rendezvous, TcpStream) {
        let (c, a) = tcp();
        let mut real = rendezvous(Side::Connect, &c);
        let fd = unix::connector(200).unwrap();
        unix::connect(&fd, &unix::Name::of(c.local_addr().unwrap(), c.peer_addr().unwrap())).unwrap();
        assert!(matches!(real.step(), Step::Pending));
        (Puppet { tcp: a, side: Side::Accept, fd, fds: Vec::new() }, real, c)
    }

    fn sender(&self) -> Sender {
        Sender {
            layout_version: LAYOUT_VERSION,
            role: self.side,
            // An instance of its own: in this process a puppet's groups must not be the real ones'.
            instance: self.fd.raw() as u64 + 1_000_000,
            pid: 1,
            cookie: unix::cookie(self.tcp.as_raw_fd()).unwrap(),
        }
    }

    fn proposal(&self) -> Proposal {
        Proposal { sender: self.sender(), ring_size: 0, known_instance: 0, known_lgr: 0, known_segments: 0 }
    }

    fn accept(&self, len: u64) -> Accept {
        let extent = Extent::at(1 << 16, MIN_RING);
        Accept {
            sender: self.sender(),
            lgr: 1,
            segment: 0,
            first_contact: true,
            segment_size: len,
            page: extent.page as u64,
            rings: extent.rings.map(|r| r as u64),
            ring_size: MIN_RING as u32,
        }
    }

    fn say(&self, message: Message, fd: Option<&Fd>) {
        let bytes = clc::encode(&message);
        assert_eq!(unix::send(&self.fd, bytes.as_bytes(), fd), Ok(bytes.as_bytes().len()));
    }

    fn hear(&mut self) -> Option<Message> {
        let mut buf = [0; clc::MAX_LEN];
        let n = unix::recv(&self.fd, &mut buf, &mut self.fds).ok()?;
        match clc::decode(&buf[..n]) {
            Ok(Decoded::Message(m, taken)) if taken == n => Some(m),
            _ => None,
        }
    }

    fn hears_decline(&mut self, why: Reason) {
        match self.hear() {
            Some(Message::Decline(d)) => assert_eq!(d.diagnosis, why.code()),
            other => panic!("{other:?} instead of a decline"),
        }
    }
}

/// A sealed memfd of a megabyte.
fn memfd() -> Fd {
    Region::create(1 << 20, u64::MAX).unwrap().1
}

#[test]
fn a_proposal_that_is_wrong_is_declined() {
    type Spoil = fn(&mut Proposal);
    let cases: [(Spoil, Reason); 4] = [
        (|p| p.sender.cookie += 1, Reason::PeerMisbehaved),
        (|p| p.sender.role = Side::Accept, Reason::PeerMisbehaved),
        (|p| p.sender.instance = 0, Reason::PeerMisbehaved),
        (|p| p.sender.layout_version += 1, Reason::VersionMismatch),
    ];
    for (spoil, why) in cases {
        let (mut puppet, mut real, _tcp) = Puppet::connecting();
        let mut proposal = puppet.proposal();
        spoil(&mut proposal);
        puppet.say(Message::Proposal(proposal), None);
        assert_eq!(reason(real.step()), Some(why));
        puppet.hears_decline(why);
        assert_eq!(reason(real.step()), Some(why), "further steps say the same");
    }
}

#[test]
fn a_descriptor_where_none_belongs_is_declined() {
    let (mut puppet, mut real, _tcp) = Puppet::connecting();
    let bytes = clc::encode(&Message::Proposal(puppet.proposal()));
    // Linux 6.16 refuses it for us (SO_PASSRIGHTS).
    if unix::send(&puppet.fd, bytes.as_bytes(), Some(&memfd())) == Err(libc::EPERM) {
        return;
    }
    assert_eq!(reason(real.step()), Some(Reason::PeerMisbehaved));
    puppet.hears_decline(Reason::PeerMisbehaved);
}

#[test]
fn an_accept_that_is_wrong_is_declined() {
    type Spoil = fn(&mut Accept);
    let cases: [(Spoil, Reason); 9] = [
        (|a| a.sender.cookie += 1, Reason::PeerMisbehaved),
        (|a| a.sender.layout_version = 0, Reason::VersionMismatch),
        (|a| a.segment_size *= 2, Reason::PeerMisbehaved),
        (|a| a.segment_size = u64::MAX, Reason::PeerMisbehaved),
        (|a| a.page = u64::MAX - 511, Reason::PeerMisbehaved),
        (|a| a.rings = [1 << 20, 1 << 16], Reason::PeerMisbehaved),
        (|a| a.rings = [1 << 16, 1 << 16], Reason::PeerMisbehaved),
        (|a| a.ring_size = 12345, Reason::PeerMisbehaved),
        (|a| a.first_contact = false, Reason::PeerMisbehaved),
    ];
    for (i, (spoil, why)) in cases.into_iter().enumerate() {
        let (mut puppet, mut real, _tcp) = Puppet::accepting();
        assert!(matches!(puppet.hear(), Some(Message::Proposal(_))));
        let mut accept = puppet.accept(1 << 20);
        spoil(&mut accept);
        puppet.say(Message::Accept(accept), Some(&memfd()));
        assert_eq!(reason(real.step()), Some(why), "case {i}");
        puppet.hears_decline(why);
    }
}

#[test]
fn memory_that_could_be_truncated_is_declined() {
    let (mut puppet, mut real, _tcp) = Puppet::accepting();
    puppet.hear();
    // SAFETY: the name outlives the call.
    let raw = unsafe { crate::rawcall!(libc::SYS_memfd_create, c"loose".as_ptr(), libc::MFD_ALLOW_SEALING) };
    let loose = Fd::from_raw(raw.unwrap() as i32);
    // SAFETY: takes integers.
    unsafe { crate::rawcall!(libc::SYS_ftruncate, loose.raw(), 1 << 20) }.unwrap();
    puppet.say(Message::Accept(puppet.accept(1 << 20)), Some(&loose));
    assert_eq!(reason(real.step()), Some(Reason::PeerMisbehaved));
}

#[test]
fn a_segment_that_was_never_passed_is_out_of_sync() {
    let (mut puppet, mut real, _tcp) = Puppet::accepting();
    puppet.hear();
    let accept = Accept { first_contact: false, ..puppet.accept(1 << 20) };
    puppet.say(Message::Accept(accept), None);
    assert_eq!(reason(real.step()), Some(Reason::OutOfSync));
    match puppet.hear() {
        Some(Message::Decline(d)) => assert!(d.out_of_sync),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_good_accept_is_confirmed_and_nothing_beyond_it_is_read() {
    let (mut puppet, mut real, _tcp) = Puppet::accepting();
    puppet.hear();
    let memfd = memfd();
    puppet.say(Message::Accept(puppet.accept(1 << 20)), Some(&memfd));
    assert_eq!(unix::send(&puppet.fd, b"ring", None), Ok(4));
    let Step::Done(done) = real.step() else { panic!("a good accept") };
    assert!(matches!(puppet.hear(), Some(Message::Confirm(_))));
    let mut buf = [0; 16];
    assert_eq!(unix::recv(&done.bell, &mut buf, &mut Vec::new()), Ok(4));
    assert_eq!(&buf[..4], b"ring");
    // The puppet sees, in its own mapping, the mark that a drop leaves.
    let region = Region::receive(&memfd, 1 << 20, u64::MAX).unwrap();
    let accept = puppet.accept(1 << 20);
    let buffers = place(Arc::new(Segment { number: 0, region }), &accept).unwrap();
    let marks =
        || buffers.page().side.each_ref().map(|s| s.hint.detached.load(crate::sync::Ordering::Relaxed));
    assert_eq!(marks(), [0, 0]);
    drop(done);
    assert_eq!(marks(), [1, 0]);
}

#[test]
fn every_truncation_waits_and_then_fails_at_the_end_of_the_stream() {
    let (puppet, _real, _tcp) = Puppet::connecting();
    let len = clc::encode(&Message::Proposal(puppet.proposal())).as_bytes().len();
    for cut in 0..len {
        let (puppet, mut real, _tcp) = Puppet::connecting();
        let bytes = clc::encode(&Message::Proposal(puppet.proposal()));
        if cut > 0 {
            unix::send(&puppet.fd, &bytes.as_bytes()[..cut], None).unwrap();
        }
        assert!(matches!(real.step(), Step::Pending), "{cut} bytes");
        drop(puppet);
        // The puppet may leave the real one's bytes unread; either way its end is seen.
        assert_eq!(reason(real.step()), Some(Reason::PeerGone), "{cut} bytes");
    }
}

#[test]
fn a_message_byte_by_byte() {
    let (mut puppet, mut real, _tcp) = Puppet::connecting();
    for byte in clc::encode(&Message::Proposal(puppet.proposal())).as_bytes() {
        unix::send(&puppet.fd, &[*byte], None).unwrap();
        assert!(matches!(real.step(), Step::Pending));
    }
    assert!(matches!(puppet.hear(), Some(Message::Accept(a)) if a.first_contact));
    assert_eq!(puppet.fds.len(), 1);
}

#[test]
fn noise_is_refused() {
    let (puppet, mut real, _tcp) = Puppet::connecting();
    unix::send(&puppet.fd, b"GET / HTTP/1.0\r\n\r\n", None).unwrap();
    assert_eq!(reason(real.step()), Some(Reason::PeerMisbehaved));
}

#[test]
fn no_memory_is_declined() {
    let (c, a) = tcp();
    let none = RendezvousConfig { mem_limit: 0, ..CONFIG };
    let mut accepting = Rendezvous::new(Side::Accept, a.as_raw_fd(), none).unwrap();
    let mut connecting = rendezvous(Side::Connect, &c);
    accepting.step();
    connecting.step();
    assert_eq!(reason(accepting.step()), Some(Reason::NoMemory));
    assert_eq!(reason(connecting.step()), Some(Reason::PeerDeclined));
}

#[test]
fn no_descriptors() {
    let (c, _a) = tcp();
    let high = RendezvousConfig { fd_base: i32::MAX, ..CONFIG };
    assert_eq!(Rendezvous::new(Side::Connect, c.as_raw_fd(), high).err(), Some(Reason::NoFds));
}

#[test]
fn an_occupied_name() {
    let (c, _a) = tcp();
    let _first = rendezvous(Side::Connect, &c);
    assert_eq!(Rendezvous::new(Side::Connect, c.as_raw_fd(), CONFIG).err(), Some(Reason::NameTaken));
}

#[test]
fn who_is_a_candidate() {
    let at = |s: &str| s.parse::<SocketAddr>().unwrap();
    assert_eq!(candidate(at("127.0.0.1:5"), at("127.0.0.1:5")), Err(Reason::ConnectionToSelf));
    assert_eq!(candidate(at("127.0.0.1:5"), at("127.9.0.1:6")), Ok(()));
    assert_eq!(candidate(at("[::1]:5"), at("[::1]:6")), Ok(()));
    assert_eq!(candidate(at("10.1.2.3:5"), at("10.1.2.3:6")), Ok(()));
    assert_eq!(candidate(at("192.0.2.1:5"), at("192.0.2.2:6")), Err(Reason::NotLocal));
    assert_eq!(candidate(at("[2001:db8::1]:5"), at("[2001:db8::2]:6")), Err(Reason::NotLocal));
}

/// Withdrawing an offer: the accepting end goes away before the Confirm, after it, and after a Decline.
#[test]
fn an_offer_given_up_is_free_again_unless_confirmed() {
    enum Then {
        Nothing,
        Decline,
        Confirm,
    }
    for (then, free) in [(Then::Nothing, true), (Then::Decline, true), (Then::Confirm, false)] {
        let (mut puppet, mut real, _tcp) = Puppet::connecting();
        let proposal = puppet.proposal();
        puppet.say(Message::Proposal(proposal), None);
        assert!(matches!(real.step(), Step::Pending));
        let Some(Message::Accept(accept)) = puppet.hear() else { panic!("no accept") };
        let region = Region::receive(&puppet.fds[0], accept.segment_size, u64::MAX).unwrap();
        let buffers = place(Arc::new(Segment { number: 0, region }), &accept).unwrap();
        let sender = proposal.sender;
        let (lgr, segment) = (accept.lgr, accept.segment);
        match then {
            Then::Nothing => {}
            Then::Decline => {
                let instance = sender.instance;
                puppet.say(Message::Decline(Decline { instance, diagnosis: 1, out_of_sync: false }), None);
                assert_eq!(reason(real.step()), Some(Reason::PeerDeclined));
            }
            Then::Confirm => puppet.say(Message::Confirm(Confirm { sender, lgr, segment }), None),
        }
        drop(real);
        let page = buffers.page();
        assert_eq!(page.side[1].hint.detached.load(crate::sync::Ordering::Relaxed), 1);
        assert_eq!(page.side[0].hint.detached.load(crate::sync::Ordering::Relaxed) == 1, free);
        let confirm = clc::encode(&Message::Confirm(Confirm { sender, lgr, segment }));
        assert_eq!(unix::send(&puppet.fd, confirm.as_bytes(), None), Err(libc::EPIPE), "too late to confirm");
    }
}
