//! The link groups of the process: who leads to whom, which connections are in one, and what has come for each.
//!
//! ```text
//!  Making ── the link is confirmed ──> Ready ── deleted, lost, misbehaved, long empty ──> Ending ──> Gone
//!    └──────── its first connection fails ──────────────────────────────────────────────────^
//! ```
//!
//! A server that is asked by a client whose group is being made lets the Proposal wait: a program that opens many
//! connections at once gets one group for them.
//!
//! Who is who. A group is chosen by the peer's ID, which a process draws at random, by both TCP addresses and by the
//! EID. That is no proof, so a connection joins with a buffer only that the *link itself* has told, by key and address,
//! and that no other connection uses: a process that lies about who it is gets nobody's bytes, and disturbs nobody.
//! Each link has a protection domain of its own, so the peer's keys lead to the group's buffers only.
//!
//! A buffer is registered, told (CONFIRM RKEY), and taken back (DELETE RKEY) for each connection: its memory is the
//! program's ring, which may serve another peer next. With two links it is registered with each.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use smc::smcr::Ms;
use smc::smcr::group::{Ended, Key, Port, Role, Slot, Terms};
use smc::sys;
use smc::wire::smcr::{Eid, Gid, PeerId};

use super::link::Link;
use super::links::{Event, Links};
use super::nic::Nic;
use crate::device::{Device, Domain, Event as Told};
use crate::memory::Region;

/// How long an empty group is kept, as in the kernel: the server's word comes first.
const KEPT: [Ms; 2] = [600_000, 610_000];
/// The last word of a group has so long to arrive.
const LAST_WORD: Ms = 1_000;
/// Turns with nothing to do before a group is left to its links' descriptors.
const IDLE_TURNS: u32 = 4;

/// Whom a group leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// Our part.
    pub role: Role,
    /// The peer's ID.
    pub peer: PeerId,
    /// Our TCP address and the peer's.
    pub ends: [[u8; 16]; 2],
    /// The name of what both belong to.
    pub eid: Eid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Making,
    Ready,
    Ending,
}

/// A connection's place in a group.
#[derive(Debug)]
pub struct Seat {
    /// The group.
    pub lgr: u32,
    /// The connection's alert token.
    pub token: u32,
    /// The link that its handshake names.
    pub slot: Slot,
    /// The index of its receive buffer, once it was told.
    pub buffer: Option<usize>,
}

/// The peer's end, as first contact tells of it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its queue pair.
    pub port: Port,
    /// Its first buffer, and where in that the first connection's begins.
    pub key: Key,
    /// The same.
    pub offset: u64,
    /// It is libsmc.
    pub kin: bool,
    /// Its ports, as far as it has told.
    pub ports: Vec<Gid>,
}

/// A connection's part in a group: its seat, and its rings, registered.
#[derive(Debug)]
pub struct Part {
    /// The seat.
    pub seat: Seat,
    /// The ring that the peer writes into, as it was registered first.
    pub rmb: Arc<Region>,
    /// The ring that is sent from.
    pub buffer: Arc<Region>,
}

/// One group.
#[derive(Debug)]
struct Lgr {
    who: Who,
    stage: Stage,
    /// None: not yet made, or gone.
    links: Option<Links>,
    max_conns: usize,
    /// The peer is libsmc.
    kin: bool,
    /// Connections, by their tokens.
    members: HashMap<u32, u32>,
    /// The members' buffers, by index.
    buffers: HashMap<usize, u32>,
    /// The peer's buffers that members use, by index.
    taken: HashMap<usize, u32>,
    /// The connection that makes it.
    founder: u32,
    /// Connections that wait for it to be ready, and those that wait for places in a send queue, with their tokens.
    waiting: Vec<u32>,
    starved: VecDeque<(u32, u32)>,
    empty_since: Ms,
    /// Until when links that are ending are kept.
    until: Ms,
    hot: bool,
    idle: u32,
}

/// What a server finds for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A group with room.
    Ready(u32),
    /// One that is being made.
    Later,
    /// None.
    Nothing,
}

/// Something for a connection: its number in the service.
pub type Mail = (u32, Event);

/// See the module.
#[derive(Debug, Default)]
pub struct Lgrs {
    all: HashMap<u32, Lgr>,
    next: u32,
    hot: Vec<u32>,
    /// For tests: a link fails after so many messages (0: none does); and so often, where another is left.
    breaks: (u32, Option<u32>),
    sent: u32,
}

impl Lgrs {
    /// For tests: each link that sends the `n`th message of all fails then; or so often, where another is left. 0: none.
    #[must_use]
    pub fn breaking(breaks: (u32, Option<u32>)) -> Self {
        Self { breaks, ..Self::default() }
    }

    /// A message of that member's was sent.
    pub fn sent(&mut self, seat: &Seat) {
        let (after, times) = self.breaks;
        if after == 0 || times == Some(0) {
            return;
        }
        self.sent += 1;
        if self.sent >= after
            && let Some(links) = self.links(seat.lgr)
            && links.break_it(seat.token, times.is_none())
        {
            self.sent = 0;
            self.breaks.1 = times.map(|n| n - 1);
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    // Finding and making.

    /// Server: the group for another connection of that client; `id` hears when it is ready, if it is not.
    pub fn find(&mut self, who: &Who, id: u32) -> Found {
        let full = |l: &Lgr| l.members.len() >= l.max_conns;
        let ours = |l: &&mut Lgr| l.who == *who;
        if let Some((n, _)) =
            self.all.iter().find(|(_, l)| l.who == *who && l.stage == Stage::Ready && !full(l))
        {
            return Found::Ready(*n);
        }
        let Some(l) = self.all.values_mut().filter(ours).find(|l| l.stage == Stage::Making) else {
            return Found::Nothing;
        };
        l.waiting.push(id);
        Found::Later
    }

    /// Client: the group with the link that a server has named, and that; or whether there is a group that it may mean.
    pub fn named(&self, who: &Who, qpn: u32, gid: &Gid) -> Result<(u32, Slot), bool> {
        let theirs = || self.all.iter().filter(|(_, l)| l.who == *who && l.stage == Stage::Ready);
        let leads = |l: &Lgr| l.links.as_ref().and_then(|k| k.named(qpn, gid));
        theirs().find_map(|(n, l)| Some((*n, leads(l)?))).ok_or_else(|| theirs().next().is_some())
    }

    /// A group that does not exist for the peer yet, with its first connection.
    pub fn found(&mut self, who: Who, id: u32, now: Ms) -> Seat {
        let lgr = self.next;
        self.next = self.next.wrapping_add(1);
        let new = Lgr {
            who,
            stage: Stage::Making,
            links: None,
            max_conns: 1,
            kin: false,
            members: HashMap::new(),
            buffers: HashMap::new(),
            taken: HashMap::new(),
            founder: id,
            waiting: Vec::new(),
            starved: VecDeque::new(),
            empty_since: now,
            until: now,
            hot: false,
            idle: 0,
        };
        self.all.insert(lgr, new);
        let mut seat = self.seat(lgr, 0, id).unwrap_or(Seat { lgr, token: 0, slot: 0, buffer: None });
        // The handshake itself tells the first buffer.
        seat.buffer = Some(0);
        if let Some(l) = self.all.get_mut(&lgr) {
            l.buffers.insert(0, id);
        }
        seat
    }

    /// A seat in a group, at that link; none: it is gone.
    pub fn seat(&mut self, lgr: u32, slot: Slot, id: u32) -> Option<Seat> {
        let l = self.all.get_mut(&lgr)?;
        loop {
            let token = sys::random_u32();
            if token != 0 && !l.members.contains_key(&token) {
                l.members.insert(token, id);
                return Some(Seat { lgr, token, slot, buffer: None });
            }
        }
    }

    /// Both ends of a new group's link are known: it is begun.
    pub fn begin(
        &mut self,
        part: &Part,
        link: Link,
        peer: Peer,
        terms: Terms,
        now: Ms,
    ) -> std::io::Result<()> {
        let Part { seat, rmb, buffer } = part;
        let Some(l) = self.all.get_mut(&seat.lgr) else { return Err(std::io::Error::other("no group")) };
        let Peer { port, key, offset, kin, ports } = peer;
        l.kin = kin;
        l.max_conns = usize::from(terms.max_conns);
        let member = (seat.token, (rmb.clone(), buffer.clone()), key, offset);
        l.links = Some(Links::new(link, port, terms, member, ports, now)?);
        l.taken.insert(0, seat.token);
        self.heat(seat.lgr);
        Ok(())
    }

    /// Where a new member's memory is to be registered.
    #[must_use]
    pub fn domain(&self, lgr: u32) -> Option<Arc<Domain>> {
        self.all.get(&lgr)?.links.as_ref()?.domain()
    }

    /// Whether the peer is libsmc.
    #[must_use]
    pub fn is_kin(&self, lgr: u32) -> bool {
        self.all.get(&lgr).is_some_and(|l| l.kin)
    }

    /// The links, as long as the group lives.
    pub fn links(&mut self, lgr: u32) -> Option<&mut Links> {
        self.all.get_mut(&lgr)?.links.as_mut()
    }

    /// Tells the peer of a member's buffer; [`Event::Keyed`] is the answer. False: there are too many.
    pub fn tell_buffer(&mut self, part: &mut Part, now: Ms) -> bool {
        let Part { seat, rmb, buffer } = part;
        let Some(l) = self.all.get_mut(&seat.lgr).filter(|l| l.stage == Stage::Ready) else { return false };
        let Some(id) = l.members.get(&seat.token).copied() else { return false };
        let rings = (rmb.clone(), buffer.clone());
        seat.buffer = l.links.as_mut().and_then(|k| k.enroll(seat.token, seat.slot, rings, now));
        if let Some(index) = seat.buffer {
            l.buffers.insert(index, id);
        }
        self.heat(seat.lgr);
        seat.buffer.is_some()
    }

    /// A member uses the peer's buffer of that key, from `offset` on; false: no link has told it so, or another member
    /// uses it.
    pub fn claim(&mut self, seat: &Seat, key: Key, offset: u64) -> bool {
        let Some(l) = self.all.get_mut(&seat.lgr) else { return false };
        let Some(index) = l.links.as_mut().and_then(|k| k.claim(seat.token, key, offset)) else {
            return false;
        };
        // The kernel's buffers serve one connection after another, and all of them are its own.
        let free = !l.kin || !l.taken.contains_key(&index);
        if free {
            l.taken.insert(index, seat.token);
        }
        free
    }

    // Members.

    /// There is no place in the send queue for what that connection has to say: it hears when there is.
    pub fn starve(&mut self, seat: &Seat, id: u32) {
        let who = (id, seat.token);
        if let Some(l) = self.all.get_mut(&seat.lgr).filter(|l| !l.starved.contains(&who)) {
            l.starved.push_back(who);
        }
    }

    /// A connection is out of its group, and its memory out of the device's reach. Nothing that it has sent is under way.
    pub fn leave(&mut self, part: Part, now: Ms) {
        // The rings as they were registered first go last.
        let Part { seat, .. } = &part;
        let Some(l) = self.all.get_mut(&seat.lgr) else { return };
        let id = l.members.remove(&seat.token);
        l.taken.retain(|_, token| *token != seat.token);
        if let Some(index) = seat.buffer {
            l.buffers.remove(&index);
        }
        if let Some(links) = &mut l.links {
            links.withdraw(seat.token);
        }
        // Without its first connection it will not be ready.
        if l.stage == Stage::Making && id == Some(l.founder) {
            match &mut l.links {
                Some(links) => links.terminate(),
                None => l.stage = Stage::Ending,
            }
        }
        l.empty_since = now;
        self.heat(seat.lgr);
    }

    /// The peer does not know the group: whoever comes next makes another.
    pub fn forget(&mut self, lgr: u32) {
        if let Some(l) = self.all.get_mut(&lgr) {
            l.max_conns = 0;
        }
        self.heat(lgr);
    }

    /// The peer has found that no link is left.
    pub fn fail(&mut self, lgr: u32, now: Ms) {
        if let Some(links) = self.links(lgr) {
            links.fail(now);
        }
        self.heat(lgr);
    }

    /// The process ends: groups without members are over.
    pub fn end_empty(&mut self) {
        let empty: Vec<u32> =
            self.all.iter().filter(|(_, l)| l.members.is_empty()).map(|(n, _)| *n).collect();
        for n in empty {
            if let Some(links) = self.links(n) {
                links.terminate();
            }
            self.heat(n);
        }
    }

    /// Whether there is a group without members.
    #[must_use]
    pub fn has_empty(&self) -> bool {
        self.all.values().any(|l| l.members.is_empty())
    }

    // What happens.

    /// The group is looked at in the next turn.
    pub fn heat(&mut self, lgr: u32) {
        if let Some(l) = self.all.get_mut(&lgr) {
            l.idle = 0;
            if !std::mem::replace(&mut l.hot, true) {
                self.hot.push(lgr);
            }
        }
    }

    /// A device has told something.
    pub fn told(&mut self, device: &Arc<Device>, what: Told, now: Ms) {
        let all: Vec<u32> = self.all.keys().copied().collect();
        for n in all {
            if let Some(links) = self.links(n) {
                links.told(device, what, now);
            }
            self.heat(n);
        }
    }

    /// A device is there, again perhaps.
    pub fn device_is_back(&mut self, now: Ms, nics: &[Nic]) {
        let all: Vec<u32> = self.all.keys().copied().collect();
        for n in all {
            if let Some(links) = self.links(n) {
                links.device_is_back(now, nics);
            }
            self.heat(n);
        }
    }

    /// When the next group is due for the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        self.all.values().filter_map(Lgr::deadline).min()
    }

    /// Whether one is to be looked at at once.
    #[must_use]
    pub fn is_hot(&self) -> bool {
        !self.hot.is_empty()
    }

    /// Looks at each hot group, and says what has come for whom. `watch` puts a link's descriptor into the thread's set.
    pub fn turn(&mut self, now: Ms, nics: &[Nic], mail: &mut Vec<Mail>, watch: impl Fn(u32, i32)) {
        let due = |l: &Lgr| !l.hot && l.deadline().is_some_and(|d| d <= now);
        let late: Vec<u32> = self.all.iter().filter(|(_, l)| due(l)).map(|(n, _)| *n).collect();
        late.into_iter().for_each(|n| self.heat(n));
        for n in std::mem::take(&mut self.hot) {
            let Some(l) = self.all.get_mut(&n) else { continue };
            l.hot = l.turn(now, nics, mail);
            if let Some(links) = &mut l.links {
                // What came before is looked at in the next turn.
                links.to_watch().for_each(|fd| watch(n, fd));
            }
            if l.is_gone() {
                self.all.remove(&n);
            } else if l.hot {
                self.hot.push(n);
            }
        }
    }
}

impl Lgr {
    fn deadline(&self) -> Option<Ms> {
        let links = self.links.as_ref().and_then(Links::deadline);
        let kept = self.empty_since + KEPT[self.who.role as usize];
        let own = match self.stage {
            Stage::Ready if self.members.is_empty() => Some(kept),
            Stage::Ending if self.links.is_some() => Some(self.until),
            _ => None,
        };
        links.into_iter().chain(own).min()
    }

    fn is_gone(&self) -> bool {
        self.stage == Stage::Ending && self.links.is_none() && self.members.is_empty()
    }

    /// Whether there is reason to look again at once.
    fn turn(&mut self, now: Ms, nics: &[Nic], mail: &mut Vec<Mail>) -> bool {
        let forgotten = self.max_conns == 0 && self.stage == Stage::Ready;
        let empty = self.members.is_empty() && self.stage == Stage::Ready;
        if empty
            && (forgotten || now >= self.empty_since + KEPT[self.who.role as usize])
            && let Some(links) = &mut self.links
        {
            links.terminate();
        }
        let mut moved = self.progress(now, nics, mail);
        self.idle = if moved { 0 } else { self.idle + 1 };
        if self.idle >= IDLE_TURNS
            && let Some(links) = &self.links
        {
            links.arm();
            // What came before the arming wakes nobody.
            moved = self.progress(now, nics, mail);
            self.idle = 0;
            return moved;
        }
        self.links.is_some()
    }

    fn progress(&mut self, now: Ms, nics: &[Nic], mail: &mut Vec<Mail>) -> bool {
        let mut events = Vec::new();
        let moved = self.links.as_mut().is_some_and(|k| k.progress(now, nics, &mut events));
        for e in events {
            self.happened(e, now, mail);
        }
        if self.stage == Stage::Ending && !self.waiting.is_empty() {
            mail.extend(self.waiting.drain(..).map(|id| (id, Event::Look)));
        }
        if self.stage == Stage::Ending
            && self.links.as_ref().is_some_and(|k| k.is_quiet() || now >= self.until)
        {
            self.drop_links(mail);
        }
        if let Some(links) = &self.links {
            let fed = |(_, token): &(u32, u32)| links.has_room(*token) || !links.has(*token);
            mail.extend(self.starved.iter().filter(|s| fed(s)).map(|(id, _)| (*id, Event::Look)));
            self.starved.retain(|s| !fed(s));
        }
        moved
    }

    fn happened(&mut self, e: Event, now: Ms, mail: &mut Vec<Mail>) {
        match e {
            Event::Cdc(m) => {
                // The peer writes no more: its buffer may be gone as soon as we have said the same.
                if m.closing.closed || m.closing.abort {
                    self.taken.retain(|_, token| *token != m.token);
                }
                let to = self.members.get(&m.token).copied();
                mail.extend(to.map(|id| (id, Event::Cdc(m))));
            }
            Event::Sent(token, seq) => {
                let to = self.members.get(&token).copied();
                mail.extend(to.map(|id| (id, Event::Sent(token, seq))));
            }
            Event::Moved(token) => {
                let to = self.members.get(&token).copied();
                mail.extend(to.map(|id| (id, Event::Moved(token))));
            }
            Event::Gone => mail.extend(self.members.values().map(|id| (*id, Event::Gone))),
            Event::Deleted(index) => _ = self.taken.remove(&index),
            Event::Keyed(index, ok) => {
                let to = self.buffers.get(&index).copied();
                mail.extend(to.map(|id| (id, Event::Keyed(index, ok))));
            }
            Event::Ready => {
                self.stage = Stage::Ready;
                mail.push((self.founder, Event::Ready));
                mail.extend(self.waiting.drain(..).map(|id| (id, Event::Look)));
            }
            Event::Ended(why) => {
                self.stage = Stage::Ending;
                self.until = now + LAST_WORD;
                mail.extend(self.members.values().map(|id| (*id, Event::Ended(why))));
                // Where nothing can be said any more, nothing is waited for.
                if !matches!(why, Ended::Here | Ended::Peer(_) | Ended::Misbehaved(_)) {
                    self.drop_links(mail);
                }
            }
            Event::Look => {}
        }
    }

    /// The queue pairs go: nothing reads or writes the members' memory any more.
    fn drop_links(&mut self, mail: &mut Vec<Mail>) {
        self.links = None;
        mail.extend(self.members.values().map(|id| (*id, Event::Look)));
    }
}
