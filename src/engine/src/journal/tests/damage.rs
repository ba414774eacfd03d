//! Torn writes at every byte, flipped bits in every byte, lost and foreign files.

use super::disk::{Harness, JOURNAL, compare, entry, recover};
use crate::journal::*;

const SHARD: u32 = 5;

/// A journal with one shard and durable frames of one to three blocks in one segment.
fn journal(files: usize, blocks: usize) -> Harness {
    fill(Harness::new(files, blocks))
}

fn fill(mut harness: Harness) -> Harness {
    harness
        .write(&[Record::Create {
            shard: SHARD,
            replica: 1,
        }])
        .unwrap();
    harness
        .write(&[entry(SHARD, 0, b"first"), entry(SHARD, 1, &[7; 5000])])
        .unwrap();
    harness.complete_all();
    harness
}

/// A file full of whole frames of an earlier generation, as recycling leaves it.
fn recycled(blocks: usize) -> Vec<u8> {
    let mut old = fill(Harness::with_nonce(1, blocks, 1));
    let mut index = 2;
    while old.writer.room() > 0 {
        old.write(&[entry(SHARD, index, b"old and whole")]).unwrap();
        index += 1;
        old.complete_all();
    }
    old.files.remove(0)
}

#[test]
fn a_write_torn_at_every_byte_is_the_tail() {
    let old = recycled(10);
    for over_old_frames in [false, true] {
        let mut harness = journal(1, 10);
        if over_old_frames {
            let written = (10 * BLOCK_BYTES as u64 - harness.writer.room()) as usize;
            harness.files[0][written..].copy_from_slice(&old[written..]);
        }
        let before = harness.files.clone();
        let sequence = harness
            .write(&[entry(SHARD, 2, &[9; 6000]), entry(SHARD, 3, b"x")])
            .unwrap();
        let pending = harness.pending[0].clone();
        for torn in 0..=pending.bytes.len() {
            let mut files = before.clone();
            files[pending.file][pending.offset..][..torn].copy_from_slice(&pending.bytes[..torn]);
            let (recovered, model) = recover(&files).expect("a torn tail is no corruption");
            // Written whole as soon as what is missing of it was zeros before.
            let whole = files[pending.file][pending.offset..][..pending.bytes.len()] == pending.bytes;
            let last = if whole { sequence } else { sequence - 1 };
            assert_eq!(recovered.next_sequence - 1, last, "torn at byte {torn}");
            assert_eq!(model, harness.history[&last]);
            compare(&files, &recovered, &model);
        }
    }
}

/// Of two writes in flight each may be lost, torn or whole; what counts is the longest prefix of whole ones. What was cut off
/// stays cut off, though its frames are whole and lie where the journal might have gone on.
#[test]
fn two_writes_in_flight_tear_out_of_order() {
    for (first, second) in (0..9).map(|case| (case / 3, case % 3)) {
        let mut harness = journal(3, 12);
        let a = harness.write(&[entry(SHARD, 2, &[1; 5000])]).unwrap();
        let b = harness.write(&[entry(SHARD, 3, &[2; 5000])]).unwrap();
        let recovered = harness.crash(|contents, pending| {
            let part = if pending.sequence == a { first } else { second };
            let len = [0, BLOCK_BYTES, contents.len()][part];
            contents[..len].copy_from_slice(&pending.bytes[..len]);
        });
        let last = match (first, second) {
            (2, 2) => b,
            (2, _) => a,
            _ => a - 1,
        };
        assert_eq!(recovered.next_sequence - 1, last, "first {first}, second {second}");
        assert_eq!(recovered.dropped_frames, u64::from(first != 2 && second == 2));
        // Twice more: the sequences and the log indexes come again, in another segment.
        for round in 0..2 {
            assert!(harness.try_open());
            let next = harness.model[&SHARD].last.unwrap().index + 1;
            harness.write(&[entry(SHARD, next, &[10 + round; 9000])]).unwrap();
            harness.complete_all();
            let recovered = harness.crash(|_, _| unreachable!("nothing is pending"));
            assert_eq!(recovered.dropped_frames, 0, "what was cut off has come back");
        }
    }
}

/// Which frame each byte of a file belongs to: (offset, sequence) of the frame, `None` outside.
fn frame_at(frames: &[(usize, Placement)], file: usize, byte: usize) -> Option<Placement> {
    let inside = |(in_file, frame): &&(usize, Placement)| {
        *in_file == file && (frame.offset..frame.offset + frame.len).contains(&(byte as u64))
    };
    frames.iter().find(inside).map(|(_, frame)| *frame)
}

fn placements(harness: &Harness) -> Vec<(usize, Placement)> {
    let mut frames = Vec::new();
    for (file, bytes) in harness.files.iter().enumerate() {
        let Ok(header) = SegmentHeader::decode(bytes) else {
            continue;
        };
        let mut offset = BLOCK_BYTES;
        while let Some(Ok(frame)) = bytes.get(offset..).map(Frame::parse) {
            if frame.generation() != header.generation {
                break;
            }
            let (sequence, len) = (frame.sequence(), frame.len_bytes() as u64);
            frames.push((
                file,
                Placement {
                    generation: header.generation,
                    offset: offset as u64,
                    len,
                    sequence,
                },
            ));
            offset += frame.len_bytes();
        }
    }
    frames
}

/// Two segments, the first full. One bit is flipped in every byte in turn: of a frame at or below `durable_up_to` that is
/// corruption, told with file and offset; above it, the tail ends there; outside of frames nothing happens.
#[test]
fn a_flipped_bit_in_every_byte_is_found() {
    let mut harness = journal(2, 6);
    harness.write(&[entry(SHARD, 2, b"third")]).unwrap();
    harness.complete_all();
    harness.write(&[entry(SHARD, 3, b"in the second segment")]).unwrap();
    harness.complete_all();
    // The last frame says that this one is durable, and nothing says so of itself.
    let last = harness
        .write(&[entry(SHARD, 4, b"last"), entry(SHARD, 5, &[3; 700])])
        .unwrap();
    harness.complete_all();
    let durable = last - 1;
    let frames = placements(&harness);
    assert_eq!(frames.last().map(|(_, frame)| frame.sequence), Some(last));
    let newest = harness.placed[&harness.writer.generation()];
    for file in 0..2 {
        for byte in 0..harness.files[file].len() {
            let mut files = harness.files.clone();
            files[file][byte] ^= 1 << (byte % 8);
            let result = recover(&files);
            let place = format!("file {file}, byte {byte}");
            match frame_at(&frames, file, byte) {
                Some(frame) if frame.sequence <= durable => {
                    let Err(RecoveryError::Corruption(found)) = result else {
                        panic!("{place}: {result:?}")
                    };
                    assert_eq!(
                        (found.file, found.offset, found.sequence),
                        (file, frame.offset, frame.sequence)
                    );
                    assert_eq!(found.durable_up_to, durable, "{place}");
                    if frame.sequence > 1 {
                        assert!(found.replicas.iter().all(|replica| *replica == (SHARD, 1)), "{place}");
                    }
                }
                Some(frame) => {
                    let (recovered, model) = result.expect("the tail");
                    assert_eq!(recovered.next_sequence, frame.sequence, "{place}");
                    assert_eq!(
                        recovered.torn.map(|(file, offset, _)| (file, offset)),
                        Some((file, frame.offset))
                    );
                    assert_eq!(model, harness.history[&(last - 1)]);
                }
                None if byte < BLOCK_BYTES && file == newest => {
                    let Err(RecoveryError::Corruption(found)) = result else {
                        panic!("{place}: {result:?}")
                    };
                    assert_eq!(
                        (found.file, found.offset, found.reason),
                        (file, 0, Bad::Segment(SegmentFault::Checksum))
                    );
                }
                None if byte < BLOCK_BYTES => {
                    let file = Some(file);
                    assert_eq!(
                        result.err(),
                        Some(RecoveryError::MissingSegment { generation: 1, file }),
                        "{place}"
                    );
                }
                None => {
                    let (recovered, model) = result.expect("nothing lies there");
                    assert_eq!((recovered.next_sequence, &model), (last + 1, &harness.model), "{place}");
                }
            }
        }
    }
}

/// A whole segment in the middle is lost, or its header: the sequence has a hole below what was durable.
#[test]
fn a_lost_segment_is_corruption() {
    let mut harness = journal(6, 6);
    for index in 2..9 {
        harness.write(&[entry(SHARD, index, &[4; 5000])]).unwrap();
        harness.complete_all();
    }
    // As a core that becomes idle does: now something says that all of it was durable.
    harness.write(&[]).unwrap();
    harness.complete_all();
    assert!(harness.placed.len() >= 3, "several segments");
    let middle = harness.placed[&2];
    let first_sequence = SegmentHeader::decode(&harness.files[middle]).unwrap().first_sequence;
    let mut files = harness.files.clone();
    files[middle][20] ^= 1;
    let Err(RecoveryError::Corruption(found)) = recover(&files) else {
        panic!("a lost header goes unseen")
    };
    assert_eq!((found.file, found.offset, found.sequence), (middle, 0, first_sequence));
    assert_eq!(found.reason, Bad::Segment(SegmentFault::Checksum));
    files[middle].fill(0);
    let Err(RecoveryError::Corruption(found)) = recover(&files) else {
        panic!("a lost segment goes unseen")
    };
    assert_eq!((found.file, found.sequence), (harness.placed[&1], first_sequence));
    let oldest = harness.placed[&1];
    files.clone_from(&harness.files);
    files[oldest].fill(0);
    let missing = RecoveryError::MissingSegment {
        generation: 1,
        file: None,
    };
    assert_eq!(recover(&files).err(), Some(missing));
    let newest = harness.placed[&harness.writer.generation()];
    files.clone_from(&harness.files);
    files[newest][..BLOCK_BYTES].fill(0);
    let Err(RecoveryError::Corruption(found)) = recover(&files) else {
        panic!("a lost header goes unseen")
    };
    assert_eq!((found.file, found.offset), (newest, 0));
    assert_eq!(found.reason, Bad::Segment(SegmentFault::Blank));
}

#[test]
fn a_segment_cut_short_is_found() {
    let mut harness = journal(1, 10);
    harness.write(&[entry(SHARD, 2, b"third")]).unwrap();
    harness.complete_all();
    let last = harness.write(&[]).unwrap();
    harness.complete_all();
    let (frames, full) = (placements(&harness), harness.files[0].clone());
    for blocks in 1..10 {
        let files = vec![full[..blocks * BLOCK_BYTES].to_vec()];
        let whole = |frame: &&(usize, Placement)| (frame.1.offset + frame.1.len) as usize <= blocks * BLOCK_BYTES;
        let kept = frames.iter().rfind(whole).map_or(0, |(_, frame)| frame.sequence);
        let says = harness.history.len() as u64;
        let durable_seen = frames
            .iter()
            .filter(whole)
            .map(|(_, frame)| frame.sequence - 1)
            .max()
            .unwrap_or(0);
        // What was cut off took its own witnesses along: the rest is a sound prefix.
        let (recovered, _) = recover(&files).expect("a prefix is sound");
        assert_eq!(recovered.next_sequence, kept + 1);
        assert!(durable_seen <= kept && kept <= last && says > kept);
    }
}

/// Old frames of the same file are whole and of this journal, and still nothing of them comes back.
#[test]
fn recycled_segments_keep_their_past_to_themselves() {
    let mut harness = Harness::new(4, 8);
    harness
        .write(&[Record::Create {
            shard: SHARD,
            replica: 1,
        }])
        .unwrap();
    for index in 0..60 {
        let payload = vec![index as u8; 100];
        harness
            .write(&[entry(SHARD, index, &payload)])
            .expect("recycling keeps up");
        harness.complete_all();
        if index % 3 == 2 {
            let up_to = LogId {
                term: 3,
                leader: 1,
                index,
            };
            harness
                .write(&[Record::Purge { shard: SHARD, up_to }])
                .expect("recycling keeps up");
            harness.complete_all();
        }
        let (recovered, model) = recover(&harness.files).expect("sound");
        assert_eq!(model, harness.model);
        assert_eq!((recovered.torn, recovered.dropped_frames), (None, 0));
        compare(&harness.files, &recovered, &model);
    }
    assert!(harness.writer.generation() > 10, "the files were used again and again");
}

#[test]
fn foreign_copied_and_newer_files_are_refused() {
    let harness = journal(2, 6);
    let header = SegmentHeader::decode(&harness.files[0]).unwrap();
    let file = |file, header| SegmentFile {
        file,
        header: Ok(header),
    };
    let foreign = SegmentHeader { journal: 9, ..header };
    let refused = Recovery::plan(JOURNAL, &[file(0, header), file(1, foreign)]).err();
    assert_eq!(refused, Some(RecoveryError::ForeignJournal { file: 1, found: 9 }));
    let refused = Recovery::plan(JOURNAL, &[file(0, header), file(1, header)]).err();
    assert_eq!(
        refused,
        Some(RecoveryError::Duplicate {
            files: [0, 1],
            generation: 1
        })
    );
    let mut newer = harness.files[0][..BLOCK_BYTES].to_vec();
    newer[8] = 2;
    newer[12..16].fill(0);
    let checksum = crc32c::crc32c(&newer);
    newer[12..16].copy_from_slice(&checksum.to_le_bytes());
    let newer = SegmentFile {
        file: 3,
        header: SegmentHeader::decode(&newer),
    };
    let refused = Recovery::plan(JOURNAL, &[newer]).err();
    assert_eq!(refused, Some(RecoveryError::UnsupportedVersion { file: 3, version: 2 }));
}

/// A client stores the image of a journal's frames as a value, each at the block it names, hoping that after a tear recovery takes
/// them for frames that say what was durable. Without the nonce it cannot; with it, it could.
#[test]
fn a_value_cannot_pass_for_frames() {
    for (nonce, passes) in [(8, false), (7, true)] {
        let mut forged = Harness::with_nonce(1, 60, nonce);
        for _ in 0..50 {
            forged.write(&[]).unwrap();
            forged.complete_all();
        }
        let mut harness = journal(1, 80);
        let block = 80 - harness.writer.room() as usize / BLOCK_BYTES;
        let sequence = harness.writer.durable_up_to() + 1;
        // The payload of the frame's only record begins behind two headers.
        let mut value = vec![0; BLOCK_BYTES - FRAME_HEADER_BYTES - 40];
        value.extend_from_slice(&forged.files[0][(block + 1) * BLOCK_BYTES..]);
        harness.write(&[entry(SHARD, 2, &value)]).unwrap();
        let pending = harness.pending.remove(0);
        // The frame's first block is lost, the rest arrives.
        let rest = &pending.bytes[BLOCK_BYTES..];
        harness.files[0][pending.offset + BLOCK_BYTES..][..rest.len()].copy_from_slice(rest);
        match recover(&harness.files) {
            Ok((recovered, _)) => {
                assert!(!passes, "the forgery of this test is no good");
                assert_eq!((recovered.next_sequence, recovered.dropped_frames), (sequence, 0));
            }
            Err(error) => assert!(passes, "{error}"),
        }
    }
}
