//! Figures of the shard engine that are not a time per operation: memory, the longest operation, memory under drifting sizes, and
//! what a snapshot does to reads; and ratios to the yardsticks, taken in turns with them, so that what else the machine does
//! befalls both.
//!
//! `cargo run --release -p generation-benches --example engine_figures -- ROW [MILLION ENTRIES]`
//!
//! Rows: `overhead`, `longest`, `drift`, `snapshot`, `get`, `put`; without one, all.

use std::hint::black_box;
use std::time::{Duration, Instant};

use generation_benches::engine::{
    Leader, PAYLOAD_BYTES, Payload, Random, SlabLru, VALUE_BYTES, cpu_time, key, resident_bytes,
};
use generation_engine::{Policy, Progress};
use hdrhistogram::Histogram;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A row: its name, how many million entries it is about unless told, and what prints it.
type Row = (&'static str, u64, fn(Policy, u64));

const ROWS: [Row; 6] = [
    ("overhead", 1, overhead),
    ("longest", 10, longest),
    ("drift", 1, drift),
    ("snapshot", 1, snapshot),
    ("get", 10, get),
    ("put", 1, put),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = arguments.first();
    let millions = arguments.get(1).and_then(|text| text.parse::<u64>().ok());
    for (name, usual, row) in ROWS {
        if wanted.is_none_or(|wanted| wanted == name) {
            for policy in [Policy::Lru, Policy::S3Fifo] {
                row(policy, millions.unwrap_or(usual) * 1_000_000);
            }
        }
    }
}

/// Keys of a batch: what arrives in one turn of a busy core.
const BATCH: usize = 16;

/// Runs `yardstick` and `engine`, each a round of `operations`, in turns; prints the median ratio of their CPU times.
fn in_turns(what: &str, operations: u64, mut yardstick: impl FnMut(), mut engine: impl FnMut()) {
    const ROUNDS: usize = 15;
    let time = |run: &mut dyn FnMut()| {
        let before = cpu_time();
        run();
        cpu_time().saturating_sub(before).as_nanos() as f64 / operations as f64
    };
    let mut rounds: Vec<_> = (0..ROUNDS)
        .map(|_| (time(&mut yardstick), time(&mut engine)))
        .map(|(yardstick, engine)| (yardstick / engine, yardstick, engine))
        .collect();
    rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (ratio, yardstick, engine) = rounds[ROUNDS / 2];
    println!(
        "{what}: {ratio:.2} times as fast ({:.2} to {:.2}); {yardstick:.0} ns against {engine:.0}",
        rounds[0].0,
        rounds[ROUNDS - 1].0
    );
}

/// Uniform reads, in batches, beside hashbrown one by one.
fn get(policy: Policy, entries: u64) {
    const BATCHES: u64 = 8_192;
    let draw = |random: &mut Random| -> [[u8; 16]; BATCH] { std::array::from_fn(|_| key(random.below(entries))) };
    let mut slab = SlabLru::filled(entries);
    let mut leader = Leader::filled(policy, entries);
    let (mut for_slab, mut for_engine) = (Random(1), Random(1));
    in_turns(
        &format!("get, batch of {BATCH}, {entries} entries uniform, {policy:?} beside hashbrown"),
        BATCHES * BATCH as u64,
        || {
            for _ in 0..BATCHES {
                for key in draw(&mut for_slab) {
                    black_box(slab.get(&key).map(|value| value[0]));
                }
            }
        },
        || {
            for _ in 0..BATCHES {
                leader.shard.get_batch(&draw(&mut for_engine), |_, entry| {
                    black_box(entry.map(|entry| entry.value[0]));
                });
            }
        },
    );
}

/// Writes of new keys into a full cache, one a log entry and a batch of them, beside `quick_cache`.
fn put(policy: Policy, entries: u64) {
    const BATCHES: u64 = 12_500;
    let mut cache = quick_cache::unsync::Cache::with_weighter(entries as usize, entries * PAYLOAD_BYTES, Payload);
    let mut next = 0;
    let mut insert = move |times: u64| {
        for n in next..next + times {
            cache.insert(key(n), vec![n as u8; VALUE_BYTES].into_boxed_slice());
        }
        next += times;
    };
    insert(entries * 2);
    let mut leader = Leader::filled(policy, entries);
    let mut next = entries;
    for n in entries..entries * 2 {
        leader.put(&key(n), &[n as u8; VALUE_BYTES]);
        next = n + 1;
    }
    in_turns(
        &format!("put that evicts, {entries} entries, {policy:?} beside quick_cache"),
        BATCHES * BATCH as u64,
        || insert(BATCHES * BATCH as u64),
        || {
            for n in next..next + BATCHES * BATCH as u64 {
                leader.put(&key(n), &[n as u8; VALUE_BYTES]);
            }
            next += BATCHES * BATCH as u64;
        },
    );
    in_turns(
        &format!("put that evicts, {BATCH} a log entry, {entries} entries, {policy:?} beside quick_cache"),
        BATCHES * BATCH as u64,
        || insert(BATCHES * BATCH as u64),
        || {
            for _ in 0..BATCHES {
                let keys: [[u8; 16]; BATCH] = std::array::from_fn(|at| key(next + at as u64));
                leader.put_batch(&keys, &[next as u8; VALUE_BYTES]);
                next += BATCH as u64;
            }
        },
    );
}

/// Bytes above payload, of a full cache that has turned over once.
fn overhead(policy: Policy, entries: u64) {
    let before = resident_bytes();
    let mut leader = Leader::filled(policy, entries);
    let filled = resident_bytes() - before;
    for n in entries..entries * 2 {
        leader.put(&key(n), &[n as u8; VALUE_BYTES]);
    }
    let turned = resident_bytes() - before;
    let stats = leader.shard.stats();
    let above = |bytes: u64| bytes as f64 / stats.records as f64 - PAYLOAD_BYTES as f64;
    println!(
        "bytes above payload, {policy:?}, {} entries of 16+100 B: {:.1} filled, {:.1} turned over; by the engine's own count {:.1}, of \
         which index {:.1}; charged {:.1}",
        stats.records,
        above(filled),
        above(turned),
        above(stats.resident_bytes),
        stats.index_bytes as f64 / stats.records as f64,
        above(stats.used_bytes),
    );
}

/// The longest single operation, CPU time, while growing; the CPU time of reading that clock is part of it.
fn longest(policy: Policy, entries: u64) {
    let mut leader = Leader::new(policy, u64::MAX);
    let mut times = Histogram::<u64>::new(3).expect("three digits");
    let (mut longest, mut at) = (Duration::ZERO, 0);
    for n in 0..entries {
        let before = cpu_time();
        leader.put(&key(n), &[n as u8; VALUE_BYTES]);
        let took = cpu_time().saturating_sub(before);
        times.record(took.as_nanos() as u64).expect("the histogram grows");
        if took > longest {
            (longest, at) = (took, n);
        }
    }
    println!(
        "longest operation while growing to {entries} entries, {policy:?}: {longest:?} at {at}; p50 {} ns, p99.9 {} ns, p99.999 {} ns; \
         longest step of tidying afterwards {:?}",
        times.value_at_quantile(0.5),
        times.value_at_quantile(0.999),
        times.value_at_quantile(0.99999),
        leader.settle(),
    );
}

/// Log-normal around a median, sigma 0.7, as sizes of real caches are.
fn size(random: &mut Random, median: f64) -> usize {
    let normal = (-2.0 * random.unit().max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * random.unit()).cos();
    let size = Duration::from_secs_f64((median * (0.7 * normal).exp()).clamp(1.0, 1e6));
    size.as_secs() as usize
}

/// Resident memory over the budget, 256 bytes an entry, while the median size drifts, under ten million writes.
fn drift(policy: Policy, entries: u64) {
    let before = resident_bytes();
    let budget_bytes = entries << 8;
    let mut leader = Leader::new(policy, budget_bytes);
    let mut random = Random(5);
    let value = vec![7; 1 << 20];
    let mut worst: f64 = 0.0;
    let (mut longest, mut writes) = (Duration::ZERO, 0u64);
    let medians = [100.0, 300.0, 60.0, 1_000.0];
    print!(
        "resident / budget of {} MiB while sizes drift, {policy:?}:",
        budget_bytes >> 20
    );
    for median in medians {
        let mut phase: f64 = 0.0;
        for step in 0..10_000_000 / medians.len() as u64 {
            let key = key(random.draw());
            let len = size(&mut random, median);
            let start = cpu_time();
            leader.put(&key, &value[..len]);
            longest = longest.max(cpu_time().saturating_sub(start));
            writes += 1;
            if step % 4_096 == 0 {
                phase = phase.max((resident_bytes() - before) as f64 / budget_bytes as f64);
            }
        }
        let now = (resident_bytes() - before) as f64 / budget_bytes as f64;
        print!(" {median} B {phase:.3} (end {now:.3})");
        worst = worst.max(phase);
    }
    println!("; worst {worst:.3}, {writes} writes, longest {longest:?}");
}

/// Latency of reads (nine in ten operations; the tenth is a write) before and while a snapshot runs. A turn of the core is 32
/// operations and, while one runs, a slice of the snapshot; a read that arrives in a turn may wait for the slice.
fn snapshot(policy: Policy, entries: u64) {
    const TURN: usize = 32;
    const SLICE: usize = 128;
    let mut leader = Leader::filled(policy, entries);
    let mut random = Random(9);
    let turns = entries as usize / SLICE;
    let mut report = Vec::new();
    let mut bytes = 0;
    for running in [false, true, false, true] {
        let mut reads = Histogram::<u64>::new(3).expect("three digits");
        let mut writes = Histogram::<u64>::new(3).expect("three digits");
        let mut most_copied = 0;
        if running {
            leader.shard.snapshot_begin().expect("none is under way");
        }
        for _ in 0..turns {
            if running {
                most_copied = most_copied.max(leader.shard.stats().snapshot_bytes);
                let progress = leader.shard.snapshot_slice(SLICE, |entry| bytes += entry.value.len());
                if progress == Progress::Done {
                    break;
                }
            }
            for _ in 0..TURN {
                let key = key(random.below(entries));
                let write = random.below(10) == 0;
                let start = Instant::now();
                if write {
                    leader.put(&key, &[1; VALUE_BYTES]);
                } else {
                    black_box(leader.shard.get(&key).map(|entry| entry.value[0]));
                }
                let took = start.elapsed().as_nanos() as u64;
                let times = if write { &mut writes } else { &mut reads };
                times.record(took).expect("the histogram grows");
            }
        }
        while leader.shard.snapshot_slice(1 << 20, |_| {}) == Progress::More {}
        report.push((running, reads, writes, most_copied));
    }
    for (running, reads, writes, most_copied) in &report {
        println!(
            "{policy:?}, snapshot {}: get p50 {} p99 {} p99.9 {} ns; put p50 {} p99.9 {} ns; copies held at most {} KiB",
            if *running { "running" } else { "not running" },
            reads.value_at_quantile(0.5),
            reads.value_at_quantile(0.99),
            reads.value_at_quantile(0.999),
            writes.value_at_quantile(0.5),
            writes.value_at_quantile(0.999),
            most_copied >> 10,
        );
    }
    let p999 = |at: usize| report[at].1.value_at_quantile(0.999) as f64;
    println!(
        "get p99.9 while a snapshot runs / before, {policy:?}: {:.2} and {:.2} ({bytes} bytes of values seen)",
        p999(1) / p999(0),
        p999(3) / p999(2)
    );
}
