//! `generation snapshot`: has the nodes take snapshots, and reads those in a node's data directory, without the node.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use futures_util::future::join_all;
use generation_client::Client;
use generation_node::raft::snapshot_file::{CHUNK_HEADER_BYTES, ChunkFault, Decoder, Summary, VerifyError, chunk_len};
use serde_json::{Value, json};

use super::connection::{Connection, block_on, positive_duration};
use super::{Exit, Failure, Globals, serve};

/// What the name of a complete snapshot ends with.
const ENDING: &str = "snapshot";

/// Options of `generation snapshot`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation snapshot now\n  \
    generation snapshot now --shard 3 --json\n  \
    generation snapshot list generation-data\n  \
    generation snapshot verify generation-data\n  \
    generation snapshot verify generation-data/core-0/snapshots/*.snapshot --json\n\n\
    Nodes take snapshots by themselves; `now` is for the moment before a copy of a disk is made. A damaged one ends `verify` with exit code 7; a node fetches the shard from the others then.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Have every node write a snapshot of every shard it holds, and wait until they are durable.
    Now(Now),
    /// Say which snapshots there are, by their first chunks.
    List(Paths),
    /// Check every checksum of snapshots, and that they are complete.
    Verify(Paths),
}

/// Taking snapshots. It needs an administrator's certificate, such as the one `generation dev` writes.
#[derive(Debug, clap::Args)]
struct Now {
    #[command(flatten)]
    connection: Connection,
    /// Only of this shard (repeatable).
    #[arg(long = "shard", value_name = "SHARD")]
    shards: Vec<u16>,
    /// How long one snapshot may take.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = positive_duration)]
    wait: Duration,
}

#[derive(Debug, clap::Args)]
struct Paths {
    /// Snapshots, or directories in which they are looked for, such as a node's data directory.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Runs `generation snapshot`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    let (paths, whole) = match &args.command {
        Command::Now(now) => return now.run(globals),
        Command::List(Paths { paths }) => (paths, false),
        Command::Verify(Paths { paths }) => (paths, true),
    };
    let mut files = Vec::new();
    for path in paths {
        find(path, &mut files).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    }
    files.sort();
    let mut damaged = Vec::new();
    for file in &files {
        match read(file, whole) {
            Ok(snapshot) => {
                serve::print(&if globals.json {
                    format!("{}\n", snapshot.json(file))
                } else {
                    format!("{}\n", snapshot.text(file))
                })?;
            }
            Err(ReadError::Damaged(error)) => damaged.push(format!("{}: {error}", file.display())),
            Err(ReadError::Io(error)) => {
                return Err(Failure::new(Exit::Rejected, format!("{}: {error}", file.display())));
            }
        }
    }
    if damaged.is_empty() {
        return Ok(Exit::Ok);
    }
    Err(Failure::new(Exit::Corruption, damaged.join("\n")))
}

impl Now {
    fn run(&self, globals: &Globals) -> Result<Exit, Failure> {
        let failures = block_on(async {
            let client = self.connection.connect().await?;
            let map = client.map().await?;
            if let Some(shard) = self
                .shards
                .iter()
                .find(|shard| usize::from(**shard) >= map.shards.len())
            {
                let last = map.shards.len() - 1;
                return Err(Failure::usage(format!(
                    "there is no shard {shard}; shards are 0 to {last}"
                )));
            }
            let nodes = map.nodes.iter().map(|node| {
                let held = map.shards.iter().enumerate().filter(|(number, shard)| {
                    let asked = self.shards.is_empty() || self.shards.contains(&(*number as u16));
                    asked && shard.replicas.iter().any(|replica| replica.node == node.id)
                });
                let held = held.map(|(number, _)| number as u16).collect();
                self.of_node(&client, node.id, held, globals)
            });
            let failures: Vec<Failure> = join_all(nodes).await.into_iter().filter_map(Result::err).collect();
            client.close().await;
            Ok(failures)
        })?;
        let messages: Vec<&str> = failures.iter().map(|failure| &*failure.message).collect();
        let message = messages.join("\n");
        match failures.into_iter().next() {
            None => Ok(Exit::Ok),
            Some(first) => Err(Failure { message, ..first }),
        }
    }

    /// Has one node take its snapshots, one after the other: its disk is one.
    async fn of_node(&self, client: &Client, node: u64, shards: Vec<u16>, globals: &Globals) -> Result<(), Failure> {
        for shard in shards {
            let taken = client.take_snapshot(node, shard, self.wait).await;
            let index = taken.map_err(|error| {
                let failure = Failure::from(error);
                let message = format!("node {node}, shard {shard}: {}", failure.message);
                Failure { message, ..failure }
            })?;
            serve::print(&if globals.json {
                let index = index.to_string();
                format!("{}\n", json!({ "node": node, "shard": shard, "index": index }))
            } else {
                format!("node {node}, shard {shard}: up to index {index}\n")
            })?;
        }
        Ok(())
    }
}

/// Adds the snapshots at a path: itself, or those in the directory and below.
fn find(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !fs::metadata(path)?.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        // Symbolic links are not followed, so the search ends.
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if entry.path().extension().is_some_and(|ending| ending == ENDING) {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// What was read of a snapshot.
struct Snapshot {
    decoder: Decoder,
    len_bytes: u64,
}

/// Why a snapshot was not read.
#[derive(Debug)]
enum ReadError {
    Io(io::Error),
    Damaged(VerifyError),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads a snapshot chunk by chunk: the first one, or all.
fn read(path: &Path, whole: bool) -> Result<Snapshot, ReadError> {
    let mut file = File::open(path)?;
    let len_bytes = file.metadata()?.len();
    let mut decoder = Decoder::new();
    let mut offset = 0;
    let mut chunk = Vec::new();
    loop {
        let damaged = |fault| ReadError::Damaged(VerifyError { offset, fault });
        let left = len_bytes.saturating_sub(offset);
        chunk.resize(CHUNK_HEADER_BYTES.min(usize::try_from(left).unwrap_or(usize::MAX)), 0);
        file.read_exact(&mut chunk)?;
        // Bounded before anything is allocated for it.
        let len = chunk_len(&chunk).map_err(damaged)?;
        if len as u64 > left {
            return Err(damaged(ChunkFault::Length));
        }
        file.seek(SeekFrom::Start(offset))?;
        chunk.resize(len, 0);
        file.read_exact(&mut chunk)?;
        decoder.chunk(&chunk).map_err(damaged)?;
        offset += len as u64;
        let complete = decoder.summary().is_some();
        if complete && offset < len_bytes {
            let fault = ChunkFault::Length;
            return Err(ReadError::Damaged(VerifyError { offset, fault }));
        }
        if complete || !whole {
            return Ok(Snapshot { decoder, len_bytes });
        }
    }
}

impl Snapshot {
    fn summary(&self) -> Option<Summary> {
        self.decoder.summary()
    }

    fn json(&self, path: &Path) -> Value {
        let header = self.decoder.header();
        let last = header.and_then(|header| header.last_log_id);
        let summary = self.summary();
        json!({
            "file": path,
            "shard": header.map(|header| header.shard),
            "epoch": header.map(|header| header.epoch),
            "cluster": header.map(|header| format!("{:032x}", header.cluster)),
            "index": last.map_or(0, |last| last.index).to_string(),
            "term": last.map_or(0, |last| last.term).to_string(),
            "bytes": self.len_bytes.to_string(),
            "chunks": summary.as_ref().map(|summary| summary.chunks.to_string()),
            "state_hash": summary.map(|summary| format!("{:032x}", summary.state_hash)),
        })
    }

    fn text(&self, path: &Path) -> String {
        let header = self.decoder.header();
        let last = header.and_then(|header| header.last_log_id);
        let mut text = format!(
            "{}: shard {}, index {}, term {}, {}",
            path.display(),
            header.map_or(0, |header| header.shard),
            last.map_or(0, |last| last.index),
            last.map_or(0, |last| last.term),
            ByteSize::b(self.len_bytes).display().iec(),
        );
        if let Some(summary) = self.summary() {
            use std::fmt::Write as _;
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                ", sound, {} chunks, state {:032x}",
                summary.chunks, summary.state_hash
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use generation_node::raft::snapshot_file::{ChunkKind, Encoder, SnapshotHeader};

    use super::*;

    fn encoded() -> Vec<u8> {
        let header = SnapshotHeader {
            cluster: 7,
            shard: 3,
            epoch: 1,
            last_log_id: None,
            membership: Vec::new(),
        };
        let mut bytes = Vec::new();
        let mut encoder = Encoder::begin(9, &header, &mut bytes).unwrap();
        for part in [&[1; 5000][..], &[2; 10]] {
            encoder
                .chunk(ChunkKind::Entries, &mut bytes, |payload| {
                    payload.extend_from_slice(part);
                })
                .unwrap();
        }
        encoder.finish(0xabc, &mut bytes);
        bytes
    }

    #[test]
    fn a_sound_snapshot_is_found_and_summed_up() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("core-0/snapshots");
        fs::create_dir_all(&inner).unwrap();
        let path = inner.join("a.snapshot");
        fs::write(&path, encoded()).unwrap();
        fs::write(inner.join("b.snapshot.new"), "unfinished").unwrap();
        let mut files = Vec::new();
        find(directory.path(), &mut files).unwrap();
        assert_eq!(files, std::slice::from_ref(&path));
        let listed = read(&path, false).unwrap().json(&path);
        assert_eq!((&listed["shard"], &listed["chunks"]), (&json!(3), &Value::Null));
        let verified = read(&path, true).unwrap().json(&path);
        assert_eq!(verified["chunks"], "4");
        assert!(verified["state_hash"].as_str().unwrap().ends_with("abc"));
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snapshot");
        let good = encoded();
        for at in (0..good.len()).step_by(97) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(matches!(read(&path, true), Err(ReadError::Damaged(_))), "byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(matches!(read(&path, true), Err(ReadError::Damaged(_))), "cut at {at}");
        }
        fs::write(&path, [&good[..], &[0; 4096]].concat()).unwrap();
        assert!(
            matches!(read(&path, true), Err(ReadError::Damaged(_))),
            "more behind it"
        );
    }
}
