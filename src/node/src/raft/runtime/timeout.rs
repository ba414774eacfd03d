//! Sleeping, and giving up.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;

use super::ambient;

/// Sleeps at least this long end on the grid.
const LONG: Duration = Duration::from_millis(15);

/// Long sleeps of a core end together, so that it wakes once for the ticks of all its replicas: a tick costs far less than a wake-up.
const GRID: Duration = Duration::from_millis(10);

/// Completes at a deadline of the environment in which it was made; of a long sleep, up to 10 ms later.
pub struct Sleep(Pin<Box<dyn Future<Output = ()>>>);

impl Sleep {
    pub(super) fn until(deadline: Instant) -> Self {
        let ambient = ambient::current();
        Self(ambient.sleep_until(aligned(ambient.now(), ambient.origin(), deadline)))
    }
}

/// The next line of the grid, which begins at `origin`, if `deadline` is far enough away.
fn aligned(now: Instant, origin: Instant, deadline: Instant) -> Instant {
    if deadline.saturating_duration_since(now) < LONG {
        return deadline;
    }
    let grid = GRID.as_nanos();
    let past = deadline.saturating_duration_since(origin).as_nanos() % grid;
    deadline + Duration::from_nanos(((grid - past) % grid) as u64)
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep").finish_non_exhaustive()
    }
}

/// The deadline came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the deadline has passed")]
pub struct Elapsed;

pin_project! {
    /// A future with a deadline. Where both are ready, the future wins.
    #[derive(Debug)]
    pub struct Timeout<F> {
        #[pin]
        future: F,
        sleep: Sleep,
    }
}

impl<F> Timeout<F> {
    pub(super) fn new(sleep: Sleep, future: F) -> Self {
        Self { future, sleep }
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.future.poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(this.sleep).poll(context).map(|()| Err(Elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::testing::Bench;

    #[test]
    fn long_sleeps_end_together_and_short_ones_in_time() {
        let origin = super::super::Ambient::now(&Bench::new());
        let at = |micros| origin + Duration::from_micros(micros);
        let aligned = |now, deadline| {
            aligned(at(now), origin, at(deadline))
                .duration_since(origin)
                .as_micros()
        };
        assert_eq!(aligned(0, 14_999), 14_999);
        assert_eq!(aligned(0, 15_000), 20_000);
        assert_eq!(aligned(3, 20_000), 20_000);
        assert_eq!(aligned(3, 20_001), 30_000);
        assert_eq!(aligned(1_000_007, 1_020_300), 1_030_000);
        // What is due is not put off.
        assert_eq!(aligned(50_003, 50_001), 50_001);
    }
}
