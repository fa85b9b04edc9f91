//! `smc check`: what this machine can do. Each line is tried, not looked up.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net as unix;
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use rustix::process::Resource;

use crate::output::emit;
use crate::{library, probe};

/// What came of one question.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// As it should be.
    Good(String),
    /// It works, with a limit worth knowing.
    Note(String),
    /// Connections will not be upgraded.
    Bad(String),
}

use Answer::{Bad, Good, Note};

/// Memory that may be locked and does for some connections: each takes two rings, and buffers for messages.
const LEAST_LOCKED: u64 = 16 << 20;

/// Asks everything; fails if something needed is missing.
pub fn run() -> ExitCode {
    type Question = (&'static str, fn() -> Answer);
    const QUESTIONS: [Question; 11] = [
        ("kernel", kernel),
        ("memfd", || tried(memfd(), "sealed shared memory", "sealed memfds are needed")),
        ("unix", || tried(abstract_socket(), "abstract Unix sockets", "abstract Unix sockets are needed")),
        ("sock_diag", || {
            tried(sock_diag(), "names the owner of a TCP peer", "load the modules inet_diag and tcp_diag")
        }),
        ("files", open_files),
        ("cpus", cpus),
        ("library", library_found),
        ("preload", library_loads),
        ("upgrade", upgrade),
        ("rdma", rdma),
        ("option", option),
    ];
    let mut text = String::new();
    let mut missing = false;
    for (name, ask) in QUESTIONS {
        let (mark, what) = match ask() {
            Good(what) => ("ok  ", what),
            Note(what) => ("note", what),
            Bad(what) => {
                missing = true;
                ("NO  ", what)
            }
        };
        text += &format!("{mark}  {name:<10} {what}\n");
    }
    text += if missing {
        "Connections stay on TCP here.\n"
    } else {
        "Connections within this host can be upgraded.\n"
    };
    emit(&text, if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn tried(result: io::Result<()>, good: &str, remedy: &str) -> Answer {
    match result {
        Ok(()) => Good(good.into()),
        Err(e) => Bad(format!("{e}; {remedy}")),
    }
}

/// `tcpi_bytes_acked` and `tcpi_bytes_received`, by which an upgrade is checked, came with 4.1.
fn kernel() -> Answer {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match version(release.trim()) {
        Some(v) if v >= (4, 1) => Good(format!("Linux {}", release.trim())),
        Some(_) => Bad(format!("Linux {}: 4.1 or later is needed", release.trim())),
        None => Note(format!("Linux {:?}: an unknown version", release.trim())),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn memfd() -> io::Result<()> {
    let fd = rustix::fs::memfd_create("smc-check", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, 4096)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    match rustix::fs::ftruncate(&fd, 0) {
        Err(_) => Ok(()),
        Ok(()) => Err(io::Error::other("a sealed memfd shrank")),
    }
}

fn abstract_socket() -> io::Result<()> {
    let name = unix::SocketAddr::from_abstract_name(format!("smc-check.{}", std::process::id()))?;
    let listener = unix::UnixListener::bind_addr(&name)?;
    let client = unix::UnixStream::connect_addr(&name)?;
    let (server, _) = listener.accept()?;
    let peer = rustix::net::sockopt::socket_peercred(&server)?;
    drop(client);
    let me = rustix::process::geteuid();
    if peer.uid == me { Ok(()) } else { Err(io::Error::other("SO_PEERCRED names somebody else")) }
}

/// Asks the kernel for one connection by its addresses, as the handshake does.
fn sock_diag() -> io::Result<()> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLMSG_ERROR: u16 = 2;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (client.local_addr()?, client.peer_addr()?) else {
        return Err(io::Error::other("no IPv4 loopback"));
    };
    let mut request = Vec::with_capacity(72);
    request.extend(72u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(1u16.to_ne_bytes()); // NLM_F_REQUEST
    request.extend([0; 8]); // sequence, port
    request.extend([2, 6, 0, 0]); // AF_INET, IPPROTO_TCP, no extensions
    request.extend(u32::MAX.to_ne_bytes()); // every state
    request.extend(from.port().to_be_bytes());
    request.extend(to.port().to_be_bytes());
    for ip in [from.ip(), to.ip()] {
        request.extend(ip.octets());
        request.extend([0; 12]);
    }
    request.extend([0; 4]); // any interface
    request.extend([0xff; 8]); // no cookie
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    rustix::net::send(&socket, &request, SendFlags::empty())?;
    let mut reply = [0u8; 1024];
    let (n, _) = rustix::net::recv(&socket, &mut reply, RecvFlags::DONTWAIT)?;
    let word = |at: usize| [reply[at], reply[at + 1], reply[at + 2], reply[at + 3]];
    match u16::from_ne_bytes([reply[4], reply[5]]) {
        SOCK_DIAG_BY_FAMILY if n >= 16 => Ok(()),
        NLMSG_ERROR if n >= 20 => Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(word(16)))),
        _ => Err(io::Error::other("an unexpected answer")),
    }
}

/// An upgraded connection takes one more descriptor at each end.
fn open_files() -> Answer {
    match rustix::process::getrlimit(Resource::Nofile).current {
        Some(n) if n < 4096 => {
            Note(format!("{n} open files: at most {} upgraded connections a process (ulimit -n)", n / 2))
        }
        Some(n) => Good(format!("{n} open files a process")),
        None => Good("open files without limit".into()),
    }
}

fn cpus() -> Answer {
    match std::thread::available_parallelism().map_or(1, |n| n.get()) {
        1 => Note("1 CPU: polling can't pay, every wait sleeps".into()),
        n => Good(format!("{n} CPUs")),
    }
}

fn library_found() -> Answer {
    match library::find(None) {
        Err(why) => Bad(why),
        Ok(path) => {
            let readable = path.metadata().is_ok_and(|m| m.permissions().mode() & 0o004 != 0);
            if readable {
                Good(path.display().to_string())
            } else {
                Note(format!(
                    "{}: other users can't read it; servers that change uid need to",
                    path.display()
                ))
            }
        }
    }
}

/// The loader goes on without a library it can't load and says so on standard error.
fn library_loads() -> Answer {
    let Ok(path) = library::find(None) else { return Bad("no library".into()) };
    if path.as_os_str().as_bytes().iter().any(|b| b": ".contains(b)) {
        return Bad("LD_PRELOAD can't name a path with ':' or blanks; move the library".into());
    }
    let ran = Command::new(OsStr::new("true")).env("LD_PRELOAD", &path).stdin(Stdio::null()).output();
    match ran {
        Ok(o) if o.status.success() && o.stderr.is_empty() && o.stdout.is_empty() => {
            Good("a program runs under it".into())
        }
        Ok(o) => {
            let said = String::from_utf8_lossy(&o.stderr).lines().next().unwrap_or_default().to_owned();
            Bad(format!("`true` under it: {}: {said}", o.status))
        }
        Err(e) => Note(format!("`true` could not be run: {e}")),
    }
}

/// The whole of it, between two processes.
fn upgrade() -> Answer {
    match library::find(None).and_then(|library| probe::try_upgrade(&library)) {
        Ok(()) => Good("a connection between two programs went through shared memory".into()),
        Err(why) => Bad(why),
    }
}

/// Whether other hosts are known by the TCP option.
fn option() -> Answer {
    if crate::bpf::is_here() {
        Good("a TCP option tells which other hosts speak SMC".into())
    } else {
        Note(
            "only hosts in SMC_PEERS are known to speak SMC; `smc bpf attach`, by root, has others found out"
                .into(),
        )
    }
}

/// Whether connections to other hosts can go by RDMA; if not, the first thing that is missing.
fn rdma() -> Answer {
    match rdma_wanting() {
        Ok(devices) => Good(format!("{devices}: connections to hosts that speak SMC go by RDMA")),
        Err(why) => Note(format!("other hosts are reached by TCP: {why}")),
    }
}

/// The devices' names.
fn rdma_wanting() -> Result<String, String> {
    let shim = library::find(None)?;
    let names = ["libsmc-rdma.so", "libsmc_rdma.so"];
    let service = names.iter().map(|n| shim.with_file_name(n)).find(|p| p.exists());
    let service = service.ok_or("libsmc-rdma.so is not beside libsmc.so; it is built in rdma/")?;
    let ran = Command::new(OsStr::new("true")).env("LD_PRELOAD", &service).stdin(Stdio::null()).output();
    if let Ok(o) = ran
        && !o.stderr.is_empty()
    {
        let said = String::from_utf8_lossy(&o.stderr).lines().next().unwrap_or_default().to_owned();
        return Err(format!("{said} (rdma-core is in the packages libibverbs1 and ibverbs-providers)"));
    }
    let listed = |folder: &str, of: &str| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|n| n.starts_with(of)).collect()
    };
    let devices = listed("/sys/class/infiniband", "");
    if devices.is_empty() {
        return Err(
            "no RDMA device; for Soft-RoCE: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev …".into()
        );
    }
    let verbs = listed("/dev/infiniband", "uverbs");
    let opens =
        |n: &String| fs::File::options().read(true).write(true).open(format!("/dev/infiniband/{n}")).is_ok();
    if !verbs.iter().any(opens) {
        return Err(
            "no /dev/infiniband/uverbs* can be opened: load the module ib_uverbs, or mind its rights".into(),
        );
    }
    let locked = rustix::process::getrlimit(Resource::Memlock).current;
    if locked.is_some_and(|n| n < LEAST_LOCKED) && !rustix::process::geteuid().is_root() {
        return Err("hardly any memory may be locked; raise the limit (ulimit -l, LimitMEMLOCK=)".into());
    }
    Ok(devices.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("3.10"), Some((3, 10)));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn what_is_needed_can_be_tried_here() {
        memfd().expect("memfd");
        abstract_socket().expect("abstract sockets");
    }
}
