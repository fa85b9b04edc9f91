//! The workloads of `cargo xtask bench`: plain sockets, pipes and shared memory, nothing of libsmc but in `native`.
//!
//! ```text
//! bench serve KIND ADDR        KIND: echo (a thread each), epoll (one thread for all), sink, once, whole SIZE
//! bench rr ADDR SECONDS        one 64-byte message to and fro: `count N p50 US p99 US mean US`
//! bench stream ADDR SECONDS SIZE    writes of SIZE bytes to a sink: `rate MESSAGES/S`
//! bench native …               `serve echo`, `serve sink`, `rr`, `stream` by `smc::net`, and `reserve`: `stream` in place
//! bench streams ADDR SECONDS SIZE N      the same on N connections, a thread each: `rate MESSAGES/S`
//! bench turns ADDR SECONDS SIZE N        as `many`, SIZE bytes to and fro, with `serve whole`: `rate N/S`
//! bench crr ADDR SECONDS       a connection for each request: `rate N/S`
//! bench many ADDR SECONDS N    N connections by epoll, a request under way on each: `rate N/S`
//! bench threads ADDR SECONDS N     N threads, each as rr: `rate N/S`
//! bench idle ADDR N PID        N connections, or as many as there can be, that are idle now, and rr on one of them beside rr
//!                              when there was none but it: `bytes B ms MS idle N times T`
//! bench pipe SECONDS           a byte through a pipe and back out, one thread: `ns NS`
//! bench alone WHAT N           both ends in one thread: see `alone`: `ns NS`
//! bench line SECONDS, bench ring SECONDS SIZE      the limits of the machine: see `raw`
//! ```
//!
//! ADDR is `host:port` or a path. `BENCH_CPU=N` keeps the process on that CPU.

mod native;
mod raw;

use std::fs::{self, File};
use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use std::{env, mem, process, thread};

const MESSAGE: usize = 64;
const BUFFER: usize = 64 << 10;

fn bad(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, what.to_owned())
}

/// A connected socket, as a file: read(2) and write(2).
fn connect(addr: &str) -> io::Result<File> {
    let fd: OwnedFd = if addr.contains('/') {
        UnixStream::connect(addr)?.into()
    } else {
        let s = TcpStream::connect(addr)?;
        s.set_nodelay(true)?;
        s.into()
    };
    Ok(fd.into())
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn new(addr: &str) -> io::Result<Self> {
        Ok(if addr.contains('/') {
            Self::Unix(UnixListener::bind(addr)?)
        } else {
            Self::Tcp(TcpListener::bind(addr)?)
        })
    }

    fn accept(&self) -> io::Result<File> {
        let fd: OwnedFd = match self {
            Self::Tcp(l) => {
                let (s, _) = l.accept()?;
                s.set_nodelay(true)?;
                s.into()
            }
            Self::Unix(l) => l.accept()?.0.into(),
        };
        Ok(fd.into())
    }
}

/// A kernel epoll set.
struct Epoll(File);

impl Epoll {
    fn new() -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: no pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: new, and nobody else has it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    fn add(&self, fd: i32) -> io::Result<()> {
        let mut e = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: `e` is a valid event for the time of the call.
        let r = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut e) };
        if r == 0 { Ok(()) } else { Err(Error::last_os_error()) }
    }

    /// The fds that are readable, into `events`; their number.
    fn wait(&self, events: &mut [libc::epoll_event], ms: i32) -> usize {
        let max = events.len() as i32;
        // SAFETY: `events` has room for `max` events.
        let n = unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), max, ms) };
        n.max(0) as usize
    }
}

const NO_EVENT: libc::epoll_event = libc::epoll_event { events: 0, u64: 0 };

fn echo(mut s: impl Read + Write) -> io::Result<()> {
    let mut buf = vec![0; BUFFER];
    loop {
        let n = s.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        s.write_all(&buf[..n])?;
    }
}

/// Answers when so many bytes are there, with as many.
fn whole(mut s: File, size: usize) -> io::Result<()> {
    let mut buf = vec![0; size];
    loop {
        s.read_exact(&mut buf)?;
        s.write_all(&buf)?;
    }
}

/// Counts to the end of the stream and answers with the count.
fn sink(mut s: impl Read + Write) -> io::Result<()> {
    let (mut buf, mut sum) = (vec![0; BUFFER], 0u64);
    loop {
        let n = s.read(&mut buf)?;
        if n == 0 {
            break;
        }
        sum += n as u64;
    }
    s.write_all(&sum.to_le_bytes())
}

fn serve_epoll(listener: &Listener) -> io::Result<()> {
    let set = Epoll::new()?;
    let l = match listener {
        Listener::Tcp(l) => l.as_raw_fd(),
        Listener::Unix(l) => l.as_raw_fd(),
    };
    set.add(l)?;
    let mut streams: Vec<Option<File>> = Vec::new();
    let (mut events, mut buf) = ([NO_EVENT; 128], vec![0; BUFFER]);
    loop {
        let n = set.wait(&mut events, -1);
        for e in &events[..n] {
            let fd = e.u64 as usize;
            if fd == l as usize {
                let s = listener.accept()?;
                set.add(s.as_raw_fd())?;
                let at = s.as_raw_fd() as usize;
                if streams.len() <= at {
                    streams.resize_with(at + 1, || None);
                }
                streams[at] = Some(s);
            } else if let Some(s) = &mut streams[fd] {
                match s.read(&mut buf) {
                    Ok(n) if n > 0 => s.write_all(&buf[..n])?,
                    _ => streams[fd] = None,
                }
            }
        }
    }
}

fn serve(kind: &str, addr: &str, size: usize) -> io::Result<()> {
    let listener = Listener::new(addr)?;
    let each: fn(File, usize) -> io::Result<()> = match kind {
        "epoll" => return serve_epoll(&listener),
        "once" => loop {
            let mut s = listener.accept()?;
            let mut b = [0; MESSAGE];
            s.read_exact(&mut b)?;
            s.write_all(&b)?;
        },
        "echo" => |s, _| echo(s),
        "sink" => |s, _| sink(s),
        "whole" => whole,
        _ => return Err(bad("no such kind of server")),
    };
    loop {
        let s = listener.accept()?;
        // A client that goes away in the middle is no reason to end.
        thread::spawn(move || drop(each(s, size)));
    }
}

/// Round trips until the time is over; how long each took, in nanoseconds.
fn round_trips(s: &mut (impl Read + Write), time: Duration) -> io::Result<Vec<u32>> {
    let (mut out, mut back) = ([7u8; MESSAGE], [0u8; MESSAGE]);
    let mut took = Vec::with_capacity(1 << 20);
    // The switch to the ring is not what is measured.
    for _ in 0..2000 {
        s.write_all(&out)?;
        s.read_exact(&mut back)?;
    }
    let start = Instant::now();
    let mut last = start;
    while last - start < time {
        out[..8].copy_from_slice(&took.len().to_le_bytes());
        s.write_all(&out)?;
        s.read_exact(&mut back)?;
        let now = Instant::now();
        took.push((now - last).as_nanos() as u32);
        last = now;
        if back != out {
            return Err(bad("another message came back"));
        }
    }
    Ok(took)
}

/// `count N p50 US p99 US mean US`.
fn print_latencies(mut took: Vec<u32>) {
    let n = took.len().max(1);
    let mean = took.iter().map(|t| f64::from(*t)).sum::<f64>() / n as f64;
    took.sort_unstable();
    let at = |q: f64| f64::from(took.get((n as f64 * q) as usize).copied().unwrap_or(0)) / 1e3;
    println!("count {n} p50 {:.4} p99 {:.4} mean {:.4}", at(0.50), at(0.99), mean / 1e3);
}

/// Messages of `size` bytes by `send` until the time is over, then the end by `shut`; the sink must have had them all. How
/// many. `before` bytes were sent already.
fn messages<S: Read>(
    s: &mut S,
    time: Duration,
    size: usize,
    before: u64,
    mut send: impl FnMut(&mut S) -> io::Result<()>,
    shut: impl FnOnce(&S) -> io::Result<()>,
) -> io::Result<u64> {
    // Large ones are not so many that the clock is what is measured.
    let turn = if size < BUFFER { 64 } else { 1 };
    let start = Instant::now();
    let mut n = 0u64;
    while !n.is_multiple_of(turn) || start.elapsed() < time {
        send(s)?;
        n += 1;
    }
    shut(s)?;
    let mut got = [0; 8];
    s.read_exact(&mut got)?;
    if u64::from_le_bytes(got) != before + n * size as u64 {
        return Err(bad("bytes are missing"));
    }
    Ok(n)
}

/// How many in a second `count` counts.
fn rate(count: impl FnOnce() -> io::Result<u64>) -> io::Result<f64> {
    let start = Instant::now();
    Ok(count()? as f64 / start.elapsed().as_secs_f64())
}

fn stream(s: &mut File, time: Duration, size: usize, before: u64) -> io::Result<u64> {
    let block = vec![7u8; size];
    let shut = |s: &File| {
        // SAFETY: no pointers.
        let r = unsafe { libc::shutdown(s.as_raw_fd(), libc::SHUT_WR) };
        if r == 0 { Ok(()) } else { Err(Error::last_os_error()) }
    };
    messages(s, time, size, before, |s| s.write_all(&block), shut)
}

fn streams(addr: &str, time: Duration, size: usize, n: usize) -> io::Result<f64> {
    const FIRST: usize = 8 << 10;
    const TIMES: u64 = 16;
    // One after the other: all at once are more than wait to be accepted. The switch to the ring is not what is measured.
    let mut all = (0..n).map(|_| connect(addr)).collect::<io::Result<Vec<_>>>()?;
    for _ in 0..TIMES {
        all.iter_mut().try_for_each(|s| s.write_all(&[7; FIRST]))?;
        thread::sleep(Duration::from_millis(5));
    }
    let before = TIMES * FIRST as u64;
    // Until the last one is done: those that begin late would count their own time only.
    rate(|| {
        let all: Vec<_> =
            all.into_iter().map(|mut s| thread::spawn(move || stream(&mut s, time, size, before))).collect();
        let mut sum = 0;
        for t in all {
            sum += t.join().map_err(|_| bad("a thread panicked"))??;
        }
        Ok(sum)
    })
}

fn print_rate(rate: f64) {
    println!("rate {rate:.3}");
}

fn crr(addr: &str, time: Duration) -> io::Result<()> {
    let (start, mut n) = (Instant::now(), 0u64);
    let mut b = [7; MESSAGE];
    while start.elapsed() < time {
        let mut s = connect(addr)?;
        s.write_all(&b)?;
        s.read_exact(&mut b)?;
        n += 1;
    }
    println!("rate {:.3}", n as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

/// As many connections, each of which has had `warm` round trips.
fn connections(addr: &str, n: usize, warm: usize) -> io::Result<Vec<File>> {
    let mut b = [7; MESSAGE];
    let mut out = Vec::with_capacity(n);
    for _ in 0..n {
        let mut s = connect(addr)?;
        for _ in 0..warm {
            s.write_all(&b)?;
            s.read_exact(&mut b)?;
        }
        out.push(s);
    }
    Ok(out)
}

/// `size` bytes to and fro on each of `n` connections, by epoll.
fn turns(addr: &str, time: Duration, size: usize, n: usize) -> io::Result<f64> {
    let set = Epoll::new()?;
    let mut b = vec![7; size];
    let mut streams = Vec::new();
    for _ in 0..n {
        let mut s = connect(addr)?;
        // The switch to the ring is not what is measured.
        for _ in 0..if size < BUFFER { 40 } else { 2 } {
            s.write_all(&b)?;
            s.read_exact(&mut b)?;
        }
        set.add(s.as_raw_fd())?;
        let at = s.as_raw_fd() as usize;
        if streams.len() <= at {
            streams.resize_with(at + 1, || None);
        }
        streams[at] = Some(s);
    }
    for s in streams.iter_mut().flatten() {
        s.write_all(&b)?;
    }
    let (start, mut done, mut events) = (Instant::now(), 0u64, [NO_EVENT; 128]);
    while start.elapsed() < time {
        let ready = set.wait(&mut events, 5000);
        if ready == 0 {
            return Err(bad("no answer in 5 s"));
        }
        for e in &events[..ready] {
            if let Some(s) = &mut streams[e.u64 as usize] {
                s.read_exact(&mut b)?;
                s.write_all(&b)?;
                done += 1;
            }
        }
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

fn threads(addr: &str, time: Duration, n: usize) -> io::Result<()> {
    let all: Vec<_> = connections(addr, n, 100)?
        .into_iter()
        .map(|mut s| thread::spawn(move || round_trips(&mut s, time).map(|t| t.len())))
        .collect();
    let mut sum = 0;
    for t in all {
        sum += t.join().map_err(|_| bad("a thread panicked"))??;
    }
    println!("rate {:.3}", sum as f64 / time.as_secs_f64());
    Ok(())
}

/// Memory of both processes, each page that they share counted once; bytes.
fn memory(pids: [u32; 2]) -> io::Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find(|l| l.starts_with("Pss:")).ok_or_else(|| bad("no Pss"))?;
        sum += line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10;
    }
    Ok(sum)
}

/// Time on a CPU of both processes, in nanoseconds.
fn cpu_time(pids: [u32; 2]) -> io::Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
        sum += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

fn median_of_rr(s: &mut File) -> io::Result<f64> {
    let mut took = round_trips(s, Duration::from_millis(300))?;
    took.sort_unstable();
    took.get(took.len() / 2).map(|t| f64::from(*t)).ok_or_else(|| bad("no round trip"))
}

fn idle(addr: &str, n: usize, server: u32) -> io::Result<()> {
    let pids = [process::id(), server];
    drop(connections(addr, 4, 40)?);
    // Twice as many descriptors, and some room, must be had: near the limit nothing is upgraded.
    let n = n.min(descriptors().rlim_cur as usize / 5 * 2);
    let mut one = connections(addr, 1, 40)?;
    let alone = median_of_rr(&mut one[0])?;
    let before = memory(pids)?;
    let all = connections(addr, n, 40)?;
    let after = memory(pids)?;
    // Who has answered just now looks for more for a moment: that is not idle yet.
    thread::sleep(Duration::from_millis(100));
    let cpu = cpu_time(pids)?;
    thread::sleep(Duration::from_secs(1));
    let cpu = cpu_time(pids)? - cpu;
    let among = median_of_rr(&mut one[0])?;
    println!(
        "bytes {} ms {:.3} idle {} times {:.3}",
        after.saturating_sub(before) / n as u64,
        cpu as f64 / 1e6,
        all.len(),
        among / alone
    );
    Ok(())
}

/// The kernel's least: what the shim adds to calls that are not its own shows here most.
fn pipe(time: Duration) -> io::Result<()> {
    let (mut from, mut to) = io::pipe()?;
    let (start, mut n, mut b) = (Instant::now(), 0u64, [7u8; 1]);
    while !n.is_multiple_of(1024) || start.elapsed() < time {
        to.write_all(&b)?;
        from.read_exact(&mut b)?;
        n += 1;
    }
    println!("ns {:.3}", start.elapsed().as_nanos() as f64 / n.max(1) as f64);
    Ok(())
}

/// Both ends in this thread, so that nothing waits: what the calls themselves cost. `what`: `blocking`; `epoll`, one
/// of 50 connections in a set; `poll`; `pipe`; `open`, a descriptor made and closed.
fn alone(what: &str, n: u64) -> io::Result<()> {
    let listener = Listener::new("127.0.0.1:0")?;
    let Listener::Tcp(l) = &listener else { return Err(bad("a TCP listener")) };
    let addr = l.local_addr()?.to_string();
    let mut b = [7; MESSAGE];
    let mut pairs = Vec::new();
    for _ in 0..if what == "epoll" { 50 } else { 1 } {
        pairs.push((connect(&addr)?, listener.accept()?));
    }
    for (a, z) in &mut pairs {
        for _ in 0..100 {
            a.write_all(&b)?;
            z.read_exact(&mut b)?;
            z.write_all(&b)?;
            a.read_exact(&mut b)?;
        }
    }
    let set = Epoll::new()?;
    for (_, z) in &pairs {
        set.add(z.as_raw_fd())?;
    }
    let (mut from, mut to) = io::pipe()?;
    let mut events = [NO_EVENT; 64];
    let (a, z) = &mut pairs[0];
    let start = Instant::now();
    for _ in 0..n {
        match what {
            "pipe" => {
                to.write_all(&b)?;
                from.read_exact(&mut b)?;
                continue;
            }
            "open" => {
                drop(File::open("/dev/null")?);
                continue;
            }
            _ => a.write_all(&b)?,
        }
        match what {
            "epoll" if set.wait(&mut events, -1) != 1 => return Err(bad("one is ready")),
            "poll" => {
                let mut p = libc::pollfd { fd: z.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one element, valid for the call.
                if unsafe { libc::poll(&raw mut p, 1, -1) } != 1 {
                    return Err(bad("it is ready"));
                }
            }
            _ => {}
        }
        z.read_exact(&mut b)?;
    }
    println!("ns {:.3}", start.elapsed().as_nanos() as f64 / n.max(1) as f64);
    Ok(())
}

fn descriptors() -> libc::rlimit {
    let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `l` is a limit to write to.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut l) };
    l
}

/// As many descriptors as may be had, and one CPU if asked for.
fn prepare() {
    for want in [1 << 18, 0] {
        let mut l = descriptors();
        l.rlim_max = l.rlim_max.max(want);
        l.rlim_cur = l.rlim_max;
        // SAFETY: `l` is a limit. Only root may raise the hard one; the second turn does without.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const l) } == 0 {
            break;
        }
    }
    if let Some(cpu) = env::var("BENCH_CPU").ok().and_then(|c| c.parse().ok()) {
        // SAFETY: all zeroes is an empty set.
        let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
        // SAFETY: a set; CPU_SET checks the number.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        // SAFETY: `set` is as large as said. A CPU that is not there leaves things as they are.
        unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    }
}

fn run(args: &[&str]) -> io::Result<()> {
    let seconds = |s: &str| s.parse().map(Duration::from_secs_f64).map_err(|_| bad("SECONDS"));
    let number = |s: &str| s.parse::<usize>().map_err(|_| bad("a number is wanted"));
    match *args {
        ["serve", "whole", size, addr] => serve("whole", addr, number(size)?),
        ["serve", kind, addr] => serve(kind, addr, 0),
        ["native", "serve", kind, addr] => native::serve(kind, addr),
        ["native", "rr", addr, s] => native::rr(addr, seconds(s)?).map(print_latencies),
        ["native", "stream", addr, s, size] => {
            native::stream(addr, seconds(s)?, number(size)?).map(print_rate)
        }
        ["native", "reserve", addr, s, size] => {
            native::reserve(addr, seconds(s)?, number(size)?).map(print_rate)
        }
        ["rr", addr, s] => {
            print_latencies(round_trips(&mut connect(addr)?, seconds(s)?)?);
            Ok(())
        }
        ["stream", addr, s, size] => {
            let (mut to, time, size) = (connect(addr)?, seconds(s)?, number(size)?);
            rate(|| stream(&mut to, time, size, 0)).map(print_rate)
        }
        ["streams", addr, s, size, n] => {
            streams(addr, seconds(s)?, number(size)?, number(n)?).map(print_rate)
        }
        ["turns", addr, s, size, n] => turns(addr, seconds(s)?, number(size)?, number(n)?).map(print_rate),
        ["crr", addr, s] => crr(addr, seconds(s)?),
        ["many", addr, s, n] => turns(addr, seconds(s)?, MESSAGE, number(n)?).map(print_rate),
        ["threads", addr, s, n] => threads(addr, seconds(s)?, number(n)?),
        ["idle", addr, n, pid] => idle(addr, number(n)?, number(pid)? as u32),
        ["alone", what, n] => alone(what, number(n)? as u64),
        ["pipe", s] => pipe(seconds(s)?),
        ["line", s] => raw::line(seconds(s)?).map(print_latencies),
        ["ring", s, size] => {
            println!("rate {:.3}", raw::ring(seconds(s)?, number(size)?)?);
            Ok(())
        }
        _ => Err(bad("usage: see the source")),
    }
}

fn main() {
    prepare();
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Err(e) = run(&args) {
        eprintln!("bench {}: {e}", args.join(" "));
        process::exit(1);
    }
}
