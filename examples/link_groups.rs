//! Link groups: who a process shares memory with. The example starts two clients of its own, each a process with some
//! streams to a server in this one, and shows what `smc::net::link_groups` and the streams themselves say.
//!
//! Usage: `link_groups [STREAMS]` (default 3, for each client).

use smc::net::{Builder, Stream, UpgradeAfter, link_groups};
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};

fn options() -> Builder {
    let mut b = Builder::new();
    b.upgrade_after(UpgradeAfter::Now);
    b
}

/// Messages of one byte to and fro: enough for the upgrade.
const MESSAGES: usize = 200;

/// Keeps its streams until standard input ends.
fn client(address: &str, streams: usize) -> io::Result<()> {
    let mut all = (0..streams).map(|_| options().connect(address)).collect::<io::Result<Vec<_>>>()?;
    for stream in &mut all {
        for _ in 0..MESSAGES {
            stream.write_all(b"?")?;
            stream.read_exact(&mut [0])?;
        }
    }
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn answer(stream: &mut Stream) -> io::Result<()> {
    for _ in 0..MESSAGES {
        stream.read_exact(&mut [0])?;
        stream.write_all(b"!")?;
    }
    Ok(())
}

fn start(address: &str, streams: usize) -> io::Result<Child> {
    let mut c = Command::new(std::env::current_exe()?);
    c.args(["client", address, &streams.to_string()]).stdin(Stdio::piped()).spawn()
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |s: &String| s.parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e));
    if let [mode, address, streams] = arguments.as_slice()
        && mode == "client"
    {
        return client(address, number(streams)?);
    }
    let each = arguments.first().map_or(Ok(3), number)?;
    let listener = options().listen("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let mut clients = [start(&address, each)?, start(&address, each)?];
    let mut streams = Vec::new();
    for _ in 0..2 * each {
        streams.push(std::thread::spawn({
            let (mut stream, _) = listener.accept()?;
            move || answer(&mut stream).map(|()| stream)
        }));
    }
    let streams = streams.into_iter().map(|t| t.join().expect("no panic")).collect::<io::Result<Vec<_>>>()?;
    println!(
        "{:>8} {:>6} {:>7} {:>8} {:>9} {:>12}",
        "peer", "user", "memory", "streams", "segments", "bytes"
    );
    for g in link_groups() {
        let memory = if g.owns_memory { "ours" } else { "theirs" };
        println!(
            "{:>8} {:>6} {memory:>7} {:>8} {:>9} {:>12}",
            g.peer_pid, g.peer_uid, g.connections, g.segments, g.bytes
        );
    }
    let rings: u64 = streams.iter().filter_map(Stream::status).map(|s| s.rx_bytes_ring).sum();
    println!("{} streams, {rings} bytes received by the ring", streams.len());
    for c in &mut clients {
        drop(c.stdin.take());
        c.wait()?;
    }
    Ok(())
}
