//! Taking a snapshot: slices of the image become chunks, chunks become a file, at the pace that [`Pace`] allows.

use std::io;
use std::rc::Rc;

use generation_engine::snapshot_file::{ChunkKind, Encoder, SnapshotHeader};
use generation_engine::{Progress, SnapshotEntry};

use super::pace::Pace;
use super::{DIRECTORY, ENTRY_BYTES, SnapshotFile, encode_membership, encode_state, path};
use crate::env::disk::{Disk, File, Open};
use crate::points;
use crate::raft::machine::Shared;
use crate::raft::types::{SnapshotMeta, to_journal};
use generation_engine::mutants::{Mutant, active};

/// Bytes of a chunk of entries or sessions, roughly: a page of large values makes it longer.
const CHUNK_BYTES: usize = 128 << 10;

/// Entries visited before other tasks get a turn.
const SLICE_RECORDS: usize = 256;

/// Bytes written between syncs: a disk that has to make much durable at once keeps the journal's next sync waiting.
const SYNC_BYTES: u64 = 4 << 20;

/// An image under way: what it is of, and of which incarnation of the state.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) meta: SnapshotMeta,
    pub(crate) generation: u64,
}

/// Writes the image that was begun. `Ok(None)`: the state was replaced meanwhile by a newer snapshot. After an error nothing of the
/// file is left, as far as the disk lets it be removed, and the image was given up.
pub(crate) async fn write<D: Disk>(shared: &Rc<Shared<D>>, image: &Image) -> io::Result<Option<SnapshotFile<D>>> {
    let disk = shared.disk();
    let mut id = [0; 16];
    shared.ambient().fill_random(&mut id);
    let id = u128::from_le_bytes(id);
    let index = image.meta.last_log_id.as_ref().map(|log_id| log_id.index);
    let done = path(shared.config().shard, index, id);
    let unfinished = format!("{done}.new");
    let result = file(shared, image, id, &unfinished).await;
    match result {
        Ok(true) => {}
        Ok(false) => {
            disk.remove(&unfinished).await?;
            return Ok(None);
        }
        Err(error) => {
            shared.abandon(image);
            // The error to report is the first one.
            let _ = disk.remove(&unfinished).await;
            return Err(error);
        }
    }
    D::point(points::SNAPSHOT_SYNCED);
    disk.rename(&unfinished, &done).await?;
    D::point(points::SNAPSHOT_RENAMED);
    disk.sync_directory(DIRECTORY).await?;
    D::point(points::SNAPSHOT_DURABLE);
    Ok(Some(SnapshotFile {
        disk: disk.clone(),
        path: done.into(),
        id,
        meta: image.meta.clone(),
        damage: Rc::default(),
    }))
}

/// Whether the whole image was written and synced.
async fn file<D: Disk>(shared: &Rc<Shared<D>>, image: &Image, id: u128, path: &str) -> io::Result<bool> {
    let file = shared.disk().open(path, Open::CreateNew).await?;
    let header = SnapshotHeader {
        cluster: shared.config().cluster,
        shard: shared.config().shard,
        epoch: shared.config().epoch,
        last_log_id: image.meta.last_log_id.as_ref().map(to_journal),
        membership: encode_membership(&image.meta.last_membership),
    };
    let mut out = Vec::new();
    let mut encoder = Encoder::begin(id, &header, &mut out).map_err(io::Error::other)?;
    let Some((entries, head, state_hash)) = shared.heads(image) else {
        return Ok(false);
    };
    let chunk = encoder.chunk(ChunkKind::State, &mut out, |out| encode_state(&entries, &head, out));
    chunk.map_err(io::Error::other)?;
    let hurries = || shared.hurries();
    let mut pace = Pace::new(shared.ambient(), &hurries);
    let (mut offset, mut synced) = (0, 0);
    let mut payload = Vec::new();
    let mut done = Progress::More;
    for kind in [ChunkKind::Sessions, ChunkKind::Entries] {
        loop {
            while payload.len() < CHUNK_BYTES && done == Progress::More {
                let slice = shared.with_image(image, |machine| match kind {
                    ChunkKind::Sessions => machine.sessions_mut().image_slice(CHUNK_BYTES, &mut payload),
                    _ => machine
                        .shard_mut()
                        .snapshot_slice(SLICE_RECORDS, |entry| encode_entry(&entry, &mut payload)),
                });
                let Some(slice) = slice else { return Ok(false) };
                done = slice;
                pace.rest().await;
            }
            if !payload.is_empty() {
                encoder
                    .chunk(kind, &mut out, |out| out.append(&mut payload))
                    .map_err(io::Error::other)?;
                file.write_at(offset, &out).await?;
                D::point(points::SNAPSHOT_SLICE);
                offset += out.len() as u64;
                out.clear();
                if offset - synced >= SYNC_BYTES && !active(Mutant::SnapshotUnsynced) {
                    file.sync_data().await?;
                    synced = offset;
                }
                pace.rest().await;
            }
            if done == Progress::Done {
                break;
            }
        }
        done = Progress::More;
    }
    encoder.finish(state_hash, &mut out);
    file.write_at(offset, &out).await?;
    D::point(points::SNAPSHOT_WRITTEN);
    if !active(Mutant::SnapshotUnsynced) {
        file.sync_data().await?;
    }
    file.close().await?;
    Ok(true)
}

fn encode_entry(entry: &SnapshotEntry<'_>, out: &mut Vec<u8>) {
    out.reserve(ENTRY_BYTES + entry.key.len() + entry.value.len());
    out.extend((entry.key.len() as u16).to_le_bytes());
    out.extend((entry.value.len() as u32).to_le_bytes());
    out.extend(entry.version.get().to_le_bytes());
    let lasting = active(Mutant::TtlNotInSnapshot);
    out.extend(if lasting { 0 } else { entry.expires_at_ms }.to_le_bytes());
    out.push(entry.recency);
    out.extend_from_slice(entry.key);
    out.extend_from_slice(entry.value);
}
