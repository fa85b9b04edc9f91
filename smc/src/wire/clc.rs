//! CLC (connection layer control) messages of the same-host handshake: Proposal, Accept, Confirm, Decline.
//!
//! The shape is RFC 7609's (section 3.2, appendix A.2) and `net/smc/smc_clc.h`'s: an 8-byte header, a body, a
//! 4-byte trailer that repeats the eyecatcher, everything big-endian.
//!
//! ```text
//!  0        4     5        7          8              length-4     length
//!  | E2D4C3D9 | type | length | version/flags | body ... | E2D4C3D9 |
//! ```
//!
//! The bodies are ours: they name memory and sockets, not queue pairs. A message longer than this version
//! knows is read whole and its surplus ignored, as RFC 7609 has it; a shorter one is malformed.
//!
//! The hard idea: these messages travel on a byte stream whose *next* byte after the Confirm is a doorbell
//! ring, so a reader must never take one byte too many. [`decode`] therefore says exactly how many bytes it
//! wants next: first the header's, then the rest of this very message.

use crate::handshake::Side;

/// First and last four bytes of each message: "SMCR" in EBCDIC.
pub const EYECATCHER: [u8; 4] = [0xe2, 0xd4, 0xc3, 0xd9];
/// Bytes of the header.
pub const HEADER_LEN: usize = 8;
/// Longest message that is accepted; a hard bound on what a peer can make us hold.
pub const MAX_LEN: usize = 256;
const TRAILER_LEN: usize = 4;

/// Byte 7 of the header: version 1 in the upper half, SMC over memory (`SMC_TYPE_D`) in the lower.
const VERSION: u8 = 0x11;
/// Byte 7 of an Accept: first contact. Byte 7 of a Decline: out of sync.
const FLAG: u8 = 0x08;

const PROPOSAL: u8 = 1;
const ACCEPT: u8 = 2;
const CONFIRM: u8 = 3;
const DECLINE: u8 = 4;

/// Who sends: stated alike in Proposal, Accept and Confirm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Version of the shared page's layout, [`crate::mem::layout::LAYOUT_VERSION`].
    pub layout_version: u32,
    /// Which end of the TCP connection.
    pub role: Side,
    /// The sender's instance: random, one per process image.
    pub instance: u64,
    /// The sender's process id, for display; who may talk is `SO_PEERCRED`'s word.
    pub pid: u32,
    /// `SO_COOKIE` of the sender's end of the TCP connection.
    pub cookie: u64,
}

/// The connecting end offers SMC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Who sends.
    pub sender: Sender,
    /// Bytes wanted in each ring.
    pub ring_size: u32,
    /// Instance of the peer whose link group the sender has joined already; 0: none.
    pub known_instance: u64,
    /// The peer's number for that link group.
    pub known_lgr: u64,
    /// Bit n: the sender has segment n of that link group mapped.
    pub known_segments: u64,
}

/// The accepting end names the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Who sends.
    pub sender: Sender,
    /// The sender's number for the link group.
    pub lgr: u64,
    /// Which segment of the link group holds the buffers, 0..64.
    pub segment: u32,
    /// First contact with that segment: its memfd comes with this message.
    pub first_contact: bool,
    /// Bytes in the segment.
    pub segment_size: u64,
    /// Where the connection page lies in it.
    pub page: u64,
    /// Where the rings lie: index 0 carries what the connecting end sends, index 1 the rest.
    pub rings: [u64; 2],
    /// Bytes in each ring.
    pub ring_size: u32,
}

/// The connecting end has mapped the buffers. What follows on the socket is doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirm {
    /// Who sends.
    pub sender: Sender,
    /// The link group of the Accept.
    pub lgr: u64,
    /// The segment of the Accept.
    pub segment: u32,
}

/// The sender stays on TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decline {
    /// The sender's instance.
    pub instance: u64,
    /// Why: a [`crate::reason::Reason`] code.
    pub diagnosis: u32,
    /// The receiver must forget the link group it named.
    pub out_of_sync: bool,
}

/// One CLC message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Type 1.
    Proposal(Proposal),
    /// Type 2.
    Accept(Accept),
    /// Type 3.
    Confirm(Confirm),
    /// Type 4.
    Decline(Decline),
}

/// What [`decode`] makes of the bytes so far.
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
    /// The first or last four bytes are not the eyecatcher.
    Eyecatcher,
    /// The length is not one that this type can have.
    Length,
    /// The type is not known.
    Type,
    /// The version is not ours. (Not malformed as such: the answer is a Decline.)
    Version,
    /// A field has a value outside its range.
    Field,
}

const SENDER_LEN: usize = 28;
const PROPOSAL_LEN: usize = HEADER_LEN + SENDER_LEN + 28 + TRAILER_LEN;
const ACCEPT_LEN: usize = HEADER_LEN + SENDER_LEN + 48 + TRAILER_LEN;
const CONFIRM_LEN: usize = HEADER_LEN + SENDER_LEN + 12 + TRAILER_LEN;
const DECLINE_LEN: usize = HEADER_LEN + 16 + TRAILER_LEN;

/// An encoded message; at most [`MAX_LEN`] bytes, held without allocation.
#[derive(Clone, Copy, Debug)]
pub struct Encoded {
    bytes: [u8; MAX_LEN],
    len: usize,
}

impl Encoded {
    /// The bytes to send.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn put(&mut self, field: &[u8]) {
        let end = self.len + field.len();
        // Every message is a fixed sum of fields below MAX_LEN (asserted under `tests`), so this always holds.
        if let Some(to) = self.bytes.get_mut(self.len..end) {
            to.copy_from_slice(field);
            self.len = end;
        }
    }

    fn put_sender(&mut self, s: &Sender) {
        self.put(&s.layout_version.to_be_bytes());
        self.put(&[s.role as u8, 0, 0, 0]);
        self.put(&s.instance.to_be_bytes());
        self.put(&s.pid.to_be_bytes());
        self.put(&s.cookie.to_be_bytes());
    }
}

/// The message as bytes.
#[must_use]
pub fn encode(message: &Message) -> Encoded {
    let (kind, len, flag) = match message {
        Message::Proposal(_) => (PROPOSAL, PROPOSAL_LEN, false),
        Message::Accept(a) => (ACCEPT, ACCEPT_LEN, a.first_contact),
        Message::Confirm(_) => (CONFIRM, CONFIRM_LEN, false),
        Message::Decline(d) => (DECLINE, DECLINE_LEN, d.out_of_sync),
    };
    let mut out = Encoded { bytes: [0; MAX_LEN], len: 0 };
    out.put(&EYECATCHER);
    out.put(&[kind]);
    out.put(&(len as u16).to_be_bytes());
    out.put(&[VERSION | if flag { FLAG } else { 0 }]);
    match message {
        Message::Proposal(m) => {
            out.put_sender(&m.sender);
            out.put(&m.ring_size.to_be_bytes());
            out.put(&m.known_instance.to_be_bytes());
            out.put(&m.known_lgr.to_be_bytes());
            out.put(&m.known_segments.to_be_bytes());
        }
        Message::Accept(m) => {
            out.put_sender(&m.sender);
            out.put(&m.lgr.to_be_bytes());
            out.put(&m.segment.to_be_bytes());
            out.put(&m.ring_size.to_be_bytes());
            out.put(&m.segment_size.to_be_bytes());
            out.put(&m.page.to_be_bytes());
            out.put(&m.rings[0].to_be_bytes());
            out.put(&m.rings[1].to_be_bytes());
        }
        Message::Confirm(m) => {
            out.put_sender(&m.sender);
            out.put(&m.lgr.to_be_bytes());
            out.put(&m.segment.to_be_bytes());
        }
        Message::Decline(m) => {
            out.put(&m.instance.to_be_bytes());
            out.put(&m.diagnosis.to_be_bytes());
            out.put(&[0; 4]);
        }
    }
    out.put(&EYECATCHER);
    out
}

/// Takes fields off the front of a body whose length was checked before; a field that is not there reads as
/// `Malformed::Length` all the same.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed::Length)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_be_bytes)
    }

    fn sender(&mut self) -> Result<Sender, Malformed> {
        let layout_version = self.u32()?;
        let [role, ..] = self.take::<4>()?;
        let role = match role {
            0 => Side::Connect,
            1 => Side::Accept,
            _ => return Err(Malformed::Field),
        };
        Ok(Sender { layout_version, role, instance: self.u64()?, pid: self.u32()?, cookie: self.u64()? })
    }
}

/// The message at the start of `bytes`, or how many bytes it takes to say more.
///
/// `bytes` may hold more than one message; what is beyond the first is not looked at.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Malformed> {
    let seen = bytes.len().min(EYECATCHER.len());
    if bytes.get(..seen) != EYECATCHER.get(..seen) {
        return Err(Malformed::Eyecatcher);
    }
    let Some(&[_, _, _, _, kind, hi, lo, version]) = bytes.first_chunk::<HEADER_LEN>() else {
        return Ok(Decoded::NeedTotal(HEADER_LEN));
    };
    let least = match kind {
        PROPOSAL => PROPOSAL_LEN,
        ACCEPT => ACCEPT_LEN,
        CONFIRM => CONFIRM_LEN,
        DECLINE => DECLINE_LEN,
        _ => return Err(Malformed::Type),
    };
    let len = usize::from(u16::from_be_bytes([hi, lo]));
    if len < least || len > MAX_LEN {
        return Err(Malformed::Length);
    }
    if version & !FLAG != VERSION {
        return Err(Malformed::Version);
    }
    let Some(message) = bytes.get(..len) else { return Ok(Decoded::NeedTotal(len)) };
    let Some((body, trailer)) = message.split_last_chunk::<TRAILER_LEN>() else {
        return Err(Malformed::Length);
    };
    if *trailer != EYECATCHER {
        return Err(Malformed::Eyecatcher);
    }
    let body = Fields(body.get(HEADER_LEN..).unwrap_or_default());
    Ok(Decoded::Message(decode_body(kind, version & FLAG != 0, body)?, len))
}

fn decode_body(kind: u8, flag: bool, mut f: Fields<'_>) -> Result<Message, Malformed> {
    Ok(match kind {
        PROPOSAL => Message::Proposal(Proposal {
            sender: f.sender()?,
            ring_size: f.u32()?,
            known_instance: f.u64()?,
            known_lgr: f.u64()?,
            known_segments: f.u64()?,
        }),
        ACCEPT => {
            let (sender, lgr, segment, ring_size) = (f.sender()?, f.u64()?, f.u32()?, f.u32()?);
            if segment >= u64::BITS {
                return Err(Malformed::Field);
            }
            let (segment_size, page, rings) = (f.u64()?, f.u64()?, [f.u64()?, f.u64()?]);
            let first_contact = flag;
            Message::Accept(Accept {
                sender,
                lgr,
                segment,
                first_contact,
                segment_size,
                page,
                rings,
                ring_size,
            })
        }
        CONFIRM => Message::Confirm(Confirm { sender: f.sender()?, lgr: f.u64()?, segment: f.u32()? }),
        DECLINE => Message::Decline(Decline { instance: f.u64()?, diagnosis: f.u32()?, out_of_sync: flag }),
        _ => return Err(Malformed::Type),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SENDER: Sender = Sender {
        layout_version: 1,
        role: Side::Connect,
        instance: 0x1122_3344_5566_7788,
        pid: 0x0a0b_0c0d,
        cookie: 0x99,
    };

    fn role() -> impl Strategy<Value = Side> {
        prop_oneof![Just(Side::Connect), Just(Side::Accept)]
    }

    fn sender() -> impl Strategy<Value = Sender> {
        (any::<u32>(), role(), any::<u64>(), any::<u32>(), any::<u64>()).prop_map(
            |(layout_version, role, instance, pid, cookie)| Sender {
                layout_version,
                role,
                instance,
                pid,
                cookie,
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (sender(), any::<u32>(), any::<[u64; 3]>()).prop_map(|(sender, ring_size, k)| {
                Message::Proposal(Proposal {
                    sender,
                    ring_size,
                    known_instance: k[0],
                    known_lgr: k[1],
                    known_segments: k[2],
                })
            }),
            (sender(), any::<[u64; 5]>(), 0..64u32, any::<bool>(), any::<u32>()).prop_map(
                |(sender, v, segment, first_contact, ring_size)| {
                    Message::Accept(Accept {
                        sender,
                        lgr: v[0],
                        segment,
                        first_contact,
                        segment_size: v[1],
                        page: v[2],
                        rings: [v[3], v[4]],
                        ring_size,
                    })
                }
            ),
            (sender(), any::<u64>(), any::<u32>())
                .prop_map(|(sender, lgr, segment)| Message::Confirm(Confirm { sender, lgr, segment })),
            (any::<u64>(), any::<u32>(), any::<bool>()).prop_map(|(instance, diagnosis, out_of_sync)| {
                Message::Decline(Decline { instance, diagnosis, out_of_sync })
            }),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(m in message()) {
            let e = encode(&m);
            prop_assert_eq!(decode(e.as_bytes()), Ok(Decoded::Message(m, e.as_bytes().len())));
        }

        #[test]
        fn every_truncation_asks_for_more_and_never_for_too_much(m in message(), follow in any::<[u8; 16]>()) {
            let e = encode(&m);
            let all = e.as_bytes();
            for cut in 0..all.len() {
                match decode(&all[..cut]) {
                    Ok(Decoded::NeedTotal(n)) => prop_assert!(n > cut && n <= all.len()),
                    other => prop_assert!(false, "{cut} bytes: {other:?}"),
                }
            }
            // Doorbell bytes behind the message are not looked at.
            let mut stream = all.to_vec();
            stream.extend_from_slice(&follow);
            prop_assert_eq!(decode(&stream), Ok(Decoded::Message(m, all.len())));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn random_bodies_never_panic(kind in 0..6u8, len in any::<u16>(), v in any::<u8>(),
                                     body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = EYECATCHER.to_vec();
            bytes.push(kind);
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.push(v);
            bytes.extend_from_slice(&body);
            if let Ok(Decoded::NeedTotal(n)) = decode(&bytes) {
                prop_assert!(n <= MAX_LEN && n > bytes.len());
            }
        }

        #[test]
        fn one_flipped_bit_is_never_a_longer_read(m in message(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = encode(&m).as_bytes().to_vec();
            let i = at.index(bytes.len());
            bytes[i] ^= 1 << bit;
            if let Ok(Decoded::Message(_, n)) = decode(&bytes) {
                prop_assert_eq!(n, bytes.len());
            }
        }
    }

    #[test]
    fn golden_decline() {
        let m = Message::Decline(Decline {
            instance: 0x0102_0304_0506_0708,
            diagnosis: 0x0500_0000,
            out_of_sync: true,
        });
        let want = [
            0xe2, 0xd4, 0xc3, 0xd9, 4, 0, 28, 0x19, // header: out of sync
            1, 2, 3, 4, 5, 6, 7, 8, // instance, where RFC 7609 has the peer ID
            5, 0, 0, 0, 0, 0, 0, 0, // diagnosis, reserved
            0xe2, 0xd4, 0xc3, 0xd9,
        ];
        assert_eq!(encode(&m).as_bytes(), want);
    }

    #[test]
    fn golden_confirm() {
        let m = Message::Confirm(Confirm { sender: SENDER, lgr: 3, segment: 7 });
        let want = [
            0xe2, 0xd4, 0xc3, 0xd9, 3, 0, 52, 0x11, // header
            0, 0, 0, 1, 0, 0, 0, 0, // layout version, role
            0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, // instance
            0x0a, 0x0b, 0x0c, 0x0d, // pid
            0, 0, 0, 0, 0, 0, 0, 0x99, // cookie
            0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 7, // link group, segment
            0xe2, 0xd4, 0xc3, 0xd9,
        ];
        assert_eq!(encode(&m).as_bytes(), want);
    }

    #[test]
    fn lengths_are_what_they_say() {
        let lens = [PROPOSAL_LEN, ACCEPT_LEN, CONFIRM_LEN, DECLINE_LEN];
        assert_eq!(lens, [68, 88, 52, 28]);
        assert!(lens.iter().all(|&l| l <= MAX_LEN));
    }

    #[test]
    fn surplus_of_a_longer_message_is_ignored() {
        let m = Message::Confirm(Confirm { sender: SENDER, lgr: 3, segment: 7 });
        let mut bytes = encode(&m).as_bytes().to_vec();
        let trailer = bytes.split_off(48);
        bytes.extend_from_slice(&[0xaa; 8]);
        bytes.extend_from_slice(&trailer);
        bytes[6] = 60;
        assert_eq!(decode(&bytes), Ok(Decoded::Message(m, 60)));
    }

    #[test]
    fn malformed() {
        let good = encode(&Message::Confirm(Confirm { sender: SENDER, lgr: 3, segment: 7 }));
        let bad = |at: usize, v: u8| {
            let mut b = good.as_bytes().to_vec();
            b[at] = v;
            decode(&b)
        };
        assert_eq!(bad(0, 0), Err(Malformed::Eyecatcher));
        assert_eq!(bad(51, 0), Err(Malformed::Eyecatcher));
        assert_eq!(bad(4, 9), Err(Malformed::Type));
        assert_eq!(bad(6, 51), Err(Malformed::Length));
        assert_eq!(bad(5, 255), Err(Malformed::Length));
        assert_eq!(bad(7, 0x21), Err(Malformed::Version));
        assert_eq!(bad(12, 2), Err(Malformed::Field));
        assert_eq!(decode(b"GET "), Err(Malformed::Eyecatcher));
        assert_eq!(decode(b""), Ok(Decoded::NeedTotal(8)));
    }
}
