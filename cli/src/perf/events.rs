//! What happens during a test, from many threads to the one that conducts it.
//!
//! A server has one inbox for all its tests. What a thread of a test that was given up says late must not be taken for
//! a word of the next one: so each event bears the number of its test.

use std::cell::Cell;
use std::net::TcpStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::drive::Outcome;
use super::link::Link;
use super::wire::{Cookie, Result, State};

/// What a test waits for.
#[derive(Debug)]
pub enum Event {
    /// A connection to the server's port, the cookie that it showed, and its number in the order of their coming.
    Arrived(TcpStream, Cookie, u64),
    /// A connection of the test by another listener.
    Link(Link),
    /// The other end said something, or is gone.
    Control(Result<State>),
    /// A thread is through.
    Done(Outcome),
    /// What the process with this number says; `None`: it has ended.
    Line(usize, Option<String>),
    /// Ctrl-C and the like.
    Signal,
}

/// Number of what belongs to no test.
const NONE: u64 = 0;

/// Where a thread puts its events.
#[derive(Debug, Clone)]
pub struct Outbox {
    test: u64,
    to: Sender<(u64, Event)>,
}

impl Outbox {
    /// Whether anybody will see it.
    pub fn send(&self, event: Event) -> bool {
        self.to.send((self.test, event)).is_ok()
    }
}

/// Where they arrive.
#[derive(Debug)]
pub struct Inbox {
    test: Cell<u64>,
    from: Receiver<(u64, Event)>,
    to: Sender<(u64, Event)>,
}

impl Inbox {
    pub fn new() -> Self {
        let (to, from) = mpsc::channel();
        Self { test: Cell::new(NONE), from, to }
    }

    /// For what belongs to no test in particular.
    pub fn for_all(&self) -> Outbox {
        Outbox { test: NONE, to: self.to.clone() }
    }

    /// A new test begins: what those before it still say is dropped.
    pub fn next_test(&self) -> Outbox {
        self.test.set(self.test.get() + 1);
        Outbox { test: self.test.get(), to: self.to.clone() }
    }

    /// `None`: nothing came in time.
    pub fn recv(&self, limit: Option<Duration>) -> Option<Event> {
        let end = limit.map(|l| Instant::now() + l);
        loop {
            let got = match end {
                Some(end) => self.from.recv_timeout(end.saturating_duration_since(Instant::now())),
                None => self.from.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match got {
                Ok((test, event)) if test == NONE || test == self.test.get() => return Some(event),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_words_of_an_old_test_are_not_heard() {
        let inbox = Inbox::new();
        let old = inbox.next_test();
        let new = inbox.next_test();
        assert!(old.send(Event::Control(Ok(State::TestEnd))));
        assert!(inbox.for_all().send(Event::Signal));
        assert!(new.send(Event::Control(Ok(State::Done))));
        assert!(matches!(inbox.recv(None), Some(Event::Signal)));
        assert!(matches!(inbox.recv(None), Some(Event::Control(Ok(State::Done)))));
        assert!(inbox.recv(Some(Duration::ZERO)).is_none());
    }
}
