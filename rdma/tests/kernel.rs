//! The other end is the kernel's AF_SMC, a server or a client, whose socket the kernel itself takes to SMC-R.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "world/af_smc.rs"]
mod af_smc;
#[path = "world/option.rs"]
mod option;
mod world;

use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::sync::Once;
use std::thread;
use std::time::Instant;

use af_smc::{IPPROTO_SMC, dial, listener, mode, port_of};
use smc::wire::smcr::Eid;
use smc_rdma::session::{Outcome, Path, Session, accept, connect};
use world::{End, ends, fill, is_filled};

const BULK: u64 = 50 << 20;
/// A TCP connection from one end to the other, its SYN with the option.
fn tcp(from: &End, to: SocketAddrV4) -> TcpStream {
    with_option();
    dial(0, from, to)
}

/// From now on, TCP connections of this process offer SMC.
fn with_option() {
    static OPTION: Once = Once::new();
    OPTION.call_once(|| option::offer_smc().unwrap());
}

fn path(end: &End, eid: &str) -> Path {
    let (device, gid) = (end.device.clone(), end.gid.clone());
    Path { device, port: 1, gid, eid: Eid::user(eid).unwrap(), ring: 256 << 10 }
}

fn rdma(outcome: Outcome) -> Session {
    match outcome {
        Outcome::Rdma(s) => s,
        Outcome::Tcp(_, why) => panic!("declined: {why}"),
    }
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn kernel_server_takes_fifty_megabytes_and_gives_them_back() {
    let [ours, theirs] = ends();
    let server = listener(theirs.address);
    let port = port_of(&server);
    let kernel = thread::spawn(move || {
        let (mut s, peer) = server.accept().unwrap();
        assert_eq!(mode(port, peer.port()), Some(0), "the kernel does not call it SMC-R");
        let (mut at, mut bytes) = (0, vec![0; 1 << 16]);
        while at < BULK {
            let n = s.read(&mut bytes).unwrap();
            assert!(n > 0, "the end at {at}");
            assert!(is_filled(at, &bytes[..n]), "at {at}");
            at += n as u64;
        }
        for at in (0..BULK).step_by(bytes.len()) {
            fill(at, &mut bytes);
            s.write_all(&bytes).unwrap();
        }
        // Half-closed by the client: the end, and only then ours.
        assert_eq!(s.read(&mut bytes).unwrap(), 0);
    });
    let to = SocketAddrV4::new(theirs.address, port);
    let mut s = rdma(connect(tcp(&ours, to), &path(&ours, "SMC-VM")).unwrap());
    let (start, mut bytes) = (Instant::now(), vec![0; 1 << 16]);
    for at in (0..BULK).step_by(bytes.len()) {
        fill(at, &mut bytes);
        let mut sent = 0;
        while sent < bytes.len() {
            sent += s.write(&bytes[sent..]).unwrap();
        }
    }
    let out = start.elapsed();
    let mut at = 0;
    while at < BULK {
        let n = s.read(&mut bytes).unwrap();
        assert!(n > 0, "the end at {at}");
        assert!(is_filled(at, &bytes[..n]), "at {at}");
        at += n as u64;
    }
    let back = start.elapsed() - out;
    s.shutdown().unwrap();
    kernel.join().unwrap();
    assert_eq!(s.read(&mut bytes).unwrap(), 0);
    s.close().unwrap();
    let rate = |t: std::time::Duration| BULK as f64 / 1e6 / t.as_secs_f64();
    println!("to the kernel {:.1} MB/s, from it {:.1} MB/s", rate(out), rate(back));
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn ping_pong_with_the_kernel() {
    let [ours, theirs] = ends();
    let server = listener(theirs.address);
    let port = port_of(&server);
    const ROUNDS: u64 = 500;
    let kernel = thread::spawn(move || {
        let (mut s, peer) = server.accept().unwrap();
        assert_eq!(mode(port, peer.port()), Some(0));
        let mut bytes = [0; 64];
        for _ in 0..ROUNDS {
            s.read_exact(&mut bytes).unwrap();
            s.write_all(&bytes).unwrap();
        }
        assert_eq!(s.read(&mut bytes).unwrap(), 0);
    });
    let mut s =
        rdma(connect(tcp(&ours, SocketAddrV4::new(theirs.address, port)), &path(&ours, "SMC-VM")).unwrap());
    let (mut bytes, mut got) = ([0; 64], [0; 64]);
    for round in 0..ROUNDS {
        fill(round * 64, &mut bytes);
        assert_eq!(s.write(&bytes).unwrap(), 64);
        let mut n = 0;
        while n < 64 {
            n += s.read(&mut got[n..]).unwrap();
        }
        assert_eq!(bytes, got);
    }
    s.close().unwrap();
    kernel.join().unwrap();
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn the_kernel_declines_an_eid_it_does_not_know_and_tcp_goes_on() {
    let [ours, theirs] = ends();
    let server = listener(theirs.address);
    let port = port_of(&server);
    let kernel = thread::spawn(move || {
        let (mut s, peer) = server.accept().unwrap();
        assert_eq!(mode(port, peer.port()), Some(1));
        let mut bytes = [0; 5];
        s.read_exact(&mut bytes).unwrap();
        s.write_all(&bytes).unwrap();
    });
    let outcome =
        connect(tcp(&ours, SocketAddrV4::new(theirs.address, port)), &path(&ours, "NOBODY")).unwrap();
    let Outcome::Tcp(mut s, _) = outcome else { panic!("{outcome:?}") };
    s.write_all(b"plain").unwrap();
    let mut bytes = [0; 5];
    s.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"plain");
    kernel.join().unwrap();
}

/// A connection, and what the kernel's end does with its.
fn with_kernel<T: Send + 'static>(
    ours: &End,
    theirs: &End,
    f: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (Session, thread::JoinHandle<T>) {
    let server = listener(theirs.address);
    let port = port_of(&server);
    let kernel = thread::spawn(move || {
        let (s, peer) = server.accept().unwrap();
        assert_eq!(mode(port, peer.port()), Some(0));
        f(s)
    });
    let to = SocketAddrV4::new(theirs.address, port);
    (rdma(connect(tcp(ours, to), &path(ours, "SMC-VM")).unwrap()), kernel)
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn the_kernel_may_close_first() {
    let [ours, theirs] = ends();
    let (mut s, kernel) = with_kernel(&ours, &theirs, |mut s| s.write_all(b"bye").unwrap());
    let mut bytes = [0; 16];
    let mut got = Vec::new();
    loop {
        match s.read(&mut bytes).unwrap() {
            0 => break,
            n => got.extend_from_slice(&bytes[..n]),
        }
    }
    assert_eq!(got, b"bye");
    assert_eq!(s.read(&mut bytes).unwrap(), 0);
    kernel.join().unwrap();
    s.close().unwrap();
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn a_kernel_that_closes_with_bytes_unread_resets() {
    let [ours, theirs] = ends();
    let (mut s, kernel) = with_kernel(&ours, &theirs, |mut s| s.read_exact(&mut [0; 10]).unwrap());
    let bytes = vec![1; 1 << 16];
    let e = loop {
        if let Err(e) = s.write(&bytes) {
            break e;
        }
    };
    assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
    kernel.join().unwrap();
    s.close().unwrap();
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn closing_with_bytes_unread_ends_the_kernels_end() {
    let [ours, theirs] = ends();
    let (mut s, kernel) = with_kernel(&ours, &theirs, |mut s| {
        s.write_all(&[1; 100]).unwrap();
        // Linux tells a reader of the end only; a writer hears that nobody is there.
        let read = s.read(&mut [0; 1]).unwrap_or(0);
        (read, s.write(&[1]).map_err(|e| e.kind()))
    });
    assert!(s.read(&mut [0; 10]).unwrap() > 0);
    s.close().unwrap();
    let (read, write) = kernel.join().unwrap();
    assert_eq!(read, 0);
    assert!(matches!(write, Err(io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)), "{write:?}");
}

/// Packets are lost on their way from here, as long as this lives.
struct Loss;

impl Loss {
    fn new() -> Self {
        let tc = "modprobe sch_netem && tc qdisc add dev eth0 root netem loss 5%";
        assert!(std::process::Command::new("sh").args(["-c", tc]).status().unwrap().success());
        Self
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        let tc = std::process::Command::new("tc").args(["qdisc", "del", "dev", "eth0", "root"]).status();
        assert!(tc.is_ok_and(|s| s.success()));
    }
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn lost_packets_are_the_devices_business() {
    const SOME: u64 = 2 << 20;
    let [ours, theirs] = ends();
    let (mut s, kernel) = with_kernel(&ours, &theirs, |mut s| {
        let (mut at, mut bytes) = (0, vec![0; 1 << 16]);
        loop {
            match s.read(&mut bytes).unwrap() {
                0 => return at,
                n => {
                    assert!(is_filled(at, &bytes[..n]), "at {at}");
                    at += n as u64;
                }
            }
        }
    });
    let loss = Loss::new();
    let mut bytes = vec![0; 1 << 14];
    for at in (0..SOME).step_by(bytes.len()) {
        fill(at, &mut bytes);
        let mut sent = 0;
        while sent < bytes.len() {
            sent += s.write(&bytes[sent..]).unwrap();
        }
    }
    drop(loss);
    s.close().unwrap();
    assert_eq!(kernel.join().unwrap(), SOME);
}

#[test]
#[ignore = "needs RDMA devices and AF_SMC"]
fn a_kernel_client_gives_fifty_megabytes_and_takes_them_back() {
    let [theirs, ours] = ends();
    with_option();
    let server = TcpListener::bind((ours.address, 0)).unwrap();
    let to = SocketAddrV4::new(ours.address, port_of(&server));
    let kernel = thread::spawn(move || {
        let mut s = dial(IPPROTO_SMC, &theirs, to);
        assert_eq!(
            mode(s.local_addr().unwrap().port(), to.port()),
            Some(0),
            "the kernel does not call it SMC-R"
        );
        let mut bytes = vec![0; 1 << 16];
        for at in (0..BULK).step_by(bytes.len()) {
            fill(at, &mut bytes);
            s.write_all(&bytes).unwrap();
        }
        s.shutdown(std::net::Shutdown::Write).unwrap();
        let mut at = 0;
        loop {
            match s.read(&mut bytes).unwrap() {
                0 => return at,
                n => {
                    assert!(is_filled(at, &bytes[..n]), "at {at}");
                    at += n as u64;
                }
            }
        }
    });
    let (tcp, _) = server.accept().unwrap();
    let start = Instant::now();
    let mut s = rdma(accept(tcp, &path(&ours, "SMC-VM")).unwrap());
    println!("first contact in {:?}", start.elapsed());
    let (mut at, mut bytes) = (0, vec![0; 1 << 16]);
    loop {
        match s.read(&mut bytes).unwrap() {
            0 => break,
            n => {
                assert!(is_filled(at, &bytes[..n]), "at {at}");
                at += n as u64;
            }
        }
    }
    assert_eq!(at, BULK);
    for at in (0..BULK).step_by(bytes.len()) {
        fill(at, &mut bytes);
        let mut sent = 0;
        while sent < bytes.len() {
            sent += s.write(&bytes[sent..]).unwrap();
        }
    }
    s.close().unwrap();
    assert_eq!(kernel.join().unwrap(), BULK);
}

#[test]
#[ignore = "needs RDMA devices"]
fn both_ends_may_be_ours() {
    let [a, b] = ends();
    with_option();
    let server = TcpListener::bind((b.address, 0)).unwrap();
    let to = SocketAddrV4::new(b.address, port_of(&server));
    let client = thread::spawn(move || {
        let mut s = rdma(connect(tcp(&a, to), &path(&a, "ONE")).unwrap());
        let (mut bytes, mut got) = ([0; 100], [0; 100]);
        for round in 0..200 {
            fill(round * 100, &mut bytes);
            assert_eq!(s.write(&bytes).unwrap(), 100);
            let mut n = 0;
            while n < 100 {
                n += s.read(&mut got[n..]).unwrap();
            }
            assert_eq!(got, bytes);
        }
        s.close().unwrap();
    });
    let (tcp, _) = server.accept().unwrap();
    let mut s = rdma(accept(tcp, &path(&b, "ONE")).unwrap());
    let mut bytes = [0; 64];
    loop {
        match s.read(&mut bytes).unwrap() {
            0 => break,
            n => assert_eq!(s.write(&bytes[..n]).unwrap(), n),
        }
    }
    s.close().unwrap();
    client.join().unwrap();
}
