//! What libsmc.so and libsmc-rdma.so say to each other: plain C, with a version.
//!
//! Between hosts a *service*, a thread of libsmc-rdma.so, plays the peer's side of a connection's page: to this process
//! it is what the peer's process is on one host. What is in the sending ring it writes into the peer's memory; what the
//! peer writes comes into the receiving ring by itself, and the service publishes the cursor. So the shim and the engine
//! know nothing of RDMA, and a process without rdma-core lacks nothing but the service.
//!
//! ```text
//!  libsmc.so ── dlopen, smc_rdma_start(&Host) ──> &Service
//!  Service::serve(&Conn)   a connection begins: its page, rings, doorbell, and a TCP descriptor of the service's own
//!  Host::says              it is on RDMA, on TCP, or reset
//!  Host::attend            the service has asked for something, or the stream has left the ring: look
//!  Host::release           the service uses page and rings no more
//! ```
//!
//! Both libraries are built from one source; [`ABI`] and the layout of the page are compared before anything else.

use crate::mem::layout::{ConnPage, LAYOUT_VERSION};

/// Version of what is in this file, and of the page's layout.
pub const ABI: u32 = 3 << 16 | LAYOUT_VERSION;

/// What [`Host::says`] tells of a connection.
pub mod says {
    /// Its bytes go by RDMA.
    pub const RDMA: u32 = 0;
    /// Its bytes go by TCP from now on, for the reason of that code, or 0; the service lets go of TCP's stream.
    pub const TCP: u32 = 1;
    /// It is reset: the errno that is to be told.
    pub const RESET: u32 = 2;
}

/// What libsmc.so offers. Called by the service's thread, which holds no lock of its own meanwhile.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// [`ABI`].
    pub abi: u32,
    /// Bytes in all EIDs.
    pub eids_len: u32,
    /// The EIDs, 32 bytes each, valid for ever.
    pub eids: *const u8,
    /// A descriptor is the service's: the program does not close it, and a forked child does.
    pub own: extern "C" fn(fd: i32),
    /// It is about to be closed.
    pub disown: extern "C" fn(fd: i32),
    /// See [`says`]; `cookie` names the connection, `fd` is a number that the program had for it.
    pub says: extern "C" fn(fd: i32, cookie: u64, what: u32, value: u32),
    /// The page has something for the program's side, which it may not look at for long.
    pub attend: extern "C" fn(fd: i32, cookie: u64),
    /// The service uses what [`Conn::hold`] keeps no more.
    pub release: extern "C" fn(hold: usize),
}

/// A connection to serve.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conn {
    /// The TCP socket, by a descriptor that is the service's to close.
    pub tcp: i32,
    /// The service's end of the doorbell, likewise.
    pub bell: i32,
    /// A number that the program has for the socket.
    pub fd: i32,
    /// 0: the program's end has connected, 1: it has accepted. The service plays the other side of the page.
    pub side: u32,
    /// 1: the peer was promised SMC, and speaks CLC first whatever comes: it is taken over also where there is no device
    /// for it, and then declined.
    pub promised: u32,
    /// SO_COOKIE: names the connection in what the service says.
    pub cookie: u64,
    /// The page.
    pub page: *const ConnPage,
    /// The ring that the program sends into.
    pub tx: *mut u8,
    /// The ring that it receives from.
    pub rx: *mut u8,
    /// Bytes in each.
    pub ring: usize,
    /// Keeps page and rings mapped until [`Host::release`].
    pub hold: usize,
    /// This end's address, IPv4 as mapped IPv6.
    pub local: [u8; 16],
    /// The peer's.
    pub peer: [u8; 16],
}

/// What libsmc-rdma.so offers. Callable from any thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// [`ABI`].
    pub abi: u32,
    /// Takes a connection over, or says by which reason's code it does not; then nothing of it was taken.
    pub serve: extern "C" fn(conn: *const Conn) -> u32,
    /// Whether there is a device at all, 0 or 1.
    pub ready: extern "C" fn() -> u32,
    /// The process is about to end: waits until what was sent has arrived, that many milliseconds at most.
    pub drain: extern "C" fn(ms: u32),
    /// In a forked child: all is the parent's, and is forgotten.
    pub forked: extern "C" fn(),
}

/// The name of the function that takes a [`Host`] and gives a [`Service`], or null.
pub const START: &std::ffi::CStr = c"smc_rdma_start";
/// Its type.
pub type Start = extern "C" fn(host: *const Host) -> *const Service;
