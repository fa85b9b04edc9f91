//! CLC of the same-host handshake: the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use smc::wire::clc::{Decoded, MAX_LEN, decode, encode};

fuzz_target!(|bytes: &[u8]| {
    match decode(bytes) {
        Ok(Decoded::Message(m, n)) => {
            assert!(n <= bytes.len() && n <= MAX_LEN);
            let again = encode(&m);
            assert_eq!(decode(again.as_bytes()), Ok(Decoded::Message(m, again.as_bytes().len())));
        }
        Ok(Decoded::NeedTotal(n)) => assert!(n > bytes.len() && n <= MAX_LEN),
        Err(_) => {}
    }
});
