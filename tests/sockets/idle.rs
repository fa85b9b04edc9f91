//! Bytes that lie unread in the ring while their sender makes no call, for those who do not see the ring: stdio, AIO,
//! sets that are another's as well, programs that were handed the connection. Nobody but the sender could move them.

use crate::{
    Scenario, log,
    process::{beside_an_idle_peer, spawn_head},
    s,
    sys::{self, show},
    world::{Conn, World},
};
use libc::{EPOLL_CTL_ADD, EPOLLEXCLUSIVE, EPOLLIN};
use std::{
    ffi::CStr,
    sync::atomic::{AtomicBool, Ordering},
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(stdio_beside_a_blocked_sender).procs().not_tiny(),
    s!(stdio_beside_a_poll_for_room).procs(),
    s!(spawned_beside_a_blocked_sender).procs().not_tiny(),
    s!(stdio_of_a_child_beside_its_parents_set).procs(),
    s!(stdio_of_a_child_in_its_parents_set).procs(),
    s!(stdio_of_a_daemon_in_its_parents_set).procs(),
    s!(exclusive_member).procs(),
    s!(set_that_nobody_knows).procs(),
    s!(stdin_of_a_peer_that_left_its_set).procs(),
    s!(passed_and_closed).procs(),
    s!(passed_and_closed_by_a_killed_peer).procs(),
    s!(passed_and_kept).procs(),
    s!(passed_and_read_on).procs(),
    s!(passed_in_a_set).procs(),
    s!(passed_in_vain).procs(),
];

/// A connection on which the peer has said that, and makes no call.
fn said(w: &World, text: &str) -> Conn {
    let c = w.pair();
    w.far(&c, &format!("say {text}"));
    c.arrived(text.len() as i32);
    c
}

/// What stdio reads of a line, from a number that is handed over to it.
fn line_of(fd: i32) -> String {
    let mut b = [0u8; 100];
    // SAFETY: an open descriptor, and a buffer of this length.
    unsafe {
        let f = libc::fdopen(fd, c"r".as_ptr());
        libc::fgets(b.as_mut_ptr().cast(), 100, f);
    }
    format!("{:?}", CStr::from_bytes_until_nul(&b).expect("fgets ends it"))
}

/// A thread sends so much that it waits for the peer; `then` comes meanwhile, and after it the peer reads all.
fn beside_a_blocked_sender(w: &World, c: &Conn, then: impl FnOnce()) {
    const MUCH: usize = 32 << 20;
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut left = MUCH;
            while left > 0 {
                // A signal, that of a child's end say, may cut it short.
                match sys::send(c.fd, &vec![b'm'; left], libc::MSG_NOSIGNAL) {
                    Ok(n) => left -= n as usize,
                    Err(e) => return log!("send {}", sys::errno_name(e)),
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        sys::sleep_ms(150);
        then();
        log!("blocked {}", !over.load(Ordering::Relaxed));
        w.start_far(c, "tally");
    });
    log!("{}", show(sys::send(c.fd, &[b'h'; 1000], libc::MSG_NOSIGNAL)));
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("far {}", w.finish());
}

fn stdio_beside_a_blocked_sender(w: &World) {
    let c = said(w, "first\n");
    beside_a_blocked_sender(w, &c, || log!("{}", line_of(c.fd)));
}

/// The program that is started reads, and this one sends on.
fn spawned_beside_a_blocked_sender(w: &World) {
    let c = said(w, "first\n");
    beside_a_blocked_sender(w, &c, || {
        let (r, pid) = spawn_head(&[(c.fd, 0)]);
        log!("{r} {}", sys::wait(pid));
    });
    // Twice closed at once: the number, and what blocked calls have had it under.
    log!("{} {}", show(sys::close(c.fd)), show(sys::close(c.fd)));
}

fn stdio_beside_a_poll_for_room(w: &World) {
    let mut c = said(w, "first\n");
    let before = c.tx;
    log!("{}", c.fill());
    let all = c.tx - before;
    std::thread::scope(|s| {
        let room = s.spawn(|| sys::show_poll(sys::poll1(c.fd, libc::POLLOUT, -1)));
        sys::sleep_ms(100);
        log!("{}", line_of(c.fd));
        log!("far all {}", w.far(&c, &format!("get {all}")) == format!("got {all}"));
        log!("{}", room.join().expect("it only waits"));
    });
    log!("{} far {}", c.put(1000), w.far(&c, "get 1000"));
}

/// The parent's set knows the connection, which the child reads by stdio.
fn stdio_of_a_child_beside_its_parents_set(w: &World) {
    let c = said(w, "first\nsecond\n");
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, EPOLLIN, 7);
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    let pid = sys::fork(|| {
        log!("{} {}", line_of(c.fd), show(sys::write(c.fd, b"thanks\n")));
        // The rest is in stdio's buffer.
        0
    });
    log!("{} {}", sys::wait(pid), show(sys::close(c.fd)));
    log!("far {}", w.far(&c, "hear"));
}

/// A child has put its own connection into a set that it shares with its parent.
fn stdio_of_a_child_in_its_parents_set(w: &World) {
    let set = sys::epoll_create();
    let pid = sys::fork(|| {
        let c = said(w, "first\n");
        sys::epoll_add(set, c.fd, EPOLLIN, 7);
        log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), line_of(c.fd));
        w.far(&c, "say second\n");
        log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), show(sys::read(c.fd, &mut [0; 8])));
        log!("{} far {}", show(sys::write(c.fd, b"thanks\n")), w.far(&c, "hear"));
        0
    });
    log!("{}", sys::wait(pid));
}

/// As a daemon does: the parent has made set and connection, and is gone.
fn stdio_of_a_daemon_in_its_parents_set(w: &World) {
    let done = sys::pipe();
    let pid = sys::fork(|| {
        let c = said(w, "first\n");
        let set = sys::epoll_create();
        sys::epoll_add(set, c.fd, EPOLLIN, 7);
        log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
        let parent = std::process::id();
        sys::fork(|| {
            while std::os::unix::process::parent_id() == parent {
                sys::sleep_ms(2);
            }
            // Nobody waits for it, and so for what it logs.
            let mut told = line_of(c.fd);
            w.far(&c, "say second\n");
            told += &sys::show_epoll(sys::epoll_wait(set, 4, 4000));
            told +=
                &format!(" {} {}", show(sys::read(c.fd, &mut [0; 8])), show(sys::write(c.fd, b"thanks\n")));
            told += &w.far(&c, "hear");
            sys::write(done[1], told.as_bytes()).expect("write");
            0
        });
        0
    });
    log!("{}", sys::wait(pid));
    let mut told = [0; 200];
    let n = sys::read(done[0], &mut told).expect("it tells");
    log!("{}", String::from_utf8_lossy(&told[..n as usize]));
}

/// Which of several sets wakes up for it is the kernel's to say, so it must know of the bytes.
fn exclusive_member(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, EPOLLIN | EPOLLEXCLUSIVE, 7);
    log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), c.get(500));
    w.far(&c, "put 300");
    log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), c.get(300));
    w.still_good(&mut c);
}

/// A set that came by a message: nobody has seen it being made.
fn set_that_nobody_knows(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    let (u, made) = (sys::unix_pair(libc::SOCK_STREAM), sys::epoll_create());
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(made))));
    let set = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
    log!("{}", show(sys::epoll_ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN as u32, 7)));
    log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), c.get(500));
    log!("{}", show(sys::epoll_ctl(set, EPOLL_CTL_ADD, c.fd, EPOLLIN as u32, 7)));
    w.far(&c, "put 300");
    log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)), c.get(300));
    w.still_good(&mut c);
}

/// The peer has slept in a set of its with the connection, and does something else now.
fn stdin_of_a_peer_that_left_its_set(_: &World) {
    let (e, peer, gate) = beside_an_idle_peer(|fd| {
        let set = sys::epoll_create();
        sys::epoll_add(set, fd, EPOLLIN, 7);
        let _ = sys::epoll_wait(set, 4, 50);
    });
    // It is in the pipe by now.
    sys::sleep_ms(100);
    let pid = sys::fork(|| {
        sys::dup2(e.fd, 0).expect("dup2");
        let _ = sys::close(e.fd);
        let mut b = [0u8; 11];
        // SAFETY: libc's own stream, which nobody else uses here; the buffer has room.
        unsafe {
            let f = libc::fdopen(0, c"r".as_ptr());
            libc::fgets(b.as_mut_ptr().cast(), 11, f);
        }
        log!("{:?}", String::from_utf8_lossy(&b));
        0
    });
    log!("{}", sys::wait(pid));
    sys::write(gate[1], b"x").expect("write");
    log!("{}", sys::wait(peer));
}

/// A process to which a connection is passed: it reads so many bytes, and answers.
fn receiver(u: i32, n: usize) -> i32 {
    sys::fork(|| {
        let fd = sys::recvmsg(u, &mut [&mut [0; 8]], 0).fds[0];
        let mut b = vec![0; n];
        let mut at = 0;
        while at < n {
            match sys::read(fd, &mut b[at..]) {
                Ok(k) if k > 0 => at += k as usize,
                r => {
                    log!("child {}", show(r));
                    break;
                }
            }
        }
        log!("child {:?} {}", String::from_utf8_lossy(&b[..at]), show(sys::write(fd, b"heard\n")));
        0
    })
}

fn passed_and_closed(w: &World) {
    let u = sys::unix_pair(libc::SOCK_STREAM);
    let pid = receiver(u[1], 6);
    let c = said(w, "first\n");
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    log!("{} {}", show(sys::close(c.fd)), sys::wait(pid));
    log!("far {} {}", w.far(&c, "hear"), w.far(&c, "hear"));
}

fn passed_and_closed_by_a_killed_peer(_: &World) {
    let (e, peer, _gate) = beside_an_idle_peer(|_| ());
    let u = sys::unix_pair(libc::SOCK_STREAM);
    log!("{} {}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(e.fd))), show(sys::close(e.fd)));
    sys::kill(peer, libc::SIGKILL);
    log!("{}", sys::wait(peer));
    let fd = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
    let mut b = [0; 10];
    log!("{} {:?}", show(sys::recv(fd, &mut b, libc::MSG_WAITALL)), String::from_utf8_lossy(&b));
    log!("{}", show(sys::read(fd, &mut b)));
}

/// Who has passed it keeps it open, and does nothing with it. The peer waits for an answer.
fn passed_and_kept(w: &World) {
    let u = sys::unix_pair(libc::SOCK_STREAM);
    let pid = receiver(u[1], 6);
    let c = said(w, "first\n");
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    log!("far {}", w.far(&c, "hear"));
    log!("{} {}", sys::wait(pid), show(sys::close(c.fd)));
    log!("far {}", w.far(&c, "hear"));
}

/// As with a store of descriptors: who has passed it goes on with it, and the store has it for later.
fn passed_and_read_on(w: &World) {
    let (u, gate) = (sys::unix_pair(libc::SOCK_STREAM), sys::pipe());
    let pid = sys::fork(|| {
        let fd = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
        let _ = sys::read(gate[0], &mut [0; 1]);
        let mut b = [0; 6];
        log!("child {} {:?}", show(sys::recv(fd, &mut b, libc::MSG_WAITALL)), String::from_utf8_lossy(&b));
        log!("child {}", show(sys::write(fd, b"late\n")));
        0
    });
    let c = said(w, "first\n");
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    let mut b = [0; 6];
    for word in ["second", "third\n", "fourth"] {
        log!("{} {:?}", show(sys::recv(c.fd, &mut b, libc::MSG_WAITALL)), String::from_utf8_lossy(&b));
        log!("{} far {}", show(sys::write(c.fd, b"heard\n")), w.far(&c, "hear"));
        w.far(&c, &format!("say {word}"));
    }
    c.arrived(6);
    log!("{} {}", show(sys::close(c.fd)), show(sys::write(gate[1], b"x")));
    log!("{} far {} {}", sys::wait(pid), w.far(&c, "hear"), w.far(&c, "hear"));
}

/// Who has passed it has it in a set, and goes on.
fn passed_in_a_set(w: &World) {
    let u = sys::unix_pair(libc::SOCK_STREAM);
    let pid = receiver(u[1], 6);
    let c = said(w, "first\n");
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, EPOLLIN, 7);
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    // The receiver has nothing to read before this process lets go, or it has read itself.
    log!("{} {}", show(sys::epoll_ctl(set, libc::EPOLL_CTL_DEL, c.fd, 0, 0)), show(sys::close(c.fd)));
    log!("{} far {} {}", sys::wait(pid), w.far(&c, "hear"), w.far(&c, "hear"));
}

/// The message is not sent: all is as before, though the peer has come to life.
fn passed_in_vain(w: &World) {
    let mut c = w.pair();
    let u = sys::unix_pair(libc::SOCK_STREAM);
    assert!(sys::close(u[1]).is_ok());
    w.far(&c, "put 1000");
    c.arrived(1000);
    for _ in 0..2 {
        log!("{}", show(sys::sendmsg(u[0], &[b"x"], libc::MSG_NOSIGNAL, Some(c.fd))));
    }
    w.far(&c, "put 500");
    log!("{} {} far {}", c.get(1500), c.put(500), w.far(&c, "get 500"));
    w.still_good(&mut c);
}
