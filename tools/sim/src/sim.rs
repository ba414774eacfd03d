//! The world: time, tasks, network, and what a test does with them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_engine::ShardConfig;
use generation_node::env::{CoreId, Datagram};
use generation_node::mesh::MeshMessage;
use generation_node::peers::{PeerLimits, PeerNode, Peers, PeersConfig};
use generation_node::{CoreConfig, NodeLimits};
use generation_proto::{ALPN_CLIENT, ALPN_PEER};
use generation_quic::steer;

use crate::client::Client;
use crate::dice::Dice;
use crate::env::{Inbox, SimEnv};
use crate::pki::{self, Authority, ClientIdentity};

/// The wall clock when a simulation begins: 2027-01-15, so that certificates made today are valid.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// How the network and the mesh behave.
#[derive(Debug, Clone)]
pub struct Weather {
    /// Datagrams lost, of 1,000.
    pub loss_per_mille: u64,
    /// Shortest time a datagram takes.
    pub delay: Duration,
    /// At most this much longer; a long one reorders.
    pub jitter: Duration,
    /// Whether datagrams reach the core their connection id names, as a kernel with steering sees to it. Otherwise the sender's
    /// port decides.
    pub steering: bool,
    /// Messages a core's mesh queue holds.
    pub mesh_capacity: usize,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            loss_per_mille: 0,
            delay: Duration::from_micros(50),
            jitter: Duration::ZERO,
            steering: true,
            mesh_capacity: 4096,
        }
    }
}

/// A node to be simulated.
#[derive(Debug, Clone)]
pub struct NodeSetup {
    /// Its cores.
    pub cores: CoreId,
    /// Its shards.
    pub shards: u16,
    /// Configuration of each shard.
    pub shard: ShardConfig,
    /// Limits of keys and values.
    pub limits: generation_proto::Limits,
    /// Bounds of queues and patience.
    pub node_limits: NodeLimits,
    /// Bounds of the transport.
    pub quic_limits: generation_quic::Limits,
    /// How many nodes the cluster has, those that have yet to be started included; all are taken to have as many cores. 0: this
    /// node knows no other.
    pub nodes: usize,
    /// The URI in its certificate; `None`: `generation://sim/node/ID`.
    pub uri: Option<String>,
    /// Bounds of what is under way with other nodes.
    pub peer_limits: PeerLimits,
}

impl Default for NodeSetup {
    fn default() -> Self {
        Self {
            cores: 2,
            shards: 4,
            shard: ShardConfig {
                budget_bytes: 16 << 20,
                ..ShardConfig::default()
            },
            limits: generation_proto::Limits::default(),
            node_limits: NodeLimits::default(),
            quic_limits: generation_quic::Limits::default(),
            nodes: 0,
            uri: None,
            peer_limits: PeerLimits::default(),
        }
    }
}

/// A node as the world sees it.
#[derive(Debug)]
pub(crate) struct NodeState {
    pub(crate) addr: SocketAddr,
    pub(crate) cores: Vec<Inbox>,
    pub(crate) stopping: bool,
    pub(crate) running: Rc<RefCell<CoreId>>,
    /// It is running, as opposed to killed.
    up: bool,
    /// Its tasks are not polled.
    frozen: bool,
    /// How often it was started.
    incarnation: u64,
    setup: NodeSetup,
}

/// Who sends or receives a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Node(usize),
    Client(usize),
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Everything that is shared.
pub(crate) struct World {
    start: Instant,
    pub(crate) now: Instant,
    pub(crate) dice: Dice,
    pub(crate) weather: Weather,
    pub(crate) nodes: Vec<NodeState>,
    pub(crate) clients: Vec<Vec<Datagram>>,
    pub(crate) spawned: Vec<(usize, Task)>,
    clock_offset_ms: u64,
    sequence: u64,
    in_flight: BTreeMap<(Instant, u64), (SocketAddr, SocketAddr, BytesMut)>,
    timers: BTreeMap<(Instant, u64), Waker>,
    trace: u64,
    sent: u64,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("now", &(self.now - self.start))
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

impl World {
    pub(crate) fn unix_ms(&self) -> u64 {
        EPOCH_MS + self.clock_offset_ms + (self.now - self.start).as_millis() as u64
    }

    pub(crate) fn wake_at(&mut self, at: Instant, waker: Waker) {
        self.sequence += 1;
        self.timers.insert((at, self.sequence), waker);
    }

    pub(crate) fn send(&mut self, from: SocketAddr, sender: Endpoint, to: SocketAddr, payload: &[u8]) {
        self.sent += 1;
        let sender = match sender {
            Endpoint::Node(node) => node as u64,
            Endpoint::Client(client) => 1_000 + client as u64,
        };
        self.note(&[sender, u64::from(to.port()), payload.len() as u64]);
        if self.dice.chance(self.weather.loss_per_mille) {
            return;
        }
        let jitter = self.dice.below(self.weather.jitter.as_nanos() as u64);
        let at = self.now + self.weather.delay + Duration::from_nanos(jitter);
        self.sequence += 1;
        self.in_flight
            .insert((at, self.sequence), (from, to, BytesMut::from(payload)));
    }

    pub(crate) fn trace_mesh(&mut self, from: CoreId, to: CoreId, message: &MeshMessage) {
        let (kind, size) = match message {
            MeshMessage::Datagram(datagram) => (1, datagram.payload.len()),
            MeshMessage::Requests(requests) => (2, requests.len()),
            MeshMessage::Replies(replies) => (3, replies.bytes.len()),
            MeshMessage::Drained => (4, 0),
            MeshMessage::Peer(liveness) => (5, liveness.node as usize),
        };
        self.note(&[u64::from(from), u64::from(to), kind, size as u64]);
    }

    /// Mixes an event into the trace, with its time.
    fn note(&mut self, words: &[u64]) {
        let nanos = (self.now - self.start).as_nanos() as u64;
        for &word in std::iter::once(&nanos).chain(words) {
            self.trace = (self.trace ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        }
    }

    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, payload: BytesMut) {
        let datagram = Datagram {
            remote: from,
            local_ip: None,
            ecn: 0,
            payload,
        };
        if let Some(node) = self.nodes.iter_mut().find(|node| node.addr == to) {
            if !node.up {
                return;
            }
            let cores = node.cores.len() as CoreId;
            let steered = if self.weather.steering {
                steer::core_of(&datagram.payload, cores)
            } else {
                None
            };
            let core = steered.unwrap_or(from.port() % cores);
            let inbox = &mut node.cores[usize::from(core)];
            inbox.datagrams.push_back(datagram);
            inbox.wake();
        } else if let Some(client) = (0..self.clients.len()).find(|&client| client_addr(client) == to) {
            self.clients[client].push(datagram);
        }
    }
}

fn node_addr(node: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 0, 0, 1 + node as u8).into(), 7400)
}

fn client_addr(client: usize) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 1, 0, 1).into(), 40_000 + client as u16)
}

/// Wakes a task by its number.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A simulation: nodes, clients, and the clock between them.
pub struct Sim {
    world: Rc<RefCell<World>>,
    authority: Authority,
    /// By node, then by core; none of a node that is down.
    peers: Vec<Vec<Peers>>,
    /// With the node each runs on.
    tasks: Vec<Option<(Arc<Flag>, usize, Task)>>,
    /// The clients, in the order they were added.
    pub clients: Vec<Client>,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.world.borrow().fmt(f)
    }
}

impl Sim {
    /// An empty world.
    pub fn new(seed: u64, weather: Weather) -> Self {
        let start = Instant::now();
        let world = World {
            start,
            now: start,
            dice: Dice::new(seed),
            weather,
            nodes: Vec::new(),
            clients: Vec::new(),
            spawned: Vec::new(),
            clock_offset_ms: 0,
            sequence: 0,
            in_flight: BTreeMap::new(),
            timers: BTreeMap::new(),
            trace: 0xcbf2_9ce4_8422_2325,
            sent: 0,
        };
        Self {
            world: Rc::new(RefCell::new(world)),
            authority: Authority::new(),
            peers: Vec::new(),
            tasks: Vec::new(),
            clients: Vec::new(),
        }
    }

    /// Starts a node; returns its number.
    pub fn node(&mut self, setup: &NodeSetup) -> usize {
        let node = self.world.borrow().nodes.len();
        self.world.borrow_mut().nodes.push(NodeState {
            addr: node_addr(node),
            cores: (0..setup.cores).map(|_| Inbox::default()).collect(),
            stopping: false,
            running: Rc::default(),
            up: false,
            frozen: false,
            incarnation: 0,
            setup: setup.clone(),
        });
        self.peers.push(Vec::new());
        self.start(node);
        node
    }

    /// Starts a node that is down.
    ///
    /// # Panics
    /// When it is up.
    pub fn start(&mut self, node: usize) {
        let config = self.config(node);
        let cores = self.world.borrow().nodes[node].cores.len() as CoreId;
        let running = Rc::new(RefCell::new(cores));
        let envs: Vec<SimEnv> = (0..cores)
            .map(|core| SimEnv {
                world: Rc::clone(&self.world),
                node,
                core,
            })
            .collect();
        let peers: Vec<Peers> = envs.iter().map(|env| Peers::new(env, &config)).collect();
        {
            let mut world = self.world.borrow_mut();
            let state = &mut world.nodes[node];
            assert!(!state.up, "node {node} is up");
            state.up = true;
            state.stopping = false;
            state.running = Rc::clone(&running);
        }
        self.peers[node].clone_from(&peers);
        for (env, peers) in envs.into_iter().zip(peers) {
            let (config, running) = (config.clone(), Rc::clone(&running));
            self.spawn(node, async move {
                generation_node::run_with_peers(env, config, peers).await;
                *running.borrow_mut() -= 1;
            });
        }
    }

    fn config(&self, node: usize) -> CoreConfig {
        let mut secret = [0; 32];
        let mut world = self.world.borrow_mut();
        world.dice.fill(&mut secret);
        let state = &mut world.nodes[node];
        state.incarnation += 1;
        let (incarnation, setup) = (state.incarnation, &state.setup);
        let id = 1 + node as u64;
        let uri = setup
            .uri
            .clone()
            .unwrap_or_else(|| format!("generation://sim/node/{id}"));
        let others = (0..setup.nodes).filter(|&other| other != node);
        let others = others.map(|other| PeerNode {
            id: 1 + other as u64,
            addr: node_addr(other),
            cores: setup.cores,
        });
        CoreConfig {
            cluster: "sim".to_owned(),
            node: id,
            addr: state.addr,
            shards: setup.shards,
            epoch: incarnation as u32,
            shard: setup.shard,
            limits: setup.limits,
            node_limits: setup.node_limits.clone(),
            quic_limits: setup.quic_limits.clone(),
            mtu_discovery: true,
            crypto: self.authority.server(&uri, &[ALPN_CLIENT, ALPN_PEER]),
            secret,
            authorize: Arc::new(|certificates| pki::identity(certificates, "sim")),
            peers: PeersConfig {
                nodes: others.collect(),
                crypto: (setup.nodes > 0).then(|| self.authority.node(&uri, ALPN_PEER)),
                directory: u128::from(id) << 64,
                incarnation,
                limits: setup.peer_limits.clone(),
            },
            software: "generation-sim".to_owned(),
        }
    }

    /// The peers of a core of a node that is up.
    pub fn peers(&self, node: usize, core: CoreId) -> Peers {
        self.peers[node][usize::from(core)].clone()
    }

    /// Runs a task on a node until it ends or the node dies.
    pub fn spawn(&mut self, node: usize, task: impl Future<Output = ()> + 'static) {
        self.spawn_boxed(node, Box::pin(task));
    }

    /// Ends a node between two moments, as SIGKILL does: nothing it had in memory is left, and nobody is told.
    pub fn kill(&mut self, node: usize) {
        let mut world = self.world.borrow_mut();
        let state = &mut world.nodes[node];
        state.up = false;
        state.frozen = false;
        for inbox in &mut state.cores {
            *inbox = Inbox::default();
        }
        drop(world);
        for slot in &mut self.tasks {
            if slot.as_ref().is_some_and(|&(_, of, _)| of == node) {
                *slot = None;
            }
        }
        self.peers[node].clear();
    }

    /// Stops polling a node's tasks, as SIGSTOP does. What is sent to it waits.
    pub fn freeze(&mut self, node: usize) {
        self.world.borrow_mut().nodes[node].frozen = true;
    }

    /// Lets a frozen node go on.
    pub fn thaw(&mut self, node: usize) {
        self.world.borrow_mut().nodes[node].frozen = false;
    }

    /// Adds a client with a good certificate; returns its number.
    pub fn client(&mut self, limits: generation_quic::Limits) -> usize {
        self.client_with(limits, ClientIdentity::Good)
    }

    /// Adds a client; returns its number.
    pub fn client_with(&mut self, limits: generation_quic::Limits, identity: ClientIdentity) -> usize {
        self.client_of(limits, identity, ALPN_CLIENT)
    }

    /// Adds a client that speaks another protocol; returns its number.
    pub fn client_of(&mut self, limits: generation_quic::Limits, identity: ClientIdentity, alpn: &[u8]) -> usize {
        let number = self.clients.len();
        let mut seed = [0; 32];
        let mut world = self.world.borrow_mut();
        world.dice.fill(&mut seed);
        world.clients.push(Vec::new());
        drop(world);
        let crypto = self.authority.client(identity, alpn);
        self.clients
            .push(Client::new(client_addr(number), seed, limits, crypto));
        number
    }

    /// Address of a node.
    pub fn addr(&self, node: usize) -> SocketAddr {
        self.world.borrow().nodes[node].addr
    }

    /// How many cores a node has.
    pub fn cores(&self, node: usize) -> CoreId {
        self.world.borrow().nodes[node].cores.len() as CoreId
    }

    /// The present moment.
    pub fn now(&self) -> Instant {
        self.world.borrow().now
    }

    /// How much simulated time has passed.
    pub fn elapsed(&self) -> Duration {
        let world = self.world.borrow();
        world.now - world.start
    }

    /// Hash of everything that was sent, when and where to.
    pub fn trace(&self) -> u64 {
        self.world.borrow().trace
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.world.borrow().sent
    }

    /// Changes the weather.
    pub fn set_weather(&mut self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.world.borrow_mut().weather);
    }

    /// Moves the wall clock (not monotonic time) forward at once.
    pub fn skip_clock(&mut self, by: Duration) {
        self.world.borrow_mut().clock_offset_ms += by.as_millis() as u64;
    }

    /// Sends bytes to a node as if `from` had sent them.
    pub fn inject(&mut self, node: usize, from: SocketAddr, payload: &[u8]) {
        let mut world = self.world.borrow_mut();
        let to = world.nodes[node].addr;
        world.deliver(from, to, BytesMut::from(payload));
    }

    /// Asks a node to stop.
    pub fn stop(&mut self, node: usize) {
        let mut world = self.world.borrow_mut();
        world.nodes[node].stopping = true;
        for inbox in &mut world.nodes[node].cores {
            inbox.wake();
        }
    }

    /// Whether all cores of a node have ended.
    pub fn has_stopped(&self, node: usize) -> bool {
        *self.world.borrow().nodes[node].running.borrow() == 0
    }

    /// Runs until `done` gives something.
    ///
    /// # Panics
    /// After ten simulated minutes, or when nothing is left that could happen.
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let limit = self.now() + Duration::from_mins(10);
        loop {
            self.settle();
            if let Some(found) = done(self) {
                return found;
            }
            self.settle();
            assert!(self.advance(), "nothing is left to happen");
            assert!(self.now() < limit, "not within ten simulated minutes");
        }
    }

    /// Runs for some simulated time.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.now() + time;
        self.world.borrow_mut().wake_at(end, Waker::noop().clone());
        self.until(|sim| (sim.now() >= end).then_some(()));
    }

    /// Does everything that can be done at the present moment.
    fn settle(&mut self) {
        loop {
            let mut progress = self.run_tasks();
            for number in 0..self.clients.len() {
                let arrived = std::mem::take(&mut self.world.borrow_mut().clients[number]);
                progress |= !arrived.is_empty();
                let now = self.now();
                let addr = self.clients[number].addr();
                let world = &self.world;
                self.clients[number].turn(now, arrived, |to, datagram| {
                    progress = true;
                    world.borrow_mut().send(addr, Endpoint::Client(number), to, datagram);
                });
            }
            if !progress {
                return;
            }
        }
    }

    /// Moves the clock to the next thing that happens. `false`: nothing will.
    fn advance(&mut self) -> bool {
        let mut world = self.world.borrow_mut();
        let network = world.in_flight.keys().next().map(|&(at, _)| at);
        let timer = world.timers.keys().next().map(|&(at, _)| at);
        let clients = self.clients.iter().filter_map(Client::next_timeout).min();
        let Some(next) = [network, timer, clients].into_iter().flatten().min() else {
            return false;
        };
        world.now = world.now.max(next);
        let now = world.now;
        while let Some(entry) = world.timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            entry.remove().wake();
        }
        while let Some(entry) = world.in_flight.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let (from, to, payload) = entry.remove();
            world.deliver(from, to, payload);
        }
        true
    }

    fn spawn_boxed(&mut self, node: usize, task: Task) {
        self.tasks
            .push(Some((Arc::new(Flag(AtomicBool::new(true))), node, task)));
    }

    /// Polls every task that was woken, in the order they were started, until none is. Says whether any was.
    fn run_tasks(&mut self) -> bool {
        let mut progress = false;
        loop {
            let spawned = std::mem::take(&mut self.world.borrow_mut().spawned);
            for (node, task) in spawned {
                self.spawn_boxed(node, task);
            }
            let mut any = false;
            for slot in &mut self.tasks {
                let Some((flag, node, task)) = slot else { continue };
                if self.world.borrow().nodes[*node].frozen || !flag.0.swap(false, Ordering::Relaxed) {
                    continue;
                }
                any = true;
                let waker = Waker::from(Arc::clone(flag));
                if task.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Ready(()) {
                    *slot = None;
                }
            }
            // What was spawned last has usually ended first.
            while let Some(None) = self.tasks.last() {
                self.tasks.pop();
            }
            if !any {
                return progress;
            }
            progress = true;
        }
    }
}
