//! openraft's calls to other replicas, over a transport between nodes. Every one of them has a deadline.
//!
//! # What a commit costs
//! openraft tells each follower of every commit in an append without entries, and waits for the answer. Where no entry follows at
//! once, that would be half of all messages. The answer says nothing new: the follower has confirmed before that its log is the
//! leader's up to there. So such an append becomes a message without an answer ([`kind::COMMIT`]) that leaves with whatever its node
//! says next. One that is lost is made good by the next append or heartbeat, which name the commit too. openraft hears nothing of it:
//! what it has not seen answered counts for no lease.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{AnyError, OptionalSend};
use openraft_rt::{AsyncRuntime as _, Instant as _, Select2};

use super::runtime::{CoreInstant, Runtime};
use super::snapshot::{Outgoing, SnapshotFile};
use super::types::{LeaderId, LogId, Place, ReplicaId, Types, Vote};
use super::wire::{self, Chunks, ChunksReply, Wire, kind};
use crate::env::disk::Disk;
use crate::points;

/// Bytes of a snapshot sent in one message; a single chunk may be longer.
const SNAPSHOT_BYTES: usize = 256 << 10;

/// How long one message of a snapshot may take.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(3);

/// How often to ask whether a complete snapshot has been installed.
const INSTALL_POLL: Duration = Duration::from_millis(50);

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The node cannot be reached at present.
    #[error("node {0} cannot be reached")]
    Unreachable(u64),
    /// No answer came in time.
    #[error("no answer in time")]
    Timeout,
    /// The call was lost, or refused.
    #[error("{0}")]
    Failed(String),
}

/// What carries calls between the nodes of a cluster.
pub trait Transport: Clone + 'static {
    /// Asks the replicas of `shard` on `node`. Ends at `deadline` at the latest.
    fn call(
        &self,
        node: u64,
        shard: u16,
        kind: u8,
        payload: Bytes,
        deadline: Instant,
    ) -> impl Future<Output = Result<Bytes, CallError>>;

    /// Tells the replicas of `shard` on `node` something that may be lost, and that may wait for what is said to that node next.
    fn tell(&self, node: u64, shard: u16, kind: u8, payload: Bytes);

    /// Whether a node was heard of lately. A hint: it may be wrong either way.
    fn is_alive(&self, node: u64) -> bool;
}

/// Makes connections to the other replicas of one shard.
#[derive(Debug, Clone)]
pub(crate) struct Network<T, D> {
    transport: T,
    shard: u16,
    id: ReplicaId,
    committed: Rc<Cell<u64>>,
    disk: std::marker::PhantomData<fn() -> D>,
}

impl<T, D> Network<T, D> {
    /// `committed` is kept at the highest index that any follower was told to be committed.
    pub(crate) fn new(transport: T, shard: u16, id: ReplicaId, committed: Rc<Cell<u64>>) -> Self {
        Self {
            transport,
            shard,
            id,
            committed,
            disk: std::marker::PhantomData,
        }
    }
}

/// The way to one replica.
pub(crate) struct Target<T, D> {
    transport: T,
    shard: u16,
    id: ReplicaId,
    to: ReplicaId,
    place: Place,
    committed: Rc<Cell<u64>>,
    disk: std::marker::PhantomData<fn() -> D>,
}

impl<T, D> fmt::Debug for Target<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("to", &self.to).finish_non_exhaustive()
    }
}

impl<T: Transport, D: Disk> RaftNetworkFactory<Types> for Network<T, D> {
    type Network = Target<T, D>;

    async fn new_client(&mut self, target: ReplicaId, node: &Place) -> Target<T, D> {
        Target {
            transport: self.transport.clone(),
            shard: self.shard,
            id: self.id,
            to: target,
            place: *node,
            committed: Rc::clone(&self.committed),
            disk: std::marker::PhantomData,
        }
    }
}

impl<T: Transport, D: Disk> Target<T, D> {
    /// A follower is about to hear of a commit.
    fn note(&self, rpc: &AppendEntriesRequest<Types>) {
        let committed = rpc.leader_commit.map_or(0, |committed| committed.index);
        self.committed.set(self.committed.get().max(committed));
    }

    /// Tells the replica of a commit.
    fn tell_commit(&self, rpc: &AppendEntriesRequest<Types>) {
        self.note(rpc);
        self.transport
            .tell(self.place.node, self.shard, kind::COMMIT, wire::request(self.to, rpc));
    }

    async fn ask<Q: Wire, A: Wire>(
        &self,
        action: RPCTypes,
        kind: u8,
        message: &Q,
        patience: Duration,
    ) -> Result<A, RPCError<Types>> {
        let deadline = CoreInstant::now() + patience;
        let request = wire::request(self.to, message);
        let call = self
            .transport
            .call(self.place.node, self.shard, kind, request, deadline.get());
        match call.await {
            Ok(bytes) => match wire::read_reply(bytes) {
                Ok(Some(reply)) => Ok(reply),
                // It is not there, or not any more: asking again at once does not help.
                Ok(None) => Err(unreachable(&format!("replica {} is not on its node", self.to))),
                Err(error) => Err(RPCError::Network(NetworkError::new(&error))),
            },
            Err(CallError::Unreachable(node)) => Err(unreachable(&CallError::Unreachable(node).to_string())),
            Err(CallError::Timeout) => Err(RPCError::Timeout(Timeout {
                action,
                id: self.id,
                target: self.to,
                timeout: patience,
            })),
            Err(error @ CallError::Failed(_)) => Err(RPCError::Network(NetworkError::new(&error))),
        }
    }

    /// Sends a snapshot from where the receiver is.
    async fn send(
        &self,
        vote: Vote,
        snapshot: &SnapshotFile<D>,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        // Another is taken meanwhile.
        let failed = |error: std::io::Error| StreamingError::Unreachable(Unreachable::new(&error));
        if let Some(damage) = snapshot.damage.get() {
            return Err(failed(std::io::Error::other(&**damage)));
        }
        let mut file = Outgoing::open(snapshot).await.map_err(failed)?;
        let mut next = None;
        loop {
            // The first message only asks where to begin.
            let offset = next.unwrap_or(0);
            let mut bytes = Bytes::new();
            if next.is_some() {
                bytes = file.read(offset, SNAPSHOT_BYTES).await.map_err(failed)?;
            }
            if next.is_some() && bytes.is_empty() {
                Runtime::sleep(INSTALL_POLL).await;
            }
            let chunks = Chunks {
                vote,
                snapshot: snapshot.id,
                offset,
                bytes,
            };
            let reply = self.ask(RPCTypes::InstallSnapshot, kind::SNAPSHOT, &chunks, SNAPSHOT_PATIENCE);
            match reply.await? {
                ChunksReply::GoOn(offset) => next = Some(offset),
                ChunksReply::Installed(vote) => return Ok(SnapshotResponse::new(vote)),
            }
        }
    }
}

/// What came of the appends of a stream, in order.
type AppendResults<'s> = BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>;

/// A stream of appends to one replica, one after the other.
struct Appending<'s, T, D, S> {
    target: &'s mut Target<T, D>,
    input: S,
    option: RPCOption,
    /// Up to where the replica has confirmed its log in this stream.
    matched: Option<LogId>,
}

impl<T: Transport, D: Disk, S> Appending<'_, T, D, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Unpin,
{
    /// Sends what needs an answer next, and waits for that. The stream ends where a part at most was accepted.
    async fn next(mut self) -> Option<(Result<StreamAppendResult<Types>, RPCError<Types>>, Option<Self>)> {
        loop {
            let rpc = self.input.next().await?;
            if rpc.entries.is_empty() && self.matched.is_some() && self.matched >= rpc.prev_log_id {
                self.target.tell_commit(&rpc);
                continue;
            }
            let (before, last) = (
                rpc.prev_log_id,
                rpc.entries.last().map_or(rpc.prev_log_id, |entry| Some(entry.log_id)),
            );
            let response = match self.target.append_entries(rpc, self.option.clone()).await {
                Ok(response) => response,
                Err(error) => return Some((Err(error), None)),
            };
            let result = response.into_stream_result(before, last);
            let whole = result.as_ref().is_ok_and(|matched| *matched == last);
            self.matched = last;
            return Some((Ok(result), whole.then_some(self)));
        }
    }
}

fn unreachable(what: &str) -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::new(&AnyError::error(what)))
}

impl<T: Transport, D: Disk> RaftNetworkV2<Types> for Target<T, D> {
    type SnapshotData = SnapshotFile<D>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.note(&rpc);
        self.ask(RPCTypes::AppendEntries, kind::APPEND, &rpc, option.soft_ttl())
            .await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<AppendResults<'s>, RPCError<Types>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let state = Some(Appending {
            target: self,
            input,
            option,
            matched: None,
        });
        let results: AppendResults<'s> = Box::pin(stream::unfold(state, async |state| state?.next().await));
        Box::pin(std::future::ready(Ok(results)))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let answer = self.ask(RPCTypes::Vote, kind::VOTE, &rpc, option.soft_ttl()).await;
        D::point(points::VOTE_ANSWERED);
        answer
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(RPCTypes::Vote, kind::PRE_VOTE, &rpc, option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::storage::Snapshot<LeaderId, ReplicaId, Place, SnapshotFile<D>>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        match Runtime::select2(cancel, self.send(vote, &snapshot.snapshot)).await {
            Select2::First(closed) => Err(StreamingError::Closed(closed)),
            Select2::Second(sent) => sent,
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        self.ask(RPCTypes::TransferLeader, kind::TRANSFER, &req, option.soft_ttl())
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::raft::testing::{Bench, MemoryDisk};
    use crate::raft::types::{Entry, Payload};

    /// Notes what is said, and answers every call with the same.
    #[derive(Clone, Default)]
    struct Noting {
        calls: Rc<RefCell<Vec<u8>>>,
        told: Rc<RefCell<Vec<u8>>>,
    }

    impl Transport for Noting {
        async fn call(&self, _: u64, _: u16, kind: u8, _: Bytes, _: Instant) -> Result<Bytes, CallError> {
            self.calls.borrow_mut().push(kind);
            Ok(wire::reply(Some(&AppendEntriesResponse::<Types>::Success)))
        }

        fn tell(&self, _: u64, _: u16, kind: u8, _: Bytes) {
            self.told.borrow_mut().push(kind);
        }

        fn is_alive(&self, _: u64) -> bool {
            true
        }
    }

    fn at(index: u64) -> LogId {
        LogId::new(LeaderId { term: 1, node_id: 1 }, index)
    }

    fn append(before: u64, entries: u64, committed: u64) -> AppendEntriesRequest<Types> {
        let entries = (before + 1..=before + entries).map(|index| Entry {
            log_id: at(index),
            payload: Payload::Blank,
        });
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(at(before)),
            entries: entries.collect(),
            leader_commit: Some(at(committed)),
        }
    }

    #[test]
    fn a_commit_is_told_where_the_follower_has_confirmed_its_log_and_asked_otherwise() {
        let bench = Bench::new();
        bench.run(async {
            let (transport, committed) = (Noting::default(), Rc::new(Cell::new(0)));
            let mut network = Network::<_, MemoryDisk>::new(transport.clone(), 3, 1, Rc::clone(&committed));
            let mut target = network.new_client(2, &Place { node: 2 }).await;
            // The first asks where the follower is, whatever it holds; the fourth lies behind what it has confirmed.
            let requests = [
                append(4, 0, 3),
                append(4, 2, 4),
                append(6, 0, 6),
                append(5, 0, 6),
                append(6, 1, 6),
            ];
            let input = stream::iter(requests);
            let results = target
                .stream_append(input, RPCOption::new(Duration::from_secs(1)))
                .await;
            let matched: Vec<_> = results.unwrap().map(|result| result.unwrap().unwrap()).collect().await;
            assert_eq!(matched, [Some(at(4)), Some(at(6)), Some(at(7))]);
            assert_eq!(*transport.calls.borrow(), [kind::APPEND; 3]);
            assert_eq!(*transport.told.borrow(), [kind::COMMIT; 2]);
            assert_eq!(committed.get(), 6);
            // A stream of its own, as a heartbeat is, is always answered.
            let input = stream::iter([append(7, 0, 7)]);
            let results = target
                .stream_append(input, RPCOption::new(Duration::from_secs(1)))
                .await;
            assert_eq!(results.unwrap().count().await, 1);
            assert_eq!(transport.calls.borrow().len(), 4);
            assert_eq!(committed.get(), 7);
        });
    }
}
