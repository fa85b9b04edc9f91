//! The examples that are written with `smc::net`, each as its first lines say it is used. (`echo` is in `company.rs`.)

use crate::{Program, pattern};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

#[test]
fn file_copy_copies_a_file() {
    let file = |name: &str| std::env::temp_dir().join(format!("smc-copy.{}.{name}", std::process::id()));
    let (from, to) = (file("from"), file("to"));
    fs::write(&from, pattern(0, 5_000_001)).unwrap();
    let (mut server, address) = Program::server("file_copy", false, &["receive", to.to_str().unwrap()]);
    let out = Program::client("file_copy", false, &["send", from.to_str().unwrap(), &address]);
    assert_eq!(out, "5000001 bytes sent\n");
    let mut told = String::new();
    server.1.read_to_string(&mut told).unwrap();
    assert_eq!(told, "5000001 bytes received\n");
    assert!(server.0.wait().unwrap().success());
    assert!(fs::read(&to).unwrap() == pattern(0, 5_000_001));
    [from, to].iter().for_each(|f| fs::remove_file(f).unwrap());
}

#[test]
fn rpc_answers_and_measures() {
    for preloaded in [false, true] {
        let (_server, address) = Program::server("rpc", preloaded, &[]);
        let out = Program::client("rpc", false, &[&address, "2000", "100"]);
        assert!(out.starts_with("2000 calls of 100 bytes by SHM: p50 "), "{out}");
        let words: Vec<_> = out.split_whitespace().collect();
        let at = |name: &str| -> f64 {
            words[words.iter().position(|w| *w == name).unwrap() + 1].parse().unwrap()
        };
        assert!(at("p50") > 0.0 && at("p50") <= at("p99") && at("p99") <= at("max"), "{out}");
    }
}

#[test]
fn link_groups_are_shown() {
    let out = Program::client("link_groups", false, &["2"]);
    let lines: Vec<Vec<&str>> = out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 4, "{out}");
    for group in &lines[1..3] {
        assert_eq!((group[2], group[3]), ("ours", "2"), "{out}");
    }
    assert_eq!(lines[3][..2], ["4", "streams,"]);
    assert!(lines[3][2].parse::<u64>().unwrap() > 100, "{out}");
}

/// A GET by HTTP/1.0, whose answer ends with the connection.
fn get(address: &str, method: &str, body: &str) -> String {
    let mut tcp = TcpStream::connect(address).unwrap();
    write!(tcp, "{method} / HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut all = String::new();
    tcp.read_to_string(&mut all).unwrap();
    assert!(all.starts_with("HTTP/1.0 200"), "{all}");
    all.split_once("\r\n\r\n").unwrap().1.to_owned()
}

#[test]
fn the_hyper_server_serves_who_knows_nothing_of_libsmc() {
    let (_server, address) = Program::server("hyper_server", false, &[]);
    assert!(get(&address, "GET", "").starts_with("TCP ("));
    assert_eq!(get(&address, "POST", "and back"), "and back");
}

/// A client that asks often enough to be upgraded.
#[test]
fn the_hyper_server_says_when_it_uses_memory() {
    let (_server, address) = Program::server("hyper_server", false, &[]);
    let mut stream = crate::eager().connect(&address).unwrap();
    let mut last = String::new();
    for _ in 0..200 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap().split_whitespace().next().unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
        last = String::from_utf8(body).unwrap();
    }
    assert_eq!(last, "SHM\n");
}
