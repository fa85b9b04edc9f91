//! Real servers under chaos, with clients that know what must come back.
//!
//! redis is asked for values that only the client that asks has set; nginx for files whose every byte is known; PostgreSQL
//! for what the questions themselves say, and for what was copied in just before. Clients
//! are killed and stopped; redis is stopped and runs out of descriptors; nginx has its workers stopped, killed and
//! replaced by a reload; PostgreSQL has its backends stopped, ended, and killed, upon which it ends all of them and
//! recovers. An answer is right to its last byte, or, where a worker was killed or let go, none.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::TcpStream,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
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

/// `ask redis|nginx|postgres PORT SEED SECONDS`: ends with `asked N BYTES`, or with `BAD …`.
pub fn ask(args: &[String]) -> ExitCode {
    let n: Vec<u64> = args.iter().map(|a| a.parse().unwrap_or(0)).collect();
    let (port, seed, end) = (n[1] as u16, n[2], Instant::now() + Duration::from_secs(n[3]));
    let (redis, postgres) = (args[0] == "redis", args[0] == "postgres");
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
            if postgres && !postgres_greets(&mut s)? {
                // It recovers, or is stopped.
                thread::sleep(Duration::from_millis(10));
                continue;
            }
            for _ in 0..1 + r.below(200) {
                let got = if redis {
                    redis_once(&mut s, &mut r, seed ^ i).map(Some)
                } else if postgres {
                    postgres_once(&mut s, &mut r)
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

/// The worker at the other end has.
fn gone(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof)
}

/// Gets a file. `None`: the worker has gone, before the answer or in it.
fn nginx_once(s: &mut BufReader<TcpStream>, r: &mut Random) -> Result<Option<u64>, String> {
    let len = FILES[r.below(FILES.len() as u64) as usize];
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

// ---- PostgreSQL's protocol, of version 3

/// The next message but for notices and settings: its kind and what it says. `None`: the backend has gone, and may have said so.
fn postgres_says(s: &mut BufReader<TcpStream>) -> Result<Option<(u8, Vec<u8>)>, String> {
    loop {
        let (mut head, mut body) = ([0; 5], Vec::new());
        let read = s.read_exact(&mut head).and_then(|()| {
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
            body.resize((len as usize).saturating_sub(4).min(1 << 24), 0);
            s.read_exact(&mut body)
        });
        match read {
            Err(e) if gone(&e) => return Ok(None),
            r => r.map_err(|e| format!("message: {e}"))?,
        }
        match head[0] {
            b'N' | b'S' | b'K' => {}
            // Fields, each with a letter before it and a zero behind: C is the SQLSTATE, of which class 57 says that the
            // server or an administrator has ended it.
            b'E' if body.split(|b| *b == 0).any(|f| f.starts_with(b"C57P")) => return Ok(None),
            b'E' => return Err(format!("the answer is {}", String::from_utf8_lossy(&body))),
            kind => return Ok(Some((kind, body))),
        }
    }
}

/// The messages of one answer up to `last`, of which those of kind `wanted` are kept.
fn postgres_answers(
    s: &mut BufReader<TcpStream>,
    wanted: u8,
    last: u8,
) -> Result<Option<Vec<Vec<u8>>>, String> {
    let mut all = Vec::new();
    loop {
        match postgres_says(s)? {
            None => return Ok(None),
            Some((kind, _)) if kind == last => return Ok(Some(all)),
            Some((kind, body)) if kind == wanted => all.push(body),
            // What columns there are, and that a command is done.
            Some((b'T' | b'C' | b'R', _)) => {}
            Some((kind, _)) => return Err(format!("a message of kind {:?}", char::from(kind))),
        }
    }
}

fn postgres_message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut m = vec![kind];
    m.extend((body.len() as u32 + 4).to_be_bytes());
    m.extend(body);
    m
}

fn postgres_query(sql: &str) -> Vec<u8> {
    postgres_message(b'Q', format!("{sql}\0").as_bytes())
}

/// Sends some bytes. False: the backend has gone, though what it said last may still be read.
fn postgres_told(s: &TcpStream, b: &[u8]) -> Result<bool, String> {
    let mut s = s;
    match s.write_all(b) {
        Err(e) if gone(&e) => Ok(false),
        r => r.map(|()| true).map_err(|e| format!("question: {e}")),
    }
}

/// The start of a session. False: the server takes none for the moment.
fn postgres_greets(s: &mut BufReader<TcpStream>) -> Result<bool, String> {
    let words = b"\0\x03\0\0user\0chaos\0database\0postgres\0\0";
    // This message alone has no kind.
    Ok(postgres_told(s.get_ref(), &postgres_message(0, words)[1..])?
        && postgres_answers(s, b'R', b'Z')?.is_some())
}

/// The text of a row of one column.
fn postgres_text(row: &[u8]) -> &[u8] {
    row.get(6..).unwrap_or_default()
}

/// Some questions in one go, then a copy in and back. `None`: the backend has gone, before the answer or in it.
fn postgres_once(s: &mut BufReader<TcpStream>, r: &mut Random) -> Result<Option<u64>, String> {
    let (mut out, mut want, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..1 + r.below(6) {
        let v = value(r.below(1 << 40), [10, 500, 5_000, 80_000][r.below(4) as usize]);
        let text = String::from_utf8_lossy(&v);
        let times = [1, 1, 3][r.below(3) as usize];
        out.extend(postgres_query(&format!("SELECT repeat('{text}', {times})")));
        want.push(v.repeat(times));
    }
    let w = s.get_ref().try_clone().map_err(|e| format!("dup: {e}"))?;
    // Both at once: the answers may be more than the buffers hold.
    let sending = thread::spawn(move || postgres_told(&w, &out));
    let mut lost = false;
    for want in want {
        let Some(rows) = postgres_answers(s, b'D', b'Z')? else {
            lost = true;
            break;
        };
        let [row] = rows.as_slice() else { return Err(format!("{} rows, not one", rows.len())) };
        same(postgres_text(row), &want)?;
        bytes += want.len() as u64;
    }
    if lost {
        // It may still wait for room.
        let _shut = s.get_ref().shutdown(std::net::Shutdown::Both);
    }
    let told = sending.join().map_err(|_| "a panic")??;
    if lost || !told {
        return Ok(None);
    }
    let lines: Vec<Vec<u8>> =
        (0..r.below(30)).map(|_| value(r.below(1 << 40), 1 + r.below(9_000) as usize)).collect();
    let begin = "CREATE TEMP TABLE IF NOT EXISTS c(n serial, v text); TRUNCATE c; COPY c(v) FROM STDIN";
    if !postgres_told(s.get_ref(), &postgres_query(begin))? || postgres_answers(s, b'G', b'G')?.is_none() {
        return Ok(None);
    }
    let mut out = Vec::new();
    for l in &lines {
        out.extend(postgres_message(b'd', &[l, &b"\n"[..]].concat()));
    }
    out.extend(postgres_message(b'c', b""));
    if !postgres_told(s.get_ref(), &out)? || postgres_answers(s, b'C', b'Z')?.is_none() {
        return Ok(None);
    }
    if !postgres_told(s.get_ref(), &postgres_query("SELECT v FROM c ORDER BY n"))? {
        return Ok(None);
    }
    let Some(rows) = postgres_answers(s, b'D', b'Z')? else { return Ok(None) };
    if rows.len() != lines.len() {
        return Err(format!("{} rows of {}", rows.len(), lines.len()));
    }
    for (row, l) in rows.iter().zip(&lines) {
        same(postgres_text(row), l)?;
        bytes += 2 * l.len() as u64;
    }
    Ok(Some(bytes))
}

fn ensure_eq(got: Option<u64>, want: Option<u64>) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("content-length {got:?}, not {want:?}")) }
}

// ---- the tests

/// Clients come and go for a while, and `strike` happens to the server meanwhile.
fn besiege(
    name: &'static str,
    server: &str,
    quit: i32,
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
    signal(s.pid(), quit);
    let end = Instant::now();
    while s.ended().is_none() && end.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(20));
    }
    ensure(s.ended().is_some(), || {
        format!("the server does not end\n{}{}", crate::stacks(&[s.pid()]), s.stderr())
    })?;
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
    besiege("redis", "redis-server", libc::SIGTERM, start, |chaos, s| match chaos.random.below(4) {
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
    besiege("nginx", "nginx", libc::SIGTERM, start, |chaos, s| {
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

/// The user that PostgreSQL runs as, which refuses to be root: its numbers.
fn postgres_user() -> Result<(u32, u32), Failed> {
    let all = fs::read_to_string("/etc/passwd").map_err(|e| e.to_string())?;
    let line = all.lines().find(|l| l.starts_with("postgres:")).ok_or("no user postgres")?;
    let mut n = line.split(':').skip(2).filter_map(|n| n.parse().ok());
    Ok((n.next().ok_or("no uid")?, n.next().ok_or("no gid")?))
}

/// Its children: they leave its process group.
fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|p| p.parse().ok()).collect()
}

pub fn postgres() -> Result<Completion, Failed> {
    if program("postgres").is_none() {
        return left_out("postgres", "no postgres");
    }
    // SAFETY: no pointers.
    let user = if unsafe { libc::geteuid() } == 0 { Some(postgres_user()?) } else { None };
    let as_user = |mut c: Command| {
        if let Some((uid, gid)) = user {
            c.uid(uid).gid(gid);
        }
        c.current_dir("/");
        c
    };
    let start = |chaos: &mut Chaos, port: u16| {
        let dir = chaos.run.dir();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
        let (data, port) = (dir.join("data"), port.to_string());
        if let Some((uid, gid)) = user {
            chown(dir, Some(uid), Some(gid)).map_err(|e| e.to_string())?;
        }
        let data = data.display().to_string();
        let made = as_user(cmd("initdb", &["-D", &data, "-A", "trust", "-N", "-U", "chaos"]))
            .output()
            .map_err(|e| e.to_string())?;
        ensure(made.status.success(), || String::from_utf8_lossy(&made.stderr).into_owned())?;
        let mut c = as_user(cmd("postgres", &["-D", &data, "-p", &port]));
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "dynamic_shared_memory_type=mmap",
            "log_min_messages=panic",
        ] {
            c.args(["-c", setting]);
        }
        Ok(c)
    };
    besiege("postgres", "postgres", libc::SIGINT, start, |chaos, s| {
        let all = children(s.pid());
        let Some(&one) = all.get(chaos.random.below(all.len().max(1) as u64) as usize) else {
            return;
        };
        match chaos.random.below(200) {
            0..=59 => {
                signal(one, libc::SIGSTOP);
                thread::sleep(Duration::from_micros(chaos.random.below(40_000)));
                signal(one, libc::SIGCONT);
                chaos.happened.add("stops", 1);
            }
            60 => {
                signal(one, libc::SIGKILL);
                chaos.happened.add("processes killed", 1);
            }
            // Processes that are no backends end as well, and are started anew.
            61..=70 => {
                signal(one, libc::SIGTERM);
                chaos.happened.add("processes ended", 1);
            }
            _ => {}
        }
    })
}
