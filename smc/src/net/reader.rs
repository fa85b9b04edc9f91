//! `BufRead` over a stream, by a copy.
//!
//! `BufRead::fill_buf` gives a `&[u8]`, and Rust takes for granted that nobody writes to what is behind one. The ring is
//! memory of the peer's as well, which is another process and may write at any time; a check before does not help, as it may
//! write after. Taking its right to write away is not possible either (memory that is mapped already stays writable), so
//! no slice of the ring can be lent. Hence a buffer of this end's own, small enough to stay in the cache, which makes
//! the second copy the cheap one. Without any copy: [`Stream::consume_with`].

use super::{IntoTcpError, Stream};
use std::io::{self, BufRead, Read};
use std::net::TcpStream;

/// Fits the second cache of common CPUs, with room for others.
const BUFFER: usize = 64 << 10;

/// Reads a [`Stream`] line by line, or piece by piece, by [`BufRead`].
///
/// ```
/// use smc::net::{Listener, Reader, Stream};
/// use std::io::{BufRead, Write};
///
/// let listener = Listener::bind("127.0.0.1:0")?;
/// let mut client = Stream::connect(listener.local_addr()?)?;
/// let (server, _) = listener.accept()?;
/// client.write_all(b"one\ntwo\n")?;
/// drop(client);
/// let lines: Result<Vec<_>, _> = Reader::new(server).lines().collect();
/// assert_eq!(lines?, ["one", "two"]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Reader {
    /// With a buffer of 64 KiB.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let reader = smc::net::Reader::new(stream);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self::with_capacity(BUFFER, stream)
    }

    /// With a buffer of that many bytes, at least one.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let reader = smc::net::Reader::with_capacity(4096, stream);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn with_capacity(bytes: usize, stream: Stream) -> Self {
        Reader { stream, buffer: vec![0; bytes.max(1)].into(), at: 0, end: 0 }
    }

    /// The stream, for writing to it (`&Stream` is [`Write`](std::io::Write)) and its options.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let reader = smc::net::Reader::new(stream);
    /// reader.stream().set_nodelay(true)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// What is in the buffer.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert!(smc::net::Reader::new(stream).buffered().is_empty());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn buffered(&self) -> &[u8] {
        &self.buffer[self.at..self.end]
    }

    /// The stream, and what is in the buffer and comes before what it gives.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let (stream, unread) = smc::net::Reader::new(stream).into_parts();
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn into_parts(self) -> (Stream, Vec<u8>) {
        let unread = self.buffered().to_vec();
        (self.stream, unread)
    }

    /// As [`Stream::into_tcp`]: what is in the buffer is the first of what is unread.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let (tcp, unread) = smc::net::Reader::new(stream).into_tcp().map_err(|(_, e)| e)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// What was in the buffer, and those of [`Stream::into_tcp`].
    pub fn into_tcp(self) -> Result<(TcpStream, Vec<u8>), (Vec<u8>, IntoTcpError)> {
        let (stream, mut unread) = self.into_parts();
        match stream.into_tcp() {
            Ok((tcp, rest)) => {
                unread.extend(rest);
                Ok((tcp, unread))
            }
            Err(e) => Err((unread, e)),
        }
    }
}

impl BufRead for Reader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
            self.end = self.stream.read(&mut self.buffer)?;
        }
        Ok(self.buffered())
    }

    fn consume(&mut self, n: usize) {
        self.at = self.at.saturating_add(n).min(self.end);
    }
}

impl Read for Reader {
    /// One that asks for more than the buffer holds is served past it.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.end && buf.len() >= self.buffer.len() {
            return self.stream.read(buf);
        }
        let n = self.fill_buf()?.read(buf)?;
        self.consume(n);
        Ok(n)
    }
}
