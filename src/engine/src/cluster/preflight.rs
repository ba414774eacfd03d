//! What operators and joining nodes may have changed, looked at before it is.
//!
//! Each function gives back the steps that do it (none where it is so already), or a [`Refusal`] that says what is wrong and what
//! to do. What is refused is what could not be carried out, or would leave the cluster worse than it says it is; the steps
//! themselves expect the versions they were looked at with, so that two operators cannot each be right alone.
//!
//! Not here: carrying anything out. A node that is to leave is [`NodeState::Leaving`] by one step, and the
//! [`planner`](super::planner) does the rest.

mod settings;
#[cfg(test)]
mod tests;

pub use settings::{SETTINGS, Setting, set_config};

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::observed::Observed;
use super::placement::Layout;
use super::records::{Config, Node, NodeState, Record, RecordError};
use super::step::Step;
use super::view::Cluster;

/// Why something is not done, and what to do instead. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no configuration.
    #[error("the cluster is not founded yet: found it first")]
    NotFounded,
    /// No node has this id.
    #[error("there is no node {node}: there are nodes {known:?}")]
    UnknownNode {
        /// The id that was asked for.
        node: u64,
        /// The nodes that are not gone.
        known: Vec<u64>,
    },
    /// The node has left for good.
    #[error("node {node} is gone, and its id is used up: start a node with another id and an empty directory")]
    Gone {
        /// The node.
        node: u64,
    },
    /// The node is on its way out.
    #[error("node {node} is leaving: let it go, or resume it first")]
    Leaving {
        /// The node.
        node: u64,
    },
    /// No other node may lead.
    #[error("node {node} is the last that may lead: have another node up, with its clock right, first")]
    LastToLead {
        /// The node.
        node: u64,
    },
    /// Shards that only this node can lead now.
    #[error(
        "shards {shards:?} have no other replica than that of node {node} that could lead: bring their other nodes up, or raise the replication factor"
    )]
    OnlyLeader {
        /// The node.
        node: u64,
        /// The shards.
        shards: Vec<u16>,
    },
    /// Too few nodes would remain.
    #[error(
        "{nodes} nodes would remain for {replication} replicas of each shard: add a node first, or lower the replication factor (1, 3 or 5)"
    )]
    BelowReplication {
        /// Nodes that would hold replicas.
        nodes: usize,
        /// The replication factor.
        replication: u8,
    },
    /// A zone would hold too many replicas of a shard.
    #[error(
        "without node {node} a zone would hold {after} replicas of a shard where {before} are the most now: add a node in a zone with few of them first"
    )]
    Zones {
        /// The node.
        node: u64,
        /// Most replicas of a shard in one zone now.
        before: usize,
        /// And without the node.
        after: usize,
    },
    /// The others have no memory for what the node holds.
    #[error("the other nodes have {free} bytes free, and node {node} holds {used}: add a node, or memory, first")]
    NoRoom {
        /// The node.
        node: u64,
        /// Bytes that it holds.
        used: u64,
        /// Bytes that the others could take.
        free: u64,
    },
    /// A node that is to be replaced as dead answers.
    #[error("node {node} is alive: decommission it, which loses no replica meanwhile, or stop it first")]
    Alive {
        /// The node.
        node: u64,
    },
    /// The node that is to take over cannot.
    #[error("node {node} is {state} and {}: only a node that is up and answers can take over", answers(*.alive))]
    CannotTakeOver {
        /// The node.
        node: u64,
        /// Its state.
        state: NodeState,
        /// Whether it answers.
        alive: bool,
    },
    /// A node cannot take its own place.
    #[error("node {node} cannot take its own place: start a node with another id")]
    Itself {
        /// The node.
        node: u64,
    },
    /// The id of a node is a number from 1.
    #[error("a node's id is a number from 1")]
    NoId,
    /// The node has another directory than the one that is known under its id.
    #[error(
        "node {node} is known with directory {known:032x} and came with {found:032x}: start it with its own directory, or, if that is lost, under another id and decommission node {node}"
    )]
    OtherDirectory {
        /// The node.
        node: u64,
        /// The directory in its record.
        known: u128,
        /// The directory it came with.
        found: u128,
    },
    /// The directory is another node's.
    #[error("directory {directory:032x} is that of node {owner}: start node {node} with an empty directory")]
    DirectoryTaken {
        /// The node.
        node: u64,
        /// The directory.
        directory: u128,
        /// Whose it is.
        owner: u64,
    },
    /// A process with the same directory has been started later.
    #[error(
        "node {node} has been started again since (generation {known}, this one is {found}): stop one of the two, a directory is for one process"
    )]
    Outdated {
        /// The node.
        node: u64,
        /// The generation in its record.
        known: u64,
        /// The generation it came with.
        found: u64,
    },
    /// The node is of another cluster.
    #[error(
        "this is cluster {own:?} ({own_id:032x}), and the node is of {found:?} ({found_id:032x}): look at its configuration and its directory"
    )]
    ForeignCluster {
        /// Name of this cluster.
        own: String,
        /// Its id.
        own_id: u128,
        /// Name of the node's.
        found: String,
        /// Its id.
        found_id: u128,
    },
    /// Another live node has the address.
    #[error("{addr} is the address of node {owner}, which is alive: give node {node} an address of its own")]
    AddressTaken {
        /// The node.
        node: u64,
        /// The address.
        addr: SocketAddr,
        /// Whose it is.
        owner: u64,
    },
    /// No such setting.
    #[error("there is no setting {key:?}{}: there are {}", suggestion(*.nearest), names())]
    UnknownSetting {
        /// What was asked for.
        key: String,
        /// The setting with the most similar name.
        nearest: Option<&'static str>,
    },
    /// The setting is fixed when the cluster is founded.
    #[error("{key} is fixed when a cluster is founded: found another cluster and import into it")]
    Fixed {
        /// The setting.
        key: &'static str,
    },
    /// The value is none of the setting.
    #[error("{value:?} is no value of {key}: it is {expected}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What was given.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The record cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
}

fn answers(alive: bool) -> &'static str {
    if alive { "answers" } else { "does not answer" }
}

fn suggestion(nearest: Option<&'static str>) -> String {
    nearest
        .map(|name| format!(" (did you mean {name}?)"))
        .unwrap_or_default()
}

fn names() -> String {
    let names: Vec<&str> = SETTINGS.iter().map(|setting| setting.name()).collect();
    names.join(", ")
}

fn config(cluster: &Cluster) -> Result<&Config, Refusal> {
    cluster.config().ok_or(Refusal::NotFounded)
}

/// A node that is not gone.
fn member(cluster: &Cluster, id: u64) -> Result<&Node, Refusal> {
    config(cluster)?;
    match cluster.node(id) {
        Some(node) if node.state == NodeState::Gone => Err(Refusal::Gone { node: id }),
        Some(node) => Ok(node),
        None => {
            let known = cluster
                .nodes()
                .filter(|node| node.state != NodeState::Gone)
                .map(|node| node.id);
            Err(Refusal::UnknownNode {
                node: id,
                known: known.collect(),
            })
        }
    }
}

fn set_state(cluster: &Cluster, node: &Node, state: NodeState, text: String) -> Result<Vec<Step>, Refusal> {
    if node.state == state {
        return Ok(Vec::new());
    }
    let next = Node { state, ..node.clone() };
    Ok(vec![Step::new(cluster, &Record::Node(next), text)?])
}

/// Has a node lead nothing, and keep what it holds: before maintenance.
pub fn drain(cluster: &Cluster, seen: &Observed, node: u64) -> Result<Vec<Step>, Refusal> {
    let drained = member(cluster, node)?;
    match drained.state {
        NodeState::Up => {}
        NodeState::Draining => return Ok(Vec::new()),
        NodeState::Leaving | NodeState::Gone => return Err(Refusal::Leaving { node }),
    }
    let mut others = seen.fit(cluster);
    others.remove(&node);
    if others.is_empty() {
        return Err(Refusal::LastToLead { node });
    }
    let held = cluster.shards().filter(|shard| shard.targets.contains(&node));
    let only_here = held.filter(|shard| !shard.targets.iter().any(|target| others.contains(target)));
    let shards: Vec<u16> = only_here.map(|shard| shard.number).collect();
    if !shards.is_empty() {
        return Err(Refusal::OnlyLeader { node, shards });
    }
    set_state(
        cluster,
        drained,
        NodeState::Draining,
        format!("node {node} leads nothing any more"),
    )
}

/// Takes back [`drain`], or [`decommission`] while the node is not gone.
pub fn resume(cluster: &Cluster, node: u64) -> Result<Vec<Step>, Refusal> {
    let resumed = member(cluster, node)?;
    set_state(cluster, resumed, NodeState::Up, format!("node {node} takes part again"))
}

/// Has all replicas of a node move away, and the node be gone then.
pub fn decommission(cluster: &Cluster, seen: &Observed, node: u64) -> Result<Vec<Step>, Refusal> {
    let leaving = member(cluster, node)?;
    if leaving.state == NodeState::Leaving {
        return Ok(Vec::new());
    }
    let config = config(cluster)?;
    let staying = |without: Option<u64>| {
        let stay = cluster
            .nodes()
            .filter(move |other| other.state.keeps_replicas() && Some(other.id) != without);
        stay.collect::<Vec<&Node>>()
    };
    let others = staying(Some(node));
    if others.len() < usize::from(config.replication) {
        return Err(Refusal::BelowReplication {
            nodes: others.len(),
            replication: config.replication,
        });
    }
    let limit = |nodes: &[&Node]| Layout::new(nodes.iter().copied(), usize::from(config.replication)).zone_limit();
    let (before, after) = (limit(&staying(None)), limit(&others));
    if after > before {
        return Err(Refusal::Zones { node, before, after });
    }
    let used = seen.nodes.get(&node).map_or(0, |seen| seen.used_bytes);
    if let Some(free) = free_bytes(seen, &others).filter(|free| *free < used) {
        return Err(Refusal::NoRoom { node, used, free });
    }
    set_state(cluster, leaving, NodeState::Leaving, format!("node {node} is to leave"))
}

/// Bytes that the nodes that can be given replicas have free together; `None` where one of them has no known limit.
fn free_bytes(seen: &Observed, nodes: &[&Node]) -> Option<u64> {
    let usable = nodes
        .iter()
        .filter(|node| node.state == NodeState::Up && seen.is_alive(node.id));
    let mut free = usable.map(|node| {
        let seen = seen.nodes.get(&node.id)?;
        (seen.limit_bytes > 0).then(|| seen.limit_bytes.saturating_sub(seen.used_bytes))
    });
    free.try_fold(0_u64, |sum, free| Some(sum.saturating_add(free?)))
}

/// Has the replicas of a dead node made anew at once, where `new` has joined to take its place.
pub fn replace(cluster: &Cluster, seen: &Observed, dead: u64, new: u64) -> Result<Vec<Step>, Refusal> {
    member(cluster, dead)?;
    let successor = member(cluster, new)?;
    if dead == new {
        return Err(Refusal::Itself { node: dead });
    }
    if seen.is_alive(dead) {
        return Err(Refusal::Alive { node: dead });
    }
    let alive = seen.is_alive(new);
    if successor.state != NodeState::Up || !alive {
        return Err(Refusal::CannotTakeOver {
            node: new,
            state: successor.state,
            alive,
        });
    }
    decommission(cluster, seen, dead)
}

/// What a node says of the cluster that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Membership<'a> {
    /// Name of the cluster, from its certificate.
    pub name: &'a str,
    /// Identity of the cluster, from its configuration or its directory.
    pub id: u128,
}

/// Lets a node in, for the first time or after a restart. Its state stays what the cluster wants of it.
pub fn join(cluster: &Cluster, seen: &Observed, of: Membership<'_>, node: &Node) -> Result<Vec<Step>, Refusal> {
    let config = config(cluster)?;
    if of.name != config.name || of.id != config.id {
        return Err(Refusal::ForeignCluster {
            own: config.name.clone(),
            own_id: config.id,
            found: of.name.to_owned(),
            found_id: of.id,
        });
    }
    if node.id == 0 {
        return Err(Refusal::NoId);
    }
    let known = cluster.node(node.id);
    if let Some(known) = known {
        check_return(known, node)?;
    }
    let others = cluster.nodes().filter(|other| other.id != node.id);
    for other in others {
        if other.directory == node.directory {
            return Err(Refusal::DirectoryTaken {
                node: node.id,
                directory: node.directory,
                owner: other.id,
            });
        }
        if other.addr == node.addr && other.state != NodeState::Gone && seen.is_alive(other.id) {
            return Err(Refusal::AddressTaken {
                node: node.id,
                addr: node.addr,
                owner: other.id,
            });
        }
    }
    let next = match known {
        Some(known) => Node {
            state: known.state,
            later: known.later.clone(),
            ..node.clone()
        },
        None => Node {
            state: NodeState::Up,
            ..node.clone()
        },
    };
    if known == Some(&next) {
        return Ok(Vec::new());
    }
    let how = if known.is_some() { "is back" } else { "joins" };
    let text = format!("node {} {how}, at {} with {} cores", next.id, next.addr, next.cores);
    Ok(vec![Step::new(cluster, &Record::Node(next), text)?])
}

/// Whether a node that comes under a known id is the one that is known, and the last one started.
fn check_return(known: &Node, node: &Node) -> Result<(), Refusal> {
    if known.state == NodeState::Gone {
        return Err(Refusal::Gone { node: node.id });
    }
    if known.directory != node.directory {
        return Err(Refusal::OtherDirectory {
            node: node.id,
            known: known.directory,
            found: node.directory,
        });
    }
    if node.generation < known.generation {
        return Err(Refusal::Outdated {
            node: node.id,
            known: known.generation,
            found: node.generation,
        });
    }
    Ok(())
}

/// The shards that would have no majority if these nodes were stopped now: for whoever is about to.
pub fn shards_without(cluster: &Cluster, seen: &Observed, stopped: &BTreeSet<u64>) -> Vec<u16> {
    let loses = cluster.shards().filter(|shard| {
        let left = shard
            .targets
            .iter()
            .filter(|target| seen.is_alive(**target) && !stopped.contains(target));
        2 * left.count() <= shard.targets.len()
    });
    loses.map(|shard| shard.number).collect()
}
