//! A snapshot under load: the tail before, during and after it, and the memory it takes.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{ScenarioSettings, Watch};
use crate::BenchError;
use crate::engine::{Notes, RunContext, merge_histogram, new_histogram, run};
use crate::peers::{SNAPSHOT_BEGINS, SNAPSHOT_ENDS, Server};
use crate::result::{Finding, IntervalResult, RunResult, Unit};
use crate::system::Probe;

/// How often resident memory is read.
const SAMPLE: Duration = Duration::from_millis(20);

/// Loads a running server, lets it take a snapshot, and compares.
pub fn snapshot(server: &Server, settings: &ScenarioSettings, watch: &mut Watch<'_>) -> Result<RunResult, BenchError> {
    let told: Mutex<Option<Result<Vec<Finding>, String>>> = Mutex::new(None);
    let growth = Mutex::new(None);
    let script = |notes: &Notes<'_>| {
        if !notes.wait_until(settings.event_s()) {
            return;
        }
        let before = server.probe().resident_bytes();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let peak = scope.spawn(|| {
                let mut peak = 0;
                while !done.load(Ordering::Relaxed) {
                    peak = peak.max(server.probe().resident_bytes().unwrap_or(0));
                    std::thread::sleep(SAMPLE);
                }
                peak
            });
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.snapshot(notes));
            done.store(true, Ordering::Relaxed);
            if let (Some(before), Ok(peak)) = (before, peak.join()) {
                *growth.lock().unwrap_or_else(PoisonError::into_inner) = Some(peak.saturating_sub(before));
            }
        });
    };
    let context = RunContext {
        stop: watch.stop,
        probe: Some(server.probe() as &dyn Probe),
        progress: &mut *watch.progress,
        script: Some(Box::new(script)),
        keep_operations: false,
    };
    let mut result = run(
        server.connector(),
        &settings.workload,
        &settings.run_settings(),
        context,
    )?;
    server.name().clone_into(&mut result.target);
    let mut findings = tails(&result);
    let growth = growth.into_inner().unwrap_or_else(PoisonError::into_inner);
    findings.extend(growth.map(|bytes: u64| Finding::new("growth of resident memory", bytes as f64, Unit::Bytes)));
    match told.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(Ok(own)) => findings.extend(own),
        Some(Err(reason)) => {
            result.valid = false;
            result.invalid.push(format!("no whole snapshot was taken: {reason}"));
        }
        None => {}
    }
    result.findings = findings;
    Ok(result)
}

/// The 99.9th percentile before, during and after the snapshot that the events tell of; nothing without its begin and end.
fn tails(result: &RunResult) -> Vec<Finding> {
    let at = |text: &str| {
        let event = result.events.iter().find(|event| event.text == text)?;
        Some(event.at_s)
    };
    let (Some(begin_s), Some(end_s)) = (at(SNAPSHOT_BEGINS), at(SNAPSHOT_ENDS)) else {
        return Vec::new();
    };
    let tail = |within: &dyn Fn(f64, f64) -> bool| {
        let mut all = new_histogram();
        let inside = |interval: &&IntervalResult| within(interval.start_s, interval.start_s + interval.length_s);
        for interval in result.intervals.iter().filter(inside) {
            if let Some(histogram) = interval.latency.histogram() {
                merge_histogram(&mut all, &histogram);
            }
        }
        (all.value_at_quantile(0.999) as f64 / 1e3, all.max() as f64 / 1e3)
    };
    let (before, _) = tail(&|_, to| to <= begin_s);
    let (during, worst) = tail(&|from, to| to > begin_s && from < end_s);
    let (after, _) = tail(&|from, _| from >= end_s);
    vec![
        Finding::new("p99.9 before", before, Unit::Time),
        Finding::new("p99.9 during", during, Unit::Time),
        Finding::new("p99.9 during / before", during / before.max(0.001), Unit::Ratio),
        Finding::new("longest during", worst, Unit::Time),
        Finding::new("p99.9 after", after, Unit::Time),
        Finding::new("the snapshot took", (end_s - begin_s) * 1e6, Unit::Time),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Counters, RunSettings};
    use crate::result::Event;
    use crate::workload::WorkloadSpec;

    #[test]
    fn the_tail_is_taken_from_the_intervals_of_each_phase() {
        let intervals = (0..10).map(|index| {
            let mut latency = new_histogram();
            // 5 ms in the two intervals that the snapshot touches, 1 ms elsewhere.
            let ns = if index == 4 || index == 5 { 5_000_000 } else { 1_000_000 };
            latency.record_n(ns, 1_000).unwrap();
            IntervalResult::new(f64::from(index) * 0.1, 0.1, &latency, &Counters::default())
        });
        let event = |at_s, text: &str| Event {
            at_s,
            text: text.to_owned(),
        };
        let mut result = RunResult::empty("x", &WorkloadSpec::default(), &RunSettings::default());
        result.intervals = intervals.collect();
        assert!(tails(&result).is_empty());
        result.events = vec![event(0.45, SNAPSHOT_BEGINS), event(0.55, SNAPSHOT_ENDS)];
        let value = |name: &str| {
            let found = tails(&result).into_iter().find(|finding| finding.name == name);
            found.unwrap().value
        };
        for (name, expected) in [
            ("p99.9 before", 1_000.0),
            ("p99.9 during", 5_000.0),
            ("p99.9 during / before", 5.0),
            ("p99.9 after", 1_000.0),
            ("the snapshot took", 100_000.0),
        ] {
            assert!((value(name) / expected - 1.0).abs() < 0.01, "{name}: {}", value(name));
        }
    }
}
