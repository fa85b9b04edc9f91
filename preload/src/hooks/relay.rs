//! A relay: a small process that goes on with a connection for a program that does not see the ring.
//!
//! What lies unread in a ring can be moved into the TCP stream by its sender only. If the sender has ended, or makes
//! no call, the program that gets the connection (by exec, say) would find nothing there. So it gets the end of
//! another connection, made for it, and between the two stands a child of ours that copies:
//!
//! ```text
//! peer ══ ring, then TCP ══ relay ── TCP, of this host ── the program, under the number that it knows
//! ```
//!
//! The relay is one more holder of the connection, as any forked child is, and uses it by the very hooks that the
//! program used; so whatever the peer does is served as ever. It begins when the exec has succeeded, which the kernel
//! tells: the parent has a lock on a file that only an exec (or its end, or [`Relay::go`]) lets go of. A lock of
//! fcntl(2) is the process's own: a child that another thread forks meanwhile does not keep it. Before that the relay
//! touches nothing, so an exec that fails is undone by [`Relay::undo`] and nobody has seen anything. Likewise for a
//! connection that is passed by SCM_RIGHTS: the relay begins when the sender has closed its own ([`Relay::inherits`]), or
//! when a peer that was idle then uses the connection again, perhaps to wait for an answer, if the sender has read nothing
//! since ([`Begins::WithThePeer`]).
//! And for what reads in this process without us, such as stdio: the numbers name the relay's connection from then on,
//! and it begins at once ([`take_over`]). Other threads that use a number meanwhile wait until that is done.
//!
//! It has a session and a parent of its own (it is forked twice), no descriptors but those it needs, and ends with the
//! connection: the end of the stream goes each way by shutdown(2), and a reset by SO_LINGER.
//!
//! The connection to the program has the host's addresses as the peer's connection has them, but other ports.

use super::{data, direct, process, ready, sockets};
use crate::fd_table::{self, Ref};
use crate::hook::errno;
use engine::fd::Fd;
use engine::handshake::unix;
use engine::{internal_fds, rawcall, sys};
use libc::{c_int, c_void, pollfd};
use std::sync::atomic::Ordering::Relaxed;

/// Bytes copied at a time, each way.
const COPY: usize = 64 << 10;

/// When a relay begins.
#[derive(Clone, Copy, Debug)]
pub enum Begins {
    /// When it has its word.
    AtItsWord,
    /// Or, once the message is on its way, when the doorbell is rung and this process has still read so many bytes only.
    WithThePeer(u64),
}

impl Begins {
    /// For a connection that is about to be passed, of which the program has read what it has read by now. It reads on
    /// if the connection is in a set of its.
    pub fn with_the_peer(e: &Ref) -> Begins {
        if e.members.is_in_any() { Begins::AtItsWord } else { Begins::WithThePeer(read_so_far(e)) }
    }
}

/// Bytes that the holders of the connection have read.
fn read_so_far(e: &Ref) -> u64 {
    e.sock.slot().map_or(0, |s| s.shm_rx() + s.rx.tcp.load(Relaxed))
}

/// Why there is no relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRelay {
    /// For this process, or this connection, there never is.
    Never,
    /// There is no memory, no descriptor or no process to be had; with an error that execve(2) may give as well.
    Refused(c_int),
}

impl From<c_int> for NoRelay {
    fn from(e: c_int) -> Self {
        match e {
            libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN => NoRelay::Refused(e),
            libc::ENOBUFS => NoRelay::Refused(libc::ENOMEM),
            // No port.
            libc::EADDRINUSE => NoRelay::Refused(libc::EAGAIN),
            _ => NoRelay::Never,
        }
    }
}

/// The same again, if a signal has interrupted it.
fn uninterrupted(mut call: impl FnMut() -> Result<usize, c_int>) -> Result<usize, c_int> {
    loop {
        match call() {
            Err(libc::EINTR) => {}
            r => return r,
        }
    }
}

/// A relay that waits for its word, and what has been replaced for it.
#[derive(Debug)]
pub struct Relay {
    pub e: Ref,
    /// The numbers that name its end now, and their descriptor flags.
    numbers: Vec<(c_int, c_int)>,
    /// The connection itself.
    saved: Fd,
    /// The file with the lock: empty, or not to be gone on.
    word: Fd,
    /// Of the fork.
    token: u32,
}

impl Relay {
    /// Makes a relay for the connection `e`, which is `fd`; the program's end. Fails where there is none to be had (a
    /// sandbox, a limit), and nothing has changed then.
    #[cold]
    pub fn new(e: &Ref, fd: c_int, begins: Begins) -> Result<(Relay, Fd), NoRelay> {
        // The first child in a pid namespace that has been made for children would be its init.
        let home = sys::pid_namespace();
        if direct::sandboxed()
            || !process::is_owner()
            || home == 0
            || home != sys::pid_namespace_of_children()
        {
            return Err(NoRelay::Never);
        }
        let (end, own) = pair(e, fd)?;
        let word = word()?;
        let saved = high(sys::dup_high(fd))?;
        let token = spawn(e, &own, &saved, &word, begins)?;
        Ok((Relay { e: e.clone(), numbers: Vec::new(), saved, word, token }, end))
    }

    /// As above, and `numbers`, which name the connection, name the program's end.
    pub fn in_place(e: &Ref, numbers: &[c_int]) -> Result<Relay, NoRelay> {
        let first = *numbers.first().ok_or(NoRelay::Never)?;
        let (mut r, end) = Relay::new(e, first, Begins::AtItsWord)?;
        if numbers.iter().all(|n| r.replace(*n, &end)) {
            return Ok(r);
        }
        r.undo();
        Err(NoRelay::Never)
    }

    /// The number `n` names the program's end.
    fn replace(&mut self, n: c_int, end: &Fd) -> bool {
        // SAFETY: no pointers.
        let flags = unsafe { rawcall!(libc::SYS_fcntl, n, libc::F_GETFD) }.unwrap_or(0) as c_int;
        let done = over(end, n, flags);
        if done {
            self.numbers.push((n, flags));
        }
        done
    }

    /// The numbers name the connection again, in this process.
    pub fn put_back(&mut self) {
        for (n, flags) in self.numbers.drain(..) {
            over(&self.saved, n, flags);
        }
    }

    /// The program does not come to be: the relay goes, and the numbers name the connection again.
    pub fn undo(&mut self) {
        // SAFETY: one readable byte.
        let _ = unsafe { rawcall!(libc::SYS_pwrite64, self.word.raw(), c"x".as_ptr(), 1usize, 0usize) };
        self.e.sock.takes_no_part(self.token);
        self.put_back();
    }

    /// The program has its end, and this process goes on without it: the relay begins.
    pub fn go(mut self) {
        self.put_back();
    }

    /// As [`go`](Self::go), and the numbers go on naming the program's end.
    fn for_good(mut self) {
        self.numbers.clear();
    }

    /// The relay begins when this process has closed the connection, or has ended: until then what is unread is its.
    pub fn inherits(self) {
        let e = self.e.clone();
        let _ = lock(self.word.raw(), libc::F_UNLCK, Part::Passing, false);
        e.leave_to(self.word);
    }
}

/// Before somebody in this process reads the connection who does not see the ring: if bytes lie there that the peer
/// moves into TCP at its next call only, whenever that is, a relay goes on with it, and the program with an end of the
/// relay's under all numbers of the connection, `fd` among them, which are plain TCP from then on, also in epoll sets.
/// False: there is no need, or it can't be had (another thread waits in a call on it, a set can't be told); nothing has
/// changed.
///
/// The caller has one reference to `e`.
#[cold]
pub fn take_over(e: &Ref, fd: c_int) -> bool {
    if !e.sock.strands(true) || e.has_heir() {
        return false;
    }
    let Some(moves) = fd_table::Moves::begin() else { return false };
    let Some(taken) = moves.take(e, fd) else { return false };
    let mut numbers = taken.numbers().to_vec();
    if !numbers.contains(&fd) {
        numbers.push(fd);
    }
    // dup3(2) takes no number above the limit, which may have come down since.
    if numbers.iter().any(|n| *n as u64 >= sys::fd_limit()) {
        return false;
    }
    // Without the relay, which is a holder as well.
    let alone = e.sock.is_alone();
    let Ok((mut relay, end)) = Relay::new(e, fd, Begins::AtItsWord) else { return false };
    let Some(seats) = super::epoll::leave(e, &taken, alone) else {
        relay.undo();
        return false;
    };
    // These are open numbers below the limit: the kernel has no reason to refuse one.
    let done = numbers.iter().all(|n| relay.replace(*n, &end));
    seats.iter().for_each(super::epoll::Seat::take);
    if !done {
        relay.undo();
        return false;
    }
    taken.for_good();
    relay.for_good();
    true
}

/// An owned descriptor from a result of ours.
fn high(fd: c_int) -> Result<Fd, c_int> {
    if fd < 0 {
        return Err(-fd);
    }
    internal_fds::add(fd);
    Ok(Fd::from_raw(fd))
}

/// dup3(2) over a number of the program's.
fn over(from: &Fd, to: c_int, flags: c_int) -> bool {
    let flags = if flags & libc::FD_CLOEXEC != 0 { libc::O_CLOEXEC } else { 0 };
    // SAFETY: no pointers; what the number named is kept under another.
    unsafe { rawcall!(libc::SYS_dup3, from.raw(), to, flags) }.is_ok()
}

/// What of the file is locked.
#[derive(Clone, Copy)]
enum Part {
    All,
    /// Until the relay has its word.
    Word,
    /// Until the message has been sent, or not.
    Passing,
}

/// fcntl(2) for a lock on the file.
fn lock(fd: c_int, kind: c_int, part: Part, wait: bool) -> Result<usize, i32> {
    // SAFETY: plain data; all zero is valid, and means the whole file.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as i16;
    (l.l_start, l.l_len) = match part {
        Part::All => (0, 0),
        Part::Word => (0, 1),
        Part::Passing => (1, 1),
    };
    let how = if wait { libc::F_SETLKW } else { libc::F_SETLK };
    // SAFETY: `l` lives over the call.
    unsafe { rawcall!(libc::SYS_fcntl, fd, how, &raw mut l) }
}

/// Waits until nobody has that part locked.
fn await_lock(fd: c_int, part: Part) {
    while lock(fd, libc::F_WRLCK, part, true) == Err(libc::EINTR) {}
}

/// The file whose lock, which is this process's now, keeps a relay waiting.
fn word() -> Result<Fd, c_int> {
    // SAFETY: a NUL-terminated constant.
    let fd = unsafe { rawcall!(libc::SYS_memfd_create, c"smc-relay".as_ptr(), libc::MFD_CLOEXEC) }?;
    // Raised before it is locked: closing any descriptor of the file lets go of the lock.
    let fd = Fd::from_raw(fd as c_int).raise(sys::fd_base()).map_err(|_| libc::EMFILE)?;
    lock(fd.raw(), libc::F_WRLCK, Part::All, false)?;
    Ok(fd)
}

/// A socket address as the kernel takes it: 16 or 28 bytes.
fn address(family: u32, ip: [u32; 4], port: u16) -> ([u8; 28], usize) {
    let mut b = [0u8; 28];
    let (af, at, words) = if family == 4 { (libc::AF_INET, 4, 1) } else { (libc::AF_INET6, 8, 4) };
    b[..2].copy_from_slice(&(af as u16).to_ne_bytes());
    b[2..4].copy_from_slice(&port.to_be_bytes());
    for (i, w) in ip.iter().take(words).enumerate() {
        b[at + i * 4..at + i * 4 + 4].copy_from_slice(&w.to_ne_bytes());
    }
    (b, if family == 4 { 16 } else { 28 })
}

/// A TCP socket of ours, bound to that address of this host.
fn bound(family: u32, ip: [u32; 4]) -> Result<Fd, c_int> {
    let af = if family == 4 { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    let fd = unsafe { rawcall!(libc::SYS_socket, af, kind, 0) }?;
    let fd = Fd::from_raw(fd as c_int);
    let (name, len) = address(family, ip, 0);
    // SAFETY: `name` has `len` bytes.
    unsafe { rawcall!(libc::SYS_bind, fd.raw(), name.as_ptr(), len) }?;
    Ok(fd)
}

/// Two ends of a connection: the program's, set as `fd` is, and the relay's.
fn pair(e: &Ref, fd: c_int) -> Result<(Fd, Fd), NoRelay> {
    let (family, here, _) = sys::sockaddr(fd, false).ok_or(NoRelay::Never)?;
    let (_, there, _) = sys::sockaddr(fd, true).or_else(|| e.sock.peer_address()).ok_or(NoRelay::Never)?;
    let (end, own) = connected(family, here, there)?;
    for (level, name, len) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 4),
        (libc::SOL_SOCKET, libc::SO_OOBINLINE, 4),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 4),
        (libc::SOL_SOCKET, libc::SO_LINGER, 8),
        (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
        (libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 4),
    ] {
        let mut v = [0u8; 16];
        if sys::getsockopt(fd, level, name, &mut v[..len]) == Ok(len) {
            let _ = sys::setsockopt(end.raw(), level, name, &v[..len]);
        }
    }
    let _ = sys::setsockopt(own.raw(), libc::IPPROTO_TCP, libc::TCP_NODELAY, &1i32.to_ne_bytes());
    // SAFETY: no pointers.
    unsafe { rawcall!(libc::SYS_fcntl, end.raw(), libc::F_SETFL, sys::getfl(fd)) }?;
    Ok((end, own))
}

/// A connection from `here` to `there`, both of this host.
fn connected(family: u32, here: [u32; 4], there: [u32; 4]) -> Result<(Fd, Fd), NoRelay> {
    let listener = bound(family, there)?;
    // SAFETY: no pointers.
    unsafe { rawcall!(libc::SYS_listen, listener.raw(), 8) }?;
    let end = bound(family, here)?;
    let (_, ip, port) = sys::sockaddr(listener.raw(), false).ok_or(NoRelay::Never)?;
    let (name, len) = address(family, ip, port);
    // SAFETY: `name` has `len` bytes.
    match unsafe { rawcall!(libc::SYS_connect, end.raw(), name.as_ptr(), len) } {
        Ok(_) | Err(libc::EINPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    // At once, on one host; unless a firewall is in the way.
    let deadline = sys::now_ns() + 1_000_000_000;
    let ready = |fd: &Fd, events: i16| {
        let mut p = [pollfd { fd: fd.raw(), events, revents: 0 }];
        let n = uninterrupted(|| {
            let n = sys::poll(&mut p, Some(deadline.saturating_sub(sys::now_ns())));
            usize::try_from(n).map_err(|_| -n as c_int)
        })?;
        if n == 1 && p[0].revents == events { Ok(()) } else { Err(NoRelay::Never) }
    };
    ready(&end, libc::POLLOUT)?;
    let me = sys::sockaddr(end.raw(), false).ok_or(NoRelay::Never)?;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    loop {
        ready(&listener, libc::POLLIN)?;
        // SAFETY: null pointers for what is not asked.
        let fd = uninterrupted(|| unsafe { rawcall!(libc::SYS_accept4, listener.raw(), 0, 0, flags) })?;
        let own = Fd::from_raw(fd as c_int);
        // Anybody may connect; a stranger is not let in.
        if sys::sockaddr(own.raw(), true) == Some(me) {
            return Ok((end, own));
        }
    }
}

/// fork(2) as the kernel has it, of which libc knows nothing and nobody is signalled.
///
/// # Safety
/// The child may use only what does not ask libc which process or thread it is, and must not return to the program.
unsafe fn fork() -> Result<usize, i32> {
    // SAFETY: without CLONE_VM the child has a copy of all memory, this stack with it.
    unsafe { rawcall!(libc::SYS_clone, 0) }
}

/// Sets the thread's signal mask; the old one.
fn mask(set: u64) -> u64 {
    let mut old = 0u64;
    let how = libc::SIG_SETMASK;
    // SAFETY: two masks of 8 bytes.
    let _ = unsafe { rawcall!(libc::SYS_rt_sigprocmask, how, &raw const set, &raw mut old, 8) };
    old
}

fn end(status: c_int) -> ! {
    loop {
        // SAFETY: ends the process.
        let _ = unsafe { rawcall!(libc::SYS_exit_group, status) };
    }
}

/// Starts the relay, which waits; the token of its fork.
fn spawn(e: &Ref, own: &Fd, saved: &Fd, word: &Fd, begins: Begins) -> Result<u32, c_int> {
    let token = engine::arena::token();
    e.sock.before_fork(token);
    // No handler of the program's runs in the child.
    let before = mask(u64::MAX);
    // SAFETY: this child forks and ends.
    let child = unsafe { fork() };
    if child == Ok(0) {
        // SAFETY: the child calls hooks, which ask the kernel, and ends.
        match unsafe { fork() } {
            Ok(0) => run(e, token, [own.raw(), saved.raw(), word.raw()], begins),
            r => end(r.is_err().into()),
        }
    }
    let mut status = -1;
    if let Ok(pid) = child {
        // __WCLONE: a child that signals nobody is waited for by this only, so never by the program.
        // SAFETY: `status` is writable.
        let _ = unsafe { rawcall!(libc::SYS_wait4, pid, &raw mut status, libc::__WCLONE, 0) };
    }
    mask(before);
    if status == 0 {
        return Ok(token);
    }
    e.sock.fork_failed(token);
    Err(child.err().unwrap_or(libc::EAGAIN))
}

/// Closes all descriptors but these.
fn keep<const N: usize>(mut fds: [c_int; N]) {
    fds.sort_unstable();
    let close = |from: c_int, to: c_int| {
        if from > to {
            return;
        }
        // SAFETY: no pointers; all descriptors are copies that this process has no use for.
        if unsafe { rawcall!(libc::SYS_close_range, from, to, 0) }.is_err() {
            // Before Linux 5.9.
            let end = i64::from(to).min(sys::fd_limit().min(1 << 20) as i64) as c_int;
            (from..=end).for_each(|fd| _ = sys::close(fd));
        }
    };
    let mut at = 0;
    for fd in fds {
        close(at, fd - 1);
        at = fd + 1;
    }
    close(at, c_int::MAX);
}

/// Waits for the word as a descriptor can be waited for: it is ready when the word is given. `None`: there is none to
/// be had.
fn word_as_fd(word: c_int) -> Option<Fd> {
    let mut ends = [-1; 2];
    // SAFETY: room for two descriptors.
    unsafe { rawcall!(libc::SYS_pipe2, ends.as_mut_ptr(), libc::O_CLOEXEC) }.ok()?;
    let [ready, held] = ends.map(Fd::from_raw);
    // SAFETY: this child waits and ends.
    match unsafe { fork() } {
        Ok(0) => {
            keep([word, held.raw()]);
            // SAFETY: no pointers.
            let _ = unsafe { rawcall!(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            await_lock(word, Part::Word);
            end(0)
        }
        r => r.ok().map(|_| ready),
    }
}

/// Waits until it is the relay's turn.
fn await_turn(e: &Ref, word: c_int, begins: Begins) {
    if let Begins::WithThePeer(read) = begins
        && let Some(bell) = e.sock.bell()
        && let Some(given) = word_as_fd(word)
    {
        await_lock(word, Part::Passing);
        let mut list = [given.raw(), bell].map(|fd| pollfd { fd, events: libc::POLLIN, revents: 0 });
        loop {
            if sys::poll(&mut list, None) <= 0 {
                continue;
            }
            if list[0].revents != 0 || read_so_far(e) == read {
                return;
            }
            // The program reads it itself, as long as it has it.
            list[1].fd = -1;
        }
    }
    await_lock(word, Part::Word);
}

/// The relay: of the descriptors, `own` is its end of the program's connection, `sock` the connection `e`.
fn run(e: &Ref, token: u32, [own, sock, word]: [c_int; 3], begins: Begins) -> ! {
    engine::section::forget_tid();
    engine::lgr::after_fork_child();
    engine::arena::after_fork_child();
    super::signals::after_fork_child();
    process::disown();
    fd_table::only(e, sock);
    internal_fds::remove(sock);
    e.sock.takes_part(token);
    keep([own, sock, word, e.sock.bell().unwrap_or(own)]);
    // SAFETY: no pointers.
    let _ = unsafe { rawcall!(libc::SYS_setsid) };
    // What the program's group was signalled before that waits, blocked, and is the program's alone: to ignore a signal
    // is to forget those that wait.
    for sig in 1..=64 {
        for handler in [libc::SIG_IGN, libc::SIG_DFL] {
            // struct sigaction of the kernel: the handler, no flags, no mask.
            let act = [handler, 0, 0, 0usize];
            // SAFETY: `act` is readable; no handler of the program's is left.
            let _ = unsafe { rawcall!(libc::SYS_rt_sigaction, sig, act.as_ptr(), 0, 8) };
        }
    }
    // SAFETY: constants, NUL-terminated where they are strings.
    unsafe {
        let _ = rawcall!(libc::SYS_chdir, c"/".as_ptr());
        let _ = rawcall!(libc::SYS_prctl, libc::PR_SET_NAME, c"smc-relay".as_ptr());
    }
    mask(0);
    await_turn(e, word, begins);
    let mut b = [0u8; 1];
    // SAFETY: one writable byte.
    if unsafe { rawcall!(libc::SYS_pread64, word, b.as_mut_ptr(), 1usize, 0usize) } != Ok(0) {
        end(0);
    }
    if let Some(fd) = copy(sock, own, &|| e.sock.is_alone()) {
        // Not a socket that others have still open: the program is gone, and they go on.
        if fd == own || e.sock.is_alone() {
            reset(fd);
        }
    }
    sys::close(own);
    // SAFETY: no pointers. The last holder's close, as ever.
    unsafe { sockets::close(sock) };
    end(0)
}

/// One way.
struct Way {
    from: c_int,
    to: c_int,
    bytes: Vec<u8>,
    at: usize,
    end: usize,
    /// The end of the stream has been read, and passed on.
    ended: bool,
    done: bool,
}

impl Way {
    fn new(from: c_int, to: c_int) -> Way {
        Way { from, to, bytes: vec![0; COPY], at: 0, end: 0, ended: false, done: false }
    }

    fn wants(&self) -> bool {
        self.at == self.end && !self.ended
    }

    fn has(&self) -> bool {
        self.at < self.end
    }

    /// Moves what can be moved at once. Fails with the socket to be closed, if the other one is broken or has been
    /// closed and that `ends` it.
    fn step(&mut self, ends: impl Fn() -> bool) -> Result<(), c_int> {
        const NOW: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let later = || matches!(errno(), libc::EAGAIN | libc::EINTR);
        if self.wants() {
            // SAFETY: our own buffer.
            match unsafe { data::recv(self.from, self.bytes.as_mut_ptr().cast::<c_void>(), COPY, NOW) } {
                // The end of the stream; or, as it may read after what was sent meanwhile has been refused, more.
                0 if is_broken(self.from) => return Err(self.to),
                0 => self.ended = true,
                n if n > 0 => (self.at, self.end) = (0, n as usize),
                _ if later() => {}
                _ => return Err(self.to),
            }
        }
        if self.has() {
            let rest = &self.bytes[self.at..self.end];
            // SAFETY: our own buffer.
            match unsafe { data::send(self.to, rest.as_ptr().cast::<c_void>(), rest.len(), NOW) } {
                n if n >= 0 => self.at += n as usize,
                _ if later() => {}
                _ => return Err(self.from),
            }
        }
        if self.ended && !self.has() && !self.done {
            self.done = true;
            if ends() {
                return Err(self.to);
            }
            // SAFETY: no pointers.
            unsafe { sockets::shutdown(self.to, libc::SHUT_WR) };
        }
        Ok(())
    }
}

/// Copies both ways, to the end of both streams. If the one or the other is broken, the socket to be reset.
///
/// A program that has closed its end is not to shut the connection of those who have it as well: without them (`alone`)
/// both are the same.
fn copy(sock: c_int, own: c_int, alone: &dyn Fn() -> bool) -> Option<c_int> {
    let [mut inward, mut outward] = [Way::new(sock, own), Way::new(own, sock)];
    while !(inward.done && outward.done) {
        let entry = |fd: c_int| {
            let bits = |on: bool, bit| if on { bit } else { 0 };
            let events = [&inward, &outward].iter().fold(0, |e, w| {
                e | bits(w.from == fd && w.wants(), libc::POLLIN) | bits(w.to == fd && w.has(), libc::POLLOUT)
            });
            // Who is not asked for anything is not looked at: its end is told when it is.
            pollfd { fd: if events == 0 { -1 } else { fd }, events, revents: 0 }
        };
        let mut list = [entry(sock), entry(own)];
        // SAFETY: our own list.
        unsafe { ready::poll(list.as_mut_ptr(), 2, -1) };
        let left = || !alone() && !is_held(own);
        if let Err(fd) = inward.step(|| false).and_then(|()| outward.step(left)) {
            return Some(fd);
        }
    }
    None
}

/// Whether the program, or another, has the other end of `fd` still open, and has merely shut it down.
fn is_held(fd: c_int) -> bool {
    let ends = unix::peer_addr(fd).and_then(|there| Ok((there, unix::local_addr(fd)?)));
    ends.and_then(|(there, here)| unix::tcp_is_held(there, here)).unwrap_or(false)
}

/// Whether the kernel has an error to tell.
fn is_broken(fd: c_int) -> bool {
    let mut p = [pollfd { fd, events: 0, revents: 0 }];
    sys::poll(&mut p, Some(0)) > 0 && p[0].revents & libc::POLLERR != 0
}

/// The close that follows is to send RST.
fn reset(fd: c_int) {
    // struct linger { l_onoff = 1, l_linger = 0 }.
    let mut l = [0u8; 8];
    l[..4].copy_from_slice(&1i32.to_ne_bytes());
    // SAFETY: `l` is readable.
    unsafe { sockets::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, l.as_ptr().cast(), 8) };
}
