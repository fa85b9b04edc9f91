//! How a connection begins: families, addresses, refusal, non-blocking connect, accept, and things that are no
//! TCP connection at all.

use crate::{
    Scenario, log, s,
    sys::{self, Addr, show},
    world::{Conn, End, World, address, listener, settle},
};
use libc::{AF_INET, AF_INET6, IPPROTO_IPV6, POLLIN, POLLOUT, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(ipv6),
    s!(dual_stack_v4_client),
    s!(dual_stack_v6_client),
    s!(v6_only),
    s!(other_loopback_address),
    s!(to_itself).plain(),
    s!(both_ends_in_one_thread),
    s!(both_ends_in_one_thread_big),
    s!(both_ends_in_one_thread_blocking),
    s!(refused).plain(),
    s!(nonblocking_connect),
    s!(connected_by_a_second_call),
    s!(nonblocking_connect_refused).plain(),
    s!(connect_again),
    s!(unconnected_calls).plain(),
    s!(listener_calls).plain(),
    s!(nonblocking_accept),
    s!(accept_gives_the_address),
    s!(listener_readiness),
    s!(listener_closed_with_pending).plain(),
    s!(data_before_accept),
    s!(closed_before_accept).plain(),
    s!(server_speaks_first),
    s!(client_speaks_first),
    s!(one_way_only),
    s!(one_way_only_back),
    s!(many_short).plain(),
    s!(many_at_once),
    s!(address_in_use).plain(),
    s!(bound_client),
    s!(reuseport),
    s!(other_kinds_of_sockets).plain(),
    s!(fast_open).plain(),
    s!(disconnect_and_reuse),
];

fn family(w: &World, f: &str) {
    let mut c = w.pair_on(f);
    let (a, b) = (sys::getsockname(c.fd).expect("name"), sys::getpeername(c.fd).expect("name"));
    log!("{} {}", a.ip(), b.ip());
    log!("{:?}", sys::getsockopt(c.fd, SOL_SOCKET, libc::SO_DOMAIN));
    w.start_far(&c, "get 1000000");
    log!("{} {}", c.put(1_000_000), w.finish());
    w.still_good(&mut c);
    w.far(&c, "close");
    log!("{}", c.drain());
}

fn ipv6(w: &World) {
    family(w, "6");
}

fn other_loopback_address(w: &World) {
    // The end that connects is 127.0.0.1 either way; only the listening end has the other address.
    let (l, port) = listener(&address("127.0.0.77", 0), 5);
    let far = w.ask(&format!("connect 127.0.0.77 {port}")).parse().expect("an fd");
    let fd = sys::accept(l, None).expect("accept") as i32;
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    log!("{} {}", sys::getsockname(fd).expect("name").ip(), sys::getpeername(fd).expect("name").ip());
    w.still_good(&mut c);
}

fn dual(w: &World, client: &str) {
    let l = sys::socket(AF_INET6, SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::setsockopt(l, IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)));
    sys::bind(l, &Addr::v6(true, 0)).expect("bind");
    sys::listen(l, 5).expect("listen");
    let port = sys::getsockname(l).expect("name").port();
    let far = w.ask(&format!("connect {client} {port}")).parse().expect("an fd");
    let fd = sys::accept(l, None).expect("accept") as i32;
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    log!("{} {}", sys::getsockname(fd).expect("name").ip(), sys::getpeername(fd).expect("name").ip());
    w.still_good(&mut c);
}

fn dual_stack_v4_client(w: &World) {
    dual(w, "4");
}

fn dual_stack_v6_client(w: &World) {
    dual(w, "6");
}

fn v6_only(w: &World) {
    let l = sys::socket(AF_INET6, SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::setsockopt(l, IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)));
    sys::bind(l, &Addr::v6(true, 0)).expect("bind");
    sys::listen(l, 5).expect("listen");
    let port = sys::getsockname(l).expect("name").port();
    log!("{}", w.ask(&format!("connect 4 {port}")));
    let far = w.ask(&format!("connect 6 {port}")).parse().expect("an fd");
    let mut c = Conn { end: End::new(sys::accept(l, None).expect("accept") as i32), far };
    w.warm(&mut c, 200);
    w.still_good(&mut c);
}

/// A socket connected to its own port: both ends are one socket.
fn to_itself(_: &World) {
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    sys::bind(fd, &address("4", 0)).expect("bind");
    let me = sys::getsockname(fd).expect("name");
    log!("connect {}", show(sys::connect(fd, &me)));
    let mut e = End::new(fd);
    for _ in 0..300 {
        let (p, g) = (e.put(100), e.get(100));
        if (p.as_str(), g.as_str()) != ("put 100", "got 100") {
            log!("{p} {g}");
        }
    }
    log!("{}", show(sys::shutdown(fd, libc::SHUT_WR)));
    log!("{}", e.drain());
}

/// A connection whose two ends are used by one thread in turn.
fn one_thread() -> (End, End) {
    let (l, port) = listener(&address("4", 0), 5);
    let a = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    sys::connect(a, &address("4", port)).expect("connect");
    let b = sys::accept(l, None).expect("accept") as i32;
    sys::close(l).expect("close");
    let (mut a, mut b) = (End::new(a), End::new(b));
    for _ in 0..300 {
        a.put(1);
        b.get(1);
        b.put(1);
        a.get(1);
    }
    (a, b)
}

fn both_ends_in_one_thread(_: &World) {
    let (mut a, mut b) = one_thread();
    for n in [1, 100, 5000] {
        log!("{} {} {} {}", a.put(n), b.get(n), b.put(n), a.get(n));
    }
    log!("{}", show(sys::recv(a.fd, &mut [0; 1], libc::MSG_DONTWAIT)));
    let ep = sys::epoll_create();
    sys::epoll_add(ep, b.fd, libc::EPOLLIN, 1);
    log!("{}", a.put(10));
    log!("{} {}", sys::show_epoll(sys::epoll_wait(ep, 8, -1)), b.get(10));
    log!("{}", show(sys::close(a.fd)));
    log!("{} {}", sys::show_epoll(sys::epoll_wait(ep, 8, -1)), b.drain());
}

fn both_ends_in_one_thread_big(_: &World) {
    let (mut a, mut b) = one_thread();
    for _ in 0..3 {
        let n = a.tx;
        log!("{}", a.fill());
        let n = (a.tx - n) as usize;
        log!("{}", b.get(n) == format!("got {n}"));
    }
    log!("{} {}", b.put(1000), a.get(1000));
}

/// One thread writes what nobody else will read: on TCP that works as far as its buffers go.
fn both_ends_in_one_thread_blocking(_: &World) {
    let (mut a, mut b) = one_thread();
    for n in [100_000, 700_000] {
        log!("{} {} {} {}", a.put(n), b.get(n), b.put(n), a.get(n));
    }
}

fn refused(_: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    sys::close(l).expect("close");
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::connect(fd, &address("4", port))));
    log!("{}", sys::so_error(fd));
    log!("{}", show(sys::send(fd, b"x", libc::MSG_NOSIGNAL)));
    log!("{}", show(sys::read(fd, &mut [0; 1])));
    log!("{}", show(sys::close(fd)));
}

fn nonblocking_connect(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let fd = sys::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK).expect("socket") as i32;
    log!("before {}", sys::show_poll(sys::poll1(fd, POLLIN | POLLOUT, 0)));
    let ep = sys::epoll_create();
    sys::epoll_add(ep, fd, libc::EPOLLIN | libc::EPOLLOUT, 1);
    log!("{}", show(sys::connect(fd, &address("4", port))));
    settle(fd, POLLOUT);
    log!("{} {}", sys::so_error(fd), sys::show_epoll(sys::epoll_wait(ep, 8, 0)));
    log!("again {}", show(sys::connect(fd, &address("4", port))));
    log!("again {}", show(sys::connect(fd, &address("4", port))));
    let b = sys::accept(l, None).expect("accept") as i32;
    let (mut a, mut b) = (End::new(fd), End::new(b));
    for _ in 0..300 {
        let r = [a.put(10), b.get(10), b.put(10), a.get(10)];
        if r != ["put 10", "got 10", "put 10", "got 10"] {
            log!("{r:?}");
        }
    }
    log!("{}", sys::show_epoll(sys::epoll_wait(ep, 8, 0)));
    let _ = w;
}

/// A second connect says that the first is done. The set in which the socket has been since before goes on telling of it.
fn connected_by_a_second_call(_: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let fd = sys::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK).expect("socket") as i32;
    let set = sys::epoll_create();
    log!("{}", show(sys::connect(fd, &address("4", port))));
    sys::epoll_add(set, fd, libc::EPOLLIN | libc::EPOLLOUT, 1);
    settle(fd, POLLOUT);
    log!("again {}", show(sys::connect(fd, &address("4", port))));
    log!("{}", show(sys::epoll_ctl(set, libc::EPOLL_CTL_MOD, fd, libc::EPOLLIN as u32, 1)));
    let b = sys::accept(l, None).expect("accept") as i32;
    let (mut a, mut b) = (End::new(fd), End::new(b));
    for i in 0..300 {
        let moved = [a.put(10), b.get(10), b.put(10)];
        let told = sys::show_epoll(sys::epoll_wait(set, 8, 2000));
        let got = a.get(10);
        if i % 100 == 0 || told == sys::show_epoll(Ok(vec![])) {
            log!("{i} {moved:?} {told} {got}");
        }
        if told == sys::show_epoll(Ok(vec![])) {
            break;
        }
    }
}

fn nonblocking_connect_refused(_: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    sys::close(l).expect("close");
    let fd = sys::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK).expect("socket") as i32;
    log!("{}", show(sys::connect(fd, &address("4", port))));
    settle(fd, libc::POLLERR);
    log!("{}", sys::show_poll(sys::poll1(fd, POLLIN | POLLOUT, 0)));
    log!("{} {}", sys::so_error(fd), sys::so_error(fd));
}

fn connect_again(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::connect(c.fd, &address("4", 9))));
    log!("{}", show(sys::listen(c.fd, 5)));
    log!("{}", show(sys::accept(c.fd, None)));
    log!("{}", show(sys::bind(c.fd, &address("4", 0))));
    w.still_good(&mut c);
}

fn unconnected_calls(_: &World) {
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    log!("read {}", show(sys::read(fd, &mut [0; 1])));
    log!("recv {}", show(sys::recv(fd, &mut [0; 1], 0)));
    log!("send {}", show(sys::send(fd, b"x", libc::MSG_NOSIGNAL)));
    log!("shutdown {}", show(sys::shutdown(fd, libc::SHUT_WR)));
    log!("peer {:?}", sys::getpeername(fd).map(|_| ()).map_err(sys::errno_name));
    log!("accept {}", show(sys::accept(fd, None)));
    log!("poll {}", sys::show_poll(sys::poll1(fd, POLLIN | POLLOUT, 0)));
    log!("{:?}", sys::fionread(fd).map_err(sys::errno_name));
}

fn listener_calls(_: &World) {
    let (l, _) = listener(&address("4", 0), 5);
    log!("read {}", show(sys::read(l, &mut [0; 1])));
    log!("send {}", show(sys::send(l, b"x", libc::MSG_NOSIGNAL)));
    log!("poll {}", sys::show_poll(sys::poll1(l, POLLIN | POLLOUT, 0)));
    log!("listening {:?}", sys::getsockopt(l, SOL_SOCKET, libc::SO_ACCEPTCONN));
    log!("{:?}", sys::fionread(l).map_err(sys::errno_name));
    log!("connect {}", show(sys::connect(l, &address("4", 9))));
}

fn nonblocking_accept(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    sys::set_nonblocking(l, true);
    log!("{}", show(sys::accept(l, None)));
    log!("{}", show(sys::accept4(l, SOCK_NONBLOCK)));
    let far = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    settle(l, POLLIN);
    let fd = sys::accept(l, None).expect("accept") as i32;
    // Linux does not inherit the listener's O_NONBLOCK.
    log!("{:?}", sys::fcntl(fd, libc::F_GETFL, 0));
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    w.still_good(&mut c);
    log!("{}", show(sys::accept(l, None)));
}

fn accept_gives_the_address(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let far = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    let mut from = Addr::empty();
    let fd = sys::accept(l, Some(&mut from)).expect("accept") as i32;
    log!("{} {} {}", from.ip(), from.len(), from.port() == sys::getpeername(fd).expect("name").port());
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    w.still_good(&mut c);
}

fn listener_readiness(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let ep = sys::epoll_create();
    sys::epoll_add(ep, l, libc::EPOLLIN | libc::EPOLLET, 1);
    for _ in 0..3 {
        log!("{}", sys::show_epoll(sys::epoll_wait(ep, 8, 0)));
        let far = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        log!("{}", sys::show_epoll(sys::epoll_wait(ep, 8, 10_000)));
        log!("{}", sys::show_poll(sys::poll1(l, POLLIN | POLLOUT, 0)));
        let mut c = Conn { end: End::new(sys::accept(l, None).expect("accept") as i32), far };
        w.warm(&mut c, 200);
        log!("{}", sys::show_poll(sys::poll1(l, POLLIN | POLLOUT, 0)));
    }
}

fn listener_closed_with_pending(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    settle(l, POLLIN);
    log!("{}", show(sys::close(l)));
    log!("{}", w.ask(&format!("settle {far} {}", libc::POLLHUP)));
    log!("{}", w.ask(&format!("drain {far}")));
}

fn data_before_accept(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    log!("{}", w.ask(&format!("putchunks {far} 10000 100")));
    let mut c = Conn { end: End::new(sys::accept(l, None).expect("accept") as i32), far };
    log!("{}", c.get(10_000));
    w.warm(&mut c, 300);
    w.still_good(&mut c);
}

fn closed_before_accept(w: &World) {
    let (l, port) = listener(&address("4", 0), 5);
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    log!("{} {}", w.ask(&format!("put {far} 100")), w.ask(&format!("close {far}")));
    let mut c = End::new(sys::accept(l, None).expect("accept") as i32);
    log!("{}", c.drain());
}

fn server_speaks_first(w: &World) {
    let mut c = w.cold_on("4");
    w.start_far(&c, "put 100000");
    log!("{} {}", c.get(100_000), w.finish());
    w.warm(&mut c, 200);
    w.still_good(&mut c);
}

fn client_speaks_first(w: &World) {
    let mut c = w.cold_on("4");
    w.start_far(&c, "get 100000");
    log!("{} {}", c.put(100_000), w.finish());
    w.warm(&mut c, 200);
    w.still_good(&mut c);
}

/// Bytes in one direction only: nothing ever comes back to carry news.
fn one_way_only(w: &World) {
    let mut c = w.cold_on("4");
    w.start_far(&c, "getchunks 20000000 50000");
    log!("{} {}", c.put_chunks(20_000_000, 30_000), w.finish());
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("{}", w.far(&c, "drain"));
}

fn one_way_only_back(w: &World) {
    let mut c = w.cold_on("4");
    w.start_far(&c, "putchunks 20000000 30000");
    log!("{} {}", c.get_chunks(20_000_000, 50_000), w.finish());
    w.far(&c, "close");
    log!("{}", c.drain());
}

fn many_short(w: &World) {
    for i in 0..100 {
        let mut c = w.cold_on("4");
        let n = i * 37 % 1000 + 1;
        let put = c.put(n);
        let far = w.far(&c, &format!("get {n}"));
        w.far(&c, "put 50");
        let got = c.get(50);
        let _ = sys::close(c.fd);
        let end = w.far(&c, "drain");
        w.far(&c, "close");
        if [put, far, got, end]
            != [format!("put {n}"), format!("got {n}"), "got 50".into(), "EOF after 0".into()]
        {
            log!("{i} went wrong");
        }
    }
    log!("done");
}

fn many_at_once(w: &World) {
    let mut cs: Vec<_> = (0..120)
        .map(|_| {
            let mut c = w.cold_on("4");
            w.warm(&mut c, 40);
            c
        })
        .collect();
    for round in 0..3 {
        for c in &mut cs {
            let r = (c.put(700), w.far(c, "get 700"), w.far(c, "put 300"), c.get(300));
            if (r.0.as_str(), r.1.as_str(), r.2.as_str(), r.3.as_str())
                != ("put 700", "got 700", "put 300", "got 300")
            {
                log!("round {round}: {r:?}");
            }
        }
    }
    for c in &mut cs {
        w.far(c, "close");
        let r = c.drain();
        if r != "EOF after 0" {
            log!("{r}");
        }
    }
    log!("done");
}

fn address_in_use(_: &World) {
    let (_l, port) = listener(&address("4", 0), 5);
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::bind(fd, &address("4", port))));
    log!("{}", show(sys::bind(fd, &address("6", port))));
}

fn bound_client(w: &World) {
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    sys::bind(fd, &address("127.0.0.55", 0)).expect("bind");
    sys::connect(fd, &address("4", port)).expect("connect");
    let far = w.ask(&format!("accept {port}")).parse().expect("an fd");
    let mut c = Conn { end: End::new(fd), far };
    w.warm(&mut c, 200);
    log!("{}", sys::getsockname(fd).expect("name").ip());
    w.still_good(&mut c);
}

fn reuseport(w: &World) {
    let mk = |port| {
        let l = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
        sys::setsockopt(l, SOL_SOCKET, libc::SO_REUSEPORT, 1).expect("SO_REUSEPORT");
        sys::bind(l, &address("4", port)).expect("bind");
        sys::listen(l, 50).expect("listen");
        l
    };
    let a = mk(0);
    let port = sys::getsockname(a).expect("name").port();
    let b = mk(port);
    let mut taken = 0;
    for _ in 0..20 {
        let far = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        let mut p = [a, b].map(|fd| libc::pollfd { fd, events: POLLIN, revents: 0 });
        sys::poll(&mut p, -1).expect("poll");
        let l = if p[0].revents != 0 { a } else { b };
        let mut c = Conn { end: End::new(sys::accept(l, None).expect("accept") as i32), far };
        w.warm(&mut c, 60);
        w.far(&c, "put 10");
        taken += u32::from(c.get(10) == "got 10");
    }
    log!("{taken}");
}

/// Unix sockets, UDP, pipes: nothing of ours.
fn other_kinds_of_sockets(_: &World) {
    let mut b = [0; 100];
    let u = sys::unix_pair(SOCK_STREAM);
    for _ in 0..300 {
        sys::write(u[0], b"hello").expect("write");
        sys::read(u[1], &mut b).expect("read");
    }
    log!("{} {}", show(sys::send(u[0], b"hello", 0)), show(sys::recv(u[1], &mut b, 0)));
    log!("{}", show(sys::recv(u[1], &mut b, libc::MSG_DONTWAIT)));
    log!("{}", show(sys::close(u[0])));
    log!("{}", show(sys::read(u[1], &mut b)));
    let d = sys::socket(AF_INET, libc::SOCK_DGRAM).expect("socket") as i32;
    sys::bind(d, &address("4", 0)).expect("bind");
    let me = sys::getsockname(d).expect("name");
    log!("{} {}", show(sys::sendto(d, b"one", 0, Some(&me))), show(sys::sendto(d, b"three", 0, Some(&me))));
    log!("{} {}", show(sys::recv(d, &mut b, 0)), show(sys::recv(d, &mut b[..2], libc::MSG_TRUNC)));
    let a = Addr::abstract_unix(&format!("scenario-{}", std::process::id()));
    let l = sys::socket(libc::AF_UNIX, SOCK_STREAM).expect("socket") as i32;
    log!("{} {}", show(sys::bind(l, &a)), show(sys::listen(l, 5)));
    let c = sys::socket(libc::AF_UNIX, SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::connect(c, &a)));
    let s = sys::accept(l, None).expect("accept") as i32;
    log!("{} {}", show(sys::write(c, b"four")), show(sys::read(s, &mut b)));
}

fn fast_open(w: &World) {
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    let mut e = End::new(fd);
    let b = e.next(100);
    log!("{}", show(sys::sendto(fd, &b, libc::MSG_FASTOPEN, Some(&address("4", port)))));
    let far = w.ask(&format!("accept {port}")).parse().expect("an fd");
    let mut c = Conn { end: e, far };
    log!("{}", w.far(&c, "get 100"));
    w.warm(&mut c, 300);
    w.still_good(&mut c);
}

/// connect to AF_UNSPEC ends a connection; the socket can connect again.
fn disconnect_and_reuse(w: &World) {
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let fd = sys::socket(AF_INET, SOCK_STREAM).expect("socket") as i32;
    for _ in 0..2 {
        log!("{}", show(sys::connect(fd, &address("4", port))));
        let far = w.ask(&format!("accept {port}")).parse().expect("an fd");
        let mut c = Conn { end: End::new(fd), far };
        w.warm(&mut c, 200);
        w.still_good(&mut c);
        // An all-zero address is AF_UNSPEC.
        log!("{}", show(sys::connect(fd, &Addr::empty())));
        log!("{}", show(sys::send(fd, b"x", libc::MSG_NOSIGNAL)));
        log!("{}", w.far(&c, "drain"));
        w.far(&c, "close");
    }
}
