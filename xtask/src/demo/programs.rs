//! The clients and servers of the demonstration, none of which knows of libsmc.

use crate::rounds::{Measure, Result, Round, example, free_port, number_after, wait_for_listener};
use crate::shell::Running;

/// A server, its client, and what they measure.
pub struct Pair {
    pub title: &'static str,
    pub what: &'static str,
    pub needs: &'static [&'static str],
    pub measures: &'static [Measure],
    /// One round: starts the server, runs the client, returns a value for each measure.
    pub run: fn(&mut Round) -> Result<Vec<f64>>,
}

const fn more(name: &'static str, unit: &'static str) -> Measure {
    Measure { name, unit, less_is_better: false }
}

const fn less(name: &'static str, unit: &'static str) -> Measure {
    Measure { name, unit, less_is_better: true }
}

/// The first needs nothing but cargo; the others run where they are installed.
pub const PAIRS: &[Pair] = &[
    Pair {
        title: "built-in",
        what: "examples/plain_server, plain_client: std::net",
        needs: &[],
        measures: &[
            more("stream, one connection", "Gbit/s"),
            less("ping-pong, 64 bytes, p50", "us"),
            less("ping-pong, 64 bytes, p99", "us"),
        ],
        run: built_in,
    },
    Pair {
        title: "redis",
        what: "redis-server, redis-benchmark -c 50",
        needs: &["redis-server", "redis-benchmark"],
        measures: &[more("SET, 50 clients", "1000/s"), more("GET, 50 clients", "1000/s")],
        run: redis,
    },
    Pair {
        title: "iperf3",
        what: "one stream",
        needs: &["iperf3"],
        measures: &[more("stream, one connection", "Gbit/s")],
        run: iperf3,
    },
    Pair {
        title: "sockperf",
        what: "ping-pong --tcp, 64 bytes; sockperf counts half a round trip",
        needs: &["sockperf"],
        measures: &[less("ping-pong, p50", "us"), less("ping-pong, p99", "us")],
        run: sockperf,
    },
];

fn built_in(round: &mut Round) -> Result<Vec<f64>> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut server = Running::start(round.command(example("plain_server")).arg(&address))?;
    wait_for_listener(address.rsplit(':').next().unwrap_or_default().parse()?, &mut server)?;
    let seconds = round.seconds.to_string();
    let mut client = |round: &mut Round, what: &str| {
        let mut command = round.command(example("plain_client"));
        round.client(command.args([&address, what, &seconds]), &mut server)
    };
    let stream = client(round, "stream")?;
    let pingpong = client(round, "pingpong")?;
    let rate = number_after(&stream, "bytes")? * 8e-9 / number_after(&stream, "seconds")?;
    Ok(vec![rate, number_after(&pingpong, "p50")?, number_after(&pingpong, "p99")?])
}

fn redis(round: &mut Round) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server = round.command("redis-server");
    server.args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    let mut server = Running::start(&mut server)?;
    wait_for_listener(port.parse()?, &mut server)?;
    let requests = ((round.seconds * 100_000.0) as u64).to_string();
    let mut rates = Vec::new();
    for what in ["set", "get"] {
        let mut client = round.command("redis-benchmark");
        client.args(["-p", &port, "-c", "50", "-n", &requests, "-t", what, "--csv"]);
        let csv = round.client(&mut client, &mut server)?;
        rates.push(number_after(&csv, &format!("\"{}\",", what.to_uppercase()))? / 1000.0);
    }
    Ok(rates)
}

fn iperf3(round: &mut Round) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server =
        Running::start(round.command("iperf3").args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let seconds = round.seconds.ceil().to_string();
    let mut client = round.command("iperf3");
    client.args(["-c", "127.0.0.1", "-p", &port, "-t", &seconds, "-J"]);
    let json = round.client(&mut client, &mut server)?;
    let (_, received) = json.split_once("\"sum_received\"").ok_or("iperf3 counted nothing")?;
    Ok(vec![number_after(received, "\"bits_per_second\"")? * 1e-9])
}

fn sockperf(round: &mut Round) -> Result<Vec<f64>> {
    let port = free_port()?.to_string();
    let mut server = round.command("sockperf");
    let mut server = Running::start(server.args(["server", "--tcp", "-i", "127.0.0.1", "-p", &port]))?;
    wait_for_listener(port.parse()?, &mut server)?;
    let seconds = round.seconds.ceil().to_string();
    let mut client = round.command("sockperf");
    // A bounded rate: without it sockperf runs out of the sequence numbers that it sets aside by the second.
    client.args([
        "ping-pong",
        "--tcp",
        "-i",
        "127.0.0.1",
        "-p",
        &port,
        "-m",
        "64",
        "-t",
        &seconds,
        "--mps=1000000",
    ]);
    let text = round.client(&mut client, &mut server)?;
    Ok(vec![number_after(&text, "percentile 50.000 =")?, number_after(&text, "percentile 99.000 =")?])
}
