//! A client process as the cluster sees it: one transport, a connection to each core it needs, and the client library's own
//! routes. What to send where and when to try again is the library's decision; this only carries it out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use generation_client::core::retry::{Budget, RetryPolicy};
use generation_client::core::routing::{Routes, Target};
use generation_proto::{Map, Operation, RequestOptions, Status};
use generation_quic::{ConnectionKey, StreamId};

use crate::client::Response;
use crate::sim::Sim;

/// How long a connection may take to be made, and how long a node may owe an answer before its connection is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection to a core.
#[derive(Debug)]
struct Lane {
    key: ConnectionKey,
    since: Instant,
    stream: Option<StreamId>,
}

/// What became of an attempt to get a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It is there.
    Open(ConnectionKey, StreamId),
    /// It is being made.
    Pending,
    /// It could not be made.
    Failed,
}

/// One client process.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Its number among the simulation's clients.
    pub(super) client: usize,
    pub(super) routes: Option<Routes>,
    pub(super) policy: RetryPolicy,
    pub(super) budget: Budget,
    lanes: BTreeMap<(usize, u16), Lane>,
    /// The request for a map that is under way.
    asking: Option<(ConnectionKey, u64, Instant)>,
    /// The node asked for a map next.
    next_seed: usize,
    nodes: usize,
    /// When there was nobody to ask.
    pub(super) retry_map_at: Option<Instant>,
}

impl Endpoint {
    pub(super) fn new(client: usize, nodes: usize) -> Self {
        let policy = RetryPolicy::default();
        Self {
            client,
            routes: None,
            policy,
            budget: Budget::new(&policy),
            lanes: BTreeMap::new(),
            asking: None,
            next_seed: client % nodes,
            nodes,
            retry_map_at: None,
        }
    }

    /// The connection to a core of a node, by the node's number; begins one if there is none.
    pub(super) fn way(&mut self, sim: &mut Sim, node: usize, core: u16) -> Way {
        let now = sim.now();
        let client = &mut sim.clients[self.client];
        if let Some(lane) = self.lanes.get_mut(&(node, core)) {
            if client.closed(lane.key).is_some() {
                let lane = self.lanes.remove(&(node, core)).expect("invariant: it was just found");
                client.close(now, lane.key);
                return Way::Failed;
            }
            if let Some(stream) = lane.stream {
                return Way::Open(lane.key, stream);
            }
            if client.is_connected(lane.key) {
                let Some(stream) = client.open(lane.key) else {
                    return Way::Pending;
                };
                client.hello(lane.key, stream);
                lane.stream = Some(stream);
                return Way::Open(lane.key, stream);
            }
            if now >= lane.since + PATIENCE {
                self.give_up(sim, node, core);
                return Way::Failed;
            }
            return Way::Pending;
        }
        let addr = sim.addr(node);
        let key = sim.clients[self.client].connect(now, addr, core as u8);
        sim.wake_at(now + PATIENCE);
        let lane = Lane {
            key,
            since: now,
            stream: None,
        };
        self.lanes.insert((node, core), lane);
        Way::Pending
    }

    /// Whether a connection is still there.
    pub(super) fn is_alive(&self, sim: &Sim, key: ConnectionKey) -> bool {
        self.lanes.values().any(|lane| lane.key == key) && sim.clients[self.client].closed(key).is_none()
    }

    /// Closes the connection to a core.
    pub(super) fn give_up(&mut self, sim: &mut Sim, node: usize, core: u16) {
        if let Some(lane) = self.lanes.remove(&(node, core)) {
            let now = sim.now();
            sim.clients[self.client].close(now, lane.key);
        }
    }

    /// Where the leader of a shard is thought to be.
    pub(super) fn target(&self, shard: u16, attempt: u32) -> Option<Target> {
        self.routes.as_ref()?.target(shard, attempt)
    }

    /// Takes note of a reply's epoch: an older map is to be renewed.
    pub(super) fn note_epoch(&mut self, sim: &mut Sim, key: ConnectionKey, epoch: u32) {
        let known = self.routes.as_ref().map_or(0, Routes::epoch);
        if epoch > known
            && self.asking.is_none()
            && let Some(lane) = self.lanes.values().find(|lane| lane.key == key)
            && let Some(stream) = lane.stream
        {
            self.ask(sim, key, stream);
        }
    }

    fn ask(&mut self, sim: &mut Sim, key: ConnectionKey, stream: StreamId) {
        let id = sim.clients[self.client].send(key, stream, Operation::Map, RequestOptions::default());
        let until = sim.now() + PATIENCE;
        sim.wake_at(until);
        self.asking = Some((key, id, until));
    }

    /// Asks one node after another for a map while there is none, and takes what comes.
    pub(super) fn tend_map(&mut self, sim: &mut Sim) {
        let now = sim.now();
        if let Some((key, id, until)) = self.asking {
            let response = sim.clients[self.client].response(key, id);
            if let Some(response) = &response {
                self.install(response);
            }
            if response.is_some() || now >= until || !self.is_alive(sim, key) {
                self.asking = None;
                self.next_seed += usize::from(self.routes.is_none());
            }
        }
        if self.routes.is_some() || self.asking.is_some() || self.retry_map_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_map_at = None;
        match self.way(sim, self.next_seed % self.nodes, 0) {
            Way::Open(key, stream) => self.ask(sim, key, stream),
            Way::Pending => {}
            Way::Failed => {
                self.next_seed += 1;
                let at = now + self.policy.initial_backoff;
                self.retry_map_at = Some(at);
                sim.wake_at(at);
            }
        }
    }

    fn install(&mut self, response: &Response) {
        if response.meta.status() != Some(Status::Ok) {
            return;
        }
        let map = Map::decode(&response.body).expect("a node's map can be read");
        match &mut self.routes {
            Some(routes) => drop(routes.install(map).expect("a node's map is whole")),
            None => self.routes = Some(Routes::new(map).expect("a node's map is whole")),
        }
    }
}
