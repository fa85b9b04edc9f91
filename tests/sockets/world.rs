//! The two ends of a scenario: the end under test, here, and its peer, an *agent* that does as told.
//!
//! The agent runs in a thread of this process or in a process of its own (forked before any TCP socket
//! exists), and takes commands over a Unix socket pair, one line each. So one scenario runs in every
//! placement of the two ends. Bytes of a connection follow a pattern by their position in the stream:
//! whoever reads checks every byte, and a byte lost, doubled or moved shows at once.
//!
//! Everything observed goes to the transcript on stdout by [`log!`]; what a child of the scenario logs comes
//! where its parent waits for it.

use crate::sys::{self, Addr, Res, show};
use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// Appends a line to the transcript.
#[macro_export]
macro_rules! log {
    ($($t:tt)*) => { $crate::world::log_line(&format!($($t)*)) };
}

/// One line, one write.
pub fn log_line(s: &str) {
    let l = format!("{s}\n");
    let mut b = l.as_bytes();
    while !b.is_empty() {
        match sys::write(sys::LOG_FD.load(Ordering::Relaxed), b) {
            Ok(n) => b = &b[n as usize..],
            Err(libc::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// Where the agent lives, and who connects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A thread of this process; this end accepts.
    Threads,
    /// A process of its own; this end connects.
    Procs,
    /// A process of its own; this end accepts.
    ProcsAccept,
}

/// The byte at a position of a stream: a cheap mix, so that a shift by any amount shows.
pub fn pattern(pos: u64) -> u8 {
    let x = pos.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x >> 56) as u8 ^ (x >> 24) as u8
}

/// `n` bytes of the pattern from a position on.
pub fn block(pos: u64, n: usize) -> Vec<u8> {
    (pos..pos + n as u64).map(pattern).collect()
}

/// One end of a connection with its two stream positions.
#[derive(Clone, Copy, Debug)]
pub struct End {
    pub fd: i32,
    pub tx: u64,
    pub rx: u64,
}

impl End {
    pub fn new(fd: i32) -> Self {
        End { fd, tx: 0, rx: 0 }
    }

    /// Writes `n` bytes of the stream in pieces of at most `chunk`, waiting where the fd does not block.
    pub fn put_chunks(&mut self, n: usize, chunk: usize) -> String {
        let mut left = n;
        while left > 0 {
            let b = block(self.tx, left.min(chunk));
            match sys::send(self.fd, &b, libc::MSG_NOSIGNAL) {
                Ok(k) => {
                    self.tx += k as u64;
                    left -= k as usize;
                }
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) => {
                    let _ = sys::poll1(self.fd, libc::POLLOUT, -1);
                }
                Err(e) => return format!("{} after {}", sys::errno_name(e), n - left),
            }
        }
        format!("put {n}")
    }

    pub fn put(&mut self, n: usize) -> String {
        self.put_chunks(n, 1 << 16)
    }

    /// Reads exactly `n` bytes, in pieces of at most `chunk`, and checks them.
    pub fn get_chunks(&mut self, n: usize, chunk: usize) -> String {
        let mut b = vec![0; chunk.min(n.max(1))];
        let mut left = n;
        while left > 0 {
            let want = left.min(b.len());
            match sys::recv(self.fd, &mut b[..want], 0) {
                Ok(0) => return format!("EOF after {}", n - left),
                Ok(k) => {
                    if let Err(e) = self.check(&b[..k as usize]) {
                        return e;
                    }
                    left -= k as usize;
                }
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) => {
                    let _ = sys::poll1(self.fd, libc::POLLIN, -1);
                }
                Err(e) => return format!("{} after {}", sys::errno_name(e), n - left),
            }
        }
        format!("got {n}")
    }

    pub fn get(&mut self, n: usize) -> String {
        self.get_chunks(n, 1 << 16)
    }

    /// Reads up to EOF or an error.
    pub fn drain(&mut self) -> String {
        self.get(usize::MAX / 2)
    }

    /// Takes bytes that were read in another way into the stream.
    pub fn check(&mut self, b: &[u8]) -> Result<(), String> {
        match b.iter().enumerate().find(|(i, x)| **x != pattern(self.rx + *i as u64)) {
            Some((i, x)) => {
                Err(format!("WRONG BYTE {x:#04x} at {} (read of {})", self.rx + i as u64, b.len()))
            }
            None => {
                self.rx += b.len() as u64;
                Ok(())
            }
        }
    }

    /// `n right` when the first `n` bytes of a buffer are the next ones of the stream.
    pub fn checked(&mut self, r: Res, b: &[u8]) -> String {
        match r {
            Ok(n) => self.check(&b[..n as usize]).map_or_else(|e| e, |()| format!("{n} right")),
            Err(e) => sys::errno_name(e),
        }
    }

    /// The next `n` bytes to send; they count as sent.
    pub fn next(&mut self, n: usize) -> Vec<u8> {
        let b = block(self.tx, n);
        self.tx += n as u64;
        b
    }

    /// Waits until all of these events are there (or 20 s), so that what follows is no race.
    pub fn settle(&self, events: i16) {
        settle(self.fd, events);
    }

    /// Waits until `n` bytes can be read.
    pub fn arrived(&self, n: i32) {
        for _ in 0..4000 {
            if sys::fionread(self.fd).is_ok_and(|k| k >= n) {
                return;
            }
            sys::sleep_ms(5);
        }
        log!("only {:?} bytes arrived, not {n}", sys::fionread(self.fd));
    }

    /// Writes without blocking until the way is full; whether that came within bounds.
    pub fn fill(&mut self) -> String {
        const BOUND: usize = 64 << 20;
        let start = self.tx;
        // TCP moves bytes on in the background: full is when nothing went for a while. And it may refuse a large
        // piece but find room for a small one in its last buffer: full is when not one byte more goes.
        let (mut quiet, mut piece) = (0, 1 << 16);
        while quiet < 8 {
            match sys::send(self.fd, &block(self.tx, piece), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
                Ok(n) => {
                    quiet = 0;
                    self.tx += n as u64;
                }
                Err(libc::EAGAIN) if piece > 1 => piece /= 16,
                Err(libc::EAGAIN) => {
                    quiet += 1;
                    sys::sleep_ms(10);
                }
                Err(e) => return sys::errno_name(e),
            }
            if self.tx - start > BOUND as u64 {
                return "never full".into();
            }
        }
        "full: EAGAIN".into()
    }

    /// The far end's half of the warm-up.
    fn pong(&mut self, n: usize) {
        for _ in 0..n {
            self.get(1);
            self.put(1);
        }
    }

    /// This end's half of the warm-up.
    fn ping(&mut self, n: usize) -> bool {
        (0..n).all(|_| self.put(1) == "put 1" && self.get(1) == "got 1")
    }
}

/// Waits until all of `events` are there, or 20 s.
pub fn settle(fd: i32, events: i16) {
    for _ in 0..4000 {
        let r = sys::poll1(fd, events, 5000);
        if r.is_ok_and(|r| r & events == events) {
            return;
        }
        // Some, not all: poll would come back at once.
        sys::sleep_ms(5);
    }
    log!("events {} never came", sys::events(events as u32));
}

/// The answering side of the control channel.
fn agent_loop(control: i32) {
    let mut ends: HashMap<i32, End> = HashMap::new();
    let mut listeners: HashMap<u16, i32> = HashMap::new();
    let mut buf = [0; 512];
    while let Ok(n @ 1..) = sys::recv(control, &mut buf, 0) {
        let line = String::from_utf8_lossy(&buf[..n as usize]).into_owned();
        let words: Vec<&str> = line.split(' ').collect();
        let answer = agent_do(&words, &mut ends, &mut listeners);
        if sys::send(control, answer.as_bytes(), libc::MSG_NOSIGNAL).is_err() {
            return;
        }
    }
}

fn agent_do(w: &[&str], ends: &mut HashMap<i32, End>, listeners: &mut HashMap<u16, i32>) -> String {
    let num = |i: usize| w.get(i).and_then(|s| s.parse::<i64>().ok()).unwrap_or(0);
    match w[0] {
        "connect" => {
            let a = address(w[1], num(2) as u16);
            let fd = sys::socket(a.family(), libc::SOCK_STREAM).expect("socket") as i32;
            let r = sys::connect(fd, &a);
            ends.insert(fd, End::new(fd));
            return if r.is_ok() { fd.to_string() } else { show(r) };
        }
        "listen" => {
            let (fd, port) = listener(&address(w[1], 0), 512);
            listeners.insert(port, fd);
            return port.to_string();
        }
        "accept" => {
            let fd = sys::accept(listeners[&(num(1) as u16)], None).expect("accept") as i32;
            ends.insert(fd, End::new(fd));
            return fd.to_string();
        }
        "closelistener" => {
            return show(sys::close(listeners.remove(&(num(1) as u16)).expect("a listener")));
        }
        "die" => {
            // SAFETY: no pointers. A death without any goodbye.
            unsafe { libc::_exit(0) };
        }
        "nofile" => {
            sys::nofile(num(1) as u64);
            return "limited".into();
        }
        // On the second end so many ping-pongs, and then a byte on the first before one more; so many rounds.
        "ordered" => {
            for _ in 0..num(3) {
                let Some(b) = ends.get_mut(&(num(2) as i32)) else { return "no such end".into() };
                if !b.ping(num(4) as usize) {
                    return "no answer".into();
                }
                let sent = ends.get_mut(&(num(1) as i32)).map(|a| a.put(1));
                let Some(b) = ends.get_mut(&(num(2) as i32)).filter(|_| sent.is_some()) else {
                    return "no such end".into();
                };
                b.ping(1);
            }
            return "done".into();
        }
        "sleep" => {
            sys::sleep_ms(num(1) as u64);
            return "slept".into();
        }
        _ => {}
    }
    let fd = num(1) as i32;
    let Some(e) = ends.get_mut(&fd) else { return format!("no such end: {w:?}") };
    match w[0] {
        "put" => e.put(num(2) as usize),
        "putchunks" => e.put_chunks(num(2) as usize, num(3) as usize),
        "get" => e.get(num(2) as usize),
        "getchunks" => e.get_chunks(num(2) as usize, num(3) as usize),
        "drain" => e.drain(),
        // A slow reader: pieces with a pause between.
        "slowget" => {
            let (mut left, piece) = (num(2) as usize, num(3) as usize);
            while left > 0 {
                let n = left.min(piece);
                let r = e.get(n);
                if r != format!("got {n}") {
                    return r;
                }
                left -= n;
                sys::sleep_ms(num(4) as u64);
            }
            format!("got {}", num(2))
        }
        "delayput" => {
            sys::sleep_ms(num(3) as u64);
            e.put(num(2) as usize)
        }
        "delayclose" => {
            sys::sleep_ms(num(2) as u64);
            ends.remove(&fd);
            show(sys::close(fd))
        }
        "pong" => {
            e.pong(num(2) as usize);
            "ponged".into()
        }
        // Sends back what comes until EOF, then ends its own direction.
        "echo" => {
            let mut b = vec![0; 32768];
            let mut total = 0;
            loop {
                match sys::read(fd, &mut b) {
                    Ok(0) => break,
                    Ok(n) => {
                        total += n;
                        let mut rest = &b[..n as usize];
                        while !rest.is_empty() {
                            match sys::write(fd, rest) {
                                Ok(k) => rest = &rest[k as usize..],
                                Err(e) => return sys::errno_name(e),
                            }
                        }
                    }
                    Err(e) => return sys::errno_name(e),
                }
            }
            let r = sys::shutdown(fd, libc::SHUT_WR);
            format!("echoed {total}, shutdown {}", show(r))
        }
        "fill" => e.fill(),
        "shutdown" => show(sys::shutdown(fd, num(2) as i32)),
        "linger" => show(sys::set_linger(fd, true, num(2) as i32)),
        "close" => {
            ends.remove(&fd);
            show(sys::close(fd))
        }
        "arrived" => {
            e.arrived(num(2) as i32);
            "arrived".into()
        }
        "settle" => {
            e.settle(num(2) as i16);
            "settled".into()
        }
        "poll" => sys::show_poll(sys::poll1(fd, num(2) as i16, num(3) as i32)),
        "oob" => show(sys::send(fd, &[num(2) as u8], libc::MSG_OOB)),
        "setopt" => show(sys::setsockopt(fd, num(2) as i32, num(3) as i32, num(4) as i32)),
        // Bytes outside the pattern: the text after the fd.
        "say" => show(sys::send(fd, w[2..].join(" ").as_bytes(), libc::MSG_NOSIGNAL)),
        // Sleeps until there is something to read, by the call named.
        "await" => {
            let r = match w[2] {
                "poll" => sys::poll1(fd, libc::POLLIN, -1).map(i64::from),
                "select" => sys::select_read(&[fd], Duration::from_secs(30)).0,
                "epoll" => {
                    let ep = sys::epoll_create();
                    sys::epoll_add(ep, fd, libc::EPOLLIN, 1);
                    let r = sys::epoll_wait(ep, 4, -1).map(|v| v.len() as i64);
                    sys::close(ep).expect("close");
                    r
                }
                _ => Ok(1),
            };
            show(r)
        }
        // Reads text up to a newline or EOF.
        "hear" => {
            let mut s = Vec::new();
            let mut b = [0];
            while let Ok(1) = sys::recv(fd, &mut b, 0) {
                s.push(b[0]);
                if b[0] == b'\n' {
                    break;
                }
            }
            format!("{:?}", String::from_utf8_lossy(&s))
        }
        // Takes bytes off the connection that are not of the pattern.
        "discard" => {
            let mut b = vec![0; num(2) as usize];
            show(sys::recv(fd, &mut b, libc::MSG_WAITALL))
        }
        // Counts what comes until EOF, by kind.
        "tally" => {
            let (mut b, mut m, mut h, mut n) = (vec![0; 32768], 0, 0, 0);
            loop {
                match sys::read(fd, &mut b) {
                    Ok(0) => return format!("m {m} h {h} other {}", n - m - h),
                    Ok(k) => {
                        let b = &b[..k as usize];
                        m += b.iter().filter(|x| **x == b'm').count();
                        h += b.iter().filter(|x| **x == b'h').count();
                        n += b.len();
                    }
                    Err(e) => return format!("m {m} h {h} other {} {}", n - m - h, sys::errno_name(e)),
                }
            }
        }
        "skip" => {
            e.rx += num(2) as u64;
            "skipped".into()
        }
        c => format!("unknown command {c}"),
    }
}

/// An address by the name scenarios use: `4`, `6`, `any6`, or dotted.
pub fn address(name: &str, port: u16) -> Addr {
    match name {
        "4" => Addr::v4([127, 0, 0, 1], port),
        "6" => Addr::v6(false, port),
        "any6" => Addr::v6(true, port),
        ip => Addr::v4(ip.parse::<std::net::Ipv4Addr>().expect("an IPv4 address").octets(), port),
    }
}

/// A listening socket on a free port.
pub fn listener(a: &Addr, backlog: i32) -> (i32, u16) {
    let fd = sys::socket(a.family(), libc::SOCK_STREAM | libc::SOCK_CLOEXEC).expect("socket") as i32;
    sys::bind(fd, a).expect("bind");
    sys::listen(fd, backlog).expect("listen");
    (fd, sys::getsockname(fd).expect("getsockname").port())
}

/// What a scenario is given.
pub struct World {
    pub place: Place,
    control: i32,
    agent: Agent,
    busy: AtomicBool,
    pub warm_up: usize,
}

enum Agent {
    Thread(thread::JoinHandle<()>),
    Process(i32),
}

/// A connection between this end and the agent.
#[derive(Clone, Copy, Debug)]
pub struct Conn {
    pub end: End,
    /// The agent's fd for it.
    pub far: i32,
}

impl std::ops::Deref for Conn {
    type Target = End;
    fn deref(&self) -> &End {
        &self.end
    }
}

impl std::ops::DerefMut for Conn {
    fn deref_mut(&mut self) -> &mut End {
        &mut self.end
    }
}

impl World {
    pub fn new(place: Place) -> Self {
        let [here, there] = sys::unix_pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC);
        let agent = if place == Place::Threads {
            Agent::Thread(thread::spawn(move || {
                // The process-directed signals of a scenario are meant for its main thread.
                for s in [libc::SIGUSR1, libc::SIGALRM, libc::SIGIO, libc::SIGURG] {
                    sys::mask_signal(libc::SIG_BLOCK, s);
                }
                agent_loop(there);
            }))
        } else {
            let pid = sys::fork(|| {
                let _ = sys::close(here);
                agent_loop(there);
                0
            });
            let _ = sys::close(there);
            Agent::Process(pid)
        };
        let warm_up = std::env::var(crate::WARM_UP).ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
        World { place, control: here, agent, busy: AtomicBool::new(false), warm_up }
    }

    /// Has the agent do something and waits for its answer.
    pub fn ask(&self, cmd: &str) -> String {
        self.start(cmd);
        self.finish()
    }

    /// Has the agent begin something; `finish` gives the answer.
    pub fn start(&self, cmd: &str) {
        assert!(!self.busy.swap(true, Ordering::Relaxed), "the agent is busy");
        sys::send(self.control, cmd.as_bytes(), libc::MSG_NOSIGNAL).expect("a living agent");
    }

    pub fn finish(&self) -> String {
        let mut b = [0; 512];
        let r = loop {
            match sys::recv(self.control, &mut b, 0) {
                Err(libc::EINTR) => {}
                r => break r,
            }
        };
        self.busy.store(false, Ordering::Relaxed);
        match r {
            Ok(n @ 1..) => String::from_utf8_lossy(&b[..n as usize]).into_owned(),
            _ => "agent gone".into(),
        }
    }

    /// A fresh connection over this family (see `address`), not warmed up.
    pub fn cold_on(&self, family: &str) -> Conn {
        if self.place == Place::Procs {
            let port: u16 = self.ask(&format!("listen {family}")).parse().expect("a port");
            let a = address(if family == "any6" { "6" } else { family }, port);
            let fd = sys::socket(a.family(), libc::SOCK_STREAM | libc::SOCK_CLOEXEC).expect("socket") as i32;
            sys::connect(fd, &a).expect("connect");
            let far = self.ask(&format!("accept {port}")).parse().expect("an fd");
            self.ask(&format!("closelistener {port}"));
            Conn { end: End::new(fd), far }
        } else {
            let (l, port) = listener(&address(family, 0), 512);
            self.start(&format!("connect {} {port}", if family == "any6" { "6" } else { family }));
            let fd = sys::accept4(l, libc::SOCK_CLOEXEC).expect("accept") as i32;
            sys::close(l).expect("close");
            let far = self.finish().parse().expect("an fd");
            Conn { end: End::new(fd), far }
        }
    }

    /// A fresh connection that was used enough to be worth upgrading.
    pub fn pair(&self) -> Conn {
        self.pair_on("4")
    }

    pub fn pair_on(&self, family: &str) -> Conn {
        let mut c = self.cold_on(family);
        self.warm(&mut c, 200);
        c
    }

    /// Ping-pongs of one byte: `n`, or as many as are enough in this mode.
    pub fn warm(&self, c: &mut Conn, n: usize) {
        let n = n.min(self.warm_up);
        self.start(&format!("pong {} {n}", c.far));
        let good = c.end.ping(n);
        let far = self.finish();
        if !good || far != "ponged" {
            log!("warm-up failed: {good} {far}");
        }
    }

    /// `ask`, with the connection's far end put after the verb: `"put 10"` is `"put FD 10"`.
    pub fn far(&self, c: &Conn, cmd: &str) -> String {
        self.start_far(c, cmd);
        self.finish()
    }

    pub fn start_far(&self, c: &Conn, cmd: &str) {
        let (verb, rest) = cmd.split_once(' ').unwrap_or((cmd, ""));
        self.start(format!("{verb} {} {rest}", c.far).trim_end_matches(' '));
    }

    /// Both directions still carry the right bytes: what most scenarios end with.
    pub fn still_good(&self, c: &mut Conn) {
        self.start_far(c, "get 3000");
        let put = c.put(3000);
        let r = self.finish();
        self.start_far(c, "put 3000");
        let got = c.get(3000);
        log!("still good: {put}, {r}; {}, {got}", self.finish());
    }

    /// Lets the agent end; call it with no command under way.
    pub fn end(self) {
        let _ = sys::close(self.control);
        match self.agent {
            Agent::Thread(t) => {
                let _ = t.join();
            }
            Agent::Process(pid) => {
                sys::wait(pid);
            }
        }
    }

    /// The agent's process, if it has one.
    pub fn agent_pid(&self) -> Option<i32> {
        match self.agent {
            Agent::Process(pid) => Some(pid),
            Agent::Thread(_) => None,
        }
    }
}

/// Runs `f` in a thread after a pause that lets the caller get into its blocking call first.
///
/// The pause only makes the interesting order likely; every order must give the same transcript.
pub fn later<T: Send + 'static>(ms: u64, f: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(ms));
        f()
    })
}
