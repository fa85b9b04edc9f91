//! Unmodified programs under libsmc.so, one on each end of a link: what they move goes by RDMA, and what can't by TCP.
//!
//! Both ends are on one host, in one network namespace; `SMC_TEST_REMOTE` makes them each other's other host.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "world/pair.rs"]
mod pair_of;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use pair_of::{End, Moved, echo, ends, library, port, program};

/// A server and a client; what each has moved.
fn pair(n: u64, what: &str, bytes: u64, settings: &[(&str, &str)]) -> (Moved, Moved) {
    pair_with(n, what, bytes, [settings, settings])
}

/// As [`pair`], the server's settings first.
fn pair_with(n: u64, what: &str, bytes: u64, settings: [&[(&str, &str)]; 2]) -> (Moved, Moved) {
    let ([a, b], port) = (ends(), port().to_string());
    let (n, bytes) = (n.to_string(), bytes.to_string());
    let mut server = End::start(&["serve", &b, &port, &n, what, &bytes], false, settings[0]);
    server.says("listening");
    let client = End::start(&["connect", &a, &b, &port, &n, what, &bytes], false, settings[1]);
    let client = client.ends("done");
    (server.ends("served"), client)
}

/// As [`pair`], and all of it went by RDMA: so much each way.
fn by_rdma(n: u64, what: &str, bytes: u64, [up, down]: [u64; 2]) {
    let (server, client) = pair(n, what, bytes, &[]);
    assert_eq!(client, Moved { rdma: n, tcp: 0, rdma_tx: up, rdma_rx: down, back: 0 });
    assert_eq!(server, Moved { rdma: n, tcp: 0, rdma_tx: down, rdma_rx: up, back: 0 });
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_stream_to_the_server_and_its_half_close() {
    by_rdma(1, "up", 3_000_000, [3_000_000, 8]);
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_stream_to_the_client_until_the_server_closes() {
    by_rdma(1, "down", 3_000_000, [0, 3_000_000]);
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn both_directions_at_once() {
    by_rdma(1, "both", 2_000_000, [2_000_000, 2_000_000]);
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn the_server_speaks_first() {
    by_rdma(1, "first", 6_400, [6_400, 6_406]);
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn connections_at_once() {
    by_rdma(6, "echo", 6_400, [38_400, 38_400]);
}

/// How many queue pairs, and how many pieces of registered memory, programs have on both devices.
fn resources() -> [usize; 2] {
    ["qp", "mr"].map(|kind| {
        let told = Command::new("rdma").args(["resource", "show", kind]).output().unwrap();
        assert!(told.status.success());
        let lines = String::from_utf8(told.stdout).unwrap();
        // Those of the kernel's have a name in brackets.
        lines.lines().filter(|l| l.contains("pid ")).count()
    })
}

/// Connections of two processes go by one link, in which one whose server does not read stops nobody; and when all are
/// closed nothing of them is left, though the server lives.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn connections_share_a_link_and_a_full_one_stops_no_other() {
    let ([a, b], port, n) = (ends(), port().to_string(), 20);
    let before = resources();
    let count = n.to_string();
    let mut server = End::start(&["serve", &b, &port, "21", "slow", "0"], false, &[]);
    server.says("listening");
    let mut client = End::start(&["connect", &a, &b, &port, &count, "slow", "640"], false, &[]);
    client.says("open");
    let [pairs, regions] = resources();
    assert_eq!(pairs - before[0], 2, "one at each end");
    // Two rings for each connection, and what the link itself sends from and receives into.
    assert_eq!(regions - before[1], 2 * (2 * n + 2));
    client.child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let client = client.ends("done");
    let others = 19 * (640 + 9);
    assert_eq!((client.rdma, client.tcp), (n as u64, 0));
    assert!(client.rdma_tx > others, "{client:?}");
    assert_eq!(client.rdma_rx, 19 * 640 + 8);
    // The client has told that it ends.
    until_no_more_than(before);
    // It waits for one more.
    assert!(server.child.try_wait().unwrap().is_none());
}

/// Waits until the devices have no more than that.
fn until_no_more_than(before: [usize; 2]) {
    while resources().iter().zip(before).any(|(now, before)| *now > before) {
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_close_with_bytes_unread_is_a_reset() {
    let (server, client) = pair(1, "rst", 0, &[]);
    assert_eq!((server.rdma, client.rdma), (1, 1));
    assert_eq!(client.rdma_tx, 5_000);
}

/// Who has no EID in common stays on TCP, and loses nothing.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_decline_leads_back_to_tcp() {
    let ([a, b], port) = (ends(), port().to_string());
    for (what, bytes) in [("up", "640000"), ("first", "6400")] {
        let mut server = End::start(&["serve", &b, &port, "1", what, bytes], false, &[("SMC_EID", "OTHER")]);
        server.says("listening");
        let client = End::start(&["connect", &a, &b, &port, "1", what, bytes], false, &[]);
        assert_eq!(client.ends("done"), Moved { rdma: 0, tcp: 1, rdma_tx: 0, rdma_rx: 0, back: 0 });
        assert_eq!(server.ends("served"), Moved { rdma: 0, tcp: 1, rdma_tx: 0, rdma_rx: 0, back: 0 });
    }
}

/// A client that is listed and does not speak SMC: its first bytes are its program's.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_plain_client_of_a_server_that_expects_smc() {
    let ([a, b], port) = (ends(), port().to_string());
    let mut server = End::start(&["serve", &b, &port, "1", "up", "640000"], false, &[]);
    server.says("listening");
    End::start(&["connect", &a, &b, &port, "1", "up", "640000"], true, &[]).ends("done");
    assert_eq!(server.ends("served"), Moved { rdma: 0, tcp: 1, rdma_tx: 0, rdma_rx: 0, back: 0 });
}

/// The same where the server speaks first: it waits for a Proposal, and then goes on by TCP.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_plain_client_that_waits_for_the_server() {
    let ([a, b], port) = (ends(), port().to_string());
    let mut server = End::start(&["serve", &b, &port, "1", "first", "6400"], false, &[]);
    server.says("listening");
    End::start(&["connect", &a, &b, &port, "1", "first", "6400"], true, &[]).ends("done");
    assert_eq!(server.ends("served"), Moved { rdma: 0, tcp: 1, rdma_tx: 0, rdma_rx: 0, back: 0 });
}

/// A child serves the connection, which its parent has as well for so many ms; the client is by RDMA, or by TCP.
fn by_a_child(late: &str, whats: &[&str], rdma: u64) {
    let ([a, b], port) = (ends(), port().to_string());
    for what in whats {
        let mut server = End::start(&["fork", late, &b, &port, what, "6400"], false, &[]);
        server.says("listening");
        let client = End::start(&["connect", &a, &b, &port, "1", what, "6400"], false, &[]).ends("done");
        assert_eq!((client.rdma, client.tcp), (rdma, 1 - rdma), "{what}: {client:?}");
        server.ends("served");
    }
}

/// The child reads before its parent has closed the connection: what comes first is the Proposal.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_parent_that_lets_go_after_its_child_reads() {
    by_a_child("300", &["up", "first"], 1);
}

/// The same where the parent keeps the connection for longer than anybody waits: the Proposal is declined.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_parent_that_keeps_what_its_child_serves() {
    by_a_child("2500", &["up", "first", "both"], 0);
}

/// A server that hands its connections to another program, as inetd does: that one does not read the Proposal.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_program_that_is_handed_the_connection_does_not_read_the_proposal() {
    let ([a, b], port) = (ends(), port().to_string());
    let mut server = End::start(&["hand", &b, &port], false, &[]);
    server.says("listening");
    let client = End::start(&["connect", &a, &b, &port, "1", "echo", "6400"], false, &[]).ends("done");
    assert_eq!((client.rdma, client.tcp), (0, 1), "{client:?}");
    server.ends("served");
}

/// A program under libsmc.so that has no libsmc-rdma.so, its peer listed.
fn without_rdma(words: &[&str]) -> End {
    let folder = library().join("alone");
    fs::create_dir_all(&folder).unwrap();
    fs::copy(library().join("libsmc.so"), folder.join("libsmc.so")).unwrap();
    let mut c = Command::new("env");
    c.arg(format!("LD_PRELOAD={}", folder.join("libsmc.so").display())).arg(program());
    c.envs([("SMC_PEERS", "10.77.0.0/24"), ("SMC_TEST_REMOTE", "1")]);
    End::by(c, words, true, &[])
}

/// A plain client's first byte is that of a CLC message, and it waits for the answer: the server's program gets it, after
/// the time that the rest of a message would have had.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_byte_that_begins_like_a_message() {
    let [_, b] = ends();
    for alone in [false, true] {
        let port = port();
        let words = ["serve", &b, &port.to_string(), "1", "echo", "0"];
        let mut server = if alone { without_rdma(&words) } else { End::start(&words, false, &[]) };
        server.says("listening");
        let mut s = TcpStream::connect(SocketAddrV4::new(b.parse().unwrap(), port)).unwrap();
        s.set_nodelay(true).unwrap();
        for bytes in [&[0xe2][..], &[0xd4, 0xc3, 0xd9, 1, 2, 3]] {
            s.write_all(bytes).unwrap();
            let mut back = vec![0; bytes.len()];
            s.read_exact(&mut back).unwrap();
            assert_eq!(back, bytes);
        }
        drop(s);
        server.ends("served");
    }
}

/// A server that its peer takes to speak SMC, and that has no libsmc-rdma.so: its program does not read the Proposal, nor
/// the Decline of a client that has waited.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_server_without_rdma_does_not_read_the_proposal() {
    let ([a, b], port) = (ends(), port().to_string());
    for what in ["up", "down", "both", "echo", "first", "late"] {
        let mut server = without_rdma(&["serve", &b, &port, "1", what, "6400"]);
        server.says("listening");
        let client = End::start(&["connect", &a, &b, &port, "1", what, "6400"], false, &[]).ends("done");
        assert_eq!((client.rdma, client.tcp), (0, 1), "{what}: {client:?}");
        server.ends("served");
    }
}

/// A server that accepts late: the client's bytes have waited, then gone by TCP behind a Decline; the server finds the
/// Proposal, answers, is declined, and reads what follows. The Accept that comes late is not the client's program's.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn an_accept_that_comes_too_late() {
    let ([a, b], port) = (ends(), port());
    let l = TcpListener::bind(SocketAddrV4::new(b.parse().unwrap(), port)).unwrap();
    let server = thread::spawn(move || {
        let mut s = l.accept().unwrap().0;
        let mut proposal = [0; 8];
        s.read_exact(&mut proposal).unwrap();
        let len = usize::from(u16::from_be_bytes([proposal[5], proposal[6]]));
        s.read_exact(&mut vec![0; len - 8]).unwrap();
        // A Decline of 28 bytes, when it has waited for long enough.
        let mut decline = [0; 28];
        s.read_exact(&mut decline).unwrap();
        assert_eq!(decline[4], 4);
        // As one that was on its way: the answer to the Proposal.
        s.write_all(&decline).unwrap();
        echo(s);
    });
    let client =
        End::start(&["connect", &a, &b, &port.to_string(), "1", "echo", "6400"], false, &[]).ends("done");
    assert_eq!(client, Moved { rdma: 0, tcp: 1, rdma_tx: 0, rdma_rx: 0, back: 0 });
    server.join().unwrap();
}

/// A program that is killed has not said that its stream ends: nobody takes what has come for all of it.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_killed_peer_is_a_reset() {
    let ([a, b], port) = (ends(), port().to_string());
    let mut server = End::start(&["serve", &b, &port, "1", "hang", "0"], false, &[]);
    server.says("listening");
    let client = End::start(&["connect", &a, &b, &port, "1", "hang", "0"], false, &[]);
    server.says("hanging");
    server.child.kill().unwrap();
    client.ends("done");
}

/// A link that fails in mid-stream: what the peer has received it says by TCP, and the rest goes there, in order.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn without_a_link_the_stream_goes_on_by_tcp() {
    let breaks = [("SMC_TEST_BREAK", "9")];
    let ([a, b], port) = (ends(), port().to_string());
    for (what, server_breaks) in
        [("up", false), ("up", true), ("down", true), ("both", false), ("both", true)]
    {
        let whose = |is: bool| if is { &breaks[..] } else { &[] };
        let mut server = End::start(&["serve", &b, &port, "1", what, "3000000"], false, whose(server_breaks));
        server.says("listening");
        let words = ["connect", &a, &b, &port, "1", what, "3000000"];
        let client = End::start(&words, false, whose(!server_breaks));
        let (client, server) = (client.ends("done"), server.ends("served"));
        assert_eq!((client.rdma, server.rdma), (1, 1), "{what}: {client:?} {server:?}");
        assert_eq!((client.back, server.back), (1, 1), "{what}: {client:?} {server:?}");
    }
}

/// The devices of each end that has two, the server's first.
const TWO: [(&str, &str); 2] = [("SMC_TEST_DEVICES", "rxe1 rxe3"), ("SMC_TEST_DEVICES", "rxe0 rxe2")];

/// `slow`, at both ends with two devices, up to where the client says "open": 20 connections.
fn slow_over_two(settings: &[(&str, &str)]) -> (End, End) {
    let ([a, b], port) = (ends(), port().to_string());
    let with = |i: usize| [&TWO[i..=i], settings].concat();
    let mut server = End::start(&["serve", &b, &port, "21", "slow", "0"], false, &with(0));
    server.says("listening");
    let mut client = End::start(&["connect", &a, &b, &port, "20", "slow", "640"], false, &with(1));
    client.says("open");
    (server, client)
}

/// The client of [`slow_over_two`] goes on to its end, all by RDMA.
fn goes_on(mut client: End) {
    client.child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let client = client.ends("done");
    assert_eq!((client.rdma, client.tcp, client.back), (20, 0, 0), "{client:?}");
    assert_eq!(client.rdma_rx, 19 * 640 + 8);
}

/// Packets that a device has sent.
fn sent_by(device: &str) -> u64 {
    let at = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    std::fs::read_to_string(at).unwrap().trim().parse().unwrap()
}

/// With a second device at both ends a link group has two links, and its connections go by both. When all are closed
/// nothing is left on either.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn connections_go_by_two_links() {
    let (before, packets) = (resources(), ["rxe2", "rxe3"].map(sent_by));
    let (mut server, client) = slow_over_two(&[]);
    let [pairs, regions] = resources();
    assert_eq!(pairs - before[0], 4, "two at each end");
    assert_eq!(regions - before[1], 4 * (2 * 20 + 2), "every ring with both");
    goes_on(client);
    for (device, before) in ["rxe2", "rxe3"].into_iter().zip(packets) {
        assert!(sent_by(device) > before + 100, "{device} has carried nothing");
    }
    until_no_more_than(before);
    assert!(server.child.try_wait().unwrap().is_none());
}

/// One of two links fails in mid-stream, at either end: everything goes on by the other.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_stream_goes_on_by_the_other_link() {
    let cases =
        [(1, "up", 3_000_000, "17:1"), (1, "down", 3_000_000, "17:1"), (1, "both", 2_000_000, "17:1")];
    for (n, what, bytes, after) in
        cases.into_iter().chain([(1, "both", 500_000, "3:1"), (6, "echo", 6400, "9:1")])
    {
        for breaks in 0..2 {
            let mut settings = [vec![TWO[0]], vec![TWO[1]]];
            settings[breaks].push(("SMC_TEST_BREAK", after));
            let [server, client] = &settings;
            let (server, client) = pair_with(n, what, bytes, [server, client]);
            let told = format!("{what} {breaks} {after}: {server:?} {client:?}");
            for end in [&server, &client] {
                assert_eq!((end.rdma, end.tcp, end.back), (n, 0, 0), "{told}");
            }
            assert_eq!((server.rdma_tx, server.rdma_rx), (client.rdma_rx, client.rdma_tx), "{told}");
        }
    }
}

/// A command that changes the VM.
fn change(words: &str) {
    let mut words = words.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success());
}

/// Until programs have so many queue pairs.
fn until_pairs_are(n: usize) {
    while resources()[0] != n {
        thread::sleep(Duration::from_millis(50));
    }
}

/// A port that is down has no link, and none of its connections is lost; when it is up again it has one.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_link_comes_back_with_its_port() {
    let before = resources()[0];
    let (_server, client) = slow_over_two(&[]);
    until_pairs_are(before + 4);
    change("ip link set eth2 down");
    until_pairs_are(before + 2);
    change("ip link set eth2 up");
    // The kernel has dropped it with the port.
    change("ip route replace 10.77.0.4 dev eth2 src 10.77.0.3 table 3");
    until_pairs_are(before + 4);
    goes_on(client);
}

/// Links fail one after the other, each when there is another again: all bytes go by RDMA.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn links_are_lost_and_come_back_in_mid_stream() {
    let breaks = [TWO[1], ("SMC_TEST_BREAK", "20:3")];
    let (server, client) = pair_with(2, "both", 6_000_000, [&TWO[..1], &breaks]);
    for end in [&server, &client] {
        assert_eq!((end.rdma, end.tcp, end.back), (2, 0, 0), "{server:?} {client:?}");
    }
}
