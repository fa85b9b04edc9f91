//! Sudden death: either end is killed at random moments under load, and the other sees what TCP would show.
//!
//! The survivor gets only right bytes, then EOF or a reset, in every one of 200 rounds; it does not hang or crash,
//! and neither descriptors nor shared memory are left behind. The two ends are the examples `verified_server`
//! and `verified_client`; this executable contains them, and starts itself to be one.

#[path = "harness/mod.rs"]
mod harness;
#[path = "../examples/verified_client.rs"]
#[allow(clippy::duplicate_mod, reason = "both examples contain the stream, and this test both examples")]
mod verified_client;
#[path = "../examples/verified_server.rs"]
#[allow(clippy::duplicate_mod, reason = "both examples contain the stream, and this test both examples")]
mod verified_server;

use harness::{Lib, Random, Run, Running, descriptors, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    env, fs,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

const ROUNDS: u64 = 200;

fn this(args: &[&str]) -> Command {
    let mut c = Command::new(env::current_exe().expect("our own path"));
    c.args(args);
    c
}

/// A preloaded server, and its port.
fn server(run: &Run, name: &str, eager: bool) -> Result<(Running, String), Failed> {
    let mut c = this(&["--verified-server"]);
    if eager {
        c.env("SMC_UPGRADE_AFTER", "0");
    }
    let mut s = run.start(name, c)?;
    s.until("a port", |s| s.stdout().contains("port "))?;
    let port = s.stdout().lines().find_map(|l| l.strip_prefix("port ").map(String::from));
    Ok((s, port.ok_or("no port")?))
}

fn lines(s: &Running, start: &str) -> usize {
    s.stdout().lines().filter(|l| l.starts_with(start)).count()
}

/// Names in /dev/shm that are ours by their name.
fn left_in_shm() -> Vec<String> {
    let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    names.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.contains("smc")).collect()
}

fn good(s: &Running) -> Result<(), Failed> {
    ensure(!s.stdout().contains("BAD"), || format!("{}\n{}", s.stdout(), s.stderr()))
}

fn run_for(name: &str) -> Result<(Run, Lib), Failed> {
    let lib = Lib::find()?;
    let mut run = Run::new(name);
    run.limit(Duration::from_secs(60));
    run.preload(&lib);
    Ok((run, lib))
}

/// How the mode is chosen: half of the rounds are eager, so that a death also hits the upgrade itself.
fn client(run: &Run, port: &str, n: &str, round: u64) -> Result<Running, Failed> {
    let mut c = this(&["--verified-client", port, n]);
    if round.is_multiple_of(2) {
        c.env("SMC_UPGRADE_AFTER", "0");
    }
    run.start(&format!("client{round}"), c)
}

/// The client dies, the server survives them all.
fn client_killed() -> Result<(), Failed> {
    let (run, lib) = run_for("client-killed")?;
    let mut random = Random::new();
    let before = left_in_shm();
    let (mut s, port) = server(&run, "server", true)?;
    // What a process keeps for good once it had a connection is no leak.
    run.output_as("first", this(&["--verified-client", &port, "3", "300"]))?.ok()?;
    s.until("the end of the first connections", |s| lines(s, "closed") == 3)?;
    thread::sleep(Duration::from_millis(300));
    let fds = descriptors(s.pid());
    let mut open = 0;
    for round in 0..ROUNDS / 2 {
        let mut c = client(&run, &port, "3", round)?;
        // Now and then also in the first moments, the upgrade itself among them.
        if round % 4 != 3 {
            c.until("data on all connections", |c| c.stdout().contains("running"))?;
        }
        thread::sleep(Duration::from_micros(random.below(25_000)));
        good(&c)?;
        c.signal(libc::SIGKILL);
        drop(c);
        // Every connection that was seen to carry data ends, with nothing but right bytes.
        s.until("the end of all connections", |s| {
            lines(s, "BAD") > 0 || lines(s, "closed") >= lines(s, "open")
        })?;
        good(&s)?;
        open = lines(&s, "open");
    }
    // Sockets may need a moment after the last word.
    s.until("as few descriptors as at the start", |s| descriptors(s.pid()).len() <= fds.len())
        .map_err(|_| format!("descriptors at first: {fds:?}\nand now: {:?}", descriptors(s.pid())))?;
    ensure(open > 0, || "no connection carried data".into())?;
    // The server still serves, and its statistics tell what was upgraded.
    let c = run.output_as("last", this(&["--verified-client", &port, "2", "500"]))?;
    ensure(c.stdout.contains("verified"), || format!("{}{}", c.stdout, c.stderr))?;
    let last = run.stats("last")?;
    ensure(lib.is_none() || last.shm > 0, || format!("the last client was not upgraded: {last:?}"))?;
    ensure(left_in_shm() == before, || format!("left in /dev/shm: {:?}", left_in_shm()))
}

/// The server dies, each client ends by itself.
fn server_killed() -> Result<(), Failed> {
    let (run, lib) = run_for("server-killed")?;
    let mut random = Random::new();
    let before = left_in_shm();
    let mut upgraded = 0;
    for round in 0..ROUNDS / 2 {
        let (s, port) = server(&run, &format!("server{round}"), round % 3 != 2)?;
        let mut c = client(&run, &port, "3", round)?;
        c.until("data on all connections", |c| c.stdout().contains("running"))?;
        thread::sleep(Duration::from_micros(random.below(25_000)));
        s.signal(libc::SIGKILL);
        good(&s)?;
        drop(s);
        let done = c.finish()?;
        ensure(done.success && done.stdout.contains("verified"), || {
            format!("round {round}: {}\n{}{}", done.status, done.stdout, done.stderr)
        })?;
        upgraded += u64::from(done.stats.shm > 0);
    }
    ensure(lib.is_none() || upgraded > ROUNDS / 4, || format!("only {upgraded} rounds were upgraded"))?;
    ensure(left_in_shm() == before, || format!("left in /dev/shm: {:?}", left_in_shm()))
}

/// Both die at once, again and again: nothing is left on the host.
fn both_killed() -> Result<(), Failed> {
    let (run, _) = run_for("both-killed")?;
    let mut random = Random::new();
    let before = left_in_shm();
    for round in 0..20 {
        let (s, port) = server(&run, &format!("server{round}"), round % 3 != 2)?;
        let mut c = client(&run, &port, "2", round)?;
        c.until("data on all connections", |c| c.stdout().contains("running"))?;
        thread::sleep(Duration::from_micros(random.below(10_000)));
        s.signal(libc::SIGKILL);
        c.signal(libc::SIGKILL);
        good(&s)?;
        good(&c)?;
    }
    ensure(left_in_shm() == before, || format!("left in /dev/shm: {:?}", left_in_shm()))
}

/// A stopped peer is no dead peer: nothing may end, and everything goes on after SIGCONT.
fn peer_stopped_and_continued() -> Result<(), Failed> {
    let (run, _) = run_for("stopped")?;
    let (s, port) = server(&run, "server", true)?;
    let mut c = client(&run, &port, "2", 0)?;
    c.until("data on all connections", |c| c.stdout().contains("running"))?;
    for _ in 0..5 {
        s.signal(libc::SIGSTOP);
        thread::sleep(Duration::from_millis(150));
        ensure(c.ended().is_none(), || "the client ended while its peer was stopped".into())?;
        s.signal(libc::SIGCONT);
        thread::sleep(Duration::from_millis(50));
        good(&s)?;
    }
    s.signal(libc::SIGKILL);
    let done = c.finish()?;
    ensure(done.success, || format!("{}\n{}{}", done.status, done.stdout, done.stderr))
}

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    match args.next().as_deref() {
        Some("--verified-server") => return verified_server::run(args),
        Some("--verified-client") => return verified_client::run(args),
        _ => {}
    }
    type Test = fn() -> Result<(), Failed>;
    let tests: [(&str, Test); 4] = [
        ("client_killed", client_killed),
        ("server_killed", server_killed),
        ("both_killed", both_killed),
        ("peer_stopped_and_continued", peer_stopped_and_continued),
    ];
    let trials = tests.map(|(name, f)| Trial::test(name, f)).into();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
