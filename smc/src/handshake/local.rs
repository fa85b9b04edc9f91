//! The rendezvous of two ends on one host, and the CLC handshake over it; no byte of it is in the TCP stream.
//!
//! ```text
//!  connecting end                                     accepting end
//!  bind + listen at the name of the 4-tuple
//!                      ◀──────────── connect          (refused: not there yet, Pending)
//!  SO_PEERCRED against sock_diag                      SO_PEERCRED against sock_diag
//!                      Proposal ───────────▶          cookie checked; link group joined or built;
//!                                                     buffers allocated, zeroed
//!                      ◀──────────── Accept (+ memfd)
//!  cookie, seals, offsets checked; mapped
//!                      Confirm ────────────▶
//!  Done: the socket is the doorbell                   Done: the socket is the doorbell
//! ```
//!
//! Either end may answer with a Decline instead, or close: TCP goes on as it was. Nothing here waits: a
//! [`Rendezvous`] is advanced by [`Rendezvous::step`] from inside the program's own socket calls, and whoever
//! calls decides how often and when to give up.
//!
//! The hard idea is the end of it. After the Confirm the peer may write into the rings, so the accepting end
//! must know whether a Confirm was sent before it may use the buffers for anybody else. The kernel decides
//! that: the accepting end shuts the socket down, after which no Confirm can be sent any more, and then looks
//! whether one arrived before (`Offer`'s drop). On its side the connecting end touches nothing shared until
//! its Confirm is on the socket.
//!
//! Answers to RFC 7609 section 3.2 (CLC) and 3.5 (rendezvous); the Unix socket takes the TCP connection's part.

use super::{Side, unix};
use crate::{
    fd::Fd,
    lgr::{self, Asked, ConnBuffers, LgrKey, Member, Owner},
    mem::{
        layout::LAYOUT_VERSION,
        region::{Region, RegionError},
        rmb::{Buffers, Extent, Grant, Refused, Segment, Ticket, ring_size},
    },
    reason::Reason,
    wire::clc::{self, Accept, Confirm, Decline, Decoded, Encoded, Malformed, Message, Proposal, Sender},
};
use std::{net::SocketAddr, sync::Arc};

/// Connections from strangers that the connecting end hangs up on before it gives up: somebody is squatting.
const MAX_STRANGERS: u32 = 8;

/// What a [`Rendezvous`] needs to know beside the socket.
#[derive(Clone, Copy, Debug)]
pub struct RendezvousConfig {
    /// Bytes wanted in each ring; rounded and bounded by [`ring_size`].
    pub ring_size: usize,
    /// Bytes of segments this process may have mapped.
    pub mem_limit: u64,
    /// Descriptors that stay are numbered from here.
    pub fd_base: i32,
}

/// What [`Rendezvous::step`] came to.
#[derive(Debug)]
pub enum Step {
    /// Waiting for the peer; try again later.
    Pending,
    /// Both ends have the buffers.
    Done(Box<Established>),
    /// TCP it is. Further steps say the same.
    Failed(Reason),
}

/// A connection that both ends have buffers for.
#[derive(Debug)]
pub struct Established {
    /// Which end we are.
    pub side: Side,
    /// The doorbell: a connected Unix stream socket in blocking mode, close-on-exec, numbered high. Nothing
    /// is on it yet but what the peer rang.
    pub bell: Fd,
    /// The memory.
    pub buffers: ConnBuffers,
    /// The peer's process, as `SO_PEERCRED` says.
    pub peer_pid: i32,
    /// The peer's user, as `SO_PEERCRED` says.
    pub peer_uid: u32,
}

/// One end of a handshake in progress. See the module's head.
#[derive(Debug)]
pub struct Rendezvous {
    side: Side,
    config: RendezvousConfig,
    /// Our own addresses and the peer's, as our socket has them.
    local: SocketAddr,
    peer: SocketAddr,
    /// `SO_COOKIE` of our end.
    cookie: u64,
    /// Whose handshake this is: after a fork the child must leave it alone.
    instance: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Connecting end: the name is bound; who comes?
    Listen { listener: Fd, strangers: u32 },
    /// Accepting end: is the peer there?
    Connect(Fd),
    /// Connecting end: Proposal under way, Accept wanted. The member keeps the segments it promised to have.
    AwaitAccept(Talk, Option<Member>),
    /// Connecting end: Accept received, not yet mapped (another thread is at this link group).
    Map(Talk, Box<Accept>, Option<Fd>),
    /// Connecting end: mapped; the Confirm is not all on the socket yet.
    Confirming(Talk, Buffers, Member),
    /// Accepting end: Proposal wanted.
    AwaitProposal(Talk),
    /// Accepting end: Proposal received, no buffers yet (another thread is at this link group).
    Allocate(Talk, Box<Proposal>),
    /// Accepting end: Accept under way, Confirm wanted.
    AwaitConfirm(Offer),
    /// Failed, or taken.
    Over(Reason),
}

/// Where a state leads.
enum Next {
    Again(State),
    Wait(State),
    Done(Box<Established>),
    Fail(Reason),
}

impl Rendezvous {
    /// Starts on the TCP connection `tcp_fd`, of which we are the `side` end. Fails if its peer can't be on
    /// this host; for a peer that is obviously remote that costs a few system calls.
    pub fn new(side: Side, tcp_fd: i32, config: RendezvousConfig) -> Result<Self, Reason> {
        let local = unix::local_addr(tcp_fd).map_err(reason_of)?;
        let peer = unix::peer_addr(tcp_fd).map_err(reason_of)?;
        candidate(local, peer)?;
        let cookie = unix::cookie(tcp_fd).map_err(reason_of)?;
        let state = match side {
            Side::Connect => State::Listen {
                listener: unix::listen(&unix::Name::of(local, peer), config.fd_base).map_err(reason_of)?,
                strangers: 0,
            },
            Side::Accept => State::Connect(unix::connector(config.fd_base).map_err(reason_of)?),
        };
        Ok(Rendezvous { side, config, local, peer, cookie, instance: lgr::instance(), state })
    }

    /// Goes as far as it can without waiting. After `Done` and `Failed` there is nothing more to do; a step
    /// then says `Failed`.
    pub fn step(&mut self) -> Step {
        if lgr::instance() != self.instance {
            // A fork's child: the handshake is the parent's. Closing our copies disturbs nobody.
            self.state = State::Over(Reason::ForkShared);
        }
        loop {
            let state = std::mem::replace(&mut self.state, State::Over(Reason::Internal));
            match self.advance(state) {
                Next::Again(state) => self.state = state,
                Next::Wait(state) => {
                    self.state = state;
                    return Step::Pending;
                }
                Next::Done(established) => {
                    self.state = State::Over(Reason::HandshakeFailed);
                    return Step::Done(established);
                }
                Next::Fail(reason) => {
                    self.state = State::Over(reason);
                    return Step::Failed(reason);
                }
            }
        }
    }

    /// Whether the peer has been met: its process has answered, and the handshake is under way.
    pub fn met(&self) -> bool {
        !matches!(self.state, State::Listen { .. } | State::Connect(_) | State::Over(_))
    }

    fn advance(&self, state: State) -> Next {
        match state {
            State::Listen { listener, strangers } => self.listen(listener, strangers),
            State::Connect(fd) => self.connect(fd),
            State::AwaitAccept(talk, known) => self.await_accept(talk, known),
            State::Map(talk, accept, memfd) => self.map(talk, accept, memfd),
            State::Confirming(talk, buffers, member) => self.confirming(talk, buffers, member),
            State::AwaitProposal(talk) => self.await_proposal(talk),
            State::Allocate(talk, proposal) => self.allocate(talk, proposal),
            State::AwaitConfirm(offer) => await_confirm(offer),
            State::Over(reason) => Next::Fail(reason),
        }
    }

    /// The cookie of the peer's TCP socket, if the process behind `cred` may speak for it.
    fn vouch(&self, cred: unix::Cred) -> Result<u64, Reason> {
        match unix::tcp_owner(self.peer, self.local) {
            Ok(Some(owner)) if cred.uid == 0 => Ok(owner.cookie),
            Ok(Some(owner)) if cred.uid == owner.uid && !unix::stands_for_many(owner.uid) => Ok(owner.cookie),
            Ok(Some(_)) => Err(Reason::UidMismatch),
            // Not even our own end is known: the kernel can't say (no tcp_diag), or ours is gone.
            Ok(None) if matches!(unix::tcp_owner(self.local, self.peer), Ok(None)) => Err(Reason::NoSockDiag),
            Ok(None) => Err(Reason::NotLocal),
            Err(e) => Err(diag_reason(e)),
        }
    }

    fn sender(&self) -> Sender {
        Sender {
            layout_version: LAYOUT_VERSION,
            role: self.side,
            instance: self.instance,
            pid: std::process::id(),
            cookie: self.cookie,
        }
    }

    /// Whether a message is from the other end of this very connection, in a version we share.
    fn check(&self, talk: &Talk, sender: &Sender) -> Result<(), Reason> {
        if sender.layout_version != LAYOUT_VERSION {
            return Err(Reason::VersionMismatch);
        }
        let fits = sender.role == self.side.peer() && sender.cookie == talk.cookie && sender.instance != 0;
        if fits { Ok(()) } else { Err(Reason::PeerMisbehaved) }
    }
}

/// The connecting end.
impl Rendezvous {
    fn listen(&self, listener: Fd, strangers: u32) -> Next {
        let fd = match unix::accept(&listener, self.config.fd_base) {
            Ok(fd) => fd,
            Err(libc::EAGAIN | libc::ECONNABORTED) => {
                return Next::Wait(State::Listen { listener, strangers });
            }
            Err(e) => return Next::Fail(reason_of(e)),
        };
        let cred = match unix::peer_cred(&fd) {
            Ok(cred) => cred,
            Err(e) => return Next::Fail(reason_of(e)),
        };
        match self.vouch(cred) {
            Ok(cookie) => self.propose(Talk::new(fd, cred, cookie)),
            Err(Reason::UidMismatch) if strangers + 1 < MAX_STRANGERS => {
                Next::Again(State::Listen { listener, strangers: strangers + 1 })
            }
            Err(reason) => Next::Fail(reason),
        }
    }

    fn propose(&self, mut talk: Talk) -> Next {
        let known = lgr::any_mapped(talk.cred.pid, talk.cred.uid);
        let mask = known.as_ref().and_then(|m| m.group().mapped_mask()).unwrap_or(0);
        let key = known.as_ref().map(|m| *m.group().key());
        talk.post(&Message::Proposal(Proposal {
            sender: self.sender(),
            ring_size: ring_size(self.config.ring_size) as u32,
            known_instance: key.map_or(0, |k| k.instance),
            known_lgr: key.map_or(0, |k| k.number),
            known_segments: mask,
        }));
        Next::Again(State::AwaitAccept(talk, known))
    }

    fn await_accept(&self, mut talk: Talk, known: Option<Member>) -> Next {
        let accept = match talk.exchange() {
            Ok(None) => return Next::Wait(State::AwaitAccept(talk, known)),
            Ok(Some(Message::Accept(accept))) => accept,
            Ok(Some(Message::Decline(_))) => return Next::Fail(Reason::PeerDeclined),
            Ok(Some(_)) => return talk.decline(Reason::PeerMisbehaved, self.instance),
            Err(reason) => return talk.decline(reason, self.instance),
        };
        if let Err(reason) = self.check(&talk, &accept.sender) {
            return talk.decline(reason, self.instance);
        }
        if accept.ring_size as usize > ring_size(self.config.ring_size) {
            // More than was asked for: memory that this process would pay for.
            return talk.decline(Reason::PeerMisbehaved, self.instance);
        }
        unix::refuse_fds(&talk.fd);
        let memfd = talk.fds.pop();
        if memfd.is_some() != accept.first_contact || !talk.fds.is_empty() {
            return talk.decline(Reason::PeerMisbehaved, self.instance);
        }
        self.map(talk, Box::new(accept), memfd)
        // `known` goes only now: until here it kept mapped what the Proposal said is mapped.
    }

    fn map(&self, mut talk: Talk, accept: Box<Accept>, memfd: Option<Fd>) -> Next {
        let (buffers, member) = match self.try_map(talk.cred, &accept, memfd.as_ref()) {
            Ok(Some(mapped)) => mapped,
            Ok(None) => return Next::Wait(State::Map(talk, accept, memfd)),
            Err(reason) => return talk.decline(reason, self.instance),
        };
        talk.post(&Message::Confirm(Confirm {
            sender: self.sender(),
            lgr: accept.lgr,
            segment: accept.segment,
        }));
        Next::Again(State::Confirming(talk, buffers, member))
    }

    /// The buffers of the Accept, in the link group that they belong to. `None`: another thread is at it.
    fn try_map(
        &self,
        cred: unix::Cred,
        accept: &Accept,
        memfd: Option<&Fd>,
    ) -> Result<Option<(Buffers, Member)>, Reason> {
        let first = || {
            let memfd = memfd.ok_or(Reason::OutOfSync)?;
            let region =
                Region::receive(memfd, accept.segment_size, self.config.mem_limit).map_err(region_reason)?;
            Ok(Arc::new(Segment { number: accept.segment, region }))
        };
        let key = LgrKey {
            pid: cred.pid,
            uid: cred.uid,
            instance: lgr::vouched(cred.pid, accept.sender.instance),
            owner: Owner::Remote,
            number: accept.lgr,
        };
        let Asked::Group(member) = lgr::mapped(key, first)? else { return Ok(None) };
        let segment = member.group().with_mapped(|segments| {
            if let Some(have) = segments.iter().find(|s| s.number == accept.segment) {
                return Ok(have.clone());
            }
            let new = first()?;
            segments.push(new.clone());
            Ok(new)
        });
        let Some(segment) = segment.transpose()? else { return Ok(None) };
        let buffers = place(segment, accept).ok_or(Reason::PeerMisbehaved)?;
        Ok(Some((buffers, member)))
    }

    fn confirming(&self, mut talk: Talk, buffers: Buffers, member: Member) -> Next {
        match talk.flush() {
            Ok(true) => {
                established(Side::Connect, talk, ConnBuffers::new(Side::Connect, buffers, None, member))
            }
            Ok(false) => Next::Wait(State::Confirming(talk, buffers, member)),
            Err(reason) => Next::Fail(reason),
        }
    }
}

/// The buffers that an Accept names, if they lie in the segment as it is.
fn place(segment: Arc<Segment>, accept: &Accept) -> Option<Buffers> {
    let offset = |n: u64| usize::try_from(n).ok();
    let extent = Extent {
        page: offset(accept.page)?,
        rings: [offset(accept.rings[0])?, offset(accept.rings[1])?],
        ring_size: accept.ring_size as usize,
    };
    if segment.region.len() as u64 != accept.segment_size {
        return None;
    }
    Buffers::new(segment, extent)
}

/// The accepting end.
impl Rendezvous {
    fn connect(&self, fd: Fd) -> Next {
        match unix::connect(&fd, &unix::Name::of(self.peer, self.local)) {
            Ok(()) => {}
            // Nobody there yet, or its backlog is full.
            Err(libc::ECONNREFUSED | libc::ENOENT | libc::EAGAIN) => return Next::Wait(State::Connect(fd)),
            Err(e) => return Next::Fail(reason_of(e)),
        }
        let cred = match unix::peer_cred(&fd) {
            Ok(cred) => cred,
            Err(e) => return Next::Fail(reason_of(e)),
        };
        match self.vouch(cred) {
            Ok(cookie) => Next::Again(State::AwaitProposal(Talk::new(fd, cred, cookie))),
            Err(reason) => Next::Fail(reason),
        }
    }

    fn await_proposal(&self, mut talk: Talk) -> Next {
        let proposal = match talk.exchange() {
            Ok(None) => return Next::Wait(State::AwaitProposal(talk)),
            Ok(Some(Message::Proposal(proposal))) => proposal,
            Ok(Some(Message::Decline(_))) => return Next::Fail(Reason::PeerDeclined),
            Ok(Some(_)) => return talk.decline(Reason::PeerMisbehaved, self.instance),
            Err(reason) => return talk.decline(reason, self.instance),
        };
        if !talk.fds.is_empty() {
            return talk.decline(Reason::PeerMisbehaved, self.instance);
        }
        if let Err(reason) = self.check(&talk, &proposal.sender) {
            return talk.decline(reason, self.instance);
        }
        self.allocate(talk, Box::new(proposal))
    }

    fn allocate(&self, mut talk: Talk, proposal: Box<Proposal>) -> Next {
        let (grant, member) = match self.try_allocate(talk.cred, &proposal) {
            Ok(Some(granted)) => granted,
            Ok(None) => return Next::Wait(State::Allocate(talk, proposal)),
            Err(reason) => return talk.decline(reason, self.instance),
        };
        let segment = grant.buffers.segment();
        let extent = grant.buffers.extent();
        talk.post(&Message::Accept(Accept {
            sender: self.sender(),
            lgr: member.group().number(),
            segment: segment.number,
            first_contact: grant.memfd.is_some(),
            segment_size: segment.region.len() as u64,
            page: extent.page as u64,
            rings: extent.rings.map(|r| r as u64),
            ring_size: extent.ring_size as u32,
        }));
        talk.outbox_fd = grant.memfd;
        Next::Again(State::AwaitConfirm(Offer {
            talk: Some(talk),
            parts: Some((grant.buffers, grant.ticket, member)),
            instance: self.instance,
        }))
    }

    /// Buffers, and the link group they belong to. `None`: another thread is at it.
    fn try_allocate(&self, cred: unix::Cred, proposal: &Proposal) -> Result<Option<(Grant, Member)>, Reason> {
        let Asked::Group(member) = lgr::owned(cred.pid, cred.uid, proposal.sender.instance) else {
            return Ok(None);
        };
        let group = member.group();
        let Some(rmb) = group.rmb() else { return Err(Reason::Internal) };
        let knows = proposal.known_instance == self.instance && proposal.known_lgr == group.number();
        let peer_has = if knows { proposal.known_segments } else { 0 };
        let ring = ring_size(self.config.ring_size.min(proposal.ring_size as usize));
        match rmb.allocate(ring, peer_has, self.config.mem_limit, self.config.fd_base) {
            Ok(grant) => {
                if !lgr::is_known(cred.pid) {
                    // Nobody else joins this group, so nobody else will ask for the segment.
                    rmb.give_back_fd();
                }
                Ok(Some((grant, member)))
            }
            Err(Refused::Busy) => Ok(None),
            Err(Refused::Exhausted) => {
                // The next step builds another group.
                group.retire();
                Ok(None)
            }
            Err(Refused::Limit) => Err(Reason::NoMemory),
            Err(Refused::Sys(e)) => Err(reason_of(e)),
        }
    }
}

fn await_confirm(mut offer: Offer) -> Next {
    let Some((talk, (buffers, _, member))) = offer.talk.as_mut().zip(offer.parts.as_ref()) else {
        return Next::Fail(Reason::Internal);
    };
    let confirm = match talk.exchange() {
        Ok(None) => return Next::Wait(State::AwaitConfirm(offer)),
        Ok(Some(Message::Confirm(confirm))) => confirm,
        Ok(Some(Message::Decline(decline))) => {
            if decline.out_of_sync {
                member.group().retire();
            }
            return Next::Fail(Reason::PeerDeclined);
        }
        Ok(Some(_)) => return Next::Fail(Reason::PeerMisbehaved),
        Err(reason) => return Next::Fail(reason),
    };
    let named = (confirm.lgr, confirm.segment) == (member.group().number(), buffers.segment().number);
    let alike = confirm.sender.cookie == talk.cookie && confirm.sender.role == Side::Connect;
    if !named || !alike || !talk.fds.is_empty() {
        return Next::Fail(Reason::PeerMisbehaved);
    }
    let (Some(talk), Some((buffers, ticket, member))) = (offer.talk.take(), offer.parts.take()) else {
        return Next::Fail(Reason::Internal);
    };
    let buffers = ConnBuffers::new(Side::Accept, buffers, Some(ticket), member);
    match talk.fd.make_blocking() {
        Ok(()) => established(Side::Accept, talk, buffers),
        Err(e) => Next::Fail(reason_of(e)),
    }
}

fn established(side: Side, talk: Talk, buffers: ConnBuffers) -> Next {
    let unix::Cred { pid, uid } = talk.cred;
    Next::Done(Box::new(Established { side, bell: talk.fd, buffers, peer_pid: pid, peer_uid: uid }))
}

/// Buffers offered by an Accept that is not confirmed yet.
///
/// Dropped unconfirmed, it finds out whether the peer uses them: see the module's head.
#[derive(Debug)]
struct Offer {
    /// Both are `None` once the Confirm was taken.
    talk: Option<Talk>,
    parts: Option<(Buffers, Ticket, Member)>,
    instance: u64,
}

impl Offer {
    /// Whether a Confirm, or the start of one, arrived before the socket was shut down.
    fn confirmed_at_last(talk: &mut Talk) -> bool {
        unix::shutdown(&talk.fd);
        match talk.receive() {
            Ok(Some(Message::Confirm(_))) => true,
            Ok(Some(_)) => false,
            Ok(None) | Err(_) => talk.inbox_len > 0,
        }
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let (Some(mut talk), Some((buffers, ticket, member))) = (self.talk.take(), self.parts.take()) else {
            return;
        };
        if lgr::instance() != self.instance {
            return; // A fork's child: the offer is the parent's to withdraw.
        }
        if Self::confirmed_at_last(&mut talk) {
            // The peer believes in the connection until it sees the end of the socket, and detaches then.
            buffers.detach(Side::Accept as usize);
        } else {
            buffers.abandon();
        }
        if let Some(rmb) = member.group().rmb() {
            rmb.give(ticket);
        }
    }
}

/// The Unix socket during the handshake: one message out, one message in.
#[derive(Debug)]
struct Talk {
    fd: Fd,
    cred: unix::Cred,
    /// The cookie that the peer's messages must state: its TCP socket's.
    cookie: u64,
    outbox: Option<Box<Encoded>>,
    sent: usize,
    /// Goes with the outbox's first byte.
    outbox_fd: Option<Arc<Fd>>,
    inbox: [u8; clc::MAX_LEN],
    inbox_len: usize,
    /// Descriptors that came with the message.
    fds: Vec<Fd>,
}

impl Talk {
    fn new(fd: Fd, cred: unix::Cred, cookie: u64) -> Talk {
        Talk {
            fd,
            cred,
            cookie,
            outbox: None,
            sent: 0,
            outbox_fd: None,
            inbox: [0; clc::MAX_LEN],
            inbox_len: 0,
            fds: Vec::new(),
        }
    }

    fn post(&mut self, message: &Message) {
        self.outbox = Some(Box::new(clc::encode(message)));
        self.sent = 0;
    }

    /// Sends what is posted; true once all of it is on the socket.
    fn flush(&mut self) -> Result<bool, Reason> {
        while let Some(out) = &self.outbox {
            let rest = out.as_bytes().get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                self.outbox = None;
                break;
            }
            match unix::send(&self.fd, rest, self.outbox_fd.as_deref()) {
                Ok(n) => {
                    self.sent += n;
                    self.outbox_fd = None;
                }
                // ETOOMANYREFS: the user has too many passed descriptors under way; they will arrive.
                Err(libc::EAGAIN | libc::ETOOMANYREFS) => return Ok(false),
                Err(e) => return Err(reason_of(e)),
            }
        }
        Ok(true)
    }

    /// The next message, if it is all there. Reads not one byte beyond it.
    fn receive(&mut self) -> Result<Option<Message>, Reason> {
        loop {
            let total = match clc::decode(self.inbox.get(..self.inbox_len).unwrap_or_default()) {
                Ok(Decoded::Message(message, _)) => {
                    self.inbox_len = 0;
                    return Ok(Some(message));
                }
                Ok(Decoded::NeedTotal(total)) => total,
                Err(Malformed::Version) => return Err(Reason::VersionMismatch),
                Err(_) => return Err(Reason::PeerMisbehaved),
            };
            let room = self.inbox.get_mut(self.inbox_len..total).unwrap_or_default();
            match unix::recv(&self.fd, room, &mut self.fds) {
                Ok(0) => return Err(Reason::PeerGone),
                Ok(n) => self.inbox_len += n,
                Err(libc::EAGAIN) => return Ok(None),
                Err(libc::EMSGSIZE) => return Err(Reason::PeerMisbehaved),
                Err(e) => return Err(reason_of(e)),
            }
            if self.fds.len() > 1 {
                return Err(Reason::PeerMisbehaved);
            }
        }
    }

    /// Sends what is posted, then receives.
    fn exchange(&mut self) -> Result<Option<Message>, Reason> {
        if self.flush()? { self.receive() } else { Ok(None) }
    }

    /// Says no, if the socket takes it, and ends. The peer learns it from the end of the socket otherwise.
    fn decline(mut self, reason: Reason, instance: u64) -> Next {
        if reason != Reason::PeerGone {
            self.outbox_fd = None;
            self.post(&Message::Decline(Decline {
                instance,
                diagnosis: reason.code(),
                out_of_sync: reason == Reason::OutOfSync,
            }));
            let _ = self.flush();
        }
        Next::Fail(reason)
    }
}

/// Whether the other end of the TCP connection is known not to be on this host.
pub(crate) fn is_elsewhere(tcp_fd: i32) -> bool {
    match (unix::local_addr(tcp_fd), unix::peer_addr(tcp_fd)) {
        (Ok(local), Ok(peer)) => candidate(local, peer) == Err(Reason::NotLocal),
        _ => false,
    }
}

/// Whether the peer can be in our network namespace.
fn candidate(local: SocketAddr, peer: SocketAddr) -> Result<(), Reason> {
    if local == peer {
        return Err(Reason::ConnectionToSelf);
    }
    if peer.ip().is_loopback() || local.ip() == peer.ip() {
        return Ok(());
    }
    // One address of ours talking to another (a client bound to one, say): only the kernel knows.
    match unix::tcp_owner(peer, local) {
        Ok(Some(owner)) if owner.established => Ok(()),
        Ok(_) => Err(Reason::NotLocal),
        Err(e) => Err(diag_reason(e)),
    }
}

fn diag_reason(errno: i32) -> Reason {
    match reason_of(errno) {
        known @ (Reason::NoFds | Reason::NoMemory) => known,
        _ => Reason::NoSockDiag,
    }
}

fn region_reason(e: RegionError) -> Reason {
    match e {
        RegionError::Limit => Reason::NoMemory,
        RegionError::Unfit => Reason::PeerMisbehaved,
        RegionError::Sys(e) => reason_of(e),
    }
}

fn reason_of(errno: i32) -> Reason {
    match errno {
        libc::EMFILE | libc::ENFILE => Reason::NoFds,
        libc::ENOMEM | libc::ENOBUFS => Reason::NoMemory,
        libc::EADDRINUSE => Reason::NameTaken,
        libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN => Reason::PeerGone,
        libc::EAFNOSUPPORT => Reason::NotLocal,
        _ => Reason::HandshakeFailed,
    }
}

#[cfg(all(test, not(smc_loom)))]
#[path = "local_tests.rs"]
mod tests;
