//! A VM with RDMA devices: Debian's kernel under QEMU, this machine's files as its own, Soft-RoCE, and AF_SMC.
//!
//! ```text
//!  vm/fetch.sh   kernel, modules, initramfs, kept in target/vm (Debian packages; root, the first time)
//!  vm/guest.sh   process 1: devices, addresses, routes; then the command
//!  vm/smc.py     what the kernel's SMC has to be told
//! ```
//!
//! What the command writes is lost with the VM. It has two ends in one network namespace, `rxe0` with 10.77.0.1 and
//! `rxe1` with 10.77.0.2, whose packets cross a pair of veth devices. `SMC_TEST_RDMA` tells tests of both. Each end has
//! another device for second links, on another such pair: `rxe2` with 10.77.0.3 and `rxe3` with 10.77.0.4.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::shell::{self, Running};

/// What a VM may take, its boot included, unless told otherwise.
const LIMIT: Duration = Duration::from_secs(300);

/// Whether there has been one.
fn is_there() -> bool {
    cache().join("ready").exists() && shell::which("qemu-system-x86_64").is_some()
}

/// Why there can be no VM here; none: there can.
pub fn wanting() -> Option<&'static str> {
    let can_install = shell::is_root() && shell::which("apt-get").is_some();
    if !cfg!(target_arch = "x86_64") {
        Some("not an x86-64 machine")
    } else if !is_there() && !can_install {
        Some("its packages are installed by root, on a Debian")
    } else {
        None
    }
}

fn cache() -> PathBuf {
    shell::target_dir().join("vm")
}

fn scripts() -> PathBuf {
    shell::root().join("xtask/src/vm")
}

/// Installs and fetches what is missing.
pub fn provide() -> io::Result<()> {
    let status = Command::new("bash").arg(scripts().join("fetch.sh")).arg(cache()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("vm/fetch.sh: {status}"))) }
}

/// A folder that goes with this.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it lies in the target folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a command in a VM has left.
pub struct Ran {
    /// None: the VM did not come to its end.
    pub status: Option<i32>,
    /// What the command printed.
    pub output: String,
    /// The end of the kernel's console, if the VM did not come to its end.
    pub console: String,
}

/// Runs a line of shell in a VM, in the checkout. A VM that ends by itself and leaves no status had its kernel die, which no
/// command in there may do: that is the emulator's or the kernel's fault, and it is started once more.
pub fn run(line: &str, limit: Duration) -> io::Result<Ran> {
    let (ran, in_time) = once(line, limit)?;
    if ran.status.is_some() || !in_time {
        return Ok(ran);
    }
    eprintln!("xtask vm: the VM died, and is started once more; its console:\n{}", ran.console);
    Ok(once(line, limit)?.0)
}

/// One VM; and whether it came to an end before it was killed.
fn once(line: &str, limit: Duration) -> io::Result<(Ran, bool)> {
    let cache = cache();
    let folder = Folder(cache.join(format!("run.{}", std::process::id())));
    let dir = &folder.0;
    fs::create_dir_all(dir)?;
    for name in ["guest.sh", "smc.py"] {
        fs::copy(scripts().join(name), dir.join(name))?;
    }
    let quoted = |p: &Path| format!("'{}'", p.display().to_string().replace('\'', r"'\''"));
    let (at, files) = (quoted(&shell::root()), quoted(&cache));
    fs::write(dir.join("command.sh"), format!("cache={files}\nrun() {{\ncd {at} || return\n{line}\n}}\n"))?;
    let file = |name: &str| dir.join(name).display().to_string();
    let append = format!(
        "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off guest={}",
        file("guest.sh")
    );
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args("-nodefaults -no-user-config -display none -no-reboot -M q35,i8042=off".split(' '))
        // Without CMPXCHG16B: after one of the guest kernel's in its allocator the emulator's EFLAGS were the low bits of
        // RAX, and the kernel died of the branch behind it.
        .args("-accel tcg,thread=multi,tb-size=512 -cpu max,la57=off,cx16=off -smp 2 -m 2048".split(' '))
        .arg("-kernel")
        .arg(cache.join("vmlinuz"))
        .arg("-initrd")
        .arg(cache.join("initrd"))
        .args(["-append", &append])
        .args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"])
        .args("-device virtio-rng-pci -device virtio-serial".split(' '))
        .args(["-chardev", &format!("file,id=out,path={}", file("out"))])
        .args(["-device", "virtserialport,chardev=out,name=out"])
        .args(["-chardev", &format!("file,id=status,path={}", file("status"))])
        .args(["-device", "virtserialport,chardev=status,name=status"])
        .args(["-serial", &format!("file:{}", file("console"))]);
    let qemu = Running::start(&mut qemu)?.finish(limit, || {})?;
    let read = |name: &str| String::from_utf8_lossy(&fs::read(file(name)).unwrap_or_default()).into_owned();
    let status = read("status").trim().parse().ok();
    let console = if status.is_none() {
        let all = format!("{}{}", read("console"), qemu.output);
        let lines: Vec<&str> = all.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    } else {
        String::new()
    };
    Ok((Ran { status, output: read("out"), console }, qemu.status.is_some()))
}

/// `cargo xtask vm [--timeout SECONDS] COMMAND…`
pub fn main(options: &[&str]) -> ExitCode {
    let (limit, words) = match options {
        ["--timeout", seconds, words @ ..] => {
            (seconds.parse().map(Duration::from_secs).unwrap_or(LIMIT), words)
        }
        words => (LIMIT, words),
    };
    if words.is_empty() {
        eprintln!("xtask vm: no command");
        return ExitCode::from(2);
    }
    if let Some(why) = wanting() {
        eprintln!("xtask vm: {why}");
        return ExitCode::from(2);
    }
    let line: Vec<String> = words.iter().map(|w| format!("'{}'", w.replace('\'', r"'\''"))).collect();
    match provide().and_then(|()| run(&line.join(" "), limit)) {
        Ok(Ran { status: Some(status), output, .. }) => {
            print!("{output}");
            ExitCode::from(u8::try_from(status).unwrap_or(1))
        }
        Ok(Ran { output, console, .. }) => {
            print!("{output}");
            eprintln!("xtask vm: the VM did not come to its end; its console:\n{console}");
            ExitCode::from(124)
        }
        Err(e) => {
            eprintln!("xtask vm: {e}");
            ExitCode::from(125)
        }
    }
}
