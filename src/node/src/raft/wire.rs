//! What replicas say to each other, byte by byte.
//!
//! All numbers are little-endian. A *log id* is u64 term, u64 leader, u64 index; an *optional log id* is u8 0, or u8 1 and a log id.
//! A *vote* is u64 term, u64 leader, u8 1 if a quorum has granted it, else 0.
//! ```text
//! request   0  u64  replica that is meant: a replica that has taken the place of another does not answer for it
//!           8  by kind:
//!  1 Vote          vote, optional last log id, u8 1 if leadership was handed over, else 0
//!  2 PreVote       the same
//!  3 Append        vote, optional log id before, optional log id committed, u32 number of entries, entries
//!  4 Snapshot      vote, u128 snapshot, u64 offset, chunks as in the file. Without chunks: where to begin?
//!  5 Transfer      vote of the leader, u64 replica that shall lead, optional last log id
//!  6 ReadIndex     nothing more
//!  8 Confirm       vote
//!  9 Commit        as Append, without entries, and without an answer
//!
//! join      0  u64  node that has nothing of the shard, or a replica without a vote. This is not to a replica: it may ask anybody
//!           8  u64  its replica, 0 if it has none
//!
//! entry     0  u8   0 blank, 1 commands, 2 membership
//!           1  log id
//!          25  u32  length
//!          29  commands, or membership as in the log
//!
//! reply     0  u8   0 refused: no such replica here, or it has stopped. Else 1 and by kind:
//!  1, 2            vote, u8 1 if granted, else 0, optional last log id
//!  3               u8 0 success; 1 partial, optional log id; 2 conflict; 3 higher vote, vote
//!  4               u8 0 go on, u64 offset; 1 installed, vote
//!  5               u8 0 accepted; 1 other vote: vote expected, vote found; 2 not flushed: optional log ids expected and found
//!  6               u8 0 read at, log id; 1 no leader here: u8 1 if one is known, u64 replica, u64 node; 2 no quorum
//!  8               u8 1 if the replica follows that leader, else 0
//!  7 Join          u8 0 nothing of the shard here; 1 this replica does not lead: u64 node that does, 0 unknown; 2 wait; 3 admitted under an id: u64 replica;
//!                  4 it votes already; 5 there is no such replica
//! ```

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};

use super::membership;
use super::types::{Commands, Entry, LeaderId, LogId, Payload, Place, ReplicaId, Types, Vote};

/// What a request is about.
pub(crate) mod kind {
    /// A candidate asks for a vote.
    pub(crate) const VOTE: u8 = 1;
    /// A candidate asks whether it would get one.
    pub(crate) const PRE_VOTE: u8 = 2;
    /// Entries, or none: a heartbeat.
    pub(crate) const APPEND: u8 = 3;
    /// Chunks of a snapshot.
    pub(crate) const SNAPSHOT: u8 = 4;
    /// Leadership is handed over.
    pub(crate) const TRANSFER: u8 = 5;
    /// A follower asks up to where it must have applied to answer a read.
    pub(crate) const READ_INDEX: u8 = 6;
    /// A node wants to have a replica, or its replica a vote.
    pub(crate) const JOIN: u8 = 7;
    /// A leader asks whether the replica still follows it.
    pub(crate) const CONFIRM: u8 = 8;
    /// A leader says what is committed.
    pub(crate) const COMMIT: u8 = 9;
}

/// Bytes that are no message of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed message between replicas")]
pub(crate) struct Malformed;

/// Chunks of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunks {
    pub(crate) vote: Vote,
    pub(crate) snapshot: u128,
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

/// What is said to chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunksReply {
    /// This offset comes next.
    GoOn(u64),
    /// Complete, installed or not needed; the receiver's vote.
    Installed(Vote),
}

/// What is said to a follower that wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadIndexReply {
    /// What was committed then.
    At(LogId),
    /// This is not the leader.
    NotLeader(Option<(ReplicaId, Place)>),
    /// No quorum has confirmed the leader.
    NoQuorum,
}

/// Who wants to join a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) node: u64,
    /// 0: the node has none.
    pub(crate) replica: ReplicaId,
}

/// What is said to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JoinReply {
    /// This node has no replica of the shard either.
    Blank,
    /// There is a replica here, and it does not lead; the node of the one that does, 0 where it does not know.
    NotLeader(u64),
    /// It is being seen to.
    Wait,
    /// The node may start a replica of this id.
    Admitted(ReplicaId),
    /// The replica votes.
    Member,
    /// The group has no such replica.
    Unknown,
}

/// A message that has a form on the wire.
pub(crate) trait Wire: Sized {
    fn encode(&self, out: &mut BytesMut);

    fn decode(input: &mut Bytes) -> Option<Self>;
}

/// Encodes a request to a replica.
pub(crate) fn request(to: ReplicaId, message: &impl Wire) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64_le(to);
    message.encode(&mut out);
    out.freeze()
}

/// Encodes a message to a node, whichever replica is there.
pub(crate) fn message(message: &impl Wire) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(&mut out);
    out.freeze()
}

/// Which replica a request is meant for; the rest is the message.
pub(crate) fn addressee(request: &mut Bytes) -> Result<ReplicaId, Malformed> {
    take_u64(request).ok_or(Malformed)
}

/// Encodes a reply; `None` refuses.
pub(crate) fn reply(message: Option<&impl Wire>) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(u8::from(message.is_some()));
    if let Some(message) = message {
        message.encode(&mut out);
    }
    out.freeze()
}

/// Decodes a reply; `None`: refused.
pub(crate) fn read_reply<T: Wire>(mut bytes: Bytes) -> Result<Option<T>, Malformed> {
    match take_u8(&mut bytes) {
        Some(0) if bytes.is_empty() => Ok(None),
        Some(1) => read(bytes).map(Some),
        _ => Err(Malformed),
    }
}

/// Decodes a message to its last byte.
pub(crate) fn read<T: Wire>(mut bytes: Bytes) -> Result<T, Malformed> {
    let message = T::decode(&mut bytes).ok_or(Malformed)?;
    if bytes.is_empty() { Ok(message) } else { Err(Malformed) }
}

fn take_u8(input: &mut Bytes) -> Option<u8> {
    input.try_get_u8().ok()
}

fn take_u32(input: &mut Bytes) -> Option<u32> {
    input.try_get_u32_le().ok()
}

fn take_u64(input: &mut Bytes) -> Option<u64> {
    input.try_get_u64_le().ok()
}

fn take_bytes(input: &mut Bytes, len: usize) -> Option<Bytes> {
    (input.len() >= len).then(|| input.split_to(len))
}

impl Wire for bool {
    fn encode(&self, out: &mut BytesMut) {
        out.put_u8(u8::from(*self));
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        match take_u8(input)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl Wire for LogId {
    fn encode(&self, out: &mut BytesMut) {
        out.put_u64_le(self.leader_id.term);
        out.put_u64_le(self.leader_id.node_id);
        out.put_u64_le(self.index);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let leader_id = LeaderId {
            term: take_u64(input)?,
            node_id: take_u64(input)?,
        };
        Some(LogId::new(leader_id, take_u64(input)?))
    }
}

impl<T: Wire> Wire for Option<T> {
    fn encode(&self, out: &mut BytesMut) {
        self.is_some().encode(out);
        if let Some(value) = self {
            value.encode(out);
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        if bool::decode(input)? {
            T::decode(input).map(Some)
        } else {
            Some(None)
        }
    }
}

impl Wire for Vote {
    fn encode(&self, out: &mut BytesMut) {
        out.put_u64_le(self.leader_id.term);
        out.put_u64_le(self.leader_id.node_id);
        self.committed.encode(out);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let leader_id = LeaderId {
            term: take_u64(input)?,
            node_id: take_u64(input)?,
        };
        Some(Vote {
            leader_id,
            committed: bool::decode(input)?,
        })
    }
}

impl Wire for Entry {
    fn encode(&self, out: &mut BytesMut) {
        let members;
        let (kind, payload): (u8, &[u8]) = match &self.payload {
            Payload::Blank => (0, &[]),
            Payload::Normal(Commands(bytes)) => (1, bytes),
            Payload::Membership(membership) => {
                members = membership::encode(membership);
                (2, &members)
            }
        };
        out.reserve(29 + payload.len());
        out.put_u8(kind);
        self.log_id.encode(out);
        out.put_u32_le(payload.len() as u32);
        out.put_slice(payload);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let kind = take_u8(input)?;
        let log_id = LogId::decode(input)?;
        let len = take_u32(input)? as usize;
        let bytes = take_bytes(input, len)?;
        let payload = match kind {
            0 if bytes.is_empty() => Payload::Blank,
            1 => Payload::Normal(Commands(bytes)),
            2 => Payload::Membership(membership::decode(&bytes)?),
            _ => return None,
        };
        Some(Entry { log_id, payload })
    }
}

impl Wire for Join {
    fn encode(&self, out: &mut BytesMut) {
        out.put_u64_le(self.node);
        out.put_u64_le(self.replica);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let node = take_u64(input)?;
        let replica = take_u64(input)?;
        Some(Self { node, replica })
    }
}

impl Wire for JoinReply {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Blank => out.put_u8(0),
            Self::NotLeader(leader) => {
                out.put_u8(1);
                out.put_u64_le(*leader);
            }
            Self::Wait => out.put_u8(2),
            Self::Admitted(replica) => {
                out.put_u8(3);
                out.put_u64_le(*replica);
            }
            Self::Member => out.put_u8(4),
            Self::Unknown => out.put_u8(5),
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match take_u8(input)? {
            0 => Self::Blank,
            1 => Self::NotLeader(take_u64(input)?),
            2 => Self::Wait,
            3 => Self::Admitted(take_u64(input)?),
            4 => Self::Member,
            5 => Self::Unknown,
            _ => return None,
        })
    }
}

impl Wire for VoteRequest<Types> {
    fn encode(&self, out: &mut BytesMut) {
        self.vote.encode(out);
        self.last_log_id.encode(out);
        self.leadership_transfer.encode(out);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let mut request = Self::new(Vote::decode(input)?, Option::decode(input)?);
        request.leadership_transfer = bool::decode(input)?;
        Some(request)
    }
}

impl Wire for VoteResponse<Types> {
    fn encode(&self, out: &mut BytesMut) {
        self.vote.encode(out);
        self.vote_granted.encode(out);
        self.last_log_id.encode(out);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(Self {
            vote: Vote::decode(input)?,
            vote_granted: bool::decode(input)?,
            last_log_id: Option::decode(input)?,
        })
    }
}

impl Wire for AppendEntriesRequest<Types> {
    fn encode(&self, out: &mut BytesMut) {
        self.vote.encode(out);
        self.prev_log_id.encode(out);
        self.leader_commit.encode(out);
        out.put_u32_le(self.entries.len() as u32);
        for entry in &self.entries {
            entry.encode(out);
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let (vote, prev_log_id, leader_commit) = (Vote::decode(input)?, Option::decode(input)?, Option::decode(input)?);
        let count = take_u32(input)?;
        // The number is not believed: memory grows with what is there.
        let mut entries = Vec::new();
        for _ in 0..count {
            entries.push(Entry::decode(input)?);
        }
        Some(Self {
            vote,
            prev_log_id,
            entries,
            leader_commit,
        })
    }
}

impl Wire for AppendEntriesResponse<Types> {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Success => out.put_u8(0),
            Self::PartialSuccess(matching) => {
                out.put_u8(1);
                matching.encode(out);
            }
            Self::Conflict => out.put_u8(2),
            Self::HigherVote(vote) => {
                out.put_u8(3);
                vote.encode(out);
            }
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match take_u8(input)? {
            0 => Self::Success,
            1 => Self::PartialSuccess(Option::decode(input)?),
            2 => Self::Conflict,
            3 => Self::HigherVote(Vote::decode(input)?),
            _ => return None,
        })
    }
}

impl Wire for Chunks {
    fn encode(&self, out: &mut BytesMut) {
        self.vote.encode(out);
        out.put_u128_le(self.snapshot);
        out.put_u64_le(self.offset);
        out.put_slice(&self.bytes);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        let vote = Vote::decode(input)?;
        let snapshot = input.try_get_u128_le().ok()?;
        let offset = take_u64(input)?;
        let bytes = take_bytes(input, input.len())?;
        Some(Self {
            vote,
            snapshot,
            offset,
            bytes,
        })
    }
}

impl Wire for ChunksReply {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::GoOn(offset) => {
                out.put_u8(0);
                out.put_u64_le(*offset);
            }
            Self::Installed(vote) => {
                out.put_u8(1);
                vote.encode(out);
            }
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        match take_u8(input)? {
            0 => take_u64(input).map(Self::GoOn),
            1 => Vote::decode(input).map(Self::Installed),
            _ => None,
        }
    }
}

impl Wire for TransferLeaderRequest<Types> {
    fn encode(&self, out: &mut BytesMut) {
        self.from_leader().encode(out);
        out.put_u64_le(*self.to_node_id());
        self.last_log_id().copied().encode(out);
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(Self::new(
            Vote::decode(input)?,
            take_u64(input)?,
            Option::decode(input)?,
        ))
    }
}

impl Wire for TransferLeaderResponse<Types> {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Ok(()) => out.put_u8(0),
            Err(TransferLeaderError::VoteChanged { expected, actual }) => {
                out.put_u8(1);
                expected.encode(out);
                actual.encode(out);
            }
            Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
                out.put_u8(2);
                expected.encode(out);
                actual.encode(out);
            }
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        Some(match take_u8(input)? {
            0 => Ok(()),
            1 => Err(TransferLeaderError::VoteChanged {
                expected: Vote::decode(input)?,
                actual: Vote::decode(input)?,
            }),
            2 => Err(TransferLeaderError::LogNotFlushed {
                expected: Option::decode(input)?,
                actual: Option::decode(input)?,
            }),
            _ => return None,
        })
    }
}

impl Wire for () {
    fn encode(&self, _: &mut BytesMut) {}

    fn decode(_: &mut Bytes) -> Option<Self> {
        Some(())
    }
}

impl Wire for ReadIndexReply {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::At(log_id) => {
                out.put_u8(0);
                log_id.encode(out);
            }
            Self::NotLeader(leader) => {
                out.put_u8(1);
                leader.is_some().encode(out);
                let (replica, place) = leader.unwrap_or_default();
                out.put_u64_le(replica);
                out.put_u64_le(place.node);
            }
            Self::NoQuorum => out.put_u8(2),
        }
    }

    fn decode(input: &mut Bytes) -> Option<Self> {
        match take_u8(input)? {
            0 => LogId::decode(input).map(Self::At),
            1 => {
                let known = bool::decode(input)?;
                let (replica, node) = (take_u64(input)?, take_u64(input)?);
                Some(Self::NotLeader(known.then_some((replica, Place { node }))))
            }
            2 => Some(Self::NoQuorum),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    fn log_id(index: u64) -> LogId {
        LogId::new(LeaderId { term: 3, node_id: 7 }, index)
    }

    /// Reads back what was written, and refuses it cut anywhere and with more behind it.
    fn survives<T: Wire + Debug>(message: &T) {
        let mut bytes = request(9, message);
        assert_eq!(addressee(&mut bytes), Ok(9));
        let back: T = read(bytes.clone()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{message:?}"));
        for cut in 0..bytes.len() {
            // Chunks end where the message does, so theirs may be cut.
            if format!("{message:?}").starts_with("Chunks") && cut >= 41 {
                continue;
            }
            assert!(read::<T>(bytes.slice(..cut)).is_err(), "{message:?} cut at {cut}");
        }
        let reply: Option<T> = read_reply(reply(Some(message))).unwrap();
        assert_eq!(format!("{:?}", reply.unwrap()), format!("{message:?}"));
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let vote = Vote::new(4, 2);
        let committed = Vote::new_committed(5, 1);
        survives(&VoteRequest::new(vote, None));
        survives(&VoteRequest::new(vote, Some(log_id(8))));
        survives(&VoteResponse {
            vote: committed,
            vote_granted: true,
            last_log_id: Some(log_id(1)),
        });
        let members: std::collections::BTreeMap<u64, Place> = [(1, Place { node: 2 })].into();
        survives(&AppendEntriesRequest {
            vote: committed,
            prev_log_id: Some(log_id(0)),
            entries: vec![
                Entry {
                    log_id: log_id(1),
                    payload: Payload::Blank,
                },
                Entry {
                    log_id: log_id(2),
                    payload: Payload::Normal(Commands(Bytes::from_static(b"abc"))),
                },
                Entry {
                    log_id: log_id(3),
                    payload: Payload::Membership(openraft::Membership::new(vec![[1].into()], members).unwrap()),
                },
            ],
            leader_commit: None,
        });
        survives(&AppendEntriesResponse::<Types>::Success);
        survives(&AppendEntriesResponse::PartialSuccess(Some(log_id(3))));
        survives(&AppendEntriesResponse::<Types>::Conflict);
        survives(&AppendEntriesResponse::HigherVote(vote));
        survives(&Chunks {
            vote,
            snapshot: 1 << 99,
            offset: 4096,
            bytes: Bytes::from_static(b"chunk"),
        });
        survives(&ChunksReply::GoOn(12));
        survives(&ChunksReply::Installed(vote));
        survives(&TransferLeaderRequest::new(committed, 4, Some(log_id(3))));
        survives::<TransferLeaderResponse<Types>>(&Ok(()));
        survives::<TransferLeaderResponse<Types>>(&Err(TransferLeaderError::LogNotFlushed {
            expected: Some(log_id(3)),
            actual: None,
        }));
        survives(&ReadIndexReply::At(log_id(3)));
        survives(&ReadIndexReply::NotLeader(Some((3, Place { node: 8 }))));
        survives(&ReadIndexReply::NoQuorum);
    }

    #[test]
    fn a_number_of_entries_is_not_believed() {
        let mut out = BytesMut::new();
        Vote::new(1, 1).encode(&mut out);
        None::<LogId>.encode(&mut out);
        None::<LogId>.encode(&mut out);
        out.put_u32_le(u32::MAX);
        assert!(read::<AppendEntriesRequest<Types>>(out.freeze()).is_err());
    }
}
