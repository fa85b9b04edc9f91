//! How a connection ends: shutdown in every order, EOF, RST, SO_LINGER, SIGPIPE, and the death of the peer.

use crate::{
    Scenario, log, s,
    sys::{self, show},
    world::{Conn, World, block, later, settle},
};
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(shutdown_wr),
    s!(shutdown_rd),
    s!(shutdown_rdwr),
    s!(shutdown_wr_then_rd),
    s!(shutdown_rd_then_wr),
    s!(shutdown_twice),
    s!(shutdown_after_peer),
    s!(shutdown_rd_with_data),
    s!(half_close_echo),
    s!(half_close_then_far_writes),
    s!(eof_after_data),
    s!(eof_again_and_again),
    s!(peer_closes_then_write),
    s!(close_with_unread_data),
    s!(far_closes_with_unread_data),
    s!(far_closes_with_unread_data_after_sending),
    s!(linger_zero),
    s!(far_linger_zero),
    s!(far_linger_zero_after_data),
    s!(linger_seconds),
    s!(close_with_unsent_data),
    s!(close_with_a_small_buffer_and_much_unread).procs().not_tiny(),
    s!(shutdown_with_unsent_data),
    s!(simultaneous_close),
    s!(so_error_clears),
    s!(write_error_forms),
    s!(sigpipe_is_sent),
    s!(sigpipe_kills),
    s!(blocked_read_gets_eof),
    s!(blocked_read_gets_reset),
    s!(blocked_write_gets_reset),
    s!(reset_from_outside),
    s!(peer_dies).procs(),
    s!(peer_dies_after_sending).procs(),
    s!(peer_dies_with_unread_data).procs(),
    s!(peer_dies_with_unread_data_in_many).procs(),
    s!(peer_dies_under_blocked_calls).procs(),
    s!(peer_dies_unlooked_for).procs(),
    s!(peer_killed_with_unread_data_in_many).procs(),
    s!(peer_killed_with_bytes_in_tcp).procs(),
    s!(peer_killed_under_blocked_calls).procs(),
    s!(peer_killed_and_small_sends).procs(),
    s!(peer_killed_and_its_socket_held).procs(),
    s!(peer_killed_and_the_rest_held).procs(),
    // Not where our stream has left the ring before: then nobody listens to the doorbell, and TCP has had its FIN.
    s!(peer_killed_after_shutdown_wr).procs().unforced(),
    s!(peer_killed_after_our_shutdown_wr).procs(),
    s!(peer_killed_behind_its_rings).procs().unforced(),
    s!(half_closed_peer_lives_with_unread_data),
    s!(half_closed_peer_closes_with_unread_data),
    s!(both_shut_with_unread_data),
    s!(peer_dies_while_we_write).procs(),
    s!(many_open_and_close).slow(),
    s!(connection_after_connection).slow(),
    s!(send_times_out_at_a_peer_that_has_shut),
    s!(send_sleeps_at_a_peer_that_has_shut),
];

const ALL: i16 = POLLIN | POLLOUT | POLLRDHUP;

fn state(c: &Conn) -> String {
    sys::show_poll(sys::poll1(c.fd, ALL, 0))
}

fn read1(c: &Conn) -> String {
    show(sys::recv(c.fd, &mut [0; 10], libc::MSG_DONTWAIT))
}

fn send1(c: &Conn) -> String {
    show(sys::send(c.fd, b"x", libc::MSG_NOSIGNAL))
}

fn shutdown_wr(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(100));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("{} send {}", state(&c), send1(&c));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "put 5000"));
    log!("{}", c.get(5000));
    log!("far {}", w.far(&c, "close"));
    c.settle(POLLHUP);
    log!("{} read {}", state(&c), read1(&c));
    log!("{}", sys::so_error(c.fd));
}

fn shutdown_rd(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_RD)));
    log!("{} read {}", state(&c), read1(&c));
    log!("{}", c.put(100));
    log!("far {}", w.far(&c, "get 100"));
    // Linux still takes what comes after SHUT_RD.
    log!("far {}", w.far(&c, "put 10"));
    c.arrived(10);
    log!("{}", c.get(10));
    log!("read {}", read1(&c));
    log!("far {}", w.far(&c, "put 10"));
}

fn shutdown_rdwr(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(10));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_RDWR)));
    log!("{} read {} send {}", state(&c), read1(&c), send1(&c));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "close"));
    c.settle(POLLHUP);
    log!("{} read {}", state(&c), read1(&c));
}

fn shutdown_wr_then_rd(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("{}", state(&c));
    log!("far {}", w.far(&c, "put 10"));
    log!("{}", c.get(10));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_RD)));
    log!("{} read {} send {}", state(&c), read1(&c), send1(&c));
    log!("far {}", w.far(&c, "drain"));
}

fn shutdown_rd_then_wr(w: &World) {
    let c = w.pair();
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_RD)));
    log!("{}", state(&c));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("{} read {} send {}", state(&c), read1(&c), send1(&c));
    log!("far {}", w.far(&c, "drain"));
}

fn shutdown_twice(w: &World) {
    let c = w.pair();
    log!("bad {}", show(sys::shutdown(c.fd, 7)));
    for how in [libc::SHUT_WR, libc::SHUT_WR, libc::SHUT_RD, libc::SHUT_RD, libc::SHUT_RDWR] {
        log!("{how}: {}", show(sys::shutdown(c.fd, how)));
    }
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "shutdown 1"));
    c.settle(POLLHUP);
    // Both directions are done: the socket is in TIME_WAIT or closed.
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
}

fn shutdown_after_peer(w: &World) {
    let mut c = w.pair();
    log!("far {}", w.far(&c, "put 10"));
    log!("far {}", w.far(&c, "shutdown 1"));
    c.settle(POLLRDHUP);
    log!("{}", state(&c));
    log!("{}", c.drain());
    log!("{}", state(&c));
    log!("{}", c.put(1000));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("far {}", w.far(&c, "drain"));
    c.settle(POLLHUP);
    log!("{}", state(&c));
    log!("send {} read {}", send1(&c), read1(&c));
    log!("close {}", show(sys::close(c.fd)));
}

fn shutdown_rd_with_data(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_RD)));
    log!("{}", state(&c));
    log!("{}", c.drain());
    log!("{}", read1(&c));
}

fn half_close_echo(w: &World) {
    let mut c = w.pair();
    w.start_far(&c, "echo");
    c.rx = c.tx;
    log!("{}", c.put(10_000));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("{}", c.drain());
    log!("far {}", w.finish());
    log!("{}", state(&c));
}

fn half_close_then_far_writes(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    w.start_far(&c, "put 3000000");
    log!("{}", c.get(3_000_000));
    log!("far {}", w.finish());
    w.far(&c, "close");
    log!("{}", c.drain());
}

fn eof_after_data(w: &World) {
    let mut c = w.pair();
    w.start_far(&c, "put 100000");
    c.settle(POLLIN);
    sys::sleep_ms(50);
    log!("{}", c.get(50_000));
    log!("far {}", { c.get(50_000) + " " + &w.finish() });
    w.far(&c, "put 5000");
    log!("far {}", w.far(&c, "close"));
    log!("{}", c.drain());
    log!("{}", state(&c));
}

fn eof_again_and_again(w: &World) {
    let c = w.pair();
    w.far(&c, "shutdown 1");
    c.settle(POLLRDHUP);
    for _ in 0..3 {
        log!("{} {} {}", show(sys::read(c.fd, &mut [0; 5])), read1(&c), state(&c));
    }
}

fn peer_closes_then_write(w: &World) {
    let c = w.pair();
    log!("far {}", w.far(&c, "close"));
    c.settle(POLLRDHUP);
    log!("{}", state(&c));
    log!("first send {}", send1(&c));
    c.settle(POLLHUP);
    log!("{}", state(&c));
    log!("second send {}", send1(&c));
    log!("read {} error {}", read1(&c), sys::so_error(c.fd));
    log!("third send {}", send1(&c));
    log!("shutdown {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
}

fn close_with_unread_data(w: &World) {
    let c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    log!("close {}", show(sys::close(c.fd)));
    log!("far {}", w.far(&c, &format!("settle {}", POLLHUP)));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "put 1"));
}

fn far_closes_with_unread_data(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(100));
    w.far(&c, "arrived 100");
    w.far(&c, "close");
    c.settle(POLLHUP);
    log!("{}", state(&c));
    log!("{}", c.drain());
    log!("{}", c.drain());
    log!("send {}", send1(&c));
}

fn far_closes_with_unread_data_after_sending(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(100));
    w.far(&c, "arrived 100");
    w.far(&c, "put 50");
    c.arrived(50);
    w.far(&c, "close");
    c.settle(POLLHUP);
    log!("{}", state(&c));
    log!("{}", c.drain());
    log!("{}", c.drain());
}

fn linger_zero(w: &World) {
    let c = w.pair();
    log!("{} {:?}", show(sys::set_linger(c.fd, true, 0)), sys::get_linger(c.fd));
    log!("close {}", show(sys::close(c.fd)));
    log!("far {}", w.far(&c, &format!("settle {}", POLLHUP)));
    log!("far {}", w.far(&c, &format!("poll {ALL} 0")));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "drain"));
    log!("far {}", w.far(&c, "put 1"));
}

fn far_linger_zero(w: &World) {
    let mut c = w.pair();
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("{}", state(&c));
    log!("{}", c.put(1));
    log!("{}", c.put(1));
    log!("{}", c.drain());
}

fn far_linger_zero_after_data(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("{}", state(&c));
    log!("{}", c.drain());
    log!("{}", c.drain());
}

fn linger_seconds(w: &World) {
    let mut c = w.pair();
    log!("{} {:?}", show(sys::set_linger(c.fd, true, 20)), sys::get_linger(c.fd));
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    w.start_far(&c, "drain");
    log!("close {}", show(sys::close(c.fd)));
    log!("far all {}", w.finish() == format!("EOF after {n}"));
}

fn close_with_unsent_data(w: &World) {
    let mut c = w.pair();
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    log!("close {}", show(sys::close(c.fd)));
    sys::sleep_ms(50);
    log!("far all {}", w.far(&c, "drain") == format!("EOF after {n}"));
}

/// All of it is the kernel's to deliver, however long nobody reads.
fn close_with_a_small_buffer_and_much_unread(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 200000");
    w.far(&c, &format!("setopt {} {} 8192", libc::SOL_SOCKET, libc::SO_SNDBUF));
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 8192)));
    // For programs that it starts: what is unread is to come by TCP.
    log!("{}", show(sys::dup2(c.fd, 0)));
    log!("{}", w.far(&c, "close"));
    log!("{} {}", c.get(200_000), c.get(1));
}

fn shutdown_with_unsent_data(w: &World) {
    let mut c = w.pair();
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    log!("shutdown {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("send {}", send1(&c));
    log!("far all {}", w.far(&c, "drain") == format!("EOF after {n}"));
    w.far(&c, "put 1000");
    log!("{}", c.get(1000));
}

fn simultaneous_close(w: &World) {
    for _ in 0..30 {
        let c = w.cold_on("4");
        w.start_far(&c, "delayclose 0");
        let near = show(sys::close(c.fd));
        let far = w.finish();
        if (near.as_str(), far.as_str()) != ("0", "0") {
            log!("{near} {far}");
        }
    }
    let c = w.pair();
    w.start_far(&c, "shutdown 1");
    log!("{} far {}", show(sys::shutdown(c.fd, libc::SHUT_WR)), w.finish());
    c.settle(POLLHUP);
    log!("{} {} far {}", state(&c), read1(&c), w.far(&c, "drain"));
}

fn so_error_clears(w: &World) {
    let c = w.pair();
    log!("{}", sys::so_error(c.fd));
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("{}", sys::so_error(c.fd));
    log!("{}", sys::so_error(c.fd));
    log!("{} read {} send {}", state(&c), read1(&c), send1(&c));
}

fn write_error_forms(w: &World) {
    let mut c = w.pair();
    w.far(&c, "linger 0");
    w.far(&c, "close");
    c.settle(POLLERR);
    log!("first {}", c.put(10));
    sys::on_signal(libc::SIGPIPE, count, 0);
    log!("write {}", show(sys::write(c.fd, b"x")));
    log!("writev {}", show(sys::writev(c.fd, &[b"x"])));
    log!("send {}", show(sys::send(c.fd, b"x", 0)));
    log!("sendto {}", show(sys::sendto(c.fd, b"x", 0, None)));
    log!("sendmsg {}", show(sys::sendmsg(c.fd, &[b"x"], 0, None)));
    log!("quiet {}", show(sys::sendmsg(c.fd, &[b"x"], libc::MSG_NOSIGNAL, None)));
    log!("empty {}", show(sys::send(c.fd, &[], libc::MSG_NOSIGNAL)));
    log!("signals {}", SIGNALS.load(Ordering::Relaxed));
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

fn sigpipe_is_sent(w: &World) {
    let c = w.pair();
    sys::on_signal(libc::SIGPIPE, count, 0);
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("write {} signals {}", show(sys::write(c.fd, b"x")), SIGNALS.load(Ordering::Relaxed));
    log!("send {} signals {}", show(sys::send(c.fd, b"x", 0)), SIGNALS.load(Ordering::Relaxed));
    log!("quiet {} signals {}", send1(&c), SIGNALS.load(Ordering::Relaxed));
}

fn sigpipe_kills(w: &World) {
    let c = w.pair();
    let pid = sys::fork(|| {
        sys::default_signal(libc::SIGPIPE);
        let _ = sys::shutdown(c.fd, libc::SHUT_WR);
        let _ = sys::write(c.fd, b"x");
        0
    });
    log!("{}", sys::wait(pid) == format!("signal {}", libc::SIGPIPE));
    log!("far {}", w.far(&c, "drain"));
}

fn blocked_read_gets_eof(w: &World) {
    let mut c = w.pair();
    w.start_far(&c, "delayclose 100");
    log!("{}", c.get(1));
    log!("far {}", w.finish());
}

fn blocked_read_gets_reset(w: &World) {
    let mut c = w.pair();
    w.far(&c, "linger 0");
    w.start_far(&c, "delayclose 100");
    log!("{}", c.get(1));
    log!("far {}", w.finish());
}

fn blocked_write_gets_reset(w: &World) {
    let mut c = w.pair();
    log!("{}", c.fill());
    let mut end = c.end;
    let t = later(0, move || end.put(1 << 20));
    sys::sleep_ms(100);
    // Unread data: the close is a reset.
    log!("far {}", w.far(&c, "close"));
    let r = t.join().expect("no panic");
    log!("{}", r.split(' ').next().unwrap_or(""));
    log!("after it: {}", send1(&c));
}

/// The administrator resets the connection (`ss -K`) while this end waits: by poll, by epoll, and in calls with a time-out.
fn reset_from_outside(w: &World) {
    for way in ["nobody", "poll", "epoll", "recv", "send"] {
        let mut c = w.pair();
        let (port, fd) = (sys::getsockname(c.fd).expect("a name").port(), c.fd);
        let kill = later(60, move || {
            let filter = format!("sport = :{port}");
            let mut ss = std::process::Command::new("ss");
            let done = ss
                .env_remove("LD_PRELOAD")
                .args(["-K", "-n", "-t", "state", "established", &filter])
                .output();
            // It says nothing where the kernel has no way for it, or the user no right.
            done.is_ok_and(|d| String::from_utf8_lossy(&d.stdout).contains(&format!(":{port}")))
        });
        for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            sys::set_timeout(fd, name, Duration::from_secs(20)).expect("a time-out");
        }
        let told = match way {
            "poll" => sys::show_poll(sys::poll1(fd, POLLIN | POLLRDHUP, 20_000)),
            "epoll" => {
                let set = sys::epoll_create();
                sys::epoll_add(set, fd, POLLIN.into(), 1);
                let told = sys::show_epoll(sys::epoll_wait(set, 8, 20_000));
                sys::close(set).expect("close");
                told
            }
            "recv" => show(sys::recv(fd, &mut [0; 10], 0)),
            // How much of it goes before is a matter of buffers.
            "send" => {
                let b = vec![0; 1 << 20];
                let r = std::iter::repeat_with(|| sys::send(fd, &b, libc::MSG_NOSIGNAL))
                    .take(64)
                    .find(|r| r.is_err());
                show(r.unwrap_or(Ok(0)))
            }
            _ => String::new(),
        };
        if !kill.join().expect("no panic") {
            log!("no ss -K");
            return;
        }
        log!("{way}: {told}");
        settle(fd, POLLHUP);
        log!("{}", sys::show_poll(sys::poll1(fd, POLLIN | POLLOUT | POLLRDHUP, 0)));
        let r = [show(sys::recv(fd, &mut [0; 10], 0)), show(sys::recv(fd, &mut [0; 10], 0))];
        log!("{r:?} {} {}", show(sys::send(fd, b"x", libc::MSG_NOSIGNAL)), sys::so_error(fd));
        if way != "send" {
            log!("far {}", w.far(&c, "drain"));
        }
        c.fd = -1;
        sys::close(fd).expect("close");
    }
}

fn peer_dies(w: &World) {
    let mut c = w.pair();
    w.ask("die");
    log!("{}", c.drain());
    log!("{}", state(&c));
}

fn peer_dies_after_sending(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 10000");
    w.ask("die");
    log!("{}", c.drain());
}

fn peer_dies_with_unread_data(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(100));
    w.far(&c, "arrived 100");
    w.far(&c, "put 10");
    c.arrived(10);
    w.ask("die");
    c.settle(POLLHUP);
    log!("{}", c.drain());
    log!("{}", state(&c));
}

/// A reset is told once, by whichever call comes first; what comes after is the same for all.
fn peer_dies_with_unread_data_in_many(w: &World) {
    unread_data_in_many(w, |w| _ = w.ask("die"));
}

fn peer_killed_with_unread_data_in_many(w: &World) {
    unread_data_in_many(w, kill);
}

/// The reset comes after what has come by TCP, also if a call that does not read was told of it.
fn peer_killed_with_bytes_in_tcp(w: &World) {
    let mut cs: Vec<_> = (0..2).map(|_| w.pair()).collect();
    for c in &mut cs {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
        // An urgent byte goes by TCP, and what follows with it.
        log!("far {}", w.far(c, "oob 33"));
        w.far(c, "put 10");
    }
    kill(w);
    cs.iter().for_each(|c| c.settle(POLLHUP));
    log!("{}", state(&cs[1]));
    for c in &mut cs {
        log!("{}", c.drain());
        log!("{} {}", read1(c), state(c));
    }
}

/// As `peer_dies…`, but without the least word: _exit still is a call.
fn kill(w: &World) {
    sys::kill(w.agent_pid().expect("a process"), libc::SIGKILL);
}

fn unread_data_in_many(w: &World, death: fn(&World)) {
    let mut cs: Vec<_> = (0..6).map(|_| w.pair()).collect();
    for c in &mut cs {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
    }
    let ep = sys::epoll_create();
    sys::epoll_add(ep, cs[4].fd, libc::EPOLLIN | libc::EPOLLRDHUP, 4);
    death(w);
    cs.iter().for_each(|c| c.settle(POLLHUP));
    for (i, c) in cs.iter().enumerate() {
        log!("{i}: {}", state(c));
        match i {
            0 => log!("send {}", send1(c)),
            1 => log!("error {}", sys::so_error(c.fd)),
            2 => log!("peek {}", show(sys::recv(c.fd, &mut [0; 1], libc::MSG_PEEK))),
            3 => log!("shutdown {}", show(sys::shutdown(c.fd, libc::SHUT_RD))),
            4 => log!("epoll {}", sys::show_epoll(sys::epoll_wait(ep, 8, 10_000))),
            _ => log!("write {}", show(sys::write(c.fd, b"x"))),
        }
        log!("{} {} {} {}", state(c), read1(c), read1(c), send1(c));
        log!("{} {}", sys::so_error(c.fd), state(c));
    }
}

fn peer_dies_under_blocked_calls(w: &World) {
    under_blocked_calls(w, |w| _ = w.ask("die"));
}

fn peer_killed_under_blocked_calls(w: &World) {
    under_blocked_calls(w, kill);
}

fn under_blocked_calls(w: &World, death: fn(&World)) {
    let mut cs: Vec<_> = (0..9).map(|_| w.pair()).collect();
    for c in &mut cs[..8] {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
    }
    log!("{}", cs[8].fill());
    let fd = |i: usize| cs[i].fd;
    let [a, b, c, d, e, f, g, h, i] = std::array::from_fn(fd);
    let ep = |fd: i32, events: i32| {
        let ep = sys::epoll_create();
        sys::epoll_add(ep, fd, events, 1);
        ep
    };
    // In the order of TCP's bits: nothing that was there before the death may be among them.
    let (eg, eh) = (ep(g, libc::EPOLLIN | libc::EPOLLET), ep(h, 0));
    let blocked = [
        later(0, move || show(sys::read(a, &mut [0; 1]))),
        later(0, move || show(sys::recv(b, &mut [0; 9], libc::MSG_WAITALL))),
        later(0, move || {
            settle(c, POLLHUP);
            show(sys::read(c, &mut [0; 1]))
        }),
        later(0, move || sys::show_poll(sys::poll1(d, POLLIN | POLLRDHUP, -1))),
        later(0, move || sys::show_poll(sys::poll1(e, 0, -1))),
        later(0, move || show(sys::select_read(&[f], std::time::Duration::from_secs(30)).0)),
        later(0, move || sys::show_epoll(sys::epoll_wait(eg, 8, 30_000))),
        later(0, move || sys::show_epoll(sys::epoll_wait(eh, 8, 30_000))),
        later(0, move || show(sys::send(i, &[0; 1 << 16], libc::MSG_NOSIGNAL))),
    ];
    sys::sleep_ms(100);
    death(w);
    for t in blocked {
        log!("{}", t.join().expect("no panic"));
    }
    for c in &cs {
        log!("{} {} {} {}", state(c), sys::so_error(c.fd), read1(c), send1(c));
    }
}

/// A program that only sends, and little, hears of it all the same.
fn peer_killed_and_small_sends(w: &World) {
    let (mut c, d) = (w.pair(), w.pair());
    log!("{}", c.put(100));
    w.far(&c, "arrived 100");
    // The other has read all, and sleeps.
    w.start_far(&d, "await poll");
    sys::sleep_ms(50);
    kill_and_see(w);
    for c in [&c, &d] {
        let e = (0..100).find_map(|_| sys::send(c.fd, b"x", libc::MSG_NOSIGNAL).err());
        log!("{:?} {} {}", e.map(sys::errno_name), state(c), read1(c));
    }
}

/// The doorbell has been rung and not emptied when its end comes, which no other edge tells of.
fn peer_killed_behind_its_rings(w: &World) {
    let mut c = w.pair();
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET, 7);
    for _ in 0..3 {
        // The set sleeps when it comes.
        w.start_far(&c, "delayput 10 30");
        log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), w.finish());
        log!("{}", c.get(10));
    }
    w.far(&c, "shutdown 1");
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    log!("{}", read1(&c));
    log!("{}", c.put(10));
    w.far(&c, "arrived 10");
    kill_and_see(w);
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    log!("{} {}", state(&c), show(sys::send(c.fd, b"x", libc::MSG_NOSIGNAL)));
}

/// Descriptors of the agent, taken into this process: what they lead to outlives it.
fn hold(w: &World, which: impl Fn(i32) -> bool) -> Vec<i32> {
    let pid = w.agent_pid().expect("a process");
    // SAFETY: no pointers; errors come back as negative numbers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let mut held = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("our child's").flatten() {
        let n: i32 = entry.file_name().to_string_lossy().parse().expect("a number");
        if which(n) {
            // SAFETY: as above.
            held.push(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, n, 0) } as i32);
        }
    }
    sys::close(pidfd as i32).expect("close");
    held
}

/// Kills the agent and waits until its descriptors are closed.
fn kill_and_see(w: &World) {
    let pid = w.agent_pid().expect("a process");
    // SAFETY: no pointers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as i32;
    kill(w);
    log!("dead {}", sys::poll1(pidfd, POLLIN, 20_000).is_ok_and(|r| r & POLLIN != 0));
    sys::close(pidfd).expect("close");
}

/// The peer's process is dead and its TCP socket is not closed: nothing has happened yet.
fn peer_killed_and_its_socket_held(w: &World) {
    let mut cs: Vec<_> = (0..4).map(|_| w.pair()).collect();
    for c in &mut cs {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
    }
    let held = hold(w, |n| cs.iter().any(|c| c.far == n));
    let [a, b] = [cs[0].fd, cs[1].fd];
    let read = later(0, move || show(sys::read(a, &mut [0; 1])));
    let poll = later(0, move || sys::show_poll(sys::poll1(b, POLLIN | POLLRDHUP, -1)));
    kill_and_see(w);
    for c in &cs[2..] {
        log!("{}", sys::show_poll(sys::poll1(c.fd, POLLIN | POLLRDHUP, 30)));
        log!("{} {}", show(sys::recv(c.fd, &mut [0; 1], libc::MSG_DONTWAIT)), sys::so_error(c.fd));
    }
    held.iter().for_each(|fd| _ = sys::close(*fd));
    log!("{}", read.join().expect("no panic"));
    log!("{}", poll.join().expect("no panic"));
    cs.iter().for_each(|c| c.settle(POLLHUP));
    for (i, c) in cs.iter().enumerate() {
        log!("{i}: {}", state(c));
        log!("{} {} {} {}", sys::so_error(c.fd), read1(c), send1(c), state(c));
    }
}

/// The other way round: of the peer's process all but the TCP sockets are still open, so that whoever waits for
/// TCP's word hears of it.
fn peer_killed_and_the_rest_held(w: &World) {
    let mut cs: Vec<_> = (0..6).map(|_| w.pair()).collect();
    for c in &mut cs {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
    }
    let held = hold(w, |n| n > 2 && cs.iter().all(|c| c.far != n));
    let fd = |i: usize| cs[i].fd;
    let [a, b, c]: [i32; 3] = std::array::from_fn(fd);
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c, libc::EPOLLIN | libc::EPOLLET, 1);
    let blocked = [
        later(0, move || sys::show_poll(sys::poll1(a, POLLIN | POLLRDHUP, -1))),
        later(0, move || show(sys::select_read(&[b], std::time::Duration::from_secs(30)).0)),
        later(0, move || sys::show_epoll(sys::epoll_wait(ep, 8, 30_000))),
    ];
    sys::sleep_ms(100);
    kill_and_see(w);
    for t in blocked {
        log!("{}", t.join().expect("no panic"));
    }
    for (i, c) in cs.iter().enumerate() {
        c.settle(POLLRDHUP);
        let r = if i % 2 == 0 { state(c) } else { read1(c) };
        log!("{i}: {r} {} {} {} {}", sys::so_error(c.fd), read1(c), send1(c), state(c));
    }
    held.iter().for_each(|fd| _ = sys::close(*fd));
    for c in &cs {
        log!("{} {}", state(c), read1(c));
    }
}

fn peer_killed_after_shutdown_wr(w: &World) {
    let mut cs: Vec<_> = (0..3).map(|_| w.pair()).collect();
    for c in &mut cs {
        w.far(c, "shutdown 1");
        c.settle(POLLRDHUP);
        log!("{} {}", state(c), read1(c));
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
    }
    kill(w);
    cs.iter().for_each(|c| c.settle(POLLHUP));
    for (i, c) in cs.iter().enumerate() {
        log!("{i}: {}", state(c));
        let r = match i {
            0 => read1(c),
            1 => send1(c),
            _ => sys::so_error(c.fd).to_string(),
        };
        log!("{r} {} {} {} {}", state(c), sys::so_error(c.fd), read1(c), send1(c));
    }
}

fn peer_killed_after_our_shutdown_wr(w: &World) {
    let mut cs: Vec<_> = (0..2).map(|_| w.pair()).collect();
    for c in &mut cs {
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
        log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    }
    let a = cs[0].fd;
    let read = later(0, move || show(sys::read(a, &mut [0; 1])));
    sys::sleep_ms(50);
    kill(w);
    log!("{}", read.join().expect("no panic"));
    cs.iter().for_each(|c| c.settle(POLLHUP));
    for c in &cs {
        log!("{} {} {}", state(c), read1(c), state(c));
    }
}

fn half_closed_peer_closes_with_unread_data(w: &World) {
    let mut cs: Vec<_> = (0..2).map(|_| w.pair()).collect();
    for c in &mut cs {
        w.far(c, "shutdown 1");
        c.settle(POLLRDHUP);
        log!("{}", c.put(100));
        w.far(c, "arrived 100");
        log!("far {}", w.far(c, "close"));
        c.settle(POLLHUP);
    }
    log!("{} {} {}", state(&cs[0]), read1(&cs[0]), send1(&cs[0]));
    log!("{} {} {}", state(&cs[1]), sys::so_error(cs[1].fd), read1(&cs[1]));
}

/// The end of a stream is no death, though bytes are unread and the stream has gone by TCP before.
fn half_closed_peer_lives_with_unread_data(w: &World) {
    let mut c = w.pair();
    // Sends its direction back to TCP.
    w.far(&c, "oob 33");
    log!("{}", show(sys::recv(c.fd, &mut [0; 1], libc::MSG_OOB)));
    log!("{}", c.put(100));
    w.far(&c, "arrived 100");
    w.far(&c, "shutdown 1");
    c.settle(POLLRDHUP);
    for _ in 0..3 {
        log!("{} {} {}", state(&c), sys::so_error(c.fd), read1(&c));
    }
    log!("far {}", w.far(&c, "get 100"));
    log!("{}", c.put(5000));
    log!("far {}", w.far(&c, "get 5000"));
    log!("far {}", w.far(&c, "close"));
}

/// When both ends have sent FIN the kernel has done with the sockets; what is unread is there to be read all the same.
fn both_shut_with_unread_data(w: &World) {
    let mut c = w.pair();
    log!("{} far {}", c.put(100), w.far(&c, "put 100"));
    c.arrived(100);
    w.far(&c, "arrived 100");
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    w.far(&c, "shutdown 1");
    c.settle(POLLHUP);
    log!("{} {}", c.get(100), state(&c));
    for _ in 0..2 {
        log!("{} {} {}", state(&c), sys::so_error(c.fd), read1(&c));
    }
    log!("far {}", w.far(&c, "get 100"));
    log!("far {}", w.far(&c, "close"));
}

/// A program that neither waits nor polls hears of it as well.
fn peer_dies_unlooked_for(w: &World) {
    let (mut c, mut d) = (w.pair(), w.pair());
    log!("{} {}", d.fill(), c.put(0));
    w.ask("die");
    let until = |f: &dyn Fn() -> sys::Res| loop {
        match f() {
            Err(libc::EAGAIN) => {}
            r => return show(r),
        }
    };
    log!("read {}", until(&|| sys::recv(c.fd, &mut [0; 1], libc::MSG_DONTWAIT)));
    log!("write {}", until(&|| sys::send(d.fd, b"x", libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)));
}

fn peer_dies_while_we_write(w: &World) {
    let mut c = w.pair();
    let pid = w.agent_pid().expect("a process");
    let t = later(100, move || sys::kill(pid, libc::SIGKILL));
    let r = c.put(usize::MAX / 2);
    let e = r.split(' ').next().unwrap_or("");
    log!("{}", e == "ECONNRESET" || e == "EPIPE");
    t.join().expect("no panic");
    log!("then {}", send1(&c));
}

fn many_open_and_close(w: &World) {
    for i in 0..60 {
        let mut c = w.cold_on("4");
        w.warm(&mut c, 30);
        let (near_first, n) = (i % 2 == 0, 100 * i);
        log!("{}", c.put(n));
        if near_first {
            log!("{}", show(sys::close(c.fd)));
            log!("far {} {}", w.far(&c, "drain"), w.far(&c, "close"));
        } else {
            log!("far {} {}", w.far(&c, &format!("get {n}")), w.far(&c, "close"));
            log!("{} {}", c.drain(), show(sys::close(c.fd)));
        }
    }
}

/// A buffer that served one connection serves the next: nothing of the first may be seen.
fn connection_after_connection(w: &World) {
    for i in 0..20 {
        let mut c = w.pair();
        w.far(&c, &format!("put {}", 5000 + i));
        log!("{}", c.get(1000));
        log!("{}", show(sys::close(c.fd)));
        w.far(&c, "close");
        let mut d = w.pair();
        w.far(&d, "put 100");
        d.arrived(100);
        log!("{:?} {}", sys::fionread(d.fd), d.get(100));
        log!("{}", show(sys::close(d.fd)));
        w.far(&d, "close");
    }
}

/// How long this thread has run.
fn thread_time() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a time to be written.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// A connection whose peer has shut its direction, and will read.
fn half_shut(w: &World) -> Conn {
    let mut c = w.pair();
    w.far(&c, "shutdown 1");
    log!("{}", c.drain());
    c
}

/// The peer's FIN is here, and it does not read for now: a send that waits ends with its time.
fn send_times_out_at_a_peer_that_has_shut(w: &World) {
    let mut c = half_shut(w);
    log!("{}", show(sys::set_timeout(c.fd, libc::SO_SNDTIMEO, Duration::from_millis(300))));
    let before = c.tx;
    loop {
        match sys::send(c.fd, &block(c.tx, 8 << 20), libc::MSG_NOSIGNAL) {
            Ok(n) => c.tx += n as u64,
            Err(e) => {
                log!("{}", sys::errno_name(e));
                break;
            }
        }
    }
    let sent = c.tx - before;
    log!("all {}", w.far(&c, &format!("get {sent}")) == format!("got {sent}"));
    w.start_far(&c, "get 3000");
    log!("{} {}", c.put(3000), w.finish());
}

/// One that has moved a part sleeps until the peer reads the rest.
fn send_sleeps_at_a_peer_that_has_shut(w: &World) {
    const MUCH: usize = 16 << 20;
    let mut c = half_shut(w);
    let b = c.next(MUCH);
    w.start("sleep 3000");
    let far = c.far;
    let (r, much) = std::thread::scope(|s| {
        let sender = s.spawn(|| {
            let before = thread_time();
            let r = sys::send(c.fd, &b, libc::MSG_NOSIGNAL);
            (r, thread_time() - before > Duration::from_millis(250))
        });
        log!("{}", w.finish());
        log!("{}", w.ask(&format!("get {far} {MUCH}")));
        sender.join().expect("the sender")
    });
    log!("{} busy {much}", r == Ok(MUCH as i64));
}
