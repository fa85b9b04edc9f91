//! The handshake of one connection: the CLC machine, and what it has made of queue pairs and memory.
//!
//! Each connection has a link group of its own, with one link: release 2.1 lets either end ask for that.

use std::sync::Arc;

use smc::smcr::Ms;
use smc::smcr::group::{Key, Port, Role, Terms};
use smc::smcr::rendezvous::{Rendezvous, Step, agreed, common_eid};
use smc::smcr::stream::{Sizes, Stream};
use smc::sys;
use smc::wire::smcr::clc::{Endpoint, FirstContact, LIBSMC, Local, OfferV2, PartV2, Proposal};
use smc::wire::smcr::{Diagnosis, Eid, Few, PeerId, RmbeSize, Version};

use super::flow::{Ends, Flow};
use super::link::Half;
use super::nic::Place;
use super::page::Page;
use crate::memory::Region;

/// Linux.
const OS: u8 = 2;
/// Release 2.1, in which the ends agree on numbers of links and connections.
const RELEASE: u8 = 1;
const MAX_CONNS: u8 = 255;
/// How long bytes wait for the peer's first message, as in the kernel. A client sends one with its program's first
/// call, and may make none; a server answers when its program has accepted the connection.
const PATIENCE: Ms = 6_000;

/// What all connections of the process have in common.
#[derive(Debug)]
pub struct Common {
    /// EIDs of this host.
    pub eids: Vec<Eid>,
    /// Random, for this process.
    pub salt: [u8; 2],
}

/// This end, as the peer is to know it, before the peer is known.
#[derive(Debug)]
struct Mine {
    half: Half,
    rmb: Arc<Region>,
    buffer: Arc<Region>,
    token: u32,
    size: RmbeSize,
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
    /// The connection on its link, once both ends are known.
    pub flow: Option<Flow>,
    local: Local,
    client: bool,
    /// What was offered: by us, or to us.
    offer: Option<OfferV2>,
    /// A server's own end and what was said of it, until the client's is known.
    mine: Option<(Mine, Endpoint)>,
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
    /// The beginning; with what a client says first.
    pub fn new(client: bool, place: &Place, common: &Common, now: Ms) -> (Self, Option<Step>) {
        let m = place.gid.mac.0;
        let [a, b] = common.salt;
        let me = PeerId([a, b, m[0], m[1], m[2], m[3], m[4], m[5]]);
        let local = Local { peer: me, gid: place.gid.gid, mac: place.gid.mac };
        let offer = client.then(|| OfferV2 {
            release: RELEASE,
            gid: local.gid,
            max_conns: MAX_CONNS,
            max_links: 1,
            eids: Few::of(&common.eids).unwrap_or_default(),
            ..OfferV2::default()
        });
        let (clc, step) = match offer {
            Some(o) => {
                let p = Proposal { version: Version::V2, local, area: None, v1: None, v2: Some(o) };
                let (clc, step) = Rendezvous::propose(p, now);
                (clc, Some(step))
            }
            None => (Rendezvous::listen(me, now), None),
        };
        let g = Self { clc, met: false, waits: None, flow: None, local, client, offer, mine: None };
        (g, step)
    }

    /// Whether this end has connected.
    #[must_use]
    pub fn is_client(&self) -> bool {
        self.client
    }

    /// Until when bytes wait for the peer's first message, if any wait.
    #[must_use]
    pub fn until(&self) -> Option<Ms> {
        self.waits.map(|at| at + PATIENCE)
    }

    /// Server: what is accepted of a Proposal.
    pub fn choose(
        &mut self,
        p: &Proposal,
        place: &Place,
        common: &Common,
        page: &Page,
    ) -> Result<Endpoint, Diagnosis> {
        let offer = p.v2.ok_or(Diagnosis::NO_V2_EXTENSION)?;
        let eid = common_eid(&offer, &common.eids).ok_or(Diagnosis::NO_UEID)?;
        let first = FirstContact {
            direct: true,
            os: OS,
            release: offer.release.min(RELEASE),
            host: host(),
            max_conns: offer.max_conns,
            max_links: 1,
            features: 0,
            vendor: LIBSMC,
        };
        self.offer = Some(offer);
        let mine = Mine::new(place, page)?;
        let accept = mine.endpoint(&self.local, PartV2 { eid, first: Some(first), gids: Few::new() });
        self.mine = Some((mine, accept));
        Ok(accept)
    }

    /// The link to the peer's end, receiving. A client's Confirm names its own.
    pub fn prepare(
        &mut self,
        peer: &Endpoint,
        place: &Place,
        page: &Page,
        now: Ms,
    ) -> Result<Option<Endpoint>, (Diagnosis, bool)> {
        // There is no group that anything but first contact could mean.
        if !peer.first_contact {
            return Err((Diagnosis::SYNC_ERROR, true));
        }
        self.link_to(peer, place, page, now).map_err(|why| (why, false))
    }

    fn link_to(
        &mut self,
        peer: &Endpoint,
        place: &Place,
        page: &Page,
        now: Ms,
    ) -> Result<Option<Endpoint>, Diagnosis> {
        let offer = self.offer.ok_or(Diagnosis::INTERNAL)?;
        let (role, mine, accept) = match self.mine.take() {
            Some((mine, accept)) => (Role::Server, mine, accept),
            None => (Role::Client, Mine::new(place, page)?, *peer),
        };
        let agreed = agreed(&offer, &accept)?;
        let (max_links, max_conns) = (agreed.max_links, agreed.max_conns);
        let terms = Terms { role, version: Version::V2, max_links, max_conns };
        let confirm = match role {
            Role::Server => None,
            Role::Client => {
                let part = accept.v2.ok_or(Diagnosis::VERSION_MISMATCH)?;
                let first = part.first.map(|f| FirstContact {
                    direct: true,
                    os: OS,
                    host: host(),
                    features: 0,
                    vendor: LIBSMC,
                    ..f
                });
                let gids = Few::of(&[self.local.gid]).unwrap_or_default();
                let mut c = mine.endpoint(&self.local, PartV2 { eid: part.eid, first, gids });
                c.mtu = c.mtu.min(accept.mtu);
                Some(c)
            }
        };
        self.flow = Some(mine.join(peer, terms, now)?);
        Ok(confirm)
    }
}

impl Mine {
    fn new(place: &Place, page: &Page) -> Result<Self, Diagnosis> {
        let r = random();
        let psn = u32::from_be_bytes([0, r[0], r[1], r[2]]);
        let token = u32::from_be_bytes([r[4], r[5], r[6], r[7]]).max(1);
        let half = Half::new(place, psn).map_err(|_| Diagnosis::NO_MEMORY)?;
        let (rmb, buffer) = page.register(&place.nic.domain).map_err(|_| Diagnosis::NO_MEMORY)?;
        let size = RmbeSize::holding(page.size() as u32);
        // The ring is the RMBE: it has one of the sizes that there are.
        if u64::from(size.bytes()) != page.size() {
            return Err(Diagnosis::INTERNAL);
        }
        Ok(Self { half, rmb, buffer, token, size })
    }

    /// What the peer is told of this.
    fn endpoint(&self, local: &Local, v2: PartV2) -> Endpoint {
        Endpoint {
            first_contact: true,
            local: *local,
            qpn: self.half.own.qpn,
            rkey: self.rmb.rkey(),
            rmbe: 1,
            token: self.token,
            size: self.size,
            mtu: self.half.own.mtu,
            rmb: self.rmb.address(),
            psn: self.half.own.psn,
            v2: Some(v2),
        }
    }

    fn join(self, peer: &Endpoint, terms: Terms, now: Ms) -> Result<Flow, Diagnosis> {
        let Self { half, rmb, buffer, token, size } = self;
        let Local { mac, gid, .. } = peer.local;
        let other = Port { mac, gid, qpn: peer.qpn, psn: peer.psn, mtu: peer.mtu.min(half.own.mtu) };
        let own_key = Key { rkey: rmb.rkey(), addr: rmb.address() };
        let peer_key = Key { rkey: peer.rkey, addr: peer.rmb };
        // Of an RMB with several RMBEs, ours is one.
        let offset = u64::from(peer.rmbe.saturating_sub(1)) * u64::from(peer.size.bytes());
        let sizes = Sizes { send: size.bytes(), peer: peer.size.bytes(), own: size.bytes() };
        let not_ready = |_| Diagnosis::INTERNAL_READY_LINK;
        let link = half.join(other, gid, terms, (own_key, peer_key), now).map_err(not_ready)?;
        link.attach(&rmb).map_err(not_ready)?;
        link.attach(&buffer).map_err(not_ready)?;
        let kin = peer.v2.and_then(|v| v.first).is_some_and(|f| f.vendor == LIBSMC);
        let peer_at = Key { addr: peer_key.addr.wrapping_add(offset), ..peer_key };
        let stream = Stream::new(sizes, peer.token);
        Ok(Flow { link, stream, token, peer: peer_at, rmb, buffer, kin, ends: Ends::default(), ended: None })
    }
}
