//! The entries themselves: slots of the arena, and extents for what is too large for a slot.

use crate::arena::{Arena, Ref};
use crate::classes;
use crate::config::cost;
use crate::cpu;
use crate::entry::{self, Header};
use crate::hash::KeyHasher;
use crate::index;
use crate::version::Version;

/// What is held under a reference.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
    pub(crate) version: Version,
    /// 0 = never.
    pub(crate) expires_at_ms: u64,
    pub(crate) flags: u8,
}

/// The page-wise lower bounds of expiry times are in units of 2^10 ms from the epoch, rounded down; they last until 2109, and
/// after that only make the sweep look at more pages.
pub(crate) fn coarse(expires_at_ms: u64) -> u32 {
    u32::try_from(expires_at_ms >> 10).unwrap_or(u32::MAX).min(u32::MAX - 1)
}

/// Whether two keys are equal, without a call where they are of the usual lengths.
#[inline]
fn equal(a: &[u8], b: &[u8]) -> bool {
    /// The first and the last bytes, which overlap unless there are twice as many.
    fn ends<const N: usize>(bytes: &[u8]) -> Option<(&[u8; N], &[u8; N])> {
        bytes.first_chunk().zip(bytes.last_chunk())
    }
    if a.len() != b.len() || a.len() > 32 {
        return a == b;
    }
    if let Some((a, b)) = ends::<16>(a).zip(ends(b)) {
        return a == b;
    }
    if let Some((a, b)) = ends::<8>(a).zip(ends(b)) {
        return a == b;
    }
    a.iter().eq(b)
}

/// Arena, extents and the hash function that together say what a reference refers to.
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) arena: Arena,
    pub(crate) hasher: KeyHasher,
    /// Key and value of large entries.
    extents: Vec<Option<Box<[u8]>>>,
    vacant_extents: Vec<u32>,
    extent_bytes: u64,
}

impl Entries {
    pub(crate) fn new(hasher: KeyHasher) -> Self {
        Self {
            arena: Arena::new(),
            hasher,
            extents: Vec::new(),
            vacant_extents: Vec::new(),
            extent_bytes: 0,
        }
    }

    #[inline]
    pub(crate) fn header(&self, entry: Ref) -> &Header {
        self.arena.header(entry)
    }

    #[inline]
    pub(crate) fn header_mut(&mut self, entry: Ref) -> &mut Header {
        self.arena.header_mut(entry)
    }

    #[inline]
    pub(crate) fn view(&self, entry: Ref) -> View<'_> {
        let slot = self.arena.slot(entry);
        let header = entry::header(slot);
        let (key, value) = self.body(slot);
        View {
            key,
            value,
            version: Version::from(header.version.get()),
            expires_at_ms: entry::expires_at_ms(slot),
            flags: header.flags(),
        }
    }

    #[inline]
    pub(crate) fn key(&self, entry: Ref) -> &[u8] {
        self.body(self.arena.slot(entry)).0
    }

    /// Whether the entry is the key's.
    #[inline]
    pub(crate) fn has_key(&self, entry: Ref, key: &[u8]) -> bool {
        equal(self.key(entry), key)
    }

    /// 0 = never.
    #[inline]
    pub(crate) fn expires_at_ms(&self, entry: Ref) -> u64 {
        if self.header(entry).has(entry::EXPIRES) {
            entry::expires_at_ms(self.arena.slot(entry))
        } else {
            0
        }
    }

    #[inline]
    pub(crate) fn cost(&self, entry: Ref) -> u64 {
        let (key, value) = self.body(self.arena.slot(entry));
        cost(key.len(), value.len())
    }

    /// Key and value.
    #[inline]
    fn body<'a>(&'a self, slot: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        let header = entry::header(slot);
        if header.in_extent() {
            return self.extent(slot);
        }
        let (key, rest) = slot[header.body_start()..].split_at(header.key_len());
        (key, &rest[..header.value_len()])
    }

    #[cold]
    fn extent(&self, slot: &[u8]) -> (&[u8], &[u8]) {
        let (number, key_len) = entry::extent(slot);
        let extent = self.extents[number as usize].as_deref();
        let extent = extent.expect("invariant: an entry's extent is held as long as the entry");
        extent.split_at(key_len)
    }

    /// A header, a key of this length and the beginning of its value will be read soon.
    #[inline]
    pub(crate) fn prefetch_key(&self, entry: Ref, key_len: usize) {
        let slot = self.arena.slot(entry);
        cpu::prefetch(&slot[0]);
        cpu::prefetch(&slot[(size_of::<Header>() + key_len).min(slot.len() - 1)]);
    }

    /// All of an entry will be read soon, if it is of the usual size.
    #[inline]
    pub(crate) fn prefetch_all(&self, entry: Ref) {
        cpu::prefetch_bytes(self.arena.slot(entry));
    }

    /// Writes a new entry. `flags` are its flags but for those that say where its parts are.
    pub(crate) fn create(&mut self, key: &[u8], value: &[u8], version: Version, expires_at_ms: u64, flags: u8) -> Ref {
        let expires = expires_at_ms != 0;
        let inline = entry::inline_bytes(key.len(), value.len(), expires);
        let entry = self.arena.allocate(inline.map_or(0, classes::class_of));
        let extent = if inline.is_none() {
            Some(self.new_extent(key, value))
        } else {
            None
        };
        let slot = self.arena.slot_mut(entry);
        let header = entry::header_mut(slot);
        header.set_flags(flags);
        header.set(entry::EXPIRES, expires);
        header.version.set(version.get());
        if let Some(extent) = extent {
            header.set_in_extent();
            entry::set_extent(slot, extent, key.len());
        } else {
            header.set_lengths(key.len(), value.len());
            let start = header.body_start();
            slot[start..start + key.len()].copy_from_slice(key);
            slot[start + key.len()..start + key.len() + value.len()].copy_from_slice(value);
        }
        if expires {
            entry::set_expires_at_ms(slot, expires_at_ms);
            self.arena.note_expiry(entry, coarse(expires_at_ms));
        }
        entry
    }

    /// Writes value, version and expiry over the old ones, if the slot is the right one for them; `false` if it is not.
    pub(crate) fn overwrite(&mut self, entry: Ref, value: &[u8], version: Version, expires_at_ms: u64) -> bool {
        let expires = expires_at_ms != 0;
        let class = self.arena.class(entry);
        let slot = self.arena.slot_mut(entry);
        let header = entry::header(slot);
        let key_len = header.key_len();
        let fits = entry::inline_bytes(key_len, value.len(), expires).map(classes::class_of) == Some(class);
        if !fits || header.in_extent() || header.has(entry::EXPIRES) != expires {
            return false;
        }
        let start = header.body_start() + key_len;
        slot[start..start + value.len()].copy_from_slice(value);
        let header = entry::header_mut(slot);
        header.set_lengths(key_len, value.len());
        header.version.set(version.get());
        if expires {
            entry::set_expires_at_ms(slot, expires_at_ms);
            self.arena.note_expiry(entry, coarse(expires_at_ms));
        }
        true
    }

    /// Writes version and expiry, if the slot has room for them as it is; `false` if it has not.
    pub(crate) fn restamp(&mut self, entry: Ref, version: Version, expires_at_ms: u64) -> bool {
        let slot = self.arena.slot_mut(entry);
        let header = entry::header_mut(slot);
        let expires = expires_at_ms != 0;
        if header.in_extent() {
            // The number of the extent stands behind the expiry, and its slot has room for both.
            let (extent, key_len) = entry::extent(slot);
            entry::header_mut(slot).set(entry::EXPIRES, expires);
            entry::set_extent(slot, extent, key_len);
        } else if header.has(entry::EXPIRES) != expires {
            return false;
        }
        entry::header_mut(slot).version.set(version.get());
        if expires_at_ms != 0 {
            entry::set_expires_at_ms(slot, expires_at_ms);
            self.arena.note_expiry(entry, coarse(expires_at_ms));
        }
        true
    }

    /// Copies an entry into a fresh slot of the same class; the old one stays until it is released with
    /// [`Entries::release_moved`].
    pub(crate) fn duplicate(&mut self, entry: Ref) -> Ref {
        let class = self.arena.class(entry);
        let to = self.arena.allocate(class);
        self.arena.copy(entry, to);
        let expires_at_ms = entry::expires_at_ms(self.arena.slot(to));
        if expires_at_ms != 0 {
            self.arena.note_expiry(to, coarse(expires_at_ms));
        }
        to
    }

    /// Releases a slot whose entry lives on elsewhere.
    pub(crate) fn release_moved(&mut self, entry: Ref) {
        self.arena.release(entry);
    }

    /// Releases an entry.
    pub(crate) fn release(&mut self, entry: Ref) {
        let slot = self.arena.slot(entry);
        if entry::header(slot).in_extent() {
            let (number, _) = entry::extent(slot);
            let extent = self.extents[number as usize].take();
            self.extent_bytes -= extent
                .expect("invariant: an entry's extent is held as long as the entry")
                .len() as u64;
            self.vacant_extents.push(number);
        }
        self.arena.release(entry);
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        let table = self.extents.capacity() * size_of::<Option<Box<[u8]>>>() + self.vacant_extents.capacity() * 4;
        self.arena.resident_bytes() + self.extent_bytes + table as u64
    }

    fn new_extent(&mut self, key: &[u8], value: &[u8]) -> u32 {
        let extent = [key, value].concat().into_boxed_slice();
        self.extent_bytes += extent.len() as u64;
        if let Some(number) = self.vacant_extents.pop() {
            self.extents[number as usize] = Some(extent);
            return number;
        }
        self.extents.push(Some(extent));
        u32::try_from(self.extents.len() - 1).expect("invariant: fewer extents than slots")
    }

    /// Panics on a broken invariant; returns the number of live slots.
    pub(crate) fn check(&self) -> u64 {
        let held = self.extents.iter().flatten();
        assert_eq!(
            held.clone().map(|extent| extent.len() as u64).sum::<u64>(),
            self.extent_bytes,
            "extents are miscounted"
        );
        assert_eq!(
            held.count() + self.vacant_extents.len(),
            self.extents.len(),
            "an extent was lost"
        );
        self.arena.check()
    }
}

impl index::Entries for Entries {
    #[inline]
    fn hash(&self, entry: Ref) -> u64 {
        self.hasher.hash(self.key(entry))
    }

    #[inline]
    fn prefetch(&self, entry: Ref) {
        // A header and a short key lie in one line or in two.
        const SHORT: usize = 16;
        self.prefetch_key(entry, SHORT);
    }
}
