//! Who should lead each shard.
//!
//! Every node computes the same from its copy of the records and from which nodes are fit, so nobody has to decide for all. With
//! every node fit, a shard is led by its **home**; the homes are fair (see [`shares`](super::shares): with equal cores, and where targets
//! allow it, no node leads two more than another). Where nodes are not fit, the shards at home there are dealt out to other targets.
//!
//! # What holds
//! - Only a target that is fit and [`NodeState::Up`] leads; a shard without one has no leader here, and whoever leads it goes on.
//! - The result is as fair as targets and fit nodes allow.
//! - **A shard whose home is fit is led from home**, unless nothing else makes it fair: so when a node falls out its shards move, and
//!   when it returns they return.
//! - Where every node is to hold everything, the home of shard s is node s modulo their number, in the order of ids: founders
//!   take turns. In larger clusters it is what the shard's record says ([`Shard::home`], which the [`planner`](super::planner) has
//!   follow once all is settled), so that a node that joins, or a replica that moves, moves few leaders; where it says nothing
//!   rendezvous draws it.
//! - Busy shards ([`Shard::load`]) are spread by exchanging two homes where a node would have a quarter more than its part, which
//!   changes no counts. Load is a coarse step that [`load_step`] changes reluctantly: small changes move nothing.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use super::records::NodeState;
#[cfg(doc)]
use super::records::Shard;
use super::rendezvous::score;
use super::shares::{Move, Share, Shares, fairer};
use super::view::Cluster;

/// The node that should lead each shard, by number; `None` where no target is fit.
///
/// `fit` are the nodes that live and whose clocks are right; those that the records want to lead nothing are left out here.
pub fn leaders(cluster: &Cluster, fit: &BTreeSet<u64>) -> Vec<Option<u64>> {
    let homes = homes(cluster);
    let is_fit = |id: &u64| fit.contains(id) && cluster.node(*id).is_some_and(|node| node.state == NodeState::Up);
    if homes.iter().flatten().all(is_fit) {
        return homes;
    }
    let (options, costs) = shards(cluster, homes.len(), is_fit);
    let mut dealt = Assignment::new(cluster, is_fit, options, &costs);
    let mut orphans = BTreeSet::new();
    for (number, home) in (0_u16..).zip(homes) {
        let kept = home.filter(is_fit);
        if kept.is_none() {
            orphans.insert(number);
        }
        dealt.assign(number, kept);
    }
    for orphan in &orphans {
        dealt.deal(*orphan);
    }
    dealt.make_fair(|shard| orphans.contains(&shard));
    dealt.make_fair(|_| true);
    dealt.exchange(|shard| orphans.contains(&shard));
    dealt.leader
}

/// The node that leads each shard where all nodes are fit; `None` where a shard has no target.
pub(super) fn homes(cluster: &Cluster) -> Vec<Option<u64>> {
    let Some(config) = cluster.config() else {
        return Vec::new();
    };
    let stays = |id: &u64| cluster.node(*id).is_some_and(|node| node.state != NodeState::Gone);
    let nodes: Vec<u64> = cluster.nodes().map(|node| node.id).filter(stays).collect();
    let take_turns = nodes.len() <= usize::from(config.replication);
    let (options, costs) = shards(cluster, usize::from(config.shards), stays);
    let drawn_to = |number: u16, targets: &[u64]| {
        let first = if take_turns {
            nodes.get(usize::from(number) % nodes.len().max(1)).copied()
        } else {
            cluster.shard(number).and_then(|shard| shard.home)
        };
        let first = first.filter(|first| targets.contains(first));
        first.or_else(|| targets.iter().copied().max_by_key(|target| score(number, *target)))
    };
    let drawn: Vec<Option<u64>> = (0_u16..)
        .zip(&options)
        .map(|(number, targets)| drawn_to(number, targets))
        .collect();
    let mut homes = Assignment::new(cluster, stays, options, &costs);
    for (number, home) in (0_u16..).zip(drawn) {
        homes.assign(number, home);
    }
    homes.make_fair(|_| true);
    homes.exchange(|_| true);
    homes.leader
}

/// For each shard the targets that may lead it, ascending, and what leading it costs.
fn shards(cluster: &Cluster, count: usize, may_lead: impl Fn(&u64) -> bool) -> (Vec<Vec<u64>>, Vec<u64>) {
    let numbers = (0_u16..).take(count);
    let each = numbers.map(|number| match cluster.shard(number) {
        Some(shard) => {
            let targets = shard.targets.iter().copied().filter(&may_lead);
            (targets.collect(), cost(shard.load))
        }
        None => (Vec::new(), cost(0)),
    });
    each.unzip()
}

/// Highest step of load.
const MAX_LOAD: u8 = 15;

/// What leading a shard costs, in proportion: four times as much a step.
fn cost(load: u8) -> u64 {
    1 << (2 * load.min(MAX_LOAD))
}

/// The step of load of a shard that was at step `current` and serves `rate` operations a second.
///
/// Step n stands for 4^n to 4^(n+1) thousand operations a second (step 0 also for less). A step is kept until the rate has left it
/// by a factor of two, so that a rate must change by that much after a change before it can be changed back.
pub fn load_step(current: u8, rate: u64) -> u8 {
    let step = |thousands: u64| (thousands.max(1).ilog(4) as u8).min(MAX_LOAD);
    let (low, high) = (step(rate / 2 / 1000), step(rate.saturating_mul(2) / 1000));
    if (low..=high).contains(&current) {
        current
    } else {
        step(rate / 1000)
    }
}

/// Which node leads which shard, in the making.
struct Assignment<'a> {
    /// The nodes that may lead each shard.
    options: Vec<Vec<u64>>,
    costs: &'a [u64],
    leader: Vec<Option<u64>>,
    led: BTreeMap<u64, BTreeSet<u16>>,
    shares: Shares,
}

impl<'a> Assignment<'a> {
    fn new(cluster: &Cluster, may_lead: impl Fn(&u64) -> bool, options: Vec<Vec<u64>>, costs: &'a [u64]) -> Self {
        let nodes = cluster.nodes().filter(|node| may_lead(&node.id));
        let shares: Shares = nodes
            .map(|node| {
                let weight = u64::from(node.cores);
                (node.id, Share { count: 0, weight })
            })
            .collect();
        Self {
            leader: vec![None; options.len()],
            led: shares.keys().map(|id| (*id, BTreeSet::new())).collect(),
            options,
            costs,
            shares,
        }
    }

    fn assign(&mut self, shard: u16, node: Option<u64>) {
        let before = std::mem::replace(&mut self.leader[usize::from(shard)], node);
        if let Some(before) = before {
            self.share(before).count -= 1;
            self.led.entry(before).or_default().remove(&shard);
        }
        if let Some(node) = node {
            self.share(node).count += 1;
            self.led.entry(node).or_default().insert(shard);
        }
    }

    fn share(&mut self, node: u64) -> &mut Share {
        self.shares
            .get_mut(&node)
            .expect("invariant: options are nodes with a weight")
    }

    /// Gives a shard to the node that it is best for to have one more, of several such to the one with the smallest id.
    fn deal(&mut self, shard: u16) {
        let options = self.options[usize::from(shard)].iter().copied();
        let neediest = options.min_by(|a, b| self.shares[a].cmp_taking(self.shares[b]).then(a.cmp(b)));
        self.assign(shard, neediest);
    }

    /// Makes it fair by moving the shards that `may_move`, as few as that takes.
    fn make_fair(&mut self, may_move: impl Fn(u16) -> bool) {
        let nodes: Vec<u64> = self.shares.keys().copied().collect();
        loop {
            let path = fairer(&self.shares, &nodes, |node| {
                let mut moves: BTreeMap<u64, Move> = BTreeMap::new();
                for shard in self.led[&node].iter().copied().filter(|shard| may_move(*shard)) {
                    for to in self.options[usize::from(shard)]
                        .iter()
                        .copied()
                        .filter(|to| *to != node)
                    {
                        moves.entry(to).or_insert(Move { shard, from: node, to });
                    }
                }
                moves.into_values().collect()
            });
            let Some(path) = path else { break };
            for Move { shard, to, .. } in path {
                self.assign(shard, Some(to));
            }
        }
    }

    /// The load that a node leads.
    fn load(&self, node: u64) -> u64 {
        self.led[&node]
            .iter()
            .map(|shard| self.costs[usize::from(*shard)])
            .sum()
    }

    /// Has pairs of nodes exchange two shards each that `may_move`, while the busier has a quarter more than its part of all load.
    fn exchange(&mut self, may_move: impl Fn(u16) -> bool) {
        if self.costs.windows(2).all(|pair| pair[0] == pair[1]) {
            return;
        }
        let weight: u64 = self.shares.values().map(|share| share.weight).sum();
        let total: u64 = self.led.keys().map(|node| self.load(*node)).sum();
        // Each exchange makes the busier of two nodes less busy and the other no busier than that, so this ends; the bound keeps it
        // short.
        for _ in 0..self.options.len() {
            let mut busy: Vec<u64> = self.led.keys().copied().collect();
            let over = |node: &u64| {
                let own = u128::from(self.load(*node)) * 4 * u128::from(weight);
                own > u128::from(total) * 5 * u128::from(self.shares[node].weight)
            };
            busy.retain(over);
            let Some((a, b)) = busy.into_iter().find_map(|node| self.best_exchange(node, &may_move)) else {
                break;
            };
            let (node, other) = (self.leader[usize::from(a)], self.leader[usize::from(b)]);
            self.assign(a, other);
            self.assign(b, node);
        }
    }

    /// The exchange of a shard of `node` for one of another node that leaves the busier of the two with least.
    fn best_exchange(&self, node: u64, may_move: &impl Fn(u16) -> bool) -> Option<(u16, u16)> {
        let own_load = self.load(node);
        let own_weight = self.shares[&node].weight;
        let mut best: Option<(u128, u16, u16)> = None;
        for (other, share) in self.shares.iter().filter(|(other, _)| **other != node) {
            let other_load = self.load(*other);
            // Loads in proportion to weights, as whole numbers.
            let busier = |own: u64, others: u64| {
                (u128::from(own) * u128::from(share.weight)).max(u128::from(others) * u128::from(own_weight))
            };
            let before = busier(own_load, other_load);
            for a in self.led[&node].iter().copied().filter(|a| may_move(*a)) {
                if !self.options[usize::from(a)].contains(other) {
                    continue;
                }
                for b in self.led[other].iter().copied().filter(|b| may_move(*b)) {
                    let (gives, takes) = (self.costs[usize::from(a)], self.costs[usize::from(b)]);
                    if gives <= takes || !self.options[usize::from(b)].contains(&node) {
                        continue;
                    }
                    let after = busier(own_load - gives + takes, other_load - takes + gives);
                    // Per unit of the other's weight, so that nodes compare.
                    let rank = after / u128::from(share.weight);
                    if after < before && best.is_none_or(|best| (rank, a, b) < best) {
                        best = Some((rank, a, b));
                    }
                }
            }
        }
        best.map(|(_, a, b)| (a, b))
    }
}
