//! The hashes of entries that were hashed a moment ago, by their versions.
//!
//! A victim's hash is needed when it is chosen, before that to fetch its part of the index ahead, and when its removal is applied.
//! No two entries of a shard ever have the same version, so a version names a hash as well as the key does, and comparing it is
//! cheaper than hashing a key again. Nothing has to be taken out: a version that is not there any more is not asked for.

use crate::version::Version;

const SLOTS: usize = 128;

#[derive(Debug)]
pub(crate) struct HashMemo {
    slots: [(u64, u64); SLOTS],
}

impl HashMemo {
    pub(crate) fn new() -> Self {
        // No entry has the version that is absent.
        Self { slots: [(0, 0); SLOTS] }
    }

    #[inline]
    pub(crate) fn note(&mut self, version: Version, hash: u64) {
        self.slots[slot_of(version)] = (version.get(), hash);
    }

    #[inline]
    pub(crate) fn hash(&self, version: Version) -> Option<u64> {
        let (held, hash) = self.slots[slot_of(version)];
        (held == version.get() && !version.is_absent()).then_some(hash)
    }
}

/// Neighbours in one log entry, and first commands of neighbouring entries, have slots of their own.
#[inline]
fn slot_of(version: Version) -> usize {
    ((version.get() >> 16) + (version.get() & 0xffff)) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_by_the_whole_version() {
        let mut memo = HashMemo::new();
        assert_eq!(memo.hash(Version::ABSENT), None);
        for position in 0..100 {
            memo.note(Version::new(7, position), u64::from(position));
        }
        for position in 0..100 {
            assert_eq!(memo.hash(Version::new(7, position)), Some(u64::from(position)));
        }
        assert_eq!(memo.hash(Version::new(7 + SLOTS as u64, 0)), None);
        assert_eq!(memo.hash(Version::new(8, 0)), None);
    }
}
