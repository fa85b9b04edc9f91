//! The other half of a pair that checks every byte in both directions: connects, and on each connection writes
//! and reads numbered, checksummed blocks until the server goes.
//!
//!     verified_client PORT [CONNECTIONS [BLOCKS]]   prints `running` when all are well under way, `verified BYTES` at the end
//!
//! With BLOCKS it leaves by itself after that many. Wrong bytes, or an error that TCP would not give, end the
//! process with status 3.

#[path = "verified_stream/mod.rs"]
mod verified_stream;

use std::{
    env,
    io::Write as _,
    net::{Shutdown, TcpStream},
    process::{ExitCode, exit},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use verified_stream::{End, greet, read_all, write_all};

/// So many blocks, beyond the first big one, until a connection counts as running.
const RUNNING: u64 = 70;

fn say(line: &str) {
    let _ = std::io::stdout().lock().write_all(format!("{line}\n").as_bytes());
}

fn check(e: End) {
    if e != End::Gone {
        say(&format!("BAD {e:?}"));
        exit(3);
    }
}

fn talk(port: u16, blocks: u64, running: impl Fn()) -> u64 {
    let s = match TcpStream::connect(("127.0.0.1", port)) {
        Ok(s) => s,
        Err(e) => {
            say(&format!("BAD connect: {e}"));
            exit(3);
        }
    };
    let Ok(w) = s.try_clone() else {
        say("BAD dup");
        exit(3);
    };
    check(greet(&s, true));
    let writer = thread::spawn(move || write_all(&w, b'c'));
    let (bytes, end) = read_all(&s, b's', |block| {
        if block == RUNNING {
            running();
        }
        if block == blocks {
            let _ = s.shutdown(Shutdown::Both);
        }
    });
    check(end);
    let _ = s.shutdown(Shutdown::Both);
    check(writer.join().unwrap_or(End::Odd("a panic".into())));
    bytes
}

/// The program; `args` are its arguments.
pub fn run(mut args: impl Iterator<Item = String>) -> ExitCode {
    let mut num = |or: u64| args.next().and_then(|a| a.parse().ok()).unwrap_or(or);
    let (port, connections, blocks) = (num(0) as u16, num(1) as usize, num(u64::MAX));
    let started = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let started = Arc::clone(&started);
            thread::spawn(move || {
                talk(port, blocks, || {
                    if started.fetch_add(1, Ordering::Relaxed) + 1 == connections {
                        say("running");
                    }
                })
            })
        })
        .collect();
    let bytes: u64 = threads.into_iter().map(|t| t.join().unwrap_or(0)).sum();
    say(&format!("verified {bytes}"));
    ExitCode::SUCCESS
}

#[allow(dead_code, reason = "a test has this file as a module")]
fn main() -> ExitCode {
    run(env::args().skip(1))
}
