//! One shard's whole replicated state: entries, sessions, configuration and replica ids; and what a log entry does to it.
//!
//! A [`Machine`] is what a replica applies its log to. It adds to the [`Shard`] what is not about entries, and the one place where
//! the order of things inside a log entry is fixed:
//! - operations take effect in the order in which they stand in the entry, at the entry's shard time;
//! - the position in [`crate::Version`] counts the commands that were executed, so a write answered from the session table takes
//!   none;
//! - replies come in the order of operations, one each.
//!
//! # State format, version 1
//! What a snapshot needs beside entries and sessions ([`Machine::head`]), little-endian:
//! ```text
//!  0  u8   format version, 1
//!  1  u64  index of the last log entry applied
//!  9  u64  shard time, Unix milliseconds
//! 17  u64  next replica id
//! 25  the configuration, 38 bytes, as in the log (`crate::batch`)
//! ```
//!
//! Not here: where entries come from, when to take a snapshot, the format of entries in one.

#[cfg(test)]
mod tests;

use crate::batch::{Batch, Configuration, Operation};
use crate::codec::Reader;
use crate::command::{Command, Outcome};
use crate::config::ShardConfig;
use crate::digest;
use crate::session::{Opening, SessionLimits, SessionTable, Verdict};
use crate::shard::Shard;

/// The version byte of [`Machine::head`].
const HEAD_VERSION: u8 = 1;

/// What an operation of a log entry answers. A function of the log alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// A command was executed, now or when it came first.
    Outcome(Outcome),
    /// The session is open.
    SessionOpened,
    /// The session is gone: closed, or removed because it had expired.
    SessionEnded,
    /// Not executed: the session is unknown, closed or expired. Also answers an expiry that came too early or too late.
    SessionExpired,
    /// Not executed: the client has acknowledged the reply of this number.
    Acknowledged,
    /// Not executed: the session table is full.
    Busy,
    /// The configuration is in force.
    Configured,
    /// Refused, nothing was changed: policies with different layouts are chosen when a shard is created.
    PolicyFixed,
    /// The replica id drawn. It has never been drawn before.
    ReplicaId(u64),
}

/// What makes bytes no head of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Written by a newer release.
    #[error("snapshot state of format version {found}, this release reads {HEAD_VERSION}")]
    UnsupportedVersion {
        /// The version byte.
        found: u8,
    },
    /// Too short, too long, or a field out of its range.
    #[error("malformed snapshot state")]
    Malformed,
}

/// What a snapshot begins with beside its entries and sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The last log entry the state contains.
    pub index: u64,
    /// Shard time, Unix milliseconds.
    pub time_ms: u64,
    /// The replica id drawn next.
    pub next_replica_id: u64,
    /// The configuration in force.
    pub configuration: Configuration,
}

impl Head {
    /// Appends the format drawn at the head of this module.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(HEAD_VERSION);
        out.extend(self.index.to_le_bytes());
        out.extend(self.time_ms.to_le_bytes());
        out.extend(self.next_replica_id.to_le_bytes());
        self.configuration.encode(out);
    }

    /// Reads what [`Head::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeadError> {
        let mut reader = Reader::new(bytes);
        match reader.u8().ok_or(HeadError::Malformed)? {
            HEAD_VERSION => {}
            found => return Err(HeadError::UnsupportedVersion { found }),
        }
        let index = reader.u64().ok_or(HeadError::Malformed)?;
        let time_ms = reader.u64().ok_or(HeadError::Malformed)?;
        let next_replica_id = reader.u64().ok_or(HeadError::Malformed)?;
        let rest = reader.take(reader.remaining()).ok_or(HeadError::Malformed)?;
        let configuration = Configuration::decode(rest).ok_or(HeadError::Malformed)?;
        Ok(Self {
            index,
            time_ms,
            next_replica_id,
            configuration,
        })
    }
}

/// One shard's replicated state.
#[derive(Debug)]
pub struct Machine {
    shard: Shard,
    sessions: SessionTable,
    next_replica_id: u64,
}

impl Machine {
    /// The state before the first log entry. Ids below `next_replica_id` are taken by the shard's first replicas.
    pub fn new(config: ShardConfig, sessions: SessionLimits, next_replica_id: u64) -> Self {
        Self {
            shard: Shard::new(config),
            sessions: SessionTable::new(sessions),
            next_replica_id,
        }
    }

    /// A state put together from the parts of a snapshot.
    pub fn from_parts(shard: Shard, sessions: SessionTable, next_replica_id: u64) -> Self {
        Self {
            shard,
            sessions,
            next_replica_id,
        }
    }

    /// Applies one log entry; `each` is called with the ordinal of each operation and its reply.
    ///
    /// # Panics
    /// If `index` does not grow or is above [`crate::Version::MAX_INDEX`].
    pub fn apply(&mut self, index: u64, batch: &Batch<'_>, mut each: impl FnMut(usize, Reply)) {
        self.shard.begin(index, batch.time_ms());
        let mut operations = batch.operations().peekable();
        let mut ordinal = 0;
        loop {
            // Most operations are commands without a session, and what such a run touches can be fetched ahead.
            let run = std::iter::from_fn(|| operations.next_if(is_plain).and_then(plain));
            let mut applied = 0;
            self.shard.apply_batch(run, |number, outcome| {
                applied = number + 1;
                each(ordinal + number, Reply::Outcome(outcome));
            });
            ordinal += applied;
            let Some(operation) = operations.next() else { return };
            let reply = self.apply_operation(&operation);
            each(ordinal, reply);
            ordinal += 1;
        }
    }

    /// Applies one operation of the entry that was begun with [`Shard::begin`], for whoever has no log to take entries from.
    pub fn apply_operation(&mut self, operation: &Operation<'_>) -> Reply {
        let now_ms = self.shard.shard_time_ms();
        match operation {
            Operation::Command { command, session: None } => Reply::Outcome(self.shard.apply(command)),
            Operation::Command {
                command,
                session: Some(write),
            } => {
                let shard = &mut self.shard;
                match self.sessions.execute(now_ms, write, || shard.apply(command)) {
                    Verdict::Executed(outcome) | Verdict::Replayed(outcome) => Reply::Outcome(outcome),
                    Verdict::Acknowledged => Reply::Acknowledged,
                    Verdict::Expired => Reply::SessionExpired,
                    Verdict::Busy => Reply::Busy,
                }
            }
            Operation::OpenSession { session } => match self.sessions.open(now_ms, *session) {
                Opening::Open => Reply::SessionOpened,
                Opening::Busy => Reply::Busy,
            },
            Operation::ExpireSession { session } if self.sessions.expire(now_ms, *session) => Reply::SessionEnded,
            Operation::CloseSession { session } if self.sessions.close(*session) => Reply::SessionEnded,
            Operation::ExpireSession { .. } | Operation::CloseSession { .. } => Reply::SessionExpired,
            Operation::Configure(configuration) => self.configure(configuration),
            Operation::AllocateReplicaId => {
                let id = self.next_replica_id;
                self.next_replica_id += 1;
                Reply::ReplicaId(id)
            }
        }
    }

    /// Notes a log entry without content for the state machine: a new leader's blank one, or a change of membership. The entry at
    /// index 0, the first membership, is what an empty state stands at.
    ///
    /// # Panics
    /// As [`Machine::apply`], for indexes above 0.
    pub fn skip(&mut self, index: u64) {
        if index > 0 {
            self.shard.begin(index, 0);
        }
    }

    /// The entries, for reads and proposals.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// The entries, for reads that note recency and for proposals. Applying a command past [`Machine::apply`] would make this
    /// replica differ from the others.
    pub fn shard_mut(&mut self) -> &mut Shard {
        &mut self.shard
    }

    /// The sessions.
    pub fn sessions(&self) -> &SessionTable {
        &self.sessions
    }

    /// The sessions, for taking an image.
    pub fn sessions_mut(&mut self) -> &mut SessionTable {
        &mut self.sessions
    }

    /// What a snapshot of the state as it is now begins with.
    pub fn head(&self) -> Head {
        let config = self.shard.config();
        Head {
            index: self.shard.applied_index(),
            time_ms: self.shard.shard_time_ms(),
            next_replica_id: self.next_replica_id,
            configuration: Configuration {
                policy: config.policy,
                budget_bytes: config.budget_bytes,
                max_records: config.max_records,
                sessions: self.sessions.limits(),
            },
        }
    }

    /// A digest of everything replicas must agree on: entries, sessions, shard time, configuration, replica ids. Not recency, not
    /// layout, not the index itself: compare at equal index.
    pub fn state_hash(&self) -> u128 {
        let mut head = Vec::with_capacity(64);
        Head {
            index: 0,
            ..self.head()
        }
        .encode(&mut head);
        head.extend(self.sessions.digest().to_le_bytes());
        digest::entry(&self.shard.state_hash().to_le_bytes(), &head, 0, 0)
    }

    /// Validates the whole state. Takes time proportional to it.
    ///
    /// # Panics
    /// On a broken invariant: a bug, or broken memory.
    pub fn check(&self) {
        self.shard.check();
        self.sessions.check();
    }

    fn configure(&mut self, configuration: &Configuration) -> Reply {
        if configuration.policy != self.shard.config().policy {
            return Reply::PolicyFixed;
        }
        self.shard
            .set_budget(configuration.budget_bytes, configuration.max_records);
        self.sessions.set_limits(configuration.sessions);
        Reply::Configured
    }
}

fn is_plain(operation: &Operation<'_>) -> bool {
    matches!(operation, Operation::Command { session: None, .. })
}

fn plain(operation: Operation<'_>) -> Option<Command<'_>> {
    match operation {
        Operation::Command { command, session: None } => Some(command),
        _ => None,
    }
}
