//! Our own workloads: `examples/bench`, which knows nothing of libsmc.

use std::process::Command;
use std::time::Instant;

use super::{Case, Goal};
use crate::rounds::{
    Measure, Mode, Result, Round, example, free_port, number_after, upgraded, wait_for_listener,
};
use crate::shell::Running;

use Mode::{Libsmc, Limit, Native, Sockmap, Tcp, Unix};

pub const fn more(name: &'static str, unit: &'static str) -> Measure {
    Measure { name, unit, less_is_better: false }
}

pub const fn less(name: &'static str, unit: &'static str) -> Measure {
    Measure { name, unit, less_is_better: true }
}

const LATENCIES: [Measure; 3] = [less("p50", "us"), less("p99", "us"), less("mean", "us")];
const CROSS: Measure = less("TCP's p50, libsmc's p99", "us");

pub const CASES: [Case; 20] = [
    Case {
        name: "rr",
        what: "64 bytes to and fro, blocking",
        needs: &[],
        measures: &[
            (
                LATENCIES[0],
                &[Goal::Times(40.0), Goal::Of(Libsmc, Limit, 1.0 / 3.0), Goal::Of(Native, Limit, 1.0 / 1.5)],
            ),
            (LATENCIES[1], &[]),
            (LATENCIES[2], &[Goal::Times(20.0)]),
            (CROSS, &[Goal::Times(1.0)]),
        ],
        modes: &[Tcp, Unix, Sockmap, Libsmc, Native, Limit],
        upgrades: true,
        run: |r| rr(r, None),
    },
    Case {
        name: "rr-one-cpu",
        what: "the same with both ends on one CPU",
        needs: &[],
        measures: &[(LATENCIES[0], &[Goal::Times(1.0)]), (LATENCIES[2], &[Goal::Times(1.0)])],
        modes: &[Tcp, Unix, Libsmc],
        upgrades: true,
        run: |r| rr(r, Some("0")).map(|v| vec![v[0], v[2]]),
    },
    Case {
        name: "stream-64",
        what: "writes of 64 bytes",
        needs: &[],
        measures: &[(more("messages", "1000/s"), &[Goal::Times(15.0), Goal::Of(Native, Tcp, 30.0)])],
        modes: &[Tcp, Unix, Sockmap, Libsmc, Native, Limit],
        upgrades: true,
        run: |r| Ok(vec![stream(r, "stream", "64")? / 1e3]),
    },
    Case {
        name: "stream-64k",
        what: "writes of 64 KiB",
        needs: &[],
        measures: &[(more("bytes", "Gbit/s"), &[Goal::Of(Native, Limit, 0.8)])],
        modes: &[Tcp, Unix, Sockmap, Libsmc, Native, Limit],
        upgrades: true,
        run: |r| Ok(vec![stream(r, "stream", "65536")? * 65536.0 * 8e-9]),
    },
    Case {
        name: "reserve-64k",
        what: "the same by `reserve`, `commit` and `consume_with`, in the ring's own memory",
        needs: &[],
        measures: &[(more("bytes", "Gbit/s"), &[Goal::Of(Native, Limit, 1.0)])],
        modes: &[Tcp, Native, Limit],
        upgrades: false,
        run: |r| Ok(vec![stream(r, "reserve", "65536")? * 65536.0 * 8e-9]),
    },
    Case {
        name: "crr",
        what: "a connection for each request",
        needs: &[],
        measures: &[(more("requests", "1000/s"), &[Goal::Times(0.97)])],
        modes: &[Tcp, Unix, Libsmc],
        upgrades: false,
        run: |r| Ok(vec![rate(r, "once", "crr", &[])? / 1e3]),
    },
    many("epoll-1", "1 connection by epoll at both ends", |r| {
        Ok(vec![rate(r, "epoll", "many", &["1"])? / 1e3])
    }),
    many("epoll-50", "50 connections by epoll at both ends", |r| {
        Ok(vec![rate(r, "epoll", "many", &["50"])? / 1e3])
    }),
    many("epoll-512", "512 connections by epoll at both ends", |r| {
        Ok(vec![rate(r, "epoll", "many", &["512"])? / 1e3])
    }),
    Case {
        name: "threads",
        what: "8 and 8 threads, each pair as rr: more threads than CPUs",
        needs: &[],
        measures: &[(more("round trips", "1000/s"), &[Goal::Times(1.0)])],
        modes: &[Tcp, Unix, Libsmc],
        upgrades: true,
        run: |r| Ok(vec![rate(r, "echo", "threads", &["8"])? / 1e3]),
    },
    Case {
        name: "sweep-turns",
        what: "sizes and numbers of connections: so many bytes to and fro on each",
        needs: &[],
        measures: &SWEEP,
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| sweep(r, "turns"),
    },
    Case {
        name: "sweep-streams",
        what: "sizes and numbers of connections: writes of so many bytes, a pair of threads for each",
        needs: &[],
        measures: &SWEEP,
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| sweep(r, "streams"),
    },
    Case {
        name: "idle-1000",
        what: "1,000 connections that are idle: both processes",
        needs: &[],
        measures: &IDLE,
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| idle(r, "1000"),
    },
    Case {
        name: "idle-10000",
        what: "10,000 connections, or as many as RLIMIT_NOFILE allows, that are idle: both processes",
        needs: &[],
        measures: &IDLE,
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| idle(r, "10000"),
    },
    Case {
        name: "pipe",
        what: "a byte through a pipe: calls that are not ours",
        needs: &[],
        measures: &[(less("write and read", "ns"), &[Goal::Times(0.99)])],
        modes: &[Tcp, Libsmc],
        upgrades: false,
        run: |r| {
            let seconds = r.seconds.to_string();
            alone(r, &["pipe", &seconds], "ns")
        },
    },
    Case {
        name: "start",
        what: "a program that does nothing, from fork to its end",
        needs: &[],
        measures: &[(less("mean of 200", "ms"), &[Goal::More(0.5)])],
        modes: &[Tcp, Libsmc],
        upgrades: false,
        run: start,
    },
    Case {
        name: "alone",
        what: "both ends in one thread: what the calls themselves cost",
        needs: &[],
        measures: &[
            (less("write, read", "ns"), &[Goal::Times(1.0)]),
            (less("write, epoll_wait, read", "ns"), &[Goal::Times(1.0)]),
            (less("write, poll, read", "ns"), &[Goal::Times(1.0)]),
            (less("open, close", "ns"), &[]),
        ],
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| {
            let n = ((r.seconds * 400_000.0) as u64).to_string();
            ["blocking", "epoll", "poll", "open"].into_iter().map(|w| nanoseconds(r, w, &n)).collect()
        },
    },
    Case {
        name: "instructions",
        what: "the same in instructions outside the kernel, by valgrind: no noise",
        needs: &["valgrind"],
        measures: &[
            (less("write, read", ""), &[]),
            (less("write, epoll_wait, read", ""), &[]),
            (less("write, poll, read", ""), &[]),
            (less("open, close", ""), &[]),
            (less("pipe write, read", ""), &[]),
        ],
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: |r| {
            ["blocking", "epoll", "poll", "open", "pipe"].into_iter().map(|w| instructions(r, w)).collect()
        },
    },
    Case {
        name: "built-in",
        what: "examples/plain_client: std::net",
        needs: &[],
        measures: &[(more("stream", "Gbit/s"), &[Goal::Times(4.0)])],
        modes: &[Tcp, Libsmc],
        upgrades: true,
        run: built_in,
    },
    Case {
        name: "threads-1",
        what: "one pair of threads: what `threads` is to be compared with",
        needs: &[],
        measures: &[(more("round trips", "1000/s"), &[])],
        modes: &[Tcp, Unix, Libsmc],
        upgrades: true,
        run: |r| Ok(vec![rate(r, "echo", "threads", &["1"])? / 1e3]),
    },
];

const IDLE: [(Measure, &[Goal]); 4] = [
    (less("rr on one more, of that alone", "times"), &[Goal::Most(1.3)]),
    (less("memory of both, each", "bytes"), &[Goal::More(4096.0)]),
    (less("CPU in a second", "ms"), &[Goal::More(1.0)]),
    (more("connections", ""), &[]),
];

/// Bytes and connections.
const SIZES: [&str; 6] = ["1", "64", "1024", "16384", "131072", "1048576"];
const CONNECTIONS: [&str; 3] = ["1", "16", "512"];

/// Nowhere below TCP.
const fn point(name: &'static str) -> (Measure, &'static [Goal]) {
    (more(name, "1000/s"), &[Goal::Times(0.97)])
}

/// In the order of [`sweep`].
const SWEEP: [(Measure, &[Goal]); 18] = [
    point("1 B, 1"),
    point("1 B, 16"),
    point("1 B, 512"),
    point("64 B, 1"),
    point("64 B, 16"),
    point("64 B, 512"),
    point("1 KiB, 1"),
    point("1 KiB, 16"),
    point("1 KiB, 512"),
    point("16 KiB, 1"),
    point("16 KiB, 16"),
    point("16 KiB, 512"),
    point("128 KiB, 1"),
    point("128 KiB, 16"),
    point("128 KiB, 512"),
    point("1 MiB, 1"),
    point("1 MiB, 16"),
    point("1 MiB, 512"),
];

const MANY: [(Measure, &[Goal]); 1] = [(more("requests", "1000/s"), &[Goal::Times(1.0)])];

const fn many(name: &'static str, what: &'static str, run: fn(&mut Round) -> Result<Vec<f64>>) -> Case {
    Case { name, what, needs: &[], measures: &MANY, modes: &[Tcp, Unix, Libsmc], upgrades: true, run }
}

/// A server, and what its client prints. `{pid}` among the arguments is the server's.
fn served(
    round: &mut Round,
    kind: &str,
    client: &[&str],
    cpu: Option<&str>,
    env: &[(&str, &str)],
) -> Result<String> {
    let address = if round.mode == Unix {
        round.dir.join("s").display().to_string()
    } else {
        format!("127.0.0.1:{}", free_port()?)
    };
    let command = |round: &Round| {
        let mut c = round.command(example("bench"));
        c.envs(cpu.map(|n| ("BENCH_CPU", n))).envs(env.iter().copied());
        c
    };
    let mut serve = command(round);
    if round.mode == Native {
        serve.arg("native");
    }
    let mut server = Running::start(serve.arg("serve").args(kind.split(' ')).arg(&address))?;
    match address.rsplit_once(':') {
        Some((_, port)) => wait_for_listener(port.parse()?, &mut server)?,
        None => wait_for_path(&address)?,
    }
    let pid = server.pid().to_string();
    let mut c = command(round);
    if round.mode == Native {
        c.arg("native");
    }
    c.args([client[0], &address]).args(client[1..].iter().map(|a| if *a == "{pid}" { &pid } else { *a }));
    round.client(&mut c, &mut server)
}

fn wait_for_path(path: &str) -> Result<()> {
    for _ in 0..1000 {
        if std::fs::metadata(path).is_ok() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Err("no server".into())
}

/// A program without a server.
fn alone(round: &mut Round, args: &[&str], key: &str) -> Result<Vec<f64>> {
    let out = round.command(example("bench")).args(args).output()?;
    Ok(vec![number_after(&String::from_utf8_lossy(&out.stdout), key)?])
}

fn nanoseconds(round: &mut Round, what: &str, n: &str) -> Result<f64> {
    Ok(alone(round, &["alone", what, n], "ns")?[0])
}

/// Of one turn: those of many turns less those of few.
fn instructions(round: &mut Round, what: &str) -> Result<f64> {
    const FEW: u32 = 1000;
    const MANY: u32 = 5000;
    let run = |n: u32| -> Result<f64> {
        let mut c = round.command("valgrind");
        c.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(example("bench"));
        let out = c.args(["alone", what, &n.to_string()]).output()?;
        number_after(&String::from_utf8_lossy(&out.stderr), "Collected :")
    };
    Ok((run(MANY)? - run(FEW)?) / f64::from(MANY - FEW))
}

fn rr(round: &mut Round, cpu: Option<&str>) -> Result<Vec<f64>> {
    let seconds = round.seconds.to_string();
    let text = if round.mode == Limit {
        let out = round.command(example("bench")).args(["line", &seconds]).output()?;
        String::from_utf8_lossy(&out.stdout).into_owned()
    } else {
        served(round, "echo", &["rr", &seconds], cpu, &[])?
    };
    let [p50, p99] = [number_after(&text, "p50")?, number_after(&text, "p99")?];
    Ok(vec![p50, p99, number_after(&text, "mean")?, if round.mode == Tcp { p50 } else { p99 }])
}

/// `how`: `stream`, or `reserve` where the way is native.
fn stream(round: &mut Round, how: &str, size: &str) -> Result<f64> {
    let seconds = round.seconds.to_string();
    if round.mode == Limit {
        return Ok(alone(round, &["ring", &seconds, size], "rate")?[0]);
    }
    let (how, sink) =
        if round.mode == Native && how == "reserve" { (how, "in-place") } else { ("stream", "sink") };
    number_after(&served(round, sink, &[how, &seconds, size], None, &[])?, "rate")
}

fn sweep(round: &mut Round, what: &str) -> Result<Vec<f64>> {
    // With 512 pairs of threads on two CPUs each gets to run some times.
    let seconds = (round.seconds / if what == "turns" { 4.0 } else { 2.0 }).to_string();
    let mut all = Vec::new();
    for size in SIZES {
        let kind = if what == "turns" { format!("whole {size}") } else { "sink".into() };
        for connections in CONNECTIONS {
            let text = served(round, &kind, &[what, &seconds, size, connections], None, &[])?;
            all.push(number_after(&text, "rate")? / 1e3);
        }
    }
    Ok(all)
}

fn rate(round: &mut Round, kind: &str, client: &str, more: &[&str]) -> Result<f64> {
    let seconds = round.seconds.to_string();
    let args: Vec<&str> = [client, &seconds].into_iter().chain(more.iter().copied()).collect();
    number_after(&served(round, kind, &args, None, &[])?, "rate")
}

fn idle(round: &mut Round, n: &str) -> Result<Vec<f64>> {
    let text = served(round, "epoll", &["idle", n, "{pid}"], None, &[])?;
    let connections = number_after(&text, "idle")?;
    // One that is on TCP costs nothing and shows nothing.
    if round.mode == Libsmc && (upgraded(&round.dir) as f64) < connections {
        return Err("not all connections were upgraded".into());
    }
    let rr = number_after(&text, "times")?;
    Ok(vec![rr, number_after(&text, "bytes")?, number_after(&text, "ms")?, connections])
}

fn start(round: &mut Round) -> Result<Vec<f64>> {
    const RUNS: u32 = 200;
    let path = crate::shell::which("true").ok_or("no program `true`")?;
    let start = Instant::now();
    for _ in 0..RUNS {
        let mut c: Command = round.command(&path);
        // Its file is not part of the start.
        c.env_remove("SMC_STATS");
        if !c.status()?.success() {
            return Err("`true` failed".into());
        }
    }
    Ok(vec![start.elapsed().as_secs_f64() * 1e3 / f64::from(RUNS)])
}

fn built_in(round: &mut Round) -> Result<Vec<f64>> {
    let port = free_port()?;
    let address = format!("127.0.0.1:{port}");
    let mut server = Running::start(round.command(example("plain_server")).arg(&address))?;
    wait_for_listener(port, &mut server)?;
    let seconds = round.seconds.to_string();
    let mut client = round.command(example("plain_client"));
    let text = round.client(client.args([&address, "stream", &seconds]), &mut server)?;
    Ok(vec![number_after(&text, "bytes")? * 8e-9 / number_after(&text, "seconds")?])
}
