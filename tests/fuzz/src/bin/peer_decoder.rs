//! Messages between nodes: a byte stream in arbitrary pieces gives the same messages and the same end as in one piece, what was
//! read encodes to what it was read from, and the payloads this crate knows are read or refused.
#![no_main]

use bytes::{Bytes, BytesMut};
use generation_proto::peer::{Message, MessageError, PeerDecoder, PeerHello, Ping, Quiesce};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 3000;

fuzz_target!(|data: &[u8]| {
    let whole = decode(data, usize::MAX);
    for most in [1, 7, 16, 40] {
        assert_eq!(decode(data, most), whole, "pieces of {most}");
    }
    let mut again = BytesMut::new();
    for message in &whole.0 {
        message.encode(&mut again);
        let payload = &message.payload[..];
        if let Some(quiesce) = Quiesce::decode(payload) {
            assert_eq!(quiesce.to_bytes(), payload);
        }
        if let Some(ping) = Ping::decode(payload) {
            assert_eq!(ping.to_bytes(), payload);
        }
        if let Some(hello) = PeerHello::decode(payload) {
            let mut encoded = BytesMut::new();
            hello.encode(&mut encoded);
            assert!(payload.starts_with(&encoded[16..]), "fields may follow, nothing else");
        }
    }
    assert!(data.starts_with(&again));
    assert_eq!(whole.1.is_ok(), again.len() == data.len());
});

/// The messages and the end of `data` in pieces of at most `most` bytes.
fn decode(data: &[u8], most: usize) -> (Vec<Message>, Result<(), MessageError>) {
    let mut decoder = PeerDecoder::new(LIMIT);
    let mut messages = Vec::new();
    for piece in data.chunks(most.min(data.len().max(1))) {
        decoder.feed(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Err(error)),
            }
        }
    }
    (messages, decoder.finish())
}
