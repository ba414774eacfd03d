//! A disk of segment files, a journal on it, and the plain model it is compared with.

use std::collections::BTreeMap;

use crate::journal::*;

pub(super) const JOURNAL: u128 = 0x6a6f_7572_6e61_6c00;

/// A shard as the model has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelShard {
    pub(super) replica: u64,
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    pub(super) last: Option<LogId>,
    pub(super) entries: BTreeMap<u64, (LogId, EntryKind, Vec<u8>)>,
}

pub(super) type Model = BTreeMap<u32, ModelShard>;

pub(super) fn apply(model: &mut Model, record: &Record<'_>) {
    let shard = record.shard();
    if let Record::Create { replica, .. } = record {
        let replica = *replica;
        let fresh = ModelShard {
            replica,
            vote: None,
            committed: None,
            purged: None,
            last: None,
            entries: BTreeMap::new(),
        };
        model.insert(shard, fresh);
        return;
    }
    let Some(state) = model.get_mut(&shard) else { return };
    match record {
        Record::Entry {
            log_id, kind, payload, ..
        } => {
            state.last = Some(*log_id);
            state.entries.insert(log_id.index, (*log_id, *kind, payload.to_vec()));
        }
        Record::Vote { vote, .. } => state.vote = Some(*vote),
        Record::Committed { log_id, .. } => state.committed = *log_id,
        Record::Truncate { after, .. } => {
            state.last = *after;
            state
                .entries
                .retain(|index, _| after.is_some_and(|after| *index <= after.index));
        }
        Record::Purge { up_to, .. } => {
            state.purged = state.purged.max(Some(*up_to));
            state.entries.retain(|index, _| *index > up_to.index);
            state.last = state.last.max(Some(*up_to));
        }
        Record::Retire { .. } => {
            model.remove(&shard);
        }
        Record::Create { .. } | Record::State(_) => {}
    }
}

/// A write that the disk has not promised to keep.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub(super) file: usize,
    pub(super) offset: usize,
    pub(super) bytes: Vec<u8>,
    pub(super) sequence: u64,
}

/// A journal that runs on a disk.
pub(super) struct Harness {
    /// What is durable.
    pub(super) files: Vec<Vec<u8>>,
    pub(super) pending: Vec<Pending>,
    pub(super) writer: Writer,
    /// The file of each generation.
    pub(super) placed: BTreeMap<u64, usize>,
    pub(super) free: Vec<usize>,
    /// The model after each sequence.
    pub(super) history: BTreeMap<u64, Model>,
    pub(super) model: Model,
    segment_bytes: usize,
    nonce: u64,
}

impl Harness {
    pub(super) fn new(files: usize, segment_blocks: usize) -> Self {
        Self::with_nonce(files, segment_blocks, 7)
    }

    /// The nonces of segments follow from `nonce`.
    pub(super) fn with_nonce(files: usize, segment_blocks: usize, nonce: u64) -> Self {
        let segment_bytes = segment_blocks * BLOCK_BYTES;
        let mut harness = Self {
            files: vec![vec![0; segment_bytes]; files],
            pending: Vec::new(),
            writer: Writer::new(JOURNAL, segment_bytes as u64),
            placed: BTreeMap::new(),
            free: (0..files).rev().collect(),
            history: BTreeMap::from([(0, Model::new())]),
            model: Model::new(),
            segment_bytes,
            nonce,
        };
        harness.open();
        harness
    }

    /// Opens a segment in a free or recycled file. Returns false if there is none.
    pub(super) fn try_open(&mut self) -> bool {
        let file = self.free.pop().or_else(|| {
            let generation = self.writer.recyclable().next()?;
            self.writer.recycled(generation);
            self.placed.remove(&generation)
        });
        let Some(file) = file else { return false };
        self.nonce = self.nonce.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let mut buffer = vec![0xee; self.writer.opening_bytes()];
        let opened = self
            .writer
            .open_segment(self.nonce, &mut buffer)
            .expect("states fit a segment");
        let placement = opened.placement;
        let bytes = opened.bytes.to_vec();
        self.placed.insert(placement.generation, file);
        self.pending.push(Pending {
            file,
            offset: 0,
            bytes,
            sequence: placement.sequence,
        });
        self.history.insert(placement.sequence, self.model.clone());
        true
    }

    fn open(&mut self) {
        assert!(self.try_open(), "the disk is full");
    }

    /// Writes a frame of these records; on a full segment opens another. Returns its sequence, `None` if the disk is full.
    pub(super) fn write(&mut self, records: &[Record<'_>]) -> Option<u64> {
        let len = FRAME_HEADER_BYTES + records.iter().map(Record::len_bytes).sum::<usize>();
        let mut buffer = vec![0xee; len.next_multiple_of(BLOCK_BYTES)];
        for _ in 0..2 {
            let mut builder = FrameBuilder::new(&mut buffer);
            for record in records {
                builder.push(record).expect("the buffer was measured");
            }
            assert_eq!(builder.records(), records.len());
            match self.writer.seal(builder) {
                Ok(sealed) => {
                    let Placement {
                        generation,
                        offset,
                        sequence,
                        ..
                    } = sealed.placement;
                    let (file, bytes) = (self.placed[&generation], sealed.bytes.to_vec());
                    self.pending.push(Pending {
                        file,
                        offset: offset as usize,
                        bytes,
                        sequence,
                    });
                    for record in records {
                        apply(&mut self.model, record);
                    }
                    self.history.insert(sequence, self.model.clone());
                    self.writer.index().check();
                    return Some(sequence);
                }
                Err(SealError::SegmentFull { .. }) if self.try_open() => {}
                Err(SealError::SegmentFull { .. }) => return None,
                Err(SealError::Index(error)) => panic!("{error}"),
            }
        }
        panic!("a frame of {len} bytes does not fit a segment");
    }

    /// A pending write reaches the disk, and a sync after it.
    pub(super) fn complete(&mut self, position: usize) {
        let Pending {
            file,
            offset,
            bytes,
            sequence,
        } = self.pending.remove(position);
        self.files[file][offset..offset + bytes.len()].copy_from_slice(&bytes);
        self.writer.completed(sequence);
    }

    pub(super) fn complete_all(&mut self) {
        while !self.pending.is_empty() {
            self.complete(0);
        }
        assert_eq!(self.writer.in_flight(), 0);
    }

    /// Power is lost and comes back: pending writes reach the disk as `survives` says (file contents before, write), the rest is
    /// gone. Recovery must find every frame that was acknowledged and nothing that was never written, and the journal goes on.
    pub(super) fn crash(&mut self, mut survives: impl FnMut(&mut [u8], &Pending)) -> Recovered {
        let acknowledged = self.writer.durable_up_to();
        for pending in std::mem::take(&mut self.pending) {
            let end = pending.offset + pending.bytes.len();
            survives(&mut self.files[pending.file][pending.offset..end], &pending);
        }
        let (recovered, model) = recover(&self.files).expect("a crash alone is no corruption");
        let last = recovered.next_sequence - 1;
        assert!(
            last >= acknowledged,
            "acknowledged up to {acknowledged}, recovered up to {last}"
        );
        assert_eq!(
            Some(&model),
            self.history.get(&last),
            "another state than was written up to {last}"
        );
        compare(&self.files, &recovered, &model);
        self.resume(recovered)
    }

    fn resume(&mut self, recovered: Recovered) -> Recovered {
        let last = recovered.next_sequence - 1;
        self.model = self.history[&last].clone();
        self.history.retain(|sequence, _| *sequence <= last);
        self.placed = recovered
            .segments
            .iter()
            .map(|segment| (segment.generation, segment.file))
            .collect();
        self.free.clone_from(&recovered.free);
        let (again, _) = recover(&self.files).expect("recovery changes nothing");
        let segment_bytes = self.segment_bytes as u64;
        let (sequence, generation) = (recovered.next_sequence, recovered.next_generation);
        self.writer = Writer::resume(JOURNAL, segment_bytes, again.index, sequence, generation);
        recovered
    }
}

/// Reads a journal back; the model is built from the records alone, on top of the oldest checkpoint.
pub(super) fn recover(files: &[Vec<u8>]) -> Result<(Recovered, Model), RecoveryError> {
    let heads: Vec<SegmentFile> = files
        .iter()
        .enumerate()
        .map(|(file, bytes)| SegmentFile {
            file,
            header: SegmentHeader::decode(bytes),
        })
        .collect();
    let mut recovery = Recovery::plan(JOURNAL, &heads)?;
    let mut model = Model::new();
    let mut segments = std::collections::BTreeSet::new();
    while let Some(file) = recovery.next_file() {
        recovery.feed(&files[file], |placement, record| {
            segments.insert(placement.generation);
            match record {
                Record::State(state) if segments.len() == 1 => {
                    let ShardState {
                        replica,
                        vote,
                        committed,
                        purged,
                        last,
                        ..
                    } = *state;
                    let entries = BTreeMap::new();
                    model.insert(
                        state.shard,
                        ModelShard {
                            replica,
                            vote,
                            committed,
                            purged,
                            last,
                            entries,
                        },
                    );
                }
                record => apply(&mut model, record),
            }
        })?;
    }
    Ok((recovery.finish()?, model))
}

/// The index of a recovered journal says what the model says, and every entry is where it says.
pub(super) fn compare(files: &[Vec<u8>], recovered: &Recovered, model: &Model) {
    let index = &recovered.index;
    index.check();
    assert_eq!(index.shards().count(), model.len());
    let placed: BTreeMap<u64, usize> = recovered
        .segments
        .iter()
        .map(|segment| (segment.generation, segment.file))
        .collect();
    assert!(
        index.segments().eq(placed.keys().copied()),
        "the index knows other segments"
    );
    for (shard, expected) in model {
        let state = index.shard(*shard).expect("the index knows every shard");
        let found = (state.replica, state.vote, state.committed, state.purged, state.last);
        assert_eq!(
            found,
            (
                expected.replica,
                expected.vote,
                expected.committed,
                expected.purged,
                expected.last
            )
        );
        for (entry, (log_id, kind, payload)) in &expected.entries {
            let run = index.runs(*shard, *entry).next().expect("every entry lies in a run");
            assert!(run.first <= *entry && *entry <= run.last);
            let file = &files[placed[&run.frame.generation]];
            let frame = Frame::parse(&file[run.frame.offset as usize..]).expect("a live frame is whole");
            assert_eq!(
                (frame.sequence(), frame.len_bytes() as u64),
                (run.frame.sequence, run.frame.len)
            );
            // The last of the frame: it may have replaced another within it.
            let record = frame.records().map(|record| record.expect("readable")).filter(|record| {
                matches!(record, Record::Entry { shard: s, log_id, .. } if s == shard && log_id.index == *entry)
            }).last();
            let (shard, log_id, kind) = (*shard, *log_id, *kind);
            assert_eq!(
                record,
                Some(Record::Entry {
                    shard,
                    log_id,
                    kind,
                    payload
                })
            );
        }
    }
}

pub(super) fn entry(shard: u32, index: u64, payload: &[u8]) -> Record<'_> {
    let log_id = LogId {
        term: 3,
        leader: 1,
        index,
    };
    Record::Entry {
        shard,
        log_id,
        kind: EntryKind::Commands,
        payload,
    }
}
