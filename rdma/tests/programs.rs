//! Programs that know nothing of libsmc, each a server and a client under libsmc.so, over RDMA: redis, iperf3, nginx with
//! curl and wrk, PostgreSQL with psql and pgbench. What a program checks of its bytes is checked, `smc ss` shows both
//! ends in mode RDMA, and no client has a connection by TCP. One of them is done once more with lost packets.
//!
//! As in `preload.rs`, both ends are on one host, and `SMC_TEST_REMOTE` makes them each other's other host. A program
//! that is not installed is left out, and told so.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

/// The two addresses.
fn ends() -> [String; 2] {
    let told = std::env::var("SMC_TEST_RDMA").expect("SMC_TEST_RDMA: run this by `cargo xtask vm`");
    let words: Vec<_> = told.split_whitespace().map(str::to_string).collect();
    [words[1].clone(), words[3].clone()]
}

/// A folder for both libraries, side by side, and for what the programs write. Anybody may write there: PostgreSQL does
/// not run as root.
fn folder() -> &'static Path {
    static AT: OnceLock<PathBuf> = OnceLock::new();
    AT.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("smc-programs-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let own = std::env::current_exe().unwrap();
        fs::copy(std::env::var_os("SMC_LIBRARY").unwrap(), folder.join("libsmc.so")).unwrap();
        fs::copy(own.ancestors().nth(2).unwrap().join("libsmc_rdma.so"), folder.join("libsmc-rdma.so"))
            .unwrap();
        assert!(Command::new("chmod").arg("1777").arg(&folder).status().unwrap().success());
        folder
    })
}

fn path_of(program: &str) -> Option<PathBuf> {
    let more =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|v| v.path().join("bin"));
    let path = std::env::var_os("PATH").unwrap();
    let all = std::env::split_paths(&path).chain(["/usr/sbin".into()]).chain(more);
    all.map(|p| p.join(program)).find(|p| p.exists())
}

/// Whether all of these are installed.
fn have(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|p| path_of(p).is_none());
    missing.inspect(|m| println!("left out: no {m}")).is_none()
}

/// A program under the library; its statistics are in `NAME.stats` in the folder.
fn under(program: &str, name: &str, args: &[&str]) -> Command {
    let mut c = Command::new("env");
    c.arg(format!("LD_PRELOAD={}", folder().join("libsmc.so").display()));
    c.arg(path_of(program).unwrap()).args(args).current_dir(folder());
    c.env("SMC_PEERS", "10.77.0.0/24").env("SMC_TEST_REMOTE", "1");
    c.env("SMC_STATS", folder().join(format!("{name}.stats")));
    c.stdin(Stdio::null());
    c
}

/// A server; killed at the end. What it said is shown if the test has failed.
struct Server(Child);

impl Server {
    fn said() -> PathBuf {
        folder().join("server.said")
    }

    fn start(c: &mut Command) -> Self {
        let said = fs::File::create(Self::said()).unwrap();
        Self(c.stdout(said.try_clone().unwrap()).stderr(said).spawn().unwrap())
    }

    /// Until the client that is asked says that it is there.
    fn is_up(&mut self, ask: impl Fn() -> bool) {
        while !ask() {
            assert!(self.0.try_wait().unwrap().is_none(), "the server has ended");
            thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        if thread::panicking() {
            println!("the server:\n{}", fs::read_to_string(Self::said()).unwrap_or_default());
        }
    }
}

/// Ends well, and what it said.
fn well(c: &mut Command) -> String {
    let Output { status, stdout, stderr } = c.output().unwrap();
    let said = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{status}\n{said}\n{}", String::from_utf8_lossy(&stderr));
    said
}

fn number(json: &str, name: &str) -> u64 {
    let at = json.find(&format!("\"{name}\":")).map(|at| at + name.len() + 3).unwrap();
    json[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// A client ends well, with all its bytes by RDMA: so many at least.
fn client(program: &str, args: &[&str], least: u64) -> String {
    let said = well(&mut under(program, "client", args));
    let json = fs::read_to_string(folder().join("client.stats")).unwrap();
    let moved = number(&json, "rdma_tx") + number(&json, "rdma_rx");
    assert!(moved >= least, "{program}: {json}");
    assert_eq!((number(&json, "tcp_tx"), number(&json, "tcp_rx")), (0, 0), "{program}: {json}");
    said
}

/// While a client runs, `smc ss` shows a connection of it and one of the server's, both in mode RDMA.
fn both_ends_show(program: &str, args: &[&str], server: &str) {
    let mut c = under(program, "shown", args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let smc = Path::new(&std::env::var_os("SMC_LIBRARY").unwrap()).with_file_name("smc");
    loop {
        let seen = well(Command::new(&smc).arg("ss"));
        let has =
            |name: &str| seen.lines().any(|l| l.starts_with("RDMA") && l.contains(&format!(" {name} ")));
        if has(program) && has(server) {
            break;
        }
        assert!(c.try_wait().unwrap().is_none(), "{program} has ended and was not seen:\n{seen}");
    }
    assert!(c.wait().unwrap().success(), "{program}");
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn redis() {
    if !have(&["redis-server", "redis-cli", "redis-benchmark"]) {
        return;
    }
    let [_, at] = ends();
    let words = ["--bind", &at, "--port", "6379", "--save", "", "--protected-mode", "no"];
    let mut server = Server::start(&mut under("redis-server", "server", &words));
    let us = ["-h", &at];
    server.is_up(|| {
        under("redis-cli", "asked", &[&us[..], &["ping"]].concat()).output().unwrap().stdout == b"PONG\n"
    });
    let value = "0123456789abcdef".repeat(4096);
    fs::write(folder().join("value"), &value).unwrap();
    let mut set = under("redis-cli", "set", &[&us[..], &["-x", "set", "key"]].concat());
    assert_eq!(well(set.stdin(fs::File::open(folder().join("value")).unwrap())), "OK\n");
    assert_eq!(client("redis-cli", &[&us[..], &["get", "key"]].concat(), 65536), format!("{value}\n"));
    for (clients, pipeline, n) in [("1", "1", "300"), ("16", "16", "4000")] {
        let words = [&us[..], &["-t", "get,set", "-q", "-d", "500", "-n", n, "-c", clients, "-P", pipeline]];
        let said = client("redis-benchmark", &words.concat(), 1000 * n.parse::<u64>().unwrap());
        assert_eq!(said.matches("requests per second").count(), 2, "{said}");
    }
    // Of so many some may be closed before they are on their link.
    let words = [&us[..], &["-t", "get,set", "-q", "-d", "500", "-n", "2000", "-c", "50"]].concat();
    let said = well(&mut under("redis-benchmark", "many", &words));
    assert_eq!(said.matches("requests per second").count(), 2, "{said}");
    both_ends_show(
        "redis-benchmark",
        &[&us[..], &["-t", "get", "-q", "-n", "3000", "-c", "8"]].concat(),
        "redis-server",
    );
}

/// A server for each of the ways.
fn iperf3(port: &str, bytes: &str, ways: &[&[&str]]) {
    let [from, at] = ends();
    for way in ways {
        let words = ["-s", "-B", &at, "-p", port, "--one-off"];
        let mut server = Server::start(&mut under("iperf3", "server", &words));
        // A line of the kernel's list of listeners: asking would be the one client that is served.
        let listens = || well(Command::new("ss").args(["-Hltn"])).contains(&format!("{at}:{port} "));
        server.is_up(listens);
        let words = [&["-c", &at, "-B", &from, "-p", port, "-n", bytes, "-J"][..], way].concat();
        let said = client("iperf3", &words, number(&format!("\"n\":{bytes}"), "n"));
        assert!(!said.contains("\"error\""), "{said}");
        assert!(server.0.wait().unwrap().success());
    }
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn iperf3_each_way() {
    if have(&["iperf3", "ss"]) {
        iperf3("5201", "4000000", &[&[], &["-R"], &["--bidir"], &["-P", "4"]]);
    }
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn nginx_with_curl_and_wrk() {
    if !have(&["nginx", "curl", "wrk"]) {
        return;
    }
    let ([_, at], dir) = (ends(), folder().display());
    let bytes: Vec<u8> =
        (0..3_000_000u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    fs::write(folder().join("big"), &bytes).unwrap();
    fs::write(folder().join("small"), "small\n").unwrap();
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|n| format!("{n}_temp_path {dir}/{n};\n"))
        .concat();
    let conf = format!(
        "worker_processes 2; daemon off; user root; error_log {dir}/nginx.log; pid {dir}/nginx.pid;\n\
         events {{}}\nhttp {{ access_log off; sendfile on;\n{temp}server {{ listen {at}:8080; root {dir}; }} }}\n"
    );
    let file = folder().join("nginx.conf").display().to_string();
    fs::write(&file, conf).unwrap();
    let mut server = Server::start(&mut under("nginx", "server", &["-c", &file]));
    let url = |name: &str| format!("http://{at}:8080/{name}");
    let (big, small) = (url("big"), url("small"));
    server.is_up(|| under("curl", "asked", &["-s", &small]).output().unwrap().stdout == b"small\n");
    let got = folder().join("got").display().to_string();
    for words in [&["-sS", &small, &big, "-o", "/dev/null", "-o", &got][..], &["-sS", &big, "-o", &got]] {
        client("curl", words, 3_000_000);
        assert!(fs::read(&got).unwrap() == bytes, "curl has other bytes than nginx");
    }
    let said = client("wrk", &["-t1", "-c8", "-d3", &small], 10_000);
    assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    both_ends_show("wrk", &["-t1", "-c8", "-d3", &small], "nginx");
    let pid = fs::read_to_string(folder().join("nginx.pid")).unwrap();
    well(Command::new("kill").args(["-QUIT", pid.trim()]));
    assert!(server.0.wait().unwrap().success());
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn postgresql() {
    if !have(&["initdb", "postgres", "psql", "pgbench", "setpriv"]) {
        return;
    }
    let ([_, at], data) = (ends(), folder().join("data").display().to_string());
    let nobody = ["--reuid=nobody", "--clear-groups"];
    let initdb = path_of("initdb").unwrap().display().to_string();
    let made = ["-D", &data, "-A", "trust", "-U", "postgres", "--no-sync"];
    well(Command::new("setpriv").args(nobody).arg(initdb).args(made).current_dir(folder()));
    let hba = Path::new(&data).join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("{rules}\nhost all all 10.77.0.0/24 trust\n")).unwrap();
    let postgres = path_of("postgres").unwrap().display().to_string();
    let (listen, sockets) = (format!("listen_addresses={at}"), "unix_socket_directories=".to_string());
    let words =
        [&nobody[..], &[&postgres, "-D", &data, "-c", &listen, "-c", &sockets, "-c", "fsync=off"]].concat();
    let mut server = Server::start(&mut under("setpriv", "server.%p", &words));
    let us = ["-h", &at, "-U", "postgres"];
    let sql = |text: &'static str| [&us[..], &["-Atc", text]].concat();
    server.is_up(|| under("psql", "asked", &sql("select 1")).output().unwrap().stdout == b"1\n");
    let rows = client("psql", &sql("select md5(i::text) from generate_series(1, 20000) i"), 20_000 * 33);
    assert_eq!(rows.lines().count(), 20_000);
    assert_eq!(rows.lines().next(), Some("c4ca4238a0b923820dcc509a6f75849b"));
    client("pgbench", &[&us[..], &["-i", "-q", "-s", "1", "postgres"]].concat(), 1_000_000);
    let said = client("pgbench", &[&us[..], &["-c", "4", "-t", "10", "postgres"]].concat(), 10_000);
    assert!(said.contains("40/40"), "{said}");
    both_ends_show("pgbench", &[&us[..], &["-S", "-c", "4", "-T", "4", "postgres"]].concat(), "postgres");
}

/// Packets that both devices lose, of TCP and of RDMA, while this lives.
struct Loss;

impl Loss {
    fn of(percent: &str) -> Self {
        for device in ["eth0", "eth1"] {
            well(Command::new("tc").args(["qdisc", "add", "dev", device, "root", "netem", "loss", percent]));
        }
        Self
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        for device in ["eth0", "eth1"] {
            let _ = Command::new("tc").args(["qdisc", "del", "dev", device, "root"]).status();
        }
    }
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn with_one_packet_in_twenty_lost() {
    if !have(&["iperf3", "ss", "redis-server", "redis-benchmark", "tc"]) {
        return;
    }
    let _loss = Loss::of("5%");
    iperf3("5202", "500000", &[&[]]);
    let [_, at] = ends();
    let words = ["--bind", &at, "--port", "6380", "--save", "", "--protected-mode", "no"];
    let mut server = Server::start(&mut under("redis-server", "server", &words));
    let us = ["-h", &at, "-p", "6380"];
    let ping = [&us[..], &["ping"]].concat();
    server.is_up(|| under("redis-cli", "asked", &ping).output().unwrap().stdout == b"PONG\n");
    let words = [&us[..], &["-t", "set", "-q", "-d", "500", "-n", "100", "-c", "4"]].concat();
    let said = client("redis-benchmark", &words, 50_000);
    assert!(said.contains("requests per second"), "{said}");
}
