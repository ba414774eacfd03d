//! Receiving a leader's snapshot, chunk by chunk, into a file.

use std::io;
use std::rc::Rc;

use generation_engine::snapshot_file::{Decoder, chunk_len};

use super::{DIRECTORY, SnapshotFile, damaged, meta, path};
use crate::env::disk::{Disk, File, Open};
use crate::points;
use generation_engine::mutants::{Mutant, active};

/// What a receiver waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The chunk at this offset.
    Offset(u64),
    /// Nothing: it is complete.
    Complete,
}

/// A snapshot on its way in.
pub(crate) struct Incoming<D: Disk> {
    disk: D,
    cluster: u128,
    shard: u32,
    path: String,
    file: D::File,
    decoder: Decoder,
    id: u128,
    offset: u64,
}

impl<D: Disk> Incoming<D> {
    /// Begins one. `id` tells it from others that were begun.
    pub(crate) async fn begin(disk: &D, cluster: u128, shard: u32, id: u128) -> io::Result<Self> {
        disk.create_directory(DIRECTORY).await?;
        let path = format!("{DIRECTORY}/{shard:05}-incoming-{id:032x}.new");
        // One that was begun under this id before. What cannot be removed is what opening then reports.
        let _ = disk.remove(&path).await;
        let file = disk.open(&path, Open::CreateNew).await?;
        Ok(Self {
            disk: disk.clone(),
            cluster,
            shard,
            path,
            file,
            decoder: Decoder::new(),
            id,
            offset: 0,
        })
    }

    /// Which one it is.
    pub(crate) fn id(&self) -> u128 {
        self.id
    }

    /// The bytes taken so far.
    pub(crate) fn end(&self) -> u64 {
        self.offset
    }

    /// What comes next.
    pub(crate) fn expected(&self) -> Expected {
        match self.decoder.summary() {
            Some(_) => Expected::Complete,
            None => Expected::Offset(self.offset),
        }
    }

    /// Takes whole chunks that lie at `offset`. Those that do not come next are passed over: the sender learns from
    /// [`Incoming::expected`] where to go on.
    pub(crate) async fn take(&mut self, offset: u64, chunks: &[u8]) -> io::Result<()> {
        if self.expected() != Expected::Offset(offset) {
            return Ok(());
        }
        let mut rest = chunks;
        while !rest.is_empty() {
            let len = chunk_len(rest).map_err(|fault| damaged(&fault.to_string()))?;
            let (chunk, after) = rest
                .split_at_checked(len)
                .ok_or_else(|| damaged("a chunk is cut short"))?;
            self.decoder.chunk(chunk).map_err(|fault| damaged(&fault.to_string()))?;
            rest = after;
        }
        self.file.write_at(offset, chunks).await?;
        D::point(points::RECEIVED_SLICE);
        self.offset += chunks.len() as u64;
        Ok(())
    }

    /// Makes what is complete durable.
    pub(crate) async fn finish(self) -> io::Result<SnapshotFile<D>> {
        let summary = self.decoder.summary().ok_or_else(|| damaged("it is not complete"))?;
        let meta = meta(&summary.header, self.cluster, self.shard)?;
        if !active(Mutant::ReceivedUnsynced) {
            self.file.sync_data().await?;
        }
        self.file.close().await?;
        let index = meta.last_log_id.as_ref().map(|log_id| log_id.index);
        let path = path(self.shard, index, summary.id);
        D::point(points::RECEIVED_SYNCED);
        self.disk.rename(&self.path, &path).await?;
        D::point(points::RECEIVED_RENAMED);
        self.disk.sync_directory(DIRECTORY).await?;
        Ok(SnapshotFile {
            disk: self.disk,
            path: path.into(),
            id: summary.id,
            meta,
            damage: Rc::default(),
        })
    }
}
