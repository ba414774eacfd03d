//! Frames: a 16-byte header and a payload. The decoder takes a byte stream in whatever pieces it arrives and gives whole frames.

use bytes::{Bytes, BytesMut};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::assembler::Assembler;

/// Bytes of a frame header.
pub const HEADER_LEN: usize = size_of::<Header>();

/// Header flag: the frame is a reply.
pub const FLAG_REPLY: u8 = 0b0000_0001;

/// Header flags that must be zero. A flag may change how the payload is read, so an unknown one cannot be skipped.
pub const FLAGS_RESERVED: u8 = !FLAG_REPLY;

/// The header of every frame, as it is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Bytes that follow the header: for a reply its fixed part, then options, then the body.
    pub len: U32,
    /// The operation, [`crate::Opcode`]. A reply repeats the request's.
    pub opcode: u8,
    /// [`FLAG_REPLY`]; all others are zero.
    pub flags: u8,
    /// Bytes of options.
    pub options_len: U16,
    /// Chosen by the client; the reply repeats it. Replies come in any order.
    pub request_id: U64,
}

const _: () = assert!(HEADER_LEN == 16, "the header is drawn as 16 bytes in PROTOCOL.md");

/// Which side of a connection a [`Decoder`] reads for: it decides which frames are legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Reads requests.
    Server,
    /// Reads replies.
    Client,
}

/// A whole frame. The payload is a reference-counted slice of what was received, copied only where a frame straddled pieces: a
/// frame kept for long keeps the piece it came in, so a receiver that stores payloads copies them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The operation's code; it may be one this version does not know.
    pub opcode: u8,
    /// Bytes of options.
    pub options_len: u16,
    /// The request's id.
    pub request_id: u64,
    /// Everything after the header.
    pub payload: Bytes,
}

/// Why a byte stream cannot be read as frames. Nothing after the error can be trusted: the stream is done, and so is the
/// connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A header announces more than the limit.
    #[error("frame {request_id} announces {len} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Announced payload bytes.
        len: u32,
        /// The decoder's limit.
        limit: u32,
        /// The id in the header.
        request_id: u64,
    },
    /// A reserved flag is set.
    #[error("frame {request_id} has reserved flags set ({flags:#04x})")]
    ReservedFlags {
        /// The header's flags.
        flags: u8,
        /// The id in the header.
        request_id: u64,
    },
    /// A reply where a request belongs, or the other way round.
    #[error("frame {request_id} goes in the wrong direction")]
    WrongDirection {
        /// The id in the header.
        request_id: u64,
    },
    /// The fixed part and the options do not fit the announced length.
    #[error("frame {request_id} announces {len} bytes, too few for its {needed} bytes of fixed part and options")]
    Overrun {
        /// Announced payload bytes.
        len: u32,
        /// Bytes the header says are there at least.
        needed: u32,
        /// The id in the header.
        request_id: u64,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, after {received} of its bytes")]
    Truncated {
        /// Bytes of the unfinished frame that arrived, header included.
        received: usize,
    },
}

impl FrameError {
    /// The id of the frame at fault, where its header was read; a reply can then name it.
    pub const fn request_id(&self) -> Option<u64> {
        match *self {
            Self::TooLarge { request_id, .. }
            | Self::ReservedFlags { request_id, .. }
            | Self::WrongDirection { request_id }
            | Self::Overrun { request_id, .. } => Some(request_id),
            Self::Truncated { .. } => None,
        }
    }

    /// The status a reply to the frame carries.
    pub const fn status(&self) -> crate::Status {
        match self {
            Self::TooLarge { .. } => crate::Status::FrameTooLarge,
            _ => crate::Status::Malformed,
        }
    }
}

/// Turns a byte stream into frames.
///
/// Feed pieces as they arrive and drain all frames after each: a frame inside one piece is a slice of it, without a copy. A
/// header is checked as soon as its 16 bytes are there, before any of its payload is kept. Work and memory are linear in what
/// arrives, however it is cut. After an error the decoder stays in error and keeps nothing.
///
/// ```
/// use bytes::{Bytes, BytesMut};
/// use generation_proto::{Decoder, Limits, Operation, Request, RequestOptions, Side};
///
/// let mut wire = BytesMut::new();
/// let get = Request { id: 7, options: RequestOptions::default(), operation: Operation::Get { key: b"k" } };
/// get.encode(&mut wire);
/// let wire = wire.freeze();
///
/// let mut decoder = Decoder::new(Side::Server, Limits::default().max_frame_len());
/// decoder.feed(wire.slice(..5)); // any boundary will do
/// assert_eq!(decoder.next_frame(), Ok(None));
/// decoder.feed(wire.slice(5..));
/// let frame = decoder.next_frame().unwrap().unwrap();
/// assert_eq!(Request::decode(&frame, &Limits::default()).unwrap(), get);
/// ```
#[derive(Debug)]
pub struct Decoder {
    side: Side,
    limit: u32,
    assembler: Assembler,
    failed: Option<FrameError>,
}

impl Decoder {
    /// A decoder for one direction of one stream, refusing frames of more than `limit` payload bytes
    /// ([`crate::Limits::max_frame_len`]).
    pub fn new(side: Side, limit: usize) -> Self {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        Self {
            side,
            limit,
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

    /// The next whole frame, or `None` when more bytes are needed.
    #[inline]
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let (side, limit) = (self.side, self.limit);
        match self.assembler.next(|header| check(side, limit, header)) {
            Ok(found) => Ok(found.map(|(header, payload)| frame(&header, payload))),
            Err(error) => {
                self.failed = Some(error);
                self.assembler.clear();
                Err(error)
            }
        }
    }

    /// Says whether the stream may end here: it may between frames only.
    pub fn finish(&self) -> Result<(), FrameError> {
        match (self.failed, self.buffered_len()) {
            (Some(error), _) => Err(error),
            (None, 0) => Ok(()),
            (None, received) => Err(FrameError::Truncated { received }),
        }
    }

    /// Bytes held for frames not yet given out.
    pub fn buffered_len(&self) -> usize {
        self.assembler.buffered_len()
    }
}

/// How many bytes of payload follow a header that is legal on a stream read by `side`.
#[inline]
fn check(side: Side, limit: u32, header: &Header) -> Result<u32, FrameError> {
    let request_id = header.request_id.get();
    let len = header.len.get();
    if header.flags & FLAGS_RESERVED != 0 {
        return Err(FrameError::ReservedFlags {
            flags: header.flags,
            request_id,
        });
    }
    let is_reply = header.flags & FLAG_REPLY != 0;
    if is_reply != (side == Side::Client) {
        return Err(FrameError::WrongDirection { request_id });
    }
    if len > limit {
        return Err(FrameError::TooLarge { len, limit, request_id });
    }
    let fixed = if is_reply { crate::reply::META_LEN as u32 } else { 0 };
    let needed = fixed + u32::from(header.options_len.get());
    if needed > len {
        return Err(FrameError::Overrun {
            len,
            needed,
            request_id,
        });
    }
    Ok(len)
}

#[inline]
fn frame(header: &Header, payload: Bytes) -> Frame {
    Frame {
        opcode: header.opcode,
        options_len: header.options_len.get(),
        request_id: header.request_id.get(),
        payload,
    }
}

/// The header of a frame whose length is known or will be set by [`end_frame`].
#[inline]
pub(crate) fn header(opcode: u8, flags: u8, request_id: u64, options_len: usize, payload_len: usize) -> Header {
    Header {
        len: U32::new(u32::try_from(payload_len).expect("invariant: payload below 4 GiB by limits")),
        opcode,
        flags,
        options_len: U16::new(
            u16::try_from(options_len).expect("invariant: options below 64 KiB by their 8-bit lengths"),
        ),
        request_id: U64::new(request_id),
    }
}

/// Closes the frame begun at `start`: everything after its header is payload.
///
/// # Panics
/// When the payload or the options are longer than the header can say, which the callers' own limits exclude.
pub(crate) fn end_frame(out: &mut BytesMut, start: usize, options_len: usize) {
    let len = u32::try_from(out.len() - start - HEADER_LEN).expect("invariant: payload below 4 GiB by limits");
    let options_len = u16::try_from(options_len).expect("invariant: options below 64 KiB by their 8-bit lengths");
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 6..start + 8].copy_from_slice(&options_len.to_le_bytes());
}
