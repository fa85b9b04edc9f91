//! Sections: stretches of a thread in which no handler of the program's runs, and the windows in them.
//!
//! A call on a connection holds references, counts and locks. A signal handler that came in between and made a call
//! on the same connection would wait for what its own thread holds; one that left by a jump would leave all of it
//! behind. So each call is a *section*, and a handler that comes in one is deferred until the section ends (the shim
//! does that: `preload/src/hooks/signals.rs`). Where a call sleeps or hands itself to the kernel it opens a *window*:
//! there handlers run at once, and what the thread holds is known to somebody who can let go of it.
//!
//! | state of a thread | handlers | by |
//! | --- | --- | --- |
//! | 0 | run | `leave`, `open` |
//! | n > 0 | are deferred | `enter` |
//! | below 0 | one is deferred, and all signals are blocked; n is in the lower bits | [`defer`] |
//!
//! The state belongs to its thread: others never see it. A signal that interrupts the thread does, so that each change
//! is one instruction, or an atomic one.
#![allow(unsafe_code)]

use crate::conn::Socket;
use crate::once::Once;
use crate::sys;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering::Relaxed};

/// Handlers that have run in a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// All.
    any: u32,
    /// Those that end a system call which they interrupt (no SA_RESTART).
    ending: u32,
}

/// What the threads have, each its own. Atomic as a signal of the thread sees it, and Relaxed, since nobody else does.
#[repr(C)]
struct Thread {
    /// See the module.
    state: AtomicI32,
    /// The thread's id as the kernel has it; 0: not asked yet.
    tid: AtomicU32,
    any: AtomicU32,
    ending: AtomicU32,
}

/// The bit of a deferred handler.
const DEFERRED: i32 = i32::MIN;

#[cfg(target_arch = "x86_64")]
mod local {
    //! One block in the library's static part of the threads' memory, so that it is reached without a call: the
    //! library is there from the start of the program. (Stable Rust has no thread-local of that kind.)

    use super::Thread;
    use std::arch::{asm, global_asm};

    global_asm!(
        ".pushsection .tbss.smc_thread,\"awT\",@nobits",
        ".globl smc_thread",
        ".hidden smc_thread",
        ".type smc_thread, @object",
        ".size smc_thread, {size}",
        ".p2align 4",
        "smc_thread:",
        ".zero {size}",
        ".popsection",
        size = const size_of::<Thread>(),
    );

    /// Where the block is from the thread pointer.
    #[inline(always)]
    fn offset() -> usize {
        let at: usize;
        // SAFETY: reads a word that the loader has filled before any code of this library runs, and that does not
        // change.
        unsafe {
            asm!(
                "mov {at}, qword ptr [rip + smc_thread@GOTTPOFF]",
                at = out(reg) at,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        at
    }

    #[inline(always)]
    pub fn enter() {
        // SAFETY: adds to the `state` of this thread's block, its first word, in one instruction. The compiler moves
        // no access to memory across (no `nomem`), which is what keeps the section together.
        unsafe { asm!("inc dword ptr fs:[{at}]", at = in(reg) offset(), options(nostack)) };
    }

    #[inline(always)]
    pub fn leave(deferred: impl FnOnce()) {
        // SAFETY: as above; the sign is that of what remains.
        unsafe {
            asm!(
                "dec dword ptr fs:[{at}]",
                "js {below}",
                at = in(reg) offset(),
                below = label { deferred() },
                options(nostack)
            );
        }
    }

    /// Adds to the state, which an interrupting signal may be changing as well: one instruction.
    #[inline]
    pub fn add(n: i32) {
        // SAFETY: as in `enter`.
        unsafe {
            asm!("add dword ptr fs:[{at}], {n:e}", at = in(reg) offset(), n = in(reg) n, options(nostack))
        };
    }

    /// The same for the bit of a deferred handler.
    #[inline]
    pub fn set_sign() {
        // SAFETY: as in `enter`.
        unsafe { asm!("or dword ptr fs:[{at}], 0x80000000", at = in(reg) offset(), options(nostack)) };
    }

    #[inline(always)]
    pub fn here<R>(f: impl FnOnce(&Thread) -> R) -> R {
        let base: usize;
        // SAFETY: the first word of a thread's control block is its own address (x86-64 psABI).
        unsafe {
            asm!(
                "mov {base}, qword ptr fs:[0]",
                base = out(reg) base,
                options(pure, readonly, nostack, preserves_flags)
            );
        }
        let at = std::ptr::with_exposed_provenance::<Thread>(base.wrapping_add(offset()));
        // SAFETY: this thread's block, which is there while the thread is; zero at first, a valid Thread, and no
        // other thread has it.
        f(unsafe { &*at })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod local {
    use super::Thread;
    use std::sync::atomic::{
        AtomicI32, AtomicU32,
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    };

    thread_local! {
        static THREAD: Thread = const {
            Thread { state: AtomicI32::new(0), tid: AtomicU32::new(0), any: AtomicU32::new(0), ending: AtomicU32::new(0) }
        };
    }

    pub fn here<R>(f: impl FnOnce(&Thread) -> R) -> R {
        THREAD.with(f)
    }

    /// The old value. Atomic as a signal of this thread sees it.
    fn fetch_add(n: i32) -> i32 {
        // The compiler moves nothing across, which is what keeps the section together.
        compiler_fence(SeqCst);
        let was = here(|t| t.state.fetch_add(n, Relaxed));
        compiler_fence(SeqCst);
        was
    }

    pub fn enter() {
        fetch_add(1);
    }

    pub fn leave(deferred: impl FnOnce()) {
        if fetch_add(-1) - 1 < 0 {
            deferred();
        }
    }

    pub fn add(n: i32) {
        fetch_add(n);
    }

    pub fn set_sign() {
        here(|t| t.state.fetch_or(i32::MIN, Relaxed));
    }
}

/// The thread is in a section while this lives. Of its own thread: not to be sent.
#[derive(Debug)]
#[must_use]
pub struct Section(PhantomData<*const ()>);

/// Begins a section, or one inside another.
#[inline(always)]
pub fn enter() -> Section {
    local::enter();
    Section(PhantomData)
}

impl Clone for Section {
    fn clone(&self) -> Self {
        enter()
    }
}

impl Drop for Section {
    #[inline(always)]
    fn drop(&mut self) {
        local::leave(left);
    }
}

/// Ends a section whose guard was forgotten.
pub fn leave() {
    local::leave(left);
}

/// Whether the thread is in a section: a handler is to be deferred.
#[inline]
pub fn inside() -> bool {
    local::here(|t| t.state.load(Relaxed)) & !DEFERRED != 0
}

/// Whether a handler waits for the end of the section: polling is to end soon.
#[inline]
pub fn is_deferred() -> bool {
    local::here(|t| t.state.load(Relaxed)) < 0
}

/// From a signal handler inside a section: one waits, if none does yet. The caller keeps it, and all others out.
pub fn defer() {
    local::set_sign();
}

/// From a handler: what it has interrupted is none of its sections; [`close`] with the result.
pub fn set_aside() -> i32 {
    let n = local::here(|t| t.state.load(Relaxed)) & !DEFERRED;
    local::add(-n);
    n
}

/// A handler of the program's is about to run in this thread; `ending`: it has no SA_RESTART.
pub fn count(ending: bool) {
    local::here(|t| {
        t.any.fetch_add(1, Relaxed);
        if ending {
            t.ending.fetch_add(1, Relaxed);
        }
    });
}

/// Handlers that have run so far.
pub fn ran() -> Ran {
    local::here(|t| Ran { any: t.any.load(Relaxed), ending: t.ending.load(Relaxed) })
}

impl Ran {
    /// Whether a handler has run since.
    pub fn any(&self) -> bool {
        ran().any != self.any
    }

    /// Whether what a signal has interrupted since is to go on: none has run that [ends](Self::ends) it, nor any that
    /// nobody could count (set by an instruction of the program's own) and that might.
    pub fn restarts(&self, strict: bool) -> bool {
        !strict && !self.ends(false) && sys::handlers_restart(HANDLER.load(Relaxed))
    }

    /// Whether a handler has run since that ends what it interrupts; `strict`: any does (a call that has moved bytes
    /// or has a time-out is not restarted, nor is one that waits for several).
    pub fn ends(&self, strict: bool) -> bool {
        strict && self.any() || ran().ending != self.ending
    }
}

/// The handler that counts; 0: none is in place yet.
static HANDLER: AtomicUsize = AtomicUsize::new(0);

/// Handlers are called, from now on, by the one at that address, which [counts](count) them.
pub fn counted_by(handler: usize) {
    HANDLER.store(handler, Relaxed);
}

/// Who delivers what was deferred: the shim. It runs outside of any section.
static DELIVER: Once<fn()> = Once::new();

/// Names the function that delivers what was [deferred](defer). The first call counts.
pub fn deliver_with(f: fn()) {
    let _ = DELIVER.set(f);
}

/// The state is below zero: a handler waits.
#[cold]
#[inline(never)]
fn left() {
    if local::here(|t| t.state.load(Relaxed)) == DEFERRED {
        // All signals are blocked: nothing changes the state in between.
        forget_deferred();
        if let Some(f) = DELIVER.get() {
            f();
        }
    }
}

/// Nothing is deferred any more: it is delivered, or was another process's (that this one was forked from). False:
/// nothing was.
pub fn forget_deferred() -> bool {
    let was = is_deferred();
    if was {
        local::add(DEFERRED);
    }
    was
}

/// Ends all sections of the thread for a while and delivers what was deferred; [`close`] with the result.
pub fn open() -> i32 {
    let n = set_aside();
    if is_deferred() {
        left();
    }
    n
}

/// The sections that [`open`] ended are there again.
pub fn close(n: i32) {
    local::add(n);
}

/// Lets go of what a thread held in a window that it will not come out of: `f` in a section, whatever references it
/// drops; after that the thread is in none, as it was in the window.
pub fn abandon(f: impl FnOnce()) {
    /// More than there are references in a call.
    const MANY: i32 = 1 << 20;
    local::add(MANY);
    f();
    open();
}

/// What a thread holds in a window, for the case that it never comes out of it: a handler jumps, or the thread is
/// cancelled.
pub struct Held<'a> {
    /// The connection on which the call has a reference, that of the shim.
    pub sock: Option<&'a Socket>,
    /// Takes the rest back. Called in a section.
    pub undo: &'a mut dyn FnMut(),
}

/// How a window is made: the shim knows how a thread may be left.
static WINDOW: Once<Window> = Once::new();

/// Calls its last argument in a window, with [`Ran`] from before it was open.
pub type Window = fn(&mut Held<'_>, &mut dyn FnMut(Ran) -> isize) -> isize;

/// Names the function that makes windows. The first call counts.
pub fn window_with(f: Window) {
    let _ = WINDOW.set(f);
}

/// Calls `f` in a window: handlers run. `undo` takes back what the caller would take back after, for the case that
/// there is no after.
#[inline(never)]
pub fn window(sock: &Socket, undo: &mut dyn FnMut(), f: &mut dyn FnMut(Ran) -> isize) -> isize {
    match WINDOW.get() {
        Some(w) => w(&mut Held { sock: Some(sock), undo }, f),
        None => f(ran()),
    }
}

/// This thread's id, cached; [`forget_tid`] after fork.
#[inline(always)]
pub fn tid(ask: impl FnOnce() -> u32) -> u32 {
    local::here(|t| match t.tid.load(Relaxed) {
        0 => {
            let tid = ask();
            t.tid.store(tid, Relaxed);
            tid
        }
        tid => tid,
    })
}

/// In a forked child: the ids of thread and process have changed.
pub fn forget_tid() {
    sys::forget_pid();
    local::here(|t| t.tid.store(0, Relaxed));
}

#[cfg(test)]
mod tests {
    use super::*;

    static DELIVERED: AtomicU32 = AtomicU32::new(0);

    #[test]
    fn what_is_deferred_waits_for_the_outermost_end_or_a_window() {
        deliver_with(|| {
            assert!(!inside() && !is_deferred());
            DELIVERED.fetch_add(1, Relaxed);
        });
        let a = enter();
        let b = enter();
        assert!(inside() && !is_deferred());
        defer();
        assert!(inside() && is_deferred());
        drop(b);
        assert_eq!(DELIVERED.load(Relaxed), 0);
        drop(a);
        assert_eq!(DELIVERED.load(Relaxed), 1);
        let (a, b) = (enter(), enter());
        defer();
        let n = open();
        assert_eq!((n, DELIVERED.load(Relaxed)), (2, 2));
        close(n);
        assert!(inside());
        drop((a, b));
        assert!(!inside());
    }

    #[test]
    fn handlers_are_counted_by_what_they_end() {
        let before = ran();
        assert!(!before.any() && !before.ends(true));
        count(false);
        assert!(before.any() && before.ends(true) && !before.ends(false));
        count(true);
        assert!(before.ends(false) && !ran().any());
    }
}
