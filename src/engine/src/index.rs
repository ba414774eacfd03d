//! From hashes to references: an extendible hash table (Fagin et al., TODS 1979) of 4 KiB segments.
//!
//! The directory maps the top bits of a hash to a segment. A full segment splits alone, into two that differ in the next bit, so
//! no insertion ever touches more than one segment's entries, whatever the size of the table; two sparse ones join again. Since
//! the directory goes by the top bits, segments are in hash order, which is what cursors walk.
//!
//! The table holds no hashes: whoever asks for a split or a walk provides them ([`Entries`]).
//!
//! Invariants ([`Index::check`]): a segment of depth d is named by 2^(global depth - d) neighbouring directory slots; every entry
//! is in the segment its hash selects, or, if equal hashes have overfilled that, in the overflow.

use std::collections::{BTreeSet, VecDeque};

use zerocopy::{FromBytes, IntoBytes};

use crate::arena::Ref;
use crate::cpu;
use crate::memory::{CHUNK_BYTES, Chunk};
use crate::segment::{self, Bucket, Segment};

const SEGMENTS_PER_CHUNK: usize = CHUNK_BYTES / size_of::<Segment>();

/// Two neighbours with together at most this many entries are joined.
const SPARSE: usize = segment::FULL / 3;

/// The directory may have this many slots per segment before splitting is given up as useless: the entries that will not part
/// have equal hashes, as far as the directory can tell. A good hash function never comes near.
const MAX_SLOTS_PER_SEGMENT: usize = 32;

/// What the index asks about the entries it refers to.
pub(crate) trait Entries {
    /// The hash of the entry's key.
    fn hash(&self, entry: Ref) -> u64;
    /// Its key will be read soon.
    fn prefetch(&self, entry: Ref);
}

#[derive(Debug, Clone, Copy, Default)]
struct Info {
    /// How many top bits all its hashes share.
    depth: u8,
    entries: u16,
}

#[derive(Debug)]
pub(crate) struct Index {
    /// Segment numbers, by the top `depth` bits of a hash.
    directory: Vec<u32>,
    depth: u32,
    chunks: Vec<Option<Chunk>>,
    infos: Vec<Info>,
    /// Numbers below `infos.len()` that are no segment.
    vacant: BTreeSet<u32>,
    /// Entries that found no room in their segment, by hash.
    overflow: BTreeSet<(u64, Ref)>,
    /// Chunks whose segments have all been in use, that no huge page has been asked for.
    plain: VecDeque<u32>,
}

impl Index {
    pub(crate) fn new() -> Self {
        let mut index = Self {
            directory: Vec::new(),
            depth: 0,
            chunks: Vec::new(),
            infos: Vec::new(),
            vacant: BTreeSet::new(),
            overflow: BTreeSet::new(),
            plain: VecDeque::new(),
        };
        let first = index.new_segment(0);
        index.directory.push(first);
        index
    }

    /// The first entry under this hash's tag that `accept` accepts. The tag is 8 bits: most that are offered to `accept` are
    /// right, not all.
    #[inline]
    pub(crate) fn find(&self, hash: u64, mut accept: impl FnMut(Ref) -> bool) -> Option<Ref> {
        let found = self.segment(self.locate(hash)).find(hash, &mut accept);
        if found.is_some() || self.overflow.is_empty() {
            return found;
        }
        self.overflow
            .range((hash, 0)..=(hash, Ref::MAX))
            .map(|&(_, entry)| entry)
            .find(|&entry| accept(entry))
    }

    /// The bucket that a search for `hash` begins with.
    #[inline]
    pub(crate) fn home(&self, hash: u64) -> &Bucket {
        self.segment(self.locate(hash)).home(hash)
    }

    /// Asks for the bucket that a search for `hash` begins with.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) {
        cpu::prefetch(self.home(hash));
    }

    /// Where the entry most probably is, without a look at it.
    #[inline]
    pub(crate) fn guess(&self, hash: u64) -> Option<Ref> {
        self.home(hash).guess(hash)
    }

    /// Asks for what is needed to guess where an entry is that is not at home; `false` if there can be none.
    #[inline]
    pub(crate) fn prefetch_beyond(&self, hash: u64) -> bool {
        let beyond = self.segment(self.locate(hash)).beyond(hash);
        beyond.inspect(|bucket| cpu::prefetch(*bucket)).is_some()
    }

    /// Where an entry most probably is that is not at home.
    pub(crate) fn guess_beyond(&self, hash: u64) -> Option<Ref> {
        self.segment(self.locate(hash)).find(hash, |_| true)
    }

    pub(crate) fn insert(&mut self, hash: u64, entry: Ref, entries: &impl Entries) {
        loop {
            let number = self.locate(hash);
            let full = usize::from(self.infos[number as usize].entries) >= segment::FULL;
            if !full && self.segment_mut(number).insert(hash, entry) {
                self.infos[number as usize].entries += 1;
                return;
            }
            if !self.split(number, hash, entries) {
                self.overflow.insert((hash, entry));
                return;
            }
        }
    }

    pub(crate) fn remove(&mut self, hash: u64, entry: Ref, entries: &impl Entries) {
        if !self.overflow.is_empty() && self.overflow.remove(&(hash, entry)) {
            return;
        }
        let number = self.locate(hash);
        let removed = self.segment_mut(number).remove(hash, entry);
        assert!(removed, "invariant: an entry that is removed is in the index");
        self.infos[number as usize].entries -= 1;
        self.join(number, hash, entries);
    }

    /// The entry has moved.
    pub(crate) fn replace(&mut self, hash: u64, old: Ref, new: Ref) {
        if !self.overflow.is_empty() && self.overflow.remove(&(hash, old)) {
            self.overflow.insert((hash, new));
            return;
        }
        let number = self.locate(hash);
        let replaced = self.segment_mut(number).replace(hash, old, new);
        assert!(replaced, "invariant: an entry that moves is in the index");
    }

    /// The entries of the segment that `hash` belongs to, from `hash` on, as (hash, entry) in ascending order; and the last
    /// hash that belongs there.
    pub(crate) fn group_from(&self, hash: u64, entries: &impl Entries) -> (Vec<(u64, Ref)>, u64) {
        let number = self.locate(hash);
        let mut group = self.hashed(number, entries);
        let depth = u32::from(self.infos[number as usize].depth);
        let last = hash | u64::MAX >> depth;
        group.retain(|&(held, _)| held >= hash);
        group.extend(self.overflow.range((hash, 0)..=(last, Ref::MAX)));
        group.sort_unstable();
        (group, last)
    }

    /// Puts a huge page behind one chunk that is in use all over; `false` if there is none left to do.
    pub(crate) fn make_huge(&mut self) -> bool {
        while let Some(number) = self.plain.pop_front() {
            let full = self.infos.len() >= (number as usize + 1) * SEGMENTS_PER_CHUNK;
            if let Some(Some(chunk)) = self.chunks.get_mut(number as usize)
                && full
            {
                // Refused: there will be none for the others either, and the kernel has the advice.
                if !chunk.make_huge() {
                    self.plain.clear();
                }
                return true;
            }
        }
        false
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        let segments = self.infos.len() * size_of::<Segment>();
        let rest = self.directory.capacity() * size_of::<u32>() + self.infos.capacity() * size_of::<Info>();
        (segments + rest + self.overflow.len() * size_of::<(u64, Ref)>() * 2) as u64
    }

    #[inline]
    fn locate(&self, hash: u64) -> u32 {
        // A shift by 64 (at depth 0) would be too far in one step.
        self.directory[(hash >> 1 >> (63 - self.depth)) as usize]
    }

    #[inline]
    fn segment(&self, number: u32) -> &Segment {
        let chunk = self.chunks[number as usize / SEGMENTS_PER_CHUNK].as_ref();
        let chunk = chunk.expect("invariant: a segment that is named is held");
        let segments = <[Segment; SEGMENTS_PER_CHUNK]>::ref_from_bytes(&**chunk);
        &segments.expect("invariant: a chunk is aligned and as large as its segments")
            [number as usize % SEGMENTS_PER_CHUNK]
    }

    #[inline]
    fn segment_mut(&mut self, number: u32) -> &mut Segment {
        let chunk = self.chunks[number as usize / SEGMENTS_PER_CHUNK].as_mut();
        let chunk = chunk.expect("invariant: a segment that is named is held");
        let segments = <[Segment; SEGMENTS_PER_CHUNK]>::mut_from_bytes(&mut **chunk);
        &mut segments.expect("invariant: a chunk is aligned and as large as its segments")
            [number as usize % SEGMENTS_PER_CHUNK]
    }

    /// Every entry of a segment with its hash.
    fn hashed(&self, number: u32, entries: &impl Entries) -> Vec<(u64, Ref)> {
        const AHEAD: usize = 16;
        let mut hashed: Vec<(u64, Ref)> = Vec::with_capacity(usize::from(self.infos[number as usize].entries));
        hashed.extend(self.segment(number).refs().map(|entry| (0, entry)));
        hashed
            .iter()
            .take(AHEAD)
            .for_each(|&(_, entry)| entries.prefetch(entry));
        for at in 0..hashed.len() {
            if let Some(&(_, ahead)) = hashed.get(at + AHEAD) {
                entries.prefetch(ahead);
            }
            hashed[at].0 = entries.hash(hashed[at].1);
        }
        hashed
    }

    /// Splits the segment of `hash`; `false` if that leads nowhere.
    fn split(&mut self, number: u32, hash: u64, entries: &impl Entries) -> bool {
        let depth = u32::from(self.infos[number as usize].depth);
        if depth == self.depth && !self.double() {
            return false;
        }
        let hashed = self.hashed(number, entries);
        let upper = self.new_segment(depth as u8 + 1);
        self.infos[number as usize] = Info {
            depth: depth as u8 + 1,
            entries: 0,
        };
        self.segment_mut(number).clear();
        // The directory slots of the segment; the upper half of them now names the new one.
        let (first, slots) = self.directory_slots(hash, depth);
        self.directory[first + slots / 2..first + slots].fill(upper);
        for (hash, entry) in hashed {
            let number = self.locate(hash);
            if self.segment_mut(number).insert(hash, entry) {
                self.infos[number as usize].entries += 1;
            } else {
                self.overflow.insert((hash, entry));
            }
        }
        true
    }

    /// Joins the segment of `hash` with its neighbour, if both are sparse.
    fn join(&mut self, number: u32, hash: u64, entries: &impl Entries) {
        let Info { depth, entries: held } = self.infos[number as usize];
        if usize::from(held) > SPARSE / 2 || depth == 0 {
            return;
        }
        let buddy_hash = hash ^ 1 << (64 - u32::from(depth));
        let buddy = self.locate(buddy_hash);
        let of_buddy = self.infos[buddy as usize];
        if of_buddy.depth != depth || usize::from(held + of_buddy.entries) > SPARSE {
            return;
        }
        let mut all = self.hashed(buddy, entries);
        all.extend(self.hashed(number, entries));
        let (kept, dropped) = (number.min(buddy), number.max(buddy));
        let (first, slots) = self.directory_slots(hash, u32::from(depth) - 1);
        self.directory[first..first + slots].fill(kept);
        self.infos[kept as usize] = Info {
            depth: depth - 1,
            entries: 0,
        };
        self.segment_mut(kept).clear();
        for (hash, entry) in all {
            if self.segment_mut(kept).insert(hash, entry) {
                self.infos[kept as usize].entries += 1;
            } else {
                self.overflow.insert((hash, entry));
            }
        }
        self.drop_segment(dropped);
        self.pack(entries);
        self.halve();
    }

    /// The directory slots that name the segment of `hash` at `depth`: the first, and how many.
    fn directory_slots(&self, hash: u64, depth: u32) -> (usize, usize) {
        let slots = 1 << (self.depth - depth);
        let slot = (hash >> 1 >> (63 - self.depth)) as usize;
        (slot & !(slots - 1), slots)
    }

    fn double(&mut self) -> bool {
        let segments = self.infos.len() - self.vacant.len();
        if self.directory.len() * 2 > segments * MAX_SLOTS_PER_SEGMENT {
            return false;
        }
        self.directory = self.directory.iter().flat_map(|&number| [number, number]).collect();
        self.depth += 1;
        true
    }

    /// Halves the directory while it is much too large for its segments.
    fn halve(&mut self) {
        let segments = self.infos.len() - self.vacant.len();
        if self.depth < 8 || self.directory.len() < segments * 8 {
            return;
        }
        // Every segment must be named by a pair: looked at seldom, because segments are joined some hundreds of removals apart.
        if self.directory.chunks_exact(2).all(|pair| pair[0] == pair[1]) {
            self.directory = self.directory.iter().copied().step_by(2).collect();
            self.depth -= 1;
        }
    }

    fn new_segment(&mut self, depth: u8) -> u32 {
        let number = self.vacant.pop_first().unwrap_or_else(|| {
            self.infos.push(Info::default());
            self.infos.len() as u32 - 1
        });
        let chunk = number as usize / SEGMENTS_PER_CHUNK;
        if chunk == self.chunks.len() {
            self.chunks.push(None);
        }
        if self.chunks[chunk].is_none() {
            self.chunks[chunk] = Some(Chunk::new());
        } else {
            self.segment_mut(number).clear();
        }
        if number as usize % SEGMENTS_PER_CHUNK == SEGMENTS_PER_CHUNK - 1 {
            if let Some(chunk) = &self.chunks[chunk] {
                chunk.allow_huge();
            }
            self.plain.push_back(chunk as u32);
        }
        self.infos[number as usize] = Info { depth, entries: 0 };
        number
    }

    /// Moves the last segment into a gap, so that a table that has shrunk gives its chunks back.
    fn pack(&mut self, entries: &impl Entries) {
        let last = self.infos.len() as u32 - 1;
        if self.vacant.len() * 8 < self.infos.len() || self.vacant.first().is_none_or(|&gap| gap > last) {
            return;
        }
        // Where it is named is known from the hash of any of its entries. One without entries joins its neighbour soon.
        let Some(entry) = self.segment(last).refs().next() else {
            return;
        };
        let hash = entries.hash(entry);
        let Info { depth, entries: held } = self.infos[last as usize];
        let gap = self.new_segment(depth);
        let (first, slots) = self.directory_slots(hash, u32::from(depth));
        let copy: Vec<u8> = self.segment(last).as_bytes().to_vec();
        self.segment_mut(gap).as_mut_bytes().copy_from_slice(&copy);
        self.infos[gap as usize].entries = held;
        self.directory[first..first + slots].fill(gap);
        self.drop_segment(last);
    }

    fn drop_segment(&mut self, number: u32) {
        self.vacant.insert(number);
        while let Some(last) = self.vacant.last().copied()
            && last as usize + 1 == self.infos.len()
        {
            self.vacant.pop_last();
            self.infos.pop();
        }
        let held = self.infos.len().div_ceil(SEGMENTS_PER_CHUNK);
        // One more than needed is kept, so that a table at the edge does not map and unmap.
        self.chunks.truncate(held + 1);
    }

    /// Panics on a broken invariant; returns the number of entries.
    pub(crate) fn check(&self, entries: &impl Entries) -> u64 {
        assert_eq!(self.directory.len(), 1 << self.depth);
        let mut count = 0;
        let mut slot = 0;
        let mut seen = BTreeSet::new();
        while slot < self.directory.len() {
            let number = self.directory[slot];
            assert!(seen.insert(number), "a segment is named in two places");
            let Info { depth, entries: held } = self.infos[number as usize];
            let slots = 1usize << (self.depth - u32::from(depth));
            assert_eq!(slot % slots, 0, "a segment's directory slots are not aligned");
            assert!(
                self.directory[slot..slot + slots].iter().all(|&named| named == number),
                "a segment lacks a slot"
            );
            let segment = self.segment(number);
            segment.check(|entry| entries.hash(entry));
            let mut found = 0;
            for entry in segment.refs() {
                assert_eq!(
                    self.locate(entries.hash(entry)),
                    number,
                    "an entry is in the wrong segment"
                );
                found += 1;
            }
            assert_eq!(found, held, "a segment's entries are miscounted");
            count += u64::from(found);
            slot += slots;
        }
        assert_eq!(seen.len() + self.vacant.len(), self.infos.len(), "a segment was lost");
        for &(hash, entry) in &self.overflow {
            assert_eq!(entries.hash(entry), hash, "an entry overflowed under another hash");
        }
        count + self.overflow.len() as u64
    }
}
