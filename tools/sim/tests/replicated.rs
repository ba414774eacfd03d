//! Three nodes that replicate: what may be read where, what idle shards do, and what a group takes before it is complete.

mod common;

use std::time::Duration;

use common::*;
use generation_node::{Durability, Replication, Timing};
use generation_proto::{Consistency, Operation, RequestOptions, SlotTable, Status};
use generation_sim::{ClientIdentity, Kill, NodeSetup, Sim, Weather};

const SHARDS: u16 = 3;

fn setup() -> NodeSetup {
    NodeSetup {
        cores: 1,
        shards: SHARDS,
        nodes: 3,
        replication: Some(Replication {
            cluster: 1,
            durability: Durability::Sync,
            segment_bytes: 4_096 * 30,
            segments: 5,
            snapshot_bytes: 4_096 * 20,
            timing: Timing::default(),
        }),
        ..NodeSetup::default()
    }
}

/// So many of the three nodes, and a lane to the first.
fn nodes(seed: u64, count: usize) -> (Sim, Lane) {
    let mut sim = Sim::new(seed, Weather::default());
    for _ in 0..count {
        sim.node(&setup());
    }
    let client = sim.client(generation_quic::Limits::default());
    let lane = lane(&mut sim, client, 0);
    (sim, lane)
}

/// Repeats `ask` until it gives something: for what takes its time.
fn eventually<T>(sim: &mut Sim, mut ask: impl FnMut(&mut Sim) -> Option<T>) -> T {
    for _ in 0..2_000 {
        if let Some(found) = ask(sim) {
            return found;
        }
        sim.run_for(Duration::from_millis(10));
    }
    panic!("it never happens");
}

fn complete(seed: u64) -> (Sim, Lane) {
    let (mut sim, lane) = nodes(seed, 3);
    eventually(&mut sim, |sim| {
        let votes = (0..SHARDS).all(|shard| {
            let map = call(sim, lane, Operation::Map);
            let map = generation_proto::Map::decode(&map.body).unwrap();
            let shard = &map.shards[usize::from(shard)];
            shard.leader != 0 && shard.replicas.len() == 3
        });
        votes.then_some(())
    });
    (sim, lane)
}

/// A key of a shard.
fn key_of(shard: u16) -> Vec<u8> {
    let table = SlotTable::new(&generation_proto::Map::even_ranges(SHARDS), usize::from(SHARDS)).unwrap();
    let mut keys = (0..).map(|number| format!("key-{number}").into_bytes());
    keys.find(|key| table.shard_of(key) == shard).unwrap()
}

fn read(sim: &mut Sim, lane: Lane, key: &[u8], consistency: Consistency) -> generation_sim::Response {
    let options = RequestOptions {
        consistency,
        ..RequestOptions::default()
    };
    call_with(sim, lane, Operation::Get { key }, options)
}

#[test]
fn any_replica_reads_as_fresh_as_it_is_asked_to() {
    let (mut sim, lane) = complete(1);
    let shards: Vec<u16> = (0..SHARDS)
        .filter(|shard| stat(&mut sim, lane, &format!("shard.{shard}.leads")) == 0)
        .collect();
    assert_eq!(shards.len(), 2, "leaders are spread over the nodes");
    let shard = shards[0];
    let key = key_of(shard);
    for of in 0..SHARDS {
        let ahead = Consistency::Session {
            shard: of,
            epoch: 1,
            index: 1_000_000,
        };
        // A token of another shard asks nothing of this one.
        let expected = if of == shard {
            Status::TooStale
        } else {
            Status::NotFound
        };
        assert_eq!(status(&read(&mut sim, lane, &key, ahead)), expected);
    }
    let stale = Consistency::Stale { max_age_ms: 300 };
    for _ in 0..3 {
        let response = read(&mut sim, lane, &key, stale);
        assert_eq!(status(&response), Status::NotFound);
        assert!(response.age_ms.unwrap() <= 300, "{response:?}");
        assert_eq!(response.meta.consistency, stale.code());
        sim.run_for(Duration::from_millis(200));
    }
    let newest = read(&mut sim, lane, &key, Consistency::Linearizable);
    assert_eq!(status(&newest), Status::NotFound);
}

#[test]
fn idle_shards_keep_still_and_wake() {
    let (mut sim, lane) = complete(2);
    let still = |sim: &mut Sim| (0..SHARDS).all(|shard| stat(sim, lane, &format!("shard.{shard}.quiesced")) == 1);
    eventually(&mut sim, |sim| still(sim).then_some(()));
    sim.run_for(Duration::from_secs(10));
    assert!(still(&mut sim), "nobody has asked for anything");
    let own = (0..SHARDS).find(|shard| stat(&mut sim, lane, &format!("shard.{shard}.leads")) == 1);
    let key = key_of(own.unwrap());
    let begun = sim.now();
    put(&mut sim, lane, &key, b"value");
    assert!(sim.now() - begun < Duration::from_secs(1), "no election was needed");
    assert!(!still(&mut sim));
    // The dead node's shards find another leader, though all of them had been keeping still.
    eventually(&mut sim, |sim| still(sim).then_some(()));
    sim.kill(2, Kill::Process);
    let orphans = |sim: &mut Sim| {
        let map = call(sim, lane, Operation::Map);
        let map = generation_proto::Map::decode(&map.body).unwrap();
        map.shards.iter().filter(|shard| matches!(shard.leader, 0 | 3)).count()
    };
    assert_eq!(orphans(&mut sim), 1);
    eventually(&mut sim, |sim| (orphans(sim) == 0).then_some(()));
}

/// A lane of an administrator's to a node.
fn admin(sim: &mut Sim, node: usize) -> Lane {
    let named = ClientIdentity::Named("generation://sim/admin/ops");
    let client = sim.client_with(generation_quic::Limits::default(), named);
    let (now, addr) = (sim.now(), sim.addr(node));
    let key = sim.clients[client].connect(now, addr, 0);
    sim.until(|sim| sim.clients[client].is_connected(key).then_some(()));
    let stream = sim.clients[client].open(key).unwrap();
    let lane = Lane { client, key, stream };
    let hello = sim.clients[client].hello(key, stream);
    assert_eq!(status(&wait(sim, lane, hello)), Status::Ok);
    lane
}

#[test]
fn a_node_takes_snapshots_of_its_replicas_for_administrators() {
    let (mut sim, lane) = complete(4);
    let refused = call(&mut sim, lane, Operation::TakeSnapshot { shard: 0 });
    assert_eq!(status(&refused), Status::PermissionDenied);
    assert!(refused.message.unwrap().contains("administrator"));
    // Whoever leads, and whether the shard keeps still or not.
    for node in 0..3 {
        let admin = admin(&mut sim, node);
        for shard in 0..SHARDS {
            let before = stat(&mut sim, admin, &format!("shard.{shard}.index"));
            let taken = call(&mut sim, admin, Operation::TakeSnapshot { shard });
            assert_eq!(status(&taken), Status::Ok, "{taken:?}");
            assert_eq!(taken.meta.shard, shard);
            assert!(taken.meta.index >= before);
            let newest = stat(&mut sim, admin, &format!("shard.{shard}.snapshot_index"));
            assert!(newest >= taken.meta.index);
        }
        let none = call(&mut sim, admin, Operation::TakeSnapshot { shard: SHARDS });
        assert_eq!(status(&none), Status::InvalidArgument);
        // An administrator may do all that a client may.
        let read = read(&mut sim, admin, b"absent", Consistency::Stale { max_age_ms: 1_000 });
        assert_eq!(status(&read), Status::NotFound);
    }
}

#[test]
fn a_node_without_a_disk_says_that_it_has_no_snapshots() {
    let mut sim = Sim::new(5, Weather::default());
    sim.node(&NodeSetup {
        cores: 2,
        ..NodeSetup::default()
    });
    let admin = admin(&mut sim, 0);
    // One of each core's shards.
    for shard in 0..2 {
        let refused = call(&mut sim, admin, Operation::TakeSnapshot { shard });
        assert_eq!(status(&refused), Status::InvalidArgument);
        assert!(refused.message.unwrap().contains("no snapshots"));
    }
}

#[test]
fn a_group_takes_no_writes_before_a_majority_votes() {
    let (mut sim, lane) = nodes(3, 1);
    let answer = |sim: &mut Sim| {
        let (key, value) = (key_of(0), b"value");
        status(&call(sim, lane, Operation::Put { key: &key, value }))
    };
    for _ in 0..200 {
        assert!(matches!(answer(&mut sim), Status::Busy | Status::NoQuorum));
        sim.run_for(Duration::from_millis(50));
    }
}
