//! The configuration of a shard, and the limits it cannot pass.

/// The longest key, in bytes.
pub const MAX_KEY_BYTES: usize = u16::MAX as usize;

/// The longest value a shard can be configured for, in bytes. The default limit is 8 MiB.
pub const MAX_VALUE_BYTES: usize = (1 << 24) - 1;

/// What an entry costs beyond its key and value: header, links, index share.
const ENTRY_OVERHEAD_BYTES: u64 = 40;

/// The share of key and value that is charged for rounding to size classes, as a divisor.
const ROUNDING_SHARE: u64 = 32;

/// See [`crate::Shard::cost`].
#[inline]
pub(crate) fn cost(key_len: usize, value_len: usize) -> u64 {
    let payload = (key_len + value_len) as u64;
    payload + payload / ROUNDING_SHARE + ENTRY_OVERHEAD_BYTES
}

/// What makes room when the budget is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Strict least-recently-used order.
    #[default]
    Lru,
    /// S3-FIFO (Yang et al., SOSP '23): a small first-in-first-out queue for what is new, a main one for what was asked for
    /// again, and a memory of what left too early. Resists scans; a hit sets two bits and moves nothing.
    S3Fifo,
    /// Nothing does: writes past the budget fail with [`crate::Outcome::OutOfMemory`].
    NoEvict,
}

/// How a shard is set up. Budget, policy and seed are replicated configuration: replicas of a shard must agree on all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardConfig {
    /// Bytes the entries may take, by the arithmetic of [`crate::Shard::cost`].
    pub budget_bytes: u64,
    /// How many entries there may be; `None` = as many as the bytes allow.
    pub max_records: Option<u64>,
    /// What makes room.
    pub policy: Policy,
    /// The key of the shard's hash function: secret, random, and the same on every replica of the cluster, because hashes travel
    /// in the log and in cursors. The default (zero) is for tests.
    pub seed: [u64; 2],
    /// The longest value accepted, at most [`MAX_VALUE_BYTES`].
    pub max_value_bytes: usize,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            budget_bytes: 64 << 20,
            max_records: None,
            policy: Policy::default(),
            seed: [0, 0],
            max_value_bytes: 8 << 20,
        }
    }
}
