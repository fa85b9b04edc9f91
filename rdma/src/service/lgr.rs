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
//! Each group has a protection domain of its own, so its peer's keys lead to its own buffers only.
//!
//! A buffer is registered, told (CONFIRM RKEY), and taken back (DELETE RKEY) for each connection: its memory is the
//! program's ring, which may serve another peer next.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use smc::smcr::Ms;
use smc::smcr::group::{Ended, Key, Port, Role, Terms};
use smc::sys;
use smc::wire::smcr::{Eid, Gid, PeerId};

use super::link::{Event, Half, Link};
use crate::device::{Domain, Event as Told};
use crate::memory::Region;

/// How long an empty group is kept, as in the kernel: the server's word comes first.
const KEPT: [Ms; 2] = [600_000, 610_000];
/// The last word of a group has so long to arrive.
const LAST_WORD: Ms = 1_000;
/// Turns with nothing to do before a group is left to its link's descriptor.
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
    /// The index of its receive buffer, once it was told.
    pub buffer: Option<usize>,
}

/// A connection's part in a group: its seat, and its rings, registered.
#[derive(Debug)]
pub struct Part {
    /// The seat.
    pub seat: Seat,
    /// The ring that the peer writes into.
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
    link: Option<Link>,
    domain: Arc<Domain>,
    max_conns: usize,
    /// The peer is libsmc.
    kin: bool,
    /// Connections, by their tokens.
    members: HashMap<u32, u32>,
    /// The members' buffers, by index.
    buffers: HashMap<usize, u32>,
    /// The peer's keys that members use.
    taken: HashMap<u32, u32>,
    /// The connection that makes it.
    founder: u32,
    /// Connections that wait for it to be ready, and those that wait for places in its send queue.
    waiting: Vec<u32>,
    starved: VecDeque<u32>,
    empty_since: Ms,
    /// Until when a link that is ending is kept.
    until: Ms,
    hot: bool,
    idle: u32,
    watched: bool,
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
    /// For tests: a link fails after so many messages; 0: none does.
    breaks_after: u32,
    sent: u32,
}

impl Lgrs {
    /// For tests: each link that sends the `n`th message of all fails then; 0: none does.
    #[must_use]
    pub fn breaking(n: u32) -> Self {
        Self { breaks_after: n, ..Self::default() }
    }

    /// A message was sent.
    pub fn sent(&mut self, lgr: u32) {
        if self.breaks_after != 0 {
            self.sent += 1;
            if self.sent.is_multiple_of(self.breaks_after)
                && let Some(link) = self.link(lgr)
            {
                link.break_it();
            }
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

    /// Client: the group with the link that a server has named.
    #[must_use]
    pub fn named(&self, who: &Who, qpn: u32, gid: &Gid) -> Option<u32> {
        let leads = |l: &Lgr| l.link.as_ref().is_some_and(|k| k.leads_to(qpn, gid));
        self.all.iter().find(|(_, l)| l.who == *who && l.stage == Stage::Ready && leads(l)).map(|(n, _)| *n)
    }

    /// A group that does not exist for the peer yet, with its first connection.
    pub fn found(&mut self, who: Who, domain: &Arc<Domain>, id: u32, now: Ms) -> Seat {
        let lgr = self.next;
        self.next = self.next.wrapping_add(1);
        let new = Lgr {
            who,
            stage: Stage::Making,
            link: None,
            domain: domain.clone(),
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
            watched: false,
        };
        self.all.insert(lgr, new);
        let mut seat = self.seat(lgr, id).unwrap_or(Seat { lgr, token: 0, buffer: None });
        // The handshake itself tells the first buffer.
        seat.buffer = Some(0);
        if let Some(l) = self.all.get_mut(&lgr) {
            l.buffers.insert(0, id);
        }
        seat
    }

    /// A seat in a group; none: it is gone.
    pub fn seat(&mut self, lgr: u32, id: u32) -> Option<Seat> {
        let l = self.all.get_mut(&lgr)?;
        loop {
            let token = sys::random_u32();
            if token != 0 && !l.members.contains_key(&token) {
                l.members.insert(token, id);
                return Some(Seat { lgr, token, buffer: None });
            }
        }
    }

    /// Both ends of a new group's link are known: it is begun. Told: our buffer's key, and the peer's.
    pub fn begin(
        &mut self,
        seat: &Seat,
        half: Half,
        peer: (Port, bool),
        terms: Terms,
        keys: (Key, Key),
        now: Ms,
    ) -> std::io::Result<()> {
        let Some(l) = self.all.get_mut(&seat.lgr) else { return Err(std::io::Error::other("no group")) };
        let (other, kin) = peer;
        l.kin = kin;
        l.max_conns = usize::from(terms.max_conns);
        l.link = Some(half.join(other, other.gid, terms, keys, now)?);
        l.taken.insert(keys.1.rkey, seat.token);
        self.heat(seat.lgr);
        Ok(())
    }

    /// The domain whose memory a group's links use.
    #[must_use]
    pub fn domain(&self, lgr: u32) -> Option<Arc<Domain>> {
        self.all.get(&lgr).map(|l| l.domain.clone())
    }

    /// Whether the peer is libsmc.
    #[must_use]
    pub fn is_kin(&self, lgr: u32) -> bool {
        self.all.get(&lgr).is_some_and(|l| l.kin)
    }

    /// The link, as long as the group lives.
    pub fn link(&mut self, lgr: u32) -> Option<&mut Link> {
        self.all.get_mut(&lgr)?.link.as_mut()
    }

    /// Tells the peer of a member's buffer; [`Event::Keyed`] is the answer. False: there are too many.
    pub fn tell_buffer(&mut self, seat: &mut Seat, rmb: &Arc<Region>, now: Ms) -> bool {
        let Some(l) = self.all.get_mut(&seat.lgr).filter(|l| l.stage == Stage::Ready) else { return false };
        let Some(id) = l.members.get(&seat.token).copied() else { return false };
        seat.buffer = l.link.as_mut().and_then(|k| k.add_buffer(rmb, now));
        if let Some(index) = seat.buffer {
            l.buffers.insert(index, id);
        }
        self.heat(seat.lgr);
        seat.buffer.is_some()
    }

    /// A member uses the peer's buffer of that key; false: the link has not told it so, or another member uses it.
    pub fn claim(&mut self, seat: &Seat, key: Key) -> bool {
        let Some(l) = self.all.get_mut(&seat.lgr) else { return false };
        let told = l.link.as_ref().is_some_and(|k| k.peer_has(key));
        // The kernel's buffers serve one connection after another, and all of them are its own.
        let free = !l.kin || !l.taken.contains_key(&key.rkey);
        if told && free {
            l.taken.insert(key.rkey, seat.token);
        }
        told && free
    }

    // Members.

    /// There is no place in the send queue for what that connection has to say: it hears when there is.
    pub fn starve(&mut self, lgr: u32, id: u32) {
        if let Some(l) = self.all.get_mut(&lgr).filter(|l| !l.starved.contains(&id)) {
            l.starved.push_back(id);
        }
    }

    /// A connection is out of its group, and its memory out of the device's reach. Nothing that it has sent is under way.
    pub fn leave(&mut self, part: Part, now: Ms) {
        let Part { seat, rmb, buffer } = part;
        let Some(l) = self.all.get_mut(&seat.lgr) else { return };
        let id = l.members.remove(&seat.token);
        l.taken.retain(|_, token| *token != seat.token);
        if let Some(link) = &mut l.link {
            if let Some(index) = seat.buffer {
                l.buffers.remove(&index);
                link.delete_buffer(index);
            }
            link.detach(&rmb);
            link.detach(&buffer);
        }
        // Without its first connection it will not be ready.
        if l.stage == Stage::Making && id == Some(l.founder) {
            match &mut l.link {
                Some(link) => link.terminate(),
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

    /// The peer has found that the link is gone.
    pub fn fail(&mut self, lgr: u32, now: Ms) {
        if let Some(link) = self.link(lgr) {
            link.fail(now);
        }
        self.heat(lgr);
    }

    /// The process ends: groups without members are over.
    pub fn end_empty(&mut self) {
        let empty: Vec<u32> =
            self.all.iter().filter(|(_, l)| l.members.is_empty()).map(|(n, _)| *n).collect();
        for n in empty {
            if let Some(link) = self.link(n) {
                link.terminate();
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
    pub fn told(&mut self, what: Told, now: Ms) {
        let all: Vec<u32> = self.all.keys().copied().collect();
        for n in all {
            if let Some(link) = self.link(n) {
                link.told(what, now);
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
    pub fn turn(&mut self, now: Ms, mail: &mut Vec<Mail>, watch: impl Fn(u32, i32)) {
        let due = |l: &Lgr| !l.hot && l.deadline().is_some_and(|d| d <= now);
        let late: Vec<u32> = self.all.iter().filter(|(_, l)| due(l)).map(|(n, _)| *n).collect();
        late.into_iter().for_each(|n| self.heat(n));
        for n in std::mem::take(&mut self.hot) {
            let Some(l) = self.all.get_mut(&n) else { continue };
            if let (Some(link), false) = (&l.link, l.watched) {
                l.watched = true;
                watch(n, link.fd());
            }
            l.hot = l.turn(now, mail);
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
        let link = self.link.as_ref().and_then(Link::deadline);
        let kept = self.empty_since + KEPT[self.who.role as usize];
        let own = match self.stage {
            Stage::Ready if self.members.is_empty() => Some(kept),
            Stage::Ending if self.link.is_some() => Some(self.until),
            _ => None,
        };
        link.into_iter().chain(own).min()
    }

    fn is_gone(&self) -> bool {
        self.stage == Stage::Ending && self.link.is_none() && self.members.is_empty()
    }

    /// Whether there is reason to look again at once.
    fn turn(&mut self, now: Ms, mail: &mut Vec<Mail>) -> bool {
        let forgotten = self.max_conns == 0 && self.stage == Stage::Ready;
        let empty = self.members.is_empty() && self.stage == Stage::Ready;
        if empty
            && (forgotten || now >= self.empty_since + KEPT[self.who.role as usize])
            && let Some(link) = &mut self.link
        {
            link.terminate();
        }
        let mut moved = self.progress(now, mail);
        self.idle = if moved { 0 } else { self.idle + 1 };
        if self.idle >= IDLE_TURNS
            && let Some(link) = &self.link
        {
            // One that can't be armed is one of a device that is gone, which its events tell.
            let _ = link.arm();
            // What came before the arming wakes nobody.
            moved = self.progress(now, mail);
            self.idle = 0;
            return moved;
        }
        self.link.is_some()
    }

    fn progress(&mut self, now: Ms, mail: &mut Vec<Mail>) -> bool {
        let mut events = Vec::new();
        let mut moved = false;
        if let Some(link) = &mut self.link {
            match link.progress(now, &mut events) {
                Ok(m) => moved = m,
                Err(_) => events.push(Event::Ended(Ended::NoLink)),
            }
        }
        for e in events {
            self.happened(e, now, mail);
        }
        if self.stage == Stage::Ending && !self.waiting.is_empty() {
            mail.extend(self.waiting.drain(..).map(|id| (id, Event::Look)));
        }
        if self.stage == Stage::Ending
            && self.link.as_ref().is_some_and(|l| l.is_quiet() || now >= self.until)
        {
            self.drop_link(mail);
        }
        if self.link.as_ref().is_some_and(Link::has_room) {
            mail.extend(self.starved.drain(..).map(|id| (id, Event::Look)));
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
                    self.drop_link(mail);
                }
            }
            Event::Look => {}
        }
    }

    /// The queue pair goes: nothing reads or writes its members' memory any more.
    fn drop_link(&mut self, mail: &mut Vec<Mail>) {
        self.link = None;
        mail.extend(self.members.values().map(|id| (*id, Event::Look)));
    }
}
