//! What was measured, as a table for people, as JSON for programs, and in docs/PERFORMANCE.md.

use std::fmt::Write as _;
use std::fs;
use std::process::Stdio;

use super::{Goal, Row};
use crate::figures::{machine, short};
use crate::rounds::{Mode, Result};
use crate::{section, shell};

const BEGIN: &str = "<!-- measured: begin (written by `cargo xtask bench --docs`) -->";
const END: &str = "<!-- measured: end -->";

/// The commit, and whether the checkout differs from it.
fn commit() -> String {
    let out = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .current_dir(shell::root())
        .stderr(Stdio::null())
        .output();
    out.map_or_else(|_| String::new(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

fn cell(row: &Row, mode: Mode) -> String {
    row.median(mode).map_or_else(|| "-".into(), short)
}

/// What is asked for, without what came of it.
fn asked(goal: Goal) -> String {
    match goal {
        Goal::Times(n) => format!("{}x", short(n)),
        Goal::Of(mode, than, n) => format!("{} {}x {}", mode.name(), short(n), than.name()),
        Goal::More(n) => format!("+{}", short(n)),
        Goal::Most(n) => format!("at most {}", short(n)),
    }
}

fn goals(row: &Row) -> String {
    let told = |g: &Goal| match row.reaches(*g) {
        Some(true) => asked(*g),
        Some(false) => format!("{} MISSED", asked(*g)),
        None => format!("{} (not measured)", asked(*g)),
    };
    row.goals.iter().map(told).collect::<Vec<_>>().join("; ")
}

/// For a terminal.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    for r in rows {
        let _ = write!(out, "{:<12}{:<24}{:<9}", r.case, r.measure.name, r.measure.unit);
        for (mode, _) in &r.values {
            let _ = write!(out, " {} {:<8}", mode.name(), cell(r, *mode));
        }
        let spread = |t: [f64; 3]| format!("{}x [{} {}]", short(t[1]), short(t[0]), short(t[2]));
        let _ = write!(out, " {}", r.times(Mode::Libsmc, Mode::Tcp).map_or_else(String::new, spread));
        if let Some(t) = r.times(Mode::Libsmc, Mode::Before) {
            let _ = write!(out, " of before {}", spread(t));
        }
        let _ = writeln!(out, " {}", goals(r));
    }
    out
}

fn markdown(rows: &[Row]) -> String {
    let mut out = String::from(
        "| case | measure | unit | TCP | Unix | sockmap | libsmc | native | limit | times TCP | rounds | asked |\n\
         | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
    );
    for r in rows {
        let columns = [Mode::Tcp, Mode::Unix, Mode::Sockmap, Mode::Libsmc, Mode::Native, Mode::Limit];
        let cells = columns.map(|m| cell(r, m)).join(" | ");
        let (times, spread) = match r.times(Mode::Libsmc, Mode::Tcp) {
            Some(t) => (short(t[1]), format!("{} to {}", short(t[0]), short(t[2]))),
            None => ("-".into(), "-".into()),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {cells} | {times} | {spread} | {} |",
            r.case,
            r.measure.name,
            r.measure.unit,
            goals(r)
        );
    }
    out
}

/// The lines of a table with those of `new` in place of the lines of the same cases, or at its end.
fn merged(old: &str, new: &str) -> String {
    let case = |line: &str| line.split('|').nth(1).unwrap_or("").trim().to_owned();
    let body =
        |table: &str| table.lines().filter(|l| l.starts_with("| ")).skip(2).map(str::to_owned).collect();
    let (old, rows): (Vec<String>, Vec<String>) = (body(old), body(new));
    let mut out: Vec<String> = new.lines().take(2).map(str::to_owned).collect();
    for line in old.iter().chain(&rows) {
        if rows.iter().any(|r| case(r) == case(line)) {
            if !out.iter().any(|o| case(o) == case(line)) {
                out.extend(rows.iter().filter(|r| case(r) == case(line)).cloned());
            }
        } else {
            out.push(line.clone());
        }
    }
    out.join("\n")
}

/// Puts the table into docs/PERFORMANCE.md; if `some` cases were chosen only, their rows.
pub fn update(rows: &[Row], some: bool) -> Result<()> {
    let path = shell::root().join("docs/PERFORMANCE.md");
    let text = fs::read_to_string(&path)?;
    let old = section::found(&text, BEGIN, END).ok_or("docs/PERFORMANCE.md has no measured section")?;
    let table = markdown(rows);
    let new = if some {
        let head = old.trim_start().lines().next().unwrap_or("").trim_end_matches('.');
        let mut cases: Vec<&str> = rows.iter().map(|r| r.case).collect();
        cases.dedup();
        format!("{head}; of {} {}.\n\n{}", cases.join(", "), commit(), merged(old, &table))
    } else {
        format!("{}; commit {}.\n\n{}", machine(), commit(), table.trim_end())
    };
    let text =
        section::replaced(&text, BEGIN, END, &new).ok_or("docs/PERFORMANCE.md has no measured section")?;
    fs::write(&path, text)?;
    println!("docs/PERFORMANCE.md: the measured section is new");
    Ok(())
}

/// A number, or null for what is none in JSON.
fn number(v: f64) -> String {
    if v.is_finite() { format!("{v}") } else { "null".into() }
}

fn list(values: &[f64]) -> String {
    values.iter().map(|v| number(*v)).collect::<Vec<_>>().join(",")
}

/// Names and units hold nothing that JSON would want escaped; the machine's name might.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !"\"\\".contains(*c)).collect()
}

pub fn json(rows: &[Row], quick: bool) -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut out = format!(
        "{{\"machine\":\"{}\",\"commit\":\"{}\",\"loadavg\":\"{}\",\"quick\":{quick},\"measures\":[\n",
        plain(&machine()),
        plain(&commit()),
        plain(load.trim())
    );
    for (i, r) in rows.iter().enumerate() {
        let told = |g: &Goal| {
            let reached = r.reaches(*g).map_or_else(|| "null".into(), |b| b.to_string());
            format!("{{\"asked\":\"{}\",\"reached\":{reached}}}", asked(*g))
        };
        let goals = r.goals.iter().map(told).collect::<Vec<_>>().join(",");
        let modes: Vec<String> = r
            .values
            .iter()
            .map(|(m, v)| {
                let median = number(r.median(*m).unwrap_or(f64::NAN));
                format!("\"{}\":{{\"median\":{median},\"values\":[{}]}}", m.name(), list(v))
            })
            .collect();
        let times = r.times(Mode::Libsmc, Mode::Tcp).map_or_else(String::new, |t| list(&t));
        let _ = write!(
            out,
            "{}{{\"case\":\"{}\",\"measure\":\"{}\",\"unit\":\"{}\",\"less_is_better\":{},\"goals\":[{goals}],\
             \"reached\":{},\"times_tcp\":[{times}],\"modes\":{{{}}}}}",
            if i == 0 { "" } else { ",\n" },
            r.case,
            r.measure.name,
            r.measure.unit,
            r.measure.less_is_better,
            r.reached().map_or_else(|| "null".into(), |b| b.to_string()),
            modes.join(",")
        );
    }
    out + "\n]}\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::Measure;

    #[test]
    fn some_cases_take_the_place_of_their_rows() {
        let old = "| case | tcp |\n| --- | ---: |\n| a | 1 |\n| b x | 2 |\n| c | 3 |\n";
        let new = "| case | tcp |\n| --- | ---: |\n| b x | 4 |\n| b x | 5 |\n| d | 6 |\n";
        let want =
            "| case | tcp |\n| --- | ---: |\n| a | 1 |\n| b x | 4 |\n| b x | 5 |\n| c | 3 |\n| d | 6 |";
        assert_eq!(merged(old, new), want);
    }

    #[test]
    fn what_is_no_number_is_null() {
        let row = Row {
            case: "c",
            measure: Measure { name: "m", unit: "u", less_is_better: false },
            goals: &[Goal::Times(2.0)],
            values: vec![(Mode::Tcp, vec![0.0]), (Mode::Libsmc, vec![0.0])],
        };
        let json = json(&[row], true);
        assert!(json.contains("\"times_tcp\":[null,null,null]"), "{json}");
        assert!(!json.contains("NaN") && !json.contains("inf"));
    }
}
