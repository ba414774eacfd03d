//! Which nodes hold each shard.
//!
//! # Rules, in order of weight
//! 1. As many replicas as the replication factor says, or as there are nodes: with no more nodes than that, all hold everything.
//! 2. **Zones**: at most half of a shard's replicas, rounded down, in one zone, so that no zone takes a majority with it; where
//!    zones are too few or too small for that, as few in one as they allow. Nodes without a zone count as one zone.
//! 3. **Fair shares**: replicas in proportion to cores, as even as the rules above allow (see [`shares`](super::shares)).
//! 4. Where all that leaves a choice, rendezvous hashing makes it.
//!
//! A layout is changed from what it is, by as few replicas as make it fair: a node that joins takes its share from the others, and
//! nothing moves between those.
//!
//! Not here: when to change anything ([`planner`](super::planner)).

mod layout;
#[cfg(test)]
pub(super) mod tests;

pub(super) use layout::{Layout, with, without};

use std::collections::BTreeMap;

use super::leaders::homes;
use super::records::{Config, Controller, Node, Record, Shard, ascending, key_of};
use super::view::{ApplyError, Cluster};

/// The nodes that are to hold each shard of a cluster that is founded by `nodes` at once, ascending.
pub fn place<'a>(nodes: impl IntoIterator<Item = &'a Node>, shards: u16, replication: u8) -> Vec<Vec<u64>> {
    let nodes: BTreeMap<u64, &Node> = nodes.into_iter().map(|node| (node.id, node)).collect();
    let mut layout = Layout::new(nodes.values().copied(), usize::from(replication));
    for shard in 0..shards {
        layout.draw(shard);
    }
    while let Some(path) = layout.fairer(|_| true, |_| true) {
        for step in path {
            layout.relocate(step);
        }
    }
    (0..shards).map(|shard| layout.targets(shard).to_vec()).collect()
}

/// The records of a cluster that is founded by `nodes`, with shards of epoch `epoch`; the first up to five of them, spread over zones,
/// keep the records themselves.
///
/// They go into group 0's first entries, each expecting that there is none, and in this order: the configuration last, so
/// that a cluster has all its records as soon as it has that one.
pub fn found(config: &Config, nodes: &[Node], epoch: u32) -> Result<Vec<Record>, ApplyError> {
    let mut records: Vec<Record> = nodes.iter().cloned().map(Record::Node).collect();
    records.push(Record::Controller(Controller::new(controllers(nodes))));
    let placed = place(nodes, config.shards, config.replication);
    let shards = (0_u16..)
        .zip(placed)
        .map(|(number, targets)| Shard::new(number, epoch, targets));
    records.extend(shards.map(Record::Shard));
    records.push(Record::Config(config.clone()));

    let mut cluster = Cluster::new();
    for (record, version) in records.iter().zip(1..) {
        let key = record.key();
        let value = record.encode().map_err(|source| ApplyError::Record { key, source })?;
        cluster.apply(&key_of(key), &value, version)?;
    }
    let homes = homes(&cluster);
    for record in &mut records {
        if let Record::Shard(shard) = record {
            shard.home = homes[usize::from(shard.number)];
        }
    }
    Ok(records)
}

/// How many nodes keep the records in a cluster of `nodes`: the greatest odd number up to five, so that every one counts.
pub(super) fn controller_size(nodes: usize) -> usize {
    match nodes {
        0..=2 => nodes.min(1),
        3..=4 => 3,
        _ => 5,
    }
}

/// The nodes that keep the records, ascending.
fn controllers(nodes: &[Node]) -> Vec<u64> {
    let mut layout = Layout::new(nodes, controller_size(nodes.len()));
    layout.fill_in_order(0);
    ascending(layout.targets(0).iter().copied())
}
