//! Two ends of a real TCP connection meet: in one process, in two, and with strangers about.

#![allow(clippy::unwrap_used)]

use smc::{
    handshake::{Established, Rendezvous, RendezvousConfig, Side, Step, unix},
    lgr,
    reason::Reason,
};
use std::{
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering::Relaxed},
};

const CONFIG: RendezvousConfig = RendezvousConfig { ring_size: 1 << 16, mem_limit: 1 << 30, fd_base: 300 };

/// One test at a time: these look at all link groups of the process, and fork it.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|p| p.into_inner())
}

fn tcp(at: &str) -> (TcpStream, TcpStream) {
    let l = TcpListener::bind(at).unwrap();
    let c = TcpStream::connect(l.local_addr().unwrap()).unwrap();
    (c, l.accept().unwrap().0)
}

fn start(side: Side, s: &TcpStream) -> Rendezvous {
    Rendezvous::new(side, s.as_raw_fd(), CONFIG).unwrap()
}

fn run(a: &mut Rendezvous, b: &mut Rendezvous) -> (Box<Established>, Box<Established>) {
    let (mut x, mut y) = (None, None);
    for _ in 0..20 {
        for (r, done) in [(&mut *a, &mut x), (&mut *b, &mut y)] {
            if done.is_none() {
                match r.step() {
                    Step::Pending => {}
                    Step::Done(e) => *done = Some(e),
                    Step::Failed(reason) => panic!("{reason}"),
                }
            }
        }
    }
    (x.expect("the first end is done"), y.expect("the second end is done"))
}

fn meet(c: &TcpStream, a: &TcpStream) -> (Box<Established>, Box<Established>) {
    run(&mut start(Side::Connect, c), &mut start(Side::Accept, a))
}

fn groups() -> usize {
    let mut n = 0;
    lgr::each(|_| n += 1);
    n
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn check_shared(c: &Established, a: &Established) {
    for (from, to, byte) in [(c, a, 0x11u8), (a, c, 0x22)] {
        let ((tx, n), (rx, m)) = (from.buffers.tx(), to.buffers.rx());
        assert_eq!((n, m), (1 << 16, 1 << 16));
        // SAFETY: inside the ring, which lives; nobody else touches it.
        unsafe { tx.add(n - 1).write_volatile(byte) };
        // SAFETY: as above.
        assert_eq!(unsafe { rx.add(n - 1).read_volatile() }, byte);
    }
    c.buffers.page().side[0].tx.prod.store(77, Relaxed);
    assert_eq!(a.buffers.page().side[0].tx.prod.load(Relaxed), 77);
    assert_eq!(unix::send(&c.bell, b"!", None), Ok(1));
    let mut buf = [0; 4];
    assert_eq!(unix::recv(&a.bell, &mut buf, &mut Vec::new()), Ok(1));
    for e in [c, a] {
        assert!(e.bell.raw() >= CONFIG.fd_base);
        // SAFETY: takes integers.
        let fl = unsafe { libc::fcntl(e.bell.raw(), libc::F_GETFL) };
        assert_eq!(fl & libc::O_NONBLOCK, 0, "the bell is in blocking mode");
        // SAFETY: takes integers.
        let fd = unsafe { libc::fcntl(e.bell.raw(), libc::F_GETFD) };
        assert_eq!(fd & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        assert_eq!(e.peer_pid, std::process::id() as i32);
    }
}

#[test]
fn one_process_every_family() {
    let _turn = turn();
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let (c, a) = tcp(at);
        let (x, y) = meet(&c, &a);
        check_shared(&x, &y);
        drop((x, y));
    }
    // A listener for both families sees an IPv4 client under a mapped address.
    let l = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    let c = TcpStream::connect(("127.0.0.1", l.local_addr().unwrap().port())).unwrap();
    let (a, from) = l.accept().unwrap();
    assert!(from.is_ipv6() && c.local_addr().unwrap().is_ipv4());
    let (x, y) = meet(&c, &a);
    check_shared(&x, &y);
    drop((x, y));
    // And the other way round: the client's socket is AF_INET6.
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = l.local_addr().unwrap().port();
    let c =
        TcpStream::connect(SocketAddr::from((std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port))).unwrap();
    let (a, from) = l.accept().unwrap();
    assert!(from.is_ipv4() && c.local_addr().unwrap().is_ipv6());
    let (x, y) = meet(&c, &a);
    check_shared(&x, &y);
    drop((x, y));
    assert_eq!(groups(), 0);
}

#[test]
fn the_accepting_end_may_come_first() {
    let _turn = turn();
    let (c, a) = tcp("127.0.0.1:0");
    let mut accepting = start(Side::Accept, &a);
    assert!(matches!(accepting.step(), Step::Pending));
    assert!(matches!(accepting.step(), Step::Pending));
    let mut connecting = start(Side::Connect, &c);
    let (x, y) = run(&mut connecting, &mut accepting);
    check_shared(&x, &y);
}

#[test]
fn subsequent_contact_reuses_the_segment_and_costs_one_descriptor_an_end() {
    let _turn = turn();
    let sockets: Vec<_> = (0..5).map(|_| tcp("127.0.0.1:0")).collect();
    let (c, a) = &sockets[0];
    let before = open_fds();
    let first = meet(c, a);
    assert_eq!(open_fds(), before + 3, "two bells and the memfd");
    let more: Vec<_> = sockets[1..].iter().map(|(c, a)| meet(c, a)).collect();
    assert_eq!(open_fds(), before + 3 + 2 * 4);
    assert_eq!(groups(), 2, "one that owns, one that maps");
    for (x, y) in &more {
        assert!(Arc::ptr_eq(x.buffers.lgr(), first.0.buffers.lgr()));
        assert!(Arc::ptr_eq(y.buffers.lgr(), first.1.buffers.lgr()));
        assert_eq!(y.buffers.lgr().segments().0, 1);
    }
    drop(first);
    assert_eq!(groups(), 2);
    drop(more);
    assert_eq!((groups(), open_fds()), (0, before), "the last connection's end is the group's");
}

#[test]
fn many_first_contacts_at_once_share_the_segment() {
    let _turn = turn();
    let sockets: Vec<_> = (0..8).map(|_| tcp("127.0.0.1:0")).collect();
    let mut ends: Vec<_> =
        sockets.iter().map(|(c, a)| (start(Side::Connect, c), start(Side::Accept, a))).collect();
    // All proposals are out before the first accept.
    ends.iter_mut().for_each(|(_, a)| assert!(matches!(a.step(), Step::Pending)));
    ends.iter_mut().for_each(|(c, _)| assert!(matches!(c.step(), Step::Pending)));
    let done: Vec<_> = ends.iter_mut().map(|(c, a)| run(c, a)).collect();
    for (x, y) in &done {
        check_shared(x, y);
        assert_eq!((x.buffers.lgr().segments().0, y.buffers.lgr().segments().0), (1, 1));
    }
}

#[test]
fn buffers_reused_are_zero() {
    let _turn = turn();
    let (c, a) = tcp("127.0.0.1:0");
    let _keep = meet(&c, &a);
    let (c, a) = tcp("127.0.0.1:0");
    let (x, y) = meet(&c, &a);
    let place = y.buffers.tx().0;
    check_shared(&x, &y);
    drop(x);
    drop(y);
    let (c, a) = tcp("127.0.0.1:0");
    let (x, y) = meet(&c, &a);
    assert_eq!(y.buffers.tx().0, place, "the same memory");
    for (p, n) in [x.buffers.tx(), x.buffers.rx()] {
        // SAFETY: inside the ring, which lives; nobody else touches it.
        assert!((0..n).all(|i| unsafe { p.add(i).read_volatile() } == 0));
    }
    assert_eq!(x.buffers.page().side[0].tx.prod.load(Relaxed), 0);
}

#[test]
fn termination_while_connections_hold_the_group() {
    let _turn = turn();
    let (c, a) = tcp("127.0.0.1:0");
    let (x, y) = meet(&c, &a);
    y.buffers.lgr().terminate();
    x.buffers.lgr().terminate();
    assert!(x.buffers.lgr().is_terminated() && groups() == 0);
    check_shared(&x, &y);
    let (c, a) = tcp("127.0.0.1:0");
    let (v, w) = meet(&c, &a);
    assert!(!Arc::ptr_eq(v.buffers.lgr(), x.buffers.lgr()));
    drop((x, y));
    check_shared(&v, &w);
    // One side only: the other's group goes on and is found, but names nothing the peer still has.
    w.buffers.lgr().terminate();
    let (c, a) = tcp("127.0.0.1:0");
    let (p, q) = meet(&c, &a);
    check_shared(&p, &q);
}

#[test]
fn a_connection_to_itself_is_refused() {
    let _turn = turn();
    // Simultaneous open on one port: bind, then connect to the same address.
    // SAFETY: plain system calls on a socket of this test's own; the address outlives them.
    let fd = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let mut sin: libc::sockaddr_in = std::mem::zeroed();
        sin.sin_family = libc::AF_INET as u16;
        sin.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        let mut len = size_of::<libc::sockaddr_in>() as u32;
        assert_eq!(libc::bind(fd, (&raw const sin).cast(), len), 0);
        assert_eq!(libc::getsockname(fd, (&raw mut sin).cast(), &mut len), 0);
        assert_eq!(libc::connect(fd, (&raw const sin).cast(), len), 0);
        smc::fd::Fd::from_raw(fd)
    };
    assert_eq!(Rendezvous::new(Side::Connect, fd.raw(), CONFIG).err(), Some(Reason::ConnectionToSelf));
}

/// Runs `f` in a forked child; its result is the exit status.
fn forked(f: impl FnOnce() -> bool) -> Child {
    // SAFETY: the child runs `f` and leaves by _exit; glibc makes malloc usable after fork.
    match unsafe { libc::fork() } {
        0 => {
            lgr::after_fork_child();
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        pid => Child(pid),
    }
}

struct Child(i32);

impl Child {
    fn ok(self) -> bool {
        let mut status = -1;
        // SAFETY: waits for our own child; `status` outlives the call.
        unsafe { libc::waitpid(self.0, &mut status, 0) == self.0 && status == 0 }
    }
}

fn finish(r: &mut Rendezvous) -> Result<Box<Established>, Reason> {
    loop {
        match r.step() {
            Step::Pending => std::thread::yield_now(),
            Step::Done(e) => return Ok(e),
            Step::Failed(reason) => return Err(reason),
        }
    }
}

/// Reads one byte in blocking mode.
fn read_bell(e: &Established) -> bool {
    let mut b = 0u8;
    // SAFETY: one byte into `b`.
    unsafe { libc::read(e.bell.raw(), (&raw mut b).cast(), 1) == 1 }
}

#[test]
fn two_processes() {
    let _turn = turn();
    let instance = lgr::instance();
    let (c, a) = tcp("127.0.0.1:0");
    let (c2, a2) = tcp("127.0.0.1:0");
    let child = forked(|| {
        assert_ne!(lgr::instance(), instance);
        let x = finish(&mut start(Side::Connect, &c)).unwrap();
        let (tx, n) = x.buffers.tx();
        // SAFETY: inside the ring.
        unsafe { tx.add(n - 1).write_volatile(0x5a) };
        unix::send(&x.bell, b"!", None).unwrap();
        let y = finish(&mut start(Side::Connect, &c2)).unwrap();
        assert!(Arc::ptr_eq(x.buffers.lgr(), y.buffers.lgr()));
        assert_eq!(y.buffers.lgr().segments().0, 1);
        read_bell(&y)
    });
    let x = finish(&mut start(Side::Accept, &a)).unwrap();
    assert_eq!(x.peer_pid, child.0);
    assert!(read_bell(&x));
    let (rx, n) = x.buffers.rx();
    // SAFETY: inside the ring.
    assert_eq!(unsafe { rx.add(n - 1).read_volatile() }, 0x5a);
    let y = finish(&mut start(Side::Accept, &a2)).unwrap();
    assert!(Arc::ptr_eq(x.buffers.lgr(), y.buffers.lgr()));
    unix::send(&y.bell, b"!", None).unwrap();
    assert!(child.ok());
    // The child is gone, and said so when its buffers were dropped.
    assert_eq!(x.buffers.page().side[0].hint.detached.load(Relaxed), 1);
}

#[test]
fn a_forks_child_leaves_the_parents_handshake_alone() {
    let _turn = turn();
    let (c, a) = tcp("127.0.0.1:0");
    let (k, l) = tcp("127.0.0.1:0");
    let _group = meet(&k, &l);
    let mut connecting = start(Side::Connect, &c);
    let mut accepting = start(Side::Accept, &a);
    accepting.step();
    connecting.step();
    accepting.step(); // an offer is out
    let child = forked(|| {
        let failed = matches!(accepting.step(), Step::Failed(Reason::ForkShared))
            && matches!(connecting.step(), Step::Failed(Reason::ForkShared));
        failed && groups() == 0
    });
    assert!(child.ok());
    let (x, y) = run(&mut connecting, &mut accepting);
    check_shared(&x, &y);
}

#[test]
fn a_peer_that_dies_in_the_middle() {
    let _turn = turn();
    let (c, a) = tcp("127.0.0.1:0");
    let name = unix::Name::of(c.local_addr().unwrap(), c.peer_addr().unwrap());
    let child = forked(|| {
        let listener = unix::listen(&name, 300).unwrap();
        let fd = loop {
            match unix::accept(&listener, 300) {
                Ok(fd) => break fd,
                Err(_) => std::thread::yield_now(),
            }
        };
        // The first bytes of a Proposal, and no more.
        unix::send(&fd, &[0xe2, 0xd4, 0xc3, 0xd9, 1, 0, 68], None) == Ok(7)
    });
    let mut r = start(Side::Accept, &a);
    assert_eq!(finish(&mut r).err(), Some(Reason::PeerGone));
    drop(r);
    assert!(child.ok());
    assert_eq!(groups(), 0);
}

/// Becomes another user, for good. Only in a forked child of root.
fn become_nobody() {
    // SAFETY: takes an integer; this thread is the child's only one.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setuid, 65534) }, 0);
}

fn is_root() -> bool {
    // SAFETY: takes nothing.
    unsafe { libc::getuid() == 0 }
}

fn pipe() -> (smc::fd::Fd, smc::fd::Fd) {
    let mut p = [0; 2];
    // SAFETY: pipe writes two descriptors.
    assert_eq!(unsafe { libc::pipe(p.as_mut_ptr()) }, 0);
    (smc::fd::Fd::from_raw(p[0]), smc::fd::Fd::from_raw(p[1]))
}

fn wait_byte(fd: &smc::fd::Fd) {
    let mut b = 0u8;
    // SAFETY: one byte into `b`.
    assert_eq!(unsafe { libc::read(fd.raw(), (&raw mut b).cast(), 1) }, 1);
}

fn put_byte(fd: &smc::fd::Fd) {
    // SAFETY: one byte from a literal.
    assert_eq!(unsafe { libc::write(fd.raw(), b"!".as_ptr().cast(), 1) }, 1);
}

#[test]
fn a_squatter_gains_nothing() {
    let _turn = turn();
    if !is_root() {
        return; // It takes two users.
    }
    let (c, a) = tcp("127.0.0.1:0");
    let ((ready_r, ready_w), (done_r, done_w)) = (pipe(), pipe());
    let name = unix::Name::of(c.local_addr().unwrap(), c.peer_addr().unwrap());
    let child = forked(|| {
        become_nobody();
        let _listener = unix::listen(&name, 300).unwrap();
        put_byte(&ready_w);
        wait_byte(&done_r);
        true
    });
    wait_byte(&ready_r);
    assert_eq!(Rendezvous::new(Side::Connect, c.as_raw_fd(), CONFIG).err(), Some(Reason::NameTaken));
    assert_eq!(finish(&mut start(Side::Accept, &a)).err(), Some(Reason::UidMismatch));
    put_byte(&done_w);
    assert!(child.ok());
}

#[test]
fn strangers_first_do_not_block_the_peer_but_too_many_end_it() {
    let _turn = turn();
    if !is_root() {
        return; // It takes two users.
    }
    for (strangers, met) in [(3, true), (8, false)] {
        let (c, a) = tcp("127.0.0.1:0");
        let mut connecting = start(Side::Connect, &c);
        let name = unix::Name::of(c.local_addr().unwrap(), c.peer_addr().unwrap());
        let ((ready_r, ready_w), (done_r, done_w)) = (pipe(), pipe());
        let child = forked(|| {
            become_nobody();
            let held: Vec<_> = (0..strangers)
                .map(|_| {
                    let fd = unix::connector(300).unwrap();
                    unix::connect(&fd, &name).unwrap();
                    fd
                })
                .collect();
            put_byte(&ready_w);
            wait_byte(&done_r);
            drop(held);
            true
        });
        wait_byte(&ready_r);
        if met {
            let mut accepting = start(Side::Accept, &a);
            let (x, y) = run(&mut connecting, &mut accepting);
            check_shared(&x, &y);
        } else {
            assert_eq!(finish(&mut connecting).err(), Some(Reason::UidMismatch));
        }
        put_byte(&done_w);
        assert!(child.ok());
    }
}

/// Threads that all build, join and leave the same two link groups.
#[test]
fn many_threads() {
    let _turn = turn();
    let before = open_fds();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(|| {
                for i in 0..60 {
                    let (c, a) = tcp("127.0.0.1:0");
                    let (mut connecting, mut accepting) = (start(Side::Connect, &c), start(Side::Accept, &a));
                    if i % 5 == 0 {
                        // Some give up in the middle.
                        accepting.step();
                        connecting.step();
                        accepting.step();
                        drop(accepting);
                        drop(connecting);
                        continue;
                    }
                    let (mut x, mut y) = (None, None);
                    while x.is_none() || y.is_none() {
                        for (r, done) in [(&mut connecting, &mut x), (&mut accepting, &mut y)] {
                            match (done.is_some(), if done.is_some() { Step::Pending } else { r.step() }) {
                                (true, _) | (false, Step::Pending) => {}
                                (false, Step::Done(e)) => *done = Some(e),
                                (false, Step::Failed(reason)) => panic!("{reason}"),
                            }
                        }
                    }
                    let (x, y) = (x.unwrap(), y.unwrap());
                    check_shared(&x, &y);
                    if i % 11 == 0 {
                        y.buffers.lgr().terminate();
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!((groups(), open_fds()), (0, before));
    assert_eq!(smc::mem::region::mapped_bytes(), 0);
}
