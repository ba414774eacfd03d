//! What is asked of a controller, case by case.

use std::collections::BTreeSet;

use super::world::{REPLICA_BYTES, World};
use crate::cluster::placement::tests::node;
use crate::cluster::planner::{Reason, Stuck, plan};
use crate::cluster::records::{Cause, NodeState, RecordKey};
use crate::cluster::{Cluster, Observed};

fn held(world: &World) -> Vec<u64> {
    let layout = world.layout();
    layout.shares().values().map(|share| share.count).collect()
}

fn texts(world: &World) -> String {
    let plan = plan(&world.cluster, &world.observe());
    let texts = plan.steps.iter().map(|step| step.text.clone());
    texts
        .chain(plan.stuck.iter().map(ToString::to_string))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn nothing_is_planned_before_there_is_a_cluster() {
    let plan = plan(&Cluster::new(), &Observed::default());
    assert_eq!(plan.steps, []);
    assert_eq!(
        plan.stuck,
        [Stuck {
            about: RecordKey::Config,
            reason: Reason::NotFounded
        }]
    );
}

#[test]
fn a_cluster_started_by_one_node_grows() {
    let mut world = World::of(1, &[""], 8, 3);
    world.settle();
    assert_eq!(held(&world), [8]);
    for (count, expected) in [(2, vec![8, 8]), (3, vec![8; 3]), (4, vec![6; 4])] {
        assert_eq!(world.join("", 1), count);
        world.settle();
        world.check_settled();
        assert_eq!(held(&world), expected);
    }
    let controller = &world.cluster.controller().unwrap().targets;
    assert_eq!(controller.len(), 3);
    world.join("", 1);
    world.settle();
    world.check_settled();
    assert_eq!(world.cluster.controller().unwrap().targets, [1, 2, 3, 4, 5]);
}

#[test]
fn a_node_that_joins_takes_no_more_than_its_share_at_its_pace() {
    let mut world = World::of(5, &[""], 20, 3);
    world.settle();
    let before: Vec<Vec<u64>> = world.cluster.shards().map(|shard| shard.targets.clone()).collect();
    world.join("", 1);
    let first = world.reconcile();
    assert_eq!(first.steps.len(), 2, "two at a time: {first:#?}");
    assert_eq!(world.reconcile().steps, [], "and no more before those are through");
    world.settle();
    world.check_settled();
    let after = world.cluster.shards().map(|shard| &shard.targets);
    let changed = before
        .iter()
        .zip(after)
        .filter(|(before, after)| before != after)
        .count();
    assert_eq!(changed, 10, "60 replicas on six nodes");
}

#[test]
fn a_dead_node_is_replaced_after_a_while_and_only_if_the_shards_agree() {
    let mut world = World::of(4, &[""], 8, 3);
    world.settle();
    world.kill(2);
    world.pass(119_999);
    assert_eq!(world.reconcile().steps, [], "it may come back");
    world.pass(1);
    // Its shards' leaders still hear it.
    let mut seen = world.observe();
    for group in seen.shards.values_mut().chain([&mut seen.controller]) {
        group.silent.clear();
    }
    let doubted = plan(&world.cluster, &seen);
    assert_eq!(doubted.steps, []);
    assert!(
        doubted
            .stuck
            .iter()
            .any(|stuck| stuck.reason == Reason::Unconfirmed { node: 2 })
    );
    // Nobody leads.
    let mut seen = world.observe();
    for group in seen.shards.values_mut().chain([&mut seen.controller]) {
        group.leader = None;
    }
    assert_eq!(plan(&world.cluster, &seen).steps, []);

    assert!(
        texts(&world).contains("in place of node 2: it has been dead for 120 s"),
        "{}",
        texts(&world)
    );
    world.settle();
    for shard in world.cluster.shards() {
        assert_eq!(shard.targets, [1, 3, 4]);
    }
    assert_eq!(world.cluster.controller().unwrap().targets, [1, 3, 4]);
    // Back, it holds what targets say, and gets its share again.
    world.revive(2);
    world.settle();
    world.check_settled();
    assert_eq!(held(&world), [6; 4]);
}

#[test]
fn nothing_is_replaced_without_a_majority_of_nodes_or_without_a_node_to_take_it() {
    let mut world = World::of(3, &[""], 4, 3);
    world.settle();
    world.kill(3);
    world.pass(500_000);
    let plan = world.reconcile();
    assert_eq!(plan.steps, []);
    assert!(
        plan.stuck
            .iter()
            .all(|stuck| stuck.reason == Reason::NoCandidate { of: Some(3) })
    );
    assert_eq!(plan.stuck.len(), 5, "{:?}", plan.stuck);
    world.kill(2);
    world.pass(500_000);
    world.join("", 1);
    let plan = world.reconcile();
    assert_eq!(plan.steps, []);
    assert_eq!(plan.stuck[0].reason, Reason::NoMajority { alive: 2, nodes: 4 });
}

#[test]
fn a_leaving_node_is_gone_when_nothing_is_held_there() {
    let mut world = World::of(5, &[""], 10, 3);
    world.settle();
    world.set_state(2, NodeState::Leaving);
    let first = world.reconcile();
    assert!(first.steps.iter().all(|step| !step.key.starts_with(b"node/")));
    world.settle();
    assert_eq!(world.cluster.node(2).unwrap().state, NodeState::Gone);
    world.check_settled();
    // It never comes back.
    world.settle();
    assert!(world.cluster.shards().all(|shard| !shard.targets.contains(&2)));
}

#[test]
fn a_dead_node_can_be_made_to_leave_at_once() {
    let mut world = World::of(4, &[""], 6, 3);
    world.settle();
    world.kill(4);
    world.set_state(4, NodeState::Leaving);
    world.settle();
    assert_eq!(world.cluster.node(4).unwrap().state, NodeState::Gone);
    assert!(world.cluster.shards().all(|shard| shard.targets == [1, 2, 3]));
}

#[test]
fn a_draining_node_keeps_what_it_has_and_is_given_nothing() {
    let mut world = World::of(4, &[""], 8, 3);
    world.settle();
    let before = held(&world);
    world.set_state(3, NodeState::Draining);
    world.settle();
    assert_eq!(held(&world), before);
}

#[test]
fn breaches_of_the_rule_of_zones_are_repaired() {
    // Two of three replicas have to be in one zone at first.
    let mut world = World::of(4, &["a", "b"], 8, 3);
    world.settle();
    world.check_settled();
    world.join("c", 1);
    assert!(
        texts(&world).contains("too many replicas were in one zone"),
        "{}",
        texts(&world)
    );
    world.settle();
    world.check_settled();
    assert!(world.cluster.shards().all(|shard| shard.targets.contains(&5)));
    assert!(world.cluster.controller().unwrap().targets.contains(&5));
}

#[test]
fn the_replication_factor_can_be_changed() {
    let mut world = World::of(5, &[""], 6, 3);
    world.settle();
    for factor in [5, 1, 3] {
        world.set_config(|config| config.replication = factor);
        world.settle();
        world.check_settled();
    }
}

#[test]
fn of_too_many_replicas_the_dead_go_first_and_none_is_made_anew() {
    let mut world = World::of(6, &[""], 6, 5);
    world.settle();
    let targets = world.targets(RecordKey::Shard(0)).to_vec();
    world.kill(targets[0]);
    world.kill(targets[1]);
    world.set_state(targets[2], NodeState::Leaving);
    world.set_config(|config| config.replication = 3);
    world.pass(500_000);
    world.reconcile();
    assert_eq!(world.targets(RecordKey::Shard(0)).len(), 4);
    assert!(
        world.targets(RecordKey::Shard(0)).contains(&targets[2]),
        "with it there is a majority still"
    );
    world.settle();
    let now = world.targets(RecordKey::Shard(0));
    assert!(now.len() == 3 && now.iter().all(|id| world.is_alive(*id)), "{now:?}");
}

#[test]
fn a_lost_newcomer_gives_its_place_to_another() {
    let mut world = World::of(5, &[""], 1, 3);
    world.set_config(|config| {
        config.moves_per_node = 1;
        config.moves_total = 1;
    });
    world.settle();
    let targets = world.targets(RecordKey::Shard(0)).to_vec();
    world.kill(targets[2]);
    world.pass(500_000);
    world.reconcile();
    let newcomer = *world
        .targets(RecordKey::Shard(0))
        .iter()
        .find(|id| !targets.contains(id))
        .unwrap();
    world.kill(newcomer);
    // Nodes 5: two are dead, three alive.
    let waiting = world.reconcile();
    assert_eq!(waiting.steps, []);
    assert!(
        waiting
            .stuck
            .iter()
            .any(|stuck| stuck.reason == Reason::Waiting { node: newcomer })
    );
    world.pass(500_000);
    world.reconcile();
    let next = world.targets(RecordKey::Shard(0)).to_vec();
    assert!(!next.contains(&newcomer) && !next.contains(&targets[2]), "{next:?}");
    world.settle();
    assert_eq!(
        world.voters[&RecordKey::Shard(0)],
        next.into_iter().collect::<BTreeSet<u64>>()
    );
}

#[test]
fn a_node_without_room_is_given_nothing() {
    let mut world = World::of(4, &[""], 4, 3);
    world.settle();
    world.limit_bytes = 3 * REPLICA_BYTES;
    world.kill(4);
    world.pass(500_000);
    // Three replicas each: nobody has room for a fourth.
    let full = world.reconcile();
    assert!(
        full.steps.iter().all(|step| !step.key.starts_with(b"shard/")),
        "{full:#?}"
    );
    assert!(
        full.stuck
            .iter()
            .any(|stuck| stuck.reason == Reason::NoCandidate { of: Some(4) })
    );
    world.limit_bytes = 4 * REPLICA_BYTES;
    world.settle();
    assert!(world.cluster.shards().all(|shard| shard.targets == [1, 2, 3]));
}

#[test]
fn progress_says_what_is_on_its_way() {
    let mut world = World::of(3, &[""], 6, 3);
    world.settle();
    world.set_config(|config| config.moves_total = 1);
    world.join("", 1);
    world.set_state(1, NodeState::Leaving);
    let first = world.reconcile();
    assert_eq!((first.progress.settled, first.progress.waiting), (6, 5), "{first:#?}");
    let second = world.reconcile();
    assert_eq!(second.progress.settled, 5);
    let moving = &second.progress.moving[0];
    let about = second
        .progress
        .moving
        .iter()
        .map(|moving| moving.about)
        .collect::<Vec<_>>();
    assert!(about.contains(&RecordKey::Controller), "{about:?}");
    assert_eq!(moving.joining, [(4, Some(7))]);
    assert_eq!(moving.parting, [1]);
    assert_eq!(moving.cause, Cause::Leaving);
}

#[test]
fn homes_and_loads_are_noted_down_once() {
    let mut world = World::of(4, &[""], 8, 3);
    world.settle();
    assert!(
        world
            .cluster
            .shards()
            .all(|shard| shard.home.is_some_and(|home| shard.targets.contains(&home)))
    );
    world.loads.insert(3, 70_000);
    world.settle();
    assert_eq!(world.cluster.shard(3).unwrap().load, 3);
    let version = world.cluster.version();
    for rate in [60_000, 120_000, 40_000] {
        world.loads.insert(3, rate);
        world.settle();
    }
    assert_eq!(world.cluster.version(), version, "small changes are not worth a record");
}

#[test]
fn twice_the_cores_take_twice_as_much() {
    let nodes = [(1, 1), (2, 1), (3, 2)].map(|(id, cores)| node(id, "", cores));
    let mut world = World::new(&nodes, 16, 1);
    world.settle();
    assert_eq!(held(&world), [4, 4, 8]);
    world.join("", 4);
    world.settle();
    assert_eq!(held(&world), [2, 2, 4, 8]);
}
