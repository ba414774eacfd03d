//! Workloads and yardsticks for the shard engine: keys of 16 bytes, values of 100.

use std::time::Duration;

use generation_engine::{Command, Condition, Outcome, Policy, Progress, Shard, ShardConfig, Victim};
use hashbrown::HashTable;
use rapidhash::v3::{RapidSecrets, rapidhash_v3_seeded};

/// The length of every value.
pub const VALUE_BYTES: usize = 100;

/// Key and value together.
pub const PAYLOAD_BYTES: u64 = 16 + VALUE_BYTES as u64;

/// Tells `quick_cache` that every entry weighs the same.
#[derive(Debug, Clone)]
pub struct Payload;

impl<K, V> quick_cache::Weighter<K, V> for Payload {
    fn weight(&self, _: &K, _: &V) -> u64 {
        PAYLOAD_BYTES
    }
}

/// The CPU time of this thread: what is compared on a machine that others use too.
pub fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned() as u32)
}

/// Resident memory of this process, in bytes.
///
/// # Panics
/// Where there is no `/proc`.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = statm
        .split(' ')
        .nth(1)
        .and_then(|field| field.parse().ok())
        .expect("the second field of statm");
    pages * rustix::param::page_size() as u64
}

/// `SplitMix64` (Steele et al., OOPSLA '14).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(limit)) >> 64) as u64
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The 16-byte key number `n`.
pub fn key(n: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&n.to_le_bytes());
    key[8..].copy_from_slice(&mix(n).to_le_bytes());
    key
}

/// A shard that is its own leader: every write is preceded by the victims it needs.
#[derive(Debug)]
pub struct Leader {
    /// The shard.
    pub shard: Shard,
    index: u64,
    victims: Vec<Victim>,
    hashes: Vec<u64>,
}

impl Leader {
    /// A shard under `policy` with a budget of so many bytes.
    pub fn new(policy: Policy, budget_bytes: u64) -> Self {
        let seed = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
        let config = ShardConfig {
            budget_bytes,
            policy,
            seed,
            ..ShardConfig::default()
        };
        Self {
            shard: Shard::new(config),
            index: 0,
            victims: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// A shard that holds the keys below `entries`, with a budget for exactly those, tidied.
    pub fn filled(policy: Policy, entries: u64) -> Self {
        let mut leader = Self::new(policy, u64::MAX);
        leader
            .shard
            .set_budget(entries * leader.shard.cost(16, VALUE_BYTES), None);
        for n in 0..entries {
            leader.put(&key(n), &[n as u8; VALUE_BYTES]);
        }
        leader.settle();
        leader
    }

    /// What a node does with a core that has nothing else to do. Returns the longest step, CPU time.
    pub fn settle(&mut self) -> Duration {
        let mut longest = Duration::ZERO;
        loop {
            let before = cpu_time();
            let progress = self.shard.tidy();
            longest = longest.max(cpu_time().saturating_sub(before));
            if progress == Progress::Done {
                return longest;
            }
        }
    }

    /// Writes that arrived in one turn, as one log entry, in the steps of a node: all at the same size.
    ///
    /// # Panics
    /// If one is refused.
    pub fn put_batch<K: AsRef<[u8]>>(&mut self, keys: &[K], value: &[u8]) {
        self.index += 1;
        self.shard.begin(self.index, 0);
        self.hashes.clear();
        self.hashes.extend(keys.iter().map(|key| self.shard.hash(key.as_ref())));
        self.shard.prefetch_index(&self.hashes);
        let costs = keys
            .iter()
            .map(|key| self.shard.cost(key.as_ref().len(), value.len()))
            .sum();
        self.shard.propose_victims(costs, keys.len() as u64, &mut self.victims);
        for Victim { hash, version } in self.victims.drain(..) {
            self.shard.apply(&Command::Evict { hash, version });
        }
        self.shard.prefetch_entries(&self.hashes);
        let puts = keys.iter().map(|key| Command::Put {
            key: key.as_ref(),
            value,
            expires_at_ms: 0,
            condition: Condition::None,
        });
        self.shard.apply_batch_hashed(puts, &self.hashes, |_, outcome| {
            assert!(matches!(outcome, Outcome::Applied { .. }));
        });
    }

    /// One write, as a log entry of its own.
    ///
    /// # Panics
    /// If it is refused.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        self.index += 1;
        self.shard.begin(self.index, 0);
        self.shard.prefetch(key);
        let cost = self.shard.cost(key.len(), value.len());
        self.shard.propose_victims(cost, 1, &mut self.victims);
        for Victim { hash, version } in self.victims.drain(..) {
            self.shard.apply(&Command::Evict { hash, version });
        }
        let put = Command::Put {
            key,
            value,
            expires_at_ms: 0,
            condition: Condition::None,
        };
        assert!(matches!(self.shard.apply(&put), Outcome::Applied { .. }));
    }
}

/// hashbrown's `HashTable<u32>` over a slab of boxed entries in strict LRU order: what one would build in an afternoon.
#[derive(Debug, Default)]
pub struct SlabLru {
    table: HashTable<u32>,
    slots: Vec<Slot>,
    newest: u32,
    oldest: u32,
}

#[derive(Debug)]
struct Slot {
    entry: Box<[u8]>,
    newer: u32,
    older: u32,
}

const NIL: u32 = u32::MAX;

fn slab_hash(key: &[u8]) -> u64 {
    const SECRETS: RapidSecrets = RapidSecrets::seed(0x5eed);
    rapidhash_v3_seeded(key, &SECRETS)
}

impl SlabLru {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            newest: NIL,
            oldest: NIL,
            ..Self::default()
        }
    }

    /// One that holds the keys below `entries`.
    pub fn filled(entries: u64) -> Self {
        let mut slab = Self::new();
        for n in 0..entries {
            slab.insert(&key(n), &[n as u8; VALUE_BYTES]);
        }
        slab
    }

    /// Adds a key that is not there.
    pub fn insert(&mut self, key: &[u8; 16], value: &[u8]) {
        let slot = self.slots.len() as u32;
        let entry = [key.as_slice(), value].concat().into_boxed_slice();
        self.slots.push(Slot {
            entry,
            newer: NIL,
            older: NIL,
        });
        let slots = &self.slots;
        self.table.insert_unique(slab_hash(key), slot, |&held| {
            slab_hash(&slots[held as usize].entry[..16])
        });
        self.link(slot);
    }

    /// Looks a key up, and makes it the newest.
    pub fn get(&mut self, key: &[u8]) -> Option<&[u8]> {
        let slots = &self.slots;
        let slot = *self
            .table
            .find(slab_hash(key), |&held| slots[held as usize].entry[..16] == *key)?;
        if self.newest != slot {
            let Slot { newer, older, .. } = self.slots[slot as usize];
            self.slots[newer as usize].older = older;
            if older == NIL {
                self.oldest = newer;
            } else {
                self.slots[older as usize].newer = newer;
            }
            self.link(slot);
        }
        Some(&self.slots[slot as usize].entry[16..])
    }

    fn link(&mut self, slot: u32) {
        let newest = std::mem::replace(&mut self.newest, slot);
        self.slots[slot as usize].newer = NIL;
        self.slots[slot as usize].older = newest;
        if newest == NIL {
            self.oldest = slot;
        } else {
            self.slots[newest as usize].newer = slot;
        }
    }
}
