//! Whether what `dist` makes can be installed, used and removed. A few steps, none of which leaves anything behind.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Release, built, install_into, make, output};
use crate::shell;
use crate::tally::Tally;

/// What the script in the root needs, beside what these bring along.
const IN_THE_ROOT: &str = "--include=dpkg,tar,bash,dash,debconf,diffutils,coreutils,perl-base,sed,grep,findutils,gzip,libc-bin,libc6,libgcc-s1,base-files,\
                           base-passwd";

/// Without these, parts of it are left out.
pub const PROGRAMS: &[&str] = &["mmdebstrap", "lintian"];

const SCRIPT: &str = include_str!("trial.sh");

/// All of it, with what `cargo build --release` has made.
pub fn trial() -> io::Result<Tally> {
    let work = shell::Folder::new("trial")?;
    let mut tally = Tally::default();
    let release = Release::find()?;
    let parts = built()?;
    let files = make(&release, &parts, &work.path().join("one"))?;
    let again = make(&release, &parts, &work.path().join("two"))?;
    tally.add(step("the same bytes each time", same(&files, &again)));
    let archive = files.iter().find(|f| f.extension().is_some_and(|e| e == "gz"));
    if let Some(archive) = archive {
        tally.add(step("the archive, unpacked", unpacked(archive, &work.path().join("unpacked"))));
    }
    tally.add(step("cargo xtask install", installed(&release, &work.path().join("prefix"))));
    tally.add(step("cargo install, with the library", by_cargo(&work.path().join("cargo"))));
    tally.add(step("cargo package -p smc", crate_package()));
    let Some(package) = files.iter().find(|f| f.extension().is_some_and(|e| e == "deb")) else {
        println!("left out: the Debian package (dpkg-deb is not here)");
        return Ok(tally);
    };
    if shell::which("lintian").is_some() {
        tally.add(step("lintian", lintian(package)));
    } else {
        println!("left out: lintian (it is not here)");
    }
    match wanting() {
        Some(why) => println!("left out: the package in a clean root ({why})"),
        None => match in_a_root(package, &work.path().join("root")) {
            Ok(steps) => tally.add(steps),
            Err(e) => tally.add(step("a clean root", Err(e))),
        },
    }
    Ok(tally)
}

/// Tells of one step.
fn step(what: &str, result: io::Result<()>) -> Tally {
    match &result {
        Ok(()) => println!("ok {what}"),
        Err(e) => println!("FAILED {what}: {e}"),
    }
    Tally::step(result.is_ok())
}

/// Why there can be no clean root; none: there can.
fn wanting() -> Option<&'static str> {
    if !shell::is_root() {
        Some("only root makes one")
    } else if shell::which("mmdebstrap").is_none() {
        Some("mmdebstrap is not here")
    } else {
        None
    }
}

fn same(one: &[PathBuf], two: &[PathBuf]) -> io::Result<()> {
    for (a, b) in one.iter().zip(two) {
        if fs::read(a)? != fs::read(b)? {
            return Err(io::Error::other(format!("{} differs", a.display())));
        }
    }
    if one.len() == two.len() { Ok(()) } else { Err(io::Error::other("not the same files")) }
}

/// `smc check` finds the library by itself, and a connection is upgraded.
fn checks(command: &Path, library: &Path) -> io::Result<()> {
    let said = output(Command::new(command).arg("check").env_remove("SMC_LIBRARY"))?;
    let said = String::from_utf8_lossy(&said);
    let library = library.canonicalize()?.display().to_string();
    if said.contains(&library) {
        Ok(())
    } else {
        Err(io::Error::other(format!("not with {library}:\n{said}")))
    }
}

fn unpacked(archive: &Path, into: &Path) -> io::Result<()> {
    fs::create_dir_all(into)?;
    output(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(into).arg("--strip-components=1"))?;
    checks(&into.join("bin/smc"), &into.join("lib/libsmc.so"))?;
    if shell::which("pkg-config").is_some() {
        let mut config = Command::new("pkg-config");
        config.args(["--variable=preload", "libsmc"]).env("PKG_CONFIG_PATH", into.join("lib/pkgconfig"));
        let named = String::from_utf8_lossy(&output(&mut config)?).trim().to_string();
        if Path::new(&named).canonicalize()? != into.join("lib/libsmc.so").canonicalize()? {
            return Err(io::Error::other(format!("pkg-config names {named}")));
        }
    }
    Ok(())
}

fn installed(release: &Release, prefix: &Path) -> io::Result<()> {
    // Twice: what is there is replaced.
    install_into(release, prefix)?;
    install_into(release, prefix)?;
    checks(&prefix.join("bin/smc"), &prefix.join("lib/libsmc.so"))
}

/// cargo installs commands only: this one carries the library. One that is beside it goes first.
fn by_cargo(root: &Path) -> io::Result<()> {
    let mut cargo = shell::cargo();
    cargo.env_remove("SMC_CARRY_LIBRARY");
    cargo.args(["install", "--quiet", "--locked", "--path", "cli", "--no-track", "--root"]).arg(root);
    output(&mut cargo)?;
    let command = root.join("bin/smc");
    output(Command::new(&command).args(["run", "--", "true"]).env_remove("SMC_LIBRARY"))?;
    let carried =
        fs::read_dir(root.join("lib/smc"))?.next().ok_or_else(|| io::Error::other("no library"))??;
    checks(&command, &carried.path().join("libsmc.so"))?;
    fs::copy(shell::target_dir().join("release/libsmc.so"), root.join("lib/libsmc.so"))?;
    checks(&command, &root.join("lib/libsmc.so"))
}

/// The crate as it would be published has all that it needs; that it builds there too is left to `cargo publish`.
fn crate_package() -> io::Result<()> {
    let mut cargo = shell::cargo();
    cargo.args(["package", "--quiet", "-p", "smc", "--offline", "--allow-dirty", "--no-verify", "--list"]);
    let listed = String::from_utf8_lossy(&output(&mut cargo)?).into_owned();
    let wanted = ["Cargo.toml", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "src/lib.rs"];
    match wanted.iter().find(|w| !listed.lines().any(|l| l == **w)) {
        Some(missing) => Err(io::Error::other(format!("it has no {missing}:\n{listed}"))),
        None => Ok(()),
    }
}

fn lintian(package: &Path) -> io::Result<()> {
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on", "error,warning"]).arg(package);
    let out = lintian.output()?;
    if out.status.success() {
        return Ok(());
    }
    let said = [out.stdout, out.stderr].map(|o| String::from_utf8_lossy(&o).into_owned()).concat();
    Err(io::Error::other(said))
}

/// The script prints a line for each of its steps.
fn in_a_root(package: &Path, root: &Path) -> io::Result<Tally> {
    let suite = fs::read_to_string("/etc/os-release")?;
    let suite =
        suite.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable").to_string();
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--mode=root", "--variant=custom", IN_THE_ROOT]);
    output(mmdebstrap.args(["--dpkgopt=force-unsafe-io", &suite]).arg(root))?;
    let mut script = Command::new("unshare");
    script.args(["--mount", "--propagation", "private", "bash", "-c", SCRIPT, "trial"]);
    let (status, lines) = shell::tee(script.arg(root).arg(package))?;
    let count = |mark: &str| lines.iter().filter(|l| l.starts_with(mark)).count() as u64;
    let mut tally = Tally { passed: count("ok "), failed: count("FAILED "), skipped: 0 };
    if !status.success() || tally.passed == 0 {
        tally.failed += 1;
    }
    Ok(tally)
}
