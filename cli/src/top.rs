//! `smc top`: what the connections do now, in lines that are drawn again every second.
//!
//! All of it is differences between two looks at the counters that `smc ss` shows; nothing is asked of the programs.
//! On a terminal it takes the whole screen and listens to keys; otherwise it writes one frame below the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Read, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use signal_hook::consts::{SIGHUP, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use smc::stats::{ConnectionInfo, Mode};

use crate::output::{aligned, coloured, complain, emit, human, shortened, wants_colours};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Seconds between two frames
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = delay)]
    delay: f64,
    /// Frames, then end
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    frames: Option<u64>,
    /// Frames below one another, without keys or colours, as if not on a terminal
    #[arg(short, long)]
    batch: bool,
    /// One frame of that kind
    #[arg(long, conflicts_with = "frames")]
    once: bool,
    /// Also those on TCP
    #[arg(short, long)]
    all: bool,
}

fn delay(text: &str) -> Result<f64, String> {
    let n: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.1..=3600.0).contains(&n) { Ok(n) } else { Err("from 0.1 to 3600 seconds".into()) }
}

type Key = (u32, Option<SocketAddr>, Option<SocketAddr>);

/// A look at all connections.
struct Look {
    at: Instant,
    connections: BTreeMap<Key, ConnectionInfo>,
}

impl Look {
    fn now() -> io::Result<Self> {
        let all = smc::stats::connections()?.into_iter().filter(|c| !c.stale);
        Ok(Self { at: Instant::now(), connections: all.map(|c| ((c.pid, c.local, c.peer), c)).collect() })
    }
}

/// What one connection did in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Rates {
    tx: f64,
    rx: f64,
    messages: f64,
    polls: f64,
    sleeps: f64,
    bells: f64,
}

impl Rates {
    /// One that was not there before has done in that time all that it has.
    fn between(before: Option<&ConnectionInfo>, now: &ConnectionInfo, seconds: f64) -> Self {
        let rate = |f: fn(&ConnectionInfo) -> u64| {
            let more = f(now).saturating_sub(before.map_or(0, f));
            if seconds > 0.0 { more as f64 / seconds } else { 0.0 }
        };
        Self {
            tx: rate(ConnectionInfo::tx_bytes),
            rx: rate(ConnectionInfo::rx_bytes),
            messages: rate(|c| c.tx_msgs.saturating_add(c.rx_msgs)),
            polls: rate(|c| c.polls),
            sleeps: rate(|c| c.sleeps),
            bells: rate(|c| c.doorbells),
        }
    }

    fn plus(self, o: Self) -> Self {
        Self {
            tx: self.tx + o.tx,
            rx: self.rx + o.rx,
            messages: self.messages + o.messages,
            polls: self.polls + o.polls,
            sleeps: self.sleeps + o.sleeps,
            bells: self.bells + o.bells,
        }
    }
}

/// How much room there is.
#[derive(Debug, Clone, Copy)]
struct Room {
    columns: usize,
    /// `None`: as many lines as it takes.
    lines: Option<usize>,
}

/// A number a second in at most five characters, by thousands.
fn rate(n: f64) -> String {
    let mut value = n;
    for unit in ["", "k", "M", "G"] {
        if value < 999.5 {
            let digits = usize::from(value < 9.95 && (value > 0.0 || !unit.is_empty()));
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.0}T")
}

fn bytes(n: f64) -> String {
    human(n as u64)
}

/// A frame: sums, then the connections, the busiest first.
fn frame(before: &Look, now: &Look, all: bool, room: Room) -> Vec<String> {
    let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
    let mut rows: Vec<(&ConnectionInfo, Rates)> = now
        .connections
        .iter()
        .map(|(key, c)| (c, Rates::between(before.connections.get(key), c, seconds)))
        .collect();
    rows.sort_by(|(_, a), (_, b)| {
        let weight = |r: &Rates| (r.tx + r.rx, r.messages);
        weight(b).partial_cmp(&weight(a)).unwrap_or(std::cmp::Ordering::Equal)
    });
    let sum = rows.iter().map(|(_, r)| *r).fold(Rates::default(), Rates::plus);
    let upgraded = rows.iter().filter(|(c, _)| c.mode() != Mode::Tcp).count();
    let mut pids: Vec<u32> = rows.iter().map(|(c, _)| c.pid).collect();
    pids.sort_unstable();
    pids.dedup();
    let mut out = vec![
        format!(
            "{} processes, {} connection ends: {upgraded} upgraded, {} on TCP",
            pids.len(),
            rows.len(),
            rows.len() - upgraded
        ),
        format!(
            "a second: {} sent, {} received; {} messages, {} polls, {} sleeps, {} doorbells",
            bytes(sum.tx),
            bytes(sum.rx),
            rate(sum.messages),
            rate(sum.polls),
            rate(sum.sleeps),
            rate(sum.bells)
        ),
        String::new(),
    ];
    rows.retain(|(c, _)| all || c.mode() != Mode::Tcp);
    let shown = room.lines.map_or(rows.len(), |n| n.saturating_sub(out.len() + 1));
    rows.truncate(shown);
    out.extend(table(&rows, room.columns));
    for line in &mut out {
        *line = line.chars().take(room.columns).collect();
    }
    out
}

fn table(rows: &[(&ConnectionInfo, Rates)], columns: usize) -> Vec<String> {
    const HEAD: [&str; 10] =
        ["MODE", "PID", "PROGRAM", "PEER", "SENT/s", "RCVD/s", "MSG/s", "POLL/s", "SLEEP/s", "BELL/s"];
    // What the others leave of 80 columns goes to the address.
    let peer = columns.saturating_sub(80) + 16;
    let mut cells = vec![HEAD.map(String::from).to_vec()];
    cells.extend(rows.iter().map(|(c, r)| {
        vec![
            c.mode().name().into(),
            c.pid.to_string(),
            shortened(&c.program, 9),
            shortened(&c.peer.map_or_else(|| "-".into(), |a| a.to_string()), peer),
            bytes(r.tx),
            bytes(r.rx),
            rate(r.messages),
            rate(r.polls),
            rate(r.sleeps),
            rate(r.bells),
        ]
    }));
    aligned(&cells, &[1, 4, 5, 6, 7, 8, 9])
}

/// What comes between two frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Quit,
    /// The key `a`.
    All,
    /// The window has another size, or a key that means nothing.
    Redraw,
}

/// The terminal as it was, again, when dropped.
struct Screen(Termios);

impl Screen {
    /// Takes the whole screen: keys come one by one and are not shown, Ctrl-C is a key.
    fn take() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        let screen = Self(before);
        io::stdout().write_all(b"\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }

    fn draw(lines: &[String]) -> io::Result<()> {
        let mut text = String::from("\x1b[H");
        let colours = wants_colours();
        for line in lines {
            let _ = write!(text, "{}\x1b[K\r\n", if colours { coloured(line) } else { line.clone() });
        }
        text += "\x1b[J";
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = io::stdout().write_all(b"\x1b[?25h\x1b[?1049l").and_then(|()| io::stdout().flush());
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Keys and signals, each read by a thread of its own.
fn wishes() -> io::Result<Receiver<Wish>> {
    const CTRL_C: u8 = 3;
    let (to, from): (Sender<Wish>, _) = mpsc::channel();
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGWINCH])?;
    let signalled = to.clone();
    thread::spawn(move || {
        signals
            .forever()
            .map(|s| if s == SIGWINCH { Wish::Redraw } else { Wish::Quit })
            .take_while(|w| signalled.send(*w).is_ok())
            .for_each(drop);
    });
    thread::spawn(move || {
        let mut key = [0];
        while let Ok(1) = io::stdin().read(&mut key) {
            let wish = match key[0] {
                b'q' | b'Q' | CTRL_C => Wish::Quit,
                b'a' => Wish::All,
                _ => Wish::Redraw,
            };
            if to.send(wish).is_err() {
                return;
            }
        }
        // No more keys: the terminal is gone.
        let _ = to.send(Wish::Quit);
    });
    Ok(from)
}

fn room() -> Room {
    let size = termios::tcgetwinsize(io::stdout()).ok().filter(|s| s.ws_col > 0 && s.ws_row > 0);
    let (columns, lines) = size.map_or((80, 24), |s| (s.ws_col.into(), s.ws_row.into()));
    // The last line would scroll.
    Room { columns, lines: Some(usize::saturating_sub(lines, 1)) }
}

/// Looks, waits, looks again.
pub fn run(options: &Options) -> ExitCode {
    let on_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    let result = if options.batch || options.once || !on_terminal { batch(options) } else { live(options) };
    match result {
        Ok(code) => code,
        Err(e) => {
            complain(&e);
            ExitCode::FAILURE
        }
    }
}

fn batch(options: &Options) -> io::Result<ExitCode> {
    let frames = if options.once { Some(1) } else { options.frames };
    let mut before = Look::now()?;
    let mut n = 0;
    while frames.is_none_or(|f| n < f) {
        thread::sleep(Duration::from_secs_f64(options.delay));
        let now = Look::now()?;
        let lines = frame(&before, &now, options.all, Room { columns: 80, lines: None });
        let gap = if n == 0 { "" } else { "\n" };
        // A reader that has gone ends it, without a word.
        let mut out = io::stdout().lock();
        let text = format!("{gap}{}\n", lines.join("\n"));
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            other => other?,
        }
        before = now;
        n += 1;
    }
    Ok(ExitCode::SUCCESS)
}

fn live(options: &Options) -> io::Result<ExitCode> {
    let wishes = wishes()?;
    let screen = Screen::take()?;
    let (mut before, mut all) = (Look::now()?, options.all);
    let mut now = Look::now()?;
    let mut n = 0;
    Screen::draw(&["looking … (q quits, a shows those on TCP as well)".into()])?;
    'frames: while options.frames.is_none_or(|f| n < f) {
        let next = Instant::now() + Duration::from_secs_f64(options.delay);
        loop {
            match wishes.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Wish::Quit) | Err(RecvTimeoutError::Disconnected) => break 'frames,
                Ok(Wish::All) => all = !all,
                Ok(Wish::Redraw) => {}
                Err(RecvTimeoutError::Timeout) => break,
            }
            if n > 0 {
                Screen::draw(&frame(&before, &now, all, room()))?;
            }
        }
        let look = Look::now()?;
        before = std::mem::replace(&mut now, look);
        Screen::draw(&frame(&before, &now, all, room()))?;
        n += 1;
    }
    drop(screen);
    Ok(emit("", ExitCode::SUCCESS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ss::tests::connection;

    fn look(at: Instant, connections: Vec<ConnectionInfo>) -> Look {
        Look { at, connections: connections.into_iter().map(|c| ((c.pid, c.local, c.peer), c)).collect() }
    }

    fn two_looks() -> (Look, Look) {
        let start = Instant::now();
        let (mut quiet, mut busy) = (connection("127.0.0.1:1"), connection("127.0.0.1:2"));
        (quiet.tx_bytes_ring, busy.tx_bytes_ring) = (1000, 0);
        let before = look(start, vec![quiet.clone(), busy.clone()]);
        (busy.tx_bytes_ring, busy.sleeps) = (4 << 20, 21);
        let mut plain = connection("127.0.0.1:3");
        (plain.mode_tx, plain.mode_rx) = (Mode::Tcp, Mode::Tcp);
        (before, look(start + Duration::from_secs(2), vec![quiet, busy, plain]))
    }

    #[test]
    fn rates_are_differences_and_the_busiest_comes_first() {
        let (before, now) = two_looks();
        let lines = frame(&before, &now, false, Room { columns: 80, lines: None });
        assert!(lines[0].contains("1 processes, 3 connection ends: 2 upgraded, 1 on TCP"), "{lines:?}");
        let at = |text: &str| lines.iter().position(|l| l.contains(text));
        assert!(at(":2").is_some() && at(":2") < at(":1 "), "{lines:?}");
        assert!(at(":2").is_some_and(|i| lines[i].contains("2.0M") && lines[i].contains("10")), "{lines:?}");
        assert_eq!(at(":3"), None);
        let all = frame(&before, &now, true, Room { columns: 80, lines: None });
        assert!(all.iter().any(|l| l.starts_with("TCP") && l.contains(":3")), "{all:?}");
    }

    #[test]
    fn a_frame_has_no_more_lines_and_columns_than_there_is_room_for() {
        let (before, now) = two_looks();
        for (columns, lines) in [(80, 5), (40, 4), (200, 50), (1, 1)] {
            let out = frame(&before, &now, true, Room { columns, lines: Some(lines) });
            assert!(out.len() <= lines.max(4), "{out:?}");
            assert!(out.iter().all(|l| l.chars().count() <= columns), "{out:?}");
        }
        let v6 = connection("[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535");
        let now = look(now.at, vec![v6]);
        let out = frame(&before, &now, true, Room { columns: 500, lines: None });
        let widest = out.iter().map(|l| l.chars().count()).max();
        let narrow = frame(&before, &now, true, Room { columns: 80, lines: None });
        assert!(widest > Some(80) && narrow.iter().all(|l| l.contains("65535") || l.chars().count() <= 80));
    }

    #[test]
    fn numbers_stay_short() {
        for n in [0.0, 0.4, 9.94, 9.96, 999.4, 999.6, 1e6, 1e9, 9.99e14] {
            assert!(rate(n).len() <= 5, "{n}: {}", rate(n));
        }
        assert_eq!((rate(0.0).as_str(), rate(1500.0).as_str()), ("0", "1.5k"));
    }
}
