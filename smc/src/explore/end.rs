//! What an end does, as `conn/{tx,rx,waiting,close}.rs` do it, call by call and in their order.
//!
//! Each operation is one look of one call: a call that must look again is the next operation, which the program
//! may choose or not.

use super::holds;
use super::traced::broke;
use super::world::{
    Op, READER, RX, SIZE, TX, WAIT, What, World, also, await_step, has, mode, page, shared, step, why,
};
use crate::handshake::switch::{self, TcpTake};
use crate::mem::layout::{LEFT, SidePage, ctl};
use crate::ring::{self, Readable};
use crate::rules::Rule;
use crate::sync::Ordering::*;
use crate::wait::doorbell::{self, Owed};

/// How a send to TCP ended.
const TAKEN: u8 = 0;
const NO_ROOM: u8 = 1;

/// In `slot.gone`.
const KNOWN: u8 = 1;
const BEGUN: u8 = 2;

#[derive(Clone, Copy)]
pub struct Call {
    e: usize,
    thread: u8,
}

fn never<E>(_: E) -> Readable {
    broke("an end has published something impossible");
    Readable { bytes: 0, left: false }
}

impl Call {
    /// The part that comes next, if the call is not over.
    pub fn run(e: usize, thread: u8, op: Op) -> Option<Op> {
        let c = Call { e, thread };
        match op {
            Op::Send => c.send(),
            Op::Recv => c.recv(),
            Op::Leave => c.leave_tx(),
            Op::Stop => c.stop_rx(false),
            Op::Keep => c.stop_rx(true),
            Op::Shut => c.end_tx(false),
            Op::Close => c.close(),
            Op::Take => c.take(),
            Op::Ready => c.recv_ready(),
            Op::Kernel => c.recv_kernel(),
            Op::Owe { obey } => c.owe(obey),
            Op::Obey => c.obey(),
            Op::Progress => c.progress(),
            Op::WaitWritable => c.wait_writable(),
            Op::Wait(what) => c.wait(what),
            Op::Nap(what) => c.nap(what),
            Op::Asleep { what, flush } => c.asleep(what, flush),
            Op::Woken { what, flush, ended } => c.woken(what, flush, ended),
            Op::Flushed { ended } => c.flushed(ended),
            Op::Gone => c.peer_gone(),
            Op::GoneTx => c.gone_tx(),
            Op::Finish { close } => c.finish_flush(close),
            Op::ShutFd => c.shut_fd(),
            Op::ShutBell => c.shut_bell(),
            Op::Deafen => c.deafen(),
            Op::LastLook => c.last_look(),
            Op::CloseFd { last } => c.close_fd(last),
            Op::CloseBell => c.close_bell(),
        }
    }

    fn me(&self) -> &'static SidePage {
        &page().side[self.e]
    }

    fn peer(&self) -> &'static SidePage {
        &page().side[1 - self.e]
    }

    /// A word of the slot. Under a lock nobody else writes what is read.
    fn get(&self, f: impl Fn(&World, usize) -> u8) -> u8 {
        if super::world::with(|w| w.end[self.e].slot.lock[..READER].contains(&(self.thread + 1))) {
            super::traced::joined(|| super::world::with(|w| f(w, self.e)))
        } else {
            shared(self.e, |w| f(w, self.e))
        }
    }

    fn set(&self, f: impl Fn(&mut World, usize)) {
        shared(self.e, |w| {
            f(w, self.e);
            0
        });
    }

    fn lock(&self, which: usize) {
        let take = |w: &mut World| {
            w.is_free(self.e, which).then(|| {
                w.end[self.e].slot.lock[which] = self.thread + 1;
                0
            })
        };
        if super::world::with(|w| w.crowded(self.e)) {
            await_step(why::LOCK, take);
            super::traced::join_next();
        } else {
            also(|w| _ = take(w));
        }
    }

    fn unlock(&self, which: usize) {
        // In one with what was done last under the lock: who does not take it can't tell the two apart.
        also(|w| w.end[self.e].slot.lock[which] = 0);
        super::traced::join_no_more();
    }

    fn tx_mode(&self) -> u8 {
        self.get(|w, e| w.end[e].slot.tx)
    }

    fn set_tx(&self, m: u8) {
        self.set(|w, e| w.end[e].slot.tx = m);
    }

    fn rx_mode(&self) -> u8 {
        self.get(|w, e| w.end[e].slot.rx)
    }

    fn set_rx(&self, m: u8) {
        self.set(|w, e| w.end[e].slot.rx = m);
    }

    fn prod(&self) -> u64 {
        self.get(|w, e| w.end[e].slot.prod).into()
    }

    fn cons(&self) -> u64 {
        self.get(|w, e| w.end[e].slot.cons).into()
    }

    /// True: nobody is there to hear it.
    fn ring_peer(&self) -> bool {
        step(|w| {
            let peer = &mut w.end[1 - self.e];
            if !peer.deaf {
                peer.bell = (peer.bell + 1).min(2);
            }
            (!w.has_bell(1 - self.e) && !w.end[self.e].deaf).into()
        }) != 0
    }

    /// After a cursor of this end was published: `TX` as producer, `RX` as consumer.
    fn published(&self, side: usize) -> Owed {
        let bit = if side == TX { ctl::RX_ARMED } else { ctl::TX_ARMED };
        let note = || {
            if holds(Rule::NoteRing) {
                self.set(|w, e| {
                    w.end[e].slot.noted += 1;
                    w.end[e].slot.owed = true;
                });
            }
        };
        let owes = || if self.owed() { doorbell::Rings::OWED } else { 0 };
        doorbell::after_publish_with(self.peer(), bit, true, owes, note)
    }

    /// A ring that is noted and not paid: a killed holder's, or one that is on its way.
    fn owed(&self) -> bool {
        self.get(|w, e| w.end[e].slot.owed.into()) != 0
    }

    /// Of a stream that is out of the ring.
    fn owes_ring(&self) -> bool {
        holds(Rule::PayRings) && self.owed()
    }

    /// Rings. True: nobody is there to hear it.
    fn pay(&self) -> bool {
        let n = self.get(|w, e| w.end[e].slot.noted);
        let free = |which| self.get(|w, e| w.is_free(e, which).into()) != 0;
        let paid = !holds(Rule::TakenFirst) || free(TX) && free(RX);
        let nobody = self.ring_peer();
        if paid {
            self.set(|w, e| w.end[e].slot.owed &= w.end[e].slot.noted != n);
        }
        nobody
    }

    fn owe(&self, obey: bool) -> Option<Op> {
        _ = self.pay();
        obey.then_some(Op::Obey)
    }

    /// Before a sleep: what a killed holder has left half done.
    fn amend(&self) {
        let me = self.me();
        let same = me.tx.prod.load(Relaxed) & !LEFT == self.prod() && me.rx.cons.load(Relaxed) == self.cons();
        if !holds(Rule::Republish) || same && !self.owed() {
            return;
        }
        let mut ring = false;
        self.lock(RX);
        let cons = self.cons();
        if me.rx.cons.load(Relaxed) != cons {
            ring::release(&me.rx, cons);
            ring |= self.published(RX).ring;
        }
        self.unlock(RX);
        self.lock(TX);
        let prod = self.prod();
        if self.tx_mode() == mode::RING && me.tx.prod.load(Relaxed) != prod {
            ring::publish(&me.tx, prod, false);
            ring |= self.published(TX).ring;
        }
        self.unlock(TX);
        if ring || self.owed() {
            _ = self.pay();
        }
    }

    /// Under the rx lock: a stop that a killed holder noted and may not have told. True: ring the peer.
    fn settle(&self) -> bool {
        if self.get(|w, e| w.end[e].slot.stopped) != 2 {
            return false;
        }
        let at = self.get(|w, e| w.end[e].slot.stop_at).into();
        let first = doorbell::stop(self.me(), at);
        self.set(|w, e| w.end[e].slot.stopped = first.into());
        first
    }

    // conn/tx.rs

    fn send(&self) -> Option<Op> {
        match self.tx_mode() {
            mode::TCP => return self.send_tcp(),
            mode::RING => return self.put(),
            mode::ANNOUNCED => {
                self.lock(TX);
                if self.tx_mode() == mode::ANNOUNCED {
                    self.push_last();
                }
                self.unlock(TX);
                return Some(Op::WaitWritable);
            }
            mode::FLUSH => {
                self.lock(TX);
                if self.tx_mode() == mode::FLUSH {
                    self.flush();
                }
                self.unlock(TX);
                return Some(Op::WaitWritable);
            }
            _ => {}
        }
        if self.owes_ring() {
            _ = self.pay();
        }
        let r = await_step(why::TCP_TX, |w| {
            let v = w.end[self.e].made;
            match w.push(self.e, v) {
                NO_ROOM => None,
                r => {
                    w.end[self.e].made += u8::from(r == TAKEN);
                    Some(r)
                }
            }
        });
        self.sent(r);
        None
    }

    /// The call has returned: its byte is taken, or the connection is gone.
    fn sent(&self, r: u8) {
        also(|w| {
            let end = &mut w.end[self.e];
            match r {
                TAKEN => {
                    end.acked += 1;
                    // Two holders may have begun their calls with one byte left to send.
                    end.may[0] = end.may[0].saturating_sub(1);
                }
                NO_ROOM => {}
                _ => end.tx_over = true,
            }
        });
    }

    fn wait_writable(&self) -> Option<Op> {
        await_step(why::TCP_TX, |w| w.tcp_writable(self.e).then_some(0));
        None
    }

    /// TCP, and the announcement if the peer is ready.
    fn send_tcp(&self) -> Option<Op> {
        let alone = self.get(|w, e| u8::from(w.holders(e) == 1)) != 0;
        if !alone || !switch::is_ready(self.peer()) || self.get(|w, e| w.end[e].slot.gone) != 0 {
            let r = step(|w| {
                let v = w.end[self.e].made;
                let r = w.push(self.e, v);
                w.end[self.e].made += u8::from(r == TAKEN);
                w.end[self.e].slot.sent += u8::from(r == TAKEN);
                r
            });
            self.sent(r);
            return (r == NO_ROOM).then_some(Op::WaitWritable);
        }
        self.lock(TX);
        if self.tx_mode() == mode::TCP {
            let at = u64::from(self.get(|w, e| w.end[e].slot.sent)) + 1;
            self.set(|w, e| w.end[e].slot.switch_at = at as u8);
            if holds(Rule::AnnounceFirst) {
                switch::announce(self.me(), at);
            }
            self.push_last();
            if !holds(Rule::AnnounceFirst) {
                switch::announce(self.me(), at);
            }
        }
        self.unlock(TX);
        None
    }

    /// Under the lock: the last byte by TCP.
    fn push_last(&self) {
        let r = step(|w| {
            let v = w.end[self.e].made;
            let r = w.push(self.e, v);
            w.end[self.e].made += u8::from(r == TAKEN);
            w.end[self.e].slot.sent += u8::from(r == TAKEN);
            r
        });
        self.sent(r);
        self.set_tx(if r == TAKEN { mode::RING } else { mode::ANNOUNCED });
    }

    fn put(&self) -> Option<Op> {
        self.lock(TX);
        if self.tx_mode() != mode::RING {
            self.unlock(TX);
            return None;
        }
        if doorbell::is_to_leave(self.peer()) {
            let ring = self.leave_ring();
            self.unlock(TX);
            return ring.then_some(Op::Owe { obey: false });
        }
        let prod = self.prod();
        let Ok((free, _)) = ring::writable(&self.peer().rx, prod, SIZE) else {
            _ = never(());
            return None;
        };
        if free == 0 {
            self.unlock(TX);
            return Some(Op::Wait(What::Tx));
        }
        // The byte is nobody's to read before the cursor is published, so it goes with the cursor's note.
        self.set(|w, e| {
            w.end[e].data[(prod % SIZE) as usize] = w.end[e].made;
            w.end[e].slot.prod += 1;
            w.end[e].made += 1;
        });
        ring::publish(&self.me().tx, prod + 1, false);
        let owed = self.published(TX);
        let mut ring = owed.ring;
        let mut taken = true;
        if owed.stop {
            ring |= self.leave_ring();
            taken = !self.take_back(prod);
        }
        self.unlock(TX);
        // The call returns once it has rung; but only the bytes of those that have returned must come.
        if ring {
            let nobody = self.pay();
            if taken {
                self.sent(TAKEN);
            }
            return nobody.then_some(Op::Gone);
        }
        if taken {
            self.sent(TAKEN);
        }
        None
    }

    /// True: the byte at `prod` was not sent.
    fn take_back(&self, prod: u64) -> bool {
        let flushed = u64::from(self.get(|w, e| w.end[e].slot.flush));
        if self.tx_mode() != mode::FLUSH || !(prod..=prod + 1).contains(&flushed) {
            return false;
        }
        self.set(|w, e| {
            w.end[e].slot.tx = mode::DONE;
            w.end[e].made -= (prod + 1 - flushed) as u8;
        });
        flushed == prod
    }

    /// Under the tx lock.
    fn leave_ring(&self) -> bool {
        let prod = self.prod();
        let left = switch::leave(self.me(), self.peer(), prod);
        let noted = holds(Rule::NoteLeave).then(|| self.published(TX).ring);
        if left {
            self.set_tx(mode::DONE);
        } else {
            let at = switch::stop_at(self.peer(), prod, SIZE).unwrap_or(prod);
            self.set(|w, e| w.end[e].slot.flush = at as u8);
            self.set_tx(mode::FLUSH);
            self.flush();
        }
        noted.unwrap_or_else(|| self.published(TX).ring)
    }

    /// Under the tx lock, in FLUSH.
    fn flush(&self) {
        for _ in 0..=SIZE {
            let at = u64::from(self.get(|w, e| w.end[e].slot.flush));
            let left = self.prod().wrapping_sub(at);
            if left == 0 || left > SIZE {
                return self.set_tx(mode::DONE);
            }
            let r = step(|w| {
                // The kernel's taking it and our noting that are one step: see the module.
                let v = w.end[self.e].data[(at % SIZE) as usize];
                let r = w.push(self.e, v);
                w.end[self.e].slot.flush += u8::from(r == TAKEN);
                r
            });
            if r == NO_ROOM {
                return;
            }
            if r != TAKEN {
                return self.set_tx(mode::DONE);
            }
        }
    }

    fn leave_tx(&self) -> Option<Op> {
        self.lock(TX);
        let mut ring = false;
        match self.tx_mode() {
            mode::RING => ring = self.leave_ring(),
            mode::ANNOUNCED => {
                let _ = switch::leave(self.me(), self.peer(), 0);
                self.set_tx(mode::DONE);
            }
            _ => {}
        }
        self.unlock(TX);
        ring.then_some(Op::Owe { obey: false })
    }

    // conn/waiting.rs

    fn must_obey(&self) -> bool {
        self.tx_mode() == mode::RING && doorbell::is_to_leave(self.peer())
    }

    fn obey(&self) -> Option<Op> {
        (self.tx_mode() == mode::FLUSH || self.must_obey()).then_some(Op::Progress)
    }

    fn progress(&self) -> Option<Op> {
        self.lock(TX);
        let mut ring = false;
        match self.tx_mode() {
            mode::RING if doorbell::is_to_leave(self.peer()) => ring = self.leave_ring(),
            mode::FLUSH => self.flush(),
            _ => {}
        }
        self.unlock(TX);
        (ring || self.owes_ring()).then_some(Op::Owe { obey: false })
    }

    fn owes(&self) -> bool {
        match self.tx_mode() {
            mode::RING => {
                let prod = self.prod();
                ring::writable(&self.peer().rx, prod, SIZE).is_ok_and(|(free, _)| free < SIZE)
            }
            mode::FLUSH => true,
            _ => false,
        }
    }

    fn ready(&self, what: What) -> bool {
        match what {
            What::Rx => {
                let stopped = || self.get(|w, e| w.end[e].slot.stopped) != 0;
                let mut stops = stopped();
                if !stops && self.me().ctl.ctl.load(Relaxed) & ctl::RX_STOP != 0 {
                    self.lock(RX);
                    stops = stopped();
                    self.unlock(RX);
                }
                if stops || self.rx_mode() != mode::RING || self.must_obey() {
                    return true;
                }
                let cons = self.cons();
                ring::readable(&self.peer().tx, cons, SIZE).map_or(true, |r| r.bytes > 0 || r.left)
            }
            What::Tx => {
                if self.tx_mode() != mode::RING || doorbell::is_to_leave(self.peer()) {
                    return true;
                }
                let prod = self.prod();
                ring::writable(&self.peer().rx, prod, SIZE).map_or(true, |(free, _)| free > 0)
            }
            What::Tcp => self.must_obey() || !self.owes(),
        }
    }

    fn wait(&self, what: What) -> Option<Op> {
        if self.must_obey() {
            return Some(Op::Progress);
        }
        self.amend();
        Some(Op::Nap(what))
    }

    fn bits(what: What) -> u32 {
        match what {
            What::Rx => ctl::RX_ARMED,
            What::Tx => ctl::TX_ARMED,
            What::Tcp => 0,
        }
    }

    /// Before the sleep.
    fn nap(&self, what: What) -> Option<Op> {
        // Counted as asleep, with an empty doorbell.
        let gone = await_step(why::CROWD, |w| {
            let others = w.end[self.e].slot.asleep != 0;
            if w.end[self.e].bell > 0 && others || !w.is_free(self.e, WAIT) {
                return None;
            }
            let end = w.end[self.e].bell == 0 && w.bell_ends(self.e);
            if !end {
                w.end[self.e].bell = 0;
                w.end[self.e].slot.asleep += 1;
            }
            Some(end.into())
        });
        if gone != 0 {
            return Some(Op::Gone);
        }
        if what == What::Tx {
            self.set(|w, e| w.end[e].slot.writers += 1);
        }
        let bits = Self::bits(what);
        let early = !holds(Rule::Recheck) && self.ready(what);
        doorbell::arm(self.me(), bits);
        if early || holds(Rule::Recheck) && self.ready(what) {
            return Some(Op::Woken { what, flush: false, ended: false });
        }
        let flush = self.tx_mode() == mode::FLUSH;
        Some(Op::Asleep { what, flush })
    }

    fn asleep(&self, what: What, flush: bool) -> Option<Op> {
        let kind = match what {
            What::Rx => why::BELL_RX,
            What::Tx => why::BELL_TX,
            What::Tcp => why::BOTH,
        };
        let ended = await_step(kind, |w| {
            let tcp = what == What::Tcp && w.tcp_readable(self.e) || flush && w.tcp_writable(self.e);
            (w.bell_readable(self.e) || tcp).then(|| u8::from(w.end[self.e].bell == 0 && !tcp))
        }) != 0;
        Some(Op::Woken { what, flush, ended })
    }

    fn woken(&self, what: What, flush: bool, ended: bool) -> Option<Op> {
        self.end_sleep(Self::bits(what));
        if flush { Some(Op::Flushed { ended }) } else { ended.then_some(Op::Gone) }
    }

    fn flushed(&self, ended: bool) -> Option<Op> {
        let ring = self.progress();
        if ended { Some(Op::Gone) } else { ring }
    }

    fn end_sleep(&self, bits: u32) {
        if bits == ctl::TX_ARMED {
            self.set(|w, e| w.end[e].slot.writers = w.end[e].slot.writers.saturating_sub(1));
        }
        let rise = || {
            shared(self.e, |w| {
                let n = &mut w.end[self.e].slot.asleep;
                *n = n.saturating_sub(1);
                *n
            })
        };
        if !holds(Rule::DisarmAlone) {
            if rise() == 0 && bits != 0 {
                doorbell::disarm(self.me(), bits);
            }
            return;
        }
        if bits == 0 || self.me().ctl.ctl.load(Relaxed) & bits == 0 {
            _ = rise();
            return;
        }
        self.lock(WAIT);
        if rise() == 0 && self.get(|w, e| w.holders(e) as u8) == 1 {
            doorbell::disarm(self.me(), bits);
        }
        self.unlock(WAIT);
    }

    fn peer_gone(&self) -> Option<Op> {
        let was = shared(self.e, |w| {
            let gone = &mut w.end[self.e].slot.gone;
            let was = *gone;
            *gone = if was == 0 { BEGUN } else { was };
            was
        });
        if was != 0 && !(was == BEGUN && holds(Rule::FinishGone)) {
            return None;
        }
        self.stop_rx(true);
        Some(Op::GoneTx)
    }

    fn gone_tx(&self) -> Option<Op> {
        self.lock(TX);
        let prod = self.prod();
        let unread = self.get(|w, e| w.end[e].deaf.into()) == 0
            && doorbell::stopped(self.peer()).is_none()
            && ring::writable(&self.peer().rx, prod, SIZE).is_ok_and(|(free, _)| free < SIZE);
        match self.tx_mode() {
            mode::RING => _ = self.leave_ring(),
            mode::ANNOUNCED => self.set_tx(mode::DONE),
            _ => {}
        }
        self.unlock(TX);
        if unread {
            // The FIN may be a moment behind the doorbell.
            let reset =
                await_step(why::LOCK, |w| (w.end[1 - self.e].tcp.fin || w.rst).then_some(w.rst.into()));
            if reset == 0 {
                step(|w| {
                    w.end[self.e].slot.reset = w.end[self.e].slot.reset.max(1);
                    w.end[self.e].tcp.fin = true;
                    w.end[self.e].tx_over = true;
                    0
                });
            }
        }
        self.set(|w, e| w.end[e].slot.gone = KNOWN);
        None
    }

    // conn/rx.rs

    fn look(&self) -> Readable {
        let stop = (self.get(|w, e| w.end[e].slot.stopped) != 0)
            .then(|| u64::from(self.get(|w, e| w.end[e].slot.stop_at)));
        let cons = self.cons();
        switch::ring_take(self.peer(), cons, SIZE, stop).unwrap_or_else(never)
    }

    /// The program has had a byte.
    fn had(&self, w: &mut World, v: u8) {
        if v != w.end[self.e].got {
            broke("a byte is lost, doubled or out of order");
        }
        w.end[self.e].got += 1;
    }

    /// The program is told the end, or an error.
    fn over(&self, w: &mut World) {
        let (end, peer) = (&w.end[self.e], &w.end[1 - self.e]);
        if !end.handed && (end.got < peer.acked || end.got > peer.made) {
            broke("an end of the stream before all of its bytes");
        }
        w.end[self.e].rx_over = true;
    }

    fn recv(&self) -> Option<Op> {
        let m = self.rx_mode();
        if m != mode::RING && matches!(self.tx_mode(), mode::RING | mode::FLUSH) {
            if self.obey().is_some() {
                _ = self.progress().map(|_| self.pay());
            }
            if self.owes() && step(|w| w.tcp_readable(self.e).into()) == 0 {
                return Some(Op::Wait(What::Tcp));
            }
        }
        Some(match m {
            mode::RING => Op::Take,
            mode::TCP => Op::Ready,
            _ => Op::Kernel,
        })
    }

    fn recv_kernel(&self) -> Option<Op> {
        let reset = step(|w| {
            // The bytes come first, as they do when TCP is reset.
            let told = w.end[self.e].slot.reset == 1
                && (w.end[1 - self.e].tcp.n == 0 || !holds(Rule::BytesBeforeReset));
            if told {
                w.end[self.e].slot.reset = 2;
                self.over(w);
            }
            told.into()
        });
        if reset != 0 {
            return None;
        }
        await_step(why::TCP_RX, |w| {
            match w.pop(self.e) {
                Some(v) => self.had(w, v),
                None if w.tcp_readable(self.e) => self.over(w),
                None => return None,
            }
            Some(0)
        });
        None
    }

    fn recv_ready(&self) -> Option<Op> {
        self.lock(READER);
        if self.rx_mode() != mode::TCP {
            self.unlock(READER);
            return None;
        }
        let have = u64::from(self.get(|w, e| w.end[e].slot.taken));
        if switch::announced(self.peer()) == Some(have) {
            self.enter_ring();
            self.unlock(READER);
            return None;
        }
        let early = if holds(Rule::PeekFirst) { None } else { Some(switch::announced(self.peer())) };
        let seen =
            await_step(why::TCP_RX, |w| w.tcp_readable(self.e).then(|| w.end[1 - self.e].tcp.n.min(2)));
        let take = match early {
            None => switch::tcp_take(self.peer(), have, seen.into()),
            // What a look before the peek would say.
            Some(None) if seen > 0 => TcpTake::Take(seen.into()),
            Some(None) => TcpTake::End,
            Some(Some(at)) => TcpTake::Take(((at - have) as usize).min(seen.into())),
        };
        match take {
            TcpTake::EnterRing => self.enter_ring(),
            TcpTake::End => {
                _ = step(|w| {
                    self.over(w);
                    0
                })
            }
            TcpTake::Take(n) => {
                step(|w| {
                    for _ in 0..n {
                        if let Some(v) = w.pop(self.e) {
                            self.had(w, v);
                            w.end[self.e].slot.taken += 1;
                        }
                    }
                    0
                });
                if switch::announced(self.peer()) == Some(have + n as u64) {
                    self.enter_ring();
                }
            }
        }
        self.unlock(READER);
        None
    }

    fn enter_ring(&self) {
        self.lock(RX);
        if self.rx_mode() == mode::TCP {
            self.set_rx(mode::RING);
            if self.get(|w, e| w.end[e].slot.asleep) != 0 {
                doorbell::arm(self.me(), ctl::RX_ARMED);
            }
        }
        self.unlock(RX);
    }

    fn take(&self) -> Option<Op> {
        let r = self.look();
        if r.bytes == 0 && !r.left {
            return Some(Op::Wait(What::Rx));
        }
        self.lock(RX);
        if self.rx_mode() != mode::RING {
            self.unlock(RX);
            return None;
        }
        let r = self.look();
        if r.bytes == 0 {
            let settles = r.left && self.get(|w, e| w.end[e].slot.stopped) == 2;
            let ring = settles && self.settle();
            if r.left && !settles {
                self.set_rx(mode::DONE);
            }
            self.unlock(RX);
            return ring.then_some(Op::Owe { obey: false });
        }
        let cons = self.cons();
        let v = self.get(|w, e| w.end[1 - e].data[(cons % SIZE) as usize]);
        self.set(|w, e| {
            self.had(w, v);
            w.end[e].slot.cons += 1;
        });
        ring::release(&self.me().rx, cons + 1);
        let owed = self.published(RX);
        self.unlock(RX);
        match owed {
            doorbell::Owed { ring: true, stop } => Some(Op::Owe { obey: stop }),
            doorbell::Owed { stop, .. } => stop.then_some(Op::Obey),
        }
    }

    fn stop_rx(&self, keep: bool) -> Option<Op> {
        let gone = step(|w| (!w.has_bell(1 - self.e)).into()) != 0;
        let keep = keep || gone;
        self.lock(RX);
        let m = self.rx_mode();
        let ring = self.settle();
        if m == mode::DONE || self.get(|w, e| w.end[e].slot.stopped) != 0 {
            self.unlock(RX);
            if ring {
                self.ring_peer();
            }
            return None;
        }
        let cons = self.cons();
        let note = |at: u64| {
            if holds(Rule::NoteStop) {
                self.set(|w, e| w.end[e].slot.stop_at = at as u8);
                self.set(|w, e| {
                    w.end[e].slot.stopped = 2;
                    w.end[e].handed |= !keep;
                });
            }
        };
        let stop_at = match switch::stop(self.me(), self.peer(), cons, SIZE, keep, note) {
            Some(at) => at,
            None if !gone || !holds(Rule::EndOfTheDead) => {
                self.set(|w, e| w.end[e].slot.stopped = 0);
                self.unlock(RX);
                return None;
            }
            None => cons + ring::readable(&self.peer().tx, cons, SIZE).map_or(0, |r| r.bytes),
        };
        self.set(|w, e| w.end[e].slot.stop_at = stop_at as u8);
        self.set(|w, e| {
            w.end[e].slot.stopped = 1;
            w.end[e].handed |= !keep;
        });
        if m == mode::TCP && switch::announced(self.peer()).is_none() || m == mode::RING && stop_at == cons {
            self.set_rx(mode::DONE);
        }
        self.unlock(RX);
        if holds(Rule::StopRings) {
            self.ring_peer();
        }
        None
    }

    // conn/close.rs

    /// Of a shutdown, or of the last `close`.
    fn end_tx(&self, close: bool) -> Option<Op> {
        self.lock(TX);
        let mut ring = false;
        match self.tx_mode() {
            mode::RING => ring = self.leave_ring(),
            mode::ANNOUNCED => {
                let _ = switch::leave(self.me(), self.peer(), 0);
                self.set_tx(mode::DONE);
            }
            mode::TCP => self.set_tx(mode::DONE),
            _ => {}
        }
        self.unlock(TX);
        if ring || self.owes_ring() {
            self.pay();
        }
        Some(Op::Finish { close })
    }

    fn finish_flush(&self, close: bool) -> Option<Op> {
        for _ in 0..=SIZE {
            if self.tx_mode() != mode::FLUSH {
                break;
            }
            self.wait_writable();
            _ = self.progress().map(|_| self.pay());
        }
        Some(if close { Op::LastLook } else { Op::ShutFd })
    }

    fn shut_fd(&self) -> Option<Op> {
        doorbell::shut(self.peer());
        step(|w| {
            w.end[self.e].tcp.fin = true;
            w.end[self.e].tx_over = true;
            0
        });
        Some(Op::ShutBell)
    }

    /// Who sleeps for room is to hear of it: the doorbell falls silent, for the other direction as well.
    fn shut_bell(&self) -> Option<Op> {
        if self.get(|w, e| w.end[e].slot.writers) == 0 || !holds(Rule::ShutWakes) {
            return None;
        }
        self.stop_rx(true);
        Some(Op::Deafen)
    }

    fn deafen(&self) -> Option<Op> {
        step(|w| {
            w.end[self.e].deaf = true;
            0
        });
        None
    }

    fn close(&self) -> Option<Op> {
        let t = self.thread as usize;
        // Its seat is left before it counts itself off: the count is never below the truth.
        self.set(|w, _| w.threads[t].has &= !has::SEAT);
        let last = step(|w| {
            w.threads[t].has &= !has::COUNT;
            u8::from(w.holders(self.e) == 0)
        }) != 0;
        if last || !holds(Rule::LastLeaves) { self.end_tx(true) } else { Some(Op::CloseFd { last }) }
    }

    /// The last holder is about to let the kernel close the socket.
    fn last_look(&self) -> Option<Op> {
        self.lock(RX);
        let mut unread = false;
        if self.rx_mode() <= mode::RING {
            if self.get(|w, e| w.end[e].slot.stopped) == 2 {
                let _ = self.settle();
            }
            let cons = self.cons();
            let look = || ring::readable(&self.peer().tx, cons, SIZE).is_ok_and(|r| r.bytes > 0);
            unread = look() && self.get(|w, e| w.end[e].tcp.fin.into()) == 0;
            if !unread && self.get(|w, e| w.end[e].slot.stopped) == 0 {
                let _ = doorbell::stop(self.me(), cons);
            }
            unread |= look();
        }
        self.unlock(RX);
        if unread {
            step(|w| {
                w.end[self.e].linger = true;
                0
            });
        }
        Some(Op::CloseFd { last: true })
    }

    fn close_fd(&self, last: bool) -> Option<Op> {
        step(|w| {
            w.close_fd(self.e, self.thread as usize);
            0
        });
        if last && self.rx_mode() <= mode::RING {
            let _ = doorbell::stop(self.me(), self.cons());
        }
        Some(Op::CloseBell)
    }

    fn close_bell(&self) -> Option<Op> {
        step(|w| {
            w.threads[self.thread as usize].has &= !has::BELL;
            0
        });
        None
    }
}

/// Whether somebody sleeps at `e`, as `kind`, for what is there.
pub fn due(w: &World, e: usize, kind: u8) -> Option<&'static str> {
    let (end, peer) = (&w.end[e], &w.end[1 - e]);
    let prod = |p: &[u8; 6]| p[0] & 127;
    match kind {
        why::BELL_RX | why::TCP_RX | why::BOTH => {
            // What a stop without keeping leaves in the ring waits for the sender's next call.
            let there = end.got < peer.acked && !end.handed;
            let ended = peer.tcp.fin || !w.has_bell(1 - e) || w.rst;
            (there || ended).then_some("a reader sleeps, and bytes or the end are due")
        }
        why::BELL_TX => {
            let space = u64::from(prod(&end.page)) < u64::from(peer.page[2]) + SIZE;
            let asked = u32::from(peer.page[5]) & (ctl::RX_STOP | ctl::RX_ASK) != 0;
            // Its own end may have been shut by another holder.
            let ended = !w.has_bell(1 - e) || end.tcp.fin;
            (space || asked || ended).then_some("a writer sleeps, and there is space or an end")
        }
        why::TCP_TX => (w.tcp_writable(e)).then_some("a writer sleeps, and TCP takes bytes"),
        _ => Some("a thread waits for another that is not there"),
    }
}
