//! Peers that find each other by the TCP option: `smc bpf`, programs under libsmc.so without `SMC_PEERS`, and the kernel's
//! AF_SMC as the other end.
//!
//! The `smc` command is taken from beside `SMC_LIBRARY`. Each test attaches to a cgroup of its own and is in it, as are the
//! programs that it starts.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "world/af_smc.rs"]
mod af_smc;
#[path = "world/pair.rs"]
mod pair_of;
mod world;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;

use af_smc::{IPPROTO_SMC, dial, listener, mode, port_of};
use pair_of::{End, Moved, echo, ends, port, program};

const GROUP: &str = "/sys/fs/cgroup/smc-option";
/// The VM's kernel has this one.
const EID: (&str, &str) = ("SMC_EID", "SMC-VM");
const OPTION: [u8; 6] = [254, 6, 0xe2, 0xd4, 0xc3, 0xd9];

fn smc() -> Command {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/release/libsmc.so");
    let library = std::env::var_os("SMC_LIBRARY").map_or(built, PathBuf::from);
    Command::new(library.with_file_name("smc"))
}

/// What a command says, and its exit code.
fn said(o: Output) -> (i32, String) {
    (o.status.code().unwrap(), String::from_utf8([o.stdout, o.stderr].concat()).unwrap())
}

fn says(words: &[&str]) -> (i32, String) {
    said(smc().args(words).output().unwrap())
}

/// A copy, for the sources may lie below a home that is closed to others.
fn by_nobody(words: &[&str]) -> (i32, String) {
    let copy = std::env::temp_dir().join(format!("smc-by-nobody.{}", std::process::id()));
    std::fs::copy(smc().get_program(), &copy).unwrap();
    let out = Command::new(&copy).args(words).uid(65534).output().unwrap();
    std::fs::remove_file(copy).unwrap();
    said(out)
}

/// As long as this lives the programs are attached to the group, in which this process is.
struct Attached;

impl Attached {
    fn new() -> Self {
        std::fs::create_dir_all(GROUP).unwrap();
        std::fs::write(format!("{GROUP}/cgroup.procs"), std::process::id().to_string()).unwrap();
        let (code, text) = says(&["bpf", "attach", "--cgroup", GROUP]);
        assert_eq!(code, 0, "{text}");
        Self
    }

    fn count(&self, what: &str) -> u64 {
        let (code, text) = says(&["bpf", "status", "--json"]);
        assert_eq!(code, 0, "{text}");
        let at = text.find(&format!("\"{what}\":")).unwrap() + what.len() + 3;
        text[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        assert_eq!(says(&["bpf", "detach", "--cgroup", GROUP]).0, 0);
    }
}

fn start(words: &[&str], plain: bool, settings: &[(&str, &str)]) -> End {
    End::by(Command::new(program()), words, plain, settings)
}

/// A server under libsmc that answers so many connections, of which the first was a plain client's: it is known from then
/// on that it asks.
fn awake(connections: u64, settings: &[(&str, &str)]) -> (End, String) {
    let ([a, b], port) = (ends(), port().to_string());
    let count = (connections + 1).to_string();
    let mut server = start(&["serve", &b, &port, &count, "echo", "0"], false, settings);
    server.says("listening");
    start(&["connect", &a, &b, &port, "1", "echo", "640"], true, &[]).ends("done");
    (server, port)
}

fn client(port: &str, n: &str, settings: &[(&str, &str)]) -> Moved {
    let [a, b] = ends();
    start(&["connect", &a, &b, port, n, "echo", "6400"], false, settings).ends("done")
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn the_command_attaches_shows_and_detaches() {
    std::fs::create_dir_all(format!("{GROUP}/below")).unwrap();
    assert_eq!(says(&["bpf", "status"]), (3, "not attached\n".into()));
    assert_eq!(says(&["bpf", "status", "--json"]), (3, "[]\n".into()));
    assert_eq!(says(&["bpf", "detach"]).0, 3);
    {
        let _on = Attached::new();
        let (code, text) = says(&["bpf", "status"]);
        assert!(code == 0 && text.starts_with(GROUP) && text.contains("asked 0"), "{text}");
        // Twice for one socket would be once too often, above and below as well.
        for at in [GROUP, "/sys/fs/cgroup", "/sys/fs/cgroup/smc-option/below"] {
            let (code, text) = says(&["bpf", "attach", "--cgroup", at]);
            assert!(code == 1 && text.contains("already attached"), "{at}: {text}");
        }
        // Whoever may not ask the kernel learns of his own sockets.
        let (code, text) = by_nobody(&["bpf", "status"]);
        assert!(code == 4 && text.contains("attached for this process"), "{text}");
        assert_eq!(by_nobody(&["bpf", "detach"]).0, 4);
    }
    assert_eq!(says(&["bpf", "status"]).0, 3);
    let (code, text) = by_nobody(&["bpf", "status"]);
    assert!(code == 4 && !text.contains("attached for this process"), "{text}");
    let (code, text) = says(&["bpf", "attach", "--cgroup", "/tmp"]);
    assert!(code == 1 && text.contains("is not a folder in"), "{text}");
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn two_programs_find_each_other() {
    let on = Attached::new();
    let (server, port) = awake(4, &[]);
    let moved = client(&port, "4", &[]);
    assert_eq!(moved, Moved { rdma: 4, tcp: 0, rdma_tx: 25_600, rdma_rx: 25_600, back: 0 });
    assert_eq!(server.ends("served").rdma, 4);
    let counts = ["asked", "answered", "connected", "accepted", "taken"].map(|what| on.count(what));
    assert_eq!(counts, [4, 4, 4, 4, 8]);
}

/// The first connection of a listener: whether its program asks is not known yet, so nothing is promised.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn a_listener_that_has_not_asked_yet_promises_nothing() {
    let on = Attached::new();
    let ([a, b], port) = (ends(), port().to_string());
    let mut server = start(&["serve", &b, &port, "2", "echo", "0"], false, &[]);
    server.says("listening");
    let words = ["connect", &a, &b, &port, "1", "echo", "6400"];
    assert_eq!(start(&words, false, &[]).ends("done").rdma, 0);
    assert_eq!((on.count("answered"), on.count("taken")), (0, 0));
    assert_eq!(start(&words, false, &[]).ends("done").rdma, 1);
    assert_eq!(server.ends("served").rdma, 1);
}

/// What the SYN of a client's connection was, the server being this process.
fn syn(plain: bool) -> Vec<u8> {
    const TCP_SAVE_SYN: i32 = 27;
    const TCP_SAVED_SYN: i32 = 28;
    let [a, b] = ends();
    let l = TcpListener::bind((b.as_str(), 0)).unwrap();
    let on = 1i32;
    // SAFETY: an int, and its size.
    let rc = unsafe {
        libc::setsockopt(l.as_raw_fd(), libc::IPPROTO_TCP, TCP_SAVE_SYN, (&raw const on).cast(), 4)
    };
    assert_eq!(rc, 0);
    let port = port_of(&l).to_string();
    let client = start(&["connect", &a, &b, &port, "1", "echo", "640"], plain, &[]);
    let s = l.accept().unwrap().0;
    let (mut bytes, mut len) = (vec![0u8; 256], 256u32);
    // SAFETY: a buffer, and its size.
    let rc = unsafe {
        libc::getsockopt(s.as_raw_fd(), libc::IPPROTO_TCP, TCP_SAVED_SYN, bytes.as_mut_ptr().cast(), &mut len)
    };
    assert_eq!(rc, 0);
    bytes.truncate(len as usize);
    echo(s);
    // This process does not answer with the option, so nothing but the program's bytes has come.
    assert_eq!(client.ends("done").rdma, 0);
    bytes
}

#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn only_programs_under_libsmc_have_the_option() {
    let on = Attached::new();
    let has = |syn: &[u8]| syn.windows(6).any(|w| w == OPTION);
    assert!(!has(&syn(true)), "a program without libsmc");
    assert!(has(&syn(false)), "one under libsmc");
    drop(on);
    assert!(!has(&syn(false)), "after detach");
}

/// Plain clients of a server that would speak SMC, and a server that has been there before.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn who_has_no_option_is_spoken_to_by_tcp() {
    let on = Attached::new();
    let (server, port) = awake(2, &[]);
    let [a, b] = ends();
    for _ in 0..2 {
        start(&["connect", &a, &b, &port, "1", "echo", "6400"], true, &[]).ends("done");
    }
    assert_eq!((on.count("answered"), on.count("taken")), (0, 0));
    assert_eq!(server.ends("served").rdma, 0);
}

/// A program that lives on is connected to by TCP once the programs are gone.
#[test]
#[ignore = "needs SMC_TEST_RDMA"]
fn after_detach_new_connections_stay_on_tcp() {
    let on = Attached::new();
    let (server, port) = awake(2, &[]);
    assert_eq!(client(&port, "1", &[]).rdma, 1);
    drop(on);
    assert_eq!(client(&port, "1", &[]).rdma, 0);
    assert_eq!(server.ends("served").rdma, 1);
}

fn ping(mut s: &TcpStream, bytes: usize) {
    let out: Vec<u8> = (0..bytes).map(|i| i as u8).collect();
    let mut back = vec![0; bytes];
    for _ in 0..20 {
        s.write_all(&out).unwrap();
        s.read_exact(&mut back).unwrap();
        assert_eq!(back, out);
    }
}

#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn a_client_of_the_kernels_speaks_smc_with_a_program() {
    let _on = Attached::new();
    let (server, port) = awake(3, &[EID]);
    let [theirs, ours] = world::ends();
    let to = SocketAddrV4::new(ours.address, port.parse().unwrap());
    for _ in 0..3 {
        let s = dial(IPPROTO_SMC, &theirs, to);
        assert_eq!(
            mode(s.local_addr().unwrap().port(), to.port()),
            Some(0),
            "the kernel does not call it SMC-R"
        );
        ping(&s, 5_000);
    }
    let moved = server.ends("served");
    assert_eq!((moved.rdma, moved.rdma_rx), (3, 300_000));
}

/// What the kernel's server has of `n` connections, one after the other.
fn kernel_server(n: usize, expected: u8) -> (u16, thread::JoinHandle<()>) {
    let [_, theirs] = world::ends();
    let l = listener(theirs.address);
    let port = port_of(&l);
    let server = thread::spawn(move || {
        for _ in 0..n {
            let (s, peer) = l.accept().unwrap();
            assert_eq!(mode(port, peer.port()), Some(expected));
            echo(s);
        }
    });
    (port, server)
}

#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn a_program_speaks_smc_with_a_server_of_the_kernels() {
    let _on = Attached::new();
    let (port, server) = kernel_server(3, 0);
    let moved = client(&port.to_string(), "3", &[EID]);
    assert_eq!(moved, Moved { rdma: 3, tcp: 0, rdma_tx: 19_200, rdma_rx: 19_200, back: 0 });
    server.join().unwrap();
}

/// Promised and not kept, for a reason that nobody knew before: the kernel hears a Decline, and no byte is lost.
#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn a_promise_that_is_not_kept_is_declined() {
    let _on = Attached::new();
    // The peer's network is left out, by either end.
    let out = ("SMC_EXCLUDE", "10.77.0.0/24");
    let (port, server) = kernel_server(2, 1);
    assert_eq!(client(&port.to_string(), "2", &[EID, out]).rdma, 0);
    server.join().unwrap();

    let (server, port) = awake(3, &[EID, out]);
    let [theirs, ours] = world::ends();
    let to = SocketAddrV4::new(ours.address, port.parse().unwrap());
    let s = dial(IPPROTO_SMC, &theirs, to);
    ping(&s, 5_000);
    assert_eq!(mode(s.local_addr().unwrap().port(), to.port()), Some(1));
    drop(s);
    // And one of ours, whose Proposal is declined.
    let moved = client(&port, "2", &[EID]);
    assert_eq!((moved.rdma, server.ends("served").rdma), (0, 0));
    // No EID in common: the same by the service.
    let (port, server) = kernel_server(1, 1);
    assert_eq!(client(&port.to_string(), "1", &[]).rdma, 0);
    server.join().unwrap();
}

/// A program under libsmc that is `words`, with the kernel's EID.
fn under_libsmc(words: &[&str]) -> Command {
    let mut c = Command::new(words[0]);
    c.args(&words[1..]).env("LD_PRELOAD", pair_of::library().join("libsmc.so")).envs([EID]);
    c
}

/// The connection is promised, and then another program's, which knows nothing of that.
#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn an_exec_declines_what_was_promised() {
    let _on = Attached::new();
    let [_, b] = ends();
    let (port, server) = kernel_server(1, 1);
    let then = "exec env -u LD_PRELOAD sh -c 'printf hello >&3; exec head -c 5 <&3'";
    let script = format!("exec 3<>/dev/tcp/{b}/{port}; {then}");
    let client = under_libsmc(&["bash", "-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8(client.stdout).unwrap(), "hello");
    server.join().unwrap();
}

/// A server under libsmc that has served a plain client by itself, and then does `second` with what it accepts, `l` being
/// its listener; the kernel's client sends "hello" and hears "world". What the server has printed since.
fn second_connection(second: &str) -> String {
    const FIRST: &str = "import os, socket, sys\n\
        l = socket.create_server((sys.argv[1], 0))\n\
        print(l.getsockname()[1], flush=True)\n\
        s = l.accept()[0]\n\
        s.sendall(s.recv(100))\n\
        s.close()\n";
    let [a, b] = ends();
    let mut server = under_libsmc(&["python3", "-c", &format!("{FIRST}{second}"), &b]);
    let mut server = server.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(server.stdout.take().unwrap());
    let mut port = String::new();
    out.read_line(&mut port).unwrap();
    start(&["connect", &a, &b, port.trim(), "1", "echo", "64"], true, &[]).ends("done");
    let [theirs, ours] = world::ends();
    let to = SocketAddrV4::new(ours.address, port.trim().parse().unwrap());
    let mut s = dial(IPPROTO_SMC, &theirs, to);
    s.write_all(b"hello").unwrap();
    let mut world = [0; 5];
    s.read_exact(&mut world).unwrap();
    assert_eq!(&world, b"world");
    assert_eq!(mode(s.local_addr().unwrap().port(), to.port()), Some(1));
    let mut printed = String::new();
    out.read_to_string(&mut printed).unwrap();
    assert!(server.wait().unwrap().success());
    printed
}

/// The same at a server, which is promised its second connection since it has served the first by itself.
#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn a_server_declines_before_it_hands_a_connection_on() {
    let on = Attached::new();
    let second = "s = l.accept()[0]\n\
        os.dup2(s.fileno(), 9)\n\
        os.environ.pop('LD_PRELOAD')\n\
        os.execvp('sh', ['sh', '-c', 'head -c 5 <&9; printf world >&9'])\n";
    assert_eq!(second_connection(second), "hello");
    assert_eq!((on.count("accepted"), on.count("taken")), (1, 1));
}

/// Standard input is never ours, also where it is a connection.
#[test]
#[ignore = "needs SMC_TEST_RDMA and AF_SMC"]
fn a_connection_that_becomes_standard_input_is_declined() {
    let on = Attached::new();
    let second = "os.close(0)\n\
        s = l.accept()[0]\n\
        print(s.fileno(), s.recv(5).decode())\n\
        s.sendall(b'world')\n";
    assert_eq!(second_connection(second), "0 hello\n");
    assert_eq!((on.count("accepted"), on.count("taken")), (1, 1));
}
