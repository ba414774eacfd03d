//! openraft's conformance suites over the real executor and the real disk.

use std::cell::RefCell;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use generation_node::ShardConfig;
use generation_node::env::Env as _;
use generation_node::raft::journal::{Identity, Journal, JournalConfig, LogStore};
use generation_node::raft::machine::{MachineConfig, StateMachine};
use generation_node::raft::runtime::{Driver, Runtime, ambient, current, with_driver, within};
use generation_node::raft::types::Types;
use generation_server::env::{CoreParts, GlommioEnv, MESH_CAPACITY, RingDisk, Shared, mesh};
use generation_server::executors::IO_MEMORY_BYTES;
use generation_server::net::port;
use glommio::{LocalExecutorBuilder, Placement};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite as StoreSuite};
use openraft_rt::testing::Suite as RuntimeSuite;
use tempfile::TempDir;

thread_local! {
    /// The disk of the core that runs on this thread.
    static DISK: RefCell<Option<RingDisk>> = const { RefCell::new(None) };
}

/// Runs each future on an executor of its own, with a core's environment.
struct Executor {
    directory: PathBuf,
}

impl Driver for Executor {
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>) {
        let executor = LocalExecutorBuilder::new(Placement::Unbound)
            .io_memory(IO_MEMORY_BYTES)
            .make()
            .unwrap();
        executor.run(async {
            let mut port = port::open(([127, 0, 0, 1], 0).into(), 1, 1 << 20).unwrap();
            let env = GlommioEnv::new(CoreParts {
                core: 0,
                socket: port.sockets.remove(0),
                mesh: mesh(1, MESH_CAPACITY).remove(0),
                shared: Shared::new(1).unwrap(),
                directory: self.directory.clone(),
            });
            let env = env.unwrap();
            DISK.set(Some(env.disk()));
            env.drive(within(ambient(env.clone()), future)).await;
            DISK.take();
        });
    }
}

fn driver() -> (TempDir, Rc<Executor>) {
    // Not in /tmp, which may be a file system that does not know O_DIRECT.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let directory = scratch.path().to_owned();
    (scratch, Rc::new(Executor { directory }))
}

#[test]
fn the_runtime_suite_passes() {
    let (_scratch, driver) = driver();
    with_driver(driver, RuntimeSuite::<Runtime>::test_all);
}

/// Makes a store in a directory of its own for each test of the suite.
struct Stores {
    count: AtomicU32,
}

impl StoreBuilder<Types, LogStore<RingDisk>, StateMachine<RingDisk>> for Stores {
    async fn build(&self) -> Result<((), LogStore<RingDisk>, StateMachine<RingDisk>), StorageError<Types>> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let disk = DISK.with_borrow(|disk| disk.as_ref().expect("it runs on a core").inner(&number.to_string()));
        let disk = disk.unwrap();
        let config = JournalConfig {
            identity: Identity {
                cluster: 7,
                journal: 0,
                node: 1,
                core: 0,
                cores: 1,
                shards: 1,
            },
            segment_bytes: 1 << 20,
            segments: 4,
            kept_bytes: 4 << 10,
        };
        let journal = Journal::open(current(), disk.clone(), config).await.unwrap();
        let machine = MachineConfig {
            cluster: 7,
            shard: 0,
            epoch: 1,
            shard_config: ShardConfig::default(),
            sessions: generation_node::raft::machine::SessionLimits::default(),
            next_replica_id: 4,
        };
        let machine = StateMachine::open(current(), disk, machine).await.unwrap();
        Ok(((), journal.shard(0, 1), machine))
    }
}

#[test]
fn the_store_suite_passes_on_the_real_disk() {
    let (_scratch, driver) = driver();
    let stores = Stores {
        count: AtomicU32::new(0),
    };
    with_driver(driver, || {
        use openraft_rt::AsyncRuntime as _;
        Runtime::run(StoreSuite::test_all(stores)).unwrap();
    });
}
