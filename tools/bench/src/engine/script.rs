//! What happens to the target while it is measured: a script that runs beside the generator, and its notes.
//!
//! A script does things to a server (kills it, asks it for a snapshot) at times of the run's own clock; what it notes becomes
//! the event line of the report. It never touches the generator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::result::Event;
use crate::target::Failure;
use crate::workload::Class;

/// One operation of a run that keeps them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was.
    pub class: Class,
    /// Number of its key.
    pub key: u64,
    /// When it was meant to be sent, in nanoseconds of measured time.
    pub intended_ns: u64,
    /// When its end was seen, likewise.
    pub ended_ns: u64,
    /// Why it failed; `None` when it was answered.
    pub failure: Option<Failure>,
}

/// Runs beside the generator on a thread of its own.
pub type Script<'a> = Box<dyn FnOnce(&Notes<'_>) + Send + 'a>;

/// The clock and the notebook of a script.
#[derive(Debug)]
pub struct Notes<'a> {
    clock: Clock,
    start: Duration,
    stop: &'a AtomicBool,
    over: AtomicBool,
    events: Mutex<Vec<Event>>,
}

/// How often a waiting script looks whether the run is over.
const STEP: Duration = Duration::from_millis(2);

impl<'a> Notes<'a> {
    pub(super) fn new(clock: Clock, start: Duration, stop: &'a AtomicBool) -> Self {
        Self {
            clock,
            start,
            stop,
            over: AtomicBool::new(false),
            events: Mutex::new(Vec::new()),
        }
    }

    /// Measured seconds; below zero during the warm-up.
    pub fn now_s(&self) -> f64 {
        self.clock.now_ns() as f64 / 1e9 - self.start.as_secs_f64()
    }

    /// Whether the run has ended, so that nothing more should be done to the target.
    pub fn over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || self.stop.load(Ordering::Relaxed)
    }

    /// Waits for a moment of measured time; `false` when the run ended before.
    pub fn wait_until(&self, at_s: f64) -> bool {
        while !self.over() {
            let left_s = at_s - self.now_s();
            if left_s <= 0.0 {
                return true;
            }
            std::thread::sleep(STEP.min(Duration::try_from_secs_f64(left_s).unwrap_or(STEP)));
        }
        false
    }

    /// Notes that something happened now; returns when, in measured seconds.
    pub fn note(&self, text: impl Into<String>) -> f64 {
        let at_s = self.now_s();
        let text = text.into();
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Event { at_s, text });
        at_s
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn into_events(self) -> Vec<Event> {
        self.events.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_told_the_time_and_the_end() {
        let stop = AtomicBool::new(false);
        let notes = Notes::new(Clock::start(), Duration::from_millis(20), &stop);
        assert!(notes.wait_until(0.0));
        let at_s = notes.note("it happened");
        assert!(at_s >= 0.0, "{at_s}");
        notes.end();
        assert!(notes.over() && !notes.wait_until(3_600.0));
        let events = notes.into_events();
        assert_eq!(
            (events.len(), events[0].at_s, &*events[0].text),
            (1, at_s, "it happened")
        );
    }
}
