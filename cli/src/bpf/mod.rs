//! `smc bpf`: whether other hosts speak SMC is found out by a TCP option, which two BPF programs on a cgroup write and read.
//!
//! What they do, and what they tell a program under libsmc, is in `option.bpf.c`; what is loaded is `option.bpf.o`, which is
//! part of this command. They belong to the cgroup: this command is gone when they are attached, and finds them again
//! by their names.

mod kernel;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aya::maps::{Map, MapData, PerCpuArray};
use aya::programs::{CgroupSockopt, ProgramError, SockOps, loaded_programs};
use aya::{EbpfLoader, include_bytes_aligned};
use serde::Serialize;

use crate::output::{complain, emit};
use kernel::Hook;

static OBJECT: &[u8] = include_bytes_aligned!("option.bpf.o");

/// The programs, and where each is attached; the first is the one that is looked for.
const OPS: (&str, Hook) = ("smc_option_ops", Hook::SockOps);
const SET: (&str, Hook) = ("smc_option_set", Hook::SetSockOpt);
/// The map of counts, as the kernel has its name, and what it counts.
const COUNTS: &str = "smc_counts";
const COUNTED: [&str; 5] = ["asked", "answered", "connected", "accepted", "taken"];

/// Exit codes beside 0 and clap's 2.
const FAILED: u8 = 1;
const NOT_ATTACHED: u8 = 3;
const NOT_ALLOWED: u8 = 4;
const NOT_SUPPORTED: u8 = 5;

#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Have connections of programs under libsmc say by a TCP option that they speak SMC, and hear it of others
    Attach(At),
    /// Show where that is so, and how often it was said
    Status(StatusOptions),
    /// Have it said no more; connections that there are go on
    Detach(At),
}

const EXITS: &str = "Exit status: 0 done; 1 failed; 3 not attached; 4 not allowed; 5 not supported here.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXITS)]
struct At {
    /// A folder of the cgroup2 file system: the programs in it and below [attach: all; detach: wherever it is]
    #[arg(long, value_name = "FOLDER")]
    cgroup: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = EXITS)]
struct StatusOptions {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Why not, and the exit code.
#[derive(Debug)]
struct No(u8, String);

impl From<io::Error> for No {
    fn from(e: io::Error) -> Self {
        refused("the kernel", &e)
    }
}

/// What the kernel's errors mean here.
fn refused(what: &str, e: &io::Error) -> No {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if !rustix::process::geteuid().is_root() => {
            No(NOT_ALLOWED, format!("{what}: {e}; root may, or who has CAP_BPF and CAP_NET_ADMIN"))
        }
        Some(libc::EPERM) => No(
            NOT_ALLOWED,
            format!(
                "{what}: {e}; inside a container, or other programs are attached there and share with none"
            ),
        ),
        Some(libc::ENOSYS) => {
            No(NOT_SUPPORTED, format!("{what}: this kernel has no BPF (CONFIG_BPF_SYSCALL)"))
        }
        Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP) => {
            No(NOT_SUPPORTED, format!("{what}: {e}; Linux 5.15 or later, with CONFIG_CGROUP_BPF, is needed"))
        }
        _ => No(FAILED, format!("{what}: {e}")),
    }
}

/// An error of aya's: the system call's at its bottom counts.
fn unloaded(e: &(dyn Error + 'static)) -> No {
    let mut at = Some(e);
    while let Some(e) = at {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return refused("BPF", io);
        }
        at = e.source();
    }
    No(FAILED, format!("BPF: {e}"))
}

impl From<ProgramError> for No {
    fn from(e: ProgramError) -> Self {
        unloaded(&e)
    }
}

/// Runs a subcommand.
pub fn run(options: &Options) -> ExitCode {
    let done = match &options.command {
        Command::Attach(at) => attach(at).map(|text| (text, 0)),
        Command::Status(how) => status(how),
        Command::Detach(at) => detach(at).map(|text| (text, 0)),
    };
    match done {
        Ok((text, code)) => emit(&text, ExitCode::from(code)),
        Err(No(code, why)) => {
            complain(&why);
            ExitCode::from(code)
        }
    }
}

/// Whether the programs see the sockets of this process; without any rights.
pub fn is_here() -> bool {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    socket.is_ok_and(|s| smc::option::is_present(s.as_raw_fd()))
}

/// The root of the cgroup2 file system.
fn root() -> Result<PathBuf, No> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_of("cgroup2", &mounts).ok_or_else(|| {
        let how = "mount -t cgroup2 none /sys/fs/cgroup/unified";
        No(NOT_SUPPORTED, format!("no cgroup2 file system is mounted ({how})"))
    })
}

/// Where a file system of that type is mounted, by /proc/PID/mountinfo.
fn mount_of(kind: &str, mounts: &str) -> Option<PathBuf> {
    let at = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let is = after.split(' ').next() == Some(kind);
        let path = before.split(' ').nth(4)?.replace("\\040", " ");
        is.then(|| PathBuf::from(path))
    };
    mounts.lines().find_map(at)
}

/// A cgroup with the programs.
#[derive(Debug)]
struct Place {
    cgroup: PathBuf,
    ops: Vec<u32>,
    set: Vec<u32>,
}

/// The kernel's numbers of our programs.
fn known() -> Result<BTreeMap<u32, String>, No> {
    let mut all = BTreeMap::new();
    for info in loaded_programs() {
        // One that is gone meanwhile is none of ours.
        let info = match info {
            Err(ProgramError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => continue,
            info => info?,
        };
        let name = info.name_as_str().unwrap_or_default();
        if [OPS.0, SET.0].contains(&name) {
            all.insert(info.id(), name.to_owned());
        }
    }
    Ok(all)
}

/// Where they are attached, in `top` and below.
fn places(top: &Path) -> Result<Vec<Place>, No> {
    let ours = known()?;
    let (mut found, mut todo) = (Vec::new(), vec![top.to_owned()]);
    while let (false, Some(cgroup)) = (ours.is_empty(), todo.pop()) {
        let dir = match File::open(&cgroup) {
            // Gone meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            dir => dir?,
        };
        let at = |(name, hook): (&str, Hook)| -> io::Result<Vec<u32>> {
            let is = |id: &u32| ours.get(id).is_some_and(|n| n == name);
            Ok(kernel::attached(dir.as_fd(), hook)?.into_iter().filter(is).collect())
        };
        let (ops, set) = (at(OPS)?, at(SET)?);
        if !ops.is_empty() || !set.is_empty() {
            found.push(Place { cgroup: cgroup.clone(), ops, set });
        }
        let below = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        todo.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    found.sort_by(|a, b| a.cgroup.cmp(&b.cgroup));
    Ok(found)
}

/// The folder that was named, which must be a cgroup; or all of them.
fn chosen(at: &At) -> Result<(PathBuf, PathBuf), No> {
    let root = root()?;
    let Some(folder) = &at.cgroup else { return Ok((root.clone(), root)) };
    let folder = folder.canonicalize().map_err(|e| No(FAILED, format!("{}: {e}", folder.display())))?;
    if !folder.starts_with(&root) || !folder.is_dir() {
        return Err(No(FAILED, format!("{} is not a folder in {}", folder.display(), root.display())));
    }
    Ok((root, folder))
}

fn attach(at: &At) -> Result<String, No> {
    let (root, cgroup) = chosen(at)?;
    let dir = File::open(&cgroup)?;
    // One more, and each socket would be asked twice.
    let near = |p: &Place| p.cgroup.starts_with(&cgroup) || cgroup.starts_with(&p.cgroup);
    if let Some(other) = places(&root)?.iter().find(|p| near(p)) {
        let other = other.cgroup.display();
        return Err(No(
            FAILED,
            format!("already attached at {other}; `smc bpf detach --cgroup {other}` first"),
        ));
    }
    let mut object = EbpfLoader::new().btf(None).load(OBJECT).map_err(|e| unloaded(&e))?;
    let lost = || No(FAILED, "the object lacks a program".into());
    let set: &mut CgroupSockopt = object.program_mut(SET.0).ok_or_else(lost)?.try_into()?;
    set.load()?;
    let what = format!("{}", cgroup.display());
    kernel::attach(dir.as_fd(), set.fd()?.as_fd(), SET.1).map_err(|e| refused(&what, &e))?;
    let set = set.fd()?.try_clone()?;
    let second = (|| {
        let ops: &mut SockOps = object.program_mut(OPS.0).ok_or_else(lost)?.try_into()?;
        ops.load()?;
        kernel::attach(dir.as_fd(), ops.fd()?.as_fd(), OPS.1).map_err(|e| refused(&what, &e))
    })();
    if let Err(why) = second {
        // Neither without the other.
        kernel::detach(dir.as_fd(), set.as_fd(), SET.1)?;
        return Err(why);
    }
    Ok(format!(
        "attached at {what}: programs that are started under libsmc from now on know by it who speaks SMC\n"
    ))
}

fn detach(at: &At) -> Result<String, No> {
    let (root, cgroup) = chosen(at)?;
    let wanted = |p: &Place| at.cgroup.is_none() || p.cgroup == cgroup;
    let mut text = String::new();
    for place in places(&root)?.iter().filter(|p| wanted(p)) {
        let dir = File::open(&place.cgroup)?;
        // First who promises, then who is asked about it.
        let both = place.ops.iter().map(|id| (id, OPS.1)).chain(place.set.iter().map(|id| (id, SET.1)));
        for (id, hook) in both {
            let program = loaded_programs().filter_map(Result::ok).find(|p| p.id() == *id);
            if let Some(program) = program {
                kernel::detach(dir.as_fd(), program.fd()?.as_fd(), hook)?;
            }
        }
        text += &format!("detached from {}\n", place.cgroup.display());
    }
    if text.is_empty() { Err(No(NOT_ATTACHED, "not attached".into())) } else { Ok(text) }
}

/// What `smc bpf status --json` shows of a place.
#[derive(Debug, Serialize)]
struct Shown {
    cgroup: String,
    /// Both programs are there.
    complete: bool,
    counts: BTreeMap<&'static str, u64>,
}

fn shown(place: &Place) -> Result<Shown, No> {
    let mut counts = BTreeMap::new();
    let program = loaded_programs().filter_map(Result::ok).find(|p| place.ops.contains(&p.id()));
    let maps = program.map(|p| p.map_ids()).transpose()?.flatten().unwrap_or_default();
    for id in maps {
        let data = MapData::from_id(id).map_err(|e| unloaded(&e))?;
        if data.info().is_ok_and(|i| i.name_as_str() == Some(COUNTS)) {
            let map = Map::from_map_data(data).map_err(|e| unloaded(&e))?;
            let array: PerCpuArray<_, u64> = map.try_into().map_err(|e: aya::maps::MapError| unloaded(&e))?;
            for (i, name) in (0..).zip(COUNTED) {
                let each = array.get(&i, 0).map_err(|e| unloaded(&e))?;
                counts.insert(name, each.iter().sum());
            }
        }
    }
    let complete = !place.ops.is_empty() && !place.set.is_empty();
    Ok(Shown { cgroup: place.cgroup.display().to_string(), complete, counts })
}

/// What is to be shown, and the exit code.
fn status(how: &StatusOptions) -> Result<(String, u8), No> {
    let found = match root().and_then(|root| places(&root)) {
        Err(No(NOT_ALLOWED, why)) if is_here() => {
            return Err(No(NOT_ALLOWED, format!("attached for this process; where else, and counts: {why}")));
        }
        found => found?,
    };
    let all: Vec<Shown> = found.iter().map(shown).collect::<Result<_, _>>()?;
    let code = if all.is_empty() { NOT_ATTACHED } else { 0 };
    if how.json {
        let text = serde_json::to_string(&all).map_err(|e| No(FAILED, e.to_string()))?;
        return Ok((text + "\n", code));
    }
    if all.is_empty() {
        return Ok(("not attached\n".into(), code));
    }
    let line = |s: &Shown| {
        let counts: Vec<_> =
            COUNTED.iter().filter_map(|n| Some(format!("{n} {}", s.counts.get(n)?))).collect();
        let half = if s.complete { "" } else { "  (one program of two: detach and attach again)" };
        format!("{}  {}{half}\n", s.cgroup, counts.join("  "))
    };
    Ok((all.iter().map(line).collect(), code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_is_what_this_command_looks_for() {
        let has = |name: &str| OBJECT.windows(name.len()).any(|w| w == name.as_bytes());
        for name in [OPS.0, SET.0, COUNTS, "smc_sockets", "smc_listeners"] {
            // The kernel keeps 15 bytes of a name.
            assert!(has(name) && name.len() < 16, "{name}");
        }
        assert_eq!(OBJECT.as_ptr() as usize % 8, 0, "aya reads it in place");
    }

    #[test]
    fn the_file_system_is_found_where_it_is_mounted() {
        let mounts = "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - tmpfs tmpfs rw\n\
                      31 25 0:27 / /sys/fs/cgroup/a\\040b rw shared:5 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_of("cgroup2", mounts), Some("/sys/fs/cgroup/a b".into()));
        assert_eq!(mount_of("cgroup", mounts), None);
    }

    #[test]
    fn a_refusal_says_by_its_code_what_kind_it_is() {
        let code = |e: i32| refused("it", &io::Error::from_raw_os_error(e)).0;
        assert_eq!(code(libc::EPERM), NOT_ALLOWED);
        assert_eq!(code(libc::EINVAL), NOT_SUPPORTED);
        assert_eq!(code(libc::ENOSYS), NOT_SUPPORTED);
        assert_eq!(code(libc::EMFILE), FAILED);
    }
}
