//! Who holds what, and how good that is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::cluster::records::Node;
use crate::cluster::rendezvous::score;
use crate::cluster::shares::{Move, Share, Shares, fairer};

/// The nodes that hold each shard.
///
/// Its **members** are the nodes that are to hold something; a target that is none of them is on its way out, and counts for nothing.
#[derive(Debug, Clone)]
pub(in crate::cluster) struct Layout<'a> {
    /// Zones of the members.
    zones: BTreeMap<u64, &'a str>,
    /// Replicas wanted of each shard: the replication factor, or as many as there are members.
    wanted: usize,
    /// Most replicas of a shard in one zone.
    zone_limit: usize,
    targets: BTreeMap<u16, Vec<u64>>,
    shares: Shares,
}

impl<'a> Layout<'a> {
    /// A layout without shards.
    pub(in crate::cluster) fn new(members: impl IntoIterator<Item = &'a Node>, replication: usize) -> Self {
        let mut zones = BTreeMap::new();
        let mut shares = Shares::new();
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        for node in members {
            let weight = u64::from(node.cores.max(1));
            zones.insert(node.id, node.zone.as_str());
            shares.insert(node.id, Share { count: 0, weight });
            *sizes.entry(&node.zone).or_default() += 1;
        }
        let wanted = replication.min(zones.len());
        let fits = |limit: usize| sizes.values().map(|size| limit.min(*size)).sum::<usize>() >= wanted;
        let mut zone_limit = (replication / 2).max(1);
        while !fits(zone_limit) {
            zone_limit += 1;
        }
        Self {
            zones,
            wanted,
            zone_limit,
            targets: BTreeMap::new(),
            shares,
        }
    }

    /// Takes a shard as it is.
    pub(in crate::cluster) fn set(&mut self, shard: u16, targets: &[u64]) {
        for target in self.targets.insert(shard, targets.to_vec()).unwrap_or_default() {
            if let Some(share) = self.shares.get_mut(&target) {
                share.count -= 1;
            }
        }
        for target in targets {
            if let Some(share) = self.shares.get_mut(target) {
                share.count += 1;
            }
        }
    }

    /// The targets of a shard, ascending.
    pub(in crate::cluster) fn targets(&self, shard: u16) -> &[u64] {
        self.targets.get(&shard).map_or(&[], Vec::as_slice)
    }

    /// Replicas wanted of each shard.
    pub(in crate::cluster) fn wanted(&self) -> usize {
        self.wanted
    }

    /// Most replicas of a shard in one zone.
    pub(in crate::cluster) fn zone_limit(&self) -> usize {
        self.zone_limit
    }

    /// The share of a member.
    #[cfg(test)]
    pub(in crate::cluster) fn shares(&self) -> &Shares {
        &self.shares
    }

    /// By how many replicas the targets break the rule of zones.
    pub(in crate::cluster) fn excess(&self, targets: &[u64]) -> usize {
        let zones = targets.iter().filter_map(|target| self.zones.get(target));
        let over = zones.clone().enumerate().filter(|(place, zone)| {
            let before = zones.clone().take(*place).filter(|other| other == zone);
            before.count() >= self.zone_limit
        });
        over.count()
    }

    /// By how many replicas more they break it with `node`, a member: one or none.
    pub(in crate::cluster) fn excess_of(&self, rest: &[u64], node: u64) -> usize {
        usize::from(self.neighbours(rest, node) >= self.zone_limit)
    }

    /// How many of the targets are in the zone of `node`.
    fn neighbours(&self, targets: &[u64], node: u64) -> usize {
        let zone = self.zones.get(&node);
        targets.iter().filter(|target| self.zones.get(target) == zone).count()
    }

    /// The member that `allowed` to take a replica of a shard, and best to hold it beside `rest`.
    pub(in crate::cluster) fn best(&self, shard: u16, rest: &[u64], allowed: impl Fn(u64) -> bool) -> Option<u64> {
        let candidates = self.shares.iter().filter(|(id, _)| !rest.contains(id) && allowed(**id));
        let ranked = candidates.min_by(|(a, a_share), (b, b_share)| {
            let excess = |id: u64| self.excess_of(rest, id);
            let hard = excess(**a).cmp(&excess(**b)).then(a_share.cmp_taking(**b_share));
            let soft = || self.neighbours(rest, **a).cmp(&self.neighbours(rest, **b));
            hard.then_with(soft)
                .then_with(|| score(shard, **b).cmp(&score(shard, **a)))
        });
        ranked.map(|(id, _)| *id)
    }

    /// The one of the targets that can best be spared: by zone, then by what its node holds.
    pub(in crate::cluster) fn spare(&self, shard: u16, targets: &[u64], allowed: impl Fn(u64) -> bool) -> Option<u64> {
        let candidates = targets.iter().copied().filter(|id| allowed(*id));
        candidates.min_by(|a, b| {
            let excess = |id: u64| self.excess(&without(targets, id));
            let held = |id: &u64| self.shares.get(id).copied().unwrap_or(Share { count: 0, weight: 1 });
            let crowded = |id: u64| Reverse(self.neighbours(targets, id));
            let order = excess(*a).cmp(&excess(*b)).then(held(b).cmp_giving(held(a)));
            order
                .then(crowded(*a).cmp(&crowded(*b)))
                .then_with(|| score(shard, *a).cmp(&score(shard, *b)))
        })
    }

    /// Draws a shard's targets by rendezvous, within the rule of zones.
    pub(super) fn draw(&mut self, shard: u16) {
        let mut ids: Vec<u64> = self.zones.keys().copied().collect();
        ids.sort_by_key(|id| Reverse(score(shard, *id)));
        self.fill(shard, ids);
    }

    /// Gives a shard the first members that the rule of zones allows.
    pub(super) fn fill_in_order(&mut self, shard: u16) {
        let ids = self.zones.keys().copied().collect();
        self.fill(shard, ids);
    }

    fn fill(&mut self, shard: u16, ids: Vec<u64>) {
        let mut targets = Vec::new();
        for id in ids {
            if targets.len() < self.wanted && self.neighbours(&targets, id) < self.zone_limit {
                targets = with(&targets, id);
            }
        }
        self.set(shard, &targets);
    }

    /// The fewest moves that make the shares fairer, of the shards and to the members that are allowed to; the first can be made
    /// first. `None` where they are as fair as that and zones allow.
    pub(in crate::cluster) fn fairer(
        &self,
        may_move: impl Fn(u16) -> bool,
        may_take: impl Fn(u64) -> bool,
    ) -> Option<Vec<Move>> {
        let takers: Vec<u64> = self.shares.keys().copied().filter(|id| may_take(*id)).collect();
        // This is asked of every shard and taker: zones by number, and counted once a shard.
        let mut names: Vec<&str> = self.zones.values().copied().collect();
        names.sort_unstable();
        names.dedup();
        let zone_of = |zone: &str| {
            names
                .binary_search(&zone)
                .expect("invariant: all zones are among their names")
        };
        let zones: BTreeMap<u64, usize> = self.zones.iter().map(|(id, zone)| (*id, zone_of(zone))).collect();
        let path = fairer(&self.shares, &takers, |from| {
            let mut moves: BTreeMap<u64, Move> = BTreeMap::new();
            let mut counts = vec![0; names.len()];
            for (shard, targets) in &self.targets {
                if !targets.contains(&from) || !may_move(*shard) {
                    continue;
                }
                counts.fill(0);
                for target in targets.iter().filter(|target| **target != from) {
                    if let Some(zone) = zones.get(target) {
                        counts[*zone] += 1;
                    }
                }
                let is_full = |id: u64| counts[zones[&id]] >= self.zone_limit;
                let was_full = is_full(from);
                for to in takers.iter().copied() {
                    if targets.contains(&to) || (is_full(to) && !was_full) {
                        continue;
                    }
                    let found = Move {
                        shard: *shard,
                        from,
                        to,
                    };
                    let best = moves.entry(to).or_insert(found);
                    if score(*shard, to) > score(best.shard, to) {
                        *best = found;
                    }
                }
            }
            moves.into_values().collect()
        })?;
        // A shard that is on the path twice may allow only one of the moves: then they are tried out.
        let mut tried = self.clone();
        for step in &path {
            let targets = tried.targets(step.shard);
            let after = with(&without(targets, step.from), step.to);
            let is_sound = targets.contains(&step.from)
                && !targets.contains(&step.to)
                && tried.excess(&after) <= tried.excess(targets);
            if !is_sound {
                return None;
            }
            tried.relocate(*step);
        }
        Some(path)
    }

    /// Moves a replica.
    pub(in crate::cluster) fn relocate(&mut self, step: Move) {
        let targets = with(&without(self.targets(step.shard), step.from), step.to);
        self.set(step.shard, &targets);
    }
}

/// `targets` and `node`, ascending.
pub(in crate::cluster) fn with(targets: &[u64], node: u64) -> Vec<u64> {
    let mut targets = targets.to_vec();
    if let Err(place) = targets.binary_search(&node) {
        targets.insert(place, node);
    }
    targets
}

/// `targets` without `node`, ascending.
pub(in crate::cluster) fn without(targets: &[u64], node: u64) -> Vec<u64> {
    targets.iter().copied().filter(|target| *target != node).collect()
}
