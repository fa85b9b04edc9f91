//! Ctrl-C: the first ends the test, which is then reported; the second ends the program.

use std::io;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::events::{Event, Outbox};

/// What a shell says of a program that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

/// Who wants to know.
#[derive(Debug, Clone)]
pub struct Interrupts(Arc<Mutex<Option<Outbox>>>);

impl Interrupts {
    /// From now on signals come here.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let interrupts = Self(Arc::default());
        let to = Arc::clone(&interrupts.0);
        thread::spawn(move || {
            for _ in signals.forever() {
                let test = to.lock().unwrap_or_else(PoisonError::into_inner).take();
                // No test, or it has been told: then that is meant which is usually meant.
                if test.is_none_or(|t| !t.send(Event::Signal)) {
                    process::exit(INTERRUPTED.into());
                }
            }
        });
        Ok(interrupts)
    }

    /// The next signal is this test's.
    pub fn for_test(&self, events: &Outbox) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(events.clone());
    }

    /// The test is over.
    pub fn for_nobody(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
