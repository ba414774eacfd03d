//! A shard's log as openraft asks for it.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use futures_util::{Stream, stream};
use generation_engine::journal::Record;
use openraft::OptionalSend;
use openraft::errors::LeaderChanged;
use openraft::storage::{IOFlushed, LeaderBoundedStreamError, LogState, RaftLogReader, RaftLogStorage};
use openraft_rt::Oneshot as _;

use super::{Journal, Owned, Waiting, disk_vote, log, read};
use crate::env::disk::Disk;
use crate::points;
use crate::raft::runtime::LocalOneshot;
use crate::raft::types::{Entry, LeaderId, LogId, Types, Vote, from_journal, to_journal};
use generation_engine::mutants::{Mutant, active};

/// Entries read at once, in bytes; one at least.
const READ_BYTES: usize = 1 << 20;

/// The log of one shard's replica. Clones are the same log.
#[derive(Debug)]
pub struct LogStore<D: Disk> {
    journal: Journal<D>,
    shard: u32,
}

impl<D: Disk> Clone for LogStore<D> {
    fn clone(&self) -> Self {
        Self::new(self.journal.clone(), self.shard)
    }
}

impl<D: Disk> LogStore<D> {
    pub(super) fn new(journal: Journal<D>, shard: u32) -> Self {
        Self { journal, shard }
    }

    /// The last vote, which may not be on the disk yet; nobody is told of it before.
    pub(crate) fn vote(&self) -> Option<Vote> {
        let state = self.journal.0.state.borrow();
        let vote = state.logs.get(&self.shard)?.vote?;
        let leader_id = LeaderId {
            term: vote.term,
            node_id: vote.leader,
        };
        Some(Vote {
            leader_id,
            committed: vote.committed,
        })
    }

    /// Whether the first this replica promised in the vote's term was to follow the vote's candidate.
    pub(crate) fn promised_first(&self, vote: Vote) -> bool {
        let state = self.journal.0.state.borrow();
        let log = state.logs.get(&self.shard);
        log.is_some_and(|log| log.promised_first(vote.leader_id.term, vote.leader_id.node_id))
    }

    /// `Err` with what was promised to another leader.
    fn check_leader(&self, leader: LeaderId) -> Result<(), LeaderChanged<Types>> {
        let vote = self.vote();
        match &vote {
            Some(vote) if vote.committed && vote.leader_id == leader => Ok(()),
            _ => Err(LeaderChanged::new(leader, vote)),
        }
    }

    /// The entries of a range, read in pieces. `check` is asked before and after each piece is read; its error ends the stream.
    fn stream<E: From<io::Error>>(
        self,
        start: u64,
        end: u64,
        check: impl Fn(&Self) -> Result<(), E>,
    ) -> impl Stream<Item = Result<Entry, E>> {
        let piece = Vec::new().into_iter();
        stream::unfold(
            (Some(self), start, piece, check),
            move |(store, start, mut piece, check)| async move {
                if let Some(entry) = Iterator::next(&mut piece) {
                    return Some((Ok(entry), (store, start, piece, check)));
                }
                let store = store?;
                let read = async {
                    check(&store)?;
                    let entries = store.read(start, end, READ_BYTES).await?;
                    check(&store)?;
                    Ok(entries)
                };
                match read.await {
                    Ok(entries) => {
                        let start = entries.last().map_or(start, |last| last.log_id.index + 1);
                        let mut piece = entries.into_iter();
                        let entry = Iterator::next(&mut piece)?;
                        Some((Ok(entry), (Some(store), start, piece, check)))
                    }
                    Err(error) => Some((Err(error), (None, start, piece, check))),
                }
            },
        )
    }

    async fn read(&self, start: u64, end: u64, limit: usize) -> io::Result<Vec<Entry>> {
        read::entries(&self.journal, self.shard, start, end, limit).await
    }
}

/// The same range as first and one past the last.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl<D: Disk> RaftLogReader<Types> for LogStore<D> {
    async fn leader_bounded_stream<RB>(
        &mut self,
        leader: LeaderId,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, LeaderBoundedStreamError<Types>>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.clone()
            .stream(start, end, move |store| Ok(store.check_leader(leader)?))
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.clone().stream(start, end, |_| Ok(()))
    }

    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BYTES).await
    }
}

impl<D: Disk> RaftLogStorage<Types> for LogStore<D> {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let state = self.journal.0.state.borrow();
        let log = state.logs.get(&self.shard);
        Ok(LogState {
            last_purged_log_id: log.and_then(|log| log.purged).map(from_journal),
            last_log_id: log.and_then(|log| log.last).map(from_journal),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (sender, receiver) = LocalOneshot::channel();
        {
            let mut state = self.journal.0.state.borrow_mut();
            state.check()?;
            let (shard, vote) = (self.shard, disk_vote(vote));
            let Some(log) = state.logs.get_mut(&shard) else {
                return Err(retired(shard));
            };
            log.promise(vote);
            let record = Owned::Other(Record::Vote { shard, vote });
            self.journal.push(&mut state, record, Some(Waiting::Vote(sender)));
        }
        if active(Mutant::VoteUnsynced) {
            return Ok(());
        }
        // After a failure the sender is kept and nothing ever comes: a promise that may not be on the disk is not given.
        receiver.await.map_err(io::Error::other)??;
        D::point(points::VOTE_WRITTEN);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.journal
            .mark_committed(self.shard, committed.as_ref().map(to_journal));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let state = self.journal.0.state.borrow();
        let log = state.logs.get(&self.shard);
        Ok(log.and_then(|log| log.committed).map(from_journal))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut state = self.journal.0.state.borrow_mut();
        state.check()?;
        let shard = self.shard;
        let largest = self.journal.entry_bytes();
        let mut last = None;
        for entry in entries {
            let Some(log) = state.logs.get_mut(&shard) else {
                return Err(retired(shard));
            };
            let (kind, payload) = log::to_record(&entry);
            let log_id = to_journal(&entry.log_id);
            if payload.len() > largest {
                let message = format!(
                    "an entry of {} bytes does not fit a segment of the journal",
                    payload.len()
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            log.append(entry);
            let record = Owned::Entry {
                shard,
                log_id,
                kind,
                payload,
            };
            // The callback goes with the last of them.
            if let Some(record) = last.replace(record) {
                self.journal.push(&mut state, record, None);
            }
        }
        match last {
            Some(record) if active(Mutant::AppendUnsynced) => {
                self.journal.push(&mut state, record, None);
                callback.io_completed(Ok(()));
            }
            Some(record) => self.journal.push(&mut state, record, Some(Waiting::Flushed(callback))),
            None => callback.io_completed(Ok(())),
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let mut state = self.journal.0.state.borrow_mut();
        state.check()?;
        let (shard, after) = (self.shard, last_log_id.as_ref().map(to_journal));
        let Some(log) = state.logs.get_mut(&shard) else {
            return Err(retired(shard));
        };
        let end = after.map_or(0, |after| after.index + 1);
        if log.last.is_none_or(|last| last.index < end) {
            return Ok(());
        }
        log.truncate(after);
        if active(Mutant::TruncationUnlogged) {
            return Ok(());
        }
        let record = Owned::Other(Record::Truncate { shard, after });
        self.journal.push(&mut state, record, None);
        D::point(points::LOG_TRUNCATED);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let mut state = self.journal.0.state.borrow_mut();
        state.check()?;
        let (shard, up_to) = (self.shard, to_journal(&log_id));
        let Some(log) = state.logs.get_mut(&shard) else {
            return Err(retired(shard));
        };
        log.purge(up_to);
        let record = Owned::Other(Record::Purge { shard, up_to });
        self.journal.push(&mut state, record, None);
        D::point(points::LOG_PURGED);
        Ok(())
    }
}

fn retired(shard: u32) -> io::Error {
    io::Error::other(format!("the replica of shard {shard} has left this node"))
}
