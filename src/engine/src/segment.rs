//! One segment of the index: 64 buckets of one cache line, 12 slots each.
//!
//! A bucket holds, for each slot, an 8-bit tag of the hash and a 32-bit reference; a tag of zero means empty. An entry lives in
//! its home bucket or, if that was full, in one of the next few; the home then counts it as strayed, so that a search that
//! finds nothing at home mostly stops there.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::arena::Ref;
use crate::cpu;

/// Buckets of a segment.
pub(crate) const BUCKETS: usize = 64;

/// Slots of a bucket.
pub(crate) const SLOTS: usize = 12;

/// How many buckets after its home an entry may be in.
const MAX_STRAY: usize = 15;

/// A segment with this many entries counts as full: beyond it too many would stray.
pub(crate) const FULL: usize = BUCKETS * SLOTS * 9 / 10;

#[derive(Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(64))]
pub(crate) struct Bucket {
    tags: [u8; SLOTS],
    /// Entries whose home this is that are in another bucket.
    strayed: u8,
    /// How far the farthest of them ever was, since there have been any.
    reach: u8,
    unused: [u8; 2],
    refs: [u32; SLOTS],
}

/// The unit of growth of the index: 4 KiB.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(64))]
pub(crate) struct Segment {
    buckets: [Bucket; BUCKETS],
}

const _: () = assert!(size_of::<Segment>() == 4096 && size_of::<Bucket>() == 64);

#[inline]
fn home_of(hash: u64) -> usize {
    hash as usize % BUCKETS
}

/// Never zero.
#[inline]
fn tag_of(hash: u64) -> u8 {
    ((hash >> 6) as u8).max(1)
}

impl Segment {
    /// The home bucket, to be prefetched.
    #[inline]
    pub(crate) fn home(&self, hash: u64) -> &Bucket {
        &self.buckets[home_of(hash)]
    }

    /// The bucket in which an entry that strayed from its home most probably is; `None` if none has strayed.
    #[inline]
    pub(crate) fn beyond(&self, hash: u64) -> Option<&Bucket> {
        let home = home_of(hash);
        (self.buckets[home].strayed > 0).then(|| &self.buckets[(home + 1) % BUCKETS])
    }

    /// The first reference under this hash's tag that `accept` accepts.
    #[inline]
    pub(crate) fn find(&self, hash: u64, mut accept: impl FnMut(Ref) -> bool) -> Option<Ref> {
        let (home, tag) = (home_of(hash), tag_of(hash));
        for stray in 0..=usize::from(self.buckets[home].reach) {
            let bucket = &self.buckets[(home + stray) % BUCKETS];
            let mut matches = bucket.matches(tag);
            while matches != 0 {
                let found = bucket.refs[matches.trailing_zeros() as usize];
                if accept(found) {
                    return Some(found);
                }
                matches &= matches - 1;
            }
        }
        None
    }

    /// Adds a reference; `false` if there is no room near its home.
    pub(crate) fn insert(&mut self, hash: u64, entry: Ref) -> bool {
        let home = home_of(hash);
        for stray in 0..=MAX_STRAY {
            let bucket = &mut self.buckets[(home + stray) % BUCKETS];
            let empty = bucket.matches(0);
            if empty == 0 {
                continue;
            }
            let slot = empty.trailing_zeros() as usize;
            bucket.tags[slot] = tag_of(hash);
            bucket.refs[slot] = entry;
            if stray > 0 {
                let home = &mut self.buckets[home];
                home.strayed += 1;
                home.reach = home.reach.max(stray as u8);
            }
            return true;
        }
        false
    }

    /// Removes a reference; `false` if it is not there.
    pub(crate) fn remove(&mut self, hash: u64, entry: Ref) -> bool {
        let Some((bucket, slot, stray)) = self.position(hash, entry) else {
            return false;
        };
        self.buckets[bucket].tags[slot] = 0;
        if stray > 0 {
            let home = &mut self.buckets[home_of(hash)];
            home.strayed -= 1;
            if home.strayed == 0 {
                home.reach = 0;
            }
        }
        true
    }

    /// Puts a reference in another's place; `false` if that is not there.
    pub(crate) fn replace(&mut self, hash: u64, old: Ref, new: Ref) -> bool {
        let Some((bucket, slot, _)) = self.position(hash, old) else {
            return false;
        };
        self.buckets[bucket].refs[slot] = new;
        true
    }

    /// Every reference in it, in no particular order.
    pub(crate) fn refs(&self) -> impl Iterator<Item = Ref> {
        self.buckets.iter().flat_map(|bucket| {
            bucket
                .tags
                .iter()
                .zip(bucket.refs)
                .filter(|&(&tag, _)| tag != 0)
                .map(|(_, entry)| entry)
        })
    }

    pub(crate) fn clear(&mut self) {
        self.as_mut_bytes().fill(0);
    }

    /// Panics unless the strays are counted right, given the hash of each entry.
    pub(crate) fn check(&self, hash_of: impl Fn(Ref) -> u64) {
        let mut strayed = [(0u8, 0u8); BUCKETS];
        for (number, bucket) in self.buckets.iter().enumerate() {
            for (&tag, &entry) in bucket.tags.iter().zip(&bucket.refs).filter(|&(&tag, _)| tag != 0) {
                let hash = hash_of(entry);
                assert_eq!(tag, tag_of(hash), "a tag is not its entry's");
                let stray = (number + BUCKETS - home_of(hash)) % BUCKETS;
                assert!(stray <= MAX_STRAY, "an entry is too far from its home");
                if stray > 0 {
                    let (count, reach) = &mut strayed[home_of(hash)];
                    *count += 1;
                    *reach = (*reach).max(stray as u8);
                }
            }
        }
        for (bucket, (count, reach)) in self.buckets.iter().zip(strayed) {
            assert_eq!(bucket.strayed, count, "strays are miscounted");
            assert!(bucket.reach >= reach, "a stray is out of reach");
        }
    }

    fn position(&self, hash: u64, entry: Ref) -> Option<(usize, usize, usize)> {
        let home = home_of(hash);
        (0..=usize::from(self.buckets[home].reach)).find_map(|stray| {
            let number = (home + stray) % BUCKETS;
            let bucket = &self.buckets[number];
            let mut matches = bucket.matches(tag_of(hash));
            while matches != 0 {
                let slot = matches.trailing_zeros() as usize;
                if bucket.refs[slot] == entry {
                    return Some((number, slot, stray));
                }
                matches &= matches - 1;
            }
            None
        })
    }
}

impl Bucket {
    /// The reference of the first slot whose tag is that of `hash`, whose home this is: where the entry most probably is.
    #[inline]
    pub(crate) fn guess(&self, hash: u64) -> Option<Ref> {
        let matches = self.matches(tag_of(hash));
        (matches != 0).then(|| self.refs[matches.trailing_zeros() as usize])
    }

    /// The slots with this tag, one bit each.
    #[inline]
    fn matches(&self, tag: u8) -> u32 {
        let (low, high) = (self.tags.first_chunk::<8>(), self.tags.last_chunk::<4>());
        let (low, high) = low.zip(high).expect("invariant: there are twelve tags");
        cpu::equal_bytes(u64::from_le_bytes(*low), u32::from_le_bytes(*high), tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Box<Segment> {
        Box::new(Segment::read_from_bytes(&[0; 4096]).expect("the size of a segment"))
    }

    #[test]
    fn holds_and_gives_back_what_was_put_in() {
        let mut segment = empty();
        let hash = |entry: Ref| u64::from(entry).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let held = (0..FULL as Ref)
            .take_while(|&entry| segment.insert(hash(entry), entry))
            .count() as Ref;
        assert!(held as usize > BUCKETS * SLOTS * 7 / 10, "only {held} went in");
        segment.check(hash);
        for entry in 0..held {
            assert_eq!(segment.find(hash(entry), |found| found == entry), Some(entry));
            assert!(segment.replace(hash(entry), entry, entry + 10_000));
            assert!(segment.replace(hash(entry), entry + 10_000, entry));
        }
        assert_eq!(segment.refs().count() as Ref, held);
        for entry in (0..held).rev() {
            assert!(segment.remove(hash(entry), entry));
            assert!(!segment.remove(hash(entry), entry));
            assert_eq!(segment.find(hash(entry), |found| found == entry), None);
        }
        segment.check(hash);
        assert_eq!(segment.refs().count(), 0);
    }

    #[test]
    fn one_home_overflows_into_its_neighbours() {
        let mut segment = empty();
        let room = (MAX_STRAY + 1) * SLOTS;
        for entry in 0..room as Ref {
            assert!(segment.insert(63, entry));
        }
        assert!(!segment.insert(63, 1_000));
        segment.check(|_| 63);
        assert!((0..room as Ref).all(|entry| segment.remove(63, entry)));
        segment.check(|_| 63);
    }
}
