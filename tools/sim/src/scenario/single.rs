//! One node, which keeps nothing over a restart.

use std::time::Duration;

use generation_engine::ShardConfig;

use super::incidents::{any_kill, draw, one_of, split, storm};
use super::{IncidentKind, Plan, Scenario};
use crate::dice::Dice;
use crate::disk::DiskWeather;
use crate::network::Weather;
use crate::sim::NodeSetup;
use crate::workload::WorkloadSetup;

/// When faults end.
const CALM_AT: Duration = Duration::from_secs(10);

/// See [`calm`].
pub(super) const CALM: Scenario = Scenario {
    name: "single-calm",
    about: "one node, nothing goes wrong",
    plan: calm,
};

/// See [`network`].
pub(super) const NETWORK: Scenario = Scenario {
    name: "single-network",
    about: "one node behind a bad network, with wrong clocks, frozen now and then",
    plan: network,
};

/// See [`restarts`].
pub(super) const RESTARTS: Scenario = Scenario {
    name: "single-restarts",
    about: "one node that is killed and comes back empty",
    plan: restarts,
};

/// See [`pressure`].
pub(super) const PRESSURE: Scenario = Scenario {
    name: "single-pressure",
    about: "one node with too little memory and entries that expire, behind a bad network",
    plan: pressure,
};

fn calm(dice: &mut Dice) -> Plan {
    Plan {
        nodes: 1,
        group: None,
        setup: NodeSetup {
            cores: 1 + dice.below(3) as u16,
            shards: 1 << dice.below(3),
            ..NodeSetup::default()
        },
        forgetful: true,
        pressure: false,
        weather: Weather {
            delay: Duration::from_micros(30 + dice.below(2_000)),
            jitter: Duration::from_micros(dice.below(3_000)),
            steering: dice.chance(800),
            ..Weather::default()
        },
        disk: DiskWeather::default(),
        shuffle: dice.chance(500),
        workload: WorkloadSetup {
            endpoints: 1 + dice.below(3) as usize,
            agents: 1 + dice.below(3) as usize,
            keys: 1 + dice.below(10),
            sessions: dice.chance(500),
            ..WorkloadSetup::default()
        },
        incidents: Vec::new(),
        calm: CALM_AT,
    }
}

fn network(dice: &mut Dice) -> Plan {
    let mut plan = calm(dice);
    plan.weather.loss_per_mille = dice.below(60);
    plan.weather.duplicate_per_mille = dice.below(60);
    plan.weather.tail_per_mille = dice.below(30);
    plan.weather.tail = Duration::from_millis(dice.below(300));
    let count = 2 + dice.below(8);
    let kinds: [fn(&mut Dice) -> IncidentKind; 7] = [freeze, partition, one_way, slow_link, storm, clock, drift];
    plan.incidents = draw(dice, count, CALM_AT, |dice| one_of(&kinds, dice));
    plan
}

fn restarts(dice: &mut Dice) -> Plan {
    let mut plan = network(dice);
    let count = 1 + dice.below(4);
    plan.incidents.extend(draw(dice, count, CALM_AT, kill));
    plan.incidents.sort_by_key(|incident| incident.at);
    plan
}

fn pressure(dice: &mut Dice) -> Plan {
    let mut plan = network(dice);
    plan.pressure = true;
    plan.setup.shard = ShardConfig {
        max_records: Some(1 + dice.below(4)),
        ..plan.setup.shard
    };
    plan.workload.keys = 8 + dice.below(20);
    plan.workload.perishable_per_mille = 300;
    plan
}

fn kill(dice: &mut Dice) -> IncidentKind {
    IncidentKind::Kill(vec![0], any_kill(dice))
}

fn freeze(dice: &mut Dice) -> IncidentKind {
    IncidentKind::Freeze {
        node: 0,
        clock_stops: dice.chance(500),
    }
}

fn partition(dice: &mut Dice) -> IncidentKind {
    let (one, other) = split(dice, 1, 1);
    IncidentKind::Partition(one, other)
}

fn one_way(dice: &mut Dice) -> IncidentKind {
    let (one, other) = split(dice, 1, 1);
    IncidentKind::OneWay(one, other)
}

fn slow_link(dice: &mut Dice) -> IncidentKind {
    let (one, other) = split(dice, 1, 1);
    IncidentKind::SlowLink(one, other, Duration::from_millis(dice.below(500)))
}

fn clock(dice: &mut Dice) -> IncidentKind {
    IncidentKind::Clock {
        node: 0,
        by_ms: dice.below(20_000).cast_signed() - 10_000,
    }
}

fn drift(dice: &mut Dice) -> IncidentKind {
    IncidentKind::Drift {
        node: 0,
        ppm: dice.below(200_000).cast_signed() - 100_000,
    }
}
