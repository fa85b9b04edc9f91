//! The rules that the switch stands on, by name, so that a test can drop one and see what breaks.
//!
//! In the library all of them hold, as a constant. In the engine's tests `explore` drops one at a time: each must
//! then be found missing, or it is no rule, or the model does not look.

/// A rule of the switch protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(all(test, not(smc_loom))),
    allow(dead_code, reason = "some are the callers', whom only a model plays")
)]
pub enum Rule {
    /// S announces before it sends the last byte before N.
    AnnounceFirst,
    /// R peeks before it looks for the announcement.
    PeekFirst,
    /// R takes nothing beyond N from TCP.
    TakeToN,
    /// R takes nothing beyond its own stop from the ring.
    TakeToStop,
    /// R asks before it looks where to stop, if it keeps what is in the ring.
    AskFirst,
    /// Stop and leave are one word: the first decides.
    OneWord,
    /// S looks after each publication whether it was asked to stop.
    HeedAfterPublish,
    /// S moves into TCP what lies beyond the stop.
    MoveBeyondStop,
    /// Who leaves says at which cursor.
    SayLeft,
    /// Who arms looks once more.
    Recheck,
    /// Who wakes up takes the arming back only if nobody else relies on it, under the lock under which those are counted.
    DisarmAlone,
    /// A stop rings.
    StopRings,
    /// A ring that is owed is noted before the armed bit is taken, for who shares the end with a holder that
    /// is killed between the two.
    NoteRing,
    /// A note is paid only by a ring that comes after the armed bit was taken, likewise.
    TakenFirst,
    /// A stop is noted before it is told, likewise.
    NoteStop,
    /// The ring of a peer that was killed while it left ends where its cursor is.
    EndOfTheDead,
    /// Bytes that are in TCP are read before the reset that a killed peer owes is told.
    BytesBeforeReset,
    /// A stream that a killed holder had said to leave the ring leaves it before anything else is sent.
    FinishLeave,
    /// Who leaves notes the ring that is owed before the mode says that all is done.
    NoteLeave,
    /// Who finds the stream out of the ring pays the ring that a killed holder owes before it goes on by TCP.
    PayRings,
    /// What follows from the peer's end is done again if it was begun by a holder that may have been killed in it.
    FinishGone,
    /// Who shuts the sending direction wakes those who sleep for room in it.
    ShutWakes,
    /// A holder that closes and is not the last says nothing to the peer.
    LastLeaves,
    /// A cursor that a killed holder noted, and did not publish, is published by who shares the end.
    Republish,
}

/// Whether the rule is followed.
#[cfg(not(all(test, not(smc_loom))))]
#[inline(always)]
pub const fn holds(_: Rule) -> bool {
    true
}

#[cfg(all(test, not(smc_loom)))]
pub use crate::explore::holds;
