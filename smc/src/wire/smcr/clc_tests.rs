//! CLC of SMC-R: golden bytes, round trips, truncations, and that nothing makes the decoder panic or read on.

use super::clc::*;
use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

const LOCAL: Local = Local {
    peer: PeerId([0x12, 0x34, 2, 0, 0, 0, 0, 1]),
    gid: Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]),
    mac: Mac([2, 0, 0, 0, 0, 1]),
};

fn endpoint() -> Endpoint {
    Endpoint {
        first_contact: true,
        local: LOCAL,
        qpn: 0x123,
        rkey: 0x00ab_cdef,
        rmbe: 1,
        token: 7,
        size: RmbeSize::holding(65536),
        mtu: Mtu::B1024,
        rmb: 0x7f00_1234_0000,
        psn: 0xbeef,
        v2: None,
    }
}

fn v4_offer() -> OfferV1 {
    OfferV1 { media: Media::R, subnets: Subnets { v4: ([10, 0, 0, 0], 24), v6: Few::new() } }
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 16).unwrap()).collect()
}

fn golden(message: Message, bytes: &str) {
    let bytes = hex(bytes);
    assert_eq!(encode(&message), bytes);
    assert_eq!(decode(&bytes), Ok(Decoded::Message(message, bytes.len())));
}

#[test]
fn golden_proposal_v1() {
    let version = Version::V1;
    golden(
        Message::Proposal(Proposal { version, local: LOCAL, area: None, v1: Some(v4_offer()), v2: None }),
        "e2d4c3d9 01003410 12340200 00000001 00000000 00000000 0000ffff 0a000001
         02000000 00010000 0a000000 18000000 e2d4c3d9",
    );
}

#[test]
fn golden_proposal_v2_that_offers_v1_only() {
    let (version, area) = (Version::V2, Some(SmcdArea::default()));
    golden(
        Message::Proposal(Proposal { version, local: LOCAL, area, v1: Some(v4_offer()), v2: None }),
        "e2d4c3d9 01005c28 12340200 00000001 00000000 00000000 0000ffff 0a000001
         02000000 00010028 00000000 00000000 00000000 00000000 00000000 00000000
         00000000 00000000 00000000 00000000 0a000000 18000000 e2d4c3d9",
    );
}

#[test]
fn golden_proposal_v2_with_an_eid() {
    let v2 = OfferV2 {
        release: 1,
        gid: LOCAL.gid,
        max_conns: 255,
        max_links: 2,
        eids: Few::of(&[Eid::user("SMC-VM").unwrap()]).unwrap(),
        ..OfferV2::default()
    };
    let (version, area) = (Version::V2, Some(SmcdArea::default()));
    golden(
        Message::Proposal(Proposal { version, local: LOCAL, area, v1: None, v2: Some(v2) }),
        "e2d4c3d9 01009c22 12340200 00000001 00000000 00000000 0000ffff 0a000001
         02000000 00010000 00000000 00000000 0000001c 00000000 00000000 00000000
         00000000 00000000 00000000 00000000 01000010 00000000 00000000 00000000
         0000ffff 0a000001 ff020000 00000000 00000000 00000000 534d432d 564d2020
         20202020 20202020 20202020 20202020 20202020 20202020 e2d4c3d9",
    );
}

/// What Linux 6.12 has sent.
#[test]
fn golden_proposal_of_linux() {
    let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1]);
    let v2 = OfferV2 {
        release: 1,
        gid,
        max_conns: 255,
        max_links: 2,
        features: 1,
        eids: Few::of(&[Eid::user("SMC-VM").unwrap()]).unwrap(),
        ..OfferV2::default()
    };
    let (version, area, local) = (Version::V2, Some(SmcdArea::default()), Local::default());
    golden(
        Message::Proposal(Proposal { version, local, area, v1: None, v2: Some(v2) }),
        "e2d4c3d9 01009c22 00000000 00000000 00000000 00000000 00000000 00000000
         00000000 00000000 00000000 00000000 0000001c 00000000 00000000 00000000
         00000000 00000000 00000000 00000000 01000010 00000000 00000000 00000000
         0000ffff 0a4d0001 ff020001 00000000 00000000 00000000 534d432d 564d2020
         20202020 20202020 20202020 20202020 20202020 20202020 e2d4c3d9",
    );
}

#[test]
fn golden_accept_v1() {
    golden(
        Message::Accept(endpoint()),
        "e2d4c3d9 02004418 12340200 00000001 00000000 00000000 0000ffff 0a000001
         02000000 00010001 2300abcd ef010000 00072300 00007f00 12340000 0000beef
         e2d4c3d9",
    );
}

#[test]
fn golden_confirm_v2_at_first_contact() {
    let mut host = [0; 32];
    host[..2].copy_from_slice(b"vm");
    let first = FirstContact {
        direct: true,
        os: 2,
        release: 1,
        host,
        max_conns: 16,
        max_links: 1,
        features: 0,
        vendor: [0; 4],
    };
    let gids = Few::of(&[LOCAL.gid]).unwrap();
    let v2 = PartV2 { eid: Eid::user("SMC-VM").unwrap(), first: Some(first), gids };
    golden(
        Message::Confirm(Endpoint { v2: Some(v2), ..endpoint() }),
        "e2d4c3d9 0300b428 12340200 00000001 00000000 00000000 0000ffff 0a000001
         02000000 00010001 2300abcd ef010000 00072300 00007f00 12340000 0000beef
         534d432d 564d2020 20202020 20202020 20202020 20202020 20202020 20202020
         00000000 00000000
         80210000 766d0000 00000000 00000000 00000000 00000000 00000000 00000000
         00000000 10010000 00000000 00000000 00000000
         01000000 00000000 00000000 0000ffff 0a000001 e2d4c3d9",
    );
}

#[test]
fn golden_declines() {
    let d = Decline { peer: LOCAL.peer, diagnosis: Diagnosis::NO_DEVICE, out_of_sync: false, v2: None };
    golden(Message::Decline(d), "e2d4c3d9 04001c10 12340200 00000001 03030000 00000000 e2d4c3d9");
    golden(
        Message::Decline(Decline { v2: Some((2, [0; 4])), ..d }),
        "e2d4c3d9 04002c20 12340200 00000001 03030000 20000000 00000000 00000000
         00000000 00000000 e2d4c3d9",
    );
    golden(
        Message::Decline(Decline { out_of_sync: true, diagnosis: Diagnosis::SYNC_ERROR, ..d }),
        "e2d4c3d9 04001c18 12340200 00000001 04000000 00000000 e2d4c3d9",
    );
}

#[test]
fn malformed() {
    let good = encode(&Message::Accept(endpoint()));
    let bad = |at: usize, v: u8| {
        let mut b = good.clone();
        b[at] = v;
        decode(&b)
    };
    assert_eq!(bad(0, 0), Err(Malformed::Eyecatcher));
    assert_eq!(bad(67, 0), Err(Malformed::Eyecatcher));
    assert_eq!(bad(4, 9), Err(Malformed::Type));
    assert_eq!(bad(6, 67), Err(Malformed::Length));
    assert_eq!(bad(5, 255), Err(Malformed::Length));
    assert_eq!(bad(7, 0x08), Err(Malformed::Version));
    assert_eq!(bad(7, 0x38), Err(Malformed::Version));
    assert_eq!(bad(7, 0x28), Err(Malformed::Length));
    assert_eq!(bad(7, 0x19), Err(Malformed::Mode));
    assert_eq!(bad(3, 0xc4), Err(Malformed::Mode));
    assert_eq!(bad(45, 0), Err(Malformed::Field));
    assert_eq!(bad(50, 0x20), Err(Malformed::Field));
    assert_eq!(bad(50, 0x26), Err(Malformed::Field));
    assert_eq!(decode(b"GET "), Err(Malformed::Eyecatcher));
    assert_eq!(decode(b""), Ok(Decoded::NeedTotal(8)));
    // A Proposal whose counts do not add up to its length.
    let p = Proposal { version: Version::V1, local: LOCAL, area: None, v1: Some(v4_offer()), v2: None };
    let mut bytes = encode(&Message::Proposal(p));
    bytes[47] = 1;
    assert_eq!(decode(&bytes), Err(Malformed::Length));
    bytes[47] = 0;
    bytes[39] = 40;
    assert_eq!(decode(&bytes), Err(Malformed::Length));
    bytes[39] = 1;
    assert_eq!(decode(&bytes), Err(Malformed::Offset));
    bytes[7] = 0x12;
    assert_eq!(decode(&bytes), Err(Malformed::Mode));
    // Version 2 with subnets, and no way to them.
    (bytes[7], bytes[39]) = (0x28, 0);
    assert_eq!(decode(&bytes), Err(Malformed::Offset));
    // Nine of what there may be eight of.
    let mut bytes = encode(&Message::Proposal(p));
    bytes[47] = 9;
    bytes.splice(48..48, [0; 9 * 17]);
    bytes[6] += 9 * 17;
    assert_eq!(decode(&bytes), Err(Malformed::Count));
}

#[test]
fn the_trailer_may_be_smcd_and_surplus_of_version_2_is_ignored() {
    let v2 = PartV2 { eid: Eid::user("A").unwrap(), first: None, gids: Few::new() };
    let m = Message::Accept(Endpoint { first_contact: false, v2: Some(v2), ..endpoint() });
    let mut bytes = encode(&m);
    assert_eq!(bytes.len(), 108);
    bytes.splice(104.., [0xaa; 8].into_iter().chain(EYECATCHER_D));
    bytes[6] += 8;
    assert_eq!(decode(&bytes), Ok(Decoded::Message(m, 116)));
}

#[test]
fn diagnoses_have_words() {
    for d in Diagnosis::ALL {
        assert!(d.text().is_some() && Diagnosis::ALL.iter().filter(|o| *o == d).count() == 1);
    }
    assert_eq!(Diagnosis(1).to_string(), "0x00000001");
    assert_eq!(Diagnosis::NO_DEVICE.to_string(), "no usable device (0x03030000)");
}

#[test]
fn eids_are_checked() {
    assert_eq!(&Eid::user("A.B-1").unwrap().0[..6], b"A.B-1 ");
    for bad in ["", "a", ".A", "-A", "A_B", "A B", "012345678901234567890123456789012"] {
        assert_eq!(Eid::user(bad), None, "{bad}");
    }
}

#[test]
fn rmbe_sizes() {
    assert_eq!(RmbeSize::holding(0).bytes(), 16 << 10);
    assert_eq!(RmbeSize::holding((16 << 10) + 1).bytes(), 32 << 10);
    assert_eq!(RmbeSize::holding(u32::MAX).bytes(), 512 << 20);
    assert_eq!(RmbeSize::from_code(16), None);
}

fn local() -> impl Strategy<Value = Local> {
    any::<([u8; 8], [u8; 16], [u8; 6])>().prop_map(|(p, g, m)| Local {
        peer: PeerId(p),
        gid: Gid(g),
        mac: Mac(m),
    })
}

fn media() -> impl Strategy<Value = Media> {
    prop_oneof![Just(Media::R), Just(Media::D), Just(Media::Both)]
}

fn few<T: Copy + Default + std::fmt::Debug, const N: usize>(
    one: impl Strategy<Value = T>,
) -> impl Strategy<Value = Few<T, N>> {
    vec(one, 0..=N).prop_map(|v| Few::of(&v).unwrap())
}

fn eid() -> impl Strategy<Value = Eid> {
    any::<[u8; 32]>().prop_map(Eid)
}

fn offer_v1() -> impl Strategy<Value = OfferV1> {
    let prefix = any::<([u8; 16], u8)>().prop_map(|(addr, bits)| Prefix { addr, bits });
    (media(), any::<([u8; 4], u8)>(), few(prefix))
        .prop_map(|(media, v4, v6)| OfferV1 { media, subnets: Subnets { v4, v6 } })
}

fn offer_v2() -> impl Strategy<Value = OfferV2> {
    let ism = any::<(u64, u16)>().prop_map(|(gid, chid)| Ism { gid, chid });
    let smcd = (eid(), few(ism)).prop_map(|(seid, devices)| SmcdV2 { seid, devices });
    (media(), 0..16u8, any::<(bool, [u8; 16], u8, u8, u16)>(), few(eid()), smcd).prop_map(
        |(media, release, (seid, gid, max_conns, max_links, features), eids, smcd)| OfferV2 {
            media,
            release,
            seid,
            gid: Gid(gid),
            max_conns,
            max_links,
            features,
            eids,
            smcd: (media != Media::R).then_some(smcd),
        },
    )
}

fn proposal() -> impl Strategy<Value = Proposal> {
    let area = any::<(u64, u16)>().prop_map(|(gid, chid)| SmcdArea { gid, chid });
    let old = (local(), proptest::option::of(area.clone()), offer_v1())
        .prop_map(|(local, area, v1)| Proposal { version: Version::V1, local, area, v1: Some(v1), v2: None });
    let new =
        (local(), area, proptest::option::of(offer_v1()), offer_v2()).prop_map(|(local, area, v1, v2)| {
            Proposal { version: Version::V2, local, area: Some(area), v1, v2: Some(v2) }
        });
    prop_oneof![old, new]
}

fn any_endpoint(confirm: bool) -> impl Strategy<Value = Endpoint> {
    let first = (any::<(bool, [u8; 32], u8, u8, u16, [u8; 4])>(), 0..16u8, 0..16u8).prop_map(
        |((direct, host, max_conns, max_links, features, vendor), os, release)| FirstContact {
            direct,
            os,
            release,
            host,
            max_conns,
            max_links,
            features,
            vendor,
        },
    );
    let gids = few(any::<[u8; 16]>().prop_map(Gid));
    let v2 = proptest::option::of((eid(), first, gids));
    let numbers = (any::<(bool, u32, u32, u64)>(), 0..1u32 << 24, 0..1u32 << 24, 1..=255u8, 0..16u8, 1..=5u8);
    (local(), numbers, v2).prop_map(
        move |(local, ((first_contact, rkey, token, rmb), qpn, psn, rmbe, size, mtu), v2)| Endpoint {
            first_contact,
            local,
            qpn,
            rkey,
            rmbe,
            token,
            size: RmbeSize::from_code(size).unwrap(),
            mtu: Mtu::try_from(mtu).unwrap(),
            rmb,
            psn,
            v2: v2.map(|(eid, first, gids)| PartV2 {
                eid,
                first: first_contact.then_some(first),
                gids: if first_contact && confirm { gids } else { Few::new() },
            }),
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let decline = (any::<([u8; 8], u32, bool)>(), proptest::option::of((0..16u8, any::<[u32; 4]>())));
    prop_oneof![
        proposal().prop_map(Message::Proposal),
        any_endpoint(false).prop_map(Message::Accept),
        any_endpoint(true).prop_map(Message::Confirm),
        decline.prop_map(|((peer, diagnosis, out_of_sync), v2)| Message::Decline(Decline {
            peer: PeerId(peer),
            diagnosis: Diagnosis(diagnosis),
            out_of_sync,
            v2,
        })),
    ]
}

proptest! {
    #[test]
    fn round_trip(m in message()) {
        let bytes = encode(&m);
        prop_assert_eq!(decode(&bytes), Ok(Decoded::Message(m, bytes.len())));
    }

    #[test]
    fn every_truncation_asks_for_more_and_never_for_too_much(m in message(), follow in any::<[u8; 16]>()) {
        let all = encode(&m);
        for cut in 0..all.len() {
            match decode(&all[..cut]) {
                Ok(Decoded::NeedTotal(n)) => prop_assert!(n > cut && n <= all.len()),
                other => prop_assert!(false, "{cut} bytes: {other:?}"),
            }
        }
        // The program's bytes behind the message are not looked at.
        let mut stream = all.clone();
        stream.extend_from_slice(&follow);
        prop_assert_eq!(decode(&stream), Ok(Decoded::Message(m, all.len())));
    }

    #[test]
    fn what_is_taken_comes_back(m in message(), flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        // Flipped bits: what is still a message is one that can be said again.
        let mut bytes = encode(&m);
        for (at, v) in flips {
            let i = at.index(bytes.len());
            bytes[i] = v;
        }
        match decode(&bytes) {
            Ok(Decoded::Message(m, n)) => {
                prop_assert!(n <= bytes.len());
                let again = encode(&m);
                prop_assert_eq!(decode(&again), Ok(Decoded::Message(m, again.len())));
            }
            Ok(Decoded::NeedTotal(n)) => prop_assert!(n > bytes.len() && n <= MAX_LEN),
            Err(_) => {}
        }
    }

    #[test]
    fn random_bodies_never_panic(kind in 0..6u8, v in any::<u8>(), body in vec(any::<u8>(), 0..800)) {
        let mut bytes = EYECATCHER.to_vec();
        bytes.push(kind);
        bytes.extend_from_slice(&(body.len() as u16 + 12).to_be_bytes());
        bytes.push(v);
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(&EYECATCHER);
        if let Ok(Decoded::NeedTotal(n)) = decode(&bytes) {
            prop_assert!(n <= MAX_LEN && n > bytes.len());
        }
    }
}
