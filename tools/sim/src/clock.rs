//! The clocks of one node: monotonic time that may run fast or slow or stand still, and a wall clock that may be wrong.

use std::time::{Duration, Instant};

/// The wall clock when a simulation begins: 2027-01-15, so that certificates made today are valid.
const EPOCH_MS: i64 = 1_800_000_000_000;

/// Most a clock drifts, in parts per million: a tenth, far beyond what quartz does.
pub(crate) const MAX_DRIFT_PPM: i64 = 100_000;

/// Parts in a whole, for a drift in parts per million.
const MILLION: i128 = 1_000_000;

/// One node's clocks, as a function of the world's time.
///
/// Monotonic time is linear between two changes: `origin` is the last one, in the world's time and in the node's. Changing the
/// drift or stopping the clock moves the origin, so node time never runs backwards.
#[derive(Debug, Clone)]
pub(crate) struct NodeClock {
    start: Instant,
    origin: (Instant, Instant),
    drift_ppm: i64,
    stopped: bool,
    wall_offset_ms: i64,
    /// How often the wall clock was set.
    steps: u64,
}

impl NodeClock {
    /// A clock that is right, in a world that began at `start`.
    pub(crate) fn new(start: Instant) -> Self {
        Self {
            start,
            origin: (start, start),
            drift_ppm: 0,
            stopped: false,
            wall_offset_ms: 0,
            steps: 0,
        }
    }

    /// Monotonic time when the world's is `world`.
    pub(crate) fn now(&self, world: Instant) -> Instant {
        let (at, own) = self.origin;
        if self.stopped {
            return own;
        }
        let passed = (world - at).as_nanos().cast_signed();
        own + nanos(passed + passed * i128::from(self.drift_ppm) / MILLION)
    }

    /// When in the world's time this clock will show `deadline`, at the earliest; `None` while it stands still.
    pub(crate) fn when(&self, deadline: Instant) -> Option<Instant> {
        if self.stopped {
            return None;
        }
        let (at, own) = self.origin;
        let ahead = deadline.saturating_duration_since(own).as_nanos().cast_signed();
        let rate = MILLION + i128::from(self.drift_ppm);
        // Rounded up, so that a timer is late by a nanosecond rather than early.
        Some(at + nanos((ahead * MILLION + rate - 1) / rate))
    }

    /// Wall-clock time in milliseconds since the Unix epoch.
    pub(crate) fn unix_ms(&self, world: Instant) -> u64 {
        let passed = (self.now(world) - self.start).as_millis() as i64;
        (EPOCH_MS + self.wall_offset_ms + passed).max(0).cast_unsigned()
    }

    /// Makes monotonic time pass faster or slower from `world` on.
    pub(crate) fn set_drift(&mut self, world: Instant, ppm: i64) {
        self.rebase(world);
        self.drift_ppm = ppm.clamp(-MAX_DRIFT_PPM, MAX_DRIFT_PPM);
    }

    /// Stops the clock, or lets it go on from where it stood.
    pub(crate) fn set_stopped(&mut self, world: Instant, stopped: bool) {
        self.rebase(world);
        self.stopped = stopped;
    }

    /// Moves the wall clock at once, forward or backward.
    pub(crate) fn step_wall(&mut self, by_ms: i64) {
        self.wall_offset_ms += by_ms;
        self.steps += 1;
    }

    /// How often the wall clock was set.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    fn rebase(&mut self, world: Instant) {
        self.origin = (world, self.now(world));
    }
}

fn nanos(count: i128) -> Duration {
    Duration::from_nanos(u64::try_from(count.max(0)).expect("invariant: simulations last less than 500 years"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn drift_changes_the_rate_and_never_the_order() {
        let start = Instant::now();
        let mut clock = NodeClock::new(start);
        assert_eq!(clock.now(start + SECOND), start + SECOND);
        clock.set_drift(start + SECOND, 1_000);
        assert_eq!(
            clock.now(start + 2 * SECOND) - clock.now(start + SECOND),
            Duration::from_millis(1_001)
        );
        let before = clock.now(start + 2 * SECOND);
        clock.set_drift(start + 2 * SECOND, -50_000);
        assert_eq!(clock.now(start + 2 * SECOND), before);
        assert_eq!(clock.now(start + 3 * SECOND) - before, Duration::from_millis(950));
    }

    #[test]
    fn a_deadline_is_met_and_never_early() {
        let start = Instant::now();
        for ppm in [-MAX_DRIFT_PPM, -3, 0, 1, 77, MAX_DRIFT_PPM] {
            let mut clock = NodeClock::new(start);
            clock.set_drift(start, ppm);
            for nanos in [0, 1, 2, 999, 1_000_003, 7_777_777_777] {
                let deadline = start + Duration::from_nanos(nanos);
                let at = clock.when(deadline).unwrap();
                assert!(clock.now(at) >= deadline, "{ppm} {nanos}");
                assert!(clock.now(at) <= deadline + Duration::from_nanos(2), "{ppm} {nanos}");
            }
        }
    }

    #[test]
    fn a_stopped_clock_goes_on_from_where_it_stood() {
        let start = Instant::now();
        let mut clock = NodeClock::new(start);
        let wall = clock.unix_ms(start);
        clock.set_stopped(start + SECOND, true);
        assert_eq!(clock.now(start + 9 * SECOND), start + SECOND);
        assert_eq!(clock.when(start + 2 * SECOND), None);
        clock.set_stopped(start + 9 * SECOND, false);
        assert_eq!(clock.now(start + 10 * SECOND), start + 2 * SECOND);
        assert_eq!(clock.unix_ms(start + 10 * SECOND), wall + 2_000);
        clock.step_wall(-500);
        assert_eq!(clock.unix_ms(start + 10 * SECOND), wall + 1_500);
        assert_eq!(clock.now(start + 10 * SECOND), start + 2 * SECOND);
    }
}
