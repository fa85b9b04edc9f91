//! The Debian packages that the demonstration and the end-to-end tests use; the list is `tests/packages.txt`.
//!
//! As root they are installed; otherwise the caller says what is left out. Services are kept from starting
//! by a `policy-rc.d` that exists only while apt-get runs.

use std::process::{Command, Stdio};

use crate::shell;

/// A package and the programs wanted of it. The presence of the first makes the package unnecessary.
#[derive(Debug)]
pub struct Package {
    name: &'static str,
    programs: Vec<&'static str>,
}

/// All of them.
pub fn all() -> Vec<Package> {
    let lines = include_str!("../../tests/packages.txt").lines();
    let package = |line: &'static str| {
        let mut words = line.split_whitespace();
        words.next().map(|name| Package { name, programs: words.collect() })
    };
    lines.filter(|l| !l.starts_with('#')).filter_map(package).collect()
}

/// Those that have one of these programs.
pub fn of(programs: &[&str]) -> Vec<Package> {
    all().into_iter().filter(|p| p.programs.iter().any(|x| programs.contains(x))).collect()
}

/// Refuses service starts while packages are unpacked, and always takes the refusal away again.
const INSTALL: &str = r#"
rc=/usr/sbin/policy-rc.d
if [ ! -e $rc ]; then
  trap 'rm -f $rc' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' >$rc && chmod 755 $rc
fi
lists=$(find /var/lib/apt/lists -name '*_Packages*' -mmin -1440 2>/dev/null | head -n 1)
[ -n "$lists" ] || apt-get update -qq -o Acquire::Retries=3
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@"
"#;

/// Which of the packages' programs are not here.
pub fn missing(packages: &[Package]) -> Vec<&'static str> {
    let absent = |p: &&Package| p.programs.first().is_none_or(|program| shell::which(program).is_none());
    packages.iter().filter(absent).map(|p| p.name).collect()
}

/// Installs what is missing if `install` and this is root on a Debian; returns what is still missing.
pub fn provide(packages: &[Package], install: bool) -> Vec<&'static str> {
    let wanted = missing(packages);
    if wanted.is_empty() || !install || !shell::is_root() || shell::which("apt-get").is_none() {
        return wanted;
    }
    println!("Installing: {}", wanted.join(" "));
    let output = Command::new("/bin/sh")
        .args(["-c", INSTALL, "install"])
        .args(&wanted)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("PATH", shell::path_with_sbin())
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(o) if o.status.success() => {}
        Ok(o) => {
            let text = String::from_utf8_lossy(&o.stderr).into_owned();
            let last: Vec<&str> = text.lines().rev().take(3).collect();
            println!("apt-get: {}", last.into_iter().rev().collect::<Vec<_>>().join("\n         "));
        }
        Err(e) => println!("apt-get: {e}"),
    }
    missing(packages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::programs::PAIRS;
    use std::collections::HashSet;

    #[test]
    fn each_package_has_programs_and_is_listed_once() {
        let mut names = HashSet::new();
        for p in all() {
            assert!(!p.programs.is_empty(), "{}: no program", p.name);
            assert!(names.insert(p.name), "{} twice", p.name);
        }
        assert!(!names.is_empty());
    }

    #[test]
    fn what_the_demonstration_runs_is_listed() {
        let listed: Vec<_> = all().into_iter().flat_map(|p| p.programs).collect();
        for needed in PAIRS.iter().flat_map(|p| p.needs) {
            assert!(listed.contains(needed), "{needed} is in no package");
        }
    }
}
