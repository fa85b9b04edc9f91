//! Programs that people use, none of which knows of libsmc.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, os::unix::fs::MetadataExt as _, os::unix::fs::PermissionsExt as _};

use super::cases::{less, more};
use super::{Case, Goal};
use crate::rounds::{Mode, Result, Round, free_port, number_after, wait_for_listener};
use crate::shell::{self, Running};

const MODES: &[Mode] = &[Mode::Tcp, Mode::Libsmc];
const WITH_SOCKMAP: &[Mode] = &[Mode::Tcp, Mode::Sockmap, Mode::Libsmc];
const REDIS: &[&str] = &["redis-server", "redis-benchmark"];

/// Where a program is; PostgreSQL's servers lie in folders of their version.
pub fn find(program: &str) -> Option<PathBuf> {
    shell::which(program).or_else(|| {
        let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
        versions.map(|v| v.path().join("bin").join(program)).find(|p| p.is_file())
    })
}

const fn redis_case(
    name: &'static str,
    what: &'static str,
    measures: &'static [(crate::rounds::Measure, &[Goal])],
    run: fn(&mut Round) -> Result<Vec<f64>>,
) -> Case {
    Case { name, what, needs: REDIS, measures, modes: WITH_SOCKMAP, upgrades: true, run }
}

const fn iperf_case(
    name: &'static str,
    what: &'static str,
    measures: &'static [(crate::rounds::Measure, &[Goal])],
    run: fn(&mut Round) -> Result<Vec<f64>>,
) -> Case {
    Case { name, what, needs: &["iperf3"], measures, modes: MODES, upgrades: true, run }
}

const TWICE_SOCKMAP: Goal = Goal::Of(Mode::Libsmc, Mode::Sockmap, 2.0);

pub const CASES: [Case; 15] = [
    Case {
        name: "sockperf",
        what: "ping-pong, 64 bytes; sockperf counts half a round trip",
        needs: &["sockperf"],
        measures: &[
            (less("p50", "us"), &[Goal::Times(40.0)]),
            (less("p99", "us"), &[]),
            (less("TCP's p50, libsmc's p99", "us"), &[Goal::Times(1.0)]),
        ],
        modes: MODES,
        upgrades: true,
        run: sockperf,
    },
    redis_case("redis-1", "GET, 1 client", &[(more("GET", "1000/s"), &[Goal::Times(5.0)])], |r| {
        redis(r, "1", "1")
    }),
    redis_case(
        "redis-50",
        "GET, 50 clients",
        &[(more("GET", "1000/s"), &[Goal::Times(4.0), TWICE_SOCKMAP])],
        |r| redis(r, "50", "1"),
    ),
    redis_case("redis-512", "GET, 512 clients", &[(more("GET", "1000/s"), &[Goal::Times(3.0)])], |r| {
        redis(r, "512", "1")
    }),
    redis_case("redis-1000", "GET, 1000 clients", &[(more("GET", "1000/s"), &[Goal::Times(3.0)])], |r| {
        redis(r, "1000", "1")
    }),
    redis_case("redis-P16", "GET, 50 clients, -P 16", &[(more("GET", "1000/s"), &[Goal::Times(1.3)])], |r| {
        redis(r, "50", "16")
    }),
    iperf_case("iperf3", "one stream", &[(more("stream", "Gbit/s"), &[Goal::Times(4.0)])], |r| {
        iperf3(r, &[])
    }),
    iperf_case("iperf3-R", "from the server", &[(more("stream", "Gbit/s"), &[Goal::Times(3.0)])], |r| {
        iperf3(r, &["-R"])
    }),
    iperf_case("iperf3-bidir", "both ways at once", &[(more("sum", "Gbit/s"), &[Goal::Times(3.0)])], |r| {
        iperf3(r, &["--bidir"])
    }),
    iperf_case("iperf3-P4", "four streams", &[(more("sum", "Gbit/s"), &[Goal::Times(3.0)])], |r| {
        iperf3(r, &["-P", "4"])
    }),
    Case {
        name: "memcached",
        what: "memcslap, 20 threads, get",
        needs: &["memcached", "memcslap"],
        measures: &[(more("get", "1000/s"), &[Goal::Times(3.0)])],
        modes: WITH_SOCKMAP,
        upgrades: true,
        run: memcached,
    },
    Case {
        name: "nginx",
        what: "wrk, 64 connections, a file of 1 KiB",
        needs: &["nginx", "wrk"],
        measures: &[(more("requests", "1000/s"), &[Goal::Times(2.0)])],
        modes: WITH_SOCKMAP,
        upgrades: true,
        run: wrk,
    },
    Case {
        name: "nginx-proxy",
        what: "the same by a second nginx that asks the first",
        needs: &["nginx", "wrk"],
        measures: &[(more("requests", "1000/s"), &[Goal::Times(1.7)])],
        modes: WITH_SOCKMAP,
        upgrades: true,
        run: proxied,
    },
    Case {
        name: "nginx-ab",
        what: "ab, a connection for each request, 8 at once",
        needs: &["nginx", "ab"],
        measures: &[(more("requests", "1000/s"), &[Goal::Times(0.97)])],
        modes: MODES,
        upgrades: false,
        run: ab,
    },
    Case {
        name: "pgbench",
        what: "pgbench -S, 8 clients",
        needs: &["postgres", "initdb", "pgbench"],
        measures: &[(more("transactions", "1000/s"), &[Goal::Times(1.4)])],
        modes: MODES,
        upgrades: true,
        run: pgbench,
    },
];

fn sockperf(round: &mut Round) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server = round.command("sockperf");
    let mut server = Running::start(server.args(["server", "--tcp", "-i", "127.0.0.1", "-p", &port]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let seconds = round.seconds.ceil().to_string();
    let mut client = round.command("sockperf");
    client.args(["ping-pong", "--tcp", "-i", "127.0.0.1", "-p", &port, "-m", "64", "-t", &seconds]);
    // A bounded rate: without it sockperf runs out of the sequence numbers that it sets aside by the second.
    let text = round.client(client.arg("--mps=1000000"), &mut server)?;
    let p50 = number_after(&text, "percentile 50.000 =")?;
    let p99 = number_after(&text, "percentile 99.000 =")?;
    Ok(vec![p50, p99, if round.mode == Mode::Tcp { p50 } else { p99 }])
}

fn redis(round: &mut Round, clients: &str, pipeline: &str) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server = round.command("redis-server");
    server.args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    let mut server = Running::start(server.args(["--maxclients", "2000"]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let per_second = if pipeline == "1" { 150_000.0 } else { 1_000_000.0 };
    let scale = if clients == "1" { 0.3 } else { 1.0 };
    let requests = ((round.seconds * per_second * scale) as u64).to_string();
    let mut client = round.command("redis-benchmark");
    client.args(["-p", &port, "-c", clients, "-P", pipeline, "-n", &requests, "-t", "get", "--csv"]);
    let csv = round.client(&mut client, &mut server)?;
    Ok(vec![number_after(&csv, "\"GET\",")? / 1000.0])
}

fn iperf3(round: &mut Round, more: &[&str]) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server = round.command("iperf3");
    let mut server = Running::start(server.args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let seconds = round.seconds.ceil().to_string();
    let mut client = round.command("iperf3");
    client.args(["-c", "127.0.0.1", "-p", &port, "-t", &seconds, "-J"]).args(more);
    let json = round.client(&mut client, &mut server)?;
    let sum = |key: &str| {
        let (_, rest) = json.split_once(key)?;
        number_after(rest, "\"bits_per_second\"").ok()
    };
    let one = sum("\"sum_received\"").ok_or("iperf3 counted nothing")?;
    Ok(vec![(one + sum("\"sum_received_bidir_reverse\"").unwrap_or(0.0)) * 1e-9])
}

fn memcached(round: &mut Round) -> Result<Vec<f64>> {
    const CLIENTS: f64 = 20.0;
    let port = free_port()?.to_string();
    let mut server = round.command("memcached");
    server.args(["-u", "nobody", "-l", "127.0.0.1", "-p", &port, "-U", "0", "-t", "4"]);
    let mut server = Running::start(&mut server)?;
    wait_for_listener(port.parse()?, &mut server)?;
    let each = (round.seconds * 6000.0).round();
    let mut client = round.command("memcslap");
    client.args([format!("--servers=127.0.0.1:{port}"), format!("--concurrency={CLIENTS}")]);
    client.args([format!("--execute-number={each}"), "--test=get".into(), "--initial-load=100".into()]);
    let text = round.client(&mut client, &mut server)?;
    // Time to get    60000 keys by   20 threads:     0.818 seconds.
    let (_, took) = text.split_once("Time to get").ok_or("memcslap measured nothing")?;
    Ok(vec![each * CLIENTS / number_after(took, "threads:")? / 1000.0])
}

/// nginx with one worker and a file of 1 KiB, and the file's address.
fn nginx(round: &Round) -> Result<(Running, String)> {
    fs::write(round.dir.join("file"), [b'x'; 1024])?;
    nginx_with(round, "n", "", &format!("root {};", round.dir.display()))
}

/// nginx with one worker, whose files' names begin with `name`; an address that the server's part `what` is asked for.
fn nginx_with(round: &Round, name: &str, http: &str, what: &str) -> Result<(Running, String)> {
    let port = free_port()?;
    let at = round.dir.join(name).display().to_string();
    fs::write(
        format!("{at}.conf"),
        format!(
            "daemon off; worker_processes 1; pid {at}.pid; error_log {at}.log;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {at}.b;\n\
             proxy_temp_path {at}.p; fastcgi_temp_path {at}.f; uwsgi_temp_path {at}.u; scgi_temp_path {at}.s;\n\
             {http}\n\
             server {{ listen 127.0.0.1:{port} backlog=1024; {what} }} }}\n"
        ),
    )?;
    let mut command = round.command("nginx");
    command.arg("-e").arg(format!("{at}.log")).arg("-c").arg(format!("{at}.conf"));
    // A killed master would leave its worker: one process is enough.
    command.args(["-g", "master_process off;"]);
    let mut server = Running::start(&mut command)?;
    wait_for_listener(port, &mut server)?;
    Ok((server, format!("http://127.0.0.1:{port}/file")))
}

fn proxied(round: &mut Round) -> Result<Vec<f64>> {
    let (_behind, url) = nginx(round)?;
    let place = url.trim_start_matches("http://").trim_end_matches("/file");
    let http = format!("upstream behind {{ server {place}; keepalive 64; keepalive_requests 100000000; }}");
    let what =
        "location / { proxy_pass http://behind; proxy_http_version 1.1; proxy_set_header Connection \"\"; }";
    let (mut server, url) = nginx_with(round, "front", &http, what)?;
    by_wrk(round, &mut server, &url)
}

fn wrk(round: &mut Round) -> Result<Vec<f64>> {
    let (mut server, url) = nginx(round)?;
    by_wrk(round, &mut server, &url)
}

fn by_wrk(round: &mut Round, server: &mut Running, url: &str) -> Result<Vec<f64>> {
    let seconds = round.seconds.ceil().to_string();
    let mut client = round.command("wrk");
    client.args(["-t", "1", "-c", "64", "-d", &seconds, url]);
    let text = round.client(&mut client, server)?;
    Ok(vec![number_after(&text, "Requests/sec:")? / 1000.0])
}

fn ab(round: &mut Round) -> Result<Vec<f64>> {
    let (mut server, url) = nginx(round)?;
    let requests = (round.seconds * 8000.0).round().to_string();
    let mut client = round.command("ab");
    let text = round.client(client.args(["-q", "-n", &requests, "-c", "8", &url]), &mut server)?;
    Ok(vec![number_after(&text, "Requests per second:")? / 1000.0])
}

/// The user that a PostgreSQL server runs as: it refuses to be root.
fn other_user() -> Option<(u32, u32)> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find(|l| l.starts_with("postgres:") || l.starts_with("nobody:"))?;
    let postgres = passwd.lines().find(|l| l.starts_with("postgres:")).unwrap_or(line);
    let mut ids = postgres.split(':').skip(2).filter_map(|n| n.parse().ok());
    Some((ids.next()?, ids.next()?))
}

fn own(path: &Path, user: Option<(u32, u32)>) -> Result<()> {
    if let Some((uid, gid)) = user {
        std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    debug_assert!(user.is_none_or(|u| fs::metadata(path).is_ok_and(|m| m.uid() == u.0)));
    Ok(())
}

fn pgbench(round: &mut Round) -> Result<Vec<f64>> {
    let user = if shell::is_root() { other_user() } else { None };
    let command = |program: &str| {
        let mut c = round.command(find(program).unwrap_or_else(|| program.into()));
        if let Some((uid, gid)) = user {
            c.gid(gid).uid(uid);
        }
        c
    };
    own(&round.dir, user)?;
    let data = round.dir.join("d");
    let made = command("initdb").arg("-D").arg(&data).args(["-A", "trust", "-N", "-U", "bench"]).output()?;
    if !made.status.success() {
        return Err(format!("initdb: {}", String::from_utf8_lossy(&made.stderr)).into());
    }
    let port = free_port()?.to_string();
    let mut server = command("postgres");
    server.arg("-D").arg(&data).args(["-p", &port, "-c", "listen_addresses=127.0.0.1"]);
    let mut server = Running::start(server.args(["-c", "unix_socket_directories=", "-c", "fsync=off"]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let to = ["-h", "127.0.0.1", "-p", &port, "-U", "bench"];
    let mut fill = command("pgbench");
    fill.env_remove("SMC_STATS").args(to).args(["-i", "-s", "1", "-q", "postgres"]);
    let mut n = 0;
    while !fill.output()?.status.success() {
        // It listens before it is ready.
        n += 1;
        if n > 50 {
            return Err("pgbench -i failed".into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let seconds = (round.seconds * 2.0).ceil().to_string();
    let mut client = command("pgbench");
    client.args(to).args(["-n", "-S", "-c", "8", "-j", "2", "-T", &seconds, "postgres"]);
    let text = round.client(&mut client, &mut server)?;
    server.end(Duration::from_secs(20))?;
    Ok(vec![number_after(&text, "tps =")? / 1000.0])
}
