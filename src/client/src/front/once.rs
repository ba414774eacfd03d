//! Writes that are executed exactly once: a session in each shard that is written to, opened when it is first needed, and the attempts
//! of a write under one number.
//!
//! # What holds
//! - **An id is opened once.** After an opening in doubt another id is drawn, so a session that has expired never comes back empty.
//! - **A write keeps its number** through all its attempts, until its reply is in or its caller has gone. It gets a number in another
//!   session only if no attempt can have been executed.
//! - What an earlier attempt may have done outweighs what the last one did not: such a write ends in doubt.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use generation_proto::{Operation, RequestOptions, Session, ShardSession, Status};
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::dispatch::{Answer, Failure, Inner, To, explained, request_len};
use crate::core::error::{Error, InDoubt, NotSent, Rejected, State};
use crate::core::retry::{Attempts, Doubt};
use crate::core::session::WriteSession;

/// How long an attempt waits for its reply before the write is sent again: longer than a node that is well ever takes.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the closing of sessions may take all in all.
const CLOSING: Duration = Duration::from_secs(1);

/// The sessions of one client, by shard.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    shards: Mutex<BTreeMap<u16, Arc<Slot>>>,
}

/// The session in one shard.
#[derive(Debug, Default)]
struct Slot {
    session: Mutex<Option<WriteSession>>,
    /// Held by whoever opens a session.
    opening: Arc<tokio::sync::Mutex<()>>,
    /// A number was given back, or there is another session.
    freed: Notify,
}

/// What came of asking for a number.
enum Begun {
    Numbered(Number),
    /// The window is full.
    Full,
    /// No session is open.
    Closed,
}

/// The number of a write; given back when it is dropped.
struct Number {
    slot: Arc<Slot>,
    session: Session,
}

/// What an answer leaves to be asked for again.
pub(crate) struct Unfinished {
    /// Why, for the first such key.
    pub(crate) error: Error,
    /// Whether other keys have their result.
    pub(crate) some_done: bool,
}

/// A write that has failed, with the last answer in which some of its keys had a result.
pub(crate) struct Unanswered {
    pub(crate) error: Error,
    pub(crate) partial: Option<Answer>,
}

impl From<Error> for Unanswered {
    fn from(error: Error) -> Self {
        Self { error, partial: None }
    }
}

impl Sessions {
    fn slot(&self, shard: u16) -> Arc<Slot> {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shards.entry(shard).or_default())
    }

    /// Closes every session, as far as that is possible at once. What is not closed expires.
    pub(crate) async fn close(&self, inner: &Arc<Inner>) {
        let slots = std::mem::take(&mut *self.shards.lock().unwrap_or_else(PoisonError::into_inner));
        let closings = slots.into_iter().filter_map(|(shard, slot)| {
            let id = slot.session().take()?.id();
            let close = Operation::CloseSession(ShardSession { id, shard });
            Some(inner.call(To::Shard(shard), close, RequestOptions::default(), None, Some(CLOSING)))
        });
        // One that fails is one that expires.
        drop(timeout(CLOSING, futures_util::future::join_all(closings)).await);
    }
}

impl Slot {
    fn session(&self) -> MutexGuard<'_, Option<WriteSession>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, count: u64) -> Begun {
        match &mut *self.session() {
            None => Begun::Closed,
            Some(session) => session.begin(count).map_or(Begun::Full, |session| {
                Begun::Numbered(Number {
                    slot: Arc::clone(self),
                    session,
                })
            }),
        }
    }

    fn opened(&self, id: u128) {
        *self.session() = Some(WriteSession::new(id));
        self.freed.notify_waiters();
    }

    /// The shard does not know the session of this id.
    fn expired(&self, id: u128) {
        let mut session = self.session();
        if session.as_ref().is_some_and(|session| session.id() == id) {
            *session = None;
        }
        drop(session);
        self.freed.notify_waiters();
    }
}

impl Number {
    /// The option for the next attempt.
    fn again(&self) -> Session {
        match &*self.slot.session() {
            Some(session) if session.id() == self.session.id => session.again(&self.session),
            _ => self.session,
        }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        if let Some(session) = &mut *self.slot.session()
            && session.id() == self.session.id
        {
            session.end(&self.session);
        }
        self.slot.freed.notify_waiters();
    }
}

impl Inner {
    /// Sends a write of `count` keys of one shard until it is answered or its time is over, under one number.
    ///
    /// `unfinished` finds in an answer whether anything is left to be asked for again.
    #[allow(clippy::too_many_arguments, reason = "the parts of one request, used in two places")]
    pub(crate) async fn call_once(
        self: &Arc<Self>,
        sessions: &Sessions,
        shard: u16,
        count: u64,
        operation: Operation<'_>,
        len: usize,
        mut options: RequestOptions,
        allowed: Duration,
        unfinished: impl Fn(&Answer) -> Option<Unfinished>,
    ) -> Result<Answer, Unanswered> {
        let (slot, to) = (sessions.slot(shard), To::Shard(shard));
        let start = Instant::now();
        let deadline = start + allowed;
        let in_time = || NotSent::Timeout { after: allowed };
        let mut attempts = Attempts::new(allowed, true);
        let (mut doubt, mut partial, mut reopened) = (Doubt::default(), None, false);
        let mut unreachable = None;
        let mut number: Option<Number> = None;
        let mut opening: Option<(OwnedMutexGuard<()>, u128)> = None;
        self.budget.deposit();
        loop {
            if number.is_none() && opening.is_none() {
                let mut freed = std::pin::pin!(slot.freed.notified());
                freed.as_mut().enable();
                match slot.begin(count) {
                    Begun::Numbered(begun) => number = Some(begun),
                    Begun::Full => {
                        before(deadline, freed).await.ok_or_else(|| Error::from(in_time()))?;
                        continue;
                    }
                    Begun::Closed => {
                        let lock = Arc::clone(&slot.opening).lock_owned();
                        let guard = before(deadline, lock).await.ok_or_else(|| Error::from(in_time()))?;
                        if slot.session().is_none() {
                            opening = Some((guard, self.session_id()?));
                        }
                        continue;
                    }
                }
            }
            let times = (deadline, deadline.min(Instant::now() + PATIENCE));
            let failure = if let Some((_, id)) = &mut opening {
                let open = Operation::OpenSession(ShardSession { id: *id, shard });
                let (len, plain) = (request_len(&open), RequestOptions::default());
                match self.try_once(to, &attempts, open, len, plain, times, allowed).await {
                    Ok(_) => {
                        slot.opened(*id);
                        opening = None;
                        continue;
                    }
                    Err(failure) => {
                        if failure.error.state() != State::NotSent {
                            *id = self.session_id()?;
                        }
                        not_opened(failure)
                    }
                }
            } else {
                options.session = number.as_ref().map(Number::again);
                let sent = self.try_once(to, &attempts, operation, len, options, times, allowed);
                match sent.await {
                    Ok(answer) => match unfinished(&answer) {
                        None => return Ok(answer),
                        Some(Unfinished { error, some_done }) => {
                            if some_done {
                                partial = Some(answer);
                            }
                            error.into()
                        }
                    },
                    Err(failure) => failure,
                }
            };
            if let Some(sent) = &number {
                let id = sent.session.id;
                let expired = matches!(failure.error, Error::Rejected(Rejected::SessionExpired));
                if expired {
                    slot.expired(id);
                }
                if expired && doubt.is_none() && partial.is_none() && !reopened {
                    reopened = true;
                    number = None;
                    continue;
                }
                doubt.note(&failure.error);
            }
            let delay = attempts.after(
                &failure.error,
                failure.redirected,
                start.elapsed(),
                &self.settings.retry,
                &self.budget,
                self.random(),
            );
            let Some(delay) = delay else {
                let error = doubt.outweighs(explained(failure.error, unreachable));
                return Err(Unanswered { error, partial });
            };
            if matches!(failure.error, Error::NotSent(NotSent::Connect(_))) {
                unreachable = Some(failure.error.clone());
            }
            tracing::debug!(error = %failure.error, ?delay, "trying again under the same number");
            self.counters.note_attempt(delay);
            if !delay.is_zero() {
                sleep(delay).await;
            }
        }
    }

    /// One attempt, at whoever is thought to lead.
    #[allow(clippy::too_many_arguments, reason = "the parts of one attempt, used in two places")]
    async fn try_once(
        self: &Arc<Self>,
        to: To,
        attempts: &Attempts,
        operation: Operation<'_>,
        len: usize,
        options: RequestOptions,
        times: (Instant, Instant),
        allowed: Duration,
    ) -> Result<Answer, Failure> {
        let target = self.target(to, attempts.retries())?;
        self.attempt(to, target, operation, len, options, times, allowed).await
    }

    fn session_id(&self) -> Result<u128, Error> {
        let mut bytes = [0; 16];
        self.pool.fill_random(&mut bytes)?;
        // 0 is no session.
        Ok(u128::from_le_bytes(bytes) | 1)
    }
}

async fn before<T>(deadline: Instant, wait: impl Future<Output = T>) -> Option<T> {
    timeout_at(deadline, wait).await.ok()
}

/// Of a write whose session could not be opened nothing is in doubt.
fn not_opened(failure: Failure) -> Failure {
    let error = match failure.error {
        Error::InDoubt(InDoubt::Timeout { after }) => NotSent::Timeout { after }.into(),
        Error::InDoubt(InDoubt::ConnectionLost { peer, reason }) => NotSent::ConnectionLost { peer, reason }.into(),
        Error::InDoubt(InDoubt::Unknown { peer, message }) => NotSent::Other {
            peer,
            code: Status::InDoubt.code(),
            message,
        }
        .into(),
        other => other,
    };
    Failure { error, ..failure }
}
