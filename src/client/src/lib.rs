//! The native Rust client of Generation.
//!
//! A client learns the cluster's map from any node and sends each request straight to the core that owns the key's shard, over
//! one QUIC connection for each core it needs. Requests made at the same time travel together, and replies come in any order.
//!
//! # What it promises
//!
//! - **Nothing is executed twice by itself.** What a node did not take ([`Error::NotSent`]) is tried again within the request's
//!   time and a budget that all requests share; what may have been executed ([`Error::InDoubt`]) is handed to the caller, for
//!   every write, also one that looks repeatable: another client may have written in between.
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

pub use self::core::consistency::{Consistency, ParseConsistencyError};
pub use self::core::error::{ConnectError, Error, InDoubt, NotSent, Rejected, State};
pub use self::core::reply::{Entry, GetReply, Meta, NodeStats, ScanEntry, WriteReply};
pub use self::core::retry::RetryPolicy;
pub use self::core::session::{ParseTokenError, SessionToken};
#[cfg(feature = "tokio")]
pub use self::front::{
    Client, ClientBuilder, ClientConfig, ConfigError, Credential, Cursor, Delete, Get, Incr, Item, MultiDelete,
    MultiGet, MultiPut, ParseCursorError, Put, PutItem, Scan, ScanPage, ScanStream, Touch,
};
pub use generation_proto::Map;
