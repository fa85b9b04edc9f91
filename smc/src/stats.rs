//! Counters: what connections and processes did, as `smc ss`, `smc stats` and `SMC_STATS` show it.
//!
//! The counters of a live connection are words of its slot in its process's *arena*, a piece of memory; those of
//! connections that are gone are summed in the arena's first page. Nobody is asked and nothing is locked:
//! a reader opens `/proc/PID/fd/N` of a process's arena and reads the words, which the kernel allows for
//! one's own processes, and for all to root. It never maps them: `pread` can't fault, whatever the owner
//! does to the file meanwhile.
//!
//! Numbers of one connection are read without stopping it: they are near each other in time, not at one
//! instant.
//!
//! ```
//! for c in smc::stats::connections()? {
//!     let why = c.reason.map_or("", |r| r.explain());
//!     println!("{} {} sent {} bytes by {} {why}", c.pid, c.program, c.tx_bytes(), c.mode().name());
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

mod json;
mod page;
mod scan;

use std::collections::BTreeMap;
use std::net::SocketAddr;

#[doc(hidden)]
pub use json::escaped;
#[doc(hidden)]
pub use page::{TOTALS_OFFSET, TotalsPage};
pub use scan::{connections, process, processes};

use crate::reason::Reason;
use json::Object;

/// Which end of the TCP connection a process has.
///
/// ```
/// use smc::stats::Role;
///
/// let servers = smc::stats::connections()?.iter().filter(|c| c.role == Role::Accept).count();
/// # println!("{servers}");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It called `connect`.
    Connect,
    /// It called `accept`.
    Accept,
}

impl Role {
    /// As JSON has it.
    ///
    /// ```
    /// assert_eq!(smc::stats::Role::Accept.name(), "accept");
    /// ```
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Accept => "accept",
        }
    }
}

/// By which way bytes go. The better is the greater.
///
/// ```
/// use smc::stats::Mode;
///
/// assert!(Mode::Shm > Mode::Tcp);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// The kernel's TCP.
    Tcp,
    /// Memory shared with a process of this host.
    Shm,
    /// RDMA to another host.
    Rdma,
}

impl Mode {
    /// As `smc ss` and JSON have it.
    ///
    /// ```
    /// assert_eq!(smc::stats::Mode::Shm.name(), "SHM");
    /// ```
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Shm => "SHM",
            Self::Rdma => "RDMA",
        }
    }
}

/// One end of a connection, as [`connections`] found it.
///
/// ```
/// use smc::stats::ConnectionInfo;
///
/// fn is_slow(c: &ConnectionInfo) -> bool {
///     c.upgrades > 0 && c.mode_tx == smc::stats::Mode::Tcp && !c.peer_closed
/// }
/// # println!("{}", smc::stats::connections()?.iter().filter(|c| is_slow(c)).count());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// A process that holds this end.
    pub pid: u32,
    /// Its name.
    pub program: String,
    /// Process at the other end, once upgraded.
    pub peer_pid: Option<u32>,
    /// Own address; `None`: not known yet.
    pub local: Option<SocketAddr>,
    /// The other end's address.
    pub peer: Option<SocketAddr>,
    /// Which end this is.
    pub role: Role,
    /// Way of what is sent now.
    pub mode_tx: Mode,
    /// Way of what is received now.
    pub mode_rx: Mode,
    /// The best mode it ever reached.
    pub best: Mode,
    /// Why it is on TCP, if it is known.
    pub reason: Option<Reason>,
    /// Bytes sent by shared memory or RDMA.
    pub tx_bytes_ring: u64,
    /// Bytes received by shared memory or RDMA.
    pub rx_bytes_ring: u64,
    /// Bytes sent by TCP.
    pub tx_bytes_tcp: u64,
    /// Bytes received by TCP.
    pub rx_bytes_tcp: u64,
    /// Calls that sent by the ring.
    pub tx_msgs: u64,
    /// Calls that received from the ring.
    pub rx_msgs: u64,
    /// Size of a ring, 0 while there is none.
    pub ring_size: u32,
    /// Waits that ended by polling.
    pub polls: u64,
    /// Waits that slept.
    pub sleeps: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Upgrades that completed in at least one direction.
    pub upgrades: u32,
    /// Ways back to TCP.
    pub downgrades: u32,
    /// Processes that share this end since a fork.
    pub holders: u32,
    /// The peer has closed its end, or is gone.
    pub peer_closed: bool,
    /// The process it belongs to is gone; a relative still keeps the memory.
    pub stale: bool,
}

impl ConnectionInfo {
    /// A connection of this process, as it is now.
    #[cfg(not(smc_loom))]
    pub(crate) fn of(slot: &crate::arena::Slot) -> Self {
        scan::of(slot)
    }

    /// The better of its two directions.
    ///
    /// ```
    /// # fn example(c: &smc::stats::ConnectionInfo) {
    /// println!("{} (sends by {}, receives by {})", c.mode().name(), c.mode_tx.name(), c.mode_rx.name());
    /// # }
    /// ```
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode_tx.max(self.mode_rx)
    }

    /// Bytes sent by any way.
    ///
    /// ```
    /// # fn example(c: &smc::stats::ConnectionInfo) {
    /// assert_eq!(c.tx_bytes(), c.tx_bytes_ring + c.tx_bytes_tcp);
    /// # }
    /// ```
    #[must_use]
    pub fn tx_bytes(&self) -> u64 {
        self.tx_bytes_ring.saturating_add(self.tx_bytes_tcp)
    }

    /// Bytes received by any way.
    ///
    /// ```
    /// # fn example(c: &smc::stats::ConnectionInfo) {
    /// assert_eq!(c.rx_bytes(), c.rx_bytes_ring + c.rx_bytes_tcp);
    /// # }
    /// ```
    #[must_use]
    pub fn rx_bytes(&self) -> u64 {
        self.rx_bytes_ring.saturating_add(self.rx_bytes_tcp)
    }

    /// One JSON object, on one line; the schema is in `docs/STATISTICS.md`.
    ///
    /// ```
    /// for c in smc::stats::connections()? {
    ///     println!("{}", c.json());
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn json(&self) -> String {
        let ring = |mode: Mode, tx: bool| match (self.best == mode, tx) {
            (false, _) => 0,
            (true, true) => self.tx_bytes_ring,
            (true, false) => self.rx_bytes_ring,
        };
        let mut bytes = Object::new();
        bytes.number("shm_tx", ring(Mode::Shm, true)).number("shm_rx", ring(Mode::Shm, false));
        bytes.number("rdma_tx", ring(Mode::Rdma, true)).number("rdma_rx", ring(Mode::Rdma, false));
        bytes.number("tcp_tx", self.tx_bytes_tcp).number("tcp_rx", self.rx_bytes_tcp);
        let mut messages = Object::new();
        messages.number("tx", self.tx_msgs).number("rx", self.rx_msgs);
        let mut wakeups = Object::new();
        wakeups.number("polled", self.polls).number("slept", self.sleeps).number("doorbells", self.doorbells);
        let mut o = Object::new();
        o.number("pid", self.pid.into()).text("program", &self.program);
        o.maybe_number("peer_pid", self.peer_pid.map(u64::from));
        o.maybe_text("local", self.local.map(|a| a.to_string()).as_deref());
        o.maybe_text("peer", self.peer.map(|a| a.to_string()).as_deref());
        o.text("role", self.role.name()).text("mode", self.mode().name());
        o.text("mode_tx", self.mode_tx.name()).text("mode_rx", self.mode_rx.name());
        o.text("best", self.best.name());
        o.maybe_text("reason", self.reason.map(Reason::name));
        o.maybe_number("reason_code", self.reason.map(|r| r.code().into()));
        o.object("bytes", bytes).object("messages", messages).object("wakeups", wakeups);
        o.number("ring_size", self.ring_size.into()).number("holders", self.holders.into());
        o.number("upgrades", self.upgrades.into()).number("downgrades", self.downgrades.into());
        o.flag("peer_closed", self.peer_closed).flag("stale", self.stale);
        o.finish()
    }
}

/// Sums over connections: of a process, or of a process and those forked from it.
///
/// ```
/// use smc::stats::{Mode, Totals};
///
/// let none = Totals::default();
/// assert_eq!(none.connections[Mode::Shm as usize], 0);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections by the best mode each reached: TCP, SHM, RDMA.
    pub connections: [u64; 3],
    /// Bytes sent, by mode.
    pub tx: [u64; 3],
    /// Bytes received, by mode.
    pub rx: [u64; 3],
    /// Waits that ended by polling.
    pub polled: u64,
    /// Waits that slept.
    pub slept: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Upgrades.
    pub upgrades: u64,
    /// Ways back to TCP.
    pub downgrades: u64,
    /// How often a connection stayed on TCP or went back, by code.
    pub fallback: BTreeMap<u32, u64>,
}

impl Totals {
    /// Adds a connection that still lives.
    ///
    /// ```
    /// let mut all = smc::stats::Totals::default();
    /// smc::stats::connections()?.iter().for_each(|c| all.add(c));
    /// println!("{:?} connections by TCP, memory, RDMA", all.connections);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn add(&mut self, c: &ConnectionInfo) {
        let best = c.best as usize;
        self.connections[best] += 1;
        self.tx[best] += c.tx_bytes_ring;
        self.rx[best] += c.rx_bytes_ring;
        self.tx[Mode::Tcp as usize] += c.tx_bytes_tcp;
        self.rx[Mode::Tcp as usize] += c.rx_bytes_tcp;
        self.polled += c.polls;
        self.slept += c.sleeps;
        self.doorbells += c.doorbells;
        self.upgrades += u64::from(c.upgrades);
        self.downgrades += u64::from(c.downgrades);
        // A reason from before a successful upgrade is no fallback.
        if let Some(r) = c.reason.filter(|_| c.best == Mode::Tcp || c.downgrades > 0) {
            *self.fallback.entry(r.code()).or_default() += 1;
        }
    }

    /// The object that `SMC_STATS` writes and `smc stats --json` lists.
    ///
    /// ```
    /// let json = smc::stats::Totals::default().json(7, "app");
    /// assert!(json.starts_with(r#"{"pid":7,"program":"app","connections":{"shm":0"#));
    /// ```
    #[must_use]
    pub fn json(&self, pid: u32, program: &str) -> String {
        let at = |of: &[u64; 3], mode: Mode| of[mode as usize];
        let mut connections = Object::new();
        connections.number("shm", at(&self.connections, Mode::Shm));
        connections.number("rdma", at(&self.connections, Mode::Rdma));
        connections.number("tcp", at(&self.connections, Mode::Tcp));
        let mut fallback = Object::new();
        for (code, n) in &self.fallback {
            match Reason::try_from(*code) {
                Ok(r) => fallback.number(r.name(), *n),
                Err(code) => fallback.number(&format!("{code:#010x}"), *n),
            };
        }
        let mut bytes = Object::new();
        for (mode, tx, rx) in [
            (Mode::Shm, "shm_tx", "shm_rx"),
            (Mode::Rdma, "rdma_tx", "rdma_rx"),
            (Mode::Tcp, "tcp_tx", "tcp_rx"),
        ] {
            bytes.number(tx, at(&self.tx, mode)).number(rx, at(&self.rx, mode));
        }
        let mut wakeups = Object::new();
        wakeups.number("polled", self.polled).number("slept", self.slept).number("doorbells", self.doorbells);
        let mut o = Object::new();
        o.number("pid", pid.into()).text("program", program);
        o.object("connections", connections).object("fallback", fallback);
        o.object("bytes", bytes).object("wakeups", wakeups);
        o.number("upgrades", self.upgrades).number("downgrades", self.downgrades);
        o.finish()
    }
}

/// A process that libsmc is active in, with those forked from it that share its counters.
///
/// ```
/// for p in smc::stats::processes()? {
///     println!("{} {}: {} connections now", p.pid, p.program, p.live);
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// The lowest pid of them.
    pub pid: u32,
    /// Its name.
    pub program: String,
    /// All of them.
    pub pids: Vec<u32>,
    /// Connections that still live.
    pub live: u64,
    /// Sums, of live connections and of those that are gone.
    pub totals: Totals,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> ConnectionInfo {
        ConnectionInfo {
            pid: 7,
            program: "redis \"x\"".into(),
            peer_pid: Some(8),
            local: "127.0.0.1:6379".parse().ok(),
            peer: "[::1]:5".parse().ok(),
            role: Role::Accept,
            mode_tx: Mode::Shm,
            mode_rx: Mode::Tcp,
            best: Mode::Shm,
            reason: None,
            tx_bytes_ring: 10,
            rx_bytes_ring: 20,
            tx_bytes_tcp: 1,
            rx_bytes_tcp: 2,
            tx_msgs: 3,
            rx_msgs: 4,
            ring_size: 65536,
            polls: 5,
            sleeps: 6,
            doorbells: 7,
            upgrades: 1,
            downgrades: 0,
            holders: 1,
            peer_closed: false,
            stale: false,
        }
    }

    #[test]
    fn a_connection_as_json() {
        let json = connection().json();
        assert!(
            json.starts_with(r#"{"pid":7,"program":"redis \"x\"","peer_pid":8,"local":"127.0.0.1:6379""#)
        );
        assert!(json.contains(r#""mode":"SHM","mode_tx":"SHM","mode_rx":"TCP","best":"SHM","reason":null"#));
        assert!(
            json.contains(
                r#""bytes":{"shm_tx":10,"shm_rx":20,"rdma_tx":0,"rdma_rx":0,"tcp_tx":1,"tcp_rx":2}"#
            )
        );
    }

    #[test]
    fn totals_have_the_documented_shape() {
        let mut t = Totals::default();
        t.add(&connection());
        t.add(&ConnectionInfo { best: Mode::Tcp, reason: Some(Reason::PeerNoSmc), ..connection() });
        assert_eq!(
            t.json(9, "a"),
            concat!(
                r#"{"pid":9,"program":"a","connections":{"shm":1,"rdma":0,"tcp":1},"#,
                r#""fallback":{"peer-no-smc":1},"#,
                r#""bytes":{"shm_tx":10,"shm_rx":20,"rdma_tx":0,"rdma_rx":0,"tcp_tx":12,"tcp_rx":24},"#,
                r#""wakeups":{"polled":10,"slept":12,"doorbells":14},"upgrades":2,"downgrades":0}"#
            )
        );
    }
}
