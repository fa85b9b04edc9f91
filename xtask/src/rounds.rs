//! Rounds: one run of a server and a client, on TCP or under libsmc, and what came of it.
//!
//! Rounds alternate (TCP, libsmc, TCP, …), so that a machine that gets slower or faster meanwhile does it to
//! all, and the medians are compared.

use std::error::Error;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use crate::shell::{self, Running};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// `libsmc.so` as `cargo build --release` leaves it.
pub fn library() -> PathBuf {
    shell::target_dir().join("release/libsmc.so")
}

/// One number that a pair of programs gives.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    /// Latencies: less is better.
    pub less_is_better: bool,
}

/// How a round runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Tcp,
    /// Unix stream sockets instead.
    Unix,
    Libsmc,
    /// `smc::net`, without a library that is preloaded.
    Native,
    /// TCP, and a BPF program that hands what is sent to the other end's socket.
    Sockmap,
    /// Another build of the library.
    Before,
    /// What the machine can do at best, without sockets.
    Limit,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Libsmc => "libsmc",
            Self::Native => "native",
            Self::Sockmap => "sockmap",
            Self::Before => "before",
            Self::Limit => "limit",
        }
    }
}

/// What a round needs to start programs and to look at them.
#[derive(Debug)]
pub struct Round {
    pub mode: Mode,
    /// The library that programs are preloaded with, if any.
    pub library: Option<PathBuf>,
    /// The cgroup that programs are started in, if not our own.
    pub cgroup: Option<PathBuf>,
    pub seconds: f64,
    /// Folder of the round's files.
    pub dir: PathBuf,
    /// What `smc ss` printed in the middle, if it is still wanted.
    pub seen: Option<Vec<String>>,
}

impl Round {
    /// A program as this round runs it.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut c = match &self.cgroup {
            None => Command::new(program.as_ref()),
            Some(cgroup) => {
                let mut c = Command::new("sh");
                c.args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]);
                c.arg(cgroup).arg(program.as_ref());
                c
            }
        };
        c.env("PATH", shell::path_with_sbin()).env("LC_ALL", "C").current_dir(&self.dir);
        // cargo's own search path is nothing the programs should see.
        c.env_remove("LD_PRELOAD").env_remove("LD_LIBRARY_PATH");
        if let Some(library) = &self.library {
            c.env("LD_PRELOAD", library).env("SMC_STATS", self.dir.join("stats.%p"));
        }
        c
    }

    /// Runs a client to its end and returns what it printed.
    pub fn client(&mut self, command: &mut Command, server: &mut Running) -> Result<String> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().display().to_string();
        let client = Running::start(command)?;
        let limit = Duration::from_secs_f64(self.seconds * 10.0 + 60.0);
        let look_after = Duration::from_secs_f64((self.seconds / 12.0).min(0.1));
        let pids = [client.pid(), server.pid()];
        // A few looks: early ones may come before the upgrade, and each takes time from the programs.
        let (start, mut looks) = (Instant::now(), 1..=12);
        let mut next = looks.next();
        let upgraded = |seen: &Vec<String>| seen.iter().any(|l| l.starts_with("SHM"));
        let done = client.finish(limit, || {
            let wanted = self.seen.as_ref().is_some_and(|seen| !upgraded(seen));
            if wanted && next.is_some_and(|n| start.elapsed() > look_after * (n * (n + 1) / 2)) {
                let now = socket_statistics(pids);
                if !now.is_empty() {
                    self.seen = Some(now);
                }
                next = looks.next();
            }
        })?;
        match done.status {
            Some(s) if s.success() => Ok(done.output),
            Some(s) => Err(format!("{name}: {s}\n{}", done.output.trim()).into()),
            None => Err(format!("{name} did not end within {} s", limit.as_secs()).into()),
        }
    }
}

/// What `smc ss` says of these processes: its headline and a few lines.
fn socket_statistics(pids: [u32; 2]) -> Vec<String> {
    const LINES: usize = 4;
    let smc = shell::target_dir().join("release/smc");
    let Ok(out) = Command::new(smc).args(["ss", "-a"]).output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut lines = text.lines();
    let Some(head) = lines.next() else { return Vec::new() };
    let ours = |l: &&str| l.split_whitespace().any(|w| pids.iter().any(|p| w == p.to_string()));
    let ours: Vec<String> = lines.filter(ours).map(String::from).collect();
    if ours.is_empty() {
        return Vec::new();
    }
    let more = ours.len().saturating_sub(LINES);
    let mut seen = vec![head.to_owned()];
    seen.extend(ours.into_iter().take(LINES));
    if more > 0 {
        seen.push(format!("({more} more)"));
    }
    seen
}

/// The sum of a number in the `SMC_STATS` files of a round.
pub fn upgraded(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|f| shm_connections(&fs::read_to_string(f.path()).ok()?)).sum()
}

/// `connections.shm` of one statistics file.
fn shm_connections(json: &str) -> Option<u64> {
    let (_, rest) = json.split_once("\"connections\"")?;
    let (_, rest) = rest.split_once("\"shm\"")?;
    let rest = rest.trim_start_matches([':', ' ', '\n']);
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A folder that goes when dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// Programs that run as other users go through it: 755.
    pub fn new(name: &str) -> std::io::Result<Self> {
        let dir = env::temp_dir().join(format!("smc-{name}.{}", process::id()));
        fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind at worst: a few small files in the folder for temporary ones.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A port nobody listens on now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Waits until somebody listens, by looking: a connection to try would be one that the server counts.
pub fn wait_for_listener(port: u16, server: &mut Running) -> Result<()> {
    let start = Instant::now();
    let local = format!(":{port:04X}");
    while start.elapsed() < Duration::from_secs(20) {
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let text = fs::read_to_string(table).unwrap_or_default();
            let listens = |l: &str| {
                let mut words = l.split_whitespace().skip(1);
                words.next().is_some_and(|a| a.ends_with(&local)) && words.nth(1) == Some("0A")
            };
            if text.lines().any(listens) {
                return Ok(());
            }
        }
        if server.ended() {
            return Err("the server ended at once".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err(format!("no server on port {port}").into())
}

/// The number after `key`, whatever stands between that is no digit.
pub fn number_after(text: &str, key: &str) -> Result<f64> {
    let found = text.split_once(key).and_then(|(_, rest)| {
        let rest = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
        rest.split(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c))).next()?.parse().ok()
    });
    found.ok_or_else(|| format!("no {key:?} in the output:\n{text}").into())
}

/// An example as `cargo build --release --examples` leaves it.
pub fn example(name: &str) -> PathBuf {
    shell::target_dir().join("release/examples").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upgraded_connections_are_read_from_the_statistics() {
        let json =
            r#"{"pid":7,"program":"a","connections":{"shm":12,"rdma":0,"tcp":1},"bytes":{"shm_tx":9}}"#;
        assert_eq!(shm_connections(json), Some(12));
        assert_eq!(shm_connections("{}"), None);
    }

    #[test]
    fn numbers_are_found_in_what_programs_print() {
        let csv = "\"test\",\"rps\",\"avg\"\n\"SET\",\"88105.73\",\"0.285\"\n";
        assert_eq!(number_after(csv, "\"SET\",").ok(), Some(88105.73));
        assert_eq!(number_after("\"bits_per_second\":\t3.5e+10,", "\"bits_per_second\"").ok(), Some(3.5e10));
        let line = "sockperf: ---> percentile 50.000 =    7.421\nsockperf:";
        assert_eq!(number_after(line, "percentile 50.000 =").ok(), Some(7.421));
        assert!(number_after("nothing", "p50").is_err());
    }
}
