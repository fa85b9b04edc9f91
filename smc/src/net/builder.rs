//! What a stream or listener is to be like before there is one.

use super::core::{Handle, Origin, settings};
use super::{Listener, Stream, result};
use crate::config::Threshold;
use crate::conn::{Side, Tuning};
use crate::sys;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

/// The smallest and the largest ring.
const RINGS: (usize, usize) = (16 << 10, 4 << 20);

/// When a stream has proved worth an upgrade. A handshake costs some hundred microseconds, so a connection of few
/// bytes is better off without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UpgradeAfter {
    /// At once.
    Now,
    /// After so many bytes, sent and received.
    Bytes(u64),
    /// After so many calls that moved bytes.
    Calls(u32),
    /// Never: it is TCP, and its calls cost what those of `std::net` do.
    Never,
}

/// Options for a [`Stream`] or [`Listener`]; a listener gives its own to each stream that it accepts.
///
/// ```
/// use smc::net::{Builder, UpgradeAfter};
/// use std::time::Duration;
///
/// let mut builder = Builder::new();
/// builder.ring_size(1 << 20).upgrade_after(UpgradeAfter::Now).nodelay(true);
/// let listener = builder.listen("127.0.0.1:0")?;
/// let stream = builder.read_timeout(Duration::from_secs(1)).connect(listener.local_addr()?)?;
/// assert_eq!(stream.read_timeout()?, Some(Duration::from_secs(1)));
/// assert!(stream.nodelay()?);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Builder {
    ring: Option<usize>,
    upgrade: Option<UpgradeAfter>,
    nonblocking: bool,
    nodelay: Option<bool>,
    ttl: Option<u32>,
    linger: Option<Option<Duration>>,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
    connect_timeout: Option<Duration>,
    backlog: Option<i32>,
}

impl Builder {
    /// With std's defaults, and those of the environment for the ring and the upgrade.
    ///
    /// ```
    /// let listener = smc::net::Builder::new().listen("127.0.0.1:0")?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of this end's receive ring, rounded up to a power of two from 16 KiB to 4 MiB. Both ends' rings are of one
    /// size: what the connecting end wants, and no more than the accepting end does. The default is that of
    /// `SMC_RMB_SIZE`: 256 KiB, or 4 MiB where bulk is moved.
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.ring_size(64 << 10);
    /// ```
    pub fn ring_size(&mut self, bytes: usize) -> &mut Self {
        self.ring = Some(bytes.clamp(RINGS.0, RINGS.1).next_power_of_two());
        self
    }

    /// When a stream is upgraded. The default is that of `SMC_UPGRADE_AFTER`: 64 KiB or 8 calls, whichever is first.
    ///
    /// ```
    /// use smc::net::{Builder, UpgradeAfter};
    /// let mut builder = Builder::new();
    /// builder.upgrade_after(UpgradeAfter::Calls(2));
    /// ```
    pub fn upgrade_after(&mut self, after: UpgradeAfter) -> &mut Self {
        self.upgrade = Some(after);
        self
    }

    /// Whether calls that would wait fail with [`WouldBlock`](io::ErrorKind::WouldBlock) instead. Connecting waits
    /// nevertheless. Of a listener this is said of itself, not of its streams. The default is no.
    ///
    /// ```
    /// let listener = smc::net::Builder::new().nonblocking(true).listen("127.0.0.1:0")?;
    /// assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn nonblocking(&mut self, on: bool) -> &mut Self {
        self.nonblocking = on;
        self
    }

    /// `TCP_NODELAY` (tcp(7)): of what goes by TCP. The ring never delays.
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.nodelay(true);
    /// ```
    pub fn nodelay(&mut self, on: bool) -> &mut Self {
        self.nodelay = Some(on);
        self
    }

    /// `IP_TTL` (ip(7)).
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.ttl(64);
    /// ```
    pub fn ttl(&mut self, ttl: u32) -> &mut Self {
        self.ttl = Some(ttl);
        self
    }

    /// `SO_LINGER` (socket(7)): how long a close waits for TCP to send what it has; with zero it resets the connection.
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.linger(None);
    /// ```
    pub fn linger(&mut self, time: Option<Duration>) -> &mut Self {
        self.linger = Some(time);
        self
    }

    /// How long a read may wait, see [`Stream::set_read_timeout`].
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.read_timeout(std::time::Duration::from_millis(200));
    /// ```
    pub fn read_timeout(&mut self, time: Duration) -> &mut Self {
        self.read_timeout = Some(time);
        self
    }

    /// How long a write may wait, see [`Stream::set_write_timeout`].
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.write_timeout(std::time::Duration::from_millis(200));
    /// ```
    pub fn write_timeout(&mut self, time: Duration) -> &mut Self {
        self.write_timeout = Some(time);
        self
    }

    /// How long connecting may take, for each address that is tried.
    ///
    /// ```
    /// let mut builder = smc::net::Builder::new();
    /// builder.connect_timeout(std::time::Duration::from_secs(3));
    /// ```
    pub fn connect_timeout(&mut self, time: Duration) -> &mut Self {
        self.connect_timeout = Some(time);
        self
    }

    /// Connections that the kernel keeps until they are accepted (listen(2)). The default is std's.
    ///
    /// ```
    /// let listener = smc::net::Builder::new().backlog(1024).listen("127.0.0.1:0")?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn backlog(&mut self, connections: i32) -> &mut Self {
        self.backlog = Some(connections);
        self
    }

    /// Connects; waits until that has succeeded or failed.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let address = listener.local_addr()?;
    /// let stream = smc::net::Builder::new().nodelay(true).connect(address)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpStream::connect`], and of the options.
    pub fn connect(&self, address: impl ToSocketAddrs) -> io::Result<Stream> {
        self.prepare(self.connected(address)?, Origin::New(Side::Connect))
    }

    fn connected(&self, address: impl ToSocketAddrs) -> io::Result<TcpStream> {
        let Some(time) = self.connect_timeout else { return TcpStream::connect(address) };
        let mut last = None;
        for a in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&a, time) {
                Ok(tcp) => return Ok(tcp),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no addresses to connect to")))
    }

    /// Listens.
    ///
    /// ```
    /// let listener = smc::net::Builder::new().listen("127.0.0.1:0")?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpListener::bind`], and of the options.
    pub fn listen(&self, address: impl ToSocketAddrs) -> io::Result<Listener> {
        self.adopt_listener(TcpListener::bind(address)?)
    }

    /// Goes on with a listener that was made elsewhere.
    ///
    /// ```
    /// let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
    /// let listener = smc::net::Builder::new().ring_size(64 << 10).adopt_listener(tcp)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the options.
    pub fn adopt_listener(&self, tcp: TcpListener) -> io::Result<Listener> {
        if let Some(n) = self.backlog {
            result(sys::listen(tcp.as_raw_fd(), n))?;
        }
        if self.nonblocking {
            tcp.set_nonblocking(true)?;
        }
        let streams = Builder { nonblocking: false, ..self.clone() };
        Ok(Listener::new(tcp, streams))
    }

    /// Goes on with a connection that was made elsewhere, as [`Stream::from`] does, with these options.
    ///
    /// ```
    /// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    /// let tcp = std::net::TcpStream::connect(listener.local_addr()?)?;
    /// let stream = smc::net::Builder::new().ring_size(64 << 10).adopt(tcp)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the options.
    pub fn adopt(&self, tcp: TcpStream) -> io::Result<Stream> {
        self.prepare(tcp, Origin::Found)
    }

    /// A stream that has just been accepted.
    pub(super) fn accepted(&self, tcp: TcpStream) -> io::Result<Stream> {
        self.prepare(tcp, Origin::New(Side::Accept))
    }

    pub(super) fn prepare(&self, tcp: TcpStream, origin: Origin) -> io::Result<Stream> {
        let upgrade = self.upgrade != Some(UpgradeAfter::Never);
        let stream = Stream::new(Handle::new(tcp, origin, upgrade, || self.tuning()));
        if let Some(on) = self.nodelay {
            stream.set_nodelay(on)?;
        }
        if let Some(ttl) = self.ttl {
            stream.set_ttl(ttl)?;
        }
        if let Some(time) = self.linger {
            stream.set_linger(time)?;
        }
        if self.read_timeout.is_some() {
            stream.set_read_timeout(self.read_timeout)?;
        }
        if self.write_timeout.is_some() {
            stream.set_write_timeout(self.write_timeout)?;
        }
        if self.nonblocking {
            stream.set_nonblocking(true)?;
        }
        Ok(stream)
    }

    pub(super) fn tuning(&self) -> Tuning {
        let upgrade_after = match self.upgrade {
            Some(UpgradeAfter::Now) => Threshold { ops: 0, bytes: 0 },
            Some(UpgradeAfter::Bytes(bytes)) => Threshold { ops: u32::MAX, bytes },
            Some(UpgradeAfter::Calls(ops)) => Threshold { ops, bytes: u64::MAX },
            Some(UpgradeAfter::Never) | None => settings().upgrade_after,
        };
        Tuning { upgrade_after, ring_size: self.ring.unwrap_or(0) as u32 }
    }
}
