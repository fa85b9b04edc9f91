//! What aya has no public way for: programs that stay attached to a cgroup when this process is gone, and which they are.
//!
//! An attachment by BPF_PROG_ATTACH belongs to the cgroup; a link, which aya makes, to who holds it, and to keep one there
//! would have to be a file in a bpffs that everybody who wants to detach can find.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Where on a cgroup a program is called (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// What happens to TCP sockets.
    SockOps = 3,
    /// setsockopt(2).
    SetSockOpt = 22,
}

const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const PROG_QUERY: i32 = 16;
/// Others may be attached as well.
const ALLOW_MULTI: u32 = 2;
/// As many programs as a cgroup takes at one hook.
const MOST: usize = 64;

/// `union bpf_attr` of PROG_ATTACH and PROG_DETACH.
#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// That of PROG_QUERY.
#[repr(C)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: *mut u32,
    prog_cnt: u32,
}

fn bpf<T>(command: i32, attr: &mut T) -> io::Result<()> {
    // SAFETY: `attr` is one of the above, as long as told and writable; the one pointer in them is to a buffer of the
    // caller's, as long as told there.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn of(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, hook: Hook, attach_flags: u32) -> Attach {
    let [target_fd, attach_bpf_fd] = [cgroup, program].map(|fd| fd.as_raw_fd() as u32);
    Attach { target_fd, attach_bpf_fd, attach_type: hook as u32, attach_flags, replace_bpf_fd: 0 }
}

/// The program is called for the sockets of a cgroup and those below it, until it is detached or the cgroup is gone.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, hook: Hook) -> io::Result<()> {
    bpf(PROG_ATTACH, &mut of(cgroup, program, hook, ALLOW_MULTI))
}

/// It is called no more.
pub fn detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, hook: Hook) -> io::Result<()> {
    bpf(PROG_DETACH, &mut of(cgroup, program, hook, 0))
}

/// The numbers of the programs that are attached to this very cgroup.
pub fn attached(cgroup: BorrowedFd<'_>, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; MOST];
    let mut query = Query {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: hook as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr(),
        prog_cnt: MOST as u32,
    };
    bpf(PROG_QUERY, &mut query)?;
    ids.truncate(query.prog_cnt as usize);
    Ok(ids)
}
