//! What is run: a cluster, what its clients do, and what is done to it, all drawn from the seed.

mod cluster;
mod group;
mod incidents;
mod single;

use std::fmt;
use std::time::Duration;

use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::group::GroupSetup;
use crate::network::{Host, Weather};
use crate::points::{Kill, Strike};
use crate::sim::NodeSetup;
use crate::workload::WorkloadSetup;

/// A named family of runs.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it is about, in one line.
    pub about: &'static str,
    /// Draws a run.
    pub(crate) plan: fn(&mut Dice) -> Plan,
}

/// All scenarios.
pub const SCENARIOS: &[Scenario] = &[
    single::CALM,
    single::NETWORK,
    single::RESTARTS,
    single::PRESSURE,
    group::CALM,
    group::CRASHES,
    group::NETWORK,
    group::EVERYTHING,
    cluster::CALM,
    cluster::CRASHES,
    cluster::NETWORK,
    cluster::EVERYTHING,
    group::AMBUSHES,
    cluster::AMBUSHES,
    cluster::POINTS,
    cluster::REPLACED,
    cluster::MEMORY,
    cluster::PRESSURE,
];

impl Scenario {
    /// The scenario of a name.
    pub fn of_name(name: &str) -> Option<&'static Self> {
        SCENARIOS.iter().find(|scenario| scenario.name == name)
    }
}

/// One run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its nodes.
    pub nodes: usize,
    /// Replicas alone, instead of whole nodes.
    pub group: Option<GroupSetup>,
    /// Each of them, where they are whole.
    pub setup: NodeSetup,
    /// Whether a node that starts has lost what it held: its shards begin empty, in a higher epoch.
    pub forgetful: bool,
    /// Whether entries may be evicted without an event.
    pub pressure: bool,
    /// The network, but for incidents.
    pub weather: Weather,
    /// The disks, but for incidents.
    pub disk: DiskWeather,
    /// Whether ready tasks run in random order.
    pub shuffle: bool,
    /// What clients do.
    pub workload: WorkloadSetup,
    /// What is done to the cluster. Every incident is over by `calm`.
    pub incidents: Vec<Incident>,
    /// When nothing is done any more.
    pub calm: Duration,
}

/// Something done to the cluster, and undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incident {
    /// When it is done.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// What it is.
    pub kind: IncidentKind,
}

/// Kinds of incidents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IncidentKind {
    /// Nodes die together and are started again.
    Kill(Vec<usize>, Kill),
    /// A node dies and comes back without anything it has had, if the cluster can spare it at that moment: everything it holds is
    /// held by all others too.
    Lose(usize, Kill),
    /// A node is not polled; its clocks may stand still meanwhile.
    Freeze {
        /// The node.
        node: usize,
        /// Whether its clocks stand still.
        clock_stops: bool,
    },
    /// Nothing gets from one group to the other, nor back.
    Partition(Vec<Host>, Vec<Host>),
    /// Nothing gets from one group to the other, but back.
    OneWay(Vec<Host>, Vec<Host>),
    /// What goes from one group to the other takes longer.
    SlowLink(Vec<Host>, Vec<Host>, Duration),
    /// Datagrams are lost and doubled, of 1,000 each.
    Storm {
        /// Lost.
        loss_per_mille: u64,
        /// Doubled.
        duplicate_per_mille: u64,
    },
    /// A node's wall clock is wrong.
    Clock {
        /// The node.
        node: usize,
        /// By how much, in milliseconds.
        by_ms: i64,
    },
    /// A node's clocks run at another speed.
    Drift {
        /// The node.
        node: usize,
        /// How much faster, in parts per million.
        ppm: i64,
    },
    /// A node's disk stalls.
    SlowDisk {
        /// The node.
        node: usize,
        /// Greatest stall.
        stall: Duration,
    },
    /// A node's disk is full.
    FullDisk {
        /// The node.
        node: usize,
    },
    /// A node's next syncs fail; the node is restarted in the end.
    FailedSync {
        /// The node.
        node: usize,
        /// How many.
        count: u64,
    },
    /// Nodes die at named points of their code, this often in a million, and are started again.
    Ambushes {
        /// How often.
        per_million: u64,
    },
    /// A node is struck at one point of its code, if it gets there.
    Ambush {
        /// The point.
        point: &'static str,
        /// How often it is passed unharmed, by whichever node.
        skip: u64,
        /// What happens.
        strike: Strike,
    },
}

impl IncidentKind {
    /// Its name, for counting.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kill(_, Kill::Power) => "power cut",
            Self::Kill(_, Kill::Process) => "process kill",
            Self::Lose(..) => "lost node",
            Self::Freeze { clock_stops: true, .. } => "frozen machine",
            Self::Freeze { .. } => "paused process",
            Self::Partition(..) => "partition",
            Self::OneWay(..) => "one-way partition",
            Self::SlowLink(..) => "slow link",
            Self::Storm { .. } => "storm",
            Self::Clock { .. } => "clock jump",
            Self::Drift { .. } => "clock drift",
            Self::SlowDisk { .. } => "slow disk",
            Self::FullDisk { .. } => "full disk",
            Self::FailedSync { .. } => "failed sync",
            Self::Ambushes { .. } => "ambushes",
            Self::Ambush { .. } => "aimed ambush",
        }
    }
}

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "at {} ms for {} ms: {}, {:?}",
            self.at.as_millis(),
            self.lasts.as_millis(),
            self.kind.name(),
            self.kind
        )
    }
}
