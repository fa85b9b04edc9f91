//! `smc perf compare`: the same traffic by several ways, in turn, and how many times better each is.
//!
//! Each round runs each way with a server and a client of its own, in the opposite order every other time. A ratio is
//! the median of the ratios of the rounds: what else the machine does, it does to neighbours.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};

use super::bars::{self, Bar};
use super::events::{Event, Inbox};
use super::figures::{in_turn, machine, median, short, times};
use super::options;
use super::signals::{INTERRUPTED, Interrupts};
use super::spec::{Io, Over};
use super::wire::{Problem, Result};
use crate::output::{complain, emit};

#[derive(Debug, Args)]
pub struct Options {
    /// Ways, the first is what the others are compared with
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tcp,unix,preload,native")]
    over: Vec<Over>,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "stream,small,rr,crr")]
    tests: Vec<Case>,
    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds that each measurement takes
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = options::seconds)]
    time: f64,
    /// Writes, or requests, in place of a time (k, m, g)
    #[arg(short = 'k', long, value_name = "N", value_parser = options::size, conflicts_with = "time")]
    blockcount: Option<u64>,
    /// Seconds at the start of each that do not count
    #[arg(short = 'O', long, value_name = "SECONDS", default_value = "0.2", value_parser = options::seconds)]
    omit: f64,
    /// Bytes of a write or a request, for every test
    #[arg(short, long, value_name = "N", value_parser = options::size)]
    length: Option<u64>,
    /// Connections at once
    #[arg(short = 'P', long, value_name = "N", default_value_t = 1)]
    parallel: u32,
    /// How threads wait for their connections (crr: always blocking)
    #[arg(long, value_enum, default_value_t = Io::Blocking)]
    io: Io,
    /// Threads that share the connections, with poll and epoll, at each end
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: u32,
    /// Check every byte at its receiver
    #[arg(long)]
    verify: bool,
    /// Draw a picture into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// JSON, with the value of each round
    #[arg(short = 'J', long)]
    json: bool,
}

/// A traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Case {
    /// A stream, writes of 128 KiB
    Stream,
    /// A stream, writes of 64 bytes
    Small,
    /// Round trips of 64 bytes
    Rr,
    /// A connection for each round trip
    Crr,
}

/// A number of a report.
#[derive(Debug, Clone, Copy)]
struct Measure {
    name: &'static str,
    unit: &'static str,
    less_is_better: bool,
    /// From the client's `end`.
    get: fn(&Value) -> Option<f64>,
}

const fn measure(
    name: &'static str,
    unit: &'static str,
    less_is_better: bool,
    get: fn(&Value) -> Option<f64>,
) -> Measure {
    Measure { name, unit, less_is_better, get }
}

/// CPU seconds of both ends.
fn cpu(end: &Value) -> Option<f64> {
    Some(end["client"]["cpu_seconds"].as_f64()? + end["server"]["cpu_seconds"].as_f64()?)
}

fn per_second(end: &Value) -> Option<f64> {
    end["transactions"]["per_second"].as_f64()
}

const RECEIVED: fn(&Value) -> Option<f64> = |e| e["sum_received"]["bytes"].as_f64();
const CPU_PER_GB: Measure = measure("CPU of both", "s/GB", true, |e| Some(cpu(e)? / RECEIVED(e)? * 1e9));
const CPU_EACH: Measure =
    measure("CPU of both", "us", true, |e| Some(cpu(e)? * 1e6 / e["transactions"]["count"].as_f64()?));
const P50: Measure = measure("p50", "us", true, |e| e["latency_us"]["p50"].as_f64());
const P99: Measure = measure("p99", "us", true, |e| e["latency_us"]["p99"].as_f64());

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Small => "small",
            Self::Rr => "rr",
            Self::Crr => "crr",
        }
    }

    fn measures(self) -> &'static [Measure] {
        const BITS: Measure = measure("bytes", "Gbit/s", false, |e| {
            e["sum_received"]["bits_per_second"].as_f64().map(|b| b * 1e-9)
        });
        const MESSAGES: Measure = measure("messages", "1000/s", false, |e| {
            Some(e["sum_sent"]["messages"].as_f64()? / e["sum_sent"]["seconds"].as_f64()? * 1e-3)
        });
        const RATE: Measure = measure("rate", "1000/s", false, |e| per_second(e).map(|n| n * 1e-3));
        match self {
            Self::Stream => &[BITS, CPU_PER_GB],
            Self::Small => &[MESSAGES, CPU_PER_GB],
            Self::Rr => &[RATE, P50, P99, CPU_EACH],
            Self::Crr => &[RATE, P50, CPU_EACH],
        }
    }

    /// Options of the client.
    fn options(self, o: &Options) -> Vec<String> {
        let length = |n: u64| o.length.unwrap_or(n).to_string();
        let words: &[&str] = match self {
            Self::Stream => &["-l", &length(128 << 10)],
            Self::Small => &["-l", &length(64)],
            Self::Rr => &["--rr", "-l", &length(64)],
            Self::Crr => &["--crr", "-l", &length(64)],
        };
        let mut words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let io = match (self, o.io) {
            (Self::Crr, _) | (_, Io::Blocking) => "blocking",
            (_, Io::Poll) => "poll",
            (_, Io::Epoll) => "epoll",
        };
        words.extend(["--io", io].map(String::from));
        words
    }
}

/// What came of a measure: the values of each way, round by round.
#[derive(Debug)]
struct Row {
    case: Case,
    measure: Measure,
    values: Vec<(Over, Vec<f64>)>,
}

impl Row {
    fn new(case: Case, measure: Measure, over: &[Over]) -> Self {
        Self { case, measure, values: over.iter().map(|w| (*w, Vec::new())).collect() }
    }

    /// Against the first way, which itself has none.
    fn times(&self, i: usize) -> Option<[f64; 3]> {
        let (_, than) = self.values.first()?;
        if i == 0 { None } else { times(&self.values[i].1, than, self.measure.less_is_better) }
    }
}

/// A child that is killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn smc(words: &[&str]) -> Result<Command> {
    let mut c = Command::new(env::current_exe()?);
    c.arg("perf").args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(c)
}

/// One way, once: what the client's report has under `end`.
fn once(case: Case, over: Over, o: &Options) -> Result<Value> {
    let server = ["server", "-1", "-B", "127.0.0.1", "-p", "0", "--announce", "--idle-timeout", "30"];
    let mut server = Running(smc(&server)?.args(["--over", over.name()]).spawn()?);
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().expect("piped")).read_line(&mut port)?;
    if port.is_empty() {
        let mut said = String::new();
        server.0.stderr.take().expect("piped").read_to_string(&mut said)?;
        return Err(Problem::new(said.trim().trim_start_matches("smc: ")));
    }
    let mut client =
        smc(&["client", "127.0.0.1", "-J", "-i", "0", "-p", port.trim(), "--over", over.name()])?;
    client.args(case.options(o));
    match o.blockcount {
        Some(n) => client.args(["-k", &n.to_string()]),
        None => client.args(["-t", &o.time.to_string()]),
    };
    client.args(["-O", &o.omit.to_string(), "-P", &o.parallel.to_string()]);
    client.args(["--threads", &o.threads.to_string()]);
    if o.verify {
        client.arg("--verify");
    }
    let done = client.output()?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        let report: Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
        let why = report["error"].as_str().unwrap_or(said.trim().trim_start_matches("smc: "));
        return Err(Problem::new(format!("{} over {}: {why}", case.name(), over.name())));
    }
    let mut report: Value = serde_json::from_slice(&done.stdout)
        .map_err(|e| Problem::new(format!("the client's report: {e}")))?;
    Ok(report["end"].take())
}

/// What is to be known beside the numbers: a way that was not what its name says.
fn remark(case: Case, over: Over, end: &Value) -> Option<String> {
    let mode = end["client"]["mode"].as_str()?;
    if !matches!(over, Over::Preload | Over::Native) || mode == "SHM" {
        return None;
    }
    let reasons = end["client"]["ways"]["reasons"].as_object()?;
    let mut why: Vec<&str> = reasons.keys().map(String::as_str).collect();
    if why.is_empty() {
        why.push("it was not upgraded within the test");
    }
    Some(format!("{} over {} went by {mode}: {}", case.name(), over.name(), why.join(", ")))
}

/// Everything.
///
/// # Errors
/// If a measurement fails.
pub fn run(o: &Options) -> Result<ExitCode> {
    let interrupts = Interrupts::new()?;
    let inbox = Inbox::new();
    interrupts.for_test(&inbox.for_all());
    let mut rows: Vec<Row> = Vec::new();
    for case in &o.tests {
        rows.extend(case.measures().iter().map(|m| Row::new(*case, *m, &o.over)));
    }
    let (mut remarks, mut interrupted, mut rounds) = (Vec::new(), false, 0);
    let all = o.rounds as usize * o.tests.len() * o.over.len();
    'rounds: for n in 0..o.rounds as usize {
        let mut ends = Vec::new();
        for case in &o.tests {
            for over in in_turn(&o.over, n) {
                progress(rounds as usize * o.tests.len() * o.over.len() + ends.len(), all, *case, over);
                let end = once(*case, over, o);
                // The children have had the signal as well, and are through with what they did.
                if matches!(inbox.recv(Some(Duration::ZERO)), Some(Event::Signal)) {
                    interrupted = true;
                    break 'rounds;
                }
                ends.push((*case, over, end?));
            }
        }
        rounds += 1;
        take(&mut rows, &ends, &mut remarks)?;
    }
    progress_over();
    interrupts.for_nobody();
    let text =
        if o.json { format!("{:#}\n", as_json(&rows, o, rounds)) } else { as_text(&rows, rounds, &remarks) };
    let code = emit(&text, if interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS });
    if let Some(path) = &o.svg {
        fs::write(path, picture(&rows)).map_err(|e| Problem::new(format!("{}: {e}", path.display())))?;
    }
    if o.json {
        remarks.iter().for_each(|r| complain(r));
    }
    Ok(code)
}

/// A round's numbers, all or none.
fn take(rows: &mut [Row], ends: &[(Case, Over, Value)], remarks: &mut Vec<String>) -> Result<()> {
    for (case, over, end) in ends {
        for row in rows.iter_mut().filter(|r| r.case == *case) {
            let value = (row.measure.get)(end).filter(|v| v.is_finite()).ok_or_else(|| {
                Problem::new(format!(
                    "{} over {}: no {} was measured",
                    case.name(),
                    over.name(),
                    row.measure.name
                ))
            })?;
            row.values.iter_mut().filter(|(w, _)| w == over).for_each(|(_, v)| v.push(value));
        }
        if let Some(r) = remark(*case, *over, end).filter(|r| !remarks.contains(r)) {
            remarks.push(r);
        }
    }
    Ok(())
}

fn progress(done: usize, all: usize, case: Case, over: Over) {
    if std::io::stderr().is_terminal() {
        const WIDTH: usize = 40;
        let bar: String = (0..WIDTH).map(|i| if i * all < done * WIDTH { '█' } else { '░' }).collect();
        // A bar that can't be drawn is missed by nobody.
        let _ = write!(
            std::io::stderr(),
            "\r{bar} {}/{all} {} over {}\x1b[K",
            done + 1,
            case.name(),
            over.name()
        );
    }
}

fn progress_over() {
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
}

/// A bar of at most so many characters, in eighths of one.
fn blocks(part: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let n = (part.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    "█".repeat(n / 8) + EIGHTHS[n % 8]
}

/// The table, with a bar for each number: within 80 columns.
fn as_text(rows: &[Row], rounds: u32, remarks: &[String]) -> String {
    const BAR: usize = 20;
    let mut out =
        format!("{}\n{rounds} rounds, medians; times better than the first way [least, most]\n", machine());
    for row in rows {
        let better = if row.measure.less_is_better { "less is better" } else { "more is better" };
        out += &format!("\n{} {}, {} ({better})\n", row.case.name(), row.measure.name, row.measure.unit);
        let medians: Vec<f64> = row.values.iter().map(|(_, v)| median(v.clone())).collect();
        let most = medians.iter().copied().fold(0.0, f64::max);
        for (i, (over, _)) in row.values.iter().enumerate() {
            let bar = blocks(medians[i] / most, BAR);
            let ratio = row.times(i).map_or_else(String::new, |[least, middle, most]| {
                format!("{:>7}x [{}, {}]", short(middle), short(least), short(most))
            });
            let line = format!("  {:<8}{:>10}  {bar:<BAR$} {ratio}", over.name(), short(medians[i]));
            out += line.trim_end();
            out.push('\n');
        }
    }
    if !remarks.is_empty() {
        out.push('\n');
    }
    remarks.iter().for_each(|r| out += &format!("note: {r}\n"));
    out
}

fn as_json(rows: &[Row], o: &Options, rounds: u32) -> Value {
    let number = |v: f64| if v.is_finite() { json!(v) } else { Value::Null };
    let measures: Vec<Value> = rows
        .iter()
        .map(|row| {
            let (mut ways, mut ratios) = (Map::new(), Map::new());
            for (i, (over, values)) in row.values.iter().enumerate() {
                ways.insert(
                    over.name().into(),
                    json!({ "median": number(median(values.clone())), "values": values }),
                );
                if let Some([least, middle, most]) = row.times(i) {
                    let ratio =
                        json!({ "least": number(least), "median": number(middle), "most": number(most) });
                    ratios.insert(over.name().into(), ratio);
                }
            }
            json!({
                "test": row.case.name(),
                "measure": row.measure.name,
                "unit": row.measure.unit,
                "less_is_better": row.measure.less_is_better,
                "ways": ways,
                "times": ratios,
            })
        })
        .collect();
    json!({
        "machine": machine(),
        "version": concat!("smc perf ", env!("CARGO_PKG_VERSION")),
        "rounds": rounds,
        "seconds": o.blockcount.is_none().then_some(o.time),
        "blocks": o.blockcount,
        "parallel": o.parallel,
        "measures": measures,
    })
}

fn picture(rows: &[Row]) -> String {
    const COLOURS: [&str; 4] = ["#8a8", "#58a", "#a85", "#a5a"];
    let mut all = Vec::new();
    for row in rows {
        for (i, (over, _)) in row.values.iter().enumerate() {
            if let Some(times) = row.times(i) {
                let name = format!("{} {}: {}", row.case.name(), row.measure.name, over.name());
                all.push(Bar { name, times, colour: COLOURS[(i - 1) % COLOURS.len()], goal: None });
            }
        }
    }
    let first = rows.first().and_then(|r| r.values.first()).map_or("tcp", |(over, _)| over.name());
    bars::svg(
        &format!("times better than {first}"),
        &format!("bar: median; thin line: least to most; {}", machine()),
        &all,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(case: Case, values: &[&[f64]]) -> Row {
        let over = [Over::Tcp, Over::Unix, Over::Preload];
        let values = over.into_iter().zip(values.iter().map(|v| v.to_vec())).collect();
        Row { case, measure: case.measures()[0], values }
    }

    #[test]
    fn the_table_fits_a_terminal_and_has_ratios_and_bars() {
        let rows = [row(Case::Small, &[&[1.0], &[2.0], &[1e7]]), row(Case::Rr, &[&[1.0], &[0.5], &[3.0]])];
        let text = as_text(&rows, 1, &["a note".into()]);
        assert!(text.lines().skip(1).all(|l| l.chars().count() <= 80), "{text}");
        assert!(
            text.contains("2.00x [2.00, 2.00]") && text.contains('█') && text.contains("note: a note"),
            "{text}"
        );
        let svg = picture(&rows);
        assert!(svg.contains("rr rate: preload") && svg.contains("times better than tcp"));
    }

    #[test]
    fn bars_end_at_their_width() {
        assert_eq!(blocks(1.0, 4), "████");
        assert_eq!(blocks(2.0, 4), "████");
        assert_eq!(blocks(0.0, 4), "");
        assert_eq!(blocks(0.5, 1), "▌");
        assert_eq!(blocks(f64::NAN, 4), "");
    }

    #[test]
    fn numbers_are_taken_from_a_report_or_missed() {
        let end = json!({
            "client": { "cpu_seconds": 1.0, "mode": "TCP", "ways": { "reasons": { "too-short": 3 } } },
            "server": { "cpu_seconds": 1.0 },
            "sum_received": { "bytes": 1e9, "bits_per_second": 8e9 },
        });
        let mut rows: Vec<Row> = Case::Stream
            .measures()
            .iter()
            .map(|m| Row::new(Case::Stream, *m, &[Over::Tcp, Over::Preload]))
            .collect();
        let mut remarks = Vec::new();
        let ends = [(Case::Stream, Over::Tcp, end.clone()), (Case::Stream, Over::Preload, end)];
        assert_eq!(take(&mut rows, &ends, &mut remarks), Ok(()));
        assert_eq!((rows[0].values[0].1[0], rows[1].values[0].1[0]), (8.0, 2.0));
        assert_eq!(remarks, ["stream over preload went by TCP: too-short"]);
        let broken = [(Case::Stream, Over::Tcp, json!({}))];
        assert!(take(&mut rows, &broken, &mut remarks).is_err());
    }
}
