//! One connection, from the Proposal to its end: its page, its stream, and its TCP socket.
//!
//! ```text
//!  Greeting ── CLC, CONFIRM LINK ──> Rdma ── both ends have closed ──> Ending ── DELETE LINK ──> Over
//!      │                              └── the link is gone, or the peer misbehaves: reset ────────^
//!      └── declined, late, no CLC ──> Tcp ── what was written has gone there ────────────────────^
//! ```
//!
//! The program may write and close at any time; its ring holds what it has written. In *Tcp* the ring's bytes are asked
//! back: by the program's side, or, if it has left the ring already, by us. A peer that was told nothing, or that we
//! have declined, may still send a CLC message: until the first bytes of its stream show what they are, the program
//! does not read TCP.
//!
//! The end is told in this order: the last byte by RDMA, the CDC flag, and when that has arrived FIN by TCP. A peer
//! that is libsmc does likewise, so its FIN without the flag is its death.

use smc::conn::Side;
use smc::reason::Reason;
use smc::remote::says;
use smc::smcr::Ms;
use smc::smcr::rendezvous::{Step, declined};
use smc::sys;
use smc::wire::smcr::Diagnosis;

use super::flow::{Broken, Ends, Flow};
use super::greeting::{Common, Greeting};
use super::link::{Event, Link};
use super::nic::Place;
use super::page::Page;
use super::tcp;

/// Bytes that begin like a CLC message and do not go on are the program's after so long.
const START_WAIT: Ms = 2_000;

/// What the service is to tell libsmc.so, once it holds no lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// `Host::says`.
    Says(u32, u32),
    /// `Host::attend`.
    Attend,
}

#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Phase {
    Greeting(Greeting),
    Rdma(Flow),
    Ending(Flow),
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
}

/// See the module.
#[derive(Debug)]
pub struct Conn {
    phase: Phase,
    page: Page,
    place: Place,
    /// -1: closed.
    tcp: i32,
    /// The program has let go of it.
    closed: bool,
    /// The process ends.
    hurried: bool,
    /// FIN or RST has come by TCP.
    hung_up: bool,
    notes: Vec<Note>,
}

/// The code under which libsmc.so knows a diagnosis.
fn code(why: Diagnosis) -> u32 {
    Reason::try_from(why.0).map_or(Reason::HandshakeFailed as u32, |r| r as u32)
}

impl Conn {
    /// A connection whose handshake begins.
    pub fn new(page: Page, place: Place, common: &Common, now: Ms) -> Self {
        let (tcp, client) = (page.conn().tcp, page.conn().side == Side::Connect as u32);
        let (greeting, first) = Greeting::new(client, &place, common, now);
        let phase = Phase::Greeting(greeting);
        let (closed, hurried, hung_up) = (false, false, false);
        let mut conn = Self { phase, page, place, tcp, closed, hurried, hung_up, notes: Vec::new() };
        if let Some(step) = first {
            conn.step(step, common, now);
        }
        conn
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// The link's descriptor.
    #[must_use]
    pub fn link_fd(&self) -> Option<i32> {
        self.flow().map(|f| f.link.fd())
    }

    /// Nothing is left to do, and the program has let go.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over) && self.closed
    }

    /// What the program had sent when it let go has arrived, or is TCP's.
    #[must_use]
    pub fn is_delivered(&self) -> bool {
        !self.closed || self.tcp < 0 && !matches!(self.phase, Phase::Ending(_))
    }

    /// What is to be told.
    pub fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    fn flow(&self) -> Option<&Flow> {
        match &self.phase {
            Phase::Greeting(g) => g.flow.as_ref(),
            Phase::Rdma(f) | Phase::Ending(f) => Some(f),
            Phase::Tcp(_) | Phase::Reset(_) | Phase::Over => None,
        }
    }

    /// The doorbell has rung.
    pub fn rung(&mut self) {
        self.closed |= !self.page.answer_bell();
    }

    /// The process ends: a stream that has left the ring is one that the program has let go of.
    pub fn process_ends(&mut self) {
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

    /// The device has told something.
    pub fn told(&mut self, what: crate::device::Event, now: Ms) {
        let flow = match &mut self.phase {
            Phase::Greeting(g) => g.flow.as_mut(),
            Phase::Rdma(f) | Phase::Ending(f) => Some(f),
            Phase::Tcp(_) | Phase::Reset(_) | Phase::Over => None,
        };
        if let Some(f) = flow {
            f.link.told(what, now);
        }
    }

    /// When [`Self::work`] is due for the time alone.
    #[must_use]
    pub fn deadline(&self) -> Option<Ms> {
        let link = self.flow().and_then(|f| f.link.deadline());
        let own = match &self.phase {
            Phase::Greeting(g) if g.met => g.clc.deadline(),
            Phase::Greeting(g) => g.until(),
            Phase::Tcp(t) => t.begun.map(|at| at + START_WAIT),
            _ => None,
        };
        [link, own].into_iter().flatten().min()
    }

    /// Arms all that may wake a sleeper. Look once more after this.
    pub fn arm(&self) {
        self.page.arm(matches!(&self.phase, Phase::Rdma(f) if f.stream.owes_room()));
        if let Some(f) = self.flow() {
            // A queue that can't be armed is one of a device that is gone, which its events tell.
            let _ = f.link.arm();
        }
    }

    /// Does what there is to do; false: there was nothing.
    pub fn work(&mut self, common: &Common, now: Ms) -> bool {
        match self.phase {
            Phase::Greeting(_) => self.greet(common, now),
            Phase::Rdma(_) => self.carry(now).unwrap_or_else(|Broken| {
                self.reset();
                true
            }),
            Phase::Ending(_) => self.end(now),
            Phase::Tcp(_) => self.fall_back(now),
            Phase::Reset(ends) => self.leave(ends),
            Phase::Over => self.closed && self.close_tcp(),
        }
    }

    // The handshake.

    fn greet(&mut self, common: &Common, now: Ms) -> bool {
        let moved = self.hear(common, now) | self.link_up(common, now);
        let sent = self.page.sent(0);
        let Phase::Greeting(g) = &mut self.phase else { return true };
        let (some, left) = sent.map_or((true, true), |r| (r.bytes > 0, r.left));
        g.waits = if some || left { g.waits.or(Some(now)) } else { None };
        // Who has closed with nothing on its way, or is about to end, waits for nobody.
        let ends = self.closed && (self.hurried || !some);
        let late = ends || !g.met && g.until().is_some_and(|at| now >= at);
        if late && !g.met && !g.is_client() {
            // A Decline would be garbage to who does not speak SMC, and who does sees that the program's bytes are none.
            self.goes_by_tcp(Diagnosis::PEER_NO_SMC, true);
            return true;
        }
        let gone = self.hung_up && tcp::peek(self.tcp, 1).is_empty();
        if gone && !g.met {
            // There will be no answer.
            self.goes_by_tcp(Diagnosis::PEER_NO_SMC, false);
            return true;
        }
        let step = match (late, g.met) {
            (true, _) => Some(g.clc.give_up(Diagnosis::PEER_NO_SMC)),
            (false, true) => g.clc.tick(now),
            (false, false) => None,
        };
        let given_up = step.is_some();
        if let Some(step) = step {
            self.step(step, common, now);
        }
        moved | given_up
    }

    /// Reads as much of TCP as the handshake wants, and not a byte more.
    fn hear(&mut self, common: &Common, now: Ms) -> bool {
        let mut moved = false;
        loop {
            let Phase::Greeting(g) = &mut self.phase else { return true };
            let wants = g.clc.wants();
            let bytes = if wants > 0 { tcp::peek(self.tcp, wants) } else { Vec::new() };
            if bytes.is_empty() {
                return moved;
            }
            match g.clc.handle_bytes(&bytes, now) {
                Some(Step::Broken(_)) if !g.met => {
                    // The peer's program speaks, and not SMC: all of it is for ours.
                    self.goes_by_tcp(Diagnosis::PEER_NO_SMC, false);
                    return true;
                }
                Some(step) => {
                    g.met = true;
                    tcp::take(self.tcp, bytes.len());
                    self.step(step, common, now);
                    moved = true;
                }
                None if g.clc.wants() > bytes.len() && bytes.len() == wants => {}
                None => return moved,
            }
        }
    }

    fn step(&mut self, step: Step, common: &Common, now: Ms) {
        let mut steps = std::collections::VecDeque::from([step]);
        while let Some(step) = steps.pop_front() {
            let Phase::Greeting(g) = &mut self.phase else { return };
            match step {
                Step::Send(m) => {
                    if !tcp::send(self.tcp, &m) {
                        return self.reset();
                    }
                    if let Some(why) = declined(&m) {
                        return self.goes_by_tcp(why, true);
                    }
                }
                Step::Choose(p) => {
                    let choice = g.choose(&p, &self.place, common, &self.page);
                    steps.push_back(g.clc.chosen(choice, now));
                }
                Step::Prepare(peer) => {
                    let prepared = g.prepare(&peer, &self.place, &self.page, now);
                    steps.extend(g.clc.prepared(prepared, now));
                }
                Step::Link => {}
                Step::Done => return self.goes_by_rdma(),
                Step::Fallback(why, _) => return self.goes_by_tcp(why, false),
                Step::Broken(_) => return self.reset(),
            }
        }
    }

    /// First contact: until the link group is ready.
    fn link_up(&mut self, common: &Common, now: Ms) -> bool {
        let Phase::Greeting(g) = &mut self.phase else { return true };
        let Some(f) = &mut g.flow else { return false };
        let mut events = Vec::new();
        let moved = f.link.progress(now, &mut events);
        let mut result = if moved.is_err() { Some(Err(Diagnosis::INTERNAL_READY_LINK)) } else { None };
        for e in events {
            match e {
                Event::Ready => result = Some(Ok(())),
                Event::Ended(why) => result = Some(Err(Link::diagnosis(why))),
                // The peer may be ready before we are.
                Event::Cdc(m) if f.heard(&m).is_err() => result = Some(Err(Diagnosis::INTERNAL)),
                Event::Cdc(_) | Event::Sent(..) => {}
            }
        }
        let Some(result) = result else { return moved.unwrap_or(true) };
        let step = g.clc.linked(result);
        self.step(step, common, now);
        true
    }

    fn goes_by_rdma(&mut self) {
        let flow = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Greeting(g) => g.flow,
            _ => None,
        };
        match flow {
            Some(flow) => {
                self.phase = Phase::Rdma(flow);
                self.notes.push(Note::Says(says::RDMA, 0));
            }
            None => self.reset(),
        }
    }

    // Back on TCP.

    /// `late`: a CLC message of the peer's may still come.
    fn goes_by_tcp(&mut self, why: Diagnosis, late: bool) {
        // The program's side moves what it has written, unless it has left the ring before.
        let left = !self.page.stop(0);
        let end = if left { self.page.sent(0).map_or(0, |r| r.bytes) } else { 0 };
        self.phase = Phase::Tcp(Fallback { why: code(why), moves: (0, end), guarded: late, begun: None });
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
            let why = t.why;
            self.phase = Phase::Over;
            self.page.leave(0);
            self.notes.extend([Note::Says(says::TCP, why), Note::Attend]);
            self.close_tcp();
            return true;
        }
        moved
    }

    // By RDMA.

    fn carry(&mut self, now: Ms) -> Result<bool, Broken> {
        let Phase::Rdma(f) = &mut self.phase else { return Ok(true) };
        let heard = f.listen(now)?;
        let moved = heard | f.exchange(&self.page, self.closed, self.tcp)?;
        if f.tell(&self.page) {
            self.notes.push(Note::Attend);
            if f.ends.left && f.ends.stopped {
                // Both directions are TCP's now.
                self.notes.insert(0, Note::Says(says::TCP, 0));
            }
        }
        let dead = self.hung_up && !heard && !f.ends.left && (f.kin || sys::tcp_is_closed(self.tcp));
        if f.stream.is_reset() && !self.closed || f.ended.is_some() && !f.is_settled() || dead && !self.closed
        {
            return Err(Broken);
        }
        Ok(moved | self.finish())
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
            if let Phase::Rdma(mut f) = std::mem::replace(&mut self.phase, Phase::Over) {
                f.link.terminate();
                self.phase = Phase::Ending(f);
            }
            moved = true;
        }
        moved
    }

    /// The link group was this connection's only, and ends with it.
    fn end(&mut self, now: Ms) -> bool {
        let Phase::Ending(f) = &mut self.phase else { return true };
        let moved = f.listen(now);
        if moved.is_err() || f.link.is_quiet() {
            self.phase = Phase::Over;
            return true;
        }
        moved.unwrap_or(true)
    }

    /// The connection can't go on: both ends hear of a reset.
    fn reset(&mut self) {
        let ends = self.flow().map(|f| f.ends).unwrap_or_default();
        self.phase = Phase::Reset(ends);
        if self.tcp >= 0 {
            tcp::reset(self.tcp);
        }
        self.notes.push(Note::Says(says::RESET, libc::ECONNRESET as u32));
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
