//! A request's way: route, send, and, where that is safe, again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use generation_proto::reply::ReplyError;
use generation_proto::{Class, Frame, Map, Operation, Reply, Request, RequestOptions, Status};
use tokio::time::{Instant, sleep};
use tracing::Instrument;

use super::connection::{Connection, LARGE_REQUEST_BYTES, Loss};
use super::health::Health;
use super::hedging::Read;
use super::maps::keep_up;
use super::pool::{Key, Pool};
use super::seeds::{Resolver, Seeds};
use super::tls::Identity;
use crate::core::choice::{Turn, falls_back};
use crate::core::consistency::Consistency;
use crate::core::error::{ConnectError, Error, InDoubt, NotSent, Refusal, Rejected};
use crate::core::hedge::{HedgePolicy, Latencies};
use crate::core::metrics::Metrics;
use crate::core::refresh::{Reason, Refresh};
use crate::core::reply::Meta;
use crate::core::retry::{Attempts, Budget, RetryPolicy};
use crate::core::routing::{Routes, Target};
use crate::core::session::SessionToken;

/// The part of the time left that a node is not told of, so that its answer arrives before this side gives up.
const DEADLINE_MARGIN: Duration = Duration::from_millis(100);
/// How long one attempt at a read is waited for where another replica can be asked: longer than a node that is well ever takes.
const PATIENCE: Duration = Duration::from_secs(1);
/// Values shorter than this are copied out of the receive buffer, which they would otherwise keep alive whole.
const COPY_BELOW_BYTES: usize = 16 << 10;

/// What a client is configured to.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) cluster: String,
    pub(crate) seeds: Vec<String>,
    pub(crate) resolver: Resolver,
    pub(crate) refresh_interval: Duration,
    pub(crate) name: String,
    pub(crate) timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) retry: RetryPolicy,
    pub(crate) hedge: Option<HedgePolicy>,
    pub(crate) consistency: Consistency,
}

/// What all clones of a client share.
pub(crate) struct Inner {
    pub(super) settings: Settings,
    pub(super) pool: Arc<Pool>,
    pub(super) seeds: Seeds,
    pub(super) health: Arc<Health>,
    pub(super) routes: RwLock<Routes>,
    /// What was seen of each shard, as (epoch, index).
    pub(super) seen: Mutex<Vec<(u32, u64)>>,
    pub(super) budget: Budget,
    /// Times that reads took which are hedged: relaxed ones, linearizable ones.
    pub(super) latencies: [Latencies; 2],
    pub(super) counters: Counters,
    /// Whether shards have several replicas.
    pub(super) is_replicated: AtomicBool,
    random: Arc<AtomicU64>,
    pub(super) refresh: Mutex<Refresh>,
    /// What times are counted from.
    origin: Instant,
}

/// What happened so far, off the way of a request that is answered at once.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) redirects: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) hedges: AtomicU64,
    pub(super) hedges_won: AtomicU64,
}

impl Counters {
    /// Another attempt is made, after `delay`.
    pub(super) fn note_attempt(&self, delay: Duration) {
        let counter = if delay.is_zero() {
            &self.redirects
        } else {
            &self.retries
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whom a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    Shard(u16),
    Node(u64),
    /// Any node will do.
    Any,
}

/// A reply that is a success or an answer.
pub(crate) struct Answer {
    frame: Frame,
    body_at: usize,
    connection: Arc<Connection>,
    is_write: bool,
    pub(crate) meta: Meta,
    /// `false`: the key is absent.
    pub(crate) found: bool,
    pub(crate) expires_at_ms: Option<u64>,
}

impl Answer {
    /// The body, still in the receive buffer.
    pub(crate) fn body(&self) -> Bytes {
        self.frame.payload.slice(self.body_at..)
    }

    /// The body as a value that may be kept.
    pub(crate) fn value(&self) -> Bytes {
        keep(&self.body())
    }

    pub(crate) fn counter(&self) -> Result<i64, Error> {
        let body = self.body();
        let counter: [u8; 8] = body[..]
            .try_into()
            .map_err(|_| self.malformed(&ReplyError("counter")))?;
        Ok(i64::from_le_bytes(counter))
    }

    pub(crate) fn peer(&self) -> &str {
        &self.connection.peer.addr
    }

    /// Longest reply the node can make.
    pub(crate) fn max_frame_len(&self) -> usize {
        self.connection.peer.max_frame_len
    }

    /// The error for a body that cannot be read.
    pub(crate) fn malformed(&self, error: &ReplyError) -> Error {
        protocol_error(self.peer(), self.is_write, &error.to_string())
    }
}

/// A part of a reply as a value that may be kept: a short one is copied, so that it does not hold on to the whole buffer.
pub(crate) fn keep(part: &Bytes) -> Bytes {
    if part.len() < COPY_BELOW_BYTES {
        Bytes::copy_from_slice(part)
    } else {
        part.clone()
    }
}

/// An attempt that failed, and whether the next one goes elsewhere for a reason.
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) redirected: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            redirected: false,
        }
    }
}

impl Inner {
    pub(crate) async fn connect(identity: Identity, settings: Settings) -> Result<Arc<Self>, ConnectError> {
        let mut start = [0; 8];
        identity.random(&mut start)?;
        let random = Arc::new(AtomicU64::new(u64::from_le_bytes(start)));
        let origin = Instant::now();
        let health = Arc::new(Health::new(origin));
        let pool = {
            let random = random.clone();
            Arc::new(Pool::new(
                identity,
                settings.cluster.clone(),
                settings.name.clone(),
                settings.connect_timeout,
                health.clone(),
                Box::new(move || next_random(&random)),
            ))
        };
        let seeds = Seeds::new(
            settings.seeds.clone(),
            settings.resolver.clone(),
            settings.connect_timeout,
        );
        let map = match seeds.map(&pool).await {
            Ok(map) => map,
            Err(error) => {
                pool.close();
                return Err(error);
            }
        };
        let routes = Routes::new(map).map_err(|error| ConnectError::Handshake {
            peer: settings.seeds.join(", "),
            reason: error.to_string(),
        })?;
        let seen = Mutex::new(vec![(0, 0); usize::from(routes.shards())]);
        let is_replicated = AtomicBool::new(routes.is_replicated());
        let interval = settings.refresh_interval;
        let inner = Arc::new(Self {
            budget: Budget::new(&settings.retry),
            settings,
            pool,
            seeds,
            health,
            routes: RwLock::new(routes),
            seen,
            latencies: Default::default(),
            counters: Counters::default(),
            is_replicated,
            random,
            refresh: Mutex::default(),
            origin,
        });
        tokio::spawn(keep_up(Arc::downgrade(&inner), interval));
        Ok(inner)
    }

    /// The time, as the core counts it.
    pub(super) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.settings.cluster
    }

    pub(crate) fn current_map(&self) -> Map {
        self.read_routes().current_map()
    }

    pub(crate) fn retries_left(&self) -> u32 {
        self.budget.left()
    }

    pub(crate) fn metrics(&self) -> Metrics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let routes = self.read_routes();
        let nodes = routes.map().nodes.iter();
        Metrics {
            requests: self.health.sent(),
            redirects: read(&self.counters.redirects),
            retries: read(&self.counters.retries),
            hedges: read(&self.counters.hedges),
            hedges_won: read(&self.counters.hedges_won),
            retries_left: self.budget.left(),
            map_epoch: routes.epoch(),
            nodes: nodes
                .map(|node| self.health.of(node.id).metrics(node.addr.to_string()))
                .collect(),
        }
    }

    pub(crate) fn permits_taken(&self) -> usize {
        self.pool.permits_taken()
    }

    pub(crate) fn random(&self) -> u64 {
        next_random(&self.random)
    }

    pub(crate) fn shard_of(&self, key: &[u8]) -> u16 {
        self.read_routes().shard_of(key)
    }

    pub(crate) fn read_routes(&self) -> std::sync::RwLockReadGuard<'_, Routes> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write_routes(&self) -> std::sync::RwLockWriteGuard<'_, Routes> {
        self.routes.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn session_token(&self) -> SessionToken {
        let mut token = SessionToken::new();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (shard, &(epoch, index)) in seen.iter().enumerate().filter(|(_, seen)| seen.1 != 0) {
            token.observe(shard as u16, epoch, index);
        }
        token
    }

    pub(crate) fn seen(&self, shard: u16) -> (u32, u64) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(usize::from(shard)).copied().unwrap_or_default()
    }

    pub(crate) fn observe(&self, shard: u16, epoch: u32, index: u64) {
        if index == 0 {
            return;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = seen.get_mut(usize::from(shard)) {
            *seen = (*seen).max((epoch, index));
        }
    }

    pub(crate) async fn close(&self) {
        for connection in self.pool.close() {
            connection.closed().await;
        }
    }

    /// Sends a request, again where that is safe and there is time and budget, and gives the answer.
    pub(crate) async fn call(
        self: &Arc<Self>,
        to: To,
        operation: Operation<'_>,
        options: RequestOptions,
        consistency: Option<&Consistency>,
        allowed: Option<Duration>,
    ) -> Result<Answer, Error> {
        let span = tracing::debug_span!("request", operation = ?operation.opcode(), ?to);
        self.attempts(to, operation, options, consistency, allowed)
            .instrument(span)
            .await
    }

    async fn attempts(
        self: &Arc<Self>,
        to: To,
        operation: Operation<'_>,
        mut options: RequestOptions,
        consistency: Option<&Consistency>,
        allowed: Option<Duration>,
    ) -> Result<Answer, Error> {
        let allowed = allowed.unwrap_or(self.settings.timeout);
        let start = Instant::now();
        let deadline = start + allowed;
        let mut attempts = Attempts::new(allowed, false);
        let is_read = matches!(
            operation,
            Operation::Get { .. } | Operation::Keys(_) | Operation::Entries(_)
        );
        if is_read {
            attempts = attempts.of_read();
        }
        // Why the node that others name as the leader could not be asked.
        let mut unreachable = None;
        let is_any_replicas = consistency.is_some_and(Consistency::is_any_replicas);
        let hedged = self
            .settings
            .hedge
            .filter(|policy| is_any_replicas || policy.linearizable);
        let (mut asked, mut is_silent) = (None, false);
        self.budget.deposit();
        loop {
            if let (To::Shard(shard), Some(consistency)) = (to, consistency) {
                options.consistency = consistency.on_wire(shard, self.seen(shard));
            }
            let number = attempts.retries();
            let target = match to {
                To::Shard(shard) if is_any_replicas => self.replica(&self.read_routes(), shard, number, asked),
                // Where the leader does not answer this client it may still answer a follower.
                To::Shard(shard) if is_read && is_silent => self.instead_of(shard, asked, number),
                _ => self.target(to, number),
            };
            let failure = match target {
                Ok(target) => {
                    asked = Some(target.node);
                    let len = request_len(&operation);
                    let begun = if number == 0 { start } else { Instant::now() };
                    let times = (deadline, self.until(&operation, begun, deadline));
                    let answer = match (operation, hedged) {
                        (Operation::Get { key }, Some(policy)) => {
                            let read = Read {
                                to,
                                key,
                                options,
                                times,
                                allowed,
                            };
                            // Boxed, so that it does not make every other request's future larger.
                            Box::pin(self.hedged(policy, is_any_replicas, target, &read)).await
                        }
                        _ => self.attempt(to, target, operation, len, options, times, allowed).await,
                    };
                    match answer {
                        Ok(answer) => return Ok(answer),
                        Err(failure) => failure,
                    }
                }
                // Nobody to send it to.
                Err(error) => return Err(error),
            };
            let fell_back = is_any_replicas && Turn::of_attempt(number) == Turn::Replica && falls_back(&failure.error);
            let delay = attempts.after(
                &failure.error,
                failure.redirected || fell_back,
                start.elapsed(),
                &self.settings.retry,
                &self.budget,
                self.random(),
            );
            let Some(delay) = delay else {
                return Err(explained(failure.error, unreachable));
            };
            tracing::debug!(error = %failure.error, ?delay, "trying again");
            self.counters.note_attempt(delay);
            is_silent = is_silence(&failure.error);
            if matches!(failure.error, Error::NotSent(NotSent::Connect(_))) {
                unreachable = Some(failure.error);
            }
            if !delay.is_zero() {
                Box::pin(sleep(delay)).await;
            }
        }
    }

    /// Until when the reply to an attempt is waited for that begins now: a read that another replica can be asked for, while there is budget
    /// to ask it, does not spend all its time on one that keeps silent.
    pub(super) fn until(&self, operation: &Operation<'_>, begun: Instant, deadline: Instant) -> Instant {
        let patience = match operation {
            Operation::Get { .. } | Operation::MultiGet(_) => PATIENCE,
            // It can be megabytes.
            Operation::Keys(_) | Operation::Entries(_) => PATIENCE.max(deadline.saturating_duration_since(begun) / 2),
            _ => return deadline,
        };
        if self.is_replicated.load(Ordering::Relaxed) && self.budget.has_spare() {
            deadline.min(begun + patience)
        } else {
            deadline
        }
    }

    /// One attempt at a request of about `len` bytes that must be done by `deadline`; its reply is waited for until `until`. Whatever it
    /// teaches about the cluster is noted on the way.
    #[allow(clippy::too_many_arguments, reason = "the parts of one attempt, used in two places")]
    pub(crate) async fn attempt(
        self: &Arc<Self>,
        to: To,
        target: Target,
        operation: Operation<'_>,
        len: usize,
        mut options: RequestOptions,
        (deadline, until): (Instant, Instant),
        allowed: Duration,
    ) -> Result<Answer, Failure> {
        let key = Key::of(target);
        let connection = match self.pool.open_at(key) {
            Some(connection) => Ok(connection),
            // What is rare is boxed here and below, so that it does not make every request's future larger.
            None => Box::pin(self.pool.get(key, Some(target.node), until)).await,
        };
        let connection = match connection {
            Ok(connection) => connection,
            Err(error) => {
                self.unreachable(target);
                return Err(self.in_short(target, error).into());
            }
        };
        check_value(&operation, &connection)?;
        let sent = Instant::now();
        let left = deadline.saturating_duration_since(sent);
        let told = left.saturating_sub((left / 8).min(DEADLINE_MARGIN));
        options.deadline_ms = Some(u32::try_from(told.as_millis()).unwrap_or(u32::MAX).max(1));
        let encode = |id, out: &mut _| {
            Request { id, options, operation }.encode(out);
        };
        let alone = len >= LARGE_REQUEST_BYTES || matches!(operation, Operation::Keys(_) | Operation::Entries(_));
        let underway = connection.health.load().begin();
        let frame = if alone {
            Box::pin(connection.request_alone(len, until, encode)).await
        } else {
            connection.request(len, until, encode).await
        };
        drop(underway);
        let is_write = operation.opcode().is_write();
        match frame {
            Ok(frame) => {
                // A write also takes the time of a majority, and a page that of what is in it.
                connection.health.answered(sent, !is_write && !alone);
                self.read(to, target, key, &operation, connection, frame, allowed)
            }
            Err(loss) => {
                match loss {
                    // It waited for a place in this client; the node does not know of it.
                    Loss::TimedOut { queued: false } => {}
                    Loss::TimedOut { queued: true } => {
                        if connection.health.unanswered(target.addr, sent, self.random()) {
                            self.unreachable(target);
                        } else {
                            self.silent(to, target);
                        }
                    }
                    Loss::NotExecuted(_) | Loss::Lost(_) => self.unreachable(target),
                }
                Err(lost(loss, &connection.peer.addr, is_write, allowed).into())
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one attempt, used in one place")]
    fn read(
        self: &Arc<Self>,
        to: To,
        target: Target,
        key: Key,
        operation: &Operation<'_>,
        connection: Arc<Connection>,
        frame: Frame,
        allowed: Duration,
    ) -> Result<Answer, Failure> {
        let opcode = operation.opcode();
        let is_write = opcode.is_write();
        let peer = connection.peer.addr.as_str();
        let reply = Reply::decode(&frame).map_err(|error| protocol_error(peer, is_write, &error.to_string()))?;
        // A frame that the node could not read is refused under opcode 0.
        let is_refusal = reply.opcode == 0 && Status::class_of_code(reply.meta.status) == Class::Rejected;
        if reply.opcode != opcode.code() && !is_refusal {
            return Err(protocol_error(peer, is_write, "the reply is to another operation").into());
        }
        let shard_epoch = {
            let routes = self.read_routes();
            let known = routes.epoch();
            let shard_epoch = routes.shard_epoch(reply.meta.shard);
            drop(routes);
            if reply.meta.map_epoch > known {
                self.refresh_soon(Reason::Epoch(reply.meta.map_epoch), Some(key));
            }
            shard_epoch
        };
        let found = match Status::class_of_code(reply.meta.status) {
            Class::Ok => true,
            Class::Answer if reply.meta.status() == Some(Status::NotFound) => false,
            _ => return Err(self.refused(to, target, key, &connection, &reply, is_write, allowed)),
        };
        if let To::Shard(_) = to {
            self.observe(reply.meta.shard, shard_epoch, reply.meta.index);
        }
        let meta = Meta {
            version: reply.meta.version,
            index: reply.meta.index,
            shard: reply.meta.shard,
            shard_epoch,
            node: connection.peer.node,
            map_epoch: reply.meta.map_epoch,
            server_time_ms: reply.meta.server_time_ms,
            consistency_code: reply.meta.consistency,
            age_ms: reply.options.age_ms,
        };
        let body_at = frame.payload.len() - reply.body.len();
        let expires_at_ms = reply.options.expires_at_ms;
        Ok(Answer {
            frame,
            body_at,
            connection,
            is_write,
            meta,
            found,
            expires_at_ms,
        })
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one attempt, used in one place")]
    fn refused(
        self: &Arc<Self>,
        to: To,
        target: Target,
        key: Key,
        connection: &Arc<Connection>,
        reply: &Reply<'_>,
        is_write: bool,
        allowed: Duration,
    ) -> Failure {
        let error = Refusal {
            status: reply.meta.status,
            shard: match to {
                To::Shard(shard) => shard,
                To::Node(_) | To::Any => reply.meta.shard,
            },
            version: reply.meta.version,
            peer: &connection.peer.addr,
            message: reply.options.message.unwrap_or_default(),
            retry_after: reply
                .options
                .retry_after_ms
                .map(|ms| Duration::from_millis(u64::from(ms))),
            age: reply.options.age_ms.map(|ms| Duration::from_millis(u64::from(ms))),
            is_write,
            timeout: allowed,
        }
        .error();
        let mut redirected = false;
        match (reply.meta.status(), to) {
            (Some(Status::Moved), To::Shard(shard)) => {
                redirected = self.moved(shard, target.node, reply);
            }
            (Some(Status::ShuttingDown), _) => {
                self.pool.retire(key, connection);
                self.unreachable(target);
            }
            _ => {}
        }
        Failure { error, redirected }
    }

    /// A redirect: take it if it is news, else look for someone who knows better.
    pub(crate) fn moved(self: &Arc<Self>, shard: u16, asked: u64, reply: &Reply<'_>) -> bool {
        let mut routes = self.write_routes();
        let is_news = reply.options.moved.is_some_and(|moved| routes.learn(shard, &moved));
        if !is_news {
            routes.suspect(shard, asked);
        }
        // Somebody else was asked than the leader known by now.
        let redirected = is_news || routes.leader(shard).is_some_and(|leader| leader.node != asked);
        drop(routes);
        if !redirected {
            self.refresh_soon(Reason::Leader, None);
        }
        redirected
    }

    /// The error of an attempt to connect, or, when that was not the first, what has come of all of them.
    fn in_short(&self, target: Target, error: Error) -> Error {
        match error {
            Error::NotSent(NotSent::Connect(cause)) if cause.is_transient() => {
                let down = self.health.of(target.node).down(&target.addr.to_string());
                down.map_or(NotSent::Connect(cause).into(), Error::from)
            }
            other => other,
        }
    }

    /// A node did not answer a request: ask another, and whether the map has changed.
    pub(crate) fn silent(self: &Arc<Self>, to: To, target: Target) {
        if let To::Shard(shard) = to
            && self.write_routes().suspect(shard, target.node)
        {
            self.refresh_soon(Reason::Leader, None);
        }
    }

    /// A node cannot be reached: ask others about everything it leads, so that not every shard has to find out by itself.
    pub(crate) fn unreachable(self: &Arc<Self>, target: Target) {
        self.write_routes().suspect_node(target.node);
        self.refresh_soon(Reason::Leader, None);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pool.close();
    }
}

/// The error for a request without a reply.
pub(crate) fn lost(loss: Loss, peer: &str, is_write: bool, allowed: Duration) -> Error {
    match loss {
        Loss::Lost(reason) if is_write => InDoubt::ConnectionLost {
            peer: peer.to_owned(),
            reason: reason.as_ref().into(),
        }
        .into(),
        Loss::Lost(reason) | Loss::NotExecuted(reason) => NotSent::ConnectionLost {
            peer: peer.to_owned(),
            reason: reason.as_ref().into(),
        }
        .into(),
        Loss::TimedOut { queued: true } if is_write => InDoubt::Timeout { after: allowed }.into(),
        Loss::TimedOut { .. } => NotSent::Timeout { after: allowed }.into(),
    }
}

/// Whether an attempt failed because its node did not answer.
pub(super) const fn is_silence(error: &Error) -> bool {
    matches!(
        error,
        Error::NotSent(NotSent::Timeout { .. } | NotSent::Connect(_) | NotSent::ConnectionLost { .. })
    )
}

/// The error of a request whose last attempt failed with `last`. That nobody leads is what a client sees whose network does not reach the
/// leader: then that is the error.
pub(super) fn explained(last: Error, unreachable: Option<Error>) -> Error {
    match (last, unreachable) {
        (Error::NotSent(NotSent::NoLeader { .. }), Some(unreachable)) => unreachable,
        (last, _) => last,
    }
}

/// The error for a reply that makes no sense: what became of a write is then unknown.
pub(crate) fn protocol_error(peer: &str, is_write: bool, reason: &str) -> Error {
    let (peer, reason) = (peer.to_owned(), reason.to_owned());
    if is_write {
        InDoubt::Unknown { peer, message: reason }.into()
    } else {
        NotSent::Protocol { peer, reason }.into()
    }
}

fn check_value(operation: &Operation<'_>, connection: &Connection) -> Result<(), Error> {
    if let Operation::Put { value, .. } = operation {
        let limit = connection.peer.limits.max_value_len;
        if value.len() > limit {
            return Err(Rejected::ValueTooLarge {
                len: value.len(),
                limit,
            }
            .into());
        }
    }
    Ok(())
}

/// Refuses keys that no node takes, before they are encoded.
pub(crate) fn check_key(key: &[u8]) -> Result<(), Error> {
    let limit = generation_proto::limits::MAX_KEY_LEN;
    match key.len() {
        0 => Err(Rejected::EmptyKey.into()),
        len if len > limit => Err(Rejected::KeyTooLarge { len, limit }.into()),
        _ => Ok(()),
    }
}

/// About how many bytes a request takes that is not a list.
pub(super) fn request_len(operation: &Operation<'_>) -> usize {
    const FIXED: usize = 64;
    FIXED
        + match operation {
            Operation::Put { key, value } => key.len() + value.len(),
            other => other.key().map_or(0, <[u8]>::len),
        }
}

/// `SplitMix64` (G. Steele, D. Lea, C. Flood: Fast splittable pseudorandom number generators, 2014): for jitter, not for secrets.
fn next_random(state: &AtomicU64) -> u64 {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = state.fetch_add(GAMMA, Ordering::Relaxed).wrapping_add(GAMMA);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
