//! Monotonic time in nanoseconds since the start of a run.
//!
//! Owns the one origin that every generator thread of a run shares, so that their histograms and
//! timelines can be merged. Nothing else in the crate reads the monotonic clock while measuring.

use std::time::{Duration, Instant};

/// A copyable monotonic clock whose zero is the moment of its creation.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that reads zero now.
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Nanoseconds since [`Clock::start`].
    #[inline]
    pub fn now_ns(&self) -> u64 {
        let elapsed = self.origin.elapsed();
        elapsed.as_secs() * 1_000_000_000 + u64::from(elapsed.subsec_nanos())
    }
}

/// `duration` in whole nanoseconds, saturating after 584 years.
pub fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
