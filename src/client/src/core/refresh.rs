//! When the map is fetched: once for all who find theirs old, and never in a tight loop.
//!
//! Many requests learn the same thing at the same moment: that a reply shows a newer map, or that a leader is not where it was.
//! The first of them starts a fetch, the others are served by it. Fetches that follow each other closely keep a growing distance, so
//! that neither a shard without a leader nor a node that boasts of an epoch nobody has costs the cluster more than a few requests a
//! second.

use std::time::Duration;

/// Distance between two fetches, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Longest distance between two fetches that somebody waits for.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Fetches in a row for an epoch that none of them brings, after which it is not fetched for any more until a reply shows it again.
const FRUITLESS: u32 = 8;

/// Why somebody wants a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A reply showed that there is a map of this epoch.
    Epoch(u32),
    /// Whoever should lead a shard does not, or does not answer.
    Leader,
}

/// Whether a map is being fetched, and when the next one may be.
#[derive(Debug, Clone, Default)]
pub struct Refresh {
    running: bool,
    /// Highest epoch that a reply showed.
    shown: u32,
    /// Fetches that followed each other closely.
    streak: u32,
    /// Fetches in a row that did not bring `shown`.
    fruitless: u32,
    /// When the last one ended.
    ended: Option<Duration>,
}

impl Refresh {
    /// Somebody wants a map, while the client has one of epoch `known`. `Some`: the caller fetches it, after that long, and says so with
    /// [`Refresh::finished`]. `None`: there is nothing to fetch, or somebody does already.
    pub fn wanted(&mut self, reason: Reason, known: u32, now: Duration) -> Option<Duration> {
        if let Reason::Epoch(epoch) = reason {
            if epoch <= known {
                return None;
            }
            self.shown = self.shown.max(epoch);
        }
        (!self.running).then(|| self.begin(now))
    }

    /// The fetch is over and the client's map is of epoch `known` now. `Some`: the caller goes on, after that long, because a newer one
    /// was shown meanwhile.
    pub fn finished(&mut self, known: u32, now: Duration) -> Option<Duration> {
        self.running = false;
        self.ended = Some(now);
        if self.shown <= known {
            self.fruitless = 0;
            return None;
        }
        self.fruitless += 1;
        if self.fruitless >= FRUITLESS {
            self.fruitless = 0;
            self.shown = known;
            return None;
        }
        Some(self.begin(now))
    }

    fn begin(&mut self, now: Duration) -> Duration {
        self.running = true;
        let Some(ended) = self.ended else {
            return Duration::ZERO;
        };
        let pause = FIRST_PAUSE.saturating_mul(1 << self.streak.min(16)).min(LONGEST_PAUSE);
        if now >= ended + 2 * pause {
            self.streak = 0;
            return Duration::ZERO;
        }
        self.streak += 1;
        (ended + pause).saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn one_fetch_serves_all_who_want_it() {
        let mut refresh = Refresh::default();
        assert_eq!(refresh.wanted(Reason::Epoch(1), 1, MS), None, "it is known");
        assert_eq!(refresh.wanted(Reason::Epoch(2), 1, MS), Some(Duration::ZERO));
        for _ in 0..1000 {
            assert_eq!(refresh.wanted(Reason::Epoch(2), 1, MS), None);
            assert_eq!(refresh.wanted(Reason::Leader, 1, MS), None);
        }
        assert_eq!(refresh.finished(2, 2 * MS), None);
        assert_eq!(refresh.wanted(Reason::Epoch(2), 2, 3 * MS), None);
    }

    #[test]
    fn what_is_shown_during_a_fetch_is_fetched_after_it() {
        let mut refresh = Refresh::default();
        assert!(refresh.wanted(Reason::Leader, 1, MS).is_some());
        assert_eq!(refresh.wanted(Reason::Epoch(3), 1, MS), None);
        let pause = refresh.finished(2, 2 * MS).unwrap();
        assert!(pause > Duration::ZERO && pause <= FIRST_PAUSE);
        assert_eq!(refresh.finished(3, 30 * MS), None);
    }

    #[test]
    fn an_epoch_that_nobody_has_is_given_up() {
        let mut refresh = Refresh::default();
        assert!(refresh.wanted(Reason::Epoch(u32::MAX), 1, MS).is_some());
        let (mut now, mut fetches) = (MS, 1);
        while let Some(pause) = refresh.finished(1, now) {
            now += pause;
            fetches += 1;
        }
        assert_eq!(fetches, FRUITLESS);
    }

    #[test]
    fn after_some_quiet_a_fetch_is_made_at_once() {
        let mut refresh = Refresh::default();
        let mut now = MS;
        for _ in 0..20 {
            now += refresh.wanted(Reason::Leader, 1, now).unwrap();
            assert_eq!(refresh.finished(1, now), None);
        }
        assert_eq!(
            refresh.wanted(Reason::Leader, 1, now + 3 * LONGEST_PAUSE),
            Some(Duration::ZERO)
        );
    }

    proptest! {
        /// Whoever wants what and however fast a fetch is: at most one is under way, and their number is bounded by the time.
        #[test]
        fn fetches_are_bounded_by_time(steps in prop::collection::vec((0u64..30, any::<bool>(), 0u32..5), 1..400)) {
            let mut refresh = Refresh::default();
            let (mut now, mut due, mut fetches) = (Duration::ZERO, None, 0u32);
            for (ms, leader, epoch) in steps {
                now += MS * ms as u32;
                if due.is_some_and(|due| due <= now) {
                    fetches += 1;
                    due = refresh.finished(1, now).map(|pause| now + pause);
                }
                let reason = if leader { Reason::Leader } else { Reason::Epoch(epoch) };
                if let Some(pause) = refresh.wanted(reason, 1, now) {
                    prop_assert!(due.is_none(), "two at a time");
                    due = Some(now + pause);
                }
            }
            let most = 2 + (now.as_millis() / FIRST_PAUSE.as_millis()) as u32;
            prop_assert!(fetches <= most, "{fetches} in {now:?}");
        }
    }
}
