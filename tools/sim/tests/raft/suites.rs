//! openraft's conformance suites, and a journal under power cuts.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use generation_engine::ShardConfig;
use generation_engine::session::SessionLimits;
use generation_node::env::Env as _;
use generation_node::raft::journal::{Identity, Journal, JournalConfig, LogStore};
use generation_node::raft::machine::{MachineConfig, StateMachine};
use generation_node::raft::runtime::{Driver, Runtime, ambient, current, with_driver, within};
use generation_node::raft::types::{Commands, Entry, LeaderId, LogId, Payload, Types};
use generation_sim::{Dice, Kill, Sim, SimDisk, SimEnv, Weather};
use openraft::StorageError;
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _, RaftLogStorageExt as _};
use openraft::testing::log::{StoreBuilder, Suite as StoreSuite};
use openraft_rt::testing::Suite as RuntimeSuite;

pub(crate) const JOURNAL: JournalConfig = JournalConfig {
    identity: Identity {
        cluster: 7,
        journal: 0,
        node: 1,
        core: 0,
        cores: 1,
        shards: 4,
    },
    segment_bytes: 256 << 10,
    segments: 6,
    kept_bytes: 4 << 10,
};

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A simulation in which a suite's futures run to their end.
struct Simulated(RefCell<Sim>);

impl Simulated {
    fn new() -> Self {
        let mut sim = Sim::new(1, Weather::default());
        // The suite's stores share one core; each has a disk of its own.
        for _ in 0..100 {
            sim.bare_node(1);
        }
        Self(RefCell::new(sim))
    }

    /// Runs a future to its end.
    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let mut output = None;
        self.drive(std::pin::pin!(async { output = Some(future.await) }));
        output.unwrap()
    }
}

impl Driver for Simulated {
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>) {
        let mut sim = self.0.borrow_mut();
        let env = sim.env(0, 0);
        let mut future = std::pin::pin!(within(ambient(env), future));
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&woken));
        // The suite's future is none of the simulation's tasks.
        sim.until(|sim| {
            while woken.0.swap(false, Ordering::Relaxed) {
                if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                    return Some(());
                }
                // What it has spawned may wake it without time going on.
                sim.wake_at(sim.now() + Duration::from_nanos(1));
            }
            None
        });
    }
}

#[test]
fn the_runtime_suite_passes() {
    with_driver(Rc::new(Simulated::new()), RuntimeSuite::<Runtime>::test_all);
}

thread_local! {
    /// Disks for the suite's stores, one each. The suite wants its builder to be shared between threads, which disks are not.
    static DISKS: RefCell<Vec<SimDisk>> = const { RefCell::new(Vec::new()) };
}

struct Stores;

impl StoreBuilder<Types, LogStore<SimDisk>, StateMachine<SimDisk>> for Stores {
    async fn build(&self) -> Result<((), LogStore<SimDisk>, StateMachine<SimDisk>), StorageError<Types>> {
        let disk = DISKS.with_borrow_mut(|disks| disks.pop().unwrap());
        let journal = Journal::open(current(), disk.clone(), JOURNAL).await.unwrap();
        let machine = StateMachine::open(current(), disk, machine_config(0)).await.unwrap();
        Ok(((), journal.shard(0, 1), machine))
    }
}

pub(crate) fn machine_config(shard: u32) -> MachineConfig {
    MachineConfig {
        cluster: 7,
        shard,
        epoch: 1,
        shard_config: ShardConfig {
            budget_bytes: 1 << 20,
            ..ShardConfig::default()
        },
        sessions: SessionLimits::default(),
        next_replica_id: 4,
    }
}

#[test]
fn the_store_suite_passes() {
    let simulated = Rc::new(Simulated::new());
    let disks = (0..100).map(|node| simulated.0.borrow().env(node, 0).disk()).collect();
    DISKS.set(disks);
    let inner = Rc::clone(&simulated);
    with_driver(simulated, || inner.run(StoreSuite::test_all(Stores))).unwrap();
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    Entry {
        log_id: LogId::new(LeaderId { term, node_id: 1 }, index),
        payload: Payload::Normal(Commands(Bytes::from(vec![index as u8; bytes]))),
    }
}

/// What a writer knows to be durable, by shard: the index after the last entry acknowledged.
type Acknowledged = Rc<[Cell<u64>; 2]>;

/// Checks that everything acknowledged is there, then goes on writing until the power goes.
async fn write_on(env: SimEnv, acknowledged: Acknowledged, opened: Rc<Cell<u32>>, mut dice: Dice) {
    let journal = Journal::open(current(), env.disk(), JOURNAL).await.unwrap();
    let mut stores = [journal.shard(0, 1), journal.shard(1, 1)];
    let mut next = [0, 0];
    for (shard, store) in stores.iter_mut().enumerate() {
        let state = store.get_log_state().await.unwrap();
        next[shard] = state.last_log_id.map_or(0, |last| last.index + 1);
        let promised = acknowledged[shard].get();
        assert!(
            next[shard] >= promised,
            "{} entries of {promised} are left",
            next[shard]
        );
        let first = state.last_purged_log_id.map_or(0, |purged| purged.index + 1);
        let entries = store.try_get_log_entries(..).await.unwrap();
        let indexes: Vec<u64> = entries.iter().map(|entry| entry.log_id.index).collect();
        assert_eq!(indexes, (first..next[shard]).collect::<Vec<_>>());
        for found in &entries {
            let Payload::Normal(commands) = &found.payload else {
                panic!("{found:?}")
            };
            assert!(commands.0.iter().all(|byte| *byte == found.log_id.index as u8));
        }
    }
    opened.set(opened.get() + 1);
    loop {
        let shard = dice.below(2) as usize;
        let count = 1 + dice.below(4);
        let bytes = 10 + dice.below(6000) as usize;
        let entries = (next[shard]..next[shard] + count).map(|index| entry(1, index, bytes));
        next[shard] += count;
        stores[shard].blocking_append(entries).await.unwrap();
        acknowledged[shard].set(next[shard]);
        if let Some(forced) = journal.forced_snapshot(|_| false) {
            let up_to = LogId::new(LeaderId { term: 1, node_id: 1 }, forced.up_to);
            stores[forced.shard as usize].purge(up_to).await.unwrap();
        }
    }
}

/// Nothing that was acknowledged is ever lost, wherever the power goes and whatever tears.
#[test]
fn power_cuts_lose_nothing_acknowledged() {
    for seed in 0..20 {
        let mut sim = Sim::new(seed, Weather::default());
        let node = sim.bare_node(1);
        let mut dice = Dice::new(seed);
        let acknowledged = Acknowledged::default();
        let opened = Rc::new(Cell::new(0));
        for cut in 0..20 {
            if cut > 0 {
                sim.start(node);
            }
            let env = sim.env(node, 0);
            let task = write_on(
                env.clone(),
                Rc::clone(&acknowledged),
                Rc::clone(&opened),
                Dice::new(dice.roll()),
            );
            sim.spawn(node, within(ambient(env), task));
            sim.run_for(Duration::from_micros(2_000 + dice.below(300_000)));
            let how = if dice.chance(800) { Kill::Power } else { Kill::Process };
            sim.kill(node, how);
        }
        assert!(opened.get() > 10, "seed {seed}: opened {} times", opened.get());
    }
}
