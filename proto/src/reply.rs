//! Replies: a fixed part that every reply has, options, and a body by operation.

use bytes::BytesMut;
use zerocopy::byteorder::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::{self, FLAG_REPLY, Frame};
use crate::options::ReplyOptions;
use crate::request::Opcode;
use crate::status::Status;
use crate::wire::{take, take_bytes};

/// Bytes of a reply's fixed part.
pub const META_LEN: usize = size_of::<MetaWire>();

/// The fixed part as it is on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MetaWire {
    version: U64,
    index: U64,
    server_time_ms: U64,
    map_epoch: U32,
    shard: U16,
    status: u8,
    consistency: u8,
}

const _: () = assert!(META_LEN == 32, "the fixed part is drawn as 32 bytes in PROTOCOL.md");

/// Header and fixed part together: one copy into the buffer.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ReplyHead {
    header: frame::Header,
    meta: MetaWire,
}

/// What every reply says beside its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplyMeta {
    /// Version of the entry: log index (48 bits) << 16 | position in the log entry. 0: absent, or no entry is concerned.
    pub version: u64,
    /// Log index of the shard that the reply reflects; with shard and epoch it is a session token. 0 where no shard answered.
    pub index: u64,
    /// The node's wall clock, in milliseconds since the Unix epoch.
    pub server_time_ms: u64,
    /// Epoch of the node's map. A client with an older one asks for the map.
    pub map_epoch: u32,
    /// The shard that answered.
    pub shard: u16,
    /// Code of the [`Status`]; a later minor version may send one that this one does not know
    /// ([`Status::class_of_code`]).
    pub status: u8,
    /// Code of the consistency achieved ([`crate::Consistency::code`]).
    pub consistency: u8,
}

impl ReplyMeta {
    /// The status, if this version knows it.
    pub const fn status(&self) -> Option<Status> {
        Status::from_code(self.status)
    }

    fn wire(&self) -> MetaWire {
        MetaWire {
            version: U64::new(self.version),
            index: U64::new(self.index),
            server_time_ms: U64::new(self.server_time_ms),
            map_epoch: U32::new(self.map_epoch),
            shard: U16::new(self.shard),
            status: self.status,
            consistency: self.consistency,
        }
    }
}

/// A reply, borrowed from its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The request's id.
    pub id: u64,
    /// Code of the operation.
    pub opcode: u8,
    /// The fixed part.
    pub meta: ReplyMeta,
    /// Options.
    pub options: ReplyOptions<'a>,
    /// The body; what it holds depends on operation and status.
    pub body: &'a [u8],
}

/// Why a reply, or its body, cannot be read: the node is at fault, and the connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node sent a reply whose {0} cannot be read")]
pub struct ReplyError(pub &'static str);

impl<'a> Reply<'a> {
    /// Reads the reply in `frame`.
    pub fn decode(frame: &'a Frame) -> Result<Self, ReplyError> {
        let mut rest = &frame.payload[..];
        let meta: &MetaWire = take(&mut rest).ok_or(ReplyError("fixed part"))?;
        let options = take_bytes(&mut rest, usize::from(frame.options_len)).ok_or(ReplyError("options"))?;
        Ok(Self {
            id: frame.request_id,
            opcode: frame.opcode,
            meta: ReplyMeta {
                version: meta.version.get(),
                index: meta.index.get(),
                server_time_ms: meta.server_time_ms.get(),
                map_epoch: meta.map_epoch.get(),
                shard: meta.shard.get(),
                status: meta.status,
                consistency: meta.consistency,
            },
            options: ReplyOptions::decode(options).ok_or(ReplyError("options"))?,
            body: rest,
        })
    }

    /// Appends the reply as one frame: one copy of the body, from where it lies to `out`.
    ///
    /// # Panics
    /// When the whole is longer than a frame can be (4 GiB).
    pub fn encode(&self, out: &mut BytesMut) {
        let options_len = self.options.encoded_len();
        let payload_len = META_LEN + options_len + self.body.len();
        let head = ReplyHead {
            header: frame::header(self.opcode, FLAG_REPLY, self.id, options_len, payload_len),
            meta: self.meta.wire(),
        };
        out.reserve(frame::HEADER_LEN + payload_len);
        out.extend_from_slice(head.as_bytes());
        if options_len > 0 {
            self.options.encode(out);
        }
        out.extend_from_slice(self.body);
    }

    /// Body of a successful `Incr`: the number it is now.
    pub fn counter(&self) -> Result<i64, ReplyError> {
        I64::read_from_bytes(self.body)
            .map(I64::get)
            .map_err(|_| ReplyError("counter"))
    }
}

/// Replies without options that differ in little: what they have in common is encoded once.
#[derive(Debug, Clone)]
pub struct ReplyTemplate {
    head: ReplyHead,
}

impl ReplyTemplate {
    /// For replies that say this, but for version and status.
    pub fn new(meta: &ReplyMeta) -> Self {
        let header = frame::header(0, FLAG_REPLY, 0, 0, META_LEN);
        Self {
            head: ReplyHead {
                header,
                meta: meta.wire(),
            },
        }
    }

    /// Appends one of them, as [`Reply::encode`] would.
    ///
    /// # Panics
    /// When the whole is longer than a frame can be (4 GiB).
    #[inline]
    pub fn append(&mut self, out: &mut BytesMut, id: u64, opcode: u8, status: u8, version: u64, body: &[u8]) {
        let len = u32::try_from(META_LEN + body.len()).expect("invariant: payload below 4 GiB by limits");
        self.head.header.len.set(len);
        self.head.header.opcode = opcode;
        self.head.header.request_id.set(id);
        self.head.meta.status = status;
        self.head.meta.version.set(version);
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(body);
    }
}

/// A reply whose body is appended piece by piece: begin, append to the same buffer, end.
#[must_use = "a frame that is begun must be ended"]
#[derive(Debug)]
pub struct ReplyWriter {
    start: usize,
    options_len: usize,
}

impl ReplyWriter {
    /// Appends header, fixed part and options.
    pub fn begin(out: &mut BytesMut, opcode: u8, id: u64, meta: &ReplyMeta, options: &ReplyOptions<'_>) -> Self {
        let start = out.len();
        let options_len = options.encoded_len();
        let head = ReplyHead {
            header: frame::header(opcode, FLAG_REPLY, id, options_len, 0),
            meta: meta.wire(),
        };
        out.extend_from_slice(head.as_bytes());
        options.encode(out);
        Self { start, options_len }
    }

    /// Bytes of the frame so far, header included.
    pub fn len(&self, out: &BytesMut) -> usize {
        out.len() - self.start
    }

    /// Closes the frame.
    ///
    /// # Panics
    /// When it is longer than a frame can be (4 GiB).
    pub fn end(self, out: &mut BytesMut) {
        frame::end_frame(out, self.start, self.options_len);
    }

    /// Drops what was begun, as if it had never been.
    pub fn abandon(self, out: &mut BytesMut) {
        out.truncate(self.start);
    }
}

/// Body of the reply to `Hello`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HelloReply<'a> {
    /// The node's major version.
    pub major: u16,
    /// The node's minor version.
    pub minor: u16,
    /// The node's id.
    pub node: u64,
    /// The core this connection is on.
    pub core: u16,
    /// How many cores the node has.
    pub cores: u16,
    /// Longest key accepted, in bytes.
    pub max_key_len: u32,
    /// Longest value accepted, in bytes.
    pub max_value_len: u32,
    /// Longest frame payload accepted, in bytes.
    pub max_frame_len: u32,
    /// Name of the cluster.
    pub cluster: &'a str,
    /// The server software and its version.
    pub server: &'a str,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HelloReplyHead {
    node: U64,
    major: U16,
    minor: U16,
    core: U16,
    cores: U16,
    max_key_len: U32,
    max_value_len: U32,
    max_frame_len: U32,
    cluster_len: U16,
    server_len: U16,
}

impl<'a> HelloReply<'a> {
    /// Appends the body.
    ///
    /// # Panics
    /// When a name is longer than 64 KiB.
    pub fn encode(&self, out: &mut BytesMut) {
        let head = HelloReplyHead {
            node: U64::new(self.node),
            major: U16::new(self.major),
            minor: U16::new(self.minor),
            core: U16::new(self.core),
            cores: U16::new(self.cores),
            max_key_len: U32::new(self.max_key_len),
            max_value_len: U32::new(self.max_value_len),
            max_frame_len: U32::new(self.max_frame_len),
            cluster_len: U16::new(short_len(self.cluster.as_bytes())),
            server_len: U16::new(short_len(self.server.as_bytes())),
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.cluster.as_bytes());
        out.extend_from_slice(self.server.as_bytes());
    }

    /// Reads the body. Fields that a later minor version appended are skipped.
    pub fn decode(body: &'a [u8]) -> Result<Self, ReplyError> {
        const ERROR: ReplyError = ReplyError("hello");
        let mut rest = body;
        let head: &HelloReplyHead = take(&mut rest).ok_or(ERROR)?;
        let mut text = |len: U16| {
            let bytes = take_bytes(&mut rest, usize::from(len.get())).ok_or(ERROR)?;
            std::str::from_utf8(bytes).map_err(|_| ERROR)
        };
        Ok(Self {
            major: head.major.get(),
            minor: head.minor.get(),
            node: head.node.get(),
            core: head.core.get(),
            cores: head.cores.get(),
            max_key_len: head.max_key_len.get(),
            max_value_len: head.max_value_len.get(),
            max_frame_len: head.max_frame_len.get(),
            cluster: text(head.cluster_len)?,
            server: text(head.server_len)?,
        })
    }
}

/// One result of a `MultiGet`, `MultiPut` or `MultiDelete`, in the order of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MultiResult<'a> {
    /// Code of the [`Status`] for this key.
    pub status: u8,
    /// Code of the consistency achieved.
    pub consistency: u8,
    /// The key's shard.
    pub shard: u16,
    /// Version of the entry, 0 when absent.
    pub version: u64,
    /// Log index of the shard that the result reflects.
    pub index: u64,
    /// When the entry expires, in milliseconds since the Unix epoch; 0: never.
    pub expires_at_ms: u64,
    /// The value, for a `MultiGet` that found it.
    pub value: &'a [u8],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MultiHead {
    version: U64,
    index: U64,
    expires_at_ms: U64,
    value_len: U32,
    shard: U16,
    status: u8,
    consistency: u8,
}

impl<'a> MultiResult<'a> {
    /// Bytes a result takes beside its value.
    pub const OVERHEAD: usize = size_of::<MultiHead>();

    /// Appends the result to a body.
    ///
    /// # Panics
    /// When the value is longer than 4 GiB.
    pub fn encode(&self, out: &mut BytesMut) {
        let head = MultiHead {
            version: U64::new(self.version),
            index: U64::new(self.index),
            expires_at_ms: U64::new(self.expires_at_ms),
            value_len: U32::new(u32::try_from(self.value.len()).expect("invariant: values below 4 GiB by limits")),
            shard: U16::new(self.shard),
            status: self.status,
            consistency: self.consistency,
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.value);
    }

    /// The results in a body, in order; ends after the first that cannot be read.
    pub fn decode_all(body: &'a [u8]) -> impl Iterator<Item = Result<Self, ReplyError>> + use<'a> {
        let mut rest = body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let result = Self::decode(&mut rest).ok_or(ReplyError("results"));
            if result.is_err() {
                rest = &[];
            }
            Some(result)
        })
    }

    fn decode(rest: &mut &'a [u8]) -> Option<Self> {
        let head: &MultiHead = take(rest)?;
        Some(Self {
            status: head.status,
            consistency: head.consistency,
            shard: head.shard.get(),
            version: head.version.get(),
            index: head.index.get(),
            expires_at_ms: head.expires_at_ms.get(),
            value: take_bytes(rest, head.value_len.get() as usize)?,
        })
    }
}

/// Start of the body of a page of keys or entries; the entries follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Where to go on; meaningless when `done`.
    pub next: u64,
    /// Number of entries in this page. A page may be empty and not the last: the node bounds its work too.
    pub count: u32,
    /// Whether this was the last page.
    pub done: bool,
}

/// One entry of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The value; empty in a page of keys.
    pub value: &'a [u8],
    /// Version of the entry.
    pub version: u64,
    /// When it expires, in milliseconds since the Unix epoch; 0: never.
    pub expires_at_ms: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHead {
    next: U64,
    count: U32,
    done: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EntryHead {
    version: U64,
    expires_at_ms: U64,
    value_len: U32,
    key_len: U16,
    reserved: U16,
}

impl Page {
    /// Bytes the start of a page takes.
    pub const LEN: usize = size_of::<PageHead>();

    /// The start of the page, to be written before its entries or, once they are counted, over a gap of [`Page::LEN`] bytes.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let head = PageHead {
            next: U64::new(self.next),
            count: U32::new(self.count),
            done: u8::from(self.done),
            reserved: [0; 3],
        };
        zerocopy::transmute!(head)
    }

    /// Reads a body: the start of the page, and its entries in order (ending after the first that cannot be read).
    pub fn decode(
        body: &[u8],
    ) -> Result<(Self, impl Iterator<Item = Result<PageEntry<'_>, ReplyError>> + use<'_>), ReplyError> {
        let mut rest = body;
        let head: &PageHead = take(&mut rest).ok_or(ReplyError("page"))?;
        let page = Self {
            next: head.next.get(),
            count: head.count.get(),
            done: head.done != 0,
        };
        let mut left = page.count;
        let entries = std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let entry = PageEntry::decode(&mut rest).ok_or(ReplyError("entries"));
            if entry.is_err() {
                left = 0;
            }
            Some(entry)
        });
        Ok((page, entries))
    }
}

impl<'a> PageEntry<'a> {
    /// Bytes an entry takes beside its key and value.
    pub const OVERHEAD: usize = size_of::<EntryHead>();

    /// Appends the entry to a body.
    ///
    /// # Panics
    /// When the key is longer than 64 KiB or the value than 4 GiB.
    pub fn encode(&self, out: &mut BytesMut) {
        let head = EntryHead {
            version: U64::new(self.version),
            expires_at_ms: U64::new(self.expires_at_ms),
            value_len: U32::new(u32::try_from(self.value.len()).expect("invariant: values below 4 GiB by limits")),
            key_len: U16::new(short_len(self.key)),
            reserved: U16::ZERO,
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.key);
        out.extend_from_slice(self.value);
    }

    fn decode(rest: &mut &'a [u8]) -> Option<Self> {
        let head: &EntryHead = take(rest)?;
        Some(Self {
            version: head.version.get(),
            expires_at_ms: head.expires_at_ms.get(),
            key: take_bytes(rest, usize::from(head.key_len.get()))?,
            value: take_bytes(rest, head.value_len.get() as usize)?,
        })
    }
}

/// One counter in the body of the reply to `Stats`. Names are stable, lower case, dotted, with their unit last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat<'a> {
    /// Its name, such as `shard.3.used_bytes`.
    pub name: &'a str,
    /// Its value.
    pub value: u64,
}

impl<'a> Stat<'a> {
    /// Appends the counter to a body.
    ///
    /// # Panics
    /// When the name is longer than 64 KiB.
    pub fn encode(&self, out: &mut BytesMut) {
        out.extend_from_slice(&self.value.to_le_bytes());
        out.extend_from_slice(&short_len(self.name.as_bytes()).to_le_bytes());
        out.extend_from_slice(self.name.as_bytes());
    }

    /// The counters in a body, in order; ends after the first that cannot be read.
    pub fn decode_all(body: &'a [u8]) -> impl Iterator<Item = Result<Self, ReplyError>> + use<'a> {
        let mut rest = body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let stat = Self::decode(&mut rest).ok_or(ReplyError("counters"));
            if stat.is_err() {
                rest = &[];
            }
            Some(stat)
        })
    }

    fn decode(rest: &mut &'a [u8]) -> Option<Self> {
        let value: &U64 = take(rest)?;
        let len: &U16 = take(rest)?;
        let name = std::str::from_utf8(take_bytes(rest, usize::from(len.get()))?).ok()?;
        Some(Self {
            name,
            value: value.get(),
        })
    }
}

/// A reply that carries nothing but a status and a message, for refusals.
pub fn refusal(opcode: u8, id: u64, status: Status, message: &str) -> Reply<'_> {
    Reply {
        id,
        opcode,
        meta: ReplyMeta {
            status: status.code(),
            ..ReplyMeta::default()
        },
        options: ReplyOptions::message(message),
        body: &[],
    }
}

impl Reply<'_> {
    /// The operation, if this version knows it.
    pub const fn operation(&self) -> Option<Opcode> {
        Opcode::from_code(self.opcode)
    }
}

fn short_len(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).expect("invariant: keys and names below 64 KiB by limits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_says_what_a_reply_does() {
        let mut meta = ReplyMeta {
            index: 9,
            server_time_ms: 1_700_000_000_000,
            map_epoch: 3,
            shard: 7,
            ..ReplyMeta::default()
        };
        let mut template = ReplyTemplate::new(&meta);
        let (mut one, mut other) = (BytesMut::new(), BytesMut::new());
        for (id, status, version, body) in [(1, 0, 77, &b"value"[..]), (2, 1, 0, b""), (u64::MAX, 0, 5, &[7; 900])] {
            (meta.status, meta.version) = (status, version);
            let reply = Reply {
                id,
                opcode: 3,
                meta,
                options: ReplyOptions::default(),
                body,
            };
            reply.encode(&mut one);
            template.append(&mut other, id, 3, status, version, body);
        }
        assert_eq!(one, other);
    }
}
