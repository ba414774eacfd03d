//! The QUIC driver without a network: a client and a server in one thread, joined by memory. One iteration is a
//! batch of requests and its replies, so the rows show what batching saves; both sides' cryptography included.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use generation_quic::Limits;

#[path = "../../src/quic/tests/common/mod.rs"]
mod common;

/// A GET of a 16-byte key, and its reply with a 100-byte value.
const REQUEST_BYTES: usize = 32;
const REPLY_BYTES: usize = 148;

fn exchange(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quic exchange");
    for batch in [1_usize, 16, 64] {
        let (mut net, server, client) = common::pair(1, Limits::default(), Limits::default());
        let stream = net.nodes[1].driver.open(client).expect("a stream");
        let (requests, replies) = (vec![1; REQUEST_BYTES * batch], vec![2; REPLY_BYTES * batch]);
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::from_parameter(batch), |bencher| {
            bencher.iter(|| {
                net.write(1, client, stream, &requests);
                net.read(0, server, stream, requests.len());
                net.write(0, server, stream, &replies);
                net.read(1, client, stream, replies.len())
            });
        });
    }
    group.finish();
}

fn handshake(criterion: &mut Criterion) {
    criterion.bench_function("quic handshake, mutual TLS, both sides", |bencher| {
        bencher.iter(|| common::pair(1, Limits::default(), Limits::default()));
    });
}

criterion_group!(benches, exchange, handshake);
criterion_main!(benches);
