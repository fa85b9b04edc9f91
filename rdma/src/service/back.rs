//! What two ends that are libsmc tell each other by TCP when their link is gone: up to where each has the other's bytes.
//!
//! ```text
//!  "libsmc" 0 1 │ the receiver's alert token (4) │ bytes received (8) │     big endian
//! ```
//!
//! All that arrived was taken from the completion queue before, so this is no less than what the peer knows to have
//! arrived, and what lies behind is still in the peer's ring. Nothing else goes by TCP while a connection is on RDMA, and
//! after this the stream goes on behind the last byte received. Who has sent FIN can't say it any more, and who has seen
//! FIN is told nothing: those go on or are reset by what they know.

use super::tcp;

const MAGIC: [u8; 8] = *b"libsmc\0\x01";
/// Bytes of the message.
const LEN: usize = 20;

fn encode(token: u32, received: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let parts = MAGIC.into_iter().chain(token.to_be_bytes()).chain(received.to_be_bytes());
    bytes.iter_mut().zip(parts).for_each(|(to, b)| *to = b);
    bytes
}

fn decode(bytes: &[u8], token: u32) -> Option<u64> {
    let bytes: &[u8; LEN] = bytes.try_into().ok()?;
    let (head, received) = bytes.split_last_chunk::<8>()?;
    let ours = head.strip_prefix(&MAGIC)? == token.to_be_bytes();
    ours.then_some(u64::from_be_bytes(*received))
}

/// Tells the peer, whose token it is. At this point of a stream there is room.
#[must_use]
pub fn send(fd: i32, token: u32, received: u64) -> bool {
    tcp::send_bytes(fd, &encode(token, received))
}

/// What the peer has told us, by our token; it stays where it is.
#[must_use]
pub fn is_here(fd: i32, token: u32) -> bool {
    decode(&tcp::peek(fd, LEN), token).is_some()
}

/// The stream goes on with something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotSaid;

/// The same, taken out of the stream; none: it is not all here.
pub fn take(fd: i32, token: u32) -> Result<Option<u64>, NotSaid> {
    let bytes = tcp::peek(fd, LEN);
    match decode(&bytes, token) {
        Some(received) => {
            tcp::take(fd, LEN);
            Ok(Some(received))
        }
        None if MAGIC.starts_with(bytes.get(..MAGIC.len().min(bytes.len())).unwrap_or_default())
            && bytes.len() < LEN =>
        {
            Ok(None)
        }
        None => Err(NotSaid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_understood_by_who_is_meant() {
        let bytes = encode(0x0102_0304, 0x1122_3344_5566_7788);
        assert_eq!(bytes[..14], *b"libsmc\0\x01\x01\x02\x03\x04\x11\x22");
        assert_eq!(decode(&bytes, 0x0102_0304), Some(0x1122_3344_5566_7788));
        assert_eq!(decode(&bytes, 0x0102_0305), None);
        for len in 0..LEN {
            assert_eq!(decode(&bytes[..len], 0x0102_0304), None);
        }
        let mut other = bytes;
        other[7] = 2;
        assert_eq!(decode(&other, 0x0102_0304), None);
    }
}
