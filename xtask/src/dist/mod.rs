//! `cargo xtask dist`: what a release consists of, as a tarball and as a Debian package; `install`: the same below a prefix.
//!
//! ```text
//!  tree.rs      which file goes where, with which rights
//!  deb.rs       control data, checksums, changelog; dpkg-deb puts them together
//!  trial.rs     the package in a clean root: installed, used, removed (trial.sh runs there)
//! ```
//!
//! Two runs on one commit give the same bytes, wherever the checkout lies: names in order, one time for all files
//! (`SOURCE_DATE_EPOCH`, or the commit's, or that of the change log where there is no git), root as their owner, no paths
//! of this machine in the programs.

mod deb;
mod tree;
mod trial;

pub use trial::{PROGRAMS, trial};

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::UNIX_EPOCH;

use crate::shell;
use tree::{Layout, Parts};

/// The processor's name in Debian's multiarch folders, and Debian's own name for it.
const MACHINE: (&str, &str) = if cfg!(target_arch = "aarch64") {
    ("aarch64-linux-gnu", "arm64")
} else {
    ("x86_64-linux-gnu", "amd64")
};

/// What is being packaged.
struct Release {
    /// `0.1.0`, or `0.1.0~20261127190406.gabc1234` for a commit that has no tag: older than the release.
    version: String,
    /// The time of all files.
    epoch: u64,
}

impl Release {
    fn find() -> io::Result<Self> {
        let manifest = fs::read_to_string(shell::root().join("Cargo.toml"))?;
        let version = manifest.lines().find_map(|l| l.strip_prefix("version = \"")?.strip_suffix('"'));
        let version = version.ok_or_else(|| io::Error::other("Cargo.toml names no version"))?;
        let time = git(&["log", "-1", "--format=%ct"]);
        let given = std::env::var("SOURCE_DATE_EPOCH").ok();
        let epoch = match given.or(time).and_then(|t| t.parse().ok()) {
            Some(epoch) => epoch,
            // Neither git nor its history is here, as in an unpacked archive of the sources.
            None => changed(&shell::root().join("CHANGELOG.md"))?,
        };
        let tagged = git(&["tag", "--points-at", "HEAD"])
            .is_some_and(|tags| tags.lines().any(|t| t.strip_prefix('v') == Some(version)));
        let commit = git(&["rev-parse", "--short=7", "HEAD"]).filter(|_| !tagged);
        let stamp = || date(epoch, "+%Y%m%d%H%M%S");
        let version = match commit {
            Some(commit) => format!("{version}~{}.g{commit}", stamp()?),
            None => version.to_string(),
        };
        Ok(Self { version, epoch })
    }
}

/// When a file was changed last.
fn changed(file: &Path) -> io::Result<u64> {
    let since = fs::metadata(file)?.modified()?.duration_since(UNIX_EPOCH);
    Ok(since.map_err(io::Error::other)?.as_secs())
}

/// What git says, where there is a repository.
fn git(args: &[&str]) -> Option<String> {
    let out = Command::new("git").arg("-C").arg(shell::root()).args(args).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?.trim().to_string();
    (out.status.success() && !text.is_empty()).then_some(text)
}

/// A time as date(1) writes it.
fn date(epoch: u64, format: &str) -> io::Result<String> {
    let out =
        output(Command::new("date").args(["-u", "-d", &format!("@{epoch}"), format]).env("LC_ALL", "C"))?;
    Ok(String::from_utf8_lossy(&out).trim().to_string())
}

/// The standard output of a command that must succeed.
fn output(command: &mut Command) -> io::Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
    if out.status.success() {
        return Ok(out.stdout);
    }
    let said = String::from_utf8_lossy(&out.stderr).trim().to_string();
    Err(io::Error::other(format!("{name}: {}: {said}", out.status)))
}

/// Builds for a release: in a folder of its own, with names in place of this machine's paths.
fn build(rdma: bool) -> io::Result<Parts> {
    let target = shell::target_dir().join("dist");
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|h| format!("{h}/.cargo")));
    let root = shell::root().display().to_string();
    let mut flags = vec![format!("--remap-path-prefix={root}=libsmc")];
    flags.extend(home.ok().map(|h| format!("--remap-path-prefix={h}=cargo")));
    let run = |folder: PathBuf, target: &Path, words: &[&str]| {
        let mut cargo = shell::cargo();
        cargo.args(["build", "--release", "--locked"]).args(words).current_dir(folder);
        cargo.env("CARGO_TARGET_DIR", target).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        if cargo.status()?.success() { Ok(()) } else { Err(io::Error::other("the build failed")) }
    };
    run(shell::root(), &target, &["-p", "smc-preload", "-p", "smc-cli"])?;
    if rdma {
        run(shell::root().join("rdma"), &target.join("rdma"), &[])?;
    }
    Parts::of(&target.join("release"), rdma.then(|| target.join("rdma/release")).as_deref())
}

/// What `cargo build --release` has made, and libsmc-rdma.so if that was built as well.
fn built() -> io::Result<Parts> {
    let target = shell::target_dir();
    let rdma = target.join("rdma/release");
    let rdma = rdma.join("libsmc_rdma.so").exists().then_some(rdma);
    Parts::of(&target.join("release"), rdma.as_deref())
}

/// Makes both files; returns where they are.
fn make(release: &Release, parts: &Parts, into: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(into)?;
    let work = shell::Folder::new("dist")?;
    let name = format!("libsmc-{}-{}", release.version, MACHINE.0);
    let archive = work.path().join("archive");
    tree::lay(&Layout::archive(&name), release, parts, &archive)?;
    let tarball = into.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=gnu", "--sort=name", "--numeric-owner", "--owner=0", "--group=0"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg("--use-compress-program=gzip -9n");
    output(tar.arg("--file").arg(&tarball).arg("--directory").arg(&archive).arg(&name))?;
    let mut files = vec![tarball];
    if shell::which("dpkg-deb").is_some() {
        files.push(deb::make(release, parts, &work.path().join("deb"), into)?);
    } else {
        println!("no .deb: dpkg-deb is not here (package dpkg)");
    }
    Ok(files)
}

/// The value of `--name VALUE` or `--name=VALUE`, if that is all there is but for `flags`.
fn value<'a>(options: &[&'a str], name: &str, flags: &[&str]) -> Result<Option<&'a str>, String> {
    let mut found = None;
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        if *option == name {
            found = Some(*rest.next().ok_or(format!("{name} needs a folder"))?);
        } else if let Some(v) = option.strip_prefix(name).and_then(|o| o.strip_prefix('=')) {
            found = Some(v);
        } else if !flags.contains(option) {
            return Err(format!("no option {option}"));
        }
    }
    Ok(found)
}

fn ended(command: &str, result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask {command}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// `cargo xtask dist [--rdma] [--into FOLDER]`
pub fn dist(options: &[&str]) -> ExitCode {
    let into = match value(options, "--into", &["--rdma"]) {
        Ok(into) => into.map_or_else(|| shell::target_dir().join("packages"), PathBuf::from),
        Err(e) => {
            eprintln!("xtask dist: {e}");
            return ExitCode::from(2);
        }
    };
    let all = || {
        let release = Release::find()?;
        let parts = build(options.contains(&"--rdma"))?;
        let files = make(&release, &parts, &into)?;
        let mut sums = Command::new("sha256sum");
        sums.current_dir(&into).args(files.iter().filter_map(|f| f.file_name()));
        fs::write(into.join("SHA256SUMS"), output(&mut sums)?)?;
        for file in files {
            println!("{}", file.display());
        }
        Ok(())
    };
    ended("dist", all())
}

/// `cargo xtask install --prefix FOLDER`: what `cargo build --release` has made, with pages and completions.
pub fn install(options: &[&str]) -> ExitCode {
    let prefix = match value(options, "--prefix", &[]) {
        Ok(Some(prefix)) => PathBuf::from(prefix),
        Ok(None) => {
            eprintln!("xtask install: --prefix says where, ~/.local or /usr/local");
            return ExitCode::from(2);
        }
        Err(e) => {
            eprintln!("xtask install: {e}");
            return ExitCode::from(2);
        }
    };
    let all = || {
        let mut cargo = shell::cargo();
        cargo.args(["build", "--release", "-p", "smc-preload", "-p", "smc-cli"]);
        if !cargo.status()?.success() {
            return Err(io::Error::other("the build failed"));
        }
        install_into(&Release::find()?, &prefix)?;
        println!("{}", prefix.join("bin/smc").display());
        Ok(())
    };
    ended("install", all())
}

fn install_into(release: &Release, prefix: &Path) -> io::Result<()> {
    let work = shell::Folder::new("install")?;
    tree::lay(&Layout::archive("all"), release, &built()?, work.path())?;
    fs::create_dir_all(prefix)?;
    // The rights of folders that are there stay; a file in use is replaced, not written into.
    let mut copy = Command::new("cp");
    copy.args(["--recursive", "--remove-destination", "--no-target-directory"]);
    output(copy.arg(work.path().join("all")).arg(prefix))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_values() {
        assert_eq!(value(&["--into", "a"], "--into", &[]), Ok(Some("a")));
        assert_eq!(value(&["--rdma", "--into=b"], "--into", &["--rdma"]), Ok(Some("b")));
        assert_eq!(value(&[], "--into", &[]), Ok(None));
        assert!(value(&["--into"], "--into", &[]).is_err());
        assert!(value(&["--fly"], "--into", &[]).is_err());
    }

    #[test]
    fn a_commit_without_a_tag_is_older_than_the_release() {
        let release = Release::find().expect("a checkout");
        let plain = release.version.split('~').next();
        assert_eq!(plain.map(|v| v.split('.').count()), Some(3), "{}", release.version);
    }
}
