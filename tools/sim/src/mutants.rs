//! Whether the checks see what they are for: bugs are planted in the node one by one, and seeds are run until one of them fails.
//!
//! Every bug gets the same seeds of the same scenarios, one scenario after the other. What is found first says which property, in
//! which scenario, after how many seeds; what is not found shows a workload or a check that is missing.

use std::time::{Duration, Instant};

use generation_engine::mutants::choose;

pub use generation_engine::mutants::Mutant;

use crate::check::Violation;
use crate::runner::{Omission, run};
use crate::scenario::Scenario;

/// The scenarios that are run, in turn: those in which something goes wrong.
pub const SCENARIOS: &[&str] = &[
    "cluster-everything",
    "cluster-ambushes",
    "cluster-replaced",
    "cluster-pressure",
    "cluster-memory",
    "group-ambushes",
    "cluster-network",
    "cluster-crashes",
    "group-everything",
];

/// How a bug was caught.
#[derive(Debug)]
pub struct Caught {
    /// After how many seeds, this one included.
    pub seeds: u64,
    /// The seed.
    pub seed: u64,
    /// Its scenario.
    pub scenario: &'static str,
    /// The first thing that was wrong.
    pub violation: Violation,
}

/// What became of a bug.
#[derive(Debug)]
pub struct Fate {
    /// The bug.
    pub mutant: Mutant,
    /// `None`: no seed failed.
    pub caught: Option<Caught>,
    /// Seeds that fail without the bug too, and say nothing about it.
    pub failing: Vec<(&'static str, u64)>,
    /// How long it took.
    pub took: Duration,
}

/// Takes the bug out again, whatever happens.
struct Planted;

impl Drop for Planted {
    fn drop(&mut self) {
        choose(None);
    }
}

/// Runs up to `seeds` seeds from `from` with a bug.
///
/// # Panics
/// If a scenario of the list has gone.
pub fn hunt(mutant: Mutant, seeds: u64, from: u64) -> Fate {
    let began = Instant::now();
    choose(Some(mutant));
    let _planted = Planted;
    let mut caught = None;
    let mut failing = Vec::new();
    for number in 0..seeds {
        let name = SCENARIOS[(number % SCENARIOS.len() as u64) as usize];
        let scenario = Scenario::of_name(name).expect("the list names scenarios");
        let seed = from.wrapping_add(number);
        if let Some(violation) = run(scenario, seed, &Omission::default()).violations.into_iter().next() {
            choose(None);
            let sound = run(scenario, seed, &Omission::default()).violations;
            choose(Some(mutant));
            if !sound.is_empty() {
                failing.push((scenario.name, seed));
                continue;
            }
            caught = Some(Caught {
                seeds: number + 1,
                seed,
                scenario: scenario.name,
                violation,
            });
            break;
        }
    }
    Fate {
        mutant,
        caught,
        failing,
        took: began.elapsed(),
    }
}
