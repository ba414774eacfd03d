//! Whatever can be read as a request is one: it is within the limits, its lists hold what they say, and encoded again it reads
//! the same.
#![no_main]

use bytes::{Bytes, BytesMut};
use generation_proto::limits::{MAX_BATCH, MAX_SHARDS};
use generation_proto::{Decoder, Limits, Operation, Request, Side};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    max_key_len: 100,
    max_value_len: 1000,
};

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::new(Side::Server, LIMITS.max_frame_len());
    decoder.feed(Bytes::copy_from_slice(data));
    while let Ok(Some(frame)) = decoder.next_frame() {
        let request = match Request::decode(&frame, &LIMITS) {
            Ok(request) => request,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert_ne!(error.status(), generation_proto::Status::Ok);
                continue;
            }
        };
        check(&request);
        let mut again = BytesMut::new();
        request.encode(&mut again);
        let mut decoder = Decoder::new(Side::Server, LIMITS.max_frame_len());
        decoder.feed(again.freeze());
        let frame = decoder
            .next_frame()
            .expect("what we encode is legal")
            .expect("and whole");
        assert_eq!(decoder.finish(), Ok(()));
        assert_eq!(Request::decode(&frame, &LIMITS), Ok(request));
    }
});

fn check(request: &Request<'_>) {
    let key = |key: &[u8]| assert!((1..=LIMITS.max_key_len).contains(&key.len()));
    let value = |value: &[u8]| assert!(value.len() <= LIMITS.max_value_len);
    request.operation.key().into_iter().for_each(key);
    match request.operation {
        Operation::Put { value: bytes, .. } => value(bytes),
        Operation::MultiGet(keys) | Operation::MultiDelete(keys) => {
            assert!((1..=MAX_BATCH).contains(&keys.len()));
            assert_eq!(keys.iter().inspect(|bytes| key(bytes)).count(), keys.len());
        }
        Operation::MultiPut(items) => {
            assert!((1..=MAX_BATCH).contains(&items.len()));
            let checked = items.iter().inspect(|item| {
                key(item.key);
                value(item.value);
            });
            assert_eq!(checked.count(), items.len());
        }
        Operation::Keys(scan) | Operation::Entries(scan) => {
            assert!((1..=MAX_BATCH).contains(&(scan.limit as usize)));
            assert!(usize::from(scan.shard) < MAX_SHARDS);
        }
        _ => {}
    }
    if let Some(session) = request.options.session {
        assert!(session.id != 0 && session.first_unacked != 0 && session.first_unacked <= session.seq);
    }
}
