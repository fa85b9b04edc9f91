//! CDC (connection data control): the 44 bytes that tell how far a connection has been written and read.
//!
//! ```text
//!  0    1    2     4       8              16             24    25     26      44
//!  | FE | 44 | seq | token | producer     | consumer     | prod| conn | zeros |
//!                          | 0 | wrap | count |
//! ```
//!
//! The token is the *receiver's* alert token. RFC 7609 section 3.4 and appendix A.4; `net/smc/smc_cdc.h`.
//!
//! The hard idea: the producer cursor counts in the receiver's ring and the consumer cursor in the sender's own,
//! so one message speaks of two rings of different size.

use crate::wire::fields::Fields;

/// Bytes on the wire.
pub const LEN: usize = 44;
/// First byte: tells CDC from LLC.
pub const TYPE: u8 = 0xfe;
/// Bytes without which a message says nothing; the rest is reserved.
const LEAST: usize = 26;

/// A place in a ring: how often it was gone round, and the offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// Laps, modulo 2^16.
    pub wrap: u16,
    /// Offset, below the size of the ring.
    pub count: u32,
}

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$d:meta])* $field:ident = $bit:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$d])* pub $field: bool,)* }

        impl $name {
            fn from_bits(bits: u8) -> Self {
                Self { $($field: bits & $bit != 0,)* }
            }

            fn bits(self) -> u8 {
                0 $(| if self.$field { $bit } else { 0 })*
            }
        }
    };
}

flags! {
    /// What the producer says.
    Producer {
        /// More is waiting than the ring had room for: tell of any room at once.
        blocked = 0x80,
        /// Urgent data is on its way.
        urgent_pending = 0x40,
        /// The byte before the producer cursor is urgent.
        urgent_present = 0x20,
        /// Send the consumer cursor.
        update_wanted = 0x10,
        /// Failover: `seq` is that of the last message that is known to have arrived.
        failover = 0x08,
    }
}

flags! {
    /// How far the sender has come in closing.
    Closing {
        /// It writes no more.
        done_writing = 0x80,
        /// It is closed.
        closed = 0x40,
        /// It was closed with data unread, or given up.
        abort = 0x20,
    }
}

/// One message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cdc {
    /// Counts the messages of one direction, from 1, modulo 2^16.
    pub seq: u16,
    /// The receiver's alert token.
    pub token: u32,
    /// End of what the sender has written into the receiver's ring.
    pub prod: Cursor,
    /// How far the sender has read its own.
    pub cons: Cursor,
    /// Flags that go with `prod`.
    pub flags: Producer,
    /// Flags of closing.
    pub closing: Closing,
}

/// Bytes that no correct peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Not a CDC message.
    Type,
    /// Fewer bytes than a message has, or a length that is not 44.
    Length,
}

impl Cdc {
    /// Whether `word`, a failover validation, means this message or a later one.
    #[must_use]
    pub fn is_known_by(&self, word: &Self) -> bool {
        !self.flags.failover && (self.seq.wrapping_sub(word.seq) as i16) <= 0
    }

    /// The message as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; LEN] {
        let mut out = [0; LEN];
        let cursor = |c: Cursor| (u64::from(c.wrap) << 32 | u64::from(c.count)).to_be_bytes();
        let (head, _) = out.split_at_mut(LEAST);
        let fields: [&[u8]; 6] = [
            &[TYPE, LEN as u8],
            &self.seq.to_be_bytes(),
            &self.token.to_be_bytes(),
            &cursor(self.prod),
            &cursor(self.cons),
            &[self.flags.bits(), self.closing.bits()],
        ];
        // The fields add up to the head's 26 bytes.
        head.iter_mut().zip(fields.into_iter().flatten()).for_each(|(to, b)| *to = *b);
        out
    }

    /// The message in what a SEND brought.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        match *bytes {
            [TYPE, len, ..] if usize::from(len) == LEN && bytes.len() >= LEAST => {}
            [TYPE, ..] => return Err(Malformed::Length),
            [] => return Err(Malformed::Length),
            _ => return Err(Malformed::Type),
        }
        Self::fields(Fields(bytes)).map_err(|_| Malformed::Length)
    }

    fn fields(mut f: Fields<'_>) -> Result<Self, crate::wire::fields::Short> {
        f.skip(2)?;
        let cursor = |f: &mut Fields<'_>| {
            f.skip(2)?;
            Ok(Cursor { wrap: f.u16()?, count: f.u32()? })
        };
        Ok(Self {
            seq: f.u16()?,
            token: f.u32()?,
            prod: cursor(&mut f)?,
            cons: cursor(&mut f)?,
            flags: Producer::from_bits(f.u8()?),
            closing: Closing::from_bits(f.u8()?),
        })
    }
}
