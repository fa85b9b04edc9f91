//! Messages of SMC-R as RFC 7609 (appendix A) and Linux `net/smc` have them: what goes to another host.
//!
//! | module | messages | travels |
//! | --- | --- | --- |
//! | [`clc`] | Proposal, Accept, Confirm, Decline | at the start of the TCP stream |
//! | [`llc`] | links and memory keys of a link group | SEND on a link's queue pair |
//! | [`cdc`] | cursors and flags of one connection | the same |
//!
//! Numbers are big-endian; the bit 0x80 is the first on the wire. Where the RFC and Linux differ, Linux decides:
//! the peer may be its AF_SMC. CLC and LLC are version 1 or 2 (IBM's SMC version 2 specification, as the kernel has
//! it); CDC is the same in both.

pub mod cdc;
#[cfg(test)]
mod cdc_tests;
pub mod clc;
#[cfg(test)]
mod clc_tests;
pub mod diagnosis;
pub mod few;
pub mod llc;
#[cfg(test)]
mod llc_tests;

pub use diagnosis::Diagnosis;
pub use few::Few;

/// Who the peer is: two random bytes and a MAC address, the same for all of a host's links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerId(pub [u8; 8]);

/// Address of a port (RoCE v2: an IPv6 address, or a mapped IPv4 one).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Gid(pub [u8; 16]);

/// Ethernet address of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

/// Enterprise ID: 32 characters, padded with blanks; who has one in common may use version 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Eid(pub [u8; Eid::LEN]);

impl Eid {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// A user's EID: upper-case letters, digits, `.` and `-`, beginning with a letter or digit.
    #[must_use]
    pub fn user(name: &str) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit();
        let fits = name.bytes().next().is_some_and(plain)
            && name.len() <= Self::LEN
            && name.bytes().all(|b| plain(b) || b == b'.' || b == b'-');
        fits.then(|| {
            let mut eid = [b' '; Self::LEN];
            eid.iter_mut().zip(name.bytes()).for_each(|(to, b)| *to = b);
            Self(eid)
        })
    }
}

/// Which form of a message: both are in use, RoCE v2 needs the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// RFC 7609.
    V1 = 1,
    /// SMC version 2.
    V2 = 2,
}

/// Path MTU as InfiniBand numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mtu {
    /// 256 bytes.
    B256 = 1,
    /// 512 bytes.
    B512,
    /// 1024 bytes.
    B1024,
    /// 2048 bytes.
    B2048,
    /// 4096 bytes.
    B4096,
}

impl TryFrom<u8> for Mtu {
    type Error = u8;

    fn try_from(code: u8) -> Result<Self, u8> {
        Ok(match code {
            1 => Self::B256,
            2 => Self::B512,
            3 => Self::B1024,
            4 => Self::B2048,
            5 => Self::B4096,
            other => return Err(other),
        })
    }
}

/// Size of an RMBE: 16 KiB doubled so many times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RmbeSize(u8);

impl RmbeSize {
    /// The largest: 512 MiB.
    pub const MAX: Self = Self(15);

    /// From the code on the wire, four bits.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        (code <= Self::MAX.0).then_some(Self(code))
    }

    /// The smallest that holds so many bytes, or the largest there is.
    #[must_use]
    pub fn holding(bytes: u32) -> Self {
        (0..Self::MAX.0).map(Self).find(|s| s.bytes() >= bytes).unwrap_or(Self::MAX)
    }

    /// The code on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        self.0
    }

    /// Bytes in the ring.
    #[must_use]
    pub fn bytes(self) -> u32 {
        0x4000 << self.0
    }
}
