//! Differences between two reports of the same kind.

use std::fmt::Write as _;

use super::Report;
use super::table::{short, time};
use crate::compare::Metric;
use crate::result::RunResult;

/// Compares `after` with `before`: a line for each figure, and what makes the two incomparable.
pub fn diff(before: &Report, after: &Report) -> Result<String, String> {
    let mut text = String::new();
    match (before, after) {
        (
            Report::Runs {
                environment: a,
                runs: before,
                ..
            },
            Report::Runs {
                environment: b,
                runs: after,
                ..
            },
        ) => {
            environments(&mut text, a, b);
            if before.len() != after.len() {
                let _ = writeln!(
                    text,
                    "note: {} runs against {}: the first ones are compared",
                    before.len(),
                    after.len()
                );
            }
            for (before, after) in before.iter().zip(after) {
                runs(&mut text, before, after);
            }
        }
        (Report::Comparison { comparison: a, .. }, Report::Comparison { comparison: b, .. }) => {
            environments(&mut text, &a.environment, &b.environment);
            for before in &a.rows {
                let Some(after) = b.rows.iter().find(|row| row.row == before.row) else {
                    let _ = writeln!(text, "{}: only in the first", before.row);
                    continue;
                };
                for (index, server) in a.servers.iter().enumerate() {
                    let Some(other) = b.servers.iter().position(|name| name == server) else {
                        continue;
                    };
                    let _ = writeln!(text, "{} {server}", before.row);
                    for metric in Metric::ALL {
                        let (Some(old), Some(new)) = (before.spread(index, metric), after.spread(other, metric)) else {
                            continue;
                        };
                        // A change within the spread of the rounds of either report is none.
                        let overlap = old.min <= new.max && new.min <= old.max;
                        line(&mut text, metric_name(metric), old.median, new.median, metric, overlap);
                    }
                }
            }
        }
        _ => return Err("one is a run, the other a comparison".to_owned()),
    }
    Ok(text)
}

fn environments(text: &mut String, a: &crate::system::Environment, b: &crate::system::Environment) {
    for (what, a, b) in [("CPU", &a.cpu, &b.cpu), ("kernel", &a.kernel, &b.kernel)] {
        if a != b {
            let _ = writeln!(text, "note: another {what}: {a} / {b}");
        }
    }
    if a.cpus != b.cpus {
        let _ = writeln!(text, "note: {} CPUs against {}", a.cpus, b.cpus);
    }
    for (server, before) in &a.durability {
        if let Some(after) = b.durability.get(server).filter(|after| *after != before) {
            let _ = writeln!(text, "note: {server} acknowledged otherwise: {before} / {after}");
        }
    }
    if a.optimised != b.optimised {
        let _ = writeln!(text, "note: only one of them was measured by an optimised build");
    }
}

fn runs(text: &mut String, before: &RunResult, after: &RunResult) {
    let _ = writeln!(text, "{} / {}: {}", before.target, after.target, after.settings.mode);
    if before.workload != after.workload {
        let _ = writeln!(text, "note: the workloads differ");
    }
    if before.settings != after.settings {
        let _ = writeln!(text, "note: the settings differ");
    }
    for (which, run) in [("first", before), ("second", after)] {
        if !run.valid {
            let reason = run.invalid.first().or(run.error.as_ref()).map_or("", String::as_str);
            let _ = writeln!(text, "note: the {which} is invalid: {reason}");
        }
    }
    for metric in [Metric::ServerCpu, Metric::Rate] {
        if let (Some(old), Some(new)) = (metric.of(before), metric.of(after)) {
            line(text, metric_name(metric), old, new, metric, false);
        }
    }
    for class in &before.classes {
        let Some(other) = after.classes.iter().find(|other| other.class == class.class) else {
            continue;
        };
        let (old, new) = (&class.latency, &other.latency);
        for (name, old, new) in [
            ("p50", old.p50_us, new.p50_us),
            ("p99", old.p99_us, new.p99_us),
            ("p99.9", old.p99_9_us, new.p99_9_us),
            ("max", old.max_us, new.max_us),
        ] {
            line(
                text,
                &format!("{} {name}", class.class.name()),
                old,
                new,
                Metric::P50,
                false,
            );
        }
    }
}

const fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::ServerCpu => "server CPU/op",
        Metric::Rate => "operations/s",
        Metric::P50 => "p50",
        Metric::P99 => "p99",
        Metric::P999 => "p99.9",
    }
}

fn line(text: &mut String, name: &str, old: f64, new: f64, metric: Metric, within_spread: bool) {
    let show = |value| {
        if metric == Metric::Rate {
            short(value)
        } else {
            time(value)
        }
    };
    let change = (new / old - 1.0) * 100.0;
    let judgement = if within_spread {
        "within the rounds' spread"
    } else if change.abs() < 0.05 {
        "same"
    } else if (change > 0.0) == metric.higher_is_better() {
        "better"
    } else {
        "worse"
    };
    let _ = writeln!(
        text,
        "  {name:<16} {:>12} -> {:>12}  {change:+7.1} %  {judgement}",
        show(old),
        show(new)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_operations_are_better_and_more_time_is_worse() {
        let mut text = String::new();
        line(&mut text, "operations/s", 100.0, 110.0, Metric::Rate, false);
        line(&mut text, "p50", 100.0, 110.0, Metric::P50, false);
        line(&mut text, "p99", 100.0, 110.0, Metric::P99, true);
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[0].ends_with("+10.0 %  better") && lines[1].ends_with("worse"),
            "{text}"
        );
        assert!(lines[2].ends_with("within the rounds' spread"), "{text}");
    }
}
