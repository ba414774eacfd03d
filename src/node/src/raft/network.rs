//! openraft's calls to other replicas, over a transport between nodes. Every one of them has a deadline.

use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, OptionalSend};
use openraft_rt::{AsyncRuntime as _, Instant as _, Select2};

use super::runtime::{CoreInstant, Runtime};
use super::snapshot::{Outgoing, SnapshotFile};
use super::types::{LeaderId, Place, ReplicaId, Types, Vote};
use super::wire::{self, Chunks, ChunksReply, Wire, kind};
use crate::env::disk::Disk;

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

    /// Whether a node was heard of lately. A hint: it may be wrong either way.
    fn is_alive(&self, node: u64) -> bool;
}

/// Makes connections to the other replicas of one shard.
#[derive(Debug, Clone)]
pub(crate) struct Network<T, D> {
    transport: T,
    shard: u16,
    id: ReplicaId,
    disk: std::marker::PhantomData<fn() -> D>,
}

impl<T, D> Network<T, D> {
    pub(crate) fn new(transport: T, shard: u16, id: ReplicaId) -> Self {
        Self {
            transport,
            shard,
            id,
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
            disk: std::marker::PhantomData,
        }
    }
}

impl<T: Transport, D: Disk> Target<T, D> {
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
        self.ask(RPCTypes::AppendEntries, kind::APPEND, &rpc, option.soft_ttl())
            .await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(RPCTypes::Vote, kind::VOTE, &rpc, option.soft_ttl()).await
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
