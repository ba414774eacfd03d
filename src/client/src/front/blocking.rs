//! The client for programs that are not asynchronous: the same operations, each of which returns when it is done.
//!
//! A thread of the client's own runs connections and timers for as long as there is a [`Client`]; callers wait on their own threads, as
//! many at a time as there are, and share connections as the tasks of an asynchronous program do.
//!
//! ```
//! # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mod.rs")); }
//! # fake::blocking_example(|builder| {
//! use std::time::Duration;
//!
//! // `builder` is as `Client::builder().config(ClientConfig::load(".generation/client.toml")?)` makes it.
//! let client = builder.connect_blocking()?;
//! client.put("user:1", "Ada").ttl(Duration::from_secs(60)).send()?;
//! let read = client.get("user:1").send()?;
//! assert_eq!(read.value().unwrap(), "Ada");
//! client.put("user:2", "Bob").if_absent().send()?;
//!
//! let names = client.multi_get(["user:1", "user:2", "user:3"]).send();
//! assert!(names[1].as_ref().unwrap().is_found() && !names[2].as_ref().unwrap().is_found());
//!
//! // From another thread, over the same connection.
//! let other = client.clone();
//! std::thread::spawn(move || other.incr("visits", 1).send()).join().unwrap()?;
//!
//! let mut users = client.keys().prefix("user:").iter();
//! assert_eq!(users.by_ref().filter_map(Result::ok).count(), 2);
//! client.close();
//! # Ok(())
//! # });
//! ```
//!
//! It refuses to be called inside an asynchronous runtime ([`ConnectError::InAsync`]), threads of `spawn_blocking` included: a task that
//! waits holds up its thread and every task on it. There [`crate::Client`] is the one to use.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures_util::StreamExt;
use generation_proto::Map;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::client::ClientBuilder;
use super::multi::{MultiDelete, MultiGet, MultiPut, PutItem};
use super::ops::{Delete, Get, Incr, Put, Touch};
use super::scan::{Cursor, ScanPage, ScanStream};
use crate::core::consistency::Consistency;
use crate::core::error::{ConnectError, Error};
use crate::core::metrics::Metrics;
use crate::core::reply::{GetReply, NodeStats, ScanEntry, WriteReply};
use crate::core::session::SessionToken;

/// How long the thread goes on after the last client is gone, so that nodes hear of it.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// The thread on which everything runs that nobody waits for.
#[derive(Debug)]
struct Background {
    handle: Handle,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

impl Background {
    fn start() -> Result<Arc<Self>, ConnectError> {
        let failed =
            |error: std::io::Error| ConnectError::Config(format!("the client's thread cannot be started: {error}"));
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::Builder::new()
            .name("generation-client".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    // An error, since nobody sends: the other side is gone.
                    let _ = stopped.await;
                    sleep(LAST_WORDS).await;
                });
                runtime.shutdown_background();
            })
            .map_err(failed)?;
        Ok(Arc::new(Self { handle, _stop: stop }))
    }

    /// Waits for `work` on this thread.
    fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, ConnectError> {
        outside_of_async()?;
        Ok(self.handle.block_on(work))
    }
}

/// A runtime panics when it is blocked on within another; this is the error instead.
fn outside_of_async() -> Result<(), ConnectError> {
    match Handle::try_current() {
        Ok(_) => Err(ConnectError::InAsync),
        Err(_) => Ok(()),
    }
}

impl ClientBuilder {
    /// Connects as [`ClientBuilder::connect`] does, for a program that is not asynchronous.
    ///
    /// # Errors
    /// What `connect` gives, and [`ConnectError::InAsync`] inside an asynchronous runtime.
    pub fn connect_blocking(self) -> Result<Client, ConnectError> {
        outside_of_async()?;
        let background = Background::start()?;
        let client = background.run(self.connect())??;
        Ok(Client { client, background })
    }
}

/// A client of one cluster that waits; see [`crate::blocking`].
///
/// It is cheap to clone, and clones share connections: make one for a program and use it from all threads.
#[derive(Debug, Clone)]
pub struct Client {
    // In this order: connections are closed while the thread is still there.
    client: crate::Client,
    background: Arc<Background>,
}

impl Client {
    /// Starts the configuration of a client; [`ClientBuilder::connect_blocking`] ends it.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// The same client, but each of its writes is executed exactly once; see [`crate::Client::exactly_once`].
    #[must_use]
    pub fn exactly_once(&self) -> Self {
        Self {
            client: self.client.exactly_once(),
            background: self.background.clone(),
        }
    }

    /// Reads an entry; see [`crate::Client::get`].
    pub fn get<K: AsRef<[u8]>>(&self, key: K) -> Request<'_, Get<'_, K>> {
        self.request(self.client.get(key))
    }

    /// Writes an entry; see [`crate::Client::put`].
    pub fn put<K: AsRef<[u8]>, V: AsRef<[u8]>>(&self, key: K, value: V) -> Request<'_, Put<'_, K, V>> {
        self.request(self.client.put(key, value))
    }

    /// Removes an entry; see [`crate::Client::delete`].
    pub fn delete<K: AsRef<[u8]>>(&self, key: K) -> Request<'_, Delete<'_, K>> {
        self.request(self.client.delete(key))
    }

    /// Adds to a number; see [`crate::Client::incr`].
    pub fn incr<K: AsRef<[u8]>>(&self, key: K, delta: i64) -> Request<'_, Incr<'_, K>> {
        self.request(self.client.incr(key, delta))
    }

    /// Sets or removes the time to live of an entry; see [`crate::Client::touch`].
    pub fn touch<K: AsRef<[u8]>>(&self, key: K) -> Request<'_, Touch<'_, K>> {
        self.request(self.client.touch(key))
    }

    /// Reads several entries; see [`crate::Client::multi_get`].
    pub fn multi_get<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> Request<'_, MultiGet<'_, K>> {
        self.request(self.client.multi_get(keys))
    }

    /// Writes several entries; see [`crate::Client::multi_put`].
    pub fn multi_put<T: PutItem>(&self, items: impl IntoIterator<Item = T>) -> Request<'_, MultiPut<'_, T>> {
        self.request(self.client.multi_put(items))
    }

    /// Removes several entries; see [`crate::Client::multi_delete`].
    pub fn multi_delete<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> Request<'_, MultiDelete<'_, K>> {
        self.request(self.client.multi_delete(keys))
    }

    /// Lists keys; see [`crate::Client::keys`].
    pub fn keys(&self) -> Scan {
        self.scan(self.client.keys())
    }

    /// Lists keys and values; see [`crate::Client::entries`].
    pub fn entries(&self) -> Scan {
        self.scan(self.client.entries())
    }

    /// The cluster's map, asked of a node now; see [`crate::Client::map`].
    pub fn map(&self) -> Result<Map, Error> {
        self.background.run(self.client.map())?
    }

    /// The cluster's map as the client knows it, without asking.
    pub fn known_map(&self) -> Map {
        self.client.known_map()
    }

    /// What this client has done so far and what it thinks of each node; see [`crate::Client::metrics`].
    pub fn metrics(&self) -> Metrics {
        self.client.metrics()
    }

    /// Counters of every node, one result a node; see [`crate::Client::stats`].
    pub fn stats(&self) -> Vec<(u64, Result<NodeStats, Error>)> {
        let nodes = |error: &ConnectError| {
            let map = self.client.known_map();
            let failed = map.nodes.iter().map(|node| (node.id, Err(error.clone().into())));
            failed.collect()
        };
        let stats = self.background.run(self.client.stats());
        stats.unwrap_or_else(|error| nodes(&error))
    }

    /// Counters of one node.
    pub fn stats_of(&self, node: u64) -> Result<NodeStats, Error> {
        self.background.run(self.client.stats_of(node))?
    }

    /// Has one node write a snapshot; see [`crate::Client::take_snapshot`].
    pub fn take_snapshot(&self, node: u64, shard: u16, timeout: Duration) -> Result<u64, Error> {
        self.background.run(self.client.take_snapshot(node, shard, timeout))?
    }

    /// Asks any node for a sign of life; the time it took.
    pub fn ping(&self) -> Result<Duration, Error> {
        self.background.run(self.client.ping())?
    }

    /// Asks one node for a sign of life; the time it took.
    pub fn ping_node(&self, node: u64) -> Result<Duration, Error> {
        self.background.run(self.client.ping_node(node))?
    }

    /// What this client has seen so far, of all shards; see [`crate::Client::session_token`].
    pub fn session_token(&self) -> SessionToken {
        self.client.session_token()
    }

    /// The room that unanswered requests take; see [`crate::Client::in_flight`].
    pub fn in_flight(&self) -> usize {
        self.client.in_flight()
    }

    /// Retries that are left in the budget; see [`crate::Client::retries_left`].
    pub fn retries_left(&self) -> u32 {
        self.client.retries_left()
    }

    /// Closes the connections and waits until the nodes have been told. Requests of other threads that are under way fail. Inside an
    /// asynchronous runtime it does nothing: there, dropping the last clone closes them.
    pub fn close(&self) {
        // Refused there, and there is nobody to tell.
        let _ = self.background.run(self.client.close());
    }

    fn request<R>(&self, request: R) -> Request<'_, R> {
        Request {
            background: &self.background,
            request,
        }
    }

    fn scan(&self, scan: crate::Scan) -> Scan {
        Scan {
            background: self.background.clone(),
            request: scan,
        }
    }
}

/// A request that gathers options and runs when it is sent. The options are those of the asynchronous one that it is made of.
#[must_use = "a request is sent by `send`"]
#[derive(Debug)]
pub struct Request<'c, R> {
    background: &'c Background,
    request: R,
}

/// Options that are those of the asynchronous request.
macro_rules! options {
    ($of:ident: $($name:ident($($argument:ident: $kind:ty),*);)+) => {
        $(
            #[doc = concat!("As [`crate::", stringify!($of), "::", stringify!($name), "`].")]
            pub fn $name(self, $($argument: $kind),*) -> Self {
                Self {
                    request: self.request.$name($($argument),*),
                    ..self
                }
            }
        )+
    };
}

/// Options that every read has.
macro_rules! read_options {
    ($of:ident) => {
        options! { $of:
            timeout(timeout: Duration);
            consistency(consistency: Consistency);
            linearizable();
            session(token: SessionToken);
            read_your_writes();
            stale(max_age: Duration);
        }
    };
}

/// What a request on one key does when it is sent.
macro_rules! send {
    ($reply:ty) => {
        /// Sends it and waits for the reply.
        pub fn send(self) -> Result<$reply, Error> {
            self.background.run(self.request.send())?
        }
    };
}

/// What a request on several keys does when it is sent.
macro_rules! send_all {
    ($reply:ty) => {
        /// Sends it and waits; a result per key, in the order given.
        pub fn send(self) -> Vec<Result<$reply, Error>> {
            let count = self.request.len();
            match self.background.run(self.request.send()) {
                Ok(results) => results,
                Err(error) => (0..count).map(|_| Err(error.clone().into())).collect(),
            }
        }
    };
}

impl<K: AsRef<[u8]>> Request<'_, Get<'_, K>> {
    read_options!(Get);
    send!(GetReply);
}

impl<K: AsRef<[u8]>, V: AsRef<[u8]>> Request<'_, Put<'_, K, V>> {
    options! { Put:
        timeout(timeout: Duration);
        ttl(ttl: Duration);
        if_absent();
        if_version(version: u64);
    }
    send!(WriteReply);
}

impl<K: AsRef<[u8]>> Request<'_, Delete<'_, K>> {
    options! { Delete:
        timeout(timeout: Duration);
        if_version(version: u64);
    }
    send!(WriteReply);
}

impl<K: AsRef<[u8]>> Request<'_, Incr<'_, K>> {
    options! { Incr:
        timeout(timeout: Duration);
    }
    send!(WriteReply);
}

impl<K: AsRef<[u8]>> Request<'_, Touch<'_, K>> {
    options! { Touch:
        timeout(timeout: Duration);
        ttl(ttl: Duration);
    }
    send!(WriteReply);
}

impl<K: AsRef<[u8]> + Sync> Request<'_, MultiGet<'_, K>> {
    read_options!(MultiGet);
    send_all!(GetReply);
}

impl<T: PutItem + Sync> Request<'_, MultiPut<'_, T>> {
    options! { MultiPut:
        timeout(timeout: Duration);
        if_absent();
    }
    send_all!(WriteReply);
}

impl<K: AsRef<[u8]> + Sync> Request<'_, MultiDelete<'_, K>> {
    options! { MultiDelete:
        timeout(timeout: Duration);
    }
    send_all!(WriteReply);
}

/// A listing of keys or entries; see [`crate::Scan`].
#[must_use = "a scan does nothing until pages are asked for"]
#[derive(Debug, Clone)]
pub struct Scan {
    background: Arc<Background>,
    request: crate::Scan,
}

impl Scan {
    read_options!(Scan);
    options! { Scan:
        prefix(prefix: impl AsRef<[u8]>);
        shard(shard: u16);
        resume(cursor: Cursor);
        page_size(entries: u32);
    }

    /// The page at `cursor`; see [`crate::Scan::page`].
    pub fn page(&self, cursor: Cursor) -> Result<ScanPage, Error> {
        self.background.run(self.request.page(cursor))?
    }

    /// Where the scan begins.
    pub fn first(&self) -> Cursor {
        self.request.first()
    }

    /// The entries one by one.
    pub fn iter(self) -> ScanIter {
        ScanIter {
            stream: self.request.stream(),
            background: self.background,
        }
    }
}

/// The entries of a scan one by one; see [`Scan::iter`]. After an error it is over.
#[derive(Debug)]
pub struct ScanIter {
    stream: ScanStream,
    background: Arc<Background>,
}

impl ScanIter {
    /// Where a scan has to go on to miss nothing that was not yet taken from this one; `None`: nothing is left.
    pub const fn cursor(&self) -> Option<Cursor> {
        self.stream.cursor()
    }
}

impl Iterator for ScanIter {
    type Item = Result<ScanEntry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.background.run(self.stream.next()) {
            Ok(entry) => entry,
            Err(error) => Some(Err(error.into())),
        }
    }
}
