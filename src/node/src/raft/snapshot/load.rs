//! Reading a snapshot back into a state.

use std::io;

use generation_engine::machine::{Head, Machine};
use generation_engine::session::SessionTable;
use generation_engine::snapshot_file::{ChunkKind, Decoder};
use generation_engine::{Restore, Shard, ShardConfig, SnapshotEntry, Version};

use super::{ENTRY_BYTES, SnapshotFile, damaged, decode_state, meta, read_chunk};
use crate::env::disk::Disk;
use crate::raft::machine::MachineConfig;
use crate::raft::runtime::yield_now;
use crate::raft::types::SnapshotMeta;
use generation_engine::mutants::{Mutant, active, spoils_snapshots};

/// A state as a snapshot has it.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) machine: Machine,
    pub(crate) meta: SnapshotMeta,
}

/// What has been put together so far.
struct Parts {
    head: Head,
    sessions: SessionTable,
    restore: Restore,
}

/// Reads a snapshot whole, checking everything that can be checked.
pub(crate) async fn load<D: Disk>(config: &MachineConfig, snapshot: &SnapshotFile<D>) -> io::Result<Loaded> {
    let file = snapshot.open().await?;
    let mut decoder = Decoder::new();
    let mut parts = None;
    let mut offset = 0;
    while decoder.summary().is_none() {
        let chunk = read_chunk(&file, offset).await?;
        let chunk = chunk.ok_or_else(|| damaged(&format!("it ends at offset {offset}, before its footer")))?;
        let taken = decoder.chunk(&chunk);
        let (kind, payload) = taken.map_err(|fault| damaged(&format!("{fault} at offset {offset}")))?;
        take(config, &mut parts, kind, payload)?;
        offset += chunk.len() as u64;
        yield_now().await;
    }
    let summary = decoder.summary().expect("invariant: the loop ends with the footer");
    let Parts {
        head,
        sessions,
        restore,
    } = parts.ok_or_else(|| damaged("it has no state"))?;
    let shard = restore.finish().map_err(|error| damaged(&error.to_string()))?;
    let next_replica_id = if active(Mutant::IdNotInSnapshot) {
        config.next_replica_id
    } else {
        head.next_replica_id
    };
    let machine = Machine::from_parts(shard, sessions, next_replica_id);
    if machine.state_hash() != summary.state_hash && !spoils_snapshots() {
        return Err(damaged("its state is not the one its footer describes"));
    }
    Ok(Loaded {
        machine,
        meta: meta(&summary.header, config.cluster, config.shard)?,
    })
}

fn take(config: &MachineConfig, parts: &mut Option<Parts>, kind: ChunkKind, payload: &[u8]) -> io::Result<()> {
    match (kind, parts) {
        (ChunkKind::Header | ChunkKind::Footer, _) => {}
        (ChunkKind::State, parts @ None) => {
            let (entries, head) = decode_state(payload)?;
            let shard = ShardConfig {
                budget_bytes: head.configuration.budget_bytes,
                max_records: head.configuration.max_records,
                policy: head.configuration.policy,
                ..config.shard_config
            };
            *parts = Some(Parts {
                restore: Shard::restore(shard, entries),
                sessions: SessionTable::new(head.configuration.sessions),
                head,
            });
        }
        (ChunkKind::Sessions, Some(parts)) => {
            let loaded = parts.sessions.load(payload);
            loaded.map_err(|error| damaged(&error.to_string()))?;
        }
        (ChunkKind::Entries, Some(parts)) => {
            let mut rest = payload;
            while !rest.is_empty() {
                let (entry, after) = decode_entry(rest).ok_or_else(|| damaged("an entry is cut short"))?;
                let pushed = parts.restore.push(&entry);
                pushed.map_err(|error| damaged(&error.to_string()))?;
                rest = after;
            }
        }
        (ChunkKind::State, Some(_)) | (_, None) => return Err(damaged("its chunks are out of order")),
    }
    Ok(())
}

fn decode_entry(bytes: &[u8]) -> Option<(SnapshotEntry<'_>, &[u8])> {
    let (head, rest) = bytes.split_at_checked(ENTRY_BYTES)?;
    let key_len = usize::from(u16::from_le_bytes([head[0], head[1]]));
    let value_len = u32::from_le_bytes(head[2..6].try_into().expect("invariant: four bytes")) as usize;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("invariant: eight bytes"));
    let (key, rest) = rest.split_at_checked(key_len)?;
    let (value, rest) = rest.split_at_checked(value_len)?;
    let entry = SnapshotEntry {
        key,
        value,
        version: Version::from(if active(Mutant::VersionNotInSnapshot) {
            1 << 16
        } else {
            word(6)
        }),
        expires_at_ms: word(14),
        recency: head[22],
    };
    Some((entry, rest))
}
