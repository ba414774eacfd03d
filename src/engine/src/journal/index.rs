//! What is live in the journal: each shard's state, where its entries lie, which segments can be used again.
//!
//! The index is a function of the frames in sequence; the writer and recovery feed it the same way, so that what a node knows of
//! its journal while it runs is what it would know after a restart.

use std::collections::{BTreeMap, VecDeque};

use super::frame::Frame;
use super::record::{Record, RecordFault, ShardState};
use super::{LogId, Placement};

/// Consecutive entries of one shard in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the first entry.
    pub first: u64,
    /// Index of the last entry.
    pub last: u64,
    /// The frame that holds them.
    pub frame: Placement,
}

/// Records that do not fit what came before. In the writer that is a mistake of its caller, in recovery a journal that was
/// written by one: nothing in it can be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// A record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordFault),
    /// A record of a shard that was not created.
    #[error("record of shard {shard}, which has no replica in this journal")]
    UnknownShard {
        /// The shard.
        shard: u32,
    },
    /// An entry that does not follow the last one.
    #[error("entry {found} of shard {shard} where {expected} comes next")]
    Hole {
        /// The shard.
        shard: u32,
        /// The index that comes next.
        expected: u64,
        /// The index found.
        found: u64,
    },
    /// A truncation to an entry that the log does not hold, or into what is purged or behind its end.
    #[error("truncation of shard {shard} to entry {index:?} outside its log")]
    Truncation {
        /// The shard.
        shard: u32,
        /// The entry that was to remain.
        index: Option<u64>,
    },
    /// A checkpoint that says something else than the records before it.
    #[error("checkpoint contradicts the records before it about shard {shard}")]
    Checkpoint {
        /// The first shard it is about.
        shard: u32,
    },
    /// Entries that should be there are not: an old segment is missing.
    #[error("entries {from} to {to} of shard {shard} are missing: a segment file is gone")]
    Missing {
        /// The shard.
        shard: u32,
        /// Index of the first missing entry.
        from: u64,
        /// Index of the last missing entry.
        to: u64,
    },
}

/// A shard whose entries keep the oldest segment from being used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForcedSnapshot {
    /// The shard.
    pub shard: u32,
    /// A snapshot that holds this entry, and a purge up to it, let go of the segment as far as this shard is concerned.
    pub up_to: u64,
    /// Bytes of frames with live entries of the shard in that segment.
    pub held_bytes: u64,
}

/// One shard.
#[derive(Debug, Clone)]
struct ShardLog {
    state: ShardState,
    /// Live entries by index. Without holes; the first may begin before `state.first`.
    runs: VecDeque<Run>,
}

/// One segment.
#[derive(Debug, Clone, Copy)]
struct SegmentUse {
    /// Sequence of its checkpoint.
    first_sequence: u64,
    /// How many runs lie in it.
    runs: u64,
    /// The last frame that made a run in it dead.
    freed_by: u64,
}

/// What is live in one journal.
#[derive(Debug, Default)]
pub struct Index {
    shards: BTreeMap<u32, ShardLog>,
    segments: BTreeMap<u64, SegmentUse>,
}

impl Index {
    /// An empty journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state of a shard; `None` if it has no replica here.
    pub fn shard(&self, shard: u32) -> Option<&ShardState> {
        self.shards.get(&shard).map(|log| &log.state)
    }

    /// All shards, by number.
    pub fn shards(&self) -> impl Iterator<Item = &ShardState> {
        self.shards.values().map(|log| &log.state)
    }

    /// Where the entries from index `from` on lie, in order. The first run may begin before `from`.
    pub fn runs(&self, shard: u32, from: u64) -> impl Iterator<Item = &Run> {
        let runs = self.shards.get(&shard).map(|log| &log.runs);
        let from = runs.map_or(0, |runs| runs.partition_point(|run| run.last < from));
        runs.into_iter().flat_map(move |runs| runs.range(from..))
    }

    /// Generations of the segments there are, the oldest first.
    pub fn segments(&self) -> impl Iterator<Item = u64> {
        self.segments.keys().copied()
    }

    /// The oldest segments, in order, in which nothing is live, provided that everything up to `durable_up_to` is durable. The
    /// newest is never among them. Before their files are used again, the header of a newer one must say so durably.
    pub fn dead(&self, durable_up_to: u64) -> impl Iterator<Item = u64> {
        let newest = self.segments.last_key_value();
        // Votes and the like live on in the newest checkpoint.
        let safe = newest.is_some_and(|(_, segment)| segment.first_sequence <= durable_up_to);
        let newest = newest.map_or(0, |(generation, _)| *generation);
        let free = move |segment: &SegmentUse| segment.runs == 0 && segment.freed_by <= durable_up_to;
        let old = self
            .segments
            .range(..newest)
            .take_while(move |(_, segment)| safe && free(segment));
        old.map(|(generation, _)| *generation)
    }

    /// Forgets a segment that is used again.
    ///
    /// # Panics
    /// If something in it is live.
    pub fn remove_segment(&mut self, generation: u64) {
        let old = self.segments.remove(&generation);
        assert!(
            old.is_none_or(|old| old.runs == 0),
            "a segment with live entries was recycled"
        );
    }

    /// The shard to take a snapshot of when the journal runs out of space: of those with entries in the oldest segment that has
    /// any, the one that holds most of it. Shards for which `busy` holds (a snapshot is under way) are passed over.
    pub fn forced_snapshot(&self, mut busy: impl FnMut(u32) -> bool) -> Option<ForcedSnapshot> {
        let (oldest, _) = self.segments.iter().find(|(_, segment)| segment.runs > 0)?;
        let mut choice: Option<ForcedSnapshot> = None;
        for (shard, log) in &self.shards {
            let held = log.runs.iter().take_while(|run| run.frame.generation == *oldest);
            let (mut held_bytes, mut up_to) = (0, None);
            for run in held {
                held_bytes += run.frame.len;
                up_to = Some(run.last);
            }
            let Some(up_to) = up_to else { continue };
            if choice.is_none_or(|choice| held_bytes > choice.held_bytes) && !busy(*shard) {
                choice = Some(ForcedSnapshot {
                    shard: *shard,
                    up_to,
                    held_bytes,
                });
            }
        }
        choice
    }

    /// Bytes of the frames that hold live entries of a shard. A frame that several shards share counts for each.
    pub fn held_bytes(&self, shard: u32) -> u64 {
        self.shards
            .get(&shard)
            .map_or(0, |log| log.runs.iter().map(|run| run.frame.len).sum())
    }

    /// Takes in the next frame. After an error the index is of no use any more.
    pub(super) fn add(&mut self, frame: &Frame<'_>, placement: Placement) -> Result<(), IndexError> {
        if frame.is_checkpoint() {
            return self.checkpoint(frame, placement);
        }
        for record in frame.records() {
            self.record(&record?, placement)?;
        }
        Ok(())
    }

    /// Whether every entry that should be there is. Recovery asks at its end, because segments before the oldest may be gone
    /// only as long as nothing in them is needed.
    pub(super) fn complete(&self) -> Result<(), IndexError> {
        for (shard, log) in &self.shards {
            let Some(last) = log.state.last.filter(|last| last.index >= log.state.first) else {
                continue;
            };
            let from = log.state.first;
            let there = log.runs.front().map_or(last.index + 1, |run| run.first);
            if there > from {
                return Err(IndexError::Missing {
                    shard: *shard,
                    from,
                    to: there - 1,
                });
            }
        }
        Ok(())
    }

    /// The first frame of a segment: it begins the index, or repeats what the index knows.
    fn checkpoint(&mut self, frame: &Frame<'_>, placement: Placement) -> Result<(), IndexError> {
        let begins = self.segments.is_empty();
        let segment = SegmentUse {
            first_sequence: placement.sequence,
            runs: 0,
            freed_by: 0,
        };
        self.segments.insert(placement.generation, segment);
        let mut known = self.shards.values();
        let mut loaded = BTreeMap::new();
        for record in frame.records() {
            let Record::State(state) = record? else {
                return Err(RecordFault::InvalidField(0).into());
            };
            let shard = state.shard;
            if begins {
                loaded.insert(
                    shard,
                    ShardLog {
                        state,
                        runs: VecDeque::new(),
                    },
                );
            } else if known.next().is_none_or(|log| log.state != state) {
                return Err(IndexError::Checkpoint { shard });
            }
        }
        if begins {
            self.shards = loaded;
        } else if let Some(log) = known.next() {
            return Err(IndexError::Checkpoint { shard: log.state.shard });
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>, placement: Placement) -> Result<(), IndexError> {
        let shard = record.shard();
        let log = match record {
            Record::Create { replica, .. } => {
                self.retire(shard, placement.sequence);
                let replica = *replica;
                let state = ShardState {
                    shard,
                    replica,
                    vote: None,
                    committed: None,
                    purged: None,
                    last: None,
                    first: 0,
                };
                self.shards.insert(
                    shard,
                    ShardLog {
                        state,
                        runs: VecDeque::new(),
                    },
                );
                return Ok(());
            }
            Record::State(_) => return Err(RecordFault::InvalidField(0).into()),
            _ => self.shards.get_mut(&shard).ok_or(IndexError::UnknownShard { shard })?,
        };
        let segments = &mut self.segments;
        match record {
            Record::Entry { log_id, .. } => log.append(*log_id, placement, segments)?,
            Record::Vote { vote, .. } => log.state.vote = Some(*vote),
            Record::Committed { log_id, .. } => log.state.committed = *log_id,
            Record::Truncate { after, .. } => log.truncate(*after, placement.sequence, segments)?,
            Record::Purge { up_to, .. } => log.purge(*up_to, placement.sequence, segments),
            Record::Retire { .. } => self.retire(shard, placement.sequence),
            Record::Create { .. } | Record::State(_) => {}
        }
        Ok(())
    }

    fn retire(&mut self, shard: u32, sequence: u64) {
        for run in self.shards.remove(&shard).into_iter().flat_map(|log| log.runs) {
            free(&mut self.segments, &run, sequence);
        }
    }

    /// Validates the whole index against its invariants. Takes time proportional to it.
    ///
    /// # Panics
    /// On a broken invariant: a bug.
    pub fn check(&self) {
        let mut runs: BTreeMap<u64, u64> = BTreeMap::new();
        for (shard, log) in &self.shards {
            assert_eq!(*shard, log.state.shard, "a shard is filed under another number");
            let mut next = log.runs.front().map(|run| run.first);
            for run in &log.runs {
                assert_eq!(Some(run.first), next, "a hole between the runs of a shard");
                assert!(
                    run.first <= run.last && run.last >= log.state.first,
                    "a run without live entries"
                );
                next = Some(run.last + 1);
                *runs.entry(run.frame.generation).or_default() += 1;
            }
            if let (Some(run), Some(last)) = (log.runs.back(), log.state.last) {
                assert_eq!(run.last, last.index, "the runs of a shard end before its log");
            }
        }
        for (generation, segment) in &self.segments {
            let counted = runs.remove(generation).unwrap_or(0);
            assert_eq!(counted, segment.runs, "the number of runs in a segment is wrong");
        }
        assert!(runs.is_empty(), "a run lies in a segment that is gone");
    }
}

impl ShardLog {
    fn append(
        &mut self,
        log_id: LogId,
        placement: Placement,
        segments: &mut BTreeMap<u64, SegmentUse>,
    ) -> Result<(), IndexError> {
        let found = log_id.index;
        match self.state.last {
            // The first entry of an empty log says where it begins.
            None => self.state.first = found,
            Some(last) if last.index + 1 == found => {}
            Some(last) => {
                let (shard, expected) = (self.state.shard, last.index + 1);
                return Err(IndexError::Hole { shard, expected, found });
            }
        }
        self.state.last = Some(log_id);
        match self.runs.back_mut() {
            Some(run) if run.frame == placement => run.last = found,
            _ => {
                self.runs.push_back(Run {
                    first: found,
                    last: found,
                    frame: placement,
                });
                if let Some(segment) = segments.get_mut(&placement.generation) {
                    segment.runs += 1;
                }
            }
        }
        Ok(())
    }

    fn truncate(
        &mut self,
        after: Option<LogId>,
        sequence: u64,
        segments: &mut BTreeMap<u64, SegmentUse>,
    ) -> Result<(), IndexError> {
        let first = self.state.first;
        let keeps = |run: &Run| after.is_some_and(|after| run.first.max(first) <= after.index);
        let inside = match after {
            // What is purged cannot come back.
            None => self.state.purged.is_none(),
            Some(after) => {
                let purged = self.state.purged.is_none_or(|purged| after.index >= purged.index);
                purged && self.state.last.is_some_and(|last| after.index <= last.index)
            }
        };
        if !inside {
            let index = after.map(|after| after.index);
            return Err(IndexError::Truncation {
                shard: self.state.shard,
                index,
            });
        }
        while let Some(run) = self.runs.back()
            && !keeps(run)
        {
            free(segments, run, sequence);
            self.runs.pop_back();
        }
        if let (Some(run), Some(after)) = (self.runs.back_mut(), after) {
            run.last = run.last.min(after.index);
        }
        self.state.last = after;
        Ok(())
    }

    fn purge(&mut self, up_to: LogId, sequence: u64, segments: &mut BTreeMap<u64, SegmentUse>) {
        if self.state.purged.is_some_and(|purged| purged.index >= up_to.index) {
            return;
        }
        while let Some(run) = self.runs.front()
            && run.last <= up_to.index
        {
            free(segments, run, sequence);
            self.runs.pop_front();
        }
        self.state.purged = Some(up_to);
        self.state.first = up_to.index + 1;
        if self.state.last.is_none_or(|last| last.index < up_to.index) {
            self.state.last = Some(up_to);
        }
    }
}

fn free(segments: &mut BTreeMap<u64, SegmentUse>, run: &Run, sequence: u64) {
    if let Some(segment) = segments.get_mut(&run.frame.generation) {
        segment.runs -= 1;
        segment.freed_by = segment.freed_by.max(sequence);
    }
}
