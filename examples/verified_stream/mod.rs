//! A stream in which every byte is known: numbered, checksummed blocks, the same for writer and reader.
//!
//! A block is its number (8 bytes), its length (4), a checksum of its payload (8) and the payload, all derived from
//! the number and the stream's name. A reader makes each block anew and compares byte for byte, so also a block
//! that was cut off by a death is checked up to its last byte.

use std::io::{self, ErrorKind, Read, Write};

const HEAD: usize = 20;

/// The block of this number in the stream of this name.
fn block(name: u8, number: u64) -> Vec<u8> {
    let mut x = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(name) << 56 | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    // Mostly small, now and then more than a buffer.
    let len = if number % 64 == 63 { 100_000 } else { (next() % 3000) as usize };
    let mut payload = Vec::with_capacity(len + 8);
    while payload.len() < len {
        payload.extend(next().to_le_bytes());
    }
    payload.truncate(len);
    let sum = payload
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    let mut out = Vec::with_capacity(HEAD + len);
    out.extend(number.to_le_bytes());
    out.extend((len as u32).to_le_bytes());
    out.extend(sum.to_le_bytes());
    out.extend(payload);
    out
}

/// How a stream, or a part of it, ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Orderly (the part is complete, or EOF), or as TCP tells of a dead peer.
    Gone,
    /// A byte that was never sent.
    Wrong(String),
    /// An error that TCP does not give here.
    Odd(String),
}

fn ending(e: &io::Error) -> End {
    match e.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => End::Gone,
        _ => End::Odd(e.to_string()),
    }
}

/// Bytes back and forth, one at a time, before the blocks: a connection that talks both ways is soon upgraded,
/// one that is flooded from the start may take its time.
pub fn greet(mut s: impl Read + Write, first: bool) -> End {
    for i in 0..=255u8 {
        let mut b = [i];
        let r = if first {
            s.write_all(&b).and_then(|()| s.read_exact(&mut b))
        } else {
            s.read_exact(&mut b).and_then(|()| s.write_all(&b))
        };
        match r {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return End::Gone,
            Err(e) => return ending(&e),
            Ok(()) if b != [i] => return End::Wrong(format!("greeting {i} is {}", b[0])),
            Ok(()) => {}
        }
    }
    End::Gone
}

/// Writes blocks until the peer is gone.
pub fn write_all(mut s: impl Write, name: u8) -> End {
    for number in 0.. {
        if let Err(e) = s.write_all(&block(name, number)) {
            return ending(&e);
        }
    }
    End::Gone
}

/// Reads blocks until the peer is gone; `seen` is told of every good block.
pub fn read_all(mut s: impl Read, name: u8, mut seen: impl FnMut(u64)) -> (u64, End) {
    let mut total = 0;
    for number in 0.. {
        let want = block(name, number);
        let mut got = vec![0; want.len()];
        let mut have = 0;
        while have < got.len() {
            match s.read(&mut got[have..]) {
                Ok(0) => return (total, End::Gone),
                Ok(n) => {
                    if let Some(i) = (have..have + n).find(|i| got[*i] != want[*i]) {
                        let what =
                            format!("block {number} byte {i} is {:#04x}, not {:#04x}", got[i], want[i]);
                        return (total, End::Wrong(what));
                    }
                    have += n;
                    total += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return (total, ending(&e)),
            }
        }
        seen(number);
    }
    (total, End::Gone)
}
