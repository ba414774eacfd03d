use super::*;
use crate::batch::BatchWriter;
use crate::command::{Command, Condition};
use crate::config::Policy;
use crate::session::SessionWrite;
use crate::version::Version;

fn machine() -> Machine {
    Machine::new(ShardConfig::default(), SessionLimits::default(), 3)
}

fn apply(machine: &mut Machine, index: u64, time_ms: u64, operations: &[Operation<'_>]) -> Vec<Reply> {
    let mut writer = BatchWriter::new();
    for operation in operations {
        writer.push(operation).unwrap();
    }
    let bytes = writer.finish(time_ms);
    let mut replies = Vec::new();
    machine.apply(index, &Batch::parse(&bytes).unwrap(), |ordinal, reply| {
        assert_eq!(ordinal, replies.len(), "replies come in order");
        replies.push(reply);
    });
    assert_eq!(replies.len(), operations.len(), "one reply an operation");
    machine.check();
    replies
}

fn numbered(command: Command<'_>, seq: u64) -> Operation<'_> {
    Operation::Command {
        command,
        session: Some(SessionWrite {
            session: 1,
            seq,
            first_unacked: 1,
        }),
    }
}

#[test]
fn a_retried_incr_counts_once_and_takes_no_position() {
    let mut machine = machine();
    let incr = Command::Incr { key: b"n", delta: 5 };
    let operations = [
        numbered(incr, 1),
        Operation::OpenSession { session: 1 },
        numbered(incr, 1),
        numbered(incr, 1),
        incr.into(),
    ];
    let replies = apply(&mut machine, 7, 1, &operations);
    let first = Reply::Outcome(Outcome::Counter {
        version: Version::new(7, 0),
        value: 5,
    });
    let second = Reply::Outcome(Outcome::Counter {
        version: Version::new(7, 1),
        value: 10,
    });
    assert_eq!(
        replies,
        [Reply::SessionExpired, Reply::SessionOpened, first, first, second]
    );
    assert_eq!(apply(&mut machine, 9, 1, &[numbered(incr, 1)]), [first]);
    let later = 20 * 60 * 1000;
    let replies = apply(
        &mut machine,
        10,
        later,
        &[numbered(incr, 2), Operation::ExpireSession { session: 1 }],
    );
    assert_eq!(replies, [Reply::SessionExpired, Reply::SessionEnded]);
    assert_eq!(machine.shard().peek(b"n").map(|entry| entry.value), Some(&b"10"[..]));
    let replies = apply(&mut machine, 11, later, &[Operation::CloseSession { session: 1 }]);
    assert_eq!(replies, [Reply::SessionExpired]);
}

#[test]
fn evictions_stand_before_the_writes_they_make_room_for() {
    let mut machine = machine();
    let put = |key| Command::Put {
        key,
        value: b"v",
        expires_at_ms: 0,
        condition: Condition::IfAbsent,
    };
    apply(&mut machine, 1, 1, &[put(b"a").into()]);
    let evict = Command::Evict {
        hash: machine.shard().hash(b"a"),
        version: Version::new(1, 0),
    };
    let replies = apply(&mut machine, 2, 1, &[evict.into(), put(b"a").into()]);
    let applied = |position| {
        Reply::Outcome(Outcome::Applied {
            version: Version::new(2, position),
        })
    };
    assert_eq!(replies, [applied(0), applied(1)]);
}

#[test]
fn configuration_and_replica_ids_are_replicated_state() {
    let mut machine = machine();
    let mut configuration = machine.head().configuration;
    configuration.budget_bytes = 1 << 20;
    configuration.max_records = Some(9);
    configuration.sessions.idle_ms = 77;
    let before = machine.state_hash();
    let operations = [
        Operation::Configure(configuration),
        Operation::AllocateReplicaId,
        Operation::AllocateReplicaId,
    ];
    let replies = apply(&mut machine, 1, 5, &operations);
    assert_eq!(replies, [Reply::Configured, Reply::ReplicaId(3), Reply::ReplicaId(4)]);
    assert_ne!(machine.state_hash(), before);
    machine.skip(2);
    let head = machine.head();
    assert_eq!(
        head,
        Head {
            index: 2,
            time_ms: 5,
            next_replica_id: 5,
            configuration
        }
    );
    configuration.policy = Policy::NoEvict;
    assert_eq!(
        apply(&mut machine, 3, 5, &[Operation::Configure(configuration)]),
        [Reply::PolicyFixed]
    );
    assert_eq!(machine.head().configuration, head.configuration);
}

#[test]
fn a_head_survives_its_encoding_and_every_prefix_is_refused() {
    let mut machine = machine();
    apply(&mut machine, 42, 17, &[Operation::AllocateReplicaId]);
    let mut bytes = Vec::new();
    machine.head().encode(&mut bytes);
    assert_eq!(Head::decode(&bytes), Ok(machine.head()));
    for len in 0..bytes.len() {
        assert_eq!(Head::decode(&bytes[..len]), Err(HeadError::Malformed));
    }
    bytes.push(0);
    assert_eq!(Head::decode(&bytes), Err(HeadError::Malformed));
    bytes[0] = 9;
    assert_eq!(Head::decode(&bytes), Err(HeadError::UnsupportedVersion { found: 9 }));
}

#[test]
fn the_state_hash_sees_every_part() {
    let mut a = machine();
    let mut b = machine();
    assert_eq!(a.state_hash(), b.state_hash());
    a.skip(0);
    a.skip(4);
    apply(&mut b, 1, 0, &[]);
    assert_eq!(a.state_hash(), b.state_hash(), "the index is not part of the state");
    apply(&mut a, 5, 0, &[Operation::OpenSession { session: 1 }]);
    assert_ne!(a.state_hash(), b.state_hash());
    apply(&mut a, 6, 0, &[Operation::CloseSession { session: 1 }]);
    assert_eq!(a.state_hash(), b.state_hash());
    apply(&mut a, 7, 0, &[Operation::AllocateReplicaId]);
    assert_ne!(a.state_hash(), b.state_hash());
}
