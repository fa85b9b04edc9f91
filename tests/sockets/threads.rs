//! Threads and signals: one socket used from two places at once, close under a blocked call, EINTR and SA_RESTART,
//! handlers that write.

use crate::{
    Scenario, log, s,
    sys::{self, show, show_epoll, show_poll},
    world::{World, later},
};
use libc::{EPOLLIN, POLLIN, SA_RESTART, SIGUSR1};
use std::{
    sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(send_and_receive_at_once),
    s!(close_while_another_reads),
    s!(close_while_another_polls),
    s!(shutdown_while_another_reads),
    s!(shutdown_while_another_writes).unforced(),
    s!(dup2_over_while_another_reads),
    s!(many_threads_many_connections),
    s!(eintr_in_recv),
    s!(restart_in_recv),
    s!(eintr_in_recv_with_timeout),
    s!(eintr_in_send),
    s!(eintr_in_send_after_some),
    s!(restart_in_send),
    s!(eintr_in_waitall_after_some),
    s!(eintr_in_poll),
    s!(eintr_in_select),
    s!(eintr_in_epoll),
    s!(ppoll_mask),
    s!(epoll_pwait_mask),
    s!(handler_writes),
    s!(handler_reads_another),
    s!(timer_storm),
    s!(errno_is_kept),
    s!(cancel_in_recv),
    s!(exit_while_others_block).procs(),
];

static COUNT: AtomicU32 = AtomicU32::new(0);
static FD: AtomicI32 = AtomicI32::new(-1);

extern "C" fn count(_: i32) {
    COUNT.fetch_add(1, Ordering::Relaxed);
}

fn send_and_receive_at_once(w: &World) {
    let c = w.pair();
    w.start_far(&c, "echo");
    let n = 3_000_000;
    let (mut tx, mut rx) = (c.end, c.end);
    rx.rx = c.tx;
    let t = later(0, move || tx.put_chunks(n, 777));
    log!("{}", rx.get_chunks(n, 1234));
    log!("{}", t.join().expect("no panic"));
    log!("{} {}", show(sys::shutdown(c.fd, libc::SHUT_WR)), rx.drain());
    log!("far {}", w.finish());
}

/// The blocked call keeps the socket; bytes that come wake it, and only then the connection ends.
fn close_while_another_reads(w: &World) {
    let c = w.pair();
    let mut end = c.end;
    let t = later(0, move || {
        let mut b = [0; 10];
        let r = sys::recv(end.fd, &mut b, 0);
        end.checked(r, &b)
    });
    sys::sleep_ms(100);
    log!("{}", show(sys::close(c.fd)));
    sys::sleep_ms(50);
    log!("still blocked: {}", !t.is_finished());
    log!("far {}", w.far(&c, "put 5"));
    log!("{}", t.join().expect("no panic"));
    log!("far {}", w.far(&c, "drain"));
}

fn close_while_another_polls(w: &World) {
    let c = w.pair();
    let fd = c.fd;
    let t = later(0, move || show_poll(sys::poll1(fd, POLLIN, 300)));
    sys::sleep_ms(60);
    log!("{}", show(sys::close(fd)));
    log!("{}", t.join().expect("no panic"));
    log!("far {}", w.far(&c, "drain"));
}

fn shutdown_while_another_reads(w: &World) {
    for how in [libc::SHUT_RD, libc::SHUT_RDWR] {
        let c = w.pair();
        let fd = c.fd;
        let t = later(0, move || show(sys::recv(fd, &mut [0; 10], 0)));
        sys::sleep_ms(60);
        log!("{}", show(sys::shutdown(fd, how)));
        log!("{}", t.join().expect("no panic"));
    }
}

fn shutdown_while_another_writes(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    let n = c.tx - before;
    let fd = c.fd;
    let t = later(0, move || show(sys::send(fd, &[0; 10], libc::MSG_NOSIGNAL)));
    sys::sleep_ms(60);
    log!("{}", show(sys::shutdown(fd, libc::SHUT_WR)));
    log!("{}", t.join().expect("no panic"));
    log!("far {}", w.far(&c, "drain") == format!("EOF after {n}"));
}

fn dup2_over_while_another_reads(w: &World) {
    let (a, mut b) = (w.pair(), w.pair());
    let mut end = a.end;
    let t = later(0, move || {
        let mut x = [0; 10];
        let r = sys::recv(end.fd, &mut x, 0);
        end.checked(r, &x)
    });
    sys::sleep_ms(60);
    log!("{}", sys::dup2(b.fd, a.fd) == Ok(i64::from(a.fd)));
    log!("far {}", w.far(&a, "put 5"));
    log!("{}", t.join().expect("no panic"));
    log!("far {}", w.far(&a, "drain"));
    b.fd = a.fd;
    w.still_good(&mut b);
}

fn many_threads_many_connections(w: &World) {
    let _ = w;
    let ts: Vec<_> = (0..6)
        .map(|_| {
            later(0, || {
                let (l, port) = crate::world::listener(&crate::world::address("4", 0), 5);
                let peer = later(0, move || {
                    let mut e = crate::world::End::new(sys::accept(l, None).expect("accept") as i32);
                    for _ in 0..2000 {
                        e.get(50);
                        e.put(50);
                    }
                    let r = e.drain();
                    let _ = (sys::close(e.fd), sys::close(l));
                    r
                });
                let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
                sys::connect(fd, &crate::world::address("4", port)).expect("connect");
                let mut e = crate::world::End::new(fd);
                let good = (0..2000).all(|_| e.put(50) == "put 50" && e.get(50) == "got 50");
                format!("{good} {} {}", show(sys::close(fd)), peer.join().expect("no panic"))
            })
        })
        .collect();
    for t in ts {
        log!("{}", t.join().expect("no panic"));
    }
}

/// Signals this thread a few times, so that one comes while it is blocked.
fn poke() -> std::thread::JoinHandle<()> {
    let me = sys::this_thread();
    later(80, move || sys::signal_thread(me, SIGUSR1))
}

fn eintr_in_recv(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, 0);
    let t = poke();
    log!("{}", show(sys::recv(c.fd, &mut [0; 10], 0)));
    t.join().expect("no panic");
    let t = poke();
    log!("{}", show(sys::read(c.fd, &mut [0; 10])));
    t.join().expect("no panic");
    log!("{}", COUNT.load(Ordering::Relaxed));
    w.still_good(&mut c);
}

fn restart_in_recv(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    let t = poke();
    w.start_far(&c, "delayput 10 250");
    let mut b = [0; 10];
    let r = sys::recv(c.fd, &mut b, 0);
    log!("{} {}", c.checked(r, &b), w.finish());
    t.join().expect("no panic");
    log!("{}", COUNT.load(Ordering::Relaxed));
}

/// With a time-out set, Linux does not restart.
fn eintr_in_recv_with_timeout(w: &World) {
    let c = w.pair();
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    sys::set_timeout(c.fd, libc::SO_RCVTIMEO, Duration::from_secs(20)).expect("SO_RCVTIMEO");
    let t = poke();
    log!("{}", show(sys::recv(c.fd, &mut [0; 10], 0)));
    t.join().expect("no panic");
}

fn eintr_in_send(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, 0);
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    let t = poke();
    log!("{}", show(sys::send(c.fd, b"x", 0)));
    t.join().expect("no panic");
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

fn eintr_in_send_after_some(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    let b = crate::world::block(c.tx, 64 << 20);
    let me = sys::this_thread();
    let t = later(300, move || sys::signal_thread(me, SIGUSR1));
    // What went is counted, also with SA_RESTART.
    let r = sys::send(c.fd, &b, 0);
    t.join().expect("no panic");
    let n = r.unwrap_or(0);
    log!("some {} not all {}", n > 0, n < 64 << 20);
    c.tx += n as u64;
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

fn restart_in_send(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    let t = poke();
    w.start("sleep 250");
    let far = c.far;
    let mut end = c.end;
    // One small write that blocks through the signal, until the far end reads.
    let control = std::thread::scope(|s| {
        let h = s.spawn(|| {
            w.finish();
            w.ask(&format!("get {far} {}", n + 1))
        });
        log!("{}", end.put(1));
        h.join().expect("no panic")
    });
    t.join().expect("no panic");
    c.end = end;
    log!("{} {}", control == format!("got {}", n + 1), COUNT.load(Ordering::Relaxed));
    w.still_good(&mut c);
}

fn eintr_in_waitall_after_some(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    w.far(&c, "put 10");
    c.arrived(10);
    let t = poke();
    let mut b = [0; 100];
    let r = sys::recv(c.fd, &mut b, libc::MSG_WAITALL);
    log!("{}", c.checked(r, &b));
    t.join().expect("no panic");
    w.still_good(&mut c);
}

fn eintr_in_poll(w: &World) {
    let c = w.pair();
    for flags in [0, SA_RESTART] {
        sys::on_signal(SIGUSR1, count, flags);
        let t = poke();
        log!("{}", show_poll(sys::poll1(c.fd, POLLIN, 20_000)));
        t.join().expect("no panic");
    }
}

fn eintr_in_select(w: &World) {
    let c = w.pair();
    for flags in [0, SA_RESTART] {
        sys::on_signal(SIGUSR1, count, flags);
        let t = poke();
        log!("{}", show(sys::select_read(&[c.fd], Duration::from_secs(20)).0));
        t.join().expect("no panic");
    }
}

fn eintr_in_epoll(w: &World) {
    let c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    for flags in [0, SA_RESTART] {
        sys::on_signal(SIGUSR1, count, flags);
        let t = poke();
        log!("{}", show_epoll(sys::epoll_wait(ep, 8, 20_000)));
        t.join().expect("no panic");
    }
}

/// A signal that is blocked but for the call interrupts the call, also when it came before.
fn ppoll_mask(w: &World) {
    let c = w.pair();
    sys::on_signal(SIGUSR1, count, 0);
    sys::mask_signal(libc::SIG_BLOCK, SIGUSR1);
    sys::signal_thread(sys::this_thread(), SIGUSR1);
    log!("{}", COUNT.load(Ordering::Relaxed));
    let mut p = [libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 }];
    let open = sys::sigset(libc::SIGUSR2);
    log!("{}", show(sys::ppoll(&mut p, Duration::from_secs(20), Some(&open))));
    log!("{}", COUNT.load(Ordering::Relaxed));
    w.far(&c, "put 1");
    c.arrived(1);
    log!("{}", show(sys::ppoll(&mut p, Duration::from_secs(20), Some(&open))));
}

fn epoll_pwait_mask(w: &World) {
    let c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    sys::on_signal(SIGUSR1, count, 0);
    sys::mask_signal(libc::SIG_BLOCK, SIGUSR1);
    sys::signal_thread(sys::this_thread(), SIGUSR1);
    let open = sys::sigset(libc::SIGUSR2);
    log!("{} {}", show_epoll(sys::epoll_pwait(ep, 20_000, &open)), COUNT.load(Ordering::Relaxed));
    // Kept out for the whole call.
    sys::mask_signal(libc::SIG_UNBLOCK, SIGUSR1);
    let shut = sys::sigset(SIGUSR1);
    let t = poke();
    w.start_far(&c, "delayput 1 200");
    log!("{} {}", show_epoll(sys::epoll_pwait(ep, 20_000, &shut)), w.finish());
    t.join().expect("no panic");
    log!("{}", COUNT.load(Ordering::Relaxed));
}

/// Where the stream stood before the handlers wrote.
static START: AtomicU64 = AtomicU64::new(0);

extern "C" fn write_one(_: i32) {
    // The next byte of the stream, from inside a handler.
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let b = [crate::world::pattern(START.load(Ordering::Relaxed) + u64::from(n))];
    let _ = sys::write(FD.load(Ordering::Relaxed), &b);
}

fn handler_writes(w: &World) {
    let mut c = w.pair();
    FD.store(c.fd, Ordering::Relaxed);
    START.store(c.tx, Ordering::Relaxed);
    sys::on_signal(SIGUSR1, write_one, SA_RESTART);
    let me = sys::this_thread();
    // Signals into reads, polls and everything between.
    let t = later(20, move || {
        for _ in 0..50 {
            sys::signal_thread(me, SIGUSR1);
            sys::sleep_ms(2);
        }
    });
    w.start_far(&c, "putchunks 300000 500");
    log!("{}", c.get_chunks(300_000, 300));
    log!("far {}", w.finish());
    t.join().expect("no panic");
    // Standard signals do not queue, so their number is what the handler counted.
    let n = COUNT.load(Ordering::Relaxed);
    log!("some {}", n > 0);
    c.tx += u64::from(n);
    log!("far {}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

extern "C" fn read_one(_: i32) {
    let mut b = [0; 1];
    if sys::recv(FD.load(Ordering::Relaxed), &mut b, libc::MSG_DONTWAIT) == Ok(1) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

fn handler_reads_another(w: &World) {
    let (mut c, d) = (w.pair(), w.pair());
    FD.store(d.fd, Ordering::Relaxed);
    sys::on_signal(SIGUSR1, read_one, SA_RESTART);
    w.far(&d, "put 30");
    d.arrived(30);
    let me = sys::this_thread();
    let t = later(10, move || {
        while COUNT.load(Ordering::Relaxed) < 30 {
            sys::signal_thread(me, SIGUSR1);
            sys::sleep_ms(1);
        }
    });
    w.start_far(&c, "slowget 500000 5000 1");
    log!("{}", c.put_chunks(500_000, 400));
    log!("far {}", w.finish());
    while !t.is_finished() {
        sys::sleep_ms(5);
    }
    log!("{} {:?}", COUNT.load(Ordering::Relaxed), sys::fionread(d.fd));
}

/// An interval timer hammers on every call.
fn timer_storm(w: &World) {
    let mut c = w.pair();
    sys::on_signal(libc::SIGALRM, count, 0);
    let every = libc::timeval { tv_sec: 0, tv_usec: 700 };
    let set = |t| {
        let v = libc::itimerval { it_interval: t, it_value: t };
        // SAFETY: a live value; setitimer by number, since libc lacks a wrapper for it here.
        unsafe { libc::syscall(libc::SYS_setitimer, 0, &v, 0) }
    };
    set(every);
    w.start_far(&c, "getchunks 3000000 3000");
    log!("{}", c.put_chunks(3_000_000, 70_000));
    log!("far {}", w.finish());
    w.start_far(&c, "putchunks 3000000 3000");
    log!("{}", c.get_chunks(3_000_000, 70_000));
    log!("far {}", w.finish());
    set(libc::timeval { tv_sec: 0, tv_usec: 0 });
    log!("some {}", COUNT.load(Ordering::Relaxed) > 0);
    w.still_good(&mut c);
}

fn errno_is_kept(w: &World) {
    let mut c = w.pair();
    // SAFETY: the thread's own errno.
    let e = unsafe { &mut *libc::__errno_location() };
    let mut b = [0; 10];
    for _ in 0..3 {
        w.far(&c, "put 10");
        c.arrived(10);
        let ep = sys::epoll_create();
        *e = 77;
        let r = sys::read(c.fd, &mut b);
        let after_read = *e;
        let p = c.checked(r, &b);
        *e = 77;
        let _ = sys::poll1(c.fd, POLLIN, 0);
        let after_poll = *e;
        *e = 77;
        sys::epoll_add(ep, c.fd, EPOLLIN, 1);
        let _ = sys::epoll_wait(ep, 8, 0);
        let after_epoll = *e;
        let x = c.next(10);
        *e = 77;
        let _ = sys::write(c.fd, &x);
        let after_write = *e;
        w.far(&c, "get 10");
        *e = 77;
        let _ = sys::close(ep);
        log!("{p} {after_read} {after_poll} {after_epoll} {after_write} {}", *e);
    }
}

extern "C-unwind" fn blocked_recv(_: *mut libc::c_void) -> *mut libc::c_void {
    // No Rust value with a destructor is alive here: cancellation unwinds through this frame.
    let mut b = [0u8; 10];
    // SAFETY: a live buffer of this length.
    unsafe { recv(FD.load(Ordering::Relaxed), b.as_mut_ptr().cast(), 10, 0) };
    std::ptr::null_mut()
}

type Start = extern "C" fn(*mut libc::c_void) -> *mut libc::c_void;

unsafe extern "C-unwind" {
    fn pthread_cancel(t: libc::pthread_t) -> i32;
    // As libc has it, but allowed to unwind: that is how cancellation leaves it.
    fn recv(fd: i32, b: *mut libc::c_void, n: usize, flags: i32) -> isize;
}

fn cancel_in_recv(w: &World) {
    let mut c = w.pair();
    FD.store(c.fd, Ordering::Relaxed);
    // SAFETY: all-zero is filled by pthread_create; the thread is joined below.
    unsafe {
        let mut t: libc::pthread_t = std::mem::zeroed();
        // The ABI differs in nothing but the permission to unwind.
        let f: Start = std::mem::transmute(blocked_recv as *const ());
        libc::pthread_create(&mut t, std::ptr::null(), f, std::ptr::null_mut());
        sys::sleep_ms(60);
        log!("{}", pthread_cancel(t));
        let mut r = std::ptr::null_mut();
        log!("{} cancelled {}", libc::pthread_join(t, &mut r), r as isize == -1);
    }
    w.still_good(&mut c);
}

/// exit() while threads are blocked in calls on connections.
fn exit_while_others_block(w: &World) {
    let port: u16 = w.ask("listen 4").parse().expect("a port");
    let pid = sys::fork(|| {
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        sys::connect(fd, &crate::world::address("4", port)).expect("connect");
        let mut e = crate::world::End::new(fd);
        for _ in 0..200 {
            e.put(1);
            e.get(1);
        }
        let _t = later(0, move || sys::recv(fd, &mut [0; 1], 0));
        let _u = later(0, move || sys::poll1(fd, POLLIN, -1));
        sys::sleep_ms(50);
        e.put(777);
        5
    });
    let far: i32 = w.ask(&format!("accept {port}")).parse().expect("an fd");
    log!("far {}", w.ask(&format!("pong {far} 200")));
    log!("{} far {}", sys::wait(pid), w.ask(&format!("drain {far}")));
}
