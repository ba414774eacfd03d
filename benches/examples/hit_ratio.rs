//! Hit ratios of the engine's policies on a trace, beside simulations of the policies of the literature.
//!
//! `xz -dc web07.trace.xz | cargo run --release -p generation-benches --example hit_ratio -- FORMAT [NAME]`
//!
//! Formats: `u32be` (a big-endian 32-bit key per access), `lines` (a number a line; other lines are ignored), `blocks` (lines of
//! first block, count, two ignored), `sized` (lines of time, key, size; the size is ignored). The cache holds 1, 5, 10 and 20 % of
//! the trace's distinct keys. `engine lru` and `engine s3-fifo` are the engine itself; the others are plain simulations.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use generation_benches::engine::{Random, key};
use generation_engine::{Command, Condition, Policy, Shard, ShardConfig, Victim};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const COLUMNS: [&str; 7] = [
    "OPT",
    "engine lru",
    "SIEVE",
    "W-TinyLFU",
    "ARC",
    "S3-FIFO",
    "engine s3-fifo",
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(format) = arguments.first() else {
        eprintln!("usage: hit_ratio u32be|lines|blocks|sized [NAME] < TRACE");
        std::process::exit(2);
    };
    let name = arguments.get(1).map_or("trace", String::as_str);
    let mut input = Vec::new();
    if let Err(error) = std::io::stdin().read_to_end(&mut input) {
        eprintln!("cannot read the trace: {error}");
        std::process::exit(2);
    }
    let Some(trace) = parse(format, &input)
        .map(|raw| renumber(&raw))
        .filter(|trace| !trace.is_empty())
    else {
        eprintln!("no accesses in that format: {format}");
        std::process::exit(2);
    };
    let distinct = trace.iter().max().map_or(0, |&last| last as usize + 1);
    println!(
        "{name}: {} accesses, {distinct} distinct keys; hit ratio in per cent",
        trace.len()
    );
    println!(
        "{:>6} {}",
        "cache",
        COLUMNS.map(|column| format!("{column:>15}")).join("")
    );
    for percent in [1, 5, 10, 20] {
        let capacity = (distinct * percent / 100).max(10);
        let hits = [
            optimal(&trace, capacity),
            engine(&trace, capacity, Policy::Lru),
            sieve(&trace, distinct, capacity),
            TinyLfu::run(&trace, distinct, capacity),
            arc(&trace, distinct, capacity),
            s3_fifo(&trace, distinct, capacity),
            engine(&trace, capacity, Policy::S3Fifo),
        ];
        let ratios = hits.map(|hits| 100.0 * hits as f64 / trace.len() as f64);
        let best = ratios[1..5].iter().copied().fold(0.0, f64::max);
        println!(
            "{percent:>4} % {}   engine s3-fifo against the best of the others {:+.1}",
            ratios.map(|ratio| format!("{ratio:>15.2}")).join(""),
            ratios[6] - best
        );
    }
}

fn parse(format: &str, input: &[u8]) -> Option<Vec<u64>> {
    let lines = || {
        input
            .split(|&byte| byte == b'\n')
            .map(|line| String::from_utf8_lossy(line).into_owned())
    };
    let field = |line: &str, at: usize| line.split_whitespace().nth(at)?.parse::<u64>().ok();
    Some(match format {
        "u32be" => input
            .chunks_exact(4)
            .map(|key| u64::from(u32::from_be_bytes([key[0], key[1], key[2], key[3]])))
            .collect(),
        "lines" => lines().filter_map(|line| field(&line, 0)).collect(),
        "sized" => lines().filter_map(|line| field(&line, 1)).collect(),
        "blocks" => lines()
            .filter_map(|line| Some((field(&line, 0)?, field(&line, 1)?)))
            .flat_map(|(first, count)| first..first + count)
            .collect(),
        _ => return None,
    })
}

/// Keys from zero on, in order of first appearance.
fn renumber(raw: &[u64]) -> Vec<u32> {
    let mut numbers = BTreeMap::new();
    raw.iter()
        .map(|&key| {
            let next = numbers.len() as u32;
            *numbers.entry(key).or_insert(next)
        })
        .collect()
}

/// The engine as its leader runs it: a miss inserts, preceded by the victim it needs.
fn engine(trace: &[u32], capacity: usize, policy: Policy) -> u64 {
    let mut shard = Shard::new(ShardConfig {
        budget_bytes: 1 << 40,
        max_records: Some(capacity as u64),
        policy,
        ..ShardConfig::default()
    });
    let mut victims = Vec::new();
    for (index, &number) in (1..).zip(trace) {
        let key = key(u64::from(number));
        if shard.get(&key).is_some() {
            continue;
        }
        shard.begin(index, 0);
        shard.propose_victims(0, 1, &mut victims);
        for Victim { hash, version } in victims.drain(..) {
            shard.apply(&Command::Evict { hash, version });
        }
        shard.apply(&Command::Put {
            key: &key,
            value: b"",
            expires_at_ms: 0,
            condition: Condition::None,
        });
    }
    shard.stats().hits
}

/// Belady's: evict what is used farthest in the future.
fn optimal(trace: &[u32], capacity: usize) -> u64 {
    let distinct = trace.iter().max().map_or(0, |&last| last as usize + 1);
    let mut next = vec![usize::MAX; trace.len()];
    let mut last = vec![usize::MAX; distinct];
    for (at, &key) in trace.iter().enumerate().rev() {
        next[at] = last[key as usize];
        last[key as usize] = at;
    }
    let mut held: BTreeSet<(usize, u32)> = BTreeSet::new();
    let mut due = vec![None; distinct];
    let mut hits = 0;
    for (at, &key) in trace.iter().enumerate() {
        if let Some(was) = due[key as usize].take() {
            hits += 1;
            held.remove(&(was, key));
        }
        held.insert((next[at], key));
        due[key as usize] = Some(next[at]);
        if held.len() > capacity
            && let Some((_, victim)) = held.pop_last()
        {
            due[victim as usize] = None;
        }
    }
    hits
}

/// SIEVE (Zhang et al., NSDI '24).
fn sieve(trace: &[u32], distinct: usize, capacity: usize) -> u64 {
    let mut queue = Queue::new(distinct);
    let mut visited = vec![false; distinct];
    let mut hand = None;
    let mut hits = 0;
    for &key in trace {
        if queue.holds(key) {
            hits += 1;
            visited[key as usize] = true;
            continue;
        }
        if queue.len == capacity {
            let mut at = hand.or(queue.oldest);
            while let Some(key) = at
                && visited[key as usize]
            {
                visited[key as usize] = false;
                at = queue.newer(key).or(queue.oldest);
            }
            if let Some(victim) = at {
                hand = queue.newer(victim);
                queue.remove(victim);
            }
        }
        queue.push(key);
        visited[key as usize] = false;
    }
    hits
}

/// ARC (Megiddo and Modha, FAST '03).
fn arc(trace: &[u32], distinct: usize, capacity: usize) -> u64 {
    let [mut t1, mut t2, mut b1, mut b2] = std::array::from_fn(|_| Queue::new(distinct));
    let mut target = 0usize;
    let mut hits = 0;
    for &key in trace {
        if t1.holds(key) || t2.holds(key) {
            hits += 1;
            t1.remove(key);
            t2.remove(key);
            t2.push(key);
            continue;
        }
        let replace = |t1: &mut Queue, t2: &mut Queue, in_b2: bool, b1: &mut Queue, b2: &mut Queue, target: usize| {
            if t1.len > 0 && (t1.len > target || in_b2 && t1.len == target) {
                if let Some(victim) = t1.pop() {
                    b1.push(victim);
                }
            } else if let Some(victim) = t2.pop() {
                b2.push(victim);
            }
        };
        if b1.holds(key) {
            target = capacity.min(target + (b2.len / b1.len).max(1));
            replace(&mut t1, &mut t2, false, &mut b1, &mut b2, target);
            b1.remove(key);
            t2.push(key);
        } else if b2.holds(key) {
            target = target.saturating_sub((b1.len / b2.len).max(1));
            replace(&mut t1, &mut t2, true, &mut b1, &mut b2, target);
            b2.remove(key);
            t2.push(key);
        } else {
            if t1.len + b1.len == capacity {
                if t1.len < capacity {
                    b1.pop();
                    replace(&mut t1, &mut t2, false, &mut b1, &mut b2, target);
                } else {
                    t1.pop();
                }
            } else if t1.len + t2.len + b1.len + b2.len >= capacity {
                if t1.len + t2.len + b1.len + b2.len >= 2 * capacity {
                    b2.pop();
                }
                if t1.len + t2.len >= capacity {
                    replace(&mut t1, &mut t2, false, &mut b1, &mut b2, target);
                }
            }
            t1.push(key);
        }
    }
    hits
}

/// S3-FIFO (Yang et al., SOSP '23), with an exact ghost queue.
fn s3_fifo(trace: &[u32], distinct: usize, capacity: usize) -> u64 {
    let [mut small, mut main] = std::array::from_fn(|_| Queue::new(distinct));
    let mut ghost = Queue::new(distinct);
    let mut uses = vec![0u8; distinct];
    let small_capacity = (capacity / 10).max(1);
    let mut hits = 0;
    for &key in trace {
        if small.holds(key) || main.holds(key) {
            hits += 1;
            uses[key as usize] = (uses[key as usize] + 1).min(3);
            continue;
        }
        while small.len + main.len >= capacity {
            if small.len >= small_capacity || main.len == 0 {
                let Some(oldest) = small.pop() else { break };
                if uses[oldest as usize] > 1 {
                    uses[oldest as usize] = 0;
                    main.push(oldest);
                } else {
                    ghost.push(oldest);
                    if ghost.len > capacity * 9 / 10 {
                        ghost.pop();
                    }
                }
            } else {
                let Some(oldest) = main.pop() else { break };
                if uses[oldest as usize] > 0 {
                    uses[oldest as usize] -= 1;
                    main.push(oldest);
                }
            }
        }
        uses[key as usize] = 0;
        if ghost.holds(key) {
            ghost.remove(key);
            main.push(key);
        } else {
            small.push(key);
        }
    }
    hits
}

/// `W-TinyLFU` (Einziger et al., TOS '17): a window of 1 %, a segmented LRU of 20 % probation and 80 % protected, and a
/// count-min sketch of 4-bit counters that is halved every ten times the capacity.
struct TinyLfu {
    counters: Vec<[u8; 4]>,
    samples: usize,
    capacity: usize,
}

impl TinyLfu {
    fn run(trace: &[u32], distinct: usize, capacity: usize) -> u64 {
        let counters = vec![[0; 4]; (capacity * 4).next_power_of_two()];
        let mut sketch = Self {
            counters,
            samples: 0,
            capacity,
        };
        let [mut window, mut probation, mut protected] = std::array::from_fn(|_| Queue::new(distinct));
        let window_capacity = (capacity / 100).max(1);
        let protected_capacity = (capacity - window_capacity) * 8 / 10;
        let mut hits = 0;
        for &key in trace {
            sketch.count(key);
            if window.holds(key) {
                hits += 1;
                window.remove(key);
                window.push(key);
            } else if protected.holds(key) {
                hits += 1;
                protected.remove(key);
                protected.push(key);
            } else if probation.holds(key) {
                hits += 1;
                probation.remove(key);
                protected.push(key);
                if protected.len > protected_capacity
                    && let Some(demoted) = protected.pop()
                {
                    probation.push(demoted);
                }
            } else {
                window.push(key);
                if window.len > window_capacity
                    && let Some(candidate) = window.pop()
                {
                    if window.len + probation.len + protected.len < capacity {
                        probation.push(candidate);
                    } else if let Some(victim) = probation.oldest.or(protected.oldest)
                        && sketch.estimate(candidate) > sketch.estimate(victim)
                    {
                        probation.remove(victim);
                        protected.remove(victim);
                        probation.push(candidate);
                    }
                }
            }
        }
        hits
    }

    fn slots(&self, key: u32) -> [usize; 4] {
        let wide = key_hash(key);
        std::array::from_fn(|row| (wide.rotate_left(16 * row as u32) as usize) & (self.counters.len() - 1))
    }

    fn count(&mut self, key: u32) {
        for (row, slot) in self.slots(key).into_iter().enumerate() {
            let counter = &mut self.counters[slot][row];
            *counter = (*counter + 1).min(15);
        }
        self.samples += 1;
        if self.samples >= self.capacity * 10 {
            self.counters.iter_mut().flatten().for_each(|counter| *counter /= 2);
            self.samples /= 2;
        }
    }

    fn estimate(&self, key: u32) -> u8 {
        let slots = self.slots(key).into_iter().enumerate();
        slots.map(|(row, slot)| self.counters[slot][row]).min().unwrap_or(0)
    }
}

fn key_hash(number: u32) -> u64 {
    Random(u64::from(number)).draw()
}

/// A queue of keys with removal from the middle.
struct Queue {
    newer: Vec<u32>,
    older: Vec<u32>,
    held: Vec<bool>,
    newest: Option<u32>,
    oldest: Option<u32>,
    len: usize,
}

const NONE: u32 = u32::MAX;

impl Queue {
    fn new(distinct: usize) -> Self {
        let links = vec![NONE; distinct];
        Self {
            newer: links.clone(),
            older: links,
            held: vec![false; distinct],
            newest: None,
            oldest: None,
            len: 0,
        }
    }

    fn holds(&self, key: u32) -> bool {
        self.held[key as usize]
    }

    fn newer(&self, key: u32) -> Option<u32> {
        Some(self.newer[key as usize]).filter(|&key| key != NONE)
    }

    fn push(&mut self, key: u32) {
        self.remove(key);
        self.older[key as usize] = self.newest.unwrap_or(NONE);
        self.newer[key as usize] = NONE;
        if let Some(newest) = self.newest {
            self.newer[newest as usize] = key;
        } else {
            self.oldest = Some(key);
        }
        self.newest = Some(key);
        self.held[key as usize] = true;
        self.len += 1;
    }

    fn pop(&mut self) -> Option<u32> {
        let oldest = self.oldest?;
        self.remove(oldest);
        Some(oldest)
    }

    fn remove(&mut self, key: u32) {
        if !std::mem::take(&mut self.held[key as usize]) {
            return;
        }
        let link = |key: u32| (key != NONE).then_some(key);
        let (newer, older) = (link(self.newer[key as usize]), link(self.older[key as usize]));
        match newer {
            Some(newer) => self.older[newer as usize] = older.unwrap_or(NONE),
            None => self.newest = older,
        }
        match older {
            Some(older) => self.newer[older as usize] = newer.unwrap_or(NONE),
            None => self.oldest = newer,
        }
        self.len -= 1;
    }
}
