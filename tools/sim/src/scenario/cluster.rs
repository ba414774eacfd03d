//! Three whole nodes with a replica of every shard, behind their real transport.

use std::time::Duration;

use generation_engine::ShardConfig;
use generation_node::{Durability, Policy, Replication, Timing};

use super::Plan;
use super::Scenario;
use super::group::{self, Draw};
use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::network::Weather;
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
