//! The files of a release, and where they lie: below one folder in the archive, below `/usr` in the Debian package.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Release, output};
use crate::shell;

/// Documents beside those in `docs/`.
const DOCUMENTS: &[&str] = &["README.md", "SECURITY.md"];

/// What was built.
pub struct Parts {
    command: PathBuf,
    library: PathBuf,
    rdma: Option<PathBuf>,
}

impl Parts {
    /// The folders that cargo builds the workspace in, and `rdma/`.
    pub fn of(release: &Path, rdma: Option<&Path>) -> io::Result<Self> {
        let there = |path: PathBuf| {
            if path.is_file() {
                Ok(path)
            } else {
                Err(io::Error::other(format!("{}: `cargo build --release` comes first", path.display())))
            }
        };
        Ok(Self {
            command: there(release.join("smc"))?,
            library: there(release.join("libsmc.so"))?,
            rdma: rdma.map(|r| there(r.join("libsmc_rdma.so"))).transpose()?,
        })
    }

    /// With the names that they are installed by.
    pub fn programs(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let always = [("smc", &self.command), ("libsmc.so", &self.library)];
        let all = always.into_iter().chain(self.rdma.as_ref().map(|r| ("libsmc-rdma.so", r)));
        all.map(|(name, path)| (name, path.as_path()))
    }
}

/// Where kinds of files go.
pub struct Layout {
    /// What `bin` and `share` lie in.
    pub prefix: String,
    /// The libraries' folder.
    pub lib: String,
    /// Debian's rules: pages compressed, one file for all licences, the place of zsh's completions.
    pub debian: bool,
}

impl Layout {
    /// An archive that is unpacked anywhere, or a prefix.
    pub fn archive(name: &str) -> Self {
        Self { prefix: name.into(), lib: format!("{name}/lib"), debian: false }
    }

    pub fn debian() -> Self {
        Self { prefix: "usr".into(), lib: format!("usr/lib/{}", super::MACHINE.0), debian: true }
    }

    pub fn documents(&self) -> String {
        format!("{}/share/doc/libsmc", self.prefix)
    }
}

/// A folder that is being filled.
pub struct Tree<'a>(pub &'a Path);

impl Tree<'_> {
    pub fn write(&self, place: &str, bytes: impl AsRef<[u8]>, mode: u32) -> io::Result<()> {
        let path = self.0.join(place);
        let folder = path.parent().expect("below the root");
        fs::create_dir_all(folder)?;
        for f in folder.ancestors().take_while(|f| f.starts_with(self.0)) {
            fs::set_permissions(f, fs::Permissions::from_mode(0o755))?;
        }
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
    }

    /// As `NAME.gz`.
    pub fn write_gz(&self, place: &str, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.write(place, bytes, 0o644)?;
        output(Command::new("gzip").arg("-9nf").arg(self.0.join(place)))?;
        Ok(())
    }
}

/// Lays out all files below `into`.
pub fn lay(layout: &Layout, release: &Release, parts: &Parts, into: &Path) -> io::Result<()> {
    let tree = Tree(into);
    let root = shell::root();
    let (prefix, lib, doc) = (&layout.prefix, &layout.lib, layout.documents());
    for (name, path) in parts.programs() {
        let (place, mode) = if name == "smc" {
            (format!("{prefix}/bin/smc"), 0o755)
        } else {
            (format!("{lib}/{name}"), 0o644)
        };
        tree.write(&place, fs::read(path)?, mode)?;
        // Symbols that are exported stay: the loader's, and those for probes.
        output(
            Command::new("strip").arg("--strip-unneeded").args(["-R", ".comment"]).arg(into.join(&place)),
        )?;
    }
    pages(layout, parts, &tree)?;
    let completions = [
        ("bash", format!("{prefix}/share/bash-completion/completions/smc")),
        (
            "zsh",
            format!(
                "{prefix}/share/zsh/{}/_smc",
                if layout.debian { "vendor-completions" } else { "site-functions" }
            ),
        ),
        ("fish", format!("{prefix}/share/fish/vendor_completions.d/smc.fish")),
    ];
    for (shell, place) in completions {
        tree.write(&place, output(Command::new(&parts.command).args(["completions", shell]))?, 0o644)?;
    }
    tree.write(&format!("{lib}/pkgconfig/libsmc.pc"), pkg_config(layout, release), 0o644)?;
    for name in DOCUMENTS {
        tree.write(&format!("{doc}/{name}"), fs::read(root.join(name))?, 0o644)?;
    }
    for entry in fs::read_dir(root.join("docs"))?.flatten() {
        if entry.path().is_file() {
            tree.write(
                &format!("{doc}/docs/{}", entry.file_name().display()),
                fs::read(entry.path())?,
                0o644,
            )?;
        }
    }
    let others = others()?;
    if !layout.debian {
        tree.write(&format!("{doc}/CHANGELOG.md"), fs::read(root.join("CHANGELOG.md"))?, 0o644)?;
        for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
            tree.write(&format!("{doc}/{name}"), fs::read(root.join(name))?, 0o644)?;
        }
        tree.write(&format!("{doc}/THIRD-PARTY"), others, 0o644)?;
    } else {
        tree.write_gz(&format!("{doc}/THIRD-PARTY"), others)?;
    }
    Ok(())
}

/// The man pages, as the command itself writes them.
fn pages(layout: &Layout, parts: &Parts, tree: &Tree<'_>) -> io::Result<()> {
    let work = shell::Folder::new("man")?;
    output(Command::new(&parts.command).args(["man", "--into"]).arg(work.path()))?;
    for entry in fs::read_dir(work.path())?.flatten() {
        let place = format!("{}/share/man/man1/{}", layout.prefix, entry.file_name().display());
        let page = fs::read(entry.path())?;
        if layout.debian { tree.write_gz(&place, page)? } else { tree.write(&place, page, 0o644)? }
    }
    Ok(())
}

/// There is nothing to link with; what others want to know is where the library lies.
fn pkg_config(layout: &Layout, release: &Release) -> String {
    let (prefix, lib) = if layout.debian {
        ("/usr".to_string(), format!("${{prefix}}/lib/{}", super::MACHINE.0))
    } else {
        ("${pcfiledir}/../..".to_string(), "${prefix}/lib".to_string())
    };
    format!(
        "prefix={prefix}\nlibdir={lib}\n# For LD_PRELOAD: pkg-config --variable=preload libsmc\npreload=${{libdir}}/libsmc.so\n\n\
         Name: libsmc\nDescription: TCP connections over shared memory, for programs as they are\n\
         URL: https://github.com/libsmc/libsmc\nVersion: {}\n",
        release.version
    )
}

/// The crates that are linked in, each with its licences: their terms ask for that.
fn others() -> io::Result<String> {
    let mut cargo = shell::cargo();
    cargo.args(["tree", "--locked", "--offline", "-p", "smc-cli", "-p", "smc-preload"]);
    cargo.args(["--edges", "normal", "--prefix", "none", "--no-dedupe", "--format", "{p}|{l}|{r}"]);
    let listed = output(&mut cargo)?;
    let lines: BTreeSet<String> = String::from_utf8_lossy(&listed).lines().map(str::to_string).collect();
    let sources = sources()?;
    let mut text = String::from(
        "Linked into smc and libsmc.so, beside Rust's own library (MIT or Apache-2.0, \
         https://github.com/rust-lang/rust):\n",
    );
    for line in &lines {
        let [package, licence, home] = line.split('|').collect::<Vec<_>>()[..] else { continue };
        // Our own stand with a path.
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next().and_then(|v| v.strip_prefix('v')))
        else {
            continue;
        };
        if package.contains("(/") {
            continue;
        }
        text += &format!("\n==== {name} {version}: {licence}\n{home}\n");
        let folder = sources.iter().map(|s| s.join(format!("{name}-{version}"))).find(|s| s.is_dir());
        let folder =
            folder.ok_or_else(|| io::Error::other(format!("the source of {name} {version} is not here")))?;
        let mut files: Vec<_> =
            fs::read_dir(folder)?.flatten().map(|e| e.path()).filter(|p| is_licence(p)).collect();
        files.sort();
        for file in files {
            text += &format!("\n{}\n", String::from_utf8_lossy(&fs::read(file)?).trim());
        }
    }
    Ok(text)
}

/// Where cargo unpacks what it fetches.
fn sources() -> io::Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let home = home.ok_or_else(|| io::Error::other("neither CARGO_HOME nor HOME is set"))?;
    Ok(fs::read_dir(home.join("registry/src"))?.flatten().map(|e| e.path()).collect())
}

/// Not the Apache licence's own text, forty times: it is in LICENSE-APACHE.
fn is_licence(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
    let named = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"]
        .iter()
        .any(|n| name.starts_with(n));
    named && path.is_file() && !name.contains("APACHE")
}
