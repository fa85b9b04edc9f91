//! Fields of messages, big-endian: taken off the front of what came, appended to what is to go.

/// A field that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Short;

/// Takes fields off the front.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(Short)?;
        self.0 = rest;
        Ok(*field)
    }

    /// The next `n` bytes, whatever they are.
    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Short> {
        let (field, rest) = self.0.split_at_checked(n).ok_or(Short)?;
        self.0 = rest;
        Ok(field)
    }

    /// Reserved bytes: not looked at.
    pub(crate) fn skip(&mut self, n: usize) -> Result<(), Short> {
        self.bytes(n).map(|_| ())
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Short> {
        self.take::<1>().map(|[b]| b)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Short> {
        self.take().map(u16::from_be_bytes)
    }

    /// Three bytes: queue pair numbers and packet sequence numbers.
    pub(crate) fn u24(&mut self) -> Result<u32, Short> {
        self.take().map(|[a, b, c]| u32::from_be_bytes([0, a, b, c]))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Short> {
        self.take().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Short> {
        self.take().map(u64::from_be_bytes)
    }
}

/// Appends fields.
pub(crate) trait Put {
    fn put(&mut self, field: &[u8]);

    /// Reserved bytes.
    fn zeros(&mut self, n: usize);

    fn put_u16(&mut self, v: u16) {
        self.put(&v.to_be_bytes());
    }

    /// The lower three bytes.
    fn put_u24(&mut self, v: u32) {
        let [_, a, b, c] = v.to_be_bytes();
        self.put(&[a, b, c]);
    }

    fn put_u32(&mut self, v: u32) {
        self.put(&v.to_be_bytes());
    }

    fn put_u64(&mut self, v: u64) {
        self.put(&v.to_be_bytes());
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, field: &[u8]) {
        self.extend_from_slice(field);
    }

    fn zeros(&mut self, n: usize) {
        self.resize(self.len() + n, 0);
    }
}
