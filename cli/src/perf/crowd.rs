//! `--processes`: each connection in a process of its own, at both ends.
//!
//! The client starts itself once for each connection, and each of these asks the server for a test of one connection
//! in a process of its own. What they tell, a line for each interval and one at the end, is put together here, so the
//! report is that of one test.

use std::collections::VecDeque;
use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::{self, Done, Target};
use super::events::{Event, Inbox};
use super::flow::histogram;
use super::meter::{Cpu, Ways};
use super::report::{Form, Report};
use super::signals::Interrupts;
use super::spec::Spec;
use super::test::{Found, Tick};
use super::wire::{Problem, Result};
use crate::output::emit;

/// What a process is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    pub spec: Spec,
    host: String,
    port: u16,
    limit_ms: u64,
    cpu: Option<usize>,
    interval: f64,
}

/// What it has found.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    mine: Found,
    other: Option<Found>,
    /// Values of the histogram, and how often each.
    took: Vec<(u64, u64)>,
    interrupted: bool,
    error: Option<String>,
}

/// A line of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    Tick(Tick),
    Done(Box<Value>),
}

type Value = serde_json::Value;

/// One of the processes: a test of one connection.
///
/// # Errors
/// If it did not begin.
pub fn work(order: Order) -> Result<bool> {
    // Whom it is for may be killed; then there is nobody to tell.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(std::io::Error::from)?;
    let target = Target {
        host: order.host,
        port: order.port,
        limit: Duration::from_millis(order.limit_ms),
        cpu: order.cpu,
        interval: order.interval,
        form: Form::Words,
    };
    let done = client::run(&order.spec, &target, &Interrupts::new()?)?;
    let told = Told {
        took: done.took.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect(),
        mine: done.mine,
        other: done.other,
        interrupted: done.interrupted,
        error: done.error,
    };
    let well = told.error.is_none();
    let told = serde_json::to_value(told).map_err(|e| Problem::new(e.to_string()))?;
    say(&Word::Done(Box::new(told)));
    Ok(well)
}

/// Tells whoever started this process.
pub fn say(word: &Word) {
    let line = serde_json::to_string(word).unwrap_or_default();
    emit(&format!("{line}\n"), std::process::ExitCode::SUCCESS);
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(order: &Order) -> Result<Self> {
        let text = serde_json::to_string(order).map_err(|e| Problem::new(e.to_string()))?;
        let child = Command::new(env::current_exe()?)
            .args(["perf", "__worker", &text])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Ctrl-C is for us; they are told once.
            .process_group(0)
            .spawn()?;
        Ok(Self(child))
    }

    fn interrupt(&self) {
        if let Some(pid) = Pid::from_raw(self.0.id().cast_signed()) {
            // It may be over.
            let _ = rustix::process::kill_process(pid, Signal::INT);
        }
    }
}

/// What of `-n` or `-k` the process with this number does.
fn share(all: Option<u64>, i: u64, n: u64) -> Option<u64> {
    all.map(|all| (all / n + u64::from(i < all % n)).max(1))
}

/// Runs a test with a process for each connection, and reports it.
///
/// # Errors
/// If it did not begin.
pub fn run(spec: &Spec, target: &Target, interrupts: &Interrupts) -> Result<Done> {
    let n = spec.parallel as usize;
    let inbox = Inbox::new();
    let events = inbox.next_test();
    let start = json!({
        "connecting_to": { "host": target.host, "port": target.port },
        "pid": std::process::id(),
        "processes": n,
    });
    let mut report = Report::new(target.form, spec, true, start);
    report.say(&format!("{n} processes, each with a connection to {} port {}", target.host, target.port));
    interrupts.for_test(&events);
    let mut running = Vec::new();
    for i in 0..n {
        let one = |all| share(all, i as u64, n as u64);
        let spec = Spec { parallel: 1, bytes: one(spec.bytes), blocks: one(spec.blocks), ..spec.clone() };
        let mut child = Running::start(&Order {
            spec,
            host: target.host.clone(),
            port: target.port,
            limit_ms: u64::try_from(target.limit.as_millis()).unwrap_or(u64::MAX),
            cpu: target.cpu,
            interval: target.interval,
        })?;
        let out = BufReader::new(child.0.stdout.take().expect("piped"));
        let events = events.clone();
        thread::spawn(move || {
            out.lines().map_while(std::io::Result::ok).all(|l| events.send(Event::Line(i, Some(l))));
            events.send(Event::Line(i, None));
        });
        running.push(child);
    }
    let told = listen(&inbox, &running, &mut report)?;
    interrupts.for_nobody();
    let mut done = together(told)?;
    done.document = report.end(&done.whole());
    Ok(done)
}

/// Until all have ended.
fn listen(inbox: &Inbox, running: &[Running], report: &mut Report) -> Result<Vec<Told>> {
    let mut ticks: Vec<VecDeque<Tick>> = running.iter().map(|_| VecDeque::new()).collect();
    let mut told = Vec::new();
    let mut left = running.len();
    while left > 0 {
        match inbox.recv(None) {
            Some(Event::Line(_, None)) => left -= 1,
            Some(Event::Line(i, Some(line))) => {
                let bad = |e: serde_json::Error| Problem::new(format!("process {}: {e}", i + 1));
                match serde_json::from_str(&line).map_err(bad)? {
                    Word::Tick(tick) => ticks[i].push_back(tick),
                    Word::Done(value) => told.push(serde_json::from_value(*value).map_err(bad)?),
                }
                while ticks.iter().all(|t| !t.is_empty()) {
                    let all: Vec<Tick> = ticks.iter_mut().filter_map(VecDeque::pop_front).collect();
                    report.tick(&one_tick(&all));
                }
            }
            Some(Event::Signal) => running.iter().for_each(Running::interrupt),
            _ => {}
        }
    }
    if told.len() < running.len() {
        // Each has said on standard error what kept it.
        return Err(Problem::new(format!(
            "{} of {} processes did not measure",
            running.len() - told.len(),
            running.len()
        )));
    }
    Ok(told)
}

/// Connections in the order of one test: first the first of each.
fn interleaved<T: Copy>(lists: &[Vec<T>]) -> Vec<T> {
    let most = lists.iter().map(Vec::len).max().unwrap_or(0);
    (0..most).flat_map(|k| lists.iter().filter_map(move |l| l.get(k).copied())).collect()
}

/// The first one's times; they began within a few milliseconds.
fn one_tick(all: &[Tick]) -> Tick {
    let flows: Vec<_> = all.iter().map(|t| t.flows.clone()).collect();
    let Tick { from, to, omitted, .. } = all[0];
    Tick { from, to, omitted, flows: interleaved(&flows) }
}

fn one_found(all: &[&Found]) -> Found {
    let lists =
        |f: fn(&Found) -> &Vec<[u64; 3]>| interleaved(&all.iter().map(|x| f(x).clone()).collect::<Vec<_>>());
    let mut ways = Ways { preloaded: all.iter().all(|f| f.ways.preloaded), ..Ways::default() };
    all.iter().for_each(|f| ways.add(&f.ways));
    let cpu = all.iter().fold(Cpu::default(), |sum, f| sum.plus(f.cpu));
    Found {
        flows: lists(|f| &f.flows),
        all: lists(|f| &f.all),
        seconds: all.iter().map(|f| f.seconds).fold(0.0, f64::max),
        cpu,
        ways,
        error: all.iter().find_map(|f| f.error.clone()),
    }
}

fn together(told: Vec<Told>) -> Result<Done> {
    let mut took = histogram();
    for (value, n) in told.iter().flat_map(|t| &t.took) {
        took.record_n(*value, *n).map_err(|e| Problem::new(format!("a process's histogram: {e}")))?;
    }
    let others: Option<Vec<&Found>> = told.iter().map(|t| t.other.as_ref()).collect();
    Ok(Done {
        mine: one_found(&told.iter().map(|t| &t.mine).collect::<Vec<_>>()),
        other: others.map(|o| one_found(&o)),
        took,
        interrupted: told.iter().any(|t| t.interrupted),
        error: told.iter().find_map(|t| t.error.clone()),
        document: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_shared_out() {
        let shares: u64 = (0..3).filter_map(|i| share(Some(10), i, 3)).sum();
        assert_eq!((shares, share(None, 0, 3)), (10, None));
    }

    #[test]
    fn what_processes_found_is_put_together_as_one_test() {
        let one = |sent: u64, got: u64| {
            let found = |flows: Vec<[u64; 3]>| Found {
                all: flows.clone(),
                flows,
                seconds: 1.0,
                cpu: Cpu { total: 0.5, user: 0.25, system: 0.25 },
                ways: Ways { connections: [("SHM".to_owned(), 2)].into(), slept: 1, ..Ways::default() },
                error: None,
            };
            Told {
                mine: found(vec![[sent, 0, 1], [0, got, 1]]),
                other: Some(found(vec![[0, sent, 1], [got, 0, 1]])),
                took: vec![(1000, 2)],
                interrupted: false,
                error: None,
            }
        };
        let done = together(vec![one(1, 2), one(3, 4)]).expect("histograms are alike");
        assert_eq!(done.mine.flows, [[1, 0, 1], [3, 0, 1], [0, 2, 1], [0, 4, 1]]);
        assert_eq!((done.mine.cpu.total, done.took.len()), (1.0, 4));
        let ways = &done.other.expect("both told").ways;
        assert_eq!((ways.connections["SHM"], ways.slept), (4, 2));
    }
}
