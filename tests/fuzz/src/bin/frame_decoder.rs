//! A byte stream in arbitrary pieces gives the same frames and the same end as in one piece.
#![no_main]

use bytes::Bytes;
use generation_proto::{Decoder, Frame, FrameError, Side};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 3000;

fuzz_target!(|data: &[u8]| {
    for side in [Side::Server, Side::Client] {
        let whole = decode(side, data, usize::MAX, 1);
        // Boundaries from the input itself, so that every byte of a seed is part of the stream.
        let salt = data.iter().fold(1_usize, |sum, &byte| {
            sum.wrapping_mul(31).wrapping_add(usize::from(byte))
        });
        for (most, drain_every) in [(1, 1), (1, 7), (16, 1), (1 + salt % 40, 1 + salt % 5)] {
            assert_eq!(
                decode(side, data, most, drain_every),
                whole,
                "pieces of {most}, drained at every {drain_every}th"
            );
        }
        let used: usize = whole.0.iter().map(|frame| 16 + frame.payload.len()).sum();
        assert!(used <= data.len());
        assert_eq!(whole.1.is_ok(), used == data.len());
    }
});

/// The frames and the end of `data` in pieces of at most `most` bytes.
fn decode(side: Side, data: &[u8], most: usize, drain_every: usize) -> (Vec<Frame>, Result<(), FrameError>) {
    let mut decoder = Decoder::new(side, LIMIT);
    let mut frames = Vec::new();
    let mut fed = 0;
    for (at, piece) in data.chunks(most.min(data.len().max(1))).enumerate() {
        decoder.feed(Bytes::copy_from_slice(piece));
        fed += piece.len();
        if at % drain_every == 0 {
            while let Ok(Some(frame)) = decoder.next_frame() {
                frames.push(frame);
            }
        }
        assert!(decoder.buffered_len() <= fed);
    }
    let end = loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => break decoder.finish(),
            Err(error) => {
                assert_eq!(
                    (decoder.next_frame(), decoder.finish(), decoder.buffered_len()),
                    (Err(error), Err(error), 0)
                );
                break Err(error);
            }
        }
    };
    (frames, end)
}
