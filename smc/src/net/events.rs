//! What becomes of a stream, as `tracing` events (feature `tracing`).
//!
//! A subscriber is somebody else's code: it may write to a file, or to a stream of this very module. So events are made
//! where a call has let go of everything, at its end ([`Core::settle`]), out of what has become of the connection
//! meanwhile, and not where it became so. Each is told once, whichever thread comes first; one that comes and goes
//! between two calls is not told.

use super::core::Core;
use super::{ConnectionInfo, Mode};
use crate::sync::{AtomicU32, Ordering::Relaxed};

/// What was told last: nothing, 0, and then these in their order.
mod told {
    pub const UPGRADED: u32 = 1;
    pub const ON_TCP: u32 = 2;
}

/// Of one connection.
#[derive(Debug, Default)]
pub(super) struct Events(AtomicU32);

impl Events {
    /// A direction has switched, or the connection stays where it is.
    #[cold]
    pub fn changed(&self, core: &Core) {
        let Some(c) = core.sock.info() else { return };
        let now = match c.mode() {
            Mode::Tcp if c.reason.is_none() => return,
            Mode::Tcp => told::ON_TCP,
            _ => told::UPGRADED,
        };
        // Relaxed: it carries nothing; the read-modify-write alone makes one thread the one that tells.
        if self.0.fetch_max(now, Relaxed) >= now {
            return;
        }
        let ends = Ends::of(core, &c);
        let reason = c.reason.map_or("", |r| r.name());
        match (now, c.best) {
            (told::UPGRADED, _) => tracing::info!(
                target: "smc",
                local = ends.local,
                peer = ends.peer,
                mode = c.mode().name(),
                ring_size = c.ring_size,
                peer_pid = c.peer_pid,
                "upgraded"
            ),
            (_, Mode::Tcp) => {
                tracing::info!(target: "smc", local = ends.local, peer = ends.peer, reason, "stays on TCP");
            }
            _ => tracing::info!(target: "smc", local = ends.local, peer = ends.peer, reason, "back on TCP"),
        }
    }

    /// The last handle is about to close it; the counters are whole.
    pub fn closing(core: &Core) {
        if !tracing::enabled!(target: "smc", tracing::Level::DEBUG) {
            return;
        }
        let Some(c) = core.sock.info() else { return };
        let ends = Ends::of(core, &c);
        tracing::debug!(
            target: "smc",
            local = ends.local,
            peer = ends.peer,
            best = c.best.name(),
            tx_bytes_ring = c.tx_bytes_ring,
            rx_bytes_ring = c.rx_bytes_ring,
            tx_bytes_tcp = c.tx_bytes_tcp,
            rx_bytes_tcp = c.rx_bytes_tcp,
            polls = c.polls,
            sleeps = c.sleeps,
            doorbells = c.doorbells,
            "closed"
        );
    }
}

/// Addresses, as text; absent where they are not known any more.
struct Ends {
    local: Option<String>,
    peer: Option<String>,
}

impl Ends {
    fn of(core: &Core, c: &ConnectionInfo) -> Self {
        let text = |a: Option<std::net::SocketAddr>| a.map(|a| a.to_string());
        Ends {
            local: text(c.local.or_else(|| core.with_tcp(|t| t.local_addr()).ok())),
            peer: text(c.peer.or_else(|| core.with_tcp(|t| t.peer_addr()).ok())),
        }
    }
}
