use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn header() -> SnapshotHeader {
    SnapshotHeader {
        cluster: 0xc1,
        shard: 7,
        epoch: 2,
        last_log_id: Some(LogId {
            term: 3,
            leader: 1,
            index: 99,
        }),
        membership: b"members".to_vec(),
    }
}

/// A snapshot and where its chunks begin.
fn snapshot(id: u128, payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<usize>) {
    let (mut out, mut starts) = (Vec::new(), vec![0]);
    let mut encoder = Encoder::begin(id, &header(), &mut out).expect("a short header");
    let kinds = [ChunkKind::State, ChunkKind::Sessions, ChunkKind::Entries];
    for (at, payload) in payloads.iter().enumerate() {
        starts.push(out.len());
        let chunk = encoder.chunk(kinds[at % 3], &mut out, |out| out.extend_from_slice(payload));
        chunk.expect("a short payload");
    }
    starts.push(out.len());
    encoder.finish(0x5a5a, &mut out);
    starts.push(out.len());
    (out, starts)
}

proptest! {
    #[test]
    fn what_is_written_is_read(payloads in vec(vec(any::<u8>(), 0..9_000), 0..6)) {
        let (bytes, starts) = snapshot(5, &payloads);
        let mut decoder = Decoder::new();
        prop_assert_eq!(decoder.resume(), None);
        let mut read = Vec::new();
        for (ordinal, range) in starts.windows(2).enumerate() {
            prop_assert!(range[0].is_multiple_of(BLOCK_BYTES));
            prop_assert_eq!(decoder.summary(), None);
            let chunk = &bytes[range[0]..range[1]];
            prop_assert_eq!(chunk_len(chunk), Ok(chunk.len()));
            let (kind, payload) = decoder.chunk(chunk).expect("just written");
            if !matches!(kind, ChunkKind::Header | ChunkKind::Footer) {
                read.push(payload.to_vec());
            }
            let resume = Resume { id: 5, ordinal: ordinal as u64 + 1, offset: range[1] as u64 };
            prop_assert_eq!(decoder.resume(), Some(resume));
        }
        prop_assert_eq!(read, payloads);
        prop_assert_eq!(decoder.header(), Some(&header()));
        let summary = decoder.summary().expect("complete");
        prop_assert_eq!((summary.bytes, summary.state_hash), (bytes.len() as u64, 0x5a5a));
        prop_assert_eq!(verify(&bytes), Ok(summary));
    }

    /// A transfer that is interrupted, damaged, doubled and mixed up goes on where it stopped and ends with the same snapshot.
    #[test]
    fn a_bad_chunk_changes_nothing(
        payloads in vec(vec(any::<u8>(), 0..5_000), 1..5),
        noise in vec((any::<proptest::sample::Index>(), any::<proptest::sample::Index>(), 0u8..8), 0..40),
    ) {
        let (bytes, starts) = snapshot(5, &payloads);
        let (foreign, _) = snapshot(6, &payloads);
        let mut decoder = Decoder::new();
        let mut noise = noise.into_iter();
        while decoder.summary().is_none() {
            let next = decoder.resume().map_or(0, |resume| resume.ordinal as usize);
            if let Some((chunk, byte, bit)) = noise.next() {
                let before = decoder.resume();
                let other = chunk.index(starts.len() - 1);
                let range = starts[other]..starts[other + 1];
                if other != next {
                    prop_assert!(decoder.chunk(&bytes[range.clone()]).is_err(), "a chunk out of order");
                }
                if next > 0 {
                    prop_assert_eq!(decoder.chunk(&foreign[range.clone()]).err(), Some(ChunkFault::Foreign));
                }
                let mut damaged = bytes[range].to_vec();
                let at = byte.index(damaged.len());
                damaged[at] ^= 1 << bit;
                prop_assert!(decoder.chunk(&damaged).is_err(), "a flipped bit in byte {}", at);
                prop_assert!(decoder.chunk(&damaged[..at]).is_err(), "a chunk cut at byte {}", at);
                prop_assert_eq!(decoder.resume(), before);
            }
            decoder.chunk(&bytes[starts[next]..starts[next + 1]]).expect("the chunk that comes next");
        }
        prop_assert_eq!(decoder.summary().map(|summary| summary.bytes), Some(bytes.len() as u64));
        prop_assert!(decoder.chunk(&bytes[starts[0]..starts[1]]).is_err(), "nothing comes after the footer");
    }

    #[test]
    fn noise_never_panics(mut bytes in vec(any::<u8>(), 0..9_000), len in 0u32..20_000) {
        let _ = (verify(&bytes), Decoder::new().chunk(&bytes));
        if bytes.len() >= CHUNK_HEADER_BYTES {
            bytes[..5].copy_from_slice(b"GNSC\x01");
            bytes[12..16].copy_from_slice(&len.to_le_bytes());
            let _ = (verify(&bytes), Decoder::new().chunk(&bytes));
        }
    }
}

/// Every byte of the file counts: a flipped bit anywhere is found, and told with the chunk it is in.
#[test]
fn verify_finds_a_flipped_bit_in_every_byte() {
    let (bytes, starts) = snapshot(5, &[vec![1; 100], vec![2; 5000]]);
    let mut damaged = bytes.clone();
    for at in 0..bytes.len() {
        damaged[at] ^= 1 << (at % 8);
        let chunk = starts[starts.partition_point(|start| *start <= at) - 1];
        assert_eq!(
            verify(&damaged).map_err(|error| error.offset),
            Err(chunk as u64),
            "byte {at}"
        );
        damaged[at] = bytes[at];
    }
    for len in (0..bytes.len()).step_by(512) {
        assert!(verify(&bytes[..len]).is_err(), "cut at {len}");
    }
    let longer = [&bytes[..], &[0; BLOCK_BYTES]].concat();
    assert_eq!(
        verify(&longer),
        Err(VerifyError {
            offset: bytes.len() as u64,
            fault: ChunkFault::Length
        })
    );
}

/// Whole chunks, each with a right checksum, that are no snapshot together.
#[test]
fn a_chunk_left_out_is_found() {
    let (bytes, starts) = snapshot(5, &[vec![1; 10], vec![2; 20], vec![3; 30]]);
    for left_out in 0..starts.len() - 1 {
        let without = [&bytes[..starts[left_out]], &bytes[starts[left_out + 1]..]].concat();
        assert!(verify(&without).is_err(), "without chunk {left_out}");
    }
    // The same ordinals and id, another payload: only the footer knows.
    let (other, _) = snapshot(5, &[vec![1; 10], vec![9; 20], vec![3; 30]]);
    let mixed = [&bytes[..starts[2]], &other[starts[2]..starts[3]], &bytes[starts[3]..]].concat();
    let offset = starts[4] as u64;
    assert_eq!(
        verify(&mixed),
        Err(VerifyError {
            offset,
            fault: ChunkFault::Footer
        })
    );
}

#[test]
fn lengths_are_bounded() {
    let mut out = Vec::new();
    let mut encoder = Encoder::begin(1, &header(), &mut out).unwrap();
    let before = out.clone();
    let payload = MAX_CHUNK_BYTES - CHUNK_HEADER_BYTES + 1;
    let refused = encoder.chunk(ChunkKind::Entries, &mut out, |out| out.resize(out.len() + payload, 7));
    assert_eq!(refused, Err(ChunkTooLong { payload }));
    assert_eq!(out, before);
    encoder
        .chunk(ChunkKind::Entries, &mut out, |out| {
            out.resize(out.len() + payload - 1, 7);
        })
        .unwrap();
    encoder.finish(0, &mut out);
    assert!(verify(&out).is_ok());
    let mut head = before[..CHUNK_HEADER_BYTES].to_vec();
    head[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    head[16..20].copy_from_slice(&0xffff_f000u32.to_le_bytes());
    assert_eq!(chunk_len(&head), Err(ChunkFault::Magic));
    head[4] = 2;
    assert_eq!(chunk_len(&head), Err(ChunkFault::UnsupportedVersion(2)));
}

/// Disks outlive releases: these bytes must be readable for ever.
#[test]
fn format_version_1_is_frozen() {
    let (bytes, starts) = snapshot(0x0102, &[]);
    let text = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    };
    let expected = "474e534301010000b9090a673c0000000010000000000000000000000000000002010000000000000000000000000000\
                    c10000000000000000000000000000000700000002000000010300000000000000010000000000000063000000000000\
                    00070000006d656d62657273";
    assert_eq!(text(&bytes[..108]), expected);
    let expected = "474e5343010500006b80bddd240000000010000000000000010000000000000002010000000000000000000000000000\
                    020000000000000000100000000000007446ca9d5a5a0000000000000000000000000000";
    assert_eq!(text(&bytes[starts[1]..][..84]), expected);
}
