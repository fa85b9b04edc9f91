//! A peer that speaks the rendezvous and then lies, against unmodified programs under the preload.
//!
//! The liar is this process, which is not preloaded: it plays the other end by the engine's own functions, and says
//! something wrong at one place. The program must go on with its other connections, that one must go on by TCP or be
//! reset, no thread may be left spinning, and in the end there are no more descriptors and no more memory than before.
//! SECURITY.md has the promises.

#[path = "harness/mod.rs"]
mod harness;

use harness::{Lib, Random, Run, Running, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use smc::{
    fd::Fd,
    handshake::{Established, Rendezvous, RendezvousConfig, Side, Step, unix},
    mem::{
        layout::{ConnPage, LAYOUT_VERSION, LEFT, SidePage, ctl},
        region::Region,
        rmb::Extent,
    },
    ring::{self, Buffer},
    wait::doorbell,
    wire::clc::{self, Accept, Confirm, Decline, Decoded, Message, Proposal, Sender},
};
use std::{
    env, fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::{Command, ExitCode},
    sync::atomic::{AtomicU32, AtomicU64, Ordering::*},
    thread,
    time::{Duration, Instant},
};

/// Bytes of a message.
const N: usize = 64;
const CONFIG: RendezvousConfig = RendezvousConfig { ring_size: 1 << 16, mem_limit: 1 << 32, fd_base: 300 };
/// The watchdog's patience with one step.
const LIMIT: Duration = Duration::from_secs(30);
/// An end that sees this ends its program.
const QUIT: &[u8; 4] = b"QUIT";

// ---- the programs

/// Answers each connection in turn, in one thread, and never blocks.
fn serve_by_epoll(l: &TcpListener) -> io::Result<()> {
    // SAFETY: takes an integer.
    let ep = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let add = |fd: i32| {
        let mut e = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: one event that lives over the call.
        unsafe { libc::epoll_ctl(ep.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut e) }
    };
    l.set_nonblocking(true)?;
    add(l.as_raw_fd());
    let mut open: Vec<TcpStream> = Vec::new();
    loop {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: room for 16 events.
        let n = unsafe { libc::epoll_wait(ep.as_raw_fd(), events.as_mut_ptr(), 16, -1) };
        for e in &events[..n.max(0) as usize] {
            let fd = e.u64 as i32;
            if fd == l.as_raw_fd() {
                if let Ok((s, _)) = l.accept() {
                    s.set_nonblocking(true)?;
                    add(s.as_raw_fd());
                    open.push(s);
                }
                continue;
            }
            let Some(i) = open.iter().position(|s| s.as_raw_fd() == fd) else { continue };
            if !answer(&mut open[i]) {
                open.remove(i);
            }
        }
    }
}

/// Answers in one thread: what poll calls readable is read, and that may block.
fn serve_by_poll(l: &TcpListener) -> io::Result<()> {
    let mut open: Vec<TcpStream> = Vec::new();
    loop {
        let fds = [l.as_raw_fd()].into_iter().chain(open.iter().map(|s| s.as_raw_fd()));
        let mut list: Vec<_> = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        // SAFETY: the list's own length.
        unsafe { libc::poll(list.as_mut_ptr(), list.len() as u64, -1) };
        for p in list[1..].iter().filter(|p| p.revents != 0) {
            let Some(i) = open.iter().position(|s| s.as_raw_fd() == p.fd) else { continue };
            if !answer(&mut open[i]) {
                open.remove(i);
            }
        }
        if list[0].revents != 0 {
            open.push(l.accept()?.0);
        }
    }
}

/// A thread for each connection.
fn serve_by_threads(l: &TcpListener) -> io::Result<()> {
    loop {
        let mut s = l.accept()?.0;
        thread::spawn(move || while answer(&mut s) {});
    }
}

/// Reads once and writes that back. False: the connection is over.
fn answer(s: &mut TcpStream) -> bool {
    let mut b = [0; 4096];
    match s.read(&mut b) {
        Ok(0) => false,
        Ok(n) if b[..n].starts_with(QUIT) => std::process::exit(0),
        Ok(n) => s.write_all(&b[..n]).is_ok(),
        Err(e) => e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted,
    }
}

/// One connection after the other, each as long as it goes well.
fn ask(port: u16) -> io::Result<()> {
    loop {
        let mut s = TcpStream::connect(("127.0.0.1", port))?;
        let mut b = [7; N];
        while s.write_all(&b).is_ok() && s.read_exact(&mut b).is_ok() {
            if b.starts_with(QUIT) {
                return Ok(());
            }
        }
    }
}

fn program(a: &[String]) -> io::Result<()> {
    if a[0] == "--ask" {
        return ask(a[1].parse().map_err(io::Error::other)?);
    }
    let l = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", l.local_addr()?.port());
    match a[0].as_str() {
        "--epoll" => serve_by_epoll(&l),
        "--poll" => serve_by_poll(&l),
        _ => serve_by_threads(&l),
    }
}

// ---- the liar

/// A connection whose other end is the program, and what was said on it.
struct Peer {
    tcp: TcpStream,
    side: Side,
    /// Bytes sent and received by TCP, and our own cursors.
    sent: u64,
    got: u64,
    prod: u64,
    cons: u64,
    est: Option<Box<Established>>,
}

impl Peer {
    fn new(tcp: TcpStream, side: Side) -> Result<Peer, Failed> {
        tcp.set_nonblocking(true).map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        Ok(Peer { tcp, side, sent: 0, got: 0, prod: 0, cons: 0, est: None })
    }

    fn est(&self) -> &Established {
        self.est.as_ref().expect("established")
    }

    fn page(&self) -> &ConnPage {
        self.est().buffers.page()
    }

    fn me(&self) -> &SidePage {
        &self.page().side[self.side as usize]
    }

    fn it(&self) -> &SidePage {
        &self.page().side[self.side as usize ^ 1]
    }

    fn size(&self) -> u64 {
        self.est().buffers.tx().1 as u64
    }

    fn ring_bell(&self) {
        let _ = unix::send(&self.est().bell, b"!", None);
    }

    /// Sends by TCP, or by the ring once that was announced.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let at = self.est.as_ref().and_then(|_| self.me().tx.switch_at.load(Relaxed).checked_sub(1));
        if at == Some(self.sent) {
            let (p, n) = self.est().buffers.tx();
            // SAFETY: the ring lives as long as the Established; a power of two.
            let buffer = unsafe { Buffer::new(p, n) };
            // SAFETY: far fewer bytes than the ring has; the program takes each message before the next.
            unsafe { buffer.copy_in(self.prod, bytes.as_ptr(), bytes.len()) };
            self.prod += bytes.len() as u64;
            ring::publish(&self.me().tx, self.prod, false);
            if doorbell::after_publish(self.it(), ctl::RX_ARMED, true).ring {
                self.ring_bell();
            }
            return Ok(());
        }
        self.tcp.write_all(bytes)?;
        self.sent += bytes.len() as u64;
        Ok(())
    }

    /// `N` bytes, by the way on which they come.
    fn receive(&mut self) -> io::Result<[u8; N]> {
        let start = Instant::now();
        let (mut b, mut have) = ([0; N], 0);
        while have < N {
            let at = self.est.as_ref().and_then(|_| self.it().tx.switch_at.load(Acquire).checked_sub(1));
            let n = if at == Some(self.got) {
                let (p, size) = self.est().buffers.rx();
                let seen = ring::readable(&self.it().tx, self.cons, size as u64);
                let n = seen.map_or(0, |r| r.bytes).min((N - have) as u64) as usize;
                // SAFETY: the ring lives as long as the Established; a power of two.
                let buffer = unsafe { Buffer::new(p, size) };
                // SAFETY: N - have bytes are left.
                unsafe {
                    buffer.copy_out(ring::at(&self.it().tx, self.cons), b.as_mut_ptr().wrapping_add(have), n)
                };
                self.cons += n as u64;
                ring::release(&self.me().rx, self.cons);
                n
            } else {
                let most = at.map_or(N, |at| at.saturating_sub(self.got).min(N as u64) as usize);
                let end = (have + most).min(N);
                match self.tcp.read(&mut b[have..end]) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(n) => {
                        self.got += n as u64;
                        n
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(e) => return Err(e),
                }
            };
            if n == 0 {
                if start.elapsed() > LIMIT {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                if at == Some(self.got) && self.tcp.peek(&mut [0; 1]).is_ok_and(|n| n == 0) {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                thread::sleep(Duration::from_micros(50));
            }
            have += n;
        }
        Ok(b)
    }

    /// A message and its answer; the asking end speaks first.
    fn round(&mut self) -> io::Result<()> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if self.side == Side::Accept {
            let b = self.receive()?;
            return self.send(&b);
        }
        let m = [NEXT.fetch_add(1, Relaxed) as u8 | 1; N];
        self.send(&m)?;
        if self.receive()? == m { Ok(()) } else { Err(io::Error::other("another answer")) }
    }

    fn rounds(&mut self, n: usize, what: &str) -> Result<(), Failed> {
        (0..n).try_for_each(|_| self.round()).map_err(|e| format!("{what}: {e}").into())
    }

    /// Both directions in the ring.
    fn up(&mut self) -> Result<(), Failed> {
        let mut r = Rendezvous::new(self.side, self.tcp.as_raw_fd(), CONFIG).map_err(|e| e.to_string())?;
        for _ in 0..60 {
            match r.step() {
                Step::Done(est) => {
                    self.est = Some(est);
                    break;
                }
                Step::Failed(why) => return Err(format!("no rendezvous: {why}").into()),
                Step::Pending => self.rounds(1, "during the rendezvous")?,
            }
        }
        ensure(self.est.is_some(), || "the rendezvous comes to nothing".into())?;
        self.me().rx.ready.store(1, Release);
        for _ in 0..60 {
            let ready = self.it().rx.ready.load(Acquire) != 0;
            if ready && self.me().tx.switch_at.load(Relaxed) == 0 {
                self.me().tx.switch_at.store(self.sent + N as u64 + 1, Release);
            }
            self.rounds(1, "on the way to the ring")?;
            if self.prod > 0 && self.cons > 0 {
                return Ok(());
            }
        }
        Err("the ring was not reached".into())
    }
}

// ---- what the program is seen to do

struct Victim {
    program: Running,
    /// Of servers.
    port: u16,
    /// Of clients.
    listener: Option<TcpListener>,
    /// A connection that nobody lies on, for servers.
    healthy: Option<Peer>,
}

fn start(run: &Run, kind: &str) -> Result<Victim, Failed> {
    let mut c = Command::new(env::current_exe().expect("our own path"));
    // Else each new thread may have an arena of 64 MiB of addresses, which malloc keeps.
    c.env("SMC_UPGRADE_AFTER", "0").env("MALLOC_ARENA_MAX", "1");
    if kind == "--ask" {
        let l = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        let port = l.local_addr().map_err(|e| e.to_string())?.port();
        c.args([kind, &port.to_string()]);
        l.set_nonblocking(true).map_err(|e| e.to_string())?;
        return Ok(Victim { program: run.start("ask", c)?, port, listener: Some(l), healthy: None });
    }
    c.arg(kind);
    let mut program = run.start(kind.trim_start_matches('-'), c)?;
    program.until("a port", |s| s.stdout().ends_with('\n'))?;
    let out = program.stdout();
    let port = out.trim().strip_prefix("port ").and_then(|p| p.parse().ok()).ok_or("no port")?;
    let mut v = Victim { program, port, listener: None, healthy: None };
    v.healthy = Some(v.connection()?);
    Ok(v)
}

impl Victim {
    /// The next connection to lie on.
    fn connection(&mut self) -> Result<Peer, Failed> {
        let Some(l) = &self.listener else {
            let tcp = TcpStream::connect(("127.0.0.1", self.port)).map_err(|e| e.to_string())?;
            return Peer::new(tcp, Side::Connect);
        };
        let mut tcp = None;
        self.program.until("the next connection", |_| {
            tcp = l.accept().ok();
            tcp.is_some()
        })?;
        Peer::new(tcp.expect("just seen").0, Side::Accept)
    }

    /// It lives, and serves somebody else.
    fn goes_on(&mut self, what: &str) -> Result<(), Failed> {
        if let Some(end) = self.program.ended() {
            return Err(format!("{what}: the program has ended: {end}\n{}", self.program.stderr()).into());
        }
        match &mut self.healthy {
            Some(h) => h.rounds(2, &format!("{what}: another connection")),
            None => Ok(()), // The next connection of a client is the proof.
        }
    }

    /// No thread of it is on a CPU, or waits for one, all the time though nobody says anything.
    fn rests(&self, what: &str) -> Result<(), Failed> {
        let busy = || {
            let tasks =
                fs::read_dir(format!("/proc/{}/task", self.program.pid())).into_iter().flatten().flatten();
            let times = tasks.filter_map(|t| {
                let s = fs::read_to_string(t.path().join("schedstat")).ok()?;
                Some(s.split_whitespace().take(2).filter_map(|n| n.parse::<u64>().ok()).sum::<u64>())
            });
            times.sum::<u64>()
        };
        // Spinning before a sleep, or a last message, is no harm: what does not end is.
        let mut spun = 0.0;
        for _ in 0..5 {
            let (start, before) = (Instant::now(), busy());
            thread::sleep(Duration::from_millis(60));
            spun = busy().saturating_sub(before) as f64 / start.elapsed().as_nanos() as f64;
            if spun < 0.5 {
                return Ok(());
            }
        }
        Err(format!("{what}: it spins: {spun:.2} of the time").into())
    }

    fn holdings(&self) -> (usize, u64) {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.program.pid())).map_or(0, |d| d.count());
        let status = fs::read_to_string(format!("/proc/{}/status", self.program.pid())).unwrap_or_default();
        let size =
            status.lines().find_map(|l| l.strip_prefix("VmSize:")?.split_whitespace().next()?.parse().ok());
        (fds, size.unwrap_or(0))
    }

    /// No more descriptors and memory than `before`, but for what the allocator keeps.
    fn holds_no_more_than(&mut self, before: (usize, u64)) -> Result<(), Failed> {
        const SLACK_KIB: u64 = 16 << 10;
        let pid = self.program.pid();
        let mut now = before;
        let healthy = &mut self.healthy;
        self.program
            .until("what it held before", |s| {
                // It may let go in its next call only.
                let _ = healthy.as_mut().map(Peer::round);
                let fds = fs::read_dir(format!("/proc/{}/fd", s.pid())).map_or(0, |d| d.count());
                now.0 = fds;
                fds <= before.0
            })
            .map_err(|_| format!("{pid}: {} descriptors before, {} after", before.0, now.0))?;
        now = self.holdings();
        ensure(now.1 <= before.1 + SLACK_KIB, || format!("{} KiB before, {} after", before.1, now.1))
    }

    fn end(mut self) -> Result<(), Failed> {
        let mut p = self.connection()?;
        let mut m = [0; N];
        m[..4].copy_from_slice(QUIT);
        if p.side == Side::Accept {
            p.receive().map_err(|e| e.to_string())?;
        }
        p.send(&m).map_err(|e| e.to_string())?;
        let stats = self.program.finish()?.stats;
        ensure(stats.shm > 0 && stats.files == 1, || format!("nothing was upgraded: {stats:?}"))
    }
}

// ---- lies in memory and on the doorbell

/// What must become of the connection.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Messages go through as before.
    Goes,
    /// The program ends it with a reset.
    Reset,
    /// It is the liar's own fault whatever happens to it.
    Any,
}
use Fate::*;

type Lie = (&'static str, Fate, fn(&mut Peer));

const LIES: &[Lie] = &[
    ("nothing", Goes, |_| {}),
    ("prod beyond the ring", Reset, |p| {
        p.me().tx.prod.store(p.prod + p.size() + 1, Release);
        p.ring_bell();
    }),
    ("prod goes back", Reset, |p| {
        // A client may still be at the last answer.
        while p.it().rx.cons.load(Acquire) != p.prod {
            thread::yield_now();
        }
        p.me().tx.prod.store(p.prod - 1, Release);
        p.ring_bell();
    }),
    ("prod is enormous", Reset, |p| {
        p.me().tx.prod.store(LEFT - 1, Release);
        p.ring_bell();
    }),
    ("prod is all ones", Reset, |p| {
        p.me().tx.prod.store(u64::MAX, Release);
        p.ring_bell();
    }),
    ("cons beyond what was sent", Any, |p| {
        p.me().rx.cons.store(p.cons + 1, Release);
        fill(p);
    }),
    ("cons goes back", Any, |p| {
        p.me().rx.cons.store(p.cons.wrapping_sub(p.size()), Release);
        fill(p);
    }),
    ("cons never moves", Any, fill),
    ("stop in the past", Any, |p| stop(p, 0)),
    ("stop beyond the ring", Any, |p| stop(p, u64::MAX)),
    ("stop one byte on", Any, |p| stop(p, p.cons + 1)),
    ("stop that is taken back", Any, |p| {
        stop(p, p.cons);
        p.me().ctl.ctl.store(0, Release);
    }),
    ("asks and never stops", Any, |p| {
        p.me().ctl.ctl.fetch_or(ctl::RX_ASK, AcqRel);
        p.ring_bell();
    }),
    ("leaves and comes back", Any, |p| {
        ring::publish(&p.me().tx, p.prod, true);
        p.ring_bell();
        let _ = p.me().tx.prod.swap(p.prod, AcqRel);
    }),
    ("leaves without the mark", Any, |p| {
        ring::publish(&p.me().tx, p.prod, true);
        p.ring_bell();
    }),
    ("the mark of a stop that is the program's", Goes, |p| {
        p.it().ctl.ctl.fetch_or(ctl::RX_STOP, AcqRel);
        p.ring_bell();
    }),
    ("the mark that it has left, and has not", Goes, |p| {
        p.it().ctl.ctl.fetch_or(ctl::PEER_LEFT, AcqRel);
        p.ring_bell();
    }),
    ("every bit of the program's word", Any, |p| {
        p.it().ctl.ctl.store(u32::MAX, Release);
        p.ring_bell();
    }),
    ("every bit of both words", Any, |p| {
        p.it().ctl.ctl.store(u32::MAX, Release);
        p.me().ctl.ctl.store(u32::MAX, Release);
        p.ring_bell();
    }),
    ("another offset for the switch that was", Goes, |p| {
        let at = p.me().tx.switch_at.load(Relaxed);
        p.me().tx.switch_at.store(at + 1000, Release);
        p.ring_bell();
        p.me().tx.switch_at.store(at, Release);
    }),
    ("not ready any more", Goes, |p| p.me().rx.ready.store(0, Release)),
    ("both sides have let go", Goes, |p| {
        p.page().side.iter().for_each(|s| s.hint.detached.store(1, Release));
    }),
    ("on every CPU", Goes, |p| p.me().hint.cpu.store(u32::MAX, Release)),
    ("flags that flip", Any, flip),
    ("a page of zeros", Any, |p| scribble(p, &mut |_| 0)),
    ("a page of ones", Any, |p| scribble(p, &mut |_| u64::MAX)),
    ("a page of small numbers", Any, |p| scribble(p, &mut |i| i as u64)),
    ("a page of chance", Any, |p| {
        let mut r = Random::new();
        for _ in 0..200 {
            scribble(p, &mut |_| r.below(1 << 31) << r.below(34));
            p.ring_bell();
        }
    }),
    ("holes in all of it", Any, holes),
    ("the doorbell is closed", Any, |p| unix::shutdown(&p.est().bell)),
    ("the doorbell is closed, bytes in the ring", Any, |p| {
        let _ = p.send(&[1; N]);
        unix::shutdown(&p.est().bell);
    }),
    ("the doorbell falls silent", Any, |p| {
        // SAFETY: takes integers.
        unsafe { libc::shutdown(p.est().bell.raw(), libc::SHUT_WR) };
    }),
    ("the doorbell is not read", Any, |p| {
        // SAFETY: takes integers.
        unsafe { libc::shutdown(p.est().bell.raw(), libc::SHUT_RD) };
    }),
    ("the doorbell rings all the time", Reset, flood),
    ("the doorbell rings a thousand times", Any, |p| (0..1000).for_each(|_| p.ring_bell())),
    ("the doorbell brings descriptors", Goes, |p| {
        for fd in strange_fds() {
            let _ = unix::send(&p.est().bell, b"!", Some(&fd));
        }
    }),
    ("the doorbell rings out of band", Goes, |p| {
        for _ in 0..3 {
            let flags = libc::MSG_OOB | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: one byte of a literal.
            unsafe { libc::send(p.est().bell.raw(), b"!".as_ptr().cast(), 1, flags) };
        }
    }),
    ("FIN with the ring unread", Any, |p| {
        let _ = p.send(&[1; N]);
        let _ = p.tcp.shutdown(std::net::Shutdown::Write);
    }),
    ("bytes by TCP that are not announced", Any, |p| {
        let _ = p.tcp.write_all(&[1; N]);
    }),
];

/// Says so much that the answers fill the ring, of which nothing is taken.
fn fill(p: &mut Peer) {
    let (mut room, size) = (p.size() * 2, p.size());
    let start = Instant::now();
    while room > 0 && start.elapsed() < Duration::from_millis(100) {
        if p.prod.wrapping_sub(p.it().rx.cons.load(Acquire)) <= size - N as u64 {
            let _ = p.send(&[5; N]);
            room = room.saturating_sub(N as u64);
        }
    }
}

fn stop(p: &mut Peer, at: u64) {
    let _ = p.send(&[1; N]);
    p.me().rx.stop_at.store(at, Release);
    p.me().ctl.ctl.fetch_or(ctl::RX_STOP, AcqRel);
    p.ring_bell();
}

fn flip(p: &mut Peer) {
    for i in 0..50_000u32 {
        p.me().ctl.ctl.store(i & 31, Release);
        p.it().ctl.ctl.fetch_xor(1 << (i % 5), AcqRel);
        p.me().rx.stop_at.store(u64::from(i), Release);
        p.me().tx.switch_at.store(u64::from(i % 3), Release);
        let left = if i & 64 != 0 { LEFT } else { 0 };
        p.me().tx.prod.store((p.prod + u64::from(i & 63)) | left, Release);
        if i % 512 == 0 {
            p.ring_bell();
        }
    }
    p.me().ctl.ctl.store(0, Release);
}

/// Each word of the page, the program's own too.
fn scribble(p: &Peer, word: &mut dyn FnMut(usize) -> u64) {
    let page = std::ptr::from_ref(p.page()).cast::<AtomicU64>();
    for i in 0..size_of::<ConnPage>() / 8 {
        // SAFETY: inside the page, which is atomics only.
        unsafe { &*page.wrapping_add(i) }.store(word(i), Release);
    }
    p.ring_bell();
}

fn holes(p: &mut Peer) {
    let page = std::ptr::from_ref(p.page()) as usize & !4095;
    let parts = [p.est().buffers.tx(), p.est().buffers.rx(), (page as *mut u8, 4096)];
    for (at, n) in parts {
        // SAFETY: whole pages of the shared mapping, of which nobody here holds a reference.
        unsafe { libc::madvise(at.cast(), n, libc::MADV_REMOVE) };
    }
    p.ring_bell();
}

/// Until the program hangs up.
fn flood(p: &mut Peer) {
    let lots = [1; 1 << 16];
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        match unix::send(&p.est().bell, &lots, None) {
            Ok(_) | Err(libc::EAGAIN) => {}
            Err(_) => return,
        }
        // It looks at its doorbell when it has something to do.
        let _ = p.send(&[1; N]);
        if p.tcp.peek(&mut [0; 1]).is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock) {
            return;
        }
    }
}

fn open(path: &str, flags: i32) -> Fd {
    let path = std::ffi::CString::new(path).expect("no NUL");
    // SAFETY: a NUL-terminated path.
    Fd::from_raw(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) })
}

/// Descriptors of every kind that are no sealed memory.
fn strange_fds() -> Vec<Fd> {
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    unsafe { libc::pipe(pipe.as_mut_ptr()) };
    // SAFETY: takes integers, and a NUL-terminated name.
    let (socket, unsealed) = unsafe {
        (libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0), libc::memfd_create(c"unsealed".as_ptr(), 0))
    };
    // SAFETY: takes integers.
    unsafe { libc::ftruncate(unsealed, 4 << 20) };
    let mut fds: Vec<_> = [pipe[0], pipe[1], socket, unsealed].map(Fd::from_raw).into();
    fds.push(open("/", libc::O_RDONLY | libc::O_DIRECTORY));
    fds.push(open("/dev/zero", libc::O_RDWR));
    fds.push(open("/proc/self/mem", libc::O_RDWR));
    for (len, seals) in [
        (4 << 20, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW),
        (4 << 20, libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL),
        (4 << 20, libc::F_SEAL_GROW | libc::F_SEAL_SEAL),
        (1 << 20, ALL_SEALS),
        (4096, ALL_SEALS),
        (0, ALL_SEALS),
        (4 << 20, ALL_SEALS | libc::F_SEAL_WRITE),
        (4 << 20, ALL_SEALS | libc::F_SEAL_FUTURE_WRITE),
    ] {
        // SAFETY: takes integers, and a NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING) };
        // SAFETY: takes integers.
        unsafe { libc::ftruncate(fd, len) };
        // SAFETY: takes integers.
        unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) };
        fds.push(Fd::from_raw(fd));
    }
    // SAFETY: takes integers, and a NUL-terminated name.
    let huge = unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB | libc::MFD_ALLOW_SEALING) };
    if huge >= 0 {
        fds.push(Fd::from_raw(huge));
    }
    fds
}

const ALL_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

fn tell(v: &mut Victim, &(what, fate, lie): &Lie) -> Result<(), Failed> {
    let mut p = v.connection()?;
    p.up().map_err(|e| format!("{what}: {}", e.message().unwrap_or("")))?;
    lie(&mut p);
    match fate {
        Goes => p.rounds(8, what)?,
        Reset => {
            // A server that sleeps in a call has been woken; one that does not waits for the next message.
            let _ = p.tcp.write_all(&[1; N]);
            let start = Instant::now();
            let is_reset = |p: &Peer| match p.tcp.peek(&mut [0; 1]) {
                Ok(n) => n == 0,
                Err(e) => e.kind() != io::ErrorKind::WouldBlock,
            };
            while !is_reset(&p) {
                ensure(start.elapsed() < LIMIT, || format!("{what}: not reset"))?;
                thread::sleep(Duration::from_millis(1));
            }
        }
        Any => {
            let _ = p.tcp.write_all(&[1; N]);
        }
    }
    v.goes_on(what)?;
    v.rests(what)?;
    drop(p);
    v.goes_on(what)
}

fn run_for(name: &str) -> Result<Run, Failed> {
    let lib = Lib::find()?;
    let mut run = Run::new(name);
    run.limit(LIMIT);
    run.preload(&lib);
    Ok(run)
}

fn lies_to(kind: &str) -> Result<(), Failed> {
    let run = run_for("lies")?;
    let mut v = start(&run, kind)?;
    LIES[..4].iter().try_for_each(|l| tell(&mut v, l))?;
    let before = settled(&mut v)?;
    // A blocking write to a peer that takes nothing stays in it, as on TCP: one thread can't serve others then.
    // (So does one whose peer is known to be gone and not yet known how: the doorbell closed, bytes unread.)
    let takes_nothing = |l: &&Lie| l.0.starts_with("cons ") || l.0.ends_with("bytes in the ring");
    let fair = LIES.iter().filter(|l| kind != "--poll" || !takes_nothing(l));
    fair.into_iter().try_for_each(|l| tell(&mut v, l))?;
    v.holds_no_more_than(before)?;
    v.end()
}

/// What it holds with nothing but the next connection, for a client, or the healthy one, for a server.
fn settled(v: &mut Victim) -> Result<(usize, u64), Failed> {
    v.goes_on("at first")?;
    thread::sleep(Duration::from_millis(300));
    let _ = v.goes_on("at first");
    let (fds, size) = v.holdings();
    // A connection that is just ending may or may not be among them.
    Ok((fds + 2, size))
}

// ---- lies in the handshake

fn sender(side: Side, tcp: &TcpStream) -> Sender {
    Sender {
        layout_version: LAYOUT_VERSION,
        role: side,
        instance: 0x5ec_0de5,
        pid: std::process::id(),
        cookie: unix::cookie(tcp.as_raw_fd()).unwrap_or(0),
    }
}

/// The Unix socket to the program, which is at its next calls meanwhile.
fn meet(p: &mut Peer) -> Result<Fd, Failed> {
    let (local, peer) =
        (p.tcp.local_addr().map_err(|e| e.to_string())?, p.tcp.peer_addr().map_err(|e| e.to_string())?);
    let listener = match p.side {
        Side::Connect => {
            Some(unix::listen(&unix::Name::of(local, peer), 300).map_err(|e| format!("errno {e}"))?)
        }
        Side::Accept => None,
    };
    for _ in 0..60 {
        p.rounds(1, "before the rendezvous")?;
        let met = match &listener {
            Some(l) => unix::accept(l, 300),
            None => {
                let fd = unix::connector(300).map_err(|e| format!("errno {e}"))?;
                unix::connect(&fd, &unix::Name::of(peer, local)).map(|()| fd)
            }
        };
        if let Ok(fd) = met {
            return Ok(fd);
        }
    }
    Err("the program does not come to the rendezvous".into())
}

/// The program's next message, and what came with it.
fn hear(p: &mut Peer, talk: &Fd) -> Result<(Message, Vec<Fd>), Failed> {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let mut b = [0; 256];
        if let Ok(n) = unix::recv(talk, &mut b, &mut fds) {
            bytes.extend_from_slice(&b[..n]);
        }
        if let Ok(Decoded::Message(m, _)) = clc::decode(&bytes) {
            return Ok((m, fds));
        }
        p.rounds(1, "waiting for a message")?;
    }
    Err("no message".into())
}

/// What is said in place of `right`: whole messages, and how the socket is left.
fn wrong(right: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    for i in 0..right.len() {
        let with = |v: u8| {
            let mut b = right.to_vec();
            b[i] = v;
            b
        };
        out.push((format!("byte {i} turned"), with(!right[i])));
        out.push((format!("byte {i} one more"), with(right[i].wrapping_add(1))));
    }
    for n in [0, 1, 4, 7, 8, 9, right.len() / 2, right.len() - 1] {
        out.push((format!("{n} bytes only"), right[..n].to_vec()));
    }
    for len in [0u16, 7, 8, right.len() as u16 - 1, right.len() as u16 + 1, 256, 257, u16::MAX] {
        let mut b = right.to_vec();
        b[5..7].copy_from_slice(&len.to_be_bytes());
        b.resize(b.len().max(usize::from(len)), 0xe2);
        out.push((format!("length {len}"), b));
    }
    out.push(("twice".into(), [right, right].concat()));
    out.push(("and 60 KiB more".into(), [right, &[1; 60 << 10]].concat()));
    let s = Sender { layout_version: LAYOUT_VERSION, role: Side::Connect, instance: 1, pid: 1, cookie: 1 };
    for m in [
        Message::Confirm(Confirm { sender: s, lgr: 1, segment: 1 }),
        Message::Decline(Decline { instance: 1, diagnosis: 1, out_of_sync: true }),
        Message::Decline(Decline { instance: 1, diagnosis: u32::MAX, out_of_sync: false }),
    ] {
        out.push((format!("{m:?}"), clc::encode(&m).as_bytes().to_vec()));
    }
    out
}

/// After whatever was said: the bytes go on by TCP, and somebody else is served.
fn still_there(v: &mut Victim, p: &mut Peer, what: &str) -> Result<(), Failed> {
    p.rounds(4, what)?;
    v.goes_on(what)
}

/// Sends the first `n` of more descriptors than a message of ours has.
fn send_fds(talk: &Fd, bytes: &[u8], n: usize) {
    let fd = open("/", libc::O_RDONLY | libc::O_DIRECTORY);
    let mut control = vec![0u64; 2 + n.div_ceil(2)];
    let len = 16 + 4 * n;
    control[0] = len as u64;
    control[1] = libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32;
    for i in 0..n {
        control[2 + i / 2] |= (fd.raw() as u32 as u64) << (32 * (i % 2));
    }
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, for which zero is a value.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    (m.msg_iov, m.msg_iovlen) = (&raw mut iov, 1);
    (m.msg_control, m.msg_controllen) = (control.as_mut_ptr().cast(), len as _);
    // SAFETY: everything the header names outlives the call.
    unsafe { libc::sendmsg(talk.raw(), &raw const m, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
}

/// To an accepting program: the Proposal, then the Confirm.
fn handshake_to_a_server(kind: &str) -> Result<(), Failed> {
    let run = run_for("handshake")?;
    let mut v = start(&run, kind)?;
    tell(&mut v, &LIES[0])?;
    let before = settled(&mut v)?;
    let proposal = |p: &Peer| {
        clc::encode(&Message::Proposal(Proposal {
            sender: sender(Side::Connect, &p.tcp),
            ring_size: 1 << 16,
            known_instance: 0,
            known_lgr: 0,
            known_segments: 0,
        }))
    };
    let mut p = v.connection()?;
    let count = wrong(proposal(&p).as_bytes()).len();
    for i in 0..count {
        let talk = meet(&mut p)?;
        let (what, bytes) = wrong(proposal(&p).as_bytes()).swap_remove(i);
        let _ = unix::send(&talk, &bytes, None);
        still_there(&mut v, &mut p, &format!("Proposal: {what}"))?;
        if i % 2 == 0 {
            drop(talk);
            still_there(&mut v, &mut p, &format!("Proposal: {what}, and closed"))?;
        }
        p = v.connection()?;
    }
    for fd in strange_fds() {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        let _ = unix::send(&talk, proposal(&p).as_bytes(), Some(&fd));
        still_there(&mut v, &mut p, "Proposal with a descriptor")?;
    }
    for n in [2, 4, 5, 253] {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        send_fds(&talk, proposal(&p).as_bytes(), n);
        still_there(&mut v, &mut p, "Proposal with many descriptors")?;
    }
    // The Confirm, of each of which a reset is as good an end: after it the stream may have moved.
    for i in 0..count {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        let _ = unix::send(&talk, proposal(&p).as_bytes(), None);
        let (m, fds) = hear(&mut p, &talk)?;
        let Message::Accept(a) = m else { return Err(format!("no Accept but {m:?}").into()) };
        ensure(fds.len() == 1 && a.first_contact, || "an Accept without its memory".into())?;
        let right = clc::encode(&Message::Confirm(Confirm {
            sender: sender(Side::Connect, &p.tcp),
            lgr: a.lgr,
            segment: a.segment,
        }));
        let mut lies = wrong(right.as_bytes());
        if i >= lies.len() {
            break;
        }
        let (what, bytes) = lies.swap_remove(i);
        let _ = unix::send(&talk, &bytes, None);
        still_there(&mut v, &mut p, &format!("Confirm: {what}"))?;
        drop(talk);
        still_there(&mut v, &mut p, &format!("Confirm: {what}, and closed"))?;
    }
    drop(p);
    v.rests("after all")?;
    v.holds_no_more_than(before)?;
    v.end()
}

/// To a connecting program: the Accept.
fn handshake_to_a_client() -> Result<(), Failed> {
    let run = run_for("handshake-client")?;
    let mut v = start(&run, "--ask")?;
    tell(&mut v, &LIES[0])?;
    let before = settled(&mut v)?;
    let extent = Extent::at(1 << 16, 1 << 16);
    let accept = |p: &Peer| {
        clc::encode(&Message::Accept(Accept {
            sender: sender(Side::Accept, &p.tcp),
            lgr: 9,
            segment: 0,
            first_contact: true,
            segment_size: 4 << 20,
            page: extent.page as u64,
            rings: extent.rings.map(|r| r as u64),
            ring_size: 1 << 16,
        }))
    };
    let memory = || Region::create(4 << 20, u64::MAX).map_err(|e| format!("{e:?}"));
    let mut i = 0;
    loop {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        let mut lies = wrong(accept(&p).as_bytes());
        if i == lies.len() {
            break;
        }
        let (what, bytes) = lies.swap_remove(i);
        i += 1;
        hear(&mut p, &talk)?;
        let (_region, fd) = memory()?;
        let _ = unix::send(&talk, &bytes, Some(&fd));
        still_there(&mut v, &mut p, &format!("Accept: {what}"))?;
    }
    for fd in strange_fds() {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        hear(&mut p, &talk)?;
        let _ = unix::send(&talk, accept(&p).as_bytes(), Some(&fd));
        still_there(&mut v, &mut p, "Accept with another descriptor")?;
        let end = hear(&mut p, &talk)?.0;
        ensure(matches!(end, Message::Decline(_)), || format!("it was taken: {end:?}"))?;
    }
    for n in [0, 2, 4, 5, 253] {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        hear(&mut p, &talk)?;
        send_fds(&talk, accept(&p).as_bytes(), n);
        still_there(&mut v, &mut p, "Accept with many descriptors")?;
    }
    for (what, change) in ACCEPTS {
        let mut p = v.connection()?;
        let talk = meet(&mut p)?;
        hear(&mut p, &talk)?;
        let Ok(Decoded::Message(Message::Accept(mut a), _)) = clc::decode(accept(&p).as_bytes()) else {
            return Err("our own message".into());
        };
        change(&mut a);
        let (_region, fd) = memory()?;
        let _ = unix::send(&talk, clc::encode(&Message::Accept(a)).as_bytes(), Some(&fd));
        still_there(&mut v, &mut p, what)?;
        let end = hear(&mut p, &talk)?.0;
        ensure(matches!(end, Message::Decline(_)), || format!("{what}: it was taken: {end:?}"))?;
    }
    v.rests("after all")?;
    v.holds_no_more_than(before)?;
    v.end()
}

fn lies_at(a: &mut Accept, block: usize, ring: usize) {
    let extent = Extent::at(block, ring);
    (a.page, a.rings, a.ring_size) = (extent.page as u64, extent.rings.map(|r| r as u64), ring as u32);
}

type WrongAccept = (&'static str, fn(&mut Accept));

/// Accepts that must be declined.
const ACCEPTS: &[WrongAccept] = &[
    ("a page beyond the segment", |a| a.page = 4 << 20),
    ("a page half beyond it", |a| a.page = (4 << 20) - 64),
    ("a page at an odd place", |a| a.page = 8),
    ("a page in a ring", |a| a.page = 1 << 16),
    ("a ring at the end of all numbers", |a| a.rings[0] = u64::MAX - 4095),
    ("a ring beyond the segment", |a| a.rings[1] = (4 << 20) - 4096),
    ("rings on each other", |a| a.rings[1] = a.rings[0]),
    ("a ring of no power of two", |a| a.ring_size = 3 << 14),
    ("a ring of nothing", |a| a.ring_size = 0),
    ("rings that have changed places", |a| a.rings.reverse()),
    ("all of it half beyond the segment", |a| lies_at(a, (4 << 20) - (1 << 16), 1 << 16)),
    ("all of it at an odd place", |a| lies_at(a, (1 << 16) + 64, 1 << 16)),
    ("a ring larger than was asked for", |a| lies_at(a, 0, 1 << 20)),
    ("a segment of another size", |a| a.segment_size = 8 << 20),
    ("a segment of 2^63 bytes", |a| a.segment_size = 1 << 63),
    ("no instance", |a| a.sender.instance = 0),
    ("another cookie", |a| a.sender.cookie ^= 1),
    ("our own role", |a| a.sender.role = Side::Connect),
];

// ---- promises and secrets

/// poll says that there are bytes, and they are taken back before the read that may block.
fn bytes_that_are_taken_back() -> Result<(), Failed> {
    let run = run_for("promise")?;
    let mut v = start(&run, "--poll")?;
    let mut p = v.connection()?;
    p.up()?;
    let pause = |us: u64| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(us) {
            std::hint::spin_loop();
        }
    };
    let mut random = Random::new();
    for _ in 0..3_000 {
        ring::publish(&p.me().tx, p.prod + 1, false);
        if doorbell::after_publish(p.it(), ctl::RX_ARMED, true).ring {
            p.ring_bell();
        }
        pause(random.below(100));
        ring::publish(&p.me().tx, p.prod, false);
        pause(random.below(20));
        if p.tcp.peek(&mut [0; 1]).is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock) {
            break;
        }
    }
    v.goes_on("bytes that were taken back")?;
    drop(p);
    v.end()
}

const SECRET: &[u8; 16] = b"nobody else's 42";

/// A preloaded program says it on a connection of its own, and stays.
fn keep_secret(port: u16) -> io::Result<()> {
    let mut s = TcpStream::connect(("127.0.0.1", port))?;
    let m: Vec<u8> = SECRET.iter().copied().cycle().take(4096).collect();
    let mut b = vec![0; m.len()];
    for _ in 0..200 {
        s.write_all(&m)?;
        s.read_exact(&mut b)?;
    }
    println!("said");
    while env::var_os("STAY").is_some_and(|p| fs::metadata(p).is_ok()) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What a peer can map holds nothing of other peers' connections, while they last and after.
fn no_stale_data() -> Result<(), Failed> {
    let run = run_for("stale")?;
    let mut v = start(&run, "--threads")?;
    let stay = run.path("stay");
    fs::write(&stay, "").map_err(|e| e.to_string())?;
    let mut c = Command::new(env::current_exe().expect("our own path"));
    c.args(["--secret", &v.port.to_string()]).env("SMC_UPGRADE_AFTER", "0").env("STAY", &stay);
    let mut other = run.start("secret", c)?;
    other.until("the secret was told", |s| s.stdout().contains("said"))?;
    // Our own secret, on a connection that ends while another keeps the link group.
    let mut keep = v.connection()?;
    keep.up()?;
    let mut mine = v.connection()?;
    mine.up()?;
    let (p, n) = mine.est().buffers.tx();
    for at in (0..n).step_by(SECRET.len()) {
        // SAFETY: inside the ring, whose size is a multiple of the secret's.
        unsafe { std::ptr::copy_nonoverlapping(SECRET.as_ptr(), p.add(at), SECRET.len()) };
    }
    ensure(reachable(&mine)? > 0, || "the search finds nothing where there is something".into())?;
    let mut place = Some(p);
    drop(mine);
    for after in [false, true] {
        if after {
            fs::remove_file(&stay).map_err(|e| e.to_string())?;
            other.until("the end of the other", |_| false).err();
        }
        // The program gives buffers back in its own time.
        let mut p = v.connection()?;
        p.up()?;
        if place.take() == Some(p.est().buffers.tx().0) {
            let of = |(p, n): (*mut u8, usize)| found(p, n);
            ensure(of(p.est().buffers.tx()) + of(p.est().buffers.rx()) == 0, || "in new buffers".into())?;
        }
        for peer in [&p, &keep] {
            let n = reachable(peer)?;
            ensure(n == 0, || format!("{n} times, the other has ended: {after}"))?;
        }
    }
    let stats = run.stats("secret")?;
    ensure(stats.shm_share() > 0.9, || format!("the secret did not go by memory: {stats:?}"))?;
    drop(keep);
    v.end()
}

fn found(p: *mut u8, n: usize) -> usize {
    // SAFETY: a mapping of `n` bytes, which nobody writes to while this looks.
    unsafe { std::slice::from_raw_parts(p, n) }.windows(SECRET.len()).filter(|w| *w == SECRET).count()
}

/// How often the secret is in the segment that holds the connection's buffers: all that the peer has mapped.
fn reachable(p: &Peer) -> Result<usize, Failed> {
    let at = p.est().buffers.tx().0 as usize;
    let maps = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    for l in maps.lines() {
        let Some((from, to)) = l.split(' ').next().and_then(|r| r.split_once('-')) else { continue };
        let hex = |s| usize::from_str_radix(s, 16).unwrap_or(0);
        if (hex(from)..hex(to)).contains(&at) {
            return Ok(found(hex(from) as *mut u8, hex(to) - hex(from)));
        }
    }
    Err("no such mapping".into())
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let programs = ["--epoll", "--poll", "--threads", "--ask"];
    let result = match args.first() {
        Some(a) if programs.contains(&a.as_str()) => program(&args),
        Some(a) if a == "--secret" => keep_secret(args[1].parse().unwrap_or(0)),
        _ => {
            let t = |name: &str, f: fn() -> Result<(), Failed>| Trial::test(name, f);
            let trials = vec![
                t("lies_to_a_server_with_epoll", || lies_to("--epoll")),
                t("lies_to_a_server_with_poll", || lies_to("--poll")),
                t("lies_to_a_server_with_threads", || lies_to("--threads")),
                t("lies_to_a_client", || lies_to("--ask")),
                t("handshake_lies_to_a_server", || handshake_to_a_server("--epoll")),
                t("handshake_lies_to_a_client", handshake_to_a_client),
                t("bytes_that_are_taken_back", bytes_that_are_taken_back),
                t("no_stale_data", no_stale_data),
            ];
            return libtest_mimic::run(&Arguments::from_args(), trials).exit_code();
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}: {e}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}
