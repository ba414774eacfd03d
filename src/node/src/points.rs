//! Named points of a node's code at which a simulation strikes: before and after what must be durable, sent, applied or removed
//! in order.
//!
//! A point is passed by its [`Disk`](crate::env::disk::Disk::point) or [`Env`](crate::env::Env::point): static calls, empty
//! unless the environment says otherwise. Production's does not, so nothing of them, not even a name, is in its program.
//!
//! Not here: what happens at a point; the simulator decides.

macro_rules! points {
    ($($(#[doc = $about:literal])+ $name:ident = $text:literal,)+) => {
        $($(#[doc = $about])+ pub const $name: &str = $text;)+

        /// All of them.
        pub const ALL: &[&str] = &[$($name,)+];
    };
}

points! {
    /// A vote is durable, and has not been sent.
    VOTE_WRITTEN = "vote.written",
    /// Another replica has answered a vote, or a request for one.
    VOTE_ANSWERED = "vote.answered",
    /// A request of another node was answered.
    ANSWERED = "peer.answered",
    /// A frame of the journal is written, and not synced.
    FRAME_WRITTEN = "journal.frame.written",
    /// A frame is durable, and nobody has been told.
    FRAME_SYNCED = "journal.frame.synced",
    /// Whoever waited for a frame has been told.
    FRAME_ACKNOWLEDGED = "journal.frame.acknowledged",
    /// A dead segment's file is about to be written over.
    SEGMENT_RECYCLED = "journal.segment.recycled",
    /// A segment's first block is written, and not synced.
    SEGMENT_OPENED = "journal.segment.opened",
    /// A segment's file is allocated, and its name not durable.
    SEGMENT_ALLOCATED = "journal.segment.allocated",
    /// A replica's log was cut at its end; the cut is queued.
    LOG_TRUNCATED = "log.truncated",
    /// A replica's log was cut at its beginning; the cut is queued.
    LOG_PURGED = "log.purged",
    /// An entry is committed, and not applied.
    ENTRY_COMMITTED = "entry.committed",
    /// An entry is applied, and not answered.
    ENTRY_APPLIED = "entry.applied",
    /// An entry is answered.
    ENTRY_ANSWERED = "entry.answered",
    /// A leader has taken an entry in.
    ENTRY_PROPOSED = "entry.proposed",
    /// A part of an image is written.
    SNAPSHOT_SLICE = "snapshot.slice",
    /// An image is written, and not synced.
    SNAPSHOT_WRITTEN = "snapshot.written",
    /// An image is durable, and its name says that it is not.
    SNAPSHOT_SYNCED = "snapshot.synced",
    /// An image has its name, which is not durable.
    SNAPSHOT_RENAMED = "snapshot.renamed",
    /// An image and its name are durable, and the one before it is still there.
    SNAPSHOT_DURABLE = "snapshot.durable",
    /// A part of the leader's image is written.
    RECEIVED_SLICE = "received.slice",
    /// The leader's image is durable, and its name says that it is not.
    RECEIVED_SYNCED = "received.synced",
    /// The leader's image has its name, which is not durable.
    RECEIVED_RENAMED = "received.renamed",
    /// An image was read, and the state is the old one.
    SNAPSHOT_LOADED = "snapshot.loaded",
    /// The state is the image's, and an older image is still kept.
    SNAPSHOT_INSTALLED = "snapshot.installed",
    /// A group was formed, or a replica that was let in begins.
    REPLICA_BEGUN = "join.begun",
    /// A replica id was drawn, and nobody has it.
    ID_DRAWN = "join.drawn",
    /// A learner was added, and whom it is for has not been told.
    LEARNER_ADDED = "join.added",
    /// A learner has caught up, and is about to be given its vote.
    LEARNER_CAUGHT_UP = "join.caught-up",
    /// A learner was given its vote.
    LEARNER_VOTES = "join.votes",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn names_are_told_apart() {
        let names: BTreeSet<_> = super::ALL.iter().collect();
        assert_eq!(names.len(), super::ALL.len());
    }
}
