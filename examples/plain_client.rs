//! The client of `plain_server`: ordinary `std::net`, nothing of libsmc.
//!
//! Usage: `plain_client ADDR stream SECONDS` prints `bytes B seconds S`;
//! `plain_client ADDR pingpong SECONDS [SIZE]` prints `count N p50 US p99 US` (round trips, microseconds).

use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

const BLOCK: usize = 128 << 10;

/// Sends numbered blocks for a while; the server must have counted as many bytes.
fn stream(mut s: TcpStream, time: Duration) -> io::Result<()> {
    s.write_all(b"S")?;
    let mut block = vec![0x5a; BLOCK];
    let start = Instant::now();
    let mut n = 0u64;
    while start.elapsed() < time {
        block[..8].copy_from_slice(&n.to_le_bytes());
        block[BLOCK - 8..].copy_from_slice(&n.to_le_bytes());
        s.write_all(&block)?;
        n += 1;
    }
    s.shutdown(Shutdown::Write)?;
    let mut got = [0; 8];
    s.read_exact(&mut got)?;
    let (sent, got) = (n * BLOCK as u64, u64::from_le_bytes(got));
    if sent != got {
        return Err(Error::new(ErrorKind::InvalidData, format!("{sent} bytes sent, {got} arrived")));
    }
    println!("bytes {sent} seconds {:.6}", start.elapsed().as_secs_f64());
    Ok(())
}

/// One message to and fro, again and again; each must come back as it was sent.
fn pingpong(mut s: TcpStream, time: Duration, size: usize) -> io::Result<()> {
    s.set_nodelay(true)?;
    s.write_all(b"P")?;
    s.write_all(&(size as u32).to_le_bytes())?;
    let (mut out, mut back) = (vec![0; size], vec![0; size]);
    let mut times = Vec::with_capacity(1 << 20);
    let start = Instant::now();
    let mut last = Duration::ZERO;
    while last < time {
        out.fill(times.len() as u8);
        s.write_all(&out)?;
        s.read_exact(&mut back)?;
        if back != out {
            return Err(Error::new(ErrorKind::InvalidData, format!("message {} is damaged", times.len())));
        }
        let now = start.elapsed();
        times.push(now - last);
        last = now;
    }
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos() as f64 / 1000.0;
    println!("count {} p50 {:.2} p99 {:.2}", times.len(), at(50), at(99));
    Ok(())
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |n: usize| args.get(n).map(String::as_str);
    let usage = || Error::new(ErrorKind::InvalidInput, "plain_client ADDR stream|pingpong SECONDS [SIZE]");
    let seconds: f64 = arg(3).unwrap_or("2").parse().map_err(|_| usage())?;
    let size: usize = arg(4).unwrap_or("64").parse().map_err(|_| usage())?;
    let s = TcpStream::connect(arg(1).ok_or_else(usage)?)?;
    match arg(2) {
        Some("stream") => stream(s, Duration::from_secs_f64(seconds)),
        Some("pingpong") => pingpong(s, Duration::from_secs_f64(seconds), size.clamp(1, 1 << 20)),
        _ => Err(usage()),
    }
}
