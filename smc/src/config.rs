//! Settings, read once from the environment. A bad value: one clear line, and the default.

use crate::once::Once;
use crate::wire::smcr::Eid;

/// The EID that all have who are told no other.
pub const DEFAULT_EID: &str = "LIBSMC";
/// EIDs in a Proposal.
const MOST_EIDS: usize = 8;

/// When a connection has proved worth an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold {
    /// Calls that moved bytes.
    pub ops: u32,
    /// Bytes moved.
    pub bytes: u64,
}

/// All settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// `SMC_UPGRADE_AFTER`: `0` at once; `N` bytes (suffix k, m, g); `Nops` calls.
    pub upgrade_after: Threshold,
    /// `SMC_SPIN_US`: longest polling before a sleep, microseconds.
    pub spin_us: u32,
    /// `SMC_RMB_SIZE`: bytes of a ring, a power of two from 16 KiB to 4 MiB.
    pub rmb_size: usize,
    /// Bytes of a ring of a connection that has moved bulk: as much as TCP buffers, so that a writer gets as
    /// far ahead of its reader as it would there. `SMC_RMB_SIZE` says both.
    pub bulk_rmb_size: usize,
    /// `SMC_MEM_LIMIT`: bytes of shared memory this process may map.
    pub mem_limit: u64,
    /// `SMC_DISABLE`: everything stays TCP.
    pub disable: bool,
    /// `SMC_ONLY`: candidates must match.
    pub only: Vec<Rule>,
    /// `SMC_EXCLUDE`: candidates must not match.
    pub exclude: Vec<Rule>,
    /// `SMC_PEERS`: networks of other hosts that are known to speak SMC-R, as mapped IPv6.
    pub peers: Vec<Rule>,
    /// `SMC_EID`: what both ends must have in common to speak SMC-R version 2.
    pub eids: Vec<Eid>,
    /// `SMC_REQUIRE`: say on stderr when a candidate stays on TCP.
    pub require: bool,
    /// `SMC_LOG`: say on stderr what happens to connections.
    pub log: bool,
    /// `SMC_STATS`: where to write the counters at exit; `%p` is the pid.
    pub stats: Option<Vec<u8>>,
    /// `SMC_TEST_DOWNGRADE`, for tests: after about so many calls on an upgraded connection what this end
    /// sends goes back to TCP, as if for an option that the ring can't carry; 0: never. `N:SEED` draws others.
    pub test_downgrade: (u32, u64),
    /// `SMC_TEST_REMOTE`, for tests: a listed peer is another host's, also where it is on this one.
    pub test_remote: bool,
}

/// One entry of `SMC_ONLY` or `SMC_EXCLUDE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A port number, local or remote.
    Port(u16),
    /// A network, local or remote; IPv4 as mapped IPv6.
    Net(u128, u32),
    /// A program's name.
    Program(Vec<u8>),
}

impl Default for Config {
    fn default() -> Self {
        Config {
            upgrade_after: Threshold { ops: 8, bytes: 64 << 10 },
            spin_us: 50,
            rmb_size: 256 << 10,
            bulk_rmb_size: 4 << 20,
            mem_limit: 16 << 30,
            disable: false,
            only: Vec::new(),
            exclude: Vec::new(),
            peers: Vec::new(),
            eids: Eid::user(DEFAULT_EID).into_iter().collect(),
            require: false,
            log: false,
            stats: None,
            test_downgrade: (0, 0),
            test_remote: false,
        }
    }
}

static CONFIG: Once<Config> = Once::new();

/// Looks a variable up; its bytes.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<Vec<u8>>;

/// The settings of this process; the defaults until [`init`] has been called.
pub fn config() -> &'static Config {
    CONFIG.get_or_init(Config::default)
}

/// Reads the settings; `warn` gets a line for each bad value. The first call counts.
pub fn init(env: Lookup<'_>, warn: &mut dyn FnMut(&str)) -> &'static Config {
    CONFIG.get_or_init(|| parse(env, warn))
}

/// The settings that the environment gives.
pub fn parse(env: Lookup<'_>, warn: &mut dyn FnMut(&str)) -> Config {
    let mut c = Config::default();
    let mut read = |name: &str, f: &mut dyn FnMut(&str) -> bool| {
        let Some(raw) = env(name) else { return };
        let ok = std::str::from_utf8(&raw).is_ok_and(|s| f(s.trim()));
        if !ok {
            warn(&format!(
                "libsmc: {name}={}: not understood, using the default",
                String::from_utf8_lossy(&raw)
            ));
        }
    };
    read("SMC_UPGRADE_AFTER", &mut |s| threshold(s).map(|t| c.upgrade_after = t).is_some());
    read("SMC_SPIN_US", &mut |s| s.parse().ok().filter(|n| *n <= 1_000_000).map(|n| c.spin_us = n).is_some());
    read("SMC_RMB_SIZE", &mut |s| {
        let ok = size(s).filter(|n| n.is_power_of_two() && (16 << 10..=4 << 20).contains(n));
        ok.map(|n| (c.rmb_size, c.bulk_rmb_size) = (n as usize, n as usize)).is_some()
    });
    read("SMC_MEM_LIMIT", &mut |s| size(s).map(|n| c.mem_limit = n).is_some());
    read("SMC_DISABLE", &mut |s| flag(s).map(|b| c.disable = b).is_some());
    read("SMC_REQUIRE", &mut |s| flag(s).map(|b| c.require = b).is_some());
    read("SMC_LOG", &mut |s| log_level(s).map(|b| c.log = b).is_some());
    read("SMC_TEST_DOWNGRADE", &mut |s| {
        let (n, seed) = s.split_once(':').unwrap_or((s, "0"));
        n.parse().ok().zip(seed.parse().ok()).map(|d| c.test_downgrade = d).is_some()
    });
    read("SMC_ONLY", &mut |s| rules(s).map(|r| c.only = r).is_some());
    read("SMC_EXCLUDE", &mut |s| rules(s).map(|r| c.exclude = r).is_some());
    read("SMC_PEERS", &mut |s| networks(s).map(|p| c.peers = p).is_some());
    read("SMC_EID", &mut |s| eids(s).map(|e| c.eids = e).is_some());
    read("SMC_TEST_REMOTE", &mut |s| flag(s).map(|b| c.test_remote = b).is_some());
    c.stats = env("SMC_STATS").filter(|s| !s.is_empty());
    c
}

fn threshold(s: &str) -> Option<Threshold> {
    if let Some(n) = s.strip_suffix("ops") {
        return Some(Threshold { ops: n.trim().parse().ok()?, bytes: u64::MAX });
    }
    match size(s)? {
        0 => Some(Threshold { ops: 0, bytes: 0 }),
        bytes => Some(Threshold { ops: u32::MAX, bytes }),
    }
}

/// A number of bytes: `65536`, `64k`, `64KiB`, `1m`, `2g`.
pub fn size(s: &str) -> Option<u64> {
    let s = s.to_ascii_lowercase();
    let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let n: u64 = s[..digits].parse().ok()?;
    let shift = match s[digits..].trim().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return None,
    };
    n.checked_shl(shift).filter(|v| v >> shift == n)
}

fn flag(s: &str) -> Option<bool> {
    match s.to_ascii_lowercase().as_str() {
        "" | "0" | "no" | "false" | "off" => Some(false),
        "1" | "yes" | "true" | "on" => Some(true),
        _ => None,
    }
}

fn log_level(s: &str) -> Option<bool> {
    flag(s).or(match s {
        "info" | "debug" | "warn" | "error" | "trace" => Some(true),
        _ => None,
    })
}

fn rules(s: &str) -> Option<Vec<Rule>> {
    s.split([',', ' ']).filter(|p| !p.is_empty()).map(rule).collect()
}

/// Networks and addresses, and nothing else.
fn networks(s: &str) -> Option<Vec<Rule>> {
    rules(s).filter(|all| all.iter().all(|r| matches!(r, Rule::Net(..))))
}

fn eids(s: &str) -> Option<Vec<Eid>> {
    let all: Option<Vec<_>> = s.split([',', ' ']).filter(|p| !p.is_empty()).map(Eid::user).collect();
    all.filter(|e| (1..=MOST_EIDS).contains(&e.len()))
}

fn rule(s: &str) -> Option<Rule> {
    if let Ok(p) = s.parse::<u16>() {
        return Some(Rule::Port(p));
    }
    let (addr, len) = s.split_once('/').map_or((s, None), |(a, l)| (a, Some(l)));
    if let Ok(ip) = addr.parse::<std::net::IpAddr>() {
        let (bits, base) = match ip {
            std::net::IpAddr::V4(v) => (v.to_ipv6_mapped().to_bits(), 96),
            std::net::IpAddr::V6(v) => (v.to_bits(), 0),
        };
        let len: u32 = len.map_or(Some(128 - base), |l| l.parse().ok())?;
        return (base + len <= 128).then_some(Rule::Net(bits, base + len));
    }
    (!s.contains('/')).then(|| Rule::Program(s.as_bytes().to_vec()))
}

impl Config {
    /// Whether the host of that address is known to speak SMC-R.
    pub fn is_peer(&self, address: u128) -> bool {
        self.peers.iter().any(|r| matches!(r, Rule::Net(a, len) if holds(*a, *len, address)))
    }

    /// Whether policy lets no connection of that program be a candidate, whatever its ends.
    pub fn leaves_out(&self, program: &[u8]) -> bool {
        let hit = |r: &Rule| matches!(r, Rule::Program(n) if n == program);
        let others = |r: &Rule| matches!(r, Rule::Program(n) if n != program);
        self.disable || self.exclude.iter().any(hit) || !self.only.is_empty() && self.only.iter().all(others)
    }

    /// Whether policy lets a connection with these ends be a candidate.
    pub fn allows(&self, program: &[u8], ends: &[(u128, u16); 2]) -> bool {
        let hit = |r: &Rule| match r {
            Rule::Port(p) => ends.iter().any(|e| e.1 == *p),
            Rule::Net(a, len) => ends.iter().any(|e| holds(*a, *len, e.0)),
            Rule::Program(n) => n == program,
        };
        !self.disable && (self.only.is_empty() || self.only.iter().any(hit)) && !self.exclude.iter().any(hit)
    }
}

/// Whether the network `a` of `len` bits has that address.
fn holds(a: u128, len: u32, address: u128) -> bool {
    len == 0 || (address ^ a) >> (128 - len) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> (Config, Vec<String>) {
        let mut warned = Vec::new();
        let c =
            parse(&|n| pairs.iter().find(|(k, _)| *k == n).map(|(_, v)| v.as_bytes().to_vec()), &mut |w| {
                warned.push(w.to_string())
            });
        (c, warned)
    }

    #[test]
    fn values_with_units() {
        assert_eq!(with(&[("SMC_UPGRADE_AFTER", "0")]).0.upgrade_after, Threshold { ops: 0, bytes: 0 });
        assert_eq!(with(&[("SMC_UPGRADE_AFTER", "12ops")]).0.upgrade_after.ops, 12);
        assert_eq!(with(&[("SMC_UPGRADE_AFTER", "128k")]).0.upgrade_after.bytes, 128 << 10);
        assert_eq!(with(&[("SMC_RMB_SIZE", "64KiB")]).0.rmb_size, 64 << 10);
        assert_eq!(with(&[("SMC_TEST_DOWNGRADE", "40")]).0.test_downgrade, (40, 0));
        assert_eq!(with(&[("SMC_TEST_DOWNGRADE", "40:7")]).0.test_downgrade, (40, 7));
    }

    #[test]
    fn a_bad_value_is_one_line_and_the_default() {
        for (k, v) in [
            ("SMC_RMB_SIZE", "1000"),
            ("SMC_SPIN_US", "x"),
            ("SMC_DISABLE", "maybe"),
            ("SMC_ONLY", "1/2/3"),
            ("SMC_TEST_DOWNGRADE", "1:"),
        ] {
            let (c, w) = with(&[(k, v)]);
            assert_eq!(w.len(), 1, "{k}");
            assert!(w[0].contains(k) && w[0].contains(v));
            assert_eq!(c.rmb_size, Config::default().rmb_size);
        }
    }

    #[test]
    fn rules_match_ports_networks_and_programs() {
        let v4 = |s: &str| s.parse::<std::net::Ipv4Addr>().map(|a| a.to_ipv6_mapped().to_bits()).unwrap_or(0);
        let ends = [(v4("127.0.0.1"), 6379), (v4("127.0.0.1"), 40000)];
        assert!(with(&[("SMC_ONLY", "6379")]).0.allows(b"x", &ends));
        assert!(!with(&[("SMC_ONLY", "80,81")]).0.allows(b"x", &ends));
        assert!(!with(&[("SMC_EXCLUDE", "127.0.0.0/8")]).0.allows(b"x", &ends));
        assert!(with(&[("SMC_EXCLUDE", "10.0.0.0/8,redis-cli")]).0.allows(b"x", &ends));
        assert!(!with(&[("SMC_EXCLUDE", "redis-cli")]).0.allows(b"redis-cli", &ends));
        assert!(!with(&[("SMC_DISABLE", "1")]).0.allows(b"x", &ends));
    }

    #[test]
    fn a_program_is_left_out_by_its_name_alone() {
        let out = |k: &str, v: &str| with(&[(k, v)]).0.leaves_out(b"redis-cli");
        assert!(out("SMC_EXCLUDE", "80,redis-cli") && !out("SMC_EXCLUDE", "80,nginx"));
        assert!(out("SMC_ONLY", "nginx") && !out("SMC_ONLY", "nginx,80") && !out("SMC_ONLY", "redis-cli"));
        assert!(out("SMC_DISABLE", "1") && !Config::default().leaves_out(b"redis-cli"));
    }

    #[test]
    fn peers_are_networks() {
        let v4 = |s: &str| s.parse::<std::net::Ipv4Addr>().map(|a| a.to_ipv6_mapped().to_bits()).unwrap_or(0);
        let (c, w) = with(&[("SMC_PEERS", "10.0.0.0/24,192.168.1.7"), ("SMC_EID", "RACK-1,LIBSMC")]);
        assert!(w.is_empty());
        assert!(c.is_peer(v4("10.0.0.9")) && c.is_peer(v4("192.168.1.7")));
        assert!(!c.is_peer(v4("10.0.1.9")) && !c.is_peer(v4("192.168.1.8")));
        assert_eq!(c.eids, [Eid::user("RACK-1").unwrap(), Eid::user("LIBSMC").unwrap()]);
        for (k, v) in [("SMC_PEERS", "80"), ("SMC_PEERS", "host"), ("SMC_EID", "lower"), ("SMC_EID", "")] {
            let (c, w) = with(&[(k, v)]);
            assert_eq!((w.len(), c.peers.len(), c.eids.len()), (1, 0, 1), "{k}={v}");
        }
        assert!(!Config::default().is_peer(v4("10.0.0.9")), "nobody is listed by default");
    }
}
