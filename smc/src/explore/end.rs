//! What an end does, as `conn/{tx,rx,waiting,close}.rs` do it, call by call and in their order.
//!
//! Each operation is one look of one call: a call that must look again is the next operation, which the program
//! may choose or not.

use super::holds;
use super::traced::broke;
use super::world::{Op, READER, RX, SIZE, TX, WAIT, World, also, await_step, mode, page, shared, step, why};
use crate::handshake::switch::{self, TcpTake};
use crate::mem::layout::{LEFT, SidePage, ctl};
use crate::ring::{self, Readable};
use crate::rules::Rule;
use crate::sync::Ordering::*;
use crate::wait::doorbell::{self, Owed};

/// How a send to TCP ended.
const TAKEN: u8 = 0;
const NO_ROOM: u8 = 1;

#[derive(Clone, Copy, PartialEq)]
enum What {
    Rx,
    Tx,
    Tcp,
}

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
    pub fn run(e: usize, thread: u8, op: Op) {
        let c = Call { e, thread };
        match op {
            Op::Send => c.send(),
            Op::Recv => c.recv(),
            Op::Leave => c.leave_tx(),
            Op::Stop => c.stop_rx(false),
            Op::Keep => c.stop_rx(true),
            Op::Shut => c.shut(),
            Op::Close => c.close(),
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
            shared(|w| f(w, self.e))
        }
    }

    fn set(&self, f: impl Fn(&mut World, usize)) {
        shared(|w| {
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
        if super::world::with(|w| w.shared) {
            await_step(why::LOCK, take);
        } else {
            also(|w| _ = take(w));
        }
    }

    fn unlock(&self, which: usize) {
        self.set(|w, e| w.end[e].slot.lock[which] = 0);
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

    fn ring_peer(&self) {
        step(|w| {
            let b = &mut w.end[1 - self.e].bell;
            *b = (*b + 1).min(2);
            0
        });
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

    fn pay(&self, owed: bool) {
        if owed {
            let n = self.get(|w, e| w.end[e].slot.noted);
            self.ring_peer();
            self.set(|w, e| w.end[e].slot.owed &= w.end[e].slot.noted != n);
        }
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
        let ring = ring || self.owed();
        self.pay(ring);
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

    fn send(&self) {
        match self.tx_mode() {
            mode::TCP => self.send_tcp(),
            mode::RING => self.put(),
            mode::ANNOUNCED => {
                self.lock(TX);
                if self.tx_mode() == mode::ANNOUNCED {
                    self.push_last();
                }
                self.unlock(TX);
                self.wait_writable();
            }
            mode::FLUSH => {
                self.lock(TX);
                if self.tx_mode() == mode::FLUSH {
                    self.flush();
                }
                self.unlock(TX);
                self.wait_writable();
            }
            _ => {
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
            }
        }
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

    fn wait_writable(&self) {
        await_step(why::TCP_TX, |w| w.tcp_writable(self.e).then_some(0));
    }

    /// TCP, and the announcement if the peer is ready.
    fn send_tcp(&self) {
        let alone = self.get(|w, e| u8::from(w.end[e].holders == 1)) != 0;
        if !alone || !switch::is_ready(self.peer()) || self.get(|w, e| w.end[e].slot.gone.into()) != 0 {
            let r = step(|w| {
                let v = w.end[self.e].made;
                let r = w.push(self.e, v);
                w.end[self.e].made += u8::from(r == TAKEN);
                w.end[self.e].slot.sent += u8::from(r == TAKEN);
                r
            });
            self.sent(r);
            if r == NO_ROOM {
                self.wait_writable();
            }
            return;
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

    fn put(&self) {
        self.lock(TX);
        if self.tx_mode() != mode::RING {
            return self.unlock(TX);
        }
        if doorbell::asked(self.peer()) {
            let ring = self.leave_ring();
            self.unlock(TX);
            return self.pay(ring);
        }
        let prod = self.prod();
        let Ok((free, _)) = ring::writable(&self.peer().rx, prod, SIZE) else {
            _ = never(());
            return;
        };
        if free == 0 {
            self.unlock(TX);
            return self.wait(What::Tx);
        }
        self.set(|w, e| {
            let v = w.end[e].made;
            w.end[e].data[(prod % SIZE) as usize] = v;
        });
        self.set(|w, e| {
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
        self.pay(ring);
        if taken {
            self.sent(TAKEN);
        }
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
        if switch::leave(self.me(), self.peer(), prod) {
            self.set_tx(mode::DONE);
        } else {
            let at = switch::stop_at(self.peer(), prod, SIZE).unwrap_or(prod);
            self.set(|w, e| w.end[e].slot.flush = at as u8);
            self.set_tx(mode::FLUSH);
            self.flush();
        }
        self.published(TX).ring
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

    fn leave_tx(&self) {
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
        self.pay(ring);
    }

    // conn/waiting.rs

    fn must_obey(&self) -> bool {
        self.tx_mode() == mode::RING && doorbell::asked(self.peer())
    }

    fn obey(&self) {
        if self.tx_mode() == mode::FLUSH || self.must_obey() {
            self.progress();
        }
    }

    fn progress(&self) {
        self.lock(TX);
        let mut ring = false;
        match self.tx_mode() {
            mode::RING if doorbell::asked(self.peer()) => ring = self.leave_ring(),
            mode::FLUSH => self.flush(),
            _ => {}
        }
        self.unlock(TX);
        self.pay(ring);
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
                let stops = self.me().ctl.ctl.load(Relaxed) & ctl::RX_STOP != 0;
                if stops || self.rx_mode() != mode::RING || self.must_obey() {
                    return true;
                }
                let cons = self.cons();
                ring::readable(&self.peer().tx, cons, SIZE).map_or(true, |r| r.bytes > 0 || r.left)
            }
            What::Tx => {
                if self.tx_mode() != mode::RING || doorbell::asked(self.peer()) {
                    return true;
                }
                let prod = self.prod();
                ring::writable(&self.peer().rx, prod, SIZE).map_or(true, |(free, _)| free > 0)
            }
            What::Tcp => self.must_obey() || !self.owes(),
        }
    }

    fn wait(&self, what: What) {
        if self.must_obey() {
            return self.progress();
        }
        self.amend();
        // Counted as asleep, with an empty doorbell.
        let gone = await_step(why::CROWD, |w| {
            let others = w.end[self.e].slot.asleep != 0;
            if w.end[self.e].bell > 0 && others || !w.is_free(self.e, WAIT) {
                return None;
            }
            let end = w.end[self.e].bell == 0 && w.end[1 - self.e].bells == 0;
            if !end {
                w.end[self.e].bell = 0;
                w.end[self.e].slot.asleep += 1;
            }
            Some(end.into())
        });
        if gone != 0 {
            return self.peer_gone();
        }
        let (bits, kind) = match what {
            What::Rx => (ctl::RX_ARMED, why::BELL_RX),
            What::Tx => (ctl::TX_ARMED, why::BELL_TX),
            What::Tcp => (0, why::BOTH),
        };
        if !holds(Rule::Recheck) && self.ready(what) {
            return self.end_sleep(bits);
        }
        doorbell::arm(self.me(), bits);
        if holds(Rule::Recheck) && self.ready(what) {
            return self.end_sleep(bits);
        }
        let flush = self.tx_mode() == mode::FLUSH;
        let ended = await_step(kind, |w| {
            let tcp = what == What::Tcp && w.tcp_readable(self.e) || flush && w.tcp_writable(self.e);
            (w.bell_readable(self.e) || tcp).then(|| u8::from(w.end[self.e].bell == 0 && !tcp))
        });
        self.end_sleep(bits);
        if flush {
            self.progress();
        }
        if ended != 0 {
            self.peer_gone();
        }
    }

    fn end_sleep(&self, bits: u32) {
        let rise = || {
            shared(|w| {
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
        if rise() == 0 && self.get(|w, e| w.end[e].holders) == 1 {
            doorbell::disarm(self.me(), bits);
        }
        self.unlock(WAIT);
    }

    fn peer_gone(&self) {
        let was = shared(|w| std::mem::replace(&mut w.end[self.e].slot.gone, true).into());
        if was != 0 {
            return;
        }
        self.stop_rx(true);
        self.lock(TX);
        let prod = self.prod();
        let unread = doorbell::stopped(self.peer()).is_none()
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
                    w.end[self.e].slot.reset = 1;
                    w.end[self.e].tcp.fin = true;
                    w.end[self.e].tx_over = true;
                    0
                });
            }
        }
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

    fn recv(&self) {
        let m = self.rx_mode();
        if m != mode::RING && matches!(self.tx_mode(), mode::RING | mode::FLUSH) {
            self.obey();
            if self.owes() && step(|w| w.tcp_readable(self.e).into()) == 0 {
                return self.wait(What::Tcp);
            }
        }
        match m {
            mode::RING => self.take(),
            mode::TCP => self.recv_ready(),
            _ => self.recv_kernel(),
        }
    }

    fn recv_kernel(&self) {
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
            return;
        }
        await_step(why::TCP_RX, |w| {
            match w.pop(self.e) {
                Some(v) => self.had(w, v),
                None if w.tcp_readable(self.e) => self.over(w),
                None => return None,
            }
            Some(0)
        });
    }

    fn recv_ready(&self) {
        self.lock(READER);
        if self.rx_mode() != mode::TCP {
            return self.unlock(READER);
        }
        let have = u64::from(self.get(|w, e| w.end[e].slot.taken));
        if switch::announced(self.peer()) == Some(have) {
            self.enter_ring();
            return self.unlock(READER);
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

    fn take(&self) {
        let r = self.look();
        if r.bytes == 0 && !r.left {
            return self.wait(What::Rx);
        }
        self.lock(RX);
        if self.rx_mode() != mode::RING {
            return self.unlock(RX);
        }
        let r = self.look();
        if r.bytes == 0 {
            let settles = r.left && self.get(|w, e| w.end[e].slot.stopped) == 2;
            let ring = settles && self.settle();
            if r.left && !settles {
                self.set_rx(mode::DONE);
            }
            self.unlock(RX);
            return if ring {
                self.ring_peer()
            };
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
        self.pay(owed.ring);
        if owed.stop {
            self.obey();
        }
    }

    fn stop_rx(&self, keep: bool) {
        let gone = step(|w| (w.end[1 - self.e].bells == 0).into()) != 0;
        let keep = keep || gone;
        self.lock(RX);
        let m = self.rx_mode();
        let ring = self.settle();
        if m == mode::DONE || self.get(|w, e| w.end[e].slot.stopped) != 0 {
            self.unlock(RX);
            return if ring {
                self.ring_peer()
            };
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
                return self.unlock(RX);
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
    }

    // conn/close.rs

    fn end_tx(&self) {
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
        self.pay(ring);
        for _ in 0..=SIZE {
            if self.tx_mode() != mode::FLUSH {
                return;
            }
            self.wait_writable();
            self.progress();
        }
    }

    fn shut(&self) {
        self.end_tx();
        step(|w| {
            w.end[self.e].tcp.fin = true;
            w.end[self.e].tx_over = true;
            0
        });
    }

    fn close(&self) {
        let last = step(|w| {
            let n = &mut w.end[self.e].holders;
            *n -= 1;
            u8::from(*n == 0)
        }) != 0;
        if last {
            self.end_tx();
            self.lock(RX);
            let mut unread = false;
            if self.rx_mode() <= mode::RING {
                let _ = self.settle();
                let cons = self.cons();
                let look = || ring::readable(&self.peer().tx, cons, SIZE).is_ok_and(|r| r.bytes > 0);
                unread = look() && self.get(|w, e| w.end[e].tcp.fin.into()) == 0;
                if !unread && self.get(|w, e| w.end[e].slot.stopped) == 0 {
                    let _ = doorbell::stop(self.me(), cons);
                }
                unread |= look();
            }
            self.unlock(RX);
            step(|w| {
                w.close_tcp(self.e, unread);
                0
            });
            if self.rx_mode() <= mode::RING {
                let _ = doorbell::stop(self.me(), self.cons());
            }
        }
        step(|w| {
            w.end[self.e].bells -= 1;
            0
        });
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
            let ended = peer.tcp.fin || peer.bells == 0 || w.rst;
            (there || ended).then_some("a reader sleeps, and bytes or the end are due")
        }
        why::BELL_TX => {
            let space = u64::from(prod(&end.page)) < u64::from(peer.page[2]) + SIZE;
            let asked = u32::from(peer.page[5]) & (ctl::RX_STOP | ctl::RX_ASK) != 0;
            (space || asked || peer.bells == 0).then_some("a writer sleeps, and there is space or an end")
        }
        why::TCP_TX => (w.tcp_writable(e)).then_some("a writer sleeps, and TCP takes bytes"),
        _ => Some("a thread waits for another that is not there"),
    }
}
