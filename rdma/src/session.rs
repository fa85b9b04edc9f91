//! One connection over one link: the machines of [`smc::smcr`] with verbs beneath, driven by its caller. Either side.
//!
//! ```text
//!  connect   Proposal ─> <─ Accept   queue pair to RTR   Confirm ─>                      <─ CONFIRM LINK ─>  ready
//!  accept    ─> Proposal   Accept ─>                     ─> Confirm   queue pair to RTS   CONFIRM LINK ─> <─  ready
//!  write     send buffer ─ WRITE ─> peer's RMBE, then CDC by SEND
//!  read      own RMBE <─ CDC
//! ```
//!
//! Who calls makes progress: there is no thread. A wait arms the completion queue, looks once more, and sleeps on its
//! channel and the device's events. The peer's end is noticed by the link: by its DELETE LINK, or by silence.
//!
//! A group of its own for each connection, with one link (release 2.1 lets a client ask for that): sharing links, and
//! failing over, is the machines' part already, and the driver's to come.

use std::collections::VecDeque;
use std::io::{self, Read, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smc::smcr::group::{Action, Ended, Group, Key, Port, Role, Terms};
use smc::smcr::rendezvous::{Rendezvous, Step, agreed, common_eid, declined};
use smc::smcr::stream::{Sizes, Stream, Transmit};
use smc::smcr::{Misbehaved, Ms};
use smc::wire::smcr::cdc::{self, Cdc};
use smc::wire::smcr::clc::{self, Endpoint, FirstContact, Local, OfferV2, PartV2, Proposal};
use smc::wire::smcr::llc::DeleteReason;
use smc::wire::smcr::{Diagnosis, Eid, Few, Mac, Mtu, PeerId, RmbeSize, Version};

use crate::completion::{Completion, CompletionQueue, sleep};
use crate::device::{Device, Domain, GidEntry};
use crate::memory::{Access, Region};
use crate::queue_pair::{Depth, Piece, QueuePair, Remote};

/// Receives that are posted; the kernel has as many sends under way at most as its peer's queue may be late for.
const RECEIVES: u32 = 64;
/// A receive takes the longest LLC message.
const RECEIVE_LEN: u32 = 8192;
/// SENDs under way, each with up to three WRITEs before it.
const SENDS: u32 = 16;
/// Places for SENDs that data may not take: LLC must be answered.
const KEPT: usize = 4;
const SEND_LEN: u32 = 128;
/// Linux.
const OS: u8 = 2;
/// Release 2.1, in which the ends agree on numbers of links and connections.
const RELEASE: u8 = 1;
const MAX_CONNS: u8 = 255;

/// What a completion's number says: a SEND, whether of a CDC message and which, and its place.
const IS_SEND: u64 = 1 << 63;
const IS_CDC: u64 = 1 << 62;

/// By what to connect.
#[derive(Clone, Debug)]
pub struct Path {
    /// The device, open.
    pub device: Arc<Device>,
    /// Its port.
    pub port: u8,
    /// Which of the port's GIDs.
    pub gid: GidEntry,
    /// What both ends have in common.
    pub eid: Eid,
    /// Bytes in the own RMBE and in the send buffer.
    pub ring: u32,
}

/// What became of a connection.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Outcome {
    /// It goes by RDMA.
    Rdma(Session),
    /// It goes by TCP, because this end or the peer declined.
    Tcp(TcpStream, Diagnosis),
}

/// A connection by RDMA.
#[derive(Debug)]
pub struct Session {
    tcp: TcpStream,
    qp: QueuePair,
    group: Group,
    stream: Stream,
    token: u32,
    peer: Key,
    own_psn: u32,
    rmb: Arc<Region>,
    buffer: Arc<Region>,
    sends: Arc<Region>,
    receives: Arc<Region>,
    free: Vec<u32>,
    ready: bool,
    start: Instant,
    done: Vec<Completion>,
}

fn random() -> io::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn misbehaved(e: Misbehaved) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the peer misbehaved: {e:?}"))
}

/// Offers SMC-R on a TCP connection at its very beginning, to a server that is known to speak it.
pub fn connect(tcp: TcpStream, path: &Path) -> io::Result<Outcome> {
    let start = Instant::now();
    let local = local(path)?;
    let offer = OfferV2 {
        release: RELEASE,
        gid: path.gid.gid,
        max_conns: MAX_CONNS,
        max_links: 1,
        eids: Few::of(&[path.eid]).unwrap_or_default(),
        ..OfferV2::default()
    };
    let proposal = Proposal { version: Version::V2, local, area: None, v1: None, v2: Some(offer) };
    let (clc, step) = Rendezvous::propose(proposal, 0);
    Handshake { tcp, path, local, offer: Some(offer), clc, start, parts: None, session: None }.run(Some(step))
}

/// Awaits an offer on a TCP connection that was accepted, from a client that is known to make one.
pub fn accept(tcp: TcpStream, path: &Path) -> io::Result<Outcome> {
    let start = Instant::now();
    let local = local(path)?;
    let clc = Rendezvous::listen(local.peer, 0);
    Handshake { tcp, path, local, offer: None, clc, start, parts: None, session: None }.run(None)
}

fn local(path: &Path) -> io::Result<Local> {
    let [a, b, ..] = random()?;
    let Mac(m) = path.gid.mac;
    let peer = PeerId([a, b, m[0], m[1], m[2], m[3], m[4], m[5]]);
    Ok(Local { peer, gid: path.gid.gid, mac: path.gid.mac })
}

/// A handshake and what it has made so far.
struct Handshake<'a> {
    tcp: TcpStream,
    path: &'a Path,
    local: Local,
    /// What was offered: by us, or to us.
    offer: Option<OfferV2>,
    clc: Rendezvous,
    start: Instant,
    /// Our end, before the other is known.
    parts: Option<(Parts, Endpoint)>,
    session: Option<Session>,
}

impl Handshake<'_> {
    fn now(&self) -> Ms {
        self.start.elapsed().as_millis() as Ms
    }

    fn run(mut self, first: Option<Step>) -> io::Result<Outcome> {
        let mut steps: VecDeque<Step> = first.into_iter().collect();
        loop {
            let step = match steps.pop_front() {
                Some(step) => step,
                None => {
                    let start = self.start;
                    read_step(&mut self.tcp, &mut self.clc, &|| start.elapsed().as_millis() as Ms)?
                }
            };
            match step {
                Step::Send(m) => {
                    self.tcp.write_all(&clc::encode(&m))?;
                    if let Some(why) = declined(&m) {
                        return Ok(Outcome::Tcp(self.tcp, why));
                    }
                }
                Step::Choose(p) => {
                    let choice = self.choose(&p);
                    let now = self.now();
                    steps.push_back(self.clc.chosen(choice, now));
                }
                Step::Prepare(peer) => {
                    let prepared = self.prepare(&peer);
                    let now = self.now();
                    steps.extend(self.clc.prepared(prepared, now));
                }
                Step::Link => {
                    let linked = self.session.as_mut().map_or(Err(Diagnosis::INTERNAL), Session::link);
                    steps.push_back(self.clc.linked(linked));
                }
                Step::Done => {
                    let none = || io::Error::other("a handshake without a link");
                    return self.session.map(Outcome::Rdma).ok_or_else(none);
                }
                Step::Fallback(why, _) => return Ok(Outcome::Tcp(self.tcp, why)),
                Step::Broken(e) => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("no CLC message: {e:?}")));
                }
            }
        }
    }

    /// Server: what is accepted of a Proposal. Each connection has a link group of its own.
    fn choose(&mut self, p: &Proposal) -> Result<Endpoint, Diagnosis> {
        let offer = p.v2.ok_or(Diagnosis::NO_V2_EXTENSION)?;
        let eid = common_eid(&offer, &[self.path.eid]).ok_or(Diagnosis::NO_UEID)?;
        let first = FirstContact {
            direct: true,
            os: OS,
            release: offer.release.min(RELEASE),
            host: host(),
            max_conns: offer.max_conns,
            max_links: 1,
            ..FirstContact::default()
        };
        self.offer = Some(offer);
        let parts = Parts::new(self.path, &self.local)?;
        let v2 = PartV2 { eid, first: Some(first), gids: Few::new() };
        let accept = parts.endpoint(&self.local, parts.own.mtu, v2);
        self.parts = Some((parts, accept));
        Ok(accept)
    }

    /// The link to the peer's end, receiving. A client's Confirm names its own.
    fn prepare(&mut self, peer: &Endpoint) -> Result<Option<Endpoint>, (Diagnosis, bool)> {
        // There is no group that anything but first contact could mean.
        if !peer.first_contact {
            return Err((Diagnosis::SYNC_ERROR, true));
        }
        self.link_to(peer).map_err(|why| (why, false))
    }

    fn link_to(&mut self, peer: &Endpoint) -> Result<Option<Endpoint>, Diagnosis> {
        let tcp = self.tcp.try_clone().map_err(|_| Diagnosis::NO_MEMORY)?;
        let offer = self.offer.ok_or(Diagnosis::INTERNAL)?;
        let (role, parts, accept) = match self.parts.take() {
            Some((parts, accept)) => (Role::Server, parts, accept),
            None => (Role::Client, Parts::new(self.path, &self.local)?, *peer),
        };
        let agreed = agreed(&offer, &accept)?;
        let (max_links, max_conns) = (agreed.max_links, agreed.max_conns);
        let terms = Terms { role, version: Version::V2, max_links, max_conns };
        let confirm = match role {
            Role::Server => None,
            Role::Client => {
                let part = accept.v2.ok_or(Diagnosis::VERSION_MISMATCH)?;
                let first =
                    part.first.map(|f| FirstContact { direct: true, os: OS, host: host(), features: 0, ..f });
                let gids = Few::of(&[self.local.gid]).unwrap_or_default();
                let mtu = accept.mtu.min(parts.own.mtu);
                Some(parts.endpoint(&self.local, mtu, PartV2 { eid: part.eid, first, gids }))
            }
        };
        self.session = Some(parts.join(tcp, peer, terms, self.start)?);
        Ok(confirm)
    }
}

fn host() -> [u8; 32] {
    let mut host = [0; 32];
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    host.iter_mut().zip(name.trim().bytes()).for_each(|(to, b)| *to = b);
    host
}

/// Reads as much of TCP as the handshake wants, and not a byte more, until it says something.
fn read_step(tcp: &mut TcpStream, clc: &mut Rendezvous, now: &impl Fn() -> Ms) -> io::Result<Step> {
    let mut bytes = Vec::new();
    loop {
        let (seen, wants) = (bytes.len(), clc.wants());
        if let Some(late) = clc.tick(now()) {
            return Ok(late);
        }
        bytes.resize(wants, 0);
        let left = clc.deadline().unwrap_or(0).saturating_sub(now()).max(1);
        tcp.set_read_timeout(Some(Duration::from_millis(left)))?;
        let n = match tcp.read(bytes.get_mut(seen..).unwrap_or_default()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(e) => return Err(e),
        };
        bytes.truncate(seen + n);
        if n > 0
            && let Some(step) = clc.handle_bytes(&bytes, now())
        {
            tcp.set_read_timeout(None)?;
            return Ok(step);
        }
    }
}

/// One end of a link and its buffers, while the other end is not known.
struct Parts {
    qp: QueuePair,
    rmb: Arc<Region>,
    buffer: Arc<Region>,
    sends: Arc<Region>,
    receives: Arc<Region>,
    own: Port,
    token: u32,
    size: RmbeSize,
}

impl Parts {
    fn new(path: &Path, local: &Local) -> Result<Self, Diagnosis> {
        let mtu = path.device.mtu(path.port).ok().flatten().ok_or(Diagnosis::NO_SMCR_DEVICE)?;
        let size = RmbeSize::holding(path.ring);
        let r = random().map_err(|_| Diagnosis::INTERNAL)?;
        let psn = u32::from_be_bytes([0, r[0], r[1], r[2]]);
        let token = u32::from_be_bytes([r[4], r[5], r[6], r[7]]).max(1);
        let no_memory = |_| Diagnosis::NO_MEMORY;
        let domain = Domain::new(&path.device).map_err(no_memory)?;
        let entries = (RECEIVES + SENDS * 4) as i32;
        let queue = CompletionQueue::new(&path.device, entries).map_err(no_memory)?;
        let region = |len: u32, access| Region::new(&domain, len as usize, access).map_err(no_memory);
        let rmb = region(size.bytes(), Access::PeerWrites)?;
        let buffer = region(size.bytes(), Access::Local)?;
        let sends = region(SENDS * SEND_LEN, Access::Local)?;
        let receives = region(RECEIVES * RECEIVE_LEN, Access::Local)?;
        let not_ready = |_| Diagnosis::INTERNAL_READY_LINK;
        let depth = Depth { send: SENDS * 4, recv: RECEIVES };
        let at = (path.port, path.gid.index);
        let qp = QueuePair::new(&domain, &queue, at, depth, cdc::LEN as u32).map_err(not_ready)?;
        for r in [&rmb, &buffer, &sends, &receives] {
            qp.attach(r).map_err(not_ready)?;
        }
        let own = Port { mac: local.mac, gid: local.gid, qpn: qp.number(), psn, mtu };
        Ok(Self { qp, rmb, buffer, sends, receives, own, token, size })
    }

    /// What the peer is told of this, at first contact.
    fn endpoint(&self, local: &Local, mtu: Mtu, v2: PartV2) -> Endpoint {
        Endpoint {
            first_contact: true,
            local: *local,
            qpn: self.own.qpn,
            rkey: self.rmb.rkey(),
            rmbe: 1,
            token: self.token,
            size: self.size,
            mtu,
            rmb: self.rmb.address(),
            psn: self.own.psn,
            v2: Some(v2),
        }
    }

    /// Receives are posted, and the queue pair receives from that peer: nothing that it sends is too early.
    fn join(
        self,
        tcp: TcpStream,
        peer: &Endpoint,
        terms: Terms,
        start: Instant,
    ) -> Result<Session, Diagnosis> {
        let not_ready = |_| Diagnosis::INTERNAL_READY_LINK;
        let Self { qp, rmb, buffer, sends, receives, own, token, size } = self;
        let Local { mac, gid, .. } = peer.local;
        let other = Port { mac, gid, qpn: peer.qpn, psn: peer.psn, mtu: peer.mtu.min(own.mtu) };
        let own_key = Key { rkey: rmb.rkey(), addr: rmb.address() };
        let peer_key = Key { rkey: peer.rkey, addr: peer.rmb };
        // Of an RMB with several RMBEs, ours is one.
        let offset = u64::from(peer.rmbe.saturating_sub(1)) * u64::from(peer.size.bytes());
        let sizes = Sizes { send: size.bytes(), peer: peer.size.bytes(), own: size.bytes() };
        let now = start.elapsed().as_millis() as Ms;
        let session = Session {
            tcp,
            group: Group::first_contact(terms, (own, other), own_key, peer_key, now),
            stream: Stream::new(sizes, peer.token),
            token,
            peer: Key { addr: peer_key.addr.wrapping_add(offset), ..peer_key },
            own_psn: own.psn,
            rmb,
            buffer,
            sends,
            receives,
            free: (0..SENDS).collect(),
            ready: false,
            start,
            done: Vec::new(),
            qp,
        };
        (0..RECEIVES).try_for_each(|i| session.receive(i)).map_err(not_ready)?;
        let remote = Remote { qpn: other.qpn, gid, psn: other.psn, mtu: other.mtu, hop_limit: 1 };
        session.qp.ready_to_receive(&remote).map_err(not_ready)?;
        // A client sends when it is asked to confirm the link.
        if terms.role == Role::Server {
            session.qp.ready_to_send(own.psn).map_err(not_ready)?;
        }
        Ok(session)
    }
}

impl Session {
    fn now(&self) -> Ms {
        self.start.elapsed().as_millis() as Ms
    }

    fn receive(&self, index: u32) -> io::Result<()> {
        let offset = (index * RECEIVE_LEN) as usize;
        let into = Piece { region: &self.receives, offset, len: RECEIVE_LEN };
        self.qp.post_receive(u64::from(index), &into)
    }

    /// First contact: until the link group is ready.
    fn link(&mut self) -> Result<(), Diagnosis> {
        loop {
            let moved = self.progress().map_err(|_| Diagnosis::INTERNAL_READY_LINK)?;
            match self.group.ended() {
                Some(Ended::Timeout) => return Err(Diagnosis::TIMEOUT_CONFIRM_LINK),
                Some(Ended::Eyecatcher) => return Err(Diagnosis::RMBE_EYECATCHER),
                Some(_) => return Err(Diagnosis::NO_ACTIVE_LINK),
                None if self.ready => return Ok(()),
                None if !moved => self.sleep().map_err(|_| Diagnosis::INTERNAL_READY_LINK)?,
                None => {}
            }
        }
    }

    /// Does what there is to do; false: there was nothing.
    fn progress(&mut self) -> io::Result<bool> {
        let now = self.now();
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        self.qp.completions().poll(&mut done)?;
        let mut moved = !done.is_empty();
        let handled = done.iter().try_for_each(|c| self.completed(c, now));
        self.done = done;
        handled?;
        if self.group.deadline().is_some_and(|d| d <= now) {
            self.group.tick(now);
        }
        while let Some(action) = self.group.poll_action() {
            moved = true;
            self.act(action)?;
        }
        while self.ready && self.group.ended().is_none() && self.free.len() > KEPT {
            let Some(t) = self.stream.poll_transmit() else { break };
            moved = true;
            self.transmit(&t)?;
        }
        Ok(moved)
    }

    fn completed(&mut self, c: &Completion, now: Ms) -> io::Result<()> {
        if c.id & IS_SEND != 0 {
            self.free.push(u32::from(c.id as u16));
        }
        if c.error.is_some() {
            self.group.link_failed(0, now);
            return Ok(());
        }
        if c.id & IS_SEND != 0 {
            if c.id & IS_CDC != 0 {
                self.stream.completed((c.id >> 16) as u16);
            }
            return Ok(());
        }
        if !c.received {
            return Ok(());
        }
        let index = c.id as u32;
        let mut bytes = vec![0; c.len.min(RECEIVE_LEN) as usize];
        if !self.receives.get((index * RECEIVE_LEN) as usize, &mut bytes) {
            return Err(io::Error::other("a completion of nothing that was posted"));
        }
        self.receive(index)?;
        if bytes.first() != Some(&cdc::TYPE) {
            self.group.handle_bytes(0, &bytes, now);
            return Ok(());
        }
        self.group.heard(0, now);
        // As Linux has it: what is too short, or for a connection that is gone, is dropped.
        match Cdc::decode(&bytes) {
            Ok(m) if m.token == self.token => self.stream.handle_cdc(&m).map(|_| ()).map_err(misbehaved),
            _ => Ok(()),
        }
    }

    fn act(&mut self, action: Action) -> io::Result<()> {
        match action {
            Action::Send(_, llc) => self.send(&llc.encode(), 0),
            Action::ReadyToSend(_) => self.qp.ready_to_send(self.own_psn),
            Action::Ready => {
                self.ready = true;
                Ok(())
            }
            Action::Lost(..) => self.qp.fail(),
            // One link: no other is ever made, and the only buffer was told of by the handshake.
            Action::Make(slot, _) => {
                let now = self.now();
                let _ = self.group.link_made(slot, None, now);
                Ok(())
            }
            Action::Connect(..) | Action::Active(_) | Action::Confirmed(..) | Action::Ended(_) => Ok(()),
            Action::Gone | Action::Asked(_) | Action::Deleted(_) => Ok(()),
        }
    }

    fn send(&mut self, bytes: &[u8], tag: u64) -> io::Result<()> {
        let full = || io::Error::other("no place for a SEND");
        let slot = self.free.pop().ok_or_else(full)?;
        let offset = (slot * SEND_LEN) as usize;
        if bytes.len() > SEND_LEN as usize || !self.sends.put(offset, bytes) {
            return Err(full());
        }
        let from = Piece { region: &self.sends, offset, len: bytes.len() as u32 };
        self.qp.post_send(IS_SEND | tag | u64::from(slot), &from)
    }

    fn transmit(&mut self, t: &Transmit) -> io::Result<()> {
        for w in t.writes.iter() {
            let from = Piece { region: &self.buffer, offset: w.from as usize, len: w.len };
            let to = self.peer.addr.wrapping_add(u64::from(w.to));
            self.qp.post_write(0, &from, (self.peer.rkey, to))?;
        }
        self.send(&t.cdc.encode(), IS_CDC | u64::from(t.cdc.seq) << 16)
    }

    /// Until something happens.
    fn sleep(&mut self) -> io::Result<()> {
        self.qp.completions().arm(false)?;
        // What came before the arming rings no bell.
        if self.progress()? {
            return Ok(());
        }
        let now = self.now();
        let until = self.group.deadline().map_or(-1, |d| d.saturating_sub(now).min(60_000) as i32 + 1);
        sleep(&[self.qp.completions().fd(), self.qp.completions().device().event_fd()], until)?;
        while self.qp.completions().woken()? {}
        while let Some(event) = self.qp.completions().device().event()? {
            if event == crate::device::Event::QueuePair(self.qp.number()) {
                let now = self.now();
                self.group.link_failed(0, now);
            }
        }
        Ok(())
    }

    fn ended(&self) -> io::Result<()> {
        match self.group.ended() {
            _ if self.stream.is_reset() => Err(io::ErrorKind::ConnectionReset.into()),
            Some(_) => Err(io::ErrorKind::ConnectionAborted.into()),
            None => Ok(()),
        }
    }

    /// Reads some bytes; 0: the end.
    pub fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            let moved = self.progress()?;
            let (at, n) = self.stream.readable();
            let n = to.len().min(n as usize);
            if n > 0 || to.is_empty() {
                let got = self.rmb.get(at as usize, to.get_mut(..n).unwrap_or_default());
                debug_assert!(got, "the machine keeps to the ring");
                self.stream.took(n as u32);
                self.progress()?;
                return Ok(n);
            }
            if self.stream.at_end() {
                return Ok(0);
            }
            self.ended()?;
            if !moved {
                self.sleep()?;
            }
        }
    }

    /// Writes some bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let moved = self.progress()?;
            self.ended()?;
            if self.stream.writes_ended() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let (at, room) = self.stream.room();
            let n = bytes.len().min(room as usize);
            if n > 0 || bytes.is_empty() {
                let put = self.buffer.put(at as usize, bytes.get(..n).unwrap_or_default());
                debug_assert!(put, "the machine keeps to the ring");
                self.stream.wrote(n as u32);
                self.progress()?;
                return Ok(n);
            }
            if !moved {
                self.sleep()?;
            }
        }
    }

    /// shutdown(SHUT_WR).
    pub fn shutdown(&mut self) -> io::Result<()> {
        self.stream.shutdown();
        self.progress().map(|_| ())
    }

    /// Closes in order: returns when the peer has closed as well, or the group has ended.
    pub fn close(mut self) -> io::Result<()> {
        self.stream.close();
        while !(self.stream.is_over() && self.stream.in_flight() == 0) && self.group.ended().is_none() {
            if !self.progress()? {
                self.sleep()?;
            }
        }
        // The group was this connection's only: it ends with it.
        self.group.terminate(DeleteReason::PROGRAM);
        // Each SEND completes, if only by the last of its retries.
        while self.free.len() < SENDS as usize {
            if !self.progress()? {
                self.sleep()?;
            }
        }
        self.tcp.shutdown(std::net::Shutdown::Both).or_else(|e| match e.kind() {
            io::ErrorKind::NotConnected => Ok(()),
            _ => Err(e),
        })
    }
}
