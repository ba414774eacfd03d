//! Replication of shards: each shard is one Raft group, driven by openraft over this node's environment.
//!
//! Everything of one core runs in that core's executor, single-threaded, without locks; [`runtime`] is what openraft takes for
//! time, tasks, channels and chance, [`types`] are its type parameters, [`journal`] keeps its logs.
//!
//! Not here: what log entries mean (the engine), connections between nodes, which node holds which shard.

pub mod joining;
pub mod journal;
pub mod machine;
mod membership;
pub mod network;
pub mod proposer;
pub mod replica;
pub mod runtime;
pub mod shards;
mod snapshot;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod transport;
mod trimming;
pub mod types;
pub(crate) mod wire;

pub use generation_engine::snapshot_file;
pub use snapshot::SnapshotFile;
