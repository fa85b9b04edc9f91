//! Readiness: poll, ppoll, select, pselect and epoll in every state of a connection and every mode.

use crate::{
    Scenario, log, s,
    sys::{self, show, show_epoll, show_poll},
    world::{Conn, World, later, listener},
};
use libc::{
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLET, EPOLLEXCLUSIVE, EPOLLIN, EPOLLONESHOT, EPOLLOUT,
    EPOLLPRI, EPOLLRDHUP, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLPRI, POLLRDHUP,
};
use std::time::Duration;

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(states_poll),
    s!(states_ppoll),
    s!(states_select),
    s!(states_pselect),
    s!(states_epoll),
    s!(states_epoll_added_late),
    s!(states_nothing_asked),
    s!(poll_timeouts),
    s!(poll_odd_entries),
    s!(poll_many),
    s!(poll_blocked_gets_data),
    s!(poll_blocked_gets_room),
    s!(poll_blocked_gets_eof),
    s!(poll_blocked_gets_reset),
    s!(ppoll_nanoseconds),
    s!(select_many),
    s!(select_time_left),
    s!(select_blocked_gets_data),
    s!(epoll_level_repeats),
    s!(epoll_edge),
    s!(epoll_edge_partial_read),
    s!(epoll_edge_out),
    s!(epoll_edge_eof),
    s!(epoll_oneshot),
    s!(epoll_oneshot_edge_out),
    s!(epoll_rdhup),
    s!(epoll_pri),
    s!(epoll_mod),
    s!(epoll_mod_rearms_edge),
    s!(epoll_del),
    s!(epoll_errors),
    s!(epoll_exclusive),
    s!(epoll_timeouts),
    s!(epoll_blocked_gets_data),
    s!(epoll_blocked_gets_room),
    s!(epoll_blocked_then_added),
    s!(epoll_blocked_then_mod),
    s!(epoll_blocked_then_del),
    s!(epoll_nested),
    s!(epoll_nested_blocked),
    s!(epoll_in_poll),
    s!(epoll_in_select),
    s!(epoll_in_poll_blocked),
    s!(epoll_two_sets),
    s!(epoll_two_sets_edge),
    s!(epoll_same_socket_by_dup),
    s!(epoll_close_removes),
    s!(epoll_close_with_dup_stays),
    s!(epoll_dup2_over_member),
    s!(epoll_in_order),
    s!(epoll_many_few_hot).slow(),
    s!(epoll_max_events_fair),
    s!(epoll_mixed_kinds),
    s!(epoll_listener_and_connections),
    s!(epoll_kernel_events_while_hot),
    s!(epoll_data_kept),
    s!(epoll_across_fork).procs(),
    s!(epoll_added_before_upgrade),
    s!(epoll_edge_before_upgrade),
    s!(epoll_two_waiters),
    s!(epoll_number_reused),
];

const ALL: i16 = POLLIN | POLLPRI | POLLOUT | POLLRDHUP;

/// Takes a connection through its states and asks a probe in each.
fn walk(w: &World, probe: &mut dyn FnMut(&Conn) -> String) {
    let mut c = w.pair();
    log!("idle: {}", probe(&c));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("data: {}", probe(&c));
    log!("{}; less data: {}", c.get(5), probe(&c));
    log!("{}; empty: {}", c.get(5), probe(&c));
    let before = c.tx;
    log!("{}: {}", c.fill(), probe(&c));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("full with data: {}", probe(&c));
    let n = c.tx - before;
    log!("far all: {}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    c.settle(POLLOUT);
    log!("room again: {}", probe(&c));
    w.far(&c, "shutdown 1");
    c.settle(POLLRDHUP);
    log!("data and EOF: {}", probe(&c));
    log!("{}; EOF: {}", c.get(10), probe(&c));
    let _ = sys::shutdown(c.fd, libc::SHUT_WR);
    c.settle(POLLHUP);
    log!("both down: {}", probe(&c));

    let c = w.pair();
    let _ = sys::shutdown(c.fd, libc::SHUT_WR);
    log!("our end down: {}", probe(&c));
    w.far(&c, "shutdown 1");
    c.settle(POLLHUP);
    log!("both down: {}", probe(&c));

    let c = w.pair();
    let _ = sys::shutdown(c.fd, libc::SHUT_RD);
    log!("our reading end down: {}", probe(&c));

    let c = w.pair();
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("reset: {}", probe(&c));
    log!("{}; taken: {}", sys::so_error(c.fd), probe(&c));

    let c = w.pair();
    w.far(&c, "put 10");
    c.arrived(10);
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("reset with data: {}", probe(&c));
}

fn states_poll(w: &World) {
    walk(w, &mut |c| {
        let each: Vec<_> = [ALL, POLLIN, POLLOUT, POLLRDHUP, POLLIN | libc::POLLRDNORM | libc::POLLWRNORM]
            .iter()
            .map(|e| show_poll(sys::poll1(c.fd, *e, 0)))
            .collect();
        each.join(" ")
    });
}

fn states_ppoll(w: &World) {
    walk(w, &mut |c| {
        let mut p = [libc::pollfd { fd: c.fd, events: ALL, revents: 0 }];
        let r = sys::ppoll(&mut p, Duration::ZERO, None);
        format!("{} {}", show(r), show_poll(Ok(p[0].revents)))
    });
}

fn selected(fd: i32, p: bool) -> String {
    let (r, s) = sys::select1(fd, Duration::ZERO, p);
    format!("{} r{} w{} e{}", show(r), u8::from(s.read), u8::from(s.write), u8::from(s.except))
}

fn states_select(w: &World) {
    walk(w, &mut |c| selected(c.fd, false));
}

fn states_pselect(w: &World) {
    walk(w, &mut |c| selected(c.fd, true));
}

fn states_epoll(w: &World) {
    // One set per connection, made when it is first seen: it lives through all the states.
    let mut set = (-1, -1);
    walk(w, &mut |c| {
        if set.0 != c.fd {
            let ep = sys::epoll_create();
            sys::epoll_add(ep, c.fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI, 1);
            set = (c.fd, ep);
        }
        show_epoll(sys::epoll_wait(set.1, 8, 0))
    });
}

fn states_epoll_added_late(w: &World) {
    walk(w, &mut |c| {
        let ep = sys::epoll_create();
        let each: Vec<_> = [EPOLLIN, EPOLLOUT | EPOLLET, EPOLLRDHUP | EPOLLONESHOT]
            .iter()
            .map(|e| {
                sys::epoll_add(ep, c.fd, *e, 1);
                let r = show_epoll(sys::epoll_wait(ep, 8, 0));
                sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0).expect("DEL");
                r
            })
            .collect();
        let _ = sys::close(ep);
        each.join(" ")
    });
}

/// HUP and ERR come unasked.
fn states_nothing_asked(w: &World) {
    walk(w, &mut |c| {
        let ep = sys::epoll_create();
        sys::epoll_add(ep, c.fd, 0, 1);
        let r = show_epoll(sys::epoll_wait(ep, 8, 0));
        let _ = sys::close(ep);
        format!("{} {r}", show_poll(sys::poll1(c.fd, 0, 0)))
    });
}

fn poll_timeouts(w: &World) {
    let c = w.pair();
    for ms in [0, 1, 10, 100] {
        let (r, long) = sys::took_at_least(ms, || sys::poll1(c.fd, POLLIN, ms as i32));
        log!("poll {ms}: {} {long}", show_poll(r));
        let (r, long) = sys::took_at_least(ms, || sys::select_read(&[c.fd], Duration::from_millis(ms)).0);
        log!("select {ms}: {} {long}", show(r));
    }
    let (r, long) = sys::took_at_least(100, || sys::poll(&mut [], 100));
    log!("no fds: {} {long}", show(r));
}

fn poll_odd_entries(w: &World) {
    let (a, b) = (w.pair(), w.pair());
    w.far(&a, "put 1");
    a.arrived(1);
    let p = |fd, events| libc::pollfd { fd, events, revents: -1 };
    let closed = sys::pipe();
    closed.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
    let mut v = [
        p(-1, POLLIN),
        p(a.fd, POLLIN),
        p(closed[0], POLLIN),
        p(b.fd, POLLIN),
        p(a.fd, POLLOUT),
        p(!a.fd, 0),
    ];
    let r = sys::poll(&mut v, 1000);
    log!("{}: {:?}", show(r), v.map(|p| show_poll(Ok(p.revents))));
}

fn poll_many(w: &World) {
    let mut cs: Vec<_> = (0..40).map(|_| w.pair()).collect();
    for hot in [[3, 17, 39], [0, 1, 20]] {
        for h in hot {
            w.far(&cs[h], "put 5");
            cs[h].arrived(5);
        }
        let mut v: Vec<_> =
            cs.iter().map(|c| libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 }).collect();
        let r = sys::poll(&mut v, -1);
        let ready: Vec<_> = (0..cs.len()).filter(|i| v[*i].revents != 0).collect();
        log!("{} {ready:?}", show(r));
        for h in hot {
            log!("{}", cs[h].get(5));
        }
    }
}

fn poll_blocked_gets_data(w: &World) {
    let mut c = w.pair();
    for _ in 0..3 {
        w.start_far(&c, "delayput 10 60");
        log!("{}", show_poll(sys::poll1(c.fd, POLLIN | POLLRDHUP, -1)));
        w.finish();
        log!("{}", c.get(10));
    }
}

fn poll_blocked_gets_room(w: &World) {
    let mut c = w.pair();
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    w.start_far(&c, &format!("slowget {n} 200000 1"));
    log!("{}", show_poll(sys::poll1(c.fd, POLLOUT, -1)));
    log!("{}", w.finish() == format!("got {n}"));
    w.still_good(&mut c);
}

fn poll_blocked_gets_eof(w: &World) {
    let c = w.pair();
    w.start_far(&c, "delayclose 60");
    log!("{}", show_poll(sys::poll1(c.fd, POLLIN | POLLRDHUP, -1)));
    w.finish();
}

fn poll_blocked_gets_reset(w: &World) {
    let c = w.pair();
    w.far(&c, "linger 0");
    w.start_far(&c, "delayclose 60");
    log!("{}", show_poll(sys::poll1(c.fd, POLLIN | POLLRDHUP, -1)));
    w.finish();
}

fn ppoll_nanoseconds(w: &World) {
    let c = w.pair();
    let mut p = [libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 }];
    for us in [1, 500, 20_000] {
        let t = std::time::Instant::now();
        let r = sys::ppoll(&mut p, Duration::from_micros(us), None);
        log!("{us}: {} {}", show(r), t.elapsed() >= Duration::from_micros(us));
    }
}

fn select_many(w: &World) {
    let mut cs: Vec<_> = (0..20).map(|_| w.pair()).collect();
    let fds: Vec<_> = cs.iter().map(|c| c.fd).collect();
    for hot in [2, 19, 7] {
        w.far(&cs[hot], "put 5");
        cs[hot].arrived(5);
        let (r, ready, _) = sys::select_read(&fds, Duration::from_secs(20));
        log!("{} {}", show(r), ready == [fds[hot]]);
        log!("{}", cs[hot].get(5));
    }
}

fn select_time_left(w: &World) {
    let c = w.pair();
    w.start_far(&c, "delayput 1 50");
    let (r, _, left) = sys::select_read(&[c.fd], Duration::from_secs(30));
    log!(
        "{} left less: {} but some: {}",
        show(r),
        left < Duration::from_millis(29_990),
        left > Duration::ZERO
    );
    w.finish();
}

fn select_blocked_gets_data(w: &World) {
    let mut c = w.pair();
    for _ in 0..3 {
        w.start_far(&c, "delayput 10 60");
        let (r, ready, _) = sys::select_read(&[c.fd], Duration::from_secs(30));
        log!("{} {}", show(r), ready == [c.fd]);
        w.finish();
        log!("{}", c.get(10));
    }
}

/// A set with one member.
fn set(c: &Conn, events: i32) -> i32 {
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, events, 1);
    ep
}

/// What the set says right now.
fn now(ep: i32) -> String {
    show_epoll(sys::epoll_wait(ep, 64, 0))
}

/// What it says within 10 s.
fn soon(ep: i32) -> String {
    show_epoll(sys::epoll_wait(ep, 64, 10_000))
}

fn epoll_level_repeats(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    log!("{}", now(ep));
    w.far(&c, "put 10");
    for _ in 0..3 {
        log!("{}", soon(ep));
    }
    log!("{} {}", c.get(9), now(ep));
    log!("{} {}", c.get(1), now(ep));
    w.far(&c, "put 10");
    log!("{}", soon(ep));
}

fn epoll_edge(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLET);
    log!("{}", now(ep));
    for i in 0..5 {
        w.far(&c, "put 10");
        log!("{i}: {} then {}", soon(ep), now(ep));
        log!("{} {}", c.get(10), now(ep));
    }
    // Unread data, then more: a new edge.
    w.far(&c, "put 10");
    log!("{} {}", soon(ep), now(ep));
    w.far(&c, "put 10");
    log!("{} {}", soon(ep), now(ep));
    log!("{} {}", c.get(20), now(ep));
}

fn epoll_edge_partial_read(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLET);
    w.far(&c, "put 100");
    log!("{}", soon(ep));
    log!("{} {}", c.get(40), now(ep));
    sys::sleep_ms(20);
    log!("{} {}", c.get(40), now(ep));
    w.far(&c, "put 1");
    log!("{} {}", soon(ep), c.get(21));
    log!("{}", now(ep));
}

fn epoll_edge_out(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLOUT | EPOLLET);
    log!("added {} then {}", now(ep), now(ep));
    log!("{}", c.put(10));
    w.far(&c, "get 10");
    log!("a small write is no edge: {}", now(ep));
    let n = c.tx;
    log!("{} {}", c.fill(), now(ep));
    let n = c.tx - n;
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    log!("room: {}", soon(ep));
    w.still_good(&mut c);
}

fn epoll_edge_eof(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLRDHUP | EPOLLET);
    w.far(&c, "put 5");
    log!("{}", soon(ep));
    w.far(&c, "shutdown 1");
    log!("{} then {}", soon(ep), now(ep));
    log!("{} {}", c.drain(), now(ep));
}

fn epoll_oneshot(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLONESHOT);
    w.far(&c, "put 10");
    log!("{} then {}", soon(ep), now(ep));
    w.far(&c, "put 10");
    c.arrived(20);
    log!("disarmed {}", now(ep));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, (EPOLLIN | EPOLLONESHOT) as u32, 2)));
    log!("armed {} then {}", soon(ep), now(ep));
    log!("{}", c.get(20));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, (EPOLLIN | EPOLLONESHOT) as u32, 3)));
    log!("nothing {}", now(ep));
    w.start_far(&c, "delayput 10 50");
    log!("{} then {}", soon(ep), now(ep));
    w.finish();
}

fn epoll_oneshot_edge_out(w: &World) {
    let mut c = w.pair();
    let flags = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLONESHOT;
    let ep = set(&c, flags);
    for i in 2..6 {
        log!("{} then {}", soon(ep), now(ep));
        w.far(&c, "put 10");
        c.arrived(10);
        log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, flags as u32, i)));
        log!("{} then {}", soon(ep), now(ep));
        log!("{}", c.get(10));
        log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, flags as u32, i)));
    }
}

fn epoll_rdhup(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLRDHUP);
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", now(ep));
    w.far(&c, "shutdown 1");
    log!("{}", soon(ep));
    log!("{} {}", c.drain(), now(ep));
}

fn epoll_pri(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLPRI);
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", now(ep));
    w.far(&c, "oob 7");
    log!("{}", soon(ep));
    let mut b = [0; 1];
    log!("{} {}", show(sys::recv(c.fd, &mut b, libc::MSG_OOB)), b[0]);
    log!("{}", c.get(10));
}

fn epoll_mod(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let change = |events: i32, data| show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, events as u32, data));
    log!("{} {} {}", now(ep), change(EPOLLOUT, 7), now(ep));
    log!("{} {}", change(EPOLLIN | EPOLLOUT, 8), now(ep));
    log!("{} {}", change(0, 9), now(ep));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", now(ep));
    log!("{} {}", change(EPOLLIN, 10), now(ep));
    log!("{}", c.get(10));
    log!("{}", now(ep));
}

fn epoll_mod_rearms_edge(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLET);
    w.far(&c, "put 10");
    log!("{} {}", soon(ep), now(ep));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, (EPOLLIN | EPOLLET) as u32, 2)));
    log!("{} {}", now(ep), now(ep));
    log!("{}", c.get(10));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, (EPOLLIN | EPOLLET) as u32, 3)));
    log!("{}", now(ep));
}

fn epoll_del(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    w.far(&c, "put 10");
    log!("{}", soon(ep));
    log!("{} {}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0)), now(ep));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0)));
    log!("{} {}", show(sys::epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, EPOLLIN as u32, 5)), now(ep));
    log!("{}", c.get(10));
    log!("{}", now(ep));
}

fn epoll_errors(w: &World) {
    let c = w.pair();
    let ep = set(&c, EPOLLIN);
    let ctl = |op, fd| show(sys::epoll_ctl(ep, op, fd, EPOLLIN as u32, 1));
    log!("added twice {}", ctl(EPOLL_CTL_ADD, c.fd));
    let other = w.pair();
    log!("absent {} {}", ctl(EPOLL_CTL_MOD, other.fd), ctl(EPOLL_CTL_DEL, other.fd));
    log!("bad fd {} {} {}", ctl(EPOLL_CTL_ADD, 9999), ctl(EPOLL_CTL_MOD, 9999), ctl(EPOLL_CTL_DEL, 9999));
    log!("itself {}", ctl(EPOLL_CTL_ADD, ep));
    log!("bad op {}", ctl(77, c.fd));
    log!("no set {}", show(sys::epoll_ctl(c.fd, EPOLL_CTL_ADD, other.fd, EPOLLIN as u32, 1)));
    log!("not an fd {}", show(sys::epoll_ctl(9999, EPOLL_CTL_ADD, other.fd, EPOLLIN as u32, 1)));
    let f = std::fs::File::open("/proc/self/exe").expect("open");
    log!("a file {}", ctl(EPOLL_CTL_ADD, std::os::fd::AsRawFd::as_raw_fd(&f)));
    log!("no room {}", show_epoll(sys::epoll_wait(ep, 0, 0)));
    log!("wait on a socket {}", show_epoll(sys::epoll_wait(c.fd, 1, 0)));
    log!("wait on nothing {}", show_epoll(sys::epoll_wait(9999, 1, 0)));
    log!("read a set {}", show(sys::read(ep, &mut [0; 8])));
}

fn epoll_exclusive(w: &World) {
    let mut c = w.pair();
    let (a, b) = (set(&c, EPOLLIN | EPOLLEXCLUSIVE), set(&c, EPOLLIN | EPOLLEXCLUSIVE));
    log!("MOD {}", show(sys::epoll_ctl(a, EPOLL_CTL_MOD, c.fd, EPOLLIN as u32, 1)));
    w.far(&c, "put 10");
    c.arrived(10);
    // One of them or both, says Linux; never none, and nothing but this event.
    let (x, y) = (now(a), now(b));
    log!(
        "{}",
        [&x, &y].contains(&&"1:IN".to_string()) && [&x, &y].iter().all(|e| *e == "1:IN" || *e == "none")
    );
    log!("{}", c.get(10));
    log!("{} {}", now(a), now(b));
}

fn epoll_timeouts(w: &World) {
    let c = w.pair();
    let ep = set(&c, EPOLLIN);
    for ms in [0, 1, 10, 100] {
        let (r, long) = sys::took_at_least(ms, || sys::epoll_wait(ep, 8, ms as i32));
        log!("{ms}: {} {long}", show_epoll(r));
    }
    let ep = sys::epoll_create();
    let (r, long) = sys::took_at_least(50, || sys::epoll_wait(ep, 8, 50));
    log!("an empty set: {} {long}", show_epoll(r));
}

fn epoll_blocked_gets_data(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLRDHUP);
    for _ in 0..3 {
        w.start_far(&c, "delayput 10 60");
        log!("{}", show_epoll(sys::epoll_wait(ep, 8, -1)));
        w.finish();
        log!("{}", c.get(10));
    }
    w.start_far(&c, "delayclose 60");
    log!("{}", show_epoll(sys::epoll_wait(ep, 8, -1)));
    w.finish();
}

fn epoll_blocked_gets_room(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLOUT);
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    log!("{}", now(ep));
    w.start_far(&c, &format!("slowget {n} 200000 1"));
    log!("{}", show_epoll(sys::epoll_wait(ep, 8, -1)));
    log!("{}", w.finish() == format!("got {n}"));
    w.still_good(&mut c);
}

fn epoll_blocked_then_added(w: &World) {
    let c = w.pair();
    let ep = sys::epoll_create();
    w.far(&c, "put 1");
    c.arrived(1);
    let fd = c.fd;
    let t = later(60, move || sys::epoll_add(ep, fd, EPOLLIN, 4));
    log!("{}", show_epoll(sys::epoll_wait(ep, 8, -1)));
    t.join().expect("no panic");
}

fn epoll_blocked_then_mod(w: &World) {
    let c = w.pair();
    let ep = set(&c, EPOLLIN);
    let fd = c.fd;
    let t = later(60, move || sys::epoll_ctl(ep, EPOLL_CTL_MOD, fd, EPOLLOUT as u32, 4));
    log!("{}", show_epoll(sys::epoll_wait(ep, 8, -1)));
    log!("{}", show(t.join().expect("no panic")));
}

fn epoll_blocked_then_del(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let fd = c.fd;
    let done = std::thread::scope(|s| {
        let t = s.spawn(|| {
            sys::sleep_ms(50);
            let r = sys::epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0, 0);
            sys::sleep_ms(50);
            format!("{} {}", show(r), w.far(&c, "put 10"))
        });
        log!("deleted before the data came: {}", show_epoll(sys::epoll_wait(ep, 8, 400)));
        t.join().expect("no panic")
    });
    log!("{done}");
    log!("{}", c.get(10));
}

fn epoll_nested(w: &World) {
    let mut c = w.pair();
    let inner = set(&c, EPOLLIN);
    let outer = sys::epoll_create();
    sys::epoll_add(outer, inner, EPOLLIN, 9);
    log!("{} {}", now(outer), now(inner));
    w.far(&c, "put 10");
    log!("{} {}", soon(outer), soon(inner));
    log!("{}", c.get(10));
    log!("{} {}", now(outer), now(inner));
    log!("a loop {}", show(sys::epoll_ctl(inner, EPOLL_CTL_ADD, outer, EPOLLIN as u32, 1)));
}

fn epoll_nested_blocked(w: &World) {
    let mut c = w.pair();
    let inner = set(&c, EPOLLIN);
    let outer = sys::epoll_create();
    sys::epoll_add(outer, inner, EPOLLIN, 9);
    for _ in 0..3 {
        w.start_far(&c, "delayput 10 60");
        log!("{}", show_epoll(sys::epoll_wait(outer, 8, -1)));
        w.finish();
        log!("{}", c.get(10));
    }
}

fn epoll_in_poll(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    log!("{}", show_poll(sys::poll1(ep, POLLIN | POLLOUT, 0)));
    w.far(&c, "put 10");
    log!("{}", show_poll(sys::poll1(ep, POLLIN | POLLOUT, 10_000)));
    log!("{}", c.get(10));
    log!("{}", show_poll(sys::poll1(ep, POLLIN | POLLOUT, 0)));
}

fn epoll_in_select(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    log!("{}", selected(ep, false));
    w.start_far(&c, "delayput 10 50");
    let (r, ready, _) = sys::select_read(&[ep], Duration::from_secs(20));
    log!("{} {}", show(r), ready == [ep]);
    w.finish();
    log!("{}", c.get(10));
    log!("{}", selected(ep, true));
}

fn epoll_in_poll_blocked(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLET);
    for _ in 0..3 {
        w.start_far(&c, "delayput 10 60");
        log!("{}", show_poll(sys::poll1(ep, POLLIN, -1)));
        log!("{} {}", soon(ep), show_poll(sys::poll1(ep, POLLIN, 0)));
        w.finish();
        log!("{}", c.get(10));
    }
}

/// The peer sends on a connection that has been silent, and then on a busy one: of these two the first is told of no
/// later.
fn epoll_in_order(w: &World) {
    const ROUNDS: usize = 40;
    const BUSY: usize = 90;
    let (mut a, mut b) = (w.pair(), w.pair());
    // Or TCP may hold back the second byte until the first is acknowledged.
    w.far(&a, &format!("setopt {} {} 1", libc::IPPROTO_TCP, libc::TCP_NODELAY));
    let ep = sys::epoll_create();
    sys::epoll_add(ep, a.fd, EPOLLIN, 1);
    sys::epoll_add(ep, b.fd, EPOLLIN, 2);
    w.start(&format!("ordered {} {} {ROUNDS} {BUSY}", a.far, b.far));
    let (mut of_a, mut of_b, mut odd) = (0, 0, 0);
    while of_b < ROUNDS * (BUSY + 1) {
        let told = sys::epoll_wait(ep, 8, 20_000).expect("events");
        if told.is_empty() {
            log!("nothing came after {of_a} and {of_b}");
            break;
        }
        if told.iter().any(|e| e.0 == 1) {
            of_a += usize::from(a.get(1) == "got 1");
        }
        if told.iter().any(|e| e.0 == 2) {
            of_b += usize::from(b.get(1) == "got 1");
            // This one was sent after the other's.
            odd += usize::from(of_a < of_b / (BUSY + 1));
            b.put(1);
        }
    }
    log!("{of_a} {of_b} {}, out of order {odd}", w.finish());
}

fn epoll_two_sets(w: &World) {
    let mut c = w.pair();
    let (a, b) = (set(&c, EPOLLIN), set(&c, EPOLLIN | EPOLLOUT));
    w.far(&c, "put 10");
    log!("{} {}", soon(a), soon(b));
    log!("{}", c.get(10));
    log!("{} {}", now(a), now(b));
    log!("{}", show(sys::close(a)));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", soon(b));
    log!("{}", show(sys::close(b)));
    w.still_good(&mut Conn {
        end: {
            let mut e = c.end;
            log!("{}", e.get(10));
            e
        },
        far: c.far,
    });
}

fn epoll_two_sets_edge(w: &World) {
    let mut c = w.pair();
    let (a, b) = (set(&c, EPOLLIN | EPOLLET), set(&c, EPOLLIN | EPOLLET));
    for _ in 0..3 {
        w.far(&c, "put 10");
        log!("{} {}", soon(a), now(a));
        log!("{} {}", soon(b), now(b));
        log!("{}", c.get(10));
    }
}

fn epoll_same_socket_by_dup(w: &World) {
    let mut c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    let ep = set(&c, EPOLLIN);
    sys::epoll_add(ep, d, EPOLLIN, 2);
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", soon(ep));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, d, 0, 0)));
    log!("{} {}", soon(ep), c.get(10));
    log!("{}", now(ep));
}

fn epoll_close_removes(w: &World) {
    let (c, mut d) = (w.pair(), w.pair());
    let ep = set(&c, EPOLLIN);
    sys::epoll_add(ep, d.fd, EPOLLIN, 2);
    w.far(&c, "put 10");
    log!("{}", soon(ep));
    log!("{} {}", show(sys::close(c.fd)), now(ep));
    w.far(&d, "put 10");
    log!("{} {}", soon(ep), d.get(10));
}

fn epoll_close_with_dup_stays(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let d = sys::dup(c.fd).expect("dup") as i32;
    log!("{}", show(sys::close(c.fd)));
    w.far(&c, "put 10");
    log!("the open socket is still a member: {}", soon(ep));
    log!("not by its old number: {}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0)));
    c.fd = d;
    log!("{} {}", c.get(10), now(ep));
    log!("{}", show(sys::close(d)));
    log!("{}", now(ep));
}

fn epoll_dup2_over_member(w: &World) {
    let (c, mut d) = (w.pair(), w.pair());
    let ep = set(&c, EPOLLIN);
    log!("{}", sys::dup2(d.fd, c.fd) == Ok(i64::from(c.fd)));
    w.far(&d, "put 10");
    d.arrived(10);
    log!("the new socket is no member: {}", now(ep));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, EPOLLIN as u32, 6)));
    log!("{} {}", soon(ep), d.get(10));
    log!("far end of the old: {}", w.far(&c, "drain"));
}

fn epoll_many_few_hot(w: &World) {
    let ep = sys::epoll_create();
    let mut cs = Vec::new();
    for i in 0..300 {
        let mut c = w.cold_on("4");
        w.warm(&mut c, 30);
        sys::epoll_add(ep, c.fd, EPOLLIN, i);
        cs.push(c);
    }
    log!("{}", now(ep));
    for round in 0..50usize {
        let hot = [round * 7 % 300, (round * 7 + 100) % 300, 299];
        for h in hot {
            w.far(&cs[h], "put 10");
        }
        let mut seen = Vec::new();
        while seen.len() < 3 {
            for (i, e) in sys::epoll_wait(ep, 64, 10_000).expect("events") {
                if e != EPOLLIN as u32 {
                    log!("{i}: {}", sys::events(e));
                }
                let r = cs[i as usize].get(10);
                if r != "got 10" {
                    log!("{r}");
                }
                seen.push(i as usize);
            }
        }
        seen.sort_unstable();
        let mut want = hot.to_vec();
        want.sort_unstable();
        if seen != want {
            log!("round {round}: {seen:?} instead of {want:?}");
        }
    }
    log!("{}", now(ep));
}

fn epoll_max_events_fair(w: &World) {
    let cs: Vec<_> = (0..5).map(|_| w.pair()).collect();
    let ep = sys::epoll_create();
    for (i, c) in cs.iter().enumerate() {
        sys::epoll_add(ep, c.fd, EPOLLIN, i as u64);
    }
    for c in &cs {
        w.far(c, "put 10");
        c.arrived(10);
    }
    // All stay ready; one is given at a time: everybody's turn comes.
    let mut seen = [0; 5];
    for _ in 0..40 {
        for (i, _) in sys::epoll_wait(ep, 1, 1000).expect("events") {
            seen[i as usize] += 1;
        }
    }
    log!("every one: {}", seen.iter().all(|n| *n > 0));
}

fn epoll_mixed_kinds(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let p = sys::pipe();
    // SAFETY: no pointers.
    let (ev, timer) =
        unsafe { (libc::eventfd(0, libc::EFD_CLOEXEC), libc::timerfd_create(libc::CLOCK_MONOTONIC, 0)) };
    sys::epoll_add(ep, p[0], EPOLLIN, 2);
    sys::epoll_add(ep, ev, EPOLLIN, 3);
    sys::epoll_add(ep, timer, EPOLLIN, 4);
    log!("{}", now(ep));
    let one = 1u64.to_ne_bytes();
    let mut b = [0; 8];
    log!("{}", show(sys::write(ev, &one)));
    log!("{}", soon(ep));
    log!("{}", show(sys::write(p[1], b"x")));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", soon(ep));
    log!("{} {}", show(sys::read(ev, &mut b)), c.get(10));
    log!("{} {}", soon(ep), show(sys::read(p[0], &mut b)));
    let t = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec { tv_sec: 0, tv_nsec: 30_000_000 },
    };
    // SAFETY: a live time, no old value wanted.
    let r = unsafe { libc::timerfd_settime(timer, 0, &t, std::ptr::null_mut()) };
    log!("{r} {}", soon(ep));
    log!("{} {}", show(sys::read(timer, &mut b)), now(ep));
    let mut v = [c.fd, p[0], ev, timer].map(|fd| libc::pollfd { fd, events: POLLIN, revents: 0 });
    w.start_far(&c, "delayput 1 30");
    let r = sys::poll(&mut v, -1);
    log!("{} {:?} {}", show(r), v.map(|p| show_poll(Ok(p.revents))), w.finish());
}

fn epoll_listener_and_connections(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let (l, port) = listener(&crate::world::address("4", 0), 10);
    sys::epoll_add(ep, l, EPOLLIN, 2);
    log!("{}", now(ep));
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    log!("{}", soon(ep));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{}", soon(ep));
    let fd = sys::accept(l, None).expect("accept") as i32;
    let mut d = Conn { end: crate::world::End::new(fd), far };
    sys::epoll_add(ep, d.fd, EPOLLIN, 3);
    log!("{} {}", soon(ep), c.get(10));
    w.warm(&mut d, 200);
    w.far(&d, "put 10");
    log!("{} {}", soon(ep), d.get(10));
    log!("{}", now(ep));
}

/// A connection that is always ready does not starve the rest of the set.
fn epoll_kernel_events_while_hot(w: &World) {
    let c = w.pair();
    let ep = set(&c, EPOLLIN);
    w.far(&c, "put 10");
    c.arrived(10);
    let p = sys::pipe();
    sys::epoll_add(ep, p[0], EPOLLIN, 2);
    let t = later(20, move || sys::write(p[1], b"x"));
    let mut seen = false;
    for _ in 0..1_000_000 {
        seen = sys::epoll_wait(ep, 8, -1).expect("events").iter().any(|e| e.0 == 2);
        if seen {
            break;
        }
    }
    log!("{seen} {}", show(t.join().expect("no panic")));
}

fn epoll_data_kept(w: &World) {
    let cs = [w.pair(), w.pair()];
    let ep = sys::epoll_create();
    sys::epoll_add(ep, cs[0].fd, EPOLLIN, u64::MAX);
    sys::epoll_add(ep, cs[1].fd, EPOLLIN, 0x8000_0000_0000_0001);
    for c in &cs {
        w.far(c, "put 1");
        c.arrived(1);
    }
    log!("{}", soon(ep));
}

fn epoll_across_fork(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN);
    let mut end = c.end;
    let pid = sys::fork(|| {
        log!("child {}", soon(ep));
        log!("child {}", end.get(10));
        log!("child {}", now(ep));
        0
    });
    w.far(&c, "put 10");
    log!("{}", sys::wait(pid));
    c.rx += 10;
    log!("{}", now(ep));
    w.far(&c, "put 10");
    log!("{}", soon(ep));
    log!("{}", c.get(10));
}

/// Added while on TCP; the set keeps working when the stream moves.
fn epoll_added_before_upgrade(w: &World) {
    let mut c = w.cold_on("4");
    let ep = set(&c, EPOLLIN);
    for i in 0..300 {
        w.far(&c, "put 1");
        let (r, g, n) = (soon(ep), c.get(1), now(ep));
        if (r.as_str(), g.as_str(), n.as_str()) != ("1:IN", "got 1", "none") {
            log!("{i}: {r} {g} {n}");
        }
        c.put(1);
        w.far(&c, "get 1");
    }
    w.start_far(&c, "delayclose 30");
    log!("{} {}", show_epoll(sys::epoll_wait(ep, 8, -1)), w.finish());
}

fn epoll_edge_before_upgrade(w: &World) {
    let mut c = w.cold_on("4");
    let ep = set(&c, EPOLLIN | EPOLLET);
    for i in 0..300 {
        w.far(&c, "put 3");
        let (r, n, g) = (soon(ep), now(ep), c.get(3));
        if (r.as_str(), n.as_str(), g.as_str()) != ("1:IN", "none", "got 3") {
            log!("{i}: {r} {n} {g}");
        }
        c.put(1);
        w.far(&c, "get 1");
    }
    log!("done");
}

fn epoll_two_waiters(w: &World) {
    let mut c = w.pair();
    let ep = set(&c, EPOLLIN | EPOLLONESHOT);
    // Of two waiters exactly one gets a one-shot event; then the other gets the next.
    let ts = [0, 1].map(|_| later(0, move || show_epoll(sys::epoll_wait(ep, 8, 20_000))));
    sys::sleep_ms(60);
    w.far(&c, "put 10");
    // One comes back, however busy the machine; another would come soon after.
    while ts.iter().all(|t| !t.is_finished()) {
        sys::sleep_ms(5);
    }
    sys::sleep_ms(60);
    let done = ts.iter().filter(|t| t.is_finished()).count();
    log!("{done}");
    log!("{}", c.get(10));
    log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, (EPOLLIN | EPOLLONESHOT) as u32, 2)));
    w.far(&c, "put 10");
    let mut all: Vec<_> = ts.into_iter().map(|t| t.join().expect("no panic")).collect();
    all.sort_unstable();
    log!("{all:?}");
}

/// A closed member's number goes to a new connection, in the same set.
fn epoll_number_reused(w: &World) {
    let ep = sys::epoll_create();
    for i in 0..20 {
        let mut c = w.cold_on("4");
        sys::epoll_add(ep, c.fd, EPOLLIN | EPOLLET, i);
        w.warm(&mut c, 60);
        w.far(&c, "put 5");
        c.arrived(5);
        log!("{} {}", c.get(5), show(sys::close(c.fd)));
        log!("{}", now(ep));
        w.far(&c, "close");
    }
}
