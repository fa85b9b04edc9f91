//! What a cursor on the wire means (RFC 7609 section 4.5, `net/smc/smc_cdc.h`).
//!
//! Here a place in a stream is a 64-bit count of bytes, which never wraps. On the wire it is a number of laps modulo
//! 2^16 and an offset. The hard idea: a cursor is only ever compared with one that is known, less than a ring away, so
//! the laps can be told from their difference, and 0xFFFF → 0 is no special case.

use super::Misbehaved;
use crate::wire::smcr::cdc::Cursor;

/// The place as the wire has it, in a ring of `size` bytes.
#[must_use]
pub fn to_wire(at: u64, size: u32) -> Cursor {
    let size = u64::from(size.max(1));
    Cursor { wrap: (at / size) as u16, count: (at % size) as u32 }
}

/// The place that the peer means, knowing that it was at `known` and can't be beyond `limit`. One that is older comes
/// from a message that was overtaken, or from before a failover: it says nothing new.
pub fn from_wire(c: Cursor, known: u64, limit: u64, size: u32) -> Result<u64, Misbehaved> {
    if c.count >= size {
        return Err(Misbehaved::Offset);
    }
    let size = u64::from(size);
    let lap = known / size;
    let laps = i64::from(c.wrap.wrapping_sub(lap as u16) as i16);
    // Before the beginning is older than anything.
    let Some(lap) = lap.checked_add_signed(laps) else { return Ok(known) };
    let at = lap * size + u64::from(c.count);
    if at > limit { Err(Misbehaved::Cursor) } else { Ok(at.max(known)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule as `net/smc` has it, by laps and offsets: advance by `n`.
    fn step(c: Cursor, n: u32, size: u32) -> Cursor {
        let count = c.count + n;
        if count >= size {
            Cursor { wrap: c.wrap.wrapping_add(1), count: count - size }
        } else {
            Cursor { count, ..c }
        }
    }

    #[test]
    fn every_step_in_small_rings_across_both_wraps() {
        for size in 1..=5u32 {
            let beyond = u64::from(size) * 0x1_0002;
            for start in (0..40).chain(beyond - 40..beyond) {
                for n in 0..=size {
                    let (c, to) = (to_wire(start, size), start + u64::from(n));
                    assert_eq!(step(c, n, size), to_wire(to, size));
                    let limit = start + u64::from(size);
                    assert_eq!(from_wire(to_wire(to, size), start, limit, size), Ok(to));
                    // Looked at from later it is old; from a tighter limit, impossible.
                    assert_eq!(from_wire(c, to, limit, size), Ok(to));
                    if n > 0 {
                        let at = from_wire(to_wire(to, size), start, to - 1, size);
                        assert_eq!(at, Err(Misbehaved::Cursor));
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_is_ever_beyond_the_limit(wrap in any::<u16>(), count in any::<u32>(), known in 0..1u64 << 50,
                                            room in any::<u32>(), size in 1..=1u32 << 29) {
            let limit = known + u64::from(room.min(size));
            match from_wire(Cursor { wrap, count }, known, limit, size) {
                Ok(at) => prop_assert!(known <= at && at <= limit),
                Err(Misbehaved::Offset) => prop_assert!(count >= size),
                Err(e) => prop_assert_eq!(e, Misbehaved::Cursor),
            }
        }
    }
}
