//! `cargo xtask bench`: how fast libsmc is, against TCP, Unix sockets and what the machine can do at best.
//!
//! Other work on the machine must not decide what comes out. So the ways take turns within each round, the order
//! turned round every time, and a ratio is the median of the ratios of the rounds, each of two neighbours in time.

mod cases;
mod picture;
mod programs;
mod report;
mod sockmap;

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use sockmap::Sockmap;

use crate::figures::{self, in_turn, median};
use crate::rounds::{Measure, Mode, Result, Round, Scratch, library, upgraded};
use crate::{packages, shell};

/// What is asked of libsmc.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// So many times better than TCP.
    Times(f64),
    /// One way so many times better than another, if both were measured.
    Of(Mode, Mode, f64),
    /// At most so much more than TCP.
    More(f64),
    /// At most so much, whatever TCP has.
    Most(f64),
}

/// A workload.
pub struct Case {
    pub name: &'static str,
    pub what: &'static str,
    pub needs: &'static [&'static str],
    pub measures: &'static [(Measure, &'static [Goal])],
    pub modes: &'static [Mode],
    /// Whether connections must have been upgraded.
    pub upgrades: bool,
    /// One round: a value for each measure.
    pub run: fn(&mut Round) -> Result<Vec<f64>>,
}

/// What came of a measure: for each mode the values, round by round.
#[derive(Debug)]
pub struct Row {
    pub case: &'static str,
    pub measure: Measure,
    pub goals: &'static [Goal],
    pub values: Vec<(Mode, Vec<f64>)>,
}

impl Row {
    fn of(&self, mode: Mode) -> Option<&[f64]> {
        self.values.iter().find(|(m, _)| *m == mode).map(|(_, v)| v.as_slice())
    }

    pub fn median(&self, mode: Mode) -> Option<f64> {
        self.of(mode).map(|v| median(v.to_vec()))
    }

    /// How many times better `mode` is than `than`: the least, the median, the most of the rounds.
    pub fn times(&self, mode: Mode, than: Mode) -> Option<[f64; 3]> {
        figures::times(self.of(mode)?, self.of(than)?, self.measure.less_is_better)
    }

    /// Whether a goal is reached; `None` if that was not measured.
    pub fn reaches(&self, goal: Goal) -> Option<bool> {
        match goal {
            Goal::Times(n) => self.reaches(Goal::Of(Mode::Libsmc, Mode::Tcp, n)),
            Goal::Of(mode, than, n) => self.times(mode, than).map(|t| t[1] >= n),
            Goal::More(n) => {
                let more = self.of(Mode::Libsmc)?.iter().zip(self.of(Mode::Tcp)?).map(|(a, b)| a - b);
                Some(median(more.collect()) <= n)
            }
            Goal::Most(n) => self.median(Mode::Libsmc).map(|m| m <= n),
        }
    }

    /// Whether all goals are reached; `None` if there are none.
    pub fn reached(&self) -> Option<bool> {
        self.goals.iter().filter_map(|g| self.reaches(*g)).reduce(|a, b| a && b)
    }
}

struct Options {
    quick: bool,
    install: bool,
    docs: bool,
    before: Option<PathBuf>,
    names: Vec<String>,
}

fn options(args: &[&str]) -> Result<Options> {
    let mut o = Options { quick: false, install: true, docs: false, before: None, names: Vec::new() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match *arg {
            "--quick" => o.quick = true,
            "--no-install" => o.install = false,
            "--docs" => o.docs = true,
            "--before" => {
                let lib = args.next().ok_or("--before wants a libsmc.so")?;
                o.before = Some(fs::canonicalize(lib).map_err(|e| format!("{lib}: {e}"))?);
            }
            a if a.starts_with('-') => return Err(format!("bench has no option {a}").into()),
            name => o.names.push(name.to_owned()),
        }
    }
    Ok(o)
}

/// The cases that `names` begin, all if there are no names.
fn chosen<'a>(cases: &'a [Case], names: &[String]) -> Result<Vec<&'a Case>> {
    if let Some(n) = names.iter().find(|n| !cases.iter().any(|c| c.name.starts_with(n.as_str()))) {
        return Err(format!("no case begins with {n}; see cargo xtask bench --list").into());
    }
    Ok(cases.iter().filter(|c| names.is_empty() || names.iter().any(|n| c.name.starts_with(n))).collect())
}

fn measure(case: &Case, o: &Options, scratch: &Scratch, sockmap: Option<&Sockmap>) -> Result<Vec<Row>> {
    let (rounds, seconds) = if o.quick { (3, 0.5) } else { (7, 1.0) };
    let mut modes = case.modes.to_vec();
    modes.retain(|m| *m != Mode::Sockmap || sockmap.is_some());
    if o.before.is_some() {
        modes.push(Mode::Before);
    }
    let row = |(measure, goals): &(Measure, &'static [Goal])| Row {
        case: case.name,
        measure: *measure,
        goals,
        values: modes.iter().map(|m| (*m, Vec::new())).collect(),
    };
    let mut rows: Vec<Row> = case.measures.iter().map(row).collect();
    let mut through_memory = 0;
    for n in 0..rounds {
        for mode in in_turn(&modes, n) {
            let dir = scratch.0.join(format!("{}-{n}-{}", case.name, mode.name()));
            fs::create_dir_all(&dir)?;
            let library = match mode {
                Mode::Libsmc => Some(scratch.0.join("libsmc.so")),
                Mode::Before => o.before.clone(),
                _ => None,
            };
            let cgroup = sockmap.filter(|_| mode == Mode::Sockmap).map(|s| s.cgroup().to_owned());
            let mut round = Round { mode, library, cgroup, seconds, dir: dir.clone(), seen: None };
            let got = match (case.run)(&mut round) {
                Ok(got) => got,
                Err(e) if mode == Mode::Sockmap => {
                    // It is the kernel's; what else is measured does not depend on it.
                    println!("{}, sockmap: {e}", case.name);
                    vec![f64::NAN; rows.len()]
                }
                Err(e) => return Err(format!("{}, {}: {e}", case.name, mode.name()).into()),
            };
            for (row, value) in rows.iter_mut().zip(got) {
                row.values.iter_mut().filter(|(m, _)| *m == mode).for_each(|(_, v)| v.push(value));
            }
            if mode == Mode::Libsmc {
                through_memory += upgraded(&dir);
            }
            // Databases and the like: each round makes its own.
            let _ = fs::remove_dir_all(&dir);
        }
    }
    if case.upgrades && through_memory == 0 {
        return Err(format!("{}: no connection was upgraded", case.name).into());
    }
    Ok(rows)
}

fn run(args: &[&str]) -> Result<bool> {
    let all: Vec<Case> = cases::CASES.into_iter().chain(programs::CASES).collect();
    if args == ["--list"] {
        all.iter().for_each(|c| println!("{:<16}{}", c.name, c.what));
        return Ok(true);
    }
    let o = options(args)?;
    let cases = chosen(&all, &o.names)?;
    println!("Building (cargo build --release) ...");
    for args in [&["--workspace"][..], &["-p", "libsmc", "--examples"][..]] {
        if !shell::cargo().args(["build", "--quiet", "--release"]).args(args).status()?.success() {
            return Err("the build failed".into());
        }
    }
    let needs: Vec<&str> = cases.iter().flat_map(|c| c.needs).copied().collect();
    packages::provide(&packages::of(&needs), o.install);
    let scratch = Scratch::new("bench")?;
    // A copy: programs of other users can read it, and no build replaces it meanwhile.
    fs::copy(library(), scratch.0.join("libsmc.so"))?;
    let sockmap = if cases.iter().any(|c| c.modes.contains(&Mode::Sockmap)) {
        packages::provide(&packages::of(&["bpftool"]), o.install);
        Sockmap::new().map_err(|e| println!("sockmap: left out: {e}")).ok()
    } else {
        None
    };
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for case in cases {
        if let Some(p) = case.needs.iter().find(|p| programs::find(p).is_none()) {
            println!("{}: left out, {p} is not installed", case.name);
            continue;
        }
        match measure(case, &o, &scratch, sockmap.as_ref()) {
            Ok(new) => {
                print!("{}", report::table(&new));
                rows.extend(new);
            }
            Err(e) => failures.push(e.to_string()),
        }
    }
    let dir = shell::target_dir().join("bench");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("bench.json"), report::json(&rows, o.quick))?;
    fs::write(dir.join("bench.svg"), picture::svg(&rows))?;
    println!("\n{}: bench.json, bench.svg", dir.display());
    if o.docs {
        report::update(&rows, !o.names.is_empty())?;
    }
    failures.iter().for_each(|f| println!("FAILED {f}"));
    let missed: Vec<&Row> = rows.iter().filter(|r| r.reached() == Some(false)).collect();
    let reached = rows.iter().filter(|r| r.reached() == Some(true)).count();
    println!("{reached} goals reached, {} missed, {} cases failed", missed.len(), failures.len());
    missed.iter().for_each(|r| println!("missed: {} {}", r.case, r.measure.name));
    Ok(failures.is_empty())
}

pub fn main(args: &[&str]) -> ExitCode {
    // A setting of the caller's would be measured in place of the defaults.
    if let Some((name, _)) = env::vars().find(|(n, _)| n.starts_with("SMC_")) {
        println!("note: {name} is set, and holds for what is measured");
    }
    match run(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask bench: {e}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(less_is_better: bool, goals: &'static [Goal], tcp: &[f64], smc: &[f64]) -> Row {
        let measure = Measure { name: "m", unit: "u", less_is_better };
        Row {
            case: "c",
            measure,
            goals,
            values: vec![(Mode::Tcp, tcp.to_vec()), (Mode::Libsmc, smc.to_vec())],
        }
    }

    #[test]
    fn ratios_are_of_neighbours() {
        // The machine is ten times slower in the second round, for both.
        let r = row(false, &[Goal::Times(2.0)], &[10.0, 1.0, 10.0], &[20.0, 2.0, 30.0]);
        assert_eq!(r.times(Mode::Libsmc, Mode::Tcp), Some([2.0, 2.0, 3.0]));
        assert_eq!(r.reached(), Some(true));
        let r = row(true, &[Goal::Times(2.0)], &[10.0], &[6.0]);
        assert_eq!(r.reached(), Some(false));
    }

    #[test]
    fn all_goals_that_were_measured_are_to_be_reached() {
        const NATIVE: Goal = Goal::Of(Mode::Native, Mode::Limit, 0.8);
        let mut r = row(false, &[Goal::Times(2.0), NATIVE], &[10.0], &[30.0]);
        assert_eq!((r.reached(), r.reaches(NATIVE)), (Some(true), None));
        r.values.extend([(Mode::Native, vec![7.0]), (Mode::Limit, vec![10.0])]);
        assert_eq!((r.reached(), r.reaches(Goal::Times(2.0))), (Some(false), Some(true)));
    }

    #[test]
    fn a_difference_can_be_the_goal() {
        assert_eq!(row(true, &[Goal::More(4.0)], &[1.0, 2.0], &[5.0, 6.0]).reached(), Some(true));
        assert_eq!(row(true, &[Goal::More(3.0)], &[1.0, 2.0], &[5.0, 6.0]).reached(), Some(false));
        assert_eq!(row(true, &[Goal::Most(5.5)], &[1.0, 2.0], &[5.0, 6.0]).reached(), Some(true));
        assert_eq!(row(true, &[], &[1.0], &[5.0]).reached(), None);
    }

    #[test]
    fn names_choose_by_their_beginning() {
        let all = cases::CASES;
        assert!(chosen(&all, &["rr".to_owned()]).is_ok_and(|c| c.iter().all(|c| c.name.starts_with("rr"))));
        assert!(chosen(&all, &["nothing".to_owned()]).is_err());
        assert!(chosen(&all, &[]).is_ok_and(|c| c.len() == all.len()));
    }
}
