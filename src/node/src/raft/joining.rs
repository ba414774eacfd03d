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
//! A replica leaves the same way: once every node that is to have a replica has one with a vote, the leader drops the others' votes
//! (`trimming`). A node that is not to have a replica any more asks about the one it has, and lets it go when it hears `Unknown`.
//!
//! # What holds
//! - **A group is formed once.** Its founder forms it only if *every* other node that is to have a replica says that it has nothing of
//!   the shard, only if those who are to have one have never been others, and (in memory) only if this node never had a part in one.
//!   Whoever has lost everything can therefore never begin a second history beside the first: it is told of the first, or waits.
//! - **An id is never used twice.** It is drawn from the shard's log, and a request that may be a repetition draws another.
//! - A replica that was lost keeps its vote in the group, unused, until the one that comes in its place has caught up.
//! - `Unknown` is said by a leader that has just been confirmed: a replica is let go for nothing less.
//!
//! Not here: where replicas should be (`view`).

use std::cell::{Cell, RefCell};
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
use crate::view::{View, Views};
use generation_engine::mutants::{Mutant, active};

/// How long an answer to a request to join may take: an id is drawn and a learner added meanwhile.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long to wait before asking again.
const PAUSE: Duration = Duration::from_millis(50);

/// The same for a replica that may have to go, and is no hindrance meanwhile.
const LEAVING_PAUSE: Duration = Duration::from_secs(1);

/// How long a learner may take to catch up before it has to ask again.
const CATCH_UP: Duration = Duration::from_mins(1);

/// Entries a learner may lack when it is given its vote.
const LAG: u64 = 64;

/// In memory, a directory for each shard that this node has had a replica of.
const MARKS: &str = "joined";

/// Where replicas are to be, and what they are made with.
#[derive(Debug, Clone)]
pub struct Placement {
    /// This node.
    pub node: u64,
    /// The cluster.
    pub views: Views,
    /// What acknowledged means.
    pub durability: Durability,
    /// How patient replicas are.
    pub timing: Timing,
}

impl Placement {
    /// Whether this node is to have a replica of a shard.
    pub fn is_wanted(&self, shard: u16) -> bool {
        self.views.with(|view| view.targets(shard).contains(&self.node))
    }

    /// The others that are to have one; where it is to move from one single node to another, everybody else.
    fn others(&self, shard: u16) -> Vec<u64> {
        let others = |view: &View| {
            let targets = view.targets(shard).iter().copied();
            let others: Vec<u64> = targets.filter(|node| *node != self.node).collect();
            if others.is_empty() && view.founder(shard).is_none() {
                return view.members.keys().copied().filter(|node| *node != self.node).collect();
            }
            others
        };
        self.views.with(others)
    }

    fn is_managed(&self) -> bool {
        self.views.with(|view| view.managed)
    }

    fn targets(&self, shard: u16) -> Vec<u64> {
        self.views.with(|view| view.targets(shard).to_vec())
    }

    /// Whether this node is the one that forms the shard's group, where there is none.
    fn forms(&self, shard: u16) -> bool {
        self.views.with(|view| view.founder(shard) == Some(self.node))
    }
}

/// A shard of this core, and what its replica is made with.
pub(super) struct Placed {
    pub(super) placement: Rc<Placement>,
    machine: MachineConfig,
    /// It is being seen to.
    busy: Cell<bool>,
    /// The nodes that were to have a replica when the leader last said that the one here votes. A node that was away, or heard of two
    /// changes at once, may have a replica that was dropped, and does not know it.
    confirmed: RefCell<Vec<u64>>,
    /// Since when its group has been between two sets of voters, without this node changing it.
    pub(super) between: Cell<Option<CoreInstant>>,
}

impl<D: Disk, T: Transport> Shards<D, T> {
    /// Starts the replica of a shard, if the journal has one. From then on it is seen to that there is one with a vote where there is to
    /// be one, and none elsewhere.
    pub async fn settle(&self, placement: Rc<Placement>, machine: MachineConfig) -> Result<(), ShardsError> {
        let number = machine.shard;
        let shard = number as u16;
        let known = self.resident().into_iter().find(|(resident, _)| *resident == number);
        if let Some((_, id)) = known {
            // A founder that died between making its replica and forming the group has asked everybody, and nobody else can form it.
            let forms = id == machine.next_replica_id - 1 && placement.forms(shard);
            let beginning = if forms { Beginning::Form } else { Beginning::Resume };
            match self.begin(&placement, &machine, id, beginning).await {
                Ok(()) => {}
                // The others have what it held: this node joins again, as another replica.
                Err(ReplicaError::Snapshots { error, .. })
                    if error.kind() == ErrorKind::InvalidData && !placement.others(shard).is_empty() =>
                {
                    tracing::error!(shard, replica = id, %error, "a snapshot is damaged; another is fetched");
                    self.let_go(shard).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        let placed = Placed {
            placement,
            machine,
            busy: Cell::new(false),
            confirmed: RefCell::default(),
            between: Cell::new(None),
        };
        self.0.placed.borrow_mut().insert(shard, Rc::new(placed));
        self.review();
        Ok(())
    }

    /// Has every shard seen to whose replica is not as it is to be. To be called now and then.
    pub(crate) fn review(&self) {
        let placed: Vec<(u16, Rc<Placed>)> = {
            let placed = self.0.placed.borrow();
            let all = placed.iter().map(|(shard, placed)| (*shard, Rc::clone(placed)));
            all.collect()
        };
        for (shard, placed) in placed {
            let replica = self.replica(shard);
            if let Some(replica) = &replica {
                self.trim(shard, &placed, replica);
            }
            if placed.busy.get() || placed.is_as_wanted(shard, replica.as_ref()) {
                continue;
            }
            placed.busy.set(true);
            let shards = self.clone();
            self.spawn(async move {
                shards.come_or_go(shard, &placed).await;
                placed.busy.set(false);
            });
        }
    }

    /// Stops a replica that does not belong to its group any more, and removes what the disk has of it.
    async fn let_go(&self, shard: u16) -> std::io::Result<()> {
        self.retire(shard).await;
        snapshot::remove_of(&self.0.disk, shard.into()).await
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

    /// Tries until this node has a replica with a vote, or, where it is to have none, has none.
    async fn come_or_go(&self, shard: u16, placed: &Placed) {
        let Placed { placement, machine, .. } = placed;
        let mut told = false;
        while !self.journal().is_stopped() {
            let replica = self.replica(shard);
            let wanted = placement.is_wanted(shard);
            let done = match &replica {
                _ if placed.is_as_wanted(shard, replica.as_ref()) => return,
                Some(replica) => self.ask_whether_it_belongs(placed, replica).await,
                None => self.ask_for_an_id(placement, machine, &mut told).await,
            };
            if let Err(error) = done {
                tracing::error!(shard, %error, "a replica cannot be started; it is tried again");
            }
            Runtime::sleep(if wanted { PAUSE } else { LEAVING_PAUSE }).await;
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
            None if blank && !marked && placement.forms(shard) => (machine.next_replica_id - 1, Beginning::Form),
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

    async fn ask_whether_it_belongs(&self, placed: &Placed, replica: &Replica<D, T>) -> Result<(), ReplicaError> {
        let placement = &placed.placement;
        let shard = replica.config().machine.shard as u16;
        let targets = placement.targets(shard);
        let answers = self.ask(placement, shard, replica.config().id).await;
        let says = |wanted: JoinReply| answers.iter().any(|(_, answer)| *answer == Some(wanted));
        if says(JoinReply::Member) {
            placed.confirmed.replace(targets);
            return Ok(());
        }
        if !says(JoinReply::Unknown) || (!placement.is_managed() && replica.votes()) {
            return Ok(());
        }
        let gone = self.let_go(shard).await;
        gone.map_err(|error| ReplicaError::Snapshots {
            shard: shard.into(),
            error,
        })?;
        if !placement.is_wanted(shard) {
            tracing::info!(shard, replica = replica.config().id, "a replica has left");
        }
        Ok(())
    }

    /// Asks every other node that is to have a replica, all at once.
    async fn ask(&self, placement: &Placement, shard: u16, replica: ReplicaId) -> Vec<(u64, Option<JoinReply>)> {
        let join = Join {
            node: placement.node,
            replica,
        };
        let deadline = (CoreInstant::now() + PATIENCE).get();
        let ask = |node: u64| async move {
            let call = self
                .0
                .transport
                .call(node, shard, kind::JOIN, wire::message(&join), deadline);
            let answer = call.await.ok().and_then(|reply| wire::read_reply(reply).ok().flatten());
            (node, answer)
        };
        let others = placement.others(shard);
        let mut answers = join_all(others.iter().map(|node| ask(*node))).await;
        // Whoever leads may be about to leave, and not be among those who are to have a replica.
        let leaders: BTreeSet<u64> = answers
            .iter()
            .filter_map(|(_, answer)| match answer {
                Some(JoinReply::NotLeader(leader)) => Some(*leader),
                _ => None,
            })
            .filter(|leader| ![0, placement.node].contains(leader) && !others.contains(leader))
            .collect();
        answers.extend(join_all(leaders.into_iter().map(ask)).await);
        answers
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
            return JoinReply::NotLeader(replica.leader().map_or(0, |leader| leader.place.node));
        }
        let members = replica.members();
        if join.replica != 0 {
            if members.voters.contains(&join.replica) {
                return JoinReply::Member;
            }
            if !members.all.contains_key(&join.replica) {
                // One that was replaced without knowing it may not know the replica yet.
                let is_leader = !members.changing && replica.linearize().await.is_ok() && replica.leads();
                return if is_leader && !replica.members().all.contains_key(&join.replica) {
                    JoinReply::Unknown
                } else {
                    JoinReply::Wait
                };
            }
        }
        if !self.is_target(shard, join.node) {
            return JoinReply::Wait;
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
    /// Draws an id and adds a learner of it. `None`: not now.
    async fn add(&self, replica: &Replica<D, T>) -> Option<ReplicaId> {
        let _change = self.shards.begin_change(self.shard, replica)?;
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
                && let Some(change) = self.shards.begin_change(self.shard, replica)
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
        // Whoever it comes in the place of goes in the same change, but for this leader.
        if let Some(rest) = self.shards.trimmed(self.shard, &members, &voters) {
            voters = rest;
            voters.insert(replica.config().id);
        }
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

fn has_caught_up<D: Disk, T: Transport>(replica: &Replica<D, T>, id: ReplicaId) -> bool {
    let metrics = replica.raft().metrics();
    let metrics = metrics.borrow_watched();
    let matched = metrics.replication.as_ref().and_then(|all| all.get(&id)?.as_ref());
    matched.is_some_and(|matched| matched.index + LAG >= metrics.last_log_index.unwrap_or(0))
}

impl Placed {
    /// Whether there is a replica with a vote where there is to be one, and none where there is to be none.
    fn is_as_wanted<D: Disk, T: Transport>(&self, shard: u16, replica: Option<&Replica<D, T>>) -> bool {
        let placement = &self.placement;
        let wanted = placement.is_wanted(shard);
        let Some(replica) = replica else { return !wanted };
        if !placement.is_managed() {
            return replica.votes();
        }
        let targets = placement.targets(shard);
        if replica.leads() && replica.votes() {
            self.confirmed.replace(targets);
            return wanted;
        }
        wanted && replica.votes() && *self.confirmed.borrow() == targets
    }
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
