//! The Debian package. dpkg-deb puts the archive together; what goes into it is written here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tree::{Layout, Parts, Tree, lay};
use super::{MACHINE, Release, date, output};
use crate::shell;

/// Where those are met who made it, unless DEBFULLNAME and DEBEMAIL name somebody else.
const MAINTAINER: (&str, &str) = ("The libsmc developers", "libsmc@users.noreply.github.com");

const DESCRIPTION: &str = "\
TCP connections over shared memory, for programs as they are
 Programs that are started under libsmc and talk to each other over TCP on one
 host move their bytes through memory that they share, in place of the kernel's
 TCP stack. Nothing is recompiled or configured, and peers that do not run under
 libsmc are talked to by TCP as ever.
 .
 The package has the library for LD_PRELOAD and the command smc, which runs
 programs under it, shows their connections and measures them.
";

/// Why what lintian would say of it is as it should be.
fn overrides(libraries: impl Iterator<Item = &'static str>) -> String {
    let mut text = String::from(
        "# Loaded by name (LD_PRELOAD=libsmc.so), never linked with: no soname, and nothing for ldconfig to know.\n",
    );
    for name in libraries {
        text += &format!("libsmc: sharedobject-in-library-directory-missing-soname [usr/lib/*/{name}]\n");
    }
    text + "# Made where it is developed, and not uploaded to Debian.\nlibsmc: initial-upload-closes-no-bugs *\n"
}

/// Makes the package; returns where it is.
pub fn make(release: &Release, parts: &Parts, work: &Path, into: &Path) -> io::Result<PathBuf> {
    let layout = Layout::debian();
    let tree = Tree(work);
    lay(&layout, release, parts, work)?;
    let doc = layout.documents();
    let version = format!("{}-1", release.version);
    let maintainer = maintainer();
    let changelog = format!(
        "libsmc ({version}) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- {maintainer}  {}\n",
        date(release.epoch, "+%a, %d %b %Y %H:%M:%S +0000")?
    );
    tree.write_gz(&format!("{doc}/changelog"), fs::read(shell::root().join("CHANGELOG.md"))?)?;
    tree.write_gz(&format!("{doc}/changelog.Debian"), changelog)?;
    tree.write(&format!("{doc}/copyright"), copyright(release)?, 0o644)?;
    let libraries = parts.programs().map(|(name, _)| name).filter(|n| n.ends_with(".so"));
    tree.write("usr/share/lintian/overrides/libsmc", overrides(libraries), 0o644)?;

    let files = files(work)?;
    let mut md5sum = Command::new("md5sum");
    let sums = output(md5sum.current_dir(work).arg("--").args(&files))?;
    let mut control = format!(
        "Package: libsmc\nVersion: {version}\nArchitecture: {}\nMaintainer: {maintainer}\nInstalled-Size: {}\n\
         Depends: {}\n",
        MACHINE.1,
        installed(work, &files)?,
        depends(parts)?
    );
    if parts.programs().any(|(name, _)| name == "libsmc-rdma.so") {
        control += "Suggests: ibverbs-providers, libibverbs1, librdmacm1\n";
    }
    control += "Section: net\nPriority: optional\nHomepage: https://github.com/libsmc/libsmc\n";
    control += &format!("Description: {DESCRIPTION}");
    tree.write("DEBIAN/md5sums", sums, 0o644)?;
    tree.write("DEBIAN/control", control, 0o644)?;

    let package = into.join(format!("libsmc_{version}_{}.deb", MACHINE.1));
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.args(["--root-owner-group", "-Zxz", "--build"]).arg(work).arg(&package);
    output(dpkg.env("SOURCE_DATE_EPOCH", release.epoch.to_string()))?;
    Ok(package)
}

fn maintainer() -> String {
    let or = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    format!("{} <{}>", or("DEBFULLNAME", MAINTAINER.0), or("DEBEMAIL", MAINTAINER.1))
}

/// All files below a folder, in order, as paths from there.
fn files(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(root).expect("below it").to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// In KiB, as Debian's policy counts: each file rounded up, one for each folder.
fn installed(root: &Path, files: &[PathBuf]) -> io::Result<u64> {
    let mut sum = 0;
    for file in files {
        sum += fs::metadata(root.join(file))?.len().div_ceil(1024);
    }
    let folders: std::collections::BTreeSet<_> = files.iter().flat_map(|f| f.ancestors().skip(1)).collect();
    Ok(sum + folders.len() as u64)
}

/// What smc and libsmc.so need. libsmc-rdma.so is loaded where its libraries are, and else left alone.
fn depends(parts: &Parts) -> io::Result<String> {
    let mut least = BTreeMap::new();
    for (_, path) in parts.programs().filter(|(name, _)| *name != "libsmc-rdma.so") {
        let text = output(Command::new("readelf").args(["-V", "-W"]).arg(path).env("LC_ALL", "C"))?;
        for (package, version) in needs(&String::from_utf8_lossy(&text)) {
            let so_far = least.entry(package).or_insert_with(Vec::new);
            if version > *so_far {
                *so_far = version;
            }
        }
    }
    let dotted = |v: &[u32]| v.iter().map(u32::to_string).collect::<Vec<_>>().join(".");
    let all: Vec<_> = least.iter().map(|(package, v)| format!("{package} (>= {})", dotted(v))).collect();
    if all.is_empty() {
        Err(io::Error::other("readelf names no versions of libc"))
    } else {
        Ok(all.join(", "))
    }
}

/// The versions that a program was linked with: `Name: GLIBC_2.34  Flags: none  Version: 5`.
fn needs(text: &str) -> Vec<(&'static str, Vec<u32>)> {
    const PACKAGES: [(&str, &str); 2] = [("GLIBC_", "libc6"), ("GCC_", "libgcc-s1")];
    let names = text.lines().filter_map(|l| l.split_once("Name: ")?.1.split_whitespace().next());
    let known = |name: &str| {
        let (version, package) =
            PACKAGES.iter().find_map(|(p, package)| Some((name.strip_prefix(p)?, *package)))?;
        Some((package, version.split('.').map(str::parse).collect::<Result<Vec<u32>, _>>().ok()?))
    };
    names.filter_map(known).collect()
}

/// In Debian's own form.
fn copyright(release: &Release) -> io::Result<String> {
    let mit = fs::read_to_string(shell::root().join("LICENSE-MIT"))?;
    let holder =
        mit.lines().find(|l| l.starts_with("Copyright")).unwrap_or("Copyright the libsmc developers");
    let body = mit.split_once("Permission is").map_or(mit.as_str(), |(_, b)| b);
    let folded: String = format!("Permission is{body}")
        .trim()
        .lines()
        .map(|l| if l.trim().is_empty() { " .\n".into() } else { format!(" {l}\n") })
        .collect();
    Ok(format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: libsmc\nSource: https://github.com/libsmc/libsmc\n\
         Comment: The crates that are linked in, with their licences, are in THIRD-PARTY.gz.\n\n\
         Files: *\nCopyright: {} {}\nLicense: Apache-2.0 or Expat\n\n\
         License: Apache-2.0\n On Debian systems, the full text of the Apache License, Version 2.0 can be found\n in the file \
         /usr/share/common-licenses/Apache-2.0.\n\nLicense: Expat\n{folded}",
        date(release.epoch, "+%Y")?,
        holder.trim_start_matches("Copyright").trim_start_matches(" (c)").trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_counts() {
        let text = "  000000: Version: 1  File: libc.so.6  Cnt: 2\n  0x0010:   Name: GLIBC_2.34  Flags: none  Version: 5\n  \
                    0x0020:   Name: GLIBC_2.4  Flags: none  Version: 6\n   Name: GCC_4.2.0  Flags: none\n";
        let mut found = needs(text);
        found.sort();
        assert_eq!(found.pop(), Some(("libgcc-s1", vec![4, 2, 0])));
        assert_eq!(found.pop(), Some(("libc6", vec![2, 34])));
    }
}
