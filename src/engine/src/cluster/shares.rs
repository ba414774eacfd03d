//! Dealing things out in proportion to weights, by moving as few as that takes.
//!
//! Nodes hold numbers of things (replicas, leaderships), and a thing can be at some nodes only. What is fair is the least sum of
//! `count² / weight`: with equal weights that is the most even distribution there is, in the least maximum, the greatest minimum and
//! everything between. It is reached when no *path* leads from a node to another that it would be better to hold one more:
//! the first node gives a thing to a second, that one another thing to a third, and so on (Harvey, Ladner, Lovász and Tamir,
//! *Semi-Matchings for Bipartite Graphs and Load Balancing*, 2006). Weights are cores and counts are small, so everything is exact
//! in integers.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};

/// What a node holds, and what it should in proportion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) count: u64,
    /// At least 1.
    pub(super) weight: u64,
}

impl Share {
    /// Compares what one more would cost at either node.
    pub(super) fn cmp_taking(self, other: Self) -> Ordering {
        let (own, others) = (2 * self.count + 1, 2 * other.count + 1);
        (own * other.weight).cmp(&(others * self.weight))
    }

    /// Compares what one less would save at either node; nothing held saves nothing.
    pub(super) fn cmp_giving(self, other: Self) -> Ordering {
        let (own, others) = ((2 * self.count).saturating_sub(1), (2 * other.count).saturating_sub(1));
        (own * other.weight).cmp(&(others * self.weight))
    }

    /// Whether it is better that `other` holds one of these.
    pub(super) fn should_give_to(self, other: Self) -> bool {
        self.count > 0 && (2 * self.count - 1) * other.weight > (2 * other.count + 1) * self.weight
    }
}

/// The shares of all nodes among which things can be dealt.
pub(super) type Shares = BTreeMap<u64, Share>;

/// One thing going from a node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) shard: u16,
    pub(super) from: u64,
    pub(super) to: u64,
}

/// The shortest path that makes `shares` fairer, from the node that has most too much; its last move first, so that no node holds
/// more than before at any time but the one at the end.
///
/// Only `takers` are given anything; `moves` lists where things of a node can go, at most one move for each of them.
pub(super) fn fairer(shares: &Shares, takers: &[u64], mut moves: impl FnMut(u64) -> Vec<Move>) -> Option<Vec<Move>> {
    let takers = takers.iter().filter_map(|taker| shares.get(taker).copied());
    let neediest = takers.min_by(|a, b| a.cmp_taking(*b))?;
    let mut givers: Vec<(u64, Share)> = shares.iter().map(|(node, share)| (*node, *share)).collect();
    givers.retain(|(_, share)| share.should_give_to(neediest));
    givers.sort_by(|a, b| b.1.cmp_giving(a.1).then(a.0.cmp(&b.0)));
    givers
        .into_iter()
        .find_map(|(giver, _)| path(shares, giver, &mut moves))
}

/// Breadth first from `giver` to the nearest node that it should give to, and of the nearest to the neediest.
fn path(shares: &Shares, giver: u64, moves: &mut impl FnMut(u64) -> Vec<Move>) -> Option<Vec<Move>> {
    let mut reached: BTreeMap<u64, Move> = BTreeMap::new();
    let mut level = VecDeque::from([giver]);
    while !level.is_empty() {
        let mut next = VecDeque::new();
        for node in level {
            for found in moves(node) {
                let is_new = found.to != giver && shares.contains_key(&found.to) && !reached.contains_key(&found.to);
                if is_new {
                    reached.insert(found.to, found);
                    next.push_back(found.to);
                }
            }
        }
        let takers = next.iter().filter(|node| shares[&giver].should_give_to(shares[node]));
        if let Some(taker) = takers.min_by(|a, b| shares[a].cmp_taking(shares[b]).then(a.cmp(b))) {
            let mut path = vec![reached[taker]];
            while let Some(last) = path.last().filter(|last| last.from != giver) {
                path.push(reached[&last.from]);
            }
            return Some(path);
        }
        level = next;
    }
    None
}
