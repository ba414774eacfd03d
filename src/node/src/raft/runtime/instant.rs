//! Monotonic time of the current environment.

use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::time::{Duration, Instant};

use super::ambient;

/// A moment on the current core's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CoreInstant(Instant);

impl CoreInstant {
    /// The same as a moment of [`crate::env::Env::now`].
    pub fn get(self) -> Instant {
        self.0
    }
}

impl From<Instant> for CoreInstant {
    fn from(instant: Instant) -> Self {
        Self(instant)
    }
}

impl openraft_rt::Instant for CoreInstant {
    fn now() -> Self {
        Self(ambient::current().now())
    }
}

impl Add<Duration> for CoreInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}

impl AddAssign<Duration> for CoreInstant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}

impl Sub<Duration> for CoreInstant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        let earlier = self.0.checked_sub(duration);
        Self(earlier.expect("invariant: nobody asks for a time before the machine was started"))
    }
}

impl Sub for CoreInstant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.0 - earlier.0
    }
}

impl SubAssign<Duration> for CoreInstant {
    fn sub_assign(&mut self, duration: Duration) {
        *self = *self - duration;
    }
}
