//! The links of a group: its machine with verbs beneath, a queue pair for each link, and its members' memory on each.
//!
//! ```text
//!                  ┌─ link, over one device ────> CDC, completions ──┐
//!  members' rings ─┤  (registered with each)                         ├─> events, by token
//!                  └─ link, over another device ─> CDC, completions ─┘
//! ```
//!
//! A member sends by one link, and hears by all: its peer may have chosen another. When a link is lost its queue pair is
//! failed, emptied of what has completed, and destroyed; then its members go on by another ([`Event::Moved`]), or wait
//! for one that is being added.
//!
//! The hard idea is the order in which messages of two links are heard. A peer whose link is lost says by the other
//! which message is known to have arrived, and that one may still lie in the lost link's queue here: it was there before
//! it was known to be. So when such a word has come all queues are looked at once more, and what came before it by
//! another link is put before it ([`in_order`]).

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use smc::smcr::Ms;
use smc::smcr::group::{Action, Ended, Group, Key, Keys, LINKS, Made, Port, Role, Slot, Terms};
use smc::smcr::stream::Transmit;
use smc::sys;
use smc::wire::smcr::cdc::{self, Cdc};
use smc::wire::smcr::llc::DeleteReason;
use smc::wire::smcr::{Diagnosis, Gid};

use super::link::{Done, Link};
use super::nic::{self, Nic, Place};
use crate::device::{Device, Domain, Event as Told};
use crate::memory::Region;

/// A server looks for another link so long after one was lost or refused, then twice as long each time, up to the last.
const SEEK: Ms = 2_000;
/// The same.
const SEEK_MOST: Ms = 600_000;

/// What has happened on the links.
#[derive(Debug)]
pub enum Event {
    /// A CDC message.
    Cdc(Cdc),
    /// The CDC message of the connection with that token and all before it have arrived.
    Sent(u32, u16),
    /// The connection with that token goes on by another link: what is not known to have arrived goes once more.
    Moved(u32),
    /// Nothing comes late by a link that was lost.
    Gone,
    /// First contact is complete.
    Ready,
    /// The link group has ended.
    Ended(Ended),
    /// The peer may write to our buffer of that index; or will not.
    Keyed(usize, bool),
    /// The peer has taken its buffer of that index back.
    Deleted(usize),
    /// Nothing by itself: what was waited for may be there.
    Look,
}

/// A connection's rings, registered: what the peer writes into, and what is sent from.
type Rings = (Arc<Region>, Arc<Region>);

/// The peer's buffer of a member.
#[derive(Clone, Copy, Debug)]
struct Theirs {
    /// None: the peer has taken it back.
    index: Option<usize>,
    keys: Keys,
    /// Of an RMB with several RMBEs, where this one begins.
    offset: u64,
}

/// A connection of the group.
#[derive(Debug)]
struct Member {
    /// The index of its receive buffer.
    index: Option<usize>,
    /// By link.
    rings: [Option<Rings>; LINKS],
    /// As they were registered first.
    first: Rings,
    /// By which it sends; none: that one is lost, and there is no other yet.
    slot: Option<Slot>,
    theirs: Option<Theirs>,
}

/// See the module.
#[derive(Debug)]
pub struct Links {
    group: Group,
    links: [Option<Link>; LINKS],
    members: HashMap<u32, Member>,
    /// The peer's ports, as far as it has told.
    ports: Vec<Gid>,
    /// When another link is looked for, and how often that was in vain.
    seek: Option<Ms>,
    tries: u32,
    /// The last thing was said, see [`Event::Ended`].
    over: bool,
}

/// Why a connection's bytes did not go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsent {
    /// The link has failed; another may take over.
    Link,
    /// Its peer has no buffer where it should.
    Connection,
}

impl Member {
    fn ring(&self, slot: Slot) -> Option<&Rings> {
        self.rings.get(slot)?.as_ref()
    }

    /// Registers its rings with a link, which holds them.
    fn join(&mut self, slot: Slot, link: &Link) -> io::Result<Key> {
        let on = |first: &Arc<Region>| {
            let here = Arc::ptr_eq(first.domain(), link.domain());
            if here { Ok(first.clone()) } else { first.again(link.domain()) }
        };
        let (rmb, buffer) = (on(&self.first.0)?, on(&self.first.1)?);
        link.attach(&rmb)?;
        link.attach(&buffer)?;
        let key = key_of(&rmb);
        if let Some(place) = self.rings.get_mut(slot) {
            *place = Some((rmb, buffer));
        }
        Ok(key)
    }
}

fn key_of(rmb: &Arc<Region>) -> Key {
    Key { rkey: rmb.rkey(), addr: rmb.address() }
}

impl Links {
    /// A group whose first link's ends are known, before the peer hears of that: it receives. `member`: the connection
    /// that makes it, its rings, and the peer's.
    pub fn new(
        link: Link,
        other: Port,
        terms: Terms,
        member: (u32, Rings, Key, u64),
        ports: Vec<Gid>,
        now: Ms,
    ) -> io::Result<Self> {
        let (token, first, peer, offset) = member;
        let group = Group::first_contact(terms, (link.own, other), key_of(&first.0), peer, now);
        let theirs = Theirs { index: Some(0), keys: [Some(peer), None, None], offset };
        let mut member =
            Member { index: Some(0), rings: [None, None, None], first, slot: Some(0), theirs: Some(theirs) };
        member.join(0, &link)?;
        link.listen(&other)?;
        // A client sends when it is asked to confirm the link.
        if terms.role == Role::Server {
            link.talk()?;
        }
        let links = [Some(link), None, None];
        let members = HashMap::from([(token, member)]);
        Ok(Self { group, links, members, ports, seek: None, tries: 0, over: false })
    }

    fn link(&self, slot: Slot) -> Option<&Link> {
        self.links.get(slot)?.as_ref()
    }

    fn link_mut(&mut self, slot: Slot) -> Option<&mut Link> {
        self.links.get_mut(slot)?.as_mut()
    }

    fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        0..LINKS
    }

    /// Why it is no link any more, as a handshake says it.
    #[must_use]
    pub fn diagnosis(ended: Ended) -> Diagnosis {
        match ended {
            Ended::Timeout => Diagnosis::TIMEOUT_CONFIRM_LINK,
            Ended::Eyecatcher => Diagnosis::RMBE_EYECATCHER,
            _ => Diagnosis::NO_ACTIVE_LINK,
        }
    }

    // Members.

    /// What a new member's memory is to be registered in first.
    #[must_use]
    pub fn domain(&self) -> Option<Arc<Domain>> {
        let slot = self.group.active().next()?;
        self.link(slot).map(|l| l.domain().clone())
    }

    /// The link that a server has named so.
    #[must_use]
    pub fn named(&self, qpn: u32, gid: &Gid) -> Option<Slot> {
        self.group.find(qpn, gid)
    }

    /// The link with the fewest members.
    #[must_use]
    pub fn least(&self) -> Option<Slot> {
        let count = |s: &Slot| self.members.values().filter(|m| m.slot == Some(*s)).count();
        self.group.active().min_by_key(count)
    }

    /// A member that has not begun goes by the link with the fewest, of which there may be more since it came.
    pub fn choose(&mut self, token: u32) {
        if let Some(m) = self.members.get_mut(&token) {
            m.slot = None;
        }
        let least = self.least();
        if let Some(m) = self.members.get_mut(&token) {
            m.slot = least;
        }
    }

    /// A new member, by that link: its buffer is told to the peer. Its index, if there is room.
    pub fn enroll(&mut self, token: u32, slot: Slot, rings: Rings, now: Ms) -> Option<usize> {
        let mut member =
            Member { index: None, rings: [None, None, None], first: rings, slot: Some(slot), theirs: None };
        let mut keys = [None; LINKS];
        let mut registered = true;
        for (slot, link) in self.links.iter().enumerate().filter_map(|(s, l)| Some((s, l.as_ref()?))) {
            match (member.join(slot, link), keys.get_mut(slot)) {
                (Ok(key), Some(place)) => *place = Some(key),
                _ => registered = false,
            }
        }
        member.index = if registered { self.group.add_buffer(keys, now) } else { None };
        let index = member.index;
        self.members.insert(token, member);
        if index.is_none() {
            self.withdraw(token);
        }
        index
    }

    /// A member is out, and its memory out of the devices' reach. Nothing that it has sent is under way.
    pub fn withdraw(&mut self, token: u32) {
        let Some(m) = self.members.remove(&token) else { return };
        if let Some(index) = m.index {
            self.group.delete_buffer(index);
        }
        for (link, rings) in self.links.iter().zip(&m.rings) {
            if let (Some(link), Some((rmb, buffer))) = (link, rings) {
                link.detach(rmb);
                link.detach(buffer);
            }
        }
    }

    /// A member writes to the peer's buffer of that key, from `offset` on. None: the peer has told of no such buffer by
    /// any link. Otherwise its index.
    pub fn claim(&mut self, token: u32, key: Key, offset: u64) -> Option<usize> {
        let index = self.group.peer_has(key)?;
        let keys = self.group.peer_keys(index)?;
        let m = self.members.get_mut(&token)?;
        m.theirs = Some(Theirs { index: Some(index), keys, offset });
        Some(index)
    }

    /// This end of the link that a member sends by, and its buffer's key there.
    #[must_use]
    pub fn end(&self, token: u32) -> Option<(Port, Key)> {
        let m = self.members.get(&token)?;
        let slot = m.slot?;
        Some((self.link(slot)?.own, key_of(&m.ring(slot)?.0)))
    }

    /// Whether it is a member.
    #[must_use]
    pub fn has(&self, token: u32) -> bool {
        self.members.contains_key(&token)
    }

    /// Whether a member may send data.
    #[must_use]
    pub fn has_room(&self, token: u32) -> bool {
        let slot = self.members.get(&token).and_then(|m| m.slot);
        !self.over && slot.and_then(|s| self.link(s)).is_some_and(Link::has_room)
    }

    /// Posts what a member has to say.
    pub fn transmit(&mut self, token: u32, t: &Transmit, now: Ms) -> Result<(), Unsent> {
        let m = self.members.get(&token).ok_or(Unsent::Connection)?;
        let slot = m.slot.ok_or(Unsent::Link)?;
        let (_, buffer) = m.ring(slot).ok_or(Unsent::Connection)?;
        let (buffer, theirs) = (buffer.clone(), m.theirs.ok_or(Unsent::Connection)?);
        let key = theirs.keys.get(slot).copied().flatten().ok_or(Unsent::Connection)?;
        let to = Key { addr: key.addr.wrapping_add(theirs.offset), ..key };
        let link = self.link_mut(slot).ok_or(Unsent::Link)?;
        link.transmit(token, t, &buffer, to).map_err(|_| {
            self.group.link_failed(slot, now);
            Unsent::Link
        })
    }

    // The whole group.

    /// Whether nothing that was sent is without a completion.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.links.iter().flatten().all(Link::is_quiet)
    }

    /// The group ends: the peer is told.
    pub fn terminate(&mut self) {
        self.group.terminate(DeleteReason::PROGRAM);
    }

    /// When [`Self::progress`] is due for the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        let seek = self.seek.filter(|_| self.group.lacks_link());
        self.group.deadline().into_iter().chain(seek).min()
    }

    /// Descriptors that become readable when armed links have something, those that nobody watches yet.
    pub fn to_watch(&mut self) -> impl Iterator<Item = i32> {
        self.links.iter_mut().flatten().filter_map(Link::to_watch)
    }

    /// The next completion wakes who sleeps. Look once more after this.
    pub fn arm(&self) {
        // One that can't be armed is one of a device that is gone, which its events tell.
        self.links.iter().flatten().for_each(|l| _ = l.arm());
    }

    /// A device says that something has happened.
    pub fn told(&mut self, device: &Arc<Device>, what: Told, now: Ms) {
        for slot in self.slots() {
            let Some(link) = self.link(slot).filter(|l| l.is_of(device)) else { continue };
            let failed = match what {
                Told::QueuePair(qpn) => qpn == link.own.qpn,
                Told::Fatal => true,
                // The only link is kept as long as it keeps trying: the port may be back before it gives up.
                Told::Port(_, false) => self.group.active().any(|s| s != slot),
                _ => false,
            };
            if failed {
                self.group.link_failed(slot, now);
            }
        }
    }

    /// A device is there, again perhaps: a server looks for another link at once, and a client asks for one.
    pub fn device_is_back(&mut self, now: Ms, nics: &[Nic]) {
        self.tries = 0;
        match self.group.role() {
            _ if !self.group.lacks_link() => {}
            Role::Server => self.seek = Some(now),
            Role::Client => {
                let free = nic::free(nics, &self.own_ports());
                if !free.is_empty() {
                    self.group.ask_link(&free);
                }
            }
        }
    }

    /// A server adds another link where there is a place for it.
    fn seek(&mut self, now: Ms, nics: &[Nic]) {
        if self.group.role() == Role::Client || !self.group.lacks_link() {
            return;
        }
        let wait = SEEK.saturating_mul(1 << self.tries.min(16)).min(SEEK_MOST);
        if now >= *self.seek.get_or_insert(now + wait) {
            self.seek = None;
            self.tries += 1;
            if self.place(None, nics).is_some() {
                self.group.add_link(now);
            }
        }
    }

    /// For tests: the link that a member sends by fails, as by a device's error. Whether another was left.
    pub fn break_it(&self, token: u32, last: bool) -> bool {
        let slot = self.members.get(&token).and_then(|m| m.slot);
        let Some(slot) = slot.filter(|s| last || self.group.active().any(|o| o != *s)) else { return false };
        self.link(slot).map(Link::fail).is_some()
    }

    /// The peer has said by other means that no link is left.
    pub fn fail(&mut self, now: Ms) {
        for slot in self.slots() {
            self.group.link_failed(slot, now);
        }
    }

    /// Does what there is to do, and says what has happened; false: nothing.
    pub fn progress(&mut self, now: Ms, nics: &[Nic], out: &mut Vec<Event>) -> bool {
        let (mut moved, mut ended) = (false, None);
        self.seek(now, nics);
        loop {
            let seen = validations(out);
            for slot in self.slots() {
                let mut done = Vec::new();
                moved |= self.link_mut(slot).is_some_and(|l| l.poll(&mut done));
                self.completed(slot, done, now, out);
            }
            if self.group.deadline().is_some_and(|d| d <= now) {
                self.group.tick(now);
            }
            moved |= self.act(now, nics, out, &mut ended);
            if validations(out) == seen {
                break;
            }
        }
        in_order(out);
        if let Some(why) = ended {
            // Behind the last message: nothing is sent any more.
            self.over = true;
            out.push(Event::Ended(why));
        }
        moved
    }

    fn completed(&mut self, slot: Slot, done: Vec<Done>, now: Ms, out: &mut Vec<Event>) {
        for d in done {
            match d {
                Done::Sent(whose) => out.extend(whose.map(|(token, seq)| Event::Sent(token, seq))),
                Done::Came(bytes) if bytes.first() == Some(&cdc::TYPE) => {
                    self.group.heard(slot, now);
                    // As Linux has it: what is too short is dropped.
                    out.extend(Cdc::decode(&bytes).ok().map(Event::Cdc));
                }
                Done::Came(bytes) => self.group.handle_bytes(slot, &bytes, now),
                Done::Failed => self.group.link_failed(slot, now),
            }
        }
    }

    /// What the machine wants done, and what follows from that. False: nothing.
    fn act(&mut self, now: Ms, nics: &[Nic], out: &mut Vec<Event>, ended: &mut Option<Ended>) -> bool {
        let mut moved = false;
        loop {
            while let Some(action) = self.group.poll_action() {
                moved = true;
                if let Action::Ended(why) = action {
                    *ended = Some(why);
                } else if let Err(slot) = self.act_on(action, now, nics, out) {
                    self.group.link_failed(slot, now);
                }
            }
            for slot in self.slots() {
                if self.link_mut(slot).is_some_and(|l| l.send_waiting().is_err()) {
                    self.group.link_failed(slot, now);
                }
            }
            if !self.group.has_action() {
                return moved;
            }
        }
    }

    /// One thing; or the link that has failed.
    fn act_on(&mut self, action: Action, now: Ms, nics: &[Nic], out: &mut Vec<Event>) -> Result<(), Slot> {
        match action {
            Action::Send(slot, llc) => {
                let over = self.over;
                let link = self.link_mut(slot).filter(|_| !over);
                if link.is_some_and(|l| !l.say(llc)) {
                    return Err(slot);
                }
            }
            Action::Make(slot, port) => {
                let (link, made) = self.make(slot, port, nics).unzip();
                let wanted = self.group.link_made(slot, made, now);
                self.put(slot, link.filter(|_| wanted));
            }
            Action::Connect(slot, port) => {
                let server = self.group.role() == Role::Server;
                let connect =
                    |l: &Link| l.listen(&port).and_then(|()| if server { l.talk() } else { Ok(()) });
                self.link(slot).map_or(Ok(()), connect).map_err(|_| slot)?;
            }
            Action::ReadyToSend(slot) => self.link(slot).map_or(Ok(()), Link::talk).map_err(|_| slot)?,
            Action::Active(slot) => self.active(slot, out),
            Action::Lost(slot, to) => self.lost(slot, to, now, out),
            Action::Asked(ports) => {
                self.ports = ports;
                if self.place(None, nics).is_some() {
                    self.group.add_link(now);
                }
            }
            Action::Deleted(index) => {
                let theirs = self.members.values_mut().filter_map(|m| m.theirs.as_mut());
                theirs.filter(|t| t.index == Some(index)).for_each(|t| t.index = None);
                out.push(Event::Deleted(index));
            }
            Action::Gone => out.push(Event::Gone),
            Action::Ready => out.push(Event::Ready),
            Action::Confirmed(index, ok) => out.push(Event::Keyed(index, ok)),
            Action::Ended(_) => {}
        }
        Ok(())
    }

    // Links that come and go.

    /// Our ends of the links that there are.
    fn own_ports(&self) -> Vec<Gid> {
        self.slots().filter_map(|s| self.group.ends(s)).map(|(_, own, _)| own.gid).collect()
    }

    /// Where another link could go, and which of the peer's ports it would lead to: `to`, if that is known.
    fn place(&self, to: Option<Port>, nics: &[Nic]) -> Option<(Place, Gid)> {
        let own = self.own_ports();
        let peers = self.slots().filter_map(|s| self.group.ends(s)?.2);
        let used: Vec<Gid> = peers.map(|p| p.gid).collect();
        let free = self.ports.iter().filter(|g| !used.contains(g)).copied();
        let ports: Vec<Gid> = to.map_or_else(|| free.collect(), |p| vec![p.gid]);
        nic::another(nics, &own, &ports)
    }

    /// Another link's queue pair, with all members' rings.
    fn make(&mut self, slot: Slot, to: Option<Port>, nics: &[Nic]) -> Option<(Link, Made)> {
        let (place, target) = self.place(to, nics)?;
        let domain = Domain::new(&place.nic.device).ok()?;
        let link = Link::new(&domain, &place, sys::random_u32() >> 8).ok()?;
        let mut keys = vec![Key::default(); self.group.buffers()];
        for m in self.members.values_mut() {
            let key = m.join(slot, &link).ok()?;
            if let Some(place) = m.index.and_then(|i| keys.get_mut(i)) {
                *place = key;
            }
        }
        let made = Made { own: link.own, target, keys };
        Some((link, made))
    }

    /// What is in that slot now; with none, no member has its rings there.
    fn put(&mut self, slot: Slot, link: Option<Link>) {
        if link.is_none() {
            for ring in self.members.values_mut().filter_map(|m| m.rings.get_mut(slot)) {
                *ring = None;
            }
        }
        if let Some(place) = self.links.get_mut(slot) {
            *place = link;
        }
    }

    /// A link may be used: the peer's keys on it are known. Who has none goes by it.
    fn active(&mut self, slot: Slot, out: &mut Vec<Event>) {
        (self.seek, self.tries) = (None, 0);
        for (token, m) in &mut self.members {
            if let Some(t) = &mut m.theirs
                && let Some(keys) = t.index.and_then(|i| self.group.peer_keys(i))
            {
                t.keys = keys;
            }
            if m.slot.is_none() {
                m.slot = Some(slot);
                out.push(Event::Moved(*token));
            }
        }
    }

    /// The queue pair goes: what it has taken and sent counts, and from then on nothing of its members' memory is read or
    /// written by it. They go on by the other link, or wait for one.
    fn lost(&mut self, slot: Slot, to: Option<Slot>, now: Ms, out: &mut Vec<Event>) {
        let mut done = Vec::new();
        if let Some(link) = self.link_mut(slot) {
            link.fail();
            link.poll(&mut done);
        }
        self.completed(slot, done, now, out);
        self.put(slot, None);
        for (token, m) in self.members.iter_mut().filter(|(_, m)| m.slot == Some(slot)) {
            m.slot = to;
            if to.is_some() {
                out.push(Event::Moved(*token));
            }
        }
    }
}

/// How often a peer has said by another link what is known to have arrived.
fn validations(events: &[Event]) -> usize {
    events.iter().filter(|e| matches!(e, Event::Cdc(m) if m.flags.failover)).count()
}

/// Puts what a peer's word is about before that word, see the module.
fn in_order(events: &mut Vec<Event>) {
    let mut at = 0;
    while let Some(e) = events.get(at) {
        if let Event::Cdc(word) = e
            && word.flags.failover
        {
            let word = *word;
            let earlier =
                |e: &Event| matches!(e, Event::Cdc(m) if m.token == word.token && m.is_known_by(&word));
            while let Some(from) = events.iter().skip(at + 1).position(earlier).map(|n| at + 1 + n) {
                let e = events.remove(from);
                events.insert(at, e);
                at += 1;
            }
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smc::wire::smcr::cdc::Producer;

    fn message(token: u32, seq: u16, failover: bool) -> Event {
        Event::Cdc(Cdc { seq, token, flags: Producer { failover, ..Producer::default() }, ..Cdc::default() })
    }

    #[test]
    fn what_is_known_to_have_arrived_is_heard_first() {
        let mut events = vec![
            message(1, 3, true),
            message(1, 4, false),
            Event::Look,
            message(2, 1, false),
            message(1, 2, false),
            message(1, 3, false),
            message(1, 5, true),
            message(1, 65535, false),
        ];
        in_order(&mut events);
        let seen: Vec<_> = events
            .iter()
            .map(|e| if let Event::Cdc(m) = e { (m.token, m.seq, m.flags.failover) } else { (0, 0, false) })
            .collect();
        let expected = [
            (1, 2, false),
            (1, 3, false),
            (1, 65535, false),
            (1, 3, true),
            (1, 4, false),
            (0, 0, false),
            (2, 1, false),
            (1, 5, true),
        ];
        assert_eq!(seen, expected);
    }
}
