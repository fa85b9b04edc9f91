//! What the built library needs to load: nothing beyond what every program has; and what it exports for probes. Verbs are a library of their own
//! (`rdma/`), which is loaded by name. `readelf` comes with the C linker. Run after `cargo build --release`.

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
