//! fork, exec, and the end of the process.

use super::data::{alias, hook};
use super::relay::{NoRelay, Relay};
use super::sockets::hand_over;
use crate::fd_table::{self, Kind, Ref};
use crate::real::real;
use engine::reason::Reason;
use engine::section;
use libc::{FILE, c_char, c_int, c_void, pid_t};
use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering::Relaxed};

type CStrs = *const *const c_char;

/// Runs when the library is loaded, before main and perhaps before other libraries' constructors; hooks
/// that run earlier still work, they do not depend on it.
#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;

#[cfg_attr(test, allow(dead_code))]
extern "C" fn start() {
    OWNER.store(engine::sys::getpid(), Relaxed);
    // Now: later the program may be in a sandbox that knows none of the calls this takes.
    crate::hook::settings();
    engine::report::program();
    super::sleep::start();
    super::signals::start();
    super::epoll::start();
    crate::probes::start();
    crate::real::start();
    crate::deep::start();
    super::liburing::start();
    super::unseen::start();
    crate::remote::start();
    let _ = (engine::sys::gettid(), engine::sys::own_pid());
    // fork, forkpty and daemon all run these handlers.
    // SAFETY: the handlers are functions of this library, which is never unloaded (it is preloaded).
    unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
}

thread_local! {
    /// The token of the fork that this thread is about to make, or has made last; its child has it as well.
    static FORK: Cell<u32> = const { Cell::new(0) };
}

/// No handler of the program's runs from here to [`in_parent`] and [`in_child`]: it might fork as well.
pub extern "C" fn before_fork() {
    std::mem::forget(section::enter());
    let token = engine::arena::token();
    FORK.set(token);
    fd_table::before_fork(token);
}

/// The fork has happened, or not.
extern "C" fn in_parent() {
    fd_table::after_fork();
    section::leave();
}

/// The fork has happened: the parent knows the child.
fn forked(pid: pid_t) {
    let e = crate::hook::errno();
    fd_table::forked(FORK.get(), pid as u32);
    crate::hook::set_errno(e);
}

/// Whether this is the process whose tables these are, not a child that runs in its memory.
pub fn is_owner() -> bool {
    OWNER.load(Relaxed) == engine::sys::getpid()
}

/// In a process that keeps no books: see [`super::relay`].
pub fn disown() {
    OWNER.store(0, Relaxed);
}

/// The fork did not happen.
pub fn fork_failed() {
    let e = crate::hook::errno();
    fd_table::fork_failed(FORK.get());
    crate::hook::set_errno(e);
}

pub extern "C" fn in_child() {
    PLACED.store(0, Relaxed);
    let parent = OWNER.swap(engine::sys::getpid(), Relaxed);
    engine::section::forget_tid();
    // Now, not in a sandbox that does not know the call.
    let _ = (engine::sys::gettid(), engine::sys::own_pid());
    engine::lgr::after_fork_child();
    engine::arena::after_fork_child();
    crate::remote::after_fork_child();
    fd_table::after_fork_child(FORK.get(), parent);
    super::signals::after_fork_child();
    super::uring::after_fork_child();
    super::liburing::after_fork_child();
    section::leave();
}

hook! {
    /// fork(2). The handlers above have run, also if it failed.
    fn fork() -> pid_t {
        let _section = section::enter();
        let pid = real!(fork() -> pid_t);
        match pid {
            0 => {}
            pid if pid < 0 => fork_failed(),
            pid => forked(pid),
        }
        pid
    }
}
alias! { __fork = fork() -> pid_t; }

hook! {
    /// _Fork(3) runs no handlers, so what they do is done here.
    #[cfg_attr(test, expect(non_snake_case, reason = "libc's name"))]
    fn _Fork() -> pid_t {
        forking(|| real!(_Fork() -> pid_t).into()) as pid_t
    }
}

hook! {
    /// vfork(2) is fork: the child would share our tables with its parent.
    fn vfork() -> pid_t {
        // SAFETY: no arguments.
        unsafe { fork() }
    }
}

type Child = unsafe extern "C" fn(*mut c_void) -> c_int;

/// What a cloned child is to run, in the parent's memory and therefore in its copy of it.
struct Start {
    run: Child,
    arg: *mut c_void,
}

unsafe extern "C" fn cloned(start: *mut c_void) -> c_int {
    in_child();
    // The one of `clone`, to which this does not return.
    section::leave();
    // SAFETY: the parent's `Start`, which lay on a stack that this child has a copy of.
    let s = unsafe { start.cast::<Start>().read() };
    // SAFETY: as the program asked.
    unsafe { (s.run)(s.arg) }
}

hook! {
    /// clone(2). Without CLONE_VM it is a fork of which libc tells nobody. Variadic; the last three are
    /// passed as named ones.
    fn clone(run: Option<Child>, stack: *mut c_void, flags: c_int, arg: *mut c_void, ptid: usize, tls: usize, ctid: usize) -> c_int {
        let kernel = |run: Option<Child>, arg: *mut c_void| {
            real!(clone(run => Option<Child>, stack => *mut c_void, flags => c_int, arg => *mut c_void, ptid => usize, tls => usize, ctid => usize) -> c_int)
        };
        let Some(program) = run.filter(|_| flags & libc::CLONE_VM == 0) else { return kernel(run, arg) };
        let mut start = Start { run: program, arg };
        let _section = section::enter();
        before_fork();
        let r = kernel(Some(cloned), (&raw mut start).cast());
        if r < 0 {
            fork_failed();
        } else {
            forked(r);
        }
        in_parent();
        r
    }
}
alias! { __clone = clone(run: Option<Child>, stack: *mut c_void, flags: c_int, arg: *mut c_void, ptid: usize, tls: usize, ctid: usize) -> c_int; }

/// A system call that forks: `call` makes it, on the caller's stack.
pub fn forking(call: impl FnOnce() -> libc::c_long) -> libc::c_long {
    let _section = section::enter();
    before_fork();
    let r = call();
    match r {
        0 => in_child(),
        r if r < 0 => fork_failed(),
        r => forked(r as pid_t),
    }
    if r != 0 {
        in_parent();
    }
    r
}

/// The process that the tables of this image belong to; 0 when it has ended.
static OWNER: AtomicI32 = AtomicI32::new(0);

/// The end of this process image: what it held is let go of, and told.
fn last_words() {
    // Once, and only by the process whose tables these are: one that was cloned past us may share our memory
    // (CLONE_VM) or have a copy of it, and holds nothing in our books.
    let sandboxed = super::direct::sandboxed();
    let me = if sandboxed { OWNER.load(Relaxed) } else { engine::sys::getpid() };
    if me == 0 || OWNER.compare_exchange(me, 0, Relaxed, Relaxed).is_err() {
        return;
    }
    if !sandboxed {
        crate::hook::write_stats();
    }
    fd_table::each(Kind::Stream, |e| e.sock.exiting(fd_table::number_of(e.id(), -1).unwrap_or(-1)));
    crate::remote::drain();
}

#[cfg_attr(test, allow(dead_code))]
extern "C" fn end() {
    last_words();
}

hook! {
    /// _exit(2).
    fn _exit(status: c_int) -> () {
        last_words();
        real!(_exit(status => c_int) -> ());
    }
}

hook! {
    #[allow(non_snake_case, reason = "the name in C")]
    /// _Exit(3).
    #[allow(non_snake_case, reason = "the name in libc")]
    fn _Exit(status: c_int) -> () {
        last_words();
        real!(_exit(status => c_int) -> ());
    }
}

/// The descriptors that posix_spawn's file actions duplicate for the new program, by the actions' address: it
/// inherits those whatever their flags. Lists outlive few calls, so there are never many.
static DUPLICATES: [Duplicate; 128] =
    [const { Duplicate { actions: AtomicUsize::new(0), fd: AtomicI32::new(-1) } }; 128];
/// There was no room once: from then on every connection counts as duplicated.
static MORE_DUPLICATES: AtomicBool = AtomicBool::new(false);

struct Duplicate {
    /// 0: free, 1: being filled.
    actions: AtomicUsize,
    fd: AtomicI32,
}

fn add_duplicate(actions: *const c_void, fd: c_int) {
    for d in &DUPLICATES {
        // Relaxed: the list of actions belongs to one thread at a time, which the program sees to.
        if d.actions.compare_exchange(0, 1, Relaxed, Relaxed).is_ok() {
            d.fd.store(fd, Relaxed);
            d.actions.store(actions as usize, Relaxed);
            return;
        }
    }
    MORE_DUPLICATES.store(true, Relaxed);
}

fn forget_duplicates(actions: *const c_void) {
    for d in &DUPLICATES {
        let _ = d.actions.compare_exchange(actions as usize, 0, Relaxed, Relaxed);
    }
}

fn duplicated_by(actions: *const c_void, fd: c_int) -> bool {
    !actions.is_null()
        && (MORE_DUPLICATES.load(Relaxed)
            || DUPLICATES
                .iter()
                .any(|d| d.actions.load(Relaxed) == actions as usize && d.fd.load(Relaxed) == fd))
}

/// What becomes of a process that starts a program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    /// The program takes its place.
    Ends,
    /// It goes on beside the program.
    GoesOn,
}

/// Bits of the numbers 0, 1 and 2 that this process has made name a connection, by dup2(2) say, as one does before it
/// becomes another program. What a parent did is no word on what its child's programs are to read.
static PLACED: AtomicU32 = AtomicU32::new(0);

/// `fd`, 0, 1 or 2, names a connection from now on.
pub fn placed(fd: c_int) {
    PLACED.fetch_or(1 << fd, Relaxed);
}

fn was_placed(fd: c_int) -> bool {
    (0..=2).contains(&fd) && PLACED.load(Relaxed) & (1 << fd) != 0
}

/// Whether these actions are known to duplicate `fd`, so that the new program is meant to have it.
fn meant_by(actions: *const c_void, fd: c_int) -> bool {
    !actions.is_null()
        && DUPLICATES.iter().any(|d| d.actions.load(Relaxed) == actions as usize && d.fd.load(Relaxed) == fd)
}

/// A program is about to be started that inherits what is not close-on-exec, and what the file `actions` of
/// posix_spawn duplicate: those connections go back to TCP, where it finds them whole. Of one whose bytes nobody would
/// move there a [relay](super::relay) takes our place, if the connection is meant for the program: by the actions, or
/// as its standard input or output that this process has prepared, or because the program takes the place of its only
/// holder. One that others hold as well, and that is merely inherited, stays theirs to read.
///
/// While the numbers name a relay's end other threads of a process that goes on wait before they use them; one that is
/// in a call already is not to be waited for, and there is no relay then.
///
/// Fails with the kernel's error, as a program that can't be started for want of memory or of descriptors does, if that
/// is why there is no relay and the program that is meant to have the bytes would never find them: its stream would be
/// short by them, and nobody would be told. What has gone back to TCP stays there.
fn before_spawn(actions: *const c_void, caller: Caller) -> Result<Starting, c_int> {
    let mut s = Starting { relays: Vec::new(), taken: Vec::new(), moves: None };
    crate::remote::withdraw(true);
    let inherited = |fd: &c_int| kept(*fd) || duplicated_by(actions, *fd);
    for fd in fd_table::numbers() {
        let Some(e) = fd_table::stream(fd).filter(|_| inherited(&fd)) else { continue };
        if s.has(&e) {
            continue;
        }
        let numbers: Vec<_> =
            fd_table::numbers().into_iter().filter(|n| fd_table::names(*n, e.id()) && inherited(n)).collect();
        let meant = |n: &c_int| match caller {
            Caller::Ends => was_placed(*n),
            Caller::GoesOn => meant_by(actions, *n),
        };
        let meant = numbers.iter().any(meant) || caller == Caller::Ends && e.sock.is_alone();
        if meant && s.relays(&e, &numbers, caller) == Ok(true) {
            continue;
        }
        hand_over(&e, fd, Reason::Exec);
        // The peer may have ended its stream just before it was asked for the rest.
        if meant
            && let Err(NoRelay::Refused(why)) = s.relays(&e, &numbers, caller)
            && e.sock.strands(false)
        {
            s.done(false);
            return Err(why);
        }
    }
    Ok(s)
}

/// Relays for a program that is about to be started.
struct Starting {
    relays: Vec<Relay>,
    /// Their numbers, if others could use them.
    taken: Vec<fd_table::Taken>,
    moves: Option<fd_table::Moves>,
}

impl Starting {
    /// Whether the connection has a relay.
    fn has(&self, e: &Ref) -> bool {
        self.relays.iter().any(|r| r.e.id() == e.id())
    }

    /// A relay for `e`, if it takes one and there is one to be had. False: it takes none.
    fn relays(&mut self, e: &Ref, numbers: &[c_int], caller: Caller) -> Result<bool, NoRelay> {
        if !e.sock.strands(true) {
            return Ok(false);
        }
        let mut taken = None;
        if caller == Caller::GoesOn {
            if self.moves.is_none() {
                self.moves = fd_table::Moves::begin();
            }
            let moves = self.moves.as_ref();
            taken = numbers.first().and_then(|fd| moves?.take(e, *fd));
            if taken.is_none() {
                return Err(NoRelay::Never);
            }
        }
        self.relays.push(Relay::in_place(e, numbers)?);
        self.taken.extend(taken);
        Ok(true)
    }

    /// The program has been started, or not.
    fn done(self, started: bool) {
        let e = crate::hook::errno();
        for mut r in self.relays {
            if started { r.go() } else { r.undo() }
        }
        // The numbers name their connections again: now others may use them.
        drop(self.taken);
        drop(self.moves);
        crate::hook::set_errno(e);
    }
}

/// A posix_spawn.
fn spawning(actions: *const c_void, real: impl FnOnce() -> c_int) -> c_int {
    let starting = match before_spawn(actions, Caller::GoesOn) {
        Ok(s) => s,
        Err(e) => return e,
    };
    // The new program gets the mask that this thread has: nothing may be deferred.
    let n = section::open();
    let r = real();
    section::close(n);
    starting.done(r == 0);
    r
}

/// Whether exec keeps `fd` open.
pub fn kept(fd: c_int) -> bool {
    // SAFETY: no pointers.
    let flags =
        unsafe { engine::rawsys::syscall6(libc::SYS_fcntl, fd as usize, libc::F_GETFD as usize, 0, 0, 0, 0) };
    flags >= 0 && flags as c_int & libc::FD_CLOEXEC == 0
}

/// What an exec that may yet fail has changed.
struct Leaving {
    relays: Vec<Relay>,
    gone: Vec<Ref>,
}

/// The exec that is about to happen closes these connections, in this process: what the kernel closes
/// without a word to us must not count as a holder, or a parent that has forked and exec'd something would
/// never be alone with its connections again. Undone by [`exec_failed`].
fn before_exec() -> Result<Leaving, c_int> {
    let relays = before_spawn(ptr::null(), Caller::Ends)?.relays;
    let mut gone = Vec::new();
    fd_table::each(Kind::Stream, |e| gone.push(e.clone()));
    for fd in fd_table::numbers() {
        if kept(fd)
            && let Some(e) = fd_table::stream(fd)
            && !relays.iter().any(|r| r.e.id() == e.id())
        {
            gone.retain(|g| g.id() != e.id());
        }
    }
    gone.iter().for_each(|e| e.sock.exec_closes(fd_table::number_of(e.id(), -1).unwrap_or(-1)));
    crate::remote::drain();
    Ok(Leaving { relays, gone })
}

/// The exec did not happen.
fn exec_failed(l: &mut Leaving) {
    l.relays.iter_mut().for_each(Relay::undo);
    l.gone.iter().for_each(|e| e.sock.stays());
}

fn exec(real: impl FnOnce() -> c_int) -> c_int {
    let mut leaving = match before_exec() {
        Ok(l) => l,
        Err(e) => return crate::hook::fail(e),
    };
    // The new program gets the mask that this one has: nothing may be deferred.
    let n = section::open();
    let r = real();
    section::close(n);
    let e = crate::hook::errno();
    exec_failed(&mut leaving);
    drop(leaving);
    crate::hook::set_errno(e);
    r
}

hook! {
    /// execve(2).
    fn execve(path: *const c_char, argv: CStrs, envp: CStrs) -> c_int {
        exec(|| real!(execve(path => *const c_char, argv => CStrs, envp => CStrs) -> c_int))
    }
}

hook! {
    /// execveat(2).
    fn execveat(dir: c_int, path: *const c_char, argv: CStrs, envp: CStrs, flags: c_int) -> c_int {
        exec(|| real!(execveat(dir => c_int, path => *const c_char, argv => CStrs, envp => CStrs, flags => c_int) -> c_int))
    }
}

hook! {
    /// execv(3).
    fn execv(path: *const c_char, argv: CStrs) -> c_int {
        exec(|| real!(execv(path => *const c_char, argv => CStrs) -> c_int))
    }
}

hook! {
    /// execvp(3).
    fn execvp(path: *const c_char, argv: CStrs) -> c_int {
        exec(|| real!(execvp(path => *const c_char, argv => CStrs) -> c_int))
    }
}

hook! {
    /// execvpe(3).
    fn execvpe(path: *const c_char, argv: CStrs, envp: CStrs) -> c_int {
        exec(|| real!(execvpe(path => *const c_char, argv => CStrs, envp => CStrs) -> c_int))
    }
}

hook! {
    /// fexecve(3).
    fn fexecve(fd: c_int, argv: CStrs, envp: CStrs) -> c_int {
        exec(|| real!(fexecve(fd => c_int, argv => CStrs, envp => CStrs) -> c_int))
    }
}

hook! {
    /// posix_spawn(3).
    fn posix_spawn(pid: *mut pid_t, path: *const c_char, fa: *const c_void, at: *const c_void, argv: CStrs, envp: CStrs) -> c_int {
        spawning(fa, || real!(posix_spawn(pid => *mut pid_t, path => *const c_char, fa => *const c_void, at => *const c_void, argv => CStrs, envp => CStrs) -> c_int))
    }
}

hook! {
    /// posix_spawnp(3).
    fn posix_spawnp(pid: *mut pid_t, path: *const c_char, fa: *const c_void, at: *const c_void, argv: CStrs, envp: CStrs) -> c_int {
        spawning(fa, || real!(posix_spawnp(pid => *mut pid_t, path => *const c_char, fa => *const c_void, at => *const c_void, argv => CStrs, envp => CStrs) -> c_int))
    }
}

hook! {
    /// posix_spawn_file_actions_init(3). A list that was never destroyed may have been there.
    fn posix_spawn_file_actions_init(fa: *mut c_void) -> c_int {
        forget_duplicates(fa);
        real!(posix_spawn_file_actions_init(fa => *mut c_void) -> c_int)
    }
}

hook! {
    /// posix_spawn_file_actions_adddup2(3).
    fn posix_spawn_file_actions_adddup2(fa: *mut c_void, fd: c_int, new: c_int) -> c_int {
        add_duplicate(fa, fd);
        real!(posix_spawn_file_actions_adddup2(fa => *mut c_void, fd => c_int, new => c_int) -> c_int)
    }
}

hook! {
    /// posix_spawn_file_actions_destroy(3).
    fn posix_spawn_file_actions_destroy(fa: *mut c_void) -> c_int {
        forget_duplicates(fa);
        real!(posix_spawn_file_actions_destroy(fa => *mut c_void) -> c_int)
    }
}

/// Before a program is started that inherits what there is, and is meant to read none of it.
fn no_program_is_meant() {
    // So there is no relay, and nothing to be refused.
    if let Ok(s) = before_spawn(ptr::null(), Caller::GoesOn) {
        s.done(true);
    }
}

hook! {
    /// system(3).
    fn system(command: *const c_char) -> c_int {
        no_program_is_meant();
        real!(system(command => *const c_char) -> c_int)
    }
}

hook! {
    /// popen(3).
    fn popen(command: *const c_char, kind: *const c_char) -> *mut FILE {
        no_program_is_meant();
        real!(popen(command => *const c_char, kind => *const c_char) -> *mut FILE)
    }
}
