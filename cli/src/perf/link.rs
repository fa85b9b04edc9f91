//! The connections that are measured: TCP or Unix, whatever runs underneath, or streams of `smc::net`.
//!
//! All calls on the former go through libc, so that they are libsmc's when it is preloaded.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as unix;
use std::time::Duration;

use rustix::net::sockopt;
use serde::{Deserialize, Serialize};
use smc::net;

use super::spec::{Kind, Over, Spec};
use super::wire::{self, Cookie, Problem, Result};

/// One end of a connection.
#[derive(Debug)]
pub enum Link {
    Tcp(TcpStream),
    Unix(unix::UnixStream),
    Native(net::Stream),
}

impl Link {
    /// As the test wants it.
    pub fn prepare(&self, spec: &Spec) -> Result<()> {
        // A request that waits for company would be measured, not the way.
        let nodelay = spec.nodelay || spec.kind != Kind::Stream;
        match self {
            Self::Tcp(s) => s.set_nodelay(nodelay)?,
            Self::Native(s) => s.set_nodelay(nodelay)?,
            Self::Unix(_) => return Ok(()),
        }
        set_window(self, spec.window)
    }

    /// Ends a direction, or both, also for those that sleep in it.
    pub fn shutdown(&self, how: Shutdown) {
        // It may be over already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
            Self::Native(s) => s.shutdown(how),
        };
    }

    pub fn nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_nonblocking(true),
            Self::Unix(s) => s.set_nonblocking(true),
            Self::Native(s) => s.set_nonblocking(true),
        }
    }

    pub fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => (&mut &*s).read(to),
            Self::Unix(s) => (&mut &*s).read(to),
            Self::Native(s) => (&mut &*s).read(to),
        }
    }

    pub fn write(&self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => (&mut &*s).write(from),
            Self::Unix(s) => (&mut &*s).write(from),
            Self::Native(s) => (&mut &*s).write(from),
        }
    }

    /// Both addresses, own first; a Unix socket has none that would say anything.
    pub fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self {
            Self::Tcp(s) => s.local_addr().ok().zip(s.peer_addr().ok()),
            Self::Native(s) => s.local_addr().ok().zip(s.peer_addr().ok()),
            Self::Unix(_) => None,
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
            Self::Native(s) => s.as_fd(),
        }
    }
}

/// socket(7): the kernel takes what it can give.
fn set_window(socket: &impl AsFd, window: Option<usize>) -> Result<()> {
    let Some(bytes) = window else { return Ok(()) };
    sockopt::set_socket_send_buffer_size(socket, bytes)
        .and_then(|()| sockopt::set_socket_recv_buffer_size(socket, bytes))
        .map_err(|e| Problem::new(format!("-w {bytes}: {e}")))
}

/// Where connections of a test come in, if not at the server's port.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(unix::UnixListener),
    Native(net::Listener),
}

/// How the client finds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Meeting {
    /// The server's own port, with the cookie.
    Here,
    /// Another port of the server's host.
    Port(u16),
    /// An abstract Unix socket.
    Unix(String),
}

impl Listener {
    /// What the test needs; `None`: the server's port does.
    pub fn new(spec: &Spec, ip: IpAddr, cookie: &Cookie) -> Result<Option<(Self, Meeting)>> {
        match (spec.over, spec.kind) {
            (Over::Unix, _) => {
                let name: String = cookie[..wire::COOKIE - 1].iter().map(|b| char::from(*b)).collect();
                let address = unix::SocketAddr::from_abstract_name(&name)?;
                Ok(Some((Self::Unix(unix::UnixListener::bind_addr(&address)?), Meeting::Unix(name))))
            }
            (Over::Native, _) => {
                let l = net::Listener::bind((ip, 0))?;
                let port = l.local_addr()?.port();
                Ok(Some((Self::Native(l), Meeting::Port(port))))
            }
            (_, Kind::Crr) => {
                let l = TcpListener::bind((ip, 0))?;
                let port = l.local_addr()?.port();
                Ok(Some((Self::Tcp(l), Meeting::Port(port))))
            }
            _ => Ok(None),
        }
    }

    pub fn accept(&self) -> io::Result<Link> {
        Ok(match self {
            Self::Tcp(l) => Link::Tcp(l.accept()?.0),
            Self::Unix(l) => Link::Unix(l.accept()?.0),
            Self::Native(l) => Link::Native(l.accept()?.0),
        })
    }

    /// Wakes those that sleep in `accept`: it gives an error from now on.
    pub fn close(&self) {
        let fd = match self {
            Self::Tcp(l) => l.as_fd(),
            Self::Unix(l) => l.as_fd(),
            Self::Native(l) => l.as_fd(),
        };
        // Once is enough.
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

/// What a client needs to make a connection.
#[derive(Debug, Clone)]
pub struct Dial {
    pub server: SocketAddr,
    pub over: Over,
    pub meeting: Meeting,
    pub cookie: Cookie,
    pub limit: Duration,
}

impl Dial {
    pub fn connect(&self) -> io::Result<Link> {
        Ok(match &self.meeting {
            Meeting::Here => {
                let s = TcpStream::connect_timeout(&self.server, self.limit)?;
                (&s).write_all(&self.cookie)?;
                Link::Tcp(s)
            }
            Meeting::Port(port) if self.over == Over::Native => {
                Link::Native(net::Stream::connect((self.server.ip(), *port))?)
            }
            // No time limit: a measured connect is one system call.
            Meeting::Port(port) => Link::Tcp(TcpStream::connect((self.server.ip(), *port))?),
            Meeting::Unix(name) => {
                let address = unix::SocketAddr::from_abstract_name(name)?;
                Link::Unix(unix::UnixStream::connect_addr(&address)?)
            }
        })
    }

    /// The same with the error in words.
    pub fn connect_or_say(&self) -> Result<Link> {
        self.connect().map_err(|e| {
            Problem::new(match &self.meeting {
                Meeting::Unix(_) => format!(
                    "the server's Unix socket can't be reached ({e}); is it on this host, in this network namespace?"
                ),
                Meeting::Port(p) => format!("port {p} of the server: {e}"),
                Meeting::Here => format!("a connection for the data: {e}"),
            })
        })
    }
}
