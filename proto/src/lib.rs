//! The wire protocol between a Generation client and a node, and between nodes ([`peer`]): frames, messages, status codes,
//! limits, the slot function and the cluster map. `PROTOCOL.md` beside this crate draws every byte; this crate is its only
//! implementation, used by both sides.
//!
//! Everything here is pure: bytes in, values out. Nothing reads a clock, opens a socket or keeps a connection's state, apart
//! from [`frame::Decoder`] and [`peer::PeerDecoder`], which hold the bytes of what is unfinished. Decoding borrows from the
//! received bytes and never panics, whatever they are; encoding appends to a buffer of the caller's.
//!
//! The engine does not know this crate and this crate does not know the engine: the node translates.

#![forbid(unsafe_code)]

mod assembler;
pub mod close_code;
pub mod cluster;
pub mod frame;
pub mod limits;
pub mod map;
pub mod options;
pub mod peer;
pub mod reply;
pub mod request;
pub mod slot;
pub mod status;
mod wire;

pub use frame::{Decoder, Frame, FrameError, Side};
pub use limits::Limits;
pub use map::{Map, SlotTable};
pub use options::{Condition, Consistency, ReplyOptions, RequestOptions, Session};
pub use peer::ALPN_PEER;
pub use reply::{Reply, ReplyMeta};
pub use request::{Hello, Opcode, Operation, Request, RequestError, Scan, ShardSession};
pub use status::{Class, Status};

/// The protocol's major version. Peers of different majors do not talk: `Hello` is answered with
/// [`Status::UnsupportedVersion`].
pub const MAJOR: u16 = 1;

/// The protocol's minor version. A higher minor only adds opcodes, options that may be ignored, and status codes.
pub const MINOR: u16 = 3;

/// The ALPN identifier clients offer (RFC 7301). It carries the major version, so a mismatch is also seen by TLS.
pub const ALPN_CLIENT: &[u8] = b"generation/1";
