//! Requests about one key: each is a value that gathers options and runs when it is awaited.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::time::Duration;

use generation_proto::{Condition, Operation, RequestOptions};

use super::client::Client;
use super::dispatch::{Answer, To, check_key, request_len};
use crate::core::consistency::Consistency;
use crate::core::error::{Error, Rejected};
use crate::core::reply::{Entry, GetReply, WriteReply};
use crate::core::session::SessionToken;

/// What awaiting a request gives: a boxed future. `send` on the same value saves the box.
pub(super) type Sending<'c, T> = Pin<Box<dyn Future<Output = T> + Send + 'c>>;

/// Options every request has.
macro_rules! common_options {
    () => {
        /// Time allowed for this request with all its retries.
        pub const fn timeout(mut self, timeout: Duration) -> Self {
            self.timeout = Some(timeout);
            self
        }
    };
}

/// Options every read has.
macro_rules! read_options {
    () => {
        /// How fresh the read must be.
        pub fn consistency(mut self, consistency: Consistency) -> Self {
            self.consistency = Some(consistency);
            self
        }

        /// The read sees every write acknowledged before it, whoever made it. The default, unless the client has another.
        pub fn linearizable(self) -> Self {
            self.consistency(Consistency::Linearizable)
        }

        /// The read sees at least what `token` has seen.
        pub fn session(self, token: SessionToken) -> Self {
            self.consistency(Consistency::Session(token))
        }

        /// The read sees at least what this client has seen.
        pub fn read_your_writes(self) -> Self {
            self.consistency(Consistency::ReadYourWrites)
        }

        /// The read may see a state up to `max_age` old, from any replica.
        pub fn stale(self, max_age: Duration) -> Self {
            self.consistency(Consistency::Stale(max_age))
        }
    };
}

pub(super) use {common_options, read_options};

/// A time to live as the wire has it: whole milliseconds, at least one.
pub(super) fn ttl_ms(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// A read of one entry; see [`Client::get`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct Get<'c, K> {
    client: &'c Client,
    key: K,
    consistency: Option<Consistency>,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> Get<'c, K> {
    pub(super) const fn new(client: &'c Client, key: K) -> Self {
        Self {
            client,
            key,
            consistency: None,
            timeout: None,
        }
    }

    common_options!();
    read_options!();

    /// Sends it.
    pub async fn send(self) -> Result<GetReply, Error> {
        let inner = &self.client.inner;
        let key = self.key.as_ref();
        check_key(key)?;
        let to = To::Shard(inner.shard_of(key));
        let consistency = self.consistency.as_ref().unwrap_or(&inner.settings.consistency);
        let answer = inner
            .call(
                to,
                Operation::Get { key },
                RequestOptions::default(),
                Some(consistency),
                self.timeout,
            )
            .await?;
        Ok(GetReply {
            entry: answer.found.then(|| Entry {
                value: answer.value(),
                version: answer.meta.version,
                expires_at_ms: answer.expires_at_ms,
            }),
            meta: answer.meta,
        })
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for Get<'c, K> {
    type Output = Result<GetReply, Error>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A write of one entry; see [`Client::put`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct Put<'c, K, V> {
    client: &'c Client,
    key: K,
    value: V,
    options: RequestOptions,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>, V: AsRef<[u8]>> Put<'c, K, V> {
    pub(super) fn new(client: &'c Client, key: K, value: V) -> Self {
        Self {
            client,
            key,
            value,
            options: RequestOptions::default(),
            timeout: None,
        }
    }

    common_options!();

    /// Time until the entry expires, in whole milliseconds and at least one, counted by the cluster from when it takes the write.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl_ms = Some(ttl_ms(ttl));
        self
    }

    /// Writes only if the key is absent; else [`Rejected::ConditionFailed`].
    pub const fn if_absent(mut self) -> Self {
        self.options.condition = Condition::IfAbsent;
        self
    }

    /// Writes only if the entry has this version (0: only if it is absent); else [`Rejected::ConditionFailed`].
    pub const fn if_version(mut self, version: u64) -> Self {
        self.options.condition = if_version(version);
        self
    }

    /// Sends it.
    pub async fn send(self) -> Result<WriteReply, Error> {
        let (key, value) = (self.key.as_ref(), self.value.as_ref());
        write(self.client, Operation::Put { key, value }, self.options, self.timeout).await
    }
}

impl<'c, K, V> IntoFuture for Put<'c, K, V>
where
    K: AsRef<[u8]> + Send + Sync + 'c,
    V: AsRef<[u8]> + Send + Sync + 'c,
{
    type Output = Result<WriteReply, Error>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A removal of one entry; see [`Client::delete`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct Delete<'c, K> {
    client: &'c Client,
    key: K,
    options: RequestOptions,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> Delete<'c, K> {
    pub(super) fn new(client: &'c Client, key: K) -> Self {
        Self {
            client,
            key,
            options: RequestOptions::default(),
            timeout: None,
        }
    }

    common_options!();

    /// Removes it only if it has this version; else [`Rejected::ConditionFailed`].
    pub const fn if_version(mut self, version: u64) -> Self {
        self.options.condition = Condition::IfVersion(version);
        self
    }

    /// Sends it. [`WriteReply::found`] says whether there was an entry.
    pub async fn send(self) -> Result<WriteReply, Error> {
        if self.options.condition == Condition::IfVersion(0) {
            let reason = "version 0 means absent, and what is absent cannot be deleted: give the version that was read";
            return Err(Rejected::InvalidArgument(reason.to_owned()).into());
        }
        let key = self.key.as_ref();
        write(self.client, Operation::Delete { key }, self.options, self.timeout).await
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for Delete<'c, K> {
    type Output = Result<WriteReply, Error>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// An addition to a number; see [`Client::incr`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct Incr<'c, K> {
    client: &'c Client,
    key: K,
    delta: i64,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> Incr<'c, K> {
    pub(super) const fn new(client: &'c Client, key: K, delta: i64) -> Self {
        Self {
            client,
            key,
            delta,
            timeout: None,
        }
    }

    common_options!();

    /// Sends it. [`WriteReply::counter`] is the number after it.
    pub async fn send(self) -> Result<WriteReply, Error> {
        let (key, delta) = (self.key.as_ref(), self.delta);
        let operation = Operation::Incr { key, delta };
        write(self.client, operation, RequestOptions::default(), self.timeout).await
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for Incr<'c, K> {
    type Output = Result<WriteReply, Error>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A change of an entry's time to live; see [`Client::touch`].
#[must_use = "a request is sent when it is awaited"]
#[derive(Debug)]
pub struct Touch<'c, K> {
    client: &'c Client,
    key: K,
    options: RequestOptions,
    timeout: Option<Duration>,
}

impl<'c, K: AsRef<[u8]>> Touch<'c, K> {
    pub(super) fn new(client: &'c Client, key: K) -> Self {
        Self {
            client,
            key,
            options: RequestOptions::default(),
            timeout: None,
        }
    }

    common_options!();

    /// Time until the entry expires, in whole milliseconds and at least one. Without it the entry will not expire.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl_ms = Some(ttl_ms(ttl));
        self
    }

    /// Sends it. [`WriteReply::found`] says whether there was an entry.
    pub async fn send(self) -> Result<WriteReply, Error> {
        let key = self.key.as_ref();
        write(self.client, Operation::Touch { key }, self.options, self.timeout).await
    }
}

impl<'c, K: AsRef<[u8]> + Send + Sync + 'c> IntoFuture for Touch<'c, K> {
    type Output = Result<WriteReply, Error>;
    type IntoFuture = Sending<'c, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

const fn if_version(version: u64) -> Condition {
    match version {
        0 => Condition::IfAbsent,
        version => Condition::IfVersion(version),
    }
}

async fn write(
    client: &Client,
    operation: Operation<'_>,
    options: RequestOptions,
    timeout: Option<Duration>,
) -> Result<WriteReply, Error> {
    let inner = &client.inner;
    let key = operation.key().expect("invariant: every write here is about one key");
    check_key(key)?;
    let to = To::Shard(inner.shard_of(key));
    let answer = match &client.sessions {
        None => inner.call(to, operation, options, None, timeout).await?,
        Some(sessions) => {
            let allowed = timeout.unwrap_or(inner.settings.timeout);
            let (shard, len) = (inner.shard_of(key), request_len(&operation));
            let call = inner.call_once(sessions, shard, 1, operation, len, options, allowed, |_| None);
            Box::pin(call).await.map_err(|unanswered| unanswered.error)?
        }
    };
    write_reply(&operation, &answer)
}

fn write_reply(operation: &Operation<'_>, answer: &Answer) -> Result<WriteReply, Error> {
    let counter = match operation {
        Operation::Incr { .. } => answer.counter()?,
        _ => 0,
    };
    Ok(WriteReply {
        found: answer.found,
        counter,
        expires_at_ms: answer.expires_at_ms,
        meta: answer.meta,
    })
}
