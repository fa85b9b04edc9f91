//! Atomics that stop before each access, and everything else that the model shares in the same manner.
//!
//! An operation is ordinary code. What a thread of it has seen so far is its log: the value of each access it has
//! made. One step runs the operation from its beginning: accesses in the log are answered from it and touch
//! nothing, the next one is made, the state after it is kept, and what the rest of the run does is thrown away.
//! So a thread can be left between any two accesses, for ever if it is killed there.

use std::cell::RefCell;
use std::sync::atomic::{self, Ordering};

use super::world::World;

/// How far a run has come.
#[derive(Debug, Default)]
pub struct Run {
    on: bool,
    /// Values of the accesses made in earlier steps, then of this one.
    pub log: Vec<u8>,
    made: usize,
    at: usize,
    /// The step's own access has been made; those that belong to it may follow.
    live: bool,
    /// The next access belongs to it as well.
    join: bool,
    /// The state after the step.
    pub after: Option<Box<World>>,
    /// The step could not be made: why.
    pub blocked: Option<u8>,
    /// What broke in this step.
    pub broken: Option<&'static str>,
}

thread_local! {
    static RUN: RefCell<Run> = RefCell::default();
}

/// Begins a step of an operation whose accesses so far are in `log`.
pub fn begin(log: &[u8]) {
    RUN.with_borrow_mut(|r| {
        r.on = true;
        r.log.clear();
        r.log.extend_from_slice(log);
        r.made = log.len();
        (r.at, r.live, r.join) = (0, false, false);
        (r.after, r.blocked, r.broken) = (None, None, None);
    });
}

/// The operation has come to its end, or this run of it.
pub fn end<T>(f: impl FnOnce(&mut Run) -> T) -> T {
    RUN.with_borrow_mut(|r| {
        r.on = false;
        f(r)
    })
}

fn pack(v: u64) -> u8 {
    debug_assert!(v & !(1 << 63) < 128);
    (v as u8 & 127) | ((v >> 63) as u8) << 7
}

fn unpack(v: u8) -> u64 {
    u64::from(v & 127) | u64::from(v >> 7) << 63
}

/// An access: `Err` if it can't be made now. `joined`: it belongs to the step of the access before it, since
/// nobody else can tell the two apart.
fn access(joined: bool, mut perform: impl FnMut() -> Result<u64, u8>) -> u64 {
    // Whether to perform it, and whether the state before it is to be kept first.
    enum Do {
        Answer(u64),
        Bare,
        Own,
        Keep,
        Scratch,
    }
    let what = RUN.with_borrow_mut(|r| {
        if !r.on {
            return Do::Bare;
        }
        let k = r.at;
        r.at += 1;
        if k < r.made {
            return Do::Answer(unpack(r.log[k]));
        }
        if r.after.is_some() || r.blocked.is_some() {
            return Do::Scratch;
        }
        let joined = joined || std::mem::take(&mut r.join);
        if r.live && !joined {
            return Do::Keep;
        }
        r.live = true;
        Do::Own
    });
    match what {
        Do::Answer(v) => v,
        Do::Bare => perform().unwrap_or(0),
        Do::Scratch => perform().unwrap_or(0),
        Do::Keep => {
            let w = super::world::snapshot();
            RUN.with_borrow_mut(|r| r.after = Some(w));
            perform().unwrap_or(0)
        }
        Do::Own => match perform() {
            Ok(v) => RUN.with_borrow_mut(|r| {
                r.log.push(pack(v));
                v
            }),
            Err(why) => RUN.with_borrow_mut(|r| {
                r.blocked = Some(why);
                0
            }),
        },
    }
}

/// A lock was taken in this step, if it is this one: the next access goes with it. (What comes between changes nothing
/// for the others: those who want the lock wait, or go first.)
pub fn join_next() {
    RUN.with_borrow_mut(|r| {
        r.join |= r.on && r.at == r.log.len() && r.live && r.after.is_none() && r.blocked.is_none()
    });
}

/// The lock is given back, and nothing was done that others could see.
pub fn join_no_more() {
    RUN.with_borrow_mut(|r| r.join = false);
}

/// Notes what broke, if it is in this step.
pub fn broke(why: &'static str) {
    RUN.with_borrow_mut(|r| {
        if r.on && r.live && r.after.is_none() && r.blocked.is_none() && r.broken.is_none() {
            r.broken = Some(why);
        }
    });
}

/// A step on the state outside of the page.
pub fn step(f: impl FnMut() -> Result<u8, u8>) -> u8 {
    let mut f = f;
    access(false, || f().map(u64::from)) as u8
}

/// As [`step`], in one with the access before it.
pub fn joined(f: impl FnMut() -> u8) -> u8 {
    let mut f = f;
    access(true, || Ok(u64::from(f()))) as u8
}

macro_rules! traced {
    ($name:ident, $of:ty) => {
        /// See the module.
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(atomic::$name);

        impl $name {
            /// The value, unseen.
            pub fn raw(&self) -> $of {
                self.0.load(Ordering::SeqCst)
            }

            /// Sets the value, unseen.
            pub fn set_raw(&self, v: $of) {
                self.0.store(v, Ordering::SeqCst);
            }

            pub fn load(&self, o: Ordering) -> $of {
                access(false, || Ok(u64::from(self.0.load(o)))) as $of
            }

            pub fn store(&self, v: $of, o: Ordering) {
                access(false, || {
                    self.0.store(v, o);
                    Ok(0)
                });
            }

            #[allow(dead_code, reason = "as std has it")]
            pub fn fetch_or(&self, v: $of, o: Ordering) -> $of {
                access(false, || Ok(u64::from(self.0.fetch_or(v, o)))) as $of
            }

            #[allow(dead_code, reason = "as std has it")]
            pub fn fetch_and(&self, v: $of, o: Ordering) -> $of {
                access(false, || Ok(u64::from(self.0.fetch_and(v, o)))) as $of
            }

            #[allow(dead_code, reason = "as std has it")]
            pub fn fetch_update(
                &self,
                set: Ordering,
                get: Ordering,
                mut f: impl FnMut($of) -> Option<$of>,
            ) -> Result<$of, $of> {
                let was = access(false, || {
                    Ok(u64::from(self.0.fetch_update(set, get, &mut f).unwrap_or_else(|was| was)))
                }) as $of;
                f(was).map(|_| was).ok_or(was)
            }
        }
    };
}

traced!(AtomicU32, u32);
traced!(AtomicU64, u64);
