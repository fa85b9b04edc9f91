//! `smc run`, `smc ss`, `smc stats` and `SMC_STATS` on the plain client and server of `examples/`: what they say
//! must be what happened. Run after `cargo build --release`, which `cargo xtask e2e` does.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::os::{fd::OwnedFd, unix::net::UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::{fs, thread, time::Duration};

use serde_json::Value;

/// `target/release`: the test executable lies in `deps` below it.
fn release() -> PathBuf {
    let me = std::env::current_exe().expect("a path");
    me.ancestors().nth(2).expect("target/release/deps/test").to_path_buf()
}

fn smc(arguments: &[&str]) -> Command {
    let mut c = Command::new(release().join("smc"));
    c.args(arguments).env_remove("LD_PRELOAD").stdin(Stdio::null()).stdout(Stdio::piped());
    c
}

fn json(arguments: &[&str]) -> Value {
    let out = smc(arguments).output().expect("cargo build --release comes first");
    assert!(out.status.success(), "smc {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// Killed at the end of the test, however it ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn example(name: &str) -> String {
    release().join("examples").join(name).to_str().expect("a plain path").to_owned()
}

/// A server (under libsmc or not) and its address.
fn server(preloaded: bool) -> (Server, String) {
    let mut command = if preloaded {
        smc(&["run", "--", &example("plain_server")])
    } else {
        let mut c = Command::new(example("plain_server"));
        c.env_remove("LD_PRELOAD").stdin(Stdio::null()).stdout(Stdio::piped());
        c
    };
    let mut server = Server(command.spawn().expect("the examples are built with the tests"));
    let mut address = String::new();
    BufReader::new(server.0.stdout.take().expect("piped")).read_line(&mut address).expect("an address");
    (server, address.trim().to_owned())
}

fn stats_file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("smc-observe.{}.{name}", std::process::id()))
}

/// Looks with `smc ss` while the client runs, until `wanted` accepts what it says.
fn watch(client: &mut Child, arguments: &[&str], wanted: impl Fn(&[Value]) -> bool) -> bool {
    loop {
        let found = json(arguments);
        if wanted(found.as_array().expect("an array")) {
            return true;
        }
        if client.try_wait().expect("our child").is_some() {
            eprintln!("smc ss said last: {found}");
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn both_ends_of_an_upgraded_connection_are_shown() {
    let (server, address) = server(true);
    let path = stats_file("both");
    let stats = path.to_str().expect("a plain path");
    let mut client =
        smc(&["run", "--stats", stats, "--", &example("plain_client"), &address, "pingpong", "3"])
            .spawn()
            .expect("it starts");
    let pids = [server.0.id(), client.id()];
    let shown = watch(&mut client, &["ss", "--json"], |all| {
        pids.iter().all(|pid| {
            all.iter().any(|c| {
                c["pid"] == *pid
                    && c["mode_tx"] == "SHM"
                    && c["mode_rx"] == "SHM"
                    && c["bytes"]["shm_tx"].as_u64() > Some(0)
                    && c["bytes"]["shm_rx"].as_u64() > Some(0)
            })
        })
    });
    let sums = json(&["stats", "--json", &pids[0].to_string()]);
    assert!(client.wait().expect("our child").success());
    assert!(shown, "smc ss did not show both ends as upgraded");
    assert_eq!(sums[0]["connections"]["shm"], 1);

    let at_exit: Value = serde_json::from_str(&fs::read_to_string(&path).expect("SMC_STATS")).expect("JSON");
    fs::remove_file(&path).expect("it was there");
    assert_eq!(at_exit["pid"], pids[1]);
    assert_eq!(at_exit["program"], "plain_client");
    assert_eq!(at_exit["connections"]["shm"], 1);
    let bytes = |name: &str| at_exit["bytes"][name].as_u64().expect("a number");
    assert!(bytes("shm_tx") > bytes("tcp_tx") && bytes("shm_rx") > bytes("tcp_rx"), "{at_exit}");
}

#[test]
fn a_connection_to_a_peer_without_libsmc_stays_on_tcp_and_says_why() {
    let (_server, address) = server(false);
    let mut client =
        smc(&["run", "--", &example("plain_client"), &address, "pingpong", "3"]).spawn().expect("it starts");
    let pid = client.id();
    let shown = watch(&mut client, &["ss", "-a", "--json"], |all| {
        all.iter().any(|c| c["pid"] == pid && c["mode"] == "TCP" && c["reason"].is_string())
    });
    assert!(client.wait().expect("our child").success());
    assert!(shown, "smc ss -a did not name a reason");
}

/// Also if it ends long before the peer has had its time to answer: who asks wants to hear of each.
#[test]
fn who_requires_it_hears_of_a_short_connection_that_was_not_upgraded() {
    let (_server, address) = server(false);
    let out = smc(&[
        "run",
        "--require",
        "--upgrade-after",
        "0",
        "--",
        &example("plain_client"),
        &address,
        "pingpong",
        "0.01",
    ])
    .stderr(Stdio::piped())
    .output()
    .expect("it starts");
    assert!(out.status.success());
    let said = String::from_utf8_lossy(&out.stderr);
    let lines: Vec<&str> = said.lines().collect();
    assert!(matches!(lines[..], [line] if line.contains(": TCP (peer-no-smc): ")), "{said}");
}

#[test]
fn nothing_is_printed_and_the_stream_is_whole_with_the_library_switched_off() {
    let (_server, address) = server(true);
    let out = smc(&["run", "--disable", "--", &example("plain_client"), &address, "stream", "0.2"])
        .stderr(Stdio::piped())
        .output()
        .expect("it starts");
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("bytes "));
}

/// A client with a setting that is not understood, its standard error (and standard input) as given.
fn misled_client(address: &str, stdin: Stdio, stderr: Stdio) -> Command {
    let mut c = Command::new(example("plain_client"));
    c.args([address, "pingpong", "0.1"]).env("LD_PRELOAD", release().join("libsmc.so"));
    c.env("SMC_RMB_SIZE", "nonsense").stdin(stdin).stdout(Stdio::null()).stderr(stderr);
    c
}

/// Both descriptors 0 and 2, or 2 alone, are one end of a pair of sockets: what came out of the other?
fn said_to(ours: impl Into<OwnedFd>, mut theirs: impl Read, as_input: bool) -> String {
    let (_server, address) = server(false);
    let ours: OwnedFd = ours.into();
    let stdin = if as_input { ours.try_clone().expect("a duplicate").into() } else { Stdio::null() };
    let done = misled_client(&address, stdin, ours.into()).status().expect("it starts");
    assert!(done.success());
    let mut said = String::new();
    theirs.read_to_string(&mut said).expect("text");
    said
}

#[test]
fn a_connection_at_descriptor_2_gets_no_line_of_ours() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let there = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    assert_eq!(said_to(listener.accept().expect("accepted").0, there, false), "");
    // As inetd(8) starts a server of a Unix socket.
    let (here, there) = UnixStream::pair().expect("a pair");
    assert_eq!(said_to(here, there, true), "");
}

#[test]
fn a_journal_or_a_pipe_at_descriptor_2_gets_the_line() {
    let (here, there) = UnixStream::pair().expect("a pair");
    assert!(said_to(here, there, false).contains("SMC_RMB_SIZE"));
    let (there, here) = std::io::pipe().expect("a pipe");
    assert!(said_to(here, there, false).contains("SMC_RMB_SIZE"));
}

#[test]
fn a_file_at_descriptor_2_gets_the_line_if_it_is_a_log() {
    let (_server, address) = server(false);
    let path = stats_file("log");
    for (data, said) in [(true, false), (false, true)] {
        let mut how = fs::OpenOptions::new();
        let file = how.create(true).truncate(true).write(true).read(data).open(&path).expect("a file");
        let done = misled_client(&address, Stdio::null(), file.into()).status().expect("it starts");
        let text = fs::read_to_string(&path).expect("it is there");
        assert!(done.success() && text.contains("SMC_RMB_SIZE") == said, "{data}: {text:?}");
    }
    fs::remove_file(&path).expect("it was there");
}

#[test]
fn this_machine_can_do_it_and_smc_check_says_so() {
    let out = smc(&["check"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("went through shared memory"), "{said}");
}
