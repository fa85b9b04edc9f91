//! A file is copied over a connection, with no copy of its bytes in this program: the sender has the kernel read the file
//! into the ring (`reserve`, `fill_from`, `commit`), the receiver has it write the file from there (`consume_with`).
//!
//! Usage: `file_copy receive FILE [ADDR]` takes one file (default 127.0.0.1:0; the first line of output is the address);
//! `file_copy send FILE ADDR` sends it.

use smc::net::{Builder, SharedSlice, Stream, UpgradeAfter};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};

/// Asked for at a time.
const PIECE: usize = 256 << 10;

/// Worth it from the beginning, and with much room.
fn options() -> Builder {
    let mut b = Builder::new();
    b.upgrade_after(UpgradeAfter::Now).ring_size(2 << 20);
    b
}

fn send(file: &File, mut stream: Stream) -> io::Result<u64> {
    let mut all = 0;
    loop {
        let mut space = stream.reserve(PIECE)?;
        let n = space.fill_from(file)?;
        if n == 0 {
            break;
        }
        space.commit(n)?;
        all += n as u64;
    }
    // The receiver says how much it has: then it is there.
    stream.shutdown(Shutdown::Write)?;
    let mut got = [0; 8];
    stream.read_exact(&mut got)?;
    if u64::from_le_bytes(got) != all {
        return Err(io::Error::other("the receiver has not got all"));
    }
    Ok(all)
}

/// Writes all of `pieces`, or as much as a failing file takes.
fn write_all(pieces: [SharedSlice<'_>; 2], file: RawFd, failed: &mut Option<io::Error>) -> usize {
    let (mut rest, mut done) = (pieces, 0);
    while rest.iter().any(|p| !p.is_empty()) {
        match SharedSlice::write_to(&rest, file) {
            n @ 1.. => {
                let n = n as usize;
                let first = rest[0].len();
                rest = [rest[0].part(n, usize::MAX), rest[1].part(n.saturating_sub(first), usize::MAX)];
                done += n;
            }
            e => {
                *failed = Some(io::Error::from_raw_os_error(-e as i32));
                break;
            }
        }
    }
    done
}

fn receive(file: &File, mut stream: Stream) -> io::Result<u64> {
    let (mut all, mut failed) = (0, None);
    loop {
        match stream.consume_with(PIECE, |pieces| write_all(pieces, file.as_raw_fd(), &mut failed))? {
            _ if failed.is_some() => return failed.map_or(Ok(all), Err),
            0 => break,
            n => all += n as u64,
        }
    }
    stream.write_all(&all.to_le_bytes())?;
    Ok(all)
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["send", path, address] => {
            let n = send(&File::open(path)?, options().connect(*address)?)?;
            println!("{n} bytes sent");
        }
        ["receive", path, rest @ ..] => {
            let listener = options().listen(rest.first().unwrap_or(&"127.0.0.1:0"))?;
            println!("{}", listener.local_addr()?);
            let n = receive(&File::create(path)?, listener.accept()?.0)?;
            println!("{n} bytes received");
        }
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "send FILE ADDR, or receive FILE [ADDR]",
            ));
        }
    }
    Ok(())
}
