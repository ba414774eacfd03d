//! Writes in sessions happen once: on a node alone, and in a cluster whose leader dies between applying a write and answering it.

mod common;

use std::time::Duration;

use bytes::BytesMut;
use common::*;
use generation_engine::ShardConfig;
use generation_engine::session::SessionLimits;
use generation_node::{Durability, Policy, Replication, Timing};
use generation_proto::map::Shard;
use generation_proto::reply::{MultiResult, Stat};
use generation_proto::request::KeyList;
use generation_proto::{Map, Operation, RequestOptions, Session, ShardSession, Status};
use generation_sim::{Host, Kill, NodeSetup, Response, Sim, Weather};

const SESSION: ShardSession = ShardSession { id: 77, shard: 0 };

const INCR: Operation<'_> = Operation::Incr { key: b"n", delta: 5 };

fn one_shard() -> NodeSetup {
    NodeSetup {
        cores: 1,
        shards: 1,
        ..NodeSetup::default()
    }
}

fn numbered(seq: u64, first_unacked: u64) -> RequestOptions {
    let session = Some(Session {
        id: SESSION.id,
        seq,
        first_unacked,
    });
    RequestOptions {
        session,
        ..RequestOptions::default()
    }
}

fn ask(sim: &mut Sim, lane: Lane, seq: u64, first_unacked: u64) -> Response {
    call_with(sim, lane, INCR, numbered(seq, first_unacked))
}

fn counter(response: &Response) -> i64 {
    assert_eq!(status(response), Status::Ok, "{:?}", response.message);
    i64::from_le_bytes(response.body[..].try_into().unwrap())
}

#[test]
fn a_repeated_write_is_answered_as_the_first_time() {
    let (mut sim, lane) = one_node(1, &one_shard());
    // A write opens no session, whatever its number.
    assert_eq!(status(&ask(&mut sim, lane, 1, 1)), Status::SessionExpired);
    assert_eq!(get(&mut sim, lane, b"n"), None);
    let opened = call(&mut sim, lane, Operation::OpenSession(SESSION));
    assert_eq!(status(&opened), Status::Ok);
    assert!(opened.meta.index > 0);
    let first = ask(&mut sim, lane, 1, 1);
    assert_eq!(counter(&first), 5);
    let second = ask(&mut sim, lane, 2, 1);
    assert_eq!(counter(&second), 10);
    let again = ask(&mut sim, lane, 1, 1);
    assert_eq!((counter(&again), again.meta.version), (5, first.meta.version));
    // Once the client has seen the reply it is forgotten, and its number never executes again.
    assert_eq!(counter(&ask(&mut sim, lane, 3, 2)), 15);
    assert_eq!(status(&ask(&mut sim, lane, 1, 1)), Status::InvalidArgument);
    assert_eq!(get(&mut sim, lane, b"n").unwrap(), b"15");
    // An answer in the negative is kept as well.
    let delete = Operation::Delete { key: b"absent" };
    let absent = call_with(&mut sim, lane, delete, numbered(4, 4));
    assert_eq!(status(&absent), Status::NotFound);
    put(&mut sim, lane, b"absent", b"there now");
    let again = call_with(&mut sim, lane, delete, numbered(4, 4));
    assert_eq!(status(&again), Status::NotFound);
    assert!(get(&mut sim, lane, b"absent").is_some());
    // Closed, it executes nothing any more.
    assert_eq!(
        status(&call(&mut sim, lane, Operation::CloseSession(SESSION))),
        Status::Ok
    );
    assert_eq!(status(&ask(&mut sim, lane, 5, 5)), Status::SessionExpired);
    let closed = call(&mut sim, lane, Operation::CloseSession(SESSION));
    assert_eq!(status(&closed), Status::SessionExpired);
    assert_eq!(get(&mut sim, lane, b"n").unwrap(), b"15");
}

#[test]
fn keys_of_a_request_have_consecutive_numbers_on_whatever_core() {
    let setup = NodeSetup {
        cores: 3,
        shards: 8,
        ..NodeSetup::default()
    };
    let (mut sim, lane) = one_node(2, &setup);
    for shard in 0..8 {
        let opened = call(
            &mut sim,
            lane,
            Operation::OpenSession(ShardSession { shard, ..SESSION }),
        );
        assert_eq!((status(&opened), opened.meta.shard), (Status::Ok, shard));
    }
    let nowhere = call(
        &mut sim,
        lane,
        Operation::OpenSession(ShardSession { shard: 8, ..SESSION }),
    );
    assert_eq!(status(&nowhere), Status::InvalidArgument);
    let keys: Vec<Vec<u8>> = (0..40).map(|i| format!("key-{i}").into_bytes()).collect();
    for key in &keys {
        put(&mut sim, lane, key, b"v");
    }
    let mut delete = |seq| {
        let mut buffer = BytesMut::new();
        let list = KeyList::build(keys.iter().map(Vec::as_slice), &mut buffer);
        let response = call_with(&mut sim, lane, Operation::MultiDelete(list), numbered(seq, 1));
        let results = MultiResult::decode_all(&response.body).map(Result::unwrap);
        results
            .map(|result| (Status::from_code(result.status).unwrap(), result.version))
            .collect::<Vec<_>>()
    };
    let first = delete(1);
    assert!(
        first
            .iter()
            .all(|(status, version)| *status == Status::Ok && *version > 0)
    );
    assert_eq!(delete(1), first);
    // The last key had number 40; 41 and on are others, and find nothing.
    assert!(delete(41).iter().all(|result| *result == (Status::NotFound, 0)));
    // Of keys whose numbers reach beyond the window, those beyond are put off.
    assert!(delete(1024 - 38).iter().any(|(status, _)| *status == Status::Busy));
}

#[test]
fn the_window_and_the_table_are_bounded() {
    let (mut sim, lane) = one_node(3, &one_shard());
    assert_eq!(
        status(&call(&mut sim, lane, Operation::OpenSession(SESSION))),
        Status::Ok
    );
    assert_eq!(counter(&ask(&mut sim, lane, 1024, 1)), 5);
    let beyond = ask(&mut sim, lane, 1025, 1);
    assert_eq!(status(&beyond), Status::Busy);
    assert!(beyond.retry_after_ms.is_some());
    assert_eq!(counter(&ask(&mut sim, lane, 1025, 2)), 10);
    let most = u128::from(SessionLimits::default().max_sessions);
    let ids: Vec<u64> = (1..=most)
        .map(|id| {
            let open = Operation::OpenSession(ShardSession {
                id: 1_000 + id,
                shard: 0,
            });
            send(&mut sim, lane, open, RequestOptions::default())
        })
        .collect();
    let statuses: Vec<Status> = ids.into_iter().map(|id| status(&wait(&mut sim, lane, id))).collect();
    let (last, others) = statuses.split_last().unwrap();
    assert!(others.iter().all(|status| *status == Status::Ok));
    // One place was taken.
    assert_eq!(*last, Status::Busy);
    assert_eq!(
        status(&call(&mut sim, lane, Operation::CloseSession(SESSION))),
        Status::Ok
    );
    assert_eq!(
        status(&call(&mut sim, lane, Operation::OpenSession(SESSION))),
        Status::Ok
    );
}

#[test]
fn an_idle_session_expires_by_the_shards_clock() {
    let (mut sim, lane) = one_node(4, &one_shard());
    assert_eq!(
        status(&call(&mut sim, lane, Operation::OpenSession(SESSION))),
        Status::Ok
    );
    let idle = Duration::from_millis(SessionLimits::default().idle_ms);
    assert_eq!(counter(&ask(&mut sim, lane, 1, 1)), 5);
    sim.skip_clock(idle.saturating_sub(Duration::from_secs(1)));
    // It is used, and so it lives on.
    assert_eq!(counter(&ask(&mut sim, lane, 1, 1)), 5);
    sim.skip_clock(idle.saturating_sub(Duration::from_secs(1)));
    assert_eq!(counter(&ask(&mut sim, lane, 2, 1)), 10);
    sim.skip_clock(idle + Duration::from_secs(2));
    assert_eq!(status(&ask(&mut sim, lane, 2, 1)), Status::SessionExpired);
    assert_eq!(get(&mut sim, lane, b"n").unwrap(), b"10");
}

/// Three nodes with one shard, and a client's connections to each.
struct Cluster {
    sim: Sim,
    client: usize,
    lanes: Vec<Option<Lane>>,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut sim = Sim::new(seed, Weather::default());
        let setup = NodeSetup {
            shard: ShardConfig {
                policy: Policy::NoEvict,
                budget_bytes: 16 << 20,
                ..ShardConfig::default()
            },
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
            ..one_shard()
        };
        for _ in 0..3 {
            sim.node(&setup);
        }
        let client = sim.client(generation_quic::Limits::default());
        let mut cluster = Self {
            sim,
            client,
            lanes: vec![None; 3],
        };
        // A cluster grows from its first node.
        while (0..3).any(|node| cluster.shard(node).replicas.len() < 3) {
            cluster.sim.run_for(Duration::from_millis(100));
        }
        cluster.sim.run_for(Duration::from_secs(2));
        cluster
    }

    /// The shard as a node sees it.
    fn shard(&mut self, node: usize) -> Shard {
        let lane = self.lane(node);
        let response = call(&mut self.sim, lane, Operation::Map);
        let mut map = Map::decode(&response.body).unwrap();
        map.shards.remove(0)
    }

    fn lane(&mut self, node: usize) -> Lane {
        if let Some(lane) = self.lanes[node] {
            return lane;
        }
        let (now, addr) = (self.sim.now(), self.sim.addr(node));
        let client = self.client;
        let key = self.sim.clients[client].connect(now, addr, 0);
        self.sim
            .until(|sim| sim.clients[client].is_connected(key).then_some(()));
        let stream = self.sim.clients[client].open(key).unwrap();
        let lane = Lane { client, key, stream };
        let hello = self.sim.clients[client].hello(key, stream);
        assert_eq!(status(&wait(&mut self.sim, lane, hello)), Status::Ok);
        self.lanes[node] = Some(lane);
        lane
    }

    /// Which of `nodes` leads, once one does.
    fn leader(&mut self, nodes: &[usize]) -> usize {
        let mut seen = Vec::new();
        for _ in 0..1_000 {
            seen.clear();
            for &node in nodes {
                let shard = self.shard(node);
                if shard.leader == 1 + node as u64 {
                    return node;
                }
                seen.push((node, shard));
            }
            self.sim.run_for(Duration::from_millis(20));
        }
        panic!("nobody leads: {seen:?}");
    }

    /// Asks until it is proposed and applied; who leads is asked anew.
    fn call(&mut self, nodes: &[usize], operation: Operation<'_>, options: RequestOptions) -> Response {
        for _ in 0..1_000 {
            let leader = self.leader(nodes);
            let lane = self.lane(leader);
            let response = call_with(&mut self.sim, lane, operation, options);
            match status(&response) {
                Status::Moved | Status::Busy | Status::NoQuorum | Status::ReadOnly => {
                    self.sim.run_for(Duration::from_millis(20));
                }
                _ => return response,
            }
        }
        panic!("nobody answers");
    }

    fn kill(&mut self, node: usize) {
        self.sim.kill(node, Kill::Power);
        if let Some(lane) = self.lanes[node].take() {
            let now = self.sim.now();
            self.sim.clients[self.client].close(now, lane.key);
        }
    }

    fn stat(&mut self, node: usize, name: &str) -> u64 {
        let lane = self.lane(node);
        let response = call(&mut self.sim, lane, Operation::Stats);
        let mut stats = Stat::decode_all(&response.body).map(Result::unwrap);
        stats.find(|stat| stat.name == name).map_or(0, |stat| stat.value)
    }
}

#[test]
fn a_leader_that_dies_before_it_answers_counts_once() {
    let mut cluster = Cluster::new(5);
    let all = [0, 1, 2];
    let opened = cluster.call(&all, Operation::OpenSession(SESSION), RequestOptions::default());
    assert_eq!(status(&opened), Status::Ok);
    assert_eq!(counter(&cluster.call(&all, INCR, numbered(1, 1))), 5);
    for round in 2..6 {
        let leader = cluster.leader(&all);
        let others: Vec<usize> = all.iter().copied().filter(|&node| node != leader).collect();
        let lane = cluster.lane(leader);
        // The leader hears the write; its answers do not come back.
        let hosts = [[Host::Node(leader)], [Host::Client(cluster.client)]];
        cluster.sim.cut(&hosts[0], &hosts[1]);
        send(&mut cluster.sim, lane, INCR, numbered(round, round));
        cluster.sim.run_for(Duration::from_millis(100));
        cluster.kill(leader);
        cluster.sim.mend(&hosts[0], &hosts[1]);
        // It was applied, and who leads now says what the dead one would have said.
        let again = cluster.call(&others, INCR, numbered(round, round));
        let sum = 5 * round.cast_signed();
        assert_eq!(counter(&again), sum);
        let lane = cluster.leader(&others);
        let lane = cluster.lane(lane);
        assert_eq!(get(&mut cluster.sim, lane, b"n").unwrap(), sum.to_string().as_bytes());
        assert!(
            again.meta.version >> 16 < again.meta.index,
            "it was executed by the retry"
        );
        cluster.sim.start(leader);
        cluster.sim.run_for(Duration::from_secs(2));
    }
}

#[test]
fn a_session_survives_snapshots_and_restarts_of_all() {
    let mut cluster = Cluster::new(6);
    let all = [0, 1, 2];
    let opened = cluster.call(&all, Operation::OpenSession(SESSION), RequestOptions::default());
    assert_eq!(status(&opened), Status::Ok);
    let first = cluster.call(&all, INCR, numbered(1, 1));
    assert_eq!(counter(&first), 5);
    let value = vec![7; 4_000];
    let mut writes = 0;
    while all
        .iter()
        .any(|&node| cluster.stat(node, "shard.0.snapshot_index") <= first.meta.index)
    {
        let key = format!("key-{}", writes % 50).into_bytes();
        let put = Operation::Put {
            key: &key,
            value: &value,
        };
        assert_eq!(status(&cluster.call(&all, put, RequestOptions::default())), Status::Ok);
        writes += 1;
        assert!(writes < 5_000, "no snapshot was taken");
    }
    for node in all {
        cluster.kill(node);
    }
    for node in all {
        cluster.sim.start(node);
    }
    let again = cluster.call(&all, INCR, numbered(1, 1));
    assert_eq!((counter(&again), again.meta.version), (5, first.meta.version));
    assert_eq!(counter(&cluster.call(&all, INCR, numbered(2, 2))), 10);
}
