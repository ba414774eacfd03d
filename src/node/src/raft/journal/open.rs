//! Opening a journal: its identity, its recovery, and the first segment of this run.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use generation_engine::journal::{
    BLOCK_BYTES, EntryKind, LogId, Placement, Record, Recovered, Recovery, RecoveryError, SegmentFile, SegmentHeader,
    Writer,
};

use super::log::{ShardLog, from_record};
use super::{IdentityError, Inner, Journal, JournalConfig, OpenError, Segment, State, flush};
use crate::env::disk::{Disk, File, Open};
use crate::raft::runtime::{Ambient, within};
use generation_engine::mutants::{Mutant, active};

/// Where everything lies.
const DIRECTORY: &str = "journal";
const IDENTITY: &str = "journal/identity";
const NEW_IDENTITY: &str = "journal/identity.new";
const SEGMENT_PREFIX: &str = "segment-";

pub(super) async fn open<D: Disk>(
    ambient: Rc<dyn Ambient>,
    disk: D,
    mut config: JournalConfig,
) -> Result<Journal<D>, OpenError> {
    config.identity.journal = identify(&*ambient, &disk, &config).await?;
    let mut segments = Vec::new();
    for name in disk.list(DIRECTORY).await.map_err(io_error("list", DIRECTORY))? {
        if name.starts_with(SEGMENT_PREFIX) {
            let path = format!("{DIRECTORY}/{name}");
            let file = disk.open(&path, Open::Write).await.map_err(io_error("open", &path))?;
            let file = Rc::new(file);
            segments.push(Segment { name: path, file });
        }
    }
    segments.sort_by(|a: &Segment<D>, b| a.name.cmp(&b.name));
    let (recovered, logs) = recover(&config, &segments).await?;
    if let Some((file, offset, fault)) = &recovered.torn {
        tracing::warn!(
            file = segments[*file].name,
            offset,
            %fault,
            dropped = recovered.dropped_frames,
            "the journal's tail was torn; nothing in it had been acknowledged"
        );
    }
    // What was read may still be in a volatile cache only.
    for segment in &segments {
        segment
            .file
            .sync_data()
            .await
            .map_err(io_error("sync", &segment.name))?;
    }
    let used: BTreeMap<usize, u64> = recovered
        .segments
        .iter()
        .map(|segment| (segment.file, segment.generation))
        .collect();
    let writer = Writer::resume(
        config.identity.journal,
        config.segment_bytes,
        recovered.index,
        recovered.next_sequence,
        recovered.next_generation,
    );
    let mut state = State::new(writer);
    state.logs = logs;
    state.idle_after = recovered.next_sequence - 1;
    state.next_file = segments
        .iter()
        .filter_map(|segment| number(&segment.name))
        .max()
        .map_or(0, |last| last + 1);
    for (file, segment) in segments.into_iter().enumerate() {
        match used.get(&file) {
            Some(generation) => {
                state.segments.insert(*generation, segment);
            }
            None => state.free.extend(whole(&disk, segment, config.segment_bytes).await?),
        }
    }
    // The newest names first: files are taken from the end.
    state.free.reverse();
    let journal = Journal(Rc::new(Inner {
        ambient: Rc::clone(&ambient),
        config,
        disk: Some(disk),
        state: RefCell::new(state),
    }));
    flush::grow(&journal)
        .await
        .map_err(io_error("allocate a segment in", DIRECTORY))?;
    let flusher = flush::run(journal.clone());
    ambient.spawn(Box::pin(within(Rc::clone(&ambient), flusher)));
    Ok(journal)
}

/// A file with nothing in it, at its full length: a crash may have come between its name and its space, and a write that needs more
/// would meet a full disk. `None`: there is no space for it, and it is gone.
async fn whole<D: Disk>(disk: &D, segment: Segment<D>, segment_bytes: u64) -> Result<Option<Segment<D>>, OpenError> {
    let allocated = async {
        if segment.file.len().await? < segment_bytes {
            segment.file.allocate(segment_bytes).await?;
            segment.file.sync_data().await?;
        }
        Ok::<(), io::Error>(())
    };
    match allocated.await {
        Ok(()) => Ok(Some(segment)),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            let removed = disk.remove(&segment.name).await;
            removed.map_err(io_error("remove", &segment.name)).map(|()| None)
        }
        Err(error) => Err(io_error("allocate", &segment.name)(error)),
    }
}

/// Reads the journal's id, or makes one where there is no journal.
async fn identify<D: Disk>(ambient: &dyn Ambient, disk: &D, config: &JournalConfig) -> Result<u128, OpenError> {
    disk.create_directory(DIRECTORY)
        .await
        .map_err(io_error("create", DIRECTORY))?;
    let names = disk.list(DIRECTORY).await.map_err(io_error("list", DIRECTORY))?;
    if names.iter().any(|name| name == "identity") {
        let read = async {
            let file = disk.open(IDENTITY, Open::Read).await?;
            file.read_at(0, BLOCK_BYTES).await
        };
        let bytes = read.await.map_err(io_error("read", IDENTITY))?;
        return Ok(config.identity.check(&bytes)?);
    }
    if names.iter().any(|name| name.starts_with(SEGMENT_PREFIX)) {
        return Err(IdentityError::Damaged.into());
    }
    let mut id = [0; 16];
    ambient.fill_random(&mut id);
    let mut identity = config.identity;
    identity.journal = u128::from_le_bytes(id);
    let write = async {
        if names.iter().any(|name| name == "identity.new") {
            disk.remove(NEW_IDENTITY).await?;
        }
        let file = disk.open(NEW_IDENTITY, Open::CreateNew).await?;
        file.write_at(0, &identity.encode()).await?;
        file.sync_data().await?;
        file.close().await?;
        disk.rename(NEW_IDENTITY, IDENTITY).await?;
        disk.sync_directory(DIRECTORY).await
    };
    write.await.map_err(io_error("write", IDENTITY))?;
    Ok(identity.journal)
}

/// Reads the segments back.
async fn recover<D: Disk>(
    config: &JournalConfig,
    segments: &[Segment<D>],
) -> Result<(Recovered, BTreeMap<u32, ShardLog>), OpenError> {
    let mut files = Vec::new();
    for (file, segment) in segments.iter().enumerate() {
        let head = segment.file.read_at(0, BLOCK_BYTES).await;
        let head = head.map_err(io_error("read", &segment.name))?;
        let header = SegmentHeader::decode(&head);
        files.push(SegmentFile { file, header });
    }
    let corrupt = |error: RecoveryError| {
        let file = file_of(&error).and_then(|file| segments.get(file));
        OpenError::Corrupt {
            file: file.map_or_else(|| DIRECTORY.to_owned(), |segment| segment.name.clone()),
            error,
        }
    };
    let mut recovery = Recovery::plan(config.identity.journal, &files).map_err(corrupt)?;
    let mut logs: BTreeMap<u32, ShardLog> = BTreeMap::new();
    let mut unreadable = None;
    while let Some(file) = recovery.next_file() {
        let segment = &segments[file];
        let bytes = async { segment.file.read_at(0, segment.file.len().await? as usize).await };
        let bytes = bytes.await.map_err(io_error("read", &segment.name))?;
        let fed = recovery.feed(&bytes, |placement, record| {
            if let Err(log_id) = replay(&mut logs, config.kept_bytes, placement, record) {
                unreadable.get_or_insert((file, log_id));
            }
        });
        fed.map_err(corrupt)?;
    }
    let recovered = recovery.finish().map_err(corrupt)?;
    if let Some((file, log_id)) = unreadable {
        let error = io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the membership in entry {} is of a newer release", log_id.index),
        );
        return Err(OpenError::Io {
            action: "read",
            path: segments[file].name.clone(),
            error,
        });
    }
    let mut logs_of_shards = BTreeMap::new();
    for state in recovered.index.shards() {
        let log = logs
            .remove(&state.shard)
            .unwrap_or_else(|| ShardLog::new(state.replica));
        let mut log = log.recovered(state);
        log.vote = log.vote.filter(|_| !active(Mutant::VoteForgotten));
        logs_of_shards.insert(state.shard, log);
    }
    Ok((recovered, logs_of_shards))
}

/// Keeps the newest entries of each shard. Everything else of the state comes from the index.
fn replay(
    logs: &mut BTreeMap<u32, ShardLog>,
    kept_bytes: usize,
    placement: Placement,
    record: &Record<'_>,
) -> Result<(), LogId> {
    match record {
        Record::Create { shard, replica } => {
            logs.insert(*shard, ShardLog::new(*replica));
        }
        Record::Retire { shard } => {
            logs.remove(shard);
        }
        Record::State(state) => {
            // The first checkpoint says what lies in segments that are gone.
            logs.entry(state.shard)
                .or_insert_with(|| ShardLog::new(state.replica).recovered(state));
        }
        Record::Entry {
            shard,
            log_id,
            kind,
            payload,
        } => {
            let Some(log) = logs.get_mut(shard) else {
                return Ok(());
            };
            let entry = from_record(*log_id, *kind, payload);
            debug_assert!(
                entry.is_some() || *kind == EntryKind::Membership,
                "only memberships are decoded"
            );
            log.append_sealed(entry.ok_or(*log_id)?, placement.sequence);
            log.shrink(kept_bytes, placement.sequence);
        }
        Record::Truncate { shard, after } => {
            if let Some(log) = logs.get_mut(shard) {
                log.truncate(*after);
            }
        }
        Record::Purge { shard, up_to } => {
            if let Some(log) = logs.get_mut(shard) {
                log.purge(*up_to);
            }
        }
        Record::Vote { .. } | Record::Committed { .. } => {}
    }
    Ok(())
}

/// The name of a segment file.
pub(super) fn segment_path(number: u64) -> String {
    format!("{DIRECTORY}/{SEGMENT_PREFIX}{number:08}")
}

/// The directory of segment files.
pub(super) fn directory() -> &'static str {
    DIRECTORY
}

fn number(path: &str) -> Option<u64> {
    path.rsplit_once('-').and_then(|(_, number)| number.parse().ok())
}

fn file_of(error: &RecoveryError) -> Option<usize> {
    match error {
        RecoveryError::Corruption(corruption) => Some(corruption.file),
        RecoveryError::ForeignJournal { file, .. }
        | RecoveryError::UnsupportedVersion { file, .. }
        | RecoveryError::Inconsistent { file, .. } => Some(*file),
        RecoveryError::Duplicate { files, .. } => Some(files[1]),
        RecoveryError::MissingSegment { file, .. } => *file,
        RecoveryError::Incomplete(_) => None,
    }
}

fn io_error(action: &'static str, path: &str) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |error| OpenError::Io { action, path, error }
}
