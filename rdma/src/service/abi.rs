//! What libsmc.so calls, what it is told, and the kernel's calls that must not lead back into its hooks.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use smc::once::Once;
use smc::rawsys::syscall6;
use smc::reason::Reason;
use smc::remote::{self, Conn, Host};
use smc::sys;
use smc::wire::smcr::Eid;

use crate::device;

use super::conn::Note;
use super::greeting::Common;
use super::page::Page;
use super::{Service, tcp};

/// The thread's stack.
const STACK: usize = 512 << 10;

/// libsmc.so.
struct HostTable(Host);

// SAFETY: functions, and a pointer to bytes that nobody changes.
unsafe impl Send for HostTable {}
// SAFETY: as above.
unsafe impl Sync for HostTable {}

static HOST: OnceLock<HostTable> = OnceLock::new();
/// The service of this process; null in one that was forked from its, until it needs its own.
static SERVICE: AtomicPtr<Service> = AtomicPtr::new(std::ptr::null_mut());
/// Held while it is started.
static STARTING: AtomicU32 = AtomicU32::new(0);
static TABLE: Once<remote::Service> = Once::new();

/// Tells what this library offers; null: it is of another version than who asks.
///
/// # Safety
/// `host` is null, or a table that stays valid for ever.
// SAFETY: no other symbol of this name is linked: it is the library's own prefix.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn smc_rdma_start(host: *const Host) -> *const remote::Service {
    // SAFETY: as the caller vouches.
    let Some(host) = (unsafe { host.as_ref() }).filter(|h| h.abi == remote::ABI) else {
        return std::ptr::null();
    };
    let _ = HOST.set(HostTable(*host));
    TABLE.get_or_init(|| remote::Service { abi: remote::ABI, serve, ready, drain, forked })
}

fn host() -> Option<&'static Host> {
    HOST.get().map(|h| &h.0)
}

fn running() -> Option<&'static Service> {
    let p = SERVICE.load(Ordering::Acquire);
    // SAFETY: null, or a service that is never freed.
    unsafe { p.as_ref() }
}

/// The service, started if it does not run. `promised`: also to decline.
fn service(promised: bool) -> Option<&'static Service> {
    if let Some(s) = running() {
        return Some(s);
    }
    // Threads may bring their first connections at once.
    let _g = smc::lock::lock(&STARTING);
    if let Some(s) = running() {
        return Some(s);
    }
    let host = host()?;
    // SAFETY: as libsmc.so has it: so many bytes, valid for ever.
    let bytes = unsafe { std::slice::from_raw_parts(host.eids, host.eids_len as usize) };
    let eids = bytes.chunks_exact(Eid::LEN).filter_map(|e| e.try_into().ok().map(Eid)).collect();
    let [a, b, ..] = sys::random_u32().to_ne_bytes();
    let made = Arc::into_raw(Service::start(Common { eids, salt: [a, b] }, promised)?).cast_mut();
    SERVICE.store(made, Ordering::Release);
    running()
}

extern "C" fn serve(conn: *const Conn) -> u32 {
    // SAFETY: libsmc.so's own, valid over the call.
    let Some(conn) = (unsafe { conn.as_ref() }) else { return Reason::Internal as u32 };
    let Some(service) = service(conn.promised != 0) else { return Reason::NoRdma as u32 };
    // SAFETY: page and rings are kept by `hold`, which is given back when the connection is gone.
    let page = unsafe { Page::new(*conn) };
    service.serve(page).map_or_else(|why| why as u32, |()| 0)
}

/// Asked once in a process, for each connection asks.
extern "C" fn ready() -> u32 {
    static FOUND: OnceLock<bool> = OnceLock::new();
    (*FOUND.get_or_init(|| device::names().is_ok_and(|n| !n.is_empty()))).into()
}

extern "C" fn drain(ms: u32) {
    if let Some(s) = running() {
        s.drain(Duration::from_millis(ms.into()));
    }
}

extern "C" fn forked() {
    // The parent's thread may have been anywhere: nothing of it is touched, and its memory is not freed.
    SERVICE.store(std::ptr::null_mut(), Ordering::Release);
    STARTING.store(0, Ordering::Relaxed);
}

/// Starts the thread, which takes no signal of the program's.
pub(super) fn spawn(service: &Arc<Service>) -> bool {
    let service = service.clone();
    let (all, mut old) = (!0u64, 0u64);
    let mask = |how: i32, new: &u64, old: *mut u64| {
        // SAFETY: two masks of eight bytes.
        unsafe {
            syscall6(
                libc::SYS_rt_sigprocmask,
                how as usize,
                new as *const u64 as usize,
                old as usize,
                8,
                0,
                0,
            )
        };
    };
    mask(libc::SIG_SETMASK, &all, &raw mut old);
    let made =
        std::thread::Builder::new().name("smc-rdma".into()).stack_size(STACK).spawn(move || service.run());
    mask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
    made.is_ok()
}

/// A descriptor is ours.
pub(super) fn own(fd: i32) {
    if let Some(h) = host() {
        (h.own)(fd);
    }
}

/// A descriptor is about to be closed, and its number anybody's.
pub(super) fn disown(fd: i32) {
    if let Some(h) = host() {
        (h.disown)(fd);
    }
}

/// Closes a descriptor of ours.
pub(crate) fn close(fd: i32) {
    disown(fd);
    sys::close(fd);
}

/// See [`Note`].
pub(super) fn tell(fd: i32, cookie: u64, note: Note) {
    let Some(h) = host() else { return };
    match note {
        Note::Says(what, value) => (h.says)(fd, cookie, what, value),
        Note::Attend => (h.attend)(fd, cookie),
        Note::Reset(tcp) => {
            tcp::reset(tcp);
            close(tcp);
        }
    }
}

/// What kept a connection's memory is not used any more.
pub(super) fn release(hold: usize) {
    if let Some(h) = host() {
        (h.release)(hold);
    }
}

/// An epoll set, and what wakes who sleeps on it; numbered high.
pub(super) fn descriptors() -> Option<(i32, i32)> {
    // SAFETY: no pointers.
    let set =
        unsafe { syscall6(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC as usize, 0, 0, 0, 0, 0) } as i32;
    let flags = (libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) as usize;
    // SAFETY: no pointers.
    let wake = unsafe { syscall6(libc::SYS_eventfd2, 0, flags, 0, 0, 0, 0) } as i32;
    let [set, wake] = [set, wake].map(high);
    (set >= 0 && wake >= 0).then_some((set, wake))
}

fn high(fd: i32) -> i32 {
    if fd < 0 {
        return fd;
    }
    let n = sys::dup_high(fd);
    sys::close(fd);
    if n >= 0 {
        own(n);
    }
    n
}

/// Each new thing that `fd` has to say is an event with that data.
pub(super) fn watch(set: i32, fd: i32, data: u64) {
    let events = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLOUT | libc::EPOLLET) as u32;
    sys::epoll_ctl(set, libc::EPOLL_CTL_ADD, fd, events, data);
}

/// Sleeps so many milliseconds, or until there is an event; -1: for ever.
pub(super) fn wait(set: i32, events: &mut [libc::epoll_event], ms: i32) -> usize {
    // SAFETY: a list of as many entries as are told.
    let n = unsafe {
        syscall6(
            libc::SYS_epoll_pwait,
            set as usize,
            events.as_mut_ptr() as usize,
            events.len(),
            ms as usize,
            0,
            8,
        )
    };
    usize::try_from(n).unwrap_or(0)
}

/// Wakes who sleeps.
pub(super) fn wake(fd: i32) {
    let one = 1u64;
    // SAFETY: eight bytes.
    unsafe { syscall6(libc::SYS_write, fd as usize, &raw const one as usize, 8, 0, 0, 0) };
}

/// Who was woken takes note.
pub(super) fn slept(fd: i32) {
    let mut n = 0u64;
    // SAFETY: eight bytes.
    unsafe { syscall6(libc::SYS_read, fd as usize, &raw mut n as usize, 8, 0, 0, 0) };
}
