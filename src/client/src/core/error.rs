//! Errors, sorted by the one thing a caller has to know: whether the operation may have taken effect.

use std::time::Duration;

use generation_proto::{Class, Status};

/// Why a request failed.
///
/// The three variants are what a caller decides by. `NotSent`: nothing was executed, the same request may be made again.
/// `Rejected`: the cluster gave its answer, which will be the same again. `InDoubt`: a write may or may not have been
/// executed; read the entry, or write in a way that can be repeated, before going on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing was executed.
    #[error(transparent)]
    NotSent(#[from] NotSent),
    /// Refused or answered in the negative; nothing was changed.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// A write may or may not have been executed.
    #[error(transparent)]
    InDoubt(#[from] InDoubt),
}

/// What is known of a failed request's effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing was executed.
    NotSent,
    /// Refused; nothing was changed.
    Rejected,
    /// It may or may not have been executed.
    InDoubt,
}

impl State {
    /// The stable name: `not_sent`, `rejected` or `in_doubt`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Rejected => "rejected",
            Self::InDoubt => "in_doubt",
        }
    }
}

/// The request was not executed: it never left, it was not proposed, or it was a read, which has no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotSent {
    /// No connection to the node that should answer.
    #[error(transparent)]
    Connect(#[from] Box<ConnectError>),
    /// The time allowed for the request ran out before it was executed.
    #[error(
        "no answer within {}; nothing was executed: check `generation status`, or allow more time (`timeout`)",
        Millis(.after)
    )]
    Timeout {
        /// The time that was allowed.
        after: Duration,
    },
    /// The connection broke before the request was written, or while a read waited for its reply.
    #[error("the connection to {peer} broke ({reason}); nothing was executed: try again")]
    ConnectionLost {
        /// The node's address.
        peer: String,
        /// What ended the connection.
        reason: String,
    },
    /// A queue of the node is full.
    #[error("{peer} is busy; try again in {} or send less at a time", Millis(.retry_after))]
    Busy {
        /// The node's address.
        peer: String,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// The shard has no majority.
    #[error(
        "shard {shard} has no majority of its replicas and takes no writes or linearizable reads; see `generation status` for \
         the nodes that are down (stale reads go on)"
    )]
    NoQuorum {
        /// The shard.
        shard: u16,
    },
    /// The shard's leader was not found where the map or other nodes said.
    #[error("shard {shard} has no leader at the moment; try again, and see `generation status` if it persists")]
    NoLeader {
        /// The shard.
        shard: u16,
    },
    /// No replica that was asked is fresh enough.
    #[error("the replica's state is {} old, more than the read allows; allow more or read linearizable", Millis(.age))]
    TooStale {
        /// Age of what it has.
        age: Duration,
    },
    /// The node is stopping.
    #[error("{peer} is shutting down; try again, another node will take over")]
    ShuttingDown {
        /// The node's address.
        peer: String,
    },
    /// The node's disk is nearly full.
    #[error("{peer} refuses writes because its disk is nearly full: free space there, reads go on")]
    ReadOnly {
        /// The node's address.
        peer: String,
    },
    /// The node's disk did not take what was to be written to it.
    #[error("the disk of {peer} did not take it: {message}")]
    DiskFailed {
        /// The node's address.
        peer: String,
        /// What the node says.
        message: String,
    },
    /// Not proposed, for a reason this version of the client does not know.
    #[error("{peer} did not take the request (status {code}): {message}")]
    Other {
        /// The node's address.
        peer: String,
        /// Code of the status.
        code: u8,
        /// What the node says.
        message: String,
    },
    /// The reply to a read does not follow the protocol.
    #[error("the reply of {peer} cannot be understood ({reason}): client and node may be of incompatible versions")]
    Protocol {
        /// The node's address.
        peer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The client was closed.
    #[error("the client was closed: make a new one")]
    Closed,
}

/// The cluster's answer is no, and it will be the same again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// `if_absent` or `if_version` did not hold.
    #[error(
        "the condition does not hold: {}",
        if *.current == 0 { "the key is absent".to_owned() } else { format!("the entry is at version {}", .current) }
    )]
    ConditionFailed {
        /// The entry's version now; 0: absent.
        current: u64,
    },
    /// `incr` of something that is not a number.
    #[error("the value is not an ASCII decimal 64-bit signed number, so nothing can be added to it")]
    NotANumber,
    /// `incr` past the range of a number.
    #[error("the sum does not fit a 64-bit signed number; the entry is as it was")]
    Overflow,
    /// The shard's budget is used up and nothing may be evicted.
    #[error("the shard's memory is used up and its policy is no-evict: delete entries or raise the budget")]
    OutOfMemory,
    /// The key is empty.
    #[error("the key is empty; keys have 1 to 65535 bytes")]
    EmptyKey,
    /// The key is too long.
    #[error("the key has {len} bytes, more than the limit of {limit}")]
    KeyTooLarge {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The value is too long.
    #[error("the value has {len} bytes, more than the limit of {limit}; the limit is set on the nodes (`max_value`)")]
    ValueTooLarge {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// An argument is out of its range.
    #[error("{0}")]
    InvalidArgument(String),
    /// The certificate does not permit it.
    #[error("the client's certificate does not permit this: {0}")]
    PermissionDenied(String),
    /// The write session expired; the write was not executed.
    #[error("the write session is unknown or has expired; the write was not executed under it")]
    SessionExpired,
    /// Refused for another reason.
    #[error("{status}: {message}")]
    Other {
        /// The status, by name where it is known, else by code.
        status: String,
        /// What the node says.
        message: String,
    },
}

/// A write left and its result is not known. Without a session the client does not send it again by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InDoubt {
    /// The time allowed ran out after the write was sent.
    #[error(
        "no reply within {}; the write may or may not have been executed: read the key before you repeat it",
        Millis(.after)
    )]
    Timeout {
        /// The time that was allowed.
        after: Duration,
    },
    /// The connection broke after the write was sent.
    #[error(
        "the connection to {peer} broke ({reason}) before the reply came; the write may or may not have been executed: read \
         the key before you repeat it"
    )]
    ConnectionLost {
        /// The node's address.
        peer: String,
        /// What ended the connection.
        reason: String,
    },
    /// The node proposed the write and does not know its result.
    #[error(
        "{peer} proposed the write and lost track of it ({message}); it may or may not have been executed: read the key \
         before you repeat it"
    )]
    Unknown {
        /// The node's address.
        peer: String,
        /// What the node says.
        message: String,
    },
}

/// Why a node could not be connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// A seed's name has no address.
    #[error("the address of `{seed}` cannot be found ({reason}): check the name, or give it as IP:PORT")]
    Resolve {
        /// The seed as configured.
        seed: String,
        /// What the resolver says.
        reason: String,
    },
    /// A seed's name has addresses, and none of them can be used.
    #[error(
        "`{seed}` has {} addresses and none can be used: {}",
        .errors.len(),
        .errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    NoAddress {
        /// The seed as configured.
        seed: String,
        /// What is wrong with each address.
        errors: Vec<ConnectError>,
    },
    /// Nothing answered.
    #[error(
        "no answer from {peer} within {}: check that a node runs there and that UDP gets through",
        Millis(.after)
    )]
    NoAnswer {
        /// The address.
        peer: String,
        /// How long the client waited.
        after: Duration,
    },
    /// The operating system refused.
    #[error("cannot reach {peer}: {reason}")]
    Unreachable {
        /// The address.
        peer: String,
        /// What the system says.
        reason: String,
    },
    /// The node's certificate was refused by this client.
    #[error("the certificate of {peer} was refused: {reason}")]
    ServerCertificate {
        /// The address.
        peer: String,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// The node refused this client's certificate.
    #[error("{peer} refused the client's certificate: {reason}")]
    ClientCertificate {
        /// The address.
        peer: String,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// The node belongs to another cluster.
    #[error("{peer} belongs to the cluster `{found}`, not `{expected}`: check `seeds` and `cluster`")]
    WrongCluster {
        /// The address.
        peer: String,
        /// The configured cluster.
        expected: String,
        /// The node's cluster.
        found: String,
    },
    /// The node speaks another major version, or no common application protocol.
    #[error(
        "{peer} does not speak version {} of the protocol ({reason}): upgrade the older side",
        generation_proto::MAJOR
    )]
    Version {
        /// The address.
        peer: String,
        /// What the node says.
        reason: String,
    },
    /// The handshake failed otherwise.
    #[error("the handshake with {peer} failed: {reason}")]
    Handshake {
        /// The address.
        peer: String,
        /// What is wrong.
        reason: String,
    },
    /// The node has not answered several times in a row, and is only probed until it does.
    #[error(
        "node {node} at {peer} has not answered for {} ({last}); it is asked again now and then: see `generation status`",
        Millis(.since)
    )]
    Down {
        /// The node.
        node: u64,
        /// Its address.
        peer: String,
        /// For how long it has not answered.
        since: Duration,
        /// What came of the last attempt.
        last: Box<ConnectError>,
    },
    /// The blocking client was called inside an asynchronous runtime.
    #[error(
        "the blocking client was called inside an asynchronous runtime, where waiting holds up every task of its thread: use \
         generation_client::Client there"
    )]
    InAsync,
    /// None of the seeds could be connected to.
    #[error("none of the seeds can be used: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoSeed(Vec<ConnectError>),
}

impl Error {
    /// What is known of the request's effect.
    pub const fn state(&self) -> State {
        match self {
            Self::NotSent(_) => State::NotSent,
            Self::Rejected(_) => State::Rejected,
            Self::InDoubt(_) => State::InDoubt,
        }
    }

    /// A stable name for the error, for machines: `busy`, `condition_failed`, `timeout`, …
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotSent(error) => match error {
                NotSent::Connect(error) => error.code(),
                NotSent::Timeout { .. } => "timeout",
                NotSent::ConnectionLost { .. } => "connection_lost",
                NotSent::Busy { .. } => "busy",
                NotSent::NoQuorum { .. } => "no_quorum",
                NotSent::NoLeader { .. } => "no_leader",
                NotSent::TooStale { .. } => "too_stale",
                NotSent::ShuttingDown { .. } => "shutting_down",
                NotSent::ReadOnly { .. } => "read_only",
                NotSent::DiskFailed { .. } => "disk_failed",
                NotSent::Other { .. } => "not_proposed",
                NotSent::Protocol { .. } => "protocol",
                NotSent::Closed => "client_closed",
            },
            Self::Rejected(error) => match error {
                Rejected::ConditionFailed { .. } => "condition_failed",
                Rejected::NotANumber => "not_a_number",
                Rejected::Overflow => "overflow",
                Rejected::OutOfMemory => "out_of_memory",
                Rejected::EmptyKey => "empty_key",
                Rejected::KeyTooLarge { .. } => "key_too_large",
                Rejected::ValueTooLarge { .. } => "value_too_large",
                Rejected::InvalidArgument(_) => "invalid_argument",
                Rejected::PermissionDenied(_) => "permission_denied",
                Rejected::SessionExpired => "session_expired",
                Rejected::Other { .. } => "rejected",
            },
            Self::InDoubt(error) => match error {
                InDoubt::Timeout { .. } => "timeout",
                InDoubt::ConnectionLost { .. } => "connection_lost",
                InDoubt::Unknown { .. } => "in_doubt",
            },
        }
    }

    /// How long the node asks to wait before the request is made again, where it says so.
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NotSent(NotSent::Busy { retry_after, .. }) => Some(*retry_after),
            _ => None,
        }
    }

    /// The entry's version now, when a condition failed; 0: absent.
    pub const fn current_version(&self) -> Option<u64> {
        match self {
            Self::Rejected(Rejected::ConditionFailed { current }) => Some(*current),
            _ => None,
        }
    }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        Self::NotSent(NotSent::Connect(Box::new(error)))
    }
}

impl ConnectError {
    /// A stable name for the error, for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Resolve { .. } => "resolve",
            Self::NoAnswer { .. } => "no_answer",
            Self::Unreachable { .. } => "unreachable",
            Self::ServerCertificate { .. } => "server_certificate",
            Self::ClientCertificate { .. } => "client_certificate",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::Version { .. } => "version",
            Self::Handshake { .. } => "handshake",
            Self::Down { .. } => "node_down",
            Self::InAsync => "in_async",
            Self::NoAddress { .. } => "no_address",
            Self::NoSeed(_) => "no_seed",
        }
    }

    /// Whether a later attempt can succeed with nothing changed in the configuration.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::NoAnswer { .. }
            | Self::Unreachable { .. }
            | Self::Handshake { .. }
            | Self::Resolve { .. }
            | Self::NoAddress { .. }
            | Self::NoSeed(_) => true,
            Self::Down { last, .. } => last.is_transient(),
            Self::Config(_)
            | Self::InAsync
            | Self::ServerCertificate { .. }
            | Self::ClientCertificate { .. }
            | Self::WrongCluster { .. }
            | Self::Version { .. } => false,
        }
    }
}

/// What a reply that is not a success says, with all it takes to say it well.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// Code of the status.
    pub status: u8,
    /// The shard concerned.
    pub shard: u16,
    /// Version in the reply: the entry's current one where a condition failed.
    pub version: u64,
    /// Where the reply came from.
    pub peer: &'a str,
    /// The node's message.
    pub message: &'a str,
    /// The node's advice when to try again.
    pub retry_after: Option<Duration>,
    /// Age of the replica's state.
    pub age: Option<Duration>,
    /// Whether the request was a write.
    pub is_write: bool,
    /// The time the request was allowed, for messages.
    pub timeout: Duration,
}

/// Wait before a busy node is asked again when it does not say.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_millis(10);

impl Refusal<'_> {
    /// The error a caller sees. `NotFound` is not an error and has no place here; it comes out as a rejection.
    pub fn error(&self) -> Error {
        let peer = || self.peer.to_owned();
        let message = || self.message.to_owned();
        let Some(status) = Status::from_code(self.status) else {
            return self.unknown_status();
        };
        match status {
            Status::ConditionFailed => Rejected::ConditionFailed { current: self.version }.into(),
            Status::NotANumber => Rejected::NotANumber.into(),
            Status::Overflow => Rejected::Overflow.into(),
            Status::OutOfMemory => Rejected::OutOfMemory.into(),
            Status::InvalidArgument => Rejected::InvalidArgument(message()).into(),
            Status::PermissionDenied => Rejected::PermissionDenied(message()).into(),
            Status::SessionExpired => Rejected::SessionExpired.into(),
            Status::Moved => NotSent::NoLeader { shard: self.shard }.into(),
            Status::NoQuorum => NotSent::NoQuorum { shard: self.shard }.into(),
            Status::Busy => NotSent::Busy {
                peer: peer(),
                retry_after: self.retry_after.unwrap_or(DEFAULT_RETRY_AFTER),
            }
            .into(),
            Status::TooStale => NotSent::TooStale {
                age: self.age.unwrap_or_default(),
            }
            .into(),
            Status::DeadlineExceeded => NotSent::Timeout { after: self.timeout }.into(),
            Status::ShuttingDown => NotSent::ShuttingDown { peer: peer() }.into(),
            Status::ReadOnly => NotSent::ReadOnly { peer: peer() }.into(),
            Status::DiskFailed => NotSent::DiskFailed {
                peer: peer(),
                message: message(),
            }
            .into(),
            Status::InDoubt | Status::Internal => self.in_doubt(),
            other => Rejected::Other {
                status: other.name().to_owned(),
                message: message(),
            }
            .into(),
        }
    }

    /// A status of a later minor version is understood by its range.
    fn unknown_status(&self) -> Error {
        match Status::class_of_code(self.status) {
            Class::NotProposed => NotSent::Other {
                peer: self.peer.to_owned(),
                code: self.status,
                message: self.message.to_owned(),
            }
            .into(),
            Class::InDoubt => self.in_doubt(),
            Class::Ok | Class::Answer | Class::Rejected => Rejected::Other {
                status: format!("status {}", self.status),
                message: self.message.to_owned(),
            }
            .into(),
        }
    }

    fn in_doubt(&self) -> Error {
        let (peer, message) = (self.peer.to_owned(), self.message.to_owned());
        if self.is_write {
            InDoubt::Unknown { peer, message }.into()
        } else {
            // A read changes nothing: whatever happened to it, it can be asked again.
            NotSent::Other {
                peer,
                code: self.status,
                message,
            }
            .into()
        }
    }
}

/// A duration as people read it: `250 ms`, `1.5 s`.
struct Millis<'a>(&'a Duration);

impl std::fmt::Display for Millis<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.as_millis() < 1000 {
            write!(f, "{} ms", self.0.as_millis())
        } else {
            write!(f, "{} s", self.0.as_millis() as f64 / 1000.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(status: u8, is_write: bool) -> Error {
        Refusal {
            status,
            shard: 3,
            version: 9,
            peer: "127.0.0.1:7400",
            message: "said the node",
            retry_after: None,
            age: None,
            is_write,
            timeout: Duration::from_secs(5),
        }
        .error()
    }

    #[test]
    fn every_status_sorts_as_its_class_says() {
        for code in 0..=u8::MAX {
            let class = Status::class_of_code(code);
            let of_write = refusal(code, true).state();
            let of_read = refusal(code, false).state();
            match class {
                Class::Ok | Class::Answer | Class::Rejected => {
                    assert_eq!((of_write, of_read), (State::Rejected, State::Rejected), "{code}");
                }
                Class::NotProposed => assert_eq!((of_write, of_read), (State::NotSent, State::NotSent), "{code}"),
                Class::InDoubt => assert_eq!((of_write, of_read), (State::InDoubt, State::NotSent), "{code}"),
            }
        }
    }

    #[test]
    fn messages_say_what_to_do() {
        assert_eq!(
            refusal(Status::ConditionFailed.code(), true).to_string(),
            "the condition does not hold: the entry is at version 9"
        );
        assert!(
            refusal(Status::InDoubt.code(), true)
                .to_string()
                .contains("read the key")
        );
        assert_eq!(
            Error::from(NotSent::Timeout {
                after: Duration::from_millis(1500)
            })
            .to_string(),
            "no answer within 1.5 s; nothing was executed: check `generation status`, or allow more time (`timeout`)"
        );
    }
}
