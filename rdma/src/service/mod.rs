//! The service behind libsmc.so: one thread, which plays the peer's side of every connection to another host.
//!
//! | module | what |
//! | --- | --- |
//! | [`abi`] | what libsmc.so calls, and is told |
//! | [`conn`] | one connection: the handshake, its stream, the end |
//! | [`greeting`] | the handshake |
//! | [`flow`] | between the page and the link |
//! | [`lgr`] | the link groups: who is in which, and what has come for whom |
//! | [`links`] | the links of one, over verbs: which member goes by which |
//! | [`link`] | one link: a queue pair |
//! | [`page`] | the peer's side of the page |
//! | [`back`] | how two ends go back to TCP without a link |
//! | [`tcp`] | the TCP stream beneath |
//! | [`nic`] | the devices |
//!
//! A connection with something to do is *hot* and is looked at in each turn. One that has had nothing to do for a while
//! is armed, looked at once more, and left to its descriptors: its doorbell, its TCP socket, and its link group's channel;
//! link groups are hot and left likewise. When nothing is hot the thread sleeps in epoll(7).
//!
//! State is under one lock, which the thread holds for a turn at a time and whoever brings a connection for a moment.
//! What is to be told to libsmc.so is told when the lock is free, since libsmc.so has locks of its own.

pub mod abi;
pub mod back;
pub mod conn;
pub mod flow;
pub mod greeting;
pub mod lgr;
pub mod link;
pub mod links;
pub mod nic;
pub mod page;
pub mod tcp;

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smc::reason::Reason;
use smc::smcr::Ms;

use crate::device::Event as Told;
use conn::{Conn, Note};
use greeting::{Around, Common};
use lgr::Lgrs;
use nic::Nic;
use page::Page;

pub(crate) use abi::close;

/// Turns with nothing to do before a connection is left to its descriptors.
const IDLE_TURNS: u32 = 4;

/// Whose descriptor it is, in the upper half of epoll's data; the lower half says which.
mod source {
    pub const WAKE: u64 = 0;
    pub const BELL: u64 = 1;
    pub const TCP: u64 = 2;
    pub const LINK: u64 = 3;
    pub const DEVICE: u64 = 4;
}

/// A connection and how it is looked at.
#[derive(Debug)]
struct Served {
    conn: Conn,
    hot: bool,
    idle: u32,
}

/// What is to be told about a connection.
#[derive(Clone, Copy, Debug)]
struct Telling {
    fd: i32,
    cookie: u64,
    note: Note,
}

#[derive(Debug)]
struct Core {
    common: Common,
    nics: Vec<Nic>,
    all: HashMap<u32, Served>,
    lgrs: Lgrs,
    hot: Vec<u32>,
    next: u32,
    set: i32,
    start: Instant,
    telling: Vec<Telling>,
    /// What the link groups have for connections, while a turn lasts.
    mail: Vec<lgr::Mail>,
    /// What kept page and rings of connections that are gone.
    released: Vec<usize>,
    ends: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Service {
    core: Mutex<Core>,
    /// Something was delivered.
    delivered: Condvar,
    set: i32,
    wake: i32,
}

impl Service {
    /// Opens the devices and starts the thread. None: there is no descriptor, or no device and nobody to be told so.
    pub fn start(common: Common, promised: bool) -> Option<Arc<Self>> {
        let nics = nic::all();
        if nics.is_empty() && !promised {
            return None;
        }
        let (set, wake) = abi::descriptors()?;
        for (i, n) in nics.iter().enumerate() {
            n.device.fds().into_iter().for_each(abi::own);
            abi::watch(set, n.device.event_fd(), source::DEVICE << 32 | i as u64);
        }
        abi::watch(set, wake, source::WAKE << 32);
        let core = Core {
            common,
            nics,
            all: HashMap::new(),
            lgrs: Lgrs::breaking(test_breaks()),
            hot: Vec::new(),
            next: 0,
            set,
            start: Instant::now(),
            telling: Vec::new(),
            mail: Vec::new(),
            released: Vec::new(),
            ends: false,
        };
        let service = Arc::new(Self { core: Mutex::new(core), delivered: Condvar::new(), set, wake });
        abi::spawn(&service).then_some(service)
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic ends the thread; what is left is only given up.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection over; the reason's code if not.
    pub fn serve(&self, page: Page) -> Result<(), Reason> {
        let mut core = self.lock();
        let place = nic::place(&core.nics, page.conn().local);
        if place.is_none() && page.conn().promised == 0 {
            return Err(Reason::NoRdma);
        }
        let (id, now) = (core.next, core.now());
        core.next = core.next.wrapping_add(1);
        let (bell, tcp) = (page.conn().bell, page.conn().tcp);
        [bell, tcp].into_iter().for_each(abi::own);
        let Core { common, lgrs, nics, .. } = &mut *core;
        let conn = Conn::new(page, place, &mut Around { common, lgrs, nics, id, now });
        core.all.insert(id, Served { conn, hot: true, idle: 0 });
        core.hot.push(id);
        abi::watch(core.set, bell, source::BELL << 32 | u64::from(id));
        abi::watch(core.set, tcp, source::TCP << 32 | u64::from(id));
        drop(core);
        abi::wake(self.wake);
        Ok(())
    }

    /// The process ends: until what it has sent has arrived.
    pub fn drain(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut core = self.lock();
        core.ends = true;
        abi::wake(self.wake);
        loop {
            core.all.values_mut().for_each(|s| s.conn.process_ends());
            let left = until.saturating_duration_since(Instant::now());
            let delivered = core.all.values().all(|s| s.conn.is_delivered());
            if delivered {
                // The peer need not find out by itself.
                core.lgrs.end_empty();
                abi::wake(self.wake);
            }
            if left.is_zero() || delivered && !core.lgrs.has_empty() {
                core.ends = false;
                return;
            }
            core = self.delivered.wait_timeout(core, left).map_or_else(|e| e.into_inner().0, |r| r.0);
        }
    }

    /// The thread.
    pub(crate) fn run(&self) {
        loop {
            let (telling, released, sleep) = {
                let mut core = self.lock();
                let sleep = core.turn();
                if core.ends {
                    self.delivered.notify_all();
                }
                (std::mem::take(&mut core.telling), std::mem::take(&mut core.released), sleep)
            };
            for t in telling {
                abi::tell(t.fd, t.cookie, t.note);
            }
            released.into_iter().for_each(abi::release);
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
            let n = abi::wait(self.set, &mut events, sleep);
            if n > 0 {
                let mut core = self.lock();
                for e in events.iter().take(n) {
                    core.woken(e.u64, self.wake);
                }
            }
        }
    }
}

/// `SMC_TEST_BREAK=N`, for tests: the link of every Nth message fails; `N:TIMES`: so often, where another is left.
fn test_breaks() -> (u32, Option<u32>) {
    let told = std::env::var("SMC_TEST_BREAK").unwrap_or_default();
    let (n, times) = told.split_once(':').unwrap_or((&told, ""));
    (n.parse().unwrap_or(0), times.parse().ok())
}

impl Core {
    fn now(&self) -> Ms {
        self.start.elapsed().as_millis() as Ms
    }

    fn heat(&mut self, id: u32) {
        if let Some(s) = self.all.get_mut(&id) {
            s.idle = 0;
            if !std::mem::replace(&mut s.hot, true) {
                s.conn.page().disarm();
                self.hot.push(id);
            }
        }
    }

    fn woken(&mut self, data: u64, wake: i32) {
        let (source, id) = (data >> 32, data as u32);
        match source {
            source::WAKE => {
                abi::slept(wake);
                self.all.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.heat(id));
            }
            source::DEVICE => self.device(id as usize),
            source::LINK => self.lgrs.heat(id),
            _ => {
                if let Some(s) = self.all.get_mut(&id) {
                    match source {
                        source::BELL => s.conn.rung(),
                        source::TCP => {
                            s.conn.tcp_has_news();
                            // What the peer has said by the link before it is to be heard first.
                            if let Some(lgr) = s.conn.lgr() {
                                self.lgrs.heat(lgr);
                            }
                        }
                        _ => {}
                    }
                }
                self.heat(id);
            }
        }
    }

    fn device(&mut self, at: usize) {
        let now = self.now();
        let mut back = false;
        while let Some(nic) = self.nics.get_mut(at)
            && let Ok(Some(what)) = nic.device.event()
        {
            if matches!(what, Told::Port(_, true) | Told::Gids(_)) {
                nic.refresh();
                back = true;
            }
            self.lgrs.told(&nic.device, what, now);
        }
        if back {
            self.lgrs.device_is_back(now, &self.nics);
        }
    }

    /// Looks at each hot link group and connection. Milliseconds to sleep; 0: not at all.
    fn turn(&mut self) -> i32 {
        let now = self.now();
        let mut mail = std::mem::take(&mut self.mail);
        let set = self.set;
        self.lgrs.turn(now, &self.nics, &mut mail, |lgr, fd| {
            abi::own(fd);
            abi::watch(set, fd, source::LINK << 32 | u64::from(lgr));
        });
        for (id, event) in mail.drain(..) {
            if let Some(s) = self.all.get_mut(&id) {
                s.conn.hears(event);
            }
            self.heat(id);
        }
        self.mail = mail;
        let due = |s: &Served| !s.hot && s.conn.deadline().is_some_and(|d| d <= now);
        let late: Vec<u32> = self.all.iter().filter(|(_, s)| due(s)).map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.heat(id));
        let mut hot = std::mem::take(&mut self.hot);
        hot.retain(|id| self.attend(*id, now));
        hot.append(&mut self.hot);
        self.hot = hot;
        if !self.hot.is_empty() || self.lgrs.is_hot() {
            return 0;
        }
        let first = self.all.values().filter_map(|s| s.conn.deadline()).min();
        let first = first.into_iter().chain(self.lgrs.deadline()).min();
        first.map_or(-1, |d| d.saturating_sub(now).clamp(1, 60_000) as i32)
    }

    /// One connection; whether it stays hot.
    fn attend(&mut self, id: u32, now: Ms) -> bool {
        let Self { all, common, lgrs, nics, .. } = self;
        let Some(s) = all.get_mut(&id) else { return false };
        let at = &mut Around { common, lgrs, nics, id, now };
        let moved = s.conn.work(at);
        let (fd, cookie) = (s.conn.page().conn().fd, s.conn.page().conn().cookie);
        let notes = s.conn.take_notes();
        self.telling.extend(notes.into_iter().map(|note| Telling { fd, cookie, note }));
        if s.conn.is_over() {
            if let Some(s) = all.remove(&id) {
                self.released.push(s.conn.page().conn().hold);
            }
            return false;
        }
        s.idle = if moved { 0 } else { s.idle + 1 };
        if s.idle < IDLE_TURNS {
            return true;
        }
        s.conn.arm();
        // What came before the arming rings no bell.
        let again = s.conn.work(at);
        let notes = s.conn.take_notes();
        self.telling.extend(notes.into_iter().map(|note| Telling { fd, cookie, note }));
        s.idle = 0;
        s.hot = again;
        again
    }
}
