//! A cluster that does what its records want, a member at a time, and checks every change of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::cluster::placement::tests::node;
use crate::cluster::placement::{Layout, controller_size, found, without};
use crate::cluster::planner::{Plan, plan};
use crate::cluster::records::{
    Cause, Config, Controller, Node, NodeState, Record, RecordKey, Shard, key_of, parse_key,
};
use crate::cluster::{Cluster, GroupSeen, NodeSeen, Observed, Step};

/// Bytes of a replica.
pub(in crate::cluster) const REPLICA_BYTES: u64 = 100;

/// A node that answers, or how long it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cluster) enum Life {
    Alive,
    Dead { for_ms: u64 },
}

#[derive(Debug, Clone)]
pub(in crate::cluster) struct World {
    pub(in crate::cluster) cluster: Cluster,
    pub(in crate::cluster) lives: BTreeMap<u64, Life>,
    /// The voters of each shard, and of group 0.
    pub(in crate::cluster) voters: BTreeMap<RecordKey, BTreeSet<u64>>,
    /// Whether members are exchanged in one change; otherwise one is added, then one removed.
    pub(in crate::cluster) swaps: bool,
    pub(in crate::cluster) limit_bytes: u64,
    pub(in crate::cluster) loads: BTreeMap<u16, u64>,
}

impl World {
    pub(in crate::cluster) fn new(nodes: &[Node], shards: u16, replication: u8) -> Self {
        let mut cluster = Cluster::new();
        let config = Config::new("test", 1, shards, replication);
        let mut voters = BTreeMap::new();
        for (record, version) in found(&config, nodes, 1).unwrap().into_iter().zip(1..) {
            match &record {
                Record::Shard(Shard { targets, .. }) | Record::Controller(Controller { targets, .. }) => {
                    voters.insert(record.key(), targets.iter().copied().collect());
                }
                _ => {}
            }
            let key = key_of(record.key());
            cluster.apply(&key, &record.encode().unwrap(), version).unwrap();
        }
        Self {
            cluster,
            lives: nodes.iter().map(|node| (node.id, Life::Alive)).collect(),
            voters,
            swaps: true,
            limit_bytes: 0,
            loads: BTreeMap::new(),
        }
    }

    /// Nodes 1 to `count` with these zones, in turn.
    pub(in crate::cluster) fn of(count: u64, zones: &[&str], shards: u16, replication: u8) -> Self {
        let zone = |id: u64| zones[(id - 1) as usize % zones.len()];
        let nodes: Vec<Node> = (1..=count).map(|id| node(id, zone(id), 1)).collect();
        Self::new(&nodes, shards, replication)
    }

    pub(in crate::cluster) fn config(&self) -> &Config {
        self.cluster.config().unwrap()
    }

    pub(in crate::cluster) fn put(&mut self, record: &Record) {
        let version = self.cluster.version() + 1;
        let key = key_of(record.key());
        self.cluster.apply(&key, &record.encode().unwrap(), version).unwrap();
    }

    pub(in crate::cluster) fn join(&mut self, zone: &str, cores: u16) -> u64 {
        let id = self.cluster.nodes().map(|node| node.id).max().unwrap_or(0) + 1;
        self.put(&Record::Node(node(id, zone, cores)));
        self.lives.insert(id, Life::Alive);
        id
    }

    pub(in crate::cluster) fn set_state(&mut self, id: u64, state: NodeState) {
        let mut node = self.cluster.node(id).unwrap().clone();
        node.state = state;
        self.put(&Record::Node(node));
    }

    pub(in crate::cluster) fn set_config(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config().clone();
        change(&mut config);
        self.put(&Record::Config(config));
    }

    pub(in crate::cluster) fn kill(&mut self, id: u64) {
        self.lives.insert(id, Life::Dead { for_ms: 0 });
    }

    pub(in crate::cluster) fn revive(&mut self, id: u64) {
        self.lives.insert(id, Life::Alive);
    }

    pub(in crate::cluster) fn pass(&mut self, ms: u64) {
        for life in self.lives.values_mut() {
            if let Life::Dead { for_ms } = life {
                *for_ms += ms;
            }
        }
    }

    pub(in crate::cluster) fn is_alive(&self, id: u64) -> bool {
        self.lives.get(&id) == Some(&Life::Alive)
    }

    fn has_majority<'a>(&self, nodes: impl IntoIterator<Item = &'a u64>) -> bool {
        let (alive, dead): (Vec<u64>, Vec<u64>) = nodes.into_iter().copied().partition(|id| self.is_alive(*id));
        alive.len() > dead.len()
    }

    pub(in crate::cluster) fn targets(&self, key: RecordKey) -> &[u64] {
        match key {
            RecordKey::Controller => &self.cluster.controller().unwrap().targets,
            RecordKey::Shard(number) => &self.cluster.shard(number).unwrap().targets,
            other => panic!("{other} is no group"),
        }
    }

    pub(in crate::cluster) fn used(&self, id: u64) -> u64 {
        let held = self
            .voters
            .iter()
            .filter(|(key, voters)| **key != RecordKey::Controller && voters.contains(&id));
        held.count() as u64 * REPLICA_BYTES
    }

    fn group(&self, key: RecordKey) -> GroupSeen {
        let voters = self.voters[&key].clone();
        let alive = |id: &u64| self.is_alive(*id);
        let leader = voters
            .iter()
            .copied()
            .find(alive)
            .filter(|_| self.has_majority(&voters));
        let targets = self.targets(key).iter().copied();
        GroupSeen {
            leader,
            learners: targets
                .filter(|id| !voters.contains(id) && alive(id))
                .map(|id| (id, 7))
                .collect(),
            changing: false,
            silent: voters.iter().copied().filter(|id| !alive(id)).collect(),
            bytes: REPLICA_BYTES,
            load: match key {
                RecordKey::Shard(number) => self.loads.get(&number).copied().unwrap_or(0),
                _ => 0,
            },
            voters,
        }
    }

    pub(in crate::cluster) fn observe(&self) -> Observed {
        let nodes = self.lives.iter().map(|(id, life)| {
            let dead_for_ms = match life {
                Life::Alive => 0,
                Life::Dead { for_ms } => *for_ms,
            };
            let seen = NodeSeen {
                alive: *life == Life::Alive,
                dead_for_ms,
                clock_ok: true,
                used_bytes: self.used(*id),
                limit_bytes: self.limit_bytes,
            };
            (*id, seen)
        });
        let shards = (0..self.config().shards).map(|number| (number, self.group(RecordKey::Shard(number))));
        Observed {
            nodes: nodes.collect(),
            shards: shards.collect(),
            controller: self.group(RecordKey::Controller),
        }
    }

    /// Plans, checks and applies; the plan.
    pub(in crate::cluster) fn reconcile(&mut self) -> Plan {
        let plan = plan(&self.cluster, &self.observe());
        let keys: BTreeSet<&[u8]> = plan.steps.iter().map(|step| step.key.as_slice()).collect();
        assert_eq!(keys.len(), plan.steps.len(), "one step a record");
        let is_member = |id: &&u64| self.cluster.node(**id).unwrap().state != NodeState::Gone;
        let has_majority = self.has_majority(self.lives.keys().filter(is_member));
        assert!(has_majority || plan.steps.is_empty(), "{:?}", plan.steps);
        for step in &plan.steps {
            self.check(step);
            let version = self.cluster.version() + 1;
            self.cluster.apply(&step.key, &step.value, version).unwrap();
        }
        self.check_pace();
        plan
    }

    fn check(&self, step: &Step) {
        let key = parse_key(&step.key).unwrap();
        assert_eq!(step.expected_version, self.cluster.version_of(key), "{}", step.text);
        match Record::decode(key, &step.value).unwrap() {
            Record::Shard(next) => {
                let now = self.cluster.shard(next.number).unwrap();
                assert_eq!(now.epoch, next.epoch);
                self.check_targets(key, &next.targets, next.cause, &step.text);
            }
            Record::Controller(next) => self.check_targets(key, &next.targets, next.cause, &step.text),
            Record::Node(next) => {
                let now = self.cluster.node(next.id).unwrap();
                assert_eq!((now.state, next.state), (NodeState::Leaving, NodeState::Gone));
                for (key, voters) in &self.voters {
                    assert!(!voters.contains(&next.id) && !self.targets(*key).contains(&next.id));
                }
            }
            Record::Config(_) => panic!("the planner changes no configuration"),
        }
    }

    fn check_targets(&self, key: RecordKey, next: &[u64], cause: Cause, text: &str) {
        let now = self.targets(key);
        if now == next {
            return;
        }
        let voters: Vec<u64> = self.voters[&key].iter().copied().collect();
        let differ = |a: &[u64], b: &[u64]| a.iter().filter(|id| !b.contains(id)).count();
        for from in [now, voters.as_slice()] {
            assert!(
                differ(from, next) <= 1 && differ(next, from) <= 1,
                "{text}: {from:?} to {next:?}"
            );
        }
        assert!(self.has_majority(&voters) && self.has_majority(next), "{text}");
        if voters != now {
            let lost = now.iter().find(|id| !next.contains(id)).unwrap();
            assert!(!voters.contains(lost), "{text}: only one that never came is given up");
        }
        for joining in next.iter().filter(|id| !now.contains(id) && !voters.contains(id)) {
            assert!(self.is_alive(*joining), "{text}");
            assert_eq!(self.cluster.node(*joining).unwrap().state, NodeState::Up, "{text}");
        }
        for parting in now.iter().filter(|id| !next.contains(id)) {
            if cause == Cause::Dead {
                let Life::Dead { for_ms } = self.lives[parting] else {
                    panic!("{text}: it lives");
                };
                assert!(for_ms >= self.config().replace_after_ms, "{text}");
            }
        }
        if cause == Cause::Balance {
            let layout = self.layout();
            assert!(layout.excess(next) <= layout.excess(now), "{text}");
        }
    }

    fn check_pace(&self) {
        let mut joining: BTreeMap<u64, u16> = BTreeMap::new();
        for number in 0..self.config().shards {
            let key = RecordKey::Shard(number);
            for id in self.targets(key).iter().filter(|id| !self.voters[&key].contains(id)) {
                *joining.entry(*id).or_default() += 1;
            }
        }
        assert!(joining.values().sum::<u16>() <= self.config().moves_total);
        // A lost node's place may go to one that has its number already.
        let most = joining
            .iter()
            .filter(|(id, _)| self.is_alive(**id))
            .map(|(_, count)| *count)
            .max();
        assert!(most.unwrap_or(0) <= self.config().moves_per_node, "{joining:?}");
    }

    /// One member of a group on its way to the targets, if the group has a leader.
    pub(in crate::cluster) fn converge(&mut self, key: RecordKey) {
        let targets = self.targets(key).to_vec();
        let voters = self.voters[&key].clone();
        if !self.has_majority(&voters) {
            return;
        }
        let joining = targets.iter().copied().find(|id| !voters.contains(id));
        let parting = voters.iter().copied().find(|id| !targets.contains(id));
        let mut next = voters;
        match (joining, parting) {
            (Some(joining), parting) if self.is_alive(joining) => {
                next.insert(joining);
                if let Some(parting) = parting.filter(|_| self.swaps) {
                    next.remove(&parting);
                }
            }
            (None, Some(parting)) => {
                next.remove(&parting);
            }
            _ => {}
        }
        // A change is committed by a majority of what comes out, too.
        if self.has_majority(&next) {
            self.voters.insert(key, next);
        }
    }

    pub(in crate::cluster) fn groups(&self) -> Vec<RecordKey> {
        self.voters.keys().copied().collect()
    }

    /// Until nothing happens any more; how many plans that took.
    pub(in crate::cluster) fn settle(&mut self) -> usize {
        for round in 0..2000 {
            let before = self.voters.clone();
            let plan = self.reconcile();
            for key in self.groups() {
                self.converge(key);
            }
            if plan.steps.is_empty() && before == self.voters {
                return round;
            }
        }
        panic!("it does not settle: {:#?}", self.reconcile());
    }

    pub(in crate::cluster) fn layout(&self) -> Layout<'_> {
        let members = self.cluster.nodes().filter(|node| node.state.keeps_replicas());
        let mut layout = Layout::new(members, usize::from(self.config().replication));
        for shard in self.cluster.shards() {
            layout.set(shard.number, &shard.targets);
        }
        layout
    }

    /// With every node alive and up or gone, everything is as it should be.
    pub(in crate::cluster) fn check_settled(&self) {
        let plan = plan(&self.cluster, &self.observe());
        assert_eq!((&plan.steps, &plan.stuck), (&Vec::new(), &Vec::new()));
        assert_eq!(plan.progress.settled, usize::from(self.config().shards));
        let staying: Vec<u64> = self
            .cluster
            .nodes()
            .filter(|node| node.state.keeps_replicas())
            .map(|node| node.id)
            .collect();
        let layout = self.layout();
        for shard in self.cluster.shards() {
            assert!(self.voters[&RecordKey::Shard(shard.number)].iter().eq(&shard.targets));
            assert_eq!(
                shard.targets.len(),
                usize::from(self.config().replication).min(staying.len())
            );
            assert!(shard.targets.iter().all(|target| staying.contains(target)));
            assert_eq!(layout.excess(&shard.targets), 0, "{shard:?}");
        }
        assert_eq!(layout.fairer(|_| true, |_| true), None, "{:?}", layout.shares());
        let zones: BTreeSet<&str> = self.cluster.nodes().map(|node| node.zone.as_str()).collect();
        if zones.len() == 1 {
            for (id, share) in layout.shares() {
                for (other, others) in layout.shares() {
                    assert!(
                        !share.should_give_to(*others) || self.cannot_give(*id, *other),
                        "{:?}",
                        layout.shares()
                    );
                }
            }
        }
        let controller = &self.cluster.controller().unwrap().targets;
        assert_eq!(controller.len(), controller_size(staying.len()));
        assert!(controller.iter().all(|target| staying.contains(target)));
        let members = self.cluster.nodes().filter(|node| node.state.keeps_replicas());
        assert_eq!(Layout::new(members, controller.len()).excess(controller), 0);
        assert!(self.cluster.nodes().all(|node| node.state != NodeState::Leaving));
    }

    /// Whether every shard of a node is on the other one too.
    fn cannot_give(&self, id: u64, other: u64) -> bool {
        self.cluster
            .shards()
            .all(|shard| !shard.targets.contains(&id) || without(&shard.targets, id).contains(&other))
    }
}
