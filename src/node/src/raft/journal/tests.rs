//! The journal over a disk in memory: order, durability, failure, space.

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;
use openraft::storage::{IOFlushed, RaftLogReader as _, RaftLogStorage as _, RaftLogStorageExt as _};
use openraft_rt::{AsyncRuntime as _, Oneshot as _};

use super::*;
use crate::env::disk::{File as _, Open};
use crate::raft::runtime::{LocalOneshot, Runtime};
use crate::raft::testing::{Bench, MemoryDisk};
use crate::raft::types::{Commands, Entry, LeaderId, LogId, Payload, Vote};

const IDENTITY: Identity = Identity {
    cluster: 7,
    journal: 0,
    node: 1,
    core: 0,
    cores: 1,
    shards: 4,
};

fn config() -> JournalConfig {
    JournalConfig {
        identity: IDENTITY,
        segment_bytes: 256 << 10,
        segments: 4,
        kept_bytes: 4 << 10,
    }
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: 1 }, index)
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    Entry {
        log_id: log_id(term, index),
        payload: Payload::Normal(Commands(Bytes::from(vec![index as u8; bytes]))),
    }
}

/// Appends without waiting; counts when it is durable.
async fn append(store: &mut LogStore<MemoryDisk>, entries: Vec<Entry>, done: &Rc<Cell<u32>>) {
    let (sender, receiver) = LocalOneshot::channel();
    store.append(entries, IOFlushed::signal(sender)).await.unwrap();
    let done = Rc::clone(done);
    drop(Runtime::spawn(async move {
        if let Ok(Ok(())) = receiver.await {
            done.set(done.get() + 1);
        }
    }));
}

async fn indexes(store: &mut LogStore<MemoryDisk>) -> Vec<(u64, u64)> {
    let entries = store.try_get_log_entries(..).await.unwrap();
    entries
        .iter()
        .map(|entry| (entry.log_id.leader_id.term, entry.log_id.index))
        .collect()
}

#[test]
fn one_turn_is_one_sync_and_survives() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut stores: Vec<_> = (0..4).map(|shard| journal.shard(shard, 10)).collect();
        let done = Rc::new(Cell::new(0));
        for store in &mut stores {
            append(store, vec![entry(1, 0, 100)], &done).await;
        }
        Runtime::sleep(std::time::Duration::from_millis(10)).await;
        assert_eq!(done.get(), 4);
        let before = disk.syncs();
        for index in 1..4 {
            for store in &mut stores {
                append(store, vec![entry(1, index, 100)], &done).await;
            }
        }
        Runtime::sleep(std::time::Duration::from_millis(10)).await;
        assert_eq!((done.get(), disk.syncs() - before), (16, 1));
        stores[2].save_vote(&Vote::new(5, 3)).await.unwrap();
        stores[3].truncate_after(Some(log_id(1, 1))).await.unwrap();
        stores[3].blocking_append([entry(2, 2, 50)]).await.unwrap();
        journal.stop();
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        assert_eq!(journal.replicas(), [(0, 10), (1, 10), (2, 10), (3, 10)]);
        let mut store = journal.shard(2, 10);
        assert_eq!(store.read_vote().await.unwrap(), Some(Vote::new(5, 3)));
        assert_eq!(indexes(&mut store).await, [(1, 0), (1, 1), (1, 2), (1, 3)]);
        let mut store = journal.shard(3, 10);
        assert_eq!(indexes(&mut store).await, [(1, 0), (1, 1), (2, 2)]);
        // Another replica of the shard begins with nothing.
        let mut store = journal.shard(3, 11);
        assert_eq!(indexes(&mut store).await, []);
        journal.stop();
    });
}

#[test]
fn a_log_begins_behind_its_snapshot_and_ends_where_it_contradicts_one() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        for shard in 0..4 {
            let mut store = journal.shard(shard, 1);
            store
                .blocking_append((0..6).map(|index| entry(1, index, 100)))
                .await
                .unwrap();
        }
        // Of the same log, behind its end, of another leader's log, and known already.
        journal.begin_behind(0, &log_id(1, 3)).await.unwrap();
        journal.begin_behind(1, &log_id(2, 9)).await.unwrap();
        journal.begin_behind(2, &log_id(2, 3)).await.unwrap();
        journal.shard(3, 1).purge(log_id(1, 4)).await.unwrap();
        journal.begin_behind(3, &log_id(1, 3)).await.unwrap();
        // Of a later leader's log, of which it holds what an older one had put in its place, and what a third put behind that.
        let mut store = journal.shard(4, 1);
        let older = (0..4).map(|index| entry(1, index, 100));
        let entries = older.chain((4..6).map(|index| entry(3, index, 100)));
        store.blocking_append(entries).await.unwrap();
        journal.begin_behind(4, &log_id(2, 3)).await.unwrap();
        let mut store = journal.shard(2, 1);
        assert_eq!(indexes(&mut store).await, []);
        store.blocking_append([entry(2, 4, 100)]).await.unwrap();
        journal.stop();
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let expected = [
            (&[(1, 4), (1, 5)][..], log_id(1, 3), log_id(1, 5)),
            (&[], log_id(2, 9), log_id(2, 9)),
            (&[(2, 4)], log_id(2, 3), log_id(2, 4)),
            (&[(1, 5)], log_id(1, 4), log_id(1, 5)),
            (&[], log_id(2, 3), log_id(2, 3)),
        ];
        for (shard, (entries, purged, last)) in (0..).zip(expected) {
            let mut store = journal.shard(shard, 1);
            assert_eq!(indexes(&mut store).await, entries, "shard {shard}");
            let state = store.get_log_state().await.unwrap();
            assert_eq!(
                (state.last_purged_log_id, state.last_log_id),
                (Some(purged), Some(last)),
                "shard {shard}"
            );
        }
        journal.stop();
    });
}

#[test]
fn a_file_that_a_crash_left_short_is_used_at_its_full_length() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    let lens = async || {
        let mut lens = Vec::new();
        for name in disk.list("journal").await.unwrap() {
            if name.starts_with("segment-") {
                let file = disk.open(&format!("journal/{name}"), Open::Read).await.unwrap();
                lens.push(file.len().await.unwrap());
            }
        }
        lens
    };
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        journal.shard(0, 1).save_vote(&Vote::new(1, 1)).await.unwrap();
        journal.stop();
        // The power goes between a name and its space.
        drop(disk.open("journal/segment-00000077", Open::CreateNew).await.unwrap());
        assert!(lens().await.contains(&0));
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let lens = lens().await;
        assert!(lens.iter().all(|len| *len == config().segment_bytes), "{lens:?}");
        journal.stop();
    });
}

#[test]
fn entries_that_are_not_kept_are_read_from_their_frames() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        for index in 0..100 {
            store.blocking_append([entry(1, index, 1000)]).await.unwrap();
        }
        store.truncate_after(Some(log_id(1, 49))).await.unwrap();
        for index in 50..60 {
            store.blocking_append([entry(2, index, 1000)]).await.unwrap();
        }
        let expected: Vec<_> = (0..60).map(|index| (1 + u64::from(index >= 50), index)).collect();
        assert_eq!(indexes(&mut store).await, expected);
        let some = store.try_get_log_entries(48..=51).await.unwrap();
        assert_eq!(
            some,
            [
                entry(1, 48, 1000),
                entry(1, 49, 1000),
                entry(2, 50, 1000),
                entry(2, 51, 1000)
            ]
        );
        journal.stop();
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        let expected: Vec<_> = (0..60).map(|index| (1 + u64::from(index >= 50), index)).collect();
        assert_eq!(indexes(&mut store).await, expected);
        journal.stop();
    });
}

#[test]
fn nothing_is_acknowledged_after_a_failure() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        store.blocking_append([entry(1, 0, 10)]).await.unwrap();
        disk.fail();
        let done = Rc::new(Cell::new(0));
        append(&mut store, vec![entry(1, 1, 10)], &done).await;
        Runtime::sleep(std::time::Duration::from_secs(1)).await;
        assert_eq!(done.get(), 0);
        assert!(journal.failure().is_some());
        let vote = store.save_vote(&Vote::new(2, 1)).await;
        assert!(vote.unwrap_err().to_string().contains("injected"));
        assert!(store.append([entry(1, 2, 10)], IOFlushed::noop()).await.is_err());
    });
}

/// Writes far more than the journal may hold, taking a "snapshot" (a purge) whenever it asks for one.
#[test]
fn a_journal_stays_within_its_files() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut stores: Vec<_> = (0..3).map(|shard| journal.shard(shard, 1)).collect();
        let mut purges = 0;
        for index in 0..600 {
            // The last shard writes once and then holds everything back.
            for store in &mut stores[..if index == 0 { 3 } else { 2 }] {
                let appended = store.blocking_append([entry(1, index, 4000)]);
                let appended = Runtime::timeout(std::time::Duration::from_mins(1), appended).await;
                appended.expect("the journal is stuck").unwrap();
            }
            while let Some(forced) = journal.forced_snapshot(|_| false) {
                let store = &mut stores[forced.shard as usize];
                store.purge(log_id(1, forced.up_to)).await.unwrap();
                store.save_vote(&Vote::new(1, 1)).await.unwrap();
                purges += 1;
            }
        }
        assert!(purges > 3, "{purges}");
        let segments = disk.paths().iter().filter(|path| path.contains("segment")).count();
        assert_eq!(segments, 4);
        journal.stop();
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        assert_eq!(store.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 599)));
        journal.stop();
    });
}

/// Without a snapshot the journal waits, refuses proposals in time, and goes on when one has come.
#[test]
fn a_full_journal_waits_and_does_not_fail() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        let done = Rc::new(Cell::new(0));
        let mut low = None;
        for index in 0..300 {
            append(&mut store, vec![entry(1, index, 4000)], &done).await;
            Runtime::sleep(std::time::Duration::from_millis(2)).await;
            if journal.space() == Space::Low {
                low.get_or_insert(index);
            }
        }
        let (low, written) = (low.expect("proposals are refused"), u64::from(done.get()));
        assert!(low < written && written < 300, "{low} {written}");
        // A vote still goes through.
        store.save_vote(&Vote::new(3, 1)).await.unwrap();
        store.purge(log_id(1, low)).await.unwrap();
        Runtime::sleep(std::time::Duration::from_secs(10)).await;
        assert!(u64::from(done.get()) > written);
        assert!(journal.failure().is_none());
        journal.stop();
    });
}

#[test]
fn a_foreign_directory_is_refused_and_a_flipped_bit_is_named() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        for index in 0..5 {
            store.blocking_append([entry(1, index, 10)]).await.unwrap();
        }
        journal.stop();
        let mut other = config();
        other.identity.node = 2;
        let refused = Journal::open(bench.ambient(), disk.clone(), other).await.unwrap_err();
        assert!(
            matches!(refused, OpenError::Identity(IdentityError::Foreign { .. })),
            "{refused}"
        );
        let path = disk.paths().into_iter().find(|path| path.contains("segment")).unwrap();
        // The second frame behind the checkpoint.
        disk.file(&path).borrow_mut()[3 * 4096 + 80] ^= 1;
        let refused = Journal::open(bench.ambient(), disk.clone(), config())
            .await
            .unwrap_err();
        match refused {
            OpenError::Corrupt { file, error } => {
                assert_eq!(file, path);
                assert!(error.to_string().contains("offset 12288"), "{error}");
            }
            other => panic!("{other}"),
        }
    });
}

/// Others may commit an entry before it is durable here: a mark must not become durable before what it marks.
#[test]
fn what_is_marked_as_committed_is_there_after_a_crash() {
    let mut marked = 0;
    for micros in (100..4_000).step_by(100) {
        let bench = Bench::new();
        let disk = MemoryDisk::on(&bench);
        bench.run(async {
            let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
            let mut store = journal.shard(0, 1);
            let done = Rc::new(Cell::new(0));
            for index in 0..60 {
                append(&mut store, vec![entry(1, index, 4000)], &done).await;
                store.save_committed(Some(log_id(1, index))).await.unwrap();
            }
            Runtime::sleep(std::time::Duration::from_micros(micros)).await;
        });
        bench.run(async {
            let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
            let mut store = journal.shard(0, 1);
            let last = store.get_log_state().await.unwrap().last_log_id;
            let committed = store.read_committed().await.unwrap();
            assert!(committed <= last, "{committed:?} {last:?}");
            marked += u32::from(committed.is_some());
            journal.stop();
        });
    }
    assert!(marked > 0);
}

#[test]
fn memory_acknowledges_at_once() {
    let bench = Bench::new();
    bench.run(async {
        let journal: Journal<MemoryDisk> = Journal::memory(bench.ambient(), config());
        let mut store = journal.shard(0, 1);
        for index in 0..100 {
            store.blocking_append([entry(1, index, 1000)]).await.unwrap();
        }
        assert_eq!(indexes(&mut store).await.len(), 100);
        store.purge(log_id(1, 49)).await.unwrap();
        assert_eq!(indexes(&mut store).await.len(), 50);
    });
}

mod conformance {
    //! openraft's own suite for stores, over the journal and the state machine.

    use std::rc::Rc;

    use openraft::StorageError;
    use openraft::testing::log::{StoreBuilder, Suite};

    use super::*;
    use crate::raft::machine::{MachineConfig, StateMachine};
    use crate::raft::runtime::{current, with_driver};
    use crate::raft::types::Types;

    struct Builder {
        memory: bool,
    }

    impl StoreBuilder<Types, LogStore<MemoryDisk>, StateMachine<MemoryDisk>> for Builder {
        async fn build(&self) -> Result<((), LogStore<MemoryDisk>, StateMachine<MemoryDisk>), StorageError<Types>> {
            let ambient = current();
            let disk = MemoryDisk::default();
            let journal = if self.memory {
                Journal::memory(Rc::clone(&ambient), config())
            } else {
                Journal::open(Rc::clone(&ambient), disk.clone(), config())
                    .await
                    .unwrap()
            };
            let config = MachineConfig {
                cluster: 7,
                shard: 0,
                epoch: 1,
                shard_config: generation_engine::ShardConfig::default(),
                sessions: generation_engine::session::SessionLimits::default(),
                next_replica_id: 4,
            };
            let machine = StateMachine::open(ambient, disk, config).await.unwrap();
            Ok(((), journal.shard(0, 1), machine))
        }
    }

    #[test]
    fn the_suite_passes_over_a_disk() {
        let bench = Bench::new();
        let suite = Suite::test_all(Builder { memory: false });
        with_driver(Rc::new(bench.clone()), || bench.run(suite)).unwrap();
    }

    #[test]
    fn the_suite_passes_in_memory() {
        let bench = Bench::new();
        let suite = Suite::test_all(Builder { memory: true });
        with_driver(Rc::new(bench.clone()), || bench.run(suite)).unwrap();
    }
}

#[test]
fn the_first_promise_in_a_term_is_the_one_that_counts_and_none_does_after_a_restart() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        assert!(!store.promised_first(Vote::new(1, 2)));
        store.save_vote(&Vote::new(1, 2)).await.unwrap();
        store.save_vote(&Vote::new(1, 3)).await.unwrap();
        assert!(store.promised_first(Vote::new(1, 2)) && !store.promised_first(Vote::new(1, 3)));
        store.save_vote(&Vote::new(2, 3)).await.unwrap();
        assert!(store.promised_first(Vote::new(2, 3)) && !store.promised_first(Vote::new(1, 2)));
        journal.stop();
    });
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), config()).await.unwrap();
        let mut store = journal.shard(0, 1);
        assert_eq!(store.vote(), Some(Vote::new(2, 3)));
        assert!(!store.promised_first(Vote::new(2, 3)));
        store.save_vote(&Vote::new(3, 2)).await.unwrap();
        assert!(store.promised_first(Vote::new(3, 2)));
        journal.stop();
    });
}
