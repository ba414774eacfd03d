//! The container of a snapshot: what lies on disk and what travels to a follower that lags, byte for byte the same.
//!
//! A snapshot is a sequence of **chunks**. Each is whole blocks of 4 KiB, so that it can be written through `O_DIRECT` as it is,
//! and is checked on its own: a receiver refuses a bad chunk when it arrives, and goes on where it stopped, by ordinal and offset.
//! The first chunk says what the snapshot is of, the last one what it came to.
//!
//! # Chunk, version 1
//! All numbers are little-endian. A *log id* is u64 term, u64 leader, u64 index.
//! ```text
//!    0  u8×4  magic "GNSC"
//!    4  u8    format version, 1
//!    5  u8    kind: 1 header, 2 state, 3 sessions, 4 entries, 5 footer
//!    6  u16   reserved, 0
//!    8  u32   checksum (CRC-32C) of the whole chunk, padding included, with this field as 0
//!   12  u32   length of the payload
//!   16  u32   length of the chunk with padding, a multiple of 4096
//!   20  u32   reserved, 0
//!   24  u64   ordinal, from 0
//!   32  u128  id of the snapshot: no chunk of another one is taken for one of it
//!   48  the payload, then zeros
//!
//! header payload
//!    0  u128  cluster
//!   16  u32   shard
//!   20  u32   epoch of the shard
//!   24  u8    1 if a log entry was applied, else 0
//!   25  log id of the last entry it contains (zeros if none)
//!   49  u32   length of the membership
//!   53  the membership, as replication encodes it
//!
//! footer payload
//!    0  u64   number of chunks, header and footer included
//!    8  u64   bytes before the footer
//!   16  u32   CRC-32C of the checksums of all chunks before, in order
//!   20  u128  state hash of the image
//! ```
//!
//! # What holds
//! - A snapshot that was decoded to its footer is complete: no chunk is missing, doubled or out of order.
//! - Decoding holds one chunk at a time, and its length is bounded by [`MAX_CHUNK_BYTES`] before anything is allocated for it.
//! - Bytes that are no snapshot are a typed error with the offset, and never a panic.
//!
//! Not here: what the payloads of state, sessions and entries mean ([`crate::machine::Head`], [`crate::session`],
//! [`crate::SnapshotEntry`]), files, renaming, syncing, and which of two snapshots is the newer.

mod decode;
#[cfg(test)]
mod tests;

pub use decode::{ChunkFault, Decoder, Resume, Summary, VerifyError, chunk_len, verify};

use crate::codec::put_at;
use crate::journal::{BLOCK_BYTES, LogId};

const MAGIC: &[u8; 4] = b"GNSC";
const VERSION: u8 = 1;
const CHECKSUM_AT: usize = 8;
const FOOTER_BYTES: usize = 36;

/// The bytes of a chunk before its payload.
pub const CHUNK_HEADER_BYTES: usize = 48;

/// Longest chunk, padding included. The largest entry fits one.
pub const MAX_CHUNK_BYTES: usize = 32 << 20;

const _: () = assert!(MAX_CHUNK_BYTES.is_multiple_of(BLOCK_BYTES), "chunks are whole blocks");
const _: () = assert!(
    crate::MAX_VALUE_BYTES + crate::MAX_KEY_BYTES + BLOCK_BYTES <= MAX_CHUNK_BYTES,
    "the largest entry must fit a chunk"
);

/// What is in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkKind {
    /// What the snapshot is of. The first chunk.
    Header,
    /// The shard's state beside entries and sessions: [`crate::machine::Head`].
    State,
    /// A slice of the session table.
    Sessions,
    /// Entries.
    Entries,
    /// What the snapshot came to. The last chunk.
    Footer,
}

impl ChunkKind {
    fn code(self) -> u8 {
        match self {
            ChunkKind::Header => 1,
            ChunkKind::State => 2,
            ChunkKind::Sessions => 3,
            ChunkKind::Entries => 4,
            ChunkKind::Footer => 5,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        let kinds = [Self::Header, Self::State, Self::Sessions, Self::Entries, Self::Footer];
        kinds.into_iter().find(|kind| kind.code() == code)
    }
}

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotHeader {
    /// The cluster.
    pub cluster: u128,
    /// The shard.
    pub shard: u32,
    /// The shard's epoch.
    pub epoch: u32,
    /// The last log entry it contains; `None` before the first.
    pub last_log_id: Option<LogId>,
    /// The membership in force at that entry, as replication encodes it.
    pub membership: Vec<u8>,
}

/// A chunk was not encoded: its payload does not fit [`MAX_CHUNK_BYTES`]. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a payload of {payload} bytes does not fit a chunk")]
pub struct ChunkTooLong {
    /// Its length in bytes.
    pub payload: usize,
}

/// Turns payloads into chunks.
#[derive(Debug)]
pub struct Encoder {
    id: u128,
    ordinal: u64,
    offset: u64,
    digest: u32,
}

impl Encoder {
    /// Begins a snapshot: appends its header chunk to `out`. `id` is drawn at random.
    pub fn begin(id: u128, header: &SnapshotHeader, out: &mut Vec<u8>) -> Result<Self, ChunkTooLong> {
        let mut encoder = Self {
            id,
            ordinal: 0,
            offset: 0,
            digest: 0,
        };
        encoder.chunk(ChunkKind::Header, out, |payload| {
            payload.extend(header.cluster.to_le_bytes());
            payload.extend(header.shard.to_le_bytes());
            payload.extend(header.epoch.to_le_bytes());
            payload.push(u8::from(header.last_log_id.is_some()));
            let last = header.last_log_id.unwrap_or(LogId {
                term: 0,
                leader: 0,
                index: 0,
            });
            for field in [last.term, last.leader, last.index] {
                payload.extend(field.to_le_bytes());
            }
            payload.extend((header.membership.len() as u32).to_le_bytes());
            payload.extend_from_slice(&header.membership);
        })?;
        Ok(encoder)
    }

    /// Appends a chunk to `out`. `write` appends its payload, and must touch nothing that is there already.
    ///
    /// # Panics
    /// If `write` shortens the buffer.
    pub fn chunk(
        &mut self,
        kind: ChunkKind,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), ChunkTooLong> {
        let start = out.len();
        out.resize(start + CHUNK_HEADER_BYTES, 0);
        write(out);
        let payload = out.len().checked_sub(start + CHUNK_HEADER_BYTES);
        let payload = payload.expect("a payload was written over the chunk's header");
        let len = (CHUNK_HEADER_BYTES + payload).next_multiple_of(BLOCK_BYTES);
        if len > MAX_CHUNK_BYTES {
            out.truncate(start);
            return Err(ChunkTooLong { payload });
        }
        out.resize(start + len, 0);
        let chunk = &mut out[start..];
        chunk[..4].copy_from_slice(MAGIC);
        chunk[4] = VERSION;
        chunk[5] = kind.code();
        put_at(chunk, 12, (payload as u32).to_le_bytes());
        put_at(chunk, 16, (len as u32).to_le_bytes());
        put_at(chunk, 24, self.ordinal.to_le_bytes());
        put_at(chunk, 32, self.id.to_le_bytes());
        let checksum = crc32c::crc32c(chunk);
        put_at(chunk, CHECKSUM_AT, checksum.to_le_bytes());
        self.ordinal += 1;
        self.offset += len as u64;
        self.digest = crc32c::crc32c_append(self.digest, &checksum.to_le_bytes());
        Ok(())
    }

    /// Ends the snapshot: appends its footer chunk to `out`.
    ///
    /// # Panics
    /// Never: a footer fits a chunk.
    pub fn finish(mut self, state_hash: u128, out: &mut Vec<u8>) {
        let (chunks, bytes, digest) = (self.ordinal + 1, self.offset, self.digest);
        let footer = self.chunk(ChunkKind::Footer, out, |payload| {
            payload.extend(chunks.to_le_bytes());
            payload.extend(bytes.to_le_bytes());
            payload.extend(digest.to_le_bytes());
            payload.extend(state_hash.to_le_bytes());
        });
        footer.expect("invariant: a footer fits a chunk");
    }
}
