//! Reading entries: the newest from memory, older ones from their frames.

use std::io;
use std::rc::Rc;

use generation_engine::journal::{Frame, Placement, Record};

use super::log::{bytes_of, from_record};
use super::{Journal, State};
use crate::env::disk::{Disk, File};
use crate::raft::types::Entry;

/// Where the next entries are to be had.
enum Source<D: Disk> {
    Memory(Vec<Entry>),
    Disk {
        file: Rc<D::File>,
        frame: Placement,
        last: u64,
    },
}

/// Reads the entries from `start` to before `end` that the log has, in order; stops after the one that passes `limit` bytes.
pub(super) async fn entries<D: Disk>(
    journal: &Journal<D>,
    shard: u32,
    mut start: u64,
    end: u64,
    limit: usize,
) -> io::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut bytes = 0;
    loop {
        let source = {
            let state = journal.0.state.borrow();
            let Some(log) = state.logs.get(&shard) else {
                return Ok(entries);
            };
            let last = log.last.map_or(0, |last| last.index + 1);
            // A hole would be taken for the end of the log.
            if entries.is_empty() {
                start = start.max(log.first);
            }
            if start < log.first || start >= end.min(last) || bytes >= limit {
                return Ok(entries);
            }
            source(&state, shard, start, end, limit - bytes)
        };
        match source? {
            Source::Memory(mut newest) => {
                entries.append(&mut newest);
                return Ok(entries);
            }
            Source::Disk { file, frame, last } => {
                let read = file.read_at(frame.offset, frame.len as usize).await?;
                // What was truncated meanwhile must not be taken, and the file may have been used again.
                if !is_current(&journal.0.state.borrow(), shard, start, &frame, last) {
                    continue;
                }
                for entry in of_frame(&read, shard, &frame)? {
                    let index = entry.log_id.index;
                    if index == start && index <= last && index < end && bytes < limit {
                        bytes += bytes_of(&entry);
                        start += 1;
                        entries.push(entry);
                    }
                }
            }
        }
    }
}

fn source<D: Disk>(state: &State<D>, shard: u32, start: u64, end: u64, limit: usize) -> io::Result<Source<D>> {
    let log = &state.logs[&shard];
    if start >= log.first_kept() {
        let mut bytes = 0;
        let newest = log.kept(start, end).take_while(|entry| {
            let more = bytes < limit;
            bytes += bytes_of(entry);
            more
        });
        return Ok(Source::Memory(newest.cloned().collect()));
    }
    let run = state.writer.index().runs(shard, start).next();
    let run = run.ok_or_else(|| damaged(shard, "is in no frame"))?;
    let segment = state.segments.get(&run.frame.generation);
    let segment = segment.ok_or_else(|| damaged(shard, "is in a segment that is gone"))?;
    // The index may still know entries that the log has truncated since; none of those is below what is kept.
    let last = run.last.min(log.first_kept() - 1);
    Ok(Source::Disk {
        file: Rc::clone(&segment.file),
        frame: run.frame,
        last,
    })
}

fn is_current<D: Disk>(state: &State<D>, shard: u32, start: u64, frame: &Placement, last: u64) -> bool {
    let end = state
        .logs
        .get(&shard)
        .and_then(|log| log.last)
        .map_or(0, |last| last.index + 1);
    let run = state.writer.index().runs(shard, start).next();
    last < end && run.is_some_and(|run| run.frame == *frame && run.last >= last)
}

/// The entries of a shard in a frame, after whatever the same frame says about them.
fn of_frame(bytes: &[u8], shard: u32, placement: &Placement) -> io::Result<Vec<Entry>> {
    let frame = Frame::parse(bytes).map_err(|fault| damaged(shard, &fault.to_string()))?;
    if frame.sequence() != placement.sequence {
        return Err(damaged(shard, "is in a frame that was written over"));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for record in frame.records() {
        match record.map_err(|fault| damaged(shard, &fault.to_string()))? {
            Record::Entry {
                shard: of,
                log_id,
                kind,
                payload,
            } if of == shard => {
                let entry = from_record(log_id, kind, payload);
                entries.push(entry.ok_or_else(|| damaged(shard, "holds a membership of a newer release"))?);
            }
            Record::Truncate { shard: of, after } if of == shard => {
                let end = after.map_or(0, |after| after.index + 1);
                entries.retain(|entry| entry.log_id.index < end);
            }
            _ => {}
        }
    }
    Ok(entries)
}

fn damaged(shard: u32, what: &str) -> io::Error {
    let message = format!("an entry of shard {shard} that the journal held {what}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}
