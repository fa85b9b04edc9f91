//! The programs, one function each: start the server, use it, compare the bytes, end it so that it can count.

use crate::{
    Pair, Program,
    harness::{cmd, ensure, free_port, program},
};
use libc::{SIGINT, SIGTERM};
use libtest_mimic::Failed;
use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

type Outcome = Result<(), Failed>;

const fn p(
    name: &'static str,
    needs: &'static [&'static str],
    mixed: bool,
    run: fn(&Pair) -> Outcome,
) -> Program {
    Program { name, needs, mixed, run }
}

const REDIS: &[&str] = &["redis-server", "redis-cli", "redis-benchmark"];
const NGINX: &[&str] = &["nginx", "curl", "wrk", "ab"];
const JAVA: &[&str] = &["java", "javac"];

/// All of them.
pub const ALL: &[Program] = &[
    p("redis::one_client", REDIS, false, |p| redis_bench(p, &["-c", "1", "-n", "3000"], 0.0)),
    p("redis::fifty_clients", REDIS, true, |p| redis_bench(p, &["-c", "50", "-n", "50000"], 0.9)),
    p("redis::five_hundred_clients", REDIS, false, |p| redis_bench(p, &["-c", "500", "-n", "50000"], 0.0)),
    p("redis::pipelined", REDIS, false, |p| redis_bench(p, &["-c", "50", "-n", "300000", "-P", "16"], 0.9)),
    p("redis::big_values", REDIS, false, |p| redis_bench(p, &["-c", "10", "-n", "500", "-d", "200000"], 0.9)),
    p("redis::cli_values", REDIS, true, redis_values),
    p("redis::pub_sub", REDIS, false, redis_pub_sub),
    p("iperf3::default", &["iperf3"], true, |p| iperf3(p, &[])),
    p("iperf3::reverse", &["iperf3"], true, |p| iperf3(p, &["-R"])),
    p("iperf3::bidir", &["iperf3"], false, |p| iperf3(p, &["--bidir"])),
    p("iperf3::parallel", &["iperf3"], false, |p| iperf3(p, &["-P", "4"])),
    p("iperf3::zerocopy", &["iperf3"], false, |p| iperf3(p, &["-Z"])),
    p("iperf3::small_blocks", &["iperf3"], false, |p| iperf3(p, &["-l", "500", "-n", "20M"])),
    p("sockperf::ping_pong", &["sockperf"], true, sockperf),
    p("nginx::curl", NGINX, true, nginx_curl),
    p("nginx::wrk", NGINX, false, nginx_wrk),
    p("nginx::ab_keepalive", NGINX, false, nginx_ab),
    p("memcached::values", &["memcached"], true, memcached_values),
    p("memcached::memcslap", &["memcached", "memcslap"], false, memcached_slap),
    p("postgresql::pgbench", &["initdb", "postgres", "pgbench", "psql"], false, postgres_bench),
    p("postgresql::rows", &["initdb", "postgres", "psql"], true, postgres_rows),
    p("mariadb::rows", &["mariadbd", "mariadb", "mariadb-install-db"], true, mariadb_rows),
    p("python::http_server", &["python3", "curl"], true, python_http),
    p("java::blocking", JAVA, false, |p| java(p, "blocking")),
    p("java::nio", JAVA, true, |p| java(p, "nio")),
    p("node::http", &["node"], true, node_http),
    p("rsync::daemon", &["rsync"], true, rsync_daemon),
];

/// Bytes without a pattern, always the same.
fn noise(n: usize) -> Vec<u8> {
    let mut x = 0x2545_F491_4F6C_DD1D_u64;
    let mut v = Vec::with_capacity(n + 8);
    while v.len() < n {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        v.extend(x.to_le_bytes());
    }
    v.truncate(n);
    v
}

fn is_root() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::geteuid() == 0 }
}

/// Servers that refuse to be root run as this user then.
fn as_user(user: &str, c: Command) -> Command {
    if !is_root() {
        return c;
    }
    let mut s = Command::new("setpriv");
    s.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--init-groups"]);
    s.arg(c.get_program()).args(c.get_args());
    for (k, v) in c.get_envs() {
        match v {
            Some(v) => s.env(k, v),
            None => s.env_remove(k),
        };
    }
    s
}

fn give_to(user: &str, dir: &Path) -> Outcome {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(|e| e.to_string())?;
    if is_root() {
        let ok = Command::new("chown").arg(format!("{user}:")).arg(dir).status().is_ok_and(|s| s.success());
        ensure(ok, || format!("cannot chown to {user}"))?;
    }
    Ok(())
}

fn redis(p: &Pair) -> Result<(crate::harness::Running, String), Failed> {
    let port = free_port();
    let text = port.to_string();
    let mut c =
        cmd("redis-server", &["--port", &text, "--bind", "127.0.0.1", "--save", "", "--maxclients", "2000"]);
    c.current_dir(p.dir());
    Ok((p.serve(c, port)?, text))
}

fn redis_bench(p: &Pair, args: &[&str], share: f64) -> Outcome {
    let (s, port) = redis(p)?;
    let mut c = cmd("redis-benchmark", &["-p", &port, "--csv", "-t", "set,get"]);
    c.args(args);
    let out = p.big_client("benchmark", c, share)?;
    ensure(out.contains("\"SET\"") && out.contains("\"GET\""), || out.clone())?;
    p.stop(s, SIGTERM, share).map(|_| ())
}

fn redis_values(p: &Pair) -> Outcome {
    let (s, port) = redis(p)?;
    // The commands come from a file: redis-cli reads them from its stdin.
    let mut script = String::new();
    let mut want = String::new();
    for i in 0..600usize {
        let v: String = noise(i * 20).iter().map(|b| char::from(b'a' + b % 26)).collect();
        script += &format!("SET k{i} \"{v}\"\nGET k{i}\n");
        want += &format!("OK\n{v}\n");
    }
    let file = p.path("commands");
    fs::write(&file, script).map_err(|e| e.to_string())?;
    let c = shell("redis-cli -p $1 <$2", &[&port, &file]);
    let got = p.client("cli", c)?;
    ensure(got == want, || format!("{} bytes instead of {}", got.len(), want.len()))?;
    p.stop(s, SIGTERM, 0.0).map(|_| ())
}

/// A line of shell with arguments, for programs that want a file as their stdin.
fn shell(line: &str, args: &[&str]) -> Command {
    let mut c = cmd("sh", &["-c", &format!("exec {line}"), "sh"]);
    c.args(args);
    c
}

fn redis_pub_sub(p: &Pair) -> Outcome {
    let (s, port) = redis(p)?;
    let mut sub = p.client_start("subscriber", cmd("redis-cli", &["-p", &port, "subscribe", "news"]))?;
    sub.until("the subscription", |s| s.stdout().contains("subscribe"))?;
    let script: String = (0..2000).map(|i| format!("PUBLISH news message-{i}\n")).collect();
    let file = p.path("commands");
    fs::write(&file, script).map_err(|e| e.to_string())?;
    let got = p.client("publisher", shell("redis-cli -p $1 <$2", &[&port, &file]))?;
    ensure(got == "1\n".repeat(2000), || got.clone())?;
    sub.until("the last message", |s| s.stdout().ends_with("message-1999\n"))?;
    let got: Vec<String> =
        sub.stdout().lines().filter(|l| l.starts_with("message-")).map(String::from).collect();
    ensure(got == (0..2000).map(|i| format!("message-{i}")).collect::<Vec<_>>(), || {
        format!("{} messages", got.len())
    })?;
    drop(sub);
    p.stop(s, SIGTERM, 0.0).map(|_| ())
}

fn iperf3(p: &Pair, args: &[&str]) -> Outcome {
    let port = free_port();
    let text = port.to_string();
    let s = p.serve(cmd("iperf3", &["-s", "-1", "-B", "127.0.0.1", "-p", &text]), port)?;
    let mut c = cmd("iperf3", &["-c", "127.0.0.1", "-p", &text, "-J"]);
    if !args.contains(&"-n") {
        c.args(["-n", "300M"]);
    }
    c.args(args);
    let out = p.big_client("client", c, 0.9)?;
    let v: serde_json::Value = serde_json::from_str(&out).map_err(|e| format!("{e}: {out}"))?;
    ensure(v.get("error").is_none(), || v["error"].to_string())?;
    let bytes = v["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
    ensure(bytes >= 15_000_000, || format!("{bytes} bytes received"))?;
    p.ends(s, 0.9)
}

fn sockperf(p: &Pair) -> Outcome {
    let port = free_port();
    let text = port.to_string();
    let s = p.serve(cmd("sockperf", &["server", "--tcp", "-i", "127.0.0.1", "-p", &text]), port)?;
    let c = cmd(
        "sockperf",
        &[
            "ping-pong",
            "--tcp",
            "-i",
            "127.0.0.1",
            "-p",
            &text,
            "-t",
            "2",
            "-m",
            "64",
            "--full-rtt",
            "--mps=1000000",
        ],
    );
    let out = p.big_client("client", c, 0.9)?;
    ensure(out.contains("percentile 50"), || out.clone())?;
    ensure(!out.contains("out-of-order messages = 1"), || out.clone())?;
    p.stop(s, SIGINT, 0.9).map(|_| ())
}

/// Master and two workers; as root the workers are another user.
fn nginx(p: &Pair) -> Result<(crate::harness::Running, u16), Failed> {
    let port = free_port();
    let dir = p.dir().display();
    let user = if is_root() { "user www-data;" } else { "" };
    let conf = format!(
        "{user} worker_processes 2; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log;
         events {{ worker_connections 1000; }}
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; root {dir}/www;
           client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
           uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
           server {{ listen 127.0.0.1:{port}; }}
           server {{ listen 127.0.0.1:{}; sendfile off; }} }}",
        free_port()
    );
    let www = p.dir().join("www");
    fs::create_dir(&www).map_err(|e| e.to_string())?;
    fs::write(www.join("big"), noise(300 << 20)).map_err(|e| e.to_string())?;
    fs::write(www.join("small"), noise(900)).map_err(|e| e.to_string())?;
    let file = p.path("nginx.conf");
    fs::write(&file, conf).map_err(|e| e.to_string())?;
    Ok((p.serve(cmd("nginx", &["-c", &file, "-e", "stderr"]), port)?, port))
}

/// Fetches a URL into a file and compares.
fn fetch(p: &Pair, name: &str, url: &str, want: &[u8], share: f64) -> Outcome {
    let file = p.path(name);
    let c = cmd("curl", &["-sS", "--fail", "--noproxy", "*", "-o", &file, url]);
    p.big_client(name, c, share)?;
    let got = fs::read(&file).map_err(|e| e.to_string())?;
    ensure(got == want, || format!("{url}: {} bytes, of which not all are right", got.len()))
}

fn nginx_curl(p: &Pair) -> Outcome {
    let (s, port) = nginx(p)?;
    for i in 0..3 {
        fetch(p, &format!("curl{i}"), &format!("http://127.0.0.1:{port}/big"), &noise(300 << 20), 0.95)?;
    }
    p.stop(s, libc::SIGQUIT, 0.9).map(|_| ())
}

fn nginx_wrk(p: &Pair) -> Outcome {
    let (s, port) = nginx(p)?;
    let out = p.big_client(
        "wrk",
        cmd("wrk", &["-t2", "-c50", "-d3s", &format!("http://127.0.0.1:{port}/small")]),
        0.9,
    )?;
    ensure(out.contains("requests in"), || out.clone())?;
    ensure(!out.contains("Socket errors") && !out.contains("Non-2xx"), || out.clone())?;
    p.stop(s, libc::SIGQUIT, 0.9).map(|_| ())
}

fn nginx_ab(p: &Pair) -> Outcome {
    let (s, port) = nginx(p)?;
    let url = format!("http://127.0.0.1:{port}/small");
    let out = p.big_client("ab", cmd("ab", &["-q", "-k", "-n", "30000", "-c", "30", &url]), 0.9)?;
    let failed = out.lines().find(|l| l.starts_with("Failed requests")).unwrap_or("").to_string();
    ensure(failed.ends_with(" 0") && !out.contains("Non-2xx"), || out.clone())?;
    // Without keep-alive every connection is too short to pay, and just works.
    let out = p.small_client("ab-short", cmd("ab", &["-q", "-n", "1000", "-c", "20", &url]))?;
    ensure(out.contains("Complete requests:      1000"), || out.clone())?;
    p.stop(s, libc::SIGQUIT, 0.0).map(|_| ())
}

fn memcached(p: &Pair) -> Result<(crate::harness::Running, String), Failed> {
    let port = free_port();
    let text = port.to_string();
    let mut c =
        cmd("memcached", &["-l", "127.0.0.1", "-p", &text, "-U", "0", "-t", "3", "-I", "8m", "-m", "256"]);
    if is_root() {
        c.args(["-u", "nobody"]);
    }
    Ok((p.serve(c, port)?, text))
}

fn memcached_values(p: &Pair) -> Outcome {
    let (s, port) = memcached(p)?;
    let mut c = Command::new(env::current_exe().map_err(|e| e.to_string())?);
    c.args(["--memcached-client", &port]);
    let out = p.big_client("client", c, 0.9)?;
    ensure(out == "all right\n", || out.clone())?;
    p.stop(s, SIGTERM, 0.9).map(|_| ())
}

/// The client of `memcached_values`, in a process of its own: sets values of many sizes and gets them back.
pub fn memcached_client(port: &str) {
    let s = TcpStream::connect(format!("127.0.0.1:{port}")).expect("connect");
    let mut r = BufReader::new(s.try_clone().expect("clone"));
    let mut w = s;
    let mut line = String::new();
    let sizes: Vec<usize> = (0..500).map(|i| i * 101).chain([1 << 20, 5 << 20]).collect();
    for (i, n) in sizes.iter().enumerate() {
        let v = noise(*n);
        w.write_all(format!("set k{i} 0 0 {n}\r\n").as_bytes()).expect("write");
        w.write_all(&v).expect("write");
        w.write_all(b"\r\n").expect("write");
        line.clear();
        r.read_line(&mut line).expect("read");
        assert_eq!(line, "STORED\r\n");
        w.write_all(format!("get k{i}\r\n").as_bytes()).expect("write");
        line.clear();
        r.read_line(&mut line).expect("read");
        assert_eq!(line, format!("VALUE k{i} 0 {n}\r\n"));
        let mut got = vec![0; n + 7];
        r.read_exact(&mut got).expect("read");
        assert!(got[..*n] == v && got[*n..] == *b"\r\nEND\r\n", "wrong bytes of k{i}");
    }
    println!("all right");
}

fn memcached_slap(p: &Pair) -> Outcome {
    let (s, port) = memcached(p)?;
    for test in ["get", "set"] {
        let c = cmd(
            "memcslap",
            &[
                &format!("--servers=127.0.0.1:{port}"),
                "--concurrency=20",
                "--execute-number=500",
                &format!("--test={test}"),
            ],
        );
        p.client(&format!("slap-{test}"), c)?;
    }
    p.stop(s, SIGTERM, 0.0).map(|_| ())
}

fn postgres(p: &Pair) -> Result<(crate::harness::Running, Vec<String>), Failed> {
    let port = free_port();
    let data = p.dir().join("data");
    fs::create_dir(&data).map_err(|e| e.to_string())?;
    give_to("postgres", &data)?;
    let path = data.display().to_string();
    let mut init = as_user("postgres", cmd("initdb", &["-D", &path, "-A", "trust", "-U", "postgres", "-N"]));
    init.current_dir("/");
    p.prepare("initdb", init)?;
    let text = port.to_string();
    let args = [
        "-D",
        &path,
        "-p",
        &text,
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
        "-c",
        "fsync=off",
    ];
    let mut c = as_user("postgres", cmd("postgres", &args));
    c.current_dir("/");
    let mut s = p.serve(c, port)?;
    s.until("ready", |s| s.stderr().contains("ready to accept connections"))?;
    let to = ["-h", "127.0.0.1", "-p", &text, "-U", "postgres"].map(String::from).to_vec();
    Ok((s, to))
}

/// psql and pgbench as they are: Debian's wrappers are Perl and would be in the way.
fn pg(tool: &str, to: &[String], args: &[&str]) -> Command {
    let beside = program("initdb").and_then(|i| i.canonicalize().ok()).map(|i| i.with_file_name(tool));
    let tool: PathBuf =
        beside.filter(|t| t.is_file()).or_else(|| program(tool)).unwrap_or_else(|| tool.into());
    let mut c = Command::new(tool);
    c.args(to).args(args).env("LC_ALL", "C.UTF-8").env("PGDATABASE", "postgres").current_dir("/");
    c
}

fn postgres_bench(p: &Pair) -> Outcome {
    let (s, to) = postgres(p)?;
    p.small_client("init", pg("pgbench", &to, &["-i", "-s", "1", "-q"]))?;
    for mode in ["simple", "prepared"] {
        let c = pg("pgbench", &to, &["-n", "-M", mode, "-c", "8", "-j", "2", "-t", "300"]);
        let out = p.client(&format!("pgbench-{mode}"), c)?;
        ensure(out.contains("actually processed: 2400/2400"), || out.clone())?;
    }
    let out = p.client("select", pg("pgbench", &to, &["-n", "-S", "-c", "50", "-j", "2", "-t", "200"]))?;
    ensure(out.contains("actually processed: 10000/10000"), || out.clone())?;
    p.stop(s, SIGINT, 0.0).map(|_| ())
}

fn postgres_rows(p: &Pair) -> Outcome {
    let (s, to) = postgres(p)?;
    let sql = "select repeat(i::text, 20) from generate_series(1, 1000000) i";
    let got = p.big_client("psql", pg("psql", &to, &["-XqAt", "-c", sql]), 0.9)?;
    let want: String = (1..=1_000_000).map(|i| i.to_string().repeat(20) + "\n").collect();
    ensure(got == want, || format!("{} bytes instead of {}", got.len(), want.len()))?;
    // And the other way: rows from the client.
    let rows: String = (1..=1_000_000).map(|i| format!("{i}\tvalue {i}\n")).collect();
    let file = p.path("rows");
    fs::write(&file, &rows).map_err(|e| e.to_string())?;
    let copy = format!("\\copy c from '{file}'");
    let c = pg(
        "psql",
        &to,
        &[
            "-XqAt",
            "-c",
            "create table c(a int, b text)",
            "-c",
            &copy,
            "-c",
            "select sum(a::bigint), count(*), max(length(b)) from c",
        ],
    );
    // psql moves few megabytes here. On a busy machine the kernel buffers some of them before the switch: up to
    // net.ipv4.tcp_wmem's and tcp_rmem's last number, 10 in all.
    let got = p.big_client("copy", c, 0.45)?;
    ensure(got == "500000500000|1000000|13\n", || got.clone())?;
    p.stop(s, SIGINT, 0.9).map(|_| ())
}

fn mariadb_rows(p: &Pair) -> Outcome {
    let port = free_port();
    let data = p.dir().join("data");
    fs::create_dir(&data).map_err(|e| e.to_string())?;
    give_to("mysql", &data)?;
    let datadir = format!("--datadir={}", data.display());
    let mut init =
        cmd("mariadb-install-db", &["--no-defaults", &datadir, "--auth-root-authentication-method=normal"]);
    let mut c = cmd("mariadbd", &["--no-defaults", &datadir, "--bind-address=127.0.0.1"]);
    if is_root() {
        init.arg("--user=mysql");
        c.arg("--user=mysql");
    }
    // A server that starts clears the temporary tables of its folder, also those of another one.
    let temporary = p.dir().join("temporary");
    fs::create_dir(&temporary).map_err(|e| e.to_string())?;
    give_to("mysql", &temporary)?;
    for c in [&mut init, &mut c] {
        c.env("TMPDIR", &temporary);
    }
    p.prepare("install", init)?;
    c.arg(format!("--port={port}")).arg(format!("--socket={}", p.path("data/sock")));
    let s = p.serve(c, port)?;
    let text = port.to_string();
    let sql = |q: &str| {
        cmd(
            "mariadb",
            &["--no-defaults", "-h", "127.0.0.1", "--protocol=tcp", "-u", "root", "-P", &text, "-NBe", q],
        )
    };
    let got = p.big_client("rows", sql("select repeat(seq, 10) from mysql.seq_1_to_1000000"), 0.95)?;
    let want: String = (1..=1_000_000).map(|i| i.to_string().repeat(10) + "\n").collect();
    ensure(got == want, || format!("{} bytes instead of {}", got.len(), want.len()))?;
    let many: String = (0..300).map(|i| format!("select {i};")).collect();
    let got = p.client("many", sql(&many))?;
    ensure(got == (0..300).map(|i| format!("{i}\n")).collect::<String>(), || got.clone())?;
    p.stop(s, SIGTERM, 0.9).map(|_| ())
}

fn python_http(p: &Pair) -> Outcome {
    let port = free_port();
    fs::write(p.dir().join("big"), noise(100 << 20)).map_err(|e| e.to_string())?;
    // The interpreter itself: `python3` may be a script that picks one.
    let exe = p.prepare("which", cmd("python3", &["-c", "import sys; print(sys.executable)"]))?;
    // SIGINT is Python's own way to end it; it says so with a status.
    let mut c = cmd(exe.trim(), &["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1"]);
    c.current_dir(p.dir());
    let s = p.serve(c, port)?;
    for i in 0..2 {
        fetch(p, &format!("curl{i}"), &format!("http://127.0.0.1:{port}/big"), &noise(100 << 20), 0.95)?;
    }
    p.stop(s, SIGINT, 0.9).map(|_| ())
}

/// Trees pushed, changed, pushed as differences and pulled again. Whoever receives has two processes on one connection,
/// which is upgraded only if that was done before they part: so nothing is said of the share.
fn rsync_daemon(p: &Pair) -> Outcome {
    let port = free_port();
    let (src, module, back) = (p.dir().join("src"), p.dir().join("module"), p.dir().join("back"));
    let io = |e: std::io::Error| e.to_string();
    for d in [&src, &module, &back] {
        fs::create_dir_all(d.join("deep/er")).map_err(io)?;
    }
    for i in 0..100 {
        fs::write(src.join(format!("deep/er/{i}")), noise(i * 3001)).map_err(io)?;
    }
    fs::write(src.join("big"), noise(30 << 20)).map_err(io)?;
    let conf = format!(
        "pid file = {}\nuse chroot = no\n[m]\npath = {}\nread only = no\n{}",
        p.path("pid"),
        module.display(),
        if is_root() { "uid = root\ngid = root\n" } else { "" },
    );
    fs::write(p.dir().join("conf"), conf).map_err(io)?;
    let (conf, text) = (format!("--config={}", p.path("conf")), format!("--port={port}"));
    let s = p.serve(cmd("rsync", &["--daemon", "--no-detach", &conf, &text, "--address=127.0.0.1"]), port)?;
    let url = format!("rsync://127.0.0.1:{port}/m/");
    let dir = |d: &Path| format!("{}/", d.display());
    let same = |a: &Path, b: &Path| {
        let d = cmd("diff", &["-r", &a.display().to_string(), &b.display().to_string()]).output();
        ensure(d.as_ref().is_ok_and(|d| d.status.success()), || format!("the trees differ: {d:?}"))
    };
    p.small_client("push", cmd("rsync", &["-a", &dir(&src), &url]))?;
    same(&src, &module)?;
    // rsync goes by size and time: the time of this change is another one for sure.
    let mut big = fs::OpenOptions::new().write(true).open(src.join("big")).map_err(io)?;
    big.seek(SeekFrom::Start(12_345_678)).and_then(|_| big.write_all(b"X")).map_err(io)?;
    big.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).map_err(io)?;
    p.small_client("delta", cmd("rsync", &["-az", "--no-whole-file", "--delete", &dir(&src), &url]))?;
    same(&src, &module)?;
    p.small_client("pull", cmd("rsync", &["-a", &url, &dir(&back)]))?;
    same(&src, &back)?;
    s.stop(SIGTERM).map(|_| ())
}

fn java(p: &Pair, kind: &str) -> Outcome {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/Echo.java").display().to_string();
    let dir = p.path("");
    p.prepare("javac", cmd("javac", &["-d", &dir, &src]))?;
    let port = free_port();
    let text = port.to_string();
    let run = |args: &[&str]| {
        let mut c = cmd("java", &["-XX:+UseSerialGC", "-Xmx256m", "-cp", &dir, "Echo"]);
        c.args(args);
        c
    };
    let s = p.serve(run(&[kind, &text, "4"]), port)?;
    let out = p.big_client("client", run(&["client", &text, "4", "3000000"]), 0.9)?;
    ensure(out == "all right\n", || out.clone())?;
    p.ends(s, 0.9)
}

fn node_http(p: &Pair) -> Outcome {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/echo.js").display().to_string();
    let port = free_port();
    let text = port.to_string();
    let s = p.serve(cmd("node", &[&src, "server", &text]), port)?;
    let out = p.big_client("client", cmd("node", &[&src, "client", &text]), 0.9)?;
    ensure(out == "all right\n", || out.clone())?;
    p.ends(s, 0.9)
}
