//! System calls that fail: whoever preloads the example `faults` beside libsmc.so asks here before each call that
//! libsmc.so makes for itself.
//!
//! A call is answered with an error that Linux may give it, or goes on. Calls on the program's own sockets always go
//! on: their errors are the program's to see, and would be told to it as they should be.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    mem::zeroed,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use crate::harness::Random;

/// Where programs ask, and how often they are refused.
pub struct Faults {
    pub name: String,
    state: Arc<State>,
}

struct State {
    /// Of 10,000 calls.
    rate: AtomicU64,
    asked: AtomicU64,
    injected: Mutex<BTreeMap<String, u64>>,
    /// Since the rate was set last: thread, and what failed.
    last: Mutex<Vec<String>>,
    random: Mutex<Random>,
    failed: Mutex<Option<String>>,
}

impl Faults {
    pub fn listen(seed: u64) -> io::Result<Self> {
        // Several in one process may have been given the same seed.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("smc-chaos-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        let state = Arc::new(State {
            rate: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            injected: Mutex::default(),
            last: Mutex::default(),
            random: Mutex::new(Random::seeded(seed)),
            failed: Mutex::default(),
        });
        let all = Arc::clone(&state);
        thread::spawn(move || {
            for s in listener.incoming().flatten() {
                let state = Arc::clone(&all);
                thread::spawn(move || {
                    if let Err(e) = serve(s, &state) {
                        *state.failed.lock().expect("no panic under it") = Some(e.to_string());
                    }
                });
            }
        });
        Ok(Faults { name, state })
    }

    /// From now on `rate` of 10,000 calls fail.
    pub fn rate(&self, rate: u64) {
        if rate > 0 {
            self.state.last.lock().expect("no panic under it").clear();
        }
        self.state.rate.store(rate, Relaxed);
    }

    /// What has failed since then.
    pub fn last(&self) -> String {
        self.state.last.lock().expect("no panic under it").join("\n")
    }

    /// Calls asked for, and how many failed how.
    pub fn told(&self) -> (u64, BTreeMap<String, u64>) {
        let injected = self.state.injected.lock().expect("no panic under it").clone();
        (self.state.asked.load(Relaxed), injected)
    }

    /// What kept faults from being injected.
    pub fn failed(&self) -> Option<String> {
        self.state.failed.lock().expect("no panic under it").clone()
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is ours.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: opened just now.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

/// A descriptor of another process.
fn taken(process: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is ours.
    match unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: made just now.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

fn option(fd: i32, name: i32) -> io::Result<i32> {
    let (mut v, mut len) = (0i32, 4u32);
    // SAFETY: an int and its length.
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut v).cast(), &raw mut len) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(v) }
}

/// One program, and those forked from it.
fn serve(mut s: UnixStream, state: &State) -> io::Result<()> {
    // SAFETY: plain data.
    let mut cred: libc::ucred = unsafe { zeroed() };
    let mut len = size_of::<libc::ucred>() as u32;
    let p = (&raw mut cred).cast();
    // SAFETY: a ucred and its length.
    unsafe { libc::getsockopt(s.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, p, &raw mut len) };
    let mut number = [0; 4];
    // One that was killed meanwhile asks no more.
    if s.read_exact(&mut number).is_err() {
        return Ok(());
    }
    let asking = match pidfd(cred.pid).and_then(|p| taken(&p, u32::from_ne_bytes(number) as i32)) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        r => r?,
    };
    let _ = s.write_all(&[1]);
    drop(s);
    loop {
        let mut p = libc::pollfd { fd: asking.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry.
        unsafe { libc::poll(&raw mut p, 1, -1) };
        if p.revents & libc::POLLIN == 0 {
            return Ok(()); // nobody is left to ask
        }
        // SAFETY: plain data, as the kernel wants it.
        let mut call: libc::seccomp_notif = unsafe { zeroed() };
        // SAFETY: a seccomp_notif.
        if unsafe { libc::ioctl(asking.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } < 0 {
            continue; // it was killed meanwhile
        }
        let error = state.draw(&call);
        // SAFETY: plain data.
        let mut answer: libc::seccomp_notif_resp = unsafe { zeroed() };
        answer.id = call.id;
        match error {
            Some(e) => answer.error = -e,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: a seccomp_notif_resp. Whoever was killed meanwhile needs no answer.
        unsafe { libc::ioctl(asking.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    }
}

impl State {
    fn below(&self, n: u64) -> u64 {
        self.random.lock().expect("no panic under it").below(n)
    }

    fn draw(&self, call: &libc::seccomp_notif) -> Option<i32> {
        self.asked.fetch_add(1, Relaxed);
        if self.below(10_000) >= self.rate.load(Relaxed) {
            return None;
        }
        let (what, errors) = errors(call)?;
        let e = errors[self.below(errors.len() as u64) as usize];
        let name =
            format!("{what} {}", io::Error::from_raw_os_error(e).to_string().replace(" (os error", ""));
        let mut last = self.last.lock().expect("no panic under it");
        if last.len() < 200 {
            last.push(format!("{} {name} {:x?}", call.pid, &call.data.args[..4]));
        }
        drop(last);
        *self.injected.lock().expect("no panic under it").entry(name).or_default() += 1;
        Some(e)
    }
}

/// What a descriptor of a process is, where that makes a difference.
#[derive(PartialEq)]
enum Kind {
    /// A Unix socket that is connected, one that is not, netlink.
    Doorbell,
    Unix,
    Netlink,
    Memory,
    /// The program's, or not known: it ended, or the number was closed.
    Other,
}

fn kind(tid: u32, fd: u64) -> Kind {
    let link = std::fs::read_link(format!("/proc/{tid}/fd/{}", fd as i32)).unwrap_or_default();
    let link = link.to_string_lossy();
    if link.starts_with("/memfd:smc") {
        return Kind::Memory;
    }
    if !link.starts_with("socket:") {
        return Kind::Other;
    }
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let process = status.lines().find_map(|l| l.strip_prefix("Tgid:")?.trim().parse().ok());
    let Some(s) = process.and_then(|p| pidfd(p).ok()).and_then(|p| taken(&p, fd as i32).ok()) else {
        return Kind::Other;
    };
    match option(s.as_raw_fd(), libc::SO_DOMAIN) {
        Ok(libc::AF_NETLINK) => Kind::Netlink,
        Ok(libc::AF_UNIX) => {
            let mut p = libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
            // SAFETY: one entry; asks only.
            unsafe { libc::poll(&raw mut p, 1, 0) };
            if p.revents & (libc::POLLOUT | libc::POLLHUP) == libc::POLLOUT {
                Kind::Doorbell
            } else {
                Kind::Unix
            }
        }
        _ => Kind::Other,
    }
}

/// What Linux may answer to this call, when it is short of memory or descriptors, or is disturbed.
fn errors(call: &libc::seccomp_notif) -> Option<(&'static str, &'static [i32])> {
    use libc::{EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC};
    let arg = |i: usize| call.data.args[i];
    let kind = || kind(call.pid, arg(0));
    let of_unix = || [Kind::Doorbell, Kind::Unix, Kind::Netlink].contains(&kind());
    Some(match i64::from(call.data.nr) {
        libc::SYS_memfd_create => ("memfd_create", &[ENOMEM, EMFILE, ENFILE]),
        libc::SYS_ftruncate if kind() == Kind::Memory => ("ftruncate", &[EINTR, ENOMEM]),
        libc::SYS_mmap if arg(4) as i32 >= 0 => ("mmap", &[ENOMEM, EAGAIN]),
        // MADV_REMOVE; others ask what a pointer of the program's is good for.
        libc::SYS_madvise if arg(2) == libc::MADV_REMOVE as u64 => ("madvise", &[ENOMEM, EINTR]),
        libc::SYS_eventfd2 => ("eventfd2", &[EMFILE, ENFILE, ENOMEM]),
        libc::SYS_socket => ("socket", &[EMFILE, ENFILE, ENOBUFS, ENOMEM]),
        libc::SYS_socketpair => ("socketpair", &[EMFILE, ENFILE, ENOMEM]),
        libc::SYS_bind if of_unix() => ("bind", &[ENOMEM]),
        libc::SYS_listen if of_unix() => ("listen", &[ENOMEM]),
        libc::SYS_connect if of_unix() => ("connect", &[EINTR, EAGAIN, ENOMEM]),
        libc::SYS_accept4 if of_unix() => ("accept4", &[EINTR, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM]),
        libc::SYS_sendmsg if of_unix() => ("sendmsg", &[EINTR, EAGAIN, ENOBUFS, ENOMEM]),
        libc::SYS_recvmsg if of_unix() => ("recvmsg", &[EINTR, EAGAIN, ENOMEM]),
        // EAGAIN would mean that a ring is there, which the peer has yet to hear.
        libc::SYS_sendto if of_unix() => ("sendto", &[EINTR, ENOBUFS, ENOMEM]),
        libc::SYS_recvfrom if of_unix() => ("recvfrom", &[EINTR, ENOMEM]),
        libc::SYS_epoll_ctl
            if arg(1) == libc::EPOLL_CTL_ADD as u64 && self::kind(call.pid, arg(2)) == Kind::Doorbell =>
        {
            ("epoll_ctl", &[ENOMEM, ENOSPC])
        }
        libc::SYS_futex if arg(1) & 0x7f == libc::FUTEX_WAIT as u64 => ("futex", &[EINTR, EAGAIN]),
        libc::SYS_ppoll => ("ppoll", &[EINTR]),
        libc::SYS_fcntl if arg(1) == libc::F_DUPFD_CLOEXEC as u64 => ("fcntl", &[EMFILE]),
        libc::SYS_pidfd_open => ("pidfd_open", &[EMFILE, ENFILE, ENOMEM]),
        libc::SYS_openat => ("openat", &[EMFILE, ENFILE, ENOMEM, EINTR]),
        libc::SYS_getrandom => ("getrandom", &[EINTR, EAGAIN]),
        libc::SYS_kcmp => ("kcmp", &[ENOMEM]),
        _ => return None,
    })
}
