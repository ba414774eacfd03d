//! How fast a snapshot is taken: it leaves most of its core, and of its disk, to requests.
//!
//! A slice of an image takes a fraction of a millisecond, and what is written completes at once where the disk is fast, so an image that
//! goes on whenever it can has a request wait for a slice, and for the turn of everything else that has piled up behind it, again and
//! again. So after each piece of work the image rests for some times as long. A piece that has waited for the disk counts with its wait:
//! where the disk is slow the journal's syncs are spared as well.
//!
//! Where the journal is short of room there is no rest: writes would be refused before the snapshot makes room for them.

use std::time::{Duration, Instant};

use crate::raft::runtime::{Ambient, Runtime, yield_now};
use openraft_rt::AsyncRuntime as _;

/// How many times as long as it has worked the image rests: it takes a quarter of the core at most.
pub(super) const REST: u32 = 3;

/// The longest rest: a piece of work that took long because the core or the disk was busy says nothing about the next.
pub(super) const LONGEST_REST: Duration = Duration::from_millis(10);

/// The pace of one image.
pub(super) struct Pace<'a> {
    ambient: &'a dyn Ambient,
    hurries: &'a dyn Fn() -> bool,
    began: Instant,
}

impl<'a> Pace<'a> {
    /// Begins with the work. `hurries` says whether there is no time to rest.
    pub(super) fn new(ambient: &'a dyn Ambient, hurries: &'a dyn Fn() -> bool) -> Self {
        Self {
            ambient,
            hurries,
            began: ambient.now(),
        }
    }

    /// Ends a piece of work, rests, and begins the next. Others have their turn in any case.
    pub(super) async fn rest(&mut self) {
        let worked = self.ambient.now().saturating_duration_since(self.began);
        if worked.is_zero() || (self.hurries)() {
            yield_now().await;
        } else {
            Runtime::sleep((worked * REST).min(LONGEST_REST)).await;
        }
        self.began = self.ambient.now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::testing::Bench;

    const SLICE: Duration = Duration::from_micros(100);

    /// How long a hundred slices take, and how long they work.
    fn hundred_slices(slice: Duration, hurries: bool) -> (Duration, Duration) {
        let bench = Bench::new();
        let ambient = bench.ambient();
        let start = ambient.now();
        bench.run(async {
            let hurries = || hurries;
            let mut pace = Pace::new(&*ambient, &hurries);
            for _ in 0..100 {
                bench.pass(slice);
                pace.rest().await;
            }
        });
        (ambient.now() - start, slice * 100)
    }

    #[test]
    fn an_image_takes_a_quarter_of_the_core() {
        let (took, worked) = hundred_slices(SLICE, false);
        assert_eq!(took, worked * (REST + 1));
    }

    #[test]
    fn an_image_that_the_journal_waits_for_does_not_rest() {
        let (took, worked) = hundred_slices(SLICE, true);
        assert_eq!(took, worked);
    }

    #[test]
    fn no_rest_is_longer_than_the_longest() {
        let (took, worked) = hundred_slices(LONGEST_REST, false);
        assert_eq!(took, worked + LONGEST_REST * 100);
    }
}
