//! How a shard's group is formed, and how a node that has nothing of a shard becomes a member of its group.
//!
//! ```text
//! node without a replica          every other node                     leader
//!   Join(node, 0) ───────────────▶ Blank | NotLeader
//!                 ───────────────────────────────────────────────────▶ draws an id from the log, adds a learner
//!                 ◀─────────────────────────────────────────────────── Admitted(id)
//!   starts a replica of this id ◀── the log, or a snapshot ─────────── …
//!   Join(node, id) ──────────────────────────────────────────────────▶ once it has caught up: it votes, and whatever else of the
//!                 ◀─────────────────────────────────────────────────── group lived on its node is dropped.  Member
//! ```
//!
//! There is one way in, for the first members as for a node whose disk was wiped and for one that keeps nothing (`memory`): a shard
//! begins as a group of one on its *founder*, and the others join. Each shard has another founder in turn, so leaderships are spread
//! from the start.
//!
//! # What holds
//! - **A group is formed once.** Its founder forms it only if *every* other node says that it has nothing of the shard, and (in memory)
//!   only if this node never had a part in one. Whoever has lost everything can therefore never begin a second history beside the
//!   first: it is told of the first, or waits.
//! - **An id is never used twice.** It is drawn from the shard's log, and a request that may be a repetition draws another.
//! - A replica that was lost keeps its vote in the group, unused, until the one that comes in its place has caught up.
//!
//! Not here: where replicas should be (every node has one of every shard), and moving them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use generation_engine::batch::{BatchWriter, Operation};
use generation_engine::machine::Reply;
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft_rt::{AsyncRuntime as _, Instant as _, Oneshot as _, OneshotSender as _};

use super::machine::MachineConfig;
use super::network::Transport;
use super::replica::{Beginning, Outcome, Replica, ReplicaConfig, ReplicaError, Timing};
use super::runtime::{CoreInstant, LocalOneshot, Runtime};
use super::shards::{Durability, Shards, ShardsError};
use super::snapshot;
use super::types::{Place, ReplicaId};
use super::wire::{self, Join, JoinReply, kind};
use crate::env::disk::Disk;
use crate::points;
use generation_engine::mutants::{Mutant, active};

/// How long an answer to a request to join may take: an id is drawn and a learner added meanwhile.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long to wait before asking again.
const PAUSE: Duration = Duration::from_millis(50);

/// How long a learner may take to catch up before it has to ask again.
const CATCH_UP: Duration = Duration::from_mins(1);

/// Entries a learner may lack when it is given its vote.
const LAG: u64 = 64;

/// In memory, a directory for each shard that this node has had a replica of.
const MARKS: &str = "joined";

/// Where a shard's replicas live, and what they are made with.
#[derive(Debug, Clone)]
pub struct Placement {
    /// This node.
    pub node: u64,
    /// The others that have a replica of every shard.
    pub others: Vec<u64>,
    /// What acknowledged means.
    pub durability: Durability,
    /// How patient replicas are.
    pub timing: Timing,
}

impl Placement {
    /// The node that forms a shard's group, and leads it when there is no reason why another should.
    pub fn founder(&self, shard: u16) -> u64 {
        let mut nodes = self.others.clone();
        nodes.push(self.node);
        nodes.sort_unstable();
        nodes[usize::from(shard) % nodes.len()]
    }
}

impl<D: Disk, T: Transport> Shards<D, T> {
    /// Starts the replica of a shard, if the journal has one, and sees to it in the background that there is one and that it votes.
    pub async fn settle(&self, placement: Rc<Placement>, machine: MachineConfig) -> Result<(), ShardsError> {
        let shard = machine.shard;
        let known = self.resident().into_iter().find(|(resident, _)| *resident == shard);
        if let Some((_, id)) = known {
            // A founder that died between making its replica and forming the group has asked everybody, and nobody else can form it.
            let forms = id == machine.next_replica_id - 1 && placement.founder(shard as u16) == placement.node;
            let beginning = if forms { Beginning::Form } else { Beginning::Resume };
            match self.begin(&placement, &machine, id, beginning).await {
                Ok(()) => {}
                // The others have what it held: this node joins again, as another replica.
                Err(ReplicaError::Snapshots { error, .. })
                    if error.kind() == ErrorKind::InvalidData && !placement.others.is_empty() =>
                {
                    tracing::error!(shard, replica = id, %error, "a snapshot is damaged; another is fetched");
                    self.retire(shard as u16).await;
                    snapshot::remove_of(&self.0.disk, shard).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let shards = self.clone();
        self.spawn(async move { shards.come_in(&placement, &machine).await });
        Ok(())
    }

    async fn begin(
        &self,
        placement: &Placement,
        machine: &MachineConfig,
        id: ReplicaId,
        beginning: Beginning,
    ) -> Result<(), ReplicaError> {
        let own = Place { node: placement.node };
        let config = ReplicaConfig {
            id,
            machine: machine.clone(),
            members: [(id, own)].into(),
            beginning,
            timing: placement.timing,
        };
        self.start(config).await?;
        D::point(points::REPLICA_BEGUN);
        Ok(())
    }

    /// Tries until this node has a replica with a vote.
    async fn come_in(&self, placement: &Placement, machine: &MachineConfig) {
        let shard = machine.shard as u16;
        let mut told = false;
        while !self.journal().is_stopped() {
            let done = match self.replica(shard) {
                Some(replica) if placement.others.is_empty() || replica.votes() => return,
                Some(replica) => self.ask_for_a_vote(placement, &replica).await,
                None => self.ask_for_an_id(placement, machine, &mut told).await,
            };
            if let Err(error) = done {
                tracing::error!(shard, %error, "a replica cannot be started; it is tried again");
            }
            Runtime::sleep(PAUSE).await;
        }
    }

    async fn ask_for_an_id(
        &self,
        placement: &Placement,
        machine: &MachineConfig,
        told: &mut bool,
    ) -> Result<(), ReplicaError> {
        let shard = machine.shard as u16;
        let failed = |error| ReplicaError::Snapshots {
            shard: machine.shard,
            error,
        };
        let answers = self.ask(placement, shard, 0).await;
        let admitted = answers.iter().find_map(|(_, answer)| match answer {
            Some(JoinReply::Admitted(id)) => Some(*id),
            _ => None,
        });
        let blank =
            answers.iter().all(|(_, answer)| *answer == Some(JoinReply::Blank)) || active(Mutant::FormedUnasked);
        let marked = placement.durability == Durability::Memory && self.is_marked(shard).await.map_err(failed)?;
        let (id, beginning) = match admitted {
            Some(id) => (id, Beginning::Join),
            None if blank && !marked && placement.founder(shard) == placement.node => {
                (machine.next_replica_id - 1, Beginning::Form)
            }
            None => {
                if !std::mem::replace(told, true) {
                    let silent = answers.iter().filter(|(_, answer)| answer.is_none());
                    let silent: Vec<u64> = silent.map(|(node, _)| *node).collect();
                    if !silent.is_empty() {
                        tracing::info!(shard, ?silent, "waiting for nodes that have not answered yet");
                    }
                }
                return Ok(());
            }
        };
        if placement.durability == Durability::Memory {
            let mark = format!("{MARKS}/{shard:05}");
            self.0.disk.create_directory(&mark).await.map_err(failed)?;
        }
        self.begin(placement, machine, id, beginning).await
    }

    /// Whether this node has ever had a replica of the shard, where the journal does not say.
    async fn is_marked(&self, shard: u16) -> std::io::Result<bool> {
        let marks = self.0.disk.list(MARKS).await?;
        Ok(marks.contains(&format!("{shard:05}")))
    }

    async fn ask_for_a_vote(&self, placement: &Placement, replica: &Replica<D, T>) -> Result<(), ReplicaError> {
        let shard = replica.config().machine.shard as u16;
        let answers = self.ask(placement, shard, replica.config().id).await;
        let unknown = answers.iter().any(|(_, answer)| *answer == Some(JoinReply::Unknown));
        if unknown && !replica.votes() {
            self.retire(shard).await;
        }
        Ok(())
    }

    /// Asks every other node, all at once.
    async fn ask(&self, placement: &Placement, shard: u16, replica: ReplicaId) -> Vec<(u64, Option<JoinReply>)> {
        let join = Join {
            node: placement.node,
            replica,
        };
        let deadline = (CoreInstant::now() + PATIENCE).get();
        let calls = placement.others.iter().map(|&node| async move {
            let call = self
                .0
                .transport
                .call(node, shard, kind::JOIN, wire::message(&join), deadline);
            let answer = call.await.ok().and_then(|reply| wire::read_reply(reply).ok().flatten());
            (node, answer)
        });
        join_all(calls).await
    }

    /// Answers a node that wants to join.
    pub(super) async fn join(&self, shard: u16, payload: Bytes) -> Bytes {
        let reply = match wire::read(payload) {
            Ok(join) => self.admit(shard, join).await,
            Err(_) => return wire::reply(None::<&()>),
        };
        wire::reply(Some(&reply))
    }

    async fn admit(&self, shard: u16, join: Join) -> JoinReply {
        let Some(replica) = self.replica(shard) else {
            return JoinReply::Blank;
        };
        if !replica.leads() {
            return JoinReply::NotLeader;
        }
        let members = replica.members();
        if join.replica != 0 {
            if members.voters.contains(&join.replica) {
                return JoinReply::Member;
            }
            if !members.all.contains_key(&join.replica) {
                return if members.changing {
                    JoinReply::Wait
                } else {
                    JoinReply::Unknown
                };
            }
        }
        if !self.0.admissions.borrow_mut().insert((shard, join.node)) {
            return JoinReply::Wait;
        }
        let admission = Admission {
            shards: self.clone(),
            shard,
            node: join.node,
        };
        if join.replica == 0 {
            let id = admission.add(&replica).await;
            return id.map_or(JoinReply::Wait, JoinReply::Admitted);
        }
        self.spawn(async move { admission.promote(&replica, join.replica).await });
        JoinReply::Wait
    }
}

/// A node being let in, one at a time for each shard and node.
struct Admission<D: Disk, T: Transport> {
    shards: Shards<D, T>,
    shard: u16,
    node: u64,
}

impl<D: Disk, T: Transport> Drop for Admission<D, T> {
    fn drop(&mut self) {
        let mut admissions = self.shards.0.admissions.borrow_mut();
        admissions.remove(&(self.shard, self.node));
    }
}

impl<D: Disk, T: Transport> Admission<D, T> {
    /// Begins a change of the members, unless one is under way: what the next looks at would not be what it changes.
    fn begin_change(&self, replica: &Replica<D, T>) -> Option<Change<D, T>> {
        let free = !replica.members().changing && self.shards.0.changes.borrow_mut().insert(self.shard);
        free.then(|| Change {
            shards: self.shards.clone(),
            shard: self.shard,
        })
    }

    /// Draws an id and adds a learner of it. `None`: not now.
    async fn add(&self, replica: &Replica<D, T>) -> Option<ReplicaId> {
        let _change = self.begin_change(replica)?;
        let members = replica.members();
        let mut here = members.all.iter().filter(|(_, place)| place.node == self.node);
        if let Some((id, _)) = here.next().filter(|_| active(Mutant::ReplicaIdReused)) {
            return Some(*id);
        }
        let stale = members.all.iter().filter(|(id, place)| {
            // What lives on that node is nothing any more.
            place.node == self.node && !members.voters.contains(id)
        });
        let stale: BTreeSet<ReplicaId> = stale.map(|(id, _)| *id).collect();
        let raft = replica.raft();
        if !stale.is_empty() {
            raft.change_membership(ChangeMembers::RemoveNodes(stale), true)
                .await
                .ok()?;
        }
        let id = replica.draw_id().await?;
        D::point(points::ID_DRAWN);
        let place = Place { node: self.node };
        raft.add_learner(id, place, false).await.ok()?;
        D::point(points::LEARNER_ADDED);
        tracing::info!(shard = self.shard, node = self.node, replica = id, "a replica joins");
        Some(id)
    }

    /// Gives a learner its vote once it has caught up, and takes it from whatever else of the group lived on its node.
    async fn promote(&self, replica: &Replica<D, T>, id: ReplicaId) {
        let end = CoreInstant::now() + CATCH_UP;
        let _change = loop {
            if has_caught_up(replica, id)
                && let Some(change) = self.begin_change(replica)
            {
                break change;
            }
            if CoreInstant::now() > end || !replica.leads() {
                return;
            }
            Runtime::sleep(PAUSE / 5).await;
        };
        let members = replica.members();
        let elsewhere = members.voters.iter().filter(|voter| {
            let place = members.all.get(voter);
            place.is_some_and(|place| place.node != self.node)
        });
        let mut voters: BTreeSet<ReplicaId> = elsewhere.copied().collect();
        voters.insert(id);
        D::point(points::LEARNER_CAUGHT_UP);
        let changed = replica.raft().change_membership(voters, false).await;
        D::point(points::LEARNER_VOTES);
        match changed {
            Ok(_) => tracing::info!(shard = self.shard, node = self.node, replica = id, "a replica votes"),
            // It asks again.
            Err(error) => tracing::debug!(shard = self.shard, %error, "a replica was not given its vote"),
        }
    }
}

/// A change of a group's members, from the look at who they are to its end.
struct Change<D: Disk, T: Transport> {
    shards: Shards<D, T>,
    shard: u16,
}

impl<D: Disk, T: Transport> Drop for Change<D, T> {
    fn drop(&mut self) {
        self.shards.0.changes.borrow_mut().remove(&self.shard);
    }
}

fn has_caught_up<D: Disk, T: Transport>(replica: &Replica<D, T>, id: ReplicaId) -> bool {
    let metrics = replica.raft().metrics();
    let metrics = metrics.borrow_watched();
    let matched = metrics.replication.as_ref().and_then(|all| all.get(&id)?.as_ref());
    matched.is_some_and(|matched| matched.index + LAG >= metrics.last_log_index.unwrap_or(0))
}

impl<D: Disk, T: Transport> Replica<D, T> {
    /// Draws the next replica id from the log. `None`: this replica does not lead, or nobody knows.
    async fn draw_id(&self) -> Option<ReplicaId> {
        let mut batch = BatchWriter::new();
        batch.push(&Operation::AllocateReplicaId).ok()?;
        let time_ms = self.machine().with(|machine| machine.shard().shard_time_ms());
        let (sender, receiver) = LocalOneshot::channel();
        self.propose(batch.finish(time_ms).into(), move |outcome| {
            // Who asked has gone.
            let _ = sender.send(outcome);
        });
        match Runtime::timeout(PATIENCE, receiver).await {
            Ok(Ok(Outcome::Applied { replies, .. })) => match replies.replies.first() {
                Some(Reply::ReplicaId(id)) => Some(*id),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether this replica has a vote in its group, as far as it knows.
    pub fn votes(&self) -> bool {
        self.members().voters.contains(&self.config().id)
    }
}
