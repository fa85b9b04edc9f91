//! `cargo xtask bpf`: makes the BPF objects of the C beside them, that of `smc bpf` and that which `cargo xtask bench` compares
//! with.
//!
//! The objects are kept with the sources, for neither a build nor an attach is to need clang. Where there is the clang that
//! made them, the tests make them again and compare.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::shell;
use crate::tally::Tally;

/// Another one makes other instructions of the same.
const CLANG: &str = "clang-14";
const STRIP: &str = "llvm-strip-14";

/// The folder and the name of each.
const OBJECTS: [(&str, &str); 2] = [("cli/src/bpf", "option.bpf"), ("xtask/src/bench", "sockmap.bpf")];

/// Where an object lies.
fn place(folder: &str, name: &str) -> PathBuf {
    shell::root().join(folder).join(format!("{name}.o"))
}

fn run(command: &mut Command, folder: &str) -> io::Result<()> {
    let status = command.current_dir(shell::root().join(folder)).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

/// From the folder of the source, so that no path of this machine gets in.
fn make(folder: &str, name: &str, object: &Path) -> io::Result<()> {
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
    let source = format!("{name}.c");
    run(Command::new(CLANG).args(words).arg(headers).args(["-c", &source, "-o"]).arg(object), folder)?;
    run(Command::new(STRIP).arg("-g").arg(object), folder)
}

fn wanting() -> Option<&'static str> {
    [CLANG, STRIP].into_iter().find(|p| shell::which(p).is_none())
}

/// The command.
pub fn main() -> ExitCode {
    let made = match wanting() {
        Some(what) => Err(io::Error::other(format!("there is no {what} (Debian: clang-14 llvm-14)"))),
        None => OBJECTS.iter().try_for_each(|(folder, name)| make(folder, name, &place(folder, name))),
    };
    made.map_or_else(
        |e| {
            eprintln!("xtask bpf: {e}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// Whether the objects are what their sources make; none: there is nothing to make them with.
pub fn check() -> io::Result<Option<Tally>> {
    if wanting().is_some() {
        return Ok(None);
    }
    let mut tally = Tally::default();
    for (folder, name) in OBJECTS {
        let scratch = shell::target_dir().join(name);
        make(folder, name, &scratch)?;
        let kept = place(folder, name);
        let same = fs::read(&scratch)? == fs::read(&kept)?;
        if !same {
            println!("{} is not what its source makes: `cargo xtask bpf`", kept.display());
        }
        tally.add(Tally::step(same));
    }
    Ok(Some(tally))
}
