//! A connection on its link: between the page, where the program is, and the stream, which goes over the link.

use std::collections::VecDeque;

use smc::smcr::group::Ended;
use smc::smcr::stream::Stream;
use smc::smcr::{Misbehaved, Ms};
use smc::wire::smcr::cdc::Cdc;

use super::lgr::{Lgrs, Part};
use super::links::{Event, Unsent};
use super::page::Page;
use super::tcp;

/// Why a connection can't go on: the peer has broken the rules, or the device has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl From<Misbehaved> for Broken {
    fn from(_: Misbehaved) -> Self {
        Self
    }
}

/// See the module.
#[derive(Debug)]
pub struct Flow {
    /// Its place in the link group, and the rings.
    pub part: Part,
    /// The machine.
    pub stream: Stream,
    /// The peer is libsmc.
    pub kin: bool,
    /// How far the program and the peer know of each other's ends.
    pub ends: Ends,
    /// Why the link group is at its end.
    pub ended: Option<Ended>,
}

/// What has been told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The program's stream has left the ring.
    pub shut: bool,
    /// The program has let go, and the stream knows.
    pub closing: bool,
    /// The peer's stream has left the ring, and the program knows.
    pub left: bool,
    /// The program was asked to put no more into the ring.
    pub stopped: bool,
    /// FIN was sent.
    pub fin: bool,
    /// Up to where the program knows of the peer's bytes.
    pub published: u64,
    /// Up to where it knows of room.
    pub freed: u64,
}

impl Flow {
    /// A message.
    pub fn heard(&mut self, m: &Cdc) -> Result<(), Broken> {
        self.stream.handle_cdc(m)?;
        Ok(())
    }

    /// What has come: messages, completions, the link's end. False: nothing.
    pub fn listen(&mut self, mail: &mut VecDeque<Event>) -> Result<bool, Broken> {
        let some = !mail.is_empty();
        while let Some(e) = mail.pop_front() {
            match e {
                Event::Cdc(m) => self.heard(&m)?,
                Event::Sent(_, seq) => _ = self.stream.completed(seq),
                Event::Moved(_) => self.stream.failover(),
                Event::Gone => self.stream.old_link_gone(),
                Event::Ended(why) => self.ended = Some(why),
                Event::Ready | Event::Keyed(..) | Event::Deleted(_) | Event::Look => {}
            }
        }
        Ok(some)
    }

    /// What there is to say goes by the link, as far as it has room; `id` hears when it has more. False: nothing.
    pub fn transmit(&mut self, lgrs: &mut Lgrs, id: u32, now: Ms) -> Result<bool, Broken> {
        let seat = &self.part.seat;
        let mut moved = false;
        while self.ended.is_none()
            && let Some(links) = lgrs.links(seat.lgr)
        {
            if !links.has_room(seat.token) {
                lgrs.starve(seat, id);
                break;
            }
            let Some(t) = self.stream.poll_transmit() else { break };
            moved = true;
            match links.transmit(seat.token, &t, now) {
                Ok(()) => lgrs.sent(seat),
                // What has not gone goes by the next link, or back to TCP.
                Err(Unsent::Link) => break,
                Err(Unsent::Connection) => return Err(Broken),
            }
        }
        if moved {
            lgrs.heat(seat.lgr);
        }
        Ok(moved)
    }

    /// What the program has done goes to the peer. False: nothing.
    pub fn exchange(&mut self, page: &Page, closed: bool, fd: i32) -> Result<bool, Broken> {
        let was = self.stream.places();
        if !self.ends.stopped {
            let r = page.sent(was.written).map_err(|_| Broken)?;
            // No more than a ring, which is less than 4 GiB.
            self.stream.wrote(r.bytes as u32);
            if r.left && !self.ends.shut {
                self.ends.shut = true;
                self.stream.shutdown();
            }
        }
        let taken = page.taken(was.produced).map_err(|_| Broken)?;
        self.stream.took(taken.saturating_sub(was.consumed) as u32);
        if closed && !self.ends.closing {
            self.ends.closing = true;
            if tcp::resets_at_close(fd) { self.stream.abort() } else { self.stream.close() }
        }
        Ok(self.stream.places() != was)
    }

    /// What the peer has done goes to the program. True: it may have to be told to look.
    /// `fin`: the peer's FIN is here. One that is libsmc sends it right behind its flag, so the stream leaves the ring with
    /// that: until then TCP may bring what is not the program's ([`super::back`]).
    pub fn tell(&mut self, page: &Page, fin: bool) -> bool {
        let at = self.stream.places();
        if at.fin > self.ends.freed {
            self.ends.freed = at.fin;
            page.free(at.fin, at.written);
        }
        if at.produced > self.ends.published {
            self.ends.published = at.produced;
            page.publish(at.produced);
        }
        let heard = self.stream.heard();
        let leaves =
            !self.ends.left && (heard.done_writing || heard.closed) && !heard.abort && (fin || !self.kin);
        if leaves {
            self.ends.left = true;
            page.leave(at.produced);
        }
        // What is written after the peer has closed meets its TCP, which says so.
        let stops = !self.ends.stopped && heard.closed;
        if stops {
            self.ends.stopped = true;
            let _ = page.stop(at.written);
        }
        leaves || stops
    }

    /// Whether all that was said has arrived, as far as it ever will.
    #[must_use]
    pub fn has_arrived(&self) -> bool {
        self.stream.in_flight() == 0 || self.ended.is_some()
    }

    /// Whether the end of the link is no loss to this connection: the peer had closed, or we have and it knows.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let said = self.stream.said();
        self.stream.heard().closed || (said.closed || said.abort) && self.stream.in_flight() == 0
    }

    /// Whether all that there is to say has arrived, its end included.
    #[must_use]
    pub fn has_told(&self) -> bool {
        let said = self.stream.said();
        (said.closed || said.abort) && self.stream.in_flight() == 0 || self.ended.is_some()
    }

    /// Whether the device and the peer have no more to do with the rings. `hurried`: the process ends, and with it the
    /// group.
    #[must_use]
    pub fn is_done(&self, lgrs: &mut Lgrs, hurried: bool) -> bool {
        let heard = self.stream.heard();
        // A peer that has not closed writes, as long as it does not know.
        let over =
            self.ended.is_none() && self.has_told() && (heard.closed || heard.abort || hurried && self.kin);
        over || lgrs.links(self.part.seat.lgr).is_none()
    }
}
