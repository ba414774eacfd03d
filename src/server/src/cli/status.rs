//! `generation status`: the cluster's map and what its nodes say of their shards.

use std::fmt::Write as _;

use bytesize::ByteSize;
use generation_client::NodeStats;
use generation_proto::map::{Map, Node};
use serde_json::{Value, json};

use super::cluster::{Connection, block_on};
use super::{Exit, Failure, Globals, serve};

/// Options of `generation status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation status\n  \
    generation status --json | jq '.shards[] | {id, leader}'\n\n\
    A node that does not answer is reported as unreachable; the exit code is 5 when none does.")]
pub struct Args {
    #[command(flatten)]
    connection: Connection,
}

/// Runs `generation status`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    let (map, answers) = block_on(async {
        let client = args.connection.connect().await?;
        let map = client.map().await?;
        let mut answers = Vec::new();
        for (node, answer) in client.stats().await {
            answers.push((node, answer.map_err(Failure::from)));
        }
        client.close().await;
        Ok((map, answers))
    })?;
    let mut answered = Vec::new();
    let mut silence = None;
    for (node, answer) in answers {
        match answer {
            Ok(answer) => answered.push((node, answer)),
            Err(failure) => silence = Some(failure),
        }
    }
    if let (true, Some(failure)) = (answered.is_empty(), silence) {
        return Err(failure);
    }
    let view = Status {
        map: &map,
        stats: &answered,
    };
    serve::print(&if globals.json {
        format!("{}\n", view.json())
    } else {
        view.text()
    })
}

struct Status<'a> {
    map: &'a Map,
    stats: &'a [(u64, NodeStats)],
}

impl Status<'_> {
    fn of(&self, node: u64) -> Option<&NodeStats> {
        self.stats.iter().find(|(id, _)| *id == node).map(|(_, stats)| stats)
    }

    /// A counter of a shard, as the node says it.
    fn shard(&self, node: u64, shard: usize, counter: &str) -> Option<u64> {
        self.of(node)?.get(&format!("shard.{shard}.{counter}"))
    }

    /// A counter summed over the shards that `node` holds.
    fn sum(&self, node: u64, counter: &str) -> u64 {
        (0..self.map.shards.len())
            .filter_map(|shard| self.shard(node, shard, counter))
            .sum()
    }

    /// What a node is doing: as the map says, unless it did not answer.
    fn state(&self, node: &Node) -> &'static str {
        if self.of(node.id).is_some() {
            node.state.name()
        } else {
            "unreachable"
        }
    }

    /// 64-bit numbers are texts: they can pass 2^53.
    fn json(&self) -> Value {
        let nodes: Vec<Value> = self
            .map
            .nodes
            .iter()
            .map(|node| {
                json!({
                    "id": node.id,
                    "addr": node.addr.to_string(),
                    "state": self.state(node),
                    "cores": node.cores,
                    "records": self.sum(node.id, "records").to_string(),
                    "used_bytes": self.sum(node.id, "used_bytes").to_string(),
                    "budget_bytes": self.sum(node.id, "budget_bytes").to_string(),
                    "hits": self.sum(node.id, "hits").to_string(),
                    "misses": self.sum(node.id, "misses").to_string(),
                    "evictions": self.sum(node.id, "evictions").to_string(),
                    "expirations": self.sum(node.id, "expirations").to_string(),
                })
            })
            .collect();
        let shards: Vec<Value> = self
            .map
            .shards
            .iter()
            .enumerate()
            .map(|(id, shard)| self.shard_json(id, shard))
            .collect();
        json!({
            "cluster": self.map.cluster,
            "durability": DURABILITY,
            "epoch": self.map.epoch,
            "nodes": nodes,
            "shards": shards,
        })
    }

    fn shard_json(&self, id: usize, shard: &generation_proto::map::Shard) -> Value {
        let newest = shard
            .replicas
            .iter()
            .filter_map(|replica| self.shard(replica.node, id, "index"))
            .max();
        let replicas: Vec<Value> = shard
            .replicas
            .iter()
            .map(|replica| {
                let applied = self.shard(replica.node, id, "index");
                let lag = applied.zip(newest).map(|(applied, newest)| newest - applied);
                let half = |name| self.shard(replica.node, id, name);
                let hash = half("state_hash_high").zip(half("state_hash_low"));
                json!({
                    "id": replica.id,
                    "node": replica.node,
                    "core": replica.core,
                    "applied": applied.map(|index| index.to_string()),
                    "lag": lag.map(|lag| lag.to_string()),
                    "state_hash": hash.map(|(high, low)| format!("{high:016x}{low:016x}")),
                    "records": half("records").map(|records| records.to_string()),
                })
            })
            .collect();
        json!({
            "id": id,
            "epoch": shard.epoch,
            "leader": (shard.leader != 0).then_some(shard.leader),
            "term": shard.term.to_string(),
            "replicas": replicas,
        })
    }

    fn text(&self) -> String {
        let (map, mut text) = (self.map, String::new());
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "cluster {}, durability {DURABILITY}, {} shards, map epoch {}",
            map.cluster,
            map.shards.len(),
            map.epoch
        );
        for node in &map.nodes {
            let (id, address, cores, state) = (node.id, node.addr, node.cores, self.state(node));
            let led = map.shards.iter().filter(|shard| shard.leader == id).count();
            let _ = writeln!(text, "node {id}  {address}  {state}  {cores} cores, leads {led} shards");
            if self.of(id).is_some() {
                let sum = |counter| self.sum(id, counter);
                let bytes = |counter| ByteSize::b(sum(counter)).display().iec().to_string();
                let _ = writeln!(
                    text,
                    "  {} entries, {} of {} used; {} hits, {} misses, {} evicted, {} expired",
                    sum("records"),
                    bytes("used_bytes"),
                    bytes("budget_bytes"),
                    sum("hits"),
                    sum("misses"),
                    sum("evictions"),
                    sum("expirations"),
                );
            }
        }
        text
    }
}

/// Nothing is written to disk and nothing is replicated yet: an acknowledged write is in one node's memory.
const DURABILITY: &str = "memory";
