//! What a benchmarked system looks like to the engine: one trait for all of them.
//!
//! A target owns its connections and their protocol; it encodes requests into a buffer per connection,
//! writes what has gathered when the engine says [`Target::flush`], and turns replies into
//! [`Completion`]s. Every target is non-blocking and runs on the generator's own thread over the same
//! readiness loop (mio), so that the client's cost favours none of them. A target never reads a clock to
//! measure: times are the engine's.

pub mod cluster;
pub mod etcd;
pub mod generation;
pub mod memcached;
pub mod resp;
pub mod stream;
pub mod tls;

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Names an operation in flight; chosen by the engine, returned with the completion.
pub type Token = u32;

/// One request, borrowed until it is encoded.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Read one key.
    Get {
        /// The key.
        key: &'a [u8],
        /// Whether the completion must carry the entry's version.
        version: bool,
    },
    /// Write one key.
    Put {
        /// The key.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
        /// Time to live in milliseconds; 0 = none.
        ttl_ms: u64,
    },
    /// Write one key if its version is still the given one.
    PutIfVersion {
        /// The key.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
        /// The version a read has returned.
        version: u64,
    },
    /// Add one to a counter; a missing one starts at zero.
    Incr {
        /// The key.
        key: &'a [u8],
    },
    /// Read several keys.
    MultiGet {
        /// The keys, one after the other.
        keys: &'a [u8],
        /// Length of each key in bytes.
        key_len: usize,
    },
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The key was there. The version is 0 unless it was asked for.
    Hit {
        /// Version of the entry, in the target's own terms.
        version: u64,
    },
    /// The key was not there.
    Miss,
    /// The write was acknowledged.
    Stored,
    /// The condition did not hold.
    Conflict,
    /// Several keys were looked up.
    Multi {
        /// Keys found.
        hits: u32,
        /// Keys not found.
        misses: u32,
    },
    /// It failed.
    Failed(Failure),
}

/// Why an operation failed; counted by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The target refused the request.
    Rejected,
    /// The target was overloaded and said so.
    Busy,
    /// No leader, no quorum, or the data moved.
    Unavailable,
    /// The target does not know whether the write was applied.
    InDoubt,
    /// Out of memory.
    OutOfMemory,
    /// The connection went away before the reply.
    ConnectionLost,
    /// No reply came within the run and its drain time.
    Unanswered,
}

impl Failure {
    /// Every kind, in report order.
    pub const ALL: [Self; 7] = [
        Self::Rejected,
        Self::Busy,
        Self::Unavailable,
        Self::InDoubt,
        Self::OutOfMemory,
        Self::ConnectionLost,
        Self::Unanswered,
    ];

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
            Self::InDoubt => "in_doubt",
            Self::OutOfMemory => "out_of_memory",
            Self::ConnectionLost => "connection_lost",
            Self::Unanswered => "unanswered",
        }
    }
}

/// The end of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token it was submitted with.
    pub token: Token,
    /// The connection it was submitted on.
    pub connection: usize,
    /// How it ended.
    pub outcome: Outcome,
}

/// What makes a target useless. What was measured until then is kept.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The address means nothing.
    #[error("cannot resolve {addr}: {message}")]
    Resolve {
        /// As given by the user.
        addr: String,
        /// The resolver's words.
        message: String,
    },
    /// Nothing was sent.
    #[error("cannot reach {name} at {addr}: {message}; is it running, and is this the right port?")]
    Unreachable {
        /// Kind of target.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// The operating system's words.
        message: String,
    },
    /// The TLS handshake failed: wrong certificate, authority, name, or no TLS at the other end.
    #[error("the TLS handshake with {name} at {addr} failed: {message}")]
    Tls {
        /// Kind of target.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// What the handshake said.
        message: String,
    },
    /// A certificate or key file cannot be used.
    #[error("{path}: {message}")]
    Certificate {
        /// The file.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// A connection went away during the run.
    #[error("lost {name} at {addr} during the run: {message}")]
    Lost {
        /// Kind of target.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// What was seen.
        message: String,
    },
    /// The other end does not speak the protocol.
    #[error("{name} at {addr} does not speak its protocol: {message}")]
    Protocol {
        /// Kind of target.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// What was read.
        message: String,
    },
    /// The target has no such operation.
    #[error("{name} has no {operation}: choose another --mix or target")]
    Unsupported {
        /// Kind of target.
        name: String,
        /// The operation.
        operation: &'static str,
    },
    /// The settings do not fit the target.
    #[error("{0}")]
    Settings(String),
    /// The readiness loop itself failed.
    #[error("the event loop failed: {0}")]
    Loop(#[source] std::io::Error),
}

/// One benchmarked system, seen from one generator thread.
pub trait Target: Send {
    /// Number of connections that requests can be submitted on.
    fn connections(&self) -> usize;

    /// Encodes a request; nothing is sent before [`Target::flush`].
    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError>;

    /// Sends all that was submitted, as far as the sockets take it; the rest follows in [`Target::poll`].
    fn flush(&mut self) -> Result<(), TargetError>;

    /// Waits up to `wait` for the sockets (zero: not at all) and appends what completed.
    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError>;
}

/// Opens the connections of one generator thread.
pub trait Connector: Send + Sync {
    /// Name for reports: `redis`, `redis-tls`, …
    fn name(&self) -> String;

    /// Opens `connections` connections; blocks until all of them stand or one failed.
    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError>;
}

/// How long a connection may take to stand.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The first address of `host:port`.
pub fn resolve(addr: &str) -> Result<SocketAddr, TargetError> {
    let failed = |message: String| TargetError::Resolve {
        addr: addr.to_owned(),
        message,
    };
    let mut addrs = addr.to_socket_addrs().map_err(|error| failed(error.to_string()))?;
    addrs.next().ok_or_else(|| failed("no address of that name".to_owned()))
}
