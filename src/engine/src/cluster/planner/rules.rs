//! What a group needs, and which change of its targets serves it.

use super::change::{Change, Group};
use super::{Budget, Reason};
use crate::cluster::observed::{GroupSeen, Observed};
use crate::cluster::placement::{Layout, with, without};
use crate::cluster::records::{Cause, Config, Node, NodeState};
use crate::cluster::view::Cluster;

/// What a group needs, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// The replica on this node is lost; with so many others alive, the fewest first.
    Lost {
        /// Targets that answer.
        alive: usize,
        /// The node.
        node: u64,
    },
    /// There are fewer replicas than there could be.
    FillUp,
    /// This node is to hold nothing, and another is to take its replica.
    Leaving(u64),
    /// Too many replicas are in one zone.
    Zones,
    /// There are more replicas than there should be.
    Surplus,
}

/// Records, observations, and what follows for groups of one size.
pub(super) struct Rules<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) seen: &'a Observed,
    pub(super) config: &'a Config,
    /// Replicas a group is to have.
    pub(super) size: usize,
    /// Shards on the nodes that are to hold replicas, and are not lost.
    pub(super) layout: Layout<'a>,
}

impl<'a> Rules<'a> {
    pub(super) fn new(cluster: &'a Cluster, seen: &'a Observed, config: &'a Config, size: usize) -> Self {
        let is_lost = |node: u64| is_lost(seen, config, node);
        let members = cluster
            .nodes()
            .filter(|node| node.state.keeps_replicas() && !is_lost(node.id));
        let mut layout = Layout::new(members, size);
        for shard in cluster.shards() {
            layout.set(shard.number, &shard.targets);
        }
        Self {
            cluster,
            seen,
            config,
            size,
            layout,
        }
    }

    fn node(&self, id: u64) -> Option<&'a Node> {
        self.cluster.node(id)
    }

    /// For how long a node has been dead.
    pub(super) fn dead_for_ms(&self, id: u64) -> u64 {
        self.seen.nodes.get(&id).map_or(0, |seen| seen.dead_for_ms)
    }

    /// Whether a node has been dead for too long.
    fn is_lost(&self, id: u64) -> bool {
        is_lost(self.seen, self.config, id)
    }

    /// Whether records want a node to hold nothing.
    fn is_leaving(&self, id: u64) -> bool {
        self.node(id).is_none_or(|node| !node.state.keeps_replicas())
    }

    /// Whether a node can be given replicas.
    pub(super) fn is_usable(&self, id: u64) -> bool {
        self.node(id).is_some_and(|node| node.state == NodeState::Up) && self.seen.is_alive(id)
    }

    /// Whether a replica of so many bytes fits a node, beside what is on its way there.
    pub(super) fn has_room(&self, budget: &Budget, id: u64, bytes: u64) -> bool {
        let Some(node) = self.seen.nodes.get(&id) else {
            return false;
        };
        let taken = node.used_bytes.saturating_add(budget.bytes(id)).saturating_add(bytes);
        node.limit_bytes == 0 || taken <= node.limit_bytes
    }

    /// Whether all nodes that are targets answer.
    pub(super) fn holders_are_alive(&self) -> bool {
        let mut targets = self.cluster.shards().flat_map(|shard| &shard.targets);
        targets.all(|target| self.seen.is_alive(*target))
    }

    /// Whether it is known that a node has no replica of anything and is to have none.
    pub(super) fn holds_nothing(&self, id: u64) -> bool {
        let is_free = |targets: &[u64], seen: Option<&GroupSeen>| {
            let report = self.seen.report(seen);
            let is_absent =
                |seen: &GroupSeen| !seen.changing && !seen.voters.contains(&id) && !seen.learners.contains_key(&id);
            !targets.contains(&id) && report.is_some_and(|(_, seen)| is_absent(seen))
        };
        let controller = self.cluster.controller();
        let mut shards = 0..self.config.shards;
        controller.is_some_and(|controller| is_free(&controller.targets, Some(&self.seen.controller)))
            && shards.all(|number| {
                let shard = self.cluster.shard(number);
                shard.is_some_and(|shard| is_free(&shard.targets, self.seen.shards.get(&number)))
            })
    }

    /// Whether a majority of these nodes answers.
    fn has_majority(&self, targets: &[u64]) -> bool {
        let alive = targets.iter().filter(|target| self.seen.is_alive(**target)).count();
        2 * alive > targets.len()
    }

    /// What a settled group needs most.
    pub(super) fn need(&self, group: &Group<'_>, report: &GroupSeen) -> Option<Need> {
        let targets = group.targets;
        // Nothing is copied for a group that has too many.
        if targets.len() > self.size {
            return Some(Need::Surplus);
        }
        // One that is lost and unconfirmed does not hide one that is confirmed.
        let lost = || {
            targets
                .iter()
                .copied()
                .filter(|target| self.is_lost(*target) && !self.is_leaving(*target))
        };
        let confirmed = lost().find(|target| report.silent.contains(target));
        let alive = targets.iter().filter(|target| self.seen.is_alive(**target)).count();
        if let Some(node) = confirmed {
            return Some(Need::Lost { alive, node });
        }
        if targets.len() < self.layout.wanted() {
            return Some(Need::FillUp);
        }
        if let Some(node) = targets.iter().copied().find(|target| self.is_leaving(*target)) {
            return Some(Need::Leaving(node));
        }
        if let Some(node) = lost().next() {
            return Some(Need::Lost { alive, node });
        }
        (self.layout.excess(targets) > 0).then_some(Need::Zones)
    }

    /// The change that serves a settled group. `may_take` says whether a node may be given the replica; its second argument is
    /// whether the pace of moves matters.
    pub(super) fn change(
        &self,
        group: &Group<'_>,
        report: &GroupSeen,
        need: Need,
        may_take: impl Fn(u64, bool) -> bool,
    ) -> Result<Change, Reason> {
        let targets = group.targets;
        let best = |rest: &[u64], of: Option<u64>| {
            let is_free = |node: u64| self.is_usable(node) && !targets.contains(&node) && may_take(node, true);
            self.layout
                .best(group.number, rest, is_free)
                .ok_or(Reason::NoCandidate { of })
        };
        let change = match need {
            Need::Lost { node, .. } => {
                if !report.silent.contains(&node) {
                    return Err(Reason::Unconfirmed { node });
                }
                let joining = best(&without(targets, node), Some(node))?;
                Change::replace(targets, node, joining, Cause::Dead)
            }
            Need::FillUp => Change::add(targets, best(targets, None)?),
            Need::Leaving(node) => {
                let joining = best(&without(targets, node), Some(node))?;
                Change::replace(targets, node, joining, Cause::Leaving)
            }
            Need::Zones => return self.repair(group, may_take),
            Need::Surplus => {
                let spare = |among: &dyn Fn(u64) -> bool| self.layout.spare(group.number, targets, among);
                // The dead first, so that the others keep their majority.
                let dead = spare(&|node| !self.seen.is_alive(node));
                let node = dead
                    .or_else(|| spare(&|node| self.is_leaving(node)))
                    .or_else(|| spare(&|_| true));
                let node = node.ok_or(Reason::NoCandidate { of: None })?;
                let cause = if self.is_leaving(node) {
                    Cause::Leaving
                } else {
                    Cause::Surplus
                };
                Change::remove(targets, node, cause)
            }
        };
        self.check(group, change)
    }

    /// The replacement that best repairs a breach of the rule of zones.
    fn repair(&self, group: &Group<'_>, may_take: impl Fn(u64, bool) -> bool) -> Result<Change, Reason> {
        let targets = group.targets;
        let excess = self.layout.excess(targets);
        let parting = self.layout.spare(group.number, targets, |node| {
            self.layout.excess(&without(targets, node)) < excess
        });
        let parting = parting.ok_or(Reason::NoCandidate { of: None })?;
        let rest = without(targets, parting);
        let joining = self.layout.best(group.number, &rest, |node| {
            let is_free = self.is_usable(node) && !targets.contains(&node) && may_take(node, true);
            is_free && self.layout.excess(&with(&rest, node)) < excess
        });
        let joining = joining.ok_or(Reason::NoCandidate { of: Some(parting) })?;
        self.check(group, Change::replace(targets, parting, joining, Cause::Zones))
    }

    fn check(&self, group: &Group<'_>, change: Change) -> Result<Change, Reason> {
        if self.has_majority(group.targets) && self.has_majority(&change.targets) {
            Ok(change)
        } else {
            let targets = group.targets.to_vec();
            Err(Reason::Unsafe { targets })
        }
    }

    /// For a group that is under way: another change where the node that is to join is lost, or why it waits.
    pub(super) fn redirect(
        &self,
        group: &Group<'_>,
        report: &GroupSeen,
        may_take: impl Fn(u64, bool) -> bool,
    ) -> Option<Result<Change, Reason>> {
        let mut absent = group
            .joining(report)
            .filter(|node| !self.seen.is_alive(*node) || self.is_leaving(*node));
        let node = absent.next()?;
        let parting: Vec<u64> = report
            .voters
            .iter()
            .copied()
            .filter(|voter| !group.targets.contains(voter))
            .collect();
        let is_one_change = group.joining(report).count() == 1 && parting.len() <= 1;
        if report.changing || !is_one_change || !(self.is_lost(node) || self.is_leaving(node)) {
            return Some(Err(Reason::Waiting { node }));
        }
        let rest = without(group.targets, node);
        let is_free =
            |other: u64| self.is_usable(other) && !group.targets.contains(&other) && !report.voters.contains(&other);
        let best = |paced: bool| {
            let may_take = |other: u64| is_free(other) && may_take(other, paced);
            self.layout.best(group.number, &rest, may_take)
        };
        let change = match (best(true), parting.first()) {
            (Some(joining), _) => Change::replace(group.targets, node, joining, self.cause_of(node)),
            // Somebody can, when others are through.
            (None, _) if best(false).is_some() => return Some(Err(Reason::Waiting { node })),
            // Nobody else can: back to what is there.
            (None, Some(stays)) => Change::replace(group.targets, node, *stays, self.cause_of(node)),
            (None, None) => Change::remove(group.targets, node, self.cause_of(node)),
        };
        let voters: Vec<u64> = report.voters.iter().copied().collect();
        Some(self.check(
            &Group {
                targets: &voters,
                ..*group
            },
            change,
        ))
    }

    fn cause_of(&self, node: u64) -> Cause {
        if self.is_leaving(node) {
            Cause::Leaving
        } else {
            Cause::Dead
        }
    }
}

fn is_lost(seen: &Observed, config: &Config, node: u64) -> bool {
    let seen = seen.nodes.get(&node);
    seen.is_some_and(|seen| !seen.alive && seen.dead_for_ms >= config.replace_after_ms)
}
