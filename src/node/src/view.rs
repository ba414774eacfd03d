//! What this node knows of its cluster: the nodes, and which of them are to have a replica of each shard.
//!
//! A view comes from the configuration (`[cluster] nodes`), where it never changes, or from the records of the controller, where every
//! change makes another. It says where replicas *should* be; where they are, their groups say.
//!
//! Not here: who lives (`peers`), who leads, and how replicas get to where they should be (`raft::joining`).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use generation_engine::cluster::records::{Cause, NodeState};
use generation_engine::cluster::{Cluster, leaders};

use crate::config::CoreConfig;
use crate::env::CoreId;
use crate::peers::PeerNode;

/// The number under which the controller's group goes between nodes. It is none of the shards, and lives on every node's core 0.
pub const CONTROLLER: u16 = u16::MAX;

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where it is reached.
    pub addr: SocketAddr,
    /// Its cores.
    pub cores: CoreId,
    /// Its zone; empty: none was said.
    pub zone: String,
    /// Identity of its data directory, where it is known.
    pub directory: Option<u128>,
    /// Whether it may be given leaderships: it is neither drained nor on its way out.
    pub may_lead: bool,
}

/// The cluster as this node knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// Version of the records it was made of; 0: it is the configuration's, or there is none yet.
    pub version: u64,
    /// Epoch of the map.
    pub epoch: u32,
    /// Whether it comes from the controller.
    pub managed: bool,
    /// The nodes, this one included.
    pub members: BTreeMap<u64, Member>,
    /// By shard: the nodes that are to have a replica. The first forms the group.
    pub targets: Vec<Vec<u64>>,
    /// The nodes that are to have a replica of the controller.
    pub controller: Vec<u64>,
    /// The records it was made of.
    pub cluster: Option<Arc<Cluster>>,
    /// The shards whose replicas were to be on other nodes before: their groups were formed then.
    pub moved: BTreeSet<u16>,
}

impl View {
    /// The configuration's: every node has a replica of every shard, and each is formed by another in turn.
    pub fn fixed(config: &CoreConfig, cores: CoreId) -> Self {
        let own = PeerNode {
            id: config.node,
            addr: config.addr,
            cores,
            directory: None,
        };
        let nodes = config.peers.nodes.iter().chain([&own]);
        let members: BTreeMap<u64, Member> = nodes
            .map(|node| {
                let member = Member {
                    addr: node.addr,
                    cores: node.cores,
                    zone: String::new(),
                    directory: node.directory,
                    may_lead: true,
                };
                (node.id, member)
            })
            .collect();
        let ids: Vec<u64> = members.keys().copied().collect();
        let targets = (0..usize::from(config.shards)).map(|shard| {
            let mut targets = ids.clone();
            targets.rotate_left(shard % ids.len());
            targets
        });
        Self {
            version: 0,
            epoch: config.epoch,
            managed: false,
            targets: targets.collect(),
            members,
            controller: Vec::new(),
            cluster: None,
            moved: BTreeSet::new(),
        }
    }

    /// What the records say.
    pub fn of(cluster: &Arc<Cluster>) -> Self {
        let present = cluster.nodes().filter(|node| node.state != NodeState::Gone);
        let members = present.map(|node| {
            let member = Member {
                addr: node.addr,
                cores: node.cores.clamp(1, 256),
                zone: node.zone.clone(),
                directory: Some(node.directory),
                may_lead: node.state == NodeState::Up,
            };
            (node.id, member)
        });
        let mut view = Self {
            version: cluster.version(),
            epoch: cluster.epoch(),
            managed: true,
            members: members.collect(),
            cluster: Some(Arc::clone(cluster)),
            ..Self::default()
        };
        for shard in cluster.shards() {
            let place = usize::from(shard.number);
            if view.targets.len() <= place {
                view.targets.resize(place + 1, Vec::new());
            }
            view.targets[place].clone_from(&shard.targets);
            if shard.cause != Cause::Founded {
                view.moved.insert(shard.number);
            }
        }
        if let Some(controller) = cluster.controller() {
            view.controller.clone_from(&controller.targets);
            if controller.cause != Cause::Founded {
                view.moved.insert(CONTROLLER);
            }
        }
        view
    }

    /// The nodes that are to have a replica of a shard, or of [the controller](CONTROLLER).
    pub fn targets(&self, shard: u16) -> &[u64] {
        if shard == CONTROLLER {
            return &self.controller;
        }
        self.targets.get(usize::from(shard)).map_or(&[], Vec::as_slice)
    }

    /// The node that forms a shard's group where there is none: the first of those that are to have a replica, as long as they have never
    /// been others.
    pub fn founder(&self, shard: u16) -> Option<u64> {
        let first = *self.targets(shard).first()?;
        (!self.moved.contains(&shard)).then_some(first)
    }

    /// Voters without which a shard's group is still being formed, and acknowledges nothing: a majority of those listed in the
    /// configuration. Groups of a cluster that grows begin with one.
    pub fn least_voters(&self, shard: u16) -> usize {
        if self.managed {
            1
        } else {
            self.targets(shard).len() / 2 + 1
        }
    }

    /// The core of a node that has a shard.
    pub fn core(&self, node: u64, shard: u16) -> Option<CoreId> {
        let cores = self.members.get(&node)?.cores;
        Some(if shard == CONTROLLER { 0 } else { shard % cores })
    }

    /// The nodes but one, as the transport is told of them.
    pub fn others(&self, node: u64) -> Vec<PeerNode> {
        let others = self.members.iter().filter(|(id, _)| **id != node);
        let others = others.map(|(id, member)| PeerNode {
            id: *id,
            addr: member.addr,
            cores: member.cores,
            directory: member.directory,
        });
        others.collect()
    }

    /// By shard: the node that should lead it, of those that are fit.
    pub fn leaders(&self, fit: &BTreeSet<u64>) -> Vec<Option<u64>> {
        if let Some(cluster) = &self.cluster {
            return leaders(cluster, fit);
        }
        let mut led: BTreeMap<u64, usize> = fit.iter().map(|node| (*node, 0)).collect();
        let mut leaders: Vec<Option<u64>> = self
            .targets
            .iter()
            .map(|targets| targets.first().copied().filter(|founder| fit.contains(founder)))
            .collect();
        for leader in leaders.iter().flatten() {
            *led.entry(*leader).or_default() += 1;
        }
        for (leader, targets) in leaders.iter_mut().zip(&self.targets) {
            if leader.is_some() {
                continue;
            }
            let fit = targets.iter().filter(|node| fit.contains(node));
            *leader = fit.copied().min_by_key(|node| (led[node], *node));
            if let Some(leader) = leader {
                *led.entry(*leader).or_default() += 1;
            }
        }
        leaders
    }
}

/// The view of one core, replaced whole. Clones are the same.
#[derive(Debug, Clone)]
pub struct Views(Rc<RefCell<Arc<View>>>);

impl Views {
    /// Begins with one.
    pub fn new(view: View) -> Self {
        Self(Rc::new(RefCell::new(Arc::new(view))))
    }

    /// The newest.
    pub fn get(&self) -> Arc<View> {
        Arc::clone(&self.0.borrow())
    }

    /// Looks something up in the newest.
    pub fn with<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.0.borrow())
    }

    /// Puts one in the place of whatever there was.
    pub fn replace(&self, view: View) {
        self.0.replace(Arc::new(view));
    }

    /// Takes in a newer one. `false`: it is not newer.
    pub fn set(&self, view: Arc<View>) -> bool {
        let newer = view.version > self.0.borrow().version;
        if newer {
            self.0.replace(view);
        }
        newer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(nodes: u64, shards: u16) -> View {
        let ids: Vec<u64> = (1..=nodes).collect();
        let targets = (0..usize::from(shards)).map(|shard| {
            let mut targets = ids.clone();
            targets.rotate_left(shard % ids.len());
            targets
        });
        View {
            targets: targets.collect(),
            ..View::default()
        }
    }

    #[test]
    fn leaders_are_even_whoever_is_fit() {
        for nodes in [1_u64, 3, 5] {
            for shards in [1_u16, 2, 4, 16, 64] {
                let view = view(nodes, shards);
                for set in 1..1_u32 << nodes {
                    let fit: BTreeSet<u64> = (1..=nodes).filter(|node| set >> (node - 1) & 1 == 1).collect();
                    let mut led: BTreeMap<u64, u16> = fit.iter().map(|node| (*node, 0)).collect();
                    for (shard, leader) in (0..shards).zip(view.leaders(&fit)) {
                        let leader = leader.unwrap();
                        *led.get_mut(&leader).expect("a fit one") += 1;
                        let founder = view.founder(shard).unwrap();
                        assert!(leader == founder || !fit.contains(&founder), "the others keep theirs");
                    }
                    let (least, most) = (led.values().min().unwrap(), led.values().max().unwrap());
                    assert!(most - least <= 1, "{shards} shards on {fit:?} of {nodes}: {led:?}");
                }
            }
        }
        assert_eq!(view(3, 1).leaders(&BTreeSet::new()), [None]);
    }

    #[test]
    fn a_group_is_formed_by_the_first_of_those_who_have_always_been_to_have_it() {
        let mut view = view(3, 3);
        assert_eq!(view.founder(1), Some(2));
        view.moved.insert(1);
        assert_eq!(view.founder(1), None);
        assert_eq!(view.founder(2), Some(3));
        assert_eq!(view.founder(7), None, "there is no such shard");
    }
}
