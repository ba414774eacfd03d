//! Random work with random crashes.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index as Pick;

use super::disk::{Harness, Pending};
use crate::journal::*;

#[derive(Debug, Clone)]
enum Change {
    Append { shard: u32, entries: Vec<usize> },
    Vote { shard: u32, term: u64 },
    Truncate { shard: u32, keep: Pick },
    Purge { shard: u32, up_to: Pick, beyond: u64 },
    Committed { shard: u32 },
    Create { shard: u32 },
    Retire { shard: u32 },
}

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<Change>),
    Complete(Pick),
    /// What of each pending write survives: blocks by bit, and a prefix in bytes of the first lost block.
    Crash(Vec<(u32, usize)>),
}

fn change() -> impl Strategy<Value = Change> {
    let shard = || 0u32..4;
    prop_oneof![
        8 => (shard(), vec(prop_oneof![0usize..300, 3_000usize..9_000], 1..4))
            .prop_map(|(shard, entries)| Change::Append { shard, entries }),
        2 => (shard(), 0u64..9).prop_map(|(shard, term)| Change::Vote { shard, term }),
        1 => (shard(), any::<Pick>()).prop_map(|(shard, keep)| Change::Truncate { shard, keep }),
        2 => (shard(), any::<Pick>(), prop_oneof![9 => Just(0u64), 1 => 0u64..5])
            .prop_map(|(shard, up_to, beyond)| Change::Purge { shard, up_to, beyond }),
        1 => shard().prop_map(|shard| Change::Committed { shard }),
        1 => shard().prop_map(|shard| Change::Create { shard }),
        1 => prop_oneof![3 => Just(9), 1 => shard()].prop_map(|shard| Change::Retire { shard }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => vec(change(), 0..5).prop_map(Step::Commit),
        6 => any::<Pick>().prop_map(Step::Complete),
        1 => vec((any::<u32>(), 0usize..BLOCK_BYTES), 1..8).prop_map(Step::Crash),
    ]
}

/// A record that owns its payload.
enum Made {
    Entry(u32, LogId, Vec<u8>),
    Other(Record<'static>),
}

impl Made {
    fn borrow(&self) -> Record<'_> {
        match self {
            Made::Entry(shard, log_id, payload) => {
                let kind = [EntryKind::Blank, EntryKind::Commands, EntryKind::Membership][payload.len() % 3];
                Record::Entry {
                    shard: *shard,
                    log_id: *log_id,
                    kind,
                    payload,
                }
            }
            Made::Other(record) => *record,
        }
    }
}

/// Turns a change into records that fit the state of the shards.
fn make(harness: &Harness, changes: &[Change]) -> Vec<Made> {
    let mut model = harness.model.clone();
    let mut made = Vec::new();
    for change in changes {
        let (Change::Append { shard, .. }
        | Change::Vote { shard, .. }
        | Change::Truncate { shard, .. }
        | Change::Purge { shard, .. }
        | Change::Committed { shard }
        | Change::Create { shard }
        | Change::Retire { shard }) = change;
        let shard = *shard;
        let before = made.len();
        let term = harness.history.len() as u64;
        let state = model.get(&shard);
        match (change, state) {
            (Change::Create { .. }, _) => made.push(Made::Other(Record::Create { shard, replica: term })),
            (Change::Append { entries, .. }, Some(state)) => {
                let next = state.last.map_or(0, |last| last.index + 1);
                for (index, len) in (next..).zip(entries) {
                    let payload = (0..*len)
                        .map(|at| (at * 7 + index as usize + term as usize) as u8)
                        .collect();
                    made.push(Made::Entry(shard, LogId { term, leader: 2, index }, payload));
                }
            }
            (Change::Vote { term, .. }, Some(_)) => {
                let vote = Vote {
                    term: *term,
                    leader: 4,
                    committed: term % 2 == 0,
                };
                made.push(Made::Other(Record::Vote { shard, vote }));
            }
            (Change::Truncate { keep, .. }, Some(state)) if !state.entries.is_empty() => {
                let entries: Vec<LogId> = state.entries.values().map(|(log_id, ..)| *log_id).collect();
                let cut = keep.index(entries.len());
                let after = if cut == 0 { state.purged } else { Some(entries[cut - 1]) };
                made.push(Made::Other(Record::Truncate { shard, after }));
            }
            (Change::Purge { up_to, beyond, .. }, Some(state)) if !state.entries.is_empty() => {
                let entries: Vec<LogId> = state.entries.values().map(|(log_id, ..)| *log_id).collect();
                let mut up_to = entries[up_to.index(entries.len())];
                if *beyond > 0 {
                    up_to = LogId {
                        index: entries[entries.len() - 1].index + beyond,
                        term,
                        ..up_to
                    };
                }
                made.push(Made::Other(Record::Purge { shard, up_to }));
            }
            (Change::Committed { .. }, Some(state)) => {
                made.push(Made::Other(Record::Committed {
                    shard,
                    log_id: state.last,
                }));
            }
            (Change::Retire { .. }, Some(_)) => made.push(Made::Other(Record::Retire { shard })),
            _ => {}
        }
        for record in &made[before..] {
            super::disk::apply(&mut model, &record.borrow());
        }
    }
    made
}

/// Space runs out: take snapshots of the shards that the index names until there will be room.
fn make_room(harness: &mut Harness) {
    harness.complete_all();
    let mut asked = 0;
    while harness.writer.needs_snapshot(harness.free.len()) {
        let Some(forced) = harness.writer.index().forced_snapshot(|_| false) else {
            return;
        };
        let state = &harness.model[&forced.shard];
        let up_to = state.entries[&forced.up_to].0;
        let records = [Record::Purge {
            shard: forced.shard,
            up_to,
        }];
        // The last blocks of a segment are kept for this, as a node keeps a reserve.
        harness.write(&records).expect("the reserve has room for a purge");
        harness.complete_all();
        asked += 1;
        assert!(
            asked < 50,
            "snapshots of the shards named do not free the oldest segment"
        );
    }
}

/// Opens a segment, in a new file if need be: a restart may have taken the last one.
fn open(harness: &mut Harness) {
    if harness.try_open() {
        return;
    }
    // The header that gives up the next file may be in flight.
    harness.complete_all();
    if !harness.try_open() {
        harness.files.push(vec![0; 24 * BLOCK_BYTES]);
        harness.free.push(harness.files.len() - 1);
        assert!(harness.try_open());
    }
}

fn tear(contents: &mut [u8], pending: &Pending, (blocks, prefix): (u32, usize)) {
    let mut torn = false;
    for (at, block) in contents.chunks_mut(BLOCK_BYTES).enumerate() {
        let new = &pending.bytes[at * BLOCK_BYTES..][..BLOCK_BYTES];
        if blocks >> (at % 32) & 1 == 1 {
            block.copy_from_slice(new);
        } else if !torn {
            torn = true;
            block[..prefix].copy_from_slice(&new[..prefix]);
        }
    }
}

proptest! {
    /// Whatever was acknowledged is there after any crash, in the state it had, and nothing is there that was not written: over
    /// several crashes, recycled segments, and torn writes in any order. With few files, snapshots are forced.
    #[test]
    fn survives_crashes(files in 3usize..7, steps in vec(step(), 1..120)) {
        let mut harness = Harness::new(files, 24);
        let mut crashes = 0;
        let create: Vec<Record<'_>> = (0..4).map(|shard| Record::Create { shard, replica: 1 }).collect();
        harness.write(&create).expect("room");
        for step in steps {
            match step {
                Step::Commit(changes) => {
                    // Leave a segment's last blocks to purges.
                    let records = make(&harness, &changes);
                    let records: Vec<Record<'_>> = records.iter().map(Made::borrow).collect();
                    let len: usize = records.iter().map(Record::len_bytes).sum();
                    let needed = (len + FRAME_HEADER_BYTES).next_multiple_of(BLOCK_BYTES) + 6 * BLOCK_BYTES;
                    if len > 16 * BLOCK_BYTES {
                        continue;
                    }
                    if harness.writer.room() < needed as u64 {
                        if harness.writer.needs_snapshot(harness.free.len()) {
                            make_room(&mut harness);
                            open(&mut harness);
                            // The purges may have changed what the records were made for.
                            continue;
                        }
                        open(&mut harness);
                    }
                    harness.write(&records).expect("room");
                }
                Step::Complete(pick) => {
                    if !harness.pending.is_empty() {
                        let position = pick.index(harness.pending.len());
                        harness.complete(position);
                    }
                }
                Step::Crash(tears) => {
                    crashes += 1;
                    let mut tears = tears.iter().cycle();
                    harness.crash(|contents, pending| tear(contents, pending, *tears.next().expect("a cycle")));
                    open(&mut harness);
                }
            }
        }
        harness.complete_all();
        harness.crash(|_, _| unreachable!("nothing is pending"));
        prop_assert!(harness.files.len() <= files + crashes, "{} files", harness.files.len());
    }
}
