//! epoll sets in odd company: other processes, signal handlers, sets in sets, bad pointers.

use crate::{
    Scenario, log, s,
    sys::{self, show, show_epoll, show_poll},
    world::{Conn, World, later},
};
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLLOUT, POLLIN};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::Relaxed};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(in_a_set_for_each_wait),
    s!(in_a_set_of_its_own_for_each_wait),
    s!(closed_here_open_in_a_child).procs(),
    s!(closed_here_and_child_waits).procs(),
    s!(child_waits_on_the_parents_set).procs(),
    s!(child_changes_the_parents_set).procs(),
    s!(child_changes_the_set_of_one_direction).procs(),
    s!(child_changes_the_set_after_the_peer_left).procs(),
    s!(daemon_takes_the_set_along).procs(),
    s!(handler_waits_on_the_same_set),
    s!(handler_waits_while_busy),
    s!(handler_changes_the_same_set),
    // A switch registers a member anew, and the outer set then tells of the inner one once more.
    s!(nested_many_members).unforced(),
    s!(nested_many_edges),
    s!(nested_three_deep),
    s!(nested_in_two),
    s!(nested_and_the_peer_leaves),
    s!(one_in_ten_sets),
    s!(bad_events_pointer),
    s!(bad_event_pointer),
    s!(read_only_events),
    s!(all_kinds_together),
    s!(changed_by_another_while_busy),
    s!(each_is_told_of_once),
];

fn now(ep: i32) -> String {
    show_epoll(sys::epoll_wait(ep, 64, 0))
}

fn soon(ep: i32) -> String {
    show_epoll(sys::epoll_wait(ep, 64, 10_000))
}

/// The kernel keeps a closed fd in a set as long as another process has the socket open.
fn closed_here_open_in_a_child(w: &World) {
    for events in [EPOLLIN, EPOLLIN | EPOLLET] {
        let mut c = w.pair();
        let ep = sys::epoll_create();
        sys::epoll_add(ep, c.fd, events, 1);
        log!("{}", now(ep));
        let (p, q) = (sys::pipe(), sys::pipe());
        let mut end = c.end;
        let pid = sys::fork(|| {
            let _ = sys::read(p[0], &mut [0]);
            log!("child {} {}", end.get(10), end.put(10));
            let _ = sys::write(q[1], b"x");
            let _ = sys::read(p[0], &mut [0]);
            0
        });
        log!("{}", show(sys::close(c.fd)));
        w.far(&c, "put 10");
        log!("still a member: {}", soon(ep));
        let _ = sys::write(p[1], b"x");
        let _ = sys::read(q[0], &mut [0]);
        c.rx += 10;
        if events & EPOLLET == 0 {
            log!("{}", now(ep));
        }
        log!("{}", w.far(&c, "get 10"));
        let _ = sys::write(p[1], b"x");
        log!("{}", sys::wait(pid));
        log!("gone: {} {}", now(ep), w.far(&c, "drain"));
        [ep, p[0], p[1], q[0], q[1]].iter().for_each(|f| assert!(sys::close(*f).is_ok()));
    }
}

fn closed_here_and_child_waits(w: &World) {
    let c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    let mut end = c.end;
    let (p, q) = (sys::pipe(), sys::pipe());
    let pid = sys::fork(|| {
        let _ = sys::read(p[0], &mut [0]);
        for _ in 0..3 {
            log!("child {}", soon(ep));
            log!("child {} {}", end.get(10), now(ep));
            let _ = sys::write(q[1], b"x");
        }
        0
    });
    log!("{}", show(sys::close(c.fd)));
    let _ = sys::write(p[1], b"x");
    for _ in 0..3 {
        // The child is asleep by then, as a rule.
        sys::sleep_ms(60);
        w.far(&c, "put 10");
        let _ = sys::read(q[0], &mut [0]);
    }
    log!("{}", sys::wait(pid));
    log!("{} {}", now(ep), w.far(&c, "drain"));
}

fn child_waits_on_the_parents_set(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    let (p, q) = (sys::pipe(), sys::pipe());
    let mut end = c.end;
    let pid = sys::fork(|| {
        for _ in 0..4 {
            log!("child {}", soon(ep));
            log!("child {} {}", end.get(5), now(ep));
            let _ = sys::write(q[1], b"x");
            let _ = sys::read(p[0], &mut [0]);
            end.rx += 5;
        }
        0
    });
    for _ in 0..4 {
        w.far(&c, "put 5");
        let _ = sys::read(q[0], &mut [0]);
        c.rx += 5;
        log!("{}", now(ep));
        w.start_far(&c, "delayput 5 40");
        log!("{}", soon(ep));
        w.finish();
        log!("{} {}", c.get(5), now(ep));
        let _ = sys::write(p[1], b"x");
    }
    log!("{}", sys::wait(pid));
}

fn child_changes_the_parents_set(w: &World) {
    let (mut c, d) = (w.pair(), w.pair());
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    let pid = sys::fork(|| {
        log!("child {}", show(sys::epoll_ctl(ep, EPOLL_CTL_ADD, d.fd, EPOLLIN as u32, 2)));
        log!("child {}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, EPOLLIN as u32, 7)));
        0
    });
    log!("{}", sys::wait(pid));
    w.far(&c, "put 5");
    c.arrived(5);
    log!("{}", soon(ep));
    w.far(&d, "put 5");
    d.arrived(5);
    log!("{}", soon(ep));
    let pid = sys::fork(|| {
        log!("child {}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0)));
        0
    });
    log!("{}", sys::wait(pid));
    log!("{} {}", soon(ep), c.get(5));
}

/// A child gives the connection another name in its parent's set, under which the parent hears of it then.
fn renamed_by_a_child(w: &World, c: &mut Conn) {
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    log!("{}", now(ep));
    let pid = sys::fork(|| {
        log!("child {}", show(sys::epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, EPOLLIN as u32, 7)));
        0
    });
    log!("{}", sys::wait(pid));
    for _ in 0..2 {
        w.far(c, "put 5");
        log!("{} {} {}", soon(ep), c.get(5), now(ep));
    }
}

/// Our direction has stayed on TCP and is to stay there; the peer's is not.
fn child_changes_the_set_of_one_direction(w: &World) {
    let mut c = w.cold_on("4");
    for _ in 0..w.warm_up.min(200) {
        w.start_far(&c, "put 1");
        assert_eq!((c.get(1), w.finish()), ("got 1".into(), "put 1".into()));
    }
    log!("{}", show(sys::send(c.fd, b"!", libc::MSG_OOB)));
    renamed_by_a_child(w, &mut c);
}

/// All that the ring had is read, but nobody has looked since.
fn child_changes_the_set_after_the_peer_left(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 5");
    log!("{}", w.far(&c, LEAVES));
    log!("{}", c.get(5));
    renamed_by_a_child(w, &mut c);
}

/// The peer goes back to TCP: SO_PEEK_OFF, off as it is anyway.
const LEAVES: &str = "setopt 1 42 -1";

/// Made before the program went into the background: nobody else uses it there.
fn daemon_takes_the_set_along(w: &World) {
    let ep = sys::epoll_create();
    let p = sys::pipe();
    let pid = sys::fork(|| {
        // SAFETY: no arguments.
        let between = unsafe { libc::getpid() };
        sys::fork(|| {
            // SAFETY: no arguments.
            while unsafe { libc::getppid() } == between {
                sys::sleep_ms(5);
            }
            let mut c = w.pair();
            sys::epoll_add(ep, c.fd, EPOLLIN, 1);
            for _ in 0..3 {
                log!("{}", now(ep));
                w.start_far(&c, "delayput 5 30");
                log!("{}", soon(ep));
                log!("{} {}", w.finish(), c.get(5));
            }
            log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, 0, 0)));
            w.still_good(&mut c);
            let _ = sys::write(p[1], b"x");
            0
        });
        0
    });
    log!("{}", sys::wait(pid));
    log!("{}", show(sys::read(p[0], &mut [0])));
}

static SET: AtomicI32 = AtomicI32::new(-1);
static MEMBER: AtomicI32 = AtomicI32::new(-1);
static SEEN: AtomicU32 = AtomicU32::new(0);
static CALLS: AtomicU32 = AtomicU32::new(0);

/// Async-signal-safe: looks at the set, and remembers what was ready.
extern "C" fn look(_: libc::c_int) {
    let mut e = [libc::epoll_event { events: 0, u64: 0 }; 4];
    // SAFETY: the errno of this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    // SAFETY: room for four events.
    let n = unsafe { libc::epoll_wait(SET.load(Relaxed), e.as_mut_ptr(), 4, 0) };
    // SAFETY: as above.
    unsafe { *errno = kept };
    for e in e.iter().take(n.max(0) as usize) {
        SEEN.fetch_or(1 << e.u64, Relaxed);
    }
    CALLS.fetch_add(1, Relaxed);
}

/// Takes the member out and puts it in again.
extern "C" fn change(_: libc::c_int) {
    // SAFETY: the errno of this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    let _ = sys::epoll_ctl(SET.load(Relaxed), EPOLL_CTL_MOD, MEMBER.load(Relaxed), EPOLLIN as u32, 1);
    // SAFETY: as above.
    unsafe { *errno = kept };
    CALLS.fetch_add(1, Relaxed);
}

fn handler_waits_on_the_same_set(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    let p = sys::pipe();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    sys::epoll_add(ep, p[0], EPOLLIN, 2);
    SET.store(ep, Relaxed);
    sys::on_signal(libc::SIGUSR1, look, 0);
    let me = sys::this_thread();
    for _ in 0..3 {
        SEEN.store(0, Relaxed);
        let t = later(60, move || sys::signal_thread(me, libc::SIGUSR1));
        log!("{}", show_epoll(sys::epoll_wait(ep, 8, 10_000)));
        log!("{:?} seen {}", t.join().is_ok(), SEEN.load(Relaxed));
        w.far(&c, "put 5");
        c.arrived(5);
        sys::signal_thread(me, libc::SIGUSR1);
        log!("seen {} and {}", SEEN.load(Relaxed), now(ep));
        log!("{} {}", c.get(5), now(ep));
        w.start_far(&c, "delayput 5 40");
        log!("{}", soon(ep));
        w.finish();
        log!("{}", c.get(5));
    }
}

/// Signals at any point of a busy loop: nothing is lost, and nothing hangs.
fn busy(w: &World, handler: extern "C" fn(libc::c_int)) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    SET.store(ep, Relaxed);
    MEMBER.store(c.fd, Relaxed);
    sys::on_signal(libc::SIGALRM, handler, libc::SA_RESTART);
    let every = libc::timeval { tv_sec: 0, tv_usec: 300 };
    let t = libc::itimerval { it_interval: every, it_value: every };
    w.start_far(&c, "pong 5000");
    // SAFETY: a live time, no old value wanted.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &t, std::ptr::null_mut()) };
    let mut odd = 0;
    for _ in 0..5000 {
        c.put(1);
        loop {
            match sys::epoll_wait(ep, 8, 10_000) {
                Ok(v) if v.len() == 1 => break,
                Err(libc::EINTR) => {}
                other => {
                    odd += 1;
                    log!("{}", show_epoll(other));
                    break;
                }
            }
        }
        c.get(1);
    }
    let off = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let t = libc::itimerval { it_interval: off, it_value: off };
    // SAFETY: as above.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &t, std::ptr::null_mut()) };
    log!("odd {odd}, signals {} {}", CALLS.load(Relaxed) > 0, w.finish());
    log!("{}", now(ep));
    w.still_good(&mut c);
}

fn handler_waits_while_busy(w: &World) {
    busy(w, look);
}

fn handler_changes_the_same_set(w: &World) {
    busy(w, change);
}

fn nested_many_members(w: &World) {
    let inner = sys::epoll_create();
    let outer = sys::epoll_create();
    sys::epoll_add(outer, inner, EPOLLIN, 9);
    let mut cs: Vec<_> = (0..150).map(|_| w.pair()).collect();
    for (i, c) in cs.iter().enumerate() {
        sys::epoll_add(inner, c.fd, EPOLLIN, i as u64);
    }
    for round in 0..3 {
        log!("{}", now(outer));
        for c in &cs {
            w.far(c, "put 5");
        }
        cs.iter().for_each(|c| c.arrived(5));
        log!("{} {}", soon(outer), show_poll(sys::poll1(inner, POLLIN, 0)));
        let wrong = cs.iter_mut().filter_map(|c| Some(c.get(5)).filter(|r| r != "got 5")).count();
        log!("{round}: wrong {wrong}");
        log!("read without a look at the inner set: {}", now(outer));
        log!("{}", show_poll(sys::poll1(inner, POLLIN, 0)));
        log!("{}", now(inner));
    }
    w.start_far(&cs[149], "delayput 5 50");
    log!("{}", show_epoll(sys::epoll_wait(outer, 8, -1)));
    log!("{} {} {}", w.finish(), soon(inner), cs[149].get(5));
    log!("{}", now(outer));
}

fn nested_many_edges(w: &World) {
    let inner = sys::epoll_create();
    let outer = sys::epoll_create();
    sys::epoll_add(outer, inner, EPOLLIN, 9);
    let mut cs: Vec<_> = (0..100).map(|_| w.pair()).collect();
    for (i, c) in cs.iter().enumerate() {
        sys::epoll_add(inner, c.fd, EPOLLIN | EPOLLET, i as u64);
    }
    for _ in 0..3 {
        for c in &cs {
            w.far(c, "put 5");
        }
        cs.iter().for_each(|c| c.arrived(5));
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < 100 {
            if now(outer) != "9:IN" {
                log!("{} taken, and the outer set says none", seen.len());
            }
            seen.extend(sys::epoll_wait(inner, 100, 10_000).expect("events").iter().map(|e| e.0));
        }
        // All edges are taken, so nothing is left although the bytes are.
        log!("{} {}", now(inner), now(outer));
        cs.iter_mut().for_each(|c| assert_eq!(c.get(5), "got 5"));
    }
}

fn nested_three_deep(w: &World) {
    let mut c = w.pair();
    let sets = [(); 4].map(|()| sys::epoll_create());
    for (i, s) in sets.windows(2).enumerate() {
        sys::epoll_add(s[1], s[0], EPOLLIN, 10 + i as u64);
    }
    sys::epoll_add(sets[0], c.fd, EPOLLIN, 1);
    for _ in 0..3 {
        log!("{}", now(sets[3]));
        w.start_far(&c, "delayput 5 40");
        log!("{}", soon(sets[3]));
        w.finish();
        log!("{:?}", sets.map(now));
        log!("{}", c.get(5));
        log!("{:?}", sets.map(now));
    }
}

fn nested_in_two(w: &World) {
    let mut c = w.pair();
    let (inner, a, b) = (sys::epoll_create(), sys::epoll_create(), sys::epoll_create());
    sys::epoll_add(inner, c.fd, EPOLLIN, 1);
    sys::epoll_add(a, inner, EPOLLIN, 2);
    sys::epoll_add(b, inner, EPOLLIN, 3);
    for _ in 0..3 {
        w.far(&c, "put 5");
        log!("{} {}", soon(a), soon(b));
        log!("{} {} {}", c.get(5), now(a), now(b));
    }
    log!("{}", show(sys::epoll_ctl(a, EPOLL_CTL_DEL, inner, 0, 0)));
    w.far(&c, "put 5");
    log!("{} {}", soon(b), now(a));
    log!("{} {}", show(sys::close(inner)), now(b));
    log!("{}", c.get(5));
}

/// What ends of a connection tell each other is nothing for the program to wake up for.
fn nested_and_the_peer_leaves(w: &World) {
    for kind in 0..3 {
        let mut c = w.pair();
        let (inner, middle, outer) = (sys::epoll_create(), sys::epoll_create(), sys::epoll_create());
        sys::epoll_add(inner, c.fd, EPOLLIN, 1);
        sys::epoll_add(middle, inner, EPOLLIN, 2);
        sys::epoll_add(outer, middle, EPOLLIN, 3);
        w.start_far(&c, LEAVES);
        match kind {
            0 => log!("{}", show_epoll(sys::epoll_wait(outer, 8, 300))),
            1 => log!("{}", show_poll(sys::poll1(middle, POLLIN, 300))),
            _ => log!("{}", show(sys::select_read(&[inner], std::time::Duration::from_millis(300)).0)),
        }
        log!("{} {} {}", w.finish(), now(outer), show_poll(sys::poll1(inner, POLLIN, 0)));
        for _ in 0..2 {
            w.start_far(&c, "delayput 5 40");
            log!("{} {} {}", soon(outer), show_poll(sys::poll1(middle, POLLIN, -1)), soon(inner));
            log!("{} {}", c.get(5), w.finish());
            log!("{} {}", now(outer), show_poll(sys::poll1(inner, POLLIN, 0)));
        }
    }
}

fn one_in_ten_sets(w: &World) {
    let mut c = w.pair();
    let sets: Vec<_> = (0..10).map(|_| sys::epoll_create()).collect();
    let kinds = [EPOLLIN, EPOLLIN | EPOLLET, EPOLLIN | EPOLLONESHOT, EPOLLIN | EPOLLOUT | EPOLLET];
    for (i, ep) in sets.iter().enumerate() {
        sys::epoll_add(*ep, c.fd, kinds[i % 4], i as u64);
        now(*ep);
    }
    for round in 0..4 {
        w.far(&c, "put 5");
        c.arrived(5);
        let r: Vec<_> = sets.iter().map(|ep| now(*ep)).collect();
        log!("{r:?}");
        log!("{}", c.get(5));
        let r: Vec<_> = sets.iter().map(|ep| now(*ep)).collect();
        log!("{r:?}");
        let (old, fd) = (sets[round], c.fd);
        log!("{}", show(sys::epoll_ctl(old, EPOLL_CTL_DEL, fd, 0, 0)));
    }
    // Each of several threads asleep on sets of their own hears of it.
    let ts: Vec<_> = sets[5..]
        .iter()
        .filter(|ep| **ep != sets[6])
        .map(|ep| {
            let ep = *ep;
            later(0, move || show_epoll(sys::epoll_wait(ep, 8, 20_000)))
        })
        .collect();
    sys::sleep_ms(60);
    w.far(&c, "put 5");
    log!("{:?}", ts.into_iter().map(|t| t.join().expect("no panic")).collect::<Vec<_>>());
}

/// epoll_wait(2) with an array somewhere.
fn wait_at(ep: i32, at: usize, max: i32) -> String {
    // SAFETY: whether it may be written is what is tried: the kernel checks.
    show(sys::res(unsafe { libc::epoll_wait(ep, at as *mut libc::epoll_event, max, 0) }))
}

fn bad_events_pointer(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    for at in [8, usize::MAX - 4095, 0] {
        log!("nothing there: {}", wait_at(ep, at, 4));
    }
    w.far(&c, "put 5");
    c.arrived(5);
    for at in [8, usize::MAX - 4095, 0] {
        log!("{}", wait_at(ep, at, 4));
    }
    log!("none was lost: {} {}", now(ep), c.get(5));
}

fn bad_event_pointer(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    let ctl = |op, at: usize| {
        // SAFETY: the kernel checks.
        show(sys::res(unsafe { libc::epoll_ctl(ep, op, c.fd, at as *mut libc::epoll_event) }))
    };
    log!("{} {} {}", ctl(EPOLL_CTL_ADD, 0), ctl(EPOLL_CTL_ADD, 8), ctl(EPOLL_CTL_MOD, 8));
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    log!("{} {}", ctl(EPOLL_CTL_MOD, 8), ctl(EPOLL_CTL_MOD, usize::MAX - 4095));
    w.far(&c, "put 5");
    log!("{}", soon(ep));
    log!("{} {}", ctl(EPOLL_CTL_DEL, 8), now(ep));
    log!("{}", c.get(5));
}

fn read_only_events(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) } as usize;
    log!("{}", wait_at(ep, p, 4));
    w.far(&c, "put 5");
    c.arrived(5);
    log!("{}", wait_at(ep, p, 4));
    // SAFETY: the mapping made above.
    unsafe { libc::mprotect(p as *mut _, 4096, libc::PROT_READ | libc::PROT_WRITE) };
    log!("{} {}", wait_at(ep, p, 4), c.get(5));
}

/// All that several waits give: one need not give everything at once.
fn gathered(ep: i32) -> String {
    let mut all = std::collections::BTreeMap::new();
    for _ in 0..20 {
        for (data, events) in sys::epoll_wait(ep, 64, 10_000).expect("events") {
            *all.entry(data).or_insert(0) |= events;
        }
    }
    show_epoll(Ok(all.into_iter().collect()))
}

fn all_kinds_together(w: &World) {
    let mut c = w.pair();
    let mut plain = w.cold_on("4");
    let ep = sys::epoll_create();
    let set = sys::sigset(libc::SIGUSR2);
    sys::mask_signal(libc::SIG_BLOCK, libc::SIGUSR2);
    // SAFETY: a live set.
    let sig = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    let u = sys::unix_pair(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
    let p = sys::pipe();
    let inner = sys::epoll_create();
    sys::epoll_add(inner, p[0], EPOLLIN, 1);
    for (i, fd) in [c.fd, plain.fd, sig, u[0], inner].into_iter().enumerate() {
        sys::epoll_add(ep, fd, EPOLLIN, 1 + i as u64);
    }
    for _ in 0..5 {
        log!("{}", now(ep));
        w.far(&c, "put 5");
        c.arrived(5);
        log!("{}", gathered(ep));
        w.far(&plain, "put 5");
        plain.arrived(5);
        log!("{}", gathered(ep));
        sys::signal_thread(sys::this_thread(), libc::SIGUSR2);
        log!("{}", gathered(ep));
        log!("{} {}", show(sys::write(u[1], b"x")), show(sys::write(p[1], b"x")));
        log!("{}", gathered(ep));
        log!("{} {}", c.get(5), plain.get(5));
        log!("{}", gathered(ep));
        let mut b = [0; 128];
        log!("{}", show(sys::read(sig, &mut b)));
        log!("{} {}", show(sys::read(u[0], &mut b)), show(sys::read(p[0], &mut b[..1])));
    }
}

/// Two looks at the kernel in one wait find the same connection, which the program is to be told of once: it may be closed
/// when the second entry's turn comes.
fn each_is_told_of_once(w: &World) {
    let c = w.pair();
    let mut plain = w.cold_on("4");
    let ep = sys::epoll_create();
    // What this end sends goes by TCP from now on, and the ring's word on the connection is not the last.
    log!("{}", show(sys::send(c.fd, b"!", libc::MSG_OOB)));
    for _ in 0..5 {
        sys::epoll_add(ep, c.fd, EPOLLIN, 1);
        w.far(&plain, "put 10");
        plain.arrived(10);
        for _ in 0..10 {
            log!("{}", now(ep));
        }
        sys::epoll_add(ep, plain.fd, EPOLLIN, 2);
        for _ in 0..10 {
            log!("{}", now(ep));
        }
        log!("{}", plain.get(10));
        for fd in [c.fd, plain.fd] {
            sys::epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0, 0).expect("DEL");
        }
    }
}

/// MOD, DEL and ADD by another thread in the middle of waits: at the end the set says what holds.
fn changed_by_another_while_busy(w: &World) {
    let mut c = w.pair();
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, EPOLLIN, 1);
    let fd = c.fd;
    let t = std::thread::spawn(move || {
        for i in 0..2000u64 {
            let kind = [EPOLLIN, EPOLLIN | EPOLLET, EPOLLIN | EPOLLONESHOT][i as usize % 3] as u32;
            sys::epoll_ctl(ep, EPOLL_CTL_MOD, fd, kind, 1).expect("MOD");
            sys::epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0, 0).expect("DEL");
            sys::epoll_ctl(ep, EPOLL_CTL_ADD, fd, EPOLLIN as u32, 1).expect("ADD");
        }
    });
    w.start_far(&c, "pong 2000");
    for _ in 0..2000 {
        c.put(1);
        let mut waits = 0;
        while sys::epoll_wait(ep, 8, 1000).expect("events").is_empty() {
            waits += 1;
            if waits > 10 {
                log!("asleep with data there");
                break;
            }
        }
        c.get(1);
    }
    log!("{} {}", w.finish(), t.join().is_ok());
    log!("{}", now(ep));
    w.far(&c, "put 5");
    log!("{} {}", soon(ep), c.get(5));
}

/// The connection does not block, and is in a set while the program waits, and in none while it moves bytes.
fn in_sets_now_and_then(w: &World, set: &dyn Fn(i32) -> i32, after: &dyn Fn(i32, i32)) {
    let mut c = w.cold_on("4");
    sys::set_nonblocking(c.fd, true);
    for i in 0..150 {
        w.start_far(&c, "delayput 20 1");
        let set = set(c.fd);
        let told = sys::show_epoll(sys::epoll_wait(set, 8, 10_000));
        after(set, c.fd);
        let (far, got) = (w.finish(), c.get(20));
        w.start_far(&c, "get 10");
        log!("{i} {told} {far} {got}, {} {}", c.put(10), w.finish());
    }
    sys::set_nonblocking(c.fd, false);
    w.still_good(&mut c);
}

/// As coroutines of eventlet do.
fn in_a_set_for_each_wait(w: &World) {
    let ep = sys::epoll_create();
    let add = |fd| {
        sys::epoll_add(ep, fd, EPOLLIN, 4);
        ep
    };
    in_sets_now_and_then(w, &add, &|ep, fd| {
        log!("{}", show(sys::epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0, 0)));
    });
}

/// As a selector that is made for one wait.
fn in_a_set_of_its_own_for_each_wait(w: &World) {
    let add = |fd| {
        let ep = sys::epoll_create();
        sys::epoll_add(ep, fd, EPOLLIN, 4);
        ep
    };
    in_sets_now_and_then(w, &add, &|ep, _| {
        log!("{}", show(sys::close(ep)));
    });
}
