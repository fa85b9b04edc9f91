//! Whether the peer of a TCP connection speaks SMC-R, by the TCP option that says so (RFC 7609 section 3.1).
//!
//! An administrator attaches two programs to a cgroup (`smc bpf attach`; `cli/src/bpf/option.bpf.c` is what they do). A
//! process talks to them by setsockopt(2), which needs no rights, no file and no descriptor but the socket, and can say
//! something of that socket alone. Where they are not attached the kernel knows no such option, and the answer is no.
//!
//! ```text
//!  client: OFFER, connect ── SYN + option ─────> listen, OFFER before it: server
//!                        <── SYN-ACK + option ──
//!  both:   ASK, before the first byte: yes, once. From then on both have to speak CLC, or decline by it.
//! ```

use crate::sync::{AtomicU32, Ordering::Relaxed};
use crate::sys;

/// The kernel's level of SMC's own options, of which a TCP socket has none (linux/socket.h).
const SOL_SMC: i32 = 286;

/// Names of our options; `option.bpf.c` has the same.
mod name {
    pub const OFFER: i32 = 0x6c73_6d01;
    pub const ASK: i32 = OFFER + 1;
    pub const TAKE: i32 = OFFER + 2;
    pub const WITHDRAW: i32 = OFFER + 3;
    pub const PRESENT: i32 = OFFER + 4;
}

fn say(fd: i32, name: i32) -> bool {
    tell(fd, name) == 0
}

fn tell(fd: i32, name: i32) -> isize {
    sys::setsockopt(fd, SOL_SMC, name, &1u32.to_ne_bytes())
}

/// Whether the programs are there: 0 unknown, else one of these. Asked once: a program that runs when they are attached
/// stays as it is, and one where they are not makes no system call more for each connection.
static PRESENT: AtomicU32 = AtomicU32::new(0);
const YES: u32 = 1;
const NO: u32 = 2;

/// Looks, by a socket of this process, unless that was done before. True: they are there.
pub fn look(fd: i32) -> bool {
    // Relaxed, here and below: it carries nothing, and who made or accepted a connection has looked before.
    let mut known = PRESENT.load(Relaxed);
    if known == 0 {
        known = match -tell(fd, name::PRESENT) as i32 {
            0 => YES,
            libc::EBADF | libc::ENOTSOCK => 0,
            _ => NO,
        };
        PRESENT.store(known, Relaxed);
    }
    known == YES
}

/// Whether it is worth to [`ask`].
#[inline]
pub fn is_in_use() -> bool {
    PRESENT.load(Relaxed) == YES
}

/// Before connect or listen: the socket is to say that it speaks SMC. False: nobody has heard that.
pub fn offer(fd: i32) -> bool {
    look(fd) && say(fd, name::OFFER)
}

/// What [`offer`] has said of a socket counts no more. Who was answered already has the answer.
pub fn withdraw(fd: i32) {
    say(fd, name::WITHDRAW);
}

/// Whether the connection's peer has offered SMC and was offered it. True once: the caller is the one who acts on it.
///
/// For a connection that was accepted this tells as well that its program asks, and has the listener's next ones offered.
pub fn ask(fd: i32) -> bool {
    say(fd, name::ASK)
}

/// As [`ask`], by who can't speak SMC on this connection: nothing follows for the next.
pub fn take(fd: i32) -> bool {
    say(fd, name::TAKE)
}

/// Whether the programs are attached where this TCP socket was made.
pub fn is_present(fd: i32) -> bool {
    say(fd, name::PRESENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    #[test]
    fn without_the_programs_nobody_hears() {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        // Listens already, so that no program takes an offer either.
        assert!(!offer(l.as_raw_fd()));
        assert!(!ask(l.as_raw_fd()) && !take(l.as_raw_fd()));
        withdraw(l.as_raw_fd());
        assert!(!offer(-1) && !ask(-1) && !take(-1) && !is_present(-1));
    }
}
