//! What S3-FIFO remembers of entries that left its small queue: a fingerprint each, and for how long.

use crate::cpu;

/// Fingerprints of a bucket, the newest first.
type Bucket = [u16; 8];

/// A set of hashes that forgets, bucket by bucket, in the order they came: 16 bits an entry, wrong about one hash in 8,000.
#[derive(Debug, Default)]
pub(crate) struct Ghost {
    buckets: Vec<Bucket>,
}

impl Ghost {
    /// Remembers `hash`. The table is made for `records` entries when first used, and made anew (empty) when that has changed
    /// by more than half: forgetting costs a few misses, copying would cost a pause.
    pub(crate) fn insert(&mut self, hash: u64, records: u64) {
        let wanted = (records * 9 / 10).div_ceil(8).max(1) as usize;
        if wanted > self.buckets.len() * 3 / 2 || wanted < self.buckets.len() / 2 {
            self.buckets = vec![[0; 8]; wanted];
        }
        let at = self.bucket(hash);
        let bucket = &mut self.buckets[at];
        bucket.copy_within(0..7, 1);
        bucket[0] = fingerprint(hash);
    }

    /// What is remembered of `hash` will be asked for soon.
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) {
        if let Some(bucket) = self.buckets.get(self.bucket(hash)) {
            cpu::prefetch(bucket);
        }
    }

    /// Whether `hash` is remembered; it is forgotten by that.
    pub(crate) fn take(&mut self, hash: u64) -> bool {
        if self.buckets.is_empty() {
            return false;
        }
        let at = self.bucket(hash);
        let bucket = &mut self.buckets[at];
        let Some(found) = bucket.iter().position(|&held| held == fingerprint(hash)) else {
            return false;
        };
        bucket.copy_within(found + 1.., found);
        bucket[7] = 0;
        true
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        (self.buckets.capacity() * size_of::<Bucket>()) as u64
    }

    fn bucket(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.buckets.len() as u128) >> 64) as usize
    }
}

/// From the low bits, which do not choose the bucket; never zero, which stands for nothing.
fn fingerprint(hash: u64) -> u16 {
    (hash as u16).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_latest_and_forgets_the_oldest() {
        let hash = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut ghost = Ghost::default();
        assert!(!ghost.take(hash(1)));
        for n in 1..=10_000 {
            ghost.insert(hash(n), 1_000);
        }
        let recent = (9_600..=10_000).filter(|&n| ghost.take(hash(n))).count();
        assert!(recent > 380, "only {recent} of the latest 401 are remembered");
        assert!(!ghost.take(hash(10_000)), "what was taken is forgotten");
        let old = (1..=5_000).filter(|&n| ghost.take(hash(n))).count();
        assert!(old < 50, "{old} of 5,000 old ones are remembered");
    }
}
