//! Real, unmodified programs: byte-exact under the preload, and upgraded by their own statistics.
//!
//! Each test runs a server and its clients. With both sides under the preload the counters of both must show
//! connections in shared memory, and for big transfers nearly all bytes there. With one side only (`::server_only`,
//! `::client_only`) everything stays TCP, and works the same.
//!
//!     cargo test --test programs redis             all tests with this in their name
//!     SMC_LIB=none cargo test --test programs      no preload: do the tests themselves work?
//!
//! The Debian packages are in `tests/packages.txt`; a test whose program is missing is left out and says so, or
//! fails when CI or SMC_TEST_ALL is set.

mod bodies;
#[path = "../harness/mod.rs"]
mod harness;

use harness::{Done, Lib, Run, Running, Stats, ensure, left_out, program};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{process::Command, time::Duration};

/// Which sides are under the preload.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sides {
    Both,
    ServerOnly,
    ClientOnly,
}

/// A test of one program.
pub struct Program {
    name: &'static str,
    /// What must be installed.
    needs: &'static [&'static str],
    /// Also run with only one side under the preload.
    mixed: bool,
    run: fn(&Pair) -> Result<(), Failed>,
}

/// A server and its clients in one folder.
pub struct Pair {
    server: Run,
    client: Run,
    sides: Option<Sides>,
}

impl Pair {
    fn new(name: &str, lib: &Lib, sides: Sides) -> Self {
        let mut p =
            Pair { server: Run::new(name), client: Run::new(name), sides: (!lib.is_none()).then_some(sides) };
        for (run, side) in [(&mut p.server, Sides::ServerOnly), (&mut p.client, Sides::ClientOnly)] {
            run.limit(Duration::from_secs(150));
            if sides == Sides::Both || sides == side {
                run.preload_copy(lib);
            }
        }
        p
    }

    /// The folder of the server's files.
    pub fn dir(&self) -> &std::path::Path {
        self.server.dir()
    }

    pub fn path(&self, name: &str) -> String {
        self.server.path(name).display().to_string()
    }

    /// Starts the server and waits until it listens.
    pub fn serve(&self, cmd: Command, port: u16) -> Result<Running, Failed> {
        let mut s = self.server.start("server", cmd)?;
        s.until_listening(port)?;
        Ok(s)
    }

    /// Something that prepares the ground: never under the preload.
    pub fn prepare(&self, name: &str, cmd: Command) -> Result<String, Failed> {
        Run::new(name).output_as(name, cmd)?.ok()
    }

    /// Runs a client to its successful end and gives its stdout.
    pub fn client(&self, name: &str, cmd: Command) -> Result<String, Failed> {
        let done = self.client.output_as(name, cmd)?;
        self.look_at(name, &done.stats, 0.0)?;
        done.ok()
    }

    /// The same for a big transfer, of which this part must have gone through shared memory.
    pub fn big_client(&self, name: &str, cmd: Command, share: f64) -> Result<String, Failed> {
        let done = self.client.output_as(name, cmd)?;
        self.look_at(name, &done.stats, share)?;
        done.ok()
    }

    /// A client too short, or of a kind, to be upgraded.
    pub fn small_client(&self, name: &str, cmd: Command) -> Result<String, Failed> {
        self.client.output_as(name, cmd)?.ok()
    }

    /// A client that runs on beside others.
    pub fn client_start(&self, name: &str, cmd: Command) -> Result<Running, Failed> {
        self.client.start(name, cmd)
    }

    /// Ends the server and looks at its counters.
    pub fn stop(&self, s: Running, sig: i32, share: f64) -> Result<Done, Failed> {
        let done = s.stop(sig)?;
        self.look_at("server", &done.stats, share)?;
        Ok(done)
    }

    /// Waits for a server that ends by itself.
    pub fn ends(&self, s: Running, share: f64) -> Result<(), Failed> {
        let done = s.finish()?;
        self.look_at("server", &done.stats, share)?;
        done.ok().map(|_| ())
    }

    /// Both sides preloaded: upgraded. One side: TCP. None, or not this side: nothing to see.
    pub fn look_at(&self, name: &str, s: &Stats, share: f64) -> Result<(), Failed> {
        let server = name == "server";
        match self.sides {
            None => Ok(()),
            Some(Sides::Both) => {
                ensure(s.files > 0, || format!("{name} wrote no statistics at its exit"))?;
                ensure(s.shm > 0, || format!("{name}: nothing was upgraded: {s:?}"))?;
                let got = s.shm_share();
                ensure(got >= share, || format!("{name}: only {got:.3} of the bytes in memory: {s:?}"))
            }
            Some(Sides::ServerOnly) if !server => Ok(()),
            Some(Sides::ClientOnly) if server => Ok(()),
            Some(_) => {
                ensure(s.files > 0, || format!("{name} wrote no statistics at its exit"))?;
                ensure(s.shm == 0 && s.rdma == 0, || format!("{name}: upgraded to whom? {s:?}"))
            }
        }
    }
}

fn one(p: &'static Program, name: &str, sides: Sides) -> Result<libtest_mimic::Completion, Failed> {
    let missing: Vec<_> = p.needs.iter().filter(|n| program(n).is_none()).copied().collect();
    if !missing.is_empty() {
        return left_out(name, &format!("not installed: {}", missing.join(", ")));
    }
    let lib = Lib::find()?;
    (p.run)(&Pair::new(&name.replace("::", "-"), &lib, sides))?;
    Ok(libtest_mimic::Completion::Completed)
}

fn listed() -> Result<(), Failed> {
    let list: Vec<&str> = include_str!("../packages.txt")
        .lines()
        .filter(|l| !l.starts_with('#'))
        .flat_map(|l| l.split_whitespace().skip(1))
        .collect();
    let wanting: Vec<_> = bodies::ALL.iter().flat_map(|p| p.needs).filter(|n| !list.contains(n)).collect();
    ensure(wanting.is_empty(), || format!("in no package of tests/packages.txt: {wanting:?}"))
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "--memcached-client") {
        bodies::memcached_client(&args[2]);
        return;
    }
    let mut trials = vec![Trial::test("what_is_needed_is_in_the_list_of_packages", listed)];
    for p in bodies::ALL {
        let mut add = |suffix: &str, sides| {
            let name = format!("{}{suffix}", p.name);
            trials.push(Trial::ignorable_test(name.clone(), move || one(p, &name, sides)));
        };
        add("", Sides::Both);
        // Without a library there is nothing to mix.
        if p.mixed && !Lib::find().is_ok_and(|l| l.is_none()) {
            add("::server_only", Sides::ServerOnly);
            add("::client_only", Sides::ClientOnly);
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
