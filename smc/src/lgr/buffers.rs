//! One connection's buffers, and what happens to them when the connection lets go.

use super::{LinkGroup, Member};
use crate::{
    handshake::Side,
    mem::{
        layout::ConnPage,
        rmb::{Buffers, Ticket},
    },
    ring,
};
use std::sync::Arc;

/// The page and the two rings of one connection. Keeps the link group alive.
///
/// On drop this side is marked detached, and the memory goes back to its owner; after that the peer may be
/// the last user, or the memory may serve another connection.
#[derive(Debug)]
pub struct ConnBuffers {
    side: Side,
    buffers: Buffers,
    /// On the side that owns the memory: the way back to the allocator.
    ticket: Option<Ticket>,
    /// Not the last holder: another process of a fork goes on with the connection.
    shared: bool,
    member: Member,
}

impl ConnBuffers {
    pub(crate) fn new(side: Side, buffers: Buffers, ticket: Option<Ticket>, member: Member) -> Self {
        ConnBuffers { side, buffers, ticket, shared: false, member }
    }

    /// The connection's shared page.
    #[must_use]
    pub fn page(&self) -> &ConnPage {
        self.buffers.page()
    }

    /// The ring we produce into: start and size (a power of two). Valid while `self` lives; the bytes are the
    /// peer's to read, and to spoil, at any time.
    #[must_use]
    pub fn tx(&self) -> (*mut u8, usize) {
        self.buffers.ring(self.side as usize)
    }

    /// The place in the ring of [`ConnBuffers::tx`] that lies next to the page, and from which the ring's bytes have a
    /// memory page with it in common.
    #[must_use]
    pub fn start(&self) -> u64 {
        match self.side {
            Side::Connect => 0,
            Side::Accept => self.buffers.extent().ring_size as u64 - ring::WINDOW,
        }
    }

    /// The ring we consume from: start and size, as for [`ConnBuffers::tx`].
    #[must_use]
    pub fn rx(&self) -> (*mut u8, usize) {
        self.buffers.ring(self.side as usize ^ 1)
    }

    /// The link group.
    #[must_use]
    pub fn lgr(&self) -> &Arc<LinkGroup> {
        self.member.group()
    }

    /// Which end we are.
    #[must_use]
    pub const fn side(&self) -> Side {
        self.side
    }

    /// With `true`, a drop does not mark this side detached: another process holds the same end of the
    /// connection since a fork, and the mark is for the last of them to set.
    pub fn set_shared(&mut self, shared: bool) {
        self.shared = shared;
    }
}

impl Drop for ConnBuffers {
    fn drop(&mut self) {
        if !self.shared {
            self.buffers.detach(self.side as usize);
        }
        // Given back in any case: the allocator waits for the marks of both sides, whoever sets ours.
        if let (Some(ticket), Some(rmb)) = (self.ticket.take(), self.member.group().rmb()) {
            rmb.give(ticket);
        }
    }
}
