//! The handshake of one connection: the CLC machine, and what it has made of link groups and memory.
//!
//! ```text
//!  server  Proposal: a group with room ── our buffer is told ──> Accept ── Confirm ──> done
//!                    one in the making ── when it is ready ──^
//!                    none: first contact ── Accept ── Confirm ── CONFIRM LINK ──> done
//!  client  Accept:   the group that it names ── our buffer is told ──> Confirm, done
//!                    first contact ── Confirm ── CONFIRM LINK ──> done
//! ```
//!
//! A link group has two links where both ends have a second device: release 2.1 lets either ask for one.

use smc::smcr::Ms;
use smc::smcr::group::{Key, Port, Role, Slot, Terms};
use smc::smcr::rendezvous::{Rendezvous, Step, agreed, common_eid};
use smc::smcr::stream::{Sizes, Stream};
use smc::sys;
use smc::wire::smcr::cdc::Cdc;
use smc::wire::smcr::clc::{Endpoint, FirstContact, LIBSMC, Local, OfferV2, PartV2, Proposal};
use smc::wire::smcr::{Diagnosis, Eid, Few, Gid, PeerId, RmbeSize, Version};

use super::flow::{Ends, Flow};
use super::lgr::{Found, Lgrs, Part, Peer, Seat, Who};
use super::link::Link;
use super::nic::{self, Nic, Place};
use super::page::Page;
use crate::device::Domain;

/// Linux.
const OS: u8 = 2;
/// Release 2.1, in which the ends agree on numbers of links and connections.
const RELEASE: u8 = 1;
const MAX_CONNS: u8 = 255;
/// How long bytes wait for the peer's first message, as in the kernel. A client sends one with its program's first
/// call, and may make none; a server answers when its program has accepted the connection.
const PATIENCE: Ms = 6_000;
/// Bytes that begin like a CLC message and do not go on are the program's after so long.
pub const START_WAIT: Ms = 2_000;

/// What all connections of the process have in common.
#[derive(Debug)]
pub struct Common {
    /// EIDs of this host.
    pub eids: Vec<Eid>,
    /// Random, for this process.
    pub salt: [u8; 2],
}

/// What a handshake works with.
#[derive(Debug)]
pub struct Around<'a> {
    /// What all connections have in common.
    pub common: &'a Common,
    /// The link groups.
    pub lgrs: &'a mut Lgrs,
    /// The devices.
    pub nics: &'a [Nic],
    /// The connection's number in the service.
    pub id: u32,
    /// The time.
    pub now: Ms,
}

/// This end, as the peer is to know it.
#[derive(Debug)]
struct Mine {
    part: Part,
    /// First contact: the queue pair, before the other end is known.
    half: Option<Link>,
    size: RmbeSize,
}

/// What is waited for, apart from the peer's next message.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant)]
enum Wait {
    Nothing,
    /// Server: for a group in the making.
    Group(Proposal),
    /// For the answer to CONFIRM RKEY; then our end is told, with a ring of that size.
    Key(Eid, RmbeSize),
}

/// See the module.
#[derive(Debug)]
pub struct Greeting {
    /// The machine.
    pub clc: Rendezvous,
    /// A message of the peer's has come.
    pub met: bool,
    /// Since when the program's bytes wait.
    pub waits: Option<Ms>,
    /// Since when there are bytes of the peer's that are not a message yet, and may be none.
    pub begun: Option<Ms>,
    /// The connection on its link, once both ends are known.
    pub flow: Option<Flow>,
    /// What the peer has sent before that.
    pub early: Vec<Cdc>,
    local: Local,
    client: bool,
    /// What was offered: by us, or to us.
    offer: Option<OfferV2>,
    wait: Wait,
    /// Our own end, until the connection is on its link.
    mine: Option<Mine>,
    /// A server's Accept; a client's is the peer's.
    accept: Option<Endpoint>,
}

fn random() -> [u8; 8] {
    let (a, b) = (sys::random_u32().to_ne_bytes(), sys::random_u32().to_ne_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

fn host() -> [u8; 32] {
    let mut host = [0; 32];
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    host.iter_mut().zip(name.trim().bytes()).for_each(|(to, b)| *to = b);
    host
}

impl Greeting {
    /// The beginning; with what a client says first. Without a place that is a Decline, as is a server's answer.
    pub fn new(client: bool, place: Option<&Place>, at: &Around<'_>) -> (Self, Option<Step>) {
        let (common, now) = (at.common, at.now);
        let (gid, mac) = place.map_or_else(Default::default, |p| (p.gid.gid, p.gid.mac));
        let (m, [a, b]) = (mac.0, common.salt);
        let me = PeerId([a, b, m[0], m[1], m[2], m[3], m[4], m[5]]);
        let local = Local { peer: me, gid, mac };
        let offer = client.then(|| OfferV2 {
            release: RELEASE,
            gid: local.gid,
            max_conns: MAX_CONNS,
            max_links: place.map_or(1, |p| max_links(p, at.nics)),
            eids: Few::of(&common.eids).unwrap_or_default(),
            ..OfferV2::default()
        });
        let (clc, step) = match offer {
            Some(o) => {
                let p = Proposal { version: Version::V2, local, area: None, v1: None, v2: Some(o) };
                let (mut clc, propose) = Rendezvous::propose(p, now);
                let step = if place.is_some() { propose } else { clc.give_up(Diagnosis::NO_SMCR_DEVICE) };
                (clc, Some(step))
            }
            None => (Rendezvous::listen(me, now), None),
        };
        let g = Self {
            clc,
            met: false,
            waits: None,
            begun: None,
            flow: None,
            early: Vec::new(),
            local,
            client,
            offer,
            wait: Wait::Nothing,
            mine: None,
            accept: None,
        };
        (g, step)
    }

    /// Whether this end has connected.
    #[must_use]
    pub fn is_client(&self) -> bool {
        self.client
    }

    /// Until when bytes wait for the peer's first message, if any wait: the program's for it to come, or what may be its
    /// beginning for the rest.
    #[must_use]
    pub fn until(&self) -> Option<Ms> {
        let waits = self.waits.map(|at| at + PATIENCE);
        waits.into_iter().chain(self.begun.map(|at| at + START_WAIT)).min()
    }

    /// What was made for this is given back.
    pub fn leave(&mut self, lgrs: &mut Lgrs, now: Ms) {
        let parts = self.mine.take().map(|m| m.part).into_iter().chain(self.flow.take().map(|f| f.part));
        parts.for_each(|part| lgrs.leave(part, now));
    }

    fn who(&self, role: Role, peer: PeerId, eid: Eid, page: &Page) -> Who {
        Who { role, peer, ends: [page.conn().local, page.conn().peer], eid }
    }

    /// Server: what is accepted of a Proposal. None: [`Self::resume`] says it later.
    pub fn choose(
        &mut self,
        p: &Proposal,
        place: Option<&Place>,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Option<Result<Endpoint, Diagnosis>> {
        let Some(place) = place else { return Some(Err(Diagnosis::NO_SMCR_DEVICE)) };
        let offer = match p.v2.ok_or(Diagnosis::NO_V2_EXTENSION) {
            Ok(o) => o,
            Err(why) => return Some(Err(why)),
        };
        let Some(eid) = common_eid(&offer, &at.common.eids) else { return Some(Err(Diagnosis::NO_UEID)) };
        self.offer = Some(offer);
        let who = self.who(Role::Server, p.local.peer, eid, page);
        match at.lgrs.find(&who, at.id) {
            Found::Later => {
                self.wait = Wait::Group(*p);
                None
            }
            Found::Ready(lgr) => {
                let slot = at.lgrs.links(lgr).and_then(|k| k.least()).ok_or(Diagnosis::NO_ACTIVE_LINK);
                slot.and_then(|s| self.join(lgr, s, eid, page, at)).err().map(Err)
            }
            Found::Nothing => Some(self.first(who, &offer, place, page, at)),
        }
    }

    /// Server, first contact.
    fn first(
        &mut self,
        who: Who,
        offer: &OfferV2,
        place: &Place,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Result<Endpoint, Diagnosis> {
        let first = FirstContact {
            direct: true,
            os: OS,
            release: offer.release.min(RELEASE),
            host: host(),
            max_conns: offer.max_conns,
            max_links: offer.max_links.min(max_links(place, at.nics)),
            features: 0,
            vendor: LIBSMC,
        };
        let mine = Mine::new(who, place, page, at)?;
        let v2 = PartV2 { eid: who.eid, first: Some(first), gids: Few::new() };
        let accept = mine.endpoint(&self.local, v2);
        self.mine = Some(mine);
        let accept = accept.ok_or(Diagnosis::INTERNAL)?;
        self.accept = Some(accept);
        Ok(accept)
    }

    /// A connection of a group that there is: the peer is told of our buffer.
    fn join(
        &mut self,
        lgr: u32,
        slot: Slot,
        eid: Eid,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Result<(), Diagnosis> {
        let mine = Mine::joining((lgr, slot), page, at)?;
        self.wait = Wait::Key(eid, mine.size);
        self.mine = Some(mine);
        Ok(())
    }

    /// Our end, by the link that it goes by now.
    fn end(&self, eid: Eid, size: RmbeSize, lgrs: &mut Lgrs) -> Option<Endpoint> {
        let (seat, v2) = (self.seat()?, PartV2 { eid, first: None, gids: Few::new() });
        let (own, key) = lgrs.links(seat.lgr)?.end(seat.token)?;
        Some(endpoint(&self.local, &own, key, (seat.token, size), v2))
    }

    /// What was waited for is there: the peer knows our buffer, or will not; or another look at the groups is due.
    pub fn resume(
        &mut self,
        keyed: Option<(usize, bool)>,
        place: Option<&Place>,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Vec<Step> {
        match (std::mem::replace(&mut self.wait, Wait::Nothing), keyed) {
            (Wait::Group(p), None) => {
                let choice = self.choose(&p, place, page, at);
                choice.map(|c| self.clc.chosen(c, at.now)).into_iter().collect()
            }
            (Wait::Key(eid, size), Some((index, ok))) if self.is_buffer(index) => {
                if let Some(seat) = self.seat().filter(|_| !self.client)
                    && let Some(links) = at.lgrs.links(seat.lgr)
                {
                    links.choose(seat.token);
                }
                let end = self.end(eid, size, at.lgrs).ok_or(Diagnosis::NO_ACTIVE_LINK);
                let end = if ok { end } else { Err(Diagnosis::NO_MEMORY) };
                if self.client {
                    self.clc.prepared(end.map(Some).map_err(|why| (why, false)), at.now)
                } else {
                    self.accept = end.ok();
                    vec![self.clc.chosen(end, at.now)]
                }
            }
            (was, _) => {
                self.wait = was;
                Vec::new()
            }
        }
    }

    fn seat(&self) -> Option<&Seat> {
        self.flow.as_ref().map(|f| &f.part.seat).or(self.mine.as_ref().map(|m| &m.part.seat))
    }

    fn is_buffer(&self, index: usize) -> bool {
        self.seat().is_some_and(|s| s.buffer == Some(index))
    }

    /// The link group that it has a seat in.
    #[must_use]
    pub fn lgr(&self) -> Option<u32> {
        self.seat().map(|s| s.lgr)
    }

    /// The link to the peer's end, receiving. A client's Confirm names its own. None: [`Self::resume`] says it later.
    #[allow(clippy::type_complexity)]
    pub fn prepare(
        &mut self,
        peer: &Endpoint,
        place: Option<&Place>,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Option<Result<Option<Endpoint>, (Diagnosis, bool)>> {
        let prepared = match (self.client, peer.first_contact) {
            (true, true) => place
                .ok_or(Diagnosis::NO_SMCR_DEVICE)
                .and_then(|place| self.prepare_first(peer, place, page, at)),
            (false, true) => self.begin(peer, at).map(|()| None),
            (false, false) => self.known(peer, at).map(|()| None),
            (true, false) => return self.prepare_next(peer, page, at).err().map(Err),
        };
        Some(prepared.map_err(|why| (why, false)))
    }

    /// Client, first contact.
    fn prepare_first(
        &mut self,
        accept: &Endpoint,
        place: &Place,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Result<Option<Endpoint>, Diagnosis> {
        let part = accept.v2.ok_or(Diagnosis::VERSION_MISMATCH)?;
        let who = self.who(Role::Client, accept.local.peer, part.eid, page);
        let mine = Mine::new(who, place, page, at)?;
        let first = part.first.map(|f| FirstContact {
            direct: true,
            os: OS,
            host: host(),
            features: 0,
            vendor: LIBSMC,
            ..f
        });
        let gids = gids(&self.local, at.nics);
        let confirm = mine.endpoint(&self.local, PartV2 { eid: part.eid, first, gids });
        self.mine = Some(mine);
        let mut confirm = confirm.ok_or(Diagnosis::INTERNAL)?;
        confirm.mtu = confirm.mtu.min(accept.mtu);
        self.accept = Some(*accept);
        self.begin(accept, at)?;
        Ok(Some(confirm))
    }

    /// Both ends of a first contact are known.
    fn begin(&mut self, peer: &Endpoint, at: &mut Around<'_>) -> Result<(), Diagnosis> {
        let (offer, accept) =
            (self.offer.ok_or(Diagnosis::INTERNAL)?, self.accept.ok_or(Diagnosis::INTERNAL)?);
        let agreed = agreed(&offer, &accept)?;
        let mine = self.mine.as_mut().ok_or(Diagnosis::INTERNAL)?;
        let half = mine.half.take().ok_or(Diagnosis::SYNC_ERROR)?;
        let role = if self.client { Role::Client } else { Role::Server };
        let (max_links, max_conns) = (agreed.max_links, agreed.max_conns);
        let terms = Terms { role, version: Version::V2, max_links, max_conns };
        let Local { mac, gid, .. } = peer.local;
        let theirs = Peer {
            port: Port { mac, gid, qpn: peer.qpn, psn: peer.psn, mtu: peer.mtu.min(half.own.mtu) },
            key: key_of(peer),
            offset: offset_of(peer),
            kin: peer.v2.and_then(|v| v.first).is_some_and(|f| f.vendor == LIBSMC),
            ports: peer.v2.map(|v| v.gids.iter().copied().collect()).unwrap_or_default(),
        };
        let not_ready = |_| Diagnosis::INTERNAL_READY_LINK;
        at.lgrs.begin(&mine.part, half, theirs, terms, at.now).map_err(not_ready)?;
        self.flow(peer, at)
    }

    /// Server: the Confirm of a connection of a group that there is.
    fn known(&mut self, peer: &Endpoint, at: &mut Around<'_>) -> Result<(), Diagnosis> {
        let mine = self.mine.as_ref().filter(|m| m.half.is_none()).ok_or(Diagnosis::SYNC_ERROR)?;
        // A buffer that the link has not told of is not this peer's.
        if !at.lgrs.claim(&mine.part.seat, key_of(peer), offset_of(peer)) {
            return Err(Diagnosis::INTERNAL_RTOKEN);
        }
        self.flow(peer, at)
    }

    /// Client: the Accept of a connection of a group that there should be.
    fn prepare_next(
        &mut self,
        accept: &Endpoint,
        page: &Page,
        at: &mut Around<'_>,
    ) -> Result<(), (Diagnosis, bool)> {
        let eid = accept.v2.map(|v| v.eid).ok_or((Diagnosis::VERSION_MISMATCH, false))?;
        let who = self.who(Role::Client, accept.local.peer, eid, page);
        // Of a group that is known the link may have been lost meanwhile.
        let none =
            |known| if known { (Diagnosis::NO_SUCH_LINK, false) } else { (Diagnosis::SYNC_ERROR, true) };
        let (lgr, slot) = at.lgrs.named(&who, accept.qpn, &accept.local.gid).map_err(none)?;
        let sure = |why| (why, false);
        self.join(lgr, slot, eid, page, at).map_err(sure)?;
        let seat = self.mine.as_ref().map(|m| &m.part.seat);
        if !seat.is_some_and(|s| at.lgrs.claim(s, key_of(accept), offset_of(accept))) {
            return Err(sure(Diagnosis::INTERNAL_RTOKEN));
        }
        self.flow(accept, at).map_err(sure)
    }

    /// The connection is on its link.
    fn flow(&mut self, peer: &Endpoint, at: &mut Around<'_>) -> Result<(), Diagnosis> {
        let Mine { part, size, .. } = self.mine.take().ok_or(Diagnosis::INTERNAL)?;
        let sizes = Sizes { send: size.bytes(), peer: peer.size.bytes(), own: size.bytes() };
        let (stream, kin) = (Stream::new(sizes, peer.token), at.lgrs.is_kin(part.seat.lgr));
        self.flow = Some(Flow { part, stream, kin, ends: Ends::default(), ended: None });
        Ok(())
    }
}

/// Links that a group may have: another, if there is another device.
fn max_links(place: &Place, nics: &[Nic]) -> u8 {
    if nic::others(nics, &place.gid.gid).is_empty() { 1 } else { 2 }
}

/// The addresses that links may end at, the first one's first.
fn gids(local: &Local, nics: &[Nic]) -> Few<Gid, 8> {
    let mut all = Few::new();
    let mut others = nic::others(nics, &local.gid).into_iter();
    let _ = all.push(local.gid);
    while others.next().is_some_and(|g| all.push(g)) {}
    all
}

fn key_of(peer: &Endpoint) -> Key {
    Key { rkey: peer.rkey, addr: peer.rmb }
}

/// Of an RMB with several RMBEs, one is the connection's.
fn offset_of(peer: &Endpoint) -> u64 {
    u64::from(peer.rmbe.saturating_sub(1)) * u64::from(peer.size.bytes())
}

impl Mine {
    /// For first contact: a queue pair of its own.
    fn new(who: Who, place: &Place, page: &Page, at: &mut Around<'_>) -> Result<Self, Diagnosis> {
        let r = random();
        let psn = u32::from_be_bytes([0, r[0], r[1], r[2]]);
        let domain = Domain::new(&place.nic.device).map_err(|_| Diagnosis::NO_MEMORY)?;
        let half = Link::new(&domain, place, psn).map_err(|_| Diagnosis::NO_MEMORY)?;
        let (rmb, buffer) = page.register(&domain).map_err(|_| Diagnosis::NO_MEMORY)?;
        let size = ring_of(page)?;
        let seat = at.lgrs.found(who, at.id, at.now);
        Ok(Self { part: Part { seat, rmb, buffer }, half: Some(half), size })
    }

    /// For a group that there is.
    fn joining((lgr, slot): (u32, Slot), page: &Page, at: &mut Around<'_>) -> Result<Self, Diagnosis> {
        let domain = at.lgrs.domain(lgr).ok_or(Diagnosis::NO_ACTIVE_LINK)?;
        let (rmb, buffer) = page.register(&domain).map_err(|_| Diagnosis::NO_MEMORY)?;
        let size = ring_of(page)?;
        let seat: Seat = at.lgrs.seat(lgr, slot, at.id).ok_or(Diagnosis::NO_ACTIVE_LINK)?;
        let mut part = Part { seat, rmb, buffer };
        if !at.lgrs.tell_buffer(&mut part, at.now) {
            at.lgrs.leave(part, at.now);
            return Err(Diagnosis::NO_MEMORY);
        }
        Ok(Self { part, half: None, size })
    }

    /// What the peer is told of a first contact's.
    fn endpoint(&self, local: &Local, v2: PartV2) -> Option<Endpoint> {
        let Part { seat, rmb, .. } = &self.part;
        let key = Key { rkey: rmb.rkey(), addr: rmb.address() };
        let own = &self.half.as_ref()?.own;
        Some(Endpoint { first_contact: true, ..endpoint(local, own, key, (seat.token, self.size), v2) })
    }
}

/// An end of a link as a connection's peer is told of it: the link's own address, the buffer's key there, the
/// connection's token and the size of its ring.
fn endpoint(local: &Local, own: &Port, key: Key, (token, size): (u32, RmbeSize), v2: PartV2) -> Endpoint {
    Endpoint {
        first_contact: false,
        local: Local { gid: own.gid, mac: own.mac, ..*local },
        qpn: own.qpn,
        rkey: key.rkey,
        rmbe: 1,
        token,
        size,
        mtu: own.mtu,
        rmb: key.addr,
        psn: own.psn,
        v2: Some(v2),
    }
}

/// The ring is the RMBE: it has one of the sizes that there are.
fn ring_of(page: &Page) -> Result<RmbeSize, Diagnosis> {
    let size = RmbeSize::holding(page.size() as u32);
    if u64::from(size.bytes()) == page.size() { Ok(size) } else { Err(Diagnosis::INTERNAL) }
}
