//! CLC of SMC-R: no panic, no message longer than allowed, and what is taken can be said again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use smc::wire::smcr::clc::{Decoded, MAX_LEN, decode, encode};

fuzz_target!(|bytes: &[u8]| {
    match decode(bytes) {
        Ok(Decoded::Message(m, n)) => {
            assert!(n <= bytes.len() && n <= MAX_LEN);
            let again = encode(&m);
            assert_eq!(decode(&again), Ok(Decoded::Message(m, again.len())));
        }
        Ok(Decoded::NeedTotal(n)) => assert!(n > bytes.len() && n <= MAX_LEN),
        Err(_) => {}
    }
});
