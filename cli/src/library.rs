//! Finding libsmc.so: `SMC_LIBRARY`, or beside the `smc` command, as builds and packages put it. A command that cargo has
//! installed alone carries the library (see `build.rs`), and puts it below its prefix when it is first asked for.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// What the command carries; empty in what is built with the library beside it.
static CARRIED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libsmc.so"));
/// Another name for each library that is carried: one that programs run under is never written to.
const CARRIED_NAME: &str = env!("SMC_CARRIED");

/// Where the library may be, seen from the folder of the command, best first.
const PLACES: &[&str] = &[
    "libsmc.so",            // target/release, or an unpacked archive
    "../lib/libsmc.so",     // PREFIX/bin and PREFIX/lib
    "../lib/smc/libsmc.so", // a package's own folder
    MULTIARCH,              // a Debian package
    "../lib64/libsmc.so",   // distributions that keep 64-bit libraries apart
    "../release/libsmc.so", // target/debug/smc during development
];

/// Debian keeps the libraries of each processor apart.
const MULTIARCH: &str = if cfg!(target_arch = "aarch64") {
    "../lib/aarch64-linux-gnu/libsmc.so"
} else {
    "../lib/x86_64-linux-gnu/libsmc.so"
};

/// The library, with an absolute path.
///
/// # Errors
/// A sentence that says where it was looked for.
pub fn find(given: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(path) = given {
        return absolute(path)
            .filter(|p| p.is_file())
            .ok_or_else(|| format!("{}: no such library", path.display()));
    }
    if let Some(path) = env::var_os("SMC_LIBRARY").filter(|p| !p.is_empty()).map(PathBuf::from) {
        let found = absolute(&path).filter(|p| p.is_file());
        return found.ok_or_else(|| format!("SMC_LIBRARY={}: no such library", path.display()));
    }
    let command = env::current_exe().map_err(|e| format!("where the smc command lies is unknown: {e}"))?;
    let folder = command.parent().unwrap_or(Path::new("/"));
    if let Some(found) = beside(folder) {
        return Ok(found);
    }
    if !CARRIED.is_empty() && folder.ends_with("bin") {
        let place = folder.join("../lib/smc").join(CARRIED_NAME);
        return put(CARRIED, &place).map_err(|e| {
            format!(
                "libsmc.so can't be put into {}: {e}; set SMC_LIBRARY to the path of one",
                place.display()
            )
        });
    }
    Err({
        // The prefix that this command lies in, if it looks like one.
        let prefix = folder.parent().filter(|_| folder.ends_with("bin")).unwrap_or(folder);
        format!(
            "libsmc.so is not beside {} or in ../lib; in the sources, `cargo xtask install --prefix {}` puts it there, \
             or set SMC_LIBRARY to its path",
            command.display(),
            prefix.display()
        )
    })
}

/// The library in that folder, put there if it is not there yet. Every user may read it.
fn put(library: &[u8], folder: &Path) -> io::Result<PathBuf> {
    let path = folder.join("libsmc.so");
    // Whole, as it was given its name after it was written.
    if !path.is_file() {
        fs::create_dir_all(folder)?;
        let unfinished = folder.join(format!("libsmc.so.{}", std::process::id()));
        fs::write(&unfinished, library)?;
        fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o755))?;
        fs::rename(&unfinished, &path)?;
    }
    path.canonicalize()
}

fn beside(folder: &Path) -> Option<PathBuf> {
    PLACES.iter().map(|p| folder.join(p)).find(|p| p.is_file()).and_then(|p| absolute(&p))
}

/// Symbolic links are followed: the path must mean the same from every working directory.
fn absolute(path: &Path) -> Option<PathBuf> {
    path.canonicalize().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_place_wins() {
        let root = env::temp_dir().join(format!("smc-library-test.{}", std::process::id()));
        let (bin, lib) = (root.join("bin"), root.join("lib/smc"));
        fs::create_dir_all(&bin).expect("a folder");
        fs::create_dir_all(&lib).expect("a folder");
        assert_eq!(beside(&bin), None);
        fs::write(lib.join("libsmc.so"), "").expect("a file");
        assert_eq!(beside(&bin), lib.join("libsmc.so").canonicalize().ok());
        fs::write(bin.join("libsmc.so"), "").expect("a file");
        assert_eq!(beside(&bin), bin.join("libsmc.so").canonicalize().ok());
        fs::remove_dir_all(&root).expect("it was made above");
    }

    #[test]
    fn a_library_is_put_there_once() {
        let root = env::temp_dir().join(format!("smc-carried-test.{}", std::process::id()));
        let path = put(b"one", &root.join("lib/smc/1")).expect("a folder of ours");
        assert_eq!(fs::read(&path).expect("it is there"), b"one");
        assert_eq!(path.metadata().expect("it is there").permissions().mode() & 0o777, 0o755);
        assert_eq!(put(b"two", &root.join("lib/smc/1")).expect("it is there"), path);
        assert_eq!(fs::read(&path).expect("it is there"), b"one", "programs may run under it");
        assert_eq!(fs::read_dir(root.join("lib/smc/1")).expect("a folder").count(), 1);
        fs::write(root.join("file"), "").expect("a file");
        assert!(put(b"one", &root.join("file/smc")).is_err());
        fs::remove_dir_all(&root).expect("it was made above");
    }
}
