//! Programs that have little or nothing to do with sockets, under the preload: what they make is the same to the bit.
//!
//! tar and gzip by a pipe, git with a clone over TCP whose both ends are preloaded, a build by cargo, a Debian package by
//! dpkg-deb: once plain, once preloaded, in a folder of the same name, and then every file is compared.

mod harness;

use harness::{Lib, Run, cmd, ensure, free_port, left_out, program};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::{collections::BTreeMap, fs, path::Path, process::ExitCode, time::Duration};

/// What they all use.
const COMMON: &str = "\
set -eu
export SOURCE_DATE_EPOCH=1700000000 LC_ALL=C TZ=UTC HOME=$PWD/home SMC_UPGRADE_AFTER=0
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
export GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000' GIT_CONFIG_NOSYSTEM=1
mkdir -p home
";

const TAR: &str = "\
tar --sort=name --mtime=@1700000000 --owner=0 --group=0 -C $ROOT -cf - smc/src docs | gzip -n > a.tar.gz
mkdir x; tar -C x -xzf a.tar.gz; tar -C x --sort=name --mtime=@1700000000 -cf b.tar smc docs
";

const GIT: &str = "\
git init -q -b main repo; cp -r $ROOT/smc/src repo/; cd repo; git add -A; git commit -qm one
echo '// more' >> src/lib.rs; git commit -qam two; git gc -q; git fsck --strict; cd ..
git daemon --reuseaddr --listen=127.0.0.1 --port=$PORT --base-path=$PWD --export-all --pid-file=$PWD/pid & daemon=$!
until grep -q \":$(printf %04X $PORT) 00000000:0000 0A\" /proc/net/tcp; do :; done
git clone -q git://127.0.0.1:$PORT/repo clone
kill $daemon; wait $daemon || true
git -C clone log --format=%H > log; git -C clone archive --format=tar HEAD > archive.tar
git -C clone ls-tree -r HEAD > tree; rm -rf repo clone/.git pid
";

const CARGO: &str = "\
mkdir -p c/src; cd c
printf '[package]\\nname=\"c\"\\nversion=\"0.1.0\"\\nedition=\"2024\"\\n[workspace]\\n' > Cargo.toml
printf 'mod a;\\nfn main() { println!(\"{}\", a::f(7)) }\\n' > src/main.rs
printf 'pub fn f(n: u64) -> u64 { (0..n).map(|x| x * x).sum() }\\n' > src/a.rs
cargo build -q --release --offline; cp target/release/c made; ./made > out; rm -rf target
";

const PACKAGE: &str = "\
mkdir -p p/DEBIAN p/usr/share/t; cp -r $ROOT/docs p/usr/share/t/
printf 'Package: t\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\nDescription: t\\n' > p/DEBIAN/control
dpkg-deb --root-owner-group -b p t.deb; dpkg-deb -c t.deb > list; mkdir e; dpkg-deb -x t.deb e
";

/// All files of a folder, by name, and what is in them.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut out, mut todo) = (BTreeMap::new(), vec![dir.to_path_buf()]);
    while let Some(d) = todo.pop() {
        for e in fs::read_dir(d).into_iter().flatten().flatten() {
            let p = e.path();
            if p.is_symlink() {
                continue;
            }
            if p.is_dir() {
                todo.push(p);
            } else {
                let name = p.strip_prefix(dir).unwrap_or(&p).display().to_string();
                out.insert(name, fs::read(&p).unwrap_or_default());
            }
        }
    }
    out
}

/// The script's files, plain or preloaded.
fn made(run: &Run, script: &str, preloaded: bool) -> Result<BTreeMap<String, Vec<u8>>, Failed> {
    let dir = run.path("work");
    fs::create_dir(&dir).map_err(|e| e.to_string())?;
    let root = env!("CARGO_MANIFEST_DIR");
    let text = format!("{COMMON}ROOT='{root}' PORT={}\n{script}", free_port());
    let mut c = cmd("bash", &["-c", &text]);
    // Where cargo and rustup are is not to change with HOME.
    for (name, dir) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        if let (None, Some(home)) = (std::env::var_os(name), std::env::var_os("HOME")) {
            c.env(name, Path::new(&home).join(dir));
        }
    }
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("CARGO_") && n != "CARGO_HOME") {
        c.env_remove(name);
    }
    c.current_dir(&dir);
    run.output_as(if preloaded { "preloaded" } else { "plain" }, c)?.ok()?;
    let all = files(&dir);
    fs::remove_dir_all(&dir).map_err(|e| e.to_string())?;
    Ok(all)
}

fn same(name: &'static str, needs: &[&str], script: &str) -> Result<Completion, Failed> {
    if let Some(wanting) = needs.iter().find(|p| program(p).is_none()) {
        return left_out(name, &format!("no {wanting}"));
    }
    let lib = Lib::find()?;
    let mut run = Run::new(name);
    run.limit(Duration::from_secs(300));
    let plain = made(&run, script, false)?;
    run.preload(&lib);
    let preloaded = made(&run, script, true)?;
    ensure(plain.len() > 1, || "no files were made".into())?;
    let names: Vec<_> = plain.keys().chain(preloaded.keys()).collect();
    let differ: Vec<_> = names.into_iter().filter(|n| plain.get(*n) != preloaded.get(*n)).collect();
    ensure(differ.is_empty(), || format!("of {} files these differ: {differ:?}", plain.len()))?;
    let processes = run.stats("preloaded")?.files;
    ensure(lib.is_none() || processes > 1, || "nothing ran under the preload".into())?;
    Ok(Completion::Completed)
}

fn main() -> ExitCode {
    let trials = vec![
        Trial::ignorable_test("tar", || same("tar", &["tar", "gzip"], TAR)),
        Trial::ignorable_test("git", || same("git", &["git"], GIT)),
        Trial::ignorable_test("cargo", || same("cargo", &["cargo"], CARGO)),
        Trial::ignorable_test("package", || same("package", &["dpkg-deb"], PACKAGE)),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
