//! Connections to other hosts: finds libsmc-rdma.so, hands connections to its service, and hears what becomes of them.
//!
//! The library is looked for beside this one, then where the loader looks, at the first connection whose peer is listed,
//! or the first socket that is to tell its peer that it speaks SMC ([`offer`]); a process without such a one never does. It
//! is loaded once and stays. A child of a fork starts a service of its own when it needs one.
//!
//! The service's thread calls back with no lock of its own held, and holds none of ours.

use crate::fd_table::{self, Kind, Ref};
use engine::config::config;
use engine::internal_fds;
use engine::option;
use engine::reason::Reason;
use engine::remote::{ABI, Conn, Host, START, Service, Start};
use engine::section;
use libc::c_void;
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// Its name, beside this library or on the loader's way.
const NAME: &str = "libsmc-rdma.so";
/// What cargo calls it.
const BUILT_AS: &str = "libsmc_rdma.so";
/// How long the end of a process waits for what it has sent.
const DRAIN_MS: u32 = 5_000;

static SERVICE: AtomicPtr<Service> = AtomicPtr::new(std::ptr::null_mut());
static LOADING: AtomicU32 = AtomicU32::new(0);
/// 1: there is none to be had.
static MISSING: AtomicU32 = AtomicU32::new(0);

/// When the library starts: who is to be asked.
pub fn start() {
    if !config().peers.is_empty() {
        engine::conn::remote::serve_with(serve);
    }
}

fn service() -> Option<&'static Service> {
    // ORDERING [remote.service] Acquire; pairs with the Release in `found`. Carries: the table and the library.
    let p = SERVICE.load(Acquire);
    // SAFETY: null, or a table that the library never changes or frees.
    unsafe { p.as_ref() }
}

/// Numbers of listeners that were offered, a bit each; those above are not.
static OFFERED: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

/// Before `fd` listens: its clients are to hear that it speaks SMC.
pub fn offer_listener(fd: i32) {
    if let Some(word) = usize::try_from(fd / 64).ok().and_then(|at| OFFERED.get(at))
        && offer(fd)
    {
        // Relaxed: of two threads, one that is told of the number by the other.
        word.fetch_or(1 << (fd % 64), Relaxed);
    }
}

/// From now on connections of listeners may come to who does not ask for the promise: none is made until somebody asks
/// again. `exec`: those only that an exec leaves open. A number may be another socket's by now, to which it says nothing.
pub fn withdraw(exec: bool) {
    for (at, word) in (0..).zip(&OFFERED) {
        let bits = word.load(Relaxed);
        let numbers = (0..64).filter(|n| bits & 1 << n != 0).map(|n| at * 64 + n);
        numbers.filter(|fd| !exec || crate::hooks::process::kept(*fd)).for_each(option::withdraw);
    }
}

/// A new connection: whether its peer may have been promised SMC, also by another process that its listener was made in. A
/// process that makes no connections of ours, as in a sandbox, does not ask.
pub fn look(fd: i32) {
    if !crate::hook::disabled() && option::look(fd) {
        engine::conn::remote::serve_with(serve);
    }
}

/// After [`look`], and when it should be in the table: one that is not there, for its number or for want of memory, keeps
/// the promise all the same.
pub fn look_again(fd: i32, accepted: bool) {
    if option::is_in_use() && !crate::hook::disabled() && fd_table::stream(fd).is_none() {
        let why = if fd <= 2 { Reason::LowFd } else { Reason::NoMemory };
        engine::conn::remote::decline_unknown(fd, accepted, why);
    }
}

/// Before `fd` is connected, or listens: its peer is to hear that it speaks SMC, if there is somebody to say so
/// (`smc bpf attach`), and if it does. False: it will not.
///
/// TCP Fast Open sends the program's bytes before it is known whether the peer speaks SMC.
pub fn offer(fd: i32) -> bool {
    const TCP_FASTOPEN_CONNECT: i32 = 30;
    let out = || config().leaves_out(engine::report::program());
    if fd <= 2 || crate::hook::disabled() || MISSING.load(Relaxed) != 0 || out() {
        return false;
    }
    if !option::offer(fd) {
        return false;
    }
    let errno = crate::hook::errno();
    let mut fast = [0; 4];
    let _ = engine::sys::getsockopt(fd, libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &mut fast);
    let ready = fast == [0; 4] && service().or_else(found).is_some_and(|s| (s.ready)() != 0);
    if !ready {
        option::withdraw(fd);
    }
    crate::hook::set_errno(errno);
    ready
}

/// Hands a connection to the service.
fn serve(conn: &Conn) -> Result<(), Reason> {
    let service = service().or_else(found).ok_or(Reason::NoRdma)?;
    match (service.serve)(conn) {
        0 => Ok(()),
        code => Err(Reason::try_from(code).unwrap_or(Reason::NoRdma)),
    }
}

/// Loads the library, unless that was tried before.
#[cold]
fn found() -> Option<&'static Service> {
    let _g = engine::lock::lock(&LOADING);
    if let Some(s) = service() {
        return Some(s);
    }
    if MISSING.load(Relaxed) != 0 {
        return None;
    }
    let Some(found) = load() else {
        MISSING.store(1, Relaxed);
        return None;
    };
    // ORDERING [remote.service] Release; pairs with the Acquire in `service`.
    SERVICE.store(std::ptr::from_ref(found).cast_mut(), Release);
    Some(found)
}

fn load() -> Option<&'static Service> {
    let library = candidates().iter().find_map(|name| {
        // SAFETY: a name that ends with a zero. The library's constructors are libibverbs', which start nothing.
        let p =
            unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE) };
        (!p.is_null()).then_some(p)
    });
    // SAFETY: the program is not to find our failures there.
    unsafe { libc::dlerror() };
    // SAFETY: a library that stays loaded, and a name that ends with a zero.
    let start = unsafe { libc::dlsym(library?, START.as_ptr()) };
    if start.is_null() {
        // SAFETY: as above.
        unsafe { libc::dlerror() };
        return None;
    }
    // SAFETY: libsmc-rdma.so's function of that name has this type; which version it is it says itself.
    let start: Start = unsafe { std::mem::transmute(start) };
    // SAFETY: null, or a table that is valid for ever.
    let service = unsafe { start(&HOST.get_or_init(host).0).as_ref() }?;
    (service.abi == ABI).then_some(service)
}

/// Where the library may be.
fn candidates() -> Vec<CString> {
    let here = own_folder().unwrap_or_default();
    [NAME, BUILT_AS]
        .iter()
        .map(|n| format!("{here}{n}"))
        .chain([NAME.to_string()])
        .filter_map(|n| CString::new(n).ok())
        .collect()
}

/// The folder that this library was loaded from, with the slash.
fn own_folder() -> Option<String> {
    // SAFETY: pointers, for which zeros are values.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: an address of this library, and a place for the answer.
    if unsafe { libc::dladdr(own_folder as *const c_void, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own string, which lives as long as this library.
    let path = unsafe { CStr::from_ptr(info.dli_fname) }.to_str().ok()?;
    Some(path.get(..=path.rfind('/')?)?.to_string())
}

/// The table, and the pointers in it that make it no `Sync` by itself.
struct Table(Host);

// SAFETY: functions, and a pointer to bytes that nobody changes.
unsafe impl Sync for Table {}
// SAFETY: as above.
unsafe impl Send for Table {}

static HOST: engine::once::Once<Table> = engine::once::Once::new();

fn host() -> Table {
    let eids: Vec<u8> = config().eids.iter().flat_map(|e| e.0).collect();
    let eids: &'static [u8] = eids.leak();
    Table(Host {
        abi: ABI,
        eids_len: eids.len() as u32,
        eids: eids.as_ptr(),
        own,
        disown,
        says,
        attend,
        release,
    })
}

extern "C" fn own(fd: i32) {
    internal_fds::add_unshared(fd);
}

extern "C" fn disown(fd: i32) {
    internal_fds::remove(fd);
}

/// The connection of that cookie, and a number of it: `fd`, unless the program has made it another's.
fn named(fd: i32, cookie: u64) -> Option<(Ref, i32)> {
    let is = |r: &Ref| r.sock.slot().is_some_and(|s| s.cookie.load(Relaxed) == cookie);
    if let Some(r) = fd_table::stream(fd).filter(is) {
        return Some((r, fd));
    }
    let mut found = None;
    fd_table::each(Kind::Stream, |r| {
        if found.is_none() && is(r) {
            found = Some(r.clone());
        }
    });
    let r = found?;
    let fd = fd_table::number_of(r.id(), fd)?;
    Some((r, fd))
}

extern "C" fn says(fd: i32, cookie: u64, what: u32, value: u32) {
    if let Some((r, fd)) = named(fd, cookie) {
        r.sock.service_says(r.sock.fd_now(fd), what, value);
        resync(&r, fd);
    }
}

extern "C" fn attend(fd: i32, cookie: u64) {
    if let Some((r, fd)) = named(fd, cookie) {
        r.sock.attend(r.sock.fd_now(fd));
        resync(&r, fd);
    }
}

fn resync(r: &Ref, fd: i32) {
    if r.sock.take_changed() {
        crate::hooks::epoll::resync(r, fd);
    }
}

extern "C" fn release(hold: usize) {
    // SAFETY: what the service was given by `Conn::hold`, and gives back once.
    unsafe { engine::conn::remote::release(hold) };
}

/// Before the end of the process image, when all connections were let go of: waits for what the service has to send.
pub fn drain() {
    if let Some(s) = service() {
        let n = section::open();
        (s.drain)(DRAIN_MS);
        section::close(n);
    }
}

/// In a forked child: the service and what it has are the parent's.
pub fn after_fork_child() {
    LOADING.store(0, Relaxed);
    internal_fds::close_unshared();
    if let Some(s) = service() {
        (s.forked)();
    }
}
