//! What group 0's leader sees of nodes and groups at one moment.

use std::collections::{BTreeMap, BTreeSet};

use super::records::NodeState;
use super::view::Cluster;

/// What is seen of the cluster. Whatever is missing is unknown, and nothing is decided on ignorance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// By node id.
    pub nodes: BTreeMap<u64, NodeSeen>,
    /// By number, as the shard's leader has reported it.
    pub shards: BTreeMap<u16, GroupSeen>,
    /// Group 0.
    pub controller: GroupSeen,
}

/// What is seen of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSeen {
    /// Whether it answers.
    pub alive: bool,
    /// For how long it has not, in milliseconds.
    pub dead_for_ms: u64,
    /// Whether its clock is right.
    pub clock_ok: bool,
    /// Bytes that its replicas take.
    pub used_bytes: u64,
    /// Bytes that they may take; 0 where that is not known, or not limited.
    pub limit_bytes: u64,
}

/// What is seen of a group, as its leader has reported it lately. Replicas are named by their nodes.
///
/// A report should have been made with the group's record in its present version: one that is older can look settled while the leader
/// carries out what the record said before. Nothing is lost by that, but two changes can meet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupSeen {
    /// The node that leads, if one has reported.
    pub leader: Option<u64>,
    /// The nodes with a vote.
    pub voters: BTreeSet<u64>,
    /// The nodes that are catching up, and by how many log entries they lag behind.
    pub learners: BTreeMap<u64, u64>,
    /// Whether a change of members is under way.
    pub changing: bool,
    /// Voters that the leader itself has not heard for as long as makes a node dead.
    pub silent: BTreeSet<u64>,
    /// Bytes of a replica.
    pub bytes: u64,
    /// Operations a second.
    pub load: u64,
}

impl Observed {
    /// Whether a node answers.
    pub fn is_alive(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(|seen| seen.alive)
    }

    /// The nodes that may lead: alive, their clocks right, meant to lead.
    pub fn fit(&self, cluster: &Cluster) -> BTreeSet<u64> {
        let up = cluster
            .nodes()
            .filter(|node| node.state == NodeState::Up)
            .map(|node| node.id);
        let is_well = |id: &u64| self.nodes.get(id).is_some_and(|seen| seen.alive && seen.clock_ok);
        up.filter(is_well).collect()
    }

    /// The report of a group's leader, if there is one and that node still answers.
    pub(super) fn report<'a>(&self, group: Option<&'a GroupSeen>) -> Option<(u64, &'a GroupSeen)> {
        let group = group?;
        let leader = group.leader.filter(|leader| self.is_alive(*leader))?;
        Some((leader, group))
    }
}
