//! `smc::net` in company: with preloaded programs and with such that know nothing of libsmc, in a mio `Poll`, under tokio
//! and hyper, across fork; and the examples that are written with it. Run after `cargo build --release`, as
//! `cargo xtask e2e` does.
//!
//! What `smc::net` does with both ends in one process is shown by `smc/tests/net.rs`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod company;
mod examples;
mod forks;
mod readiness;
mod tasks;

use smc::net::{Builder, Mode, Stream, UpgradeAfter};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Once;
use std::thread;
use std::time::Duration;

/// Ends what hangs.
fn watchdog() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(300));
            eprintln!("a test hangs");
            std::process::abort();
        });
    });
}

fn eager() -> Builder {
    watchdog();
    let mut b = Builder::new();
    b.ring_size(64 << 10).upgrade_after(UpgradeAfter::Now);
    b
}

/// Both ends, nothing moved yet.
fn pair() -> (Stream, Stream) {
    let listener = eager().listen("127.0.0.1:0").unwrap();
    let client = eager().connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn in_ring(s: &Stream) -> bool {
    s.status().is_some_and(|s| s.mode_tx == Mode::Shm && s.mode_rx == Mode::Shm)
}

/// Both ends, both directions in the ring.
fn upgraded() -> (Stream, Stream) {
    let (mut a, mut b) = pair();
    for _ in 0..1000 {
        if in_ring(&a) && in_ring(&b) {
            return (a, b);
        }
        let mut byte = [0];
        a.write_all(b"?").unwrap();
        b.read_exact(&mut byte).unwrap();
        b.write_all(b"!").unwrap();
        a.read_exact(&mut byte).unwrap();
    }
    panic!("not upgraded: {:?}", a.status());
}

/// The byte at a place of a stream that no other place nearby has.
fn byte_at(i: usize) -> u8 {
    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
}

fn pattern(from: usize, n: usize) -> Vec<u8> {
    (from..from + n).map(byte_at).collect()
}

fn check(from: usize, bytes: &[u8]) {
    if let Some(i) = (0..bytes.len()).find(|i| bytes[*i] != byte_at(from + i)) {
        panic!("byte {} is wrong", from + i);
    }
}

/// `target/release`: the test executable lies in `deps` below it.
fn release() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_path_buf()
}

/// An example, preloaded or not, that is killed at the end of the test.
struct Program(Child, BufReader<ChildStdout>);

impl Program {
    fn command(name: &str, preloaded: bool) -> Command {
        watchdog();
        let mut c = Command::new(release().join("examples").join(name));
        c.env_remove("LD_PRELOAD").stdin(Stdio::null()).stdout(Stdio::piped()).env("SMC_UPGRADE_AFTER", "0");
        if preloaded {
            c.env("LD_PRELOAD", release().join("libsmc.so"));
        }
        c
    }

    /// A server and the address that it prints first.
    fn server(name: &str, preloaded: bool, arguments: &[&str]) -> (Program, String) {
        let mut child =
            Self::command(name, preloaded).args(arguments).spawn().expect("cargo build --release --examples");
        let (mut line, mut out) = (String::new(), BufReader::new(child.stdout.take().unwrap()));
        out.read_line(&mut line).unwrap();
        (Program(child, out), line.trim().to_owned())
    }

    /// A client's output; it must succeed.
    fn client(name: &str, preloaded: bool, arguments: &[&str]) -> String {
        let mut c = Self::command(name, preloaded);
        let out =
            c.args(arguments).stderr(Stdio::inherit()).output().expect("cargo build --release --examples");
        assert!(out.status.success(), "{name} {arguments:?}: {}", out.status);
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
