//! The link groups of this process: who its upgraded streams share memory with.

use super::core::statuses;
use super::{ConnectionInfo, Role};
use crate::lgr::{self, LinkGroup, Owner};

/// What [`link_groups`] tells of one: a pair of processes and the memory that they share (RFC 7609, section 2.3).
///
/// ```
/// fn show(g: &smc::net::LinkGroupInfo) {
///     println!("process {} of user {}: {} streams, {} bytes", g.peer_pid, g.peer_uid, g.connections, g.bytes);
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkGroupInfo {
    /// The peer's process id, as the kernel says it; 0: it does not (another pid namespace).
    pub peer_pid: u32,
    /// The peer's user, as the kernel says it.
    pub peer_uid: u32,
    /// Whether the memory is this process's: its ends of the streams are accepted ones.
    pub owns_memory: bool,
    /// The owner's number for it.
    pub number: u64,
    /// Pieces of memory mapped.
    pub segments: usize,
    /// Bytes in them, of which only those take memory that have been used.
    pub bytes: u64,
    /// Whether it takes no more streams.
    pub terminated: bool,
    /// Streams of [`smc::net`](super) that have the peer and such memory.
    pub connections: usize,
}

impl LinkGroupInfo {
    fn new(g: &LinkGroup, all: &[ConnectionInfo]) -> Self {
        let (key, (segments, bytes)) = (g.key(), g.segments());
        let owns_memory = key.owner == Owner::Local;
        let role = if owns_memory { Role::Accept } else { Role::Connect };
        let peer_pid = key.pid.max(0) as u32;
        let belongs = |c: &&ConnectionInfo| c.peer_pid == Some(peer_pid) && c.role == role;
        LinkGroupInfo {
            peer_pid,
            peer_uid: key.uid,
            owns_memory,
            number: g.number(),
            segments,
            bytes,
            terminated: g.is_terminated(),
            connections: all.iter().filter(belongs).count(),
        }
    }
}

/// The link groups of this process as they are now. None where the streams are left to libsmc.so.
///
/// ```
/// for group in smc::net::link_groups() {
///     println!("{group:?}");
/// }
/// ```
#[must_use]
pub fn link_groups() -> Vec<LinkGroupInfo> {
    let (all, mut found) = (statuses(), Vec::new());
    lgr::each(|g| found.push(LinkGroupInfo::new(g, &all)));
    found.sort_by_key(|g| (g.peer_pid, g.owns_memory, g.number));
    found
}
