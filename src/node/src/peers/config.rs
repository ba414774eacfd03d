//! What a core is told about the other nodes.

use std::net::SocketAddr;
use std::time::Duration;

use generation_proto::peer::MAX_PAYLOAD_LEN;
use generation_quic::ClientCrypto;

use crate::env::CoreId;

/// Another node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerNode {
    /// Its id, not 0 and not this node's.
    pub id: u64,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its cores, from 1 to 256.
    pub cores: CoreId,
    /// Identity of its data directory, where it is known: who says another is not let in.
    pub directory: Option<u128>,
}

/// Bounds of what is under way with other nodes, and patience with them. Each bound is for one core of one other node.
#[derive(Debug, Clone)]
pub struct PeerLimits {
    /// Calls without an answer; one more is `Busy`.
    pub calls: usize,
    /// Bytes of messages on one lane that the transport has not taken; a call or message more is `Busy`.
    pub queue_bytes: usize,
    /// Requests of the other side being answered; one more is refused.
    pub incoming: usize,
    /// Bytes of these requests; one that passes them is refused.
    pub incoming_bytes: usize,
    /// Bytes of replies on one lane that the transport has not taken; past them the connection is closed.
    pub unread_bytes: usize,
    /// Bytes read from one lane in one turn.
    pub read_bytes: usize,
    /// Longest payload of a message, at most [`MAX_PAYLOAD_LEN`].
    pub message_bytes: usize,
    /// How long a dial may take, and a peer that dialled to say who it is.
    pub dial_timeout: Duration,
    /// Pause after a dial that failed. It doubles each time, up to `backoff_most`, and is shortened by chance down to its half.
    pub backoff_least: Duration,
    /// Longest pause.
    pub backoff_most: Duration,
    /// How often a node that is silent otherwise is asked for a sign of life.
    pub ping_interval: Duration,
    /// Silence, as far as this core was running to hear it, after which a node is taken for dead. At least three intervals.
    pub suspect_after: Duration,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            calls: 4_096,
            queue_bytes: 32 << 20,
            incoming: 8_192,
            incoming_bytes: 64 << 20,
            unread_bytes: 128 << 20,
            read_bytes: 1 << 20,
            message_bytes: MAX_PAYLOAD_LEN,
            dial_timeout: Duration::from_secs(1),
            backoff_least: Duration::from_millis(20),
            backoff_most: Duration::from_secs(1),
            ping_interval: Duration::from_millis(100),
            suspect_after: Duration::from_millis(500),
        }
    }
}

/// The other nodes, and who this one is to them.
#[derive(Debug, Clone, Default)]
pub struct PeersConfig {
    /// The other nodes. Nodes that are not listed are refused.
    pub nodes: Vec<PeerNode>,
    /// TLS to dial with, for [`generation_proto::ALPN_PEER`]: it verifies that the other side's certificate is of the cluster's
    /// authority, whatever name it is asked about. Without it this node only waits to be dialled.
    pub crypto: Option<ClientCrypto>,
    /// Identity of this node's data directory.
    pub directory: u128,
    /// Drawn anew at each start, the same for all cores.
    pub incarnation: u64,
    /// Bounds and patience.
    pub limits: PeerLimits,
}
