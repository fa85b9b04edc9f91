//! Builds libsmc.so for the command to carry: cargo installs commands only, and `cargo install --path cli` is to bring
//! the library as well (see `src/library.rs`).
//!
//! Only for a release, out of the workspace, and unless `SMC_CARRY_LIBRARY=0` says that the library is built beside the
//! command anyway.
#![allow(clippy::print_stdout, reason = "that is how cargo is told")]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

const SWITCH: &str = "SMC_CARRY_LIBRARY";

fn var(name: &str) -> OsString {
    env::var_os(name).unwrap_or_default()
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={SWITCH}");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let wanted =
        var("PROFILE") == "release" && var(SWITCH) != "0" && workspace.join("preload/Cargo.toml").is_file();
    let library = if wanted { built(&workspace) } else { Vec::new() };
    let mut name = String::new();
    if !library.is_empty() {
        let mut hash = DefaultHasher::new();
        library.hash(&mut hash);
        name = format!("{:016x}", hash.finish());
    }
    println!("cargo:rustc-env=SMC_CARRIED={name}");
    fs::write(PathBuf::from(var("OUT_DIR")).join("libsmc.so"), library).expect("OUT_DIR can be written");
}

/// The library, as this cargo makes it of the same sources, without what debuggers want.
fn built(workspace: &Path) -> Vec<u8> {
    for part in
        ["preload/src", "preload/Cargo.toml", "preload/build.rs", "smc/src", "smc/Cargo.toml", "Cargo.toml"]
    {
        println!("cargo:rerun-if-changed={}", workspace.join(part).display());
    }
    let (target, folder) = (var("TARGET"), PathBuf::from(var("OUT_DIR")).join("library"));
    let mut cargo = Command::new(var("CARGO"));
    // What it needs is a part of what this build needs, so it is here.
    cargo.args(["build", "--quiet", "--offline", "--release", "--package", "smc-preload"]);
    cargo.args([
        "--config",
        "profile.release.debug=false",
        "--config",
        "profile.release.strip=\"debuginfo\"",
    ]);
    cargo.arg("--target").arg(&target).arg("--target-dir").arg(&folder).current_dir(workspace);
    // Of clippy's, for one.
    cargo.env_remove("RUSTC_WORKSPACE_WRAPPER");
    let made = cargo.status().is_ok_and(|s| s.success());
    assert!(made, "libsmc.so could not be built; {SWITCH}=0 leaves it out of the command");
    fs::read(folder.join(target).join("release/libsmc.so")).expect("cargo has just made it")
}
