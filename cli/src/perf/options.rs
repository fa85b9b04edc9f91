//! The command line: iperf3's names where iperf3 has the thing.

use std::net::IpAddr;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::client::Target;
use super::compare;
use super::crowd::Order;
use super::report::Form;
use super::server::Settings;
use super::spec::{Direction, Io, Kind, LENGTH, MAX_SECONDS, Over, Spec};
use super::wire::{Problem, Result};

/// iperf3's.
const PORT: u16 = 5201;

/// `smc perf`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Role>,
    /// Be the server (as `smc perf server`)
    #[arg(short, long, conflicts_with_all = ["ClientOptions", "client"])]
    server: bool,
    /// Be the client of the server on that host (as `smc perf client HOST`)
    #[arg(short, long, value_name = "HOST", conflicts_with = "ServerOptions")]
    client: Option<String>,
    #[command(flatten)]
    common: CommonOptions,
    #[command(flatten)]
    serving: ServerOptions,
    #[command(flatten)]
    asking: ClientOptions,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Wait for clients, ours and plain iperf3's, and run the tests they ask for
    Server {
        #[command(flatten)]
        common: CommonOptions,
        #[command(flatten)]
        serving: ServerOptions,
    },
    /// Run a test with a server, ours or a plain iperf3
    Client {
        /// The server's name or address
        host: String,
        #[command(flatten)]
        common: CommonOptions,
        #[command(flatten)]
        asking: ClientOptions,
    },
    /// Run the same traffic by several ways in turn, and tell how many times better each is
    Compare(Box<compare::Options>),
    /// One of the processes of `client --processes`
    #[command(name = "__worker", hide = true)]
    Worker { order: String },
}

/// What both ends have.
#[derive(Debug, Args)]
struct CommonOptions {
    /// Port of the server; 0 at the server: any that is free
    #[arg(short, long, default_value_t = PORT)]
    port: u16,
    /// Seconds between two reports; 0: none but the last
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: f64,
    /// One JSON document, with iperf3's members
    #[arg(short = 'J', long)]
    json: bool,
    /// JSON, an event a line
    #[arg(long, conflicts_with = "json")]
    json_stream: bool,
    /// CPU to keep to; at the client also N,M: itself and the server
    #[arg(short = 'A', long, value_name = "N[,M]", value_parser = affinity)]
    affinity: Option<Affinity>,
    /// How the bytes of the test go; `preload` begins again under libsmc.so [default: tcp]
    #[arg(long, value_enum)]
    over: Option<Over>,
}

#[derive(Debug, Args)]
struct ServerOptions {
    /// Address to listen on, and no other
    #[arg(short = 'B', long, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// End after one test
    #[arg(short = '1', long)]
    one_off: bool,
    /// End with an error if no client comes for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    idle_timeout: Option<f64>,
    /// Print the port and nothing else
    #[arg(long, hide = true)]
    announce: bool,
}

#[derive(Debug, Args)]
struct ClientOptions {
    /// Requests and responses on one connection: latency
    #[arg(long, conflicts_with = "crr")]
    rr: bool,
    /// The same with a new connection for each
    #[arg(long)]
    crr: bool,
    /// Connections at once
    #[arg(short = 'P', long, value_name = "N", default_value_t = 1)]
    parallel: u32,
    /// The server sends
    #[arg(short = 'R', long, conflicts_with = "bidir")]
    reverse: bool,
    /// Both send, each on connections of its own
    #[arg(long)]
    bidir: bool,
    /// Seconds that are measured [default: 10]
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds, conflicts_with_all = ["bytes", "blockcount"])]
    time: Option<f64>,
    /// Bytes to send in place of a time (k, m, g)
    #[arg(short = 'n', long, value_name = "N", value_parser = size, conflicts_with = "blockcount")]
    bytes: Option<u64>,
    /// Writes, or requests, in place of a time (k, m, g)
    #[arg(short = 'k', long, value_name = "N", value_parser = size)]
    blockcount: Option<u64>,
    /// Bytes of a write, or of request[,response] (k, m) [default: 128k, requests 64]
    #[arg(short, long, value_name = "N[,M]", value_parser = lengths)]
    length: Option<Lengths>,
    /// SO_SNDBUF and SO_RCVBUF of the connections (k, m)
    #[arg(short, long, value_name = "N", value_parser = size)]
    window: Option<u64>,
    /// TCP_NODELAY; requests always have it
    #[arg(short = 'N', long)]
    no_delay: bool,
    /// Send with sendfile(2)
    #[arg(short = 'Z', long)]
    zerocopy: bool,
    /// Seconds at the start that do not count
    #[arg(short = 'O', long, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    omit: f64,
    /// Check every byte at its receiver
    #[arg(long)]
    verify: bool,
    /// A test for each of these lengths, one after another [without sizes: 1,16,256,4k,64k,1m]
    #[arg(long, value_name = "SIZES", value_parser = size, value_delimiter = ',', num_args = 0.., require_equals = true,
          default_missing_value = "1,16,256,4k,64k,1m", conflicts_with = "length")]
    sweep: Option<Vec<u64>>,
    /// How threads wait for their connections
    #[arg(long, value_enum, default_value_t = Io::Blocking)]
    io: Io,
    /// Threads that share the connections, with poll and epoll, at each end
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: u32,
    /// A process for each connection, at both ends, in place of threads
    #[arg(long, conflicts_with = "threads")]
    processes: bool,
    /// Milliseconds that connecting may take
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    connect_timeout: u64,
}

/// What to do.
#[derive(Debug)]
pub enum Task {
    Server(Settings, Option<Over>),
    Client(Vec<Spec>, Target),
    Compare(Box<compare::Options>),
    Work(Box<Order>),
}

impl Options {
    /// What they ask for.
    ///
    /// # Errors
    /// What does not go together.
    pub fn task(self) -> Result<Task> {
        match (self.command, self.server, self.client) {
            (Some(Role::Server { common, serving }), ..) => Ok(server(&common, &serving)),
            (Some(Role::Client { host, common, asking }), ..) => client(host, &common, &asking),
            (Some(Role::Worker { order }), ..) => {
                let order: Order = serde_json::from_str(&order).map_err(|e| Problem::new(e.to_string()))?;
                order.spec.check()?;
                Ok(Task::Work(Box::new(order)))
            }
            (Some(Role::Compare(options)), ..) => Ok(Task::Compare(options)),
            (None, true, _) => Ok(server(&self.common, &self.serving)),
            (None, false, Some(host)) => client(host, &self.common, &self.asking),
            (None, false, None) => {
                Err(Problem::new("say `smc perf server` or `smc perf client HOST`, or -s, -c HOST"))
            }
        }
    }
}

fn form(common: &CommonOptions) -> Form {
    match () {
        () if common.json => Form::Json,
        () if common.json_stream => Form::Lines,
        () => Form::Text,
    }
}

fn server(common: &CommonOptions, serving: &ServerOptions) -> Task {
    let settings = Settings {
        bind: serving.bind,
        port: common.port,
        one_off: serving.one_off,
        idle: serving.idle_timeout.map(Duration::from_secs_f64),
        interval: common.interval,
        form: if serving.announce { Form::Silent } else { form(common) },
        cpu: common.affinity.map(|a| a.own),
        announce: serving.announce,
    };
    Task::Server(settings, common.over)
}

fn client(host: String, common: &CommonOptions, asking: &ClientOptions) -> Result<Task> {
    let target = Target {
        host,
        port: common.port,
        limit: Duration::from_millis(asking.connect_timeout),
        cpu: common.affinity.map(|a| a.own),
        interval: common.interval,
        form: form(common),
    };
    let spec = spec(common, asking);
    let sizes = asking.sweep.iter().flatten();
    let mut tests: Vec<Spec> = sizes
        .map(|n| Spec {
            length: usize::try_from(*n).unwrap_or(usize::MAX),
            response: if spec.kind == Kind::Stream { 1 } else { usize::try_from(*n).unwrap_or(usize::MAX) },
            ..spec.clone()
        })
        .collect();
    if tests.is_empty() {
        tests.push(spec);
    }
    for spec in &tests {
        spec.check()?;
    }
    Ok(Task::Client(tests, target))
}

fn spec(common: &CommonOptions, asking: &ClientOptions) -> Spec {
    let kind = match (asking.rr, asking.crr) {
        (true, _) => Kind::Rr,
        (_, true) => Kind::Crr,
        _ => Kind::Stream,
    };
    let lengths = asking.length.unwrap_or(match kind {
        Kind::Stream => Lengths { out: LENGTH, back: None },
        _ => Lengths { out: 64, back: None },
    });
    let counted = asking.bytes.is_some() || asking.blockcount.is_some();
    Spec {
        kind,
        over: common.over.unwrap_or(Over::Tcp),
        direction: match (asking.reverse, asking.bidir) {
            (true, _) => Direction::Reverse,
            (_, true) => Direction::Both,
            _ => Direction::Forward,
        },
        parallel: asking.parallel,
        time: asking.time.or((!counted).then_some(10.0)),
        bytes: asking.bytes,
        blocks: asking.blockcount,
        omit: asking.omit,
        length: lengths.out,
        response: lengths.back.unwrap_or(if kind == Kind::Stream { 1 } else { lengths.out }),
        window: asking.window.map(|w| usize::try_from(w).unwrap_or(usize::MAX)),
        nodelay: asking.no_delay,
        zerocopy: asking.zerocopy,
        verify: asking.verify,
        io: asking.io,
        threads: asking.threads,
        server_cpu: common.affinity.and_then(|a| a.servers),
        own_process: asking.processes,
    }
}

/// A number of bytes with iperf3's suffixes, powers of 1024.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    let not = || format!("{text:?} is no size; for example 64, 128k, 1m, 2g");
    let (digits, factor) = match text.char_indices().last().ok_or_else(not)? {
        (at, 'k' | 'K') => (&text[..at], 1 << 10),
        (at, 'm' | 'M') => (&text[..at], 1 << 20),
        (at, 'g' | 'G') => (&text[..at], 1u64 << 30),
        (at, 't' | 'T') => (&text[..at], 1u64 << 40),
        _ => (text, 1),
    };
    let n: u64 = digits.parse().map_err(|_| not())?;
    n.checked_mul(factor).filter(|n| *n > 0).ok_or_else(not)
}

pub fn seconds(text: &str) -> std::result::Result<f64, String> {
    let n: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.0..=MAX_SECONDS).contains(&n) { Ok(n) } else { Err("from 0 to 86400 seconds".into()) }
}

/// iperf3 has nothing below a tenth of a second.
fn interval(text: &str) -> std::result::Result<f64, String> {
    let n = seconds(text)?;
    if n == 0.0 || n >= 0.1 { Ok(n) } else { Err("0, or from 0.1 to 86400 seconds".into()) }
}

/// Of a request, and of its response if that is not as long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lengths {
    out: usize,
    back: Option<usize>,
}

fn lengths(text: &str) -> std::result::Result<Lengths, String> {
    let one = |t: &str| size(t).and_then(|n| usize::try_from(n).map_err(|e| e.to_string()));
    match text.split_once(',') {
        Some((out, back)) => Ok(Lengths { out: one(out)?, back: Some(one(back)?) }),
        None => Ok(Lengths { out: one(text)?, back: None }),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Affinity {
    own: usize,
    servers: Option<usize>,
}

fn affinity(text: &str) -> std::result::Result<Affinity, String> {
    let one = |t: &str| t.parse().map_err(|_| format!("{t:?} is no number of a CPU"));
    match text.split_once(',') {
        Some((own, servers)) => Ok(Affinity { own: one(own)?, servers: Some(one(servers)?) }),
        None => Ok(Affinity { own: one(text)?, servers: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        options: Options,
    }

    fn task(line: &str) -> std::result::Result<Task, String> {
        let words = ["perf"].into_iter().chain(line.split_whitespace());
        let only = Only::try_parse_from(words).map_err(|e| e.to_string())?;
        only.options.task().map_err(|p| p.to_string())
    }

    fn tests(line: &str) -> Vec<Spec> {
        match task(line) {
            Ok(Task::Client(tests, _)) => tests,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn iperf3s_lines_mean_what_they_mean_there() {
        let one = tests("-c h -p 9 -P 3 -R -n 2m -l 64k -w 1m -N -Z -O 0.5 -A 0,1 -J -i 0").remove(0);
        assert_eq!((one.parallel, one.direction), (3, Direction::Reverse));
        assert_eq!((one.bytes, one.blocks, one.time), (Some(2 << 20), None, None));
        assert_eq!((one.length, one.window), (64 << 10, Some(1 << 20)));
        assert!(one.nodelay && one.zerocopy);
        assert_eq!((one.omit, one.server_cpu), (0.5, Some(1)));
        assert_eq!(tests("-c h")[0].time, Some(10.0));
        assert_eq!(tests("-c h -k 7")[0].blocks, Some(7));
        assert_eq!(tests("client h --bidir")[0].direction, Direction::Both);
        assert!(matches!(task("-s -1 -p 0"), Ok(Task::Server(s, None)) if s.one_off && s.port == 0));
        assert!(matches!(task("server -B ::1"), Ok(Task::Server(s, _)) if s.bind.is_some()));
    }

    #[test]
    fn ours_are_understood() {
        let rr = tests("client h --rr -l 100,1k --io epoll --threads 2 --over unix --verify").remove(0);
        assert_eq!((rr.kind, rr.length, rr.response), (Kind::Rr, 100, 1024));
        assert_eq!((rr.io, rr.threads, rr.over, rr.verify), (Io::Epoll, 2, Over::Unix, true));
        let sweep: Vec<usize> = tests("client h --crr --sweep=1,2k").iter().map(|s| s.response).collect();
        assert_eq!(sweep, [1, 2048]);
        assert_eq!(tests("client h --sweep").len(), 6);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "-s -c h",
            "-s -R",
            "-s -t 1",
            "-c h -1",
            "-c h -t x",
            "-c h -t -1",
            "-c h -n 0",
            "-c h -n 1q",
            "-c h -l 1,x",
            "-c h -P 0",
            "-c h -t 1 -n 1",
            "-c h -n 1 -k 1",
            "-c h -R --bidir",
            "-c h --rr --crr",
            "-c h -p 99999",
            "-c h --io none",
            "-c h --over ip",
            "-c h -A x",
            "-c h -i 0.01",
            "-c h --rr -R",
            "-c h -J --json-stream",
            "-c h -l 65m",
            "-c h -n 99999999999999999999",
            "-c h -O 1e9",
            "-p 1",
            "client",
            "-c h --threads 0",
            "server -R",
        ] {
            assert!(task(line).is_err(), "{line}");
        }
    }
}
