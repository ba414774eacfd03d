//! Counters of a node, and their names.
//!
//! `Stats` answers with every counter of every core and shard. Names are stable: lower case, dotted, with their unit last.
//! - `node.*`: [`NodeStats::NAMES`] summed over the cores, and `node.cores` and `node.shards`.
//! - `core.N.*`: the same for core `N`.
//! - `core.N.peer.M.*`: [`crate::peers::PeerStats`] of core `N` and the cores of node `M`.
//! - `shard.N.*`: `records`, `max_records` (0: as many as the bytes allow), `used_bytes`, `budget_bytes`, `resident_bytes`,
//!   `index_bytes`, `hits`, `misses`, `evictions`, `expirations`, `refused`, `index` (the log index applied), `time_ms` (shard
//!   time), `core`, and `state_hash_high` and `state_hash_low`, the two halves of the state hash. Of a replica in a group, also
//!   `replica` (its id), `term`, `leads` (0 or 1), `votes` (0 or 1), `log_index` (the last entry of its log), `snapshot_index` (the last
//!   entry in its newest snapshot), `journal_bytes` (of the files with live entries of its log), `quiesced` (0 or 1),
//!   `snapshotting` (0 or 1), `damaged_snapshots` (found since the start), `ended` (0: it works; otherwise the code of
//!   [`crate::raft::replica::Ended`]).
//! - `core.N.durability_sync` and `core.N.journal_failed` (0 or 1), `core.N.clock_skew_ms` (how far the node's clock is off the median of
//!   all nodes'), and the same of the node, if it is replicated.

use bytes::BytesMut;
use generation_engine::Shard;
use generation_proto::reply::Stat;
use generation_quic::DriverStats;

macro_rules! counters {
    ($(#[doc = $about:literal])+ $type:ident { $($(#[doc = $doc:literal])+ $name:ident,)+ }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $type {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl $type {
            /// The names, in the order of the values.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name),)+];

            /// The values, in the order of the names.
            pub fn values(&self) -> impl Iterator<Item = u64> {
                [$(self.$name,)+].into_iter()
            }
        }
    };
}
pub(crate) use counters;

counters! {
/// Counters of one core since its start, and a few gauges.
NodeStats {
    /// Turns in which there was something to do.
    turns,
    /// Datagrams received from the socket.
    datagrams_received,
    /// Datagrams forwarded to the core that owns their connection.
    datagrams_forwarded,
    /// Datagrams dropped because that core's queue was full.
    datagrams_dropped,
    /// Trains of datagrams sent.
    trains_sent,
    /// Bytes of UDP payload sent.
    sent_bytes,
    /// Gauge: connections, closing ones included.
    connections,
    /// Connections accepted.
    connections_accepted,
    /// Connections whose handshake completed.
    connections_established,
    /// Attempts told to prove their address first (Retry).
    connections_retried,
    /// Attempts refused.
    connections_refused,
    /// Attempts not answered.
    connections_ignored,
    /// Handshakes that took too long.
    handshake_timeouts,
    /// Connections closed because the certificate names nobody this node serves, or for a foreign application protocol.
    connections_unauthorized,
    /// Connections closed because their address had as many as it may have.
    connections_crowded,
    /// Connections closed for not saying `Hello`, or not going on with what they began, in time.
    connections_timed_out,
    /// Connections closed for leaving too many bytes of requests unfinished.
    connections_overloading,
    /// Connections closed because what they sent cannot be read as frames.
    connections_malformed,
    /// Gauge: streams being served.
    streams,
    /// Requests read.
    requests,
    /// Requests answered by reading an entry or noting its absence.
    reads,
    /// Commands applied for requests.
    writes,
    /// Log entries applied on this core's shards.
    log_entries,
    /// Requests refused as malformed, out of range, too large or unknown.
    requests_rejected,
    /// Requests answered `Busy`.
    requests_busy,
    /// Requests answered `DeadlineExceeded`.
    requests_late,
    /// Requests answered `ShuttingDown`.
    requests_shutting_down,
    /// Requests sent to another core.
    requests_forwarded,
    /// Requests received from other cores.
    requests_of_other_cores,
    /// Times a stream was left unread because its replies were not taken.
    streams_paused,
}
}

impl NodeStats {
    pub(crate) fn add_driver(&mut self, driver: &DriverStats, connections: usize) {
        self.connections = connections as u64;
        self.connections_accepted = driver.accepted;
        self.connections_established = driver.connected;
        self.connections_retried = driver.retried;
        self.connections_refused = driver.refused;
        self.connections_ignored = driver.ignored;
        self.handshake_timeouts = driver.handshake_timeouts;
    }
}

/// The counters of a shard with their names' last parts.
fn of_shard(shard: &Shard, core: u16, hash: u128) -> [(&'static str, u64); 16] {
    let stats = shard.stats();
    [
        ("records", stats.records),
        ("max_records", stats.max_records.unwrap_or(0)),
        ("used_bytes", stats.used_bytes),
        ("budget_bytes", stats.budget_bytes),
        ("resident_bytes", stats.resident_bytes),
        ("index_bytes", stats.index_bytes),
        ("hits", stats.hits),
        ("misses", stats.misses),
        ("evictions", stats.evictions),
        ("expirations", stats.expirations),
        ("refused", stats.refused),
        ("index", shard.applied_index()),
        ("time_ms", shard.shard_time_ms()),
        ("core", u64::from(core)),
        ("state_hash_high", (hash >> 64) as u64),
        ("state_hash_low", hash as u64),
    ]
}

/// Appends the counters of one core.
pub(crate) fn encode_core(core: u16, stats: &NodeStats, out: &mut BytesMut) {
    for (name, value) in NodeStats::NAMES.iter().zip(stats.values()) {
        Stat {
            name: &format!("core.{core}.{name}"),
            value,
        }
        .encode(out);
    }
}

/// Appends the counters of a shard; `hash` is the digest of its state.
pub(crate) fn encode_shard(number: u16, shard: &Shard, core: u16, hash: u128, out: &mut BytesMut) {
    for (name, value) in of_shard(shard, core, hash) {
        let name = &format!("shard.{number}.{name}");
        Stat { name, value }.encode(out);
    }
}

/// Appends more counters of a shard.
pub(crate) fn encode_of_shard(number: u16, counters: &[(&str, u64)], out: &mut BytesMut) {
    for &(name, value) in counters {
        let name = &format!("shard.{number}.{name}");
        Stat { name, value }.encode(out);
    }
}

/// What a core says of its replicas as a whole; the node says the most that one of its cores does.
const FLAGS: [&str; 3] = ["durability_sync", "journal_failed", "clock_skew_ms"];

/// Appends what a core says of its replicas as a whole: in the order of [`FLAGS`].
pub(crate) fn encode_flags(core: u16, flags: [u64; 3], out: &mut BytesMut) {
    for (name, value) in FLAGS.iter().zip(flags) {
        let name = &format!("core.{core}.{name}");
        Stat { name, value }.encode(out);
    }
}

/// Appends the node's totals over the cores' counters in `parts`.
pub(crate) fn encode_totals(parts: &[u8], out: &mut BytesMut) {
    let mut flags = [None; FLAGS.len()];
    let mut totals = vec![0_u64; NodeStats::NAMES.len()];
    let mut cores = 0;
    let mut shards = 0;
    for stat in Stat::decode_all(parts).flatten() {
        let mut name = stat.name.splitn(3, '.');
        match (name.next(), name.nth(1)) {
            (Some("core"), Some(last)) => {
                if let Some(place) = FLAGS.iter().position(|name| *name == last) {
                    flags[place] = flags[place].max(Some(stat.value));
                }
                if let Some(place) = NodeStats::NAMES.iter().position(|name| *name == last) {
                    totals[place] += stat.value;
                    cores += u64::from(place == 0);
                }
            }
            (Some("shard"), Some("index")) => shards += 1,
            _ => {}
        }
    }
    for (name, value) in NodeStats::NAMES.iter().zip(totals) {
        Stat {
            name: &format!("node.{name}"),
            value,
        }
        .encode(out);
    }
    for (name, flag) in FLAGS.iter().zip(flags) {
        if let Some(value) = flag {
            let name = &format!("node.{name}");
            Stat { name, value }.encode(out);
        }
    }
    Stat {
        name: "node.cores",
        value: cores,
    }
    .encode(out);
    Stat {
        name: "node.shards",
        value: shards,
    }
    .encode(out);
}
