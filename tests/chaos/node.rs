//! The pair that chaos is made around: every byte of every connection is known to both ends, by its place.
//!
//! ```text
//! client ── id, seed, bytes there, bytes back ──▶ server      32 bytes
//! client ◀── both streams, at once, then FIN ───▶ server
//! ```
//!
//! A connection is carried by two threads that block, by one set of epoll with many others, or by a process of its own,
//! which may at some place fork and leave one direction to its child, or exec itself with the descriptor inherited.
//! Each end says in one line how it went: `done ID`; `cut ID WHY` after an end or an error that the death of the other
//! end explains; `BAD ID WHY` after anything else.

use std::{
    env,
    io::{self, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

const MOST: usize = 64 << 10;
const HEAD: usize = 32;

/// splitmix64: the words of a stream, and what is drawn.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// The bytes of a stream from `at` on.
fn fill(seed: u64, at: u64, buf: &mut [u8]) {
    let mut i = 0;
    while i < buf.len() {
        let pos = at + i as u64;
        let word = mix(seed ^ (pos / 8)).to_le_bytes();
        let from = (pos % 8) as usize;
        let n = (8 - from).min(buf.len() - i);
        buf[i..i + n].copy_from_slice(&word[from..from + n]);
        i += n;
    }
}

fn say(line: &str) {
    // One write, so that processes and threads do not mix.
    let _ = io::stdout().lock().write_all(format!("{line}\n").as_bytes());
}

/// How a connection, or one direction of it, ended.
enum Ended {
    Cut(String),
    Bad(String),
}

/// One direction, as far as it has come.
#[derive(Clone, Copy)]
struct Way {
    seed: u64,
    at: u64,
    of: u64,
    drawn: u64,
    over: bool,
}

impl Way {
    fn new(seed: u64, of: u64) -> Self {
        Way { seed, at: 0, of, drawn: seed, over: false }
    }

    fn draw(&mut self, n: u64) -> u64 {
        self.drawn = mix(self.drawn.wrapping_add(1));
        self.drawn % n
    }

    /// Mostly small, now and then as much as goes.
    fn size(&mut self) -> usize {
        let most = [64, 1500, 9000, MOST as u64][self.draw(4) as usize];
        1 + self.draw(most) as usize
    }
}

/// A connection as one end sees it.
struct Talk {
    fd: RawFd,
    id: u64,
    tx: Way,
    rx: Way,
}

enum Step {
    Moved,
    Wait,
}

fn failed(what: &str, w: &Way) -> Result<Step, Ended> {
    let at = format!("{} of {}", w.at, w.of);
    let e = io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::EINTR) => Ok(Step::Moved),
        Some(libc::EAGAIN) => Ok(Step::Wait),
        Some(libc::ECONNRESET | libc::EPIPE) => Err(Ended::Cut(format!("{what} at {at}: {e}"))),
        _ => Err(Ended::Bad(format!("{what} at {at}: {e}"))),
    }
}

/// Sends once.
fn push(fd: RawFd, w: &mut Way, buf: &mut [u8]) -> Result<Step, Ended> {
    let n = w.size().min((w.of - w.at) as usize);
    if n == 0 {
        if !w.over {
            // SAFETY: no pointers. Of a connection that was reset the reading direction tells.
            unsafe { libc::shutdown(fd, libc::SHUT_WR) };
            w.over = true;
        }
        return Ok(Step::Moved);
    }
    fill(w.seed, w.at, &mut buf[..n]);
    let half = n / 2;
    let iov = [
        libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: half },
        libc::iovec { iov_base: buf[half..].as_mut_ptr().cast(), iov_len: n - half },
    ];
    // SAFETY: `n` bytes of `buf`, in two parts or in one.
    let r = unsafe {
        match w.draw(3) {
            0 => libc::write(fd, buf.as_ptr().cast(), n),
            1 => libc::send(fd, buf.as_ptr().cast(), n, libc::MSG_NOSIGNAL),
            _ => libc::writev(fd, iov.as_ptr(), 2),
        }
    };
    if r < 0 {
        return failed("sending", w);
    }
    w.at += r as u64;
    Ok(Step::Moved)
}

/// Receives once, and looks at each byte.
fn pull(fd: RawFd, w: &mut Way, buf: &mut [u8], want: &mut [u8]) -> Result<Step, Ended> {
    let n = w.size();
    let half = n / 2;
    let iov = [
        libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: half },
        libc::iovec { iov_base: buf[half..].as_mut_ptr().cast(), iov_len: n - half },
    ];
    let peek = w.draw(8) == 0;
    // SAFETY: room for `n` bytes in `buf`, in two parts or in one.
    let r = unsafe {
        match w.draw(3) {
            _ if peek => libc::recv(fd, buf.as_mut_ptr().cast(), n, libc::MSG_PEEK),
            0 => libc::read(fd, buf.as_mut_ptr().cast(), n),
            1 => libc::recv(fd, buf.as_mut_ptr().cast(), n, 0),
            _ => libc::readv(fd, iov.as_ptr(), 2),
        }
    };
    if r < 0 {
        return failed("receiving", w);
    }
    if r == 0 && w.at < w.of {
        return Err(Ended::Cut(format!("the end at {} of {}", w.at, w.of)));
    }
    let r = r as usize;
    if w.at + r as u64 > w.of {
        return Err(Ended::Bad(format!("{r} bytes at {} of {}", w.at, w.of)));
    }
    fill(w.seed, w.at, &mut want[..r]);
    if let Some(i) = (0..r).find(|i| buf[*i] != want[*i]) {
        let (got, want) = (&buf[i..r.min(i + 8)], &want[i..r.min(i + 8)]);
        return Err(Ended::Bad(format!("byte {}: {got:02x?}, not {want:02x?}", w.at + i as u64)));
    }
    if !peek {
        w.at += r as u64;
        w.over = r == 0;
    }
    Ok(Step::Moved)
}

fn buffers() -> [Vec<u8>; 3] {
    [vec![0; MOST + 1], vec![0; MOST + 1], vec![0; MOST + 1]]
}

fn set_nonblocking(fd: RawFd, on: bool) {
    // SAFETY: no pointers.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, if on { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK });
    }
}

/// Both directions until both are over, or until both together have come to `pause`.
fn drive(t: &mut Talk, pause: u64, [a, b, c]: &mut [Vec<u8>; 3]) -> Result<(), Ended> {
    set_nonblocking(t.fd, true);
    while !(t.tx.over && t.rx.over) && t.tx.at + t.rx.at < pause {
        let sent = if t.tx.over { Step::Wait } else { push(t.fd, &mut t.tx, a)? };
        let got = if t.rx.over { Step::Wait } else { pull(t.fd, &mut t.rx, b, c)? };
        if let (Step::Wait, Step::Wait) = (sent, got) {
            let out = if t.tx.over { 0 } else { libc::POLLOUT };
            let inward = if t.rx.over { 0 } else { libc::POLLIN };
            let mut p = libc::pollfd { fd: t.fd, events: out | inward, revents: 0 };
            // SAFETY: one entry.
            unsafe { libc::poll(&raw mut p, 1, -1) };
        }
    }
    Ok(())
}

fn tell(id: u64, r: &Result<(), Ended>) {
    match r {
        Ok(()) => say(&format!("done {id}")),
        Err(Ended::Cut(why)) => say(&format!("cut {id} {why}")),
        Err(Ended::Bad(why)) => say(&format!("BAD {id} {why}")),
    }
}

/// One direction that blocks.
fn one_way(
    mut step: impl FnMut() -> Result<Step, Ended>,
    mut over: impl FnMut() -> bool,
) -> Result<(), Ended> {
    while !over() {
        if let Step::Wait = step()? {
            return Err(Ended::Bad("EAGAIN of a socket that blocks".into()));
        }
    }
    Ok(())
}

fn send_all(fd: RawFd, w: Way) -> Result<(), Ended> {
    let (w, mut buf) = (std::cell::Cell::new(w), vec![0; MOST + 1]);
    let step = || {
        let mut now = w.get();
        let r = push(fd, &mut now, &mut buf);
        w.set(now);
        r
    };
    one_way(step, || w.get().over)
}

fn receive_all(fd: RawFd, w: Way) -> Result<(), Ended> {
    let (w, mut buf, mut want) = (std::cell::Cell::new(w), vec![0; MOST + 1], vec![0; MOST + 1]);
    let step = || {
        let mut now = w.get();
        let r = pull(fd, &mut now, &mut buf, &mut want);
        w.set(now);
        r
    };
    one_way(step, || w.get().over)
}

/// The worse of two.
fn both(a: Result<(), Ended>, b: Result<(), Ended>) -> Result<(), Ended> {
    match (a, b) {
        (Err(Ended::Bad(e)), _) | (_, Err(Ended::Bad(e))) => Err(Ended::Bad(e)),
        (Err(Ended::Cut(a)), Err(Ended::Cut(b))) => Err(Ended::Cut(format!("{a}; {b}"))),
        (a, Ok(())) => a,
        (_, b) => b,
    }
}

/// Two threads that block.
fn by_threads(t: &Talk) -> Result<(), Ended> {
    let (fd, tx) = (t.fd, t.tx);
    let sending = loop {
        match thread::Builder::new().spawn(move || send_all(fd, tx)) {
            Ok(s) => break s,
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    let got = receive_all(t.fd, t.rx);
    if got.is_err() {
        // The other thread may be in a full buffer.
        // SAFETY: no pointers.
        unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
    }
    let sent = sending.join().unwrap_or(Err(Ended::Bad("a panic".into())));
    both(got, sent)
}

/// A process of its own, which may fork or exec in the middle.
fn by_process(mut t: Talk) -> Result<(), Ended> {
    let mut bufs = buffers();
    let pause = t.tx.draw(t.tx.of + t.rx.of + 1);
    let what = t.tx.draw(3);
    if what == 0 {
        return drive(&mut t, u64::MAX, &mut bufs);
    }
    drive(&mut t, pause, &mut bufs)?;
    say(&format!("{} {} at {} and {}", ["", "forks", "execs"][what as usize], t.id, t.tx.at, t.rx.at));
    if what == 1 {
        return shared(&t);
    }
    // SAFETY: a program that is not ready yet is not to be disturbed; no pointers but the sets'.
    unsafe {
        libc::signal(libc::SIGUSR1, libc::SIG_IGN);
        libc::fcntl(t.fd, libc::F_SETFD, 0);
    }
    let numbers =
        [t.id, t.tx.seed, t.tx.at, t.tx.of, t.tx.over.into(), t.rx.seed, t.rx.at, t.rx.of, t.rx.over.into()];
    let mut c = Command::new(env::current_exe().expect("our own path"));
    c.args(["--node", "resume", &t.fd.to_string()]).args(numbers.map(|n| n.to_string()));
    loop {
        let e = c.exec();
        match e.raw_os_error() {
            // execve(2) may fail so.
            Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN) => {
                thread::sleep(Duration::from_millis(1));
            }
            _ => return Err(Ended::Bad(format!("exec: {e}"))),
        }
    }
}

/// The child receives, the parent sends: both by one connection.
fn shared(t: &Talk) -> Result<(), Ended> {
    set_nonblocking(t.fd, false);
    // SAFETY: one thread, so the child may do what it likes.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let r = receive_all(t.fd, t.rx);
        if let Err(Ended::Bad(why)) = &r {
            say(&format!("BAD {} child: {why}", t.id));
        }
        // SAFETY: ends this process, with nobody's buffers.
        unsafe {
            libc::_exit(match r {
                Ok(()) => 0,
                Err(Ended::Cut(_)) => 2,
                Err(_) => 3,
            })
        };
    }
    if child < 0 {
        return both(receive_all(t.fd, t.rx), send_all(t.fd, t.tx));
    }
    let sent = send_all(t.fd, t.tx);
    let mut status = 0;
    // SAFETY: an int.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {}
    let got = match status {
        0 => Ok(()),
        s => Err(Ended::Cut(format!("the child that receives ended with {s}"))),
    };
    both(got, sent)
}

fn head(id: u64, seed: u64, there: u64, back: u64) -> [u8; HEAD] {
    let mut b = [0; HEAD];
    b.as_chunks_mut::<8>().0.iter_mut().zip([id, seed, there, back]).for_each(|(c, v)| *c = v.to_le_bytes());
    b
}

/// Who carries connections.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    Threads,
    Epoll,
    Processes,
}

fn style(name: &str) -> Style {
    match name {
        "threads" => Style::Threads,
        "epoll" => Style::Epoll,
        _ => Style::Processes,
    }
}

/// Many connections in one thread: what is known of each, and its first bytes.
struct Member {
    talk: Talk,
    head: [u8; HEAD],
    headed: usize,
    known: bool,
}

struct Set {
    ep: RawFd,
    edge: u32,
    members: Vec<Option<Member>>,
    bufs: [Vec<u8>; 3],
}

impl Set {
    /// What it needs is there from the start, so that nothing of the program's own fails for want of memory.
    fn new(edge: bool) -> Self {
        // SAFETY: no pointers.
        let ep = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        let members = (0..1024).map(|_| None).collect();
        Set { ep, edge: if edge { libc::EPOLLET as u32 } else { 0 }, members, bufs: buffers() }
    }

    fn ctl(&self, op: i32, fd: RawFd, events: u32, data: u64) -> bool {
        let mut e = libc::epoll_event { events, u64: data };
        loop {
            // SAFETY: one event.
            if unsafe { libc::epoll_ctl(self.ep, op, fd, &raw mut e) } == 0 {
                return true;
            }
            // The kernel gives EINTR only where a call is put before `faults.rs` first, and a signal comes meanwhile.
            if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                return false;
            }
        }
    }

    fn wanted(&self, m: &Member) -> u32 {
        let out = if m.known && (!m.talk.tx.over || self.edge != 0) { libc::EPOLLOUT } else { 0 };
        let inward = if !m.talk.rx.over || self.edge != 0 { libc::EPOLLIN } else { 0 };
        (out | inward) as u32 | self.edge
    }

    fn add(&mut self, m: Member) {
        let Some(i) = self.members.iter().position(Option::is_none) else {
            // SAFETY: ours.
            unsafe { libc::close(m.talk.fd) };
            return;
        };
        set_nonblocking(m.talk.fd, true);
        if !self.ctl(libc::EPOLL_CTL_ADD, m.talk.fd, self.wanted(&m), i as u64) {
            say(&format!("BAD {} epoll_ctl: {}", m.talk.id, io::Error::last_os_error()));
        }
        self.members[i] = Some(m);
    }

    /// As far as this one comes. True: it is over.
    fn serve(&mut self, i: usize) -> bool {
        let Some(mut m) = self.members[i].take() else { return true };
        let known = m.known;
        let before = (m.talk.tx.over, m.talk.rx.over);
        let r = self.moves(&mut m);
        let over = match &r {
            Ok(over) => *over,
            Err(_) => true,
        };
        if !over {
            let now = (m.talk.tx.over, m.talk.rx.over);
            if self.edge == 0 && (known, before) != (m.known, now) || known != m.known {
                self.ctl(libc::EPOLL_CTL_MOD, m.talk.fd, self.wanted(&m), i as u64);
            }
            self.members[i] = Some(m);
            return false;
        }
        if m.known {
            tell(m.talk.id, &r.map(|_| ()));
        }
        // SAFETY: ours, and closed once.
        unsafe { libc::close(m.talk.fd) };
        true
    }

    fn moves(&mut self, m: &mut Member) -> Result<bool, Ended> {
        let [a, b, c] = &mut self.bufs;
        while !m.known {
            let rest = &mut m.head[m.headed..];
            // SAFETY: room for the rest of the head.
            let r = unsafe { libc::read(m.talk.fd, rest.as_mut_ptr().cast(), rest.len()) };
            match r {
                0 => return Ok(true),
                1.. => m.headed += r as usize,
                _ if matches!(failed("head", &m.talk.rx)?, Step::Wait) => return Ok(false),
                _ => {}
            }
            if m.headed == HEAD {
                learn(m);
            }
        }
        // Level-triggered, a few steps at a time, and the others come in between.
        let mut turns = if self.edge == 0 { 4 } else { u32::MAX };
        while turns > 0 {
            turns -= 1;
            let t = &mut m.talk;
            let sent = if t.tx.over { Step::Wait } else { push(t.fd, &mut t.tx, a)? };
            let got = if t.rx.over { Step::Wait } else { pull(t.fd, &mut t.rx, b, c)? };
            if t.tx.over && t.rx.over {
                return Ok(true);
            }
            if let (Step::Wait, Step::Wait) = (sent, got) {
                break;
            }
        }
        Ok(false)
    }

    fn wait(&self, events: &mut [libc::epoll_event; 16]) -> usize {
        // SAFETY: room for 16 events.
        unsafe { libc::epoll_wait(self.ep, events.as_mut_ptr(), 16, -1).max(0) as usize }
    }
}

/// The server has read the head.
fn learn(m: &mut Member) {
    let n: Vec<u64> = m.head.as_chunks::<8>().0.iter().map(|c| u64::from_le_bytes(*c)).collect();
    m.known = true;
    m.talk.id = n[0];
    m.talk.rx = Way::new(n[1], n[2]);
    m.talk.tx = Way::new(!n[1], n[3]);
    say(&format!("open {}", n[0]));
}

fn stranger(fd: RawFd) -> Member {
    let none = Way::new(0, 0);
    Member { talk: Talk { fd, id: 0, tx: none, rx: none }, head: [0; HEAD], headed: 0, known: false }
}

/// Blocks for the head. `None`: the client is gone before it.
fn received_head(fd: RawFd) -> Option<Talk> {
    let mut m = stranger(fd);
    while !m.known {
        let rest = &mut m.head[m.headed..];
        // SAFETY: room for the rest of the head.
        let r = unsafe { libc::read(fd, rest.as_mut_ptr().cast(), rest.len()) };
        match r {
            1.. => m.headed += r as usize,
            0 => return None,
            _ if matches!(failed("head", &m.talk.rx), Ok(Step::Moved)) => {}
            _ => return None,
        }
        if m.headed == HEAD {
            learn(&mut m);
        }
    }
    Some(m.talk)
}

fn server(style: Style, edge: bool) -> ExitCode {
    let Ok(l) = TcpListener::bind("127.0.0.1:0") else { return ExitCode::from(3) };
    if style == Style::Epoll {
        return serve_set(&l, edge);
    }
    say(&format!("port {}", l.local_addr().map_or(0, |a| a.port())));
    if style == Style::Processes {
        // SAFETY: children are not waited for.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    }
    loop {
        let Ok((s, _)) = l.accept() else {
            // No descriptors for the moment.
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        if style == Style::Processes {
            // SAFETY: one thread, so the child may do what it likes.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: `shared` waits for a child of its own.
                    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
                    drop(l);
                    if let Some(t) = received_head(s.as_raw_fd()) {
                        let id = t.id;
                        tell(id, &by_process(t));
                    }
                    return ExitCode::SUCCESS;
                }
                _ => continue,
            }
        }
        thread::spawn(move || {
            if let Some(t) = received_head(s.as_raw_fd()) {
                let r = by_threads(&t);
                drop(s);
                tell(t.id, &r);
            }
        });
    }
}

fn serve_set(l: &TcpListener, edge: bool) -> ExitCode {
    let mut set = Set::new(edge);
    let _ = l.set_nonblocking(true);
    set.ctl(libc::EPOLL_CTL_ADD, l.as_raw_fd(), libc::EPOLLIN as u32, u64::MAX);
    say(&format!("port {}", l.local_addr().map_or(0, |a| a.port())));
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    loop {
        let n = set.wait(&mut events);
        for e in &events[..n] {
            if e.u64 != u64::MAX {
                set.serve(e.u64 as usize);
                continue;
            }
            match l.accept() {
                Ok((s, _)) => set.add(stranger(s.into_raw_fd())),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// How many bytes connection `id` has there and back, of up to `bytes`.
pub fn lengths(id: u64, bytes: u64) -> (u64, u64) {
    (mix(mix(id)) % bytes, mix(mix(id) ^ 1) % bytes)
}

/// Connects, and sends the head. Without descriptors it is tried again, and a server that is gone is no failure.
fn connected(port: u16, id: u64, seed: u64, bytes: u64) -> Result<Talk, Ended> {
    let s = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(s) => break s,
            Err(e) if e.raw_os_error() == Some(libc::EMFILE) => thread::sleep(Duration::from_millis(1)),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e)
                if [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionReset].contains(&e.kind()) =>
            {
                return Err(Ended::Cut(format!("connect: {e}")));
            }
            Err(e) => return Err(Ended::Bad(format!("connect: {e}"))),
        }
    };
    let (there, back) = lengths(id, bytes);
    if let Err(e) = (&s).write_all(&head(id, seed, there, back)) {
        return Err(Ended::Cut(format!("head: {e}")));
    }
    Ok(Talk { fd: s.into_raw_fd(), id, tx: Way::new(seed, there), rx: Way::new(!seed, back) })
}

fn client(style: Style, edge: bool, port: u16, first: u64, connections: u64, bytes: u64) -> ExitCode {
    let mut set = (style == Style::Epoll).then(|| Set::new(edge));
    say("begun");
    let ids = first..first + connections;
    match style {
        Style::Threads => {
            let one = move |id| {
                let r = connected(port, id, mix(id), bytes).and_then(|t| {
                    let r = by_threads(&t);
                    // SAFETY: ours, and closed once.
                    unsafe { libc::close(t.fd) };
                    r
                });
                tell(id, &r);
            };
            let all: Vec<_> = ids.map(|id| thread::spawn(move || one(id))).collect();
            all.into_iter().for_each(|t| drop(t.join()));
        }
        Style::Epoll => {
            let Some(set) = &mut set else { return ExitCode::from(3) };
            let mut open = 0;
            for id in ids {
                match connected(port, id, mix(id), bytes) {
                    Ok(talk) => {
                        set.add(Member { talk, head: [0; HEAD], headed: HEAD, known: true });
                        open += 1;
                    }
                    Err(e) => tell(id, &Err(e)),
                }
            }
            // A reader that takes its time, with all of them open.
            let slow = env::var_os("SMC_CHAOS_SLOW").is_some();
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
            while open > 0 {
                if slow {
                    thread::sleep(Duration::from_micros(10));
                }
                let n = set.wait(&mut events);
                for e in &events[..n] {
                    open -= u64::from(set.serve(e.u64 as usize));
                }
            }
        }
        Style::Processes => {
            for id in ids {
                // SAFETY: one thread, so the child may do what it likes.
                if unsafe { libc::fork() } == 0 {
                    tell(id, &connected(port, id, mix(id), bytes).and_then(by_process));
                    return ExitCode::SUCCESS;
                }
            }
            // SAFETY: no status is wanted.
            while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } >= 0
                || io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
            {}
        }
    }
    say("over");
    ExitCode::SUCCESS
}

/// After an exec with the descriptor inherited.
fn resume(n: &[u64]) -> ExitCode {
    let way = |n: &[u64]| Way { at: n[1], over: n[3] != 0, ..Way::new(n[0], n[2]) };
    let mut t = Talk { fd: n[0] as RawFd, id: n[1], tx: way(&n[2..]), rx: way(&n[6..]) };
    tell(t.id, &drive(&mut t, u64::MAX, &mut buffers()));
    // SAFETY: this process's, by inheritance.
    let s = unsafe { TcpStream::from_raw_fd(t.fd) };
    let _ = s.shutdown(Shutdown::Both);
    ExitCode::SUCCESS
}

extern "C" fn heard(_: i32) {}

/// The program: `server STYLE EDGE`, `client STYLE EDGE PORT ID CONNECTIONS BYTES`, `resume FD …`.
pub fn run(args: &[String]) -> ExitCode {
    // SAFETY: a handler that does nothing, and without SA_RESTART; writing to who is gone is told by an error.
    unsafe {
        let mut act: libc::sigaction = std::mem::zeroed();
        act.sa_sigaction = heard as extern "C" fn(i32) as usize;
        libc::sigaction(libc::SIGUSR1, &raw const act, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
    let numbers: Vec<u64> = args.iter().map(|a| a.parse().unwrap_or(0)).collect();
    match args[0].as_str() {
        "server" => server(style(&args[1]), numbers[2] != 0),
        "client" => {
            let n = &numbers[2..];
            client(style(&args[1]), n[0] != 0, n[1] as u16, n[2], n[3], n[4])
        }
        _ => resume(&numbers[1..]),
    }
}
