//! What a client tells of itself.

use std::time::Duration;

use super::breaker::BreakerState;

/// What a client has done so far and what it thinks of the nodes; counters only grow.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metrics {
    /// Requests sent to nodes: first attempts, later ones, hedges and the client's own questions.
    pub requests: u64,
    /// Attempts after the first that followed a redirect at once.
    pub redirects: u64,
    /// Attempts after the first that waited and were paid from the budget, unless no connection was found.
    pub retries: u64,
    /// Reads that were asked of a second replica.
    pub hedges: u64,
    /// Those of them that the second replica answered first.
    pub hedges_won: u64,
    /// Retries and hedges that the budget still allows.
    pub retries_left: u32,
    /// Epoch of the map.
    pub map_epoch: u32,
    /// The nodes of the map, in its order.
    pub nodes: Vec<NodeMetrics>,
}

/// What a client thinks of one node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeMetrics {
    /// The node.
    pub node: u64,
    /// Its address.
    pub addr: String,
    /// Requests sent to it.
    pub requests: u64,
    /// Requests that it has not answered yet.
    pub outstanding: u32,
    /// The moving average of the time it takes to answer a read; `None`: not measured.
    pub latency: Option<Duration>,
    /// Whether relaxed reads are sent to it.
    pub breaker: BreakerState,
    /// Failures since its last answer.
    pub failures: u32,
    /// Since how long it has not answered, if it has failed since its last answer.
    pub silent_for: Option<Duration>,
}
