//! What the library needs: to load, nothing beyond what every program has; to be built, crates that are few, known and
//! licensed. And what it exports for probes. Verbs are a library of their own (`rdma/`), which is loaded by name.
//! `readelf` comes with the C linker. Run after `cargo build --release`.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

/// What readelf says of a file that was built.
fn readelf(option: &str, file: &str) -> String {
    let me = std::env::current_exe().expect("a path");
    // The test executable lies in `deps` below `target/release`.
    let path: PathBuf = me.ancestors().nth(2).expect("target/release/deps/test").join(file);
    let out = Command::new("readelf").args([option, "-W"]).arg(&path).env("LC_ALL", "C").output();
    let out = out.expect("readelf comes with the C linker");
    assert!(out.status.success(), "{}: `cargo build --release` comes first", path.display());
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The names in DT_NEEDED.
fn needed(file: &str) -> Vec<String> {
    let text = readelf("-d", file);
    let lines = text.lines().filter(|l| l.contains("(NEEDED)"));
    lines.filter_map(|l| Some(l.split_once('[')?.1.split_once(']')?.0.to_string())).collect()
}

#[test]
fn libsmc_needs_libc_and_no_more() {
    let names = needed("libsmc.so");
    assert!(names.iter().any(|n| n.starts_with("libc.")), "{names:?}");
    let common = ["libc.", "libgcc_s.", "libm.", "libdl.", "libpthread.", "ld-linux"];
    let more: Vec<_> = names.iter().filter(|n| !common.iter().any(|c| n.starts_with(c))).collect();
    assert!(more.is_empty(), "libsmc.so needs {more:?}");
}

#[test]
fn the_probes_of_the_documents_are_exported_each_by_itself() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/TROUBLESHOOTING.md")).expect("a document");
    let told: BTreeSet<&str> =
        text.split('`').skip(1).step_by(2).filter(|n| n.starts_with("smc_probe_")).collect();
    // `  12: 000000000006da50     9 FUNC    GLOBAL DEFAULT   12 smc_probe_fallback`
    let symbols = readelf("--dyn-syms", "libsmc.so");
    let words = symbols.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    let probes: Vec<_> =
        words.filter(|w| w.len() == 8 && w[3] == "FUNC" && w[7].starts_with("smc_probe_")).collect();
    let names: BTreeSet<&str> = probes.iter().map(|w| w[7]).collect();
    assert_eq!(names, told, "what is exported, and what docs/TROUBLESHOOTING.md tells of");
    let places: BTreeSet<&str> = probes.iter().map(|w| w[1]).collect();
    assert_eq!(places.len(), told.len(), "two of them are one: {probes:?}");
    assert!(told.len() >= 3, "{told:?}");
}

/// What cargo knows of the workspace's crates, for machines of this kind.
fn metadata() -> Value {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform"]);
    cargo.arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH));
    let out = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let out = out.expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Whether a licence, or one of those that may be chosen, lets anybody use and pass on what is built of it.
fn is_free(licence: &str) -> bool {
    const FREE: [&str; 9] = [
        "MIT",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Unicode-3.0",
        "Unlicense",
        "Zlib",
    ];
    let choice = licence.replace('/', " OR ").replace(['(', ')'], "");
    // `(A OR B) AND C`: AND binds no closer than the brackets say, so each of its parts is to be free.
    choice.split(" AND ").all(|part| part.split(" OR ").any(|l| FREE.contains(&l.trim())))
}

#[test]
fn every_crate_has_a_free_licence_and_comes_from_one_place() {
    const ONE: &str = "registry+https://github.com/rust-lang/crates.io-index";
    for (licence, free) in [
        ("MIT/Apache-2.0", true),
        ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("", false),
    ] {
        assert_eq!(is_free(licence), free, "{licence}");
    }
    let all = metadata();
    let packages = list(&all, "packages");
    assert!(packages.len() > 20, "{}", packages.len());
    let amiss: Vec<_> = packages
        .iter()
        .filter(|p| !is_free(text(p, "license")) || !p["source"].is_null() && text(p, "source") != ONE)
        .map(|p| format!("{}: {} from {}", text(p, "name"), p["license"], p["source"]))
        .collect();
    assert!(amiss.is_empty(), "{amiss:#?}");
}

/// Crates whose code the shim asks for: macros leave none.
fn linked() -> BTreeSet<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "tree",
        "--locked",
        "--offline",
        "--prefix=none",
        "--edges=normal,no-proc-macro",
        "--format={p}",
    ]);
    let out = cargo.args(["--package", "smc-preload"]).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let out = out.expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let lines = String::from_utf8_lossy(&out.stdout).into_owned();
    lines.lines().filter_map(|l| Some(l.split_whitespace().next()?.to_string())).collect()
}

/// It is loaded into other people's processes: each crate more is a decision.
#[test]
fn the_shim_is_made_of_the_crates_that_security_md_lists() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(root.join("SECURITY.md")).expect("a document");
    let part = document.split("\n## What it is made of\n").nth(1).expect("the part");
    let rows = part.lines().take_while(|l| !l.starts_with("## ")).filter(|l| l.starts_with("| `"));
    let told: BTreeSet<String> = rows
        .flat_map(|l| l.split('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2))
        .map(str::to_string)
        .collect();
    let mut linked = linked();
    assert!(linked.remove("smc") && linked.remove("smc-preload"));
    assert_eq!(linked, told);
}
