//! `cargo xtask demo`: unmodified programs on TCP, then the same under libsmc.so.
//!
//! Rounds alternate (TCP, libsmc, TCP, …), so that a machine that gets slower or faster meanwhile does it to
//! both, and the medians are compared. Whether a connection was upgraded is not guessed from its speed: each
//! program's `SMC_STATS` file says it, and `smc ss` is asked in the middle of a run.

pub mod programs;
mod readme;

use std::fs;
use std::path::Path;

use crate::figures::median;
use crate::rounds::{Measure, Mode, Result, Round, Scratch, library, upgraded};
use crate::{packages, shell};
use programs::Pair;

/// What the command line asks for.
#[derive(Debug)]
pub struct Options {
    pub install: bool,
    pub quick: bool,
    pub readme: bool,
}

/// What came of one pair.
#[derive(Debug)]
pub struct Outcome {
    pub title: &'static str,
    /// A measure with its medians on TCP and under libsmc.
    pub rows: Vec<(Measure, f64, f64)>,
    pub seen: Vec<String>,
    pub upgraded: u64,
}

fn measure(pair: &Pair, rounds: usize, seconds: f64, dir: &Path) -> Result<Outcome> {
    let mut values = vec![[Vec::new(), Vec::new()]; pair.measures.len()];
    let mut outcome = Outcome { title: pair.title, rows: Vec::new(), seen: Vec::new(), upgraded: 0 };
    for n in 0..rounds {
        for mode in [Mode::Tcp, Mode::Libsmc] {
            let dir = dir.join(format!("{}-{n}-{mode:?}", pair.title));
            fs::create_dir_all(&dir)?;
            let look = mode == Mode::Libsmc && !outcome.seen.iter().any(|l| l.starts_with("SHM"));
            let mut round = Round {
                mode,
                library: (mode == Mode::Libsmc).then(library),
                cgroup: None,
                seconds,
                dir: dir.clone(),
                seen: look.then(Vec::new),
            };
            let got = (pair.run)(&mut round)?;
            for (to, value) in values.iter_mut().zip(got) {
                to[usize::from(mode == Mode::Libsmc)].push(value);
            }
            if let Some(seen) = round.seen {
                outcome.seen = seen;
            }
            outcome.upgraded += upgraded(&dir);
        }
    }
    let medians = values.into_iter().map(|[tcp, smc]| (median(tcp), median(smc)));
    outcome.rows = pair.measures.iter().zip(medians).map(|(m, (tcp, smc))| (*m, tcp, smc)).collect();
    Ok(outcome)
}

/// The comparison, at most 80 columns wide.
fn table(outcomes: &[Outcome]) -> String {
    let mut out = format!("{:<10}{:<28}{:<10}{:>11}{:>11}{:>9}\n", "", "", "", "TCP", "libsmc", "");
    for o in outcomes {
        let mut title = o.title;
        for (m, tcp, smc) in &o.rows {
            let times = if m.less_is_better { tcp / smc } else { smc / tcp };
            out += &format!("{title:<10}{:<28}{:<10}{tcp:>11.2}{smc:>11.2}{times:>8.1}x\n", m.name, m.unit);
            title = "";
        }
    }
    out
}

pub fn run(options: &Options) -> Result<()> {
    println!("Building (cargo build --release --workspace) ...");
    for args in [&["--workspace"][..], &["-p", "libsmc", "--examples"][..]] {
        if !shell::cargo().args(["build", "--quiet", "--release"]).args(args).status()?.success() {
            return Err("the build failed".into());
        }
    }
    let needed: Vec<&str> = programs::PAIRS.iter().flat_map(|p| p.needs).copied().collect();
    packages::provide(&packages::of(&needed), options.install);

    let (rounds, seconds) = if options.quick { (1, 0.6) } else { (5, 1.0) };
    let scratch = Scratch::new("demo")?;
    println!("LD_PRELOAD={}", library().display());
    println!("Each measured {rounds} times on TCP and under libsmc, in turn; medians.\n");
    let (mut outcomes, mut failures) = (Vec::new(), Vec::new());
    for pair in programs::PAIRS {
        if let Some(p) = pair.needs.iter().find(|p| shell::which(p).is_none()) {
            println!("{}: left out, {p} is not installed", pair.title);
            continue;
        }
        match measure(pair, rounds, seconds, &scratch.0) {
            Ok(o) => {
                println!("{} ({}), smc ss in the middle:", o.title, pair.what);
                if o.seen.is_empty() {
                    println!("  (nothing)");
                }
                o.seen.iter().for_each(|l| println!("{l}"));
                println!();
                if o.upgraded == 0 {
                    failures.push(format!("{}: no connection was upgraded", o.title));
                }
                outcomes.push(o);
            }
            Err(e) => failures.push(format!("{}: {e}", pair.title)),
        }
    }
    let table = table(&outcomes);
    println!("{table}");
    for o in &outcomes {
        println!("{}: {} connection ends went through shared memory", o.title, o.upgraded);
    }
    if !failures.is_empty() {
        return Err(failures.join("\n            ").into());
    }
    if options.readme {
        readme::update(&table)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_a_terminal() {
        let m = Measure { name: "GET, 50 clients, no pipeline", unit: "1000/s", less_is_better: false };
        let o = Outcome { title: "built-in", rows: vec![(m, 1e7, 9e7)], seen: vec![], upgraded: 1 };
        assert!(table(&[o]).lines().all(|l| l.len() <= 80));
    }
}
