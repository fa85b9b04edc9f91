//! The devices of this host, and which of them a connection goes by.
//!
//! A TCP connection's own address tells: the device whose port has it as a GID sits on the same Ethernet port, so its
//! packets take the connection's way. No such device, no RDMA.

use std::io;
use std::sync::Arc;

use smc::wire::smcr::{Gid, Mtu};

use crate::device::{self, Device, Domain, GidEntry};

/// A device's only port that is looked at: Ethernet devices have one each.
const PORT: u8 = 1;

/// A device, open.
#[derive(Clone, Debug)]
pub struct Nic {
    /// The device.
    pub device: Arc<Device>,
    /// What its queue pairs and memory belong to.
    pub domain: Arc<Domain>,
    /// Its GIDs.
    gids: Vec<GidEntry>,
}

/// Where on a device a queue pair begins.
#[derive(Clone, Debug)]
pub struct Place {
    /// The device.
    pub nic: Nic,
    /// Its port.
    pub port: u8,
    /// The address.
    pub gid: GidEntry,
    /// What a packet can carry.
    pub mtu: Mtu,
}

/// All devices that can be opened.
pub fn all() -> Vec<Nic> {
    device::names().unwrap_or_default().iter().filter_map(|n| open(n).ok()).collect()
}

fn open(name: &str) -> io::Result<Nic> {
    let device = Device::open(name)?;
    let domain = Domain::new(&device)?;
    let gids = device.gids(PORT)?;
    Ok(Nic { device, domain, gids })
}

/// The place for a connection of that address, by RoCE version 2.
pub fn place(nics: &[Nic], address: [u8; 16]) -> Option<Place> {
    nics.iter().find_map(|nic| {
        let gid = nic.gids.iter().find(|g| g.v2 && g.gid == Gid(address))?.clone();
        let mtu = nic.device.mtu(PORT).ok().flatten()?;
        Some(Place { nic: nic.clone(), port: PORT, gid, mtu })
    })
}
