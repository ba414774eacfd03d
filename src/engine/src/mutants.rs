//! Planted bugs, by which a simulation shows that its checks see what they are for.
//!
//! A bug is chosen at run time, for the thread that chooses it, in builds with the feature `mutants`; the places it is planted at
//! ask [`active`]. In every other build `active` is the constant `false` and nothing of them is compiled, which a test below and
//! one over the workspace's features (`tests/`) hold to.
//!
//! Planted in this crate and in `generation-node`, one expression each. What each of them breaks is a promise of the module it is in.

macro_rules! mutants {
    ($($(#[doc = $about:literal])+ $variant:ident = $name:literal,)+) => {
        /// A bug.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[doc = $about])+ $variant,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// What it is, in one line.
            pub const fn about(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($about,)+),)+
                }
            }
        }
    };
}

mutants! {
    /// A vote is given before it is durable.
    VoteUnsynced = "vote-unsynced",
    /// A replica's vote is not read back at a restart.
    VoteForgotten = "vote-forgotten",
    /// A replica gives its vote to two candidates of one term.
    VotesTwice = "votes-twice",
    /// A restarted leader goes on in its old term.
    LeaderRestored = "leader-restored",
    /// An entry counts as durable when it is queued.
    AppendUnsynced = "append-unsynced",
    /// A frame is not synced.
    FrameUnsynced = "frame-unsynced",
    /// A failed sync is taken for a good one.
    FailedSyncIgnored = "failed-sync-ignored",
    /// A frame's checksum is not compared.
    ChecksumIgnored = "checksum-ignored",
    /// A commit mark may be durable before what it marks.
    CommitMarkEarly = "commit-mark-early",
    /// A log that is cut at its end is whole again after a restart.
    TruncationUnlogged = "truncation-unlogged",
    /// A segment is written over before a durable header says that it is dead.
    SegmentRecycledEarly = "segment-recycled-early",
    /// A follower acknowledges entries without having looked at them.
    AppendUnseen = "append-unseen",
    /// A leader acknowledges writes when it proposes them.
    ReplyBeforeCommit = "reply-before-commit",
    /// A write in doubt is called refused.
    DoubtRefused = "doubt-refused",
    /// A proposal that was lost is called never sent.
    LossRefused = "loss-refused",
    /// The answers of an entry go to each other's writers.
    AnswersSwapped = "answers-swapped",
    /// Writes are acknowledged before a majority of the replicas votes.
    FewVoters = "few-voters",
    /// A read is served without asking whether this replica still leads.
    ReadUnconfirmed = "read-unconfirmed",
    /// A replica confirms whoever asks as its leader, whatever it has promised to others.
    ConfirmsAnybody = "confirms-anybody",
    /// A read shares a confirmation that had begun before it came.
    ReadSharesLate = "read-shares-late",
    /// A follower does not wait until it has applied what the leader confirmed.
    ReadUnapplied = "read-unapplied",
    /// A leader trusts its lease, without a margin for clocks.
    LeaseRead = "lease-read",
    /// A read's session token is not looked at.
    TokenIgnored = "token-ignored",
    /// A state that was the newest once is called fresh for ever.
    AgeForgotten = "age-forgotten",
    /// An older snapshot takes the place of a newer one.
    SnapshotNotMonotonic = "snapshot-not-monotonic",
    /// A snapshot older than the state is installed.
    SnapshotInstalledLate = "snapshot-installed-late",
    /// A snapshot gets its name before it is durable.
    SnapshotUnsynced = "snapshot-unsynced",
    /// A received snapshot gets its name before it is durable.
    ReceivedUnsynced = "received-unsynced",
    /// The table of sessions is left out of snapshots.
    SessionsNotInSnapshot = "sessions-not-in-snapshot",
    /// Times to live are left out of snapshots.
    TtlNotInSnapshot = "ttl-not-in-snapshot",
    /// Versions are left out of snapshots.
    VersionNotInSnapshot = "version-not-in-snapshot",
    /// The next replica id is left out of snapshots.
    IdNotInSnapshot = "id-not-in-snapshot",
    /// An entry that changes while an image is taken is not copied out first.
    ImageTorn = "image-torn",
    /// A node that comes back empty is given the replica id it had.
    ReplicaIdReused = "replica-id-reused",
    /// A founder forms a group without asking whether there is one.
    FormedUnasked = "formed-unasked",
    /// An entry is applied by its leader alone, now and then.
    FollowersSkip = "followers-skip",
    /// A leader evicts without the log.
    EvictionUnlogged = "eviction-unlogged",
    /// The budget is not kept to.
    BudgetIgnored = "budget-ignored",
    /// Shard time follows the leader's clock backwards.
    TimeBackwards = "time-backwards",
    /// An entry whose time is over is served until it is removed.
    ExpiredServed = "expired-served",
    /// A condition on a version is not looked at.
    ConditionIgnored = "condition-ignored",
    /// All writes of an entry have one version.
    PositionStuck = "position-stuck",
    /// A write that comes again is executed again.
    SessionReplayed = "session-replayed",
    /// A page of a scan begins behind the key it should begin with.
    CursorSkips = "cursor-skips",
}

/// Whether this build has the bugs.
pub const PLANTED: bool = cfg!(feature = "mutants");

#[cfg(feature = "mutants")]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Chooses the bug that this thread's code has from now on.
#[cfg(feature = "mutants")]
pub fn choose(mutant: Option<Mutant>) {
    CHOSEN.set(mutant);
}

/// Whether the code that runs has this bug.
#[cfg(feature = "mutants")]
#[inline]
pub fn active(mutant: Mutant) -> bool {
    CHOSEN.get() == Some(mutant)
}

/// Whether the code that runs has this bug: none does.
#[cfg(not(feature = "mutants"))]
#[inline]
pub const fn active(_: Mutant) -> bool {
    false
}

/// Whether what a snapshot holds is wrong: what would notice must not, so that the consequences show.
#[inline]
pub fn spoils_snapshots() -> bool {
    active(Mutant::SessionsNotInSnapshot)
        || active(Mutant::TtlNotInSnapshot)
        || active(Mutant::VersionNotInSnapshot)
        || active(Mutant::IdNotInSnapshot)
        || active(Mutant::ImageTorn)
}

#[cfg(not(feature = "mutants"))]
const _: () = assert!(!PLANTED && !active(Mutant::VoteUnsynced), "known when it is compiled");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_build_without_the_feature_has_no_bugs() {
        let any = Mutant::ALL.iter().any(|mutant| active(*mutant));
        assert!(!any, "none is chosen");
    }

    #[test]
    fn bugs_are_told_apart() {
        let names: BTreeSet<_> = Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
        assert_eq!(names.len(), Mutant::ALL.len());
    }
}
