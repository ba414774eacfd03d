//! Reading a snapshot in order to send it. Every chunk is checked first: what the disk has spoilt never leaves.

use std::io;

use bytes::{Bytes, BytesMut};
use generation_engine::snapshot_file::{ChunkKind, Decoder};

use super::{SnapshotFile, damaged, read_chunk};
use crate::env::disk::Disk;
use crate::raft::runtime::yield_now;

/// A snapshot on its way out.
pub(crate) struct Outgoing<D: Disk> {
    snapshot: SnapshotFile<D>,
    file: D::File,
    decoder: Decoder,
    /// The bytes checked so far.
    offset: u64,
    complete: bool,
}

impl<D: Disk> Outgoing<D> {
    /// Begins to read. After an error here or in [`Outgoing::read`] the snapshot is marked as damaged, and another has to be taken.
    pub(crate) async fn open(snapshot: &SnapshotFile<D>) -> io::Result<Self> {
        let file = snapshot.open().await.inspect_err(|error| snapshot.spoilt(error))?;
        Ok(Self {
            snapshot: snapshot.clone(),
            file,
            decoder: Decoder::new(),
            offset: 0,
            complete: false,
        })
    }

    /// Whole chunks from `offset` on, `least_bytes` of them unless the snapshot ends before; nothing from its end on. What lies in
    /// front of `offset` is read and checked too, where that has not happened yet.
    pub(crate) async fn read(&mut self, offset: u64, least_bytes: usize) -> io::Result<Bytes> {
        if offset < self.offset {
            self.decoder = Decoder::new();
            (self.offset, self.complete) = (0, false);
        }
        let mut bytes = BytesMut::new();
        while bytes.len() < least_bytes && !self.complete {
            let begin = self.offset;
            let chunk = self.next().await.inspect_err(|error| self.snapshot.spoilt(error))?;
            if begin >= offset {
                bytes.extend_from_slice(&chunk);
            } else {
                // Other tasks have their turn between chunks that are only checked.
                yield_now().await;
            }
        }
        Ok(bytes.freeze())
    }

    async fn next(&mut self) -> io::Result<Vec<u8>> {
        let offset = self.offset;
        let chunk = read_chunk(&self.file, offset).await?;
        let chunk = chunk.ok_or_else(|| damaged(&format!("it ends at offset {offset}, before its footer")))?;
        let taken = self.decoder.chunk(&chunk);
        let (kind, _) = taken.map_err(|fault| damaged(&format!("{fault} at offset {offset}")))?;
        self.complete = kind == ChunkKind::Footer;
        self.offset += chunk.len() as u64;
        Ok(chunk)
    }
}
