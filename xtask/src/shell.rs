//! Running other programs, and where things are.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

/// The checkout.
pub fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Where cargo builds: `CARGO_TARGET_DIR` or `target`.
pub fn target_dir() -> PathBuf {
    let dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    root().join(dir)
}

/// The cargo that started this.
pub fn cargo() -> Command {
    let mut c = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What is built here has the library beside the command.
    c.current_dir(root()).stdin(Stdio::null()).env("SMC_CARRY_LIBRARY", "0");
    c
}

/// `PATH` with the folders of servers, which are not in every user's.
pub fn path_with_sbin() -> String {
    format!("{}:/usr/local/sbin:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default())
}

/// Finds a program.
pub fn which(program: &str) -> Option<PathBuf> {
    path_with_sbin().split(':').map(|d| Path::new(d).join(program)).find(|p| p.is_file())
}

/// Whether this runs as root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// A folder for what is needed only now; it goes with this.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("smc-{name}-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it lies where temporary files do.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a command to its end, passing its standard output on and keeping it.
pub fn tee(command: &mut Command) -> io::Result<(ExitStatus, Vec<String>)> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut lines = Vec::new();
    let out = BufReader::new(child.stdout.take().expect("piped above"));
    for line in out.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        lines.push(line);
    }
    Ok((child.wait()?, lines))
}

/// What a program left behind.
#[derive(Debug)]
pub struct Finished {
    /// `None`: it did not end in time and was killed.
    pub status: Option<ExitStatus>,
    /// Its standard output and, where it was piped, standard error.
    pub output: String,
}

/// A child that is killed when dropped, so that no failure leaves a server running.
#[derive(Debug)]
pub struct Running {
    child: Child,
    readers: Vec<thread::JoinHandle<String>>,
}

impl Running {
    /// Starts a program without input, collecting what it prints.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(
                |e| io::Error::new(e.kind(), format!("{}: {e}", command.get_program().to_string_lossy())),
            )?;
        let collect = |mut from: Box<dyn Read + Send>| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                // A killed child's pipe just ends; what came until then is what there is.
                let _ = from.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let out = collect(Box::new(child.stdout.take().expect("piped above")));
        let err = collect(Box::new(child.stderr.take().expect("piped above")));
        Ok(Self { child, readers: vec![out, err] })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for its end, calling `meanwhile` again and again; kills it after `limit`.
    pub fn finish(mut self, limit: Duration, mut meanwhile: impl FnMut()) -> io::Result<Finished> {
        let start = Instant::now();
        let mut status = None;
        while start.elapsed() < limit {
            status = self.child.try_wait()?;
            if status.is_some() {
                break;
            }
            meanwhile();
            thread::sleep(Duration::from_millis(10));
        }
        self.stop();
        let output = self.readers.drain(..).map(|r| r.join().unwrap_or_default()).collect();
        Ok(Finished { status, output })
    }

    /// Asks it to end, as an administrator would (SIGINT), so that its own children end with it.
    pub fn end(self, limit: Duration) -> io::Result<()> {
        let kill = Command::new("kill").args(["-INT", &self.pid().to_string()]).status()?;
        if kill.success() {
            self.finish(limit, || {})?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}
