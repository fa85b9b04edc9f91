//! The differential suite: what a program sees of a socket is the same on plain TCP and under the preload.
//!
//! Each scenario is a function that drives one end of a connection (or several), with an agent at the other, and
//! prints a transcript: results, errnos, bytes, readiness. This executable is both the runner and the helper it
//! runs: `--scenario NAME PLACE` prints one transcript, and without that the runner compares transcripts of
//! plain TCP with those under `LD_PRELOAD`: eager, lazy, with a tiny ring, and with downgrades forced at any
//! moment; with the peer in a thread and in a process of its own.
//!
//! What TCP itself leaves open (how much one read gives) does not go into a transcript.
//!
//!     cargo test --test sockets epoll_edge         all scenarios with this in their name
//!     SMC_LIB=none cargo test --test sockets       no preload: are the transcripts deterministic?
//!     SMC_MODE=forced SMC_SEED=1 cargo test …      one mode only; downgrades at other moments
//!
//! To add one: a function `fn name(w: &World)` and a line `s!(name)` in the table of its file.

mod aside;
mod closing;
mod connecting;
mod data;
mod handed;
#[path = "../harness/mod.rs"]
mod harness;
mod idle;
mod liburing;
mod limits;
mod names;
mod options;
mod process;
mod ready;
mod rings;
mod sets;
mod signals;
mod sys;
mod threads;
mod world;

use harness::{Lib, Run, Stats};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{env, process::Command, time::Duration};
use world::{Place, World};

/// One scenario and where it makes sense.
#[derive(Clone, Copy)]
pub struct Scenario {
    name: &'static str,
    run: fn(&World),
    /// Only with the peer in another process (the scenario forks, and a thread's fd would be inherited).
    procs: bool,
    /// Not expected to be upgraded: no connection lives long enough, or it must not be.
    plain: bool,
    /// Needs more than a tiny ring holds, by its nature.
    not_tiny: bool,
    /// Leaves bytes unread in the ring: once their stream has left it, nobody can move them, or hears of the peer that
    /// was to read them. Or counts on it that what is full stays full: a stream that leaves a full ring finds
    /// TCP's buffers empty.
    unforced: bool,
    /// Takes long: a longer watchdog.
    slow: bool,
    /// Does nothing for which a connection would have to leave the ring.
    stays: bool,
}

impl Scenario {
    const fn new(name: &'static str, run: fn(&World)) -> Self {
        Scenario {
            name,
            run,
            procs: false,
            plain: false,
            not_tiny: false,
            unforced: false,
            slow: false,
            stays: false,
        }
    }
    const fn procs(mut self) -> Self {
        self.procs = true;
        self
    }
    const fn plain(mut self) -> Self {
        self.plain = true;
        self
    }
    const fn not_tiny(mut self) -> Self {
        self.not_tiny = true;
        self
    }
    const fn unforced(mut self) -> Self {
        self.unforced = true;
        self
    }
    const fn slow(mut self) -> Self {
        self.slow = true;
        self
    }
    const fn stays(mut self) -> Self {
        self.stays = true;
        self
    }
}

/// A line of a scenario table.
#[macro_export]
macro_rules! s {
    ($f:ident) => {
        $crate::Scenario::new(stringify!($f), $f)
    };
}

const FILES: &[(&str, &[Scenario])] = &[
    ("data", data::SCENARIOS),
    ("aside", aside::SCENARIOS),
    ("closing", closing::SCENARIOS),
    ("ready", ready::SCENARIOS),
    ("options", options::SCENARIOS),
    ("connecting", connecting::SCENARIOS),
    ("process", process::SCENARIOS),
    ("handed", handed::SCENARIOS),
    ("idle", idle::SCENARIOS),
    ("threads", threads::SCENARIOS),
    ("limits", limits::SCENARIOS),
    ("sets", sets::SCENARIOS),
    ("rings", rings::SCENARIOS),
    ("liburing", liburing::SCENARIOS),
    ("names", names::SCENARIOS),
    ("signals", signals::SCENARIOS),
];

/// A way to run under the preload.
struct Mode {
    name: &'static str,
    env: &'static [(&'static str, &'static str)],
    places: &'static [Place],
}

const MODES: &[Mode] = &[
    Mode {
        name: "eager",
        env: &[("SMC_UPGRADE_AFTER", "0")],
        places: &[Place::Procs, Place::ProcsAccept, Place::Threads],
    },
    Mode { name: "lazy", env: &[], places: &[Place::Procs, Place::Threads] },
    Mode {
        name: "tiny",
        env: &[("SMC_UPGRADE_AFTER", "0"), ("SMC_RMB_SIZE", "16384")],
        places: &[Place::Procs, Place::Threads],
    },
    // What each end sends goes back to TCP at some call or other of the scenario: few calls to warm up, so that it is
    // not before. Each scenario draws its own moments, and the same ones at each run.
    Mode {
        name: "forced",
        env: &[("SMC_UPGRADE_AFTER", "0"), ("SMC_TEST_DOWNGRADE", "50"), (WARM_UP, "25")],
        places: &[Place::Procs, Place::Threads],
    },
];

/// How many ping-pongs are enough to be upgraded, for the helper.
pub const WARM_UP: &str = "SOCKETS_WARM_UP";
/// A number: other moments for the forced downgrades than each scenario's own.
const SEED: &str = "SMC_SEED";

fn place_name(p: Place) -> &'static str {
    match p {
        Place::Threads => "threads",
        Place::Procs => "procs",
        Place::ProcsAccept => "procs-accept",
    }
}

fn find(name: &str) -> Option<&'static Scenario> {
    FILES
        .iter()
        .find_map(|(file, all)| all.iter().find(|s| name == s.name || name == format!("{file}::{}", s.name)))
}

/// `--scenario NAME PLACE`: the helper.
fn play(args: &[String]) -> i32 {
    let Some(s) = args.first().and_then(|n| find(n)) else {
        eprintln!("no such scenario; --list names them");
        return 2;
    };
    let place = match args.get(1).map_or("procs", |p| p.as_str()) {
        "threads" => Place::Threads,
        "procs-accept" => Place::ProcsAccept,
        _ => Place::Procs,
    };
    let w = World::new(place);
    (s.run)(&w);
    log!("end");
    w.end();
    0
}

/// The environment of a scenario in a mode. Each has its own seed for what is drawn.
fn settings(s: &Scenario, m: &Mode) -> Vec<(&'static str, String)> {
    let drawn = |v: &str| match env::var(SEED) {
        Ok(seed) => format!("{v}:{seed}"),
        Err(_) => {
            format!("{v}:{}", s.name.bytes().fold(0u32, |n, b| n.wrapping_mul(31).wrapping_add(b.into())))
        }
    };
    let value = |k: &str, v: &str| if k == "SMC_TEST_DOWNGRADE" { drawn(v) } else { v.to_string() };
    m.env.iter().map(|(k, v)| (*k, value(k, v))).collect()
}

/// One run of a scenario: its transcript, and what the library counted.
fn transcript(s: &Scenario, place: Place, mode: Option<&Mode>, lib: &Lib) -> Result<(String, Stats), Failed> {
    let exe = env::current_exe().expect("our own path");
    let mut cmd = Command::new(&exe);
    cmd.args(["--scenario", s.name, place_name(place)]);
    let mut run = Run::new(s.name);
    run.limit(Duration::from_secs(if s.slow { 180 } else { 40 }));
    if let Some(m) = mode {
        run.preload(lib);
        for (k, v) in settings(s, m) {
            cmd.env(k, v);
        }
    }
    let by_hand = format!(
        "{}{} --scenario {} {}",
        mode.map_or(String::new(), |m| settings(s, m)
            .iter()
            .map(|(k, v)| format!("{k}={v} "))
            .chain([format!("LD_PRELOAD={} ", lib.display())])
            .collect()),
        exe.display(),
        s.name,
        place_name(place)
    );
    let done = run.output(cmd).map_err(|e| format!("{e}\n  by hand: {by_hand}"))?;
    if !done.success || !done.stdout.ends_with("end\n") {
        return Err(format!(
            "{} in {}: {}\n{}{}\n  by hand: {by_hand}",
            s.name,
            mode.map_or("plain TCP", |m| m.name),
            done.status,
            done.stdout,
            done.stderr
        )
        .into());
    }
    Ok((done.stdout, done.stats))
}

/// The first place where two transcripts part, with what came before.
fn difference(want: &str, got: &str) -> String {
    let (w, g): (Vec<_>, Vec<_>) = (want.lines().collect(), got.lines().collect());
    let i = w.iter().zip(&g).take_while(|(a, b)| a == b).count();
    let mut s = String::new();
    for l in &w[i.saturating_sub(4)..i] {
        s += &format!("    = {l}\n");
    }
    for l in w.iter().skip(i).take(4) {
        s += &format!("    - {l}\n");
    }
    for l in g.iter().skip(i).take(4) {
        s += &format!("    + {l}\n");
    }
    format!("line {}, - plain TCP, + under the preload:\n{s}", i + 1)
}

fn check(s: &Scenario) -> Result<(), Failed> {
    let lib = Lib::find()?;
    let mut wants: Vec<(Place, String)> = Vec::new();
    let mut problems = Vec::new();
    let only = env::var("SMC_MODE").ok();
    let wanted = |m: &&Mode| {
        !(s.not_tiny && m.name == "tiny" || s.unforced && m.name == "forced")
            && only.as_deref().is_none_or(|o| o == m.name || lib.is_none())
    };
    for m in MODES.iter().filter(wanted) {
        for &place in m.places.iter().filter(|p| !(s.procs && **p == Place::Threads)) {
            if !wants.iter().any(|w| w.0 == place) {
                wants.push((place, transcript(s, place, None, &lib)?.0));
            }
            let want = &wants.iter().find(|w| w.0 == place).expect("just made").1;
            if lib.is_none() && m.name != "eager" {
                continue;
            }
            // Without a library the second run shows whether the transcript is deterministic.
            let mode = (!lib.is_none()).then_some(m);
            match transcript(s, place, mode, &lib) {
                Err(e) => problems.push(e.message().unwrap_or("failed").to_string()),
                Ok((got, stats)) => {
                    let at = format!("{} {}", m.name, place_name(place));
                    if got != *want {
                        problems.push(format!("{at}: {}", difference(want, &got)));
                    } else if mode.is_some() && !s.plain && stats.shm == 0 && m.name != "forced" {
                        problems.push(format!("{at}: nothing was upgraded: {stats:?}"));
                    } else if mode.is_some() && s.stays && stats.fallback.contains_key("async-io") {
                        problems.push(format!("{at}: a connection has left the ring: {stats:?}"));
                    }
                }
            }
        }
    }
    // The placement is not part of the transcript either.
    if let [first, rest @ ..] = &wants[..] {
        for (p, t) in rest {
            if *t != first.1 {
                problems.push(format!(
                    "plain TCP, {} against {p:?}: {}",
                    place_name(first.0),
                    difference(&first.1, t)
                ));
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n").into()) }
}

fn main() {
    let args: Vec<String> = env::args().collect();
    if args.get(1).is_some_and(|a| a == "--scenario") {
        std::process::exit(play(&args[2..]));
    }
    if let [_, what, fd] = &args[..]
        && what == "--serve"
    {
        std::process::exit(process::serve_inherited(fd.parse().expect("a number")));
    }
    if let [_, flag, what, fd] = &args[..]
        && flag == "--inherited"
    {
        std::process::exit(handed::inherited(what, fd.parse().expect("a number")));
    }
    let trials = FILES
        .iter()
        .flat_map(|(file, all)| {
            all.iter().map(move |s| Trial::test(format!("{file}::{}", s.name), move || check(s)))
        })
        .collect();
    let mut args = Arguments::from_args();
    // Most of a scenario's time is spent waiting, so more than there are processors.
    args.test_threads.get_or_insert(4);
    libtest_mimic::run(&args, trials).exit();
}
