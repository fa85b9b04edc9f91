//! What the built library needs to load: nothing beyond what every program has. Verbs are a library of their own
//! (`rdma/`), which is loaded by name. `readelf` comes with the C linker. Run after `cargo build --release`.

use std::path::PathBuf;
use std::process::Command;

/// The names in DT_NEEDED.
fn needed(file: &str) -> Vec<String> {
    let me = std::env::current_exe().expect("a path");
    // The test executable lies in `deps` below `target/release`.
    let path: PathBuf = me.ancestors().nth(2).expect("target/release/deps/test").join(file);
    let out = Command::new("readelf").args(["-d", "-W"]).arg(&path).env("LC_ALL", "C").output();
    let out = out.expect("readelf comes with the C linker");
    assert!(out.status.success(), "{}: `cargo build --release` comes first", path.display());
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
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
