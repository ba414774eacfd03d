//! A shard: the meaning of commands over the [`Store`].

use crate::command::{Command, Condition, Outcome, Victim};
use crate::config::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Policy, ShardConfig};
use crate::digest;
use crate::hash::KeyHasher;
use crate::stats::ShardStats;
use crate::store::{Ref, Store, View};
use crate::version::Version;

/// What an entry costs beyond its key and value: header, links, index share.
const ENTRY_OVERHEAD_BYTES: u64 = 40;

/// The share of key and value that is charged for rounding to size classes, as a divisor.
const ROUNDING_SHARE: u64 = 32;

/// Expiry times keep 48 bits.
const MAX_EXPIRY_MS: u64 = (1 << 48) - 1;

/// An entry as a reader sees it. It borrows from the shard: copy what you keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef<'a> {
    /// The value.
    pub value: &'a [u8],
    /// Where it was last written.
    pub version: Version,
    /// Unix milliseconds of shard time from which it is gone; 0 = never.
    pub expires_at_ms: u64,
}

impl<'a> EntryRef<'a> {
    fn new(view: &View<'a>) -> Self {
        Self {
            value: view.value,
            version: view.version,
            expires_at_ms: view.expires_at_ms,
        }
    }
}

/// Whether a bounded piece of work has come to the end of its round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do: call again, on a later turn.
    More,
    /// The round is complete.
    Done,
}

/// A position in hash order: everything before it has been visited. It holds on every replica with the same seed, and across
/// inserts, deletes, growth and failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Cursor(u64);

impl Cursor {
    /// Before everything.
    pub const START: Self = Self(0);

    /// The cursor as it travels on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl From<u64> for Cursor {
    fn from(raw: u64) -> Self {
        Self(raw)
    }
}

/// One shard's replicated state machine.
#[derive(Debug)]
pub struct Shard {
    config: ShardConfig,
    hasher: KeyHasher,
    store: Store,
    /// The log entry being applied, or last applied.
    index: u64,
    /// The position the next command of that entry gets. Past `u16::MAX` once the entry is full.
    position: u32,
    time_ms: u64,
    used_bytes: u64,
    /// The sum of all entries' digests.
    digest: u128,
    /// Where the expiry sweep goes on.
    sweep: usize,
    offers: Offers,
    counters: ShardStats,
}

/// Entries offered for removal and not yet removed or changed.
#[derive(Debug, Default)]
struct Offers {
    bytes: u64,
    records: u64,
}

impl Shard {
    /// An empty shard, before the first log entry.
    ///
    /// # Panics
    /// If `max_value_bytes` is above [`MAX_VALUE_BYTES`].
    pub fn new(config: ShardConfig) -> Self {
        Self::with_hash_mask(config, u64::MAX)
    }

    /// A shard whose hashes have only the bits of `mask`: a bad hash function, for tests of collisions.
    #[doc(hidden)]
    pub fn with_hash_mask(config: ShardConfig, mask: u64) -> Self {
        assert!(
            config.max_value_bytes <= MAX_VALUE_BYTES,
            "max_value_bytes is above the engine's limit"
        );
        Self {
            config,
            hasher: KeyHasher::new(config.seed, mask),
            store: Store::new(),
            index: 0,
            position: 0,
            time_ms: 0,
            used_bytes: 0,
            digest: 0,
            sweep: 0,
            offers: Offers::default(),
            counters: ShardStats::default(),
        }
    }

    /// The hash of a key under the shard's secret seed.
    #[inline]
    pub fn hash(&self, key: &[u8]) -> u64 {
        self.hasher.hash(key)
    }

    /// Starts the log entry `index`, stamped `time_ms` by the leader. Shard time becomes the larger of both. An entry may hold no
    /// command at all: that advances time alone.
    ///
    /// # Panics
    /// If `index` does not grow (a log entry must not be applied twice) or is above [`Version::MAX_INDEX`].
    pub fn begin(&mut self, index: u64, time_ms: u64) {
        assert!(
            index > self.index,
            "log entry {index} after {}: entries are applied once and in order",
            self.index
        );
        assert!(index <= Version::MAX_INDEX, "the log index has passed 48 bits");
        self.index = index;
        self.position = 0;
        self.time_ms = self.time_ms.max(time_ms);
    }

    /// Applies the next command of the log entry.
    ///
    /// # Panics
    /// If no log entry was begun, or it has more than 65,536 commands.
    pub fn apply(&mut self, command: &Command<'_>) -> Outcome {
        assert!(self.index > 0, "apply before begin");
        let position = u16::try_from(self.position).expect("a log entry holds at most 65,536 commands");
        self.position += 1;
        let version = Version::new(self.index, position);
        let outcome = match *command {
            Command::Put {
                key,
                value,
                expires_at_ms,
                condition,
            } => self.put(version, key, value, expires_at_ms.min(MAX_EXPIRY_MS), condition),
            Command::Delete { key, condition } => self.delete(version, key, condition),
            Command::Incr { key, delta } => self.incr(version, key, delta),
            Command::Touch { key, expires_at_ms } => self.touch(version, key, expires_at_ms.min(MAX_EXPIRY_MS)),
            Command::Evict {
                hash,
                version: expected,
            } => self.evict(version, hash, expected),
            Command::Expire {
                hash,
                version: expected,
            } => self.expire(version, hash, expected),
        };
        if outcome == Outcome::OutOfMemory {
            self.counters.refused += 1;
        }
        outcome
    }

    /// The log entry begun last; 0 before the first.
    pub fn applied_index(&self) -> u64 {
        self.index
    }

    /// Shard time: replicated, monotonic, in Unix milliseconds.
    pub fn shard_time_ms(&self) -> u64 {
        self.time_ms
    }

    /// Looks a key up, and counts it as used. `None` if it is absent or expired by shard time. The caller compares
    /// [`EntryRef::expires_at_ms`] with its own clock, which may be ahead of shard time.
    pub fn get(&mut self, key: &[u8]) -> Option<EntryRef<'_>> {
        let found = self.find_live(self.hash(key), key);
        self.count_lookup(found)
    }

    /// Looks a key up and leaves no trace.
    pub fn peek(&self, key: &[u8]) -> Option<EntryRef<'_>> {
        let entry = self.find_live(self.hash(key), key)?;
        Some(EntryRef::new(&self.store.view(entry)))
    }

    /// [`Shard::get`] for many keys at once; `each` is called with the position of the key and its entry, in order of `keys`.
    pub fn get_batch<K: AsRef<[u8]>>(&mut self, keys: &[K], mut each: impl FnMut(usize, Option<EntryRef<'_>>)) {
        for (position, key) in keys.iter().enumerate() {
            each(position, self.get(key.as_ref()));
        }
    }

    /// What an entry with a key and value of these lengths counts against the budget, in bytes: key and value, a 32nd of them for
    /// rounding to size classes, and 40 for header, links and index. Close to the memory it takes, and the same on every replica
    /// whatever their layout.
    pub fn cost(&self, key_len: usize, value_len: usize) -> u64 {
        let payload = (key_len + value_len) as u64;
        payload + payload / ROUNDING_SHARE + ENTRY_OVERHEAD_BYTES
    }

    /// Offers entries whose removal makes room for writes that are not applied yet, as `incoming_bytes` by [`Shard::cost`] and as
    /// `incoming_records`. Count everything that has been proposed to the log and not applied; entries offered before and still
    /// there are counted as gone and not offered again. Appends to `victims`; appends nothing when all fits or the policy is
    /// [`Policy::NoEvict`].
    pub fn propose_victims(&mut self, incoming_bytes: u64, incoming_records: u64, victims: &mut Vec<Victim>) {
        if self.config.policy == Policy::NoEvict {
            return;
        }
        let mut next = self.store.oldest();
        while self.over_budget(incoming_bytes, incoming_records) {
            let Some(entry) = next else { return };
            next = self.store.next_oldest(entry);
            let view = self.store.view(entry);
            if !view.offered {
                victims.push(Victim {
                    hash: self.hasher.hash(view.key),
                    version: view.version,
                });
                self.offer(entry);
            }
        }
    }

    /// Offers entries whose time is at or before `now_ms`, examining at most some `max_work` entries (one at least). Repeated
    /// calls sweep round and round; [`Progress::Done`] says that this call came to the end of a round. Entries offered before and
    /// still there are not offered again. Appends to `expired`.
    pub fn propose_expired(&mut self, now_ms: u64, max_work: usize, expired: &mut Vec<Victim>) -> Progress {
        for _ in 0..max_work.max(1) {
            if self.sweep >= self.store.slots() {
                self.sweep = 0;
                return Progress::Done;
            }
            if let Some((hash, entry)) = self.store.live(self.sweep) {
                let view = self.store.view(entry);
                if view.expires_at_ms != 0 && view.expires_at_ms <= now_ms && !view.offered {
                    expired.push(Victim {
                        hash,
                        version: view.version,
                    });
                    self.offer(entry);
                }
            }
            self.sweep += 1;
        }
        Progress::More
    }

    /// Forgets which entries were offered, because what was proposed will not be applied (leadership was lost).
    pub fn forget_proposals(&mut self) {
        for slot in 0..self.store.slots() {
            if let Some((_, entry)) = self.store.live(slot) {
                self.store.set_offered(entry, false);
            }
        }
        self.offers = Offers::default();
    }

    /// Visits entries in hash order from `cursor` on, those whose key starts with `prefix` and that are not expired by shard time.
    /// Stops once `max_entries` were visited, or their keys and values come to `max_bytes` (the entry that passes it is
    /// visited: one at least), or `max_work` entries were examined. Returns where to go on, `None` at the end.
    ///
    /// An entry that is present throughout a scan is visited at least once. `max_work` is rounded up to a group of entries that
    /// lie together in the index (under a thousand).
    pub fn scan(
        &self,
        cursor: Cursor,
        prefix: &[u8],
        max_entries: usize,
        max_bytes: usize,
        max_work: usize,
        mut visit: impl FnMut(&[u8], EntryRef<'_>),
    ) -> Option<Cursor> {
        let (mut entries, mut bytes, mut work) = (0, 0, 0);
        let mut last = None;
        for (hash, entry) in self.store.in_hash_order(cursor.0) {
            // Entries of equal hash are visited together: a cursor cannot point between them.
            let full = entries >= max_entries.max(1) || bytes >= max_bytes.max(1) || work >= max_work.max(1);
            if full && last != Some(hash) {
                return Some(Cursor(hash));
            }
            last = Some(hash);
            work += 1;
            let view = self.store.view(entry);
            if view.key.starts_with(prefix) && !self.expired(&view) {
                entries += 1;
                bytes += view.key.len() + view.value.len();
                visit(view.key, EntryRef::new(&view));
            }
        }
        None
    }

    /// Counts entries as [`Shard::scan`] visits them, examining some `max_work`. Returns how many there were and where to go on.
    pub fn count(&self, cursor: Cursor, prefix: &[u8], max_work: usize) -> (u64, Option<Cursor>) {
        let mut count = 0;
        let next = self.scan(cursor, prefix, usize::MAX, usize::MAX, max_work, |_, _| count += 1);
        (count, next)
    }

    /// Changes the budget. Nothing is removed by this: [`Shard::propose_victims`] offers what no longer fits.
    pub fn set_budget(&mut self, budget_bytes: u64, max_records: Option<u64>) {
        self.config.budget_bytes = budget_bytes;
        self.config.max_records = max_records;
    }

    /// The configuration in force.
    pub fn config(&self) -> &ShardConfig {
        &self.config
    }

    /// Counters and gauges.
    pub fn stats(&self) -> ShardStats {
        ShardStats {
            records: self.store.len(),
            used_bytes: self.used_bytes,
            budget_bytes: self.config.budget_bytes,
            max_records: self.config.max_records,
            resident_bytes: self.store.resident_bytes(),
            index_bytes: self.store.index_bytes(),
            offered: self.offers.records,
            ..self.counters
        }
    }

    /// An order-independent digest of all entries (key, value, version, expiry) and shard time. Replicas that have applied the
    /// same log have the same; it is maintained with each write, so asking costs nothing.
    pub fn state_hash(&self) -> u128 {
        digest::shard(self.digest, self.time_ms)
    }

    /// Validates the whole state against its invariants. Takes time proportional to it.
    ///
    /// # Panics
    /// On a broken invariant: a bug, or broken memory.
    pub fn check(&self) {
        self.store.check();
        let (mut used, mut sum, mut offered, mut records) = (0, 0u128, Offers::default(), 0);
        let mut previous = 0;
        for (hash, entry) in self.store.in_hash_order(0) {
            let view = self.store.view(entry);
            assert!(hash >= previous, "entries are not in hash order");
            previous = hash;
            assert_eq!(hash, self.hash(view.key), "an entry is filed under another hash");
            assert_eq!(
                self.store.find(hash, view.key),
                Some(entry),
                "an entry is not found by its key"
            );
            assert!(
                view.version <= Version::new(self.index, u16::MAX),
                "an entry is newer than the log"
            );
            let cost = self.cost(view.key.len(), view.value.len());
            used += cost;
            records += 1;
            sum = sum.wrapping_add(view_digest(&view));
            if view.offered {
                offered.bytes += cost;
                offered.records += 1;
            }
        }
        assert_eq!(records, self.store.len(), "the number of entries is wrong");
        assert_eq!(used, self.used_bytes, "the accounting of bytes is wrong");
        assert_eq!(sum, self.digest, "the state hash is wrong");
        assert_eq!(
            offered.bytes, self.offers.bytes,
            "the accounting of offered bytes is wrong"
        );
        assert_eq!(
            offered.records, self.offers.records,
            "the number of offered entries is wrong"
        );
    }

    fn put(&mut self, version: Version, key: &[u8], value: &[u8], expires_at_ms: u64, condition: Condition) -> Outcome {
        if !valid_key(key) || value.len() > self.config.max_value_bytes {
            return Outcome::InvalidSize;
        }
        let hash = self.hash(key);
        let found = self.find_for_write(hash, key);
        if let Err(current) = self.holds(condition, found) {
            return Outcome::ConditionFailed { current };
        }
        self.write(version, hash, found, key, value, expires_at_ms)
    }

    fn delete(&mut self, version: Version, key: &[u8], condition: Condition) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
        let found = self.find_for_write(self.hash(key), key);
        match (found, self.holds(condition, found)) {
            (_, Err(current)) => Outcome::ConditionFailed { current },
            (None, Ok(())) => Outcome::NotFound,
            (Some(entry), Ok(())) => {
                self.remove(entry);
                Outcome::Applied { version }
            }
        }
    }

    fn incr(&mut self, version: Version, key: &[u8], delta: i64) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
        let hash = self.hash(key);
        let found = self.find_for_write(hash, key);
        let (old, expires_at_ms) = match found {
            None => (0, 0),
            Some(entry) => {
                let view = self.store.view(entry);
                let Some(old) = parse_counter(view.value) else {
                    return Outcome::NotANumber;
                };
                (old, view.expires_at_ms)
            }
        };
        let Some(value) = old.checked_add(delta) else {
            return Outcome::Overflow;
        };
        let text = value.to_string();
        if text.len() > self.config.max_value_bytes {
            return Outcome::InvalidSize;
        }
        match self.write(version, hash, found, key, text.as_bytes(), expires_at_ms) {
            Outcome::Applied { version } => Outcome::Counter { version, value },
            refused => refused,
        }
    }

    fn touch(&mut self, version: Version, key: &[u8], expires_at_ms: u64) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
        let Some(entry) = self.find_for_write(self.hash(key), key) else {
            return Outcome::NotFound;
        };
        self.forget(entry);
        self.store.set_expiry(entry, version, expires_at_ms);
        self.digest = self.digest.wrapping_add(view_digest(&self.store.view(entry)));
        Outcome::Applied { version }
    }

    fn evict(&mut self, version: Version, hash: u64, expected: Version) -> Outcome {
        let Some(entry) = self.store.find_version(hash, expected) else {
            return Outcome::NotFound;
        };
        self.remove(entry);
        self.counters.evictions += 1;
        Outcome::Applied { version }
    }

    fn expire(&mut self, version: Version, hash: u64, expected: Version) -> Outcome {
        let Some(entry) = self.store.find_version(hash, expected) else {
            return Outcome::NotFound;
        };
        if !self.expired(&self.store.view(entry)) {
            return Outcome::NotFound;
        }
        self.remove(entry);
        self.counters.expirations += 1;
        Outcome::Applied { version }
    }

    /// Inserts or replaces, if the budget allows.
    fn write(
        &mut self,
        version: Version,
        hash: u64,
        found: Option<Ref>,
        key: &[u8],
        value: &[u8],
        expires_at_ms: u64,
    ) -> Outcome {
        let cost = self.cost(key.len(), value.len());
        let (old_cost, old_records) = match found {
            Some(entry) => (self.cost(key.len(), self.store.view(entry).value.len()), 1),
            None => (0, 0),
        };
        // What does not grow is never refused: it makes nothing worse, and a budget that was cut must not block updates.
        let bytes = self.used_bytes - old_cost + cost;
        if cost > old_cost && bytes > self.ceiling(self.config.budget_bytes) {
            return Outcome::OutOfMemory;
        }
        if let Some(max) = self.config.max_records
            && old_records == 0
            && self.store.len() >= self.ceiling(max)
        {
            return Outcome::OutOfMemory;
        }
        match found {
            Some(entry) => {
                self.forget(entry);
                self.store.replace(entry, value, version, expires_at_ms);
            }
            None => self.store.insert(hash, key, value, version, expires_at_ms),
        }
        self.used_bytes = bytes;
        self.digest = self
            .digest
            .wrapping_add(digest::entry(key, value, version.get(), expires_at_ms));
        Outcome::Applied { version }
    }

    /// How far apply may go: the budget itself where nothing is ever evicted; 2 % above where the leader evicts ahead of what it
    /// has in flight.
    fn ceiling(&self, budget: u64) -> u64 {
        match self.config.policy {
            Policy::NoEvict => budget,
            Policy::Lru | Policy::S3Fifo => budget.saturating_add(budget / 50),
        }
    }

    fn over_budget(&self, incoming_bytes: u64, incoming_records: u64) -> bool {
        let bytes = (self.used_bytes - self.offers.bytes).saturating_add(incoming_bytes);
        let records = (self.store.len() - self.offers.records).saturating_add(incoming_records);
        bytes > self.config.budget_bytes || self.config.max_records.is_some_and(|max| records > max)
    }

    /// Takes an entry out of everything that is summed over entries, before it changes.
    fn forget(&mut self, entry: Ref) {
        let view = self.store.view(entry);
        self.digest = self.digest.wrapping_sub(view_digest(&view));
        if view.offered {
            self.offers.bytes -= self.cost(view.key.len(), view.value.len());
            self.offers.records -= 1;
        }
    }

    fn offer(&mut self, entry: Ref) {
        let view = self.store.view(entry);
        self.offers.bytes += self.cost(view.key.len(), view.value.len());
        self.offers.records += 1;
        self.store.set_offered(entry, true);
    }

    fn remove(&mut self, entry: Ref) {
        self.forget(entry);
        let view = self.store.view(entry);
        self.used_bytes -= self.cost(view.key.len(), view.value.len());
        self.store.remove(entry);
    }

    fn expired(&self, view: &View<'_>) -> bool {
        view.expires_at_ms != 0 && view.expires_at_ms <= self.time_ms
    }

    fn find_live(&self, hash: u64, key: &[u8]) -> Option<Ref> {
        self.store
            .find(hash, key)
            .filter(|&entry| !self.expired(&self.store.view(entry)))
    }

    /// Finds the entry a write is about. One that has expired is removed first: presence is then a function of the log whether or
    /// not the sweep has been by.
    fn find_for_write(&mut self, hash: u64, key: &[u8]) -> Option<Ref> {
        let entry = self.store.find(hash, key)?;
        if self.expired(&self.store.view(entry)) {
            self.remove(entry);
            self.counters.expirations += 1;
            return None;
        }
        Some(entry)
    }

    /// Checks a condition; an error holds the version there is.
    fn holds(&self, condition: Condition, found: Option<Ref>) -> Result<(), Version> {
        let current = found.map_or(Version::ABSENT, |entry| self.store.view(entry).version);
        let expected = match condition {
            Condition::None => return Ok(()),
            Condition::IfAbsent => Version::ABSENT,
            Condition::IfVersion(expected) => expected,
        };
        if current == expected { Ok(()) } else { Err(current) }
    }

    fn count_lookup(&mut self, found: Option<Ref>) -> Option<EntryRef<'_>> {
        if let Some(entry) = found {
            self.counters.hits += 1;
            self.store.touch(entry);
            Some(EntryRef::new(&self.store.view(entry)))
        } else {
            self.counters.misses += 1;
            None
        }
    }
}

fn view_digest(view: &View<'_>) -> u128 {
    digest::entry(view.key, view.value, view.version.get(), view.expires_at_ms)
}

/// Reads a counter as `i64::to_string` writes it: no plus sign, no leading zero, no space.
fn parse_counter(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', ..] => digits.len() <= 19,
        _ => false,
    };
    if !canonical {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

fn valid_key(key: &[u8]) -> bool {
    !key.is_empty() && key.len() <= MAX_KEY_BYTES
}
