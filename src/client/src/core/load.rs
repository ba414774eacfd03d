//! How quick a node looks from here: a moving average of the time it takes to answer reads, and how much it has under way.
//!
//! The average weighs samples by time, not by number (as the Unix load average does), so that a burst of answers does not wipe out
//! what went before it. What was measured long ago counts for less, so that a node that was slow once is tried again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time over which the average moves most of the way to what is measured now.
const WINDOW_NS: u64 = 500_000_000;
/// Time without a measurement after which an average counts for half.
const HALF_LIFE_NS: u64 = 2_000_000_000;

/// What is measured of one node. All methods may be called from many threads; a sample that is lost in a race is lost.
#[derive(Debug, Default)]
pub struct Load {
    /// Requests that were sent, and those of them that are over. Two counters cost what one of those under way would.
    sent: AtomicU64,
    over: AtomicU64,
    /// The average; 0: nothing was measured yet.
    latency_ns: AtomicU64,
    /// When it was last measured.
    measured_ns: AtomicU64,
}

/// A request that is under way; it no longer counts when this is dropped.
#[derive(Debug)]
#[must_use = "a request is under way until this is dropped"]
pub struct Underway<'l>(&'l Load);

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.0.over.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is known of a node at one moment, to compare it with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// The average time of an answer, less the longer ago it was measured; `None`: never measured.
    pub latency: Option<Duration>,
    /// Requests under way.
    pub outstanding: u32,
}

impl Load {
    /// A request is sent.
    pub fn begin(&self) -> Underway<'_> {
        self.sent.fetch_add(1, Ordering::Relaxed);
        Underway(self)
    }

    /// A read was answered after `latency`.
    pub fn measure(&self, latency: Duration, now: Duration) {
        let sample = nanos(latency).max(1);
        let now = nanos(now);
        let average = self.latency_ns.load(Ordering::Relaxed);
        let passed = now.saturating_sub(self.measured_ns.swap(now, Ordering::Relaxed));
        let next = if average == 0 {
            sample
        } else {
            // Of the way to the sample: passed / (passed + window), the first-order approximation of 1 - exp(-passed/window).
            let way = u128::from(average.abs_diff(sample)) * u128::from(passed)
                / u128::from(passed.saturating_add(WINDOW_NS));
            let way = way as u64;
            if sample > average { average + way } else { average - way }
        };
        self.latency_ns.store(next, Ordering::Relaxed);
    }

    /// What is known of the node now.
    pub fn estimate(&self, now: Duration) -> Estimate {
        let average = self.latency_ns.load(Ordering::Relaxed);
        let quiet = nanos(now).saturating_sub(self.measured_ns.load(Ordering::Relaxed));
        let halvings = (quiet / HALF_LIFE_NS).min(63);
        Estimate {
            latency: (average != 0).then(|| Duration::from_nanos((average >> halvings).max(1))),
            outstanding: self.outstanding(),
        }
    }

    /// Nobody waits any more for a read that has not been answered after `waited`. It would have taken longer, so it counts where that is
    /// more than the average.
    pub fn give_up(&self, waited: Duration, now: Duration) {
        if nanos(waited) > self.latency_ns.load(Ordering::Relaxed) {
            self.measure(waited, now);
        }
    }

    /// The average as it was last measured; `None`: never.
    pub fn latency(&self) -> Option<Duration> {
        match self.latency_ns.load(Ordering::Relaxed) {
            0 => None,
            average => Some(Duration::from_nanos(average)),
        }
    }

    /// Requests under way.
    pub fn outstanding(&self) -> u32 {
        // In this order: what is over was sent.
        let over = self.over.load(Ordering::Relaxed);
        let sent = self.sent.load(Ordering::Relaxed);
        u32::try_from(sent.saturating_sub(over)).unwrap_or(u32::MAX)
    }

    /// Requests sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Estimate {
    /// Whether this node is the better choice of the two. Where one was never measured, or they differ by less than a factor of two, which
    /// may be chance, it is the one with less under way: a node that is left alone is not measured either.
    pub fn is_better_than(&self, other: &Self) -> bool {
        match (self.latency, other.latency) {
            (Some(own), Some(others)) if own > 2 * others || others > 2 * own => {
                let cost = |latency: Duration, outstanding: u32| latency.as_nanos() * (u128::from(outstanding) + 1);
                cost(own, self.outstanding) < cost(others, other.outstanding)
            }
            _ => self.outstanding < other.outstanding,
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_under_way_counts_until_it_is_dropped() {
        let load = Load::default();
        let first = load.begin();
        let second = load.begin();
        assert_eq!(load.outstanding(), 2);
        drop(first);
        drop(second);
        assert_eq!((load.outstanding(), load.sent()), (0, 2));
    }

    #[test]
    fn what_was_given_up_only_makes_a_node_look_slower() {
        let load = Load::default();
        load.measure(10 * MS, MS);
        load.give_up(5 * MS, 10_000 * MS);
        assert_eq!(load.latency(), Some(10 * MS));
        load.give_up(50 * MS, 10_000 * MS);
        assert!(load.latency().unwrap() > 40 * MS);
    }

    #[test]
    fn the_average_follows_what_is_measured_over_its_window() {
        let load = Load::default();
        assert_eq!(load.latency(), None);
        load.measure(10 * MS, MS);
        assert_eq!(load.latency(), Some(10 * MS));
        // A thousand quick answers within a millisecond do not wipe it out, a second of them does.
        for n in 0..1000 {
            load.measure(MS, MS + Duration::from_micros(n));
        }
        assert!(load.latency().unwrap() > 9 * MS);
        for n in 1..100 {
            load.measure(MS, MS + n * 20 * MS);
        }
        assert!(load.latency().unwrap() < 2 * MS);
    }

    #[test]
    fn a_node_that_was_slow_once_is_tried_again() {
        let (slow, quick) = (Load::default(), Load::default());
        slow.measure(100 * MS, MS);
        let mut now = MS;
        let mut tried = |until: Duration| {
            while now < until {
                now += 10 * MS;
                quick.measure(MS, now);
                if slow.estimate(now).is_better_than(&quick.estimate(now)) {
                    return true;
                }
            }
            false
        };
        assert!(!tried(Duration::from_secs(5)));
        assert!(tried(Duration::from_secs(30)));
    }

    proptest! {
        /// Whatever is measured when, the average lies within what was measured.
        #[test]
        fn the_average_is_within_its_samples(samples in prop::collection::vec((1u64..10_000_000_000, 0u64..10_000_000_000), 1..100)) {
            let load = Load::default();
            let (mut now, mut low, mut high) = (Duration::ZERO, Duration::MAX, Duration::ZERO);
            for (latency, passed) in samples {
                now += Duration::from_nanos(passed);
                let latency = Duration::from_nanos(latency);
                load.measure(latency, now);
                (low, high) = (low.min(latency), high.max(latency));
                let average = load.latency().unwrap();
                prop_assert!(low <= average + Duration::from_nanos(1) && average <= high, "{low:?} {average:?} {high:?}");
                prop_assert_eq!(load.estimate(now).latency, Some(average));
            }
        }

        /// The comparison never says of each of two nodes that it is better than the other.
        #[test]
        fn of_two_nodes_at_most_one_is_better(a in estimates(), b in estimates()) {
            prop_assert!(!(a.is_better_than(&b) && b.is_better_than(&a)));
            prop_assert!(!a.is_better_than(&a));
        }
    }

    fn estimates() -> impl Strategy<Value = Estimate> {
        (prop::option::of(1u64..1_000_000), 0u32..100).prop_map(|(latency, outstanding)| Estimate {
            latency: latency.map(Duration::from_nanos),
            outstanding,
        })
    }
}
