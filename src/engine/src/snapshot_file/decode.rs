//! Reading a snapshot, chunk by chunk.

use super::{
    CHECKSUM_AT, CHUNK_HEADER_BYTES, ChunkKind, FOOTER_BYTES, MAGIC, MAX_CHUNK_BYTES, SnapshotHeader, VERSION,
};
use crate::codec::{Reader, u32_at, u64_at};
use crate::journal::{BLOCK_BYTES, LogId};

/// What is wrong with a chunk. The decoder is where it was before it, and takes the right one if it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkFault {
    /// The bytes end before the chunk does, or are longer than it.
    #[error("chunk is cut short, or followed by more in one piece")]
    Length,
    /// No chunk at all, or one with a length that none can have.
    #[error("not a chunk of a snapshot")]
    Magic,
    /// Written by a newer release.
    #[error("chunk of format version {0}, this release reads {VERSION}")]
    UnsupportedVersion(u8),
    /// Flipped bits, or torn.
    #[error("chunk with a wrong checksum")]
    Checksum,
    /// A kind this release does not know.
    #[error("unknown kind of chunk {0}")]
    UnknownKind(u8),
    /// A whole chunk, but of another snapshot.
    #[error("chunk of another snapshot")]
    Foreign,
    /// A whole chunk of this snapshot, but not the one that comes next.
    #[error("chunk {found} where {expected} comes next")]
    Ordinal {
        /// What comes next.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// Header and footer are not where they belong, or their payload is malformed.
    #[error("misplaced or malformed {0:?} chunk")]
    Structure(ChunkKind),
    /// The footer counts other chunks than came before it.
    #[error("the footer does not match the chunks before it")]
    Footer,
}

/// Where a snapshot that was interrupted goes on. The sender continues at `offset` of the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// The snapshot.
    pub id: u128,
    /// Ordinal of the chunk that comes next.
    pub ordinal: u64,
    /// Where it begins, in bytes.
    pub offset: u64,
}

/// What a complete snapshot came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Its id.
    pub id: u128,
    /// What it is of.
    pub header: SnapshotHeader,
    /// Number of chunks, header and footer included.
    pub chunks: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// The state hash of the image.
    pub state_hash: u128,
}

/// Why a file is no sound snapshot, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{fault} at offset {offset}")]
pub struct VerifyError {
    /// Offset of the chunk at fault, in bytes.
    pub offset: u64,
    /// What is wrong.
    pub fault: ChunkFault,
}

/// The length of the chunk whose first [`CHUNK_HEADER_BYTES`] these are: what to read before it can be decoded. It is a multiple
/// of [`BLOCK_BYTES`] and at most [`MAX_CHUNK_BYTES`], whatever the bytes are.
pub fn chunk_len(head: &[u8]) -> Result<usize, ChunkFault> {
    let head = head.get(..CHUNK_HEADER_BYTES).ok_or(ChunkFault::Length)?;
    if head[..4] != *MAGIC {
        return Err(ChunkFault::Magic);
    }
    if head[4] != VERSION {
        return Err(ChunkFault::UnsupportedVersion(head[4]));
    }
    let (payload, len) = (u32_at(head, 12) as usize, u32_at(head, 16) as usize);
    let exact = CHUNK_HEADER_BYTES
        .checked_add(payload)
        .map(|end| end.next_multiple_of(BLOCK_BYTES));
    if exact != Some(len) || len > MAX_CHUNK_BYTES {
        return Err(ChunkFault::Magic);
    }
    Ok(len)
}

/// Checks every checksum of a snapshot and that it is complete. Nothing in its payloads is looked at.
pub fn verify(bytes: &[u8]) -> Result<Summary, VerifyError> {
    let mut decoder = Decoder::new();
    let mut rest = bytes;
    loop {
        let offset = decoder.offset;
        let fail = |fault| VerifyError { offset, fault };
        let len = chunk_len(rest).map_err(fail)?;
        let (chunk, after) = rest.split_at_checked(len).ok_or(fail(ChunkFault::Length))?;
        decoder.chunk(chunk).map_err(fail)?;
        rest = after;
        match decoder.summary() {
            Some(summary) if rest.is_empty() => return Ok(summary),
            Some(_) => {
                return Err(VerifyError {
                    offset: decoder.offset,
                    fault: ChunkFault::Length,
                });
            }
            None => {}
        }
    }
}

/// Takes the chunks of one snapshot in order.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    id: u128,
    ordinal: u64,
    offset: u64,
    digest: u32,
    header: Option<SnapshotHeader>,
    state_hash: Option<u128>,
}

impl Decoder {
    /// Before the first chunk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next chunk, whole, and returns its kind and payload. After an error the decoder is as it was before.
    pub fn chunk<'a>(&mut self, chunk: &'a [u8]) -> Result<(ChunkKind, &'a [u8]), ChunkFault> {
        if chunk_len(chunk)? != chunk.len() {
            return Err(ChunkFault::Length);
        }
        let checksum = u32_at(chunk, CHECKSUM_AT);
        let computed = crc32c::crc32c(&chunk[..CHECKSUM_AT]);
        let computed = crc32c::crc32c_append(computed, &[0; 4]);
        if crc32c::crc32c_append(computed, &chunk[CHECKSUM_AT + 4..]) != checksum {
            return Err(ChunkFault::Checksum);
        }
        let kind = ChunkKind::from_code(chunk[5]).ok_or(ChunkFault::UnknownKind(chunk[5]))?;
        let id = u128::from(u64_at(chunk, 32)) | u128::from(u64_at(chunk, 40)) << 64;
        if self.header.is_some() && id != self.id {
            return Err(ChunkFault::Foreign);
        }
        let found = u64_at(chunk, 24);
        if found != self.ordinal {
            return Err(ChunkFault::Ordinal {
                expected: self.ordinal,
                found,
            });
        }
        let payload = &chunk[CHUNK_HEADER_BYTES..][..u32_at(chunk, 12) as usize];
        let structure = ChunkFault::Structure(kind);
        match kind {
            _ if self.state_hash.is_some() => return Err(structure),
            ChunkKind::Header if self.header.is_none() => {
                self.header = Some(read_header(payload).ok_or(structure)?);
                self.id = id;
            }
            ChunkKind::Header => return Err(structure),
            _ if self.header.is_none() => return Err(structure),
            ChunkKind::Footer => {
                let (counted, state_hash) = read_footer(payload).ok_or(structure)?;
                if counted != (self.ordinal + 1, self.offset, self.digest) {
                    return Err(ChunkFault::Footer);
                }
                self.state_hash = Some(state_hash);
            }
            ChunkKind::State | ChunkKind::Sessions | ChunkKind::Entries => {}
        }
        self.ordinal += 1;
        self.offset += chunk.len() as u64;
        self.digest = crc32c::crc32c_append(self.digest, &checksum.to_le_bytes());
        Ok((kind, payload))
    }

    /// What the snapshot is of, once its first chunk is there.
    pub fn header(&self) -> Option<&SnapshotHeader> {
        self.header.as_ref()
    }

    /// Where to go on; `None` before the first chunk, when any snapshot will do.
    pub fn resume(&self) -> Option<Resume> {
        let Self {
            id, ordinal, offset, ..
        } = *self;
        self.header.is_some().then_some(Resume { id, ordinal, offset })
    }

    /// What the snapshot came to, once its last chunk is there.
    pub fn summary(&self) -> Option<Summary> {
        let (header, state_hash) = (self.header.clone()?, self.state_hash?);
        let Self {
            id,
            ordinal: chunks,
            offset: bytes,
            ..
        } = *self;
        Some(Summary {
            id,
            header,
            chunks,
            bytes,
            state_hash,
        })
    }
}

fn read_header(payload: &[u8]) -> Option<SnapshotHeader> {
    let mut reader = Reader::new(payload);
    let cluster = reader.u128()?;
    let (shard, epoch) = (reader.u32()?, reader.u32()?);
    let applied = reader.u8()?;
    let last = LogId {
        term: reader.u64()?,
        leader: reader.u64()?,
        index: reader.u64()?,
    };
    let last_log_id = match applied {
        0 if last
            == (LogId {
                term: 0,
                leader: 0,
                index: 0,
            }) =>
        {
            None
        }
        1 => Some(last),
        _ => return None,
    };
    let len = reader.u32()? as usize;
    let membership = reader.take(len)?.to_vec();
    (reader.remaining() == 0).then_some(SnapshotHeader {
        cluster,
        shard,
        epoch,
        last_log_id,
        membership,
    })
}

/// What the footer counts (chunks, bytes, digest), and the state hash.
fn read_footer(payload: &[u8]) -> Option<((u64, u64, u32), u128)> {
    if payload.len() != FOOTER_BYTES {
        return None;
    }
    let mut reader = Reader::new(payload);
    Some(((reader.u64()?, reader.u64()?, reader.u32()?), reader.u128()?))
}
