//! Reading a log entry.

use super::{BATCH_VERSION, Configuration, HEADER_BYTES, MAX_BATCH_BYTES, MAX_OPERATIONS, Operation, code, flag};
use crate::codec::Reader;
use crate::command::{Command, Condition};
use crate::config::{MAX_VALUE_BYTES, Policy};
use crate::session::{SESSION_WINDOW, SessionLimits, SessionWrite};

/// What makes bytes no log entry. Offsets count from the start of the entry and name the operation at fault. Nothing has been
/// applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Written by a newer release: upgrade this node before it can follow.
    #[error("log entry of format version {found}, this release reads {BATCH_VERSION}")]
    UnsupportedVersion {
        /// The version byte.
        found: u8,
    },
    /// The entry ends too early.
    #[error("log entry ends in the middle of the operation at byte {offset}")]
    Truncated {
        /// Where the unfinished part begins.
        offset: usize,
    },
    /// The entry goes on after its last operation.
    #[error("log entry has bytes after its last operation, from byte {offset}")]
    TrailingBytes {
        /// Where they begin.
        offset: usize,
    },
    /// More operations than an entry can hold.
    #[error("log entry claims {count} operations, at most {MAX_OPERATIONS} are possible")]
    TooManyOperations {
        /// What it claims.
        count: u32,
    },
    /// Longer than an entry can be.
    #[error("log entry of {len} bytes, at most {MAX_BATCH_BYTES} are possible")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// An operation this release does not know.
    #[error("unknown operation code {code} at byte {offset} of a log entry")]
    UnknownOperation {
        /// The code.
        code: u8,
        /// Where it is.
        offset: usize,
    },
    /// Flags that do not go with the operation, or reserved bits that are not zero.
    #[error("invalid flags {flags:#04x} for the operation at byte {offset} of a log entry")]
    InvalidFlags {
        /// The flags.
        flags: u8,
        /// Where the operation begins.
        offset: usize,
    },
    /// A field out of its range.
    #[error("invalid {field} in the operation at byte {offset} of a log entry")]
    InvalidField {
        /// Which one.
        field: &'static str,
        /// Where the operation begins.
        offset: usize,
    },
}

/// A log entry that has been checked from end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    time_ms: u64,
    operations: u32,
    bytes: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Checks an entry. A follower does this before it stores the entry, so that one it cannot apply never enters its log.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BatchError> {
        if bytes.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLong { len: bytes.len() });
        }
        let truncated = BatchError::Truncated { offset: 0 };
        let mut reader = Reader::new(bytes);
        match reader.u8().ok_or(truncated)? {
            BATCH_VERSION => {}
            found => return Err(BatchError::UnsupportedVersion { found }),
        }
        let reserved = reader.take(3).ok_or(truncated)?;
        if reserved != [0; 3] {
            return Err(BatchError::InvalidField {
                field: "reserved bytes",
                offset: 0,
            });
        }
        let operations = reader.u32().ok_or(truncated)?;
        if operations as usize > MAX_OPERATIONS {
            return Err(BatchError::TooManyOperations { count: operations });
        }
        let time_ms = reader.u64().ok_or(truncated)?;
        for _ in 0..operations {
            next(&mut reader, bytes.len())?;
        }
        if reader.remaining() > 0 {
            return Err(BatchError::TrailingBytes {
                offset: bytes.len() - reader.remaining(),
            });
        }
        Ok(Self {
            time_ms,
            operations,
            bytes,
        })
    }

    /// The leader's time stamp, in Unix milliseconds.
    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// How many operations it holds.
    pub fn len(&self) -> usize {
        self.operations as usize
    }

    /// Whether it holds no operation.
    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// The operations in order.
    pub fn operations(&self) -> Operations<'a> {
        Operations {
            reader: Reader::new(&self.bytes[HEADER_BYTES..]),
            left: self.operations,
        }
    }
}

/// Iterates over the operations of a [`Batch`].
#[derive(Debug, Clone)]
pub struct Operations<'a> {
    reader: Reader<'a>,
    left: u32,
}

impl<'a> Iterator for Operations<'a> {
    type Item = Operation<'a>;

    fn next(&mut self) -> Option<Operation<'a>> {
        self.left = self.left.checked_sub(1)?;
        let operation = next(&mut self.reader, 0);
        Some(operation.expect("invariant: Batch::parse has read every operation of these bytes"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for Operations<'_> {}

/// Reads one operation; `total` is the length of the entry, for error messages.
fn next<'a>(reader: &mut Reader<'a>, total: usize) -> Result<Operation<'a>, BatchError> {
    let offset = total.saturating_sub(reader.remaining());
    let mut fields = Fields { reader, offset };
    let code = fields.need(Reader::u8)?;
    let flags = fields.need(Reader::u8)?;
    let allowed = allowed_flags(code).ok_or(BatchError::UnknownOperation { code, offset })?;
    if flags & !allowed != 0 || flags & flag::CONDITION == flag::CONDITION {
        return Err(BatchError::InvalidFlags { flags, offset });
    }
    let session = if flags & flag::SESSION == 0 {
        None
    } else {
        Some(fields.session()?)
    };
    let command = match code {
        code::PUT => {
            let key_len = fields.key_len()?;
            let value_len = fields.need(Reader::u32)? as usize;
            if value_len > MAX_VALUE_BYTES {
                return Err(fields.invalid("value length"));
            }
            let condition = fields.condition(flags)?;
            let expires_at_ms = if flags & flag::EXPIRY == 0 {
                0
            } else {
                fields.need(Reader::u64)?
            };
            if flags & flag::EXPIRY != 0 && expires_at_ms == 0 {
                // One meaning, one encoding.
                return Err(fields.invalid("expiry"));
            }
            let key = fields.bytes(key_len)?;
            let value = fields.bytes(value_len)?;
            Command::Put {
                key,
                value,
                expires_at_ms,
                condition,
            }
        }
        code::DELETE => {
            let key_len = fields.key_len()?;
            let condition = fields.condition(flags)?;
            Command::Delete {
                key: fields.bytes(key_len)?,
                condition,
            }
        }
        code::INCR => {
            let key_len = fields.key_len()?;
            let delta = fields.need(Reader::i64)?;
            Command::Incr {
                key: fields.bytes(key_len)?,
                delta,
            }
        }
        code::TOUCH => {
            let key_len = fields.key_len()?;
            let expires_at_ms = fields.need(Reader::u64)?;
            Command::Touch {
                key: fields.bytes(key_len)?,
                expires_at_ms,
            }
        }
        code::EVICT => Command::Evict {
            hash: fields.need(Reader::u64)?,
            version: fields.need(Reader::version)?,
        },
        code::EXPIRE => Command::Expire {
            hash: fields.need(Reader::u64)?,
            version: fields.need(Reader::version)?,
        },
        code::SESSION_OPEN => {
            return Ok(Operation::OpenSession {
                session: fields.need(Reader::u128)?,
            });
        }
        code::SESSION_EXPIRE => {
            return Ok(Operation::ExpireSession {
                session: fields.need(Reader::u128)?,
            });
        }
        code::SESSION_CLOSE => {
            return Ok(Operation::CloseSession {
                session: fields.need(Reader::u128)?,
            });
        }
        code::CONFIGURE => {
            let bytes = fields.bytes(Configuration::BYTES)?;
            let configuration = Configuration::decode(bytes).ok_or(fields.invalid("configuration"))?;
            return Ok(Operation::Configure(configuration));
        }
        _ => return Ok(Operation::AllocateReplicaId),
    };
    Ok(Operation::Command { command, session })
}

/// The flags an operation may have; `None` if there is no such operation.
fn allowed_flags(code: u8) -> Option<u8> {
    match code {
        code::PUT => Some(flag::SESSION | flag::CONDITION | flag::EXPIRY),
        code::DELETE => Some(flag::SESSION | flag::CONDITION),
        code::INCR | code::TOUCH => Some(flag::SESSION),
        code::EVICT
        | code::EXPIRE
        | code::SESSION_OPEN
        | code::SESSION_EXPIRE
        | code::SESSION_CLOSE
        | code::CONFIGURE
        | code::ALLOCATE_REPLICA_ID => Some(0),
        _ => None,
    }
}

/// The fields of the operation that begins at `offset`.
struct Fields<'r, 'a> {
    reader: &'r mut Reader<'a>,
    offset: usize,
}

impl<'a> Fields<'_, 'a> {
    fn need<T>(&mut self, read: impl FnOnce(&mut Reader<'a>) -> Option<T>) -> Result<T, BatchError> {
        read(self.reader).ok_or(BatchError::Truncated { offset: self.offset })
    }

    fn invalid(&self, field: &'static str) -> BatchError {
        BatchError::InvalidField {
            field,
            offset: self.offset,
        }
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], BatchError> {
        self.need(|reader| reader.take(len))
    }

    fn key_len(&mut self) -> Result<usize, BatchError> {
        match self.need(Reader::u16)? {
            0 => Err(self.invalid("key length")),
            len => Ok(usize::from(len)),
        }
    }

    fn condition(&mut self, flags: u8) -> Result<Condition, BatchError> {
        Ok(match flags & flag::CONDITION {
            flag::IF_ABSENT => Condition::IfAbsent,
            flag::IF_VERSION => Condition::IfVersion(self.need(Reader::version)?),
            _ => Condition::None,
        })
    }

    fn session(&mut self) -> Result<SessionWrite, BatchError> {
        let session = self.need(Reader::u128)?;
        let seq = self.need(Reader::u64)?;
        let distance = u64::from(self.need(Reader::u16)?);
        if distance >= SESSION_WINDOW || distance >= seq {
            return Err(self.invalid("session numbering"));
        }
        Ok(SessionWrite {
            session,
            seq,
            first_unacked: seq - distance,
        })
    }
}

impl Configuration {
    /// Reads what [`Configuration::encode`] wrote; `None` if it is something else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let policy = match reader.u8()? {
            0 => Policy::Lru,
            1 => Policy::S3Fifo,
            2 => Policy::NoEvict,
            _ => return None,
        };
        let limited = reader.u8()?;
        let budget_bytes = reader.u64()?;
        let records = reader.u64()?;
        let max_records = match (limited, records) {
            (0, 0) => None,
            (1, records) => Some(records),
            _ => return None,
        };
        let sessions = SessionLimits {
            idle_ms: reader.u64()?,
            max_sessions: reader.u32()?,
            max_bytes: reader.u64()?,
        };
        (reader.remaining() == 0).then_some(Self {
            policy,
            budget_bytes,
            max_records,
            sessions,
        })
    }
}
