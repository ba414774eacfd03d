//! What two nodes say to each other: messages of a 16-byte header and a payload that is the business of whoever sent it, and the
//! few messages of the transport itself.
//!
//! The header has the shape of a client's frame ([`crate::frame`]): the same fields stand at the same places, the operation is a
//! `kind` the transport does not look at, and where a frame says how long its options are a message says which shard it is for.

use bytes::{Bytes, BytesMut};
use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::assembler::Assembler;
use crate::limits::MAX_NAME_LEN;
use crate::wire::{take, take_bytes};

/// The ALPN identifier nodes offer each other (RFC 7301), with the version of this part of the protocol.
pub const ALPN_PEER: &[u8] = b"generation-peer/1";

/// Version of the peer protocol, as `Hello` tells it. Nodes of different versions do not talk.
pub const PEER_VERSION: u16 = 1;

/// Bytes of a message's header.
pub const HEADER_LEN: usize = size_of::<Header>();

/// Longest payload of one message, in bytes. Whoever has more to say says it in several messages.
pub const MAX_PAYLOAD_LEN: usize = 64 << 20;

/// Longest payload that travels on the first lane, in bytes. A longer one takes the second, so that nothing short waits behind it.
pub const MAX_PROMPT_LEN: usize = 64 << 10;

const _: () = assert!(HEADER_LEN == 16, "the header is drawn as 16 bytes in PROTOCOL.md");
const _: () = assert!(
    MAX_PAYLOAD_LEN >= 2 * (crate::limits::DEFAULT_MAX_VALUE_LEN + crate::limits::MAX_KEY_LEN),
    "a log entry with the largest usual value must fit with room for what surrounds it"
);

/// What a message is. The numbers are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    /// Asks for a reply or a refusal under its id.
    Request = 0,
    /// Answers the request with its id.
    Reply = 1,
    /// Is not answered; its id is 0.
    OneWay = 2,
    /// Says that the request with its id gets no reply; the payload is one [`Refusal`].
    Refusal = 3,
    /// Of the transport itself; its id is 0 and its kind one of [`control`].
    Control = 4,
}

impl Class {
    /// Every class, in the order of their codes.
    pub const ALL: &'static [Class] = &[Self::Request, Self::Reply, Self::OneWay, Self::Refusal, Self::Control];

    /// The code on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The class of a code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Request,
            1 => Self::Reply,
            2 => Self::OneWay,
            3 => Self::Refusal,
            4 => Self::Control,
            _ => return None,
        })
    }

    /// Whether messages of this class carry the id of a request.
    const fn has_id(self) -> bool {
        matches!(self, Self::Request | Self::Reply | Self::Refusal)
    }
}

/// Kinds of [`Class::Control`]. A receiver passes over those it does not know.
pub mod control {
    /// Who speaks, [`super::PeerHello`]: the first message of each direction of each lane.
    pub const HELLO: u8 = 1;
    /// Asks for a sign of life, [`super::Ping`].
    pub const PING: u8 = 2;
    /// Answers a ping, [`super::Ping`] with the same `echo`.
    pub const PONG: u8 = 3;
}

/// Why a request gets no reply. The numbers are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// Too much is under way already; the request was not looked at.
    Busy = 1,
    /// Nobody answers such requests here (yet); the request was not looked at.
    NotServed = 2,
    /// Whoever was to answer gave up; what became of the request is unknown.
    Unanswered = 3,
}

impl Refusal {
    /// Every refusal, in the order of their codes.
    pub const ALL: &'static [Refusal] = &[Self::Busy, Self::NotServed, Self::Unanswered];

    /// The code on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The refusal of a code. One this version does not know promises nothing: [`Refusal::Unanswered`].
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Busy,
            2 => Self::NotServed,
            _ => Self::Unanswered,
        }
    }
}

/// The header of every message, as it is on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    len: U32,
    kind: u8,
    class: u8,
    shard: U16,
    id: U64,
}

/// A whole message. The payload is a reference-counted slice of what was received, copied only where a message straddled pieces:
/// a payload kept for long keeps the piece it came in, so a receiver that stores payloads copies them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub class: Class,
    /// What the payload means to its receiver; an answer repeats the request's.
    pub kind: u8,
    /// The shard it is about; an answer repeats the request's.
    pub shard: u16,
    /// Names a request to its sender among its requests without an answer; 0 where there is none.
    pub id: u64,
    /// The payload.
    pub payload: Bytes,
}

impl Message {
    /// The bytes in front of a payload of `len` bytes, at most [`MAX_PAYLOAD_LEN`].
    ///
    /// # Panics
    /// When `len` does not fit 32 bits.
    pub fn header(class: Class, kind: u8, shard: u16, id: u64, len: usize) -> [u8; HEADER_LEN] {
        let header = Header {
            len: U32::new(u32::try_from(len).expect("invariant: payload below 4 GiB by limits")),
            kind,
            class: class.code(),
            shard: U16::new(shard),
            id: U64::new(id),
        };
        zerocopy::transmute!(header)
    }

    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        let header = Self::header(self.class, self.kind, self.shard, self.id, self.payload.len());
        out.extend_from_slice(&header);
        out.extend_from_slice(&self.payload);
    }
}

/// Why a byte stream cannot be read as messages. Nothing after the error can be trusted: the connection is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A header announces more than the limit.
    #[error("a message announces {len} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Announced payload bytes.
        len: u32,
        /// The decoder's limit.
        limit: u32,
    },
    /// A class this version does not know.
    #[error("a message is of unknown class {0}")]
    UnknownClass(u8),
    /// A message that asks for no answer and answers nothing carries an id.
    #[error("a message without an answer carries the id {0}")]
    Id(u64),
    /// A refusal is one byte, a hello, a ping and a pong have their fields.
    #[error("a message of class {class} and kind {kind} has {len} bytes, which cannot be read")]
    Malformed {
        /// The message's class.
        class: u8,
        /// Its kind.
        kind: u8,
        /// Its payload bytes.
        len: u32,
    },
    /// The stream ended inside a message.
    #[error("the stream ended inside a message, after {received} of its bytes")]
    Truncated {
        /// Bytes of the unfinished message that arrived, header included.
        received: usize,
    },
}

/// Turns one direction of one lane into messages. Feed pieces as they arrive and drain all messages after each. A header is
/// checked as soon as its 16 bytes are there, before any of its payload is kept; work and memory are linear in what arrives,
/// however it is cut. After an error the decoder stays in error and keeps nothing.
#[derive(Debug)]
pub struct PeerDecoder {
    limit: u32,
    assembler: Assembler,
    failed: Option<MessageError>,
}

impl PeerDecoder {
    /// A decoder that refuses messages of more than `limit` payload bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
            assembler: Assembler::default(),
            failed: None,
        }
    }

    /// Takes the next piece of the stream.
    pub fn feed(&mut self, piece: Bytes) {
        if self.failed.is_none() {
            self.assembler.feed(piece);
        }
    }

    /// The next whole message, or `None` when more bytes are needed.
    #[inline]
    pub fn next_message(&mut self) -> Result<Option<Message>, MessageError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let limit = self.limit;
        let found = self.assembler.next(|header| check(limit, header));
        match found {
            Ok(found) => Ok(found.map(|(header, payload)| message(&header, payload))),
            Err(error) => {
                self.failed = Some(error);
                self.assembler.clear();
                Err(error)
            }
        }
    }

    /// Says whether the stream may end here: it may between messages only.
    pub fn finish(&self) -> Result<(), MessageError> {
        match (self.failed, self.buffered_len()) {
            (Some(error), _) => Err(error),
            (None, 0) => Ok(()),
            (None, received) => Err(MessageError::Truncated { received }),
        }
    }

    /// Bytes held for messages not yet given out.
    pub fn buffered_len(&self) -> usize {
        self.assembler.buffered_len()
    }
}

/// The message of a header that was checked.
#[inline]
fn message(header: &Header, payload: Bytes) -> Message {
    Message {
        class: Class::from_code(header.class).expect("invariant: the header was checked"),
        kind: header.kind,
        shard: header.shard.get(),
        id: header.id.get(),
        payload,
    }
}

/// How many bytes of payload follow a header that is legal.
#[inline]
fn check(limit: u32, header: &Header) -> Result<u32, MessageError> {
    let (len, id) = (header.len.get(), header.id.get());
    let class = Class::from_code(header.class).ok_or(MessageError::UnknownClass(header.class))?;
    if id != 0 && !class.has_id() {
        return Err(MessageError::Id(id));
    }
    if len > limit {
        return Err(MessageError::TooLarge { len, limit });
    }
    let fits = match (class, header.kind) {
        (Class::Refusal, _) => len == 1,
        (Class::Control, control::HELLO) => (PeerHello::FIXED_LEN..=PeerHello::MAX_LEN).contains(&(len as usize)),
        (Class::Control, control::PING | control::PONG) => len as usize == Ping::LEN,
        // Of one this version does not know, no more than a hello's worth is worth keeping.
        (Class::Control, _) => len as usize <= PeerHello::MAX_LEN,
        (Class::Request | Class::Reply | Class::OneWay, _) => true,
    };
    if fits {
        Ok(len)
    } else {
        Err(MessageError::Malformed {
            class: header.class,
            kind: header.kind,
            len,
        })
    }
}

/// Who speaks on a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerHello<'a> {
    /// [`PEER_VERSION`] of the speaker.
    pub version: u16,
    /// The speaker's core.
    pub core: u16,
    /// How many cores it has.
    pub cores: u16,
    /// Its id, which its certificate must name too.
    pub node: u64,
    /// Identity of its data directory: another one means that everything the node had is lost.
    pub directory: u128,
    /// Drawn at each start: another one means that the node has restarted.
    pub incarnation: u64,
    /// Name of its cluster.
    pub cluster: &'a str,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloHead {
    version: U16,
    cluster_len: U16,
    core: U16,
    cores: U16,
    node: U64,
    directory: U128,
    incarnation: U64,
}

impl<'a> PeerHello<'a> {
    /// Bytes before the cluster's name.
    pub const FIXED_LEN: usize = size_of::<HelloHead>();
    /// Longest payload: what a later version may append to it included.
    pub const MAX_LEN: usize = 1024;

    /// Appends the message.
    ///
    /// # Panics
    /// When the cluster's name is longer than [`MAX_NAME_LEN`].
    pub fn encode(&self, out: &mut BytesMut) {
        assert!(
            self.cluster.len() <= MAX_NAME_LEN,
            "a cluster's name of at most 255 bytes"
        );
        let len = Self::FIXED_LEN + self.cluster.len();
        out.extend_from_slice(&Message::header(Class::Control, control::HELLO, 0, 0, len));
        let head = HelloHead {
            version: U16::new(self.version),
            cluster_len: U16::new(self.cluster.len() as u16),
            core: U16::new(self.core),
            cores: U16::new(self.cores),
            node: U64::new(self.node),
            directory: U128::new(self.directory),
            incarnation: U64::new(self.incarnation),
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.cluster.as_bytes());
    }

    /// Reads a payload; `None` when it cannot be read. What follows the name is a later version's.
    pub fn decode(mut payload: &'a [u8]) -> Option<Self> {
        let head: &HelloHead = take(&mut payload)?;
        let cluster_len = usize::from(head.cluster_len.get());
        if cluster_len > MAX_NAME_LEN {
            return None;
        }
        let cluster = std::str::from_utf8(take_bytes(&mut payload, cluster_len)?).ok()?;
        Some(Self {
            version: head.version.get(),
            core: head.core.get(),
            cores: head.cores.get(),
            node: head.node.get(),
            directory: head.directory.get(),
            incarnation: head.incarnation.get(),
            cluster,
        })
    }
}

/// A sign of life asked for, or given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ping {
    /// Chosen by who asks; the answer repeats it.
    pub echo: u64,
    /// The speaker's wall clock, in milliseconds since the Unix epoch.
    pub unix_ms: u64,
}

impl Ping {
    /// Bytes of its payload.
    pub const LEN: usize = 16;

    /// The payload.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        zerocopy::transmute!([self.echo, self.unix_ms].map(U64::new))
    }

    /// Reads a payload; `None` when it is not of its length.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let [echo, unix_ms] = <[U64; 2]>::read_from_bytes(payload).ok()?.map(U64::get);
        Some(Self { echo, unix_ms })
    }
}

/// What replicas of a shard say to each other about keeping still. The numbers are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum QuiesceVerb {
    /// The leader of `term` asks to stop the clocks while nothing follows log index `index`.
    Propose = 1,
    /// The follower's log ends there too, and its clock has stopped.
    Accept = 2,
    /// The follower has a reason to go on.
    Decline = 3,
    /// A follower needs the leader, or has heard that its clock must run.
    Wake = 4,
}

/// A message about keeping still, of one shard: the whole payload of a one-way message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quiesce {
    /// What is said.
    pub verb: QuiesceVerb,
    /// The term it is about.
    pub term: u64,
    /// The last index of the log it is about; of [`QuiesceVerb::Wake`] 0.
    pub index: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct QuiesceBytes {
    verb: u8,
    term: U64,
    index: U64,
}

impl Quiesce {
    /// Bytes of its payload.
    pub const LEN: usize = size_of::<QuiesceBytes>();

    /// The payload.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let message = QuiesceBytes {
            verb: self.verb as u8,
            term: U64::new(self.term),
            index: U64::new(self.index),
        };
        bytes.copy_from_slice(message.as_bytes());
        bytes
    }

    /// Reads a payload; `None` when it is not of its length or says what this version does not know.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let message = QuiesceBytes::read_from_bytes(payload).ok()?;
        let verb = match message.verb {
            1 => QuiesceVerb::Propose,
            2 => QuiesceVerb::Accept,
            3 => QuiesceVerb::Decline,
            4 => QuiesceVerb::Wake,
            _ => return None,
        };
        Some(Self {
            verb,
            term: message.term.get(),
            index: message.index.get(),
        })
    }
}
