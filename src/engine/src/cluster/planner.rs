//! What the controller changes next.
//!
//! [`plan`] compares what records want with what is seen and returns the next changes of records, a few at a time; it is called
//! again and again with fresh observations, by whoever leads group 0. It remembers nothing: what is under way shows as a shard
//! whose voters are not its targets.
//!
//! # What holds
//! - **One replica at a time**: a shard's targets change by one element, and only where its actual voters are its targets, no change
//!   of members is under way, and its leader has reported that. The one exception is a change that cannot be carried out since the
//!   node that was to come is lost: its place goes to another, while the voters are still what they were.
//! - **Never a majority lost**: a majority of the old and of the new targets is alive.
//! - **Nothing on hearsay**: without a majority of nodes nothing is changed, and a dead node's replica is made anew only where
//!   the shard's own leader has not heard that node either, and it has been dead for [`Config::replace_after_ms`].
//! - **Bounded**: [`Config::moves_per_node`] and [`Config::moves_total`] bound the replicas on their way, those under way included.
//! - **It settles**: each step brings targets nearer to what is wanted by an order that only falls (lost replicas, missing ones, leaving
//!   ones, breaches of the rule of zones, surplus ones, unfairness); with nodes left alone there are no steps after finitely many
//!   calls.
//! - Steps are idempotent: each expects the version it was made for.
//!
//! A dead node is never declared gone: it may come back, and then holds what targets say. Only an operator has a node leave.
//!
//! Not here: carrying targets out (the shards' leaders), observing, storing.

mod change;
mod rules;
#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use change::{Budget, Change, Group};
use rules::Rules;

use super::leaders::{homes, load_step};
use super::observed::{GroupSeen, Observed};
use super::placement::controller_size;
#[cfg(doc)]
use super::records::Config;
use super::records::{Cause, Controller, Node, NodeState, Record, RecordKey, Shard};
use super::step::Step;
use super::view::Cluster;

/// What to change next, and how far everything is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The next changes, the most urgent first. They are of different records, and independent of each other.
    pub steps: Vec<Step>,
    /// What should be changed and cannot be.
    pub stuck: Vec<Stuck>,
    /// How far it is.
    pub progress: Progress,
}

/// How far actual members are what they should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Shards whose voters are their targets.
    pub settled: usize,
    /// Shards, and group 0, whose members are on their way to the targets.
    pub moving: Vec<Moving>,
    /// Shards that wait for others to be through.
    pub waiting: usize,
}

/// A group whose members are on their way to the targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moving {
    /// The group's record.
    pub about: RecordKey,
    /// Nodes that are to have a vote and have none yet, and by how many log entries they lag behind, where that is known.
    pub joining: Vec<(u64, Option<u64>)>,
    /// Nodes that have a vote and are to have none.
    pub parting: Vec<u64>,
    /// Why.
    pub cause: Cause,
}

/// Something that should be changed and cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// The record of what is stuck.
    pub about: RecordKey,
    /// Why.
    pub reason: Reason,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.reason)
    }
}

/// Why something cannot be changed now, and what helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// There is no configuration.
    #[error("the cluster is not founded")]
    NotFounded,
    /// Too many nodes do not answer for anybody to know what is so.
    #[error("only {alive} of {nodes} nodes answer, and nothing is changed without a majority: start more of them")]
    NoMajority {
        /// Nodes that answer.
        alive: usize,
        /// Nodes that are not gone.
        nodes: usize,
    },
    /// A shard without a record.
    #[error("has no record")]
    NoRecord,
    /// Nobody leads the group, or its leader has not reported.
    #[error("has no leader: a majority of nodes {targets:?} must be up")]
    NoLeader {
        /// The group's targets.
        targets: Vec<u64>,
    },
    /// A node that is to have a replica does not answer.
    #[error("waits for node {node}, which does not answer")]
    Waiting {
        /// The node.
        node: u64,
    },
    /// A node is dead for group 0's leader and not for the group's.
    #[error("node {node} seems dead, but the group's leader hears it: look at the network between nodes")]
    Unconfirmed {
        /// The node.
        node: u64,
    },
    /// No node can take a replica.
    #[error("no node can take a replica{}: add a node, or memory", in_place_of(*.of))]
    NoCandidate {
        /// The node whose replica it should take.
        of: Option<u64>,
    },
    /// Removing a replica would leave the others without a majority.
    #[error("a replica cannot be removed while so many of nodes {targets:?} do not answer")]
    Unsafe {
        /// The group's targets.
        targets: Vec<u64>,
    },
}

fn in_place_of(node: Option<u64>) -> String {
    node.map(|node| format!(" in place of node {node}")).unwrap_or_default()
}

/// The next changes of records.
pub fn plan(cluster: &Cluster, seen: &Observed) -> Plan {
    let mut plan = Plan::default();
    let Some(config) = cluster.config() else {
        plan.stuck(RecordKey::Config, Reason::NotFounded);
        return plan;
    };
    let nodes = cluster.nodes().filter(|node| node.state != NodeState::Gone);
    let (alive, dead): (Vec<&Node>, Vec<&Node>) = nodes.partition(|node| seen.is_alive(node.id));
    if alive.len() <= dead.len() {
        let nodes = alive.len() + dead.len();
        plan.stuck(
            RecordKey::Config,
            Reason::NoMajority {
                alive: alive.len(),
                nodes,
            },
        );
        return plan;
    }
    let staying = cluster.nodes().filter(|node| node.state.keeps_replicas()).count();
    let mut budget = Budget::new(config);

    let rules = Rules::new(cluster, seen, config, controller_size(staying));
    plan.controller(&rules, &mut budget);

    let mut rules = Rules::new(cluster, seen, config, usize::from(config.replication));
    plan.shards(&mut rules, budget);
    plan.partings(&rules);
    plan.notes(&rules);
    plan
}

impl Plan {
    fn stuck(&mut self, about: RecordKey, reason: Reason) {
        self.stuck.push(Stuck { about, reason });
    }

    fn step(&mut self, rules: &Rules<'_>, record: &Record, text: String) {
        let step = Step::new(rules.cluster, record, text);
        self.steps
            .push(step.expect("invariant: what was read and changed within limits can be written"));
    }

    /// Takes in that a group is under way.
    fn moving(&mut self, group: &Group<'_>, report: &GroupSeen, cause: Cause) {
        let joining = group.joining(report);
        self.progress.moving.push(Moving {
            about: group.key,
            joining: joining
                .map(|node| (node, report.learners.get(&node).copied()))
                .collect(),
            parting: report
                .voters
                .iter()
                .copied()
                .filter(|voter| !group.targets.contains(voter))
                .collect(),
            cause,
        });
    }

    /// Group 0's own members.
    fn controller(&mut self, rules: &Rules<'_>, budget: &mut Budget) {
        let Some(controller) = rules.cluster.controller() else {
            self.stuck(RecordKey::Controller, Reason::NoRecord);
            return;
        };
        let key = RecordKey::Controller;
        let group = Group {
            key,
            number: 0,
            targets: &controller.targets,
        };
        budget.count(&group, &rules.seen.controller);
        let Some((_, report)) = rules.seen.report(Some(&rules.seen.controller)) else {
            let targets = controller.targets.clone();
            self.stuck(key, Reason::NoLeader { targets });
            return;
        };
        let found = if group.is_settled(report) {
            rules
                .need(&group, report)
                .map(|need| rules.change(&group, report, need, |_, _| true))
        } else {
            self.moving(&group, report, controller.cause);
            rules.redirect(&group, report, |_, _| true)
        };
        match found {
            None => {}
            Some(Err(reason)) => self.stuck(key, reason),
            Some(Ok(change)) => {
                let next = Controller {
                    targets: change.targets.clone(),
                    cause: change.cause,
                    ..controller.clone()
                };
                self.step(rules, &Record::Controller(next), change.text(&group, rules));
            }
        }
    }

    /// The members of shards.
    fn shards<'a>(&mut self, rules: &mut Rules<'a>, mut budget: Budget) {
        let mut settled: Vec<(&'a Shard, u64, &'a GroupSeen)> = Vec::new();
        let mut under_way: Vec<(&'a Shard, u64, &'a GroupSeen)> = Vec::new();
        for number in 0..rules.config.shards {
            let key = RecordKey::Shard(number);
            let Some(shard) = rules.cluster.shard(number) else {
                self.stuck(key, Reason::NoRecord);
                continue;
            };
            let group = Group::of(shard);
            let seen = rules.seen.shards.get(&number);
            if let Some(seen) = seen {
                budget.count(&group, seen);
            }
            let Some((leader, report)) = rules.seen.report(seen) else {
                let targets = shard.targets.clone();
                self.stuck(key, Reason::NoLeader { targets });
                continue;
            };
            if group.is_settled(report) {
                settled.push((shard, leader, report));
            } else {
                under_way.push((shard, leader, report));
                self.moving(&group, report, shard.cause);
            }
        }
        self.progress.settled = settled.len();
        for (shard, leader, report) in under_way {
            let group = Group::of(shard);
            // The newcomer that is lost must not keep its own successor waiting.
            let rest = budget.without(&group, report);
            let may_take = |node: u64, paced: bool| {
                rules.has_room(&rest, node, report.bytes) && (!paced || rest.allows(leader, node))
            };
            match rules.redirect(&group, report, may_take) {
                None => {}
                Some(Err(reason)) => self.stuck(group.key, reason),
                Some(Ok(change)) => {
                    budget = rest;
                    if let Some(node) = change.joining {
                        budget.take(Some(leader), node, report.bytes);
                    }
                    self.retarget(rules, shard, report, &change);
                }
            }
        }

        let mut needs = Vec::new();
        for (shard, leader, report) in &settled {
            if let Some(need) = rules.need(&Group::of(shard), report) {
                needs.push((need, *shard, *leader, *report));
            }
        }
        needs.sort_by_key(|(need, shard, ..)| (*need, shard.number));
        let is_sound = needs.is_empty() && self.stuck.iter().all(|stuck| stuck.about == RecordKey::Controller);
        for (need, shard, leader, report) in needs {
            let group = Group::of(shard);
            let has_room = |node: u64| rules.has_room(&budget, node, report.bytes);
            match rules.change(&group, report, need, |node, paced| {
                has_room(node) && (!paced || budget.allows(leader, node))
            }) {
                Err(Reason::NoCandidate { .. })
                    if rules.change(&group, report, need, |node, _| has_room(node)).is_ok() =>
                {
                    self.progress.waiting += 1;
                }
                Err(reason) => self.stuck(group.key, reason),
                Ok(change) => {
                    if let Some(node) = change.joining {
                        budget.take(Some(leader), node, report.bytes);
                    }
                    self.retarget(rules, shard, report, &change);
                }
            }
        }
        if is_sound && rules.holders_are_alive() {
            self.balance(rules, &settled, budget);
        }
    }

    /// Evens out what nodes hold.
    fn balance(&mut self, rules: &mut Rules<'_>, settled: &[(&Shard, u64, &GroupSeen)], mut budget: Budget) {
        let mut movable: BTreeMap<u16, (&Shard, u64, &GroupSeen)> = settled
            .iter()
            .map(|(shard, leader, report)| (shard.number, (*shard, *leader, *report)))
            .collect();
        let mut full = BTreeSet::new();
        loop {
            let may_move = |shard: u16| {
                movable
                    .get(&shard)
                    .is_some_and(|(_, leader, _)| budget.may_send(*leader))
            };
            let may_take = |node: u64| rules.is_usable(node) && budget.may_receive(node) && !full.contains(&node);
            let Some(path) = rules.layout.fairer(may_move, may_take) else {
                break;
            };
            let Some(first) = path.first().copied() else { break };
            let Some((shard, leader, report)) = movable.get(&first.shard).copied() else {
                break;
            };
            if !rules.has_room(&budget, first.to, report.bytes) {
                full.insert(first.to);
                continue;
            }
            movable.remove(&first.shard);
            budget.take(Some(leader), first.to, report.bytes);
            let change = Change::replace(&shard.targets, first.from, first.to, Cause::Balance);
            self.retarget(rules, shard, report, &change);
        }
    }

    /// Changes a shard's targets.
    fn retarget(&mut self, rules: &mut Rules<'_>, shard: &Shard, report: &GroupSeen, change: &Change) {
        let stays = |home: &u64| change.targets.contains(home);
        let home = shard.home.and_then(|home| Some(home).filter(stays).or(change.joining));
        let next = Shard {
            targets: change.targets.clone(),
            cause: change.cause,
            load: load_step(shard.load, report.load),
            home,
            ..shard.clone()
        };
        rules.layout.set(shard.number, &change.targets);
        let text = change.text(&Group::of(shard), rules);
        self.step(rules, &Record::Shard(next), text);
    }

    /// Nodes that have left altogether.
    fn partings(&mut self, rules: &Rules<'_>) {
        for node in rules.cluster.nodes().filter(|node| node.state == NodeState::Leaving) {
            if rules.holds_nothing(node.id) {
                let gone = Node {
                    state: NodeState::Gone,
                    ..node.clone()
                };
                let text = format!("node {} has left: nothing is held there any more", node.id);
                self.step(rules, &Record::Node(gone), text);
            }
        }
    }

    /// What records note down of settled shards: how busy they are and, with nothing else to do, where their homes are.
    fn notes(&mut self, rules: &Rules<'_>) {
        let is_quiet = self.steps.is_empty() && self.progress.settled == usize::from(rules.config.shards);
        let homes = if is_quiet { homes(rules.cluster) } else { Vec::new() };
        let stepped: BTreeSet<Vec<u8>> = self.steps.iter().map(|step| step.key.clone()).collect();
        for shard in rules.cluster.shards() {
            let Some((_, report)) = rules.seen.report(rules.seen.shards.get(&shard.number)) else {
                continue;
            };
            let key = RecordKey::Shard(shard.number);
            if stepped.contains(&super::records::key_of(key)) {
                continue;
            }
            let load = load_step(shard.load, report.load);
            let home = homes.get(usize::from(shard.number)).copied().unwrap_or(shard.home);
            let mut texts = Vec::new();
            if load != shard.load {
                texts.push(format!("its load is now step {load}, after {}", shard.load));
            }
            if home != shard.home {
                let name = home.map_or("nowhere".to_owned(), |home| format!("node {home}"));
                texts.push(format!("its home is {name}"));
            }
            if !texts.is_empty() {
                let next = Shard {
                    load,
                    home,
                    ..shard.clone()
                };
                self.step(rules, &Record::Shard(next), format!("{key}: {}", texts.join(", ")));
            }
        }
    }
}
