//! The checks, one subcommand each; `test` runs them all and ends with `N passed, N failed`.

use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::shell::{self, Running};
use crate::tally::{Tally, failures};
use crate::{bpf, dist, packages, rounds, vm};

/// A model that takes longer than this does not end.
const MODEL_LIMIT: Duration = Duration::from_secs(600);

/// All tests in the VM, which is emulated.
const VM_LIMIT: Duration = Duration::from_secs(900);

/// One check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    Fmt,
    Clippy,
    Build,
    Unit,
    Loom,
    Weak,
    E2e,
    Package,
    Rdma,
}

impl Check {
    /// In the order in which they find mistakes soonest.
    pub const ALL: [Self; 9] = [
        Self::Fmt,
        Self::Clippy,
        Self::Build,
        Self::Unit,
        Self::Loom,
        Self::Weak,
        Self::E2e,
        Self::Package,
        Self::Rdma,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::Build => "build",
            Self::Unit => "unit",
            Self::Loom => "loom",
            Self::Weak => "weak",
            Self::E2e => "e2e",
            Self::Package => "package",
            Self::Rdma => "rdma",
        }
    }

    fn run(self) -> io::Result<Tally> {
        match self {
            Self::Fmt => step(shell::cargo().args(["fmt", "--all", "--check"])),
            Self::Clippy => step(shell::cargo().args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])),
            Self::Build => step(shell::cargo().args(["build", "--quiet", "--release"])),
            Self::Unit => unit(),
            Self::Loom => loom(),
            Self::Weak => weak(),
            Self::E2e => e2e(),
            Self::Package => package(),
            Self::Rdma => rdma(),
        }
    }
}

/// Runs checks and prints the closing line.
pub fn run(checks: &[Check], install: bool) -> ExitCode {
    let mut left_out = Vec::new();
    if checks.contains(&Check::E2e) {
        left_out = packages::provide(&packages::all(), install);
    }
    if checks.contains(&Check::Package) && !checks.contains(&Check::E2e) {
        left_out = packages::provide(&packages::of(dist::PROGRAMS), install);
    }
    let no_vm = vm::wanting().or_else(|| (!install).then_some("--no-install"));
    let mut total = Tally::default();
    let mut report = Vec::new();
    for check in checks.iter().filter(|c| **c != Check::Rdma || no_vm.is_none()) {
        println!("==> {}", check.name());
        let start = Instant::now();
        let tally = check.run().unwrap_or_else(|e| {
            println!("{}: {e}", check.name());
            Tally::step(false)
        });
        report.push(format!("{:8} {tally} ({:.0} s)", check.name(), start.elapsed().as_secs_f64()));
        total.add(tally);
    }
    for said in FAILURES.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        println!("\n{said}");
    }
    println!("\n{}", report.join("\n"));
    if !left_out.is_empty() {
        println!("left out, for want of these packages: {}", left_out.join(" "));
    }
    if let Some(why) = no_vm.filter(|_| checks.contains(&Check::Rdma)) {
        println!("left out: rdma ({why})");
    }
    println!("{total}");
    if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A command that passes or fails as a whole.
fn step(command: &mut Command) -> io::Result<Tally> {
    Ok(Tally::step(command.status()?.success()))
}

/// What failures said. It is told once more at the end: a log of hours is read from there, and may have been cut.
static FAILURES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Counts what tests printed, and keeps what their failures said.
fn count(ok: bool, lines: &[String]) -> Tally {
    FAILURES.lock().unwrap_or_else(PoisonError::into_inner).extend(failures(lines));
    Tally::from_run(ok, lines)
}

/// A run of `cargo test`.
fn tests(command: &mut Command) -> io::Result<Tally> {
    let (status, lines) = shell::tee(command)?;
    Ok(count(status.success(), &lines))
}

/// The tests of the crates, and what is behind features: the examples in its documentation, and the events. The
/// documentation has no broken link. The BPF object is what its source makes, where that can be found out.
fn unit() -> io::Result<Tally> {
    let all = ["test", "--quiet", "--release", "--workspace", "--exclude", "libsmc", "--no-fail-fast"];
    let mut tally = tests(shell::cargo().args(all))?;
    // A minute, for what a developer who runs `cargo test` does not wait.
    let long = ["test", "--quiet", "--release", "-p", "smc", "--lib", "explore", "--", "--ignored"];
    tally.add(tests(shell::cargo().args(long))?);
    let documented = ["test", "--quiet", "--release", "-p", "smc", "--all-features", "--doc"];
    tally.add(tests(shell::cargo().args(documented))?);
    let mut document = shell::cargo();
    document.args(["doc", "--quiet", "--no-deps", "-p", "smc", "--all-features"]);
    tally.add(step(document.env("RUSTDOCFLAGS", "-D warnings"))?);
    let events = ["test", "--quiet", "--release", "-p", "smc", "--features", "tracing", "--test", "events"];
    tally.add(tests(shell::cargo().args(events))?);
    if let Some(same) = bpf::check()? {
        tally.add(same);
    }
    Ok(tally)
}

/// The top-level tests. They run the release build of the library, the `smc` command and the examples.
fn e2e() -> io::Result<Tally> {
    let mut tally = step(shell::cargo().args(["build", "--quiet", "--release"]))?;
    tally.add(step(shell::cargo().args(["build", "--quiet", "--release", "-p", "libsmc", "--examples"]))?);
    if tally.failed > 0 {
        return Ok(tally);
    }
    let mut command = shell::cargo();
    command.args(["test", "--quiet", "--release", "-p", "libsmc", "--no-fail-fast"]);
    command.env("SMC_LIBRARY", rounds::library()).env("PATH", shell::path_with_sbin());
    tests(&mut command)
}

/// `tests/chaos`, for as long as is wanted.
pub fn chaos(options: &[&str]) -> ExitCode {
    let (mut time, mut seed) = (600, None);
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let value = rest.next().copied().unwrap_or("");
        match (*option, seconds(value), value.parse::<u64>()) {
            ("--time", Some(t), _) => time = t,
            ("--seed", _, Ok(n)) => seed = Some(n.to_string()),
            _ => {
                eprintln!("xtask: chaos: {option} {value}: --time 90s, 30m or 1h, and --seed N");
                return ExitCode::from(2);
            }
        }
    }
    let run = || -> io::Result<Tally> {
        let mut tally = step(shell::cargo().args(["build", "--quiet", "--release"]))?;
        tally.add(step(shell::cargo().args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "libsmc",
            "--examples",
        ]))?);
        if tally.failed > 0 {
            return Ok(tally);
        }
        let mut command = shell::cargo();
        command.args([
            "test",
            "--quiet",
            "--release",
            "-p",
            "libsmc",
            "--test",
            "chaos",
            "--",
            "--nocapture",
        ]);
        command.env("SMC_CHAOS_SECONDS", time.to_string()).env("PATH", shell::path_with_sbin());
        if let Some(seed) = seed {
            command.env("SMC_SEED", seed);
        }
        tests(&mut command)
    };
    let tally = run().unwrap_or_else(|e| {
        println!("chaos: {e}");
        Tally::step(false)
    });
    println!("{tally}");
    if tally.failed == 0 && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `smc/tests/terminate.rs`, for as long as is wanted, and under a sanitizer.
pub fn stress(options: &[&str]) -> ExitCode {
    let (mut time, mut sanitizer) = (60, None);
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let value = rest.next().copied().unwrap_or("");
        match (*option, seconds(value), value) {
            ("--time", Some(t), _) => time = t,
            ("--sanitizer", _, "address" | "thread") => sanitizer = Some(value),
            _ => {
                eprintln!(
                    "xtask: stress: {option} {value}: --time 90s, 30m or 1h, --sanitizer address or thread"
                );
                return ExitCode::from(2);
            }
        }
    }
    let mut command = shell::cargo();
    command.args(["test", "--release", "-p", "smc", "--test", "terminate"]);
    if let Some(which) = sanitizer {
        // An option of the compiler that is not stable. std stays as it is: see the suppressions.
        let mut flags = format!("-Zsanitizer={which} -Cunsafe-allow-abi-mismatch=sanitizer");
        if which == "thread" {
            flags.push_str(" --cfg smc_tsan");
        }
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        command.args(["--target", &target]).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags);
        command.env("CARGO_TARGET_DIR", shell::target_dir().join(format!("sanitize-{which}")));
        let hidden = shell::root().join("smc/tests/tsan.supp");
        command.env("TSAN_OPTIONS", format!("suppressions={}", hidden.display()));
    }
    command.args(["--", "--nocapture", "--test-threads=1"]).env("SMC_STRESS_SECONDS", time.to_string());
    let tally = tests(&mut command).unwrap_or_else(|e| {
        println!("stress: {e}");
        Tally::step(false)
    });
    println!("{tally}");
    if tally.failed == 0 && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `90`, `90s`, `30m`, `1h`.
fn seconds(text: &str) -> Option<u64> {
    let unit = |c: char| [('s', 1), ('m', 60), ('h', 3600)].into_iter().find(|u| u.0 == c).map(|u| u.1);
    let last = text.chars().last()?;
    match unit(last) {
        Some(n) => text.strip_suffix(last)?.parse::<u64>().ok()?.checked_mul(n),
        None => text.parse().ok(),
    }
}

/// What users install, made of the release build.
fn package() -> io::Result<Tally> {
    let built = step(shell::cargo().args(["build", "--quiet", "--release"]))?;
    if built.failed > 0 { Ok(built) } else { dist::trial() }
}

/// `cargo test` of the engine's models, in a target folder of their own: other flags, other objects.
fn models(weak: bool) -> Command {
    let (flags, dir) =
        if weak { ("--cfg smc_loom --cfg smc_weak", "loom-weak") } else { ("--cfg smc_loom", "loom") };
    let dir: PathBuf = shell::target_dir().join(dir);
    let mut command = shell::cargo();
    command.args(["test", "--quiet", "--release", "-p", "smc", "--lib"]);
    command.env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", dir);
    command
}

fn loom() -> io::Result<Tally> {
    let tally = tests(models(false).arg("loom"))?;
    // Nothing found is not the same as nothing wrong.
    Ok(if tally == Tally::default() { Tally::step(false) } else { tally })
}

/// What is between hosts: the workspace in `rdma/`, whose tests with devices run in a VM.
fn rdma() -> io::Result<Tally> {
    vm::provide()?;
    let cargo = |args: &[&str]| {
        let mut command = shell::cargo();
        command.args(args).current_dir(shell::root().join("rdma"));
        command.env("CARGO_TARGET_DIR", shell::target_dir().join("rdma"));
        command
    };
    let mut tally = step(&mut cargo(&["fmt", "--check"]))?;
    tally.add(step(&mut cargo(&[
        "clippy",
        "--quiet",
        "--release",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?);
    tally.add(tests(&mut cargo(&["test", "--quiet", "--release"]))?);
    if tally.failed > 0 {
        return Ok(tally);
    }
    let built = cargo(&["test", "--release", "--no-run"]).output()?;
    let text = String::from_utf8_lossy(&built.stderr).into_owned();
    let programs: Vec<&str> = executables(&text).collect();
    if programs.is_empty() {
        println!("no tests were found:\n{text}");
        return Ok(Tally::step(false));
    }
    // What the programs in there are preloaded with: tests alone do not make libsmc-rdma.so.
    tally.add(step(&mut cargo(&["build", "--quiet", "--release"]))?);
    tally.add(step(shell::cargo().args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "smc-preload",
        "-p",
        "smc-cli",
    ]))?);
    let line: Vec<String> =
        programs.iter().map(|p| format!("'{p}' --ignored --test-threads=1 || failed=1")).collect();
    let library = rounds::library().display().to_string();
    let line =
        format!("cd rdma\nexport SMC_LIBRARY='{library}'\nfailed=0\n{}\nreturn $failed", line.join("\n"));
    let ran = vm::run(&line, VM_LIMIT)?;
    print!("{}{}", ran.output, ran.console);
    let lines: Vec<String> = ran.output.lines().map(str::to_string).collect();
    let mut inside = count(ran.status == Some(0), &lines);
    // Those that need no device ran outside, and were counted there.
    inside.skipped = 0;
    tally.skipped = 0;
    tally.add(inside);
    Ok(tally)
}

/// The programs that `cargo test --no-run` names: `  Executable tests/a.rs (target/release/deps/a-0123)`.
fn executables(text: &str) -> impl Iterator<Item = &str> {
    let tests = text.lines().filter_map(|l| l.trim().strip_prefix("Executable tests/"));
    tests.filter_map(|l| l.split_once('(')?.1.strip_suffix(')'))
}

/// Each model must fail when the code it watches is weakened, or it sees nothing. One process per model: a
/// panic inside a model may take the process along.
fn weak() -> io::Result<Tally> {
    let listed = models(true).args(["loom", "--", "--list"]).output()?;
    let listed_ok = listed.status.success();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let twins = twins(&listed);
    let mut tally = Tally::step(listed_ok && !twins.is_empty());
    if tally.failed > 0 {
        println!("no weakened models were found");
    }
    for name in twins {
        let run = Running::start(models(true).args(["--", "--exact", name]))?;
        let seen = match run.finish(MODEL_LIMIT, || {})?.status {
            Some(status) => !status.success(),
            None => false,
        };
        println!("{name}: {}", if seen { "the weakening is seen" } else { "NOT SEEN" });
        tally.add(Tally::step(seen));
    }
    Ok(tally)
}

/// The models that a weakened build must break: those named `weak_…`, or all of them if none is named so.
fn twins(listed: &str) -> Vec<&str> {
    let all: Vec<&str> = listed.lines().filter_map(|l| l.strip_suffix(": test")).collect();
    let is_weak = |n: &&str| n.rsplit("::").next().is_some_and(|n| n.contains("weak_"));
    let named: Vec<&str> = all.iter().copied().filter(is_weak).collect();
    if named.is_empty() { all } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_by_name() {
        let text = "  Executable unittests src/lib.rs (t/a-1)\n  Executable tests/b.rs (t/deps/b-2)\n";
        assert_eq!(executables(text).collect::<Vec<_>>(), ["t/deps/b-2"]);
    }

    #[test]
    fn times_have_units() {
        assert_eq!(["90", "90s", "30m", "1h"].map(seconds), [Some(90), Some(90), Some(1800), Some(3600)]);
        assert_eq!(["", "h", "1d", "-1s"].map(seconds), [None; 4]);
    }

    #[test]
    fn weakened_models_are_found_by_name() {
        let list =
            "ring::loom_ring::publish: test\nring::loom_ring::weak_publish: test\n\n2 tests, 0 benchmarks\n";
        assert_eq!(twins(list), ["ring::loom_ring::weak_publish"]);
        assert_eq!(twins("a::loom_a::b: test\n"), ["a::loom_a::b"]);
        assert!(twins("0 tests, 0 benchmarks\n").is_empty());
    }
}
