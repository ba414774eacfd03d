//! Running a node in the foreground: signals, readiness, the end.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Exit, Failure};
use crate::config::Config;
use crate::directory::DataDirectory;
use crate::node::{Node, NodeError};

/// How long after the drain a node may take to end by itself before the process ends without it.
const GRACE: Duration = Duration::from_millis(500);

/// How often a second signal is looked for meanwhile.
const STEP: Duration = Duration::from_millis(20);

enum Happened {
    Signal(i32),
    CoreEnded,
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        match error {
            // A defect, or the machine gave out: nothing the configuration can change.
            NodeError::Executors(_) | NodeError::Crypto(_) => Self::new(Exit::Rejected, error.to_string()),
            NodeError::Damaged { .. } => Self::new(Exit::Corruption, error.to_string()),
            _ => Self::usage(error.to_string()),
        }
    }
}

/// Starts a node, calls `ready` when it serves, and returns when it has stopped. SIGTERM and SIGINT stop it gracefully; a second
/// one at once. `directory` is the data directory where the caller holds it already. SIGHUP makes it read its certificates again.
pub(super) fn run(
    config: &Config,
    directory: Option<DataDirectory>,
    ready: impl FnOnce(&Node) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    let (tell, happened) = mpsc::channel();
    // Before the node is started: a signal that comes meanwhile must not kill a process that holds a half-made node.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| Failure::new(Exit::Rejected, format!("cannot watch for signals: {error}")))?;
    let tell_signal = tell.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if tell_signal.send(Happened::Signal(signal)).is_err() {
                    break;
                }
            }
        })
        .map_err(|error| Failure::new(Exit::Rejected, format!("cannot start a thread: {error}")))?;
    let node = Node::start(config, directory, move |_| {
        // Nobody listens any more once the end was given up on.
        let _ = tell.send(Happened::CoreEnded);
    })?;
    tracing::info!(identity = %node.identity, address = %node.address, "serving");
    ready(&node)?;
    let shared = node.shared();
    loop {
        match happened.recv() {
            Ok(Happened::Signal(SIGHUP)) => match node.certificates.reload() {
                Ok(()) => tracing::info!("certificates reloaded"),
                Err(error) => tracing::error!("the certificates in use stay in use: {error}"),
            },
            Ok(Happened::Signal(signal)) => {
                tracing::info!(signal, "stopping");
                shared.stop();
                break;
            }
            Ok(Happened::CoreEnded) | Err(mpsc::RecvError) => break,
        }
    }
    let (done, joined) = mpsc::channel();
    let ending = thread::Builder::new().name("ending".into()).spawn(move || {
        // The receiver is gone only when the process is about to be.
        let _ = done.send(node.join());
    });
    ending.map_err(|error| Failure::new(Exit::Rejected, format!("cannot start a thread: {error}")))?;
    let patience = config.limits.drain + GRACE;
    match wait(&joined, &happened, patience) {
        Some(result) => result.map(|()| Exit::Ok).map_err(Failure::from),
        None => Err(Failure::new(
            Exit::Rejected,
            format!("the node was abandoned before it had stopped; it may take {patience:?}"),
        )),
    }
}

/// Waits for the node's end, at most `patience` and at most until another signal to stop.
fn wait(
    joined: &mpsc::Receiver<Result<(), NodeError>>,
    happened: &mpsc::Receiver<Happened>,
    patience: Duration,
) -> Option<Result<(), NodeError>> {
    let until = Instant::now() + patience;
    loop {
        match joined.recv_timeout(STEP) {
            Ok(result) => return Some(result),
            Err(mpsc::RecvTimeoutError::Disconnected) => return None,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        let again = happened
            .try_iter()
            .any(|event| matches!(event, Happened::Signal(SIGTERM | SIGINT)));
        if again || Instant::now() >= until {
            return None;
        }
    }
}
