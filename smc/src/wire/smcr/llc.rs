//! LLC (link layer control): what the ends of a link group say about its links and memory keys.
//!
//! ```text
//!            0             1          2           3       4       44
//!  version 1 | type        | 44       | 0: reason | flags | body  |
//!  version 2 | 2:4, type:4 | length (16 bits)     | flags | body  | more, up to 8192
//! ```
//!
//! RFC 7609 section 3.3 and appendix A.3; `net/smc/smc_llc.c`. Types 1 to 9; the flag 0x80 says *response*.
//!
//! The hard idea: Linux writes the version 2 length, and the number of keys in ADD LINK, in its own byte order. So
//! the length that counts is that of the SEND; what the field says must only be possible in one of both orders. Here
//! it is written little-endian, as most Linux hosts do.

use super::{Few, Gid, Mac, Mtu, Version};
use crate::wire::fields::{Fields, Put, Short};

/// Bytes of a version 1 message, and of the shortest of version 2.
pub const LEN: usize = 44;
/// Bytes of the longest.
pub const MAX_LEN: usize = 8192;

const CONFIRM_LINK: u8 = 1;
const ADD_LINK: u8 = 2;
const ADD_LINK_CONT: u8 = 3;
const DELETE_LINK: u8 = 4;
const REQUEST_ADD_LINK: u8 = 5;
const CONFIRM_RKEY: u8 = 6;
const TEST_LINK: u8 = 7;
const DELETE_RKEY: u8 = 9;

const RESPONSE: u8 = 0x80;
/// CONFIRM LINK: no eyecatcher in RMBEs. The kernel sets both bits and wants one.
const NO_EYECATCHER: u8 = 0x03;
const ADD_LINK_REJECT: u8 = 0x40;
const DELETE_LINK_ALL: u8 = 0x40;
const DELETE_LINK_ORDERLY: u8 = 0x20;
const RKEY_NEGATIVE: u8 = 0x20;
const RKEY_RETRY: u8 = 0x10;

/// A link's endpoint and name: the first message on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfirmLink {
    /// The sender's port.
    pub mac: Mac,
    /// The same.
    pub gid: Gid,
    /// The sender's queue pair.
    pub qpn: u32,
    /// The server's number for the link.
    pub link: u8,
    /// The sender's own name for it, for display.
    pub uid: u32,
    /// Links that the sender supports in a group.
    pub max_links: u8,
    /// Connections in a group (version 2, release 1).
    pub max_conns: u8,
    /// Payload begins at the start of an RMBE.
    pub no_eyecatcher: bool,
}

/// A memory key that is known on one link, and the same memory on a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewKey {
    /// Its key on the link that the message is sent on.
    pub on_this: u32,
    /// Its key on the new link.
    pub on_new: u32,
    /// Its address on the new link.
    pub addr: u64,
}

/// What version 2 adds to ADD LINK.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddLinkV2 {
    /// No gateway lies between the ports.
    pub direct: bool,
    /// Which of the client's ports the link is to end at.
    pub target: Gid,
    /// All memory keys.
    pub keys: Vec<NewKey>,
}

/// A new link is offered, or the offer is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddLink {
    /// The sender's port.
    pub mac: Mac,
    /// The same.
    pub gid: Gid,
    /// The sender's queue pair.
    pub qpn: u32,
    /// The server's number for the link.
    pub link: u8,
    /// The port's MTU; none: there is no link to offer.
    pub mtu: Option<Mtu>,
    /// First packet sequence number.
    pub psn: u32,
    /// A response that rejects, with its reason: 1, no alternate path.
    pub rejected: Option<u8>,
    /// Version 2.
    pub v2: Option<AddLinkV2>,
}

/// Why a link is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeleteReason(pub u32);

impl DeleteReason {
    /// The path was lost.
    pub const LOST_PATH: Self = Self(0x0001_0000);
    /// An operator said so.
    pub const OPERATOR: Self = Self(0x0002_0000);
    /// The program ended, or nobody uses the group any more.
    pub const PROGRAM: Self = Self(0x0003_0000);
    /// The peer broke the rules.
    pub const VIOLATION: Self = Self(0x0004_0000);
    /// An asymmetric link is not needed any more.
    pub const ASYMMETRIC: Self = Self(0x0005_0000);
    /// Response: that link is not known.
    pub const UNKNOWN_LINK: Self = Self(0x0010_0000);
}

/// A link goes, or all do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteLink {
    /// Which; 0 with `all`.
    pub link: u8,
    /// The group ends.
    pub all: bool,
    /// What is under way is finished first.
    pub orderly: bool,
    /// Why.
    pub reason: DeleteReason,
}

/// A memory key on one link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkKey {
    /// The link.
    pub link: u8,
    /// The key.
    pub rkey: u32,
    /// The address there.
    pub addr: u64,
}

/// How a request about memory keys was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RkeyAnswer {
    /// Done. (In a request: nothing.)
    #[default]
    Done,
    /// Refused.
    Negative,
    /// Refused for now.
    Retry,
}

/// A new receive buffer may be written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfirmRkey {
    /// Its key on the link that the message is sent on.
    pub rkey: u32,
    /// Its address there.
    pub addr: u64,
    /// Its keys on the other links.
    pub others: Few<LinkKey, 2>,
    /// Of a response.
    pub answer: RkeyAnswer,
}

/// Receive buffers that may not be written to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteRkey {
    /// Their keys on the link that the message is sent on: 8 in version 1, 255 in version 2.
    pub keys: Vec<u32>,
    /// Of a response: not all were known.
    pub negative: bool,
    /// Which: version 1 a mask, 0x80 the first; version 2 their number.
    pub unknown: u8,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Type 1.
    ConfirmLink(ConfirmLink),
    /// Type 2.
    AddLink(AddLink),
    /// Type 3, version 1 only: the memory keys of an ADD LINK.
    AddLinkCont {
        /// The new link.
        link: u8,
        /// Keys that the sender has yet to tell, these included.
        remaining: u8,
        /// As many of these as `remaining` says.
        keys: [NewKey; 2],
    },
    /// Type 4.
    DeleteLink(DeleteLink),
    /// Type 5, version 2 only: the client would like another link.
    RequestAddLink {
        /// Its ports.
        gids: Vec<Gid>,
    },
    /// Type 6.
    ConfirmRkey(ConfirmRkey),
    /// Type 7: is the link alive? The response repeats what was sent.
    TestLink([u8; 16]),
    /// Type 9.
    DeleteRkey(DeleteRkey),
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Llc {
    /// The link group's.
    pub version: Version,
    /// Answers the peer's message of the same type.
    pub response: bool,
    /// What it says.
    pub body: Body,
}

/// Bytes that no correct peer sends. Any of them ends the link group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Fewer bytes than it takes, or a length that can't be.
    Length,
    /// The type is not known in this version.
    Type,
    /// No version of SMC.
    Version,
    /// More of something than there may be.
    Count,
    /// A field has a value outside its range.
    Field,
}

impl From<Short> for Malformed {
    fn from(_: Short) -> Self {
        Self::Length
    }
}

impl Llc {
    fn kind(&self) -> u8 {
        match self.body {
            Body::ConfirmLink(_) => CONFIRM_LINK,
            Body::AddLink(_) => ADD_LINK,
            Body::AddLinkCont { .. } => ADD_LINK_CONT,
            Body::DeleteLink(_) => DELETE_LINK,
            Body::RequestAddLink { .. } => REQUEST_ADD_LINK,
            Body::ConfirmRkey(_) => CONFIRM_RKEY,
            Body::TestLink(_) => TEST_LINK,
            Body::DeleteRkey(_) => DELETE_RKEY,
        }
    }

    /// The flags without 0x80, and the lower half of byte 2 of version 1.
    fn flags(&self) -> (u8, u8) {
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        match &self.body {
            Body::ConfirmLink(c) => (flag(c.no_eyecatcher, NO_EYECATCHER), 0),
            Body::AddLink(a) => (flag(a.rejected.is_some(), ADD_LINK_REJECT), a.rejected.unwrap_or(0) & 15),
            Body::DeleteLink(d) => (flag(d.all, DELETE_LINK_ALL) | flag(d.orderly, DELETE_LINK_ORDERLY), 0),
            Body::ConfirmRkey(c) => match c.answer {
                RkeyAnswer::Done => (0, 0),
                RkeyAnswer::Negative => (RKEY_NEGATIVE, 0),
                RkeyAnswer::Retry => (RKEY_NEGATIVE | RKEY_RETRY, 0),
            },
            Body::DeleteRkey(d) => (flag(d.negative, RKEY_NEGATIVE), 0),
            Body::AddLinkCont { .. } | Body::RequestAddLink { .. } | Body::TestLink(_) => (0, 0),
        }
    }

    /// The message as bytes. Keys and ports beyond what the version has room for are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(LEN);
        let (flags, low) = self.flags();
        let flags = flags | if self.response { RESPONSE } else { 0 };
        match self.version {
            Version::V1 => out.put(&[self.kind(), LEN as u8, low, flags]),
            // The length is known at the end.
            Version::V2 => out.put(&[0x20 | self.kind(), 0, 0, flags]),
        }
        self.put_body(&mut out);
        out.zeros(LEN.saturating_sub(out.len()));
        if self.version == Version::V2 {
            let len = (out.len() as u16).to_le_bytes();
            if let Some(field) = out.get_mut(1..3) {
                field.copy_from_slice(&len);
            }
        }
        out
    }

    fn put_body(&self, out: &mut Vec<u8>) {
        match &self.body {
            Body::ConfirmLink(c) => {
                out.put(&c.mac.0);
                out.put(&c.gid.0);
                out.put_u24(c.qpn);
                out.put(&[c.link]);
                out.put_u32(c.uid);
                out.put(&[c.max_links, c.max_conns]);
            }
            Body::AddLink(a) => {
                out.put(&a.mac.0);
                // The reason of a version 2 rejection has no place in the header.
                out.zeros(2);
                out.put(&a.gid.0);
                out.put_u24(a.qpn);
                out.put(&[a.link, a.mtu.map_or(0, |m| m as u8)]);
                out.put_u24(a.psn);
                out.zeros(8);
                if let (Version::V2, Some(v2)) = (self.version, &a.v2) {
                    let keys = v2.keys.iter().take(255);
                    out.put(&[u8::from(v2.direct) << 7, 0]);
                    out.put(&v2.target.0);
                    out.zeros(8);
                    out.put(&(keys.len() as u16).to_le_bytes());
                    keys.for_each(|k| put_key(out, k));
                }
            }
            Body::AddLinkCont { link, remaining, keys } => {
                out.put(&[*link, *remaining, 0, 0]);
                keys.iter().for_each(|k| put_key(out, k));
            }
            Body::DeleteLink(d) => {
                out.put(&[d.link]);
                out.put_u32(d.reason.0);
            }
            Body::RequestAddLink { gids } => {
                let gids = gids.iter().take(255);
                out.zeros(20);
                out.put(&[gids.len() as u8, 0, 0, 0]);
                gids.for_each(|g| out.put(&g.0));
            }
            Body::ConfirmRkey(c) => {
                out.put(&[c.others.len() as u8]);
                out.put_u32(c.rkey);
                out.put_u64(c.addr);
                for k in c.others.iter() {
                    out.put(&[k.link]);
                    out.put_u32(k.rkey);
                    out.put_u64(k.addr);
                }
            }
            Body::TestLink(data) => out.put(data),
            Body::DeleteRkey(d) => {
                let keys = d.keys.iter().take(if self.version == Version::V1 { 8 } else { 255 });
                out.put(&[keys.len() as u8, d.unknown, 0, 0]);
                keys.for_each(|k| out.put_u32(*k));
            }
        }
    }

    /// The message in what a SEND brought.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() < LEN || bytes.len() > MAX_LEN {
            return Err(Malformed::Length);
        }
        let mut f = Fields(bytes);
        let [kind, len, low, flags] = f.take()?;
        let version = match kind >> 4 {
            0 => Version::V1,
            2 => Version::V2,
            _ => return Err(Malformed::Version),
        };
        let possible = match version {
            Version::V1 => usize::from(len) == LEN,
            Version::V2 => [u16::from_be_bytes([len, low]), u16::from_le_bytes([len, low])]
                .iter()
                .any(|l| (LEN..=MAX_LEN).contains(&usize::from(*l))),
        };
        let body = body(&mut f, version, kind & 15, flags, low & 15)?;
        if !possible {
            return Err(Malformed::Length);
        }
        Ok(Self { version, response: flags & RESPONSE != 0, body })
    }
}

fn put_key(out: &mut Vec<u8>, k: &NewKey) {
    out.put_u32(k.on_this);
    out.put_u32(k.on_new);
    out.put_u64(k.addr);
}

fn key(f: &mut Fields<'_>) -> Result<NewKey, Short> {
    Ok(NewKey { on_this: f.u32()?, on_new: f.u32()?, addr: f.u64()? })
}

fn body(f: &mut Fields<'_>, version: Version, kind: u8, flags: u8, low: u8) -> Result<Body, Malformed> {
    let v2 = version == Version::V2;
    Ok(match kind {
        CONFIRM_LINK => Body::ConfirmLink(ConfirmLink {
            mac: Mac(f.take()?),
            gid: Gid(f.take()?),
            qpn: f.u24()?,
            link: f.u8()?,
            uid: f.u32()?,
            max_links: f.u8()?,
            max_conns: f.u8()?,
            no_eyecatcher: flags & NO_EYECATCHER != 0,
        }),
        ADD_LINK => Body::AddLink(add_link(f, v2, flags, low)?),
        ADD_LINK_CONT if !v2 => {
            let [link, remaining, _, _] = f.take()?;
            Body::AddLinkCont { link, remaining, keys: [key(f)?, key(f)?] }
        }
        DELETE_LINK => Body::DeleteLink(DeleteLink {
            link: f.u8()?,
            all: flags & DELETE_LINK_ALL != 0,
            orderly: flags & DELETE_LINK_ORDERLY != 0,
            reason: DeleteReason(f.u32()?),
        }),
        REQUEST_ADD_LINK if v2 => {
            f.skip(20)?;
            let [count, ..] = f.take::<4>()?;
            let gids = (0..count).map(|_| f.take().map(Gid)).collect::<Result<_, _>>()?;
            Body::RequestAddLink { gids }
        }
        CONFIRM_RKEY => {
            let (count, rkey, addr) = (f.u8()?, f.u32()?, f.u64()?);
            if count > 2 {
                return Err(Malformed::Count);
            }
            let mut others = Few::new();
            for _ in 0..count {
                if !others.push(LinkKey { link: f.u8()?, rkey: f.u32()?, addr: f.u64()? }) {
                    return Err(Malformed::Count);
                }
            }
            let answer = match (flags & RKEY_NEGATIVE != 0, flags & RKEY_RETRY != 0) {
                (false, false) => RkeyAnswer::Done,
                (_, true) => RkeyAnswer::Retry,
                (true, false) => RkeyAnswer::Negative,
            };
            Body::ConfirmRkey(ConfirmRkey { rkey, addr, others, answer })
        }
        TEST_LINK => Body::TestLink(f.take()?),
        DELETE_RKEY => {
            let [count, unknown, _, _] = f.take()?;
            if !v2 && count > 8 {
                return Err(Malformed::Count);
            }
            let keys = (0..count).map(|_| f.u32()).collect::<Result<_, _>>()?;
            Body::DeleteRkey(DeleteRkey { keys, negative: flags & RKEY_NEGATIVE != 0, unknown })
        }
        _ => return Err(Malformed::Type),
    })
}

fn add_link(f: &mut Fields<'_>, is_v2: bool, flags: u8, low: u8) -> Result<AddLink, Malformed> {
    let mac = Mac(f.take()?);
    f.skip(2)?;
    let (gid, qpn, link, mtu, psn) = (Gid(f.take()?), f.u24()?, f.u8()?, f.u8()? & 15, f.u24()?);
    f.skip(8)?;
    let mtu = match mtu {
        0 => None,
        code => Some(Mtu::try_from(code).map_err(|_| Malformed::Field)?),
    };
    // Version 2 has no place for the reason but that of the length, where it can't be told from it.
    let rejected = (flags & ADD_LINK_REJECT != 0).then_some(if is_v2 { 0 } else { low });
    let v2 = if is_v2 && !f.0.is_empty() { Some(add_link_v2(f)?) } else { None };
    Ok(AddLink { mac, gid, qpn, link, mtu, psn, rejected, v2 })
}

fn add_link_v2(f: &mut Fields<'_>) -> Result<AddLinkV2, Malformed> {
    let [direct, _] = f.take()?;
    let target = Gid(f.take()?);
    f.skip(8)?;
    let count: [u8; 2] = f.take()?;
    let room = f.0.len() / 16;
    // In either byte order at most 255: one of both bytes is 0.
    let count = match (u16::from_le_bytes(count), u16::from_be_bytes(count)) {
        (n, _) if n <= 255 => usize::from(n),
        (_, n) if n <= 255 => usize::from(n),
        _ => return Err(Malformed::Count),
    };
    if count > room {
        return Err(Malformed::Length);
    }
    let keys = (0..count).map(|_| key(f)).collect::<Result<_, _>>()?;
    Ok(AddLinkV2 { direct: direct & 0x80 != 0, target, keys })
}
