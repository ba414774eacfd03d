//! All replicas of one core, with the journal they share, and what must be seen to from time to time.
//!
//! # What holds
//! - A snapshot is taken of the shard that keeps the journal from using its oldest file again, in good time, and of a shard whose log has
//!   grown past what a restart should have to read and past the image itself.
//! - Of a shard whose newest snapshot was found damaged another is taken at once: its state is what it was.
//! - A replica that has ended is said to have, once, and left alone until the node is restarted.
//! - In memory, nothing is left of an earlier start.
//! - After the journal has failed, leaderships are handed over, and the replicas are stopped: they acknowledge nothing, answer nobody
//!   and come back when the node was restarted and has read what is on its disk.
//!
//! Not here: which replicas a core has, what clients ask of them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use openraft_rt::AsyncRuntime as _;

use super::joining::Placed;
pub use super::journal::Space;
use super::journal::{Journal, JournalConfig, OpenError};
use super::network::Transport;
use super::replica::{Ended, Replica, ReplicaConfig, ReplicaError};
use super::runtime::{Ambient, Runtime, within};
use super::snapshot;
use super::types::ReplicaId;
use super::wire;
use crate::env::disk::Disk;

/// How often the replicas are seen to.
const TEND: Duration = Duration::from_millis(50);

/// How long a hand-over may take after the journal has failed.
const FAREWELL: Duration = Duration::from_secs(1);

/// What an acknowledged write has survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// It is on the disks of a majority.
    #[default]
    Sync,
    /// It is in the memory of a majority. A node that restarts has nothing and joins again as another replica.
    Memory,
}

/// What all replicas of a core have in common.
#[derive(Debug, Clone)]
pub struct ShardsConfig {
    /// The journal's place and size.
    pub journal: JournalConfig,
    /// What acknowledged means.
    pub durability: Durability,
    /// Bytes a shard's log must have grown by before a snapshot is taken, unless the journal needs room.
    pub snapshot_bytes: u64,
}

/// Why a core's replicas were not started.
#[derive(Debug, thiserror::Error)]
pub enum ShardsError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// A replica.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The directory.
    #[error("cannot look through the core's directory: {0}")]
    Directory(#[from] io::Error),
}

pub(super) struct Inner<D: Disk, T> {
    pub(super) ambient: Rc<dyn Ambient>,
    pub(super) disk: D,
    pub(super) transport: T,
    journal: Journal<D>,
    replicas: RefCell<BTreeMap<u16, Replica<D, T>>>,
    /// The shards of this core, whether they have a replica here or not.
    pub(super) placed: RefCell<BTreeMap<u16, Rc<Placed>>>,
    /// Nodes that are being let in, by shard.
    pub(super) admissions: RefCell<BTreeSet<(u16, u64)>>,
    /// Shards whose members are being changed by this node.
    pub(super) changes: RefCell<BTreeSet<u16>>,
    snapshot_bytes: u64,
}

/// A core's replicas. Clones are the same.
pub struct Shards<D: Disk, T>(pub(super) Rc<Inner<D, T>>);

impl<D: Disk, T> Clone for Shards<D, T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Disk, T> std::fmt::Debug for Shards<D, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shards")
            .field("journal", &self.0.journal)
            .finish_non_exhaustive()
    }
}

impl<D: Disk, T: Transport> Shards<D, T> {
    /// Opens the journal. Replicas are [started](Shards::start) one by one.
    pub async fn open(
        ambient: Rc<dyn Ambient>,
        disk: D,
        transport: T,
        config: ShardsConfig,
    ) -> Result<Self, ShardsError> {
        let journal = match config.durability {
            Durability::Sync => Journal::open(Rc::clone(&ambient), disk.clone(), config.journal).await?,
            Durability::Memory => {
                snapshot::remove_all(&disk).await?;
                Journal::memory(Rc::clone(&ambient), config.journal)
            }
        };
        let shards = Self(Rc::new(Inner {
            ambient: Rc::clone(&ambient),
            disk,
            transport,
            journal,
            replicas: RefCell::default(),
            placed: RefCell::default(),
            admissions: RefCell::default(),
            changes: RefCell::default(),
            snapshot_bytes: config.snapshot_bytes,
        }));
        let tending = shards.clone();
        shards.spawn(async move { tending.tend().await });
        Ok(shards)
    }

    /// The replicas the journal has something of: shard and replica.
    pub fn resident(&self) -> Vec<(u32, ReplicaId)> {
        self.0.journal.replicas()
    }

    /// Starts a replica with what the journal and the disk have of it, in the place of another of its shard that was here.
    pub async fn start(&self, config: ReplicaConfig) -> Result<Replica<D, T>, ReplicaError> {
        let shard = config.machine.shard as u16;
        let inner = &*self.0;
        let (ambient, disk) = (Rc::clone(&inner.ambient), inner.disk.clone());
        let replica = Replica::start(ambient, &inner.journal, disk, inner.transport.clone(), config).await?;
        inner.replicas.borrow_mut().insert(shard, replica.clone());
        Ok(replica)
    }

    /// Stops a shard's replica for good: it does not belong to the group any more.
    pub async fn retire(&self, shard: u16) {
        let replica = self.0.replicas.borrow_mut().remove(&shard);
        if let Some(replica) = replica {
            replica.stop().await;
        }
        self.0.journal.retire(u32::from(shard));
    }

    /// The replica of a shard.
    pub fn replica(&self, shard: u16) -> Option<Replica<D, T>> {
        self.0.replicas.borrow().get(&shard).cloned()
    }

    /// All of them, by shard.
    pub fn replicas(&self) -> Vec<(u16, Replica<D, T>)> {
        let replicas = self.0.replicas.borrow();
        replicas
            .iter()
            .map(|(shard, replica)| (*shard, replica.clone()))
            .collect()
    }

    /// Runs a task of these replicas' on their core.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let ambient = &self.0.ambient;
        ambient.spawn(Box::pin(within(Rc::clone(ambient), task)));
    }

    /// Whether the journal takes proposals.
    pub fn space(&self) -> Space {
        self.0.journal.space()
    }

    /// What has failed, if anything did: nothing is acknowledged any more.
    pub fn failure(&self) -> Option<Rc<str>> {
        self.0.journal.failure()
    }

    /// The journal.
    pub fn journal(&self) -> &Journal<D> {
        &self.0.journal
    }

    /// Answers a request of another node's.
    pub async fn handle(&self, shard: u16, kind: u8, payload: Bytes) -> Bytes {
        if kind == wire::kind::JOIN {
            return self.join(shard, payload).await;
        }
        match self.replica(shard) {
            Some(replica) => replica.handle(kind, payload).await,
            None => wire::reply(None::<&()>),
        }
    }

    /// Answers a leader of another node's that asks whether it still leads a shard.
    pub fn confirm(&self, shard: u16, payload: Bytes) -> Bytes {
        match self.replica(shard) {
            Some(replica) => replica.confirm_to(payload),
            None => wire::reply(None::<&()>),
        }
    }

    /// Stops the replicas, then the journal.
    pub async fn stop(&self) {
        for (_, replica) in self.replicas() {
            // One that does not end has lost its journal.
            let _ = Runtime::timeout(FAREWELL, replica.stop()).await;
        }
        self.0.journal.stop();
    }

    /// Hands every leadership to a follower that is as far, where there is one.
    pub async fn hand_over(&self) {
        for (_, replica) in self.replicas() {
            if let Some(heir) = replica.heir(|place| self.0.transport.is_alive(place.node)) {
                // It may hang with the journal, or have stopped.
                let _ = Runtime::timeout(FAREWELL, replica.raft().trigger().transfer_leader(heir)).await;
            }
        }
    }

    async fn tend(&self) {
        let mut told = BTreeSet::new();
        loop {
            Runtime::sleep(TEND).await;
            if self.0.journal.is_stopped() {
                return;
            }
            if self.failure().is_some() {
                return self.withdraw().await;
            }
            self.review();
            let mut replicas = self.replicas();
            for (shard, replica) in replicas.extract_if(.., |(_, replica)| replica.has_ended()) {
                let id = replica.config().id;
                let ended = replica.ended().filter(|ended| *ended != Ended::Stopped);
                if let (Some(ended), true) = (ended, told.insert((shard, id))) {
                    tracing::error!(shard, replica = id, %ended, "a replica has ended: restart the node to have it back");
                }
            }
            let busy = |shard: u32| {
                let replica = replicas.iter().find(|(number, _)| u32::from(*number) == shard);
                replica.is_none_or(|(_, replica)| replica.machine().is_building())
            };
            if let Some((_, replica)) = replicas.iter().find(|(_, replica)| replica.machine().needs_snapshot()) {
                replica.snapshot().await;
            }
            if let Some(forced) = self.0.journal.forced_snapshot(busy)
                && let Some(replica) = self.replica(forced.shard as u16)
            {
                replica.snapshot().await;
            }
            if replicas.iter().any(|(_, replica)| replica.machine().is_building()) {
                // One at a time, unless the journal needs room.
                continue;
            }
            let due = replicas.iter().find(|(shard, replica)| self.is_due(*shard, replica));
            if let Some((_, replica)) = due {
                replica.snapshot().await;
            }
        }
    }

    /// Whether a shard's log has grown so far that its image is worth its while: past what a restart should have to read, and past the
    /// image itself, so that no more is written for snapshots than for the log.
    fn is_due(&self, shard: u16, replica: &Replica<D, T>) -> bool {
        let applied = replica.machine().applied().map(|applied| applied.index);
        let image = replica.machine().with(|machine| machine.shard().stats().used_bytes);
        let grown = self.0.journal.grown_bytes(u32::from(shard));
        grown > self.0.snapshot_bytes.max(image) && applied > replica.machine().snapshot_index()
    }

    /// Hands leaderships over and stops, after a failure of the journal.
    async fn withdraw(&self) {
        self.hand_over().await;
        Runtime::sleep(FAREWELL).await;
        self.stop().await;
    }
}
