//! Clients at work: each has one operation under way at a time, chosen by the seed, and everything it asks and is told goes into
//! the history.
//!
//! Routing, retries and the sorting of errors are the client library's core, the same code that production runs; the
//! transport is the simulation's.

mod agent;
mod endpoint;

use std::time::Duration;

use self::agent::Agent;
use self::endpoint::Endpoint;
use crate::dice::Dice;
use crate::history::{Event, Header, History, Op, Outcome};
use crate::sim::Sim;

/// What clients do.
#[derive(Debug, Clone)]
pub struct WorkloadSetup {
    /// Client processes, each with connections of its own.
    pub endpoints: usize,
    /// Clients in each process.
    pub agents: usize,
    /// Keys that are read, written and deleted.
    pub keys: u64,
    /// Counters that are only ever added to.
    pub counters: u64,
    /// Operations of all clients until they audit.
    pub operations: u64,
    /// Over how long they are spread.
    pub spread: Duration,
    /// How long an operation may take.
    pub timeout: Duration,
    /// Reads that need not be linearizable, of 1,000.
    pub relaxed_per_mille: u64,
    /// Writes that give their entry a time to live, of 1,000.
    pub perishable_per_mille: u64,
    /// Whether writes belong to sessions, so that those in doubt are repeated.
    pub sessions: bool,
    /// Whether shards are scanned now and then.
    pub scans: bool,
    /// Bytes of a value beyond its name.
    pub value_bytes: u64,
}

impl Default for WorkloadSetup {
    fn default() -> Self {
        Self {
            endpoints: 2,
            agents: 3,
            keys: 8,
            counters: 2,
            operations: 600,
            spread: Duration::from_secs(10),
            timeout: Duration::from_secs(2),
            relaxed_per_mille: 200,
            perishable_per_mille: 0,
            sessions: false,
            scans: true,
            value_bytes: 64,
        }
    }
}

/// Whoever works in a run, as the run sees them.
pub(crate) trait Clients {
    /// Notes an event in the history.
    fn note(&mut self, event: Event);

    /// A node was started.
    fn started(&mut self, sim: &mut Sim, node: usize);

    /// From now on clients read what is there, every key once by one of them, and stop.
    fn audit(&mut self, shards: u16);

    /// Whether the audit is over.
    fn is_done(&self) -> bool;

    /// Lets every client do what it can at the present moment.
    fn turn(&mut self, sim: &mut Sim);

    /// Operations by how they ended.
    fn counts(&self) -> Counts;

    /// The history so far.
    fn take_history(&mut self) -> History;
}

/// All clients and what they have seen.
#[derive(Debug)]
pub struct Workload {
    setup: WorkloadSetup,
    endpoints: Vec<Endpoint>,
    agents: Vec<Agent>,
    log: Log,
    /// Whether everything is only read any more.
    auditing: bool,
}

/// What agents share.
#[derive(Debug)]
struct Log {
    dice: Dice,
    history: History,
    next_id: u64,
    left: u64,
    /// Greatest pause between two operations of a client.
    think: Duration,
    /// Operations that ended, by how.
    counts: Counts,
}

/// Operations by how they ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered.
    pub done: u64,
    /// Certainly not executed.
    pub refused: u64,
    /// Perhaps executed.
    pub in_doubt: u64,
}

impl Log {
    fn call(&mut self, at: u64, client: u32, op: Op) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.history.events.push(Event::Call { at, id, client, op });
        id
    }

    fn returned(&mut self, at: u64, id: u64, outcome: Outcome) {
        match outcome {
            Outcome::Done(_) => self.counts.done += 1,
            Outcome::Refused { .. } => self.counts.refused += 1,
            Outcome::InDoubt { .. } => self.counts.in_doubt += 1,
        }
        self.history.events.push(Event::Return { at, id, outcome });
    }
}

impl Workload {
    /// Clients of a cluster of `nodes` nodes.
    pub fn new(sim: &mut Sim, setup: WorkloadSetup, nodes: usize, seed: u64, header: Header) -> Self {
        let mut dice = Dice::new(seed);
        let limits = generation_quic::Limits {
            idle_timeout: Duration::from_secs(3),
            keep_alive: Some(Duration::from_secs(1)),
            ..generation_quic::Limits::default()
        };
        let endpoints: Vec<_> = (0..setup.endpoints)
            .map(|_| Endpoint::new(sim.client(limits.clone()), nodes))
            .collect();
        let agents: Vec<_> = (0..setup.endpoints * setup.agents)
            .map(|number| Agent::new(number as u32, number % setup.endpoints, sim.now(), dice.roll()))
            .collect();
        Self {
            log: Log {
                dice,
                history: History::new(header),
                next_id: 0,
                left: setup.operations,
                think: 2 * setup.spread * agents.len() as u32 / (setup.operations as u32).max(1),
                counts: Counts::default(),
            },
            setup,
            endpoints,
            agents,
            auditing: false,
        }
    }
}

impl Clients for Workload {
    fn note(&mut self, event: Event) {
        self.log.history.events.push(event);
    }

    fn started(&mut self, _sim: &mut Sim, _node: usize) {}

    fn audit(&mut self, shards: u16) {
        self.auditing = true;
        self.log.left = 0;
        let keys = (0..self.setup.keys)
            .map(agent::key)
            .chain((0..self.setup.counters).map(agent::counter));
        let mut reads: Vec<Op> = keys.map(agent::read).collect();
        if self.setup.scans {
            reads.extend((0..shards).map(|shard| Op::Scan { shard }));
        }
        let count = self.agents.len();
        for (number, op) in reads.into_iter().enumerate() {
            self.agents[number % count].enqueue(op);
        }
    }

    fn is_done(&self) -> bool {
        self.auditing && self.agents.iter().all(Agent::is_idle)
    }

    fn counts(&self) -> Counts {
        self.log.counts
    }

    fn turn(&mut self, sim: &mut Sim) {
        for endpoint in &mut self.endpoints {
            endpoint.tend_map(sim);
        }
        for agent in &mut self.agents {
            let endpoint = &mut self.endpoints[agent.endpoint()];
            agent.turn(sim, endpoint, &self.setup, &mut self.log);
        }
    }

    fn take_history(&mut self) -> History {
        let header = self.log.history.header.clone();
        std::mem::replace(&mut self.log.history, History::new(header))
    }
}
