//! Streams and listeners for tokio (feature `tokio`).
//!
//! They are what [`smc::net`](super) has, with [`AsyncRead`] and [`AsyncWrite`]. hyper, tonic and whatever else takes such
//! streams runs on them unchanged.
//!
//! ```
//! use smc::net::tokio::{Listener, Stream};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
//! let listener = Listener::bind("127.0.0.1:0").await?;
//! let mut client = Stream::connect(listener.local_addr()?).await?;
//! let (mut server, _) = listener.accept().await?;
//! client.write_all(b"hello").await?;
//! let mut got = [0; 5];
//! server.read_exact(&mut got).await?;
//! assert_eq!(&got, b"hello");
//! # Ok::<(), std::io::Error>(())
//! # })?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # How a task waits
//!
//! A call that finds nothing to do arms the doorbell, looks once more, and waits for an edge of the doorbell or of the TCP
//! socket, each of which is an [`AsyncFd`]. Why no wake-up is lost is told at `Socket::rearm`. A task that always finds
//! something yields by tokio's budget.

use super::core::Core;
use super::{Builder, ConnectionInfo, IntoTcpError, Mode, Reason, Stream as Blocking};
use ::tokio::io::unix::AsyncFd;
use ::tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use ::tokio::net::{TcpListener, ToSocketAddrs};
use ::tokio::runtime::Handle;
use std::future::Future as _;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::{Pin, pin};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};

/// A number that somebody else keeps open.
#[derive(Debug)]
struct Number(RawFd);

impl AsRawFd for Number {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

type Watched = AsyncFd<Number>;

#[allow(
    deprecated,
    reason = "what takes its place says in words that the number must stay open, and is not in older tokios"
)]
fn watched(fd: RawFd) -> io::Result<Watched> {
    // The number stays open: a Stream drops these before its connection.
    AsyncFd::with_interest(Number(fd), Interest::READABLE | Interest::WRITABLE)
}

/// A connection, for tokio's tasks.
///
/// One task may read and another write (`tokio::io::split`). It belongs to the runtime in which it was made.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
/// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
/// let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
/// assert_eq!(stream.peer_addr()?, listener.local_addr()?);
/// # Ok::<(), std::io::Error>(())
/// # })?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Stream {
    // These two go first: they leave the runtime's set while the numbers are still theirs.
    tcp: Watched,
    bell: OnceLock<Watched>,
    /// Who waits to write, for the case that a reader has taken its place ([`Stream::flush_for_reader`]).
    writer: Mutex<Option<Waker>>,
    runtime: Handle,
    stream: Blocking,
}

impl Stream {
    /// Connects to the first of the addresses that can be reached.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpStream::connect`](::tokio::net::TcpStream::connect).
    pub async fn connect(address: impl ToSocketAddrs) -> io::Result<Self> {
        Self::connect_with(&Builder::new(), address).await
    }

    /// Connects, with options. Of these `connect_timeout` has no meaning here: use `tokio::time::timeout`.
    ///
    /// ```
    /// use smc::net::{Builder, UpgradeAfter};
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// let mut options = Builder::new();
    /// options.upgrade_after(UpgradeAfter::Now);
    /// let stream = smc::net::tokio::Stream::connect_with(&options, listener.local_addr()?).await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect), and of the options.
    pub async fn connect_with(options: &Builder, address: impl ToSocketAddrs) -> io::Result<Self> {
        let tcp = ::tokio::net::TcpStream::connect(address).await?.into_std()?;
        Self::new(options.connected_by(tcp)?)
    }

    /// Goes on with a stream that was made elsewhere, which does not wait from now on. In a runtime.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    /// let blocking = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let stream = smc::net::tokio::Stream::new(blocking)?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of epoll_ctl(2): none but for want of memory, or if the stream is in the runtime already.
    ///
    /// # Panics
    /// Outside of a runtime with I/O.
    pub fn new(stream: Blocking) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let tcp = watched(stream.as_raw_fd())?;
        let runtime = Handle::current();
        Ok(Stream { tcp, bell: OnceLock::new(), writer: Mutex::new(None), runtime, stream })
    }

    /// The stream without the runtime. It does not wait, see [`set_nonblocking`](Blocking::set_nonblocking).
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?.into_blocking();
    /// stream.set_nonblocking(false)?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn into_blocking(self) -> Blocking {
        // The numbers leave the set before the stream goes on.
        let Stream { tcp, bell, writer: _, runtime: _, stream } = self;
        drop((tcp, bell));
        stream
    }

    /// As [`Blocking::into_tcp`]: std's socket, which does not wait, and what comes before its bytes.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// let (tcp, unread) = stream.into_tcp()?;
    /// let tcp = tokio::net::TcpStream::from_std(tcp)?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Blocking::into_tcp`].
    pub fn into_tcp(self) -> Result<(TcpStream, Vec<u8>), IntoTcpError> {
        self.into_blocking().into_tcp()
    }

    /// The peer's address.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// assert_eq!(stream.peer_addr()?, listener.local_addr()?);
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getpeername(2).
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// This end's address.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// assert!(stream.local_addr()?.ip().is_loopback());
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// `TCP_NODELAY`, see [`Builder::nodelay`].
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// stream.set_nodelay(true)?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        self.stream.set_nodelay(on)
    }

    /// See [`Blocking::status`].
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// println!("{:?}", stream.status());
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> Option<ConnectionInfo> {
        self.stream.status()
    }

    /// See [`Blocking::mode`].
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// assert_eq!(stream.mode(), smc::net::Mode::Tcp);
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.stream.mode()
    }

    /// See [`Blocking::reason`].
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// println!("{:?}", stream.reason());
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.stream.reason()
    }

    // ---- waiting

    fn core(&self) -> &Core {
        self.stream.core()
    }

    /// The doorbell, in the runtime's set as soon as there is one.
    fn bell(&self) -> Option<&Watched> {
        if self.bell.get().is_none() && self.core().sock.needs_bell() {
            self.make_bell();
        }
        self.bell.get()
    }

    #[cold]
    fn make_bell(&self) {
        let core = self.core();
        // One task at a time: a second one is not to wait before there is something to wait for.
        let _one = self.writer();
        let Some(bell) = core.sock.bell().filter(|_| self.bell.get().is_none()) else { return };
        let _runtime = self.runtime.enter();
        match watched(bell) {
            Ok(w) => _ = self.bell.set(w),
            // Nobody would hear of the ring.
            Err(_) => core.sock.leave_for_good(core.fd, Reason::NoFds),
        }
    }

    /// Calls `f`, which does not wait, until it has done something; then its result.
    fn poll_io<R>(
        &self,
        cx: &mut Context<'_>,
        events: i16,
        mut f: impl FnMut(&Blocking) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        ready!(pin!(::tokio::task::coop::consume_budget()).poll(cx));
        let (core, mut first) = (self.core(), true);
        loop {
            match f(&self.stream) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                done => return Poll::Ready(done),
            }
            let bell = self.bell();
            if core.tracked && core.sock.rearm(core.fd, events as u32, std::mem::take(&mut first)) {
                continue;
            }
            if events == libc::POLLOUT {
                *self.writer() = Some(cx.waker().clone());
            }
            let mut looks = self.poll_edge(cx, &self.tcp, events)?;
            if let Some(bell) = bell {
                looks |= self.poll_edge(cx, bell, events)?;
            }
            if events == libc::POLLIN {
                looks |= self.flush_for_reader(cx)?;
            }
            if !looks {
                return Poll::Pending;
            }
        }
    }

    fn writer(&self) -> std::sync::MutexGuard<'_, Option<Waker>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there has been an edge since the last look. If not the task will be woken by the next.
    fn poll_edge(&self, cx: &mut Context<'_>, of: &Watched, events: i16) -> io::Result<bool> {
        let edge = if events == libc::POLLIN { of.poll_read_ready(cx) } else { of.poll_write_ready(cx) };
        match edge {
            Poll::Ready(guard) => {
                guard?.clear_ready();
                Ok(true)
            }
            Poll::Pending => Ok(false),
        }
    }

    /// Bytes that have left the ring go by TCP when that takes them, whoever waits and for what. The one place for who
    /// waits for that is the reader's then, and it wakes the writer in turn.
    fn flush_for_reader(&self, cx: &mut Context<'_>) -> io::Result<bool> {
        let core = self.core();
        let flushing = core.sock.flushing();
        if flushing {
            core.sock.progress(core.fd);
            core.settle();
        }
        let still = core.sock.flushing();
        if flushing
            && !still
            && let Some(w) = self.writer().take()
        {
            w.wake();
        }
        if still { self.poll_edge(cx, &self.tcp, libc::POLLOUT) } else { Ok(false) }
    }
}

impl Builder {
    fn connected_by(&self, tcp: TcpStream) -> io::Result<Blocking> {
        self.prepare(tcp, super::core::Origin::New(crate::conn::Side::Connect))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let into = buf.initialize_unfilled();
        let n = ready!(self.poll_io(cx, libc::POLLIN, |mut s| s.read(into)))?;
        buf.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_io(cx, libc::POLLOUT, |mut s| s.write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_io(cx, libc::POLLOUT, |mut s| s.write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Waits until TCP has taken what has left the ring, if there is such.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let core = self.core();
        if !core.sock.flushing() {
            return Poll::Ready(Ok(()));
        }
        self.poll_io(cx, libc::POLLOUT, |_| super::result(core.sock.flush_left(core.fd)).map(drop))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(cx))?;
        match self.stream.shutdown(Shutdown::Write) {
            // As tokio's: it is shut, by the peer's reset.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            r => Poll::Ready(r),
        }
    }
}

/// For options, and for another handle ([`try_clone`](Blocking::try_clone)) that looks at it while some other owner has the
/// stream. Its calls do not wait.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
/// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
/// let stream = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
/// stream.as_ref().set_ttl(30)?;
/// # Ok::<(), std::io::Error>(())
/// # })?;
/// # Ok::<(), std::io::Error>(())
/// ```
impl AsRef<Blocking> for Stream {
    fn as_ref(&self) -> &Blocking {
        &self.stream
    }
}

/// Of the TCP socket: for its options, not for its bytes, see [`smc::net`](super).
impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Listens for connections, for tokio's tasks.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
/// let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
/// let client = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
/// let (server, address) = listener.accept().await?;
/// assert_eq!(address, client.local_addr()?);
/// # Ok::<(), std::io::Error>(())
/// # })?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    streams: Builder,
}

impl Listener {
    /// Listens at the first of the addresses that can be had.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpListener::bind`].
    pub async fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Listener { tcp: TcpListener::bind(address).await?, streams: Builder::new() })
    }

    /// Goes on with a listener that was made elsewhere, for one with the options of a [`Builder`]. In a runtime.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// let blocking = smc::net::Builder::new().ring_size(64 << 10).listen("127.0.0.1:0")?;
    /// let listener = smc::net::tokio::Listener::new(blocking)?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside of a runtime with I/O.
    pub fn new(listener: super::Listener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (tcp, streams) = listener.into_both();
        Ok(Listener { tcp: TcpListener::from_std(tcp)?, streams })
    }

    /// Waits for a connection and takes it; with the peer's address. Cancellation loses none.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// # let listener = smc::net::tokio::Listener::bind("127.0.0.1:0").await?;
    /// # let client = smc::net::tokio::Stream::connect(listener.local_addr()?).await?;
    /// let (stream, address) = listener.accept().await?;
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of accept(2).
    pub async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (tcp, address) = self.tcp.accept().await?;
        Ok((Stream::new(self.streams.accepted(tcp.into_std()?)?)?, address))
    }

    /// The address it listens at.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
    /// assert_ne!(smc::net::tokio::Listener::bind("127.0.0.1:0").await?.local_addr()?.port(), 0);
    /// # Ok::<(), std::io::Error>(())
    /// # })?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Of the listener.
impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.tcp.as_raw_fd()
    }
}
