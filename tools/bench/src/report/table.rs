//! Plain tables for the terminal.

use std::fmt::Write as _;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use crate::compare::{Comparison, Metric, RowResult, Spread};
use crate::engine::Mode;
use crate::result::{Finding, Latencies, RunResult, Unit};
use crate::system::Environment;

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A number with about three significant digits.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e7 => format!("{:.1} M", value / 1e6),
        v if v >= 1e6 => format!("{:.2} M", value / 1e6),
        v if v >= 1e5 => format!("{:.0} k", value / 1e3),
        v if v >= 1e4 => format!("{:.1} k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A time given in microseconds.
pub fn time(us: f64) -> String {
    if us >= 1e6 {
        format!("{:.2} s", us / 1e6)
    } else if us >= 1e3 {
        format!("{:.2} ms", us / 1e3)
    } else {
        format!("{us:.1} µs")
    }
}

/// What a run asked of its target, in a line.
pub fn headline(result: &RunResult) -> String {
    format!(
        "{} {} over {} connections, {} keys ({}), values of {} B",
        result.workload.mix,
        result.settings.mode,
        result.settings.connections,
        result.workload.keys,
        result.workload.trace.as_ref().map_or_else(
            || result.workload.distribution.to_string(),
            |path| path.display().to_string()
        ),
        result.workload.value_size,
    )
}

/// What a run yielded apart from latencies, in a line: rate, processor time, and how busy and how late the generator was.
pub fn yielded(result: &RunResult) -> String {
    let mut text = format!(
        "{} operations/s over {:.1} s",
        short(result.rate_per_s),
        result.measured_s
    );
    if result.failed() > 0 {
        let _ = write!(text, ", {} failed", result.failed());
    }
    if let Some(ratio) = result.hit_ratio().filter(|_| result.misses > 0) {
        let _ = write!(text, ", hit ratio {:.2} %", ratio * 100.0);
    }
    if let Some(cpu) = result.server_cpu {
        let _ = write!(
            text,
            ", server CPU {:.3} µs/operation ({:.2} cores, polling included)",
            cpu.us_per_operation, cpu.cores
        );
    }
    let _ = write!(text, ", client busy {:.0} %", result.client_busy * 100.0);
    if matches!(result.settings.mode, Mode::Open { .. }) {
        let _ = write!(
            text,
            ", {:.2} % of sends over {} ms late",
            result.lateness.late_share() * 100.0,
            result.settings.lateness.late_after_ns as f64 / 1e6
        );
    }
    text
}

/// One run: rate, latencies by class, failures, verdict.
pub fn run(result: &RunResult) -> String {
    let mut text = format!("{}: {}\n", result.target, headline(result));
    let mut latencies = table(&["", "count", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max"]);
    let mut line = |name: String, times: &Latencies| {
        let mut cells = vec![name, times.count.to_string()];
        let columns = [
            times.mean_us,
            times.p50_us,
            times.p90_us,
            times.p99_us,
            times.p99_9_us,
            times.p99_99_us,
            times.max_us,
        ];
        cells.extend(columns.map(time));
        latencies.add_row(cells);
    };
    let open = matches!(result.settings.mode, Mode::Open { .. });
    for class in &result.classes {
        line(class.class.name().to_owned(), &class.latency);
        if open {
            line("  service time".to_owned(), &class.service);
        }
    }
    let _ = writeln!(text, "{latencies}");
    let _ = writeln!(text, "{}", yielded(result));
    if result.conflicts > 0 {
        let _ = writeln!(text, "{} conditions did not hold", result.conflicts);
    }
    for (kind, count) in &result.failures {
        let _ = writeln!(text, "FAILED: {count} {kind}");
    }
    if open && result.lateness.held > 0 {
        let _ = writeln!(
            text,
            "{} sends waited for the target (its bound of unanswered operations); their wait is in the latency",
            result.lateness.held
        );
    }
    for event in &result.events {
        let _ = writeln!(text, "at {:.3} s: {}", event.at_s, event.text);
    }
    for finding in &result.findings {
        let _ = writeln!(text, "{}: {}", finding.name, figure(finding));
    }
    text.push_str(&verdict(result));
    text
}

/// A finding's figure with its unit.
pub fn figure(finding: &Finding) -> String {
    match finding.unit {
        Unit::Time => time(finding.value),
        Unit::Bytes => format!("{:.1} MiB", finding.value / f64::from(1 << 20)),
        Unit::Count => format!("{:.0}", finding.value),
        Unit::Ratio => format!("{:.2}x", finding.value),
    }
}

/// What a scenario concludes, a column a server.
pub fn findings(runs: &[RunResult]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for finding in runs.iter().flat_map(|run| &run.findings) {
        if !names.contains(&finding.name.as_str()) {
            names.push(&finding.name);
        }
    }
    let header: Vec<_> = std::iter::once("")
        .chain(runs.iter().map(|run| run.target.as_str()))
        .collect();
    let mut lines = table(&header);
    for name in names {
        let cell = |run: &RunResult| {
            let found = run.findings.iter().find(|finding| finding.name == name);
            found.map_or_else(|| "-".to_owned(), figure)
        };
        lines.add_row(std::iter::once(name.to_owned()).chain(runs.iter().map(cell)));
    }
    format!("{lines}\n")
}

/// What is wrong with a run; empty when nothing is.
pub fn verdict(result: &RunResult) -> String {
    let mut text = String::new();
    for reason in &result.invalid {
        let _ = writeln!(text, "*** INVALID RUN: {reason} ***");
    }
    if let Some(error) = &result.error {
        let _ = writeln!(
            text,
            "*** ENDED EARLY: {error}; the figures cover {:.1} s ***",
            result.measured_s
        );
    } else if result.interrupted {
        let _ = writeln!(text, "interrupted: the figures cover {:.1} s", result.measured_s);
    }
    text
}

fn spread(spread: Option<Spread>, show: impl Fn(f64) -> String) -> String {
    spread.map_or_else(|| "-".to_owned(), |spread| show(spread.median))
}

fn ratio(row: &RowResult, index: usize, metric: Metric) -> String {
    let Some(spread) = row.ratio(index, metric) else {
        return "-".to_owned();
    };
    let noise = row.noise(metric).unwrap_or(0.0);
    let change = spread.median.max(1.0 / spread.median) - 1.0;
    let mark = if change <= noise { " ~" } else { "" };
    format!("{:.2} [{:.2}-{:.2}]{mark}", spread.median, spread.min, spread.max)
}

/// Median of a metric of server `index`; a rate that the generator limits is a lower bound.
pub fn value(comparison: &Comparison, row: &RowResult, index: usize, metric: Metric) -> String {
    let bound = row.generator_bound(index, comparison.settings.server_cpus.len());
    spread(row.spread(index, metric), |value| match metric {
        Metric::ServerCpu => format!("{value:.3} µs"),
        Metric::Rate if bound => format!(">= {}", short(value)),
        Metric::Rate => short(value),
        _ => time(value),
    })
}

/// How much better the baseline is than server `index`; of the baseline itself, the noise floor.
pub fn against(row: &RowResult, index: usize, metric: Metric) -> String {
    if index > 0 {
        return ratio(row, index, metric);
    }
    row.noise(metric)
        .map_or_else(|| "-".to_owned(), |noise| format!("A/A ±{:.0} %", noise * 100.0))
}

/// One row of a comparison: a line a server.
pub fn row(comparison: &Comparison, row: &RowResult) -> String {
    let mut text = format!(
        "{}: {} connection(s), closed loop, batches of {} written at once, {} round(s)\n",
        row.row,
        row.row.connections,
        row.row.depth,
        row.rounds.len()
    );
    let mut lines = table(&[
        "server",
        "CPU/op",
        "ops/s",
        "p50",
        "p99",
        "p99.9",
        "cores",
        "client busy",
    ]);
    let server_cpus = comparison.settings.server_cpus.len();
    for (index, server) in comparison.servers.iter().enumerate() {
        let mut cells = vec![server.clone()];
        for metric in Metric::ALL {
            // The ratio stands below its figure, so that a line fits a terminal.
            cells.push(format!(
                "{}\n{}",
                value(comparison, row, index, metric),
                against(row, index, metric)
            ));
        }
        let runs = || row.rounds.iter().filter_map(|round| round.get(index));
        let cores = runs().filter_map(|run| run.server_cpu).map(|cpu| cpu.cores);
        cells.push(spread(Spread::of(cores), |cores| format!("{cores:.2}")));
        let busy = runs().map(|run| run.client_busy * 100.0);
        cells.push(spread(Spread::of(busy), |busy| format!("{busy:.0} %")));
        lines.add_row(cells);
    }
    let _ = writeln!(text, "{lines}");
    for remark in row.remarks_on(&comparison.servers, server_cpus) {
        let _ = writeln!(text, "{remark}");
    }
    text
}

/// Where it was measured and what was: the machine, the servers, and what speaks against believing the figures.
pub fn machine(environment: &Environment) -> String {
    let mut text = String::new();
    for (server, durability) in &environment.durability {
        let version = environment.versions.get(server).map_or("", String::as_str);
        let _ = writeln!(text, "{server}: {version}; acknowledged writes: {durability}");
    }
    let _ = writeln!(
        text,
        "{} x {}{}, Linux {}, load before {:.2}",
        environment.cpus,
        environment.cpu,
        if environment.virtual_machine { " (virtual)" } else { "" },
        environment.kernel,
        environment.load_before[0],
    );
    for warning in warnings(environment) {
        let _ = writeln!(text, "*** {warning} ***");
    }
    text
}

/// What speaks against believing figures measured there.
pub fn warnings(environment: &Environment) -> Vec<&'static str> {
    let busy = environment.load_before[0] > environment.cpus as f64 / 2.0;
    let busy = busy.then_some(
        "the machine was busy before the start: believe the processor time per operation, not latencies or rates",
    );
    let slow =
        (!environment.optimised).then_some("this program was built without optimisation: use cargo run --release");
    busy.into_iter().chain(slow).collect()
}

/// What the figures of a comparison mean, and those that belong to no row.
pub fn legend(comparison: &Comparison) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "Ratios: how many times better {} is (above 1), median [min-max] over the rounds, each within its round. ~ marks a \
         difference below the noise floor (A/A).",
        comparison.servers.first().map_or("the first", String::as_str)
    );
    let memory: Vec<_> = comparison
        .servers
        .iter()
        .zip(&comparison.footprints)
        .map(|(server, footprint)| match footprint {
            Some(footprint) => {
                let missing = footprint
                    .found
                    .map_or(0, |found| footprint.entries.saturating_sub(found));
                let missing = if missing > 0 {
                    format!(", {missing} of the {} loaded are not there", footprint.entries)
                } else {
                    String::new()
                };
                format!(
                    "{server} {:.0} ({:.0}{missing})",
                    footprint.whole_per_entry(),
                    footprint.growth_per_entry()
                )
            }
            None => format!("{server} -"),
        })
        .collect();
    let workload = &comparison.settings.workload;
    let _ = writeln!(
        text,
        "Resident bytes an entry, whole process (growth by loading), {} keys of {}+{} B: {}",
        workload.keys,
        workload.key_len,
        workload.value_size,
        memory.join(", ")
    );
    let settings = &comparison.settings;
    if !settings.server_cpus.is_empty() {
        let _ = writeln!(
            text,
            "Servers on CPU {:?}, client on CPU {:?}",
            settings.server_cpus, settings.client_cpus
        );
    }
    text
}

/// The foot of a comparison.
pub fn comparison(comparison: &Comparison) -> String {
    legend(comparison) + &machine(&comparison.environment) + &ending(comparison)
}

/// Why a comparison has no more rows, and what was measured of the round that has no end; empty when it is whole.
pub fn ending(comparison: &Comparison) -> String {
    let mut text = String::new();
    if let Some(error) = &comparison.error {
        let _ = writeln!(text, "*** ENDED EARLY: {error} ***");
    }
    if comparison.interrupted {
        let _ = writeln!(text, "interrupted: no more was measured than what is printed here");
    }
    for run in comparison.partial.iter().filter(|run| run.operations > 0) {
        let _ = writeln!(
            text,
            "of a round without its end, in no ratio: {}, {} over {} connections, {}: {} operations/s, p50 {}, p99.9 {}",
            run.target,
            run.workload.mix,
            run.settings.connections,
            run.settings.mode,
            short(run.rate_per_s),
            time(run.latency_us(0.5)),
            time(run.latency_us(0.999)),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(12_345_678.0), "12.3 M");
        assert_eq!(short(1_234_567.0), "1.23 M");
        assert_eq!(short(123_456.0), "123 k");
        assert_eq!(short(12_345.0), "12.3 k");
        assert_eq!(short(1.234), "1.23");
        assert_eq!(time(1_500.0), "1.50 ms");
    }
}
