//! Messages between the cores of one node.
//!
//! A request for another core's shard travels as the frame it came in. Its answer comes back encoded, so that the core which
//! holds the connection only has to append it to the right stream. Every forwarded request is answered, once: the sender keeps a
//! ticket until then.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use generation_engine::cluster::Cluster;
use generation_proto::Frame;
use generation_proto::map::Shard;

use crate::clocks::Clocks;
use crate::controller::report::Led;
use crate::env::Datagram;

/// One message from a core to another core of the same node.
#[derive(Debug)]
pub enum MeshMessage {
    /// A datagram of a connection the receiver owns.
    Datagram(Datagram),
    /// Requests for shards the receiver owns: all that one turn of the sender found.
    Requests(Vec<ForwardedRequest>),
    /// Answers to requests of the receiver.
    Replies(ForwardedReplies),
    /// The sender is stopping, and none of its requests are under way with the receiver any more.
    Drained,
    /// What core 0 has found out about another node.
    Peer(PeerLiveness),
    /// What has changed about shards of the sender.
    Shards(Vec<ShardView>),
    /// What core 0 has found out about the clocks of the cluster.
    Clocks(Clocks),
    /// Newer records of the cluster.
    Cluster(Arc<Cluster>),
    /// Who leads shards on other nodes, as these say: shard, term, node.
    Hints(Vec<(u16, u64, u64)>),
}

/// A shard as the core that owns it sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardView {
    /// Its number.
    pub number: u16,
    /// Who leads it and who belongs to it, for the map.
    pub shard: Shard,
    /// What is to be known of it where this node leads it.
    pub led: Option<Led>,
}

/// What is known of another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLiveness {
    /// The node.
    pub node: u64,
    /// Whether it is alive.
    pub alive: bool,
    /// Which of its starts it lives since, as it said itself; 0: not known.
    pub incarnation: u64,
}

/// A request for a shard of another core.
#[derive(Debug)]
pub struct ForwardedRequest {
    /// Names the request to its sender; comes back with every answer.
    pub ticket: u32,
    /// From when on it must not be executed any more.
    pub deadline: Option<Instant>,
    /// The request. Of one with several keys the receiver executes those of its own shards.
    pub frame: Frame,
}

/// Answers, laid end to end in one buffer.
#[derive(Debug, Default)]
pub struct ForwardedReplies {
    /// What the answers' lengths count off.
    pub bytes: Bytes,
    /// The answers, in the order of their bytes.
    pub answers: Vec<ForwardedReply>,
}

/// One answer, or one result of a request with several keys.
#[derive(Debug, Clone, Copy)]
pub struct ForwardedReply {
    /// The request's ticket.
    pub ticket: u32,
    /// For a result of a request with several keys: the key's place among them.
    pub position: Option<u32>,
    /// Bytes of the encoded reply frame, or of the encoded result.
    pub len: u32,
}
