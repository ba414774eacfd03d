//! Which replica a read goes to that any of them may answer.
//!
//! The better of two that are drawn at random ("power of two choices": M. Mitzenmacher, The Power of Two Choices in Randomized Load
//! Balancing, 2001): many clients that all know the best replica would all go there, and it would not be the best for long. Replicas of the
//! client's own zone come before all others, where the map says which zone a node is in.
//!
//! What failed at a replica is asked of the leader next, which is as fresh as any of them, and then in turn.

use super::error::{Error, NotSent};
use super::load::Estimate;
use super::routing::Target;

/// A replica that may be asked.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Where it is.
    pub target: Target,
    /// The node's zone, where the map has one.
    pub zone: Option<&'a str>,
    /// How quick it looks.
    pub estimate: Estimate,
}

/// Whom to ask next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// One of the replicas, by [`choose`].
    Replica,
    /// The leader, if it is known.
    Leader,
}

impl Turn {
    /// Of the attempt with this number, counted from 0.
    pub const fn of_attempt(number: u32) -> Self {
        if number.is_multiple_of(2) {
            Self::Replica
        } else {
            Self::Leader
        }
    }
}

/// Whether what a replica answered only says that another must be asked: it is not fresh enough, or only the leader can tell.
pub const fn falls_back(error: &Error) -> bool {
    matches!(
        error,
        Error::NotSent(NotSent::TooStale { .. } | NotSent::NoLeader { .. })
    )
}

/// The candidate to ask; `None` where there is none. `own` is the zone of the client, `not` the node that was asked last: it
/// is passed over where there is another. `random` is any 64 random bits.
pub fn choose(candidates: &[Candidate<'_>], own: Option<&str>, not: Option<u64>, random: u64) -> Option<Target> {
    let is_near = |candidate: &Candidate<'_>| own.is_some() && candidate.zone == own;
    let is_other = |candidate: &Candidate<'_>| not != Some(candidate.target.node);
    // From the narrowest circle that has anybody in it.
    let circles: [&dyn Fn(&Candidate<'_>) -> bool; 3] = [
        &|candidate| is_near(candidate) && is_other(candidate),
        &is_other,
        &|_| true,
    ];
    for is_in in circles {
        let circle = || candidates.iter().filter(|candidate| is_in(candidate));
        let count = circle().count();
        if count == 0 {
            continue;
        }
        let first = (random >> 32) as usize % count;
        // One of the others, if there are any.
        let second = (first + 1 + (random as u32) as usize % count.saturating_sub(1).max(1)) % count;
        let (first, second) = (circle().nth(first)?, circle().nth(second)?);
        let is_second = second.estimate.is_better_than(&first.estimate);
        return Some(if is_second { second.target } else { first.target });
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn candidate(node: u64, zone: Option<&str>, latency_us: u64, outstanding: u32) -> Candidate<'_> {
        Candidate {
            target: Target {
                node,
                addr: ([127, 0, 0, 1], 7400).into(),
                core: 0,
            },
            zone,
            estimate: Estimate {
                latency: (latency_us != 0).then(|| Duration::from_micros(latency_us)),
                outstanding,
            },
        }
    }

    #[test]
    fn attempts_alternate_between_a_replica_and_the_leader() {
        let turns: Vec<Turn> = (0..4).map(Turn::of_attempt).collect();
        assert_eq!(turns, [Turn::Replica, Turn::Leader, Turn::Replica, Turn::Leader]);
    }

    #[test]
    fn one_that_is_never_better_of_two_is_never_chosen_and_the_others_all_are() {
        let candidates = [
            candidate(1, None, 100, 0),
            candidate(2, None, 100, 5),
            candidate(3, None, 5_000, 5),
        ];
        let mut chosen = [0; 3];
        let mut random = 1u64;
        for _ in 0..3000 {
            random = random
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            let mixed = (random ^ (random >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let target = choose(&candidates, None, None, mixed ^ (mixed >> 32)).unwrap();
            chosen[target.node as usize - 1] += 1;
        }
        // The best wins two of the three pairs, the second one.
        assert!((1850..2150).contains(&chosen[0]), "{chosen:?}");
        assert_eq!(chosen[2], 0, "{chosen:?}");
    }

    proptest! {
        /// The choice is in the narrowest circle that is not empty, and never the worst of a circle of two and more.
        #[test]
        fn the_own_zone_comes_first_and_whoever_was_asked_last(
            drawn in prop::collection::vec((0u8..3, 1u64..1000, 0u32..10), 0..8),
            own in prop::option::of(0u8..3),
            not in prop::option::of(0u64..8),
            random in any::<u64>(),
        ) {
            let names = ["a", "b"];
            let zone = |z: u8| names.get(usize::from(z)).copied();
            let candidates: Vec<_> = drawn
                .iter()
                .enumerate()
                .map(|(n, &(z, latency, outstanding))| candidate(n as u64, zone(z), latency, outstanding))
                .collect();
            let own = own.and_then(zone);
            let Some(chosen) = choose(&candidates, own, not, random) else {
                prop_assert!(candidates.is_empty());
                return Ok(());
            };
            let chosen = chosen.node as usize;
            let others: Vec<usize> = (0..candidates.len()).filter(|&n| not != Some(candidates[n].target.node)).collect();
            let near: Vec<usize> = others.iter().copied().filter(|&n| own.is_some() && candidates[n].zone == own).collect();
            let circle = if !near.is_empty() {
                near
            } else if !others.is_empty() {
                others
            } else {
                (0..candidates.len()).collect()
            };
            prop_assert!(circle.contains(&chosen));
            if circle.len() > 1 {
                let is_beaten_by_all = circle
                    .iter()
                    .all(|&n| n == chosen || candidates[n].estimate.is_better_than(&candidates[chosen].estimate));
                prop_assert!(!is_beaten_by_all);
            }
        }
    }
}
