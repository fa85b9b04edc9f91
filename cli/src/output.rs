//! Writing results: a reader that has seen enough (`smc ss | head`) is no error.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
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
    fn long_texts_keep_both_ends() {
        assert_eq!(shortened("127.0.0.1:80", 21), "127.0.0.1:80");
        assert_eq!(shortened("[2001:db8::1234]:54321", 11), "[2001~54321");
    }
}
