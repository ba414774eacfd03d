//! The journal's format, its recovery, and the index of what is live in it.
//!
//! Each core of a node has one journal for all its shards. It is a set of segment files of one size. What one group commit writes
//! is a **frame**: records of any number of shards under one header and checksum, padded to whole 4 KiB blocks, so that it can go
//! out through `O_DIRECT` and a block that is durable is never written again until its segment is recycled.
//!
//! All numbers are little-endian; checksums are CRC-32C: it finds every change of up to three bits and every burst of up to 32
//! in anything shorter than 256 MiB, which a hash does not promise, and processors compute it at memory speed.
//!
//! # Segment, version 1
//! ```text
//!    0  u8×8  magic "GNJSEGMT"
//!    8  u8    format version, 1
//!    9  u8×3  reserved, 0
//!   12  u32   checksum of the block with this field as 0
//!   16  u128  journal id: no segment of another node, core or cluster is taken for one of this journal
//!   32  u64   generation: grows by one with every segment opened, recycled files included, from 1
//!   40  u64   nonce: drawn at random for each generation
//!   48  u64   sequence of the first frame
//!   56  u64   durable_up_to when the segment was opened
//!   64  u32   length of the segment in blocks
//!   68  u32   reserved, 0
//!   72  u64   live_from: segments of lower generations hold nothing that counts
//!   80        zeros
//! 4096  the frames; the first one is a checkpoint, with the state of every shard
//! ```
//!
//! # Frame, version 1
//! ```text
//!    0  u8×4  magic "GNJF"
//!    4  u8    format version, 1
//!    5  u8    flags: bit 0 checkpoint
//!    6  u16   reserved, 0
//!    8  u32   checksum of the 64 bytes of the header with this field as 0
//!   12  u32   checksum of everything after the header, padding included
//!   16  u32   length with padding, a multiple of 4096
//!   20  u32   number of records
//!   24  u64   generation of the segment
//!   32  u64   nonce of the segment
//!   40  u64   sequence: grows by one with every frame of the journal, from 1
//!   48  u64   durable_up_to: every frame up to this sequence was durable when this one was built; 0 = none
//!   56  u32   offset in the segment, in blocks
//!   60  u32   end of the last record; zeros from here to the length
//!   64  the records
//! ```
//!
//! # Record, version 1
//! Each begins at a multiple of 8 from the start of the frame and ends there too. A *log id* is u64 term, u64 leader, u64 index.
//! ```text
//!    0  u8    kind
//!    1  u8    detail
//!    2  u16   reserved, 0
//!    4  u32   shard
//!    8  by kind:
//!  1 Entry      detail: 0 blank, 1 commands, 2 membership. u64 length under 2^32, log id, payload, zeros to a multiple of 8
//!  2 Vote       detail bit 0: committed. u64 term, u64 leader
//!  3 Truncate   detail bit 0: an entry remains. log id of the last that remains (zeros if none)
//!  4 Purge      log id of the last purged
//!  5 Committed  detail bit 0: there is one. log id (zeros if none)
//!  6 Create     u64 replica
//!  7 Retire     nothing more
//!  8 State      detail bits: 0 vote, 1 it is committed, 2 committed, 3 purged, 4 last. u64 replica, u64 first, u64 vote term,
//!               u64 vote leader, log ids committed, purged, last (zeros for what is not there)
//! ```
//!
//! # What holds
//! - **A sequence is acknowledged only once every frame up to it is durable**, however many writes are in flight and in whatever
//!   order they complete ([`Writer::completed`]).
//! - **Recovery** ([`Recovery`]) takes frames in sequence up to the first that is missing or bad. If its sequence is at or below
//!   the highest `durable_up_to` seen anywhere in the journal, that is corruption, and recovery refuses with file, offset and
//!   reason; above, it is the torn tail, which was never acknowledged. To see every `durable_up_to`, recovery reads on behind a bad
//!   frame, block by block.
//! - **After recovery a new segment is opened**, never the old one written on: its header says at which sequence the tail was cut,
//!   so that what lies behind the cut is dead for good, though its checksums are right.
//! - **Old frames of a recycled segment** carry another generation and nonce. The nonce is also why a value that holds the image of
//!   a frame cannot pass for one.
//! - **The first frame of a segment holds the state of every shard**, so only entries keep an old segment alive; votes never do.
//! - **A segment is recycled only when a durable header of a newer one says that it is dead** (`live_from`): a write that recycles
//!   a file can tear so that the old header stays and the old frames are gone, and then recovery must not miss them. A segment is
//!   dead once nothing in it is live, all older ones are dead, and what says so is durable ([`Index::dead`],
//!   [`Writer::recyclable`]). [`Writer::needs_snapshot`] says in time when space runs out, and [`Index::forced_snapshot`] names
//!   the shard that holds it back. A restart ends a segment early, so it can cost one file until its entries are purged.
//!
//! A last frame that no later one follows is protected by its own checksum alone: bad, it is taken for torn. So a core that
//! becomes idle writes a frame without records, whose `durable_up_to` covers it.
//!
//! Not here: files, I/O, timing, preallocation, the reserve for votes, what entries mean. Before the first acknowledgement after
//! recovery the caller syncs the recovered files: what was read may have been in a volatile cache.

mod frame;
mod index;
mod record;
mod recovery;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

pub use frame::{FRAME_HEADER_BYTES, Frame, FrameBuilder, FrameFault, FrameFull, Records};
pub use index::{ForcedSnapshot, Index, IndexError, Run};
pub use record::{EntryKind, Record, RecordFault, ShardState};
pub use recovery::{Bad, Corruption, Recovered, RecoveredSegment, Recovery, RecoveryError, SegmentFile};
pub use segment::{SegmentFault, SegmentHeader};
pub use writer::{Opened, SealError, Sealed, Writer};

/// Everything is written in whole blocks of this many bytes, at multiples of it.
pub const BLOCK_BYTES: usize = 4096;

/// Identifies an entry of a shard's log: who led when it was proposed, and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId {
    /// The leader's term.
    pub term: u64,
    /// The leader's replica id.
    pub leader: u64,
    /// Position in the log.
    pub index: u64,
}

/// What a replica has promised: the leader it has voted for or follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vote {
    /// The term.
    pub term: u64,
    /// The candidate's or leader's replica id.
    pub leader: u64,
    /// Whether a quorum has granted it.
    pub committed: bool,
}

/// Where a frame lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Generation of the segment.
    pub generation: u64,
    /// Offset in its file, in bytes.
    pub offset: u64,
    /// Length with padding, in bytes.
    pub len: u64,
    /// Sequence of the frame.
    pub sequence: u64,
}
