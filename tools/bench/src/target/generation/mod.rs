//! Generation over QUIC, driven without tokio: one thread, one UDP socket for each core of each node.
//!
//! Each connection of the benchmark stands for one QUIC connection to every core that leads shards; a request
//! goes to the core that owns its key's shard, as the native client does. The core is chosen through the
//! first byte of the initial destination connection id. Requests travel on one bidirectional stream a
//! connection; all that a turn has submitted leaves in one train of datagrams (GSO).

mod credentials;
mod leaders;
mod port;
mod reply;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_client::ClientConfig;
use generation_proto::request::KeyList;
use generation_proto::{Condition, Map, Operation, RequestOptions, SlotTable};
use generation_quic::ClientCrypto;
use mio::{Events, Poll};
use quinn_udp::BATCH_SIZE;

use super::cluster::{Cluster, Layout, Place};
use super::{CONNECT_TIMEOUT, Completion, Connector, Request, Target, TargetError, Token, resolve};
use credentials::Credentials;
use port::{Port, TRAIN_BYTES, protocol_error};
use reply::{Greeting, MAP_ID};

/// Where a cluster is: its `client.toml`.
#[derive(Clone, Debug)]
pub struct GenerationConnector {
    /// The configuration file that `generation dev` writes.
    pub config: PathBuf,
}

impl Connector for GenerationConnector {
    fn name(&self) -> String {
        "generation".to_owned()
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let mut last = TargetError::Settings(format!("{}: no seeds", self.config.display()));
        for seed in &cluster.seeds {
            match resolve(seed).and_then(|addr| GenerationTarget::connect(addr, &cluster.crypto, connections)) {
                Ok(target) => return Ok(Box::new(target)),
                Err(error) => last = cluster.explain(error),
            }
        }
        Err(last)
    }
}

impl Cluster for GenerationConnector {
    fn name(&self) -> String {
        Connector::name(self)
    }

    fn nodes(&self) -> Vec<SocketAddr> {
        let seeds = ClientConfig::load(&self.config).map_or_else(|_| Vec::new(), |config| config.seeds);
        seeds.iter().filter_map(|seed| resolve(seed).ok()).collect()
    }

    fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let map = GenerationTarget::empty(1)?
            .scout(node, &cluster.crypto)
            .map_err(|error| cluster.explain(error))?;
        Ok(leaders::layout(&map))
    }

    fn connect_to(&self, place: Place, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let cluster = Credentials::read(&self.config)?;
        let mut target = GenerationTarget::empty(connections)?;
        target.open(place.addr, place.core as u8, &cluster.crypto, connections)?;
        target.greet(false).map_err(|error| cluster.explain(error))?;
        Ok(Box::new(target))
    }
}

/// A cluster seen from one generator thread.
pub struct GenerationTarget {
    poll: Poll,
    events: Events,
    ports: Vec<Port>,
    connections: usize,
    /// Port by shard, and shard by slot; absent while there is one port.
    route: Option<(Vec<u16>, SlotTable)>,
    receive: Vec<u8>,
    keys: BytesMut,
}

impl GenerationTarget {
    fn connect(seed: SocketAddr, crypto: &ClientCrypto, connections: usize) -> Result<Self, TargetError> {
        let mut target = Self::empty(connections)?;
        let map = target.scout(seed, crypto)?;
        let mut cores = Vec::new();
        let mut port_of_shard = Vec::new();
        for shard in &map.shards {
            let Some(port) = leaders::place_of(&map, shard, &mut cores) else {
                return Err(TargetError::Unreachable {
                    name: "generation".to_owned(),
                    addr: seed,
                    message: "the map has a shard without a leader".to_owned(),
                });
            };
            port_of_shard.push(port);
        }
        target.ports.clear();
        for place in &cores {
            target.open(place.addr, place.core as u8, crypto, connections)?;
        }
        target.greet(false)?;
        if cores.len() > 1 {
            let slots = SlotTable::new(&map.ranges, map.shards.len())
                .map_err(|error| protocol_error(seed, format!("the map cannot be used: {error}")))?;
            target.route = Some((port_of_shard, slots));
        }
        Ok(target)
    }

    /// A target without sockets yet.
    fn empty(connections: usize) -> Result<Self, TargetError> {
        Ok(Self {
            poll: Poll::new().map_err(TargetError::Loop)?,
            events: Events::with_capacity(64),
            ports: Vec::new(),
            connections,
            route: None,
            receive: vec![0; TRAIN_BYTES * BATCH_SIZE],
            keys: BytesMut::new(),
        })
    }

    /// Asks one node for the map, over a connection of its own.
    fn scout(&mut self, seed: SocketAddr, crypto: &ClientCrypto) -> Result<Map, TargetError> {
        self.open(seed, 0, crypto, 1)?;
        let request = generation_proto::Request {
            id: MAP_ID,
            options: RequestOptions::default(),
            operation: Operation::Map,
        };
        self.ports[0].submit(0, &request);
        self.greet(true)?
            .map
            .ok_or_else(|| protocol_error(seed, "no map came".to_owned()))
    }

    /// A port with its connections, not yet greeted.
    fn open(
        &mut self,
        addr: SocketAddr,
        core: u8,
        crypto: &ClientCrypto,
        connections: usize,
    ) -> Result<(), TargetError> {
        let token = mio::Token(self.ports.len());
        let port = Port::open(addr, core, crypto, connections, self.poll.registry(), token)?;
        self.ports.push(port);
        Ok(())
    }

    /// Waits until every link of every port has been greeted, and for the map if it was asked for.
    fn greet(&mut self, with_map: bool) -> Result<Greeting, TargetError> {
        let wanted: usize = self.ports.iter().map(Port::connections).sum();
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut greeting = Greeting::default();
        let mut completions = Vec::new();
        loop {
            self.flush()?;
            self.turn(Duration::from_millis(5), &mut completions, &mut greeting)?;
            if greeting.greeted >= wanted && (!with_map || greeting.map.is_some()) {
                return Ok(greeting);
            }
            if Instant::now() > deadline {
                let addr = self.ports[0].addr();
                let message = format!("{} of {wanted} connections answered within 5 s", greeting.greeted);
                return Err(TargetError::Unreachable {
                    name: "generation".to_owned(),
                    addr,
                    message,
                });
            }
        }
    }

    /// One turn of every port: receive, timers, events.
    fn turn(
        &mut self,
        wait: Duration,
        completions: &mut Vec<Completion>,
        greeting: &mut Greeting,
    ) -> Result<(), TargetError> {
        let mut wait = wait;
        if !wait.is_zero() {
            let now = Instant::now();
            for port in &self.ports {
                wait = port.patience(now, wait);
            }
        }
        match self.poll.poll(&mut self.events, Some(wait)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(TargetError::Loop(error)),
        }
        for event in &self.events {
            if event.is_readable() {
                self.ports[event.token().0].set_readable();
            }
        }
        let now = Instant::now();
        for port in &mut self.ports {
            port.turn(now, &mut self.receive, completions, greeting)?;
        }
        Ok(())
    }
}

impl Target for GenerationTarget {
    fn connections(&self) -> usize {
        self.connections
    }

    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError> {
        let mut options = RequestOptions::default();
        let (key, operation) = match *request {
            Request::Get { key, .. } => (key, Operation::Get { key }),
            Request::Put { key, value, ttl_ms } => {
                options.ttl_ms = (ttl_ms > 0).then_some(ttl_ms);
                (key, Operation::Put { key, value })
            }
            Request::PutIfVersion { key, value, version } => {
                options.condition = Condition::IfVersion(version);
                (key, Operation::Put { key, value })
            }
            Request::Incr { key } => (key, Operation::Incr { key, delta: 1 }),
            Request::MultiGet { keys, key_len } => {
                self.keys.clear();
                (
                    &keys[..key_len],
                    Operation::MultiGet(KeyList::build(keys.chunks_exact(key_len), &mut self.keys)),
                )
            }
        };
        // A multi-get goes to the core of its first key; the node fetches the others.
        let port = match &self.route {
            None => 0,
            Some((ports, slots)) => usize::from(ports[usize::from(slots.shard_of(key))]),
        };
        let request = generation_proto::Request {
            id: u64::from(token),
            options,
            operation,
        };
        self.ports[port].submit(connection, &request);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        self.ports.iter_mut().try_for_each(Port::flush)
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        self.turn(wait, completions, &mut Greeting::default())
    }
}

impl Drop for GenerationTarget {
    /// Tells the nodes, so that they need not wait for a time-out.
    fn drop(&mut self) {
        self.ports.iter_mut().for_each(Port::close);
    }
}
