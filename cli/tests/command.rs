//! The `smc` command as its users start it (`smc perf`: `perf.rs`). No library is needed for what is refused before.

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

#[test]
fn shells_and_man_get_what_the_options_say() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&output(&["completions", shell]).stdout);
        assert!(script.contains("upgrade-after") && script.contains("perf"), "{shell}");
    }
    let o = smc(&["completions", "bash"])
        .stdout(Stdio::piped())
        .spawn()
        .and_then(|c| Command::new("bash").arg("-n").stdin(c.stdout.expect("piped")).output());
    assert!(o.as_ref().is_ok_and(|o| o.status.success()), "bash reads it: {o:?}");
    assert!(!output(&["completions", "cmd.exe"]).status.success());

    let folder = std::env::temp_dir().join(format!("smc-man.{}", std::process::id()));
    let o = output(&["man", "--into", folder.to_str().expect("a plain path")]);
    assert!(o.status.success(), "{}", text(&o.stderr));
    let names: Vec<_> = fs::read_dir(&folder)
        .expect("pages")
        .flatten()
        .map(|e| e.file_name().into_string().expect("a name"))
        .collect();
    fs::remove_dir_all(&folder).expect("it was made above");
    for page in ["smc.1", "smc-run.1", "smc-perf.1", "smc-perf-client.1", "smc-top.1"] {
        assert!(names.iter().any(|n| n == page), "{page} in {names:?}");
    }
    assert!(text(&output(&["man", "perf", "client"]).stdout).contains("sendfile"));
}

#[test]
fn top_writes_frames_when_nobody_watches() {
    let o = output(&["top", "-n", "2", "-d", "0.1", "--all"]);
    assert!(o.status.success(), "{}", text(&o.stderr));
    let said = text(&o.stdout);
    assert_eq!(said.matches("POLL/s").count(), 2, "{said}");
    assert!(!said.contains('\x1b'), "no colours off a terminal: {said:?}");
    assert_eq!(text(&output(&["top", "--once", "-d", "0.1"]).stdout).matches("connection ends").count(), 1);
    assert!(!output(&["top", "-d", "0"]).status.success());
}

#[test]
fn a_watch_goes_on_until_its_reader_leaves() {
    let mut child = smc(&["ss", "-a", "--watch=0.1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("smc starts");
    let mut out = child.stdout.take().expect("piped");
    let mut said = String::new();
    while said.matches("MODE").count() < 3 {
        let mut piece = [0; 64];
        let n = out.read(&mut piece).expect("text");
        assert_ne!(n, 0, "it ended: {said}");
        said.push_str(&text(&piece[..n]));
    }
    assert!(!said.contains('\x1b'), "{said:?}");
    drop(out);
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn sums_come_as_openmetrics() {
    let said = text(&output(&["stats", "--prometheus"]).stdout);
    assert!(said.contains("# TYPE smc_transferred_bytes counter\n") && said.ends_with("# EOF\n"), "{said}");
    assert!(!output(&["stats", "--prometheus", "--json"]).status.success());
}
