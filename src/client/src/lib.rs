//! The native Rust client of Generation.
//!
//! A client learns the cluster's map from any node and sends each request straight to the core that owns the key's shard, over
//! one QUIC connection for each core it needs. Requests made at the same time travel together, and replies come in any order.
//!
//! ```no_run
//! use std::time::Duration;
//! use generation_client::{Client, ClientConfig};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // As `generation dev` writes it: the cluster's name, its nodes, and the client's certificate.
//! let config = ClientConfig::load(".generation/client.toml")?;
//! let client = Client::builder().config(config).timeout(Duration::from_secs(2)).connect().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```
//! # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
//! # fake::example(async |client| {
//! use std::time::Duration;
//!
//! client.put("user:1", "Ada").ttl(Duration::from_secs(60)).await?;
//! let read = client.get("user:1").await?;
//! assert_eq!(read.value().unwrap(), "Ada");
//! assert!(read.ttl().unwrap() <= Duration::from_secs(60));
//!
//! // Compare and swap, by the version that was read.
//! client.put("user:1", "Ada L.").if_version(read.version()).await?;
//! let error = client.put("user:1", "Bob").if_version(read.version()).await.unwrap_err();
//! assert_eq!(error.code(), "condition_failed");
//! # Ok(())
//! # });
//! ```
//!
//! Programs that are not asynchronous use [`blocking::Client`], which has the same operations.
//!
//! # A cluster of many nodes
//!
//! Writes and linearizable reads go to the leader of the key's shard. Reads that say how stale they may be, or what they must have
//! seen, go to whichever replica looks quickest from here, and to a second one when the first takes long:
//!
//! ```
//! # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
//! # fake::example(async |client| {
//! use std::time::Duration;
//!
//! client.put("user:1", "Ada").await?;
//! // What this client wrote, from any replica that has it.
//! assert!(client.get("user:1").read_your_writes().await?.is_found());
//! // A state at most a second old, whoever wrote it.
//! let read = client.get("user:1").stale(Duration::from_secs(1)).await?;
//! println!("from node {}", read.meta.node);
//! # Ok(())
//! # });
//! ```
//!
//! A node that does not answer is noticed once for all requests and shards; relaxed reads pass it by until a probe finds it well. Seeds are
//! names, resolved again when no node of the map answers and every now and then ([`ClientBuilder::seed`], [`Resolve`]). Scans go on on
//! another replica when theirs dies, and in another process from a [`Cursor`]'s text.
//!
//! # What it promises
//!
//! - **Nothing is executed twice by itself.** What a node did not take ([`Error::NotSent`]) is tried again within the request's
//!   time and a budget that all requests share, hedges included; what may have been executed ([`Error::InDoubt`]) is handed to the caller, for
//!   every write, also one that looks repeatable: another client may have written in between. Writes of [`Client::exactly_once`] are
//!   numbered and repeated by the client, because the cluster executes a number once.
//! - **A dropped future leaves nothing behind** in the client; whether its request was executed is then unknown.
//! - **Everything is bounded**: unanswered requests and their bytes per connection, retries, and time.
//! - **Nodes are known by their certificates** (`generation://CLUSTER/node/ID`), not by their addresses.
//!
//! # Layers
//!
//! [`core`] is the client without sockets, clock or tasks, for the simulator and for whoever brings another runtime
//! (`default-features = false`). The rest, on tokio and quinn, is the feature `tokio`, on by default.

#![forbid(unsafe_code)]

pub mod core;
#[cfg(feature = "tokio")]
mod front;

pub use self::core::breaker::BreakerState;
pub use self::core::consistency::{Consistency, ParseConsistencyError};
pub use self::core::error::{ConnectError, Error, InDoubt, NotSent, Rejected, State};
pub use self::core::hedge::{HedgeDelay, HedgePolicy};
pub use self::core::metrics::{Metrics, NodeMetrics};
pub use self::core::reply::{Entry, GetReply, Meta, NodeStats, ScanEntry, WriteReply};
pub use self::core::retry::RetryPolicy;
pub use self::core::session::{ParseTokenError, SessionToken};
#[cfg(feature = "tokio")]
pub use self::front::blocking;
#[cfg(feature = "tokio")]
pub use self::front::{
    Client, ClientBuilder, ClientConfig, ConfigError, Credential, Cursor, Delete, Get, Incr, Item, MultiDelete,
    MultiGet, MultiPut, ParseCursorError, Put, PutItem, Refused, Resolve, Resolving, Scan, ScanPage, ScanStream, Touch,
};
pub use generation_proto::Map;
