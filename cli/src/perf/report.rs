//! What a test says: lines for people, iperf3's JSON with ours added, or an event a line (`--json-stream`).
//!
//! In JSON what iperf3 has too has iperf3's name and place, so that what reads the one reads the other;
//! `docs/STATISTICS.md` lists what is added.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::crowd::{self, Word};
use super::flow::Counts;
use super::spec::{Direction, Kind, Spec, iperf3_id};
use super::test::{Found, Tick};
use crate::output::complain;

/// How it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
    /// JSON, an event a line, each as it happens.
    Lines,
    /// Nothing at all: somebody else reports.
    Silent,
    /// Intervals only, for the process that started this one.
    Words,
}

/// More connections than these are shown as a sum only.
const SHOWN: usize = 8;

/// Everything that is known at the end.
#[derive(Debug)]
pub struct Whole<'a> {
    pub mine: &'a Found,
    pub other: Option<&'a Found>,
    pub took: &'a Histogram<u64>,
    pub interrupted: bool,
    pub error: Option<String>,
}

/// One end's report of one test.
#[derive(Debug)]
pub struct Report {
    form: Form,
    spec: Spec,
    is_client: bool,
    terminal: bool,
    headed: bool,
    start: Value,
    intervals: Vec<Value>,
}

impl Report {
    /// `start` is what iperf3 has under that name.
    pub fn new(form: Form, spec: &Spec, is_client: bool, start: Value) -> Self {
        let mut report = Self {
            form,
            spec: spec.clone(),
            is_client,
            terminal: form == Form::Text && std::io::stderr().is_terminal(),
            headed: false,
            start: with_test(start, spec),
            intervals: Vec::new(),
        };
        if form == Form::Lines {
            let start = report.start.take();
            report.event("start", start);
        }
        report
    }

    /// Whether a bar of the progress is wanted.
    pub fn wants_progress(&self) -> bool {
        self.terminal
    }

    pub fn say(&self, text: &str) {
        if self.form == Form::Text {
            print(&format!("{text}\n"));
        }
    }

    fn event(&mut self, name: &str, data: Value) {
        print(&format!("{}\n", json!({ "event": name, "data": data })));
    }

    pub fn progress(&self, part: f64) {
        const WIDTH: usize = 40;
        if self.terminal {
            let part = part.clamp(0.0, 1.0);
            let full = (part * WIDTH as f64) as usize;
            let bar: String = (0..WIDTH).map(|i| if i < full { '█' } else { '░' }).collect();
            // A bar that can't be drawn is missed by nobody.
            let _ = write!(std::io::stderr(), "\r{bar} {:3.0} %", part * 100.0);
        }
    }

    fn clear(&self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    /// An interval.
    pub fn tick(&mut self, tick: &Tick) {
        match self.form {
            Form::Silent => {}
            Form::Words => crowd::say(&Word::Tick(tick.clone())),
            Form::Text => {
                self.clear();
                print(&self.tick_text(tick));
                self.headed = true;
            }
            Form::Json => {
                let value = self.tick_json(tick);
                self.intervals.push(value);
            }
            Form::Lines => {
                let value = self.tick_json(tick);
                self.event("interval", value);
            }
        }
    }

    /// A direction's name in a line, where there are two.
    fn role(&self, index: usize) -> &'static str {
        match (self.spec.direction, self.spec.client_sends(index) == self.is_client) {
            (Direction::Both, true) => "[TX]  ",
            (Direction::Both, false) => "[RX]  ",
            _ => "",
        }
    }

    /// The directions there are, each as the numbers of its connections.
    fn directions(&self, n: usize) -> Vec<std::ops::Range<usize>> {
        match self.spec.direction {
            Direction::Both => vec![0..n / 2, n / 2..n],
            _ => std::iter::once(0..n).collect(),
        }
    }

    fn tick_text(&self, tick: &Tick) -> String {
        let mut out = String::new();
        let stream = self.spec.kind == Kind::Stream;
        if !self.headed {
            out += &head(&self.spec);
        }
        let omitted = if tick.omitted { "  (omitted)" } else { "" };
        let mut line = |name: &str, role: &str, c: Counts| {
            let what = if stream {
                stream_cells(c, tick.from, tick.to)
            } else {
                rr_cells(c, tick, self.spec.parallel)
            };
            let _ = writeln!(out, "[{name:>3}]{role} {}{what}{omitted}", span(tick.from, tick.to));
        };
        let n = tick.flows.len();
        if n <= SHOWN && stream {
            for (i, c) in tick.flows.iter().enumerate() {
                line(&iperf3_id(i).to_string(), self.role(i), *c);
            }
        }
        for range in self.directions(n) {
            if !stream || range.len() > 1 {
                let role = self.role(range.start);
                line("SUM", role, sum(&tick.flows[range]));
            }
        }
        out
    }

    fn tick_json(&self, tick: &Tick) -> Value {
        let one = |c: Counts, sender: bool| {
            let mut j = moved(c, tick.to - tick.from, sender);
            (j["start"], j["end"], j["omitted"]) = (tick.from.into(), tick.to.into(), tick.omitted.into());
            j
        };
        let sends = |i: usize| self.spec.client_sends(i) == self.is_client;
        let streams: Vec<Value> = (0..tick.flows.len())
            .map(|i| {
                let mut j = one(tick.flows[i], sends(i));
                j["socket"] = iperf3_id(i).into();
                j
            })
            .collect();
        let mut out = json!({ "streams": streams });
        for (range, name) in self.directions(tick.flows.len()).into_iter().zip(["sum", "sum_bidir_reverse"]) {
            out[name] = one(sum(&tick.flows[range.clone()]), sends(range.start));
        }
        out
    }

    /// The end: to standard output, a failure to standard error as well. A JSON document is given back.
    pub fn end(&mut self, whole: &Whole<'_>) -> Option<Value> {
        self.clear();
        match self.form {
            Form::Silent | Form::Words => {}
            Form::Text => {
                print(&self.end_text(whole));
                if let Some(why) = &whole.error {
                    complain(why);
                }
            }
            Form::Json => {
                let mut all = json!({
                    "start": self.start.take(),
                    "intervals": std::mem::take(&mut self.intervals),
                    "end": self.end_json(whole),
                });
                if let Some(why) = &whole.error {
                    all["error"] = why.as_str().into();
                }
                return Some(all);
            }
            Form::Lines => {
                let end = self.end_json(whole);
                self.event("end", end);
                if let Some(why) = &whole.error {
                    self.event("error", why.as_str().into());
                }
            }
        }
        None
    }

    /// Who sent on a connection, and who received.
    fn ends<'a>(&self, whole: &Whole<'a>, index: usize) -> (Option<&'a Found>, Option<&'a Found>) {
        if self.spec.client_sends(index) == self.is_client {
            (Some(whole.mine), whole.other)
        } else {
            (whole.other, Some(whole.mine))
        }
    }

    /// What was sent and what was received over some connections, in seconds each.
    fn both(&self, whole: &Whole<'_>, range: std::ops::Range<usize>) -> [Option<(Counts, f64)>; 2] {
        let (sender, receiver) = self.ends(whole, range.start);
        let total = |found: &Found| {
            (range.clone().map(|i| found.flow(i)).fold(Counts::default(), Counts::plus), found.seconds)
        };
        [sender.map(total), receiver.map(total)]
    }

    fn end_text(&self, whole: &Whole<'_>) -> String {
        let mut out = String::from("- - - - - - - - - - - - - - - - - - - - - - - - -\n");
        if whole.interrupted {
            out += "interrupted; measured until then:\n";
        }
        if self.spec.kind == Kind::Stream {
            self.end_streams(whole, &mut out);
        } else {
            end_round_trips(whole, self.spec.parallel, &mut out);
        }
        let mut cpu = Vec::new();
        for (name, found) in self.named(whole) {
            let Some(found) = found else { continue };
            if !found.ways.connections.is_empty() {
                let _ = writeln!(out, "{name}: {}", found.ways.in_words());
            }
            cpu.push(format!(
                "{name} {:.3} s ({:.0} %{})",
                found.cpu.total,
                found.cpu.total / found.seconds * 100.0,
                self.each(found)
            ));
        }
        let _ = writeln!(out, "CPU: {}", cpu.join(", "));
        if self.spec.verify && whole.error.is_none() {
            out += "verified: every byte was as it was sent\n";
        }
        out
    }

    /// CPU time for what was measured.
    fn each(&self, found: &Found) -> String {
        match (self.spec.kind, per_gb(found), found.sum().messages) {
            (Kind::Stream, Some(s), _) => format!(", {s:.3} s/GB"),
            (Kind::Rr | Kind::Crr, _, n) if n > 0 => format!(", {} each", time(found.cpu.total / n as f64)),
            _ => String::new(),
        }
    }

    /// The client first.
    fn named<'a>(&self, whole: &Whole<'a>) -> [(&'static str, Option<&'a Found>); 2] {
        let ends = [Some(whole.mine), whole.other];
        let [client, server] = if self.is_client { ends } else { [ends[1], ends[0]] };
        [("client", client), ("server", server)]
    }

    fn end_streams(&self, whole: &Whole<'_>, out: &mut String) {
        let n = whole.mine.flows.len();
        *out += &head(&self.spec);
        let mut lines = |name: &str, range: std::ops::Range<usize>| {
            let role = self.role(range.start);
            for (end, who) in self.both(whole, range).into_iter().zip(["sender", "receiver"]) {
                if let Some((c, seconds)) = end {
                    let cells = stream_cells(c, 0.0, seconds);
                    let _ = writeln!(out, "[{name:>3}]{role} {}{cells}  {who}", span(0.0, seconds));
                }
            }
        };
        if n <= SHOWN {
            (0..n).for_each(|i| lines(&iperf3_id(i).to_string(), i..i + 1));
        }
        for range in self.directions(n).into_iter().filter(|r| r.len() > 1) {
            lines("SUM", range);
        }
    }

    fn end_json(&self, whole: &Whole<'_>) -> Value {
        let n = whole.mine.flows.len();
        let both = |range: std::ops::Range<usize>| {
            self.both(whole, range).into_iter().zip([true, false]).map(|(end, sender)| {
                end.map_or(Value::Null, |(c, seconds)| {
                    // Each end's count of its own side; requests and responses go both ways.
                    let c = match (self.spec.kind, sender) {
                        (Kind::Stream, true) => Counts { rx: 0, ..c },
                        (Kind::Stream, false) => Counts { tx: 0, ..c },
                        _ => c,
                    };
                    moved(c, seconds, sender)
                })
            })
        };
        let streams: Vec<Value> = (0..n)
            .map(|i| {
                let mut pair = both(i..i + 1);
                let id = iperf3_id(i);
                let end = |j: Option<Value>| {
                    let mut j = j.unwrap_or_default();
                    if j.is_object() {
                        j["socket"] = id.into();
                    }
                    j
                };
                json!({ "sender": end(pair.next()), "receiver": end(pair.next()) })
            })
            .collect();
        let mut out = json!({ "streams": streams, "interrupted": whole.interrupted });
        let names = [["sum_sent", "sum_received"], ["sum_sent_bidir_reverse", "sum_received_bidir_reverse"]];
        for (range, names) in self.directions(n).into_iter().zip(names) {
            for (j, name) in both(range).zip(names) {
                out[name] = j;
            }
        }
        let percent = |found: Option<&Found>| {
            found.map(|f| [f.cpu.total, f.cpu.user, f.cpu.system].map(|s| s / f.seconds * 100.0))
        };
        let mut use_of = json!({});
        for (who, found) in [("host", Some(whole.mine)), ("remote", whole.other)] {
            for (i, what) in ["total", "user", "system"].into_iter().enumerate() {
                use_of[format!("{who}_{what}")] = percent(found).map(|p| p[i]).into();
            }
        }
        out["cpu_utilization_percent"] = use_of;
        for (name, found) in self.named(whole) {
            out[name] = found.map_or(Value::Null, |f| {
                json!({
                    "cpu_seconds": f.cpu.total,
                    "cpu_seconds_per_gb": per_gb(f),
                    "mode": (!f.ways.connections.is_empty()).then(|| f.ways.mode()),
                    "ways": f.ways,
                })
            });
        }
        if self.spec.kind != Kind::Stream {
            out["transactions"] = json!({
                "count": whole.mine.sum().messages,
                "per_second": whole.mine.sum().messages as f64 / whole.mine.seconds,
            });
            out["latency_us"] = latency(whole.took);
        }
        if self.spec.verify {
            out["verified"] = whole.error.is_none().into();
        }
        out
    }
}

/// What stands above the lines of a sweep.
pub fn sweep_head(spec: &Spec) -> String {
    match spec.kind {
        Kind::Stream => {
            format!("{:>10} {:>15} {:>12} {:>9}  Mode\n", "Length", "Bitrate", "Writes/s", "CPU s/GB")
        }
        _ => format!(
            "{:>10} {:>12} {:>9} {:>9} {:>9} {:>9}  Mode\n",
            "Length", "Rate/s", "p50", "p99", "max", "CPU each"
        ),
    }
}

/// A test of a sweep; CPU time is that of both ends.
pub fn sweep_line(spec: &Spec, whole: &Whole<'_>) -> String {
    let (c, seconds, took) = (whole.mine.sum(), whole.mine.seconds, whole.took);
    let cpu = whole.mine.cpu.total + whole.other.map_or(0.0, |o| o.cpu.total);
    let mode = whole.mine.ways.mode();
    let messages = rate(c.messages as f64 / seconds);
    if spec.kind == Kind::Stream {
        let per_gb = if c.bytes() > 0 { cpu / (c.bytes() as f64 * 1e-9) } else { f64::NAN };
        let bits = bits(c.bytes() as f64 * 8.0 / seconds);
        return format!("{:>10} {bits:>15} {messages:>12} {per_gb:>9.3}  {mode}\n", spec.length);
    }
    let at =
        |q: f64| if took.is_empty() { "-".into() } else { time(took.value_at_quantile(q) as f64 * 1e-9) };
    let each = if c.messages > 0 { cpu / c.messages as f64 } else { f64::NAN };
    format!(
        "{:>10} {messages:>12} {:>9} {:>9} {:>9} {:>9}  {mode}\n",
        spec.length,
        at(0.5),
        at(0.99),
        at(1.0),
        time(each)
    )
}

fn print(text: &str) {
    // As with any program: who closes our output wants no more.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn with_test(mut start: Value, spec: &Spec) -> Value {
    start["version"] = concat!("smc perf ", env!("CARGO_PKG_VERSION")).into();
    start["test_start"] = json!({
        "protocol": "TCP",
        "num_streams": spec.parallel,
        "blksize": spec.length,
        "response": spec.response,
        "omit": spec.omit,
        "duration": spec.time.unwrap_or(0.0),
        "bytes": spec.bytes.unwrap_or(0),
        "blocks": spec.blocks.unwrap_or(0),
        "reverse": u8::from(spec.direction == Direction::Reverse),
        "bidir": u8::from(spec.direction == Direction::Both),
        "test": spec.kind,
        "over": spec.over,
        "io": spec.io,
        "threads": spec.threads,
        "verify": spec.verify,
    });
    start
}

fn sum(flows: &[Counts]) -> Counts {
    flows.iter().copied().fold(Counts::default(), Counts::plus)
}

/// CPU seconds for 10⁹ bytes, of which there must be some.
pub fn per_gb(found: &Found) -> Option<f64> {
    let bytes = found.sum().bytes();
    (bytes > 0).then(|| found.cpu.total / (bytes as f64 * 1e-9))
}

/// A member of iperf3's: bytes in a time.
fn moved(c: Counts, seconds: f64, sender: bool) -> Value {
    json!({
        "start": 0.0,
        "end": seconds,
        "seconds": seconds,
        "bytes": c.bytes(),
        "bits_per_second": if seconds > 0.0 { c.bytes() as f64 * 8.0 / seconds } else { 0.0 },
        "messages": c.messages,
        "sender": sender,
    })
}

/// Microseconds.
fn latency(took: &Histogram<u64>) -> Value {
    let at = |q: f64| took.value_at_quantile(q) as f64 / 1e3;
    if took.is_empty() {
        return Value::Null;
    }
    json!({
        "count": took.len(),
        "min": took.min() as f64 / 1e3,
        "mean": took.mean() / 1e3,
        "stddev": took.stdev() / 1e3,
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "max": took.max() as f64 / 1e3,
    })
}

fn head(spec: &Spec) -> String {
    let role = if spec.direction == Direction::Both { "[Role]" } else { "" };
    match spec.kind {
        Kind::Stream => format!("[ ID]{role} Interval           Transfer     Bitrate\n"),
        _ => "[ ID] Interval           Transactions      Rate        Mean\n".into(),
    }
}

fn span(from: f64, to: f64) -> String {
    format!("{:<19}", format!("{from:.2}-{to:.2} sec"))
}

fn stream_cells(c: Counts, from: f64, to: f64) -> String {
    let rate = if to > from { c.bytes() as f64 * 8.0 / (to - from) } else { 0.0 };
    format!("{:<12} {}", bytes(c.bytes()), bits(rate))
}

fn rr_cells(c: Counts, tick: &Tick, parallel: u32) -> String {
    let seconds = tick.to - tick.from;
    let mean = if c.messages > 0 { seconds * f64::from(parallel) / c.messages as f64 } else { f64::NAN };
    format!("{:>12} {:>11}/s  {}", c.messages, rate(c.messages as f64 / seconds), time(mean))
}

fn end_round_trips(whole: &Whole<'_>, parallel: u32, out: &mut String) {
    let (c, seconds, took) = (whole.mine.sum(), whole.mine.seconds, whole.took);
    let per_second = rate(c.messages as f64 / seconds);
    let _ = writeln!(
        out,
        "{} round trips in {seconds:.2} s over {parallel} connections: {per_second}/s",
        c.messages
    );
    if !took.is_empty() {
        let at = |q: f64| time(took.value_at_quantile(q) as f64 * 1e-9);
        let _ = writeln!(
            out,
            "p50 {}  p90 {}  p99 {}  p99.9 {}  max {}  mean {}",
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(1.0),
            time(took.mean() * 1e-9)
        );
    }
}

/// Three digits and a unit out of `units`, each `step` times the one before.
fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= step * 0.9995 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

/// As iperf3 has it: powers of 1024.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &["Bytes", "KBytes", "MBytes", "GBytes", "TBytes"])
}

/// As iperf3 has it: powers of 1000.
pub fn bits(per_second: f64) -> String {
    scaled(per_second, 1000.0, &["bits/sec", "Kbits/sec", "Mbits/sec", "Gbits/sec", "Tbits/sec"])
}

fn rate(per_second: f64) -> String {
    scaled(per_second, 1000.0, &["", "K", "M", "G"]).trim_end().replace(' ', "")
}

/// A time as one reads it.
pub fn time(seconds: f64) -> String {
    if seconds.is_finite() { scaled(seconds * 1e9, 1000.0, &["ns", "us", "ms", "s"]) } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::super::meter::{Cpu, Ways};
    use super::super::spec;
    use super::*;

    fn found(flows: Vec<[u64; 3]>) -> Found {
        Found {
            all: flows.clone(),
            flows,
            seconds: 2.0,
            cpu: Cpu { total: 1.0, user: 0.5, system: 0.5 },
            ways: Ways { connections: [("SHM".to_owned(), 2)].into(), preloaded: true, ..Ways::default() },
            error: None,
        }
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(bytes(1 << 30), "1.00 GBytes");
        assert_eq!(bits(113e9), "113 Gbits/sec");
        assert_eq!(bits(0.0), "0.00 bits/sec");
        assert_eq!(time(0.000_000_25), "250 ns");
        assert_eq!(time(1.5e-3), "1.50 ms");
        assert_eq!(rate(1_234_567.0), "1.23M");
        assert_eq!(rate(12.0), "12.0");
    }

    #[test]
    fn json_has_iperf3s_members_in_their_places() {
        let mut spec = spec::example();
        spec.direction = Direction::Both;
        let report = Report::new(Form::Json, &spec, true, json!({}));
        let (mine, other) = (
            found(vec![[10, 0, 1], [20, 0, 1], [0, 30, 1], [0, 40, 1]]),
            found(vec![[0, 10, 1], [0, 20, 1], [30, 0, 1], [40, 0, 1]]),
        );
        let took = super::super::flow::histogram();
        let whole = Whole { mine: &mine, other: Some(&other), took: &took, interrupted: false, error: None };
        let j = report.end_json(&whole);
        assert_eq!(j["sum_sent"]["bytes"], 30);
        assert_eq!(j["sum_received"]["bytes"], 30);
        assert_eq!(j["sum_sent_bidir_reverse"]["bytes"], 70);
        assert_eq!(j["sum_received_bidir_reverse"]["bits_per_second"], 280.0);
        assert_eq!(j["streams"][3]["sender"]["socket"], 5);
        assert_eq!(j["cpu_utilization_percent"]["remote_total"], 50.0);
        assert_eq!(j["client"]["mode"], "SHM");
        assert_eq!(j["server"]["cpu_seconds_per_gb"], 1e7);
        let alone = report.end_json(&Whole { other: None, ..whole });
        assert!(alone["sum_received"].is_null() && alone["server"].is_null());
        assert_eq!(alone["sum_sent"]["bytes"], 30);
    }

    #[test]
    fn what_was_not_measured_is_null_and_not_a_number_of_none() {
        let mut spec = spec::example();
        spec.kind = Kind::Rr;
        let report = Report::new(Form::Json, &spec, true, json!({}));
        let mut mine = found(vec![[0, 0, 0]]);
        let took = super::super::flow::histogram();
        mine.seconds = 1e-9;
        let whole =
            Whole { mine: &mine, other: None, took: &took, interrupted: true, error: Some("x".into()) };
        let j = report.end_json(&whole);
        assert!(j["latency_us"].is_null() && j["client"]["cpu_seconds_per_gb"].is_null());
        assert!(report.end_text(&whole).contains("interrupted"));
    }

    #[test]
    fn many_connections_are_one_line() {
        let mut spec = spec::example();
        spec.parallel = 100;
        let report = Report::new(Form::Text, &spec, true, json!({}));
        let c = Counts { tx: 1 << 20, rx: 0, messages: 1 };
        let tick = Tick { from: 0.0, to: 1.0, flows: vec![c; 100], omitted: false };
        let text = report.tick_text(&tick);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("100 MBytes"), "{text}");
    }
}
