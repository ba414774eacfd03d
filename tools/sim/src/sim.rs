//! A simulation: nodes, clients, the clock between them, and what a test does to them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_engine::ShardConfig;
use generation_node::env::CoreId;
use generation_node::peers::{PeerLimits, PeerNode, Peers, PeersConfig};
use generation_node::raft::journal::OpenError;
use generation_node::raft::replica::ReplicaError;
use generation_node::raft::shards::Shards;
use generation_node::raft::transport::PeerTransport;
use generation_node::{CoreConfig, NodeLimits, Replication, StartError};
use generation_proto::{ALPN_CLIENT, ALPN_PEER};

use crate::client::Client;
use crate::clock::NodeClock;
use crate::dice::Dice;
use crate::disk::storage::Storage;
use crate::disk::{DiskImage, DiskWeather, SimDisk};
use crate::env::SimEnv;
use crate::executor::Executor;
use crate::network::{Host, Weather};
use crate::observer::Seen;
use crate::pki::{self, Authority, ClientIdentity};
use crate::points::{Ambush, Kill};
use crate::world::{Counters, Inbox, NodeState, World, client_addr, node_addr};

/// All replicas of a core.
pub(crate) type Replicas = Shards<SimDisk, PeerTransport>;

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
    /// How its shards are replicated, if they are.
    pub replication: Option<Replication>,
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
            replication: None,
        }
    }
}

/// A simulation: nodes, clients, and the clock between them.
pub struct Sim {
    world: Rc<RefCell<World>>,
    authority: Authority,
    executor: Executor,
    /// What each node was set up with; `None` for a bare one.
    setups: Vec<Option<NodeSetup>>,
    /// By node, then by core; none of a node that is down, or bare. Not in the world, which they hold.
    peers: Vec<Vec<Peers>>,
    /// The replicas of each node, as far as its cores have started. Not in the world either.
    replicas: Rc<RefCell<Vec<Vec<Replicas>>>>,
    /// What replicas were when their nodes died, until somebody asks.
    last_words: Vec<Seen>,
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
        Self {
            world: Rc::new(RefCell::new(World::new(seed, weather))),
            authority: Authority::new(),
            executor: Executor::default(),
            setups: Vec::new(),
            peers: Vec::new(),
            replicas: Rc::default(),
            last_words: Vec::new(),
            clients: Vec::new(),
        }
    }

    /// Polls tasks that are ready in random order from now on, not in the order they became so.
    pub fn shuffle_tasks(&mut self) {
        self.executor.shuffle = Some(Dice::new(self.world.borrow_mut().dice.roll()));
    }

    /// Starts a node; returns its number.
    pub fn node(&mut self, setup: &NodeSetup) -> usize {
        let node = self.add_node(setup.cores, Some(setup.clone()));
        self.start(node);
        node
    }

    /// Adds a machine that runs no node, only what [`Sim::spawn`] gives it; returns its number.
    pub fn bare_node(&mut self, cores: CoreId) -> usize {
        let node = self.add_node(cores, None);
        self.start(node);
        node
    }

    fn add_node(&mut self, cores: CoreId, setup: Option<NodeSetup>) -> usize {
        let mut world = self.world.borrow_mut();
        let node = world.nodes.len();
        let clock = NodeClock::new(world.start);
        world.nodes.push(NodeState {
            addr: node_addr(node),
            cores: (0..cores).map(|_| Inbox::default()).collect(),
            up: false,
            frozen: false,
            stopping: false,
            running: Rc::default(),
            incarnation: 0,
            clock,
            disk: DiskWeather::default(),
            storage: Storage::default(),
            received: 0,
            dying: None,
        });
        self.setups.push(setup);
        self.peers.push(Vec::new());
        self.replicas.borrow_mut().push(Vec::new());
        node
    }

    /// Starts a node that is down.
    ///
    /// # Panics
    /// When it is up.
    pub fn start(&mut self, node: usize) {
        let (cores, incarnation, running) = {
            let mut world = self.world.borrow_mut();
            let state = &mut world.nodes[node];
            assert!(!state.up, "node {node} is up");
            state.up = true;
            state.stopping = false;
            state.incarnation += 1;
            state.running = Rc::new(Cell::new(state.cores.len() as CoreId));
            (
                state.cores.len() as CoreId,
                state.incarnation,
                Rc::clone(&state.running),
            )
        };
        let Some(setup) = self.setups[node].clone() else { return };
        let config = self.config(node, incarnation, &setup);
        for core in 0..cores {
            let (env, config, running) = (self.env(node, core), config.clone(), Rc::clone(&running));
            let peers = Peers::new(&env, &config);
            self.peers[node].push(peers.clone());
            let replicas = Rc::clone(&self.replicas);
            let task = async move {
                match generation_node::open(env.clone(), config, peers).await {
                    Ok(core) => {
                        let of_core = core.replicas().cloned();
                        replicas.borrow_mut()[node].extend(of_core);
                        core.run().await;
                    }
                    // The disk fails while it is being read: the node ends, and is started again.
                    Err(StartError::Journal(OpenError::Io { .. }) | StartError::Directory(_)) => env.die(),
                    Err(StartError::Replica(ReplicaError::Snapshots { error, .. }))
                        if error.kind() != ErrorKind::InvalidData =>
                    {
                        env.die()
                    }
                    // Nothing that happens in a run makes what is on a disk unusable.
                    Err(error) => panic!("node {}: {error}", env.node),
                }
                running.set(running.get() - 1);
            };
            self.executor.spawn(node, Box::pin(task));
        }
    }

    fn config(&self, node: usize, incarnation: u32, setup: &NodeSetup) -> CoreConfig {
        let mut secret = [0; 32];
        self.world.borrow_mut().dice.fill(&mut secret);
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
            directory: None,
        });
        CoreConfig {
            cluster: "sim".to_owned(),
            node: id,
            addr: node_addr(node),
            shards: setup.shards,
            epoch: if setup.replication.is_some() { 1 } else { incarnation },
            replication: setup.replication.clone(),
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
                incarnation: u64::from(incarnation),
                limits: setup.peer_limits.clone(),
            },
            gossip: None,
            software: "generation-sim".to_owned(),
        }
    }

    /// The environment of a core.
    pub fn env(&self, node: usize, core: CoreId) -> SimEnv {
        SimEnv {
            world: Rc::clone(&self.world),
            node,
            core,
        }
    }

    /// The peers of a core of a node that is up.
    ///
    /// # Panics
    /// When the node is down, or bare.
    pub fn peers(&self, node: usize, core: CoreId) -> Peers {
        self.peers[node][usize::from(core)].clone()
    }

    /// The replicas of a node, core by core as they have started.
    pub(crate) fn replicas(&self, node: usize) -> Vec<Replicas> {
        self.replicas.borrow()[node].clone()
    }

    /// The replicas of a node as they are.
    pub(crate) fn see(&self, node: usize) -> Vec<Seen> {
        let (at, start) = (self.elapsed(), self.starts(node));
        let replicas = self.replicas.borrow();
        let all = replicas[node].iter().flat_map(Shards::replicas);
        all.map(|(shard, replica)| Seen::new(at, node, start, shard, &replica))
            .collect()
    }

    /// What replicas were when their nodes died, since this was asked last.
    pub(crate) fn take_last_words(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.last_words)
    }

    /// Runs a task on a node until it ends or the node dies.
    pub fn spawn(&mut self, node: usize, task: impl Future<Output = ()> + 'static) {
        self.executor.spawn(node, Box::pin(task));
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
        self.counters().sent
    }

    /// What has happened, counted.
    pub fn counters(&self) -> Counters {
        self.world.borrow().counters
    }

    /// Changes the weather.
    pub fn set_weather(&mut self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.world.borrow_mut().weather);
    }

    /// Changes the weather on a node's disk.
    pub fn set_disk_weather(&mut self, node: usize, change: impl FnOnce(&mut DiskWeather)) {
        change(&mut self.world.borrow_mut().nodes[node].disk);
    }

    /// Makes the next syncs of a node's disk fail. What they should have made durable is lost in part, and the sync after them
    /// succeeds.
    pub fn fail_syncs(&mut self, node: usize, count: u64) {
        self.world.borrow_mut().nodes[node].storage.failing_syncs = count;
    }

    /// Cuts both ways between the hosts of two groups.
    pub fn partition(&mut self, one: &[Host], other: &[Host]) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Cuts the way from each of `from` to each of `to`.
    pub fn cut(&mut self, from: &[Host], to: &[Host]) {
        self.world.borrow_mut().links.cut(from, to);
    }

    /// Opens the way from each of `from` to each of `to` again, at full speed.
    pub fn mend(&mut self, from: &[Host], to: &[Host]) {
        self.world.borrow_mut().links.mend(from, to);
    }

    /// Makes datagrams from each of `from` to each of `to` take longer.
    pub fn slow_link(&mut self, from: &[Host], to: &[Host], extra: Duration) {
        self.world.borrow_mut().links.slow(from, to, extra);
    }

    /// Opens every way and slows none.
    pub fn heal(&mut self) {
        self.world.borrow_mut().links.heal();
    }

    /// Moves the wall clock (not monotonic time) of every node forward at once.
    pub fn skip_clock(&mut self, by: Duration) {
        for node in 0..self.setups.len() {
            self.step_clock(node, by.as_millis() as i64);
        }
    }

    /// Moves the wall clock of a node at once, forward or backward.
    pub fn step_clock(&mut self, node: usize, by_ms: i64) {
        self.world.borrow_mut().nodes[node].clock.step_wall(by_ms);
    }

    /// A node's wall clock, in milliseconds since the Unix epoch, and how often it was set.
    pub(crate) fn wall_clock(&self, node: usize) -> (u64, u64) {
        let world = self.world.borrow();
        let clock = &world.nodes[node].clock;
        (clock.unix_ms(world.now), clock.steps())
    }

    /// Makes a node's monotonic time, and its wall clock with it, pass faster or slower: at most by a tenth.
    pub fn set_drift(&mut self, node: usize, ppm: i64) {
        let change = |clock: &mut NodeClock, now| clock.set_drift(now, ppm);
        self.world.borrow_mut().change_clock(node, change);
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
        self.world.borrow().nodes[node].running.get() == 0
    }

    /// Whether a node runs, or ran until it stopped by itself.
    pub fn is_up(&self, node: usize) -> bool {
        self.world.borrow().nodes[node].up
    }

    /// Datagrams that reached a node's sockets.
    pub fn datagrams_received(&self, node: usize) -> u64 {
        self.world.borrow().nodes[node].received
    }

    /// How often a node was started.
    pub fn starts(&self, node: usize) -> u32 {
        self.world.borrow().nodes[node].incarnation
    }

    /// Whether a node is frozen.
    pub fn is_frozen(&self, node: usize) -> bool {
        self.world.borrow().nodes[node].frozen
    }

    /// Ends a node at once, whatever it is doing. One that is down already stays so.
    pub fn kill(&mut self, node: usize, how: Kill) {
        {
            let mut world = self.world.borrow_mut();
            let world = &mut *world;
            let state = &mut world.nodes[node];
            if !state.up {
                return;
            }
        }
        let seen = self.see(node);
        self.last_words.extend(seen);
        {
            let mut world = self.world.borrow_mut();
            let world = &mut *world;
            let state = &mut world.nodes[node];
            state.up = false;
            state.dying = None;
            world.counters.kills += 1;
            for inbox in &mut state.cores {
                *inbox = Inbox::default();
            }
            world.spawned.retain(|(of, _)| *of != node);
        }
        self.thaw(node);
        // Its tasks give up what they hold of the disk before the disk forgets it.
        self.executor.kill(node);
        self.peers[node].clear();
        let replicas = std::mem::take(&mut self.replicas.borrow_mut()[node]);
        drop(replicas);
        let mut world = self.world.borrow_mut();
        let world = &mut *world;
        let state = &mut world.nodes[node];
        match how {
            Kill::Process => state.storage.settle(),
            Kill::Power => state.storage.crash(&state.disk, &mut world.dice),
        }
        state.running.set(0);
        world.note(&[node as u64, how as u64]);
    }

    /// Stops polling a node while the world goes on: SIGSTOP, or a frozen machine where `clock_stops` too.
    pub fn freeze(&mut self, node: usize, clock_stops: bool) {
        {
            let mut world = self.world.borrow_mut();
            world.nodes[node].frozen = true;
            world.counters.freezes += 1;
            if clock_stops {
                world.change_clock(node, |clock, now| clock.set_stopped(now, true));
            }
        }
        self.executor.freeze(node);
    }

    /// Lets a frozen node go on.
    pub fn thaw(&mut self, node: usize) {
        {
            let mut world = self.world.borrow_mut();
            world.nodes[node].frozen = false;
            world.change_clock(node, |clock, now| clock.set_stopped(now, false));
        }
        self.executor.thaw(node);
    }

    /// Has something happen to a node at a named point of its code.
    pub fn ambush(&mut self, ambush: Ambush) {
        self.world.borrow_mut().ambushes.lay(ambush);
    }

    /// Kills a node at a point of its code by chance: `per_million` of the points that are passed.
    pub fn set_ambush_rate(&mut self, per_million: u64) {
        self.world.borrow_mut().ambushes.per_million = per_million;
    }

    /// Takes the ambushes at a point away.
    pub fn lift_ambush(&mut self, point: &str) {
        self.world.borrow_mut().ambushes.lift(point);
    }

    /// Takes all ambushes away.
    pub fn clear_ambushes(&mut self) {
        self.world.borrow_mut().ambushes.clear();
    }

    /// How often each named point was passed.
    pub fn points_passed(&self) -> BTreeMap<&'static str, u64> {
        self.world.borrow().ambushes.passed().clone()
    }

    /// How often a node was struck at each named point.
    pub fn points_struck(&self) -> BTreeMap<&'static str, u64> {
        self.world.borrow().ambushes.struck().clone()
    }

    /// A copy of a node's disk as it is.
    pub fn disk_image(&self, node: usize) -> DiskImage {
        DiskImage(self.world.borrow().nodes[node].storage.clone())
    }

    /// Gives a node that is down another disk.
    ///
    /// # Panics
    /// When it is up.
    pub fn replace_disk(&mut self, node: usize, image: DiskImage) {
        let state = &mut self.world.borrow_mut().nodes[node];
        assert!(!state.up, "node {node} uses its disk");
        let generation = state.storage.generation;
        state.storage = image.0;
        state.storage.settle();
        state.storage.generation = generation + 1;
    }

    /// Flips a bit of a file of a node, whether it is up or not: what was read before is not concerned.
    pub fn flip(&mut self, node: usize, path: &str, offset: u64, bit: u8) {
        self.world.borrow_mut().nodes[node].storage.flip(path, offset, bit);
    }

    /// Makes sure that something happens at `at`, so that whoever waits for that moment is asked.
    pub fn wake_at(&mut self, at: Instant) {
        self.world.borrow_mut().wake_at(None, at, Waker::noop().clone());
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
        self.wake_at(end);
        self.until(|sim| (sim.now() >= end).then_some(()));
    }

    /// Does everything that can be done at the present moment.
    fn settle(&mut self) {
        loop {
            let mut progress = self.run_tasks();
            let now = self.now();
            for number in 0..self.clients.len() {
                let arrived = std::mem::take(&mut self.world.borrow_mut().clients[number]);
                if arrived.is_empty() && !self.clients[number].is_due(now) {
                    continue;
                }
                progress |= !arrived.is_empty();
                let world = &self.world;
                self.clients[number].turn(now, arrived, |to, datagram| {
                    progress = true;
                    world.borrow_mut().send(Host::Client(number), to, datagram);
                });
            }
            if !progress {
                return;
            }
        }
    }

    /// Moves the clock to the next thing that happens. `false`: nothing will.
    fn advance(&mut self) -> bool {
        let clients = self.clients.iter().filter_map(Client::next_timeout).min();
        let mut world = self.world.borrow_mut();
        let Some(next) = world.next_event().into_iter().chain(clients).min() else {
            return false;
        };
        world.advance(next);
        true
    }

    /// Polls every task that is ready until none is. Says whether any was.
    fn run_tasks(&mut self) -> bool {
        let mut progress = false;
        loop {
            let spawned = std::mem::take(&mut self.world.borrow_mut().spawned);
            for (node, task) in spawned {
                self.executor.spawn(node, task);
            }
            match self.executor.poll_one() {
                Ok(true) => progress = true,
                Ok(false) => return progress,
                Err(node) => {
                    let how = self.world.borrow_mut().nodes[node].dying.take();
                    self.kill(node, how.expect("invariant: a crash says how"));
                    progress = true;
                }
            }
            let freezing = std::mem::take(&mut self.world.borrow_mut().freezing);
            for node in freezing {
                self.freeze(node, false);
            }
        }
    }
}
