//! What happens to latency while something happens to the server: a snapshot is taken, a node dies.
//!
//! A scenario is one open-loop run with a script beside it, and the findings drawn from its timeline and its operations. The
//! load goes on unchanged throughout, so whatever the server cannot do meanwhile shows as latency or as failures.

mod failover;
mod snapshot;

use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use failover::failover;
pub use snapshot::snapshot;

use crate::engine::{Mode, Progress, RunSettings};
use crate::schedule::Arrival;
use crate::workload::WorkloadSpec;

/// How a scenario loads its server.
#[derive(Clone, Debug, PartialEq)]
pub struct ScenarioSettings {
    /// Keys, lengths, distribution.
    pub workload: WorkloadSpec,
    /// Operations a second.
    pub rate_per_s: f64,
    /// Connections.
    pub connections: usize,
    /// Measured time; the event comes after a third of it.
    pub duration: Duration,
    /// Warm-up before it.
    pub warmup: Duration,
    /// CPUs of the client's threads.
    pub client_cpus: Vec<usize>,
}

impl ScenarioSettings {
    fn run_settings(&self) -> RunSettings {
        RunSettings {
            mode: Mode::Open {
                rate_per_s: self.rate_per_s,
                arrival: Arrival::Poisson,
            },
            connections: self.connections,
            client_cpus: self.client_cpus.clone(),
            warmup: self.warmup,
            duration: self.duration,
            interval: INTERVAL,
            spin: !self.client_cpus.is_empty(),
            ..RunSettings::default()
        }
    }

    /// When the event comes, in measured seconds.
    fn event_s(&self) -> f64 {
        self.duration.as_secs_f64() / 3.0
    }
}

/// Intervals of a scenario's timeline: short enough to tell a stall from what surrounds it.
const INTERVAL: Duration = Duration::from_millis(100);

/// What a scenario tells while it goes on, and what ends it early.
pub struct Watch<'a> {
    /// Set from outside.
    pub stop: &'a AtomicBool,
    /// Called once an interval.
    pub progress: &'a mut dyn FnMut(Progress),
}
