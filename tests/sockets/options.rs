//! Options, names, flags and time-outs: what a connection says about itself.

use crate::{
    Scenario, log, s,
    sys::{self, show},
    world::{Conn, World},
};
use libc::{IPPROTO_TCP, SOL_SOCKET};
use std::time::Duration;

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(names_stay),
    s!(plain_options),
    s!(buffer_sizes),
    s!(unknown_options),
    s!(rcvtimeo),
    s!(rcvtimeo_with_data),
    s!(rcvtimeo_waitall_partial),
    s!(timestamps),
    // Its one byte beyond a full stream is not to be sent, which a downgrade in between makes room for.
    s!(sndtimeo).unforced(),
    s!(sndtimeo_partial),
    s!(linger_values),
    s!(so_error_idle),
    s!(flags_by_fcntl),
    s!(flags_by_accept4),
    s!(flags_shared_by_dup),
    s!(tcp_info_states),
    s!(tcp_info_counts),
    s!(is_a_socket),
    s!(own_and_signal),
    s!(sigio_comes),
    s!(count_with_each_message),
    s!(asked_for_before),
    s!(peek_offset),
    s!(zerocopy_receive),
    s!(repair_mode),
    s!(paced).slow(),
    s!(options_with_bytes_waiting),
];

/// Options that the ring can't carry are set while the peer, who has sent something, does something else.
fn options_with_bytes_waiting(w: &World) {
    for (name, option) in [("zerocopy", libc::SO_ZEROCOPY), ("timestamp", libc::SO_TIMESTAMP), ("none", 0)] {
        let mut c = w.pair();
        w.far(&c, "put 1000");
        c.arrived(1000);
        if option != 0 {
            log!("{name} {}", show(sys::setsockopt(c.fd, SOL_SOCKET, option, 1)));
        } else {
            let flags = sys::fcntl(c.fd, libc::F_GETFL, 0).expect("flags");
            log!("async {}", show(sys::fcntl(c.fd, libc::F_SETFL, flags as i32 | libc::O_ASYNC)));
        }
        log!("{:?} {}", sys::fionread(c.fd), c.get(600));
        w.far(&c, "put 500");
        c.arrived(900);
        log!("{:?} {}", sys::fionread(c.fd), c.get(900));
        w.still_good(&mut c);
        w.far(&c, "close");
        log!("{}", c.drain());
        log!("{}", show(sys::close(c.fd)));
    }
}

fn names_stay(w: &World) {
    let mut c = w.cold_on("4");
    let names = |fd| {
        let (a, b) = (sys::getsockname(fd).expect("name"), sys::getpeername(fd).expect("name"));
        (a.ip(), a.port(), b.ip(), b.port())
    };
    let before = names(c.fd);
    w.warm(&mut c, 300);
    log!("{} {} same {}", before.0, before.2, names(c.fd) == before);
    w.far(&c, "close");
    log!("{}", c.drain());
    log!("same {}", names(c.fd) == before);
}

fn plain_options(w: &World) {
    let mut c = w.pair();
    let get = |level, name| show(sys::getsockopt(c.fd, level, name));
    log!("type {}", get(SOL_SOCKET, libc::SO_TYPE));
    log!("domain {}", get(SOL_SOCKET, libc::SO_DOMAIN));
    log!("protocol {}", get(SOL_SOCKET, libc::SO_PROTOCOL));
    log!("listening {}", get(SOL_SOCKET, libc::SO_ACCEPTCONN));
    for (level, name) in [
        (IPPROTO_TCP, libc::TCP_NODELAY),
        (IPPROTO_TCP, libc::TCP_QUICKACK),
        (IPPROTO_TCP, libc::TCP_KEEPIDLE),
        (IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
        (SOL_SOCKET, libc::SO_KEEPALIVE),
        (SOL_SOCKET, libc::SO_REUSEADDR),
        (SOL_SOCKET, libc::SO_OOBINLINE),
        (SOL_SOCKET, libc::SO_PRIORITY),
    ] {
        log!("{level} {name}: set {} got {}", show(sys::setsockopt(c.fd, level, name, 1)), get(level, name));
    }
    w.still_good(&mut c);
}

fn buffer_sizes(w: &World) {
    let mut c = w.pair();
    for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        for n in [1, 4096, 100_000] {
            let r = sys::setsockopt(c.fd, SOL_SOCKET, name, n);
            log!("{n}: {} {}", show(r), show(sys::getsockopt(c.fd, SOL_SOCKET, name)));
            w.still_good(&mut c);
        }
    }
}

fn unknown_options(w: &World) {
    let c = w.pair();
    log!("{}", show(sys::getsockopt(c.fd, IPPROTO_TCP, 9999)));
    log!("{}", show(sys::setsockopt(c.fd, IPPROTO_TCP, 9999, 1)));
    log!("{}", show(sys::getsockopt(c.fd, SOL_SOCKET, 9999)));
    log!("{}", show(sys::setsockopt(c.fd, 9999, 1, 1)));
    log!("{}", show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_RCVTIMEO, 1)));
    let p = sys::pipe();
    log!("{}", show(sys::getsockopt(p[0], SOL_SOCKET, libc::SO_TYPE)));
}

fn rcvtimeo(w: &World) {
    let mut c = w.pair();
    for ms in [20, 120] {
        log!("{}", show(sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::from_millis(ms))));
        let mut b = [0; 10];
        let (r, long) = sys::took_at_least(ms, || sys::recv(c.fd, &mut b, 0));
        log!("recv {} {long}", show(r));
        let (r, long) = sys::took_at_least(ms, || sys::read(c.fd, &mut b));
        log!("read {} {long}", show(r));
        let (r, long) = sys::took_at_least(ms, || sys::recvmsg(c.fd, &mut [&mut b], 0).result);
        log!("recvmsg {} {long}", show(r));
    }
    w.still_good(&mut c);
}

fn rcvtimeo_with_data(w: &World) {
    let mut c = w.pair();
    sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::from_secs(30)).expect("SO_RCVTIMEO");
    w.start_far(&c, "delayput 10 60");
    let mut b = [0; 10];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{} {}", c.checked(r, &b), w.finish());
    log!("{}", show(sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::ZERO)));
    w.start_far(&c, "delayput 10 60");
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("without a limit again {} {}", c.checked(r, &b), w.finish());
}

fn rcvtimeo_waitall_partial(w: &World) {
    let mut c = w.pair();
    sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::from_millis(80)).expect("SO_RCVTIMEO");
    w.far(&c, "put 33");
    c.arrived(33);
    let mut b = [0; 100];
    let (r, long) = sys::took_at_least(80, || sys::recv(c.fd, &mut b, libc::MSG_WAITALL));
    log!("{} {long}", c.checked(r, &b));
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{}", show(r));
}

fn sndtimeo(w: &World) {
    let mut c = w.pair();
    sys::set_timeout(c.fd, libc::SO_SNDTIMEO, Duration::from_millis(100)).expect("SO_SNDTIMEO");
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    let (r, long) = sys::took_at_least(100, || sys::send(c.fd, b"x", 0));
    log!("send {} {long}", show(r));
    let (r, long) = sys::took_at_least(100, || sys::write(c.fd, b"x"));
    log!("write {} {long}", show(r));
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

fn sndtimeo_partial(w: &World) {
    let mut c = w.pair();
    sys::set_timeout(c.fd, libc::SO_SNDTIMEO, Duration::from_millis(100)).expect("SO_SNDTIMEO");
    // More than everything holds: part of it goes, and the count says how much.
    let b = crate::world::block(c.tx, 64 << 20);
    let r = sys::send(c.fd, &b, 0);
    let n = r.unwrap_or(0);
    log!("some: {} not all: {}", n > 0, n < 64 << 20);
    c.tx += n as u64;
    log!("exactly that: {}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

fn linger_values(w: &World) {
    let c = w.pair();
    log!("{:?}", sys::get_linger(c.fd));
    for (on, secs) in [(true, 5), (true, 0), (false, 7)] {
        log!("{} {:?}", show(sys::set_linger(c.fd, on, secs)), sys::get_linger(c.fd));
    }
}

fn so_error_idle(w: &World) {
    let mut c = w.pair();
    log!("{} {}", sys::so_error(c.fd), sys::so_error(c.fd));
    w.far(&c, "close");
    log!("{} {}", c.drain(), sys::so_error(c.fd));
}

fn flags_by_fcntl(w: &World) {
    let mut c = w.pair();
    let fl = || sys::fcntl(c.fd, libc::F_GETFL, 0).map(|f| format!("{f:#x}"));
    log!("{:?} {:?}", fl(), sys::fcntl(c.fd, libc::F_GETFD, 0));
    sys::set_nonblocking(c.fd, true);
    log!("{:?}", fl());
    log!("FIONBIO {:?} {:?}", sys::ioctl(c.fd, libc::FIONBIO, 0), fl());
    log!("{} {:?}", show(sys::fcntl(c.fd, libc::F_SETFD, 0)), sys::fcntl(c.fd, libc::F_GETFD, 0));
    log!("FIOCLEX {:?} {:?}", sys::ioctl(c.fd, libc::FIOCLEX, 0), sys::fcntl(c.fd, libc::F_GETFD, 0));
    w.still_good(&mut c);
}

fn flags_by_accept4(w: &World) {
    for flags in [0, libc::SOCK_NONBLOCK, libc::SOCK_CLOEXEC, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC] {
        let (l, port) = crate::world::listener(&crate::world::address("4", 0), 5);
        w.start(&format!("connect 4 {port}"));
        let fd = sys::accept4(l, flags).expect("accept4") as i32;
        let far = w.finish().parse().expect("an fd");
        let mut c = crate::world::Conn { end: crate::world::End::new(fd), far };
        w.warm(&mut c, 200);
        log!("{:?} {:?}", sys::fcntl(fd, libc::F_GETFL, 0), sys::fcntl(fd, libc::F_GETFD, 0));
        if flags & libc::SOCK_NONBLOCK != 0 {
            log!("{}", show(sys::read(fd, &mut [0; 1])));
        }
        w.still_good(&mut c);
        log!("{}", show(sys::close(l)));
    }
}

fn flags_shared_by_dup(w: &World) {
    let mut c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    sys::set_nonblocking(d, true);
    log!("{}", show(sys::read(c.fd, &mut [0; 1])));
    sys::set_nonblocking(c.fd, false);
    w.start_far(&c, "delayput 1 50");
    c.fd = d;
    let mut b = [0; 1];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{} {}", c.checked(r, &b), w.finish());
}

fn tcp_info_states(w: &World) {
    let c = w.pair();
    let state = |c: &crate::world::Conn| sys::tcp_info(c.fd).map(|i| i.tcpi_state);
    log!("{:?}", state(&c));
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    log!("the peer's end down {:?}", state(&c));
    let d = w.pair();
    w.far(&d, "linger 0");
    w.far(&d, "close");
    d.settle(libc::POLLERR);
    log!("reset {:?}", state(&d));
}

fn tcp_info_counts(w: &World) {
    let mut c = w.pair();
    let read = |c: &crate::world::Conn| {
        sys::tcp_info(c.fd).map_or((0, 0), |i| (i.tcpi_bytes_acked, i.tcpi_bytes_received))
    };
    // What the warm-up sent last may not be acknowledged yet.
    while sys::ioctl(c.fd, libc::TIOCOUTQ, -1) != Ok(0) {
        sys::sleep_ms(1);
    }
    let before = read(&c);
    w.start_far(&c, "get 100000");
    log!("{} {}", c.put(100_000), w.finish());
    w.start_far(&c, "put 50000");
    log!("{} {}", c.get(50_000), w.finish());
    // The acknowledgement may still be on its way.
    let mut grown = (0, 0);
    for _ in 0..400 {
        let now = read(&c);
        grown = (now.0 - before.0, now.1 - before.1);
        if grown == (100_000, 50_000) {
            break;
        }
        sys::sleep_ms(5);
    }
    log!("{grown:?}");
}

fn is_a_socket(w: &World) {
    let c = w.pair();
    log!("{}", sys::is_socket(c.fd));
    let link = std::fs::read_link(format!("/proc/self/fd/{}", c.fd)).expect("a link");
    log!("{}", link.to_string_lossy().starts_with("socket:["));
    log!("ftruncate {}", {
        // SAFETY: no pointers.
        let r = unsafe { libc::ftruncate(c.fd, 0) };
        if r < 0 { sys::errno_name(sys::errno()) } else { "0".into() }
    });
}

fn own_and_signal(w: &World) {
    let mut c = w.pair();
    let me = std::process::id() as i32;
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETOWN, me)));
    log!("{}", sys::fcntl(c.fd, libc::F_GETOWN, 0) == Ok(i64::from(me)));
    log!("{}", show(sys::fcntl(c.fd, 11, 0)));
    w.still_good(&mut c);
}

static IO: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

extern "C" fn on_io(_: i32) {
    IO.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

fn sigio_comes(w: &World) {
    let mut c = w.pair();
    sys::on_signal(libc::SIGIO, on_io, libc::SA_RESTART);
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETOWN, std::process::id() as i32)));
    let f = sys::fcntl(c.fd, libc::F_GETFL, 0).expect("F_GETFL") as i32;
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETFL, f | libc::O_ASYNC)));
    for i in 1..4 {
        IO.store(0, std::sync::atomic::Ordering::Relaxed);
        w.far(&c, "put 10");
        c.arrived(10);
        let mut seen = false;
        for _ in 0..400 {
            seen = IO.load(std::sync::atomic::Ordering::Relaxed) > 0;
            if seen {
                break;
            }
            sys::sleep_ms(5);
        }
        log!("{i}: signal {seen} {}", c.get(10));
    }
}

/// Whether something comes with the bytes.
fn with_the_next(w: &World, c: &mut crate::world::Conn) {
    let mut b = [0; 10];
    for _ in 0..3 {
        w.far(c, "put 10");
        c.arrived(10);
        let r = sys::recvmsg(c.fd, &mut [&mut b], 0);
        log!("{} control {}", c.checked(r.result, &b), r.control_len > 0);
    }
    w.still_good(c);
}

/// linux/tcp.h: how much is still there comes with each message.
const TCP_INQ: i32 = 36;

fn count_with_each_message(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, IPPROTO_TCP, TCP_INQ, 1)));
    log!("{:?}", sys::getsockopt(c.fd, IPPROTO_TCP, TCP_INQ));
    with_the_next(w, &mut c);
    let look = |c: &mut crate::world::Conn, n: usize, flags: i32| {
        let (mut b, rx) = ([0; 100], c.rx);
        let r = sys::recvmsg(c.fd, &mut [&mut b[..n]], flags);
        log!("{} left {:?}", c.checked(r.result, &b), r.left);
        if flags & libc::MSG_PEEK != 0 {
            c.rx = rx;
        }
    };
    w.far(&c, "put 100");
    c.arrived(100);
    look(&mut c, 10, libc::MSG_PEEK);
    for n in [30, 50, 20] {
        look(&mut c, n, 0);
    }
    // Behind the time, which the kernel gives a while after it was asked to.
    log!("{}", show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)));
    w.far(&c, "put 8");
    c.arrived(8);
    look(&mut c, 4, 0);
    log!("{}", show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_TIMESTAMPNS, 0)));
    log!("{}", show(sys::setsockopt(c.fd, IPPROTO_TCP, TCP_INQ, 0)));
    look(&mut c, 2, 0);
    log!("{}", show(sys::setsockopt(c.fd, IPPROTO_TCP, TCP_INQ, 1)));
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    for _ in 0..2 {
        look(&mut c, 10, 0);
    }
}

/// Options of a listener are those of its connections.
fn asked_for_before(w: &World) {
    let (l, port) = crate::world::listener(&crate::world::address("4", 0), 5);
    log!("{}", show(sys::setsockopt(l, IPPROTO_TCP, TCP_INQ, 1)));
    w.start(&format!("connect 4 {port}"));
    let fd = sys::accept(l, None).expect("accept") as i32;
    let far = w.finish().parse().expect("an fd");
    let mut c = crate::world::Conn { end: crate::world::End::new(fd), far };
    w.warm(&mut c, 200);
    with_the_next(w, &mut c);
    w.warm(&mut w.pair(), 1);
}

fn peek_offset(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_PEEK_OFF, 5)));
    w.far(&c, "put 30");
    c.arrived(30);
    let mut b = [0; 10];
    for at in [5, 15] {
        let r = sys::recv(c.fd, &mut b, libc::MSG_PEEK);
        log!("{at} {} {}", show(r), b[..] == crate::world::block(c.rx + at, 10));
    }
    log!("{} {}", c.get(30), show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_PEEK_OFF, -1)));
    w.still_good(&mut c);
}

/// getsockopt(TCP_ZEROCOPY_RECEIVE) gives the kernel's pages, or says how much must be copied.
fn zerocopy_receive(w: &World) {
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    let mut c = w.pair();
    let fd = c.fd;
    let ask = || {
        // struct tcp_zerocopy_receive: address, length, bytes to be copied, bytes left, error.
        let mut z = [0u32; 6];
        let mut n = size_of_val(&z) as libc::socklen_t;
        // SAFETY: a live struct and its length; no address is given.
        let r =
            unsafe { libc::getsockopt(fd, IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE, z.as_mut_ptr().cast(), &mut n) };
        if r < 0 { sys::errno_name(sys::errno()) } else { z[3].to_string() }
    };
    log!("{}", ask());
    for _ in 0..3 {
        w.far(&c, "put 100");
        c.arrived(100);
        log!("{} {}", ask(), c.get(100));
    }
    w.still_good(&mut c);
}

/// SO_MAX_PACING_RATE bounds what goes in a second: set in mid-stream, set from the start, and taken back.
fn paced(w: &World) {
    let put = |c: &mut Conn| {
        w.start_far(c, "get 1000000");
        let (r, slow) = sys::took_at_least(300, || format!("{} {}", c.put(1_000_000), w.finish()));
        log!("{r}, slow {slow}");
    };
    let pace = |c: &Conn, rate| {
        log!("{}", show(sys::setsockopt(c.fd, SOL_SOCKET, libc::SO_MAX_PACING_RATE, rate)));
    };
    let mut c = w.pair();
    pace(&c, -1);
    pace(&c, 1_000_000);
    put(&mut c);
    pace(&c, -1);
    w.still_good(&mut c);
    let mut c = w.cold_on("4");
    pace(&c, 1_000_000);
    w.warm(&mut c, 200);
    put(&mut c);
}

fn repair_mode(w: &World) {
    const TCP_REPAIR: i32 = 19;
    let mut c = w.pair();
    w.far(&c, "put 10");
    c.arrived(10);
    for on in [1, 0] {
        log!("{}", show(sys::setsockopt(c.fd, IPPROTO_TCP, TCP_REPAIR, on)));
    }
    log!("{}", c.get(10));
    w.still_good(&mut c);
}

/// SO_TIMESTAMP: a receiver that leaves room for it hears when the bytes came, one that does not reads on.
fn timestamps(w: &World) {
    let mut c = w.pair();
    for on in [0, 1] {
        log!("set {}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_TIMESTAMP, on)));
        // The kernel turns time stamps on in the background (net_enable_timestamp).
        sys::sleep_ms(100);
        for room in [0, 128] {
            w.far(&c, "put 100");
            c.arrived(100);
            let (mut b, mut control) = ([0u8; 100], [0u64; 16]);
            let mut iov = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() };
            // SAFETY: plain data; all zero is valid.
            let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
            m.msg_iov = &raw mut iov;
            m.msg_iovlen = 1;
            m.msg_control = if room > 0 { control.as_mut_ptr().cast() } else { std::ptr::null_mut() };
            m.msg_controllen = room;
            // SAFETY: `m` describes live buffers.
            let n = unsafe { libc::recvmsg(c.fd, &raw mut m, 0) };
            let r = c.checked(Ok(n as i64), &b);
            log!("on {on} room {room}: {r}, flags {:#x}, control {}", m.msg_flags, m.msg_controllen);
        }
        w.still_good(&mut c);
    }
}
