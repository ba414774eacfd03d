//! How replicas reach each other: calls over [`Peers`], to the core of the node that has the shard.

use std::time::Instant;

use bytes::Bytes;

use super::network::{CallError, Transport};
use crate::peers::{PeerError, PeerId, Peers};
use crate::view::Views;

/// Calls from one core to the other nodes.
#[derive(Debug, Clone)]
pub struct PeerTransport {
    peers: Peers,
    views: Views,
}

impl PeerTransport {
    /// Over `peers`, to the nodes of the newest of `views`.
    pub const fn new(peers: Peers, views: Views) -> Self {
        Self { peers, views }
    }

    /// The core of `node` that has `shard`.
    pub fn at(&self, node: u64, shard: u16) -> Option<PeerId> {
        let core = self.views.with(|view| view.core(node, shard))?;
        Some(PeerId { node, core })
    }
}

impl Transport for PeerTransport {
    async fn call(
        &self,
        node: u64,
        shard: u16,
        kind: u8,
        payload: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, CallError> {
        let to = self.at(node, shard).ok_or(CallError::Unreachable(node))?;
        let answer = self.peers.call(to, shard, kind, payload, deadline).await;
        answer.map_err(|error| match error {
            PeerError::Unknown | PeerError::Unreachable | PeerError::Stopped => CallError::Unreachable(node),
            PeerError::Timeout { .. } => CallError::Timeout,
            PeerError::TooLarge(_) | PeerError::Busy | PeerError::Lost { .. } | PeerError::Refused(_) => {
                CallError::Failed(error.to_string())
            }
        })
    }

    fn tell(&self, node: u64, shard: u16, kind: u8, payload: Bytes) {
        if let Some(to) = self.at(node, shard) {
            // It may be lost.
            let _ = self.peers.send_along(to, shard, kind, payload);
        }
    }

    fn is_alive(&self, node: u64) -> bool {
        self.peers.is_alive(node)
    }
}
