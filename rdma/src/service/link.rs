//! A link group over verbs: its queue pair, the messages on it, and whose they are.
//!
//! What is under way has a number: a receive that of its buffer, a SEND that of its place, where it is noted whose
//! message it is. Data leaves [`KEPT`] places free: LLC must be answered. What finds none waits, in order, and goes
//! before any data.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use smc::smcr::Ms;
use smc::smcr::group::{Action, Ended, Group, Key, LINKS, Port, Role, Terms};
use smc::smcr::stream::Transmit;
use smc::wire::smcr::cdc::{self, Cdc};
use smc::wire::smcr::llc::DeleteReason;
use smc::wire::smcr::llc::Llc;
use smc::wire::smcr::{Diagnosis, Gid};

use super::nic::Place;
use crate::completion::{Completion, CompletionQueue};
use crate::device::{Domain, Event as Told};
use crate::memory::{Access, Region};
use crate::queue_pair::{Depth, Piece, QueuePair, Remote};

/// Receives that are posted.
const RECEIVES: u32 = 64;
/// A receive takes the longest LLC message.
const RECEIVE_LEN: u32 = 8192;
/// SENDs under way, each with up to three WRITEs before it: fewer than the kernel posts receives for.
const SENDS: u32 = 32;
/// Places that data may not take.
const KEPT: usize = 4;
/// Bytes in each; ADD LINK of version 2 with few keys.
const SEND_LEN: u32 = 256;
/// Completions that there can be at once.
const MOST_COMPLETIONS: usize = (RECEIVES + SENDS * 4) as usize;
/// LLC messages that wait. A peer that asks for more answers than this gives nothing back.
const MOST_WAITING: usize = 1024;
/// In a completion's number: a SEND.
const IS_SEND: u64 = 1 << 63;

/// What has happened on a link.
#[derive(Debug)]
pub enum Event {
    /// A CDC message.
    Cdc(Cdc),
    /// The CDC message of the connection with that token and all before it have arrived.
    Sent(u32, u16),
    /// First contact is complete.
    Ready,
    /// The link group has ended.
    Ended(Ended),
    /// The peer may write to our buffer of that index; or will not.
    Keyed(usize, bool),
    /// Nothing by itself: what was waited for may be there.
    Look,
}

/// A queue pair before the other end is known.
#[derive(Debug)]
pub struct Half {
    qp: QueuePair,
    sends: Arc<Region>,
    receives: Arc<Region>,
    /// This end.
    pub own: Port,
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    qp: QueuePair,
    group: Group,
    own_psn: u32,
    sends: Arc<Region>,
    receives: Arc<Region>,
    free: Vec<u32>,
    /// Whose message is in each place.
    whose: [Option<(u32, u16)>; SENDS as usize],
    done: Vec<Completion>,
    /// LLC without a place yet.
    waiting: VecDeque<Llc>,
    /// The last thing was said, see [`Event::Ended`].
    over: bool,
}

impl Half {
    /// Makes one, receiving from nobody yet.
    pub fn new(domain: &Arc<Domain>, place: &Place, psn: u32) -> io::Result<Self> {
        let device = &place.nic.device;
        let queue = CompletionQueue::new(device, MOST_COMPLETIONS as i32)?;
        let sends = Region::new(domain, (SENDS * SEND_LEN) as usize, Access::Local)?;
        let receives = Region::new(domain, (RECEIVES * RECEIVE_LEN) as usize, Access::Local)?;
        let depth = Depth { send: SENDS * 4, recv: RECEIVES };
        let qp = QueuePair::new(domain, &queue, (place.port, place.gid.index), depth, cdc::LEN as u32)?;
        qp.attach(&sends)?;
        qp.attach(&receives)?;
        let own = Port { mac: place.gid.mac, gid: place.gid.gid, qpn: qp.number(), psn, mtu: place.mtu };
        Ok(Self { qp, sends, receives, own })
    }

    /// Receives are posted and the queue pair receives from that end: nothing that it sends is too early.
    pub fn join(self, other: Port, gid: Gid, terms: Terms, keys: (Key, Key), now: Ms) -> io::Result<Link> {
        let Self { qp, sends, receives, own } = self;
        let link = Link {
            group: Group::first_contact(terms, (own, other), keys.0, keys.1, now),
            own_psn: own.psn,
            sends,
            receives,
            free: (0..SENDS).collect(),
            whose: [None; SENDS as usize],
            done: Vec::new(),
            waiting: VecDeque::new(),
            over: false,
            qp,
        };
        (0..RECEIVES).try_for_each(|i| link.receive(i))?;
        let remote = Remote { qpn: other.qpn, gid, psn: other.psn, mtu: other.mtu, hop_limit: 1 };
        link.qp.ready_to_receive(&remote)?;
        // A client sends when it is asked to confirm the link.
        if terms.role == Role::Server {
            link.qp.ready_to_send(own.psn)?;
        }
        Ok(link)
    }
}

impl Link {
    /// Holds the regions of a connection.
    pub fn attach(&self, region: &Arc<Region>) -> io::Result<()> {
        self.qp.attach(region)
    }

    /// Becomes readable when an armed link has something.
    #[must_use]
    pub fn fd(&self) -> i32 {
        self.qp.completions().fd()
    }

    /// When [`Self::progress`] is due for the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        self.group.deadline()
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

    /// Lets go of one that no work under way needs.
    pub fn detach(&self, region: &Arc<Region>) {
        self.qp.detach(region);
    }

    /// Whether this is the link that a server names so.
    #[must_use]
    pub fn leads_to(&self, qpn: u32, gid: &Gid) -> bool {
        self.group.find(qpn, gid) == Some(0)
    }

    /// Whether the peer has told, by this link, that it has a buffer there.
    #[must_use]
    pub fn peer_has(&self, key: Key) -> bool {
        let told = self.group.peer_buffer(0, key.rkey).and_then(|i| self.group.peer_key(i, 0));
        told == Some(key)
    }

    /// This end.
    #[must_use]
    pub fn own(&self) -> Option<Port> {
        self.group.ends(0).map(|(_, own, _)| own)
    }

    /// A buffer that the peer is to be told of, which is held from now on; its index.
    pub fn add_buffer(&mut self, rmb: &Arc<Region>, now: Ms) -> Option<usize> {
        let mut keys = [None; LINKS];
        keys[0] = Some(Key { rkey: rmb.rkey(), addr: rmb.address() });
        self.group.add_buffer(keys, now)
    }

    /// The peer is told that the buffer is gone.
    pub fn delete_buffer(&mut self, index: usize) {
        self.group.delete_buffer(index);
    }

    /// Whether data may be sent.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.free.len() > KEPT && self.waiting.is_empty() && !self.over
    }

    /// Whether nothing that was sent is without a completion.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.free.len() == SENDS as usize && self.waiting.is_empty()
    }

    /// The group ends: the peer is told.
    pub fn terminate(&mut self) {
        self.group.terminate(DeleteReason::PROGRAM);
    }

    /// The next completion wakes who sleeps. Look once more after this.
    pub fn arm(&self) -> io::Result<()> {
        while self.qp.completions().woken()? {}
        self.qp.completions().arm(false)
    }

    /// The device says that something has failed.
    pub fn told(&mut self, what: Told, now: Ms) {
        let ours = match what {
            Told::QueuePair(qpn) => qpn == self.qp.number(),
            Told::Fatal => true,
            _ => false,
        };
        if ours {
            self.group.link_failed(0, now);
        }
    }

    /// Does what there is to do, and says what has happened; false: nothing.
    pub fn progress(&mut self, now: Ms, out: &mut Vec<Event>) -> io::Result<bool> {
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        // All that are there: who has seen the end of TCP's stream knows that nothing that came before is left here.
        while done.len() < MOST_COMPLETIONS && self.qp.completions().poll(&mut done)? > 0 {}
        let mut moved = !done.is_empty();
        let handled = done.iter().try_for_each(|c| self.completed(c, now, out));
        self.done = done;
        handled?;
        if self.group.deadline().is_some_and(|d| d <= now) {
            self.group.tick(now);
        }
        let mut ended = None;
        while let Some(action) = self.group.poll_action() {
            moved = true;
            match action {
                Action::Ended(why) => ended = Some(why),
                action => self.act(action, now, out)?,
            }
        }
        if let Some(why) = ended {
            self.ends(why, now, out)?;
        }
        self.send_waiting()?;
        Ok(moved)
    }

    /// The end is told behind the last message: a queue pair in error takes no more, and the peer knows that it has sent
    /// what was taken.
    fn ends(&mut self, why: Ended, now: Ms, out: &mut Vec<Event>) -> io::Result<()> {
        self.over = true;
        let mut last = Vec::new();
        if why == Ended::NoLink {
            while last.len() < MOST_COMPLETIONS && self.qp.completions().poll(&mut last)? > 0 {}
        }
        // What fails now is nothing new.
        last.iter().for_each(|c| _ = self.completed(c, now, out));
        out.push(Event::Ended(why));
        Ok(())
    }

    /// The queue pair fails, as by a device's error: for tests.
    pub fn break_it(&self) {
        // What has failed before needs no help.
        let _ = self.qp.fail();
    }

    /// The link is known to be lost.
    pub fn fail(&mut self, now: Ms) {
        self.group.link_failed(0, now);
    }

    fn receive(&self, index: u32) -> io::Result<()> {
        let offset = (index * RECEIVE_LEN) as usize;
        let into = Piece { region: &self.receives, offset, len: RECEIVE_LEN };
        self.qp.post_receive(u64::from(index), &into)
    }

    fn completed(&mut self, c: &Completion, now: Ms, out: &mut Vec<Event>) -> io::Result<()> {
        let whose = (c.id & IS_SEND != 0).then(|| {
            self.free.push(c.id as u32);
            self.whose.get_mut(c.id as u32 as usize).and_then(Option::take)
        });
        if c.error.is_some() {
            self.group.link_failed(0, now);
            return Ok(());
        }
        match whose {
            Some(whose) => out.extend(whose.map(|(token, seq)| Event::Sent(token, seq))),
            None if c.received => self.arrived(c, now, out)?,
            None => {}
        }
        Ok(())
    }

    fn arrived(&mut self, c: &Completion, now: Ms, out: &mut Vec<Event>) -> io::Result<()> {
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
        // As Linux has it: what is too short is dropped.
        out.extend(Cdc::decode(&bytes).ok().map(Event::Cdc));
        Ok(())
    }

    fn act(&mut self, action: Action, now: Ms, out: &mut Vec<Event>) -> io::Result<()> {
        match action {
            Action::Send(_, llc) if !self.over => {
                if self.waiting.len() >= MOST_WAITING {
                    return Err(io::Error::other("too much to answer"));
                }
                self.waiting.push_back(llc);
                self.send_waiting()?;
            }
            Action::ReadyToSend(_) => self.qp.ready_to_send(self.own_psn)?,
            Action::Ready => out.push(Event::Ready),
            Action::Lost(..) => {
                // What has no place would only fail.
                self.waiting.clear();
                self.qp.fail()?;
            }
            // One link: no other is ever made.
            Action::Make(slot, _) => _ = self.group.link_made(slot, None, now),
            Action::Confirmed(index, ok) => out.push(Event::Keyed(index, ok)),
            Action::Send(..) | Action::Connect(..) | Action::Active(_) | Action::Ended(_) => {}
            Action::Gone | Action::Asked(_) | Action::Deleted(_) => {}
        }
        Ok(())
    }

    fn send_waiting(&mut self) -> io::Result<()> {
        while !self.free.is_empty()
            && let Some(llc) = self.waiting.pop_front()
        {
            self.send(&llc.encode(), None)?;
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8], whose: Option<(u32, u16)>) -> io::Result<()> {
        let full = || io::Error::other("no place for a SEND");
        let slot = self.free.pop().ok_or_else(full)?;
        let offset = (slot * SEND_LEN) as usize;
        if bytes.len() > SEND_LEN as usize || !self.sends.put(offset, bytes) {
            self.free.push(slot);
            return Err(full());
        }
        if let Some(place) = self.whose.get_mut(slot as usize) {
            *place = whose;
        }
        let from = Piece { region: &self.sends, offset, len: bytes.len() as u32 };
        self.qp.post_send(IS_SEND | u64::from(slot), &from)
    }

    /// Posts WRITEs from `buffer` to the peer's RMBE, and the CDC message of the connection with that token.
    pub fn transmit(&mut self, token: u32, t: &Transmit, buffer: &Arc<Region>, to: Key) -> io::Result<()> {
        for w in t.writes.iter() {
            let from = Piece { region: buffer, offset: w.from as usize, len: w.len };
            self.qp.post_write(0, &from, (to.rkey, to.addr.wrapping_add(u64::from(w.to))))?;
        }
        self.send(&t.cdc.encode(), Some((token, t.cdc.seq)))
    }
}
