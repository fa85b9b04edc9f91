//! CLC (connection layer control) of SMC-R: Proposal, Accept, Confirm, Decline, at the start of the TCP stream.
//!
//! ```text
//!  0        4     5        7           8              length-4     length
//!  | E2D4C3D9 | type | length | version, types | body ... | E2D4C3D9 |
//! ```
//!
//! Byte 7 is `version:4, typev2:2, typev1:2`. In Accept and Confirm the upper bit of typev2 says *first contact*,
//! in a Decline *out of sync*. RFC 7609 section 3.2 and appendix A.2; `net/smc/smc_clc.h`.
//!
//! The hard idea is that of [`crate::wire::clc`]: the byte after a message may be the program's own, after a
//! Decline, so a reader must never take one too many. [`decode`] says exactly how many it wants next.
//!
//! SMC-D is offered by a kernel in the same Proposal and therefore understood there; an Accept or Confirm for it is
//! [`Malformed::Mode`], since it is never proposed from here.

use super::{Diagnosis, Eid, Few, Gid, Mac, Mtu, PeerId, RmbeSize, Version};
use crate::wire::fields::{Fields, Put, Short};

/// First and last four bytes of each message: "SMCR" in EBCDIC.
pub const EYECATCHER: [u8; 4] = [0xe2, 0xd4, 0xc3, 0xd9];
/// "SMCD": what a message about SMC-D begins and may end with.
pub const EYECATCHER_D: [u8; 4] = [0xe2, 0xd4, 0xc3, 0xc4];
/// Bytes of the header.
pub const HEADER_LEN: usize = 8;
/// Longest message that is accepted: the longest Proposal has 652 bytes, and messages may grow.
pub const MAX_LEN: usize = 2048;
const TRAILER_LEN: usize = 4;

const PROPOSAL: u8 = 1;
const ACCEPT: u8 = 2;
const CONFIRM: u8 = 3;
const DECLINE: u8 = 4;

/// Byte 7 of an Accept or Confirm: first contact. Byte 7 of a Decline: out of sync.
const FLAG: u8 = 0x08;
/// Both type fields' code for "not at all".
const NEITHER: u8 = 2;
/// Bytes between the local block and the IP prefixes, if they are there: about SMC-D, version 1.
const AREA_LEN: usize = 40;
/// Bytes of that area behind the field that says where the version 2 extension is.
const AREA_REST: usize = 28;

/// Which kind of SMC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Media {
    /// By RDMA.
    #[default]
    R,
    /// By a device that maps memory.
    D,
    /// Either.
    Both,
}

impl Media {
    fn from_code(code: u8) -> Option<Self> {
        match code & 3 {
            0 => Some(Self::R),
            1 => Some(Self::D),
            3 => Some(Self::Both),
            _ => None,
        }
    }

    fn code(media: Option<Self>) -> u8 {
        match media {
            Some(Self::R) => 0,
            Some(Self::D) => 1,
            None => NEITHER,
            Some(Self::Both) => 3,
        }
    }

    fn has_d(self) -> bool {
        self != Self::R
    }
}

/// Who sends, and by which port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// The host.
    pub peer: PeerId,
    /// The port.
    pub gid: Gid,
    /// The same port's Ethernet address.
    pub mac: Mac,
}

/// An IPv6 subnet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Its address.
    pub addr: [u8; 16],
    /// Its length in bits.
    pub bits: u8,
}

/// The client's subnets: version 1 wants one in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subnets {
    /// The IPv4 subnet and its length in bits; zeros for a connection by IPv6.
    pub v4: ([u8; 4], u8),
    /// IPv6 subnets.
    pub v6: Few<Prefix, 8>,
}

/// What version 1 offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfferV1 {
    /// By what.
    pub media: Media,
    /// Subnets of the device that the connection leaves by.
    pub subnets: Subnets,
}

/// What version 1 says about SMC-D; a message of version 2 always has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmcdArea {
    /// The ISM device.
    pub gid: u64,
    /// Its channel.
    pub chid: u16,
}

/// An ISM device of an SMC-D version 2 offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ism {
    /// The device.
    pub gid: u64,
    /// Its channel.
    pub chid: u16,
}

/// What version 2 says about SMC-D.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmcdV2 {
    /// The system's EID.
    pub seid: Eid,
    /// Its devices.
    pub devices: Few<Ism, 8>,
}

/// What version 2 offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfferV2 {
    /// By what.
    pub media: Media,
    /// Highest release: 0 is version 2.0, 1 is 2.1. Four bits.
    pub release: u8,
    /// A system EID is sent.
    pub seid: bool,
    /// The port by RoCE v2.
    pub gid: Gid,
    /// Connections in a link group (release 1).
    pub max_conns: u8,
    /// Links in a link group (release 1).
    pub max_links: u8,
    /// Features, one bit each.
    pub features: u16,
    /// User EIDs.
    pub eids: Few<Eid, 8>,
    /// About SMC-D: there if and only if `media` has it.
    pub smcd: Option<SmcdV2>,
}

/// The client offers SMC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Of the message; one of version 2 may offer version 1 as well.
    pub version: Version,
    /// Who sends.
    pub local: Local,
    /// About SMC-D, version 1: always there in version 2.
    pub area: Option<SmcdArea>,
    /// The offer of version 1.
    pub v1: Option<OfferV1>,
    /// The offer of version 2: none in a message of version 1.
    pub v2: Option<OfferV2>,
}

/// What the ends learn about each other at first contact by version 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstContact {
    /// No gateway lies between the ports.
    pub direct: bool,
    /// Operating system: 1 z/OS, 2 Linux, 3 AIX. Four bits.
    pub os: u8,
    /// The release that is used. Four bits.
    pub release: u8,
    /// The host's name.
    pub host: [u8; 32],
    /// Connections in the link group (release 1).
    pub max_conns: u8,
    /// Links in the link group (release 1).
    pub max_links: u8,
    /// Features in common (release 1).
    pub features: u16,
    /// Vendor's options; libsmc's own mark is [`LIBSMC`].
    pub vendor: [u8; 4],
}

/// A vendor's options by which libsmc is known to libsmc.
pub const LIBSMC: [u8; 4] = *b"LSMC";

/// What version 2 adds to Accept and Confirm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartV2 {
    /// The EID in common.
    pub eid: Eid,
    /// There if and only if this is first contact.
    pub first: Option<FirstContact>,
    /// The client's ports, in a Confirm at first contact: where the server may look for a second path.
    pub gids: Few<Gid, 8>,
}

/// One end's link and receive buffer: the same in Accept and Confirm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// A link group is built; otherwise the link is one of an existing group's.
    pub first_contact: bool,
    /// Who sends.
    pub local: Local,
    /// Queue pair number, 24 bits.
    pub qpn: u32,
    /// Key of the RMB on the link of that queue pair.
    pub rkey: u32,
    /// Which RMBE of the RMB, from 1.
    pub rmbe: u8,
    /// The sender's alert token.
    pub token: u32,
    /// Size of the RMBE.
    pub size: RmbeSize,
    /// In an Accept the sender's MTU, in a Confirm the smaller of both.
    pub mtu: Mtu,
    /// Address of the RMB.
    pub rmb: u64,
    /// First packet sequence number, 24 bits.
    pub psn: u32,
    /// Version 2.
    pub v2: Option<PartV2>,
}

impl Endpoint {
    /// The message's version.
    #[must_use]
    pub fn version(&self) -> Version {
        if self.v2.is_some() { Version::V2 } else { Version::V1 }
    }
}

/// The sender stays on TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decline {
    /// Who sends.
    pub peer: PeerId,
    /// Why.
    pub diagnosis: Diagnosis,
    /// The receiver must drop the link group it named.
    pub out_of_sync: bool,
    /// Version 2: the operating system (four bits), and more words of diagnosis.
    pub v2: Option<(u8, [u32; 4])>,
}

/// One message.
// A Proposal is large and lives for a moment; a box would cost more than it saves.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Type 1.
    Proposal(Proposal),
    /// Type 2.
    Accept(Endpoint),
    /// Type 3.
    Confirm(Endpoint),
    /// Type 4.
    Decline(Decline),
}

/// What [`decode`] makes of the bytes so far.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Too few: call again with exactly this many, counted from the first.
    NeedTotal(usize),
    /// A message, and the bytes it took.
    Message(Message, usize),
}

/// Bytes that no correct peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The first or last four bytes are not an eyecatcher.
    Eyecatcher,
    /// The length is not one that this message can have.
    Length,
    /// The type is not known.
    Type,
    /// No version of SMC.
    Version,
    /// SMC-D where only SMC-R was offered, or nothing is offered at all.
    Mode,
    /// More of something than there may be.
    Count,
    /// An offset leads elsewhere than to the field.
    Offset,
    /// A field has a value outside its range.
    Field,
}

impl From<Short> for Malformed {
    fn from(_: Short) -> Self {
        Self::Length
    }
}

const LOCAL_LEN: usize = 30;
const PROPOSAL_LEAST: usize = HEADER_LEN + LOCAL_LEN + 2 + TRAILER_LEN;
const ENDPOINT_V1_LEN: usize = 68;
const ENDPOINT_V2_LEAST: usize = 108;
const DECLINE_V1_LEN: usize = 28;
const DECLINE_V2_LEN: usize = 44;

fn put_local(out: &mut Vec<u8>, l: &Local) {
    out.put(&l.peer.0);
    out.put(&l.gid.0);
    out.put(&l.mac.0);
}

/// The message as bytes.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let flag = |on: bool| if on { FLAG } else { 0 };
    let (kind, low) = match message {
        Message::Proposal(p) => {
            let of_v2 = match p.version {
                Version::V1 => 0,
                Version::V2 => (p.version as u8) << 4 | Media::code(p.v2.map(|o| o.media)) << 2,
            };
            let version = (p.version as u8) << 4;
            (PROPOSAL, version | of_v2 | Media::code(p.v1.map(|o| o.media)))
        }
        Message::Accept(e) => (ACCEPT, (e.version() as u8) << 4 | flag(e.first_contact)),
        Message::Confirm(e) => (CONFIRM, (e.version() as u8) << 4 | flag(e.first_contact)),
        Message::Decline(d) => {
            let version = if d.v2.is_some() { Version::V2 } else { Version::V1 };
            (DECLINE, (version as u8) << 4 | flag(d.out_of_sync))
        }
    };
    let mut out = Vec::with_capacity(128);
    out.put(&EYECATCHER);
    out.put(&[kind, 0, 0, low]);
    match message {
        Message::Proposal(p) => put_proposal(&mut out, p),
        Message::Accept(e) => put_endpoint(&mut out, e, false),
        Message::Confirm(e) => put_endpoint(&mut out, e, true),
        Message::Decline(d) => {
            out.put(&d.peer.0);
            out.put_u32(d.diagnosis.0);
            let (os, more) = d.v2.unwrap_or_default();
            out.put(&[os << 4, 0, 0, 0]);
            if d.v2.is_some() {
                more.iter().for_each(|w| out.put_u32(*w));
            }
        }
    }
    out.put(&EYECATCHER);
    // The longest has 652 bytes.
    let len = (out.len() as u16).to_be_bytes();
    if let Some(field) = out.get_mut(5..7) {
        field.copy_from_slice(&len);
    }
    out
}

fn put_proposal(out: &mut Vec<u8>, p: &Proposal) {
    put_local(out, &p.local);
    let (area, v2) = match p.version {
        Version::V1 => (p.area, None),
        Version::V2 => (Some(p.area.unwrap_or_default()), p.v2),
    };
    // As Linux has it: without subnets there is nothing to lead to.
    out.put_u16(if area.is_some() && p.v1.is_some() { AREA_LEN as u16 } else { 0 });
    let subnets_len = p.v1.map_or(0, |o| 8 + 17 * o.subnets.v6.len());
    if let Some(area) = area {
        out.put_u64(area.gid);
        out.put_u16(area.chid);
        out.put_u16(if v2.is_some() { (AREA_REST + subnets_len) as u16 } else { 0 });
        out.zeros(AREA_REST);
    }
    if let Some(OfferV1 { subnets, .. }) = p.v1 {
        out.put(&subnets.v4.0);
        out.put(&[subnets.v4.1, 0, 0, subnets.v6.len() as u8]);
        for prefix in subnets.v6.iter() {
            out.put(&prefix.addr);
            out.put(&[prefix.bits]);
        }
    }
    if let Some(o) = v2 {
        let smcd = o.media.has_d().then(|| o.smcd.unwrap_or_default());
        let devices = smcd.map_or(0, |s| s.devices.len());
        out.put(&[o.eids.len() as u8, devices as u8, 0, (o.release & 15) << 4 | u8::from(o.seid), 0, 0]);
        out.put_u16(if smcd.is_some() { (32 + Eid::LEN * o.eids.len()) as u16 } else { 0 });
        out.put(&o.gid.0);
        out.put(&[o.max_conns, o.max_links]);
        out.put_u16(o.features);
        out.zeros(12);
        o.eids.iter().for_each(|e| out.put(&e.0));
        if let Some(s) = smcd {
            out.put(&s.seid.0);
            out.zeros(16);
            for d in s.devices.iter() {
                out.put_u64(d.gid);
                out.put_u16(d.chid);
            }
        }
    }
}

fn put_endpoint(out: &mut Vec<u8>, e: &Endpoint, confirm: bool) {
    put_local(out, &e.local);
    out.put_u24(e.qpn);
    out.put_u32(e.rkey);
    out.put(&[e.rmbe]);
    out.put_u32(e.token);
    out.put(&[e.size.code() << 4 | e.mtu as u8, 0]);
    out.put_u64(e.rmb);
    out.put(&[0]);
    out.put_u24(e.psn);
    let Some(v2) = e.v2 else { return };
    out.put(&v2.eid.0);
    out.zeros(8);
    if e.first_contact {
        let first = v2.first.unwrap_or_default();
        out.put(&[u8::from(first.direct) << 7, (first.os & 15) << 4 | first.release & 15, 0, 0]);
        out.put(&first.host);
        out.put(&[first.max_conns, first.max_links]);
        out.put_u16(first.features);
        out.put(&first.vendor);
        out.zeros(8);
        if confirm {
            out.put(&[v2.gids.len() as u8, 0, 0, 0]);
            v2.gids.iter().for_each(|g| out.put(&g.0));
        }
    }
}

fn is_eyecatcher(bytes: &[u8]) -> bool {
    bytes == EYECATCHER || bytes == EYECATCHER_D
}

/// The message at the start of `bytes`, or how many bytes it takes to say more.
///
/// `bytes` may hold more than one message; what is beyond the first is not looked at.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Malformed> {
    // Both begin with the same three bytes.
    let seen = bytes.len().min(EYECATCHER.len() - 1);
    if bytes.get(..seen) != EYECATCHER.get(..seen)
        || bytes.len() > 3 && !bytes.get(..4).is_some_and(is_eyecatcher)
    {
        return Err(Malformed::Eyecatcher);
    }
    let Some(&[_, _, _, _, kind, hi, lo, low]) = bytes.first_chunk::<HEADER_LEN>() else {
        return Ok(Decoded::NeedTotal(HEADER_LEN));
    };
    let version = match low >> 4 {
        0 => return Err(Malformed::Version),
        1 => Version::V1,
        // A client may know later ones; what it sends begins as version 2 does.
        2 => Version::V2,
        _ if kind == PROPOSAL || kind == DECLINE => Version::V2,
        _ => return Err(Malformed::Version),
    };
    let len = usize::from(u16::from_be_bytes([hi, lo]));
    let fits = len <= MAX_LEN
        && match (kind, version) {
            (PROPOSAL, _) => len >= PROPOSAL_LEAST,
            (ACCEPT | CONFIRM, Version::V1) => len == ENDPOINT_V1_LEN,
            (ACCEPT | CONFIRM, Version::V2) => len >= ENDPOINT_V2_LEAST,
            (DECLINE, _) => len == DECLINE_V1_LEN || len == DECLINE_V2_LEN,
            _ => return Err(Malformed::Type),
        };
    if matches!(kind, ACCEPT | CONFIRM) && (low & 3 != 0 || bytes.get(..4) != Some(&EYECATCHER)) {
        return Err(Malformed::Mode);
    }
    if !fits {
        return Err(Malformed::Length);
    }
    let Some(message) = bytes.get(..len) else { return Ok(Decoded::NeedTotal(len)) };
    let Some((body, trailer)) = message.split_last_chunk::<TRAILER_LEN>() else {
        return Err(Malformed::Length);
    };
    // As Linux has it: the trailer of a Decline is not looked at.
    if kind != DECLINE && !is_eyecatcher(trailer) {
        return Err(Malformed::Eyecatcher);
    }
    let mut f = Fields(body.get(HEADER_LEN..).unwrap_or_default());
    let message = match kind {
        PROPOSAL => Message::Proposal(proposal(&mut f, version, low)?),
        ACCEPT => Message::Accept(endpoint(&mut f, version, low & FLAG != 0, false)?),
        CONFIRM => Message::Confirm(endpoint(&mut f, version, low & FLAG != 0, true)?),
        _ => Message::Decline(decline(&mut f, len, low & FLAG != 0)?),
    };
    Ok(Decoded::Message(message, len))
}

fn local(f: &mut Fields<'_>) -> Result<Local, Malformed> {
    Ok(Local { peer: PeerId(f.take()?), gid: Gid(f.take()?), mac: Mac(f.take()?) })
}

/// `count` things.
fn few<T: Copy + Default, const N: usize>(
    f: &mut Fields<'_>,
    count: u8,
    one: impl Fn(&mut Fields<'_>) -> Result<T, Malformed>,
) -> Result<Few<T, N>, Malformed> {
    let mut out = Few::new();
    for _ in 0..count {
        if !out.push(one(f)?) {
            return Err(Malformed::Count);
        }
    }
    Ok(out)
}

fn proposal(f: &mut Fields<'_>, version: Version, low: u8) -> Result<Proposal, Malformed> {
    let local = local(f)?;
    let v1_media = Media::from_code(low);
    let v2_media = if version == Version::V2 { Media::from_code(low >> 2) } else { None };
    if v1_media.is_none() && v2_media.is_none() {
        return Err(Malformed::Mode);
    }
    let mut ext_offset = 0;
    let area = match (usize::from(f.u16()?), version) {
        (0, Version::V1) => None,
        (0, Version::V2) if v1_media.is_some() => return Err(Malformed::Offset),
        (0 | AREA_LEN, _) => {
            let area = SmcdArea { gid: f.u64()?, chid: f.u16()? };
            ext_offset = usize::from(f.u16()?);
            f.skip(AREA_REST)?;
            Some(area)
        }
        _ => return Err(Malformed::Offset),
    };
    let v1 = match v1_media {
        Some(media) => Some(OfferV1 { media, subnets: subnets(f)? }),
        None => None,
    };
    let v2 = match v2_media {
        Some(media) => {
            let subnets_len = v1.map_or(0, |o: OfferV1| 8 + 17 * o.subnets.v6.len());
            if ext_offset != AREA_REST + subnets_len {
                return Err(Malformed::Offset);
            }
            Some(offer_v2(f, media)?)
        }
        None => None,
    };
    // The length is the sum of the parts, as Linux has it.
    if !f.0.is_empty() {
        return Err(Malformed::Length);
    }
    Ok(Proposal { version, local, area, v1, v2 })
}

fn subnets(f: &mut Fields<'_>) -> Result<Subnets, Malformed> {
    let v4 = (f.take()?, f.u8()?);
    f.skip(2)?;
    let count = f.u8()?;
    Ok(Subnets { v4, v6: few(f, count, |f| Ok(Prefix { addr: f.take()?, bits: f.u8()? }))? })
}

fn offer_v2(f: &mut Fields<'_>, media: Media) -> Result<OfferV2, Malformed> {
    let [eids, devices, _, flags] = f.take()?;
    f.skip(4)?;
    let (gid, max_conns, max_links, features) = (Gid(f.take()?), f.u8()?, f.u8()?, f.u16()?);
    f.skip(12)?;
    let eids = few(f, eids, |f| Ok(Eid(f.take()?)))?;
    let smcd = if media.has_d() {
        let seid = Eid(f.take()?);
        f.skip(16)?;
        Some(SmcdV2 { seid, devices: few(f, devices, |f| Ok(Ism { gid: f.u64()?, chid: f.u16()? }))? })
    } else {
        None
    };
    let (release, seid) = (flags >> 4, flags & 1 != 0);
    Ok(OfferV2 { media, release, seid, gid, max_conns, max_links, features, eids, smcd })
}

fn endpoint(f: &mut Fields<'_>, version: Version, first: bool, confirm: bool) -> Result<Endpoint, Malformed> {
    let (local, qpn, rkey, rmbe, token) = (local(f)?, f.u24()?, f.u32()?, f.u8()?, f.u32()?);
    let [size_mtu, _] = f.take()?;
    let rmb = f.u64()?;
    f.skip(1)?;
    let psn = f.u24()?;
    let size = RmbeSize::from_code(size_mtu >> 4).ok_or(Malformed::Field)?;
    let mtu = Mtu::try_from(size_mtu & 15).map_err(|_| Malformed::Field)?;
    if rmbe == 0 {
        return Err(Malformed::Field);
    }
    let v2 = if version == Version::V2 { Some(part_v2(f, first, confirm)?) } else { None };
    Ok(Endpoint { first_contact: first, local, qpn, rkey, rmbe, token, size, mtu, rmb, psn, v2 })
}

fn part_v2(f: &mut Fields<'_>, first: bool, confirm: bool) -> Result<PartV2, Malformed> {
    let eid = Eid(f.take()?);
    f.skip(8)?;
    if !first {
        return Ok(PartV2 { eid, first: None, gids: Few::new() });
    }
    let [direct, os_release, _, _] = f.take()?;
    let host = f.take()?;
    let [max_conns, max_links] = f.take()?;
    let features = f.u16()?;
    let vendor = f.take()?;
    f.skip(8)?;
    let (direct, os, release) = (direct & 0x80 != 0, os_release >> 4, os_release & 15);
    let first = FirstContact { direct, os, release, host, max_conns, max_links, features, vendor };
    let gids = if confirm {
        let [count, ..] = f.take::<4>()?;
        few(f, count, |f| Ok(Gid(f.take()?)))?
    } else {
        Few::new()
    };
    Ok(PartV2 { eid, first: Some(first), gids })
}

fn decline(f: &mut Fields<'_>, len: usize, out_of_sync: bool) -> Result<Decline, Malformed> {
    let (peer, diagnosis) = (PeerId(f.take()?), Diagnosis(f.u32()?));
    let [os, ..] = f.take::<4>()?;
    let v2 =
        if len == DECLINE_V2_LEN { Some((os >> 4, [f.u32()?, f.u32()?, f.u32()?, f.u32()?])) } else { None };
    Ok(Decline { peer, diagnosis, out_of_sync, v2 })
}
