//! A stream: TCP, or memory, or first the one and then the other.
//!
//! | call | by the engine | left to libsmc.so, or never to be upgraded |
//! | --- | --- | --- |
//! | read, write, peek | `Socket::recv`, `Socket::send` | libc's recvmsg, sendmsg |
//! | shutdown | before and after the kernel's | the kernel's |
//! | time-outs, O_NONBLOCK | the kernel's, and noted | the kernel's |
//! | `reserve` | the ring, or a buffer that is sent | a buffer that is sent |

use super::core::{Core, Handle, Origin, is_preloaded, settings};
use super::{Builder, ConnectionInfo, Mode, Reason, result};
use crate::conn::{Reserved, SharedSlice};
use crate::sync::Ordering::Relaxed;
use crate::{stats, sys};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Most bytes that are reserved, or looked at, at a time where the stream does not go by the ring.
const MOST_COPIED: usize = 256 << 10;
const EAGAIN: isize = -(libc::EAGAIN as isize);
/// linux/net.h: the length of a struct linger.
const LINGER: usize = 8;

/// A connection: like [`TcpStream`], and faster where it can be (see the [module](super)).
///
/// Reading and writing by `&Stream` is possible as with std's, from several threads at once. Dropping the last handle
/// closes. All calls block unless [`set_nonblocking`](Self::set_nonblocking) says otherwise; they end with
/// [`Interrupted`](io::ErrorKind::Interrupted) where those of std would. No call raises SIGPIPE. None may be made in a
/// signal handler.
///
/// ```
/// use smc::net::{Listener, Stream};
/// use std::io::{Read, Write};
///
/// let listener = Listener::bind("127.0.0.1:0")?;
/// let mut client = Stream::connect(listener.local_addr()?)?;
/// let (mut server, _) = listener.accept()?;
/// client.write_all(b"to the server")?;
/// drop(client);
/// let mut all = String::new();
/// server.read_to_string(&mut all)?;
/// assert_eq!(all, "to the server");
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Stream {
    core: Handle,
    /// What is reserved where there is no ring.
    spare: Vec<u8>,
}

impl Stream {
    pub(super) fn new(core: Handle) -> Self {
        Stream { core, spare: Vec::new() }
    }

    /// Connects to the first of the addresses that can be reached. For options see [`Builder::connect`].
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let address = listener.local_addr()?;
    /// let stream = smc::net::Stream::connect(address)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpStream::connect`].
    pub fn connect(address: impl ToSocketAddrs) -> io::Result<Self> {
        Builder::new().connect(address)
    }

    /// Connects, and waits for that no longer than `time`.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let address = listener.local_addr()?;
    /// let stream = smc::net::Stream::connect_timeout(&address, std::time::Duration::from_secs(3))?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`TcpStream::connect_timeout`].
    pub fn connect_timeout(address: &SocketAddr, time: Duration) -> io::Result<Self> {
        Builder::new().connect_timeout(time).connect(address)
    }

    #[cfg(any(feature = "mio", feature = "tokio"))]
    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    // ---- bytes

    #[inline]
    fn recv(&self, bufs: &mut [IoSliceMut<'_>], flags: i32) -> io::Result<usize> {
        let core = &*self.core;
        if !core.tracked {
            return result(sys::libc_recv(core.fd, bufs, flags));
        }
        core.check_reserved()?;
        let mut first = true;
        loop {
            let n = core.sock.recv_slices(core.fd, bufs, flags);
            core.settle();
            if n != EAGAIN || !core.goes_to_wait(libc::POLLIN, std::mem::take(&mut first)) {
                return result(n);
            }
        }
    }

    #[inline]
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let core = &*self.core;
        if !core.tracked {
            return result(sys::libc_send(core.fd, bufs, libc::MSG_NOSIGNAL));
        }
        core.check_reserved()?;
        loop {
            let n = core.sock.send_slices(core.fd, bufs, 0);
            core.settle();
            if n != EAGAIN || !core.goes_to_wait(libc::POLLOUT, false) {
                return result(n);
            }
        }
    }

    /// Receives without taking: what is read next begins with the same bytes. Waits like a read.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::{Read, Write};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut client = Stream::connect(listener.local_addr()?)?;
    /// # let (mut stream, _) = listener.accept()?;
    /// client.write_all(b"x")?;
    /// let mut byte = [0];
    /// assert_eq!(stream.peek(&mut byte)?, 1);
    /// assert_eq!(stream.read(&mut byte)?, 1);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of recv(2).
    pub fn peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv(&mut [IoSliceMut::new(buf)], libc::MSG_PEEK)
    }

    /// Space for up to `most` bytes that are to be sent: where the stream goes by the ring it is the ring's own memory,
    /// so that what is written there is not copied again. For `most` or a quarter of the ring, whichever is less, there
    /// is room for certain; the call waits for it as a write does. Elsewhere it is a buffer (of 256 KiB at most), which
    /// [`commit`](Reservation::commit) sends.
    ///
    /// The reservation keeps other threads from sending by this stream's other handles, as one long write would. The
    /// same thread can't read or write by such a handle meanwhile: that fails with `EDEADLK`.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::{Read, Write};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// # let (mut server, _) = listener.accept()?;
    /// let mut space = stream.reserve(100)?;
    /// let n = space.write(b"in place")?;
    /// space.commit(n)?;
    /// # let mut got = [0; 8];
    /// # server.read_exact(&mut got)?;
    /// # assert_eq!(&got, b"in place");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of send(2): [`WouldBlock`](io::ErrorKind::WouldBlock) if the stream is not to wait, or its time is up. (A
    /// stream that goes by TCP says so at the commit.)
    pub fn reserve(&mut self, most: usize) -> io::Result<Reservation<'_>> {
        let core: &Core = &self.core;
        if core.tracked && most > 0 {
            core.check_reserved()?;
            let reserved = loop {
                let reserved = core.sock.reserve(core.fd, most);
                core.settle();
                if !matches!(reserved, Err(EAGAIN)) || !core.goes_to_wait(libc::POLLOUT, false) {
                    break reserved;
                }
            };
            if let Some(space) = reserved.map_err(|e| io::Error::from_raw_os_error(-e as i32))? {
                core.reserved.fetch_add(1, Relaxed);
                let (hold, space) = (Some(Hold(core)), Some(space));
                return Ok(Reservation { core, hold, space, spare: &mut self.spare, filled: 0 });
            }
        }
        self.spare.resize(most.min(MOST_COPIED), 0);
        Ok(Reservation { core, hold: None, space: None, spare: &mut self.spare, filled: 0 })
    }

    /// Calls `f` with bytes that are there, at most `most`, and consumes as many of them as it says (at most all). Waits
    /// like a read until there are some; at the end of the stream `f` is not called, and the result is 0 like that of a
    /// read. Where the stream goes by the ring the bytes are in the ring's own memory, and are copied by nobody but `f`.
    ///
    /// They come in two pieces, the second empty unless they go over the ring's end. Why no `&[u8]`: the memory is the
    /// peer's too, which could change it under a reference, and in Rust that must not be. (A `BufRead` straight over the
    /// ring would have to give one. [`Reader`](super::Reader) copies into a buffer that stays in the cache.) So copy
    /// what is looked at more than once, or hand it to the kernel: [`SharedSlice::write_to`].
    ///
    /// While `f` runs, other threads that read by other handles of the stream wait, and this thread must not.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::Write;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut client = Stream::connect(listener.local_addr()?)?;
    /// # let (mut stream, _) = listener.accept()?;
    /// client.write_all(b"GET")?;
    /// let mut method = [0; 3];
    /// let n = stream.consume_with(3, |[a, b]| {
    ///     let n = a.read(&mut method);
    ///     n + b.read(&mut method[n..])
    /// })?;
    /// assert_eq!(&method[..n], &b"GET"[..n]);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of recv(2).
    pub fn consume_with(
        &mut self,
        most: usize,
        f: impl FnOnce([SharedSlice<'_>; 2]) -> usize,
    ) -> io::Result<usize> {
        if most == 0 {
            return Ok(0);
        }
        loop {
            let core: &Core = &self.core;
            if core.tracked {
                core.check_reserved()?;
                let lent = core.sock.lend(core.fd, most);
                if let Some(lent) = lent.map_err(|e| io::Error::from_raw_os_error(-e as i32))? {
                    core.reserved.fetch_add(1, Relaxed);
                    let hold = Hold(core);
                    let n = f(lent.pieces()).min(lent.len());
                    lent.consume(n);
                    drop(hold);
                    core.settle();
                    return Ok(n);
                }
            }
            // None in the ring: whichever way they come, a peek waits for them.
            if core.tracked && self.peek(&mut [0])? > 0 && core.sock.rx_in_ring() {
                continue;
            }
            return self.consume_copied(most, f);
        }
    }

    /// [`consume_with`](Self::consume_with) of bytes that come by TCP.
    fn consume_copied(
        &mut self,
        most: usize,
        f: impl FnOnce([SharedSlice<'_>; 2]) -> usize,
    ) -> io::Result<usize> {
        let mut seen = std::mem::take(&mut self.spare);
        seen.resize(most.min(MOST_COPIED), 0);
        let got = self.peek(&mut seen);
        if let Ok(n @ 1..) = got {
            let used = f([SharedSlice::of(&mut seen[..n]), SharedSlice::of(&mut [])]).min(n);
            let mut left = used;
            while left > 0 {
                match self.skip(left)? {
                    0 => break,
                    n => left -= n,
                }
            }
            self.spare = seen;
            return Ok(used - left);
        }
        self.spare = seen;
        got
    }

    /// Takes and drops bytes that are known to be there.
    fn skip(&self, n: usize) -> io::Result<usize> {
        let core = &*self.core;
        if !core.tracked {
            return result(sys::libc_recv(core.fd, &mut [IoSliceMut::new(&mut vec![0; n])], 0));
        }
        let r = core.sock.skip(core.fd, n, 0);
        core.settle();
        result(r)
    }

    // ---- the connection

    /// The peer's address.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let address = listener.local_addr()?;
    /// assert_eq!(smc::net::Stream::connect(address)?.peer_addr()?, address);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getpeername(2).
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.core.with_tcp(TcpStream::peer_addr)
    }

    /// This end's address.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert!(stream.local_addr()?.ip().is_loopback());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.core.with_tcp(TcpStream::local_addr)
    }

    /// Ends what is read, written, or both. The peer reads all that was written, and then the end.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::{Read, Write};
    /// # use std::net::Shutdown;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// # let (mut peer, _) = listener.accept()?;
    /// stream.write_all(b"bye")?;
    /// stream.shutdown(Shutdown::Write)?;
    /// let mut all = Vec::new();
    /// peer.read_to_end(&mut all)?;
    /// assert_eq!(all, b"bye");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let core = &*self.core;
        let number = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        if core.tracked {
            core.check_reserved()?;
            core.sock.before_shutdown(core.fd, number);
        }
        let r = core.with_tcp(|t| t.shutdown(how));
        if core.tracked {
            core.sock.after_shutdown(number);
            core.settle();
        }
        r
    }

    /// Another handle of the same stream: what one reads the other does not, and options are of both. Unlike std's it
    /// takes no descriptor.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let stream = Stream::connect(listener.local_addr()?)?;
    /// let reader = stream.try_clone()?;
    /// assert_eq!(reader.local_addr()?, stream.local_addr()?);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// None; std's can fail.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Stream::new(self.core.clone()))
    }

    /// A half to read and one to write, for two threads. Dropping the one that writes shuts that direction down.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::{Read, Write};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let stream = Stream::connect(listener.local_addr()?)?;
    /// # let (mut peer, _) = listener.accept()?;
    /// let (mut reader, mut writer) = stream.split();
    /// writer.write_all(b"all")?;
    /// drop(writer);
    /// # let mut all = Vec::new();
    /// # peer.read_to_end(&mut all)?;
    /// # drop(peer);
    /// assert_eq!(reader.read(&mut [0; 8])?, 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        let other = Stream::new(self.core.clone());
        (ReadHalf(other), WriteHalf(Some(self)))
    }

    // ---- options

    /// How long a read may wait; `None`: for ever. Then it fails with [`WouldBlock`](io::ErrorKind::WouldBlock), as
    /// std's does on Linux.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::Read;
    /// # use std::time::Duration;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// # let (_peer, _) = listener.accept()?;
    /// stream.set_read_timeout(Some(Duration::from_millis(1)))?;
    /// assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) for a time of zero; those of setsockopt(2).
    pub fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        self.core.with_tcp(|t| t.set_read_timeout(time))?;
        self.core.sock.note_timeout(false, micros(time));
        Ok(())
    }

    /// How long a write may wait for room; `None`: for ever.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let stream = Stream::connect(listener.local_addr()?)?;
    /// stream.set_write_timeout(None)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`set_read_timeout`](Self::set_read_timeout).
    pub fn set_write_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        self.core.with_tcp(|t| t.set_write_timeout(time))?;
        self.core.sock.note_timeout(true, micros(time));
        Ok(())
    }

    /// See [`set_read_timeout`](Self::set_read_timeout).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert_eq!(stream.read_timeout()?, None);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
        self.core.with_tcp(TcpStream::read_timeout)
    }

    /// See [`set_write_timeout`](Self::set_write_timeout).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert_eq!(stream.write_timeout()?, None);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
        self.core.with_tcp(TcpStream::write_timeout)
    }

    /// Whether calls fail with [`WouldBlock`](io::ErrorKind::WouldBlock) instead of waiting. Of all handles.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::Read;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// stream.set_nonblocking(true)?;
    /// assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of ioctl(2).
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        self.core.with_tcp(|t| t.set_nonblocking(on))?;
        self.core.sock.note_nonblocking(on);
        Ok(())
    }

    /// `TCP_NODELAY`, see [`Builder::nodelay`].
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// stream.set_nodelay(true)?;
    /// assert!(stream.nodelay()?);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_nodelay(&self, on: bool) -> io::Result<()> {
        self.core.with_tcp(|t| t.set_nodelay(on))
    }

    /// See [`set_nodelay`](Self::set_nodelay).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert!(!stream.nodelay()?);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn nodelay(&self) -> io::Result<bool> {
        self.core.with_tcp(TcpStream::nodelay)
    }

    /// `IP_TTL` (ip(7)).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// stream.set_ttl(17)?;
    /// assert_eq!(stream.ttl()?, 17);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.core.with_tcp(|t| t.set_ttl(ttl))
    }

    /// See [`set_ttl`](Self::set_ttl).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert_ne!(stream.ttl()?, 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn ttl(&self) -> io::Result<u32> {
        self.core.with_tcp(TcpStream::ttl)
    }

    /// `SO_LINGER`, see [`Builder::linger`]. The kernel counts in seconds; a part of one counts as a whole.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// stream.set_linger(Some(std::time::Duration::from_secs(2)))?;
    /// assert_eq!(stream.linger()?, Some(std::time::Duration::from_secs(2)));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_linger(&self, time: Option<Duration>) -> io::Result<()> {
        let seconds = time.map(|t| t.as_secs().saturating_add(u64::from(t.subsec_nanos() > 0)));
        let mut l = [0; LINGER];
        l[..4].copy_from_slice(&i32::from(time.is_some()).to_ne_bytes());
        l[4..].copy_from_slice(&(seconds.unwrap_or(0).min(i32::MAX as u64) as i32).to_ne_bytes());
        result(sys::setsockopt(self.core.fd, libc::SOL_SOCKET, libc::SO_LINGER, &l)).map(drop)
    }

    /// See [`set_linger`](Self::set_linger).
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert_eq!(stream.linger()?, None);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn linger(&self) -> io::Result<Option<Duration>> {
        let mut l = [0; LINGER];
        sys::getsockopt(self.core.fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut l)
            .map_err(|e| io::Error::from_raw_os_error(-e as i32))?;
        let seconds = i32::from_ne_bytes([l[4], l[5], l[6], l[7]]);
        Ok((l[..4] != [0; 4]).then(|| Duration::from_secs(seconds.max(0) as u64)))
    }

    /// `SO_ERROR` (socket(7)), which this clears: also one that the kernel does not know of, such as the death of a peer
    /// that has left bytes unread in the ring.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// assert!(stream.take_error()?.is_none());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        let kernel = self.core.with_tcp(TcpStream::take_error)?;
        if !self.core.tracked {
            return Ok(kernel);
        }
        let number = kernel.and_then(|e| e.raw_os_error()).unwrap_or(0);
        let number = self.core.sock.so_error(self.core.fd, number);
        self.core.settle();
        Ok((number != 0).then(|| io::Error::from_raw_os_error(number)))
    }

    // ---- what it is

    /// The connection as `smc ss` shows it: modes, reason, counters.
    ///
    /// It costs some loads, but for a stream that is left to libsmc.so, where `/proc/self/fd` is looked through. `None`:
    /// nothing follows it, because of [`UpgradeAfter::Never`](super::UpgradeAfter::Never), `SMC_DISABLE`, or since there
    /// are no books to be had for it.
    ///
    /// ```
    /// # use smc::net::{Listener, Mode, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let stream = Stream::connect(listener.local_addr()?)?;
    /// if let Some(status) = stream.status() {
    ///     assert_eq!(status.mode(), Mode::Tcp, "as long as nothing has been sent");
    ///     println!("{} bytes sent, on TCP because of {:?}", status.tx_bytes(), status.reason);
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> Option<ConnectionInfo> {
        if self.core.tracked {
            let mut info = self.core.sock.info()?;
            // They are noted when the handshake begins.
            info.local = info.local.or(self.local_addr().ok());
            info.peer = info.peer.or(self.peer_addr().ok());
            return Some(info);
        }
        if !is_preloaded() {
            return None;
        }
        let (local, peer) = (self.local_addr().ok()?, self.peer_addr().ok()?);
        let (_, all) = stats::process(std::process::id())?;
        all.into_iter().find(|c| (c.local, c.peer) == (Some(local), Some(peer)))
    }

    /// By which way bytes go: that of the better direction.
    ///
    /// ```
    /// # use smc::net::{Listener, Mode, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// assert_eq!(Stream::connect(listener.local_addr()?)?.mode(), Mode::Tcp);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.status().map_or(Mode::Tcp, |s| s.mode())
    }

    /// Why it is on TCP, if it is and that is known.
    ///
    /// ```
    /// # use smc::net::{Listener, Reason, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let stream = Stream::connect(listener.local_addr()?)?;
    /// if let Some(reason) = stream.reason() {
    ///     println!("{reason}: {}", reason.explain());
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self.status() {
            Some(s) => s.reason.filter(|_| s.mode() == Mode::Tcp),
            None => settings().disable.then_some(Reason::Disabled),
        }
    }

    // ---- and back

    /// The TCP socket itself, for code that knows nothing of this crate, and the bytes that have arrived and are unread:
    /// they come before all that the socket gives. A stream that goes by memory goes back to TCP in mid-stream, whatever
    /// the peer is doing; no byte is lost, and the peer's program notices nothing.
    ///
    /// The bytes are those in the ring, and what the kernel has of those before them; there are none if the stream went by TCP.
    /// With other handles of the stream ([`try_clone`](Self::try_clone)) the socket is a duplicate, and they go on by
    /// TCP too.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::{Read, Write};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut client = Stream::connect(listener.local_addr()?)?;
    /// # let (stream, _) = listener.accept()?;
    /// client.write_all(b"for whoever reads")?;
    /// drop(client);
    /// let (mut tcp, mut all) = stream.into_tcp()?;
    /// tcp.read_to_end(&mut all)?;
    /// assert_eq!(all, b"for whoever reads");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// The stream, and why: bytes that the peer has asked back to TCP have to be taken by TCP first, and it did not
    /// ([`WouldBlock`](io::ErrorKind::WouldBlock) if the stream is not to wait, or its time is up). Or there is no
    /// descriptor for the duplicate.
    pub fn into_tcp(self) -> Result<(TcpStream, Vec<u8>), IntoTcpError> {
        let unread = match self.leave() {
            Ok(unread) => unread,
            Err(error) => return Err(IntoTcpError { error, stream: Some(self) }),
        };
        match self.core.into_tcp() {
            Ok(tcp) => Ok((tcp, unread)),
            Err(error) => Err(IntoTcpError { error, stream: None }),
        }
    }

    /// Back to TCP for good. What was in the ring.
    fn leave(&self) -> io::Result<Vec<u8>> {
        let (core, mut unread) = (&*self.core, Vec::new());
        if !core.tracked {
            return Ok(unread);
        }
        core.check_reserved()?;
        core.sock.leave_for_good(core.fd, Reason::AskedFor);
        result(core.sock.flush_left(core.fd))?;
        let mut piece = vec![0; 64 << 10];
        while core.sock.is_in_ring() {
            // No read that waits: behind the ring's rest it would wait for TCP.
            let into = &mut [IoSliceMut::new(&mut piece)];
            match result(core.sock.recv_slices(core.fd, into, libc::MSG_DONTWAIT)) {
                Ok(0) => break,
                Ok(n) => unread.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && core.sock.is_in_ring() => {
                    core.sock.await_tcp(core.fd);
                }
                // An error the socket tells as well, and what is read must not get lost.
                Err(_) => break,
            }
        }
        core.settle();
        Ok(unread)
    }
}

fn micros(time: Option<Duration>) -> u64 {
    // As std, which gives the kernel no less than a microsecond.
    time.map_or(0, |t| (t.as_micros().min(u64::MAX.into()) as u64).max(1))
}

impl Core {
    /// A thread with a reservation would wait for itself.
    #[inline]
    fn check_reserved(&self) -> io::Result<()> {
        if self.reserved.load(Relaxed) != 0 && self.sock.is_reserved_here() {
            return Err(io::Error::from_raw_os_error(libc::EDEADLK));
        }
        Ok(())
    }

    /// After a call: what else its switching needs.
    #[inline]
    pub(super) fn settle(&self) {
        if self.sock.has_changed() {
            self.sock.call_ends(self.fd);
            if self.sock.take_changed() {
                #[cfg(feature = "mio")]
                self.watch.changed(self);
                #[cfg(feature = "tracing")]
                self.events.changed(self);
            }
        }
    }

    /// A call that does not wait has found nothing to do, and its caller may wait for an event now. True: look again.
    #[inline]
    fn goes_to_wait(&self, events: i16, first: bool) -> bool {
        self.sock.is_watched() && self.sock.rearm(self.fd, events as u32, first)
    }
}

/// Counts a reservation off.
struct Hold<'a>(&'a Core);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        // Relaxed: it says to this very thread that it has none.
        self.0.reserved.fetch_sub(1, Relaxed);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut d = f.debug_struct("Stream");
        d.field("local", &self.local_addr().ok()).field("peer", &self.peer_addr().ok());
        d.field("fd", &self.core.fd).field("mode", &self.mode()).finish()
    }
}

impl Read for &Stream {
    #[inline]
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv(&mut [IoSliceMut::new(buf)], 0)
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.recv(bufs, 0)
    }
}

impl Read for Stream {
    #[inline]
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buf)
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(bufs)
    }
}

impl Write for &Stream {
    #[inline]
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(bufs)
    }

    /// Nothing is kept back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Stream {
    #[inline]
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self).write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(bufs)
    }

    /// Nothing is kept back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that was made elsewhere, with the default options; for others see [`Builder::adopt`]. It may have been
/// used: what it has moved is asked of the kernel.
///
/// No other handle of it may read or write from then on, in this process or another (a clone of the `TcpStream`, a
/// descriptor that was inherited): what came by that way would be missing here. As long as the counts of both ends agree
/// with the kernel's that can't be seen.
///
/// ```
/// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let tcp = std::net::TcpStream::connect(listener.local_addr()?)?;
/// let stream = smc::net::Stream::from(tcp);
/// # Ok::<(), std::io::Error>(())
/// ```
impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Stream::new(Handle::new(tcp, Origin::Found, true, || Builder::new().tuning()))
    }
}

/// Of the TCP socket: for its options, not for its bytes, see the [module](super).
impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.as_fd()
    }
}

/// Of the TCP socket: for its options, not for its bytes, see the [module](super).
impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.core.fd
    }
}

/// [`Stream::into_tcp`] has failed.
///
/// ```
/// # use smc::net::{Listener, Stream};
/// # let listener = Listener::bind("127.0.0.1:0")?;
/// # let stream = Stream::connect(listener.local_addr()?)?;
/// match stream.into_tcp() {
///     Ok((tcp, unread)) => assert!(unread.is_empty() && tcp.peer_addr().is_ok()),
///     Err(e) => {
///         eprintln!("{e}");
///         let _once_more = e.into_stream();
///     }
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct IntoTcpError {
    error: io::Error,
    stream: Option<Stream>,
}

impl IntoTcpError {
    /// Why.
    ///
    /// ```
    /// fn is_to_be_repeated(e: &smc::net::IntoTcpError) -> bool {
    ///     e.error().kind() == std::io::ErrorKind::WouldBlock
    /// }
    /// ```
    #[must_use]
    pub fn error(&self) -> &io::Error {
        &self.error
    }

    /// The stream, which goes on as it was; none if it was only the duplicate that could not be had (another handle goes
    /// on then).
    ///
    /// ```
    /// fn give_up(e: smc::net::IntoTcpError) {
    ///     drop(e.into_stream());
    /// }
    /// ```
    #[must_use]
    pub fn into_stream(self) -> Option<Stream> {
        self.stream
    }
}

impl fmt::Display for IntoTcpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the stream could not go back to TCP: {}", self.error)
    }
}

impl std::error::Error for IntoTcpError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<IntoTcpError> for io::Error {
    fn from(e: IntoTcpError) -> Self {
        e.error
    }
}

/// Space that [`Stream::reserve`] gives: to be filled, and sent by [`commit`](Self::commit). Dropped without, nothing is
/// sent.
///
/// It can be filled in order, by `Write` (which ends when it is full) or [`fill_from`](Self::fill_from), or anywhere
/// through [`pieces`](Self::pieces).
///
/// ```
/// # use smc::net::{Listener, Stream};
/// # use std::io::{Read, Write};
/// # let listener = Listener::bind("127.0.0.1:0")?;
/// # let mut stream = Stream::connect(listener.local_addr()?)?;
/// # let (mut server, _) = listener.accept()?;
/// let mut space = stream.reserve(64)?;
/// write!(space, "{} and {}", 1, 2)?;
/// let n = space.filled();
/// space.commit(n)?;
/// # let mut got = [0; 7];
/// # server.read_exact(&mut got)?;
/// # assert_eq!(&got, b"1 and 2");
/// # Ok::<(), std::io::Error>(())
/// ```
#[must_use = "nothing is sent before the commit"]
pub struct Reservation<'a> {
    core: &'a Core,
    hold: Option<Hold<'a>>,
    /// The ring's, or none: `spare`.
    space: Option<Reserved<'a>>,
    spare: &'a mut Vec<u8>,
    filled: usize,
}

impl Reservation<'_> {
    /// Bytes that there is room for: at least 1, unless none were wanted.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// assert_eq!(stream.reserve(100)?.len(), 100);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn len(&self) -> usize {
        self.space.as_ref().map_or(self.spare.len(), Reserved::len)
    }

    /// Whether there is room for none.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// assert!(!stream.reserve(1)?.is_empty());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is the ring's own memory.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// assert!(!stream.reserve(1)?.is_in_ring(), "nothing has been sent yet");
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn is_in_ring(&self) -> bool {
        self.space.is_some()
    }

    /// Bytes filled in order so far.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::Write;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// let mut space = stream.reserve(8)?;
    /// space.write_all(b"abc")?;
    /// assert_eq!(space.filled(), 3);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// All of the space, in two pieces; the second is empty unless it goes over the ring's end.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// let mut space = stream.reserve(8)?;
    /// let [a, b] = space.pieces();
    /// a.fill(b'a');
    /// b.fill(b'b');
    /// space.commit(8)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn pieces(&mut self) -> [SharedSlice<'_>; 2] {
        match &self.space {
            Some(s) => s.pieces(),
            None => [SharedSlice::of(self.spare), SharedSlice::of(&mut [])],
        }
    }

    /// What is not filled yet.
    fn rest(&mut self) -> [SharedSlice<'_>; 2] {
        let filled = self.filled;
        let [a, b] = self.pieces();
        let in_b = filled.saturating_sub(a.len());
        [a.part(filled, usize::MAX), b.part(in_b, usize::MAX)]
    }

    /// Reads from a file (or pipe, or socket) straight into the space, behind what is filled: bytes, 0 at the file's
    /// end or if the space is full. One call of readv(2), which waits as the file does.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// let file = std::fs::File::open("/etc/passwd")?;
    /// let mut space = stream.reserve(4096)?;
    /// let n = space.fill_from(&file)?;
    /// space.commit(n)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of readv(2).
    pub fn fill_from(&mut self, file: impl AsFd) -> io::Result<usize> {
        let rest = self.rest();
        if rest.iter().all(SharedSlice::is_empty) {
            return Ok(0);
        }
        let n = result(SharedSlice::read_from(&rest, file.as_fd().as_raw_fd()))?;
        self.filled += n;
        Ok(n)
    }

    /// Sends the first `n` bytes. Where the space is the ring's this copies nothing and does not wait, unless the peer
    /// wants the stream back on TCP; elsewhere it is a write of all of them.
    ///
    /// ```
    /// # use smc::net::{Listener, Stream};
    /// # use std::io::Write;
    /// # let listener = Listener::bind("127.0.0.1:0")?;
    /// # let mut stream = Stream::connect(listener.local_addr()?)?;
    /// let mut space = stream.reserve(8)?;
    /// space.write_all(b"12345678")?;
    /// space.commit(4)?;
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of send(2). By TCP a part may have been sent then, as by
    /// [`write_all`](Write::write_all); a stream that is not to wait should rather be written to.
    ///
    /// # Panics
    /// If `n` is more than [`len`](Self::len).
    pub fn commit(mut self, n: usize) -> io::Result<()> {
        assert!(n <= self.len(), "{n} of {} bytes", self.len());
        let core = self.core;
        let Some(space) = self.space.take() else { return send_all(core, &self.spare[..n]) };
        space.commit(n);
        drop(self.hold.take());
        let r = match core.sock.flush_left(core.fd) {
            // It goes on with the next calls.
            e if e == -(libc::EAGAIN as isize) => Ok(()),
            e => result(e).map(drop),
        };
        core.settle();
        r
    }
}

fn send_all(core: &Core, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let piece = [IoSlice::new(bytes)];
        let n = if core.tracked {
            let n = core.sock.send_slices(core.fd, &piece, 0);
            core.settle();
            n
        } else {
            sys::libc_send(core.fd, &piece, libc::MSG_NOSIGNAL)
        };
        match result(n) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Write for Reservation<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let [a, b] = self.rest();
        let n = a.write(buf);
        let n = n + b.write(&buf[n..]);
        self.filled += n;
        Ok(n)
    }

    /// Does nothing: [`commit`](Reservation::commit) sends.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Reservation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut d = f.debug_struct("Reservation");
        d.field("len", &self.len())
            .field("filled", &self.filled)
            .field("in_ring", &self.is_in_ring())
            .finish()
    }
}

/// The half of a [`Stream`] that reads, see [`Stream::split`].
///
/// ```
/// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
/// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
/// let (reader, writer) = stream.split();
/// let stream = reader.reunite(writer).expect("they belong together");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct ReadHalf(Stream);

impl ReadHalf {
    /// The stream again, if the other half is of the same; else both halves.
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let connect = || smc::net::Stream::connect(listener.local_addr().unwrap()).unwrap();
    /// let (reader, _) = connect().split();
    /// let (_, writer) = connect().split();
    /// assert!(reader.reunite(writer).is_err());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Both halves, if they are not of one stream.
    pub fn reunite(self, mut writer: WriteHalf) -> Result<Stream, (ReadHalf, WriteHalf)> {
        match writer.0.take() {
            Some(stream) if std::ptr::eq(&*stream.core, &*self.0.core) => Ok(stream),
            stream => Err((self, WriteHalf(stream))),
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.read_vectored(bufs)
    }
}

impl AsRef<Stream> for ReadHalf {
    fn as_ref(&self) -> &Stream {
        &self.0
    }
}

/// The half of a [`Stream`] that writes, see [`Stream::split`]: dropping it shuts that direction down.
///
/// ```
/// # use std::io::Write;
/// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
/// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
/// let (_reader, mut writer) = stream.split();
/// writer.write_all(b"the last")?;
/// drop(writer);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct WriteHalf(Option<Stream>);

impl WriteHalf {
    fn stream(&mut self) -> io::Result<&mut Stream> {
        self.0.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// See [`Stream::reserve`].
    ///
    /// ```
    /// # let listener = smc::net::Listener::bind("127.0.0.1:0")?;
    /// # let stream = smc::net::Stream::connect(listener.local_addr()?)?;
    /// let (_reader, mut writer) = stream.split();
    /// assert_eq!(writer.reserve(10)?.len(), 10);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Stream::reserve`].
    pub fn reserve(&mut self, most: usize) -> io::Result<Reservation<'_>> {
        self.stream()?.reserve(most)
    }
}

impl Write for WriteHalf {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream()?.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream()?.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            // It may be shut down already, or the peer gone.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}
