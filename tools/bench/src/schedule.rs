//! When the next operation is due in an open loop, and how late the generator was.
//!
//! Owns the arrival process and the account of lateness. An arrival is a function of the rate and the
//! seed alone: it never waits for a reply, so a stalled server cannot slow it down ("coordinated
//! omission", Gil Tene). Nothing here reads a clock.

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Exp1};
use serde::{Deserialize, Serialize};

/// How the gaps between arrivals are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arrival {
    /// Evenly spaced.
    Constant,
    /// Exponentially distributed gaps: independent users.
    Poisson,
}

/// An endless sequence of intended send times.
#[derive(Debug)]
pub struct Schedule {
    arrival: Arrival,
    gap_ns: f64,
    /// Kept as a float so that gaps below a nanosecond do not round to a wrong rate.
    next_ns: f64,
    rng: SmallRng,
}

impl Schedule {
    /// Arrivals at `rate_per_s` from `start_ns` on, both on the run's clock.
    ///
    /// # Panics
    /// If the rate is not a positive finite number; the command line refuses it before.
    pub fn new(arrival: Arrival, rate_per_s: f64, start_ns: u64, seed: u64) -> Self {
        assert!(rate_per_s.is_finite() && rate_per_s > 0.0, "the rate must be positive");
        Self {
            arrival,
            gap_ns: 1e9 / rate_per_s,
            next_ns: start_ns as f64,
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    /// The intended time of the next operation.
    #[inline]
    #[allow(clippy::cast_sign_loss, reason = "time never runs below zero: gaps are not negative")]
    pub fn peek_ns(&self) -> u64 {
        self.next_ns as u64
    }

    /// Takes the next operation's intended time and moves to the one after.
    #[inline]
    pub fn pop_ns(&mut self) -> u64 {
        let due_ns = self.peek_ns();
        let gaps: f64 = match self.arrival {
            Arrival::Constant => 1.0,
            Arrival::Poisson => Exp1.sample(&mut self.rng),
        };
        self.next_ns += gaps * self.gap_ns;
        due_ns
    }
}

/// What the generator may owe to its schedule before a run is worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatenessLimit {
    /// A send later than this after its intended time counts as late.
    pub late_after_ns: u64,
    /// The run is invalid when more than this share of its sends was late.
    pub max_share: f64,
}

impl Default for LatenessLimit {
    fn default() -> Self {
        Self {
            late_after_ns: 1_000_000,
            max_share: 0.01,
        }
    }
}

/// The generator's own lateness: time between an operation's intended and actual send.
///
/// Operations held back because the target left too many unanswered are counted apart: that delay is
/// the target's, and is part of its latency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lateness {
    /// Operations sent on the generator's own time.
    pub sends: u64,
    /// Those of them sent later than [`LatenessLimit::late_after_ns`].
    pub late: u64,
    /// The largest lateness seen, in nanoseconds.
    pub max_ns: u64,
    /// Operations held back because the bound of unanswered operations was reached.
    pub held: u64,
}

impl Lateness {
    /// Accounts one send.
    #[inline]
    pub fn record(&mut self, limit: &LatenessLimit, intended_ns: u64, now_ns: u64, held: bool) {
        if held {
            self.held += 1;
            return;
        }
        let late_ns = now_ns.saturating_sub(intended_ns);
        self.sends += 1;
        self.late += u64::from(late_ns > limit.late_after_ns);
        self.max_ns = self.max_ns.max(late_ns);
    }

    /// Adds another thread's account.
    pub fn merge(&mut self, other: &Self) {
        self.sends += other.sends;
        self.late += other.late;
        self.max_ns = self.max_ns.max(other.max_ns);
        self.held += other.held;
    }

    /// Share of sends that were late, 0 to 1.
    pub fn late_share(&self) -> f64 {
        if self.sends == 0 {
            0.0
        } else {
            self.late as f64 / self.sends as f64
        }
    }

    /// Why the run is invalid, if the generator fell behind.
    pub fn verdict(&self, limit: &LatenessLimit) -> Option<String> {
        (self.late_share() > limit.max_share).then(|| {
            format!(
                "the generator fell behind: {:.2} % of {} sends were more than {:.1} ms late (at most {:.2} % allowed, \
                 worst {:.1} ms); lower the rate, add --threads, or give the client a core of its own",
                self.late_share() * 100.0,
                self.sends,
                limit.late_after_ns as f64 / 1e6,
                limit.max_share * 100.0,
                self.max_ns as f64 / 1e6,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_arrivals_keep_the_rate_over_many_sends() {
        let mut schedule = Schedule::new(Arrival::Constant, 3_000_000.0, 1_000, 7);
        let mut last = 0;
        for _ in 0..3_000_000 {
            last = schedule.pop_ns();
        }
        assert!((999_990_000..=1_000_001_000).contains(&last), "{last}");
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_variance_of_the_process() {
        let mut schedule = Schedule::new(Arrival::Poisson, 1_000.0, 0, 7);
        let (mut last, mut sum, mut squares) = (0_u64, 0.0, 0.0);
        for _ in 0..200_000 {
            let due = schedule.pop_ns();
            let gap = (due - last) as f64;
            last = due;
            sum += gap;
            squares += gap * gap;
        }
        let mean = sum / 200_000.0;
        let deviation = (squares / 200_000.0 - mean * mean).sqrt();
        assert!((mean / 1e6 - 1.0).abs() < 0.02, "mean {mean}");
        assert!((deviation / mean - 1.0).abs() < 0.02, "deviation {deviation}");
    }

    #[test]
    fn held_sends_do_not_count_as_late() {
        let limit = LatenessLimit::default();
        let mut lateness = Lateness::default();
        lateness.record(&limit, 0, 50_000_000, true);
        assert_eq!((lateness.sends, lateness.late, lateness.held), (0, 0, 1));
        assert!(lateness.verdict(&limit).is_none());
    }

    #[test]
    fn more_than_the_allowed_share_of_late_sends_is_a_verdict() {
        let limit = LatenessLimit::default();
        let mut lateness = Lateness::default();
        for i in 0..1_000_u64 {
            lateness.record(&limit, 0, if i < 11 { 1_000_001 } else { 1_000_000 }, false);
        }
        assert_eq!(lateness.late, 11);
        assert!(lateness.verdict(&limit).expect("a verdict").contains("fell behind"));
    }
}
