//! The highest rate at which a percentile stays under a bound: the knee of the latency curve.
//!
//! Doubles the rate until a run breaks the bound (or the generator falls behind), then halves the gap between
//! the last good and the first bad rate until it is small enough. A generator that falls behind at every rate is no finding about the
//! server: the search ends, and says so.

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
    /// No rate below this one is tried: its runs have too few operations for a percentile.
    pub min_per_s: f64,
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
            (None, None) => self.start_per_s.max(self.min_per_s).min(self.max_per_s),
            (Some(good), None) => (good * 2.0).min(self.max_per_s),
            (None, Some(bad)) => bad / 2.0,
            (Some(good), Some(bad)) => {
                if bad / good - 1.0 <= self.precision {
                    return None;
                }
                f64::midpoint(good, bad)
            }
        };
        let known = good.is_some() || bad.is_some();
        (!(known && next < self.min_per_s) && good.is_none_or(|good| next > good)).then_some(next)
    }

    /// The lowest rate whose runs of `seconds` have a 99.9th percentile worth the name: ten operations beyond it.
    pub fn lowest(seconds: f64) -> f64 {
        (10_000.0 / seconds).max(1.0)
    }
}

/// Runs in a row in which the generator fell behind, before any good one, that end the search.
const MAX_BEHIND: u32 = 4;

/// What a search came to, in a sentence.
///
/// `good` is the fastest rate that stayed under the bound, `limit` why the slowest of the rates above it did not.
pub fn conclusion(target: &str, bound: &str, good: Option<&str>, limit: Option<Verdict>) -> String {
    match (good, limit) {
        (Some(good), Some(Verdict::Bad)) => format!("{target}: p99.9 stays under {bound} up to {good} operations/s"),
        (Some(good), _) => format!(
            "{target}: p99.9 stays under {bound} up to at least {good} operations/s; the generator went no further (--threads, --max-rate)"
        ),
        (None, Some(Verdict::GeneratorTooSlow)) => format!(
            "nothing is known of {target}: the generator fell behind at every rate; is the machine busy? Give the client a core of its \
             own (--client-cpus)"
        ),
        (None, _) => format!(
            "{target}: p99.9 is over {bound} at every rate tried; a lower one has too few operations in a run to tell (--seconds)"
        ),
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
    let mut behind = 0;
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
        behind = if verdict == Verdict::GeneratorTooSlow {
            behind + 1
        } else {
            0
        };
        if behind >= MAX_BEHIND && good.is_none() {
            break;
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_limits_the_generator_is_not_said_of_the_server() {
        let say = |good, limit| conclusion("x", "1 ms", good, limit);
        assert!(say(Some("9 k"), Some(Verdict::Bad)).ends_with("up to 9 k operations/s"));
        assert!(say(Some("9 k"), Some(Verdict::GeneratorTooSlow)).contains("at least 9 k"));
        assert!(say(Some("9 k"), None).contains("at least 9 k"));
        assert!(say(None, Some(Verdict::GeneratorTooSlow)).contains("nothing is known of x"));
        assert!(say(None, Some(Verdict::Bad)).contains("over 1 ms at every rate"));
    }

    #[test]
    fn the_search_closes_in_on_the_knee() {
        let settings = SweepSettings {
            start_per_s: 1_000.0,
            max_per_s: 1e6,
            min_per_s: 100.0,
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
        assert_eq!(settings.next(None, Some(199.0)), None);
        assert_eq!(settings.next(None, Some(200.0)), Some(100.0));
    }

    #[test]
    fn a_rate_without_operations_beyond_its_percentile_is_not_tried() {
        assert!((SweepSettings::lowest(2.0) - 5_000.0).abs() < 1e-9);
        let settings = SweepSettings {
            start_per_s: 10.0,
            max_per_s: 1e6,
            min_per_s: SweepSettings::lowest(2.0),
            bound_us: 1_000.0,
            precision: 0.05,
            arrival: Arrival::Poisson,
        };
        assert_eq!(settings.next(None, None), Some(5_000.0));
        assert_eq!(settings.next(None, Some(5_000.0)), None);
    }
}
