//! Ratios between servers, measured in alternating rounds on one machine.
//!
//! Every round runs the baseline first and last (A B C A'), and every second round in reverse, so that a
//! drifting machine cannot favour one. Ratios are taken within a round; the spread of A'/A is the noise floor,
//! below which a difference is said to be none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::BenchError;
use crate::engine::{Mode, Progress, RunContext, RunSettings, run};
use crate::peers::Server;
use crate::result::RunResult;
use crate::system::{Environment, Probe};
use crate::target::Connector;
use crate::workload::{Class, KeyDistribution, Mix, WorkloadSpec};

/// One line of a comparison: operation, connections and depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The operation.
    pub class: Class,
    /// Connections.
    pub connections: usize,
    /// Operations written at once on each.
    pub depth: u32,
}

impl Row {
    /// The rows of the scenario `single`.
    pub const SINGLE: [Self; 7] = [
        Self {
            class: Class::Get,
            connections: 50,
            depth: 64,
        },
        Self {
            class: Class::Get,
            connections: 50,
            depth: 16,
        },
        Self {
            class: Class::Get,
            connections: 50,
            depth: 1,
        },
        Self {
            class: Class::Get,
            connections: 1,
            depth: 1,
        },
        Self {
            class: Class::Put,
            connections: 50,
            depth: 64,
        },
        Self {
            class: Class::Put,
            connections: 50,
            depth: 16,
        },
        Self {
            class: Class::Put,
            connections: 50,
            depth: 1,
        },
    ];
}

impl std::str::FromStr for Row {
    type Err = String;

    /// Parses `get:50x64`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (class, shape) = text.split_once(':')?;
            let class = match class {
                "get" => Class::Get,
                "put" => Class::Put,
                "incr" => Class::Incr,
                "multiget" => Class::MultiGet,
                _ => return None,
            };
            let (connections, depth) = shape.split_once('x')?;
            let row = Self {
                class,
                connections: connections.parse().ok()?,
                depth: depth.parse().ok()?,
            };
            (row.connections > 0 && row.depth > 0).then_some(row)
        };
        parse().ok_or_else(|| format!("{text:?} is not a row: write get:50x64 (operation:connections x depth)"))
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {}x{}",
            self.class.name().to_uppercase(),
            self.connections,
            self.depth
        )
    }
}

impl Row {
    /// The rows of the scenario `replicated`: many clients that each wait for their reply, and writes in batches.
    pub const REPLICATED: [Self; 4] = [
        Self {
            class: Class::Put,
            connections: 256,
            depth: 1,
        },
        Self {
            class: Class::Get,
            connections: 256,
            depth: 1,
        },
        Self {
            class: Class::Put,
            connections: 64,
            depth: 16,
        },
        Self {
            class: Class::Put,
            connections: 1,
            depth: 1,
        },
    ];
}

/// How a comparison is carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompareSettings {
    /// What is measured.
    pub rows: Vec<Row>,
    /// Rounds of each row.
    pub rounds: usize,
    /// Measured time of one run.
    pub duration: Duration,
    /// Warm-up of one run.
    pub warmup: Duration,
    /// Keys, lengths, distribution.
    pub workload: WorkloadSpec,
    /// CPUs of the client's threads.
    pub client_cpus: Vec<usize>,
    /// CPUs of the servers.
    pub server_cpus: Vec<usize>,
    /// Whether to look for every key after loading.
    #[serde(default)]
    pub read_back: bool,
}

impl CompareSettings {
    /// Runs of a comparison of `servers` servers: in each round of each row every server once, and the baseline again.
    pub fn runs(&self, servers: usize) -> usize {
        self.rows.len() * self.rounds * (servers + 1)
    }

    /// How long `runs` runs take, loading and connecting apart.
    pub fn time_of(&self, runs: usize) -> Duration {
        (self.warmup + self.duration) * u32::try_from(runs).unwrap_or(u32::MAX)
    }
}

/// A whole comparison; the first server is the baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Where it was measured.
    pub environment: Environment,
    /// How.
    pub settings: CompareSettings,
    /// Names, the baseline's first.
    pub servers: Vec<String>,
    /// Resident memory around the loading of the data set, by server.
    pub footprints: Vec<Option<Footprint>>,
    /// The rows, as far as they were measured.
    pub rows: Vec<RowResult>,
    /// Runs of a round that did not come to its end.
    #[serde(default)]
    pub partial: Vec<RunResult>,
    /// What ended it before its time.
    pub error: Option<String>,
    /// Whether somebody stopped it.
    pub interrupted: bool,
}

/// Resident memory of a server's processes around the loading of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Footprint {
    /// Before, in bytes.
    pub before_bytes: u64,
    /// After, in bytes.
    pub after_bytes: u64,
    /// Entries loaded.
    pub entries: u64,
    /// Entries found when every key was looked for afterwards, where that was done.
    #[serde(default)]
    pub found: Option<u64>,
}

impl Footprint {
    /// Whole resident memory an entry, in bytes.
    pub fn whole_per_entry(&self) -> f64 {
        self.after_bytes as f64 / self.held()
    }

    /// Entries that the memory is spread over: those that are there.
    fn held(&self) -> f64 {
        self.found.unwrap_or(self.entries).max(1) as f64
    }

    /// Growth an entry, in bytes.
    pub fn growth_per_entry(&self) -> f64 {
        self.after_bytes.saturating_sub(self.before_bytes) as f64 / self.held()
    }
}

/// A side that works for less of the time is not what limits a closed loop.
const IDLE: f64 = 0.9;

/// One row of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowResult {
    /// What was measured.
    pub row: Row,
    /// Rounds; in each the servers in the order of [`Comparison::servers`], and the baseline's second run last.
    pub rounds: Vec<Vec<RunResult>>,
}

/// Minimum, median and maximum over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Median.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of some values; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { min, median, max })
    }
}

/// A figure of a run that servers are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Server's processor time an operation, in microseconds.
    ServerCpu,
    /// Operations a second.
    Rate,
    /// Median latency in microseconds.
    P50,
    /// 99th percentile in microseconds.
    P99,
    /// 99.9th percentile in microseconds.
    P999,
}

impl Metric {
    /// Every metric, in report order.
    pub const ALL: [Self; 5] = [Self::ServerCpu, Self::Rate, Self::P50, Self::P99, Self::P999];

    /// Whether more is better.
    pub const fn higher_is_better(self) -> bool {
        matches!(self, Self::Rate)
    }

    /// Its value in a run.
    pub fn of(self, result: &RunResult) -> Option<f64> {
        let class = result.classes.first();
        match self {
            Self::ServerCpu => result.server_cpu.map(|cpu| cpu.us_per_operation),
            Self::Rate => Some(result.rate_per_s),
            Self::P50 => class.map(|class| class.latency.p50_us),
            Self::P99 => class.map(|class| class.latency.p99_us),
            Self::P999 => class.map(|class| class.latency.p99_9_us),
        }
        .filter(|value| *value > 0.0)
    }
}

impl RowResult {
    /// A metric of server `index` (0 = baseline) over the rounds.
    pub fn spread(&self, index: usize, metric: Metric) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| metric.of(round.get(index)?)))
    }

    /// How many times better the baseline is than server `index` (above 1: the baseline wins), within each round. The
    /// baseline's value is the mean of its two runs.
    pub fn ratio(&self, index: usize, metric: Metric) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| {
            let first = metric.of(round.first()?)?;
            let last = metric.of(round.last()?)?;
            let (ours, theirs) = (f64::midpoint(first, last), metric.of(round.get(index)?)?);
            Some(if metric.higher_is_better() {
                ours / theirs
            } else {
                theirs / ours
            })
        }))
    }

    /// Whether the generator was the bottleneck of most runs against server `index`.
    pub fn generator_bound(&self, index: usize, server_cpus: usize) -> bool {
        let runs = || self.rounds.iter().filter_map(|round| round.get(index));
        2 * runs().filter(|run| run.generator_bound(server_cpus)).count() > runs().count()
    }

    /// The remarks on all of `servers`: each once, with the servers it is about.
    pub fn remarks_on(&self, servers: &[String], server_cpus: usize) -> Vec<String> {
        let mut all: Vec<(String, Vec<&str>)> = Vec::new();
        for (index, server) in servers.iter().enumerate() {
            for remark in self.remarks(index, server_cpus) {
                match all.iter_mut().find(|(known, _)| *known == remark) {
                    Some((_, of)) => of.push(server),
                    None => all.push((remark, vec![server])),
                }
            }
        }
        let lines = all.into_iter();
        lines
            .map(|(remark, of)| format!("{}: {remark}", of.join(", ")))
            .collect()
    }

    /// What a reader must know of server `index` before believing its line.
    pub fn remarks(&self, index: usize, server_cpus: usize) -> Vec<String> {
        let runs = || self.rounds.iter().filter_map(|round| round.get(index));
        let mut remarks = Vec::new();
        if self.generator_bound(index, server_cpus) {
            remarks.push(
                "the generator was the bottleneck: the rate is a lower bound, the latencies include the generator's own queue; the CPU \
                 time stands"
                    .to_owned(),
            );
        }
        let idle = |run: &RunResult| {
            let cores = run.server_cpu.map(|cpu| cpu.cores);
            run.client_busy < IDLE && cores.is_some_and(|cores| cores < IDLE * server_cpus.max(1) as f64)
        };
        if 2 * runs().filter(|run| idle(run)).count() > runs().count() {
            remarks.push(
                "neither side was busy: they waited for each other, or for a CPU that others used; the rate says no more than the latency does"
                    .to_owned(),
            );
        }
        let failed: u64 = runs().map(RunResult::failed).sum();
        if failed > 0 {
            remarks.push(format!("{failed} operations failed"));
        }
        let misses: u64 = runs().map(|run| run.misses).sum();
        if misses > 0 {
            remarks.push(format!(
                "{misses} reads found nothing: it does not hold the whole data set (--memory, --keys)"
            ));
        }
        remarks
    }

    /// Largest deviation of the baseline from itself within a round: the noise floor (0.05 = 5 %).
    pub fn noise(&self, metric: Metric) -> Option<f64> {
        self.rounds
            .iter()
            .filter_map(|round| {
                let (first, last) = (metric.of(round.first()?)?, metric.of(round.last()?)?);
                Some((last / first).max(first / last) - 1.0)
            })
            .max_by(f64::total_cmp)
    }
}

/// Loads the data set into a server, by writes in batches, and tells what it costs in resident memory.
pub fn load(
    server: &Server,
    workload: &WorkloadSpec,
    client_cpus: &[usize],
    read_back: bool,
    stop: &AtomicBool,
) -> Result<Option<Footprint>, BenchError> {
    let before = server.probe().resident_bytes();
    load_keys(server.connector(), workload, client_cpus, stop)?;
    let after = server.probe().resident_bytes();
    let found = read_back
        .then(|| count_keys(server.connector(), workload, client_cpus, stop))
        .transpose()?;
    Ok(before.zip(after).map(|(before_bytes, after_bytes)| Footprint {
        before_bytes,
        after_bytes,
        entries: workload.keys,
        found,
    }))
}

/// Writes every key of a workload once.
pub fn load_keys(
    connector: &dyn Connector,
    workload: &WorkloadSpec,
    client_cpus: &[usize],
    stop: &AtomicBool,
) -> Result<(), BenchError> {
    let result = every_key(Class::Put, connector, workload, client_cpus, stop)?;
    if result.failed() > 0 {
        return Err(BenchError::Load(format!(
            "{} of {} writes failed: {:?}",
            result.failed(),
            workload.keys,
            result.failures
        )));
    }
    Ok(())
}

/// Reads every key of a workload once and counts those that are there.
pub fn count_keys(
    connector: &dyn Connector,
    workload: &WorkloadSpec,
    client_cpus: &[usize],
    stop: &AtomicBool,
) -> Result<u64, BenchError> {
    Ok(every_key(Class::Get, connector, workload, client_cpus, stop)?.hits)
}

/// Does one thing to every key, in batches.
fn every_key(
    class: Class,
    connector: &dyn Connector,
    workload: &WorkloadSpec,
    client_cpus: &[usize],
    stop: &AtomicBool,
) -> Result<RunResult, BenchError> {
    let spec = WorkloadSpec {
        mix: Mix::only(class),
        distribution: KeyDistribution::Sequential,
        refill: false,
        trace: None,
        ttl_ms: 0,
        ..workload.clone()
    };
    let settings = RunSettings {
        mode: Mode::Closed {
            depth: 64,
            window: false,
        },
        connections: 16,
        client_cpus: client_cpus.to_vec(),
        warmup: Duration::ZERO,
        duration: Duration::from_hours(1),
        operations: Some(spec.keys),
        ..RunSettings::default()
    };
    let result = run(connector, &spec, &settings, RunContext::plain(stop, &mut |_| {}))?;
    match result.error {
        Some(error) => Err(BenchError::Load(error)),
        None => Ok(result),
    }
}

/// What a comparison tells while it goes on.
pub trait Observer {
    /// A step begins.
    fn step(&mut self, text: &str);
    /// A run goes on.
    fn progress(&mut self, progress: Progress);
    /// A row is complete, or as complete as it gets.
    fn row(&mut self, comparison: &Comparison, row: &RowResult);
}

/// Compares running servers, the first being the baseline. What was measured is kept whatever happens.
pub fn compare(
    servers: &[Server],
    settings: CompareSettings,
    environment: Environment,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Comparison {
    let mut comparison = Comparison {
        environment,
        servers: servers.iter().map(|server| server.name().to_owned()).collect(),
        footprints: Vec::new(),
        rows: Vec::new(),
        partial: Vec::new(),
        error: None,
        interrupted: false,
        settings,
    };
    for server in servers {
        server.describe(&mut comparison.environment);
    }
    if let Err(error) = carry_out(servers, &mut comparison, stop, observer) {
        comparison.error = Some(error.to_string());
    }
    comparison.interrupted = stop.load(Ordering::Relaxed);
    comparison
}

fn carry_out(
    servers: &[Server],
    comparison: &mut Comparison,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<(), BenchError> {
    let settings = comparison.settings.clone();
    for server in servers {
        observer.step(&format!(
            "loading {} keys into {}",
            settings.workload.keys,
            server.name()
        ));
        let resident = load(
            server,
            &settings.workload,
            &settings.client_cpus,
            settings.read_back,
            stop,
        )?;
        if stop.load(Ordering::Relaxed) {
            // What was loaded is not the data set.
            return Ok(());
        }
        comparison.footprints.push(resident);
    }
    let mut done = 0;
    for row in &settings.rows {
        comparison.rows.push(RowResult {
            row: *row,
            rounds: Vec::new(),
        });
        for round in 0..settings.rounds {
            let mut results: Vec<Option<RunResult>> = vec![None; servers.len() + 1];
            let outcome = carry_out_round(
                servers,
                &settings,
                (*row, round),
                &mut done,
                &mut results,
                stop,
                observer,
            );
            let results = results.into_iter().flatten();
            if matches!(outcome, Ok(true)) {
                if let Some(measured) = comparison.rows.last_mut() {
                    measured.rounds.push(results.collect());
                }
            } else {
                comparison.partial.extend(results);
                // Its whole rounds are worth a line all the same.
                comparison.rows.pop_if(|row| row.rounds.is_empty());
                if round > 0
                    && let Some(measured) = comparison.rows.last()
                {
                    observer.row(comparison, measured);
                }
                return outcome.map(|_| ());
            }
        }
        if let Some(measured) = comparison.rows.last() {
            observer.row(comparison, measured);
        }
    }
    Ok(())
}

/// One round of a row: every server once, and the baseline again. `false` when somebody stopped it; what was measured is in
/// `results` in any case, at the server's place. `done` counts the runs of the whole comparison.
fn carry_out_round(
    servers: &[Server],
    settings: &CompareSettings,
    (row, round): (Row, usize),
    done: &mut usize,
    results: &mut [Option<RunResult>],
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<bool, BenchError> {
    let spec = WorkloadSpec {
        mix: Mix::only(row.class),
        ..settings.workload.clone()
    };
    let run_settings = RunSettings {
        mode: Mode::Closed {
            depth: row.depth,
            window: false,
        },
        connections: row.connections,
        threads: 1,
        client_cpus: settings.client_cpus.clone(),
        warmup: settings.warmup,
        duration: settings.duration,
        spin: !settings.client_cpus.is_empty(),
        ..RunSettings::default()
    };
    let mut order: Vec<usize> = (0..=servers.len()).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    for position in order {
        let server = &servers[position % servers.len()];
        let runs = settings.runs(servers.len());
        let left = settings.time_of(runs - *done).as_secs();
        *done += 1;
        observer.step(&format!(
            "run {done} of {runs}, {}:{:02} left: {row}, {}",
            left / 60,
            left % 60,
            server.name()
        ));
        let mut progress = |progress| observer.progress(progress);
        let context = RunContext {
            probe: Some(server.probe() as &dyn Probe),
            ..RunContext::plain(stop, &mut progress)
        };
        let mut result = run(server.connector(), &spec, &run_settings, context)?;
        server.name().clone_into(&mut result.target);
        let error = result.error.clone();
        results[position] = Some(result);
        if let Some(error) = error {
            return Err(BenchError::Load(error));
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::ServerCpu;

    #[test]
    fn rows_read_as_they_are_written() {
        let row: Row = "get:50x64".parse().unwrap();
        assert_eq!(row, Row::SINGLE[0]);
        assert_eq!(row.to_string(), "GET 50x64");
        for text in ["", "get", "get:50", "get:0x1", "get:1x0", "cas:1x1", "x:1x1"] {
            assert!(text.parse::<Row>().is_err(), "{text}");
        }
    }

    fn run_of(rate_per_s: f64, misses: u64) -> RunResult {
        let mut run = RunResult::empty("x", &WorkloadSpec::default(), &RunSettings::default());
        (run.rate_per_s, run.misses) = (rate_per_s, misses);
        run
    }

    #[test]
    fn ratios_are_taken_within_a_round_and_noise_from_the_baseline_alone() {
        let row = RowResult {
            row: Row::SINGLE[0],
            // The machine got twice as fast between the rounds; the ratio did not change.
            rounds: vec![
                vec![run_of(100.0, 0), run_of(50.0, 0), run_of(110.0, 0)],
                vec![run_of(210.0, 0), run_of(100.0, 0), run_of(210.0, 0)],
            ],
        };
        let ratio = row.ratio(1, Metric::Rate).unwrap();
        assert_eq!((ratio.min, ratio.max), (2.1, 2.1));
        assert!((row.noise(Metric::Rate).unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(row.ratio(1, Metric::ServerCpu), None);
    }

    #[test]
    fn reads_that_found_nothing_are_remarked_on() {
        let row = RowResult {
            row: Row::SINGLE[0],
            rounds: vec![vec![run_of(1.0, 0), run_of(1.0, 7), run_of(1.0, 0)]],
        };
        assert!(row.remarks(0, 1).is_empty());
        assert!(row.remarks(1, 1)[0].contains("7 reads found nothing"));
    }

    #[test]
    fn a_rate_that_neither_side_limits_is_remarked_on() {
        let remarks = |busy, cores| {
            let mut run = run_of(1.0, 0);
            run.client_busy = busy;
            run.server_cpu = Some(ServerCpu {
                us_per_operation: 1.0,
                cores,
            });
            let rounds = vec![vec![run.clone(), run]];
            RowResult {
                row: Row::SINGLE[0],
                rounds,
            }
            .remarks(0, 1)
        };
        assert!(remarks(0.3, 0.5)[0].contains("neither side was busy"));
        assert!(remarks(0.3, 0.95).is_empty());
        let misses = RowResult {
            row: Row::SINGLE[0],
            rounds: vec![vec![run_of(1.0, 7), run_of(1.0, 7), run_of(1.0, 7)]],
        };
        let lines = misses.remarks_on(&["a".to_owned(), "b".to_owned()], 1);
        assert!(lines.len() == 1 && lines[0].starts_with("a, b: 7 reads"), "{lines:?}");
        assert!(!remarks(0.99, 0.5)[0].contains("neither side"));
    }

    #[test]
    fn memory_is_spread_over_the_entries_that_are_there() {
        let mut footprint = Footprint {
            before_bytes: 100,
            after_bytes: 1_100,
            entries: 10,
            found: None,
        };
        assert!((footprint.growth_per_entry() - 100.0).abs() < 1e-9);
        footprint.found = Some(5);
        assert!((footprint.growth_per_entry() - 200.0).abs() < 1e-9);
        assert!((footprint.whole_per_entry() - 220.0).abs() < 1e-9);
    }

    #[test]
    fn a_spread_has_its_median() {
        assert_eq!(
            Spread::of([3.0, 1.0, 2.0]),
            Some(Spread {
                min: 1.0,
                median: 2.0,
                max: 3.0
            })
        );
        assert_eq!(
            Spread::of([4.0, 1.0]),
            Some(Spread {
                min: 1.0,
                median: 2.5,
                max: 4.0
            })
        );
        assert_eq!(Spread::of([f64::NAN]), None);
    }
}
