//! The end that asks for a test.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::events::{Event, Inbox};
use super::flow::Run;
use super::interop;
use super::link::{Dial, Link, Meeting};
use super::meter::Look;
use super::report::{Form, Report, Whole};
use super::signals::Interrupts;
use super::spec::{Direction, Kind, Spec, iperf3_id};
use super::test::{self, Ended, Ends, Found, Pace, Side, Test, Tick};
use super::wire::{self, Control, Cookie, Hello, PATIENCE, Problem, Redirect, Refusal, Result, State};

/// Whom to ask, and how to say what came of it.
#[derive(Debug, Clone)]
pub struct Target {
    pub host: String,
    pub port: u16,
    /// For a connection to be made.
    pub limit: Duration,
    /// CPU to keep to.
    pub cpu: Option<usize>,
    pub interval: f64,
    pub form: Form,
}

/// What came of a test.
#[derive(Debug)]
pub struct Done {
    pub mine: Found,
    pub other: Option<Found>,
    pub took: Histogram<u64>,
    pub interrupted: bool,
    pub error: Option<String>,
    /// With `-J`.
    pub document: Option<Value>,
}

impl Done {
    /// As a report has it.
    pub fn whole(&self) -> Whole<'_> {
        Whole {
            mine: &self.mine,
            other: self.other.as_ref(),
            took: &self.took,
            interrupted: self.interrupted,
            error: self.error.clone(),
        }
    }
}

/// A server that has agreed to a test.
#[derive(Debug)]
struct Session {
    control: Control,
    cookie: Cookie,
    /// `None`: a plain iperf3.
    hello: Option<Hello>,
    meeting: Meeting,
    port: u16,
}

/// Runs a test and reports it.
///
/// # Errors
/// If it did not begin.
pub fn run(spec: &Spec, target: &Target, interrupts: &Interrupts) -> Result<Done> {
    let session = agree(spec, target, target.port, true)?;
    let look = Look::before(spec.over, &session.control.0);
    let dial = Dial {
        server: session.control.0.peer_addr()?,
        over: spec.over,
        meeting: session.meeting.clone(),
        cookie: session.cookie,
        limit: target.limit,
    };
    let mut links = Vec::new();
    for _ in 0..spec.connections() {
        let link = dial.connect_or_say()?;
        link.prepare(spec)?;
        links.push(link);
    }
    for expected in [State::TestStart, State::TestRunning] {
        let state = session.control.recv()?;
        if state != expected {
            return Err(refused(&session, state));
        }
    }
    let mut report = Report::new(target.form, spec, true, start(&session, target, &links));
    report.say(&format!("Connected to {} port {}{}", target.host, session.port, described(&session)));
    let run = Run::new(spec, true, session.hello.is_some())?;
    let inbox = Inbox::new();
    let tx = inbox.next_test();
    test::listen(&session.control, &tx)?;
    interrupts.for_test(&tx);
    let ends = if spec.kind == Kind::Crr { Ends::Dial(dial) } else { Ends::Links(links) };
    let test = Test::start(run, ends, look, target.cpu, &tx);
    let pace = Pace { interval: target.interval, clock: spec.time, progress: report.wants_progress() };
    let mut side =
        Mine { report: &mut report, control: &session.control, tell: spec.direction != Direction::Forward };
    let ended = test.conduct(&inbox, &mut side, pace);
    let told = !side.tell && spec.direction != Direction::Forward;
    let mut done = finish(spec, &session, ended, told, &inbox);
    interrupts.for_nobody();
    done.document = report.end(&done.whole());
    Ok(done)
}

/// The client's part while the test runs.
struct Mine<'a> {
    report: &'a mut Report,
    control: &'a Control,
    /// A server that sends has to be told of the end, which has not been done.
    tell: bool,
}

impl Side for Mine<'_> {
    fn tick(&mut self, tick: &Tick) {
        self.report.tick(tick);
    }

    fn progress(&mut self, part: f64) {
        self.report.progress(part);
    }

    fn stopped(&mut self) {
        if self.tell {
            self.tell = false;
            // A connection that is broken is seen by who reads it.
            let _ = self.control.send(State::TestEnd);
        }
    }
}

/// Connects, and agrees on a test.
fn agree(spec: &Spec, target: &Target, port: u16, may_be_sent_on: bool) -> Result<Session> {
    let cookie = wire::cookie();
    let control = Control::connect(&target.host, port, &cookie, target.limit)?;
    let mut session = Session { control, cookie, hello: None, meeting: Meeting::Here, port };
    let mut state = session.control.recv()?;
    if state == State::Hello {
        let hello: Hello = session.control.recv_json()?;
        if hello.protocol != wire::VERSION {
            return Err(Problem::new(format!(
                "the server is smc perf {} with version {} of the protocol, this is {} with version {}; use the same at both ends",
                hello.version,
                hello.protocol,
                env!("CARGO_PKG_VERSION"),
                wire::VERSION
            )));
        }
        session.hello = Some(hello);
        state = session.control.recv()?;
    }
    if state != State::ParamExchange {
        return Err(refused(&session, state));
    }
    match &session.hello {
        Some(_) => session.control.send_json(spec)?,
        None => session.control.send_json(&spec.to_iperf3()?)?,
    }
    match session.control.recv()? {
        State::CreateStreams => {
            if session.hello.is_some() {
                session.meeting = session.control.recv_json()?;
            }
            Ok(session)
        }
        State::Redirect if may_be_sent_on => {
            let to: Redirect = session.control.recv_json()?;
            agree(spec, target, to.port, false)
        }
        state => Err(refused(&session, state)),
    }
}

/// Why there is no test.
fn refused(session: &Session, state: State) -> Problem {
    match state {
        State::AccessDenied => Problem::new("the server is busy with another test; try again later"),
        State::ServerTerminate => Problem::new("the server was ended"),
        State::ServerError if session.hello.is_some() => match session.control.recv_json::<Refusal>() {
            Ok(r) => Problem::new(format!("the server refuses: {}", r.error)),
            Err(e) => e,
        },
        State::ServerError => session.control.recv_iperf3_error(),
        other => Problem::new(format!("the server sent {other:?} where that makes no sense")),
    }
}

/// After the end of the streams: what the other end has found.
fn finish(spec: &Spec, session: &Session, ended: Ended, told: bool, events: &Inbox) -> Done {
    let mut error = ended.found.error.clone();
    let mut other = None;
    if ended.gone {
        if let Some(state) = ended.said {
            error = Some(refused(session, state).to_string());
        }
    } else {
        match exchange(spec, session, &ended, told, events) {
            Ok(found) => {
                let its = found.error.as_ref().map(|e| format!("the server: {e}"));
                error = match (error, its) {
                    (Some(mine), Some(its)) => Some(format!("{mine}; {its}")),
                    (mine, its) => mine.or(its),
                };
                if error.is_none() && session.hello.is_some() {
                    error = test::lost(spec, &ended.found, &found);
                }
                other = Some(found);
            }
            Err(why) => {
                error.get_or_insert(why.to_string());
            }
        }
    }
    Done { mine: ended.found, other, took: ended.took, interrupted: ended.interrupted, error, document: None }
}

fn exchange(spec: &Spec, session: &Session, ended: &Ended, told: bool, events: &Inbox) -> Result<Found> {
    let control = &session.control;
    if !told {
        control.send(State::TestEnd)?;
    }
    if !ended.asked {
        match awaited(events)? {
            State::ExchangeResults => {}
            state => return Err(refused(session, state)),
        }
    }
    control.patience(Some(PATIENCE))?;
    let found = if session.hello.is_some() {
        control.send_json(&ended.found)?;
        control.recv_json()?
    } else {
        control.send_json(&interop::told(spec, &ended.found, true))?;
        interop::understood(spec, &control.recv_json()?, &ended.found, true)?
    };
    control.recv()?;
    control.send(State::Done)?;
    Ok(found)
}

/// What the thread that listens hears.
fn awaited(events: &Inbox) -> Result<State> {
    let start = Instant::now();
    while let Some(left) = PATIENCE.checked_sub(start.elapsed()) {
        match events.recv(Some(left)) {
            Some(Event::Control(said)) => return said,
            Some(_) => {}
            None => break,
        }
    }
    Err(Problem::new("the server does not give its results"))
}

fn described(session: &Session) -> String {
    match &session.hello {
        None => " (a plain iperf3)".into(),
        Some(h) => format!(" (smc perf {}{})", h.version, if h.preloaded { ", under libsmc" } else { "" }),
    }
}

/// What iperf3's JSON begins with.
fn start(session: &Session, target: &Target, links: &[Link]) -> Value {
    let connected: Vec<_> = links
        .iter()
        .enumerate()
        .filter_map(|(i, l)| {
            let (local, peer) = l.addresses()?;
            Some(json!({
                "socket": iperf3_id(i),
                "local_host": local.ip().to_string(),
                "local_port": local.port(),
                "remote_host": peer.ip().to_string(),
                "remote_port": peer.port(),
            }))
        })
        .collect();
    let cookie = String::from_utf8_lossy(&session.cookie[..wire::COOKIE - 1]).into_owned();
    json!({
        "connected": connected,
        "connecting_to": { "host": target.host, "port": target.port },
        "cookie": cookie,
        "pid": std::process::id(),
        "server": session.hello,
    })
}
