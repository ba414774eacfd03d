//! The controller: group 0, which keeps the cluster's records, and every node's copy of them.
//!
//! Its replicas live on core 0 of up to five nodes, in a directory and a journal of their own that are always `sync`. Its leader plans what
//! to change and answers administrators (`asking`); every node, member or not, brings its copy up to date from any member, keeps it on
//! the disks of its cores, and makes its [`View`] of it.
//!
//! # What holds
//! - A record is changed by compare-and-swap on its version alone, so two leaders that do not know of each other change nothing twice.
//! - A node's copy only moves forward. What it knows is never less than what it said it knows, before and after a restart.
//! - A node that belongs to no cluster forms nothing and joins nothing by itself: an administrator has it found a cluster or take part in
//!   one.
//! - Reports of the others are hints: what must be so is read from records and groups.
//!
//! Not here: what to change (`generation_engine::cluster`), how replicas get to where records say (`raft::joining`).

mod asking;
mod gossiping;
pub(crate) mod kept;
mod planning;
pub(crate) mod report;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_engine::batch::{BatchWriter, Operation};
use generation_engine::cluster::{Cluster, Step};
use generation_engine::machine::Reply;
use generation_engine::{Command, Condition, Cursor, Outcome as Applied, Policy, ShardConfig, Version};
use generation_proto::cluster::{NodeInfo, Progress};
use openraft_rt::{AsyncRuntime as _, Instant as _, Oneshot as _, OneshotSender as _};

use crate::clocks::Clocks;
use crate::config::{CoreConfig, Replication};
use crate::env::CoreId;
use crate::env::disk::Disk;
use crate::env::rooted::Rooted;
use crate::peers::{PeerId, Peers};
use crate::quiescer::Quiescer;
use crate::raft::joining::Placement;
use crate::raft::journal::{Identity, JournalConfig};
use crate::raft::machine::{MachineConfig, SessionLimits};
use crate::raft::replica::{Outcome, Replica};
use crate::raft::runtime::{Ambient, CoreInstant, LocalOneshot, Runtime};
use crate::raft::shards::{Durability, Shards, ShardsConfig, ShardsError};
use crate::raft::transport::PeerTransport;
use crate::view::{CONTROLLER, View, Views};
pub(crate) use asking::Answer;
use gossiping::Gossiping;
use report::{Led, Report};

/// Where its replica's files lie, below the directory of core 0.
const DIRECTORY: &str = "controller";

/// Bytes of a segment of its journal, and how many there are at most.
const SEGMENT_BYTES: u64 = Replication::MIN_SEGMENT_BYTES;
const SEGMENTS: usize = 8;

/// Bytes of records: far more than any cluster has.
const BUDGET_BYTES: u64 = 256 << 20;

/// Longest record.
const MAX_RECORD_BYTES: usize = 256 << 10;

/// How often everything is looked at.
const STEP: Duration = Duration::from_millis(100);

/// How often the others are told where nothing has changed.
const REPORT: Duration = Duration::from_secs(1);

/// How often a member is asked for records where nobody has said that there are newer ones.
const PULL: Duration = Duration::from_secs(2);

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked whether something is over.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a record may take to be written.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);

/// What is asked of another node's core 0 under the controller's number, beside what replicas say.
pub(crate) mod kind {
    /// u64 version: the records above it.
    pub(crate) const RECORDS: u8 = 70;
    /// u8 verb, body: what an administrator asks.
    pub(crate) const ASK: u8 = 71;
    /// A report. A message without an answer.
    pub(crate) const REPORT: u8 = 72;
}

/// A node, as it was started.
#[derive(Debug, Clone)]
struct Own {
    info: NodeInfo,
    seed: [u64; 2],
    epoch: u32,
}

impl Own {
    fn new(config: &CoreConfig, replication: &Replication, zone: &str, cores: CoreId) -> Self {
        Self {
            info: NodeInfo {
                node: config.node,
                directory: config.peers.directory,
                cluster_id: replication.cluster,
                cluster: config.cluster.clone(),
                records: 0,
                addr: config.addr,
                zone: zone.to_owned(),
                cores,
                shards: config.shards,
                is_managed: true,
            },
            seed: [replication.cluster as u64, (replication.cluster >> 64) as u64],
            epoch: config.epoch,
        }
    }
}

/// What a node was heard to say.
#[derive(Debug)]
struct Heard {
    at: Instant,
    report: Report,
}

/// See the module's documentation. It lives on core 0.
pub(crate) struct Controller<D: Disk> {
    own: Own,
    peers: Peers,
    views: Views,
    disk: D,
    pub(crate) shards: Shards<Rooted<D>, PeerTransport>,
    pub(crate) quiescer: Rc<Quiescer<Rooted<D>>>,
    cluster: RefCell<Cluster>,
    /// The version that the cores were told of last.
    told: Cell<u64>,
    /// The records are being kept on the disk.
    saving: Cell<bool>,
    heard: RefCell<BTreeMap<u64, Heard>>,
    /// The shards led from this node.
    led: RefCell<Vec<Led>>,
    reported: RefCell<(Instant, Report)>,
    pulled: Cell<Instant>,
    /// The last entry of its group that was taken into the copy.
    read: Cell<u64>,
    planned: Cell<Instant>,
    introduced: Cell<Instant>,
    introducing: Cell<bool>,
    clocks: RefCell<Clocks>,
    gossiping: Gossiping,
    /// Since when nothing is heard of a node.
    silent: RefCell<BTreeMap<u64, Instant>>,
    progress: RefCell<Progress>,
    wake: Box<dyn Fn()>,
}

impl<D: Disk> std::fmt::Debug for Controller<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("version", &self.cluster.borrow().version())
            .finish_non_exhaustive()
    }
}

/// What a controller is opened with.
pub(crate) struct Opening<'a, D: Disk> {
    pub(crate) config: &'a CoreConfig,
    pub(crate) replication: &'a Replication,
    pub(crate) zone: &'a str,
    pub(crate) cores: CoreId,
    /// Drawn for the journal, if it begins now.
    pub(crate) journal: u128,
    pub(crate) ambient: Rc<dyn Ambient>,
    pub(crate) disk: D,
    pub(crate) peers: Peers,
    pub(crate) transport: PeerTransport,
    pub(crate) views: Views,
    /// What was kept.
    pub(crate) cluster: Cluster,
    pub(crate) may_lead: Rc<Cell<bool>>,
    pub(crate) now: Instant,
    pub(crate) wake: Box<dyn Fn()>,
}

impl<D: Disk> Controller<D> {
    /// Opens the journal, and the replica if there is one.
    pub(crate) async fn open(opening: Opening<'_, D>) -> Result<Rc<Self>, ShardsError> {
        let Opening {
            config,
            replication,
            zone,
            cores,
            journal,
            ambient,
            disk,
            peers,
            transport,
            views,
            cluster,
            may_lead,
            now,
            wake,
        } = opening;
        let shards_config = ShardsConfig {
            journal: JournalConfig {
                identity: Identity {
                    cluster: replication.cluster,
                    journal,
                    node: config.node,
                    core: 0,
                    cores: 1,
                    shards: 1,
                },
                segment_bytes: SEGMENT_BYTES,
                segments: SEGMENTS,
                kept_bytes: SEGMENT_BYTES as usize,
            },
            durability: Durability::Sync,
            snapshot_bytes: SEGMENT_BYTES * 2,
        };
        let own_disk = Rooted::open(disk.clone(), DIRECTORY).await?;
        let shards = Shards::open(ambient, own_disk, transport.clone(), shards_config).await?;
        let quiescer = Quiescer::new(
            config.node,
            shards.clone(),
            transport,
            peers.clone(),
            replication.timing.election_max,
            may_lead,
        );
        let controller = Rc::new(Self {
            own: Own::new(config, replication, zone, cores),
            peers,
            views: views.clone(),
            disk,
            shards,
            quiescer,
            told: Cell::new(cluster.version()),
            saving: Cell::new(false),
            cluster: RefCell::new(cluster),
            heard: RefCell::default(),
            led: RefCell::default(),
            reported: RefCell::new((now, Report::default())),
            pulled: Cell::new(now),
            read: Cell::new(0),
            planned: Cell::new(now),
            introduced: Cell::new(now),
            introducing: Cell::new(false),
            clocks: RefCell::default(),
            gossiping: Gossiping::new(config.gossip.clone()),
            silent: RefCell::default(),
            progress: RefCell::default(),
            wake,
        });
        if !controller.shards.resident().is_empty() && controller.cluster.borrow().controller().is_none() {
            // It died while it was founding a cluster.
            controller.stand_alone();
        }
        let placement = Rc::new(Placement {
            node: config.node,
            views,
            durability: Durability::Sync,
            timing: replication.timing,
        });
        controller
            .shards
            .settle(placement, controller.machine(config.epoch))
            .await?;
        let running = Rc::clone(&controller);
        controller.shards.spawn(async move { running.run().await });
        Ok(controller)
    }

    fn machine(&self, epoch: u32) -> MachineConfig {
        MachineConfig {
            cluster: self.own.info.cluster_id,
            shard: CONTROLLER.into(),
            epoch,
            shard_config: ShardConfig {
                budget_bytes: BUDGET_BYTES,
                max_records: None,
                policy: Policy::NoEvict,
                seed: self.own.seed,
                max_value_bytes: MAX_RECORD_BYTES,
            },
            sessions: SessionLimits::default(),
            next_replica_id: 2,
        }
    }

    /// Has this node be the only member of the controller, until the records say otherwise.
    fn stand_alone(&self) {
        let node = self.own.info.node;
        let mut view = View::clone(&self.views.get());
        view.managed = true;
        view.controller = vec![node];
        view.moved.remove(&CONTROLLER);
        self.views.replace(view);
    }

    /// The replica here, if this node is a member.
    fn replica(&self) -> Option<Replica<Rooted<D>, PeerTransport>> {
        self.shards.replica(CONTROLLER)
    }

    /// Has core 0 take a turn.
    pub(crate) fn wake(&self) {
        (self.wake)();
    }

    /// Whether this node leads the controller.
    pub(crate) fn leads(&self) -> bool {
        self.replica().is_some_and(|replica| replica.leads())
    }

    async fn run(self: Rc<Self>) {
        while !self.shards.journal().is_stopped() {
            self.step().await;
            Runtime::sleep(STEP).await;
        }
    }

    async fn step(self: &Rc<Self>) {
        let now = CoreInstant::now().get();
        self.read_group();
        if self.replica().is_none() {
            self.pull_if_due(now).await;
        }
        self.hand_out().await;
        self.gossip();
        self.report(now);
        self.quiescer.tend(now);
        self.watch(now);
        if self.leads() {
            self.plan(now).await;
        } else {
            self.progress.replace(Progress::default());
        }
        self.introduce(now);
    }

    /// Takes what the group has applied into the copy.
    fn read_group(&self) {
        let Some(replica) = self.replica() else { return };
        let Some(applied) = replica.machine().applied() else {
            return;
        };
        if self.read.replace(applied.index) == applied.index {
            return;
        }
        let mut cluster = self.cluster.borrow_mut();
        let known = cluster.version();
        let mut newer: Vec<(u64, Vec<u8>, Vec<u8>)> = Vec::new();
        replica.machine().with(|machine| {
            let visit = |key: &[u8], entry: generation_engine::EntryRef<'_>| {
                let version = u64::from(entry.version);
                if version > known {
                    newer.push((version, key.to_vec(), entry.value.to_vec()));
                }
            };
            let rest = machine
                .shard()
                .scan(Cursor::START, b"", usize::MAX, usize::MAX, usize::MAX, visit);
            debug_assert!(rest.is_none(), "the records are read whole");
        });
        newer.sort_unstable();
        for (version, key, value) in newer {
            if let Err(error) = cluster.apply(&key, &value, version) {
                tracing::error!(%error, "a record of the controller cannot be read");
                return;
            }
        }
    }

    /// Tells the cores of newer records, once they are kept.
    async fn hand_out(&self) {
        while self.saving.get() {
            Runtime::sleep(PAUSE).await;
        }
        if self.cluster.borrow().version() <= self.told.get() {
            return;
        }
        let cluster = self.cluster.borrow().clone();
        self.saving.set(true);
        let saved = kept::save(&self.disk, &cluster).await;
        self.saving.set(false);
        if let Err(error) = saved {
            tracing::error!(%error, "the cluster's records cannot be kept; it is tried again");
            return;
        }
        self.told.set(cluster.version());
        (self.wake)();
    }

    /// The newest records that are kept, if they are newer than `known`.
    pub(crate) fn newer(&self, known: u64) -> Option<Arc<Cluster>> {
        let cluster = self.cluster.borrow();
        let told = self.told.get();
        (told > known && cluster.version() == told).then(|| Arc::new(cluster.clone()))
    }

    /// What this node leads, for the others.
    pub(crate) fn set_led(&self, led: Vec<Led>) {
        self.led.replace(led);
    }

    /// What was found out about the clocks of the nodes.
    pub(crate) fn set_clocks(&self, clocks: Clocks) {
        self.clocks.replace(clocks);
    }

    fn own_report(&self) -> Report {
        let mut led = self.led.borrow().clone();
        if let Some(replica) = self.replica().filter(Replica::leads) {
            led.push(led_by(CONTROLLER, &replica, 0));
        }
        Report {
            records: self.told.get(),
            silent: self.silent.borrow().keys().copied().collect(),
            led,
        }
    }

    fn report(&self, now: Instant) {
        let report = self.own_report();
        let mut reported = self.reported.borrow_mut();
        if reported.1 == report && now.saturating_duration_since(reported.0) < REPORT {
            return;
        }
        let bytes = report.encode();
        *reported = (now, report);
        // Where nodes gossip, the others hear there what they need.
        let listeners = if self.gossiping.is_on() {
            self.others_in_controller()
        } else {
            self.others()
        };
        for node in listeners {
            let to = PeerId { node, core: 0 };
            // It is repeated.
            let _ = self.peers.send_along(to, CONTROLLER, kind::REPORT, bytes.clone());
        }
    }

    fn others(&self) -> Vec<u64> {
        let own = self.own.info.node;
        self.views
            .with(|view| view.members.keys().copied().filter(|node| *node != own).collect())
    }

    fn others_in_controller(&self) -> Vec<u64> {
        let own = self.own.info.node;
        let members: Vec<u64> = self.views.with(|view| view.controller.clone());
        members.into_iter().filter(|node| *node != own).collect()
    }

    /// Takes in what another node says.
    pub(crate) fn heard(&self, from: u64, payload: Bytes, at: Instant) {
        if let Some(report) = Report::decode(payload) {
            self.heard.borrow_mut().insert(from, Heard { at, report });
        }
    }

    /// Who leads what on the other nodes, as far as they have said so lately: shard, term, node.
    pub(crate) fn hints(&self) -> Vec<(u16, u64, u64)> {
        let heard = self.heard.borrow();
        let hints = heard.iter().flat_map(|(node, heard)| {
            let led = heard.report.led.iter();
            led.map(|led| (led.shard, led.term, *node))
        });
        let mut hints: Vec<(u16, u64, u64)> = hints.filter(|(shard, ..)| *shard != CONTROLLER).collect();
        self.gossiping.hints(&mut hints);
        hints
    }

    /// Asks a member for newer records, if anybody has them or nothing was asked for long.
    async fn pull_if_due(&self, now: Instant) {
        let version = self.cluster.borrow().version();
        let heard = self.gossiping.newest_records() > version
            || self.heard.borrow().values().any(|heard| heard.report.records > version);
        if !heard && now.saturating_duration_since(self.pulled.get()) < PULL {
            return;
        }
        self.pulled.set(now);
        let alive = self
            .others_in_controller()
            .into_iter()
            .filter(|node| self.peers.is_alive(*node));
        for node in alive {
            let to = PeerId { node, core: 0 };
            let payload = Bytes::copy_from_slice(&version.to_le_bytes());
            let deadline = now + PATIENCE;
            let Ok(records) = self.peers.call(to, CONTROLLER, kind::RECORDS, payload, deadline).await else {
                continue;
            };
            match self.cluster.borrow_mut().apply_delta(&records) {
                Ok(_) => return,
                Err(error) => tracing::error!(node, %error, "records of another node cannot be read"),
            }
        }
    }

    /// The records above a version, for another node.
    pub(crate) fn records_above(&self, payload: &[u8]) -> Bytes {
        let since = payload.try_into().map_or(0, u64::from_le_bytes);
        self.cluster.borrow().encode_delta(since).into()
    }

    /// Notes since when nothing is heard of which node.
    fn watch(&self, now: Instant) {
        let mut silent = self.silent.borrow_mut();
        let others = self.others();
        silent.retain(|node, _| others.contains(node));
        self.heard.borrow_mut().retain(|node, _| others.contains(node));
        for node in others {
            if self.peers.is_alive(node) {
                silent.remove(&node);
            } else {
                silent.entry(node).or_insert(now);
            }
        }
    }

    /// Changes records, in order, each if its version is as expected; stops at the first that is not. How many were changed.
    async fn change(&self, changes: Vec<Step>) -> Result<usize, Unwritten> {
        let Some(replica) = self.replica().filter(Replica::leads) else {
            return Err(Unwritten::NotLeader);
        };
        self.quiescer.asked(CONTROLLER, CoreInstant::now().get());
        let mut done = 0;
        for step in changes {
            let mut batch = BatchWriter::new();
            let condition = match step.expected_version {
                0 => Condition::IfAbsent,
                version => Condition::IfVersion(Version::from(version)),
            };
            let put = Command::Put {
                key: &step.key,
                value: &step.value,
                expires_at_ms: 0,
                condition,
            };
            batch
                .push(&Operation::Command {
                    command: put,
                    session: None,
                })
                .map_err(|_| Unwritten::TooLong)?;
            let time_ms = replica.machine().with(|machine| machine.shard().shard_time_ms());
            let (sender, receiver) = LocalOneshot::channel();
            replica.propose(batch.finish(time_ms).into(), move |outcome| {
                // Who asked has gone.
                let _ = sender.send(outcome);
            });
            match Runtime::timeout(WRITE_PATIENCE, receiver).await {
                Ok(Ok(Outcome::Applied { replies, .. })) => match replies.replies.first() {
                    Some(Reply::Outcome(Applied::Applied { .. })) => done += 1,
                    _ => break,
                },
                Ok(Ok(Outcome::NotProposed(_))) => return Err(Unwritten::NotLeader),
                Ok(Ok(Outcome::InDoubt) | Err(_)) | Err(_) => return Err(Unwritten::InDoubt),
            }
        }
        self.read_group();
        Ok(done)
    }
}

/// Why a record was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unwritten {
    #[error("this node does not lead the controller")]
    NotLeader,
    #[error("no majority of the controller's replicas has answered; ask again")]
    InDoubt,
    #[error("the record is too long")]
    TooLong,
}

/// A shard as its leader sees it.
pub(crate) fn led_by<D: Disk>(shard: u16, replica: &Replica<D, PeerTransport>, bytes: u64) -> Led {
    let members = replica.members();
    let nodes = |votes: bool| -> BTreeSet<u64> {
        let those = members
            .all
            .iter()
            .filter(|(id, _)| members.voters.contains(id) == votes);
        those.map(|(_, place)| place.node).collect()
    };
    let voters = nodes(true);
    Led {
        shard,
        term: replica.term(),
        bytes,
        changing: members.changing,
        learners: nodes(false).difference(&voters).copied().collect(),
        voters,
    }
}
