//! What the tests with a device need to know: two ends that reach each other.
//!
//! From the environment: `SMC_TEST_RDMA` is "DEVICE ADDRESS DEVICE ADDRESS", ours and the other end's (`cargo xtask vm`
//! sets it). The tests are ignored where there is none.
#![allow(dead_code)]

use std::net::Ipv4Addr;
use std::sync::Arc;

use smc::wire::smcr::Gid;
use smc_rdma::device::{Device, GidEntry};

/// One end.
pub struct End {
    pub device: Arc<Device>,
    pub gid: GidEntry,
    pub address: Ipv4Addr,
}

/// Ours, and the other.
pub fn ends() -> [End; 2] {
    let told = std::env::var("SMC_TEST_RDMA").expect("SMC_TEST_RDMA: run this by `cargo xtask vm`");
    let words: Vec<_> = told.split_whitespace().collect();
    let end = |i: usize| {
        let (device, address): (_, Ipv4Addr) = (words[2 * i], words[2 * i + 1].parse().unwrap());
        let device = Device::open(device).unwrap();
        let mapped = Gid(address.to_ipv6_mapped().octets());
        let gids = device.gids(1).unwrap();
        let gid = gids.iter().find(|g| g.v2 && g.gid == mapped).cloned();
        End { gid: gid.unwrap_or_else(|| panic!("{address} is none of {gids:?}")), device, address }
    };
    [end(0), end(1)]
}

/// A stream of bytes of which each depends on its place.
pub fn fill(at: u64, bytes: &mut [u8]) {
    for (i, b) in bytes.iter_mut().enumerate() {
        *b = ((at + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

/// Whether these are the stream's bytes at that place.
pub fn is_filled(at: u64, bytes: &[u8]) -> bool {
    let mut want = vec![0; bytes.len()];
    fill(at, &mut want);
    want == bytes
}
