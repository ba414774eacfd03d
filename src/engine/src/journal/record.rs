//! One record of a frame. The format is drawn at the head of [`crate::journal`].

use super::{LogId, Vote};
use crate::codec::Reader;
use crate::version::Version;

/// What the payload of a log entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A new leader's empty entry.
    Blank,
    /// A [`crate::batch::Batch`].
    Commands,
    /// A change of the shard's membership, encoded by replication.
    Membership,
}

/// A shard's state beside its entries, as a checkpoint holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardState {
    /// The shard.
    pub shard: u32,
    /// Its replica on this node.
    pub replica: u64,
    /// The promise in force.
    pub vote: Option<Vote>,
    /// The last entry known to be committed.
    pub committed: Option<LogId>,
    /// The last entry purged.
    pub purged: Option<LogId>,
    /// The last entry of the log, purged or not.
    pub last: Option<LogId>,
    /// Index of the first entry kept. Above `last` if none is.
    pub first: u64,
}

/// One record. It borrows an entry's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// Appends an entry to a shard's log, at the index after its last.
    Entry {
        /// The shard.
        shard: u32,
        /// Its id.
        log_id: LogId,
        /// What the payload is.
        kind: EntryKind,
        /// Opaque to the journal.
        payload: &'a [u8],
    },
    /// Replaces the vote.
    Vote {
        /// The shard.
        shard: u32,
        /// The new promise.
        vote: Vote,
    },
    /// Removes the end of the log.
    Truncate {
        /// The shard.
        shard: u32,
        /// The last entry that remains; `None` empties the log.
        after: Option<LogId>,
    },
    /// Removes the beginning of the log, because a durable snapshot covers it. It may lie beyond the last entry, after a snapshot
    /// was installed.
    Purge {
        /// The shard.
        shard: u32,
        /// The last entry removed.
        up_to: LogId,
    },
    /// Notes how far the log is known to be committed. A hint that saves time after a restart.
    Committed {
        /// The shard.
        shard: u32,
        /// The last entry known to be committed.
        log_id: Option<LogId>,
    },
    /// A replica of the shard begins on this node, with an empty log and no vote. One that was there is gone.
    Create {
        /// The shard.
        shard: u32,
        /// The replica's id, never used before in this shard.
        replica: u64,
    },
    /// The shard's replica leaves this node; nothing of it is live any more.
    Retire {
        /// The shard.
        shard: u32,
    },
    /// A shard's state in a checkpoint.
    State(ShardState),
}

/// What is wrong with a record whose frame has the right checksum: it was written by a bug or another release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// The frame ends in the middle of the record, or has fewer records or more bytes than it says.
    #[error("records do not fill their frame")]
    Length,
    /// A kind this release does not know.
    #[error("unknown kind of record {0}")]
    UnknownKind(u8),
    /// A log index that no [`Version`] can hold.
    #[error("log index {0} is past 48 bits")]
    LogIndex(u64),
    /// A field out of its range, or a reserved one that is not zero.
    #[error("invalid field in a record of kind {0}")]
    InvalidField(u8),
}

mod kind {
    pub(super) const ENTRY: u8 = 1;
    pub(super) const VOTE: u8 = 2;
    pub(super) const TRUNCATE: u8 = 3;
    pub(super) const PURGE: u8 = 4;
    pub(super) const COMMITTED: u8 = 5;
    pub(super) const CREATE: u8 = 6;
    pub(super) const RETIRE: u8 = 7;
    pub(super) const STATE: u8 = 8;
}

const NO_LOG_ID: LogId = LogId {
    term: 0,
    leader: 0,
    index: 0,
};

impl<'a> Record<'a> {
    /// The shard it is about.
    pub fn shard(&self) -> u32 {
        match self {
            Record::Entry { shard, .. }
            | Record::Vote { shard, .. }
            | Record::Truncate { shard, .. }
            | Record::Purge { shard, .. }
            | Record::Committed { shard, .. }
            | Record::Create { shard, .. }
            | Record::Retire { shard }
            | Record::State(ShardState { shard, .. }) => *shard,
        }
    }

    /// The bytes it takes in a frame.
    pub const fn len_bytes(&self) -> usize {
        match self {
            Record::Entry { payload, .. } => 40 + payload.len().next_multiple_of(8),
            Record::Vote { .. } => 24,
            Record::Truncate { .. } | Record::Purge { .. } | Record::Committed { .. } => 32,
            Record::Create { .. } => 16,
            Record::Retire { .. } => 8,
            Record::State(_) => 112,
        }
    }

    /// Writes the record to `out`, which has exactly its length and is overwritten whole.
    pub(super) fn encode(&self, out: &mut [u8]) {
        let (kind, detail) = match self {
            Record::Entry {
                kind: EntryKind::Blank, ..
            } => (kind::ENTRY, 0),
            Record::Entry {
                kind: EntryKind::Commands,
                ..
            } => (kind::ENTRY, 1),
            Record::Entry {
                kind: EntryKind::Membership,
                ..
            } => (kind::ENTRY, 2),
            Record::Vote { vote, .. } => (kind::VOTE, u8::from(vote.committed)),
            Record::Truncate { after, .. } => (kind::TRUNCATE, u8::from(after.is_some())),
            Record::Purge { .. } => (kind::PURGE, 0),
            Record::Committed { log_id, .. } => (kind::COMMITTED, u8::from(log_id.is_some())),
            Record::Create { .. } => (kind::CREATE, 0),
            Record::Retire { .. } => (kind::RETIRE, 0),
            Record::State(state) => (kind::STATE, state.detail()),
        };
        let mut out = Out(out);
        out.put(&[kind, detail, 0, 0]);
        out.put(&self.shard().to_le_bytes());
        match self {
            Record::Entry { log_id, payload, .. } => {
                out.u64(payload.len() as u64);
                out.log_id(*log_id);
                out.put(payload);
                out.0.fill(0);
            }
            Record::Vote { vote, .. } => {
                out.u64(vote.term);
                out.u64(vote.leader);
            }
            Record::Truncate { after: log_id, .. } | Record::Committed { log_id, .. } => {
                out.log_id(log_id.unwrap_or(NO_LOG_ID));
            }
            Record::Purge { up_to, .. } => out.log_id(*up_to),
            Record::Create { replica, .. } => out.u64(*replica),
            Record::Retire { .. } => {}
            Record::State(state) => {
                out.u64(state.replica);
                out.u64(state.first);
                out.u64(state.vote.map_or(0, |vote| vote.term));
                out.u64(state.vote.map_or(0, |vote| vote.leader));
                for log_id in [state.committed, state.purged, state.last] {
                    out.log_id(log_id.unwrap_or(NO_LOG_ID));
                }
            }
        }
    }

    /// Reads the record at the front of `reader`.
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, RecordFault> {
        let length = RecordFault::Length;
        let kind = reader.u8().ok_or(length)?;
        let detail = reader.u8().ok_or(length)?;
        let reserved = reader.u16().ok_or(length)?;
        let shard = reader.u32().ok_or(length)?;
        let invalid = RecordFault::InvalidField(kind);
        let details = match kind {
            kind::ENTRY => 3,
            kind::VOTE | kind::TRUNCATE | kind::COMMITTED => 2,
            kind::PURGE | kind::CREATE | kind::RETIRE => 1,
            kind::STATE => 32,
            _ => return Err(RecordFault::UnknownKind(kind)),
        };
        if reserved != 0 || detail >= details {
            return Err(invalid);
        }
        let record = match kind {
            kind::ENTRY => {
                let len = usize::try_from(reader.u64().ok_or(length)?).map_err(|_| length)?;
                let log_id = log_id(reader)?;
                let payload = reader.take(len).ok_or(length)?;
                let padding = reader.take(len.next_multiple_of(8) - len).ok_or(length)?;
                if padding.iter().any(|byte| *byte != 0) || u32::try_from(len).is_err() {
                    return Err(invalid);
                }
                let kind = [EntryKind::Blank, EntryKind::Commands, EntryKind::Membership][usize::from(detail)];
                Record::Entry {
                    shard,
                    log_id,
                    kind,
                    payload,
                }
            }
            kind::VOTE => {
                let (term, leader) = (reader.u64().ok_or(length)?, reader.u64().ok_or(length)?);
                let vote = Vote {
                    term,
                    leader,
                    committed: detail == 1,
                };
                Record::Vote { shard, vote }
            }
            kind::TRUNCATE => Record::Truncate {
                shard,
                after: optional(reader, detail == 1, invalid)?,
            },
            kind::PURGE => Record::Purge {
                shard,
                up_to: log_id(reader)?,
            },
            kind::COMMITTED => Record::Committed {
                shard,
                log_id: optional(reader, detail == 1, invalid)?,
            },
            kind::CREATE => Record::Create {
                shard,
                replica: reader.u64().ok_or(length)?,
            },
            kind::RETIRE => Record::Retire { shard },
            _ => {
                let replica = reader.u64().ok_or(length)?;
                let first = reader.u64().ok_or(length)?;
                let (term, leader) = (reader.u64().ok_or(length)?, reader.u64().ok_or(length)?);
                let vote = match detail & 3 {
                    0 if (term, leader) == (0, 0) => None,
                    1 => Some(Vote {
                        term,
                        leader,
                        committed: false,
                    }),
                    3 => Some(Vote {
                        term,
                        leader,
                        committed: true,
                    }),
                    _ => return Err(invalid),
                };
                let committed = optional(reader, detail & 4 != 0, invalid)?;
                let purged = optional(reader, detail & 8 != 0, invalid)?;
                let last = optional(reader, detail & 16 != 0, invalid)?;
                Record::State(ShardState {
                    shard,
                    replica,
                    vote,
                    committed,
                    purged,
                    last,
                    first,
                })
            }
        };
        Ok(record)
    }
}

impl ShardState {
    fn detail(&self) -> u8 {
        let vote = self.vote.map_or(0, |vote| 1 | u8::from(vote.committed) << 1);
        let committed = u8::from(self.committed.is_some()) << 2;
        let purged = u8::from(self.purged.is_some()) << 3;
        let last = u8::from(self.last.is_some()) << 4;
        vote | committed | purged | last
    }
}

fn log_id(reader: &mut Reader<'_>) -> Result<LogId, RecordFault> {
    let mut field = || reader.u64().ok_or(RecordFault::Length);
    let (term, leader, index) = (field()?, field()?, field()?);
    if index > Version::MAX_INDEX {
        return Err(RecordFault::LogIndex(index));
    }
    Ok(LogId { term, leader, index })
}

fn optional(reader: &mut Reader<'_>, present: bool, invalid: RecordFault) -> Result<Option<LogId>, RecordFault> {
    let log_id = log_id(reader)?;
    match present {
        true => Ok(Some(log_id)),
        false if log_id == NO_LOG_ID => Ok(None),
        false => Err(invalid),
    }
}

/// Puts fields one after the other into a slice that is long enough.
struct Out<'a>(&'a mut [u8]);

impl Out<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (head, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = rest;
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn log_id(&mut self, log_id: LogId) {
        self.u64(log_id.term);
        self.u64(log_id.leader);
        self.u64(log_id.index);
    }
}
