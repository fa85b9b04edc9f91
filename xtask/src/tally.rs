//! How many passed, failed and were skipped.
//!
//! Counts come from the `test result:` lines of libtest; a step without such lines (formatting, a build)
//! counts as one.

use std::fmt;

/// Counts of one or more steps.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Tally {
    /// One step that has no counts of its own.
    pub fn step(ok: bool) -> Self {
        Self { passed: ok.into(), failed: (!ok).into(), skipped: 0 }
    }

    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// The counts in a line of libtest:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s`.
    pub fn from_line(line: &str) -> Option<Self> {
        let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            counts.split("; ").find_map(|c| c.strip_suffix(what)?.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        Some(Self { passed: count(" passed"), failed: count(" failed"), skipped: count(" ignored") })
    }

    /// Counts what a run of `cargo test` printed. A run that failed without a failed test (it did not
    /// compile, or a test process died) is one failure.
    pub fn from_run(ok: bool, lines: &[String]) -> Self {
        let mut sum = Self::default();
        for t in lines.iter().filter_map(|l| Self::from_line(l)) {
            sum.add(t);
        }
        if !ok && sum.failed == 0 {
            sum.failed = 1;
        }
        sum
    }
}

/// What libtest's failures said, of what a run of `cargo test` printed: `---- name stdout ----`, or `---- name ----`, and
/// what follows up to the list of names. The end of each, as a panic stands there.
pub fn failures(lines: &[String]) -> Vec<String> {
    const LAST: usize = 40;
    let mut found: Vec<Vec<&str>> = Vec::new();
    let mut inside = false;
    for line in lines {
        if line.starts_with("---- ") && line.ends_with(" ----") {
            inside = true;
            found.push(vec![line]);
        } else if line == "failures:" {
            inside = false;
        } else if inside && let Some(one) = found.last_mut() {
            one.push(line);
        }
    }
    let told = |one: Vec<&str>| {
        let (name, rest) = one.split_first().expect("its first line");
        format!("{name}\n{}", rest[rest.len().saturating_sub(LAST)..].join("\n"))
    };
    found.into_iter().map(told).collect()
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_libtest_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.1s";
        assert_eq!(Tally::from_line(line), Some(Tally { passed: 12, failed: 3, skipped: 1 }));
        assert_eq!(Tally::from_line("test ring::tests::wraps ... ok"), None);
    }

    #[test]
    fn what_failures_said_is_found() {
        let all = "test a ... FAILED\n\nfailures:\n\n---- a ----\nwhy\n\n---- b stdout ----\nand\n\nfailures:\n    a\n    b\n\n";
        let lines: Vec<String> = all.lines().map(str::to_string).collect();
        assert_eq!(failures(&lines), ["---- a ----\nwhy\n", "---- b stdout ----\nand\n"]);
        let long: Vec<String> = ["---- a ----"].into_iter().chain(["x"; 99]).map(str::to_string).collect();
        assert_eq!(failures(&long)[0].lines().count(), 41);
    }

    #[test]
    fn a_run_that_dies_is_a_failure() {
        assert_eq!(Tally::from_run(false, &[]).failed, 1);
        assert_eq!(Tally::from_run(true, &[]), Tally::default());
    }

    #[test]
    fn the_closing_line_names_skipped_ones_only_if_there_are_any() {
        assert_eq!(Tally::step(true).to_string(), "1 passed, 0 failed");
        assert_eq!(Tally { skipped: 2, ..Tally::step(false) }.to_string(), "0 passed, 1 failed, 2 skipped");
    }
}
