//! A point-in-time image of a shard, taken in slices while it serves.
//!
//! Every entry carries a parity bit. Beginning a snapshot flips the store's parity: entries that differ from it belong to the
//! image and have not been taken yet; what is written from then on has the new parity and does not belong. The scanner walks the
//! pages in slices. Whoever is about to change, remove or move an entry that has not been taken copies it out first; the copies
//! are part of the image and come with the next slice. So nothing is forked, nothing stops, and no memory is taken but for
//! what changes between the beginning and the scanner's coming by.

use std::collections::VecDeque;

use crate::entries::View;
use crate::mutants::{Mutant, active};
use crate::shard::Tolerated;
use crate::version::Version;

/// What a snapshot begins with: the replicated state that is not in entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotHead {
    /// The last log entry it contains.
    pub index: u64,
    /// Shard time at that entry.
    pub time_ms: u64,
    /// How many entries will come.
    pub records: u64,
    /// The sum of their costs.
    pub used_bytes: u64,
    /// [`crate::Shard::state_hash`] of the image.
    pub state_hash: u128,
    /// What a cut of the budget left behind.
    pub tolerated: Tolerated,
}

/// One entry of a snapshot. Entries come in no particular order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotEntry<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// Where it was last written.
    pub version: Version,
    /// Unix milliseconds of shard time from which it is gone; 0 = never.
    pub expires_at_ms: u64,
    /// How recently or often it was used, from 0 (cold) to [`SnapshotEntry::HOTTEST`], as this replica knows: a hint, not
    /// replicated state.
    pub recency: u8,
}

impl SnapshotEntry<'_> {
    /// The largest [`SnapshotEntry::recency`].
    pub const HOTTEST: u8 = 7;
}

/// A snapshot is being taken already, or one that was given up has not been walked to its end:
/// [`crate::Shard::snapshot_slice`] does that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a snapshot of this shard is under way")]
pub struct SnapshotBusy;

/// An entry as it was when the snapshot began.
#[derive(Debug)]
struct Image {
    /// Key and value.
    bytes: Box<[u8]>,
    key_len: usize,
    version: Version,
    expires_at_ms: u64,
    recency: u8,
}

/// A snapshot under way.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Where the scanner goes on.
    pub(crate) page: u32,
    /// The image is not wanted any more: the walk goes on only to bring all entries to one parity.
    pub(crate) abandoned: bool,
    images: VecDeque<Image>,
    image_bytes: u64,
}

impl Snapshot {
    /// Copies out an entry that is about to change.
    pub(crate) fn preserve(&mut self, view: &View<'_>, recency: u8) {
        if self.abandoned || active(Mutant::ImageTorn) {
            return;
        }
        let bytes = [view.key, view.value].concat().into_boxed_slice();
        self.image_bytes += (bytes.len() + size_of::<Image>()) as u64;
        let (version, expires_at_ms) = (view.version, view.expires_at_ms);
        self.images.push_back(Image {
            bytes,
            key_len: view.key.len(),
            version,
            expires_at_ms,
            recency,
        });
    }

    /// Gives up the image.
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
        self.images = VecDeque::new();
        self.image_bytes = 0;
    }

    /// Visits up to `limit` of the copies; returns how many.
    pub(crate) fn drain(&mut self, limit: usize, visit: &mut impl FnMut(SnapshotEntry<'_>)) -> usize {
        let taken = self.images.len().min(limit);
        for image in self.images.drain(..taken) {
            self.image_bytes -= (image.bytes.len() + size_of::<Image>()) as u64;
            let (key, value) = image.bytes.split_at(image.key_len);
            let Image {
                version,
                expires_at_ms,
                recency,
                ..
            } = image;
            visit(SnapshotEntry {
                key,
                value,
                version,
                expires_at_ms,
                recency,
            });
        }
        taken
    }

    /// Whether no copies wait.
    pub(crate) fn drained(&self) -> bool {
        self.images.is_empty()
    }

    /// Memory held by copies.
    pub(crate) fn image_bytes(&self) -> u64 {
        self.image_bytes
    }
}
