//! `smc stats --prometheus`: the sums of each process as OpenMetrics text (openmetrics.io, version 1.0), which
//! Prometheus reads; for example by the textfile collector of its node exporter.

use std::fmt::Write;

use smc::reason::Reason;
use smc::stats::{Mode, ProcessInfo};

/// Between the quotes of a label: what the format keeps for itself.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Labels beside pid and program, and the value.
type Samples = Vec<(String, u64)>;

/// A name with its type and help, and how to get its numbers.
struct Family {
    name: &'static str,
    /// Counters have `_total` at their samples.
    counter: bool,
    help: &'static str,
    get: fn(&ProcessInfo) -> Samples,
}

fn by_mode(get: impl Fn(usize) -> u64, more: &str) -> Samples {
    let label = |m: Mode| format!(",mode=\"{}\"{more}", m.name().to_lowercase());
    [Mode::Shm, Mode::Rdma, Mode::Tcp].into_iter().map(|m| (label(m), get(m as usize))).collect()
}

fn one(value: u64) -> Samples {
    vec![(String::new(), value)]
}

fn fallbacks(p: &ProcessInfo) -> Samples {
    let name =
        |code: u32| Reason::try_from(code).map_or_else(|c| format!("{c:#010x}"), |r| r.name().to_owned());
    p.totals.fallback.iter().map(|(code, n)| (format!(",reason=\"{}\"", name(*code)), *n)).collect()
}

const FAMILIES: &[Family] = &[
    Family {
        name: "smc_open_connections",
        counter: false,
        help: "Connection ends that are open now.",
        get: |p| one(p.live),
    },
    Family {
        name: "smc_connections",
        counter: true,
        help: "Connection ends by the best mode that each reached.",
        get: |p| by_mode(|i| p.totals.connections[i], ""),
    },
    Family {
        name: "smc_transferred_bytes",
        counter: true,
        help: "Bytes by the way they went and their direction.",
        get: |p| {
            let mut all = by_mode(|i| p.totals.tx[i], ",direction=\"tx\"");
            all.extend(by_mode(|i| p.totals.rx[i], ",direction=\"rx\""));
            all
        },
    },
    Family {
        name: "smc_waits",
        counter: true,
        help: "Waits on upgraded connections that ended by polling, or slept.",
        get: |p| vec![(",how=\"polled\"".into(), p.totals.polled), (",how=\"slept\"".into(), p.totals.slept)],
    },
    Family {
        name: "smc_doorbells",
        counter: true,
        help: "Peers that were woken.",
        get: |p| one(p.totals.doorbells),
    },
    Family {
        name: "smc_upgrades",
        counter: true,
        help: "Connections that went from TCP to another mode.",
        get: |p| one(p.totals.upgrades),
    },
    Family {
        name: "smc_downgrades",
        counter: true,
        help: "Connections that went back to TCP before their end.",
        get: |p| one(p.totals.downgrades),
    },
    Family {
        name: "smc_fallbacks",
        counter: true,
        help: "Connections that stayed on TCP or went back to it, by reason.",
        get: fallbacks,
    },
];

/// All of them.
pub fn text(processes: &[ProcessInfo]) -> String {
    let mut out = String::new();
    for f in FAMILIES {
        let (kind, suffix) = if f.counter { ("counter", "_total") } else { ("gauge", "") };
        // Writing to a String does not fail.
        let _ = writeln!(out, "# TYPE {} {kind}\n# HELP {} {}", f.name, f.name, f.help);
        for p in processes {
            for (labels, value) in (f.get)(p) {
                let program = escaped(&p.program);
                let _ = writeln!(
                    out,
                    "{}{suffix}{{pid=\"{}\",program=\"{program}\"{labels}}} {value}",
                    f.name, p.pid
                );
            }
        }
    }
    out + "# EOF\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use smc::stats::Totals;

    #[test]
    fn samples_follow_their_type_and_labels_are_escaped() {
        let totals = Totals {
            connections: [2, 5, 0],
            tx: [1, 99, 0],
            fallback: [(Reason::PeerNoSmc.code(), 2)].into(),
            ..Totals::default()
        };
        let p = ProcessInfo { pid: 7, program: "a\"b\\".into(), pids: vec![7], live: 3, totals };
        let text = text(&[p]);
        assert!(text.ends_with("# EOF\n"));
        let with = "pid=\"7\",program=\"a\\\"b\\\\\"";
        for line in [
            format!("smc_open_connections{{{with}}} 3"),
            format!("smc_connections_total{{{with},mode=\"shm\"}} 5"),
            format!("smc_transferred_bytes_total{{{with},mode=\"shm\",direction=\"tx\"}} 99"),
            format!("smc_fallbacks_total{{{with},reason=\"peer-no-smc\"}} 2"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        // Each sample belongs to the family above it; no family comes twice.
        let mut family = "";
        let mut seen = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().unwrap_or_default();
                assert!(!seen.contains(&family), "{family} twice");
                seen.push(family);
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} under {family}");
            }
        }
        assert_eq!(super::text(&[]).lines().filter(|l| !l.starts_with('#')).count(), 0);
    }
}
