//! CDC: no panic, and what is taken can be said again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use smc::wire::smcr::cdc::Cdc;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(m) = Cdc::decode(bytes) {
        assert_eq!(Cdc::decode(&m.encode()), Ok(m));
    }
});
