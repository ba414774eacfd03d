//! The core reactor: one loop, one turn after another.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use generation_engine::ShardConfig;
use generation_engine::cluster::Cluster;
use generation_proto::close_code;
use generation_quic::{Driver, DriverConfig};

use crate::config::{CoreConfig, Membership, Replication};
use crate::connections::{Connections, Context};
use crate::controller::{self, Controller, Opening, kept};
use crate::dispatch::{Dispatch, Incoming, Moment, Source, owner};
use crate::env::disk::Disk as _;
use crate::env::{CoreId, Datagram, Env, Transmit};
use crate::group::{Common, News};
use crate::leadership::Leadership;
use crate::mesh::MeshMessage;
use crate::peers::{Answer, Handler, Liveness, PeerId, Peers, Request, Routed};
use crate::points;
use crate::quiescer::{self, Quiescer};
use crate::raft::joining::Placement;
use crate::raft::journal::{Identity, JournalConfig};
use crate::raft::machine::MachineConfig;
use crate::raft::runtime::{Ambient, ambient, within};
use crate::raft::shards::{Shards, ShardsConfig, ShardsError};
use crate::raft::transport::PeerTransport;
use crate::raft::wire;
use crate::replies::Replies;
use crate::streams::Streams;
use crate::view::{CONTROLLER, View, Views};

/// Rounds that the tasks of replicas get before each turn: an entry passes several of them on its way.
const ROUNDS_PER_TURN: usize = 4;

/// Bytes of a shard's log kept in memory for followers that are a little behind.
const KEPT_BYTES: usize = 4 << 20;

/// Trains of datagrams sent in one turn before what has arrived meanwhile is looked at.
const TRAINS_PER_TURN: usize = 256;

/// Messages taken from the mesh in one turn.
const MESSAGES_PER_TURN: usize = 256;

/// Turns without rest before other tasks of the core get theirs.
const TURNS_PER_YIELD: u32 = 16;

/// Why a core did not start.
pub type StartError = ShardsError;

/// Makes one core of a node: what its disk has of its shards is read back. Every core of the node is made with the same `config`.
///
/// # Panics
/// When `config` has no shards or more than the protocol allows, or the node has more than 256 cores.
pub async fn open<E: Env>(env: E, config: CoreConfig, peers: Peers) -> Result<Core<E>, StartError> {
    let ambient = ambient(env.clone());
    let groups = match &config.replication {
        None => None,
        Some(replication) => {
            let opening = open_groups(&env, &config, replication, &peers, &ambient);
            Some(within(Rc::clone(&ambient), opening).await?)
        }
    };
    Ok(Core::new(env, config, peers, ambient, groups))
}

/// Opens the journal and starts what it has replicas of.
async fn open_groups<E: Env>(
    env: &E,
    config: &CoreConfig,
    replication: &Replication,
    peers: &Peers,
    ambient: &Rc<dyn Ambient>,
) -> Result<Common<E::Disk>, StartError> {
    let (core, cores) = (env.core(), env.cores());
    let mut id = [0; 16];
    env.fill_random(&mut id);
    let (cluster, view) = match &replication.membership {
        Membership::Fixed => (Cluster::new(), View::fixed(config, cores)),
        Membership::Managed { .. } => {
            let cluster = kept::load(&env.disk()).await?;
            let view = View::of(&Arc::new(cluster.clone()));
            peers.set_nodes(&view.others(config.node));
            (cluster, view)
        }
    };
    let views = Views::new(view);
    let transport = PeerTransport::new(peers.clone(), views.clone());
    let shards_config = ShardsConfig {
        journal: JournalConfig {
            identity: Identity {
                cluster: replication.cluster,
                journal: u128::from_le_bytes(id),
                node: config.node,
                core,
                cores,
                shards: config.shards,
            },
            segment_bytes: replication.segment_bytes,
            segments: replication.segments,
            kept_bytes: KEPT_BYTES,
        },
        durability: replication.durability,
        snapshot_bytes: replication.snapshot_bytes,
    };
    let shards = Shards::open(Rc::clone(ambient), env.disk(), transport.clone(), shards_config).await?;
    let placement = Rc::new(Placement {
        node: config.node,
        views: views.clone(),
        durability: replication.durability,
        timing: replication.timing,
    });
    for shard in (0..config.shards).filter(|&shard| owner(shard, cores) == core) {
        let machine = machine_config(config, replication, shard);
        shards.settle(Rc::clone(&placement), machine).await?;
    }
    let leadership = Rc::new(Leadership::new(config.node, views.clone(), env.now()));
    let quiescer = Quiescer::new(
        config.node,
        shards.clone(),
        transport.clone(),
        peers.clone(),
        replication.timing.election_max,
        leadership.may_lead(),
    );
    let controller = match &replication.membership {
        Membership::Managed { zone } if core == 0 => {
            let bell = env.clone();
            let opening = Opening {
                config,
                replication,
                zone,
                cores,
                journal: u128::from_le_bytes(id).rotate_left(64),
                ambient: Rc::clone(ambient),
                disk: env.disk(),
                peers: peers.clone(),
                transport: transport.clone(),
                views: views.clone(),
                cluster,
                may_lead: leadership.may_lead(),
                now: env.now(),
                wake: Box::new(move || bell.wake()),
            };
            Some(Controller::open(opening).await?)
        }
        _ => None,
    };
    peers.set_handler(Rc::new(Answering {
        env: env.clone(),
        shards: shards.clone(),
        quiescer: Rc::clone(&quiescer),
        controller: controller.clone(),
    }));
    let bell = env.clone();
    Ok(Common {
        node: config.node,
        core,
        epoch: config.epoch,
        shards,
        transport,
        quiescer,
        leadership,
        news: News::new(move || bell.wake()),
        patience: replication.timing.election_max * 2,
        views,
        hints: Rc::default(),
        controller,
    })
}

/// What a shard's state begins with.
fn machine_config(config: &CoreConfig, replication: &Replication, shard: u16) -> MachineConfig {
    // Victims travel as hashes of their keys, so all replicas hash alike, and after a restart as before it.
    let seed = [replication.cluster as u64, (replication.cluster >> 64) as u64];
    MachineConfig {
        cluster: replication.cluster,
        shard: shard.into(),
        epoch: config.epoch,
        shard_config: ShardConfig { seed, ..config.shard },
        sessions: config.node_limits.sessions(),
        next_replica_id: 2,
    }
}

/// Answers the other nodes.
struct Answering<E: Env> {
    env: E,
    shards: Shards<E::Disk, PeerTransport>,
    quiescer: Rc<Quiescer<E::Disk>>,
    controller: Option<Rc<Controller<E::Disk>>>,
}

impl<E: Env> Answering<E> {
    /// Answers what is asked of the controller.
    fn request_to_controller(&self, kind: u8, payload: Bytes, answer: Answer) {
        // Dropping the answer says that nobody is here.
        let Some(controller) = self.controller.clone() else {
            return;
        };
        match kind {
            wire::kind::CONFIRM => answer.reply(controller.shards.confirm(CONTROLLER, payload)),
            controller::kind::RECORDS => answer.reply(controller.records_above(&payload)),
            controller::kind::ASK => {
                let asked = Rc::clone(&controller);
                controller
                    .shards
                    .spawn(async move { answer.reply(asked.asked(payload).await) });
            }
            _ => {
                controller.quiescer.active(CONTROLLER, self.env.now());
                let shards = controller.shards.clone();
                controller
                    .shards
                    .spawn(async move { answer.reply(shards.handle(CONTROLLER, kind, payload).await) });
            }
        }
    }

    fn message_to_controller(&self, from: PeerId, kind: u8, payload: Bytes) {
        let Some(controller) = &self.controller else { return };
        let now = self.env.now();
        match kind {
            quiescer::KIND => controller.quiescer.message(from, CONTROLLER, &payload, now),
            controller::kind::REPORT => controller.heard(from.node, payload, now),
            wire::kind::COMMIT => {
                let shards = controller.shards.clone();
                controller.shards.spawn(async move {
                    // Whoever told it waits for no answer.
                    let _ = shards.handle(CONTROLLER, kind, payload).await;
                });
            }
            _ => {}
        }
    }
}

impl<E: Env> Handler for Answering<E> {
    fn request(&self, request: Request) {
        let (shard, kind) = (request.shard, request.kind);
        let (payload, answer) = request.into_answer();
        if shard == CONTROLLER {
            return self.request_to_controller(kind, payload, answer);
        }
        if kind == wire::kind::CONFIRM {
            answer.reply(self.shards.confirm(shard, payload));
            return;
        }
        self.quiescer.active(shard, self.env.now());
        let shards = self.shards.clone();
        self.shards.spawn(async move {
            answer.reply(shards.handle(shard, kind, payload).await);
            E::Disk::point(points::ANSWERED);
        });
    }

    fn message(&self, from: PeerId, shard: u16, kind: u8, payload: Bytes) {
        if shard == CONTROLLER {
            return self.message_to_controller(from, kind, payload);
        }
        match kind {
            quiescer::KIND => self.quiescer.message(from, shard, &payload, self.env.now()),
            wire::kind::COMMIT => {
                let shards = self.shards.clone();
                self.shards.spawn(async move {
                    // Whoever told it waits for no answer.
                    let _ = shards.handle(shard, kind, payload).await;
                });
            }
            _ => {}
        }
    }

    fn liveness(&self, node: u64, change: Liveness) {
        self.quiescer.liveness(node, change, self.env.now());
        if let Some(controller) = &self.controller {
            controller.quiescer.liveness(node, change, self.env.now());
        }
    }
}

/// Runs one core of a node that is alone until it was asked to stop and has stopped.
///
/// # Panics
/// As [`open`], or if `config` asks for replication and the disk cannot be used.
pub async fn run<E: Env>(env: E, config: CoreConfig) {
    let peers = Peers::new(&env, &config);
    run_with_peers(env, config, peers).await;
}

/// As [`run`], with the peers made before: by whoever uses them too.
///
/// # Panics
/// As [`run`].
pub async fn run_with_peers<E: Env>(env: E, config: CoreConfig, peers: Peers) {
    let core = open(env, config, peers).await;
    core.expect("a core without replication reads nothing").run().await;
}

/// A stop in progress.
#[derive(Debug)]
struct Stopping {
    /// When it ends, whatever is under way.
    deadline: Instant,
    /// Leaderships are being handed over.
    handed_over: bool,
    /// The other cores were told that nothing is asked of them any more.
    told: bool,
    /// How many other cores have told so.
    others: CoreId,
    /// Connections are being closed.
    closing: bool,
}

/// What a turn works with, borrowed from the core beside its connections.
macro_rules! context {
    ($core:ident, $now:ident) => {
        &mut Context {
            now: $now,
            driver: &mut $core.driver,
            streams: &mut $core.streams,
            replies: &mut $core.replies,
            stats: &mut $core.dispatch.stats,
        }
    };
}

/// One core of a node.
pub struct Core<E: Env> {
    env: E,
    driver: Driver,
    connections: Connections,
    streams: Streams,
    replies: Replies,
    dispatch: Dispatch<E::Disk>,
    peers: Peers,
    ambient: Rc<dyn Ambient>,
    /// The replicas, if the node is replicated.
    shards: Option<Shards<E::Disk, PeerTransport>>,
    quiescer: Option<Rc<Quiescer<E::Disk>>>,
    leadership: Option<Rc<Leadership>>,
    controller: Option<Rc<Controller<E::Disk>>>,
    views: Option<Views>,
    /// The newest records, while they are being kept on this core's disk.
    keeping: Rc<RefCell<Option<Arc<Cluster>>>>,
    hints: Vec<(u16, u64, u64)>,
    config: CoreConfig,
    stopping: Option<Stopping>,
    /// Other cores that stopped before this one was asked to.
    early_drained: CoreId,
    next_sweep: Instant,
    /// A train the socket had no room for.
    unsent: Option<Transmit>,
    buffer: Vec<u8>,
    datagrams: Vec<Datagram>,
    messages: Vec<(CoreId, MeshMessage)>,
    /// Requests of other cores, which are executed before this core reads more of its own.
    incoming: Vec<Incoming>,
}

impl<E: Env> Core<E> {
    /// The replicas of its shards, if the node is replicated.
    pub fn replicas(&self) -> Option<&Shards<E::Disk, PeerTransport>> {
        self.shards.as_ref()
    }

    /// Serves until the node was asked to stop and has stopped: in-flight requests answered, connections closed.
    pub async fn run(self) {
        // What openraft is asked in a turn asks for the environment.
        within(Rc::clone(&self.ambient), self.turns()).await;
    }

    /// Lets the replicas finish what they are at, so that what all of them have to say leaves in one turn.
    async fn settle(&self) {
        if self.shards.is_some() {
            for _ in 0..ROUNDS_PER_TURN {
                self.env.yield_now().await;
            }
        }
    }

    async fn turns(mut self) {
        let mut turns = 0;
        while !self.is_done() {
            let more = self.turn();
            turns += 1;
            if !more {
                turns = 0;
                let deadline = self.next_deadline();
                self.env.park(deadline).await;
                self.settle().await;
            } else if turns >= TURNS_PER_YIELD {
                turns = 0;
                self.env.yield_now().await;
            }
        }
        if let Some(controller) = &self.controller {
            controller.shards.stop().await;
        }
        if let Some(shards) = &self.shards {
            shards.stop().await;
        }
        self.last_words();
    }

    fn new(
        env: E,
        config: CoreConfig,
        peers: Peers,
        ambient: Rc<dyn Ambient>,
        groups: Option<Common<E::Disk>>,
    ) -> Self {
        let mut seed = [0; 32];
        env.fill_random(&mut seed);
        let (core, cores) = (env.core(), env.cores());
        let driver = Driver::new(DriverConfig {
            core,
            cores,
            seed,
            secret: config.secret,
            server: Some(config.crypto.clone()),
            mtu_discovery: config.mtu_discovery,
            limits: config.quic_limits.clone(),
        });
        let view = groups.as_ref().map(|common| common.views.get());
        let mut core = Self {
            driver,
            connections: Connections::new(config.clone()),
            streams: Streams::default(),
            replies: Replies::new(cores, &config),
            dispatch: Dispatch::new(&config, core, cores, peers.clone(), groups.as_ref()),
            quiescer: groups.as_ref().map(|common| Rc::clone(&common.quiescer)),
            leadership: groups.as_ref().map(|common| Rc::clone(&common.leadership)),
            controller: groups.as_ref().and_then(|common| common.controller.clone()),
            views: groups.as_ref().map(|common| common.views.clone()),
            keeping: Rc::default(),
            hints: Vec::new(),
            shards: groups.map(|common| common.shards),
            ambient,
            peers,
            stopping: None,
            early_drained: 0,
            next_sweep: env.now() + config.node_limits.sweep_interval,
            unsent: None,
            buffer: Vec::new(),
            datagrams: Vec::new(),
            messages: Vec::new(),
            incoming: Vec::new(),
            config,
            env,
        };
        if let Some(view) = view {
            core.show(&view);
        }
        core
    }

    /// One turn. Says whether there is more to do at once.
    fn turn(&mut self) -> bool {
        let now = self.env.now();
        let now_ms = self.env.unix_ms();
        self.driver.set_unix_ms(now_ms);
        let mut more = self.receive(now);
        more |= self.receive_mesh(now);
        if self.driver.next_timeout().is_some_and(|at| at <= now) {
            self.driver.handle_timeout(now);
        }
        while let Some((key, event)) = self.driver.poll_event() {
            match self.peers.event(now, &mut self.driver, key, &event) {
                Routed::Peer => {}
                Routed::Refused => self.dispatch.stats.connections_unauthorized += 1,
                Routed::Other => self.connections.event(context!(self, now), key, &event),
            }
        }
        more |= self.peers.receive(now, now_ms, &mut self.driver);
        self.hear_controller();
        self.stop_if_asked(now);
        self.execute(now, now_ms);
        self.connections.write(context!(self, now));
        more |= self.flush_peers(now, now_ms);
        self.replies
            .flush(&self.env, &mut self.streams, &mut self.dispatch.stats);
        self.connections.tend(context!(self, now));
        if self.next_sweep <= now {
            self.next_sweep = now + self.config.node_limits.sweep_interval;
            self.dispatch.sweep(now, now_ms);
            self.tell_of_shards();
            self.tell_controller();
            self.tend_leaderships(now);
            if let Some(quiescer) = &self.quiescer {
                quiescer.tend(now);
            }
        }
        more |= self.transmit(now);
        more | self.connections.has_readable()
    }

    /// Hands what is said to other nodes to the transport. Says whether there is more to do at once.
    fn flush_peers(&mut self, now: Instant, now_ms: u64) -> bool {
        let (own, cores) = (self.env.core(), self.env.cores());
        self.peers.flush(now, now_ms, &mut self.driver, |liveness| {
            for core in (0..cores).filter(|&core| core != own) {
                self.replies.post(core, MeshMessage::Peer(liveness));
            }
        })
    }

    /// Tells the other cores what has changed about this core's shards.
    fn tell_of_shards(&mut self) {
        let changed = self.dispatch.look();
        if changed.is_empty() {
            return;
        }
        let own = self.env.core();
        for core in (0..self.env.cores()).filter(|&core| core != own) {
            self.replies.post(core, MeshMessage::Shards(changed.clone()));
        }
    }

    /// Takes in newer records, and tells the other cores.
    fn hear_controller(&mut self) {
        let (Some(controller), Some(views)) = (&self.controller, &self.views) else {
            return;
        };
        let Some(cluster) = controller.newer(views.with(|view| view.version)) else {
            return;
        };
        for core in 1..self.env.cores() {
            self.replies.post(core, MeshMessage::Cluster(Arc::clone(&cluster)));
        }
        self.set_cluster(&cluster);
    }

    /// Has the map show what there is.
    fn show(&mut self, view: &View) {
        if view.managed {
            self.dispatch.set_view(view);
            self.replies.map_epoch = view.epoch;
        }
    }

    fn set_cluster(&mut self, cluster: &Arc<Cluster>) {
        let Some(views) = &self.views else { return };
        if views.set(Arc::new(View::of(cluster))) {
            let view = views.get();
            self.peers.set_nodes(&view.others(self.config.node));
            self.show(&view);
        }
    }

    /// Keeps records on this core's disk, in the background: the newest, if there come more meanwhile.
    fn keep(&self, cluster: Arc<Cluster>) {
        let Some(shards) = &self.shards else { return };
        if self.keeping.borrow_mut().replace(cluster).is_some() {
            return;
        }
        let (keeping, disk) = (Rc::clone(&self.keeping), self.env.disk());
        shards.spawn(async move {
            loop {
                let newest = keeping.borrow().clone();
                let Some(cluster) = newest else { return };
                if let Err(error) = kept::save(&disk, &cluster).await {
                    tracing::warn!(%error, "the cluster's records cannot be kept; core 0 tells them at the next start");
                }
                let mut keeping = keeping.borrow_mut();
                if keeping
                    .as_ref()
                    .is_some_and(|newest| newest.version() == cluster.version())
                {
                    *keeping = None;
                }
            }
        });
    }

    /// Tells the controller what is led from here, and the cores what is led from elsewhere.
    fn tell_controller(&mut self) {
        let Some(controller) = &self.controller else { return };
        controller.set_led(self.dispatch.led());
        let hints = controller.hints();
        if hints != self.hints {
            for core in 1..self.env.cores() {
                self.replies.post(core, MeshMessage::Hints(hints.clone()));
            }
            self.dispatch.set_hints(&hints);
            self.hints = hints;
        }
    }

    /// Looks at the nodes and their clocks, and hands leaderships over that others should have.
    fn tend_leaderships(&mut self, now: Instant) {
        let Some(leadership) = &self.leadership else { return };
        let own = self.env.core();
        if own == 0 {
            let mut clocks = leadership.clocks();
            clocks.judge(self.config.node, &self.peers.clock_offsets(now));
            if clocks != leadership.clocks() {
                for core in 1..self.env.cores() {
                    self.replies.post(core, MeshMessage::Clocks(clocks.clone()));
                }
                if let Some(controller) = &self.controller {
                    controller.set_clocks(clocks.clone());
                }
                leadership.set_clocks(clocks);
            }
        }
        leadership.look(now, |node| self.peers.is_alive(node));
        if self.stopping.is_none() {
            self.dispatch.tend_leaderships(now);
        }
    }

    /// Takes datagrams off the socket. Says whether there may be more.
    fn receive(&mut self, now: Instant) -> bool {
        let limit = self.config.node_limits.datagrams_per_turn;
        let count = self.env.receive(limit, &mut self.datagrams);
        self.dispatch.stats.datagrams_received += count as u64;
        self.dispatch.stats.turns += u64::from(count > 0);
        for datagram in self.datagrams.drain(..) {
            let Datagram {
                remote,
                local_ip,
                ecn,
                payload,
            } = datagram;
            if let Err(misrouted) = self.driver.handle_datagram(now, remote, local_ip, ecn, payload) {
                let payload = misrouted.payload;
                let message = MeshMessage::Datagram(Datagram {
                    remote,
                    local_ip,
                    ecn,
                    payload,
                });
                // A full queue loses it as a full socket would; QUIC repairs that.
                match self.env.mesh_send(misrouted.core, message) {
                    Ok(()) => self.dispatch.stats.datagrams_forwarded += 1,
                    Err(_) => self.dispatch.stats.datagrams_dropped += 1,
                }
            }
        }
        count == limit
    }

    fn receive_mesh(&mut self, now: Instant) -> bool {
        let count = self.env.mesh_receive(MESSAGES_PER_TURN, &mut self.messages);
        let mut newer = None;
        for (core, message) in self.messages.drain(..) {
            match message {
                MeshMessage::Datagram(Datagram {
                    remote,
                    local_ip,
                    ecn,
                    payload,
                }) => {
                    if self
                        .driver
                        .handle_datagram(now, remote, local_ip, ecn, payload)
                        .is_err()
                    {
                        self.dispatch.stats.datagrams_dropped += 1;
                    }
                }
                MeshMessage::Requests(requests) => {
                    self.dispatch.stats.requests_of_other_cores += requests.len() as u64;
                    self.incoming.extend(requests.into_iter().map(|request| Incoming {
                        source: Source::Mesh {
                            core,
                            ticket: request.ticket,
                        },
                        arrival: now,
                        deadline: request.deadline,
                        frame: request.frame,
                    }));
                }
                MeshMessage::Replies(replies) => self.replies.answered(&mut self.streams, core, replies),
                MeshMessage::Peer(liveness) => self.peers.liveness(now, &mut self.driver, liveness),
                MeshMessage::Shards(views) => self.dispatch.told(views),
                MeshMessage::Clocks(clocks) => {
                    if let Some(leadership) = &self.leadership {
                        leadership.set_clocks(clocks);
                    }
                }
                MeshMessage::Cluster(cluster) => newer = Some(cluster),
                MeshMessage::Hints(hints) => self.dispatch.set_hints(&hints),
                MeshMessage::Drained => {
                    if let Some(stopping) = &mut self.stopping {
                        stopping.others += 1;
                    } else {
                        self.early_drained += 1;
                    }
                }
            }
        }
        if let Some(cluster) = newer {
            self.set_cluster(&cluster);
            self.keep(cluster);
        }
        count == MESSAGES_PER_TURN
    }

    /// Reads and executes this turn's requests.
    fn execute(&mut self, now: Instant, now_ms: u64) {
        let limit = self.config.node_limits.requests_per_turn;
        self.connections.read(context!(self, now), &mut self.incoming, limit);
        self.dispatch.expire(now);
        if self.incoming.is_empty() && !self.dispatch.has_news() {
            return;
        }
        self.dispatch
            .stats
            .add_driver(&self.driver.stats(), self.driver.connections());
        self.dispatch.stats.streams = self.streams.len() as u64;
        let moment = Moment {
            now,
            now_ms,
            stopping: self.stopping.is_some(),
        };
        let closing = &mut self.connections.closing;
        self.dispatch
            .turn(moment, &self.incoming, &mut self.streams, &mut self.replies, closing);
        self.incoming.clear();
    }

    /// Flushes every connection that has something to say. Says whether there is more to send at once.
    fn transmit(&mut self, now: Instant) -> bool {
        for _ in 0..TRAINS_PER_TURN {
            let transmit = match self.unsent.take() {
                Some(transmit) => transmit,
                None => match self.driver.poll_transmit(now, &mut self.buffer) {
                    Some(transmit) => Transmit {
                        remote: transmit.remote,
                        local_ip: transmit.local_ip,
                        ecn: transmit.ecn,
                        segment_size: transmit.segment_size,
                    },
                    None => return false,
                },
            };
            if !self.env.transmit(&transmit, &self.buffer) {
                // The environment wakes us when the socket has room.
                self.unsent = Some(transmit);
                return false;
            }
            self.dispatch.stats.trains_sent += 1;
            self.dispatch.stats.sent_bytes += self.buffer.len() as u64;
        }
        true
    }

    fn next_deadline(&self) -> Option<Instant> {
        let stop = self.stopping.as_ref().map(|stopping| stopping.deadline);
        [
            self.driver.next_timeout(),
            self.connections.next_deadline(),
            self.peers.next_deadline(),
            self.dispatch.next_deadline(),
            stop,
            Some(self.next_sweep),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Moves a stop on: refuse what is new, wait for what is under way, close.
    fn stop_if_asked(&mut self, now: Instant) {
        if !self.env.stopping() {
            return;
        }
        let deadline = now + self.config.node_limits.drain;
        let early = self.early_drained;
        let stopping = self.stopping.get_or_insert(Stopping {
            deadline,
            handed_over: false,
            told: false,
            others: early,
            closing: false,
        });
        self.driver.refuse_new();
        if let Some(shards) = self
            .shards
            .clone()
            .filter(|_| !std::mem::replace(&mut stopping.handed_over, true))
        {
            let handing = shards.clone();
            shards.spawn(async move { handing.hand_over().await });
            if let Some(controller) = &self.controller {
                let handing = controller.shards.clone();
                controller.shards.spawn(async move { handing.hand_over().await });
            }
        }
        let late = stopping.deadline <= now;
        if !stopping.told && self.replies.is_idle() {
            stopping.told = true;
            let own = self.env.core();
            for core in (0..self.env.cores()).filter(|&core| core != own) {
                self.replies.post(core, MeshMessage::Drained);
            }
        }
        if !stopping.closing && (late || (stopping.told && self.connections.is_quiet(&mut self.streams))) {
            stopping.closing = true;
            // Acknowledgements of last replies get as long again.
            stopping.deadline = deadline;
            self.connections
                .close_all(close_code::SHUTTING_DOWN, "the node is stopping");
        }
    }

    fn is_done(&self) -> bool {
        let Some(stopping) = &self.stopping else { return false };
        let late = stopping.deadline <= self.env.now();
        let alone = stopping.others + 1 >= self.env.cores() && self.replies.is_idle() && self.dispatch.is_idle();
        stopping.closing && (late || (alone && self.connections.len() == 0 && self.connections.closing.is_empty()))
    }

    /// Sends the closing packets.
    fn last_words(&mut self) {
        let now = self.env.now();
        self.connections
            .close_all(close_code::SHUTTING_DOWN, "the node is stopping");
        self.connections.close_at_once(context!(self, now));
        self.peers.shut_down(now, &mut self.driver);
        self.transmit(now);
    }
}
