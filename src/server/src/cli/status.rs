//! `generation status`: the cluster's map and what its nodes say of their shards.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use bytesize::ByteSize;
use generation_client::NodeStats;
use generation_proto::map::{Map, Node};
use serde_json::{Value, json};

use super::connection::{Connection, block_on};
use super::{Exit, Failure, Globals, serve};
use crate::config::Durability;

/// Options of `generation status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation status\n  \
    generation status --json | jq '.shards[] | {id, leader}'\n\n\
    Lag is how many entries of the leader's log a replica has not applied. A node that does not answer is reported as unreachable; the exit code is 5 when none does.")]
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

    /// What an acknowledged write has survived, as the nodes that answered say. One that is not replicated does not say it.
    fn durability(&self) -> &'static str {
        let told = self
            .stats
            .iter()
            .map(|(_, stats)| stats.get("node.durability_sync") == Some(1));
        let (sync, memory): (Vec<bool>, Vec<bool>) = told.partition(|sync| *sync);
        match (sync.is_empty(), memory.is_empty()) {
            (false, false) => "mixed",
            (false, true) => Durability::Sync.name(),
            (true, _) => Durability::Memory.name(),
        }
    }

    /// What an operator should know of a node, beside numbers.
    fn warnings(&self, node: u64) -> Vec<String> {
        let get = |counter| self.of(node).and_then(|stats| stats.get(counter));
        let mut warnings = Vec::new();
        if get("node.journal_failed") == Some(1) {
            warnings
                .push("its journal has failed and it acknowledges nothing: see its log, then restart it".to_owned());
        }
        if let Some(skew_ms) = get("node.clock_skew_ms").filter(|skew_ms| *skew_ms > TOLERATED_SKEW_MS) {
            warnings.push(format!(
                "its clock is {skew_ms} ms off the others': check its time synchronisation"
            ));
        }
        let shards = |counter: &str, fits: fn(u64) -> bool| -> Vec<String> {
            let numbers = 0..self.map.shards.len();
            let fit = numbers.filter(|shard| self.shard(node, *shard, counter).is_some_and(fits));
            fit.map(|shard| shard.to_string()).collect()
        };
        let ended = shards("ended", |code| code != 0);
        if !ended.is_empty() && get("node.journal_failed") != Some(1) {
            let reasons = (0..self.map.shards.len()).filter_map(|shard| self.ended(node, shard));
            let reasons: BTreeSet<&str> = reasons.collect();
            let reasons: Vec<&str> = reasons.into_iter().collect();
            warnings.push(format!(
                "its replicas of shards {} have ended ({}): see its log, check its disk, then restart it",
                ended.join(", "),
                reasons.join(", ")
            ));
        }
        let damaged = shards("damaged_snapshots", |count| count != 0);
        if !damaged.is_empty() {
            warnings.push(format!(
                "snapshots of shards {} were found damaged since its start, and others written: check its disk",
                damaged.join(", ")
            ));
        }
        warnings
    }

    /// Why a node's replica of a shard has ended, if it has.
    fn ended(&self, node: u64, shard: usize) -> Option<&'static str> {
        match self.shard(node, shard, "ended")? {
            0 => None,
            1 => Some("storage failed"),
            3 => Some("stopped"),
            _ => Some("defect"),
        }
    }

    /// A shard's state as its replicas' nodes tell it, or as the map does where they do not.
    fn shard_view(&self, id: usize, shard: &generation_proto::map::Shard) -> ShardView {
        let mut replicas: Vec<ReplicaView> = shard
            .replicas
            .iter()
            .map(|replica| {
                let counter = |name| self.shard(replica.node, id, name);
                let hash = counter("state_hash_high").zip(counter("state_hash_low"));
                ReplicaView {
                    id: counter("replica").unwrap_or(replica.id),
                    node: replica.node,
                    core: replica.core,
                    term: counter("term"),
                    leads: counter("leads") == Some(1),
                    applied: counter("index"),
                    last: counter("log_index").max(counter("index")),
                    snapshot: counter("snapshot_index"),
                    journal_bytes: counter("journal_bytes"),
                    records: counter("records"),
                    state_hash: hash.map(|(high, low)| u128::from(high) << 64 | u128::from(low)),
                }
            })
            .collect();
        replicas.sort_unstable_by_key(|replica| replica.node);
        // One that was deposed and does not know it yet says that it leads, in an older term.
        let leader = replicas
            .iter()
            .filter(|replica| replica.leads)
            .max_by_key(|replica| replica.term);
        let term = replicas.iter().filter_map(|replica| replica.term).max();
        let known = (shard.leader != 0).then_some(shard.leader);
        let newest = || replicas.iter().filter_map(|replica| replica.applied).max();
        ShardView {
            leader: leader.map(|leader| leader.node).or(known),
            term: term.unwrap_or(shard.term),
            last: leader.and_then(|leader| leader.last).or_else(newest),
            replicas,
        }
    }

    /// 64-bit numbers are texts: they can pass 2^53.
    fn json(&self) -> Value {
        let nodes: Vec<Value> = self
            .map
            .nodes
            .iter()
            .map(|node| {
                let sum = |counter| self.sum(node.id, counter).to_string();
                json!({
                    "id": node.id,
                    "addr": node.addr.to_string(),
                    "state": self.state(node),
                    "warnings": self.warnings(node.id),
                    "cores": node.cores,
                    "records": sum("records"),
                    "used_bytes": sum("used_bytes"),
                    "budget_bytes": sum("budget_bytes"),
                    "hits": sum("hits"),
                    "misses": sum("misses"),
                    "evictions": sum("evictions"),
                    "expirations": sum("expirations"),
                })
            })
            .collect();
        let shards = self.map.shards.iter().enumerate();
        let shards: Vec<Value> = shards.map(|(id, shard)| self.shard_json(id, shard)).collect();
        json!({
            "cluster": self.map.cluster,
            "durability": self.durability(),
            "epoch": self.map.epoch,
            "nodes": nodes,
            "shards": shards,
        })
    }

    fn shard_json(&self, id: usize, shard: &generation_proto::map::Shard) -> Value {
        let view = self.shard_view(id, shard);
        let text = |number: Option<u64>| number.map(|number| number.to_string());
        let replicas: Vec<Value> = view
            .replicas
            .iter()
            .map(|replica| {
                json!({
                    "id": replica.id,
                    "node": replica.node,
                    "core": replica.core,
                    "applied": text(replica.applied),
                    "lag": text(view.lag(replica)),
                    "state_hash": replica.state_hash.map(|hash| format!("{hash:032x}")),
                    "records": text(replica.records),
                    "journal_bytes": text(replica.journal_bytes),
                    "snapshot": text(replica.snapshot),
                    "ended": self.ended(replica.node, id),
                })
            })
            .collect();
        json!({
            "id": id,
            "epoch": shard.epoch,
            "leader": view.leader,
            "term": view.term.to_string(),
            "replicas": replicas,
        })
    }

    fn text(&self) -> String {
        let (map, mut text) = (self.map, String::new());
        let views: Vec<ShardView> = map
            .shards
            .iter()
            .enumerate()
            .map(|(id, shard)| self.shard_view(id, shard))
            .collect();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "cluster {}, durability {}, {} shards, map epoch {}",
            map.cluster,
            self.durability(),
            map.shards.len(),
            map.epoch
        );
        for node in &map.nodes {
            let (id, address, cores, state) = (node.id, node.addr, node.cores, self.state(node));
            let led = views.iter().filter(|view| view.leader == Some(id)).count();
            let _ = writeln!(text, "node {id}  {address}  {state}  {cores} cores, leads {led} shards");
            if self.of(id).is_some() {
                let sum = |counter| self.sum(id, counter);
                let _ = writeln!(
                    text,
                    "  {} entries, {} of {} used; {} hits, {} misses, {} evicted, {} expired",
                    sum("records"),
                    iec(sum("used_bytes")),
                    iec(sum("budget_bytes")),
                    sum("hits"),
                    sum("misses"),
                    sum("evictions"),
                    sum("expirations"),
                );
            }
            for warning in self.warnings(id) {
                let _ = writeln!(text, "  WARNING: {warning}");
            }
        }
        let _ = writeln!(
            text,
            "{:>5}  {:>6}  {:>4}  {:>9}  {:>10}  {:>9}  lag",
            "shard", "leader", "term", "applied", "journal", "snapshot"
        );
        for (id, view) in views.iter().enumerate() {
            let _ = writeln!(text, "{id:>5}  {}", view.line());
        }
        text
    }
}

/// A clock that is off the others' by more is worth a warning, in milliseconds.
const TOLERATED_SKEW_MS: u64 = 1_000;

/// A shard with its replicas.
struct ShardView {
    /// The leader's node.
    leader: Option<u64>,
    term: u64,
    /// Last entry of the leader's log.
    last: Option<u64>,
    replicas: Vec<ReplicaView>,
}

/// A replica. What its node did not tell is `None`.
struct ReplicaView {
    id: u64,
    node: u64,
    core: u16,
    term: Option<u64>,
    leads: bool,
    /// Index of the last entry applied.
    applied: Option<u64>,
    /// Index of the last entry of its log.
    last: Option<u64>,
    /// Index of the last entry in its newest snapshot.
    snapshot: Option<u64>,
    journal_bytes: Option<u64>,
    records: Option<u64>,
    state_hash: Option<u128>,
}

impl ShardView {
    /// Entries of the leader's log that a replica has not applied. Nodes are asked one after the other, so it can be ahead of what
    /// the leader said.
    fn lag(&self, replica: &ReplicaView) -> Option<u64> {
        let (last, applied) = self.last.zip(replica.applied)?;
        Some(last.saturating_sub(applied))
    }

    /// The shard on one line: the leader's figures, or the first replica's that has any, and everybody's lag.
    fn line(&self) -> String {
        let or_dash = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
        let count = |number: Option<u64>| or_dash(number.map(|number| number.to_string()));
        let leads = |replica: &&ReplicaView| Some(replica.node) == self.leader && replica.applied.is_some();
        let shown = self.replicas.iter().find(leads);
        let shown = shown.or_else(|| self.replicas.iter().find(|replica| replica.applied.is_some()));
        let lags = self.replicas.iter().map(|replica| {
            let lag = or_dash(self.lag(replica).map(|lag| lag.to_string()));
            format!("node {}: {lag}", replica.node)
        });
        let lags: Vec<String> = lags.collect();
        format!(
            "{:>6}  {:>4}  {:>9}  {:>10}  {:>9}  {}",
            or_dash(self.leader.map(|leader| leader.to_string())),
            self.term,
            count(shown.and_then(|replica| replica.applied)),
            or_dash(shown.and_then(|replica| replica.journal_bytes).map(iec)),
            // Index 0 is before every entry.
            count(shown.and_then(|replica| replica.snapshot).filter(|index| *index > 0)),
            lags.join(", "),
        )
    }
}

fn iec(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}
