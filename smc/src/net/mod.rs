//! TCP streams that move their bytes through memory, for programs that are linked with this crate.
//!
//! [`Stream`] and [`Listener`] are used like those of `std::net`, and do what those do. When both ends of a connection
//! run libsmc on one host (this module, or any program under `LD_PRELOAD=libsmc.so`) its bytes go through memory that
//! the two processes share, from the moment on at which it has proved worth it. A peer without libsmc notices nothing,
//! and the stream stays TCP.
//!
//! ```
//! use smc::net::{Listener, Stream};
//! use std::io::{Read, Write};
//!
//! let listener = Listener::bind("127.0.0.1:0")?;
//! let address = listener.local_addr()?;
//! let server = std::thread::spawn(move || -> std::io::Result<()> {
//!     let (mut stream, _) = listener.accept()?;
//!     let mut request = [0; 5];
//!     stream.read_exact(&mut request)?;
//!     stream.write_all(&request)
//! });
//! let mut stream = Stream::connect(address)?;
//! stream.write_all(b"hello")?;
//! let mut answer = [0; 5];
//! stream.read_exact(&mut answer)?;
//! assert_eq!(&answer, b"hello");
//! server.join().unwrap()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # What a stream is
//!
//! Its descriptor ([`AsFd`](std::os::fd::AsFd)) is that of a TCP connection, always. Set what options you like on it,
//! by [socket2](https://docs.rs/socket2) for one, but for time-outs and `O_NONBLOCK`, of which the methods here have to
//! know. Do not read, write or poll it: bytes may be in memory of which the kernel knows nothing.
//! [`Stream::into_tcp`] gives the socket itself, with no byte lost. [`Stream::status`] says how the bytes go, and why
//! they go by TCP if they do.
//!
//! Each upgraded stream takes one more descriptor. Where those of the program come near its limit (`RLIMIT_NOFILE`) no
//! more streams are upgraded.
//!
//! # Waiting for many
//!
//! With the feature `mio` streams and listeners are sources of a `mio::Poll`, beside any others; with the feature `tokio`
//! there is `smc::net::tokio`. Other loops over `poll`, `epoll` or `select` see the TCP socket only, which is not where
//! the bytes of an upgraded stream are; give them [`UpgradeAfter::Never`], or leave them to libsmc.so.
//!
//! # Events
//!
//! With the feature `tracing` the streams tell a subscriber of `tracing` what becomes of them, under the target `smc`:
//!
//! | message | level | fields |
//! | --- | --- | --- |
//! | `upgraded` | info | `local`, `peer`, `mode`, `ring_size`, `peer_pid` |
//! | `stays on TCP` | info | `local`, `peer`, `reason` |
//! | `back on TCP` | info | `local`, `peer`, `reason` |
//! | `closed` | debug | `local`, `peer`, `best`, `tx_bytes_ring`, `rx_bytes_ring`, `tx_bytes_tcp`, `rx_bytes_tcp`, `polls`, `sleeps`, `doorbells` |
//!
//! They are told at the end of a call on the stream, when the stream holds nothing that the subscriber could wait for. What
//! libsmc.so carries has none: see `docs/TROUBLESHOOTING.md` for its probes.
//!
//! # Settings
//!
//! A [`Builder`] has those of one stream or listener. The environment variables of the shim (`SMC_RMB_SIZE`,
//! `SMC_UPGRADE_AFTER`, `SMC_DISABLE` and so on; the README lists them) are the defaults.
//!
//! # Processes
//!
//! *fork*: parent and child hold the streams both, as with TCP. One that is not upgraded yet stays so as long as both do.
//! A child that executes another program without dropping its streams is taken for a holder until it ends.
//!
//! *The end*: `exit` and the return from `main` end open streams as dropping them would. `_exit`, `abort` and signals do
//! not: bytes that the peer has asked back to TCP and that TCP had no room for are lost then.
//!
//! *libsmc.so*: in a process that has it preloaded, the streams of this module are left to it. They go on by libc's calls,
//! which are its hooks, and it upgrades them. So there is one engine for each connection. What the hooks can't offer
//! ([`Stream::reserve`] in the ring itself) goes by a copy.

mod builder;
mod core;
#[cfg(feature = "tracing")]
mod events;
mod groups;
mod listener;
mod reader;
mod stream;
#[cfg(feature = "tokio")]
pub mod tokio;
#[cfg(feature = "mio")]
mod watch;

pub use crate::conn::SharedSlice;
pub use crate::reason::Reason;
pub use crate::stats::{ConnectionInfo, Mode, Role};
pub use builder::{Builder, UpgradeAfter};
pub use groups::{LinkGroupInfo, link_groups};
pub use listener::{Incoming, Listener};
pub use reader::Reader;
pub use stream::{IntoTcpError, ReadHalf, Reservation, Stream, WriteHalf};

/// The kernel's convention to std's: below zero it is minus an errno.
#[inline]
fn result(n: isize) -> std::io::Result<usize> {
    if n < 0 { Err(std::io::Error::from_raw_os_error(-n as i32)) } else { Ok(n as usize) }
}
