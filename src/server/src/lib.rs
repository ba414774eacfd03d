//! The Generation server: the only crate with glommio, io_uring and sockets. It gives `generation_node` its world (an `Env` per
//! core), reads the configuration and the certificates, and is the command line of the binary `generation`.
//!
//! What it does not do: it knows nothing of keys, shards or frames. Replacing glommio touches this crate alone.

pub mod cli;
pub mod config;
pub mod directory;
pub mod env;
pub mod executors;
pub mod gossip;
pub mod logging;
pub mod net;
pub mod node;
pub mod preflight;
pub mod tls;
