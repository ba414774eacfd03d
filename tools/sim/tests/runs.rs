//! Whole runs: the same seed is the same run, seeds hold, and a run made smaller still fails.

use std::collections::BTreeSet;

use generation_node::points;
use generation_sim::check::check;
use generation_sim::history::{Event, Outcome};
use generation_sim::runner::{Omission, replay_line, run};
use generation_sim::scenario::{SCENARIOS, Scenario};

/// The scenarios of whole nodes.
fn singles() -> impl Iterator<Item = &'static Scenario> {
    SCENARIOS.iter().filter(|scenario| scenario.name.starts_with("single-"))
}

/// The scenarios of replicas, journals and snapshots alone.
fn groups() -> impl Iterator<Item = &'static Scenario> {
    SCENARIOS.iter().filter(|scenario| scenario.name.starts_with("group-"))
}

#[test]
fn the_same_seed_twice_is_the_same_history() {
    for scenario in singles() {
        for seed in 1..3 {
            let first = run(scenario, seed, &Omission::default());
            let second = run(scenario, seed, &Omission::default());
            assert_eq!(first.trace, second.trace, "{} {seed}", scenario.name);
            assert_eq!(first.history, second.history, "{} {seed}", scenario.name);
            let other = run(scenario, seed + 100, &Omission::default());
            assert_ne!(first.trace, other.trace, "{} {seed}", scenario.name);
        }
    }
}

#[test]
fn fixed_seeds_hold_and_do_something() {
    for scenario in singles() {
        let (mut done, mut incidents) = (0, 0);
        for seed in 100..106 {
            let run = run(scenario, seed, &Omission::default());
            assert_eq!(
                run.violations,
                [],
                "{}",
                replay_line(scenario, seed, &Omission::default())
            );
            done += run.operations.done;
            incidents += run.incidents.values().sum::<u64>();
        }
        assert!(done > 2_000, "{}: {done} operations", scenario.name);
        assert_eq!(incidents == 0, scenario.name.ends_with("-calm"), "{}", scenario.name);
    }
}

#[test]
fn replicas_hold_under_fixed_seeds() {
    for scenario in groups() {
        // The first of them drew segments too small for an entry once, the last a disk that fails while the journal is opened.
        for seed in [1000, 1001, 1002] {
            let run = run(scenario, seed, &Omission::default());
            let line = replay_line(scenario, seed, &Omission::default());
            assert_eq!(run.violations, [], "{line}");
            assert!(run.operations.done > 100, "{line}: {} operations", run.operations.done);
        }
    }
}

#[test]
fn nodes_are_struck_at_every_point_of_their_code_and_hold() {
    let scenario = Scenario::of_name("cluster-points").unwrap();
    let mut struck = BTreeSet::new();
    for seed in [55, 1, 5, 2, 3, 4, 6, 7] {
        let run = run(scenario, seed, &Omission::default());
        let line = replay_line(scenario, seed, &Omission::default());
        assert_eq!(run.violations, [], "{line}");
        struck.extend(
            run.points
                .iter()
                .filter(|(_, (_, struck))| *struck > 0)
                .map(|(point, _)| *point),
        );
        if struck.len() == points::ALL.len() {
            return;
        }
    }
    let never: Vec<_> = points::ALL.iter().filter(|point| !struck.contains(*point)).collect();
    panic!("nobody was struck at {never:?}");
}

#[test]
fn the_same_seed_twice_is_the_same_history_of_replicas() {
    for scenario in groups() {
        let first = run(scenario, 7, &Omission::default());
        let second = run(scenario, 7, &Omission::default());
        assert_eq!(first.trace, second.trace, "{}", scenario.name);
        assert_eq!(first.history, second.history, "{}", scenario.name);
    }
}

#[test]
fn the_same_seed_twice_is_the_same_history_of_whole_nodes() {
    let scenario = Scenario::of_name("cluster-replaced").unwrap();
    let first = run(scenario, 7, &Omission::default());
    let second = run(scenario, 7, &Omission::default());
    assert_eq!(first.trace, second.trace);
    assert_eq!(first.history, second.history);
    assert_eq!(first.violations, []);
}

#[test]
fn what_is_left_out_does_not_happen() {
    let scenario = Scenario::of_name("single-network").unwrap();
    let whole = run(scenario, 3, &Omission::default());
    let omission = Omission {
        incidents: (0..whole.plan.incidents.len()).collect(),
        operations: 50,
    };
    let part = run(scenario, 3, &omission);
    assert!(part.incidents.is_empty() && !whole.incidents.is_empty());
    let calls = |events: &[Event]| {
        events
            .iter()
            .filter(|event| matches!(event, Event::Call { .. }))
            .count()
    };
    assert!(calls(&part.history.events) < 100, "{}", calls(&part.history.events));
    assert!(replay_line(scenario, 3, &omission).ends_with("--operations 50"));
}

#[test]
fn a_lie_in_a_real_history_is_found() {
    // A reply of a run is turned into one of an earlier state; some lies are as good as the truth, most are not.
    let scenario = Scenario::of_name("single-network").unwrap();
    let history = run(scenario, 7, &Omission::default()).history;
    assert_eq!(check(&history), []);
    let hits: Vec<usize> = (0..history.events.len())
        .filter(|&place| {
            matches!(&history.events[place], Event::Return { outcome: Outcome::Done(reply), .. }
                if reply.status == "ok" && reply.value.is_some() && reply.index > 0)
        })
        .collect();
    let mut found = 0;
    for pair in hits.windows(20).step_by(5) {
        let mut lie = history.clone();
        let old = lie.events[pair[0]].clone();
        if let (Event::Return { outcome: told, .. }, Event::Return { outcome: old, .. }) =
            (&mut lie.events[pair[19]], old)
        {
            *told = old;
        }
        found += usize::from(!check(&lie).is_empty());
    }
    assert!(found > 5, "{found} of {}", hits.len() / 5);
}
