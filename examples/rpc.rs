//! Requests and responses: a server that answers messages with a length in front, and a client that measures how long
//! each answer takes.
//!
//! Usage: `rpc [ADDR]` serves (default 127.0.0.1:0; the first line of output is the address);
//! `rpc ADDR CALLS [SIZE]` makes so many calls (default size 64) and prints percentiles in microseconds.

use smc::net::{Builder, Listener, Reader, Stream, UpgradeAfter};
use std::io::{self, Read, Write};
use std::thread;
use std::time::Instant;

/// Longer messages are refused.
const MOST: usize = 1 << 20;

fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A message: its length (u32, little endian), then its bytes. False: the stream has ended.
fn receive(from: &mut impl Read, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut head = [0; 4];
    match from.read_exact(&mut head) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        r => r?,
    }
    let n = u32::from_le_bytes(head) as usize;
    if n > MOST {
        return Err(invalid(format!("a message of {n} bytes")));
    }
    into.resize(n, 0);
    from.read_exact(into).map(|()| true)
}

/// Head and bytes in one call, so that they are one message to the peer.
fn send(to: &mut impl Write, message: &[u8], buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.extend_from_slice(&(message.len() as u32).to_le_bytes());
    buffer.extend_from_slice(message);
    to.write_all(buffer)
}

/// The work of this server: the message backwards.
fn work(request: &mut [u8]) {
    request.reverse();
}

fn serve(stream: Stream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (writer, mut reader) = (stream.try_clone()?, Reader::new(stream));
    let (mut message, mut buffer) = (Vec::new(), Vec::new());
    while receive(&mut reader, &mut message)? {
        work(&mut message);
        send(&mut &writer, &message, &mut buffer)?;
    }
    Ok(())
}

fn server(address: &str) -> io::Result<()> {
    let listener = Listener::bind(address)?;
    println!("{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(e) = serve(stream) {
                eprintln!("rpc: {e}");
            }
        });
    }
    Ok(())
}

fn client(address: &str, calls: usize, size: usize) -> io::Result<()> {
    let stream = Builder::new().upgrade_after(UpgradeAfter::Now).nodelay(true).connect(address)?;
    let (writer, mut reader) = (stream.try_clone()?, Reader::new(stream));
    let (mut answer, mut buffer, mut times) = (Vec::new(), Vec::new(), Vec::with_capacity(calls));
    let mut request: Vec<u8> = (0..size).map(|i| i as u8).collect();
    for n in 0..calls {
        if let Some(first) = request.first_mut() {
            *first = n as u8;
        }
        let start = Instant::now();
        send(&mut &writer, &request, &mut buffer)?;
        if !receive(&mut reader, &mut answer)? {
            return Err(invalid("the server has gone"));
        }
        times.push(start.elapsed());
        if !answer.iter().eq(request.iter().rev()) {
            return Err(invalid(format!("answer {n} is wrong")));
        }
    }
    times.sort_unstable();
    let at = |q: f64| {
        let i = ((times.len() as f64 * q) as usize).min(times.len().saturating_sub(1));
        times.get(i).map_or(0.0, |t| t.as_secs_f64() * 1e6)
    };
    print!("{calls} calls of {size} bytes by {}:", reader.stream().mode().name());
    for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)] {
        print!(" {name} {:.2}", at(q));
    }
    println!(" us");
    Ok(())
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |s: &String| s.parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e));
    match arguments.as_slice() {
        [] => server("127.0.0.1:0"),
        [address] => server(address),
        [address, calls] => client(address, number(calls)?, 64),
        [address, calls, size, ..] => client(address, number(calls)?, number(size)?.min(MOST)),
    }
}
