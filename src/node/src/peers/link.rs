//! What a core has with one core of another node: its connections, what waits for one, and when the next dial may be.

use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_proto::peer::Class;
use generation_quic::ConnectionKey;

use super::config::PeerLimits;
use super::lane::{self, LANES};
use super::{PeerError, PeerId};

/// A message that waits for the connection being made.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) class: Class,
    pub(super) kind: u8,
    pub(super) shard: u16,
    pub(super) id: u64,
    pub(super) payload: Bytes,
    /// It waits for what is said to that peer next, for a moment.
    pub(super) along: bool,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: PeerId,
    /// The node's place in the list of nodes.
    pub(super) node: usize,
    /// The connection this core dialled, from its first packet on.
    pub(super) dialled: Option<ConnectionKey>,
    /// The connection the other side dialled, once it has said who it is.
    pub(super) accepted: Option<ConnectionKey>,
    pub(super) pending: Vec<Pending>,
    pub(super) pending_bytes: [usize; LANES],
    /// Calls without an answer.
    pub(super) calls: usize,
    /// Dials that failed since one succeeded.
    failures: u32,
    /// No dial before.
    rest_until: Instant,
    /// From when on the connection is kept up without anything to send.
    pub(super) kept_from: Instant,
    /// In the list of links to be dialled.
    pub(super) wanted: bool,
}

impl Link {
    pub(super) fn new(peer: PeerId, node: usize, now: Instant) -> Self {
        Self {
            peer,
            node,
            dialled: None,
            accepted: None,
            pending: Vec::new(),
            pending_bytes: [0; LANES],
            calls: 0,
            failures: 0,
            rest_until: now,
            kept_from: now,
            wanted: false,
        }
    }

    /// Whether a dial may be begun.
    pub(super) fn may_dial(&self, now: Instant) -> bool {
        self.rest_until <= now
    }

    /// When a connection is to be dialled to be kept up.
    pub(super) fn keep_at(&self) -> Instant {
        self.rest_until.max(self.kept_from)
    }

    /// A connection was greeted.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// A dial failed. `chance` is a random number.
    pub(super) fn failed(&mut self, now: Instant, limits: &PeerLimits, chance: u64) {
        let longest = limits.backoff_least.saturating_mul(1 << self.failures.min(16));
        let longest = longest.min(limits.backoff_most).max(Duration::from_nanos(2));
        self.failures = self.failures.saturating_add(1);
        // From its half to the whole, so that those who lost the same peer do not come back together.
        let half = longest.as_nanos() as u64 / 2;
        self.rest_until = now + Duration::from_nanos(half + chance % (half + 1));
    }

    /// Has a message wait for the connection being made.
    pub(super) fn postpone(&mut self, message: Pending) {
        self.pending_bytes[lane::of(message.payload.len())] += message.payload.len();
        self.pending.push(message);
    }

    /// What waited.
    pub(super) fn take_pending(&mut self) -> Vec<Pending> {
        self.pending_bytes = [0; LANES];
        std::mem::take(&mut self.pending)
    }

    /// Whether a message of `len` bytes may be queued behind `waiting` bytes and `messages` others.
    pub(super) fn check_room(&self, len: usize, waiting: usize, limits: &PeerLimits) -> Result<(), PeerError> {
        // A single message may be longer than the queue otherwise is.
        let full = waiting > 0 && waiting + len > limits.queue_bytes;
        if full || self.pending.len() >= limits.calls {
            return Err(PeerError::Busy);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "an Instant can be had in no other way")]
    fn pauses_double_up_to_the_longest_and_are_shortened_by_chance() {
        let now = Instant::now();
        let limits = PeerLimits::default();
        let mut link = Link::new(PeerId { node: 2, core: 0 }, 0, now);
        assert!(link.may_dial(now));
        let mut longest = limits.backoff_least;
        for chance in [0, u64::MAX, 1 << 20, 7, u64::MAX / 3, 5, 1, 0, 9] {
            link.failed(now, &limits, chance);
            assert!(!link.may_dial(now + (longest / 2).saturating_sub(Duration::from_nanos(1))));
            assert!(link.may_dial(now + longest));
            longest = (longest * 2).min(limits.backoff_most);
        }
        link.succeeded();
        link.failed(now, &limits, 0);
        assert!(link.may_dial(now + limits.backoff_least / 2));
    }
}
