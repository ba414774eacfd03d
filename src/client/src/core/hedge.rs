//! Whether and when a read that is slow to be answered is asked of a second replica as well.
//!
//! After J. Dean, L. A. Barroso, The Tail at Scale (CACM 2013): wait for as long as nearly all reads take, then ask another and take
//! whichever answer comes first. Two things keep it from making a busy cluster busier: only the slowest reads are asked twice, by
//! what was measured lately, and each costs the budget that retries are paid from, of which hedges never take the last half
//! ([`super::retry::Budget::withdraw_spare`]).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// What is hedged, and after how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HedgePolicy {
    /// How long one replica is waited for before another is asked.
    pub delay: HedgeDelay,
    /// Whether linearizable reads are hedged too. A follower that is asked for one has the leader confirm that it leads, so this helps
    /// where the client's way to the leader is slow, and adds to the work of a leader that is.
    pub linearizable: bool,
}

/// How long one replica is waited for before another is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HedgeDelay {
    /// As long as 95 of 100 reads take, by what was measured lately; a millisecond at least.
    #[default]
    Adaptive,
    /// So long.
    Fixed(Duration),
}

/// The adaptive delay while little was measured.
const UNMEASURED: Duration = Duration::from_millis(50);
/// Shortest adaptive delay: what a timer can do, and below what any network promises.
const SHORTEST: Duration = Duration::from_millis(1);
/// Samples that are little.
const LITTLE: u32 = 64;
/// Samples after which all of them count for half, so that what is new outweighs what is old.
const MANY: u32 = 2048;
/// Samples between two looks at the distribution.
const STEP: u32 = 32;
/// The part of reads that is waited for, in hundredths.
const PERCENTILE: u32 = 95;
/// Buckets to a doubling of the time, as a power of two.
const STEPS_LOG2: u32 = 2;
/// Times below 2^10 ns share the first bucket.
const FIRST_LOG2: u32 = 10;
/// Times of 2^34 ns, which are 17 s, and more share the last one.
const LAST_LOG2: u32 = 34;
const BUCKETS: usize = ((LAST_LOG2 - FIRST_LOG2) << STEPS_LOG2) as usize;

/// The distribution of the times that reads took lately: a histogram of logarithmic buckets, a quarter of a doubling wide. It may be
/// used from many threads; a sample that is lost in a race is lost.
#[derive(Debug)]
pub struct Latencies {
    buckets: [AtomicU32; BUCKETS],
    total: AtomicU32,
    /// What [`PERCENTILE`] of them take, as last computed; 0: not yet.
    high_ns: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU32::new(0) }; BUCKETS],
            total: AtomicU32::new(0),
            high_ns: AtomicU64::new(0),
        }
    }
}

impl Latencies {
    /// A read took so long, or was given up after that.
    pub fn note(&self, latency: Duration) {
        self.buckets[bucket_of(latency)].fetch_add(1, Ordering::Relaxed);
        let total = self.total.fetch_add(1, Ordering::Relaxed) + 1;
        if total >= MANY {
            self.halve();
        }
        if total >= LITTLE && total.is_multiple_of(STEP) {
            self.high_ns.store(self.percentile_ns(), Ordering::Relaxed);
        }
    }

    /// How long one replica is waited for before another is asked.
    pub fn delay(&self, policy: HedgeDelay) -> Duration {
        match policy {
            HedgeDelay::Fixed(delay) => delay,
            HedgeDelay::Adaptive => match self.high_ns.load(Ordering::Relaxed) {
                0 => UNMEASURED,
                high => Duration::from_nanos(high).max(SHORTEST),
            },
        }
    }

    fn halve(&self) {
        let mut total = 0;
        for bucket in &self.buckets {
            let half = bucket.load(Ordering::Relaxed) / 2;
            bucket.store(half, Ordering::Relaxed);
            total += half;
        }
        self.total.store(total, Ordering::Relaxed);
    }

    fn percentile_ns(&self) -> u64 {
        let counts = self
            .buckets
            .iter()
            .map(|bucket| u64::from(bucket.load(Ordering::Relaxed)));
        let total: u64 = counts.clone().sum();
        let mut left = (total * u64::from(PERCENTILE)).div_ceil(100);
        for (n, count) in counts.enumerate() {
            if count >= left {
                return end_of_bucket_ns(n);
            }
            left -= count;
        }
        end_of_bucket_ns(BUCKETS - 1)
    }
}

fn bucket_of(latency: Duration) -> usize {
    let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
    let ns = ns.clamp(1 << FIRST_LOG2, (1 << LAST_LOG2) - 1);
    let octave = ns.ilog2();
    let step = (ns >> (octave - STEPS_LOG2)) as usize & ((1 << STEPS_LOG2) - 1);
    (((octave - FIRST_LOG2) << STEPS_LOG2) as usize) | step
}

/// The first time that is past the bucket.
const fn end_of_bucket_ns(n: usize) -> u64 {
    let octave = (n >> STEPS_LOG2) as u32 + FIRST_LOG2;
    let step = (n & ((1 << STEPS_LOG2) - 1)) as u64;
    ((1 << STEPS_LOG2) + step + 1) << (octave - STEPS_LOG2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_delay_is_what_nearly_all_reads_take() {
        let latencies = Latencies::default();
        assert_eq!(latencies.delay(HedgeDelay::Adaptive), UNMEASURED);
        assert_eq!(latencies.delay(HedgeDelay::Fixed(SHORTEST)), SHORTEST);
        for n in 0..1000u64 {
            let ms = if n % 100 < 94 { 4 } else { 400 };
            latencies.note(Duration::from_millis(ms));
        }
        let delay = latencies.delay(HedgeDelay::Adaptive);
        assert!(
            delay >= Duration::from_millis(400) && delay < Duration::from_millis(520),
            "6 of 100 are slow: {delay:?}"
        );
        for n in 0..10_000u64 {
            let ms = if n % 100 < 97 { 4 } else { 400 };
            latencies.note(Duration::from_millis(ms));
        }
        let delay = latencies.delay(HedgeDelay::Adaptive);
        assert!(
            delay >= Duration::from_millis(4) && delay < Duration::from_millis(6),
            "3 of 100 are slow: {delay:?}"
        );
        for _ in 0..4 * MANY {
            latencies.note(Duration::from_micros(30));
        }
        assert_eq!(latencies.delay(HedgeDelay::Adaptive), SHORTEST);
    }

    proptest! {
        /// A bucket holds what it should, and is no wider than a quarter of where it begins.
        #[test]
        fn buckets_are_a_quarter_of_a_doubling_wide(ns in (1u64 << FIRST_LOG2)..(1u64 << LAST_LOG2)) {
            let n = bucket_of(Duration::from_nanos(ns));
            let end = end_of_bucket_ns(n);
            prop_assert!(ns < end && end <= ns + ns / 4 + 1, "{ns} {end}");
            if n > 0 {
                prop_assert!(end_of_bucket_ns(n - 1) <= ns);
            }
        }

        /// Whatever was measured: of the samples that count, no more than a twentieth took longer than the delay.
        #[test]
        fn few_take_longer_than_the_delay(samples in prop::collection::vec(1_000u64..3_000_000_000, 64..1024)) {
            let latencies = Latencies::default();
            let count = samples.len() / STEP as usize * STEP as usize;
            for &ns in &samples[..count] {
                latencies.note(Duration::from_nanos(ns));
            }
            let delay = latencies.delay(HedgeDelay::Adaptive);
            let longer = samples[..count].iter().filter(|&&ns| Duration::from_nanos(ns) > delay).count();
            prop_assert!(longer * 20 <= count, "{longer} of {count}");
        }

        /// Extremes have a bucket too.
        #[test]
        fn every_time_has_a_bucket(ns in any::<u64>()) {
            prop_assert!(bucket_of(Duration::from_nanos(ns)) < BUCKETS);
        }
    }
}
