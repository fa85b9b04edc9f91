//! `smc perf`: how fast connections are, between two processes or two hosts.
//!
//! Streams, requests and responses, a connection for each; over TCP, under libsmc and over Unix sockets; with what
//! iperf3 calls things. It talks to a plain iperf3 as well, at either end.

mod bars;
mod client;
mod compare;
mod crowd;
mod drive;
mod events;
mod figures;
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
use report::Form;
use signals::{INTERRUPTED, Interrupts};
use spec::Over;
use wire::{Problem, Result};

use crate::output::{complain, emit};
use crate::{library, run as preloading};

/// Does what the options ask for.
pub fn run(options: Options) -> ExitCode {
    let result = options.task().and_then(|task| match task {
        Task::Server(settings, over) => under(over).and_then(|()| server::run(settings)),
        Task::Client(tests, target) => {
            // With processes of their own, those are under it.
            let over = tests.first().filter(|s| !s.own_process).map(|s| s.over);
            under(over).and_then(|()| ask(&tests, target))
        }
        Task::Work(order) => under(Some(order.spec.over))
            .and_then(|()| crowd::work(*order))
            .map(|well| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Task::Compare(options) => compare::run(&options),
    });
    result.unwrap_or_else(|why| {
        complain(&why);
        ExitCode::FAILURE
    })
}

/// One test, or one after another (`--sweep`), which are told by a line each, or in one JSON document.
fn ask(tests: &[spec::Spec], mut target: client::Target) -> Result<ExitCode> {
    let interrupts = Interrupts::new()?;
    let form = target.form;
    let sweep = tests.len() > 1;
    if sweep && form == Form::Text {
        target.form = Form::Silent;
        emit(&report::sweep_head(&tests[0]), ExitCode::SUCCESS);
    }
    let (mut code, mut documents) = (ExitCode::SUCCESS, Vec::new());
    for spec in tests {
        let done = if spec.own_process {
            crowd::run(spec, &target, &interrupts)?
        } else {
            client::run(spec, &target, &interrupts)?
        };
        if sweep && form == Form::Text {
            emit(&report::sweep_line(spec, &done.whole()), ExitCode::SUCCESS);
            done.error.iter().for_each(|why| complain(why));
        }
        if done.error.is_some() {
            code = ExitCode::FAILURE;
        }
        let interrupted = done.interrupted;
        documents.extend(done.document);
        if interrupted {
            code = ExitCode::from(INTERRUPTED);
            break;
        }
    }
    match documents.pop() {
        None => Ok(code),
        Some(only) if !sweep => Ok(emit(&format!("{only:#}\n"), code)),
        Some(last) => {
            documents.push(last);
            Ok(emit(&format!("{:#}\n", serde_json::json!({ "sweep": documents })), code))
        }
    }
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
