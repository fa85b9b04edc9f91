//! Downgrades for no reason but a test (`SMC_TEST_DOWNGRADE`): the stream leaves the ring at any moment.
//!
//! What a program or its peer may bring about at any call (an option, urgent data, a descriptor that is passed
//! on) happens here after a number of calls that is drawn anew each time. It costs nothing where it is not
//! asked for: the word that is looked at after each call is the one that tells of switched directions.

use super::{Socket, phase};
use crate::config::config;
use crate::reason::Reason;
use crate::sync::Ordering::*;
use std::sync::atomic::AtomicU64;

/// In `changed`: downgrades are forced.
pub(super) const FORCED: u32 = 2;

/// Numbers drawn so far in this process.
static DRAWN: AtomicU64 = AtomicU64::new(0);

/// The next number below `n` of a fixed sequence that the seed names (splitmix64).
fn draw(n: u64) -> u64 {
    let i = DRAWN.fetch_add(1, Relaxed).wrapping_add(config().test_downgrade.1 << 32);
    let mut x = i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ x >> 31) % n
}

/// Half of the wanted number of calls, and as many again at most once and a half.
fn calls() -> u32 {
    let n = u64::from(config().test_downgrade.0);
    (n / 2 + draw(n + 1)).max(1) as u32
}

impl Socket {
    /// A new connection: its downgrades are forced, if the settings say so.
    pub(super) fn force(&self) {
        if config().test_downgrade.0 != 0 {
            self.forced_in.store(calls(), Relaxed);
            self.changed.store(FORCED, Relaxed);
        }
    }

    /// A call that moved bytes has ended: sends its own stream, the peer's or both back to TCP when the time has
    /// come.
    #[cold]
    pub fn call_ends(&self, fd: i32) {
        if self.changed.load(Relaxed) & FORCED == 0
            || self.phase.load(Relaxed) != phase::MAPPED
            || self.slot().is_some_and(|s| s.is_served())
        {
            return;
        }
        // A program that was told the stream is full would find TCP's empty queue, which no real cause does so
        // soon after.
        if self.slot().is_none_or(|s| s.tx.blocked.load(Relaxed) != 0) || self.is_half_full() {
            return;
        }
        let last = |n: u32| n.checked_sub(1);
        if self.forced_in.fetch_update(Relaxed, Relaxed, last) != Ok(1) {
            return;
        }
        self.forced_in.store(calls(), Relaxed);
        let what = draw(4);
        if what != 0 {
            self.leave_tx(fd, Reason::SocketOption);
        }
        // What is in the ring stays there: whoever sent it may not call again for long.
        if what != 1 {
            self.stop_rx(Reason::SocketOption, true);
        }
    }

    /// Whether so much is unread that the peer may have been told the stream is full.
    fn is_half_full(&self) -> bool {
        self.mapped().zip(self.unread(0)).is_some_and(|(m, n)| n > m.most_unread() / 2)
    }
}
