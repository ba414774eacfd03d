//! All replicas of one core, with the journal they share, and what must be seen to from time to time.
//!
//! # What holds
//! - A snapshot is taken of the shard that keeps the journal from using its oldest file again, in good time, and of a shard whose log has
//!   grown past what a restart should have to read.
//! - After the journal has failed, leaderships are handed over, and the replicas are stopped: they acknowledge nothing, answer nobody
//!   and come back when the node was restarted and has read what is on its disk.
//!
//! Not here: which replicas a core has, what clients ask of them.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft_rt::AsyncRuntime as _;

use super::journal::{Journal, JournalConfig, OpenError, Space};
use super::network::Transport;
use super::replica::{Replica, ReplicaConfig, ReplicaError};
use super::runtime::{Ambient, Runtime, within};
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

/// What the replicas of a core are started with.
#[derive(Debug, Clone)]
pub struct ShardsConfig {
    /// The journal's place and size.
    pub journal: JournalConfig,
    /// What acknowledged means.
    pub durability: Durability,
    /// The replicas.
    pub replicas: Vec<ReplicaConfig>,
    /// Bytes of a shard's log in the journal after which a snapshot is taken.
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
    /// The journal has a replica that this node is not configured to have.
    #[error("the journal holds replica {replica} of shard {shard}, which this node is not configured to have")]
    Unconfigured {
        /// The shard.
        shard: u32,
        /// The replica.
        replica: u64,
    },
}

struct Inner<D: Disk, T> {
    journal: Journal<D>,
    replicas: BTreeMap<u16, Replica<D, T>>,
    snapshot_bytes: u64,
}

/// A core's replicas. Clones are the same.
pub struct Shards<D: Disk, T>(Rc<Inner<D, T>>);

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
    /// Opens the journal and starts every replica with what it has of it.
    pub async fn start(
        ambient: Rc<dyn Ambient>,
        disk: D,
        transport: T,
        config: ShardsConfig,
    ) -> Result<Self, ShardsError> {
        let journal = match config.durability {
            Durability::Sync => Journal::open(Rc::clone(&ambient), disk.clone(), config.journal).await?,
            Durability::Memory => Journal::memory(Rc::clone(&ambient), config.journal),
        };
        for (shard, replica) in journal.replicas() {
            let known = |config: &ReplicaConfig| (config.machine.shard, config.id) == (shard, replica);
            if !config.replicas.iter().any(known) {
                journal.stop();
                return Err(ShardsError::Unconfigured { shard, replica });
            }
        }
        let mut replicas = BTreeMap::new();
        for config in config.replicas {
            let shard = config.machine.shard as u16;
            let replica = Replica::start(Rc::clone(&ambient), &journal, disk.clone(), transport.clone(), config);
            replicas.insert(shard, replica.await?);
        }
        let shards = Self(Rc::new(Inner {
            journal,
            replicas,
            snapshot_bytes: config.snapshot_bytes,
        }));
        let tending = shards.clone();
        ambient.spawn(Box::pin(within(
            Rc::clone(&ambient),
            async move { tending.tend().await },
        )));
        Ok(shards)
    }

    /// The replica of a shard.
    pub fn replica(&self, shard: u16) -> Option<&Replica<D, T>> {
        self.0.replicas.get(&shard)
    }

    /// All of them, by shard.
    pub fn replicas(&self) -> impl Iterator<Item = (u16, &Replica<D, T>)> {
        self.0.replicas.iter().map(|(shard, replica)| (*shard, replica))
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
        match self.replica(shard) {
            Some(replica) => replica.handle(kind, payload).await,
            None => wire::reply(None::<&()>),
        }
    }

    /// Stops the replicas, then the journal.
    pub async fn stop(&self) {
        for replica in self.0.replicas.values() {
            // One that does not end has lost its journal.
            let _ = Runtime::timeout(FAREWELL, replica.stop()).await;
        }
        self.0.journal.stop();
    }

    async fn tend(&self) {
        loop {
            Runtime::sleep(TEND).await;
            if self.0.journal.is_stopped() {
                return;
            }
            if self.failure().is_some() {
                return self.retire().await;
            }
            let replicas = &self.0.replicas;
            let busy = |shard: u32| {
                let replica = replicas.get(&(shard as u16));
                replica.is_none_or(|replica| replica.machine().is_building())
            };
            if let Some(forced) = self.0.journal.forced_snapshot(busy)
                && let Some(replica) = replicas.get(&(forced.shard as u16))
            {
                replica.snapshot().await;
            }
            for (shard, replica) in replicas {
                let applied = replica.machine().applied().map(|applied| applied.index);
                let grown = self.0.journal.held_bytes(u32::from(*shard)) > self.0.snapshot_bytes;
                if grown && applied > replica.machine().snapshot_index() {
                    replica.snapshot().await;
                }
            }
        }
    }

    /// Hands leaderships over and stops, after a failure of the journal.
    async fn retire(&self) {
        for replica in self.0.replicas.values().filter(|replica| replica.leads()) {
            let heir = replica
                .raft()
                .metrics()
                .borrow_watched()
                .replication
                .as_ref()
                .and_then(|followers| {
                    let others = followers.iter().filter(|(id, _)| **id != *replica.raft().node_id());
                    let best = others.max_by_key(|(_, matching)| **matching)?;
                    Some(*best.0)
                });
            if let Some(heir) = heir {
                // It may hang with the journal, or have stopped.
                let _ = Runtime::timeout(FAREWELL, replica.raft().trigger().transfer_leader(heir)).await;
            }
        }
        Runtime::sleep(FAREWELL).await;
        self.stop().await;
    }
}
