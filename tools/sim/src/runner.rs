//! Runs a seed of a scenario, judges its history, and finds the part of a run that is enough to fail.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use generation_node::Durability;

use crate::check::{Violation, check};
use crate::dice::Dice;
use crate::disk::DiskImage;
use crate::group::Group;
use crate::history::{Event, Header, History};
use crate::observer::{self, Observer};
use crate::points::Ambush;
use crate::scenario::{Incident, IncidentKind, Plan, Scenario};
use crate::sim::Sim;
use crate::workload::{Clients, Counts, Workload};
use crate::world::Counters;

/// How long everything may take to serve again; then clients audit.
const RECOVERY: Duration = Duration::from_secs(5);

/// How often it is looked whether a node that died in an ambush is to be started again.
const WATCH: Duration = Duration::from_millis(25);

/// How long such nodes stay down, in milliseconds, one after the other: some are back before anybody has missed them.
const ABSENCES: [u64; 4] = [25, 250, 25, 1_000];

/// What is left out of a run, to make it smaller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Omission {
    /// Incidents that do not happen, by number.
    pub incidents: BTreeSet<usize>,
    /// Operations at most; 0: as many as planned.
    pub operations: u64,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Run {
    /// What was planned.
    pub plan: Plan,
    /// Hash of everything that happened.
    pub trace: u64,
    /// What clients saw.
    pub history: History,
    /// What was wrong with it.
    pub violations: Vec<Violation>,
    /// What happened, counted.
    pub counters: Counters,
    /// Operations by how they ended.
    pub operations: Counts,
    /// Incidents by kind.
    pub incidents: BTreeMap<&'static str, u64>,
    /// How often each named point was passed, and how often a node was struck there.
    pub points: BTreeMap<&'static str, (u64, u64)>,
    /// Simulated time.
    pub elapsed: Duration,
    /// What journals and replicas say of themselves in the end, where something was wrong.
    pub ends: Vec<String>,
}

thread_local! {
    /// What a panic said, for the run that caught it.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a seed.
pub fn run(scenario: &Scenario, seed: u64, omission: &Omission) -> Run {
    let mut dice = Dice::new(seed);
    let mut plan = (scenario.plan)(&mut dice);
    if omission.operations > 0 {
        plan.workload.operations = plan.workload.operations.min(omission.operations);
    }
    let mut sim = Sim::new(dice.roll(), plan.weather.clone());
    let mut header = Header::new(scenario.name, seed);
    header.pressure = plan.pressure;
    let workload_seed = dice.roll();
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        PANIC.with(|said| *said.borrow_mut() = info.to_string());
    }));
    let mut course = Course::new(&plan, omission);
    let work = plan.workload.clone();
    let mut workload: Box<dyn Clients> = match plan.group {
        Some(group) => Box::new(Group::new(&mut sim, group, work, workload_seed, header)),
        None => Box::new(Workload::new(&mut sim, work, plan.nodes, workload_seed, header)),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| course.drive(&mut sim, &mut *workload)));
    std::panic::set_hook(previous);
    let (operations, counters) = (workload.counts(), sim.counters());
    let history = workload.take_history();
    let mut violations = Vec::new();
    match outcome {
        Ok(()) => violations = check(&history),
        Err(_) => violations.push(Violation {
            property: "panic",
            what: PANIC.with(RefCell::take),
        }),
    }
    let incidents = std::mem::take(&mut course.counts);
    let struck = sim.points_struck();
    let points = sim.points_passed().into_iter();
    let points = points.map(|(point, passed)| (point, (passed, struck.get(point).copied().unwrap_or(0))));
    let ends = if violations.is_empty() {
        Vec::new()
    } else {
        observer::describe(&sim, plan.nodes)
    };
    Run {
        ends,
        trace: sim.trace(),
        elapsed: sim.elapsed(),
        plan,
        history,
        violations,
        counters,
        operations,
        incidents,
        points: points.collect(),
    }
}

/// The line that runs this again.
pub fn replay_line(scenario: &Scenario, seed: u64, omission: &Omission) -> String {
    let mut line = format!("sim replay {seed} --scenario {}", scenario.name);
    if !omission.incidents.is_empty() {
        let numbers: Vec<_> = omission.incidents.iter().map(ToString::to_string).collect();
        let _ = write!(line, " --without {}", numbers.join(","));
    }
    if omission.operations > 0 {
        let _ = write!(line, " --operations {}", omission.operations);
    }
    line
}

/// Leaves out as much of a failing run as can be left out with the same property still violated: incidents one by one, and
/// operations by halves. `None` when the seed does not fail.
pub fn shrink(scenario: &Scenario, seed: u64, mut progress: impl FnMut(&Omission)) -> Option<(Omission, Run)> {
    let mut best = Omission::default();
    let mut run_of_best = run(scenario, seed, &best);
    let property = run_of_best.violations.first()?.property;
    let mut attempt = |omission: Omission, best: &mut Omission| {
        let shorter = run(scenario, seed, &omission);
        let fails = shorter
            .violations
            .iter()
            .any(|violation| violation.property == property);
        if fails {
            progress(&omission);
            *best = omission;
            run_of_best = shorter;
        }
        fails
    };
    let plan = (scenario.plan)(&mut Dice::new(seed));
    loop {
        let before = best.clone();
        for number in 0..plan.incidents.len() {
            if !best.incidents.contains(&number) {
                let mut omission = best.clone();
                omission.incidents.insert(number);
                attempt(omission, &mut best);
            }
        }
        let operations = if best.operations == 0 {
            plan.workload.operations
        } else {
            best.operations
        };
        for fewer in [operations / 2, operations * 3 / 4, operations * 9 / 10] {
            let omission = Omission {
                operations: fewer,
                ..best.clone()
            };
            if fewer > 0 && attempt(omission, &mut best) {
                break;
            }
        }
        if best == before {
            break;
        }
    }
    Some((best, run_of_best))
}

/// A run while it goes on.
struct Course<'a> {
    plan: &'a Plan,
    /// When what is done (`true`) or undone, by incident.
    agenda: Vec<(Duration, bool, usize)>,
    next: usize,
    counts: BTreeMap<&'static str, u64>,
    /// How many incidents keep each node down, or frozen.
    down: Vec<u32>,
    frozen: Vec<u32>,
    /// Since when a node that died in an ambush is missed, and for how long it will be; how many there were.
    missing: Vec<Option<(Duration, Duration)>>,
    absences: usize,
    /// Losses that the cluster could not have borne, and that do not happen.
    spared: BTreeSet<usize>,
    watched: Duration,
    observer: Observer,
    calm: bool,
    audited: bool,
}

impl<'a> Course<'a> {
    fn new(plan: &'a Plan, omission: &Omission) -> Self {
        let mut agenda = Vec::new();
        for (number, incident) in plan.incidents.iter().enumerate() {
            if !omission.incidents.contains(&number) {
                agenda.push((incident.at, true, number));
                agenda.push(((incident.at + incident.lasts).min(plan.calm), false, number));
            }
        }
        agenda.sort_unstable_by_key(|&(at, begins, number)| (at, !begins, number));
        Self {
            plan,
            agenda,
            next: 0,
            counts: BTreeMap::new(),
            down: vec![0; plan.nodes],
            frozen: vec![0; plan.nodes],
            missing: vec![None; plan.nodes],
            absences: 0,
            spared: BTreeSet::new(),
            watched: Duration::ZERO,
            observer: Observer::default(),
            calm: false,
            audited: false,
        }
    }

    fn drive(&mut self, sim: &mut Sim, workload: &mut dyn Clients) {
        if self.plan.shuffle {
            sim.shuffle_tasks();
        }
        for node in 0..self.plan.nodes {
            if self.plan.group.is_none() {
                let number = sim.node(&self.plan.setup);
                debug_assert_eq!(node, number, "nodes are numbered in order");
            }
            workload.started(sim, node);
            sim.set_disk_weather(node, |weather| *weather = self.plan.disk.clone());
            self.note_start(sim, workload);
        }
        let start = sim.now();
        for &(at, ..) in &self.agenda {
            sim.wake_at(start + at);
        }
        sim.wake_at(start + self.plan.calm);
        sim.wake_at(start + self.plan.calm + RECOVERY);
        sim.until(|sim| {
            self.turn(sim, workload);
            workload.turn(sim);
            (self.audited && workload.is_done()).then_some(())
        });
    }

    fn turn(&mut self, sim: &mut Sim, workload: &mut dyn Clients) {
        let elapsed = sim.elapsed();
        while let Some(&(at, begins, number)) = self.agenda.get(self.next)
            && at <= elapsed
        {
            self.next += 1;
            let incident = &self.plan.incidents[number];
            note(sim, workload, incident, begins);
            if begins && matches!(incident.kind, IncidentKind::Lose(..)) && !observer::is_whole(sim, self.plan) {
                self.spared.insert(number);
            }
            if self.spared.contains(&number) {
                continue;
            }
            if begins {
                *self.counts.entry(incident.kind.name()).or_default() += 1;
                self.begin(sim, &incident.kind);
            } else {
                self.end(sim, workload, &incident.kind);
            }
        }
        if elapsed >= self.watched {
            self.watched = elapsed + WATCH;
            sim.wake_at(sim.now() + WATCH);
            self.revive(sim, workload);
        }
        self.observer.turn(sim, self.plan.nodes, workload);
        if !self.calm && elapsed >= self.plan.calm {
            self.calm = true;
            sim.heal();
            sim.clear_ambushes();
            self.revive(sim, workload);
            let at = elapsed.as_nanos() as u64;
            workload.note(Event::Calm { at });
        }
        if self.calm && !self.audited && elapsed >= self.plan.calm + RECOVERY {
            self.audited = true;
            workload.audit(self.plan.setup.shards);
        }
    }

    /// Starts nodes that nothing keeps down, thaws those that nothing keeps frozen: ambushes leave them so.
    fn revive(&mut self, sim: &mut Sim, workload: &mut dyn Clients) {
        for node in 0..self.plan.nodes {
            if self.down[node] == 0 && !sim.is_up(node) {
                let (since, absence) = self.missing[node].unwrap_or_else(|| {
                    self.absences += 1;
                    (
                        sim.elapsed(),
                        Duration::from_millis(ABSENCES[self.absences % ABSENCES.len()]),
                    )
                });
                self.missing[node] = Some((since, absence));
                if self.calm || sim.elapsed() >= since + absence {
                    self.start(sim, workload, node);
                }
            }
            if self.frozen[node] == 0 && sim.is_frozen(node) {
                sim.thaw(node);
            }
        }
    }

    /// Whether a node that dies has lost what it held.
    fn keeps_nothing(&self) -> bool {
        let replication = self.plan.setup.replication.as_ref();
        replication.is_some_and(|replication| replication.durability == Durability::Memory)
    }

    fn start(&mut self, sim: &mut Sim, workload: &mut dyn Clients, node: usize) {
        self.missing[node] = None;
        sim.start(node);
        workload.started(sim, node);
        self.note_start(sim, workload);
        if self.frozen[node] > 0 {
            sim.freeze(node, false);
        }
    }

    /// A node that forgets begins with empty shards.
    fn note_start(&self, sim: &Sim, workload: &mut dyn Clients) {
        if !self.plan.forgetful {
            return;
        }
        let at = sim.elapsed().as_nanos() as u64;
        for shard in 0..self.plan.setup.shards {
            let epoch = sim.starts(0);
            workload.note(Event::Reset { at, shard, epoch });
        }
    }

    fn begin(&mut self, sim: &mut Sim, kind: &IncidentKind) {
        match kind {
            IncidentKind::Kill(nodes, how) => {
                for &node in nodes {
                    self.down[node] += 1;
                    sim.kill(node, *how);
                }
            }
            IncidentKind::Lose(node, how) => {
                self.down[*node] += 1;
                sim.kill(*node, *how);
                if !self.keeps_nothing() {
                    sim.replace_disk(*node, DiskImage::default());
                }
            }
            IncidentKind::Freeze { node, clock_stops } => {
                self.frozen[*node] += 1;
                if sim.is_up(*node) {
                    sim.freeze(*node, *clock_stops);
                }
            }
            IncidentKind::Partition(one, other) => sim.partition(one, other),
            IncidentKind::OneWay(from, to) => sim.cut(from, to),
            IncidentKind::SlowLink(from, to, extra) => sim.slow_link(from, to, *extra),
            IncidentKind::Storm {
                loss_per_mille,
                duplicate_per_mille,
            } => sim.set_weather(|weather| {
                weather.loss_per_mille += loss_per_mille;
                weather.duplicate_per_mille += duplicate_per_mille;
            }),
            IncidentKind::Clock { node, by_ms } => sim.step_clock(*node, *by_ms),
            IncidentKind::Drift { node, ppm } => sim.set_drift(*node, *ppm),
            IncidentKind::SlowDisk { node, stall } => sim.set_disk_weather(*node, |weather| {
                weather.stall_per_mille = 300;
                weather.stall = *stall;
            }),
            IncidentKind::FullDisk { node } => sim.set_disk_weather(*node, |weather| weather.capacity_bytes = 0),
            IncidentKind::FailedSync { node, count } => sim.fail_syncs(*node, *count),
            IncidentKind::Ambushes { per_million } => sim.set_ambush_rate(*per_million),
            IncidentKind::Ambush { point, skip, strike } => sim.ambush(Ambush {
                node: None,
                point: Some((*point).to_owned()),
                skip: *skip,
                strike: *strike,
            }),
        }
    }

    fn end(&mut self, sim: &mut Sim, workload: &mut dyn Clients, kind: &IncidentKind) {
        match kind {
            IncidentKind::Kill(nodes, _) => {
                for &node in nodes {
                    self.down[node] -= 1;
                    if self.down[node] == 0 && !sim.is_up(node) {
                        self.start(sim, workload, node);
                    }
                }
            }
            IncidentKind::Lose(node, _) => {
                self.down[*node] -= 1;
                if self.down[*node] == 0 && !sim.is_up(*node) {
                    self.start(sim, workload, *node);
                }
            }
            IncidentKind::Freeze { node, .. } => {
                self.frozen[*node] -= 1;
                if self.frozen[*node] == 0 {
                    sim.thaw(*node);
                }
            }
            IncidentKind::Partition(one, other) => {
                sim.mend(one, other);
                sim.mend(other, one);
            }
            IncidentKind::OneWay(from, to) | IncidentKind::SlowLink(from, to, _) => sim.mend(from, to),
            IncidentKind::Storm {
                loss_per_mille,
                duplicate_per_mille,
            } => sim.set_weather(|weather| {
                weather.loss_per_mille -= loss_per_mille;
                weather.duplicate_per_mille -= duplicate_per_mille;
            }),
            IncidentKind::Clock { node, by_ms } => sim.step_clock(*node, -by_ms),
            IncidentKind::Drift { node, .. } => sim.set_drift(*node, 0),
            IncidentKind::SlowDisk { node, .. } | IncidentKind::FullDisk { node } => {
                sim.set_disk_weather(*node, |weather| *weather = self.plan.disk.clone());
            }
            IncidentKind::FailedSync { node, .. } => {
                sim.fail_syncs(*node, 0);
                // A disk that failed is believed again only after a restart.
                sim.kill(*node, crate::points::Kill::Process);
                if self.down[*node] == 0 {
                    self.start(sim, workload, *node);
                }
            }
            IncidentKind::Ambushes { .. } => sim.set_ambush_rate(0),
            IncidentKind::Ambush { point, .. } => sim.lift_ambush(point),
        }
    }
}

/// Puts an incident into the history.
fn note(sim: &Sim, workload: &mut dyn Clients, incident: &Incident, begins: bool) {
    let what = format!("{} {:?}", if begins { "begin" } else { "end" }, incident.kind);
    let at = sim.elapsed().as_nanos() as u64;
    workload.note(Event::Fault { at, what });
}
