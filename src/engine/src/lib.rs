//! The state machine of one Generation shard: store, eviction, expiry, versions, cursors.
//!
//! A [`Shard`] is pure and synchronous. It has one owner, takes `&mut self`, holds no lock, and reads no clock: the log brings it
//! commands and time ([`Shard::begin`], [`Shard::apply`]), and everything that replicas must agree on (outcomes, versions,
//! accounting, [`Shard::state_hash`]) is a function of that log alone. Recency, layout in memory and hash-table geometry are each
//! replica's own and never show in any of it.
//!
//! What follows from this:
//! - **Nothing is evicted or expired by itself.** [`Shard::propose_victims`] and [`Shard::propose_expired`] offer entries by
//!   `(hash, version)`; the caller puts them into the log, and [`Shard::apply`] removes those that have not changed since.
//! - **Capacity is counted, not measured**: [`Shard::cost`] is arithmetic on lengths, the same on every replica and release.
//! - **Cursors are positions in hash order**, so a scan begun on one replica resumes on another with the same seed.
//!
//! Around it stands what replication needs and what is just as pure: the codec of log entries ([`batch`]), client sessions
//! ([`session`]), the whole replicated state that a replica applies its log to ([`machine`]), the format, recovery and
//! bookkeeping of the journal that keeps the log ([`journal`]), and the container of snapshots ([`snapshot_file`]). And of the
//! cluster as a whole, whose records are entries of such a shard: what they say and what follows from them ([`cluster`]).
//!
//! Not here: replication itself, disks, clocks.

mod arena;
mod classes;
mod command;
mod config;
mod cpu;
mod digest;
mod entries;
mod entry;
mod ghost;
mod hash;
mod index;
mod list;
mod memo;
mod memory;
mod segment;
mod shard;
mod snapshot;
mod stats;
mod store;
mod version;

pub mod batch;
pub mod cluster;
mod codec;
pub mod journal;
pub mod machine;
pub mod mutants;
pub mod session;
pub mod snapshot_file;

pub use command::{Command, Condition, Outcome, Victim};
pub use config::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Policy, ShardConfig};
pub use shard::{Cursor, EntryRef, Progress, Restore, RestoreError, Shard, Tolerated};
pub use snapshot::{SnapshotBusy, SnapshotEntry, SnapshotHead};
pub use stats::ShardStats;
pub use version::Version;

#[cfg(test)]
mod tests;
