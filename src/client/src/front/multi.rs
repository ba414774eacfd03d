//! Requests about several keys: scattered by the core that owns them, gathered in the order given.
//!
//! Keys are grouped by (node, core), cut into batches, and sent together. What a node did not take is tried again in a next
//! round, as single requests are; what is in doubt is not. Each key has its own result.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream;
use generation_proto::limits::{FRAME_OVERHEAD, MAX_BATCH};
use generation_proto::reply::MultiResult;
use generation_proto::request::{self, ItemList, KeyList};
use generation_proto::{Class, Condition, Opcode, Operation, RequestOptions, Status};
use tokio::time::{Instant, sleep};
use tracing::Instrument;

use super::client::Client;
use super::dispatch::{Answer, Inner, To, check_key, is_silence, keep};
use super::once::{Sessions, Unfinished};
use super::ops::{Sending, common_options, read_options, ttl_ms};
use crate::core::choice::{Turn, falls_back};
use crate::core::consistency::Consistency;
use crate::core::error::{Error, NotSent, Refusal, Rejected};
use crate::core::reply::{Entry, GetReply, Meta, WriteReply};
use crate::core::retry::Attempts;
use crate::core::routing::Target;
use crate::core::session::SessionToken;

/// Most keys of a batch. Larger ones gain nothing and make others wait behind them.
const BATCH_KEYS: usize = 4096;
/// Most keys of a batch of reads: what comes back is of unknown size and has to fit a frame.
const BATCH_READS: usize = 1024;
/// Most bytes of a batch, unless a single item is larger.
const BATCH_BYTES: usize = 48 << 10;
/// Most keys of a batch in a session: several have room in its window at a time.
const BATCH_NUMBERS: usize = 256;
/// Batches of one request under way at a time.
const BATCHES_AT_ONCE: usize = 32;

const _: () = assert!(BATCH_KEYS <= MAX_BATCH, "a batch is one request");

/// One item of a [`Client::multi_put`]: a pair of key and value, or an [`Item`].
pub trait PutItem {
    /// The key.
    fn key(&self) -> &[u8];
    /// The value.
    fn value(&self) -> &[u8];
    /// Time until the entry expires; `None`: it does not.
    fn ttl(&self) -> Option<Duration> {
        None
    }
}

impl<K: AsRef<[u8]>, V: AsRef<[u8]>> PutItem for (K, V) {
    fn key(&self) -> &[u8] {
        self.0.as_ref()
    }

    fn value(&self) -> &[u8] {
        self.1.as_ref()
    }
}

/// A reference to an item is one too.
impl<T: PutItem> PutItem for &T {
    fn key(&self) -> &[u8] {
        (*self).key()
    }

    fn value(&self) -> &[u8] {
        (*self).value()
    }

    fn ttl(&self) -> Option<Duration> {
        (*self).ttl()
    }
}

/// A key and a value, with a time to live if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<K = Bytes, V = Bytes> {
    /// The key.
    pub key: K,
    /// The value.
    pub value: V,
    /// Time until the entry expires, in whole milliseconds and at least one; `None`: it does not.
    pub ttl: Option<Duration>,
}

impl<K, V> Item<K, V> {
    /// An item that does not expire.
    pub const fn new(key: K, value: V) -> Self {
        Self { key, value, ttl: None }
    }

    /// Time until the entry expires.
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        Self { ttl: Some(ttl), ..self }
    }
}

impl<K: AsRef<[u8]>, V: AsRef<[u8]>> PutItem for Item<K, V> {
    fn key(&self) -> &[u8] {
        self.key.as_ref()
    }

    fn value(&self) -> &[u8] {
        self.value.as_ref()
    }

    fn ttl(&self) -> Option<Duration> {
        self.ttl
    }
}

/// A read of several entries; see [`Client::multi_get`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct MultiGet<'c, K> {
    client: &'c Client,
    keys: Vec<K>,
    consistency: Option<Consistency>,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> MultiGet<'c, K> {
    pub(super) const fn new(client: &'c Client, keys: Vec<K>) -> Self {
        Self {
            client,
            keys,
            consistency: None,
            timeout: None,
        }
    }

    common_options!();
    read_options!();

    pub(super) const fn len(&self) -> usize {
        self.keys.len()
    }

    /// Sends it; a result per key, in the order given.
    pub async fn send(self) -> Vec<Result<GetReply, Error>>
    where
        K: Sync,
    {
        let inner = &self.client.inner;
        let consistency = self.consistency.as_ref().unwrap_or(&inner.settings.consistency);
        let keys = Keys(&self.keys);
        let scatter = Scatter::new(
            inner,
            Opcode::MultiGet,
            &keys,
            Condition::None,
            Some(consistency),
            self.timeout,
        );
        let results = scatter.run().await;
        results.into_iter().map(|result| result.map(PerKey::into_get)).collect()
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for MultiGet<'c, K> {
    type Output = Vec<Result<GetReply, Error>>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A write of several entries; see [`Client::multi_put`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct MultiPut<'c, T> {
    client: &'c Client,
    items: Vec<T>,
    condition: Condition,
    timeout: Option<Duration>,
}

impl<'c, T: PutItem> MultiPut<'c, T> {
    pub(super) const fn new(client: &'c Client, items: Vec<T>) -> Self {
        Self {
            client,
            items,
            condition: Condition::None,
            timeout: None,
        }
    }

    common_options!();

    /// Writes only the items whose keys are absent; the others fail with [`Rejected::ConditionFailed`].
    pub const fn if_absent(mut self) -> Self {
        self.condition = Condition::IfAbsent;
        self
    }

    pub(super) const fn len(&self) -> usize {
        self.items.len()
    }

    /// Sends it; a result per item, in the order given.
    pub async fn send(self) -> Vec<Result<WriteReply, Error>>
    where
        T: Sync,
    {
        let items = Items(&self.items);
        let inner = &self.client.inner;
        let scatter = Scatter::new(inner, Opcode::MultiPut, &items, self.condition, None, self.timeout);
        let results = scatter.write(self.client.sessions.as_deref()).await;
        results
            .into_iter()
            .map(|result| result.map(PerKey::into_write))
            .collect()
    }
}

impl<'c, T: PutItem + Send + Sync + 'c> IntoFuture for MultiPut<'c, T> {
    type Output = Vec<Result<WriteReply, Error>>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A removal of several entries; see [`Client::multi_delete`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct MultiDelete<'c, K> {
    client: &'c Client,
    keys: Vec<K>,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> MultiDelete<'c, K> {
    pub(super) const fn new(client: &'c Client, keys: Vec<K>) -> Self {
        Self {
            client,
            keys,
            timeout: None,
        }
    }

    common_options!();

    pub(super) const fn len(&self) -> usize {
        self.keys.len()
    }

    /// Sends it; a result per key, in the order given. [`WriteReply::found`] says whether there was an entry.
    pub async fn send(self) -> Vec<Result<WriteReply, Error>>
    where
        K: Sync,
    {
        let keys = Keys(&self.keys);
        let inner = &self.client.inner;
        let scatter = Scatter::new(inner, Opcode::MultiDelete, &keys, Condition::None, None, self.timeout);
        let results = scatter.write(self.client.sessions.as_deref()).await;
        results
            .into_iter()
            .map(|result| result.map(PerKey::into_write))
            .collect()
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for MultiDelete<'c, K> {
    type Output = Vec<Result<WriteReply, Error>>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// What a scatter is about, by position.
trait Source: Sync {
    fn len(&self) -> usize;
    fn item(&self, n: usize) -> request::Item<'_>;
}

struct Keys<'k, K>(&'k [K]);

impl<K: AsRef<[u8]> + Sync> Source for Keys<'_, K> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn item(&self, n: usize) -> request::Item<'_> {
        request::Item {
            key: self.0[n].as_ref(),
            value: &[],
            ttl_ms: None,
        }
    }
}

struct Items<'k, T>(&'k [T]);

impl<T: PutItem + Sync> Source for Items<'_, T> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn item(&self, n: usize) -> request::Item<'_> {
        let item = &self.0[n];
        request::Item {
            key: item.key(),
            value: item.value(),
            ttl_ms: item.ttl().map(ttl_ms),
        }
    }
}

/// One key's result.
struct PerKey {
    found: bool,
    value: Bytes,
    expires_at_ms: Option<u64>,
    meta: Meta,
}

impl PerKey {
    fn into_get(self) -> GetReply {
        GetReply {
            entry: self.found.then_some(Entry {
                value: self.value,
                version: self.meta.version,
                expires_at_ms: self.expires_at_ms,
            }),
            meta: self.meta,
        }
    }

    fn into_write(self) -> WriteReply {
        WriteReply {
            found: self.found,
            counter: 0,
            expires_at_ms: self.expires_at_ms,
            meta: self.meta,
        }
    }
}

/// A batch: keys of shards that one core owns.
struct Batch {
    target: Target,
    /// The shard of the first key; with a consistency that differs by shard, of all of them.
    shard: u16,
    /// Positions in the source.
    members: Vec<usize>,
    bytes: usize,
}

/// Whether a write has to be sent again in its session to learn what becomes of it.
fn is_unfinished(error: &Error) -> bool {
    match error {
        Error::NotSent(_) | Error::InDoubt(_) => true,
        Error::Rejected(rejected) => *rejected == Rejected::SessionExpired,
    }
}

struct Scatter<'s> {
    inner: &'s Arc<Inner>,
    opcode: Opcode,
    source: &'s dyn Source,
    condition: Condition,
    consistency: Option<&'s Consistency>,
    allowed: Duration,
    start: Instant,
}

type Outcome = Result<PerKey, Error>;

impl<'s> Scatter<'s> {
    fn new(
        inner: &'s Arc<Inner>,
        opcode: Opcode,
        source: &'s dyn Source,
        condition: Condition,
        consistency: Option<&'s Consistency>,
        timeout: Option<Duration>,
    ) -> Self {
        Self {
            inner,
            opcode,
            source,
            condition,
            consistency,
            allowed: timeout.unwrap_or(inner.settings.timeout),
            start: Instant::now(),
        }
    }

    async fn run(self) -> Vec<Outcome> {
        let span = tracing::debug_span!("multi", operation = ?self.opcode, keys = self.source.len());
        self.rounds().instrument(span).await
    }

    async fn write(self, sessions: Option<&Sessions>) -> Vec<Outcome> {
        let Some(sessions) = sessions else {
            return self.run().await;
        };
        let span = tracing::debug_span!("multi", operation = ?self.opcode, keys = self.source.len());
        Box::pin(self.once(sessions)).instrument(span).await
    }

    /// Executes each write once: batches of one shard, each sent whole under its numbers until all of it is answered.
    async fn once(&self, sessions: &Sessions) -> Vec<Outcome> {
        let mut results: Vec<Option<Outcome>> = (0..self.source.len()).map(|_| None).collect();
        let batches = self.shard_batches(&mut results);
        let sent = batches
            .into_iter()
            .map(|(shard, members)| self.batch_once(sessions, shard, members));
        let mut gathered = stream::iter(sent).buffer_unordered(BATCHES_AT_ONCE);
        while let Some(outcomes) = gathered.next().await {
            for (n, outcome) in outcomes {
                results[n] = Some(outcome);
            }
        }
        results
            .into_iter()
            .map(|result| result.expect("invariant: a key is refused, or in a batch that was sent"))
            .collect()
    }

    /// Cuts the source into batches of one shard; refuses what no node takes.
    fn shard_batches(&self, results: &mut [Option<Outcome>]) -> Vec<(u16, Vec<usize>)> {
        let (limits, longest_frame) = self.inner.pool.limits();
        let most_bytes = BATCH_BYTES.min(longest_frame.saturating_sub(FRAME_OVERHEAD));
        let routes = self.inner.read_routes();
        let mut batches: Vec<(u16, Vec<usize>)> = Vec::new();
        // The batch of a shard that is being filled, and its bytes.
        let mut open: HashMap<u16, (usize, usize)> = HashMap::new();
        for (n, result) in results.iter_mut().enumerate() {
            let item = self.source.item(n);
            let (len, limit) = (item.value.len(), limits.max_value_len);
            let too_large = (len > limit).then(|| Error::from(Rejected::ValueTooLarge { len, limit }));
            if let Some(error) = check_key(item.key).err().or(too_large) {
                *result = Some(Err(error));
                continue;
            }
            let shard = routes.shard_of(item.key);
            let bytes = item.key.len() + item.value.len() + ItemList::ITEM_OVERHEAD;
            let (place, filled) = open.entry(shard).or_insert((usize::MAX, 0));
            let fits = batches
                .get(*place)
                .is_some_and(|(_, members)| members.len() < BATCH_NUMBERS && *filled + bytes <= most_bytes);
            if !fits {
                (*place, *filled) = (batches.len(), 0);
                batches.push((shard, Vec::new()));
            }
            batches[*place].1.push(n);
            *filled += bytes;
        }
        batches
    }

    /// A batch of one shard: each member's outcome.
    async fn batch_once(&self, sessions: &Sessions, shard: u16, members: Vec<usize>) -> Vec<(usize, Outcome)> {
        let outcomes = self.outcomes_once(sessions, shard, &members).await;
        members.into_iter().zip(outcomes).collect()
    }

    async fn outcomes_once(&self, sessions: &Sessions, shard: u16, members: &[usize]) -> Vec<Outcome> {
        let options = RequestOptions {
            condition: self.condition,
            ..RequestOptions::default()
        };
        let mut buffer = BytesMut::new();
        let operation = self.operation(members, &mut buffer);
        let len = match operation {
            Operation::MultiPut(items) => items.len_bytes(),
            Operation::MultiDelete(keys) => keys.len_bytes(),
            _ => 0,
        };
        let outcomes = |answer: &Answer| self.outcomes(members.len(), answer);
        let unfinished = |answer: &Answer| match outcomes(answer) {
            Ok(outcomes) => {
                let some_done = !outcomes
                    .iter()
                    .all(|outcome| outcome.as_ref().is_err_and(is_unfinished));
                let error = outcomes.into_iter().filter_map(Result::err).find(is_unfinished);
                error.map(|error| Unfinished { error, some_done })
            }
            Err(error) => Some(Unfinished {
                error,
                some_done: false,
            }),
        };
        let count = members.len() as u64;
        let left = self.allowed.saturating_sub(self.start.elapsed());
        let call = self
            .inner
            .call_once(sessions, shard, count, operation, len, options, left, unfinished);
        let failed = match call.await {
            Ok(answer) => match outcomes(&answer) {
                Ok(outcomes) => return outcomes,
                Err(error) => error.into(),
            },
            Err(unanswered) => unanswered,
        };
        let error = || Err(failed.error.clone());
        match failed.partial.as_ref().map(outcomes) {
            // What was answered for good in an earlier attempt stays so.
            Some(Ok(outcomes)) => outcomes
                .into_iter()
                .map(|outcome| match outcome {
                    Err(unfinished) if is_unfinished(&unfinished) => error(),
                    outcome => outcome,
                })
                .collect(),
            _ => members.iter().map(|_| error()).collect(),
        }
    }

    fn operation<'b>(&self, members: &[usize], buffer: &'b mut BytesMut) -> Operation<'b> {
        let items = members.iter().map(|&n| self.source.item(n));
        match self.opcode {
            Opcode::MultiPut => Operation::MultiPut(ItemList::build(items, buffer)),
            Opcode::MultiGet => Operation::MultiGet(KeyList::build(items.map(|item| item.key), buffer)),
            _ => Operation::MultiDelete(KeyList::build(items.map(|item| item.key), buffer)),
        }
    }

    async fn rounds(&self) -> Vec<Outcome> {
        let mut results: Vec<Option<Outcome>> = (0..self.source.len()).map(|_| None).collect();
        let mut left: Vec<usize> = Vec::with_capacity(results.len());
        for (n, result) in results.iter_mut().enumerate() {
            match check_key(self.source.item(n).key) {
                Ok(()) => left.push(n),
                Err(error) => *result = Some(Err(error)),
            }
        }
        let mut attempts = Attempts::new(self.allowed, false);
        if self.is_read() {
            attempts = attempts.of_read();
        }
        // Who did not answer in the last round.
        let mut silent = None;
        self.inner.budget.deposit();
        for round in 0.. {
            let batches = self.batches(&left, round, silent.take(), &mut results);
            left.clear();
            let mut delay = None;
            // Encoding and sending is driven from here; up to so many batches are on their way at a time.
            let mut gathered =
                stream::iter(batches.into_iter().map(|batch| self.send(batch))).buffer_unordered(BATCHES_AT_ONCE);
            while let Some((batch, outcome, full)) = gathered.next().await {
                if outcome
                    .first()
                    .is_some_and(|outcome| outcome.as_ref().is_err_and(is_silence))
                {
                    silent = Some(batch.target.node);
                }
                // What did not fit a full reply is asked for again at once.
                let mut wait = full.then_some(Some(Duration::ZERO));
                for (n, result) in batch.members.iter().copied().zip(outcome) {
                    // One decision for a batch: its keys fail together, and together they cost one retry.
                    if let Err(error) = &result
                        && matches!(error, Error::NotSent(_))
                        && let Some(again) = *wait.get_or_insert_with(|| self.again(&mut attempts, round, error))
                    {
                        delay = delay.max(Some(again));
                        left.push(n);
                    }
                    results[n] = Some(result);
                }
            }
            match delay {
                Some(delay) if !left.is_empty() => {
                    self.inner.counters.note_attempt(delay);
                    sleep(delay).await;
                }
                _ => break,
            }
        }
        results
            .into_iter()
            .map(|result| result.expect("invariant: a key is refused, or in a batch that was sent"))
            .collect()
    }

    fn is_read(&self) -> bool {
        self.opcode == Opcode::MultiGet
    }

    fn is_any_replicas(&self) -> bool {
        self.consistency.is_some_and(Consistency::is_any_replicas)
    }

    fn again(&self, attempts: &mut Attempts, round: u32, error: &Error) -> Option<Duration> {
        let inner = self.inner;
        let fell_back = self.is_any_replicas() && Turn::of_attempt(round) == Turn::Replica && falls_back(error);
        attempts.after(
            error,
            fell_back,
            self.start.elapsed(),
            &inner.settings.retry,
            &inner.budget,
            inner.random(),
        )
    }

    /// Groups `left` by whom it goes to and cuts the groups into batches.
    fn batches(&self, left: &[usize], round: u32, silent: Option<u64>, results: &mut [Option<Outcome>]) -> Vec<Batch> {
        let per_shard = self.consistency.is_some_and(Consistency::is_per_shard);
        let most = if self.is_read() { BATCH_READS } else { BATCH_KEYS };
        let (limits, longest_frame) = self.inner.pool.limits();
        let most_bytes = BATCH_BYTES.min(longest_frame.saturating_sub(FRAME_OVERHEAD));
        let routes = self.inner.read_routes();
        let mut targets: Vec<Option<Result<Target, Error>>> = Vec::new();
        targets.resize_with(usize::from(routes.shards()), || None);
        // The batch that is being filled, by who gets it.
        let mut open: HashMap<(Target, Option<u16>), usize> = HashMap::new();
        let mut batches: Vec<Batch> = Vec::new();
        for &n in left {
            let item = self.source.item(n);
            let (len, limit) = (item.value.len(), limits.max_value_len);
            if len > limit {
                results[n] = Some(Err(Rejected::ValueTooLarge { len, limit }.into()));
                continue;
            }
            let shard = routes.shard_of(item.key);
            let known = &mut targets[usize::from(shard)];
            let known = known.get_or_insert_with(|| {
                let leader = || {
                    let nobody = || NotSent::NoLeader { shard }.into();
                    routes.target(shard, round).ok_or_else(nobody)
                };
                if self.is_any_replicas() {
                    self.inner.replica(&routes, shard, round, silent)
                } else if self.is_read() && silent.is_some() {
                    self.inner.replica(&routes, shard, 0, silent).or_else(|_| leader())
                } else {
                    leader()
                }
            });
            let target = match known {
                Ok(target) => *target,
                Err(error) => {
                    results[n] = Some(Err(error.clone()));
                    continue;
                }
            };
            let bytes = item.key.len() + item.value.len() + ItemList::ITEM_OVERHEAD;
            let place = open.entry((target, per_shard.then_some(shard))).or_insert(usize::MAX);
            let fits = batches
                .get(*place)
                .is_some_and(|batch| batch.members.len() < most && batch.bytes + bytes <= most_bytes);
            if !fits {
                *place = batches.len();
                batches.push(Batch {
                    target,
                    shard,
                    members: Vec::new(),
                    bytes: 0,
                });
            }
            let batch = &mut batches[*place];
            batch.members.push(n);
            batch.bytes += bytes;
        }
        batches
    }

    /// Sends a batch; its results, and whether there were fewer than it asked for because the reply was full.
    async fn send(&self, batch: Batch) -> (Batch, Vec<Outcome>, bool) {
        match self.exchange(&batch).await {
            Ok((outcome, full)) => (batch, outcome, full),
            Err(error) => {
                let outcome = batch.members.iter().map(|_| Err(error.clone())).collect();
                (batch, outcome, false)
            }
        }
    }

    async fn exchange(&self, batch: &Batch) -> Result<(Vec<Outcome>, bool), Error> {
        let mut options = RequestOptions {
            condition: self.condition,
            ..RequestOptions::default()
        };
        if let Some(consistency) = self.consistency {
            options.consistency = consistency.on_wire(batch.shard, self.inner.seen(batch.shard));
        }
        let mut buffer = BytesMut::with_capacity(batch.bytes);
        let operation = self.operation(&batch.members, &mut buffer);
        let deadline = self.start + self.allowed;
        let until = self.inner.until(&operation, Instant::now(), deadline);
        let to = To::Shard(batch.shard);
        let attempt = self.inner.attempt(
            to,
            batch.target,
            operation,
            batch.bytes,
            options,
            (deadline, until),
            self.allowed,
        );
        match attempt.await {
            Ok(answer) => {
                let outcome = self.results(batch, &answer)?;
                // A node answers `Busy` for the values that would make the frame too long.
                Ok((outcome, answer.body().len() >= answer.max_frame_len() / 2))
            }
            Err(failure) => Err(failure.error),
        }
    }

    /// Takes the answer apart: one result a key, in order.
    fn results(&self, batch: &Batch, answer: &Answer) -> Result<Vec<Outcome>, Error> {
        let outcomes = self.outcomes(batch.members.len(), answer)?;
        let mut last = None;
        for outcome in &outcomes {
            // A batch is of several shards, and each has a leader of its own.
            if let Err(Error::NotSent(NotSent::NoLeader { shard })) = outcome
                && last.replace(*shard) != Some(*shard)
            {
                self.inner.silent(To::Shard(*shard), batch.target);
            }
        }
        Ok(outcomes)
    }

    fn outcomes(&self, count: usize, answer: &Answer) -> Result<Vec<Outcome>, Error> {
        let body = answer.body();
        let mut outcomes = Vec::with_capacity(count);
        for result in MultiResult::decode_all(&body) {
            let result = result.map_err(|error| answer.malformed(&error))?;
            outcomes.push(self.result(&body, &result, answer));
        }
        if outcomes.len() != count {
            let error = generation_proto::reply::ReplyError("number of results");
            return Err(answer.malformed(&error));
        }
        Ok(outcomes)
    }

    fn result(&self, body: &Bytes, result: &MultiResult<'_>, answer: &Answer) -> Outcome {
        let found = match Status::class_of_code(result.status) {
            Class::Ok => true,
            Class::Answer if result.status == Status::NotFound.code() => false,
            _ => return Err(self.refused(result, answer)),
        };
        let shard_epoch = self.inner.read_routes().shard_epoch(result.shard);
        self.inner.observe(result.shard, shard_epoch, result.index);
        Ok(PerKey {
            found,
            value: if result.value.is_empty() {
                Bytes::new()
            } else {
                keep(&body.slice_ref(result.value))
            },
            expires_at_ms: Some(result.expires_at_ms).filter(|&expires_at_ms| expires_at_ms != 0),
            meta: Meta {
                version: result.version,
                index: result.index,
                shard: result.shard,
                shard_epoch,
                consistency_code: result.consistency,
                ..answer.meta
            },
        })
    }

    fn refused(&self, result: &MultiResult<'_>, answer: &Answer) -> Error {
        Refusal {
            status: result.status,
            shard: result.shard,
            version: result.version,
            peer: answer.peer(),
            message: "",
            retry_after: None,
            age: None,
            is_write: self.opcode.is_write(),
            timeout: self.allowed,
        }
        .error()
    }
}
