//! `sim`: runs seeds of scenarios, replays one, makes it smaller, judges histories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use generation_sim::history::History;
use generation_sim::runner::{Omission, Run, replay_line, run, shrink};
use generation_sim::scenario::{SCENARIOS, Scenario};
use generation_sim::{Dice, check};

/// A violation was found.
const EXIT_VIOLATION: u8 = 1;
/// The command line, or a file it names, cannot be used.
const EXIT_USAGE: u8 = 2;

#[derive(Debug, Parser)]
#[command(
    name = "sim",
    about = "Deterministic simulation of Generation: seeds in, violations out."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs seeds, each a run of its own, and says of those that fail how to run them again.
    Run {
        /// How many seeds.
        #[arg(long, default_value_t = 100)]
        seeds: u64,
        /// Ends after the seed with which so many seconds have passed, however many seeds are left.
        #[arg(long)]
        seconds: Option<u64>,
        /// The scenario; all of them in turn without.
        #[arg(long)]
        scenario: Option<String>,
        /// The first seed. Without, seeds nobody has run.
        #[arg(long)]
        seed_from: Option<u64>,
        /// Where to keep the histories of failing seeds.
        #[arg(long)]
        keep: Option<PathBuf>,
    },
    /// Runs one seed twice, compares, and tells what happened.
    Replay {
        /// The seed.
        seed: u64,
        /// The scenario.
        #[arg(long)]
        scenario: String,
        /// Incidents to leave out, by number.
        #[arg(long, value_delimiter = ',')]
        without: Vec<usize>,
        /// Operations at most.
        #[arg(long, default_value_t = 0)]
        operations: u64,
        /// Where to write the history.
        #[arg(long)]
        history: Option<PathBuf>,
    },
    /// Finds how little of a failing seed is enough to fail.
    Shrink {
        /// The seed.
        seed: u64,
        /// The scenario.
        #[arg(long)]
        scenario: String,
        /// Where to write the history of the smallest run.
        #[arg(long)]
        history: Option<PathBuf>,
    },
    /// Judges a history.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Lists the scenarios.
    Scenarios,
    /// Plants bugs in the node one by one, and says which property finds each, after how many seeds. Needs a build with the feature
    /// `mutants`.
    Mutants {
        /// How many seeds at most for each.
        #[arg(long, default_value_t = 100)]
        seeds: u64,
        /// The first seed. Without, seeds nobody has run.
        #[arg(long)]
        seed_from: Option<u64>,
        /// These alone, by name.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_VIOLATION),
        Err(message) => {
            eprintln!("sim: {message}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// Executes a command; says whether nothing was violated.
fn execute(command: Command) -> Result<bool, String> {
    match command {
        Command::Run {
            seeds,
            seconds,
            scenario,
            seed_from,
            keep,
        } => {
            let scenarios = match &scenario {
                Some(name) => vec![find(name)?],
                None => SCENARIOS.iter().collect(),
            };
            let from = seed_from.unwrap_or_else(fresh_seed);
            let limit = seconds.map(Duration::from_secs);
            run_seeds(&scenarios, seeds, limit, from, keep.as_deref())
        }
        Command::Replay {
            seed,
            scenario,
            without,
            operations,
            history,
        } => {
            let omission = Omission {
                incidents: without.into_iter().collect(),
                operations,
            };
            replay(find(&scenario)?, seed, &omission, history.as_deref())
        }
        Command::Shrink {
            seed,
            scenario,
            history,
        } => shrink_seed(find(&scenario)?, seed, history.as_deref()),
        Command::Check { file } => check_file(&file),
        Command::Mutants { seeds, seed_from, only } => mutants(seeds, seed_from.unwrap_or_else(fresh_seed), &only),
        Command::Scenarios => {
            for scenario in SCENARIOS {
                println!("{:20} {}", scenario.name, scenario.about);
            }
            Ok(true)
        }
    }
}

fn find(name: &str) -> Result<&'static Scenario, String> {
    Scenario::of_name(name).ok_or_else(|| {
        let names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        format!("there is no scenario `{name}`; there are {}", names.join(", "))
    })
}

/// A seed from which on nobody has run any: the time, scattered.
fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    // Short enough to be typed.
    Dice::new(now.as_nanos() as u64).below(1 << 40)
}

#[derive(Debug, Default)]
struct Totals {
    failed: u64,
    done: u64,
    refused: u64,
    in_doubt: u64,
    simulated_s: f64,
    sent: u64,
    lost: u64,
    duplicated: u64,
    ambushes: u64,
    points: BTreeMap<&'static str, (u64, u64)>,
    incidents: BTreeMap<&'static str, u64>,
}

impl Totals {
    fn add(&mut self, run: &Run) {
        self.done += run.operations.done;
        self.refused += run.operations.refused;
        self.in_doubt += run.operations.in_doubt;
        self.simulated_s += run.elapsed.as_secs_f64();
        self.sent += run.counters.sent;
        self.lost += run.counters.lost;
        self.duplicated += run.counters.duplicated;
        self.ambushes += run.counters.ambushes;
        for (point, (passed, struck)) in &run.points {
            let of_point = self.points.entry(point).or_default();
            *of_point = (of_point.0 + passed, of_point.1 + struck);
        }
        for (kind, count) in &run.incidents {
            *self.incidents.entry(kind).or_default() += count;
        }
    }
}

fn run_seeds(
    scenarios: &[&'static Scenario],
    seeds: u64,
    limit: Option<Duration>,
    from: u64,
    keep: Option<&Path>,
) -> Result<bool, String> {
    let began = Instant::now();
    let mut totals = Totals::default();
    println!("seeds from {from} on");
    let mut ran = 0;
    for number in 0..seeds {
        if limit.is_some_and(|limit| began.elapsed() >= limit) {
            break;
        }
        ran += 1;
        let seed = from.wrapping_add(number);
        let scenario = scenarios[(number % scenarios.len() as u64) as usize];
        let omission = Omission::default();
        let run = run(scenario, seed, &omission);
        totals.add(&run);
        if let Some(first) = run.violations.first() {
            totals.failed += 1;
            println!(
                "FAILED: {first}; run it again: {}",
                replay_line(scenario, seed, &omission)
            );
            if let Some(directory) = keep {
                write(
                    &directory.join(format!("{}-{seed}.ndjson", scenario.name)),
                    &run.history,
                )?;
            }
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!(
        "{ran} seeds in {took:.1} s ({:.0} a minute; {:.0} times real time)",
        f64::from(ran) * 60.0 / took,
        totals.simulated_s / took
    );
    println!(
        "operations: {} answered, {} refused, {} in doubt",
        totals.done, totals.refused, totals.in_doubt
    );
    println!(
        "datagrams: {} sent, {} lost, {} doubled",
        totals.sent, totals.lost, totals.duplicated
    );
    let incidents: Vec<_> = totals
        .incidents
        .iter()
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    println!(
        "incidents: {}; killed at a point: {}",
        incidents.join(", "),
        totals.ambushes
    );
    let points: Vec<_> = totals
        .points
        .iter()
        .map(|(point, (passed, struck))| format!("{point} {struck} of {passed}"))
        .collect();
    if !points.is_empty() {
        println!("struck at points: {}", points.join(", "));
    }
    println!("violations: {}", totals.failed);
    Ok(totals.failed == 0)
}

fn replay(scenario: &Scenario, seed: u64, omission: &Omission, file: Option<&Path>) -> Result<bool, String> {
    let first = run(scenario, seed, omission);
    let second = run(scenario, seed, omission);
    for (number, incident) in first.plan.incidents.iter().enumerate() {
        let omitted = if omission.incidents.contains(&number) {
            " (left out)"
        } else {
            ""
        };
        println!("incident {number}{omitted}: {incident}");
    }
    println!("trace {:016x}, {} events", first.trace, first.history.events.len());
    if let Some(file) = file {
        write(file, &first.history)?;
    }
    let same = first.trace == second.trace && first.history == second.history;
    if !same {
        println!("NOT THE SAME TWICE: trace {:016x} the second time", second.trace);
    }
    for line in &first.ends {
        println!("{line}");
    }
    for violation in &first.violations {
        println!("FAILED: {violation}");
    }
    Ok(same && first.violations.is_empty())
}

fn shrink_seed(scenario: &Scenario, seed: u64, file: Option<&Path>) -> Result<bool, String> {
    let progress = |omission: &Omission| println!("still fails: {}", replay_line(scenario, seed, omission));
    let Some((omission, run)) = shrink(scenario, seed, progress) else {
        println!("the seed does not fail");
        return Ok(true);
    };
    if let Some(file) = file {
        write(file, &run.history)?;
    }
    for violation in &run.violations {
        println!("FAILED: {violation}");
    }
    println!("{}", replay_line(scenario, seed, &omission));
    Ok(false)
}

fn check_file(file: &Path) -> Result<bool, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let history = History::parse(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    let violations = check::check(&history);
    for violation in &violations {
        println!("FAILED: {violation}");
    }
    println!(
        "{} operations, {} events, violations: {}",
        history.operations().len(),
        history.events.len(),
        violations.len()
    );
    Ok(violations.is_empty())
}

#[cfg(not(feature = "mutants"))]
fn mutants(_: u64, _: u64, _: &[String]) -> Result<bool, String> {
    Err("this build has no bugs planted: build it with `--features mutants`".to_owned())
}

#[cfg(feature = "mutants")]
fn mutants(seeds: u64, from: u64, only: &[String]) -> Result<bool, String> {
    use generation_sim::mutants::{Mutant, hunt};
    let named = |name: &String| Mutant::ALL.iter().any(|mutant| mutant.name() == name);
    if let Some(unknown) = only.iter().find(|name| !named(name)) {
        let names: Vec<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
        return Err(format!("there is no bug `{unknown}`; there are {}", names.join(", ")));
    }
    let (mut caught, mut all) = (0, 0);
    println!("up to {seeds} seeds each from {from}");
    for &mutant in Mutant::ALL {
        if !only.is_empty() && !only.iter().any(|name| name == mutant.name()) {
            continue;
        }
        all += 1;
        let fate = hunt(mutant, seeds, from);
        let took = fate.took.as_secs_f64();
        for (scenario, seed) in &fate.failing {
            println!("FAILED without a bug too: sim replay {seed} --scenario {scenario}");
        }
        match fate.caught {
            Some(found) => {
                caught += 1;
                println!(
                    "{:24} caught after {} seeds ({took:.1} s) by {} of {} {}: {}",
                    mutant.name(),
                    found.seeds,
                    found.violation.property,
                    found.scenario,
                    found.seed,
                    found.violation.what.lines().next().unwrap_or_default()
                );
            }
            None => println!(
                "{:24} NOT CAUGHT in {seeds} seeds ({took:.1} s):{}",
                mutant.name(),
                mutant.about()
            ),
        }
    }
    println!("caught: {caught} of {all}");
    Ok(caught == all)
}

fn write(file: &Path, history: &History) -> Result<(), String> {
    std::fs::write(file, history.to_text()).map_err(|error| format!("cannot write {}: {error}", file.display()))
}
