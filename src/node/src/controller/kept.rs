//! The records as a core keeps them on its disk, for the time until it has heard from somebody after a start.
//!
//! The file is padded with zeros to whole blocks: u32 length, then the records, which carry a checksum.

use std::io::{self, ErrorKind};

use generation_engine::cluster::Cluster;

use crate::env::disk::{BLOCK_BYTES, Disk, File as _, Open};

const FILE: &str = "cluster/records";
const NEW_FILE: &str = "cluster/records.new";
const DIRECTORY: &str = "cluster";

/// Reads what was kept last. Without a file, or with one that cannot be read, nothing is known: the others are asked.
pub(crate) async fn load<D: Disk>(disk: &D) -> io::Result<Cluster> {
    let file = match disk.open(FILE, Open::Read).await {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Cluster::new()),
        Err(error) => return Err(error),
    };
    let len = file.len().await?;
    let bytes = file.read_at(0, usize::try_from(len).unwrap_or(usize::MAX)).await?;
    file.close().await?;
    let records = bytes.split_at_checked(4).and_then(|(head, rest)| {
        let len = u32::from_le_bytes(head.try_into().ok()?);
        rest.get(..len as usize)
    });
    let cluster = records.map(Cluster::decode);
    match cluster {
        Some(Ok(cluster)) => Ok(cluster),
        Some(Err(error)) => {
            tracing::error!(%error, "the cluster's records that were kept here are damaged; the other nodes are asked");
            Ok(Cluster::new())
        }
        None => {
            tracing::error!("the cluster's records that were kept here are cut short; the other nodes are asked");
            Ok(Cluster::new())
        }
    }
}

/// Keeps them, durably when it returns.
pub(crate) async fn save<D: Disk>(disk: &D, cluster: &Cluster) -> io::Result<()> {
    let records = cluster.encode();
    let mut bytes = Vec::with_capacity(records.len() + BLOCK_BYTES);
    bytes.extend((records.len() as u32).to_le_bytes());
    bytes.extend(records);
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    disk.create_directory(DIRECTORY).await?;
    match disk.remove(NEW_FILE).await {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.open(NEW_FILE, Open::CreateNew).await?;
    file.allocate(bytes.len() as u64).await?;
    file.write_at(0, &bytes).await?;
    file.sync_data().await?;
    file.close().await?;
    disk.rename(NEW_FILE, FILE).await?;
    disk.sync_directory(DIRECTORY).await
}
