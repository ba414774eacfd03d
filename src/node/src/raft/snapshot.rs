//! Snapshots of shards: taken in slices while the shard serves, kept as files, sent as they are to a follower that lags.
//!
//! The container, its chunks and their checksums are [`generation_engine::snapshot_file`]'s. This module gives the payloads their
//! format and does the I/O.
//!
//! # Payloads, version 1
//! All numbers are little-endian. A *log id* is u64 term, u64 leader, u64 index.
//! ```text
//! membership (in the header chunk)
//!    0  u8    1 if an entry of the log said so, else 0
//!    1  log id of that entry (zeros if none)
//!   25  the membership, as in the log
//!
//! state chunk
//!    0  u64   number of entries
//!    8  u64   what they count against the budget
//!   16  u128  digest of the entries
//!   32  u64   bytes above the budget that a cut of it left behind
//!   40  u64   records above it
//!   48  the rest of the state, as `generation_engine::machine` has it
//!
//! entries chunk: one after the other
//!    0  u16   key length
//!    2  u32   value length
//!    6  u64   version
//!   14  u64   expires_at_ms, 0 = never
//!   22  u8    recency, 0 (cold) to 7
//!   23  key, value
//! ```
//!
//! # Files
//! `snapshots/SHARD-INDEX-ID.snapshot`, in hexadecimal but for the shard; `.new` behind it until it is complete and durable.
//!
//! # What holds
//! - A name without `.new` is a complete, synced snapshot.
//! - Only what is newer takes the place of a sound snapshot, and the old one is removed when the new one is durable.
//! - A chunk is checked whenever it is read. A snapshot that does not stand that is marked, by whoever reads it, and not read again.

mod load;
mod pace;
mod receive;
mod send;
mod write;

use std::cell::OnceCell;
use std::io;
use std::rc::Rc;

use generation_engine::machine::Head;
use generation_engine::snapshot_file::{CHUNK_HEADER_BYTES, Decoder, SnapshotHeader, chunk_len};
use generation_engine::{SnapshotHead, Tolerated};

use super::membership;
use super::types::{LogId, SnapshotMeta, StoredMembership, from_journal, to_journal};
use crate::env::disk::{Disk, File, Open};

pub(crate) use load::load;
pub(crate) use receive::{Expected, Incoming};
pub(crate) use send::Outgoing;
pub(crate) use write::{Image, write};

/// Where snapshots lie.
pub(crate) const DIRECTORY: &str = "snapshots";

/// What the state chunk begins with.
const STATE_BYTES: usize = 48;

/// What an entry takes beside key and value.
const ENTRY_BYTES: usize = 23;

/// A snapshot on the disk.
#[derive(Debug)]
pub struct SnapshotFile<D: Disk> {
    pub(crate) disk: D,
    pub(crate) path: Rc<str>,
    /// Drawn at random when it was begun.
    pub(crate) id: u128,
    pub(crate) meta: SnapshotMeta,
    /// Why it is not to be read any more, if it is not. Clones share it.
    pub(crate) damage: Rc<OnceCell<String>>,
}

impl<D: Disk> Clone for SnapshotFile<D> {
    fn clone(&self) -> Self {
        Self {
            disk: self.disk.clone(),
            path: Rc::clone(&self.path),
            id: self.id,
            meta: self.meta.clone(),
            damage: Rc::clone(&self.damage),
        }
    }
}

impl<D: Disk> SnapshotFile<D> {
    /// Index of the last entry it contains; `None` before the first.
    pub(crate) fn index(&self) -> Option<u64> {
        self.meta.last_log_id.as_ref().map(|log_id| log_id.index)
    }

    /// Whether nothing wrong has been found with it so far.
    pub(crate) fn is_sound(&self) -> bool {
        self.damage.get().is_none()
    }

    /// Notes that another is in its place, and that its file goes.
    pub(crate) fn replaced(&self) {
        // What was wrong with it before matters no more.
        let _ = self.damage.set("another has been taken meanwhile".to_owned());
    }

    /// Marks it as damaged, unless it was replaced.
    pub(crate) fn spoilt(&self, error: &io::Error) {
        if self.damage.set(error.to_string()).is_ok() {
            tracing::error!(path = &*self.path, %error, "a snapshot is damaged: check the disk; another is written");
        }
    }

    /// Opens it for reading.
    pub(crate) async fn open(&self) -> io::Result<D::File> {
        self.disk.open(&self.path, Open::Read).await
    }
}

/// Reads the chunk at `offset`, whole. `None`: the file ends there.
pub(crate) async fn read_chunk(file: &impl File, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let mut chunk = file.read_at(offset, crate::env::disk::BLOCK_BYTES).await?;
    if chunk.is_empty() {
        return Ok(None);
    }
    let head = chunk.get(..CHUNK_HEADER_BYTES).unwrap_or_default();
    let len = chunk_len(head).map_err(|fault| damaged(&format!("{fault} at offset {offset}")))?;
    if len > chunk.len() {
        let rest = file.read_at(offset + chunk.len() as u64, len - chunk.len()).await?;
        chunk.extend_from_slice(&rest);
    }
    chunk.truncate(len);
    Ok(Some(chunk))
}

/// The name of a complete snapshot.
pub(crate) fn path(shard: u32, index: Option<u64>, id: u128) -> String {
    let index = index.map_or(0, |index| index + 1);
    format!("{DIRECTORY}/{shard:05}-{index:012x}-{id:032x}.snapshot")
}

/// Finds the newest snapshot of a shard and removes what is older or was never completed.
pub(crate) async fn find<D: Disk>(disk: &D, cluster: u128, shard: u32) -> io::Result<Option<SnapshotFile<D>>> {
    disk.create_directory(DIRECTORY).await?;
    let prefix = format!("{shard:05}-");
    let mut names = disk.list(DIRECTORY).await?;
    names.retain(|name| name.starts_with(&prefix));
    let (mut complete, unfinished): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.ends_with(".snapshot"));
    // Hexadecimal of one length: the order of names is the order of indexes.
    complete.sort();
    let newest = complete.pop();
    for name in complete.iter().chain(&unfinished) {
        disk.remove(&format!("{DIRECTORY}/{name}")).await?;
    }
    let Some(newest) = newest else { return Ok(None) };
    let path = format!("{DIRECTORY}/{newest}");
    let file = disk.open(&path, Open::Read).await?;
    let mut decoder = Decoder::new();
    let chunk = read_chunk(&file, 0).await?.ok_or_else(|| damaged("it is empty"))?;
    decoder.chunk(&chunk).map_err(|fault| damaged(&fault.to_string()))?;
    let header = decoder.header().ok_or_else(|| damaged("it has no header"))?;
    let meta = meta(header, cluster, shard)?;
    let id = decoder.resume().map_or(0, |resume| resume.id);
    Ok(Some(SnapshotFile {
        disk: disk.clone(),
        path: path.into(),
        id,
        meta,
        damage: Rc::default(),
    }))
}

/// Removes every snapshot of the core.
pub(crate) async fn remove_all<D: Disk>(disk: &D) -> io::Result<()> {
    remove(disk, "").await
}

/// Removes the snapshots of a shard.
pub(crate) async fn remove_of<D: Disk>(disk: &D, shard: u32) -> io::Result<()> {
    remove(disk, &format!("{shard:05}-")).await
}

async fn remove<D: Disk>(disk: &D, prefix: &str) -> io::Result<()> {
    for name in disk.list(DIRECTORY).await? {
        if name.starts_with(prefix) {
            disk.remove(&format!("{DIRECTORY}/{name}")).await?;
        }
    }
    Ok(())
}

/// What a snapshot is of, if it is of this shard.
pub(crate) fn meta(header: &SnapshotHeader, cluster: u128, shard: u32) -> io::Result<SnapshotMeta> {
    if (header.cluster, header.shard) != (cluster, shard) {
        return Err(damaged("it is of another shard or cluster"));
    }
    let last_membership =
        decode_membership(&header.membership).ok_or_else(|| damaged("its membership is malformed"))?;
    Ok(SnapshotMeta {
        last_log_id: header.last_log_id.map(from_journal),
        last_membership,
    })
}

pub(crate) fn damaged(what: &str) -> io::Error {
    let message = format!("a snapshot cannot be used: {what}; remove it and let the replica join again");
    io::Error::new(io::ErrorKind::InvalidData, message)
}

pub(crate) fn encode_membership(stored: &StoredMembership) -> Vec<u8> {
    let mut out = vec![u8::from(stored.log_id().is_some())];
    let log_id = stored.log_id().as_ref().map(to_journal);
    let fields = log_id.map_or([0; 3], |log_id| [log_id.term, log_id.leader, log_id.index]);
    for field in fields {
        out.extend(field.to_le_bytes());
    }
    out.extend(membership::encode(stored.membership()));
    out
}

pub(crate) fn decode_membership(bytes: &[u8]) -> Option<StoredMembership> {
    let (head, rest) = bytes.split_at_checked(25)?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("invariant: eight bytes"));
    let log_id = generation_engine::journal::LogId {
        term: word(1),
        leader: word(9),
        index: word(17),
    };
    let log_id: Option<LogId> = match head[0] {
        0 => None,
        1 => Some(from_journal(log_id)),
        _ => return None,
    };
    Some(StoredMembership::new(log_id, membership::decode(rest)?))
}

fn encode_state(entries: &SnapshotHead, head: &Head, out: &mut Vec<u8>) {
    out.extend(entries.records.to_le_bytes());
    out.extend(entries.used_bytes.to_le_bytes());
    out.extend(entries.state_hash.to_le_bytes());
    out.extend(entries.tolerated.bytes.to_le_bytes());
    out.extend(entries.tolerated.records.to_le_bytes());
    head.encode(out);
}

fn decode_state(payload: &[u8]) -> io::Result<(SnapshotHead, Head)> {
    let (entries, head) = payload
        .split_at_checked(STATE_BYTES)
        .ok_or_else(|| damaged("its state is cut short"))?;
    let head = Head::decode(head).map_err(|error| damaged(&error.to_string()))?;
    let word = |at: usize| u64::from_le_bytes(entries[at..at + 8].try_into().expect("invariant: eight bytes"));
    let entries = SnapshotHead {
        index: head.index,
        time_ms: head.time_ms,
        records: word(0),
        used_bytes: word(8),
        state_hash: u128::from(word(16)) | u128::from(word(24)) << 64,
        tolerated: Tolerated {
            bytes: word(32),
            records: word(40),
        },
    };
    Ok((entries, head))
}
