//! Build tasks: one subcommand per check, `test` for all of them, and the demonstration.
//!
//! No dependencies, so that the first `cargo xtask` of a fresh checkout compiles in a second or two.

// A command-line tool: its output is its purpose.
#![allow(clippy::print_stdout, clippy::print_stderr)]

// Shared with `smc perf compare`; by path, so that there is still nothing to compile but this.
#[path = "../../cli/src/perf/bars.rs"]
mod bars;
mod bench;
mod bpf;
mod checks;
mod demo;
mod dist;
#[path = "../../cli/src/perf/figures.rs"]
mod figures;
mod packages;
mod rounds;
mod section;
mod shell;
mod tally;
mod vm;

use std::process::ExitCode;

use checks::Check;

const HELP: &str = "\
cargo xtask COMMAND

  demo          build, then run unmodified programs on TCP and under libsmc
      --quick        one short round of each
      --no-install   do not install redis, iperf3 and sockperf (Debian, root)
      --readme       put the table into README.md
  bench [NAME…] measure against TCP, Unix sockets and the machine's limits, in turn (`--list`: what)
      --quick        fewer, shorter rounds
      --no-install   do not install the programs that are measured (Debian, root)
      --before LIB   another build of libsmc.so to compare with
      --docs         put the table into docs/PERFORMANCE.md
  bpf           makes cli/src/bpf/option.bpf.o anew (clang-14)
  install       what `cargo build --release` makes, with man pages and completions
      --prefix DIR   where to: ~/.local, /usr/local
  dist          an archive and a Debian package, in target/packages
      --rdma         with libsmc-rdma.so (its build needs rdma-core, see rdma/Cargo.toml)
      --into DIR     elsewhere
  test          everything below; ends with `N passed, N failed`
      --no-install   do not install the programs the end-to-end tests use

  fmt           cargo fmt --check
  clippy        no warnings, all targets
  build         cargo build --release
  unit          unit tests and documentation tests
  loom          the models: every interleaving of the lock-free parts
  weak          the same models with one ordering or guard weakened: each must fail
  e2e           top-level tests/: unmodified programs under libsmc.so
  chaos         tests/chaos/ alone, for longer: all that happens to processes happens at once
      --time T       how long each of its tests goes on: 90s, 30m, 1h (10m)
      --seed N       draws the same again, as far as scheduling lets it
  stress        smc/tests/terminate.rs alone, for longer: link groups are terminated under their streams
      --time T       how long: 90s, 30m, 1h (60s)
      --sanitizer S  address or thread
  package       what `dist` makes, installed, used and removed (the package: in a clean root, by root)
  rdma          rdma/: verbs and the kernel's SMC-R, in a VM with Soft-RoCE (Debian, root)

  vm COMMAND…   runs a command in that VM, with this machine's files
      --timeout S    seconds, its boot included (300)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (command, options) = args.split_first().map_or(("help", &[][..]), |(c, o)| (*c, o));
    if command == "bench" {
        return bench::main(options);
    }
    if command == "chaos" {
        return checks::chaos(options);
    }
    if command == "stress" {
        return checks::stress(options);
    }
    if command == "vm" {
        return vm::main(options);
    }
    if command == "dist" {
        return dist::dist(options);
    }
    if command == "install" {
        return dist::install(options);
    }
    let known: &[&str] = match command {
        "demo" => &["--quick", "--no-install", "--readme"],
        "test" | "e2e" | "package" => &["--no-install"],
        _ => &[],
    };
    if let Some(bad) = options.iter().find(|o| !known.contains(o)) {
        eprintln!("xtask: {command} has no option {bad}\n\n{HELP}");
        return ExitCode::from(2);
    }
    let install = !options.contains(&"--no-install");
    match command {
        "demo" => {
            let options = demo::Options {
                install,
                quick: options.contains(&"--quick"),
                readme: options.contains(&"--readme"),
            };
            match demo::run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(e) => {
                    eprintln!("xtask demo: {e}");
                    ExitCode::FAILURE
                }
            }
        }
        "test" => checks::run(&Check::ALL, install),
        "bpf" => bpf::main(),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        name => match Check::ALL.into_iter().find(|c| c.name() == name) {
            Some(check) => checks::run(&[check], install),
            None => {
                eprintln!("xtask: unknown command {name}\n\n{HELP}");
                ExitCode::from(2)
            }
        },
    }
}
