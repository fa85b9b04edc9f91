//! Can a program be preloaded into? The dynamic loader reads LD_PRELOAD, so: a 64-bit ELF of this machine
//! that asks for the C library's loader, and gets no rights from its file.
//!
//! ld.so(8) ignores LD_PRELOAD silently, or with a warning that drowns in the program's output, in all other
//! cases; `smc run` says it before.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What the kernel would start for a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// Dynamic, with this loader.
    Dynamic(PathBuf),
    /// No loader: LD_PRELOAD means nothing to it.
    Static,
    /// A 32-bit program.
    Bits32,
    /// A program of another processor.
    Foreign,
    /// `#!`: this program is started in its place.
    Script(PathBuf),
    /// Not a program.
    Other,
}

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const PT_INTERP: u32 = 3;
/// Program headers looked at: real programs have about a dozen.
const MAX_HEADERS: u16 = 256;
/// `#!` lines followed: the kernel's own limit is five.
const MAX_SCRIPTS: usize = 5;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("libsmc is for x86_64 and aarch64");

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

/// Looks at a file's first bytes and its loader.
///
/// # Errors
/// If it can't be read.
pub fn kind(path: &Path) -> io::Result<Kind> {
    let file = File::open(path)?;
    let mut head = vec![0; 256];
    let n = file.read_at(&mut head, 0)?;
    head.truncate(n);
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii();
        let program = line.split(|b| b.is_ascii_whitespace()).next().unwrap_or_default();
        return Ok(Kind::Script(PathBuf::from(OsStr::from_bytes(program))));
    }
    if head.len() < 64 || !head.starts_with(b"\x7fELF") {
        return Ok(Kind::Other);
    }
    match (head[4], head[5], u16::from_le_bytes(number(&head, 18))) {
        (CLASS_32, ..) => return Ok(Kind::Bits32),
        (CLASS_64, LITTLE_ENDIAN, MACHINE) => {}
        _ => return Ok(Kind::Foreign),
    }
    let table = u64::from_le_bytes(number(&head, 32));
    let size = u16::from_le_bytes(number(&head, 54));
    let count = u16::from_le_bytes(number(&head, 56)).min(MAX_HEADERS);
    for i in 0..count {
        let mut header = [0; 56];
        let Some(at) = table.checked_add(u64::from(i) * u64::from(size)) else { break };
        if file.read_exact_at(&mut header, at).is_err() {
            break;
        }
        if u32::from_le_bytes(number(&header, 0)) == PT_INTERP {
            let at = u64::from_le_bytes(number(&header, 8));
            let length = u64::from_le_bytes(number(&header, 32)).min(4096) as usize;
            let mut name = vec![0; length];
            file.read_exact_at(&mut name, at)?;
            name.truncate(name.iter().position(|b| *b == 0).unwrap_or(length));
            return Ok(Kind::Dynamic(PathBuf::from(OsString::from_vec(name))));
        }
    }
    Ok(Kind::Static)
}

/// Why the loader would not preload into this program; `None`: it would.
///
/// # Errors
/// If the file can't be read.
pub fn obstacle(path: &Path) -> io::Result<Option<String>> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_SCRIPTS {
        if let Some(why) = privileged(&path)? {
            return Ok(Some(format!("{} {why}, so the loader ignores LD_PRELOAD", path.display())));
        }
        let why = match kind(&path)? {
            // The kernel starts the script's interpreter; rights on the script itself mean nothing.
            Kind::Script(by) => {
                path = by;
                continue;
            }
            Kind::Dynamic(loader) => {
                let name = loader.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !name.starts_with("ld-musl") {
                    return Ok(None);
                }
                "is linked with musl; libsmc.so needs the GNU C library".to_owned()
            }
            Kind::Static => "is statically linked, so nothing can be preloaded into it".to_owned(),
            Kind::Bits32 => "is a 32-bit program; libsmc.so is 64-bit".to_owned(),
            Kind::Foreign => "is a program for another kind of processor".to_owned(),
            // A shell runs it, or exec says what is wrong.
            Kind::Other => return Ok(None),
        };
        return Ok(Some(format!("{} {why}", path.display())));
    }
    Ok(None)
}

/// Rights that a file gives put the loader into secure-execution mode.
fn privileged(path: &Path) -> io::Result<Option<&'static str>> {
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2010; // without the group's execute bit it means mandatory locking
    let meta = path.metadata()?;
    let root = rustix::process::geteuid().is_root();
    let setuid = meta.mode() & SETUID != 0 && meta.uid() != rustix::process::getuid().as_raw();
    let setgid = meta.mode() & SETGID == SETGID && meta.gid() != rustix::process::getgid().as_raw();
    let capable = || rustix::fs::getxattr(path, "security.capability", &mut [0u8; 64]).is_ok_and(|n| n > 0);
    Ok(match () {
        () if setuid => Some("is setuid"),
        () if setgid => Some("is setgid"),
        () if !root && capable() => Some("has file capabilities"),
        () => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn file(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("smc-elf-test.{}.{name}", std::process::id()));
        fs::write(&path, bytes).expect("a file");
        path
    }

    fn why(path: &Path) -> String {
        obstacle(path).expect("a file").unwrap_or_default()
    }

    fn header(class: u8, machine: u16) -> Vec<u8> {
        let mut h = vec![0; 64];
        h[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        h[18..20].copy_from_slice(&machine.to_le_bytes());
        h
    }

    #[test]
    fn this_program_can_be_preloaded_into() {
        let me = std::env::current_exe().expect("a path");
        assert!(matches!(kind(&me), Ok(Kind::Dynamic(_))));
        assert_eq!(why(&me), "");
    }

    #[test]
    fn others_are_refused_with_the_reason() {
        for (name, class, machine, say) in [
            ("static", CLASS_64, MACHINE, "statically linked"),
            ("32bit", CLASS_32, 3, "32-bit"),
            ("foreign", CLASS_64, 8, "another kind of processor"),
        ] {
            let path = file(name, &header(class, machine));
            assert!(why(&path).contains(say), "{name}: {}", why(&path));
            fs::remove_file(path).expect("it was made above");
        }
    }

    #[test]
    fn musl_is_told_by_its_loader() {
        let mut bytes = header(CLASS_64, MACHINE);
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        let loader = b"/lib/ld-musl-x86_64.so.1\0";
        let mut interp = vec![0; 56];
        interp[..4].copy_from_slice(&PT_INTERP.to_le_bytes());
        interp[8..16].copy_from_slice(&120u64.to_le_bytes());
        interp[32..40].copy_from_slice(&(loader.len() as u64).to_le_bytes());
        bytes.extend(interp);
        bytes.extend(loader);
        let path = file("musl", &bytes);
        assert!(why(&path).contains("musl"));
        fs::remove_file(path).expect("it was made above");
    }

    #[test]
    fn a_script_is_what_its_interpreter_is() {
        let stat = file("interpreter", &header(CLASS_64, MACHINE));
        let script = file("script", format!("#! {} -x\n", stat.display()).as_bytes());
        assert!(why(&script).contains("statically linked"));
        fs::remove_file(stat).expect("it was made above");
        fs::remove_file(script).expect("it was made above");
    }

    #[test]
    fn a_setuid_file_of_somebody_else_is_refused() {
        let path = file("setuid", &header(CLASS_64, MACHINE));
        let chowned = std::os::unix::fs::chown(&path, Some(1), None).is_ok();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).expect("our file");
        // Only root can give a file away; for others it is their own and changes nothing.
        assert_eq!(why(&path).contains("is setuid"), chowned, "{}", why(&path));
        fs::remove_file(path).expect("it was made above");
    }
}
