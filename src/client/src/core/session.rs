//! Sessions of two kinds: tokens by which a read sees what was written before, and the numbering of writes by which a retry is
//! recognised.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use generation_proto::Session;

/// What a client has seen, by shard: a read with it ([`crate::Consistency::Session`]) sees at least that.
///
/// Every reply carries one; [`SessionToken::merge`] joins them. As text (`shard.epoch.index`, joined by commas) it can be
/// handed to another process, which then reads what this one wrote.
///
/// ```
/// use generation_client::SessionToken;
/// let mut token: SessionToken = "3.1.577".parse()?;
/// token.merge(&"3.1.580,7.2.4".parse()?);
/// assert_eq!(token.to_string(), "3.1.580,7.2.4");
/// # Ok::<(), generation_client::ParseTokenError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct SessionToken {
    /// Shard to (epoch, index), which is also their order.
    seen: BTreeMap<u16, (u32, u64)>,
}

impl SessionToken {
    /// A token that asks for nothing.
    pub const fn new() -> Self {
        Self { seen: BTreeMap::new() }
    }

    /// Notes that `index` of `shard`, in `epoch`, was seen. What is older than known is ignored.
    pub fn observe(&mut self, shard: u16, epoch: u32, index: u64) {
        let seen = self.seen.entry(shard).or_default();
        *seen = (*seen).max((epoch, index));
    }

    /// Takes over whatever `other` has seen that this one has not.
    pub fn merge(&mut self, other: &Self) {
        for (&shard, &(epoch, index)) in &other.seen {
            self.observe(shard, epoch, index);
        }
    }

    /// Epoch and index seen of `shard`; (0, 0) where nothing was.
    pub fn seen(&self, shard: u16) -> (u32, u64) {
        self.seen.get(&shard).copied().unwrap_or_default()
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

impl fmt::Display for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (shard, (epoch, index))) in self.seen.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{shard}.{epoch}.{index}")?;
        }
        Ok(())
    }
}

/// A text is not a session token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a session token: expected SHARD.EPOCH.INDEX, joined by commas, as replies give it")]
pub struct ParseTokenError(String);

impl FromStr for SessionToken {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        let mut token = Self::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let error = || ParseTokenError(part.to_owned());
            let mut numbers = part.split('.');
            let mut next = || numbers.next().ok_or_else(error);
            let (shard, epoch, index) = (next()?, next()?, next()?);
            if numbers.next().is_some() {
                return Err(error());
            }
            token.observe(
                shard.parse().map_err(|_| error())?,
                epoch.parse().map_err(|_| error())?,
                index.parse().map_err(|_| error())?,
            );
        }
        Ok(token)
    }
}

/// Numbers the writes of one write session to one shard, and knows which replies have been seen.
///
/// A write takes a number ([`WriteSession::begin`]), keeps it through its retries, and gives it back when its reply is in or
/// nobody waits for it any more ([`WriteSession::end`]). `first_unacked` then tells the shard which replies it may forget.
#[derive(Debug, Clone)]
pub struct WriteSession {
    id: u128,
    next: u64,
    unacked: std::collections::BTreeSet<u64>,
}

/// Most writes of a session to one shard that may be unanswered at a time: what a shard keeps replies for.
pub const SESSION_WINDOW: u64 = generation_proto::limits::SESSION_WINDOW;

impl WriteSession {
    /// A session of a random id, not 0, that was opened in the shard.
    ///
    /// # Panics
    /// When `id` is 0.
    pub fn new(id: u128) -> Self {
        assert!(id != 0, "session id 0 is not a session");
        Self {
            id,
            next: 1,
            unacked: std::collections::BTreeSet::new(),
        }
    }

    /// The session.
    pub const fn id(&self) -> u128 {
        self.id
    }

    /// Numbers a request of `count` writes, from 1 to [`SESSION_WINDOW`] (several keys, or one): it has the number given here, its keys
    /// that and the following ones. `None` when the last of them would not be within [`SESSION_WINDOW`] of the oldest unanswered write:
    /// wait for that one.
    pub fn begin(&mut self, count: u64) -> Option<Session> {
        let seq = self.next;
        let first_unacked = self.first_unacked();
        if seq - first_unacked + count > SESSION_WINDOW {
            return None;
        }
        self.next += count;
        // Its other numbers are covered by its first, which is the lowest of them.
        self.unacked.insert(seq);
        Some(Session {
            id: self.id,
            seq,
            first_unacked,
        })
    }

    /// The options for sending a numbered write again: the same number, what has been acknowledged meanwhile.
    pub fn again(&self, session: &Session) -> Session {
        Session {
            first_unacked: self.first_unacked().min(session.seq),
            ..*session
        }
    }

    /// The reply to a numbered write was seen, or is of no interest any more.
    pub fn end(&mut self, session: &Session) {
        self.unacked.remove(&session.seq);
    }

    fn first_unacked(&self) -> u64 {
        self.unacked.first().copied().unwrap_or(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_merge_by_epoch_then_index_and_survive_text() {
        let mut token = SessionToken::new();
        token.observe(1, 1, 50);
        token.observe(1, 2, 10);
        token.observe(1, 1, 90);
        token.observe(4, 0, 1);
        assert_eq!(token.seen(1), (2, 10));
        assert_eq!(token.seen(2), (0, 0));
        assert_eq!(token.to_string().parse(), Ok(token));
        assert_eq!("".parse(), Ok(SessionToken::new()));
        for wrong in ["1", "1.2", "1.2.3.4", "x.1.1", "1.1.-1", "70000.1.1", "1.2.3;4.5.6"] {
            assert!(wrong.parse::<SessionToken>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn writes_are_numbered_and_replies_acknowledged_in_any_order() {
        let mut session = WriteSession::new(7);
        let first = session.begin(1).unwrap();
        let second = session.begin(1).unwrap();
        let third = session.begin(1).unwrap();
        assert_eq!((first.seq, second.seq, third.first_unacked), (1, 2, 1));
        session.end(&second);
        assert_eq!(session.again(&third).first_unacked, 1);
        session.end(&first);
        assert_eq!(session.again(&third).first_unacked, 3);
        assert_eq!(session.again(&third).seq, 3);
        session.end(&third);
        assert_eq!(session.begin(1).unwrap().first_unacked, 4, "at most its own number");
    }

    #[test]
    fn the_window_is_bounded_by_the_oldest_unanswered_write() {
        let mut session = WriteSession::new(7);
        let oldest = session.begin(1).unwrap();
        for _ in 1..SESSION_WINDOW {
            let write = session.begin(1).unwrap();
            session.end(&write);
        }
        assert_eq!(session.begin(1), None);
        session.end(&oldest);
        assert!(session.begin(1).is_some());
    }

    #[test]
    fn a_request_with_several_keys_takes_as_many_numbers() {
        let mut session = WriteSession::new(7);
        let keys = session.begin(SESSION_WINDOW - 1).unwrap();
        assert_eq!(session.begin(2), None);
        let last = session.begin(1).unwrap();
        assert_eq!((keys.seq, last.seq, last.first_unacked), (1, SESSION_WINDOW, 1));
        session.end(&keys);
        assert_eq!(session.again(&last).first_unacked, SESSION_WINDOW);
        assert_eq!(session.begin(SESSION_WINDOW - 1).unwrap().seq, SESSION_WINDOW + 1);
    }
}
