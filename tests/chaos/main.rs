//! Chaos: what can happen to processes happens all at once, and no byte may be lost, doubled or waited for in vain.
//!
//! Pairs of programs (`node.rs`) that know every byte of their streams run under the preload, while their processes are
//! killed, stopped and continued, interrupted by signals, fork and exec in mid-stream, are downgraded, run out of
//! descriptors, of address space and of `SMC_MEM_LIMIT`, and while the system calls that libsmc.so makes for itself fail
//! (`faults.rs`). Where both ends live every byte arrives; where one was killed the other sees right bytes and then an
//! end; and servers that live through it all have in the end as many descriptors, mappings and as much memory as at
//! first. Then redis, nginx and PostgreSQL (`services.rs`), with a client that knows what must come back.
//!
//! `SMC_CHAOS_SECONDS` is how long each of the tests goes on; `SMC_SEED` draws the same again, as far as scheduling lets
//! it. `cargo xtask chaos --time 1h` sets both.

#[path = "../harness/mod.rs"]
mod harness;

mod faults;
mod node;
mod services;

use faults::Faults;
use harness::{Lib, Random, Run, Running, descriptors, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

/// How long each test goes on.
fn time() -> Duration {
    let seconds = env::var("SMC_CHAOS_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

/// The library of `examples/faults.rs`, which cargo builds beside the tests.
fn fault_library() -> Result<PathBuf, Failed> {
    let exe = env::current_exe().map_err(|e| e.to_string())?;
    let dir = exe.parent().and_then(|d| d.parent()).ok_or("no folder")?;
    let lib = dir.join("examples/libfaults.so");
    ensure(lib.exists(), || format!("{}: build the examples", lib.display()))?;
    Ok(lib)
}

fn this(args: &[&str]) -> Command {
    let mut c = Command::new(env::current_exe().expect("our own path"));
    c.args(args);
    // So that memory compared is memory used, and not that of arenas of threads that were.
    c.env("MALLOC_ARENA_MAX", "1");
    c
}

/// Settings that change how, but never what.
fn settings(c: &mut Command, random: &mut Random) {
    if random.below(3) > 0 {
        c.env("SMC_UPGRADE_AFTER", "0");
    }
    if random.below(3) == 0 {
        c.env("SMC_TEST_DOWNGRADE", format!("{}:{}", 5 + random.below(500), random.below(1 << 20)));
    }
    match random.below(6) {
        0 => c.env("SMC_MEM_LIMIT", (1 << 20).to_string()),
        1 => c.env("SMC_RMB_SIZE", "16384"),
        _ => c,
    };
}

// ---- processes

/// The processes of a group, but for those that wait for their parent.
fn members(group: i32) -> Vec<i32> {
    let mut out = Vec::new();
    for e in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = e.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(e.path().join("stat")) else { continue };
        let rest: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        if rest.first() != Some(&"Z") && rest.get(2).and_then(|g| g.parse().ok()) == Some(group) {
            out.push(pid);
        }
    }
    out
}

fn signal(pid: i32, sig: i32) {
    // SAFETY: no pointers; a process of this test's.
    unsafe { libc::kill(pid, sig) };
}

/// Mappings, and KiB in memory.
fn memory(pid: i32) -> (usize, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().lines().count();
    (maps, status(pid, "VmRSS:"))
}

fn status(pid: i32, what: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = text.lines().find_map(|l| l.strip_prefix(what)?.split_whitespace().next()?.parse().ok());
    value.unwrap_or(0)
}

/// Sets a soft limit of another process, and returns what it was.
fn limit(pid: i32, what: libc::__rlimit_resource_t, soft: Option<u64>) -> Option<u64> {
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a struct rlimit to be written.
    if unsafe { libc::prlimit(pid, what, std::ptr::null(), &raw mut old) } < 0 {
        return None;
    }
    let new = libc::rlimit { rlim_cur: soft.unwrap_or(old.rlim_max).min(old.rlim_max), ..old };
    // SAFETY: a struct rlimit to be read.
    unsafe { libc::prlimit(pid, what, &raw const new, std::ptr::null_mut()) };
    Some(old.rlim_cur)
}

/// Names in /dev/shm that are ours by their name.
fn left_in_shm() -> Vec<String> {
    let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    names.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.contains("smc")).collect()
}

// ---- rounds

const STYLES: [&str; 3] = ["threads", "epoll", "processes"];
/// Of 10,000 calls.
const RATES: [u64; 6] = [0, 0, 20, 100, 500, 2000];

struct Server {
    style: &'static str,
    process: Running,
    port: String,
    /// How much of its output was looked at.
    read: usize,
    /// After the first round: descriptors, mappings, KiB.
    first: Option<(Vec<String>, usize, u64)>,
    rounds: u64,
}

/// What happened, for the report.
#[derive(Default)]
struct Happened(BTreeMap<&'static str, u64>);

impl Happened {
    fn add(&mut self, what: &'static str, n: u64) {
        *self.0.entry(what).or_default() += n;
    }
}

struct Chaos {
    run: Run,
    random: Random,
    faults: Faults,
    seed: u64,
    worker: u64,
    round: u64,
    happened: Happened,
}

impl Chaos {
    fn new(name: &str, lib: &Lib, seed: u64, worker: u64) -> Result<Self, Failed> {
        let mut run = Run::new(name);
        run.limit(Duration::from_secs(60));
        run.preload(lib);
        run.preload_beside(&fault_library()?);
        let faults = Faults::listen(seed).map_err(|e| e.to_string())?;
        Ok(Chaos {
            run,
            random: Random::seeded(seed),
            faults,
            seed,
            worker,
            round: 0,
            happened: Happened::default(),
        })
    }

    fn dress(&mut self, c: &mut Command) {
        settings(c, &mut self.random);
        c.env("SMC_FAULTS", &self.faults.name);
    }

    fn server(&mut self, style: &'static str, name: &str) -> Result<Server, Failed> {
        let edge = self.random.below(2).to_string();
        let mut c = this(&["--node", "server", style, &edge]);
        self.dress(&mut c);
        let mut process = self.run.start(name, c)?;
        process.until("a port", |s| s.stdout().contains("port "))?;
        let port = process.stdout().lines().find_map(|l| l.strip_prefix("port ").map(String::from));
        Ok(Server { style, process, port: port.ok_or("no port")?, read: 0, first: None, rounds: 0 })
    }

    /// One client with some connections, and what happens to both meanwhile.
    fn round(&mut self, server: &mut Server, lives: bool, calm: bool) -> Result<(), Failed> {
        self.round += 1;
        server.rounds += 1;
        let r = &mut self.random;
        let style = STYLES[r.below(3) as usize];
        let edge = r.below(2).to_string();
        let connections = 1 + r.below(8);
        let bytes = 1 << (12 + r.below(11));
        let kills = !calm && r.below(3) == 0;
        let rate = if calm { 0 } else { RATES[r.below(RATES.len() as u64) as usize] };
        let first = self.worker << 48 | self.round << 16;
        self.faults.rate(rate);
        let id = |n: u64| n.to_string();
        let mut c =
            this(&["--node", "client", style, &edge, &server.port, &id(first), &id(connections), &id(bytes)]);
        self.dress(&mut c);
        let mut client = self.run.start(&format!("client{}", self.round), c)?;
        let group = client.pid();
        let mut killed = false;
        let begin = Instant::now();
        while client.ended().is_none() && begin.elapsed() < Duration::from_secs(60) {
            let pause = self.random.below(15_000);
            thread::sleep(Duration::from_micros(pause));
            if !calm {
                killed |= self.strike(server, lives, &client, style, kills && !killed);
            }
        }
        let what = format!(
            "round {} of seed {}: client {style} (edge {edge}), server {}{}, {connections} connections, up to {bytes} \
             bytes, {rate} of 10000 calls fail{}",
            self.round,
            self.seed,
            server.style,
            if lives { "" } else { " of this round" },
            if killed { ", killed" } else { "" },
        );
        let faults = if rate > 0 { self.faults.last() } else { String::new() };
        let fail = |why: String, c: &Running, s: &Server| -> Failed {
            format!(
                "{what}: {why}\n--- client {group}\n{}{}--- server {}\n{}{}--- failed\n{faults}",
                c.stdout(),
                c.stderr(),
                s.process.pid(),
                tail(&s.process.stdout()),
                s.process.stderr()
            )
            .into()
        };
        self.faults.rate(0);
        let status = client.ended();
        let Some(status) = status else {
            return Err(fail(format!("hangs\n{}", stacks(&[group, server.process.pid()])), &client, server));
        };
        // The other end hears of each end, too.
        let ids: BTreeSet<u64> = (first..first + connections).collect();
        if lives || !killed {
            let quiet = |s: &Running| {
                let ends = Ends::read(&s.stdout()[server.read..], &ids);
                // A child that was killed tells nothing.
                ends.open.iter().all(|i| ends.ended(*i))
                    || server.style == "processes" && killed && members(s.pid()).len() == 1
            };
            let r = server.process.until("the end of all connections", quiet);
            r.map_err(|e| {
                fail(
                    e.message().unwrap_or("").to_string() + &stacks(&[group, server.process.pid()]),
                    &client,
                    server,
                )
            })?;
        }
        let at_client = Ends::read(&client.stdout(), &ids);
        let at_server = Ends::read(&server.process.stdout()[server.read..], &ids);
        let bad: Vec<_> = at_client.bad.iter().chain(&at_server.bad).collect();
        ensure(bad.is_empty(), || format!("{bad:?}"))
            .map_err(|e| fail(e.message().unwrap_or("").into(), &client, server))?;
        if !killed {
            let lost: Vec<_> =
                ids.iter().filter(|i| !at_client.done.contains(i) || !at_server.done.contains(i)).collect();
            ensure(lost.is_empty() && status.success(), || {
                format!("{status}; not done, though nobody was killed: {lost:?}")
            })
            .map_err(|e| fail(e.message().unwrap_or("").into(), &client, server))?;
        }
        for i in at_client.done.iter().filter(|i| at_server.done.contains(i)) {
            let (there, back) = node::lengths(*i, bytes);
            self.happened.add("bytes verified", there + back);
            self.happened.add("connections whole", 1);
        }
        self.happened.add("connections", connections);
        self.happened.add("rounds", 1);
        drop(client);
        server.read = server.process.stdout().len();
        if lives {
            self.settled(server).map_err(|e| format!("{what}: {}", e.message().unwrap_or("")).into())
        } else {
            Ok(())
        }
    }

    /// A server that lives on has no more descriptors than at first.
    fn settled(&mut self, server: &mut Server) -> Result<(), Failed> {
        let now = |s: &Running| descriptors(s.pid());
        if let Some((first, maps, kib)) = &server.first {
            server.process.until("as few descriptors as at first", |s| now(s).len() <= first.len()).map_err(
                |e| {
                    format!(
                        "descriptors at first: {first:?}\nand now: {:?}\n{}",
                        now(&server.process),
                        e.message().unwrap_or("")
                    )
                },
            )?;
            let after = memory(server.process.pid());
            // What malloc and stacks keep differs a little; a leak of each round or connection does not end.
            ensure(after.0 <= maps + 40 && after.1 <= kib + 24 * 1024, || {
                let text =
                    fs::read_to_string(format!("/proc/{}/maps", server.process.pid())).unwrap_or_default();
                format!(
                    "{} server: mappings and KiB at first {maps} {kib}, now {after:?}\n{text}",
                    server.style
                )
            })?;
        } else if server.rounds >= 3 {
            // What a process keeps for good once it had connections is no leak. Sockets may need a moment.
            thread::sleep(Duration::from_millis(300));
            let (maps, kib) = memory(server.process.pid());
            server.first = Some((now(&server.process), maps, kib));
        }
        Ok(())
    }

    /// One thing that happens. True: somebody was killed.
    fn strike(
        &mut self,
        server: &mut Server,
        lives: bool,
        client: &Running,
        style: &str,
        kill: bool,
    ) -> bool {
        let r = &mut self.random;
        let at_server = r.below(2) == 0;
        let (leader, style) =
            if at_server { (server.process.pid(), server.style) } else { (client.pid(), style) };
        let all = members(leader);
        if all.is_empty() {
            return false;
        }
        let one = all[r.below(all.len() as u64) as usize];
        let begun = at_server || client.stdout().contains("begun");
        match r.below(8) {
            0 | 1 if kill => {
                if at_server && lives && one == leader {
                    return false;
                }
                if r.below(2) == 0 && !(at_server && lives) {
                    signal(-leader, libc::SIGKILL);
                } else {
                    signal(one, libc::SIGKILL);
                }
                self.happened.add("kills", 1);
                return true;
            }
            0..=2 => {
                signal(one, libc::SIGSTOP);
                thread::sleep(Duration::from_micros(r.below(40_000)));
                signal(one, libc::SIGCONT);
                self.happened.add("stops", 1);
            }
            3 | 4 if begun => {
                // To all: a relay is no part of the program and has no handler, and is in its group at first.
                signal(-leader, libc::SIGUSR1);
                self.happened.add("signals", 1);
            }
            // An exec needs descriptors, and threads need memory, on TCP as well.
            5 if style != "processes" && begun => {
                let open = fs::read_dir(format!("/proc/{one}/fd")).into_iter().flatten().flatten();
                let used = open.filter_map(|f| f.file_name().to_str()?.parse::<u64>().ok());
                let near = used.filter(|n| *n < 512).max().unwrap_or(3) + 1 + r.below(6);
                if let Some(was) = limit(one, libc::RLIMIT_NOFILE, Some(near)) {
                    thread::sleep(Duration::from_micros(r.below(20_000)));
                    limit(one, libc::RLIMIT_NOFILE, Some(was));
                    self.happened.add("times without descriptors", 1);
                }
            }
            6 if style == "epoll" && begun => {
                let room = status(one, "VmSize:") * 1024 + r.below(64) * 4096;
                limit(one, libc::RLIMIT_AS, Some(room));
                thread::sleep(Duration::from_micros(r.below(20_000)));
                limit(one, libc::RLIMIT_AS, None);
                self.happened.add("times without memory", 1);
            }
            _ => {}
        }
        false
    }
}

fn tail(s: &str) -> String {
    let lines: Vec<_> = s.lines().collect();
    lines[lines.len().saturating_sub(40)..].iter().map(|l| format!("{l}\n")).collect()
}

/// What the threads of some groups wait for.
fn stacks(groups: &[i32]) -> String {
    let mut s = String::new();
    for pid in groups.iter().flat_map(|g| members(*g)) {
        for t in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |f: &str| fs::read_to_string(t.path().join(f)).unwrap_or_default().trim().to_string();
            s += &format!("  {pid} {:?} {}: {}\n", t.file_name(), read("comm"), read("syscall"));
        }
        s += &format!("  {:?}\n", descriptors(pid));
    }
    if env::var_os("SMC_CHAOS_KEEP").is_some() {
        eprintln!("{s}\nSMC_CHAOS_KEEP is set: stays as it is");
        thread::sleep(Duration::from_secs(3600));
    }
    s
}

/// What one end has told of its connections.
#[derive(Default)]
struct Ends {
    open: BTreeSet<u64>,
    done: BTreeSet<u64>,
    cut: BTreeSet<u64>,
    bad: Vec<String>,
}

impl Ends {
    fn read(text: &str, ids: &BTreeSet<u64>) -> Self {
        let mut e = Ends::default();
        for l in text.lines() {
            let mut words = l.split(' ');
            let (what, id) = (words.next().unwrap_or(""), words.next().and_then(|w| w.parse().ok()));
            match (what, id) {
                ("BAD", _) => e.bad.push(l.to_string()),
                ("open", Some(i)) if ids.contains(&i) => _ = e.open.insert(i),
                ("done", Some(i)) if ids.contains(&i) => _ = e.done.insert(i),
                ("cut", Some(i)) if ids.contains(&i) => _ = e.cut.insert(i),
                _ => {}
            }
        }
        e
    }

    fn ended(&self, id: u64) -> bool {
        self.done.contains(&id) || self.cut.contains(&id) || !self.bad.is_empty()
    }
}

fn pairs(worker: u64) -> Result<(), Failed> {
    let lib = Lib::find()?;
    let before = left_in_shm();
    let seed = Random::new().below(1 << 40) ^ worker << 32;
    let mut chaos = Chaos::new(&format!("chaos-{worker}"), &lib, seed, worker)?;
    let mut lasting = Vec::new();
    for style in STYLES {
        let mut s = chaos.server(style, &format!("lasting-{style}"))?;
        for _ in 0..3 {
            chaos.round(&mut s, true, true)?;
        }
        lasting.push(s);
    }
    let begin = Instant::now();
    while begin.elapsed() < time() {
        let style = chaos.random.below(3) as usize;
        if chaos.random.below(3) > 0 {
            chaos.round(&mut lasting[style], true, false)?;
        } else {
            let mut s = chaos.server(STYLES[style], &format!("server{}", chaos.round + 1))?;
            chaos.round(&mut s, false, false)?;
        }
    }
    // Whatever happened: they serve as at first.
    for s in &mut lasting {
        chaos.round(s, true, true)?;
        ensure(s.process.ended().is_none(), || format!("the {} server has ended", s.style))?;
        let (fds, maps, kib) = s.first.clone().unwrap_or_default();
        let now = memory(s.process.pid());
        eprintln!(
            "{} server, {} rounds: descriptors {} -> {}, mappings {maps} -> {}, KiB {kib} -> {}",
            s.style,
            s.rounds,
            fds.len(),
            descriptors(s.process.pid()).len(),
            now.0,
            now.1
        );
    }
    // Some settings keep a connection on TCP, and short ones stay there.
    let upgraded = (1..=12).map(|n| chaos.run.stats(&format!("client{n}")).map_or(0, |s| s.shm)).sum::<u64>();
    ensure(lib.is_none() || upgraded > 0, || "no connection of twelve rounds was upgraded".into())?;
    if let Some(e) = chaos.faults.failed() {
        return Err(format!("no faults could be injected: {e}").into());
    }
    let (asked, injected) = chaos.faults.told();
    eprintln!(
        "{:?}\ncalls {asked}, failed {}: {injected:?}",
        chaos.happened.0,
        injected.values().sum::<u64>()
    );
    ensure(left_in_shm() == before, || format!("left in /dev/shm: {:?}", left_in_shm()))
}

/// Many connections at once, in waves, with a reader that is slow, and less memory than they would like: none is
/// refused, all bytes arrive, and the memory stays within its limit.
fn overload() -> Result<(), Failed> {
    const WAVES: u64 = 10;
    const AT_ONCE: u64 = 1000;
    const LIMIT: u64 = 64 << 20;
    let lib = Lib::find()?;
    let mut run = Run::new("overload");
    run.limit(Duration::from_secs(100));
    run.preload(&lib);
    let dress = |c: &mut Command| {
        c.env("SMC_UPGRADE_AFTER", "0").env("SMC_MEM_LIMIT", LIMIT.to_string());
        let raise = || {
            let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: a struct rlimit, between fork and exec.
            unsafe {
                libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut l);
                l.rlim_cur = l.rlim_max.min(8192);
                libc::setrlimit(libc::RLIMIT_NOFILE, &raw const l);
            }
            Ok(())
        };
        // SAFETY: two system calls with a struct of the stack.
        unsafe { std::os::unix::process::CommandExt::pre_exec(c, raise) };
    };
    let mut c = this(&["--node", "server", "epoll", "0"]);
    dress(&mut c);
    let mut server = run.start("server", c)?;
    server.until("a port", |s| s.stdout().contains("port "))?;
    let port = server.stdout().lines().find_map(|l| l.strip_prefix("port ").map(String::from));
    let port = port.ok_or("no port")?;
    let (mut most, mut bytes, mut upgraded, mut first) = (0, 0, 0, None);
    let mut on_tcp = BTreeMap::new();
    for wave in 0..WAVES {
        let ids: BTreeSet<u64> = (wave << 16..(wave << 16) + AT_ONCE).collect();
        let id = (wave << 16).to_string();
        let (n, up_to) = (AT_ONCE.to_string(), (20_000u64).to_string());
        let mut c = this(&["--node", "client", "epoll", "0", &port, &id, &n, &up_to]);
        dress(&mut c);
        c.env("SMC_CHAOS_SLOW", "1");
        let read = server.stdout().len();
        let name = format!("client{wave}");
        let mut client = run.start(&name, c)?;
        let mut sample = || most = most.max(status(server.pid(), "RssShmem:"));
        client.until("the end of the wave", |c| {
            sample();
            c.stdout().lines().any(|l| l == "over")
        })?;
        let done = client.finish()?;
        server.until("the end of all connections", |s| {
            Ends::read(&s.stdout()[read..], &ids).done.len() as u64 == AT_ONCE
        })?;
        let at_client = Ends::read(&done.stdout, &ids);
        ensure(done.success && at_client.done == ids, || {
            format!(
                "wave {wave}: {} of {AT_ONCE} done; {}\n{}",
                at_client.done.len(),
                done.status,
                tail(&done.stdout)
            )
        })?;
        let stats = run.stats(&name)?;
        for (why, n) in &stats.fallback {
            *on_tcp.entry(why.clone()).or_insert(0u64) += n;
        }
        upgraded += stats.shm;
        bytes += ids.iter().map(|i| node::lengths(*i, 20_000)).map(|(a, b)| a + b).sum::<u64>();
        if wave == 0 {
            thread::sleep(Duration::from_millis(300));
            first = Some(descriptors(server.pid()));
        }
    }
    let first = first.unwrap_or_default();
    server
        .until("as few descriptors as after the first wave", |s| descriptors(s.pid()).len() <= first.len())?;
    eprintln!(
        "overload: {} connections, {bytes} bytes verified, {upgraded} upgraded, at most {most} KiB shared; on TCP: \
         {on_tcp:?}",
        WAVES * AT_ONCE
    );
    // Beside the rings: the arena, and what the test's own pages are.
    ensure(most <= (LIMIT >> 10) + (4 << 10), || {
        format!("{most} KiB shared, the limit is {} KiB", LIMIT >> 10)
    })?;
    ensure(lib.is_none() || upgraded > 0, || "no connection was upgraded".into())
}

/// A failure is told when it is found, though others go on for an hour.
fn at_once(r: Result<(), Failed>) -> Result<(), Failed> {
    r.inspect_err(|e| eprintln!("{}", e.message().unwrap_or("failed")))
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("--node") => return node::run(&args[1..]),
        Some("--ask") => return services::ask(&args[1..]),
        _ => {}
    }
    let trials = vec![
        Trial::test("pairs", || at_once(pairs(0))),
        Trial::test("more_pairs", || at_once(pairs(1))),
        Trial::test("overload", overload),
        Trial::ignorable_test("redis", services::redis),
        Trial::ignorable_test("nginx", services::nginx),
        Trial::ignorable_test("postgres", services::postgres),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
