//! A shard's log as its replica sees it: everything it has asked for, durable or not, with the newest entries in memory.

use std::collections::VecDeque;

use generation_engine::journal::{EntryKind, LogId as DiskLogId, ShardState, Vote as DiskVote};

use crate::raft::membership;
use crate::raft::types::{Commands, Entry, Payload, from_journal, to_journal};

/// What an entry takes in memory beside its payload, in bytes, roughly.
const ENTRY_BYTES: usize = 96;

/// How exactly it is known how much of the log a purge removes, in bytes.
const MARK_BYTES: u64 = 64 << 10;

/// The sequence of what is in no frame yet.
const UNSEALED: u64 = u64::MAX;

/// An entry in memory.
#[derive(Debug)]
struct Kept {
    entry: Entry,
    /// The frame that holds it.
    sequence: u64,
}

/// One shard's log.
#[derive(Debug)]
pub(super) struct ShardLog {
    pub(super) replica: u64,
    pub(super) vote: Option<DiskVote>,
    /// The latest term that anything was promised in, and whom the first promise in it was made to. After a start: to nobody any more,
    /// because the one that is known need not have been the first.
    first_vote: Option<(u64, Option<u64>)>,
    pub(super) committed: Option<DiskLogId>,
    pub(super) purged: Option<DiskLogId>,
    pub(super) last: Option<DiskLogId>,
    /// Index of the first entry there is, in memory or on disk. Above `last` if there is none.
    pub(super) first: u64,
    /// The newest entries, without a hole, up to `last`.
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// Bytes appended here in all, and up to the last purge.
    appended: u64,
    purged_bytes: u64,
    /// Indexes, and what had been appended up to them.
    marks: VecDeque<(u64, u64)>,
}

impl ShardLog {
    pub(super) fn new(replica: u64) -> Self {
        Self {
            replica,
            vote: None,
            first_vote: None,
            committed: None,
            purged: None,
            last: None,
            first: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            appended: 0,
            purged_bytes: 0,
            marks: VecDeque::new(),
        }
    }

    /// Takes in a promise.
    pub(super) fn promise(&mut self, vote: DiskVote) {
        self.vote = Some(vote);
        if self.first_vote.is_none_or(|(term, _)| term < vote.term) {
            self.first_vote = Some((vote.term, Some(vote.leader)));
        }
    }

    /// Whether the first promise in a term was made to this candidate.
    pub(super) fn promised_first(&self, term: u64, candidate: u64) -> bool {
        self.first_vote == Some((term, Some(candidate)))
    }

    /// Bytes appended since the last purge, give or take [`MARK_BYTES`], without what was there at the start.
    pub(super) fn grown_bytes(&self) -> u64 {
        self.appended - self.purged_bytes
    }

    /// With the state that recovery found, and the entries put in meanwhile.
    pub(super) fn recovered(mut self, state: &ShardState) -> Self {
        self.replica = state.replica;
        self.vote = state.vote;
        self.first_vote = state.vote.map(|vote| (vote.term, None));
        self.committed = state.committed;
        self.purged = state.purged;
        self.last = state.last;
        self.first = state.first;
        self
    }

    /// Index of the first entry in memory; above `last` if there is none.
    pub(super) fn first_kept(&self) -> u64 {
        self.last.map_or(0, |last| last.index + 1) - self.kept.len() as u64
    }

    /// Puts an entry at the end.
    pub(super) fn append(&mut self, entry: Entry) {
        self.append_sealed(entry, UNSEALED);
    }

    pub(super) fn append_sealed(&mut self, entry: Entry, sequence: u64) {
        let log_id = to_journal(&entry.log_id);
        if self.last.is_none() {
            self.first = log_id.index;
        }
        self.last = Some(log_id);
        let bytes = bytes_of(&entry);
        self.kept_bytes += bytes;
        self.appended += bytes as u64;
        let marked = self.marks.back().map_or(self.purged_bytes, |&(_, appended)| appended);
        if self.appended - marked >= MARK_BYTES {
            self.marks.push_back((log_id.index, self.appended));
        }
        self.kept.push_back(Kept { entry, sequence });
    }

    /// Notes which frame an entry went into.
    pub(super) fn sealed(&mut self, log_id: DiskLogId, sequence: u64) {
        let place = log_id.index.checked_sub(self.first_kept());
        let kept = place.and_then(|place| self.kept.get_mut(place as usize));
        // What was truncated or purged meanwhile is not there, or another entry is.
        if let Some(kept) = kept.filter(|kept| to_journal(&kept.entry.log_id) == log_id) {
            kept.sequence = sequence;
        }
    }

    /// Index of the first entry that is in no frame yet; one past the last if all are.
    pub(super) fn first_unsealed(&self) -> u64 {
        let sealed = self.kept.partition_point(|kept| kept.sequence != UNSEALED);
        self.first_kept() + sealed as u64
    }

    /// Forgets the oldest entries beyond `limit` bytes, as far as they are durable.
    pub(super) fn shrink(&mut self, limit: usize, durable_up_to: u64) {
        while self.kept_bytes > limit
            && let Some(front) = self.kept.front()
            && front.sequence <= durable_up_to
        {
            self.kept_bytes -= bytes_of(&front.entry);
            self.kept.pop_front();
        }
    }

    /// Removes what comes after `after`.
    pub(super) fn truncate(&mut self, after: Option<DiskLogId>) {
        let end = after.map_or(0, |after| after.index + 1);
        while let Some(back) = self.kept.back()
            && back.entry.log_id.index >= end
        {
            self.kept_bytes -= bytes_of(&back.entry);
            self.kept.pop_back();
        }
        while self.marks.back().is_some_and(|&(index, _)| index >= end) {
            self.marks.pop_back();
        }
        self.last = after;
    }

    /// Removes what comes up to `up_to`, which may lie behind the end.
    pub(super) fn purge(&mut self, up_to: DiskLogId) {
        if self.purged.is_some_and(|purged| purged.index >= up_to.index) {
            return;
        }
        while let Some(front) = self.kept.front()
            && front.entry.log_id.index <= up_to.index
        {
            self.kept_bytes -= bytes_of(&front.entry);
            self.kept.pop_front();
        }
        while let Some(&(index, appended)) = self.marks.front()
            && index <= up_to.index
        {
            self.purged_bytes = appended;
            self.marks.pop_front();
        }
        if self.last.is_none_or(|last| last.index <= up_to.index) {
            self.purged_bytes = self.appended;
        }
        self.purged = Some(up_to);
        self.first = up_to.index + 1;
        if self.last.is_none_or(|last| last.index < up_to.index) {
            self.last = Some(up_to);
        }
    }

    /// The entries in memory of `range`, in order, until `take` has had enough.
    pub(super) fn kept(&self, start: u64, end: u64) -> impl Iterator<Item = &Entry> {
        let skip = start.saturating_sub(self.first_kept()) as usize;
        let entries = self.kept.iter().skip(skip).map(|kept| &kept.entry);
        entries.take_while(move |entry| entry.log_id.index < end)
    }
}

/// What an entry takes in memory, in bytes, roughly.
pub(super) fn bytes_of(entry: &Entry) -> usize {
    ENTRY_BYTES
        + match &entry.payload {
            Payload::Normal(commands) => commands.0.len(),
            Payload::Blank | Payload::Membership(_) => 0,
        }
}

/// An entry as the journal keeps it.
pub(super) fn to_record(entry: &Entry) -> (EntryKind, bytes::Bytes) {
    match &entry.payload {
        Payload::Blank => (EntryKind::Blank, bytes::Bytes::new()),
        Payload::Normal(Commands(bytes)) => (EntryKind::Commands, bytes.clone()),
        Payload::Membership(members) => (EntryKind::Membership, membership::encode(members).into()),
    }
}

/// The reverse. `None`: a membership that cannot be read, which no checksum let through unless a newer release wrote it.
pub(super) fn from_record(log_id: DiskLogId, kind: EntryKind, payload: &[u8]) -> Option<Entry> {
    let payload = match kind {
        EntryKind::Blank => Payload::Blank,
        EntryKind::Commands => Payload::Normal(Commands(bytes::Bytes::copy_from_slice(payload))),
        EntryKind::Membership => Payload::Membership(membership::decode(payload)?),
    };
    let log_id = from_journal(log_id);
    Some(Entry { log_id, payload })
}
