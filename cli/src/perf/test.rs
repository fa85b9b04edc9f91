//! One end of a running test: its threads, its clock, and what came of it.
//!
//! ```text
//!          warm-up (-O)         measured                       stop            over
//! client   ├────────────────────┼──────────────────────────────┤ FIN … drain ──┤  the clock, -n, -k, Ctrl-C
//! server   ├────────────────────┼──────────────────────────────────────────────┤  TEST_END and the ends of the streams
//! ```
//!
//! Each end counts by its own clock, from its own end of the warm-up to the end of its last thread: both have seen
//! every byte by then, if the other end is ours. Whatever happens the threads end: a connection that is shut down
//! wakes who sleeps in it.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::drive::{Work, shares};
use super::events::{Event, Inbox, Outbox};
use super::flow::{Counter, Counts, Flow, Phase, Run, histogram};
use super::link::{Dial, Link, Listener};
use super::meter::{Cpu, Look, Ways};
use super::spec::{Kind, Spec};
use super::wire::{Control, PATIENCE, Problem, Result, State};

/// Reads one state in a thread of its own: all that the other end says during a test.
pub fn listen(control: &Control, events: &Outbox) -> Result<()> {
    control.patience(None)?;
    let (control, events) = (Control(control.0.try_clone()?), events.clone());
    thread::spawn(move || events.send(Event::Control(control.recv())));
    Ok(())
}

/// What an end does when something is due.
pub trait Side {
    /// An interval is over.
    fn tick(&mut self, tick: &Tick);
    /// How much of the test is over, from 0 to 1, if that is known.
    fn progress(&mut self, part: f64);
    /// The measured time is over, the streams are not yet.
    fn stopped(&mut self) {}
    /// A connection that is none of the test's.
    fn stranger(&mut self, _: TcpStream) {}
}

/// An interval of a test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tick {
    /// Seconds since the start, or since the end of the warm-up.
    pub from: f64,
    pub to: f64,
    pub flows: Vec<Counts>,
    pub omitted: bool,
}

/// What one end found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    /// Of each connection, the warm-up left out.
    pub flows: Vec<[u64; 3]>,
    /// The same with it.
    pub all: Vec<[u64; 3]>,
    pub seconds: f64,
    pub cpu: Cpu,
    pub ways: Ways,
    pub error: Option<String>,
}

impl Found {
    pub fn flow(&self, i: usize) -> Counts {
        let [tx, rx, messages] = self.flows.get(i).copied().unwrap_or_default();
        Counts { tx, rx, messages }
    }

    pub fn sum(&self) -> Counts {
        (0..self.flows.len()).map(|i| self.flow(i)).fold(Counts::default(), Counts::plus)
    }
}

/// And what only the asking end has.
#[derive(Debug)]
pub struct Ended {
    pub found: Found,
    pub took: Histogram<u64>,
    pub interrupted: bool,
    /// Said by the other end in the middle, if that was not what ends a test.
    pub said: Option<State>,
    /// The control connection is at its end.
    pub gone: bool,
    /// The other end has asked for the end, or was asked.
    pub asked: bool,
}

/// When things are due.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Seconds between two reports, 0: none.
    pub interval: f64,
    /// Seconds that are measured, if this end has the clock.
    pub clock: Option<f64>,
    /// Whether progress is to be shown.
    pub progress: bool,
}

/// One end, running.
#[derive(Debug)]
pub struct Test {
    run: Arc<Run>,
    links: Vec<Arc<Link>>,
    counters: Vec<Arc<Counter>>,
    listener: Option<Arc<Listener>>,
    threads: usize,
    look: Look,
    cpu: Cpu,
    /// Start, then the end of the warm-up.
    base: Instant,
    base_counts: Vec<Counts>,
    last: Vec<Counts>,
    last_tick: f64,
    took: Histogram<u64>,
    ended: Option<Instant>,
    error: Option<Problem>,
}

/// What the connections of a test are.
#[derive(Debug)]
pub enum Ends {
    /// There already.
    Links(Vec<Link>),
    /// Made again and again.
    Dial(Dial),
    Listener(Arc<Listener>),
}

impl Test {
    /// Starts the threads. `look`: from before the connections were made.
    pub fn start(run: Run, ends: Ends, look: Look, cpu: Option<usize>, events: &Outbox) -> Self {
        let run = Arc::new(run);
        let (mut links, mut listener) = (Vec::new(), None);
        let counters = |n: usize| (0..n).map(|_| Arc::default()).collect::<Vec<Arc<Counter>>>();
        let parallel = run.spec.parallel as usize;
        let (counters, works): (Vec<Arc<Counter>>, Vec<Work>) = match ends {
            Ends::Links(all) => {
                links = all.into_iter().map(Arc::new).collect();
                let counters = counters(links.len());
                let flow = |i: usize| Flow::new(&run, i, Arc::clone(&links[i]), Arc::clone(&counters[i]));
                let works = shares(links.len(), run.spec.io, run.spec.threads)
                    .into_iter()
                    .map(|share| Work::Flows(share.into_iter().map(flow).collect()))
                    .collect();
                (counters, works)
            }
            Ends::Dial(dial) => {
                let counters = counters(parallel);
                let works = counters.iter().map(|c| Work::AskOnce(dial.clone(), Arc::clone(c))).collect();
                (counters, works)
            }
            Ends::Listener(l) => {
                let counters = counters(parallel);
                let works =
                    counters.iter().map(|c| Work::AnswerOnce(Arc::clone(&l), Arc::clone(c))).collect();
                listener = Some(l);
                (counters, works)
            }
        };
        let test = Self {
            look,
            cpu: Cpu::now(),
            base: Instant::now(),
            base_counts: vec![Counts::default(); counters.len()],
            last: vec![Counts::default(); counters.len()],
            last_tick: 0.0,
            took: histogram(),
            ended: None,
            error: None,
            threads: works.len(),
            run,
            links,
            counters,
            listener,
        };
        for work in works {
            let (run, events) = (Arc::clone(&test.run), events.clone());
            thread::spawn(move || events.send(Event::Done(work.run(run, cpu))));
        }
        test
    }

    fn counts(&self) -> Vec<Counts> {
        self.counters.iter().map(|c| c.read()).collect()
    }

    /// Waits for the end of all threads, and at the server for the client's word.
    pub fn conduct(mut self, events: &Inbox, side: &mut dyn Side, pace: Pace) -> Ended {
        let mut s = Going {
            warm: self.run.spec.omit > 0.0,
            ticks: 0,
            stopped: None,
            asked: false,
            gone: false,
            interrupted: false,
            said: None,
        };
        while !self.is_over(&s) {
            self.due(&mut s, side, pace);
            let limit = self.next(&s, pace).saturating_duration_since(Instant::now());
            if let Some(event) = events.recv(Some(limit)) {
                self.handle(event, &mut s, side);
            }
        }
        let to = self.base.elapsed().as_secs_f64();
        // With a time what is left is the rest of the streams only.
        let counted = self.run.spec.time.is_none() && !s.warm;
        if counted && pace.interval > 0.0 && to - self.last_tick > pace.interval * 0.1 {
            self.tick(to, false, side);
        }
        self.ended(s)
    }

    fn is_over(&self, s: &Going) -> bool {
        self.threads == 0 && (self.run.is_client || s.asked || s.gone || s.interrupted)
    }

    /// When to look again.
    fn next(&self, s: &Going, pace: Pace) -> Instant {
        let at = |seconds: f64| self.base + Duration::from_secs_f64(seconds);
        let mut next = Instant::now() + Duration::from_secs(1);
        if s.warm {
            next = next.min(at(self.run.spec.omit));
        }
        if pace.interval > 0.0 {
            next = next.min(at(pace.interval * (s.ticks + 1) as f64));
        }
        if let (Some(clock), false, None) = (pace.clock, s.warm, &s.stopped) {
            next = next.min(at(clock));
        }
        if pace.progress {
            next = next.min(Instant::now() + Duration::from_millis(100));
        }
        next
    }

    /// Does what is due by the clock.
    fn due(&mut self, s: &mut Going, side: &mut dyn Side, pace: Pace) {
        let mut now = self.base.elapsed().as_secs_f64();
        let omit = self.run.spec.omit;
        if pace.interval > 0.0 && s.stopped.is_none() && now >= pace.interval * (s.ticks + 1) as f64 {
            s.ticks = (now / pace.interval) as u64;
            self.tick(now, s.warm, side);
        }
        if s.warm && now >= omit {
            (s.warm, s.ticks, now) = (false, 0, 0.0);
            self.begin_to_measure();
        }
        if s.stopped.is_none() && !s.warm && pace.clock.is_some_and(|c| now >= c) {
            self.stop(s, side);
        }
        if pace.progress && s.stopped.is_none() {
            side.progress(self.part(s.warm, now, pace.clock));
        }
        self.look_for_the_stuck(s);
    }

    fn begin_to_measure(&mut self) {
        self.run.enter(Phase::Measure);
        self.base = Instant::now();
        self.cpu = Cpu::now();
        self.base_counts = self.counts();
        self.last = self.base_counts.clone();
        self.last_tick = 0.0;
    }

    fn part(&self, warm: bool, now: f64, clock: Option<f64>) -> f64 {
        if warm {
            return 0.0;
        }
        let sum = |f: fn(&Counts) -> u64| {
            self.counts().iter().zip(&self.base_counts).map(|(c, b)| f(&c.since(*b))).sum::<u64>() as f64
        };
        match (clock, self.run.spec.bytes, self.run.spec.blocks) {
            (Some(clock), ..) => now / clock,
            (_, Some(n), _) => sum(|c| c.tx.max(c.rx)) / n as f64,
            (_, _, Some(n)) => sum(|c| c.messages) / n as f64,
            _ => 0.0,
        }
    }

    fn tick(&mut self, to: f64, omitted: bool, side: &mut dyn Side) {
        let now = self.counts();
        let flows = now.iter().zip(&self.last).map(|(n, l)| n.since(*l)).collect();
        side.tick(&Tick { from: self.last_tick, to, flows, omitted });
        (self.last, self.last_tick) = (now, to);
    }

    fn stop(&mut self, s: &mut Going, side: &mut dyn Side) {
        if s.stopped.is_none() {
            s.stopped = Some((Instant::now(), self.counts()));
            self.run.enter(Phase::Stop);
            side.stopped();
        }
    }

    /// After the stop streams end as fast as the other end reads; one that does not go on is cut off.
    fn look_for_the_stuck(&mut self, s: &mut Going) {
        let Some((since, then)) = &s.stopped else { return };
        let now = self.counts();
        if now != *then {
            s.stopped = Some((Instant::now(), now));
        } else if since.elapsed() > PATIENCE {
            self.fail(Problem::new("the other end does not go on"));
            s.gone = true;
            self.cut();
        }
    }

    /// Wakes all threads: nothing more can be moved.
    fn cut(&self) {
        self.links.iter().for_each(|l| l.shutdown(Shutdown::Both));
        self.listener.iter().for_each(|l| l.close());
    }

    /// The first failure is the cause of the others.
    fn fail(&mut self, why: Problem) {
        self.error.get_or_insert(why);
    }

    fn handle(&mut self, event: Event, s: &mut Going, side: &mut dyn Side) {
        match event {
            Event::Done(outcome) => {
                self.threads -= 1;
                self.ended = self.ended.max(Some(outcome.ended));
                // Both were made alike.
                let _ = self.took.add(&outcome.took);
                if let Some(why) = outcome.error {
                    self.fail(why);
                    self.stop(s, side);
                    self.cut();
                }
            }
            Event::Control(Ok(State::TestEnd)) if !self.run.is_client => {
                s.asked = true;
                self.stop(s, side);
                self.listener.iter().for_each(|l| l.close());
                if !self.run.drain {
                    self.cut();
                }
            }
            // The server has got our TEST_END already.
            Event::Control(Ok(State::ExchangeResults)) if self.run.is_client => s.asked = true,
            Event::Control(said) => {
                match said {
                    Ok(state) => s.said = Some(state),
                    Err(why) => {
                        // A connection that broke says less than this.
                        self.error = Some(why);
                    }
                }
                s.gone = true;
                self.stop(s, side);
                self.cut();
            }
            Event::Signal => {
                s.interrupted = true;
                self.stop(s, side);
                if !self.run.is_client {
                    self.cut();
                }
            }
            Event::Arrived(stream, ..) => side.stranger(stream),
            Event::Link(_) | Event::Line(..) => {}
        }
    }

    fn ended(mut self, s: Going) -> Ended {
        let cpu = Cpu::now().since(self.cpu);
        let end = self.ended.unwrap_or_else(Instant::now);
        let seconds = end.saturating_duration_since(self.base).as_secs_f64().max(1e-9);
        let all = self.counts();
        let made = all.iter().map(|c| c.messages).sum();
        let n = if self.run.spec.kind == Kind::Crr { made } else { self.links.len() as u64 };
        let ways = self.look.after(self.run.spec.over, n);
        let array = |c: Counts| [c.tx, c.rx, c.messages];
        let found = Found {
            flows: all.iter().zip(&self.base_counts).map(|(a, b)| array(a.since(*b))).collect(),
            all: all.into_iter().map(array).collect(),
            seconds,
            cpu,
            ways,
            error: self.error.take().map(|p| p.to_string()),
        };
        let Going { interrupted, said, gone, asked, .. } = s;
        Ended { found, took: self.took, interrupted, said, gone, asked }
    }
}

/// Where a test is.
#[derive(Debug)]
struct Going {
    warm: bool,
    ticks: u64,
    /// Since when, or since when nothing has moved any more, and what was counted then.
    stopped: Option<(Instant, Vec<Counts>)>,
    asked: bool,
    gone: bool,
    interrupted: bool,
    said: Option<State>,
}

/// Whether all bytes that one end sent were read by the other; a sentence if not.
pub fn lost(spec: &Spec, client: &Found, server: &Found) -> Option<String> {
    // With a connection for each request each end counts by its own threads.
    if spec.kind == Kind::Crr {
        return None;
    }
    let pairs = client.all.iter().zip(&server.all).enumerate();
    for (i, (c, s)) in pairs {
        for (sent, got) in [(c[0], s[1]), (s[0], c[1])] {
            if sent != got {
                return Some(format!("connection {}: {sent} bytes were sent and {got} received", i + 1));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(all: [u64; 3]) -> Found {
        Found {
            flows: vec![all],
            all: vec![all],
            seconds: 1.0,
            cpu: Cpu::default(),
            ways: Ways::default(),
            error: None,
        }
    }

    #[test]
    fn lost_bytes_are_seen() {
        let spec = super::super::spec::example();
        assert_eq!(lost(&spec, &found([9, 0, 1]), &found([0, 9, 1])), None);
        assert!(lost(&spec, &found([9, 0, 1]), &found([0, 8, 1])).is_some_and(|e| e.contains("9 bytes")));
        assert!(lost(&spec, &found([9, 3, 1]), &found([4, 9, 1])).is_some());
    }
}
