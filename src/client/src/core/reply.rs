//! What replies carry, as callers see it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use generation_proto::Consistency as WireConsistency;

use super::session::SessionToken;

/// What every reply says beside its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// The entry's version: after a write the one it made, for a read the one found; 0: absent, or several entries.
    pub version: u64,
    /// Log index of the shard that the reply reflects.
    pub index: u64,
    /// The shard that answered.
    pub shard: u16,
    /// Epoch of the shard, as the client's map has it.
    pub shard_epoch: u32,
    /// The node that answered; 0 where it is not known.
    pub node: u64,
    /// Epoch of the node's map.
    pub map_epoch: u32,
    /// The node's wall clock, in milliseconds since the Unix epoch.
    pub server_time_ms: u64,
    /// Code of the consistency that the read achieved; [`Meta::consistency`] names it.
    pub consistency_code: u8,
    /// How old the state read is, in milliseconds, for stale reads.
    pub age_ms: Option<u32>,
}

impl Meta {
    /// The consistency achieved: `linearizable`, `session`, `stale`, or `unknown` to this version of the client.
    pub const fn consistency(&self) -> &'static str {
        match WireConsistency::name_of_code(self.consistency_code) {
            Some(name) => name,
            None => "unknown",
        }
    }

    /// A token for reads that must see at least what this reply reflects.
    pub fn token(&self) -> SessionToken {
        let mut token = SessionToken::new();
        if self.index != 0 {
            token.observe(self.shard, self.shard_epoch, self.index);
        }
        token
    }
}

/// An entry that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Bytes,
    /// The version, for [`crate::Put::if_version`]; it grows with each write of the key.
    pub version: u64,
    /// When it expires, in milliseconds since the Unix epoch by the cluster's clock; `None`: never.
    pub expires_at_ms: Option<u64>,
}

impl Entry {
    /// When it expires.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at_ms
            .map(|expires_at_ms| UNIX_EPOCH + Duration::from_millis(expires_at_ms))
    }
}

/// Reply to a `get`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetReply {
    /// The entry; `None`: the key is absent.
    pub entry: Option<Entry>,
    /// Who answered, at which index.
    pub meta: Meta,
}

impl GetReply {
    /// Whether the key was there.
    pub const fn is_found(&self) -> bool {
        self.entry.is_some()
    }

    /// The value, if the key was there.
    pub fn value(&self) -> Option<&Bytes> {
        self.entry.as_ref().map(|entry| &entry.value)
    }

    /// The value, if the key was there.
    pub fn into_value(self) -> Option<Bytes> {
        self.entry.map(|entry| entry.value)
    }

    /// The entry's version; 0: absent.
    pub const fn version(&self) -> u64 {
        self.meta.version
    }

    /// Time to live that was left when the node answered; `None`: absent, or it does not expire.
    pub fn ttl(&self) -> Option<Duration> {
        ttl(self.entry.as_ref()?.expires_at_ms, self.meta.server_time_ms)
    }
}

/// Reply to a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteReply {
    /// Whether there was an entry to act on: always for `put` and `incr`; `false` for a `delete` or `touch` of an absent key.
    pub found: bool,
    /// The number after an `incr`; 0 for other writes.
    pub counter: i64,
    /// When the entry expires now, in milliseconds since the Unix epoch; `None`: never, or the node did not say.
    pub expires_at_ms: Option<u64>,
    /// Who answered, at which index.
    pub meta: Meta,
}

impl WriteReply {
    /// The version the write made; 0 where nothing was written.
    pub const fn version(&self) -> u64 {
        self.meta.version
    }

    /// Time to live of the entry when the node answered; `None`: it does not expire.
    pub fn ttl(&self) -> Option<Duration> {
        ttl(self.expires_at_ms, self.meta.server_time_ms)
    }
}

/// An entry, or only its key, from a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanEntry {
    /// The key.
    pub key: Bytes,
    /// The value; empty in a scan of keys.
    pub value: Bytes,
    /// The version.
    pub version: u64,
    /// When it expires, in milliseconds since the Unix epoch; `None`: never.
    pub expires_at_ms: Option<u64>,
    /// The shard it is in.
    pub shard: u16,
}

/// Counters of one node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeStats {
    /// The node.
    pub node: u64,
    /// Its address.
    pub addr: String,
    /// Counters by name, in the node's order. Names are lower case and dotted, the unit last.
    pub stats: Vec<(String, u64)>,
}

impl NodeStats {
    /// A counter by name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.stats
            .iter()
            .find(|(have, _)| have == name)
            .map(|&(_, value)| value)
    }
}

/// What is left of a time to live by the node's own clock, so that the caller's clock does not matter.
fn ttl(expires_at_ms: Option<u64>, server_time_ms: u64) -> Option<Duration> {
    expires_at_ms.map(|expires_at_ms| Duration::from_millis(expires_at_ms.saturating_sub(server_time_ms)))
}
