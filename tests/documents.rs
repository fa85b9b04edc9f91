//! Runs what the documents say. Each block of commands in README.md, SECURITY.md and `docs/` is run as it stands, line by
//! line, or says in a comment above it why it is not; a block that says neither is a failure.
//!
//! ```text
//! <!-- run                          as it stands
//! in: vm                            in a virtual machine, that of `cargo xtask vm`: it changes the machine
//! limit: 1200                       seconds that it may take, if more than most
//! needs: redis-server               programs; where one is not here the block is left out
//! as: postgres                      the user that runs it
//! first: COMMAND                    before it, as root; for Rust, statements that stand before it
//! ready: COMMAND                    succeeds when a server of the block's may be talked to
//! then: COMMAND                     must succeed after it, with the block's servers running
//! -->
//! <!-- not run: WHY -->
//! ```
//!
//! Outside a virtual machine a block has a network, process numbers and a folder of its own, in which `target/release` and the commands `smc` and
//! `cargo` are as in the checkout, which is $CHECKOUT. After a line that ends in `&` the next one waits until somebody listens who did not
//! before. JSON must parse, Rust compile; `text` is no command.

use std::{
    env, fs,
    io::{self, Write as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use libtest_mimic::{Arguments, Failed, Trial};

#[path = "harness/mod.rs"]
mod harness;

/// Kills what hangs, after so many seconds.
const LIMIT: u32 = 300;

/// What a block is run by: `$1` is its folder, with the build in `bin`, `$2` the checkout, `$3` the user, `$4` cargo.
const SCRIPT: &str = r#"
set -eu
cd "$1"
export CHECKOUT="$2"
for folder in /run /var/log /var/lib/nginx /var/lib/postgresql /etc/nginx; do
  [ ! -d "$folder" ] || mount -t tmpfs -o mode=755 tmpfs "$folder"
done
mkdir -p target/release
cp bin/smc bin/libsmc.so target/release/
printf '#!/bin/sh\ncd "%s" && exec "%s" "$@"\n' "$2" "$4" >bin/cargo
chmod -R a+rX bin target
chmod 755 bin/cargo
[ ! -f first ] || . ./first
chown "$3" .
if [ "$3" = root ]; then bash ./block; else runuser -u "$3" -- bash ./block; fi
"#;

/// Before the lines of a block.
const PREPARE: &str = r#"
set -e -o pipefail
ready() { true; }
listening() { cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == "0A"' | wc -l; }
settle() { # the pid, and how many listened before
  until [ "$(listening)" -gt "$2" ] && ready; do
    [ -e "/proc/$1" ] || { echo "it has ended: $3"; return 1; }
    sleep 0.05
  done
}
"#;

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// `target/release`, absolute.
fn release() -> PathBuf {
    let me = env::current_exe().expect("a path");
    me.ancestors().nth(2).expect("target/release/deps/test").to_path_buf()
}

fn documents() -> Vec<String> {
    let mut names = vec!["README.md".to_string(), "SECURITY.md".to_string()];
    let docs = fs::read_dir(root().join("docs")).expect("docs").flatten();
    names.extend(docs.map(|e| format!("docs/{}", e.file_name().display())).filter(|n| n.ends_with(".md")));
    names.sort();
    names
}

fn text_of(document: &str) -> String {
    fs::read_to_string(root().join(document)).expect("a document")
}

/// What stands above a block.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mark {
    None,
    Run(Vec<(String, String)>),
    NotRun(String),
}

/// A block between fences.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    line: usize,
    language: String,
    mark: Mark,
    code: String,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut mark = Mark::None;
    let mut lines = text.lines().enumerate();
    while let Some((n, line)) = lines.next() {
        if line.starts_with("<!-- run") || line.starts_with("<!-- not run") {
            let mut comment = line.trim_start_matches("<!--").to_string();
            while !comment.contains("-->") {
                let Some((_, more)) = lines.next() else { break };
                comment = format!("{comment}\n{more}");
            }
            mark = marked(comment.split("-->").next().unwrap_or_default());
        } else if let Some(language) = line.trim_start().strip_prefix("```") {
            let mut code = String::new();
            for (_, line) in lines.by_ref().take_while(|(_, l)| !l.trim_start().starts_with("```")) {
                code += line;
                code.push('\n');
            }
            let mark = std::mem::replace(&mut mark, Mark::None);
            found.push(Block { line: n + 1, language: language.to_string(), mark, code });
        } else if !line.trim().is_empty() {
            mark = Mark::None;
        }
    }
    found
}

fn marked(comment: &str) -> Mark {
    let comment = comment.trim();
    if let Some(why) = comment.strip_prefix("not run:") {
        return Mark::NotRun(why.trim().to_string());
    }
    let pairs = comment.lines().skip(1).filter(|l| !l.trim().is_empty());
    let pair =
        |l: &str| l.split_once(": ").map_or((l.into(), String::new()), |(k, v)| (k.into(), v.trim().into()));
    Mark::Run(pairs.map(pair).collect())
}

/// Why a block may not be as it is.
fn amiss(block: &Block) -> Option<String> {
    const KEYS: [&str; 7] = ["in", "limit", "needs", "as", "first", "ready", "then"];
    match (&*block.language, &block.mark) {
        (_, Mark::NotRun(why)) if why.is_empty() => Some("not run, and not said why".into()),
        (_, Mark::Run(pairs)) => {
            let unknown = pairs.iter().find(|(k, _)| !KEYS.contains(&&**k));
            unknown.map(|(k, _)| format!("a mark {k:?}, which means nothing here"))
        }
        ("text" | "json", Mark::None) | (_, Mark::NotRun(_)) => None,
        ("", Mark::None) => Some("no language".into()),
        _ => Some("neither run nor marked with why it is not".into()),
    }
}

/// The lines of a block, with what waits for its servers.
fn script(block: &Block, pairs: &[(String, String)]) -> String {
    let mut text = PREPARE.to_string();
    let all = |key: &'static str| pairs.iter().filter(move |(k, _)| k == key).map(|(_, v)| v);
    for ready in all("ready") {
        text += &format!("ready() {{ {ready}; }}\n");
    }
    for line in block.code.lines() {
        let command = line.split(" #").next().unwrap_or_default().trim();
        if command.ends_with('&') {
            let quoted = command.replace('\'', r"'\''");
            text += &format!("before=$(listening)\n{line}\nsettle $! $before '{quoted}'\n");
        } else {
            text += &format!("{line}\n");
        }
    }
    for then in all("then") {
        text += &format!("{then}\n");
    }
    text
}

fn which(program: &str) -> Option<PathBuf> {
    search_path().split(':').map(|d| Path::new(d).join(program)).find(|p| p.is_file())
}

/// With the folders of servers, which are not in every user's; Debian keeps PostgreSQL's in one for each version.
fn search_path() -> String {
    let mut all = format!("{}:/usr/local/sbin:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default());
    for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        all += &format!(":{}/bin", entry.path().display());
    }
    all
}

fn runs(block: &Block, pairs: &[(String, String)]) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let at = folder.path();
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))?;
    fs::write(at.join("block"), script(block, pairs))?;
    fs::create_dir(at.join("bin"))?;
    for file in ["smc", "libsmc.so"] {
        fs::copy(release().join(file), at.join("bin").join(file))?;
    }
    let first: Vec<_> = pairs.iter().filter(|(k, _)| k == "first").map(|(_, v)| format!("{v}\n")).collect();
    fs::write(at.join("first"), first.concat())?;
    let user = pairs.iter().find(|(k, _)| k == "as").map_or("root", |(_, v)| v);
    let home = PathBuf::from(env::var_os("HOME").ok_or("HOME is not set")?);
    let of_home = |name: &str, folder: &str| env::var_os(name).unwrap_or_else(|| home.join(folder).into());
    let cargo =
        env::var_os("CARGO").map(PathBuf::from).or_else(|| which("cargo")).ok_or("cargo is not in PATH")?;

    let value = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    let limit = value("limit").map_or(Ok(LIMIT), str::parse)?.to_string();
    let path = format!("{}/bin:{}", at.display(), search_path());
    let mut command = Command::new("timeout");
    if value("in") == Some("vm") {
        // It ends in time by itself. Of this one's environment it has nothing.
        command.arg("--kill-after=5").arg("3600").arg(&cargo).current_dir(root());
        command.args(["xtask", "vm", "--timeout", &limit, "env", &format!("PATH={path}"), "LC_ALL=C.UTF-8"]);
        command.arg(format!("HOME={}", at.display()));
    } else {
        command.arg("--kill-after=5").arg(limit).arg(env::current_exe()?).arg("--alone");
        command.env_clear().env("PATH", path).env("HOME", at).env("LC_ALL", "C.UTF-8").env("TERM", "dumb");
        command.env("CARGO_HOME", of_home("CARGO_HOME", ".cargo"));
        command.env("RUSTUP_HOME", of_home("RUSTUP_HOME", ".rustup"));
    }
    command.args(["bash", "-c", SCRIPT, "documents"]).arg(at).arg(root()).arg(user).arg(&cargo);
    // As the build that is here was made: a block that builds must not put another in its place while others run.
    command.env("SMC_CARRY_LIBRARY", "0");
    for name in ["CARGO_TARGET_DIR", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"] {
        if let Some(value) = env::var_os(name) {
            command.env(name, value);
        }
    }
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    let said = [out.stdout, out.stderr].map(|o| String::from_utf8_lossy(&o).into_owned()).concat();
    let lines: Vec<_> = said.lines().collect();
    let last = lines[lines.len().saturating_sub(40)..].join("\n");
    Err(format!("{}: in\n{}\n{last}", out.status, block.code).into())
}

/// Rust is compiled, not run.
fn compiles(block: &Block, pairs: &[(String, String)]) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("block.rs");
    let first: Vec<_> = pairs.iter().filter(|(k, _)| k == "first").map(|(_, v)| format!("{v}\n")).collect();
    let text = format!(
        "#![allow(unused_variables)]\nuse std::io::Write as _;\n\
         fn main() -> Result<(), Box<dyn std::error::Error>> {{\n{}{}Ok(())\n}}\n",
        first.concat(),
        block.code
    );
    fs::File::create(&file)?.write_all(text.as_bytes())?;
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "--emit=metadata", "-o"]).arg(folder.path().join("block.rmeta"));
    rustc.arg("--extern").arg(format!("smc={}", release().join("libsmc.rlib").display()));
    rustc.arg("-L").arg(format!("dependency={}", release().join("deps").display()));
    let out = rustc.arg(&file).output()?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned().into()) }
}

/// Every block is run, checked or accounted for.
fn every_block_is_run_or_says_why_not() -> Result<(), Failed> {
    let mut bad = Vec::new();
    let mut count = 0;
    for document in documents() {
        for block in blocks(&text_of(&document)) {
            count += 1;
            if let Some(why) = amiss(&block) {
                bad.push(format!("{document}:{}: {why}", block.line));
            }
        }
    }
    let own = blocks(
        "<!-- run\nneeds: x\n-->\n```sh\nx &\n```\n\n```sh\ny\n```\n<!-- not run: z -->\n```sh\n```\n",
    );
    let marks: Vec<_> = own.iter().map(|b| amiss(b).is_some()).collect();
    assert_eq!(marks, [false, true, false], "what this very test sees");
    assert!(count > 10, "only {count} blocks were found");
    if bad.is_empty() { Ok(()) } else { Err(bad.join("\n").into()) }
}

/// `smc` and its options, wherever a sentence names them.
fn options_in_sentences_exist() -> Result<(), Failed> {
    let mut bad = Vec::new();
    let mut count = 0;
    for document in documents() {
        let text = text_of(&document);
        let prose: String = text.split("```").step_by(2).collect();
        for command in prose.split('`').skip(1).step_by(2).filter_map(|c| c.strip_prefix("smc ")) {
            let ours = command.split(" -- ").next().unwrap_or_default();
            let words: Vec<_> = ours.split_whitespace().collect();
            let named: Vec<_> =
                words.iter().take_while(|w| w.chars().all(|c| c.is_ascii_lowercase())).collect();
            let depth = if named.first() == Some(&&"perf") { 2 } else { 1 };
            let mut smc = Command::new(release().join("smc"));
            let out = smc.args(named.into_iter().take(depth)).arg("--help").output()?;
            let help = String::from_utf8_lossy(&out.stdout).into_owned();
            count += 1;
            let unknown =
                words.iter().filter(|w| w.starts_with("--")).map(|w| w.split('=').next().unwrap_or(w));
            let unknown: Vec<_> = unknown.filter(|w| !help.contains(*w)).collect();
            if !out.status.success() || !unknown.is_empty() {
                bad.push(format!("{document}: `smc {command}`: {unknown:?}"));
            }
        }
    }
    assert!(count > 20, "only {count} commands were found");
    if bad.is_empty() { Ok(()) } else { Err(bad.join("\n").into()) }
}

/// A network, processes and mounts of its own; then the command.
fn alone(command: &[String]) -> io::Result<()> {
    // SAFETY: no pointers; this process has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    harness::loopback_up()?;
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]);
    Err(unshare.args(command).exec())
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    if let Some(("--alone", command)) = args.split_first().map(|(first, rest)| (&**first, rest)) {
        let failed = alone(command);
        eprintln!("a network of its own: {failed:?}");
        return ExitCode::FAILURE;
    }
    // SAFETY: no arguments, no failure.
    let is_root = unsafe { libc::geteuid() } == 0;
    let mut trials = vec![
        Trial::test("every_block_is_run_or_says_why_not", every_block_is_run_or_says_why_not),
        Trial::test("options_in_sentences_exist", options_in_sentences_exist),
    ];
    for document in documents() {
        for block in blocks(&text_of(&document)) {
            let name = format!("{document}:{}", block.line);
            match (block.mark.clone(), &*block.language) {
                (Mark::None, "json") => trials.push(Trial::test(name, move || {
                    serde_json::from_str::<serde_json::Value>(&block.code).map(drop).map_err(Failed::from)
                })),
                (Mark::Run(pairs), "rust") => {
                    trials.push(Trial::test(name, move || compiles(&block, &pairs)))
                }
                (Mark::Run(pairs), _) => {
                    let needed =
                        pairs.iter().filter(|(k, _)| k == "needs").flat_map(|(_, v)| v.split_whitespace());
                    let missing: Vec<_> = needed.filter(|p| which(p).is_none()).collect();
                    let foreign = pairs.iter().any(|(k, _)| k == "in")
                        && (!cfg!(target_arch = "x86_64")
                            || ["qemu-system-x86_64", "apt-get"].iter().all(|p| which(p).is_none()));
                    let why = match is_root {
                        false => "root".into(),
                        true if foreign => "a virtual machine".into(),
                        true => missing.join(", "),
                    };
                    let left_out = !why.is_empty();
                    if left_out {
                        eprintln!("{name}: left out, for want of {why}");
                    }
                    trials.push(Trial::test(name, move || runs(&block, &pairs)).with_ignored_flag(left_out));
                }
                _ => {}
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
