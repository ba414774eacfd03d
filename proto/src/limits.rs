//! Limits of the protocol, and how they depend on each other.

/// Longest key, in bytes. Key lengths are 16-bit everywhere.
pub const MAX_KEY_LEN: usize = 65_535;

/// Longest value a node accepts unless configured otherwise, in bytes.
pub const DEFAULT_MAX_VALUE_LEN: usize = 8 << 20;

/// Largest value length that can be configured, in bytes: a frame's length is 32-bit and must hold a key and a value.
pub const MAX_VALUE_LEN: usize = 1 << 30;

/// Room in a frame beside one key and one value: fixed parts and options.
pub const FRAME_OVERHEAD: usize = 4096;

/// Most keys or entries in one `MultiGet`, `MultiPut`, `MultiDelete`, `Keys` page or `Entries` page. It is also the number of
/// operations one log entry can hold, so that a batch for one shard always fits one entry.
pub const MAX_BATCH: usize = 65_536;

/// Longest echo payload of `Ping`, in bytes.
pub const MAX_PING_LEN: usize = 1024;

/// Longest client name in `Hello`, in bytes.
pub const MAX_NAME_LEN: usize = 255;

/// Number of slots: `slot = CRC16(key) mod SLOTS`, as Redis Cluster has it.
pub const SLOTS: u16 = 16_384;

/// Most shards in a cluster. Shards are few and fat; the slot is the fine grain.
pub const MAX_SHARDS: usize = 4096;

/// Most nodes in a map.
pub const MAX_NODES: usize = 4096;

/// Most replicas of one shard in a map (members, learners and leavers together).
pub const MAX_REPLICAS: usize = 16;

/// Most numbers of a session that may lie between its oldest write without a reply and its newest, both included: a shard keeps the
/// replies of so many. It is also the most keys of a request in a session.
pub const SESSION_WINDOW: u64 = 1024;

/// Smallest frame payload limit a node or a client may have, in bytes, however short the values it takes: a batch without values,
/// its results, and every map fit.
pub const MIN_FRAME_LIMIT: usize = (2 << 20) + FRAME_OVERHEAD;

const _: () = assert!(
    MAX_VALUE_LEN + MAX_KEY_LEN + FRAME_OVERHEAD <= u32::MAX as usize,
    "a frame's 32-bit length must hold the largest entry"
);
const _: () = assert!(MAX_KEY_LEN <= u16::MAX as usize, "key lengths are 16-bit on the wire");
const _: () = assert!(
    MAX_BATCH * crate::reply::MultiResult::OVERHEAD + FRAME_OVERHEAD <= MIN_FRAME_LIMIT,
    "the results of the largest batch must fit, for each key a refusal at least"
);
const _: () = assert!(
    crate::map::MAX_ENCODED_LEN + FRAME_OVERHEAD <= MIN_FRAME_LIMIT,
    "a client must be able to read every map"
);
const _: () = assert!(
    MAX_SHARDS <= SLOTS as usize,
    "a shard without a slot could never be addressed"
);

/// The limits one side enforces on what it decodes. A node states its own in the reply to `Hello`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest key accepted, in bytes, at most [`MAX_KEY_LEN`].
    pub max_key_len: usize,
    /// Longest value accepted, in bytes, at most [`MAX_VALUE_LEN`].
    pub max_value_len: usize,
}

impl Limits {
    /// Largest frame payload (the header's `len`) that can be legal under these limits, in bytes; in both directions.
    pub const fn max_frame_len(&self) -> usize {
        let entry = self.max_key_len + self.max_value_len + FRAME_OVERHEAD;
        if entry > MIN_FRAME_LIMIT {
            entry
        } else {
            MIN_FRAME_LIMIT
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_key_len: MAX_KEY_LEN,
            max_value_len: DEFAULT_MAX_VALUE_LEN,
        }
    }
}
