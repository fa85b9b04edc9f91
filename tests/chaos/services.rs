//! Real servers under chaos, with clients that know what must come back.
//!
//! redis is asked for values that only the client that asks has set; nginx for files whose every byte is known. Clients
//! are killed and stopped; redis is stopped and runs out of descriptors; nginx has its workers stopped, killed and
//! replaced by a reload. An answer is right to its last byte, or, where a worker was killed or let go, none.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::TcpStream,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Completion, Failed};

use crate::harness::{Lib, Random, Running, cmd, ensure, free_port, left_out, program};
use crate::{Chaos, RATES, descriptors, left_in_shm, limit, members, signal, time};

/// Connections of a client.
const CONNECTIONS: u64 = 4;
const FILES: [u64; 3] = [100, 9_000, 400_000];

fn value(seed: u64, len: usize) -> Vec<u8> {
    let mut r = Random::seeded(seed);
    // Letters: a value is no line of the protocol, and can be read in a report.
    (0..len).map(|_| b'a' + r.below(26) as u8).collect()
}

// ---- the client

/// `ask redis|nginx PORT SEED SECONDS`: ends with `asked N BYTES`, or with `BAD …`.
pub fn ask(args: &[String]) -> ExitCode {
    let n: Vec<u64> = args.iter().map(|a| a.parse().unwrap_or(0)).collect();
    let (port, seed, end) = (n[1] as u16, n[2], Instant::now() + Duration::from_secs(n[3]));
    let redis = args[0] == "redis";
    let one = move |i: u64| -> Result<(u64, u64), String> {
        let mut r = Random::seeded(seed ^ i << 40);
        let (mut asked, mut bytes) = (0, 0);
        while Instant::now() < end {
            let s = match TcpStream::connect(("127.0.0.1", port)) {
                Ok(s) => s,
                // No worker is there for the moment.
                Err(_) if !redis => continue,
                Err(e) => return Err(format!("connect: {e}")),
            };
            let mut s = BufReader::new(s);
            for _ in 0..1 + r.below(200) {
                let got = if redis {
                    redis_once(&mut s, &mut r, seed ^ i).map(Some)
                } else {
                    nginx_once(&mut s, &mut r)
                };
                match got {
                    Ok(Some(n)) => (asked, bytes) = (asked + 1, bytes + n),
                    Ok(None) => break,
                    Err(e) => return Err(format!("connection {i}, question {asked}: {e}")),
                }
                if Instant::now() >= end {
                    break;
                }
            }
        }
        Ok((asked, bytes))
    };
    let all: Vec<_> = (0..CONNECTIONS).map(|i| thread::spawn(move || one(i))).collect();
    let (mut asked, mut bytes, mut status) = (0, 0, ExitCode::SUCCESS);
    for t in all {
        match t.join() {
            Ok(Ok((a, b))) => (asked, bytes) = (asked + a, bytes + b),
            Ok(Err(e)) => {
                println!("BAD {e}");
                status = ExitCode::from(3);
            }
            Err(_) => status = ExitCode::from(4),
        }
    }
    println!("asked {asked} {bytes}");
    status
}

/// Sets some values and gets them, all in one go.
fn redis_once(s: &mut BufReader<TcpStream>, r: &mut Random, who: u64) -> Result<u64, String> {
    let mut out = Vec::new();
    let mut want = Vec::new();
    for _ in 0..1 + r.below(8) {
        let (key, len) = (format!("{who:x}:{}", r.below(50)), [10, 500, 5_000, 80_000][r.below(4) as usize]);
        let v = value(r.below(1 << 40), len);
        for words in [&[b"SET", key.as_bytes(), &v][..], &[b"GET", key.as_bytes()]] {
            out.extend(format!("*{}\r\n", words.len()).bytes());
            for w in words {
                out.extend(format!("${}\r\n", w.len()).bytes().chain(w.iter().copied()).chain(*b"\r\n"));
            }
        }
        want.extend(b"+OK\r\n".iter().copied());
        want.extend(format!("${}\r\n", v.len()).bytes().chain(v).chain(*b"\r\n"));
    }
    let w = s.get_ref().try_clone().map_err(|e| format!("dup: {e}"))?;
    // Both at once: the answers may be more than the buffers hold.
    let sending = thread::spawn(move || (&w).write_all(&out));
    let mut got = vec![0; want.len()];
    s.read_exact(&mut got).map_err(|e| format!("answer: {e}"))?;
    sending.join().map_err(|_| "a panic")?.map_err(|e| format!("question: {e}"))?;
    same(&got, &want)?;
    Ok(want.len() as u64)
}

fn same(got: &[u8], want: &[u8]) -> Result<(), String> {
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(format!("byte {i} of {}: {:02x?}, not {:02x?}", want.len(), got[i], want[i])),
    }
}

/// Gets a file. `None`: the worker has gone, before the answer or in it.
fn nginx_once(s: &mut BufReader<TcpStream>, r: &mut Random) -> Result<Option<u64>, String> {
    let len = FILES[r.below(FILES.len() as u64) as usize];
    let gone = |e: &io::Error| {
        matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof)
    };
    let request = format!("GET /{len} HTTP/1.1\r\nHost: x\r\n\r\n");
    match s.get_mut().write_all(request.as_bytes()) {
        Err(e) if gone(&e) => return Ok(None),
        r => r.map_err(|e| format!("question: {e}"))?,
    }
    let (mut told, mut first) = (None, true);
    loop {
        let mut line = String::new();
        match s.read_line(&mut line) {
            Ok(0) => return Ok(None),
            Err(e) if gone(&e) => return Ok(None),
            r => r.map_err(|e| format!("head: {e}"))?,
        };
        if first && !line.starts_with("HTTP/1.1 200 ") {
            return Err(format!("the answer is {line:?}"));
        }
        first = false;
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            told = n.trim().parse().ok();
        }
        if line == "\r\n" {
            break;
        }
    }
    ensure_eq(told, Some(len))?;
    let want = value(len, len as usize);
    let mut got = Vec::with_capacity(want.len());
    while got.len() < want.len() {
        let mut b = [0; 16 << 10];
        let most = b.len().min(want.len() - got.len());
        match s.read(&mut b[..most]) {
            Ok(0) => break,
            Err(e) if gone(&e) => break,
            r => got.extend(&b[..r.map_err(|e| format!("body: {e}"))?]),
        }
    }
    same(&got, &want)?;
    Ok((got.len() == want.len()).then_some(len))
}

fn ensure_eq(got: Option<u64>, want: Option<u64>) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("content-length {got:?}, not {want:?}")) }
}

// ---- the tests

/// Clients come and go for a while, and `strike` happens to the server meanwhile.
fn besiege(
    name: &'static str,
    server: &str,
    start: impl FnOnce(&mut Chaos, u16) -> Result<Command, Failed>,
    strike: impl Fn(&mut Chaos, &Running),
) -> Result<Completion, Failed> {
    if program(server).is_none() {
        return left_out(name, &format!("no {server}"));
    }
    let lib = Lib::find()?;
    let before = left_in_shm();
    let seed = Random::new().below(1 << 40);
    let mut chaos = Chaos::new(&format!("chaos-{name}"), &lib, seed, 9)?;
    let port = free_port();
    let mut c = start(&mut chaos, port)?;
    chaos.dress(&mut c);
    let mut s = chaos.run.start("server", c)?;
    s.until_listening(port)?;
    let at_first = descriptors(s.pid());
    let begin = Instant::now();
    let mut n = 0;
    while begin.elapsed() < time() {
        n += 1;
        let seed = chaos.random.below(1 << 30).to_string();
        let mut c = crate::this(&["--ask", name, &port.to_string(), &seed, "3"]);
        chaos.dress(&mut c);
        let mut client = chaos.run.start(&format!("client{n}"), c)?;
        let kill = chaos.random.below(3) == 0;
        let (mut killed, started) = (false, Instant::now());
        while client.ended().is_none() && started.elapsed() < Duration::from_secs(60) {
            let pause = chaos.random.below(30_000);
            thread::sleep(Duration::from_micros(pause));
            match chaos.random.below(6) {
                0 => {
                    let rate = RATES[chaos.random.below(RATES.len() as u64) as usize];
                    chaos.faults.rate(rate);
                }
                1 => {
                    signal(client.pid(), libc::SIGSTOP);
                    thread::sleep(Duration::from_micros(chaos.random.below(40_000)));
                    signal(client.pid(), libc::SIGCONT);
                    chaos.happened.add("stops", 1);
                }
                2 if kill && started.elapsed() > Duration::from_secs(1) => {
                    signal(client.pid(), libc::SIGKILL);
                    killed = true;
                    chaos.happened.add("kills", 1);
                }
                _ => strike(&mut chaos, &s),
            }
        }
        let ended = client.ended();
        let report = |what: &str, s: &Running| {
            let (c, faults) = (client.stdout() + &client.stderr(), chaos.faults.last());
            format!(
                "client {n} of seed {}: {what}\n{c}--- server\n{}{}--- failed\n{faults}",
                chaos.seed,
                s.stdout(),
                s.stderr()
            )
        };
        let Some(status) = ended else {
            return Err(report(&format!("hangs\n{}", crate::stacks(&[client.pid(), s.pid()])), &s).into());
        };
        let gone = s.ended();
        ensure(gone.is_none(), || report(&format!("the server has ended: {gone:?}"), &s))?;
        ensure(killed || status.success(), || report(&status.to_string(), &s))?;
        let asked = client.stdout();
        let sums = asked.lines().find_map(|l| {
            l.strip_prefix("asked ")?.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()))
        });
        if let Some((a, b)) = sums {
            chaos.happened.add("questions answered", a.parse().unwrap_or(0));
            chaos.happened.add("bytes verified", b.parse().unwrap_or(0));
        }
        chaos.happened.add("clients", 1);
    }
    chaos.faults.rate(0);
    let answered = chaos.happened.0.get("questions answered").copied().unwrap_or(0);
    ensure(answered > 0, || "nothing was asked".into())?;
    let upgraded =
        (1..=n.min(6)).map(|n| chaos.run.stats(&format!("client{n}")).map_or(0, |s| s.shm)).sum::<u64>();
    ensure(lib.is_none() || upgraded > 0, || "no connection was upgraded".into())?;
    // The arena, and what else a process keeps that has had connections.
    let allowed = at_first.len() + 2;
    s.until("as few descriptors as at first", |s| descriptors(s.pid()).len() <= allowed).map_err(|e| {
        format!("at first {at_first:?}\nnow {:?}\n{}", descriptors(s.pid()), e.message().unwrap_or(""))
    })?;
    if let Some(e) = chaos.faults.failed() {
        return Err(format!("no faults could be injected: {e}").into());
    }
    let (asked, injected) = chaos.faults.told();
    eprintln!("{name}: {:?}; calls {asked}, failed {}", chaos.happened.0, injected.values().sum::<u64>());
    drop(s);
    ensure(left_in_shm() == before, || format!("left in /dev/shm: {:?}", left_in_shm()))?;
    Ok(Completion::Completed)
}

pub fn redis() -> Result<Completion, Failed> {
    let start = |chaos: &mut Chaos, port: u16| {
        let dir = chaos.run.dir().display().to_string();
        let port = port.to_string();
        Ok(cmd(
            "redis-server",
            &["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", &dir],
        ))
    };
    besiege("redis", "redis-server", start, |chaos, s| match chaos.random.below(4) {
        0 => {
            signal(s.pid(), libc::SIGSTOP);
            thread::sleep(Duration::from_micros(chaos.random.below(40_000)));
            signal(s.pid(), libc::SIGCONT);
            chaos.happened.add("stops", 1);
        }
        1 => {
            // What has been accepted goes on; what has not waits.
            if let Some(was) = limit(s.pid(), libc::RLIMIT_NOFILE, Some(30)) {
                thread::sleep(Duration::from_micros(chaos.random.below(20_000)));
                limit(s.pid(), libc::RLIMIT_NOFILE, Some(was));
                chaos.happened.add("times without descriptors", 1);
            }
        }
        _ => {}
    })
}

pub fn nginx() -> Result<Completion, Failed> {
    let start = |chaos: &mut Chaos, port: u16| {
        let dir = chaos.run.dir().display().to_string();
        for len in FILES {
            fs::write(chaos.run.path(&len.to_string()), value(len, len as usize))
                .map_err(|e| e.to_string())?;
        }
        let conf = format!(
            "daemon off; worker_processes 2; pid {dir}/pid; error_log {dir}/error.log; user root;\n\
             env SMC_FAULTS; env SMC_UPGRADE_AFTER; env SMC_TEST_DOWNGRADE; env LD_PRELOAD;\n\
             events {{ worker_connections 200; }}\n\
             http {{ access_log off; keepalive_requests 100; server {{ listen 127.0.0.1:{port}; root {dir}; }} }}\n"
        );
        let path = chaos.run.path("nginx.conf");
        fs::write(&path, conf).map_err(|e| e.to_string())?;
        Ok(cmd("nginx", &["-p", &dir, "-e", &format!("{dir}/error.log"), "-c", &path.display().to_string()]))
    };
    besiege("nginx", "nginx", start, |chaos, s| {
        let workers: Vec<i32> = members(s.pid()).into_iter().filter(|p| *p != s.pid()).collect();
        let Some(&one) = workers.get(chaos.random.below(workers.len().max(1) as u64) as usize) else {
            return;
        };
        match chaos.random.below(40) {
            0..=9 => {
                signal(one, libc::SIGSTOP);
                thread::sleep(Duration::from_micros(chaos.random.below(40_000)));
                signal(one, libc::SIGCONT);
                chaos.happened.add("stops", 1);
            }
            10 => {
                signal(one, libc::SIGKILL);
                chaos.happened.add("workers killed", 1);
            }
            11 | 12 => {
                signal(s.pid(), libc::SIGHUP);
                chaos.happened.add("reloads", 1);
            }
            _ => {}
        }
    })
}
