//! sockmap, attached to a cgroup for as long as it is measured: see `sockmap.bpf.c`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::rounds::Result;
use crate::shell::{self, Folder};

/// Attached until dropped.
#[derive(Debug)]
pub struct Sockmap {
    cgroup: PathBuf,
    /// A BPF file system.
    pins: Folder,
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.env("PATH", shell::path_with_sbin()).env("LC_ALL", "C").output()?;
    if out.status.success() {
        return Ok(());
    }
    let program = command.get_program().display();
    Err(format!("{program}: {}", String::from_utf8_lossy(&out.stderr).trim()).into())
}

/// The root of the cgroup2 file system.
fn cgroup2(mounts: &str) -> Option<&str> {
    let mut all = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    all.find(|l| l.get(2) == Some(&"cgroup2")).map(|l| l[1])
}

impl Sockmap {
    pub fn new() -> Result<Self> {
        if !shell::is_root() {
            return Err("it needs root".into());
        }
        let mounts = fs::read_to_string("/proc/mounts")?;
        let root = cgroup2(&mounts).ok_or("no cgroup2 file system is mounted")?;
        let cgroup = Path::new(root).join(format!("smc-bench.{}", std::process::id()));
        let pins = Folder::new("sockmap")?;
        let at = pins.path();
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(at))?;
        // From here on dropping it undoes what was done.
        let this = Self { cgroup, pins };
        fs::create_dir(&this.cgroup)?;
        let at = this.pins.path();
        let object = shell::root().join("xtask/src/bench/sockmap.bpf.o");
        let bpftool = || Command::new("bpftool");
        let (programs, maps) = (at.join("programs"), at.join("maps"));
        run(bpftool().args(["prog", "loadall"]).arg(object).arg(&programs).arg("pinmaps").arg(&maps))?;
        let mut attach = bpftool();
        attach.args(["prog", "attach", "pinned"]).arg(programs.join("sockmap_msg"));
        run(attach.args(["sk_msg_verdict", "pinned"]).arg(maps.join("sockets")))?;
        let mut attach = bpftool();
        attach.args(["cgroup", "attach"]).arg(&this.cgroup).args(["sock_ops", "pinned"]);
        run(attach.arg(programs.join("sockmap_ops")))?;
        Ok(this)
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

impl Drop for Sockmap {
    fn drop(&mut self) {
        // What was attached to the cgroup goes with it, what is pinned with the file system; those that were not made say so.
        let _ = fs::remove_dir(&self.cgroup);
        let _ = run(Command::new("umount").arg(self.pins.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_the_old_ones() {
        let mounts =
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2("tmpfs /tmp tmpfs rw 0 0\n"), None);
    }
}
