//! The traffic on one connection, as a machine that goes on when its socket lets it.
//!
//! ```text
//! Send     block, block, …                      until the stop or the budget's end, then FIN
//! Receive  whatever comes                       until the end of the stream
//! Ask      request out, response in, …          until the stop or the budget's end, then FIN
//! Answer   request in, response out, …          until the end of the stream
//! ```
//!
//! A blocking thread calls [`Flow::step`] again and again; an event loop calls it when the socket is ready for what
//! the last step said it needs ([`drive`](super::drive)). The bytes are counted as they are moved.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use hdrhistogram::Histogram;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use super::link::Link;
use super::pattern::{self, Check};
use super::spec::{Kind, Spec};
use super::wire::{Problem, Result};

/// Where the test is. Threads look at it between two messages; nothing is read because of it, so Relaxed does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// What is counted now is left out (`-O`).
    WarmUp,
    Measure,
    Stop,
}

/// What all threads of one end share.
#[derive(Debug)]
pub struct Run {
    pub spec: Spec,
    pub is_client: bool,
    /// The other end is ours too: streams end in order, with all bytes read.
    pub drain: bool,
    phase: AtomicU8,
    /// What is left of `-n` or `-k`.
    budget: Option<AtomicU64>,
    /// The block that `-Z` sends.
    file: Option<File>,
}

impl Run {
    pub fn new(spec: &Spec, is_client: bool, drain: bool) -> Result<Self> {
        let file = if spec.zerocopy { Some(block_file(spec.length)?) } else { None };
        let first = if spec.omit > 0.0 { Phase::WarmUp } else { Phase::Measure };
        Ok(Self {
            spec: spec.clone(),
            is_client,
            drain,
            phase: AtomicU8::new(first as u8),
            budget: spec.bytes.or(spec.blocks).map(AtomicU64::new),
            file,
        })
    }

    /// Phases only go on.
    pub fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Relaxed);
    }

    pub fn is(&self, phase: Phase) -> bool {
        self.phase.load(Relaxed) == phase as u8
    }

    /// Whether this end sends on that connection.
    pub fn sends(&self, index: usize) -> bool {
        self.spec.client_sends(index) == self.is_client
    }

    /// Nothing is left of `-n` or `-k`.
    fn is_spent(&self) -> bool {
        // A counter, as below.
        self.budget.as_ref().is_some_and(|b| b.load(Relaxed) == 0)
    }

    /// How many of `size` bytes, the next message, may still be moved.
    pub fn take(&self, size: usize) -> usize {
        let Some(budget) = &self.budget else { return size };
        if !self.is(Phase::Measure) {
            return if self.is(Phase::Stop) { 0 } else { size };
        }
        let unit = if self.spec.blocks.is_some() { 1 } else { size as u64 };
        let mut got = 0;
        // A counter that several threads lower; nothing else is read because of it.
        let _ = budget.fetch_update(Relaxed, Relaxed, |left| {
            got = left.min(unit);
            Some(left - got)
        });
        if self.spec.blocks.is_some() { size * got as usize } else { got as usize }
    }
}

fn block_file(length: usize) -> Result<File> {
    let bytes = {
        let mut b = vec![0; length];
        pattern::fill(0, 0, &mut b);
        b
    };
    let make = || -> io::Result<File> {
        let file = File::from(rustix::fs::memfd_create("smc-perf", MemfdFlags::CLOEXEC)?);
        io::Write::write_all(&mut &file, &bytes)?;
        Ok(file)
    };
    make().map_err(|e| Problem::new(format!("-Z: {e}")))
}

/// Counts of one connection. One thread writes them, on a cache line of their own; others only look.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counter {
    pub tx: AtomicU64,
    pub rx: AtomicU64,
    pub messages: AtomicU64,
}

/// A copy of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub tx: u64,
    pub rx: u64,
    pub messages: u64,
}

impl Counter {
    pub fn read(&self) -> Counts {
        // Counters: no other memory is read because of them.
        Counts { tx: self.tx.load(Relaxed), rx: self.rx.load(Relaxed), messages: self.messages.load(Relaxed) }
    }

    pub fn publish(&self, c: Counts) {
        // As above.
        self.tx.store(c.tx, Relaxed);
        self.rx.store(c.rx, Relaxed);
        self.messages.store(c.messages, Relaxed);
    }
}

impl Counts {
    pub fn since(self, before: Self) -> Self {
        Self {
            tx: self.tx.saturating_sub(before.tx),
            rx: self.rx.saturating_sub(before.rx),
            messages: self.messages.saturating_sub(before.messages),
        }
    }

    pub fn plus(self, other: Self) -> Self {
        Self { tx: self.tx + other.tx, rx: self.rx + other.rx, messages: self.messages + other.messages }
    }

    pub fn bytes(self) -> u64 {
        self.tx + self.rx
    }
}

/// A thread's own things.
#[derive(Debug)]
pub struct Bench {
    pub run: Arc<Run>,
    out: Vec<u8>,
    back: Vec<u8>,
    /// Nanoseconds of round trips.
    pub took: Histogram<u64>,
}

/// Three digits, whatever the length.
pub fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are allowed")
}

impl Bench {
    pub fn new(run: Arc<Run>) -> Self {
        let size = run.spec.length.max(run.spec.response);
        let mut out = vec![0; size];
        pattern::fill(0, 0, &mut out);
        Self { run, out, back: vec![0; size], took: histogram() }
    }

    pub fn record(&mut self, nanoseconds: u128) {
        if self.run.is(Phase::Measure) {
            // Grows by itself; half a millennium would be too long for it.
            let _ = self.took.record(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 2));
        }
    }

    /// A request and its response on a new connection (`--crr`).
    pub fn ask_once(&mut self, link: &Link) -> io::Result<()> {
        let (length, response) = (self.run.spec.length, self.run.spec.response);
        if self.run.spec.verify {
            pattern::fill(ASKED, 0, &mut self.out[..length]);
        }
        write_all(link, &self.out[..length])?;
        read_exact(link, &mut self.back[..response])?;
        self.check_once(ANSWERED, response)
    }

    /// The other end of it.
    pub fn answer_once(&mut self, link: &Link) -> io::Result<()> {
        let (length, response) = (self.run.spec.length, self.run.spec.response);
        read_exact(link, &mut self.back[..length])?;
        self.check_once(ASKED, length)?;
        if self.run.spec.verify {
            pattern::fill(ANSWERED, 0, &mut self.out[..response]);
        }
        write_all(link, &self.out[..response])
    }

    fn check_once(&self, seed: u64, n: usize) -> io::Result<()> {
        if !self.run.spec.verify {
            return Ok(());
        }
        Check::new(seed).look(&self.back[..n]).map_err(io::Error::other)
    }
}

/// Seeds of the two directions; a connection's number goes on top.
const ASKED: u64 = 1 << 32;
const ANSWERED: u64 = 2 << 32;

fn write_all(link: &Link, mut from: &[u8]) -> io::Result<()> {
    while !from.is_empty() {
        match link.write(from) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => from = &from[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn read_exact(link: &Link, mut to: &mut [u8]) -> io::Result<()> {
    while !to.is_empty() {
        match link.read(to) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => to = &mut to[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What a flow needs to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Read,
    Write,
    Over,
}

#[derive(Debug)]
enum Role {
    /// `done` of `size` bytes of the block are out; 0 of 0: the next one is to be begun.
    Send {
        done: usize,
        size: usize,
    },
    Receive,
    Ask(Ask),
    Answer {
        half: Half,
        done: usize,
    },
}

/// A round trip from the asking end.
#[derive(Debug, Clone, Copy)]
struct Ask {
    half: Half,
    done: usize,
    /// When the request began: where the last response ended.
    began: Option<Instant>,
    /// It is taken from the budget, and has to go out.
    open: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Request,
    Response,
}

/// One connection's traffic.
#[derive(Debug)]
pub struct Flow {
    pub link: Arc<Link>,
    counter: Arc<Counter>,
    counts: Counts,
    role: Role,
    tx_seed: u64,
    check: Option<Check>,
}

impl Flow {
    pub fn new(run: &Run, index: usize, link: Arc<Link>, counter: Arc<Counter>) -> Self {
        let role = match (run.spec.kind, run.is_client) {
            (Kind::Stream, _) if run.sends(index) => Role::Send { done: 0, size: 0 },
            (Kind::Stream, _) => Role::Receive,
            (_, true) => Role::Ask(Ask { half: Half::Request, done: 0, began: None, open: false }),
            (_, false) => Role::Answer { half: Half::Request, done: 0 },
        };
        let (tx, rx) = if run.is_client { (ASKED, ANSWERED) } else { (ANSWERED, ASKED) };
        let seed = |base: u64| base + index as u64;
        Self {
            link,
            counter,
            counts: Counts::default(),
            role,
            tx_seed: seed(tx),
            check: run.spec.verify.then(|| Check::new(seed(rx))),
        }
    }

    /// Goes on: at most one message.
    pub fn step(&mut self, b: &mut Bench) -> io::Result<Next> {
        let next = match self.role {
            Role::Send { done, size } => self.send(b, done, size),
            Role::Receive => self.receive(b),
            Role::Ask(a) => self.ask(b, a),
            Role::Answer { half, done } => self.answer(b, half, done),
        };
        self.judged(next, &b.run)
    }

    /// What an error means here.
    #[inline]
    fn judged(&self, next: io::Result<Next>, run: &Run) -> io::Result<Next> {
        match next {
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(self.needs()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(self.needs()),
            // A plain iperf3 closes while we still send.
            Err(e) if !run.drain && run.is(Phase::Stop) && is_end(&e) => Ok(Next::Over),
            other => other,
        }
    }

    /// The usual case of [`step`](Self::step) for a thread that may block, with less around each call: blocks that are
    /// bounded by time alone and go out whole. What is not so is left to `step`.
    pub fn whole_blocks(&mut self, b: &Bench) -> io::Result<Next> {
        let usual = matches!(self.role, Role::Send { done, size } if done == size)
            && self.check.is_none()
            && b.run.budget.is_none()
            && b.run.file.is_none();
        let block = &b.out[..b.run.spec.length];
        while usual && !b.run.is(Phase::Stop) {
            let n = match self.link.write(block) {
                Ok(n) => n,
                Err(e) => return self.judged(Err(e), &b.run),
            };
            self.counts.tx += n as u64;
            self.counts.messages += u64::from(n == block.len());
            self.counter.publish(self.counts);
            if n < block.len() {
                self.role = Role::Send { done: n, size: block.len() };
                break;
            }
        }
        Ok(self.needs())
    }

    /// What it waits for as it is.
    pub fn needs(&self) -> Next {
        match self.role {
            Role::Send { .. }
            | Role::Ask(Ask { half: Half::Request, .. })
            | Role::Answer { half: Half::Response, .. } => Next::Write,
            _ => Next::Read,
        }
    }

    fn over(&self, b: &Bench) -> Next {
        if b.run.drain {
            self.link.shutdown(Shutdown::Write);
        }
        Next::Over
    }

    fn write(&mut self, b: &mut Bench, n: usize) -> io::Result<usize> {
        if self.check.is_some() {
            pattern::fill(self.tx_seed, self.counts.tx, &mut b.out[..n]);
        }
        let n = self.link.write(&b.out[..n])?;
        self.counts.tx += n as u64;
        Ok(n)
    }

    /// 0: the stream is at its end.
    fn read(&mut self, b: &mut Bench, n: usize) -> io::Result<usize> {
        let n = self.link.read(&mut b.back[..n])?;
        self.counts.rx += n as u64;
        if let Some(check) = &mut self.check {
            check.look(&b.back[..n]).map_err(io::Error::other)?;
        }
        Ok(n)
    }

    fn send(&mut self, b: &mut Bench, mut done: usize, mut size: usize) -> io::Result<Next> {
        if done == size {
            (done, size) = (0, if b.run.is(Phase::Stop) { 0 } else { b.run.take(b.run.spec.length) });
            if size == 0 {
                return Ok(self.over(b));
            }
            self.role = Role::Send { done, size };
        }
        done += match &b.run.file {
            None => self.write(b, size - done)?,
            Some(file) => {
                let mut at = done as u64;
                let n = rustix::fs::sendfile(&*self.link, file, Some(&mut at), size - done)?;
                self.counts.tx += n as u64;
                n
            }
        };
        self.counts.messages += u64::from(done == size);
        self.counter.publish(self.counts);
        self.role = Role::Send { done, size };
        Ok(Next::Write)
    }

    fn receive(&mut self, b: &mut Bench) -> io::Result<Next> {
        let n = self.read(b, b.run.spec.length)?;
        self.counts.messages += u64::from(n > 0);
        self.counter.publish(self.counts);
        // A plain iperf3 that sends waits for us to say when it is enough.
        let enough = !b.run.drain && b.run.is_client && (b.run.take(n) < n || b.run.is_spent());
        Ok(if n == 0 || enough { Next::Over } else { Next::Read })
    }

    fn ask(&mut self, b: &mut Bench, mut a: Ask) -> io::Result<Next> {
        if a.half == Half::Response {
            let n = self.read(b, b.run.spec.response - a.done)?;
            if n == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            a.done += n;
            if a.done < b.run.spec.response {
                self.role = Role::Ask(a);
                return Ok(Next::Read);
            }
            let now = Instant::now();
            b.record(a.began.map_or(0, |t| (now - t).as_nanos()));
            self.counts.messages += 1;
            self.counter.publish(self.counts);
            a = Ask { half: Half::Request, done: 0, began: Some(now), open: false };
            self.role = Role::Ask(a);
        }
        if !a.open {
            if b.run.is(Phase::Stop) || b.run.take(b.run.spec.length) == 0 {
                return Ok(self.over(b));
            }
            a.open = true;
            a.began = a.began.or_else(|| Some(Instant::now()));
            self.role = Role::Ask(a);
        }
        a.done += self.write(b, b.run.spec.length - a.done)?;
        if a.done == b.run.spec.length {
            (a.half, a.done) = (Half::Response, 0);
        }
        self.role = Role::Ask(a);
        Ok(self.needs())
    }

    fn answer(&mut self, b: &mut Bench, mut half: Half, mut done: usize) -> io::Result<Next> {
        if half == Half::Request {
            let n = self.read(b, b.run.spec.length - done)?;
            if n == 0 && done == 0 {
                return Ok(Next::Over);
            }
            if n == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            done += n;
            if done == b.run.spec.length {
                (half, done) = (Half::Response, 0);
            }
            self.role = Role::Answer { half, done };
            if half == Half::Request {
                return Ok(Next::Read);
            }
        }
        done += self.write(b, b.run.spec.response - done)?;
        if done == b.run.spec.response {
            self.counts.messages += 1;
            self.counter.publish(self.counts);
            (half, done) = (Half::Request, 0);
        }
        self.role = Role::Answer { half, done };
        Ok(self.needs())
    }
}

/// The other end is gone, or has closed.
fn is_end(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted)
}
