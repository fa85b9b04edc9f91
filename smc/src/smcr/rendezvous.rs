//! CLC at the start of a TCP stream, both sides: from the Proposal to a link that works, or back to TCP (RFC 7609
//! section 3.5, `net/smc/af_smc.c`).
//!
//! ```text
//!  client   Proposing ── Accept ──> Preparing ── prepared ──> [Linking ──>] Done
//!  server   Awaiting ── Proposal ──> Choosing ── chosen ──> Confirming ── Confirm ──> Preparing ... Done
//! ```
//!
//! *Linking* is at first contact only: the link group exchanges CONFIRM LINK. From every state a Decline, of either
//! end, leads back to TCP; bytes that are no CLC message do not, since nobody can know what they were.
//!
//! The hard idea is where TCP's own bytes begin: right behind the last CLC message, so that [`Rendezvous::wants`] says
//! how many bytes may be taken from TCP, and never lets a reader take more.

use super::Ms;
use crate::wire::smcr::clc::{self, Decline, Decoded, Endpoint, Malformed, Message, OfferV2, Proposal};
use crate::wire::smcr::{Diagnosis, Eid, PeerId, Version};

/// How long a side waits for a CLC message.
const CLC_WAIT: Ms = 6_000;
/// CONFIRM LINK at first contact; the link group has its own, shorter ones.
const LINK_WAIT: Ms = 12_000;

/// What the driver is to do.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write this to TCP.
    Send(Message),
    /// Server: choose a device and a link for this Proposal, and answer with [`Rendezvous::chosen`].
    Choose(Proposal),
    /// Bring the link up to the peer's end, or find it in the group, and answer with [`Rendezvous::prepared`].
    Prepare(Endpoint),
    /// First contact: run the link group until it is ready, and answer with [`Rendezvous::linked`].
    Link,
    /// The connection goes by RDMA.
    Done,
    /// It goes by TCP, for this reason. `out_of_sync`: forget the link group that was named.
    Fallback(Diagnosis, bool),
    /// The stream is no SMC handshake: EPROTO.
    Broken(Malformed),
}

#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Client: the Proposal is sent.
    Proposing(Proposal),
    /// Server: for the Proposal.
    Awaiting,
    /// Server: the driver chooses.
    Choosing(Proposal),
    /// Server: the Accept is sent.
    Confirming(Endpoint),
    /// The driver prepares the link. Client: with the Accept; server: first contact or not.
    PreparingClient(Endpoint),
    PreparingServer(bool),
    /// CONFIRM LINK.
    Linking,
    Over,
}

/// One handshake.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    me: PeerId,
    state: State,
    until: Ms,
    wants: usize,
}

/// What both ends have agreed on at first contact by version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Release 1: with numbers of links and connections.
    pub release: u8,
    /// Links in the group.
    pub max_links: u8,
    /// Connections in the group.
    pub max_conns: u8,
}

impl Rendezvous {
    /// The client: sends the Proposal.
    #[must_use]
    pub fn propose(proposal: Proposal, now: Ms) -> (Self, Step) {
        let state = State::Proposing(proposal);
        let me = proposal.local.peer;
        (
            Self { me, state, until: now + CLC_WAIT, wants: clc::HEADER_LEN },
            Step::Send(Message::Proposal(proposal)),
        )
    }

    /// The server: waits for the Proposal.
    #[must_use]
    pub fn listen(me: PeerId, now: Ms) -> Self {
        Self { me, state: State::Awaiting, until: now + CLC_WAIT, wants: clc::HEADER_LEN }
    }

    /// How many bytes of TCP are wanted, counted from the beginning of the message that is being read; 0: none may be
    /// taken now.
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.state {
            State::Proposing(_) | State::Awaiting | State::Confirming(_) => self.wants,
            // A late Decline is looked for by peeking; nothing else may be taken.
            _ => 0,
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// When [`Self::tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        (!self.is_over()).then_some(self.until)
    }

    /// The bytes from the beginning of the message that is being read; taken from TCP when this has used them
    /// (`wants` bytes exactly, never more).
    pub fn handle_bytes(&mut self, bytes: &[u8], now: Ms) -> Option<Step> {
        if self.wants() == 0 {
            return None;
        }
        match clc::decode(bytes) {
            Ok(Decoded::NeedTotal(n)) => {
                self.wants = n;
                None
            }
            Ok(Decoded::Message(m, _)) => {
                self.wants = clc::HEADER_LEN;
                Some(self.handle(&m, now))
            }
            Err(e) => Some(self.broken(e)),
        }
    }

    fn broken(&mut self, e: Malformed) -> Step {
        self.state = State::Over;
        Step::Broken(e)
    }

    fn handle(&mut self, m: &Message, now: Ms) -> Step {
        if let Message::Decline(d) = m {
            self.state = State::Over;
            return Step::Fallback(Diagnosis::PEER_DECLINED, d.out_of_sync);
        }
        match (self.state, m) {
            (State::Proposing(p), Message::Accept(a)) => match fits(&p, a) {
                Ok(()) => {
                    self.state = State::PreparingClient(*a);
                    self.until = now + LINK_WAIT;
                    Step::Prepare(*a)
                }
                Err(d) => self.decline(d, false),
            },
            (State::Awaiting, Message::Proposal(p)) => {
                self.state = State::Choosing(*p);
                // The driver may wait for a link group in the making.
                self.until = now + LINK_WAIT;
                Step::Choose(*p)
            }
            (State::Confirming(a), Message::Confirm(c)) => {
                let same = a.version() == c.version()
                    && a.first_contact == c.first_contact
                    && a.v2.map(|v| v.eid) == c.v2.map(|v| v.eid)
                    && echoes(&a, c);
                if !same {
                    return self.decline(Diagnosis::VERSION_MISMATCH, false);
                }
                self.state = State::PreparingServer(c.first_contact);
                self.until = now + LINK_WAIT;
                Step::Prepare(*c)
            }
            _ => self.broken(Malformed::Type),
        }
    }

    /// Server: the Accept, or why not. The Accept's EID must be one of the Proposal's.
    pub fn chosen(&mut self, accept: Result<Endpoint, Diagnosis>, now: Ms) -> Step {
        let State::Choosing(p) = self.state else { return self.broken(Malformed::Type) };
        match accept.and_then(|a| fits(&p, &a).map(|()| a)) {
            Ok(a) => {
                self.state = State::Confirming(a);
                self.until = now + CLC_WAIT;
                Step::Send(Message::Accept(a))
            }
            Err(d) => self.decline(d, false),
        }
    }

    /// The link is there, or not. Client: with the Confirm; `out_of_sync` in the error: the server named a link group
    /// that is not known here.
    pub fn prepared(&mut self, confirm: Result<Option<Endpoint>, (Diagnosis, bool)>, now: Ms) -> Vec<Step> {
        let confirm = match confirm {
            Ok(c) => c,
            Err((d, out_of_sync)) => return vec![self.decline(d, out_of_sync)],
        };
        let (first, send) = match (self.state, confirm) {
            (State::PreparingClient(a), Some(c)) => (a.first_contact, Some(Step::Send(Message::Confirm(c)))),
            (State::PreparingServer(first), None) => (first, None),
            _ => return vec![self.broken(Malformed::Type)],
        };
        self.until = now + LINK_WAIT;
        self.state = if first { State::Linking } else { State::Over };
        let then = if first { Step::Link } else { Step::Done };
        send.into_iter().chain([then]).collect()
    }

    /// First contact: the link group is ready, or why not.
    pub fn linked(&mut self, result: Result<(), Diagnosis>) -> Step {
        if self.state != State::Linking {
            return self.broken(Malformed::Type);
        }
        match result {
            Ok(()) => {
                self.state = State::Over;
                Step::Done
            }
            Err(d) => self.decline(d, false),
        }
    }

    /// The driver can't go on.
    pub fn give_up(&mut self, diagnosis: Diagnosis) -> Step {
        self.decline(diagnosis, false)
    }

    /// Sends a Decline; the caller's connection goes by TCP then ([`declined`] says for which reason).
    fn decline(&mut self, diagnosis: Diagnosis, out_of_sync: bool) -> Step {
        self.state = State::Over;
        Step::Send(Message::Decline(Decline { peer: self.me, diagnosis, out_of_sync, v2: None }))
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Ms) -> Option<Step> {
        if self.is_over() || now < self.until {
            return None;
        }
        let diagnosis = match self.state {
            // Nobody answers, and somebody who does not speak SMC has now read a Proposal.
            State::Proposing(_) | State::Awaiting => Diagnosis::PEER_NO_SMC,
            _ => Diagnosis::TIMEOUT_CONFIRM_LINK,
        };
        Some(self.decline(diagnosis, false))
    }
}

/// What a sent message means for the connection: a Decline, that it goes by TCP.
#[must_use]
pub fn declined(sent: &Message) -> Option<Diagnosis> {
    match sent {
        Message::Decline(d) => Some(d.diagnosis),
        _ => None,
    }
}

/// Whether an Accept answers a Proposal.
fn fits(p: &Proposal, a: &Endpoint) -> Result<(), Diagnosis> {
    let Some(part) = a.v2 else {
        let offered = p.v1.is_some_and(|o| o.media != clc::Media::D);
        return if offered { Ok(()) } else { Err(Diagnosis::VERSION_MISMATCH) };
    };
    let Some(o) = p.v2.filter(|o| p.version == Version::V2 && o.media != clc::Media::D) else {
        return Err(Diagnosis::VERSION_MISMATCH);
    };
    if !o.eids.contains(&part.eid) {
        return Err(Diagnosis::NO_UEID);
    }
    match part.first {
        Some(f) => {
            if f.release > o.release {
                return Err(Diagnosis::RELEASE);
            }
            agreed(&o, a).map(|_| ())
        }
        None => Ok(()),
    }
}

/// Links and connections of a new group: what the server has chosen, and never more than was offered.
pub fn agreed(o: &OfferV2, a: &Endpoint) -> Result<Agreed, Diagnosis> {
    let first = a.v2.and_then(|v| v.first).unwrap_or_default();
    if first.release == 0 {
        return Ok(Agreed { release: 0, max_links: 2, max_conns: 255 });
    }
    let (links, conns) = (first.max_links, first.max_conns);
    if links == 0 || links > o.max_links {
        return Err(Diagnosis::MAX_LINKS);
    }
    if conns < 16 || conns > o.max_conns {
        return Err(Diagnosis::MAX_CONNS);
    }
    Ok(Agreed { release: first.release, max_links: links, max_conns: conns })
}

/// A client repeats what the server has chosen.
fn echoes(a: &Endpoint, c: &Endpoint) -> bool {
    match (a.v2.and_then(|v| v.first), c.v2.and_then(|v| v.first)) {
        (Some(a), Some(c)) => {
            a.release == c.release
                && (a.release == 0 || a.max_links == c.max_links && a.max_conns == c.max_conns)
        }
        (a, c) => a.is_none() && c.is_none(),
    }
}

/// The first EID that both ends have.
#[must_use]
pub fn common_eid(offer: &OfferV2, known: &[Eid]) -> Option<Eid> {
    offer.eids.iter().find(|e| known.contains(e)).copied()
}
