//! Three to five replicas of each shard, over the real journal on simulated disks.

use std::time::Duration;

use super::incidents::{any_kill, draw, split, storm};
use super::{IncidentKind, Plan, Scenario};
use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::group::GroupSetup;
use crate::network::{Host, Weather};
use crate::points::{Kill, Strike};
use crate::sim::NodeSetup;
use crate::workload::WorkloadSetup;

/// When faults end.
const CALM_AT: Duration = Duration::from_secs(20);

/// See [`calm`].
pub(super) const CALM: Scenario = Scenario {
    name: "group-calm",
    about: "replicas, nothing goes wrong",
    plan: |dice| calm(dice, 3),
};

/// Machines lose power.
pub(super) const CRASHES: Scenario = Scenario {
    name: "group-crashes",
    about: "replicas that are killed one by one and all at once, by power cuts and at named points",
    plan: |dice| {
        let nodes = 3 + 2 * dice.below(2) as usize;
        with_incidents(dice, nodes, &[kill, kill, ambushes, slow_disk])
    },
};

/// The network and the clocks are bad.
pub(super) const NETWORK: Scenario = Scenario {
    name: "group-network",
    about: "replicas behind a bad network, frozen, with wrong clocks",
    plan: |dice| {
        let nodes = 3 + 2 * dice.below(2) as usize;
        with_incidents(
            dice,
            nodes,
            &[freeze, partition, one_way, slow_link, storm_of, clock, drift],
        )
    },
};

/// All of it.
pub(super) const EVERYTHING: Scenario = Scenario {
    name: "group-everything",
    about: "replicas with every fault there is, full and failing disks included",
    plan: |dice| {
        let nodes = 3 + 2 * dice.below(2) as usize;
        with_incidents(dice, nodes, ALL)
    },
};

/// Struck where it hurts.
pub(super) const AMBUSHES: Scenario = Scenario {
    name: "group-ambushes",
    about: "replicas that are struck at chosen points of their code",
    plan: |dice| {
        let nodes = 3 + 2 * dice.below(2) as usize;
        with_incidents(dice, nodes, &[ambush, ambush, ambush, kill, partition, storm_of])
    },
};

fn calm(dice: &mut Dice, nodes: usize) -> Plan {
    let group = GroupSetup {
        nodes,
        shards: 1 + dice.below(2) as u16,
        clients: 2,
        // The journal keeps eight blocks of each segment for votes: what remains has to hold entries.
        segment_bytes: 4_096 * (20 + dice.below(30)),
        segments: 4 + dice.below(8) as usize,
        kept_bytes: [0, 1_000, 100_000][dice.below(3) as usize],
        snapshots_per_mille: [0, 2, 20][dice.below(3) as usize],
        sessions: dice.chance(500),
    };
    Plan {
        nodes,
        group: Some(group),
        setup: NodeSetup {
            shards: group.shards,
            ..NodeSetup::default()
        },
        forgetful: false,
        pressure: false,
        weather: Weather {
            delay: Duration::from_micros(50 + dice.below(1_000)),
            jitter: Duration::from_micros(dice.below(2_000)),
            ..Weather::default()
        },
        disk: DiskWeather::default(),
        shuffle: dice.chance(500),
        workload: WorkloadSetup {
            agents: 2 + dice.below(3) as usize,
            keys: 2 + dice.below(8),
            operations: 500 + dice.below(1_000),
            spread: CALM_AT,
            ..WorkloadSetup::default()
        },
        incidents: Vec::new(),
        calm: CALM_AT,
    }
}

/// Every kind there is, machines that die twice as likely as others.
pub(super) const ALL: &[Draw] = &[
    kill,
    kill,
    ambushes,
    slow_disk,
    freeze,
    partition,
    one_way,
    slow_link,
    storm_of,
    clock,
    drift,
    full_disk,
    failed_sync,
];

/// Draws an incident among so many machines, of which so many hold replicas.
pub(super) type Draw = fn(&mut Dice, usize, usize) -> IncidentKind;

fn with_incidents(dice: &mut Dice, nodes: usize, kinds: &[Draw]) -> Plan {
    let mut plan = calm(dice, nodes);
    let machines = nodes + plan.group.map_or(0, |group| group.clients);
    add_incidents(&mut plan, dice, kinds, machines);
    plan
}

/// Makes the network worse, and has things happen.
pub(super) fn add_incidents(plan: &mut Plan, dice: &mut Dice, kinds: &[Draw], machines: usize) {
    let nodes = plan.nodes;
    plan.weather.loss_per_mille = dice.below(20);
    plan.weather.tail_per_mille = dice.below(30);
    plan.weather.tail = Duration::from_millis(dice.below(400));
    let count = 2 + dice.below(14);
    plan.incidents = draw(dice, count, plan.calm, |dice| {
        let kind = kinds[dice.below(kinds.len() as u64) as usize];
        kind(dice, nodes, machines)
    });
}

fn any(dice: &mut Dice, nodes: usize) -> usize {
    dice.below(nodes as u64) as usize
}

pub(super) fn kill(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    let how = any_kill(dice);
    let victims = match dice.below(10) {
        0..6 => vec![any(dice, nodes)],
        6..8 => (0..nodes).filter(|_| dice.chance(500)).collect(),
        _ => (0..nodes).collect(),
    };
    IncidentKind::Kill(victims, how)
}

pub(super) fn ambushes(dice: &mut Dice, _: usize, _: usize) -> IncidentKind {
    IncidentKind::Ambushes {
        per_million: 100 + dice.below(20_000),
    }
}

pub(super) fn ambush(dice: &mut Dice, _: usize, _: usize) -> IncidentKind {
    let points = generation_node::points::ALL;
    // What is passed all the time is as good early as late; what is rare is not to be missed.
    let skips = 1 + dice.below(20);
    IncidentKind::Ambush {
        point: points[dice.below(points.len() as u64) as usize],
        skip: dice.below(skips),
        strike: match dice.below(10) {
            0 => Strike::Freeze,
            1..4 => Strike::Kill(Kill::Process),
            _ => Strike::Kill(Kill::Power),
        },
    }
}

/// A node dies with all it has, while the others are whole.
pub(super) fn lose(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::Lose(any(dice, nodes), any_kill(dice))
}

pub(super) fn freeze(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::Freeze {
        node: any(dice, nodes),
        clock_stops: dice.chance(500),
    }
}

pub(super) fn partition(dice: &mut Dice, _: usize, machines: usize) -> IncidentKind {
    let (one, other) = split(dice, machines, 0);
    IncidentKind::Partition(one, other)
}

pub(super) fn one_way(dice: &mut Dice, _: usize, machines: usize) -> IncidentKind {
    let (one, other) = split(dice, machines, 0);
    IncidentKind::OneWay(one, other)
}

pub(super) fn slow_link(dice: &mut Dice, nodes: usize, machines: usize) -> IncidentKind {
    let from = Host::Node(any(dice, nodes));
    let to = (0..machines).map(Host::Node).filter(|to| *to != from).collect();
    IncidentKind::SlowLink(vec![from], to, Duration::from_millis(dice.below(800)))
}

pub(super) fn storm_of(dice: &mut Dice, _: usize, _: usize) -> IncidentKind {
    storm(dice)
}

pub(super) fn clock(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::Clock {
        node: any(dice, nodes),
        by_ms: dice.below(20_000).cast_signed() - 10_000,
    }
}

pub(super) fn drift(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::Drift {
        node: any(dice, nodes),
        ppm: dice.below(200_000).cast_signed() - 100_000,
    }
}

pub(super) fn slow_disk(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::SlowDisk {
        node: any(dice, nodes),
        stall: Duration::from_millis(dice.below(500)),
    }
}

fn full_disk(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::FullDisk { node: any(dice, nodes) }
}

fn failed_sync(dice: &mut Dice, nodes: usize, _: usize) -> IncidentKind {
    IncidentKind::FailedSync {
        node: any(dice, nodes),
        count: 1 + dice.below(3),
    }
}
