//! The entries of one shard in memory: index, recency list, bytes. It knows no semantics: no conditions, no time.

use std::collections::BTreeSet;

use crate::Version;

/// Names an entry until it is removed or replaced.
pub(crate) type Ref = u32;

const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct Slot {
    hash: u64,
    key: Box<[u8]>,
    value: Box<[u8]>,
    version: u64,
    expires_at_ms: u64,
    newer: u32,
    older: u32,
    offered: bool,
    live: bool,
}

/// What the store holds under a reference.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
    pub(crate) version: Version,
    pub(crate) expires_at_ms: u64,
    pub(crate) offered: bool,
}

/// Entries by key, in hash order and in order of recency.
#[derive(Debug)]
pub(crate) struct Store {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Every live slot, by (hash, slot).
    index: BTreeSet<(u64, u32)>,
    newest: u32,
    oldest: u32,
    payload_bytes: u64,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: BTreeSet::new(),
            newest: NIL,
            oldest: NIL,
            payload_bytes: 0,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.index.len() as u64
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        self.payload_bytes + (self.slots.capacity() * size_of::<Slot>()) as u64 + self.index_bytes()
    }

    pub(crate) fn index_bytes(&self) -> u64 {
        self.index.len() as u64 * 24
    }

    pub(crate) fn find(&self, hash: u64, key: &[u8]) -> Option<Ref> {
        self.with_hash(hash)
            .find(|&entry| *self.slots[entry as usize].key == *key)
    }

    pub(crate) fn find_version(&self, hash: u64, version: Version) -> Option<Ref> {
        self.with_hash(hash)
            .find(|&entry| self.slots[entry as usize].version == version.get())
    }

    fn with_hash(&self, hash: u64) -> impl Iterator<Item = Ref> {
        self.index.range((hash, 0)..=(hash, u32::MAX)).map(|&(_, entry)| entry)
    }

    pub(crate) fn view(&self, entry: Ref) -> View<'_> {
        let slot = &self.slots[entry as usize];
        View {
            key: &slot.key,
            value: &slot.value,
            version: Version::from(slot.version),
            expires_at_ms: slot.expires_at_ms,
            offered: slot.offered,
        }
    }

    pub(crate) fn insert(&mut self, hash: u64, key: &[u8], value: &[u8], version: Version, expires_at_ms: u64) {
        let slot = Slot {
            hash,
            key: key.into(),
            value: value.into(),
            version: version.get(),
            expires_at_ms,
            newer: NIL,
            older: NIL,
            offered: false,
            live: true,
        };
        self.payload_bytes += (key.len() + value.len()) as u64;
        let entry = if let Some(entry) = self.free.pop() {
            self.slots[entry as usize] = slot;
            entry
        } else {
            let entry = u32::try_from(self.slots.len()).expect("invariant: fewer than 2^32 entries");
            self.slots.push(slot);
            entry
        };
        self.index.insert((hash, entry));
        self.link_newest(entry);
    }

    /// Replaces everything but the key, and makes the entry the newest.
    pub(crate) fn replace(&mut self, entry: Ref, value: &[u8], version: Version, expires_at_ms: u64) {
        let slot = &mut self.slots[entry as usize];
        self.payload_bytes -= slot.value.len() as u64;
        self.payload_bytes += value.len() as u64;
        if slot.value.len() == value.len() {
            slot.value.copy_from_slice(value);
        } else {
            slot.value = value.into();
        }
        slot.version = version.get();
        slot.expires_at_ms = expires_at_ms;
        slot.offered = false;
        self.touch(entry);
    }

    pub(crate) fn set_expiry(&mut self, entry: Ref, version: Version, expires_at_ms: u64) {
        let slot = &mut self.slots[entry as usize];
        slot.version = version.get();
        slot.expires_at_ms = expires_at_ms;
        slot.offered = false;
        self.touch(entry);
    }

    pub(crate) fn remove(&mut self, entry: Ref) {
        self.unlink(entry);
        let slot = &mut self.slots[entry as usize];
        self.payload_bytes -= (slot.key.len() + slot.value.len()) as u64;
        slot.live = false;
        slot.key = Box::default();
        slot.value = Box::default();
        let hash = slot.hash;
        self.index.remove(&(hash, entry));
        self.free.push(entry);
    }

    pub(crate) fn touch(&mut self, entry: Ref) {
        if self.newest != entry {
            self.unlink(entry);
            self.link_newest(entry);
        }
    }

    pub(crate) fn set_offered(&mut self, entry: Ref, offered: bool) {
        self.slots[entry as usize].offered = offered;
    }

    /// The entry that recency gives up first.
    pub(crate) fn oldest(&self) -> Option<Ref> {
        (self.oldest != NIL).then_some(self.oldest)
    }

    /// The next entry to give up after `entry`.
    pub(crate) fn next_oldest(&self, entry: Ref) -> Option<Ref> {
        let newer = self.slots[entry as usize].newer;
        (newer != NIL).then_some(newer)
    }

    /// Entries in hash order from `hash` on.
    pub(crate) fn in_hash_order(&self, hash: u64) -> impl Iterator<Item = (u64, Ref)> {
        self.index.range((hash, 0)..).copied()
    }

    /// Slots, live or not, for the sweep.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn live(&self, slot: usize) -> Option<(u64, Ref)> {
        let held = &self.slots[slot];
        held.live.then_some((held.hash, slot as u32))
    }

    fn link_newest(&mut self, entry: Ref) {
        let newest = self.newest;
        self.slots[entry as usize].newer = NIL;
        self.slots[entry as usize].older = newest;
        if newest == NIL {
            self.oldest = entry;
        } else {
            self.slots[newest as usize].newer = entry;
        }
        self.newest = entry;
    }

    fn unlink(&mut self, entry: Ref) {
        let (newer, older) = (self.slots[entry as usize].newer, self.slots[entry as usize].older);
        if newer == NIL {
            self.newest = older;
        } else {
            self.slots[newer as usize].older = older;
        }
        if older == NIL {
            self.oldest = newer;
        } else {
            self.slots[older as usize].newer = newer;
        }
    }

    /// Panics on a broken invariant.
    pub(crate) fn check(&self) {
        let mut seen = 0;
        let mut newer = NIL;
        let mut at = self.newest;
        while at != NIL {
            let slot = &self.slots[at as usize];
            assert!(slot.live, "the list holds a free slot");
            assert_eq!(slot.newer, newer, "the list's links disagree");
            assert!(
                self.index.contains(&(slot.hash, at)),
                "a listed entry is not in the index"
            );
            seen += 1;
            assert!(seen <= self.index.len(), "the list has a cycle");
            newer = at;
            at = slot.older;
        }
        assert_eq!(self.oldest, newer, "the list's end is not its last entry");
        assert_eq!(
            seen,
            self.index.len(),
            "index and list hold different numbers of entries"
        );
        assert_eq!(
            seen + self.free.len(),
            self.slots.len(),
            "a slot is neither live nor free"
        );
    }
}
