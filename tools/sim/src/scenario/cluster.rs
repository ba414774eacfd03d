//! Three whole nodes with a replica of every shard, behind their real transport.

use std::time::Duration;

use generation_engine::ShardConfig;
use generation_node::{Durability, Membership, Policy, Replication, Timing};

use super::group::{self, Draw};
use super::{Incident, IncidentKind, Plan, Scenario};
use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::network::Weather;
use crate::points::{Kill, Strike};
use crate::sim::NodeSetup;
use crate::workload::WorkloadSetup;

/// When faults end.
const CALM_AT: Duration = Duration::from_secs(15);

/// Nothing goes wrong.
pub(super) const CALM: Scenario = Scenario {
    name: "cluster-calm",
    about: "replicated nodes, nothing goes wrong",
    plan: calm,
};

/// Machines lose power.
pub(super) const CRASHES: Scenario = Scenario {
    name: "cluster-crashes",
    about: "replicated nodes that are killed one by one and all at once, by power cuts and at named points",
    plan: |dice| with_incidents(dice, &[group::kill, group::kill, group::ambushes, group::slow_disk]),
};

/// The network and the clocks are bad.
pub(super) const NETWORK: Scenario = Scenario {
    name: "cluster-network",
    about: "replicated nodes behind a bad network, frozen, with wrong clocks",
    plan: |dice| {
        let kinds = [
            group::freeze,
            group::partition,
            group::one_way,
            group::slow_link,
            group::storm_of,
            group::clock,
            group::drift,
        ];
        with_incidents(dice, &kinds)
    },
};

/// All of it.
pub(super) const EVERYTHING: Scenario = Scenario {
    name: "cluster-everything",
    about: "replicated nodes with every fault there is, full and failing disks included",
    plan: |dice| with_incidents(dice, group::ALL),
};

/// Struck where it hurts.
pub(super) const AMBUSHES: Scenario = Scenario {
    name: "cluster-ambushes",
    about: "replicated nodes, three or five, that are struck at chosen points of their code",
    plan: |dice| {
        let mut plan = of_size(dice);
        let kinds = [
            group::ambush,
            group::ambush,
            group::ambush,
            group::kill,
            group::partition,
            group::storm_of,
        ];
        add_incidents(&mut plan, dice, &kinds);
        plan
    },
};

/// Struck everywhere.
pub(super) const POINTS: Scenario = Scenario {
    name: "cluster-points",
    about: "three replicated nodes that lose power at every named point of their code, and are cut off",
    plan: |dice| {
        let mut plan = calm(dice);
        if let Some(replication) = &mut plan.setup.replication {
            // Each start takes a file of the journal, and a node that is struck nine times before its first snapshot would have none left.
            replication.segments += STRUCK_STARTS;
        }
        let cuts = [group::partition, group::partition, group::slow_link];
        group::add_incidents(&mut plan, dice, &cuts, 3);
        for &point in generation_node::points::ALL {
            // Nodes join when they start, and hardly ever later.
            let latest = if point.starts_with("join.") { 1 } else { 10_000 };
            let at = Duration::from_millis(dice.below(latest));
            let kind = IncidentKind::Ambush {
                point,
                skip: dice.below(2),
                strike: Strike::Kill(Kill::Power),
            };
            let lasts = plan.calm.saturating_sub(at);
            plan.incidents.push(Incident { at, lasts, kind });
        }
        plan.incidents.sort_by_key(|incident| incident.at);
        plan
    },
};

/// Files a journal has for the starts of a node that is struck again and again.
const STRUCK_STARTS: usize = 8;

/// Disks are lost.
pub(super) const REPLACED: Scenario = Scenario {
    name: "cluster-replaced",
    about: "replicated nodes, three or five, that come back without their disks, are struck meanwhile, and cut off",
    plan: |dice| {
        let mut plan = of_size(dice);
        let kinds = [
            group::lose,
            group::lose,
            group::lose,
            group::ambush,
            group::kill,
            group::partition,
        ];
        add_incidents(&mut plan, dice, &kinds);
        plan
    },
};

/// Nothing is kept.
pub(super) const MEMORY: Scenario = Scenario {
    name: "cluster-memory",
    about: "replicated nodes, three or five, that keep nothing on disks and die one by one",
    plan: |dice| {
        let mut plan = of_size(dice);
        if let Some(replication) = &mut plan.setup.replication {
            replication.durability = Durability::Memory;
        }
        let kinds = [
            group::lose,
            group::lose,
            group::partition,
            group::freeze,
            group::one_way,
            group::storm_of,
        ];
        add_incidents(&mut plan, dice, &kinds);
        plan
    },
};

/// There is not room for all.
pub(super) const PRESSURE: Scenario = Scenario {
    name: "cluster-pressure",
    about: "replicated nodes that evict and expire entries, behind a bad network, killed and with wrong clocks",
    plan: |dice| {
        let mut plan = of_size(dice);
        plan.pressure = true;
        plan.setup.shard.policy = [Policy::Lru, Policy::S3Fifo][dice.below(2) as usize];
        plan.setup.shard.max_records = Some(2 + dice.below(6));
        plan.workload.keys = 8 + dice.below(20);
        plan.workload.perishable_per_mille = 300;
        let kinds = [
            group::kill,
            group::ambush,
            group::partition,
            group::clock,
            group::clock,
            group::drift,
            group::freeze,
        ];
        add_incidents(&mut plan, dice, &kinds);
        plan
    },
};

/// Three nodes or five, and nothing goes wrong.
fn of_size(dice: &mut Dice) -> Plan {
    let mut plan = calm(dice);
    plan.nodes = if dice.chance(700) { 3 } else { 5 };
    plan.setup.nodes = plan.nodes;
    // Entries of several sectors, so that a frame can be torn in the middle of one.
    plan.workload.value_bytes = if dice.chance(500) { 64 } else { 3_000 };
    plan
}

fn add_incidents(plan: &mut Plan, dice: &mut Dice, kinds: &[Draw]) {
    let machines = plan.nodes;
    group::add_incidents(plan, dice, kinds, machines);
}

fn calm(dice: &mut Dice) -> Plan {
    Plan {
        nodes: 3,
        group: None,
        setup: NodeSetup {
            cores: 1 + dice.below(2) as u16,
            shards: 1 << dice.below(3),
            shard: ShardConfig {
                policy: Policy::NoEvict,
                budget_bytes: 16 << 20,
                ..ShardConfig::default()
            },
            nodes: 3,
            replication: Some(Replication {
                cluster: u128::from(dice.roll()),
                durability: Durability::Sync,
                segment_bytes: 4_096 * (20 + dice.below(60)),
                segments: 4 + dice.below(8) as usize,
                snapshot_bytes: 4_096 * (10 + dice.below(200)),
                timing: Timing::default(),
                membership: Membership::Fixed,
            }),
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
            endpoints: 1 + dice.below(2) as usize,
            agents: 2 + dice.below(3) as usize,
            keys: 2 + dice.below(8),
            // With few of them shards are left alone for long enough to keep still.
            operations: if dice.chance(400) {
                20 + dice.below(60)
            } else {
                300 + dice.below(700)
            },
            spread: CALM_AT,
            sessions: dice.chance(500),
            ..WorkloadSetup::default()
        },
        incidents: Vec::new(),
        calm: CALM_AT,
    }
}

fn with_incidents(dice: &mut Dice, kinds: &[Draw]) -> Plan {
    let mut plan = calm(dice);
    group::add_incidents(&mut plan, dice, kinds, 3);
    plan
}
