//! Descriptors and processes: dup in every form, fork, exec, SCM_RIGHTS, daemons that close everything.

use crate::{
    Scenario, log, s,
    sys::{self, show},
    world::{Conn, End, World, address, later, listener},
};
use std::{
    ffi::CString,
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(dup_both_work),
    s!(dup_close_one),
    s!(dup2_to_chosen),
    s!(dup2_same),
    s!(dup2_replaces_connection),
    s!(dup2_file_over_connection),
    s!(dup2_onto_stdio),
    s!(dup3_flags),
    s!(f_dupfd),
    s!(dup_onto_each_of_stdio),
    s!(open_by_proc),
    s!(dup_before_upgrade),
    s!(dup_shutdown_is_shared),
    s!(fork_child_uses).procs(),
    s!(fork_parent_closes).procs(),
    s!(fork_child_closes).procs(),
    s!(fork_both_in_turn).procs(),
    s!(fork_both_at_once).procs(),
    s!(fork_child_exits_no_eof).procs(),
    s!(fork_eof_after_last_close).procs(),
    s!(fork_before_warm_up).procs(),
    s!(fork_many_children).procs(),
    s!(fork_of_fork).procs(),
    s!(fork_while_another_is_in_the_loader).procs(),
    s!(fork_shutdown_by_child).procs(),
    s!(fork_child_is_killed).procs(),
    s!(fork_child_is_killed_before_the_upgrade).procs(),
    s!(forkpty_child_is_killed_before_the_upgrade).procs(),
    s!(fork_children_are_killed_one_by_one).procs(),
    s!(fork_parent_is_killed).procs(),
    s!(fork_child_is_killed_then_close).procs(),
    s!(prefork_accept).procs(),
    s!(prefork_shared_listener).procs(),
    s!(reuseport_workers).procs(),
    s!(binary_upgrade).procs(),
    s!(exec_cat).procs(),
    s!(exec_cat_with_data_waiting).procs().unforced(),
    s!(exec_while_the_peer_sleeps).procs().unforced(),
    s!(exec_after_an_upload).procs(),
    s!(exec_with_tcp_full).procs().not_tiny(),
    s!(exec_then_the_peer_exits).procs(),
    s!(exec_after_the_peer_has_ended).procs(),
    s!(exec_after_the_peer_has_gone_back).procs(),
    s!(exec_with_an_idle_peer).procs(),
    s!(exec_after_both_have_shut).procs(),
    s!(stdin_with_an_idle_peer).procs(),
    s!(stdin_of_a_killed_peer).procs(),
    s!(fdopen_with_an_idle_peer).procs(),
    s!(exec_in_place).procs(),
    s!(vfork_exec).procs(),
    s!(spawn_cat).procs(),
    s!(spawn_and_go_on).procs(),
    s!(spawn_beside_senders).procs().not_tiny(),
    s!(system_and_popen).procs(),
    s!(exec_unrelated).procs(),
    s!(exec_that_fails).procs(),
    s!(cloexec_is_kept).procs(),
    s!(rights_to_a_child).procs(),
    s!(rights_by_sendmmsg).procs(),
    s!(rights_to_ourselves),
    s!(rights_and_close).procs(),
    s!(daemonised).procs(),
    s!(daemon_close_loop).procs(),
    s!(daemon_close_range).procs(),
    s!(daemon_closefrom).procs(),
    s!(close_range_over_connections),
    s!(close_range_cloexec).procs(),
    s!(close_range_unshared).procs(),
    s!(close_range_unshared_by_a_thread),
    s!(thread_then_fork).procs(),
    s!(exit_without_close).procs(),
    s!(setuid_child).procs(),
    s!(jailed_child).procs(),
    s!(pidfd_getfd).procs(),
    s!(sandbox_strict).procs(),
    s!(sandbox_by_filter).procs(),
];

fn dup_both_work(w: &World) {
    let mut c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    let fds = [c.fd, d];
    for i in 0..10 {
        c.fd = fds[i % 2];
        log!("{} far {}", c.put(100), w.far(&c, "get 100"));
        w.far(&c, "put 100");
        c.fd = fds[(i + 1) % 2];
        log!("{}", c.get(100));
    }
}

fn dup_close_one(w: &World) {
    let mut c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    log!("{}", show(sys::close(c.fd)));
    log!("far sees no end: {}", w.far(&c, &format!("poll {} 50", libc::POLLIN)));
    c.fd = d;
    w.still_good(&mut c);
    log!("{}", show(sys::close(d)));
    log!("far {}", w.far(&c, "drain"));
}

fn dup2_to_chosen(w: &World) {
    let mut c = w.pair();
    for to in [100, 700] {
        log!("{}", show(sys::dup2(c.fd, to)));
        let mut d = Conn { end: End { fd: to, ..c.end }, far: c.far };
        w.still_good(&mut d);
        c.end = End { fd: c.fd, ..d.end };
        log!("{}", show(sys::close(to)));
    }
    log!("too far {}", show(sys::dup2(c.fd, 1 << 24)));
    log!("from nothing {}", show(sys::dup2(9999, 100)));
    w.still_good(&mut c);
}

fn dup2_same(w: &World) {
    let mut c = w.pair();
    log!("{}", sys::dup2(c.fd, c.fd) == Ok(i64::from(c.fd)));
    log!("{}", show(sys::dup3(c.fd, c.fd, 0)));
    w.still_good(&mut c);
}

fn dup2_replaces_connection(w: &World) {
    let (a, mut b) = (w.pair(), w.pair());
    log!("{}", sys::dup2(b.fd, a.fd) == Ok(i64::from(a.fd)));
    log!("the replaced one ended: {}", w.far(&a, "drain"));
    let old = b.fd;
    b.fd = a.fd;
    w.still_good(&mut b);
    log!("{}", show(sys::close(old)));
    w.still_good(&mut b);
}

fn dup2_file_over_connection(w: &World) {
    let c = w.pair();
    let p = sys::pipe();
    log!("{}", sys::dup2(p[1], c.fd) == Ok(i64::from(c.fd)));
    log!("ended: {}", w.far(&c, "drain"));
    let mut b = [0; 10];
    log!("{} {}", show(sys::write(c.fd, b"pipe")), show(sys::read(p[0], &mut b)));
}

fn dup2_onto_stdio(w: &World) {
    let mut c = w.pair();
    let out = sys::dup(0).map(|f| f as i32);
    sys::dup2(c.fd, 0).expect("dup2");
    let mut d = Conn { end: End { fd: 0, ..c.end }, far: c.far };
    w.still_good(&mut d);
    c.end = End { fd: c.fd, ..d.end };
    match out {
        Ok(f) => log!("{}", show(sys::dup2(f, 0))),
        Err(_) => log!("{}", show(sys::close(0))),
    }
    w.still_good(&mut c);
}

/// Output and error as well, by dup2 and by a number that was free; closed again, the rest goes on.
fn dup_onto_each_of_stdio(w: &World) {
    for by_dup2 in [true, false] {
        for to in [0, 2] {
            let mut c = w.pair();
            let out = sys::fcntl(to, libc::F_DUPFD, 600);
            if by_dup2 {
                sys::dup2(c.fd, to).expect("dup2");
            } else {
                let _ = sys::close(to);
                log!("{}", show(sys::fcntl(c.fd, libc::F_DUPFD, to)));
            }
            w.far(&c, "put 100");
            let mut d = Conn { end: End { fd: to, ..c.end }, far: c.far };
            let got = d.get(100);
            let sent = d.put(100);
            c.end = End { fd: c.fd, ..d.end };
            log!("{} {}", show(sys::close(to)), w.far(&c, "get 100"));
            if let Ok(out) = out {
                sys::dup2(out as i32, to).expect("dup2");
                sys::close(out as i32).expect("close");
            }
            log!("{by_dup2} {to} {got} {sent}");
            w.still_good(&mut c);
            log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
        }
    }
}

/// A socket can't be opened by its name in /proc, and nothing happens to it.
fn open_by_proc(w: &World) {
    let mut c = w.pair();
    for (dir, flags) in
        [("fd", libc::O_RDWR), ("fd", libc::O_RDONLY | libc::O_NONBLOCK), ("fdinfo", libc::O_RDONLY)]
    {
        let path = CString::new(format!("/proc/self/{dir}/{}", c.fd)).expect("no zero");
        // SAFETY: a C string.
        let r = unsafe { libc::open(path.as_ptr(), flags) };
        if r < 0 {
            log!("{dir} {}", sys::errno() == libc::ENXIO);
        } else {
            log!("{dir} {}", show(sys::close(r)));
        }
    }
    w.still_good(&mut c);
}

fn dup3_flags(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::dup3(c.fd, 300, libc::O_CLOEXEC)));
    log!("{:?}", sys::fcntl(300, libc::F_GETFD, 0));
    log!("bad flags {}", show(sys::dup3(c.fd, 301, 0x7777)));
    c.fd = 300;
    w.still_good(&mut c);
}

fn f_dupfd(w: &World) {
    let mut c = w.pair();
    log!("{}", show(sys::fcntl(c.fd, libc::F_DUPFD, 400)));
    log!("{}", show(sys::fcntl(c.fd, libc::F_DUPFD_CLOEXEC, 400)));
    log!("{:?} {:?}", sys::fcntl(400, libc::F_GETFD, 0), sys::fcntl(401, libc::F_GETFD, 0));
    log!("{}", show(sys::close(c.fd)));
    c.fd = 401;
    w.still_good(&mut c);
    log!("{}", show(sys::close(401)));
    c.fd = 400;
    w.still_good(&mut c);
    log!("{}", show(sys::close(400)));
    log!("far {}", w.far(&c, "drain"));
}

fn dup_before_upgrade(w: &World) {
    let mut c = w.cold_on("4");
    let d = sys::dup(c.fd).expect("dup") as i32;
    for i in 0..300 {
        let fds = [c.fd, d];
        let mut e = End { fd: fds[i % 2], ..c.end };
        e.put(1);
        w.far(&c, "get 1");
        w.far(&c, "put 1");
        e.fd = fds[(i + 1) % 2];
        e.get(1);
        c.end = End { fd: c.fd, ..e };
    }
    w.still_good(&mut c);
    log!("{}", show(sys::close(c.fd)));
    c.fd = d;
    w.still_good(&mut c);
}

fn dup_shutdown_is_shared(w: &World) {
    let c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    log!("{}", show(sys::shutdown(d, libc::SHUT_WR)));
    log!("{}", show(sys::send(c.fd, b"x", libc::MSG_NOSIGNAL)));
    log!("far {}", w.far(&c, "drain"));
}

fn fork_child_uses(w: &World) {
    let mut c = w.pair();
    let mut end = c.end;
    w.start_far(&c, "get 100000");
    let pid = sys::fork(|| {
        log!("child {}", end.put(100_000));
        0
    });
    log!("{} far {}", sys::wait(pid), w.finish());
    c.tx += 100_000;
    let mut end = c.end;
    w.start_far(&c, "put 100000");
    let pid = sys::fork(|| {
        log!("child {}", end.get(100_000));
        0
    });
    log!("{} far {}", sys::wait(pid), w.finish());
    c.rx += 100_000;
    w.still_good(&mut c);
}

fn fork_parent_closes(w: &World) {
    let c = w.pair();
    let mut end = c.end;
    let gate = sys::pipe();
    let pid = sys::fork(|| {
        let mut b = [0; 1];
        let _ = sys::read(gate[0], &mut b);
        for _ in 0..200 {
            end.put(100);
            end.get(100);
        }
        log!("child {}", end.put(10_000));
        0
    });
    log!("{}", show(sys::close(c.fd)));
    log!("no end yet: {}", w.far(&c, &format!("poll {} 50", libc::POLLIN)));
    sys::write(gate[1], b"x").expect("write");
    for i in 0..200 {
        let r = (w.far(&c, "get 100"), w.far(&c, "put 100"));
        if (r.0.as_str(), r.1.as_str()) != ("got 100", "put 100") {
            log!("{i}: {r:?}");
        }
    }
    log!("far {}", w.far(&c, "get 10000"));
    log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
}

fn fork_child_closes(w: &World) {
    let mut c = w.pair();
    let pid = sys::fork(|| {
        let r = sys::close(c.fd);
        log!("child {} then {}", show(r), show(sys::write(c.fd, b"x")));
        0
    });
    log!("{}", sys::wait(pid));
    w.still_good(&mut c);
    w.warm(&mut c, 200);
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
}

fn fork_both_in_turn(w: &World) {
    let mut c = w.pair();
    let (down, up) = (sys::pipe(), sys::pipe());
    let mut end = c.end;
    let pid = sys::fork(|| {
        let mut b = [0; 1];
        for _ in 0..50 {
            // The parent's turn has moved both positions.
            let _ = sys::read(down[0], &mut b);
            end.tx += 10;
            end.rx += 10;
            let r = (end.put(10), end.get(10));
            if (r.0.as_str(), r.1.as_str()) != ("put 10", "got 10") {
                log!("child {r:?}");
            }
            let _ = sys::write(up[1], b"x");
        }
        0
    });
    let mut b = [0; 1];
    for i in 0..50 {
        w.start_far(&c, "pong 10");
        let mut far = End { ..c.end };
        for _ in 0..10 {
            far.put(1);
            far.get(1);
        }
        log_unless(i, &w.finish(), "ponged");
        c.end = far;
        w.start_far(&c, "get 10");
        sys::write(down[1], b"x").expect("write");
        log_unless(i, &w.finish(), "got 10");
        log_unless(i, &w.far(&c, "put 10"), "put 10");
        sys::read(up[0], &mut b).expect("read");
        c.tx += 10;
        c.rx += 10;
    }
    log!("{}", sys::wait(pid));
    w.still_good(&mut c);
}

/// Parent and child at the same time, each with a direction of its own.
fn fork_both_at_once(w: &World) {
    const N: usize = 600_000;
    let mut c = w.pair();
    let mut end = c.end;
    w.start_far(&c, &format!("get {N}"));
    let pid = sys::fork(|| {
        log!("child {}", end.get(N));
        0
    });
    log!("{} far {}", c.put(N), w.finish());
    log!("far {}", w.far(&c, &format!("put {N}")));
    log!("{}", sys::wait(pid));
    c.rx += N as u64;
    w.still_good(&mut c);
}

fn log_unless(i: usize, got: &str, want: &str) {
    if got != want {
        log!("{i}: {got} instead of {want}");
    }
}

fn fork_child_exits_no_eof(w: &World) {
    let mut c = w.pair();
    for _ in 0..3 {
        let pid = sys::fork(|| 3);
        log!("{}", sys::wait(pid));
        log!("no end: {}", w.far(&c, &format!("poll {} 30", libc::POLLIN)));
        w.still_good(&mut c);
    }
}

fn fork_eof_after_last_close(w: &World) {
    let c = w.pair();
    let gate = sys::pipe();
    let pid = sys::fork(|| {
        let mut b = [0; 1];
        let _ = sys::read(gate[0], &mut b);
        0
    });
    log!("{}", show(sys::close(c.fd)));
    log!("no end: {}", w.far(&c, &format!("poll {} 50", libc::POLLIN)));
    sys::write(gate[1], b"x").expect("write");
    log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
}

/// The server that forks a child per connection: nothing was said before the fork.
fn fork_before_warm_up(w: &World) {
    for _ in 0..5 {
        let mut c = w.cold_on("4");
        let far = c.far;
        let pid = sys::fork(|| {
            for _ in 0..300 {
                c.get(1);
                c.put(1);
            }
            log!("child {}", c.get(50_000));
            log!("child {}", c.put(50_000));
            0
        });
        log!("{}", show(sys::close(c.fd)));
        for _ in 0..300 {
            w.ask(&format!("put {far} 1"));
            w.ask(&format!("get {far} 1"));
        }
        log!("far {} {}", w.ask(&format!("put {far} 50000")), w.ask(&format!("get {far} 50000")));
        log!("{} far {}", sys::wait(pid), w.ask(&format!("drain {far}")));
        w.ask(&format!("close {far}"));
    }
}

fn fork_many_children(w: &World) {
    let mut c = w.pair();
    for _ in 0..20 {
        let mut end = c.end;
        let pid = sys::fork(|| i32::from(end.put(500) != "put 500"));
        log!("{} far {}", sys::wait(pid), w.far(&c, "get 500"));
        c.tx += 500;
    }
    w.still_good(&mut c);
}

fn fork_of_fork(w: &World) {
    let c = w.pair();
    let mut end = c.end;
    let pid = sys::fork(|| {
        let inner = sys::fork(|| {
            log!("grandchild {}", end.put(3000));
            0
        });
        let _ = sys::close(c.fd);
        log!("{}", sys::wait(inner));
        0
    });
    log!("{}", show(sys::close(c.fd)));
    log!("far {}", w.far(&c, "drain"));
    log!("{}", sys::wait(pid));
}

static IN_LOADER: AtomicBool = AtomicBool::new(false);

/// The first library is told of under the loader's lock, which is then held until the flag is off again.
unsafe extern "C" fn hold_loader(_: *mut libc::dl_phdr_info, _: usize, _: *mut libc::c_void) -> i32 {
    IN_LOADER.store(true, Ordering::Release);
    while IN_LOADER.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    1
}

/// The child finds the loader's lock taken, for ever: no call on a socket may want it.
fn fork_while_another_is_in_the_loader(w: &World) {
    let mut c = w.pair();
    let (l, port) = listener(&address("4", 0), 5);
    let other = later(0, || {
        // SAFETY: the callback matches.
        unsafe { libc::dl_iterate_phdr(Some(hold_loader), ptr::null_mut()) }
    });
    while !IN_LOADER.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    let mut end = c.end;
    w.start_far(&c, "pong 50");
    let pid = sys::fork(|| {
        // SAFETY: no pointers.
        unsafe { libc::alarm(20) };
        log!("{}", (0..50).all(|_| end.put(1) == "put 1" && end.get(1) == "got 1"));
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        log!("{}", show(sys::connect(fd, &address("4", port))));
        let a = sys::accept(l, None).expect("accept") as i32;
        let (mut near, mut far) = (End::new(fd), End::new(a));
        log!("{}", (0..50).all(|_| near.put(1) == "put 1" && far.get(1) == "got 1"));
        log!("{}", show(sys::close(fd)));
        0
    });
    log!("{} {}", sys::wait(pid), w.finish());
    IN_LOADER.store(false, Ordering::Release);
    log!("{}", other.join().is_ok());
    (c.tx, c.rx) = (c.tx + 50, c.rx + 50);
    w.still_good(&mut c);
}

fn fork_shutdown_by_child(w: &World) {
    let mut c = w.pair();
    let pid = sys::fork(|| {
        log!("child {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
        0
    });
    log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
    log!("{}", show(sys::send(c.fd, b"x", libc::MSG_NOSIGNAL)));
    w.far(&c, "put 100");
    log!("{}", c.get(100));
}

fn fork_child_is_killed(w: &World) {
    let mut c = w.pair();
    let mut end = c.end;
    let pid = sys::fork(|| {
        // Blocked in a read when it dies.
        let _ = end.get(1);
        0
    });
    sys::sleep_ms(60);
    sys::kill(pid, libc::SIGKILL);
    log!("{}", sys::wait(pid));
    w.still_good(&mut c);
}

/// A child that sits in a read of the connection until it is killed.
fn reading_child(c: &Conn) -> i32 {
    let mut end = c.end;
    let pid = sys::fork(|| {
        let _ = end.get(1);
        0
    });
    sys::sleep_ms(30);
    pid
}

/// A killed child says no goodbye, and may have been in the kernel: the connection is upgraded all the same.
fn fork_child_is_killed_before_the_upgrade(w: &World) {
    let mut c = w.cold_on("4");
    let pid = reading_child(&c);
    sys::kill(pid, libc::SIGKILL);
    log!("{}", sys::wait(pid));
    w.warm(&mut c, 400);
    w.still_good(&mut c);
}

/// Made by a function of libc that forks by itself.
fn forkpty_child_is_killed_before_the_upgrade(w: &World) {
    let mut c = w.cold_on("4");
    let (mut end, mut terminal) = (c.end, -1);
    // SAFETY: null is for what is not asked or wanted.
    let pid = unsafe { libc::forkpty(&mut terminal, ptr::null_mut(), ptr::null(), ptr::null()) };
    if pid == 0 {
        let _ = end.get(1);
        // SAFETY: no pointers.
        unsafe { libc::_exit(0) };
    }
    sys::sleep_ms(30);
    sys::kill(pid, libc::SIGKILL);
    log!("{} {}", sys::wait(pid), show(sys::close(terminal)));
    w.warm(&mut c, 400);
    w.still_good(&mut c);
}

/// Several, and none of them has been waited for when the connection is used.
fn fork_children_are_killed_one_by_one(w: &World) {
    let mut c = w.cold_on("4");
    let pids: Vec<_> = (0..6).map(|_| reading_child(&c)).collect();
    for p in &pids {
        sys::kill(*p, libc::SIGKILL);
        // Dead, not only told to die: it might take a byte with it.
        // SAFETY: all-zero is a valid siginfo_t, which is live over the call.
        let r = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, *p as u32, &mut info, libc::WEXITED | libc::WNOWAIT)
        };
        assert_eq!(r, 0);
    }
    w.warm(&mut c, 800);
    w.still_good(&mut c);
    log!("{:?}", pids.into_iter().map(sys::wait).collect::<Vec<_>>());
}

/// The child of a killed server goes on alone.
fn fork_parent_is_killed(w: &World) {
    let c = w.cold_on("4");
    let (up, go) = (sys::pipe(), sys::pipe());
    let mut end = c.end;
    let parent = sys::fork(|| {
        let child = sys::fork(|| {
            let _ = sys::read(go[0], &mut [0; 1]);
            for i in 0..400 {
                log_unless(i, &end.get(1), "got 1");
                log_unless(i, &end.put(1), "put 1");
            }
            let good = end.put(5000) == "put 5000" && end.get(5000) == "got 5000";
            let _ = sys::write(up[1], if good { b"y" } else { b"n" });
            0
        });
        sys::wait(child);
        0
    });
    log!("{}", show(sys::close(c.fd)));
    sys::sleep_ms(50);
    sys::kill(parent, libc::SIGKILL);
    log!("{}", sys::wait(parent));
    sys::write(go[1], b"x").expect("write");
    for i in 0..400 {
        log_unless(i, &w.far(&c, "put 1"), "put 1");
        log_unless(i, &w.far(&c, "get 1"), "got 1");
    }
    log!("far {} {}", w.far(&c, "get 5000"), w.far(&c, "put 5000"));
    let mut b = [0; 1];
    log!("{} {}", show(sys::read(up[0], &mut b)), b[0] as char);
    log!("far {}", w.far(&c, "drain"));
}

/// Once the other holder is dead, a close is the last one: unread bytes make it a reset.
fn fork_child_is_killed_then_close(w: &World) {
    let c = w.pair();
    let pid = reading_child(&c);
    sys::kill(pid, libc::SIGKILL);
    log!("{}", sys::wait(pid));
    w.far(&c, "put 100");
    c.arrived(100);
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
}

fn prefork_accept(w: &World) {
    let (l, port) = listener(&address("4", 0), 10);
    let pid = sys::fork(|| {
        for _ in 0..3 {
            let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
            for _ in 0..200 {
                e.get(1);
                e.put(1);
            }
            log!("child {} {}", e.get(5000), show(sys::close(e.fd)));
        }
        0
    });
    log!("{}", show(sys::close(l)));
    for _ in 0..3 {
        let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        for _ in 0..200 {
            w.ask(&format!("put {far} 1"));
            w.ask(&format!("get {far} 1"));
        }
        w.ask(&format!("put {far} 5000"));
        log!("far {}", w.ask(&format!("drain {far}")));
        w.ask(&format!("close {far}"));
    }
    log!("{}", sys::wait(pid));
}

fn prefork_shared_listener(w: &World) {
    let (l, port) = listener(&address("4", 0), 10);
    let kids: Vec<_> = (0..3)
        .map(|_| {
            sys::fork(|| {
                loop {
                    let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
                    let mut b = [0; 1];
                    // The first byte says: serve, or stop.
                    if sys::read(e.fd, &mut b) != Ok(1) || b[0] == b'!' {
                        return 0;
                    }
                    e.rx += 1;
                    e.put(1);
                    for _ in 0..100 {
                        e.get(1);
                        e.put(1);
                    }
                }
            })
        })
        .collect();
    let mut good = 0;
    for _ in 0..12 {
        let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        let mut all = true;
        for _ in 0..101 {
            all &= w.ask(&format!("put {far} 1")) == "put 1" && w.ask(&format!("get {far} 1")) == "got 1";
        }
        good += u32::from(all);
        w.ask(&format!("close {far}"));
    }
    for _ in &kids {
        let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        w.ask(&format!("say {far} !"));
        w.ask(&format!("drain {far}"));
    }
    log!("{good} {:?}", kids.into_iter().map(sys::wait).collect::<Vec<_>>());
}

/// Workers that listen at one port, each with a socket of its own.
fn reuseport_workers(w: &World) {
    let worker = |port: u16| {
        let a = address("4", port);
        let fd = sys::socket(a.family(), libc::SOCK_STREAM | libc::SOCK_CLOEXEC).expect("socket") as i32;
        sys::setsockopt(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).expect("SO_REUSEPORT");
        sys::bind(fd, &a).expect("bind");
        sys::listen(fd, 20).expect("listen");
        (fd, sys::getsockname(fd).expect("getsockname").port())
    };
    let (first, port) = worker(0);
    let (second, _) = worker(port);
    let serve = |l: i32| {
        sys::fork(|| {
            loop {
                let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
                while e.get(1) == "got 1" && e.put(1) == "put 1" {}
                let _ = sys::close(e.fd);
            }
        })
    };
    let kids = [serve(first), serve(second)];
    sys::close(first).expect("close");
    sys::close(second).expect("close");
    let mut good = 0;
    for _ in 0..8 {
        let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        let all = (0..150)
            .all(|_| w.ask(&format!("put {far} 1")) == "put 1" && w.ask(&format!("get {far} 1")) == "got 1");
        good += u32::from(all);
        w.ask(&format!("close {far}"));
    }
    kids.iter().for_each(|k| sys::kill(*k, libc::SIGKILL));
    log!("{good} {:?}", kids.map(sys::wait));
}

/// `--serve FD`: what the new program of a binary upgrade does with the listener that it finds.
pub fn serve_inherited(l: i32) -> i32 {
    let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
    for _ in 0..300 {
        e.get(1);
        e.put(1);
    }
    i32::from(e.get(5000) != "got 5000" || e.put(5000) != "put 5000")
}

/// The program replaces itself by a new one that inherits the listener; its connections are served to the end.
fn binary_upgrade(w: &World) {
    let (l, port) = listener(&address("4", 0), 10);
    sys::fcntl(l, libc::F_SETFD, 0).expect("F_SETFD");
    let mut old = w.pair();
    // Inherited as well, by mistake: the new program does not know of it.
    let mut leaked = w.pair();
    sys::fcntl(leaked.fd, libc::F_SETFD, 0).expect("F_SETFD");
    let exe = std::env::current_exe().expect("our own path");
    let exe = exe.to_str().expect("utf-8").to_string();
    let pid = sys::fork(|| exec(&exe, &["sockets", "--serve", &l.to_string()]));
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    for i in 0..300 {
        log_unless(i, &w.ask(&format!("put {far} 1")), "put 1");
        log_unless(i, &w.ask(&format!("get {far} 1")), "got 1");
    }
    w.still_good(&mut old);
    w.still_good(&mut leaked);
    log!("far {} {}", w.ask(&format!("put {far} 5000")), w.ask(&format!("get {far} 5000")));
    log!("{} {}", sys::wait(pid), show(sys::close(l)));
    w.warm(&mut old, 100);
    log!("{} far {}", show(sys::close(old.fd)), w.far(&old, "drain"));
    log!("{} far {}", show(sys::close(leaked.fd)), w.far(&leaked, "drain"));
}

/// Becomes another program; only libc between fork and here.
pub fn exec(prog: &str, args: &[&str]) -> i32 {
    let prog = CString::new(prog).expect("no zero");
    let args: Vec<_> = args.iter().map(|a| CString::new(*a).expect("no zero")).collect();
    let mut argv: Vec<_> = args.iter().map(|a| a.as_ptr()).collect();
    argv.push(ptr::null());
    // SAFETY: an ended array of live C strings.
    unsafe { libc::execv(prog.as_ptr(), argv.as_ptr()) };
    127
}

fn exec_cat(w: &World) {
    let c = w.pair();
    let pid = sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        sys::dup2(c.fd, 1).expect("dup2");
        exec("/bin/cat", &["cat"])
    });
    log!("{}", show(sys::close(c.fd)));
    w.far(&c, "say hello\nworld");
    log!("far {} ", w.far(&c, "hear"));
    w.far(&c, "shutdown 1");
    log!("far {} {}", w.far(&c, "hear"), w.far(&c, "hear"));
    log!("{}", sys::wait(pid));
}

/// Bytes that were under way when the program changed are the new program's.
fn exec_cat_with_data_waiting(w: &World) {
    let c = w.pair();
    w.far(&c, "say first\nsecond");
    c.arrived(12);
    let pid = sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        sys::dup2(c.fd, 1).expect("dup2");
        exec("/bin/cat", &["cat"])
    });
    log!("{}", show(sys::close(c.fd)));
    log!("far {}", w.far(&c, "hear"));
    w.far(&c, "say third");
    w.far(&c, "shutdown 1");
    log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
}

/// A child that becomes cat, from the connection to `out`.
fn cat(c: &Conn, out: i32) -> i32 {
    sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        sys::dup2(out, 1).expect("dup2");
        exec("/bin/cat", &["cat"])
    })
}

/// All that comes up to the end.
pub fn text(fd: i32) -> String {
    let (mut all, mut b) = (Vec::new(), [0; 256]);
    while let Ok(n @ 1..) = sys::read(fd, &mut b) {
        all.extend_from_slice(&b[..n as usize]);
    }
    format!("{:?}", String::from_utf8_lossy(&all))
}

/// The peer waits for an answer, in each way there is, when the connection is handed to another program.
fn exec_while_the_peer_sleeps(w: &World) {
    for how in ["read", "poll", "select", "epoll"] {
        let c = w.pair();
        w.far(&c, "say first\nsecond");
        c.arrived(12);
        if how == "read" {
            w.start_far(&c, "hear");
        } else {
            w.start_far(&c, &format!("await {how}"));
        }
        sys::sleep_ms(30);
        let pid = cat(&c, c.fd);
        log!("{}", show(sys::close(c.fd)));
        log!("{how}: far {}", w.finish());
        if how != "read" {
            log!("far {}", w.far(&c, "hear"));
        }
        w.far(&c, "shutdown 1");
        log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
    }
}

/// The peer's own bytes go through memory, and it waits for the first answer ever: in the kernel.
fn exec_after_an_upload(w: &World) {
    let mut c = w.cold_on("4");
    for i in 0..400 {
        w.start_far(&c, "put 500");
        let got = c.get(500);
        log_unless(i, &got, "got 500");
        w.finish();
    }
    w.far(&c, "say first\nsecond");
    c.arrived(12);
    w.start_far(&c, "hear");
    sys::sleep_ms(30);
    let pid = cat(&c, c.fd);
    log!("{}", show(sys::close(c.fd)));
    log!("far {}", w.finish());
    w.far(&c, "shutdown 1");
    log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
}

/// More is under way than TCP takes at once: the peer that waits for an answer moves the rest bit by bit.
fn exec_with_tcp_full(w: &World) {
    for how in ["read", "poll", "select", "epoll"] {
        let c = w.pair();
        let u = sys::unix_pair(libc::SOCK_STREAM);
        log!("{}", w.far(&c, "put 60000"));
        c.arrived(60_000);
        w.far(&c, &format!("setopt {} {} 4096", libc::SOL_SOCKET, libc::SO_SNDBUF));
        sys::setsockopt(c.fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096).expect("SO_RCVBUF");
        if how == "read" {
            w.start_far(&c, "get 1");
        } else {
            w.start_far(&c, &format!("await {how}"));
        }
        sys::sleep_ms(30);
        log!("{}", show(sys::sendmsg(u[0], &[b"take it"], 0, Some(c.fd))));
        let pid = sys::fork(|| {
            let r = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0);
            let mut e = End { fd: r.fds[0], ..c.end };
            sys::sleep_ms(100);
            log!("child {} {}", e.get_chunks(60_000, 1000), e.put(1));
            0
        });
        log!("{how}: {} far {}", show(sys::close(c.fd)), w.finish());
        u.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
        log!("{}", sys::wait(pid));
        w.far(&c, "close");
    }
}

/// A peer of our own, that says something and then makes no call until told to end; what `gate` says then.
fn idle_peer(port: u16, told: i32, then: impl FnOnce(i32)) -> i32 {
    sys::fork(|| {
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        sys::connect(fd, &address("4", port)).expect("connect");
        let mut e = End::new(fd);
        for _ in 0..200 {
            e.put(1);
            e.get(1);
        }
        // Not told: when, beside what this process tells, is not said.
        assert_eq!(sys::send(fd, b"last words", 0), Ok(10));
        then(fd);
        let _ = sys::read(told, &mut [0; 1]);
        0
    })
}

/// The end of a connection with such a peer, whose words are here, the peer, and its gate; `then` is the peer's last call.
pub fn beside_an_idle_peer(then: impl FnOnce(i32)) -> (End, i32, [i32; 2]) {
    let (l, port) = listener(&address("4", 0), 10);
    let gate = sys::pipe();
    let peer = idle_peer(port, gate[0], then);
    let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
    for _ in 0..200 {
        e.get(1);
        e.put(1);
    }
    e.arrived(10);
    (e, peer, gate)
}

/// `gone_first`: the peer ends before the connection is handed on; `late`: not before all has been read.
fn exec_with(gone_first: bool, late: bool) {
    let (l, port) = listener(&address("4", 0), 10);
    let (gate, out) = (sys::pipe(), sys::pipe());
    let peer = idle_peer(port, gate[0], |_| ());
    let mut e = End::new(sys::accept4(l, libc::SOCK_CLOEXEC).expect("accept") as i32);
    for _ in 0..200 {
        e.get(1);
        e.put(1);
    }
    e.arrived(10);
    let go = || sys::write(gate[1], b"x").expect("write");
    if gone_first {
        go();
        log!("{}", sys::wait(peer));
    }
    let pid = cat(&Conn { end: e, far: -1 }, out[1]);
    sys::close(e.fd).expect("close");
    sys::close(out[1]).expect("close");
    sys::sleep_ms(50);
    if late {
        let mut b = [0; 10];
        log!("{}", show(sys::read(out[0], &mut b)));
    }
    if !gone_first {
        go();
        log!("{}", sys::wait(peer));
    }
    log!("{} {}", text(out[0]), sys::wait(pid));
}

fn exec_then_the_peer_exits(_: &World) {
    exec_with(false, false);
}

fn exec_after_the_peer_has_ended(_: &World) {
    exec_with(true, false);
}

/// Bytes unread in the ring, and the peer's next ones go by TCP.
fn exec_after_the_peer_has_gone_back(w: &World) {
    let c = w.pair();
    w.far(&c, "say first");
    w.far(&c, &format!("setopt {} {} 1", libc::SOL_SOCKET, libc::SO_TIMESTAMPING));
    w.far(&c, "say second\n");
    c.arrived(12);
    let pid = cat(&c, c.fd);
    log!("{}", show(sys::close(c.fd)));
    log!("far {}", w.far(&c, "hear"));
    w.far(&c, "shutdown 1");
    log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
}

/// The kernel has forgotten the peer's address by then.
fn exec_after_both_have_shut(w: &World) {
    let c = w.pair();
    let out = sys::pipe();
    w.far(&c, "say words");
    c.arrived(5);
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    c.settle(libc::POLLHUP);
    let pid = cat(&c, out[1]);
    sys::close(c.fd).expect("close");
    sys::close(out[1]).expect("close");
    log!("{} {}", text(out[0]), sys::wait(pid));
}

fn exec_with_an_idle_peer(_: &World) {
    exec_with(false, true);
}

/// What is done with a connection that has ten bytes waiting and whose peer makes no call, in a process with no other
/// thread: stdio reads by names that no library sees.
fn with_an_idle_peer(kill: bool, what: impl FnOnce(&End)) {
    let (e, peer, gate) = beside_an_idle_peer(|_| ());
    what(&e);
    if kill {
        sys::kill(peer, libc::SIGKILL);
    } else {
        sys::write(gate[1], b"x").expect("write");
    }
    log!("{}", sys::wait(peer));
}

unsafe extern "C" {
    fn getchar() -> i32;
}

fn from_stdin(n: usize) -> String {
    // SAFETY: no other thread is in stdio.
    (0..n).map(|_| u8::try_from(unsafe { getchar() }).map_or('!', char::from)).collect()
}

fn stdin_with_an_idle_peer(_: &World) {
    with_an_idle_peer(false, |e| {
        log!("{} {}", show(sys::dup2(e.fd, 0)), show(sys::close(e.fd)));
        let mut b = [0; 4];
        log!("{} {:?}", show(sys::read(0, &mut b)), String::from_utf8_lossy(&b));
        log!("{:?}", from_stdin(6));
        log!("{}", show(sys::write(0, b"thanks")));
    });
    log!("{:?}", from_stdin(1));
}

fn stdin_of_a_killed_peer(_: &World) {
    with_an_idle_peer(true, |e| {
        log!("{} {}", show(sys::dup2(e.fd, 0)), show(sys::close(e.fd)));
    });
    log!("{:?}", from_stdin(11));
}

fn fdopen_with_an_idle_peer(_: &World) {
    with_an_idle_peer(false, |e| {
        let mut b = [0u8; 11];
        // SAFETY: the scenario hands the fd over to stdio; `b` has room.
        unsafe {
            let f = libc::fdopen(e.fd, c"r".as_ptr());
            libc::fgets(b.as_mut_ptr().cast(), 11, f);
        }
        log!("{:?}", String::from_utf8_lossy(&b));
    });
}

/// The process that owns the connection execs itself, without fork.
fn exec_in_place(w: &World) {
    let (l, port) = listener(&address("4", 0), 10);
    let pid = sys::fork(|| {
        let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
        for _ in 0..200 {
            e.get(1);
            e.put(1);
        }
        sys::write(e.fd, b"before exec\n").expect("write");
        sys::dup2(e.fd, 0).expect("dup2");
        sys::dup2(e.fd, 1).expect("dup2");
        exec("/bin/cat", &["cat"])
    });
    sys::close(l).expect("close");
    let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
    for _ in 0..200 {
        w.ask(&format!("put {far} 1"));
        w.ask(&format!("get {far} 1"));
    }
    log!("far {}", w.ask(&format!("hear {far}")));
    w.ask(&format!("say {far} after exec"));
    w.ask(&format!("shutdown {far} 1"));
    log!("far {} {}", w.ask(&format!("hear {far}")), sys::wait(pid));
}

fn vfork_exec(w: &World) {
    let mut c = w.pair();
    let (path, arg) = (c"/bin/true", c"true");
    let argv = [arg.as_ptr(), ptr::null()];
    for _ in 0..3 {
        // SAFETY: the child only execs or leaves, with arguments made before.
        #[allow(deprecated, reason = "programs call it; so must the test")]
        let pid = unsafe {
            let pid = libc::vfork();
            if pid == 0 {
                libc::execv(path.as_ptr(), argv.as_ptr());
                libc::_exit(127);
            }
            pid
        };
        log!("{}", sys::wait(pid));
        w.still_good(&mut c);
    }
}

fn spawn_cat(w: &World) {
    let c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    sys::fcntl(d, libc::F_SETFD, libc::FD_CLOEXEC).expect("F_SETFD");
    let mut pid = 0;
    let argv = [c"cat".as_ptr().cast_mut(), ptr::null_mut()];
    let env = [ptr::null_mut()];
    // SAFETY: all-zero is replaced by init; every pointer is live.
    let r = unsafe {
        let mut fa: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        libc::posix_spawn_file_actions_init(&mut fa);
        libc::posix_spawn_file_actions_adddup2(&mut fa, d, 0);
        libc::posix_spawn_file_actions_adddup2(&mut fa, d, 1);
        let r =
            libc::posix_spawn(&mut pid, c"/bin/cat".as_ptr(), &fa, ptr::null(), argv.as_ptr(), env.as_ptr());
        libc::posix_spawn_file_actions_destroy(&mut fa);
        r
    };
    log!("{r} {} {}", show(sys::close(c.fd)), show(sys::close(d)));
    w.far(&c, "say spawned");
    w.far(&c, "shutdown 1");
    log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
}

/// `head -n1` by posix_spawnp(3), with these numbers duplicated to those: its result and the process.
pub fn spawn_head(duplicates: &[(i32, i32)]) -> (i32, i32) {
    let mut pid = 0;
    let argv = [c"head".as_ptr().cast_mut(), c"-n1".as_ptr().cast_mut(), ptr::null_mut()];
    let env = [ptr::null_mut()];
    // SAFETY: all-zero is replaced by init; every pointer is live.
    let r = unsafe {
        let mut fa: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        libc::posix_spawn_file_actions_init(&mut fa);
        for (from, to) in duplicates {
            libc::posix_spawn_file_actions_adddup2(&mut fa, *from, *to);
        }
        let r = libc::posix_spawnp(&mut pid, c"head".as_ptr(), &fa, ptr::null(), argv.as_ptr(), env.as_ptr());
        libc::posix_spawn_file_actions_destroy(&mut fa);
        r
    };
    (r, pid)
}

/// Spawns a program on a duplicate that is made for it only there, while we keep ours.
fn spawn_and_go_on(w: &World) {
    let c = w.pair();
    w.far(&c, "say first\nsecond\n");
    c.arrived(13);
    let (r, pid) = spawn_head(&[(c.fd, 0), (c.fd, 1)]);
    w.start_far(&c, "hear");
    log!("{r} far {} {}", w.finish(), sys::wait(pid));
    log!("{}", show(sys::send(c.fd, b"ours\n", 0)));
    log!("far {}", w.far(&c, "hear"));
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "hear"));
}

/// As above, in a program whose other threads use the connection at all times.
fn spawn_beside_senders(w: &World) {
    let c = w.pair();
    w.far(&c, "say first\nsecond\n");
    c.arrived(13);
    let (sent, go_on) = (AtomicU32::new(0), AtomicBool::new(true));
    let r = std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while go_on.load(Ordering::Relaxed) && sent.load(Ordering::Relaxed) < 4000 {
                    match sys::send(c.fd, b"m", libc::MSG_NOSIGNAL) {
                        Ok(_) => _ = sent.fetch_add(1, Ordering::Relaxed),
                        Err(e) => return log!("send {}", sys::errno_name(e)),
                    }
                }
            });
        }
        let (r, pid) = spawn_head(&[(c.fd, 0)]);
        log!("{}", sys::wait(pid));
        go_on.store(false, Ordering::Relaxed);
        r
    });
    let n = sent.load(Ordering::Relaxed);
    log!("{r} {}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    log!("all of them {}", w.far(&c, "tally") == format!("m {n} h 0 other 0"));
}

/// Commands of a shell that read from a connection which they inherit.
fn system_and_popen(w: &World) {
    unsafe extern "C" {
        fn popen(command: *const libc::c_char, kind: *const libc::c_char) -> *mut libc::FILE;
        fn pclose(f: *mut libc::FILE) -> i32;
    }
    let c = w.pair();
    let d = sys::dup(c.fd).expect("dup") as i32;
    w.far(&c, "say first\n");
    c.arrived(6);
    w.start_far(&c, "hear");
    sys::sleep_ms(30);
    let command = CString::new(format!("head -n1 <&{d}; echo one >&{d}")).expect("no zero");
    // SAFETY: a C string.
    log!("{}", unsafe { libc::system(command.as_ptr()) });
    log!("far {}", w.finish());
    w.far(&c, "say second\n");
    let command = CString::new(format!("head -n1 <&{d}; echo two >&{d}")).expect("no zero");
    let mut line = [0u8; 64];
    // SAFETY: C strings, and a buffer of the size given.
    let r = unsafe {
        let f = popen(command.as_ptr(), c"r".as_ptr());
        assert!(!libc::fgets(line.as_mut_ptr().cast(), 64, f).is_null());
        pclose(f)
    };
    log!("{r} {:?} far {}", String::from_utf8_lossy(&line[..7]), w.far(&c, "hear"));
    log!("{} {} far {}", show(sys::close(c.fd)), show(sys::close(d)), w.far(&c, "hear"));
}

/// The program that was to come is not there: we go on as before.
fn exec_that_fails(w: &World) {
    let mut c = w.pair();
    let mut kept = w.pair();
    sys::fcntl(kept.fd, libc::F_SETFD, 0).expect("F_SETFD");
    w.far(&c, "put 1000");
    w.far(&kept, "put 1000");
    kept.arrived(1000);
    w.start_far(&kept, "get 500");
    for _ in 0..3 {
        log!("{} {}", exec("/nonexistent/program", &["program"]), sys::errno_name(sys::errno()));
    }
    log!("{} {} {}", c.get(1000), kept.put(500), w.finish());
    log!("{}", kept.get(1000));
    w.still_good(&mut c);
    w.still_good(&mut kept);
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
}

/// A child that execs something else, with the fd inherited and unused.
fn exec_unrelated(w: &World) {
    let mut c = w.pair();
    sys::fcntl(c.fd, libc::F_SETFD, 0).expect("F_SETFD");
    for _ in 0..3 {
        let pid = sys::fork(|| exec("/bin/true", &["true"]));
        log!("{}", sys::wait(pid));
        w.still_good(&mut c);
    }
}

fn cloexec_is_kept(w: &World) {
    let c = w.pair();
    let gate = sys::pipe();
    let pid = sys::fork(|| {
        sys::dup2(gate[0], 0).expect("dup2");
        exec("/bin/cat", &["cat"])
    });
    // The new program does not hold the connection (its own at-exec close came first).
    sys::sleep_ms(100);
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
    gate.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
    log!("{}", sys::wait(pid));
}

fn rights_to_a_child(w: &World) {
    let u = sys::unix_pair(libc::SOCK_STREAM);
    // Forked before the connection exists: it knows nothing of it.
    let pid = sys::fork(|| {
        let r = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0);
        let n = w.warm_up.min(200) as u64;
        let mut e = End { fd: r.fds[0], tx: n, rx: n };
        log!("child {} {}", show(r.result), e.get(1000));
        log!("child {}", e.put(1000));
        log!("child {}", e.get(100_000));
        0
    });
    let c = w.pair();
    w.far(&c, "put 1000");
    c.arrived(1000);
    log!("{}", show(sys::sendmsg(u[0], &[b"take it"], 0, Some(c.fd))));
    log!("{}", show(sys::close(c.fd)));
    log!("far {} {}", w.far(&c, "get 1000"), w.far(&c, "put 100000"));
    log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
}

fn rights_by_sendmmsg(w: &World) {
    let u = sys::unix_pair(libc::SOCK_DGRAM);
    let pid = sys::fork(|| {
        let r = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0);
        let n = w.warm_up.min(200) as u64;
        let mut e = End { fd: r.fds[0], tx: n, rx: n };
        log!("child {} {} {}", show(r.result), e.get(1000), e.put(1000));
        0
    });
    let c = w.pair();
    w.far(&c, "put 1000");
    c.arrived(1000);
    w.start_far(&c, "get 1000");
    sys::sleep_ms(30);
    log!("{}", show(sys::sendmmsg_passing(u[0], b"take it", c.fd)));
    log!("{}", show(sys::close(c.fd)));
    log!("far {} {} far {}", w.finish(), sys::wait(pid), w.far(&c, "drain"));
}

fn rights_to_ourselves(w: &World) {
    let mut c = w.pair();
    let u = sys::unix_pair(libc::SOCK_STREAM);
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    let r = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0);
    log!("{} {}", show(r.result), r.fds.len());
    w.still_good(&mut c);
    c.fd = r.fds[0];
    w.still_good(&mut c);
}

fn rights_and_close(w: &World) {
    let mut c = w.pair();
    let u = sys::unix_pair(libc::SOCK_STREAM);
    log!("{}", c.put(3000));
    log!("{}", show(sys::sendmsg(u[0], &[b"x"], 0, Some(c.fd))));
    // In flight between the two: open for all that, though nobody has its number.
    log!("{}", show(sys::close(c.fd)));
    log!("far {} {}", w.far(&c, "get 3000"), w.far(&c, &format!("poll {} 50", libc::POLLIN)));
    log!("far {}", w.far(&c, "put 2000"));
    let r = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0);
    c.fd = r.fds[0];
    log!("{}", c.get(2000));
    log!("{}", c.put(100));
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
}

fn daemon(w: &World, close_all: fn()) {
    let mut c = w.pair();
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let (l, own) = listener(&address("4", 0), 5);
    sys::close(l).expect("close");
    let pid = sys::fork(|| {
        let keep = sys::fcntl(1, libc::F_DUPFD, 1).map_or(-1, |f| f as i32);
        close_all();
        let _ = keep;
        // A connection of its own, after all that.
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        sys::connect(fd, &address("4", port)).expect("connect");
        let mut e = End::new(fd);
        for _ in 0..300 {
            e.put(1);
            e.get(1);
        }
        i32::from(e.put(5000) != "put 5000" || e.get(5000) != "got 5000")
    });
    let far: i32 = w.ask(&format!("accept {port}")).parse().expect("an fd");
    log!("far {}", w.ask(&format!("pong {far} 300")));
    log!("far {} {}", w.ask(&format!("get {far} 5000")), w.ask(&format!("put {far} 5000")));
    log!("{} far {}", sys::wait(pid), w.ask(&format!("drain {far}")));
    // The parent's connection lives on.
    w.still_good(&mut c);
    let _ = own;
}

/// daemon(3): the process that goes on with the connection is a child of the one that opened it.
fn daemonised(w: &World) {
    let c = w.pair();
    let up = sys::pipe();
    let mut end = c.end;
    let pid = sys::fork(|| {
        // SAFETY: no pointers.
        #[allow(deprecated, reason = "programs call it; so must the test")]
        let r = unsafe { libc::daemon(1, 1) };
        let good = r == 0 && end.get(2000) == "got 2000" && end.put(2000) == "put 2000";
        let _ = sys::write(up[1], if good { b"y" } else { b"n" });
        0
    });
    log!("{} {}", sys::wait(pid), show(sys::close(c.fd)));
    log!("far {} {}", w.far(&c, "put 2000"), w.far(&c, "get 2000"));
    let mut b = [0; 1];
    log!("{} {}", show(sys::read(up[0], &mut b)), b[0] as char);
    log!("far {}", w.far(&c, "drain"));
}

fn daemon_close_loop(w: &World) {
    daemon(w, || (0..1100).for_each(|fd| _ = sys::close(fd)));
}

fn daemon_close_range(w: &World) {
    daemon(w, || _ = sys::close_range(3, u32::MAX));
}

fn daemon_closefrom(w: &World) {
    unsafe extern "C" {
        fn closefrom(low: i32);
    }
    // SAFETY: the child owns nothing above 2 that it needs.
    daemon(w, || unsafe { closefrom(3) });
}

fn close_range_over_connections(w: &World) {
    let (a, mut b) = (w.pair(), w.pair());
    let d = sys::dup2(a.fd, 800).expect("dup2") as i32;
    let e = sys::dup2(b.fd, 801).expect("dup2") as i32;
    log!("{}", show(sys::close(a.fd)));
    log!("{}", show(sys::close_range(d as u32, e as u32)));
    log!("far {}", w.far(&a, "drain"));
    w.still_good(&mut b);
    log!("nothing there: {}", show(sys::close_range(900, 1000)));
    log!("the wrong way round: {}", show(sys::close_range(1000, 900)));
}

const CLOSE_RANGE_UNSHARE: u32 = 2;
const CLOSE_RANGE_CLOEXEC: u32 = 4;

/// What is only marked stays open here, and is gone in the next program.
fn close_range_cloexec(w: &World) {
    let mut c = w.pair();
    let d = sys::fcntl(c.fd, libc::F_DUPFD, 850).expect("F_DUPFD") as i32;
    let pid = sys::fork(|| {
        log!("{}", show(sys::close_range_flags(3, u32::MAX, CLOSE_RANGE_CLOEXEC)));
        let mut e = End { fd: d, ..c.end };
        log!("child {}", e.put(100));
        exec("/bin/sh", &["sh", "-c", "test ! -e /proc/self/fd/850"])
    });
    log!("{} far {}", sys::wait(pid), w.far(&c, "get 100"));
    c.tx += 100;
    w.still_good(&mut c);
    log!("{} {} far {}", show(sys::close(c.fd)), show(sys::close(d)), w.far(&c, "drain"));
}

/// A child with a table of its own from then on, which it has anyhow.
fn close_range_unshared(w: &World) {
    let (mut c, d) = (w.pair(), w.pair());
    let high = sys::dup2(d.fd, 900).expect("dup2") as u32;
    let pid = sys::fork(|| {
        log!("{}", show(sys::close_range_flags(high, u32::MAX, CLOSE_RANGE_UNSHARE)));
        let mut e = c.end;
        log!("{} {}", show(sys::write(900, b"x")), e.put(100));
        0
    });
    log!("{} far {}", sys::wait(pid), w.far(&c, "get 100"));
    c.tx += 100;
    w.still_good(&mut c);
    let mut d = d;
    w.still_good(&mut d);
}

/// A thread that leaves the common table: what it closes there is still open here.
fn close_range_unshared_by_a_thread(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    let high = sys::dup2(c.fd, 910).expect("dup2");
    log!("{}", show(sys::close(c.fd)));
    let t = std::thread::spawn(move || {
        let r = sys::close_range_flags(high as u32, high as u32, CLOSE_RANGE_UNSHARE);
        format!("{} {}", show(r), show(sys::write(high as i32, b"x")))
    });
    log!("{}", t.join().expect("no panic"));
    c.fd = 910;
    w.start_far(&c, "get 100");
    log!("{} {} {}", c.put(100), c.get(100), w.finish());
    w.still_good(&mut c);
    log!("{} far {}", show(sys::close(910)), w.far(&c, "drain"));
}

fn thread_then_fork(w: &World) {
    let mut c = w.pair();
    let other = w.pair();
    let ofd = other.fd;
    // A thread sits in a read on one connection while the process forks and uses the other.
    let t = std::thread::spawn(move || show(sys::recv(ofd, &mut [0; 1], 0)));
    sys::sleep_ms(30);
    for _ in 0..5 {
        let mut end = c.end;
        let pid = sys::fork(|| i32::from(end.put(1000) != "put 1000"));
        log!("{} far {}", sys::wait(pid), w.far(&c, "get 1000"));
        c.tx += 1000;
    }
    w.far(&other, "put 1");
    log!("{}", t.join().expect("no panic"));
    w.still_good(&mut c);
}

fn exit_without_close(w: &World) {
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let pid = sys::fork(|| {
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        sys::connect(fd, &address("4", port)).expect("connect");
        let mut e = End::new(fd);
        for _ in 0..200 {
            e.put(1);
            e.get(1);
        }
        e.put(12_345);
        0
    });
    let far: i32 = w.ask(&format!("accept {port}")).parse().expect("an fd");
    log!("far {}", w.ask(&format!("pong {far} 200")));
    log!("{} far {}", sys::wait(pid), w.ask(&format!("drain {far}")));
}

/// A server that drops its privileges in the child, as most do.
fn setuid_child(w: &World) {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() } == 0;
    let c = w.pair();
    let mut end = c.end;
    let pid = sys::fork(|| {
        // Where we are no root there is nothing to drop; the transcript is the same.
        // SAFETY: no pointers.
        let dropped = !root || unsafe { libc::setgid(65534) == 0 && libc::setuid(65534) == 0 };
        log!("child {dropped} {}", end.put(1000));
        log!("child {}", end.get(1000));
        0
    });
    log!("far {} {}", w.far(&c, "get 1000"), w.far(&c, "put 1000"));
    log!("{}", sys::wait(pid));
    log!("{} far {}", show(sys::close(c.fd)), w.far(&c, "drain"));
}

/// A worker in a jail, as another user, that goes on with one connection and takes a fresh one with it.
fn jailed_child(w: &World) {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() } == 0;
    let (c, mut cold) = (w.pair(), w.cold_on("4"));
    let mut end = c.end;
    let pid = sys::fork(|| {
        // SAFETY: a C string; no other pointers.
        let jailed = !root
            || unsafe {
                libc::chroot(c"/proc/self/fdinfo".as_ptr()) == 0
                    && libc::chdir(c"/".as_ptr()) == 0
                    && libc::setgroups(0, ptr::null()) == 0
                    && libc::setgid(65534) == 0
                    && libc::setuid(65534) == 0
            };
        log!("child {jailed} {} {}", end.put(1000), end.get(1000));
        for i in 0..400 {
            log_unless(i, &cold.get(1), "got 1");
            log_unless(i, &cold.put(1), "put 1");
        }
        log!("child {} {}", cold.get(5000), cold.put(5000));
        0
    });
    log!("{} {}", show(sys::close(c.fd)), show(sys::close(cold.fd)));
    log!("far {} {}", w.far(&c, "get 1000"), w.far(&c, "put 1000"));
    for i in 0..400 {
        log_unless(i, &w.far(&cold, "put 1"), "put 1");
        log_unless(i, &w.far(&cold, "get 1"), "got 1");
    }
    log!("far {} {}", w.far(&cold, "put 5000"), w.far(&cold, "get 5000"));
    log!("{} far {} {}", sys::wait(pid), w.far(&c, "drain"), w.far(&cold, "drain"));
}

/// Another process takes the fd out of ours; it is a plain socket there, which has lost nothing.
fn pidfd_getfd(w: &World) {
    let (go, up) = (sys::pipe(), sys::pipe());
    let parent = std::process::id();
    let pid = sys::fork(|| {
        let mut b = [0; 4];
        let _ = sys::read(go[0], &mut b);
        // SAFETY: no pointers; errors come back as negative fds.
        let fd = unsafe {
            let p = libc::syscall(libc::SYS_pidfd_open, parent, 0);
            libc::syscall(libc::SYS_pidfd_getfd, p, i32::from_ne_bytes(b), 0)
        };
        log!("child {}", fd >= 0 && sys::is_socket(fd as i32));
        let _ = sys::write(up[1], b"x");
        0
    });
    let mut c = w.pair();
    sys::write(go[1], &c.fd.to_ne_bytes()).expect("write");
    sys::read(up[0], &mut [0; 1]).expect("read");
    log!("{}", sys::wait(pid));
    w.still_good(&mut c);
}

/// Strict mode: any system call but read, write and exit kills.
fn sandbox_strict(w: &World) {
    let c = w.pair();
    let (fd, mut b) = (c.fd, [0u8; 200]);
    let more = crate::world::block(c.tx, 200);
    let pid = sys::fork(|| {
        // SAFETY: no pointers.
        if unsafe { libc::prctl(libc::PR_SET_SECCOMP, 1) } != 0 {
            return 1;
        }
        // Nothing here may allocate or log.
        let mut n = 0;
        while n < 200 {
            match sys::read(fd, &mut b[n..]) {
                Ok(k @ 1..) => n += k as usize,
                _ => break,
            }
        }
        let good = n == 200 && sys::write(fd, &more) == Ok(200);
        // SAFETY: no pointers. exit(2), not exit_group(2).
        unsafe { libc::syscall(libc::SYS_exit, if good { 0 } else { 2 }) };
        3
    });
    log!("{}", show(sys::close(c.fd)));
    w.start_far(&c, "delayput 200 60");
    log!("far {} {}", w.finish(), w.far(&c, "get 200"));
    log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
}

/// A filter that refuses what a library might want: memory to share, sockets, messages with descriptors.
fn sandbox_by_filter(w: &World) {
    let (mut c, mut cold) = (w.pair(), w.cold_on("4"));
    let mut refused = vec![libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 }];
    for nr in [libc::SYS_memfd_create, libc::SYS_socket, libc::SYS_sendmsg, libc::SYS_recvmsg] {
        // "If it is this number, the next; else skip it", and "kill the process".
        refused.push(libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: nr as u32 });
        refused.push(libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x8000_0000 });
    }
    refused.push(libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 });
    let pid = sys::fork(|| {
        let filter = libc::sock_fprog { len: refused.len() as u16, filter: refused.as_mut_ptr() };
        // SAFETY: no pointers, then a live program.
        let r = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter)
        };
        log!("filter {r} {} {}", c.put(1000), c.get(1000));
        for i in 0..400 {
            log_unless(i, &cold.get(1), "got 1");
            log_unless(i, &cold.put(1), "put 1");
        }
        log!("child {}", show(sys::close(c.fd)));
        0
    });
    log!("{} {}", show(sys::close(c.fd)), show(sys::close(cold.fd)));
    log!("far {} {}", w.far(&c, "get 1000"), w.far(&c, "put 1000"));
    for i in 0..400 {
        log_unless(i, &w.far(&cold, "put 1"), "put 1");
        log_unless(i, &w.far(&cold, "get 1"), "got 1");
    }
    log!("{} far {} {}", sys::wait(pid), w.far(&c, "drain"), w.far(&cold, "drain"));
}
