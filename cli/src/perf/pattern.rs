//! Data that can be checked (`--verify`): each byte follows from the stream's seed and the byte's place in it.
//!
//! So a byte that is lost, doubled, damaged or in another's place is found at once and can be named, and the
//! receiver needs nothing but its own count. The generator is SplitMix64 with the place as its state: any place
//! can be had without those before it.

/// Words of SplitMix64 (Steele, Lea, Flood 2014), in order.
#[derive(Debug, Clone)]
pub struct Words(u64);

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Words {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mixed(self.0)
    }
}

/// The bytes of a stream from `at` on.
pub fn fill(seed: u64, at: u64, to: &mut [u8]) {
    let word = |n: u64| mixed(seed.wrapping_add(n.wrapping_add(1).wrapping_mul(STEP))).to_le_bytes();
    let skip = (at % 8) as usize;
    let (first, rest) = to.split_at_mut(((8 - skip) % 8).min(to.len()));
    let mut n = at / 8;
    if skip != 0 {
        first.copy_from_slice(&word(n)[skip..skip + first.len()]);
        n += 1;
    }
    for piece in rest.chunks_mut(8) {
        piece.copy_from_slice(&word(n)[..piece.len()]);
        n += 1;
    }
}

/// Looks at a stream as it comes in.
#[derive(Debug)]
pub struct Check {
    seed: u64,
    at: u64,
    want: Vec<u8>,
}

impl Check {
    pub fn new(seed: u64) -> Self {
        Self { seed, at: 0, want: Vec::new() }
    }

    /// The next bytes of the stream.
    ///
    /// # Errors
    /// Names the first byte that is another.
    pub fn look(&mut self, got: &[u8]) -> Result<(), String> {
        self.want.resize(got.len(), 0);
        fill(self.seed, self.at, &mut self.want);
        if got != self.want {
            let i = got.iter().zip(&self.want).position(|(a, b)| a != b).unwrap_or(0);
            return Err(format!(
                "the data is damaged: byte {} of the stream is {:#04x} in place of {:#04x}",
                self.at + i as u64,
                got[i],
                self.want[i]
            ));
        }
        self.at += got.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u64, at: u64, n: usize) -> Vec<u8> {
        let mut b = vec![0; n];
        fill(seed, at, &mut b);
        b
    }

    #[test]
    fn every_piece_is_a_piece_of_the_whole() {
        let whole = bytes(7, 0, 200);
        for at in 0..24 {
            for n in 0..40 {
                assert_eq!(bytes(7, at, n), whole[at as usize..at as usize + n], "{n} bytes at {at}");
            }
        }
        assert_ne!(whole, bytes(8, 0, 200));
        let mut words = Words::new(7);
        assert_eq!(whole[..8], words.next().to_le_bytes());
        assert_eq!(whole[8..16], words.next().to_le_bytes());
    }

    #[test]
    fn a_good_stream_passes_in_any_pieces() {
        let (whole, mut check) = (bytes(3, 0, 1000), Check::new(3));
        for piece in whole.chunks(17) {
            assert_eq!(check.look(piece), Ok(()));
        }
    }

    #[test]
    fn damage_loss_doubling_and_exchange_are_found_and_named() {
        let whole = bytes(3, 0, 1000);
        let said = |stream: &[u8]| {
            let mut check = Check::new(3);
            stream.chunks(64).find_map(|p| check.look(p).err())
        };
        let mut damaged = whole.clone();
        damaged[777] ^= 1;
        assert!(said(&damaged).is_some_and(|e| e.contains("byte 777 ")));
        let lost: Vec<u8> = [&whole[..500], &whole[501..]].concat();
        assert!(said(&lost).is_some_and(|e| e.contains("byte 500 ")));
        let doubled = [&whole[..512], &whole[448..]].concat();
        assert!(said(&doubled).is_some_and(|e| e.contains("byte 512 ")));
        let mut exchanged = whole.clone();
        exchanged[..128].rotate_left(64);
        assert!(said(&exchanged).is_some());
        assert_eq!(said(&whole), None);
    }
}
