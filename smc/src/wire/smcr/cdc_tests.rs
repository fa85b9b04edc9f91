//! CDC: golden bytes, round trips, and that nothing makes the decoder panic.

use super::cdc::*;
use proptest::prelude::*;

fn cursor() -> impl Strategy<Value = Cursor> {
    (any::<u16>(), any::<u32>()).prop_map(|(wrap, count)| Cursor { wrap, count })
}

fn cdc() -> impl Strategy<Value = Cdc> {
    (any::<u16>(), any::<u32>(), cursor(), cursor(), any::<[bool; 8]>()).prop_map(
        |(seq, token, prod, cons, [a, b, c, d, e, f, g, h])| Cdc {
            seq,
            token,
            prod,
            cons,
            flags: Producer {
                blocked: a,
                urgent_pending: b,
                urgent_present: c,
                update_wanted: d,
                failover: e,
            },
            closing: Closing { done_writing: f, closed: g, abort: h },
        },
    )
}

proptest! {
    #[test]
    fn round_trip(m in cdc()) {
        prop_assert_eq!(Cdc::decode(&m.encode()), Ok(m));
    }

    #[test]
    fn what_is_taken_comes_back(mut bytes in proptest::collection::vec(any::<u8>(), 0..60), good in any::<bool>()) {
        if good && bytes.len() > 1 {
            (bytes[0], bytes[1]) = (TYPE, LEN as u8);
        }
        if let Ok(m) = Cdc::decode(&bytes) {
            prop_assert!(bytes.len() >= 26);
            prop_assert_eq!(Cdc::decode(&m.encode()), Ok(m));
        }
    }
}

#[test]
fn golden() {
    let m = Cdc {
        seq: 5,
        token: 7,
        prod: Cursor { wrap: 1, count: 16 },
        cons: Cursor { wrap: 0, count: 65280 },
        flags: Producer { blocked: true, ..Producer::default() },
        closing: Closing::default(),
    };
    let mut want = vec![
        0xfe, 0x2c, 0, 5, 0, 0, 0, 7, // type, length, sequence, token
        0, 0, 0, 1, 0, 0, 0, 0x10, // producer
        0, 0, 0, 0, 0, 0, 0xff, 0, // consumer
        0x80, 0, // flags
    ];
    want.resize(44, 0);
    assert_eq!(m.encode().to_vec(), want);
}

#[test]
fn malformed() {
    let good = Cdc::default().encode();
    assert_eq!(Cdc::decode(&good[..26]), Ok(Cdc::default()));
    assert_eq!(Cdc::decode(&good[..25]), Err(Malformed::Length));
    assert_eq!(Cdc::decode(&[]), Err(Malformed::Length));
    assert_eq!(Cdc::decode(&[1; 44]), Err(Malformed::Type));
    let mut other = good;
    other[1] = 45;
    assert_eq!(Cdc::decode(&other), Err(Malformed::Length));
}
