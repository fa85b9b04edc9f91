//! A link group: its links, the memory keys on them, and the LLC that both ends speak (RFC 7609 section 3.5,
//! `net/smc/smc_llc.c`).
//!
//! ```text
//!  server                                   client
//!  CONFIRM LINK request  ── on the link ──>  queue pair to RTS; the link has a name now
//!                        <── response ─────
//!  ADD LINK request      ── on another ───>  makes a queue pair, or rejects
//!                        <── response ─────  (version 2: with all memory keys)
//!  ADD LINK CONTINUATION <── both ways ───>  (version 1: two memory keys at a time)
//!  CONFIRM LINK request  ── on the new ───>  and so on
//! ```
//!
//! The server names links and decides about them; a client asks. What takes a round trip is a `Flow`: one at a time
//! may change links, and one of our own memory keys. A request that comes meanwhile is parked, one of them; what does
//! not fit a flow is dropped, as Linux does it. Each flow has a deadline: a peer that says nothing loses the link.
//!
//! The hard idea is who may use what: a memory key is known per link, so a link becomes *active*, which is to say
//! connections may be moved to it, only when both ends have told each other the keys of all their buffers there.
//! A buffer that is confirmed while a link is being added would miss it; so the two exclude each other. The first
//! link is ready before there is a second: connections begin while one is being added.
//!
//! What goes down with a link is said again by another: that it is lost, until the peer's end is known to be gone
//! ([`Action::Gone`]: nothing comes late by it any more), and which keys are no good. And a Confirm on its way may name
//! a buffer by its key on a link that was lost meanwhile: those keys are kept apart ([`Group::peer_has`]).

use std::collections::VecDeque;

use super::{Misbehaved, Ms};
use crate::wire::smcr::llc::{
    AddLink, AddLinkV2, Body, ConfirmLink, ConfirmRkey, DeleteLink, DeleteReason, DeleteRkey, LinkKey, Llc,
    NewKey, RkeyAnswer,
};
use crate::wire::smcr::{Few, Gid, Mac, Mtu, Version};

/// Links of a group: two, and one while another is replaced.
pub const LINKS: usize = 3;
/// Receive buffers of one end.
pub const RMBS: usize = 255;

/// CONFIRM LINK at first contact: the server waits, the client waits.
const CONFIRM_FIRST: [Ms; 2] = [2_000, 4_000];
/// An answer.
const ANSWER: Ms = 2_000;
/// CONFIRM LINK on an added link.
const CONFIRM_ADDED: Ms = 5_000;
/// A link on which nothing was heard for so long is tested.
const IDLE: Ms = 30_000;

/// Which end: fixed for the life of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It accepted; it names the links.
    Server,
    /// It connected.
    Client,
}

/// A place for a link: what the queue pair is known by on this side.
pub type Slot = usize;

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its RoCE address.
    pub gid: Gid,
    /// Queue pair number.
    pub qpn: u32,
    /// First packet sequence number.
    pub psn: u32,
    /// Path MTU that the port can do.
    pub mtu: Mtu,
}

/// A key and an address: what it takes to write to a buffer on one link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// The key.
    pub rkey: u32,
    /// The address.
    pub addr: u64,
}

/// A buffer's keys, by link.
pub type Keys = [Option<Key>; LINKS];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    /// The queue pair is there; CONFIRM LINK was not exchanged.
    Unconfirmed,
    /// Connections may use it.
    Active,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    /// The server's number; 0 until it is known.
    id: u8,
    own: Port,
    /// None while the server's offer is on its way.
    peer: Option<Port>,
    state: LinkState,
    /// When something came by it.
    heard: Ms,
    /// A TEST LINK must be answered until then.
    probe: Option<Ms>,
}

/// What changes links.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Flow {
    None,
    /// CONFIRM LINK: the server waits for the response, the client for the request.
    Confirm {
        slot: Slot,
        until: Ms,
    },
    /// At first contact: the client waits for ADD LINK, which Linux always sends.
    AwaitOffer {
        until: Ms,
    },
    /// The driver makes a queue pair; the request that asked for it, on a client.
    Making {
        slot: Slot,
        via: Slot,
        offer: Option<AddLink>,
    },
    /// ADD LINK was sent: the server waits for the response. No slot: nothing was offered.
    Offered {
        slot: Option<Slot>,
        via: Slot,
        until: Ms,
    },
    /// Version 1: keys go both ways.
    Keys {
        slot: Slot,
        via: Slot,
        mine: Vec<NewKey>,
        until: Ms,
    },
    /// DELETE LINK was sent.
    Deleting {
        slot: Slot,
        until: Ms,
    },
}

/// Why a group has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The peer said so, for this reason.
    Peer(DeleteReason),
    /// We did.
    Here,
    /// The last link is gone.
    NoLink,
    /// CONFIRM LINK did not come in time: Decline with `TIMEOUT_CONFIRM_LINK`.
    Timeout,
    /// The peer wants eyecatchers in RMBEs: Decline with `RMBE_EYECATCHER`.
    Eyecatcher,
    /// It broke the rules.
    Misbehaved(Misbehaved),
}

/// What the driver is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// SEND on this link.
    Send(Slot, Llc),
    /// Make a queue pair in this slot, towards that port if it is known, register all receive buffers on it, and
    /// answer with [`Group::link_made`].
    Make(Slot, Option<Port>),
    /// The queue pair goes to RTR, and to RTS on a server.
    Connect(Slot, Port),
    /// The queue pair goes to RTS.
    ReadyToSend(Slot),
    /// Connections may use the link; the peer's keys on it are known.
    Active(Slot),
    /// First contact is complete.
    Ready,
    /// The link is gone: its connections go on by the other, if there is one. Destroy the queue pair.
    Lost(Slot, Option<Slot>),
    /// The peer's ends of all links that were lost are gone as well.
    Gone,
    /// A client would like another link, from one of these ports: [`Group::add_link`], if there is a place for it.
    Asked(Vec<Gid>),
    /// The peer has taken its buffer of that index back.
    Deleted(usize),
    /// The peer may write to the buffer of that index; or it will not.
    Confirmed(usize, bool),
    /// Everything ends.
    Ended(Ended),
}

/// The answer to [`Action::Make`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// The queue pair.
    pub own: Port,
    /// Which of the peer's ports it is for.
    pub target: Gid,
    /// Our buffers' keys on it, by index.
    pub keys: Vec<Key>,
}

/// A group's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Which end.
    pub role: Role,
    /// Of CLC and LLC.
    pub version: Version,
    /// Links that both ends support.
    pub max_links: u8,
    /// Connections that both support.
    pub max_conns: u8,
}

/// A link group.
#[derive(Clone, Debug)]
pub struct Group {
    terms: Terms,
    links: [Option<Link>; LINKS],
    last_id: u8,
    /// Our buffers and the peer's, with their keys on each link.
    own: Vec<Option<Keys>>,
    peers: Vec<Option<Keys>>,
    flow: Flow,
    /// A CONFIRM RKEY of ours: buffer, link, deadline.
    rkey: Option<(usize, Slot, Ms)>,
    waiting_rkeys: VecDeque<usize>,
    parked: Option<(Slot, Llc)>,
    /// Links that are lost here, and until when the peer's end of each may be there.
    lost: Vec<(u8, Ms)>,
    /// Keys that the peer is to forget and has not said so: by link, and on which it was told.
    forgotten: Vec<(Keys, Slot)>,
    /// The peer's keys on the link that was lost last, with their buffers' indices.
    former: Vec<(Key, usize)>,
    ready: bool,
    /// The client has had the ADD LINK that it waits for at first contact.
    offered: bool,
    wants_link: bool,
    ended: Option<Ended>,
    actions: VecDeque<Action>,
}

impl Group {
    /// First contact: the link of the CLC handshake, both ends known, in slot 0. `own` and `peer` are the first
    /// buffers, whose keys the handshake itself has told.
    #[must_use]
    pub fn first_contact(terms: Terms, ends: (Port, Port), own: Key, peer: Key, now: Ms) -> Self {
        let link = Link {
            id: 0,
            own: ends.0,
            peer: Some(ends.1),
            state: LinkState::Unconfirmed,
            heard: now,
            probe: None,
        };
        let first = |key| vec![Some([Some(key), None, None])];
        let mut group = Self {
            terms,
            links: [Some(link), None, None],
            last_id: 0,
            own: first(own),
            peers: first(peer),
            flow: Flow::None,
            rkey: None,
            waiting_rkeys: VecDeque::new(),
            parked: None,
            lost: Vec::new(),
            forgotten: Vec::new(),
            former: Vec::new(),
            ready: false,
            offered: false,
            wants_link: false,
            ended: None,
            actions: VecDeque::new(),
        };
        group.confirm(0, now + CONFIRM_FIRST[terms.role as usize]);
        group
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether there is something to be done.
    #[must_use]
    pub fn has_action(&self) -> bool {
        !self.actions.is_empty()
    }

    /// Which end it is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.terms.role
    }

    /// Whether it has ended, and why.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// Links that connections may use.
    pub fn active(&self) -> impl Iterator<Item = Slot> + '_ {
        (0..LINKS).filter(|s| self.link(*s).is_some_and(|l| l.state == LinkState::Active))
    }

    /// The peer's name of the link, its number: what `smc ss` shows, and a subsequent contact's queue pair.
    #[must_use]
    pub fn ends(&self, slot: Slot) -> Option<(u8, Port, Option<Port>)> {
        self.link(slot).map(|l| (l.id, l.own, l.peer))
    }

    /// The active link that a server has named in an Accept.
    #[must_use]
    pub fn find(&self, peer_qpn: u32, gid: &Gid) -> Option<Slot> {
        self.active()
            .find(|s| self.link(*s).and_then(|l| l.peer).is_some_and(|p| p.qpn == peer_qpn && p.gid == *gid))
    }

    /// How to write to the peer's buffer that has this key on that link, on this one.
    #[must_use]
    pub fn peer_key(&self, index: usize, slot: Slot) -> Option<Key> {
        self.peers.get(index)?.as_ref()?.get(slot).copied().flatten()
    }

    /// The index of the peer's buffer that has this key on that link: from an Accept or Confirm.
    #[must_use]
    pub fn peer_buffer(&self, slot: Slot, rkey: u32) -> Option<usize> {
        let has = |k: &Option<Keys>| matches!(k, Some(k) if k.get(slot).copied().flatten().is_some_and(|k| k.rkey == rkey));
        self.peers.iter().position(has)
    }

    /// The index of the peer's buffer that has this key on any link, or had on the one that was lost last.
    #[must_use]
    pub fn peer_has(&self, key: Key) -> Option<usize> {
        let now = |k: &Option<Keys>| matches!(k, Some(k) if k.contains(&Some(key)));
        let former = || self.former.iter().find(|(k, _)| *k == key).map(|(_, index)| *index);
        self.peers.iter().position(now).or_else(former)
    }

    /// The peer's keys of the buffer of that index, by link.
    #[must_use]
    pub fn peer_keys(&self, index: usize) -> Option<Keys> {
        self.peers.get(index).copied().flatten()
    }

    /// Whether there could be another link, and nothing is being done about links.
    #[must_use]
    pub fn lacks_link(&self) -> bool {
        self.ready && self.ended.is_none() && self.flow == Flow::None && self.free_slot().is_some()
    }

    fn first_active(&self) -> Option<Slot> {
        self.active().next()
    }

    fn link(&self, slot: Slot) -> Option<&Link> {
        self.links.get(slot)?.as_ref()
    }

    fn link_mut(&mut self, slot: Slot) -> Option<&mut Link> {
        self.links.get_mut(slot)?.as_mut()
    }

    fn named(&self, id: u8) -> Option<Slot> {
        (0..LINKS).find(|s| id != 0 && self.link(*s).is_some_and(|l| l.id == id))
    }

    fn send(&mut self, slot: Slot, response: bool, body: Body) {
        let version = self.terms.version;
        self.actions.push_back(Action::Send(slot, Llc { version, response, body }));
    }

    /// Ends the group: what was to be done is not done any more.
    fn end(&mut self, why: Ended) {
        if self.ended.is_none() {
            self.ended = Some(why);
            self.flow = Flow::None;
            self.rkey = None;
            self.parked = None;
            self.actions.push_back(Action::Ended(why));
        }
    }

    // Confirming links.

    /// The server asks; a client waits to be asked.
    fn confirm(&mut self, slot: Slot, until: Ms) {
        if self.terms.role == Role::Server {
            self.last_id = self.last_id.wrapping_add(1).max(1);
            let id = self.last_id;
            let fresh = self.link_mut(slot).is_some_and(|l| {
                let fresh = l.id == 0;
                l.id = if fresh { id } else { l.id };
                fresh
            });
            if !fresh {
                self.last_id -= 1;
            }
            self.say_confirm(slot, false);
        }
        self.flow = Flow::Confirm { slot, until };
    }

    fn say_confirm(&mut self, slot: Slot, response: bool) {
        let Some(link) = self.link(slot).copied() else { return };
        let body = Body::ConfirmLink(ConfirmLink {
            mac: link.own.mac,
            gid: link.own.gid,
            qpn: link.own.qpn,
            link: link.id,
            uid: link.own.qpn,
            max_links: self.terms.max_links,
            max_conns: self.terms.max_conns,
            no_eyecatcher: true,
        });
        self.send(slot, response, body);
    }

    fn on_confirm_link(&mut self, slot: Slot, response: bool, c: &ConfirmLink, now: Ms) {
        let expected = matches!(self.flow, Flow::Confirm { slot: s, .. } if s == slot);
        if !expected || response != (self.terms.role == Role::Server) {
            return;
        }
        if !c.no_eyecatcher {
            return self.end(Ended::Eyecatcher);
        }
        let server = self.terms.role == Role::Server;
        let Some(link) = self.link_mut(slot) else { return };
        let same = link.peer.is_some_and(|p| p.qpn == c.qpn && p.gid == c.gid);
        if !same || server && c.link != link.id || !server && c.link == 0 {
            return self.end(Ended::Misbehaved(Misbehaved::OtherLink));
        }
        link.id = c.link;
        link.state = LinkState::Active;
        if !server {
            self.actions.push_back(Action::ReadyToSend(slot));
            self.say_confirm(slot, true);
        }
        self.actions.push_back(Action::Active(slot));
        self.flow = Flow::None;
        if !self.ready {
            self.ready = true;
            self.actions.push_back(Action::Ready);
            if self.terms.max_links > 1 {
                // Linux waits for the question of a second link.
                return match self.terms.role {
                    Role::Server => self.offer(now),
                    Role::Client => self.flow = Flow::AwaitOffer { until: now + ANSWER },
                };
            }
        }
        self.idle(now);
    }

    // Adding links.

    /// Another link would be welcome. (A client leaves it to the server, see [`Self::ask_link`].)
    pub fn add_link(&mut self, now: Ms) {
        if self.terms.role == Role::Server && self.ended.is_none() {
            self.wants_link = true;
            self.run(now);
        }
    }

    /// A client asks for another link, which may end at one of these ports.
    pub fn ask_link(&mut self, gids: &[Gid]) {
        let via = self.first_active().filter(|_| self.terms.role == Role::Client && self.ended.is_none());
        let Some((via, link)) = via.and_then(|v| Some((v, *self.link(v)?))) else { return };
        let body = match self.terms.version {
            Version::V2 => Body::RequestAddLink { gids: gids.to_vec() },
            // Version 1 has no message for that: an offer of a client's is one.
            Version::V1 => Body::AddLink(add_link(&Port { qpn: 0, psn: 0, ..link.own }, 0, None)),
        };
        self.send(via, false, body);
    }

    fn count(&self) -> usize {
        self.links.iter().flatten().count()
    }

    fn free_slot(&self) -> Option<Slot> {
        let most = usize::from(self.terms.max_links).min(LINKS);
        if self.count() < most { self.links.iter().position(Option::is_none) } else { None }
    }

    /// The server's offer begins with a queue pair; without one, it is an offer of nothing.
    fn offer(&mut self, now: Ms) {
        let Some(via) = self.first_active() else { return };
        match self.free_slot() {
            Some(slot) => {
                self.flow = Flow::Making { slot, via, offer: None };
                self.actions.push_back(Action::Make(slot, None));
            }
            None => self.offer_nothing(via, now),
        }
    }

    fn offer_nothing(&mut self, via: Slot, now: Ms) {
        if std::mem::replace(&mut self.offered, true) {
            // Nobody waits for it.
            self.flow = Flow::None;
            return self.idle(now);
        }
        let Some(link) = self.link(via).copied() else { return };
        let a = add_link(&Port { qpn: 0, psn: 0, ..link.own }, 0, None);
        self.send(via, false, Body::AddLink(AddLink { mtu: None, ..a }));
        self.flow = Flow::Offered { slot: None, via, until: now + ANSWER };
    }

    /// How many places for buffers there are: as many keys make up an answer to [`Action::Make`].
    #[must_use]
    pub fn buffers(&self) -> usize {
        self.own.len()
    }

    /// The queue pair that [`Action::Make`] asked for; or none could be made. False: nobody wants it any more, destroy
    /// it.
    #[must_use]
    pub fn link_made(&mut self, slot: Slot, made: Option<Made>, now: Ms) -> bool {
        let (via, offer) = match &self.flow {
            Flow::Making { slot: s, via, offer } if *s == slot => (*via, offer.clone()),
            _ => return false,
        };
        let Some(Made { own, target, keys }) = made.filter(|m| m.keys.len() == self.own.len()) else {
            match offer {
                None => self.offer_nothing(via, now),
                Some(a) => self.reject(via, &a, now),
            }
            return false;
        };
        for (buffer, key) in self.own.iter_mut().zip(keys) {
            if let Some(place) = buffer.as_mut().and_then(|b| b.get_mut(slot)) {
                *place = Some(key);
            }
        }
        let peer = offer.as_ref().and_then(port_of);
        let id = match &offer {
            Some(a) => a.link,
            None => {
                self.last_id = self.last_id.wrapping_add(1).max(1);
                self.last_id
            }
        };
        let state = LinkState::Unconfirmed;
        if let Some(place) = self.links.get_mut(slot) {
            *place = Some(Link { id, own, peer, state, heard: now, probe: None });
        }
        let v2 = self.terms.version == Version::V2;
        let keys = self.new_keys(via, slot);
        let ext = v2.then(|| AddLinkV2 { direct: true, target, keys: keys.clone() });
        self.send(via, offer.is_some(), Body::AddLink(add_link(&own, id, ext)));
        let Some(a) = offer else {
            self.offered = true;
            self.flow = Flow::Offered { slot: Some(slot), via, until: now + ANSWER };
            return true;
        };
        // The queue pair listens before the server hears of it: nothing that it sends is too early. The action
        // therefore goes before the response.
        if let (Some(peer), Some(response)) = (peer, self.actions.pop_back()) {
            self.actions.push_back(Action::Connect(slot, peer));
            self.actions.push_back(response);
        }
        if let Some(v2) = &a.v2 {
            self.learn(via, slot, &v2.keys);
            self.flow = Flow::Confirm { slot, until: now + CONFIRM_ADDED };
        } else {
            self.flow = Flow::Keys { slot, via, mine: keys, until: now + ANSWER };
        }
        true
    }

    /// Our buffers' keys on a new link, by those on the old one.
    fn new_keys(&self, via: Slot, slot: Slot) -> Vec<NewKey> {
        let one = |k: &Keys| {
            let (old, new) = (k.get(via).copied().flatten()?, k.get(slot).copied().flatten()?);
            Some(NewKey { on_this: old.rkey, on_new: new.rkey, addr: new.addr })
        };
        self.own.iter().flatten().filter_map(one).collect()
    }

    /// The peer's.
    fn learn(&mut self, via: Slot, slot: Slot, keys: &[NewKey]) {
        for k in keys {
            let index = self.peer_buffer(via, k.on_this);
            let buffer = index.and_then(|i| self.peers.get_mut(i)).and_then(Option::as_mut);
            if let Some(place) = buffer.and_then(|b| b.get_mut(slot)) {
                *place = Some(Key { rkey: k.on_new, addr: k.addr });
            }
        }
    }

    fn reject(&mut self, via: Slot, a: &AddLink, now: Ms) {
        let v2 = None;
        self.send(via, true, Body::AddLink(AddLink { rejected: Some(1), v2, ..a.clone() }));
        self.flow = Flow::None;
        self.idle(now);
    }

    fn on_add_link(&mut self, slot: Slot, response: bool, a: &AddLink, now: Ms) {
        match (self.terms.role, response) {
            (Role::Client, false) => self.on_offer(slot, a, now),
            // A client asks for a link by offering one: a hint.
            (Role::Server, false) => self.actions.push_back(Action::Asked(vec![a.gid])),
            (Role::Server, true) => self.on_offer_answered(slot, a, now),
            (Role::Client, true) => {}
        }
    }

    fn on_offer(&mut self, via: Slot, a: &AddLink, now: Ms) {
        match self.flow {
            Flow::None | Flow::AwaitOffer { .. } => {}
            _ => return,
        }
        match (self.free_slot(), port_of(a)) {
            (Some(slot), Some(port)) if a.link != 0 && self.named(a.link).is_none() => {
                self.flow = Flow::Making { slot, via, offer: Some(a.clone()) };
                self.actions.push_back(Action::Make(slot, Some(port)));
            }
            _ => self.reject(via, a, now),
        }
    }

    fn on_offer_answered(&mut self, from: Slot, a: &AddLink, now: Ms) {
        let Flow::Offered { slot, via, .. } = self.flow else { return };
        // An answer that comes too late is about another link.
        let id = slot.and_then(|s| self.link(s)).map_or(0, |l| l.id);
        if via != from || a.link != id {
            return;
        }
        let Some(slot) = slot else {
            self.flow = Flow::None;
            return self.idle(now);
        };
        let peer = if a.rejected.is_none() { port_of(a) } else { None };
        let Some(peer) = peer else {
            self.remove(slot);
            self.flow = Flow::None;
            return self.idle(now);
        };
        if let Some(link) = self.link_mut(slot) {
            link.peer = Some(peer);
        }
        self.actions.push_back(Action::Connect(slot, peer));
        if let Some(v2) = &a.v2 {
            self.learn(via, slot, &v2.keys);
            return self.confirm(slot, now + CONFIRM_ADDED);
        }
        let mine = self.new_keys(via, slot);
        self.flow = Flow::Keys { slot, via, mine, until: now + ANSWER };
        self.say_keys(now);
    }

    /// The next two of our keys.
    fn say_keys(&mut self, now: Ms) {
        let Flow::Keys { slot, via, mine, until } = &mut self.flow else { return };
        *until = now + ANSWER;
        let (slot, via, remaining) = (*slot, *via, mine.len().min(255) as u8);
        let mut keys = [NewKey::default(); 2];
        keys.iter_mut().zip(mine.drain(..mine.len().min(2))).for_each(|(to, k)| *to = k);
        let link = self.link(slot).map_or(0, |l| l.id);
        let response = self.terms.role == Role::Client;
        self.send(via, response, Body::AddLinkCont { link, remaining, keys });
    }

    fn on_keys(&mut self, from: Slot, link: u8, remaining: u8, keys: &[NewKey; 2], now: Ms) {
        let Flow::Keys { slot, via, .. } = self.flow else { return };
        if via != from || self.named(link) != Some(slot) {
            return;
        }
        let told = usize::from(remaining).min(keys.len());
        self.learn(via, slot, keys.get(..told).unwrap_or_default());
        if self.terms.role == Role::Client {
            self.say_keys(now);
        }
        let Flow::Keys { mine, .. } = &self.flow else { return };
        let more = !mine.is_empty() || remaining > 2;
        match (more, self.terms.role) {
            (true, Role::Server) => self.say_keys(now),
            (true, Role::Client) => {}
            (false, _) => self.confirm(slot, now + CONFIRM_ADDED),
        }
    }

    // Losing links.

    /// Forgets a link and its keys.
    fn remove(&mut self, slot: Slot) {
        let Some(was) = self.links.get_mut(slot).and_then(Option::take) else { return };
        let peers = self.peers.iter().enumerate();
        let keys = peers.filter_map(|(i, k)| Some((k.as_ref()?.get(slot).copied().flatten()?, i)));
        if was.state == LinkState::Active {
            self.former = keys.collect();
        }
        let forgotten = self.forgotten.iter_mut().map(|(keys, _)| keys);
        for buffer in self.own.iter_mut().chain(&mut self.peers).flatten().chain(forgotten) {
            if let Some(key) = buffer.get_mut(slot) {
                *key = None;
            }
        }
        let to = self.first_active();
        self.actions.push_back(Action::Lost(slot, to));
        if self.count() == 0 {
            self.end(Ended::NoLink);
        }
    }

    /// The peer's end of a link that is lost here is gone.
    fn gone(&mut self, id: u8) {
        self.lost.retain(|(lost, _)| *lost != id);
        if self.lost.is_empty() && self.ended.is_none() {
            self.actions.push_back(Action::Gone);
        }
    }

    fn say_lost(&mut self, id: u8) {
        if let Some(via) = self.first_active() {
            let reason = DeleteReason::LOST_PATH;
            let d = DeleteLink { link: id, all: false, orderly: false, reason };
            self.send(via, false, Body::DeleteLink(d));
        }
    }

    /// What was on its way by a lost link, or waits for an answer by it, is said by another.
    fn say_again(&mut self, slot: Slot) {
        for id in self.lost.iter().map(|(id, _)| *id).collect::<Vec<_>>() {
            self.say_lost(id);
        }
        for (keys, told) in std::mem::take(&mut self.forgotten) {
            match told == slot {
                true => self.say_forgotten(keys),
                false => self.forgotten.push((keys, told)),
            }
        }
    }

    /// The queue pair is in error, or the port is down.
    pub fn link_failed(&mut self, slot: Slot, now: Ms) {
        if self.ended.is_some() || self.link(slot).is_none() {
            return;
        }
        let id = self.link(slot).map_or(0, |l| l.id);
        self.cut(slot);
        if self.ended.is_none() {
            if id != 0 {
                self.lost.push((id, now + ANSWER));
            }
            self.say_again(slot);
            self.idle(now);
        }
    }

    /// A link is gone: so are the flows that needed it.
    fn cut(&mut self, slot: Slot) {
        let (target, via) = match self.flow {
            Flow::Confirm { slot, .. } | Flow::Deleting { slot, .. } => (Some(slot), None),
            Flow::Making { slot, via, .. } | Flow::Keys { slot, via, .. } => (Some(slot), Some(via)),
            Flow::Offered { slot, via, .. } => (slot, Some(via)),
            Flow::None | Flow::AwaitOffer { .. } => (None, None),
        };
        if target == Some(slot) || via == Some(slot) {
            self.flow = Flow::None;
            // What was being added by the lost link has no peer that knows of it.
            if let Some(t) = target.filter(|t| *t != slot) {
                self.remove(t);
            }
        }
        if let Some((buffer, _, _)) = self.rkey.take_if(|(_, s, _)| *s == slot) {
            self.waiting_rkeys.push_front(buffer);
        }
        if self.parked.as_ref().is_some_and(|(s, _)| *s == slot) {
            self.parked = None;
        }
        self.remove(slot);
    }

    fn on_delete_link(&mut self, from: Slot, response: bool, d: &DeleteLink, now: Ms) {
        if d.all && !response {
            self.send(from, true, Body::DeleteLink(d.clone()));
            return self.end(Ended::Peer(d.reason));
        }
        if response {
            // The answer may be to what was said of a link that failed.
            if let Flow::Deleting { slot, .. } = self.flow
                && self.named(d.link) == Some(slot)
            {
                self.cut(slot);
                if self.ended.is_none() {
                    self.say_again(slot);
                    self.idle(now);
                }
            }
            return self.gone(d.link);
        }
        let Some(slot) = self.named(d.link) else {
            let reason = DeleteReason::UNKNOWN_LINK;
            // Both ends may have lost it at once; there is nothing to do but to say so.
            self.send(from, true, Body::DeleteLink(DeleteLink { reason, ..d.clone() }));
            return self.gone(d.link);
        };
        // A client only asks: the server deletes, and the client answers that.
        let client = self.terms.role == Role::Client;
        let other = self.active().find(|s| *s != slot);
        let via = if from != slot { from } else { other.unwrap_or(from) };
        // Our end goes before the peer hears of it: nothing comes late by it then. But the last word goes by the last link.
        if via == slot {
            self.send(via, client, Body::DeleteLink(d.clone()));
            self.cut(slot);
        } else {
            self.cut(slot);
            self.send(via, client, Body::DeleteLink(d.clone()));
        }
        if self.ended.is_none() {
            self.say_again(slot);
            // Of a path that is lost the peer has no end any more; of another it has one until it hears of ours.
            match d.reason {
                DeleteReason::LOST_PATH => self.gone(d.link),
                _ => self.lost.push((d.link, now + ANSWER)),
            }
            self.idle(now);
        }
    }

    /// Ends the group in order: the peer is told.
    pub fn terminate(&mut self, reason: DeleteReason) {
        if self.ended.is_none() {
            if let Some(via) = self.first_active() {
                self.send(
                    via,
                    false,
                    Body::DeleteLink(DeleteLink { link: 0, all: true, orderly: true, reason }),
                );
            }
            self.end(Ended::Here);
        }
    }

    // Memory keys.

    /// A new buffer, its keys by link. Returns its index; the peer is told, and [`Action::Confirmed`] says when it
    /// has answered. None: there are too many.
    pub fn add_buffer(&mut self, keys: Keys, now: Ms) -> Option<usize> {
        let index = place(&mut self.own, keys)?;
        self.waiting_rkeys.push_back(index);
        self.run(now);
        Some(index)
    }

    /// The peer shall write to that buffer no more.
    pub fn delete_buffer(&mut self, index: usize) {
        let Some(keys) = self.own.get_mut(index).and_then(Option::take) else { return };
        self.waiting_rkeys.retain(|w| *w != index);
        // The answer on its way is not to the next buffer with this index.
        if let Some((told, ..)) = self.rkey.as_mut().filter(|(told, ..)| *told == index) {
            *told = usize::MAX;
        }
        self.say_forgotten(keys);
    }

    fn say_forgotten(&mut self, keys: Keys) {
        let via = self.first_active();
        if let Some((via, key)) = via.and_then(|v| Some((v, keys.get(v).copied().flatten()?))) {
            let d = DeleteRkey { keys: vec![key.rkey], negative: false, unknown: 0 };
            self.send(via, false, Body::DeleteRkey(d));
            self.forgotten.push((keys, via));
        }
    }

    fn on_confirm_rkey(&mut self, from: Slot, response: bool, c: &ConfirmRkey, now: Ms) {
        if response {
            let Some((buffer, _, _)) = self.rkey.take_if(|(_, s, _)| *s == from) else { return };
            self.actions.push_back(Action::Confirmed(buffer, c.answer == RkeyAnswer::Done));
            return self.idle(now);
        }
        let mut keys = [None; LINKS];
        let mut put = |slot: Slot, key| keys.get_mut(slot).map(|k| *k = Some(key));
        put(from, Key { rkey: c.rkey, addr: c.addr });
        for k in c.others.iter() {
            if let Some(slot) = self.named(k.link) {
                put(slot, Key { rkey: k.rkey, addr: k.addr });
            }
        }
        // Told before, by a link that is lost; or another buffer, and the word of the one before it was lost.
        let known = self.peer_buffer(from, c.rkey);
        if let Some(index) = known.filter(|i| self.peer_key(*i, from).is_some_and(|k| k.addr != c.addr)) {
            self.actions.push_back(Action::Deleted(index));
        }
        let done = match known.and_then(|i| self.peers.get_mut(i)) {
            Some(known) => known.replace(keys).is_some(),
            None => place(&mut self.peers, keys).is_some(),
        };
        let answer = if done { RkeyAnswer::Done } else { RkeyAnswer::Negative };
        self.send(from, true, Body::ConfirmRkey(ConfirmRkey { answer, ..c.clone() }));
    }

    fn on_delete_rkey(&mut self, from: Slot, response: bool, d: &DeleteRkey) {
        if response {
            let said = |k: &Keys| k.get(from).copied().flatten().is_some_and(|k| d.keys.contains(&k.rkey));
            return self.forgotten.retain(|(keys, told)| *told != from || !said(keys));
        }
        let (mut mask, mut unknown) = (0u8, 0u8);
        for (i, key) in d.keys.iter().enumerate() {
            match self.peer_buffer(from, *key) {
                Some(index) => {
                    if let Some(buffer) = self.peers.get_mut(index) {
                        *buffer = None;
                    }
                    self.former.retain(|(_, i)| *i != index);
                    self.actions.push_back(Action::Deleted(index));
                }
                None => {
                    mask |= 0x80u8.checked_shr(i as u32).unwrap_or(0);
                    unknown = unknown.saturating_add(1);
                }
            }
        }
        let told = if self.terms.version == Version::V1 { mask } else { unknown };
        let d = DeleteRkey { negative: unknown > 0, unknown: told, ..d.clone() };
        self.send(from, true, Body::DeleteRkey(d));
    }

    // The rest.

    /// A flow is over: what has waited for that begins.
    fn idle(&mut self, now: Ms) {
        if self.flow != Flow::None || self.ended.is_some() {
            return;
        }
        if let Some((slot, llc)) = self.parked.take() {
            self.handle(slot, llc, now);
        }
        self.run(now);
    }

    /// Begins what waits, if it may.
    fn run(&mut self, now: Ms) {
        if self.flow != Flow::None || self.rkey.is_some() || self.ended.is_some() || !self.ready {
            return;
        }
        if std::mem::take(&mut self.wants_link) && self.free_slot().is_some() {
            return self.offer(now);
        }
        let Some(via) = self.first_active() else { return };
        while let Some(buffer) = self.waiting_rkeys.pop_front() {
            let Some(keys) = self.own.get(buffer).copied().flatten() else { continue };
            let Some(first) = keys.get(via).copied().flatten() else {
                self.actions.push_back(Action::Confirmed(buffer, false));
                continue;
            };
            let mut others = Few::new();
            for slot in self.active().filter(|s| *s != via) {
                let (id, key) = (self.link(slot).map_or(0, |l| l.id), keys.get(slot).copied().flatten());
                if let Some(k) = key {
                    // Two others at most: there are three slots.
                    let _ = others.push(LinkKey { link: id, rkey: k.rkey, addr: k.addr });
                }
            }
            let c = ConfirmRkey { rkey: first.rkey, addr: first.addr, others, answer: RkeyAnswer::Done };
            self.send(via, false, Body::ConfirmRkey(c));
            self.rkey = Some((buffer, via, now + ANSWER));
            return;
        }
    }

    /// Something came by this link: a CDC message too shows that it is alive.
    pub fn heard(&mut self, slot: Slot, now: Ms) {
        if let Some(link) = self.link_mut(slot) {
            link.heard = now;
            link.probe = None;
        }
    }

    /// What a SEND on this link has brought that is no CDC message.
    pub fn handle_bytes(&mut self, slot: Slot, bytes: &[u8], now: Ms) {
        if self.ended.is_some() || self.link(slot).is_none() {
            return;
        }
        self.heard(slot, now);
        match Llc::decode(bytes) {
            Ok(llc) if llc.version == self.terms.version => self.handle(slot, llc, now),
            Ok(_) => self.violated(slot, crate::wire::smcr::llc::Malformed::Version),
            Err(e) => self.violated(slot, e),
        }
    }

    fn violated(&mut self, via: Slot, e: crate::wire::smcr::llc::Malformed) {
        let reason = DeleteReason::VIOLATION;
        self.send(via, false, Body::DeleteLink(DeleteLink { link: 0, all: true, orderly: true, reason }));
        self.end(Ended::Misbehaved(Misbehaved::Llc(e)));
    }

    fn handle(&mut self, slot: Slot, llc: Llc, now: Ms) {
        let response = llc.response;
        let changes_links =
            matches!(llc.body, Body::AddLink(_) | Body::DeleteLink(_) | Body::RequestAddLink { .. });
        // Keys that are on their way would miss the link that is offered.
        let telling = self.rkey.is_some() && matches!(llc.body, Body::AddLink(_));
        let busy = match self.flow {
            _ if telling && self.terms.role == Role::Client => true,
            Flow::None | Flow::AwaitOffer { .. } => false,
            // The link that is being added is given up by the server: the flow hears of it at once.
            _ => !matches!(&llc.body, Body::DeleteLink(d) if d.all || self.is_adding(d.link)),
        };
        if changes_links && !response && busy {
            if self.parked.is_none() {
                self.parked = Some((slot, llc));
            }
            return;
        }
        match &llc.body {
            Body::ConfirmLink(c) => self.on_confirm_link(slot, response, c, now),
            Body::AddLink(a) => self.on_add_link(slot, response, a, now),
            Body::AddLinkCont { link, remaining, keys } => self.on_keys(slot, *link, *remaining, keys, now),
            Body::DeleteLink(d) => self.on_delete_link(slot, response, d, now),
            Body::RequestAddLink { gids } if self.terms.role == Role::Server => {
                self.actions.push_back(Action::Asked(gids.clone()));
            }
            Body::RequestAddLink { .. } => {}
            Body::ConfirmRkey(c) => self.on_confirm_rkey(slot, response, c, now),
            Body::DeleteRkey(d) => self.on_delete_rkey(slot, response, d),
            Body::TestLink(data) if !response => self.send(slot, true, Body::TestLink(*data)),
            // That it was heard is all.
            Body::TestLink(_) => {}
        }
    }

    fn is_adding(&self, id: u8) -> bool {
        let slot = match self.flow {
            Flow::Confirm { slot, .. } | Flow::Keys { slot, .. } => Some(slot),
            Flow::Offered { slot, .. } => slot,
            _ => None,
        };
        slot.is_some() && self.named(id) == slot
    }

    /// When [`Self::tick`] is due next.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        let flow = match self.flow {
            Flow::Confirm { until, .. } | Flow::AwaitOffer { until } | Flow::Offered { until, .. } => {
                Some(until)
            }
            Flow::Keys { until, .. } | Flow::Deleting { until, .. } => Some(until),
            Flow::None | Flow::Making { .. } => None,
        };
        let links = self.links.iter().flatten().filter(|l| l.state == LinkState::Active);
        let idle = links.map(|l| l.probe.unwrap_or(l.heard + IDLE)).min();
        let gone = self.lost.iter().map(|(_, until)| *until).min();
        let all = [flow, self.rkey.map(|(_, _, until)| until), idle, gone];
        if self.ended.is_some() { None } else { all.into_iter().flatten().min() }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Ms) {
        if self.ended.is_some() {
            return;
        }
        match self.flow {
            Flow::Confirm { until, .. } if now >= until && !self.ready => return self.end(Ended::Timeout),
            Flow::Confirm { slot, until } | Flow::Keys { slot, until, .. } if now >= until => {
                self.link_failed(slot, now);
            }
            Flow::AwaitOffer { until } if now >= until => {
                self.flow = Flow::None;
                self.idle(now);
            }
            Flow::Offered { slot, until, .. } if now >= until => match slot {
                Some(slot) => self.link_failed(slot, now),
                None => {
                    self.flow = Flow::None;
                    self.idle(now);
                }
            },
            // The request may have gone down with its link: the peer is told again, by another.
            Flow::Deleting { slot, until } if now >= until => self.link_failed(slot, now),
            _ => {}
        }
        // By then nothing is on its way any more. A Linux server that has lost a link as well does not answer.
        for (id, _) in self.lost.iter().copied().filter(|(_, until)| now >= *until).collect::<Vec<_>>() {
            self.gone(id);
        }
        if let Some((_, slot, _)) = self.rkey.filter(|(_, _, until)| now >= *until) {
            self.link_failed(slot, now);
        }
        for slot in 0..LINKS {
            let Some(link) = self.link_mut(slot).filter(|l| l.state == LinkState::Active) else { continue };
            match link.probe {
                Some(until) if now >= until => self.link_failed(slot, now),
                None if now >= link.heard + IDLE => {
                    link.probe = Some(now + ANSWER);
                    self.send(slot, false, Body::TestLink(*b"libsmc keepalive"));
                }
                _ => {}
            }
        }
    }

    /// A link is to go in order: the server deletes it, a client asks for that.
    pub fn delete_link(&mut self, slot: Slot, reason: DeleteReason, now: Ms) {
        let id = self.link(slot).map_or(0, |l| l.id);
        let via = self.active().find(|s| *s != slot);
        if let (Some(via), Flow::None, true) = (via, &self.flow, id != 0) {
            self.send(
                via,
                false,
                Body::DeleteLink(DeleteLink { link: id, all: false, orderly: true, reason }),
            );
            if self.terms.role == Role::Server {
                self.flow = Flow::Deleting { slot, until: now + ANSWER };
            }
        }
    }
}

/// ADD LINK about this end.
fn add_link(own: &Port, link: u8, v2: Option<AddLinkV2>) -> AddLink {
    let Port { mac, gid, qpn, psn, mtu } = *own;
    AddLink { mac, gid, qpn, link, mtu: Some(mtu), psn, rejected: None, v2 }
}

/// The other end as ADD LINK tells it; none: there is none.
fn port_of(a: &AddLink) -> Option<Port> {
    let AddLink { mac, gid, qpn, psn, mtu, .. } = *a;
    mtu.map(|mtu| Port { mac, gid, qpn, psn, mtu })
}

/// The first free place.
fn place(buffers: &mut Vec<Option<Keys>>, keys: Keys) -> Option<usize> {
    match buffers.iter().position(Option::is_none) {
        Some(i) => {
            if let Some(b) = buffers.get_mut(i) {
                *b = Some(keys);
            }
            Some(i)
        }
        None if buffers.len() < RMBS => {
            buffers.push(Some(keys));
            Some(buffers.len() - 1)
        }
        None => None,
    }
}
