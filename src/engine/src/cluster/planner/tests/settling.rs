//! Whatever happens to a cluster, it comes to rest, and every step on the way is safe.

use proptest::collection::vec;
use proptest::prelude::*;

use super::world::World;
use crate::cluster::placement::tests::node;
use crate::cluster::records::{Node, NodeState, REPLICATION_FACTORS};

#[derive(Debug, Clone)]
enum Event {
    Kill(prop::sample::Index),
    Revive(prop::sample::Index),
    Join {
        zone: usize,
        cores: u16,
    },
    Leave(prop::sample::Index),
    Drain(prop::sample::Index),
    Undrain(prop::sample::Index),
    Replication(u8),
    /// A shard is busier, or less so.
    Load {
        shard: u16,
        rate: u64,
    },
    /// Time passes and plans are made; of the groups under way those whose bit is set get one member further each time.
    Pass {
        rounds: usize,
        ms: u64,
        groups: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let any = any::<prop::sample::Index>;
    prop_oneof![
        3 => any().prop_map(Event::Kill),
        3 => any().prop_map(Event::Revive),
        3 => (0..5_usize, 1..4_u16).prop_map(|(zone, cores)| Event::Join { zone, cores }),
        2 => any().prop_map(Event::Leave),
        1 => any().prop_map(Event::Drain),
        1 => any().prop_map(Event::Undrain),
        1 => prop::sample::select(&REPLICATION_FACTORS[..]).prop_map(Event::Replication),
        2 => (0..14_u16, 0..1_000_000_u64).prop_map(|(shard, rate)| Event::Load { shard, rate }),
        8 => (1..6_usize, 0..70_000_u64, proptest::num::u64::ANY).prop_map(|(rounds, ms, groups)| Event::Pass { rounds, ms, groups }),
    ]
}

/// Zones, whether cores differ, and whether members are exchanged in one change.
#[derive(Debug, Clone)]
struct Shape {
    zones: usize,
    equal: bool,
    swaps: bool,
}

fn shape() -> impl Strategy<Value = Shape> {
    let parts = (prop_oneof![Just(1), 2..6_usize], any::<bool>(), any::<bool>());
    parts.prop_map(|(zones, equal, swaps)| Shape { zones, equal, swaps })
}

const ZONES: [&str; 5] = ["a", "b", "c", "d", "e"];

impl Shape {
    fn zone(&self, zone: usize) -> &'static str {
        ZONES[zone % self.zones]
    }

    fn cores(&self, cores: u16) -> u16 {
        if self.equal { 1 } else { cores }
    }
}

fn with_state(world: &World, state: NodeState) -> Vec<u64> {
    world
        .cluster
        .nodes()
        .filter(|node| node.state == state)
        .map(|node| node.id)
        .collect()
}

fn happen(world: &mut World, shape: &Shape, event: &Event) {
    let nodes: Vec<u64> = world.lives.keys().copied().collect();
    match event {
        Event::Kill(index) => world.kill(*index.get(&nodes)),
        Event::Revive(index) => world.revive(*index.get(&nodes)),
        Event::Join { zone, cores } => {
            if nodes.len() < 12 {
                world.join(shape.zone(*zone), shape.cores(*cores));
            }
        }
        Event::Leave(index) => {
            let staying = world.cluster.nodes().filter(|node| node.state.keeps_replicas()).count();
            let up = with_state(world, NodeState::Up);
            if staying > usize::from(world.config().replication) && !up.is_empty() {
                world.set_state(*index.get(&up), NodeState::Leaving);
            }
        }
        Event::Drain(index) => {
            let up = with_state(world, NodeState::Up);
            if !up.is_empty() {
                world.set_state(*index.get(&up), NodeState::Draining);
            }
        }
        Event::Undrain(index) => {
            let draining = with_state(world, NodeState::Draining);
            if !draining.is_empty() {
                world.set_state(*index.get(&draining), NodeState::Up);
            }
        }
        Event::Replication(factor) => {
            let leaving = with_state(world, NodeState::Leaving);
            let grows = *factor > world.config().replication;
            if leaving.is_empty() || !grows {
                world.set_config(|config| config.replication = *factor);
            }
        }
        Event::Load { shard, rate } => {
            world.loads.insert(*shard, *rate);
        }
        Event::Pass { rounds, ms, groups } => {
            for round in 0..*rounds {
                world.reconcile();
                for (place, key) in world.groups().into_iter().enumerate() {
                    if groups >> ((place * 7 + round * 13) % 64) & 1 == 1 {
                        world.converge(key);
                    }
                }
                world.pass(*ms);
            }
        }
    }
}

fn begin(shape: &Shape, founders: &[(usize, u16)], shards: u16, replication: u8) -> World {
    let numbered = (1..).zip(founders);
    let nodes: Vec<Node> = numbered
        .map(|(id, (zone, cores))| node(id, shape.zone(*zone), shape.cores(*cores)))
        .collect();
    let mut world = World::new(&nodes, shards, replication);
    world.swaps = shape.swaps;
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn whatever_happens_it_settles_once_all_nodes_are_well(
        shape in shape(),
        founders in vec((0..5_usize, 1..4_u16), 1..5),
        shards in 1_u16..14,
        replication in prop::sample::select(&REPLICATION_FACTORS[..]),
        events in vec(event(), 0..30),
    ) {
        let mut world = begin(&shape, &founders, shards, replication);
        for event in &events {
            happen(&mut world, &shape, event);
        }
        for id in world.lives.keys().copied().collect::<Vec<_>>() {
            world.revive(id);
        }
        for id in with_state(&world, NodeState::Draining) {
            world.set_state(id, NodeState::Up);
        }
        world.settle();
        world.check_settled();
    }

    #[test]
    fn whatever_happens_it_settles_with_nodes_that_stay_dead(
        shape in shape(),
        founders in vec((0..5_usize, 1..4_u16), 1..5),
        shards in 1_u16..14,
        replication in prop::sample::select(&REPLICATION_FACTORS[..]),
        events in vec(event(), 0..30),
    ) {
        let mut world = begin(&shape, &founders, shards, replication);
        for event in &events {
            happen(&mut world, &shape, event);
        }
        world.pass(1_000_000);
        world.settle();
        let plan = world.reconcile();
        prop_assert_eq!(plan.steps, Vec::new());
    }
}
