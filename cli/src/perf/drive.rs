//! The threads of a test: one for each connection, or a few that wait in poll(2) or epoll_wait(2) for many.
//!
//! An event loop waits first and then moves one message, as programs do: a read that finds nothing is not part of
//! what is measured.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, epoll};

use super::flow::{Bench, Counter, Counts, Flow, Next, Phase, Run};
use super::link::{Dial, Link, Listener};
use super::spec::Io;
use super::wire::{Problem, Result};

/// What a thread leaves behind.
#[derive(Debug)]
pub struct Outcome {
    pub took: hdrhistogram::Histogram<u64>,
    pub ended: Instant,
    pub error: Option<Problem>,
}

/// The work of one thread.
#[derive(Debug)]
pub enum Work {
    /// Connections that are there.
    Flows(Vec<Flow>),
    /// A connection for each request, this end connects.
    AskOnce(Dial, Arc<Counter>),
    /// The same, this end accepts.
    AnswerOnce(Arc<Listener>, Arc<Counter>),
}

impl Work {
    /// Does it to its end, on that CPU if one is named.
    pub fn run(self, run: Arc<Run>, cpu: Option<usize>) -> Outcome {
        let io = run.spec.io;
        let mut b = Bench::new(run);
        let result = keep_to(cpu).and_then(|()| match self {
            Self::Flows(flows) => match io {
                Io::Blocking => blocking(flows, &mut b),
                Io::Poll => by_poll(flows, &mut b),
                Io::Epoll => by_epoll(flows, &mut b),
            }
            .map_err(|e| in_words(&e)),
            Self::AskOnce(dial, counter) => ask_once(&dial, &counter, &mut b),
            Self::AnswerOnce(listener, counter) => answer_once(&listener, &counter, &mut b),
        });
        Outcome { took: b.took, ended: Instant::now(), error: result.err() }
    }
}

/// Threads that a test takes, and which connections each has.
pub fn shares(connections: usize, io: Io, threads: u32) -> Vec<Vec<usize>> {
    let n = if io == Io::Blocking { connections } else { connections.min(threads as usize) };
    let mut all = vec![Vec::new(); n];
    (0..connections).for_each(|i| all[i % n].push(i));
    all
}

/// sched_setaffinity(2) of this thread.
pub fn keep_to(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(Problem::new(format!("-A: there is no CPU {cpu}")));
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| Problem::new(format!("-A: CPU {cpu}: {e}")))
}

fn in_words(e: &io::Error) -> Problem {
    Problem::new(match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
            "the other end closed a connection in the middle of the test".into()
        }
        _ => e.to_string(),
    })
}

fn blocking(flows: Vec<Flow>, b: &mut Bench) -> io::Result<()> {
    for mut flow in flows {
        while flow.whole_blocks(b)? != Next::Over && flow.step(b)? != Next::Over {}
    }
    Ok(())
}

fn by_poll(mut flows: Vec<Flow>, b: &mut Bench) -> io::Result<()> {
    let links: Vec<Arc<Link>> = flows.iter().map(|f| Arc::clone(&f.link)).collect();
    let mut set = Vec::with_capacity(flows.len());
    for (flow, link) in flows.iter().zip(&links) {
        link.nonblocking()?;
        set.push((flow.needs(), PollFd::new(&**link, flags(flow.needs()).1)));
    }
    // The list that poll gets, and whose each entry is; those that are over leave both.
    let mut whose: Vec<usize> = (0..flows.len()).collect();
    let (mut needs, mut fds): (Vec<Next>, Vec<PollFd<'_>>) = set.into_iter().unzip();
    while !fds.is_empty() {
        retried(|| rustix::event::poll(&mut fds, None))?;
        let mut i = 0;
        while i < fds.len() {
            if fds[i].revents().is_empty() {
                i += 1;
                continue;
            }
            let next = flows[whose[i]].step(b)?;
            if next == Next::Over {
                fds.swap_remove(i);
                needs.swap_remove(i);
                whose.swap_remove(i);
                continue;
            }
            if next != needs[i] {
                needs[i] = next;
                fds[i] = PollFd::new(&*links[whose[i]], flags(next).1);
            }
            i += 1;
        }
    }
    Ok(())
}

fn by_epoll(mut flows: Vec<Flow>, b: &mut Bench) -> io::Result<()> {
    const EVENTS: usize = 128;
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut needs = Vec::with_capacity(flows.len());
    for (i, flow) in flows.iter().enumerate() {
        flow.link.nonblocking()?;
        needs.push(flow.needs());
        epoll::add(&set, &*flow.link, epoll::EventData::new_u64(i as u64), flags(flow.needs()).0)?;
    }
    let mut left = flows.len();
    let mut events = Vec::with_capacity(EVENTS);
    while left > 0 {
        events.clear();
        retried(|| epoll::wait(&set, rustix::buffer::spare_capacity(&mut events), None))?;
        for event in &events {
            let data = event.data;
            let i = data.u64() as usize;
            let next = flows[i].step(b)?;
            if next == Next::Over {
                epoll::delete(&set, &*flows[i].link)?;
                left -= 1;
            } else if next != needs[i] {
                needs[i] = next;
                epoll::modify(&set, &*flows[i].link, data, flags(next).0)?;
            }
        }
    }
    Ok(())
}

/// What to ask the kernel for.
fn flags(needs: Next) -> (epoll::EventFlags, PollFlags) {
    match needs {
        Next::Write => (epoll::EventFlags::OUT, PollFlags::OUT),
        _ => (epoll::EventFlags::IN, PollFlags::IN),
    }
}

fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

fn ask_once(dial: &Dial, counter: &Counter, b: &mut Bench) -> Result<()> {
    let (spec, mut counts) = (b.run.spec.clone(), Counts::default());
    while !b.run.is(Phase::Stop) && b.run.take(spec.length) > 0 {
        let began = Instant::now();
        let link = dial.connect().map_err(|e| match e.kind() {
            io::ErrorKind::AddrNotAvailable => Problem::new(
                "no local port is free: too many connections are in TIME_WAIT (ip_local_port_range, tcp(7))",
            ),
            // It listened when the test began.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Problem::new(format!(
                "connection {}: {e}: the other end closed its port in the middle of the test",
                counts.messages + 1
            )),
            _ => Problem::new(format!("connection {}: {e}", counts.messages + 1)),
        })?;
        link.prepare(&spec)?;
        b.ask_once(&link).map_err(|e| in_words(&e))?;
        b.record(began.elapsed().as_nanos());
        counts = counts.plus(Counts { tx: spec.length as u64, rx: spec.response as u64, messages: 1 });
        counter.publish(counts);
    }
    Ok(())
}

/// Until the listener is closed. A client that goes away in the middle is its own affair.
fn answer_once(listener: &Listener, counter: &Counter, b: &mut Bench) -> Result<()> {
    use io::ErrorKind::{ConnectionAborted, Interrupted, InvalidInput, Other};
    let (spec, mut counts) = (b.run.spec.clone(), Counts::default());
    loop {
        let link = match listener.accept() {
            Ok(link) => link,
            Err(e) if e.kind() == InvalidInput || b.run.is(Phase::Stop) => return Ok(()),
            Err(e) if matches!(e.kind(), ConnectionAborted | Interrupted) => continue,
            Err(e) => return Err(Problem::new(format!("accept: {e}"))),
        };
        link.prepare(&spec)?;
        match b.answer_once(&link) {
            Ok(()) => {}
            // Damaged data.
            Err(e) if e.kind() == Other => return Err(in_words(&e)),
            Err(_) => continue,
        }
        counts = counts.plus(Counts { tx: spec.response as u64, rx: spec.length as u64, messages: 1 });
        counter.publish(counts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_shared_out_evenly() {
        assert_eq!(shares(3, Io::Blocking, 1), [vec![0], vec![1], vec![2]]);
        assert_eq!(shares(5, Io::Epoll, 2), [vec![0, 2, 4], vec![1, 3]]);
        assert_eq!(shares(1, Io::Poll, 8), [vec![0]]);
        assert!(shares(0, Io::Poll, 8).is_empty());
    }
}
