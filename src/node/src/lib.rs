//! One Generation node, generic over its environment.
//!
//! A node is one [`run`] per core. A core owns its connections and its shards and shares nothing: what concerns another core's
//! shard crosses the [`mesh`] by value. Each core lives in turns: take what has arrived, decode every request in it, execute
//! them as one batch a shard, encode the replies, flush every connection once, park.
//!
//! ```text
//! datagrams ─▶ driver ─▶ streams ─▶ dispatch ─┬▶ replica (shard of this core) ─▶ replies ─▶ streams ─▶ driver ─▶ datagrams
//!        mesh ─▶ requests of other cores ─────┘└▶ mesh (shard of another core) ─▶ …
//!      driver ─▶ peers (other nodes) ─▶ driver
//! ```
//!
//! Invariants:
//! - Every request that was read as a frame is answered exactly once, unless its stream or connection ends first.
//! - Every queue is bounded. What does not fit is answered `Busy` with a time to wait; nothing waits without a bound.
//! - `dispatch` and `execute` alone translate between the protocol and the engine; `replica` alone proposes to a shard.
//!
//! Not here: sockets, threads, clocks, files ([`env::Env`] has them); TLS files and certificates' meaning (the caller's).

mod clocks;
mod config;
mod connections;
mod controller;
mod dispatch;
pub mod env;
mod execute;
pub mod gossip;
mod group;
mod leadership;
pub mod mesh;
pub mod peers;
pub mod points;
mod quiescer;
pub mod raft;
mod reactor;
mod replica;
mod replies;
pub mod stats;
mod streams;
pub mod view;

pub use clocks::Clocks;
pub use config::{Authorize, CoreConfig, Identity, Membership, NodeLimits, Replication, Role};
pub use controller::report::Led;
pub use generation_engine::cluster as records;
pub use generation_engine::{MAX_VALUE_BYTES, Policy, ShardConfig};
pub use generation_proto::close_code;
pub use raft::replica::Timing;
pub use raft::shards::Durability;
pub use reactor::{Core, StartError, open, run, run_with_peers};
