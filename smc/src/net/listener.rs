//! A TCP listener whose connections are [`Stream`]s. Listening itself is the kernel's alone.

use super::{Builder, Stream};
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// Listens for connections.
///
/// ```
/// use smc::net::{Listener, Stream};
///
/// let listener = Listener::bind("127.0.0.1:0")?;
/// let client = Stream::connect(listener.local_addr()?)?;
/// let (server, address) = listener.accept()?;
/// assert_eq!(address, client.local_addr()?);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    streams: Builder,
}

impl Listener {
    pub(super) fn new(tcp: TcpListener, streams: Builder) -> Self {
        Listener { tcp, streams }
    }

    #[cfg(feature = "tokio")]
    pub(super) fn into_both(self) -> (TcpListener, Builder) {
        (self.tcp, self.streams)
    }

    /// Listens at the first of the addresses that can be had. For options see [`Builder::listen`].
    ///
    /// ```
    /// let listener = smc::net::Listener::bind(("127.0.0.1", 0))?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpListener::bind`].
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        Builder::new().listen(address)
    }

    /// Waits for a connection and takes it; with the peer's address.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let client = Stream::connect(listener.local_addr()?)?;
    /// let (stream, address) = listener.accept()?;
    /// assert_eq!(stream.peer_addr()?, address);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of accept(2); [`WouldBlock`](io::ErrorKind::WouldBlock) if the listener is not to wait and there is none.
    pub fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (tcp, address) = self.tcp.accept()?;
        Ok((self.streams.accepted(tcp)?, address))
    }

    /// Accepts for ever: an iterator over what [`accept`](Self::accept) gives.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let client = Stream::connect(listener.local_addr()?)?;
    /// for stream in listener.incoming() {
    ///     assert_eq!(stream?.peer_addr()?, client.local_addr()?);
    ///     break;
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn incoming(&self) -> Incoming<'_> {
        Incoming { listener: self }
    }

    /// The address it listens at.
    ///
    /// ```
    /// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// assert_ne!(listener.local_addr()?.port(), 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Another handle of the same listener.
    ///
    /// ```
    /// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// assert_eq!(listener.try_clone()?.local_addr()?, listener.local_addr()?);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of fcntl(2), for want of a descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Listener { tcp: self.tcp.try_clone()?, streams: self.streams.clone() })
    }

    /// Whether [`accept`](Self::accept) fails with [`WouldBlock`](io::ErrorKind::WouldBlock) instead of waiting. Streams
    /// that it gives wait.
    ///
    /// ```
    /// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// listener.set_nonblocking(true)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of ioctl(2).
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.tcp.set_nonblocking(on)
    }

    /// `IP_TTL` (ip(7)).
    ///
    /// ```
    /// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// listener.set_ttl(32)?;
    /// assert_eq!(listener.ttl()?, 32);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn ttl(&self) -> io::Result<u32> {
        self.tcp.ttl()
    }

    /// Sets `IP_TTL`, see [`ttl`](Self::ttl).
    ///
    /// ```
    /// smc::net::Listener::bind("127.0.0.1:0")?.set_ttl(32)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.tcp.set_ttl(ttl)
    }

    /// `SO_ERROR` (socket(7)), which this clears.
    ///
    /// ```
    /// assert!(smc::net::Listener::bind("127.0.0.1:0")?.take_error()?.is_none());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.tcp.take_error()
    }
}

/// With the default options; for others see [`Builder::adopt_listener`].
///
/// ```
/// let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let listener = smc::net::Listener::from(tcp);
/// # Ok::<(), std::io::Error>(())
/// ```
impl From<TcpListener> for Listener {
    fn from(tcp: TcpListener) -> Self {
        Listener { tcp, streams: Builder::new() }
    }
}

/// The listener itself. Connections that it accepts from then on are no [`Stream`]s.
///
/// ```
/// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
/// let tcp = std::net::TcpListener::from(listener);
/// # Ok::<(), std::io::Error>(())
/// ```
impl From<Listener> for TcpListener {
    fn from(listener: Listener) -> Self {
        listener.tcp
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.tcp.as_raw_fd()
    }
}

/// See [`Listener::incoming`].
///
/// ```
/// let listener = smc::net::Listener::bind("127.0.0.1:0")?;
/// listener.set_nonblocking(true)?;
/// assert!(listener.incoming().next().unwrap().is_err());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Incoming<'a> {
    listener: &'a Listener,
}

impl Iterator for Incoming<'_> {
    type Item = io::Result<Stream>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.listener.accept().map(|(stream, _)| stream))
    }
}
