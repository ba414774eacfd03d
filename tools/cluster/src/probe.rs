//! One write to each shard every few milliseconds, in an open loop: how long each shard had no service, what failed, and whether anything
//! that was acknowledged is missing afterwards.
//!
//! Every write has a key of its own, so what was acknowledged can be looked for, one key after the other. A shard's time without service
//! is the time between two acknowledgements that follow each other, whatever was written when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use generation_client::{Client, ClientConfig};
use serde::Serialize;
use tokio::time::MissedTickBehavior;

use crate::LoadError;
use crate::script::Probe;

/// How long connecting may take at least: nodes share few processors here.
const CONNECT: Duration = Duration::from_secs(3);
/// Keys looked for at a time.
const BATCH: usize = 256;
/// How long looking for one batch may take.
const SEARCH: Duration = Duration::from_secs(30);
/// Names tried for keys of every shard.
const NAMES: u32 = 1_000_000;
/// Shorter times between acknowledgements are no loss of service, in multiples of the probes' interval.
const NOTICED_INTERVALS: u32 = 5;

/// A time in which a shard acknowledged nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Outage {
    /// When the last acknowledgement before it came, in seconds of the load.
    pub(crate) from_s: f64,
    /// How long until the next, in milliseconds.
    pub(crate) lasted_ms: f64,
}

/// What became of a shard's probes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ShardProbes {
    /// The shard.
    pub(crate) shard: u16,
    /// Writes that were sent.
    pub(crate) sent: u64,
    /// Writes that were acknowledged.
    pub(crate) acknowledged: u64,
    /// Times without service, in their order.
    pub(crate) outages: Vec<Outage>,
    /// Failures by kind.
    pub(crate) failures: BTreeMap<String, u64>,
    /// What the acknowledged keys begin with, and their numbers.
    #[serde(skip)]
    pub(crate) keys: (String, Vec<u64>),
}

impl ShardProbes {
    /// The longest time without service, in milliseconds.
    pub(crate) fn longest_ms(&self) -> f64 {
        self.outages.iter().map(|outage| outage.lasted_ms).fold(0.0, f64::max)
    }
}

/// A client of the cluster, which may take so long for a request, and to connect where that is longer than usual.
pub(crate) async fn connect(config: &Path, timeout: Duration) -> Result<Client, LoadError> {
    let config = ClientConfig::load(config).map_err(|error| LoadError::Client(error.to_string()))?;
    let builder = Client::builder().config(config).timeout(timeout);
    Ok(builder.connect_timeout(timeout.max(CONNECT)).connect().await?)
}

/// Runs a future to its end on this thread.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, LoadError>>) -> Result<T, LoadError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(LoadError::system("cannot make a runtime"))?;
    runtime.block_on(work)
}

/// The probes at work.
pub(crate) struct Prober {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<ShardProbes>, LoadError>>,
}

impl Prober {
    /// Begins to write. Times are counted from `began`.
    pub(crate) fn start(config: PathBuf, shards: u16, settings: Probe, began: Instant) -> Result<Self, LoadError> {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = thread::Builder::new()
            .name("prober".into())
            .spawn(move || block_on(probe(&config, shards, &settings, began, &told)))
            .map_err(LoadError::system("cannot start a thread"))?;
        Ok(Self { over, thread })
    }

    /// Stops writing; what became of the probes.
    pub(crate) fn finish(self) -> Result<Vec<ShardProbes>, LoadError> {
        self.over.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(LoadError::Client("the prober panicked".into())))
    }
}

/// The beginning of keys of each shard, by shard.
async fn names(client: &Client, shards: u16) -> Result<Vec<String>, LoadError> {
    let mut names = vec![None; usize::from(shards)];
    let mut missing = names.len();
    for number in 0..NAMES {
        if missing == 0 {
            break;
        }
        // Keys with one tag are of one shard.
        let name = format!("{{probe-{number}}}-");
        let read = client
            .get(&name)
            .await
            .map_err(|error| LoadError::Client(error.to_string()))?;
        if let Some(place) = names.get_mut(usize::from(read.meta.shard))
            && place.is_none()
        {
            *place = Some(name);
            missing -= 1;
        }
    }
    let names: Option<Vec<String>> = names.into_iter().collect();
    names.ok_or_else(|| LoadError::Client(format!("{missing} shards have none of {NAMES} keys")))
}

async fn probe(
    config: &Path,
    shards: u16,
    settings: &Probe,
    began: Instant,
    over: &AtomicBool,
) -> Result<Vec<ShardProbes>, LoadError> {
    let client = connect(config, settings.timeout).await?;
    let names = names(&client, shards).await?;
    let shards = (0..)
        .zip(names)
        .map(|(shard, name)| of_shard(&client, shard, name, settings, began, over));
    let probes = futures_util::future::join_all(shards).await;
    client.close().await;
    Ok(probes)
}

async fn of_shard(
    client: &Client,
    shard: u16,
    name: String,
    settings: &Probe,
    began: Instant,
    over: &AtomicBool,
) -> ShardProbes {
    let mut ticks = tokio::time::interval(settings.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut under_way = FuturesUnordered::new();
    let (mut sent, mut numbers, mut acknowledged_s) = (0, Vec::new(), vec![began.elapsed().as_secs_f64()]);
    let mut failures: BTreeMap<String, u64> = BTreeMap::new();
    loop {
        let ended = over.load(Ordering::Relaxed);
        if ended && under_way.is_empty() {
            break;
        }
        tokio::select! {
            // Each takes its time-out at most, so there are never more than fit into that.
            Some((number, result)) = under_way.next() => match result {
                Ok(()) => {
                    acknowledged_s.push(began.elapsed().as_secs_f64());
                    numbers.push(number);
                }
                Err(kind) => *failures.entry(kind).or_default() += 1,
            },
            _ = ticks.tick(), if !ended => {
                let number = sent;
                sent += 1;
                let key = format!("{name}{number}");
                under_way.push(async move {
                    let put = client.put(&key, &key).await;
                    (number, put.map(drop).map_err(|error| error.code().to_owned()))
                });
            }
        }
    }
    let least_ms = (settings.interval * NOTICED_INTERVALS).as_secs_f64() * 1e3;
    ShardProbes {
        shard,
        sent,
        acknowledged: numbers.len() as u64,
        outages: outages(&acknowledged_s, began.elapsed().as_secs_f64(), least_ms),
        failures,
        keys: (name, numbers),
    }
}

/// The times of at least `least_ms` between acknowledgements, and from the last of them to the end.
fn outages(acknowledged_s: &[f64], end_s: f64, least_ms: f64) -> Vec<Outage> {
    let until = acknowledged_s.iter().copied().skip(1).chain([end_s]);
    let gaps = acknowledged_s.iter().zip(until).map(|(&from_s, until_s)| Outage {
        from_s,
        lasted_ms: (until_s - from_s) * 1e3,
    });
    gaps.filter(|gap| gap.lasted_ms >= least_ms).collect()
}

/// Looks for every acknowledged write, and counts those that are not there or are something else.
pub(crate) async fn lost(config: &Path, probes: &[ShardProbes]) -> Result<u64, LoadError> {
    let client = connect(config, SEARCH).await?;
    let mut lost = 0;
    for ShardProbes {
        keys: (name, numbers), ..
    } in probes
    {
        for batch in numbers.chunks(BATCH) {
            let keys: Vec<String> = batch.iter().map(|number| format!("{name}{number}")).collect();
            for (key, read) in keys.iter().zip(client.multi_get(&keys).await) {
                let read = read.map_err(|error| LoadError::Client(format!("{key} cannot be read: {error}")))?;
                lost += u64::from(read.value().is_none_or(|value| value != key.as_bytes()));
            }
        }
    }
    client.close().await;
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_service_is_between_two_acknowledgements_or_until_the_end() {
        let outage = |from_s, lasted_ms| Outage { from_s, lasted_ms };
        let found = outages(&[0.0, 0.25, 0.5, 1.5, 1.75], 2.0, 100.0);
        let wanted = [
            outage(0.0, 250.0),
            outage(0.25, 250.0),
            outage(0.5, 1_000.0),
            outage(1.5, 250.0),
            outage(1.75, 250.0),
        ];
        assert_eq!(found, wanted);
        assert_eq!(outages(&[0.0, 0.25, 0.5, 1.5, 1.75], 2.0, 500.0), [wanted[2]]);
        assert_eq!(outages(&[0.5], 4.5, 500.0), [outage(0.5, 4_000.0)]);
    }
}
