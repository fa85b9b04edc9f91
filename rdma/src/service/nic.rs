//! The devices of this host, and which of them a connection goes by.
//!
//! A TCP connection's own address tells: the device whose port has it as a GID sits on the same Ethernet port, so its
//! packets take the connection's way. No such device, no RDMA.
//!
//! A second link goes from another device to another address of the peer's, where the kernel's routes say that both are on
//! one network: none is tried through a router. A peer that has one of our own addresses is on this host; it gets none.

use std::io;
use std::net::Ipv4Addr;
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

/// All devices that can be opened. `SMC_TEST_DEVICES`, for tests: of these.
pub fn all() -> Vec<Nic> {
    let only = std::env::var("SMC_TEST_DEVICES").ok();
    let wanted = |name: &str| only.as_ref().is_none_or(|all| all.split(' ').any(|n| n == name));
    let names = device::names().unwrap_or_default();
    names.iter().filter(|n| wanted(n)).filter_map(|n| open(n).ok()).collect()
}

fn open(name: &str) -> io::Result<Nic> {
    let device = Device::open(name)?;
    let domain = Domain::new(&device)?;
    let gids = device.gids(PORT)?;
    Ok(Nic { device, domain, gids })
}

fn v4(gid: Gid) -> Option<Ipv4Addr> {
    std::net::Ipv6Addr::from(gid.0).to_ipv4_mapped()
}

impl Nic {
    /// Looks at its addresses once more.
    pub fn refresh(&mut self) {
        if let Ok(gids) = self.device.gids(PORT) {
            self.gids = gids;
        }
    }

    fn place(&self, gid: &GidEntry) -> Option<Place> {
        let mtu = self.device.mtu(PORT).ok().flatten()?;
        Some(Place { nic: self.clone(), port: PORT, gid: gid.clone(), mtu })
    }

    /// Its addresses, by RoCE version 2 and IPv4.
    fn addresses(&self) -> impl Iterator<Item = (&GidEntry, Ipv4Addr)> {
        self.gids.iter().filter(|g| g.v2).filter_map(|g| Some((g, v4(g.gid)?)))
    }

    fn has(&self, gid: &Gid) -> bool {
        self.gids.iter().any(|g| g.gid == *gid)
    }
}

/// The place for a connection of that address, by RoCE version 2.
pub fn place(nics: &[Nic], address: [u8; 16]) -> Option<Place> {
    nics.iter().find_map(|nic| nic.place(nic.gids.iter().find(|g| g.v2 && g.gid == Gid(address))?))
}

/// The addresses of devices other than that of `gid`, at which further links may end.
#[must_use]
pub fn others(nics: &[Nic], gid: &Gid) -> Vec<Gid> {
    let others = nics.iter().filter(|n| !n.has(gid));
    others.flat_map(Nic::addresses).map(|(g, _)| g.gid).collect()
}

/// The addresses of devices that have none of those, and whose ports are up.
#[must_use]
pub fn free(nics: &[Nic], used: &[Gid]) -> Vec<Gid> {
    let others = nics.iter().filter(|n| !used.iter().any(|u| n.has(u)));
    let up = others.filter(|n| n.device.mtu(PORT).ok().flatten().is_some());
    up.flat_map(Nic::addresses).map(|(g, _)| g.gid).collect()
}

/// A place on a device that has none of the addresses `used`, from which one of the peer's is to be reached; and that one.
pub fn another(nics: &[Nic], used: &[Gid], peers: &[Gid]) -> Option<(Place, Gid)> {
    if peers.iter().any(|p| nics.iter().any(|n| n.has(p))) {
        return None;
    }
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let others = nics.iter().filter(|n| !used.iter().any(|u| n.has(u)));
    let mut ways = others.flat_map(|n| n.addresses().map(move |(g, own)| (n, g, own)));
    ways.find_map(|(nic, gid, own)| {
        let reaches = |p: &&Gid| v4(**p).is_some_and(|to| on_one_network(&routes, &gid.netdev, own, to));
        let peer = peers.iter().find(reaches)?;
        Some((nic.place(gid)?, *peer))
    })
}

/// Whether a route of the device leads to both without a gateway. The lines of `/proc/net/route`: device, destination,
/// gateway, four numbers, mask; addresses as the host has their four bytes.
fn on_one_network(routes: &str, netdev: &str, own: Ipv4Addr, to: Ipv4Addr) -> bool {
    let bits = |a: Ipv4Addr| u32::from_ne_bytes(a.octets());
    routes.lines().any(|l| {
        let words: Vec<&str> = l.split_whitespace().collect();
        let number = |i: usize| words.get(i).and_then(|w| u32::from_str_radix(w, 16).ok());
        let (Some(net), Some(0), Some(mask)) = (number(1), number(2), number(7)) else { return false };
        words.first() == Some(&netdev) && mask != 0 && bits(own) & mask == net && bits(to) & mask == net
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_is_what_a_route_without_a_gateway_leads_to() {
        let hex = |a: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(a));
        let line = |dev: &str, net, gateway, mask| {
            format!("{dev}\t{}\t{}\t0001\t0\t0\t0\t{}\t0\t0\t0\n", hex(net), hex(gateway), hex(mask))
        };
        let routes = String::from("Iface\tDestination\tGateway\tFlags\n")
            + &line("eth1", [0; 4], [10, 0, 0, 254], [0; 4])
            + &line("eth1", [10, 0, 0, 0], [0; 4], [255, 255, 255, 0])
            + &line("eth2", [10, 0, 1, 0], [0; 4], [255, 255, 255, 0])
            + &line("eth1", [10, 9, 0, 0], [10, 0, 0, 254], [255, 255, 0, 0]);
        let own = Ipv4Addr::new(10, 0, 0, 1);
        let to = |dev, a: [u8; 4]| on_one_network(&routes, dev, own, a.into());
        assert!(to("eth1", [10, 0, 0, 7]));
        assert!(!to("eth1", [10, 0, 1, 7]) && !to("eth2", [10, 0, 0, 7]) && !to("eth1", [10, 9, 0, 1]));
    }
}
