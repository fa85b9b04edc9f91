//! The randomised twin: random calls on a connection give the same on plain TCP and under the preload.
//!
//! A *play* is drawn from a seed: connections, and on both their ends sends and receives of every kind, options,
//! waits, signals, edge-triggered and one-shot epoll, urgent bytes, copies of the fd, descriptors in messages, forked children
//! and the programs they become, every way to end. It is played by a process and an agent (a thread or a process, see
//! `sockets/world.rs`), once on plain TCP and once under the preload with settings that are
//! drawn too: when to upgrade, how small the ring is, after how many calls directions are forced back to TCP.
//! The two transcripts must be the same line by line.
//!
//! What TCP leaves open is not in them: a read is repeated until the bytes are there, and readiness is looked at
//! only when all that was sent has arrived.
//!
//!     cargo test --release --test random                      some seconds, seeds by the clock, printed
//!     SMC_RANDOM_SECONDS=3600 cargo test …                    longer
//!     SMC_RANDOM_SEED=17 cargo test …                         this play only, in each of its settings
//!
//! `random --play SEED PLACE` prints one transcript.

#[path = "harness/mod.rs"]
mod harness;
#[path = "sockets/sys.rs"]
mod sys;
#[path = "sockets/world.rs"]
#[allow(dead_code, reason = "the scenarios use all of it")]
mod world;

use harness::{Lib, Run};
use std::{
    collections::HashMap,
    env,
    process::{Command, ExitCode},
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use sys::{show, show_epoll, show_poll};
use world::{End, Place};

/// As the scenarios' world wants it.
pub const WARM_UP: &str = "SOCKETS_WARM_UP";

/// Most bytes under way in one direction at a time: fewer than the smallest ring and TCP's first window hold.
const MOST: u64 = 8 << 10;
/// Connections of a play, and steps on each.
const CONNECTIONS: u64 = 4;
const STEPS: u64 = 60;
const PLAYERS: usize = 2;

/// splitmix64.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ x >> 31) % n
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

// ---- one end, wherever it lives

static PIPES: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_pipe(_: i32) {
    PIPES.fetch_add(1, Relaxed);
}

extern "C" fn on_user(_: i32) {}

/// An end of a connection, its epoll set, and what it has been told to do.
struct Player {
    end: End,
    set: i32,
    /// Sets in which it is with EPOLLET and with EPOLLONESHOT.
    edge: i32,
    once: i32,
}

const SIOCATMARK: libc::c_ulong = 0x8905;
const ALL: i32 = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP;
const EDGE: i32 = libc::EPOLLIN | libc::EPOLLET;
const ONCE: i32 = libc::EPOLLIN | libc::EPOLLONESHOT;

/// `n` bytes in pieces, the first sizes given by a mix of the seed.
fn pieces(n: usize, seed: u64) -> Vec<usize> {
    let (mut d, mut left, mut all) = (Draw(seed), n, Vec::new());
    while left > 0 && all.len() < 7 {
        let k = d.below(left as u64 + 1) as usize;
        all.push(k);
        left -= k;
    }
    all.push(left);
    all
}

fn split<'a>(mut b: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut all = Vec::new();
    for n in sizes {
        let (a, rest) = b.split_at(*n);
        all.push(a);
        b = rest;
    }
    all
}

fn split_mut<'a>(mut b: &'a mut [u8], sizes: &[usize]) -> Vec<&'a mut [u8]> {
    let mut all = Vec::new();
    for n in sizes {
        let (a, rest) = b.split_at_mut(*n);
        all.push(a);
        b = rest;
    }
    all
}

const SENDS: &[&str] =
    &["write", "send", "dontwait", "writev", "sendmsg", "sendmmsg", "sendto", "more", "syscall", "sendfile"];
const RECVS: &[&str] = &[
    "read", "recv", "dontwait", "readv", "recvmsg", "recvmmsg", "recvfrom", "waitall", "trunc", "peek",
    "syscall",
];

impl Player {
    fn new(fd: i32) -> Self {
        let p = Player {
            end: End::new(fd),
            set: sys::epoll_create(),
            edge: sys::epoll_create(),
            once: sys::epoll_create(),
        };
        p.sets().for_each(|(set, events)| sys::epoll_add(set, fd, events, 1));
        p
    }

    fn sets(&self) -> impl Iterator<Item = (i32, i32)> + use<> {
        [(self.set, ALL), (self.edge, EDGE), (self.once, ONCE)].into_iter()
    }

    /// One call that sends the next `n` bytes.
    fn send(&mut self, how: &str, n: usize, seed: u64) -> String {
        let (fd, b) = (self.end.fd, world::block(self.end.tx, n));
        let r = match how {
            "write" => sys::write(fd, &b),
            "dontwait" => sys::send(fd, &b, libc::MSG_DONTWAIT),
            "writev" => sys::writev(fd, &split(&b, &pieces(n, seed))),
            "sendmsg" => sys::sendmsg(fd, &split(&b, &pieces(n, seed)), libc::MSG_NOSIGNAL, None),
            "sendmmsg" => {
                let (r, sizes) = sys::sendmmsg(fd, &split(&b, &pieces(n, seed)));
                r.map(|k| sizes.iter().take(k as usize).map(|n| i64::from(*n)).sum())
            }
            "sendto" => sys::sendto(fd, &b, libc::MSG_NOSIGNAL, None),
            // Held back bytes would go when TCP likes: what comes after pushes them.
            "more" => match sys::send(fd, &b[..n / 2], libc::MSG_MORE) {
                Ok(k) => sys::send(fd, &b[k as usize..], 0).map(|m| k + m),
                e => e,
            },
            "syscall" => sys::syscall_write(fd, &b),
            "sendfile" => self.sendfile(&b),
            _ => sys::send(fd, &b, 0),
        };
        if let Ok(k) = r {
            self.end.tx += k as u64;
        }
        show(r)
    }

    fn sendfile(&self, b: &[u8]) -> sys::Res {
        use std::io::{Seek, Write};
        use std::os::fd::AsRawFd;
        let mut f = tempfile::tempfile().expect("a file");
        f.write_all(b).expect("written");
        f.rewind().expect("rewound");
        sys::sendfile(self.end.fd, f.as_raw_fd(), None, b.len())
    }

    /// One receiving call into a buffer of `n` bytes: its result, having checked the bytes. `Ok` bytes count.
    fn recv_once(&mut self, how: &str, n: usize, seed: u64) -> Result<usize, String> {
        let fd = self.end.fd;
        let mut b = vec![0; n];
        let r = match how {
            "read" => sys::read(fd, &mut b),
            "dontwait" => sys::recv(fd, &mut b, libc::MSG_DONTWAIT),
            "readv" => sys::readv(fd, &mut split_mut(&mut b, &pieces(n, seed))),
            "recvmsg" => sys::recvmsg(fd, &mut split_mut(&mut b, &pieces(n, seed)), 0).result,
            "recvmmsg" => {
                let (r, sizes) = sys::recvmmsg(fd, &mut [&mut b], libc::MSG_WAITFORONE);
                r.map(|_| i64::from(sizes[0]))
            }
            "recvfrom" => sys::recvfrom(fd, &mut b, 0, &mut sys::Addr::empty()),
            "waitall" => sys::recv(fd, &mut b, libc::MSG_WAITALL),
            "trunc" => {
                let r = sys::recv_discard(fd, n, libc::MSG_TRUNC);
                if let Ok(k) = r {
                    self.end.rx += k as u64;
                    return Ok(k as usize);
                }
                r
            }
            "syscall" => sys::syscall_read(fd, &mut b),
            _ => sys::recv(fd, &mut b, 0),
        };
        match r {
            Ok(k) => self.end.check(&b[..k as usize]).map(|()| k as usize),
            Err(e) => Err(sys::errno_name(e)),
        }
    }

    /// Receives `n` bytes that are there, in as many calls as it takes; MSG_WAITALL in one.
    fn recv(&mut self, how: &str, n: usize, seed: u64) -> String {
        if how == "peek" {
            return self.peek(n);
        }
        let mut left = n;
        while left > 0 {
            match self.recv_once(how, left, seed) {
                Ok(0) => return format!("EOF after {}", n - left),
                Ok(k) if how == "waitall" && k != n => return format!("{k} of {n} in one"),
                Ok(k) => left -= k,
                Err(e) => return format!("{e} after {}", n - left),
            }
        }
        format!("got {n}")
    }

    /// Peeks until `n` bytes that are there are seen.
    fn peek(&mut self, n: usize) -> String {
        let mut b = vec![0; n];
        for _ in 0..2000 {
            match sys::recv(self.end.fd, &mut b, libc::MSG_PEEK) {
                Ok(k) if k as usize == n => {
                    let rx = self.end.rx;
                    let r = self.end.check(&b);
                    self.end.rx = rx;
                    return r.map_or_else(|e| e, |()| format!("saw {n}"));
                }
                Ok(1..) => sys::sleep_ms(1),
                r => return show(r),
            }
        }
        "never saw all".into()
    }

    fn readiness(&self) -> String {
        let all = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
        let (n, s) = sys::select1(self.end.fd, Duration::ZERO, false);
        format!(
            "{:?} {} {} r{} w{} {}",
            sys::fionread(self.end.fd),
            show_poll(sys::poll1(self.end.fd, all, 0)),
            show(n),
            u8::from(s.read),
            u8::from(s.write),
            self.level(),
        )
    }

    /// What the epoll set says; a second time, as after a switch the first may be from before.
    fn level(&self) -> String {
        let _ = sys::epoll_wait(self.set, 4, 0);
        show_epoll(sys::epoll_wait(self.set, 4, 0))
    }

    /// What the set with EPOLLET says, twice: an edge is told once.
    fn edges(&self) -> String {
        let look = || show_epoll(sys::epoll_wait(self.edge, 4, 0));
        format!("{} then {}", look(), look())
    }

    /// What the set with EPOLLONESHOT says, then again, and when it is put in anew.
    fn one_shot(&self) -> String {
        let look = || show_epoll(sys::epoll_wait(self.once, 4, 0));
        let (a, b) = (look(), look());
        let r = sys::epoll_ctl(self.once, libc::EPOLL_CTL_MOD, self.end.fd, ONCE as u32, 1);
        format!("{a} then {b}, {} {}", show(r), look())
    }

    /// Waits for something in one of the ways there are.
    fn wait(&self, how: &str) -> String {
        let fd = self.end.fd;
        match how {
            "poll" => show_poll(sys::poll1(fd, libc::POLLIN, 20_000)),
            "select" => show(sys::select_read(&[fd], Duration::from_secs(20)).0),
            // The fd is writable, so that the set would not wait: one for reading alone.
            _ => {
                let ep = sys::epoll_create();
                sys::epoll_add(ep, fd, libc::EPOLLIN, 7);
                let r = show_epoll(sys::epoll_wait(ep, 4, 20_000));
                let _ = sys::close(ep);
                r
            }
        }
    }

    /// A child does it, and this end goes on where it stopped.
    fn in_child(&mut self, words: &[&str]) -> String {
        let [r, w] = sys::pipe();
        let pid = sys::fork(|| {
            self.answer(words, w);
            0
        });
        let _ = sys::close(w);
        self.answered(r, pid)
    }

    /// What the child has told by `from`, and how it ended.
    fn answered(&mut self, from: i32, pid: i32) -> String {
        let (tx, rx) = (self.end.tx, self.end.rx);
        let mut b = [0; 300];
        let n = sys::read(from, &mut b).unwrap_or(0) as usize;
        let _ = sys::close(from);
        let ended = sys::wait(pid);
        let all = String::from_utf8_lossy(&b[..n]).into_owned();
        let mut parts = all.splitn(3, ' ');
        let mut number = |old: u64| parts.next().and_then(|s| s.parse().ok()).unwrap_or(old);
        (self.end.tx, self.end.rx) = (number(tx), number(rx));
        format!("child {ended}: {}", parts.next().unwrap_or("silent"))
    }

    /// A program that a child becomes does it.
    fn in_program(&mut self, words: &[&str]) -> String {
        let [r, w] = sys::pipe();
        let pid = sys::fork(|| {
            for fd in [w, self.end.fd] {
                let _ = sys::fcntl(fd, libc::F_SETFD, 0);
            }
            let own = env::current_exe().expect("our own path");
            let head = ["--program", &w.to_string(), &self.end.fd.to_string()].map(String::from);
            let at = [self.end.tx.to_string(), self.end.rx.to_string()];
            let e =
                std::os::unix::process::CommandExt::exec(Command::new(own).args(head).args(at).args(words));
            eprintln!("exec: {e}");
            127
        });
        let _ = sys::close(w);
        self.answered(r, pid)
    }

    /// What `in_program`'s program does.
    fn program(args: &[String]) {
        let number = |i: usize| args.get(i).and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
        let mut p = Player::new(number(1) as i32);
        (p.end.tx, p.end.rx) = (number(2), number(3));
        let words: Vec<&str> = args.iter().skip(4).map(String::as_str).collect();
        p.answer(&words, number(0) as i32);
    }

    /// Does it, and tells by `to` where this end is now.
    fn answer(&mut self, words: &[&str], to: i32) {
        let answer = self.act(words);
        let all = format!("{} {} {answer}", self.end.tx, self.end.rx);
        let _ = sys::write(to, all.as_bytes());
    }

    /// The same end by another descriptor, which has been in a message.
    fn by_message(&mut self) -> String {
        let [a, b] = sys::unix_pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC);
        let sent = sys::sendmsg(a, &[b"x"], 0, Some(self.end.fd));
        for (set, _) in self.sets() {
            let _ = sys::epoll_ctl(set, libc::EPOLL_CTL_DEL, self.end.fd, 0, 0);
        }
        let closed = sys::close(self.end.fd);
        let got = sys::recvmsg(b, &mut [&mut [0]], libc::MSG_CMSG_CLOEXEC);
        self.end.fd = *got.fds.first().expect("a descriptor");
        for (set, events) in self.sets() {
            sys::epoll_add(set, self.end.fd, events, 1);
        }
        let _ = (sys::close(a), sys::close(b));
        format!("{} {} {}", show(sent), show(closed), show(got.result))
    }

    /// A wait for what does not come, which a signal ends.
    fn interrupted(&self, how: &str) -> String {
        let (me, on) = (sys::this_thread(), AtomicU32::new(1));
        thread::scope(|s| {
            // Again and again: the first may come before the wait.
            s.spawn(|| {
                while on.load(Relaxed) == 1 {
                    sys::sleep_ms(2);
                    sys::signal_thread(me, libc::SIGUSR1);
                }
            });
            let fd = self.end.fd;
            let r = match how {
                "poll" => show_poll(sys::poll1(fd, libc::POLLIN, -1)),
                "select" => show(sys::select_read(&[fd], Duration::from_secs(100)).0),
                "readv" => show(sys::readv(fd, &mut [&mut [0; 3], &mut [0; 3]])),
                "waitall" => show(sys::recv(fd, &mut [0; 16], libc::MSG_WAITALL)),
                "peek" => show(sys::recv(fd, &mut [0; 16], libc::MSG_PEEK)),
                _ => show(sys::read(fd, &mut [0; 16])),
            };
            on.store(0, Relaxed);
            r
        })
    }

    fn act(&mut self, w: &[&str]) -> String {
        let num = |i: usize| w.get(i).and_then(|s| s.parse::<u64>().ok()).unwrap_or(0);
        let fd = self.end.fd;
        match w[0] {
            "send" => self.send(w[1], num(2) as usize, num(3)),
            "recv" => self.recv(w[1], num(2) as usize, num(3)),
            "put" => self.end.put_chunks(num(1) as usize, num(2) as usize),
            "get" => self.end.get_chunks(num(1) as usize, num(2) as usize),
            "drain" => self.end.drain(),
            "empty" => show(sys::recv(fd, &mut [0; 16], num(1) as i32)),
            "zero" => format!(
                "{} {}",
                show(sys::send(fd, &[], 0)),
                show(sys::recv(fd, &mut [], libc::MSG_DONTWAIT))
            ),
            "arrived" => {
                self.end.arrived(num(1) as i32);
                self.readiness()
            }
            "readiness" => self.readiness(),
            "settle" => {
                self.end.settle(num(1) as i16);
                self.readiness()
            }
            "wait" => self.wait(w[1]),
            "later" => {
                sys::sleep_ms(num(1));
                self.act(&w[2..])
            }
            "child" => self.in_child(&w[1..]),
            "program" => self.in_program(&w[1..]),
            "message" => self.by_message(),
            "interrupted" => self.interrupted(w[1]),
            "urgent" => show(sys::send(fd, b"!", libc::MSG_OOB)),
            "urged" => {
                let p = show_poll(sys::poll1(fd, libc::POLLPRI, 20_000));
                let mut b = [0; 4];
                let mark = sys::ioctl(fd, SIOCATMARK, -1);
                format!("{p} {mark:?} {} {b:?}", show(sys::recv(fd, &mut b, libc::MSG_OOB)))
            }
            "option" => show(sys::setsockopt(fd, num(1) as i32, num(2) as i32, num(3) as i32)),
            "timeout" => show(sys::set_timeout(fd, libc::SO_RCVTIMEO, Duration::from_millis(num(1)))),
            "fcntl" => {
                sys::set_nonblocking(fd, num(1) != 0);
                show(sys::fcntl(fd, libc::F_GETFL, 0))
            }
            "fionbio" => show(sys::ioctl(fd, libc::FIONBIO, num(1) as i32).map(i64::from)),
            "dup" => {
                let new = sys::dup(fd).expect("dup") as i32;
                for (set, events) in self.sets() {
                    sys::epoll_add(set, new, events, 1);
                    let _ = sys::epoll_ctl(set, libc::EPOLL_CTL_DEL, fd, 0, 0);
                }
                self.end.fd = new;
                show(sys::close(fd))
            }
            "shutdown" => show(sys::shutdown(fd, num(1) as i32)),
            "linger" => show(sys::set_linger(fd, true, 0)),
            "error" => sys::so_error(fd),
            "pipes" => PIPES.swap(0, Relaxed).to_string(),
            "edge" => self.edges(),
            "once" => self.one_shot(),
            "close" => {
                self.sets().for_each(|(set, _)| _ = sys::close(set));
                show(sys::close(fd))
            }
            c => format!("unknown {c}"),
        }
    }
}

// ---- the two of them

/// Does as told over a Unix socket, a line at a time.
fn agent(control: i32) {
    let mut at: HashMap<u64, Player> = HashMap::new();
    let mut buf = [0; 512];
    while let Ok(n @ 1..) = sys::recv(control, &mut buf, 0) {
        let line = String::from_utf8_lossy(&buf[..n as usize]).into_owned();
        let w: Vec<&str> = line.split(' ').collect();
        let answer = if w[0] == "connect" {
            let a = world::address("4", w[1].parse().expect("a port"));
            let fd = sys::socket(a.family(), libc::SOCK_STREAM | libc::SOCK_CLOEXEC).expect("socket") as i32;
            sys::connect(fd, &a).expect("connect");
            at.insert(0, Player::new(fd));
            "connected".into()
        } else {
            at.get_mut(&0).map_or("no end".into(), |p| p.act(&w))
        };
        if sys::send(control, answer.as_bytes(), libc::MSG_NOSIGNAL).is_err() {
            return;
        }
    }
}

/// Both ends, and what is under way from each to the other.
struct Pair {
    here: Player,
    control: i32,
    queued: [u64; 2],
    /// Waits of this end do not block.
    nonblocking: [bool; 2],
}

impl Pair {
    fn start(&self, cmd: &str) {
        sys::send(self.control, cmd.as_bytes(), libc::MSG_NOSIGNAL).expect("a living agent");
    }

    fn finish(&self) -> String {
        let mut b = [0; 512];
        match sys::recv(self.control, &mut b, 0) {
            Ok(n @ 1..) => String::from_utf8_lossy(&b[..n as usize]).into_owned(),
            _ => "agent gone".into(),
        }
    }

    /// Has end `who` (0: here) do something, and logs it.
    fn act(&mut self, who: usize, cmd: &str) -> String {
        let r = if who == 0 {
            self.here.act(&cmd.split(' ').collect::<Vec<_>>())
        } else {
            self.start(cmd);
            self.finish()
        };
        log!("{} {cmd}: {r}", ["here", "far"][who]);
        r
    }

    /// `a` here and `b` there at once, or the other way round.
    fn both(&mut self, who: usize, a: &str, b: &str) {
        let (here, far) = if who == 0 { (a, b) } else { (b, a) };
        self.start(far);
        let r = self.here.act(&here.split(' ').collect::<Vec<_>>());
        log!("here {here}: {r}; far {far}: {}", self.finish());
    }

    /// All that is under way has arrived.
    fn quiet(&mut self) {
        for who in 0..2 {
            self.act(who, &format!("arrived {}", self.queued[1 - who]));
        }
    }

    fn step(&mut self, d: &mut Draw, procs: bool) {
        let who = d.below(2) as usize;
        let room = MOST - self.queued[who];
        let waiting = self.queued[1 - who];
        let child = if procs && d.below(12) == 0 { "child " } else { "" };
        match d.below(25) {
            0..=5 if room > 0 => {
                let n = if d.below(3) == 0 { 1 + d.below(8.min(room)) } else { 1 + d.below(room) };
                let how = d.of(SENDS);
                self.act(who, &format!("{child}send {how} {n} {}", d.below(1000)));
                self.queued[who] += n;
            }
            6..=11 if waiting > 0 => {
                let n = 1 + d.below(waiting);
                let how = *d.of(RECVS);
                self.act(who, &format!("arrived {waiting}"));
                self.act(who, &format!("{child}recv {how} {n} {}", d.below(1000)));
                if how != "peek" {
                    self.queued[1 - who] -= n;
                }
            }
            12 => self.quiet(),
            // Both move at once what no buffer holds.
            13 if self.queued == [0, 0] => {
                let n = 1 + d.below(400_000);
                let (put, get) = (1 + d.below(60_000), 1 + d.below(60_000));
                self.both(who, &format!("put {n} {put}"), &format!("get {n} {get}"));
            }
            // A wait that the other end ends.
            14 | 15 if waiting == 0 && room > 0 => {
                let n = 1 + d.below(300);
                let send = format!("later 3 send {} {n} 1", d.of(SENDS));
                if self.nonblocking[who] || d.below(2) == 0 {
                    let wait = format!("wait {}", d.of(&["poll", "select", "epoll"]));
                    self.both(who, &wait, &send);
                    self.queued[1 - who] += n;
                } else {
                    let get =
                        format!("recv {} {n} 3", d.of(&["read", "readv", "waitall", "recvmsg", "peek"]));
                    self.both(who, &get, &send);
                    self.queued[1 - who] += if get.contains("peek") { n } else { 0 };
                }
            }
            16 if waiting == 0 => {
                let _ = self.act(who, &format!("empty {}", libc::MSG_DONTWAIT | *d.of(&[0, libc::MSG_PEEK])));
                if d.below(3) == 0 {
                    self.act(who, "timeout 5");
                    self.act(who, "empty 0");
                    self.act(who, "timeout 0");
                }
            }
            17 => {
                let on = d.below(2);
                self.nonblocking[who] = on != 0;
                self.act(who, &format!("{} {on}", d.of(&["fcntl", "fionbio"])));
            }
            18 => {
                let options = [
                    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 2),
                    (libc::IPPROTO_TCP, libc::TCP_QUICKACK, 2),
                    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 2),
                    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 600),
                ];
                let (level, name, n) = *d.of(&options);
                // A mark is set for one look, and what a receive waits for is every byte.
                self.act(who, &format!("arrived {waiting}"));
                self.act(who, &format!("option {level} {name} {}", d.below(n)));
                if name == libc::SO_RCVLOWAT {
                    self.act(who, "readiness");
                    self.act(who, &format!("option {level} {name} 1"));
                }
            }
            19 => {
                self.act(who, &format!("arrived {waiting}"));
                let what = d.of::<&str>(&["dup", "zero", "readiness"]);
                self.act(who, what);
            }
            20 | 21 => {
                self.act(who, &format!("arrived {waiting}"));
                let what = d.of::<&str>(&["edge", "once"]);
                self.act(who, what);
            }
            22 if waiting == 0 && !self.nonblocking[who] => {
                let how = d.of::<&str>(&["read", "readv", "waitall", "peek", "poll", "select"]);
                self.act(who, &format!("interrupted {how}"));
            }
            // The rest ends or may end in TCP for good: seldom.
            23 if waiting == 0 && d.below(4) == 0 => {
                self.act(who, &format!("arrived {waiting}"));
                if procs && room > 0 && d.below(2) == 0 {
                    let n = 1 + d.below(room);
                    self.act(who, &format!("program send {} {n} 1", d.of(SENDS)));
                    self.queued[who] += n;
                } else {
                    self.act(who, "message");
                }
            }
            24 if self.queued[who] == 0 && d.below(4) == 0 => {
                self.both(1 - who, "urged", "urgent");
                // FIONREAD counts up to the mark until a read has gone past it (tcp_inq).
                self.act(who, "send write 1 1");
                self.act(1 - who, "wait poll");
                self.act(1 - who, "recv read 1 1");
            }
            _ => self.quiet(),
        }
    }

    /// One of the ways to end.
    fn end(&mut self, d: &mut Draw) {
        let who = d.below(2) as usize;
        let other = 1 - who;
        for w in 0..2 {
            self.act(w, "fcntl 0");
        }
        if d.below(3) > 0 {
            for w in 0..2 {
                let n = self.queued[1 - w];
                self.act(w, &format!("get {n} 5000"));
            }
            self.queued = [0, 0];
        }
        self.quiet();
        let unread = self.queued[other] > 0;
        match d.below(4) {
            // Half-closed: the other direction goes on.
            0 => {
                self.act(who, "shutdown 1");
                self.act(other, &format!("settle {}", libc::POLLRDHUP));
                self.act(other, "drain");
                self.act(other, "empty 0");
                self.act(other, "send write 700 1");
                self.queued[other] += 700;
                self.act(who, &format!("arrived {}", self.queued[other]));
                self.act(who, "send write 1 1");
                self.act(who, "pipes");
                self.act(other, "close");
                self.act(who, &format!("settle {}", libc::POLLHUP));
                self.act(who, "drain");
                self.act(who, "error");
                self.act(who, "close");
            }
            1 => {
                self.act(who, "shutdown 2");
                self.act(other, &format!("settle {}", libc::POLLRDHUP));
                self.act(other, "drain");
                self.act(other, "close");
                self.act(who, "readiness");
                self.act(who, "close");
            }
            // Reset on purpose.
            2 => {
                self.act(who, "linger");
                self.act(who, "close");
                self.act(other, &format!("settle {}", libc::POLLHUP));
                self.act(other, "drain");
                self.act(other, "send write 5 1");
                self.act(other, "pipes");
                self.act(other, "empty 0");
                self.act(other, "close");
            }
            // Closed: with bytes unread that is a reset too.
            _ => {
                self.act(who, "close");
                self.act(other, &format!("settle {}", if unread { libc::POLLHUP } else { libc::POLLRDHUP }));
                self.act(other, "drain");
                self.act(other, "send write 5 1");
                self.act(other, &format!("settle {}", libc::POLLHUP));
                self.act(other, "error");
                self.act(other, "send write 5 1");
                self.act(other, "pipes");
                self.act(other, "empty 0");
                self.act(other, "close");
            }
        }
    }
}

fn play(seed: u64, place: Place) {
    sys::on_signal(libc::SIGPIPE, on_pipe, libc::SA_RESTART);
    sys::on_signal(libc::SIGUSR1, on_user, 0);
    let [control, there] = sys::unix_pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC);
    let child = match place {
        Place::Threads => {
            thread::spawn(move || agent(there));
            None
        }
        _ => {
            let pid = sys::fork(|| {
                let _ = sys::close(control);
                agent(there);
                0
            });
            let _ = sys::close(there);
            Some(pid)
        }
    };
    let mut d = Draw(seed);
    for i in 0..CONNECTIONS {
        let (l, port) = world::listener(&world::address("4", 0), 4);
        sys::send(control, format!("connect {port}").as_bytes(), 0).expect("a living agent");
        let fd = sys::accept4(l, libc::SOCK_CLOEXEC).expect("accept") as i32;
        let _ = sys::close(l);
        let here = Player::new(fd);
        let mut p = Pair { here, control, queued: [0, 0], nonblocking: [false, false] };
        log!("connection {i}: {}", p.finish());
        for _ in 0..STEPS {
            p.step(&mut d, child.is_some());
        }
        p.end(&mut d);
    }
    log!("end");
    let _ = sys::close(control);
    if let Some(pid) = child {
        sys::wait(pid);
    }
}

// ---- the comparison

/// The settings of a play, drawn from its seed.
fn settings(seed: u64) -> Vec<(&'static str, String)> {
    let mut d = Draw(!seed);
    let after = *d.of(&["0", "0", "3ops", "20ops", "20k"]);
    let mut all = vec![("SMC_UPGRADE_AFTER", after.to_string())];
    if d.below(2) == 0 {
        all.push(("SMC_RMB_SIZE", "16384".into()));
    }
    let calls = *d.of(&[0, 5, 20, 60]);
    if calls > 0 {
        all.push(("SMC_TEST_DOWNGRADE", format!("{calls}:{}", seed & 0xffff)));
    }
    all
}

fn transcript(seed: u64, place: &str, lib: Option<&Lib>) -> Result<(String, u64, u64), String> {
    let mut run = Run::new("random");
    run.limit(Duration::from_secs(60));
    let mut cmd = Command::new(env::current_exe().expect("our own path"));
    cmd.args(["--play", &seed.to_string(), place]);
    if let Some(lib) = lib {
        run.preload(lib);
        cmd.envs(settings(seed));
    }
    let done = run.output(cmd)?;
    if !done.success || !done.stdout.ends_with("end\n") {
        return Err(format!("{}\n{}{}", done.status, done.stdout, done.stderr));
    }
    Ok((done.stdout, done.stats.shm, done.stats.downgrades))
}

/// The first line in which they differ, and those before it.
fn difference(want: &str, got: &str) -> String {
    let (w, g): (Vec<_>, Vec<_>) = (want.lines().collect(), got.lines().collect());
    let i = w.iter().zip(&g).take_while(|(a, b)| a == b).count();
    let mut s: String = w[i.saturating_sub(25)..i].iter().map(|l| format!("    = {l}\n")).collect();
    for (mark, l) in [("-", w.get(i)), ("+", g.get(i))] {
        s += &format!("    {mark} {}\n", l.unwrap_or(&"(ends)"));
    }
    s
}

fn compare(seed: u64, lib: &Lib) -> Result<(u64, u64), String> {
    let place = if seed & 1 == 0 { "threads" } else { "procs" };
    let (want, ..) = transcript(seed, place, None)?;
    let (got, shm, downgrades) = transcript(seed, place, (!lib.is_none()).then_some(lib))
        .map_err(|e| format!("under the preload: {e}"))?;
    if want != got {
        return Err(format!("- plain TCP, + under the preload:\n{}", difference(&want, &got)));
    }
    Ok((shm, downgrades))
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().collect();
    if args.get(1).is_some_and(|a| a == "--play") {
        let seed = args.get(2).and_then(|s| s.parse().ok()).unwrap_or(0);
        play(seed, if args.get(3).is_some_and(|p| p == "threads") { Place::Threads } else { Place::Procs });
        return ExitCode::SUCCESS;
    }
    if args.get(1).is_some_and(|a| a == "--program") {
        Player::program(&args[2..]);
        return ExitCode::SUCCESS;
    }
    // As cargo test lists and filters.
    if args.iter().any(|a| a == "--list") {
        println!("random: test");
        return ExitCode::SUCCESS;
    }
    let names: Vec<_> = args[1..].iter().filter(|a| !a.starts_with("--")).collect();
    if !names.is_empty() && !names.iter().any(|n| "random".contains(n.as_str())) {
        return ExitCode::SUCCESS;
    }
    let lib = match Lib::find() {
        Ok(lib) => lib,
        Err(e) => {
            eprintln!("{}", e.message().unwrap_or("no library"));
            return ExitCode::FAILURE;
        }
    };
    let number = |name: &str| env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let only = number("SMC_RANDOM_SEED");
    let limit = Duration::from_secs(number("SMC_RANDOM_SECONDS").unwrap_or(20));
    let clock = std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64) % 1_000_000_000;
    let (next, start) = (AtomicU64::new(only.unwrap_or(clock)), Instant::now());
    let sums = [const { AtomicU64::new(0) }; 4];
    println!("\nrunning plays from seed {} on", next.load(Relaxed));
    thread::scope(|s| {
        for _ in 0..if only.is_some() { 1 } else { PLAYERS } {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    match compare(seed, &lib) {
                        Ok((shm, down)) => {
                            for (sum, n) in sums.iter().zip([1, 0, shm, down]) {
                                sum.fetch_add(n, Relaxed);
                            }
                        }
                        Err(e) => {
                            sums[1].fetch_add(1, Relaxed);
                            println!("SMC_RANDOM_SEED={seed} {:?}: {e}", settings(seed));
                        }
                    }
                    if only.is_some() || start.elapsed() > limit || sums[1].load(Relaxed) >= 5 {
                        return;
                    }
                }
            });
        }
    });
    let [good, bad, shm, down] = sums.map(|s| s.load(Relaxed));
    // Plays in which nothing is ever upgraded would find nothing.
    let idle = !lib.is_none() && only.is_none() && (shm == 0 || down == 0);
    if idle {
        println!("nothing was upgraded, or nothing went back");
    }
    println!("{good} plays: {shm} ends upgraded, {down} directions forced back");
    let word = if bad > 0 || idle { "FAILED" } else { "ok" };
    println!(
        "\ntest result: {word}. {} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        u8::from(word == "ok"),
        u8::from(word != "ok")
    );
    if word == "ok" { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
