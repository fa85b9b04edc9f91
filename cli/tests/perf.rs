//! `smc perf` as its users start it: each test has a server and a client of its own, on a port that the kernel chose.

// What is left out has to be said somewhere.
#![allow(clippy::print_stderr)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{self, Child, ChildStdout, Command, Output, Stdio};
use std::sync::Once;
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// What hangs is ended; nothing here takes a hundredth of that.
const WATCHDOG: Duration = Duration::from_secs(900);

fn smc(arguments: &[&str]) -> Command {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        thread::spawn(|| {
            thread::sleep(WATCHDOG);
            eprintln!("a test hangs");
            process::abort();
        });
    });
    let mut c = Command::new(env!("CARGO_BIN_EXE_smc"));
    c.args(arguments).stdin(Stdio::null());
    for name in ["LD_PRELOAD", "SMC_LIBRARY", "SMC_UPGRADE_AFTER", "SMC_DISABLE", "SMC_STATS"] {
        c.env_remove(name);
    }
    c
}

/// A server; killed when dropped.
struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
    port: String,
}

impl Server {
    fn start(more: &[&str]) -> Self {
        Self::of(smc(&["perf", "server", "-B", "127.0.0.1", "-p", "0"]).args(more))
    }

    fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("smc starts");
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        out.read_line(&mut line).expect("text");
        let port = line.trim().rsplit(' ').next().expect("a port").to_owned();
        assert!(port.parse::<u16>().is_ok(), "{line}");
        Self { child, out, port }
    }

    fn client(&self, more: &[&str]) -> Command {
        let mut c = smc(&["perf", "client", "127.0.0.1", "-p", &self.port]);
        c.args(more).envs(library().map(|l| ("SMC_LIBRARY", l)));
        c
    }

    /// A client that succeeds; its JSON.
    fn measure(&self, more: &[&str]) -> Value {
        json(&self.client(more).arg("-J").output().expect("smc starts"))
    }

    /// Waits for its end; whether it was well.
    fn ended(&mut self) -> bool {
        self.child.wait().expect("our child").success()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(o: &Output) -> Value {
    assert!(o.status.success(), "{}\n{}", text(&o.stdout), text(&o.stderr));
    serde_json::from_slice(&o.stdout).expect("JSON")
}

fn sent_and_received(j: &Value) -> (u64, u64) {
    let bytes = |name: &str| j["end"][name]["bytes"].as_u64().expect("a number");
    (bytes("sum_sent"), bytes("sum_received"))
}

/// The library of the same build, if there is one.
fn library() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_BIN_EXE_smc")).parent()?.to_path_buf();
    [folder.join("libsmc.so"), folder.join("../release/libsmc.so")].into_iter().find(|p| p.is_file())
}

#[test]
fn a_stream_by_tcp_and_unix_arrives_whole() {
    let server = Server::start(&[]);
    for over in ["tcp", "unix"] {
        for io in ["blocking", "poll", "epoll"] {
            let j = server.measure(&[
                "-n",
                "3m",
                "-P",
                "3",
                "--over",
                over,
                "--io",
                io,
                "--verify",
                "--threads",
                "2",
            ]);
            assert_eq!(sent_and_received(&j), (3 << 20, 3 << 20), "{over} {io}");
            assert_eq!(j["end"]["verified"], true);
            assert_eq!(j["end"]["client"]["mode"], over.to_uppercase().as_str());
            assert_eq!(j["end"]["server"]["ways"]["connections"][over.to_uppercase()], 3);
            assert!(j["end"]["client"]["cpu_seconds_per_gb"].as_f64().is_some_and(|s| s > 0.0));
            assert!(j["end"]["server"]["cpu_seconds_per_gb"].as_f64().is_some_and(|s| s > 0.0));
        }
    }
}

#[test]
fn the_server_sends_if_asked_and_both_do() {
    let server = Server::start(&[]);
    let j = server.measure(&["-R", "-k", "40", "-l", "10k", "--verify"]);
    assert_eq!(sent_and_received(&j), (400 << 10, 400 << 10));
    assert_eq!(
        j["intervals"].as_array().map_or(0, |i| i.iter().filter(|i| i["sum"]["sender"] == true).count()),
        0
    );
    let j = server.measure(&["--bidir", "-n", "1m", "-P", "2", "--verify"]);
    for name in ["sum_sent", "sum_received", "sum_sent_bidir_reverse", "sum_received_bidir_reverse"] {
        assert_eq!(j["end"][name]["bytes"], 1 << 20, "{name}");
    }
    assert_eq!(j["end"]["streams"].as_array().map(Vec::len), Some(4));
    // By time the server has to be told of the end.
    let j = server.measure(&["--bidir", "-t", "0.2", "-i", "0.1", "-O", "0.1", "-w", "64k", "-N"]);
    assert!(j["intervals"].as_array().is_some_and(|i| i.len() >= 2), "{j}");
    assert_eq!(j["intervals"][0]["sum"]["omitted"], true);
}

#[test]
fn sendfile_sends_what_write_would() {
    let server = Server::start(&[]);
    let j = server.measure(&["-Z", "-n", "1m", "-l", "100000"]);
    assert_eq!(sent_and_received(&j), (1 << 20, 1 << 20));
}

#[test]
fn round_trips_are_counted_and_timed() {
    let server = Server::start(&[]);
    for (over, io, connections) in [("tcp", "blocking", "1"), ("unix", "poll", "5"), ("tcp", "epoll", "9")] {
        let options = [
            "--rr",
            "-k",
            "500",
            "-P",
            connections,
            "--over",
            over,
            "--io",
            io,
            "-l",
            "100,3000",
            "--verify",
        ];
        let j = server.measure(&options);
        let end = &j["end"];
        assert_eq!(end["transactions"]["count"], 500, "{over} {io}");
        let latency = &end["latency_us"];
        assert_eq!(latency["count"], 500);
        let at = |q: &str| latency[q].as_f64().expect("a number");
        assert!(
            at("min") > 0.0 && at("min") <= at("p50") && at("p50") <= at("p90") && at("p90") <= at("p99")
        );
        assert!(at("p99") <= at("p99.9") && at("p99.9") <= at("max"), "{latency}");
        assert_eq!(sent_and_received(&j), (500 * 3100, 500 * 3100));
    }
}

#[test]
fn a_connection_for_each_request() {
    let server = Server::start(&[]);
    for over in ["tcp", "unix"] {
        let j = server.measure(&["--crr", "-k", "60", "-P", "2", "--over", over, "--verify"]);
        assert_eq!(j["end"]["latency_us"]["count"], 60, "{over}");
        assert_eq!(j["end"]["client"]["ways"]["connections"][over.to_uppercase()], 60);
    }
}

#[test]
fn under_libsmc_both_ends_say_that_they_are_in_shared_memory() {
    let Some(library) = library() else { return eprintln!("left out: build libsmc.so first") };
    let server = Server::of(
        smc(&["perf", "server", "-B", "127.0.0.1", "-p", "0"])
            .env("SMC_LIBRARY", &library)
            .env("SMC_UPGRADE_AFTER", "0"),
    );
    for options in [
        &["--rr", "-k", "3000"][..],
        &["-n", "30m", "-l", "8k", "--io", "epoll"],
        &["-n", "30m", "-l", "8k", "-R", "--io", "poll"],
    ] {
        let mut c = server.client(&["--over", "preload", "--verify", "-J"]);
        let o =
            c.args(options).env("SMC_LIBRARY", &library).env("SMC_UPGRADE_AFTER", "0").output().expect("smc");
        let j = json(&o);
        for end in ["client", "server"] {
            assert_eq!(j["end"][end]["mode"], "SHM", "{options:?}: {}", j["end"][end]);
            assert!(j["end"][end]["ways"]["ring_bytes"].as_u64().is_some_and(|n| n > 0));
        }
    }
    // Short connections stay on TCP, and the report has the reason.
    let mut c = server.client(&["--over", "preload", "--crr", "-k", "20", "-J"]);
    let j = json(&c.env("SMC_LIBRARY", &library).env_remove("SMC_UPGRADE_AFTER").output().expect("smc"));
    let ways = &j["end"]["client"]["ways"];
    assert_eq!(ways["connections"]["TCP"], 20, "{ways}");
    assert!(ways["reasons"].as_object().is_some_and(|r| !r.is_empty()), "{ways}");
}

#[test]
fn without_the_library_there_is_a_reason_and_no_test() {
    let server = Server::start(&[]);
    let o =
        server.client(&["--over", "preload"]).env("SMC_LIBRARY", "/no/such/libsmc.so").output().expect("smc");
    assert!(!o.status.success() && text(&o.stderr).contains("no such library"), "{}", text(&o.stderr));
}

#[test]
fn one_test_and_no_more() {
    let mut server = Server::start(&["-1"]);
    server.measure(&["-n", "1k"]);
    assert!(server.ended());
    let mut said = String::new();
    server.out.read_to_string(&mut said).expect("text");
    assert!(said.contains("receiver") && said.contains("CPU:"), "{said}");
}

#[test]
fn a_sweep_is_a_test_for_each_size_and_a_stream_of_events_a_line_each() {
    let server = Server::start(&[]);
    let o = server.client(&["--sweep=10,1k", "-k", "5", "--json-stream"]).output().expect("smc starts");
    assert!(o.status.success(), "{}", text(&o.stderr));
    let events: Vec<Value> =
        text(&o.stdout).lines().map(|l| serde_json::from_str(l).expect("JSON in each line")).collect();
    let document = server.measure(&["--sweep=10,1k", "-k", "5"]);
    assert_eq!(document["sweep"][1]["end"]["sum_sent"]["bytes"], 5120);
    let o = server.client(&["--sweep=10,1k,2k", "-k", "5", "--rr"]).output().expect("smc starts");
    assert_eq!(text(&o.stdout).lines().count(), 4, "{}", text(&o.stdout));
    let of =
        |name: &str| events.iter().filter(|e| e["event"] == name).map(|e| &e["data"]).collect::<Vec<_>>();
    let sizes: Vec<_> = of("start").iter().map(|s| s["test_start"]["blksize"].clone()).collect();
    assert_eq!(sizes, [10, 1024]);
    let bytes: Vec<_> = of("end").iter().map(|e| e["sum_received"]["bytes"].clone()).collect();
    assert_eq!(bytes, [50, 5120]);
}

#[test]
fn nobody_there_and_nonsense_are_errors_in_words() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address").port();
    let o = smc(&["perf", "-c", "127.0.0.1", "-p", &free.to_string()]).output().expect("smc starts");
    assert_eq!(o.status.code(), Some(1));
    assert!(text(&o.stderr).contains("connection refused"), "{}", text(&o.stderr));
    for (line, said) in
        [("-c h -t soon", "soon"), ("-c h -P many", "many"), ("-s -R", "--reverse"), ("-c h -n 5x", "5x")]
    {
        let o = smc(&["perf"]).args(line.split(' ')).output().expect("smc starts");
        assert!(!o.status.success() && text(&o.stderr).contains(said), "{line}: {}", text(&o.stderr));
    }
    let server = Server::start(&[]);
    let o = smc(&["perf", "-s", "-B", "127.0.0.1", "-p", &server.port]).output().expect("smc starts");
    assert!(!o.status.success() && text(&o.stderr).contains("in use"), "{}", text(&o.stderr));
}

#[test]
fn ways_are_compared_in_turn() {
    let picture = std::env::temp_dir().join(format!("smc-perf-test.{}.svg", process::id()));
    let mut c = smc(&[
        "perf", "compare", "--over", "tcp,unix", "--rounds", "2", "-k", "100", "-O", "0", "-J", "--svg",
    ]);
    let j = json(&c.arg(&picture).output().expect("smc starts"));
    let measures = j["measures"].as_array().expect("a list");
    let tests: Vec<_> = measures.iter().filter_map(|m| m["test"].as_str()).collect();
    assert!(["stream", "small", "rr", "crr"].iter().all(|t| tests.contains(t)), "{tests:?}");
    for m in measures {
        assert_eq!(m["ways"]["unix"]["values"].as_array().map(Vec::len), Some(2), "{m}");
        let [least, median, most] =
            ["least", "median", "most"].map(|n| m["times"]["unix"][n].as_f64().expect("one"));
        assert!(0.0 < least && least <= median && median <= most, "{m}");
    }
    let svg = fs::read_to_string(&picture).expect("a picture");
    fs::remove_file(&picture).expect("it was made above");
    assert!(svg.starts_with("<svg") && svg.contains("rr p50: unix"));

    let mut c =
        smc(&["perf", "compare", "--over", "tcp,unix", "--rounds", "1", "-k", "100", "--tests", "rr"]);
    let o = c.output().expect("smc starts");
    assert!(text(&o.stdout).contains("rr p99, us (less is better)"), "{}", text(&o.stdout));
    let mut c = smc(&["perf", "compare", "--over", "preload", "--rounds", "1"]);
    let o = c.env("SMC_LIBRARY", "/no/such/libsmc.so").output().expect("smc starts");
    assert!(!o.status.success() && text(&o.stderr).contains("no such library"), "{}", text(&o.stderr));
}

#[test]
fn the_crates_own_streams_go_through_memory_without_a_library() {
    let server =
        Server::of(smc(&["perf", "server", "-B", "127.0.0.1", "-p", "0"]).env("SMC_UPGRADE_AFTER", "0"));
    for options in [
        &["--rr", "-k", "3000", "-P", "2"][..],
        &["-n", "30m", "-l", "8k"],
        &["--bidir", "-n", "30m", "-l", "8k"],
    ] {
        let mut c = server.client(&["--over", "native", "--verify", "-J"]);
        let j = json(&c.args(options).env("SMC_UPGRADE_AFTER", "0").output().expect("smc"));
        for end in ["client", "server"] {
            assert_eq!(j["end"][end]["mode"], "SHM", "{options:?}: {}", j["end"][end]);
        }
    }
    let j = server.measure(&["--over", "native", "--crr", "-k", "20", "--verify"]);
    assert_eq!(j["end"]["latency_us"]["count"], 20);
}

#[test]
fn processes_of_their_own_are_reported_as_one_test() {
    let server = Server::start(&[]);
    let j = server.measure(&["--processes", "-P", "3", "-n", "3m", "--bidir", "--verify"]);
    assert_eq!(sent_and_received(&j), (3 << 20, 3 << 20));
    assert_eq!(j["end"]["streams"].as_array().map(Vec::len), Some(6));
    assert_eq!(j["end"]["server"]["ways"]["connections"]["TCP"], 6);
    let j = server.measure(&["--processes", "-P", "2", "-k", "501", "--rr"]);
    assert_eq!(
        (&j["end"]["latency_us"]["count"], &j["end"]["transactions"]["count"]),
        (&501.into(), &501.into())
    );
    if library().is_some() {
        let j = server.measure(&["--processes", "-P", "2", "-n", "40m", "-l", "8k", "--over", "preload"]);
        assert_eq!(j["end"]["client"]["ways"]["connections"]["SHM"], 2, "{}", j["end"]);
    }
    let (mut client, mut out) = busy(&server, &["--processes", "-P", "2"]);
    kill(&client, "-INT");
    let mut said = String::new();
    out.read_to_string(&mut said).expect("text");
    assert_eq!(client.wait().expect("our child").code(), Some(130), "{said}");
    assert!(said.contains("interrupted") && said.contains("server:"), "{said}");
}

/// A client that has begun a test without an end of its own, and has shown its first interval.
fn busy(server: &Server, more: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut c = server.client(&["-t", "3600", "-i", "0.1"]);
    let mut child = c.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("smc starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("0.00-") {
        line.clear();
        assert_ne!(out.read_line(&mut line).expect("text"), 0, "it ended");
    }
    (child, out)
}

fn kill(child: &Child, signal: &str) {
    let done = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill starts");
    assert!(done.success());
}

#[test]
fn a_second_client_is_told_that_the_server_is_busy() {
    let server = Server::start(&[]);
    let (mut first, _out) = busy(&server, &[]);
    let o = server.client(&["-n", "1"]).output().expect("smc starts");
    assert!(!o.status.success() && text(&o.stderr).contains("busy"), "{}", text(&o.stderr));
    first.kill().expect("our child");
    first.wait().expect("our child");
}

#[test]
fn an_interrupt_ends_the_test_with_its_report() {
    let server = Server::start(&[]);
    for more in [&["-R"][..], &["--rr", "-P", "2"], &["--crr"], &["--over", "unix", "--io", "epoll"]] {
        let (mut client, mut out) = busy(&server, more);
        kill(&client, "-INT");
        let mut said = String::new();
        out.read_to_string(&mut said).expect("text");
        assert_eq!(client.wait().expect("our child").code(), Some(130), "{more:?}: {said}");
        assert!(said.contains("interrupted") && said.contains("server:") && said.contains("CPU:"), "{said}");
    }
}

/// Kills the client, then the server, of a test that has begun.
fn kill_either(start: impl Fn() -> Server, more: &[&str]) {
    let mut server = start();
    let (mut client, mut out) = busy(&server, more);
    client.kill().expect("our child");
    client.wait().expect("our child");
    let mut said = String::new();
    // The pipe's end; then the server is ready for the next.
    out.read_to_string(&mut said).expect("text");
    let again = loop {
        let o = server.client(&["-n", "1k", "-J"]).output().expect("smc starts");
        if !text(&o.stdout).is_empty() || !text(&o.stderr).contains("busy") {
            break o;
        }
    };
    assert_eq!(sent_and_received(&json(&again)), (1024, 1024));

    let (mut client, mut out) = busy(&server, more);
    server.child.kill().expect("our child");
    server.child.wait().expect("our child");
    out.read_to_string(&mut said).expect("text");
    assert_eq!(client.wait().expect("our child").code(), Some(1), "{more:?}");
    let mut error = String::new();
    client.stderr.take().expect("piped").read_to_string(&mut error).expect("text");
    assert!(error.contains("closed"), "{more:?}: {error}");
    assert!(said.contains("CPU:"), "what was measured is reported: {said}");
}

#[test]
fn a_killed_end_does_not_leave_the_other_waiting() {
    let plain = || Server::start(&[]);
    for more in [
        &[][..],
        &["-R"],
        &["--rr"],
        &["--crr"],
        &["--over", "unix", "-P", "3", "--io", "poll"],
        &["--over", "native"],
        &["--over", "native", "--rr"],
    ] {
        kill_either(plain, more);
    }
}

#[test]
fn a_killed_end_does_not_leave_the_other_waiting_under_libsmc() {
    let Some(library) = library() else { return eprintln!("left out: build libsmc.so first") };
    let preloaded = || {
        let arguments = ["perf", "server", "-B", "127.0.0.1", "-p", "0", "--over", "preload"];
        Server::of(smc(&arguments).env("SMC_LIBRARY", &library))
    };
    for more in [&["-R"][..], &["--rr", "-P", "2", "--io", "epoll"], &[]] {
        let mut all = vec!["--over", "preload"];
        all.extend(more);
        kill_either(preloaded, &all);
    }
}

#[test]
fn strangers_do_not_disturb_the_server() {
    let server = Server::start(&[]);
    let address = format!("127.0.0.1:{}", server.port);
    // One that says nothing and stays, one that leaves at once, one that talks nonsense, one with a bad message.
    let _silent = TcpStream::connect(&address).expect("the server");
    drop(TcpStream::connect(&address).expect("the server"));
    for (cookie, message) in [([b'x'; 37], "\0\0\0\x04null"), ([b'x'; 37], "\u{7f}\u{7f}\u{7f}\u{7f}")] {
        let mut s = TcpStream::connect(&address).expect("the server");
        s.write_all(&cookie).expect("it listens");
        let mut state = [0];
        s.read_exact(&mut state).expect("its turn");
        s.write_all(message.as_bytes()).expect("it listens");
    }
    let j = loop {
        let o = server.client(&["-n", "1k", "-J"]).output().expect("smc starts");
        if !text(&o.stderr).contains("busy") {
            break json(&o);
        }
    };
    assert_eq!(sent_and_received(&j), (1024, 1024));
}

#[test]
fn another_version_of_the_protocol_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port().to_string();
    let newer = thread::spawn(move || {
        let (mut s, _) = listener.accept().expect("the client");
        s.read_exact(&mut [0; 37]).expect("its cookie");
        let hello = br#"{"protocol":9,"version":"9.9","pid":1,"preloaded":false}"#;
        s.write_all(&[64, 0, 0, 0, hello.len() as u8]).expect("it listens");
        s.write_all(hello).expect("it listens");
        // Until it goes.
        let _ = s.read(&mut [0]);
    });
    let o = smc(&["perf", "client", "127.0.0.1", "-p", &port]).output().expect("smc starts");
    assert!(!o.status.success() && text(&o.stderr).contains("version 9 "), "{}", text(&o.stderr));
    newer.join().expect("no panic");
}

fn has_iperf3() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| fs::metadata(d.join("iperf3")).is_ok())
}

#[test]
fn a_plain_iperf3_is_understood_at_either_end() {
    if !has_iperf3() {
        return eprintln!("left out: iperf3 is not installed");
    }
    let server = Server::start(&[]);
    for more in [&[][..], &["-R"], &["-P", "3"], &["-n", "2M"], &["--bidir"]] {
        let mut c = Command::new("iperf3");
        c.args(["-c", "127.0.0.1", "-p", &server.port, "-t", "1", "-J"]);
        if more.contains(&"-n") {
            c = Command::new("iperf3");
            c.args(["-c", "127.0.0.1", "-p", &server.port, "-J"]);
        }
        let j = json(&c.args(more).output().expect("iperf3 starts"));
        assert!(j["error"].is_null(), "{more:?}: {}", j["error"]);
        let (sent, received) = sent_and_received(&j);
        assert!(sent > 0 && received > 0, "{more:?}");
    }
    let o = Command::new("iperf3")
        .args(["-c", "127.0.0.1", "-u", "-p", &server.port])
        .output()
        .expect("iperf3 starts");
    assert!(!o.status.success(), "UDP is refused");
    server.measure(&["-n", "1k"]);

    for more in [
        &["-t", "0.3"][..],
        &["-R", "-t", "0.3"],
        // More than the sockets hold: iperf3's server does not count what it has not read when the test ends.
        &["-P", "3", "-n", "96m"],
        &["--bidir", "-t", "0.3"],
        &["-R", "-n", "1m"],
    ] {
        let free = TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("its address")
            .port()
            .to_string();
        let mut c = Command::new("iperf3");
        c.args(["-s", "-1", "-B", "127.0.0.1", "-p", &free, "--forceflush"]).stdout(Stdio::piped());
        let mut theirs = c.spawn().expect("iperf3 starts");
        let mut out = BufReader::new(theirs.stdout.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("listening") {
            line.clear();
            assert_ne!(out.read_line(&mut line).expect("text"), 0, "iperf3 ended");
        }
        let o =
            smc(&["perf", "client", "127.0.0.1", "-p", &free, "-J"]).args(more).output().expect("smc starts");
        let (sent, received) = sent_and_received(&json(&o));
        assert!(sent > 0 && received > 0, "{more:?}: {}", text(&o.stdout));
        theirs.kill().expect("our child");
        theirs.wait().expect("our child");
    }
}

#[test]
fn what_a_plain_iperf3_server_can_not_do_is_said() {
    // As far as this goes iperf3 is one byte.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port().to_string();
    let theirs = thread::spawn(move || {
        for _ in 0..2 {
            let (mut s, _) = listener.accept().expect("the client");
            s.read_exact(&mut [0; 37]).expect("its cookie");
            s.write_all(&[9]).expect("it listens");
            // Until it goes.
            let _ = s.read(&mut [0]);
        }
    });
    for option in ["--rr", "--verify"] {
        let o = smc(&["perf", "client", "127.0.0.1", "-p", &port, option]).output().expect("smc starts");
        assert!(!o.status.success() && text(&o.stderr).contains("plain iperf3"), "{}", text(&o.stderr));
    }
    theirs.join().expect("no panic");
}
