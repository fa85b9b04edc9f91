//! One link: a queue pair, what is under way on it, and whose that is.
//!
//! What is under way has a number: a receive that of its buffer, a SEND that of its place, where it is noted whose
//! message it is. Data leaves [`KEPT`] places free: LLC must be answered. What finds none waits, in order, and goes
//! before any data.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use smc::smcr::group::{Key, Port};
use smc::smcr::stream::Transmit;
use smc::wire::smcr::cdc;
use smc::wire::smcr::llc::Llc;

use super::abi;
use super::nic::Place;
use crate::completion::{Completion, CompletionQueue};
use crate::device::{Device, Domain};
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
/// Bytes in each: ADD LINK of version 2 with 255 keys has 4152.
const SEND_LEN: u32 = 4352;
/// Completions that there can be at once.
const MOST_COMPLETIONS: usize = (RECEIVES + SENDS * 4) as usize;
/// LLC messages that wait. A peer that asks for more answers than this gives nothing back.
const MOST_WAITING: usize = 1024;
/// In a completion's number: a SEND.
const IS_SEND: u64 = 1 << 63;

/// What a completion means.
#[derive(Debug)]
pub enum Done {
    /// The message of the connection with that token and all before it have arrived; or an LLC message has.
    Sent(Option<(u32, u16)>),
    /// A message.
    Came(Vec<u8>),
    /// The queue pair is in error.
    Failed,
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    qp: QueuePair,
    domain: Arc<Domain>,
    sends: Arc<Region>,
    receives: Arc<Region>,
    free: Vec<u32>,
    /// Whose message is in each place.
    whose: [Option<(u32, u16)>; SENDS as usize],
    done: Vec<Completion>,
    /// LLC without a place yet.
    waiting: VecDeque<Llc>,
    watched: bool,
    /// This end.
    pub own: Port,
}

impl Link {
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
        Ok(Self {
            qp,
            domain: domain.clone(),
            sends,
            receives,
            free: (0..SENDS).collect(),
            whose: [None; SENDS as usize],
            done: Vec::new(),
            waiting: VecDeque::new(),
            watched: false,
            own,
        })
    }

    /// Receives are posted and the queue pair receives from that end: nothing that it sends is too early.
    pub fn listen(&self, other: &Port) -> io::Result<()> {
        (0..RECEIVES).try_for_each(|i| self.receive(i))?;
        let Port { gid, qpn, psn, .. } = *other;
        let remote = Remote { qpn, gid, psn, mtu: other.mtu.min(self.own.mtu), hop_limit: 1 };
        self.qp.ready_to_receive(&remote)
    }

    /// It may send. (A client does when it is asked to confirm the link.)
    pub fn talk(&self) -> io::Result<()> {
        self.qp.ready_to_send(self.own.psn)
    }

    /// What its memory is registered in.
    #[must_use]
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Whether it goes by that device.
    #[must_use]
    pub fn is_of(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(self.domain.device(), device)
    }

    /// Holds the regions of a connection.
    pub fn attach(&self, region: &Arc<Region>) -> io::Result<()> {
        self.qp.attach(region)
    }

    /// Lets go of one that no work under way needs.
    pub fn detach(&self, region: &Arc<Region>) {
        self.qp.detach(region);
    }

    /// The descriptor that becomes readable when an armed link has something, if nobody watches it yet.
    pub fn to_watch(&mut self) -> Option<i32> {
        (!std::mem::replace(&mut self.watched, true)).then(|| self.qp.completions().fd())
    }

    /// Whether data may be sent.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.free.len() > KEPT && self.waiting.is_empty()
    }

    /// Whether nothing that was sent is without a completion.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.free.len() == SENDS as usize && self.waiting.is_empty()
    }

    /// The next completion wakes who sleeps. Look once more after this.
    pub fn arm(&self) -> io::Result<()> {
        while self.qp.completions().woken()? {}
        self.qp.completions().arm(false)
    }

    /// The queue pair fails: nothing more goes, and nothing more is taken.
    pub fn fail(&self) {
        // What has failed before needs no help.
        let _ = self.qp.fail();
    }

    fn receive(&self, index: u32) -> io::Result<()> {
        let offset = (index * RECEIVE_LEN) as usize;
        let into = Piece { region: &self.receives, offset, len: RECEIVE_LEN };
        self.qp.post_receive(u64::from(index), &into)
    }

    /// All that has completed: who has seen the end of TCP's stream knows that nothing that came before is left here.
    /// False: nothing has.
    pub fn poll(&mut self, out: &mut Vec<Done>) -> bool {
        let mut done = std::mem::take(&mut self.done);
        done.clear();
        let polled = loop {
            match self.qp.completions().poll(&mut done) {
                Ok(0) => break true,
                Ok(_) if done.len() < MOST_COMPLETIONS => {}
                Ok(_) => break true,
                Err(_) => break false,
            }
        };
        done.iter().for_each(|c| self.completed(c, out));
        if !polled {
            out.push(Done::Failed);
        }
        let moved = !done.is_empty() || !polled;
        self.done = done;
        moved
    }

    fn completed(&mut self, c: &Completion, out: &mut Vec<Done>) {
        let is_send = c.id & IS_SEND != 0;
        let mut whose = None;
        if is_send {
            self.free.push(c.id as u32);
            whose = self.whose.get_mut(c.id as u32 as usize).and_then(Option::take);
        }
        match c.error {
            Some(_) => out.push(Done::Failed),
            None if is_send => out.push(Done::Sent(whose)),
            None => self.arrived(c, out),
        }
    }

    fn arrived(&mut self, c: &Completion, out: &mut Vec<Done>) {
        let index = c.id as u32;
        let mut bytes = vec![0; c.len.min(RECEIVE_LEN) as usize];
        let offset = index as usize * RECEIVE_LEN as usize;
        if !c.received || !self.receives.get(offset, &mut bytes) {
            // Nothing that was posted: the device's error.
            return out.push(Done::Failed);
        }
        out.push(Done::Came(bytes));
        // What has come has come, also where nothing can come any more.
        if self.receive(index).is_err() {
            out.push(Done::Failed);
        }
    }

    /// An LLC message goes as soon as there is a place. False: too many wait.
    #[must_use]
    pub fn say(&mut self, llc: Llc) -> bool {
        let fits = self.waiting.len() < MOST_WAITING;
        if fits {
            self.waiting.push_back(llc);
        }
        fits
    }

    /// Sends what waits, as far as there are places.
    pub fn send_waiting(&mut self) -> io::Result<()> {
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

impl Drop for Link {
    fn drop(&mut self) {
        if self.watched {
            abi::disown(self.qp.completions().fd());
        }
    }
}
