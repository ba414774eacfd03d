//! The shard engine beside the yardsticks, in one run. Times are CPU time of the thread.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput};
use generation_benches::engine::{Leader, PAYLOAD_BYTES, Random, SlabLru, VALUE_BYTES, cpu_time, key};
use generation_engine::Policy;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// CPU time of the thread: a neighbour on the machine costs cache, not time slices.
struct CpuTime(WallTime);

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        cpu_time()
    }

    fn end(&self, start: Duration) -> Duration {
        cpu_time().saturating_sub(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self.0.formatter()
    }
}

const BATCH: usize = 16;

/// Uniform reads in batches of 16, beside one by one.
fn get_batch_16(criterion: &mut Criterion<CpuTime>, entries: u64) {
    let mut group = criterion.benchmark_group(format!("get, batch of 16, {} M entries uniform", entries / 1_000_000));
    group.throughput(Throughput::Elements(BATCH as u64)).sample_size(30);
    let keys = |random: &mut Random| -> [[u8; 16]; BATCH] { std::array::from_fn(|_| key(random.below(entries))) };
    {
        let mut slab = SlabLru::filled(entries);
        let mut random = Random(1);
        group.bench_function("hashbrown HashTable<u32>, one by one", |bencher| {
            bencher.iter(|| {
                for key in keys(&mut random) {
                    black_box(slab.get(&key).map(|value| value[0]));
                }
            });
        });
    }
    for policy in [Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::filled(policy, entries);
        let mut random = Random(1);
        group.bench_function(BenchmarkId::new("engine", format!("{policy:?}")), |bencher| {
            bencher.iter(|| {
                leader.shard.get_batch(&keys(&mut random), |_, entry| {
                    black_box(entry.map(|entry| entry.value[0]));
                });
            });
        });
        group.bench_function(
            BenchmarkId::new("engine, one by one", format!("{policy:?}")),
            |bencher| {
                bencher.iter(|| {
                    for key in keys(&mut random) {
                        black_box(leader.shard.get(&key).map(|entry| entry.value[0]));
                    }
                });
            },
        );
    }
}

/// Writes of new keys into a full cache.
fn put_that_evicts(criterion: &mut Criterion<CpuTime>, entries: u64) {
    let mut group = criterion.benchmark_group(format!("put that evicts, {} M entries", entries / 1_000_000));
    group.throughput(Throughput::Elements(1)).sample_size(30);
    {
        let capacity = entries as usize;
        let mut cache = quick_cache::unsync::Cache::with_weighter(capacity, entries * PAYLOAD_BYTES, Payload);
        let mut n = 0;
        let mut put = |n: u64| cache.insert(key(n), vec![n as u8; VALUE_BYTES].into_boxed_slice());
        while n < entries * 2 {
            put(n);
            n += 1;
        }
        group.bench_function("quick_cache", |bencher| {
            bencher.iter(|| {
                put(n);
                n += 1;
            });
        });
    }
    for policy in [Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::filled(policy, entries);
        let mut n = entries;
        while n < entries * 2 {
            leader.put(&key(n), &[n as u8; VALUE_BYTES]);
            n += 1;
        }
        group.bench_function(BenchmarkId::new("engine", format!("{policy:?}")), |bencher| {
            bencher.iter(|| {
                leader.put(&key(n), &[n as u8; VALUE_BYTES]);
                n += 1;
            });
        });
    }
}

/// Every entry weighs the same.
#[derive(Clone)]
struct Payload;

impl<K, V> quick_cache::Weighter<K, V> for Payload {
    fn weight(&self, _: &K, _: &V) -> u64 {
        PAYLOAD_BYTES
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(CpuTime(WallTime))
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    put_that_evicts(&mut criterion, 1_000_000);
    get_batch_16(&mut criterion, 1_000_000);
    get_batch_16(&mut criterion, 10_000_000);
    criterion.final_summary();
}
