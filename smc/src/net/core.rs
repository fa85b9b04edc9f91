//! One connection of this process's own, whoever has a handle of it, and the books of all of them.
//!
//! ```text
//! Stream, Stream (try_clone), Reader …   handles, counted
//!   └─> Core   the TCP socket and the engine's Socket
//!         └─ the last handle closes: out of the books, before_close, close(2), finish
//! ```
//!
//! What needs the books: a fork, after which another process holds the connections too (`conn/holders.rs`), and the
//! end of the process, which has to give to TCP what the peer would not take from the ring. They are locked from
//! before a fork until after it, so both processes find them whole.

use crate::config::{self, Config};
use crate::conn::{Side, Socket, Tuning};
use crate::stats::ConnectionInfo;
use crate::sync::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*};
use crate::{arena, counts, lgr, report, section, sys};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::mem::ManuallyDrop;
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, IntoRawFd as _};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};

/// See the module.
#[derive(Debug)]
pub(super) struct Core {
    pub fd: i32,
    pub sock: Socket,
    /// The last handle has given the TCP socket away. (No lock: a child of a fork might find it held for ever.)
    taken: AtomicBool,
    handles: AtomicUsize,
    /// The engine has a say.
    pub tracked: bool,
    /// Threads that have reserved space, or look at bytes of the ring.
    pub reserved: AtomicU32,
    /// The mio registry that hears of it.
    #[cfg(feature = "mio")]
    pub watch: super::watch::Watch,
    /// What a subscriber was told.
    #[cfg(feature = "tracing")]
    pub events: super::events::Events,
}

/// A counted reference to a [`Core`]: the last one closes.
#[derive(Debug)]
pub(super) struct Handle(Arc<Core>);

impl std::ops::Deref for Handle {
    type Target = Core;
    #[inline]
    fn deref(&self) -> &Core {
        &self.0
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        // Relaxed: whoever clones has a handle, so the count is above zero.
        self.0.handles.fetch_add(1, Relaxed);
        Handle(self.0.clone())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // ORDERING [handles] AcqRel; pairs with itself. Carries: what others did by their handles, to the last.
        if counts::count_off(&self.0.handles) == 1 {
            self.0.close();
        }
    }
}

/// How a connection comes to be known.
pub(super) enum Origin {
    /// This process has made it and nothing has been sent.
    New(Side),
    /// The kernel is to be asked.
    Found,
}

impl Handle {
    /// `tcp` as a connection; `upgrade` false: it stays plain TCP.
    pub fn new(tcp: TcpStream, origin: Origin, upgrade: bool, tuning: impl FnOnce() -> Tuning) -> Handle {
        let fd = tcp.into_raw_fd();
        let sock = Socket::new();
        let nonblock = sys::getfl(fd) as i32 & libc::O_NONBLOCK != 0;
        let tracked = upgrade
            && !settings().disable
            && !is_preloaded()
            && match origin {
                Origin::New(side) => sock.init_with(side, nonblock, tuning()),
                Origin::Found => sock.adopt_stream(fd, nonblock, tuning()),
            };
        let (handles, reserved, taken) = (AtomicUsize::new(1), AtomicU32::new(0), AtomicBool::new(false));
        let core = Arc::new(Core {
            fd,
            sock,
            taken,
            handles,
            tracked,
            reserved,
            #[cfg(feature = "mio")]
            watch: super::watch::Watch::default(),
            #[cfg(feature = "tracing")]
            events: super::events::Events::default(),
        });
        if tracked {
            books().all.insert(Arc::as_ptr(&core).addr(), core.clone());
            mind_numbers(fd);
        }
        Handle(core)
    }

    /// The TCP socket itself, if this is the only handle: nothing follows it any more. Otherwise a duplicate.
    pub fn into_tcp(self) -> io::Result<TcpStream> {
        // ORDERING [handles] Acquire; see `drop`. Whoever has the only handle stays the only one.
        if !counts::is_only(&self.0.handles) {
            return self.with_tcp(TcpStream::try_clone);
        }
        // Relaxed: nobody else is there.
        self.0.taken.store(true, Relaxed);
        #[cfg(feature = "mio")]
        self.0.watch.end(self.0.fd, true);
        if self.0.tracked {
            self.0.strike_out();
            self.0.sock.detach();
        }
        Ok(ManuallyDrop::into_inner(sys::lend_tcp(self.0.fd)))
    }
}

impl Core {
    /// Calls `f` with std's socket, for what it does as well as anybody. A handle is there.
    pub fn with_tcp<R>(&self, f: impl FnOnce(&TcpStream) -> R) -> R {
        f(&sys::lend_tcp(self.fd))
    }

    /// The TCP socket, as long as a handle is there.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        sys::borrow(self, self.fd)
    }

    fn strike_out(&self) {
        books().all.remove(&std::ptr::from_ref(self).addr());
    }

    #[cold]
    fn close(&self) {
        if self.taken.load(Relaxed) {
            return;
        }
        let tcp = ManuallyDrop::into_inner(sys::lend_tcp(self.fd));
        if !self.tracked {
            return drop(tcp);
        }
        #[cfg(feature = "tracing")]
        super::events::Events::closing(self);
        #[cfg(feature = "mio")]
        self.watch.end(self.fd, false);
        // First: a child of a fork that comes now does not hold what nobody there will close.
        self.strike_out();
        let last = self.sock.before_close(self.fd);
        drop(tcp);
        self.sock.finish(last);
    }
}

// ---- the books

#[derive(Default)]
struct Books {
    all: HashMap<usize, Arc<Core>>,
}

/// The books, locked. Handlers for fork and exit are in place from the first time on.
fn books() -> MutexGuard<'static, Books> {
    static BOOKS: OnceLock<Mutex<Books>> = OnceLock::new();
    static HANDLERS: Once = Once::new();
    HANDLERS.call_once(|| {
        // Where there is no room for them: a forked child is not known to hold the connections.
        let _ = sys::at_fork(before_fork, in_parent, in_child) && sys::at_exit(at_exit);
    });
    BOOKS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// What this thread holds while it forks: the books, and the token of the fork.
    static FORKING: RefCell<Option<(MutexGuard<'static, Books>, u32)>> = const { RefCell::new(None) };
}

extern "C" fn before_fork() {
    let books = books();
    let token = arena::token();
    books.all.values().for_each(|c| c.sock.before_fork(token));
    FORKING.with(|f| *f.borrow_mut() = Some((books, token)));
}

/// Whether the fork has failed is not told: then the connections count a holder too many, and stay as they are.
extern "C" fn in_parent() {
    FORKING.with(|f| drop(f.borrow_mut().take()));
}

extern "C" fn in_child() {
    section::forget_tid();
    lgr::after_fork_child();
    arena::after_fork_child();
    let held = FORKING.with(|f| f.borrow_mut().take());
    if let Some((books, token)) = held {
        for c in books.all.values() {
            c.sock.after_fork_child(token);
            #[cfg(feature = "mio")]
            c.watch.forget(&c.sock);
        }
    }
}

/// The process ends with connections open: as if each were closed.
extern "C" fn at_exit() {
    // Another thread may be in the middle of a change, and no more than that: it holds the lock for no longer.
    let all: Vec<_> = books().all.values().cloned().collect();
    all.iter().for_each(|c| c.sock.exiting(c.fd));
}

/// All that are followed, as they are now.
pub(super) fn statuses() -> Vec<ConnectionInfo> {
    let all: Vec<_> = books().all.values().cloned().collect();
    all.iter().filter_map(|c| c.sock.info()).collect()
}

// ---- the process

/// The settings, from the same environment variables that the shim reads.
pub(super) fn settings() -> &'static Config {
    let env = |name: &str| std::env::var_os(name).map(OsStringExt::into_vec);
    config::init(&env, &mut |line| report::say(format!("{line}\n").as_bytes()))
}

/// Whether libsmc.so has the connections of this process, those of this module among them.
pub(super) fn is_preloaded() -> bool {
    /// 0: not looked yet, 1: no, 2: yes.
    static PRELOADED: AtomicU32 = AtomicU32::new(0);
    // Relaxed: the answer is the same whoever stores it.
    match PRELOADED.load(Relaxed) {
        0 => {
            let yes = sys::is_preloaded();
            PRELOADED.store(1 + u32::from(yes), Relaxed);
            yes
        }
        n => n == 2,
    }
}

/// The program's numbers come near ours: no more of them are taken, until there is room again.
fn mind_numbers(fd: i32) {
    use crate::internal_fds::{alarm, is_tight, set_alarm, set_tight};
    if fd >= alarm() {
        // Ours may have become fewer since.
        set_alarm();
        set_tight(fd >= alarm());
    } else if is_tight() && fd < alarm() / 4 * 3 {
        set_tight(false);
    }
}
