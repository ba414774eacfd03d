//! The real node, without glommio: every operation over one and several cores, and the same run from the same seed.

mod common;

use std::time::Duration;

use common::*;
use generation_engine::ShardConfig;
use generation_node::NodeLimits;
use generation_proto::reply::{MultiResult, Page};
use generation_proto::request::{Hello, Scan};
use generation_proto::{Condition, Consistency, Map, Operation, RequestOptions, SlotTable, Status};
use generation_sim::{NodeSetup, Sim, Weather};

/// Keys on different shards, so that some are on another core than the connection.
fn keys(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| format!("key-{i}").into_bytes()).collect()
}

fn count(statuses: &[u8], status: Status) -> usize {
    statuses
        .iter()
        .filter(|&&code| Status::from_code(code) == Some(status))
        .count()
}

#[test]
fn every_core_serves_every_shard() {
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            cores: 3,
            shards: 8,
            ..NodeSetup::default()
        },
    );
    for (i, key) in keys(50).iter().enumerate() {
        let response = put(&mut sim, lane, key, format!("value {i}").as_bytes());
        assert_eq!(response.meta.version >> 16, response.meta.index);
        assert!(response.meta.version > 0);
    }
    let other = lane_to(&mut sim, lane.client, 2);
    for (i, key) in keys(50).iter().enumerate() {
        assert_eq!(get(&mut sim, other, key).unwrap(), format!("value {i}").as_bytes());
    }
    assert_eq!(get(&mut sim, other, b"absent"), None);
    assert!(stat(&mut sim, lane, "node.requests_forwarded") > 0);
    assert_eq!(stat(&mut sim, lane, "node.cores"), 3);
    assert_eq!(stat(&mut sim, lane, "node.shards"), 8);
    let records: u64 = (0..8)
        .map(|shard| stat(&mut sim, lane, &format!("shard.{shard}.records")))
        .sum();
    assert_eq!(records, 50);
}

fn lane_to(sim: &mut Sim, client: usize, core: u8) -> Lane {
    common::lane(sim, client, core)
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = |seed| {
        let weather = Weather {
            loss_per_mille: 20,
            jitter: Duration::from_millis(1),
            steering: false,
            ..Weather::default()
        };
        let mut sim = Sim::new(seed, weather);
        sim.node(&NodeSetup {
            cores: 2,
            ..NodeSetup::default()
        });
        let client = sim.client(generation_quic::Limits::default());
        let lanes = [lane_to(&mut sim, client, 0), lane_to(&mut sim, client, 1)];
        let mut ids = Vec::new();
        for (i, key) in keys(200).iter().enumerate() {
            let value = vec![i as u8; 10 * i];
            ids.push((
                lanes[i % 2],
                send(
                    &mut sim,
                    lanes[i % 2],
                    Operation::Put { key, value: &value },
                    RequestOptions::default(),
                ),
            ));
        }
        for (lane, id) in ids {
            assert_eq!(status(&wait(&mut sim, lane, id)), Status::Ok);
        }
        for (i, key) in keys(200).iter().enumerate() {
            assert_eq!(get(&mut sim, lanes[(i + 1) % 2], key).unwrap(), vec![i as u8; 10 * i]);
        }
        (sim.trace(), sim.sent(), sim.elapsed())
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn hello_tells_who_and_what_and_refuses_another_major() {
    let mut sim = Sim::new(1, Weather::default());
    sim.node(&NodeSetup::default());
    let client = sim.client(generation_quic::Limits::default());
    let lane = silent_lane(&mut sim, client, 1);
    let response = call(&mut sim, lane, Operation::Get { key: b"k" });
    assert_eq!(status(&response), Status::HelloRequired);
    // A higher minor version and a longer hello are fine.
    let response = call(
        &mut sim,
        lane,
        Operation::Hello(Hello {
            major: 1,
            minor: 77,
            name: "of the future",
        }),
    );
    assert_eq!(status(&response), Status::Ok);
    let hello = generation_proto::reply::HelloReply::decode(&response.body).unwrap();
    assert_eq!((hello.node, hello.core, hello.cores, hello.cluster), (1, 1, 2, "sim"));
    assert_eq!(
        status(&call(&mut sim, lane, Operation::Get { key: b"k" })),
        Status::NotFound
    );
    // Another major is told so, and the connection is closed.
    let lane = silent_lane(&mut sim, client, 0);
    let response = call(
        &mut sim,
        lane,
        Operation::Hello(Hello {
            major: 2,
            minor: 0,
            name: "other",
        }),
    );
    assert_eq!(status(&response), Status::UnsupportedVersion);
    assert!(response.message.unwrap().contains("2.0"));
    assert_eq!(
        close_code(&mut sim, client, lane.key),
        u64::from(generation_node::close_code::VERSION)
    );
}

#[test]
fn ping_and_map_are_answered() {
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            cores: 2,
            shards: 4,
            ..NodeSetup::default()
        },
    );
    let response = call(
        &mut sim,
        lane,
        Operation::Ping {
            payload: b"are you there",
        },
    );
    assert_eq!(&response.body[..], b"are you there");
    let response = call(&mut sim, lane, Operation::Map);
    let map = Map::decode(&response.body).unwrap();
    assert_eq!((map.shards.len(), map.nodes.len(), map.nodes[0].cores), (4, 1, 2));
    let table = SlotTable::new(&map.ranges, map.shards.len()).unwrap();
    let shard = table.shard_of(b"some key");
    let response = put(&mut sim, lane, b"some key", b"v");
    assert_eq!((response.meta.shard, response.meta.map_epoch), (shard, map.epoch));
}

#[test]
fn conditions_counters_and_deletes_answer_as_promised() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    let put_if = |sim: &mut Sim, condition, value: &[u8]| {
        let options = RequestOptions {
            condition,
            ..RequestOptions::default()
        };
        call_with(sim, lane, Operation::Put { key: b"k", value }, options)
    };
    let first = put_if(&mut sim, Condition::IfAbsent, b"1");
    assert_eq!(status(&first), Status::Ok);
    let again = put_if(&mut sim, Condition::IfAbsent, b"2");
    assert_eq!(
        (status(&again), again.meta.version),
        (Status::ConditionFailed, first.meta.version)
    );
    let swapped = put_if(&mut sim, Condition::IfVersion(first.meta.version), b"3");
    assert_eq!(status(&swapped), Status::Ok);
    assert!(swapped.meta.version > first.meta.version);
    let overdue = put_if(&mut sim, Condition::IfVersion(first.meta.version), b"4");
    assert_eq!(
        (status(&overdue), overdue.meta.version),
        (Status::ConditionFailed, swapped.meta.version)
    );
    assert_eq!(get(&mut sim, lane, b"k").unwrap(), b"3");
    let incr = |sim: &mut Sim, key: &[u8], delta| call(sim, lane, Operation::Incr { key, delta });
    assert_eq!(&incr(&mut sim, b"n", 5).body[..], 5_i64.to_le_bytes());
    assert_eq!(&incr(&mut sim, b"n", -7).body[..], (-2_i64).to_le_bytes());
    assert_eq!(status(&incr(&mut sim, b"n", i64::MIN)), Status::Overflow);
    put(&mut sim, lane, b"text", b"not a number");
    assert_eq!(status(&incr(&mut sim, b"text", 1)), Status::NotANumber);
    assert_eq!(
        status(&call(&mut sim, lane, Operation::Delete { key: b"k" })),
        Status::Ok
    );
    assert_eq!(
        status(&call(&mut sim, lane, Operation::Delete { key: b"k" })),
        Status::NotFound
    );
    assert_eq!(
        status(&call(&mut sim, lane, Operation::Touch { key: b"k" })),
        Status::NotFound
    );
}

#[test]
fn requests_with_several_keys_answer_in_order_across_cores() {
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            cores: 3,
            shards: 8,
            ..NodeSetup::default()
        },
    );
    let keys = keys(40);
    let items: Vec<(&[u8], &[u8])> = keys.iter().map(|key| (&key[..], &key[..])).collect();
    let response = multi_put(&mut sim, lane, &items);
    assert!(MultiResult::decode_all(&response.body).all(|result| result.unwrap().status == Status::Ok.code()));
    let mut asked: Vec<&[u8]> = keys.iter().map(|key| &key[..]).collect();
    asked.insert(7, b"absent");
    let response = multi_get(&mut sim, lane, &asked);
    let results: Vec<_> = MultiResult::decode_all(&response.body).map(Result::unwrap).collect();
    assert_eq!(results.len(), 41);
    for (key, result) in asked.iter().zip(&results) {
        if *key == b"absent" {
            assert_eq!((result.status, result.version), (Status::NotFound.code(), 0));
        } else {
            assert_eq!((result.status, result.value), (Status::Ok.code(), *key));
        }
    }
    let mut buffer = bytes::BytesMut::new();
    let list = generation_proto::request::KeyList::build(asked.iter().copied(), &mut buffer);
    let response = call(&mut sim, lane, Operation::MultiDelete(list));
    let statuses: Vec<_> = MultiResult::decode_all(&response.body)
        .map(|result| result.unwrap().status)
        .collect();
    assert_eq!(count(&statuses, Status::Ok), 40);
    assert_eq!(statuses[7], Status::NotFound.code());
}

#[test]
fn pages_visit_everything_once() {
    let setup = NodeSetup {
        cores: 2,
        shards: 4,
        ..NodeSetup::default()
    };
    let (mut sim, lane) = one_node(1, &setup);
    let keys = keys(100);
    let items: Vec<(&[u8], &[u8])> = keys.iter().map(|key| (&key[..], &b"value"[..])).collect();
    multi_put(&mut sim, lane, &items);
    for values in [false, true] {
        let mut found = Vec::new();
        for shard in 0..4 {
            let mut cursor = 0;
            loop {
                let scan = Scan {
                    shard,
                    limit: 7,
                    cursor,
                    prefix: b"key-",
                };
                let operation = if values {
                    Operation::Entries(scan)
                } else {
                    Operation::Keys(scan)
                };
                let response = call(&mut sim, lane, operation);
                let (page, entries) = Page::decode(&response.body).unwrap();
                for entry in entries.map(Result::unwrap) {
                    assert_eq!(entry.value, if values { &b"value"[..] } else { b"" });
                    found.push(entry.key.to_vec());
                }
                if page.done {
                    break;
                }
                cursor = page.next;
            }
        }
        found.sort();
        let mut expected = keys.clone();
        expected.sort();
        assert_eq!(found, expected);
    }
    let scan = Scan {
        shard: 0,
        limit: 10,
        cursor: 0,
        prefix: b"other",
    };
    let response = call(&mut sim, lane, Operation::Keys(scan));
    assert_eq!(Page::decode(&response.body).unwrap().0.count, 0);
    let scan = Scan {
        shard: 99,
        limit: 10,
        cursor: 0,
        prefix: b"",
    };
    assert_eq!(
        status(&call(&mut sim, lane, Operation::Keys(scan))),
        Status::InvalidArgument
    );
}

#[test]
fn nothing_is_served_past_its_time() {
    let setup = NodeSetup {
        node_limits: NodeLimits {
            sweep_interval: Duration::from_hours(1),
            ..NodeLimits::default()
        },
        ..NodeSetup::default()
    };
    let (mut sim, lane) = one_node(1, &setup);
    let ttl = |ttl_ms| RequestOptions {
        ttl_ms: Some(ttl_ms),
        ..RequestOptions::default()
    };
    call_with(&mut sim, lane, Operation::Put { key: b"k", value: b"v" }, ttl(1_000));
    call_with(
        &mut sim,
        lane,
        Operation::Put {
            key: b"longer",
            value: b"v",
        },
        ttl(1_000),
    );
    call_with(&mut sim, lane, Operation::Touch { key: b"longer" }, ttl(100_000));
    let response = call(&mut sim, lane, Operation::Get { key: b"k" });
    assert!(response.expires_at_ms.unwrap() > response.meta.server_time_ms);
    sim.skip_clock(Duration::from_secs(1));
    let response = call(&mut sim, lane, Operation::Get { key: b"k" });
    assert_eq!(status(&response), Status::NotFound);
    // The expiry is in the log, not only in the answer.
    assert_eq!(
        stat(&mut sim, lane, &format!("shard.{}.expirations", response.meta.shard)),
        1
    );
    assert_eq!(get(&mut sim, lane, b"longer").unwrap(), b"v");
    // Four reads or more of one shard are looked up together; the answer is the same.
    call_with(
        &mut sim,
        lane,
        Operation::Put {
            key: b"{t}k",
            value: b"v",
        },
        ttl(1_000),
    );
    sim.skip_clock(Duration::from_secs(1));
    let keys: [&[u8]; 6] = [b"{t}k", b"{t}a", b"{t}b", b"{t}c", b"{t}d", b"{t}k"];
    let response = multi_get(&mut sim, lane, &keys);
    assert!(MultiResult::decode_all(&response.body).all(|result| result.unwrap().status == Status::NotFound.code()));
}

#[test]
fn the_sweep_finds_what_nobody_asks_for() {
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            shards: 1,
            ..NodeSetup::default()
        },
    );
    for key in keys(50) {
        let options = RequestOptions {
            ttl_ms: Some(2_000),
            ..RequestOptions::default()
        };
        call_with(&mut sim, lane, Operation::Put { key: &key, value: b"v" }, options);
    }
    assert_eq!(stat(&mut sim, lane, "shard.0.records"), 50);
    sim.run_for(Duration::from_secs(5));
    assert_eq!(stat(&mut sim, lane, "shard.0.records"), 0);
    assert_eq!(stat(&mut sim, lane, "shard.0.expirations"), 50);
}

#[test]
fn the_least_recently_used_goes_first() {
    let shard = ShardConfig {
        max_records: Some(10),
        ..ShardConfig::default()
    };
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            cores: 1,
            shards: 1,
            shard,
            ..NodeSetup::default()
        },
    );
    let keys = keys(11);
    for key in &keys[..10] {
        put(&mut sim, lane, key, b"v");
    }
    get(&mut sim, lane, &keys[0]);
    put(&mut sim, lane, &keys[5], b"again");
    assert_eq!(stat(&mut sim, lane, "shard.0.evictions"), 0);
    put(&mut sim, lane, &keys[10], b"v");
    assert_eq!(stat(&mut sim, lane, "shard.0.records"), 10);
    assert_eq!(get(&mut sim, lane, &keys[1]), None);
    assert!(get(&mut sim, lane, &keys[0]).is_some());
}

#[test]
fn consistency_and_deadlines_are_honoured() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    let written = put(&mut sim, lane, b"k", b"v");
    let get_with = |sim: &mut Sim, options| call_with(sim, lane, Operation::Get { key: b"k" }, options);
    let consistency = |consistency| RequestOptions {
        consistency,
        ..RequestOptions::default()
    };
    let token = Consistency::Session {
        shard: written.meta.shard,
        epoch: 1,
        index: written.meta.index,
    };
    let response = get_with(&mut sim, consistency(token));
    // One node: everything is linearizable, and the reply says so.
    assert_eq!(
        (status(&response), response.meta.consistency),
        (Status::Ok, Consistency::Linearizable.code())
    );
    let ahead = Consistency::Session {
        shard: written.meta.shard,
        epoch: 1,
        index: 1_000,
    };
    assert_eq!(status(&get_with(&mut sim, consistency(ahead))), Status::TooStale);
    assert_eq!(
        status(&get_with(&mut sim, consistency(Consistency::Stale { max_age_ms: 0 }))),
        Status::Ok
    );
    let deadline = |ms| RequestOptions {
        deadline_ms: Some(ms),
        ..RequestOptions::default()
    };
    assert_eq!(status(&get_with(&mut sim, deadline(1_000))), Status::Ok);
    let overdue = call_with(
        &mut sim,
        lane,
        Operation::Put {
            key: b"k",
            value: b"never",
        },
        deadline(0),
    );
    assert_eq!(status(&overdue), Status::DeadlineExceeded);
    assert_eq!(get(&mut sim, lane, b"k").unwrap(), b"v");
}

#[test]
fn large_values_pass_through_small_windows() {
    let (mut sim, lane) = one_node(1, &NodeSetup::default());
    let value: Vec<u8> = (0..8_usize << 20).map(|i| (i * 7 + i / 1000) as u8).collect();
    put(&mut sim, lane, b"large", &value);
    assert!(get(&mut sim, lane, b"large").unwrap() == value);
    // Many at once: their replies exceed what may wait on a stream, so reads wait and nothing is lost.
    let ids: Vec<_> = (0..20)
        .map(|_| {
            send(
                &mut sim,
                lane,
                Operation::Get { key: b"large" },
                RequestOptions::default(),
            )
        })
        .collect();
    for id in ids {
        assert_eq!(wait(&mut sim, lane, id).body.len(), value.len());
    }
}

#[test]
fn without_steering_datagrams_find_their_core() {
    let mut sim = Sim::new(
        3,
        Weather {
            steering: false,
            ..Weather::default()
        },
    );
    sim.node(&NodeSetup {
        cores: 4,
        shards: 4,
        ..NodeSetup::default()
    });
    let client = sim.client(generation_quic::Limits::default());
    for core in 0..4 {
        let lane = lane_to(&mut sim, client, core);
        let response = call(
            &mut sim,
            lane,
            Operation::Hello(Hello {
                major: 1,
                minor: 0,
                name: "",
            }),
        );
        let hello = generation_proto::reply::HelloReply::decode(&response.body).unwrap();
        assert_eq!(hello.core, u16::from(core));
        put(&mut sim, lane, &[core], b"v");
    }
    let lane = lane_to(&mut sim, client, 0);
    assert!(stat(&mut sim, lane, "node.datagrams_forwarded") > 0);
}

#[test]
fn a_full_mesh_answers_busy_and_recovers() {
    let mut sim = Sim::new(
        5,
        Weather {
            mesh_capacity: 0,
            ..Weather::default()
        },
    );
    sim.node(&NodeSetup {
        cores: 2,
        shards: 2,
        ..NodeSetup::default()
    });
    let client = sim.client(generation_quic::Limits::default());
    let lane = lane_to(&mut sim, client, 0);
    let responses: Vec<_> = keys(20)
        .iter()
        .map(|key| call(&mut sim, lane, Operation::Put { key, value: b"v" }))
        .collect();
    let busy: Vec<_> = responses
        .iter()
        .filter(|response| status(response) == Status::Busy)
        .collect();
    assert!(!busy.is_empty() && busy.len() < 20);
    assert!(busy.iter().all(|response| response.retry_after_ms.is_some()));
    // Several keys: those of this core are served.
    let keys = keys(20);
    let asked: Vec<&[u8]> = keys.iter().map(|key| &key[..]).collect();
    let response = multi_get(&mut sim, lane, &asked);
    let statuses: Vec<_> = MultiResult::decode_all(&response.body)
        .map(|result| result.unwrap().status)
        .collect();
    assert_eq!(count(&statuses, Status::Busy), busy.len());
    assert_eq!(count(&statuses, Status::Ok), 20 - busy.len());
    sim.set_weather(|weather| weather.mesh_capacity = 16);
    for key in &keys {
        put(&mut sim, lane, key, b"v");
    }
}

#[test]
fn a_stop_answers_what_is_under_way_and_refuses_what_comes() {
    let (mut sim, lane) = one_node(
        1,
        &NodeSetup {
            cores: 2,
            ..NodeSetup::default()
        },
    );
    let ids: Vec<_> = keys(20)
        .iter()
        .map(|key| {
            send(
                &mut sim,
                lane,
                Operation::Put { key, value: b"v" },
                RequestOptions::default(),
            )
        })
        .collect();
    sim.run_for(Duration::from_micros(120));
    sim.stop(0);
    let overdue = send(&mut sim, lane, Operation::Get { key: b"k" }, RequestOptions::default());
    let mut done = 0;
    for id in ids {
        let response = sim.until(|sim| {
            let client = &mut sim.clients[lane.client];
            client
                .response(lane.key, id)
                .map(Some)
                .or_else(|| client.closed(lane.key).is_some().then_some(None))
        });
        done += usize::from(response.is_some_and(|response| status(&response) == Status::Ok));
    }
    assert_eq!(done, 20, "what had arrived is answered");
    let code = close_code(&mut sim, lane.client, lane.key);
    assert_eq!(code, u64::from(generation_node::close_code::SHUTTING_DOWN));
    if let Some(response) = sim.clients[lane.client].response(lane.key, overdue) {
        assert_eq!(status(&response), Status::ShuttingDown);
    }
    let before = sim.now();
    sim.until(|sim| sim.has_stopped(0).then_some(()));
    assert!(sim.now() - before < Duration::from_secs(2));
}

#[test]
fn an_idle_node_stops_at_once() {
    let mut sim = Sim::new(1, Weather::default());
    sim.node(&NodeSetup {
        cores: 3,
        ..NodeSetup::default()
    });
    sim.run_for(Duration::from_secs(1));
    let before = sim.now();
    sim.stop(0);
    sim.until(|sim| sim.has_stopped(0).then_some(()));
    assert!(
        sim.now() - before < Duration::from_millis(10),
        "{:?}",
        sim.now() - before
    );
}
