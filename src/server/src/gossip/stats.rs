//! What gossip has done, in counters that any thread reads.

use std::sync::atomic::{AtomicU64, Ordering};

use super::seal::Refusal;

/// Counters of one node's gossip since it began.
#[derive(Debug, Default)]
pub struct GossipStats {
    pub(super) sent_datagrams: Counter,
    pub(super) sent_bytes: Counter,
    pub(super) received_datagrams: Counter,
    pub(super) received_bytes: Counter,
    pub(super) refused: [Counter; Refusal::ALL.len()],
    pub(super) unsent: Counter,
    pub(super) restarts: Counter,
    pub(super) key_changes: Counter,
    pub(super) key_errors: Counter,
    pub(super) passed_over: Counter,
}

/// A counter.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        // Counters order nothing.
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl GossipStats {
    /// Datagrams given to the kernel.
    pub fn sent_datagrams(&self) -> u64 {
        self.sent_datagrams.get()
    }

    /// Their bytes, without the headers of UDP and IP.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.get()
    }

    /// Datagrams that arrived, refused ones too.
    pub fn received_datagrams(&self) -> u64 {
        self.received_datagrams.get()
    }

    /// Their bytes, without the headers of UDP and IP.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.get()
    }

    /// Datagrams refused for this reason.
    pub fn refused(&self, refusal: Refusal) -> u64 {
        self.refused[refusal as usize].get()
    }

    /// Messages that were not sent: too long, or the kernel refused a part.
    pub fn unsent(&self) -> u64 {
        self.unsent.get()
    }

    /// How often gossip ended by itself and was started again.
    pub fn restarts(&self) -> u64 {
        self.restarts.get()
    }

    /// How often the key file was read with a change.
    pub fn key_changes(&self) -> u64 {
        self.key_changes.get()
    }

    /// How often a changed key file could not be used.
    pub fn key_errors(&self) -> u64 {
        self.key_errors.get()
    }

    /// Keys and nodes that were told and not understood.
    pub fn passed_over(&self) -> u64 {
        self.passed_over.get()
    }
}
