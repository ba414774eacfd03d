//! Options of requests and replies: tag, length, value. They are how the protocol grows without a new major version.
//!
//! A tag with its highest bit set may be ignored by a receiver that does not know it; an unknown tag without it is refused
//! ([`crate::Status::UnsupportedOption`]), because ignoring it would change what the request means. Clients ignore every
//! unknown option of a reply.

use bytes::BytesMut;

use crate::request::RequestError;
use crate::wire::take_bytes;

/// Tags below this one must be understood, tags from it on may be ignored.
pub const IGNORABLE: u8 = 0x80;

/// Bytes of an option before its value: tag and length.
const OPTION_HEAD: usize = 2;

/// Tags of request options.
pub mod request_tag {
    /// `u64`: time to live in milliseconds, more than 0.
    pub const TTL: u8 = 0x01;
    /// No value: write only if the key is absent.
    pub const IF_ABSENT: u8 = 0x02;
    /// `u64`: write only if the entry has this version.
    pub const IF_VERSION: u8 = 0x03;
    /// `u8` kind, then what the kind needs: see [`super::Consistency`].
    pub const CONSISTENCY: u8 = 0x04;
    /// `u32`: milliseconds from arrival after which the request must not be proposed any more.
    pub const DEADLINE: u8 = 0x05;
    /// `u128` session, `u64` sequence number, `u64` first unacknowledged sequence number.
    pub const SESSION: u8 = 0x06;
    /// `u32`: epoch of the client's map. May be ignored.
    pub const MAP_EPOCH: u8 = 0x81;
}

/// Tags of reply options.
pub mod reply_tag {
    /// `u32`: milliseconds to wait before trying again.
    pub const RETRY_AFTER: u8 = 0x81;
    /// `u32` epoch, `u64` term, `u64` leader's node id, `u16` its core.
    pub const MOVED: u8 = 0x82;
    /// `u64`: when the entry expires, in milliseconds since the Unix epoch.
    pub const EXPIRES_AT: u8 = 0x83;
    /// `u32`: age of what was read, in milliseconds, for `stale` reads.
    pub const AGE: u8 = 0x84;
    /// UTF-8 text for a person: what was wrong, where, and what to do.
    pub const MESSAGE: u8 = 0x85;
}

/// Consistency of a read: asked for in a request, achieved in a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Consistency {
    /// The read sees every write acknowledged before it began.
    #[default]
    Linearizable,
    /// The read sees at least the state of the client's last seen index of the shard.
    Session {
        /// The shard the token is of.
        shard: u16,
        /// The shard's epoch when the token was given.
        epoch: u32,
        /// Log index the client has seen.
        index: u64,
    },
    /// The read sees a state at most this old.
    Stale {
        /// Bound in milliseconds.
        max_age_ms: u32,
    },
}

impl Consistency {
    /// Code of the kind, as in a reply's fixed part.
    pub const fn code(self) -> u8 {
        match self {
            Self::Linearizable => 0,
            Self::Session { .. } => 1,
            Self::Stale { .. } => 2,
        }
    }

    /// The kind's name, as the command line spells it. `None` for a code of a later minor version.
    pub const fn name_of_code(code: u8) -> Option<&'static str> {
        match code {
            0 => Some("linearizable"),
            1 => Some("session"),
            2 => Some("stale"),
            _ => None,
        }
    }
}

/// Condition of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Condition {
    /// Write whatever is there.
    #[default]
    None,
    /// Write only if the key is absent.
    IfAbsent,
    /// Write only if the entry has this version. 0 is refused: it would mean absent, which has an option of its own.
    IfVersion(u64),
}

/// The session of a write, by which a retry is recognised and executed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Session {
    /// The session, not 0, opened with `OpenSession` in the shards concerned.
    pub id: u128,
    /// Number of this write within the session, from 1. In a request with several keys it is the first key's; each next key has
    /// the next number.
    pub seq: u64,
    /// The lowest sequence number whose reply the client has not seen; at most `seq`. Replies below it may be forgotten.
    pub first_unacked: u64,
}

/// Options of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestOptions {
    /// Time to live in milliseconds; the leader makes it an absolute time. `None`: no expiry.
    pub ttl_ms: Option<u64>,
    /// Condition of a write.
    pub condition: Condition,
    /// Consistency of a read.
    pub consistency: Consistency,
    /// Milliseconds from arrival after which the request must not be proposed any more. `None`: the node's default.
    pub deadline_ms: Option<u32>,
    /// Session of a write.
    pub session: Option<Session>,
    /// Epoch of the client's map; lets the node tell a stale client.
    pub map_epoch: Option<u32>,
}

impl RequestOptions {
    /// Bytes that [`Self::encode`] appends.
    #[inline]
    pub(crate) const fn encoded_len(&self) -> usize {
        let mut len = 0;
        if self.ttl_ms.is_some() {
            len += OPTION_HEAD + 8;
        }
        len += match self.condition {
            Condition::None => 0,
            Condition::IfAbsent => OPTION_HEAD,
            Condition::IfVersion(_) => OPTION_HEAD + 8,
        };
        len += match self.consistency {
            Consistency::Linearizable => 0,
            Consistency::Session { .. } => OPTION_HEAD + 15,
            Consistency::Stale { .. } => OPTION_HEAD + 5,
        };
        if self.deadline_ms.is_some() {
            len += OPTION_HEAD + 4;
        }
        if self.session.is_some() {
            len += OPTION_HEAD + 32;
        }
        if self.map_epoch.is_some() {
            len += OPTION_HEAD + 4;
        }
        len
    }

    /// Appends the options that are set.
    pub(crate) fn encode(&self, out: &mut BytesMut) {
        if let Some(ttl_ms) = self.ttl_ms {
            put(out, request_tag::TTL, &ttl_ms.to_le_bytes());
        }
        match self.condition {
            Condition::None => {}
            Condition::IfAbsent => put(out, request_tag::IF_ABSENT, &[]),
            Condition::IfVersion(version) => put(out, request_tag::IF_VERSION, &version.to_le_bytes()),
        }
        match self.consistency {
            Consistency::Linearizable => {}
            Consistency::Session { shard, epoch, index } => {
                let mut value = [1; 15];
                value[1..3].copy_from_slice(&shard.to_le_bytes());
                value[3..7].copy_from_slice(&epoch.to_le_bytes());
                value[7..].copy_from_slice(&index.to_le_bytes());
                put(out, request_tag::CONSISTENCY, &value);
            }
            Consistency::Stale { max_age_ms } => {
                let mut value = [2; 5];
                value[1..].copy_from_slice(&max_age_ms.to_le_bytes());
                put(out, request_tag::CONSISTENCY, &value);
            }
        }
        if let Some(deadline_ms) = self.deadline_ms {
            put(out, request_tag::DEADLINE, &deadline_ms.to_le_bytes());
        }
        if let Some(session) = &self.session {
            let mut value = [0; 32];
            value[..16].copy_from_slice(&session.id.to_le_bytes());
            value[16..24].copy_from_slice(&session.seq.to_le_bytes());
            value[24..].copy_from_slice(&session.first_unacked.to_le_bytes());
            put(out, request_tag::SESSION, &value);
        }
        if let Some(epoch) = self.map_epoch {
            put(out, request_tag::MAP_EPOCH, &epoch.to_le_bytes());
        }
    }

    /// Reads the options and reports which were there, as a bit per tag (see [`bit`]).
    pub(crate) fn decode(mut bytes: &[u8]) -> Result<(Self, u32), RequestError> {
        let mut options = Self::default();
        let mut seen = 0u32;
        while !bytes.is_empty() {
            let (tag, value) = next(&mut bytes).ok_or(RequestError::OptionsCutShort)?;
            let wrong_len = RequestError::OptionLength { tag, len: value.len() };
            match tag {
                request_tag::TTL => {
                    options.ttl_ms = Some(u64::from_le_bytes(value.try_into().map_err(|_| wrong_len)?));
                    if options.ttl_ms == Some(0) {
                        return Err(RequestError::OptionValue {
                            tag,
                            reason: "a time to live must be at least 1 ms",
                        });
                    }
                }
                request_tag::IF_ABSENT => {
                    if !value.is_empty() {
                        return Err(wrong_len);
                    }
                    if options.condition != Condition::None {
                        return Err(RequestError::TwoConditions);
                    }
                    options.condition = Condition::IfAbsent;
                }
                request_tag::IF_VERSION => {
                    if options.condition != Condition::None {
                        return Err(RequestError::TwoConditions);
                    }
                    let version = u64::from_le_bytes(value.try_into().map_err(|_| wrong_len)?);
                    if version == 0 {
                        return Err(RequestError::OptionValue {
                            tag,
                            reason: "version 0 means absent: use if-absent",
                        });
                    }
                    options.condition = Condition::IfVersion(version);
                }
                request_tag::CONSISTENCY => options.consistency = decode_consistency(value)?,
                request_tag::DEADLINE => {
                    options.deadline_ms = Some(u32::from_le_bytes(value.try_into().map_err(|_| wrong_len)?));
                }
                request_tag::SESSION => options.session = Some(decode_session(value)?),
                request_tag::MAP_EPOCH => {
                    options.map_epoch = Some(u32::from_le_bytes(value.try_into().map_err(|_| wrong_len)?));
                }
                tag if tag >= IGNORABLE => continue,
                tag => return Err(RequestError::UnknownOption { tag }),
            }
            if seen & bit(tag) != 0 {
                return Err(RequestError::OptionTwice { tag });
            }
            seen |= bit(tag);
        }
        Ok((options, seen))
    }
}

/// The bit of a known request option in a set of them.
pub(crate) const fn bit(tag: u8) -> u32 {
    match tag {
        request_tag::MAP_EPOCH => 1 << 31,
        tag => 1 << tag,
    }
}

fn decode_consistency(value: &[u8]) -> Result<Consistency, RequestError> {
    let tag = request_tag::CONSISTENCY;
    match *value {
        [0] => Ok(Consistency::Linearizable),
        [1, s0, s1, e0, e1, e2, e3, ref index @ ..] if index.len() == 8 => Ok(Consistency::Session {
            shard: u16::from_le_bytes([s0, s1]),
            epoch: u32::from_le_bytes([e0, e1, e2, e3]),
            index: u64::from_le_bytes(index.try_into().expect("invariant: length checked by the guard")),
        }),
        [2, a, b, c, d] => Ok(Consistency::Stale {
            max_age_ms: u32::from_le_bytes([a, b, c, d]),
        }),
        [0..=2, ..] | [] => Err(RequestError::OptionLength { tag, len: value.len() }),
        _ => Err(RequestError::OptionValue {
            tag,
            reason: "unknown kind of consistency",
        }),
    }
}

fn decode_session(value: &[u8]) -> Result<Session, RequestError> {
    let tag = request_tag::SESSION;
    let value: &[u8; 32] = value
        .try_into()
        .map_err(|_| RequestError::OptionLength { tag, len: value.len() })?;
    let (id, numbers) = value.split_at(16);
    let (seq, first_unacked) = numbers.split_at(8);
    let session = Session {
        id: u128::from_le_bytes(id.try_into().expect("invariant: split at 16")),
        seq: u64::from_le_bytes(seq.try_into().expect("invariant: split at 8")),
        first_unacked: u64::from_le_bytes(first_unacked.try_into().expect("invariant: split at 8")),
    };
    if session.id == 0 {
        return Err(RequestError::OptionValue {
            tag,
            reason: "session id 0 is not a session",
        });
    }
    if session.seq == 0 || session.first_unacked == 0 || session.first_unacked > session.seq {
        return Err(RequestError::OptionValue {
            tag,
            reason: "sequence numbers start at 1 and the first unacknowledged one is at most the current one",
        });
    }
    Ok(session)
}

/// Where a shard is led, as a node knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moved {
    /// The shard's epoch (its replica set).
    pub epoch: u32,
    /// The leader's term. Hints are ordered by (epoch, term); only a newer one replaces an older.
    pub term: u64,
    /// Node id of the leader, 0 when there is none at the moment.
    pub leader: u64,
    /// The leader's core.
    pub core: u16,
}

/// Options of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplyOptions<'a> {
    /// Milliseconds to wait before trying again.
    pub retry_after_ms: Option<u32>,
    /// Where the shard is led.
    pub moved: Option<Moved>,
    /// When the entry expires, in milliseconds since the Unix epoch. `None`: never.
    pub expires_at_ms: Option<u64>,
    /// Age of what was read, in milliseconds.
    pub age_ms: Option<u32>,
    /// Text for a person. Cut to 255 bytes when encoded.
    pub message: Option<&'a str>,
}

impl<'a> ReplyOptions<'a> {
    /// Only a message.
    pub const fn message(message: &'a str) -> Self {
        Self {
            retry_after_ms: None,
            moved: None,
            expires_at_ms: None,
            age_ms: None,
            message: Some(message),
        }
    }

    /// Bytes that [`Self::encode`] appends.
    #[inline]
    pub(crate) fn encoded_len(&self) -> usize {
        let mut len = 0;
        if self.retry_after_ms.is_some() {
            len += OPTION_HEAD + 4;
        }
        if self.moved.is_some() {
            len += OPTION_HEAD + 22;
        }
        if self.expires_at_ms.is_some() {
            len += OPTION_HEAD + 8;
        }
        if self.age_ms.is_some() {
            len += OPTION_HEAD + 4;
        }
        if let Some(message) = self.message {
            len += OPTION_HEAD + fitting(message).len();
        }
        len
    }

    /// Appends the options that are set.
    pub(crate) fn encode(&self, out: &mut BytesMut) {
        if let Some(retry_after_ms) = self.retry_after_ms {
            put(out, reply_tag::RETRY_AFTER, &retry_after_ms.to_le_bytes());
        }
        if let Some(moved) = self.moved {
            let mut value = [0; 22];
            value[..4].copy_from_slice(&moved.epoch.to_le_bytes());
            value[4..12].copy_from_slice(&moved.term.to_le_bytes());
            value[12..20].copy_from_slice(&moved.leader.to_le_bytes());
            value[20..].copy_from_slice(&moved.core.to_le_bytes());
            put(out, reply_tag::MOVED, &value);
        }
        if let Some(expires_at_ms) = self.expires_at_ms {
            put(out, reply_tag::EXPIRES_AT, &expires_at_ms.to_le_bytes());
        }
        if let Some(age_ms) = self.age_ms {
            put(out, reply_tag::AGE, &age_ms.to_le_bytes());
        }
        if let Some(message) = self.message {
            put(out, reply_tag::MESSAGE, fitting(message).as_bytes());
        }
    }

    /// Reads the options; unknown ones are skipped. `None` when they are cut short or a known one has a wrong length.
    pub(crate) fn decode(mut bytes: &'a [u8]) -> Option<Self> {
        let mut options = Self::default();
        while !bytes.is_empty() {
            let (tag, value) = next(&mut bytes)?;
            match tag {
                reply_tag::RETRY_AFTER => options.retry_after_ms = Some(u32::from_le_bytes(value.try_into().ok()?)),
                reply_tag::MOVED => {
                    let value: &[u8; 22] = value.try_into().ok()?;
                    options.moved = Some(Moved {
                        epoch: u32::from_le_bytes(value[..4].try_into().ok()?),
                        term: u64::from_le_bytes(value[4..12].try_into().ok()?),
                        leader: u64::from_le_bytes(value[12..20].try_into().ok()?),
                        core: u16::from_le_bytes(value[20..].try_into().ok()?),
                    });
                }
                reply_tag::EXPIRES_AT => options.expires_at_ms = Some(u64::from_le_bytes(value.try_into().ok()?)),
                reply_tag::AGE => options.age_ms = Some(u32::from_le_bytes(value.try_into().ok()?)),
                reply_tag::MESSAGE => options.message = Some(std::str::from_utf8(value).ok()?),
                _ => {}
            }
        }
        Some(options)
    }
}

/// The part of a message that an option can hold.
fn fitting(message: &str) -> &str {
    &message[..message.floor_char_boundary(usize::from(u8::MAX))]
}

fn put(out: &mut BytesMut, tag: u8, value: &[u8]) {
    let len = u8::try_from(value.len()).expect("invariant: option values are shorter than 256 bytes");
    out.extend_from_slice(&[tag, len]);
    out.extend_from_slice(value);
}

fn next<'a>(bytes: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let head = take_bytes(bytes, 2)?;
    let value = take_bytes(bytes, usize::from(head[1]))?;
    Some((head[0], value))
}
