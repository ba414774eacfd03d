//! A cluster whose nodes come and go: founded by one, joined by others.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use common::*;
use generation_node::records::Cluster as Records;
use generation_node::{Durability, Membership, Replication, Timing};
use generation_proto::cluster::{Founding, NodeInfo, Progress, Verb};
use generation_proto::{Map, Operation, SlotTable, Status};
use generation_sim::{ClientIdentity, Kill, NodeSetup, Sim, Weather};

const SHARDS: u16 = 6;

fn setup(cores: u16) -> NodeSetup {
    NodeSetup {
        cores,
        shards: SHARDS,
        nodes: 8,
        replication: Some(Replication {
            cluster: 1,
            durability: Durability::Sync,
            segment_bytes: 4_096 * 30,
            segments: 5,
            snapshot_bytes: 4_096 * 20,
            timing: Timing::default(),
            membership: Membership::Managed { zone: String::new() },
        }),
        ..NodeSetup::default()
    }
}

/// A lane of an administrator's to a node.
fn admin(sim: &mut Sim, node: usize) -> Lane {
    let named = ClientIdentity::Named("generation://sim/admin/ops");
    let client = sim.client_with(generation_quic::Limits::default(), named);
    lane_of(sim, client, node)
}

fn ask(sim: &mut Sim, lane: Lane, verb: Verb, body: &[u8]) -> generation_sim::Response {
    call(sim, lane, Operation::Cluster { verb, body })
}

/// The same, of which nothing is expected but that it is done.
fn order(sim: &mut Sim, lane: Lane, verb: Verb, body: &[u8]) -> Vec<u8> {
    let response = ask(sim, lane, verb, body);
    assert_eq!(status(&response), Status::Ok, "{verb:?}: {:?}", response.message);
    response.body.to_vec()
}

fn describe(sim: &mut Sim, lane: Lane) -> NodeInfo {
    NodeInfo::decode(&order(sim, lane, Verb::Describe, &[])).unwrap()
}

fn found(sim: &mut Sim, lane: Lane, replication_factor: u8) {
    let mut body = BytesMut::new();
    Founding {
        replication_factor,
        replace_after_ms: 10_000,
    }
    .encode(&mut body);
    order(sim, lane, Verb::Found, &body);
}

/// Takes a node into the cluster that another belongs to, as the command line does.
fn join(sim: &mut Sim, member: Lane, newcomer: Lane) {
    let info = describe(sim, newcomer);
    let mut body = BytesMut::new();
    info.encode(&mut body);
    order(sim, member, Verb::Join, &body);
    // Whoever is asked may not have heard of it yet.
    eventually(sim, |sim| {
        let records = order(sim, member, Verb::Records, &[]);
        let adopted = ask(sim, newcomer, Verb::Adopt, &records);
        (status(&adopted) == Status::Ok).then_some(())
    });
}

fn map_of(sim: &mut Sim, lane: Lane) -> Map {
    Map::decode(&call(sim, lane, Operation::Map).body).unwrap()
}

/// Repeats `ask` until it gives something: for what takes its time.
fn eventually<T>(sim: &mut Sim, mut ask: impl FnMut(&mut Sim) -> Option<T>) -> T {
    for _ in 0..6_000 {
        if let Some(found) = ask(sim) {
            return found;
        }
        sim.run_for(Duration::from_millis(10));
    }
    panic!("it never happens");
}

/// Waits until every shard has its leader on one of `replicas` nodes that have a replica, as the node of `lane` sees it.
fn settled(sim: &mut Sim, lane: Lane, replicas: usize) -> Map {
    let mut last = None;
    for _ in 0..6_000 {
        let map = map_of(sim, lane);
        let whole = |shard: &generation_proto::map::Shard| {
            shard.leader != 0
                && shard.replicas.len() == replicas
                && shard.replicas.iter().any(|replica| replica.node == shard.leader)
        };
        if map.shards.iter().all(whole) {
            return map;
        }
        last = Some(map);
        sim.run_for(Duration::from_millis(10));
    }
    panic!("it never settles: {last:?}");
}

/// A cluster of so many nodes, settled, with a lane of an administrator's to each.
fn cluster(seed: u64, nodes: usize, replication_factor: u8) -> (Sim, Vec<Lane>) {
    let mut sim = Sim::new(seed, Weather::default());
    let nodes: Vec<usize> = (0..nodes).map(|_| sim.node(&setup(1))).collect();
    let lanes: Vec<Lane> = nodes.iter().map(|node| admin(&mut sim, *node)).collect();
    found(&mut sim, lanes[0], replication_factor);
    for lane in &lanes[1..] {
        join(&mut sim, lanes[0], *lane);
    }
    let replicas = usize::from(replication_factor).min(nodes.len());
    settled(&mut sim, lanes[0], replicas);
    (sim, lanes)
}

/// Replicas and leaderships by node, as a map shows them.
fn shares(map: &Map) -> BTreeMap<u64, (usize, usize)> {
    let mut shares: BTreeMap<u64, (usize, usize)> = map.nodes.iter().map(|node| (node.id, (0, 0))).collect();
    for shard in &map.shards {
        for replica in &shard.replicas {
            shares.entry(replica.node).or_default().0 += 1;
        }
        shares.entry(shard.leader).or_default().1 += 1;
    }
    shares
}

/// Waits until the map of a node is as it should be.
fn until(sim: &mut Sim, lane: Lane, is: impl Fn(&Map) -> bool) -> Map {
    let mut last = None;
    for _ in 0..12_000 {
        let map = map_of(sim, lane);
        if is(&map) {
            return map;
        }
        last = Some(shares(&map));
        sim.run_for(Duration::from_millis(10));
    }
    let progress = order(sim, lane, Verb::Progress, &[]);
    panic!("it never is: {last:?}, {:?}", Progress::decode(&progress));
}

fn node_body(node: u64) -> [u8; 8] {
    node.to_le_bytes()
}

/// Writes a key to whichever node leads its shard.
fn write(sim: &mut Sim, lanes: &[Lane], at: usize, key: &[u8], value: &[u8]) {
    eventually(sim, |sim| {
        let map = map_of(sim, lanes[at]);
        let table = SlotTable::new(&map.ranges, map.shards.len()).unwrap();
        let leader = map.shards[usize::from(table.shard_of(key))].leader;
        let lane = *lanes.get(usize::try_from(leader).ok()?.checked_sub(1)?)?;
        let response = call(sim, lane, Operation::Put { key, value });
        (status(&response) == Status::Ok).then_some(())
    });
}

fn read(sim: &mut Sim, lanes: &[Lane], at: usize, key: &[u8]) -> Option<Vec<u8>> {
    eventually(sim, |sim| {
        let map = map_of(sim, lanes[at]);
        let table = SlotTable::new(&map.ranges, map.shards.len()).unwrap();
        let leader = map.shards[usize::from(table.shard_of(key))].leader;
        let lane = *lanes.get(usize::try_from(leader).ok()?.checked_sub(1)?)?;
        let response = call(sim, lane, Operation::Get { key });
        match status(&response) {
            Status::Ok => Some(Some(response.body.to_vec())),
            Status::NotFound => Some(None),
            _ => None,
        }
    })
}

fn write_all(sim: &mut Sim, lanes: &[Lane], at: usize) {
    for number in 0..24 {
        write(
            sim,
            lanes,
            at,
            format!("key-{number}").as_bytes(),
            format!("value-{number}").as_bytes(),
        );
    }
}

fn assert_all(sim: &mut Sim, lanes: &[Lane], at: usize) {
    for number in 0..24 {
        let value = read(sim, lanes, at, format!("key-{number}").as_bytes());
        assert_eq!(value, Some(format!("value-{number}").into_bytes()), "key-{number}");
    }
}

#[test]
fn replicas_and_leaders_spread_over_nodes_that_join() {
    let (mut sim, mut lanes) = cluster(5, 3, 3);
    write_all(&mut sim, &lanes, 0);
    let node = sim.node(&setup(1));
    lanes.push(admin(&mut sim, node));
    join(&mut sim, lanes[1], lanes[3]);
    // Six shards of three replicas on four nodes.
    let map = until(&mut sim, lanes[0], |map| {
        let shares = shares(map);
        let held: Vec<usize> = shares.values().map(|(held, _)| *held).collect();
        let led: Vec<usize> = shares.values().map(|(_, led)| *led).collect();
        let spread = |counts: &[usize]| counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1;
        held.len() == 4 && held.iter().sum::<usize>() == 18 && spread(&held) && spread(&led)
    });
    assert!(map.shards.iter().all(|shard| shard.replicas.len() == 3));
    assert_all(&mut sim, &lanes, 3);
    // What has left has left the disks too.
    for (node, lane) in (1..).zip(&lanes) {
        let held = (0..SHARDS).filter(|shard| count(&mut sim, *lane, &format!("shard.{shard}.replica")) > 0);
        let held = held.count();
        assert_eq!(held, shares(&map)[&node].0, "node {node}");
    }
}

/// How many counters of a name there are.
fn count(sim: &mut Sim, lane: Lane, name: &str) -> usize {
    let response = call(sim, lane, Operation::Stats);
    let stats = generation_proto::reply::Stat::decode_all(&response.body).map(Result::unwrap);
    stats.filter(|stat| stat.name == name).count()
}

#[test]
fn a_drained_node_leads_nothing_until_it_is_resumed() {
    let (mut sim, lanes) = cluster(6, 3, 3);
    until(&mut sim, lanes[0], |map| shares(map).values().all(|(_, led)| *led == 2));
    order(&mut sim, lanes[2], Verb::Drain, &node_body(2));
    until(&mut sim, lanes[0], |map| {
        let shares = shares(map);
        shares[&2] == (6, 0) && shares[&1].1 == 3 && shares[&3].1 == 3
    });
    order(&mut sim, lanes[2], Verb::Drain, &node_body(1));
    let refused = ask(&mut sim, lanes[2], Verb::Drain, &node_body(3));
    assert_eq!(status(&refused), Status::InvalidArgument, "nobody would lead");
    for node in [1, 2] {
        order(&mut sim, lanes[2], Verb::Resume, &node_body(node));
    }
    until(&mut sim, lanes[0], |map| shares(map).values().all(|(_, led)| *led == 2));
}

#[test]
fn a_decommissioned_node_leaves_once_everything_is_elsewhere() {
    let (mut sim, lanes) = cluster(7, 4, 3);
    write_all(&mut sim, &lanes, 0);
    order(&mut sim, lanes[0], Verb::Decommission, &node_body(2));
    let left = |map: &Map| {
        map.nodes.len() == 3
            && map
                .shards
                .iter()
                .all(|shard| shard.leader != 0 && shard.replicas.len() == 3)
    };
    until(&mut sim, lanes[0], left);
    sim.kill(1, Kill::Process);
    assert_all(&mut sim, &lanes, 0);
    let refused = ask(&mut sim, lanes[0], Verb::Decommission, &node_body(3));
    assert_eq!(
        status(&refused),
        Status::InvalidArgument,
        "three replicas need three nodes"
    );
}

#[test]
fn a_dead_nodes_replicas_are_made_elsewhere_and_it_finds_its_place_taken() {
    let (mut sim, lanes) = cluster(8, 4, 3);
    write_all(&mut sim, &lanes, 0);
    sim.kill(3, Kill::Process);
    let without = |map: &Map| {
        let on_three = |shard: &generation_proto::map::Shard| {
            shard.replicas.len() == 3 && shard.replicas.iter().all(|replica| replica.node != 4)
        };
        map.shards.iter().all(|shard| shard.leader != 0 && on_three(shard))
    };
    until(&mut sim, lanes[0], without);
    assert_all(&mut sim, &lanes, 0);
    // It comes back with all it had, and gets what is its share by then.
    sim.start(3);
    let lane = admin(&mut sim, 3);
    let map = until(&mut sim, lanes[0], |map| {
        shares(map)[&4].0 >= 4 && shares(map).values().map(|(held, _)| held).sum::<usize>() == 18
    });
    assert!(map.shards.iter().all(|shard| shard.replicas.len() == 3));
    let lanes = vec![lanes[0], lanes[1], lanes[2], lane];
    assert_all(&mut sim, &lanes, 0);
}

#[test]
fn the_controller_outlives_its_leader() {
    let (mut sim, lanes) = cluster(9, 3, 3);
    eventually(&mut sim, |sim| {
        let records = order(sim, lanes[0], Verb::Records, &[]);
        let records = Records::decode(&records).unwrap();
        (records.controller()?.targets.len() == 3).then_some(())
    });
    sim.run_for(Duration::from_secs(3));
    sim.kill(0, Kill::Process);
    eventually(&mut sim, |sim| {
        let response = ask(sim, lanes[1], Verb::Drain, &node_body(2));
        (status(&response) == Status::Ok).then_some(())
    });
    let progress = order(&mut sim, lanes[2], Verb::Progress, &[]);
    assert!([2, 3].contains(&Progress::decode(&progress).unwrap().leader));
}

#[test]
fn nodes_that_do_not_belong_are_told_why() {
    let (mut sim, lanes) = cluster(10, 3, 3);
    let info = NodeInfo {
        records: 0,
        ..describe(&mut sim, lanes[2])
    };
    let mut refused = |info: &NodeInfo, part: &str| {
        let mut body = BytesMut::new();
        info.encode(&mut body);
        let response = ask(&mut sim, lanes[0], Verb::Join, &body);
        assert_eq!(status(&response), Status::InvalidArgument, "{info:?}");
        let message = response.message.unwrap();
        assert!(message.contains(part), "{message}");
    };
    refused(
        &NodeInfo {
            cluster: "other".into(),
            ..info.clone()
        },
        "other",
    );
    refused(
        &NodeInfo {
            cluster_id: 77,
            ..info.clone()
        },
        "cluster",
    );
    refused(
        &NodeInfo {
            directory: 77,
            ..info.clone()
        },
        "directory",
    );
    refused(
        &NodeInfo {
            node: 9,
            ..info.clone()
        },
        "directory",
    );
    refused(
        &NodeInfo {
            node: 9,
            directory: 88,
            ..info.clone()
        },
        "address",
    );
    refused(
        &NodeInfo {
            shards: 3,
            node: 9,
            ..info.clone()
        },
        "shards = 6",
    );
    refused(
        &NodeInfo {
            is_managed: false,
            node: 9,
            ..info.clone()
        },
        "cluster.id",
    );
    let again = ask(&mut sim, lanes[1], Verb::Found, &[0; 16]);
    assert_eq!(status(&again), Status::InvalidArgument);
    // Saying the same again changes nothing.
    let mut body = BytesMut::new();
    info.encode(&mut body);
    let before = describe(&mut sim, lanes[0]).records;
    order(&mut sim, lanes[0], Verb::Join, &body);
    assert_eq!(describe(&mut sim, lanes[0]).records, before);
}

#[test]
fn two_clusters_founded_apart_are_never_one() {
    let mut sim = Sim::new(12, Weather::default());
    let nodes: Vec<usize> = (0..2).map(|_| sim.node(&setup(1))).collect();
    let lanes: Vec<Lane> = nodes.iter().map(|node| admin(&mut sim, *node)).collect();
    for lane in &lanes {
        found(&mut sim, *lane, 3);
    }
    let mut body = BytesMut::new();
    describe(&mut sim, lanes[1]).encode(&mut body);
    let refused = ask(&mut sim, lanes[0], Verb::Join, &body);
    assert_eq!(status(&refused), Status::InvalidArgument);
    assert!(refused.message.unwrap().contains("founded apart"));
    let records = order(&mut sim, lanes[0], Verb::Records, &[]);
    let refused = ask(&mut sim, lanes[1], Verb::Adopt, &records);
    assert_eq!(status(&refused), Status::InvalidArgument, "{:?}", refused.message);
    settled(&mut sim, lanes[1], 1);
}

#[test]
fn a_node_without_a_cluster_says_so_and_forms_none_by_itself() {
    let mut sim = Sim::new(11, Weather::default());
    for _ in 0..3 {
        sim.node(&setup(1));
    }
    let lane = admin(&mut sim, 0);
    sim.run_for(Duration::from_secs(20));
    assert!(map_of(&mut sim, lane).shards.iter().all(|shard| shard.leader == 0));
    let refused = ask(&mut sim, lane, Verb::Drain, &node_body(1));
    assert_eq!(status(&refused), Status::InvalidArgument);
    assert!(refused.message.unwrap().contains("cluster init"));
    let client = sim.client(generation_quic::Limits::default());
    let plain = lane_of(&mut sim, client, 0);
    assert_eq!(
        status(&ask(&mut sim, plain, Verb::Describe, &[])),
        Status::PermissionDenied
    );
}

#[test]
fn a_cluster_grows_from_one_node_to_three_and_keeps_what_it_has() {
    for cores in [1, 2] {
        let mut sim = Sim::new(3, Weather::default());
        let nodes: Vec<usize> = (0..3).map(|_| sim.node(&setup(cores))).collect();
        let lanes: Vec<Lane> = nodes.iter().map(|node| admin(&mut sim, *node)).collect();
        assert_eq!(describe(&mut sim, lanes[0]).records, 0);
        found(&mut sim, lanes[0], 3);
        settled(&mut sim, lanes[0], 1);
        put(&mut sim, lanes[0], b"key", b"value");
        join(&mut sim, lanes[0], lanes[1]);
        join(&mut sim, lanes[0], lanes[2]);
        let map = settled(&mut sim, lanes[0], 3);
        assert_eq!(map.nodes.len(), 3);
        let table = SlotTable::new(&map.ranges, map.shards.len()).unwrap();
        let leader = map.shards[usize::from(table.shard_of(b"key"))].leader;
        let lane = lanes[leader as usize - 1];
        assert_eq!(get(&mut sim, lane, b"key").as_deref(), Some(&b"value"[..]));
        // The one that founded it may go.
        eventually(&mut sim, |sim| {
            (0..SHARDS)
                .all(|shard| stat(sim, lanes[1], &format!("shard.{shard}.voters")) == 3)
                .then_some(())
        });
        sim.kill(0, Kill::Process);
        let map = eventually(&mut sim, |sim| {
            let map = map_of(sim, lanes[1]);
            map.shards
                .iter()
                .all(|shard| ![0, 1].contains(&shard.leader))
                .then_some(map)
        });
        let leader = map.shards[usize::from(table.shard_of(b"key"))].leader;
        let lane = lanes[leader as usize - 1];
        assert_eq!(get(&mut sim, lane, b"key").as_deref(), Some(&b"value"[..]));
    }
}
