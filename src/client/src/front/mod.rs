//! The client over tokio and quinn.
//!
//! Builders ([`ops`], [`multi`], [`scan`]) turn what a caller asks into requests; [`dispatch`] sends them, again where that is safe, and
//! sorts errors; [`targets`] knows whom to ask and [`hedging`] asks twice; [`maps`] fetches the map, [`seeds`] the first one; [`health`]
//! knows which nodes answer; [`pool`] holds a [`connection`] for each core of each node; [`tls`] knows who the nodes must be. [`blocking`]
//! waits for all of it. All decisions are the core's ([`crate::core`]); here are only the clock, the tasks and the sockets.

pub mod blocking;
mod client;
mod config;
mod connection;
mod dispatch;
mod health;
mod hedging;
mod maps;
mod multi;
mod once;
mod ops;
mod pool;
mod scan;
mod seeds;
mod targets;
mod tls;

pub use client::{Client, ClientBuilder};
pub use config::{ClientConfig, ConfigError, Credential};
pub use multi::{Item, MultiDelete, MultiGet, MultiPut, PutItem};
pub use ops::{Delete, Get, Incr, Put, Touch};
pub use scan::{Cursor, ParseCursorError, Scan, ScanPage, ScanStream};
pub use seeds::{Resolve, Resolving};
pub use tls::Refused;
