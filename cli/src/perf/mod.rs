//! `smc perf`: how fast connections are, between two processes or two hosts.
//!
//! Streams, requests and responses, a connection for each; over TCP, under libsmc and over Unix sockets; with what
//! iperf3 calls things. It talks to a plain iperf3 as well, at either end.

mod client;
mod drive;
mod events;
mod flow;
mod interop;
mod link;
mod meter;
mod options;
mod pattern;
mod report;
mod server;
mod signals;
mod spec;
mod test;
mod wire;

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

pub use options::Options;
use options::Task;
use signals::{INTERRUPTED, Interrupts};
use spec::Over;
use wire::{Problem, Result};

use crate::output::complain;
use crate::{library, run as preloading};

/// Does what the options ask for.
pub fn run(options: Options) -> ExitCode {
    let result = options.task().and_then(|task| match task {
        Task::Server(settings, over) => under(over).and_then(|()| server::run(settings)),
        Task::Client(tests, target) => {
            let over = tests.first().map(|s| s.over);
            under(over).and_then(|()| ask(&tests, &target))
        }
    });
    result.unwrap_or_else(|why| {
        complain(&why);
        ExitCode::FAILURE
    })
}

/// One test, or one after another (`--sweep`).
fn ask(tests: &[spec::Spec], target: &client::Target) -> Result<ExitCode> {
    let interrupts = Interrupts::new()?;
    let mut code = ExitCode::SUCCESS;
    for spec in tests {
        let done = client::run(spec, target, &interrupts)?;
        if done.error.is_some() {
            code = ExitCode::FAILURE;
        }
        if done.interrupted {
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    Ok(code)
}

/// Begins again under libsmc.so, if that is what is asked for and is not so yet.
fn under(over: Option<Over>) -> Result<()> {
    if over != Some(Over::Preload) || meter::preloaded() {
        return Ok(());
    }
    let library = library::find(None).map_err(Problem::new)?;
    let before = env::var_os("LD_PRELOAD");
    let value = preloading::preload(&library, before.clone()).map_err(Problem::new)?;
    if before.as_ref() == Some(&value) {
        return Err(Problem::new(format!(
            "{} could not be preloaded (smc check says more)",
            library.display()
        )));
    }
    let error =
        Command::new(env::current_exe()?).args(env::args_os().skip(1)).env("LD_PRELOAD", value).exec();
    Err(Problem::new(format!("smc under {}: {error}", library.display())))
}
