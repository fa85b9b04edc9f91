//! Programs that know sockets and nothing else, one on each end of a link.
//!
//! `SMC_LIBRARY` is libsmc.so; without it the one of the release build beside this workspace.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// The two addresses.
pub fn ends() -> [String; 2] {
    let told = std::env::var("SMC_TEST_RDMA").expect("SMC_TEST_RDMA: run this by `cargo xtask vm`");
    let words: Vec<_> = told.split_whitespace().map(str::to_string).collect();
    [words[1].clone(), words[3].clone()]
}

/// Where libsmc.so and libsmc-rdma.so lie side by side, as they are installed.
pub fn library() -> &'static Path {
    static AT: OnceLock<PathBuf> = OnceLock::new();
    AT.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("smc-preload-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/libsmc.so");
        let shim = std::env::var_os("SMC_LIBRARY").map_or(built, PathBuf::from);
        let own = std::env::current_exe().unwrap();
        let service = own.ancestors().nth(2).unwrap().join("libsmc_rdma.so");
        std::fs::copy(shim, folder.join("libsmc.so")).unwrap();
        std::fs::copy(service, folder.join("libsmc-rdma.so")).unwrap();
        folder
    })
}

/// The program that is both ends.
pub fn program() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/end")
}

pub fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(6100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A program, under the library unless it is to be plain.
pub struct End {
    pub child: Child,
    out: BufReader<std::process::ChildStdout>,
    stats: PathBuf,
}

/// What SMC_STATS has of a program.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    pub rdma: u64,
    pub tcp: u64,
    pub rdma_tx: u64,
    pub rdma_rx: u64,
    /// Connections that have gone back to TCP.
    pub back: u64,
}

impl End {
    /// With a peer that is listed, on another host.
    pub fn start(words: &[&str], plain: bool, settings: &[(&str, &str)]) -> Self {
        let listed = [("SMC_PEERS", "10.77.0.0/24"), ("SMC_TEST_REMOTE", "1")];
        Self::by(Command::new(program()), words, plain, &[&listed[..], settings].concat())
    }

    /// Started by a command that runs the program.
    pub fn by(mut c: Command, words: &[&str], plain: bool, settings: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let stats = library().join(format!("stats-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        c.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        if !plain {
            c.env("LD_PRELOAD", library().join("libsmc.so")).env("SMC_STATS", &stats);
            c.envs(settings.iter().copied());
        }
        let mut child = c.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out, stats }
    }

    pub fn says(&mut self, want: &str) {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), want);
    }

    /// Ends well; what it has moved.
    pub fn ends(mut self, last: &str) -> Moved {
        self.says(last);
        assert!(self.child.wait().unwrap().success());
        let json = std::fs::read_to_string(&self.stats).unwrap_or_default();
        let number = |name: &str| {
            let at = json.find(&format!("\"{name}\":")).map(|at| at + name.len() + 3);
            let digits = at.map(|at| json[at..].chars().take_while(char::is_ascii_digit).collect::<String>());
            digits.and_then(|d| d.parse().ok()).unwrap_or(0)
        };
        let names = ["rdma", "tcp", "rdma_tx", "rdma_rx", "downgrades"];
        let [rdma, tcp, rdma_tx, rdma_rx, back] = names.map(number);
        Moved { rdma, tcp, rdma_tx, rdma_rx, back }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends back what comes, to the end.
pub fn echo(mut s: TcpStream) {
    let mut bytes = [0; 4096];
    loop {
        match s.read(&mut bytes).unwrap() {
            0 => return,
            n => s.write_all(&bytes[..n]).unwrap(),
        }
    }
}
