//! The `smc` command: run programs under libsmc, and look at what their connections do.
//!
//! `run` prepares an environment and is gone, `perf` measures connections of its own, `bpf` attaches programs to cgroups; the
//! others read what running programs publish ([`smc::stats`]) and change nothing.

mod bpf;
mod check;
mod elf;
mod library;
mod openmetrics;
mod output;
mod pages;
mod perf;
mod probe;
mod run;
mod ss;
mod stats;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "smc", version, about = "TCP connections over shared memory, for programs as they are")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program under libsmc
    Run(Box<run::Options>),
    /// Show the connections of programs that run under libsmc
    Ss(ss::Options),
    /// Show what the connections do now, again and again
    Top(top::Options),
    /// Show sums for each process: connections, bytes, reasons for staying on TCP
    Stats(stats::Options),
    /// Measure connections: throughput, latency, connections per second
    Perf(Box<perf::Options>),
    /// Say what this machine can do, and what to do about the rest
    Check,
    /// Find out by a TCP option which other hosts speak SMC (root)
    Bpf(bpf::Options),
    /// Print a completion script for a shell
    Completions(pages::CompletionOptions),
    /// Print a man page, or write all of them
    Man(pages::ManOptions),
    /// One end of the connection that `check` tries
    #[command(name = "__probe", hide = true)]
    Probe(probe::Options),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run(options) => run::run(&options),
        Command::Ss(options) => ss::run(&options),
        Command::Top(options) => top::run(&options),
        Command::Stats(options) => stats::run(&options),
        Command::Perf(options) => perf::run(*options),
        Command::Check => check::run(),
        Command::Bpf(options) => bpf::run(&options),
        Command::Completions(options) => pages::completions(&options),
        Command::Man(options) => pages::man(&options),
        Command::Probe(options) => probe::run(&options),
    }
}
