//! Whether to spin before sleeping: it saves the latency of a sleep and costs CPU time, so it is done only while it pays.
//!
//! It pays when a single request is bounced back and forth: the next one comes sooner than a sleep and a wake-up would take, and
//! nothing else would be done meanwhile. With many requests under way it does not: the time asleep gathers a larger batch, which
//! costs less per request. And it never pays when the core is shared: the spinner takes the time of whom it waits for.

use std::time::{Duration, Instant};

/// Longest spin. A sleep and wake-up take about this long on a virtual machine.
const WINDOW: Duration = Duration::from_micros(50);
/// A step of the spin that takes longer than this was interrupted: somebody else wants this CPU.
const INTERRUPTED: Duration = Duration::from_micros(200);
/// How long spinning stays off after that.
const BACK_OFF: Duration = Duration::from_millis(100);
/// The averages move by 1/2^SHIFT of the difference at each sleep.
const SHIFT: u32 = 3;
/// One, in the averages' fixed point.
const ONE: u32 = 1 << 16;

/// What one core has seen lately of the time between its sleeps and the next arrival.
#[derive(Debug)]
pub(super) struct Spin {
    /// Share of waits shorter than the window.
    short: u32,
    /// Arrivals per wake-up.
    arrivals: u32,
    off_until: Option<Instant>,
}

impl Default for Spin {
    fn default() -> Self {
        Self {
            short: 0,
            arrivals: 4 * ONE,
            off_until: None,
        }
    }
}

impl Spin {
    /// How long to spin now.
    pub(super) fn budget(&self, now: Instant) -> Duration {
        let shared = self.off_until.is_some_and(|until| now < until);
        if !shared && self.short > ONE / 2 && self.arrivals < 2 * ONE {
            WINDOW
        } else {
            Duration::ZERO
        }
    }

    /// Records a wait that ended with an arrival, and how many arrivals the turn before it had handled.
    pub(super) fn record(&mut self, waited: Duration, arrivals: usize) {
        average(&mut self.short, if waited <= WINDOW { ONE } else { 0 });
        average(&mut self.arrivals, ONE.saturating_mul(arrivals.min(1 << 10) as u32));
    }

    /// Takes note of the time between two steps of a spin; `false` if the spin should end because the CPU is wanted elsewhere.
    pub(super) fn step(&mut self, before: Instant, after: Instant) -> bool {
        let alone = after.saturating_duration_since(before) < INTERRUPTED;
        if !alone {
            self.off_until = Some(after + BACK_OFF);
        }
        alone
    }
}

fn average(value: &mut u32, sample: u32) {
    let (old, new) = (i64::from(*value), i64::from(sample));
    *value = u32::try_from(old + ((new - old) >> SHIFT)).expect("invariant: between two values of its type");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(waited: Duration, arrivals: usize) -> Duration {
        let mut spin = Spin::default();
        for _ in 0..100 {
            spin.record(waited, arrivals);
        }
        spin.budget(Instant::now())
    }

    #[test]
    fn it_spins_for_a_lone_request_that_comes_soon() {
        assert_eq!(Spin::default().budget(Instant::now()), Duration::ZERO);
        assert_eq!(after(Duration::from_micros(20), 1), WINDOW);
        assert_eq!(after(Duration::from_millis(1), 1), Duration::ZERO);
        assert_eq!(after(Duration::from_micros(5), 10), Duration::ZERO);
    }

    #[test]
    fn it_stops_when_the_core_is_shared_and_begins_again_later() {
        let mut spin = Spin::default();
        for _ in 0..100 {
            spin.record(Duration::from_micros(20), 1);
        }
        let now = Instant::now();
        assert!(spin.step(now, now + Duration::from_micros(1)));
        assert!(!spin.step(now, now + INTERRUPTED));
        assert_eq!(spin.budget(now + INTERRUPTED), Duration::ZERO);
        assert_eq!(spin.budget(now + INTERRUPTED + BACK_OFF), WINDOW);
    }
}
