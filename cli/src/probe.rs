//! The two ends of the connection that `smc check` tries: an echo server and its client, plain `std::net`,
//! started under libsmc.so as any other program.

use std::env;
use std::io::{BufRead, BufReader, Error, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use smc::reason::Reason;
use smc::stats::{Mode, connections};

use crate::output::{complain, emit};

/// Round trips before it is clear that nothing happens.
const ROUNDS: u32 = 4000;
/// Round trips between two looks.
const LOOK_EVERY: u32 = 100;

/// With a port: the client. Without: the server.
#[derive(Debug, clap::Args)]
pub struct Options {
    port: Option<u16>,
}

/// One end.
pub fn run(options: &Options) -> ExitCode {
    match options.port.map_or_else(serve, ask) {
        Ok(said) => emit(&said, ExitCode::SUCCESS),
        Err(e) => {
            complain(&e);
            ExitCode::FAILURE
        }
    }
}

/// Sends everything back until the client closes.
fn serve() -> Result<String, Error> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    emit(&format!("{}\n", listener.local_addr()?.port()), ExitCode::SUCCESS);
    let (mut client, _) = listener.accept()?;
    let mut message = [0; 64];
    while client.read_exact(&mut message).is_ok() {
        client.write_all(&message)?;
    }
    Ok(String::new())
}

/// Ping-pong until the connection is upgraded. Prints its mode, or why there was no upgrade.
fn ask(port: u16) -> Result<String, Error> {
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let mut last = "the library does not count it as one that could be".to_owned();
    for n in 0..ROUNDS {
        let message = [n as u8; 64];
        let mut back = [0; 64];
        server.write_all(&message)?;
        server.read_exact(&mut back)?;
        if back != message {
            return Err(Error::other("a message came back damaged"));
        }
        if n % LOOK_EVERY == 0
            && let Some(c) = connections()?.into_iter().find(|c| c.pid == std::process::id())
        {
            if c.mode_tx != Mode::Tcp && c.mode_rx != Mode::Tcp {
                return Ok(c.mode().name().to_owned());
            }
            last = c.reason.map_or("no reason was given", Reason::explain).to_owned();
        }
    }
    Ok(last)
}

/// Killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs both ends under the library. `Ok`: the mode that was reached; `Err`: what went wrong.
pub fn try_upgrade(library: &Path) -> Result<(), String> {
    let command = |port: Option<&str>| -> Result<Command, Error> {
        let mut c = Command::new(env::current_exe()?);
        c.arg("__probe").args(port).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        c.env("LD_PRELOAD", library).env("SMC_UPGRADE_AFTER", "0");
        for unwanted in ["SMC_DISABLE", "SMC_ONLY", "SMC_EXCLUDE", "SMC_LOG", "SMC_REQUIRE", "SMC_STATS"] {
            c.env_remove(unwanted);
        }
        Ok(c)
    };
    let both = || -> Result<(bool, String), Error> {
        let mut server = Server(command(None)?.spawn()?);
        let mut port = String::new();
        BufReader::new(server.0.stdout.take().expect("piped above")).read_line(&mut port)?;
        let client = command(Some(port.trim()))?.output()?;
        let said = if client.status.success() { client.stdout } else { client.stderr };
        Ok((client.status.success(), String::from_utf8_lossy(&said).trim().to_owned()))
    };
    match both() {
        Ok((true, mode)) if mode == Mode::Shm.name() => Ok(()),
        Ok((true, reason)) => Err(format!("a connection stayed on TCP: {reason}")),
        Ok((false, said)) => Err(said),
        Err(e) => Err(e.to_string()),
    }
}
