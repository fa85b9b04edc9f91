//! LLC: no panic, and what is taken can be said again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use smc::wire::smcr::llc::Llc;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(m) = Llc::decode(bytes) {
        assert_eq!(Llc::decode(&m.encode()), Ok(m));
    }
});
