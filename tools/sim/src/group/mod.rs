//! A cluster without connections and cores: the real replicas, journals and snapshots, and clients that ask them directly. It
//! shows what replication does under faults, at many seeds a minute, because nothing else is run.

mod agent;
mod bus;
mod node;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use generation_node::env::Env;
use generation_node::raft::runtime::{ambient, within};

use self::agent::Agent;
use self::bus::Hosts;
use crate::dice::Dice;
use crate::env::SimEnv;
use crate::history::{Event, Freshness, Header, History, Op, Outcome};
use crate::sim::Sim;
use crate::workload::{Clients, Counts, WorkloadSetup};

/// A cluster of replicas.
#[derive(Debug, Clone, Copy)]
pub struct GroupSetup {
    /// Machines with a replica of every shard.
    pub nodes: usize,
    /// Shards.
    pub shards: u16,
    /// Machines with clients.
    pub clients: usize,
    /// Length of a segment of the journal.
    pub segment_bytes: u64,
    /// Most segments.
    pub segments: usize,
    /// Bytes of entries kept in memory for each shard.
    pub kept_bytes: usize,
    /// Chance of a snapshot whenever a node is looked at, of 1,000.
    pub snapshots_per_mille: u64,
    /// Whether writes belong to sessions.
    pub sessions: bool,
}

/// What nodes and clients share.
struct Shared {
    setup: GroupSetup,
    workload: WorkloadSetup,
    hosts: Rc<Hosts>,
    history: RefCell<History>,
    next_id: Cell<u64>,
    left: Cell<u64>,
    counts: Cell<Counts>,
    queues: RefCell<BTreeMap<u32, VecDeque<Op>>>,
    idle: RefCell<Vec<bool>>,
    /// Whether everything is only looked at any more.
    settled: Cell<bool>,
}

/// Simulated time since the beginning, in nanoseconds.
fn at(env: &SimEnv) -> u64 {
    let world = env.world.borrow();
    (world.now - world.start).as_nanos() as u64
}

fn roll(env: &SimEnv) -> u64 {
    let mut bytes = [0; 8];
    env.fill_random(&mut bytes);
    u64::from_le_bytes(bytes)
}

impl Shared {
    fn note(&self, event: Event) {
        self.history.borrow_mut().events.push(event);
    }

    fn call(&self, env: &SimEnv, client: u32, op: Op) -> u64 {
        let id = self.next_id.get() + 1;
        self.next_id.set(id);
        self.note(Event::Call {
            at: at(env),
            id,
            client,
            op,
        });
        id
    }

    fn returned(&self, env: &SimEnv, id: u64, outcome: Outcome) {
        let mut counts = self.counts.get();
        match outcome {
            Outcome::Done(_) => counts.done += 1,
            Outcome::Refused { .. } => counts.refused += 1,
            Outcome::InDoubt { .. } => counts.in_doubt += 1,
        }
        self.counts.set(counts);
        self.note(Event::Return {
            at: at(env),
            id,
            outcome,
        });
    }

    fn set_idle(&self, agent: u32, idle: bool) {
        self.idle.borrow_mut()[agent as usize] = idle;
    }

    /// Greatest pause of a client between two operations.
    fn pause(&self) -> Duration {
        if self.settled.get() {
            return Duration::ZERO;
        }
        let agents = (self.workload.agents * self.setup.clients) as u32;
        2 * self.workload.spread * agents / (self.workload.operations as u32).max(1)
    }

    fn shard_of(&self, key: &str) -> u16 {
        let number: u64 = key
            .rsplit('-')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        (number % u64::from(self.setup.shards)) as u16
    }

    /// The next thing a client does, if there is any.
    fn next_op(&self, agent: u32, dice: &mut Dice, versions: &BTreeMap<String, u64>) -> Option<Op> {
        if let Some(op) = self.queues.borrow_mut().get_mut(&agent).and_then(VecDeque::pop_front) {
            return Some(op);
        }
        self.left.set(self.left.get().checked_sub(1)?);
        let workload = &self.workload;
        let freshness = Freshness::Linearizable;
        if workload.counters > 0 && dice.chance(250) {
            let key = format!("counter-{}", dice.below(workload.counters));
            return Some(if dice.chance(700) {
                let delta = 1 + dice.below(1_000).cast_signed();
                Op::Incr { key, delta }
            } else {
                Op::Get { key, freshness }
            });
        }
        let key = format!("key-{}", dice.below(workload.keys));
        let seen = versions.get(&key).copied();
        Some(match dice.below(100) {
            0..45 => Op::Get { key, freshness },
            45..85 => {
                let if_version = match dice.below(4) {
                    0 => Some(0),
                    1 => seen,
                    _ => None,
                };
                let padding = "x".repeat(dice.below(workload.value_bytes + 1) as usize);
                Op::Put {
                    key,
                    value: format!("{}-{padding}", self.next_id.get() + 1),
                    if_version,
                    ttl_ms: None,
                }
            }
            85..95 => Op::Delete {
                key,
                if_version: seen.filter(|_| dice.chance(500)),
            },
            _ => Op::Touch { key, ttl_ms: None },
        })
    }
}

/// A cluster of replicas and its clients.
pub(crate) struct Group {
    shared: Rc<Shared>,
}

impl Group {
    /// Adds the machines of a cluster and of its clients to a simulation, and starts the clients.
    pub(crate) fn new(sim: &mut Sim, setup: GroupSetup, workload: WorkloadSetup, seed: u64, header: Header) -> Self {
        let agents = setup.clients * workload.agents;
        let shared = Rc::new(Shared {
            setup,
            hosts: Rc::default(),
            history: RefCell::new(History::new(header)),
            next_id: Cell::new(0),
            left: Cell::new(workload.operations),
            counts: Cell::default(),
            queues: RefCell::default(),
            idle: RefCell::new(vec![false; agents]),
            settled: Cell::new(false),
            workload,
        });
        let mut dice = Dice::new(seed);
        for _ in 0..setup.nodes {
            sim.bare_node(1);
        }
        let machines: Vec<_> = (0..setup.clients).map(|_| sim.bare_node(1)).collect();
        for number in 0..agents {
            let machine = machines[number % machines.len()];
            let session = setup.sessions.then(|| (u128::from(dice.roll()) << 64 | 1, 0));
            let agent = Agent {
                env: sim.env(machine, 0),
                common: Rc::clone(&shared),
                number: number as u32,
                dice: Dice::new(dice.roll()),
                session,
                leaders: vec![0; usize::from(setup.shards)],
                versions: BTreeMap::new(),
            };
            sim.spawn(machine, agent.work());
        }
        Self { shared }
    }
}

impl Clients for Group {
    fn note(&mut self, event: Event) {
        self.shared.note(event);
    }

    fn started(&mut self, sim: &mut Sim, node: usize) {
        let env = sim.env(node, 0);
        let serve = node::serve(env.clone(), Rc::clone(&self.shared), sim.starts(node));
        sim.spawn(node, within(ambient(env), serve));
    }

    fn audit(&mut self, _shards: u16) {
        let shared = &self.shared;
        shared.settled.set(true);
        shared.left.set(0);
        let workload = &shared.workload;
        let keys = (0..workload.keys).map(|number| format!("key-{number}"));
        let counters = (0..workload.counters).map(|number| format!("counter-{number}"));
        let agents = shared.idle.borrow().len();
        shared.idle.borrow_mut().fill(false);
        for (number, key) in keys.chain(counters).enumerate() {
            let op = Op::Get {
                key,
                freshness: Freshness::Linearizable,
            };
            shared
                .queues
                .borrow_mut()
                .entry((number % agents) as u32)
                .or_default()
                .push_back(op);
        }
    }

    fn is_done(&self) -> bool {
        let shared = &self.shared;
        let queued = shared.queues.borrow().values().any(|queue| !queue.is_empty());
        shared.settled.get() && !queued && shared.idle.borrow().iter().all(|idle| *idle)
    }

    fn turn(&mut self, _sim: &mut Sim) {}

    fn counts(&self) -> Counts {
        self.shared.counts.get()
    }

    fn take_history(&mut self) -> History {
        let header = self.shared.history.borrow().header.clone();
        self.shared.history.replace(History::new(header))
    }
}
