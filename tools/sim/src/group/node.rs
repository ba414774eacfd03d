//! One machine with a replica of every shard: its journal, its snapshots, and what the history has to know of it.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use generation_engine::session::SessionLimits;
use generation_engine::{Policy, ShardConfig};
use generation_node::env::Env;
use generation_node::raft::journal::{Identity, Journal, JournalConfig, OpenError};
use generation_node::raft::machine::MachineConfig;
use generation_node::raft::replica::{Beginning, Replica, ReplicaConfig, ReplicaError, Timing};
use generation_node::raft::runtime::ambient;
use generation_node::raft::types::Place;

use super::bus::Bus;
use super::{GroupSetup, Shared, at, roll};
use crate::disk::SimDisk;
use crate::env::SimEnv;
use crate::history::Event;

/// How often a node is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// The epoch of every shard: nothing begins anew.
pub(super) const EPOCH: u32 = 1;

/// What a node serves.
pub(super) struct Replicas {
    pub(super) shards: Vec<Replica<SimDisk, Bus>>,
    pub(super) journal: Journal<SimDisk>,
}

/// Runs a node until it dies.
///
/// # Panics
/// When what is on its disk cannot be used: nothing that happens to it in a run makes it so.
pub(super) async fn serve(env: SimEnv, shared: Rc<Shared>, start: u32) {
    let GroupSetup { nodes, shards, .. } = shared.setup;
    let ambient = ambient(env.clone());
    let config = JournalConfig {
        identity: Identity {
            cluster: 1,
            journal: u128::from(roll(&env)),
            node: 1 + env.node as u64,
            core: 0,
            cores: 1,
            shards,
        },
        segment_bytes: shared.setup.segment_bytes,
        segments: shared.setup.segments,
        kept_bytes: shared.setup.kept_bytes,
    };
    let journal = Journal::open(Rc::clone(&ambient), env.disk(), config).await;
    let journal = match journal {
        Ok(journal) => journal,
        // The disk fails while it is being read: the node ends, and is started again.
        Err(OpenError::Io { .. }) => env.die(),
        Err(error) => panic!("node {}: {error}", env.node),
    };
    let members = (0..nodes as u64)
        .map(|node| (1 + node, Place { node: 1 + node }))
        .collect::<std::collections::BTreeMap<_, _>>();
    let mut replicas = Replicas {
        shards: Vec::new(),
        journal: journal.clone(),
    };
    // A vote is durable behind the record that makes the replica: without that record it has never voted.
    let known: BTreeSet<u32> = journal.replicas().into_iter().map(|(shard, _)| shard).collect();
    for shard in 0..shards {
        let config = ReplicaConfig {
            id: 1 + env.node as u64,
            machine: MachineConfig {
                cluster: 1,
                shard: u32::from(shard),
                epoch: EPOCH,
                shard_config: ShardConfig {
                    policy: Policy::NoEvict,
                    budget_bytes: 16 << 20,
                    ..ShardConfig::default()
                },
                sessions: SessionLimits::default(),
                next_replica_id: 1 + nodes as u64,
            },
            members: members.clone(),
            beginning: if known.contains(&u32::from(shard)) {
                Beginning::Resume
            } else {
                Beginning::Form
            },
            timing: Timing::default(),
        };
        let bus = Bus {
            env: env.clone(),
            hosts: Rc::clone(&shared.hosts),
        };
        let replica = Replica::start(Rc::clone(&ambient), &journal, env.disk(), bus, config).await;
        replicas.shards.push(match replica {
            Ok(replica) => replica,
            Err(ReplicaError::Snapshots { error, .. }) if error.kind() != ErrorKind::InvalidData => env.die(),
            Err(error) => panic!("node {}: {error}", env.node),
        });
    }
    let replicas = Rc::new(replicas);
    shared.hosts.register(env.node, &replicas);
    let mut seen = vec![None; usize::from(shards)];
    loop {
        env.sleep_until(env.now() + LOOK).await;
        look(&env, &shared, &replicas, start, &mut seen);
    }
}

/// Notes how the replicas see the world, and does what the core of a node would do.
fn look(env: &SimEnv, shared: &Rc<Shared>, replicas: &Rc<Replicas>, start: u32, seen: &mut [Option<(u64, u64, bool)>]) {
    if replicas.journal.failure().is_some() {
        // A journal that failed acknowledges nothing; the node is restarted.
        env.die();
    }
    let building = |shard: u32| replicas.shards[shard as usize].machine().is_building();
    let mut due = replicas
        .journal
        .forced_snapshot(building)
        .map(|forced| forced.shard as usize);
    if due.is_none() && roll(env) % 1_000 < shared.setup.snapshots_per_mille {
        due = Some((roll(env) % replicas.shards.len() as u64) as usize);
    }
    if let Some(shard) = due {
        let replica = replicas.shards[shard].clone();
        let task = async move { replica.snapshot().await };
        env.spawn(generation_node::raft::runtime::within(ambient(env.clone()), task));
    }
    let at = at(env);
    for (shard, replica) in replicas.shards.iter().enumerate() {
        let status = replica.status();
        let applied = status.applied.map_or(0, |log_id| log_id.index);
        let now = (status.term, applied, status.leads);
        if seen[shard].replace(now) == Some(now) && !shared.settled.get() {
            continue;
        }
        let (node, number) = (env.node as u32, shard as u16);
        shared.note(Event::Replica {
            at,
            node,
            start,
            shard: number,
            epoch: EPOCH,
            replica: status.id,
            term: status.term,
            leads: status.leads,
            committed: applied,
            applied,
        });
        shared.note(Event::State {
            at,
            node,
            shard: number,
            epoch: EPOCH,
            index: applied,
            hash: format!("{:032x}", status.state_hash),
        });
    }
}
