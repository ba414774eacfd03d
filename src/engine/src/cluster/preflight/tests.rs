use super::*;
use crate::cluster::placement::tests::node;
use crate::cluster::planner::tests::world::{REPLICA_BYTES, World};
use crate::cluster::records::{RecordKey, parse_key};

fn settled(count: u64, zones: &[&str], replication: u8) -> World {
    let mut world = World::of(count, zones, 8, replication);
    world.settle();
    world
}

/// Does what was allowed; the texts.
fn carry_out(world: &mut World, steps: Result<Vec<Step>, Refusal>) -> Vec<String> {
    let steps = steps.unwrap();
    for step in &steps {
        let key = parse_key(&step.key).unwrap();
        assert_eq!(step.expected_version, world.cluster.version_of(key));
        world.put(&Record::decode(key, &step.value).unwrap());
    }
    steps.into_iter().map(|step| step.text).collect()
}

fn state(world: &World, id: u64) -> NodeState {
    world.cluster.node(id).unwrap().state
}

/// What is asked of a world, and why it is refused.
fn refused(asked: Result<Vec<Step>, Refusal>) -> String {
    asked.unwrap_err().to_string()
}

#[test]
fn nothing_is_done_to_what_is_not_there() {
    let (empty, seen) = (Cluster::new(), Observed::default());
    assert_eq!(drain(&empty, &seen, 1), Err(Refusal::NotFounded));
    assert_eq!(set_config(&empty, "replication", "3"), Err(Refusal::NotFounded));
    let membership = Membership { name: "test", id: 1 };
    assert_eq!(
        join(&empty, &seen, membership, &node(1, "", 1)),
        Err(Refusal::NotFounded)
    );
    let mut world = settled(4, &[""], 3);
    let seen = world.observe();
    let known = vec![1, 2, 3, 4];
    let unknown = Err(Refusal::UnknownNode { node: 9, known });
    assert_eq!(drain(&world.cluster, &seen, 9), unknown);
    assert_eq!(resume(&world.cluster, 9), unknown);
    assert_eq!(decommission(&world.cluster, &seen, 9), unknown);
    assert_eq!(replace(&world.cluster, &seen, 9, 1), unknown);
    assert_eq!(replace(&world.cluster, &seen, 1, 9), unknown);
    world.set_state(4, NodeState::Gone);
    let gone = Err(Refusal::Gone { node: 4 });
    assert_eq!(drain(&world.cluster, &seen, 4), gone);
    assert_eq!(resume(&world.cluster, 4), gone);
    assert_eq!(decommission(&world.cluster, &seen, 4), gone);
}

#[test]
fn a_node_is_drained_and_resumed() {
    let mut world = settled(3, &[""], 3);
    let steps = drain(&world.cluster, &world.observe(), 2);
    assert_eq!(carry_out(&mut world, steps), ["node 2 leads nothing any more"]);
    assert_eq!(state(&world, 2), NodeState::Draining);
    assert_eq!(
        drain(&world.cluster, &world.observe(), 2),
        Ok(Vec::new()),
        "twice is once"
    );
    let steps = resume(&world.cluster, 2);
    assert_eq!(carry_out(&mut world, steps), ["node 2 takes part again"]);
    assert_eq!(state(&world, 2), NodeState::Up);
    assert_eq!(resume(&world.cluster, 2), Ok(Vec::new()));
}

#[test]
fn somebody_must_be_able_to_lead() {
    let mut world = settled(3, &[""], 3);
    let steps = drain(&world.cluster, &world.observe(), 1);
    carry_out(&mut world, steps);
    world.kill(3);
    assert_eq!(
        drain(&world.cluster, &world.observe(), 2),
        Err(Refusal::LastToLead { node: 2 })
    );
    world.revive(3);
    // Alive, but its clock is wrong.
    let mut seen = world.observe();
    seen.nodes.get_mut(&3).unwrap().clock_ok = false;
    assert_eq!(drain(&world.cluster, &seen, 2), Err(Refusal::LastToLead { node: 2 }));

    let alone = settled(2, &[""], 1);
    let Err(Refusal::OnlyLeader { node: 1, shards }) = drain(&alone.cluster, &alone.observe(), 1) else {
        panic!("nobody else could lead them");
    };
    assert_eq!(shards.len(), 4);

    world.set_state(2, NodeState::Leaving);
    assert_eq!(
        drain(&world.cluster, &world.observe(), 2),
        Err(Refusal::Leaving { node: 2 })
    );
}

#[test]
fn a_node_is_decommissioned_to_the_end() {
    let mut world = settled(4, &[""], 3);
    let steps = decommission(&world.cluster, &world.observe(), 2);
    assert_eq!(carry_out(&mut world, steps), ["node 2 is to leave"]);
    assert_eq!(
        decommission(&world.cluster, &world.observe(), 2),
        Ok(Vec::new()),
        "twice is once"
    );
    world.settle();
    assert_eq!(state(&world, 2), NodeState::Gone);
    world.check_settled();
}

#[test]
fn enough_nodes_must_stay() {
    let mut world = settled(4, &[""], 3);
    let steps = decommission(&world.cluster, &world.observe(), 2);
    carry_out(&mut world, steps);
    let below = Refusal::BelowReplication {
        nodes: 2,
        replication: 3,
    };
    assert_eq!(decommission(&world.cluster, &world.observe(), 3), Err(below.clone()));
    assert!(below.to_string().contains("lower the replication factor"), "{below}");
    // One that drains holds replicas still.
    let mut world = settled(4, &[""], 3);
    world.set_state(1, NodeState::Draining);
    assert!(decommission(&world.cluster, &world.observe(), 2).is_ok());
    let alone = settled(1, &[""], 1);
    assert!(decommission(&alone.cluster, &alone.observe(), 1).is_err());
}

#[test]
fn zones_must_stay_as_safe_as_they_are() {
    let mut world = settled(4, &["a", "b", "c"], 3);
    let zones = Refusal::Zones {
        node: 2,
        before: 1,
        after: 2,
    };
    assert_eq!(decommission(&world.cluster, &world.observe(), 2), Err(zones));
    assert!(
        decommission(&world.cluster, &world.observe(), 1).is_ok(),
        "zone a has another"
    );
    world.join("b", 1);
    world.settle();
    assert!(decommission(&world.cluster, &world.observe(), 2).is_ok());
    // Where the rule cannot hold anyway, nothing gets worse.
    let world = settled(5, &["a", "a", "b"], 3);
    assert!(decommission(&world.cluster, &world.observe(), 1).is_ok());
}

#[test]
fn others_must_have_room() {
    let mut world = settled(4, &[""], 3);
    world.limit_bytes = 7 * REPLICA_BYTES;
    let refusal = Refusal::NoRoom {
        node: 1,
        used: 6 * REPLICA_BYTES,
        free: 3 * REPLICA_BYTES,
    };
    assert_eq!(decommission(&world.cluster, &world.observe(), 1), Err(refusal));
    world.limit_bytes = 8 * REPLICA_BYTES;
    assert!(decommission(&world.cluster, &world.observe(), 1).is_ok());
}

#[test]
fn a_dead_node_is_replaced_by_a_new_one() {
    let mut world = settled(3, &[""], 3);
    world.kill(2);
    let new = world.join("", 1);
    let steps = replace(&world.cluster, &world.observe(), 2, new);
    carry_out(&mut world, steps);
    world.settle();
    assert_eq!(state(&world, 2), NodeState::Gone);
    assert!(world.cluster.shards().all(|shard| shard.targets == [1, 3, 4]));
    world.check_settled();
}

#[test]
fn only_a_dead_node_is_replaced_and_only_by_a_live_one() {
    let mut world = settled(4, &[""], 3);
    let ask = |world: &World, dead, new| replace(&world.cluster, &world.observe(), dead, new);
    assert_eq!(ask(&world, 1, 2), Err(Refusal::Alive { node: 1 }));
    assert_eq!(ask(&world, 1, 1), Err(Refusal::Itself { node: 1 }));
    world.kill(1);
    world.set_state(2, NodeState::Draining);
    world.kill(3);
    assert!(refused(ask(&world, 1, 2)).contains("node 2 is draining and answers"));
    assert!(refused(ask(&world, 1, 3)).contains("node 3 is up and does not answer"));
    assert!(ask(&world, 1, 4).is_ok());
}

const OWN: Membership<'static> = Membership { name: "test", id: 1 };

#[test]
fn a_node_joins_and_returns() {
    let mut world = settled(1, &[""], 3);
    let mut new = node(2, "a", 4);
    let ask = |world: &World, node: &Node| join(&world.cluster, &world.observe(), OWN, node);
    let steps = ask(&world, &new);
    assert_eq!(
        carry_out(&mut world, steps),
        ["node 2 joins, at 127.0.0.1:7002 with 4 cores"]
    );
    assert_eq!(ask(&world, &new), Ok(Vec::new()), "twice is once");
    // Elsewhere, with more cores, after a restart: it stays what it was to be.
    world.set_state(2, NodeState::Draining);
    new.generation += 1;
    new.cores = 8;
    new.addr.set_port(9000);
    let steps = ask(&world, &new);
    assert_eq!(
        carry_out(&mut world, steps),
        ["node 2 is back, at 127.0.0.1:9000 with 8 cores"]
    );
    assert_eq!(state(&world, 2), NodeState::Draining);
    assert_eq!(world.cluster.node(2).unwrap().cores, 8);
    // What a newcomer says of its own state does not matter.
    let mut gone = node(3, "", 1);
    gone.state = NodeState::Gone;
    let steps = ask(&world, &gone);
    carry_out(&mut world, steps);
    assert_eq!(state(&world, 3), NodeState::Up);
}

#[test]
fn whoever_is_not_who_it_says_is_kept_out() {
    let mut world = settled(3, &[""], 3);
    let ask = |world: &World, change: fn(&mut Node)| {
        let mut node = node(4, "", 1);
        change(&mut node);
        join(&world.cluster, &world.observe(), OWN, &node)
    };
    let foreign = |of| join(&world.cluster, &world.observe(), of, &node(4, "", 1));
    assert!(refused(foreign(Membership { name: "other", id: 1 })).contains("\"other\""));
    assert!(matches!(
        foreign(Membership { name: "test", id: 2 }),
        Err(Refusal::ForeignCluster { .. })
    ));
    assert!(ask(&world, |_| {}).is_ok());
    assert_eq!(ask(&world, |node| node.id = 0), Err(Refusal::NoId));
    // Another directory under a known id.
    let other = ask(&world, |node| node.id = 2);
    assert_eq!(
        other,
        Err(Refusal::OtherDirectory {
            node: 2,
            known: 2,
            found: 4
        })
    );
    // A known directory under another id.
    let taken = ask(&world, |node| node.directory = 2);
    assert_eq!(
        taken,
        Err(Refusal::DirectoryTaken {
            node: 4,
            directory: 2,
            owner: 2
        })
    );
    // An address that is in use, and one that was.
    let taken = |world: &World| ask(world, |node| node.addr.set_port(7002));
    assert!(matches!(taken(&world), Err(Refusal::AddressTaken { owner: 2, .. })));
    world.kill(2);
    assert!(taken(&world).is_ok());
    // A process that was started before the one that is known.
    let mut newer = world.cluster.node(1).unwrap().clone();
    newer.generation = 7;
    world.put(&Record::Node(newer));
    let older = join(&world.cluster, &world.observe(), OWN, &node(1, "", 1));
    assert_eq!(
        older,
        Err(Refusal::Outdated {
            node: 1,
            known: 7,
            found: 1
        })
    );
    // One that has left for good.
    world.set_state(3, NodeState::Gone);
    assert_eq!(
        join(&world.cluster, &world.observe(), OWN, &node(3, "", 1)),
        Err(Refusal::Gone { node: 3 })
    );
    // What cannot be written down.
    assert!(matches!(
        ask(&world, |node| node.zone = "z".repeat(300)),
        Err(Refusal::Record(_))
    ));
    assert!(matches!(ask(&world, |node| node.cores = 0), Err(Refusal::Record(_))));
}

#[test]
fn settings_are_changed_by_name() {
    let mut world = settled(3, &[""], 3);
    for (key, value, text) in [
        ("replication", "5", "replication is 5, after 3"),
        ("replace-after", "5m", "replace_after is 300000ms, after 120000ms"),
        ("moves_per_node", "4", "moves_per_node is 4, after 2"),
        ("MOVES_TOTAL", "64", "moves_total is 64, after 16"),
    ] {
        let steps = set_config(&world.cluster, key, value);
        assert_eq!(carry_out(&mut world, steps), [text]);
        assert_eq!(set_config(&world.cluster, key, value), Ok(Vec::new()), "twice is once");
    }
    assert_eq!(world.cluster.version_of(RecordKey::Config), world.cluster.version());
    for setting in SETTINGS {
        let value = setting.value(world.config());
        match set_config(&world.cluster, setting.name(), &value) {
            Ok(steps) => assert_eq!(steps, [], "{value} is what it is"),
            Err(refusal) => assert_eq!(refusal, Refusal::Fixed { key: setting.name() }),
        }
    }
}

#[test]
fn settings_are_refused_with_advice() {
    let mut world = settled(4, &[""], 3);
    let ask = |world: &World, key: &str, value: &str| refused(set_config(&world.cluster, key, value));
    for even in ["2", "4", "0", "7", "three", "-1", "256"] {
        assert!(ask(&world, "replication", even).contains("1, 3 or 5"));
    }
    assert!(ask(&world, "replace_after", "120").contains("like 500ms, 90s"));
    assert!(ask(&world, "moves_total", "0").contains("from 1"));
    assert!(ask(&world, "shards", "32").contains("fixed"));
    let refusal = ask(&world, "replicaton", "3");
    assert!(
        refusal.contains("did you mean replication?") && refusal.contains("moves_total"),
        "{refusal}"
    );
    assert!(!ask(&world, "colour", "red").contains("did you mean"));
    world.set_state(4, NodeState::Leaving);
    assert!(ask(&world, "replication", "5").contains("3 nodes would remain for 5 replicas"));
}

#[test]
fn what_stopping_nodes_would_cost_can_be_asked() {
    let mut world = settled(3, &[""], 3);
    let ask = |world: &World, stopped: &[u64]| {
        shards_without(&world.cluster, &world.observe(), &stopped.iter().copied().collect()).len()
    };
    assert_eq!(ask(&world, &[1]), 0);
    assert_eq!(ask(&world, &[1, 2]), 8);
    world.kill(3);
    assert_eq!(ask(&world, &[]), 0);
    assert_eq!(ask(&world, &[1]), 8);
}
