//! A native program that forks. In the child nothing but the stream is used, as other threads of the test are gone.

use crate::{pattern, upgraded};
use smc::net::Stream;
use std::io::{Read, Write};

/// Runs `f` in a forked child, which ends with it: by exit(3), or without a word.
fn in_child(exit: bool, f: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child uses nothing that a thread of the parent may have left in the middle of a change, but for the
    // allocator, which libc keeps whole over a fork.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = if f() { 0 } else { 1 };
        if exit {
            // SAFETY: as above; the handlers of exit(3) are this crate's.
            unsafe { libc::exit(code) };
        }
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    assert!(pid > 0);
    pid
}

fn wait_for(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: `status` is writable.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
}

#[test]
fn parent_and_child_write_to_one_stream() {
    let (mut a, mut b) = upgraded();
    let child = in_child(false, || a.write_all(b"child").is_ok());
    let mut got = [0; 5];
    b.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"child");
    wait_for(child);
    a.write_all(b"mutti").unwrap();
    b.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"mutti");
    // The last holder's close is the end.
    drop(a);
    assert_eq!(b.read(&mut got).unwrap(), 0);
}

#[test]
fn the_parent_leaves_the_stream_to_its_child() {
    fn echo(s: &mut Stream) -> std::io::Result<()> {
        let mut buf = vec![0; 10_000];
        loop {
            match s.read(&mut buf)? {
                0 => return Ok(()),
                n => s.write_all(&buf[..n])?,
            }
        }
    }
    let (mut a, mut b) = upgraded();
    let child = in_child(true, || echo(&mut b).is_ok());
    drop(b);
    for n in 0..200 {
        let (out, mut back) = (pattern(n * 999, 999), vec![0; 999]);
        a.write_all(&out).unwrap();
        a.read_exact(&mut back).unwrap();
        assert!(out == back, "message {n}");
    }
    assert!(crate::in_ring(&a));
    a.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(a.read(&mut [0]).unwrap(), 0, "the child's exit closes");
    wait_for(child);
}

#[test]
fn exit_ends_a_stream_that_nobody_dropped() {
    let (mut a, b) = upgraded();
    let child = in_child(true, || {
        let sent = (&b).write_all(b"the last words").is_ok();
        std::mem::forget(b.try_clone());
        sent
    });
    drop(b);
    let mut all = Vec::new();
    a.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"the last words");
    wait_for(child);
}

/// The set is one object of the kernel's that both processes have: what the child drops must stay in it.
#[test]
fn a_child_that_drops_its_streams_leaves_them_in_the_parents_poll() {
    use mio::{Events, Interest, Poll, Token};
    let (mut a, mut b) = upgraded();
    let mut poll = Poll::new().unwrap();
    b.set_nonblocking(true).unwrap();
    poll.registry().register(&mut b, Token(1), Interest::READABLE).unwrap();
    assert!(b.read(&mut [0]).is_err(), "armed");
    let child = in_child(false, || {
        // SAFETY: the child's copy, which it never uses again.
        drop(unsafe { std::ptr::read(&raw const b) });
        true
    });
    wait_for(child);
    a.write_all(b"x").unwrap();
    let mut events = Events::with_capacity(4);
    while !events.iter().any(|e| e.token() == Token(1) && e.is_readable()) {
        poll.poll(&mut events, None).unwrap();
    }
    assert_eq!(b.read(&mut [0]).unwrap(), 1);
}
