//! Signals at any moment: handlers that use the very socket whose call they interrupt, that fork or jump out of it,
//! signals that come before a call sleeps, and what the program sees of its own handlers.

use crate::{
    Scenario, log, s,
    sys::{self, Res, show},
    world::{Conn, World, later},
};
use libc::{EPOLLIN, POLLIN, SA_RESTART, SIGUSR1, SIGUSR2, c_int, c_void};
use std::{
    mem, ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The table of this file.
pub const SCENARIOS: &[Scenario] = &[
    s!(handler_writes_into_writes),
    s!(handler_makes_every_call),
    s!(handler_calls_epoll_into_epoll),
    s!(handler_shuts_down_into_writes),
    s!(handler_closes_into_reads),
    s!(handler_forks_into_writes).procs(),
    s!(jump_out_of_recv),
    s!(jump_out_of_send),
    s!(jump_out_of_poll),
    s!(jump_out_of_epoll),
    s!(jump_out_of_anything),
    s!(signal_while_looking).slow(),
    s!(signal_while_looking_in_poll).slow(),
    s!(signal_while_looking_in_epoll).slow(),
    // A stream that leaves its full ring finds room in TCP, and the byte that is to wait is sent.
    s!(signal_while_looking_for_space).slow().unforced(),
    s!(restart_beside_another_handler),
    s!(actions_are_the_programs),
    s!(action_changes_under_fire),
    s!(reset_hand),
    s!(values_arrive_in_order),
    s!(handler_on_its_own_stack),
    s!(mask_of_a_handler),
    s!(mask_with_its_own_signal),
    s!(cancel_in_poll),
    s!(cancel_in_send),
];

static FD: AtomicI32 = AtomicI32::new(-1);
static EP: AtomicI32 = AtomicI32::new(-1);
static COUNT: AtomicU32 = AtomicU32::new(0);
/// Bytes that handlers have written.
static WROTE: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: c_int) {
    COUNT.fetch_add(1, SeqCst);
}

/// Signals this thread over and over until it is stopped. Not while this thread begins or ends it: handlers fork and
/// jump, which must not be out of the middle of an allocation.
struct Storm {
    state: Arc<AtomicU32>,
    thread: JoinHandle<()>,
}

impl Storm {
    fn begin(sig: c_int, pause_us: u64) -> Self {
        let state = Arc::new(AtomicU32::new(0));
        let (me, go) = (sys::this_thread(), state.clone());
        let thread = later(0, move || {
            while go.load(SeqCst) != 2 {
                if go.load(SeqCst) == 1 {
                    sys::signal_thread(me, sig);
                }
                std::thread::sleep(Duration::from_micros(pause_us));
            }
            go.store(3, SeqCst);
        });
        state.store(1, SeqCst);
        Storm { state, thread }
    }

    fn end(self) {
        self.state.store(2, SeqCst);
        while self.state.load(SeqCst) != 3 {
            std::hint::spin_loop();
        }
        self.thread.join().expect("no panic");
    }
}

/// Writes all of it, through whatever interrupts; how much went.
fn put_raw(fd: i32, b: &[u8]) -> usize {
    let mut at = 0;
    while at < b.len() {
        match sys::send(fd, &b[at..], libc::MSG_NOSIGNAL) {
            Ok(n) => at += n as usize,
            Err(libc::EINTR) => {}
            Err(_) => break,
        }
    }
    at
}

extern "C" fn write_h(_: c_int) {
    if let Ok(n) = sys::send(FD.load(SeqCst), b"h", libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
        WROTE.fetch_add(n as u64, SeqCst);
    }
    COUNT.fetch_add(1, SeqCst);
}

/// Ends this direction, and compares what the far end has counted of each kind of byte.
fn compare(w: &World, c: &Conn, m: u64) {
    let h = WROTE.load(SeqCst);
    let _ = sys::shutdown(c.fd, libc::SHUT_WR);
    log!("some of both: {}", m > 0 && h > 0);
    let told = w.finish();
    log!("all there: {}", told == format!("m {m} h {h} other 0"));
    if told != format!("m {m} h {h} other 0") {
        log!("told {told}, wrote m {m} h {h}");
    }
}

fn handler_writes_into_writes(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    sys::on_signal(SIGUSR1, write_h, SA_RESTART);
    w.start_far(&c, "tally");
    let storm = Storm::begin(SIGUSR1, 20);
    let b = vec![b'm'; 20_000];
    let mut m = 0;
    while COUNT.load(SeqCst) < 3000 {
        m += put_raw(c.fd, &b) as u64;
    }
    storm.end();
    compare(w, &c, m);
}

/// A wait that allocates nothing, as befits a handler: how many events.
fn wait_once(ms: c_int) -> c_int {
    let mut e = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: one live event.
    unsafe { libc::epoll_wait(EP.load(SeqCst), &mut e, 1, ms) }
}

/// Read, poll, select, epoll, options, counts, duplicates: one after the other, each in a handler.
extern "C" fn any_call(_: c_int) {
    let fd = FD.load(SeqCst);
    match COUNT.fetch_add(1, SeqCst) % 9 {
        0 => drop(sys::recv(fd, &mut [0; 7], libc::MSG_DONTWAIT)),
        1 => drop(sys::recv(fd, &mut [0; 7], libc::MSG_DONTWAIT | libc::MSG_PEEK)),
        2 => drop(sys::poll1(fd, POLLIN | libc::POLLOUT, 0)),
        3 => drop(sys::tcp_info(fd)),
        4 => drop(sys::fionread(fd)),
        5 => {
            // SAFETY: all-zero is an empty set.
            let mut set: libc::fd_set = unsafe { mem::zeroed() };
            let mut zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
            // SAFETY: a live set, and a number that it has room for.
            unsafe { libc::FD_SET(fd, &mut set) };
            // SAFETY: live values.
            unsafe { libc::select(fd + 1, &mut set, ptr::null_mut(), ptr::null_mut(), &mut zero) };
        }
        6 => {
            if let Ok(n) = sys::dup(fd) {
                let _ = sys::close(n as i32);
            }
        }
        7 => drop(wait_once(0)),
        _ => {
            if let Ok(n) = sys::send(fd, b"h", libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
                WROTE.fetch_add(n as u64, SeqCst);
            }
        }
    }
}

fn handler_makes_every_call(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    EP.store(sys::epoll_create(), SeqCst);
    sys::epoll_add(EP.load(SeqCst), c.fd, EPOLLIN, 1);
    w.far(&c, "put 3000");
    sys::on_signal(SIGUSR1, any_call, SA_RESTART);
    w.start_far(&c, "tally");
    let storm = Storm::begin(SIGUSR1, 20);
    let b = vec![b'm'; 5000];
    let (mut m, mut turn) = (0, 0);
    while COUNT.load(SeqCst) < 5000 {
        turn += 1;
        match turn % 4 {
            0 => drop(sys::recv(c.fd, &mut [0; 3], libc::MSG_DONTWAIT)),
            1 => drop(wait_once(0)),
            2 => drop(sys::poll1(c.fd, POLLIN, 0)),
            _ => m += put_raw(c.fd, &b) as u64,
        }
    }
    storm.end();
    compare(w, &c, m);
}

/// A set that is waited for and changed in the handler that interrupts the wait.
extern "C" fn any_epoll(_: c_int) {
    let (ep, fd) = (EP.load(SeqCst), FD.load(SeqCst));
    match COUNT.fetch_add(1, SeqCst) % 3 {
        0 => drop(wait_once(0)),
        1 => drop(sys::epoll_ctl(ep, libc::EPOLL_CTL_MOD, fd, EPOLLIN as u32, 1)),
        _ => {
            if let Ok(n) = sys::send(fd, b"h", libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) {
                WROTE.fetch_add(n as u64, SeqCst);
            }
        }
    }
}

fn handler_calls_epoll_into_epoll(w: &World) {
    let mut c = w.pair();
    FD.store(c.fd, SeqCst);
    EP.store(sys::epoll_create(), SeqCst);
    sys::epoll_add(EP.load(SeqCst), c.fd, EPOLLIN, 1);
    sys::on_signal(SIGUSR1, any_epoll, SA_RESTART);
    w.start_far(&c, "putchunks 400000 700");
    let storm = Storm::begin(SIGUSR1, 30);
    let (mut b, mut left) = (vec![0; 900], 400_000);
    while left > 0 || COUNT.load(SeqCst) < 300 {
        if wait_once(5) == 1
            && left > 0
            && let Ok(n) = sys::recv(c.fd, &mut b[..left.min(900)], libc::MSG_DONTWAIT)
        {
            if let Err(e) = c.check(&b[..n as usize]) {
                log!("{e}");
                break;
            }
            left -= n as usize;
        }
    }
    storm.end();
    log!("far {}", w.finish());
    w.start_far(&c, "tally");
    let m = put_raw(c.fd, b"mmmmm") as u64;
    compare(w, &c, m);
}

extern "C" fn shut(_: c_int) {
    if COUNT.fetch_add(1, SeqCst) == 50 {
        let _ = sys::shutdown(FD.load(SeqCst), libc::SHUT_WR);
    }
}

fn handler_shuts_down_into_writes(w: &World) {
    for _ in 0..10 {
        let c = w.pair();
        FD.store(c.fd, SeqCst);
        COUNT.store(0, SeqCst);
        sys::on_signal(SIGUSR1, shut, SA_RESTART);
        w.start_far(&c, "tally");
        let storm = Storm::begin(SIGUSR1, 20);
        let b = vec![b'm'; 9000];
        let (mut m, mut last) = (0, Ok(0));
        while last.is_ok() {
            last = sys::send(c.fd, &b, libc::MSG_NOSIGNAL);
            m += last.map_or(0, |n| n as u64);
        }
        storm.end();
        log!("{} {}", show(last), w.finish() == format!("m {m} h 0 other 0"));
        log!("{}", show(sys::close(c.fd)));
    }
}

extern "C" fn shut_the_lot(_: c_int) {
    if COUNT.fetch_add(1, SeqCst) == 50 {
        let _ = sys::close(FD.load(SeqCst));
    }
}

fn handler_closes_into_reads(w: &World) {
    for _ in 0..10 {
        let c = w.pair();
        FD.store(c.fd, SeqCst);
        COUNT.store(0, SeqCst);
        sys::on_signal(SIGUSR1, shut_the_lot, SA_RESTART);
        let storm = Storm::begin(SIGUSR1, 20);
        let last = loop {
            let r = sys::recv(c.fd, &mut [0; 5], libc::MSG_DONTWAIT);
            if r != Err(libc::EAGAIN) {
                break r;
            }
        };
        storm.end();
        log!("{} far {}", show(last), w.far(&c, "drain"));
    }
}

extern "C" fn fork_one(_: c_int) {
    COUNT.fetch_add(1, SeqCst);
    // SAFETY: the child ends at once.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        if let Ok(1) = sys::send(FD.load(SeqCst), b"h", libc::MSG_NOSIGNAL) {
            // SAFETY: no pointers.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: no pointers.
        unsafe { libc::_exit(1) };
    }
    // SAFETY: all-zero is a valid status.
    let mut status = 1;
    // SAFETY: a live status.
    while unsafe { libc::waitpid(pid, &mut status, 0) } < 0 {}
    WROTE.fetch_add(u64::from(status == 0), SeqCst);
}

fn handler_forks_into_writes(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    sys::on_signal(SIGUSR1, fork_one, SA_RESTART);
    w.start_far(&c, "tally");
    // What is sent is not made here: the fork of a handler waits for the very allocation that it interrupts (glibc).
    let storm = Storm::begin(SIGUSR1, 300);
    let mut m = 0;
    while COUNT.load(SeqCst) < 40 {
        m += put_raw(c.fd, &MS[..3000]) as u64;
    }
    storm.end();
    compare(w, &c, m);
}

// ---- jumps

/// Room for a sigjmp_buf.
#[repr(C, align(16))]
struct Buffer(mem::MaybeUninit<[u8; 512]>);

static mut BUFFER: Buffer = Buffer(mem::MaybeUninit::uninit());

unsafe extern "C" {
    /// Calls `f`: 0 when it has returned, 1 when a handler has jumped out of it.
    fn signals_guard(buffer: *mut Buffer, f: extern "C" fn()) -> c_int;
    fn siglongjmp(buffer: *mut Buffer, value: c_int) -> !;
}

// What returns twice is not for the compiler to see.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".globl signals_guard",
    "signals_guard:",
    "push rbx",
    "mov rbx, rsi",
    "mov esi, 1",
    "call __sigsetjmp@PLT",
    "test eax, eax",
    "jne 2f",
    "call rbx",
    "xor eax, eax",
    "2: pop rbx",
    "ret",
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".globl signals_guard",
    "signals_guard:",
    "stp x29, x30, [sp, #-32]!",
    "str x19, [sp, #16]",
    "mov x19, x1",
    "mov w1, #1",
    "bl __sigsetjmp",
    "cbnz w0, 2f",
    "blr x19",
    "mov w0, #0",
    "2: ldr x19, [sp, #16]",
    "ldp x29, x30, [sp], #32",
    "ret",
);

/// The handler may jump.
static ARMED: AtomicBool = AtomicBool::new(false);

extern "C" fn jump(_: c_int) {
    COUNT.fetch_add(1, SeqCst);
    if ARMED.swap(false, SeqCst) {
        // SAFETY: armed only inside `guarded`, whose frame is alive.
        unsafe { siglongjmp(&raw mut BUFFER, 1) };
    }
}

/// Calls `f`; whether a handler jumped out of it. No value with a destructor may be alive in it then.
fn guarded(f: extern "C" fn()) -> bool {
    // SAFETY: one thread at a time.
    unsafe { signals_guard(&raw mut BUFFER, f) == 1 }
}

fn poke() -> JoinHandle<()> {
    let me = sys::this_thread();
    later(80, move || sys::signal_thread(me, SIGUSR1))
}

/// After the jump the connection is as good as before, and its end is told.
fn good_and_ends(w: &World, mut c: Conn) {
    w.still_good(&mut c);
    w.start_far(&c, "drain");
    log!("{}", show(sys::close(c.fd)));
    log!("far {}", w.finish().starts_with("EOF"));
}

fn jump_out_of(w: &World, c: Conn, f: extern "C" fn()) {
    FD.store(c.fd, SeqCst);
    sys::on_signal(SIGUSR1, jump, SA_RESTART);
    for _ in 0..3 {
        let t = poke();
        ARMED.store(true, SeqCst);
        log!("jumped {}", guarded(f));
        t.join().expect("no panic");
    }
    good_and_ends(w, c);
}

extern "C" fn call_recv() {
    let _ = sys::recv(FD.load(SeqCst), &mut [0; 9], 0);
}

fn jump_out_of_recv(w: &World) {
    jump_out_of(w, w.pair(), call_recv);
}

extern "C" fn call_send() {
    let _ = sys::send(FD.load(SeqCst), b"m", 0);
}

fn jump_out_of_send(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    let n = c.tx - before;
    FD.store(c.fd, SeqCst);
    sys::on_signal(SIGUSR1, jump, SA_RESTART);
    for _ in 0..3 {
        let t = poke();
        ARMED.store(true, SeqCst);
        log!("jumped {}", guarded(call_send));
        t.join().expect("no panic");
    }
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    good_and_ends(w, c);
}

extern "C" fn call_poll() {
    let _ = sys::poll1(FD.load(SeqCst), POLLIN, -1);
}

fn jump_out_of_poll(w: &World) {
    jump_out_of(w, w.pair(), call_poll);
}

extern "C" fn call_epoll() {
    // No value with a destructor.
    let _ = wait_once(-1);
}

fn jump_out_of_epoll(w: &World) {
    let c = w.pair();
    EP.store(sys::epoll_create(), SeqCst);
    sys::epoll_add(EP.load(SeqCst), c.fd, EPOLLIN, 1);
    jump_out_of(w, c, call_epoll);
}

static MS: [u8; 4000] = [b'm'; 4000];

extern "C" fn call_anything() {
    let fd = FD.load(SeqCst);
    // Until a handler jumps.
    loop {
        let _ = sys::send(fd, &MS, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
        let _ = sys::recv(fd, &mut [0; 50], libc::MSG_DONTWAIT);
        let _ = sys::poll1(fd, POLLIN, 0);
        let _ = sys::send(fd, &MS, libc::MSG_NOSIGNAL);
    }
}

/// Jumps out of the middle of calls; afterwards they work, and what went is all of one kind.
fn jump_out_of_anything(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    sys::on_signal(SIGUSR1, jump, SA_RESTART);
    w.start_far(&c, "tally");
    let storm = Storm::begin(SIGUSR1, 30);
    for _ in 0..1000 {
        ARMED.store(true, SeqCst);
        guarded(call_anything);
    }
    storm.end();
    log!("{}", put_raw(c.fd, &MS));
    log!("{}", show(sys::close(c.fd)));
    let told = w.finish();
    log!("{}", told.starts_with("m ") && told.ends_with(" h 0 other 0"));
}

// ---- before a call sleeps

/// A signal that comes some microseconds after the call began, once: it ends it.
fn looking(call: impl Fn() -> Res) {
    const ROUNDS: u32 = 150;
    static GO: AtomicUsize = AtomicUsize::new(0);
    static DONE: AtomicUsize = AtomicUsize::new(0);
    sys::on_signal(SIGUSR1, count, 0);
    let me = sys::this_thread();
    let t = later(0, move || {
        let mut lost = 0;
        for i in 1..=ROUNDS as usize {
            while GO.load(SeqCst) < i {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(4 + i as u64 % 40) {
                std::hint::spin_loop();
            }
            sys::signal_thread(me, SIGUSR1);
            // Should it be lost, another one ends the round.
            while DONE.load(SeqCst) < i {
                std::thread::sleep(Duration::from_millis(1));
                if start.elapsed() > Duration::from_millis(300) {
                    lost += 1;
                    while DONE.load(SeqCst) < i {
                        sys::signal_thread(me, SIGUSR1);
                        sys::sleep_ms(1);
                    }
                }
            }
        }
        lost
    });
    let mut other = 0;
    for i in 1..=ROUNDS as usize {
        GO.store(i, SeqCst);
        other += u32::from(call() != Err(libc::EINTR));
        DONE.store(i, SeqCst);
    }
    let lost = t.join().expect("no panic");
    // A thread that is taken off its CPU just before the call may miss one, on TCP as well.
    log!("nearly none lost: {}; ended otherwise: {other}", lost * 20 < ROUNDS);
    if lost * 20 >= ROUNDS {
        log!("lost: {lost}");
    }
}

fn signal_while_looking(w: &World) {
    let mut c = w.pair();
    let fd = c.fd;
    looking(|| sys::recv(fd, &mut [0; 9], 0));
    w.still_good(&mut c);
}

fn signal_while_looking_in_poll(w: &World) {
    let mut c = w.pair();
    let fd = c.fd;
    looking(|| sys::poll1(fd, POLLIN, -1).map(i64::from));
    w.still_good(&mut c);
}

fn signal_while_looking_in_epoll(w: &World) {
    let mut c = w.pair();
    EP.store(sys::epoll_create(), SeqCst);
    sys::epoll_add(EP.load(SeqCst), c.fd, EPOLLIN, 1);
    looking(|| sys::res(wait_once(-1)));
    w.still_good(&mut c);
}

fn signal_while_looking_for_space(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    let n = c.tx - before;
    let fd = c.fd;
    looking(|| sys::send(fd, b"m", 0));
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    w.still_good(&mut c);
}

/// A handler without SA_RESTART that has not run is of no account.
fn restart_beside_another_handler(w: &World) {
    let mut c = w.pair();
    sys::on_signal(SIGUSR2, count, 0);
    sys::on_signal(SIGUSR1, count, SA_RESTART);
    // Bytes that this end has not read: perhaps the peer waits for it in turn, so it will not wait for ever.
    w.far(&c, "put 10");
    c.arrived(10);
    let n = c.tx;
    log!("{}", c.fill());
    let n = c.tx - n;
    w.start("sleep 250");
    let far = c.far;
    let fd = c.fd;
    let me = sys::this_thread();
    std::thread::scope(|s| {
        let h = s.spawn(|| {
            for _ in 0..20 {
                sys::signal_thread(me, SIGUSR1);
                sys::sleep_ms(7);
            }
            w.finish();
            w.ask(&format!("get {far} {n}"))
        });
        // One small write that blocks through the signals, until the far end reads.
        log!("{}", show(sys::send(fd, &[crate::world::pattern(c.tx)], 0)));
        c.tx += 1;
        log!("{}", h.join().expect("no panic") == format!("got {n}"));
    });
    log!("{} {} {}", w.far(&c, "get 1"), c.get(10), COUNT.load(SeqCst) > 0);
    w.still_good(&mut c);
}

// ---- the program's own view

fn action(sig: c_int, new: Option<&libc::sigaction>) -> libc::sigaction {
    // SAFETY: all-zero is a valid action.
    let mut old: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: live actions, or null.
    sys::res(unsafe { libc::sigaction(sig, new.map_or(ptr::null(), |n| n), &mut old) }).expect("sigaction");
    old
}

fn name(handler: usize) -> &'static str {
    match handler {
        libc::SIG_DFL => "default",
        libc::SIG_IGN => "ignored",
        h if h == count as *const () as usize => "count",
        h if h == write_h as *const () as usize => "write_h",
        h if h == with_info as *const () as usize => "with_info",
        _ => "another",
    }
}

/// Handler, flags that matter, and whether the other signal is in the mask.
fn told(a: &libc::sigaction) -> String {
    const SA_RESTORER: c_int = 0x0400_0000;
    // SAFETY: a live set.
    let in_mask = unsafe { libc::sigismember(&a.sa_mask, SIGUSR2) };
    format!("{} {:#x} {in_mask}", name(a.sa_sigaction), a.sa_flags & !SA_RESTORER)
}

static VALUES: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU32 = AtomicU32::new(0);

extern "C" fn with_info(sig: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: as the kernel hands them to a handler with SA_SIGINFO.
    let (value, i) = unsafe { ((*info).si_value().sival_ptr as u64, &*info) };
    // SAFETY: no pointers.
    let me = unsafe { libc::getpid() };
    // SAFETY: as above.
    let good = i.si_signo == sig && !context.is_null() && unsafe { i.si_pid() } == me;
    if !good || value != VALUES.fetch_add(1, SeqCst) {
        WRONG.fetch_add(1, SeqCst);
    }
    COUNT.fetch_add(1, SeqCst);
}

type Signal = unsafe extern "C" fn(c_int, usize) -> usize;

unsafe extern "C" {
    fn sysv_signal(sig: c_int, handler: usize) -> usize;
    fn __sysv_signal(sig: c_int, handler: usize) -> usize;
    fn bsd_signal(sig: c_int, handler: usize) -> usize;
    fn ssignal(sig: c_int, handler: usize) -> usize;
    fn sigset(sig: c_int, handler: usize) -> usize;
    fn siginterrupt(sig: c_int, on: c_int) -> c_int;
}

fn signal_by(f: Signal, sig: c_int, handler: usize) -> &'static str {
    // SAFETY: a handler that lives for ever, or a word that stands for none.
    name(unsafe { f(sig, handler) })
}

/// What was set is what is read back, by every call that sets handlers, before the first upgrade and after.
fn actions_are_the_programs(w: &World) {
    sys::on_signal(libc::SIGALRM, count, SA_RESTART);
    let c = w.pair();
    let h = |f: extern "C" fn(c_int)| f as *const () as usize;
    log!("{}", told(&action(libc::SIGALRM, None)));
    // SAFETY: all-zero is a valid action.
    let mut a: libc::sigaction = unsafe { mem::zeroed() };
    a.sa_sigaction = with_info as *const () as usize;
    a.sa_mask = sys::sigset(SIGUSR2);
    for flags in [0, libc::SA_SIGINFO, SA_RESTART | libc::SA_NODEFER, libc::SA_RESETHAND | libc::SA_ONSTACK] {
        a.sa_flags = flags;
        let before = told(&action(SIGUSR1, Some(&a)));
        log!("{before} then {}", told(&action(SIGUSR1, None)));
    }
    let setters: [Signal; 6] = [libc_signal, bsd_signal, ssignal, sysv_signal, __sysv_signal, sigset];
    for f in setters {
        for x in [h(count), h(write_h), libc::SIG_IGN, h(count), libc::SIG_DFL, h(write_h)] {
            let before = signal_by(f, SIGUSR1, x);
            log!("{before} then {}", told(&action(SIGUSR1, None)));
        }
    }
    for on in [1, 0] {
        // SAFETY: no pointers.
        let r = unsafe { siginterrupt(SIGUSR1, on) };
        log!("{r} {}", told(&action(SIGUSR1, None)));
        log!("{} {}", signal_by(libc_signal, SIGUSR1, h(count)), told(&action(SIGUSR1, None)));
    }
    // By number: handler, flags, restorer, mask.
    let mut old = [0usize; 4];
    // SAFETY: room for the kernel's struct sigaction.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigaction, SIGUSR1, 0, old.as_mut_ptr(), 8) };
    log!("{r} {}", name(old[0]));
    let mut new = old;
    new[0] = h(write_h);
    // SAFETY: the kernel's struct sigaction, as it gave it.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigaction, SIGUSR1, new.as_ptr(), old.as_mut_ptr(), 8) };
    log!("{r} {} {}", name(old[0]), told(&action(SIGUSR1, None)));
    // And it is the one that runs.
    FD.store(c.fd, SeqCst);
    w.start_far(&c, "tally");
    sys::signal_thread(sys::this_thread(), SIGUSR1);
    let m = put_raw(c.fd, b"mm") as u64;
    compare(w, &c, m);
    for sig in [libc::SIGKILL, 0, 65, -1] {
        // SAFETY: refused.
        let r = unsafe { libc::sigaction(sig, &a, ptr::null_mut()) };
        log!("{sig} {}", show(sys::res(r)));
    }
}

unsafe extern "C" fn libc_signal(sig: c_int, handler: usize) -> usize {
    // SAFETY: as for the caller.
    unsafe { libc::signal(sig, handler) }
}

/// Handlers are exchanged while signals rain: one of them runs, never none.
fn action_changes_under_fire(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    w.start_far(&c, "tally");
    sys::on_signal(SIGUSR1, write_h, SA_RESTART);
    let storm = Storm::begin(SIGUSR1, 15);
    let mut m = 0;
    for i in 0..20_000 {
        sys::on_signal(
            SIGUSR1,
            if i % 2 == 0 { count } else { write_h },
            if i % 3 == 0 { 0 } else { SA_RESTART },
        );
        m += put_raw(c.fd, b"mmm") as u64;
    }
    storm.end();
    compare(w, &c, m);
}

/// A handler for one signal only.
fn reset_hand(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    w.start_far(&c, "tally");
    let mut m = 0;
    for _ in 0..50 {
        sys::on_signal(SIGUSR1, write_h, libc::SA_RESETHAND);
        let before = COUNT.load(SeqCst);
        let me = sys::this_thread();
        let t = later(0, move || sys::signal_thread(me, SIGUSR1));
        while COUNT.load(SeqCst) == before {
            m += put_raw(c.fd, &MS) as u64;
        }
        t.join().expect("no panic");
        if action(SIGUSR1, None).sa_sigaction != libc::SIG_DFL {
            log!("still there: {}", told(&action(SIGUSR1, None)));
        }
    }
    log!("{}", told(&action(SIGUSR1, None)));
    compare(w, &c, m);
}

/// Queued signals come each with its own value, and in order.
fn values_arrive_in_order(w: &World) {
    const N: u64 = 3000;
    let c = w.pair();
    let sig = libc::SIGRTMIN() + 3;
    // SAFETY: all-zero is a valid action.
    let mut a: libc::sigaction = unsafe { mem::zeroed() };
    a.sa_sigaction = with_info as *const () as usize;
    a.sa_flags = libc::SA_SIGINFO | SA_RESTART;
    action(sig, Some(&a));
    w.start_far(&c, "tally");
    let me = sys::this_thread();
    let t = later(0, move || {
        for i in 0..N {
            let value = libc::sigval { sival_ptr: i as *mut c_void };
            // SAFETY: a living thread.
            while unsafe { libc::pthread_sigqueue(me as libc::pthread_t, sig, value) } == libc::EAGAIN {
                sys::sleep_ms(1);
            }
        }
    });
    let mut m = 0;
    while VALUES.load(SeqCst) < N {
        m += put_raw(c.fd, &MS) as u64;
    }
    t.join().expect("no panic");
    log!("{} wrong of {}", WRONG.load(SeqCst), COUNT.load(SeqCst));
    let _ = sys::shutdown(c.fd, libc::SHUT_WR);
    log!("{}", w.finish() == format!("m {m} h 0 other 0"));
}

static STACK: AtomicUsize = AtomicUsize::new(0);
const STACK_SIZE: usize = 1 << 16;

extern "C" fn on_stack(sig: c_int) {
    let here = ptr::from_ref(&sig) as usize;
    let low = STACK.load(SeqCst);
    if !(low..low + STACK_SIZE).contains(&here) {
        WRONG.fetch_add(1, SeqCst);
    }
    write_h(sig);
}

fn handler_on_its_own_stack(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    let stack = vec![0u8; STACK_SIZE].leak();
    STACK.store(stack.as_ptr() as usize, SeqCst);
    let s = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_SIZE };
    // SAFETY: memory that lives for ever.
    log!("{}", show(sys::res(unsafe { libc::sigaltstack(&s, ptr::null_mut()) })));
    sys::on_signal(SIGUSR1, on_stack, SA_RESTART | libc::SA_ONSTACK);
    w.start_far(&c, "tally");
    let storm = Storm::begin(SIGUSR1, 20);
    let mut m = 0;
    while COUNT.load(SeqCst) < 1000 {
        m += put_raw(c.fd, &MS) as u64;
    }
    storm.end();
    log!("{} elsewhere", WRONG.load(SeqCst));
    compare(w, &c, m);
}

static DEEP: AtomicU32 = AtomicU32::new(0);

/// Runs with both signals blocked, so never inside itself.
extern "C" fn alone(sig: c_int) {
    if DEEP.fetch_add(1, SeqCst) != 0 {
        WRONG.fetch_add(1, SeqCst);
    }
    write_h(sig);
    DEEP.fetch_sub(1, SeqCst);
}

fn mask_of_a_handler(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    // SAFETY: all-zero is a valid action.
    let mut a: libc::sigaction = unsafe { mem::zeroed() };
    a.sa_sigaction = alone as *const () as usize;
    a.sa_flags = SA_RESTART;
    for (sig, other) in [(SIGUSR1, SIGUSR2), (SIGUSR2, SIGUSR1)] {
        a.sa_mask = sys::sigset(other);
        action(sig, Some(&a));
    }
    w.start_far(&c, "tally");
    let storms = [Storm::begin(SIGUSR1, 20), Storm::begin(SIGUSR2, 25)];
    let mut m = 0;
    while COUNT.load(SeqCst) < 3000 {
        m += put_raw(c.fd, &MS) as u64;
    }
    storms.into_iter().for_each(Storm::end);
    log!("{} inside each other", WRONG.load(SeqCst));
    none_is_blocked();
    compare(w, &c, m);
}

fn is_blocked(sig: c_int) -> bool {
    // SAFETY: all-zero is a valid set, which the call fills.
    let mut mask: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: a live set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &mut mask) };
    // SAFETY: a live set.
    unsafe { libc::sigismember(&mask, sig) == 1 }
}

fn none_is_blocked() {
    log!("blocked: {}", (1..64).filter(|s| is_blocked(*s)).count());
}

static BLOCKED: AtomicU32 = AtomicU32::new(0);

/// Tells whether its own signal is blocked while it runs.
extern "C" fn looks(sig: c_int) {
    BLOCKED.store(if is_blocked(sig) { 1 } else { 2 }, SeqCst);
}

/// SA_NODEFER lets in no signal that is in its own handler's mask, whenever and however the handler is set.
fn mask_with_its_own_signal(w: &World) {
    // SAFETY: all-zero is a valid action.
    let mut a: libc::sigaction = unsafe { mem::zeroed() };
    a.sa_sigaction = looks as *const () as usize;
    a.sa_flags = SA_RESTART | libc::SA_NODEFER;
    a.sa_mask = sys::sigset(SIGUSR2);
    for sig in [SIGUSR1, SIGUSR2] {
        action(sig, Some(&a));
    }
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    w.start_far(&c, "tally");
    let mut m: u64 = (0..100).map(|_| put_raw(c.fd, &MS) as u64).sum();
    let look = |sig| {
        sys::signal_thread(sys::this_thread(), sig);
        let read = told(&action(sig, None));
        log!("{sig}: blocked {}, {read}", BLOCKED.swap(0, SeqCst) == 1);
    };
    for sig in [SIGUSR1, SIGUSR2] {
        look(sig);
        for flags in [SA_RESTART, libc::SA_NODEFER, libc::SA_NODEFER | libc::SA_RESETHAND] {
            a.sa_flags = flags;
            action(sig, Some(&a));
            look(sig);
        }
        // By number: handler, flags, restorer, mask.
        let mut raw = [0usize; 4];
        a.sa_flags = SA_RESTART | libc::SA_NODEFER;
        action(sig, Some(&a));
        // SAFETY: room for the kernel's struct sigaction.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, sig, 0, raw.as_mut_ptr(), 8) };
        // SAFETY: the kernel's struct sigaction, as it gave it.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, sig, raw.as_ptr(), 0, 8) };
        look(sig);
    }
    // And under fire.
    a.sa_sigaction = alone as *const () as usize;
    action(SIGUSR2, Some(&a));
    let storm = Storm::begin(SIGUSR2, 15);
    while COUNT.load(SeqCst) < 2000 {
        m += put_raw(c.fd, &MS) as u64;
    }
    storm.end();
    log!("{} inside itself", WRONG.load(SeqCst));
    none_is_blocked();
    compare(w, &c, m);
}

// ---- cancellation

type Start = extern "C" fn(*mut c_void) -> *mut c_void;

unsafe extern "C-unwind" {
    fn pthread_cancel(t: libc::pthread_t) -> c_int;
    // As libc has them, but allowed to unwind: that is how cancellation leaves them.
    fn poll(p: *mut libc::pollfd, n: libc::nfds_t, ms: c_int) -> c_int;
    fn send(fd: c_int, b: *const c_void, n: usize, flags: c_int) -> isize;
}

extern "C-unwind" fn blocked_poll(_: *mut c_void) -> *mut c_void {
    // No Rust value with a destructor is alive here: cancellation unwinds through this frame.
    let mut p = libc::pollfd { fd: FD.load(SeqCst), events: POLLIN, revents: 0 };
    // SAFETY: a live entry.
    unsafe { poll(&mut p, 1, -1) };
    ptr::null_mut()
}

extern "C-unwind" fn blocked_send(_: *mut c_void) -> *mut c_void {
    // SAFETY: a live buffer of this length.
    unsafe { send(FD.load(SeqCst), b"m".as_ptr().cast(), 1, 0) };
    ptr::null_mut()
}

fn cancel(f: extern "C-unwind" fn(*mut c_void) -> *mut c_void) {
    // SAFETY: all-zero is filled by pthread_create; the thread is joined below.
    unsafe {
        let mut t: libc::pthread_t = mem::zeroed();
        // The ABI differs in nothing but the permission to unwind.
        let f: Start = mem::transmute(f as *const ());
        libc::pthread_create(&mut t, ptr::null(), f, ptr::null_mut());
        sys::sleep_ms(60);
        log!("{}", pthread_cancel(t));
        let mut r = ptr::null_mut();
        log!("{} cancelled {}", libc::pthread_join(t, &mut r), r as isize == -1);
    }
}

fn cancel_in_poll(w: &World) {
    let c = w.pair();
    FD.store(c.fd, SeqCst);
    cancel(blocked_poll);
    good_and_ends(w, c);
}

fn cancel_in_send(w: &World) {
    let mut c = w.pair();
    let before = c.tx;
    log!("{}", c.fill());
    let n = c.tx - before;
    FD.store(c.fd, SeqCst);
    cancel(blocked_send);
    log!("{}", w.far(&c, &format!("get {n}")) == format!("got {n}"));
    good_and_ends(w, c);
}
