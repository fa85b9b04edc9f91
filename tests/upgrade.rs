//! When a connection is upgraded, and when it must not be: policy, counts that differ, namespaces and users.
//!
//! Each test runs this very executable under the preload as a client, a server or both, which move bytes they
//! check, and asks the counters where the bytes went: a test that expects an upgrade fails without one, and one
//! that expects none fails with one.
//!
//! What needs root is left out, with a line that says so, where it is not permitted; with CI set that fails.

#[path = "harness/mod.rs"]
mod harness;

use harness::{Lib, Run, Running, Stats, ensure, free_port, left_out};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::{
    env, fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

const MESSAGES: usize = 400;

// ---- what runs under the preload

/// The bytes of message `i`, some hundred to some thousand.
fn message(i: usize) -> Vec<u8> {
    (0..100 + i * 37 % 3000).map(|k| (i * 31 + k * 7) as u8).collect()
}

/// One thread that holds both ends: neither may wait for the other.
fn both(port: u16) -> io::Result<()> {
    let l = TcpListener::bind(("127.0.0.1", port))?;
    let mut a = TcpStream::connect(l.local_addr()?)?;
    let mut b = l.accept()?.0;
    println!("threads {}", fs::read_dir("/proc/self/task")?.count());
    exchange(&mut a, &mut b, MESSAGES)?;
    println!("right");
    Ok(())
}

fn exchange(a: &mut TcpStream, b: &mut TcpStream, n: usize) -> io::Result<()> {
    for i in 0..2 * n {
        let (from, to) = if i % 2 == 0 { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
        let m = message(i / 2);
        from.write_all(&m)?;
        let mut got = vec![0; m.len()];
        to.read_exact(&mut got)?;
        if got != m {
            return Err(io::Error::other(format!("message {i} is wrong")));
        }
    }
    Ok(())
}

/// A system call that no library sees.
#[cfg(target_arch = "x86_64")]
fn unseen(nr: i64, fd: i32, p: *mut u8, n: usize) -> isize {
    let r: isize;
    // SAFETY: read(2) or write(2) of memory that the caller owns for `n` bytes; the kernel changes rcx and r11.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") nr as isize => r, in("rdi") fd as isize, in("rsi") p, in("rdx") n,
            lateout("rcx") _, lateout("r11") _);
    }
    r
}

#[cfg(target_arch = "aarch64")]
fn unseen(nr: i64, fd: i32, p: *mut u8, n: usize) -> isize {
    let r: isize;
    // SAFETY: read(2) or write(2) of memory that the caller owns for `n` bytes.
    unsafe {
        std::arch::asm!("svc 0", in("x8") nr, inlateout("x0") fd as isize => r, in("x1") p, in("x2") n);
    }
    r
}

/// One message is written (or read) behind the library's back before the upgrade.
fn behind(how: &str) -> io::Result<()> {
    let l = TcpListener::bind("127.0.0.1:0")?;
    let mut a = TcpStream::connect(l.local_addr()?)?;
    let mut b = l.accept()?.0;
    let mut m = message(1);
    let mut got = vec![0; m.len()];
    let n = match how {
        "write" => {
            let n = unseen(libc::SYS_write, a.as_raw_fd(), m.as_mut_ptr(), m.len());
            b.read_exact(&mut got)?;
            n
        }
        "read" => {
            b.write_all(&m)?;
            unseen(libc::SYS_read, a.as_raw_fd(), got.as_mut_ptr(), got.len())
        }
        _ => {
            b.write_all(&m)?;
            a.read_exact(&mut got)?;
            m.len() as isize
        }
    };
    if n as usize != m.len() || got != m {
        return Err(io::Error::other("the unseen call"));
    }
    exchange(&mut a, &mut b, MESSAGES)?;
    println!("right");
    Ok(())
}

fn serve() -> io::Result<()> {
    let l = TcpListener::bind("127.0.0.1:0")?;
    println!("port {}", l.local_addr()?.port());
    let mut s = l.accept()?.0;
    let mut b = vec![0; 8192];
    loop {
        match s.read(&mut b)? {
            0 => return Ok(()),
            n => s.write_all(&b[..n])?,
        }
    }
}

fn talk(port: u16) -> io::Result<()> {
    let mut s = TcpStream::connect(("127.0.0.1", port))?;
    for i in 0..MESSAGES {
        let m = message(i);
        s.write_all(&m)?;
        let mut got = vec![0; m.len()];
        s.read_exact(&mut got)?;
        if got != m {
            return Err(io::Error::other(format!("message {i} is wrong")));
        }
    }
    println!("right");
    // The connection stays for those who look at it; the end of standard input or a signal ends it.
    if env::var_os("STAY").is_some() {
        println!("staying");
        while fs::metadata(env::var_os("STAY").expect("set")).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// As user `uid`: which descriptors and mappings of these processes can be opened, of those that are memory.
fn pry(uid: u32, pids: &[String]) -> io::Result<()> {
    // Their names are looked up as root; what they hold is asked for as the stranger.
    let mut paths = Vec::new();
    for pid in pids {
        for dir in ["fd", "map_files"] {
            for e in fs::read_dir(format!("/proc/{pid}/{dir}"))?.flatten() {
                let to = fs::read_link(e.path()).unwrap_or_default().to_string_lossy().into_owned();
                if to.contains("memfd:") {
                    paths.push(e.path());
                }
            }
        }
    }
    // SAFETY: takes integers.
    if unsafe { libc::setresgid(uid, uid, uid) } != 0 || unsafe { libc::setresuid(uid, uid, uid) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let opened = paths.iter().filter(|p| fs::File::open(p).is_ok()).count();
    println!("memory {} opened {opened}", paths.len());
    Ok(())
}

fn up(flags: i32) -> io::Result<()> {
    // SAFETY: takes an integer.
    if unsafe { libc::unshare(flags) } != 0 {
        println!("refused {}", io::Error::last_os_error());
        std::process::exit(0);
    }
    Ok(())
}

/// A network of its own, with a loopback that works.
fn own_network() -> io::Result<()> {
    up(libc::CLONE_NEWNET)?;
    harness::loopback_up()
}

/// In pid and mount namespaces of its own, where it is process 1 and sees its own /proc only.
fn own_pids(port: u16) -> io::Result<()> {
    up(libc::CLONE_NEWPID | libc::CLONE_NEWNS)?;
    // SAFETY: this process has one thread.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        let mut status = 0;
        // SAFETY: `status` is an int.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        return if status == 0 { Ok(()) } else { Err(io::Error::other(format!("status {status:#x}"))) };
    }
    let none = c"none".as_ptr();
    // SAFETY: NUL-terminated strings.
    unsafe {
        libc::mount(none, c"/".as_ptr(), std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE, std::ptr::null())
    };
    // SAFETY: as above.
    if unsafe { libc::mount(none, c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    println!("pid {}", std::process::id());
    talk(port)?;
    std::process::exit(0);
}

fn helper(a: &[String]) -> io::Result<()> {
    let number = |i: usize| a.get(i).and_then(|s| s.parse::<u32>().ok()).unwrap_or(0);
    match a[0].as_str() {
        "--both" => both(number(1) as u16),
        "--behind" => behind(a.get(1).map_or("", String::as_str)),
        "--serve" => serve(),
        "--talk" => talk(number(1) as u16),
        "--network" => own_network().and_then(|()| both(0)),
        "--pids" => own_pids(number(1) as u16),
        _ => pry(number(1), &a[2..]),
    }
}

// ---- the tests

/// This executable under a name of its own, where every user can read it, and the library with it.
fn prepared(name: &str) -> Result<(Run, PathBuf), Failed> {
    let lib = Lib::find()?;
    let mut run = Run::new(name);
    run.limit(Duration::from_secs(60));
    run.preload_copy(&lib);
    let exe = run.path("two-ends");
    // By another process: a child that another test of this one forks meanwhile would have the file open for writing,
    // and then it can't be executed (ETXTBSY).
    let own = env::current_exe().expect("our own path");
    let s =
        Command::new("install").args(["-m", "755"]).arg(own).arg(&exe).status().map_err(|e| e.to_string())?;
    ensure(s.success(), || "install failed".into())?;
    Ok((run, exe))
}

fn command(exe: &PathBuf, args: &[&str]) -> Command {
    let mut c = Command::new(exe);
    c.args(args).env("SMC_UPGRADE_AFTER", "0");
    c
}

fn ends(stats: &Stats, upgraded: u64) -> Result<(), Failed> {
    ensure(stats.shm == upgraded, || format!("{upgraded} upgraded ends were expected: {stats:?}"))
}

fn is_root() -> bool {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() == 0 }
}

/// Whether the kernel let the helper have what it asked for.
fn refused(out: &str) -> Option<&str> {
    out.lines().find_map(|l| l.strip_prefix("refused "))
}

fn one_process_holds_both_ends() -> Result<Completion, Failed> {
    let (run, exe) = prepared("both")?;
    let done = run.output_as("both", command(&exe, &["--both"]))?;
    let stats = done.stats.clone();
    let out = done.ok()?;
    ensure(out == "threads 1\nright\n", || out.clone())?;
    ends(&stats, 2)?;
    Ok(Completion::Completed)
}

/// Each form of a pattern, in both variables, matching and not.
fn policy() -> Result<Completion, Failed> {
    let (run, exe) = prepared("policy")?;
    let port = free_port();
    let other = if port == 16_001 { 16_002 } else { 16_001 };
    let cases = [
        ("only-port", "SMC_ONLY", port.to_string(), true),
        ("only-other-port", "SMC_ONLY", other.to_string(), false),
        ("except-port", "SMC_EXCLUDE", port.to_string(), false),
        ("except-other-port", "SMC_EXCLUDE", other.to_string(), true),
        ("only-net", "SMC_ONLY", "127.0.0.0/8".into(), true),
        ("only-address", "SMC_ONLY", "127.0.0.1".into(), true),
        ("only-other-net", "SMC_ONLY", "10.0.0.0/8,::1".into(), false),
        ("except-net", "SMC_EXCLUDE", "127.0.0.0/8".into(), false),
        ("except-other-net", "SMC_EXCLUDE", "10.0.0.0/8,127.0.0.2".into(), true),
        ("only-program", "SMC_ONLY", "two-ends".into(), true),
        ("only-other-program", "SMC_ONLY", "two".into(), false),
        ("except-program", "SMC_EXCLUDE", "nginx,two-ends".into(), false),
        ("except-other-program", "SMC_EXCLUDE", "two,nginx".into(), true),
    ];
    for (name, variable, value, upgraded) in cases {
        let mut c = command(&exe, &["--both", &port.to_string()]);
        c.env(variable, &value);
        let done = run.output_as(name, c)?;
        let stats = done.stats.clone();
        done.ok()?;
        let wrong = |what: &str| format!("{variable}={value}: {what}: {stats:?}");
        ensure(stats.shm == if upgraded { 2 } else { 0 }, || wrong("upgraded ends"))?;
        let excluded = stats.fallback.get("excluded").copied().unwrap_or(0);
        ensure(upgraded == (excluded == 0), || wrong("the reason"))?;
    }
    Ok(Completion::Completed)
}

/// A direction whose bytes somebody moves unseen stays on TCP.
fn counts_that_differ() -> Result<Completion, Failed> {
    let (run, exe) = prepared("behind")?;
    // What goes one way. With nothing unseen nearly all of both ways goes by memory.
    let one_way = (0..MESSAGES).map(|i| message(i).len() as u64).sum::<u64>();
    for (how, both_ways) in [("write", false), ("read", false), ("nothing", true)] {
        let done = run.output_as(how, command(&exe, &["--behind", how]))?;
        let stats = done.stats.clone();
        let out = done.ok()?;
        ensure(out == "right\n", || out.clone())?;
        let by_memory = stats.bytes.get("shm_tx").copied().unwrap_or(0);
        ensure(both_ways == (by_memory > one_way), || format!("{how} behind our back: {stats:?}"))?;
    }
    Ok(Completion::Completed)
}

fn a_network_of_its_own() -> Result<Completion, Failed> {
    let (run, exe) = prepared("network")?;
    let done = run.output_as("network", command(&exe, &["--network"]))?;
    let stats = done.stats.clone();
    let out = done.ok()?;
    if let Some(why) = refused(&out) {
        return left_out("a_network_of_its_own", &format!("no network namespace: {why}"));
    }
    ensure(out.ends_with("right\n"), || out.clone())?;
    ends(&stats, 2)?;
    Ok(Completion::Completed)
}

fn server(run: &Run, exe: &PathBuf, uid: Option<u32>) -> Result<(Running, String), Failed> {
    let mut c = command(exe, &["--serve"]);
    as_user(&mut c, uid);
    let mut s = run.start("server", c)?;
    s.until("a port", |s| s.stdout().contains("port "))?;
    let out = s.stdout();
    let port = out.lines().find_map(|l| l.strip_prefix("port ")).ok_or("no port")?.to_string();
    Ok((s, port))
}

fn as_user(c: &mut Command, uid: Option<u32>) {
    if let Some(uid) = uid {
        c.uid(uid).gid(uid);
    }
}

/// Containers of one pod: one network, and nothing else in common.
fn containers_that_share_a_network() -> Result<Completion, Failed> {
    let (run, exe) = prepared("pod")?;
    let (s, port) = server(&run, &exe, None)?;
    let done = run.output_as("client", command(&exe, &["--pids", &port]))?;
    let client = done.stats.clone();
    let out = done.ok()?;
    if let Some(why) = refused(&out) {
        return left_out("containers_that_share_a_network", &format!("no pid namespace: {why}"));
    }
    ensure(out == "pid 1\nright\n", || out.clone())?;
    let server = s.finish()?;
    ends(&client, 1)?;
    ends(&server.stats, 1)?;
    server.ok()?;
    Ok(Completion::Completed)
}

/// Each pair of users, upgraded; and nobody else gets at the memory.
fn different_users() -> Result<Completion, Failed> {
    if !is_root() {
        return left_out("different_users", "needs root to become others");
    }
    for (i, (a, b)) in
        [(Some(65_533), Some(65_534)), (None, Some(65_534)), (Some(65_534), None)].iter().enumerate()
    {
        let (run, exe) = prepared(&format!("users-{i}"))?;
        let (s, port) = server(&run, &exe, *a)?;
        let stay = run.path("stay");
        fs::write(&stay, "").map_err(|e| e.to_string())?;
        let mut c = command(&exe, &["--talk", &port]);
        as_user(&mut c, *b);
        c.env("STAY", &stay);
        let mut client = run.start("client", c)?;
        client.until("all messages", |c| c.stdout().contains("staying"))?;
        // A stranger, and where both ends are other users than root, each tries the other.
        let pids = [s.pid().to_string(), client.pid().to_string()];
        let mut stranger = command(&exe, &["--pry", "65532", &pids[0], &pids[1]]);
        stranger.env_remove("LD_PRELOAD");
        let out = run.output_as("stranger", stranger)?.ok()?;
        let found: usize = out.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        ensure(found >= 2 && out.ends_with("opened 0\n"), || format!("by a stranger: {out}"))?;
        // Nor is there a name left at which somebody could ask for it.
        let names = fs::read_to_string("/proc/net/unix").map_err(|e| e.to_string())?;
        let inodes: Vec<String> = pids.iter().flat_map(|p| listening_sockets(p, &names)).collect();
        ensure(inodes.is_empty(), || format!("still listening: {inodes:?}"))?;
        fs::remove_file(&stay).map_err(|e| e.to_string())?;
        let (client, server) = (client.finish()?, s.finish()?);
        ends(&client.stats, 1)?;
        ends(&server.stats, 1)?;
        client.ok()?;
        server.ok()?;
    }
    Ok(Completion::Completed)
}

/// The lines of /proc/net/unix for sockets of a process that accept connections (__SO_ACCEPTCON).
fn listening_sockets(pid: &str, names: &str) -> Vec<String> {
    let held: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| fs::read_link(e.path()).ok())
        .filter_map(|l| Some(l.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_string()))
        .collect();
    let is = |l: &&str| {
        let w: Vec<_> = l.split_whitespace().collect();
        w.get(3) == Some(&"00010000") && w.get(6).is_some_and(|i| held.iter().any(|h| h == i))
    };
    names.lines().filter(is).map(String::from).collect()
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let helpers = ["--both", "--behind", "--serve", "--talk", "--network", "--pids", "--pry"];
    if args.first().is_some_and(|a| helpers.contains(&a.as_str())) {
        return match helper(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{}: {e}", args.join(" "));
                ExitCode::FAILURE
            }
        };
    }
    let t = |name: &str, f: fn() -> Result<Completion, Failed>| Trial::ignorable_test(name, f);
    let trials = vec![
        t("one_process_holds_both_ends", one_process_holds_both_ends),
        t("policy", policy),
        t("counts_that_differ", counts_that_differ),
        t("a_network_of_its_own", a_network_of_its_own),
        t("containers_that_share_a_network", containers_that_share_a_network),
        t("different_users", different_users),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
