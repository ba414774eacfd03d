//! A frame: what one group commit writes. The format is drawn at the head of [`crate::journal`].

use super::BLOCK_BYTES;
use super::record::{Record, RecordFault};
use crate::codec::{Reader, put_at, u32_at, u64_at};
use crate::mutants::{Mutant, active};

const MAGIC: &[u8; 4] = b"GNJF";
const VERSION: u8 = 1;
const HEADER_CHECKSUM_AT: usize = 8;

/// The length of a frame's header, in bytes. Records follow it at once.
pub const FRAME_HEADER_BYTES: usize = 64;

/// What ties a frame to its place in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) generation: u64,
    pub(super) nonce: u64,
    pub(super) sequence: u64,
    pub(super) durable_up_to: u64,
    /// Offset in the segment, in blocks.
    pub(super) block: u32,
}

/// The buffer has no room for another record: seal the frame and begin another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's buffer has no room for {needed} more bytes")]
pub struct FrameFull {
    /// The bytes the record takes.
    pub needed: usize,
}

/// Builds a frame in a buffer of the caller's, such as one that is aligned for `O_DIRECT`.
#[derive(Debug)]
pub struct FrameBuilder<'b> {
    buffer: &'b mut [u8],
    end: usize,
    records: u32,
    checkpoint: bool,
}

impl<'b> FrameBuilder<'b> {
    /// Begins a frame without records at the front of `buffer`.
    ///
    /// # Panics
    /// If `buffer` is shorter than a block.
    pub fn new(buffer: &'b mut [u8]) -> Self {
        assert!(buffer.len() >= BLOCK_BYTES, "a frame takes a block at least");
        let whole = buffer.len() - buffer.len() % BLOCK_BYTES;
        Self {
            buffer: &mut buffer[..whole],
            end: FRAME_HEADER_BYTES,
            records: 0,
            checkpoint: false,
        }
    }

    /// The same for the first frame of a segment.
    pub(super) fn checkpoint(buffer: &'b mut [u8]) -> Self {
        Self {
            checkpoint: true,
            ..Self::new(buffer)
        }
    }

    /// Appends a record.
    pub fn push(&mut self, record: &Record<'_>) -> Result<(), FrameFull> {
        let needed = record.len_bytes();
        let Some(room) = self.buffer[self.end..].get_mut(..needed) else {
            return Err(FrameFull { needed });
        };
        record.encode(room);
        self.end += needed;
        self.records += 1;
        Ok(())
    }

    /// How many records it holds.
    pub fn records(&self) -> usize {
        self.records as usize
    }

    /// The bytes the frame will take, padding included.
    pub fn len_bytes(&self) -> usize {
        self.end.next_multiple_of(BLOCK_BYTES)
    }

    /// The bytes left for records.
    pub fn room(&self) -> usize {
        self.buffer.len() - self.end
    }

    /// Writes padding, header and checksums; the frame is then the first [`FrameBuilder::len_bytes`] of the buffer, and is
    /// returned as bytes and as what they would be read as.
    pub(super) fn seal(self, stamp: &Stamp) -> (&'b [u8], Frame<'b>) {
        let len = self.len_bytes();
        let frame = &mut self.buffer[..len];
        frame[self.end..].fill(0);
        frame[..FRAME_HEADER_BYTES].fill(0);
        frame[..4].copy_from_slice(MAGIC);
        frame[4] = VERSION;
        frame[5] = u8::from(self.checkpoint);
        let body = crc32c::crc32c(&frame[FRAME_HEADER_BYTES..]);
        put_at(frame, 12, body.to_le_bytes());
        put_at(frame, 16, (len as u32).to_le_bytes());
        put_at(frame, 20, self.records.to_le_bytes());
        put_at(frame, 24, stamp.generation.to_le_bytes());
        put_at(frame, 32, stamp.nonce.to_le_bytes());
        put_at(frame, 40, stamp.sequence.to_le_bytes());
        put_at(frame, 48, stamp.durable_up_to.to_le_bytes());
        put_at(frame, 56, stamp.block.to_le_bytes());
        put_at(frame, 60, (self.end as u32).to_le_bytes());
        let header = crc32c::crc32c(&frame[..FRAME_HEADER_BYTES]);
        put_at(frame, HEADER_CHECKSUM_AT, header.to_le_bytes());
        let bytes: &'b [u8] = frame;
        let frame = Frame {
            stamp: *stamp,
            checkpoint: self.checkpoint,
            records: self.records,
            body: &bytes[FRAME_HEADER_BYTES..self.end],
            len,
        };
        (bytes, frame)
    }
}

/// Why there is no frame where one was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// Zeros: never written in this generation, or lost.
    #[error("blank block")]
    Blank,
    /// A header with flipped bits, torn, or something else altogether.
    #[error("frame header with a wrong checksum")]
    Header,
    /// The header is right and what it heads is not: torn, or flipped bits.
    #[error("frame with a wrong checksum")]
    Body,
    /// A whole frame of an earlier use of the file, or one written to the wrong place.
    #[error("frame of another generation or place")]
    Foreign,
    /// A whole frame of this segment, but not the one that comes next.
    #[error("frame of sequence {found}")]
    Sequence {
        /// Its sequence.
        found: u64,
    },
    /// The segment or the journal ends here.
    #[error("end of the segment")]
    End,
}

/// A frame whose checksums are right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    stamp: Stamp,
    checkpoint: bool,
    records: u32,
    /// Records alone, without header and padding.
    body: &'a [u8],
    len: usize,
}

/// A frame that is not whole. If its header is, that says what would have stood here and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) fault: FrameFault,
    pub(super) header: Option<(Stamp, usize)>,
}

impl<'a> Frame<'a> {
    /// Reads the frame at the front of `bytes`, for a read of a single frame by its [`super::Placement`]. The caller compares
    /// [`Frame::sequence`] with the one it expects.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameFault> {
        Self::read(bytes).map_err(|broken| broken.fault)
    }

    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Broken> {
        let broken = |fault| Broken { fault, header: None };
        let Some(header) = bytes.get(..FRAME_HEADER_BYTES) else {
            return Err(broken(FrameFault::End));
        };
        if header.iter().all(|byte| *byte == 0) {
            return Err(broken(FrameFault::Blank));
        }
        let checksum = crc32c::crc32c(&header[..HEADER_CHECKSUM_AT]);
        let checksum = crc32c::crc32c_append(checksum, &[0; 4]);
        let checksum = crc32c::crc32c_append(checksum, &header[HEADER_CHECKSUM_AT + 4..]);
        let (len, end) = (u32_at(header, 16) as usize, u32_at(header, 60) as usize);
        let sound = checksum == u32_at(header, HEADER_CHECKSUM_AT)
            && header[..4] == *MAGIC
            && header[4] == VERSION
            && header[5] <= 1
            && header[6..8] == [0; 2]
            && len.is_multiple_of(BLOCK_BYTES)
            && (FRAME_HEADER_BYTES..=len).contains(&end)
            && [24, 40].iter().all(|at| is_counter(u64_at(header, *at)));
        if !sound {
            return Err(broken(FrameFault::Header));
        }
        let stamp = Stamp {
            generation: u64_at(header, 24),
            nonce: u64_at(header, 32),
            sequence: u64_at(header, 40),
            durable_up_to: u64_at(header, 48),
            block: u32_at(header, 56),
        };
        let broken = Broken {
            fault: FrameFault::Body,
            header: Some((stamp, len)),
        };
        let frame = bytes.get(..len).ok_or(broken)?;
        if crc32c::crc32c(&frame[FRAME_HEADER_BYTES..]) != u32_at(header, 12) && !active(Mutant::ChecksumIgnored) {
            return Err(broken);
        }
        Ok(Self {
            stamp,
            checkpoint: header[5] == 1,
            records: u32_at(header, 20),
            body: &frame[FRAME_HEADER_BYTES..end],
            len,
        })
    }

    /// Its sequence.
    pub fn sequence(&self) -> u64 {
        self.stamp.sequence
    }

    /// Every frame up to this sequence was durable when this one was built.
    pub fn durable_up_to(&self) -> u64 {
        self.stamp.durable_up_to
    }

    /// Generation of the segment it was written to.
    pub fn generation(&self) -> u64 {
        self.stamp.generation
    }

    /// Whether it is the first of its segment, with the state of every shard.
    pub fn is_checkpoint(&self) -> bool {
        self.checkpoint
    }

    /// Its length with padding, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Its records in order.
    pub fn records(&self) -> Records<'a> {
        Records {
            reader: Reader::new(self.body),
            left: self.records,
        }
    }

    pub(super) fn stamp(&self) -> &Stamp {
        &self.stamp
    }
}

/// Generations and sequences start at 1 and never come near their end; what a frame claims beyond is not one of ours.
pub(super) fn is_counter(value: u64) -> bool {
    (1..1 << 63).contains(&value)
}

/// Iterates over the records of a [`Frame`]. After an error it ends.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    reader: Reader<'a>,
    left: u32,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 && self.reader.remaining() == 0 {
            return None;
        }
        let record = match self.left {
            0 => Err(RecordFault::Length),
            _ => Record::decode(&mut self.reader),
        };
        self.left = self.left.saturating_sub(1);
        if record.is_err() {
            *self = Self {
                reader: Reader::new(&[]),
                left: 0,
            };
        }
        Some(record)
    }
}
