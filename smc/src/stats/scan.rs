//! Finding the arenas of this host's processes and reading their slots.
//!
//! ```text
//! /proc/PID/fd/N → "/memfd:smc-arena (deleted)"   opened read-only, told apart by inode
//!   Header: magic, version, slot size, used       checked; another version is left out
//!   slot 0 … used-1                               pread, 64 at a time; LIVE ones are decoded
//! ```
//!
//! Another user's process could show us anything under that name: sizes are bounded here, and what is read
//! is numbers only.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::page::{TOTALS_OFFSET, TOTALS_SIZE, TotalsPage};
use super::{ConnectionInfo, Mode, ProcessInfo, Role, Totals};
use crate::arena::{
    HEADER_SIZE, Header, MAGIC, MEMFD_NAME, SLOT_SIZE, SLOTS, Slot, VERSION, rx_mode, slot_state, tx_mode,
};
use crate::mem::layout::LEFT;
use crate::reason::Reason;
use crate::sync::Ordering::Relaxed;

/// Slots read at once.
const BATCH: usize = 64;

/// One arena, and the processes that hold it.
#[derive(Debug)]
struct Arena {
    file: File,
    pids: Vec<u32>,
}

/// Bytes of the arena, by offset.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
    }
}

/// A connection of every process whose arena may be read, in order of pid and address.
///
/// ```
/// let upgraded = smc::stats::connections()?.iter().filter(|c| c.mode() != smc::stats::Mode::Tcp).count();
/// # println!("{upgraded}");
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// If `/proc` can't be read.
pub fn connections() -> io::Result<Vec<ConnectionInfo>> {
    let mut all: Vec<_> = arenas(Path::new("/proc"))?.iter().flat_map(Arena::connections).collect();
    all.sort_by_key(|c| (c.pid, c.local, c.peer));
    Ok(all)
}

/// Every process whose arena may be read, with its sums.
///
/// ```
/// for p in smc::stats::processes()? {
///     println!("{}", p.totals.json(p.pid, &p.program));
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// If `/proc` can't be read.
pub fn processes() -> io::Result<Vec<ProcessInfo>> {
    let mut all: Vec<_> = arenas(Path::new("/proc"))?.iter().map(Arena::process).collect();
    all.sort_by_key(|p| p.pid);
    Ok(all)
}

/// The sums of one process and those forked from it, and its connections; `None`: it has none under libsmc, or its
/// arena may not be read. Looks at that process alone.
///
/// ```
/// if let Some((process, connections)) = smc::stats::process(std::process::id()) {
///     println!("{} has {} connections", process.program, connections.len());
/// }
/// ```
#[must_use]
pub fn process(pid: u32) -> Option<(ProcessInfo, Vec<ConnectionInfo>)> {
    let arena = those_of(Path::new("/proc"), &[pid]).into_iter().next()?;
    Some((arena.process(), arena.connections()))
}

/// All arenas.
fn arenas(proc: &Path) -> io::Result<Vec<Arena>> {
    let mut pids: Vec<u32> =
        fs::read_dir(proc)?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    Ok(those_of(proc, &pids))
}

/// The arenas of these, told apart by inode: processes that were forked share one.
fn those_of(proc: &Path, pids: &[u32]) -> Vec<Arena> {
    let mut found: BTreeMap<(u64, u64), Arena> = BTreeMap::new();
    for &pid in pids {
        // Gone meanwhile, or not ours to look at: either way nothing to show.
        let _ = look_into(proc, pid, &mut found);
    }
    found.into_values().collect()
}

/// Adds the arenas of one process.
fn look_into(proc: &Path, pid: u32, found: &mut BTreeMap<(u64, u64), Arena>) -> io::Result<()> {
    for fd in fs::read_dir(proc.join(pid.to_string()).join("fd"))?.flatten() {
        let path = fd.path();
        if !fs::read_link(&path).is_ok_and(|to| names_arena(to.as_os_str())) {
            continue;
        }
        let Some((id, file)) = open(&path) else { continue };
        let arena = found.entry(id).or_insert_with(|| Arena { file, pids: Vec::new() });
        if arena.pids.last() != Some(&pid) {
            arena.pids.push(pid);
        }
    }
    Ok(())
}

fn names_arena(link: &OsStr) -> bool {
    let link = link.as_encoded_bytes();
    link.strip_prefix(b"/memfd:").and_then(|l| l.strip_suffix(b" (deleted)")) == Some(MEMFD_NAME.as_bytes())
}

/// Opens an arena and checks that it is one. O_NONBLOCK: the number may have become a pipe since.
fn open(path: &Path) -> Option<((u64, u64), File)> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    let meta = file.metadata().ok().filter(fs::Metadata::is_file)?;
    let mut head = [0; size_of::<Header>()];
    file.read_exact_at(&mut head, 0).ok()?;
    let head = Words(&head);
    let ours = head.u64(offset_of!(Header, magic)) == MAGIC
        && head.u32(offset_of!(Header, version)) == VERSION
        && head.u32(offset_of!(Header, slot_size)) as usize == SLOT_SIZE;
    ours.then_some(((meta.dev(), meta.ino()), file))
}

/// The processes that hold an arena, by the pids that may be in its slots: those of the pid namespace in which it was
/// made.
type Names = BTreeMap<u32, Holder>;

/// A process that holds an arena.
#[derive(Debug)]
struct Holder {
    /// As this process sees it.
    pid: u32,
    program: String,
    /// Its pid namespace is ours.
    near: bool,
}

/// A process under all its pids: ours, and those of the namespaces below.
fn add_names(names: &mut Names, pid: u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    // NSpid, proc_pid_status(5): from our namespace down to its own. Not there: the kernel has no such namespaces.
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
    let mut pids: Vec<u32> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    if pids.is_empty() {
        pids.push(pid);
    }
    for inner in &pids {
        let near = pids.len() == 1;
        names.entry(*inner).or_insert_with(|| Holder { pid, program: program(pid), near });
    }
}

/// A process's name, without anything a terminal would act on.
fn program(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Arena {
    /// Calls `f` with each live slot's bytes.
    fn each_slot(&self, mut f: impl FnMut(&Words<'_>)) {
        let mut head = [0; size_of::<Header>()];
        if self.file.read_exact_at(&mut head, 0).is_err() {
            return;
        }
        let used = (Words(&head).u32(offset_of!(Header, used)) as usize).min(SLOTS);
        let mut batch = vec![0; BATCH * SLOT_SIZE];
        for first in (0..used).step_by(BATCH) {
            let bytes = &mut batch[..(used - first).min(BATCH) * SLOT_SIZE];
            let at = HEADER_SIZE + first * SLOT_SIZE;
            if self.file.read_exact_at(bytes, at as u64).is_err() {
                return;
            }
            for slot in bytes.chunks_exact(SLOT_SIZE).map(Words) {
                if slot.u32(offset_of!(Slot, state)) == slot_state::LIVE {
                    f(&slot);
                }
            }
        }
    }

    fn connections(&self) -> Vec<ConnectionInfo> {
        let mut all = Vec::new();
        let mut names = Names::new();
        self.pids.iter().for_each(|p| add_names(&mut names, *p));
        self.each_slot(|slot| all.push(decode(slot, &names)));
        all
    }

    fn process(&self) -> ProcessInfo {
        let pid = self.pids.first().copied().unwrap_or(0);
        let mut totals = self.gone();
        let live = self.connections();
        live.iter().filter(|c| !c.stale).for_each(|c| totals.add(c));
        let live = live.iter().filter(|c| !c.stale).count() as u64;
        ProcessInfo { pid, program: program(pid), pids: self.pids.clone(), live, totals }
    }

    /// Sums over connections that are gone.
    fn gone(&self) -> Totals {
        let mut page = [0; TOTALS_SIZE];
        if self.file.read_exact_at(&mut page, TOTALS_OFFSET as u64).is_err() {
            return Totals::default();
        }
        let page = Words(&page);
        let three = |at: usize| [page.u64(at), page.u64(at + 8), page.u64(at + 16)];
        let reasons = offset_of!(TotalsPage, fallback);
        let entries = (reasons..TOTALS_SIZE).step_by(8).map(|at| (page.u32(at), page.u32(at + 4)));
        Totals {
            connections: three(offset_of!(TotalsPage, connections)),
            tx: three(offset_of!(TotalsPage, tx)),
            rx: three(offset_of!(TotalsPage, rx)),
            polled: page.u64(offset_of!(TotalsPage, polled)),
            slept: page.u64(offset_of!(TotalsPage, slept)),
            doorbells: page.u64(offset_of!(TotalsPage, doorbells)),
            upgrades: page.u64(offset_of!(TotalsPage, upgrades)),
            downgrades: page.u64(offset_of!(TotalsPage, downgrades)),
            fallback: entries.filter(|(c, n)| *c != 0 && *n != 0).map(|(c, n)| (c, n.into())).collect(),
        }
    }
}

/// A slot's address words: network order, IPv4 in the first word.
fn address(slot: &Words<'_>, family: u32, words: usize, port: u32) -> Option<SocketAddr> {
    let bytes = |n: usize| slot.0.get(words..words + n);
    let ip: IpAddr = match family {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes(4)?).ok()?).into(),
        6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes(16)?).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port as u16))
}

/// A live slot of this process.
pub(super) fn of(slot: &Slot) -> ConnectionInfo {
    // Each word is read by itself, as a reader of another process would find it.
    let mut bytes = [0u8; size_of::<Slot>()];
    let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
    macro_rules! copy {
        ($($($field:ident).+),* $(,)?) => {$(
            put(offset_of!(Slot, $($field).+), &slot.$($field).+.load(Relaxed).to_ne_bytes());
        )*};
    }
    copy!(
        holders, best, family, local_port, peer_port, peer_pid, role, reason, ring_size, upgrades, downgrades
    );
    copy!(tx.mode, rx.mode, tx.prod, rx.cons, tx.tcp, rx.tcp, tx.msgs, rx.msgs);
    copy!(wait.polled, wait.slept, wait.doorbells, wait.peer_gone, pid);
    for i in 0..4 {
        put(offset_of!(Slot, local_addr) + 4 * i, &slot.local_addr[i].load(Relaxed).to_ne_bytes());
        put(offset_of!(Slot, peer_addr) + 4 * i, &slot.peer_addr[i].load(Relaxed).to_ne_bytes());
    }
    let pid = std::process::id();
    decode(&Words(&bytes), &Names::from([(pid, Holder { pid, program: program(pid), near: true })]))
}

/// A live slot as the caller sees it; `names` are the processes that hold the arena.
fn decode(slot: &Words<'_>, names: &Names) -> ConnectionInfo {
    let owner = slot.u32(offset_of!(Slot, pid));
    let holder = names.get(&owner).or(names.first_key_value().map(|(_, h)| h));
    let (pid, name, near) = holder.map_or((owner, "", true), |h| (h.pid, h.program.as_str(), h.near));
    let holders = slot.u32(offset_of!(Slot, holders));
    let best = match slot.u32(offset_of!(Slot, best)) {
        0 => Mode::Tcp,
        1 => Mode::Shm,
        _ => Mode::Rdma,
    };
    // One that is served, and whose handshake is under way, is on TCP still.
    let served = slot.u32(offset_of!(Slot, remote)) != 0;
    let ring = match best {
        Mode::Tcp if served => Mode::Tcp,
        Mode::Rdma => Mode::Rdma,
        _ => Mode::Shm,
    };
    let mode = |in_ring: bool| if in_ring { ring } else { Mode::Tcp };
    let family = slot.u32(offset_of!(Slot, family));
    let local_port = slot.u32(offset_of!(Slot, local_port));
    let peer_port = slot.u32(offset_of!(Slot, peer_port));
    ConnectionInfo {
        pid,
        program: name.to_owned(),
        // In another namespace than ours it is a number of that one.
        peer_pid: Some(slot.u32(offset_of!(Slot, peer_pid))).filter(|p| *p != 0 && near),
        local: address(slot, family, offset_of!(Slot, local_addr), local_port),
        peer: address(slot, family, offset_of!(Slot, peer_addr), peer_port),
        role: if slot.u32(offset_of!(Slot, role)) == 0 { Role::Connect } else { Role::Accept },
        mode_tx: mode(slot.u32(offset_of!(Slot, tx.mode)) == tx_mode::RING),
        mode_rx: mode(slot.u32(offset_of!(Slot, rx.mode)) == rx_mode::RING),
        best,
        reason: Reason::try_from(slot.u32(offset_of!(Slot, reason))).ok(),
        tx_bytes_ring: slot.u64(offset_of!(Slot, tx.prod)) & !LEFT,
        rx_bytes_ring: slot.u64(offset_of!(Slot, rx.cons)) & !LEFT,
        tx_bytes_tcp: slot.u64(offset_of!(Slot, tx.tcp)),
        rx_bytes_tcp: slot.u64(offset_of!(Slot, rx.tcp)),
        tx_msgs: slot.u64(offset_of!(Slot, tx.msgs)),
        rx_msgs: slot.u64(offset_of!(Slot, rx.msgs)),
        ring_size: slot.u32(offset_of!(Slot, ring_size)),
        polls: slot.u64(offset_of!(Slot, wait.polled)),
        sleeps: slot.u64(offset_of!(Slot, wait.slept)),
        doorbells: slot.u64(offset_of!(Slot, wait.doorbells)),
        upgrades: slot.u32(offset_of!(Slot, upgrades)),
        downgrades: slot.u32(offset_of!(Slot, downgrades)),
        holders,
        peer_closed: slot.u32(offset_of!(Slot, wait.peer_gone)) != 0,
        // One holder, and that one is gone: it was killed, and only relatives keep the arena.
        stale: holders <= 1 && !names.contains_key(&owner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arena_is_opened() {
        assert!(names_arena(OsStr::new("/memfd:smc-arena (deleted)")));
        assert!(!names_arena(OsStr::new("/memfd:smc-arena")));
        assert!(!names_arena(OsStr::new("/tmp/memfd:smc-arena (deleted)")));
    }

    #[test]
    fn a_slot_is_decoded() {
        let mut slot = vec![0u8; SLOT_SIZE];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(offset_of!(Slot, state), &slot_state::LIVE.to_ne_bytes());
        put(offset_of!(Slot, holders), &1u32.to_ne_bytes());
        put(offset_of!(Slot, pid), &42u32.to_ne_bytes());
        put(offset_of!(Slot, role), &1u32.to_ne_bytes());
        put(offset_of!(Slot, best), &1u32.to_ne_bytes());
        put(offset_of!(Slot, family), &4u32.to_ne_bytes());
        put(offset_of!(Slot, local_addr), &[127, 0, 0, 1]);
        put(offset_of!(Slot, local_port), &6379u32.to_ne_bytes());
        put(offset_of!(Slot, tx.mode), &tx_mode::RING.to_ne_bytes());
        put(offset_of!(Slot, tx.prod), &(LEFT | 99).to_ne_bytes());
        put(offset_of!(Slot, reason), &Reason::PeerNoSmc.code().to_ne_bytes());
        let held_by = |pid, near| Holder { pid, program: "redis".to_owned(), near };
        let names = Names::from([(42, held_by(42, true))]);
        let c = decode(&Words(&slot), &names);
        assert_eq!((c.pid, c.program.as_str(), c.role), (42, "redis", Role::Accept));
        assert_eq!(c.local, "127.0.0.1:6379".parse().ok());
        assert_eq!((c.mode_tx, c.mode_rx, c.mode()), (Mode::Shm, Mode::Tcp, Mode::Shm));
        assert_eq!((c.tx_bytes_ring, c.reason, c.stale), (99, Some(Reason::PeerNoSmc), false));
        let relatives = Names::from([(50, held_by(50, true))]);
        assert!(decode(&Words(&slot), &relatives).stale);
        // In a container whose 42 is our 1042.
        let names = Names::from([(1042, held_by(1042, false)), (42, held_by(1042, false))]);
        let c = decode(&Words(&slot), &names);
        assert_eq!((c.pid, c.stale, c.peer_pid), (1042, false, None));
    }

    #[test]
    fn random_bytes_are_numbers_at_worst() {
        let slot: Vec<u8> = (0..SLOT_SIZE).map(|i| (i * 37) as u8).collect();
        decode(&Words(&slot), &Names::new());
        decode(&Words(&slot[..40]), &Names::new());
    }

    #[test]
    fn this_host_can_be_scanned() {
        assert!(connections().is_ok());
        assert!(processes().is_ok());
    }

    #[test]
    fn the_arena_of_this_very_process_is_found() {
        let slot = crate::arena::take().expect("an arena");
        slot.family.store(4, Relaxed);
        slot.local_addr[0].store(u32::from_ne_bytes([127, 0, 0, 9]), Relaxed);
        slot.local_port.store(7, Relaxed);
        slot.rx.tcp.store(1234, Relaxed);
        let mine = |c: &ConnectionInfo| c.pid == std::process::id() && c.local == "127.0.0.9:7".parse().ok();
        let all = connections().expect("/proc");
        let found: Vec<_> = all.iter().filter(|c| mine(c)).collect();
        assert_eq!(found.iter().map(|c| c.rx_bytes_tcp).collect::<Vec<_>>(), [1234]);
        let p =
            processes().expect("/proc").into_iter().find(|p| p.pid == std::process::id()).expect("this one");
        let live = (p.live, p.totals.rx[0]);
        assert!(live.0 >= 1 && live.1 >= 1234, "{live:?}");
        let (alone, its) = process(std::process::id()).expect("this one");
        assert!(alone.totals.rx[0] >= 1234 && its.iter().any(mine));
        crate::arena::give(slot);
        assert!(!connections().expect("/proc").iter().any(mine));
        // Gone, but not forgotten.
        let p =
            processes().expect("/proc").into_iter().find(|p| p.pid == std::process::id()).expect("this one");
        assert!(p.totals.rx[0] >= 1234 && p.totals.connections[0] >= 1);
    }
}
