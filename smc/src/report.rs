//! What a process tells at its end (`SMC_STATS`) or along the way (`SMC_LOG`, `SMC_REQUIRE`).
//!
//! Lines go to standard error, and only as long as descriptor 2 is that: a server of inetd(8) has its connection
//! there, and a daemon that has closed it gets the number for a file of its own (`is_for_people`).

use crate::arena::Slot;
use crate::config::config;
use crate::conn::Totals;
use crate::once::Once;
use crate::reason::Reason;
use crate::sync::{AtomicU64, Ordering::*};
use std::fmt::Write;

static PROGRAM: Once<Vec<u8>> = Once::new();

/// This program's name, as in `/proc/self/comm` but whole.
pub fn program() -> &'static [u8] {
    PROGRAM.get_or_init(|| {
        let path = crate::sys::exe_path();
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or(&[]);
        name.to_vec()
    })
}

/// Places in [`Sums::bytes`]: sent, and received behind it.
const SHM: usize = 0;
const RDMA: usize = 2;
const TCP: usize = 4;

const REASONS: usize = Reason::ALL.len();

/// Sums over the connections that have ended in this process.
#[derive(Debug)]
pub struct Sums {
    shm: AtomicU64,
    rdma: AtomicU64,
    tcp: AtomicU64,
    fallback: [AtomicU64; REASONS],
    /// shm_tx, shm_rx, rdma_tx, rdma_rx, tcp_tx, tcp_rx.
    bytes: [AtomicU64; 6],
    polled: AtomicU64,
    slept: AtomicU64,
    doorbells: AtomicU64,
    upgrades: AtomicU64,
    downgrades: AtomicU64,
}

impl Sums {
    /// All zero.
    pub const fn new() -> Self {
        Sums {
            shm: AtomicU64::new(0),
            rdma: AtomicU64::new(0),
            tcp: AtomicU64::new(0),
            fallback: [const { AtomicU64::new(0) }; REASONS],
            bytes: [const { AtomicU64::new(0) }; 6],
            polled: AtomicU64::new(0),
            slept: AtomicU64::new(0),
            doorbells: AtomicU64::new(0),
            upgrades: AtomicU64::new(0),
            downgrades: AtomicU64::new(0),
        }
    }

    /// Adds a connection.
    pub fn add(&self, t: &Totals) {
        let (count, ring) = match t.best {
            0 => (&self.tcp, TCP),
            1 => (&self.shm, SHM),
            _ => (&self.rdma, RDMA),
        };
        count.fetch_add(1, Relaxed);
        if (t.best == 0 || t.downgrades > 0)
            && let Ok(r) = Reason::try_from(t.reason)
            && let Some(i) = Reason::ALL.iter().position(|x| *x == r)
        {
            self.fallback[i].fetch_add(1, Relaxed);
        }
        // What was written into a ring and went by TCP after all counts there.
        let at = [ring, ring + 1, TCP, TCP + 1];
        for (i, n) in at.into_iter().zip(t.bytes) {
            if let Some(sum) = self.bytes.get(i) {
                sum.fetch_add(n, Relaxed);
            }
        }
        self.polled.fetch_add(t.polled, Relaxed);
        self.slept.fetch_add(t.slept, Relaxed);
        self.doorbells.fetch_add(t.doorbells, Relaxed);
        self.upgrades.fetch_add(t.upgrades.into(), Relaxed);
        self.downgrades.fetch_add(t.downgrades.into(), Relaxed);
    }

    /// Adds what another has.
    pub fn merge(&self, o: &Sums) {
        let pairs = [
            (&self.shm, &o.shm),
            (&self.rdma, &o.rdma),
            (&self.tcp, &o.tcp),
            (&self.polled, &o.polled),
            (&self.slept, &o.slept),
            (&self.doorbells, &o.doorbells),
            (&self.upgrades, &o.upgrades),
            (&self.downgrades, &o.downgrades),
        ];
        for (a, b) in pairs
            .into_iter()
            .chain(self.fallback.iter().zip(&o.fallback))
            .chain(self.bytes.iter().zip(&o.bytes))
        {
            a.fetch_add(b.load(Relaxed), Relaxed);
        }
    }

    /// Forgets everything: a forked child counts for itself.
    pub fn clear(&self) {
        let all = [
            &self.shm,
            &self.rdma,
            &self.tcp,
            &self.polled,
            &self.slept,
            &self.doorbells,
            &self.upgrades,
            &self.downgrades,
        ];
        for a in all.into_iter().chain(&self.fallback).chain(&self.bytes) {
            a.store(0, Relaxed);
        }
    }

    /// The JSON of `SMC_STATS`.
    pub fn json(&self) -> String {
        let mut s = String::with_capacity(512);
        let g = |a: &AtomicU64| a.load(Relaxed);
        let name: String = String::from_utf8_lossy(program())
            .chars()
            .filter(|c| !c.is_control() && *c != '"' && *c != '\\')
            .collect();
        let _ = write!(
            s,
            "{{\"pid\":{},\"program\":\"{}\",\"connections\":{{\"shm\":{},\"rdma\":{},\"tcp\":{}}},\"fallback\":{{",
            crate::sys::getpid(),
            name,
            g(&self.shm),
            g(&self.rdma),
            g(&self.tcp)
        );
        let mut first = true;
        for (r, n) in Reason::ALL.iter().zip(&self.fallback) {
            if g(n) != 0 {
                let _ = write!(s, "{}\"{}\":{}", if first { "" } else { "," }, r.name(), g(n));
                first = false;
            }
        }
        let b = &self.bytes;
        let _ = writeln!(
            s,
            "}},\"bytes\":{{\"shm_tx\":{},\"shm_rx\":{},\"rdma_tx\":{},\"rdma_rx\":{},\"tcp_tx\":{},\"tcp_rx\":{}}},\
             \"wakeups\":{{\"polled\":{},\"slept\":{},\"doorbells\":{}}},\"upgrades\":{},\"downgrades\":{}}}",
            g(&b[0]),
            g(&b[1]),
            g(&b[2]),
            g(&b[3]),
            g(&b[4]),
            g(&b[5]),
            g(&self.polled),
            g(&self.slept),
            g(&self.doorbells),
            g(&self.upgrades),
            g(&self.downgrades)
        );
        s
    }
}

impl Default for Sums {
    fn default() -> Self {
        Self::new()
    }
}

/// Functions that are called when something becomes of a connection, for who watches them from outside: the shim's, which
/// do nothing. Ports are in the host's byte order. Called under locks of the connection's.
#[derive(Clone, Copy, Debug)]
pub struct Probes {
    /// Local port, peer's port, bytes in a ring.
    pub upgraded: extern "C" fn(u32, u32, u32),
    /// Local port, peer's port, the code of the reason, or 0: a direction goes back to TCP.
    pub downgraded: extern "C" fn(u32, u32, u32),
    /// Local port, peer's port, the code of the reason: it stays on TCP.
    pub fallback: extern "C" fn(u32, u32, u32),
}

static PROBES: Once<Probes> = Once::new();

/// Names the functions. The first call counts.
pub fn set_probes(probes: Probes) {
    let _ = PROBES.set(probes);
}

/// A connection is in the ring, for the first time.
#[cold]
pub fn probe_upgraded(s: &Slot) {
    if let Some(p) = PROBES.get() {
        (p.upgraded)(s.local_port.load(Relaxed), s.peer_port.load(Relaxed), s.ring_size.load(Relaxed));
    }
}

/// One of its directions goes back to TCP.
#[cold]
pub fn probe_downgraded(s: &Slot) {
    if let Some(p) = PROBES.get() {
        (p.downgraded)(s.local_port.load(Relaxed), s.peer_port.load(Relaxed), s.reason.load(Relaxed));
    }
}

/// A candidate stays on TCP, or went back.
#[cold]
pub fn log_fallback(s: &Slot, why: Reason) {
    if let Some(p) = PROBES.get() {
        (p.fallback)(s.local_port.load(Relaxed), s.peer_port.load(Relaxed), why.code());
    }
    let c = config();
    if !c.log && !c.require {
        return;
    }
    let line = format!(
        "libsmc: {}[{}]: port {} <-> {}: TCP ({}): {}\n",
        String::from_utf8_lossy(program()),
        crate::sys::getpid(),
        s.local_port.load(Relaxed),
        s.peer_port.load(Relaxed),
        why.name(),
        why.explain()
    );
    say(line.as_bytes());
}

/// A line for the person who runs the program: on standard error, or nowhere.
pub fn say(line: &[u8]) {
    if is_for_people() {
        crate::sys::write_stderr(line);
    }
}

/// Whether descriptor 2 is where a line can do no harm: a terminal, a pipe, a log. Not so a connection (what we write
/// would be in the middle of what the program says to its peer) and a file that is read as well: somebody's data. A Unix
/// socket may be either: that of a service manager's journal is not standard input too, that of a connection is.
fn is_for_people() -> bool {
    match option(2, libc::SO_DOMAIN) {
        Some(family) if family == libc::AF_UNIX as u64 => {
            option(2, libc::SO_COOKIE) != option(0, libc::SO_COOKIE)
        }
        Some(_) => false,
        None => {
            !crate::sys::is_file(2)
                || crate::sys::getfl(2) & libc::O_ACCMODE as isize == libc::O_WRONLY as isize
        }
    }
}

/// A socket option of four or eight bytes; `None` for what is no socket.
fn option(fd: i32, name: i32) -> Option<u64> {
    let mut value = [0; 8];
    crate::sys::getsockopt(fd, libc::SOL_SOCKET, name, &mut value).ok()?;
    Some(u64::from_ne_bytes(value))
}
