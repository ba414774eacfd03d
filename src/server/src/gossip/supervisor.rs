//! The thread that gossips: chitchat on a runtime of its own, started again whenever it ends, and what goes in and out of it.
//!
//! A message that makes chitchat panic, a socket that breaks: the start ends, is counted and said, and the next one begins under a higher
//! generation with everything this node has told so far. What is known of other nodes stays meanwhile.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chitchat::{ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, spawn_chitchat};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::keys::KeyFile;
use super::seal::Start;
use super::seeds::{self, Rota};
use super::transport::SealedTransport;
use super::view::{Named, View};
use super::{Settings, Shared};
use crate::net::port;

/// How often the key file is looked at.
const KEY_FILE_EVERY: Duration = Duration::from_secs(1);

/// First wait before gossip is started again; it doubles up to [`MAX_WAIT`], and begins anew after a start that lasted [`STABLE`].
const MIN_WAIT: Duration = Duration::from_millis(100);
const MAX_WAIT: Duration = Duration::from_secs(5);
const STABLE: Duration = Duration::from_secs(30);

/// Rounds without a heartbeat, as the others' come in the mean, after which a node is taken for dead.
const PHI: f64 = 8.0;

/// Heartbeats the detector's mean is taken of.
const SAMPLES: usize = 200;

/// How long a dead node stays in chitchat's state. For half of that it is in every digest, so that starts of a node that follow each other
/// add up.
const DEAD_GRACE: Duration = Duration::from_mins(2);

/// Rounds at the beginning of a start in which nobody is declared dead: the others have to be heard first.
const BEGINNING_ROUNDS: u32 = 30;

/// Rounds between two looks for seeds that are not heard of, where anybody is.
const SEED_ROUNDS: u32 = 10;

/// How a start has ended.
enum Ended {
    /// As asked for.
    Stopped,
    /// By itself, and why.
    Failed(String),
}

/// Gossips until it is to stop.
pub(super) fn run(shared: &Arc<Shared>, settings: &Settings, socket: UdpSocket, mut keys: KeyFile) {
    let mut view = View::new(settings.node);
    let mut generation = settings.generation;
    let mut socket = Some(socket);
    let mut wait = MIN_WAIT;
    loop {
        let began = Instant::now();
        let once = || start(shared, settings, generation, socket.take(), &mut keys, &mut view);
        let why = match catch_unwind(AssertUnwindSafe(once)) {
            Ok(Ended::Stopped) => return,
            Ok(Ended::Failed(why)) => why,
            Err(_) => "it panicked".to_owned(),
        };
        if began.elapsed() >= STABLE {
            wait = MIN_WAIT;
        }
        shared.stats.restarts.add(1);
        generation += 1;
        tracing::error!(generation, "gossip has ended and starts again in {wait:?}: {why}");
        if shared.stops_within(wait) {
            return;
        }
        wait = (wait * 2).min(MAX_WAIT);
    }
}

/// One start: from a socket to its end.
fn start(
    shared: &Arc<Shared>,
    settings: &Settings,
    generation: u64,
    socket: Option<UdpSocket>,
    keys: &mut KeyFile,
    view: &mut View,
) -> Ended {
    let failed = |what: &str, error: &dyn std::fmt::Display| Ended::Failed(format!("{what}: {error}"));
    // After the first start the address is this node's still, port and all.
    let socket = socket.map_or_else(|| port::open_one(shared.address), Ok);
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => return failed("its port cannot be opened", &error),
    };
    let mut salt = [0; 8];
    if let Err(error) = getrandom::fill(&mut salt) {
        return failed("there is no randomness", &error);
    }
    let start = Start {
        node: settings.node,
        generation,
        salt: u64::from_le_bytes(salt),
    };
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => Closing(Some(runtime)),
        Err(error) => return failed("its runtime cannot be made", &error),
    };
    runtime
        .get()
        .block_on(session(shared, settings, start, socket, keys, view))
}

/// A runtime that is not waited for when it is dropped: a name that is being resolved would hold it up.
struct Closing(Option<Runtime>);

impl Closing {
    fn get(&self) -> &Runtime {
        self.0.as_ref().expect("invariant: it is there until it is dropped")
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn chitchat_config(shared: &Shared, settings: &Settings, start: Start) -> ChitchatConfig {
    ChitchatConfig {
        chitchat_id: ChitchatId::new(start.node.to_string(), start.generation, shared.advertise),
        cluster_id: settings.cluster.clone(),
        gossip_interval: settings.interval,
        // The transport's socket is bound; what it needs to know is where answers go.
        listen_addr: shared.advertise,
        // Ours to look for.
        seed_nodes: Vec::new(),
        failure_detector_config: FailureDetectorConfig {
            phi_threshold: PHI,
            sampling_window_size: SAMPLES,
            max_interval: settings.interval * BEGINNING_ROUNDS,
            initial_interval: settings.interval,
            dead_node_grace_period: DEAD_GRACE,
        },
        // Nothing is ever deleted.
        marked_for_deletion_grace_period: Duration::from_hours(1),
        catchup_callback: None,
        extra_liveness_predicate: None,
    }
}

/// The start that chitchat's id names, if it is one of ours.
fn named(id: &ChitchatId) -> Option<Named> {
    Some((id.node_id.parse().ok()?, id.generation_id))
}

async fn session(
    shared: &Arc<Shared>,
    settings: &Settings,
    start: Start,
    socket: UdpSocket,
    keys: &mut KeyFile,
    view: &mut View,
) -> Ended {
    let transport = SealedTransport::new(
        settings.cluster.clone(),
        start,
        Arc::clone(&shared.keys),
        Arc::clone(&shared.stats),
        socket,
    );
    let handle = match spawn_chitchat(chitchat_config(shared, settings, start), shared.told(), &transport).await {
        Ok(handle) => handle,
        Err(error) => return Ended::Failed(format!("{error:#}")),
    };
    // Called under chitchat's lock, so it does nothing but this. What one message brings is taken before the next is read.
    let (tell, mut told) = mpsc::unbounded_channel();
    let chitchat = handle.chitchat();
    let mut live = {
        let chitchat = chitchat.lock().await;
        let on_change = move |event: chitchat::KeyChangeEvent<'_>| {
            let _ = tell.send((named(event.node), event.key.to_owned(), event.value.to_owned()));
        };
        chitchat.subscribe_event("", on_change).forever();
        chitchat.live_nodes_watcher()
    };
    let (found_tell, mut found) = watch::channel(Vec::new());
    if !settings.seeds.is_empty() {
        tokio::spawn(seeds::resolve(settings.seeds.clone(), found_tell));
    }
    let mut terminated = pin!(handle.termination_watcher());
    let mut rounds = tokio::time::interval(settings.interval);
    let mut key_file = tokio::time::interval(KEY_FILE_EVERY);
    for interval in [&mut rounds, &mut key_file] {
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let (mut round, mut rota) = (0_u32, Rota::default());
    let mut heard = BTreeSet::new();
    loop {
        tokio::select! {
            result = &mut terminated => {
                let why = result.err().map_or_else(|| "chitchat has stopped".to_owned(), |error| format!("{error:#}"));
                return Ended::Failed(why);
            }
            () = shared.wanted.notified() => {
                if shared.is_stopping() {
                    // The socket must be free when the thread has ended, and its task holds it.
                    let _ = handle.shutdown().await;
                    return Ended::Stopped;
                }
                let mut chitchat = chitchat.lock().await;
                for (key, value) in shared.told() {
                    chitchat.self_node_state().set(key, value);
                }
            }
            Some((node, key, value)) = told.recv() => match node {
                Some(node) => {
                    let event = view.told(node, &key, &value);
                    shared.record(event);
                }
                None => shared.stats.passed_over.add(1),
            },
            changed = live.changed() => {
                if changed.is_ok() {
                    heard = look(&handle, view, shared, round <= BEGINNING_ROUNDS).await;
                }
            }
            // The addresses that were found are looked at in the next round.
            _ = found.changed(), if !settings.seeds.is_empty() => {}
            _ = rounds.tick() => {
                round = round.saturating_add(1);
                if round == BEGINNING_ROUNDS + 1 {
                    // From now on who is not alive is dead, whether anything changes or not.
                    heard = look(&handle, view, shared, false).await;
                }
                if heard.is_empty() || round.is_multiple_of(SEED_ROUNDS) {
                    let mut seeds = shared.seeds();
                    seeds.extend(found.borrow().iter());
                    seeds.retain(|seed| *seed != shared.advertise);
                    if let Some(seed) = rota.next(&seeds, &heard) {
                        // It has ended if this fails, which is seen above.
                        let _ = handle.gossip(seed);
                    }
                }
            }
            _ = key_file.tick() => read_keys(keys, shared),
        }
    }
}

/// Looks who is alive, and returns where the living are.
async fn look(handle: &ChitchatHandle, view: &mut View, shared: &Shared, beginning: bool) -> BTreeSet<SocketAddr> {
    let chitchat = handle.chitchat();
    let chitchat = chitchat.lock().await;
    let own = chitchat.self_chitchat_id();
    let others = || chitchat.live_nodes().filter(|id| *id != own);
    let heard = others().map(|id| id.gossip_advertise_addr).collect();
    let live = others().filter_map(named).collect();
    let known = chitchat.node_states().keys().filter_map(named).collect();
    for event in view.live(&live, &known, beginning) {
        shared.record(Some(event));
    }
    heard
}

/// Takes the keys of the file if it has changed.
fn read_keys(keys: &mut KeyFile, shared: &Shared) {
    match keys.changed() {
        None => {}
        Some(Ok(ring)) => {
            tracing::info!(keys = ?ring, "gossip keys read again");
            shared.keys.replace(ring);
            shared.stats.key_changes.add(1);
        }
        Some(Err(error)) => {
            tracing::error!("the gossip keys in use stay in use: {error}");
            shared.stats.key_errors.add(1);
        }
    }
}
