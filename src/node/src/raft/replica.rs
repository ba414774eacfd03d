//! One shard's replica on this node: its Raft group's member, its state, and how the rest of the core asks things of it.
//!
//! ```text
//! propose ─▶ openraft ─▶ journal ∥ followers ─▶ committed ─▶ applied ─▶ the proposal's callback, with the replies
//! read    ─▶ gate: all reads of a turn, one confirmation ─▶ applied as far ─▶ read from the state
//! ```
//!
//! # What holds
//! - **A proposal has one end.** [`Outcome::NotProposed`] says that nothing was appended anywhere; everything that is neither that nor
//!   applied is in doubt, however it was lost.
//! - **A read is confirmed after it was asked for.** One that comes while a confirmation is under way waits for the next.
//! - What confirms a leader is that a majority has promised nothing to another since the read came: a replica's vote changes here, in
//!   the journal's memory, before anybody hears of it. So a follower answers at once, without openraft, and so does an idle one. The
//!   index is the highest that anybody may have been shown: what the leader has applied, or told a follower to be committed.
//! - A follower asks the leader for the index and waits until it has applied that itself.
//! - **Who has ended leads nothing.** When openraft's core is gone, for whatever reason, the last it said of itself means nothing.
//! - A leader never goes on in its old term after a restart: with a lost tail the same log id would come twice.
//!
//! Not here: requests and replies of clients, sessions of theirs, when a snapshot is due.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future as _;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ClientWriteError, Fatal, InitializeError, LinearizableReadError, RaftError};
use openraft::raft::{ClientWriteResult, VoteRequest, VoteResponse};
use openraft::{Config, Raft, ReadPolicy, ServerState, SnapshotPolicy};
use openraft_rt::{AsyncRuntime as _, Instant as _, Oneshot as _, OneshotSender as _};

use super::journal::{Journal, LogStore};
use super::machine::{MachineConfig, StateMachine};
use super::network::{Network, Transport};
use super::runtime::{
    Ambient, CoreInstant, LocalOneshot, OneshotReceiver, OneshotSender, Runtime, WatchReceiver, yield_now,
};
use super::snapshot::{Expected, Incoming};
use super::types::{Callback, Commands, LogId, Place, ReplicaId, Replies, StoredMembership, Types, Vote};
use super::wire::{self, Chunks, ChunksReply, ReadIndexReply, kind};
use crate::env::disk::Disk;
use generation_engine::mutants::{Mutant, active};

/// Entries that whom leadership is handed to may lack: it gets them with the request.
const HEIR_LAG: u64 = 64;

/// How long openraft is given to begin with a snapshot before it is asked again: it takes no request while it is still busy with the end
/// of the last one.
const SNAPSHOT_ASKED: Duration = Duration::from_millis(50);

/// How patient replicas are with each other.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How often a leader says that it is one.
    pub heartbeat: Duration,
    /// Shortest silence after which a follower becomes a candidate.
    pub election_min: Duration,
    /// Longest silence.
    pub election_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(300),
            election_max: Duration::from_millis(600),
        }
    }
}

/// What a replica finds when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// The shard begins now: a replica without a log and without a vote becomes one of the members. Others must know of no group, and
    /// one that has run before and lost its journal must not begin so.
    Form,
    /// The replica's id was drawn for it, and a leader brings it the log.
    Join,
    /// It has run before. If the journal has nothing of it, its votes are lost with it, and it must not start: it could vote twice.
    Resume,
}

/// What a replica is started with.
#[derive(Debug, Clone)]
pub struct ReplicaConfig {
    /// Its id.
    pub id: ReplicaId,
    /// Its state machine's part.
    pub machine: MachineConfig,
    /// The replicas with which the shard begins. All of them are given the same.
    pub members: BTreeMap<ReplicaId, Place>,
    /// How it begins.
    pub beginning: Beginning,
    /// Patience.
    pub timing: Timing,
}

/// Why a replica was not started, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Its snapshots cannot be looked at.
    #[error("shard {shard}: {error}")]
    Snapshots {
        /// The shard.
        shard: u32,
        /// What the system said.
        error: io::Error,
    },
    /// It has run before, and the journal has nothing of it.
    #[error(
        "replica {id} of shard {shard} has lost its journal, and its votes with it: let this node join as another replica"
    )]
    Lost {
        /// The shard.
        shard: u32,
        /// The replica.
        id: ReplicaId,
    },
    /// openraft does not take what it was given.
    #[error("shard {shard} cannot start: {error}")]
    Start {
        /// The shard.
        shard: u32,
        /// What it said.
        error: String,
    },
}

/// What became of a proposal.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was committed and applied.
    Applied {
        /// Where it stands in the log.
        log_id: LogId,
        /// What its operations answered.
        replies: Replies,
    },
    /// Nothing was appended, here or elsewhere: this replica does not lead.
    NotProposed(Option<Leader>),
    /// It may have been applied, may be yet, or never will be.
    InDoubt,
}

/// Who leads a shard, as far as this replica knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    /// The replica.
    pub replica: ReplicaId,
    /// Where it lives.
    pub place: Place,
    /// Its term.
    pub term: u64,
}

/// Why a read cannot be served here now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The leader has to be asked, and it is not who was thought or not known.
    #[error("this replica does not lead the shard")]
    NotLeader(Option<Leader>),
    /// No majority has confirmed who leads in time.
    #[error("no majority of the shard's replicas answers")]
    NoQuorum,
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

/// Why a replica has ended. It comes back when its node is restarted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// It was stopped.
    #[error("it was stopped")]
    Stopped,
    /// What it reads or writes its log and state with has failed.
    #[error("{0}")]
    Storage(String),
    /// Its task is gone.
    #[error("its task ended without a word, which is a defect of the program")]
    Lost,
}

impl Ended {
    /// The number that stands for it in counters; 0 stands for a replica that has not ended.
    pub const fn code(&self) -> u64 {
        match self {
            Self::Storage(_) => 1,
            Self::Lost => 2,
            Self::Stopped => 3,
        }
    }
}

/// Why no snapshot was taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The disk did not take it. The replica tries again by itself.
    #[error("the snapshot cannot be written, and is tried again: {0}")]
    NotWritten(String),
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

/// What is known of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its id.
    pub id: ReplicaId,
    /// The current term.
    pub term: u64,
    /// Whether it leads.
    pub leads: bool,
    /// Who leads, if anybody.
    pub leader: Option<Leader>,
    /// The last entry applied.
    pub applied: Option<LogId>,
    /// Index of the last entry in its newest snapshot.
    pub snapshot: Option<u64>,
    /// A digest of the state at `applied`.
    pub state_hash: u128,
}

/// Who belongs to a group, as one of its replicas knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// Those with a vote, on either side of a change.
    pub voters: BTreeSet<ReplicaId>,
    /// All, with where they live.
    pub all: BTreeMap<ReplicaId, Place>,
    /// Whether a change is under way.
    pub changing: bool,
}

type Confirmed = Result<LogId, ReadError>;

/// Reads waiting for a confirmation.
#[derive(Default)]
struct Gate {
    waiting: RefCell<Vec<OneshotSender<Confirmed>>>,
    busy: Cell<bool>,
}

/// Where a snapshot from the leader is.
enum Receiving<D: Disk> {
    Idle,
    /// Chunks are being written.
    Busy,
    Incoming(Incoming<D>),
    /// All of it is here.
    Installing {
        id: u128,
        end: u64,
    },
    Installed {
        id: u128,
        vote: Vote,
    },
}

struct Inner<D: Disk, T> {
    raft: Raft<Types, StateMachine<D>>,
    machine: StateMachine<D>,
    transport: T,
    metrics: WatchReceiver<openraft::metrics::RaftServerMetrics<Types>>,
    config: ReplicaConfig,
    log: LogStore<D>,
    /// The highest index that a follower was told to be committed.
    told: Rc<Cell<u64>>,
    entry_bytes: usize,
    gate: Gate,
    receiving: RefCell<Receiving<D>>,
}

/// A shard's replica. Clones are the same.
pub struct Replica<D: Disk, T>(Rc<Inner<D, T>>);

impl<D: Disk, T> Clone for Replica<D, T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Disk, T> std::fmt::Debug for Replica<D, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica")
            .field("shard", &self.0.config.machine.shard)
            .field("id", &self.0.config.id)
            .finish_non_exhaustive()
    }
}

impl<D: Disk, T: Transport> Replica<D, T> {
    /// Starts a replica with what the journal and the disk have of it.
    pub async fn start(
        ambient: Rc<dyn Ambient>,
        journal: &Journal<D>,
        disk: D,
        transport: T,
        config: ReplicaConfig,
    ) -> Result<Self, ReplicaError> {
        let shard = config.machine.shard;
        let id = config.id;
        if config.beginning == Beginning::Resume && !journal.replicas().contains(&(shard, id)) {
            return Err(ReplicaError::Lost { shard, id });
        }
        let machine = StateMachine::open(ambient, disk, config.machine.clone());
        let machine = machine
            .await
            .map_err(|error| ReplicaError::Snapshots { shard, error })?;
        let needing = journal.clone();
        machine.hurry_when(move || needing.is_short());
        let failed = |error: &dyn std::fmt::Display| ReplicaError::Start {
            shard,
            error: error.to_string(),
        };
        let raft_config = raft_config(&config).validate().map_err(|error| failed(&error))?;
        let told = Rc::new(Cell::new(0));
        let network = Network::new(transport.clone(), shard as u16, config.id, Rc::clone(&told));
        let log = journal.shard(shard, config.id);
        if let Some(snapshot) = machine.snapshot_id() {
            let behind = journal.begin_behind(shard, &snapshot).await;
            behind.map_err(|error| failed(&error))?;
        }
        let raft = Raft::new(config.id, Arc::new(raft_config), network, log.clone(), machine.clone());
        let raft = raft.await.map_err(|error| match machine.damage() {
            Some(damage) => ReplicaError::Snapshots {
                shard,
                error: io::Error::new(io::ErrorKind::InvalidData, damage),
            },
            None => failed(&error),
        })?;
        if config.beginning == Beginning::Form && !raft.is_initialized().await.map_err(|error| failed(&error))? {
            match raft.initialize(config.members.clone()).await {
                // Another replica was quicker, and has elected itself meanwhile.
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Ok(Self(Rc::new(Inner {
            metrics: raft.server_metrics(),
            raft,
            machine,
            transport,
            config,
            log,
            told,
            entry_bytes: journal.entry_bytes(),
            gate: Gate::default(),
            receiving: RefCell::new(Receiving::Idle),
        })))
    }

    /// Its state.
    pub fn machine(&self) -> &StateMachine<D> {
        &self.0.machine
    }

    /// openraft's handle, for changes of membership and transfers of leadership.
    pub fn raft(&self) -> &Raft<Types, StateMachine<D>> {
        &self.0.raft
    }

    /// Whether it has ended: what it says of itself otherwise is the last it knew.
    pub fn has_ended(&self) -> bool {
        self.0.metrics.is_closed()
    }

    /// Why it has ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        if !self.has_ended() {
            return None;
        }
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow_watched();
        Some(match &metrics.running_state {
            Err(Fatal::Stopped) => Ended::Stopped,
            Err(Fatal::StorageError(error)) => Ended::Storage(error.to_string()),
            // openraft only says what has ended in good order.
            Err(Fatal::Panicked) | Ok(()) => Ended::Lost,
        })
    }

    /// Whether this replica leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.0.metrics.borrow_watched().state == ServerState::Leader && !self.has_ended()
    }

    /// Who leads, as far as this replica knows.
    pub fn leader(&self) -> Option<Leader> {
        if self.has_ended() {
            return None;
        }
        let metrics = self.0.metrics.borrow_watched();
        let replica = metrics.current_leader?;
        let place = *metrics.membership_config.get_node(&replica)?;
        let term = metrics.vote.leader_id.term;
        Some(Leader { replica, place, term })
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.0.metrics.borrow_watched().vote.leader_id.term
    }

    /// Index of the last entry of its log.
    pub fn last_index(&self) -> u64 {
        self.0.raft.metrics().borrow_watched().last_log_index.unwrap_or(0)
    }

    /// What is known of it.
    pub fn status(&self) -> ReplicaStatus {
        let leader = self.leader();
        ReplicaStatus {
            id: self.0.config.id,
            term: self.term(),
            leads: self.leads(),
            leader,
            applied: self.0.machine.applied(),
            snapshot: self.0.machine.snapshot_index(),
            state_hash: self.0.machine.with(|machine| machine.state_hash()),
        }
    }

    /// Proposes one log entry. `done` is called exactly once, now or later.
    pub fn propose(&self, commands: Bytes, done: impl FnOnce(Outcome) + 'static) {
        if self.has_ended() {
            // Nobody is there to append it.
            return done(Outcome::NotProposed(None));
        }
        let proposal = Proposal {
            done: Some(Box::new(done)),
            sent: Rc::new(Cell::new(false)),
        };
        let sent = Rc::clone(&proposal.sent);
        let callback = Callback::new(move |result| proposal.end(result));
        let write = self.0.raft.client_write_ff(Commands(commands), Some(callback));
        let mut write = std::pin::pin!(write);
        // The queue is far longer than a turn's entries; should it be full, the proposal is dropped, and was not sent.
        sent.set(true);
        if write
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
        {
            sent.set(false);
        }
    }

    /// Waits until this replica may answer a read with everything that was acknowledged before this call; returns the entry up to
    /// which it has applied at least.
    pub async fn linearize(&self) -> Confirmed {
        if let Some(applied) = self.alone() {
            return Ok(applied);
        }
        let confirmed = self.confirmation().await.map_err(|_| ReadError::Stopped)??;
        if !active(Mutant::ReadUnapplied) {
            let reached = self.0.machine.reached(confirmed.index).await;
            reached.map_err(|_| ReadError::Stopped)?;
        }
        Ok(confirmed)
    }

    /// Where there is only one voter, and it leads and has applied an entry of its own term, it needs to ask nobody.
    pub fn alone(&self) -> Option<LogId> {
        let metrics = self.0.metrics.borrow_watched();
        // A change under way counts with both of its sides.
        let one = |members: &StoredMembership| matches!(&members.get_joint_config()[..], [voters] if voters.len() == 1);
        let alone = metrics.state == ServerState::Leader
            && !self.has_ended()
            && one(&metrics.membership_config)
            && one(&metrics.committed_membership_config);
        let applied = self.0.machine.applied()?;
        (alone && applied.leader_id == metrics.vote.leader_id).then_some(applied)
    }

    /// The follower to hand leadership to: one whose node `is_fit`, with a vote, as far as this leader, or as good as; the one that is
    /// furthest. `None` where there is none, this replica does not lead, or its group is changing.
    pub fn heir(&self, is_fit: impl Fn(Place) -> bool) -> Option<ReplicaId> {
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        if !self.leads() || membership.membership().get_joint_config().len() != 1 {
            return None;
        }
        let last = metrics.last_log_index.unwrap_or(0);
        let own = self.0.config.id;
        let fit = membership.voter_ids().filter_map(|id| {
            let matched = metrics.replication.as_ref()?.get(&id)?.as_ref()?.index;
            let place = *membership.get_node(&id)?;
            (id != own && matched + HEIR_LAG >= last && is_fit(place)).then_some((matched, id))
        });
        fit.max().map(|(_, id)| id)
    }

    /// The last entry that this leader knows to be in the log of each other member.
    pub fn matched(&self) -> BTreeMap<ReplicaId, u64> {
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow_watched();
        let known = metrics.replication.iter().flatten();
        known
            .filter_map(|(id, matched)| Some((*id, matched.as_ref()?.index)))
            .collect()
    }

    /// The members of its group: those with a vote, and all.
    pub fn members(&self) -> Members {
        let metrics = self.0.metrics.borrow_watched();
        let membership = &metrics.membership_config;
        Members {
            voters: membership.voter_ids().collect(),
            all: membership.nodes().map(|(id, place)| (*id, *place)).collect(),
            changing: membership.membership().get_joint_config().len() > 1
                || metrics.membership_config != metrics.committed_membership_config,
        }
    }

    /// Whether its group is between two sets of voters.
    pub fn is_between(&self) -> bool {
        let metrics = self.0.metrics.borrow_watched();
        metrics.membership_config.get_joint_config().len() > 1
    }

    /// How many replicas vote; of the smaller side of a change under way.
    pub fn voters(&self) -> usize {
        let metrics = self.0.metrics.borrow_watched();
        let sides = metrics.membership_config.get_joint_config().iter();
        sides.map(BTreeSet::len).min().unwrap_or(0)
    }

    /// Whether a majority of those who vote live on nodes for which `is_alive` holds.
    pub fn has_quorum(&self, is_alive: impl Fn(u64) -> bool) -> bool {
        let metrics = self.0.metrics.borrow_watched();
        let membership = &metrics.membership_config;
        let own = self.0.config.id;
        membership.membership().get_joint_config().iter().all(|voters| {
            let alive = voters
                .iter()
                .filter(|id| **id == own || membership.get_node(id).is_some_and(|place| is_alive(place.node)));
            alive.count() * 2 > voters.len()
        })
    }

    /// What it was started with.
    pub fn config(&self) -> &ReplicaConfig {
        &self.0.config
    }

    /// The longest entry of its log that the journal takes, in bytes. A longer one would be the end of the replica.
    pub fn entry_bytes(&self) -> usize {
        self.0.entry_bytes
    }

    /// Whether a majority has confirmed this leader so lately that it takes proposals: openraft refuses those of a leader that may have
    /// been replaced, which one that has kept still looks like.
    pub fn is_confirmed(&self) -> bool {
        let metrics = self.0.raft.metrics();
        let metrics = metrics.borrow_watched();
        if matches!(&metrics.membership_config.get_joint_config()[..], [voters] if voters.len() == 1) {
            return true;
        }
        // The lease is the longest election time-out, and the proposal takes a moment to arrive.
        let lease = self.0.config.timing.election_max * 2 / 3;
        let acked = metrics.last_quorum_acked.as_ref();
        acked.is_some_and(|acked| CoreInstant::now() < **acked + lease)
    }

    /// Asks for a snapshot, unless one is being taken.
    pub async fn snapshot(&self) {
        if !self.0.machine.is_building() {
            // It has stopped, and everybody else learns that elsewhere.
            let _ = self.0.raft.trigger().snapshot().await;
        }
    }

    /// Has a snapshot taken, or waits for the one that is being taken; the last entry in it, once it is durable.
    pub async fn take_snapshot(&self) -> Result<u64, SnapshotError> {
        let machine = self.machine();
        let newest = machine.snapshot_index();
        if let (Some(index), false) = (newest, machine.is_building() || machine.needs_snapshot())
            && machine.applied().is_some_and(|applied| applied.index == index)
        {
            return Ok(index);
        }
        let mut next = machine.next_snapshot();
        loop {
            if !machine.is_building() {
                let asked = self.0.raft.trigger().snapshot().await;
                asked.map_err(|_| SnapshotError::Stopped)?;
            }
            match Runtime::timeout(SNAPSHOT_ASKED, &mut next).await {
                Ok(Ok(taken)) => return taken.map_err(SnapshotError::NotWritten),
                Ok(Err(_)) => return Err(SnapshotError::Stopped),
                Err(_) if self.has_ended() => return Err(SnapshotError::Stopped),
                Err(_) => {}
            }
        }
    }

    /// Stops it. It answers nobody any more.
    pub async fn stop(&self) {
        // Its task has ended one way or the other.
        let _ = self.0.raft.shutdown().await;
    }

    /// Answers a request of another node's.
    pub async fn handle(&self, kind: u8, mut payload: Bytes) -> Bytes {
        match wire::addressee(&mut payload) {
            Ok(to) if to == self.0.config.id => {}
            _ => return wire::reply(None::<&()>),
        }
        let raft = &self.0.raft;
        if active(Mutant::AppendUnseen) && kind == kind::APPEND {
            let (raft, request) = (raft.clone(), wire::read(payload));
            drop(Runtime::spawn(async move {
                if let Ok(request) = request {
                    let _ = raft.append_entries(request).await;
                }
            }));
            return wire::reply(Some(&openraft::raft::AppendEntriesResponse::<Types>::Success));
        }
        match kind {
            kind::VOTE => match wire::read(payload) {
                Ok(request) => wire::reply(self.vote(request).await.as_ref()),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::PRE_VOTE => match wire::read(payload) {
                Ok(request) => wire::reply(raft.pre_vote(request).await.ok().as_ref()),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::CONFIRM => match wire::read(payload) {
                Ok(vote) => wire::reply(Some(&self.follows(vote))),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::APPEND | kind::COMMIT => match wire::read(payload) {
                Ok(request) => wire::reply(raft.append_entries(request).await.ok().as_ref()),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::TRANSFER => match wire::read(payload) {
                Ok(request) => wire::reply(raft.handle_transfer_leader(request).await.ok().as_ref()),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::SNAPSHOT => match wire::read(payload) {
                Ok(chunks) => wire::reply(self.receive(chunks).await.as_ref()),
                Err(_) => wire::reply(None::<&()>),
            },
            kind::READ_INDEX => wire::reply(Some(&self.read_index().await)),
            _ => wire::reply(None::<&()>),
        }
    }

    /// Answers a candidate. openraft orders votes by term and candidate, and grants a greater one in a term that it has granted another
    /// in already; then two could lead in one term, and who leads is told by terms. So only the first promise in a term is given away.
    async fn vote(&self, request: VoteRequest<Types>) -> Option<VoteResponse<Types>> {
        let vote = request.vote;
        let mut response = self.0.raft.vote(request).await.ok()?;
        response.vote_granted &= self.0.log.promised_first(vote) || active(Mutant::VotesTwice);
        Some(response)
    }

    /// Answers a leader that asks whether this replica still follows it, at once.
    pub(super) fn confirm_to(&self, mut payload: Bytes) -> Bytes {
        match (wire::addressee(&mut payload), wire::read(payload)) {
            (Ok(to), Ok(vote)) if to == self.0.config.id => wire::reply(Some(&self.follows(vote))),
            _ => wire::reply(None::<&()>),
        }
    }

    /// Whether the last this replica has promised anybody, on its disk or on the way there, is to follow the leader of this vote.
    fn follows(&self, vote: Vote) -> bool {
        vote.committed && (self.0.log.vote() == Some(vote) || active(Mutant::ConfirmsAnybody))
    }

    /// Answers a follower that wants to read.
    async fn read_index(&self) -> ReadIndexReply {
        if !self.leads() {
            return ReadIndexReply::NotLeader(self.leader().map(|leader| (leader.replica, leader.place)));
        }
        match self.confirmation().await {
            Ok(Ok(log_id)) => ReadIndexReply::At(log_id),
            Ok(Err(ReadError::NotLeader(leader))) => {
                ReadIndexReply::NotLeader(leader.map(|leader| (leader.replica, leader.place)))
            }
            Ok(Err(ReadError::NoQuorum | ReadError::Stopped)) | Err(_) => ReadIndexReply::NoQuorum,
        }
    }

    /// The next confirmation that begins.
    fn confirmation(&self) -> OneshotReceiver<Confirmed> {
        let (sender, receiver) = LocalOneshot::channel();
        let gate = &self.0.gate;
        gate.waiting.borrow_mut().push(sender);
        if !gate.busy.replace(true) {
            let replica = self.clone();
            drop(Runtime::spawn(async move { replica.confirm_all().await }));
        }
        receiver
    }

    async fn confirm_all(&self) {
        let gate = &self.0.gate;
        loop {
            // Whatever else is asked for in this turn shares the confirmation.
            yield_now().await;
            let mut waiting = gate.waiting.take();
            if waiting.is_empty() {
                gate.busy.set(false);
                return;
            }
            let confirmed = if self.leads() {
                self.confirm().await
            } else {
                self.ask_leader().await
            };
            if active(Mutant::ReadSharesLate) {
                waiting.append(&mut gate.waiting.borrow_mut());
            }
            for sender in waiting {
                // Who asked may have given up.
                let _ = sender.send(confirmed);
            }
        }
    }

    /// How long to wait for a majority: within it a new leader would have been elected.
    fn patience(&self) -> Duration {
        self.0.config.timing.election_max * 2
    }

    /// Asks the others whether they still follow this leader.
    async fn confirm(&self) -> Confirmed {
        if active(Mutant::LeaseRead) {
            return self.confirm_by_openraft(ReadPolicy::LeaseRead).await;
        }
        let Some((vote, index)) = self.standing() else {
            // It has just been elected, or is not any more.
            return self.confirm_by_openraft(ReadPolicy::ReadIndex).await;
        };
        let (sides, others) = {
            let metrics = self.0.metrics.borrow_watched();
            let membership = &metrics.membership_config;
            let others = membership.voter_ids().filter(|id| *id != self.0.config.id);
            let others: Vec<_> = others
                .filter_map(|id| Some((id, membership.get_node(&id)?.node)))
                .collect();
            (membership.get_joint_config().clone(), others)
        };
        let deadline = (CoreInstant::now() + self.patience()).get();
        let (shard, transport) = (self.0.config.machine.shard as u16, &self.0.transport);
        let asked = others.into_iter().map(async |(id, node)| {
            let request = wire::request(id, &vote);
            let answer = transport.call(node, shard, kind::CONFIRM, request, deadline).await;
            let answer = answer.ok().and_then(|answer| wire::read_reply::<bool>(answer).ok()?);
            (id, answer)
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        let mut following = BTreeSet::from([self.0.config.id]);
        let mut left = false;
        loop {
            let majority = |side: &BTreeSet<ReplicaId>| side.intersection(&following).count() * 2 > side.len();
            if sides.iter().all(majority) {
                return Ok(LogId::new(vote.leader_id, index));
            }
            match asked.next().await {
                Some((id, Some(true))) => {
                    following.insert(id);
                }
                Some((_, Some(false))) => left = true,
                Some((_, None)) => {}
                None if left => return Err(ReadError::NotLeader(None)),
                None => return Err(ReadError::NoQuorum),
            }
        }
    }

    /// What a leader may say of itself: its vote, and the highest index anybody may have seen the effect of. `None` where it does not
    /// lead, or has not applied an entry of its own term: it may know less than the leader before it.
    fn standing(&self) -> Option<(Vote, u64)> {
        let (state, vote) = {
            let metrics = self.0.metrics.borrow_watched();
            (metrics.state, metrics.vote)
        };
        let applied = self.0.machine.applied()?;
        let stands = !self.has_ended()
            && state == ServerState::Leader
            && applied.leader_id == vote.leader_id
            && self.follows(vote);
        stands.then(|| (vote, applied.index.max(self.0.told.get())))
    }

    /// Has openraft ask a majority whether this replica still leads, which renews its lease: without one it refuses proposals.
    pub async fn renew(&self) -> bool {
        self.alone().is_some() || self.confirm_by_openraft(ReadPolicy::ReadIndex).await.is_ok()
    }

    async fn confirm_by_openraft(&self, policy: ReadPolicy) -> Confirmed {
        let read = self.0.raft.get_read_log_id(policy);
        match Runtime::timeout(self.patience(), read).await {
            Ok(Ok((read, _))) => Ok(*read.log_id()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)))) => {
                Err(ReadError::NotLeader(self.leader()))
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => {
                Err(ReadError::NoQuorum)
            }
            Ok(Err(RaftError::Fatal(_))) => Err(ReadError::Stopped),
        }
    }

    async fn ask_leader(&self) -> Confirmed {
        let Some(leader) = self.leader() else {
            return Err(ReadError::NotLeader(None));
        };
        let deadline = CoreInstant::now() + self.patience();
        let request = wire::request(leader.replica, &());
        let shard = self.0.config.machine.shard as u16;
        let call = self
            .0
            .transport
            .call(leader.place.node, shard, kind::READ_INDEX, request, deadline.get());
        let Ok(reply) = call.await else {
            return Err(ReadError::NoQuorum);
        };
        match wire::read_reply(reply) {
            Ok(Some(ReadIndexReply::At(log_id))) => Ok(log_id),
            Ok(Some(ReadIndexReply::NoQuorum)) => Err(ReadError::NoQuorum),
            // The next that asks will know the leader better.
            Ok(Some(ReadIndexReply::NotLeader(_)) | None) | Err(_) => Err(ReadError::NotLeader(None)),
        }
    }

    /// Takes in chunks of the leader's snapshot. `None`: they cannot be used. While a complete one is being installed, the answer is
    /// that what comes behind its end is next.
    async fn receive(&self, chunks: Chunks) -> Option<ChunksReply> {
        let config = &self.0.config.machine;
        let begun = match self.0.receiving.replace(Receiving::Busy) {
            Receiving::Incoming(incoming) if incoming.id() == chunks.snapshot => Ok(incoming),
            Receiving::Installed { id, vote } if id == chunks.snapshot => {
                self.0.receiving.replace(Receiving::Installed { id, vote });
                return Some(ChunksReply::Installed(vote));
            }
            Receiving::Idle | Receiving::Incoming(_) | Receiving::Installed { .. } if chunks.offset > 0 => {
                // It began before this replica started, or another has come between.
                self.0.receiving.replace(Receiving::Idle);
                return Some(ChunksReply::GoOn(0));
            }
            Receiving::Idle | Receiving::Incoming(_) | Receiving::Installed { .. } => {
                Incoming::begin(self.0.machine.disk(), config.cluster, config.shard, chunks.snapshot).await
            }
            Receiving::Installing { id, end } => {
                self.0.receiving.replace(Receiving::Installing { id, end });
                return (id == chunks.snapshot).then_some(ChunksReply::GoOn(end));
            }
            // A message that was given up by its sender is still being taken in.
            Receiving::Busy => return None,
        };
        let taken = async {
            let mut incoming = begun?;
            incoming.take(chunks.offset, &chunks.bytes).await?;
            Ok(incoming)
        };
        let incoming = match taken.await {
            Ok(incoming) => incoming,
            Err(error) => {
                self.0.receiving.replace(Receiving::Idle);
                return self.unusable(&error);
            }
        };
        if let Expected::Offset(offset) = incoming.expected() {
            self.0.receiving.replace(Receiving::Incoming(incoming));
            return Some(ChunksReply::GoOn(offset));
        }
        let (id, end) = (incoming.id(), incoming.end());
        self.0.receiving.replace(Receiving::Installing { id, end });
        let replica = self.clone();
        drop(Runtime::spawn(async move {
            let installed = replica.install(incoming, chunks.vote).await;
            let next = installed.map_or(Receiving::Idle, |vote| Receiving::Installed { id, vote });
            replica.0.receiving.replace(next);
        }));
        Some(ChunksReply::GoOn(end))
    }

    async fn install(&self, incoming: Incoming<D>, vote: Vote) -> Option<Vote> {
        let file = match incoming.finish().await {
            Ok(file) => file,
            Err(error) => {
                self.unusable(&error);
                return None;
            }
        };
        let snapshot = openraft::storage::Snapshot {
            meta: file.meta.clone(),
            snapshot: file,
        };
        let installed = self.0.raft.install_full_snapshot(vote, snapshot).await.ok()?;
        Some(installed.vote)
    }

    fn unusable(&self, error: &io::Error) -> Option<ChunksReply> {
        tracing::warn!(shard = self.0.config.machine.shard, %error, "a snapshot from the leader cannot be received");
        None
    }
}

/// A proposal on its way. Dropped without a result, it is in doubt, or was never sent.
struct Proposal {
    done: Option<Box<dyn FnOnce(Outcome)>>,
    sent: Rc<Cell<bool>>,
}

impl Proposal {
    fn end(mut self, result: ClientWriteResult<Types>) {
        let outcome = match result {
            Ok(response) => Outcome::Applied {
                log_id: response.log_id,
                replies: response.data,
            },
            Err(ClientWriteError::ForwardToLeader(forward)) => {
                let leader = forward.leader_id.zip(forward.leader_node);
                Outcome::NotProposed(leader.map(|(replica, place)| Leader {
                    replica,
                    place,
                    term: 0,
                }))
            }
            Err(_) => Outcome::InDoubt,
        };
        if let Some(done) = self.done.take() {
            done(outcome);
        }
    }
}

impl Drop for Proposal {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(if self.sent.get() && !active(Mutant::LossRefused) {
                Outcome::InDoubt
            } else {
                Outcome::NotProposed(None)
            });
        }
    }
}

fn raft_config(config: &ReplicaConfig) -> Config {
    let Timing {
        heartbeat,
        election_min,
        election_max,
    } = config.timing;
    Config {
        cluster_name: format!("shard-{}", config.machine.shard),
        heartbeat_interval: heartbeat.as_millis() as u64,
        election_timeout_min: election_min.as_millis() as u64,
        election_timeout_max: election_max.as_millis() as u64,
        // An entry holds a whole turn: a few dozen fill a message.
        max_payload_entries: 64,
        // When is this node's matter: see `forced_snapshot` of the journal.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        enable_pre_vote: Some(true),
        // With it a restarted leader goes on in its old term, and what it appended and lost is appended again with other contents.
        enable_leader_restore: Some(active(Mutant::LeaderRestored)),
        ..Config::default()
    }
}
