//! What the log carries, and what applying it answers.

use crate::Version;

/// A precondition on the current version of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    /// No precondition.
    #[default]
    None,
    /// The key must be absent (or expired).
    IfAbsent,
    /// The key must be present with exactly this version. [`Version::ABSENT`] means the same as [`Condition::IfAbsent`].
    IfVersion(Version),
}

/// One operation of a log entry. It borrows its bytes, so that it is applied straight from a receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// Writes a value, replacing value and expiry of an older one.
    Put {
        /// 1 to [`crate::MAX_KEY_BYTES`] bytes.
        key: &'a [u8],
        /// 0 to [`crate::ShardConfig::max_value_bytes`] bytes.
        value: &'a [u8],
        /// Unix milliseconds of shard time from which the entry is gone; 0 = never. Only the low 48 bits are kept (the year
        /// 10889); anything above is taken as that maximum.
        expires_at_ms: u64,
        /// Checked against the current entry.
        condition: Condition,
    },
    /// Removes an entry.
    Delete {
        /// 1 to [`crate::MAX_KEY_BYTES`] bytes.
        key: &'a [u8],
        /// Checked against the current entry.
        condition: Condition,
    },
    /// Adds to a counter: an ASCII decimal `i64` as `i64::to_string` writes it. A missing key counts as 0. Keeps the expiry.
    Incr {
        /// 1 to [`crate::MAX_KEY_BYTES`] bytes.
        key: &'a [u8],
        /// What is added.
        delta: i64,
    },
    /// Sets the expiry of an entry and leaves its value.
    Touch {
        /// 1 to [`crate::MAX_KEY_BYTES`] bytes.
        key: &'a [u8],
        /// As in [`Command::Put`].
        expires_at_ms: u64,
    },
    /// Removes the entry to make room, if it has not been written since it was proposed.
    Evict {
        /// The hash of its key, as [`crate::Shard::hash`] gives it.
        hash: u64,
        /// Its version when proposed.
        version: Version,
    },
    /// Removes the entry because its time has come, if it has not been written since it was proposed and shard time has reached
    /// its expiry.
    Expire {
        /// The hash of its key, as [`crate::Shard::hash`] gives it.
        hash: u64,
        /// Its version when proposed.
        version: Version,
    },
}

/// What a command did. A function of the log alone: every replica gives the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done. For a put or touch this is the entry's new version; for a delete, evict or expire the version of the removal itself.
    Applied {
        /// The version of this command.
        version: Version,
    },
    /// A counter was changed.
    Counter {
        /// The entry's new version.
        version: Version,
        /// The counter's new value.
        value: i64,
    },
    /// There is no such entry (or it has expired, or it has changed since it was proposed). Nothing was changed.
    NotFound,
    /// The condition does not hold. Nothing was changed.
    ConditionFailed {
        /// The version the key has, [`Version::ABSENT`] if none.
        current: Version,
    },
    /// The value is not a decimal `i64`. Nothing was changed.
    NotANumber,
    /// The counter would leave the range of `i64`. Nothing was changed.
    Overflow,
    /// The shard's budget does not allow the entry to be added or to grow. Nothing was changed.
    OutOfMemory,
    /// The key is empty or too long, or the value is too long. Nothing was changed.
    InvalidSize,
}

/// An entry offered for removal. It becomes [`Command::Evict`] or [`Command::Expire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// The hash of its key under the shard's seed.
    pub hash: u64,
    /// Its version; a write since then voids the offer.
    pub version: Version,
}
