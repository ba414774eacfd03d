//! How replicas reach each other: calls over [`Peers`], to the core of the node that has the shard.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;

use super::network::{CallError, Transport};
use crate::env::CoreId;
use crate::peers::{PeerError, PeerId, PeerNode, Peers};

/// Calls from one core to the other nodes.
#[derive(Debug, Clone)]
pub struct PeerTransport {
    peers: Peers,
    /// The cores of each of the other nodes.
    cores: Rc<BTreeMap<u64, CoreId>>,
}

impl PeerTransport {
    /// Over `peers`, to these nodes.
    pub fn new(peers: Peers, nodes: &[PeerNode]) -> Self {
        let cores = nodes.iter().map(|node| (node.id, node.cores)).collect();
        Self {
            peers,
            cores: Rc::new(cores),
        }
    }

    /// The core of `node` that has `shard`.
    pub fn at(&self, node: u64, shard: u16) -> Option<PeerId> {
        let cores = *self.cores.get(&node)?;
        Some(PeerId {
            node,
            core: shard % cores,
        })
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
