//! Fetching the map from whichever node answers first: when there is a reason, and every now and then.
//!
//! When to fetch is the core's decision ([`crate::core::refresh`]). A map that turns out to be older than the one the client has is
//! passed over ([`crate::core::routing::Routes::install`]), so it does not matter who answers.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::{BoxFuture, select_ok};
use futures_util::stream::FuturesUnordered;
use futures_util::{StreamExt, TryFutureExt};
use generation_proto::{Map, Operation, Reply, Request, RequestOptions, Status};
use tokio::time::{Instant, sleep, timeout};

use super::connection::Connection;
use super::dispatch::{Inner, lost, protocol_error};
use super::pool::Key;
use crate::core::error::{Error, NotSent};
use crate::core::refresh::Reason;
use crate::core::retry::jittered;
use crate::core::routing::Installed;

/// Between the attempts at two nodes, so that the first is used when it is well, and one that keeps silent holds up nobody for long.
pub(super) const STAGGER: Duration = Duration::from_millis(150);
/// Nodes of the map that are asked.
const NODES_ASKED: usize = 8;
/// Time after which the seeds are asked too.
const HEAD_START: Duration = Duration::from_millis(1500);

impl Inner {
    /// Has the map fetched in the background, unless somebody does already. `from`: who is known to have a newer one.
    pub(crate) fn refresh_soon(self: &Arc<Self>, reason: Reason, from: Option<Key>) {
        let known = self.read_routes().epoch();
        let begun = self.refresh_state().wanted(reason, known, self.now());
        let Some(mut pause) = begun else { return };
        let inner = self.clone();
        tokio::spawn(async move {
            loop {
                if !pause.is_zero() {
                    sleep(pause).await;
                }
                if let Err(error) = inner.refresh(from).await {
                    tracing::debug!(%error, "the map could not be refreshed");
                }
                let known = inner.read_routes().epoch();
                let again = inner.refresh_state().finished(known, inner.now());
                match again {
                    Some(wait) => pause = wait,
                    None => break,
                }
            }
        });
    }

    fn refresh_state(&self) -> std::sync::MutexGuard<'_, crate::core::refresh::Refresh> {
        self.refresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches the map: from `from` if that is given, from nodes that are connected, from others of the map, and from the seeds when those
    /// have nothing to say.
    pub(crate) async fn refresh(self: &Arc<Self>, from: Option<Key>) -> Result<(), Error> {
        let mut nodes = Box::pin(self.map_from_nodes(from));
        let seeds = || async { self.seeds.map(&self.pool).await.map_err(Error::from) };
        let map = match timeout(HEAD_START, nodes.as_mut()).await {
            Ok(Ok(map)) => map,
            Ok(Err(None)) => seeds().await?,
            Ok(Err(Some(error))) => seeds().await.map_err(|_| error)?,
            Err(_) => {
                let nodes: BoxFuture<'_, _> = nodes;
                let answer = select_ok([nodes, Box::pin(seeds().map_err(Some))]).await;
                answer
                    .map_err(|error| error.expect("invariant: who took so long had somebody to ask"))?
                    .0
            }
        };
        self.install(map)
    }

    /// The map from the node of the known one that answers first; the last error, if there was anybody to ask.
    async fn map_from_nodes(self: &Arc<Self>, from: Option<Key>) -> Result<Map, Option<Error>> {
        let wait = self.settings.connect_timeout;
        let mut asked: FuturesUnordered<_> = self
            .order(from)
            .into_iter()
            .enumerate()
            .map(|(n, (key, node))| async move {
                sleep(STAGGER * n as u32).await;
                let connection = self.pool.get(key, node, Instant::now() + wait).await?;
                fetch_map(&connection, wait).await
            })
            .collect();
        let mut last = None;
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(map) => return Ok(map),
                Err(error) => last = Some(error),
            }
        }
        Err(last)
    }

    /// Whom to ask for the map, in this order.
    fn order(&self, from: Option<Key>) -> Vec<(Key, Option<u64>)> {
        let mut nodes: Vec<(Key, Option<u64>)> = {
            let routes = self.read_routes();
            let place = |addr| Key { addr, core: 0 };
            let nodes = routes.map().nodes.iter();
            nodes.map(|node| (place(node.addr), Some(node.id))).collect()
        };
        if !nodes.is_empty() {
            let first = self.random() as usize % nodes.len();
            nodes.rotate_left(first);
        }
        let id_at = |key: Key| nodes.iter().find(|(at, _)| at.addr == key.addr).and_then(|at| at.1);
        let mut connected = self.pool.open_keys();
        if !connected.is_empty() {
            let first = self.random() as usize % connected.len();
            connected.rotate_left(first);
        }
        let connected = connected.into_iter().map(|key| (key, id_at(key)));
        let mut order: Vec<(Key, Option<u64>)> = Vec::new();
        let first = from.map(|key| (key, id_at(key)));
        for candidate in first.into_iter().chain(connected).chain(nodes.iter().copied()) {
            if order.iter().all(|(have, _)| have.addr != candidate.0.addr) {
                order.push(candidate);
            }
        }
        // Those who do not answer come last, in the order they have.
        order.sort_by_key(|(_, node)| node.is_some_and(|node| self.health.of(node).is_down()));
        order.truncate(NODES_ASKED);
        order
    }

    fn install(&self, map: Map) -> Result<(), Error> {
        let epoch = map.epoch;
        let mut routes = self.write_routes();
        let installed = routes.install(map).map_err(|error| NotSent::Protocol {
            peer: self.settings.cluster.clone(),
            reason: error.to_string(),
        })?;
        let shards = usize::from(routes.shards());
        let nodes: Vec<(u64, SocketAddr)> = routes.map().nodes.iter().map(|node| (node.id, node.addr)).collect();
        self.is_replicated.store(routes.is_replicated(), Ordering::Relaxed);
        drop(routes);
        tracing::debug!(epoch, ?installed, "map");
        if installed == Installed::Older {
            return Ok(());
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < shards {
            seen.resize(shards, (0, 0));
        }
        drop(seen);
        if !nodes.is_empty() {
            self.pool.prune(|addr| nodes.iter().any(|node| node.1 == addr));
            self.health.retain(|id| nodes.iter().any(|node| node.0 == id));
        }
        Ok(())
    }
}

/// Fetches the map and looks where the seeds are every `interval` for as long as the client is there, so that one which has had nothing to
/// do for a while still finds a cluster that has moved.
pub(super) async fn keep_up(inner: Weak<Inner>, interval: Duration) {
    while let Some(random) = inner.upgrade().map(|inner| inner.random()) {
        // So that clients which were started together do not go on asking together.
        sleep(jittered(interval, random)).await;
        let Some(inner) = inner.upgrade() else { break };
        inner.seeds.resolve().await;
        if let Err(error) = inner.refresh(None).await {
            tracing::debug!(%error, "no node has a map to give");
        }
    }
}

/// The map as a node has it.
pub(super) async fn fetch_map(connection: &Arc<Connection>, wait: Duration) -> Result<Map, Error> {
    let peer = connection.peer.addr.as_str();
    let request = |id, out: &mut _| {
        Request {
            id,
            options: RequestOptions::default(),
            operation: Operation::Map,
        }
        .encode(out);
    };
    let frame = connection
        .request(64, Instant::now() + wait, request)
        .await
        .map_err(|loss| lost(loss, peer, false, wait))?;
    let reply = Reply::decode(&frame).map_err(|error| protocol_error(peer, false, &error.to_string()))?;
    if reply.meta.status() != Some(Status::Ok) {
        return Err(NotSent::Other {
            peer: peer.to_owned(),
            code: reply.meta.status,
            message: reply.options.message.unwrap_or("no map").to_owned(),
        }
        .into());
    }
    Map::decode(reply.body).map_err(|error| protocol_error(peer, false, &error.to_string()))
}
