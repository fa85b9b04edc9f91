//! The bodies of the fuzz targets (`fuzz/`) on a fixed choice of inputs, where there is no fuzzer.

#[path = "../../fuzz/bodies.rs"]
mod bodies;

/// `n` inputs of up to `most` bytes, the same at every run.
fn inputs(n: u64, most: u64, f: fn(&[u8])) {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..n {
        let len = next() % most;
        let mut input: Vec<u8> = (0..len).map(|_| next() as u8).collect();
        // Small bytes choose among the special cases.
        if next() & 1 == 0 {
            input.iter_mut().step_by(2).for_each(|b| *b %= 130);
        }
        f(&input);
    }
}

#[test]
fn decode() {
    inputs(50_000, 300, |data| {
        bodies::decode(data);
        // The header right, the rest chance.
        let len = (data.len() + 12).min(256) as u16;
        let kind = data.first().map_or(0, |k| k % 6);
        let head = [&[0xe2, 0xd4, 0xc3, 0xd9, kind][..], &len.to_be_bytes(), &[0x11], data];
        bodies::decode(&[&head.concat()[..], &[0xe2, 0xd4, 0xc3, 0xd9]].concat());
    });
}

#[test]
fn diag() {
    inputs(50_000, 128, bodies::diag);
}

#[test]
fn page() {
    inputs(50_000, 400, bodies::page);
}

#[test]
fn segment() {
    inputs(2_000, 400, bodies::segment);
}

#[test]
fn rendezvous() {
    inputs(500, 400, bodies::rendezvous);
}
