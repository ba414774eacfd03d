//! What a shard tells about itself.

/// Counters and gauges of one shard. Counters run from its creation and are this replica's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardStats {
    /// Entries held, expired ones not yet removed included.
    pub records: u64,
    /// The sum of [`crate::Shard::cost`] over them.
    pub used_bytes: u64,
    /// The configured budget in bytes.
    pub budget_bytes: u64,
    /// The configured limit of entries.
    pub max_records: Option<u64>,
    /// Memory held for entries and index, in bytes, free space inside it included.
    pub resident_bytes: u64,
    /// Of that, the index.
    pub index_bytes: u64,
    /// Lookups that found an entry.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Entries removed to make room.
    pub evictions: u64,
    /// Entries removed because their time had come.
    pub expirations: u64,
    /// Writes refused for lack of room.
    pub refused: u64,
    /// Entries offered for removal whose removal has not been applied.
    pub offered: u64,
    /// Memory held by copies of entries that changed while a snapshot was under way, until its next slice.
    pub snapshot_bytes: u64,
}
