//! The seeds: names of nodes to start from, their addresses, and the map from whichever answers first.
//!
//! Names are resolved when the client starts, each time no node of the map answers, and every now and then. All addresses of a name
//! are tried. A resolver that fails does not take away the addresses it gave before.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use generation_proto::Map;
use tokio::time::{Instant, sleep, timeout};

use super::maps::{STAGGER, fetch_map};
use super::pool::{Key, Pool};
use crate::core::error::{ConnectError, Error, NotSent};

/// Finds the addresses of a seed. The client's own asks the system's resolver; another can ask whatever knows where the nodes are.
///
/// ```
/// use generation_client::{Client, Resolve, Resolving};
///
/// struct Fixed;
///
/// impl Resolve for Fixed {
///     fn resolve<'r>(&'r self, seed: &'r str) -> Resolving<'r> {
///         Box::pin(async move {
///             match seed {
///                 "cache" => Ok(vec![([10, 0, 0, 1], 7400).into(), ([10, 0, 0, 2], 7400).into()]),
///                 other => Err(std::io::Error::other(format!("nobody is called {other}"))),
///             }
///         })
///     }
/// }
///
/// let builder = Client::builder().seed("cache").resolver(Fixed);
/// ```
pub trait Resolve: Send + Sync {
    /// The addresses of `seed`, which is as it was configured. They are tried in this order, a moment apart.
    fn resolve<'r>(&'r self, seed: &'r str) -> Resolving<'r>;
}

/// Addresses to come.
pub type Resolving<'r> = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'r>>;

/// Asks the system about `HOST:PORT`.
struct System;

impl Resolve for System {
    fn resolve<'r>(&'r self, seed: &'r str) -> Resolving<'r> {
        Box::pin(async move { Ok(tokio::net::lookup_host(seed).await?.collect()) })
    }
}

/// Whoever is asked for addresses.
#[derive(Clone)]
pub(super) struct Resolver(Arc<dyn Resolve>);

impl Resolver {
    pub(super) fn new(resolve: impl Resolve + 'static) -> Self {
        Self(Arc::new(resolve))
    }
}

impl Default for Resolver {
    fn default() -> Self {
        Self::new(System)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

/// The seeds of one client.
pub(super) struct Seeds {
    all: Vec<Seed>,
    resolver: Resolver,
    /// Time for a resolver's answer, and for an address's.
    wait: Duration,
}

struct Seed {
    name: String,
    /// The addresses it had when it was last resolved.
    known: Mutex<Vec<SocketAddr>>,
}

impl Seeds {
    pub(super) fn new(names: Vec<String>, resolver: Resolver, wait: Duration) -> Self {
        let seed = |name| Seed {
            name,
            known: Mutex::default(),
        };
        Self {
            all: names.into_iter().map(seed).collect(),
            resolver,
            wait,
        }
    }

    /// The map from whichever seed answers first, and what is wrong with each where none does.
    pub(super) async fn map(&self, pool: &Arc<Pool>) -> Result<Map, ConnectError> {
        let mut attempts: FuturesUnordered<_> = self
            .all
            .iter()
            .enumerate()
            .map(|(n, seed)| async move {
                sleep(STAGGER * n as u32).await;
                self.map_from(pool, seed).await
            })
            .collect();
        let mut errors = Vec::new();
        while let Some(result) = attempts.next().await {
            match result {
                Ok(map) => return Ok(map),
                Err(error) => errors.push(error),
            }
        }
        match errors.len() {
            1 => Err(errors.remove(0)),
            _ => Err(ConnectError::NoSeed(errors)),
        }
    }

    /// Looks where the seeds are now, for when they are needed and the resolver does not answer.
    pub(super) async fn resolve(&self) {
        // `locate` notes what it finds.
        let located = join_all(self.all.iter().map(|seed| self.locate(seed))).await;
        for error in located.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "a seed is not found");
        }
    }

    async fn map_from(&self, pool: &Arc<Pool>, seed: &Seed) -> Result<Map, ConnectError> {
        let addresses = self.locate(seed).await?;
        let mut asked: FuturesUnordered<_> = addresses
            .into_iter()
            .enumerate()
            .map(|(n, addr)| async move {
                sleep(STAGGER * n as u32).await;
                let key = Key { addr, core: 0 };
                let map = async {
                    let connection = pool.get(key, None, Instant::now() + self.wait).await?;
                    fetch_map(&connection, self.wait).await
                };
                map.await.map_err(|error| not_usable(addr, error))
            })
            .collect();
        let mut errors = Vec::new();
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(map) => return Ok(map),
                Err(error) => errors.push(error),
            }
        }
        match errors.len() {
            1 => Err(errors.remove(0)),
            _ => Err(ConnectError::NoAddress {
                seed: seed.name.clone(),
                errors,
            }),
        }
    }

    /// Where the seed is now, or, when that cannot be found out, where it was.
    async fn locate(&self, seed: &Seed) -> Result<Vec<SocketAddr>, ConnectError> {
        let reason = match timeout(self.wait, self.resolver.0.resolve(&seed.name)).await {
            Ok(Ok(mut addresses)) if !addresses.is_empty() => {
                let mut known = HashSet::new();
                addresses.retain(|addr| known.insert(*addr));
                seed.known().clone_from(&addresses);
                return Ok(addresses);
            }
            Ok(Ok(_)) => "it has none".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the resolver does not answer".to_owned(),
        };
        let known = seed.known().clone();
        if known.is_empty() {
            return Err(ConnectError::Resolve {
                seed: seed.name.clone(),
                reason,
            });
        }
        tracing::debug!(seed = seed.name, reason, "not resolved: the addresses it had are used");
        Ok(known)
    }
}

impl Seed {
    fn known(&self) -> std::sync::MutexGuard<'_, Vec<SocketAddr>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no map from an address.
fn not_usable(addr: SocketAddr, error: Error) -> ConnectError {
    match error {
        Error::NotSent(NotSent::Connect(error)) => *error,
        other => ConnectError::Handshake {
            peer: addr.to_string(),
            reason: other.to_string(),
        },
    }
}
