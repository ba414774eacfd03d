//! What the nodes say of themselves: whether the cluster is whole, who leads, what gossip has cost.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use generation_client::{Client, NodeStats};

use crate::LoadError;
use crate::probe::{block_on, connect};
use crate::script::Whole;

/// How often nodes are asked while something is waited for.
const STEP: Duration = Duration::from_millis(50);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(2);
/// Entries of the log that a replica may be behind another and still count as caught up: more arrive while nodes are asked.
const CAUGHT_UP_ENTRIES: u64 = 256;

/// Waits until every node answers, every shard has a leader, and every replica has caught up; how long that took.
pub(crate) fn wait_until_whole(config: &Path, whole: Whole, patience: Duration) -> Result<Duration, LoadError> {
    let began = Instant::now();
    block_on(async {
        let mut last = "nobody answers".to_owned();
        while began.elapsed() < patience {
            match connect(config, ANSWER).await {
                Ok(client) => {
                    let missing = missing(&client, whole).await;
                    client.close().await;
                    match missing {
                        None => return Ok(began.elapsed()),
                        Some(missing) => last = missing,
                    }
                }
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(STEP).await;
        }
        Err(LoadError::Client(format!(
            "the cluster is not whole after {patience:?}: {last}"
        )))
    })
}

/// What the cluster lacks to be whole.
async fn missing(client: &Client, whole: Whole) -> Option<String> {
    let Whole { nodes, replicas } = whole;
    let map = match client.map().await {
        Ok(map) => map,
        Err(error) => return Some(error.to_string()),
    };
    if let Some(shard) = map.shards.iter().position(|shard| shard.leader == 0) {
        return Some(format!("shard {shard} has no leader"));
    }
    let mut answers = Vec::new();
    for (node, answer) in client.stats().await {
        match answer {
            Ok(stats) => answers.push(stats),
            Err(error) => return Some(format!("node {node}: {error}")),
        }
    }
    if (answers.len() as u64) < nodes {
        return Some(format!("{} of {nodes} nodes are in the map", answers.len()));
    }
    (0..map.shards.len()).find_map(|shard| {
        let index = |stats: &NodeStats| stats.get(&format!("shard.{shard}.index"));
        let indexes: Vec<u64> = answers.iter().filter_map(index).collect();
        if (indexes.len() as u64) < replicas {
            return Some(format!("shard {shard} has {} of {replicas} replicas", indexes.len()));
        }
        let (least, most) = (indexes.iter().min()?, indexes.iter().max()?);
        (most - least > CAUGHT_UP_ENTRIES)
            .then(|| format!("a replica of shard {shard} is {} entries behind", most - least))
    })
}

/// How many shards each node leads, by the map.
pub(crate) fn leaders(config: &Path) -> Result<BTreeMap<u64, u64>, LoadError> {
    block_on(async {
        let client = connect(config, ANSWER).await?;
        let map = client
            .map()
            .await
            .map_err(|error| LoadError::Client(error.to_string()))?;
        client.close().await;
        let mut led: BTreeMap<u64, u64> = map.nodes.iter().map(|node| (node.id, 0)).collect();
        for shard in map.shards.iter().filter(|shard| shard.leader != 0) {
            *led.entry(shard.leader).or_default() += 1;
        }
        Ok(led)
    })
}

/// Whether no node leads more than one shard more than another.
pub(crate) fn is_even(led: &BTreeMap<u64, u64>) -> bool {
    let (least, most) = (led.values().min(), led.values().max());
    most.zip(least).is_some_and(|(most, least)| most - least <= 1)
}

/// Waits until leaders are spread evenly; how long that took, or `None` if it did not come to it.
pub(crate) fn wait_until_even(config: &Path, patience: Duration) -> Result<Option<Duration>, LoadError> {
    let began = Instant::now();
    while began.elapsed() < patience {
        if is_even(&leaders(config)?) {
            return Ok(Some(began.elapsed()));
        }
        std::thread::sleep(STEP);
    }
    Ok(None)
}

/// Bytes of gossip that each node has sent since its start, of those that say so.
pub(crate) fn gossip_bytes(config: &Path) -> Result<BTreeMap<u64, u64>, LoadError> {
    block_on(async {
        let client = connect(config, ANSWER).await?;
        let answers = client.stats().await;
        client.close().await;
        let bytes =
            |(node, answer): (u64, Result<NodeStats, _>)| Some((node, answer.ok()?.get("node.gossip_sent_bytes")?));
        Ok(answers.into_iter().filter_map(bytes).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaders_are_even_when_no_node_could_give_one_to_another() {
        let led = |counts: &[u64]| (1..).zip(counts.iter().copied()).collect::<BTreeMap<u64, u64>>();
        assert!(is_even(&led(&[4, 3, 3, 3, 3])));
        assert!(!is_even(&led(&[5, 3, 3, 3, 2])));
        assert!(!is_even(&led(&[])));
    }
}
