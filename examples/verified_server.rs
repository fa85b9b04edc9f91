//! Half of a pair that checks every byte in both directions: accepts, and on each connection writes and reads
//! numbered, checksummed blocks until the peer goes.
//!
//!     verified_server [PORT]      prints `port N`, then `open N` and `closed N BYTES` per connection
//!
//! Wrong bytes, or an error that TCP would not give, end the process with status 3.

#[path = "verified_stream/mod.rs"]
mod verified_stream;

use std::{
    env,
    io::Write as _,
    net::{TcpListener, TcpStream},
    process::{ExitCode, exit},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};
use verified_stream::{End, greet, read_all, write_all};

fn say(line: &str) {
    // One write per line: threads do not mix.
    let _ = std::io::stdout().lock().write_all(format!("{line}\n").as_bytes());
}

fn check(e: End) {
    if e != End::Gone {
        say(&format!("BAD {e:?}"));
        exit(3);
    }
}

fn serve(s: TcpStream) {
    static OPEN: AtomicU64 = AtomicU64::new(0);
    let n = OPEN.fetch_add(1, Ordering::Relaxed);
    let Ok(w) = s.try_clone() else { return say("BAD dup") };
    check(greet(&s, false));
    let writer = thread::spawn(move || write_all(&w, b's'));
    let (bytes, end) = read_all(&s, b'c', |block| {
        if block == 0 {
            say(&format!("open {n}"));
        }
    });
    check(end);
    // The writer may be in a full buffer; end it as well.
    let _ = s.shutdown(std::net::Shutdown::Both);
    check(writer.join().unwrap_or(End::Odd("a panic".into())));
    drop(s);
    say(&format!("closed {n} {bytes}"));
}

/// The program; `args` are its arguments.
pub fn run(mut args: impl Iterator<Item = String>) -> ExitCode {
    let port = args.next().and_then(|p| p.parse().ok()).unwrap_or(0u16);
    let l = match TcpListener::bind(("127.0.0.1", port)) {
        Ok(l) => l,
        Err(e) => {
            say(&format!("BAD bind: {e}"));
            return ExitCode::from(3);
        }
    };
    say(&format!("port {}", l.local_addr().map_or(0, |a| a.port())));
    for s in l.incoming() {
        match s {
            Ok(s) => drop(thread::spawn(move || serve(s))),
            Err(e) => say(&format!("accept: {e}")),
        }
    }
    ExitCode::SUCCESS
}

#[allow(dead_code, reason = "a test has this file as a module")]
fn main() -> ExitCode {
    run(env::args().skip(1))
}
