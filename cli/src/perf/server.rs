//! The end that waits to be asked: one test after another, each of a client of ours or a plain iperf3.

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io};

use serde_json::{Value, json};

use super::events::{Event, Inbox, Outbox};
use super::flow::Run;
use super::interop;
use super::link::{Link, Listener, Meeting};
use super::meter::{self, Look};
use super::report::{Form, Report, Whole};
use super::signals::{INTERRUPTED, Interrupts};
use super::spec::{Kind, Over, Spec};
use super::test::{self, Ended, Ends, Found, Pace, Side, Test, Tick};
use super::wire::{
    self, COOKIE, Control, Cookie, Hello, PATIENCE, Problem, Redirect, Refusal, Result, State,
};
use crate::output::{complain, emit};

/// As the command line has it.
#[derive(Debug, Clone)]
pub struct Settings {
    pub bind: Option<IpAddr>,
    pub port: u16,
    pub one_off: bool,
    /// End if no client comes for so long.
    pub idle: Option<Duration>,
    pub interval: f64,
    pub form: Form,
    pub cpu: Option<usize>,
    /// Print the port and nothing else.
    pub announce: bool,
}

struct Server {
    settings: Settings,
    ip: IpAddr,
    preloaded: bool,
    inbox: Inbox,
    interrupts: Interrupts,
}

/// How a session came to its end.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Measured, or the client was sent elsewhere.
    Well,
    Interrupted,
}

/// Serves until it is ended.
///
/// # Errors
/// If it can't listen.
pub fn run(settings: Settings) -> Result<ExitCode> {
    let listener = bind(&settings)?;
    let address = listener.local_addr()?;
    let inbox = Inbox::new();
    let to = inbox.for_all();
    thread::spawn(move || accept(&listener, &to));
    if settings.announce {
        emit(&format!("{}\n", address.port()), ExitCode::SUCCESS);
    } else if settings.form == Form::Text {
        emit(&format!("Server listening on {}\n", address.port()), ExitCode::SUCCESS);
    }
    let server = Server {
        preloaded: meter::preloaded(),
        ip: address.ip(),
        inbox,
        interrupts: Interrupts::new()?,
        settings,
    };
    server.serve()
}

fn bind(settings: &Settings) -> Result<TcpListener> {
    let port = settings.port;
    let places = settings.bind.map_or_else(
        // ipv6(7): `::` takes IPv4 as well; where there is no IPv6, IPv4 alone.
        || vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
        |ip| vec![ip],
    );
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for ip in places {
        match TcpListener::bind((ip, port)) {
            Ok(l) => return Ok(l),
            Err(e) => last = e,
        }
    }
    let hint = if last.kind() == io::ErrorKind::AddrInUse { "; choose another with -p" } else { "" };
    Err(Problem::new(format!("port {port}: {last}{hint}")))
}

/// Takes connections and reads their cookies, each in a thread of its own: a slow one holds up nobody.
fn accept(listener: &TcpListener, events: &Outbox) {
    for (stream, n) in listener.incoming().zip(0..) {
        match stream {
            Ok(stream) => {
                let events = events.clone();
                thread::spawn(move || {
                    if let Some(cookie) = read_cookie(&stream) {
                        events.send(Event::Arrived(stream, cookie, n));
                    }
                });
            }
            Err(e) => {
                complain(&format_args!("accept: {e}"));
                // Out of descriptors, perhaps; to ask again at once would give the same answer.
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// `None`: it is not one of ours; whoever it is is left alone.
fn read_cookie(mut stream: &TcpStream) -> Option<Cookie> {
    let mut cookie = [0; COOKIE];
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.read_exact(&mut cookie).ok()?;
    stream.set_read_timeout(None).ok()?;
    Some(cookie)
}

/// A connection that comes at a bad time.
fn deny(stream: TcpStream) {
    if let Ok(control) = Control::new(stream) {
        // It may be gone.
        let _ = control.send(State::AccessDenied);
    }
}

impl Server {
    fn serve(&self) -> Result<ExitCode> {
        loop {
            let (stream, cookie) = match self.inbox.recv(self.settings.idle) {
                Some(Event::Arrived(stream, cookie, _)) => (stream, cookie),
                // What is left of the test before.
                Some(_) => continue,
                None => return Err(Problem::new("no client came")),
            };
            let result = self.session(stream, cookie);
            self.interrupts.for_nobody();
            match &result {
                Ok(Outcome::Interrupted) => return Ok(ExitCode::from(INTERRUPTED)),
                Ok(Outcome::Well) => {}
                Err(why) => complain(why),
            }
            if self.settings.one_off {
                return Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
        }
    }

    /// One client.
    fn session(&self, stream: TcpStream, cookie: Cookie) -> Result<Outcome> {
        let peer = stream.peer_addr()?;
        let control = Control::new(stream)?;
        let ours = wire::version(&cookie).is_some();
        if ours {
            control.send(State::Hello)?;
            control.send_json(&Hello {
                protocol: wire::VERSION,
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
                preloaded: self.preloaded,
            })?;
            if wire::version(&cookie) != Some(wire::VERSION) {
                return Err(Problem::new(format!("{peer}: a client with another version of the protocol")));
            }
        }
        control.send(State::ParamExchange)?;
        let spec = match self.parameters(&control, ours) {
            Ok(spec) => spec,
            Err(why) => return refuse(&control, ours, &why),
        };
        let unlike = spec.over == Over::Preload && !self.preloaded;
        // One that was started for a client is that client's.
        if ours && (unlike || spec.own_process && !self.settings.announce) {
            return match another(&control, spec.over) {
                Ok(port) => {
                    control.send(State::Redirect)?;
                    control.send_json(&Redirect { port })?;
                    Ok(Outcome::Well)
                }
                Err(why) => refuse(&control, ours, &why),
            };
        }
        self.test(&control, &cookie, spec, ours)
    }

    fn parameters(&self, control: &Control, ours: bool) -> Result<Spec> {
        let spec =
            if ours { control.recv_json()? } else { Spec::from_iperf3(&control.recv_json::<Value>()?)? };
        spec.check()?;
        Ok(spec)
    }

    fn test(&self, control: &Control, cookie: &Cookie, spec: Spec, ours: bool) -> Result<Outcome> {
        let bind = match self.ip {
            ip if ip.is_unspecified() => control.0.local_addr()?.ip(),
            ip => ip,
        };
        let (listener, meeting) = match Listener::new(&spec, bind, cookie) {
            Ok(Some((l, m))) => (Some(Arc::new(l)), m),
            Ok(None) => (None, Meeting::Here),
            Err(why) => return refuse(control, ours, &why),
        };
        let look = Look::before(spec.over, &control.0);
        control.send(State::CreateStreams)?;
        if ours {
            control.send_json(&meeting)?;
        }
        let events = self.inbox.next_test();
        self.interrupts.for_test(&events);
        test::listen(control, &events)?;
        let links = self.collect(&spec, cookie, listener.as_ref(), &events)?;
        control.send(State::TestStart)?;
        let mut report = Report::new(self.settings.form, &spec, false, start(control, cookie, ours));
        report.say(&format!("Accepted connection from {}", control.0.peer_addr()?));
        let run = Run::new(&spec, false, ours)?;
        let ends = match listener {
            Some(l) if spec.kind == Kind::Crr => Ends::Listener(l),
            _ => Ends::Links(links),
        };
        let test = Test::start(run, ends, look, spec.server_cpu.or(self.settings.cpu), &events);
        control.send(State::TestRunning)?;
        let pace = Pace { interval: self.settings.interval, clock: None, progress: false };
        let ended = test.conduct(&self.inbox, &mut Mine(&mut report), pace);
        self.finish(control, &spec, ours, &ended, &mut report)
    }

    /// Waits for the connections of the test.
    fn collect(
        &self,
        spec: &Spec,
        cookie: &Cookie,
        listener: Option<&Arc<Listener>>,
        events: &Outbox,
    ) -> Result<Vec<Link>> {
        let wanted = spec.connections();
        if let Some(l) = listener.filter(|_| wanted > 0) {
            let (l, events) = (Arc::clone(l), events.clone());
            thread::spawn(move || {
                for link in (0..wanted).map_while(|_| l.accept().ok()) {
                    events.send(Event::Link(link));
                }
            });
        }
        let result = self.collected(spec, cookie, wanted);
        if result.is_err() {
            listener.iter().for_each(|l| l.close());
        }
        result
    }

    fn collected(&self, spec: &Spec, cookie: &Cookie, wanted: usize) -> Result<Vec<Link>> {
        let (start, mut links) = (Instant::now(), Vec::new());
        while links.len() < wanted {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let link = match self.inbox.recv(Some(left)) {
                Some(Event::Arrived(stream, shown, n)) if shown == *cookie => (n, Link::Tcp(stream)),
                Some(Event::Arrived(stream, ..)) => {
                    deny(stream);
                    continue;
                }
                Some(Event::Link(link)) => (links.len() as u64, link),
                Some(Event::Control(Err(_))) => {
                    return Err(Problem::new("the client went away before the test"));
                }
                Some(Event::Control(Ok(state))) => {
                    return Err(Problem::new(format!("the client sent {state:?} before the test")));
                }
                Some(Event::Signal) => return Err(Problem::new("interrupted before the test")),
                Some(Event::Done(_) | Event::Line(..)) => continue,
                None => {
                    return Err(Problem::new(format!("{} of {wanted} connections came", links.len())));
                }
            };
            link.1.prepare(spec)?;
            links.push(link);
        }
        // The client made them one by one, and knows them by that order; their cookies were read in any.
        links.sort_by_key(|(n, _)| *n);
        Ok(links.into_iter().map(|(_, link)| link).collect())
    }

    fn finish(
        &self,
        control: &Control,
        spec: &Spec,
        ours: bool,
        ended: &Ended,
        report: &mut Report,
    ) -> Result<Outcome> {
        let other = if ended.interrupted || ended.gone {
            // It may be gone, too.
            let _ = control.send(State::ServerTerminate);
            Ok(None)
        } else {
            exchange(control, spec, ours, ended).map(Some)
        };
        let said = ended.said.map(|s| match s {
            State::ClientTerminate => "the client was ended".to_owned(),
            s => format!("the client sent {s:?} in the middle of the test"),
        });
        let mut error = ended.found.error.clone().or(said);
        if let Err(why) = &other {
            error.get_or_insert(why.to_string());
        }
        let other = other.ok().flatten();
        let document = report.end(&Whole {
            mine: &ended.found,
            other: other.as_ref(),
            took: &ended.took,
            interrupted: ended.interrupted,
            error: error.clone(),
        });
        if let Some(document) = document {
            emit(&format!("{document:#}\n"), ExitCode::SUCCESS);
        }
        match (ended.interrupted, error) {
            (true, _) => Ok(Outcome::Interrupted),
            // The report has said it; who asked for nothing else hears it here.
            (_, Some(why)) if self.settings.form == Form::Silent => Err(Problem::new(why)),
            _ => Ok(Outcome::Well),
        }
    }
}

/// Starts a server of its own for one client; its port.
fn another(control: &Control, over: Over) -> Result<u16> {
    const PATIENCE_SECONDS: &str = "30";
    let ip = control.0.local_addr()?.ip().to_canonical().to_string();
    let mut child = Command::new(env::current_exe()?)
        .args(["perf", "server", "-1", "-p", "0", "--over", over.name(), "--announce"])
        .args(["--idle-timeout", PATIENCE_SECONDS, "-B", &ip])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line)?;
    }
    let mut errors = child.stderr.take();
    let port = line.trim().parse().map_err(|_| {
        let mut said = String::new();
        // It has ended, or is killed below.
        let _ = child.kill();
        let _ = errors.as_mut().map(|e| e.read_to_string(&mut said));
        Problem::new(said.trim().trim_start_matches("smc: ").to_owned())
    });
    // It ends by itself, with its test or for want of a client.
    thread::spawn(move || {
        let mut said = String::new();
        let _ = errors.as_mut().map(|e| e.read_to_string(&mut said));
        let _ = child.wait();
        said.lines().for_each(|l| complain(&l.trim_start_matches("smc: ")));
    });
    port
}

/// The server's part while the test runs.
struct Mine<'a>(&'a mut Report);

impl Side for Mine<'_> {
    fn tick(&mut self, tick: &Tick) {
        self.0.tick(tick);
    }

    fn progress(&mut self, _: f64) {}

    fn stranger(&mut self, stream: TcpStream) {
        deny(stream);
    }
}

fn refuse(control: &Control, ours: bool, why: &Problem) -> Result<Outcome> {
    if ours {
        control.send(State::ServerError)?;
        control.send_json(&Refusal { error: why.to_string() })?;
    } else {
        control.send_iperf3_error()?;
    }
    Err(why.clone())
}

fn exchange(control: &Control, spec: &Spec, ours: bool, ended: &Ended) -> Result<Found> {
    control.patience(Some(PATIENCE))?;
    control.send(State::ExchangeResults)?;
    let found = if ours {
        let found = control.recv_json()?;
        control.send_json(&ended.found)?;
        found
    } else {
        let its: Value = control.recv_json()?;
        control.send_json(&interop::told(spec, &ended.found, false))?;
        interop::understood(spec, &its, &ended.found, false)?
    };
    control.send(State::DisplayResults)?;
    // A client that closes without a word has got its results all the same.
    let _ = control.recv();
    Ok(found)
}

fn start(control: &Control, cookie: &Cookie, ours: bool) -> Value {
    let peer = control.0.peer_addr().map(|a| json!({ "host": a.ip().to_string(), "port": a.port() }));
    json!({
        "accepted_connection": peer.unwrap_or(Value::Null),
        "cookie": String::from_utf8_lossy(&cookie[..COOKIE - 1]),
        "pid": std::process::id(),
        "client": if ours { "smc perf" } else { "iperf3" },
    })
}
