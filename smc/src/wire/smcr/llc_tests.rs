//! LLC: golden bytes, round trips of both versions, and that nothing makes the decoder panic.

use super::llc::*;
use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 16).unwrap()).collect()
}

fn golden(version: Version, response: bool, body: Body, bytes: &str) {
    let m = Llc { version, response, body };
    let bytes = hex(bytes);
    assert_eq!(m.encode(), bytes);
    assert_eq!(Llc::decode(&bytes), Ok(m));
}

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const GID: Gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);

fn confirm_link(max_conns: u8) -> Body {
    Body::ConfirmLink(ConfirmLink {
        mac: MAC,
        gid: GID,
        qpn: 0x123,
        link: 1,
        uid: 0x0102_0304,
        max_links: 2,
        max_conns,
        no_eyecatcher: true,
    })
}

#[test]
fn golden_confirm_link() {
    golden(
        Version::V1,
        false,
        confirm_link(0),
        "012c0003 02000000 00010000 00000000 00000000 ffff0a00 00010001 23010102
         03040200 00000000 00000000",
    );
    golden(
        Version::V2,
        true,
        confirm_link(16),
        "212c0083 02000000 00010000 00000000 00000000 ffff0a00 00010001 23010102
         03040210 00000000 00000000",
    );
}

#[test]
fn golden_add_link() {
    let a = AddLink {
        mac: MAC,
        gid: GID,
        qpn: 0x123,
        link: 2,
        mtu: Some(Mtu::B4096),
        psn: 0xbeef,
        rejected: None,
        v2: None,
    };
    golden(
        Version::V1,
        false,
        Body::AddLink(a.clone()),
        "022c0000 02000000 00010000 00000000 00000000 0000ffff 0a000001 00012302
         0500beef 00000000 00000000",
    );
    golden(
        Version::V1,
        true,
        Body::AddLink(AddLink { mtu: None, rejected: Some(1), ..a.clone() }),
        "022c01c0 02000000 00010000 00000000 00000000 0000ffff 0a000001 00012302
         0000beef 00000000 00000000",
    );
    let keys = vec![NewKey { on_this: 1, on_new: 2, addr: 3 }];
    let v2 = Some(AddLinkV2 { direct: true, target: GID, keys });
    golden(
        Version::V2,
        false,
        Body::AddLink(AddLink { v2, ..a }),
        "22580000 02000000 00010000 00000000 00000000 0000ffff 0a000001 00012302
         0500beef 00000000 00000000
         80000000 00000000 00000000 ffff0a00 00010000 00000000 00000100
         00000001 00000002 00000000 00000003",
    );
}

#[test]
fn golden_add_link_continuation() {
    let keys = [NewKey { on_this: 1, on_new: 2, addr: 3 }, NewKey::default()];
    golden(
        Version::V1,
        true,
        Body::AddLinkCont { link: 2, remaining: 1, keys },
        "032c0080 02010000 00000001 00000002 00000000 00000003 00000000 00000000
         00000000 00000000 00000000",
    );
}

#[test]
fn golden_delete_link() {
    let d = DeleteLink { link: 1, all: false, orderly: true, reason: DeleteReason::LOST_PATH };
    golden(
        Version::V1,
        false,
        Body::DeleteLink(d.clone()),
        "042c0020 01000100 00000000 00000000 00000000 00000000 00000000 00000000
         00000000 00000000 00000000",
    );
    golden(
        Version::V2,
        true,
        Body::DeleteLink(DeleteLink { link: 0, all: true, reason: DeleteReason::PROGRAM, ..d }),
        "242c00e0 00000300 00000000 00000000 00000000 00000000 00000000 00000000
         00000000 00000000 00000000",
    );
}

#[test]
fn golden_confirm_rkey() {
    let others = Few::of(&[LinkKey { link: 2, rkey: 0x00ab_cdf0, addr: 0x7f00_1234_0000 }]).unwrap();
    let c = ConfirmRkey { rkey: 0x00ab_cdef, addr: 0x7f00_1234_0000, others, answer: RkeyAnswer::Done };
    golden(
        Version::V1,
        false,
        Body::ConfirmRkey(c.clone()),
        "062c0000 0100abcd ef00007f 00123400 000200ab cdf00000 7f001234 00000000
         00000000 00000000 00000000",
    );
    golden(
        Version::V2,
        true,
        Body::ConfirmRkey(ConfirmRkey { answer: RkeyAnswer::Retry, others: Few::new(), ..c }),
        "262c00b0 0000abcd ef00007f 00123400 00000000 00000000 00000000 00000000
         00000000 00000000 00000000",
    );
}

#[test]
fn golden_delete_rkey_and_test_link() {
    golden(
        Version::V1,
        true,
        Body::DeleteRkey(DeleteRkey { keys: vec![0x11, 0x22], negative: true, unknown: 0x40 }),
        "092c00a0 02400000 00000011 00000022 00000000 00000000 00000000 00000000
         00000000 00000000 00000000",
    );
    golden(
        Version::V2,
        false,
        Body::TestLink(*b"is anybody there"),
        "272c0000 69732061 6e79626f 64792074 68657265 00000000 00000000 00000000
         00000000 00000000 00000000",
    );
    golden(
        Version::V2,
        false,
        Body::RequestAddLink { gids: vec![GID] },
        "252c0000 00000000 00000000 00000000 00000000 00000000 01000000 00000000
         00000000 0000ffff 0a000001",
    );
}

#[test]
fn malformed() {
    let good = Llc { version: Version::V1, response: false, body: Body::TestLink([0; 16]) }.encode();
    let bad = |at: usize, v: u8| {
        let mut b = good.clone();
        b[at] = v;
        Llc::decode(&b)
    };
    assert_eq!(Llc::decode(&good[..43]), Err(Malformed::Length));
    assert_eq!(Llc::decode(&vec![0; MAX_LEN + 1]), Err(Malformed::Length));
    assert_eq!(bad(1, 43), Err(Malformed::Length));
    assert_eq!(bad(0, 0x17), Err(Malformed::Version));
    // Version 1 has no REQUEST ADD LINK, version 2 no ADD LINK CONTINUATION; 8 is handled by nobody.
    for kind in [0, 5, 8, 10, 15, 0x20, 0x23, 0x28] {
        assert_eq!(bad(0, kind), Err(Malformed::Type), "{kind:#x}");
    }
    let mut b = good.clone();
    (b[0], b[4]) = (CONFIRM_RKEY_BYTE, 3);
    assert_eq!(Llc::decode(&b), Err(Malformed::Count));
    (b[0], b[4]) = (0x09, 9);
    assert_eq!(Llc::decode(&b), Err(Malformed::Count));
    (b[0], b[4]) = (0x29, 11);
    assert_eq!(Llc::decode(&b), Err(Malformed::Length));
    (b[0], b[32]) = (0x02, 6);
    assert_eq!(Llc::decode(&b), Err(Malformed::Field));
}

const CONFIRM_RKEY_BYTE: u8 = 6;

#[test]
fn either_byte_order_of_version_2_is_understood() {
    let keys = vec![NewKey { on_this: 1, on_new: 2, addr: 3 }; 3];
    let a = AddLink {
        mac: MAC,
        gid: GID,
        qpn: 1,
        link: 1,
        mtu: None,
        psn: 1,
        rejected: None,
        v2: Some(AddLinkV2 { direct: false, target: GID, keys }),
    };
    let m = Llc { version: Version::V2, response: false, body: Body::AddLink(a) };
    let mut bytes = m.encode();
    assert_eq!(Llc::decode(&bytes), Ok(m.clone()));
    bytes.swap(1, 2);
    bytes.swap(70, 71);
    assert_eq!(Llc::decode(&bytes), Ok(m));
}

fn key() -> impl Strategy<Value = NewKey> {
    any::<(u32, u32, u64)>().prop_map(|(on_this, on_new, addr)| NewKey { on_this, on_new, addr })
}

fn mac_gid() -> impl Strategy<Value = (Mac, Gid)> {
    any::<([u8; 6], [u8; 16])>().prop_map(|(m, g)| (Mac(m), Gid(g)))
}

fn add_link() -> impl Strategy<Value = AddLink> {
    let v2 = (any::<(bool, [u8; 16])>(), vec(key(), 0..256)).prop_map(|((direct, target), keys)| AddLinkV2 {
        direct,
        target: Gid(target),
        keys,
    });
    let small = 0..1u32 << 24;
    let mtu = proptest::option::of((1..=5u8).prop_map(|c| Mtu::try_from(c).unwrap()));
    let rejected = proptest::option::of(0..16u8);
    (mac_gid(), small.clone(), any::<u8>(), mtu, small, rejected, proptest::option::of(v2)).prop_map(
        |((mac, gid), qpn, link, mtu, psn, rejected, v2)| AddLink {
            mac,
            gid,
            qpn,
            link,
            mtu,
            psn,
            rejected,
            v2,
        },
    )
}

fn body() -> impl Strategy<Value = Body> {
    let confirm = (mac_gid(), 0..1u32 << 24, any::<(u8, u32, u8, u8, bool)>()).prop_map(
        |((mac, gid), qpn, (link, uid, max_links, max_conns, no_eyecatcher))| {
            Body::ConfirmLink(ConfirmLink { mac, gid, qpn, link, uid, max_links, max_conns, no_eyecatcher })
        },
    );
    let link_key = any::<(u8, u32, u64)>().prop_map(|(link, rkey, addr)| LinkKey { link, rkey, addr });
    let answer = prop_oneof![Just(RkeyAnswer::Done), Just(RkeyAnswer::Negative), Just(RkeyAnswer::Retry)];
    prop_oneof![
        confirm,
        add_link().prop_map(Body::AddLink),
        (any::<(u8, u8)>(), key(), key()).prop_map(|((link, remaining), a, b)| Body::AddLinkCont {
            link,
            remaining,
            keys: [a, b]
        }),
        any::<(u8, bool, bool, u32)>().prop_map(|(link, all, orderly, r)| Body::DeleteLink(DeleteLink {
            link,
            all,
            orderly,
            reason: DeleteReason(r)
        })),
        vec(any::<[u8; 16]>().prop_map(Gid), 0..256).prop_map(|gids| Body::RequestAddLink { gids }),
        (any::<(u32, u64)>(), vec(link_key, 0..3), answer).prop_map(|((rkey, addr), others, answer)| {
            Body::ConfirmRkey(ConfirmRkey { rkey, addr, others: Few::of(&others).unwrap(), answer })
        }),
        any::<[u8; 16]>().prop_map(Body::TestLink),
        (vec(any::<u32>(), 0..256), any::<(bool, u8)>()).prop_map(|(keys, (negative, unknown))| {
            Body::DeleteRkey(DeleteRkey { keys, negative, unknown })
        }),
    ]
}

/// Any message, as far as its version can say it.
fn message() -> impl Strategy<Value = Llc> {
    (prop_oneof![Just(Version::V1), Just(Version::V2)], any::<bool>(), body()).prop_map(
        |(version, response, body)| {
            let (mut version, mut body) = (version, body);
            match &mut body {
                Body::AddLinkCont { .. } => version = Version::V1,
                Body::RequestAddLink { .. } => version = Version::V2,
                Body::AddLink(a) if version == Version::V1 => a.v2 = None,
                Body::AddLink(a) => a.rejected = a.rejected.map(|_| 0),
                Body::DeleteRkey(d) if version == Version::V1 => d.keys.truncate(8),
                _ => {}
            }
            Llc { version, response, body }
        },
    )
}

proptest! {
    #[test]
    fn round_trip(m in message()) {
        let bytes = m.encode();
        prop_assert!((LEN..=MAX_LEN).contains(&bytes.len()));
        prop_assert_eq!(Llc::decode(&bytes), Ok(m));
    }

    #[test]
    fn what_is_taken_comes_back(m in message(), flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
                                cut in any::<prop::sample::Index>()) {
        let mut bytes = m.encode();
        bytes.truncate(cut.index(bytes.len() + 1).max(LEN / 2));
        for (at, v) in flips {
            let i = at.index(bytes.len());
            bytes[i] = v;
        }
        if let Ok(m) = Llc::decode(&bytes) {
            prop_assert_eq!(Llc::decode(&m.encode()), Ok(m));
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = Llc::decode(&bytes);
    }
}
