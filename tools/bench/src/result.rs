//! What a run yields, in the form that is printed, written as JSON, drawn and compared.
//!
//! Histograms travel as base64 of HDR's compressed V2 encoding, so that a reader of the JSON loses nothing.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use crate::engine::{Counters, Ended, RunSettings};
use crate::schedule::Lateness;
use crate::workload::{Class, WorkloadSpec};

/// One run against one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// Name of the target.
    pub target: String,
    /// What was asked.
    pub workload: WorkloadSpec,
    /// How it was asked.
    pub settings: RunSettings,
    /// Whether the figures mean anything.
    pub valid: bool,
    /// Why they do not.
    pub invalid: Vec<String>,
    /// What ended the run before its time.
    pub error: Option<String>,
    /// Whether somebody stopped it before its time.
    pub interrupted: bool,
    /// Measured seconds.
    pub measured_s: f64,
    /// Operations that ended well within them.
    pub operations: u64,
    /// Of these, a second.
    pub rate_per_s: f64,
    /// Operations that ended well, those after the measured time included.
    pub completed: u64,
    /// Failures by kind.
    pub failures: BTreeMap<String, u64>,
    /// Operations that were never answered; they are in the histograms with their age.
    pub unfinished: u64,
    /// Keys found by reads.
    pub hits: u64,
    /// Keys not found by reads.
    pub misses: u64,
    /// Conditions that did not hold.
    pub conflicts: u64,
    /// The generator's own lateness (open loop).
    pub lateness: Lateness,
    /// Latencies by class of operation.
    pub classes: Vec<ClassResult>,
    /// The server's processor time, where its processes are known.
    pub server_cpu: Option<ServerCpu>,
    /// The generator's processor time, in microseconds an operation.
    pub client_cpu_us_per_operation: f64,
    /// Share of the measured time in which the generator had something to do, 0 to 1. Near 1, rates and latencies are its own.
    #[serde(default)]
    pub client_busy: f64,
    /// The timeline.
    pub intervals: Vec<IntervalResult>,
    /// What happened meanwhile.
    pub events: Vec<Event>,
    /// What a scenario concludes from the run.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Every operation, where the run was asked to keep them; not part of reports.
    #[serde(skip)]
    pub ended: Vec<Ended>,
}

/// The generator is the bottleneck when it has something to do for a larger share of the time.
const SATURATED: f64 = 0.95;

impl RunResult {
    /// A result of nothing, to be filled.
    pub(crate) fn empty(target: &str, workload: &WorkloadSpec, settings: &RunSettings) -> Self {
        Self {
            target: target.to_owned(),
            workload: workload.clone(),
            settings: settings.clone(),
            valid: true,
            invalid: Vec::new(),
            error: None,
            interrupted: false,
            measured_s: 0.0,
            operations: 0,
            rate_per_s: 0.0,
            completed: 0,
            failures: BTreeMap::new(),
            unfinished: 0,
            hits: 0,
            misses: 0,
            conflicts: 0,
            lateness: Lateness::default(),
            classes: Vec::new(),
            server_cpu: None,
            client_cpu_us_per_operation: 0.0,
            client_busy: 0.0,
            intervals: Vec::new(),
            events: Vec::new(),
            findings: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// Share of reads that found their key, if there were reads.
    pub fn hit_ratio(&self) -> Option<f64> {
        let reads = self.hits + self.misses;
        (reads > 0).then(|| self.hits as f64 / reads as f64)
    }

    /// Failures of every kind.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Whether the generator was the bottleneck, not the server, which had `server_cpus` (0: unknown): then the rate is a lower bound
    /// of the server's, and the latencies include the generator's own queue.
    pub fn generator_bound(&self, server_cpus: usize) -> bool {
        let saturated = self
            .server_cpu
            .is_some_and(|cpu| server_cpus > 0 && cpu.cores >= SATURATED * server_cpus as f64);
        self.client_busy > SATURATED && !saturated
    }

    /// Latency of all classes together; in nanoseconds.
    pub fn latency(&self) -> Histogram<u64> {
        let mut all = crate::engine::new_histogram();
        for histogram in self.classes.iter().filter_map(|class| class.latency.histogram()) {
            crate::engine::merge_histogram(&mut all, &histogram);
        }
        all
    }

    /// Percentile of the latency of all classes together, in microseconds.
    pub fn latency_us(&self, quantile: f64) -> f64 {
        self.latency().value_at_quantile(quantile) as f64 / 1e3
    }
}

/// Something that happened at a point of the timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Measured seconds.
    pub at_s: f64,
    /// What happened.
    pub text: String,
}

/// One figure that a scenario draws from a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What it is.
    pub name: String,
    /// The figure; times in microseconds, memory in bytes.
    pub value: f64,
    /// What the figure counts.
    pub unit: Unit,
}

/// What a [`Finding`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Microseconds.
    Time,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
    /// One figure over another.
    Ratio,
}

impl Finding {
    /// A figure with its name.
    pub fn new(name: impl Into<String>, value: f64, unit: Unit) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
        }
    }
}

/// Processor time of the server's threads over the measured time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerCpu {
    /// Microseconds an operation.
    pub us_per_operation: f64,
    /// Processor seconds a second.
    pub cores: f64,
}

/// Latencies of one class of operations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassResult {
    /// The class.
    pub class: Class,
    /// From the intended send time to the reply.
    pub latency: Latencies,
    /// From the actual send to the reply.
    pub service: Latencies,
}

impl ClassResult {
    pub(crate) fn new(class: Class, latency: &Histogram<u64>, service: &Histogram<u64>) -> Self {
        Self {
            class,
            latency: Latencies::new(latency),
            service: Latencies::new(service),
        }
    }
}

/// A distribution of times in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean_us: f64,
    /// 50th percentile.
    pub p50_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p99_9_us: f64,
    /// 99.99th percentile.
    pub p99_99_us: f64,
    /// Largest value.
    pub max_us: f64,
    /// The whole histogram of nanoseconds: base64 of HDR's compressed V2 encoding.
    pub hdr_v2: String,
}

impl Latencies {
    fn new(histogram: &Histogram<u64>) -> Self {
        let us = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            count: histogram.len(),
            mean_us: histogram.mean() / 1e3,
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            p99_9_us: us(0.999),
            p99_99_us: us(0.9999),
            max_us: histogram.max() as f64 / 1e3,
            hdr_v2: encode(histogram),
        }
    }

    /// The whole histogram, in nanoseconds; `None` if its text was damaged.
    pub fn histogram(&self) -> Option<Histogram<u64>> {
        let bytes = STANDARD.decode(&self.hdr_v2).ok()?;
        Deserializer::new().deserialize(&mut &bytes[..]).ok()
    }
}

fn encode(histogram: &Histogram<u64>) -> String {
    let mut bytes = Vec::new();
    // Writing to memory fails only for histograms beyond the format's size, which the constant bounds exclude.
    match V2DeflateSerializer::new().serialize(histogram, &mut bytes) {
        Ok(_) => STANDARD.encode(bytes),
        Err(_) => String::new(),
    }
}

/// One interval of the timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IntervalResult {
    /// Measured seconds at its start.
    pub start_s: f64,
    /// Its length in seconds.
    pub length_s: f64,
    /// Operations a second that ended well.
    pub rate_per_s: f64,
    /// Operations that failed.
    pub failed: u64,
    /// Keys found by reads.
    pub hits: u64,
    /// Keys not found by reads.
    pub misses: u64,
    /// Latency of what ended in it.
    pub latency: Latencies,
}

impl IntervalResult {
    pub(crate) fn new(start_s: f64, length_s: f64, latency: &Histogram<u64>, counters: &Counters) -> Self {
        Self {
            start_s,
            length_s,
            rate_per_s: counters.completed as f64 / length_s,
            failed: counters.failed(),
            hits: counters.hits,
            misses: counters.misses,
            latency: Latencies::new(latency),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_generator_is_the_bottleneck_unless_the_server_is_busy_too() {
        let mut result = RunResult::empty("x", &WorkloadSpec::default(), &RunSettings::default());
        let cpu = |cores| {
            Some(ServerCpu {
                us_per_operation: 1.0,
                cores,
            })
        };
        for (busy, cores, bound) in [(0.5, 0.6, false), (0.99, 0.6, true), (0.99, 0.99, false)] {
            (result.client_busy, result.server_cpu) = (busy, cpu(cores));
            assert_eq!(result.generator_bound(1), bound, "client {busy}, server {cores}");
        }
        // Half of the two CPUs that the server has.
        assert!(result.generator_bound(2));
    }

    #[test]
    fn a_histogram_survives_its_text() {
        let mut histogram = crate::engine::new_histogram();
        for value in [1, 1_000, 1_000_000, 3_000_000_000] {
            histogram.record(value).unwrap();
        }
        let latencies = Latencies::new(&histogram);
        assert_eq!(latencies.histogram().unwrap(), histogram);
        assert_eq!(latencies.count, 4);
        assert!(
            Latencies {
                hdr_v2: "x".to_owned(),
                ..latencies
            }
            .histogram()
            .is_none()
        );
    }
}
