//! An ordinary server on `std::net`: it knows nothing of libsmc. With `plain_client` it is what
//! `cargo xtask demo` runs on every machine, first on TCP, then with libsmc.so preloaded.
//!
//! The first byte of a connection says what it is for:
//!
//! - `S`: a stream of 128 KiB blocks. Each begins and ends with its number (u64, little endian), which the
//!   server checks; at the end of the stream it answers with the number of bytes it got (u64).
//! - `P`: ping-pong. A length (u32), then messages of that length, each sent back.
//!
//! Usage: `plain_server [ADDR]` (default 127.0.0.1:0). The first line of output is the address.

use std::io::{self, Error, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

const BLOCK: usize = 128 << 10;

/// Counts and checks the blocks of one stream.
fn sink(mut s: TcpStream) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    for n in 0u64.. {
        match s.read_exact(&mut block) {
            Ok(()) if block[..8] == n.to_le_bytes() && block[BLOCK - 8..] == n.to_le_bytes() => {}
            Ok(()) => return Err(Error::new(ErrorKind::InvalidData, format!("block {n} is damaged"))),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                return s.write_all(&(n * BLOCK as u64).to_le_bytes());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Sends each message back.
fn echo(mut s: TcpStream) -> io::Result<()> {
    let mut len = [0; 4];
    s.read_exact(&mut len)?;
    let mut message = vec![0; (u32::from_le_bytes(len) as usize).min(1 << 20)];
    loop {
        match s.read_exact(&mut message) {
            Ok(()) => s.write_all(&message)?,
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

fn serve(mut s: TcpStream) -> io::Result<()> {
    s.set_nodelay(true)?;
    let mut kind = [0];
    s.read_exact(&mut kind)?;
    match kind[0] {
        b'S' => sink(s),
        b'P' => echo(s),
        other => Err(Error::new(ErrorKind::InvalidData, format!("unknown request {other}"))),
    }
}

fn main() -> io::Result<()> {
    let listener = TcpListener::bind(std::env::args().nth(1).unwrap_or("127.0.0.1:0".into()))?;
    println!("{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(e) = serve(stream) {
                eprintln!("plain_server: {e}");
            }
        });
    }
    Ok(())
}
