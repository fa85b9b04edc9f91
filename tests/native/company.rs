//! A native end, and at the other a program that is preloaded, native itself, both, or neither.

use crate::{Program, eager, in_ring};
use smc::net::{Builder, Mode, Reason, Stream, UpgradeAfter};
use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;

const BLOCK: usize = 128 << 10;

/// Ping-pong with `plain_server`.
fn pingpong(stream: &mut Stream, times: usize) {
    stream.write_all(b"P").unwrap();
    stream.write_all(&16u32.to_le_bytes()).unwrap();
    for n in 0..times {
        let (out, mut back) = ([n as u8; 16], [0; 16]);
        stream.write_all(&out).unwrap();
        stream.read_exact(&mut back).unwrap();
        assert_eq!(out, back);
    }
}

#[test]
fn a_native_client_and_a_preloaded_server_use_memory() {
    let (_server, address) = Program::server("plain_server", true, &[]);
    let mut stream = eager().connect(address).unwrap();
    pingpong(&mut stream, 2000);
    assert!(in_ring(&stream), "{:?}", stream.status());
}

#[test]
fn a_native_client_and_a_server_without_libsmc_use_tcp() {
    let (_server, address) = Program::server("plain_server", false, &[]);
    let mut stream = eager().connect(address).unwrap();
    pingpong(&mut stream, 2000);
    assert_eq!((stream.mode(), stream.reason()), (Mode::Tcp, Some(Reason::PeerNoSmc)));
    assert_eq!(stream.status().unwrap().tx_bytes_ring, 0);
}

/// Takes blocks of `plain_client`'s stream as `plain_server` would, until the end or so many; how many.
fn blocks(from: &mut impl Read, first: u64, most: u64) -> u64 {
    let mut block = vec![0; BLOCK];
    for n in first..first.saturating_add(most) {
        if from.read_exact(&mut block).is_err() {
            return n - first;
        }
        assert_eq!(
            (&block[..8], &block[BLOCK - 8..]),
            (&n.to_le_bytes()[..], &n.to_le_bytes()[..]),
            "block {n}"
        );
    }
    most
}

/// `plain_client stream` against a server of ours, which is given its connection after the first byte.
fn with_plain_client(preloaded: bool, serve: impl FnOnce(Stream) -> u64 + Send + 'static) {
    let listener = eager().listen("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0]).unwrap();
        serve(stream)
    });
    let out = Program::client("plain_client", preloaded, &[&address, "stream", "0.3"]);
    let bytes = server.join().unwrap() * BLOCK as u64;
    assert!(out.starts_with(&format!("bytes {bytes} ")), "{out}");
}

#[test]
fn a_preloaded_client_and_a_native_server_use_memory() {
    with_plain_client(true, |mut stream| {
        let n = blocks(&mut stream, 0, u64::MAX);
        stream.write_all(&(n * BLOCK as u64).to_le_bytes()).unwrap();
        let status = stream.status().unwrap();
        assert!(status.best == Mode::Shm && status.rx_bytes_ring > 0, "{status:?}");
        n
    });
}

#[test]
fn a_client_without_libsmc_and_a_native_server_use_tcp() {
    with_plain_client(false, |mut stream| {
        let n = blocks(&mut stream, 0, u64::MAX);
        stream.write_all(&(n * BLOCK as u64).to_le_bytes()).unwrap();
        assert_eq!((stream.mode(), stream.reason()), (Mode::Tcp, Some(Reason::PeerNoSmc)));
        n
    });
}

#[test]
fn into_tcp_under_a_preloaded_peer_loses_nothing() {
    with_plain_client(true, |mut stream| {
        // Until the stream has gone into the ring, or the client ends: it sends for a while only.
        let mut n = 0;
        while stream.status().unwrap().mode_rx == Mode::Tcp && blocks(&mut stream, n, 1) == 1 {
            n += 1;
        }
        let (mut tcp, unread) = stream.into_tcp().unwrap();
        let n = n + blocks(&mut (&unread[..]).chain(&mut tcp), n, u64::MAX);
        tcp.write_all(&(n * BLOCK as u64).to_le_bytes()).unwrap();
        n
    });
}

/// The native example with every combination of who is preloaded: the engine is one for each process, so all are
/// upgraded.
#[test]
fn a_native_program_under_the_preload_is_upgraded_by_it() {
    for (server, client) in [(false, false), (true, false), (false, true), (true, true)] {
        let (_server, address) = Program::server("echo", server, &[]);
        let out = Program::client("echo", client, &[&address, "3000"]);
        assert_eq!(out, "3000 messages, now by SHM\n", "server preloaded: {server}, client: {client}");
    }
}

#[test]
fn all_of_the_api_works_where_the_streams_are_left_to_the_preload() {
    let (_server, address) = Program::server("file_copy", true, &["receive", "/dev/null"]);
    let mut c = Program::command("file_copy", true);
    let out = c.args(["send", "/proc/self/exe", &address]).stderr(Stdio::inherit()).output().unwrap();
    assert!(out.status.success());
}

#[test]
fn a_disabled_program_is_plain_tcp() {
    let mut never = Builder::new();
    never.upgrade_after(UpgradeAfter::Never);
    let (_server, address) = Program::server("echo", false, &[]);
    let mut c = Program::command("echo", false);
    let out = c.args([&address, "100"]).env("SMC_DISABLE", "1").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "100 messages, now by TCP (disabled)\n");
    let mut stream = never.connect(&address).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    assert_eq!(stream.mode(), Mode::Tcp);
}
