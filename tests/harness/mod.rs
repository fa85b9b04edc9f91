//! Running programs with and without the preload, and looking at what the library counted.
//!
//! Nothing here has an upper bound on time except the watchdog that kills what hangs, and no port is probed by
//! connecting to it: `/proc/net/tcp` says who listens.
#![allow(dead_code, reason = "each test binary uses its part")]

use libtest_mimic::Failed;
use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    io::Write as _,
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The library under test; none with `SMC_LIB=none`, which makes every run a baseline.
#[derive(Clone)]
pub struct Lib(Option<PathBuf>);

impl Lib {
    /// `SMC_LIB`, or what `cargo build --release` makes.
    pub fn find() -> Result<Lib, Failed> {
        let p = match env::var_os("SMC_LIB") {
            Some(v) if v == "none" => return Ok(Lib(None)),
            Some(v) => PathBuf::from(v),
            None => {
                let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
                let target = env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
                root.join(target).join("release/libsmc.so")
            }
        };
        match p.canonicalize() {
            Ok(p) => Ok(Lib(Some(p))),
            Err(e) => {
                Err(format!("{}: {e}; run `cargo build --release`, or set SMC_LIB", p.display()).into())
            }
        }
    }

    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    pub fn display(&self) -> String {
        self.0.as_ref().map_or("none".into(), |p| p.display().to_string())
    }
}

/// `SMC_STATS` of all the processes of one name, summed.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub files: usize,
    pub shm: u64,
    pub rdma: u64,
    pub tcp: u64,
    pub bytes: BTreeMap<String, u64>,
    pub fallback: BTreeMap<String, u64>,
    pub wakeups: BTreeMap<String, u64>,
    pub upgrades: u64,
    pub downgrades: u64,
}

impl Stats {
    /// Sums `NAME.*.json` of a folder.
    pub fn read(dir: &Path, name: &str) -> Result<Stats, String> {
        let mut sum = Stats::default();
        for e in fs::read_dir(dir).map_err(|e| e.to_string())?.flatten() {
            let file = e.file_name().to_string_lossy().into_owned();
            if file.starts_with(&format!("{name}.")) && file.ends_with(".json") {
                let text = fs::read_to_string(e.path()).map_err(|e| e.to_string())?;
                sum.add(&text).map_err(|e| format!("{file}: {e}: {text:?}"))?;
            }
        }
        Ok(sum)
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        let v: serde_json::Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let num = |v: &serde_json::Value, k: &str| v[k].as_u64().ok_or(format!("no number {k}"));
        let map = |m: &mut BTreeMap<String, u64>, k: &str| -> Result<(), String> {
            for (name, n) in v[k].as_object().ok_or(format!("no object {k}"))? {
                *m.entry(name.clone()).or_default() += n.as_u64().ok_or(format!("{k}.{name}"))?;
            }
            Ok(())
        };
        num(&v, "pid")?;
        v["program"].as_str().ok_or("no string program")?;
        self.files += 1;
        self.shm += num(&v["connections"], "shm")?;
        self.rdma += num(&v["connections"], "rdma")?;
        self.tcp += num(&v["connections"], "tcp")?;
        map(&mut self.bytes, "bytes")?;
        map(&mut self.fallback, "fallback")?;
        map(&mut self.wakeups, "wakeups")?;
        self.upgrades += num(&v, "upgrades")?;
        self.downgrades += num(&v, "downgrades")?;
        Ok(())
    }

    /// The part of all bytes that moved through shared memory.
    pub fn shm_share(&self) -> f64 {
        let of = |suffix: &str| {
            self.bytes.iter().filter(|b| b.0.starts_with(suffix)).map(|b| *b.1 as f64).sum::<f64>()
        };
        let all = of("");
        if all == 0.0 { 0.0 } else { of("shm_") / all }
    }
}

/// What a program left behind.
pub struct Done {
    pub success: bool,
    pub status: String,
    pub stdout: String,
    pub stderr: String,
    pub stats: Stats,
}

impl Done {
    /// Its stdout, or everything about its failure.
    pub fn ok(self) -> Result<String, Failed> {
        if self.success { Ok(self.stdout) } else { Err(self.report().into()) }
    }

    fn report(&self) -> String {
        format!("{}\n{}{}", self.status, tail(&self.stdout), tail(&self.stderr))
    }
}

fn tail(s: &str) -> String {
    let lines: Vec<_> = s.lines().collect();
    lines[lines.len().saturating_sub(25)..].iter().map(|l| format!("  | {l}\n")).collect()
}

/// A folder for one test, and how its programs are started.
pub struct Run {
    name: String,
    dir: TempDir,
    limit: Duration,
    lib: Option<PathBuf>,
    beside: Option<OsString>,
}

impl Run {
    pub fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("smc-test-{name}-")).tempdir().expect("a folder");
        // Some servers change their user, and write their statistics all the same.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).expect("chmod");
        Run { name: name.into(), dir, limit: Duration::from_secs(120), lib: None, beside: None }
    }

    /// The watchdog's patience.
    pub fn limit(&mut self, d: Duration) {
        self.limit = d;
    }

    /// From here on programs run under the preload.
    pub fn preload(&mut self, lib: &Lib) {
        self.lib.clone_from(&lib.0);
    }

    /// Another library is preloaded before it.
    pub fn preload_beside(&mut self, other: &Path) {
        let mut s = other.as_os_str().to_owned();
        s.push(" ");
        self.beside = Some(s);
    }

    /// The same, by a copy that every user can read.
    pub fn preload_copy(&mut self, lib: &Lib) {
        if let Some(p) = &lib.0 {
            let copy = self.dir.path().join("libsmc.so");
            if !copy.exists() {
                fs::copy(p, &copy).expect("copy");
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
            }
            self.lib = Some(copy);
        }
    }

    pub fn no_preload(&mut self) {
        self.lib = None;
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn dress(&self, cmd: &mut Command, name: &str) {
        cmd.env_remove("LD_PRELOAD").env_remove("SMC_STATS");
        if let Some(lib) = &self.lib {
            let mut all = self.beside.clone().unwrap_or_default();
            all.push(lib);
            cmd.env("LD_PRELOAD", all).env("SMC_STATS", self.dir.path().join(format!("{name}.%p.json")));
        }
        cmd.process_group(0);
        // When the tests themselves are killed, nothing they started stays. (The thread that starts a program
        // also waits for it, so its end is not the program's.)
        // A shell's background job ignores SIGINT, which several programs are stopped with.
        // SAFETY: system calls between fork and exec, with no pointers.
        unsafe {
            cmd.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            });
        }
    }

    /// Starts a program in its own process group, its output in files of this folder.
    pub fn start(&self, name: &str, mut cmd: Command) -> Result<Running, Failed> {
        self.dress(&mut cmd, name);
        let file = |ext: &str| self.dir.path().join(format!("{name}.{ext}"));
        let (out, err) = (file("out"), file("err"));
        cmd.stdin(Stdio::null());
        cmd.stdout(fs::File::create(&out).map_err(|e| e.to_string())?);
        cmd.stderr(fs::File::create(&err).map_err(|e| e.to_string())?);
        let child = cmd.spawn().map_err(|e| format!("{:?}: {e}", cmd.get_program()))?;
        Ok(Running {
            name: name.into(),
            child,
            out,
            err,
            dir: self.dir.path().into(),
            limit: self.limit,
            gone: false,
        })
    }

    /// Runs a program to its end.
    pub fn output_as(&self, name: &str, cmd: Command) -> Result<Done, Failed> {
        self.start(name, cmd)?.finish()
    }

    pub fn output(&self, cmd: Command) -> Result<Done, String> {
        self.output_as(&self.name, cmd).map_err(|e| e.message().unwrap_or("failed").to_string())
    }

    pub fn stats(&self, name: &str) -> Result<Stats, Failed> {
        Ok(Stats::read(self.dir.path(), name)?)
    }
}

/// A started program; its whole process group is killed when this goes.
pub struct Running {
    name: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
    dir: PathBuf,
    limit: Duration,
    gone: bool,
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    /// Signals the program alone.
    pub fn signal(&self, sig: i32) {
        // SAFETY: no pointers; the child was not waited for, so its number is still its own.
        unsafe { libc::kill(self.pid(), sig) };
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// Waits until a condition holds, while the program lives.
    pub fn until(&mut self, what: &str, mut cond: impl FnMut(&Self) -> bool) -> Result<(), Failed> {
        let start = Instant::now();
        loop {
            if cond(self) {
                return Ok(());
            }
            if let Some(st) = self.ended() {
                return Err(format!("{} ended ({st}) before: {what}\n{}", self.name, self.logs()).into());
            }
            if start.elapsed() > self.limit {
                return Err(format!("{}: hangs, waited for: {what}\n{}", self.name, self.logs()).into());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn until_listening(&mut self, port: u16) -> Result<(), Failed> {
        self.until(&format!("listening on port {port}"), |_| listening(port))
    }

    fn logs(&self) -> String {
        format!("{}{}", tail(&self.stdout()), tail(&self.stderr()))
    }

    /// Waits for its end; kills what hangs.
    pub fn finish(mut self) -> Result<Done, Failed> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        let st = loop {
            if let Some(st) = self.ended() {
                break st;
            }
            if start.elapsed() > self.limit {
                let stacks = self.where_it_hangs();
                self.kill_group();
                return Err(format!("{}: hangs\n{}{stacks}", self.name, self.logs()).into());
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        self.kill_group();
        Ok(Done {
            success: st.success(),
            status: format!("{} {st}", self.name),
            stdout: self.stdout(),
            stderr: self.stderr(),
            stats: Stats::read(&self.dir, &self.name)?,
        })
    }

    /// Asks a server to end, and waits until it did.
    pub fn stop(self, sig: i32) -> Result<Done, Failed> {
        self.signal(sig);
        self.finish()
    }

    /// The kernel's word on what each thread of the group is waiting for.
    fn where_it_hangs(&self) -> String {
        let mut s = String::new();
        for p in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(stat) = fs::read_to_string(p.path().join("stat")) else { continue };
            let rest: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
            if rest.get(2).and_then(|g| g.parse().ok()) != Some(self.pid()) {
                continue;
            }
            for t in fs::read_dir(p.path().join("task")).into_iter().flatten().flatten() {
                let read =
                    |f: &str| fs::read_to_string(t.path().join(f)).unwrap_or_default().trim().to_string();
                s += &format!("  thread {:?} {}: {}\n", t.file_name(), read("comm"), read("syscall"));
            }
        }
        s
    }

    fn kill_group(&mut self) {
        if !self.gone {
            // SAFETY: no pointers; the group was made by us for this child.
            unsafe { libc::kill(-self.pid(), libc::SIGKILL) };
            self.gone = true;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
        let _ = self.child.wait();
    }
}

/// Brings up the loopback of a network that is new.
pub fn loopback_up() -> std::io::Result<()> {
    let s = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // struct ifreq: a name of 16 bytes, then flags.
    let mut r = [0u8; 40];
    r[..2].copy_from_slice(b"lo");
    r[16..18].copy_from_slice(&((libc::IFF_UP | libc::IFF_RUNNING) as u16).to_ne_bytes());
    // SAFETY: a struct ifreq that lives over the call.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&s), libc::SIOCSIFFLAGS as _, r.as_mut_ptr()) }
        != 0
    {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Whether somebody listens on a TCP port, by the kernel's table.
pub fn listening(port: u16) -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|f| {
        fs::read_to_string(f).unwrap_or_default().lines().skip(1).any(|l| {
            let mut w = l.split_whitespace().skip(1);
            let local = w.next().unwrap_or("").rsplit(':').next().unwrap_or("").to_string();
            let state = w.nth(1).unwrap_or("");
            state == "0A" && u16::from_str_radix(&local, 16) == Ok(port)
        })
    })
}

/// A port that nobody has, outside the range from which the kernel gives them to clients.
pub fn free_port() -> u16 {
    static NEXT: Mutex<u16> = Mutex::new(0);
    let mut next = NEXT.lock().expect("no panic under it");
    loop {
        // Different test processes start at different places.
        *next = if *next == 0 { (std::process::id() % 15_000) as u16 } else { *next + 1 } % 15_000;
        let port = 16_000 + *next;
        if !listening(port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A program's path, also from where servers live.
pub fn program(name: &str) -> Option<PathBuf> {
    let mut dirs: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    dirs.extend(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    // Debian keeps the server programs of PostgreSQL by version.
    let mut pg: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("bin"))
        .collect();
    pg.sort();
    dirs.extend(pg.into_iter().rev());
    dirs.into_iter().map(|d| d.join(name)).find(|p| p.is_file())
}

/// A command for a program that was found before.
pub fn cmd(name: &str, args: &[&str]) -> Command {
    let mut c = Command::new(program(name).unwrap_or_else(|| name.into()));
    c.args(args).env("LC_ALL", "C.UTF-8");
    for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
        c.env_remove(proxy);
    }
    c
}

/// Says on stderr, also under a harness that captures, that something is left out; with CI or SMC_TEST_ALL in
/// the environment that is a failure instead.
pub fn left_out(test: &str, why: &str) -> Result<libtest_mimic::Completion, Failed> {
    if env::var_os("CI").is_some() || env::var_os("SMC_TEST_ALL").is_some() {
        return Err(format!("{why} (CI or SMC_TEST_ALL is set, so nothing may be left out)").into());
    }
    // One write, so that it does not mix with other threads' lines.
    let _ = std::io::stderr().write_all(format!("LEFT OUT {test}: {why}\n").as_bytes());
    Ok(libtest_mimic::Completion::ignored_with(why))
}

/// A failure unless the condition holds.
pub fn ensure(cond: bool, why: impl FnOnce() -> String) -> Result<(), Failed> {
    if cond { Ok(()) } else { Err(why().into()) }
}

/// A small generator of random numbers; the seed is printed, and taken from SMC_SEED.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let seed = env::var("SMC_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            u64::from(std::process::id()) ^ std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64)
        });
        let _ = writeln!(std::io::stderr(), "SMC_SEED={seed}");
        Random(seed)
    }

    pub fn seeded(seed: u64) -> Self {
        Random(seed)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// What the process has open, by kind: numbers of sockets and inodes say nothing.
pub fn descriptors(pid: i32) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut kinds: Vec<_> = fds
        .filter_map(|f| fs::read_link(f.path()).ok())
        .map(|l| l.to_string_lossy().split(":[").next().unwrap_or("").to_string())
        .collect();
    kinds.sort();
    kinds
}
