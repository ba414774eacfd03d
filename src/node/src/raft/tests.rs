//! One replica alone: proposals, room, expiry, snapshots, restarts.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_engine::batch::{Operation, PushError};
use generation_engine::machine::Reply;
use generation_engine::session::{SessionLimits, SessionWrite};
use generation_engine::{Command, Condition, Outcome as EngineOutcome, Policy, ShardConfig, Version};
use openraft_rt::AsyncRuntime as _;

use super::journal::{Identity, Journal, JournalConfig};
use super::machine::MachineConfig;
use super::network::{CallError, Transport};
use super::proposer::{Answer, PIPELINE, Proposer, Write};
use super::replica::{
    Beginning, Ended, Outcome, ReadError, Replica, ReplicaConfig, ReplicaError, SnapshotError, Timing,
};
use super::runtime::{Runtime, yield_now};
use super::snapshot::Outgoing;
use super::testing::{Bench, MemoryDisk};
use super::types::Place;

/// Nobody else is there.
#[derive(Clone)]
struct Nobody;

impl Transport for Nobody {
    async fn call(&self, node: u64, _: u16, _: u8, _: Bytes, _: Instant) -> Result<Bytes, CallError> {
        Err(CallError::Unreachable(node))
    }

    fn tell(&self, _: u64, _: u16, _: u8, _: Bytes) {}

    fn is_alive(&self, _: u64) -> bool {
        false
    }
}

type Alone = Replica<MemoryDisk, Nobody>;

const JOURNAL: JournalConfig = JournalConfig {
    identity: Identity {
        cluster: 1,
        journal: 0,
        node: 1,
        core: 0,
        cores: 1,
        shards: 1,
    },
    segment_bytes: 256 << 10,
    segments: 4,
    kept_bytes: 64 << 10,
};

fn replica_config(members: &[u64]) -> ReplicaConfig {
    ReplicaConfig {
        id: 1,
        machine: MachineConfig {
            cluster: 1,
            shard: 0,
            epoch: 1,
            shard_config: ShardConfig {
                budget_bytes: 1 << 20,
                max_records: Some(3),
                policy: Policy::Lru,
                ..ShardConfig::default()
            },
            sessions: SessionLimits::default(),
            next_replica_id: 2,
        },
        members: members.iter().map(|&id| (id, Place { node: id })).collect(),
        beginning: Beginning::Form,
        timing: Timing::default(),
    }
}

async fn start(bench: &Bench, disk: &MemoryDisk, members: &[u64]) -> (Journal<MemoryDisk>, Alone) {
    let journal = Journal::open(bench.ambient(), disk.clone(), JOURNAL).await.unwrap();
    let config = replica_config(members);
    let replica = Replica::start(bench.ambient(), &journal, disk.clone(), Nobody, config)
        .await
        .unwrap();
    (journal, replica)
}

async fn leads(replica: &Alone) {
    while replica.alone().is_none() {
        Runtime::sleep(Duration::from_millis(10)).await;
    }
}

fn put<'a>(key: &'a [u8], value: &'a [u8], expires_at_ms: u64) -> Command<'a> {
    Command::Put {
        key,
        value,
        expires_at_ms,
        condition: Condition::None,
    }
}

/// Proposes commands as one entry and waits for the answers, by position.
async fn propose(
    bench: &Bench,
    proposer: &mut Proposer<usize>,
    replica: &Alone,
    now_ms: u64,
    commands: &[Command<'_>],
) -> Vec<Answer> {
    let woken = Rc::new(Cell::new(false));
    let wake: Rc<dyn Fn()> = {
        let woken = Rc::clone(&woken);
        Rc::new(move || woken.set(true))
    };
    let writes = commands.iter().enumerate().map(|(token, command)| Write {
        token,
        operation: (*command).into(),
    });
    let mut writes: Vec<_> = writes.collect();
    let now = super::runtime::Ambient::now(bench);
    proposer.propose(replica, now, now_ms, &mut writes, &wake);
    let mut answers = BTreeMap::new();
    while answers.len() < commands.len() {
        Runtime::sleep(Duration::from_millis(1)).await;
        let now = super::runtime::Ambient::now(bench);
        proposer.drain(replica, now, now_ms, &wake, |token, answer| {
            assert!(answers.insert(token, answer).is_none());
        });
    }
    assert!(woken.get() || answers.values().all(|answer| *answer == Answer::InDoubt));
    answers.into_values().collect()
}

/// Proposes a write for each token, in a turn of its own, while nothing else happens.
fn propose_one_by_one(
    bench: &Bench,
    proposer: &mut Proposer<usize>,
    replica: &Alone,
    tokens: impl Iterator<Item = usize>,
    wake: &Rc<dyn Fn()>,
) {
    let now = super::runtime::Ambient::now(bench);
    for token in tokens {
        let operation = put(b"a", b"1", 0).into();
        proposer.propose(replica, now, 1_000, &mut vec![Write { token, operation }], wake);
    }
}

fn applied(answer: Answer) -> (u64, Version) {
    match answer {
        Answer::Applied {
            index,
            reply: Reply::Outcome(EngineOutcome::Applied { version }),
        } => (index, version),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_turn_is_an_entry_with_its_victims_in_front() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let commands = [put(b"a", b"1", 0), put(b"b", b"1", 0), put(b"c", b"1", 0)];
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &commands).await;
        let (index, first) = applied(answers[0]);
        assert_eq!(first, Version::new(index, 0));
        assert_eq!(applied(answers[2]), (index, Version::new(index, 2)));
        // Overwriting takes no room, and what is new takes the coldest's.
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"2", 0)]).await;
        assert_eq!(applied(answers[0]).1, Version::new(index + 1, 0));
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &[put(b"d", b"1", 0)]).await;
        assert_eq!(applied(answers[0]).1, Version::new(index + 2, 1));
        let gone = replica.machine().with(|machine| machine.shard().peek(b"b").is_none());
        assert!(gone);
        assert_eq!(proposer.in_flight(), 0);
        journal.stop();
    });
}

#[test]
fn what_comes_while_entries_are_on_their_way_gathers_in_one() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let wake: Rc<dyn Fn()> = Rc::new(|| ());
        let turns = PIPELINE + 10;
        propose_one_by_one(&bench, &mut proposer, &replica, 0..turns, &wake);
        let mut indexes = BTreeMap::new();
        while indexes.len() < turns {
            Runtime::sleep(Duration::from_millis(1)).await;
            let now = super::runtime::Ambient::now(&bench);
            proposer.drain(&replica, now, 1_000, &wake, |token, answer| {
                indexes.insert(token, applied(answer).0);
            });
        }
        let first = indexes[&0];
        for (token, index) in indexes {
            assert_eq!(index, first + token.min(PIPELINE) as u64);
        }
        assert_eq!(proposer.in_flight(), 0);
        journal.stop();
    });
}

#[test]
fn an_entry_waits_for_those_just_answered_and_not_for_long() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let wake: Rc<dyn Fn()> = Rc::new(|| ());
        let now = || super::runtime::Ambient::now(&bench);
        let indexes = RefCell::new(BTreeMap::new());
        let drain = |proposer: &mut Proposer<usize>| {
            proposer.drain(&replica, now(), 1_000, &wake, |token, answer| {
                indexes.borrow_mut().insert(token, applied(answer).0);
            });
        };
        // One leaves at once; three gather meanwhile, and wait for the one that was answered.
        propose_one_by_one(&bench, &mut proposer, &replica, 0..4, &wake);
        while indexes.borrow().is_empty() {
            Runtime::sleep(Duration::from_millis(2)).await;
            drain(&mut proposer);
        }
        let until = proposer.next_deadline().unwrap();
        assert!(until > now() && until <= now() + Duration::from_millis(3));
        propose_one_by_one(&bench, &mut proposer, &replica, 4..5, &wake);
        while indexes.borrow().len() < 5 {
            Runtime::sleep(Duration::from_millis(2)).await;
            drain(&mut proposer);
        }
        let first = indexes.borrow()[&0];
        assert!((1..5).all(|token| indexes.borrow()[&token] == first + 1));
        // Four are expected again, and one comes.
        propose_one_by_one(&bench, &mut proposer, &replica, 5..6, &wake);
        let until = proposer.next_deadline().unwrap();
        Runtime::sleep_until(until.into()).await;
        drain(&mut proposer);
        while indexes.borrow().len() < 6 {
            Runtime::sleep(Duration::from_millis(2)).await;
            drain(&mut proposer);
        }
        assert_eq!(indexes.borrow()[&5], first + 2);
        // Nobody else is expected now.
        let before = replica.last_index();
        propose_one_by_one(&bench, &mut proposer, &replica, 6..7, &wake);
        while replica.last_index() == before {
            yield_now().await;
        }
        journal.stop();
    });
}

#[test]
fn what_gathers_when_leadership_is_lost_was_not_proposed() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let wake: Rc<dyn Fn()> = Rc::new(|| ());
        let now = super::runtime::Ambient::now(&bench);
        journal.stop();
        propose_one_by_one(&bench, &mut proposer, &replica, 0..=PIPELINE, &wake);
        let later = now + Duration::from_secs(2);
        let mut answers = BTreeMap::new();
        proposer.drain(&replica, later, 1_000, &wake, |token, answer| {
            answers.insert(token, answer);
        });
        for (token, answer) in answers {
            let was_sent = token < PIPELINE;
            assert_eq!(answer == Answer::InDoubt, was_sent, "{token}: {answer:?}");
            assert_eq!(
                matches!(answer, Answer::NotProposed(_)),
                !was_sent,
                "{token}: {answer:?}"
            );
        }
        assert_eq!(proposer.in_flight(), 0);
    });
}

#[test]
fn entries_and_sessions_whose_time_has_come_are_swept() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer: Proposer<usize> = Proposer::new(Duration::from_secs(1));
        let wake: Rc<dyn Fn()> = Rc::new(|| ());
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"k", b"v", 5_000)]).await;
        for (now_ms, left) in [(4_999, 1), (5_000, 0)] {
            let now = super::runtime::Ambient::now(&bench);
            proposer.sweep(&replica, now, now_ms, 1000, &wake);
            Runtime::sleep(Duration::from_millis(10)).await;
            proposer.drain(&replica, now, now_ms, &wake, |_, _| ());
            let records = replica.machine().with(|machine| machine.shard().stats().records);
            assert_eq!(records, left);
        }
        let session = SessionWrite {
            session: 9,
            seq: 1,
            first_unacked: 1,
        };
        let mut writes = vec![Write {
            token: 0,
            operation: Operation::Command {
                command: put(b"k", b"v", 0),
                session: Some(session),
            },
        }];
        let now = super::runtime::Ambient::now(&bench);
        proposer.propose(&replica, now, 5_000, &mut writes, &wake);
        Runtime::sleep(Duration::from_millis(10)).await;
        let mut answer = None;
        proposer.drain(&replica, now, 5_000, &wake, |_, given| answer = Some(given));
        // A session nobody has opened executes nothing.
        assert!(
            matches!(
                answer,
                Some(Answer::Applied {
                    reply: Reply::SessionExpired,
                    ..
                })
            ),
            "{answer:?}"
        );
        journal.stop();
    });
}

#[test]
fn what_no_quorum_takes_is_in_doubt_and_never_hangs() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1, 2, 3]).await;
        Runtime::sleep(Duration::from_secs(2)).await;
        assert!(replica.alone().is_none() && !replica.leads());
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        // Nobody leads, so nothing was appended.
        assert_eq!(answers, [Answer::NotProposed(None)]);
        assert!(replica.linearize().await.is_err());
        journal.stop();
    });
}

#[test]
fn a_restart_goes_on_from_snapshot_and_journal() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    let mut before = None;
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        replica.snapshot().await;
        while replica.machine().snapshot_index().is_none() {
            Runtime::sleep(Duration::from_millis(5)).await;
        }
        propose(&bench, &mut proposer, &replica, 2_000, &[put(b"b", b"2", 0)]).await;
        // The commit mark goes with the next frame.
        propose(&bench, &mut proposer, &replica, 2_000, &[put(b"c", b"3", 0)]).await;
        Runtime::sleep(Duration::from_secs(1)).await;
        before = Some(replica.status());
        journal.stop();
    });
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let values = replica.machine().with(|machine| {
            let shard = machine.shard();
            [b"a", b"b", b"c"].map(|key| shard.peek(key).map(|entry| entry.value.to_vec()))
        });
        assert_eq!(values, [Some(b"1".to_vec()), Some(b"2".to_vec()), Some(b"3".to_vec())]);
        // It leads in a new term, never in the old one.
        assert!(replica.status().term > before.unwrap().term);
        journal.stop();
    });
    let snapshots = disk.paths().iter().filter(|path| path.contains("snapshots/")).count();
    assert_eq!(snapshots, 1);
}

#[test]
fn a_flipped_bit_in_a_snapshot_is_refused() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        replica.snapshot().await;
        while replica.machine().snapshot_index().is_none() {
            Runtime::sleep(Duration::from_millis(5)).await;
        }
        journal.stop();
        replica.stop().await;
    });
    let path = disk
        .paths()
        .into_iter()
        .find(|path| path.contains("snapshots/"))
        .unwrap();
    disk.file(&path).borrow_mut()[4096 + 60] ^= 1;
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), JOURNAL).await.unwrap();
        let config = replica_config(&[1]);
        let started = Replica::start(bench.ambient(), &journal, disk.clone(), Nobody, config).await;
        let error = started.unwrap_err().to_string();
        assert!(error.contains("checksum"), "{error}");
        journal.stop();
    });
}

fn snapshots(disk: &MemoryDisk) -> Vec<String> {
    let mut paths = disk.paths();
    paths.retain(|path| path.contains("snapshots/"));
    paths
}

#[test]
fn whoever_asks_for_a_snapshot_shares_the_one_that_is_taken() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        let index = replica.last_index();
        let asked = futures_util::future::join_all((0..3).map(|_| replica.take_snapshot()));
        assert_eq!(asked.await, [Ok(index), Ok(index), Ok(index)]);
        let first = snapshots(&disk);
        assert_eq!(first.len(), 1);
        assert!(first[0].ends_with(".snapshot"), "it is complete: {first:?}");
        // Nothing has changed, so it is as good as another.
        assert_eq!(replica.take_snapshot().await, Ok(index));
        assert_eq!(snapshots(&disk), first);
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"2", 0)]).await;
        assert_eq!(replica.take_snapshot().await, Ok(index + 1));
        assert_ne!(snapshots(&disk), first);
        replica.stop().await;
        assert_eq!(replica.take_snapshot().await, Ok(index + 1), "it is there all the same");
        journal.stop();
    });
}

#[test]
fn whoever_asks_for_a_snapshot_learns_that_it_cannot_be_written() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        disk.fail_at(Some("snapshots/"));
        let refused = replica.take_snapshot().await;
        assert!(matches!(refused, Err(SnapshotError::NotWritten(_))), "{refused:?}");
        disk.fail_at(None);
        assert_eq!(replica.take_snapshot().await, Ok(replica.last_index()));
        let mut proposer = Proposer::new(Duration::from_secs(1));
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        replica.stop().await;
        assert_eq!(replica.take_snapshot().await, Err(SnapshotError::Stopped));
        journal.stop();
    });
}

/// For openraft, an entry that cannot be written is the end of the replica.
#[test]
fn what_the_journal_would_not_take_is_refused_and_the_rest_is_written() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let (most, too_much) = (vec![7; replica.entry_bytes() - 1_000], vec![7; replica.entry_bytes()]);
        // Each of the largest takes an entry of its own.
        let commands = [
            put(b"a", &most, 0),
            put(b"b", &too_much, 0),
            put(b"c", &most, 0),
            put(b"d", b"1", 0),
        ];
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &commands).await;
        let refused = Answer::Refused(PushError::EntryLength {
            len: too_much.len() + 1 + 66,
            limit: replica.entry_bytes(),
        });
        assert_eq!(answers[1], refused);
        let (first, second) = (applied(answers[0]).0, applied(answers[2]).0);
        assert_eq!((second, applied(answers[3]).0), (first + 1, first + 1));
        assert!(replica.leads() && !replica.has_ended());
        journal.stop();
    });
}

/// The state is what it was, so another snapshot of it is as good.
#[test]
fn a_snapshot_that_was_found_damaged_is_not_sent_and_taken_again() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        let mut proposer = Proposer::new(Duration::from_secs(1));
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        for round in 0..3 {
            let index = replica.take_snapshot().await.unwrap();
            let path = snapshots(&disk).pop().unwrap();
            let current = replica.raft().get_snapshot().await.unwrap().unwrap().snapshot;
            let whole = Outgoing::open(&current)
                .await
                .unwrap()
                .read(0, usize::MAX)
                .await
                .unwrap();
            assert_eq!(whole, disk.file(&path).borrow()[..], "what is sound is sent as it is");
            // Read from the middle on, it is checked from the beginning.
            let mut outgoing = Outgoing::open(&current).await.unwrap();
            let rest = outgoing.read(8_192, usize::MAX).await.unwrap();
            assert_eq!(rest, whole[8_192..]);
            assert_eq!(outgoing.read(4_096, 1).await.unwrap(), whole[4_096..8_192]);
            assert!(current.is_sound() && !replica.machine().needs_snapshot());
            match round {
                0 => disk.file(&path).borrow_mut()[4_096 + 60] ^= 1,
                1 => disk.file(&path).borrow_mut().truncate(whole.len() - 4_096),
                _ => disk.lose(&path),
            }
            let read = async { Outgoing::open(&current).await?.read(8_192, usize::MAX).await };
            read.await.unwrap_err();
            assert!(replica.machine().needs_snapshot());
            assert_eq!(replica.take_snapshot().await, Ok(index), "nothing has changed");
            assert!(!replica.machine().needs_snapshot());
            assert_eq!(replica.machine().damaged_snapshots(), round + 1);
            let another = snapshots(&disk);
            assert_eq!(another.len(), 1, "{another:?}");
            assert_ne!(another[0], path);
        }
        // One whose place a newer one has taken is gone, and not damaged.
        let old = replica.raft().get_snapshot().await.unwrap().unwrap().snapshot;
        propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"2", 0)]).await;
        replica.take_snapshot().await.unwrap();
        assert!(Outgoing::open(&old).await.is_err());
        assert_eq!(replica.machine().damaged_snapshots(), 3);
        assert!(!replica.machine().needs_snapshot());
        journal.stop();
    });
}

#[test]
fn a_replica_whose_storage_has_failed_leads_no_more_and_says_why() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let (journal, replica) = start(&bench, &disk, &[1]).await;
        leads(&replica).await;
        assert_eq!((replica.has_ended(), replica.ended()), (false, None));
        let outcome = Rc::new(RefCell::new(None));
        let seen = Rc::clone(&outcome);
        // Past the proposer, which would refuse it.
        let huge = vec![0; JOURNAL.segment_bytes as usize];
        replica.propose(huge.into(), move |outcome| drop(seen.replace(Some(outcome))));
        while outcome.borrow().is_none() || !replica.has_ended() {
            Runtime::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(*outcome.borrow(), Some(Outcome::InDoubt));
        let ended = replica.ended();
        assert!(
            matches!(&ended, Some(Ended::Storage(what)) if what.contains("does not fit")),
            "{ended:?}"
        );
        assert!(!replica.leads() && replica.leader().is_none() && replica.alone().is_none());
        assert_eq!(replica.heir(|_| true), None);
        assert_eq!(replica.linearize().await, Err(ReadError::NotLeader(None)));
        // Nothing reaches it any more.
        let mut proposer = Proposer::new(Duration::from_secs(1));
        let answers = propose(&bench, &mut proposer, &replica, 1_000, &[put(b"a", b"1", 0)]).await;
        assert_eq!(answers, [Answer::NotProposed(None)]);
        journal.stop();
    });
}

/// Its vote is lost with its journal: under the same id it could vote twice in a term.
#[test]
fn a_replica_that_lost_its_journal_does_not_start() {
    let bench = Bench::new();
    let disk = MemoryDisk::on(&bench);
    bench.run(async {
        let journal = Journal::open(bench.ambient(), disk.clone(), JOURNAL).await.unwrap();
        let config = ReplicaConfig {
            beginning: Beginning::Resume,
            ..replica_config(&[1])
        };
        let started = Replica::start(bench.ambient(), &journal, disk.clone(), Nobody, config).await;
        assert!(
            matches!(started, Err(ReplicaError::Lost { shard: 0, id: 1 })),
            "{started:?}"
        );
        journal.stop();
    });
}
