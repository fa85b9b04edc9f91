//! SMC-R without I/O: what to say, what to make of what is heard. Time, keys and queue pairs come in as arguments.
//!
//! | module | what it decides |
//! | --- | --- |
//! | [`cursor`] | what a cursor on the wire means |
//! | [`stream`] | one connection: what to write where, what is readable, the end, the replay after a link was lost |
//! | [`rendezvous`] | CLC, both sides: from the Proposal to a link |
//! | [`group`] | a link group and its links: LLC, memory keys, keepalive, termination |
//!
//! `handle_*` takes what has happened, `poll_*` gives what is to be done next. Nothing here trusts the peer: what no
//! correct peer says is a [`Misbehaved`].

pub mod cursor;
pub mod group;
#[cfg(test)]
mod group_tests;
pub mod rendezvous;
#[cfg(test)]
mod rendezvous_tests;
pub mod stream;
#[cfg(test)]
mod stream_tests;

use crate::wire::smcr::llc;

/// Milliseconds of a clock that only goes forward.
pub type Ms = u64;

/// What no correct peer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misbehaved {
    /// An offset at or beyond the end of its ring.
    Offset,
    /// A producer that has overtaken the consumer, or a consumer the producer.
    Cursor,
    /// Data after it had said that there is no more.
    DataAfterEnd,
    /// Bytes that are no LLC message.
    Llc(llc::Malformed),
    /// A CONFIRM LINK that names other ends than the handshake.
    OtherLink,
}
