//! The codec of one log entry: everything a shard received in one turn of its core.
//!
//! To replication an entry is opaque bytes; this module gives them their meaning. A [`BatchWriter`] copies each operation once,
//! into the entry. A [`Batch`] is parsed whole before anything of it is applied, and then hands out operations that borrow from
//! the entry's bytes, so that applying copies nothing but what the store keeps.
//!
//! # Format, version 1
//! All numbers are little-endian. Nothing is aligned.
//! ```text
//! entry      0  u8   format version, 1
//!            1  u8   reserved, 0
//!            2  u16  reserved, 0
//!            4  u32  number of operations, at most 65,536
//!            8  u64  time: Unix milliseconds, the leader's max(own clock, shard time)
//!           16  the operations, one after the other, to the end of the entry
//!
//! operation  0  u8   code
//!            1  u8   flags: bit 0 session, bits 1-2 condition (0 none, 1 if-absent, 2 if-version), bit 3 expiry, others 0
//!            2  if session:  u128 session, u64 seq, u16 seq - first_unacked (under 1,024)
//!               then by code:
//!    1 Put            u16 key length, u32 value length, [u64 if-version], [u64 expires_at_ms], key, value
//!    2 Delete         u16 key length, [u64 if-version], key
//!    3 Incr           u16 key length, i64 delta, key
//!    4 Touch          u16 key length, u64 expires_at_ms, key
//!   16 Evict          u64 key hash, u64 version
//!   17 Expire         u64 key hash, u64 version
//!   32 SessionOpen    u128 session
//!   33 SessionExpire  u128 session
//!   34 SessionClose   u128 session
//!   48 Configure      u8 policy (0 lru, 1 s3-fifo, 2 no-evict), u8 1 if records are limited, u64 budget_bytes, u64 max_records,
//!                     u64 session idle_ms, u32 max_sessions, u64 session max_bytes
//!   49 AllocateReplicaId
//! ```
//!
//! # Invariants
//! - Evictions and expiries go into the same entry as the writes that need their room, before them.
//! - A version is log index and position, so an entry holds at most [`MAX_OPERATIONS`] operations; position counts commands in
//!   the order in which they are applied.
//! - Malformed bytes are an error of [`Batch::parse`] and never a panic, and an entry that parses can be applied to its end: a
//!   shard is never left with half an entry.
//!
//! Not here: what operations do ([`crate::Shard`], [`crate::session`], [`crate::machine`]), and protection against flipped bits
//! (the journal's and the transport's checksums).

mod decode;
#[cfg(test)]
mod tests;

pub use decode::{Batch, BatchError, Operations};

use crate::codec::put_at;
use crate::command::{Command, Condition};
use crate::config::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Policy};
use crate::session::{SESSION_WINDOW, SessionLimits, SessionWrite};

/// The format version written.
pub const BATCH_VERSION: u8 = 1;

/// Most operations in one log entry.
pub const MAX_OPERATIONS: usize = 1 << 16;

/// Most bytes in one log entry. The largest single operation fits an empty entry.
pub const MAX_BATCH_BYTES: usize = 32 << 20;

pub(crate) const HEADER_BYTES: usize = 16;

/// The most an operation takes beside its key and value: code, flags, session, lengths, version, expiry.
const MAX_OPERATION_OVERHEAD: usize = 2 + 26 + 6 + 16;

const _: () = assert!(MAX_KEY_BYTES <= u16::MAX as usize, "key lengths are 16-bit in an entry");
const _: () = assert!(
    HEADER_BYTES + MAX_OPERATION_OVERHEAD + MAX_KEY_BYTES + MAX_VALUE_BYTES <= MAX_BATCH_BYTES,
    "the largest operation must fit an empty entry"
);
const _: () = assert!(
    SESSION_WINDOW <= 1 << 16,
    "the distance to first_unacked is 16-bit in an entry"
);

pub(crate) mod code {
    pub(crate) const PUT: u8 = 1;
    pub(crate) const DELETE: u8 = 2;
    pub(crate) const INCR: u8 = 3;
    pub(crate) const TOUCH: u8 = 4;
    pub(crate) const EVICT: u8 = 16;
    pub(crate) const EXPIRE: u8 = 17;
    pub(crate) const SESSION_OPEN: u8 = 32;
    pub(crate) const SESSION_EXPIRE: u8 = 33;
    pub(crate) const SESSION_CLOSE: u8 = 34;
    pub(crate) const CONFIGURE: u8 = 48;
    pub(crate) const ALLOCATE_REPLICA_ID: u8 = 49;
}

pub(crate) mod flag {
    pub(crate) const SESSION: u8 = 1;
    pub(crate) const IF_ABSENT: u8 = 1 << 1;
    pub(crate) const IF_VERSION: u8 = 2 << 1;
    pub(crate) const CONDITION: u8 = 3 << 1;
    pub(crate) const EXPIRY: u8 = 1 << 3;
}

/// The part of a shard's configuration that is replicated and can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Configuration {
    /// What makes room.
    pub policy: Policy,
    /// As [`crate::ShardConfig::budget_bytes`].
    pub budget_bytes: u64,
    /// As [`crate::ShardConfig::max_records`].
    pub max_records: Option<u64>,
    /// Limits of the session table.
    pub sessions: SessionLimits,
}

/// One operation of a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// A command on entries, with the numbering that makes its retries harmless, if the client asked for that. An eviction or
    /// expiry has none.
    Command {
        /// What to do.
        command: Command<'a>,
        /// Its number in its client's session.
        session: Option<SessionWrite>,
    },
    /// Opens a session; opening an open one again changes nothing but its activity.
    OpenSession {
        /// Chosen by the client at random.
        session: u128,
    },
    /// Forgets a session if it has been idle for too long.
    ExpireSession {
        /// The session.
        session: u128,
    },
    /// Forgets a session: its client is done.
    CloseSession {
        /// The session.
        session: u128,
    },
    /// Replaces the configuration.
    Configure(Configuration),
    /// Draws the next replica id of the shard.
    AllocateReplicaId,
}

impl<'a> From<Command<'a>> for Operation<'a> {
    fn from(command: Command<'a>) -> Self {
        Self::Command { command, session: None }
    }
}

/// Why an operation was not added. The entry is as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The entry holds [`MAX_OPERATIONS`] operations, or would pass its greatest length: propose it and put the operation into
    /// the next one.
    #[error("the log entry is full")]
    Full,
    /// The operation alone would pass the greatest length of an entry that was given to [`BatchWriter::within`].
    #[error("the write may take {len} bytes of the log, and an entry of the log has at most {limit}")]
    EntryLength {
        /// What an entry with it alone may take, in bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A key must have 1 to [`MAX_KEY_BYTES`] bytes.
    #[error("a key of {len} bytes cannot be logged; 1 to {MAX_KEY_BYTES} can")]
    KeyLength {
        /// Its length in bytes.
        len: usize,
    },
    /// A value must have at most [`MAX_VALUE_BYTES`] bytes.
    #[error("a value of {len} bytes cannot be logged; at most {MAX_VALUE_BYTES} can")]
    ValueLength {
        /// Its length in bytes.
        len: usize,
    },
    /// Sequence numbers start at 1, and at most [`SESSION_WINDOW`] writes of a session may be unacknowledged: answer `Busy`.
    #[error("session numbering {seq} with {first_unacked} unacknowledged is out of its window of {SESSION_WINDOW}")]
    SessionWindow {
        /// The write's number.
        seq: u64,
        /// The lowest number whose reply the client has not seen.
        first_unacked: u64,
    },
    /// Evictions and expiries are the leader's own and have no session.
    #[error("an eviction or expiry cannot belong to a session")]
    SessionOnVictim,
}

/// Builds one log entry.
#[derive(Debug)]
pub struct BatchWriter {
    buffer: Vec<u8>,
    operations: u32,
    max_bytes: usize,
}

impl Default for BatchWriter {
    fn default() -> Self {
        Self::within(MAX_BATCH_BYTES)
    }
}

impl BatchWriter {
    /// An empty entry, which takes any legal operation. Takes no memory until the first.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty entry of at most `max_bytes`, and of [`MAX_BATCH_BYTES`] in any case.
    pub fn within(max_bytes: usize) -> Self {
        Self {
            buffer: Vec::new(),
            operations: 0,
            max_bytes: max_bytes.min(MAX_BATCH_BYTES),
        }
    }

    /// How many operations it holds.
    pub fn operations(&self) -> usize {
        self.operations as usize
    }

    /// Whether it holds no operation.
    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// How long the entry is by now, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.buffer.len().max(HEADER_BYTES)
    }

    /// Appends an operation and returns its ordinal, from 0, by which [`crate::machine`] names its reply.
    pub fn push(&mut self, operation: &Operation<'_>) -> Result<u32, PushError> {
        let payload = check(operation)?;
        let most = MAX_OPERATION_OVERHEAD + payload;
        if self.operations() == MAX_OPERATIONS || self.len_bytes() + most > self.max_bytes {
            let (len, limit) = (HEADER_BYTES + most, self.max_bytes);
            return Err(if len > limit {
                PushError::EntryLength { len, limit }
            } else {
                PushError::Full
            });
        }
        if self.buffer.is_empty() {
            self.buffer.resize(HEADER_BYTES, 0);
        }
        self.buffer.reserve(most);
        match operation {
            Operation::Command { command, session } => self.command(command, session.as_ref()),
            Operation::OpenSession { session } => self.about_session(code::SESSION_OPEN, *session),
            Operation::ExpireSession { session } => self.about_session(code::SESSION_EXPIRE, *session),
            Operation::CloseSession { session } => self.about_session(code::SESSION_CLOSE, *session),
            Operation::Configure(configuration) => {
                self.buffer.extend([code::CONFIGURE, 0]);
                configuration.encode(&mut self.buffer);
            }
            Operation::AllocateReplicaId => self.buffer.extend([code::ALLOCATE_REPLICA_ID, 0]),
        }
        self.operations += 1;
        Ok(self.operations - 1)
    }

    /// Stamps the entry with the leader's time and returns its bytes. An entry without operations advances shard time alone.
    pub fn finish(mut self, time_ms: u64) -> Vec<u8> {
        self.buffer.resize(self.len_bytes(), 0);
        self.buffer[0] = BATCH_VERSION;
        put_at(&mut self.buffer, 4, self.operations.to_le_bytes());
        put_at(&mut self.buffer, 8, time_ms.to_le_bytes());
        self.buffer
    }

    fn command(&mut self, command: &Command<'_>, session: Option<&SessionWrite>) {
        match *command {
            Command::Put {
                key,
                value,
                expires_at_ms,
                condition,
            } => {
                let expiry = if expires_at_ms == 0 { 0 } else { flag::EXPIRY };
                self.open(code::PUT, condition_flag(condition) | expiry, session);
                self.key_len(key);
                self.buffer.extend((value.len() as u32).to_le_bytes());
                self.if_version(condition);
                if expires_at_ms != 0 {
                    self.buffer.extend(expires_at_ms.to_le_bytes());
                }
                self.buffer.extend_from_slice(key);
                self.buffer.extend_from_slice(value);
            }
            Command::Delete { key, condition } => {
                self.open(code::DELETE, condition_flag(condition), session);
                self.key_len(key);
                self.if_version(condition);
                self.buffer.extend_from_slice(key);
            }
            Command::Incr { key, delta } => {
                self.open(code::INCR, 0, session);
                self.key_len(key);
                self.buffer.extend(delta.to_le_bytes());
                self.buffer.extend_from_slice(key);
            }
            Command::Touch { key, expires_at_ms } => {
                self.open(code::TOUCH, 0, session);
                self.key_len(key);
                self.buffer.extend(expires_at_ms.to_le_bytes());
                self.buffer.extend_from_slice(key);
            }
            Command::Evict { hash, version } => {
                self.buffer.extend([code::EVICT, 0]);
                self.buffer.extend(hash.to_le_bytes());
                self.buffer.extend(version.get().to_le_bytes());
            }
            Command::Expire { hash, version } => {
                self.buffer.extend([code::EXPIRE, 0]);
                self.buffer.extend(hash.to_le_bytes());
                self.buffer.extend(version.get().to_le_bytes());
            }
        }
    }

    fn open(&mut self, code: u8, flags: u8, session: Option<&SessionWrite>) {
        let Some(write) = session else {
            self.buffer.extend([code, flags]);
            return;
        };
        self.buffer.extend([code, flags | flag::SESSION]);
        self.buffer.extend(write.session.to_le_bytes());
        self.buffer.extend(write.seq.to_le_bytes());
        self.buffer
            .extend(((write.seq - write.first_unacked) as u16).to_le_bytes());
    }

    fn key_len(&mut self, key: &[u8]) {
        self.buffer.extend((key.len() as u16).to_le_bytes());
    }

    fn if_version(&mut self, condition: Condition) {
        if let Condition::IfVersion(version) = condition {
            self.buffer.extend(version.get().to_le_bytes());
        }
    }

    fn about_session(&mut self, code: u8, session: u128) {
        self.buffer.extend([code, 0]);
        self.buffer.extend(session.to_le_bytes());
    }
}

impl Configuration {
    /// The length of an encoded configuration, in bytes.
    pub(crate) const BYTES: usize = 38;

    /// Appends the encoding drawn at the head of this module.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let policy = match self.policy {
            Policy::Lru => 0,
            Policy::S3Fifo => 1,
            Policy::NoEvict => 2,
        };
        out.extend([policy, u8::from(self.max_records.is_some())]);
        out.extend(self.budget_bytes.to_le_bytes());
        out.extend(self.max_records.unwrap_or(0).to_le_bytes());
        out.extend(self.sessions.idle_ms.to_le_bytes());
        out.extend(self.sessions.max_sessions.to_le_bytes());
        out.extend(self.sessions.max_bytes.to_le_bytes());
    }
}

fn condition_flag(condition: Condition) -> u8 {
    match condition {
        Condition::None => 0,
        Condition::IfAbsent => flag::IF_ABSENT,
        Condition::IfVersion(_) => flag::IF_VERSION,
    }
}

/// Checks everything [`Batch::parse`] would refuse; returns the bytes of key and value.
fn check(operation: &Operation<'_>) -> Result<usize, PushError> {
    let Operation::Command { command, session } = operation else {
        return Ok(0);
    };
    let (key, value) = match *command {
        Command::Put { key, value, .. } => (key, value),
        Command::Delete { key, .. } | Command::Incr { key, .. } | Command::Touch { key, .. } => (key, &[][..]),
        Command::Evict { .. } | Command::Expire { .. } if session.is_some() => return Err(PushError::SessionOnVictim),
        Command::Evict { .. } | Command::Expire { .. } => return Ok(0),
    };
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(PushError::KeyLength { len: key.len() });
    }
    if value.len() > MAX_VALUE_BYTES {
        return Err(PushError::ValueLength { len: value.len() });
    }
    match session {
        Some(write) if !write.in_window() => {
            let SessionWrite { seq, first_unacked, .. } = *write;
            Err(PushError::SessionWindow { seq, first_unacked })
        }
        _ => Ok(key.len() + value.len()),
    }
}
