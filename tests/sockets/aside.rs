//! Bytes and readiness by ways beside read, write and poll: pipes and files, system calls by number, Linux AIO,
//! io_uring, POSIX AIO, filters, upper-layer protocols, signals instead of waiting.

use crate::{
    Scenario, log,
    rings::Uring,
    s,
    sys::{self, Addr, Res, show},
    world::{Conn, World, block},
};
use libc::{POLLIN, POLLOUT, c_long, c_void};
use std::{
    io::Write as _,
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicU32, Ordering},
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(vmsplice_tee_splice),
    s!(splice_between_connections),
    s!(splice_with_flags),
    s!(sendfile_from_what_is_no_file),
    s!(stdio_both_ways),
    s!(moves_by_number),
    s!(waits_by_number),
    s!(positions_by_number),
    s!(set_waited_for_by_instruction).plain(),
    s!(set_made_by_instruction).plain(),
    s!(polled_by_instruction).plain(),
    s!(linux_aio),
    s!(linux_aio_in_the_middle),
    s!(linux_aio_with_bytes_waiting),
    s!(posix_aio),
    s!(posix_aio_with_bytes_waiting).procs(),
    s!(posix_aio_beside_a_thread).procs(),
    s!(posix_aio_beside_senders).procs().not_tiny(),
    s!(posix_aio_in_sets).procs(),
    s!(posix_aio_after_one_shot).procs(),
    s!(stdio_with_bytes_waiting_beside_threads).procs(),
    s!(ring_made_before),
    s!(ring_made_in_the_middle),
    s!(ring_made_with_bytes_waiting),
    s!(zerocopy_in_the_middle),
    s!(zerocopy_allowed_and_not_used),
    s!(filter_attached),
    s!(upper_layer_protocol),
    s!(signal_of_choice),
    s!(signals_on_and_off),
    s!(recvmmsg_forms),
    s!(recvmmsg_times),
    s!(sendmmsg_partly),
    s!(message_headers_received),
    s!(message_headers_sent),
    s!(names_received),
    s!(names_sent_to),
    s!(lengths_beyond_memory),
    s!(splice_refuses),
    s!(addresses_of_nothing).plain(),
    s!(addresses_beyond_memory),
];

pub fn number(nr: c_long, a: [usize; 6]) -> Res {
    // SAFETY: callers pass what the call of that number takes.
    let r = unsafe { libc::syscall(nr, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if r < 0 { Err(sys::errno()) } else { Ok(r) }
}

/// `n right` for what is in a pipe and is the next of the stream.
fn from_pipe(c: &mut Conn, pipe: i32, n: usize) -> String {
    let mut b = vec![0; n];
    let r = sys::read(pipe, &mut b);
    c.checked(r, &b)
}

fn vmsplice_tee_splice(w: &World) {
    let mut c = w.pair();
    let (p, q) = (sys::pipe(), sys::pipe());
    let b = c.next(3000);
    let v = libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() };
    let vmsplice = |fd: i32| number(libc::SYS_vmsplice, [fd as usize, (&raw const v) as usize, 1, 0, 0, 0]);
    let tee = |a: i32, b: i32| number(libc::SYS_tee, [a as usize, b as usize, 3000, 0, 0, 0]);
    log!("vmsplice {}", show(vmsplice(p[1])));
    log!("into a socket {}", show(vmsplice(c.fd)));
    log!("tee {}", show(tee(p[0], q[1])));
    log!("to a socket {} from a socket {}", show(tee(p[0], c.fd)), show(tee(c.fd, q[1])));
    log!("splice {}", show(sys::splice(p[0], c.fd, 3000, 0)));
    log!("far {}", w.far(&c, "get 3000"));
    // The copy goes as well: it is what the pattern has there once more.
    log!("splice {}", show(sys::splice(q[0], c.fd, 3000, 0)));
    let mut twice = vec![0; 3000];
    w.far(&c, "arrived 3000");
    log!("far {}", w.far(&c, "discard 3000"));
    w.far(&c, "put 3000");
    c.arrived(3000);
    log!("back {}", show(sys::splice(c.fd, p[1], 3000, libc::SPLICE_F_MOVE)));
    log!("tee {}", show(tee(p[0], q[1])));
    log!("{} {}", show(sys::read(q[0], &mut twice)), twice == block(c.rx, 3000));
    log!("{}", from_pipe(&mut c, p[0], 3000));
    w.still_good(&mut c);
}

fn splice_between_connections(w: &World) {
    let (mut a, mut b) = (w.pair(), w.pair());
    let p = sys::pipe();
    for n in [1usize, 100, 5000, 10_000] {
        w.far(&a, &format!("put {n}"));
        let mut left = n;
        while left > 0 {
            let k = match sys::splice(a.fd, p[1], left, 0) {
                Ok(k @ 1..) => k as usize,
                r => {
                    log!("in {}", show(r));
                    return;
                }
            };
            let mut out = k;
            while out > 0 {
                match sys::splice(p[0], b.fd, out, 0) {
                    Ok(k @ 1..) => out -= k as usize,
                    r => {
                        log!("out {}", show(r));
                        return;
                    }
                }
            }
            left -= k;
        }
        (a.rx, b.tx) = (a.rx + n as u64, b.tx + n as u64);
        log!("far {}", w.far(&b, &format!("get {n}")));
    }
    w.still_good(&mut a);
    w.still_good(&mut b);
    // The end of one is the end that splice tells.
    w.far(&a, "shutdown 1");
    log!("EOF {}", show(sys::splice(a.fd, p[1], 10, 0)));
    log!("directly {}", show(sys::splice(a.fd, b.fd, 10, 0)));
}

fn splice_with_flags(w: &World) {
    let mut c = w.pair();
    let p = sys::pipe();
    log!("nothing in the pipe {}", show(sys::splice(p[0], c.fd, 10, libc::SPLICE_F_NONBLOCK)));
    let b = c.next(2000);
    log!("{}", show(sys::write(p[1], &b)));
    log!("more {}", show(sys::splice(p[0], c.fd, 1000, libc::SPLICE_F_MORE)));
    log!("no more {}", show(sys::splice(p[0], c.fd, 5000, 0)));
    log!("far {}", w.far(&c, "get 2000"));
    log!("none {}", show(sys::splice(p[0], c.fd, 0, 0)));
    // The whole pipe is gone: its end, not an error.
    let q = sys::pipe();
    log!("{} {}", show(sys::close(q[1])), show(sys::splice(q[0], c.fd, 10, 0)));
    log!("closed reader {}", {
        let r = sys::pipe();
        let _ = sys::close(r[0]);
        sys::on_signal(libc::SIGPIPE, count, 0);
        w.far(&c, "put 10");
        c.arrived(10);
        show(sys::splice(c.fd, r[1], 10, 0))
    });
    log!("not lost {}", c.get(10));
    w.still_good(&mut c);
}

fn sendfile_from_what_is_no_file(w: &World) {
    let (mut c, mut d) = (w.pair(), w.pair());
    let p = sys::pipe();
    log!("{}", show(sys::write(p[1], b"12345")));
    log!("pipe {}", show(sys::sendfile(c.fd, p[0], None, 5)));
    log!("still there {}", show(sys::read(p[0], &mut [0; 9])));
    w.far(&d, "put 100");
    d.arrived(100);
    log!("connection {}", show(sys::sendfile(c.fd, d.fd, None, 100)));
    log!("itself {}", show(sys::sendfile(c.fd, c.fd, None, 100)));
    log!("still there {}", d.get(100));
    let f = tempfile::tempfile().expect("a temporary file");
    log!("into a file {}", show(sys::sendfile(f.as_raw_fd(), d.fd, None, 100)));
    let zero = std::fs::File::open("/dev/null").expect("/dev/null");
    log!("null {}", show(sys::sendfile(c.fd, zero.as_raw_fd(), None, 100)));
    w.still_good(&mut c);
    w.still_good(&mut d);
}

fn stdio_both_ways(w: &World) {
    let c = w.pair();
    // SAFETY: the scenario hands the fd over to stdio.
    let f = unsafe { libc::fdopen(c.fd, c"r+".as_ptr()) };
    for i in 0..3 {
        // SAFETY: an open FILE; the format has one int.
        let n = unsafe { libc::fprintf(f, c"line %d\n".as_ptr(), i as libc::c_int) };
        // SAFETY: an open FILE.
        log!("fprintf {n} fflush {}", unsafe { libc::fflush(f) });
        log!("far {}", w.far(&c, "hear"));
        w.far(&c, "say answer\n");
        let mut line = [0 as libc::c_char; 100];
        // SAFETY: a live buffer of this length and an open FILE.
        let p = unsafe { libc::fgets(line.as_mut_ptr(), 100, f) };
        // SAFETY: fgets ends what it read with a zero; the buffer was zeroed before.
        let text = unsafe { std::ffi::CStr::from_ptr(line.as_ptr()) };
        log!("fgets {} {text:?}", !p.is_null());
    }
    // SAFETY: an open FILE.
    log!("fclose {}", unsafe { libc::fclose(f) });
    log!("far EOF {}", w.far(&c, "hear"));
}

fn moves_by_number(w: &World) {
    let mut c = w.pair();
    let fd = c.fd as usize;
    let quiet = libc::MSG_NOSIGNAL as usize;
    let b = c.next(10);
    log!("sendto {}", show(number(libc::SYS_sendto, [fd, b.as_ptr() as usize, 10, quiet, 0, 0])));
    let b = c.next(20);
    let v = [0, 10].map(|at| libc::iovec { iov_base: b[at..].as_ptr().cast_mut().cast(), iov_len: 10 });
    log!("writev {}", show(number(libc::SYS_writev, [fd, v.as_ptr() as usize, 2, 0, 0, 0])));
    log!("far {}", w.far(&c, "get 30"));
    w.far(&c, "put 40");
    c.arrived(40);
    let mut b = [0u8; 40];
    let r = number(libc::SYS_recvfrom, [fd, b.as_mut_ptr() as usize, 10, 0, 0, 0]);
    log!("recvfrom {}", c.checked(r, &b));
    let v = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 10 };
    let r = number(libc::SYS_readv, [fd, (&raw const v) as usize, 1, 0, 0, 0]);
    log!("readv {}", c.checked(r, &b));
    // SAFETY: all-zero is a valid msghdr.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    (m.msg_iov, m.msg_iovlen) = ((&raw const v).cast_mut(), 1);
    let r = number(libc::SYS_recvmsg, [fd, (&raw mut m) as usize, 0, 0, 0, 0]);
    log!("recvmsg {}", c.checked(r, &b));
    let r = number(libc::SYS_read, [fd, b.as_mut_ptr() as usize, 10, 0, 0, 0]);
    log!("read {}", c.checked(r, &b));
    let d = number(libc::SYS_dup, [fd, 0, 0, 0, 0, 0]).expect("dup") as i32;
    log!("close {}", show(number(libc::SYS_close, [fd, 0, 0, 0, 0, 0])));
    c.fd = d;
    w.still_good(&mut c);
    log!("shutdown {}", show(number(libc::SYS_shutdown, [d as usize, libc::SHUT_WR as usize, 0, 0, 0, 0])));
    log!("far {}", w.far(&c, "drain"));
}

fn waits_by_number(w: &World) {
    let mut c = w.pair();
    let mut p = libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 };
    let at = (&raw mut p) as usize;
    let time = libc::timespec { tv_sec: 20, tv_nsec: 0 };
    let ts = (&raw const time) as usize;
    // The kernel's mask: 64 bits, here of nothing.
    let mask = 0u64;
    let pair = [(&raw const mask) as usize, 8];
    let mut set = [0u64; 16];
    let word = c.fd as usize;
    let ep = sys::epoll_create();
    sys::epoll_add(ep, c.fd, libc::EPOLLIN, 7);
    let mut e = [libc::epoll_event { events: 0, u64: 0 }; 4];
    let (ep, ev) = (ep as usize, e.as_mut_ptr() as usize);
    for i in 0..6 {
        w.start_far(&c, "delayput 10 60");
        set[word / 64] |= 1 << (word % 64);
        let fds = set.as_mut_ptr() as usize;
        let r = match i {
            0 => number(libc::SYS_ppoll, [at, 1, ts, 0, 0, 0]),
            1 => number(libc::SYS_ppoll, [at, 1, ts, (&raw const mask) as usize, 8, 0]),
            2 => number(libc::SYS_pselect6, [word + 1, fds, 0, 0, ts, pair.as_ptr() as usize]),
            3 => number(libc::SYS_pselect6, [word + 1, fds, 0, 0, 0, 0]),
            4 => number(libc::SYS_epoll_pwait, [ep, ev, 4, 20_000, 0, 8]),
            _ => number(libc::SYS_epoll_pwait2, [ep, ev, 4, ts, 0, 8]),
        };
        log!("{i}: {} {}", show(r), w.finish());
        log!("{}", c.get(10));
    }
    w.still_good(&mut c);
}

/// A program that does not block, moves its bytes by calls and waits by instructions: `wait` says whether one of the
/// events came. Ping-pongs first, then much at once, each way.
fn with_waits_by_instruction(w: &World, mut c: Conn, wait: &dyn Fn(i16) -> bool) {
    sys::set_nonblocking(c.fd, true);
    let one = |c: &mut Conn| -> Result<(), String> {
        let b = c.next(1);
        let sent = sys::send(c.fd, &b, libc::MSG_NOSIGNAL);
        if sent != Ok(1) {
            return Err(format!("send {}", show(sent)));
        }
        let mut b = [0];
        loop {
            match sys::recv(c.fd, &mut b, 0) {
                Ok(1) => return c.check(&b),
                Err(libc::EAGAIN) if wait(POLLIN) => {}
                r => return Err(format!("recv {}", show(r))),
            }
        }
    };
    w.start_far(&c, "pong 300");
    for i in 0..300 {
        if let Err(e) = one(&mut c) {
            log!("round {i}: {e}");
            let _ = sys::close(c.fd);
            w.finish();
            return;
        }
    }
    log!("{}", w.finish());

    const MUCH: usize = 3_000_000;
    w.start_far(&c, &format!("get {MUCH}"));
    let mut left = MUCH;
    while left > 0 {
        let b = block(c.tx, left.min(50_000));
        match sys::send(c.fd, &b, libc::MSG_NOSIGNAL) {
            Ok(n) => {
                left -= n as usize;
                c.tx += n as u64;
            }
            Err(libc::EAGAIN) if wait(POLLOUT) => {}
            r => {
                log!("send {} with {left} left", show(r));
                let _ = sys::close(c.fd);
                break;
            }
        }
    }
    log!("{}", w.finish());
    w.start_far(&c, &format!("put {MUCH}"));
    let (mut left, mut b) = (MUCH, vec![0; 50_000]);
    while left > 0 {
        match sys::recv(c.fd, &mut b, 0) {
            Ok(n @ 1..) => {
                left = left.saturating_sub(n as usize);
                if let Err(e) = c.check(&b[..n as usize]) {
                    log!("{e}");
                }
            }
            Err(libc::EAGAIN) if wait(POLLIN) => {}
            r => {
                log!("recv {} with {left} left", show(r));
                let _ = sys::close(c.fd);
                break;
            }
        }
    }
    log!("{}", w.finish());
}

/// epoll_pwait by an instruction, for one event.
fn epoll_by_instruction(set: i32) -> bool {
    let mut e = libc::epoll_event { events: 0, u64: 0 };
    let at = &raw mut e as usize;
    // SAFETY: one event, which lives over the call; no mask.
    let n = unsafe { sys::by_instruction(libc::SYS_epoll_pwait, [set as usize, at, 1, 5000, 0, 8]) };
    n == 1 && { e.u64 } == 7
}

/// As Bun does: the set is made and filled by calls.
fn set_waited_for_by_instruction(w: &World) {
    let c = w.cold_on("4");
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, libc::EPOLLIN, 7);
    with_waits_by_instruction(w, c, &|events| {
        sys::epoll_ctl(set, libc::EPOLL_CTL_MOD, c.fd, events as u32, 7).is_ok() && epoll_by_instruction(set)
    });
}

/// As programs of Rust's crates async-io and rustix do: so is the set itself.
fn set_made_by_instruction(w: &World) {
    let c = w.cold_on("4");
    // SAFETY: no pointers.
    let set = unsafe { sys::by_instruction(libc::SYS_epoll_create1, [0; 6]) } as i32;
    let control = |op: i32, events: i16| {
        let e = libc::epoll_event { events: events as u32, u64: 7 };
        let a = [set as usize, op as usize, c.fd as usize, &raw const e as usize, 0, 0];
        // SAFETY: an event, which lives over the call.
        unsafe { sys::by_instruction(libc::SYS_epoll_ctl, a) == 0 }
    };
    log!("{}", control(libc::EPOLL_CTL_ADD, POLLIN));
    with_waits_by_instruction(w, c, &|events| {
        control(libc::EPOLL_CTL_MOD, events) && epoll_by_instruction(set)
    });
}

fn polled_by_instruction(w: &World) {
    let c = w.cold_on("4");
    with_waits_by_instruction(w, c, &|events| {
        let mut p = libc::pollfd { fd: c.fd, events, revents: 0 };
        let t = libc::timespec { tv_sec: 5, tv_nsec: 0 };
        let a = [&raw mut p as usize, 1, &raw const t as usize, 0, 8, 0];
        // SAFETY: one entry and a time, which live over the call; no mask.
        unsafe { sys::by_instruction(libc::SYS_ppoll, a) == 1 }
    });
}

fn positions_by_number(w: &World) {
    let mut c = w.pair();
    let fd = c.fd as usize;
    let nowait = libc::RWF_NOWAIT as usize;
    let mut b = [0u8; 10];
    let v = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 10 };
    let v = (&raw const v) as usize;
    log!("empty {}", show(number(libc::SYS_preadv2, [fd, v, 1, usize::MAX, usize::MAX, nowait])));
    log!("bad flag {}", show(number(libc::SYS_preadv2, [fd, v, 1, usize::MAX, usize::MAX, 1 << 30])));
    w.far(&c, "put 10");
    c.arrived(10);
    let r = number(libc::SYS_preadv2, [fd, v, 1, usize::MAX, usize::MAX, nowait]);
    log!("{}", c.checked(r, &b));
    b.copy_from_slice(&c.next(10));
    log!("{}", show(number(libc::SYS_pwritev2, [fd, v, 1, usize::MAX, usize::MAX, 0])));
    log!("far {}", w.far(&c, "get 10"));
    w.still_good(&mut c);
}

/// struct iocb of linux/aio_abi.h, little endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    prio: i16,
    fd: u32,
    buf: u64,
    n: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    eventfd: u32,
}

struct Aio(usize);

impl Aio {
    fn new() -> Result<Aio, i32> {
        let mut ctx = 0usize;
        number(libc::SYS_io_setup, [8, (&raw mut ctx) as usize, 0, 0, 0, 0]).map(|_| Aio(ctx))
    }

    /// Submits one operation (0: pread, 1: pwrite) and waits for its result.
    fn run(&self, opcode: u16, fd: i32, b: &mut [u8]) -> Res {
        let (buf, n) = (b.as_mut_ptr() as u64, b.len() as u64);
        let cb = Iocb { opcode, fd: fd as u32, buf, n, ..Iocb::default() };
        let list = [(&raw const cb) as usize];
        number(libc::SYS_io_submit, [self.0, 1, list.as_ptr() as usize, 0, 0, 0])?;
        // struct io_event: data, obj, res, res2.
        let mut event = [0i64; 4];
        number(libc::SYS_io_getevents, [self.0, 1, 1, event.as_mut_ptr() as usize, 0, 0])?;
        if event[2] < 0 { Err(-event[2] as i32) } else { Ok(event[2]) }
    }
}

fn aio_moves(w: &World, c: &mut Conn, aio: &Aio) {
    for _ in 0..3 {
        let mut b = c.next(1000);
        log!("pwrite {}", show(aio.run(1, c.fd, &mut b)));
        log!("far {}", w.far(c, "get 1000"));
        w.far(c, "put 1000");
        c.arrived(1000);
        let mut b = [0; 1000];
        let r = aio.run(0, c.fd, &mut b);
        log!("pread {}", c.checked(r, &b));
    }
    w.still_good(c);
}

fn linux_aio(w: &World) {
    w.still_good(&mut w.pair());
    match Aio::new() {
        Ok(aio) => aio_moves(w, &mut w.pair(), &aio),
        Err(e) => log!("io_setup {}", sys::errno_name(e)),
    }
}

fn linux_aio_in_the_middle(w: &World) {
    let mut c = w.pair();
    w.still_good(&mut c);
    match Aio::new() {
        Ok(aio) => aio_moves(w, &mut c, &aio),
        Err(e) => log!("io_setup {}", sys::errno_name(e)),
    }
}

fn linux_aio_with_bytes_waiting(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    match Aio::new() {
        Ok(aio) => {
            let mut b = [0; 500];
            let r = aio.run(0, c.fd, &mut b);
            log!("pread {}", c.checked(r, &b));
            aio_moves(w, &mut c, &aio);
        }
        Err(e) => log!("io_setup {}", sys::errno_name(e)),
    }
}

unsafe extern "C" {
    fn aio_read(a: *mut libc::aiocb) -> i32;
    fn aio_write(a: *mut libc::aiocb) -> i32;
    fn aio_error(a: *const libc::aiocb) -> i32;
    fn aio_return(a: *mut libc::aiocb) -> isize;
}

/// One of libc's own asynchronous calls, made by threads of its own, to its end.
fn aio_run(
    f: unsafe extern "C" fn(*mut libc::aiocb) -> i32,
    fd: i32,
    b: &mut [u8],
    begun: impl FnOnce(),
) -> Res {
    // SAFETY: all-zero is a valid aiocb.
    let mut a: libc::aiocb = unsafe { std::mem::zeroed() };
    (a.aio_fildes, a.aio_buf, a.aio_nbytes) = (fd, b.as_mut_ptr().cast::<c_void>(), b.len());
    // SAFETY: control block and buffer live until the operation is over, below.
    if unsafe { f(&mut a) } < 0 {
        return Err(sys::errno());
    }
    begun();
    loop {
        // SAFETY: a control block under way.
        match unsafe { aio_error(&a) } {
            libc::EINPROGRESS => sys::sleep_ms(2),
            0 => break,
            e => return Err(e),
        }
    }
    // SAFETY: as above; it is over.
    Ok(unsafe { aio_return(&mut a) } as i64)
}

fn posix_aio(w: &World) {
    let mut c = w.pair();
    let mut out = c.next(700);
    log!("aio_write {}", show(aio_run(aio_write, c.fd, &mut out, || ())));
    log!("far {}", w.far(&c, "get 700"));
    let mut b = vec![0; 500];
    let r = aio_run(aio_read, c.fd, &mut b, || log!("far {}", w.far(&c, "put 500")));
    log!("aio_read {}", c.checked(r, &b));
    w.still_good(&mut c);
}

fn posix_aio_with_bytes_waiting(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    let mut b = vec![0; 500];
    let r = aio_run(aio_read, c.fd, &mut b, || ());
    log!("aio_read {}", c.checked(r, &b));
    w.still_good(&mut c);
}

/// As above, in a program with another thread, which may use any number at any time.
fn posix_aio_beside_a_thread(w: &World) {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let t = std::thread::spawn(move || _ = stopped.recv());
    posix_aio_with_bytes_waiting(w);
    drop(stop);
    t.join().expect("it only waits");
}

/// Other threads use the connection by one number or another at all times, and no byte of theirs is lost or comes twice.
fn posix_aio_beside_senders(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 500");
    c.arrived(500);
    let d = sys::dup(c.fd).expect("dup") as i32;
    let sent = std::sync::Mutex::new((c.next(4000), 0));
    std::thread::scope(|s| {
        for fd in [c.fd, d] {
            let sent = &sent;
            s.spawn(move || {
                loop {
                    let mut sent = sent.lock().expect("not poisoned");
                    let at = sent.1;
                    let Some(piece) = sent.0.get(at..at + 10) else { return };
                    if let Err(e) = sys::send(fd, piece, libc::MSG_NOSIGNAL) {
                        return log!("send {}", sys::errno_name(e));
                    }
                    sent.1 += 10;
                }
            });
        }
        let mut b = vec![0; 500];
        let r = aio_run(aio_read, c.fd, &mut b, || ());
        log!("aio_read {}", c.checked(r, &b));
    });
    log!("far {}", w.far(&c, "get 4000"));
    log!("{}", show(sys::close(d)));
    w.still_good(&mut c);
}

/// The connection is in sets, which go on telling of it.
fn posix_aio_in_sets(w: &World) {
    let mut c = w.pair();
    let (level, edge) = (sys::epoll_create(), sys::epoll_create());
    sys::epoll_add(level, c.fd, libc::EPOLLIN, 7);
    sys::epoll_add(edge, c.fd, libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET, 8);
    w.far(&c, "put 500");
    c.arrived(500);
    for set in [level, edge] {
        log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    }
    let mut b = vec![0; 500];
    let r = aio_run(aio_read, c.fd, &mut b, || ());
    log!("aio_read {}", c.checked(r, &b));
    log!("empty {}", sys::show_epoll(sys::epoll_wait(level, 4, 0)));
    w.far(&c, "put 300");
    for set in [level, edge] {
        log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    }
    log!("{}", c.get(300));
    let ctl = |set, op, events: i32, data| show(sys::epoll_ctl(set, op, c.fd, events as u32, data));
    log!("{}", ctl(level, libc::EPOLL_CTL_ADD, libc::EPOLLIN, 1));
    log!("{}", ctl(level, libc::EPOLL_CTL_MOD, libc::EPOLLOUT, 9));
    log!("{}", sys::show_epoll(sys::epoll_wait(level, 4, 4000)));
    log!("{} {}", ctl(level, libc::EPOLL_CTL_DEL, 0, 0), ctl(level, libc::EPOLL_CTL_DEL, 0, 0));
    w.far(&c, "shutdown 1");
    log!("{}", sys::show_epoll(sys::epoll_wait(edge, 4, 4000)));
    let mut out = c.next(100);
    log!("aio_write {}", show(aio_run(aio_write, c.fd, &mut out, || ())));
    log!("far {}", w.far(&c, "get 100"));
}

/// The set has told of what has come, and will tell no more before it is asked to: a thread's turn with the connection.
fn posix_aio_after_one_shot(w: &World) {
    let mut c = w.pair();
    let set = sys::epoll_create();
    let events = libc::EPOLLIN | libc::EPOLLONESHOT;
    sys::epoll_add(set, c.fd, events, 7);
    w.start_far(&c, "put 500");
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    log!("{}", w.finish());
    let mut b = vec![0; 500];
    let r = aio_run(aio_read, c.fd, &mut b, || ());
    log!("aio_read {}", c.checked(r, &b));
    w.far(&c, "put 300");
    log!("none {}", sys::show_epoll(sys::epoll_wait(set, 4, 50)));
    log!("{}", show(sys::epoll_ctl(set, libc::EPOLL_CTL_MOD, c.fd, events as u32, 9)));
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 4, 4000)));
    log!("{}", c.get(300));
    w.still_good(&mut c);
}

/// Each thread has a connection of its own, with a line in it that has come before stdio has the connection.
fn stdio_with_bytes_waiting_beside_threads(w: &World) {
    let all: Vec<_> = (0..4).map(|_| w.pair()).collect();
    for c in &all {
        w.far(c, "say first\n");
        c.arrived(6);
    }
    let lines: Vec<String> = std::thread::scope(|s| {
        let read = |fd| {
            // SAFETY: the scenario hands the fd over to stdio.
            let f = unsafe { libc::fdopen(fd, c"r".as_ptr()) };
            let mut line = [0 as libc::c_char; 100];
            // SAFETY: a live buffer of this length and an open FILE.
            let p = unsafe { libc::fgets(line.as_mut_ptr(), 100, f) };
            // SAFETY: fgets ends what it read with a zero; the buffer was zeroed before.
            let text = unsafe { std::ffi::CStr::from_ptr(line.as_ptr()) };
            format!("{} {text:?}", !p.is_null())
        };
        let threads: Vec<_> = all.iter().map(|c| c.fd).map(|fd| s.spawn(move || read(fd))).collect();
        threads.into_iter().map(|t| t.join().expect("it has read")).collect()
    });
    log!("{lines:?}");
    for c in &all {
        log!("{}", show(sys::send(c.fd, b"back\n", libc::MSG_NOSIGNAL)));
        log!("far {}", w.far(c, "hear"));
    }
}

const IORING_OP_READ: u8 = 22;
const IORING_OP_WRITE: u8 = 23;
const IORING_OP_SEND: u8 = 26;
const IORING_OP_RECV: u8 = 27;

fn uring_moves(w: &World, c: &mut Conn, u: &Uring) {
    for (put, get) in [(IORING_OP_SEND, IORING_OP_RECV), (IORING_OP_WRITE, IORING_OP_READ)] {
        let mut b = c.next(1000);
        log!("{put}: {}", show(u.run(put, c.fd, &mut b)));
        log!("far {}", w.far(c, "get 1000"));
        w.far(c, "put 1000");
        c.arrived(1000);
        let mut b = [0; 1000];
        let r = u.run(get, c.fd, &mut b);
        log!("{get}: {}", c.checked(r, &b));
    }
    w.still_good(c);
}

fn ring_made_before(w: &World) {
    w.still_good(&mut w.pair());
    match Uring::new() {
        Ok(u) => uring_moves(w, &mut w.pair(), &u),
        Err(e) => log!("io_uring_setup {}", sys::errno_name(e)),
    }
}

fn ring_made_in_the_middle(w: &World) {
    let mut c = w.pair();
    w.still_good(&mut c);
    match Uring::new() {
        Ok(u) => uring_moves(w, &mut c, &u),
        Err(e) => log!("io_uring_setup {}", sys::errno_name(e)),
    }
}

/// With a number above the peer's, which may be this process's too: then that end comes first.
fn ring_made_with_bytes_waiting(w: &World) {
    let mut c = w.pair();
    let high = sys::fcntl(c.fd, libc::F_DUPFD, 500).expect("F_DUPFD") as i32;
    sys::close(c.fd).expect("close");
    c.fd = high;
    w.far(&c, "put 500");
    c.arrived(500);
    match Uring::new() {
        Ok(u) => {
            let mut b = [0; 500];
            let r = u.run(IORING_OP_RECV, c.fd, &mut b);
            log!("recv {}", c.checked(r, &b));
            uring_moves(w, &mut c, &u);
        }
        Err(e) => log!("io_uring_setup {}", sys::errno_name(e)),
    }
}

fn zerocopy_in_the_middle(w: &World) {
    const SO_ZEROCOPY: i32 = 60;
    const MSG_ZEROCOPY: i32 = 0x400_0000;
    let mut c = w.pair();
    let b = c.next(100);
    log!("not allowed yet: as if without {}", show(sys::send(c.fd, &b, MSG_ZEROCOPY)));
    log!("far {}", w.far(&c, "get 100"));
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, SO_ZEROCOPY, 1)));
    for i in 0..3 {
        let b = c.next(20_000);
        log!("{}", show(sys::send(c.fd, &b, MSG_ZEROCOPY)));
        log!("far {}", w.far(&c, "get 20000"));
        crate::world::settle(c.fd, libc::POLLERR);
        let r = sys::recvmsg(c.fd, &mut [&mut []], libc::MSG_ERRQUEUE);
        log!("{i}: completion {} control {}", show(r.result), r.control_len > 0);
        w.still_good(&mut c);
    }
}

/// As QEMU does, which asks for it at each connection to find out whether it is to be had.
fn zerocopy_allowed_and_not_used(w: &World) {
    const SO_ZEROCOPY: i32 = 60;
    let mut c = w.cold_on("4");
    log!("{}", show(sys::setsockopt(c.fd, libc::SOL_SOCKET, SO_ZEROCOPY, 1)));
    w.warm(&mut c, 200);
    w.still_good(&mut c);
}

fn filter_attached(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    // "Take all of it": ret #-1.
    let all = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: u32::MAX }];
    let prog = libc::sock_fprog { len: 1, filter: all.as_ptr().cast_mut() };
    let n = size_of_val(&prog) as libc::socklen_t;
    let fd = c.fd;
    let set = |name| {
        // SAFETY: a live program and its size.
        let r = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const prog).cast(), n) };
        if r < 0 { sys::errno_name(sys::errno()) } else { r.to_string() }
    };
    log!("attach {}", set(libc::SO_ATTACH_FILTER));
    log!("{}", c.get(100));
    w.still_good(&mut c);
    log!("detach {}", set(libc::SO_DETACH_FILTER));
    w.still_good(&mut c);
}

/// kTLS: attached, but without keys the stream is as it was.
fn upper_layer_protocol(w: &World) {
    const TCP_ULP: i32 = 31;
    let mut c = w.pair();
    w.far(&c, "put 100");
    c.arrived(100);
    let fd = c.fd;
    let set = |name: &[u8]| {
        let (p, n) = (name.as_ptr().cast(), name.len() as libc::socklen_t);
        // SAFETY: a live name and its length.
        let r = unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, TCP_ULP, p, n) };
        if r < 0 { sys::errno_name(sys::errno()) } else { r.to_string() }
    };
    log!("unknown {}", set(b"none-such"));
    log!("tls {}", set(b"tls"));
    log!("{}", c.get(100));
    w.still_good(&mut c);
}

static COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: i32) {
    COUNT.fetch_add(1, Ordering::Relaxed);
}

fn signalled() -> bool {
    for _ in 0..400 {
        if COUNT.load(Ordering::Relaxed) > 0 {
            return true;
        }
        sys::sleep_ms(5);
    }
    false
}

fn signal_of_choice(w: &World) {
    const F_SETSIG: i32 = 10;
    let mut c = w.pair();
    sys::on_signal(libc::SIGUSR1, count, libc::SA_RESTART);
    log!("{}", show(sys::fcntl(c.fd, F_SETSIG, libc::SIGUSR1)));
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETOWN, std::process::id() as i32)));
    log!("FIOASYNC {:?}", sys::ioctl(c.fd, libc::FIOASYNC, 1));
    for _ in 0..3 {
        COUNT.store(0, Ordering::Relaxed);
        w.far(&c, "put 10");
        c.arrived(10);
        log!("{} {}", signalled(), c.get(10));
    }
    w.still_good(&mut c);
}

fn signals_on_and_off(w: &World) {
    let mut c = w.pair();
    sys::on_signal(libc::SIGIO, count, libc::SA_RESTART);
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETOWN, std::process::id() as i32)));
    let f = sys::fcntl(c.fd, libc::F_GETFL, 0).expect("F_GETFL") as i32;
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETFL, f | libc::O_ASYNC | libc::O_NONBLOCK)));
    COUNT.store(0, Ordering::Relaxed);
    w.far(&c, "put 10");
    c.arrived(10);
    log!("{} {}", signalled(), c.get(10));
    // The end is signalled too.
    COUNT.store(0, Ordering::Relaxed);
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    log!("{} {}", signalled(), show(sys::read(c.fd, &mut [0; 1])));
    log!("{}", show(sys::fcntl(c.fd, libc::F_SETFL, f)));
    log!("{}", c.put(100));
    log!("far {}", w.far(&c, "get 100"));
}

fn recvmmsg_forms(w: &World) {
    let mut c = w.pair();
    let (mut x, mut y) = ([0; 10], [0; 10]);
    let forone = libc::MSG_WAITFORONE;
    w.far(&c, "put 10");
    c.arrived(10);
    let (r, n) = sys::recvmmsg(c.fd, &mut [&mut x, &mut y], forone);
    log!("one {} {:?} {:?}", show(r), &n[..1], c.check(&x));
    log!("none {}", show(sys::recvmmsg(c.fd, &mut [&mut x], forone | libc::MSG_DONTWAIT).0));
    w.start_far(&c, "delayput 10 60");
    let (r, n) = sys::recvmmsg(c.fd, &mut [&mut x, &mut y], forone | libc::MSG_WAITALL);
    log!("late {} {:?} {:?} {}", show(r), &n[..1], c.check(&x), w.finish());
    // At the end: no message, not an error.
    w.far(&c, "put 5");
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    let (r, n) = sys::recvmmsg(c.fd, &mut [&mut x, &mut y], libc::MSG_DONTWAIT);
    log!("at the end {} {n:?} {:?}", show(r), c.check(&x[..5]));
    log!("{}", show(sys::recvmmsg(c.fd, &mut [&mut x], 0).0));
    log!("bad fd {}", show(sys::recvmmsg(-1, &mut [&mut x], 0).0));
}

/// Two messages of 10 bytes at most, with a time-out: the result, what is left of it, the lengths.
fn timed(fd: i32, sec: i64, nsec: i64) -> (Res, libc::timespec, [u32; 2]) {
    let mut b = [[0u8; 10]; 2];
    let mut v = b.each_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 10 });
    // SAFETY: all-zero is a valid mmsghdr.
    let mut m: [libc::mmsghdr; 2] = unsafe { std::mem::zeroed() };
    for (m, v) in m.iter_mut().zip(&mut v) {
        m.msg_hdr.msg_iov = v;
        m.msg_hdr.msg_iovlen = 1;
    }
    let mut t = libc::timespec { tv_sec: sec, tv_nsec: nsec };
    // SAFETY: the headers point to live, exclusive buffers.
    let r = sys::res(unsafe { libc::recvmmsg(fd, m.as_mut_ptr(), 2, libc::MSG_DONTWAIT, &raw mut t) });
    (r, t, m.map(|m| m.msg_len))
}

fn recvmmsg_times(w: &World) {
    let c = w.pair();
    w.far(&c, "put 30");
    c.arrived(30);
    for (sec, nsec) in [(-1, 0), (0, -1), (0, 1_000_000_000)] {
        log!("{sec} {nsec}: {}", show(timed(c.fd, sec, nsec).0));
    }
    let (r, t, n) = timed(c.fd, 0, 0);
    log!("no time {} {n:?} left {} {}", show(r), t.tv_sec, t.tv_nsec);
    let (r, t, n) = timed(c.fd, 1000, 0);
    log!("time enough {} {n:?} less than before {}", show(r), (900..1000).contains(&t.tv_sec));
    let (r, t, _) = timed(c.fd, 1000, 0);
    log!("nothing there {} left {} {}", show(r), t.tv_sec, t.tv_nsec);
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    let (r, _, n) = timed(c.fd, 1000, 0);
    log!("the end, as often as asked {} {n:?}", show(r));
}

/// recvmsg into a message as `change` makes it, and what came back in it.
fn received(fd: i32, flags: i32, change: impl FnOnce(&mut libc::msghdr)) -> String {
    let (mut b, mut name, mut control) = ([0u8; 100], [0u8; 128], [0u64; 8]);
    let mut v = libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    m.msg_name = name.as_mut_ptr().cast();
    m.msg_namelen = 50;
    m.msg_iov = &raw mut v;
    m.msg_iovlen = 1;
    m.msg_control = control.as_mut_ptr().cast();
    m.msg_controllen = size_of_val(&control);
    m.msg_flags = 0x7777;
    change(&mut m);
    // SAFETY: what is in the message is live, or what the kernel refuses.
    let r = sys::res(unsafe { libc::recvmsg(fd, &mut m, flags | libc::MSG_DONTWAIT) } as i64);
    format!("{} {} {} {} {:#x}", show(r), m.msg_namelen, m.msg_iovlen, m.msg_controllen, m.msg_flags)
}

fn message_headers_received(w: &World) {
    let mut c = w.pair();
    let all = |c: &Conn, of: &str| {
        log!("{of}: as it is {}", received(c.fd, libc::MSG_PEEK, |_| {}));
        log!("{of}: close on exec {}", received(c.fd, libc::MSG_PEEK | libc::MSG_CMSG_CLOEXEC, |_| {}));
        log!("{of}: no vector {}", received(c.fd, 0, |m| m.msg_iovlen = 0));
        log!("{of}: vector of nothing {}", received(c.fd, 0, |m| m.msg_iov = std::ptr::null_mut()));
        log!("{of}: 1025 vectors {}", received(c.fd, 0, |m| m.msg_iovlen = 1025));
        log!("{of}: name of -1 {}", received(c.fd, 0, |m| m.msg_namelen = u32::MAX));
        log!("{of}: long name {}", received(c.fd, libc::MSG_PEEK, |m| m.msg_namelen = 1000));
        log!("{of}: no name {}", received(c.fd, libc::MSG_PEEK, |m| m.msg_name = std::ptr::null_mut()));
        log!("{of}: no control {}", received(c.fd, libc::MSG_PEEK, |m| m.msg_controllen = 0));
    };
    all(&c, "empty");
    w.far(&c, "put 10");
    c.arrived(10);
    all(&c, "ten bytes");
    log!("nothing lost: {}", c.get(10));
    w.far(&c, "shutdown 1");
    c.settle(libc::POLLRDHUP);
    all(&c, "the end");
}

fn message_headers_sent(w: &World) {
    let mut c = w.pair();
    let address = Addr::v4([127, 0, 0, 1], 9);
    let beyond: *mut c_void = std::ptr::without_provenance_mut(usize::MAX);
    let mut got = 0;
    let mut send =
        |c: &mut Conn, what: &str, name: *mut c_void, namelen: u32, control: &[u64], pieces: usize| {
            let b = block(c.tx, 2);
            let mut v = libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: 2 };
            // SAFETY: all-zero is a valid msghdr.
            let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
            (m.msg_name, m.msg_namelen) = (name, namelen);
            (m.msg_iov, m.msg_iovlen) = (&raw mut v, pieces);
            (m.msg_control, m.msg_controllen) = (control.as_ptr().cast_mut().cast(), size_of_val(control));
            // SAFETY: what is in the message is live, or what the kernel refuses.
            let r = sys::res(unsafe { libc::sendmsg(c.fd, &m, 0) } as i64);
            if let Ok(n) = r {
                c.tx += n as u64;
                got += n;
            }
            log!("{what}: {}", show(r));
        };
    let name: *mut c_void = address.raw().cast_mut().cast();
    for (what, p, n) in [
        ("name", name, address.len()),
        ("short name", name, 4),
        ("name of 0", name, 0),
        ("name of -1", name, u32::MAX),
        ("no name", std::ptr::null_mut(), 16),
        ("no name of -1", std::ptr::null_mut(), u32::MAX),
        ("name beyond memory", beyond, 16),
    ] {
        send(&mut c, what, p, n, &[], 1);
    }
    send(&mut c, "no vector", name, address.len(), &[], 0);
    // A header that is longer than all there is, and one of a kind that TCP does not take.
    send(&mut c, "control too long", std::ptr::null_mut(), 0, &[1000, 1 << 32 | 1, 0], 1);
    send(&mut c, "control unknown", std::ptr::null_mut(), 0, &[20, 99 << 32 | 1, 0], 1);
    send(&mut c, "control of nobody", std::ptr::null_mut(), 0, &[20, 99 << 32 | 99, 0], 1);
    log!("far {}", w.far(&c, &format!("get {got}")));
    w.still_good(&mut c);
}

fn names_received(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 10");
    c.arrived(10);
    let mut name = [0u8; 128];
    let (mut b, name) = ([0u8; 1], name.as_mut_ptr());
    let mut get = |what: &str, name: *mut u8, len: *mut u32| {
        // SAFETY: a live buffer; an address and its capacity, or what the kernel refuses.
        let r = unsafe { libc::recvfrom(c.fd, b.as_mut_ptr().cast(), 1, 0, name.cast(), len) };
        log!("{what} {} {:?}", show(sys::res(r as i64)), c.check(&b));
    };
    for n in [16, 0, 1000, -1i32] {
        let mut len = n as u32;
        get(&n.to_string(), name, &raw mut len);
        log!("then {len}");
    }
    let beyond = std::ptr::without_provenance_mut(usize::MAX - 7);
    get("no name", std::ptr::null_mut(), std::ptr::null_mut());
    get("no name, a length beyond memory", std::ptr::null_mut(), beyond);
    get("no length", name, std::ptr::null_mut());
    get("a length beyond memory", name, beyond);
    get("the rest is there", std::ptr::null_mut(), std::ptr::null_mut());
    w.still_good(&mut c);
}

fn names_sent_to(w: &World) {
    let mut c = w.pair();
    let name = [0u16; 100];
    let mut got = 0;
    for (what, p, n) in [
        ("no family", name.as_ptr(), 16),
        ("short", name.as_ptr(), 1),
        ("of 0", name.as_ptr(), 0),
        ("of 128", name.as_ptr(), 128),
        ("of 129", name.as_ptr(), 129),
        ("of -1", name.as_ptr(), u32::MAX),
        ("none", std::ptr::null(), 16),
        ("none of -1", std::ptr::null(), u32::MAX),
        ("beyond memory", std::ptr::without_provenance(usize::MAX - 7), 16),
        ("beyond memory, of 0", std::ptr::without_provenance(usize::MAX - 7), 0),
        ("in the first page", std::ptr::without_provenance(8), 16),
    ] {
        let b = block(c.tx, 2);
        // SAFETY: a live buffer; an address and its length, or what the kernel refuses.
        let r = sys::res(unsafe { libc::sendto(c.fd, b.as_ptr().cast(), 2, 0, p.cast(), n) } as i64);
        if let Ok(n) = r {
            c.tx += n as u64;
            got += n;
        }
        log!("{what}: {}", show(r));
    }
    log!("far {}", w.far(&c, &format!("get {got}")));
    w.still_good(&mut c);
}

/// read and write refuse a length that reaches beyond all memory.
fn lengths_beyond_memory(w: &World) {
    let mut c = w.pair();
    w.far(&c, "put 10");
    c.arrived(10);
    let mut b = [0u8; 10];
    for n in [1 << 63, usize::MAX, 1 << 48] {
        // SAFETY: the kernel refuses these.
        log!("read {}", show(sys::res(unsafe { libc::read(c.fd, b.as_mut_ptr().cast(), n) } as i64)));
        // SAFETY: as above.
        log!("write {}", show(sys::res(unsafe { libc::write(c.fd, b.as_ptr().cast(), n) } as i64)));
    }
    log!("nothing lost: {}", c.get(10));
    w.still_good(&mut c);
}

fn splice_refuses(w: &World) {
    let mut c = w.pair();
    let p = sys::pipe();
    let b = c.next(10);
    log!("{}", show(sys::write(p[1], &b)));
    let mut zero = 0i64;
    let (at, none) = (&raw mut zero, std::ptr::null_mut());
    let splice = |from: i32, a: *mut i64, to: i32, b: *mut i64, flags: u32| {
        // SAFETY: positions are null or live.
        show(sys::res(unsafe { libc::splice(from, a, to, b, 10, flags) } as i64))
    };
    log!("position of the pipe {}", splice(p[0], at, c.fd, none, 0));
    log!("position of the connection {}", splice(p[0], none, c.fd, at, 0));
    log!("unknown flags {}", splice(p[0], none, c.fd, none, 0x10));
    log!("all goes {}", splice(p[0], none, c.fd, none, 0));
    log!("far {}", w.far(&c, "get 10"));
    w.far(&c, "put 10");
    c.arrived(10);
    log!("position of the connection {}", splice(c.fd, at, p[1], none, 0));
    log!("position of the pipe {}", splice(c.fd, none, p[1], at, 0));
    log!("unknown flags {}", splice(c.fd, none, p[1], none, 0x80));
    log!("moved {zero}, all comes {}", c.get(10));
    w.still_good(&mut c);
}

fn sendmmsg_partly(w: &World) {
    let mut c = w.pair();
    log!("{}", c.put(0));
    let before = c.tx;
    log!("{}", c.fill());
    sys::set_nonblocking(c.fd, true);
    log!("full {}", show(sys::sendmmsg(c.fd, &[&[1; 10], &[2; 10]]).0));
    sys::set_nonblocking(c.fd, false);
    let n = c.tx - before;
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.far(&c, "shutdown 0");
    log!("{}", show(sys::shutdown(c.fd, libc::SHUT_WR)));
    sys::on_signal(libc::SIGPIPE, count, 0);
    log!(
        "ended {} {}",
        show(sys::sendmmsg(c.fd, &[&[1; 10]]).0),
        sys::show_poll(sys::poll1(c.fd, POLLOUT, 0))
    );
    std::io::stdout().flush().expect("flush");
}

/// Calls whose arguments lie where `at` says; none is about a connection.
fn calls_at(at: *mut c_void) {
    let (ms, n) = (1, 9);
    let mut short = libc::timeval { tv_sec: 0, tv_usec: 1 };
    let time = libc::timespec { tv_sec: 0, tv_nsec: 1 };
    let (tv, ts) = (&raw mut short, &raw const time);
    let none = std::ptr::null_mut::<c_void>();
    let mut p = libc::pollfd { fd: 0, events: 0, revents: 0 };
    let unix = sys::unix_pair(libc::SOCK_DGRAM);
    // SAFETY: all-zero is an empty message.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    m.msg_control = at;
    m.msg_controllen = 64;
    // SAFETY: the point of these calls: the kernel answers EFAULT for an address that is not the program's.
    let rs = unsafe {
        [
            ("poll", sys::res(libc::poll(at.cast(), n, ms))),
            ("ppoll", sys::res(libc::ppoll(at.cast(), n, ts, none.cast()))),
            ("read set", sys::res(libc::select(9, at.cast(), none.cast(), none.cast(), tv))),
            ("write set", sys::res(libc::select(9, none.cast(), at.cast(), none.cast(), tv))),
            ("set", sys::res(libc::pselect(9, none.cast(), none.cast(), at.cast(), ts, none.cast()))),
            ("message", sys::res(libc::sendmsg(unix[0], at.cast(), 0) as i64)),
            ("control", sys::res(libc::sendmsg(unix[0], &raw const m, 0) as i64)),
            ("messages", sys::res(libc::sendmmsg(unix[0], at.cast(), 2, 0))),
            ("to receive", sys::res(libc::recvmsg(unix[0], at.cast(), libc::MSG_DONTWAIT) as i64)),
            ("vector", sys::res(libc::writev(unix[0], at.cast(), 2) as i64)),
            ("address", sys::res(libc::connect(-1, at.cast(), 16))),
        ]
    };
    for (name, r) in rs {
        log!("{name} {}", show(r));
    }
    let (at, p) = (at as usize, (&raw mut p) as usize);
    for (name, r) in [
        ("clone3", number(libc::SYS_clone3, [at, 64, 0, 0, 0, 0])),
        ("time of ppoll", number(libc::SYS_ppoll, [p, 1, at, 0, 0, 0])),
        ("time of pselect6", number(libc::SYS_pselect6, [0, 0, 0, 0, at, 0])),
        ("set of pselect6", number(libc::SYS_pselect6, [9, at, 0, 0, ts as usize, 0])),
        #[cfg(target_arch = "x86_64")]
        ("time of select", number(libc::SYS_select, [0, 0, 0, 0, at, 0])),
    ] {
        log!("{name} {}", show(r));
    }
}

fn addresses_of_nothing(_: &World) {
    // SAFETY: a page of its own that nobody may touch.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    calls_at(page);
}

fn addresses_beyond_memory(w: &World) {
    let mut c = w.pair();
    for at in [8, usize::MAX - 7, 1 << 47] {
        calls_at(std::ptr::without_provenance_mut(at));
    }
    w.still_good(&mut c);
}
