//! `cargo xtask bpf`: makes cli/src/bpf/option.bpf.o of the C beside it.
//!
//! The object is kept with the sources, for neither a build nor an attach is to need clang. Where there is the clang that
//! made it, the tests make it again and compare.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::shell;
use crate::tally::Tally;

/// Another one makes other instructions of the same.
const CLANG: &str = "clang-14";
const STRIP: &str = "llvm-strip-14";

fn folder() -> PathBuf {
    shell::root().join("cli/src/bpf")
}

fn run(command: &mut Command) -> io::Result<()> {
    let status = command.current_dir(folder()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

/// From the folder of the source, so that no path of this machine gets in.
fn make(object: &Path) -> io::Result<()> {
    let headers = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    // -g makes the BTF by which the kernel knows the maps; what else it makes is dropped.
    let words = [
        "-target",
        "bpfel",
        "-mcpu=v2",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fdebug-compilation-dir=.",
    ];
    run(Command::new(CLANG).args(words).arg(headers).args(["-c", "option.bpf.c", "-o"]).arg(object))?;
    run(Command::new(STRIP).arg("-g").arg(object))
}

fn wanting() -> Option<&'static str> {
    [CLANG, STRIP].into_iter().find(|p| shell::which(p).is_none())
}

/// The command.
pub fn main() -> ExitCode {
    let made = match wanting() {
        Some(what) => Err(io::Error::other(format!("there is no {what} (Debian: clang-14 llvm-14)"))),
        None => make(&folder().join("option.bpf.o")),
    };
    made.map_or_else(
        |e| {
            eprintln!("xtask bpf: {e}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// Whether the object is what its source makes; none: there is nothing to make it with.
pub fn check() -> io::Result<Option<Tally>> {
    if wanting().is_some() {
        return Ok(None);
    }
    let scratch = shell::target_dir().join("option.bpf.o");
    make(&scratch)?;
    let same = fs::read(&scratch)? == fs::read(folder().join("option.bpf.o"))?;
    if !same {
        println!("cli/src/bpf/option.bpf.o is not what option.bpf.c makes: `cargo xtask bpf`");
    }
    Ok(Some(Tally::step(same)))
}
