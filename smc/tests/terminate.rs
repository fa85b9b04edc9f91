//! Link groups are terminated, by threads that do nothing else, under streams that are made, verify each byte, and end.
//!
//! Threads of this process use streams to each other and to a second process, which does the same. None of them may
//! notice: a terminated group serves the streams that it has, and the next stream makes a new one. In the end nothing
//! is left of any of them. `SMC_STRESS_SECONDS` is how long it goes on; `cargo xtask stress` runs it under sanitizers.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::print_stdout)]

use smc::LinkGroup;
use smc::net::{Builder, Listener, Mode, Stream, UpgradeAfter};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Streams at a time, each with a thread at either end: half of them within this process, half to the other.
const STREAMS: usize = 8;
const TERMINATORS: usize = 2;
const RING: usize = 32 << 10;
/// One question and its answer, at most: more than a ring holds.
const MOST: usize = 100_000;

#[derive(Default)]
struct Sums {
    streams: AtomicU64,
    in_memory: AtomicU64,
    bytes: AtomicU64,
    terminated: AtomicU64,
}

fn builder() -> Builder {
    let mut b = Builder::new();
    b.ring_size(RING).upgrade_after(UpgradeAfter::Now);
    b
}

/// xorshift64: which sizes, and how many.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Byte `at` of the stream with this number, in this direction.
fn byte(stream: u64, back: bool, at: usize) -> u8 {
    let x = (at as u64 ^ stream << 20 ^ u64::from(back) << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 56) as u8
}

fn fill(b: &mut [u8], stream: u64, back: bool, at: usize) {
    for (i, b) in b.iter_mut().enumerate() {
        *b = byte(stream, back, at + i);
    }
}

fn check(b: &[u8], stream: u64, back: bool, at: usize) {
    let wrong = b.iter().enumerate().find(|(i, b)| **b != byte(stream, back, at + i));
    assert!(wrong.is_none(), "stream {stream}, byte {at} + {wrong:?}");
}

/// One stream from its first byte to its last.
fn ask(address: &str, stream: u64, random: &mut Random, sums: &Sums) {
    let mut s = builder().connect(address).unwrap();
    s.write_all(&stream.to_ne_bytes()).unwrap();
    let (mut at, mut b) = (0, vec![0; MOST]);
    for _ in 0..1 + random.below(40) {
        let n = 1 + if random.below(4) == 0 { random.below(MOST) } else { random.below(300) };
        s.write_all(&(n as u32).to_ne_bytes()).unwrap();
        fill(&mut b[..n], stream, false, at);
        s.write_all(&b[..n]).unwrap();
        s.read_exact(&mut b[..n]).unwrap();
        check(&b[..n], stream, true, at);
        at += n;
    }
    let memory = s.status().is_some_and(|s| s.mode_tx == Mode::Shm || s.mode_rx == Mode::Shm);
    sums.in_memory.fetch_add(memory.into(), Relaxed);
    sums.streams.fetch_add(1, Relaxed);
    sums.bytes.fetch_add(2 * at as u64, Relaxed);
    if random.below(4) == 0 {
        s.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(s.read(&mut [0]).unwrap(), 0);
    }
}

fn answer(mut s: Stream) {
    let mut word = [0; 8];
    if s.read_exact(&mut word).is_err() {
        return; // The last one says nothing: it ends the thread.
    }
    let stream = u64::from_ne_bytes(word);
    let (mut at, mut b) = (0, vec![0; MOST]);
    let mut len = [0; 4];
    while s.read(&mut len[..1]).unwrap() == 1 {
        s.read_exact(&mut len[1..]).unwrap();
        let n = u32::from_ne_bytes(len) as usize;
        s.read_exact(&mut b[..n]).unwrap();
        check(&b[..n], stream, false, at);
        fill(&mut b[..n], stream, true, at);
        s.write_all(&b[..n]).unwrap();
        at += n;
    }
}

/// Takes each group away that it finds, until told to stop.
fn terminate(stop: &AtomicBool, sums: &Sums) {
    while !stop.load(Relaxed) {
        for g in LinkGroup::all() {
            sums.terminated.fetch_add(u64::from(!g.is_terminated()), Relaxed);
            g.terminate();
            assert!(g.is_terminated());
        }
        thread::yield_now();
    }
}

/// Threads that answer, one for each stream at a time, until they are told to end and woken.
fn answering(listener: Listener, threads: usize, stop: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<()>> {
    let listener = Arc::new(Mutex::new(listener));
    let one = |_| {
        let (listener, stop) = (listener.clone(), stop.clone());
        thread::spawn(move || {
            while !stop.load(Acquire) {
                let s = listener.lock().unwrap().accept().unwrap().0;
                answer(s);
            }
        })
    };
    (0..threads).map(one).collect()
}

fn terminating(stop: &Arc<AtomicBool>, sums: &Arc<Sums>) -> Vec<thread::JoinHandle<()>> {
    let one = |_| {
        let (stop, sums) = (stop.clone(), sums.clone());
        thread::spawn(move || terminate(&stop, &sums))
    };
    (0..TERMINATORS).map(one).collect()
}

fn ended(threads: Vec<thread::JoinHandle<()>>) {
    let failed = threads.into_iter().filter_map(|t| t.join().err()).count();
    assert_eq!(failed, 0, "threads that found something wrong");
}

fn seconds() -> Duration {
    let s = std::env::var("SMC_STRESS_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(s.unwrap_or(3))
}

/// Wakes who accepts, so that he looks whether he is to stop.
fn wake(address: &str, threads: usize) {
    for _ in 0..threads {
        drop(std::net::TcpStream::connect(address).unwrap());
    }
}

/// What the descriptors are, but for pipes: there is one to the other process, and ThreadSanitizer asks others for the names
/// of functions.
fn open_fds() -> Vec<String> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let names = links.filter_map(|e| Some(std::fs::read_link(e.path()).ok()?.display().to_string()));
    // Sockets and such have numbers of their own.
    let mut kinds: Vec<_> = names.map(|n| n.split(['[', ' ']).next().unwrap_or("").to_string()).collect();
    kinds.retain(|n| n != "pipe:" && !n.starts_with("/proc/"));
    kinds.sort();
    kinds
}

/// The other process: it answers until its standard input ends.
#[test]
#[ignore = "the other process of `groups_are_terminated_under_their_streams`"]
fn the_other_process() {
    let listener = builder().listen("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (stop, sums) = (Arc::new(AtomicBool::new(false)), Arc::new(Sums::default()));
    let mut threads = answering(listener, STREAMS / 2, &stop);
    threads.extend(terminating(&stop, &sums));
    println!("\naddress {address}");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    stop.store(true, Release);
    wake(&address, STREAMS / 2);
    ended(threads);
    assert!(sums.terminated.load(Relaxed) > 0);
    nothing_is_left();
}

fn nothing_is_left() {
    let begin = Instant::now();
    // The last reader of an epoch may be another thread, which has ended and not been waited for.
    while smc::mem::region::mapped_bytes() != 0 && begin.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((LinkGroup::all().len(), smc::mem::region::mapped_bytes()), (0, 0));
}

#[test]
fn groups_are_terminated_under_their_streams() {
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["the_other_process", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(other.stdout.take().unwrap()).lines();
    let there = lines.find_map(|l| l.unwrap().strip_prefix("address ").map(String::from)).unwrap();
    let (stop, sums) = (Arc::new(AtomicBool::new(false)), Arc::new(Sums::default()));
    // One stream first: what a process keeps for its first is there.
    ask(&there, 0, &mut Random(1), &sums);
    let before = open_fds();
    let listener = builder().listen("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().to_string();
    let mut threads = answering(listener, STREAMS / 2, &stop);
    static ASKED: AtomicU64 = AtomicU64::new(1);
    let end = Instant::now() + seconds();
    let asking = (0..STREAMS).map(|i| {
        let address = if i % 2 == 0 { here.clone() } else { there.clone() };
        let sums = sums.clone();
        thread::spawn(move || {
            let mut random = Random(i as u64 + 7);
            while Instant::now() < end {
                ask(&address, ASKED.fetch_add(1, Relaxed), &mut random, &sums);
            }
        })
    });
    let asking = asking.collect();
    threads.extend(terminating(&stop, &sums));
    ended(asking);
    stop.store(true, Release);
    wake(&here, STREAMS / 2);
    ended(threads);
    drop(other.stdin.take());
    assert!(
        other.wait().unwrap().success(),
        "the other process: {:?}",
        lines.map_while(Result::ok).collect::<Vec<_>>()
    );
    let of = |n: &AtomicU64| n.load(Relaxed);
    eprintln!(
        "streams {}, in memory {}, bytes verified {}, groups terminated here {}",
        of(&sums.streams),
        of(&sums.in_memory),
        of(&sums.bytes),
        of(&sums.terminated)
    );
    assert!(of(&sums.in_memory) > 0 && of(&sums.terminated) > 0);
    nothing_is_left();
    assert_eq!(open_fds(), before);
}
