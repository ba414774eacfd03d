//! Exactly once: the table of client sessions of one shard, part of its replicated state.
//!
//! A client opens a session in a shard through the log, numbers its writes from 1 and says with each the lowest number whose
//! reply it has not seen (`first_unacked`). The table keeps the replies of the numbers from there on, so that a write that comes
//! again, in any order and by whatever leader, is answered as it was the first time and not executed again. (Ongaro, *Consensus:
//! Bridging Theory and Practice*, section 6.3, with a window of numbers instead of one at a time.)
//!
//! # What holds
//! - **A numbered write executes at most once** for as long as its session lives. In an unknown or expired session, and with a
//!   number whose reply was acknowledged, it never executes.
//! - **At most [`SESSION_WINDOW`] replies a session, and `max_sessions` and `max_bytes` a shard**: a write beyond is refused
//!   without executing. Bytes are counted as [`SESSION_BYTES`] and [`REPLY_BYTES`], the same on every replica.
//! - **Time is shard time.** A session expires once it has been idle for `idle_ms`; activity is noted in steps of
//!   [`ACTIVITY_STEP_MS`] (rounded up), so a session lives that much longer at most and never shorter. From that instant it is
//!   dead to every operation, whether or not [`SessionTable::expire`] has removed it: so removal can be spread over log entries of
//!   bounded work ([`SessionTable::propose_expired`]).
//! - **Deterministic**: everything here is a function of the log. [`SessionTable::digest`] sums over sessions and replies.
//! - **An image can be taken in slices** while the table goes on changing ([`SessionTable::image_begin`]): whatever is about to
//!   change is copied out first.
//!
//! What a session does not promise: after it has expired, an id that is opened again is a new session and knows nothing of the
//! old one, so clients draw a fresh random id each time.
//!
//! # Image format, version 1
//! Sessions one after the other, in no particular order, little-endian:
//! ```text
//!  0  u128  session
//! 16  u64   acknowledged: replies of numbers below are forgotten, and such numbers never execute
//! 24  u64   last activity, Unix milliseconds of shard time
//! 32  u16   number of replies, at most 1,024
//! 34  the replies, by ascending number:
//!      0  u16  number - acknowledged, under 1,024
//!      2  u8   outcome: 0 applied, 1 counter, 2 not found, 3 condition failed, 4 not a number, 5 overflow, 6 out of memory,
//!              7 invalid size
//!      3  u64  version, of applied, counter and condition failed; 0 otherwise
//!     11  i64  value, of counter; 0 otherwise
//! ```
//!
//! Not here: admission by the leader (it refuses with `Busy` what would leave the window, before it is proposed), limits per
//! client, the codec of log entries.

mod image;
#[cfg(test)]
mod tests;

pub use image::SessionImageError;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use image::Image;

use crate::command::Outcome;
use crate::digest;
use crate::mutants::{Mutant, active};

/// Most writes of one session that may be unacknowledged.
pub const SESSION_WINDOW: u64 = 1024;

/// What one session counts, in bytes, without its replies.
pub const SESSION_BYTES: u64 = 192;

/// What one reply counts, in bytes: twice its size, because a queue that grows by doubling is half empty at worst.
pub const REPLY_BYTES: u64 = 64;

/// Activity is noted in steps of this many milliseconds, rounded up.
pub const ACTIVITY_STEP_MS: u64 = 1024;

const _: () = assert!(ACTIVITY_STEP_MS.is_power_of_two(), "activity is rounded with a mask");
const _: () = assert!(
    2 * size_of::<(u64, Outcome)>() as u64 <= REPLY_BYTES,
    "a reply is accounted for less memory than it takes"
);

/// The numbering of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionWrite {
    /// The session, drawn at random by the client.
    pub session: u128,
    /// The number of this write, from 1. Numbers are given once; they may arrive in any order and with gaps.
    pub seq: u64,
    /// The lowest number whose reply the client has not seen, from 1, at most `seq`.
    pub first_unacked: u64,
}

impl SessionWrite {
    /// Whether the numbers are legal and within [`SESSION_WINDOW`]. The leader answers `Busy` otherwise and proposes nothing.
    pub fn in_window(&self) -> bool {
        self.first_unacked >= 1 && self.seq >= self.first_unacked && self.seq - self.first_unacked < SESSION_WINDOW
    }
}

/// Limits of a session table; replicated configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLimits {
    /// How long a session may be idle, in milliseconds of shard time.
    pub idle_ms: u64,
    /// Most sessions at a time.
    pub max_sessions: u32,
    /// Most bytes, by [`SESSION_BYTES`] and [`REPLY_BYTES`].
    pub max_bytes: u64,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            idle_ms: 10 * 60 * 1000,
            max_sessions: 16_384,
            max_bytes: 16 << 20,
        }
    }
}

/// What became of a numbered write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was executed now.
    Executed(Outcome),
    /// It had been executed before; this is what it answered then.
    Replayed(Outcome),
    /// It was not executed: the client has acknowledged its reply, so nobody waits for this one.
    Acknowledged,
    /// It was not executed: the session is unknown, closed or expired.
    Expired,
    /// It was not executed: the window is passed, or the table is full.
    Busy,
}

/// What became of opening a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// It is open, now or since before.
    Open,
    /// The table is full; nothing was changed.
    Busy,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Session {
    /// Replies below are forgotten.
    acked: u64,
    active_ms: u64,
    /// By ascending number, all at least `acked`.
    replies: VecDeque<(u64, Outcome)>,
    /// The image that has it already, or that began before it was opened.
    imaged: u64,
}

impl Session {
    fn lapsed(&self, now_ms: u64, idle_ms: u64) -> bool {
        self.active_ms.saturating_add(idle_ms) <= now_ms
    }
}

/// The sessions of one shard.
#[derive(Debug)]
pub struct SessionTable {
    limits: SessionLimits,
    sessions: BTreeMap<u128, Session>,
    /// The same sessions, the longest idle first.
    by_activity: BTreeSet<(u64, u128)>,
    replies: u64,
    digest: u128,
    image: Image,
}

impl SessionTable {
    /// An empty table.
    pub fn new(limits: SessionLimits) -> Self {
        Self {
            limits,
            sessions: BTreeMap::new(),
            by_activity: BTreeSet::new(),
            replies: 0,
            digest: 0,
            image: Image::default(),
        }
    }

    /// How many sessions there are, expired ones not yet removed included.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// How many replies are kept.
    pub fn replies(&self) -> u64 {
        self.replies
    }

    /// What the table counts, in bytes. At most `max_bytes`, unless the limit was lowered.
    pub fn used_bytes(&self) -> u64 {
        self.sessions.len() as u64 * SESSION_BYTES + self.replies * REPLY_BYTES
    }

    /// The limits in force.
    pub fn limits(&self) -> SessionLimits {
        self.limits
    }

    /// Changes the limits. Nothing is removed by this, but a shorter idle time can end sessions at once.
    pub fn set_limits(&mut self, limits: SessionLimits) {
        self.limits = limits;
    }

    /// An order-independent sum over sessions and replies, the same on every replica that has applied the same log.
    pub fn digest(&self) -> u128 {
        self.digest
    }

    /// Opens a session at shard time `now_ms`.
    pub fn open(&mut self, now_ms: u64, id: u128) -> Opening {
        if let Some(session) = self.sessions.get_mut(&id) {
            if !session.lapsed(now_ms, self.limits.idle_ms) {
                self.image.preserve(id, session);
                touch(id, session, now_ms, &mut self.by_activity, &mut self.digest);
                return Opening::Open;
            }
            self.remove(id);
        }
        if self.sessions.len() >= self.limits.max_sessions as usize
            || self.used_bytes() + SESSION_BYTES > self.limits.max_bytes
        {
            return Opening::Busy;
        }
        let session = Session {
            acked: 1,
            active_ms: activity(now_ms),
            replies: VecDeque::new(),
            imaged: self.image.epoch(),
        };
        self.insert(id, session);
        Opening::Open
    }

    /// Executes a numbered write at shard time `now_ms`, unless it was executed before or may not be. `run` is called at most
    /// once.
    pub fn execute(&mut self, now_ms: u64, write: &SessionWrite, run: impl FnOnce() -> Outcome) -> Verdict {
        let id = write.session;
        let session_bytes = self.sessions.len() as u64 * SESSION_BYTES;
        let session = match self.sessions.get_mut(&id) {
            Some(session) if !session.lapsed(now_ms, self.limits.idle_ms) => session,
            _ => return Verdict::Expired,
        };
        if !write.in_window() {
            return Verdict::Busy;
        }
        self.image.preserve(id, session);
        touch(id, session, now_ms, &mut self.by_activity, &mut self.digest);
        if write.first_unacked > session.acked {
            self.digest = self
                .digest
                .wrapping_sub(head_digest(id, session.acked, session.active_ms))
                .wrapping_add(head_digest(id, write.first_unacked, session.active_ms));
            session.acked = write.first_unacked;
            while let Some((seq, outcome)) = session.replies.front()
                && *seq < session.acked
            {
                self.digest = self.digest.wrapping_sub(reply_digest(id, *seq, outcome));
                self.replies -= 1;
                session.replies.pop_front();
            }
            shrink(&mut session.replies);
        }
        if write.seq < session.acked {
            return Verdict::Acknowledged;
        }
        // The number is inside the table's window too: what is acknowledged only grows.
        let at = match session.replies.binary_search_by_key(&write.seq, |(seq, _)| *seq) {
            Ok(_) if active(Mutant::SessionReplayed) => return Verdict::Executed(run()),
            Ok(at) => return Verdict::Replayed(session.replies[at].1),
            Err(at) => at,
        };
        if session_bytes + (self.replies + 1) * REPLY_BYTES > self.limits.max_bytes {
            return Verdict::Busy;
        }
        let outcome = run();
        session.replies.insert(at, (write.seq, outcome));
        self.replies += 1;
        self.digest = self.digest.wrapping_add(reply_digest(id, write.seq, &outcome));
        Verdict::Executed(outcome)
    }

    /// Forgets a session whose client is done. Returns whether there was one.
    pub fn close(&mut self, id: u128) -> bool {
        let known = self.sessions.contains_key(&id);
        if known {
            self.remove(id);
        }
        known
    }

    /// Forgets a session if it has expired by shard time `now_ms`. Returns whether it had.
    pub fn expire(&mut self, now_ms: u64, id: u128) -> bool {
        let idle_ms = self.limits.idle_ms;
        let lapsed = self
            .sessions
            .get(&id)
            .is_some_and(|session| session.lapsed(now_ms, idle_ms));
        if lapsed {
            self.remove(id);
        }
        lapsed
    }

    /// Appends up to `max` sessions that will have expired once shard time is `now_ms`, the longest idle first. The leader puts
    /// them into the log; until that is applied they are offered again.
    pub fn propose_expired(&self, now_ms: u64, max: usize, expired: &mut Vec<u128>) {
        let lapsed = self
            .by_activity
            .iter()
            .take_while(|(active_ms, _)| active_ms.saturating_add(self.limits.idle_ms) <= now_ms);
        expired.extend(lapsed.take(max).map(|(_, id)| *id));
    }

    /// Validates the whole table against its invariants. Takes time proportional to it.
    ///
    /// # Panics
    /// On a broken invariant: a bug, or broken memory.
    pub fn check(&self) {
        let (mut replies, mut digest) = (0, 0u128);
        for (id, session) in &self.sessions {
            assert!(
                self.by_activity.contains(&(session.active_ms, *id)),
                "a session is missing in the order of activity"
            );
            assert!(session.acked >= 1, "sequence numbers start at 1");
            digest = digest.wrapping_add(head_digest(*id, session.acked, session.active_ms));
            let mut floor = session.acked;
            for (seq, outcome) in &session.replies {
                assert!(
                    *seq >= floor,
                    "replies are out of order or below the acknowledged number"
                );
                assert!(*seq - session.acked < SESSION_WINDOW, "a reply is outside the window");
                floor = seq.saturating_add(1);
                replies += 1;
                digest = digest.wrapping_add(reply_digest(*id, *seq, outcome));
            }
        }
        assert_eq!(
            self.by_activity.len(),
            self.sessions.len(),
            "the order of activity holds strangers"
        );
        assert_eq!(replies, self.replies, "the number of replies is wrong");
        assert_eq!(digest, self.digest, "the digest of sessions is wrong");
    }

    fn insert(&mut self, id: u128, session: Session) {
        self.by_activity.insert((session.active_ms, id));
        self.replies += session.replies.len() as u64;
        self.digest = self.digest.wrapping_add(session_digest(id, &session));
        let old = self.sessions.insert(id, session);
        assert!(
            old.is_none(),
            "invariant: the caller has made sure that the session is not there"
        );
    }

    fn remove(&mut self, id: u128) {
        let found = self.sessions.remove(&id);
        let mut session = found.expect("invariant: the caller has found the session");
        self.image.preserve(id, &mut session);
        self.by_activity.remove(&(session.active_ms, id));
        self.replies -= session.replies.len() as u64;
        self.digest = self.digest.wrapping_sub(session_digest(id, &session));
    }
}

/// Notes activity.
fn touch(id: u128, session: &mut Session, now_ms: u64, by_activity: &mut BTreeSet<(u64, u128)>, digest: &mut u128) {
    let active_ms = activity(now_ms);
    if active_ms <= session.active_ms {
        return;
    }
    by_activity.remove(&(session.active_ms, id));
    by_activity.insert((active_ms, id));
    let old = head_digest(id, session.acked, session.active_ms);
    let new = head_digest(id, session.acked, active_ms);
    *digest = digest.wrapping_sub(old).wrapping_add(new);
    session.active_ms = active_ms;
}

/// Gives back memory once a queue is mostly empty, so that the accounting stays true.
fn shrink(replies: &mut VecDeque<(u64, Outcome)>) {
    if replies.capacity() > 8 && replies.len() < replies.capacity() / 4 {
        replies.shrink_to(replies.len() * 2);
    }
}

fn activity(now_ms: u64) -> u64 {
    now_ms | (ACTIVITY_STEP_MS - 1)
}

fn session_digest(id: u128, session: &Session) -> u128 {
    let replies = session
        .replies
        .iter()
        .map(|(seq, outcome)| reply_digest(id, *seq, outcome));
    replies.fold(head_digest(id, session.acked, session.active_ms), u128::wrapping_add)
}

fn head_digest(id: u128, acked: u64, active_ms: u64) -> u128 {
    digest::entry(&id.to_le_bytes(), b"session", acked, active_ms)
}

fn reply_digest(id: u128, seq: u64, outcome: &Outcome) -> u128 {
    let (code, version, value) = image::outcome_fields(outcome);
    let mut bytes = [0; 17];
    bytes[0] = code;
    bytes[1..9].copy_from_slice(&version.to_le_bytes());
    bytes[9..].copy_from_slice(&value.to_le_bytes());
    digest::entry(&id.to_le_bytes(), &bytes, seq, 0)
}
