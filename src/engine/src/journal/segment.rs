//! The first block of a segment file. The format is drawn at the head of [`crate::journal`].

use super::BLOCK_BYTES;
use super::frame::is_counter;
use crate::codec::{put_at, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"GNJSEGMT";
const VERSION: u8 = 1;
const CHECKSUM_AT: usize = 12;
const FIELDS_END: usize = 80;

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The journal it belongs to.
    pub journal: u128,
    /// Which use of which file this is: grows by one with every segment opened, from 1.
    pub generation: u64,
    /// Drawn at random for this generation.
    pub nonce: u64,
    /// Sequence of its first frame.
    pub first_sequence: u64,
    /// Every frame up to this sequence was durable when the segment was opened.
    pub durable_up_to: u64,
    /// Its length, header included, in blocks of [`BLOCK_BYTES`].
    pub blocks: u32,
    /// Segments of lower generations hold nothing that counts.
    pub live_from: u64,
}

/// Why a block is no segment header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentFault {
    /// All zeros: preallocated and never used, or lost.
    #[error("segment header is blank")]
    Blank,
    /// Something else, or a header with flipped bits, or one torn while it was written.
    #[error("segment header has a wrong checksum")]
    Checksum,
    /// Written by a newer release. Nothing can be said about the file.
    #[error("segment of format version {0}, this release reads {VERSION}")]
    UnsupportedVersion(u8),
    /// Shorter than a block.
    #[error("segment is shorter than its header")]
    Short,
}

impl SegmentHeader {
    /// Writes the header to the first block of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than a block.
    pub fn encode(&self, out: &mut [u8]) {
        let out = &mut out[..BLOCK_BYTES];
        out.fill(0);
        out[..8].copy_from_slice(MAGIC);
        out[8] = VERSION;
        put_at(out, 16, self.journal.to_le_bytes());
        put_at(out, 32, self.generation.to_le_bytes());
        put_at(out, 40, self.nonce.to_le_bytes());
        put_at(out, 48, self.first_sequence.to_le_bytes());
        put_at(out, 56, self.durable_up_to.to_le_bytes());
        put_at(out, 64, self.blocks.to_le_bytes());
        put_at(out, 72, self.live_from.to_le_bytes());
        let checksum = crc32c::crc32c(out);
        put_at(out, CHECKSUM_AT, checksum.to_le_bytes());
    }

    /// Reads the header at the front of a segment's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentFault> {
        let block = bytes.get(..BLOCK_BYTES).ok_or(SegmentFault::Short)?;
        if block.iter().all(|byte| *byte == 0) {
            return Err(SegmentFault::Blank);
        }
        let checksum = crc32c::crc32c(&block[..CHECKSUM_AT]);
        let checksum = crc32c::crc32c_append(checksum, &[0; 4]);
        let checksum = crc32c::crc32c_append(checksum, &block[CHECKSUM_AT + 4..]);
        if checksum != u32_at(block, CHECKSUM_AT) || block[..8] != *MAGIC {
            return Err(SegmentFault::Checksum);
        }
        // The checksum is right, so this is what was written.
        let canonical =
            block[9..12] == [0; 3] && block[68..72] == [0; 4] && block[FIELDS_END..].iter().all(|byte| *byte == 0);
        if block[8] != VERSION || !canonical {
            return Err(SegmentFault::UnsupportedVersion(block[8]));
        }
        if !is_counter(u64_at(block, 32)) || !is_counter(u64_at(block, 48)) {
            return Err(SegmentFault::Checksum);
        }
        let journal = u128::from(u64_at(block, 16)) | u128::from(u64_at(block, 24)) << 64;
        Ok(Self {
            journal,
            generation: u64_at(block, 32),
            nonce: u64_at(block, 40),
            first_sequence: u64_at(block, 48),
            durable_up_to: u64_at(block, 56),
            blocks: u32_at(block, 64),
            live_from: u64_at(block, 72),
        })
    }
}
