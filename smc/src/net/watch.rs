//! Streams in a mio `Poll` (feature `mio`), which is epoll told of edges.
//!
//! | descriptor of a stream | in the set | what its events mean |
//! | --- | --- | --- |
//! | the TCP socket | from `register` on | as ever: bytes and room in TCP, the end, errors |
//! | the doorbell | as soon as the stream has one | the peer has rung: bytes or room in the ring, or the peer wants something |
//! | the kick, an eventfd that is always readable | at the first need | none; changing its registration makes the event |
//!
//! All of them carry the token that the program gave. mio's contract is that whoever has had an event goes on until
//! [`WouldBlock`](std::io::ErrorKind::WouldBlock), and hears of nothing before that. So that is the moment at which a
//! stream arms its doorbell and looks once more (`Socket::rearm`, which says why no wake-up is lost). A registration
//! that is new or changed reports what is ready at that time, as in epoll: the ring's part of it by the kick.
//!
//! An event may say more than is so (that there is room, when there are bytes): mio allows that.

use super::core::Core;
use super::{Listener, Stream};
use crate::conn::Socket;
use crate::fd::Fd;
use crate::reason::Reason;
use crate::sys;
use mio::event::Source;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What a stream knows of the registry that it is in.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Option<Registration>>);

#[derive(Debug)]
struct Registration {
    registry: Arc<Registry>,
    token: Token,
    interests: Interest,
    /// The doorbell, if it is in the set.
    bell: Option<RawFd>,
    kick: Option<Fd>,
    /// TCP is watched for room as well, for bytes that have left the ring.
    flushes: bool,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Option<Registration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(
        &self,
        core: &Core,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&core.fd).register(registry, token, interests)?;
        if !core.tracked {
            return Ok(());
        }
        let done = shared(registry).and_then(|registry| {
            let new = Registration { registry, token, interests, bell: None, kick: None, flushes: false };
            let mut lock = self.lock();
            let r = lock.insert(new);
            core.sock.set_watched(true);
            r.follow(core);
            r.show(core)
        });
        if done.is_err() {
            let _ = self.deregister(core, registry);
        }
        done
    }

    fn reregister(
        &self,
        core: &Core,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&core.fd).reregister(registry, token, interests)?;
        let mut lock = self.lock();
        let Some(r) = lock.as_mut() else { return Ok(()) };
        (r.token, r.interests, r.flushes) = (token, interests, false);
        if let Some(bell) = r.bell {
            SourceFd(&bell).reregister(&r.registry, token, with_rings(interests))?;
        }
        r.follow(core);
        r.show(core)
    }

    fn deregister(&self, core: &Core, registry: &Registry) -> io::Result<()> {
        core.sock.set_watched(false);
        if let Some(mut r) = self.lock().take() {
            r.forget_rings();
        }
        SourceFd(&core.fd).deregister(registry)
    }

    /// The stream ends, or is ours no more: `tcp`, which stays open.
    pub fn end(&self, fd: RawFd, tcp: bool) {
        if let Some(mut r) = self.lock().take() {
            r.forget_rings();
            if tcp {
                let _ = SourceFd(&fd).deregister(&r.registry);
            }
        }
    }

    /// In a forked child: what is in the set is the parent's, and stays there.
    pub fn forget(&self, sock: &Socket) {
        sock.set_watched(false);
        // Held by a thread that the child does not have: what it was about to change is left alone.
        if let Ok(mut r) = self.0.try_lock() {
            drop(r.take());
        }
    }

    /// A direction has switched.
    #[cold]
    pub fn changed(&self, core: &Core) {
        if let Some(r) = self.lock().as_mut() {
            r.follow(core);
        }
    }
}

/// A ring is a byte to read, whatever it is rung for. A doorbell has always room for one, so that an event of it says so
/// to who asks for room.
fn with_rings(interests: Interest) -> Interest {
    interests.add(Interest::READABLE)
}

impl Registration {
    /// The set has what the stream needs now.
    fn follow(&mut self, core: &Core) {
        if self.bell.is_none()
            && core.sock.needs_bell()
            && let Some(bell) = core.sock.bell()
        {
            match SourceFd(&bell).register(&self.registry, self.token, with_rings(self.interests)) {
                Ok(()) => self.bell = Some(bell),
                // Nobody would hear of the ring.
                Err(_) => core.sock.leave_for_good(core.fd, Reason::NoFds),
            }
        }
        let flushes = core.sock.flushing();
        if flushes != self.flushes && !self.interests.is_writable() {
            let interests = if flushes { self.interests.add(Interest::WRITABLE) } else { self.interests };
            if SourceFd(&core.fd).reregister(&self.registry, self.token, interests).is_ok() {
                self.flushes = flushes;
            }
        }
    }

    /// What is ready by the ring is reported.
    fn show(&mut self, core: &Core) -> io::Result<()> {
        let events =
            [(self.interests.is_readable(), libc::POLLIN), (self.interests.is_writable(), libc::POLLOUT)];
        let events = events.iter().filter(|e| e.0).fold(0, |all, e| all | e.1 as u32);
        if self.bell.is_some() && core.sock.rearm(core.fd, events, true) { self.kick() } else { Ok(()) }
    }

    fn kick(&mut self) -> io::Result<()> {
        match &self.kick {
            Some(k) => SourceFd(&k.raw()).reregister(&self.registry, self.token, self.interests),
            None => {
                let k = sys::readable_eventfd().map_err(io::Error::from_raw_os_error)?;
                SourceFd(&k.raw()).register(&self.registry, self.token, self.interests)?;
                self.kick = Some(k);
                Ok(())
            }
        }
    }

    /// Explicitly: a forked child may keep the same open files, so that closing ours does not take them out.
    fn forget_rings(&mut self) {
        if let Some(bell) = self.bell.take() {
            let _ = SourceFd(&bell).deregister(&self.registry);
        }
        if let Some(k) = self.kick.take() {
            let _ = SourceFd(&k.raw()).deregister(&self.registry);
        }
    }
}

/// The registry for keeps: a stream finds out that it needs the doorbell in the set when nobody is there to give it one. All
/// streams of a `Poll` share it, and so a descriptor.
fn shared(registry: &Registry) -> io::Result<Arc<Registry>> {
    static KNOWN: Mutex<Vec<Weak<Registry>>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|r| r.strong_count() > 0);
    let mut all = known.iter().filter_map(Weak::upgrade);
    if let Some(r) = all.find(|r| sys::same_file(r.as_raw_fd(), registry.as_raw_fd())) {
        return Ok(r);
    }
    let new = Arc::new(registry.try_clone()?);
    known.push(Arc::downgrade(&new));
    Ok(new)
}

/// A registered stream must not wait ([`set_nonblocking`](Stream::set_nonblocking)). Other handles of it may read and
/// write too; it is registered once.
///
/// ```
/// use smc::net::{Listener, Stream};
/// use mio::{Events, Interest, Poll, Token};
/// use std::io::{Read, Write};
///
/// let listener = Listener::bind("127.0.0.1:0")?;
/// let mut client = Stream::connect(listener.local_addr()?)?;
/// let (mut server, _) = listener.accept()?;
/// server.set_nonblocking(true)?;
/// let mut poll = Poll::new()?;
/// poll.registry().register(&mut server, Token(7), Interest::READABLE)?;
/// client.write_all(b"hello")?;
/// let (mut events, mut all) = (Events::with_capacity(8), Vec::new());
/// while all.len() < 5 {
///     poll.poll(&mut events, None)?;
///     for event in &events {
///         assert_eq!(event.token(), Token(7));
///         let mut buf = [0; 16];
///         loop {
///             match server.read(&mut buf) {
///                 Ok(n) => all.extend_from_slice(&buf[..n]),
///                 Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
///                 Err(e) => return Err(e),
///             }
///         }
///     }
/// }
/// assert_eq!(all, b"hello");
/// # Ok::<(), std::io::Error>(())
/// ```
impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        let core = self.core();
        core.watch.register(core, registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        let core = self.core();
        core.watch.reregister(core, registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        let core = self.core();
        core.watch.deregister(core, registry)
    }
}

/// A registered listener must not wait ([`set_nonblocking`](Listener::set_nonblocking)).
impl Source for Listener {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).deregister(registry)
    }
}
