//! Connections handed to another program with bytes unread, whatever their sender does meanwhile: it has ended, died,
//! gone back to TCP, waits for something else. TCP gives the bytes to whoever has the socket.

use crate::process::{exec, text};
use crate::sys::{self, show};
use crate::world::{Conn, End, World, address, listener};
use crate::{Scenario, log, s};
use std::ffi::CString;
use std::ptr;

pub const SCENARIOS: &[Scenario] = &[
    s!(inetd).procs(),
    s!(inetd_by_stdio).procs(),
    s!(without_an_environment).procs(),
    s!(to_a_script).procs(),
    s!(much_and_back).procs(),
    s!(sender_killed).procs(),
    s!(in_place).procs(),
    s!(twice).procs(),
    s!(after_failed_execs).procs(),
    s!(without_descriptors).procs(),
    s!(half_of_it_read).procs(),
    s!(spawned).procs(),
    s!(holder_waits_for_the_program).procs(),
    s!(merely_inherited).procs(),
    s!(closed_by_exec).procs(),
    s!(program_leaves_bytes_unread).procs(),
    s!(sender_resets).procs(),
    s!(stdio_of_this_program).procs(),
    s!(passed).procs(),
    s!(passed_by_several_messages).procs(),
    s!(passed_without_descriptors).procs(),
    s!(passing_that_fails).procs(),
];

/// A child that becomes a program with the connection as its standard input and output.
fn serve(c: &Conn, args: &[&str]) -> i32 {
    sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        sys::dup2(c.fd, 1).expect("dup2");
        exec(args[0], args)
    })
}

/// What the sender does after its bytes, and nothing more: with the last ones no scenario differs from another.
const STATES: [&str; 3] = ["idle", "ended", "back"];

fn now(w: &World, c: &Conn, state: &str) {
    match state {
        "ended" => {
            w.far(c, "shutdown 1");
        }
        "back" => {
            w.far(c, &format!("setopt {} {} 1", libc::SOL_SOCKET, libc::SO_TIMESTAMPING));
        }
        _ => {}
    }
}

/// The sender ends, unless it has.
fn then_ends(w: &World, c: &Conn, state: &str) {
    if state != "ended" {
        w.far(c, "shutdown 1");
    }
}

/// All that the far end gets to hear, a line at a time.
fn hears(w: &World, c: &Conn) {
    loop {
        let line = w.far(c, "hear");
        log!("far {line}");
        if line == "\"\"" {
            break;
        }
    }
}

/// The server reads a line, and a program does the rest; the client waits for its answer.
fn inetd(w: &World) {
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say cat\nfirst\nsecond\n");
        c.arrived(17);
        now(w, &c, state);
        let mut b = [0; 4];
        log!("{state}: {} {:?}", show(sys::read(c.fd, &mut b)), String::from_utf8_lossy(&b));
        let pid = serve(&c, &["/bin/cat"]);
        log!("{}", show(sys::close(c.fd)));
        if state != "ended" {
            log!("far {}", w.far(&c, "hear"));
            w.far(&c, "say third\n");
        }
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{}", sys::wait(pid));
    }
}

/// The program reads by stdio, which no library sees.
fn inetd_by_stdio(w: &World) {
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say one\ntwo\nthree\n");
        c.arrived(14);
        now(w, &c, state);
        let pid = serve(&c, &["/usr/bin/sort"]);
        log!("{state}: {}", show(sys::close(c.fd)));
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{}", sys::wait(pid));
    }
}

/// The program is on its own: nothing is preloaded.
fn without_an_environment(w: &World) {
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say first\nsecond\n");
        c.arrived(13);
        now(w, &c, state);
        let pid = sys::fork(|| {
            sys::dup2(c.fd, 0).expect("dup2");
            sys::dup2(c.fd, 1).expect("dup2");
            let argv = [c"cat".as_ptr(), ptr::null()];
            // SAFETY: ended arrays of live C strings.
            unsafe { libc::execve(c"/bin/cat".as_ptr(), argv.as_ptr(), [ptr::null()].as_ptr()) };
            127
        });
        log!("{state}: {}", show(sys::close(c.fd)));
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{}", sys::wait(pid));
    }
}

/// A script, that reads a line by itself and leaves the rest to another program.
fn to_a_script(w: &World) {
    let path = std::env::temp_dir().join(format!("handed-{}", std::process::id()));
    std::fs::write(&path, "#!/bin/sh\nread a\necho \"line $a\"\nexec cat\n").expect("a file");
    let name = CString::new(path.to_str().expect("utf-8")).expect("no zero");
    // SAFETY: a C string.
    assert_eq!(unsafe { libc::chmod(name.as_ptr(), 0o700) }, 0);
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say first\nsecond\n");
        c.arrived(13);
        now(w, &c, state);
        let pid = serve(&c, &[path.to_str().expect("utf-8")]);
        log!("{state}: {}", show(sys::close(c.fd)));
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{}", sys::wait(pid));
    }
    std::fs::remove_file(&path).expect("our own file");
}

/// More than any buffer holds, each way.
fn much_and_back(w: &World) {
    let c = w.pair();
    w.far(&c, "put 10000");
    c.arrived(10_000);
    let pid = serve(&c, &["/bin/cat"]);
    log!("{}", show(sys::close(c.fd)));
    for _ in 0..20 {
        log!("far {}", w.far(&c, "put 100000"));
        log!("far {}", w.far(&c, "discard 100000"));
    }
    log!("far {} {}", w.far(&c, "shutdown 1"), w.far(&c, "discard 10000"));
    hears(w, &c);
    log!("{}", sys::wait(pid));
}

fn sender_killed(_: &World) {
    let (l, port) = listener(&address("4", 0), 10);
    let (gate, out) = (sys::pipe(), sys::pipe());
    let peer = sys::fork(|| {
        let fd = sys::socket(libc::AF_INET, libc::SOCK_STREAM).expect("socket") as i32;
        sys::connect(fd, &address("4", port)).expect("connect");
        let mut e = End::new(fd);
        for _ in 0..200 {
            e.put(1);
            e.get(1);
        }
        sys::send(fd, b"last words", 0).expect("send");
        let _ = sys::read(gate[0], &mut [0; 1]);
        0
    });
    let mut e = End::new(sys::accept4(l, libc::SOCK_CLOEXEC).expect("accept") as i32);
    for _ in 0..200 {
        e.get(1);
        e.put(1);
    }
    e.arrived(10);
    sys::kill(peer, libc::SIGKILL);
    log!("{}", sys::wait(peer));
    let pid = sys::fork(|| {
        sys::dup2(e.fd, 0).expect("dup2");
        sys::dup2(out[1], 1).expect("dup2");
        exec("/bin/cat", &["cat"])
    });
    sys::close(e.fd).expect("close");
    sys::close(out[1]).expect("close");
    log!("{} {}", text(out[0]), sys::wait(pid));
}

/// The program that an exec of ours becomes, with a connection at this number and what it is to do with it.
pub fn inherited(what: &str, fd: i32) -> i32 {
    let e = End { fd, tx: 0, rx: 0 };
    let (mut b, all) = ([0; 64], libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP);
    let said = |b: &[u8], r: sys::Res| {
        format!("{} {:?}", show(r), String::from_utf8_lossy(&b[..r.unwrap_or(0).max(0) as usize]))
    };
    // Until all is there.
    e.arrived(if what == "last" { 12 } else { 18 });
    if what == "first" {
        crate::world::settle(fd, all);
    }
    log!("{what}: {}", sys::show_poll(sys::poll1(fd, all & !libc::POLLRDHUP, -1)));
    let r = sys::recv(fd, &mut b[..9], libc::MSG_PEEK);
    log!("peek {}", said(&b, r));
    log!("fionread {:?}", sys::fionread(fd));
    let r = sys::recv(fd, &mut b[..6], libc::MSG_WAITALL);
    log!("read {}", said(&b, r));
    if what == "half" {
        // And again.
        let exe = std::env::current_exe().expect("our own path");
        return exec(exe.to_str().expect("utf-8"), &["sockets", "--inherited", "last", &fd.to_string()]);
    }
    let r = sys::recv(fd, &mut b, libc::MSG_PEEK);
    log!("peek {}", said(&b, r));
    let (r, ready, _) = sys::select_read(&[fd], std::time::Duration::from_secs(20));
    log!("select {} {}", show(r), ready.len());
    let r = sys::recv(fd, &mut b, libc::MSG_WAITALL);
    log!("read {}", said(&b, r));
    sys::write(fd, b"done\n").expect("write");
    0
}

/// The process that accepted the connection becomes another program, which knows it by its number.
fn becoming(w: &World, states: &[&str], what: &str) {
    becoming_by(w, states, what, |exec| exec());
}

/// As above; `how` does the exec.
fn becoming_by(w: &World, states: &[&str], what: &str, how: fn(&dyn Fn() -> i32) -> i32) {
    for state in states {
        let (l, port) = listener(&address("4", 0), 10);
        let told = sys::pipe();
        let pid = sys::fork(|| {
            let mut e = End::new(sys::accept(l, None).expect("accept") as i32);
            for _ in 0..200 {
                e.get(1);
                e.put(1);
            }
            e.arrived(18);
            let _ = sys::read(told[0], &mut [0; 1]);
            let exe = std::env::current_exe().expect("our own path");
            how(&|| exec(exe.to_str().expect("utf-8"), &["sockets", "--inherited", what, &e.fd.to_string()]))
        });
        sys::close(l).expect("close");
        let far: i32 = w.ask(&format!("connect 4 {port}")).parse().expect("an fd");
        for _ in 0..200 {
            w.ask(&format!("put {far} 1"));
            w.ask(&format!("get {far} 1"));
        }
        w.ask(&format!("say {far} first second third"));
        let c = Conn { end: End::new(-1), far };
        now(w, &c, state);
        sys::write(told[1], b"x").expect("write");
        told.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
        sys::sleep_ms(50);
        if *state != "ended" {
            sys::sleep_ms(150);
        }
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{state}: {}", sys::wait(pid));
    }
}

fn in_place(w: &World) {
    becoming(w, &["ended"], "first");
    becoming(w, &STATES, "only");
}

fn twice(w: &World) {
    becoming(w, &STATES, "half");
}

/// The old program goes on where it was.
fn after_failed_execs(w: &World) {
    for state in STATES {
        let mut c = w.pair();
        sys::fcntl(c.fd, libc::F_SETFD, 0).expect("F_SETFD");
        w.far(&c, "put 1000");
        c.arrived(1000);
        now(w, &c, state);
        for _ in 0..3 {
            log!("{} {}", exec("/nonexistent/program", &["program"]), sys::errno_name(sys::errno()));
        }
        log!("{state}: {} {}", c.get(600), show(sys::fcntl(c.fd, libc::F_GETFD, 0)));
        log!("{} {}", exec("/nonexistent/program", &["program"]), sys::errno_name(sys::errno()));
        log!("{} {} far {}", c.get(400), c.put(500), w.far(&c, "get 500"));
        if state != "ended" {
            w.still_good(&mut c);
        }
        then_ends(w, &c, state);
        log!("{} {} far {}", c.drain(), show(sys::close(c.fd)), w.far(&c, "drain"));
    }
}

/// Every number below the limit is used. An exec may fail for that, as for want of memory; what it may not do is start a
/// program that does not find its bytes.
fn without_descriptors(w: &World) {
    becoming_by(w, &STATES, "only", |exec| {
        sys::nofile(64);
        let used: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        exec();
        if sys::errno() != libc::EMFILE {
            return 126;
        }
        drop(used);
        exec()
    });
}

/// In the same process, by the number that programs are given.
fn half_of_it_read(w: &World) {
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say one two three\n");
        c.arrived(14);
        now(w, &c, state);
        let pid = sys::fork(|| {
            sys::dup2(c.fd, 0).expect("dup2");
            sys::dup2(c.fd, 1).expect("dup2");
            let mut b = [0; 4];
            let _ = sys::recv(0, &mut b, libc::MSG_PEEK);
            let _ = sys::read(0, &mut b);
            exec("/bin/cat", &["cat"])
        });
        log!("{state}: {}", show(sys::close(c.fd)));
        then_ends(w, &c, state);
        hears(w, &c);
        log!("{}", sys::wait(pid));
    }
}

fn spawned(w: &World) {
    for state in STATES {
        let c = w.pair();
        w.far(&c, "say first\nsecond\n");
        c.arrived(13);
        now(w, &c, state);
        for path in [c"/nonexistent/program", c"/bin/cat"] {
            let mut pid = 0;
            let argv = [c"cat".as_ptr().cast_mut(), ptr::null_mut()];
            let env = [ptr::null_mut()];
            // SAFETY: all-zero is replaced by init; every pointer is live.
            let r = unsafe {
                let mut fa: libc::posix_spawn_file_actions_t = std::mem::zeroed();
                libc::posix_spawn_file_actions_init(&mut fa);
                libc::posix_spawn_file_actions_adddup2(&mut fa, c.fd, 0);
                libc::posix_spawn_file_actions_adddup2(&mut fa, c.fd, 1);
                let r =
                    libc::posix_spawn(&mut pid, path.as_ptr(), &fa, ptr::null(), argv.as_ptr(), env.as_ptr());
                libc::posix_spawn_file_actions_destroy(&mut fa);
                r
            };
            if r != 0 {
                log!("{state}: {}", sys::errno_name(r));
                continue;
            }
            log!("{}", show(sys::close(c.fd)));
            then_ends(w, &c, state);
            hears(w, &c);
            log!("{}", sys::wait(pid));
        }
    }
}

/// Whoever started the program has the connection open as long as it runs.
fn holder_waits_for_the_program(w: &World) {
    let c = w.pair();
    w.far(&c, "say first\nsecond\n");
    c.arrived(13);
    now(w, &c, "ended");
    let pid = serve(&c, &["/bin/cat"]);
    log!("{}", sys::wait(pid));
    log!("{} {}", show(sys::read(c.fd, &mut [0; 8])), show(sys::close(c.fd)));
    hears(w, &c);
}

/// A program that has the connection by mistake takes nothing from who uses it.
fn merely_inherited(w: &World) {
    for state in STATES {
        let mut c = w.pair();
        sys::fcntl(c.fd, libc::F_SETFD, 0).expect("F_SETFD");
        w.far(&c, "put 1000");
        c.arrived(1000);
        now(w, &c, state);
        let gate = sys::pipe();
        let pid = sys::fork(|| {
            sys::dup2(gate[0], 0).expect("dup2");
            let _ = sys::close(gate[1]);
            exec("/bin/cat", &["cat"])
        });
        sys::sleep_ms(50);
        if state == "ended" {
            log!("{state}: {}", c.get(1000));
        }
        then_ends(w, &c, state);
        log!("{}", c.drain());
        gate.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
        log!("{} {} far {}", sys::wait(pid), show(sys::close(c.fd)), w.far(&c, "drain"));
    }
}

fn closed_by_exec(w: &World) {
    for state in STATES {
        let mut c = w.pair();
        w.far(&c, "put 1000");
        c.arrived(1000);
        now(w, &c, state);
        let pid = sys::fork(|| exec("/bin/true", &["true"]));
        log!("{state}: {} {}", sys::wait(pid), c.get(1000));
        then_ends(w, &c, state);
        log!("{} {} far {}", c.drain(), show(sys::close(c.fd)), w.far(&c, "drain"));
    }
}

/// It ends without having read: its peer hears of that.
fn program_leaves_bytes_unread(w: &World) {
    let c = w.pair();
    w.far(&c, "put 1000");
    c.arrived(1000);
    now(w, &c, "back");
    let pid = serve(&c, &["/bin/true"]);
    log!("{} {}", show(sys::close(c.fd)), sys::wait(pid));
    w.far(&c, &format!("settle {}", libc::POLLHUP));
    log!("far {}", w.far(&c, "get 1"));
}

/// The program reads what came before the reset, and hears of it.
fn sender_resets(w: &World) {
    let c = w.pair();
    let out = sys::pipe();
    w.far(&c, "say before");
    c.arrived(6);
    now(w, &c, "back");
    let pid = sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        sys::dup2(out[1], 1).expect("dup2");
        sys::close(2).expect("close");
        exec("/bin/cat", &["cat"])
    });
    log!("{} {}", show(sys::close(c.fd)), show(sys::close(out[1])));
    let mut b = [0; 6];
    log!("{}", show(sys::read(out[0], &mut b)));
    w.far(&c, "linger 0");
    w.far(&c, "close");
    log!("{} {}", text(out[0]), sys::wait(pid));
}

/// By SCM_RIGHTS, to a process that knows nothing of it. The old one reads on until it closes its own. (An idle peer would
/// have to move the bytes first.)
fn passed(w: &World) {
    for state in ["ended", "back"] {
        let (u, gate) = (sys::unix_pair(libc::SOCK_STREAM), sys::pipe());
        let pid = sys::fork(|| {
            let fd = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
            let _ = sys::read(gate[0], &mut [0; 1]);
            sys::write(fd, b"heard\n").expect("write");
            log!("child {}", text(fd));
            0
        });
        let c = w.pair();
        w.far(&c, "say first second third\n");
        c.arrived(19);
        now(w, &c, state);
        log!("{}", show(sys::sendmsg(u[0], &[b"take it"], 0, Some(c.fd))));
        let mut b = [0; 6];
        log!("{state}: {} {:?}", show(sys::read(c.fd, &mut b)), String::from_utf8_lossy(&b));
        log!("{}", show(sys::close(c.fd)));
        sys::write(gate[1], b"x").expect("write");
        log!("far {}", w.far(&c, "hear"));
        if state != "ended" {
            w.far(&c, "say fourth\n");
        }
        then_ends(w, &c, state);
        log!("{}", sys::wait(pid));
        hears(w, &c);
        u.iter().chain(&gate).for_each(|f| assert!(sys::close(*f).is_ok()));
    }
}

fn passed_by_several_messages(w: &World) {
    for state in STATES {
        let u = sys::unix_pair(libc::SOCK_DGRAM);
        let pid = sys::fork(|| {
            let fd = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
            log!("child {}", text(fd));
            0
        });
        let c = w.pair();
        w.far(&c, "say first\n");
        c.arrived(6);
        now(w, &c, state);
        log!("{state}: {}", show(sys::sendmmsg_passing(u[0], b"take it", c.fd)));
        log!("{}", show(sys::close(c.fd)));
        then_ends(w, &c, state);
        log!("{}", sys::wait(pid));
        hears(w, &c);
        u.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
    }
}

/// As `without_descriptors`, of a message.
fn passed_without_descriptors(w: &World) {
    let c = w.pair();
    let u = sys::unix_pair(libc::SOCK_STREAM);
    let pid = sys::fork(|| {
        let fd = sys::recvmsg(u[1], &mut [&mut [0; 8]], 0).fds[0];
        log!("child {}", text(fd));
        0
    });
    w.far(&c, "say first second third\n");
    c.arrived(19);
    now(w, &c, "ended");
    let most = sys::nofile_for_now(64);
    let used: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    let mut sent = sys::sendmsg(u[0], &[b"take it"], 0, Some(c.fd));
    drop(used);
    sys::nofile_for_now(most);
    if sent == Err(libc::ENOMEM) {
        sent = sys::sendmsg(u[0], &[b"take it"], 0, Some(c.fd));
    }
    log!("{} {}", show(sent), show(sys::close(c.fd)));
    log!("{}", sys::wait(pid));
    hears(w, &c);
    u.iter().for_each(|f| assert!(sys::close(*f).is_ok()));
}

/// Nobody has it but who had it.
fn passing_that_fails(w: &World) {
    for state in ["ended", "back"] {
        let mut c = w.pair();
        let u = sys::unix_pair(libc::SOCK_STREAM);
        assert!(sys::close(u[1]).is_ok());
        w.far(&c, "put 1000");
        c.arrived(1000);
        now(w, &c, state);
        for _ in 0..2 {
            log!("{state}: {}", show(sys::sendmsg(u[0], &[b"x"], libc::MSG_NOSIGNAL, Some(c.fd))));
        }
        log!("{} {} far {}", c.get(1000), c.put(500), w.far(&c, "get 500"));
        then_ends(w, &c, state);
        log!("{} {} far {}", c.drain(), show(sys::close(c.fd)), w.far(&c, "drain"));
        assert!(sys::close(u[0]).is_ok());
    }
}

/// Not another program: this one reads, by stdio, from the number that it knows.
fn stdio_of_this_program(w: &World) {
    unsafe extern "C" {
        static stdin: *mut libc::FILE;
    }
    let (c, gate) = (w.pair(), sys::pipe());
    w.far(&c, "say first\nsecond\n");
    c.arrived(13);
    let pid = sys::fork(|| {
        sys::dup2(c.fd, 0).expect("dup2");
        let _ = sys::close(c.fd);
        sys::write(gate[1], b"x").expect("write");
        let mut b = [0; 64];
        // SAFETY: libc's own stream, which nobody else uses here.
        let n = unsafe { libc::fread(b.as_mut_ptr().cast(), 1, b.len(), stdin) };
        log!("{:?}", String::from_utf8_lossy(&b[..n]));
        0
    });
    log!("{}", show(sys::close(c.fd)));
    // Not before: it would have ended its stream already.
    let _ = sys::read(gate[0], &mut [0; 1]);
    w.far(&c, "say third\n");
    w.far(&c, "shutdown 1");
    log!("{}", sys::wait(pid));
    hears(w, &c);
}
