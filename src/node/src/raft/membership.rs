//! The encoding of a shard's membership, in log entries, snapshots and messages.
//!
//! # Format, version 1
//! All numbers are little-endian.
//! ```text
//!  0  u8   format version, 1
//!  1  u8   number of sets of voters: 1, or 2 while a change is under way (0 before the first)
//!  2  u16  number of replicas
//!  4  the replicas, by ascending id: u64 replica, u64 node, u8 bits 0 and 1: member of the first and second set of voters
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::types::{Membership, Place, ReplicaId};

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 4;
const REPLICA_BYTES: usize = 17;
/// More sets never stand beside each other in joint consensus.
const MAX_SETS: usize = 2;

/// Encodes a membership.
///
/// # Panics
/// If it has more than two sets of voters or more than 65,535 replicas, which openraft and placement never make.
pub(crate) fn encode(membership: &Membership) -> Vec<u8> {
    let sets = membership.get_joint_config();
    assert!(sets.len() <= MAX_SETS, "joint consensus has two sets of voters at most");
    let replicas = membership.nodes().count();
    let count = u16::try_from(replicas).expect("invariant: a shard has few replicas");
    let mut out = Vec::with_capacity(HEADER_BYTES + replicas * REPLICA_BYTES);
    out.extend([VERSION, sets.len() as u8]);
    out.extend(count.to_le_bytes());
    for (replica, place) in membership.nodes() {
        out.extend(replica.to_le_bytes());
        out.extend(place.node.to_le_bytes());
        let voter = |set: usize| u8::from(sets.get(set).is_some_and(|set| set.contains(replica)));
        out.push(voter(0) | voter(1) << 1);
    }
    out
}

/// Reads what [`encode`] wrote. `None`: malformed, or of a newer release.
pub(crate) fn decode(bytes: &[u8]) -> Option<Membership> {
    let (header, replicas) = bytes.split_at_checked(HEADER_BYTES)?;
    let (sets, count) = (
        usize::from(header[1]),
        usize::from(u16::from_le_bytes([header[2], header[3]])),
    );
    if header[0] != VERSION || sets > MAX_SETS || replicas.len() != count * REPLICA_BYTES {
        return None;
    }
    let mut voters: Vec<BTreeSet<ReplicaId>> = vec![BTreeSet::new(); sets];
    let mut nodes: BTreeMap<ReplicaId, Place> = BTreeMap::new();
    for replica in replicas.chunks_exact(REPLICA_BYTES) {
        let word = |at: usize| {
            let bytes = replica[at..at + 8].try_into().expect("invariant: eight bytes");
            u64::from_le_bytes(bytes)
        };
        let (id, place, bits) = (word(0), Place { node: word(8) }, replica[16]);
        let ascends = nodes.last_key_value().is_none_or(|(last, _)| *last < id);
        if !ascends || u32::from(bits) >= 1 << sets {
            return None;
        }
        nodes.insert(id, place);
        for (set, voters) in voters.iter_mut().enumerate() {
            if bits & 1 << set != 0 {
                voters.insert(id);
            }
        }
    }
    if sets == 0 {
        return nodes.is_empty().then(Membership::default);
    }
    Membership::new(voters, nodes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(sets: &[&[u64]], nodes: &[(u64, u64)]) -> Membership {
        let sets = sets.iter().map(|set| set.iter().copied().collect()).collect();
        let nodes: BTreeMap<_, _> = nodes.iter().map(|&(id, node)| (id, Place { node })).collect();
        Membership::new(sets, nodes).unwrap()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let memberships = [
            Membership::default(),
            membership(&[&[1]], &[(1, 7)]),
            membership(&[&[1, 2, 3]], &[(1, 7), (2, 8), (3, 9), (4, 7)]),
            membership(
                &[&[1, 2, 3], &[2, 3, u64::MAX]],
                &[(1, 7), (2, 8), (3, 9), (u64::MAX, 0)],
            ),
        ];
        for membership in memberships {
            let bytes = encode(&membership);
            assert_eq!(decode(&bytes), Some(membership));
            for cut in 0..bytes.len() {
                assert_eq!(decode(&bytes[..cut]), None, "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = encode(&membership(&[&[1, 2]], &[(1, 7), (2, 8)]));
        let mut other_version = good.clone();
        other_version[0] = 2;
        let mut three_sets = good.clone();
        three_sets[1] = 3;
        let mut second_set = good.clone();
        second_set[20] = 2;
        let mut unordered = good.clone();
        unordered[4] = 9;
        for bytes in [other_version, three_sets, second_set, unordered] {
            assert_eq!(decode(&bytes), None);
        }
    }
}
