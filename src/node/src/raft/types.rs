//! What openraft's type parameters are here.

use std::fmt;

use bytes::Bytes;
use generation_engine::journal;
use generation_engine::machine::Reply;
use openraft::impls::leader_id_adv;
use openraft::raft::responder::Responder;
use openraft::{OptionalSend, RaftTypeConfig};

use super::runtime::Runtime;

/// A replica's id within its shard. Drawn from the shard's log and never used twice; not the id of the node it lives on.
pub type ReplicaId = u64;

/// Who led, and in which term.
pub type LeaderId = leader_id_adv::LeaderId<u64, ReplicaId>;

/// Identifies an entry of a shard's log.
pub type LogId = openraft::LogId<LeaderId>;

/// What a replica has promised.
pub type Vote = openraft::impls::Vote<LeaderId>;

/// Who belongs to a shard's group.
pub type Membership = openraft::Membership<ReplicaId, Place>;

/// The same with the entry that said so.
pub type StoredMembership = openraft::StoredMembership<LeaderId, ReplicaId, Place>;

/// What an entry holds.
pub type Payload = openraft::EntryPayload<Commands, ReplicaId, Place>;

/// An entry of a shard's log.
pub type Entry = openraft::Entry<LeaderId, Payload>;

/// What a snapshot is of.
pub type SnapshotMeta = openraft::SnapshotMeta<LeaderId, ReplicaId, Place>;

/// openraft's view of this project.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Types;

impl RaftTypeConfig for Types {
    type D = Commands;
    type R = Replies;
    type NodeId = ReplicaId;
    type Node = Place;
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = Runtime;
    type Responder<T>
        = Callback<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// Where a replica lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The node.
    pub node: u64,
}

/// The commands of one log entry: an encoded [`generation_engine::batch::Batch`].
#[derive(Clone, PartialEq, Eq)]
pub struct Commands(pub Bytes);

impl fmt::Debug for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "commands of {} bytes", self.0.len())
    }
}

impl fmt::Display for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the operations of a log entry answered, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replies {
    /// One each.
    pub replies: Vec<Reply>,
}

/// Called once with what became of a proposal.
pub struct Callback<T>(Box<dyn FnOnce(T)>);

impl<T> Callback<T> {
    /// From a function.
    pub fn new(call: impl FnOnce(T) + 'static) -> Self {
        Self(Box::new(call))
    }
}

impl<T: 'static> Responder<Types, T> for Callback<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

impl<T> fmt::Debug for Callback<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callback").finish_non_exhaustive()
    }
}

/// The engine's form of a log id.
pub(crate) fn to_journal(log_id: &LogId) -> journal::LogId {
    journal::LogId {
        term: log_id.leader_id.term,
        leader: log_id.leader_id.node_id,
        index: log_id.index,
    }
}

/// openraft's form of a log id.
pub(crate) fn from_journal(log_id: journal::LogId) -> LogId {
    let leader_id = LeaderId {
        term: log_id.term,
        node_id: log_id.leader,
    };
    LogId::new(leader_id, log_id.index)
}
