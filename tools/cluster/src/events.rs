//! Carrying out the events of a script.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::Signal;
use serde::Serialize;

use crate::LoadError;
use crate::nodes::Nodes;
use crate::observe;
use crate::probe::{block_on, connect};
use crate::script::{Action, Event, Script, Whole};

/// How long the cluster may take to be whole between two nodes of a rolling restart.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a client of a `reconnect` may take to connect and to read.
const CLIENT: Duration = Duration::from_secs(20);

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Happened {
    /// When it began, in seconds of the load.
    pub(crate) at_s: f64,
    /// How long it took, in milliseconds.
    pub(crate) took_ms: f64,
    /// What was done.
    pub(crate) text: String,
    /// Why it could not be carried out.
    pub(crate) error: Option<String>,
}

/// The time of the load, and whom to tell.
pub(crate) trait Stage {
    /// Waits for a moment of the load; `false` when it ended before.
    fn wait_until(&self, at: Duration) -> bool;

    /// Seconds of the load so far.
    fn now_s(&self) -> f64;

    /// Tells what happens now.
    fn note(&self, text: &str);
}

/// Carries out a script's events in their order.
pub(crate) fn play(script: &Script, nodes: &Nodes, config: &Path, stage: &dyn Stage) -> Vec<Happened> {
    let mut happened = Vec::new();
    for (number, Event { at, action }) in script.events.iter().enumerate() {
        if !stage.wait_until(*at) {
            break;
        }
        let at_s = stage.now_s();
        stage.note(&action.to_string());
        let began = Instant::now();
        let done = carry_out(action, number, nodes, script.cluster.whole(), config, stage);
        let (text, error) = match done {
            Ok(text) => (text, None),
            Err(error) => (action.to_string(), Some(error.to_string())),
        };
        happened.push(Happened {
            at_s,
            took_ms: began.elapsed().as_secs_f64() * 1e3,
            text,
            error,
        });
    }
    happened
}

fn carry_out(
    action: &Action,
    number: usize,
    nodes: &Nodes,
    whole: Whole,
    config: &Path,
    stage: &dyn Stage,
) -> Result<String, LoadError> {
    match action {
        Action::Kill(ids) => {
            nodes.kill(ids);
            Ok(format!("killed {ids:?}"))
        }
        Action::KillPercent(percent) => {
            let running: Vec<u64> = nodes.running().into_iter().map(|(id, _)| id).collect();
            let ids = draw(&running, *percent, number);
            nodes.kill(&ids);
            Ok(format!("killed {ids:?}, {percent} % of {}", running.len()))
        }
        Action::StartStopped => {
            let running: Vec<u64> = nodes.running().into_iter().map(|(id, _)| id).collect();
            let stopped: Vec<u64> = nodes.ids().into_iter().filter(|id| !running.contains(id)).collect();
            nodes.start(&stopped)?;
            Ok(format!("started {stopped:?}, which serve"))
        }
        Action::RollingRestart(pause) => {
            let ids = nodes.ids();
            let mut killed = Vec::new();
            for id in &ids {
                stage.note(&format!("restart {id}"));
                killed.extend(nodes.stop(&[*id]));
                nodes.start(&[*id])?;
                observe::wait_until_whole(config, whole, PATIENCE)?;
                thread::sleep(*pause);
            }
            let late = if killed.is_empty() {
                String::new()
            } else {
                format!(", of which {killed:?} did not stop by themselves")
            };
            Ok(format!("restarted {ids:?} in turn{late}"))
        }
        Action::Freeze(ids, time) => {
            nodes.signal(ids, Signal::STOP);
            thread::sleep(*time);
            nodes.signal(ids, Signal::CONT);
            Ok(format!("froze {ids:?} for {time:?}"))
        }
        Action::Reconnect(clients) => reconnect(*clients, config),
    }
}

/// So much of a hundred of these nodes, one at least; the same at each run.
fn draw(nodes: &[u64], percent: u32, number: usize) -> Vec<u64> {
    if nodes.is_empty() {
        return Vec::new();
    }
    let count = (nodes.len() * percent as usize / 100).max(1);
    // Neighbours in the list are no neighbours in anything else.
    let first = (number * 7 + 3) % nodes.len();
    let mut drawn: Vec<u64> = nodes.iter().cycle().skip(first).take(count).copied().collect();
    drawn.sort_unstable();
    drawn
}

/// Has clients connect at once, each of which reads a key and goes.
fn reconnect(clients: u32, config: &Path) -> Result<String, LoadError> {
    let began = Instant::now();
    let ended = block_on(async {
        let all = (0..clients).map(|client| async move {
            let connected = connect(config, CLIENT).await.map_err(|error| match error {
                LoadError::Connect(error) => error.code().to_owned(),
                error => error.to_string(),
            })?;
            let read = connected.get(format!("reconnect-{client}")).await;
            let took = began.elapsed();
            connected.close().await;
            read.map(|_| took).map_err(|error| error.code().to_owned())
        });
        Ok(join_all(all).await)
    })?;
    let mut times: Vec<Duration> = ended.iter().filter_map(|end| end.as_ref().ok().copied()).collect();
    times.sort_unstable();
    let mut failures: BTreeMap<&str, u64> = BTreeMap::new();
    for failure in ended.iter().filter_map(|end| end.as_ref().err()) {
        *failures.entry(failure).or_default() += 1;
    }
    let at = |share: usize| {
        times
            .get(times.len() * share / 100)
            .copied()
            .unwrap_or_default()
            .as_millis()
    };
    let text = format!(
        "{} of {clients} clients connected and read: half after {} ms, 99 % after {} ms, all after {} ms",
        times.len(),
        at(50),
        at(99),
        times.last().copied().unwrap_or_default().as_millis()
    );
    if failures.is_empty() {
        return Ok(text);
    }
    Err(LoadError::Client(format!("{text}; failures {failures:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_nodes_is_one_at_least_and_no_node_twice() {
        assert_eq!(draw(&[], 50, 0), [0; 0]);
        for (percent, count) in [(10, 1), (25, 1), (40, 2), (50, 2), (100, 5)] {
            for number in 0..10 {
                let drawn = draw(&[1, 2, 3, 4, 5], percent, number);
                assert_eq!(drawn.len(), count, "{percent} %");
                assert!(drawn.is_sorted_by(|a, b| a < b), "{drawn:?}");
                assert_eq!(drawn, draw(&[1, 2, 3, 4, 5], percent, number));
            }
        }
    }
}
