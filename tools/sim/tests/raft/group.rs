//! Three simulated nodes with a replica of each shard, and calls between them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_node::env::Env as _;
use generation_node::raft::journal::Journal;
use generation_node::raft::network::{CallError, Transport};
use generation_node::raft::replica::{Beginning, Replica, ReplicaConfig, Timing};
use generation_node::raft::runtime::{LocalOneshot, Runtime, ambient, current, within};
use generation_node::raft::shards::{Durability, Shards, ShardsConfig};
use generation_node::raft::types::Place;
use generation_sim::{Dice, SimDisk, SimEnv};
use openraft_rt::{AsyncRuntime as _, Oneshot as _, OneshotSender as _};

use crate::suites::{JOURNAL, machine_config};

pub(crate) const NODES: usize = 3;
pub(crate) const SHARDS: u16 = 2;

pub(crate) type Member = Replica<SimDisk, Calls>;

/// What everybody can reach.
pub(crate) struct Hub {
    pub(crate) replicas: Vec<BTreeMap<u16, Member>>,
    pub(crate) journals: Vec<Option<Journal<SimDisk>>>,
    /// One way each.
    pub(crate) cuts: BTreeSet<(usize, usize)>,
    pub(crate) loss_per_mille: u64,
    dice: Dice,
}

impl Hub {
    pub(crate) fn new(seed: u64) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            replicas: (0..NODES).map(|_| BTreeMap::new()).collect(),
            journals: vec![None; NODES],
            cuts: BTreeSet::new(),
            loss_per_mille: 0,
            dice: Dice::new(seed),
        }))
    }

    /// How long a message takes; `None`: it is lost.
    fn way(&mut self, from: usize, to: usize) -> Option<Duration> {
        let lost = self.cuts.contains(&(from, to)) || self.dice.chance(self.loss_per_mille);
        let micros = 50 + self.dice.below(500);
        (!lost).then_some(Duration::from_micros(micros))
    }
}

/// One node's way to the others.
#[derive(Clone)]
pub(crate) struct Calls {
    node: usize,
    envs: Rc<Vec<SimEnv>>,
    hub: Rc<RefCell<Hub>>,
}

impl Transport for Calls {
    async fn call(
        &self,
        node: u64,
        shard: u16,
        kind: u8,
        payload: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, CallError> {
        let (from, to) = (self.node, node as usize - 1);
        let env = &self.envs[from];
        let there = self.hub.borrow_mut().way(from, to);
        let Some(there) = there else {
            env.sleep_until(deadline).await;
            return Err(CallError::Timeout);
        };
        env.sleep_until(env.now() + there).await;
        let replica = self.hub.borrow().replicas[to].get(&shard).cloned();
        let replica = replica.ok_or(CallError::Unreachable(node))?;
        let (sender, receiver) = LocalOneshot::channel();
        let other = self.envs[to].clone();
        let handled = async move {
            let reply = replica.handle(kind, payload).await;
            let _ = sender.send(reply);
        };
        other.spawn(within(ambient(other.clone()), handled));
        let answered = Runtime::timeout_at(deadline.into(), receiver).await;
        let reply = match answered {
            Ok(reply) => reply.map_err(|lost| CallError::Failed(lost.to_string()))?,
            Err(_) => return Err(CallError::Timeout),
        };
        let back = self.hub.borrow_mut().way(to, from);
        let Some(back) = back else {
            env.sleep_until(deadline).await;
            return Err(CallError::Timeout);
        };
        env.sleep_until(env.now() + back).await;
        Ok(reply)
    }

    fn tell(&self, node: u64, shard: u16, kind: u8, payload: Bytes) {
        let (calls, env) = (self.clone(), self.envs[self.node].clone());
        let deadline = env.now() + Duration::from_secs(1);
        let told = async move {
            // It may be lost.
            let _ = calls.call(node, shard, kind, payload, deadline).await;
        };
        env.spawn(within(ambient(env.clone()), told));
    }

    fn is_alive(&self, _: u64) -> bool {
        true
    }
}

/// A node: its journal, its replicas, and what they need from time to time.
pub(crate) async fn serve(
    envs: Rc<Vec<SimEnv>>,
    node: usize,
    hub: Rc<RefCell<Hub>>,
    beginning: Beginning,
    mut each: impl FnMut(&Member),
) {
    let env = envs[node].clone();
    let mut journal = JOURNAL;
    journal.identity.node = 1 + node as u64;
    let calls = Calls {
        node,
        envs,
        hub: Rc::clone(&hub),
    };
    let replica = |shard: u16| ReplicaConfig {
        id: 1 + node as u64,
        machine: machine_config(u32::from(shard)),
        members: (1..=NODES as u64).map(|id| (id, Place { node: id })).collect(),
        beginning,
        timing: Timing::default(),
    };
    let config = ShardsConfig {
        journal,
        durability: Durability::Sync,
        snapshot_bytes: 512 << 10,
    };
    let shards = Shards::open(current(), env.disk(), calls, config).await.unwrap();
    for shard in 0..SHARDS {
        shards.start(replica(shard)).await.unwrap();
    }
    {
        let mut hub = hub.borrow_mut();
        hub.replicas[node] = shards.replicas().into_iter().collect();
        hub.journals[node] = Some(shards.journal().clone());
    }
    loop {
        env.sleep_until(env.now() + Duration::from_millis(50)).await;
        for (_, replica) in shards.replicas() {
            each(&replica);
        }
    }
}
