//! Reading a journal back. The rule is at the head of [`crate::journal`].
//!
//! The caller reads the first block of every segment file, gives them to [`Recovery::plan`], feeds the files in the order that
//! [`Recovery::next_file`] asks for, and learns from [`Recovery::finish`] where the journal ends or that it is damaged. A file is
//! fed whole; so recovery holds one segment in memory at a time.

use std::collections::{BTreeMap, VecDeque};

use super::frame::{Broken, Frame, FrameFault};
use super::index::{Index, IndexError};
use super::record::{Record, ShardState};
use super::segment::{SegmentFault, SegmentHeader};
use super::{BLOCK_BYTES, Placement};

/// A segment file as the caller found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentFile {
    /// The caller's number for it.
    pub file: usize,
    /// What its first block says.
    pub header: Result<SegmentHeader, SegmentFault>,
}

/// What is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// The header of a segment.
    #[error(transparent)]
    Segment(#[from] SegmentFault),
    /// A frame.
    #[error(transparent)]
    Frame(#[from] FrameFault),
}

/// Durable frames cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason} at offset {offset}, where frame {sequence} was durable (up to {durable_up_to} all were)")]
pub struct Corruption {
    /// The caller's number of the file.
    pub file: usize,
    /// Offset in it, in bytes.
    pub offset: u64,
    /// Sequence of the first frame that is lost.
    pub sequence: u64,
    /// The highest `durable_up_to` seen.
    pub durable_up_to: u64,
    /// What stands there instead.
    pub reason: Bad,
    /// Replicas that the readable part of the journal knows, as (shard, replica): any of them may have lost records.
    pub replicas: Vec<(u32, u64)>,
}

/// Why a journal cannot be used. Nothing was changed by looking at it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// Durable frames cannot be read: retire the replicas named and let them rejoin under new ids.
    #[error("corrupt journal: {0}")]
    Corruption(Corruption),
    /// A file of another journal lies among the segments.
    #[error("segment file {file} belongs to journal {found:032x}")]
    ForeignJournal {
        /// The caller's number of the file.
        file: usize,
        /// The journal it belongs to.
        found: u128,
    },
    /// A file was written by a newer release: start that, or a copy of the files as they were.
    #[error("segment file {file} has format version {version}, which this release does not read")]
    UnsupportedVersion {
        /// The caller's number of the file.
        file: usize,
        /// The version.
        version: u8,
    },
    /// Two files say they are the same segment: one is a copy.
    #[error("segment files {files:?} are both generation {generation}")]
    Duplicate {
        /// The caller's numbers of the files.
        files: [usize; 2],
        /// The generation.
        generation: u64,
    },
    /// Whole frames that make no sense together.
    #[error("inconsistent journal: {error} (file {file}, offset {offset})")]
    Inconsistent {
        /// The caller's number of the file.
        file: usize,
        /// Offset of the frame, in bytes.
        offset: u64,
        /// What does not fit.
        error: IndexError,
    },
    /// The segment where the live part of the journal begins is gone, or its header is. Everything may be lost that is not in later
    /// segments, votes included: retire every replica of this journal.
    #[error("corrupt journal: the segment of generation {generation} is gone or has lost its header (file {file:?})")]
    MissingSegment {
        /// Its generation.
        generation: u64,
        /// The caller's number of the file, if one without a sound header holds frames of it.
        file: Option<usize>,
    },
    /// Entries that should be in the journal are not, though nothing in it is damaged.
    #[error("incomplete journal: {0}")]
    Incomplete(IndexError),
}

/// A segment that goes on being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveredSegment {
    /// The caller's number of the file.
    pub file: usize,
    /// Its generation, by which the index names it.
    pub generation: u64,
}

/// What was found in a journal that is sound.
#[derive(Debug)]
pub struct Recovered {
    /// What is live.
    pub index: Index,
    /// For [`super::Writer::resume`].
    pub next_sequence: u64,
    /// For [`super::Writer::resume`].
    pub next_generation: u64,
    /// Segments with frames in the index, the oldest first.
    pub segments: Vec<RecoveredSegment>,
    /// Files with nothing in them that counts.
    pub free: Vec<usize>,
    /// Where the tail was cut and why; `None` if the last segment ends in blank or foreign blocks with nothing behind them.
    pub torn: Option<(usize, u64, FrameFault)>,
    /// Whole frames behind the cut. None of them was acknowledged.
    pub dropped_frames: u64,
}

#[derive(Debug, Clone, Copy)]
struct Planned {
    file: usize,
    header: SegmentHeader,
    /// Where a later segment begins; what follows in this one is dead.
    limit: Option<u64>,
}

/// Where the sequence of frames stops.
#[derive(Debug, Clone, Copy)]
struct Stop {
    file: usize,
    offset: u64,
    fault: FrameFault,
}

impl Stop {
    /// Whether the blocks there look as if nothing had been written to them in this generation.
    fn is_unwritten(self) -> bool {
        matches!(self.fault, FrameFault::Blank | FrameFault::Foreign | FrameFault::End)
    }
}

/// Recovery of one journal.
#[derive(Debug)]
pub struct Recovery {
    planned: VecDeque<Planned>,
    /// Files without a sound header.
    headless: VecDeque<(usize, SegmentFault)>,
    newest_generation: u64,
    index: Index,
    segments: Vec<RecoveredSegment>,
    free: Vec<usize>,
    expected: Option<u64>,
    /// Where the current or last segment stops. Only a stop if no later segment goes on from there.
    stop: Option<Stop>,
    /// A stop that is one: frames behind it, or later segments, do not go on from there.
    gap: bool,
    durable_up_to: u64,
    dropped_frames: u64,
    /// The generation with which the live part begins, if no file is it.
    missing: Option<u64>,
    /// The first of them that holds frames of the missing generation, or newer than any sound segment, or the frame that comes next.
    lost_head: Option<(usize, SegmentFault)>,
    /// Replicas named behind the gap.
    also_named: BTreeMap<u32, u64>,
}

impl Recovery {
    /// Puts the segment files of `journal` in order.
    pub fn plan(journal: u128, files: &[SegmentFile]) -> Result<Self, RecoveryError> {
        let mut planned: Vec<Planned> = Vec::new();
        let mut headless: VecDeque<(usize, SegmentFault)> = VecDeque::new();
        for SegmentFile { file, header } in files {
            let file = *file;
            match *header {
                Ok(header) if header.journal != journal => {
                    return Err(RecoveryError::ForeignJournal {
                        file,
                        found: header.journal,
                    });
                }
                Ok(header) => planned.push(Planned {
                    file,
                    header,
                    limit: None,
                }),
                Err(SegmentFault::UnsupportedVersion(version)) => {
                    return Err(RecoveryError::UnsupportedVersion { file, version });
                }
                Err(fault) => headless.push_back((file, fault)),
            }
        }
        planned.sort_by_key(|segment| segment.header.generation);
        for pair in planned.windows(2) {
            if pair[0].header.generation == pair[1].header.generation {
                let generation = pair[0].header.generation;
                return Err(RecoveryError::Duplicate {
                    files: [pair[0].file, pair[1].file],
                    generation,
                });
            }
        }
        let mut limit: Option<u64> = None;
        for segment in planned.iter_mut().rev() {
            segment.limit = limit;
            let first = segment.header.first_sequence;
            limit = Some(limit.map_or(first, |limit| limit.min(first)));
        }
        let newest = planned.last().map(|segment| segment.header);
        let (newest_generation, live_from) = newest.map_or((0, 0), |newest| (newest.generation, newest.live_from));
        // Dead are those that were given up, whose files may be half overwritten by now, and those that were cut off behind a torn
        // tail by an earlier recovery, which opened a newer segment at an earlier sequence.
        let dead = |segment: &Planned| {
            let header = &segment.header;
            header.generation < live_from || segment.limit.is_some_and(|limit| header.first_sequence >= limit)
        };
        let free = planned
            .iter()
            .filter(|segment| dead(segment))
            .map(|segment| segment.file)
            .collect();
        planned.retain(|segment| !dead(segment));
        let missing = planned.first().is_some_and(|first| first.header.generation > live_from);
        Ok(Self {
            planned: planned.into(),
            missing: missing.then_some(live_from),
            headless,
            newest_generation,
            index: Index::new(),
            segments: Vec::new(),
            free,
            // Without its beginning there is no journal, and that is the tail of one of which nothing was ever durable.
            expected: missing.then_some(1),
            stop: None,
            gap: missing,
            durable_up_to: 0,
            dropped_frames: 0,
            lost_head: None,
            also_named: BTreeMap::new(),
        })
    }

    /// The file to feed next; `None` once all were fed.
    pub fn next_file(&self) -> Option<usize> {
        let planned = self.planned.front().map(|segment| segment.file);
        planned.or_else(|| self.headless.front().map(|(file, _)| *file))
    }

    /// Takes in the file that [`Recovery::next_file`] asked for, from its first byte to its last. `each` is called with every
    /// record that is part of the journal, in order, and with the place of its frame; should recovery fail later, none of them
    /// counts.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Placement, &Record<'_>)) -> Result<(), RecoveryError> {
        if let Some(segment) = self.planned.pop_front() {
            return self.segment(&segment, bytes, &mut each);
        }
        if let Some((file, fault)) = self.headless.pop_front() {
            self.headless_file(file, fault, bytes);
        }
        Ok(())
    }

    /// The verdict.
    ///
    /// # Panics
    /// If a file was not fed.
    pub fn finish(self) -> Result<Recovered, RecoveryError> {
        assert!(self.next_file().is_none(), "recovery has not been fed every file");
        if let Some(generation) = self.missing
            && self.durable_up_to > 0
        {
            let file = self.lost_head.map(|(file, _)| file);
            return Err(RecoveryError::MissingSegment { generation, file });
        }
        let expected = self.expected.unwrap_or(1);
        if expected <= self.durable_up_to {
            let stop = self.stop.map(|stop| (stop.file, stop.offset, Bad::Frame(stop.fault)));
            let head = self.lost_head.map(|(file, fault)| (file, 0, Bad::Segment(fault)));
            // Where the sequence stops at blocks that were never written, what is missing lies behind a lost header, if there
            // is one.
            let bad = if self.stop.is_none_or(Stop::is_unwritten) {
                head.or(stop)
            } else {
                stop
            };
            let (file, offset, reason) = bad.expect("invariant: a frame or header has said what was durable");
            let mut replicas = self.also_named;
            replicas.extend(self.index.shards().map(|state| (state.shard, state.replica)));
            return Err(RecoveryError::Corruption(Corruption {
                file,
                offset,
                sequence: expected,
                durable_up_to: self.durable_up_to,
                reason,
                replicas: replicas.into_iter().collect(),
            }));
        }
        self.index.complete().map_err(RecoveryError::Incomplete)?;
        let torn = self.stop.filter(|stop| self.dropped_frames > 0 || !stop.is_unwritten());
        Ok(Recovered {
            index: self.index,
            next_sequence: expected,
            next_generation: self.newest_generation + 1,
            segments: self.segments,
            free: self.free,
            torn: torn.map(|stop| (stop.file, stop.offset, stop.fault)),
            dropped_frames: self.dropped_frames,
        })
    }

    fn segment(
        &mut self,
        segment: &Planned,
        bytes: &[u8],
        each: &mut impl FnMut(Placement, &Record<'_>),
    ) -> Result<(), RecoveryError> {
        let SegmentHeader {
            generation,
            first_sequence,
            durable_up_to,
            blocks,
            ..
        } = segment.header;
        let bytes = &bytes[..bytes.len().min(blocks as usize * BLOCK_BYTES)];
        self.durable_up_to = self.durable_up_to.max(durable_up_to);
        let expected = *self.expected.get_or_insert(first_sequence);
        if expected != first_sequence {
            self.gap = true;
        }
        if !self.gap {
            self.stop = None;
        }
        // Whether anything of it counts: its checkpoint at least.
        let mut taken = false;
        let mut offset = BLOCK_BYTES;
        while offset < bytes.len() {
            if self.stop.is_none() && self.expected == segment.limit {
                break;
            }
            let frame = match Frame::read(&bytes[offset..]) {
                Ok(frame) if belongs(&frame, segment, offset) => frame,
                Ok(_) => {
                    self.stop_at(segment.file, offset, FrameFault::Foreign);
                    offset += BLOCK_BYTES;
                    continue;
                }
                Err(Broken { fault, header }) => {
                    self.stop_at(segment.file, offset, fault);
                    // A header that is right is trusted with the length, so that nothing inside a payload is looked at.
                    let ours = header
                        .filter(|(stamp, _)| stamp.generation == generation && stamp.nonce == segment.header.nonce);
                    offset += ours.map_or(BLOCK_BYTES, |(_, len)| len);
                    continue;
                }
            };
            self.durable_up_to = self.durable_up_to.max(frame.durable_up_to());
            let found = frame.sequence();
            if self.stop.is_none() && self.expected != Some(found) {
                self.stop_at(segment.file, offset, FrameFault::Sequence { found });
            }
            if self.stop.is_some() {
                self.behind_gap(&frame);
            } else {
                self.deliver(segment, &frame, offset, each)?;
                if !std::mem::replace(&mut taken, true) {
                    let file = segment.file;
                    self.segments.push(RecoveredSegment { file, generation });
                }
            }
            offset += frame.len_bytes();
        }
        self.stop_at(segment.file, offset, FrameFault::End);
        if !taken {
            self.free.push(segment.file);
        }
        Ok(())
    }

    fn deliver(
        &mut self,
        segment: &Planned,
        frame: &Frame<'_>,
        offset: usize,
        each: &mut impl FnMut(Placement, &Record<'_>),
    ) -> Result<(), RecoveryError> {
        let placement = Placement {
            generation: segment.header.generation,
            offset: offset as u64,
            len: frame.len_bytes() as u64,
            sequence: frame.sequence(),
        };
        let inconsistent = |error| RecoveryError::Inconsistent {
            file: segment.file,
            offset: placement.offset,
            error,
        };
        if frame.is_checkpoint() != (frame.sequence() == segment.header.first_sequence) {
            return Err(inconsistent(IndexError::Checkpoint { shard: 0 }));
        }
        self.index.add(frame, placement).map_err(inconsistent)?;
        for record in frame.records().flatten() {
            each(placement, &record);
        }
        self.expected = Some(frame.sequence() + 1);
        Ok(())
    }

    fn stop_at(&mut self, file: usize, offset: usize, fault: FrameFault) {
        if self.stop.is_none() {
            self.stop = Some(Stop {
                file,
                offset: offset as u64,
                fault,
            });
        }
    }

    /// A whole frame of this journal that cannot be taken any more.
    fn behind_gap(&mut self, frame: &Frame<'_>) {
        self.gap = true;
        self.dropped_frames += 1;
        for record in frame.records().flatten() {
            match record {
                Record::Create { shard, replica } | Record::State(ShardState { shard, replica, .. }) => {
                    self.also_named.insert(shard, replica);
                }
                _ => {}
            }
        }
    }

    /// A file whose header is gone: was it in use?
    fn headless_file(&mut self, file: usize, fault: SegmentFault, bytes: &[u8]) {
        self.free.push(file);
        let mut newest = self.newest_generation;
        let mut offset = BLOCK_BYTES;
        while offset < bytes.len() {
            let frame = Frame::read(&bytes[offset..]).ok();
            let placed = frame.filter(|frame| frame.stamp().block as usize * BLOCK_BYTES == offset);
            let newer = placed.filter(|frame| frame.generation() > self.newest_generation);
            if let Some(frame) = newer {
                newest = newest.max(frame.generation());
                self.durable_up_to = self.durable_up_to.max(frame.durable_up_to());
                self.dropped_frames += 1;
            }
            let next = placed.is_some_and(|frame| Some(frame.sequence()) == self.expected);
            let missing = placed.is_some_and(|frame| Some(frame.generation()) == self.missing);
            if newer.is_some() || next || missing {
                self.lost_head.get_or_insert((file, fault));
            }
            offset += newer.map_or(BLOCK_BYTES, |frame| frame.len_bytes());
        }
        self.newest_generation = newest;
    }
}

fn belongs(frame: &Frame<'_>, segment: &Planned, offset: usize) -> bool {
    let stamp = frame.stamp();
    stamp.generation == segment.header.generation
        && stamp.nonce == segment.header.nonce
        && stamp.block as usize * BLOCK_BYTES == offset
}
