//! Formats, the writer's bookkeeping, and the choice of what to free.

use super::disk::{Harness, JOURNAL, entry, recover};
use crate::journal::*;

fn log_id(index: u64) -> LogId {
    LogId {
        term: 2,
        leader: 9,
        index,
    }
}

fn every_kind() -> Vec<Record<'static>> {
    let full = ShardState {
        shard: 7,
        replica: 3,
        vote: Some(Vote {
            term: 4,
            leader: 5,
            committed: true,
        }),
        committed: Some(log_id(10)),
        purged: Some(log_id(8)),
        last: Some(log_id(12)),
        first: 9,
    };
    let empty = ShardState {
        vote: None,
        committed: None,
        purged: None,
        last: None,
        first: 0,
        ..full
    };
    let promised = ShardState {
        vote: Some(Vote {
            term: 1,
            leader: 0,
            committed: false,
        }),
        ..empty
    };
    let entry = |kind, payload| Record::Entry {
        shard: 1,
        log_id: log_id(4),
        kind,
        payload,
    };
    vec![
        entry(EntryKind::Blank, b""),
        entry(EntryKind::Commands, b"12345678"),
        entry(EntryKind::Membership, b"123"),
        Record::Vote {
            shard: 2,
            vote: Vote {
                term: 4,
                leader: 5,
                committed: false,
            },
        },
        Record::Vote {
            shard: 2,
            vote: Vote {
                term: 4,
                leader: 5,
                committed: true,
            },
        },
        Record::Truncate { shard: 3, after: None },
        Record::Truncate {
            shard: 3,
            after: Some(log_id(0)),
        },
        Record::Purge {
            shard: 3,
            up_to: log_id(1),
        },
        Record::Committed { shard: 3, log_id: None },
        Record::Committed {
            shard: 3,
            log_id: Some(log_id(2)),
        },
        Record::Create {
            shard: u32::MAX,
            replica: u64::MAX,
        },
        Record::Retire { shard: 0 },
        Record::State(full),
        Record::State(empty),
        Record::State(promised),
    ]
}

#[test]
fn every_record_survives_a_frame() {
    let mut buffer = vec![0xff; BLOCK_BYTES + 100];
    let mut builder = FrameBuilder::new(&mut buffer);
    for record in every_kind() {
        let room = builder.room();
        builder.push(&record).unwrap();
        assert_eq!(builder.room(), room - record.len_bytes());
    }
    let payload = vec![0; BLOCK_BYTES];
    let before = builder.room();
    let needed = 40 + BLOCK_BYTES;
    assert_eq!(builder.push(&entry(1, 1, &payload)), Err(FrameFull { needed }));
    assert_eq!(builder.room(), before, "a refused record leaves the frame as it was");
    let stamp = super::super::frame::Stamp {
        generation: 1,
        nonce: 2,
        sequence: 3,
        durable_up_to: 2,
        block: 1,
    };
    let (bytes, built) = builder.seal(&stamp);
    assert_eq!(bytes.len(), BLOCK_BYTES);
    let frame = Frame::parse(bytes).unwrap();
    assert_eq!(frame, built, "what is built is what is read");
    let records: Result<Vec<_>, _> = frame.records().collect();
    assert_eq!(records.unwrap(), every_kind());
}

/// Any change in any byte of any record is an error or another record, never a panic; and one meaning has one encoding.
#[test]
fn damaged_records_are_refused_or_canonical() {
    for record in every_kind() {
        let mut bytes = vec![0; record.len_bytes()];
        record.encode(&mut bytes);
        for at in 0..bytes.len() {
            for value in [0, 1, 2, 3, 9, 0x55, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let mut reader = crate::codec::Reader::new(&damaged);
                if let Ok(read) = Record::decode(&mut reader) {
                    let used = damaged.len() - reader.remaining();
                    assert_eq!(read.len_bytes(), used);
                    let mut again = vec![0xee; used];
                    read.encode(&mut again);
                    assert_eq!(again, damaged[..used]);
                }
                let cut = &damaged[..at];
                assert!(Record::decode(&mut crate::codec::Reader::new(cut)).is_err() || at >= 8);
            }
        }
    }
}

/// Disks outlive releases: these bytes must be readable for ever.
#[test]
fn format_version_1_is_frozen() {
    let mut harness = Harness::new(1, 6);
    harness
        .write(&[every_kind()[10], Record::Retire { shard: u32::MAX }])
        .unwrap();
    harness.complete_all();
    let file = &harness.files[0];
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    };
    let header = "474e4a5345474d540100000016a1c925006c616e72756f6a000000000000000001000000000000003c7a16183dad3d6a\
                  0100000000000000000000000000000006000000";
    let frame = "474e4a4601000000dbd7b9a90a5b56f9001000000200000001000000000000003c7a16183dad3d6a\
                 02000000000000000000000000000000020000005800000006000000ffffffffffffffffffffffff07000000ffffffff";
    assert_eq!(hex(&file[..68]), header);
    assert_eq!(hex(&file[2 * BLOCK_BYTES..][..0x58]), frame);
}

#[test]
fn completions_in_any_order_acknowledge_a_prefix() {
    let mut harness = Harness::new(1, 12);
    harness.complete_all();
    assert_eq!(harness.writer.durable_up_to(), 1);
    for _ in 0..4 {
        harness.write(&[]).unwrap();
    }
    for (position, durable) in [(2, 1), (0, 2), (1, 2), (0, 5)] {
        harness.complete(position);
        assert_eq!(harness.writer.durable_up_to(), durable);
    }
    assert_eq!(harness.writer.in_flight(), 0);
}

#[test]
#[should_panic(expected = "not in flight")]
fn a_sequence_is_completed_once() {
    let mut harness = Harness::new(1, 12);
    harness.complete_all();
    harness.writer.completed(1);
}

/// Votes move on with each checkpoint and hold no segment; entries do, until their purge is durable.
#[test]
fn a_segment_is_free_once_its_entries_are_purged_durably() {
    let mut harness = Harness::new(8, 6);
    let create = [
        Record::Create { shard: 1, replica: 1 },
        Record::Create { shard: 2, replica: 1 },
    ];
    harness.write(&create).unwrap();
    let vote = Vote {
        term: 8,
        leader: 1,
        committed: false,
    };
    harness
        .write(&[
            Record::Vote { shard: 2, vote },
            entry(1, 0, b"a"),
            entry(2, 0, b"b"),
            entry(2, 1, b"c"),
        ])
        .unwrap();
    harness.complete_all();
    assert_eq!(harness.writer.recyclable().count(), 0, "the open segment is never free");
    assert!(harness.try_open());
    harness.complete_all();
    assert_eq!(harness.writer.recyclable().count(), 0);
    let index = harness.writer.index();
    let forced = index.forced_snapshot(|_| false).unwrap();
    assert_eq!((forced.shard, forced.up_to), (1, 0), "of equals, the first");
    let forced = index.forced_snapshot(|shard| shard == 1).unwrap();
    assert_eq!(
        (forced.shard, forced.up_to, forced.held_bytes),
        (2, 1, BLOCK_BYTES as u64)
    );
    assert_eq!(index.forced_snapshot(|_| true), None);
    let up_to = |index| LogId {
        term: 3,
        leader: 1,
        index,
    };
    harness
        .write(&[Record::Purge {
            shard: 1,
            up_to: up_to(0),
        }])
        .unwrap();
    harness.complete_all();
    assert_eq!(harness.writer.recyclable().count(), 0, "the other shard still holds it");
    harness
        .write(&[Record::Purge {
            shard: 2,
            up_to: up_to(1),
        }])
        .unwrap();
    assert_eq!(harness.writer.recyclable().count(), 0, "the purge is not durable");
    harness.complete_all();
    let dead = |harness: &Harness| {
        harness
            .writer
            .index()
            .dead(harness.writer.durable_up_to())
            .collect::<Vec<_>>()
    };
    assert_eq!(dead(&harness), [1]);
    assert_eq!(harness.writer.recyclable().count(), 0, "no header says so");
    assert!(harness.try_open());
    assert_eq!(harness.writer.recyclable().count(), 0, "no durable header says so");
    harness.complete_all();
    assert_eq!(harness.writer.recyclable().collect::<Vec<_>>(), [1]);
    let file = harness.placed[&1];
    harness.writer.recycled(1);
    // Whatever becomes of the file now: the vote is in the newest checkpoint.
    harness.files[file].fill(0xaa);
    let (recovered, model) = recover(&harness.files).unwrap();
    assert_eq!(model[&2].vote, Some(vote));
    assert_eq!(recovered.index.shard(2).unwrap().last, Some(up_to(1)));
}

#[test]
fn a_retired_replica_holds_nothing() {
    let mut harness = Harness::new(3, 6);
    harness
        .write(&[Record::Create { shard: 1, replica: 1 }, entry(1, 5, b"begins anywhere")])
        .unwrap();
    harness.try_open();
    harness.complete_all();
    assert_eq!(harness.writer.index().held_bytes(1), BLOCK_BYTES as u64);
    harness
        .write(&[Record::Retire { shard: 1 }, Record::Create { shard: 1, replica: 2 }])
        .unwrap();
    harness.complete_all();
    assert_eq!(
        harness
            .writer
            .index()
            .dead(harness.writer.durable_up_to())
            .collect::<Vec<_>>(),
        [1]
    );
    assert_eq!(harness.writer.index().held_bytes(1), 0);
    let (recovered, _) = recover(&harness.files).unwrap();
    let state = recovered.index.shard(1).unwrap();
    assert_eq!((state.replica, state.last, state.vote), (2, None, None));
}

/// What the caller must never do is refused, before it is on disk.
#[test]
fn records_that_do_not_fit_are_refused() {
    let refuse = |records: &[Record<'_>], expected: IndexError| {
        let mut harness = Harness::new(1, 12);
        let up_to = log_id(4);
        let entries = [
            Record::Create { shard: 1, replica: 1 },
            Record::Purge { shard: 1, up_to },
            entry(1, 5, b""),
        ];
        harness.write(&entries).unwrap();
        let mut buffer = vec![0; 2 * BLOCK_BYTES];
        let mut builder = FrameBuilder::new(&mut buffer);
        for record in records {
            builder.push(record).unwrap();
        }
        assert_eq!(harness.writer.seal(builder).err(), Some(SealError::Index(expected)));
    };
    refuse(&[entry(2, 0, b"")], IndexError::UnknownShard { shard: 2 });
    refuse(
        &[entry(1, 7, b"")],
        IndexError::Hole {
            shard: 1,
            expected: 6,
            found: 7,
        },
    );
    refuse(
        &[entry(1, 5, b"")],
        IndexError::Hole {
            shard: 1,
            expected: 6,
            found: 5,
        },
    );
    let truncate = |index: Option<u64>| Record::Truncate {
        shard: 1,
        after: index.map(log_id),
    };
    for index in [None, Some(3), Some(6)] {
        refuse(&[truncate(index)], IndexError::Truncation { shard: 1, index });
    }
}

#[test]
fn a_new_directory_recovers_to_nothing() {
    let blank = vec![vec![0; 6 * BLOCK_BYTES]; 2];
    let (recovered, model) = recover(&blank).unwrap();
    assert_eq!((recovered.next_sequence, recovered.next_generation), (1, 1));
    assert!(model.is_empty() && recovered.segments.is_empty());
    assert_eq!(recovered.free, [0, 1]);
    assert!(Recovery::plan(JOURNAL, &[]).unwrap().finish().is_ok());
}

/// Noise in place of files never panics.
#[test]
fn noise_is_no_journal() {
    let mut state = 1u64;
    let mut noise = || {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    let files: Vec<Vec<u8>> = (0..3).map(|file| (0..file * 3000).map(|_| noise()).collect()).collect();
    let (recovered, _) = recover(&files).unwrap();
    assert_eq!(recovered.free, [0, 1, 2]);
}
