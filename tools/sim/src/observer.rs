//! What is seen of whole nodes' replicas from outside: how each sees its group, and the state it is in.
//!
//! Clients cannot know that two replicas differ, or that two of them lead, until they meet the consequences; the history has both.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use generation_node::raft::replica::Replica;
use generation_node::raft::transport::PeerTransport;

use crate::disk::SimDisk;
use crate::history::Event;
use crate::scenario::Plan;
use crate::sim::{Replicas, Sim};
use crate::workload::Clients;

/// How often every replica is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// The epoch of every shard of nodes that replicate.
const EPOCH: u32 = 1;

/// A replica as it is at some moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    at: Duration,
    node: usize,
    start: u32,
    shard: u16,
    replica: u64,
    term: u64,
    leads: bool,
    applied: u64,
    hash: u128,
    used: u64,
    budget: u64,
}

impl Seen {
    pub(crate) fn new(
        at: Duration,
        node: usize,
        start: u32,
        shard: u16,
        replica: &Replica<SimDisk, PeerTransport>,
    ) -> Self {
        let status = replica.status();
        let memory = replica.machine().with(|machine| machine.shard().stats());
        Self {
            at,
            node,
            start,
            shard,
            replica: status.id,
            term: status.term,
            leads: status.leads,
            applied: status.applied.map_or(0, |log_id| log_id.index),
            hash: status.state_hash,
            used: memory.used_bytes,
            budget: memory.budget_bytes,
        }
    }

    /// What has not changed is not worth telling again.
    fn is_like(&self, other: &Self) -> bool {
        let at = self.at;
        *self == Self { at, ..other.clone() }
    }

    fn note(&self, clients: &mut dyn Clients) {
        let (at, node, shard, epoch) = (self.at.as_nanos() as u64, self.node as u32, self.shard, EPOCH);
        clients.note(Event::Replica {
            at,
            node,
            start: self.start,
            shard,
            epoch,
            replica: self.replica,
            term: self.term,
            leads: self.leads,
            committed: self.applied,
            applied: self.applied,
        });
        clients.note(Event::State {
            at,
            node,
            shard,
            epoch,
            index: self.applied,
            hash: format!("{:032x}", self.hash),
        });
        clients.note(Event::Memory {
            at,
            node,
            shard,
            used: self.used,
            budget: self.budget,
        });
    }
}

/// Looks at every replica now and then, and at those that die.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    next: Duration,
    seen: BTreeMap<(usize, u16), Seen>,
}

impl Observer {
    /// Notes what has changed, if it is time.
    pub(crate) fn turn(&mut self, sim: &mut Sim, nodes: usize, clients: &mut dyn Clients) {
        for seen in sim.take_last_words() {
            self.note(seen, clients);
        }
        let elapsed = sim.elapsed();
        if elapsed < self.next {
            return;
        }
        let mut any = false;
        for node in 0..nodes {
            for seen in sim.see(node) {
                any = true;
                self.note(seen, clients);
            }
        }
        // Nodes that are alone have no replicas, and others have started within this.
        self.next = elapsed + if any { LOOK } else { 10 * LOOK };
        if any {
            sim.wake_at(sim.now() + LOOK);
        }
    }

    fn note(&mut self, seen: Seen, clients: &mut dyn Clients) {
        let place = (seen.node, seen.shard);
        if self.seen.get(&place).is_none_or(|before| !before.is_like(&seen)) {
            seen.note(clients);
            self.seen.insert(place, seen);
        }
    }
}

/// What every journal and every replica that runs says of itself: for whoever wants to know why a run has failed.
pub(crate) fn describe(sim: &Sim, nodes: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for node in 0..nodes {
        for replicas in sim.replicas(node) {
            lines.push(format!("node {node}: {:?}", replicas.journal()));
            for (shard, replica) in replicas.replicas() {
                let (status, last, members) = (replica.status(), replica.last_index(), replica.members());
                lines.push(format!(
                    "node {node}, shard {shard}: {status:?}, last entry {last}, {members:?}"
                ));
            }
        }
    }
    lines
}

/// Whether every node is up and every shard led by a replica whose group is exactly the replicas that run: then any of the nodes can
/// lose what it has.
pub(crate) fn is_whole(sim: &Sim, plan: &Plan) -> bool {
    let mut running: BTreeMap<u16, BTreeSet<u64>> = BTreeMap::new();
    let mut leaders = Vec::new();
    for node in 0..plan.nodes {
        if !sim.is_up(node) {
            return false;
        }
        for (shard, replica) in sim.replicas(node).iter().flat_map(Replicas::replicas) {
            running.entry(shard).or_default().insert(replica.config().id);
            if replica.leads() {
                leaders.push((shard, replica.members()));
            }
        }
    }
    (0..plan.setup.shards).all(|shard| {
        let Some(ids) = running.get(&shard).filter(|ids| ids.len() == plan.nodes) else {
            return false;
        };
        let mut of_shard = leaders.iter().filter(|(of, _)| *of == shard);
        of_shard
            .next()
            .is_some_and(|(_, members)| members.voters == *ids && !members.changing)
    })
}
