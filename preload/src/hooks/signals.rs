//! Signal handlers: none of the program's runs inside a section (`engine::section`), and a call learns which have run.
//!
//! From the process's first upgrade on (not before: a program without one is left alone) the kernel knows one handler,
//! ours, for each signal that the program handles:
//!
//! ```text
//! a signal comes ── in no section, or a fault ──> count it, call the program's handler
//!        │ in a section
//!        queue it again to this thread, and return with all signals blocked
//!        ... the section ends or opens a window: the mask is put back, and the kernel delivers it there
//! ```
//!
//! So a handler runs with the siginfo, on the stack and with the mask that the kernel gives it, and finds nothing of
//! ours locked by its own thread; and as calls hold in windows only what somebody else can let go of, it may as well
//! leave by a jump. Faults are never deferred: they come from the instruction that they interrupt.
//!
//! Of a real-time signal several may wait, in order, and what is queued again comes last. So its siginfo is kept here,
//! in a [`Line`], and a *token* is queued: each of them that comes out, token or signal, runs the handler with what
//! stands first in the line, and a signal goes to its end.
//!
//! The kernel's flags are the program's but for three, which are done here: SA_SIGINFO is always there; with
//! SA_RESETHAND the kernel would forget the handler when the signal is deferred; with SA_NODEFER it would deliver a
//! signal again that has just been queued. (Not one that is in its own handler's mask: that is blocked all the same, and
//! the flag is left to the kernel.) The program reads back its own handlers and flags.

use super::data::{alias, hook};
use crate::hook::{errno, fail, set_errno};
use crate::real::real;
use engine::lock;
use engine::rawsys::syscall6;
use engine::section;
use libc::{
    SA_NODEFER, SA_RESETHAND, SA_RESTART, SA_SIGINFO, SIG_DFL, SIG_ERR, SIG_IGN, c_int, c_void,
    sigaction as Act, siginfo_t, sigset_t,
};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::*, fence};

/// Signals are numbered from 1 to this.
const MOST: usize = 64;
/// Bytes of a mask as the kernel has it.
const MASK: usize = 8;
/// What instructions of the thread's own bring, and abort(3).
const FAULTS: [c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, libc::SIGABRT];
/// The flags that are not the kernel's to obey.
const OURS: c_int = SA_SIGINFO | SA_RESETHAND | SA_NODEFER;

/// What the kernel is to obey, and what is done here, of a program's flags; `masked`: the signal is in its own
/// handler's mask, so that SA_NODEFER does not let it in (signal_setup_done, kernel/signal.c).
fn divided(flags: c_int, masked: bool) -> (c_int, c_int) {
    let ours = if masked { OURS & !SA_NODEFER } else { OURS };
    (flags & !ours | SA_SIGINFO, flags & ours)
}

/// The program's flags again, of what the kernel has and what is done here.
fn together(kernel: c_int, here: c_int) -> c_int {
    kernel & !(SA_SIGINFO | SA_RESETHAND) | here & OURS
}

/// Our handler is in place.
static ON: AtomicBool = AtomicBool::new(false);
/// Held by who changes an action, with all signals blocked: no handler runs in a thread that has it.
static LOCK: AtomicU32 = AtomicU32::new(0);
/// What siginterrupt has said, as bits; signal(3) obeys it.
static INTERRUPT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The mask that belongs to a thread with a deferred signal.
    static BEFORE: Cell<u64> = const { Cell::new(0) };
}

/// The program's handler for a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handler {
    at: usize,
    flags: c_int,
}

/// A handler as another thread may read it while it is changed: two, of which the version says which counts. A child
/// that is forked in mid-change finds the old one.
struct Action {
    version: AtomicU32,
    at: [AtomicUsize; 2],
    flags: [AtomicI32; 2],
    /// The version, plus one, that SA_RESETHAND has used up.
    spent: AtomicU32,
    /// How often the signal was set to be ignored, with which the kernel forgets those that wait.
    ignored: AtomicU32,
}

static ACTIONS: [Action; MOST + 1] = [const { Action::new() }; MOST + 1];

impl Action {
    const fn new() -> Self {
        Action {
            version: AtomicU32::new(0),
            at: [const { AtomicUsize::new(SIG_DFL) }; 2],
            flags: [const { AtomicI32::new(0) }; 2],
            spent: AtomicU32::new(0),
            ignored: AtomicU32::new(0),
        }
    }

    /// The handler and its version.
    fn now(&self) -> (Handler, u32) {
        loop {
            // ORDERING [signal.action] Acquire; pairs with the Release in `set`. Carries: the handler and its flags.
            let v = self.version.load(Acquire);
            let i = (v & 1) as usize;
            let h = Handler { at: self.at[i].load(Acquire), flags: self.flags[i].load(Acquire) };
            // ORDERING [signal.action] Acquire; pairs with the Release stores in `set`: who has read a word of two
            // versions later sees the version that came between.
            fence(Acquire);
            if self.version.load(Relaxed) == v {
                return (h, v);
            }
        }
    }

    /// Under `LOCK`.
    fn set(&self, h: Handler) {
        let v = self.version.load(Relaxed).wrapping_add(1);
        let i = (v & 1) as usize;
        // ORDERING [signal.action] Release; pairs with the Acquire loads in `now`.
        self.at[i].store(h.at, Release);
        self.flags[i].store(h.flags, Release);
        // ORDERING [signal.action] Release; pairs with the Acquire in `now`. Carries: the words above.
        self.version.store(v, Release);
    }
}

fn bit(sig: c_int) -> u64 {
    1 << (sig - 1)
}

/// All but what must come at once: faults, and the signals that libc has for itself (below its SIGRTMIN).
fn deferrable() -> u64 {
    let own = (32..libc::SIGRTMIN()).chain(FAULTS).fold(0, |m, s| m | bit(s));
    !own
}

/// rt_sigprocmask(2): the mask before. Not libc's, which may leave some out.
fn set_mask(how: c_int, mask: u64) -> u64 {
    let mut old = 0u64;
    let (new, was) = (&raw const mask as usize, &raw mut old as usize);
    // SAFETY: two live masks of the kernel's size.
    unsafe { syscall6(libc::SYS_rt_sigprocmask, how as usize, new, was, MASK, 0, 0) };
    old
}

/// Calls `f` alone, and with no handler in between.
fn alone<R>(f: impl FnOnce() -> R) -> R {
    if super::direct::sandboxed() {
        // No calls but the program's own. (A handler that comes in between finds the lock its own thread's.)
        let _guard = (!lock::held_by_me(&LOCK)).then(|| lock::lock(&LOCK));
        return f();
    }
    let before = set_mask(libc::SIG_BLOCK, deferrable());
    let guard = lock::lock(&LOCK);
    let r = f();
    drop(guard);
    set_mask(libc::SIG_SETMASK, before);
    r
}

fn address() -> usize {
    handler as *const () as usize
}

/// A word in place of a handler.
fn is_handler(at: usize) -> bool {
    ![SIG_DFL, SIG_IGN, SIG_ERR, address()].contains(&at)
}

/// Whether such a signal can be handled, so that there is a place for it.
fn action(sig: c_int) -> Option<&'static Action> {
    ACTIONS.get(usize::try_from(sig).ok().filter(|n| *n > 0)?)
}

/// Called once, before the first connection.
pub fn start() {
    section::deliver_with(deliver);
    engine::conn::on_upgrade(begin);
}

/// The first upgrade: handlers that are there already get ours in front.
fn begin() {
    // ORDERING [signal.on] SeqCst; pairs with the load in `set_by`: a handler that is being set is found here, or
    // whoever sets it finds this.
    if ON.swap(true, SeqCst) {
        return;
    }
    section::counted_by(address());
    let e = errno();
    (1..=MOST as c_int).for_each(adopt);
    set_errno(e);
}

fn no_action() -> Act {
    // SAFETY: plain data; all zero is the default action.
    unsafe { std::mem::zeroed() }
}

/// libc's sigaction(2).
fn kernel(sig: c_int, new: *const Act, old: *mut Act) -> c_int {
    real!(sigaction(sig => c_int, new => *const Act, old => *mut Act) -> c_int)
}

/// A handler that was set without us gets ours in front.
fn adopt(sig: c_int) {
    let Some(action) = action(sig) else { return };
    alone(|| {
        let mut a = no_action();
        if kernel(sig, std::ptr::null(), &raw mut a) == 0 && is_handler(a.sa_sigaction) {
            let (kernels, here) = divided(a.sa_flags, holds(&a.sa_mask, sig));
            action.set(Handler { at: a.sa_sigaction, flags: a.sa_flags & SA_RESTART | here });
            a.sa_sigaction = address();
            a.sa_flags = kernels;
            kernel(sig, &raw const a, std::ptr::null_mut());
        }
    });
}

/// Whether a signal is in a mask.
fn holds(mask: &sigset_t, sig: c_int) -> bool {
    // SAFETY: a live set.
    unsafe { libc::sigismember(mask, sig) == 1 }
}

/// Changes an action: `call` does it with the handler that the kernel is to know, and tells which it knew. `masked`: see
/// [`divided`]. The result, and the program's handler before.
fn change(
    sig: c_int,
    new: Option<Handler>,
    masked: bool,
    call: impl FnOnce(Option<Handler>) -> (c_int, Handler),
) -> (c_int, Handler) {
    let Some(action) = action(sig) else { return call(new) };
    alone(|| {
        let (before, _) = action.now();
        let ours = new.filter(|h| is_handler(h.at));
        let known = ours.map(|h| {
            let (kernels, here) = divided(h.flags, masked);
            action.set(Handler { at: h.at, flags: h.flags & SA_RESTART | here });
            Handler { at: address(), flags: kernels }
        });
        let (r, was) = call(known.or(new));
        if r != 0 && ours.is_some() {
            action.set(before);
        }
        if new.is_some_and(|h| h.at == SIG_IGN) {
            action.ignored.fetch_add(1, Relaxed);
        }
        (r, translated(was, before))
    })
}

/// What the program has set where the kernel says that it knew `was`.
fn translated(was: Handler, before: Handler) -> Handler {
    if was.at == address() {
        Handler { at: before.at, flags: together(was.flags, before.flags) }
    } else {
        was
    }
}

/// A call that sets a handler, made by libc as it is, as long as ours is not in place.
fn set_by<R>(sig: c_int, call: impl FnOnce() -> R) -> R {
    let r = call();
    // ORDERING [signal.on] SeqCst; pairs with the swap in `begin`.
    fence(SeqCst);
    if ON.load(SeqCst) {
        let e = errno();
        adopt(sig);
        set_errno(e);
    }
    r
}

/// What such a call has told of the handler before, which may be ours if it came into place meanwhile: the program's
/// is then the first that was found, and `new` may have taken its place.
fn told(sig: c_int, was: Handler, new: Option<usize>) -> Handler {
    let Some(action) = action(sig).filter(|_| was.at == address()) else { return was };
    alone(|| {
        let now = action.version.load(Relaxed);
        let v = if new.is_some_and(is_handler) { now.wrapping_sub(1) } else { now };
        let i = (v & 1) as usize;
        translated(was, Handler { at: action.at[i].load(Relaxed), flags: action.flags[i].load(Relaxed) })
    })
}

fn is_on() -> bool {
    ON.load(SeqCst)
}

hook! {
    /// sigaction(2).
    fn sigaction(sig: c_int, new: *const Act, old: *mut Act) -> c_int {
        if !is_on() {
            let r = set_by(sig, || kernel(sig, new, old));
            // SAFETY: null, or what the kernel has filled.
            if r == 0 && let Some(o) = unsafe { old.as_mut() } {
                // SAFETY: null, or what the kernel has read.
                let new = unsafe { new.as_ref() }.map(|n| n.sa_sigaction);
                let h = told(sig, Handler { at: o.sa_sigaction, flags: o.sa_flags }, new);
                (o.sa_sigaction, o.sa_flags) = (h.at, h.flags);
            }
            return r;
        }
        // SAFETY: null or the program's.
        let wanted = unsafe { new.as_ref() }.copied();
        let mut was = no_action();
        let masked = wanted.is_some_and(|a| holds(&a.sa_mask, sig));
        let (r, h) = change(sig, wanted.map(|a| Handler { at: a.sa_sigaction, flags: a.sa_flags }), masked, |known| {
            let mut a = wanted.unwrap_or_else(no_action);
            if let Some(k) = known {
                (a.sa_sigaction, a.sa_flags) = (k.at, k.flags);
            }
            let r = kernel(sig, if known.is_some() { &raw const a } else { std::ptr::null() }, &raw mut was);
            (r, Handler { at: was.sa_sigaction, flags: was.sa_flags })
        });
        // SAFETY: null or the program's.
        if r == 0 && let Some(o) = unsafe { old.as_mut() } {
            *o = was;
            (o.sa_sigaction, o.sa_flags) = (h.at, h.flags);
        }
        r
    }
}
alias! { __sigaction = sigaction(sig: c_int, new: *const Act, old: *mut Act) -> c_int; }

/// struct sigaction as the kernel has it, and rt_sigaction(2) has as its arguments.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct KernelAct {
    handler: usize,
    flags: usize,
    restorer: usize,
    mask: u64,
}

/// rt_sigaction(2), by number.
///
/// # Safety
/// Null or the program's.
pub unsafe fn by_number(sig: c_int, new: *const KernelAct, old: *mut KernelAct) -> c_int {
    let raw = |n: *const KernelAct, o: *mut KernelAct| {
        real!(syscall(libc::SYS_rt_sigaction => libc::c_long, sig as usize => usize, n => *const KernelAct, o => *mut KernelAct, MASK => usize) -> libc::c_long)
            as c_int
    };
    if !is_on() {
        let r = set_by(sig, || raw(new, old));
        if r == 0
            // SAFETY: as the caller vouches; the kernel has filled it.
            && let Some(o) = unsafe { old.as_mut() }
        {
            // SAFETY: as the caller vouches.
            let new = unsafe { new.as_ref() }.map(|n| n.handler);
            let h = told(sig, Handler { at: o.handler, flags: o.flags as c_int }, new);
            (o.handler, o.flags) = (h.at, h.flags as u32 as usize);
        }
        return r;
    }
    // SAFETY: as the caller vouches.
    let wanted = unsafe { new.as_ref() }.copied();
    let mut was = KernelAct { handler: 0, flags: 0, restorer: 0, mask: 0 };
    let masked = action(sig).is_some() && wanted.is_some_and(|a| a.mask & bit(sig) != 0);
    let (r, h) =
        change(sig, wanted.map(|a| Handler { at: a.handler, flags: a.flags as c_int }), masked, |known| {
            let a = wanted.zip(known).map(|(w, k)| KernelAct {
                handler: k.at,
                flags: k.flags as u32 as usize,
                ..w
            });
            let r = raw(a.as_ref().map_or(std::ptr::null(), std::ptr::from_ref), &raw mut was);
            (r, Handler { at: was.handler, flags: was.flags as c_int })
        });
    if r == 0
        // SAFETY: as the caller vouches.
        && let Some(o) = unsafe { old.as_mut() }
    {
        *o = KernelAct { handler: h.at, flags: h.flags as u32 as usize, ..was };
    }
    r
}

/// Sets a handler with these flags, and `sig` alone in its mask or nothing: the one before, or SIG_ERR.
fn simply(sig: c_int, at: usize, flags: c_int, masked: bool) -> usize {
    let (mut new, mut old) = (no_action(), no_action());
    (new.sa_sigaction, new.sa_flags) = (at, flags);
    if masked {
        // SAFETY: a live set.
        unsafe { libc::sigaddset(&raw mut new.sa_mask, sig) };
    }
    // SAFETY: live actions.
    let r = unsafe { sigaction(sig, &raw const new, &raw mut old) };
    if r == 0 { old.sa_sigaction } else { SIG_ERR }
}

/// As glibc (signal/sigaction.c, sysdeps/posix/signal.c): the handler is restarted after, unless siginterrupt has said
/// otherwise.
fn bsd(sig: c_int, at: usize) -> usize {
    if at == SIG_ERR || action(sig).is_none() {
        return fail_with_err();
    }
    let interrupt = INTERRUPT.load(Relaxed) & bit(sig) != 0;
    simply(sig, at, if interrupt { 0 } else { SA_RESTART }, true)
}

/// A call of libc's that gives back the handler alone.
fn old_style(sig: c_int, at: usize, call: impl FnOnce() -> usize) -> usize {
    told(sig, Handler { at: set_by(sig, call), flags: 0 }, Some(at)).at
}

fn fail_with_err() -> usize {
    fail::<c_int>(libc::EINVAL);
    SIG_ERR
}

hook! {
    /// signal(3).
    fn signal(sig: c_int, at: usize) -> usize {
        if is_on() { bsd(sig, at) } else { old_style(sig, at, || real!(signal(sig => c_int, at => usize) -> usize)) }
    }
}
alias! {
    bsd_signal = signal(sig: c_int, at: usize) -> usize;
    ssignal = signal(sig: c_int, at: usize) -> usize;
}

hook! {
    /// sysv_signal(3): for one signal, which is not blocked meanwhile, and restarts nothing.
    fn sysv_signal(sig: c_int, at: usize) -> usize {
        const SA_INTERRUPT: c_int = 0x2000_0000;
        if !is_on() {
            return old_style(sig, at, || real!(sysv_signal(sig => c_int, at => usize) -> usize));
        }
        if at == SIG_ERR || action(sig).is_none() {
            return fail_with_err();
        }
        simply(sig, at, SA_RESETHAND | SA_NODEFER | SA_INTERRUPT, false)
    }
}
alias! { __sysv_signal = sysv_signal(sig: c_int, at: usize) -> usize; }

hook! {
    /// sigset(3): the signal is unblocked, or with SIG_HOLD blocked.
    fn sigset(sig: c_int, at: usize) -> usize {
        const SIG_HOLD: usize = 2;
        if !is_on() {
            return old_style(sig, at, || real!(sigset(sig => c_int, at => usize) -> usize));
        }
        if at == SIG_ERR || action(sig).is_none() {
            return fail_with_err();
        }
        let hold = at == SIG_HOLD;
        let mut old = no_action();
        let before = if hold {
            // SAFETY: a live action.
            if unsafe { sigaction(sig, std::ptr::null(), &raw mut old) } == 0 { old.sa_sigaction } else { SIG_ERR }
        } else {
            simply(sig, at, 0, false)
        };
        if before == SIG_ERR {
            return before;
        }
        let was = set_mask(if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK }, bit(sig));
        if was & bit(sig) != 0 { SIG_HOLD } else { before }
    }
}

hook! {
    /// siginterrupt(3).
    fn siginterrupt(sig: c_int, on: c_int) -> c_int {
        let r = if is_on() {
            let mut a = no_action();
            // SAFETY: a live action.
            let r = unsafe { sigaction(sig, std::ptr::null(), &raw mut a) };
            if r != 0 {
                return r;
            }
            a.sa_flags = if on != 0 { a.sa_flags & !SA_RESTART } else { a.sa_flags | SA_RESTART };
            // SAFETY: as above.
            unsafe { sigaction(sig, &raw const a, std::ptr::null_mut()) }
        } else {
            set_by(sig, || real!(siginterrupt(sig => c_int, on => c_int) -> c_int))
        };
        if r == 0 && action(sig).is_some() {
            if on != 0 {
                INTERRUPT.fetch_or(bit(sig), Relaxed);
            } else {
                INTERRUPT.fetch_and(!bit(sig), Relaxed);
            }
        }
        r
    }
}

// ---- when one comes

/// Real-time signals of one number that were deferred in this thread: see the module. As many as are likely at once:
/// what is deferred is delivered before the thread goes on, so that more than one is there only if a handler is
/// interrupted in a section of its own. Beyond that the order is lost, not the signal.
struct Line {
    /// 0: nobody's.
    sig: AtomicI32,
    /// `Action::ignored` when it began.
    epoch: Cell<u32>,
    first: Cell<usize>,
    n: Cell<usize>,
    infos: [Cell<MaybeUninit<siginfo_t>>; LINE_LEN],
}

const LINE_LEN: usize = 4;

thread_local! {
    static LINE: Line = const {
        Line {
            sig: AtomicI32::new(0),
            epoch: Cell::new(0),
            first: Cell::new(0),
            n: Cell::new(0),
            infos: [const { Cell::new(MaybeUninit::uninit()) }; LINE_LEN],
        }
    };
}

/// What a token has as its si_code: none of the kernel's, which are above, nor of POSIX's (asm-generic/siginfo.h).
const TOKEN: c_int = -0x736d63;

impl Line {
    /// Of another handler's than that of `sig`, which is blocked meanwhile, only the first exchange is of account: the
    /// rest is touched by whoever has made it.
    fn is_of(&self, sig: c_int) -> bool {
        self.sig.load(Relaxed) == sig
    }

    fn clear(&self) {
        self.n.set(0);
        self.sig.store(0, Relaxed);
    }

    /// Forgets what the kernel has forgotten.
    fn refresh(&self, sig: c_int) {
        let now = action(sig).map_or(0, |a| a.ignored.load(Relaxed));
        if self.epoch.replace(now) != now {
            self.n.set(0);
        }
    }

    /// Puts a signal that is deferred at the end; `info` is a token for it then. Or leaves it as it is.
    fn put(&self, sig: c_int, info: &mut siginfo_t) {
        if sig < libc::SIGRTMIN() || info.si_code == TOKEN {
            return;
        }
        if self.sig.compare_exchange(0, sig, Relaxed, Relaxed).is_ok() {
            self.epoch.set(action(sig).map_or(0, |a| a.ignored.load(Relaxed)));
        } else if !self.is_of(sig) {
            return;
        }
        self.refresh(sig);
        if self.push(info) {
            info.si_code = TOKEN;
        }
    }

    fn push(&self, info: &siginfo_t) -> bool {
        let n = self.n.get();
        if n == LINE_LEN {
            return false;
        }
        self.infos[(self.first.get() + n) % LINE_LEN].set(MaybeUninit::new(*info));
        self.n.set(n + 1);
        true
    }

    /// A signal or a token has come: `info` is what the handler is to see. False: nothing.
    fn next(&self, sig: c_int, info: &mut siginfo_t) -> bool {
        let token = info.si_code == TOKEN;
        if sig < libc::SIGRTMIN() || !self.is_of(sig) {
            return !token;
        }
        self.refresh(sig);
        let n = self.n.get();
        if n == 0 {
            self.sig.store(0, Relaxed);
            return !token;
        }
        let first = self.first.get();
        // SAFETY: one of the `n` that `push` has written.
        let head = unsafe { self.infos[first].get().assume_init() };
        self.first.set((first + 1) % LINE_LEN);
        self.n.set(n - 1);
        if !token {
            // Room was just made.
            self.push(info);
        } else if n == 1 {
            self.sig.store(0, Relaxed);
        }
        *info = head;
        true
    }
}

/// Where the kernel keeps the mask of the interrupted thread.
///
/// # Safety
/// `context` is the third argument of a handler with SA_SIGINFO, which has not returned.
unsafe fn mask_of(context: *mut c_void) -> *mut u64 {
    // SAFETY: as the caller vouches; a place inside it.
    let mask: *mut sigset_t = unsafe { &raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask };
    mask.cast()
}

/// rt_tgsigqueueinfo(2) to this thread.
///
/// # Safety
/// `info` is a live siginfo.
unsafe fn queue(sig: c_int, info: *const siginfo_t) -> isize {
    // Asked of the kernel: in a child that was cloned past us the number that we remember is its parent's.
    // SAFETY: no arguments.
    let tid = unsafe { syscall6(libc::SYS_gettid, 0, 0, 0, 0, 0, 0) } as usize;
    let (pid, sig) = (engine::sys::getpid() as usize, sig as usize);
    // SAFETY: as the caller vouches.
    unsafe { syscall6(libc::SYS_rt_tgsigqueueinfo, pid, tid, sig, info as usize, 0, 0) }
}

/// The handler that the kernel knows.
unsafe extern "C" fn handler(sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    if section::inside() && !FAULTS.contains(&sig) && !super::direct::sandboxed() {
        // SAFETY: the kernel's arguments.
        unsafe { postpone(sig, info, context) };
    } else {
        // SAFETY: as above.
        unsafe { run(sig, info, context) };
    }
}

/// The signal waits for the end of the section. Another may come at any point of this, and of the way here and back: its
/// context has the mask of this handler, which is that of the thread and more. So the mask to come back to is what is
/// common to all contexts, from the first that finds nothing deferred. (Of two that find that, the outer one says last.)
///
/// # Safety
/// The arguments of a handler.
#[cold]
unsafe fn postpone(sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's siginfo, ours to write.
    LINE.with(|l| l.put(sig, unsafe { &mut *info }));
    // This signal is blocked in here (no SA_NODEFER, or in the mask), so it stays in the queue.
    // SAFETY: the kernel's siginfo.
    if unsafe { queue(sig, info) } < 0 {
        // The queue is full (RLIMIT_SIGPENDING): then without what came with it, as a signal from kill(2), which always
        // has room (__send_signal_locked, kernel/signal.c).
        // SAFETY: the kernel's siginfo, ours to write.
        unsafe { (*info).si_code = libc::SI_USER };
        // SAFETY: as above.
        unsafe { queue(sig, info) };
    }
    // SAFETY: the kernel's context.
    let mask = unsafe { mask_of(context) };
    // SAFETY: as above.
    let own = unsafe { mask.read_unaligned() };
    let common = if section::is_deferred() { BEFORE.get() & own } else { own };
    // In this order for the compiler, and for this thread alone: a handler that comes in between finds the bit, takes what
    // is common with whatever stood there before, and that is written over here.
    section::defer();
    std::sync::atomic::compiler_fence(SeqCst);
    BEFORE.set(common);
    // SAFETY: as above; the mask that is there when this returns.
    unsafe { mask.write_unaligned(own | deferrable()) };
}

/// The program's handler.
///
/// # Safety
/// The arguments of a handler.
unsafe fn run(sig: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(action) = action(sig) else { return };
    let (h, version) = action.now();
    if h.flags & SA_RESETHAND != 0 && !use_up(sig, action, version) {
        // Another thread was first: it is for what the kernel knows by now.
        // SAFETY: the kernel's siginfo.
        unsafe { queue(sig, info) };
        return;
    }
    // SAFETY: the kernel's siginfo, ours to write.
    if !LINE.with(|l| l.next(sig, unsafe { &mut *info })) {
        return;
    }
    section::count(h.flags & SA_RESTART == 0);
    // SAFETY: the kernel's context.
    if h.flags & SA_NODEFER != 0 && unsafe { mask_of(context).read_unaligned() } & bit(sig) == 0 {
        set_mask(libc::SIG_UNBLOCK, bit(sig));
    }
    // A fault in a section of ours: its handler may jump, and then the section is over.
    let n = section::set_aside();
    // SAFETY: a handler as the program has given it. One of a single argument finds that in its register, and does not
    // look at the others.
    let f = unsafe {
        std::mem::transmute::<usize, unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(h.at)
    };
    // SAFETY: as above.
    unsafe { f(sig, info, context) };
    section::close(n);
}

/// A handler for one signal: the kernel goes back to the default. False: it has been used up already.
fn use_up(sig: c_int, action: &Action, version: u32) -> bool {
    alone(|| {
        if action.spent.load(Relaxed) == version.wrapping_add(1) {
            return false;
        }
        action.spent.store(version.wrapping_add(1), Relaxed);
        let (h, now) = action.now();
        let mut a = no_action();
        if now == version && kernel(sig, std::ptr::null(), &raw mut a) == 0 && a.sa_sigaction == address() {
            a.sa_sigaction = SIG_DFL;
            a.sa_flags = together(a.sa_flags, h.flags);
            kernel(sig, &raw const a, std::ptr::null_mut());
        }
        true
    })
}

/// A section has ended, or opened a window, in which a signal came: the kernel delivers it now.
fn deliver() {
    let e = errno();
    set_mask(libc::SIG_SETMASK, BEFORE.get());
    set_errno(e);
}

/// In a forked child: what was deferred is the parent's.
pub fn after_fork_child() {
    LOCK.store(0, Relaxed);
    LINE.with(Line::clear);
    if section::forget_deferred() {
        set_mask(libc::SIG_SETMASK, BEFORE.get());
    }
}
