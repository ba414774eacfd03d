//! The highest rate at which a percentile stays under a bound: the knee of the latency curve.
//!
//! Doubles the rate until a run breaks the bound (or the generator falls behind), then halves the gap between
//! the last good and the first bad rate until it is small enough.

use std::sync::atomic::Ordering;

use crate::BenchError;
use crate::engine::{Mode, Progress, RunContext, RunSettings, run};
use crate::result::RunResult;
use crate::schedule::Arrival;
use crate::target::Connector;
use crate::workload::WorkloadSpec;

/// What the knee is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SweepSettings {
    /// First rate tried, in operations a second.
    pub start_per_s: f64,
    /// No rate above this one is tried.
    pub max_per_s: f64,
    /// Bound on the 99.9th percentile, in microseconds.
    pub bound_us: f64,
    /// The gap between good and bad at which to stop (0.05 = 5 %).
    pub precision: f64,
    /// How arrivals are spaced.
    pub arrival: Arrival,
}

/// How one rate did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The percentile stayed under the bound.
    Good,
    /// It did not, or operations failed or went unanswered.
    Bad,
    /// The generator could not keep the rate; nothing is known of the server there.
    GeneratorTooSlow,
}

impl SweepSettings {
    /// Judges one run.
    pub fn judge(&self, result: &RunResult) -> Verdict {
        if !result.invalid.is_empty() {
            return Verdict::GeneratorTooSlow;
        }
        let good = result.error.is_none() && result.failed() == 0 && result.latency_us(0.999) <= self.bound_us;
        if good { Verdict::Good } else { Verdict::Bad }
    }

    /// The next rate to try, from the best good and the least bad one so far; `None` when the knee is found.
    pub fn next(&self, good: Option<f64>, bad: Option<f64>) -> Option<f64> {
        let next = match (good, bad) {
            (None, None) => self.start_per_s.min(self.max_per_s),
            (Some(good), None) => (good * 2.0).min(self.max_per_s),
            (None, Some(bad)) => bad / 2.0,
            (Some(good), Some(bad)) => {
                if bad / good - 1.0 <= self.precision {
                    return None;
                }
                f64::midpoint(good, bad)
            }
        };
        (next >= 1.0 && good.is_none_or(|good| next > good)).then_some(next)
    }
}

/// Runs until the knee is found. Returns every run in the order made; the knee is the fastest good one.
pub fn sweep(
    connector: &dyn Connector,
    spec: &WorkloadSpec,
    settings: &RunSettings,
    sweep: &SweepSettings,
    stop: &std::sync::atomic::AtomicBool,
    mut each: impl FnMut(&RunResult, Verdict),
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<RunResult>, BenchError> {
    let (mut good, mut bad) = (None::<f64>, None::<f64>);
    let mut results = Vec::new();
    while let Some(rate_per_s) = sweep.next(good, bad) {
        let mode = Mode::Open {
            rate_per_s,
            arrival: sweep.arrival,
        };
        let settings = RunSettings {
            mode,
            ..settings.clone()
        };
        let result = run(connector, spec, &settings, RunContext::plain(stop, &mut *progress))?;
        let verdict = sweep.judge(&result);
        let over = result.error.is_some() || stop.load(Ordering::Relaxed);
        each(&result, verdict);
        results.push(result);
        if over {
            break;
        }
        match verdict {
            Verdict::Good => good = Some(rate_per_s),
            Verdict::Bad | Verdict::GeneratorTooSlow => bad = Some(rate_per_s),
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_closes_in_on_the_knee() {
        let settings = SweepSettings {
            start_per_s: 1_000.0,
            max_per_s: 1e6,
            bound_us: 1_000.0,
            precision: 0.05,
            arrival: Arrival::Poisson,
        };
        for knee in [150.0, 1_500.0, 77_000.0, 5e6] {
            let (mut good, mut bad) = (None, None);
            let mut steps = 0;
            while let Some(rate) = settings.next(good, bad) {
                if rate <= knee {
                    good = Some(rate);
                } else {
                    bad = Some(rate);
                }
                steps += 1;
                assert!(steps < 40, "no end at {knee}");
            }
            let found: f64 = good.unwrap();
            let expected: f64 = if knee > 1e6 { 1e6 } else { knee };
            assert!(found <= expected && found >= expected * 0.94, "{found} for {expected}");
        }
        assert_eq!(settings.next(None, Some(1.5)), None);
    }
}
