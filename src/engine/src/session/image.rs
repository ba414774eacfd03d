//! Taking an image of the session table in slices, and loading one. The format is drawn at the head of [`crate::session`].

use std::collections::VecDeque;
use std::ops::Bound;

use super::{SESSION_WINDOW, Session, SessionTable};
use crate::codec::Reader;
use crate::command::Outcome;
use crate::mutants::{Mutant, active};
use crate::shard::Progress;

/// What makes bytes no image of sessions. The table holds those that came before the fault and must be thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionImageError {
    /// The bytes end in the middle of a session.
    #[error("image of sessions ends in the middle of a session")]
    Truncated,
    /// A session comes twice.
    #[error("session {session:#034x} comes twice in an image")]
    Duplicate {
        /// The session.
        session: u128,
    },
    /// A field out of its range.
    #[error("invalid {field} of session {session:#034x} in an image")]
    InvalidField {
        /// Which one.
        field: &'static str,
        /// The session.
        session: u128,
    },
}

/// An image under way, or none.
#[derive(Debug, Default)]
pub(super) struct Image {
    /// Grows with every image, so that sessions need no sweep to become "not yet taken".
    epoch: u64,
    active: bool,
    /// Sessions up to this one have been taken; `None` = none yet.
    taken: Option<u128>,
    /// Those copied out because they were about to change.
    preserved: Vec<u8>,
}

impl Image {
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn preserve(&mut self, id: u128, session: &mut Session) {
        if self.active && session.imaged != self.epoch {
            session.imaged = self.epoch;
            if self.taken.is_none_or(|taken| id > taken) {
                encode(id, session, &mut self.preserved);
            }
        }
    }
}

impl SessionTable {
    /// Begins an image of the table as it is now. One that was under way is given up.
    pub fn image_begin(&mut self) {
        self.image = Image {
            epoch: self.image.epoch + 1,
            active: true,
            ..Image::default()
        };
    }

    /// Appends the next slice of the image: whole sessions, some `max_bytes` of them (at least one session, and whatever changes
    /// have pushed out). Returns [`Progress::Done`] with the last; without an image under way it appends nothing.
    pub fn image_slice(&mut self, max_bytes: usize, out: &mut Vec<u8>) -> Progress {
        if !self.image.active || active(Mutant::SessionsNotInSnapshot) {
            return Progress::Done;
        }
        let start = out.len();
        out.append(&mut self.image.preserved);
        let from = self.image.taken.map_or(Bound::Unbounded, Bound::Excluded);
        let mut first = true;
        for (id, session) in self.sessions.range((from, Bound::Unbounded)) {
            if !first && out.len() - start >= max_bytes {
                return Progress::More;
            }
            first = false;
            if session.imaged != self.image.epoch {
                encode(*id, session, out);
            }
            self.image.taken = Some(*id);
        }
        self.image.active = false;
        Progress::Done
    }

    /// Gives up the image under way, if any.
    pub fn image_abandon(&mut self) {
        self.image.active = false;
        self.image.preserved = Vec::new();
    }

    /// Adds the sessions of one slice of an image to the table. Limits are not applied: an image holds what was admitted.
    pub fn load(&mut self, slice: &[u8]) -> Result<(), SessionImageError> {
        let mut reader = Reader::new(slice);
        while reader.remaining() > 0 {
            let (id, session) = decode(&mut reader)?;
            if self.sessions.contains_key(&id) {
                return Err(SessionImageError::Duplicate { session: id });
            }
            self.insert(id, session);
        }
        Ok(())
    }
}

fn encode(id: u128, session: &Session, out: &mut Vec<u8>) {
    out.extend(id.to_le_bytes());
    out.extend(session.acked.to_le_bytes());
    out.extend(session.active_ms.to_le_bytes());
    out.extend((session.replies.len() as u16).to_le_bytes());
    for (seq, outcome) in &session.replies {
        let (code, version, value) = outcome_fields(outcome);
        out.extend(((seq - session.acked) as u16).to_le_bytes());
        out.push(code);
        out.extend(version.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
}

fn decode(reader: &mut Reader<'_>) -> Result<(u128, Session), SessionImageError> {
    let truncated = SessionImageError::Truncated;
    let id = reader.u128().ok_or(truncated)?;
    let acked = reader.u64().ok_or(truncated)?;
    let active_ms = reader.u64().ok_or(truncated)?;
    let count = usize::from(reader.u16().ok_or(truncated)?);
    let invalid = |field| SessionImageError::InvalidField { field, session: id };
    if acked == 0 {
        return Err(invalid("acknowledged number"));
    }
    if count > SESSION_WINDOW as usize {
        return Err(invalid("number of replies"));
    }
    let mut replies = VecDeque::with_capacity(count);
    let mut floor = 0;
    for _ in 0..count {
        let distance = u64::from(reader.u16().ok_or(truncated)?);
        let code = reader.u8().ok_or(truncated)?;
        let version = reader.version().ok_or(truncated)?;
        let value = reader.i64().ok_or(truncated)?;
        if distance < floor || distance >= SESSION_WINDOW {
            return Err(invalid("number of a reply"));
        }
        floor = distance + 1;
        let outcome = match code {
            0 => Outcome::Applied { version },
            1 => Outcome::Counter { version, value },
            2 => Outcome::NotFound,
            3 => Outcome::ConditionFailed { current: version },
            4 => Outcome::NotANumber,
            5 => Outcome::Overflow,
            6 => Outcome::OutOfMemory,
            7 => Outcome::InvalidSize,
            _ => return Err(invalid("outcome")),
        };
        if outcome_fields(&outcome) != (code, version.get(), value) {
            return Err(invalid("outcome"));
        }
        let seq = acked.checked_add(distance).ok_or(invalid("number of a reply"))?;
        replies.push_back((seq, outcome));
    }
    Ok((
        id,
        Session {
            acked,
            active_ms,
            replies,
            imaged: 0,
        },
    ))
}

/// Code, version and value of an outcome, as in the image.
pub(super) fn outcome_fields(outcome: &Outcome) -> (u8, u64, i64) {
    match *outcome {
        Outcome::Applied { version } => (0, version.get(), 0),
        Outcome::Counter { version, value } => (1, version.get(), value),
        Outcome::NotFound => (2, 0, 0),
        Outcome::ConditionFailed { current } => (3, current.get(), 0),
        Outcome::NotANumber => (4, 0, 0),
        Outcome::Overflow => (5, 0, 0),
        Outcome::OutOfMemory => (6, 0, 0),
        Outcome::InvalidSize => (7, 0, 0),
    }
}
