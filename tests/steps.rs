//! A killed lock owner, at every point: a child that shares its parent's connection is killed before each instruction of
//! a call, and each time the parent goes on.
//!
//! ```text
//! peer ── connection ── parent ─┬─ ptrace: one step at a time, or a breakpoint, then SIGKILL
//!                               └─ child: one call on the connection
//! ```
//!
//! What the child did is done or not done, never half: its message arrives whole or not at all, what it has read is
//! gone or all there. No lock of a dead owner, no doorbell that it was about to ring and no seat of its stops the
//! parent or the peer.
//!
//! A first child makes the whole call, step by step, which tells the instructions. Then each of them is the last that a
//! child comes to, once where the call comes to it first and once where it does last; but not each turn of a loop.
//! `zombie`: the parent does not wait for its dead child before it goes on.

#[path = "harness/mod.rs"]
mod harness;

use harness::{Lib, Run, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd as _, RawFd},
    process::{Command, ExitCode},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

/// A message: 8 words, the first of which says whose it is.
const WORDS: usize = 8;
const LEN: usize = WORDS * 8;
/// What the peer sends at once to fill the ring, and what a child reads of it.
const FLOOD: usize = 96 << 10;
const GULP: usize = 5 << 10;

const OWN: u64 = 1 << 56;
const CHILD: u64 = 2 << 56;
const ASK: u64 = 3 << 56;
const POUR: u64 = 4 << 56;
const ANSWER: u64 = 5 << 56;

/// The calls during which the child dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    /// send(2) to a peer that sleeps for bytes.
    Send,
    /// recv(2) of a message that is there.
    Receive,
    /// recv(2) from a full ring, with a peer that sleeps for space.
    Drain,
    /// recv(2) that waits, until it sleeps.
    Wait,
    /// poll(2) that finds nothing.
    Poll,
    /// close(2) of the child's descriptor.
    Close,
}

const ACTS: [(&str, Act); 6] = [
    ("send", Act::Send),
    ("receive", Act::Receive),
    ("drain", Act::Drain),
    ("wait", Act::Wait),
    ("poll", Act::Poll),
    ("close", Act::Close),
];

fn message(first: u64) -> [u8; LEN] {
    let mut b = [0; LEN];
    for (i, w) in b.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *w = first.wrapping_add(i as u64 * 0x0101_0101).to_le_bytes();
    }
    b
}

/// The first word of a message that is whole.
fn whole(b: &[u8; LEN]) -> io::Result<u64> {
    let first = u64::from_le_bytes(*b.first_chunk().expect("a message"));
    if *b == message(first) { Ok(first) } else { Err(io::Error::other(format!("torn: {b:02x?}"))) }
}

fn next(mut s: &TcpStream) -> io::Result<u64> {
    let mut b = [0; LEN];
    s.read_exact(&mut b)?;
    whole(&b)
}

fn tell(mut s: &TcpStream, first: u64) -> io::Result<()> {
    s.write_all(&message(first))
}

/// Bytes of a flood from `at` on.
fn poured(at: usize, buf: &mut [u8]) {
    for (i, b) in buf.iter_mut().enumerate() {
        *b = ((at + i) % 251) as u8;
    }
}

// ---- the peer

/// Answers each message of the parent's, and wants between two of them one of a child's at most.
fn peer() -> io::Result<()> {
    let l = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", l.local_addr()?.port());
    let (s, _) = l.accept()?;
    let mut from_child = None;
    let mut whole_ones = 0u64;
    loop {
        let m = match next(&s) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            m => m?,
        };
        let (who, n) = (m >> 56 << 56, m << 8 >> 8);
        match who {
            CHILD if from_child.is_none() => from_child = Some(n),
            OWN if from_child.is_none_or(|c| c == n) => {
                whole_ones += u64::from(from_child.take().is_some());
                tell(&s, ANSWER | n)?;
            }
            ASK => tell(&s, ANSWER | n)?,
            POUR => {
                let mut b = vec![0; FLOOD];
                poured(0, &mut b);
                (&s).write_all(&b)?;
            }
            _ => return Err(io::Error::other(format!("message {m:x} after {from_child:?}"))),
        }
    }
    println!("over, {whole_ones} of children");
    Ok(())
}

// ---- the parent and its children

/// What parent and child see of each other beside the connection.
struct Shared {
    /// 1: the call begins with the next step. 2: it is over.
    stage: AtomicU32,
}

fn shared() -> &'static Shared {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, never unmapped, of zeroes, which is a valid `Shared`.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        assert_ne!(p, libc::MAP_FAILED, "mmap");
        &*p.cast::<Shared>()
    }
}

fn call(act: Act, fd: RawFd, n: u64, buf: &mut [u8]) {
    let m = message(CHILD | n);
    // SAFETY: buffers that live over the calls.
    unsafe {
        match act {
            Act::Send => _ = libc::send(fd, m.as_ptr().cast(), LEN, 0),
            Act::Receive | Act::Wait => _ = libc::recv(fd, buf.as_mut_ptr().cast(), LEN, 0),
            Act::Drain => _ = libc::recv(fd, buf.as_mut_ptr().cast(), GULP, 0),
            Act::Poll => {
                let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                _ = libc::poll(&raw mut p, 1, 0);
            }
            Act::Close => _ = libc::close(fd),
        }
    }
}

/// A child of ours that is traced.
struct Traced(i32);

impl Traced {
    /// One that stands before the call.
    fn fork(act: Act, fd: RawFd, n: u64, shared: &Shared, buf: &mut [u8]) -> Self {
        shared.stage.store(0, SeqCst);
        // SAFETY: one thread, so the child may do what it likes.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            Traced(0).ask(libc::PTRACE_TRACEME, 0, 0);
            // SAFETY: no pointers.
            unsafe { libc::raise(libc::SIGSTOP) };
            shared.stage.store(1, SeqCst);
            call(act, fd, n, buf);
            shared.stage.store(2, SeqCst);
            loop {
                // SAFETY: no pointers.
                unsafe { libc::pause() };
            }
        }
        assert!(pid > 0, "fork: {}", io::Error::last_os_error());
        let t = Traced(pid);
        assert!(t.stands(), "the child does not begin");
        t
    }

    fn ask(&self, request: libc::c_uint, at: usize, value: usize) -> libc::c_long {
        // SAFETY: an address in the child, or a `user_regs_struct` of ours as the value.
        unsafe { libc::ptrace(request, self.0, at, value) }
    }

    /// Whether the child stands still; false: it sleeps in the kernel, or has ended.
    fn stands(&self) -> bool {
        let mut status = 0;
        for turn in 0u32.. {
            // SAFETY: an int.
            match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
                0 if turn > 64 && state(self.0) == b'S' => return false,
                0 => std::thread::yield_now(),
                _ => return libc::WIFSTOPPED(status),
            }
        }
        false
    }

    fn registers(&self) -> libc::user_regs_struct {
        // SAFETY: plain data, for which zero is a value.
        let mut r: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.ask(libc::PTRACE_GETREGS, 0, (&raw mut r).addr());
        r
    }

    /// Steps to the end of the call, or until it sleeps; where it has been.
    fn steps(&self, shared: &Shared) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            self.ask(libc::PTRACE_SINGLESTEP, 0, 0);
            let stands = self.stands();
            match shared.stage.load(SeqCst) {
                0 => {}
                1 if stands => all.push(self.registers().rip),
                _ => return all,
            }
        }
    }

    /// Goes on until it is before the instruction at `at` for the `n`th time. False: it has not come there.
    fn reaches(&self, at: u64, n: u32) -> bool {
        const INT3: usize = 0xcc;
        let at = at as usize;
        let word = self.ask(libc::PTRACE_PEEKTEXT, at, 0) as usize;
        for turn in 1.. {
            // The child's own copy of the page: nobody else's code changes.
            self.ask(libc::PTRACE_POKETEXT, at, word & !0xff | INT3);
            self.ask(libc::PTRACE_CONT, 0, 0);
            if !self.stands() {
                return false;
            }
            let mut r = self.registers();
            if r.rip != at as u64 + 1 {
                return false;
            }
            r.rip = at as u64;
            self.ask(libc::PTRACE_SETREGS, 0, (&raw mut r).addr());
            self.ask(libc::PTRACE_POKETEXT, at, word);
            if turn == n {
                return true;
            }
            self.ask(libc::PTRACE_SINGLESTEP, 0, 0);
            if !self.stands() {
                return false;
            }
        }
        false
    }

    fn kill(&self) {
        // SAFETY: no pointers; a child of ours that was not waited for to its end.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        until(|| matches!(state(self.0), b'Z' | b'X'));
    }

    fn wait(&self) {
        // SAFETY: no status is asked for.
        while unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) } == self.0 {}
    }
}

/// The state letter of a process: `S` is asleep.
fn state(pid: i32) -> u8 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit(')').next().unwrap_or("").trim_start();
    rest.bytes().next().unwrap_or(b'Z')
}

fn unread(fd: RawFd) -> usize {
    let mut n = 0i32;
    // SAFETY: an int.
    unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut n) };
    n as usize
}

fn until(mut cond: impl FnMut() -> bool) {
    while !cond() {
        std::thread::yield_now();
    }
}

fn expect(what: &str, got: u64, want: u64) -> io::Result<()> {
    if got == want { Ok(()) } else { Err(io::Error::other(format!("{what}: {got:x}, not {want:x}"))) }
}

/// Where a child is killed: before the instruction, for the `n`th time that the call comes to it.
#[derive(Clone, Copy)]
struct Place {
    at: u64,
    n: u32,
}

/// A loop's instructions count as one place if they come up more often.
const TURNS: u32 = 8;

/// Each instruction, where it comes first and where it comes last.
fn places(steps: &[u64]) -> Vec<Place> {
    let mut times = BTreeMap::new();
    for at in steps {
        *times.entry(*at).or_insert(0u32) += 1;
    }
    let mut seen = BTreeMap::new();
    let mut out = Vec::new();
    for at in steps {
        let n = seen.entry(*at).or_insert(0u32);
        *n += 1;
        if *n == 1 || *n == times[at] && *n <= TURNS {
            out.push(Place { at: *at, n: *n });
        }
    }
    out
}

/// One connection, whose parent's children die.
struct Parent<'a> {
    act: Act,
    s: TcpStream,
    peer: i32,
    shared: &'a Shared,
    zombie: bool,
    n: u64,
}

impl Parent<'_> {
    /// What is there before the call.
    fn prepare(&self) -> io::Result<()> {
        let fd = self.s.as_raw_fd();
        match self.act {
            Act::Receive => {
                tell(&self.s, ASK | self.n)?;
                until(|| unread(fd) == LEN);
            }
            Act::Drain => {
                tell(&self.s, POUR | self.n)?;
                // As much as goes, and then the peer sleeps.
                let mut last = 0;
                until(|| {
                    let now = unread(fd);
                    state(self.peer) == b'S' && now > GULP && std::mem::replace(&mut last, now) == now
                });
            }
            _ => {}
        }
        until(|| state(self.peer) == b'S');
        Ok(())
    }

    /// What must be after it, if the call was `over` or not.
    fn check(&self, over: bool) -> io::Result<()> {
        let n = self.n;
        match self.act {
            Act::Receive => {
                tell(&self.s, ASK | (n + 1))?;
                let first = next(&self.s)?;
                if first == ANSWER | n && !over {
                    expect("the next", next(&self.s)?, ANSWER | (n + 1))?;
                } else {
                    expect("the one after what the child has read", first, ANSWER | (n + 1))?;
                }
            }
            Act::Drain => {
                let (mut want, mut buf) = (vec![0; FLOOD], vec![0; FLOOD]);
                poured(0, &mut want);
                // The child has read its part, or nothing: the first bytes tell.
                (&self.s).read_exact(&mut buf[..64])?;
                let from = if buf[..64] == want[..64] { 0 } else { GULP };
                let len = FLOOD - from;
                (&self.s).read_exact(&mut buf[64..len])?;
                if buf[..len] != want[from..] || over && from == 0 {
                    return Err(io::Error::other(format!("not the bytes from {from} on")));
                }
            }
            _ => {}
        }
        tell(&self.s, OWN | n)?;
        expect("the answer", next(&self.s)?, ANSWER | n)
    }

    /// A child, and what `with` it does; whether its call was over.
    fn round<T>(&mut self, with: impl FnOnce(&Traced) -> T) -> io::Result<(T, bool)> {
        self.prepare()?;
        let mut buf = vec![0; GULP];
        let child = Traced::fork(self.act, self.s.as_raw_fd(), self.n, self.shared, &mut buf);
        let r = with(&child);
        let over = self.shared.stage.load(SeqCst) == 2;
        child.kill();
        if !self.zombie {
            child.wait();
        }
        let checked = self.check(over);
        if self.zombie {
            child.wait();
        }
        self.n += 2;
        checked.map(|()| (r, over))
    }
}

fn parent(act: Act, port: u16, peer: i32, zombie: bool) -> io::Result<()> {
    let s = TcpStream::connect(("127.0.0.1", port))?;
    // Into the ring, both ways.
    for n in 0..50 {
        tell(&s, OWN | n)?;
        expect("the answer", next(&s)?, ANSWER | n)?;
    }
    let shared = shared();
    let mut p = Parent { act, s, peer, shared, zombie, n: 100 };
    let (steps, _) = p.round(|c| c.steps(shared))?;
    let places = places(&steps);
    let mut killed = 0;
    for (i, place) in places.iter().enumerate() {
        let (there, _) = p.round(|c| c.reaches(place.at, place.n)).map_err(|e| {
            io::Error::other(format!("{act:?}, {i} of {} places ({:x}): {e}", places.len(), place.at))
        })?;
        killed += u32::from(there);
    }
    println!("steps {}\nplaces {}\nkilled {killed}", steps.len(), places.len());
    Ok(())
}

fn told(r: io::Result<()>) -> ExitCode {
    match r {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("BAD {e}");
            ExitCode::FAILURE
        }
    }
}

// ---- the tests

fn this(args: &[&str]) -> Command {
    let mut c = Command::new(env::current_exe().expect("our own path"));
    c.args(args).env("SMC_UPGRADE_AFTER", "0").env("SMC_RMB_SIZE", "16384").env("SMC_SPIN_US", "0");
    c
}

fn number(s: &str, start: &str) -> Option<u64> {
    s.lines().find_map(|l| l.strip_prefix(start)?.trim().parse().ok())
}

fn killed_in(name: &str, zombie: bool) -> Result<(), Failed> {
    let lib = Lib::find()?;
    let mut run = Run::new(&format!("steps-{name}-{zombie}"));
    run.limit(Duration::from_secs(100));
    run.preload(&lib);
    let mut peer = run.start("peer", this(&["--peer"]))?;
    peer.until("a port", |p| p.stdout().contains("port "))?;
    let port = number(&peer.stdout(), "port ").ok_or("no port")?.to_string();
    let args = ["--parent", name, &port, &peer.pid().to_string(), &zombie.to_string()];
    let parent = run.start("parent", this(&args))?.finish()?;
    let peer = peer.finish()?;
    let all = format!("{}{}{}\n{}{}", parent.stdout, parent.stderr, parent.status, peer.stdout, peer.stderr);
    ensure(parent.success && peer.success, || all.clone())?;
    let of = |what| number(&parent.stdout, what).ok_or_else(|| all.clone());
    let (steps, places, killed) = (of("steps ")?, of("places ")?, of("killed ")?);
    // With the library a call is some hundred instructions of its own, and mostly the same: what a child before it has
    // left undone makes a difference.
    ensure(lib.is_none() || steps > 60, || format!("the call was not seen\n{all}"))?;
    ensure(killed * 4 > places * 3, || format!("most places were not come to again\n{all}"))?;
    ensure(lib.is_none() || parent.stats.shm == 1 && parent.stats.downgrades == 0, || {
        format!("not in the ring to the end: {:?}\n{all}", parent.stats)
    })?;
    eprintln!("{name}: {steps} instructions, killed in {killed} places");
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("--peer") => return told(peer()),
        Some("--parent") => {
            let act = ACTS.iter().find(|a| a.0 == args[1]).expect("a call").1;
            let number = |i: usize| args[i].parse().expect("a number");
            return told(parent(act, number(2) as u16, number(3), args[4] == "true"));
        }
        _ => {}
    }
    let both = ACTS.iter().flat_map(|(name, _)| [(*name, false), (*name, true)]);
    let trials = both.map(|(name, zombie)| {
        let title = format!("killed_in_{name}{}", if zombie { "_zombie" } else { "" });
        Trial::test(title, move || killed_in(name, zombie))
    });
    let trials = trials.collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
