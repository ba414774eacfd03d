//! Counters of what a core and a node have had to do with each other.

use crate::stats::counters;

counters! {
    /// Counters of one core's dealings with one node since the core's start, and a few gauges.
    PeerStats {
        /// Gauge: connections on which both sides have said who they are.
        connections,
        /// Gauge: connections being made, by either side.
        connecting,
        /// Gauge: calls without an answer.
        calls_in_flight,
        /// Gauge: bytes of messages the transport has not taken.
        queued_bytes,
        /// Gauge: the last round trip measured, on core 0, in microseconds.
        round_trip_us,
        /// Calls begun.
        calls,
        /// Calls that ended at their deadline.
        calls_timed_out,
        /// Calls that ended because their connection was lost or could not be made.
        calls_lost,
        /// Calls the node refused.
        calls_refused,
        /// Calls and messages not taken because too much was under way.
        busy,
        /// Messages sent, of any class.
        messages_sent,
        /// Their bytes, headers included.
        sent_bytes,
        /// Messages received.
        messages_received,
        /// Their bytes, headers included.
        received_bytes,
        /// Requests among them.
        requests,
        /// Requests refused because too much was under way.
        requests_refused,
        /// Connections begun by this core.
        dials,
        /// Connections that were established and greeted, whoever began them.
        connects,
        /// Connections that ended otherwise than in good order, or could not be made.
        connections_lost,
        /// Connections closed because the node broke the protocol.
        violations,
        /// Times the node was taken for dead.
        suspicions,
    }
}
