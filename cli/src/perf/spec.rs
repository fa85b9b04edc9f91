//! What is to be measured: agreed between the ends before a test, in our words or in iperf3's.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{Problem, Result};

/// The traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// As much as goes.
    Stream,
    /// A request and its response, again and again.
    Rr,
    /// The same with a connection for each.
    Crr,
}

/// How the bytes of the test go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Over {
    /// Plain TCP
    Tcp,
    /// A Unix stream socket
    Unix,
    /// TCP under libsmc.so
    Preload,
    /// The streams of the crate smc (`smc::net`)
    Native,
}

impl Over {}

impl Over {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Preload => "preload",
            Self::Native => "native",
        }
    }
}

/// How a thread waits for its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// A thread for each connection, in read(2) and write(2)
    Blocking,
    /// A few threads, in poll(2)
    Poll,
    /// A few threads, in epoll_wait(2)
    Epoll,
}

/// Who sends, of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Forward,
    Reverse,
    Both,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub kind: Kind,
    pub over: Over,
    pub direction: Direction,
    /// Connections, of each direction if there are two.
    pub parallel: u32,
    /// Seconds, if it is time that ends the test.
    pub time: Option<f64>,
    /// Bytes, or blocks (requests), over all connections.
    pub bytes: Option<u64>,
    pub blocks: Option<u64>,
    /// Seconds at the start that do not count.
    pub omit: f64,
    /// Of a write, or a request.
    pub length: usize,
    /// Of a response.
    pub response: usize,
    /// Of the sockets' buffers.
    pub window: Option<usize>,
    pub nodelay: bool,
    pub zerocopy: bool,
    pub verify: bool,
    pub io: Io,
    /// That share the connections, with poll and epoll.
    pub threads: u32,
    /// CPU that the server keeps to.
    pub server_cpu: Option<usize>,
    /// The server starts a process for this test.
    pub own_process: bool,
}

/// iperf3's.
pub const LENGTH: usize = 128 << 10;
pub const MAX_LENGTH: usize = 64 << 20;
pub const MAX_PARALLEL: u32 = 4096;
pub const MAX_SECONDS: f64 = 86_400.0;

impl Spec {
    /// Whether both ends can do it; the numbers may have come from anybody.
    pub fn check(&self) -> Result<()> {
        let no = |what: &str| Err(Problem::new(what));
        let seconds = |s: f64| (0.0..=MAX_SECONDS).contains(&s);
        if self.parallel == 0 || self.parallel > MAX_PARALLEL {
            return Err(Problem::new(format!("-P is from 1 to {MAX_PARALLEL} connections")));
        }
        if ![self.length, self.response].iter().all(|n| (1..=MAX_LENGTH).contains(n)) {
            return Err(Problem::new(format!("-l is from 1 byte to {} MiB", MAX_LENGTH >> 20)));
        }
        if self.threads == 0 || self.threads > MAX_PARALLEL {
            return no("--threads is at least 1");
        }
        if !seconds(self.omit) || !self.time.is_none_or(seconds) {
            return no("a time is from 0 to 86400 seconds");
        }
        let ends = [self.time.is_some(), self.bytes.is_some(), self.blocks.is_some()];
        if ends.into_iter().filter(|e| *e).count() != 1 {
            return no("one of -t, -n and -k ends the test");
        }
        if self.kind != Kind::Stream && self.direction != Direction::Forward {
            return no("-R and --bidir are for streams: --rr and --crr go both ways anyhow");
        }
        if self.kind != Kind::Stream && self.zerocopy {
            return no("-Z is for streams");
        }
        if self.zerocopy && self.verify {
            return no("-Z sends one block again and again, so --verify could not tell a lost one");
        }
        if self.over == Over::Native && (self.io != Io::Blocking || self.zerocopy) {
            return no("--over native is measured with --io blocking, and without -Z");
        }
        if self.kind == Kind::Crr && self.io != Io::Blocking {
            return no("--crr is measured with --io blocking only");
        }
        Ok(())
    }

    /// Connections that the client makes before the test begins.
    pub fn connections(&self) -> usize {
        match (self.kind, self.direction) {
            (Kind::Crr, _) => 0,
            (_, Direction::Both) => 2 * self.parallel as usize,
            _ => self.parallel as usize,
        }
    }

    /// Whether the client sends on the connection with this number.
    pub fn client_sends(&self, index: usize) -> bool {
        match self.direction {
            Direction::Forward => true,
            Direction::Reverse => false,
            Direction::Both => index < self.parallel as usize,
        }
    }

    /// What a plain iperf3 server is told.
    ///
    /// # Errors
    /// What it can't do.
    pub fn to_iperf3(&self) -> Result<Value> {
        let no = |what: &str| {
            Err(Problem::new(format!(
                "the server is a plain iperf3, which has no {what}; use smc perf server there"
            )))
        };
        match () {
            () if self.kind != Kind::Stream => return no("--rr and --crr"),
            () if self.over == Over::Unix => return no("Unix sockets"),
            () if self.over == Over::Native => return no("streams of smc::net"),
            () if self.own_process => return no("--processes"),
            () if self.verify => return no("--verify"),
            () if self.length > 1 << 20 => return no("blocks of more than 1 MiB"),
            () if self.parallel > 128 => return no("more than 128 streams"),
            () => {}
        }
        let mut j = json!({
            "tcp": true,
            "omit": self.omit.ceil(),
            "time": self.time.map_or(0.0, f64::ceil),
            "num": self.bytes.unwrap_or(0),
            "blockcount": self.blocks.unwrap_or(0),
            "parallel": self.parallel,
            "len": self.length,
            "pacing_timer": 1000,
            "client_version": "3.12",
        });
        let mut put = |name: &str, value: Value| j[name] = value;
        if self.direction == Direction::Reverse {
            put("reverse", true.into());
        }
        if self.direction == Direction::Both {
            put("bidirectional", true.into());
        }
        if let Some(w) = self.window {
            put("window", w.into());
        }
        if self.nodelay {
            put("nodelay", true.into());
        }
        if self.zerocopy {
            put("zerocopy", 1.into());
        }
        if let Some(cpu) = self.server_cpu {
            put("server_affinity", cpu.into());
        }
        Ok(j)
    }

    /// What a plain iperf3 client asks for.
    ///
    /// # Errors
    /// What we can't do.
    pub fn from_iperf3(j: &Value) -> Result<Self> {
        let on =
            |name: &str| j[name].as_bool().unwrap_or(false) || j[name].as_f64().is_some_and(|n| n != 0.0);
        let number = |name: &str| j[name].as_u64().filter(|n| *n > 0);
        for what in ["udp", "sctp"] {
            if on(what) {
                return Err(Problem::new(format!("the client wants {what}; smc perf measures TCP")));
            }
        }
        if j["bandwidth"].as_u64().is_some_and(|n| n > 0) {
            return Err(Problem::new("the client wants a limited rate (-b), which smc perf can't keep"));
        }
        let time = j["time"].as_f64().filter(|t| *t > 0.0);
        let spec = Self {
            kind: Kind::Stream,
            over: Over::Tcp,
            direction: match () {
                () if on("bidirectional") => Direction::Both,
                () if on("reverse") => Direction::Reverse,
                () => Direction::Forward,
            },
            parallel: u32::try_from(number("parallel").unwrap_or(1)).unwrap_or(u32::MAX),
            time: time.filter(|_| number("num").is_none() && number("blockcount").is_none()),
            bytes: number("num"),
            blocks: number("blockcount").filter(|_| number("num").is_none()),
            omit: j["omit"].as_f64().unwrap_or(0.0),
            length: number("len").and_then(|n| usize::try_from(n).ok()).unwrap_or(LENGTH),
            response: 1,
            window: number("window").and_then(|n| usize::try_from(n).ok()),
            nodelay: on("nodelay"),
            zerocopy: on("zerocopy"),
            verify: false,
            io: Io::Blocking,
            threads: 1,
            server_cpu: j["server_affinity"].as_u64().and_then(|n| usize::try_from(n).ok()),
            own_process: false,
        };
        spec.check()?;
        Ok(spec)
    }
}

/// iperf3's number of a stream, from 0: the second has number 3.
pub fn iperf3_id(index: usize) -> usize {
    if index == 0 { 1 } else { index + 2 }
}

#[cfg(test)]
pub fn example() -> Spec {
    Spec {
        kind: Kind::Stream,
        over: Over::Tcp,
        direction: Direction::Forward,
        parallel: 2,
        time: Some(1.0),
        bytes: None,
        blocks: None,
        omit: 0.0,
        length: 1024,
        response: 64,
        window: None,
        nodelay: false,
        zerocopy: false,
        verify: false,
        io: Io::Blocking,
        threads: 1,
        server_cpu: None,
        own_process: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_done_is_refused_with_a_reason() {
        let refused = |change: fn(&mut Spec), why: &str| {
            let mut s = example();
            change(&mut s);
            let said = s.check().map_err(|p| p.to_string());
            assert!(said.as_ref().is_err_and(|e| e.contains(why)), "{why}: {said:?}");
        };
        assert_eq!(example().check(), Ok(()));
        refused(|s| s.parallel = 0, "-P");
        refused(|s| s.parallel = u32::MAX, "-P");
        refused(|s| s.length = usize::MAX, "-l");
        refused(|s| s.response = 0, "-l");
        refused(|s| s.omit = f64::NAN, "time");
        refused(|s| s.time = Some(-1.0), "time");
        refused(|s| s.bytes = Some(1), "-n");
        refused(|s| s.threads = 0, "--threads");
        refused(|s| (s.zerocopy, s.verify) = (true, true), "-Z");
        refused(|s| (s.over, s.io) = (Over::Native, Io::Poll), "native");
        refused(|s| (s.over, s.zerocopy) = (Over::Native, true), "native");
        refused(|s| (s.kind, s.direction) = (Kind::Rr, Direction::Reverse), "-R");
        refused(|s| (s.kind, s.io) = (Kind::Crr, Io::Epoll), "--crr");
    }

    #[test]
    fn iperf3_is_told_and_understood() {
        let mut spec = example();
        (spec.direction, spec.window, spec.nodelay) = (Direction::Both, Some(65536), true);
        spec.response = 1;
        let told = spec.to_iperf3().expect("it can do that");
        assert_eq!(Spec::from_iperf3(&told), Ok(spec.clone()));
        spec.kind = Kind::Rr;
        assert!(spec.to_iperf3().is_err_and(|p| p.to_string().contains("--rr")));
        assert!(Spec::from_iperf3(&json!({"udp": true})).is_err());
        assert!(Spec::from_iperf3(&json!({"parallel": -3, "time": "x", "len": {}})).is_err());
    }

    #[test]
    fn both_directions_have_connections_of_their_own() {
        let mut spec = example();
        assert_eq!((spec.connections(), spec.client_sends(1)), (2, true));
        spec.direction = Direction::Both;
        assert_eq!((spec.connections(), spec.client_sends(1), spec.client_sends(2)), (4, true, false));
        spec.kind = Kind::Crr;
        assert_eq!(spec.connections(), 0);
        assert_eq!([0, 1, 2].map(iperf3_id), [1, 3, 4]);
    }
}
