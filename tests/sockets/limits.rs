//! Descriptor limits: a program near RLIMIT_NOFILE gets the numbers and the errors that it gets on plain TCP.

use crate::{
    Scenario, log, s,
    sys::{self, show, show_epoll},
    world::{Conn, World},
};
use libc::{EPOLLET, EPOLLIN, EPOLLONESHOT, POLLIN};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(fifty_connections_of_64).procs(),
    s!(number_is_the_lowest).procs(),
    s!(every_number_can_be_had).procs(),
    s!(full_in_other_ways).procs(),
    s!(members_of_sets_near_the_limit).procs(),
    s!(duplicates_near_the_limit).procs(),
    s!(poll_as_many_as_allowed).procs(),
    s!(select_says_more_than_its_sets).procs(),
];

/// The lowest free numbers.
fn free() -> impl Iterator<Item = i32> {
    (0..).filter(|n| sys::fcntl(*n, libc::F_GETFD, 0) == Err(libc::EBADF))
}

/// A connection, and whether its number is the one that it must have.
fn lowest_pair(w: &World) -> (Conn, bool) {
    // The accepting end has a listener open meanwhile.
    let want = free().nth(usize::from(w.place == crate::world::Place::ProcsAccept));
    let c = w.cold_on("4");
    (c, Some(c.fd) == want)
}

/// Both ends may have so many descriptors.
fn limit(w: &World, n: u64) {
    sys::nofile(n);
    w.ask(&format!("nofile {n}"));
}

fn fifty_connections_of_64(w: &World) {
    limit(w, 64);
    let mut cs = Vec::new();
    for i in 0..50 {
        let (mut c, lowest) = lowest_pair(w);
        w.warm(&mut c, 60);
        if !lowest {
            log!("{i}: not the lowest");
        }
        cs.push(c);
    }
    for c in &mut cs {
        w.still_good(c);
    }
    // There is room again, and then there is not.
    for c in cs.drain(..40) {
        log!("{} {}", show(sys::close(c.fd)), w.far(&c, "close"));
    }
    for i in 0..40 {
        let (mut c, lowest) = lowest_pair(w);
        w.warm(&mut c, 20);
        if !lowest {
            log!("again {i}: not the lowest");
        }
        cs.push(c);
    }
    for c in &mut cs {
        w.still_good(c);
    }
}

fn number_is_the_lowest(w: &World) {
    let mut cs: Vec<_> = (0..10).map(|_| w.pair()).collect();
    // The limit comes down to what is used; ours are below it then, or above.
    limit(w, 32);
    for i in 0..6 {
        let (mut c, lowest) = lowest_pair(w);
        w.warm(&mut c, 60);
        if !lowest {
            log!("{i}: not the lowest");
        }
        cs.push(c);
    }
    cs.iter_mut().for_each(|c| w.still_good(c));
}

/// Whether that call gives the lowest number.
fn is_lowest(call: &dyn Fn() -> sys::Res) -> Result<bool, i32> {
    let want = free().next();
    call().map(|n| i32::try_from(n).ok() == want)
}

fn every_number_can_be_had(w: &World) {
    limit(w, 64);
    let mut cs: Vec<_> = (0..20).map(|_| w.pair()).collect();
    let calls: [(&str, &dyn Fn() -> sys::Res); 9] = [
        ("socket", &|| sys::socket(libc::AF_INET, libc::SOCK_STREAM)),
        ("dup", &|| sys::dup(0)),
        ("F_DUPFD", &|| sys::fcntl(0, libc::F_DUPFD, 0)),
        ("open", &|| sys::open(c"/dev/null")),
        // SAFETY: no pointers.
        ("eventfd", &|| sys::res(unsafe { libc::eventfd(0, 0) })),
        // SAFETY: no pointers.
        ("epoll_create1", &|| sys::res(unsafe { libc::epoll_create1(0) })),
        // SAFETY: no pointers.
        ("epoll_create", &|| sys::res(unsafe { libc::epoll_create(1) })),
        // SAFETY: no pointers.
        ("timerfd_create", &|| sys::res(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, 0) })),
        // SAFETY: a C string.
        ("openat", &|| sys::res(unsafe { libc::openat(libc::AT_FDCWD, c"/dev/null".as_ptr(), 0) })),
    ];
    let before = free().take_while(|n| *n < 64).count();
    let mut made = 0;
    'full: loop {
        for (name, call) in &calls {
            match is_lowest(call) {
                Ok(true) => made += 1,
                Ok(false) => {
                    made += 1;
                    log!("{name}: not the lowest");
                }
                Err(e) => {
                    log!("{}", sys::errno_name(e));
                    break 'full;
                }
            }
        }
    }
    log!("as many as were free: {}", made == before);
    for (name, call) in &calls {
        log!("{name} {}", show(call()));
    }
    cs.iter_mut().for_each(|c| w.still_good(c));
}

fn full_in_other_ways(w: &World) {
    limit(w, 64);
    let mut cs: Vec<_> = (0..20).map(|_| w.pair()).collect();
    while free().next().is_some_and(|n| n < 61) {
        sys::dup(0).expect("dup");
    }
    let f = std::fs::File::open("/dev/null").map(|f| std::os::fd::AsRawFd::as_raw_fd(&f));
    log!("open {f:?}");
    let d = std::fs::read_dir("/proc/self/task").map(|d| d.count() > 0).map_err(|e| e.raw_os_error());
    log!("opendir {d:?}");
    for file in [libc::fopen, libc::fopen64] {
        // SAFETY: C strings.
        let f = unsafe { file(c"/dev/null".as_ptr(), c"r".as_ptr()) };
        // SAFETY: fopen's own.
        log!("fopen {}", if f.is_null() { -1 } else { unsafe { libc::fileno(f) - libc::fclose(f) } });
    }
    let p = sys::pipe();
    log!("pipe {p:?} and one more {:?}", free().next());
    log!("{} {}", show(sys::dup(0).map(|_| 0)), show(sys::dup(0)));
    log!("{} {}", show(sys::close(p[0])), show(sys::close(p[1])));
    log!("{} {}", show(sys::dup(0).map(|_| 0)), show(sys::dup(0).map(|_| 0)));
    cs.iter_mut().for_each(|c| w.still_good(c));
}

fn members_of_sets_near_the_limit(w: &World) {
    limit(w, 64);
    let ep = sys::epoll_create();
    let mut cs: Vec<_> = (0..20).map(|_| w.pair()).collect();
    let kinds = [EPOLLIN, EPOLLIN | EPOLLET, EPOLLIN | EPOLLONESHOT];
    for (i, c) in cs.iter().enumerate() {
        sys::epoll_add(ep, c.fd, kinds[i % 3], i as u64);
    }
    log!("{}", show_epoll(sys::epoll_wait(ep, 64, 0)));
    // A one-shot member that has fired must not fire again.
    w.far(&cs[2], "put 5");
    log!("{} {}", show_epoll(sys::epoll_wait(ep, 64, 10_000)), cs[2].get(5));
    while sys::dup(0).is_ok() {}
    for (i, c) in cs.iter().enumerate() {
        w.far(c, "put 7");
        if i % 3 != 1 {
            c.arrived(7);
        }
    }
    let mut seen = std::collections::BTreeMap::new();
    while seen.len() < 19 {
        for (i, e) in sys::epoll_wait(ep, 64, 10_000).expect("events") {
            seen.insert(i, sys::events(e));
        }
    }
    log!("{seen:?}");
    for (i, c) in cs.iter_mut().enumerate() {
        log!("{i} {}", c.get(7));
    }
    log!("{}", show_epoll(sys::epoll_wait(ep, 64, 0)));
    for (i, c) in cs.iter().enumerate() {
        let e = EPOLLIN as u32;
        log!("{}", show(sys::epoll_ctl(ep, libc::EPOLL_CTL_MOD, c.fd, e, i as u64)));
    }
    log!("{}", show_epoll(sys::epoll_wait(ep, 64, 0)));
    w.far(&cs[2], "put 5");
    w.far(&cs[3], "put 5");
    cs[2].arrived(5);
    cs[3].arrived(5);
    log!("{}", sys::epoll_wait(ep, 64, 10_000).map_or(0, |v| v.len()));
    log!("{} {}", cs[2].get(5), cs[3].get(5));
    cs.iter_mut().for_each(|c| w.still_good(c));
}

fn duplicates_near_the_limit(w: &World) {
    limit(w, 64);
    let mut cs: Vec<_> = (0..15).map(|_| w.pair()).collect();
    let ds: Vec<_> = cs.iter().map(|c| sys::dup(c.fd).expect("dup") as i32).collect();
    while sys::dup(0).is_ok() {}
    for (c, d) in cs.iter_mut().zip(ds) {
        log!("{}", show(sys::close(c.fd)));
        c.fd = d;
        w.still_good(c);
        w.far(c, "close");
        log!("{}", c.drain());
    }
}

fn poll_as_many_as_allowed(w: &World) {
    let mut cs: Vec<_> = (0..30).map(|_| w.pair()).collect();
    sys::nofile(30);
    for hot in [3, 29, 3] {
        w.start_far(&cs[hot], "delayput 5 40");
        let mut v: Vec<_> =
            cs.iter().map(|c| libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 }).collect();
        let r = sys::poll(&mut v, 10_000);
        log!("{} {:?}", show(r), (0..30).filter(|i| v[*i].revents != 0).collect::<Vec<_>>());
        log!("{} {}", w.finish(), cs[hot].get(5));
    }
    cs.iter_mut().for_each(|c| w.still_good(c));
}

/// A set of 8192 bits, of which those from `own` on are somebody else's memory.
fn select_of(own: usize, fd: i32) -> String {
    let mut set = [0u64; 128];
    set[own / 64..].fill(u64::MAX);
    set[fd as usize / 64] |= 1 << (fd % 64);
    let mut t = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let none = std::ptr::null_mut();
    // SAFETY: a live set of as many bits, and a live time.
    let r = sys::res(unsafe { libc::select(8192, set.as_mut_ptr().cast(), none, none, &raw mut t) });
    let more = set[..own / 64].iter().map(|w| w.count_ones()).sum::<u32>();
    let kept = set[own / 64..].iter().all(|w| *w == u64::MAX);
    format!("{} of {more}, the rest is kept: {kept}", show(r))
}

/// As programs call it that have `getdtablesize()` for the number and an `fd_set` for the set.
fn select_says_more_than_its_sets(w: &World) {
    limit(w, 8192);
    let p = sys::pipe();
    let mut c = w.pair();
    for _ in 0..2 {
        log!("nothing: {}", select_of(1024, c.fd));
        w.far(&c, "put 10");
        c.arrived(10);
        log!("ready: {}", select_of(1024, c.fd));
        log!("{}", c.get(10));
        log!("a pipe: {}", select_of(1024, p[0]));
    }
    // Numbers beyond an fd_set are looked at as soon as the program has any: the kernel's table has 2048 then.
    for from in [1024, 2047] {
        let high = sys::fcntl(p[0], libc::F_DUPFD, from).expect("F_DUPFD") as i32;
        log!("as {high}: {}", select_of(4096, high));
        log!("{}", show(sys::write(p[1], b"x")));
        log!("as {high}, ready: {}", select_of(4096, high));
        log!("{}", show(sys::read(p[0], &mut [0; 1])));
    }
    w.still_good(&mut c);
}
