//! Clients write and read while nodes die, lose power, are cut off and come back; what they saw is judged afterwards.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use generation_engine::batch::{BatchWriter, Operation};
use generation_engine::machine::Reply as MachineReply;
use generation_engine::{Command, Condition, Outcome as EngineOutcome};
use generation_node::env::Env as _;
use generation_node::raft::replica::{Beginning, Outcome};
use generation_node::raft::runtime::{LocalOneshot, Runtime, ambient, within};
use generation_sim::check::check;
use generation_sim::history::{Event, Freshness, Header, History, Op, Outcome as Ended, Reply};
use generation_sim::{Dice, Kill, Sim, SimEnv, Weather};
use openraft_rt::{AsyncRuntime as _, Oneshot as _, OneshotSender as _};

use crate::group::{Hub, NODES, SHARDS, serve};

const CLIENTS: u32 = 6;
const KEYS: u64 = 6;
/// How long a client waits for anything.
const PATIENCE: Duration = Duration::from_secs(2);

struct Record {
    history: History,
    start: Instant,
    next_id: u64,
}

struct Client {
    number: u32,
    envs: Rc<Vec<SimEnv>>,
    hub: Rc<RefCell<Hub>>,
    record: Rc<RefCell<Record>>,
    dice: Dice,
    /// The node asked first.
    guess: usize,
}

/// How one try ended.
enum Tried {
    Done(Reply),
    Elsewhere(Option<usize>),
    InDoubt,
}

impl Client {
    fn at(&self) -> u64 {
        let now = self.envs[NODES].now();
        (now - self.record.borrow().start).as_nanos() as u64
    }

    async fn run(mut self, until: Instant) {
        while self.envs[NODES].now() < until {
            Runtime::sleep(Duration::from_micros(self.dice.below(20_000))).await;
            let key = format!("k{}", self.dice.below(KEYS));
            let counter = format!("n{}", self.dice.below(2));
            let id = {
                let mut record = self.record.borrow_mut();
                record.next_id += 1;
                record.next_id
            };
            let op = match self.dice.below(10) {
                0..4 => Op::Put {
                    key,
                    value: format!("v{id}"),
                    if_version: None,
                    ttl_ms: None,
                },
                4 => Op::Incr { key: counter, delta: 1 },
                5 => Op::Delete { key, if_version: None },
                _ => Op::Get {
                    key,
                    freshness: Freshness::Linearizable,
                },
            };
            let call = Event::Call {
                at: self.at(),
                id,
                client: self.number,
                op: op.clone(),
            };
            self.record.borrow_mut().history.events.push(call);
            let outcome = self.execute(&op).await;
            let at = self.at();
            self.record
                .borrow_mut()
                .history
                .events
                .push(Event::Return { at, id, outcome });
        }
    }

    async fn execute(&mut self, op: &Op) -> Ended {
        for _ in 0..20 {
            let node = self.guess;
            match self.attempt(node, op).await {
                Tried::Done(reply) => return Ended::Done(reply),
                Tried::InDoubt if op.is_write() => {
                    return Ended::InDoubt {
                        code: "lost".to_owned(),
                    };
                }
                Tried::InDoubt => self.guess = self.dice.below(NODES as u64) as usize,
                Tried::Elsewhere(leader) => {
                    let other = self.dice.below(NODES as u64) as usize;
                    self.guess = leader.unwrap_or(other);
                    Runtime::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        Ended::Refused {
            code: "no_quorum".to_owned(),
        }
    }

    /// Asks one node, within its environment.
    async fn attempt(&self, node: usize, op: &Op) -> Tried {
        let key = op.key().unwrap().as_bytes().to_vec();
        let shard = u16::from(key[1]) % SHARDS;
        let Some(replica) = self.hub.borrow().replicas[node].get(&shard).cloned() else {
            return Tried::Elsewhere(None);
        };
        let (sender, receiver) = LocalOneshot::channel();
        let (op, env) = (op.clone(), self.envs[node].clone());
        let unix_ms = env.unix_ms();
        let task = async move {
            if matches!(op, Op::Get { .. }) {
                // A read that cannot be served was not executed.
                let Ok(_) = replica.linearize().await else {
                    let _ = sender.send(Tried::Elsewhere(
                        replica.leader().map(|leader| leader.replica as usize - 1),
                    ));
                    return;
                };
                let reply = replica.machine().with(|machine| {
                    let index = machine.shard().applied_index();
                    let found = machine.shard().peek(&key);
                    Reply {
                        status: if found.is_some() { "ok" } else { "not_found" }.to_owned(),
                        version: found.map_or(0, |entry| entry.version.get()),
                        value: found.map(|entry| String::from_utf8(entry.value.to_vec()).unwrap()),
                        shard,
                        epoch: 1,
                        index,
                        ..Reply::default()
                    }
                });
                let _ = sender.send(Tried::Done(reply));
                return;
            }
            let mut writer = BatchWriter::new();
            let command = match &op {
                Op::Put { value, .. } => Command::Put {
                    key: &key,
                    value: value.as_bytes(),
                    expires_at_ms: 0,
                    condition: Condition::None,
                },
                Op::Delete { .. } => Command::Delete {
                    key: &key,
                    condition: Condition::None,
                },
                Op::Incr { delta, .. } => Command::Incr {
                    key: &key,
                    delta: *delta,
                },
                _ => unreachable!("clients do nothing else"),
            };
            writer.push(&Operation::from(command)).unwrap();
            let now_ms = replica
                .machine()
                .with(|machine| machine.shard().shard_time_ms().max(unix_ms));
            replica.propose(writer.finish(now_ms).into(), move |outcome| {
                let tried = match outcome {
                    Outcome::Applied { log_id, replies } => {
                        Tried::Done(written(shard, log_id.index, &replies.replies[0]))
                    }
                    Outcome::NotProposed(leader) => Tried::Elsewhere(leader.map(|leader| leader.replica as usize - 1)),
                    Outcome::InDoubt => Tried::InDoubt,
                };
                let _ = sender.send(tried);
            });
        };
        env.spawn(within(ambient(env.clone()), task));
        match Runtime::timeout(PATIENCE, receiver).await {
            Ok(Ok(tried)) => tried,
            Ok(Err(_)) | Err(_) => Tried::InDoubt,
        }
    }
}

fn written(shard: u16, index: u64, reply: &MachineReply) -> Reply {
    let MachineReply::Outcome(outcome) = reply else {
        panic!("{reply:?}")
    };
    let (status, version, value) = match outcome {
        EngineOutcome::Applied { version } => ("ok", version.get(), None),
        EngineOutcome::Counter { version, value } => ("ok", version.get(), Some(value.to_string())),
        EngineOutcome::NotFound => ("not_found", 0, None),
        other => panic!("{other:?}"),
    };
    Reply {
        status: status.to_owned(),
        version,
        value,
        shard,
        epoch: 1,
        index,
        ..Reply::default()
    }
}

struct Cluster {
    sim: Sim,
    envs: Rc<Vec<SimEnv>>,
    hub: Rc<RefCell<Hub>>,
    record: Rc<RefCell<Record>>,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut sim = Sim::new(seed, Weather::default());
        for _ in 0..=NODES {
            sim.bare_node(1);
        }
        let envs: Rc<Vec<SimEnv>> = Rc::new((0..=NODES).map(|node| sim.env(node, 0)).collect());
        let record = Record {
            history: History::new(Header::new("replicas", seed)),
            start: envs[NODES].now(),
            next_id: 0,
        };
        let mut cluster = Self {
            hub: Hub::new(seed),
            record: Rc::new(RefCell::new(record)),
            sim,
            envs,
        };
        for node in 0..NODES {
            cluster.serve(node, Beginning::Form);
        }
        cluster
    }

    fn serve(&mut self, node: usize, beginning: Beginning) {
        let record = Rc::clone(&self.record);
        let clock = self.envs[NODES].clone();
        let noted = move |replica: &crate::group::Member| {
            let Some(applied) = replica.machine().applied() else {
                return;
            };
            let status = replica.status();
            let mut record = record.borrow_mut();
            let at = (clock.now() - record.start).as_nanos() as u64;
            record.history.events.push(Event::State {
                at,
                node: node as u32,
                shard: replica.machine().config().shard as u16,
                epoch: 1,
                index: applied.index,
                hash: format!("{:032x}", status.state_hash),
            });
        };
        let env = self.envs[node].clone();
        let task = serve(Rc::clone(&self.envs), node, Rc::clone(&self.hub), beginning, noted);
        self.sim.spawn(node, within(ambient(env), task));
    }

    fn kill(&mut self, node: usize, how: Kill) {
        let dead = {
            let mut hub = self.hub.borrow_mut();
            (std::mem::take(&mut hub.replicas[node]), hub.journals[node].take())
        };
        self.sim.kill(node, how);
        drop(dead);
    }

    fn restart(&mut self, node: usize) {
        self.sim.start(node);
        self.serve(node, Beginning::Resume);
    }

    fn clients(&mut self, dice: &mut Dice, time: Duration) {
        for number in 0..CLIENTS {
            let client = Client {
                number,
                envs: Rc::clone(&self.envs),
                hub: Rc::clone(&self.hub),
                record: Rc::clone(&self.record),
                dice: Dice::new(dice.roll()),
                guess: number as usize % NODES,
            };
            let env = self.envs[NODES].clone();
            let until = env.now() + time;
            self.sim.spawn(NODES, within(ambient(env), client.run(until)));
        }
    }

    /// Judges what happened; returns how many operations were answered.
    fn judge(&self, seed: u64) -> usize {
        let mut record = self.record.borrow_mut();
        record.history.events.sort_by_key(at);
        let violations = check(&record.history);
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
        let answered = |event: &&Event| {
            matches!(
                event,
                Event::Return {
                    outcome: Ended::Done(_),
                    ..
                }
            )
        };
        record.history.events.iter().filter(answered).count()
    }
}

fn at(event: &Event) -> u64 {
    match event {
        Event::Call { at, .. } | Event::Return { at, .. } | Event::State { at, .. } => *at,
        other => panic!("{other:?}"),
    }
}

fn pick(dice: &mut Dice) -> usize {
    dice.below(NODES as u64) as usize
}

#[test]
fn a_quiet_cluster_serves_and_replays() {
    let run = || {
        let mut cluster = Cluster::new(7);
        cluster.sim.run_for(Duration::from_secs(3));
        cluster.clients(&mut Dice::new(1), Duration::from_secs(2));
        cluster.sim.run_for(Duration::from_secs(5));
        let answered = cluster.judge(7);
        assert!(answered > 500, "{answered}");
        (answered, cluster.sim.trace())
    };
    assert_eq!(run(), run());
}

#[test]
fn nothing_acknowledged_is_lost_whoever_dies() {
    let seeds = std::env::var("SEEDS").map_or(4, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut cluster = Cluster::new(seed);
        let mut dice = Dice::new(seed ^ 0x5eed);
        cluster.sim.run_for(Duration::from_secs(2));
        cluster.clients(&mut dice, Duration::from_secs(15));
        for _ in 0..10 {
            cluster.sim.run_for(Duration::from_millis(200 + dice.below(1_000)));
            let how = if dice.chance(500) { Kill::Power } else { Kill::Process };
            match dice.below(10) {
                0..6 => {
                    let node = pick(&mut dice);
                    cluster.kill(node, how);
                    cluster.sim.run_for(Duration::from_millis(dice.below(1_500)));
                    cluster.restart(node);
                }
                6 => {
                    (0..NODES).for_each(|node| cluster.kill(node, how));
                    cluster.sim.run_for(Duration::from_millis(dice.below(500)));
                    (0..NODES).for_each(|node| cluster.restart(node));
                }
                7 | 8 => {
                    let node = pick(&mut dice);
                    for other in (0..NODES).filter(|other| *other != node) {
                        let mut hub = cluster.hub.borrow_mut();
                        hub.cuts.insert((node, other));
                        // Sometimes it still hears the others.
                        if seed % 2 == 0 {
                            hub.cuts.insert((other, node));
                        }
                    }
                    cluster.sim.run_for(Duration::from_millis(500 + dice.below(1_500)));
                    cluster.hub.borrow_mut().cuts.clear();
                }
                _ => {
                    cluster.hub.borrow_mut().loss_per_mille = 100;
                    cluster.sim.run_for(Duration::from_secs(1));
                    cluster.hub.borrow_mut().loss_per_mille = 0;
                }
            }
        }
        cluster.sim.run_for(Duration::from_secs(20));
        let answered = cluster.judge(seed);
        assert!(answered > 300, "seed {seed}: only {answered} operations were answered");
        // Everybody has come to the same state.
        let hub = cluster.hub.borrow();
        for shard in 0..SHARDS {
            let states: Vec<_> = hub.replicas.iter().map(|replicas| replicas[&shard].status()).collect();
            let same = states
                .windows(2)
                .all(|pair| (pair[0].applied, pair[0].state_hash) == (pair[1].applied, pair[1].state_hash));
            assert!(same, "seed {seed}: {states:#?} {:#?}", hub.journals);
        }
    }
}

/// A leader whose disk fails acknowledges nothing more, another takes over, and after a restart it is one of three again.
#[test]
fn a_failed_sync_moves_the_leaders_away() {
    let mut cluster = Cluster::new(3);
    let leads = |cluster: &Cluster, node: usize, shard: u16| {
        cluster.hub.borrow().replicas[node]
            .get(&shard)
            .is_some_and(crate::group::Member::leads)
    };
    cluster.sim.run_for(Duration::from_secs(3));
    let node = (0..NODES)
        .find(|node| leads(&cluster, *node, 0))
        .expect("somebody leads");
    cluster.clients(&mut Dice::new(3), Duration::from_secs(20));
    cluster.sim.run_for(Duration::from_secs(1));
    cluster.sim.fail_syncs(node, 1);
    cluster.sim.run_for(Duration::from_secs(6));
    let failed = cluster.hub.borrow().journals[node].as_ref().unwrap().failure();
    assert!(failed.is_some());
    for shard in 0..SHARDS {
        let leaders: Vec<usize> = (0..NODES).filter(|node| leads(&cluster, *node, shard)).collect();
        assert!(leaders.iter().any(|leader| *leader != node), "{leaders:?}");
    }
    cluster.kill(node, Kill::Power);
    cluster.restart(node);
    cluster.sim.run_for(Duration::from_secs(20));
    cluster.judge(3);
    let status = cluster.hub.borrow().replicas[node][&0].status();
    let other = cluster.hub.borrow().replicas[(node + 1) % NODES][&0].status();
    assert_eq!((status.applied, status.state_hash), (other.applied, other.state_hash));
}
