//! A change of one group's targets, and how many there may be at a time.

use std::collections::BTreeMap;

use super::Rules;
use crate::cluster::observed::GroupSeen;
use crate::cluster::placement::{with, without};
use crate::cluster::records::{Cause, Config, RecordKey, Shard};

/// A group and the nodes that are to have its replicas.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) key: RecordKey,
    /// For rendezvous.
    pub(super) number: u16,
    pub(super) targets: &'a [u64],
}

impl<'a> Group<'a> {
    pub(super) fn of(shard: &'a Shard) -> Self {
        Self {
            key: RecordKey::Shard(shard.number),
            number: shard.number,
            targets: &shard.targets,
        }
    }

    /// Whether its members are what they are to be.
    pub(super) fn is_settled(&self, report: &GroupSeen) -> bool {
        !report.changing && report.voters.iter().eq(self.targets)
    }

    /// The targets without a vote.
    pub(super) fn joining(&self, report: &GroupSeen) -> impl Iterator<Item = u64> {
        self.targets
            .iter()
            .copied()
            .filter(|target| !report.voters.contains(target))
    }
}

/// New targets, one element away from the old ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) targets: Vec<u64>,
    pub(super) joining: Option<u64>,
    pub(super) parting: Option<u64>,
    pub(super) cause: Cause,
}

impl Change {
    pub(super) fn replace(targets: &[u64], parting: u64, joining: u64, cause: Cause) -> Self {
        Self {
            targets: with(&without(targets, parting), joining),
            joining: Some(joining),
            parting: Some(parting),
            cause,
        }
    }

    pub(super) fn add(targets: &[u64], joining: u64) -> Self {
        Self {
            targets: with(targets, joining),
            joining: Some(joining),
            parting: None,
            cause: Cause::FillUp,
        }
    }

    pub(super) fn remove(targets: &[u64], parting: u64, cause: Cause) -> Self {
        Self {
            targets: without(targets, parting),
            joining: None,
            parting: Some(parting),
            cause,
        }
    }

    /// The change in words.
    pub(super) fn text(&self, group: &Group<'_>, rules: &Rules<'_>) -> String {
        let what = match (self.joining, self.parting) {
            (Some(joining), Some(parting)) => format!("node {joining} in place of node {parting}"),
            (Some(joining), None) => format!("node {joining} in addition"),
            (None, Some(parting)) => format!("without node {parting}"),
            (None, None) => "as it was".to_owned(),
        };
        let why = match self.cause {
            Cause::FillUp => format!("{} of {} replicas", group.targets.len(), rules.size),
            Cause::Dead => {
                let dead_for_ms = self.parting.map_or(0, |node| rules.dead_for_ms(node));
                format!("it has been dead for {} s", dead_for_ms / 1000)
            }
            Cause::Leaving => "it leaves".to_owned(),
            Cause::Zones => "too many replicas were in one zone".to_owned(),
            Cause::Surplus => format!("{} replicas, {} are wanted", group.targets.len(), rules.size),
            Cause::Balance => "so that nodes hold equal shares".to_owned(),
            Cause::Founded | Cause::Other(_) => self.cause.to_string(),
        };
        format!("{}: {what}: {why}", group.key)
    }
}

/// How many replicas may be on their way.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    per_node: u16,
    left: u16,
    /// Replicas on their way to or from each node.
    moves: BTreeMap<u64, u16>,
    /// Bytes that are on their way to each node.
    bytes: BTreeMap<u64, u64>,
}

impl Budget {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            per_node: config.moves_per_node,
            left: config.moves_total,
            moves: BTreeMap::new(),
            bytes: BTreeMap::new(),
        }
    }

    /// Takes in what is on its way in a group, as it was reported last: also where nobody leads it now, for it will go on.
    pub(super) fn count(&mut self, group: &Group<'_>, report: &GroupSeen) {
        // A group that was never reported has nobody with a vote.
        if !report.voters.is_empty() {
            for node in group.joining(report) {
                self.take(report.leader, node, report.bytes);
            }
        }
    }

    /// What would be left if what is on its way in a group were not.
    pub(super) fn without(&self, group: &Group<'_>, report: &GroupSeen) -> Self {
        let mut rest = self.clone();
        for node in group.joining(report) {
            rest.left = rest.left.saturating_add(1);
            for end in report.leader.into_iter().chain([node]) {
                rest.moves
                    .entry(end)
                    .and_modify(|moves| *moves = moves.saturating_sub(1));
            }
            let bytes = rest.bytes.entry(node);
            bytes.and_modify(|bytes| *bytes = bytes.saturating_sub(report.bytes));
        }
        rest
    }

    /// Takes in a replica on its way.
    pub(super) fn take(&mut self, leader: Option<u64>, node: u64, bytes: u64) {
        self.left = self.left.saturating_sub(1);
        for end in leader.into_iter().chain([node]) {
            let moves = self.moves.entry(end).or_default();
            *moves = moves.saturating_add(1);
        }
        let on_their_way = self.bytes.entry(node).or_default();
        *on_their_way = on_their_way.saturating_add(bytes);
    }

    fn is_free(&self, node: u64) -> bool {
        self.moves.get(&node).copied().unwrap_or(0) < self.per_node
    }

    /// Whether one more replica may be copied from this leader.
    pub(super) fn may_send(&self, leader: u64) -> bool {
        self.left > 0 && self.is_free(leader)
    }

    /// Whether one more replica may be on its way to a node.
    pub(super) fn may_receive(&self, node: u64) -> bool {
        self.left > 0 && self.is_free(node)
    }

    /// Whether one more replica may be on its way from a leader to a node.
    pub(super) fn allows(&self, leader: u64, node: u64) -> bool {
        self.may_send(leader) && self.may_receive(node)
    }

    /// Bytes that are on their way to a node.
    pub(super) fn bytes(&self, node: u64) -> u64 {
        self.bytes.get(&node).copied().unwrap_or(0)
    }
}
