//! A library to preload before libsmc.so: the system calls that libsmc.so itself makes may fail from then on.
//!
//!     LD_PRELOAD="libfaults.so libsmc.so" SMC_FAULTS=NAME program
//!
//! A seccomp filter looks at the place a call is made from: those within libsmc.so's code, and of them the kinds in
//! [`CALLS`], are put before whoever listens on the abstract Unix socket NAME (`tests/chaos/faults.rs`). The program's
//! own calls are made from libc's code, and go on as ever. Nothing here is libsmc's, and nothing is done without
//! SMC_FAULTS.

// The constructor runs before main, and there is nobody else to tell.
#![allow(clippy::print_stderr)]

use std::{
    env, fs,
    io::{self, Read, Write},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixStream},
    },
};

/// What may fail. Not among them: what the kernel never refuses, and what needs no leave of it.
const CALLS: [i64; 24] = [
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_mmap,
    libc::SYS_madvise,
    libc::SYS_eventfd2,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_epoll_ctl,
    libc::SYS_futex,
    libc::SYS_ppoll,
    libc::SYS_fcntl,
    libc::SYS_pidfd_open,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_getrandom,
    libc::SYS_kcmp,
];

#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    let Ok(name) = env::var("SMC_FAULTS") else { return };
    if let Err(e) = install(&name) {
        eprintln!("faults: {e}");
        std::process::exit(99);
    }
}

/// Made from here, and not by libc: libsmc.so would take it for a sandbox that the program enters.
fn syscall(nr: i64, a: usize, b: usize, c: usize) -> io::Result<usize> {
    // SAFETY: prctl, seccomp and close; what the arguments point to is the caller's.
    let r = unsafe { smc::rawsys::syscall6(nr, a, b, c, 0, 0, 0) };
    smc::rawsys::check(r).map_err(io::Error::from_raw_os_error)
}

/// Where libsmc.so's code lies.
fn code() -> io::Result<Option<(u64, u64)>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|l| l.ends_with("/libsmc.so") && l.contains(" r-xp "));
    let range = line.and_then(|l| l.split_once(' ')?.0.split_once('-'));
    let hex = |s: &str| u64::from_str_radix(s, 16).map_err(io::Error::other);
    range.map(|(from, to)| Ok((hex(from)?, hex(to)?))).transpose()
}

fn install(name: &str) -> io::Result<()> {
    // Not preloaded, or a code that a filter of 32 bits can't tell: one in four thousand loads.
    let Some((from, to)) = code()?.filter(|(from, to)| from >> 32 == to >> 32) else { return Ok(()) };
    let mut told = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    let op = |code: u32, jt: usize, jf: usize, k: u32| libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const NOT_BELOW: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let n = CALLS.len();
    // struct seccomp_data: nr 0, arch 4, instruction_pointer 8 (low word first). A jump counts from the next op;
    // behind the calls stand "allow" and "ask".
    let mut filter = vec![
        op(LOAD, 0, 0, 12),
        op(EQUAL, 0, n + 4, (from >> 32) as u32),
        op(LOAD, 0, 0, 8),
        op(NOT_BELOW, 0, n + 2, from as u32),
        op(NOT_BELOW, n + 1, 0, to as u32),
        op(LOAD, 0, 0, 0),
    ];
    filter.extend(CALLS.iter().enumerate().map(|(i, nr)| op(EQUAL, n - i, 0, *nr as u32)));
    filter.push(op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    filter.push(op(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    syscall(libc::SYS_prctl, libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0)?;
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let set = libc::SECCOMP_SET_MODE_FILTER as usize;
    let listener = match syscall(libc::SYS_seccomp, set, flags as usize, (&raw const program).addr()) {
        // After an exec: who listens to the first filter hears of this one's calls only where it lies as before.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
        r => r?,
    };
    // Who listens takes the descriptor out of this process, and says when he has.
    let r = told.write_all(&(listener as u32).to_ne_bytes()).and_then(|()| told.read_exact(&mut [0]));
    syscall(libc::SYS_close, listener, 0, 0)?;
    r
}
