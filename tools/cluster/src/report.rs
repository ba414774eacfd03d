//! What a run comes to: as text, as JSON, and as one page that loads nothing from anywhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use generation_bench::report::html::{Section, render_with};
use generation_bench::report::{FORMAT, Report as BenchReport, table};
use generation_bench::result::RunResult;
use generation_bench::system::Environment;
use serde::Serialize;

use crate::events::Happened;
use crate::probe::ShardProbes;
use crate::script::Script;

/// Version of the JSON's layout.
const LAYOUT: u32 = 1;

/// Widest column of the text, in characters; what is longer pushes the rest of its line.
const WIDEST: usize = 60;

/// Upper bounds of the histogram of times without service, in milliseconds.
const BOUNDS_MS: [f64; 9] = [
    200.0,
    500.0,
    1_000.0,
    1_500.0,
    2_000.0,
    3_000.0,
    5_000.0,
    10_000.0,
    f64::INFINITY,
];

/// How a cluster came up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Startup {
    /// Until every node served, in milliseconds.
    pub(crate) serving_ms: f64,
    /// Until every shard had a leader and all its replicas, in milliseconds.
    pub(crate) whole_ms: f64,
}

/// How a cluster was left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Settling {
    /// Until it was whole, from the end of the load, in milliseconds.
    pub(crate) whole_ms: f64,
    /// Until leaders were even, from when it was whole; `None`: that was not waited for to the end.
    pub(crate) even_ms: Option<f64>,
}

/// What a run comes to.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Version of this layout.
    pub(crate) layout: u32,
    /// Where it ran.
    pub(crate) environment: Environment,
    /// What was asked.
    pub(crate) script: Script,
    /// How the cluster came up.
    pub(crate) startup: Startup,
    /// Each node's CPU while nobody asked for anything, in parts of a core.
    pub(crate) idle_cpu: BTreeMap<u64, f64>,
    /// What happened.
    pub(crate) events: Vec<Happened>,
    /// What became of the probes.
    pub(crate) probes: Vec<ShardProbes>,
    /// How many times without service were how long: upper bound in milliseconds (absent: none), and count.
    pub(crate) histogram: Vec<(Option<f64>, u64)>,
    /// Acknowledged writes that were not there afterwards; `None`: it was not looked for, for entries may go.
    pub(crate) lost: Option<u64>,
    /// How many shards each node led before the load and at the end.
    pub(crate) leaders: [BTreeMap<u64, u64>; 2],
    /// How the cluster was left.
    pub(crate) settling: Settling,
    /// Bytes of gossip each node has sent since its start, of those that say so.
    pub(crate) gossip_bytes: BTreeMap<u64, u64>,
    /// The load.
    pub(crate) load: Option<RunResult>,
}

/// The parts of a report that are measured; the rest follows from them.
pub(crate) struct Measured {
    pub(crate) environment: Environment,
    pub(crate) script: Script,
    pub(crate) startup: Startup,
    pub(crate) idle_cpu: BTreeMap<u64, f64>,
    pub(crate) events: Vec<Happened>,
    pub(crate) probes: Vec<ShardProbes>,
    pub(crate) lost: Option<u64>,
    pub(crate) leaders: [BTreeMap<u64, u64>; 2],
    pub(crate) settling: Settling,
    pub(crate) gossip_bytes: BTreeMap<u64, u64>,
    pub(crate) load: Option<RunResult>,
}

impl From<Measured> for Report {
    fn from(measured: Measured) -> Self {
        let lasted = measured.probes.iter().flat_map(|probes| &probes.outages);
        let histogram = histogram(lasted.map(|outage| outage.lasted_ms));
        Self {
            layout: LAYOUT,
            environment: measured.environment,
            script: measured.script,
            startup: measured.startup,
            idle_cpu: measured.idle_cpu,
            events: measured.events,
            probes: measured.probes,
            histogram,
            lost: measured.lost,
            leaders: measured.leaders,
            settling: measured.settling,
            gossip_bytes: measured.gossip_bytes,
            load: measured.load,
        }
    }
}

/// Counts times by the first bound they do not pass.
fn histogram(times_ms: impl Iterator<Item = f64>) -> Vec<(Option<f64>, u64)> {
    let mut counts = [0; BOUNDS_MS.len()];
    for time in times_ms {
        let place = BOUNDS_MS
            .iter()
            .position(|bound| time <= *bound)
            .unwrap_or(BOUNDS_MS.len() - 1);
        counts[place] += 1;
    }
    let bound = |bound: f64| bound.is_finite().then_some(bound);
    BOUNDS_MS.into_iter().map(bound).zip(counts).collect()
}

fn ms(time: f64) -> String {
    format!("{time:.0} ms")
}

fn counts(failures: &BTreeMap<String, u64>) -> String {
    let words: Vec<String> = failures.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(", ")
    }
}

fn by_node<T: std::fmt::Display>(values: impl Iterator<Item = (u64, T)>) -> String {
    let words: Vec<String> = values.map(|(node, value)| format!("{node}: {value}")).collect();
    words.join(", ")
}

impl Report {
    /// Whether nothing that was acknowledged is missing and every event was carried out.
    pub(crate) fn is_good(&self) -> bool {
        self.lost.unwrap_or(0) == 0 && self.events.iter().all(|event| event.error.is_none())
    }

    /// The sections of text and page.
    fn sections(&self) -> Vec<Section> {
        let section = |title: &str, header: &[&str], rows: Vec<Vec<String>>| Section {
            title: title.to_owned(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
            rows,
        };
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let acknowledged: u64 = self.probes.iter().map(|probes| probes.acknowledged).sum();
        let sent: u64 = self.probes.iter().map(|probes| probes.sent).sum();
        let mut failures: BTreeMap<String, u64> = BTreeMap::new();
        for (kind, count) in self.probes.iter().flat_map(|probes| &probes.failures) {
            *failures.entry(kind.clone()).or_default() += count;
        }
        let led = |led: &BTreeMap<u64, u64>| by_node(led.iter().map(|(node, count)| (*node, *count)));
        let mut cluster = vec![
            row("all nodes serve after", ms(self.startup.serving_ms)),
            row("full map after", ms(self.startup.whole_ms)),
            row(
                "idle CPU of a node, % of a core",
                by_node(
                    self.idle_cpu
                        .iter()
                        .map(|(node, share)| (*node, format!("{:.2}", share * 100.0))),
                ),
            ),
            row("shards led, before", led(&self.leaders[0])),
            row("shards led, at the end", led(&self.leaders[1])),
            row("whole again after the load", ms(self.settling.whole_ms)),
            row(
                "leaders even again",
                self.settling
                    .even_ms
                    .map_or("not while it was waited for".to_owned(), ms),
            ),
            row("probes acknowledged", format!("{acknowledged} of {sent}")),
            row("probes that failed", counts(&failures)),
            row(
                "acknowledged writes lost",
                self.lost
                    .map_or("not looked for: entries may be evicted".to_owned(), |lost| {
                        lost.to_string()
                    }),
            ),
        ];
        if !self.gossip_bytes.is_empty() {
            cluster.push(row(
                "gossip sent since the start, bytes",
                by_node(self.gossip_bytes.iter().map(|(node, bytes)| (*node, *bytes))),
            ));
        }
        if let Some(load) = &self.load {
            cluster.push(row("load, failures by kind", counts(&load.failures)));
        }
        let events = self.events.iter().map(|event| {
            let what = match &event.error {
                Some(error) => format!("{}: NOT DONE: {error}", event.text),
                None => event.text.clone(),
            };
            vec![format!("{:.1} s", event.at_s), what, ms(event.took_ms)]
        });
        let histogram = self.histogram.iter().map(|(bound, count)| {
            let name = bound.map_or_else(
                || format!("more than {}", ms(BOUNDS_MS[BOUNDS_MS.len() - 2])),
                |bound| format!("at most {}", ms(bound)),
            );
            row(&name, count.to_string())
        });
        let shards = self.probes.iter().map(|probes| {
            let all_ms: f64 = probes.outages.iter().map(|outage| outage.lasted_ms).sum();
            vec![
                probes.shard.to_string(),
                probes.outages.len().to_string(),
                ms(probes.longest_ms()),
                ms(all_ms),
                format!("{} of {}", probes.acknowledged, probes.sent),
                counts(&probes.failures),
            ]
        });
        vec![
            section("Cluster", &["", ""], cluster),
            section("Events", &["at", "what", "took"], events.collect()),
            section(
                "Times without service, all shards",
                &["lasted", "times"],
                histogram.collect(),
            ),
            section(
                "Service by shard",
                &[
                    "shard",
                    "times without",
                    "longest",
                    "together",
                    "acknowledged",
                    "failures",
                ],
                shards.collect(),
            ),
        ]
    }

    /// For people, on a terminal.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for Section { title, header, rows } in self.sections() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n{title}");
            let lines = || std::iter::once(&header).chain(&rows);
            let width = |column: usize| {
                lines()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
            };
            let widths: Vec<usize> = (0..header.len())
                .map(|column| width(column).unwrap_or(0).min(WIDEST))
                .collect();
            for row in lines().filter(|row| row.iter().any(|cell| !cell.is_empty())) {
                let cells: Vec<String> = row
                    .iter()
                    .zip(&widths)
                    .map(|(cell, width)| format!("{cell:<width$}"))
                    .collect();
                let _ = writeln!(text, "  {}", cells.join("  ").trim_end());
            }
        }
        if let Some(load) = &self.load {
            let _ = writeln!(text, "\nLoad: {}", table::headline(load));
        }
        text
    }

    /// One page.
    pub(crate) fn html(&self) -> Result<String, String> {
        let report = BenchReport::Runs {
            format: FORMAT,
            environment: Box::new(self.environment.clone()),
            runs: self.load.iter().cloned().collect(),
        };
        render_with(&report, "Cluster under load", &self.sections())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_one_row_of_the_histogram() {
        let counted = histogram([100.0, 200.0, 201.0, 1e9, f64::INFINITY].into_iter());
        let of = |bound| counted.iter().find(|(row, _)| *row == bound).unwrap().1;
        assert_eq!((of(Some(200.0)), of(Some(500.0)), of(None)), (2, 1, 2));
        assert_eq!(counted.iter().map(|(_, count)| count).sum::<u64>(), 5);
    }
}
