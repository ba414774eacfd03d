//! The entries of one shard in memory: found by key, kept in the order the policy wants, moved when memory is spread too thinly.
//! It knows no semantics: no conditions, no time, no budget.
//!
//! Both policies live on one store. A hit under strict LRU moves the entry to the end of a list; under S3-FIFO it sets two bits,
//! and the lists are its two queues. Everything else (index, arena, migration, sweep, snapshots) is shared.
//!
//! Invariants ([`Store::check`]): every live slot is in the index once and in the one list its flags name; without a snapshot
//! under way all entries have the store's parity.

use crate::arena::{NEVER, NIL, Ref};
use crate::config::{Policy, cost};
use crate::cpu;
use crate::entries::{Entries, View, coarse};
use crate::entry::{self, MAIN, OFFERED, PARITY};
use crate::ghost::Ghost;
use crate::hash::KeyHasher;
use crate::index::{Entries as _, Index};
use crate::list::List;
use crate::memo::HashMemo;
use crate::snapshot::{Snapshot, SnapshotBusy, SnapshotEntry};
use crate::version::Version;

/// Where an entry is listed: under LRU all are in the first; under S3-FIFO that is the small queue.
const FIRST: usize = 0;
/// S3-FIFO's main queue.
const SECOND: usize = 1;
/// Offered for removal, in the order they were offered.
const GIVEN_UP: usize = 2;

/// S3-FIFO: the small queue's share of the bytes, as a divisor.
const SMALL_SHARE: u64 = 10;
/// S3-FIFO: uses that take an entry from the small queue to the main one.
const PROMOTE_AT: u8 = 2;
/// S3-FIFO: how many entries may be passed over in search of a victim before one is taken regardless: the bound of the work.
const MAX_PASSED_OVER: u32 = 64;

/// S3-FIFO: while the bytes held differ from what they were when a victim was last chosen by more than this share (as a divisor),
/// the store is filling up.
const FILLING_SHARE: u64 = 16;

/// How many victims are fetched ahead: a log entry's worth.
const SCOUT_AHEAD: u32 = 24;

/// How many commands of a log entry are fetched together: enough to overlap their cache misses, few enough for the line fill
/// buffers.
pub(crate) const BATCH: usize = 16;

/// How many degrees of recency a snapshot tells apart.
pub(crate) const LEVELS: usize = SnapshotEntry::HOTTEST as usize + 1;

/// Entries moved per write while memory is being packed.
const MOVES_PER_WRITE: usize = 4;

/// Strict LRU's approximate ages, for snapshots: entries carry the number (modulo 8) of the generation that last used them, and a
/// generation is over when a quarter of all entries have been used in it.
#[derive(Debug, Default)]
struct Age {
    generation: u8,
    used: u64,
}

/// How far the first list has been fetched ahead of the choice of victims. The list can be followed only as fast as memory answers,
/// a miss an entry; so it is followed by a step with each write, long before the entries are wanted.
#[derive(Debug, Clone, Copy)]
struct Scout {
    /// The last entry that was asked for; [`NIL`] = none.
    entry: Ref,
    /// How many of the oldest entries have been asked for, about.
    ahead: u32,
}

impl Scout {
    const HOME: Self = Self { entry: NIL, ahead: 0 };
}

#[derive(Debug)]
pub(crate) struct Store {
    policy: Policy,
    entries: Entries,
    index: Index,
    lists: [List; 3],
    /// The sum of costs in each list.
    bytes: [u64; 3],
    /// The number of entries in each list.
    records: [u64; 3],
    ghost: Ghost,
    /// S3-FIFO: bytes in its queues when a victim was last chosen.
    full_bytes: u64,
    memo: HashMemo,
    scout: Scout,
    age: Age,
    /// [`PARITY`] or 0.
    parity: u8,
    snapshot: Option<Snapshot>,
    /// The page at which the expiry sweep goes on.
    sweep: u32,
}

impl Store {
    pub(crate) fn new(policy: Policy, hasher: KeyHasher) -> Self {
        Self {
            policy,
            entries: Entries::new(hasher),
            index: Index::new(),
            lists: [List::EMPTY; 3],
            bytes: [0; 3],
            records: [0; 3],
            ghost: Ghost::default(),
            full_bytes: 0,
            memo: HashMemo::new(),
            scout: Scout::HOME,
            age: Age::default(),
            parity: 0,
            snapshot: None,
            sweep: 0,
        }
    }

    #[inline]
    pub(crate) fn hash(&self, key: &[u8]) -> u64 {
        self.entries.hasher.hash(key)
    }

    pub(crate) fn len(&self) -> u64 {
        self.records.iter().sum()
    }

    /// The sum of costs.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// Cost and number of what has been offered for removal and not been removed or changed.
    pub(crate) fn offered(&self) -> (u64, u64) {
        (self.bytes[GIVEN_UP], self.records[GIVEN_UP])
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        self.entries.resident_bytes() + self.index.resident_bytes() + self.ghost.resident_bytes() + self.image_bytes()
    }

    pub(crate) fn index_bytes(&self) -> u64 {
        self.index.resident_bytes()
    }

    /// Memory held by copies for the snapshot under way.
    pub(crate) fn image_bytes(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, Snapshot::image_bytes)
    }

    #[inline]
    pub(crate) fn find(&self, hash: u64, key: &[u8]) -> Option<Ref> {
        self.index.find(hash, |entry| self.entries.has_key(entry, key))
    }

    /// A search for `hash` will begin soon: its bucket is needed.
    #[inline]
    pub(crate) fn prefetch_home(&self, hash: u64) {
        self.index.prefetch(hash);
    }

    /// The entries that `hashes` probably name, [`NIL`] for none. All of them are asked for. Their buckets should have come; for the
    /// few entries that are not at home the next bucket is asked for, and looked at when all others have been asked for.
    #[inline]
    pub(crate) fn guess<const N: usize>(&self, hashes: &[u64]) -> [Ref; N] {
        let mut guesses = [NIL; N];
        let (mut strays, mut strayed) = ([0; N], 0);
        for (place, &hash) in hashes.iter().enumerate().take(N) {
            if let Some(entry) = self.index.guess(hash) {
                self.entries.prefetch_all(entry);
                guesses[place] = entry;
            } else if self.index.prefetch_beyond(hash) {
                strays[strayed] = place;
                strayed += 1;
            }
        }
        for &place in &strays[..strayed] {
            if let Some(entry) = self.index.guess_beyond(hashes[place]) {
                self.entries.prefetch_all(entry);
                guesses[place] = entry;
            }
        }
        guesses
    }

    /// What was guessed, and has come, will be touched soon.
    #[inline]
    pub(crate) fn prefetch_guessed(&self, guesses: &[Ref]) {
        for &guess in guesses.iter().filter(|&&guess| guess != NIL) {
            self.prefetch_touch(guess);
        }
    }

    /// As [`Store::find`], with a guess to try first.
    #[inline]
    pub(crate) fn find_guessed(&self, guess: Ref, hash: u64, key: &[u8]) -> Option<Ref> {
        if guess != NIL && self.entries.has_key(guess, key) {
            return Some(guess);
        }
        self.find(hash, key)
    }

    pub(crate) fn find_version(&self, hash: u64, version: Version) -> Option<Ref> {
        let found = self.index.find(hash, |entry| {
            let header = self.entries.header(entry);
            header.version.get() == version.get()
                && self.memo.hash(version).unwrap_or_else(|| self.entries.hash(entry)) == hash
        });
        debug_assert!(found.is_none_or(|entry| self.entries.hash(entry) == hash));
        found
    }

    /// The hash of an entry's key.
    pub(crate) fn entry_hash(&mut self, entry: Ref) -> u64 {
        let version = Version::from(self.entries.header(entry).version.get());
        if let Some(hash) = self.memo.hash(version) {
            debug_assert_eq!(hash, self.entries.hash(entry));
            return hash;
        }
        let hash = self.entries.hash(entry);
        self.memo.note(version, hash);
        hash
    }

    #[inline]
    pub(crate) fn expires_at_ms(&self, entry: Ref) -> u64 {
        self.entries.expires_at_ms(entry)
    }

    #[inline]
    pub(crate) fn view(&self, entry: Ref) -> View<'_> {
        self.entries.view(entry)
    }

    /// A command about `hash` will be applied soon: its part of the index is needed.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: u64) {
        self.index.prefetch(hash);
        self.prefetch_ghost(hash);
    }

    /// What is remembered of `hash` will be asked for soon.
    #[inline]
    pub(crate) fn prefetch_ghost(&self, hash: u64) {
        if self.policy == Policy::S3Fifo {
            self.ghost.prefetch(hash);
        }
    }

    /// The entry that `hash` probably names will be read or changed soon, all of it.
    #[inline]
    pub(crate) fn prefetch_entry(&self, hash: u64) {
        if let Some(entry) = self.index.guess(hash) {
            self.entries.prefetch_all(entry);
        } else {
            self.index.prefetch_beyond(hash);
        }
    }

    /// The entry that `hash` probably names, which has been fetched, will be touched soon.
    #[inline]
    pub(crate) fn prefetch_neighbours(&self, hash: u64) {
        if let Some(entry) = self.index.guess(hash) {
            self.prefetch_touch(entry);
        } else if let Some(entry) = self.index.guess_beyond(hash) {
            self.entries.prefetch_all(entry);
        }
    }

    /// What [`Store::touch`] will write to will be written soon.
    #[inline]
    fn prefetch_touch(&self, entry: Ref) {
        if self.policy == Policy::Lru {
            let header = self.entries.header(entry);
            for neighbour in [header.newer.get(), header.older.get()] {
                if neighbour != NIL {
                    // The links, not the beginning of the header: they may lie in the next line.
                    cpu::prefetch(&self.entries.header(neighbour).older);
                }
            }
        }
    }

    pub(crate) fn insert(&mut self, hash: u64, key: &[u8], value: &[u8], version: Version, expires_at_ms: u64) {
        let main = self.policy == Policy::S3Fifo && (self.ghost.take(hash) || self.filling_main());
        let (list, flags) = match self.policy {
            Policy::Lru => (FIRST, self.age.generation << entry::STAMP_SHIFT),
            Policy::S3Fifo if main => (SECOND, MAIN),
            Policy::S3Fifo | Policy::NoEvict => (FIRST, 0),
        };
        let entry = self
            .entries
            .create(key, value, version, expires_at_ms, self.parity | flags);
        self.index.insert(hash, entry, &self.entries);
        self.lists[list].push_newest(&mut self.entries, entry);
        self.bytes[list] += cost(key.len(), value.len());
        self.records[list] += 1;
        if self.policy == Policy::Lru {
            self.count_use();
        }
        self.advance_scout();
    }

    /// S3-FIFO: whether a new entry belongs into the main queue because the store is filling up and the small queue has its share.
    /// The paper leaves open what the main queue holds before anything was asked for twice; filled with what comes first, it keeps
    /// a part of a loop that is longer than the cache and its memory, where an endless small queue would keep nothing.
    fn filling_main(&self) -> bool {
        let kept = self.bytes[FIRST] + self.bytes[SECOND];
        kept.abs_diff(self.full_bytes) > self.full_bytes / FILLING_SHARE && self.bytes[FIRST] * SMALL_SHARE >= kept
    }

    /// Adds an entry of a snapshot at the newest end of the list that its recency names. [`Store::finish_restore`] makes the lists
    /// what the policy wants.
    pub(crate) fn restore(&mut self, hash: u64, from: &SnapshotEntry<'_>, levels: &mut [List; LEVELS]) {
        let level = from.recency.min(SnapshotEntry::HOTTEST);
        let entry = self
            .entries
            .create(from.key, from.value, from.version, from.expires_at_ms, self.parity);
        if self.policy == Policy::S3Fifo {
            self.entries.header_mut(entry).set(MAIN, level >= LEVELS as u8 / 2);
        }
        self.index.insert(hash, entry, &self.entries);
        levels[usize::from(level)].push_newest(&mut self.entries, entry);
        self.count_in(entry);
    }

    /// Links what was restored: the higher the level, the newer.
    pub(crate) fn finish_restore(&mut self, levels: [List; LEVELS]) {
        for (level, older) in levels.into_iter().enumerate().rev() {
            let main = self.policy == Policy::S3Fifo && level >= LEVELS / 2;
            self.lists[if main { SECOND } else { FIRST }].append_older(&mut self.entries, older);
        }
    }

    /// Replaces everything but the key, and counts the entry as used. `costs`: the old one and the new one.
    pub(crate) fn replace(
        &mut self,
        hash: u64,
        entry: Ref,
        value: &[u8],
        version: Version,
        expires_at_ms: u64,
        (old_cost, cost): (u64, u64),
    ) {
        self.preserve(entry);
        let list = self.list_of(entry);
        self.bytes[list] = self.bytes[list] - old_cost + cost;
        let entry = if self.entries.overwrite(entry, value, version, expires_at_ms) {
            entry
        } else {
            let key = self.entries.key(entry).to_vec();
            self.recreate(hash, entry, &key, value, version, expires_at_ms)
        };
        self.keep(entry);
    }

    /// Replaces the expiry, and counts the entry as used.
    pub(crate) fn set_expiry(&mut self, hash: u64, entry: Ref, version: Version, expires_at_ms: u64) -> Ref {
        self.preserve(entry);
        let entry = if self.entries.restamp(entry, version, expires_at_ms) {
            entry
        } else {
            let view = self.entries.view(entry);
            let (key, value) = (view.key.to_vec(), view.value.to_vec());
            self.recreate(hash, entry, &key, &value, version, expires_at_ms)
        };
        self.keep(entry);
        entry
    }

    pub(crate) fn remove(&mut self, hash: u64, entry: Ref) {
        self.preserve(entry);
        self.delist(entry);
        self.index.remove(hash, entry, &self.entries);
        self.entries.release(entry);
    }

    /// Removes an entry to make room, and remembers it where the policy wants that.
    pub(crate) fn evict(&mut self, hash: u64, entry: Ref) {
        if self.policy == Policy::S3Fifo && !self.entries.header(entry).has(MAIN) {
            self.ghost.insert(hash, self.len());
        }
        self.remove(hash, entry);
    }

    /// Counts an entry as used.
    #[inline]
    pub(crate) fn touch(&mut self, entry: Ref) {
        match self.policy {
            Policy::Lru => {
                if self.lists[FIRST].newest == entry {
                    return;
                }
                let header = self.entries.header_mut(entry);
                if header.has(OFFERED) {
                    return;
                }
                let stale = header.stamp() != self.age.generation;
                if stale {
                    header.set_stamp(self.age.generation);
                }
                let links = self.lists[FIRST].raise(header);
                self.lists[FIRST].raised(&mut self.entries, entry, links);
                self.recall_scout(entry);
                if stale {
                    self.count_use();
                }
            }
            Policy::S3Fifo => {
                let header = self.entries.header(entry);
                if header.uses() < 3 {
                    let header = self.entries.header_mut(entry);
                    header.set_uses(header.uses() + 1);
                }
            }
            Policy::NoEvict => {}
        }
    }

    /// Chooses the entry the policy gives up next and lists it as offered.
    pub(crate) fn give_up(&mut self) -> Option<Ref> {
        let entry = match self.policy {
            Policy::Lru => self.lists[FIRST].oldest()?,
            Policy::S3Fifo => self.choose_s3_fifo()?,
            Policy::NoEvict => return None,
        };
        self.full_bytes = self.bytes[FIRST] + self.bytes[SECOND];
        self.offer(entry);
        self.scout.ahead = self.scout.ahead.saturating_sub(1);
        self.advance_scout();
        Some(entry)
    }

    /// Asks for one more of the oldest entries, and, now that the one before has come, for its part of the index.
    fn advance_scout(&mut self) {
        let Scout { entry, ahead } = self.scout;
        if ahead >= SCOUT_AHEAD || self.policy == Policy::NoEvict {
            return;
        }
        let next = if entry == NIL {
            self.lists[FIRST].oldest
        } else {
            let hash = self.entry_hash(entry);
            self.prefetch_bucket(hash);
            self.entries.header(entry).newer.get()
        };
        if next != NIL {
            self.entries.prefetch_all(next);
            self.scout = Scout {
                entry: next,
                ahead: ahead + 1,
            };
        }
    }

    /// The entry leaves its place in its list.
    #[inline]
    fn recall_scout(&mut self, entry: Ref) {
        if self.scout.entry == entry {
            self.scout = Scout::HOME;
        }
    }

    /// Lists an entry as offered for removal.
    pub(crate) fn offer(&mut self, entry: Ref) {
        let (list, cost) = (self.list_of(entry), self.entries.cost(entry));
        self.recall_scout(entry);
        self.lists[list].unlink(&mut self.entries, entry);
        self.entries.header_mut(entry).set(OFFERED, true);
        self.lists[GIVEN_UP].push_newest(&mut self.entries, entry);
        self.bytes[list] -= cost;
        self.records[list] -= 1;
        self.bytes[GIVEN_UP] += cost;
        self.records[GIVEN_UP] += 1;
    }

    /// One more entry was used in this generation.
    fn count_use(&mut self) {
        self.age.used += 1;
        if self.age.used > self.len() / 4 {
            self.age = Age {
                generation: (self.age.generation + 1) % LEVELS as u8,
                used: 0,
            };
        }
    }

    /// Takes back all offers. What was offered becomes what is given up next.
    pub(crate) fn forget_offers(&mut self) {
        let offered: Vec<Ref> = self.lists[GIVEN_UP].checked(&self.entries).collect();
        for entry in offered {
            let header = self.entries.header_mut(entry);
            header.set(OFFERED, false);
            if self.policy == Policy::S3Fifo {
                header.set(MAIN, false);
            }
        }
        self.scout = Scout::HOME;
        let given_up = std::mem::replace(&mut self.lists[GIVEN_UP], List::EMPTY);
        // The list grew at its newest end, so the first that was offered is its oldest, as it should be.
        self.lists[FIRST].append_older(&mut self.entries, given_up);
        self.bytes[FIRST] += std::mem::take(&mut self.bytes[GIVEN_UP]);
        self.records[FIRST] += std::mem::take(&mut self.records[GIVEN_UP]);
    }

    /// Looks for entries whose time is at or before `now_ms`, page by page, until at least `max_work` entries (and pages passed
    /// over) have been looked at. `found` says which to offer. `true` when the end of a round was reached.
    pub(crate) fn sweep(&mut self, now_ms: u64, max_work: usize, mut found: impl FnMut(u64, Version)) -> bool {
        let mut work = 0;
        let mut due: Vec<Ref> = Vec::new();
        while work < max_work.max(1) {
            let Some((page, fresh, earliest)) = self.entries.arena.page_from(self.sweep) else {
                self.sweep = 0;
                return true;
            };
            self.sweep = page + 1;
            work += 1;
            if u64::from(earliest) << 10 > now_ms || earliest == NEVER {
                continue;
            }
            work += usize::from(fresh);
            let mut earliest = NEVER;
            for slot in 0..u32::from(fresh) {
                let entry = page << 8 | slot;
                let bytes = self.entries.arena.slot(entry);
                let expires_at_ms = if entry::is_live(bytes) {
                    entry::expires_at_ms(bytes)
                } else {
                    0
                };
                if expires_at_ms != 0 {
                    earliest = earliest.min(coarse(expires_at_ms));
                    if expires_at_ms <= now_ms && !entry::header(bytes).has(OFFERED) {
                        due.push(entry);
                    }
                }
            }
            self.entries.arena.set_earliest(page, earliest);
            for entry in due.drain(..) {
                found(
                    self.entries.hash(entry),
                    Version::from(self.entries.header(entry).version.get()),
                );
                self.offer(entry);
            }
        }
        false
    }

    /// Entries in hash order from `hash` on, in groups: this one, as (hash, entry), and the last hash it covers.
    pub(crate) fn group_from(&self, hash: u64) -> (Vec<(u64, Ref)>, u64) {
        self.index.group_from(hash, &self.entries)
    }

    /// Moves a few entries, if memory is spread too thinly over pages. References are stale afterwards.
    pub(crate) fn maintain(&mut self) {
        for _ in 0..MOVES_PER_WRITE {
            let Some(from) = self.entries.arena.next_to_move() else {
                return;
            };
            self.preserve(from);
            let hash = self.entries.hash(from);
            let to = self.entries.duplicate(from);
            self.index.replace(hash, from, to);
            let list = self.list_of(to);
            self.recall_scout(from);
            self.lists[list].moved(&mut self.entries, from, to);
            self.entries.release_moved(from);
        }
    }

    /// One step of what makes memory faster to reach; `false` if there is none left to do.
    pub(crate) fn make_huge(&mut self) -> bool {
        self.index.make_huge() || self.entries.arena.make_huge()
    }

    /// Begins a snapshot.
    pub(crate) fn snapshot_begin(&mut self) -> Result<(), SnapshotBusy> {
        if self.snapshot.is_some() {
            return Err(SnapshotBusy);
        }
        self.parity ^= PARITY;
        self.snapshot = Some(Snapshot::default());
        Ok(())
    }

    /// Gives up the snapshot under way, if there is one.
    pub(crate) fn snapshot_abandon(&mut self) {
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.abandon();
        }
    }

    /// Visits some entries of the snapshot; `true` when it is complete. Entries in one page are visited together.
    pub(crate) fn snapshot_slice(&mut self, max_records: usize, mut visit: impl FnMut(SnapshotEntry<'_>)) -> bool {
        let Some(mut snapshot) = self.snapshot.take() else {
            return true;
        };
        let mut work = snapshot.drain(max_records.max(1), &mut visit);
        while work < max_records.max(1) {
            let Some((page, fresh, _)) = self.entries.arena.page_from(snapshot.page) else {
                if snapshot.drained() {
                    return true;
                }
                break;
            };
            for slot in 0..u32::from(fresh) {
                let entry = page << 8 | slot;
                let header = self.entries.header(entry);
                if header.key_len() == 0 || header.flags() & PARITY == self.parity {
                    continue;
                }
                if !snapshot.abandoned {
                    let view = self.entries.view(entry);
                    let recency = self.recency(view.flags);
                    let View {
                        key,
                        value,
                        version,
                        expires_at_ms,
                        ..
                    } = view;
                    visit(SnapshotEntry {
                        key,
                        value,
                        version,
                        expires_at_ms,
                        recency,
                    });
                }
                self.entries.header_mut(entry).set(PARITY, self.parity != 0);
            }
            work += usize::from(fresh);
            snapshot.page = page + 1;
        }
        self.snapshot = Some(snapshot);
        false
    }

    /// Copies an entry out for the snapshot under way, before it changes.
    #[inline]
    fn preserve(&mut self, entry: Ref) {
        if self.snapshot.is_none() {
            return;
        }
        let view = self.entries.view(entry);
        if view.flags & PARITY != self.parity {
            let recency = self.recency(view.flags);
            if let Some(snapshot) = &mut self.snapshot {
                snapshot.preserve(&view, recency);
            }
            self.entries.header_mut(entry).set(PARITY, self.parity != 0);
        }
    }

    fn recency(&self, flags: u8) -> u8 {
        match self.policy {
            Policy::S3Fifo => flags >> entry::USES_SHIFT | if flags & MAIN == 0 { 0 } else { 4 },
            Policy::Lru => {
                let age = self.age.generation.wrapping_sub(flags >> entry::STAMP_SHIFT) % LEVELS as u8;
                LEVELS as u8 - 1 - age
            }
            Policy::NoEvict => 0,
        }
    }

    /// Writes an entry anew, in another slot, in the old one's place in index and list.
    fn recreate(&mut self, hash: u64, old: Ref, key: &[u8], value: &[u8], version: Version, expires_at_ms: u64) -> Ref {
        let header = *self.entries.header(old);
        let new = self.entries.create(key, value, version, expires_at_ms, header.flags());
        let links = self.entries.header_mut(new);
        links.newer = header.newer;
        links.older = header.older;
        let list = self.list_of(new);
        self.recall_scout(old);
        self.lists[list].moved(&mut self.entries, old, new);
        self.index.replace(hash, old, new);
        self.entries.release(old);
        new
    }

    /// An entry was written: it is no longer offered, and counts as used.
    fn keep(&mut self, entry: Ref) {
        if self.entries.header(entry).has(OFFERED) {
            self.delist(entry);
            self.entries.header_mut(entry).set(OFFERED, false);
            self.enlist(entry);
        } else {
            self.touch(entry);
        }
    }

    fn list_of(&self, entry: Ref) -> usize {
        let header = self.entries.header(entry);
        if header.has(OFFERED) {
            GIVEN_UP
        } else if self.policy == Policy::S3Fifo && header.has(MAIN) {
            SECOND
        } else {
            FIRST
        }
    }

    fn enlist(&mut self, entry: Ref) {
        let (list, cost) = (self.list_of(entry), self.entries.cost(entry));
        self.lists[list].push_newest(&mut self.entries, entry);
        self.bytes[list] += cost;
        self.records[list] += 1;
    }

    fn delist(&mut self, entry: Ref) {
        let (list, cost) = (self.list_of(entry), self.entries.cost(entry));
        self.recall_scout(entry);
        self.lists[list].unlink(&mut self.entries, entry);
        self.bytes[list] -= cost;
        self.records[list] -= 1;
    }

    fn count_in(&mut self, entry: Ref) {
        let list = self.list_of(entry);
        self.bytes[list] += self.entries.cost(entry);
        self.records[list] += 1;
    }

    /// The next victim of S3-FIFO (algorithm 1 of the paper): from the small queue while that is above its share, an entry used
    /// twice going to the main queue instead; else from the main queue, an entry used at all getting another round.
    fn choose_s3_fifo(&mut self) -> Option<Ref> {
        for passed_over in 0.. {
            let kept = self.bytes[FIRST] + self.bytes[SECOND];
            let from_small = self.bytes[FIRST] * SMALL_SHARE >= kept || self.lists[SECOND].oldest().is_none();
            let list = if from_small { FIRST } else { SECOND };
            let entry = self.lists[list].oldest()?;
            let next = self.entries.header(entry).newer.get();
            if !from_small && next != NIL {
                self.entries.prefetch_all(next);
            }
            let uses = self.entries.header(entry).uses();
            let spared = if from_small { uses >= PROMOTE_AT } else { uses > 0 };
            if !spared || passed_over >= MAX_PASSED_OVER {
                return Some(entry);
            }
            self.delist(entry);
            let header = self.entries.header_mut(entry);
            header.set(MAIN, true);
            header.set_uses(if from_small { 0 } else { uses - 1 });
            self.enlist(entry);
        }
        None
    }

    /// Panics on a broken invariant.
    pub(crate) fn check(&self) {
        let live = self.entries.check();
        assert_eq!(
            self.index.check(&self.entries),
            live,
            "index and slots hold different numbers of entries"
        );
        let mut listed = 0;
        for (number, list) in self.lists.iter().enumerate() {
            let (mut bytes, mut records) = (0, 0);
            for entry in list.checked(&self.entries) {
                assert!(self.entries.arena.is_live(entry), "a list names a free slot");
                assert_eq!(
                    self.list_of(entry),
                    number,
                    "an entry is in another list than its flags say"
                );
                let flags = self.entries.header(entry).flags();
                assert!(
                    self.snapshot.is_some() || flags & PARITY == self.parity,
                    "a snapshot missed an entry"
                );
                bytes += self.entries.cost(entry);
                records += 1;
                assert!(records <= live, "a list has a cycle");
            }
            assert_eq!(
                (bytes, records),
                (self.bytes[number], self.records[number]),
                "a list is miscounted"
            );
            listed += records;
        }
        assert_eq!(listed, live, "an entry is in no list");
    }
}
