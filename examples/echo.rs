//! Echo by `smc::net`: a server that sends back what it gets, a thread for each connection, and a client that checks it.
//!
//! Usage: `echo [ADDR]` serves (default 127.0.0.1:0; the first line of output is the address);
//! `echo ADDR MESSAGES` sends so many, and says by which way they went.

use smc::net::{Listener, Stream};
use std::io::{self, Read, Write};
use std::thread;

/// Sends all of it back.
fn serve(mut stream: Stream) -> io::Result<()> {
    let mut buf = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buf)? {
            0 => return Ok(()),
            n => stream.write_all(&buf[..n])?,
        }
    }
}

fn server(address: &str) -> io::Result<()> {
    let listener = Listener::bind(address)?;
    println!("{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(e) = serve(stream) {
                eprintln!("echo: {e}");
            }
        });
    }
    Ok(())
}

fn client(address: &str, messages: u32) -> io::Result<()> {
    let mut stream = Stream::connect(address)?;
    for n in 0..messages {
        let mut back = [0; 4];
        stream.write_all(&n.to_le_bytes())?;
        stream.read_exact(&mut back)?;
        if u32::from_le_bytes(back) != n {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("message {n} is damaged")));
        }
    }
    let why = stream.reason().map_or(String::new(), |r| format!(" ({r})"));
    println!("{messages} messages, now by {}{why}", stream.mode().name());
    Ok(())
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => server("127.0.0.1:0"),
        [address] => server(address),
        [address, messages, ..] => {
            client(address, messages.parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?)
        }
    }
}
