//! Where the next frame goes, what is durable, and when a new segment begins.

use std::collections::VecDeque;

use super::frame::{FrameBuilder, Stamp};
use super::index::{Index, IndexError};
use super::record::{Record, ShardState};
use super::segment::SegmentHeader;
use super::{BLOCK_BYTES, FRAME_HEADER_BYTES, Placement};
use crate::mutants::{Mutant, active};

/// A frame that is ready to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed<'b> {
    /// Where to.
    pub placement: Placement,
    /// What.
    pub bytes: &'b [u8],
}

/// A segment that is ready to be begun: header and checkpoint, one write to offset 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened<'b> {
    /// The checkpoint frame, which lies at [`BLOCK_BYTES`]. Report its sequence to [`Writer::completed`] once all of `bytes` is
    /// durable.
    pub placement: Placement,
    /// Header block and checkpoint.
    pub bytes: &'b [u8],
}

/// Why a frame was not sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The segment has no room for it, or none is open: open one and build the frame again. Nothing was changed.
    #[error("the segment has no room for a frame of {needed} bytes")]
    SegmentFull {
        /// The frame's length in bytes.
        needed: u64,
    },
    /// The records do not fit what came before, which is a mistake of the caller. The writer must not be used any more.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// The writing end of a journal. It does no I/O: it says what to write where, and is told what has become durable.
#[derive(Debug)]
pub struct Writer {
    journal: u128,
    segment_blocks: u32,
    generation: u64,
    nonce: u64,
    /// Where the next frame goes; `None` while no segment is open.
    block: Option<u32>,
    next_sequence: u64,
    /// Whether each sequence above `durable_up_to` is durable.
    in_flight: VecDeque<bool>,
    durable_up_to: u64,
    index: Index,
    /// Of segments whose checkpoints are in flight: its sequence, and `live_from` of their headers.
    says_dead: VecDeque<(u64, u64)>,
    /// The highest `live_from` of a durable header.
    live_from: u64,
}

impl Writer {
    /// A new, empty journal of segments of `segment_bytes`. It begins with [`Writer::open_segment`].
    ///
    /// # Panics
    /// As [`Writer::resume`].
    pub fn new(journal: u128, segment_bytes: u64) -> Self {
        Self::resume(journal, segment_bytes, Index::new(), 1, 1)
    }

    /// Goes on after recovery, with what [`super::Recovered`] says; the recovered files have been synced since. It begins with
    /// [`Writer::open_segment`].
    ///
    /// # Panics
    /// If `segment_bytes` is not a multiple of [`BLOCK_BYTES`], holds under 3 blocks, or is 4 GiB or more.
    pub fn resume(journal: u128, segment_bytes: u64, index: Index, next_sequence: u64, next_generation: u64) -> Self {
        assert!(
            segment_bytes.is_multiple_of(BLOCK_BYTES as u64),
            "segments are whole blocks"
        );
        assert!(u32::try_from(segment_bytes).is_ok(), "offsets in a segment are 32-bit");
        let segment_blocks = (segment_bytes / BLOCK_BYTES as u64) as u32;
        assert!(
            segment_blocks >= 3,
            "a segment holds a header, a checkpoint and a frame"
        );
        Self {
            journal,
            segment_blocks,
            generation: next_generation - 1,
            nonce: 0,
            block: None,
            next_sequence,
            in_flight: VecDeque::new(),
            durable_up_to: next_sequence - 1,
            index,
            says_dead: VecDeque::new(),
            live_from: 0,
        }
    }

    /// What is live.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The generation of the open segment, or of the last one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Everything up to this sequence is durable: it may be acknowledged.
    pub fn durable_up_to(&self) -> u64 {
        self.durable_up_to
    }

    /// How many frames are sealed and not yet durable.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The bytes left in the open segment.
    pub fn room(&self) -> u64 {
        let blocks = self.block.map_or(0, |block| self.segment_blocks - block);
        u64::from(blocks) * BLOCK_BYTES as u64
    }

    /// The bytes [`Writer::open_segment`] needs in its buffer.
    pub fn opening_bytes(&self) -> usize {
        let states = self.index.shards().map(|state| Record::State(*state).len_bytes());
        BLOCK_BYTES + (FRAME_HEADER_BYTES + states.sum::<usize>()).next_multiple_of(BLOCK_BYTES)
    }

    /// Leaves the open segment and begins another, in a file that is new or was [`Writer::recyclable`]. `nonce` is random.
    /// `buffer` holds [`Writer::opening_bytes`].
    ///
    /// # Errors
    /// [`SealError::SegmentFull`] if the states of all shards do not fit a segment; nothing was changed then.
    ///
    /// # Panics
    /// If `buffer` is too short.
    pub fn open_segment<'b>(&mut self, nonce: u64, buffer: &'b mut [u8]) -> Result<Opened<'b>, SealError> {
        let len = self.opening_bytes();
        if len > self.segment_blocks as usize * BLOCK_BYTES {
            return Err(SealError::SegmentFull { needed: len as u64 });
        }
        let buffer = &mut buffer[..len];
        let (head, rest) = buffer.split_at_mut(BLOCK_BYTES);
        let alive = self.index.segments().nth(self.index.dead(self.durable_up_to).count());
        self.generation += 1;
        self.nonce = nonce;
        self.block = Some(1);
        let header = SegmentHeader {
            journal: self.journal,
            generation: self.generation,
            nonce,
            first_sequence: self.next_sequence,
            durable_up_to: self.durable_up_to,
            blocks: self.segment_blocks,
            live_from: alive.unwrap_or(self.generation),
        };
        header.encode(head);
        let mut checkpoint = FrameBuilder::checkpoint(rest);
        let states: Vec<ShardState> = self.index.shards().copied().collect();
        for state in states {
            let pushed = checkpoint.push(&Record::State(state));
            pushed.expect("invariant: the buffer has the length that opening_bytes counted");
        }
        let placement = self.seal(checkpoint)?.placement;
        self.says_dead.push_back((placement.sequence, header.live_from));
        Ok(Opened {
            placement,
            bytes: buffer,
        })
    }

    /// Gives a frame its place and its sequence, and takes its records into the index.
    pub fn seal<'b>(&mut self, frame: FrameBuilder<'b>) -> Result<Sealed<'b>, SealError> {
        let needed = frame.len_bytes() as u64;
        let Some(block) = self.block.filter(|_| needed <= self.room()) else {
            return Err(SealError::SegmentFull { needed });
        };
        let stamp = Stamp {
            generation: self.generation,
            nonce: self.nonce,
            sequence: self.next_sequence,
            durable_up_to: self.durable_up_to,
            block,
        };
        let (bytes, frame) = frame.seal(&stamp);
        let placement = Placement {
            generation: self.generation,
            offset: u64::from(block) * BLOCK_BYTES as u64,
            len: needed,
            sequence: self.next_sequence,
        };
        self.index.add(&frame, placement)?;
        self.block = Some(block + (needed / BLOCK_BYTES as u64) as u32);
        self.next_sequence += 1;
        self.in_flight.push_back(false);
        Ok(Sealed { placement, bytes })
    }

    /// The write of this sequence is on durable storage: it was completed, and a sync that began after that too. Completions may
    /// come in any order.
    ///
    /// # Panics
    /// If the sequence is not in flight.
    pub fn completed(&mut self, sequence: u64) {
        let position = sequence.checked_sub(self.durable_up_to + 1);
        let slot = position.and_then(|position| self.in_flight.get_mut(position as usize));
        let slot = slot.expect("a sequence was completed that is not in flight");
        *slot = true;
        while self.in_flight.front() == Some(&true) {
            self.in_flight.pop_front();
            self.durable_up_to += 1;
        }
        while let Some((sequence, live_from)) = self.says_dead.front()
            && *sequence <= self.durable_up_to
        {
            self.live_from = *live_from;
            self.says_dead.pop_front();
        }
    }

    /// Segments whose files can be used again, the oldest first: they are dead, and a durable header says so. What dies now can be
    /// used again once the next segment but one is opened.
    pub fn recyclable(&self) -> impl Iterator<Item = u64> {
        self.index
            .segments()
            .take_while(|generation| *generation < self.live_from || active(Mutant::SegmentRecycledEarly))
    }

    /// Whether a snapshot must be forced ([`Index::forced_snapshot`]) before the next segment is opened, when `free_files` files
    /// lie ready beside those that are recyclable: the next segment would take the last file, and nothing is dead that its header
    /// could give up for the one after it. Held to, a journal stays within its files, however much is written.
    pub fn needs_snapshot(&self, free_files: usize) -> bool {
        let recyclable = self.recyclable().count();
        free_files + recyclable <= 1 && self.index.dead(self.durable_up_to).count() <= recyclable
    }

    /// The file of a segment was taken for another use.
    ///
    /// # Panics
    /// If it was not [`Writer::recyclable`].
    pub fn recycled(&mut self, generation: u64) {
        assert!(
            self.recyclable().any(|free| free == generation),
            "a segment was recycled that holds live records"
        );
        self.index.remove_segment(generation);
    }
}
