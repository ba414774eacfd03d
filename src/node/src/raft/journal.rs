//! One core's journal: the logs and votes of all its shards, on disk or, where the cluster is told so, in memory.
//!
//! ```text
//! replicas ─append, vote, truncate, purge─▶ queue ─▶ flusher: one frame, one write, one fdatasync ─▶ callbacks, in order
//!     ▲                                                       │
//!     └── reads: kept entries, else the frame on disk ◀── index of what lies where ──▶ segments used again
//! ```
//!
//! The format, its recovery and the bookkeeping of segments are [`generation_engine::journal`]'s; this module does the I/O.
//!
//! # What holds
//! - **Group commit.** Everything that all replicas of the core asked for in one turn goes out as one frame. While that is being
//!   written the next one gathers, and at most [`IN_FLIGHT`] are on their way.
//! - **Read your writes.** What was appended is readable when `append` returns; it is acknowledged when it is durable.
//! - **Nothing is acknowledged after a failure.** After the first failed write or sync, callbacks that wait are kept and never
//!   called, whatever is asked for later fails at once, and nothing is written any more ([`Journal::failure`]). Only a restart,
//!   which reads what is on the disk, leaves that state.
//! - **openraft never sees a full disk.** Space is allocated ahead, segment by segment; [`Journal::space`] says when what is left is
//!   kept for votes and the like, and proposals are refused then. A journal without any room waits; it does not fail.
//! - Votes wait for the disk; purges, truncations and commit marks do not: they are in front of whatever is acknowledged later.
//!
//! Not here: when snapshots are taken ([`Journal::forced_snapshot`] names the shard), what entries mean.

mod flush;
mod identity;
mod log;
mod open;
mod read;
mod store;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::task::Waker;

use bytes::Bytes;
use generation_engine::journal::{EntryKind, ForcedSnapshot, Record, Writer};
use openraft::storage::IOFlushed;

use self::log::ShardLog;
use super::runtime::Ambient;
use super::types::{LogId, Types, to_journal};
use crate::env::disk::Disk;

pub use generation_engine::journal::RecoveryError;
pub use identity::{Identity, IdentityError};
pub use store::LogStore;

use generation_engine::journal::{LogId as DiskLogId, Vote as DiskVote};

/// Frames that may be on their way to the disk at once.
pub const IN_FLIGHT: usize = 2;

/// Files a journal may have beyond its limit, for votes and for what makes room: a restart ends a segment early, and elections go on
/// while no snapshot can be taken.
const EMERGENCY_FILES: usize = 4;

/// A frame is sealed when it has grown to this, in bytes, though more waits.
const FRAME_BYTES: usize = 1 << 20;

/// Where and how large a journal is.
#[derive(Debug, Clone)]
pub struct JournalConfig {
    /// Whose journal it is. One of another identity is refused.
    pub identity: Identity,
    /// Length of each segment file in bytes, a multiple of 4096.
    pub segment_bytes: u64,
    /// Most segment files there may be, at least 4.
    pub segments: usize,
    /// Bytes of entries kept in memory for each shard, beside those that are not durable yet.
    pub kept_bytes: usize,
}

/// Why a journal was not opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk.
    #[error("cannot {action} {path} of the journal: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// It belongs to somebody else, or its identity cannot be read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It is damaged, in the file named.
    #[error("{error} (file {file}): `generation repair --discard` retires the replicas concerned, which then rejoin")]
    Corrupt {
        /// The file's name.
        file: String,
        /// What is wrong.
        error: RecoveryError,
    },
}

/// Whether the journal takes proposals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// It does.
    Ample,
    /// What is left is kept for votes: proposals are refused until a snapshot has made room.
    Low,
}

/// A core's journal. Clones are the same journal.
pub struct Journal<D: Disk>(Rc<Inner<D>>);

struct Inner<D: Disk> {
    ambient: Rc<dyn Ambient>,
    config: JournalConfig,
    /// `None`: everything stays in memory.
    disk: Option<D>,
    state: RefCell<State<D>>,
}

/// What waits to become durable.
enum Waiting {
    /// openraft's callback of an append.
    Flushed(IOFlushed<Types>),
    /// A vote.
    Vote(super::runtime::OneshotSender<io::Result<()>>),
}

/// A record on its way to the next frame.
struct Queued {
    record: Owned,
    waiting: Vec<Waiting>,
}

/// A record that does not borrow.
enum Owned {
    Entry {
        shard: u32,
        log_id: DiskLogId,
        kind: EntryKind,
        payload: Bytes,
    },
    Other(Record<'static>),
}

impl Owned {
    fn as_record(&self) -> Record<'_> {
        match self {
            Self::Entry {
                shard,
                log_id,
                kind,
                payload,
            } => Record::Entry {
                shard: *shard,
                log_id: *log_id,
                kind: *kind,
                payload,
            },
            Self::Other(record) => *record,
        }
    }
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, and most of their combinations occur"
)]
struct State<D: Disk> {
    logs: BTreeMap<u32, ShardLog>,
    queue: VecDeque<Queued>,
    /// Commit marks that go with the next frame, if there is one.
    committed: BTreeMap<u32, Option<DiskLogId>>,
    /// By sequence of the frame they wait for.
    waiting: VecDeque<(u64, Vec<Waiting>)>,
    writer: Writer,
    /// The files of segments in use, by generation.
    segments: BTreeMap<u64, Segment<D>>,
    free: Vec<Segment<D>>,
    next_file: u64,
    /// Whether another file could not be allocated; tried again when the flusher next looks.
    full: bool,
    growing: bool,
    /// Only votes and what makes room go on, until a snapshot has been taken.
    emergency: bool,
    in_flight: usize,
    /// The last sequence without records behind which the journal is idle.
    idle_after: u64,
    failure: Option<Rc<str>>,
    flusher: Option<Waker>,
    stopped: bool,
}

struct Segment<D: Disk> {
    name: String,
    file: Rc<D::File>,
}

impl<D: Disk> Clone for Segment<D> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            file: Rc::clone(&self.file),
        }
    }
}

impl<D: Disk> Clone for Journal<D> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<D: Disk> std::fmt::Debug for Journal<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.0.state.borrow();
        f.debug_struct("Journal")
            .field("generation", &state.writer.generation())
            .field("room", &state.writer.room())
            .field("segments", &state.segments.len())
            .field("free", &state.free.len())
            .field("queued", &state.queue.len())
            .field("in_flight", &state.in_flight)
            .field("full", &state.full)
            .field("emergency", &state.emergency)
            .field("failure", &state.failure)
            .finish_non_exhaustive()
    }
}

impl<D: Disk> Journal<D> {
    /// A journal that forgets everything when the node ends: what was acknowledged is on a majority's memory.
    pub fn memory(ambient: Rc<dyn Ambient>, config: JournalConfig) -> Self {
        let writer = Writer::new(config.identity.journal, config.segment_bytes);
        Self(Rc::new(Inner {
            ambient,
            disk: None,
            state: RefCell::new(State::new(writer)),
            config,
        }))
    }

    /// Opens the journal of a disk, or makes one where there is none, and reads it back. The identity's journal id is replaced by
    /// the one found.
    pub async fn open(ambient: Rc<dyn Ambient>, disk: D, config: JournalConfig) -> Result<Self, OpenError> {
        open::open(ambient, disk, config).await
    }

    /// The shards with a replica here, with its id.
    pub fn replicas(&self) -> Vec<(u32, u64)> {
        let state = self.0.state.borrow();
        state.logs.iter().map(|(shard, log)| (*shard, log.replica)).collect()
    }

    /// The log of a shard's replica. One of another replica that was here is forgotten.
    pub fn shard(&self, shard: u32, replica: u64) -> LogStore<D> {
        let mut state = self.0.state.borrow_mut();
        if state.logs.get(&shard).is_none_or(|log| log.replica != replica) {
            state.logs.insert(shard, ShardLog::new(replica));
            self.push(&mut state, Owned::Other(Record::Create { shard, replica }), None);
        }
        drop(state);
        LogStore::new(self.clone(), shard)
    }

    /// Has the log of a shard begin behind a snapshot, as it does once openraft has been told of one: the node may have died before the
    /// journal knew. What the snapshot covers would keep its files for ever, because no newer snapshot comes where there is no room to
    /// write. And where the leader that sent the snapshot had another log, what contradicts it goes.
    pub(super) async fn begin_behind(&self, shard: u32, snapshot: &LogId) -> io::Result<()> {
        let up_to = to_journal(snapshot);
        let reaches = {
            let state = self.0.state.borrow();
            let Some(log) = state.logs.get(&shard) else {
                return Ok(());
            };
            if log.purged.is_some_and(|purged| purged.index >= up_to.index) {
                return Ok(());
            }
            log.last.is_some_and(|last| last.index >= up_to.index)
        };
        // A tail goes on behind the snapshot only if the log holds the very entry the snapshot ends with. The last entry's term does not
        // tell: an entry of an older leader may have followed one that another leader has replaced.
        let contradicts = reaches && {
            let entries = read::entries(self, shard, up_to.index, up_to.index + 1, 1).await?;
            entries.first().map(|entry| to_journal(&entry.log_id)) != Some(up_to)
        };
        let mut state = self.0.state.borrow_mut();
        let Some(log) = state.logs.get_mut(&shard) else {
            return Ok(());
        };
        let after = log.purged;
        if contradicts {
            log.truncate(after);
        }
        log.purge(up_to);
        if contradicts {
            self.push(&mut state, Owned::Other(Record::Truncate { shard, after }), None);
        }
        self.push(&mut state, Owned::Other(Record::Purge { shard, up_to }), None);
        Ok(())
    }

    /// Forgets the replica of a shard.
    pub fn retire(&self, shard: u32) {
        let mut state = self.0.state.borrow_mut();
        if state.logs.remove(&shard).is_some() {
            state.committed.remove(&shard);
            self.push(&mut state, Owned::Other(Record::Retire { shard }), None);
        }
    }

    /// Whether proposals fit.
    pub fn space(&self) -> Space {
        let state = self.0.state.borrow();
        if self.0.disk.is_none() {
            return Space::Ample;
        }
        let room = state.writer.room() > self.0.config.segment_bytes / 2;
        if room || !state.writer.needs_snapshot(self.spare_files(&state)) {
            Space::Ample
        } else {
            Space::Low
        }
    }

    /// The shard whose snapshot would let the journal use its oldest file again, if it needs that soon. Shards for which `busy` holds
    /// are passed over.
    pub fn forced_snapshot(&self, busy: impl FnMut(u32) -> bool) -> Option<ForcedSnapshot> {
        let state = self.0.state.borrow();
        self.0.disk.as_ref()?;
        // In good time: a snapshot takes a while, and what comes meanwhile needs room too.
        let recyclable = state.writer.recyclable().count();
        let dead = state.writer.index().dead(state.writer.durable_up_to()).count();
        let left = self.spare_files(&state) + recyclable;
        if left > self.files_in_good_time() || dead > recyclable {
            return None;
        }
        state.writer.index().forced_snapshot(busy)
    }

    /// Whether so little room is left of what there was when a snapshot was asked for that one under way must not take its time.
    pub(crate) fn is_short(&self) -> bool {
        let state = self.0.state.borrow();
        let left = self.spare_files(&state) + state.writer.recyclable().count();
        self.0.disk.is_some() && left <= self.files_in_good_time() / 2
    }

    /// With so many files left a snapshot is asked for.
    fn files_in_good_time(&self) -> usize {
        (self.0.config.segments / 2).max(2)
    }

    /// The longest entry that is taken, in bytes.
    pub fn entry_bytes(&self) -> usize {
        usize::try_from(self.0.config.segment_bytes / 2).unwrap_or(usize::MAX)
    }

    /// Bytes of the files that hold live entries of a shard.
    pub fn held_bytes(&self, shard: u32) -> u64 {
        self.0.state.borrow().writer.index().held_bytes(shard)
    }

    /// Bytes by which a shard's log has grown since it was last purged, roughly; without what was there at the start.
    pub fn grown_bytes(&self, shard: u32) -> u64 {
        let state = self.0.state.borrow();
        state.logs.get(&shard).map_or(0, ShardLog::grown_bytes)
    }

    /// What failed, if anything did: nothing is acknowledged any more.
    pub fn failure(&self) -> Option<Rc<str>> {
        self.0.state.borrow().failure.clone()
    }

    /// Whether it is on a disk.
    pub fn is_durable(&self) -> bool {
        self.0.disk.is_some()
    }

    /// Whether it was stopped.
    pub fn is_stopped(&self) -> bool {
        self.0.state.borrow().stopped
    }

    /// Ends the flusher. What waits is never acknowledged.
    pub fn stop(&self) {
        let mut state = self.0.state.borrow_mut();
        state.stopped = true;
        state.wake();
    }

    /// Files that are ready or can be made, without those that are only for emergencies.
    fn spare_files(&self, state: &State<D>) -> usize {
        let more = self.0.config.segments.saturating_sub(state.files());
        let could_grow = if state.full { 0 } else { more };
        let surplus = state.files().saturating_sub(self.0.config.segments);
        (state.free.len() + could_grow).saturating_sub(surplus)
    }

    /// How many files there may be now.
    fn most_files(&self, state: &State<D>) -> usize {
        self.0.config.segments + if state.emergency { EMERGENCY_FILES } else { 0 }
    }

    /// Queues a record for the next frame. In memory nothing is to be waited for.
    fn push(&self, state: &mut State<D>, record: Owned, waiting: Option<Waiting>) {
        if self.0.disk.is_some() {
            let waiting = waiting.into_iter().collect();
            state.queue.push_back(Queued { record, waiting });
            state.wake();
        } else if let Some(waiting) = waiting {
            waiting.done();
        }
    }

    fn mark_committed(&self, shard: u32, committed: Option<DiskLogId>) {
        let mut state = self.0.state.borrow_mut();
        if let Some(log) = state.logs.get_mut(&shard) {
            log.committed = committed;
            if self.0.disk.is_some() {
                state.committed.insert(shard, committed);
            }
        }
    }
}

impl Waiting {
    fn done(self) {
        match self {
            Self::Flushed(callback) => callback.io_completed(Ok(())),
            Self::Vote(sender) => {
                // Whoever asked has gone.
                let _ = openraft_rt::OneshotSender::send(sender, Ok(()));
            }
        }
    }
}

impl<D: Disk> State<D> {
    fn new(writer: Writer) -> Self {
        Self {
            logs: BTreeMap::new(),
            queue: VecDeque::new(),
            committed: BTreeMap::new(),
            waiting: VecDeque::new(),
            writer,
            segments: BTreeMap::new(),
            free: Vec::new(),
            next_file: 0,
            full: false,
            growing: false,
            emergency: false,
            in_flight: 0,
            idle_after: 0,
            failure: None,
            flusher: None,
            stopped: false,
        }
    }

    fn files(&self) -> usize {
        self.segments.len() + self.free.len() + usize::from(self.growing)
    }

    fn wake(&mut self) {
        if let Some(waker) = self.flusher.take() {
            waker.wake();
        }
    }

    fn check(&self) -> io::Result<()> {
        match &self.failure {
            Some(failure) => Err(io::Error::other(format!("the journal has failed: {failure}"))),
            None => Ok(()),
        }
    }
}

fn disk_vote(vote: &super::types::Vote) -> DiskVote {
    DiskVote {
        term: vote.leader_id.term,
        leader: vote.leader_id.node_id,
        committed: vote.committed,
    }
}
