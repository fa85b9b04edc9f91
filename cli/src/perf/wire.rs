//! The control connection: iperf3's protocol, and what `smc perf` adds to it.
//!
//! ```text
//! client                              server
//!   cookie, 37 bytes             ->
//!                                <-   HELLO, JSON           (only to a cookie that begins with `smcperf`)
//!                                <-   PARAM_EXCHANGE, or ACCESS_DENIED: busy
//!   parameters, JSON             ->
//!                                <-   CREATE_STREAMS (JSON)  or SERVER_ERROR, or REDIRECT (JSON)
//!   connections, each a cookie   ->
//!                                <-   TEST_START, TEST_RUNNING
//!           … data …
//!   TEST_END                     ->
//!                                <-   EXCHANGE_RESULTS
//!   results, JSON                ->
//!                                <-   results, JSON
//!                                <-   DISPLAY_RESULTS
//!   IPERF_DONE                   ->
//! ```
//!
//! A state is one byte, JSON has its length before it (four bytes, big-endian). A plain iperf3 server takes any
//! cookie and never says HELLO; a plain iperf3 client never sends ours: so each end knows whom it talks to.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use rustix::thread::ClockId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Length of a cookie, its final zero included.
pub const COOKIE: usize = 37;
pub type Cookie = [u8; COOKIE];

/// Version of what is added to iperf3's protocol: one letter of the cookie.
pub const VERSION: u32 = 1;
const OURS: &[u8] = b"smcperf";

/// How long the other end may take for an answer outside the test itself.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A message that is longer is not believed.
const LONGEST: u32 = 64 << 20;

/// What one end tells the other, as iperf3 numbers it; from 64 on ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum State {
    TestStart = 1,
    TestRunning = 2,
    TestEnd = 4,
    ParamExchange = 9,
    CreateStreams = 10,
    ServerTerminate = 11,
    ClientTerminate = 12,
    ExchangeResults = 13,
    DisplayResults = 14,
    Done = 16,
    AccessDenied = -1,
    ServerError = -2,
    Hello = 64,
    Redirect = 65,
}

impl TryFrom<u8> for State {
    type Error = Problem;

    fn try_from(byte: u8) -> std::result::Result<Self, Problem> {
        const ALL: [State; 14] = [
            State::TestStart,
            State::TestRunning,
            State::TestEnd,
            State::ParamExchange,
            State::CreateStreams,
            State::ServerTerminate,
            State::ClientTerminate,
            State::ExchangeResults,
            State::DisplayResults,
            State::Done,
            State::AccessDenied,
            State::ServerError,
            State::Hello,
            State::Redirect,
        ];
        let unknown = || Problem::new(format!("the other end sent state {byte}, which is none of iperf3's"));
        ALL.into_iter().find(|s| (*s as i8).cast_unsigned() == byte).ok_or_else(unknown)
    }
}

/// What went wrong, as a sentence for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem(String);

impl Problem {
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<io::Error> for Problem {
    fn from(e: io::Error) -> Self {
        Self(e.to_string())
    }
}

pub type Result<T> = std::result::Result<T, Problem>;

/// What a server says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    pub version: String,
    pub pid: u32,
    /// It runs under libsmc.so.
    pub preloaded: bool,
}

/// The server has started another one for this test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Redirect {
    pub port: u16,
}

/// What an error of the server's is, in words.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
}

/// A new cookie that tells a server of ours who we are.
pub fn cookie() -> Cookie {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    let start = (u64::from(std::process::id()) << 32) ^ now.tv_sec.cast_unsigned().rotate_left(48);
    let mut random = super::pattern::Words::new(start ^ now.tv_nsec.cast_unsigned());
    let mut c = [0; COOKIE];
    c[..OURS.len()].copy_from_slice(OURS);
    c[OURS.len()] = b'0' + VERSION as u8;
    for b in &mut c[OURS.len() + 1..COOKIE - 1] {
        *b = LETTERS[(random.next() >> 59) as usize];
    }
    c
}

/// The protocol's version if the cookie is one of `smc perf`.
pub fn version(cookie: &Cookie) -> Option<u32> {
    let digit = cookie.strip_prefix(OURS)?.first()?;
    char::from(*digit).to_digit(10)
}

/// The connection over which the two ends agree.
#[derive(Debug)]
pub struct Control(pub TcpStream);

impl Control {
    /// Connects and shows the cookie.
    pub fn connect(host: &str, port: u16, cookie: &Cookie, limit: Duration) -> Result<Self> {
        let stream = connect(host, port, limit)?;
        let control = Self::new(stream)?;
        control.write(cookie)?;
        Ok(control)
    }

    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        let control = Self(stream);
        control.patience(Some(PATIENCE))?;
        Ok(control)
    }

    /// How long `recv_…` waits.
    pub fn patience(&self, limit: Option<Duration>) -> Result<()> {
        Ok(self.0.set_read_timeout(limit)?)
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        (&self.0).write_all(bytes).map_err(|e| Problem::new(format!("control connection: {e}")))
    }

    fn read(&self, bytes: &mut [u8]) -> Result<()> {
        (&self.0).read_exact(bytes).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                Problem::new("the other end closed the control connection")
            }
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Problem::new("the other end does not answer"),
            _ => Problem::new(format!("control connection: {e}")),
        })
    }

    pub fn send(&self, state: State) -> Result<()> {
        self.write(&[(state as i8).cast_unsigned()])
    }

    pub fn recv(&self) -> Result<State> {
        let mut byte = [0];
        self.read(&mut byte)?;
        State::try_from(byte[0])
    }

    pub fn send_json(&self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_vec(value).map_err(|e| Problem::new(e.to_string()))?;
        let length = u32::try_from(text.len()).map_err(|_| Problem::new("a message is too long"))?;
        self.write(&length.to_be_bytes())?;
        self.write(&text)
    }

    pub fn recv_json<T: DeserializeOwned>(&self) -> Result<T> {
        let mut length = [0; 4];
        self.read(&mut length)?;
        let length = u32::from_be_bytes(length);
        if length > LONGEST {
            return Err(Problem::new(format!("the other end announced a message of {length} bytes")));
        }
        let mut text = Vec::new();
        // What is announced is not set aside before it is there.
        let got = (&self.0).take(length.into()).read_to_end(&mut text)?;
        if got < length as usize {
            return Err(Problem::new("the other end closed the control connection"));
        }
        serde_json::from_slice(&text).map_err(|e| Problem::new(format!("the other end's JSON: {e}")))
    }

    /// Why iperf3's server gave up: two numbers.
    pub fn recv_iperf3_error(&self) -> Problem {
        let mut words = [0; 8];
        if self.read(&mut words).is_err() {
            return Problem::new("the iperf3 server reported an error");
        }
        let number = i32::from_be_bytes([words[0], words[1], words[2], words[3]]);
        let errno = i32::from_be_bytes([words[4], words[5], words[6], words[7]]);
        let system = match errno {
            0 => String::new(),
            n => format!(": {}", io::Error::from_raw_os_error(n)),
        };
        Problem::new(format!("the iperf3 server reported its error {number}{system}"))
    }

    /// What an iperf3 client understands of an error: "not implemented".
    pub fn send_iperf3_error(&self) -> Result<()> {
        const NOT_IMPLEMENTED: i32 = 13;
        self.send(State::ServerError)?;
        self.write(&NOT_IMPLEMENTED.to_be_bytes())?;
        self.write(&0i32.to_be_bytes())
    }
}

/// Connects to the first of the host's addresses that answers within the limit.
pub fn connect(host: &str, port: u16, limit: Duration) -> Result<TcpStream> {
    let shown = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let fail = |e: &io::Error| {
        Problem::new(match e.kind() {
            ErrorKind::ConnectionRefused => {
                format!("{shown}: connection refused; is a server running there (smc perf server -p {port})?")
            }
            ErrorKind::TimedOut => format!("{shown}: no answer within {} s", limit.as_secs_f64()),
            _ => format!("{shown}: {e}"),
        })
    };
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|e| fail(&e))?.collect();
    let start = Instant::now();
    let mut last = io::Error::new(ErrorKind::NotFound, "no address");
    for a in addresses {
        let left = limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&a, left) {
            Ok(s) => return Ok(s),
            Err(e) => last = e,
        }
    }
    Err(fail(&last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn cookies_are_told_apart() {
        let (a, b) = (cookie(), cookie());
        assert_ne!(a, b);
        assert_eq!(version(&a), Some(VERSION));
        assert_eq!(a[COOKIE - 1], 0);
        assert!(a[..COOKIE - 1].iter().all(u8::is_ascii_alphanumeric));
        let mut iperf3 = [b'x'; COOKIE];
        iperf3[COOKIE - 1] = 0;
        assert_eq!(version(&iperf3), None);
    }

    #[test]
    fn states_survive_the_wire_and_others_are_named() {
        assert_eq!(State::try_from(0xff), Ok(State::AccessDenied));
        assert_eq!(State::try_from(13), Ok(State::ExchangeResults));
        assert!(State::try_from(99).is_err_and(|p| p.to_string().contains("99")));
    }

    #[test]
    fn a_message_that_is_too_long_or_cut_off_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let peer = thread::spawn(move || {
            for bytes in [&[0xff; 4][..], &[0, 0, 0, 9, b'{'], &[0, 0, 0, 2, b'{', b'}']] {
                let mut s = TcpStream::connect(address).expect("the listener");
                s.write_all(bytes).expect("a few bytes");
            }
        });
        let mut said = Vec::new();
        for _ in 0..3 {
            let control = Control::new(listener.accept().expect("a client").0).expect("a control");
            said.push(control.recv_json::<serde_json::Value>().map_err(|p| p.to_string()));
        }
        peer.join().expect("no panic");
        assert!(said[0].as_ref().is_err_and(|e| e.contains("4294967295")), "{said:?}");
        assert!(said[1].as_ref().is_err_and(|e| e.contains("closed")), "{said:?}");
        assert!(said[2].is_ok(), "{said:?}");
    }
}
