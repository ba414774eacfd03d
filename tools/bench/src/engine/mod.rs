//! The measuring engine: generator threads, their monitor, and the result of a run.
//!
//! One run = warm-up, measured time, drain. Generator threads do nothing but send and time; percentiles,
//! progress and merging happen on the caller's thread. A run always yields a [`RunResult`]: an error, a stop
//! or a generator that fell behind leave what was measured, and say so in it.

mod generator;
mod record;
mod script;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

pub use record::{Counters, MAX_LATENCY_NS, merge_histogram, new_histogram};
pub use script::{Ended, Notes, Script};

use crate::clock::Clock;
use crate::result::{ClassResult, IntervalResult, RunResult, ServerCpu};
use crate::schedule::{Arrival, Lateness, LatenessLimit};
use crate::system::{self, Probe};
use crate::target::{Connector, TargetError};
use crate::workload::{Class, WorkloadSpec};
use generator::{Generator, GeneratorParts, ThreadResult};
use record::{Interval, Recorder};

/// When operations are sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Mode {
    /// At a rate that the target cannot influence.
    Open {
        /// Operations a second over all threads.
        rate_per_s: f64,
        /// How arrivals are spaced.
        arrival: Arrival,
    },
    /// When replies come back.
    Closed {
        /// Operations kept on each connection.
        depth: u32,
        /// `true`: one reply lets one operation go (sliding window). `false`: `depth` operations are written
        /// at once when all replies of the last batch have come, as redis-benchmark's `-P` does.
        window: bool,
    },
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open { rate_per_s, arrival } => write!(f, "open loop, {rate_per_s:.0}/s, {arrival:?} arrivals"),
            Self::Closed { depth, window: false } => write!(f, "closed loop, batches of {depth} written at once"),
            Self::Closed { depth, window: true } => write!(f, "closed loop, sliding window of {depth}"),
        }
    }
}

/// How a run is carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSettings {
    /// When operations are sent.
    pub mode: Mode,
    /// Connections over all threads.
    pub connections: usize,
    /// Generator threads.
    pub threads: usize,
    /// CPUs the generator threads are pinned to, in turn; empty = not pinned.
    pub client_cpus: Vec<usize>,
    /// Time before measuring starts.
    pub warmup: Duration,
    /// Measured time.
    pub duration: Duration,
    /// Length of an interval of the timeline.
    pub interval: Duration,
    /// How long the last replies are waited for.
    pub drain: Duration,
    /// Whether the generator polls its sockets without pause (it needs a core of its own).
    pub spin: bool,
    /// What counts as falling behind.
    pub lateness: LatenessLimit,
    /// Most operations unanswered at a time on one thread, in an open loop.
    pub max_in_flight: usize,
    /// Ends a closed loop after so many operations instead of at its time.
    pub operations: Option<u64>,
}

impl Default for RunSettings {
    fn default() -> Self {
        Self {
            mode: Mode::Open {
                rate_per_s: 10_000.0,
                arrival: Arrival::Poisson,
            },
            connections: 8,
            threads: 1,
            client_cpus: Vec::new(),
            warmup: Duration::from_secs(1),
            duration: Duration::from_secs(10),
            interval: Duration::from_secs(1),
            drain: Duration::from_secs(5),
            spin: true,
            lateness: LatenessLimit::default(),
            max_in_flight: 65_536,
            operations: None,
        }
    }
}

impl RunSettings {
    /// Checks every bound.
    pub fn validate(&self) -> Result<(), String> {
        if self.threads == 0 || self.threads > 1_024 {
            return Err("--threads must be 1 to 1024".to_owned());
        }
        if self.connections < self.threads || self.connections > 100_000 {
            return Err(format!(
                "--connections must be at least --threads ({}) and at most 100000",
                self.threads
            ));
        }
        match self.mode {
            Mode::Open { rate_per_s, .. } if !(rate_per_s.is_finite() && rate_per_s > 0.0 && rate_per_s <= 1e9) => {
                return Err("--rate must be above 0 and at most 1e9 operations a second".to_owned());
            }
            Mode::Closed { depth, .. } if !(1..=65_536).contains(&depth) => {
                return Err("--depth must be 1 to 65536".to_owned());
            }
            _ => {}
        }
        if self.duration.is_zero() || self.interval.is_zero() {
            return Err("--seconds and --interval must be above 0".to_owned());
        }
        if self.max_in_flight == 0 || self.max_in_flight > 16_000_000 {
            return Err("--max-in-flight must be 1 to 16000000".to_owned());
        }
        Ok(())
    }
}

/// What a run tells while it goes on.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Measured seconds so far.
    pub elapsed_s: f64,
    /// Measured seconds planned.
    pub planned_s: f64,
    /// Operations a second in the last interval.
    pub rate_per_s: f64,
    /// 99th percentile of the last interval, in nanoseconds.
    pub p99_ns: u64,
    /// Failures so far.
    pub failed: u64,
}

/// Everything outside the workload that a run needs.
pub struct RunContext<'a> {
    /// Set from outside to end the run early; what was measured is kept.
    pub stop: &'a AtomicBool,
    /// Reads the server's processor time, where its processes are known.
    pub probe: Option<&'a dyn Probe>,
    /// Called once an interval.
    pub progress: &'a mut dyn FnMut(Progress),
    /// What is done to the target meanwhile.
    pub script: Option<Script<'a>>,
    /// Whether to keep every operation, for who must know what became of each (24 bytes or so an operation).
    pub keep_operations: bool,
}

impl<'a> RunContext<'a> {
    /// A run to which nothing is done.
    pub fn plain(stop: &'a AtomicBool, progress: &'a mut dyn FnMut(Progress)) -> Self {
        Self {
            stop,
            probe: None,
            progress,
            script: None,
            keep_operations: false,
        }
    }
}

/// Runs a workload against a target.
///
/// # Errors
/// Only what is wrong before the first operation: settings, the trace, the connections. Later troubles are in
/// the result.
pub fn run(
    connector: &dyn Connector,
    spec: &WorkloadSpec,
    settings: &RunSettings,
    context: RunContext<'_>,
) -> Result<RunResult, crate::BenchError> {
    spec.validate()?;
    settings.validate().map_err(crate::BenchError::Settings)?;
    let trace = spec.load_trace()?;
    let RunContext {
        stop,
        probe,
        progress,
        script,
        keep_operations: keep,
    } = context;
    // Every thread connects before any of them starts its clock.
    let mut targets = Vec::new();
    for thread in 0..settings.threads {
        let share =
            settings.connections / settings.threads + usize::from(thread < settings.connections % settings.threads);
        targets.push(connector.connect(share)?);
    }
    let (outlet, intervals) = channel();
    let clock = Clock::start();
    let mut timeline = Timeline::new(settings);
    let mut results: Vec<ThreadResult> = Vec::new();
    let notes = Notes::new(clock, settings.warmup, stop);
    std::thread::scope(|scope| {
        if let Some(script) = script {
            let notes = &notes;
            scope.spawn(move || script(notes));
        }
        let mut handles = Vec::new();
        let mut returns: Vec<Sender<Histogram<u64>>> = Vec::new();
        for (thread, target) in targets.into_iter().enumerate() {
            let (give_back, returned) = channel();
            returns.push(give_back);
            let recorder = Recorder::new(thread, outlet.clone(), returned);
            let trace = trace.clone();
            let probe = if thread == 0 { probe } else { None };
            let cpu = settings
                .client_cpus
                .get(thread % settings.client_cpus.len().max(1))
                .copied();
            handles.push(scope.spawn(move || {
                if let Some(cpu) = cpu {
                    system::pin_thread(cpu);
                }
                let parts = GeneratorParts {
                    target,
                    spec,
                    settings,
                    trace,
                    thread,
                    clock,
                    stop,
                    probe,
                    recorder,
                    keep,
                };
                Generator::new(parts).run(thread)
            }));
        }
        drop(outlet);
        timeline.monitor(&intervals, &returns, progress);
        let ended: Vec<_> = handles.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        notes.end();
        for result in ended {
            match result {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let mut result = merge(&connector.name(), spec, settings, results, timeline);
    result.events = notes.into_events();
    Ok(result)
}

/// The intervals of all threads, merged.
struct Timeline {
    threads: usize,
    interval_s: f64,
    planned_s: f64,
    open: BTreeMap<u64, (usize, Histogram<u64>, Counters)>,
    done: Vec<IntervalResult>,
    failed: u64,
}

impl Timeline {
    fn new(settings: &RunSettings) -> Self {
        Self {
            threads: settings.threads,
            interval_s: settings.interval.as_secs_f64(),
            planned_s: settings.duration.as_secs_f64(),
            open: BTreeMap::new(),
            done: Vec::new(),
            failed: 0,
        }
    }

    /// Gathers intervals until every thread has hung up.
    fn monitor(
        &mut self,
        intervals: &Receiver<Interval>,
        returns: &[Sender<Histogram<u64>>],
        progress: &mut dyn FnMut(Progress),
    ) {
        while let Ok(interval) = intervals.recv() {
            let Interval {
                thread,
                index,
                mut latency,
                counters,
            } = interval;
            let (seen, merged, total) = self
                .open
                .entry(index)
                .or_insert_with(|| (0, new_histogram(), Counters::default()));
            merge_histogram(merged, &latency);
            total.merge(&counters);
            *seen += 1;
            latency.reset();
            // A thread that has ended needs no histogram any more.
            let _ = returns[thread].send(latency);
            while let Some(first) = self.open.first_entry() {
                if first.get().0 < self.threads {
                    break;
                }
                let (index, (_, latency, counters)) = first.remove_entry();
                progress(self.close(index, &latency, &counters));
            }
        }
        while let Some((index, (_, latency, counters))) = self.open.pop_first() {
            self.close(index, &latency, &counters);
        }
    }

    fn close(&mut self, index: u64, latency: &Histogram<u64>, counters: &Counters) -> Progress {
        self.failed += counters.failed();
        let start_s = index as f64 * self.interval_s;
        let result = IntervalResult::new(start_s, self.interval_s, latency, counters);
        let progress = Progress {
            elapsed_s: start_s + self.interval_s,
            planned_s: self.planned_s,
            rate_per_s: result.rate_per_s,
            p99_ns: latency.value_at_quantile(0.99),
            failed: self.failed,
        };
        self.done.push(result);
        progress
    }
}

/// Merges what the threads bring back.
fn merge(
    target: &str,
    spec: &WorkloadSpec,
    settings: &RunSettings,
    threads: Vec<ThreadResult>,
    timeline: Timeline,
) -> RunResult {
    let mut classes: [Option<(Histogram<u64>, Histogram<u64>)>; Class::ALL.len()] = [const { None }; Class::ALL.len()];
    let mut counters = Counters::default();
    let mut lateness = Lateness::default();
    let (mut rate_per_s, mut in_window, mut unfinished, mut client_cpu_ns) = (0.0, 0, 0, 0);
    let (mut measured_s, mut server, mut error, mut interrupted) = (0.0_f64, None, None, false);
    let (mut idle_ns, mut generating_s, mut ended) = (0, 0.0, Vec::new());
    for thread in threads {
        let window_s = (thread.measured_ns.1 - thread.measured_ns.0) as f64 / 1e9;
        measured_s = measured_s.max(window_s);
        if window_s > 0.0 {
            rate_per_s += thread.in_window as f64 / window_s;
        }
        in_window += thread.in_window;
        unfinished += thread.unfinished;
        client_cpu_ns += thread.client_cpu_ns;
        idle_ns += thread.idle_ns;
        generating_s += window_s;
        ended.extend(thread.ended);
        lateness.merge(&thread.lateness);
        server = server.or(thread.server_cpu);
        interrupted |= thread.interrupted;
        error = error.or(thread.error);
        counters.merge(&thread.counters);
        for (merged, recorded) in classes.iter_mut().zip(thread.classes) {
            let Some(recorded) = recorded else { continue };
            let (latency, service) = merged.get_or_insert_with(|| (new_histogram(), new_histogram()));
            merge_histogram(latency, &recorded.latency);
            merge_histogram(service, &recorded.service);
        }
    }
    let mut invalid = Vec::new();
    if matches!(settings.mode, Mode::Open { .. }) {
        invalid.extend(lateness.verdict(&settings.lateness));
    }
    if measured_s == 0.0 {
        invalid.push("nothing was measured: the run ended during its warm-up".to_owned());
    }
    // A thread that polls without pause always uses its whole core: only the rounds in which it found nothing to do tell.
    let busy_s = if settings.spin {
        generating_s - idle_ns as f64 / 1e9
    } else {
        client_cpu_ns as f64 / 1e9
    };
    let per_operation = |ns: u64| {
        if in_window == 0 {
            0.0
        } else {
            ns as f64 / 1e3 / in_window as f64
        }
    };
    RunResult {
        valid: invalid.is_empty() && error.is_none(),
        invalid,
        error: error.as_ref().map(TargetError::to_string),
        interrupted,
        measured_s,
        operations: in_window,
        rate_per_s,
        completed: counters.completed,
        failures: counters
            .failures
            .iter()
            .map(|(kind, count)| (kind.name().to_owned(), *count))
            .collect(),
        unfinished,
        hits: counters.hits,
        misses: counters.misses,
        conflicts: counters.conflicts,
        lateness,
        classes: Class::ALL
            .into_iter()
            .zip(classes)
            .filter_map(|(class, histograms)| {
                histograms.map(|(latency, service)| ClassResult::new(class, &latency, &service))
            })
            .collect(),
        server_cpu: server.map(|(start, end)| {
            let used_ns = end.cpu_ns.saturating_sub(start.cpu_ns);
            let cores = used_ns as f64 / (measured_s * 1e9).max(1.0);
            ServerCpu {
                us_per_operation: per_operation(used_ns),
                cores,
            }
        }),
        client_cpu_us_per_operation: per_operation(client_cpu_ns),
        client_busy: if generating_s > 0.0 {
            (busy_s / generating_s).clamp(0.0, 1.0)
        } else {
            0.0
        },
        intervals: timeline.done,
        ended,
        ..RunResult::empty(target, spec, settings)
    }
}
