//! What is kept of every operation: HDR histograms by class, counters, and one histogram an interval.
//!
//! Recording costs a few nanoseconds: operations that end together with equal times, as those of a batch
//! do, are gathered and recorded once with their count. Intervals are handed to the monitor's thread, so
//! that percentiles and compression never delay a send.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender};

use hdrhistogram::Histogram;

use crate::target::{Failure, Outcome};
use crate::workload::Class;

/// Largest latency that is told apart, in nanoseconds: one hour.
pub const MAX_LATENCY_NS: u64 = 3_600_000_000_000;

/// An empty histogram of nanoseconds with three significant digits.
///
/// # Panics
/// Never: the bounds are constants that the crate accepts.
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).expect("invariant: constant bounds that the crate accepts")
}

/// Counters of what happened to operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations that completed without a failure.
    pub completed: u64,
    /// Keys found by reads.
    pub hits: u64,
    /// Keys not found by reads.
    pub misses: u64,
    /// Conditions that did not hold.
    pub conflicts: u64,
    /// Failures by kind.
    pub failures: BTreeMap<Failure, u64>,
}

impl Counters {
    /// Accounts the end of one operation.
    #[inline]
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Hit { .. } => self.hits += 1,
            Outcome::Miss => self.misses += 1,
            Outcome::Stored => {}
            Outcome::Conflict => self.conflicts += 1,
            Outcome::Multi { hits, misses } => {
                self.hits += u64::from(hits);
                self.misses += u64::from(misses);
            }
            Outcome::Failed(failure) => {
                *self.failures.entry(failure).or_default() += 1;
                return;
            }
        }
        self.completed += 1;
    }

    /// Failures of every kind.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Adds another account.
    pub fn merge(&mut self, other: &Self) {
        self.completed += other.completed;
        self.hits += other.hits;
        self.misses += other.misses;
        self.conflicts += other.conflicts;
        for (failure, count) in &other.failures {
            *self.failures.entry(*failure).or_default() += count;
        }
    }
}

/// Latencies of one class of operations.
#[derive(Debug)]
pub(super) struct ClassRecord {
    /// From the intended send time to the reply, in nanoseconds.
    pub latency: Histogram<u64>,
    /// From the actual send to the reply, in nanoseconds.
    pub service: Histogram<u64>,
}

/// Records by class, in the order of [`Class::ALL`].
pub(super) type Classes = [Option<Box<ClassRecord>>; Class::ALL.len()];

/// One interval of one thread, on its way to the monitor.
#[derive(Debug)]
pub(super) struct Interval {
    /// The thread it comes from.
    pub thread: usize,
    /// Position in the run, from 0.
    pub index: u64,
    /// Latency of the operations that ended in it, in nanoseconds.
    pub latency: Histogram<u64>,
    /// What ended in it.
    pub counters: Counters,
}

/// Everything one thread has recorded.
#[derive(Debug)]
pub(super) struct Recorder {
    classes: Classes,
    /// Totals over the measured time and the drain after it.
    pub counters: Counters,
    interval: Histogram<u64>,
    interval_counters: Counters,
    run: Option<Run>,
    thread: usize,
    outlet: Sender<Interval>,
    returned: Receiver<Histogram<u64>>,
}

/// Operations with equal times, not yet in the histograms.
#[derive(Debug, PartialEq)]
struct Run {
    class: Class,
    latency_ns: u64,
    service_ns: u64,
    count: u64,
}

impl Recorder {
    /// The recorder of thread `thread`, which hands intervals to `outlet` and reuses the histograms that come back.
    pub(super) fn new(thread: usize, outlet: Sender<Interval>, returned: Receiver<Histogram<u64>>) -> Self {
        Self {
            classes: [const { None }; Class::ALL.len()],
            counters: Counters::default(),
            interval: new_histogram(),
            interval_counters: Counters::default(),
            run: None,
            thread,
            outlet,
            returned,
        }
    }

    /// Records the end of one operation. Failures are counted. The age of those that nobody answered is kept too: dropping it would hide
    /// the very time-outs that users feel. That of refusals is not: it would make a server that refuses look fast.
    #[inline]
    pub(super) fn record(&mut self, class: Class, latency_ns: u64, service_ns: u64, outcome: Outcome) {
        self.counters.count(outcome);
        self.interval_counters.count(outcome);
        if matches!(outcome, Outcome::Failed(failure) if !failure.is_unanswered()) {
            return;
        }
        if let Some(run) = &mut self.run
            && run.class == class
            && run.latency_ns == latency_ns
            && run.service_ns == service_ns
        {
            run.count += 1;
            return;
        }
        self.settle();
        self.run = Some(Run {
            class,
            latency_ns,
            service_ns,
            count: 1,
        });
    }

    /// Moves the gathered operations into the histograms.
    #[inline]
    fn settle(&mut self) {
        if let Some(run) = self.run.take() {
            let class = self.classes[run.class.index()].get_or_insert_with(|| {
                Box::new(ClassRecord {
                    latency: new_histogram(),
                    service: new_histogram(),
                })
            });
            class.latency.saturating_record_n(run.latency_ns.max(1), run.count);
            class.service.saturating_record_n(run.service_ns.max(1), run.count);
            self.interval.saturating_record_n(run.latency_ns.max(1), run.count);
        }
    }

    /// Ends the interval `index` and hands it over.
    pub(super) fn end_interval(&mut self, index: u64) {
        self.settle();
        let fresh = self.returned.try_recv().unwrap_or_else(|_| new_histogram());
        let latency = std::mem::replace(&mut self.interval, fresh);
        let counters = std::mem::take(&mut self.interval_counters);
        // The monitor goes away only when the run is being abandoned.
        let _ = self.outlet.send(Interval {
            thread: self.thread,
            index,
            latency,
            counters,
        });
    }

    /// The histograms by class, in the order of [`Class::ALL`], with the counters.
    pub(super) fn finish(mut self) -> (Classes, Counters) {
        self.settle();
        (self.classes, self.counters)
    }
}

/// Adds `from` to `into`.
///
/// # Panics
/// Never: every histogram of this crate has the same bounds.
pub fn merge_histogram(into: &mut Histogram<u64>, from: &Histogram<u64>) {
    into.add(from)
        .expect("invariant: all histograms have the bounds of new_histogram");
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn gathered_operations_are_all_in_the_histograms() {
        let (outlet, intervals) = channel();
        let (_give_back, returned) = channel();
        let mut recorder = Recorder::new(0, outlet, returned);
        for _ in 0..3 {
            recorder.record(Class::Get, 1_000, 900, Outcome::Hit { version: 0 });
        }
        recorder.record(Class::Get, 2_000, 900, Outcome::Miss);
        recorder.record(Class::Put, 2_000, 900, Outcome::Failed(Failure::Unanswered));
        recorder.record(Class::Put, 1, 1, Outcome::Failed(Failure::Busy));
        recorder.end_interval(0);
        recorder.record(Class::Put, 5_000, 4_000, Outcome::Stored);
        let (classes, counters) = recorder.finish();
        let get = classes[Class::Get.index()].as_ref().unwrap();
        assert_eq!((get.latency.len(), get.service.max()), (4, 900));
        assert_eq!(classes[Class::Put.index()].as_ref().unwrap().latency.len(), 2);
        assert!(classes[Class::Cas.index()].is_none());
        assert_eq!(
            (counters.completed, counters.hits, counters.misses, counters.failed()),
            (5, 3, 1, 2)
        );
        let interval = intervals.recv().unwrap();
        assert_eq!((interval.latency.len(), interval.counters.completed), (5, 4));
    }

    #[test]
    fn latencies_past_the_range_saturate() {
        let (outlet, _intervals) = channel();
        let (_give_back, returned) = channel();
        let mut recorder = Recorder::new(0, outlet, returned);
        recorder.record(Class::Get, u64::MAX, 0, Outcome::Miss);
        let (classes, _) = recorder.finish();
        assert_eq!(classes[0].as_ref().unwrap().latency.len(), 1);
    }
}
