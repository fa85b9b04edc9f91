//! The `smc` command as its users start it. No library is needed for what is refused before.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn smc(arguments: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_smc"));
    c.args(arguments).env_remove("LD_PRELOAD").env_remove("SMC_LIBRARY").stdin(Stdio::null());
    c
}

fn output(arguments: &[&str]) -> Output {
    // Something the loader accepts; these tests do not look at connections.
    smc(arguments).env("SMC_LIBRARY", some_library()).output().expect("smc starts")
}

/// Any library does where only the environment matters.
fn some_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").expect("our own maps");
    let libc = maps.split_whitespace().find(|w| w.contains("/libc.so")).expect("a C library");
    PathBuf::from(libc).canonicalize().expect("its path")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_program_gets_the_environment_and_keeps_its_exit_status() {
    let script = "echo \"$LD_PRELOAD $SMC_UPGRADE_AFTER $SMC_ONLY\"; exit 7";
    let o = output(&["run", "--upgrade-after", "0", "--only=80", "--", "sh", "-c", script]);
    assert_eq!(text(&o.stdout), format!("{} 0 80\n", some_library().display()));
    assert_eq!(o.status.code(), Some(7));
}

#[test]
fn the_program_is_found_without_dashes_and_its_options_are_its_own() {
    let o = output(&["run", "sh", "-c", "echo $0 $1", "--stats", "-x"]);
    assert_eq!(text(&o.stdout), "--stats -x\n", "{}", text(&o.stderr));
}

#[test]
fn what_can_not_be_run_is_refused_with_a_reason() {
    let o = output(&["run", "--", "no-such-program-here"]);
    assert_eq!(o.status.code(), Some(127));
    assert!(text(&o.stderr).contains("not found"));

    let o = output(&["run", "--rmb-size", "1000", "--", "true"]);
    assert_eq!(o.status.code(), Some(125));
    assert!(text(&o.stderr).contains("SMC_RMB_SIZE=1000"), "{}", text(&o.stderr));

    let o = smc(&["run", "--library", "/no/such/libsmc.so", "true"]).output().expect("smc starts");
    assert_eq!(o.status.code(), Some(125));

    let path = std::env::temp_dir().join(format!("smc-static.{}", std::process::id()));
    let mut elf = vec![0u8; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let me = fs::read(env!("CARGO_BIN_EXE_smc")).expect("the command");
    elf[18..20].copy_from_slice(&me[18..20]);
    fs::write(&path, elf).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our file");
    let o = output(&["run", path.to_str().expect("a plain path")]);
    fs::remove_file(&path).expect("it was made above");
    assert_eq!(o.status.code(), Some(125));
    assert!(text(&o.stderr).contains("statically linked"), "{}", text(&o.stderr));
}

#[test]
fn lists_are_json_also_when_empty() {
    for arguments in [["ss", "-a", "--json"].as_slice(), &["stats", "--json"]] {
        let o = output(arguments);
        assert!(o.status.success());
        let json: serde_json::Value = serde_json::from_slice(&o.stdout).expect("JSON");
        assert!(json.is_array());
    }
    assert!(text(&output(&["ss"]).stdout).starts_with("MODE"));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child =
        smc(&["ss", "-a", "-w"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("smc starts");
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(child.wait().expect("it ends").code().is_some_and(|c| c < 100), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
