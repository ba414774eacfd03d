use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::version::Version;

/// An operation that owns its bytes.
#[derive(Debug, Clone)]
enum Owned {
    Put(Vec<u8>, Vec<u8>, u64, Condition, Option<SessionWrite>),
    Delete(Vec<u8>, Condition, Option<SessionWrite>),
    Incr(Vec<u8>, i64, Option<SessionWrite>),
    Touch(Vec<u8>, u64, Option<SessionWrite>),
    Other(Operation<'static>),
}

impl Owned {
    fn borrow(&self) -> Operation<'_> {
        let (command, session) = match self {
            Owned::Put(key, value, expires_at_ms, condition, session) => {
                let (expires_at_ms, condition) = (*expires_at_ms, *condition);
                (
                    Command::Put {
                        key,
                        value,
                        expires_at_ms,
                        condition,
                    },
                    *session,
                )
            }
            Owned::Delete(key, condition, session) => (
                Command::Delete {
                    key,
                    condition: *condition,
                },
                *session,
            ),
            Owned::Incr(key, delta, session) => (Command::Incr { key, delta: *delta }, *session),
            Owned::Touch(key, expires_at_ms, session) => (
                Command::Touch {
                    key,
                    expires_at_ms: *expires_at_ms,
                },
                *session,
            ),
            Owned::Other(operation) => return *operation,
        };
        Operation::Command { command, session }
    }
}

fn condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        Just(Condition::None),
        Just(Condition::IfAbsent),
        any::<u64>().prop_map(|version| Condition::IfVersion(Version::from(version))),
    ]
}

fn session() -> impl Strategy<Value = Option<SessionWrite>> {
    let write =
        (any::<u128>(), 1u64.., 0u64..SESSION_WINDOW).prop_map(|(session, first_unacked, distance)| SessionWrite {
            session,
            seq: first_unacked.saturating_add(distance),
            first_unacked,
        });
    proptest::option::of(write)
}

fn configuration() -> impl Strategy<Value = Configuration> {
    let policy = prop_oneof![Just(Policy::Lru), Just(Policy::S3Fifo), Just(Policy::NoEvict)];
    let fields = (
        policy,
        any::<u64>(),
        any::<Option<u64>>(),
        any::<u64>(),
        any::<u32>(),
        any::<u64>(),
    );
    fields.prop_map(
        |(policy, budget_bytes, max_records, idle_ms, max_sessions, max_bytes)| Configuration {
            policy,
            budget_bytes,
            max_records,
            sessions: SessionLimits {
                idle_ms,
                max_sessions,
                max_bytes,
            },
        },
    )
}

fn operation() -> impl Strategy<Value = Owned> {
    let key = || vec(any::<u8>(), 1..40);
    let victim = || (any::<u64>(), any::<u64>().prop_map(Version::from));
    prop_oneof![
        4 => (key(), vec(any::<u8>(), 0..200), any::<u64>(), condition(), session())
            .prop_map(|(k, v, e, c, s)| Owned::Put(k, v, if e % 2 == 0 { 0 } else { e }, c, s)),
        2 => (key(), condition(), session()).prop_map(|(k, c, s)| Owned::Delete(k, c, s)),
        2 => (key(), any::<i64>(), session()).prop_map(|(k, d, s)| Owned::Incr(k, d, s)),
        2 => (key(), any::<u64>(), session()).prop_map(|(k, e, s)| Owned::Touch(k, e, s)),
        1 => victim().prop_map(|(hash, version)| Owned::Other(Command::Evict { hash, version }.into())),
        1 => victim().prop_map(|(hash, version)| Owned::Other(Command::Expire { hash, version }.into())),
        1 => any::<u128>().prop_map(|session| Owned::Other(Operation::OpenSession { session })),
        1 => any::<u128>().prop_map(|session| Owned::Other(Operation::ExpireSession { session })),
        1 => any::<u128>().prop_map(|session| Owned::Other(Operation::CloseSession { session })),
        1 => configuration().prop_map(|configuration| Owned::Other(Operation::Configure(configuration))),
        1 => Just(Owned::Other(Operation::AllocateReplicaId)),
    ]
}

fn encode(operations: &[Owned], time_ms: u64) -> Vec<u8> {
    let mut writer = BatchWriter::new();
    for (ordinal, operation) in operations.iter().enumerate() {
        assert_eq!(writer.push(&operation.borrow()), Ok(ordinal as u32));
    }
    let len = writer.len_bytes();
    let bytes = writer.finish(time_ms);
    assert_eq!(bytes.len(), len);
    bytes
}

/// Parses, and if that succeeds, writes again what was read.
fn rewrite(bytes: &[u8]) -> Result<Vec<u8>, BatchError> {
    let batch = Batch::parse(bytes)?;
    let mut writer = BatchWriter::new();
    for operation in batch.operations() {
        writer.push(&operation).expect("what was parsed can be written");
    }
    Ok(writer.finish(batch.time_ms()))
}

proptest! {
    #[test]
    fn what_is_written_is_read(operations in vec(operation(), 0..60), time_ms: u64) {
        let bytes = encode(&operations, time_ms);
        let batch = Batch::parse(&bytes).expect("just written");
        prop_assert_eq!(batch.time_ms(), time_ms);
        prop_assert_eq!(batch.len(), operations.len());
        prop_assert_eq!(batch.operations().len(), operations.len());
        for (read, written) in batch.operations().zip(&operations) {
            prop_assert_eq!(read, written.borrow());
        }
    }

    /// Every strict prefix is an error: no operation can be lost without notice.
    #[test]
    fn a_prefix_is_an_error(operations in vec(operation(), 0..6), time_ms: u64) {
        let bytes = encode(&operations, time_ms);
        for len in 0..bytes.len() {
            prop_assert!(Batch::parse(&bytes[..len]).is_err(), "a prefix of {} bytes parses", len);
        }
    }

    /// Bytes changed at random never panic, and each meaning has one encoding: what parses is written back the same.
    #[test]
    fn damaged_bytes_are_refused_or_canonical(
        operations in vec(operation(), 1..6),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode(&operations, 7);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(again) = rewrite(&bytes) {
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn noise_never_panics(mut bytes in vec(any::<u8>(), 0..200)) {
        let _ = Batch::parse(&bytes);
        if let Some(head) = bytes.first_chunk_mut::<8>() {
            *head = [BATCH_VERSION, 0, 0, 0, 3, 0, 0, 0];
        }
        if let Ok(again) = rewrite(&bytes) {
            prop_assert_eq!(again, bytes);
        }
    }
}

/// Logs outlive releases: these bytes must be readable for ever.
#[test]
fn format_version_1_is_frozen() {
    let mut writer = BatchWriter::new();
    let session = SessionWrite {
        session: 0x0102,
        seq: 9,
        first_unacked: 6,
    };
    let put = Command::Put {
        key: b"k",
        value: b"vw",
        expires_at_ms: 5,
        condition: Condition::IfVersion(Version::from(3)),
    };
    writer
        .push(&Operation::Command {
            command: put,
            session: Some(session),
        })
        .unwrap();
    writer.push(&Command::Incr { key: b"n", delta: -2 }.into()).unwrap();
    writer
        .push(
            &Command::Evict {
                hash: 0xaa,
                version: Version::from(0xbb),
            }
            .into(),
        )
        .unwrap();
    let expected: &[&[u8]] = &[
        &[1, 0, 0, 0, 3, 0, 0, 0, 0x10, 0x27, 0, 0, 0, 0, 0, 0],
        &[1, 0b1101],
        &[
            2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 3, 0,
        ],
        &[
            1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, b'k', b'v', b'w',
        ],
        &[3, 0, 1, 0, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, b'n'],
        &[16, 0, 0xaa, 0, 0, 0, 0, 0, 0, 0, 0xbb, 0, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(writer.finish(10_000), expected.concat());
}

#[test]
fn an_entry_holds_65536_operations() {
    let mut writer = BatchWriter::new();
    let touch = Command::Touch {
        key: b"k",
        expires_at_ms: 1,
    }
    .into();
    for ordinal in 0..MAX_OPERATIONS {
        assert_eq!(writer.push(&touch), Ok(ordinal as u32));
    }
    assert_eq!(writer.push(&touch), Err(PushError::Full));
    let mut bytes = writer.finish(0);
    assert_eq!(Batch::parse(&bytes).map(|batch| batch.len()), Ok(MAX_OPERATIONS));
    bytes[4] = 1;
    assert_eq!(
        Batch::parse(&bytes),
        Err(BatchError::TooManyOperations { count: 65_537 })
    );
}

#[test]
fn the_largest_operation_fits_an_empty_entry_and_bytes_are_bounded() {
    let (key, value) = (vec![1; MAX_KEY_BYTES], vec![2; MAX_VALUE_BYTES]);
    let condition = Condition::IfVersion(Version::from(1));
    let command = Command::Put {
        key: &key,
        value: &value,
        expires_at_ms: 1,
        condition,
    };
    let session = Some(SessionWrite {
        session: 1,
        seq: 1,
        first_unacked: 1,
    });
    let mut writer = BatchWriter::new();
    assert_eq!(writer.push(&Operation::Command { command, session }), Ok(0));
    let one = writer.len_bytes();
    assert_eq!(
        writer.push(&Operation::Command { command, session }),
        Err(PushError::Full)
    );
    assert_eq!(
        writer.len_bytes(),
        one,
        "a refused operation leaves the entry as it was"
    );
    assert_eq!(Batch::parse(&writer.finish(0)).map(|batch| batch.len()), Ok(1));
}

#[test]
fn illegal_operations_are_refused() {
    let mut writer = BatchWriter::new();
    let empty = Command::Delete {
        key: b"",
        condition: Condition::None,
    };
    assert_eq!(writer.push(&empty.into()), Err(PushError::KeyLength { len: 0 }));
    let long = vec![0; MAX_KEY_BYTES + 1];
    let touch = Command::Touch {
        key: &long,
        expires_at_ms: 0,
    };
    assert_eq!(
        writer.push(&touch.into()),
        Err(PushError::KeyLength { len: MAX_KEY_BYTES + 1 })
    );
    let value = vec![0; MAX_VALUE_BYTES + 1];
    let put = Command::Put {
        key: b"k",
        value: &value,
        expires_at_ms: 0,
        condition: Condition::None,
    };
    assert_eq!(
        writer.push(&put.into()),
        Err(PushError::ValueLength {
            len: MAX_VALUE_BYTES + 1
        })
    );
    let command = Command::Incr { key: b"k", delta: 1 };
    for (seq, first_unacked) in [(0, 0), (5, 6), (1, 0), (SESSION_WINDOW + 1, 1), (u64::MAX, 1)] {
        let session = Some(SessionWrite {
            session: 1,
            seq,
            first_unacked,
        });
        let refused = Err(PushError::SessionWindow { seq, first_unacked });
        assert_eq!(writer.push(&Operation::Command { command, session }), refused);
    }
    let command = Command::Evict {
        hash: 1,
        version: Version::from(1),
    };
    let session = Some(SessionWrite {
        session: 1,
        seq: 1,
        first_unacked: 1,
    });
    assert_eq!(
        writer.push(&Operation::Command { command, session }),
        Err(PushError::SessionOnVictim)
    );
    assert!(writer.is_empty());
    let bytes = writer.finish(3);
    let batch = Batch::parse(&bytes).expect("an entry without operations advances time");
    assert_eq!((batch.time_ms(), batch.is_empty()), (3, true));
}

#[test]
fn errors_say_what_and_where() {
    let mut bytes = encode(&[Owned::Other(Operation::AllocateReplicaId)], 1);
    assert_eq!(bytes.len(), 18);
    bytes.push(0);
    assert_eq!(Batch::parse(&bytes), Err(BatchError::TrailingBytes { offset: 18 }));
    bytes.pop();
    bytes[17] = 8;
    assert_eq!(
        Batch::parse(&bytes),
        Err(BatchError::InvalidFlags { flags: 8, offset: 16 })
    );
    bytes[16] = 200;
    assert_eq!(
        Batch::parse(&bytes),
        Err(BatchError::UnknownOperation { code: 200, offset: 16 })
    );
    bytes[0] = 2;
    assert_eq!(Batch::parse(&bytes), Err(BatchError::UnsupportedVersion { found: 2 }));
    assert_eq!(Batch::parse(&[]), Err(BatchError::Truncated { offset: 0 }));
    let long = vec![0; MAX_BATCH_BYTES + 1];
    assert_eq!(
        Batch::parse(&long),
        Err(BatchError::TooLong {
            len: MAX_BATCH_BYTES + 1
        })
    );
}
