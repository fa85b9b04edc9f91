//! The events of `smc::net` with the feature `tracing`: which ones there are, once each, and that a subscriber may use the
//! streams that they tell of.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use smc::net::{Builder, Stream, UpgradeAfter};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::sync::{Mutex, Once};
use std::thread;
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// An event: its level and fields.
type Told = (Level, BTreeMap<String, String>);

/// Keeps all events of the target `smc`. For the whole process: a callsite asks only subscribers that are there when it
/// is first come by.
struct Keeper;

static TOLD: Mutex<Vec<Told>> = Mutex::new(Vec::new());
/// Streams that are used when an event tells of them.
static IN_USE: Mutex<Vec<Stream>> = Mutex::new(Vec::new());

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").trim_matches('"').into());
    }
}

impl Subscriber for Keeper {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        m.target() == "smc"
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let about = |s: &Stream| s.local_addr().is_ok_and(|a| fields.0["local"] == a.to_string());
        let used = IN_USE.lock().unwrap().iter().find(|s| about(s)).map(|s| s.try_clone().unwrap());
        if let Some(mut s) = used {
            // It would hang if a lock of the stream were held.
            s.write_all(b"x").unwrap();
            s.read_exact(&mut [0]).unwrap();
        }
        TOLD.lock().unwrap().push((*event.metadata().level(), fields.0));
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn begin() {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        tracing::subscriber::set_global_default(Keeper).unwrap();
        thread::spawn(|| {
            thread::sleep(Duration::from_secs(120));
            eprintln!("a test hangs");
            std::process::abort();
        });
    });
}

/// What was told of a stream.
fn told(local: &str) -> Vec<Told> {
    TOLD.lock().unwrap().iter().filter(|(_, f)| f["local"] == local).cloned().collect()
}

/// What is told of a client that talks to an echo in another thread, and of its end; and its address.
fn told_of(upgrade: bool) -> (Vec<Told>, String) {
    begin();
    let mut b = Builder::new();
    b.upgrade_after(if upgrade { UpgradeAfter::Now } else { UpgradeAfter::Never });
    let mut a = Builder::new();
    a.upgrade_after(UpgradeAfter::Now);
    let listener = b.listen("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let echo = thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        let mut byte = [0];
        while s.read(&mut byte).unwrap() == 1 {
            s.write_all(&byte).unwrap();
        }
    });
    let mut client = a.connect(to).unwrap();
    let local = client.local_addr().unwrap().to_string();
    IN_USE.lock().unwrap().push(client.try_clone().unwrap());
    let mut byte = [0];
    for n in 0..100_000 {
        if n > 1000 && !told(&local).is_empty() {
            break;
        }
        client.write_all(b"x").unwrap();
        client.read_exact(&mut byte).unwrap();
    }
    IN_USE.lock().unwrap().retain(|s| s.local_addr().unwrap() != client.local_addr().unwrap());
    drop(client);
    echo.join().unwrap();
    (told(&local), local)
}

#[test]
fn each_event_is_told_once_and_without_a_lock() {
    let (told, local) = told_of(true);
    let messages: Vec<_> = told.iter().map(|(l, f)| (l.as_str(), &*f["message"])).collect();
    assert_eq!(messages, [("INFO", "upgraded"), ("DEBUG", "closed")]);
    let (upgraded, closed) = (&told[0].1, &told[1].1);
    assert_eq!((&*upgraded["mode"], &upgraded["local"]), ("SHM", &local));
    assert_eq!(upgraded["peer_pid"], std::process::id().to_string());
    assert_eq!(closed["best"], "SHM");
    assert_ne!(closed["tx_bytes_ring"], "0");
}

#[test]
fn what_stays_on_tcp_is_told_with_its_reason() {
    let (told, local) = told_of(false);
    let messages: Vec<_> = told.iter().map(|(_, f)| &*f["message"]).collect();
    assert_eq!(messages, ["stays on TCP", "closed"]);
    assert_eq!(told[0].1["local"], local);
    assert_eq!(told[0].1["reason"], "peer-no-smc");
}
