//! One SMC-R connection: from the program's bytes to WRITEs and CDC messages, and back.
//!
//! ```text
//!  send buffer (ours)       peer's RMBE            own RMBE
//!  fin <= sent <= written   acked <= sent          confirmed <= consumed <= produced
//! ```
//!
//! Bytes up to `written` lie in the send buffer; up to `sent` they were given to the link; up to `fin` their CDC
//! message is known to have arrived, so that their place is free again. The peer has consumed up to `acked`, and was
//! told that we have up to `confirmed`. Each [`Transmit`] is WRITEs and then one CDC on the same queue pair: RC keeps
//! their order, so the bytes are in the ring before the cursor tells of them.
//!
//! The hard idea is the loss of a link (RFC 7609 section 4.6). Nobody knows then which of the messages without a
//! completion have arrived. Positions in the ring are absolute, so writing again what is already there does no harm:
//! `sent` goes back to `fin`, and the bytes go once more by the new link, after a CDC that only says which message was
//! known to have arrived ([`Stream::failover`]). A peer that has not seen that one has lost data, and gives up. What was
//! said of the end besides goes once more as well.
//!
//! A packet of the lost link may be late all the same. As long as the peer's queue pair takes it, its bytes must find the
//! same bytes: so nothing is sent for a place in the ring that a message of the lost link was for, one lap before, until
//! the peer's end is known to be gone ([`Stream::old_link_gone`]).
//!
//! Closing (section 4.8) is two sets of flags, one said by each end; the kernel's twelve states are these flags and the
//! order in which they came. What has to be sent depends on the flags alone.

use std::collections::VecDeque;

use super::{Misbehaved, cursor};
use crate::wire::smcr::Few;
use crate::wire::smcr::cdc::{Cdc, Closing, Producer};

/// Half of the kernel's smallest send buffer: an update for fewer bytes than this is not worth a message.
const LEAST_UPDATE: u64 = 2048;

/// One RDMA WRITE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Write {
    /// Offset in the send buffer.
    pub from: u32,
    /// Offset in the peer's RMBE.
    pub to: u32,
    /// Bytes.
    pub len: u32,
}

/// WRITEs, and the CDC message that tells of them; to be posted in this order on one queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Pieces that are in one place in both rings: two wraps cut a stream in three at most.
    pub writes: Few<Write, 3>,
    /// What is sent behind them.
    pub cdc: Cdc,
}

/// Where a connection stands, in bytes from its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// What the program has written.
    pub written: u64,
    /// What is known to have arrived: its place in the send buffer is free.
    pub fin: u64,
    /// What the peer has sent.
    pub produced: u64,
    /// What the program has read of that.
    pub consumed: u64,
}

/// What a message from the peer has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// More can be read, or the end can.
    pub readable: bool,
    /// More can be sent.
    pub writable: bool,
    /// The peer gave up, or data was lost with a link: ECONNRESET.
    pub reset: bool,
}

/// A connection's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes in our send buffer.
    pub send: u32,
    /// Bytes in the peer's RMBE.
    pub peer: u32,
    /// Bytes in ours.
    pub own: u32,
}

/// A message that is on its way.
#[derive(Clone, Copy, Debug)]
struct Flight {
    seq: u16,
    sent: u64,
    said: Closing,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Stream {
    sizes: Sizes,
    /// The peer's alert token.
    token: u32,

    written: u64,
    sent: u64,
    /// Where `sent` has been, before any failover: the peer may have consumed up to here.
    top: u64,
    fin: u64,
    acked: u64,
    seq: u16,
    seq_fin: u16,
    flights: VecDeque<Flight>,

    produced: u64,
    consumed: u64,
    confirmed: u64,
    seq_seen: u16,
    /// The peer has more to write than there was room for.
    peer_blocked: bool,
    /// Where the peer's urgent byte lies.
    urgent: Option<u64>,

    /// What the program wants the peer to know, and what the peer has been told by a message.
    wanted: Closing,
    said: Closing,
    /// What of that is known to have arrived.
    arrived: Closing,
    heard: Closing,
    lost: bool,

    /// A message is owed that has nothing else to carry.
    owed: bool,
    /// A validation is owed before anything else.
    validate: bool,
    /// Something that was on its way when a link was lost is to be said again.
    replay: bool,
    /// Nothing goes beyond this before the peer's end of a lost link is gone.
    fence: Option<u64>,
}

impl Stream {
    /// A connection at its beginning; `token` is the peer's.
    #[must_use]
    pub fn new(sizes: Sizes, token: u32) -> Self {
        Self {
            sizes,
            token,
            written: 0,
            sent: 0,
            top: 0,
            fin: 0,
            acked: 0,
            seq: 0,
            seq_fin: 0,
            flights: VecDeque::new(),
            produced: 0,
            consumed: 0,
            confirmed: 0,
            seq_seen: 0,
            peer_blocked: false,
            urgent: None,
            wanted: Closing::default(),
            said: Closing::default(),
            arrived: Closing::default(),
            heard: Closing::default(),
            lost: false,
            owed: false,
            validate: false,
            replay: false,
            fence: None,
        }
    }

    // What the program does.

    /// Bytes that the send buffer has room for, and where: the first piece up to its end.
    #[must_use]
    pub fn room(&self) -> (u32, u32) {
        if self.writes_ended() {
            return (0, 0);
        }
        let free = u64::from(self.sizes.send) - (self.written - self.fin);
        piece(self.written, free, self.sizes.send)
    }

    /// Nothing may be written any more: EPIPE, or ECONNRESET after [`Self::is_reset`].
    #[must_use]
    pub fn writes_ended(&self) -> bool {
        let ended = |c: Closing| c.closed || c.abort;
        self.wanted.done_writing || ended(self.wanted) || ended(self.heard) || self.lost
    }

    /// So many bytes were put where [`Self::room`] said.
    pub fn wrote(&mut self, bytes: u32) {
        let free = u64::from(self.sizes.send) - (self.written - self.fin);
        self.written += u64::from(bytes).min(free);
    }

    /// Bytes that can be read, and where in our RMBE: the first piece up to its end.
    #[must_use]
    pub fn readable(&self) -> (u32, u32) {
        piece(self.consumed, self.produced - self.consumed, self.sizes.own)
    }

    /// The peer writes no more and all was read.
    #[must_use]
    pub fn at_end(&self) -> bool {
        self.consumed == self.produced && (self.heard.done_writing || self.heard.closed)
    }

    /// The peer has given up, or data was lost with a link.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.heard.abort || self.lost
    }

    /// So many bytes were taken from where [`Self::readable`] said.
    pub fn took(&mut self, bytes: u32) {
        let size = u64::from(self.sizes.own);
        self.consumed += u64::from(bytes).min(self.produced - self.consumed);
        let forced = self.urgent.is_some_and(|at| at < self.consumed);
        if forced {
            self.urgent = None;
        }
        let unconfirmed = self.consumed - self.confirmed;
        let worth_it = unconfirmed > (size / 10).max(LEAST_UPDATE.min(size / 2));
        // What the sender believes to be free.
        let free = size - (self.produced - self.confirmed);
        if forced || worth_it && (free <= size / 2 || self.peer_blocked) {
            self.owed = true;
        }
        if self.consumed == self.produced {
            self.peer_blocked = false;
        }
    }

    /// shutdown(SHUT_WR): the peer hears of it behind the last byte.
    pub fn shutdown(&mut self) {
        self.wanted.done_writing = true;
    }

    /// close(): in order behind the last byte, or at once where that would hide unread bytes from the peer.
    pub fn close(&mut self) {
        if self.consumed < self.produced || self.is_reset() {
            self.abort();
        } else {
            self.wanted.closed = true;
        }
    }

    /// Gives up: what was not sent is dropped.
    pub fn abort(&mut self) {
        if !self.said.closed {
            self.wanted.abort = true;
        }
    }

    /// Both ends have closed and said so: nothing more will be sent or is awaited, and the buffers are free as soon as
    /// nothing is on its way ([`Self::in_flight`]).
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.said.abort || self.said.closed && (self.heard.closed || self.is_reset())
    }

    /// Messages that are not known to have arrived, those that are to be said again included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len() + usize::from(self.replay)
    }

    /// The positions: written by the program, known to have arrived, produced by the peer, taken by the program.
    #[must_use]
    pub fn places(&self) -> Places {
        Places { written: self.written, fin: self.fin, produced: self.produced, consumed: self.consumed }
    }

    /// What the peer has said of its end.
    #[must_use]
    pub fn heard(&self) -> Closing {
        self.heard
    }

    /// What the peer has been told of ours, by messages that may not have arrived.
    #[must_use]
    pub fn said(&self) -> Closing {
        self.said
    }

    /// Whether the peer waits to be told of room, or soon may: it is worth hearing of each byte taken.
    #[must_use]
    pub fn owes_room(&self) -> bool {
        let size = u64::from(self.sizes.own);
        self.peer_blocked || size - (self.produced - self.confirmed) <= size / 2
    }

    // What the link does.

    /// What is to be posted next, if anything is. Call it only with a place in the send queue for all of it.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        if self.validate {
            self.validate = false;
            let flags = Producer { failover: true, ..Producer::default() };
            let cdc = Cdc { seq: self.seq_fin, token: self.token, flags, ..Cdc::default() };
            return Some(Transmit { writes: Few::new(), cdc });
        }
        // A peer that has closed reads nothing, and may have given its buffer back.
        let ended = self.said.closed || self.said.abort || self.wanted.abort || self.is_reset();
        let ended = ended || self.heard.closed;
        let waiting = if ended { 0 } else { self.written - self.sent };
        let free = u64::from(self.sizes.peer) - (self.sent - self.acked);
        let room = free.min(self.fence.map_or(free, |f| f.saturating_sub(self.sent)));
        let n = waiting.min(room);
        let closing = self.closing(self.sent + n);
        if n == 0 && !self.owed && closing == self.said {
            return None;
        }
        let writes = self.pieces(n);
        self.sent += n;
        self.top = self.top.max(self.sent);
        self.seq = self.seq.wrapping_add(1);
        self.flights.push_back(Flight { seq: self.seq, sent: self.sent, said: closing });
        self.confirmed = self.consumed;
        self.said = closing;
        self.owed = false;
        self.replay = false;
        let cdc = Cdc {
            seq: self.seq,
            token: self.token,
            prod: cursor::to_wire(self.sent, self.sizes.peer),
            cons: cursor::to_wire(self.consumed, self.sizes.own),
            flags: Producer { blocked: waiting > 0 && waiting >= room, ..Producer::default() },
            closing,
        };
        Some(Transmit { writes, cdc })
    }

    /// The flags that go with a message that tells of bytes up to `sent`.
    fn closing(&self, sent: u64) -> Closing {
        let drained = sent == self.written || self.heard.closed;
        Closing {
            done_writing: self.said.done_writing || self.wanted.done_writing && drained,
            closed: self.said.closed || self.wanted.closed && drained && !self.wanted.abort,
            abort: self.wanted.abort,
        }
    }

    fn pieces(&self, n: u64) -> Few<Write, 3> {
        let mut writes = Few::new();
        let (mut at, end) = (self.sent, self.sent + n);
        while at < end {
            let (from, here) = piece(at, end - at, self.sizes.send);
            let (to, there) = piece(at, u64::from(here), self.sizes.peer);
            // A ring of n bytes is not longer than either, so each wraps once at most: three pieces.
            if !writes.push(Write { from, to, len: there }) {
                break;
            }
            at += u64::from(there);
        }
        writes
    }

    /// The message with this number, and all before it, have arrived.
    pub fn completed(&mut self, seq: u16) -> bool {
        let before = self.fin;
        while let Some(f) = self.flights.front().copied().filter(|f| !newer(f.seq, seq)) {
            self.flights.pop_front();
            // After a failover a message may tell of less than one before it did.
            self.fin = self.fin.max(f.sent);
            self.seq_fin = f.seq;
            self.arrived = f.said;
        }
        self.fin > before
    }

    /// The link is lost, and another takes over: what has no completion goes once more. The old queue pair was emptied
    /// and is gone, so that it reads nothing from the send buffer any more.
    pub fn failover(&mut self) {
        if !self.flights.is_empty() {
            // What these said besides data must be said again.
            self.owed = true;
            self.replay = true;
            self.said = self.arrived;
            self.flights.clear();
        }
        // Its messages were for places from here on; a later link's are fenced by an earlier one's as well.
        let fence = self.fin + u64::from(self.sizes.peer);
        self.fence = Some(self.fence.map_or(fence, |f| f.min(fence)));
        // The peer may have consumed beyond the last completion.
        self.fin = self.fin.max(self.acked);
        self.sent = self.fin;
        self.validate = true;
    }

    /// The peer's ends of all links that were lost are gone: nothing comes late by them.
    pub fn old_link_gone(&mut self) {
        self.fence = None;
    }

    /// No link takes over, and the peer has told by other means how many of our bytes it has: where the stream goes on.
    /// None: that can't be, or what it lacks is not here any more.
    #[must_use]
    pub fn resume_at(&self, received: u64) -> Option<u64> {
        (self.fin.max(self.acked)..=self.top).contains(&received).then_some(received)
    }

    /// The peer's alert token.
    #[must_use]
    pub fn peer_token(&self) -> u32 {
        self.token
    }

    /// What the peer says.
    pub fn handle_cdc(&mut self, cdc: &Cdc) -> Result<Heard, Misbehaved> {
        let mut out = Heard::default();
        if cdc.flags.failover {
            if newer(cdc.seq, self.seq_seen) {
                // It knows of a message that has arrived, and we do not: the data was lost on the way.
                self.lost = true;
                self.abort();
                out.reset = true;
            }
            return Ok(out);
        }
        if newer(self.seq_seen, cdc.seq) {
            return Ok(out);
        }
        let acked = cursor::from_wire(cdc.cons, self.acked, self.top, self.sizes.peer)?;
        let limit = self.consumed + u64::from(self.sizes.own);
        let produced = cursor::from_wire(cdc.prod, self.produced, limit, self.sizes.own)?;
        if produced > self.produced && (self.heard.done_writing || self.heard.closed || self.heard.abort) {
            return Err(Misbehaved::DataAfterEnd);
        }
        self.seq_seen = cdc.seq;
        out.writable = acked > self.acked;
        self.acked = acked;
        // Consumed beyond what was sent by this link: it had arrived by the one that was lost.
        self.sent = self.sent.max(acked);
        self.fin = if self.flights.is_empty() { self.fin.max(acked) } else { self.fin };
        if produced > self.produced {
            if cdc.flags.urgent_present {
                self.urgent = Some(produced - 1);
            }
            self.produced = produced;
            out.readable = true;
        }
        self.peer_blocked = cdc.flags.blocked && self.consumed < self.produced;
        // Asked for, or it waits for room that it was not told of.
        self.owed |= cdc.flags.update_wanted || cdc.flags.blocked && self.confirmed < self.consumed;
        let was = self.heard;
        self.heard.done_writing |= cdc.closing.done_writing;
        self.heard.closed |= cdc.closing.closed;
        self.heard.abort |= cdc.closing.abort;
        out.readable |= was != self.heard;
        out.reset = !was.abort && self.heard.abort;
        Ok(out)
    }
}

/// `a` comes after `b`, modulo 2^16.
fn newer(a: u16, b: u16) -> bool {
    (a.wrapping_sub(b) as i16) > 0
}

/// Where `at` lies in a ring, and how many of `n` bytes lie before its end.
fn piece(at: u64, n: u64, size: u32) -> (u32, u32) {
    let offset = (at % u64::from(size)) as u32;
    (offset, n.min(u64::from(size - offset)) as u32)
}
