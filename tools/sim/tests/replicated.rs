//! Three nodes that replicate: what may be read where, what idle shards do, and what a group takes before it is complete.

mod common;

use std::time::Duration;

use common::*;
use generation_node::{Durability, Replication, Timing};
use generation_proto::{Consistency, Operation, RequestOptions, Session, ShardSession, SlotTable, Status};
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
            membership: generation_node::Membership::Fixed,
        }),
        ..NodeSetup::default()
    }
}

/// So many of the three nodes, and a lane to the first.
fn nodes(seed: u64, setup: &NodeSetup, count: usize) -> (Sim, Lane) {
    let mut sim = Sim::new(seed, Weather::default());
    for _ in 0..count {
        sim.node(setup);
    }
    let client = sim.client(generation_quic::Limits::default());
    let lane = lane(&mut sim, client, 0);
    (sim, lane)
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

fn complete(seed: u64) -> (Sim, Lane) {
    complete_with(seed, &setup())
}

fn complete_with(seed: u64, setup: &NodeSetup) -> (Sim, Lane) {
    let (mut sim, lane) = nodes(seed, setup, 3);
    wait_for_all(&mut sim, lane);
    (sim, lane)
}

/// Waits until every shard has a leader and all its replicas.
fn wait_for_all(sim: &mut Sim, lane: Lane) {
    eventually(sim, |sim| {
        let votes = (0..SHARDS).all(|shard| {
            let map = call(sim, lane, Operation::Map);
            let map = generation_proto::Map::decode(&map.body).unwrap();
            map.shards[usize::from(shard)].leader != 0 && stat(sim, lane, &format!("shard.{shard}.voters")) == 3
        });
        votes.then_some(())
    });
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
    lane_of(sim, client, node)
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

/// The node that leads a shard, as the node of `lane` knows.
fn leader(sim: &mut Sim, lane: Lane, shard: u16) -> Option<usize> {
    let map = call(sim, lane, Operation::Map);
    let map = generation_proto::Map::decode(&map.body).unwrap();
    (map.shards[usize::from(shard)].leader as usize).checked_sub(1)
}

/// Writes until it is acknowledged, asking one node after the other.
fn put_somewhere(sim: &mut Sim, lanes: &[Lane], key: &[u8], value: &[u8]) {
    let mut turn = 0;
    eventually(sim, |sim| {
        turn += 1;
        let answer = call(sim, lanes[turn % lanes.len()], Operation::Put { key, value });
        (status(&answer) == Status::Ok).then_some(())
    });
}

#[test]
fn a_leader_whose_snapshot_is_damaged_takes_another_and_sends_that() {
    let (mut sim, lane) = complete(6);
    let shard = (0..SHARDS)
        .find(|shard| leader(&mut sim, lane, *shard) == Some(0))
        .unwrap();
    let admin = admin(&mut sim, 0);
    let key = key_of(shard);
    sim.kill(2, Kill::Process);
    for round in 0..20 {
        put_somewhere(&mut sim, &[lane], &key, format!("value {round}").as_bytes());
    }
    // What the snapshot covers is in no log any more, so the one that was away needs the snapshot.
    let taken = call(&mut sim, admin, Operation::TakeSnapshot { shard });
    assert_eq!(status(&taken), Status::Ok);
    let image = sim.disk_image(0);
    let of_shard = format!("snapshots/{shard:05}-");
    let paths = image.paths();
    let path = paths.iter().find(|path| path.contains(&of_shard)).unwrap();
    let middle = image.read(path).unwrap().len() as u64 / 2;
    sim.flip(0, path, middle, 3);
    sim.start(2);
    let damaged = format!("shard.{shard}.damaged_snapshots");
    eventually(&mut sim, |sim| (stat(sim, lane, &damaged) == 1).then_some(()));
    let client = sim.client(generation_quic::Limits::default());
    let third = lane_of(&mut sim, client, 2);
    let index = format!("shard.{shard}.index");
    let newest = stat(&mut sim, lane, &index);
    eventually(&mut sim, |sim| {
        let counters = call(sim, third, Operation::Stats);
        let mut counters = generation_proto::reply::Stat::decode_all(&counters.body).map(Result::unwrap);
        let reached = counters.find(|counter| counter.name == index)?.value;
        (reached >= newest).then_some(())
    });
    assert_eq!(stat(&mut sim, lane, &damaged), 1, "the other one was sound");
    assert_eq!(leader(&mut sim, lane, shard), Some(0), "nothing else has happened");
}

#[test]
fn a_replica_that_has_ended_gives_its_shard_to_the_others_and_says_so() {
    let mut setup = setup();
    let replication = setup.replication.as_mut().unwrap();
    // More of the log than is kept in memory, and no snapshot of it.
    (replication.segment_bytes, replication.segments) = (1 << 20, 32);
    replication.snapshot_bytes = 1 << 30;
    let (mut sim, lane) = complete_with(7, &setup);
    let shard = (0..SHARDS)
        .find(|shard| leader(&mut sim, lane, *shard) == Some(0))
        .unwrap();
    let client = sim.client(generation_quic::Limits::default());
    let other = lane_of(&mut sim, client, 1);
    let key = key_of(shard);
    sim.kill(2, Kill::Process);
    let value = vec![7; 100_000];
    for _ in 0..60 {
        put_somewhere(&mut sim, &[lane], &key, &value);
    }
    for path in sim.disk_image(0).paths() {
        if path.contains("journal/segment") {
            for block in 0..256 {
                sim.flip(0, &path, block * 4_096 + 100, 1);
            }
        }
    }
    // What the third lacks has to be read from the disk.
    sim.start(2);
    let ended = format!("shard.{shard}.ended");
    eventually(&mut sim, |sim| (stat(sim, lane, &ended) == 1).then_some(()));
    assert_eq!(stat(&mut sim, lane, &format!("shard.{shard}.leads")), 0);
    assert_ne!(leader(&mut sim, lane, shard), Some(0));
    let refused = call(&mut sim, lane, Operation::Put { key: &key, value: b"x" });
    assert_eq!(status(&refused), Status::Moved, "{refused:?}");
    assert!(refused.message.unwrap().contains("has ended"));
    let read = read(&mut sim, lane, &key, Consistency::Linearizable);
    assert_eq!(status(&read), Status::Moved);
    // Those that are left elect one of theirs.
    eventually(&mut sim, |sim| leader(sim, other, shard).filter(|leader| *leader != 0));
    put_somewhere(&mut sim, &[other, lane], &key, b"after");
    // The other shards of the node are not concerned.
    for shard in (0..SHARDS).filter(|other| *other != shard) {
        assert_eq!(stat(&mut sim, lane, &format!("shard.{shard}.ended")), 0);
    }
}

/// A node's file may differ from the others': what the log says is in force everywhere.
#[test]
fn the_limits_of_the_node_that_leads_are_those_of_every_replica() {
    let mut sim = Sim::new(8, Weather::default());
    let mut strict = setup();
    strict.node_limits.session_idle = Duration::from_secs(3);
    strict.node_limits.session_window = 256;
    for setup in [&strict, &setup(), &setup()] {
        sim.node(setup);
    }
    let client = sim.client(generation_quic::Limits::default());
    let lane = lane(&mut sim, client, 0);
    wait_for_all(&mut sim, lane);
    let shard = (0..SHARDS)
        .find(|shard| leader(&mut sim, lane, *shard) == Some(0))
        .unwrap();
    let key = key_of(shard);
    let session = ShardSession { id: 77, shard };
    let count = |sim: &mut Sim, seq: u64, first_unacked: u64| {
        let session = Some(Session {
            id: session.id,
            seq,
            first_unacked,
        });
        let options = RequestOptions {
            session,
            ..RequestOptions::default()
        };
        let operation = Operation::Incr { key: &key, delta: 1 };
        status(&call_with(sim, lane, operation, options))
    };
    let opened = call(&mut sim, lane, Operation::OpenSession(session));
    assert_eq!(status(&opened), Status::Ok);
    assert_eq!(count(&mut sim, 1, 1), Status::Ok);
    assert_eq!(count(&mut sim, 257, 1), Status::Busy, "its reply would be one too many");
    assert_eq!(count(&mut sim, 256, 1), Status::Ok);
    sim.run_for(Duration::from_secs(6));
    assert_eq!(count(&mut sim, 257, 257), Status::SessionExpired);
    // Whoever believed in its own file has executed it.
    let others = [1, 2].map(|node| lane_of(&mut sim, client, node));
    let index = stat(&mut sim, lane, &format!("shard.{shard}.index"));
    for other in others {
        eventually(&mut sim, |sim| {
            (stat(sim, other, &format!("shard.{shard}.index")) == index).then_some(())
        });
        for half in ["high", "low"] {
            let name = format!("shard.{shard}.state_hash_{half}");
            assert_eq!(stat(&mut sim, other, &name), stat(&mut sim, lane, &name));
        }
    }
}

/// Which node leads each shard, with the term, once all are led.
fn leaders(sim: &mut Sim, lane: Lane) -> Option<Vec<(u64, u64)>> {
    let map = call(sim, lane, Operation::Map);
    let map = generation_proto::Map::decode(&map.body).unwrap();
    let led = map.shards.iter().map(|shard| (shard.leader, shard.term));
    let led: Vec<(u64, u64)> = led.collect();
    led.iter().all(|(leader, _)| *leader != 0).then_some(led)
}

/// Whether these nodes lead all shards among them, each as many as any other or one more.
fn are_even(led: &[(u64, u64)], nodes: &[u64]) -> bool {
    let count = |node: &u64| led.iter().filter(|(leader, _)| leader == node).count();
    let counts: Vec<usize> = nodes.iter().map(count).collect();
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    counts.iter().sum::<usize>() == led.len() && most - least <= 1
}

#[test]
fn leaders_are_even_after_every_change_and_stay_where_they_are() {
    let setup = NodeSetup { shards: 16, ..setup() };
    let (mut sim, lane) = complete_with(9, &setup);
    let table = SlotTable::new(&generation_proto::Map::even_ranges(16), 16).unwrap();
    let mut key = 0_u64;
    // Meanwhile somebody writes, to whatever shard: nothing of it is in doubt for leadership that is handed over.
    let settle = |sim: &mut Sim, nodes: &[u64], key: &mut u64| {
        eventually(sim, |sim| {
            for _ in 0..4 {
                *key += 1;
                let name = format!("key-{key}").into_bytes();
                let answer = call(
                    sim,
                    lane,
                    Operation::Put {
                        key: &name,
                        value: b"x",
                    },
                );
                let shard = table.shard_of(&name);
                assert_ne!(status(&answer), Status::InDoubt, "shard {shard}: {answer:?}");
            }
            leaders(sim, lane).filter(|led| are_even(led, nodes))
        })
    };
    settle(&mut sim, &[1, 2, 3], &mut key);
    for victim in [2, 1] {
        sim.kill(victim, Kill::Process);
        let rest: Vec<u64> = [1, 2, 3]
            .into_iter()
            .filter(|node| *node != victim as u64 + 1)
            .collect();
        // What the dead one was asked is nobody's fault.
        let even = |sim: &mut Sim| leaders(sim, lane).filter(|led| are_even(led, &rest));
        eventually(&mut sim, even);
        sim.start(victim);
        let led = settle(&mut sim, &[1, 2, 3], &mut key);
        for _ in 0..4 {
            // Less than a connection may be silent.
            sim.run_for(Duration::from_secs(10));
            assert_eq!(
                leaders(&mut sim, lane).as_ref(),
                Some(&led),
                "nothing goes back and forth"
            );
        }
    }
}

#[test]
fn a_node_that_stops_leaves_its_shards_led() {
    let setup = NodeSetup { shards: 16, ..setup() };
    let (mut sim, lane) = complete_with(11, &setup);
    eventually(&mut sim, |sim| {
        leaders(sim, lane).filter(|led| are_even(led, &[1, 2, 3]))
    });
    sim.run_for(Duration::from_secs(10));
    sim.stop(2);
    while !sim.has_stopped(2) {
        sim.run_for(Duration::from_millis(10));
    }
    // It has handed over what it led, and was given nothing back.
    let led = leaders(&mut sim, lane).expect("every shard is led");
    assert!(led.iter().all(|(leader, _)| *leader != 3), "{led:?}");
    eventually(&mut sim, |sim| leaders(sim, lane).filter(|led| are_even(led, &[1, 2])));
}

#[test]
fn a_node_with_a_wrong_clock_leads_nothing_until_it_is_right() {
    let setup = NodeSetup {
        nodes: 5,
        shards: 5,
        ..setup()
    };
    let mut sim = Sim::new(10, Weather::default());
    for _ in 0..5 {
        sim.node(&setup);
    }
    let client = sim.client(generation_quic::Limits::default());
    let first = lane(&mut sim, client, 0);
    eventually(&mut sim, |sim| {
        leaders(sim, first).filter(|led| are_even(led, &[1, 2, 3, 4, 5]))
    });
    let wrong = lane_of(&mut sim, client, 4);
    assert_eq!(stat(&mut sim, wrong, "node.clock_skew_ms"), 0);
    sim.step_clock(4, 5_000);
    let led = eventually(&mut sim, |sim| {
        leaders(sim, first).filter(|led| are_even(led, &[1, 2, 3, 4]))
    });
    let skew = stat(&mut sim, wrong, "node.clock_skew_ms");
    assert!((4_900..=5_100).contains(&skew), "{skew}");
    assert_eq!(stat(&mut sim, first, "node.clock_skew_ms"), 0, "the others' are right");
    // It is not elected either.
    let victim = led
        .iter()
        .map(|(leader, _)| *leader)
        .find(|leader| *leader != 1)
        .unwrap();
    sim.kill(victim as usize - 1, Kill::Process);
    for _ in 0..100 {
        sim.run_for(Duration::from_millis(200));
        assert!((0..5).all(|shard| stat(&mut sim, wrong, &format!("shard.{shard}.leads")) == 0));
    }
    let rest: Vec<u64> = (1..5).filter(|node| *node != victim).collect();
    eventually(&mut sim, |sim| leaders(sim, first).filter(|led| are_even(led, &rest)));
    sim.step_clock(4, -5_000);
    eventually(&mut sim, |sim| {
        leaders(sim, first).filter(|led| led.iter().any(|(leader, _)| *leader == 5))
    });
    assert!(stat(&mut sim, wrong, "node.clock_skew_ms") < 50);
}

#[test]
fn a_group_takes_no_writes_before_a_majority_votes() {
    let (mut sim, lane) = nodes(3, &setup(), 1);
    let answer = |sim: &mut Sim| {
        let (key, value) = (key_of(0), b"value");
        status(&call(sim, lane, Operation::Put { key: &key, value }))
    };
    for _ in 0..200 {
        assert!(matches!(answer(&mut sim), Status::Busy | Status::NoQuorum));
        sim.run_for(Duration::from_millis(50));
    }
}
