//! Rings that liburing makes and enters: the connections that their entries name, and those that they do not.
//!
//! Its functions are looked up in the program's scope, as the loader does for a program that is linked with it, or in that
//! of a library which has brought it ([`Scope`]).

use crate::{
    Scenario, log, s,
    sys::{self, show},
    world::{Conn, World},
};
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, c_int, c_uint, c_void};
use std::{ffi::CStr, fs, os::fd::AsRawFd as _, process::Command, ptr};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(moves_bytes_in_the_middle),
    s!(finds_bytes_waiting),
    s!(waits_while_it_submits),
    s!(polls_then_libc_reads),
    s!(polls_a_set),
    s!(changes_a_set),
    s!(registers_it_as_a_file),
    s!(updates_files_with_it),
    s!(splices_it),
    s!(sends_it_in_a_message),
    s!(closes_it),
    s!(read_by_a_thread),
    s!(large_entries),
    s!(nobody_has_liburing),
    s!(of_a_library_in_a_scope_of_its_own),
    s!(reads_files_beside).stays(),
    s!(accepts_beside).stays(),
];

/// struct io_uring and what comes behind it.
type Memory = Box<[u64; 64]>;

/// struct io_uring_sqe.
#[repr(C)]
struct Sqe {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    op_flags: u32,
    data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd_in: i32,
    rest: [u64; 2],
}

/// An entry, as far as it is not zero.
#[derive(Clone, Copy, Default)]
struct Entry {
    op: u8,
    flags: u8,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    op_flags: u32,
    from: i32,
}

const OP_POLL_ADD: u8 = 6;
const OP_SENDMSG: u8 = 9;
const OP_ACCEPT: u8 = 13;
const OP_CLOSE: u8 = 19;
const OP_FILES_UPDATE: u8 = 20;
const OP_READ: u8 = 22;
const OP_SEND: u8 = 26;
const OP_RECV: u8 = 27;
const OP_EPOLL_CTL: u8 = 29;
const OP_SPLICE: u8 = 30;
const FIXED_FILE: u8 = 1;
const SQPOLL: c_uint = 2;
const SQE128: c_uint = 1 << 10;

/// Where the functions are looked up.
#[derive(Clone, Copy)]
struct Scope(*mut c_void);

impl Scope {
    /// The program's, with liburing in it. `None`: there is no liburing.
    fn program() -> Option<Scope> {
        // SAFETY: NUL-terminated.
        let l = unsafe { libc::dlopen(c"liburing.so.2".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if l.is_null() {
            none();
            return None;
        }
        Some(Scope(libc::RTLD_DEFAULT))
    }

    fn at(self, name: &CStr) -> *mut c_void {
        // SAFETY: a handle, and NUL-terminated.
        let p = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!p.is_null(), "{name:?}");
        p
    }
}

/// `cargo xtask test` has installed it where it may.
fn none() {
    assert!(std::env::var_os("CI").is_none(), "no liburing");
    log!("no liburing");
}

/// Calls the function of that name.
macro_rules! call {
    ($scope:expr, $name:literal($($a:expr => $t:ty),*) -> $r:ty) => {{
        // SAFETY: liburing.h has it so.
        let f: unsafe extern "C" fn($($t),*) -> $r = unsafe { std::mem::transmute($scope.at($name)) };
        // SAFETY: as the callers have them.
        unsafe { f($($a),*) }
    }};
}

pub struct Ring {
    scope: Scope,
    memory: Memory,
}

impl Ring {
    fn new(flags: c_uint) -> Option<Ring> {
        Self::within(Scope::program()?, flags)
    }

    /// By functions that were looked up in liburing itself, where nothing comes before it.
    pub fn found() -> Option<Ring> {
        // SAFETY: NUL-terminated.
        let l = unsafe { libc::dlopen(c"liburing.so.2".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if l.is_null() {
            none();
            return None;
        }
        Self::within(Scope(l), 0)
    }

    fn within(scope: Scope, flags: c_uint) -> Option<Ring> {
        let mut memory: Memory = Box::new([0; 64]);
        let at = memory.as_mut_ptr();
        let r = call!(scope, c"io_uring_queue_init"(8 => c_uint, at => *mut u64, flags => c_uint) -> c_int);
        if r < 0 {
            log!("io_uring_queue_init {}", sys::errno_name(-r));
            return None;
        }
        Some(Ring { scope, memory })
    }

    fn at(&mut self) -> *mut u64 {
        self.memory.as_mut_ptr()
    }

    /// Fills the next entry.
    fn put(&mut self, e: Entry, data: u64) {
        let at = self.at();
        let sqe = call!(self.scope, c"io_uring_get_sqe"(at => *mut u64) -> *mut Sqe);
        assert!(!sqe.is_null(), "room for an entry");
        let Entry { op, flags, fd, off, addr, len, op_flags, from } = e;
        let sqe_is = Sqe {
            opcode: op,
            flags,
            ioprio: 0,
            fd,
            off,
            addr,
            len,
            op_flags,
            data,
            buf_index: 0,
            personality: 0,
            splice_fd_in: from,
            rest: [0; 2],
        };
        // SAFETY: an entry that is the program's to fill.
        unsafe { sqe.write(sqe_is) };
    }

    fn submit(&mut self) -> c_int {
        let at = self.at();
        call!(self.scope, c"io_uring_submit"(at => *mut u64) -> c_int)
    }

    /// The next completion, waited for as io_uring_wait_cqe(3), which is in the header, does it: data and result.
    fn next(&mut self) -> String {
        let (at, mut cqe) = (self.at(), ptr::null::<[u32; 4]>());
        let r = call!(self.scope, c"__io_uring_get_cqe"(at => *mut u64, &raw mut cqe => *mut *const [u32; 4], 0 => c_uint, 1 => c_uint, ptr::null() => *const libc::sigset_t) -> c_int);
        self.told(r, cqe)
    }

    fn told(&mut self, r: c_int, cqe: *const [u32; 4]) -> String {
        if r < 0 {
            return sys::errno_name(-r);
        }
        // SAFETY: struct io_uring_cqe: data (8 bytes), result, flags.
        let [data, _, res, _] = unsafe { *cqe };
        // The ring of completions begins at byte 104 with the address of its head.
        // SAFETY: the program's to move, by one that it has seen.
        unsafe { *(self.memory[13] as *mut u32) += 1 };
        let res = res as i32;
        format!("{data}:{}", if res < 0 { sys::errno_name(-res) } else { res.to_string() })
    }

    /// One entry, submitted and waited for.
    fn run(&mut self, e: Entry, data: u64) -> String {
        self.put(e, data);
        format!("{} {}", self.submit(), self.next())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let at = self.at();
        call!(self.scope, c"io_uring_queue_exit"(at => *mut u64) -> ());
    }
}

fn recv(fd: i32, b: &mut [u8]) -> Entry {
    Entry { op: OP_RECV, fd, addr: b.as_mut_ptr() as u64, len: b.len() as u32, ..Entry::default() }
}

fn send(fd: i32, b: &[u8]) -> Entry {
    Entry { op: OP_SEND, fd, addr: b.as_ptr() as u64, len: b.len() as u32, ..Entry::default() }
}

fn poll(fd: i32) -> Entry {
    Entry { op: OP_POLL_ADD, fd, op_flags: libc::POLLIN as u32, ..Entry::default() }
}

/// Bytes that come while the ring waits for them, and a way back.
fn moves_by(w: &World, c: &mut Conn, r: &mut Ring, flags: u8, fd: i32) {
    let mut b = [0; 1000];
    r.put(Entry { flags, ..recv(fd, &mut b) }, 1);
    log!("{}", r.submit());
    w.start_far(c, "put 1000");
    log!("{} {}", r.next(), w.finish());
    log!("{}", c.checked(Ok(1000), &b));
    let b = c.next(700);
    log!("{}", r.run(Entry { flags, ..send(fd, &b) }, 2));
    log!("far {}", w.far(c, "get 700"));
}

/// The connection is named by its number.
pub fn moves(w: &World, c: &mut Conn, r: &mut Ring) {
    let fd = c.fd;
    moves_by(w, c, r, 0, fd);
}

fn moves_bytes_in_the_middle(w: &World) {
    let mut c = w.pair();
    w.still_good(&mut c);
    let Some(mut r) = Ring::new(0) else { return };
    moves(w, &mut c, &mut r);
    w.still_good(&mut c);
    // Again by the ring, after libc's calls.
    moves(w, &mut c, &mut r);
    w.still_good(&mut w.pair());
}

fn finds_bytes_waiting(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    // A number above the peer's, which may be this process's too.
    let high = sys::fcntl(c.fd, libc::F_DUPFD, 500).expect("F_DUPFD") as i32;
    sys::close(c.fd).expect("close");
    c.fd = high;
    w.far(&c, "put 500");
    c.arrived(500);
    let mut b = [0; 500];
    log!("{}", r.run(recv(c.fd, &mut b), 1));
    log!("{}", c.checked(Ok(500), &b));
    w.still_good(&mut c);
}

/// By each function that submits and does something more.
fn waits_while_it_submits(w: &World) {
    let Some(mut r) = Ring::new(0) else { return };
    for which in 0..3 {
        let mut c = w.pair();
        let mut b = [0; 300];
        r.put(recv(c.fd, &mut b), which);
        w.start_far(&c, "delayput 300 30");
        let (at, scope) = (r.at(), r.scope);
        let mut cqe = ptr::null::<[u32; 4]>();
        let out = &raw mut cqe;
        let mut long = [20i64, 0];
        let time = long.as_mut_ptr();
        let n = match which {
            0 => {
                call!(scope, c"io_uring_submit_and_wait"(at => *mut u64, 1 => c_uint) -> c_int)
            }
            1 => {
                call!(scope, c"io_uring_submit_and_wait_timeout"(at => *mut u64, out => *mut *const [u32; 4], 1 => c_uint, time => *mut i64, ptr::null() => *const libc::sigset_t) -> c_int)
            }
            _ => {
                call!(scope, c"io_uring_submit_and_get_events"(at => *mut u64) -> c_int)
            }
        };
        log!("{n} {} {}", r.next(), w.finish());
        log!("{}", c.checked(Ok(300), &b));
        w.still_good(&mut c);
    }
}

fn polls_then_libc_reads(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    r.put(poll(c.fd), 1);
    log!("{}", r.submit());
    w.start_far(&c, "put 400");
    log!("{} {} {}", r.next(), w.finish(), c.get(400));
    w.still_good(&mut c);
}

fn polls_a_set(w: &World) {
    let mut c = w.pair();
    let set = sys::epoll_create();
    sys::epoll_add(set, c.fd, EPOLLIN, 7);
    log!("{}", sys::show_epoll(sys::epoll_wait(set, 8, 0)));
    let Some(mut r) = Ring::new(0) else { return };
    r.put(poll(set), 1);
    log!("{}", r.submit());
    w.start_far(&c, "put 400");
    log!("{} {}", r.next(), w.finish());
    log!("{} {}", sys::show_epoll(sys::epoll_wait(set, 8, 10_000)), c.get(400));
    w.still_good(&mut c);
}

fn changes_a_set(w: &World) {
    let mut c = w.pair();
    let set = sys::epoll_create();
    let Some(mut r) = Ring::new(0) else { return };
    let event = |events: c_int| libc::epoll_event { events: events as u32, u64: 9 };
    for (op, e) in [
        (EPOLL_CTL_ADD, event(EPOLLIN)),
        (EPOLL_CTL_MOD, event(EPOLLIN | EPOLLOUT)),
        (EPOLL_CTL_MOD, event(EPOLLIN)),
    ] {
        let change = Entry {
            op: OP_EPOLL_CTL,
            fd: set,
            off: c.fd as u64,
            addr: (&raw const e) as u64,
            len: op as u32,
            ..Entry::default()
        };
        log!("{} {}", r.run(change, 1), sys::show_epoll(sys::epoll_wait(set, 8, 0)));
    }
    w.start_far(&c, "put 300");
    log!("{} {} {}", sys::show_epoll(sys::epoll_wait(set, 8, 10_000)), w.finish(), c.get(300));
    w.still_good(&mut c);
}

fn registers_it_as_a_file(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let (at, list) = (r.at(), [-1, c.fd]);
    log!(
        "{}",
        call!(r.scope, c"io_uring_register_files"(at => *mut u64, list.as_ptr() => *const c_int, 2 => c_uint) -> c_int)
    );
    moves_by(w, &mut c, &mut r, FIXED_FILE, 1);
    w.still_good(&mut c);
}

/// By a function, and by an entry.
fn updates_files_with_it(w: &World) {
    let Some(mut r) = Ring::new(0) else { return };
    let (at, list) = (r.at(), [-1; 4]);
    log!(
        "{}",
        call!(r.scope, c"io_uring_register_files"(at => *mut u64, list.as_ptr() => *const c_int, 4 => c_uint) -> c_int)
    );
    let (mut c, mut d, mut e) = (w.pair(), w.pair(), w.pair());
    let list = [d.fd, c.fd];
    log!(
        "{}",
        call!(r.scope, c"io_uring_register_files_update"(at => *mut u64, 0 => c_uint, list.as_ptr() => *const c_int, 2 => c_uint) -> c_int)
    );
    let list = [e.fd];
    log!(
        "{}",
        r.run(
            Entry {
                op: OP_FILES_UPDATE,
                fd: -1,
                off: 3,
                addr: list.as_ptr() as u64,
                len: 1,
                ..Entry::default()
            },
            4
        )
    );
    for (c, index) in [(&mut c, 1), (&mut d, 0), (&mut e, 3)] {
        moves_by(w, c, &mut r, FIXED_FILE, index);
        w.still_good(c);
    }
}

/// From the connection into a pipe, in two ways to name the source.
fn splices_it(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let p = sys::pipe();
    let none = u64::MAX;
    r.put(
        Entry { op: OP_SPLICE, fd: p[1], off: none, addr: none, len: 200, from: c.fd, ..Entry::default() },
        1,
    );
    log!("{}", r.submit());
    w.start_far(&c, "put 200");
    log!("{} {}", r.next(), w.finish());
    let mut b = [0; 200];
    let n = sys::read(p[0], &mut b);
    log!("{}", c.checked(n, &b));
    let b = c.next(100);
    log!("{}", show(sys::write(p[1], &b)));
    log!(
        "{}",
        r.run(
            Entry {
                op: OP_SPLICE,
                fd: c.fd,
                off: none,
                addr: none,
                len: 100,
                from: p[0],
                ..Entry::default()
            },
            2
        )
    );
    log!("far {}", w.far(&c, "get 100"));
    w.still_good(&mut c);
}

fn sends_it_in_a_message(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let u = sys::unix_pair(libc::SOCK_STREAM);
    let mut text = *b"x";
    let mut iov = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: 1 };
    // struct cmsghdr: length (8 bytes), level, type; then the number.
    let mut control = [20u64, (libc::SCM_RIGHTS as u64) << 32 | libc::SOL_SOCKET as u64, c.fd as u64];
    // SAFETY: plain old data, of which all zeroes is a value.
    let mut m: libc::msghdr = unsafe { std::mem::zeroed() };
    (m.msg_iov, m.msg_iovlen) = (&raw mut iov, 1);
    (m.msg_control, m.msg_controllen) = (control.as_mut_ptr().cast(), 24);
    log!(
        "{}",
        r.run(Entry { op: OP_SENDMSG, fd: u[0], addr: (&raw const m) as u64, len: 1, ..Entry::default() }, 1)
    );
    let mut b = [0; 1];
    let got = sys::recvmsg(u[1], &mut [&mut b], 0);
    log!("{} {}", show(got.result), got.control_len);
    let fd = got.fds[0];
    w.start_far(&c, "put 300");
    let mut b = [0; 300];
    log!("{} {}", r.run(Entry { op_flags: libc::MSG_WAITALL as u32, ..recv(fd, &mut b) }, 2), w.finish());
    log!("{}", c.checked(Ok(300), &b));
    w.still_good(&mut c);
}

fn closes_it(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let b = c.next(900);
    log!("{}", show(sys::send(c.fd, &b, libc::MSG_NOSIGNAL)));
    log!("{}", r.run(Entry { op: OP_CLOSE, fd: c.fd, ..Entry::default() }, 1));
    log!("{}", show(sys::send(c.fd, &b, libc::MSG_NOSIGNAL)));
    log!("far {}", w.far(&c, "drain"));
    let mut d = w.pair();
    w.still_good(&mut d);
}

fn read_by_a_thread(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(SQPOLL) else { return };
    w.still_good(&mut c);
    moves(w, &mut c, &mut r);
    w.still_good(&mut c);
}

fn large_entries(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(SQE128) else { return };
    // The first entry is a NOP, so that the second is not where the first is.
    log!("{}", r.run(Entry { fd: -1, ..Entry::default() }, 5));
    moves(w, &mut c, &mut r);
    w.still_good(&mut c);
}

/// A library that is loaded with RTLD_LOCAL, and has brought liburing: its calls are bound to what the program has, if
/// that has such names, and else to those of liburing, which nobody else sees.
fn of_a_library_in_a_scope_of_its_own(w: &World) {
    let mut c = w.pair();
    let dir = std::env::temp_dir().join(format!("smc-liburing-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    let (source, library) = (dir.join("l.c"), dir.join("l.so"));
    let code = "struct io_uring; int io_uring_submit(struct io_uring *);\
                int submit(struct io_uring *r) { int n = io_uring_submit(r); return n; }";
    fs::write(&source, code).expect("a file");
    let built = Command::new("cc")
        .env_remove("LD_PRELOAD")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .args(["-Wl,--no-as-needed", "-l:liburing.so.2"])
        .output()
        .expect("cc");
    if !built.status.success() {
        let _ = fs::remove_dir_all(&dir);
        return none();
    }
    let path = std::ffi::CString::new(library.to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: NUL-terminated.
    let l = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!l.is_null(), "loads");
    if let Some(mut r) = Ring::within(Scope(l), 0) {
        for round in 0..3 {
            let mut b = [0; 400];
            r.put(recv(c.fd, &mut b), round);
            let at = r.at();
            log!("{}", call!(r.scope, c"submit"(at => *mut u64) -> c_int));
            w.start_far(&c, "put 400");
            log!("{} {}", r.next(), w.finish());
            log!("{}", c.checked(Ok(400), &b));
        }
    }
    w.still_good(&mut c);
    let _ = fs::remove_dir_all(&dir);
}

/// The names are there under the preload; what a program gets that has no liburing and calls them all the same.
fn nobody_has_liburing(w: &World) {
    let mut c = w.pair();
    // SAFETY: NUL-terminated.
    let p = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"io_uring_submit".as_ptr()) };
    let mut r = Memory::new([0; 64]);
    if !p.is_null() {
        let scope = Scope(libc::RTLD_DEFAULT);
        let n = call!(scope, c"io_uring_submit"(r.as_mut_ptr() => *mut u64) -> c_int);
        assert_eq!(n, -libc::ENOSYS);
    }
    w.still_good(&mut c);
}

/// As a database does.
fn reads_files_beside(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let f = fs::File::open("/proc/self/exe").expect("our own file");
    let mut b = [0; 4];
    let fd = f.as_raw_fd();
    for i in 0..20 {
        log!("{} {b:?}", r.run(Entry { op: OP_READ, ..recv(fd, &mut b) }, i));
        w.still_good(&mut c);
    }
    let (at, list) = (r.at(), [fd]);
    log!(
        "{}",
        call!(r.scope, c"io_uring_register_files"(at => *mut u64, list.as_ptr() => *const c_int, 1 => c_uint) -> c_int)
    );
    log!("{} {b:?}", r.run(Entry { op: OP_READ, flags: FIXED_FILE, ..recv(0, &mut b) }, 1));
    w.still_good(&mut c);
}

/// What it accepts stays on TCP; what others have does not go there.
fn accepts_beside(w: &World) {
    let mut c = w.pair();
    let Some(mut r) = Ring::new(0) else { return };
    let (l, port) = crate::world::listener(&crate::world::address("4", 0), 8);
    r.put(Entry { op: OP_ACCEPT, fd: l, ..Entry::default() }, 1);
    log!("{}", r.submit());
    let a = crate::world::address("4", port);
    let s = sys::socket(a.family(), libc::SOCK_STREAM).expect("socket") as i32;
    log!("{}", show(sys::connect(s, &a)));
    let told = r.next();
    let accepted: i32 = told.split(':').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    log!("{}", show(sys::write(s, b"some bytes")));
    let mut b = [0; 10];
    log!("{} {b:?}", r.run(recv(accepted, &mut b), 2));
    w.still_good(&mut c);
    let _ = (sys::close(s), sys::close(accepted), sys::close(l));
}
