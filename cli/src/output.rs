//! Writing results: a reader that has seen enough (`smc ss | head`) is no error.

use std::env;
use std::fmt::{Display, Write as _};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

/// Writes a result to standard output.
pub fn emit(text: &str, code: ExitCode) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            complain(&format_args!("standard output: {e}"));
            ExitCode::FAILURE
        }
        _ => code,
    }
}

/// One line on standard error.
pub fn complain(what: &dyn Display) {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "smc: {what}");
}

/// Lines of cells, each column as wide as it must be; `right` columns are numbers.
pub fn aligned(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<_> =
        (0..columns).map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let mut out = String::new();
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if i == 0 { "" } else { " " };
            // Writing to a String does not fail.
            let _ = if right.contains(&i) {
                write!(out, "{gap}{cell:>width$}")
            } else {
                write!(out, "{gap}{cell:<width$}")
            };
        }
        out.truncate(out.trim_end().len());
        out
    };
    rows.iter().map(line).collect()
}

/// Colours are for a terminal, and for those who do not say otherwise (no-color.org).
pub fn wants_colours() -> bool {
    io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A line of a table of connections: the mode that it begins with in its colour.
pub fn coloured(line: &str) -> String {
    const COLOURS: [(&str, &str); 3] = [("SHM ", "32"), ("RDMA ", "36"), ("TCP ", "33")];
    match COLOURS.iter().find(|(mode, _)| line.starts_with(mode)) {
        Some((mode, colour)) => {
            format!("\x1b[{colour}m{}\x1b[0m{}", mode.trim_end(), &line[mode.len() - 1..])
        }
        None => line.to_owned(),
    }
}

/// A number of bytes in at most five characters.
pub fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["", "K", "M", "G", "T", "P"] {
        let whole = unit.is_empty();
        if value < 999.5 {
            return if whole || value >= 9.95 {
                format!("{value:.0}{unit}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.0}E")
}

/// A text in at most `width` characters; what is left out of the middle is marked.
pub fn shortened(text: &str, width: usize) -> String {
    let n = text.chars().count();
    if n <= width {
        return text.to_owned();
    }
    // An address's end, the port, says more than its start.
    let tail = width / 2;
    let head = width.saturating_sub(tail + 1);
    text.chars().take(head).chain(['~']).chain(text.chars().skip(n - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_short_at_every_size() {
        for (n, s) in [(0, "0"), (999, "999"), (1000, "1.0K"), (10 << 10, "10K"), (1 << 20, "1.0M")] {
            assert_eq!(human(n), s);
        }
        assert!((0..64).all(|shift| human(u64::MAX >> shift).len() <= 5));
    }

    #[test]
    fn the_mode_alone_is_coloured() {
        assert_eq!(coloured("SHM  7 a"), "\x1b[32mSHM\x1b[0m  7 a");
        assert_eq!(coloured("     on TCP: x"), "     on TCP: x");
        assert_eq!(coloured("MODE PID"), "MODE PID");
    }

    #[test]
    fn long_texts_keep_both_ends() {
        assert_eq!(shortened("127.0.0.1:80", 21), "127.0.0.1:80");
        assert_eq!(shortened("[2001:db8::1234]:54321", 11), "[2001~54321");
    }
}
