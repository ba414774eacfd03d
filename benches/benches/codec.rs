//! The wire codec: what a request and its reply cost at either end, apart from everything else.

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use generation_proto::{
    Decoder, Limits, Opcode, Operation, Reply, ReplyMeta, ReplyOptions, Request, RequestOptions, Side, slot,
};

/// Frames in one piece: what a datagram train of GSO size holds of small requests.
const FRAMES: u64 = 256;

fn keys() -> Vec<[u8; 16]> {
    (0..FRAMES)
        .map(|number| {
            let mut key = *b"user:00000000000";
            key[8..].copy_from_slice(&format!("{:08}", number * 7919).into_bytes()[..8]);
            key
        })
        .collect()
}

fn get(id: u64, key: &[u8], out: &mut BytesMut) {
    let options = RequestOptions::default();
    let operation = Operation::Get { key };
    Request { id, options, operation }.encode(out);
}

fn found(id: u64, value: &[u8], out: &mut BytesMut) {
    Reply {
        id,
        opcode: Opcode::Get.code(),
        meta: ReplyMeta::default(),
        options: ReplyOptions::default(),
        body: value,
    }
    .encode(out);
}

fn codec(criterion: &mut Criterion) {
    let keys = keys();
    let value = [7; 100];
    let limits = Limits::default();
    let mut out = BytesMut::with_capacity(1 << 20);

    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(FRAMES));
    group.bench_function("slot of 16 B", |bencher| {
        bencher.iter(|| {
            keys.iter()
                .fold(0, |sum: u16, key| sum.wrapping_add(slot::slot_of(black_box(key))))
        });
    });
    group.bench_function("encode get of 16 B", |bencher| {
        bencher.iter(|| {
            out.clear();
            (0..).zip(&keys).for_each(|(id, key)| get(id, black_box(key), &mut out));
        });
    });
    group.bench_function("encode reply of 100 B", |bencher| {
        bencher.iter(|| {
            out.clear();
            (0..FRAMES).for_each(|id| found(id, black_box(&value), &mut out));
        });
    });

    out.clear();
    (0..).zip(&keys).for_each(|(id, key)| get(id, key, &mut out));
    let requests = Bytes::copy_from_slice(&out);
    let mut decoder = Decoder::new(Side::Server, limits.max_frame_len());
    group.bench_function("decode get of 16 B", |bencher| {
        bencher.iter(|| {
            decoder.feed(requests.clone());
            while let Ok(Some(frame)) = decoder.next_frame() {
                black_box(Request::decode(&frame, &limits)).expect("invariant: encoded above");
            }
        });
    });

    out.clear();
    (0..FRAMES).for_each(|id| found(id, &value, &mut out));
    let replies = Bytes::copy_from_slice(&out);
    let mut decoder = Decoder::new(Side::Client, limits.max_frame_len());
    group.bench_function("decode reply of 100 B", |bencher| {
        bencher.iter(|| {
            decoder.feed(replies.clone());
            while let Ok(Some(frame)) = decoder.next_frame() {
                black_box(Reply::decode(&frame)).expect("invariant: encoded above");
            }
        });
    });
    // As UDP payloads bring them: every datagram ends inside a frame.
    group.bench_function("decode reply of 100 B, 1200 B pieces", |bencher| {
        bencher.iter(|| {
            for at in (0..replies.len()).step_by(1200) {
                decoder.feed(replies.slice(at..replies.len().min(at + 1200)));
                while let Ok(Some(frame)) = decoder.next_frame() {
                    black_box(Reply::decode(&frame)).expect("invariant: encoded above");
                }
            }
        });
    });
    group.finish();
}

criterion_group!(benches, codec);
criterion_main!(benches);
