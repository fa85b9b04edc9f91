//! Moving bytes: every call that reads or writes, with its flags, short counts and back-pressure.

use crate::{
    Scenario, log, s,
    sys::{self, Addr, show},
    world::{Conn, End, World, address, block, later, pattern},
};
use std::{
    ffi::{CString, c_void},
    fs::File,
    io::Write as _,
    os::fd::AsRawFd as _,
    time::Duration,
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(read_write),
    s!(readv_writev),
    s!(readv_odd_vectors),
    s!(send_recv),
    s!(sendto_recvfrom),
    s!(sendmsg_recvmsg),
    s!(sendmmsg_recvmmsg),
    s!(peek),
    s!(peek_across_writes),
    s!(peek_at_eof),
    s!(waitall),
    s!(waitall_and_eof),
    s!(waitall_peek),
    s!(dontwait),
    s!(trunc_discards),
    s!(zero_length),
    s!(bad_arguments),
    s!(bad_fd),
    s!(number_reused).procs(),
    s!(no_position),
    s!(short_reads),
    s!(random_sizes),
    s!(many_small_writes),
    s!(big_write_slow_reader),
    s!(big_writev_slow_reader),
    s!(nonblocking_writer_stops),
    s!(blocked_writer_goes_on),
    s!(small_sndbuf_stops),
    s!(small_buffers_bound_the_writer),
    s!(small_buffers_of_a_listener).plain(),
    s!(waits_for_all_that_small_buffers_hold),
    s!(both_write_before_reading),
    s!(both_write_much_before_reading),
    s!(full_duplex).slow(),
    s!(two_readers),
    s!(two_writers),
    s!(more_and_cork),
    s!(fionread),
    s!(unread_when_it_leaves_the_ring),
    s!(siocoutq),
    s!(rcvlowat),
    s!(rcvlowat_makes_an_edge),
    s!(sendfile_positions),
    s!(sendfile_big),
    s!(splice_both_ways),
    s!(copy_between_connections),
    s!(oob_and_mark),
    s!(oob_inline),
    s!(stdio_on_a_socket),
    s!(stdio_write_then_read),
    s!(dprintf),
    s!(direct_syscalls_first),
    s!(direct_syscalls_in_the_middle),
    s!(zerocopy_flag),
    s!(long_ping_pong).slow(),
    s!(nonblocking_read_write),
    s!(toggle_nonblocking),
    s!(library_bound_deep),
    s!(library_bound_deep_and_lazily),
    s!(library_bound_deep_after_the_upgrade),
];

fn read_write(w: &World) {
    let mut c = w.pair();
    for n in [1, 2, 7, 100, 4096, 16384, 65536, 300_000] {
        w.start_far(&c, &format!("get {n}"));
        let mut left = n;
        while left > 0 {
            let b = block(c.tx, left);
            match sys::write(c.fd, &b) {
                Ok(k) => {
                    c.tx += k as u64;
                    left -= k as usize;
                }
                e => {
                    log!("write {}", show(e));
                    break;
                }
            }
        }
        log!("{n}: far {}", w.finish());
        w.start_far(&c, &format!("put {n}"));
        let mut b = vec![0; 5000];
        let mut left = n;
        while left > 0 {
            let want = left.min(5000);
            match sys::read(c.fd, &mut b[..want]) {
                Ok(k @ 1..) => {
                    if let Err(e) = c.check(&b[..k as usize]) {
                        log!("{e}");
                    }
                    left -= k as usize;
                }
                e => {
                    log!("read {}", show(e));
                    break;
                }
            }
        }
        log!("{n}: near done, far {}", w.finish());
    }
}

fn readv_writev(w: &World) {
    let mut c = w.pair();
    let b = c.next(1000);
    log!("writev {}", show(sys::writev(c.fd, &[&b[..1], &b[1..1], &b[1..400], &b[400..1000]])));
    log!("far {}", w.far(&c, "get 1000"));
    w.far(&c, "put 1000");
    c.arrived(1000);
    let (mut x, mut y, mut z) = ([0; 3], [0; 500], [0; 1000]);
    log!("readv {}", show(sys::readv(c.fd, &mut [&mut x, &mut [], &mut y, &mut z])));
    let all = [&x[..], &y[..], &z[..497]].concat();
    log!("right {:?}", c.check(&all));
    w.still_good(&mut c);
}

fn readv_odd_vectors(w: &World) {
    let mut c = w.pair();
    log!("count 0: {}", show(sys::writev_count(c.fd, 0)));
    log!("count -1: {}", show(sys::writev_count(c.fd, -1)));
    log!("count 1024, empty: {}", show(sys::writev_count(c.fd, 1024)));
    log!("count 1025: {}", show(sys::writev_count(c.fd, 1025)));
    let b = c.next(1024);
    let pieces: Vec<&[u8]> = b.chunks(1).collect();
    log!("1024 of one byte: {}", show(sys::writev(c.fd, &pieces)));
    log!("far {}", w.far(&c, "get 1024"));
    w.far(&c, "put 1024");
    c.arrived(1024);
    let mut back = vec![0; 1024];
    let r = {
        let mut pieces: Vec<&mut [u8]> = back.chunks_mut(1).collect();
        sys::readv(c.fd, &mut pieces)
    };
    log!("read back {}", c.checked(r, &back));
    w.still_good(&mut c);
}

fn send_recv(w: &World) {
    let mut c = w.pair();
    let b = c.next(5000);
    log!("send {}", show(sys::send(c.fd, &b, 0)));
    log!("far {}", w.far(&c, "get 5000"));
    w.far(&c, "put 5000");
    c.arrived(5000);
    let mut b = [0; 5000];
    let r = sys::recv(c.fd, &mut b, 0);
    log!("recv {}", c.checked(r, &b));
    w.still_good(&mut c);
}

fn sendto_recvfrom(w: &World) {
    let mut c = w.pair();
    let b = c.next(10);
    log!("sendto, no address: {}", show(sys::sendto(c.fd, &b, 0, None)));
    let b = c.next(10);
    log!("sendto, some address: {}", show(sys::sendto(c.fd, &b, 0, Some(&Addr::v4([127, 0, 0, 9], 9)))));
    log!("far {}", w.far(&c, "get 20"));
    w.far(&c, "put 10");
    c.arrived(10);
    let (mut b, mut from) = ([0; 100], Addr::empty());
    let r = sys::recvfrom(c.fd, &mut b, 0, &mut from);
    log!("recvfrom {}, address of {} bytes", c.checked(r, &b), from.len());
    w.still_good(&mut c);
}

fn sendmsg_recvmsg(w: &World) {
    let mut c = w.pair();
    let b = c.next(300);
    log!("sendmsg {}", show(sys::sendmsg(c.fd, &[&b[..100], &b[100..300]], 0, None)));
    log!("far {}", w.far(&c, "get 300"));
    w.far(&c, "put 300");
    c.arrived(300);
    let (mut x, mut y) = ([0; 100], [0; 500]);
    let r = sys::recvmsg(c.fd, &mut [&mut x, &mut y], 0);
    log!("recvmsg {} name {} control {} flags {:#x}", show(r.result), r.name_len, r.control_len, r.flags);
    log!("right {:?}", c.check(&[&x[..], &y[..200]].concat()));
    let r = sys::recvmsg(c.fd, &mut [&mut x], libc::MSG_DONTWAIT);
    log!("empty {}", show(r.result));
    log!("no vector: {}", show(sys::sendmsg(c.fd, &[], 0, None)));
    w.still_good(&mut c);
}

fn sendmmsg_recvmmsg(w: &World) {
    let mut c = w.pair();
    let b = c.next(60);
    let (r, n) = sys::sendmmsg(c.fd, &[&b[..10], &b[10..30], &b[30..60]]);
    log!("sendmmsg {} {n:?}", show(r));
    log!("far {}", w.far(&c, "get 60"));
    w.far(&c, "put 30");
    c.arrived(30);
    let (mut x, mut y, mut z) = ([0; 10], [0; 10], [0; 10]);
    let (r, n) = sys::recvmmsg(c.fd, &mut [&mut x, &mut y, &mut z], 0);
    log!("recvmmsg {} {n:?}", show(r));
    log!("right {:?}", c.check(&[x, y, z].concat()));
    let (r, _) = sys::recvmmsg(c.fd, &mut [&mut x], libc::MSG_DONTWAIT);
    log!("empty {}", show(r));
    w.still_good(&mut c);
}

fn peek(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    for n in [10, 100, 200] {
        let mut b = vec![0; n];
        let r = sys::recv(c.fd, &mut b, libc::MSG_PEEK);
        let right = r.is_ok_and(|k| b[..k as usize] == block(c.rx, k as usize));
        log!("peek {n}: {} {right}", show(r));
    }
    log!("{}", c.get(60));
    let mut b = [0; 200];
    let r = sys::recv(c.fd, &mut b, libc::MSG_PEEK | libc::MSG_DONTWAIT);
    log!("peek the rest: {}", show(r));
    log!("{}", c.get(40));
    log!("peek nothing: {}", show(sys::recv(c.fd, &mut b, libc::MSG_PEEK | libc::MSG_DONTWAIT)));
    w.still_good(&mut c);
}

fn peek_across_writes(w: &World) {
    let mut c = w.pair();
    for i in 1..=5 {
        w.far(&c, "put 1000");
        c.arrived(i * 1000);
        let mut b = [0; 6000];
        let r = sys::recv(c.fd, &mut b, libc::MSG_PEEK);
        log!("{} {}", show(r), b[..i as usize * 1000] == block(c.rx, i as usize * 1000));
    }
    log!("{}", c.get(5000));
}

fn peek_at_eof(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 5");
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    let mut b = [0; 9];
    log!("peek {}", show(sys::recv(c.fd, &mut b, libc::MSG_PEEK)));
    log!("{}", c.get(5));
    log!("peek EOF {}", show(sys::recv(c.fd, &mut b, libc::MSG_PEEK)));
    log!("peek EOF {}", show(sys::recv(c.fd, &mut b, libc::MSG_PEEK)));
    log!("read EOF {}", show(sys::read(c.fd, &mut b)));
}

fn waitall(w: &World) {
    let mut c = w.pair();
    // More than a small ring holds, in many pieces.
    w.start_far(&c, "putchunks 200000 1111");
    let mut b = vec![0; 200_000];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{} far {}", c.checked(r, &b), w.finish());
    w.start_far(&c, "delayput 10 100");
    let r = sys::recv(c.fd, &mut b[..10], libc::MSG_WAITALL);
    log!("{} far {}", c.checked(r, &b), w.finish());
    w.far(&c, "put 7");
    c.arrived(7);
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL | libc::MSG_DONTWAIT);
    log!("with DONTWAIT {}", c.checked(r, &b));
    w.still_good(&mut c);
}

fn waitall_and_eof(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 77");
    w.far(&c, "shutdown 1");
    let mut b = [0; 100];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{}", c.checked(r, &b));
    log!("{}", show(sys::recv(c.fd, &mut b, libc::MSG_WAITALL)));
}

fn waitall_peek(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 50");
    w.start_far(&c, "delayput 50 100");
    let mut b = [0; 100];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL | libc::MSG_PEEK);
    log!("peek all {} far {}", show(r), w.finish());
    log!("{}", c.get(100));
}

fn dontwait(w: &World) {
    let mut c = w.pair();
    let mut b = [0; 100];
    log!("empty {}", show(sys::recv(c.fd, &mut b, libc::MSG_DONTWAIT)));
    log!("blocking again? {:?}", sys::fcntl(c.fd, libc::F_GETFL, 0).map(|f| f & i64::from(libc::O_NONBLOCK)));
    w.far(&c, "put 30");
    c.arrived(30);
    let r = sys::recv(c.fd, &mut b, libc::MSG_DONTWAIT);
    log!("{}", c.checked(r, &b));
    log!("{}", c.fill());
    w.start_far(&c, &format!("get {}", c.tx - 200));
    c.settle(libc::POLLOUT);
    log!("drained: {}", w.finish().starts_with("got"));
    w.still_good(&mut c);
}

fn trunc_discards(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    let mut b = [0; 10];
    log!("peek+trunc {}", show(sys::recv(c.fd, &mut b, libc::MSG_PEEK | libc::MSG_TRUNC)));
    log!("discard {}", show(sys::recv_discard(c.fd, 40, libc::MSG_TRUNC)));
    c.rx += 40;
    log!("left {:?}", sys::fionread(c.fd));
    log!("with a buffer {}", show(sys::recv(c.fd, &mut b, libc::MSG_TRUNC)));
    c.rx += 10;
    log!("{}", c.get(50));
    log!("empty {}", show(sys::recv_discard(c.fd, 40, libc::MSG_TRUNC | libc::MSG_DONTWAIT)));
    w.still_good(&mut c);
}

fn zero_length(w: &World) {
    let mut c = w.pair();
    log!("write {}", show(sys::write(c.fd, &[])));
    log!("send {}", show(sys::send(c.fd, &[], 0)));
    log!("read, idle {}", show(sys::read(c.fd, &mut [])));
    log!("recv, idle {}", show(sys::recv(c.fd, &mut [], libc::MSG_DONTWAIT)));
    log!("poll far {}", w.far(&c, &format!("poll {} 50", libc::POLLIN)));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("read, data {}", show(sys::read(c.fd, &mut [])));
    log!("recv, data {}", show(sys::recv(c.fd, &mut [], 0)));
    log!("peek, data {}", show(sys::recv(c.fd, &mut [], libc::MSG_PEEK)));
    log!("{}", c.get(10));
    w.still_good(&mut c);
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    log!("read, EOF {}", show(sys::read(c.fd, &mut [])));
    log!("recv, EOF {}", show(sys::recv(c.fd, &mut [], 0)));
}

fn bad_arguments(w: &World) {
    let mut c = w.pair();
    for which in ["write", "send"] {
        log!("{which} {}", show(sys::with_bad_pointer(which, c.fd, 100)));
    }
    w.far(&c, "put 100");
    c.arrived(100);
    for which in ["read", "recv"] {
        log!("{which} {}", show(sys::with_bad_pointer(which, c.fd, 100)));
    }
    log!("nothing lost: {}", c.get(100));
    let mut b = [0; 10];
    log!("error queue {}", show(sys::recv(c.fd, &mut b, libc::MSG_ERRQUEUE)));
    log!("no urgent data {}", show(sys::recv(c.fd, &mut b, libc::MSG_OOB)));
    log!("unknown ioctl {:?}", sys::ioctl(c.fd, 0x1234_5678, 0).map_err(sys::errno_name));
    w.still_good(&mut c);
}

fn bad_fd(w: &World) {
    let c = w.pair();
    log!("close {}", show(sys::close(c.fd)));
    let mut b = [0; 1];
    log!("close again {}", show(sys::close(c.fd)));
    log!("read {}", show(sys::read(c.fd, &mut b)));
    log!("write {}", show(sys::write(c.fd, &b)));
    log!("recv {}", show(sys::recv(c.fd, &mut b, 0)));
    log!("send {}", show(sys::send(c.fd, &b, 0)));
    log!("shutdown {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("name {:?}", sys::getsockname(c.fd).map(|_| ()).map_err(sys::errno_name));
    log!("poll {}", sys::show_poll(sys::poll1(c.fd, libc::POLLIN, 0)));
    log!("on -1 {}", show(sys::read(-1, &mut b)));
    log!("far {}", w.far(&c, "drain"));
}

/// With one thread: another may have a number for a moment that then is not the lowest free one.
fn number_reused(w: &World) {
    let c = w.pair();
    log!("close {}", show(sys::close(c.fd)));
    let p = sys::pipe();
    log!("the number reused by a pipe: {}", p.contains(&c.fd));
    log!("write {}", show(sys::write(p[1], b"x")));
    let mut b = [0; 1];
    log!("read {}", show(sys::read(p[0], &mut b)));
    log!("send on a pipe {}", show(sys::send(p[1], &b, 0)));
    log!("far {}", w.far(&c, "drain"));
}

fn no_position(w: &World) {
    let mut c = w.pair();
    log!("lseek {}", show(sys::lseek(c.fd)));
    w.far(&c, "put 10");
    c.arrived(10);
    let mut b = [0; 10];
    for which in ["pread", "pwrite", "preadv", "pwritev"] {
        log!("{which} {}", show(sys::positioned(which, c.fd, &mut b, 0)));
    }
    let r = sys::positioned("preadv2", c.fd, &mut b, -1);
    log!("preadv2 at -1 {}", c.checked(r, &b));
    let mut b = c.next(10);
    log!("pwritev2 at -1 {}", show(sys::positioned("pwritev2", c.fd, &mut b, -1)));
    log!("far {}", w.far(&c, "get 10"));
    w.still_good(&mut c);
}

fn short_reads(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 1000");
    c.arrived(1000);
    let mut b = [0; 2000];
    for n in [1, 10, 100, 500, 1000, 1000] {
        let r = sys::recv(c.fd, &mut b[..n], libc::MSG_DONTWAIT);
        log!("{n}: {}", c.checked(r, &b));
    }
}

fn unread_when_it_leaves_the_ring(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 10");
    // An option that the ring can't honour: the far end goes on by TCP.
    w.far(&c, &format!("setopt {} {} 1", libc::SOL_SOCKET, libc::SO_TIMESTAMPING));
    w.far(&c, "put 20");
    c.arrived(30);
    log!("{:?}", sys::fionread(c.fd));
    let peek = libc::MSG_PEEK;
    for flags in [peek, peek | libc::MSG_DONTWAIT, peek | libc::MSG_WAITALL] {
        let mut b = [0; 30];
        let at = c.rx;
        let r = sys::recv(c.fd, &mut b, flags);
        log!("{} {}", show(r), c.checked(r, &b));
        c.rx = at;
    }
    log!("{}", show(sys::recv(c.fd, &mut [0; 15], peek)));
    log!("{}", show(sys::recv_discard(c.fd, 30, peek | libc::MSG_TRUNC)));
    let mut b = [0; 30];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{} then {:?}", c.checked(r, &b), sys::fionread(c.fd));
    w.still_good(&mut c);
}

fn random_sizes(w: &World) {
    let mut c = w.pair();
    // Not to wait for delayed acknowledgements a thousand times over.
    let _ = sys::setsockopt(c.fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    w.far(&c, &format!("setopt {} {} 1", libc::IPPROTO_TCP, libc::TCP_NODELAY));
    let mut x = 12345u64;
    let mut next = |bound: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % bound
    };
    // Both directions at once, never more under way than a small ring holds.
    for i in 0..400 {
        let (n, m) = (next(8000) as usize + 1, next(8000) as usize + 1);
        w.start_far(&c, &format!("getchunks {n} {}", next(5000) + 1));
        let put = c.put_chunks(n, next(5000) as usize + 1);
        let far = w.finish();
        w.start_far(&c, &format!("putchunks {m} {}", next(5000) + 1));
        let got = c.get_chunks(m, next(5000) as usize + 1);
        let far2 = w.finish();
        if (&put, &far, &got, &far2)
            != (&format!("put {n}"), &format!("got {n}"), &format!("got {m}"), &format!("put {m}"))
        {
            log!("round {i}: {put} {far} {got} {far2}");
            return;
        }
    }
    log!("all right");
}

fn many_small_writes(w: &World) {
    let mut c = w.pair();
    w.start_far(&c, "get 300000");
    log!("{}", c.put_chunks(300_000, 13));
    log!("far {}", w.finish());
    w.start_far(&c, "putchunks 300000 17");
    log!("{}", c.get_chunks(300_000, 11));
    log!("far {}", w.finish());
}

fn big_write_slow_reader(w: &World) {
    let mut c = w.pair();
    let n = 8 << 20;
    w.start_far(&c, &format!("slowget {n} 300000 2"));
    // One call: a blocking write returns when all of it went.
    let b = c.next(n);
    log!("write {}", show(sys::write(c.fd, &b)));
    log!("far {}", w.finish());
    w.still_good(&mut c);
}

fn big_writev_slow_reader(w: &World) {
    let mut c = w.pair();
    let n = 3 << 20;
    w.start_far(&c, &format!("slowget {n} 300000 2"));
    let b = c.next(n);
    log!("writev {}", show(sys::writev(c.fd, &[&b[..1], &b[1..1 << 20], &b[1 << 20..]])));
    log!("far {}", w.finish());
    w.still_good(&mut c);
}

fn nonblocking_writer_stops(w: &World) {
    let mut c = w.pair();
    sys::set_nonblocking(c.fd, true);
    let before = c.tx;
    log!("{}", c.fill());
    log!("write {}", show(sys::write(c.fd, b"x")));
    log!("poll {}", sys::show_poll(sys::poll1(c.fd, libc::POLLOUT, 0)));
    let sent = c.tx - before;
    w.start_far(&c, &format!("get {sent}"));
    c.settle(libc::POLLOUT);
    log!("far got it all: {}", w.finish() == format!("got {sent}"));
    w.still_good(&mut c);
}

fn blocked_writer_goes_on(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    let full = c.tx - before;
    let mut end = c.end;
    let t = later(0, move || {
        let r = end.put(100_000);
        (end, r)
    });
    sys::sleep_ms(100);
    log!("still blocked: {}", !t.is_finished());
    let n = full + 100_000;
    let r = w.far(&c, &format!("get {n}"));
    let (end, put) = t.join().expect("no panic");
    c.end = end;
    log!("{put}, far got it all: {}", r == format!("got {n}"));
    w.still_good(&mut c);
}

fn small_sndbuf_stops(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 8192)));
    log!("{:?}", sys::getsockopt(c.fd, libc::SOL_SOCKET, libc::SO_SNDBUF));
    w.far(&c, &format!("setopt {} {} 8192", libc::SOL_SOCKET, libc::SO_RCVBUF));
    let before = c.tx;
    log!("{}", c.fill());
    let sent = c.tx - before;
    log!("in bounds: {}", sent < 16 << 20);
    log!("far got it all: {}", w.far(&c, &format!("get {sent}")) == format!("got {sent}"));
    w.still_good(&mut c);
}

/// A writer that does not wait stops after about what the program has set, and poll says so.
fn bounded_writer(w: &World, c: &mut Conn) {
    for _ in 0..2 {
        let before = c.tx;
        log!("{}", c.fill());
        let sent = (c.tx - before) as usize;
        log!("about as much: {}", (1..200_000).contains(&sent));
        w.start_far(c, &format!("get {sent}"));
        log!("{}", sys::show_poll(sys::poll1(c.fd, libc::POLLOUT, 10_000)));
        log!("far got it all: {}", w.finish() == format!("got {sent}"));
    }
    w.start_far(c, "get 300000");
    log!("{} {}", c.put(300_000), w.finish());
    w.still_good(c);
}

fn small_buffers_bound_the_writer(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 8192)));
    w.far(&c, &format!("setopt {} {} 8192", libc::SOL_SOCKET, libc::SO_RCVBUF));
    bounded_writer(w, &mut c);
}

/// Connections have what their listener had.
fn small_buffers_of_a_listener(w: &World) {
    let l = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::setsockopt(l, libc::SOL_SOCKET, libc::SO_SNDBUF, 8192)));
    sys::bind(l, &address("4", 0)).expect("bind");
    sys::listen(l, 8).expect("listen");
    let port = sys::getsockname(l).expect("a name").port();
    w.start(&format!("connect 4 {port}"));
    let fd = sys::accept(l, None).expect("accept") as i32;
    let far = w.finish().parse().expect("an fd");
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    w.far(&c, &format!("setopt {} {} 8192", libc::SOL_SOCKET, libc::SO_RCVBUF));
    bounded_writer(w, &mut c);
}

/// A reader that wants more at once than the writer may leave unread has what there can be.
fn waits_for_all_that_small_buffers_hold(w: &World) {
    let mut c = w.pair();
    w.far(&c, &format!("setopt {} {} 4096", libc::SOL_SOCKET, libc::SO_SNDBUF));
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096)));
    w.start_far(&c, "put 400000");
    let mut b = vec![0; 400_000];
    let n = sys::recv(c.fd, &mut b, libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_WAITALL);
    log!("some at most: {}", n.is_ok_and(|n| n < 400_000) || n == Err(libc::EAGAIN));
    log!("{} {}", c.get(400_000), w.finish());
    w.still_good(&mut c);
}

/// What TCP's buffers hold in both directions at once must not become a deadlock.
fn both_write_before_reading(w: &World) {
    let mut c = w.pair();
    for _ in 0..3 {
        w.start_far(&c, "put 60000");
        let p = c.put(60_000);
        log!("{p}, far {}", w.finish());
        log!("far {}", w.far(&c, "get 60000"));
        log!("{}", c.get(60_000));
    }
}

/// More than a ring holds, less than TCP's buffers do.
fn both_write_much_before_reading(w: &World) {
    let mut c = w.pair();
    for n in [400_000, 900_000] {
        w.start_far(&c, &format!("put {n}"));
        let p = c.put(n);
        log!("{p}, far {}", w.finish());
        log!("far {}", w.far(&c, &format!("get {n}")));
        log!("{}", c.get(n));
    }
    w.still_good(&mut c);
}

fn full_duplex(w: &World) {
    let c = w.pair();
    let n = 50 << 20;
    // The agent echoes one connection while two threads use it in both directions.
    w.start_far(&c, "echo");
    let (mut tx, mut rx) = (c.end, c.end);
    // Echoed bytes come back in the writer's pattern.
    rx.rx = c.tx;
    let fd = c.fd;
    let t = later(0, move || {
        let r = tx.put_chunks(n, 100_000);
        format!("{r}, shutdown {}", show(sys::shutdown(fd, libc::SHUT_WR)))
    });
    log!("{}", rx.drain());
    log!("{}", t.join().expect("no panic"));
    log!("far {}", w.finish());
}

fn two_readers(w: &World) {
    let c = w.pair();
    let fd = c.fd;
    let base = c.rx;
    let count = move || {
        let (mut b, mut n, mut sum) = (vec![0; 3000], 0u64, 0u64);
        while let Ok(k @ 1..) = sys::read(fd, &mut b) {
            n += k as u64;
            sum += b[..k as usize].iter().map(|x| u64::from(*x)).sum::<u64>();
        }
        (n, sum)
    };
    let ts = [later(0, count), later(0, count)];
    log!("far {}", w.far(&c, "putchunks 2000000 1000"));
    log!("far {}", w.far(&c, "shutdown 1"));
    let (n, sum) =
        ts.into_iter().map(|t| t.join().expect("no panic")).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    let want: u64 = (base..base + 2_000_000).map(|p| u64::from(pattern(p))).sum();
    log!("{n} bytes, sum right: {}", sum == want);
}

fn two_writers(w: &World) {
    let c = w.pair();
    let fd = c.fd;
    w.start_far(&c, "echo");
    let ts: Vec<_> = (1..=2u8)
        .map(|i| later(0, move || (0..20_000).filter(|_| sys::write(fd, &[i; 16]) == Ok(16)).count()))
        .collect();
    // What comes back counts the bytes of each.
    let (mut b, mut counts, mut n) = (vec![0; 4096], [0u32; 256], 0);
    while n < 640_000 {
        match sys::read(fd, &mut b) {
            Ok(k @ 1..) => {
                n += k;
                b[..k as usize].iter().for_each(|x| counts[usize::from(*x)] += 1);
            }
            r => {
                log!("read {}", show(r));
                break;
            }
        }
    }
    for t in ts {
        log!("whole writes: {}", t.join().expect("no panic"));
    }
    log!("{n} bytes, {} and {}", counts[1], counts[2]);
    log!("{}", show(sys::shutdown(fd, libc::SHUT_WR)));
    log!("far {}", w.finish());
}

fn more_and_cork(w: &World) {
    let mut c = w.pair();
    let b = c.next(10);
    log!("more {}", show(sys::send(c.fd, &b, libc::MSG_MORE)));
    let b = c.next(10);
    log!("no more {}", show(sys::send(c.fd, &b, 0)));
    log!("far {}", w.far(&c, "get 20"));
    log!("cork {}", show(sys::setsockopt(c.fd, libc::IPPROTO_TCP, libc::TCP_CORK, 1)));
    for _ in 0..5 {
        let b = c.next(10);
        log!("{}", show(sys::write(c.fd, &b)));
    }
    log!("uncork {}", show(sys::setsockopt(c.fd, libc::IPPROTO_TCP, libc::TCP_CORK, 0)));
    log!("far {}", w.far(&c, "get 50"));
    // Held back at most 200 ms: nothing is needed to push it out.
    let b = c.next(10);
    log!("more {}", show(sys::send(c.fd, &b, libc::MSG_MORE)));
    log!("far {}", w.far(&c, "get 10"));
    w.still_good(&mut c);
}

fn fionread(w: &World) {
    let mut c = w.pair();
    log!("{:?}", sys::fionread(c.fd));
    for n in [1, 10, 1000] {
        w.far(&c, &format!("put {n}"));
    }
    c.arrived(1011);
    log!("{:?}", sys::fionread(c.fd));
    log!("{}", c.get(500));
    log!("{:?}", sys::fionread(c.fd));
    log!("{}", c.get(511));
    log!("{:?}", sys::fionread(c.fd));
    w.far(&c, "put 3");
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    log!("before EOF {:?}", sys::fionread(c.fd));
    log!("{}", c.get(3));
    log!("at EOF {:?}", sys::fionread(c.fd));
}

fn siocoutq(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    log!("some: {}", sys::ioctl(c.fd, libc::TIOCOUTQ, -1).is_ok_and(|n| n > 0));
    let sent = c.tx - before;
    log!("far got it all: {}", w.far(&c, &format!("get {sent}")) == format!("got {sent}"));
    for _ in 0..2000 {
        if sys::ioctl(c.fd, libc::TIOCOUTQ, -1) == Ok(0) {
            break;
        }
        sys::sleep_ms(5);
    }
    log!("in the end {:?}", sys::ioctl(c.fd, libc::TIOCOUTQ, -1));
}

fn rcvlowat(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 100)));
    log!("{:?}", sys::getsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT));
    w.far(&c, "put 50");
    c.arrived(50);
    log!("50: {}", sys::show_poll(sys::poll1(c.fd, libc::POLLIN, 50)));
    let mut b = [0; 300];
    let r = sys::recv(c.fd, &mut b, libc::MSG_DONTWAIT | libc::MSG_PEEK);
    log!("still readable without waiting: {}", show(r));
    w.far(&c, "put 50");
    c.arrived(100);
    log!("100: {}", sys::show_poll(sys::poll1(c.fd, libc::POLLIN, 5000)));
    log!("{}", c.get(100));
    // A blocking read waits for the mark.
    w.far(&c, "put 60");
    // Linux counts anew from what was already taken, so the rest alone must reach the mark.
    w.start_far(&c, "delayput 140 100");
    let r = sys::recv(c.fd, &mut b, 0);
    log!("at least the mark: {}", r.is_ok_and(|n| n >= 100));
    let n = r.unwrap_or(0) as usize;
    log!("right {:?}, far {}", c.check(&b[..n]), w.finish());
    log!("{}", c.get(200 - n) == format!("got {}", 200 - n));
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1)));
    w.still_good(&mut c);
}

/// Bytes that came before the connection went to memory are read between the call that makes the edge and the wait for it.
fn rcvlowat_makes_an_edge(w: &World) {
    let mut c = w.cold_on("4");
    let lowat = |c: &Conn, n| show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, n));
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, libc::EPOLLIN | libc::EPOLLET, 1);
    w.far(&c, "put 300");
    c.arrived(300);
    // As much as is enough for the switch, and nothing of it read.
    for _ in 0..40 {
        w.start_far(&c, "get 10");
        let put = c.put(10);
        log!("{put} {} {}", w.finish(), w.far(&c, "put 10"));
        let _told = sys::epoll_wait(set, 8, 0);
    }
    c.arrived(700);
    log!("{}", lowat(&c, 1));
    log!("{}", c.get(500));
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 8, 1000)));
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 8, 0)));
    log!("{}", c.get(200));
    w.still_good(&mut c);
}

fn pattern_file(n: usize, from: u64) -> File {
    let mut f = tempfile::tempfile().expect("a temporary file");
    f.write_all(&block(from, n)).expect("write");
    sys_rewind(&f);
    f
}

fn sys_rewind(mut f: &File) {
    use std::io::Seek as _;
    f.rewind().expect("rewind");
}

fn sendfile_positions(w: &World) {
    let mut c = w.pair();
    let f = pattern_file(10_000, c.tx);
    log!("{}", show(sys::sendfile(c.fd, f.as_raw_fd(), None, 4000)));
    log!("file position {}", show(sys::lseek(f.as_raw_fd())));
    let mut at = 4000;
    log!("{} now at {at}", show(sys::sendfile(c.fd, f.as_raw_fd(), Some(&mut at), 3000)));
    log!("moved to {at}, file position {}", show(sys::lseek(f.as_raw_fd())));
    log!("beyond the end {} at {at}", show(sys::sendfile(c.fd, f.as_raw_fd(), Some(&mut at), 100_000)));
    log!("moved to {at}");
    log!("at the end {}", show(sys::sendfile(c.fd, f.as_raw_fd(), Some(&mut at), 10)));
    log!("nothing {}", show(sys::sendfile(c.fd, f.as_raw_fd(), None, 0)));
    c.tx += 10_000;
    log!("far {}", w.far(&c, "get 10000"));
    log!("from a bad fd {}", show(sys::sendfile(c.fd, -1, None, 10)));
    w.still_good(&mut c);
}

fn sendfile_big(w: &World) {
    let mut c = w.pair();
    let n = 5 << 20;
    let f = pattern_file(n, c.tx);
    w.start_far(&c, &format!("slowget {n} 400000 1"));
    let (mut left, mut good) = (n as i64, true);
    while left > 0 {
        match sys::sendfile(c.fd, f.as_raw_fd(), None, left as usize) {
            Ok(k @ 1..) => left -= k,
            r => {
                log!("sendfile {}", show(r));
                good = false;
                break;
            }
        }
    }
    c.tx += n as u64;
    log!("{good} far {}", w.finish());
    // Non-blocking: full gives EAGAIN, and nothing is lost.
    sys::set_nonblocking(c.fd, true);
    let f = pattern_file(n, c.tx);
    w.start_far(&c, &format!("slowget {n} 400000 1"));
    let mut at = 0;
    while at < n as i64 {
        match sys::sendfile(c.fd, f.as_raw_fd(), Some(&mut at), n) {
            Ok(1..) => {}
            Err(libc::EAGAIN) => {
                let _ = sys::poll1(c.fd, libc::POLLOUT, -1);
            }
            r => {
                log!("sendfile {}", show(r));
                break;
            }
        }
    }
    c.tx += n as u64;
    log!("far {}", w.finish());
    w.still_good(&mut c);
}

fn splice_both_ways(w: &World) {
    let mut c = w.pair();
    let p = sys::pipe();
    let b = c.next(5000);
    log!("{}", show(sys::write(p[1], &b)));
    log!("to the socket {}", show(sys::splice(p[0], c.fd, 5000, 0)));
    log!("far {}", w.far(&c, "get 5000"));
    w.far(&c, "put 5000");
    c.arrived(5000);
    let mut got = Vec::new();
    while got.len() < 5000 {
        match sys::splice(c.fd, p[1], 5000 - got.len(), 0) {
            Ok(n @ 1..) => {
                let mut b = vec![0; n as usize];
                let _ = sys::read(p[0], &mut b);
                got.extend(b);
            }
            r => {
                log!("splice {}", show(r));
                break;
            }
        }
    }
    log!("from the socket {} {:?}", got.len(), c.check(&got));
    sys::set_nonblocking(c.fd, true);
    log!("nothing there {}", show(sys::splice(c.fd, p[1], 10, libc::SPLICE_F_NONBLOCK)));
    sys::set_nonblocking(c.fd, false);
    w.still_good(&mut c);
    w.far(&c, "shutdown 1");
    log!("EOF {}", show(sys::splice(c.fd, p[1], 10, 0)));
}

fn copy_between_connections(w: &World) {
    let (a, mut b) = (w.pair(), w.pair());
    // Forward what a's peer sends into b; the agent cannot do both at once, so in portions.
    let mut buf = [0; 3000];
    for _ in 0..50 {
        w.far(&a, "put 3000");
        let mut n = 0;
        while n < 3000 {
            match sys::read(a.fd, &mut buf) {
                Ok(k @ 1..) => {
                    if sys::write(b.fd, &buf[..k as usize]) != Ok(k) {
                        log!("short write");
                    }
                    n += k;
                }
                r => {
                    log!("read {}", show(r));
                    return;
                }
            }
        }
        b.tx += 3000;
        // Both streams began with the same warm-up, so positions agree.
        let r = w.far(&b, "get 3000");
        if r != "got 3000" {
            log!("{r}");
        }
    }
    w.still_good(&mut b);
}

fn oob_and_mark(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 10");
    log!("urgent {}", w.far(&c, "oob 33"));
    w.far(&c, "put 10");
    settle_pri(c.fd);
    log!("{}", sys::show_poll(sys::poll1(c.fd, libc::POLLIN | libc::POLLPRI | libc::POLLOUT, 0)));
    c.arrived(10);
    log!("at mark {:?}", sys::ioctl(c.fd, SIOCATMARK, -1));
    let mut b = [0; 100];
    let r = sys::recv(c.fd, &mut b, 0);
    log!("up to the mark {}", c.checked(r, &b));
    log!("at mark {:?}", sys::ioctl(c.fd, SIOCATMARK, -1));
    log!("urgent {} {}", show(sys::recv(c.fd, &mut b, libc::MSG_OOB)), b[0]);
    log!("urgent again {}", show(sys::recv(c.fd, &mut b, libc::MSG_OOB)));
    let r = sys::recv(c.fd, &mut b, 0);
    log!("after the mark {}", c.checked(r, &b));
    log!("at mark {:?}", sys::ioctl(c.fd, SIOCATMARK, -1));
    w.still_good(&mut c);
    log!("send {}", show(sys::send(c.fd, b"!", libc::MSG_OOB)));
    log!("far {}", w.far(&c, &format!("poll {} 5000", libc::POLLPRI)));
}

const SIOCATMARK: libc::c_ulong = 0x8905;

fn settle_pri(fd: i32) {
    crate::world::settle(fd, libc::POLLPRI);
}

fn oob_inline(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)));
    w.far(&c, "put 10");
    w.far(&c, "oob 33");
    w.far(&c, "put 10");
    settle_pri(c.fd);
    c.arrived(21);
    let mut b = [0; 100];
    let r = sys::recv(c.fd, &mut b, 0);
    log!("up to the mark {}", c.checked(r, &b));
    log!("at mark {:?}", sys::ioctl(c.fd, SIOCATMARK, -1));
    log!("out of line {}", show(sys::recv(c.fd, &mut b, libc::MSG_OOB)));
    log!("the byte {} {}", show(sys::recv(c.fd, &mut b[..1], 0)), b[0]);
    let r = sys::recv(c.fd, &mut b, 0);
    log!("the rest {}", c.checked(r, &b));
    w.still_good(&mut c);
}

/// fdopen on a socket, read and written by libc's own stdio: a stream per direction, as it has to be.
fn stdio_on_a_socket(w: &World) {
    let c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    // SAFETY: the scenario hands both fds over to stdio.
    let (r, f) = unsafe { (libc::fdopen(c.fd, c"r".as_ptr()), libc::fdopen(d, c"w".as_ptr())) };
    w.far(&c, "say hello\nsecond\n");
    for _ in 0..2 {
        let mut line = [0 as libc::c_char; 100];
        // SAFETY: a live buffer of this length and an open FILE.
        let p = unsafe { libc::fgets(line.as_mut_ptr(), 100, r) };
        // SAFETY: fgets ends what it read with a zero; the buffer was zeroed before.
        let text = unsafe { std::ffi::CStr::from_ptr(line.as_ptr()) };
        log!("fgets {} {text:?}", !p.is_null());
        // SAFETY: an open FILE; the format has one int.
        let n = unsafe { libc::fprintf(f, c"number %d\n".as_ptr(), 42 as libc::c_int) };
        // SAFETY: an open FILE.
        log!("fprintf {n}, fflush {}", unsafe { libc::fflush(f) });
        log!("far {}", w.far(&c, "hear"));
    }
    // SAFETY: open FILEs.
    log!("fclose {} {}", unsafe { libc::fclose(r) }, unsafe { libc::fclose(f) });
    log!("far EOF {}", w.far(&c, "hear"));
}

fn stdio_write_then_read(w: &World) {
    let mut c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    // SAFETY: the scenario hands the duplicate over to stdio.
    let f = unsafe { libc::fdopen(d, c"w".as_ptr()) };
    w.start_far(&c, "get 100000");
    let b = c.next(100_000);
    // SAFETY: a live buffer and an open FILE.
    log!("fwrite {}", unsafe { libc::fwrite(b.as_ptr().cast(), 1, b.len(), f) });
    // SAFETY: an open FILE.
    log!("fclose {}", unsafe { libc::fclose(f) });
    log!("far {}", w.finish());
    w.still_good(&mut c);
}

/// Integers, floats and strings, in registers and on the stack; a text larger than any buffer; an error.
fn dprintf(w: &World) {
    unsafe extern "C" {
        fn dprintf(fd: i32, format: *const libc::c_char, ...) -> i32;
    }
    let mut c = w.pair();
    let f = c"%d %s %.3f %ld %c %x %.1e %g|%d %s %.2f %f %f %f %f %f %f %d\n";
    for i in 0..3 {
        // SAFETY: the arguments are what the format says.
        let n = unsafe {
            dprintf(
                c.fd,
                f.as_ptr(),
                i,
                c"two".as_ptr(),
                3.25,
                1i64 << 40,
                65,
                255,
                1e9,
                0.5,
                -7,
                c"ten".as_ptr(),
                11.5,
                1.0,
                2.0,
                3.0,
                4.0,
                5.0,
                6.0,
                99,
            )
        };
        log!("dprintf {n}");
        log!("far {}", w.far(&c, "hear"));
    }
    w.start_far(&c, "hear");
    // SAFETY: as the format says.
    log!("dprintf {}", unsafe { dprintf(c.fd, c"%*d\n".as_ptr(), 20_000, 7) });
    log!("far {}", w.finish());
    w.still_good(&mut c);
    log!("shutdown {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    // SAFETY: the format has no arguments.
    let n = unsafe { dprintf(c.fd, c"too late".as_ptr()) };
    log!("dprintf {n} {}", sys::errno_name(sys::errno()));
}

/// Direct system calls before anything else: the counts tell, and the connection stays on TCP.
fn direct_syscalls_first(w: &World) {
    let mut c = w.cold_on("4");
    let b = c.next(100);
    log!("{}", show(sys::syscall_write(c.fd, &b)));
    log!("far {}", w.far(&c, "get 100"));
    w.far(&c, "put 100");
    c.arrived(100);
    let mut b = [0; 100];
    let r = sys::syscall_read(c.fd, &mut b);
    log!("{}", c.checked(r, &b));
    w.warm(&mut c, 300);
    w.still_good(&mut c);
    w.warm(&mut w.pair(), 1);
}

/// Direct writes between libc's: they must come in order as well.
fn direct_syscalls_in_the_middle(w: &World) {
    let mut c = w.pair();
    let b = c.next(100);
    log!("libc {}", show(sys::write(c.fd, &b)));
    let b = c.next(100);
    log!("direct {}", show(sys::syscall_write(c.fd, &b)));
    let b = c.next(100);
    log!("libc {}", show(sys::write(c.fd, &b)));
    log!("far {}", w.far(&c, "get 300"));
}

fn zerocopy_flag(w: &World) {
    const SO_ZEROCOPY: i32 = 60;
    const MSG_ZEROCOPY: i32 = 0x400_0000;
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, SO_ZEROCOPY, 1)));
    w.start_far(&c, "get 30000");
    let b = c.next(30_000);
    log!("{}", show(sys::send(c.fd, &b, MSG_ZEROCOPY)));
    log!("far {}", w.finish());
    // The completion comes on the error queue.
    crate::world::settle(c.fd, libc::POLLERR);
    let r = sys::recvmsg(c.fd, &mut [&mut []], libc::MSG_ERRQUEUE);
    log!("completion {} flags {:#x} control {}", show(r.result), r.flags, r.control_len > 0);
    w.still_good(&mut c);
}

fn long_ping_pong(w: &World) {
    let mut c = w.pair();
    w.warm(&mut c, 20_000);
    w.still_good(&mut c);
    sys::sleep_ms(300);
    w.warm(&mut c, 100);
    w.still_good(&mut c);
}

fn nonblocking_read_write(w: &World) {
    let mut c = w.pair();
    sys::set_nonblocking(c.fd, true);
    let mut b = [0; 5000];
    log!("read {}", show(sys::read(c.fd, &mut b)));
    log!("readv {}", show(sys::readv(c.fd, &mut [&mut b])));
    log!("recvmsg {}", show(sys::recvmsg(c.fd, &mut [&mut b], 0).result));
    log!("waitall {}", show(sys::recv(c.fd, &mut b, libc::MSG_WAITALL)));
    w.far(&c, "put 3000");
    c.arrived(3000);
    let r = sys::read(c.fd, &mut b);
    log!("read {}", c.checked(r, &b));
    w.start_far(&c, "get 3000000");
    log!("{}", c.put(3_000_000));
    log!("far {}", w.finish());
    w.start_far(&c, "put 3000000");
    log!("{}", c.get(3_000_000));
    log!("far {}", w.finish());
}

fn toggle_nonblocking(w: &World) {
    let mut c = w.pair();
    let mut b = [0; 10];
    for on in [true, false, true] {
        sys::set_nonblocking(c.fd, on);
        if on {
            log!("{}", show(sys::read(c.fd, &mut b)));
        } else {
            w.start_far(&c, "delayput 10 50");
            log!("{}", c.get(10));
            w.finish();
        }
    }
    log!("FIONBIO {:?}", sys::ioctl(c.fd, libc::FIONBIO, 0));
    w.start_far(&c, "delayput 10 50");
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{} {}", c.checked(r, &b), w.finish());
    log!("FIONBIO {:?}", sys::ioctl(c.fd, libc::FIONBIO, 1));
    log!("{}", show(sys::read(c.fd, &mut b)));
    sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::from_secs(5)).expect("SO_RCVTIMEO");
    log!("a timeout does not matter: {}", show(sys::read(c.fd, &mut b)));
}

type Receive = unsafe extern "C" fn(i32, *mut u8, usize) -> isize;
type Send = unsafe extern "C" fn(i32, *const u8, usize) -> isize;
type Wait = unsafe extern "C" fn(i32, i32) -> i32;
type Close = unsafe extern "C" fn(i32) -> i32;

/// A library that is bound to libc before all else, as PHP binds its extensions.
struct Deep {
    receive: Receive,
    send: Send,
    wait: Wait,
    end: Close,
}

const DEEP: &str = "
    #include <poll.h>
    #include <sys/socket.h>
    #include <unistd.h>
    ssize_t deep_receive(int fd, void *b, size_t n) { return recv(fd, b, n, MSG_WAITALL); }
    ssize_t deep_send(int fd, const void *b, size_t n) { return write(fd, b, n); }
    int deep_wait(int fd, int ms) { struct pollfd p = { fd, POLLIN, 0 }; return poll(&p, 1, ms); }
    int deep_end(int fd) { return close(fd); }
";

impl Deep {
    fn load(binding: &str, mode: i32) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (source, lib) = (dir.path().join("deep.c"), dir.path().join("deep.so"));
        std::fs::write(&source, DEEP).expect("written");
        let mut cc = std::process::Command::new("cc");
        cc.env_remove("LD_PRELOAD").args(["-shared", "-fPIC", binding, "-o"]).arg(&lib).arg(&source);
        assert!(cc.status().expect("a C compiler").success());
        let path = CString::new(lib.to_str().expect("utf-8")).expect("no NUL");
        // SAFETY: a path, NUL-terminated; the library has no constructors.
        let h = unsafe { libc::dlopen(path.as_ptr(), mode | libc::RTLD_DEEPBIND) };
        assert!(!h.is_null());
        let find = |name: &std::ffi::CStr| {
            // SAFETY: the library just opened, which is never closed.
            let p = unsafe { libc::dlsym(h, name.as_ptr()) };
            assert!(!p.is_null());
            p
        };
        // SAFETY: in all four: a function of the field's type, see DEEP.
        unsafe {
            Deep {
                receive: std::mem::transmute::<*mut c_void, Receive>(find(c"deep_receive")),
                send: std::mem::transmute::<*mut c_void, Send>(find(c"deep_send")),
                wait: std::mem::transmute::<*mut c_void, Wait>(find(c"deep_wait")),
                end: std::mem::transmute::<*mut c_void, Close>(find(c"deep_end")),
            }
        }
    }

    fn get(&self, c: &mut Conn, n: usize) -> String {
        let mut b = vec![0; n];
        // SAFETY: `b` has room for `n`.
        let r = unsafe { (self.receive)(c.fd, b.as_mut_ptr(), n) };
        c.checked(if r < 0 { Err(sys::errno()) } else { Ok(r as i64) }, &b)
    }
}

fn with_deep(w: &World, mut c: crate::world::Conn, deep: &Deep) {
    for n in [1, 100, 5000] {
        w.far(&c, &format!("put {n}"));
        // SAFETY: no pointers.
        log!("ready {}", unsafe { (deep.wait)(c.fd, 5000) });
        log!("{}", deep.get(&mut c, n));
        let b = c.next(n);
        // SAFETY: `b` is so long.
        let sent = unsafe { (deep.send)(c.fd, b.as_ptr(), b.len()) };
        log!("sent {sent}, {}", w.far(&c, &format!("get {n}")));
    }
    // SAFETY: no pointers.
    log!("nothing {}", unsafe { (deep.wait)(c.fd, 0) });
    w.still_good(&mut c);
    // SAFETY: no pointers.
    log!("end {}; {}", unsafe { (deep.end)(c.fd) }, w.far(&c, "drain"));
}

fn library_bound_deep(w: &World) {
    with_deep(w, w.pair(), &Deep::load("-Wl,-z,now", libc::RTLD_NOW));
}

fn library_bound_deep_after_the_upgrade(w: &World) {
    let c = w.pair();
    with_deep(w, c, &Deep::load("-Wl,-z,now", libc::RTLD_NOW));
}

fn library_bound_deep_and_lazily(w: &World) {
    with_deep(w, w.pair(), &Deep::load("-Wl,-z,lazy", libc::RTLD_LAZY));
}
