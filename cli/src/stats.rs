//! `smc stats`: sums for each process. Processes that were forked from one another share their counters and
//! are shown as one.

use std::fmt::Write;
use std::process::ExitCode;

use smc::reason::Reason;
use smc::stats::{Mode, ProcessInfo, Totals};

use crate::openmetrics;
use crate::output::{complain, emit, human};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// JSON: an array with an object for each process
    #[arg(long)]
    json: bool,
    /// OpenMetrics text, for Prometheus
    #[arg(long, conflicts_with = "json")]
    prometheus: bool,
    /// Only this process
    pid: Option<u32>,
}

/// Reads, selects, prints.
pub fn run(options: &Options) -> ExitCode {
    let mut found = match smc::stats::processes() {
        Ok(p) => p,
        Err(e) => {
            complain(&format_args!("/proc: {e}"));
            return ExitCode::FAILURE;
        }
    };
    if let Some(pid) = options.pid {
        found.retain(|p| p.pids.contains(&pid));
        if found.is_empty() {
            complain(&format_args!("process {pid} has no connections under libsmc, or is another user's"));
            return ExitCode::FAILURE;
        }
    }
    if options.prometheus {
        return emit(&openmetrics::text(&found), ExitCode::SUCCESS);
    }
    if found.is_empty() && !options.json {
        complain(&"no process of yours has connections under libsmc");
    }
    let text = if options.json {
        let objects: Vec<_> = found.iter().map(|p| p.totals.json(p.pid, &p.program)).collect();
        format!("[{}]\n", objects.join(",\n"))
    } else {
        found.iter().map(paragraph).collect::<Vec<_>>().join("\n")
    };
    emit(&text, ExitCode::SUCCESS)
}

/// One process.
fn paragraph(p: &ProcessInfo) -> String {
    let t: &Totals = &p.totals;
    let mut out = format!("{} {}", p.pid, p.program);
    if p.pids.len() > 1 {
        let _ = write!(out, " and {} forked from it", p.pids.len() - 1);
    }
    let _ = writeln!(out, ": {} connections now", p.live);
    let _ = writeln!(out, "  {:<12}{:>14}{:>10}{:>10}", "", "connections", "sent", "received");
    for mode in [Mode::Shm, Mode::Rdma, Mode::Tcp] {
        let i = mode as usize;
        let (tx, rx) = (human(t.tx[i]), human(t.rx[i]));
        let _ = writeln!(out, "  {:<12}{:>14}{tx:>10}{rx:>10}", mode.name(), t.connections[i]);
    }
    let _ = writeln!(out, "  waits: {} polled, {} slept; {} doorbells rung", t.polled, t.slept, t.doorbells);
    let _ = writeln!(out, "  upgrades: {}; back to TCP: {}", t.upgrades, t.downgrades);
    for (code, n) in &t.fallback {
        let _ = match Reason::try_from(*code) {
            Ok(r) => writeln!(out, "  on TCP, {n} times: {}\n    {}", r.name(), r.explain()),
            Err(code) => writeln!(out, "  on TCP, {n} times: code {code:#010x}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fallbacks_are_named() {
        let totals = Totals {
            connections: [2, 5, 0],
            fallback: [(Reason::PeerNoSmc.code(), 2), (1, 1)].into(),
            ..Totals::default()
        };
        let p = ProcessInfo { pid: 7, program: "nginx".into(), pids: vec![7, 8, 9], live: 3, totals };
        let text = paragraph(&p);
        assert!(text.starts_with("7 nginx and 2 forked from it: 3 connections now\n"), "{text}");
        assert!(text.contains("2 times: peer-no-smc") && text.contains("code 0x00000001"));
        let json: serde_json::Value = serde_json::from_str(&p.totals.json(7, "nginx")).expect("JSON");
        assert_eq!(json["connections"]["shm"], 5);
        assert_eq!(json["fallback"]["peer-no-smc"], 2);
    }
}
