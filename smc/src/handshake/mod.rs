//! From "this TCP connection is a candidate" to "both ends have buffers": rendezvous and CLC.

pub mod local;
pub mod switch;
pub mod unix;

pub use local::{Established, Rendezvous, RendezvousConfig, Step};

/// Which end of the TCP connection: the index of its words in [`crate::mem::layout::ConnPage::side`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// It called connect().
    Connect = 0,
    /// It called accept(); it owns the memory.
    Accept = 1,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn peer(self) -> Side {
        match self {
            Side::Connect => Side::Accept,
            Side::Accept => Side::Connect,
        }
    }
}
