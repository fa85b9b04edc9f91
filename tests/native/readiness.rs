//! Streams in a mio `Poll`, beside sources of other kinds. Every wait is without a time-out: a lost wake-up hangs.

use crate::{check, eager, pair, pattern, upgraded};
use mio::{Events, Interest, Poll, Token, Waker};
use smc::net::{Mode, Stream};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::thread;

const RW: Interest = Interest::READABLE.add(Interest::WRITABLE);

/// All that can be read now, and whether the end has come.
fn drain(s: &mut impl Read, into: &mut Vec<u8>) -> bool {
    let mut buf = [0; 5000];
    loop {
        match s.read(&mut buf) {
            Ok(0) => return true,
            Ok(n) => into.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) => panic!("{e}"),
        }
    }
}

/// Writes until that would wait; how much.
fn push(s: &mut impl Write, bytes: &[u8]) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        match s.write(&bytes[at..]) {
            Ok(n) => at += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    at
}

fn watch(poll: &Poll, s: &mut Stream, token: usize, interests: Interest) {
    s.set_nonblocking(true).unwrap();
    poll.registry().register(s, Token(token), interests).unwrap();
}

/// Waits for an event of that token that says `what`.
fn await_event(poll: &mut Poll, token: usize, what: impl Fn(&mio::event::Event) -> bool) {
    let mut events = Events::with_capacity(16);
    loop {
        poll.poll(&mut events, None).unwrap();
        if events.iter().any(|e| e.token() == Token(token) && what(e)) {
            return;
        }
    }
}

/// An echo server in one thread: a listener, streams of ours, and a waker that ends it.
fn serve(mut poll: Poll, mut listener: smc::net::Listener) -> io::Result<(u64, u64)> {
    const LISTENER: Token = Token(0);
    const WAKER: Token = Token(1);
    listener.set_nonblocking(true)?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut streams: HashMap<Token, (Stream, Vec<u8>)> = HashMap::new();
    let (mut next, mut by_ring, mut all) = (2, 0, 0);
    let mut events = Events::with_capacity(64);
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            match event.token() {
                WAKER => return Ok((by_ring, all)),
                LISTENER => loop {
                    match listener.accept() {
                        Ok((mut s, _)) => {
                            watch(&poll, &mut s, next, RW);
                            streams.insert(Token(next), (s, Vec::new()));
                            next += 1;
                        }
                        Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                        Err(e) => return Err(e),
                    }
                },
                token => {
                    let Some((s, pending)) = streams.get_mut(&token) else { continue };
                    let end = drain(s, pending);
                    let n = push(s, pending);
                    pending.drain(..n);
                    if end && pending.is_empty() {
                        let status = s.status().unwrap();
                        by_ring += status.rx_bytes_ring;
                        all += status.rx_bytes();
                        streams.remove(&token);
                    }
                }
            }
        }
    }
}

#[test]
fn an_echo_server_with_many_streams_beside_a_listener_and_a_waker() {
    let listener = eager().listen("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let poll = Poll::new().unwrap();
    let waker = Waker::new(poll.registry(), Token(1)).unwrap();
    let server = thread::spawn(move || serve(poll, listener).unwrap());
    let clients: Vec<_> = (0..8usize)
        .map(|i| {
            thread::spawn(move || {
                let mut s = eager().connect(address).unwrap();
                let mut sent = 0;
                for n in 0..1500usize {
                    // Small ones, and some that are larger than the ring.
                    let size = if n % 500 == 499 { 150_000 } else { 1 + (n * 37 + i) % 3000 };
                    let other = s.try_clone().unwrap();
                    let out = pattern(sent, size);
                    let writer = (size > 50_000).then(|| {
                        let out = out.clone();
                        thread::spawn(move || (&other).write_all(&out).unwrap())
                    });
                    if writer.is_none() {
                        s.write_all(&out).unwrap();
                    }
                    let mut back = vec![0; size];
                    s.read_exact(&mut back).unwrap();
                    assert!(out == back, "message {n}");
                    if let Some(w) = writer {
                        w.join().unwrap();
                    }
                    sent += size;
                }
                assert_eq!(s.mode(), Mode::Shm);
            })
        })
        .collect();
    clients.into_iter().for_each(|c| c.join().unwrap());
    // The ends of the streams come before the waker, or are not counted.
    waker.wake().unwrap();
    let (by_ring, all) = server.join().unwrap();
    // How much is a matter of time: a writer that gets nowhere for 50 ms and has its peer in its own process goes by TCP.
    assert!(by_ring > 0, "none of {all} bytes");
}

#[test]
fn what_is_in_the_ring_is_told_at_registration_and_at_each_change_of_it() {
    let (mut a, mut b) = upgraded();
    let mut poll = Poll::new().unwrap();
    a.write_all(b"before").unwrap();
    watch(&poll, &mut b, 5, Interest::READABLE);
    await_event(&mut poll, 5, mio::event::Event::is_readable);
    let mut got = Vec::new();
    drain(&mut b, &mut got);
    poll.registry().reregister(&mut b, Token(6), Interest::WRITABLE).unwrap();
    await_event(&mut poll, 6, mio::event::Event::is_writable);
    a.write_all(b" and between").unwrap();
    poll.registry().reregister(&mut b, Token(7), Interest::READABLE).unwrap();
    await_event(&mut poll, 7, mio::event::Event::is_readable);
    drain(&mut b, &mut got);
    for _ in 0..3 {
        a.write_all(b".").unwrap();
        await_event(&mut poll, 7, mio::event::Event::is_readable);
        drain(&mut b, &mut got);
    }
    assert_eq!(got, b"before and between...");
}

#[test]
fn a_writer_hears_of_room_in_the_ring() {
    const ALL: usize = 6 << 20;
    let (mut a, mut b) = upgraded();
    let reader = thread::spawn(move || {
        let mut all = vec![0; ALL];
        b.read_exact(&mut all).unwrap();
        check(0, &all);
    });
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut a, 3, Interest::WRITABLE);
    let bytes = pattern(0, ALL);
    let (mut at, mut waits) = (push(&mut a, &bytes), 0);
    while at < ALL {
        await_event(&mut poll, 3, mio::event::Event::is_writable);
        at += push(&mut a, &bytes[at..]);
        waits += 1;
    }
    reader.join().unwrap();
    assert!(waits > 0);
}

#[test]
fn both_directions_of_one_stream_at_once() {
    const ALL: usize = 4 << 20;
    let (mut a, b) = upgraded();
    let peer = thread::spawn(move || {
        let writer = b.try_clone().unwrap();
        let sender = thread::spawn(move || (&writer).write_all(&pattern(7, ALL)).unwrap());
        let mut all = vec![0; ALL];
        (&b).read_exact(&mut all).unwrap();
        check(0, &all);
        sender.join().unwrap();
    });
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut a, 9, RW);
    let bytes = pattern(0, ALL);
    let (mut at, mut got) = (0, Vec::new());
    loop {
        at += push(&mut a, &bytes[at..]);
        drain(&mut a, &mut got);
        if at == ALL && got.len() == ALL {
            break;
        }
        await_event(&mut poll, 9, |_| true);
    }
    check(7, &got);
    peer.join().unwrap();
}

#[test]
fn a_stream_is_upgraded_while_it_is_registered() {
    let (mut a, mut b) = pair();
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut b, 1, Interest::READABLE);
    for n in 0..600u32 {
        a.write_all(&n.to_le_bytes()).unwrap();
        let mut got = Vec::new();
        while got.len() < 4 {
            await_event(&mut poll, 1, mio::event::Event::is_readable);
            drain(&mut b, &mut got);
        }
        assert_eq!(got, n.to_le_bytes());
        assert_eq!(push(&mut b, &got), 4);
        a.read_exact(&mut got).unwrap();
    }
    assert!(crate::in_ring(&a) && crate::in_ring(&b));
}

#[test]
fn the_end_of_the_peer_is_an_event() {
    let (a, mut b) = upgraded();
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut b, 2, Interest::READABLE);
    let mut got = Vec::new();
    assert!(!drain(&mut b, &mut got));
    drop(a);
    while !drain(&mut b, &mut got) {
        await_event(&mut poll, 2, |_| true);
    }
}

#[test]
fn a_peer_that_goes_back_to_tcp_is_heard_of() {
    const ALL: usize = 3 << 20;
    let (mut a, b) = upgraded();
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut a, 4, RW);
    let bytes = pattern(0, ALL);
    let mut at = push(&mut a, &bytes);
    let peer = thread::spawn(move || {
        let (mut tcp, mut all) = b.into_tcp().unwrap();
        let from = all.len();
        all.resize(ALL, 0);
        tcp.read_exact(&mut all[from..]).unwrap();
        check(0, &all);
        tcp.write_all(b"by TCP").unwrap();
    });
    let mut got = Vec::new();
    while at < ALL || got.len() < 6 {
        await_event(&mut poll, 4, |_| true);
        at += push(&mut a, &bytes[at..]);
        drain(&mut a, &mut got);
    }
    assert_eq!(got, b"by TCP");
    peer.join().unwrap();
}

/// A reader that is not told of room has bytes of its own on their way back into TCP.
#[test]
fn bytes_that_left_the_ring_go_on_though_only_reading_is_watched() {
    let (mut a, b) = upgraded();
    let mut poll = Poll::new().unwrap();
    watch(&poll, &mut a, 4, Interest::READABLE);
    let sent = push(&mut a, &pattern(0, 1 << 20));
    let peer = thread::spawn(move || {
        let (mut tcp, mut all) = b.into_tcp().unwrap();
        let from = all.len();
        all.resize(sent, 0);
        tcp.read_exact(&mut all[from..]).unwrap();
        check(0, &all);
        tcp.write_all(b"all").unwrap();
    });
    let mut got = Vec::new();
    drain(&mut a, &mut got);
    while got.len() < 3 {
        await_event(&mut poll, 4, |_| true);
        drain(&mut a, &mut got);
    }
    peer.join().unwrap();
}

#[test]
fn a_stream_moves_from_one_poll_to_another() {
    let (mut a, mut b) = upgraded();
    let (first, mut second) = (Poll::new().unwrap(), Poll::new().unwrap());
    watch(&first, &mut b, 1, RW);
    first.registry().deregister(&mut b).unwrap();
    watch(&second, &mut b, 2, Interest::READABLE);
    let mut got = Vec::new();
    drain(&mut b, &mut got);
    a.write_all(b"second").unwrap();
    await_event(&mut second, 2, mio::event::Event::is_readable);
    drain(&mut b, &mut got);
    assert_eq!(got, b"second");
    // And as TCP, in the same one: nothing is left in it.
    let (tcp, _) = b.into_tcp().unwrap();
    let mut tcp = mio::net::TcpStream::from_std(tcp);
    second.registry().register(&mut tcp, Token(3), Interest::READABLE).unwrap();
    a.write_all(b"tcp").unwrap();
    await_event(&mut second, 3, mio::event::Event::is_readable);
}
