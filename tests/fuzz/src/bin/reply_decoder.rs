//! Whatever can be read as a reply reads the same when it is encoded again, and its body is read or refused, whatever the
//! operation.
#![no_main]

use bytes::{Bytes, BytesMut};
use generation_proto::reply::{HelloReply, MultiResult, Page, PageEntry, Stat};
use generation_proto::{Decoder, Map, Opcode, Reply, Side, SlotTable};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::new(Side::Client, LIMIT);
    decoder.feed(Bytes::copy_from_slice(data));
    while let Ok(Some(frame)) = decoder.next_frame() {
        let Ok(reply) = Reply::decode(&frame) else { continue };
        let mut again = BytesMut::new();
        reply.encode(&mut again);
        let mut decoder = Decoder::new(Side::Client, LIMIT);
        decoder.feed(again.freeze());
        let frame = decoder
            .next_frame()
            .expect("what we encode is legal")
            .expect("and whole");
        assert_eq!(Reply::decode(&frame), Ok(reply));
        read_body(&reply);
    }
});

fn read_body(reply: &Reply<'_>) {
    let body = reply.body;
    let mut again = BytesMut::new();
    match reply.operation() {
        Some(Opcode::Hello) => {
            if let Ok(hello) = HelloReply::decode(body) {
                hello.encode(&mut again);
                assert!(body.starts_with(&again), "fields may follow, nothing else");
            }
        }
        Some(Opcode::Map) => {
            if let Ok(map) = Map::decode(body) {
                let table = SlotTable::new(&map.ranges, map.shards.len()).expect("a map that was read routes");
                assert!(usize::from(table.shard_of(b"any key")) < map.shards.len());
                map.encode(&mut again);
                assert_eq!(Map::decode(&again), Ok(map));
            }
        }
        Some(Opcode::Stats) => {
            if let Ok(stats) = Stat::decode_all(body).collect::<Result<Vec<_>, _>>() {
                stats.iter().for_each(|stat| stat.encode(&mut again));
                assert_eq!(again, body);
            }
        }
        Some(Opcode::Incr) => {
            if let Ok(counter) = reply.counter() {
                assert_eq!(counter.to_le_bytes(), body);
            }
        }
        Some(Opcode::MultiGet | Opcode::MultiPut | Opcode::MultiDelete) => {
            if let Ok(results) = MultiResult::decode_all(body).collect::<Result<Vec<_>, _>>() {
                results.iter().for_each(|result| result.encode(&mut again));
                assert_eq!(again, body);
            }
        }
        Some(Opcode::Keys | Opcode::Entries) => {
            if let Ok((page, entries)) = Page::decode(body)
                && let Ok(entries) = entries.collect::<Result<Vec<PageEntry<'_>>, _>>()
            {
                assert_eq!(entries.len(), page.count as usize);
                again.extend_from_slice(&page.to_bytes());
                entries.iter().for_each(|entry| entry.encode(&mut again));
                let (same, rest) = Page::decode(&again).expect("what we encode can be read");
                assert_eq!((same, rest.collect()), (page, Ok(entries)));
            }
        }
        _ => {}
    }
}
