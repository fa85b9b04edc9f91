//! Finding libsmc.so: `SMC_LIBRARY`, or beside the `smc` command, as builds and packages put it.

use std::env;
use std::path::{Path, PathBuf};

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
    beside(folder).ok_or_else(|| {
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
    use std::fs;

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
}
