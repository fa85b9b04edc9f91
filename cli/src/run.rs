//! `smc run`: the environment for libsmc, then exec. The program keeps its pid, terminal and standard files.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf, absolute};
use std::process::{Command, ExitCode};

use crate::output::complain;
use crate::{elf, library};

/// As env(1) and nohup(1) have them: smc failed, found but not started, not found.
const REFUSED: u8 = 125;
const CANNOT_START: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Each setting is also an environment variable, named beside it; options win.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: the program's; 125 if it can't be run under libsmc, 126 or 127 if not at all."
)]
pub struct Options {
    /// Upgrade a connection after this: 0 at once, N bytes (k, m, g), or `Nops` [SMC_UPGRADE_AFTER]
    #[arg(long, value_name = "N")]
    upgrade_after: Option<String>,
    /// Poll at most this long before sleeping, in microseconds; 0 never polls [SMC_SPIN_US]
    #[arg(long, value_name = "US")]
    spin_us: Option<String>,
    /// Size of a connection's receive buffer: a power of two, 16k to 4m [SMC_RMB_SIZE]
    #[arg(long, value_name = "SIZE")]
    rmb_size: Option<String>,
    /// Most shared memory a process may map [SMC_MEM_LIMIT]
    #[arg(long, value_name = "SIZE")]
    mem_limit: Option<String>,
    /// Other hosts known to speak SMC, beside those that say so by a TCP option (smc bpf) [SMC_PEERS]
    #[arg(long, value_name = "LIST")]
    peers: Option<String>,
    /// What hosts must have in common to speak SMC with each other [SMC_EID]
    #[arg(long, value_name = "LIST")]
    eid: Option<String>,
    /// Only these: ports, addresses, networks, program names [SMC_ONLY]
    #[arg(long, value_name = "LIST")]
    only: Option<String>,
    /// All but these [SMC_EXCLUDE]
    #[arg(long, value_name = "LIST")]
    exclude: Option<String>,
    /// Say on standard error when a connection that could be upgraded stays on TCP [SMC_REQUIRE]
    #[arg(long)]
    require: bool,
    /// Say on standard error what happens to connections [SMC_LOG]
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "info", require_equals = true)]
    log: Option<String>,
    /// At exit write the counters, as JSON, to this file; %p is the pid [SMC_STATS]
    #[arg(long, value_name = "PATH")]
    stats: Option<PathBuf>,
    /// Load the library and leave everything on TCP [SMC_DISABLE]
    #[arg(long)]
    disable: bool,
    /// The library, if it is not beside this command [SMC_LIBRARY]
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Options {
    /// The variables that the options set.
    fn environment(&self) -> Vec<(&'static str, OsString)> {
        let on = |b: bool| b.then(|| OsString::from("1"));
        let text = |s: &Option<String>| s.clone().map(OsString::from);
        // The program may change its folder before it ends.
        let stats = self.stats.as_ref().map(|p| absolute(p).unwrap_or_else(|_| p.clone()).into_os_string());
        let all = [
            ("SMC_UPGRADE_AFTER", text(&self.upgrade_after)),
            ("SMC_SPIN_US", text(&self.spin_us)),
            ("SMC_RMB_SIZE", text(&self.rmb_size)),
            ("SMC_MEM_LIMIT", text(&self.mem_limit)),
            ("SMC_PEERS", text(&self.peers)),
            ("SMC_EID", text(&self.eid)),
            ("SMC_ONLY", text(&self.only)),
            ("SMC_EXCLUDE", text(&self.exclude)),
            ("SMC_REQUIRE", on(self.require)),
            ("SMC_LOG", text(&self.log)),
            ("SMC_STATS", stats),
            ("SMC_DISABLE", on(self.disable)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// What libsmc.so itself would complain about.
fn misunderstood(environment: &[(&str, OsString)]) -> Vec<String> {
    let mut lines = Vec::new();
    let given =
        |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_bytes().to_vec());
    smc::config::parse(&given, &mut |line| lines.push(line.to_owned()));
    lines
}

/// The program as execvp(3) finds it.
fn find(program: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(program.into());
    }
    let runs = |p: &PathBuf| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    let path = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    env::split_paths(&path).map(|folder| folder.join(program)).find(runs)
}

/// LD_PRELOAD with the library: after what is there, whose functions are then in front of ours.
pub fn preload(library: &Path, before: Option<OsString>) -> Result<OsString, String> {
    let bytes = library.as_os_str().as_bytes();
    if bytes.iter().any(|b| b": \t\n$".contains(b)) {
        return Err(format!("{}: LD_PRELOAD can't name a path with blanks, ':' or '$'", library.display()));
    }
    let Some(before) = before.filter(|b| !b.is_empty()) else { return Ok(library.into()) };
    if before.as_bytes().split(|b| b": \t\n".contains(b)).any(|one| one == bytes) {
        return Ok(before);
    }
    let mut all = before;
    all.push(":");
    all.push(library);
    Ok(all)
}

/// Runs the program; returns only if that is not possible.
pub fn run(options: &Options) -> ExitCode {
    let fail = |code: u8, why: String| {
        complain(&why);
        ExitCode::from(code)
    };
    let environment = options.environment();
    if let Some(bad) = misunderstood(&environment).first() {
        let bad = bad.trim_start_matches("libsmc: ").replace(", using the default", "");
        return fail(REFUSED, bad);
    }
    let (name, arguments) = options.command.split_first().expect("clap requires a command");
    let Some(program) = find(name) else {
        return fail(NOT_FOUND, format!("{}: command not found", name.to_string_lossy()));
    };
    let prepared = library::find(options.library.as_deref())
        .and_then(|library| preload(&library, env::var_os("LD_PRELOAD")))
        .and_then(|value| match elf::obstacle(&program) {
            Ok(Some(why)) => Err(why),
            // What can't be read may still be run; exec has the last word.
            Ok(None) | Err(_) => Ok(value),
        });
    let ld_preload = match prepared {
        Ok(value) => value,
        Err(why) => return fail(REFUSED, why),
    };
    let error = Command::new(&program)
        .arg0(name)
        .args(arguments)
        .envs(environment)
        .env("LD_PRELOAD", ld_preload)
        .exec();
    let code = if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { CANNOT_START };
    fail(code, format!("{}: {error}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_preload_is_kept_and_ours_is_named_once() {
        let ours = Path::new("/a/libsmc.so");
        let with = |before: &str| preload(ours, Some(before.into())).expect("a good path");
        assert_eq!(preload(ours, None), Ok("/a/libsmc.so".into()));
        assert_eq!(with(""), "/a/libsmc.so");
        assert_eq!(with("/b/x.so"), "/b/x.so:/a/libsmc.so");
        assert_eq!(with("/a/libsmc.so /b/x.so"), "/a/libsmc.so /b/x.so");
        assert!(preload(Path::new("/a b/libsmc.so"), None).is_err());
    }

    #[test]
    fn every_setting_has_an_option() {
        use clap::Parser;
        #[derive(Parser)]
        struct Only {
            #[command(flatten)]
            options: Options,
        }
        let line = "smc --upgrade-after 0 --spin-us 9 --rmb-size 64k --mem-limit 1g --peers 10.0.0.0/8 --only 80 --exclude 81 \
                    --require --log=debug --stats s.%p --disable -- app -x";
        let o = Only::try_parse_from(line.split_whitespace()).map(|o| o.options).expect("options");
        assert_eq!(o.command, ["app", "-x"]);
        let names: Vec<_> = o.environment().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names.len(), 11);
        assert_eq!(misunderstood(&o.environment()), Vec::<String>::new());
        assert_eq!(misunderstood(&[("SMC_SPIN_US", "often".into())]).len(), 1);
    }
}
