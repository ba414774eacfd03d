//! What is seen of whole nodes' replicas from outside: how each sees its group, and the state it is in.
//!
//! Clients cannot know that two replicas differ, or that two of them lead, until they meet the consequences; the history has both.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::history::Event;
use crate::scenario::Plan;
use crate::sim::Sim;
use crate::workload::Clients;

/// How often every replica is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// The epoch of every shard of nodes that replicate.
const EPOCH: u32 = 1;

/// What was seen last of a replica: its start, its id, term and index, and whether it leads.
type Seen = (u32, u64, u64, u64, bool);

/// Looks at every replica now and then.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    next: Duration,
    seen: BTreeMap<(usize, u16), Seen>,
}

impl Observer {
    /// Notes what has changed, if it is time.
    pub(crate) fn turn(&mut self, sim: &mut Sim, nodes: usize, clients: &mut dyn Clients) {
        let elapsed = sim.elapsed();
        if elapsed < self.next {
            return;
        }
        self.next = elapsed + LOOK;
        let mut any = false;
        for node in 0..nodes {
            for replicas in sim.replicas(node) {
                any = true;
                for (shard, replica) in replicas.replicas() {
                    let status = replica.status();
                    let applied = status.applied.map_or(0, |log_id| log_id.index);
                    let now = (sim.starts(node), status.id, status.term, applied, status.leads);
                    if self.seen.insert((node, shard), now) == Some(now) {
                        continue;
                    }
                    let (at, epoch) = (elapsed.as_nanos() as u64, EPOCH);
                    let (used, budget) = replica.machine().with(|machine| {
                        let stats = machine.shard().stats();
                        (stats.used_bytes, stats.budget_bytes)
                    });
                    let node = node as u32;
                    clients.note(Event::Replica {
                        at,
                        node,
                        start: now.0,
                        shard,
                        epoch,
                        replica: status.id,
                        term: status.term,
                        leads: status.leads,
                        committed: applied,
                        applied,
                    });
                    clients.note(Event::State {
                        at,
                        node,
                        shard,
                        epoch,
                        index: applied,
                        hash: format!("{:032x}", status.state_hash),
                    });
                    clients.note(Event::Memory {
                        at,
                        node,
                        shard,
                        used,
                        budget,
                    });
                }
            }
        }
        if any {
            sim.wake_at(sim.now() + LOOK);
        } else {
            // Nodes alone have no replicas, and others start within this.
            self.next = elapsed + 10 * LOOK;
        }
    }
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
        for (shard, replica) in sim.replicas(node).iter().flat_map(|replicas| replicas.replicas()) {
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
