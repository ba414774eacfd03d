//! A shard: the meaning of commands over the [`Store`].

use crate::arena::{NIL, Ref};
use crate::command::{Command, Condition, Outcome, Victim};
use crate::config::{self, MAX_KEY_BYTES, MAX_VALUE_BYTES, Policy, ShardConfig};
use crate::digest;
use crate::entries::View;
use crate::hash::KeyHasher;
use crate::list::List;
use crate::mutants::{Mutant, active};
use crate::snapshot::{SnapshotBusy, SnapshotEntry, SnapshotHead};
use crate::stats::ShardStats;
use crate::store::{BATCH, LEVELS, Store};
use crate::version::Version;

/// Keys of a batch whose buckets are asked for together.
const HASHED: usize = 64;

/// Keys whose entries are asked for in one go. In a loop that does nothing else the processor is with several of them at a time even
/// where each misses the TLB, which a prefetch waits for.
const GROUP: usize = 16;

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
    store: Store,
    /// The log entry being applied, or last applied.
    index: u64,
    /// The position the next command of that entry gets. Past `u16::MAX` once the entry is full.
    position: u32,
    time_ms: u64,
    /// What a cut of the budget found in use, less what has been removed since: apply goes no further than this or the budget,
    /// whichever is larger, so that a cut refuses no write while victims are still being removed.
    tolerated: Tolerated,
    /// The sum of all entries' digests.
    digest: u128,
    counters: ShardStats,
}

/// Bytes and records above the budget that a cut of it left behind. A function of the log, and so part of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tolerated {
    /// By [`Shard::cost`].
    pub bytes: u64,
    /// Entries.
    pub records: u64,
}

impl Shard {
    /// How many victims one call of [`Shard::propose_victims`] offers at most: the bound of its work. Only a budget that was cut
    /// ever needs more.
    pub const MAX_VICTIMS_PER_CALL: usize = 4_096;

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
            store: Store::new(config.policy, KeyHasher::new(config.seed, mask)),
            index: 0,
            position: 0,
            time_ms: 0,
            tolerated: Tolerated::default(),
            digest: 0,
            counters: ShardStats::default(),
        }
    }

    /// The hash of a key under the shard's secret seed.
    #[inline]
    pub fn hash(&self, key: &[u8]) -> u64 {
        self.store.hash(key)
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
        self.time_ms = if active(Mutant::TimeBackwards) && time_ms > 0 {
            time_ms
        } else {
            self.time_ms.max(time_ms)
        };
        self.tolerated.bytes = self.tolerated.bytes.min(self.store.used_bytes());
        self.tolerated.records = self.tolerated.records.min(self.store.len());
    }

    /// Applies the next command of the log entry.
    ///
    /// # Panics
    /// If no log entry was begun, or it has more than 65,536 commands.
    pub fn apply(&mut self, command: &Command<'_>) -> Outcome {
        self.apply_hashed(command, self.command_hash(command))
    }

    /// [`Shard::apply`] for commands that follow one another in the log entry; `each` is called with their number and outcome, in
    /// their order.
    ///
    /// What a command will touch is fetched while those before it are applied, so that their cache misses overlap, as those of
    /// [`Shard::get_batch`] do.
    ///
    /// # Panics
    /// As [`Shard::apply`].
    pub fn apply_batch<'a>(
        &mut self,
        commands: impl IntoIterator<Item = Command<'a>>,
        mut each: impl FnMut(usize, Outcome),
    ) {
        const NOTHING: Command<'_> = Command::Evict {
            hash: 0,
            version: Version::ABSENT,
        };
        let mut commands = commands.into_iter();
        let mut first = 0;
        loop {
            let mut window = [(NOTHING, 0); BATCH];
            let mut held = 0;
            for (place, command) in window.iter_mut().zip(&mut commands) {
                let hash = self.command_hash(&command);
                self.store.prefetch_bucket(hash);
                *place = (command, hash);
                held += 1;
            }
            for &(_, hash) in &window[..held] {
                self.store.prefetch_entry(hash);
            }
            for &(_, hash) in &window[..held] {
                self.store.prefetch_neighbours(hash);
            }
            for (number, (command, hash)) in (first..).zip(&window[..held]) {
                each(number, self.apply_hashed(command, *hash));
            }
            first += held;
            if held < BATCH {
                return;
            }
        }
    }

    /// [`Shard::apply_batch`] with the hash of each command ([`Shard::command_hash`]), which lets the misses of all of them overlap.
    /// [`Shard::prefetch_index`] and [`Shard::prefetch_entries`] should have been called with them.
    ///
    /// # Panics
    /// As [`Shard::apply`], and if there are not as many hashes as commands.
    pub fn apply_batch_hashed<'a>(
        &mut self,
        commands: impl IntoIterator<Item = Command<'a>>,
        hashes: &[u64],
        mut each: impl FnMut(usize, Outcome),
    ) {
        // Group by group: while one is applied, of the next the neighbours come, and of the one after that the entries. What was
        // applied meanwhile may have moved an entry, so each step asks the index where it is now.
        let fetch_entries = |store: &Store, group: Option<&[u64]>| {
            for &hash in group.into_iter().flatten() {
                store.prefetch_ghost(hash);
                store.prefetch_entry(hash);
            }
        };
        let fetch_neighbours = |store: &Store, group: Option<&[u64]>| {
            for &hash in group.into_iter().flatten() {
                store.prefetch_neighbours(hash);
            }
        };
        let group = |number: usize| hashes.chunks(BATCH).nth(number);
        fetch_entries(&self.store, group(1));
        fetch_neighbours(&self.store, group(0));
        let mut commands = commands.into_iter();
        let mut number = 0;
        for (at, hashes) in hashes.chunks(BATCH).enumerate() {
            fetch_entries(&self.store, group(at + 2));
            fetch_neighbours(&self.store, group(at + 1));
            for &hash in hashes {
                let command = commands.next().expect("a command for each hash");
                debug_assert_eq!(hash, self.command_hash(&command), "another command's hash");
                each(number, self.apply_hashed(&command, hash));
                number += 1;
            }
        }
        assert!(commands.next().is_none(), "a hash for each command");
    }

    /// The hash of what a command is about.
    #[inline]
    pub fn command_hash(&self, command: &Command<'_>) -> u64 {
        match *command {
            Command::Put { key, .. }
            | Command::Delete { key, .. }
            | Command::Incr { key, .. }
            | Command::Touch { key, .. } => self.hash(key),
            Command::Evict { hash, .. } | Command::Expire { hash, .. } => hash,
        }
    }

    fn apply_hashed(&mut self, command: &Command<'_>, hash: u64) -> Outcome {
        assert!(self.index > 0, "apply before begin");
        let position = u16::try_from(self.position).expect("a log entry holds at most 65,536 commands");
        self.position += u32::from(!active(Mutant::PositionStuck));
        let version = Version::new(self.index, position);
        let outcome = match *command {
            Command::Put {
                key,
                value,
                expires_at_ms,
                condition,
            } => self.put(version, hash, key, value, expires_at_ms.min(MAX_EXPIRY_MS), condition),
            Command::Delete { key, condition } => self.delete(version, hash, key, condition),
            Command::Incr { key, delta } => self.incr(version, hash, key, delta),
            Command::Touch { key, expires_at_ms } => self.touch(version, hash, key, expires_at_ms.min(MAX_EXPIRY_MS)),
            Command::Evict { version: expected, .. } => self.evict(version, hash, expected),
            Command::Expire { version: expected, .. } => self.expire(version, hash, expected),
        };
        if outcome == Outcome::OutOfMemory {
            self.counters.refused += 1;
        }
        self.store.maintain();
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
    ///
    /// Buckets are asked for first, then entries, then the neighbours that a hit will write to, each before those of the keys in
    /// front have been used, so that the cache misses of a batch overlap: from some four keys on this is up to several times
    /// faster than one by one.
    pub fn get_batch<K: AsRef<[u8]>>(&mut self, keys: &[K], mut each: impl FnMut(usize, Option<EntryRef<'_>>)) {
        for (number, keys) in keys.chunks(HASHED).enumerate() {
            let mut hashes = [0; HASHED];
            let hashes = &mut hashes[..keys.len()];
            for (hash, key) in hashes.iter_mut().zip(keys) {
                *hash = self.hash(key.as_ref());
            }
            self.prefetch_index(hashes);
            self.get_batch_hashed(keys, hashes, |position, entry| each(number * HASHED + position, entry));
        }
    }

    /// [`Shard::get_batch`] with the hash of each key. [`Shard::prefetch_index`] should have been called with them.
    ///
    /// # Panics
    /// If there are not as many hashes as keys.
    pub fn get_batch_hashed<K: AsRef<[u8]>>(
        &mut self,
        keys: &[K],
        hashes: &[u64],
        mut each: impl FnMut(usize, Option<EntryRef<'_>>),
    ) {
        assert_eq!(keys.len(), hashes.len(), "a hash for each key");
        // Group by group: while one is looked up, of the next the neighbours come, and of the one after that the entries.
        let mut groups = hashes.chunks(GROUP);
        let mut guess = |store: &Store| groups.next().map_or([NIL; GROUP], |hashes| store.guess(hashes));
        let (mut next, mut after) = (guess(&self.store), guess(&self.store));
        self.store.prefetch_guessed(&next);
        for (number, (keys, hashes)) in keys.chunks(GROUP).zip(hashes.chunks(GROUP)).enumerate() {
            let guesses = next;
            next = after;
            after = guess(&self.store);
            self.store.prefetch_guessed(&next);
            for (place, ((key, &hash), guess)) in keys.iter().zip(hashes).zip(guesses).enumerate() {
                let found = self.store.find_guessed(guess, hash, key.as_ref());
                let live = found.filter(|&entry| !self.has_expired(entry));
                each(number * GROUP + place, self.count_lookup(live));
            }
        }
    }

    /// Says that keys of these hashes will be looked up or written soon: their parts of the index are fetched meanwhile.
    pub fn prefetch_index(&self, hashes: &[u64]) {
        for &hash in hashes {
            self.store.prefetch_home(hash);
        }
    }

    /// Says that keys of these hashes, whose parts of the index have come, will be looked up next: the entries of the first of them
    /// are fetched meanwhile, as many as a batch needs to be under way.
    pub fn prefetch_entries(&self, hashes: &[u64]) {
        let _: [_; GROUP] = self.store.guess(&hashes[..hashes.len().min(GROUP)]);
    }

    /// Says that a command about `key` will be applied soon: its part of the index is fetched meanwhile. Worth a call for every
    /// command of a log entry before the first of them is applied.
    #[inline]
    pub fn prefetch(&self, key: &[u8]) {
        self.store.prefetch_bucket(self.hash(key));
    }

    /// What an entry with a key and value of these lengths counts against the budget, in bytes: key and value, a 32nd of them for
    /// rounding to size classes, and 40 for header, links and index. Close to the memory it takes, and the same on every replica
    /// whatever their layout.
    pub fn cost(&self, key_len: usize, value_len: usize) -> u64 {
        config::cost(key_len, value_len)
    }

    /// Offers entries whose removal makes room for writes that are not applied yet, as `incoming_bytes` by [`Shard::cost`] and as
    /// `incoming_records`. Count everything that has been proposed to the log and not applied; entries offered before and still
    /// there are counted as gone and not offered again. Appends to `victims`, at most [`Shard::MAX_VICTIMS_PER_CALL`]; appends
    /// nothing when all fits or the policy is [`Policy::NoEvict`].
    pub fn propose_victims(&mut self, incoming_bytes: u64, incoming_records: u64, victims: &mut Vec<Victim>) {
        for _ in 0..Self::MAX_VICTIMS_PER_CALL {
            if !self.over_budget(incoming_bytes, incoming_records) {
                return;
            }
            let Some(entry) = self.store.give_up() else { return };
            victims.push(Victim {
                hash: self.store.entry_hash(entry),
                version: self.store.view(entry).version,
            });
        }
    }

    /// Offers entries whose time is at or before `now_ms`, looking at some `max_work` entries (a page of them at least; pages in
    /// which nothing is due yet count as one). Repeated calls sweep round and round; [`Progress::Done`] says that this call
    /// came to the end of a round. Entries offered before and still there are not offered again. Appends to `expired`.
    pub fn propose_expired(&mut self, now_ms: u64, max_work: usize, expired: &mut Vec<Victim>) -> Progress {
        let done = self
            .store
            .sweep(now_ms, max_work, |hash, version| expired.push(Victim { hash, version }));
        if done { Progress::Done } else { Progress::More }
    }

    /// Takes back every offer, because what was proposed will not be applied (leadership was lost). What was offered will be
    /// offered first again.
    pub fn forget_proposals(&mut self) {
        self.store.forget_offers();
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
        let mut at = cursor.0;
        loop {
            let (group, end) = self.store.group_from(at);
            let mut last = None;
            for &(hash, entry) in &group {
                // Entries of equal hash are visited together: a cursor cannot point between them.
                if (entries >= max_entries.max(1) || bytes >= max_bytes.max(1)) && last != Some(hash) {
                    return Some(Cursor(hash.wrapping_add(active(Mutant::CursorSkips).into())));
                }
                last = Some(hash);
                let view = self.store.view(entry);
                if view.key.starts_with(prefix) && !self.expired(&view) {
                    entries += 1;
                    bytes += view.key.len() + view.value.len();
                    visit(view.key, EntryRef::new(&view));
                }
            }
            work += group.len().max(1);
            at = end.checked_add(1)?;
            if work >= max_work {
                return Some(Cursor(at));
            }
        }
    }

    /// Counts entries as [`Shard::scan`] visits them, examining some `max_work`. Returns how many there were and where to go on.
    pub fn count(&self, cursor: Cursor, prefix: &[u8], max_work: usize) -> (u64, Option<Cursor>) {
        let mut count = 0;
        let next = self.scan(cursor, prefix, usize::MAX, usize::MAX, max_work, |_, _| count += 1);
        (count, next)
    }

    /// One bounded step of work that no operation needs and every one gains from: it puts a huge page behind 2 MiB of entries or
    /// of the index. Call it when the core has nothing else to do, until it says [`Progress::Done`]; after that again once the
    /// shard has grown. A step costs as much as copying 2 MiB, some 0.3 to 1 ms, and more where a hypervisor must find the memory.
    pub fn tidy(&mut self) -> Progress {
        if self.store.make_huge() {
            Progress::More
        } else {
            Progress::Done
        }
    }

    /// Begins a point-in-time image of the shard, as it is after the last command applied. Begin at the end of a log entry: the
    /// image is named by its index alone.
    ///
    /// # Errors
    /// If one is under way: a shard takes one at a time.
    pub fn snapshot_begin(&mut self) -> Result<SnapshotHead, SnapshotBusy> {
        self.store.snapshot_begin()?;
        Ok(SnapshotHead {
            index: self.index,
            time_ms: self.time_ms,
            records: self.store.len(),
            used_bytes: self.store.used_bytes(),
            state_hash: self.state_hash(),
            tolerated: self.tolerated,
        })
    }

    /// Visits the next entries of the image, some `max_records` (a page of them at least), each exactly once over all slices.
    /// [`Progress::Done`] when it is complete, or when none is under way. What changes between slices is copied first and held
    /// ([`ShardStats::snapshot_bytes`]) until the next one: take larger slices while that grows.
    pub fn snapshot_slice(&mut self, max_records: usize, visit: impl FnMut(SnapshotEntry<'_>)) -> Progress {
        if self.store.snapshot_slice(max_records, visit) {
            Progress::Done
        } else {
            Progress::More
        }
    }

    /// Gives up the image under way. The next can begin once [`Shard::snapshot_slice`], which visits nothing now, has said
    /// [`Progress::Done`].
    pub fn snapshot_abandon(&mut self) {
        self.store.snapshot_abandon();
    }

    /// Begins a shard from a snapshot. `config` is the replicated configuration at that point of the log.
    pub fn restore(config: ShardConfig, head: SnapshotHead) -> Restore {
        let mut shard = Self::new(config);
        shard.index = head.index;
        // The head is of the end of a log entry: the next begins with its own `begin`.
        shard.position = u32::from(u16::MAX) + 1;
        shard.time_ms = head.time_ms;
        shard.tolerated = head.tolerated;
        Restore {
            shard,
            levels: [List::EMPTY; LEVELS],
            head,
        }
    }

    /// Changes the budget, on every replica at the same place in the log. Nothing is removed by this: [`Shard::propose_victims`]
    /// offers what no longer fits, some with each call, and until that is gone writes may use what it frees.
    pub fn set_budget(&mut self, budget_bytes: u64, max_records: Option<u64>) {
        self.config.budget_bytes = budget_bytes;
        self.config.max_records = max_records;
        self.tolerated = match self.config.policy {
            Policy::NoEvict => Tolerated::default(),
            Policy::Lru | Policy::S3Fifo => Tolerated {
                bytes: self.store.used_bytes(),
                records: self.store.len(),
            },
        };
    }

    /// The configuration in force.
    pub fn config(&self) -> &ShardConfig {
        &self.config
    }

    /// Counters and gauges.
    pub fn stats(&self) -> ShardStats {
        ShardStats {
            records: self.store.len(),
            used_bytes: self.store.used_bytes(),
            budget_bytes: self.config.budget_bytes,
            max_records: self.config.max_records,
            resident_bytes: self.store.resident_bytes(),
            index_bytes: self.store.index_bytes(),
            offered: self.store.offered().1,
            snapshot_bytes: self.store.image_bytes(),
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
        let (mut used, mut sum, mut records) = (0, 0u128, 0);
        let (mut at, mut previous) = (0, 0);
        loop {
            let (group, end) = self.store.group_from(at);
            for (hash, entry) in group {
                let view = self.store.view(entry);
                assert!(
                    hash >= previous && hash >= at && hash <= end,
                    "entries are not in hash order"
                );
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
                used += config::cost(view.key.len(), view.value.len());
                records += 1;
                sum = sum.wrapping_add(view_digest(&view));
            }
            let Some(next) = end.checked_add(1) else { break };
            at = next;
        }
        assert_eq!(records, self.store.len(), "the number of entries is wrong");
        assert_eq!(used, self.store.used_bytes(), "the accounting of bytes is wrong");
        assert_eq!(sum, self.digest, "the state hash is wrong");
    }

    fn put(
        &mut self,
        version: Version,
        hash: u64,
        key: &[u8],
        value: &[u8],
        expires_at_ms: u64,
        condition: Condition,
    ) -> Outcome {
        if !valid_key(key) || value.len() > self.config.max_value_bytes {
            return Outcome::InvalidSize;
        }
        let found = self.find_for_write(hash, key);
        if let Err(current) = self.holds(condition, found) {
            return Outcome::ConditionFailed { current };
        }
        self.write(version, hash, found, key, value, expires_at_ms)
    }

    fn delete(&mut self, version: Version, hash: u64, key: &[u8], condition: Condition) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
        let found = self.find_for_write(hash, key);
        match (found, self.holds(condition, found)) {
            (_, Err(current)) => Outcome::ConditionFailed { current },
            (None, Ok(())) => Outcome::NotFound,
            (Some(entry), Ok(())) => {
                self.forget(entry);
                self.store.remove(hash, entry);
                Outcome::Applied { version }
            }
        }
    }

    fn incr(&mut self, version: Version, hash: u64, key: &[u8], delta: i64) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
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

    fn touch(&mut self, version: Version, hash: u64, key: &[u8], expires_at_ms: u64) -> Outcome {
        if !valid_key(key) {
            return Outcome::InvalidSize;
        }
        let Some(entry) = self.find_for_write(hash, key) else {
            return Outcome::NotFound;
        };
        self.forget(entry);
        let entry = self.store.set_expiry(hash, entry, version, expires_at_ms);
        self.digest = self.digest.wrapping_add(view_digest(&self.store.view(entry)));
        Outcome::Applied { version }
    }

    fn evict(&mut self, version: Version, hash: u64, expected: Version) -> Outcome {
        let Some(entry) = self.store.find_version(hash, expected) else {
            return Outcome::NotFound;
        };
        self.forget(entry);
        self.store.evict(hash, entry);
        self.counters.evictions += 1;
        Outcome::Applied { version }
    }

    fn expire(&mut self, version: Version, hash: u64, expected: Version) -> Outcome {
        let Some(entry) = self.store.find_version(hash, expected) else {
            return Outcome::NotFound;
        };
        if !self.has_expired(entry) {
            return Outcome::NotFound;
        }
        self.forget(entry);
        self.store.remove(hash, entry);
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
        let old = found.map(|entry| self.store.view(entry));
        let old_cost = old.map_or(0, |old| self.cost(key.len(), old.value.len()));
        // What does not grow is never refused: it makes nothing worse, and a budget that was cut must not block updates.
        let bytes = self.store.used_bytes() - old_cost + cost;
        let over = bytes > self.ceiling(self.config.budget_bytes, self.tolerated.bytes);
        if cost > old_cost && over && !active(Mutant::BudgetIgnored) {
            return Outcome::OutOfMemory;
        }
        if let Some(max) = self.config.max_records
            && old.is_none()
            && self.store.len() >= self.ceiling(max, self.tolerated.records)
        {
            return Outcome::OutOfMemory;
        }
        let digest = digest::Key::new(key);
        if let Some(old) = old {
            let old = digest.entry(old.value, old.version.get(), old.expires_at_ms);
            self.digest = self.digest.wrapping_sub(old);
        }
        let new = digest.entry(value, version.get(), expires_at_ms);
        self.digest = self.digest.wrapping_add(new);
        match found {
            Some(entry) => {
                let costs = (old_cost, cost);
                self.store.replace(hash, entry, value, version, expires_at_ms, costs);
            }
            None => self.store.insert(hash, key, value, version, expires_at_ms),
        }
        Outcome::Applied { version }
    }

    /// How far apply may go: the budget itself where nothing is ever evicted; 2 % above it (or above what a cut of it left behind)
    /// where the leader evicts ahead of what it has in flight.
    fn ceiling(&self, budget: u64, tolerated: u64) -> u64 {
        match self.config.policy {
            Policy::NoEvict => budget,
            Policy::Lru | Policy::S3Fifo => budget.max(tolerated).saturating_add(budget / 50),
        }
    }

    fn over_budget(&self, incoming_bytes: u64, incoming_records: u64) -> bool {
        let (offered_bytes, offered_records) = self.store.offered();
        let bytes = (self.store.used_bytes() - offered_bytes).saturating_add(incoming_bytes);
        let records = (self.store.len() - offered_records).saturating_add(incoming_records);
        bytes > self.config.budget_bytes || self.config.max_records.is_some_and(|max| records > max)
    }

    /// Takes an entry out of the state hash, before it changes.
    fn forget(&mut self, entry: Ref) {
        self.digest = self.digest.wrapping_sub(view_digest(&self.store.view(entry)));
    }

    fn expired(&self, view: &View<'_>) -> bool {
        view.expires_at_ms != 0 && view.expires_at_ms <= self.time_ms
    }

    #[inline]
    fn has_expired(&self, entry: Ref) -> bool {
        let expires_at_ms = self.store.expires_at_ms(entry);
        expires_at_ms != 0 && expires_at_ms <= self.time_ms && !active(Mutant::ExpiredServed)
    }

    fn find_live(&self, hash: u64, key: &[u8]) -> Option<Ref> {
        self.store.find(hash, key).filter(|&entry| !self.has_expired(entry))
    }

    /// Finds the entry a write is about. One that has expired is removed first: presence is then a function of the log whether or
    /// not the sweep has been by.
    fn find_for_write(&mut self, hash: u64, key: &[u8]) -> Option<Ref> {
        let entry = self.store.find(hash, key)?;
        if self.has_expired(entry) {
            self.forget(entry);
            self.store.remove(hash, entry);
            self.counters.expirations += 1;
            return None;
        }
        Some(entry)
    }

    /// Checks a condition; an error holds the version there is.
    fn holds(&self, condition: Condition, found: Option<Ref>) -> Result<(), Version> {
        let expected = match condition {
            Condition::None => return Ok(()),
            Condition::IfAbsent => Version::ABSENT,
            Condition::IfVersion(expected) => expected,
        };
        let current = found.map_or(Version::ABSENT, |entry| self.store.view(entry).version);
        if current == expected || active(Mutant::ConditionIgnored) {
            Ok(())
        } else {
            Err(current)
        }
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

/// A shard that is being filled from a snapshot.
#[derive(Debug)]
pub struct Restore {
    shard: Shard,
    levels: [List; LEVELS],
    head: SnapshotHead,
}

/// A snapshot that does not add up. The shard it was to become is gone: fetch the snapshot again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Keys or values of a length no entry can have, or a version later than the snapshot.
    #[error("the snapshot holds an entry that cannot be")]
    Entry,
    /// The same key came twice.
    #[error("the snapshot holds a key twice")]
    Duplicate,
    /// Entries, their sizes or their digest are not what the head says.
    #[error("the snapshot's entries are not those its head describes")]
    Mismatch,
}

impl Restore {
    /// Adds an entry. The order does not matter, but recency is best kept if coldest come first within a degree.
    ///
    /// # Errors
    /// If the entry cannot be part of the snapshot.
    pub fn push(&mut self, entry: &SnapshotEntry<'_>) -> Result<(), RestoreError> {
        let shard = &mut self.shard;
        let possible = valid_key(entry.key)
            && entry.value.len() <= shard.config.max_value_bytes
            && !entry.version.is_absent()
            && entry.version.index() <= shard.index
            && entry.expires_at_ms <= MAX_EXPIRY_MS;
        if !possible {
            return Err(RestoreError::Entry);
        }
        let hash = shard.hash(entry.key);
        if shard.store.find(hash, entry.key).is_some() {
            return Err(RestoreError::Duplicate);
        }
        shard.store.restore(hash, entry, &mut self.levels);
        let digest = digest::entry(entry.key, entry.value, entry.version.get(), entry.expires_at_ms);
        shard.digest = shard.digest.wrapping_add(digest);
        Ok(())
    }

    /// The shard, once every entry was added.
    ///
    /// # Errors
    /// If what was added is not what the head describes.
    pub fn finish(mut self) -> Result<Shard, RestoreError> {
        let (shard, head) = (&mut self.shard, &self.head);
        shard.store.finish_restore(self.levels);
        let complete = shard.store.len() == head.records
            && shard.store.used_bytes() == head.used_bytes
            && shard.state_hash() == head.state_hash;
        if complete {
            Ok(self.shard)
        } else {
            Err(RestoreError::Mismatch)
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
