//! Seeds that once failed: each by the name of what was wrong.

use std::collections::BTreeSet;

use generation_sim::runner::{Omission, replay_line, run};
use generation_sim::scenario::Scenario;

/// Runs a seed with some of its incidents, and so many operations.
fn holds(scenario: &str, seed: u64, incidents: &[usize], operations: u64) {
    let scenario = Scenario::of_name(scenario).unwrap();
    let omission = Omission {
        incidents: (0..64)
            .filter(|number| !incidents.contains(number))
            .collect::<BTreeSet<_>>(),
        operations,
    };
    let run = run(scenario, seed, &omission);
    assert_eq!(run.violations, [], "{}", replay_line(scenario, seed, &omission));
}

/// A power cut came between the name of a segment's file and its space. The file was used as it was, and when the disk was full the
/// journal failed.
#[test]
fn a_short_segment_meets_a_full_disk() {
    holds("cluster-everything", 700_044, &[0, 1, 2, 3, 4], 0);
}

/// A founder lost power when it had made its replica and not yet formed the group. Nobody formed it ever after.
#[test]
fn a_founder_dies_before_it_forms_its_group() {
    holds("cluster-points", 1, &[0], 1);
}

/// Two candidates of one term were both elected: votes are ordered by term and candidate, and a voter granted the greater one too.
#[test]
fn nobody_votes_twice_in_a_term() {
    let incidents: Vec<usize> = (0..64).collect();
    holds("cluster-points", 7, &incidents, 0);
}
