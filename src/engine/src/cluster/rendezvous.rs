//! Rendezvous hashing: which node a shard is drawn to.
//!
//! Every pair of shard and node has a score, and a shard prefers the node with the highest (Thaler and Ravishankar, *Using
//! Name-Based Mappings to Increase Hit Rates*, 1998). A node that comes or goes changes nothing between the others.

use crate::hash::KeyHasher;

/// Not a secret: all nodes and releases must draw the same. "GNRENDEZVOUS HRW" in ASCII.
const SEED: [u64; 2] = [u64::from_le_bytes(*b"GNRENDEZ"), u64::from_le_bytes(*b"VOUS HRW")];

/// How strongly a shard is drawn to a node.
pub(super) fn score(shard: u16, node: u64) -> u64 {
    let mut pair = [0; 10];
    pair[..2].copy_from_slice(&shard.to_le_bytes());
    pair[2..].copy_from_slice(&node.to_le_bytes());
    KeyHasher::new(SEED, u64::MAX).hash(&pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes of different releases must agree.
    #[test]
    fn scores_never_change() {
        assert_eq!([score(0, 1), score(1, 0), score(16_383, u64::MAX)], SCORES);
    }

    const SCORES: [u64; 3] = [
        281_085_946_411_803_940,
        4_476_094_459_113_145_021,
        3_177_765_096_518_309_309,
    ];
}
