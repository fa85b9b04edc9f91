//! The same by `smc::net`: what a program has that asks for it.

use std::io::{self, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use smc::net::{Listener, Stream};

use crate::{BUFFER, bad, echo, messages, rate, round_trips, sink};

/// As [`sink`], without a copy: the bytes are looked at where they lie.
fn sink_in_place(mut s: Stream) -> io::Result<()> {
    let mut sum = 0u64;
    loop {
        let n = s.consume_with(BUFFER * 4, |[a, b]| a.len() + b.len())?;
        if n == 0 {
            break;
        }
        sum += n as u64;
    }
    s.write_all(&sum.to_le_bytes())
}

pub fn serve(kind: &str, addr: &str) -> io::Result<()> {
    let each: fn(Stream) -> io::Result<()> = match kind {
        "echo" => echo,
        "sink" => sink,
        "in-place" => sink_in_place,
        _ => return Err(bad("no such kind of server")),
    };
    let listener = Listener::bind(addr)?;
    loop {
        let (s, _) = listener.accept()?;
        s.set_nodelay(true)?;
        thread::spawn(move || drop(each(s)));
    }
}

fn connect(addr: &str) -> io::Result<Stream> {
    let s = Stream::connect(addr)?;
    s.set_nodelay(true)?;
    Ok(s)
}

fn shut(s: &Stream) -> io::Result<()> {
    s.shutdown(Shutdown::Write)
}

pub fn rr(addr: &str, time: Duration) -> io::Result<Vec<u32>> {
    round_trips(&mut connect(addr)?, time)
}

pub fn stream(addr: &str, time: Duration, size: usize) -> io::Result<f64> {
    let block = vec![7u8; size];
    let mut s = connect(addr)?;
    rate(|| messages(&mut s, time, size, 0, |s| s.write_all(&block), shut))
}

/// The bytes are made in the ring.
pub fn reserve(addr: &str, time: Duration, size: usize) -> io::Result<f64> {
    let block = vec![7u8; size];
    let send = |s: &mut Stream| {
        let mut left = &block[..];
        while !left.is_empty() {
            let mut space = s.reserve(left.len())?;
            let n = space.write(left)?;
            space.commit(n)?;
            left = &left[n..];
        }
        Ok(())
    };
    let mut s = connect(addr)?;
    rate(|| messages(&mut s, time, size, 0, send, shut))
}
