//! The connection page: what the two ends of one connection share beside the two rings.
//!
//! One [`ConnPage`] holds a [`SidePage`] for each end. A side writes the words of its own `SidePage` and
//! reads the other's; `ctl` alone is written by both. Each group of words that one side writes has a cache
//! line of its own, so that a producer and a consumer that run at the same time do not take lines from each
//! other.
//!
//! Everything here is read as a hostile peer may have written it: each word is loaded once and checked.
//! Answers to RFC 7609 section 3.4 (CDC cursors) and `net/smc/smc_cdc.h`, with 64-bit cursors that never
//! wrap in place of wrap count + offset.

use crate::sync::AtomicU32 as Plain;
use crate::sync::page::{AtomicU32, AtomicU64};

/// Version of this layout; the CLC messages carry it and a mismatch is declined.
pub const LAYOUT_VERSION: u32 = 3;

/// Bit of [`TxLine::prod`]: the stream leaves the ring at this cursor and goes on in TCP.
pub const LEFT: u64 = 1 << 63;

/// Bits of [`SidePage::ctl`].
pub mod ctl {
    /// The owner sleeps, or is about to, until its peer produces: ring its doorbell.
    pub const RX_ARMED: u32 = 1;
    /// The owner sleeps, or is about to, until its peer consumes: ring its doorbell.
    pub const TX_ARMED: u32 = 2;
    /// The owner consumes nothing beyond `RxLine::stop_at`: the rest goes by TCP.
    pub const RX_STOP: u32 = 4;
    /// The peer's stream leaves the ring, as [`super::LEFT`] tells where. Of this and `RX_STOP` the first
    /// to be set decides how the ring ends.
    pub const PEER_LEFT: u32 = 8;
    /// The owner is about to choose its `RxLine::stop_at`: whoever publishes now and sees this leaves the ring.
    pub const RX_ASK: u32 = 16;
    /// The peer's program has shut its sending direction: the FIN that follows is not its end.
    pub const PEER_SHUT: u32 = 32;
}

/// What a side says as the producer of its outgoing ring.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct TxLine {
    /// Bytes ever produced into the ring, and [`LEFT`].
    pub prod: AtomicU64,
    /// The TCP byte offset at which the stream goes over to the ring, plus one; 0: not announced.
    pub switch_at: AtomicU64,
    /// The cursor that lies at the start of the buffer, see [`crate::ring::place`].
    pub origin: AtomicU64,
    /// Doorbells that this side's process had rung at the peer's before it produced last, of all their connections.
    pub rang: Plain,
    /// SO_SNDBUF, if the program has set it; 0: it has not. See `conn/bounds.rs`.
    pub sndbuf: Plain,
}

/// What a side says as the consumer of its incoming ring.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct RxLine {
    /// Bytes ever consumed from the ring.
    pub cons: AtomicU64,
    /// Valid once `ctl` has `RX_STOP`: this side consumes up to here and takes the rest from TCP.
    pub stop_at: AtomicU64,
    /// 1: this side follows an announced switch. The producer may announce.
    pub ready: AtomicU32,
    /// SO_RCVBUF, if the program has set it; 0: it has not. See `conn/bounds.rs`.
    pub rcvbuf: Plain,
}

/// The word both sides write.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct CtlLine {
    /// See [`ctl`].
    pub ctl: AtomicU32,
}

/// Hints, never trusted for anything but speed, and the mark that a side is done with the memory.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct HintLine {
    /// CPU this side last ran on, plus one.
    pub cpu: Plain,
    /// 1: this side is detached and touches neither the page nor the rings any more.
    pub detached: Plain,
}

/// One side's words.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct SidePage {
    /// As producer.
    pub tx: TxLine,
    /// As consumer.
    pub rx: RxLine,
    /// Doorbell arming and requests of this side; the peer clears the armed bits.
    pub ctl: CtlLine,
    /// Hints.
    pub hint: HintLine,
}

/// The page of one connection.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct ConnPage {
    /// Index 0: the connecting end. Index 1: the accepting end.
    pub side: [SidePage; 2],
}

/// Bytes a [`ConnPage`] takes in a segment.
pub const CONN_PAGE_SIZE: usize = 512;

#[cfg(not(smc_loom))]
const _: () = {
    assert!(size_of::<ConnPage>() == CONN_PAGE_SIZE);
    assert!(align_of::<ConnPage>() == 64);
    assert!(std::mem::offset_of!(SidePage, rx) == 64);
    assert!(std::mem::offset_of!(SidePage, ctl) == 128);
    assert!(std::mem::offset_of!(SidePage, hint) == 192);
};
