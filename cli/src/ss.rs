//! `smc ss`: the connections, one a line, as ss(8) has them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use smc::stats::{ConnectionInfo, Mode};

use crate::output::{aligned, coloured, complain, emit, human, shortened, wants_colours};

/// Columns of a terminal.
const WIDTH: usize = 80;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Also those on TCP, with the reason, and those whose process is gone
    #[arg(short, long)]
    all: bool,
    /// Every column, lines as long as they get
    #[arg(short, long)]
    wide: bool,
    /// JSON: an array with an object for each connection
    #[arg(long)]
    json: bool,
    /// Again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", require_equals = true,
          value_parser = seconds)]
    watch: Option<f64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let n: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.1..=86_400.0).contains(&n) { Ok(n) } else { Err("from 0.1 to 86400 seconds".into()) }
}

/// Once, or again and again.
pub fn run(options: &Options) -> ExitCode {
    let Some(every) = options.watch else { return show(options) };
    let terminal = io::stdout().is_terminal();
    loop {
        // From the top of an empty screen.
        if terminal && !written("\x1b[H\x1b[2J") {
            return ExitCode::SUCCESS;
        }
        let code = show(options);
        if code != ExitCode::SUCCESS || !written(if options.json { "" } else { "\n" }) {
            return code;
        }
        thread::sleep(Duration::from_secs_f64(every));
    }
}

/// Whether anybody still reads.
fn written(text: &str) -> bool {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// Reads, selects, prints.
fn show(options: &Options) -> ExitCode {
    let found = match smc::stats::connections() {
        Ok(c) => c,
        Err(e) => {
            complain(&format_args!("/proc: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let total = found.len();
    let shown: Vec<_> = found.into_iter().filter(|c| options.all || is_upgraded(c)).collect();
    if options.json {
        let objects: Vec<_> = shown.iter().map(ConnectionInfo::json).collect();
        return emit(&format!("[{}]\n", objects.join(",\n")), ExitCode::SUCCESS);
    }
    let mut text = if options.wide { wide(&shown) } else { narrow(&shown) };
    if wants_colours() {
        text = text.lines().map(|l| coloured(l) + "\n").collect();
    }
    let code = emit(&text, ExitCode::SUCCESS);
    if shown.is_empty() && total > 0 {
        complain(&format_args!("no connection is upgraded now; -a shows the other {total}"));
    }
    code
}

fn is_upgraded(c: &ConnectionInfo) -> bool {
    c.mode() != Mode::Tcp && !c.stale
}

fn address(a: Option<std::net::SocketAddr>) -> String {
    a.map_or_else(|| "-".into(), |a| a.to_string())
}

/// What to say of a connection that is not simply upgraded.
fn remark(c: &ConnectionInfo) -> Option<String> {
    if c.stale {
        return Some("its process is gone".into());
    }
    let on_tcp = c.mode() == Mode::Tcp;
    match c.reason {
        Some(r) if on_tcp => Some(format!("on TCP: {}", r.name())),
        None if on_tcp && c.best != Mode::Tcp => Some(format!("on TCP again, was {}", c.best.name())),
        None if on_tcp => Some("on TCP so far: below SMC_UPGRADE_AFTER, or just being upgraded".into()),
        _ => None,
    }
}

/// At most 80 columns: long addresses and names lose their middle.
fn narrow(connections: &[ConnectionInfo]) -> String {
    const HEAD: [&str; 7] = ["MODE", "PID", "PROGRAM", "LOCAL", "PEER", "SENT", "RCVD"];
    let rows = |program: usize, end: usize| {
        let mut rows = vec![HEAD.map(String::from).to_vec()];
        rows.extend(connections.iter().map(|c| {
            vec![
                c.mode().name().into(),
                c.pid.to_string(),
                shortened(&c.program, program),
                shortened(&address(c.local), end),
                shortened(&address(c.peer), end),
                human(c.tx_bytes()),
                human(c.rx_bytes()),
            ]
        }));
        aligned(&rows, &[1, 5, 6])
    };
    // The first that fits; the last one always does.
    let lines = [(15, 47), (12, 21), (9, 21), (9, 19)]
        .into_iter()
        .map(|(program, end)| rows(program, end))
        .find(|lines| lines.iter().all(|l| l.chars().count() <= WIDTH))
        .unwrap_or_else(|| rows(8, 19));
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        let _ = writeln!(out, "{line}");
        if let Some(text) = i.checked_sub(1).and_then(|i| remark(&connections[i])) {
            let _ = writeln!(out, "     {text}");
        }
    }
    out + &legend(connections)
}

/// Each reason that is named above, once, in words and with what would change it.
fn legend(connections: &[ConnectionInfo]) -> String {
    let told = |c: &&ConnectionInfo| !c.stale && c.mode() == Mode::Tcp;
    let reasons: BTreeMap<&str, &str> =
        connections.iter().filter(told).filter_map(|c| c.reason).map(|r| (r.name(), r.explain())).collect();
    let mut out = String::new();
    for (name, explained) in reasons {
        let mut line = format!("\n{name}:");
        for word in explained.split(' ') {
            if line.trim_start_matches('\n').chars().count() + 1 + word.chars().count() > WIDTH {
                out += &line;
                line = "\n    ".into();
            } else {
                line.push(' ');
            }
            line += word;
        }
        out += &line;
    }
    if out.is_empty() { out } else { out + "\n" }
}

/// Everything.
fn wide(connections: &[ConnectionInfo]) -> String {
    const HEAD: [&str; 20] = [
        "MODE", "TX", "RX", "ROLE", "PID", "PEER-PID", "PROGRAM", "LOCAL", "PEER", "SENT", "RCVD",
        "TCP-SENT", "TCP-RCVD", "MSGS-TX", "MSGS-RX", "RING", "POLLS", "SLEEPS", "BELLS", "NOTE",
    ];
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    rows.extend(connections.iter().map(|c| {
        let note = match (remark(c), c.reason) {
            (Some(text), Some(r)) => format!("{text}: {}", r.explain()),
            (text, _) => {
                text.unwrap_or_else(|| if c.peer_closed { "peer closed".into() } else { String::new() })
            }
        };
        vec![
            c.mode().name().into(),
            c.mode_tx.name().into(),
            c.mode_rx.name().into(),
            c.role.name().into(),
            c.pid.to_string(),
            c.peer_pid.map_or_else(|| "-".into(), |p| p.to_string()),
            c.program.clone(),
            address(c.local),
            address(c.peer),
            c.tx_bytes_ring.to_string(),
            c.rx_bytes_ring.to_string(),
            c.tx_bytes_tcp.to_string(),
            c.rx_bytes_tcp.to_string(),
            c.tx_msgs.to_string(),
            c.rx_msgs.to_string(),
            human(c.ring_size.into()),
            c.polls.to_string(),
            c.sleeps.to_string(),
            c.doorbells.to_string(),
            note,
        ]
    }));
    aligned(&rows, &[4, 5, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]).join("\n") + "\n"
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use smc::reason::Reason;
    use smc::stats::Role;

    pub fn connection(local: &str) -> ConnectionInfo {
        ConnectionInfo {
            pid: 4_194_303,
            program: "a-long-program-n".into(),
            peer_pid: Some(1),
            local: local.parse().ok(),
            peer: local.parse().ok(),
            role: Role::Connect,
            mode_tx: Mode::Shm,
            mode_rx: Mode::Shm,
            best: Mode::Shm,
            reason: None,
            tx_bytes_ring: u64::MAX,
            rx_bytes_ring: 999 << 10,
            tx_bytes_tcp: 1,
            rx_bytes_tcp: 1,
            tx_msgs: 1,
            rx_msgs: 1,
            ring_size: 1 << 18,
            polls: 1,
            sleeps: 1,
            doorbells: 1,
            upgrades: 1,
            downgrades: 0,
            holders: 1,
            peer_closed: false,
            stale: false,
        }
    }

    #[test]
    fn lines_fit_a_terminal_whatever_the_addresses() {
        let v6 = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        let text = narrow(&[connection("255.255.255.255:65535"), connection(v6)]);
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
        assert!(text.contains(":65535"));
    }

    #[test]
    fn what_is_on_tcp_says_why() {
        let mut c = connection("127.0.0.1:80");
        (c.mode_tx, c.mode_rx, c.best) = (Mode::Tcp, Mode::Tcp, Mode::Tcp);
        c.reason = Some(Reason::PeerNoSmc);
        assert!(!is_upgraded(&c));
        assert!(narrow(&[c.clone()]).contains("on TCP: peer-no-smc"));
        assert!(wide(&[c.clone()]).contains(Reason::PeerNoSmc.explain()));
        // Twice the same reason: once the sentence, broken where the line ends.
        let text = narrow(&[c.clone(), c.clone()]);
        let start: String = Reason::PeerNoSmc.explain().chars().take(30).collect();
        assert_eq!(text.matches(&start).count(), 1, "{text}");
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
        let flat: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains(Reason::PeerNoSmc.explain()), "{text}");
        c.reason = None;
        assert!(narrow(&[c]).contains("on TCP so far"));
    }

    #[test]
    fn json_is_json() {
        let parsed: serde_json::Value = serde_json::from_str(&connection("[::1]:80").json()).expect("JSON");
        assert_eq!(parsed["mode"], "SHM");
        assert_eq!(parsed["bytes"]["shm_rx"], 999 << 10);
        assert!(parsed["reason"].is_null());
    }
}
