//! Figures of the shard engine that are not a time per operation: memory, the longest operation, memory under drifting sizes, and
//! what a snapshot does to reads.
//!
//! `cargo run --release -p generation-benches --example engine_figures -- [overhead|longest|drift|snapshot] [MILLION ENTRIES]`

use std::hint::black_box;
use std::time::{Duration, Instant};

use generation_benches::engine::{Leader, PAYLOAD_BYTES, Random, VALUE_BYTES, cpu_time, key, resident_bytes};
use generation_engine::{Policy, Progress};
use hdrhistogram::Histogram;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let what = arguments.first().map_or("all", String::as_str);
    let millions = arguments.get(1).and_then(|text| text.parse::<u64>().ok());
    let entries = |default: u64| millions.unwrap_or(default) * 1_000_000;
    let all = what == "all";
    if all || what == "overhead" {
        for policy in [Policy::Lru, Policy::S3Fifo] {
            overhead(policy, entries(1));
        }
    }
    if all || what == "longest" {
        for policy in [Policy::Lru, Policy::S3Fifo] {
            longest(policy, entries(10));
        }
    }
    if all || what == "drift" {
        for policy in [Policy::Lru, Policy::S3Fifo] {
            drift(policy, 256 << 20);
        }
    }
    if all || what == "snapshot" {
        for policy in [Policy::Lru, Policy::S3Fifo] {
            snapshot(policy, entries(1));
        }
    }
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
        "longest operation while growing to {entries} entries, {policy:?}: {longest:?} at {at}; p50 {} ns, p99.9 {} ns, p99.999 {} ns",
        times.value_at_quantile(0.5),
        times.value_at_quantile(0.999),
        times.value_at_quantile(0.99999),
    );
}

/// Log-normal around a median, sigma 0.7, as sizes of real caches are.
fn size(random: &mut Random, median: f64) -> usize {
    let normal = (-2.0 * random.unit().max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * random.unit()).cos();
    let size = Duration::from_secs_f64((median * (0.7 * normal).exp()).clamp(1.0, 1e6));
    size.as_secs() as usize
}

/// Resident memory over the budget while the median size drifts, under ten million writes.
fn drift(policy: Policy, budget_bytes: u64) {
    let before = resident_bytes();
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
