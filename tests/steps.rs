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
//!
//! And at the same places a signal comes instead of death, whose handler sends a message by the same connection, or two
//! signals, the second some instructions after the first: all messages arrive, once, the call does what it was to do,
//! and the thread has the mask that it had.

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
    sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst},
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
/// Of the two handlers.
const FIRST: u64 = 6 << 56;
const SECOND: u64 = 7 << 56;

/// What the peer has had of a child: a bit each of the answer.
fn bit(who: u64) -> u64 {
    1 << (who >> 56) << 40
}

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
    /// shutdown(2) of the sending direction, with a peer that sleeps for bytes. Once for each connection.
    Shut,
}

const ACTS: [(&str, Act); 7] = [
    ("send", Act::Send),
    ("receive", Act::Receive),
    ("drain", Act::Drain),
    ("wait", Act::Wait),
    ("poll", Act::Poll),
    ("close", Act::Close),
    ("shut", Act::Shut),
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

/// Serves connections until one ends without a message.
fn peer() -> io::Result<()> {
    let l = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", l.local_addr()?.port());
    while serve(&l.accept()?.0)? > 0 {}
    Ok(())
}

/// Answers each message of the parent's, and tells what it has had of a child since the one before. How many came.
fn serve(s: &TcpStream) -> io::Result<u64> {
    let (mut seen, mut of) = (0, 0);
    for count in 0.. {
        let m = match next(s) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(count),
            m => m?,
        };
        let (who, n) = (m >> 56 << 56, m << 8 >> 8);
        match who {
            CHILD | FIRST | SECOND if seen & bit(who) == 0 && (seen == 0 || of == n) => {
                seen |= bit(who);
                of = n;
            }
            OWN if seen == 0 || of == n => tell(s, ANSWER | std::mem::take(&mut seen) | n)?,
            ASK => tell(s, ANSWER | n)?,
            POUR => {
                let mut b = vec![0; FLOOD];
                poured(0, &mut b);
                (&mut &*s).write_all(&b)?;
            }
            _ => return Err(io::Error::other(format!("message {m:x} after {seen:x} of {of}"))),
        }
    }
    Ok(0)
}

// ---- the parent and its children

/// What parent and child see of each other beside the connection.
#[derive(Debug)]
struct Shared {
    /// 1: the call begins with the next step. 2: it is over.
    stage: AtomicU32,
    /// The child's socket, and its number of the round.
    fd: AtomicI32,
    n: AtomicU64,
    /// What the call and the two handlers' sends have returned, and plus 1, so that 0 means that they have not.
    called: AtomicI64,
    handled: [AtomicI64; 2],
    /// The mask after all, plus 1.
    mask: AtomicU64,
}

/// For handlers.
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_signal(sig: i32) {
    // SAFETY: `shared` has set it, before the child was forked.
    let shared = unsafe { &*SHARED.load(SeqCst) };
    let (i, who) = if sig == libc::SIGUSR1 { (0, FIRST) } else { (1, SECOND) };
    let m = message(who | shared.n.load(SeqCst));
    // SAFETY: a buffer that lives over the call.
    let r = unsafe { libc::send(shared.fd.load(SeqCst), m.as_ptr().cast(), LEN, libc::MSG_NOSIGNAL) };
    shared.handled[i].fetch_add(r as i64 + 2, SeqCst);
}

fn shared() -> &'static Shared {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, never unmapped, of zeroes, which is a valid `Shared`.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        assert_ne!(p, libc::MAP_FAILED, "mmap");
        SHARED.store(p.cast(), SeqCst);
        &*p.cast::<Shared>()
    }
}

/// The call's result.
fn call(act: Act, fd: RawFd, n: u64, buf: &mut [u8]) -> i64 {
    let m = message(CHILD | n);
    let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: buffers that live over the calls.
    unsafe {
        match act {
            Act::Send => libc::send(fd, m.as_ptr().cast(), LEN, 0) as i64,
            Act::Receive | Act::Wait => libc::recv(fd, buf.as_mut_ptr().cast(), LEN, 0) as i64,
            Act::Drain => libc::recv(fd, buf.as_mut_ptr().cast(), GULP, 0) as i64,
            Act::Poll => libc::poll(&raw mut p, 1, 0).into(),
            Act::Close => libc::close(fd).into(),
            Act::Shut => libc::shutdown(fd, libc::SHUT_WR).into(),
        }
    }
}

/// What it is if nothing goes wrong.
fn wanted(act: Act) -> i64 {
    match act {
        Act::Send | Act::Receive | Act::Wait => LEN as i64,
        Act::Drain => GULP as i64,
        Act::Poll | Act::Close | Act::Shut => 0,
    }
}

fn handle_signals() {
    for sig in [libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: plain data, and a handler that is what it is said to be.
        unsafe {
            let mut act: libc::sigaction = std::mem::zeroed();
            act.sa_sigaction = on_signal as extern "C" fn(i32) as usize;
            act.sa_flags = libc::SA_RESTART;
            libc::sigaction(sig, &raw const act, std::ptr::null_mut());
        }
    }
}

/// The thread's blocked signals, as the kernel has them.
fn mask() -> u64 {
    let mut set = 0u64;
    // SAFETY: a mask of 8 bytes to be written.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut set, 8) };
    set
}

/// A child of ours that is traced.
struct Traced(i32);

impl Traced {
    /// One that stands before the call.
    fn fork(act: Act, fd: RawFd, n: u64, shared: &Shared, buf: &mut [u8]) -> Self {
        shared.stage.store(0, SeqCst);
        shared.fd.store(fd, SeqCst);
        shared.n.store(n, SeqCst);
        shared.called.store(0, SeqCst);
        shared.handled.iter().for_each(|h| h.store(0, SeqCst));
        shared.mask.store(0, SeqCst);
        // SAFETY: one thread, so the child may do what it likes.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            Traced(0).ask(libc::PTRACE_TRACEME, 0, 0);
            // SAFETY: no pointers.
            unsafe { libc::raise(libc::SIGSTOP) };
            shared.stage.store(1, SeqCst);
            let r = call(act, fd, n, buf);
            shared.called.store(r + 2, SeqCst);
            shared.mask.store(mask() + 1, SeqCst);
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

    /// The signal with which the child stands still; 0: it sleeps in the kernel, or has ended.
    fn stop(&self) -> i32 {
        let mut status = 0;
        for turn in 0u32.. {
            // SAFETY: an int.
            match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
                0 if turn > 64 && state(self.0) == b'S' => return 0,
                0 => std::thread::yield_now(),
                _ => return if libc::WIFSTOPPED(status) { libc::WSTOPSIG(status) } else { 0 },
            }
        }
        0
    }

    fn stands(&self) -> bool {
        self.stop() != 0
    }

    /// Goes on with that signal, and with all that come, for so many instructions, or until it sleeps.
    fn goes_on(&self, mut signal: i32, mut steps: u32) {
        loop {
            let how = if steps == 0 { libc::PTRACE_CONT } else { libc::PTRACE_SINGLESTEP };
            self.ask(how, 0, signal as usize);
            signal = match self.stop() {
                0 => return,
                libc::SIGTRAP => 0,
                s => s,
            };
            if steps == 1 && signal == 0 {
                return;
            }
            steps = steps.saturating_sub(u32::from(steps > 1));
        }
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
            if self.stop() != libc::SIGTRAP {
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

/// Where something befalls a child: before the instruction, for the `n`th time that the call comes to it.
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
    deed: Deed,
    n: u64,
}

/// What befalls a child.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    /// SIGKILL, and its parent waits for it at once, or later.
    Killed,
    Zombie,
    /// A signal, or two.
    Signal,
    Signals,
}

const DEEDS: [(&str, Deed); 4] = [
    ("killed", Deed::Killed),
    ("zombie", Deed::Zombie),
    ("signal", Deed::Signal),
    ("signals", Deed::Signals),
];

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
            Act::Shut => {
                // Whatever the child has done of it: the peer reads to the end, and ends as well.
                // (It may have ended already, which is ENOTCONN.)
                let _ = self.s.shutdown(std::net::Shutdown::Write);
                return expect("after the end", (&self.s).read(&mut [0])? as u64, 0);
            }
            _ => {}
        }
        tell(&self.s, OWN | n)?;
        let seen = next(&self.s)? ^ (ANSWER | n);
        if seen == 0 || seen == bit(CHILD) && self.act == Act::Send && !self.signals() {
            return if over && seen == 0 && self.act == Act::Send {
                self.not("the child's message", 0)
            } else {
                Ok(())
            };
        }
        if self.signals() { self.check_handlers(seen) } else { self.not("of the child", seen) }
    }

    fn signals(&self) -> bool {
        matches!(self.deed, Deed::Signal | Deed::Signals)
    }

    fn not(&self, what: &str, seen: u64) -> io::Result<()> {
        Err(io::Error::other(format!("{what}: the peer has seen {seen:x}, and here it is {:?}", self.shared)))
    }

    /// A child to which signals came has sent all that it says it has.
    fn check_handlers(&self, seen: u64) -> io::Result<()> {
        let whole = |r: &AtomicI64| r.load(SeqCst) == LEN as i64 + 2;
        let sent = |who, r| if whole(r) { bit(who) } else { 0 };
        let handlers = &self.shared.handled;
        let call = if self.act == Act::Send { sent(CHILD, &self.shared.called) } else { 0 };
        match call | sent(FIRST, &handlers[0]) | sent(SECOND, &handlers[1]) == seen {
            true => Ok(()),
            false => self.not("of the child", seen),
        }
    }

    /// After the call all is as it was, and both handlers have run, once.
    fn check_child(&self) -> io::Result<()> {
        let handlers = &self.shared.handled[..if self.deed == Deed::Signals { 2 } else { 1 }];
        // Of a socket that is closed nothing can be sent.
        let whole = |r: &AtomicI64| {
            let r = r.load(SeqCst);
            r == LEN as i64 + 2 || r == 1 && self.act == Act::Close
        };
        let right = self.shared.called.load(SeqCst) == wanted(self.act) + 2
            && handlers.iter().all(whole)
            && self.shared.mask.load(SeqCst) == 1;
        if right { Ok(()) } else { self.not("the child", 0) }
    }

    /// The call at `place` is interrupted, and goes on to its end.
    fn interrupt(&self, child: &Traced, place: Place) -> io::Result<bool> {
        if !child.reaches(place.at, place.n) {
            return Ok(false);
        }
        if self.deed == Deed::Signals {
            // Anything, but the same at the next run.
            let steps = 1 + (place.at.wrapping_mul(2_654_435_761) >> 7) as u32 % 256;
            child.goes_on(libc::SIGUSR1, steps);
            // Not by ptrace: where a step has led into a handler the kernel takes none from there.
            // SAFETY: no pointers; a child of ours that was not waited for.
            unsafe { libc::kill(child.0, libc::SIGUSR2) };
            child.goes_on(0, 0);
        } else {
            child.goes_on(libc::SIGUSR1, 0);
        }
        if self.act == Act::Wait {
            // What it waits for.
            tell(&self.s, ASK | self.n)?;
            while self.shared.stage.load(SeqCst) != 2 {
                child.goes_on(0, 0);
                std::thread::yield_now();
            }
        }
        self.check_child()?;
        Ok(true)
    }

    /// A child, and what `with` it does; whether its call was over.
    fn round<T>(&mut self, with: impl FnOnce(&Self, &Traced) -> T) -> io::Result<(T, bool)> {
        self.prepare()?;
        let mut buf = vec![0; GULP];
        let child = Traced::fork(self.act, self.s.as_raw_fd(), self.n, self.shared, &mut buf);
        let r = with(self, &child);
        let over = self.shared.stage.load(SeqCst) == 2;
        child.kill();
        let zombie = self.deed == Deed::Zombie;
        if !zombie {
            child.wait();
        }
        let checked = self.check(over);
        if zombie {
            child.wait();
        }
        self.n += 2;
        checked.map(|()| (r, over))
    }
}

/// A connection that is in the ring, both ways.
fn connect(port: u16) -> io::Result<TcpStream> {
    let s = TcpStream::connect(("127.0.0.1", port))?;
    for n in 0..50 {
        tell(&s, OWN | n)?;
        expect("the answer", next(&s)?, ANSWER | n)?;
    }
    Ok(s)
}

fn parent(act: Act, port: u16, peer: i32, deed: Deed) -> io::Result<()> {
    let shared = shared();
    let mut p = Parent { act, s: connect(port)?, peer, shared, deed, n: 100 };
    handle_signals();
    let (steps, _) = p.round(|_, c| c.steps(shared))?;
    let places = places(&steps);
    let mut killed = 0;
    for (i, place) in places.iter().enumerate() {
        let failed = |e: io::Error| {
            io::Error::other(format!("{act:?}, {i} of {} places ({:x}): {e}", places.len(), place.at))
        };
        if act == Act::Shut {
            p.s = connect(port).map_err(failed)?;
        }
        let r = p.round(
            |p, c| if p.signals() { p.interrupt(c, *place) } else { Ok(c.reaches(place.at, place.n)) },
        );
        let (there, _) = r.map_err(failed)?;
        killed += u32::from(there.map_err(failed)?);
    }
    // The peer's last.
    drop((p, TcpStream::connect(("127.0.0.1", port))?));
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

fn befalls(deed: &str, name: &str) -> Result<(), Failed> {
    let lib = Lib::find()?;
    let mut run = Run::new(&format!("steps-{name}-{deed}"));
    run.limit(Duration::from_secs(100));
    run.preload(&lib);
    let mut peer = run.start("peer", this(&["--peer"]))?;
    peer.until("a port", |p| p.stdout().contains("port "))?;
    let port = number(&peer.stdout(), "port ").ok_or("no port")?.to_string();
    let args = ["--parent", name, &port, &peer.pid().to_string(), deed];
    let parent = run.start("parent", this(&args))?.finish()?;
    ensure(parent.success, || format!("{}{}", parent.stdout, parent.stderr))?;
    let peer = peer.finish()?;
    let all = format!("{}{}{}\n{}{}", parent.stdout, parent.stderr, parent.status, peer.stdout, peer.stderr);
    ensure(parent.success && peer.success, || all.clone())?;
    let of = |what| number(&parent.stdout, what).ok_or_else(|| all.clone());
    let (steps, places, killed) = (of("steps ")?, of("places ")?, of("killed ")?);
    // With the library a call is some hundred instructions of its own, and mostly the same: what a child before it has
    // left undone makes a difference.
    ensure(lib.is_none() || steps > 60, || format!("the call was not seen\n{all}"))?;
    ensure(killed * 4 > places * 3, || format!("most places were not come to again\n{all}"))?;
    // Who shuts leaves the ring for good, and has a connection for each place.
    let stats = &parent.stats;
    let in_ring =
        if name == "shut" { stats.shm > places / 2 } else { stats.shm == 1 && stats.downgrades == 0 };
    ensure(lib.is_none() || in_ring, || format!("not in the ring to the end: {:?}\n{all}", parent.stats))?;
    eprintln!("{name}: {steps} instructions, {deed} in {killed} places");
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("--peer") => return told(peer()),
        Some("--parent") => {
            let act = ACTS.iter().find(|a| a.0 == args[1]).expect("a call").1;
            let number = |i: usize| args[i].parse().expect("a number");
            let deed = DEEDS.iter().find(|d| d.0 == args[4]).expect("a deed").1;
            return told(parent(act, number(2) as u16, number(3), deed));
        }
        _ => {}
    }
    let all = ACTS.iter().flat_map(|(name, _)| DEEDS.map(|(deed, _)| (deed, *name)));
    // Handlers send, which can't be after a shutdown.
    let all = all.filter(|(deed, name)| *name != "shut" || !deed.starts_with("signal"));
    let trials =
        all.map(|(deed, name)| Trial::test(format!("{deed}_in_{name}"), move || befalls(deed, name)));
    let trials = trials.collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
