//! What a test cost, and by which way its bytes went: both ends find out for themselves and tell each other.
//!
//! The way is not guessed: each end reads its own arena, as `smc stats` does.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpStream};

use rustix::thread::ClockId;
use serde::{Deserialize, Serialize};
use smc::reason::Reason;
use smc::stats::{Mode, Totals};

use super::spec::Over;

/// Seconds on a CPU of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    pub total: f64,
    pub user: f64,
    pub system: f64,
}

impl Cpu {
    /// Until now. The kernel tells the whole to the nanosecond, and the parts in ticks.
    pub fn now() -> Self {
        let t = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
        let total = t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9;
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let (user, system) = parts(&stat).unwrap_or_default();
        let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        Self { total, user: user as f64 * tick, system: system as f64 * tick }
    }

    pub fn plus(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            user: self.user + other.user,
            system: self.system + other.system,
        }
    }

    pub fn since(self, before: Self) -> Self {
        Self {
            total: self.total - before.total,
            user: self.user - before.user,
            system: self.system - before.system,
        }
    }
}

/// utime and stime of proc_pid_stat(5); the name before them may hold anything, also blanks and brackets.
fn parts(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace().skip(11);
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// Whether this process runs under libsmc.so.
pub fn preloaded() -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|l| l.split_whitespace().nth(5).is_some_and(|p| p.ends_with("/libsmc.so")))
}

/// By which way the bytes of a test went at one end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ways {
    /// Connections by mode: the best each reached. `SHM`, `RDMA`, `TCP`, `UNIX`.
    pub connections: BTreeMap<String, u64>,
    /// Why those on TCP are.
    pub reasons: BTreeMap<String, u64>,
    pub ring_bytes: u64,
    pub tcp_bytes: u64,
    pub polled: u64,
    pub slept: u64,
    pub doorbells: u64,
    /// This end runs under libsmc.so, or the streams are those of `smc::net`.
    pub preloaded: bool,
}

impl Ways {
    /// The mode of most connections.
    pub fn mode(&self) -> &str {
        self.connections.iter().max_by_key(|(_, n)| **n).map_or("TCP", |(mode, _)| mode)
    }

    /// And those of another process.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in [(&mut self.connections, &other.connections), (&mut self.reasons, &other.reasons)] {
            from.iter().for_each(|(name, n)| *to.entry(name.clone()).or_default() += n);
        }
        self.ring_bytes = self.ring_bytes.saturating_add(other.ring_bytes);
        self.tcp_bytes = self.tcp_bytes.saturating_add(other.tcp_bytes);
        self.polled += other.polled;
        self.slept += other.slept;
        self.doorbells += other.doorbells;
    }

    /// In words, one sentence.
    pub fn in_words(&self) -> String {
        let count = |(mode, n): (&String, &u64)| {
            if *n == 1 { mode.clone() } else { format!("{mode} ({n} connections)") }
        };
        let mut out = self.connections.iter().map(count).collect::<Vec<_>>().join(", ");
        if out.is_empty() {
            out = "no connection".into();
        }
        let all = self.ring_bytes.saturating_add(self.tcp_bytes);
        if self.ring_bytes > 0 {
            let share = self.ring_bytes as f64 / all as f64 * 100.0;
            out += &format!("; {share:.2} % of the bytes through memory");
            out += &format!(
                "; waits: {} polled, {} slept, {} doorbells",
                self.polled, self.slept, self.doorbells
            );
        }
        if self.connections.contains_key("TCP") && !self.preloaded {
            out += "; this end does not run under libsmc";
        }
        for (name, n) in &self.reasons {
            let explained = Reason::ALL.iter().find(|r| r.name() == name).map_or("", |r| r.explain());
            out += &format!("; {n} on TCP: {name}: {explained}");
        }
        out
    }
}

/// Sums before a test, to be compared with those after it: a connection that has ended is found in sums only.
#[derive(Debug)]
pub struct Look {
    /// Both addresses of the control connection, which is not part of the test.
    control: Option<(SocketAddr, SocketAddr)>,
    /// `None`: no libsmc here.
    before: Option<Totals>,
}

impl Look {
    /// Before the connections of the test are made.
    pub fn before(over: Over, control: &TcpStream) -> Self {
        let control = control.local_addr().ok().zip(control.peer_addr().ok());
        let before = (preloaded() || over == Over::Native).then(|| totals(control));
        Self { control, before }
    }

    /// After the test. `n`: connections that there were.
    pub fn after(&self, over: Over, n: u64) -> Ways {
        let mut ways = Ways { preloaded: self.before.is_some(), ..Ways::default() };
        match (over, &self.before) {
            (Over::Unix, _) => ways.connections = [("UNIX".to_owned(), n)].into(),
            (_, Some(before)) => ways.sums(before, &totals(self.control)),
            (_, None) => ways.connections = [("TCP".to_owned(), n)].into(),
        }
        ways
    }
}

/// Of this process, without that connection.
fn totals(but: Option<(SocketAddr, SocketAddr)>) -> Totals {
    let Some((process, connections)) = smc::stats::process(std::process::id()) else {
        return Totals::default();
    };
    let mut sums = process.totals;
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let but = but.map(|(local, peer)| (Some(plain(local)), Some(plain(peer))));
    for c in connections.iter().filter(|c| Some((c.local, c.peer)) == but) {
        let mut its = Totals::default();
        its.add(c);
        take_away(&mut sums, &its);
    }
    sums
}

fn take_away(sums: &mut Totals, its: &Totals) {
    for i in 0..sums.connections.len() {
        sums.connections[i] = sums.connections[i].saturating_sub(its.connections[i]);
        sums.tx[i] = sums.tx[i].saturating_sub(its.tx[i]);
        sums.rx[i] = sums.rx[i].saturating_sub(its.rx[i]);
    }
    sums.polled = sums.polled.saturating_sub(its.polled);
    sums.slept = sums.slept.saturating_sub(its.slept);
    sums.doorbells = sums.doorbells.saturating_sub(its.doorbells);
    for (code, n) in &its.fallback {
        sums.fallback.entry(*code).and_modify(|m| *m = m.saturating_sub(*n));
    }
}

impl Ways {
    /// What has come to the sums.
    fn sums(&mut self, before: &Totals, after: &Totals) {
        for mode in [Mode::Tcp, Mode::Shm, Mode::Rdma] {
            let i = mode as usize;
            let n = after.connections[i].saturating_sub(before.connections[i]);
            if n > 0 {
                self.connections.insert(mode.name().into(), n);
            }
            let bytes = (after.tx[i] + after.rx[i]).saturating_sub(before.tx[i] + before.rx[i]);
            let to = if mode == Mode::Tcp { &mut self.tcp_bytes } else { &mut self.ring_bytes };
            *to += bytes;
        }
        for (code, n) in &after.fallback {
            let n = n.saturating_sub(before.fallback.get(code).copied().unwrap_or(0));
            if n > 0 {
                let name = Reason::try_from(*code).map_or_else(|c| format!("{c:#010x}"), |r| r.name().into());
                self.reasons.insert(name, n);
            }
        }
        self.polled = after.polled.saturating_sub(before.polled);
        self.slept = after.slept.saturating_sub(before.slept);
        self.doorbells = after.doorbells.saturating_sub(before.doorbells);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 12 34 0 0 20 0 1 0 100 1 1";
        assert_eq!(parts(stat), Some((12, 34)));
        assert_eq!(parts("nothing"), None);
    }

    #[test]
    fn time_on_the_cpu_goes_on() {
        let before = Cpu::now();
        let mut n = 0u64;
        while Cpu::now().since(before).total <= 0.0 {
            n = std::hint::black_box(n + 1);
        }
        assert!(Cpu::now().since(before).total > 0.0);
    }

    #[test]
    fn the_way_is_told_in_words() {
        let mut w = Ways { preloaded: true, ring_bytes: 999, tcp_bytes: 1, ..Ways::default() };
        w.connections.insert("SHM".into(), 1);
        assert!(w.in_words().starts_with("SHM; 99.90 % of the bytes through memory"), "{}", w.in_words());
        assert_eq!(w.mode(), "SHM");
        let mut w = Ways { preloaded: true, ..Ways::default() };
        w.connections.insert("TCP".into(), 2);
        w.reasons.insert(Reason::PeerNoSmc.name().into(), 2);
        assert!(w.in_words().contains(Reason::PeerNoSmc.explain()), "{}", w.in_words());
        let w = Ways { connections: [("TCP".to_owned(), 1)].into(), ..Ways::default() };
        assert!(w.in_words().contains("does not run under libsmc"));
    }

    #[test]
    fn sums_are_differences() {
        let before = Totals { connections: [5, 1, 0], fallback: [(7, 5)].into(), ..Totals::default() };
        let after = Totals {
            connections: [9, 1, 0],
            tx: [40, 0, 0],
            fallback: [(7, 8), (9, 1)].into(),
            ..Totals::default()
        };
        let mut without = after.clone();
        take_away(&mut without, &before);
        assert_eq!((without.connections, without.fallback), ([4, 0, 0], [(7, 3), (9, 1)].into()));
        let mut w = Ways::default();
        w.sums(&before, &after);
        assert_eq!(w.connections, [("TCP".to_owned(), 4)].into());
        assert_eq!((w.tcp_bytes, w.reasons.values().sum::<u64>()), (40, 4));
    }
}
