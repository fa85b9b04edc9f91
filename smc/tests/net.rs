//! `smc::net` with both ends in this process: what std's streams do, what the ring adds, and the way back.
//!
//! Nothing here waits for a time to pass; a watchdog ends what hangs.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use smc::net::{Builder, Listener, Mode, Reader, Reason, SharedSlice, Stream, UpgradeAfter};
use std::io::{BufRead as _, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Once;
use std::thread;
use std::time::Duration;

const RING: usize = 64 << 10;

fn watchdog() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(120));
            eprintln!("a test hangs");
            std::process::abort();
        });
    });
}

fn builder() -> Builder {
    watchdog();
    let mut b = Builder::new();
    b.ring_size(RING).upgrade_after(UpgradeAfter::Now);
    b
}

/// Two ends that have moved nothing yet.
fn pair() -> (Stream, Stream) {
    let listener = builder().listen("127.0.0.1:0").unwrap();
    let client = builder().connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn in_ring(s: &Stream) -> bool {
    s.status().is_some_and(|s| s.mode_tx == Mode::Shm && s.mode_rx == Mode::Shm)
}

/// Bytes to and fro until all goes by the ring; how many each way.
fn upgrade(a: &mut Stream, b: &mut Stream) -> usize {
    for n in 0..1000 {
        if in_ring(a) && in_ring(b) {
            return n;
        }
        exchange(a, b);
    }
    panic!("not upgraded: {:?} {:?}", a.status(), b.status());
}

fn exchange(a: &mut Stream, b: &mut Stream) {
    let mut byte = [0];
    a.write_all(b"?").unwrap();
    b.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"?");
    b.write_all(b"!").unwrap();
    a.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
}

fn upgraded() -> (Stream, Stream) {
    let (mut a, mut b) = pair();
    upgrade(&mut a, &mut b);
    fill_and_empty(&mut a, &mut b);
    fill_and_empty(&mut b, &mut a);
    (a, b)
}

/// A call that does not wait is told that the ring is full. Since then a writer is taken to know that, and waits for as
/// long as it takes. (One whose peer is in its own process gives the ring up after 50 ms: it might wait for itself.)
fn fill_and_empty(from: &mut Stream, to: &mut Stream) {
    from.set_nonblocking(true).unwrap();
    let n: usize = std::iter::from_fn(|| from.write(&[0; 9000]).ok()).sum();
    from.set_nonblocking(false).unwrap();
    to.read_exact(&mut vec![0; n]).unwrap();
}

/// The byte at a place of a stream that no other place nearby has.
fn byte_at(i: usize) -> u8 {
    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
}

fn pattern(from: usize, n: usize) -> Vec<u8> {
    (from..from + n).map(byte_at).collect()
}

fn check(from: usize, bytes: &[u8]) {
    if let Some(i) = (0..bytes.len()).find(|i| bytes[*i] != byte_at(from + i)) {
        panic!("byte {} is wrong", from + i);
    }
}

#[test]
fn both_ends_use_memory_and_say_so() {
    let (a, b) = upgraded();
    let (s, t) = (a.status().unwrap(), b.status().unwrap());
    assert_eq!((s.ring_size as usize, t.ring_size as usize), (RING, RING));
    assert_eq!((s.peer_pid, s.local, s.peer), (Some(std::process::id()), t.peer, t.local));
    assert_eq!((s.tx_bytes(), s.rx_bytes()), (t.rx_bytes(), t.tx_bytes()));
    assert_eq!((a.mode(), a.reason()), (Mode::Shm, None));
    assert!(s.upgrades >= 1);
}

#[test]
fn a_stream_that_is_never_to_be_upgraded_is_not() {
    let listener = builder().listen("127.0.0.1:0").unwrap();
    let mut never = builder();
    never.upgrade_after(UpgradeAfter::Never);
    let mut client = never.connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    (0..300).for_each(|_| exchange(&mut client, &mut server));
    assert!(client.status().is_none());
    assert_eq!((client.mode(), server.mode()), (Mode::Tcp, Mode::Tcp));
    assert_eq!(server.reason(), Some(Reason::PeerNoSmc));
}

#[test]
fn a_peer_without_libsmc_stays_on_tcp() {
    let listener = builder().listen("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    for n in 0..300u32 {
        client.write_all(&n.to_le_bytes()).unwrap();
        let mut got = [0; 4];
        server.read_exact(&mut got).unwrap();
        server.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(u32::from_le_bytes(got), n);
    }
    assert_eq!((server.mode(), server.reason()), (Mode::Tcp, Some(Reason::PeerNoSmc)));
}

#[test]
fn bulk_both_ways_at_once() {
    const BYTES: usize = 8 << 20;
    let (a, b) = upgraded();
    let through = |s: Stream| {
        let writer = s.try_clone().unwrap();
        let send = thread::spawn(move || {
            for at in (0..BYTES).step_by(10_000) {
                (&writer).write_all(&pattern(at, 10_000.min(BYTES - at))).unwrap();
            }
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut all = Vec::new();
        (&s).read_to_end(&mut all).unwrap();
        send.join().unwrap();
        assert_eq!(all.len(), BYTES);
        check(0, &all);
        s
    };
    let other = thread::spawn(move || through(b));
    let a = through(a);
    let b = other.join().unwrap();
    for s in [a, b] {
        let status = s.status().unwrap();
        // How much of it goes by the ring is a matter of time: two that write and do not read give it up.
        assert!(status.best == Mode::Shm && status.rx_bytes_ring > RING as u64 / 2, "{status:?}");
    }
}

#[test]
fn many_pieces_in_one_call() {
    let (mut a, mut b) = upgraded();
    let n = a.write_vectored(&[IoSlice::new(b"one"), IoSlice::new(b""), IoSlice::new(b"two")]).unwrap();
    assert_eq!(n, 6);
    let (mut x, mut y) = ([0; 2], [0; 9]);
    let n = b.read_vectored(&mut [IoSliceMut::new(&mut x), IoSliceMut::new(&mut y)]).unwrap();
    assert_eq!((n, &x, &y[..4]), (6, b"on", b"etwo".as_slice()));
}

#[test]
fn a_peek_takes_nothing() {
    let (mut a, mut b) = upgraded();
    a.write_all(b"peek").unwrap();
    let mut buf = [0; 8];
    assert_eq!(b.peek(&mut buf).unwrap(), 4);
    assert_eq!(b.peek(&mut buf[..2]).unwrap(), 2);
    assert_eq!(b.read(&mut buf).unwrap(), 4);
    assert_eq!(&buf[..4], b"peek");
}

#[test]
fn time_outs_and_calls_that_do_not_wait() {
    let (mut a, mut b) = upgraded();
    b.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    assert_eq!(b.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(b.set_read_timeout(Some(Duration::ZERO)).unwrap_err().kind(), ErrorKind::InvalidInput);
    b.set_read_timeout(None).unwrap();
    b.set_nonblocking(true).unwrap();
    assert_eq!(b.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let full = (0..).find_map(|_| b.write(&[7; 3000]).err()).unwrap();
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    assert!(b.reserve(1).is_err_and(|e| e.kind() == ErrorKind::WouldBlock));
    a.read_exact(&mut vec![0; RING]).unwrap();
    assert_eq!(b.write(&[7]).unwrap(), 1);
}

#[test]
fn a_write_time_out_ends_the_wait_for_room() {
    let (a, mut b) = upgraded();
    b.set_write_timeout(Some(Duration::from_millis(5))).unwrap();
    let e = (0..).find_map(|_| b.write(&[7; 3000]).err()).unwrap();
    assert_eq!(e.kind(), ErrorKind::WouldBlock);
    drop(a);
}

#[test]
fn half_of_a_stream_ends() {
    let (a, mut b) = upgraded();
    let (mut reader, mut writer) = a.split();
    writer.write_all(b"the last").unwrap();
    drop(writer);
    let mut all = Vec::new();
    b.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"the last");
    b.write_all(b"an answer").unwrap();
    drop(b);
    all.clear();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"an answer");
}

#[test]
fn the_peer_that_closed_is_a_broken_pipe_and_no_signal() {
    let (mut a, b) = upgraded();
    drop(b);
    let e = (0..10).find_map(|_| a.write(b"x").err()).unwrap();
    assert!(matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{e}");
}

#[test]
fn closing_with_bytes_unread_is_a_reset() {
    let (mut a, mut b) = upgraded();
    a.write_all(b"never read").unwrap();
    b.write_all(b"nor this").unwrap();
    drop(b);
    let mut got = Vec::new();
    assert_eq!(a.read_to_end(&mut got).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn halves_that_belong_together() {
    let ((a, _b), (c, _d)) = (pair(), pair());
    let ((ar, aw), (cr, cw)) = (a.split(), c.split());
    let (ar, cw) = ar.reunite(cw).unwrap_err();
    assert!(ar.reunite(aw).is_ok() && cr.reunite(cw).is_ok());
}

// ---- std's streams become ours, and back

#[test]
fn a_tcp_stream_that_was_used_becomes_ours() {
    watchdog();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(&pattern(0, 5000)).unwrap();
    let mut got = vec![0; 3000];
    server.read_exact(&mut got).unwrap();
    server.write_all(b"early").unwrap();
    // Both have moved bytes, and some are on their way.
    let (mut client, mut server) = (builder().adopt(client).unwrap(), builder().adopt(server).unwrap());
    let mut rest = vec![0; 2000];
    server.read_exact(&mut rest).unwrap();
    check(3000, &rest);
    let mut early = [0; 5];
    client.read_exact(&mut early).unwrap();
    assert_eq!(&early, b"early");
    upgrade(&mut client, &mut server);
    use smc::net::Role;
    assert_eq!(client.status().unwrap().role, Role::Connect);
    assert_eq!(server.status().unwrap().role, Role::Accept);
}

/// `a` has sent `sent` bytes by the ring, of which `b` reads `read`, and then `b` goes back to TCP while `a` goes on.
fn back_in_mid_stream(sent: usize, read: usize) {
    const ALL: usize = 3 << 20;
    let (mut a, mut b) = upgraded();
    a.write_all(&pattern(0, sent)).unwrap();
    let mut first = vec![0; read];
    b.read_exact(&mut first).unwrap();
    let writer = thread::spawn(move || {
        for at in (sent..ALL).step_by(7001) {
            a.write_all(&pattern(at, 7001.min(ALL - at))).unwrap();
        }
        a
    });
    b.write_all(b"before").unwrap();
    let (mut tcp, unread) = b.into_tcp().unwrap();
    first.extend(unread);
    assert!(first.len() >= sent, "what was in the ring");
    tcp.write_all(b" and after").unwrap();
    let at = first.len();
    first.resize(ALL, 0);
    tcp.read_exact(&mut first[at..]).unwrap();
    check(0, &first);
    let mut a = writer.join().unwrap();
    let mut answer = [0; 16];
    a.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"before and after");
    // It goes on as TCP, and as one of ours again if one likes.
    let mut b = builder().adopt(tcp).unwrap();
    exchange(&mut a, &mut b);
    assert_eq!(a.mode(), Mode::Tcp);
}

#[test]
fn into_tcp_in_mid_stream_loses_nothing() {
    for (sent, read) in [(1, 1), (RING, 1), (RING / 2, 0), (RING, RING), (5000, 4999)] {
        back_in_mid_stream(sent, read);
    }
}

#[test]
fn into_tcp_at_any_stage_of_the_upgrade() {
    for stage in 0..40 {
        let (mut a, mut b) = pair();
        for n in 0..stage {
            a.write_all(&pattern(n * 100, 100)).unwrap();
            if n % 3 == 2 {
                let mut got = [0; 300];
                b.read_exact(&mut got).unwrap();
                check((n - 2) * 100, &got);
                b.write_all(b".").unwrap();
                a.read_exact(&mut [0]).unwrap();
            }
        }
        let done = stage / 3 * 300;
        let (mut tcp, mut unread) = b.into_tcp().unwrap();
        a.write_all(&pattern(stage * 100, 50_000)).unwrap();
        let (mut a, none) = a.into_tcp().unwrap();
        assert!(none.is_empty());
        a.write_all(&pattern(stage * 100 + 50_000, 10)).unwrap();
        let at = unread.len();
        unread.resize(stage * 100 - done + 50_010, 0);
        tcp.read_exact(&mut unread[at..]).unwrap();
        check(done, &unread);
    }
}

#[test]
fn into_tcp_after_the_peer_has_closed() {
    let (mut a, b) = upgraded();
    a.write_all(&pattern(0, RING)).unwrap();
    drop(a);
    let (mut tcp, mut all) = b.into_tcp().unwrap();
    tcp.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), RING);
    check(0, &all);
}

#[test]
fn into_tcp_with_another_handle() {
    let (mut a, b) = upgraded();
    let mut other = b.try_clone().unwrap();
    a.write_all(b"ring").unwrap();
    let (mut tcp, unread) = b.into_tcp().unwrap();
    assert_eq!(unread, b"ring");
    a.write_all(b"12").unwrap();
    let mut byte = [0];
    tcp.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"1");
    other.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"2");
    drop(tcp);
    other.write_all(b"still open").unwrap();
    let mut got = [0; 10];
    a.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still open");
}

// ---- the ring's own memory

#[test]
fn reserve_and_commit_across_many_wraps() {
    let (mut a, mut b) = upgraded();
    const ALL: usize = 40 * RING;
    let (told, sent) = std::sync::mpsc::channel::<usize>();
    let reader = thread::spawn(move || {
        let (mut all, mut have) = (vec![0; ALL], 0);
        for to in sent {
            // One byte behind always: a ring that is empty would be begun anew, and never wrap.
            b.read_exact(&mut all[have..to - 1]).unwrap();
            have = to - 1;
        }
        b.read_exact(&mut all[have..]).unwrap();
        check(0, &all);
        b
    });
    let (mut at, mut wraps) = (0, 0);
    while at < ALL {
        let want = (1 + at % 30_011).min(ALL - at);
        let mut space = a.reserve(want).unwrap();
        assert!(space.is_in_ring() && space.len() >= want.min(RING / 4) && space.len() <= want);
        let n = space.len();
        let [x, y] = space.pieces();
        wraps += usize::from(!y.is_empty());
        assert_eq!(
            (x.write(&pattern(at, x.len())), y.write(&pattern(at + x.len(), y.len()))),
            (x.len(), y.len())
        );
        // Less than there is, now and then; the rest is thrown away.
        let n = if n > 10 && at % 3 == 0 { n - 7 } else { n };
        space.commit(n).unwrap();
        at += n;
        told.send(at).unwrap();
        drop(a.reserve(100).unwrap());
    }
    drop(told);
    reader.join().unwrap();
    assert!(wraps >= 10, "{wraps}");
}

#[test]
fn a_reservation_before_the_upgrade_goes_by_tcp() {
    let (mut a, mut b) = pair();
    let mut space = a.reserve(4).unwrap();
    assert!(!space.is_in_ring());
    space.write_all(b"abcd").unwrap();
    assert_eq!(space.write(b"e").unwrap(), 0, "full");
    space.commit(3).unwrap();
    let mut got = [0; 3];
    b.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abc");
}

#[test]
fn reservations_bring_about_the_upgrade_themselves() {
    let (mut a, mut b) = pair();
    for n in 0..1000usize {
        if in_ring(&a) && in_ring(&b) {
            return;
        }
        let mut space = a.reserve(1).unwrap();
        space.write_all(&[n as u8]).unwrap();
        space.commit(1).unwrap();
        let got = b.consume_with(1, |[x, _]| {
            assert_eq!(x.get(0), Some(n as u8));
            1
        });
        assert_eq!(got.unwrap(), 1);
        b.write_all(b".").unwrap();
        a.read_exact(&mut [0]).unwrap();
    }
    panic!("not upgraded: {:?}", a.status());
}

#[test]
fn a_thread_does_not_wait_for_its_own_reservation() {
    let (mut a, _b) = upgraded();
    let mut other = a.try_clone().unwrap();
    let space = a.reserve(10).unwrap();
    let deadlock = Some(libc::EDEADLK);
    assert_eq!(other.write(b"x").unwrap_err().raw_os_error(), deadlock);
    assert_eq!(other.read(&mut [0]).unwrap_err().raw_os_error(), deadlock);
    drop(space);
    assert_eq!(other.write(b"x").unwrap(), 1);
}

#[test]
fn the_peer_leaves_the_ring_during_a_reservation() {
    let (mut a, b) = upgraded();
    let mut space = a.reserve(RING / 2).unwrap();
    assert!(space.is_in_ring());
    let n = space.write(&pattern(0, RING / 2)).unwrap();
    let (mut tcp, unread) = b.into_tcp().unwrap();
    assert!(unread.is_empty());
    space.commit(n).unwrap();
    let mut got = vec![0; n];
    tcp.read_exact(&mut got).unwrap();
    check(0, &got);
    let mut next = a.reserve(5).unwrap();
    assert!(!next.is_in_ring());
    next.write_all(b"later").unwrap();
    next.commit(5).unwrap();
    tcp.read_exact(&mut got[..5]).unwrap();
    assert_eq!(&got[..5], b"later");
}

#[test]
fn files_go_through_the_ring_without_a_copy_between() {
    const ALL: usize = 1 << 20;
    let (mut from, mut to) = (tempfile(), tempfile());
    from.write_all(&pattern(0, ALL)).unwrap();
    std::io::Seek::rewind(&mut from).unwrap();
    let (mut a, mut b) = upgraded();
    let writer = thread::spawn(move || {
        loop {
            let mut space = a.reserve(20_000).unwrap();
            assert!(space.is_in_ring());
            let n = space.fill_from(&from).unwrap();
            if n == 0 {
                return;
            }
            space.commit(n).unwrap();
        }
    });
    use std::os::fd::AsRawFd as _;
    let fd = to.as_raw_fd();
    let mut all = 0;
    loop {
        match b.consume_with(usize::MAX, |p| SharedSlice::write_to(&p, fd).try_into().unwrap()).unwrap() {
            0 => break,
            n => all += n,
        }
    }
    writer.join().unwrap();
    assert_eq!(all, ALL);
    std::io::Seek::rewind(&mut to).unwrap();
    let mut got = Vec::new();
    to.read_to_end(&mut got).unwrap();
    check(0, &got);
}

fn tempfile() -> std::fs::File {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    static N: AtomicU32 = AtomicU32::new(0);
    let name = format!("smc-net.{}.{}", std::process::id(), N.fetch_add(1, Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn consume_with_looks_and_leaves() {
    let (mut a, mut b) = pair();
    // By TCP, at the switch and by the ring.
    for n in 0..200usize {
        a.write_all(&pattern(n * 10, 10)).unwrap();
        let mut left = 10;
        while left > 0 {
            let at = n * 10 + 10 - left;
            assert_eq!(b.consume_with(4, |_| 0).unwrap(), 0, "nothing is taken");
            left -= b
                .consume_with(4, |[x, y]| {
                    let mut got = vec![0; x.len() + y.len()];
                    let k = x.read(&mut got);
                    y.read(&mut got[k..]);
                    check(at, &got);
                    assert!(got.len() <= 4);
                    got.len()
                })
                .unwrap();
        }
        exchange(&mut b, &mut a);
    }
    assert!(in_ring(&b));
    a.write_all(b"end").unwrap();
    drop(a);
    assert_eq!(b.consume_with(9, |[x, _]| x.len()).unwrap(), 3);
    assert_eq!(b.consume_with(9, |_| unreachable!()).unwrap(), 0);
}

#[test]
fn lines_from_the_ring() {
    let (mut a, b) = upgraded();
    let writer = thread::spawn(move || {
        for n in 0..20_000 {
            writeln!(&a, "line {n}").unwrap();
        }
        a.write_all(b"no newline").unwrap();
    });
    let mut reader = Reader::with_capacity(1000, b);
    for n in 0..20_000 {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("line {n}\n"));
    }
    let mut rest = vec![];
    reader.read_until(b'\n', &mut rest).unwrap();
    assert_eq!(rest, b"no newline");
    assert!(reader.fill_buf().unwrap().is_empty());
    writer.join().unwrap();
}

#[test]
fn a_reader_goes_back_to_tcp_with_what_it_has_buffered() {
    let (mut a, b) = upgraded();
    a.write_all(b"head\nbody").unwrap();
    let mut reader = Reader::new(b);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    a.write_all(b", in the ring").unwrap();
    let (mut tcp, mut all) = reader.into_tcp().map_err(|(_, e)| e).unwrap();
    a.write_all(b", and by TCP").unwrap();
    drop(a);
    tcp.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"body, in the ring, and by TCP");
}

// ---- listeners and options

#[test]
fn options_are_those_of_the_kernel() {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let mut b = builder();
    b.nodelay(true).ttl(33).linger(Some(Duration::from_millis(1500))).nonblocking(true);
    b.read_timeout(Duration::from_secs(2)).write_timeout(Duration::from_secs(3));
    b.connect_timeout(Duration::from_secs(20));
    let s = b.connect(listener.local_addr().unwrap()).unwrap();
    assert!(s.nodelay().unwrap());
    assert_eq!(s.ttl().unwrap(), 33);
    assert_eq!(s.linger().unwrap(), Some(Duration::from_secs(2)));
    assert_eq!(s.read_timeout().unwrap(), Some(Duration::from_secs(2)));
    assert_eq!(s.write_timeout().unwrap(), Some(Duration::from_secs(3)));
    assert_eq!((&s).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(s.take_error().unwrap().is_none());
}

#[test]
fn a_refused_connection_is_an_error() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(Stream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let none: &[std::net::SocketAddr] = &[];
    let mut b = Builder::new();
    assert_eq!(
        b.connect_timeout(Duration::from_secs(1)).connect(none).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
}

#[test]
fn ipv6_is_upgraded_too() {
    let Ok(listener) = builder().listen("[::1]:0") else { return };
    let mut a = builder().connect(listener.local_addr().unwrap()).unwrap();
    let (mut b, _) = listener.accept().unwrap();
    upgrade(&mut a, &mut b);
}
