//! The client as callers hold it: how it is built, and one method for each operation.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use generation_proto::cluster::Verb;
use generation_proto::reply::Stat;
use generation_proto::{Map, Operation, RequestOptions};

use super::config::{ClientConfig, Credential};
use super::dispatch::{Inner, Settings, To};
use super::multi::{MultiDelete, MultiGet, MultiPut, PutItem};
use super::once::Sessions;
use super::ops::{Delete, Get, Incr, Put, Touch};
use super::scan::Scan;
use super::seeds::{Resolve, Resolver};
use super::tls::Identity;
use crate::core::consistency::Consistency;
use crate::core::error::{ConnectError, Error, NotSent};
use crate::core::hedge::HedgePolicy;
use crate::core::metrics::Metrics;
use crate::core::reply::NodeStats;
use crate::core::retry::RetryPolicy;
use crate::core::session::SessionToken;

/// Time allowed for a request unless set otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time allowed for a connection attempt unless set otherwise.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time between two looks at the map without a reason, unless set otherwise.
const DEFAULT_REFRESH_INTERVAL: Duration = Duration::from_mins(1);
/// Shortest such time.
const SHORTEST_REFRESH_INTERVAL: Duration = Duration::from_millis(10);

/// A client of one cluster.
///
/// It is cheap to clone, and clones share connections: make one for a program and use it from all tasks. Requests made at the
/// same time travel together. It must be used inside a tokio runtime. Dropping the last clone closes the connections.
#[derive(Clone)]
pub struct Client {
    pub(super) inner: Arc<Inner>,
    /// Where its writes are numbered, if each is to be executed exactly once.
    pub(super) sessions: Option<Arc<Sessions>>,
}

impl Client {
    /// Starts the configuration of a client.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// The same client, but each of its writes is executed exactly once, however often it has to be sent: an `incr` whose reply was lost
    /// counts once.
    ///
    /// Its writes are numbered in a session that is opened in each shard when it is first written to, which costs a write of its own. A
    /// write that may have been executed is sent again under the same number, within its time, and the shard answers it as the first
    /// time. [`Error::InDoubt`] is left for writes whose time is over, or whose session has expired meanwhile: that takes ten idle
    /// minutes, or [`Client::close`], which ends the sessions. Connections and routes are shared with the client this is made of; make one
    /// of these for a program, and clone it.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// let client = client.exactly_once();
    /// assert_eq!(client.incr("visits", 1).await?.counter, 1);
    /// client.close().await;
    /// # Ok(())
    /// # });
    /// ```
    #[must_use]
    pub fn exactly_once(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            sessions: Some(Arc::default()),
        }
    }

    /// Reads an entry.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// assert!(!client.get("k").await?.is_found());
    /// client.put("k", "v").await?;
    /// let read = client.get("k").linearizable().await?;
    /// assert_eq!(read.value().unwrap(), "v");
    /// println!("version {}, shard {}, node {}", read.version(), read.meta.shard, read.meta.node);
    /// # Ok(())
    /// # });
    /// ```
    pub fn get<K: AsRef<[u8]>>(&self, key: K) -> Get<'_, K> {
        Get::new(self, key)
    }

    /// Writes an entry. Without [`Put::ttl`] it does not expire, whatever it had before.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// use generation_client::{Error, Rejected};
    ///
    /// let written = client.put("lock", "mine").if_absent().await?;
    /// match client.put("lock", "yours").if_absent().await {
    ///     Err(Error::Rejected(Rejected::ConditionFailed { current })) => assert_eq!(current, written.version()),
    ///     other => panic!("{other:?}"),
    /// }
    /// # Ok(())
    /// # });
    /// ```
    pub fn put<K: AsRef<[u8]>, V: AsRef<[u8]>>(&self, key: K, value: V) -> Put<'_, K, V> {
        Put::new(self, key, value)
    }

    /// Removes an entry.
    pub fn delete<K: AsRef<[u8]>>(&self, key: K) -> Delete<'_, K> {
        Delete::new(self, key)
    }

    /// Adds `delta` to an ASCII decimal number; an absent key counts as 0, and the time to live stays as it is.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// assert_eq!(client.incr("visits", 1).await?.counter, 1);
    /// assert_eq!(client.incr("visits", 41).await?.counter, 42);
    /// # Ok(())
    /// # });
    /// ```
    pub fn incr<K: AsRef<[u8]>>(&self, key: K, delta: i64) -> Incr<'_, K> {
        Incr::new(self, key, delta)
    }

    /// Sets the time to live of an entry ([`Touch::ttl`]), or removes it.
    pub fn touch<K: AsRef<[u8]>>(&self, key: K) -> Touch<'_, K> {
        Touch::new(self, key)
    }

    /// Reads several entries: a result per key, in the order given.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// client.put("b", "2").await?;
    /// let keys = ["a", "b"];
    /// for (key, result) in keys.iter().zip(client.multi_get(keys).await) {
    ///     println!("{key}: {:?}", result?.into_value());
    /// }
    /// # Ok(())
    /// # });
    /// ```
    pub fn multi_get<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> MultiGet<'_, K> {
        MultiGet::new(self, keys.into_iter().collect())
    }

    /// Writes several entries: a result per item, in the order given, and no atomicity across them. An item is a pair of key
    /// and value, or an [`crate::Item`] with a time to live.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// use std::time::Duration;
    /// use generation_client::Item;
    ///
    /// for result in client.multi_put([("a", "1"), ("b", "2")]).await {
    ///     result?;
    /// }
    /// let minute = Duration::from_secs(60);
    /// client.multi_put([Item::new("c", "3").ttl(minute), Item::new("d", "4")]).await;
    /// # Ok(())
    /// # });
    /// ```
    pub fn multi_put<T: PutItem>(&self, items: impl IntoIterator<Item = T>) -> MultiPut<'_, T> {
        MultiPut::new(self, items.into_iter().collect())
    }

    /// Removes several entries: a result per key, in the order given, and no atomicity across them.
    pub fn multi_delete<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> MultiDelete<'_, K> {
        MultiDelete::new(self, keys.into_iter().collect())
    }

    /// Lists keys, of the whole cluster or of one shard.
    pub fn keys(&self) -> Scan {
        Scan::keys(self.clone())
    }

    /// Lists keys and values, of the whole cluster or of one shard.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// use futures_util::TryStreamExt;
    ///
    /// client.multi_put([("user:1", "Ada"), ("user:2", "Bob"), ("job:1", "x")]).await;
    /// let mut users = client.entries().prefix("user:").stream();
    /// let mut count = 0;
    /// while let Some(entry) = users.try_next().await? {
    ///     println!("{:?} = {:?}", entry.key, entry.value);
    ///     count += 1;
    /// }
    /// assert_eq!(count, 2);
    /// # Ok(())
    /// # });
    /// ```
    pub fn entries(&self) -> Scan {
        Scan::entries(self.clone())
    }

    /// The cluster's map, asked of a node now. The client routes by it from here on.
    pub async fn map(&self) -> Result<Map, Error> {
        self.inner.refresh(None).await?;
        Ok(self.inner.current_map())
    }

    /// The cluster's map as the client knows it, without asking.
    pub fn known_map(&self) -> Map {
        self.inner.current_map()
    }

    /// What this client has done so far and what it thinks of each node, without asking anybody; [`Client::stats`] is what the nodes tell.
    ///
    /// ```
    /// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
    /// # fake::example(async |client| {
    /// client.get("k").await?;
    /// let metrics = client.metrics();
    /// for node in &metrics.nodes {
    ///     println!("node {}: {} requests, reads take {:?}, {}", node.node, node.requests, node.latency, node.breaker.name());
    /// }
    /// assert_eq!((metrics.retries, metrics.hedges), (0, 0));
    /// # Ok(())
    /// # });
    /// ```
    pub fn metrics(&self) -> Metrics {
        self.inner.metrics()
    }

    /// Counters of every node, one result a node, in the order of the map.
    pub async fn stats(&self) -> Vec<(u64, Result<NodeStats, Error>)> {
        let nodes: Vec<u64> = self.inner.current_map().nodes.iter().map(|node| node.id).collect();
        let asked = nodes.iter().map(|&node| self.stats_of(node));
        let answers = futures_util::future::join_all(asked).await;
        nodes.into_iter().zip(answers).collect()
    }

    /// Counters of one node.
    pub async fn stats_of(&self, node: u64) -> Result<NodeStats, Error> {
        let answer = self
            .inner
            .call(To::Node(node), Operation::Stats, RequestOptions::default(), None, None)
            .await?;
        let body = answer.body();
        let stats: Result<Vec<_>, _> = Stat::decode_all(&body)
            .map(|stat| stat.map(|stat| (stat.name.to_owned(), stat.value)))
            .collect();
        Ok(NodeStats {
            node,
            addr: answer.peer().to_owned(),
            stats: stats.map_err(|error| answer.malformed(&error))?,
        })
    }

    /// Has one node write a snapshot of its replica of a shard, or wait for the one it is writing; the last log entry in it, once it is
    /// durable. That can take long: `timeout` is the time allowed. It takes the certificate of an administrator.
    pub async fn take_snapshot(&self, node: u64, shard: u16, timeout: Duration) -> Result<u64, Error> {
        let take = Operation::TakeSnapshot { shard };
        let options = RequestOptions::default();
        let answer = self
            .inner
            .call(To::Node(node), take, options, None, Some(timeout))
            .await?;
        Ok(answer.meta.index)
    }

    /// Asks a node, or any, about its cluster, or for a change of it ([`generation_proto::cluster`]); the body of the reply. Every change
    /// may be asked for again. It takes the certificate of an administrator.
    pub async fn ask_cluster(&self, node: Option<u64>, verb: Verb, body: &[u8]) -> Result<Bytes, Error> {
        let operation = Operation::Cluster { verb, body };
        let answer = self
            .inner
            .call(
                node.map_or(To::Any, To::Node),
                operation,
                RequestOptions::default(),
                None,
                None,
            )
            .await?;
        Ok(answer.body())
    }

    /// Asks any node for a sign of life; the time it took.
    pub async fn ping(&self) -> Result<Duration, Error> {
        self.ping_to(To::Any).await
    }

    /// Asks one node for a sign of life; the time it took.
    pub async fn ping_node(&self, node: u64) -> Result<Duration, Error> {
        self.ping_to(To::Node(node)).await
    }

    async fn ping_to(&self, to: To) -> Result<Duration, Error> {
        let start = tokio::time::Instant::now();
        let ping = Operation::Ping { payload: b"generation" };
        let answer = self.inner.call(to, ping, RequestOptions::default(), None, None).await?;
        if answer.body() != b"generation"[..] {
            return Err(NotSent::Protocol {
                peer: answer.peer().to_owned(),
                reason: "the echo of a ping differs from what was sent".to_owned(),
            }
            .into());
        }
        Ok(start.elapsed())
    }

    /// What this client has seen so far, of all shards: another client that reads with it sees at least that.
    pub fn session_token(&self) -> SessionToken {
        self.inner.session_token()
    }

    /// The room that unanswered requests take on all open connections, in units of 4 KiB and at least one a request. Each
    /// connection has 8,192; where they are taken, requests wait in the client.
    pub fn in_flight(&self) -> usize {
        self.inner.permits_taken()
    }

    /// Retries that are left in the budget; near 0, the cluster fails more requests than it serves.
    pub fn retries_left(&self) -> u32 {
        self.inner.retries_left()
    }

    /// Closes the connections and waits until the nodes have been told. Requests under way fail.
    pub async fn close(&self) {
        if let Some(sessions) = &self.sessions {
            sessions.close(&self.inner).await;
        }
        self.inner.close().await;
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("cluster", &self.inner.cluster())
            .finish_non_exhaustive()
    }
}

/// Configuration of a [`Client`]: who the cluster is, who the client is, and how patient.
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    seeds: Vec<String>,
    resolver: Resolver,
    refresh_interval: Option<Duration>,
    cluster: String,
    ca: Option<Credential>,
    certificate: Option<Credential>,
    key: Option<Credential>,
    name: Option<String>,
    timeout: Option<Duration>,
    connect_timeout: Option<Duration>,
    retry: RetryPolicy,
    hedge: Option<HedgePolicy>,
    consistency: Consistency,
}

impl Default for ClientBuilder {
    fn default() -> Self {
        Self {
            seeds: Vec::new(),
            resolver: Resolver::default(),
            refresh_interval: None,
            cluster: String::new(),
            ca: None,
            certificate: None,
            key: None,
            name: None,
            timeout: None,
            connect_timeout: None,
            retry: RetryPolicy::default(),
            hedge: Some(HedgePolicy::default()),
            consistency: Consistency::default(),
        }
    }
}

impl ClientBuilder {
    /// Takes cluster, seeds and credentials from a configuration file's contents.
    #[must_use]
    pub fn config(mut self, config: ClientConfig) -> Self {
        self.cluster = config.cluster;
        self.seeds = config.seeds;
        self.ca = Some(config.ca.into());
        self.certificate = Some(config.certificate.into());
        self.key = Some(config.key.into());
        self
    }

    /// Adds a node to start from, as `HOST:PORT`. One that answers is enough; the others are found through it. A name may have several
    /// addresses, of one node or of many.
    #[must_use]
    pub fn seed(mut self, seed: impl Into<String>) -> Self {
        self.seeds.push(seed.into());
        self
    }

    /// Sets the nodes to start from.
    #[must_use]
    pub fn seeds<S: Into<String>>(mut self, seeds: impl IntoIterator<Item = S>) -> Self {
        self.seeds = seeds.into_iter().map(Into::into).collect();
        self
    }

    /// Who finds the addresses of seeds; the system's resolver unless set. It is asked when the client connects, whenever no node of the
    /// map answers, and every [`ClientBuilder::refresh_interval`].
    #[must_use]
    pub fn resolver(mut self, resolve: impl Resolve + 'static) -> Self {
        self.resolver = Resolver::new(resolve);
        self
    }

    /// How often the map is fetched and seeds are looked for without a reason; about every minute unless set, every 10 ms at most.
    #[must_use]
    pub const fn refresh_interval(mut self, interval: Duration) -> Self {
        self.refresh_interval = Some(interval);
        self
    }

    /// Name of the cluster. Nodes of another are refused.
    #[must_use]
    pub fn cluster(mut self, cluster: impl Into<String>) -> Self {
        self.cluster = cluster.into();
        self
    }

    /// Certificate of the authority that signed the nodes' certificates.
    #[must_use]
    pub fn ca(mut self, ca: impl Into<Credential>) -> Self {
        self.ca = Some(ca.into());
        self
    }

    /// This client's certificate, with its chain if it has one.
    #[must_use]
    pub fn certificate(mut self, certificate: impl Into<Credential>) -> Self {
        self.certificate = Some(certificate.into());
        self
    }

    /// The private key of this client's certificate.
    #[must_use]
    pub fn key(mut self, key: impl Into<Credential>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// What the client calls itself in the nodes' logs; at most 255 bytes count.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Time allowed for a request with all its retries; 5 s unless set. Each request can have its own.
    #[must_use]
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Time allowed for one attempt to connect to a node; 3 s unless set.
    #[must_use]
    pub const fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// How failed attempts are made again.
    #[must_use]
    pub const fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Whether a `get` that is slow to be answered is asked of a second replica too, and when. Unless set, `session` and `stale` reads are,
    /// after as long as 95 of 100 of them take: any replica may answer those, and a second one costs a lookup. Linearizable ones are not
    /// ([`HedgePolicy::linearizable`]). Each hedge is paid from the budget of [`ClientBuilder::retry`].
    #[must_use]
    pub const fn hedge(mut self, policy: Option<HedgePolicy>) -> Self {
        self.hedge = policy;
        self
    }

    /// How fresh reads must be where they do not say so themselves; linearizable unless set.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// Connects to a seed and fetches the map. Connections to the other nodes are opened when they are needed.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        if self.cluster.is_empty() {
            return Err(ConnectError::Config(
                "the cluster's name is missing (`cluster`)".to_owned(),
            ));
        }
        if self.seeds.is_empty() {
            return Err(ConnectError::Config(
                "no seeds: name at least one node as HOST:PORT (`seeds`)".to_owned(),
            ));
        }
        let Some(ca) = &self.ca else {
            return Err(ConnectError::Config(
                "the authority's certificate is missing (`ca`)".to_owned(),
            ));
        };
        let identity = Identity::load(&self.cluster, ca, self.certificate.as_ref(), self.key.as_ref())?;
        let mut name = self
            .name
            .unwrap_or_else(|| concat!("generation-client/", env!("CARGO_PKG_VERSION")).to_owned());
        name.truncate(name.floor_char_boundary(generation_proto::limits::MAX_NAME_LEN));
        let settings = Settings {
            cluster: self.cluster,
            seeds: self.seeds,
            resolver: self.resolver,
            refresh_interval: self
                .refresh_interval
                .unwrap_or(DEFAULT_REFRESH_INTERVAL)
                .max(SHORTEST_REFRESH_INTERVAL),
            name,
            timeout: self.timeout.unwrap_or(DEFAULT_TIMEOUT),
            connect_timeout: self.connect_timeout.unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            retry: self.retry,
            hedge: self.hedge,
            consistency: self.consistency,
        };
        let inner = Inner::connect(identity, settings).await?;
        Ok(Client { inner, sessions: None })
    }
}
