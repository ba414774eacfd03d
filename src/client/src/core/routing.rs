//! Where a request goes: key → slot → shard → the node and core that lead it.
//!
//! The map says which slots a shard has and where its replicas are; it is replaced by a newer epoch only. On top of it lies one
//! hint a shard, the leader, replaced only by a higher (epoch, term): a late redirect of an old leader cannot undo a newer one.
//! A hint that turned out to be silent is set aside ([`Routes::suspect`], [`Routes::suspect_node`]) and the shard's other replicas are
//! asked in turn.

use std::net::SocketAddr;

use generation_proto::map::{MapError, Node, NodeState, Shard};
use generation_proto::options::Moved;
use generation_proto::{Map, SlotTable};

/// Where to send a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// The node.
    pub node: u64,
    /// Its address.
    pub addr: SocketAddr,
    /// The core of the node that owns the shard.
    pub core: u16,
}

/// What came of a map that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// It is of a newer epoch and replaced the old one.
    Newer,
    /// It is of the same epoch; leaders of higher terms were taken from it.
    Same,
    /// It is of an older epoch and was ignored.
    Older,
}

/// The map, laid out for lookup, with the latest hints.
#[derive(Debug, Clone)]
pub struct Routes {
    map: Map,
    slots: SlotTable,
    leaders: Vec<Hint>,
}

/// What is known of a shard's leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hint {
    epoch: u32,
    term: u64,
    /// 0: unknown.
    node: u64,
    core: u16,
}

impl Hint {
    fn of(shard: &Shard) -> Self {
        let replica = shard.replicas.iter().find(|replica| replica.node == shard.leader);
        Self {
            epoch: shard.epoch,
            term: shard.term,
            // A leader that is none of the replicas cannot be right.
            node: replica.map_or(0, |replica| replica.node),
            core: replica.map_or(0, |replica| replica.core),
        }
    }

    const fn order(&self) -> (u32, u64) {
        (self.epoch, self.term)
    }

    /// Takes `other` if it knows better: a higher (epoch, term), or the same with a leader where none was known.
    fn take_newer(&mut self, other: Self) -> bool {
        let newer =
            other.order() > self.order() || (other.order() == self.order() && self.node == 0 && other.node != 0);
        if newer {
            *self = other;
        }
        newer
    }
}

impl Routes {
    /// Routes by `map`.
    pub fn new(map: Map) -> Result<Self, MapError> {
        let slots = SlotTable::new(&map.ranges, map.shards.len())?;
        let leaders = map.shards.iter().map(Hint::of).collect();
        Ok(Self { map, slots, leaders })
    }

    /// The map.
    pub const fn map(&self) -> &Map {
        &self.map
    }

    /// The map with the leaders as the hints have them, which may be newer.
    pub fn current_map(&self) -> Map {
        let mut map = self.map.clone();
        for (shard, hint) in map.shards.iter_mut().zip(&self.leaders) {
            if hint.epoch == shard.epoch && hint.term >= shard.term && hint.node != 0 {
                shard.term = hint.term;
                shard.leader = hint.node;
            }
        }
        map
    }

    /// Epoch of the map.
    pub const fn epoch(&self) -> u32 {
        self.map.epoch
    }

    /// Number of shards.
    pub const fn shards(&self) -> u16 {
        self.map.shards.len() as u16
    }

    /// The shard of a key.
    pub fn shard_of(&self, key: &[u8]) -> u16 {
        self.slots.shard_of(key)
    }

    /// The epoch of a shard; 0 where there is no such shard.
    pub fn shard_epoch(&self, shard: u16) -> u32 {
        self.leaders.get(usize::from(shard)).map_or(0, |hint| hint.epoch)
    }

    /// Whether there is a shard with more than one replica.
    pub fn is_replicated(&self) -> bool {
        self.map.shards.iter().any(|shard| shard.replicas.len() > 1)
    }

    /// Where the leader of `shard` is, if that is known.
    pub fn leader(&self, shard: u16) -> Option<Target> {
        let hint = self.leaders.get(usize::from(shard))?;
        Some(at(self.node(hint.node)?, hint.core))
    }

    /// Where the replicas of `shard` are that a read may be sent to: those on nodes that are up, or all where none is.
    pub fn replicas(&self, shard: u16) -> impl Iterator<Item = Target> {
        let replicas = self
            .map
            .shards
            .get(usize::from(shard))
            .map_or(&[][..], |shard| &shard.replicas);
        let placed = move || {
            replicas
                .iter()
                .filter_map(|replica| Some((self.node(replica.node)?, replica.core)))
        };
        let is_up = |node: &Node| node.state == NodeState::Up;
        let any_up = placed().any(|(node, _)| is_up(node));
        let usable = placed().filter(move |(node, _)| is_up(node) || !any_up);
        usable.map(|(node, core)| at(node, core))
    }

    /// Where the leader of `shard` is, as far as is known. Without a leader, the `attempt`-th of the nodes that may know it: the
    /// shard's replicas, those that are up first. `None` when there is no such shard or no node at all.
    pub fn target(&self, shard: u16, attempt: u32) -> Option<Target> {
        let hint = self.leaders.get(usize::from(shard))?;
        if let Some(node) = self.node(hint.node) {
            return Some(at(node, hint.core));
        }
        let replicas = &self.map.shards[usize::from(shard)].replicas;
        let reachable = |up: bool| {
            replicas.iter().filter_map(move |replica| {
                let node = self.node(replica.node)?;
                ((node.state != NodeState::Down) == up).then(|| at(node, replica.core))
            })
        };
        let candidates: Vec<Target> = reachable(true).chain(reachable(false)).collect();
        if candidates.is_empty() {
            let any = self.map.nodes.get(attempt as usize % self.map.nodes.len().max(1))?;
            return Some(at(any, 0));
        }
        Some(candidates[attempt as usize % candidates.len()])
    }

    /// A node by id.
    pub fn node(&self, id: u64) -> Option<&Node> {
        if id == 0 { None } else { self.map.node(id) }
    }

    /// Takes a map if it is newer; hints of a higher (epoch, term) than the new map's survive it.
    pub fn install(&mut self, map: Map) -> Result<Installed, MapError> {
        if map.epoch < self.map.epoch {
            return Ok(Installed::Older);
        }
        let installed = if map.epoch == self.map.epoch {
            Installed::Same
        } else {
            Installed::Newer
        };
        let mut routes = Self::new(map)?;
        for (new, old) in routes.leaders.iter_mut().zip(&self.leaders) {
            // A hint set aside has no leader but keeps its term, so it does not survive the map that names one again.
            if old.node != 0 {
                new.take_newer(*old);
            }
        }
        *self = routes;
        Ok(installed)
    }

    /// Takes a redirect, if it is newer than what is known. `true`: the next attempt goes somewhere else. A leader that is not in the map
    /// yet is noted, but leads nowhere before there is a map with its address.
    pub fn learn(&mut self, shard: u16, moved: &Moved) -> bool {
        let Some(hint) = self.leaders.get_mut(usize::from(shard)) else {
            return false;
        };
        let before = *hint;
        let taken = hint.take_newer(Hint {
            epoch: moved.epoch,
            term: moved.term,
            node: moved.leader,
            core: moved.core,
        });
        let elsewhere = (hint.node, hint.core) != (before.node, before.core);
        let leader = hint.node;
        taken && elsewhere && self.node(leader).is_some()
    }

    /// The leader hinted at did not answer, or denied being it: forget it if it is still the one known. `true`: nobody is known to lead
    /// the shard now.
    pub fn suspect(&mut self, shard: u16, node: u64) -> bool {
        let Some(hint) = self.leaders.get_mut(usize::from(shard)) else {
            return false;
        };
        if hint.node == node {
            hint.node = 0;
        }
        hint.node == 0
    }

    /// A node cannot be reached: forget it as the leader of every shard. How many that were.
    pub fn suspect_node(&mut self, node: u64) -> usize {
        let mut forgotten = 0;
        for hint in self.leaders.iter_mut().filter(|hint| hint.node == node && node != 0) {
            hint.node = 0;
            forgotten += 1;
        }
        forgotten
    }
}

const fn at(node: &Node, core: u16) -> Target {
    Target {
        node: node.id,
        addr: node.addr,
        // A map that names a core the node does not have still leads to the node.
        core: if core < node.cores { core } else { 0 },
    }
}

#[cfg(test)]
mod tests {
    use generation_proto::map::Replica;

    use super::*;

    fn map(epoch: u32, leader: u64, term: u64) -> Map {
        let node = |id: u64| Node {
            id,
            addr: SocketAddr::from(([127, 0, 0, 1], 7400 + id as u16)),
            cores: 2,
            state: NodeState::Up,
        };
        let replica = |node: u64| Replica {
            id: node,
            node,
            core: (node % 2) as u16,
        };
        Map {
            epoch,
            cluster: "test".to_owned(),
            nodes: (1..=3).map(node).collect(),
            ranges: Map::even_ranges(2),
            shards: vec![
                Shard {
                    epoch: 1,
                    term,
                    leader,
                    replicas: (1..=3).map(replica).collect(),
                };
                2
            ],
        }
    }

    fn moved(epoch: u32, term: u64, leader: u64) -> Moved {
        Moved {
            epoch,
            term,
            leader,
            core: 0,
        }
    }

    proptest::proptest! {
        /// Whatever arrives in whatever order, the leader followed is that of the highest (epoch, term) that named one first.
        #[test]
        fn the_highest_epoch_and_term_wins_in_any_order(
            hints in proptest::collection::vec((1u32..4, 1u64..6, 1u64..=3), 1..40),
        ) {
            let mut routes = Routes::new(map(1, 0, 0)).unwrap();
            let mut best = (1, 0, 0);
            for (epoch, term, leader) in hints {
                let redirected = routes.learn(0, &moved(epoch, term, leader));
                let newer = (epoch, term) > (best.0, best.1);
                proptest::prop_assert!(!redirected || newer);
                if newer {
                    best = (epoch, term, leader);
                }
                proptest::prop_assert_eq!(routes.target(0, 0).unwrap().node, best.2);
            }
        }
    }

    #[test]
    fn requests_go_to_the_leader_and_its_core() {
        let routes = Routes::new(map(1, 3, 1)).unwrap();
        let target = routes.target(0, 0).unwrap();
        assert_eq!((target.node, target.core, target.addr.port()), (3, 1, 7403));
        assert_eq!(routes.target(2, 0), None);
        assert_eq!(routes.shard_of(b"foo"), 1, "slot 12182 of 16384");
    }

    #[test]
    fn only_a_higher_epoch_and_term_moves_a_leader() {
        let mut routes = Routes::new(map(1, 1, 5)).unwrap();
        assert!(!routes.learn(0, &moved(1, 5, 2)), "same term");
        assert!(!routes.learn(0, &moved(1, 4, 2)), "older term");
        assert!(routes.learn(0, &moved(1, 6, 2)));
        assert!(!routes.learn(0, &moved(1, 5, 1)), "the old leader's late word");
        assert_eq!(routes.target(0, 0).unwrap().node, 2);
        assert_eq!(routes.target(1, 0).unwrap().node, 1, "other shards are not concerned");
        assert!(
            routes.learn(0, &moved(2, 1, 3)),
            "a new epoch starts a new count of terms"
        );
        assert!(!routes.learn(9, &moved(9, 9, 1)), "no such shard");
    }

    #[test]
    fn a_leader_unknown_is_asked_for_around_the_replicas() {
        let mut routes = Routes::new(map(1, 1, 5)).unwrap();
        routes.suspect(0, 2);
        assert_eq!(
            routes.target(0, 0).unwrap().node,
            1,
            "only the leader known can be suspected"
        );
        routes.suspect(0, 1);
        let asked: Vec<u64> = (0..4).map(|attempt| routes.target(0, attempt).unwrap().node).collect();
        assert_eq!(asked, [1, 2, 3, 1]);
        assert!(
            routes.learn(0, &moved(1, 5, 1)),
            "the same leader again, from one who knows"
        );
        assert_eq!(routes.target(0, 7).unwrap().node, 1);
        assert!(
            !routes.learn(0, &moved(1, 6, 0)),
            "a newer term without a leader leads nowhere"
        );
        assert_eq!(routes.target(0, 1).unwrap().node, 2);
    }

    #[test]
    fn reads_may_go_to_every_replica_that_is_up() {
        let mut some_down = map(1, 1, 5);
        let nodes = |map: &Map| {
            let routes = Routes::new(map.clone()).unwrap();
            routes.replicas(0).map(|target| target.node).collect::<Vec<_>>()
        };
        assert_eq!(nodes(&some_down), [1, 2, 3]);
        some_down.nodes[0].state = NodeState::Down;
        some_down.nodes[2].state = NodeState::Draining;
        assert_eq!(nodes(&some_down), [2]);
        some_down.nodes[1].state = NodeState::Down;
        assert_eq!(nodes(&some_down), [1, 2, 3], "the map may be wrong about all");
        assert_eq!(Routes::new(some_down).unwrap().replicas(9).count(), 0);
    }

    #[test]
    fn an_older_map_is_ignored_and_newer_hints_survive_a_newer_one() {
        let mut routes = Routes::new(map(5, 1, 5)).unwrap();
        assert_eq!(routes.install(map(4, 3, 9)), Ok(Installed::Older));
        assert_eq!(routes.target(0, 0).unwrap().node, 1);
        assert!(routes.learn(0, &moved(1, 7, 2)));
        assert_eq!(routes.install(map(6, 1, 6)), Ok(Installed::Newer));
        assert_eq!(routes.target(0, 0).unwrap().node, 2, "term 7 is above the map's 6");
        assert_eq!(routes.install(map(6, 3, 8)), Ok(Installed::Same));
        assert_eq!(routes.target(0, 0).unwrap().node, 3);
        assert_eq!(routes.current_map().shards[0].leader, 3);
        assert_eq!(routes.epoch(), 6);
    }

    #[test]
    fn a_node_that_cannot_be_reached_leads_nothing_until_somebody_says_so_again() {
        let mut routes = Routes::new(map(1, 2, 5)).unwrap();
        assert_eq!(routes.suspect_node(2), 2);
        assert_eq!(routes.suspect_node(2), 0);
        assert_eq!(routes.suspect_node(0), 0, "no node is not a node");
        assert_eq!(routes.target(0, 0).unwrap().node, 1);
        assert!(!routes.learn(0, &moved(1, 4, 2)), "an older term is not news of it");
        assert!(routes.learn(0, &moved(1, 5, 2)));
        assert_eq!(
            (routes.target(0, 0).unwrap().node, routes.target(1, 1).unwrap().node),
            (2, 2)
        );
        assert_eq!(
            routes.target(1, 0).unwrap().node,
            1,
            "the other shard still asks around"
        );
    }

    #[test]
    fn a_leader_that_is_not_in_the_map_leads_nowhere_until_the_map_has_it() {
        let mut routes = Routes::new(map(1, 1, 5)).unwrap();
        assert!(!routes.learn(0, &moved(1, 6, 4)), "there is no node 4");
        assert_eq!(routes.target(0, 1).unwrap().node, 2, "so the replicas are asked");
        let mut newer = map(2, 1, 5);
        newer.nodes.push(Node {
            id: 4,
            ..newer.nodes[0].clone()
        });
        assert_eq!(routes.install(newer), Ok(Installed::Newer));
        assert_eq!(routes.target(0, 1).unwrap().node, 4, "term 6 is above the map's 5");
    }

    #[test]
    fn a_map_with_a_leader_or_core_that_does_not_exist_still_leads_to_a_node() {
        let mut strange = map(1, 9, 1);
        strange.shards[0].replicas[0].core = 77;
        let routes = Routes::new(strange).unwrap();
        let target = routes.target(0, 0).unwrap();
        assert_eq!((target.node, target.core), (1, 0));
        let mut empty = map(1, 0, 0);
        empty.nodes.clear();
        assert_eq!(Routes::new(empty).unwrap().target(0, 3), None);
    }
}
