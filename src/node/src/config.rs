//! What one core is told at its start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use generation_engine::ShardConfig;
use generation_engine::session::SessionLimits;
use generation_proto::Limits;
use generation_proto::limits::SESSION_WINDOW;
use generation_quic::ServerCrypto;
use rustls::pki_types::CertificateDer;

use crate::gossip::Gossip;
use crate::peers::PeersConfig;
use crate::raft::replica::Timing;
use crate::raft::shards::Durability;

/// What a peer may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Reads and writes entries.
    Client,
    /// All a client may, and operations on the cluster.
    Admin,
    /// Another node.
    Node,
}

/// Who a peer is, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// Its name, for logs and policies.
    pub name: String,
}

/// Tells from the certificates a peer presented, its own first, who it is; or, in words for the peer and the log, why it is not
/// served. TLS has verified the chain already.
pub type Authorize = Arc<dyn Fn(&[CertificateDer<'_>]) -> Result<Identity, String> + Send + Sync>;

/// Bounds of one core's queues and patience.
#[derive(Debug, Clone)]
pub struct NodeLimits {
    /// Datagrams taken from the socket in one turn.
    pub datagrams_per_turn: usize,
    /// Requests executed in one turn.
    pub requests_per_turn: usize,
    /// Bytes read from one stream in one turn.
    pub stream_read_bytes: usize,
    /// Encoded reply bytes waiting on one stream, above which its requests wait.
    pub stream_reply_bytes: usize,
    /// Bytes of requests not yet complete, over all connections of a core. When they become more, the connection that has left
    /// most is closed.
    pub unfinished_bytes: usize,
    /// Requests of this core being executed by one other core.
    pub forwarded: usize,
    /// Reply bytes made for one other core in one turn, above which its reads are answered `Busy`.
    pub forwarded_reply_bytes: usize,
    /// Bytes of keys and values in one page of keys or entries.
    pub page_bytes: usize,
    /// Entries looked at for one page of keys or entries.
    pub page_work: usize,
    /// What a `Busy` reply says to wait.
    pub retry_after: Duration,
    /// How long a peer may take to say `Hello`, to begin a request on a stream it opened, and to go on with one it began.
    pub patience: Duration,
    /// How long a stop waits for requests under way, and then again for their replies to be acknowledged.
    pub drain: Duration,
    /// How often the expiry sweep takes a step.
    pub sweep_interval: Duration,
    /// In how many steps the sweep goes round a shard.
    pub sweep_steps: u64,
    /// Connections of clients of one address to one core; all of a network of 64 bits count as one address in IPv6.
    pub connections_per_address: u32,
    /// From the lowest write of a session without a reply to the newest, as far as a client may go: so many replies are kept. At most
    /// [`generation_proto::limits::SESSION_WINDOW`].
    pub session_window: u64,
    /// How long a session may be idle before it expires. Part of the replicated state: what the node that leads a shard is told counts.
    pub session_idle: Duration,
}

impl Default for NodeLimits {
    fn default() -> Self {
        Self {
            datagrams_per_turn: 64,
            requests_per_turn: 4096,
            stream_read_bytes: 256 << 10,
            stream_reply_bytes: 1 << 20,
            unfinished_bytes: 256 << 20,
            forwarded: 16_384,
            forwarded_reply_bytes: 16 << 20,
            page_bytes: 256 << 10,
            page_work: 16 << 10,
            retry_after: Duration::from_millis(10),
            patience: Duration::from_secs(10),
            drain: Duration::from_millis(750),
            sweep_interval: Duration::from_millis(100),
            sweep_steps: 100,
            connections_per_address: 4096,
            session_window: SESSION_WINDOW,
            session_idle: Duration::from_millis(SessionLimits::default().idle_ms),
        }
    }
}

/// How a node's shards are replicated and kept.
#[derive(Debug, Clone)]
pub struct Replication {
    /// Identity of the cluster, drawn at random when it was made, the same on all its nodes. Shards hash keys by it.
    pub cluster: u128,
    /// What an acknowledged write has survived.
    pub durability: Durability,
    /// Length of a segment of a core's journal in bytes, a multiple of 4096, at least [`Replication::MIN_SEGMENT_BYTES`] and longer by
    /// that than the longest value.
    pub segment_bytes: u64,
    /// Most segments of a core's journal, at least 4.
    pub segments: usize,
    /// Bytes a shard's log must have grown by before a snapshot is taken, unless the journal needs room.
    pub snapshot_bytes: u64,
    /// Patience of replicas with each other.
    pub timing: Timing,
    /// Where the nodes of the cluster and the places of its replicas are said.
    pub membership: Membership,
}

/// Where it is said which nodes a cluster has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Membership {
    /// In the configuration of every node: each has a replica of every shard, and that is for good.
    #[default]
    Fixed,
    /// In the records of the controller: nodes come and go, and replicas move. A node without records waits until an administrator has
    /// it found a cluster or takes it into one.
    Managed {
        /// The node's zone; empty: none.
        zone: String,
    },
}

impl NodeLimits {
    /// The limits of a shard's table of sessions.
    pub(crate) fn sessions(&self) -> SessionLimits {
        SessionLimits {
            idle_ms: u64::try_from(self.session_idle.as_millis()).unwrap_or(u64::MAX),
            ..SessionLimits::default()
        }
    }
}

impl Replication {
    /// A shorter segment holds too few entries beside what is kept free for votes.
    pub const MIN_SEGMENT_BYTES: u64 = 1 << 20;
}

/// Everything one core of a node needs to know. All cores of a node are given the same.
#[derive(Clone)]
pub struct CoreConfig {
    /// Name of the cluster.
    pub cluster: String,
    /// This node's id, not 0.
    pub node: u64,
    /// Where clients reach the node.
    pub addr: SocketAddr,
    /// How many shards there are; shard `s` belongs to core `s` modulo the number of cores.
    pub shards: u16,
    /// Epoch of the map and of its shards: larger whenever the shards begin empty. Without replication that is at every start; with it,
    /// all nodes have the same, as long as the cluster exists.
    pub epoch: u32,
    /// How shards are replicated. Where [the nodes are fixed](Membership::Fixed) every shard has a replica on this node and on each of
    /// [`PeersConfig::nodes`]. Without it the node is alone, and its shards are gone when it stops.
    pub replication: Option<Replication>,
    /// Configuration of each shard.
    pub shard: ShardConfig,
    /// Longest key and value accepted.
    pub limits: Limits,
    /// Bounds of queues and patience.
    pub node_limits: NodeLimits,
    /// Bounds of the transport.
    pub quic_limits: generation_quic::Limits,
    /// Whether the sockets promise not to fragment, so that the path's MTU can be probed.
    pub mtu_discovery: bool,
    /// TLS of the accepting side. It must ask for client certificates.
    pub crypto: ServerCrypto,
    /// Key material of address validation and stateless resets, the same on all cores.
    pub secret: [u8; 32],
    /// Says who a peer is.
    pub authorize: Authorize,
    /// The other nodes.
    pub peers: PeersConfig,
    /// What tells the other nodes who leads what, and hears it from them, where the node gossips.
    pub gossip: Option<Arc<dyn Gossip>>,
    /// Name and version of the software, as `Hello` tells it.
    pub software: String,
}

impl std::fmt::Debug for CoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreConfig")
            .field("cluster", &self.cluster)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}
