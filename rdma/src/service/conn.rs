//! One connection, from the Proposal to its end: its page, its stream, and its TCP socket.
//!
//! ```text
//!  Greeting ── CLC, a link ──> Rdma ── both ends have closed ───────────────────────> Over
//!      │                        ├── the peer misbehaves, or has gone: reset ───────────^
//!      │                        └── the link is gone ──> Back ──> Tcp ─────────────────^
//!      └── declined, late, no CLC ──> Tcp ── what was written has gone there ──────────^
//! ```
//!
//! The program may write and close at any time; its ring holds what it has written. In *Tcp* the ring's bytes are asked
//! back: by the program's side, or, if it has left the ring already, by us. A peer that was told nothing, or that we
//! have declined, may still send a CLC message: until the first bytes of its stream show what they are, the program
//! does not read TCP.
//!
//! What it had of its link group *trails* behind: the rings are the device's until all that was sent has arrived and the
//! peer has said that it writes no more, or the group is gone.
//!
//! The end is told in this order: the last byte by RDMA, the CDC flag, and when that has arrived FIN by TCP. A peer
//! that is libsmc does likewise, so its FIN without the flag is its death.

use std::collections::VecDeque;

use smc::conn::Side;
use smc::reason::Reason;
use smc::remote::says;
use smc::smcr::Ms;
use smc::smcr::group::Ended;
use smc::smcr::rendezvous::{Step, declined};
use smc::sys;
use smc::wire::smcr::Diagnosis;

use super::back;
use super::flow::{Broken, Ends, Flow};
use super::greeting::{Around, Greeting, START_WAIT};
use super::links::{Event, Links};
use super::nic::Place;
use super::page::Page;
use super::tcp;

/// What the service is to tell libsmc.so, once it holds no lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// `Host::says`.
    Says(u32, u32),
    /// `Host::attend`.
    Attend,
    /// TCP is reset, and this descriptor of the service's closed.
    Reset(i32),
}

#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Phase {
    Greeting(Greeting),
    Rdma(Flow),
    /// The link is gone, and the peer was told up to where we have its bytes.
    Back(Flow),
    Tcp(Fallback),
    /// Told to libsmc.so, which goes first: the program must not find TCP's word before.
    Reset(Ends),
    Over,
}

/// On TCP.
#[derive(Clone, Copy, Debug)]
struct Fallback {
    why: u32,
    /// Ring bytes that we move: from, to.
    moves: (u64, u64),
    /// The stream's first bytes are not known to be the program's.
    guarded: bool,
    /// They have begun to come.
    begun: Option<Ms>,
    /// The peer's stream leaves the ring there, unless it has left already.
    leaves: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Conn {
    phase: Phase,
    page: Page,
    /// None: no device has the connection's address, and the peer is to hear that.
    place: Option<Place>,
    /// -1: closed.
    tcp: i32,
    /// The program has let go of it.
    closed: bool,
    /// The process ends.
    hurried: bool,
    /// FIN or RST has come by TCP.
    hung_up: bool,
    notes: Vec<Note>,
    /// What has come by the link.
    mail: VecDeque<Event>,
    /// What is left of it on its link.
    trailing: Option<Flow>,
}

/// The code under which libsmc.so knows a diagnosis.
fn code(why: Diagnosis) -> u32 {
    if why == Diagnosis::NO_SMCR_DEVICE {
        return Reason::NoRdma as u32;
    }
    Reason::try_from(why.0).map_or(Reason::HandshakeFailed as u32, |r| r as u32)
}

impl Conn {
    /// A connection whose handshake begins.
    pub fn new(page: Page, place: Option<Place>, at: &mut Around<'_>) -> Self {
        let (tcp, client) = (page.conn().tcp, page.conn().side == Side::Connect as u32);
        let (greeting, first) = Greeting::new(client, place.as_ref(), at);
        let phase = Phase::Greeting(greeting);
        let (closed, hurried, hung_up) = (false, false, false);
        let (notes, mail, trailing) = (Vec::new(), VecDeque::new(), None);
        let mut conn = Self { phase, page, place, tcp, closed, hurried, hung_up, notes, mail, trailing };
        if let Some(step) = first {
            conn.step(step, at);
        }
        conn
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Nothing is left to do, and the program has let go.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over) && self.closed && self.trailing.is_none()
    }

    /// What the program had sent when it let go has arrived, or is TCP's.
    #[must_use]
    pub fn is_delivered(&self) -> bool {
        // A peer that is libsmc is let go of in order: its link group ends then.
        !self.closed || self.tcp < 0 && self.trailing.as_ref().is_none_or(|f| !f.kin && f.has_told())
    }

    /// What is to be told.
    pub fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// The link group that it is in.
    #[must_use]
    pub fn lgr(&self) -> Option<u32> {
        match &self.phase {
            Phase::Greeting(g) => g.lgr(),
            Phase::Rdma(f) | Phase::Back(f) => Some(f.part.seat.lgr),
            Phase::Tcp(_) | Phase::Reset(_) | Phase::Over => None,
        }
    }

    /// Something has come by the link.
    pub fn hears(&mut self, e: Event) {
        self.mail.push_back(e);
    }

    /// The doorbell has rung.
    pub fn rung(&mut self) {
        self.closed |= !self.page.answer_bell();
    }

    /// The process ends: a stream that has left the ring is one that the program has let go of.
    pub fn process_ends(&mut self) {
        // The thread may not have come to the bell yet.
        self.rung();
        let written = match &self.phase {
            Phase::Rdma(f) => f.stream.places().written,
            _ => 0,
        };
        self.closed |= self.page.sent(written).is_ok_and(|r| r.left);
        self.hurried = true;
    }

    /// Something has come by TCP.
    pub fn tcp_has_news(&mut self) {
        self.hung_up |= self.tcp >= 0 && tcp::has_ended(self.tcp);
    }

    /// When [`Self::work`] is due for the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        match &self.phase {
            Phase::Greeting(g) if g.met => g.clc.deadline(),
            Phase::Greeting(g) => g.until(),
            Phase::Tcp(t) => t.begun.map(|at| at + START_WAIT),
            _ => None,
        }
    }

    /// Arms what may wake a sleeper. Look once more after this.
    pub fn arm(&self) {
        self.page.arm(matches!(&self.phase, Phase::Rdma(f) if f.stream.owes_room()));
    }

    /// Does what there is to do; false: there was nothing.
    pub fn work(&mut self, at: &mut Around<'_>) -> bool {
        let trails = self.trail(at);
        let moved = match self.phase {
            Phase::Greeting(_) => self.greet(at),
            Phase::Rdma(_) => self.carry(at).unwrap_or_else(|Broken| {
                self.reset(at);
                true
            }),
            Phase::Back(_) => self.turn_back(at),
            Phase::Tcp(_) => self.fall_back(at.now),
            Phase::Reset(ends) => self.leave(ends),
            Phase::Over => self.closed && self.close_tcp(),
        };
        moved | trails
    }

    /// What is left on the link.
    fn trail(&mut self, at: &mut Around<'_>) -> bool {
        let Some(f) = &mut self.trailing else {
            // Nobody is there for what may still come.
            if !matches!(self.phase, Phase::Greeting(_) | Phase::Rdma(_) | Phase::Back(_)) {
                self.mail.clear();
            }
            return false;
        };
        // A peer that breaks the rules now has nothing more to say that counts.
        let heard = f.listen(&mut self.mail).unwrap_or(true);
        let said = f.transmit(at.lgrs, at.id, at.now).unwrap_or(false);
        if f.is_done(at.lgrs, self.hurried)
            && let Some(f) = self.trailing.take()
        {
            at.lgrs.leave(f.part, at.now);
            return true;
        }
        heard | said
    }

    // The handshake.

    fn greet(&mut self, at: &mut Around<'_>) -> bool {
        let now = at.now;
        let moved = self.hear(at) | self.link_up(at);
        let sent = self.page.sent(0);
        let Phase::Greeting(g) = &mut self.phase else { return true };
        let (some, left) = sent.map_or((true, true), |r| (r.bytes > 0, r.left));
        g.waits = if some || left { g.waits.or(Some(now)) } else { None };
        // All that makes a message was taken: what is left is a part of one, or of the program's.
        let part = !g.met && g.clc.wants() > 0 && !tcp::peek(self.tcp, 1).is_empty();
        g.begun = if part { g.begun.or(Some(now)) } else { None };
        let stuck = g.begun.is_some_and(|at| now >= at + START_WAIT);
        // Who has closed with nothing on its way, or is about to end, waits for nobody.
        let ends = self.closed && (self.hurried || !some);
        let late = ends || !g.met && g.until().is_some_and(|at| now >= at);
        if late && !g.met && !g.is_client() {
            // A Decline would be garbage to who does not speak SMC, and who does sees that the program's bytes are none.
            self.goes_by_tcp(Diagnosis::PEER_NO_SMC, !stuck, at);
            return true;
        }
        let gone = self.hung_up && tcp::peek(self.tcp, 1).is_empty();
        if gone && !g.met {
            // There will be no answer.
            self.goes_by_tcp(Diagnosis::PEER_NO_SMC, false, at);
            return true;
        }
        let step = match (late, g.met) {
            (true, _) => Some(g.clc.give_up(Diagnosis::PEER_NO_SMC)),
            (false, true) => g.clc.tick(now),
            (false, false) => None,
        };
        let given_up = step.is_some();
        if let Some(step) = step {
            self.step(step, at);
        }
        moved | given_up
    }

    /// Reads as much of TCP as the handshake wants, and not a byte more.
    fn hear(&mut self, at: &mut Around<'_>) -> bool {
        let mut moved = false;
        loop {
            let Phase::Greeting(g) = &mut self.phase else { return true };
            let wants = g.clc.wants();
            let bytes = if wants > 0 { tcp::peek(self.tcp, wants) } else { Vec::new() };
            if bytes.is_empty() {
                return moved;
            }
            match g.clc.handle_bytes(&bytes, at.now) {
                Some(Step::Broken(_)) if !g.met => {
                    // The peer's program speaks, and not SMC: all of it is for ours.
                    self.goes_by_tcp(Diagnosis::PEER_NO_SMC, false, at);
                    return true;
                }
                Some(step) => {
                    g.met = true;
                    tcp::take(self.tcp, bytes.len());
                    self.step(step, at);
                    moved = true;
                }
                None if g.clc.wants() > bytes.len() && bytes.len() == wants => {}
                None => return moved,
            }
        }
    }

    fn step(&mut self, step: Step, at: &mut Around<'_>) {
        let mut steps = VecDeque::from([step]);
        while let Some(step) = steps.pop_front() {
            let Phase::Greeting(g) = &mut self.phase else { return };
            match step {
                Step::Send(m) => {
                    if !tcp::send(self.tcp, &m) {
                        return self.reset(at);
                    }
                    if let Some(why) = declined(&m) {
                        return self.goes_by_tcp(why, true, at);
                    }
                }
                Step::Choose(p) => {
                    let choice = g.choose(&p, self.place.as_ref(), &self.page, at);
                    steps.extend(choice.map(|c| g.clc.chosen(c, at.now)));
                }
                Step::Prepare(peer) => {
                    if let Some(prepared) = g.prepare(&peer, self.place.as_ref(), &self.page, at) {
                        steps.extend(g.clc.prepared(prepared, at.now));
                    }
                }
                Step::Link => {}
                Step::Done => return self.goes_by_rdma(at),
                Step::Fallback(why, unknown) => {
                    if let Some(lgr) = g.lgr().filter(|_| unknown) {
                        at.lgrs.forget(lgr);
                    }
                    return self.goes_by_tcp(why, false, at);
                }
                Step::Broken(_) => return self.reset(at),
            }
        }
    }

    /// What has come by the link, or is to be looked at again.
    fn link_up(&mut self, at: &mut Around<'_>) -> bool {
        let moved = !self.mail.is_empty();
        while let Phase::Greeting(g) = &mut self.phase
            && let Some(e) = self.mail.pop_front()
        {
            let steps = match e {
                Event::Ready => vec![g.clc.linked(Ok(()))],
                Event::Ended(why) => vec![g.clc.give_up(Links::diagnosis(why))],
                Event::Keyed(index, ok) => g.resume(Some((index, ok)), self.place.as_ref(), &self.page, at),
                Event::Look => g.resume(None, self.place.as_ref(), &self.page, at),
                // The peer may be ready before we are.
                Event::Cdc(m) => {
                    g.early.push(m);
                    Vec::new()
                }
                // Nothing was sent yet that could be lost.
                Event::Sent(..) | Event::Moved(_) | Event::Gone | Event::Deleted(_) => Vec::new(),
            };
            steps.into_iter().for_each(|s| self.step(s, at));
        }
        moved
    }

    fn goes_by_rdma(&mut self, at: &mut Around<'_>) {
        let Phase::Greeting(g) = &mut self.phase else { return };
        let early = std::mem::take(&mut g.early);
        let Some(flow) = g.flow.take() else { return self.reset(at) };
        early.into_iter().rev().for_each(|m| self.mail.push_front(Event::Cdc(m)));
        self.phase = Phase::Rdma(flow);
        self.notes.push(Note::Says(says::RDMA, 0));
    }

    // Back on TCP.

    /// `late`: a CLC message of the peer's may still come.
    fn goes_by_tcp(&mut self, why: Diagnosis, late: bool, at: &mut Around<'_>) {
        if let Phase::Greeting(g) = &mut self.phase {
            g.leave(at.lgrs, at.now);
        }
        // The program's side moves what it has written, unless it has left the ring before.
        let left = !self.page.stop(0);
        let end = if left { self.page.sent(0).map_or(0, |r| r.bytes) } else { 0 };
        self.phase = Phase::Tcp(Fallback {
            why: code(why),
            moves: (0, end),
            guarded: late,
            begun: None,
            leaves: Some(0),
        });
        self.notes.push(Note::Attend);
    }

    fn fall_back(&mut self, now: Ms) -> bool {
        let Phase::Tcp(t) = &mut self.phase else { return true };
        let mut moved = false;
        let (at, end) = t.moves;
        if at < end {
            let n = self.page.move_into_tcp(at, end);
            let again = n == -(libc::EAGAIN as isize) || n == -(libc::EINTR as isize);
            // An error is the kernel's to tell; nothing more will go.
            t.moves.0 = if n > 0 {
                at + n as u64
            } else if again {
                at
            } else {
                end
            };
            moved = !again;
        }
        if t.guarded {
            let start = tcp::start(self.tcp);
            if start == tcp::Start::Unknown && !tcp::peek(self.tcp, 1).is_empty() {
                t.begun = t.begun.or(Some(now));
            }
            let stuck = t.begun.is_some_and(|at| now >= at + START_WAIT);
            t.guarded = start == tcp::Start::Unknown && !stuck && !self.hung_up && !self.closed;
            moved |= !t.guarded;
        }
        if !t.guarded && t.moves.0 == t.moves.1 {
            let (why, leaves) = (t.why, t.leaves);
            self.phase = Phase::Over;
            if let Some(at) = leaves {
                self.page.leave(at);
            }
            self.notes.extend([Note::Says(says::TCP, why), Note::Attend]);
            self.close_tcp();
            return true;
        }
        moved
    }

    // By RDMA.

    fn carry(&mut self, at: &mut Around<'_>) -> Result<bool, Broken> {
        let Phase::Rdma(f) = &mut self.phase else { return Ok(true) };
        let heard = f.listen(&mut self.mail)?;
        let moved =
            heard | f.exchange(&self.page, self.closed, self.tcp)? | f.transmit(at.lgrs, at.id, at.now)?;
        if f.kin && f.ended.is_none() && self.tcp >= 0 && back::is_here(self.tcp, f.part.seat.token) {
            // The peer has found out first; we do with that.
            at.lgrs.fail(f.part.seat.lgr, at.now);
        }
        if f.tell(&self.page, self.hung_up) {
            self.notes.push(Note::Attend);
            if f.ends.left && f.ends.stopped {
                // Both directions are TCP's now.
                self.notes.insert(0, Note::Says(says::TCP, 0));
            }
        }
        if f.ended == Some(Ended::NoLink) && f.kin && !f.stream.is_reset() && self.asks_back() {
            return Ok(true);
        }
        let Phase::Rdma(f) = &mut self.phase else { return Ok(true) };
        // The link was looked at since: what had come before the FIN is heard.
        let dead = self.hung_up && !heard && !f.ends.left && (f.kin || sys::tcp_is_closed(self.tcp));
        if f.stream.is_reset() && !self.closed || f.ended.is_some() && !f.is_settled() || dead && !self.closed
        {
            return Err(Broken);
        }
        Ok(moved | self.finish())
    }

    /// The link is gone: whether the connection can go back to TCP. A peer that has closed knows all it needs, or asks.
    fn asks_back(&mut self) -> bool {
        let Phase::Rdma(f) = &self.phase else { return false };
        let waits = f.stream.heard().closed && !back::is_here(self.tcp, f.part.seat.token);
        if self.tcp < 0 || self.hung_up || waits || f.ends.fin {
            return false;
        }
        if !back::send(self.tcp, f.stream.peer_token(), f.stream.places().produced) {
            return false;
        }
        if let Phase::Rdma(f) = std::mem::replace(&mut self.phase, Phase::Over) {
            self.phase = Phase::Back(f);
        }
        true
    }

    /// What the peer has received of ours: behind that the stream goes on by TCP.
    fn turn_back(&mut self, at: &mut Around<'_>) -> bool {
        let Phase::Back(f) = &mut self.phase else { return true };
        self.mail.clear();
        let received = match back::take(self.tcp, f.part.seat.token) {
            Ok(None) if !self.hung_up => return false,
            Ok(Some(received)) => f.stream.resume_at(received),
            Ok(None) | Err(back::NotSaid) => None,
        };
        let Some(from) = received else {
            self.reset(at);
            return true;
        };
        // The program's side moves what the peer lacks, unless it has left the ring before. A peer that has closed
        // reads nothing.
        let left = !f.ends.stopped && !self.page.stop(from);
        let end = if left { self.page.sent(from).map_or(from, |r| from + r.bytes) } else { from };
        let leaves = (!f.ends.left).then_some(f.ends.published);
        let why = Reason::Terminated as u32;
        let next = Phase::Tcp(Fallback { why, moves: (from, end), guarded: false, begun: None, leaves });
        if let Phase::Back(f) = std::mem::replace(&mut self.phase, next) {
            self.trailing = Some(f);
        }
        self.notes.push(Note::Attend);
        true
    }

    /// The ends of both directions, as far as they have come.
    fn finish(&mut self) -> bool {
        let Phase::Rdma(f) = &mut self.phase else { return true };
        // A peer that has closed waits for nothing.
        if !f.has_arrived() && !f.stream.heard().closed {
            return false;
        }
        let said = f.stream.said();
        if f.ends.shut && !f.ends.fin && said.done_writing && !self.closed {
            f.ends.fin = true;
            sys::shutdown(self.tcp, libc::SHUT_WR);
            return true;
        }
        if !self.closed || !(said.closed || said.abort || f.ended.is_some()) {
            return false;
        }
        // Who ends now can't wait for the peer's close; one that is libsmc has all it needs.
        let over = f.ended.is_some() || f.stream.is_over() || self.hurried && f.kin;
        let mut moved = self.close_tcp();
        if over {
            if let Phase::Rdma(f) = std::mem::replace(&mut self.phase, Phase::Over) {
                self.trailing = Some(f);
            }
            moved = true;
        }
        moved
    }

    /// The connection can't go on: both ends hear of a reset.
    fn reset(&mut self, at: &mut Around<'_>) {
        let mut ends = Ends::default();
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Greeting(mut g) => g.leave(at.lgrs, at.now),
            Phase::Rdma(mut f) | Phase::Back(mut f) => {
                ends = f.ends;
                f.stream.abort();
                self.trailing = Some(f);
            }
            Phase::Tcp(_) | Phase::Reset(_) | Phase::Over => {}
        }
        self.phase = Phase::Reset(ends);
        self.notes.push(Note::Says(says::RESET, libc::ECONNRESET as u32));
        // After that: who is woken by TCP finds the error, not the end of a stream that the kernel makes of it.
        if self.tcp >= 0 {
            self.notes.push(Note::Reset(std::mem::replace(&mut self.tcp, -1)));
        }
    }

    /// The program leaves the ring, behind the last byte that has come.
    fn leave(&mut self, ends: Ends) -> bool {
        self.phase = Phase::Over;
        let _ = self.page.stop(ends.freed);
        self.page.leave(ends.published);
        self.notes.push(Note::Attend);
        self.close_tcp();
        true
    }

    /// The service has no more part in TCP: if the program has let go as well, the kernel says FIN.
    fn close_tcp(&mut self) -> bool {
        if self.tcp < 0 {
            return false;
        }
        super::close(self.tcp);
        self.tcp = -1;
        true
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.close_tcp();
        super::close(self.page.conn().bell);
    }
}
