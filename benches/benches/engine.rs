//! The shard engine beside the yardsticks, in one run. Times are CPU time of the thread.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput};
use generation_benches::engine::{Leader, PAYLOAD_BYTES, Payload, Random, SlabLru, VALUE_BYTES, cpu_time, key};
use generation_engine::{Policy, Progress};

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

/// Writes of new keys into a full cache: one a log entry, and what a turn of a busy core brings.
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
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function(
            BenchmarkId::new("engine, 16 a log entry", format!("{policy:?}")),
            |bencher| {
                bencher.iter(|| {
                    let keys: [[u8; 16]; BATCH] = std::array::from_fn(|at| key(n + at as u64));
                    leader.put_batch(&keys, &[n as u8; VALUE_BYTES]);
                    n += BATCH as u64;
                });
            },
        );
        group.throughput(Throughput::Elements(1));
    }
}

/// A growing shard: the mean of a put, splits and fresh memory included. The longest one is the example `engine_figures longest`.
fn put_while_growing(criterion: &mut Criterion<CpuTime>) {
    let mut group = criterion.benchmark_group("put while growing");
    group.throughput(Throughput::Elements(1)).sample_size(10);
    for policy in [Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::new(policy, u64::MAX);
        let mut n = 0;
        group.bench_function(BenchmarkId::new("engine", format!("{policy:?}")), |bencher| {
            bencher.iter(|| {
                leader.put(&key(n), &[n as u8; VALUE_BYTES]);
                n += 1;
            });
        });
    }
}

/// Reads, nine in ten operations, before and while a snapshot runs, a slice of it every 32 operations.
fn get_while_a_snapshot_runs(criterion: &mut Criterion<CpuTime>, entries: u64) {
    const TURN: u64 = 32;
    const SLICE: usize = 128;
    let mut group = criterion.benchmark_group(format!(
        "90 % get, 10 % put, {} M entries, a snapshot",
        entries / 1_000_000
    ));
    group.throughput(Throughput::Elements(TURN)).sample_size(30);
    for policy in [Policy::Lru, Policy::S3Fifo] {
        let mut leader = Leader::filled(policy, entries);
        let mut random = Random(9);
        for running in [false, true] {
            let name = if running { "running" } else { "not running" };
            group.bench_function(BenchmarkId::new(name, format!("{policy:?}")), |bencher| {
                bencher.iter(|| {
                    if running && leader.shard.snapshot_slice(SLICE, |_| {}) == Progress::Done {
                        leader.shard.snapshot_begin().expect("none is under way");
                    }
                    for _ in 0..TURN {
                        let key = key(random.below(entries));
                        if random.below(10) == 0 {
                            leader.put(&key, &[1; VALUE_BYTES]);
                        } else {
                            black_box(leader.shard.get(&key).map(|entry| entry.value[0]));
                        }
                    }
                });
            });
        }
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
    put_while_growing(&mut criterion);
    get_while_a_snapshot_runs(&mut criterion, 1_000_000);
    criterion.final_summary();
}
