//! One connection, one stream, one request at a time.
#![allow(unreachable_pub, reason = "a module shared by test binaries")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use bytes::BytesMut;
use generation_proto::request::{Item, ItemList, KeyList};
use generation_proto::{Operation, RequestOptions, Status};
use generation_quic::{CloseReason, ConnectionKey, StreamId};
use generation_sim::{NodeSetup, Response, Sim, Weather};

/// A stream of a connection of a client.
#[derive(Debug, Clone, Copy)]
pub struct Lane {
    pub client: usize,
    pub key: ConnectionKey,
    pub stream: StreamId,
}

/// A world with one node and one lane to its core 0, `Hello` said.
pub fn one_node(seed: u64, setup: &NodeSetup) -> (Sim, Lane) {
    let mut sim = Sim::new(seed, Weather::default());
    sim.node(setup);
    let client = sim.client(generation_quic::Limits::default());
    let lane = lane(&mut sim, client, 0);
    (sim, lane)
}

/// A new connection of a client to a core of node 0, `Hello` said.
pub fn lane(sim: &mut Sim, client: usize, core: u8) -> Lane {
    let lane = silent_lane(sim, client, core);
    greet(sim, lane)
}

/// A new connection of a client to core 0 of a node, `Hello` said.
pub fn lane_of(sim: &mut Sim, client: usize, node: usize) -> Lane {
    let (now, addr) = (sim.now(), sim.addr(node));
    let key = sim.clients[client].connect(now, addr, 0);
    sim.until(|sim| sim.clients[client].is_connected(key).then_some(()));
    let stream = sim.clients[client].open(key).unwrap();
    greet(sim, Lane { client, key, stream })
}

fn greet(sim: &mut Sim, lane: Lane) -> Lane {
    let client = lane.client;
    let id = sim.clients[client].hello(lane.key, lane.stream);
    let response = wait(sim, lane, id);
    assert_eq!(status(&response), Status::Ok);
    lane
}

/// A new connection that has said nothing yet.
pub fn silent_lane(sim: &mut Sim, client: usize, core: u8) -> Lane {
    let (now, addr) = (sim.now(), sim.addr(0));
    let key = sim.clients[client].connect(now, addr, core);
    sim.until(|sim| sim.clients[client].is_connected(key).then_some(()));
    let stream = sim.clients[client].open(key).unwrap();
    Lane { client, key, stream }
}

/// Another stream of the same connection.
pub fn sibling(sim: &mut Sim, lane: Lane) -> Lane {
    let stream = sim.clients[lane.client].open(lane.key).unwrap();
    Lane { stream, ..lane }
}

pub fn send(sim: &mut Sim, lane: Lane, operation: Operation<'_>, options: RequestOptions) -> u64 {
    sim.clients[lane.client].send(lane.key, lane.stream, operation, options)
}

pub fn wait(sim: &mut Sim, lane: Lane, id: u64) -> Response {
    sim.until(|sim| sim.clients[lane.client].response(lane.key, id))
}

pub fn call_with(sim: &mut Sim, lane: Lane, operation: Operation<'_>, options: RequestOptions) -> Response {
    let id = send(sim, lane, operation, options);
    wait(sim, lane, id)
}

pub fn call(sim: &mut Sim, lane: Lane, operation: Operation<'_>) -> Response {
    call_with(sim, lane, operation, RequestOptions::default())
}

pub fn status(response: &Response) -> Status {
    response.meta.status().unwrap_or_else(|| panic!("{response:?}"))
}

pub fn put(sim: &mut Sim, lane: Lane, key: &[u8], value: &[u8]) -> Response {
    let response = call(sim, lane, Operation::Put { key, value });
    assert_eq!(status(&response), Status::Ok, "{:?}", response.message);
    response
}

pub fn get(sim: &mut Sim, lane: Lane, key: &[u8]) -> Option<Vec<u8>> {
    let response = call(sim, lane, Operation::Get { key });
    match status(&response) {
        Status::Ok => Some(response.body.to_vec()),
        Status::NotFound => None,
        other => panic!("{other}: {:?}", response.message),
    }
}

pub fn multi_get(sim: &mut Sim, lane: Lane, keys: &[&[u8]]) -> Response {
    let mut buffer = BytesMut::new();
    let list = KeyList::build(keys.iter().copied(), &mut buffer);
    call(sim, lane, Operation::MultiGet(list))
}

pub fn multi_put(sim: &mut Sim, lane: Lane, items: &[(&[u8], &[u8])]) -> Response {
    let mut buffer = BytesMut::new();
    let items = items.iter().map(|&(key, value)| Item {
        key,
        value,
        ttl_ms: None,
    });
    let list = ItemList::build(items, &mut buffer);
    call(sim, lane, Operation::MultiPut(list))
}

/// Waits for the node to close the connection; its code.
pub fn close_code(sim: &mut Sim, client: usize, key: ConnectionKey) -> u64 {
    sim.until(|sim| match sim.clients[client].closed(key)? {
        CloseReason::Application { code, .. } => Some(*code),
        other => panic!("{other}"),
    })
}

/// The counter of this name.
pub fn stat(sim: &mut Sim, lane: Lane, name: &str) -> u64 {
    let response = call(sim, lane, Operation::Stats);
    let stats = generation_proto::reply::Stat::decode_all(&response.body).map(Result::unwrap);
    let found: Vec<_> = stats.filter(|stat| stat.name == name).map(|stat| stat.value).collect();
    assert_eq!(found.len(), 1, "{name}");
    found[0]
}
