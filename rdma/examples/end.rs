//! Either end of a connection, for the tests: a program that knows sockets and nothing else.
//!
//!     end serve ADDRESS PORT CONNECTIONS WHAT BYTES    prints "listening", and at the end "served"
//!     end fork LATE ADDRESS PORT WHAT BYTES    one connection, by a child; its parent closes it LATE ms after the fork
//!     end hand ADDRESS PORT    one connection: standard input and output of `cat`, which a child becomes
//!     end connect FROM ADDRESS PORT CONNECTIONS WHAT BYTES    prints "done"
//!
//! WHAT: `up` the client sends and shuts down, the server answers with the count; `down` the server sends and closes;
//! `both` at once in both directions; `echo` the client sends 64 bytes at a time and gets them back; `first` the server
//! greets, then as `echo`; `late` as `echo`, the server 7 s late; `rst` the server closes with bytes unread; `hang` the
//! server says "hanging" and is killed; `slow` as `echo`, and once more over a connection whose server does not read
//! before all others are through: the client fills it, the others go on, and then it says "open" and waits for a line.
//! Each byte is checked.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

const PIECE: usize = 48_611;

fn byte(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn send(mut s: &TcpStream, bytes: u64) {
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(PIECE as u64);
        let piece: Vec<u8> = (at..at + n).map(byte).collect();
        s.write_all(&piece).unwrap();
        at += n;
    }
}

/// Reads `bytes`, or to the end, and checks them; how many there were.
fn receive(mut s: &TcpStream, bytes: Option<u64>) -> u64 {
    let (mut at, mut piece) = (0, vec![0; PIECE]);
    loop {
        let most = bytes.map_or(PIECE as u64, |b| (b - at).min(PIECE as u64)) as usize;
        let n = if most == 0 { 0 } else { s.read(&mut piece[..most]).unwrap() };
        if n == 0 {
            return at;
        }
        let wrong = piece[..n].iter().zip(at..).find(|(b, at)| **b != byte(*at));
        assert!(wrong.is_none(), "at {:?} of {bytes:?}", wrong.map(|w| w.1));
        at += n as u64;
    }
}

fn echo(mut s: &TcpStream) {
    let mut piece = [0; PIECE];
    loop {
        match s.read(&mut piece).unwrap() {
            0 => return,
            n => s.write_all(&piece[..n]).unwrap(),
        }
    }
}

fn ping(mut s: &TcpStream, bytes: u64) {
    let mut at = 0;
    while at < bytes {
        let out: Vec<u8> = (at..at + 64).map(byte).collect();
        s.write_all(&out).unwrap();
        let mut back = [0; 64];
        s.read_exact(&mut back).unwrap();
        assert_eq!(back[..], out[..]);
        at += 64;
    }
}

fn both(s: &TcpStream, bytes: u64) {
    thread::scope(|t| {
        t.spawn(|| {
            send(s, bytes);
            s.shutdown(Shutdown::Write).unwrap();
        });
        assert_eq!(receive(s, None), bytes);
    });
}

/// Connections of `slow` that are through.
static THROUGH: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// `slow`, at the server: the first byte tells which connection it is, and how many others there are.
fn serve_slow(mut s: TcpStream) {
    let mut first = [0; 9];
    s.read_exact(&mut first).unwrap();
    let others = u64::from_be_bytes(first[1..].try_into().unwrap()) as usize;
    if first[0] == b'e' {
        echo(&s);
        *THROUGH.0.lock().unwrap() += 1;
        THROUGH.1.notify_all();
        return;
    }
    drop(THROUGH.1.wait_while(THROUGH.0.lock().unwrap(), |n| *n < others).unwrap());
    let n = receive(&s, None);
    s.write_all(&n.to_be_bytes()).unwrap();
}

/// `slow`, at the client.
fn connect_slow(all: Vec<TcpStream>, bytes: u64) {
    let ([full, echoing @ ..], others) = (&all[..], all.len() as u64 - 1) else { return };
    for (s, kind) in all.iter().zip(std::iter::once(b's').chain(std::iter::repeat(b'e'))) {
        let mut first = vec![kind];
        first.extend(others.to_be_bytes());
        (&mut &*s).write_all(&first).unwrap();
    }
    full.set_nonblocking(true).unwrap();
    let mut filled = 0;
    let filling = loop {
        let piece: Vec<u8> = (filled..filled + 8192).map(byte).collect();
        match (&mut &*full).write(&piece) {
            Ok(n) => filled += n as u64,
            Err(e) => break e,
        }
    };
    assert_eq!(filling.kind(), io::ErrorKind::WouldBlock);
    full.set_nonblocking(false).unwrap();
    echoing.iter().for_each(|s| ping(s, bytes));
    println!("open");
    io::stdin().read_line(&mut String::new()).unwrap();
    for s in echoing {
        s.shutdown(Shutdown::Write).unwrap();
        assert_eq!(receive(s, None), 0);
    }
    full.shutdown(Shutdown::Write).unwrap();
    let mut n = [0; 8];
    (&mut &*full).read_exact(&mut n).unwrap();
    assert_eq!(u64::from_be_bytes(n), filled);
}

fn served(mut s: TcpStream, what: &str, bytes: u64) {
    match what {
        "slow" => serve_slow(s),
        "up" => {
            let n = receive(&s, None);
            s.write_all(&n.to_be_bytes()).unwrap();
        }
        "down" => send(&s, bytes),
        "both" => both(&s, bytes),
        "echo" => echo(&s),
        "late" => {
            thread::sleep(Duration::from_secs(7));
            echo(&s);
        }
        "first" => {
            s.write_all(b"hello\n").unwrap();
            echo(&s);
        }
        "rst" => assert_eq!(receive(&s, Some(1000)), 1000),
        "hang" => {
            assert_eq!(receive(&s, Some(1000)), 1000);
            println!("hanging");
            echo(&s);
        }
        what => panic!("{what}?"),
    }
}

fn connected(mut s: TcpStream, what: &str, bytes: u64) {
    match what {
        "up" => {
            send(&s, bytes);
            s.shutdown(Shutdown::Write).unwrap();
            let mut n = [0; 8];
            s.read_exact(&mut n).unwrap();
            assert_eq!(u64::from_be_bytes(n), bytes);
            assert_eq!(s.read(&mut n).unwrap(), 0);
        }
        "down" => assert_eq!(receive(&s, None), bytes),
        "both" => both(&s, bytes),
        "echo" | "late" => ping(&s, bytes),
        "first" => {
            let mut hello = [0; 6];
            s.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"hello\n");
            ping(&s, bytes);
        }
        "rst" | "hang" => {
            send(&s, if what == "rst" { 5000 } else { 1000 });
            let e = s.read(&mut [0]).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
        }
        what => panic!("{what}?"),
    }
}

/// A child serves the connection, which this process has as well for so long.
fn served_by_child(s: TcpStream, late: u64, what: &str, bytes: u64) {
    // SAFETY: the only thread of the process.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        served(s, what, bytes);
        std::process::exit(0);
    }
    thread::sleep(Duration::from_millis(late));
    drop(s);
    let mut status = 1;
    // SAFETY: a place for the status.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
}

/// A connection from that address.
fn dial(from: Ipv4Addr, to: SocketAddrV4) -> TcpStream {
    let address = |at: Ipv4Addr, port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(at).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    let (own, other) = (address(from, 0), address(*to.ip(), to.port()));
    let len = size_of_val(&own) as u32;
    // SAFETY: an address, and its size.
    assert_eq!(unsafe { libc::bind(fd, (&raw const own).cast(), len) }, 0);
    // SAFETY: as above.
    let rc = unsafe { libc::connect(fd, (&raw const other).cast(), len) };
    assert_eq!(rc, 0, "{}", io::Error::last_os_error());
    // SAFETY: a socket of ours that nobody else has.
    unsafe { TcpStream::from_raw_fd(fd) }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", at, port, n, what, bytes] => {
            let at = SocketAddrV4::new(at.parse().unwrap(), port.parse().unwrap());
            let l = TcpListener::bind(at).unwrap();
            println!("listening");
            thread::scope(|t| {
                for _ in 0..n.parse::<usize>().unwrap() {
                    let s = l.accept().unwrap().0;
                    t.spawn(move || served(s, what, bytes.parse().unwrap()));
                }
            });
            println!("served");
        }
        ["fork", late, at, port, what, bytes] => {
            let at = SocketAddrV4::new(at.parse().unwrap(), port.parse().unwrap());
            let l = TcpListener::bind(at).unwrap();
            println!("listening");
            let s = l.accept().unwrap().0;
            served_by_child(s, late.parse().unwrap(), what, bytes.parse().unwrap());
            println!("served");
        }
        ["hand", at, port] => {
            let at = SocketAddrV4::new(at.parse().unwrap(), port.parse().unwrap());
            let l = TcpListener::bind(at).unwrap();
            println!("listening");
            let s = OwnedFd::from(l.accept().unwrap().0);
            let mut cat = Command::new("cat").stdin(s.try_clone().unwrap()).stdout(s).spawn().unwrap();
            assert!(cat.wait().unwrap().success());
            println!("served");
        }
        ["connect", from, at, port, n, what, bytes] => {
            let at = SocketAddrV4::new(at.parse().unwrap(), port.parse().unwrap());
            let from: Ipv4Addr = from.parse().unwrap();
            let n = n.parse::<usize>().unwrap();
            if what == "slow" {
                connect_slow((0..n).map(|_| dial(from, at)).collect(), bytes.parse().unwrap());
            }
            thread::scope(|t| {
                for _ in 0..if what == "slow" { 0 } else { n } {
                    t.spawn(move || connected(dial(from, at), what, bytes.parse().unwrap()));
                }
            });
            println!("done");
        }
        _ => panic!("what?"),
    }
}
