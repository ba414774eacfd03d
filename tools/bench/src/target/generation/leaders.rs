//! Which core of which node leads a shard, read off a cluster's map.

use generation_proto::Map;
use generation_proto::map::Shard;

use crate::target::cluster::{Layout, Place, SLOTS};

/// Who serves each slot.
pub(super) fn layout(map: &Map) -> Layout {
    let mut places = Vec::new();
    let owners: Vec<Option<u16>> = map
        .shards
        .iter()
        .map(|shard| place_of(map, shard, &mut places))
        .collect();
    let mut owner = vec![None; SLOTS];
    for range in &map.ranges {
        let slots = usize::from(range.first)..=usize::from(range.last);
        owner[slots].fill(owners.get(usize::from(range.shard)).copied().flatten());
    }
    Layout {
        // Epochs and terms only grow, so their sum orders the maps of one cluster.
        version: map.shards.iter().map(|shard| u64::from(shard.epoch) + shard.term).sum(),
        places,
        owner,
    }
}

/// Index of the place that leads a shard, which is added when it is new; `None` for a shard without a leader.
pub(super) fn place_of(map: &Map, shard: &Shard, places: &mut Vec<Place>) -> Option<u16> {
    let replica = shard.replicas.iter().find(|replica| replica.node == shard.leader)?;
    let place = Place {
        addr: map.node(replica.node)?.addr,
        core: replica.core,
    };
    let index = places.iter().position(|known| *known == place).unwrap_or_else(|| {
        places.push(place);
        places.len() - 1
    });
    Some(index as u16)
}

#[cfg(test)]
mod tests {
    use generation_proto::map::{Node, NodeState, Replica, SlotRange};

    use super::*;

    #[test]
    fn a_slot_belongs_to_the_core_that_leads_its_shard_and_to_nobody_without_a_leader() {
        let node = |id: u64| Node {
            id,
            addr: ([127, 0, 0, 1], 7_400 + id as u16).into(),
            cores: 2,
            state: NodeState::Up,
        };
        let replica = |node, core| Replica { id: node, node, core };
        let shard = |leader| Shard {
            epoch: 1,
            term: 2,
            leader,
            replicas: vec![replica(1, 0), replica(2, 1)],
        };
        let range = |first, last, shard| SlotRange { first, last, shard };
        let map = Map {
            nodes: vec![node(1), node(2)],
            ranges: vec![range(0, 9, 0), range(10, 19, 1), range(20, 16_383, 2)],
            shards: vec![shard(2), shard(0), shard(1)],
            ..Map::default()
        };
        let layout = layout(&map);
        let place_of_slot = |slot: usize| layout.owner[slot].map(|index| layout.places[usize::from(index)]);
        let (first, second) = (node(1).addr, node(2).addr);
        assert_eq!(place_of_slot(0), Some(Place { addr: second, core: 1 }));
        assert_eq!(place_of_slot(15), None);
        assert_eq!(place_of_slot(16_383), Some(Place { addr: first, core: 0 }));
        assert_eq!(layout.version, 9);
    }
}
