//! Requests: operations with their bodies and the options that go with them.

use bytes::BytesMut;
use zerocopy::byteorder::little_endian::{I64, U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cluster::Verb;
use crate::frame::{self, Frame};
use crate::limits::{Limits, MAX_BATCH, MAX_NAME_LEN, MAX_PING_LEN, MAX_SHARDS, SESSION_WINDOW};
use crate::options::{RequestOptions, Session, bit, request_tag as tag};
use crate::status::Status;
use crate::wire::{take, take_bytes};

/// Operations. The numbers are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Opens a connection: versions, names and limits.
    Hello = 0x01,
    /// Echo.
    Ping = 0x02,
    /// The cluster map.
    Map = 0x03,
    /// Counters of the node.
    Stats = 0x04,
    /// Reads an entry.
    Get = 0x10,
    /// Writes an entry.
    Put = 0x11,
    /// Removes an entry.
    Delete = 0x12,
    /// Adds to a decimal number.
    Incr = 0x13,
    /// Sets or removes an entry's time to live.
    Touch = 0x14,
    /// Reads several entries.
    MultiGet = 0x20,
    /// Writes several entries.
    MultiPut = 0x21,
    /// Removes several entries.
    MultiDelete = 0x22,
    /// A page of the keys of a shard.
    Keys = 0x30,
    /// A page of the keys and values of a shard.
    Entries = 0x31,
    /// Opens a session in a shard.
    OpenSession = 0x40,
    /// Ends a session in a shard.
    CloseSession = 0x41,
    /// Has the node write a snapshot of a shard; an administrator's.
    TakeSnapshot = 0x50,
    /// Asks about the cluster, or for a change of it; an administrator's.
    Cluster = 0x51,
}

impl Opcode {
    /// Every operation, in the order of their codes.
    pub const ALL: &'static [Opcode] = &[
        Self::Hello,
        Self::Ping,
        Self::Map,
        Self::Stats,
        Self::Get,
        Self::Put,
        Self::Delete,
        Self::Incr,
        Self::Touch,
        Self::MultiGet,
        Self::MultiPut,
        Self::MultiDelete,
        Self::Keys,
        Self::Entries,
        Self::OpenSession,
        Self::CloseSession,
        Self::TakeSnapshot,
        Self::Cluster,
    ];

    /// The operation of a code; `None` for one of a later minor version.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x01 => Self::Hello,
            0x02 => Self::Ping,
            0x03 => Self::Map,
            0x04 => Self::Stats,
            0x10 => Self::Get,
            0x11 => Self::Put,
            0x12 => Self::Delete,
            0x13 => Self::Incr,
            0x14 => Self::Touch,
            0x20 => Self::MultiGet,
            0x21 => Self::MultiPut,
            0x22 => Self::MultiDelete,
            0x30 => Self::Keys,
            0x31 => Self::Entries,
            0x40 => Self::OpenSession,
            0x41 => Self::CloseSession,
            0x50 => Self::TakeSnapshot,
            0x51 => Self::Cluster,
            _ => return None,
        })
    }

    /// The code on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether the operation changes entries.
    pub const fn changes_entries(self) -> bool {
        matches!(
            self,
            Self::Put | Self::Delete | Self::Incr | Self::Touch | Self::MultiPut | Self::MultiDelete
        )
    }

    /// Whether the operation changes anything. A write whose reply is lost is in doubt; anything else can be sent again.
    pub const fn is_write(self) -> bool {
        self.changes_entries() || matches!(self, Self::OpenSession | Self::CloseSession)
    }

    /// Whether the operation is about the cluster and not its data, and asked for by administrators alone.
    pub const fn is_administrative(self) -> bool {
        matches!(self, Self::TakeSnapshot | Self::Cluster)
    }

    /// The options that go with the operation, as a set of [`bit`]s.
    const fn options(self) -> u32 {
        const ANY: u32 = bit(tag::DEADLINE) | bit(tag::MAP_EPOCH);
        const READ: u32 = ANY | bit(tag::CONSISTENCY);
        const WRITE: u32 = ANY | bit(tag::SESSION);
        const CONDITION: u32 = bit(tag::IF_ABSENT) | bit(tag::IF_VERSION);
        match self {
            Self::Hello
            | Self::Ping
            | Self::Map
            | Self::Stats
            | Self::OpenSession
            | Self::CloseSession
            | Self::TakeSnapshot
            | Self::Cluster => ANY,
            Self::Get | Self::MultiGet | Self::Keys | Self::Entries => READ,
            Self::Put => WRITE | CONDITION | bit(tag::TTL),
            Self::Delete => WRITE | bit(tag::IF_VERSION),
            Self::Touch => WRITE | bit(tag::TTL),
            Self::MultiPut => WRITE | bit(tag::IF_ABSENT),
            Self::Incr | Self::MultiDelete => WRITE,
        }
    }
}

/// A request, borrowed from its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Chosen by the client, unique among its unanswered requests on the stream.
    pub id: u64,
    /// Options.
    pub options: RequestOptions,
    /// What to do.
    pub operation: Operation<'a>,
}

/// An operation with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Opens a connection.
    Hello(Hello<'a>),
    /// Echo of at most [`MAX_PING_LEN`] bytes.
    Ping {
        /// Comes back as it is.
        payload: &'a [u8],
    },
    /// The cluster map.
    Map,
    /// Counters of the node.
    Stats,
    /// Reads an entry.
    Get {
        /// The key.
        key: &'a [u8],
    },
    /// Writes an entry; without a time to live the entry does not expire, whatever it had before.
    Put {
        /// The key.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
    },
    /// Removes an entry.
    Delete {
        /// The key.
        key: &'a [u8],
    },
    /// Adds to an ASCII decimal `i64`; a missing key counts as 0, and the time to live stays as it is.
    Incr {
        /// The key.
        key: &'a [u8],
        /// What to add.
        delta: i64,
    },
    /// Sets the time to live of an entry, or removes it where the request has none.
    Touch {
        /// The key.
        key: &'a [u8],
    },
    /// Reads several entries; a result per key, in the order asked.
    MultiGet(KeyList<'a>),
    /// Writes several entries; a result per key, no atomicity across keys.
    MultiPut(ItemList<'a>),
    /// Removes several entries; a result per key, no atomicity across keys.
    MultiDelete(KeyList<'a>),
    /// A page of keys.
    Keys(Scan<'a>),
    /// A page of keys and values.
    Entries(Scan<'a>),
    /// Opens a session, which the writes to be executed exactly once then name in their options.
    OpenSession(ShardSession),
    /// Ends a session.
    CloseSession(ShardSession),
    /// Has the node that is asked write a snapshot of its replica of a shard, or wait for the one it is writing. The reply comes when
    /// that is durable; its index is the last entry of the log in the snapshot.
    TakeSnapshot {
        /// The shard, from the map.
        shard: u16,
    },
    /// Asks about the cluster, or for a change of it ([`crate::cluster`]). Every change can be asked for again: it is made once.
    Cluster {
        /// What is asked.
        verb: Verb,
        /// What the verb needs.
        body: &'a [u8],
    },
}

/// Body of `OpenSession` and `CloseSession`: a session in a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSession {
    /// The session, chosen at random by the client, not 0. An id is opened once.
    pub id: u128,
    /// The shard, from the map.
    pub shard: u16,
}

/// Body of `Hello`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The client's major version.
    pub major: u16,
    /// The client's minor version.
    pub minor: u16,
    /// What the client calls itself, for the node's logs: UTF-8, at most [`MAX_NAME_LEN`] bytes.
    pub name: &'a str,
}

/// Arguments of a page of keys or entries of one shard.
///
/// A scan starts at cursor 0 and goes on with the cursor of each reply until one says it was the last. An entry present from
/// the first page to the last is returned at least once; one that comes or goes meanwhile may or may not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scan<'a> {
    /// The shard, from the map.
    pub shard: u16,
    /// Most entries in the page, from 1 to [`MAX_BATCH`].
    pub limit: u32,
    /// Where to go on; 0 to start.
    pub cursor: u64,
    /// Only keys that begin with it; empty for all.
    pub prefix: &'a [u8],
}

/// Keys of a `MultiGet` or `MultiDelete`, validated when decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyList<'a> {
    count: u32,
    bytes: &'a [u8],
}

/// Items of a `MultiPut`, validated when decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ItemList<'a> {
    count: u32,
    bytes: &'a [u8],
}

/// One item of a `MultiPut`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// Time to live in milliseconds; `None`: no expiry.
    pub ttl_ms: Option<u64>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloHead {
    major: U16,
    minor: U16,
    name_len: U16,
    reserved: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ScanHead {
    cursor: U64,
    limit: U32,
    shard: U16,
    prefix_len: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SessionBody {
    id: U128,
    shard: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ItemHead {
    ttl_ms: U64,
    value_len: U32,
    key_len: U16,
    reserved: U16,
}

/// Why a frame is not a request this node can execute. The connection goes on: the frame's boundaries were sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The operation is not known.
    #[error(
        "unknown operation {code:#04x}; this node speaks minor version {} of the protocol",
        crate::MINOR
    )]
    UnknownOperation {
        /// The frame's code.
        code: u8,
    },
    /// A verb of `Cluster` is not known.
    #[error("unknown verb {0} of Cluster; this node speaks minor version {minor} of the protocol", minor = crate::MINOR)]
    UnknownVerb(u8),
    /// The body ends before what it must hold, or goes on after it.
    #[error("the body of {0:?} is {1} bytes long, which is not what its fields add up to")]
    BodyLength(Opcode, usize),
    /// A text is not UTF-8.
    #[error("the client name is not UTF-8")]
    NotUtf8,
    /// A reserved field is not zero.
    #[error("a reserved field of {0:?} is not zero")]
    ReservedField(Opcode),
    /// The options end inside one.
    #[error("the options end inside an option")]
    OptionsCutShort,
    /// An option's value has a wrong length.
    #[error("option {tag:#04x} has a value of {len} bytes, which is not its length")]
    OptionLength {
        /// The option.
        tag: u8,
        /// Its length.
        len: usize,
    },
    /// An option's value is out of range.
    #[error("option {tag:#04x}: {reason}")]
    OptionValue {
        /// The option.
        tag: u8,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An option is there twice.
    #[error("option {tag:#04x} is given twice")]
    OptionTwice {
        /// The option.
        tag: u8,
    },
    /// Both if-absent and if-version.
    #[error("if-absent and if-version exclude each other")]
    TwoConditions,
    /// An option that may not be ignored is not known.
    #[error("unknown option {tag:#04x}, and it may not be ignored")]
    UnknownOption {
        /// The option.
        tag: u8,
    },
    /// An option does not go with the operation.
    #[error("option {tag:#04x} does not go with {opcode:?}")]
    OptionNotApplicable {
        /// The operation.
        opcode: Opcode,
        /// The option.
        tag: u8,
    },
    /// The session id that means none.
    #[error("session id 0 is not a session")]
    NoSession,
    /// The numbers of the writes of a request go past what a number can be.
    #[error("the numbers of the request's writes in its session go beyond 64 bits")]
    SequenceOverflow,
    /// The key is empty.
    #[error("the key is empty; keys have 1 to 65535 bytes")]
    EmptyKey,
    /// The key is too long.
    #[error("the key has {len} bytes, more than the limit of {limit}")]
    KeyTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The value is too long.
    #[error("the value has {len} bytes, more than the limit of {limit}")]
    ValueTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A count, a limit or a length is out of range.
    #[error("{what} is {value}; it must be from {min} to {max}")]
    OutOfRange {
        /// Which.
        what: &'static str,
        /// What it is.
        value: u64,
        /// Smallest legal.
        min: u64,
        /// Largest legal.
        max: u64,
    },
}

impl RequestError {
    /// The status of the reply.
    pub const fn status(&self) -> Status {
        match self {
            Self::UnknownOperation { .. } | Self::UnknownVerb(_) => Status::UnknownOperation,
            Self::UnknownOption { .. } | Self::OptionNotApplicable { .. } => Status::UnsupportedOption,
            Self::KeyTooLarge { .. } => Status::KeyTooLarge,
            Self::ValueTooLarge { .. } => Status::ValueTooLarge,
            Self::EmptyKey
            | Self::OutOfRange { .. }
            | Self::OptionValue { .. }
            | Self::TwoConditions
            | Self::NoSession
            | Self::SequenceOverflow => Status::InvalidArgument,
            _ => Status::Malformed,
        }
    }
}

impl<'a> Request<'a> {
    /// Reads the request in `frame`, under `limits`.
    #[inline]
    pub fn decode(frame: &'a Frame, limits: &Limits) -> Result<Self, RequestError> {
        let opcode = Opcode::from_code(frame.opcode).ok_or(RequestError::UnknownOperation { code: frame.opcode })?;
        let (options, body) = frame
            .payload
            .split_at_checked(usize::from(frame.options_len))
            .ok_or(RequestError::OptionsCutShort)?;
        let options = if options.is_empty() {
            RequestOptions::default()
        } else {
            decode_options(opcode, options)?
        };
        let operation = Operation::decode(opcode, body, limits)?;
        if let Some(session) = &options.session {
            check_numbers(session, &operation)?;
        }
        Ok(Self {
            id: frame.request_id,
            options,
            operation,
        })
    }

    /// Appends the request as one frame.
    ///
    /// The caller keeps to the limits (a client checks a key and a value before it queues them).
    ///
    /// # Panics
    /// When a key is longer than [`crate::limits::MAX_KEY_LEN`] or the whole longer than a frame can be.
    #[inline]
    pub fn encode(&self, out: &mut BytesMut) {
        let options_len = self.options.encoded_len();
        let payload_len = options_len + self.operation.body_len();
        let header = frame::header(self.operation.opcode().code(), 0, self.id, options_len, payload_len);
        out.reserve(frame::HEADER_LEN + payload_len);
        let end = out.len() + frame::HEADER_LEN + payload_len;
        out.extend_from_slice(header.as_bytes());
        if options_len > 0 {
            self.options.encode(out);
        }
        self.operation.encode(out);
        debug_assert_eq!(
            out.len(),
            end,
            "the lengths of {:?} were added up wrongly",
            self.operation.opcode()
        );
    }
}

/// Each key of a request in a session takes a number of its own, from the option's on: they must exist and fit the window.
#[cold]
fn check_numbers(session: &Session, operation: &Operation<'_>) -> Result<(), RequestError> {
    let count = match operation {
        Operation::MultiPut(items) => items.len(),
        Operation::MultiDelete(keys) => keys.len(),
        _ => 1,
    };
    in_range(
        "the number of keys of a request in a session",
        count,
        1,
        SESSION_WINDOW as usize,
    )?;
    let last = session.seq.checked_add(count as u64 - 1);
    last.map(drop).ok_or(RequestError::SequenceOverflow)
}

#[cold]
fn decode_options(opcode: Opcode, bytes: &[u8]) -> Result<RequestOptions, RequestError> {
    let (options, seen) = RequestOptions::decode(bytes)?;
    let foreign = seen & !opcode.options();
    if foreign != 0 {
        let tag = match foreign.trailing_zeros() as u8 {
            31 => tag::MAP_EPOCH,
            tag => tag,
        };
        return Err(RequestError::OptionNotApplicable { opcode, tag });
    }
    Ok(options)
}

impl<'a> Operation<'a> {
    /// The operation's code.
    pub const fn opcode(&self) -> Opcode {
        match self {
            Self::Hello(_) => Opcode::Hello,
            Self::Ping { .. } => Opcode::Ping,
            Self::Map => Opcode::Map,
            Self::Stats => Opcode::Stats,
            Self::Get { .. } => Opcode::Get,
            Self::Put { .. } => Opcode::Put,
            Self::Delete { .. } => Opcode::Delete,
            Self::Incr { .. } => Opcode::Incr,
            Self::Touch { .. } => Opcode::Touch,
            Self::MultiGet(_) => Opcode::MultiGet,
            Self::MultiPut(_) => Opcode::MultiPut,
            Self::MultiDelete(_) => Opcode::MultiDelete,
            Self::Keys(_) => Opcode::Keys,
            Self::Entries(_) => Opcode::Entries,
            Self::OpenSession(_) => Opcode::OpenSession,
            Self::CloseSession(_) => Opcode::CloseSession,
            Self::TakeSnapshot { .. } => Opcode::TakeSnapshot,
            Self::Cluster { .. } => Opcode::Cluster,
        }
    }

    /// The single key the operation is about, by which it is routed.
    pub const fn key(&self) -> Option<&'a [u8]> {
        match *self {
            Self::Get { key }
            | Self::Put { key, .. }
            | Self::Delete { key }
            | Self::Incr { key, .. }
            | Self::Touch { key } => Some(key),
            _ => None,
        }
    }

    fn decode(opcode: Opcode, body: &'a [u8], limits: &Limits) -> Result<Self, RequestError> {
        let cut = RequestError::BodyLength(opcode, body.len());
        let mut rest = body;
        let operation = match opcode {
            Opcode::Hello => {
                let head: &HelloHead = take(&mut rest).ok_or(cut)?;
                let len = usize::from(head.name_len.get());
                in_range("the length of the client name", len, 0, MAX_NAME_LEN)?;
                let name = take_bytes(&mut rest, len).ok_or(cut)?;
                let name = std::str::from_utf8(name).map_err(|_| RequestError::NotUtf8)?;
                // Later versions may append fields and use the reserved one: Hello must be readable across versions.
                rest = &[];
                Self::Hello(Hello {
                    major: head.major.get(),
                    minor: head.minor.get(),
                    name,
                })
            }
            Opcode::Ping => {
                in_range("the length of the ping payload", body.len(), 0, MAX_PING_LEN)?;
                rest = &[];
                Self::Ping { payload: body }
            }
            Opcode::Map => Self::Map,
            Opcode::Stats => Self::Stats,
            Opcode::Get => Self::Get {
                key: last_key(&mut rest, limits)?,
            },
            Opcode::Delete => Self::Delete {
                key: last_key(&mut rest, limits)?,
            },
            Opcode::Touch => Self::Touch {
                key: last_key(&mut rest, limits)?,
            },
            Opcode::Incr => {
                let delta: &I64 = take(&mut rest).ok_or(cut)?;
                Self::Incr {
                    delta: delta.get(),
                    key: last_key(&mut rest, limits)?,
                }
            }
            Opcode::Put => {
                let (key, value) = put_parts(std::mem::take(&mut rest)).ok_or(cut)?;
                check_key(key, limits)?;
                check_value(value, limits)?;
                Self::Put { key, value }
            }
            Opcode::MultiGet => Self::MultiGet(KeyList::decode(opcode, &mut rest, limits)?),
            Opcode::MultiDelete => Self::MultiDelete(KeyList::decode(opcode, &mut rest, limits)?),
            Opcode::MultiPut => Self::MultiPut(ItemList::decode(&mut rest, limits)?),
            Opcode::Keys => Self::Keys(Scan::decode(opcode, &mut rest)?),
            Opcode::Entries => Self::Entries(Scan::decode(opcode, &mut rest)?),
            Opcode::OpenSession => Self::OpenSession(ShardSession::decode(opcode, &mut rest)?),
            Opcode::CloseSession => Self::CloseSession(ShardSession::decode(opcode, &mut rest)?),
            Opcode::TakeSnapshot => {
                let shard: &U16 = take(&mut rest).ok_or(cut)?;
                in_range("the shard", usize::from(shard.get()), 0, MAX_SHARDS - 1)?;
                Self::TakeSnapshot { shard: shard.get() }
            }
            Opcode::Cluster => {
                let verb: &u8 = take(&mut rest).ok_or(cut)?;
                let verb = Verb::from_code(*verb).ok_or(RequestError::UnknownVerb(*verb))?;
                let body = std::mem::take(&mut rest);
                Self::Cluster { verb, body }
            }
        };
        if rest.is_empty() { Ok(operation) } else { Err(cut) }
    }

    /// Bytes that [`Self::encode`] appends.
    #[inline]
    const fn body_len(&self) -> usize {
        match *self {
            Self::Hello(hello) => size_of::<HelloHead>() + hello.name.len(),
            Self::Ping { payload } => payload.len(),
            Self::Map | Self::Stats => 0,
            Self::Get { key } | Self::Delete { key } | Self::Touch { key } => key.len(),
            Self::Incr { key, .. } => size_of::<I64>() + key.len(),
            Self::Put { key, value } => size_of::<U16>() + key.len() + value.len(),
            Self::MultiGet(list) | Self::MultiDelete(list) => size_of::<U32>() + list.bytes.len(),
            Self::MultiPut(list) => size_of::<U32>() + list.bytes.len(),
            Self::Keys(scan) | Self::Entries(scan) => size_of::<ScanHead>() + scan.prefix.len(),
            Self::OpenSession(_) | Self::CloseSession(_) => size_of::<SessionBody>(),
            Self::TakeSnapshot { .. } => size_of::<U16>(),
            Self::Cluster { body, .. } => 1 + body.len(),
        }
    }

    #[inline]
    fn encode(&self, out: &mut BytesMut) {
        match *self {
            Self::Hello(hello) => {
                let name_len = U16::new(key_len(hello.name.as_bytes()));
                let head = HelloHead {
                    major: U16::new(hello.major),
                    minor: U16::new(hello.minor),
                    name_len,
                    reserved: U16::ZERO,
                };
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(hello.name.as_bytes());
            }
            Self::Ping { payload } => out.extend_from_slice(payload),
            Self::Map | Self::Stats => {}
            Self::Get { key } | Self::Delete { key } | Self::Touch { key } => out.extend_from_slice(key),
            Self::Incr { key, delta } => {
                out.extend_from_slice(&delta.to_le_bytes());
                out.extend_from_slice(key);
            }
            Self::Put { key, value } => {
                out.extend_from_slice(&key_len(key).to_le_bytes());
                out.extend_from_slice(key);
                out.extend_from_slice(value);
            }
            Self::MultiGet(list) | Self::MultiDelete(list) => {
                out.extend_from_slice(&list.count.to_le_bytes());
                out.extend_from_slice(list.bytes);
            }
            Self::MultiPut(list) => {
                out.extend_from_slice(&list.count.to_le_bytes());
                out.extend_from_slice(list.bytes);
            }
            Self::Keys(scan) | Self::Entries(scan) => {
                let head = ScanHead {
                    cursor: U64::new(scan.cursor),
                    limit: U32::new(scan.limit),
                    shard: U16::new(scan.shard),
                    prefix_len: U16::new(key_len(scan.prefix)),
                };
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(scan.prefix);
            }
            Self::OpenSession(session) | Self::CloseSession(session) => {
                let body = SessionBody {
                    id: U128::new(session.id),
                    shard: U16::new(session.shard),
                };
                out.extend_from_slice(body.as_bytes());
            }
            Self::TakeSnapshot { shard } => out.extend_from_slice(&shard.to_le_bytes()),
            Self::Cluster { verb, body } => {
                out.extend_from_slice(&[verb.code()]);
                out.extend_from_slice(body);
            }
        }
    }
}

impl<'a> KeyList<'a> {
    /// Lays `keys` out in `buffer` (cleared first) as a list to be encoded.
    ///
    /// # Panics
    /// When a key is longer than [`crate::limits::MAX_KEY_LEN`].
    pub fn build<'k>(keys: impl IntoIterator<Item = &'k [u8]>, buffer: &'a mut BytesMut) -> Self {
        buffer.clear();
        let mut count = 0;
        for key in keys {
            buffer.extend_from_slice(&key_len(key).to_le_bytes());
            buffer.extend_from_slice(key);
            count += 1;
        }
        Self { count, bytes: buffer }
    }

    /// Number of keys.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Bytes of the list in a frame, without its count.
    pub const fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is none. A decoded list has at least one.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The keys, in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let len: &U16 = take(&mut rest)?;
            take_bytes(&mut rest, usize::from(len.get()))
        })
    }

    fn decode(opcode: Opcode, rest: &mut &'a [u8], limits: &Limits) -> Result<Self, RequestError> {
        let cut = RequestError::BodyLength(opcode, rest.len());
        let count: &U32 = take(rest).ok_or(cut)?;
        let count = count.get();
        in_range("the number of keys", count as usize, 1, MAX_BATCH)?;
        let bytes = *rest;
        for _ in 0..count {
            let len: &U16 = take(rest).ok_or(cut)?;
            check_key(take_bytes(rest, usize::from(len.get())).ok_or(cut)?, limits)?;
        }
        Ok(Self {
            count,
            bytes: &bytes[..bytes.len() - rest.len()],
        })
    }
}

impl<'a> ItemList<'a> {
    /// Lays `items` out in `buffer` (cleared first) as a list to be encoded.
    ///
    /// # Panics
    /// When a key is longer than [`crate::limits::MAX_KEY_LEN`] or a value longer than [`crate::limits::MAX_VALUE_LEN`].
    pub fn build<'k>(items: impl IntoIterator<Item = Item<'k>>, buffer: &'a mut BytesMut) -> Self {
        buffer.clear();
        let mut count = 0;
        for item in items {
            let value_len = u32::try_from(item.value.len()).expect("invariant: values below 4 GiB by limits");
            let head = ItemHead {
                ttl_ms: U64::new(item.ttl_ms.unwrap_or(0)),
                value_len: U32::new(value_len),
                key_len: U16::new(key_len(item.key)),
                reserved: U16::ZERO,
            };
            buffer.extend_from_slice(head.as_bytes());
            buffer.extend_from_slice(item.key);
            buffer.extend_from_slice(item.value);
            count += 1;
        }
        Self { count, bytes: buffer }
    }

    /// Bytes an item takes in a frame beside its key and value.
    pub const ITEM_OVERHEAD: usize = size_of::<ItemHead>();

    /// Number of items.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Bytes of the list in a frame, without its count.
    pub const fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is none. A decoded list has at least one.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The items, in order.
    pub fn iter(&self) -> impl Iterator<Item = Item<'a>> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let head: &ItemHead = take(&mut rest)?;
            let key = take_bytes(&mut rest, usize::from(head.key_len.get()))?;
            let value = take_bytes(&mut rest, head.value_len.get() as usize)?;
            Some(Item {
                key,
                value,
                ttl_ms: Some(head.ttl_ms.get()).filter(|&ttl_ms| ttl_ms != 0),
            })
        })
    }

    fn decode(rest: &mut &'a [u8], limits: &Limits) -> Result<Self, RequestError> {
        let cut = RequestError::BodyLength(Opcode::MultiPut, rest.len());
        let count: &U32 = take(rest).ok_or(cut)?;
        let count = count.get();
        in_range("the number of items", count as usize, 1, MAX_BATCH)?;
        let bytes = *rest;
        for _ in 0..count {
            let head: &ItemHead = take(rest).ok_or(cut)?;
            if head.reserved != U16::ZERO {
                return Err(RequestError::ReservedField(Opcode::MultiPut));
            }
            check_key(take_bytes(rest, usize::from(head.key_len.get())).ok_or(cut)?, limits)?;
            check_value(take_bytes(rest, head.value_len.get() as usize).ok_or(cut)?, limits)?;
        }
        Ok(Self {
            count,
            bytes: &bytes[..bytes.len() - rest.len()],
        })
    }
}

impl<'a> Scan<'a> {
    fn decode(opcode: Opcode, rest: &mut &'a [u8]) -> Result<Self, RequestError> {
        let cut = RequestError::BodyLength(opcode, rest.len());
        let head: &ScanHead = take(rest).ok_or(cut)?;
        in_range("the page's limit", head.limit.get() as usize, 1, MAX_BATCH)?;
        in_range("the shard", usize::from(head.shard.get()), 0, MAX_SHARDS - 1)?;
        let prefix = take_bytes(rest, usize::from(head.prefix_len.get())).ok_or(cut)?;
        Ok(Self {
            shard: head.shard.get(),
            limit: head.limit.get(),
            cursor: head.cursor.get(),
            prefix,
        })
    }
}

impl ShardSession {
    fn decode(opcode: Opcode, rest: &mut &[u8]) -> Result<Self, RequestError> {
        let cut = RequestError::BodyLength(opcode, rest.len());
        let body: &SessionBody = take(rest).ok_or(cut)?;
        in_range("the shard", usize::from(body.shard.get()), 0, MAX_SHARDS - 1)?;
        if body.id.get() == 0 {
            return Err(RequestError::NoSession);
        }
        Ok(Self {
            id: body.id.get(),
            shard: body.shard.get(),
        })
    }
}

/// Key and value in the body of a `Put`, not checked against any limit. `None` when it is cut short.
#[inline]
pub fn put_parts(mut body: &[u8]) -> Option<(&[u8], &[u8])> {
    let key_len: &U16 = take(&mut body)?;
    let key = take_bytes(&mut body, usize::from(key_len.get()))?;
    Some((key, body))
}

fn last_key<'a>(rest: &mut &'a [u8], limits: &Limits) -> Result<&'a [u8], RequestError> {
    let key = std::mem::take(rest);
    check_key(key, limits)?;
    Ok(key)
}

fn check_key(key: &[u8], limits: &Limits) -> Result<(), RequestError> {
    if key.is_empty() {
        return Err(RequestError::EmptyKey);
    }
    if key.len() > limits.max_key_len {
        return Err(RequestError::KeyTooLarge {
            len: key.len(),
            limit: limits.max_key_len,
        });
    }
    Ok(())
}

fn check_value(value: &[u8], limits: &Limits) -> Result<(), RequestError> {
    if value.len() > limits.max_value_len {
        return Err(RequestError::ValueTooLarge {
            len: value.len(),
            limit: limits.max_value_len,
        });
    }
    Ok(())
}

fn in_range(what: &'static str, value: usize, min: usize, max: usize) -> Result<(), RequestError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(RequestError::OutOfRange {
        what,
        value: value as u64,
        min: min as u64,
        max: max as u64,
    })
}

fn key_len(key: &[u8]) -> u16 {
    u16::try_from(key.len()).expect("invariant: keys, prefixes and names below 64 KiB by limits")
}
