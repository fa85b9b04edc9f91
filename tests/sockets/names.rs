//! The same calls by their other names: what libc exports beside read, fork, exec and so on.

use crate::{
    Scenario, log, s,
    sys::{self, show},
    world::World,
};
use libc::{POLLIN, c_char, c_int, c_void};
use std::ptr;

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(moves_with_checks),
    s!(waits_with_checks),
    s!(prints_with_a_list),
    s!(forks).procs(),
    s!(execs).procs(),
    s!(ends).procs(),
    s!(lists_of_aio),
    s!(program_has_such_names_itself).procs(),
];

// bits/socket2.h, bits/unistd.h, bits/poll2.h, bits/stdio2.h of glibc; aio.h; unistd.h.
unsafe extern "C" {
    fn __read_chk(fd: c_int, buf: *mut c_void, n: usize, have: usize) -> isize;
    fn __recv_chk(fd: c_int, buf: *mut c_void, n: usize, have: usize, flags: c_int) -> isize;
    fn __recvfrom_chk(
        fd: c_int,
        buf: *mut c_void,
        n: usize,
        have: usize,
        flags: c_int,
        from: *mut libc::sockaddr,
        len: *mut libc::socklen_t,
    ) -> isize;
    fn __poll_chk(p: *mut libc::pollfd, n: libc::nfds_t, ms: c_int, len: usize) -> c_int;
    fn __ppoll_chk(
        p: *mut libc::pollfd,
        n: libc::nfds_t,
        t: *const libc::timespec,
        mask: *const libc::sigset_t,
        len: usize,
    ) -> c_int;
    fn __dprintf_chk(fd: c_int, flag: c_int, format: *const c_char, ...) -> c_int;
    fn vdprintf(fd: c_int, format: *const c_char, list: *mut c_void) -> c_int;
    fn __vdprintf_chk(fd: c_int, flag: c_int, format: *const c_char, list: *mut c_void) -> c_int;
    fn _Fork() -> libc::pid_t;
    fn _Exit(code: c_int) -> !;
    fn fexecve(fd: c_int, argv: *const *const c_char, envp: *const *const c_char) -> c_int;
    fn execveat(dir: c_int, path: *const c_char, argv: Strs, envp: Strs, flags: c_int) -> c_int;
    fn execvpe(path: *const c_char, argv: Strs, envp: Strs) -> c_int;
    fn lio_listio(mode: c_int, list: *const *mut libc::aiocb, n: c_int, then: *mut c_void) -> c_int;
    fn aio_error(a: *const libc::aiocb) -> c_int;
    fn aio_return(a: *mut libc::aiocb) -> isize;
}

type Strs = *const *const c_char;

fn moves_with_checks(w: &World) {
    let mut c = w.pair();
    let mut b = [0u8; 100];
    for _ in 0..3 {
        w.far(&c, "put 30");
        c.arrived(30);
        // SAFETY: a live buffer of that size.
        let r = sys::res(unsafe { __read_chk(c.fd, b.as_mut_ptr().cast(), 10, 100) } as i64);
        log!("{}", c.checked(r, &b));
        // SAFETY: as above.
        let r = sys::res(unsafe { __recv_chk(c.fd, b.as_mut_ptr().cast(), 10, 100, 0) } as i64);
        log!("{}", c.checked(r, &b));
        let (from, len) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: as above; no address is asked for.
        let r = unsafe { __recvfrom_chk(c.fd, b.as_mut_ptr().cast(), 100, 100, 0, from, len) };
        log!("{}", c.checked(sys::res(r as i64), &b));
        // SAFETY: as above.
        let r = unsafe { __recv_chk(c.fd, b.as_mut_ptr().cast(), 100, 100, libc::MSG_DONTWAIT) };
        log!("{}", show(sys::res(r as i64)));
    }
    w.still_good(&mut c);
}

fn waits_with_checks(w: &World) {
    let mut c = w.pair();
    let mut p = [libc::pollfd { fd: c.fd, events: POLLIN, revents: 0 }];
    let len = size_of_val(&p);
    for round in 0..3 {
        w.start_far(&c, "delayput 10 30");
        let t = libc::timespec { tv_sec: 10, tv_nsec: 0 };
        let r = if round % 2 == 0 {
            // SAFETY: a list of one, of that size.
            unsafe { __poll_chk(p.as_mut_ptr(), 1, 10_000, len) }
        } else {
            // SAFETY: as above, and a live time.
            unsafe { __ppoll_chk(p.as_mut_ptr(), 1, &t, ptr::null(), len) }
        };
        log!("{r} {:#x} {} {}", p[0].revents, w.finish(), c.get(10));
    }
    // SAFETY: as above.
    log!("{}", unsafe { __poll_chk(p.as_mut_ptr(), 1, 0, len) });
    w.still_good(&mut c);
}

/// A `va_list` whose arguments are all on the "stack": as the compilers make it (System V x86-64 3.5.7, AAPCS64
/// appendix B).
fn list_of(words: &mut [u64]) -> [u64; 4] {
    let p = words.as_mut_ptr() as u64;
    if cfg!(target_arch = "aarch64") {
        [p, p, p, 0]
    } else {
        // gp_offset 48 and fp_offset 176: no register is left.
        [48 | 176 << 32, p, 0, 0]
    }
}

fn prints_with_a_list(w: &World) {
    let mut c = w.pair();
    for i in 0..3u64 {
        let mut words = [i, 40 + i, c"text".as_ptr() as u64];
        let mut list = list_of(&mut words);
        let format = c"%d %ld %s\n".as_ptr();
        // SAFETY: the list holds what the format says.
        log!("{}", unsafe { vdprintf(c.fd, format, list.as_mut_ptr().cast()) });
        log!("far {}", w.far(&c, "hear"));
        let mut list = list_of(&mut words);
        // SAFETY: as above.
        log!("{}", unsafe { __vdprintf_chk(c.fd, 1, format, list.as_mut_ptr().cast()) });
        log!("far {}", w.far(&c, "hear"));
        // SAFETY: the arguments are what the format says.
        log!("{}", unsafe { __dprintf_chk(c.fd, 1, format, i as c_int, 7i64, c"more".as_ptr()) });
        log!("far {}", w.far(&c, "hear"));
    }
    w.still_good(&mut c);
}

extern "C" fn sends(end: *mut c_void) -> c_int {
    // SAFETY: the parent's End, of which this process has a copy.
    let end = unsafe { &mut *end.cast::<crate::world::End>() };
    i32::from(end.put(1000) != "put 1000")
}

/// Each child uses the connection, and ends; its parent goes on.
fn forks(w: &World) {
    let mut c = w.pair();
    let mut stack = vec![0u8; 1 << 18];
    for how in ["_Fork", "clone", "SYS_clone", "SYS_fork"] {
        let mut end = c.end;
        // SAFETY: each child runs `sends` and ends, on a copy of this memory.
        let pid = unsafe {
            match how {
                "clone" => {
                    let top = stack.as_mut_ptr().add(stack.len() & !15).cast();
                    libc::clone(sends, top, libc::SIGCHLD, (&raw mut end).cast())
                }
                _ => {
                    let pid = match how {
                        "_Fork" => _Fork(),
                        #[cfg(target_arch = "x86_64")]
                        "SYS_fork" => libc::syscall(libc::SYS_fork) as i32,
                        _ => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32,
                    };
                    if pid == 0 {
                        libc::_exit(sends((&raw mut end).cast()));
                    }
                    pid
                }
            }
        };
        log!("{how}: {} far {}", sys::wait(pid), w.far(&c, "get 1000"));
        c.tx += 1000;
        w.still_good(&mut c);
    }
}

/// Becomes cat, by one of the names.
fn exec(how: &str) {
    let cat = c"/bin/cat".as_ptr();
    let argv = [c"cat".as_ptr(), c"-".as_ptr(), ptr::null()];
    let envp = [c"LC_ALL=C".as_ptr(), ptr::null()];
    let (a, end) = (argv[1], ptr::null::<c_char>());
    // SAFETY: ended lists of live strings, in the forms that the calls have.
    unsafe {
        match how {
            "execl" => libc::execl(cat, argv[0], a, end),
            "execle" => libc::execle(cat, argv[0], a, end, envp.as_ptr()),
            "execlp" => libc::execlp(c"cat".as_ptr(), argv[0], a, end),
            "execve" => libc::execve(cat, argv.as_ptr(), envp.as_ptr()),
            "execvp" => libc::execvp(c"cat".as_ptr(), argv.as_ptr()),
            "execvpe" => execvpe(c"cat".as_ptr(), argv.as_ptr(), envp.as_ptr()),
            "fexecve" => fexecve(libc::open(cat, libc::O_RDONLY), argv.as_ptr(), envp.as_ptr()),
            _ => execveat(libc::AT_FDCWD, cat, argv.as_ptr(), envp.as_ptr(), 0),
        }
    };
}

fn execs(w: &World) {
    for how in ["execl", "execle", "execlp", "execve", "execvp", "execvpe", "fexecve", "execveat"] {
        let c = w.pair();
        // Closed by the exec.
        let p = sys::pipe();
        sys::fcntl(p[1], libc::F_SETFD, libc::FD_CLOEXEC).expect("F_SETFD");
        let pid = sys::fork(|| {
            sys::dup2(c.fd, 0).expect("dup2");
            sys::dup2(c.fd, 1).expect("dup2");
            exec(how);
            127
        });
        log!("{how} {} {}", show(sys::close(c.fd)), show(sys::close(p[1])));
        log!("{} {}", show(sys::read(p[0], &mut [0])), show(sys::close(p[0])));
        w.far(&c, "say first\nsecond");
        log!("far {}", w.far(&c, "hear"));
        w.far(&c, "shutdown 1");
        log!("far {} {}", w.far(&c, "hear"), sys::wait(pid));
    }
}

/// A child that ends without a word, with bytes on their way.
fn ends(w: &World) {
    for how in ["_exit", "_Exit", "exit_group", "return"] {
        let c = w.pair();
        let mut end = c.end;
        let pid = sys::fork(|| {
            log!("child {}", end.put(1000));
            // SAFETY: no pointers.
            unsafe {
                match how {
                    "_exit" => libc::_exit(3),
                    "_Exit" => _Exit(3),
                    "exit_group" => libc::syscall(libc::SYS_exit_group, 3),
                    _ => 0,
                }
            };
            3
        });
        log!("{how} {}", show(sys::close(c.fd)));
        log!("{} far {}", sys::wait(pid), w.far(&c, "drain"));
    }
}

/// One list that sends and receives.
fn lists_of_aio(w: &World) {
    const LIO_READ: c_int = 0;
    const LIO_WRITE: c_int = 1;
    const LIO_NOWAIT: c_int = 1;
    let mut c = w.pair();
    for _ in 0..2 {
        let (mut out, mut into) = (c.next(400), vec![0u8; 300]);
        // SAFETY: all-zero is a valid aiocb.
        let mut a: [libc::aiocb; 2] = unsafe { std::mem::zeroed() };
        a[0].aio_lio_opcode = LIO_WRITE;
        (a[0].aio_fildes, a[0].aio_buf, a[0].aio_nbytes) = (c.fd, out.as_mut_ptr().cast(), out.len());
        a[1].aio_lio_opcode = LIO_READ;
        (a[1].aio_fildes, a[1].aio_buf, a[1].aio_nbytes) = (c.fd, into.as_mut_ptr().cast(), into.len());
        let [x, y] = &mut a;
        let list = [ptr::from_mut(x), ptr::from_mut(y)];
        // SAFETY: the control blocks and buffers live until both operations are over, below.
        log!("{}", unsafe { lio_listio(LIO_NOWAIT, list.as_ptr(), 2, ptr::null_mut()) });
        log!("far {} {}", w.far(&c, "get 400"), w.far(&c, "put 300"));
        for a in list {
            // SAFETY: a control block under way.
            while unsafe { aio_error(a) } == libc::EINPROGRESS {
                sys::sleep_ms(2);
            }
        }
        // SAFETY: over.
        log!("write {}", unsafe { aio_return(list[0]) });
        // SAFETY: over.
        let r = unsafe { aio_return(list[1]) };
        log!("read {}", c.checked(Ok(r as i64), &into));
    }
    w.still_good(&mut c);
}

/// A program whose own functions bear libc's names and call libc's by another, as Erlang's does with sigaction.
const OWN_NAMES: &str = r#"
    #include <arpa/inet.h>
    #include <signal.h>
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    ssize_t __read(int, void *, size_t);
    ssize_t __write(int, const void *, size_t);
    int __close(int);
    int __connect(int, const struct sockaddr *, socklen_t);
    int __sigaction(int, const struct sigaction *, struct sigaction *);
    static int calls;
    ssize_t read(int fd, void *b, size_t n) { calls++; return __read(fd, b, n); }
    ssize_t write(int fd, const void *b, size_t n) { calls++; return __write(fd, b, n); }
    int close(int fd) { calls++; return __close(fd); }
    int connect(int fd, const struct sockaddr *a, socklen_t n) { calls++; return __connect(fd, a, n); }
    int sigaction(int s, const struct sigaction *a, struct sigaction *o) { calls++; return __sigaction(s, a, o); }
    static void handler(int s) { (void)s; calls += 100000; }
    int main(void) {
        struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
        socklen_t n = sizeof a;
        char b[64];
        int sum = 0, l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0);
        struct sigaction h = { .sa_handler = handler };
        if (bind(l, (void *)&a, n) || listen(l, 5) || getsockname(l, (void *)&a, &n)) return 1;
        if (connect(c, (void *)&a, n)) return 2;
        int s = accept(l, 0, 0);
        for (int i = 0; i < 200; i++) {
            if (write(c, b, sizeof b) != sizeof b) return 3;
            sum += read(s, b, sizeof b);
        }
        if (sigaction(SIGUSR1, &h, 0)) return 4;
        raise(SIGUSR1);
        close(c);
        sum += read(s, b, sizeof b);
        printf("%d bytes, %d calls\n", sum, calls);
        return 0;
    }
"#;

fn program_has_such_names_itself(_: &World) {
    let dir = tempfile::tempdir().expect("a folder");
    let (source, program) = (dir.path().join("own.c"), dir.path().join("own"));
    std::fs::write(&source, OWN_NAMES).expect("written");
    let mut cc = std::process::Command::new("cc");
    // Exported, so that libraries find them.
    cc.env_remove("LD_PRELOAD").args(["-w", "-rdynamic", "-o"]).arg(&program).arg(&source);
    assert!(cc.status().expect("a C compiler").success());
    let out = std::process::Command::new(&program).output().expect("runs");
    log!("{} {}", out.status, String::from_utf8_lossy(&out.stdout));
}
