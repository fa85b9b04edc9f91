//! The TCP option that says "SMC-R" (RFC 7609 section 3.1), on what this process connects and accepts, by a sockops
//! program.
//!
//! ```text
//!  connect(), listen()   ask to be called for the header
//!  length                SYN, or SYN-ACK to one that had it? reserve 6 bytes
//!  write                 the same? 254, 6, "SMCR" in EBCDIC
//!  established           ask no more
//! ```

use std::fs;
use std::io;

/// One instruction as the kernel has it: code, registers, offset, value.
type Insn = [u8; 8];

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    let ([o0, o1], [i0, i1, i2, i3]) = (off.to_le_bytes(), imm.to_le_bytes());
    [code, src << 4 | dst, o0, o1, i0, i1, i2, i3]
}

// Offsets in struct bpf_sock_ops, and its operations (linux/bpf.h).
const OP: i16 = 0;
const CB_FLAGS: i16 = 84;
const TCP_FLAGS: i16 = 212;
const CONNECT: i32 = 3;
const ESTABLISHED: [i32; 2] = [4, 5];
const LISTEN: i32 = 11;
const OPTION_LEN: i32 = 14;
const OPTION_WRITE: i32 = 15;
const WRITE_OPTIONS: i32 = 1 << 6;
const SYN: i32 = 0x02;
const ACK: i32 = 0x10;

// Helpers.
const FLAGS_SET: i32 = 59;
const LOAD: i32 = 142;
/// To [`LOAD`]: of the SYN that is answered.
const OF_SYN: i32 = 1;
const STORE: i32 = 143;
const RESERVE: i32 = 144;

fn program() -> Vec<Insn> {
    let load = |dst, off| insn(0x61, dst, 6, off, 0);
    let call = |helper| insn(0x85, 0, 0, 0, helper);
    let mov = |dst, imm| insn(0xb7, dst, 0, 0, imm);
    let copy = |dst, src| insn(0xbf, dst, src, 0, 0);
    // Ends with 1: go on.
    let end = [mov(0, 1), insn(0x95, 0, 0, 0, 0)];
    let set_flags = |change: Insn| [load(2, CB_FLAGS), change, copy(1, 6), call(FLAGS_SET), end[0], end[1]];
    let on_connect = set_flags(insn(0x47, 2, 0, 0, WRITE_OPTIONS));
    let on_established = set_flags(insn(0x57, 2, 0, 0, !WRITE_OPTIONS));
    // The option's six bytes, on the stack.
    let magic = i32::from_le_bytes([254, 6, 0xe2, 0xd4]);
    let rest = i32::from(u16::from_le_bytes([0xc3, 0xd9]));
    let option = |helper: i32, last: i32| {
        [
            insn(0x62, 10, 0, -8, magic),
            insn(0x6a, 10, 0, -4, rest),
            copy(1, 6),
            copy(2, 10),
            insn(0x07, 2, 0, 0, -8),
            mov(3, 6),
            mov(4, last),
            call(helper),
        ]
    };
    // A SYN, or a SYN-ACK to one with the option; otherwise over the next `n`.
    let gate = |n: i16| {
        let mut all = vec![
            load(2, TCP_FLAGS),
            copy(3, 2),
            insn(0x57, 3, 0, 0, SYN),
            insn(0x15, 3, 0, 11 + n, 0),
            insn(0x57, 2, 0, 0, ACK),
            insn(0x15, 2, 0, 9, 0),
        ];
        all.extend(option(LOAD, OF_SYN));
        all.push(insn(0xd5, 0, 0, n, 0));
        all
    };
    let reserve = [copy(1, 6), mov(2, 6), mov(3, 0), call(RESERVE)];
    let store = option(STORE, 0);
    let part = |op: i32, body: Vec<Insn>| {
        let mut all = vec![insn(0x55, 7, 0, body.len() as i16, op)];
        all.extend(body);
        all
    };
    let mut all = vec![copy(6, 1), load(7, OP)];
    for op in [CONNECT, LISTEN] {
        all.extend(part(op, on_connect.to_vec()));
    }
    for op in ESTABLISHED {
        all.extend(part(op, on_established.to_vec()));
    }
    all.extend(part(OPTION_LEN, [&gate(4)[..], &reserve, &end].concat()));
    all.extend(part(OPTION_WRITE, [&gate(8)[..], &store, &end].concat()));
    all.extend(end);
    all
}

fn bpf(cmd: i64, attr: &mut [u64; 16]) -> io::Result<i64> {
    // SAFETY: `attr` is as large as told, and what it points to lives until the call returns.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, cmd, attr.as_mut_ptr(), size_of_val(attr)) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// From now on, this process's SYNs carry the option. Needs root; lasts as long as the VM.
pub fn offer_smc() -> io::Result<()> {
    const GROUP: &str = "/sys/fs/cgroup/smc-test";
    const SOCK_OPS: (u64, u64) = (13, 3); // program type, attach type
    if let Err(e) = fs::create_dir(GROUP)
        && e.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(e);
    }
    let code = program();
    let mut log = vec![0u8; 1 << 16];
    let mut attr = [0u64; 16];
    attr[0] = SOCK_OPS.0 | (code.len() as u64) << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = c"GPL".as_ptr() as u64;
    attr[3] = 1 | (log.len() as u64) << 32;
    attr[4] = log.as_mut_ptr() as u64;
    let prog = bpf(5, &mut attr).map_err(|e| {
        let end = log.iter().position(|b| *b == 0).unwrap_or(0);
        io::Error::new(e.kind(), format!("{e}: {}", String::from_utf8_lossy(&log[..end])))
    })?;
    let dir = fs::File::open(GROUP)?;
    let mut attr = [0u64; 16];
    attr[0] = std::os::fd::AsRawFd::as_raw_fd(&dir) as u64 | (prog as u64) << 32;
    attr[1] = SOCK_OPS.1;
    bpf(8, &mut attr)?;
    fs::write(format!("{GROUP}/cgroup.procs"), std::process::id().to_string())
}
