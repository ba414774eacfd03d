//! A circuit breaker for one node: whether to spare requests the wait for somebody who does not answer.
//!
//! ```text
//! closed ── 3 failures in a row ──▶ open ── its rest is over, somebody asks ──▶ half open (one probe)
//!    ▲                               ▲                                              │ │
//!    │                               └────────── the probe fails; a longer rest ────┘ │
//!    └──────────────────────── anything is answered ─────────────────────────────────-┘
//! ```
//!
//! (M. Nygard, Release It!, 2007.) It advises; who has no other choice asks the node all the same, and an answer to that closes it too.

use std::time::Duration;

use super::retry::jittered;

/// Failures in a row that open it.
const THRESHOLD: u32 = 3;
/// Time until the first probe.
const FIRST_REST: Duration = Duration::from_millis(500);
/// Longest time until the next probe.
const LONGEST_REST: Duration = Duration::from_secs(5);
/// Time after which a probe of which nothing was heard counts as failed.
const PROBE: Duration = Duration::from_secs(10);

/// What is known of a node's answering.
#[derive(Debug, Clone, Default)]
pub struct Breaker {
    /// Failures since the last answer.
    failures: u32,
    /// When the first of them was.
    since: Option<Duration>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Closed,
    Open {
        until: Duration,
        rests: u32,
    },
    HalfOpen {
        until: Duration,
        rests: u32,
    },
}

/// Whether to send a node a request that another can serve as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Pass,
    /// No; but somebody should see whether it answers again, and report.
    Probe,
    /// No.
    Refuse,
}

/// A breaker's state, for people and statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BreakerState {
    /// The node answers.
    #[default]
    Closed,
    /// The node does not answer and is left alone.
    Open,
    /// The node did not answer and is being probed.
    HalfOpen,
}

impl BreakerState {
    /// The stable name: `closed`, `open` or `half_open`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl Breaker {
    /// The node could not be connected to, or left a request unanswered that it had time for. `true`: this opened the breaker.
    /// `random` is any 64 random bits.
    pub fn failed(&mut self, now: Duration, random: u64) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert(now);
        let rest = |rests: u32| {
            let rest = FIRST_REST.saturating_mul(1 << rests.min(16)).min(LONGEST_REST);
            now + jittered(rest, random)
        };
        match self.state {
            State::Closed if self.failures >= THRESHOLD => {
                self.state = State::Open {
                    until: rest(0),
                    rests: 1,
                };
                true
            }
            // Whoever asked it all the same does not put the next probe off.
            State::Closed | State::Open { .. } => false,
            State::HalfOpen { rests, .. } => {
                self.state = State::Open {
                    until: rest(rests),
                    rests: rests.saturating_add(1),
                };
                false
            }
        }
    }

    /// The node answered, whatever it was and whoever asked. `true`: this closed the breaker.
    pub fn answered(&mut self) -> bool {
        let was_open = self.state != State::Closed;
        *self = Self::default();
        was_open
    }

    /// Whether a request may go to the node. [`Admission::Probe`] is said once for each rest.
    pub fn admit(&mut self, now: Duration) -> Admission {
        match self.state {
            State::Closed => Admission::Pass,
            State::Open { until, rests } | State::HalfOpen { until, rests } if now >= until => {
                self.state = State::HalfOpen {
                    until: now + PROBE,
                    rests,
                };
                Admission::Probe
            }
            State::Open { .. } | State::HalfOpen { .. } => Admission::Refuse,
        }
    }

    /// Since when the node has not answered, if there were failures since its last answer.
    pub const fn since(&self) -> Option<Duration> {
        self.since
    }

    /// Failures since the last answer.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// Its state, for people and statistics.
    pub const fn state(&self) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        for n in 1..=THRESHOLD {
            assert_eq!(breaker.admit(S), Admission::Pass);
            assert_eq!(breaker.failed(S, 7), n == THRESHOLD);
        }
        breaker
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            for _ in 1..THRESHOLD {
                assert!(!breaker.failed(S, 7));
            }
            assert!(!breaker.answered());
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(breaker.since(), None);
    }

    #[test]
    fn it_is_probed_once_a_rest_and_rests_grow() {
        let mut breaker = opened();
        assert_eq!(breaker.admit(S), Admission::Refuse);
        let (mut now, mut last) = (S, Duration::ZERO);
        for _ in 0..8 {
            let begun = now;
            while breaker.admit(now) == Admission::Refuse {
                now += Duration::from_millis(10);
            }
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
            assert_eq!(breaker.admit(now), Admission::Refuse, "one probe");
            let rest = now.checked_sub(begun).unwrap();
            assert!(
                rest >= last.min(LONGEST_REST / 2) && rest <= LONGEST_REST + Duration::from_millis(10),
                "{rest:?}"
            );
            last = rest;
            assert!(!breaker.failed(now, 7));
            assert_eq!(breaker.state(), BreakerState::Open);
        }
        assert_eq!(breaker.since(), Some(S));
    }

    #[test]
    fn an_answer_closes_it_whoever_asked() {
        let mut breaker = opened();
        assert!(breaker.answered());
        assert_eq!((breaker.admit(S), breaker.failures()), (Admission::Pass, 0));
    }

    #[test]
    fn a_probe_of_which_nothing_is_heard_is_followed_by_another() {
        let mut breaker = opened();
        assert_eq!(breaker.admit(S + LONGEST_REST), Admission::Probe);
        assert_eq!(breaker.admit(S + LONGEST_REST + PROBE / 2), Admission::Refuse);
        assert_eq!(breaker.admit(S + LONGEST_REST + PROBE), Admission::Probe);
    }

    proptest! {
        /// Whatever happens: it never opens before the threshold, never stays shut for longer than its longest rest or a probe takes,
        /// and probes are no closer to each other than half the first rest.
        #[test]
        fn it_neither_gives_up_a_node_for_good_nor_pesters_it(steps in prop::collection::vec((0u64..800, 0u8..4, any::<u64>()), 1..300)) {
            let mut breaker = Breaker::default();
            let (mut now, mut row, mut refused_since, mut probed) = (Duration::ZERO, 0, None, None);
            for (ms, what, random) in steps {
                now += Duration::from_millis(ms);
                match what {
                    0 => {
                        row = 0;
                        probed = None;
                        breaker.answered();
                    }
                    1 => {
                        row += 1;
                        breaker.failed(now, random);
                    }
                    _ => match breaker.admit(now) {
                        Admission::Pass => {
                            prop_assert!(row < THRESHOLD);
                            refused_since = None;
                        }
                        Admission::Probe => {
                            prop_assert!(row >= THRESHOLD);
                            if let Some(probed) = probed.replace(now) {
                                prop_assert!(now >= probed + FIRST_REST / 2);
                            }
                            refused_since = None;
                        }
                        Admission::Refuse => {
                            prop_assert!(row >= THRESHOLD);
                            let since = *refused_since.get_or_insert(now);
                            prop_assert!(now < since + LONGEST_REST + PROBE);
                        }
                    },
                }
                prop_assert_eq!(breaker.failures(), row);
            }
        }
    }
}
