//! The flusher: what was queued becomes frames, frames become durable, and then those who wait are told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future as _, poll_fn};
use std::io;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use generation_engine::journal::{BLOCK_BYTES, EntryKind, FRAME_HEADER_BYTES, FrameBuilder, Record, SealError};
use openraft_rt::AsyncRuntime;

use super::log::to_record;
use super::open::{directory, segment_path};
use super::{FRAME_BYTES, IN_FLIGHT, Journal, Owned, Queued, Segment, State, Waiting};
use crate::env::disk::{Disk, File, Open};
use crate::points;
use crate::raft::runtime::{Runtime, within, yield_now};
use crate::raft::types::to_journal;
use generation_engine::mutants::{Mutant, active};

/// After this long without anything to write, a frame without records covers the last one.
const IDLE: Duration = Duration::from_millis(200);

/// How long to wait before a full disk is asked for another file again.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// Files made ready before they are needed.
const AHEAD: usize = 2;

/// Kept at the end of each segment for what makes room, votes and what a new leader writes, in bytes.
const SPARE_BYTES: usize = 8 * BLOCK_BYTES;

const MARK_BYTES: usize = Record::Committed { shard: 0, log_id: None }.len_bytes();

/// A write that is ready to go.
struct Write<D: Disk> {
    file: Rc<D::File>,
    offset: u64,
    bytes: Vec<u8>,
    sequence: u64,
}

/// What the flusher does next.
enum Next<D: Disk> {
    Write(Write<D>),
    /// Another file is needed or should be made ready.
    Grow,
    Wait(Option<Duration>),
    Stop,
}

/// Runs until the journal fails or is stopped.
pub(super) async fn run<D: Disk>(journal: Journal<D>) {
    loop {
        match next(&journal) {
            Next::Write(write) => {
                journal.0.state.borrow_mut().in_flight += 1;
                let task = finish(journal.clone(), write);
                let ambient = Rc::clone(&journal.0.ambient);
                journal.0.ambient.spawn(Box::pin(within(ambient, task)));
            }
            Next::Grow => {
                if grow(&journal).await.is_err() {
                    journal.0.state.borrow_mut().full = true;
                }
            }
            Next::Wait(limit) => wait(&journal, limit).await,
            Next::Stop => return,
        }
    }
}

/// Decides what to do, and seals what is to be written.
fn next<D: Disk>(journal: &Journal<D>) -> Next<D> {
    let mut state = journal.0.state.borrow_mut();
    let state = &mut *state;
    if state.stopped || state.failure.is_some() {
        return Next::Stop;
    }
    let few = state.free.len() < AHEAD && state.files() < journal.most_files(state);
    if few && !state.full && (state.in_flight == 0 || state.free.is_empty()) {
        return Next::Grow;
    }
    if state.in_flight == IN_FLIGHT {
        return Next::Wait(None);
    }
    if state.queue.is_empty() {
        if state.idle_after == state.writer.durable_up_to() {
            return Next::Wait(state.full.then_some(FULL_RETRY));
        }
        return Next::Wait((state.in_flight == 0).then_some(IDLE));
    }
    match seal(journal, state) {
        Ok(Some(write)) => Next::Write(write),
        // There is no file to go on in: a snapshot will free one.
        Ok(None) if !state.full && state.free.len() < AHEAD && state.files() < journal.most_files(state) => Next::Grow,
        Ok(None) => Next::Wait(Some(FULL_RETRY)),
        Err(error) => {
            fail(
                state,
                &format!("what was to be written contradicts the journal: {error}"),
            );
            Next::Stop
        }
    }
}

/// Builds the next frame, or the head of the next segment where the open one has no room. `Ok(None)`: there is no file.
fn seal<D: Disk>(journal: &Journal<D>, state: &mut State<D>) -> Result<Option<Write<D>>, SealError> {
    let marks = state.committed.len() * MARK_BYTES;
    // A frame that waited for long must still fit a segment.
    let limit = FRAME_BYTES.min(journal.0.config.segment_bytes as usize / 4);
    let (mut len, mut count, mut spare) = (FRAME_HEADER_BYTES, 0, 0);
    for queued in &state.queue {
        let record = queued.record.as_record();
        let more = record.len_bytes();
        if count > 0 && len + more > limit {
            break;
        }
        if matches!(
            record,
            Record::Entry {
                kind: EntryKind::Commands,
                ..
            }
        ) {
            spare = SPARE_BYTES;
        }
        len += more;
        count += 1;
    }
    let size = (len + marks).next_multiple_of(BLOCK_BYTES);
    let blocked = state.writer.needs_snapshot(journal.spare_files(state));
    state.emergency &= blocked;
    if state.emergency || state.writer.room() < (size + spare) as u64 {
        if !blocked {
            return begin_segment(journal, state);
        }
        // Until a snapshot has made room only what makes it, and votes, may go on.
        count = bring_forward(state);
        if count == 0 {
            return Ok(None);
        }
    }
    let size = state
        .queue
        .iter()
        .take(count)
        .map(|queued| queued.record.as_record().len_bytes());
    let size = (FRAME_HEADER_BYTES + marks + size.sum::<usize>()).next_multiple_of(BLOCK_BYTES);
    if state.writer.room() < size as u64 {
        state.emergency = true;
        if state.writer.needs_snapshot(state.free.len()) {
            return Ok(None);
        }
        return begin_segment(journal, state);
    }
    let mut bytes = vec![0; size];
    let mut frame = FrameBuilder::new(&mut bytes);
    for queued in state.queue.iter().take(count) {
        let pushed = frame.push(&queued.record.as_record());
        pushed.expect("invariant: the buffer was made for these records");
    }
    // What they mark must be in this frame or before it: an entry can be committed by others before it is durable here.
    let marked = if count == state.queue.len() || active(Mutant::CommitMarkEarly) {
        std::mem::take(&mut state.committed)
    } else {
        BTreeMap::new()
    };
    for (shard, log_id) in marked {
        let pushed = frame.push(&Record::Committed { shard, log_id });
        pushed.expect("invariant: the buffer was made for these records");
    }
    let sealed = state.writer.seal(frame)?;
    let (sequence, offset) = (sealed.placement.sequence, sealed.placement.offset);
    if count == 0 {
        state.idle_after = sequence;
    }
    let mut waiting = Vec::new();
    for queued in state.queue.drain(..count) {
        if let Owned::Entry { shard, log_id, .. } = &queued.record
            && let Some(log) = state.logs.get_mut(shard)
        {
            log.sealed(*log_id, sequence);
        }
        waiting.extend(queued.waiting);
    }
    if !waiting.is_empty() {
        state.waiting.push_back((sequence, waiting));
    }
    let file = Rc::clone(&state.segments[&state.writer.generation()].file);
    Ok(Some(Write {
        file,
        offset,
        bytes,
        sequence,
    }))
}

/// Moves votes and purges, what a purge needs, and entries without commands that nothing of their log precedes, in front of everything
/// else; returns how many records that is.
fn bring_forward<D: Disk>(state: &mut State<D>) -> usize {
    let purged: BTreeSet<u32> = state
        .queue
        .iter()
        .filter(|queued| matches!(queued.record, Owned::Other(Record::Purge { .. })))
        .map(|queued| queued.record.as_record().shard())
        .collect();
    for shard in purged {
        condense(state, shard);
    }
    // The lowest index that anything in front is about, by shard; 0 where a replica begins or ends there.
    let mut in_front: BTreeMap<u32, u64> = BTreeMap::new();
    let (mut forward, mut rest) = (VecDeque::new(), VecDeque::new());
    for queued in state.queue.drain(..) {
        let record = queued.record.as_record();
        let lowest = in_front.entry(record.shard()).or_insert(u64::MAX);
        let (passes, about) = match record {
            // A promise has nothing to do with the log, but with the replica.
            Record::Vote { .. } => (*lowest > 0, u64::MAX),
            Record::Purge { up_to, .. } => (*lowest > up_to.index, up_to.index + 1),
            // It ends what is in front of it.
            Record::Truncate { after, .. } => {
                let end = after.map_or(0, |after| after.index + 1);
                (*lowest == u64::MAX, end.max(1))
            }
            // What a new leader writes commits what was there before it. Without that no snapshot covers the oldest entries, and
            // there would never be room.
            Record::Entry { kind, log_id, .. } => {
                let first = *lowest == u64::MAX && kind != EntryKind::Commands;
                (first, log_id.index.max(1))
            }
            _ => (false, 0),
        };
        if passes {
            forward.push_back(queued);
        } else {
            *lowest = (*lowest).min(about);
            rest.push_back(queued);
        }
    }
    let count = forward.len();
    forward.append(&mut rest);
    state.queue = forward;
    count
}

/// Rewrites what is queued about a shard's log so that a purge stands in front: entries that it covers need not be written. Does
/// nothing where the purge can pass them, or where a replica begins or ends in the queue.
fn condense<D: Disk>(state: &mut State<D>, shard: u32) {
    let Some(log) = state.logs.get(&shard) else { return };
    let Some(purged) = log.purged.filter(|purged| log.first_unsealed() <= purged.index + 1) else {
        return;
    };
    let about = |queued: &Queued| queued.record.as_record().shard() == shard;
    let of_log = |queued: &Queued| {
        let record = queued.record.as_record();
        matches!(
            record,
            Record::Entry { .. } | Record::Truncate { .. } | Record::Purge { .. }
        )
    };
    let other = |queued: &Queued| !of_log(queued) && !matches!(queued.record, Owned::Other(Record::Vote { .. }));
    let Some(sealed) = state.writer.index().shard(shard) else {
        return;
    };
    if state.queue.iter().any(|queued| about(queued) && other(queued)) {
        return;
    }
    let mut waiting = Vec::new();
    let mut queue = VecDeque::new();
    for mut queued in state.queue.drain(..) {
        if about(&queued) && of_log(&queued) {
            waiting.append(&mut queued.waiting);
        } else {
            queue.push_back(queued);
        }
    }
    let mut records = Vec::new();
    // Whatever the index holds behind the purge was truncated since.
    if sealed.last.is_some_and(|last| last.index > purged.index) {
        let after = Some(purged);
        records.push(Owned::Other(Record::Truncate { shard, after }));
    }
    records.push(Owned::Other(Record::Purge { shard, up_to: purged }));
    for entry in log.kept(purged.index + 1, u64::MAX) {
        let (kind, payload) = to_record(entry);
        records.push(Owned::Entry {
            shard,
            log_id: to_journal(&entry.log_id),
            kind,
            payload,
        });
    }
    let last = records.len() - 1;
    for (place, record) in records.into_iter().enumerate() {
        let waiting = if place == last {
            std::mem::take(&mut waiting)
        } else {
            Vec::new()
        };
        queue.push_back(Queued { record, waiting });
    }
    state.queue = queue;
}

/// Opens the next segment, in a spare file or in the oldest that is dead.
fn begin_segment<D: Disk>(journal: &Journal<D>, state: &mut State<D>) -> Result<Option<Write<D>>, SealError> {
    let segment = if let Some(segment) = state.free.pop() {
        segment
    } else {
        let Some(dead) = state.writer.recyclable().next() else {
            return Ok(None);
        };
        D::point(points::SEGMENT_RECYCLED);
        state.writer.recycled(dead);
        let segment = state.segments.remove(&dead);
        segment.expect("invariant: every segment of the index has its file")
    };
    let mut nonce = [0; 8];
    journal.0.ambient.fill_random(&mut nonce);
    let mut bytes = vec![0; state.writer.opening_bytes()];
    let opened = state.writer.open_segment(u64::from_le_bytes(nonce), &mut bytes)?;
    let sequence = opened.placement.sequence;
    let file = Rc::clone(&segment.file);
    state.segments.insert(state.writer.generation(), segment);
    Ok(Some(Write {
        file,
        offset: 0,
        bytes,
        sequence,
    }))
}

/// Makes a frame durable and tells those who waited for it and for all before it.
async fn finish<D: Disk>(journal: Journal<D>, write: Write<D>) {
    let Write {
        file,
        offset,
        bytes,
        sequence,
    } = write;
    let mut result = file.write_at(offset, &bytes).await;
    D::point(if offset == 0 {
        points::SEGMENT_OPENED
    } else {
        points::FRAME_WRITTEN
    });
    if result.is_ok() && !active(Mutant::FrameUnsynced) {
        result = file.sync_data().await;
    }
    drop(bytes);
    D::point(points::FRAME_SYNCED);
    let mut state = journal.0.state.borrow_mut();
    state.in_flight -= 1;
    if state.failure.is_some() {
        return;
    }
    if let Err(error) = result
        && !active(Mutant::FailedSyncIgnored)
    {
        return fail(&mut state, &error.to_string());
    }
    state.writer.completed(sequence);
    let durable = state.writer.durable_up_to();
    let mut done: Vec<Waiting> = Vec::new();
    while let Some((first, _)) = state.waiting.front()
        && *first <= durable
    {
        done.extend(state.waiting.pop_front().into_iter().flat_map(|(_, waiting)| waiting));
    }
    let kept_bytes = journal.0.config.kept_bytes;
    for log in state.logs.values_mut() {
        log.shrink(kept_bytes, durable);
    }
    state.wake();
    drop(state);
    for waiting in done {
        waiting.done();
    }
    D::point(points::FRAME_ACKNOWLEDGED);
}

/// Nothing is acknowledged from here on.
fn fail<D: Disk>(state: &mut State<D>, error: &str) {
    tracing::error!(
        error,
        "the journal has failed; this core acknowledges nothing until it was restarted"
    );
    state.failure = Some(error.into());
    state.wake();
}

/// Allocates one more segment file if there are few.
pub(super) async fn grow<D: Disk>(journal: &Journal<D>) -> io::Result<()> {
    let Some(disk) = &journal.0.disk else { return Ok(()) };
    loop {
        let name = {
            let mut state = journal.0.state.borrow_mut();
            if state.free.len() >= AHEAD || state.files() >= journal.most_files(&state) {
                return Ok(());
            }
            state.growing = true;
            state.next_file += 1;
            segment_path(state.next_file - 1)
        };
        let made = async {
            let file = disk.open(&name, Open::CreateNew).await?;
            if let Err(error) = file.allocate(journal.0.config.segment_bytes).await {
                // It would only be found blank at the next start.
                let _ = disk.remove(&name).await;
                return Err(error);
            }
            file.sync_data().await?;
            D::point(points::SEGMENT_ALLOCATED);
            disk.sync_directory(directory()).await?;
            Ok(file)
        };
        let made = made.await;
        let mut state = journal.0.state.borrow_mut();
        state.growing = false;
        state.full = made.is_err();
        let file = Rc::new(made?);
        state.free.insert(0, Segment { name, file });
    }
}

/// Waits until there is something to do. When `limit` passes, the journal is idle, or it is time to ask for space again.
async fn wait<D: Disk>(journal: &Journal<D>, limit: Option<Duration>) {
    let mut sleep = limit.map(|limit| Box::pin(Runtime::sleep(limit)));
    let mut first = true;
    let woken = poll_fn(|context| {
        if !first && journal.0.state.borrow().flusher.is_none() {
            return Poll::Ready(true);
        }
        first = false;
        journal.0.state.borrow_mut().flusher = Some(context.waker().clone());
        match &mut sleep {
            Some(sleep) => sleep.as_mut().poll(context).map(|()| false),
            None => Poll::Pending,
        }
    })
    .await;
    if woken {
        // Whatever else runs in this turn may still ask for something.
        yield_now().await;
        return;
    }
    let mut state = journal.0.state.borrow_mut();
    state.full = false;
    if state.queue.is_empty() && state.in_flight == 0 && state.idle_after < state.writer.durable_up_to() {
        cover(journal, &mut state);
    }
}

/// Writes a frame without records of replicas, so that the last one before it is known to have been durable.
fn cover<D: Disk>(journal: &Journal<D>, state: &mut State<D>) {
    let write = match seal(journal, state) {
        Ok(Some(write)) => write,
        Ok(None) => return,
        Err(error) => return fail(state, &error.to_string()),
    };
    state.in_flight += 1;
    let task = finish(journal.clone(), write);
    let ambient = Rc::clone(&journal.0.ambient);
    journal.0.ambient.spawn(Box::pin(within(ambient, task)));
}
