//! What turns nodes that have just been started into one cluster: what an administrator would type.

use std::path::Path;
use std::time::Duration;

use generation_client::{Client, ClientConfig};
use generation_proto::cluster::Founding;

use crate::cli::Failure;
use crate::cli::cluster::{View, describe, found, is_settled, join, wait_until};
use crate::cli::connection::block_on;

/// How long it may take until every shard has its leader and its replicas.
const SETTLED: Duration = Duration::from_mins(1);

/// How long it may take then until leaders are spread evenly.
const SPREAD: Duration = Duration::from_secs(10);

/// How long a dead node is waited for before its replicas are made elsewhere.
const REPLACE_AFTER_MS: u64 = 120_000;

/// Has the nodes at `addrs` be one cluster, the first of them founding it, and waits until each shard has its leader and its replicas.
pub(super) fn grow(client_config: &Path, addrs: &[String], replication_factor: u8) -> Result<(), Failure> {
    let config = ClientConfig::load(client_config).map_err(|error| Failure::usage(error.to_string()))?;
    block_on(async {
        let of_first = ClientConfig {
            seeds: addrs.iter().take(1).cloned().collect(),
            ..config.clone()
        };
        let first = connect(of_first).await?;
        if describe(&first).await?.records == 0 {
            let founding = Founding {
                replication_factor,
                replace_after_ms: REPLACE_AFTER_MS,
            };
            found(&first, &founding).await?;
        }
        for addr in addrs {
            take_in(&first, &config, addr).await?;
        }
        let settled = wait_until(&first, SETTLED, is_settled).await;
        if let Err(failure) = settled {
            // It serves what it can, and goes on.
            tracing::warn!("{}", failure.message);
        }
        // Nobody has to wait for that, but who looks is to see it.
        let _ = wait_until(&first, SPREAD, View::is_balanced).await;
        first.close().await;
        Ok(())
    })
}

/// Takes the node at `addr` into the cluster that the nodes at `others` belong to, if it does not belong to it yet.
pub(super) fn add(client_config: &Path, addr: &str, others: &[String]) -> Result<(), Failure> {
    let config = ClientConfig::load(client_config).map_err(|error| Failure::usage(error.to_string()))?;
    let seeds: Vec<String> = others.iter().filter(|other| *other != addr).cloned().collect();
    if seeds.is_empty() {
        return Ok(());
    }
    let of_others = ClientConfig {
        seeds,
        ..config.clone()
    };
    block_on(async {
        let client = connect(of_others).await?;
        take_in(&client, &config, addr).await?;
        client.close().await;
        Ok(())
    })
}

async fn connect(config: ClientConfig) -> Result<Client, Failure> {
    let client = Client::builder()
        .config(config)
        .name("generation-dev")
        .connect()
        .await?;
    Ok(client)
}

async fn take_in(client: &Client, config: &ClientConfig, addr: &str) -> Result<(), Failure> {
    let there = connect(ClientConfig {
        seeds: vec![addr.to_owned()],
        ..config.clone()
    })
    .await?;
    let info = describe(&there).await?;
    there.close().await;
    if info.records == 0 {
        join(client, config, addr).await?;
    }
    Ok(())
}
