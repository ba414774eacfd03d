//! What a run does: the cluster, the load, and the events, from a TOML file that `default.toml` documents.
//!
//! Whatever cannot work is refused before anything is started, with the key or the event that says it.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The documented defaults.
pub(crate) const DEFAULT: &str = include_str!("default.toml");

/// Most nodes: each is a process with a journal of its own.
const MAX_NODES: u64 = 64;

/// Most clients of a `reconnect`.
const MAX_CLIENTS: u32 = 10_000;

/// Why a script cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScriptError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// It is not of the form.
    #[error("{path}: {message}; `generation-cluster-load --print-script` prints one to begin with")]
    Form {
        /// The file.
        path: String,
        /// What is wrong, with its line.
        message: String,
    },
    /// A value cannot work.
    #[error("{key}: {message}")]
    Value {
        /// The key or the event.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
}

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Script {
    /// How long the load goes on.
    #[serde(with = "time")]
    pub(crate) duration: Duration,
    /// The nodes.
    pub(crate) cluster: Cluster,
    /// The load.
    pub(crate) load: Load,
    /// The probes.
    pub(crate) probe: Probe,
    /// What happens.
    #[serde(rename = "event")]
    pub(crate) events: Vec<Event>,
}

/// The nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Cluster {
    /// How many.
    pub(crate) nodes: u64,
    /// Shards.
    pub(crate) shards: u16,
    /// Replicas of a shard when it is whole; `None` = one on each node.
    pub(crate) replicas: Option<u64>,
    /// Bytes of entries of a node, as its configuration has it.
    pub(crate) memory: String,
    /// As a node's configuration has it.
    pub(crate) durability: String,
    /// As a node's configuration has it.
    pub(crate) policy: String,
    /// Whether the nodes gossip.
    pub(crate) gossip: bool,
}

/// The load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Load {
    /// Operations a second.
    pub(crate) rate: f64,
    /// Connections to each core.
    pub(crate) connections: usize,
    /// Reads among a hundred operations.
    pub(crate) reads: u32,
    /// Keys.
    pub(crate) keys: u64,
    /// Bytes of a value.
    pub(crate) value: u32,
}

/// The probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Probe {
    /// Time between two writes to a shard.
    #[serde(with = "time")]
    pub(crate) interval: Duration,
    /// How long one may take.
    #[serde(with = "time")]
    pub(crate) timeout: Duration,
}

/// Something that happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Event {
    /// When, from the beginning of the load.
    #[serde(with = "time")]
    pub(crate) at: Duration,
    /// What.
    pub(crate) action: Action,
}

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// These nodes are killed at once.
    Kill(Vec<u64>),
    /// So much of a hundred of the running nodes is killed at once.
    KillPercent(u32),
    /// Every node that does not run is started.
    StartStopped,
    /// Every node in turn is stopped and started, with so long a pause in between.
    RollingRestart(#[serde(with = "time")] Duration),
    /// These nodes do not run for so long.
    Freeze(Vec<u64>, #[serde(with = "time")] Duration),
    /// So many clients connect at once.
    Reconnect(u32),
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kill(nodes) => write!(f, "kill {nodes:?}"),
            Self::KillPercent(percent) => write!(f, "kill {percent} %"),
            Self::StartStopped => write!(f, "start the stopped"),
            Self::RollingRestart(_) => write!(f, "rolling restart"),
            Self::Freeze(nodes, time) => write!(f, "freeze {nodes:?} for {time:?}"),
            Self::Reconnect(clients) => write!(f, "{clients} clients connect"),
        }
    }
}

/// An event as the file has it: one table with one of several keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(with = "time")]
    at: Duration,
    kill: Option<Vec<u64>>,
    kill_percent: Option<u32>,
    start: Option<String>,
    #[serde(default, with = "optional_time")]
    rolling_restart: Option<Duration>,
    freeze: Option<Vec<u64>>,
    #[serde(default, with = "optional_time", rename = "for")]
    lasting: Option<Duration>,
    reconnect: Option<u32>,
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = |message: String| serde::de::Error::custom(message);
        let table = Table::deserialize(deserializer)?;
        let freeze = match (table.freeze, table.lasting) {
            (Some(nodes), Some(time)) => Some(Action::Freeze(nodes, time)),
            (None, None) => None,
            (Some(_), None) => return Err(wrong("`freeze` needs `for`, such as for = \"2s\"".into())),
            (None, Some(_)) => return Err(wrong("`for` belongs to `freeze`".into())),
        };
        let start = match table.start.as_deref() {
            None => None,
            Some("stopped") => Some(Action::StartStopped),
            Some(other) => {
                return Err(wrong(format!(
                    "start = \"stopped\" is all that can be started, not \"{other}\""
                )));
            }
        };
        let actions = [
            table.kill.map(Action::Kill),
            table.kill_percent.map(Action::KillPercent),
            start,
            table.rolling_restart.map(Action::RollingRestart),
            freeze,
            table.reconnect.map(Action::Reconnect),
        ];
        let mut actions = actions.into_iter().flatten();
        match (actions.next(), actions.next()) {
            (Some(action), None) => Ok(Self { at: table.at, action }),
            _ => Err(wrong(
                "an event has `at` and one of `kill`, `kill_percent`, `start`, `rolling_restart`, `freeze`, `reconnect`".into(),
            )),
        }
    }
}

impl Default for Script {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(30),
            cluster: Cluster::default(),
            load: Load::default(),
            probe: Probe::default(),
            events: Vec::new(),
        }
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            nodes: 5,
            shards: 16,
            replicas: None,
            memory: "64MiB".into(),
            durability: "sync".into(),
            policy: "no-evict".into(),
            gossip: true,
        }
    }
}

impl Default for Load {
    fn default() -> Self {
        Self {
            rate: 500.0,
            connections: 4,
            reads: 50,
            keys: 10_000,
            value: 100,
        }
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(20),
            timeout: Duration::from_secs(1),
        }
    }
}

impl Cluster {
    /// What it is when nothing is missing.
    pub(crate) fn whole(&self) -> Whole {
        Whole {
            nodes: self.nodes,
            replicas: self.replicas.unwrap_or(self.nodes),
        }
    }
}

/// A cluster that lacks nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Whole {
    /// Nodes that answer.
    pub(crate) nodes: u64,
    /// Replicas of each shard that have caught up.
    pub(crate) replicas: u64,
}

impl Script {
    /// Reads and checks a file.
    pub(crate) fn load(path: &Path) -> Result<Self, ScriptError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ScriptError::Unreadable {
            path: shown.clone(),
            error,
        })?;
        Self::parse(&shown, &text)
    }

    /// Parses and checks the text of a file, which is only named in errors. Events come out in the order of their times.
    pub(crate) fn parse(path: &str, text: &str) -> Result<Self, ScriptError> {
        let mut script: Self = toml::from_str(text).map_err(|error| ScriptError::Form {
            path: path.to_owned(),
            message: {
                let line = error
                    .span()
                    .map_or(1, |span| 1 + text[..span.start].matches('\n').count());
                let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
                format!("line {line}: {message}")
            },
        })?;
        script.validate()?;
        script.events.sort_by_key(|event| event.at);
        Ok(script)
    }

    fn validate(&self) -> Result<(), ScriptError> {
        let wrong = |key: &str, message: String| {
            Err(ScriptError::Value {
                key: key.to_owned(),
                message,
            })
        };
        let Cluster {
            nodes,
            policy,
            durability,
            ..
        } = &self.cluster;
        if !(1..=MAX_NODES).contains(nodes) {
            return wrong("cluster.nodes", format!("must be 1 to {MAX_NODES}, not {nodes}"));
        }
        if self
            .cluster
            .replicas
            .is_some_and(|replicas| !(1..=*nodes).contains(&replicas))
        {
            return wrong("cluster.replicas", format!("must be 1 to the number of nodes, {nodes}"));
        }
        // These become text of a configuration file; what else they are the nodes themselves refuse.
        for (key, text) in [
            ("cluster.memory", &self.cluster.memory),
            ("cluster.policy", policy),
            ("cluster.durability", durability),
        ] {
            if text.is_empty()
                || !text
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
            {
                return wrong(key, format!("`{text}` is no value of a node's configuration"));
            }
        }
        if !(1.0..=1e6).contains(&self.load.rate) && self.load.rate != 0.0 {
            return wrong("load.rate", "must be 0, or 1 to 1000000".into());
        }
        if self.load.reads > 100 {
            return wrong("load.reads", "are of a hundred operations; at most 100".into());
        }
        if self.load.keys == 0 || self.load.connections == 0 {
            return wrong("load", "needs keys and connections".into());
        }
        if !(Duration::from_millis(5)..=Duration::from_secs(1)).contains(&self.probe.interval) {
            return wrong("probe.interval", "must be \"5ms\" to \"1s\"".into());
        }
        if !(self.probe.interval..=Duration::from_secs(10)).contains(&self.probe.timeout) {
            return wrong(
                "probe.timeout",
                "must be at least the interval and at most \"10s\"".into(),
            );
        }
        if !(Duration::from_secs(1)..=Duration::from_hours(24)).contains(&self.duration) {
            return wrong("duration", "must be \"1s\" to \"24h\"".into());
        }
        for (number, Event { at, action }) in (1..).zip(&self.events) {
            let event = |message: String| wrong(&format!("event {number} ({action})"), message);
            if *at >= self.duration {
                return event(format!("{at:?} is not before the end of the load, {:?}", self.duration));
            }
            let named: &[u64] = match action {
                Action::Kill(nodes) | Action::Freeze(nodes, _) => {
                    if nodes.is_empty() {
                        return event("it names no node".into());
                    }
                    nodes
                }
                Action::KillPercent(percent) if !(1..=100).contains(percent) => {
                    return event("it must be of 1 to 100 of a hundred nodes".into());
                }
                Action::Reconnect(clients) if !(1..=MAX_CLIENTS).contains(clients) => {
                    return event(format!("1 to {MAX_CLIENTS} clients can connect"));
                }
                _ => &[],
            };
            if let Some(node) = named.iter().find(|node| !(1..=*nodes).contains(*node)) {
                return event(format!("there is no node {node}; nodes are 1 to {nodes}"));
            }
        }
        Ok(())
    }
}

/// Durations as texts.
mod time {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|error| {
            serde::de::Error::custom(format!("`{text}` is no duration such as \"2s\" or \"500ms\": {error}"))
        })
    }
}

/// Durations that need not be there.
mod optional_time {
    use std::time::Duration;

    use serde::Deserializer;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        super::time::deserialize(deserializer).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Script, ScriptError> {
        Script::parse("script.toml", text)
    }

    #[test]
    fn the_printed_script_is_the_default_and_its_examples_are_right() {
        assert_eq!(parse(DEFAULT).unwrap(), Script::default());
        assert_eq!(parse("").unwrap(), Script::default());
        let (settings, examples) = DEFAULT.split_once("in any order:\n").unwrap();
        let examples: Vec<&str> = examples.lines().map(|line| line.trim_start_matches("# ")).collect();
        let script = parse(&format!("{settings}\n{}", examples.join("\n").replace('#', "\n#"))).unwrap();
        let actions: Vec<String> = script.events.iter().map(|event| event.action.to_string()).collect();
        assert_eq!(
            actions,
            [
                "kill [2, 3]",
                "kill 25 %",
                "start the stopped",
                "rolling restart",
                "freeze [4] for 2s",
                "1000 clients connect"
            ]
        );
    }

    #[test]
    fn events_come_in_the_order_of_their_times() {
        let script =
            parse("[[event]]\nat = \"9s\"\nkill = [1]\n[[event]]\nat = \"3s\"\nstart = \"stopped\"\n").unwrap();
        let times: Vec<u64> = script.events.iter().map(|event| event.at.as_secs()).collect();
        assert_eq!(times, [3, 9]);
    }

    #[test]
    fn what_cannot_work_is_named() {
        let event = |text: &str| format!("[[event]]\nat = \"5s\"\n{text}\n");
        for (text, wanted) in [
            ("durations = \"5s\"".to_owned(), "line 1: unknown field `durations`"),
            ("\nduration = \"soon\"".to_owned(), "line 2: `soon` is no duration"),
            ("duration = \"1ms\"".to_owned(), "duration: must be"),
            ("[cluster]\nnodes = 0".to_owned(), "cluster.nodes: must be 1 to 64"),
            ("[cluster]\npolicy = \"a\\\"b\"".to_owned(), "cluster.policy"),
            ("[cluster]\nreplicas = 6".to_owned(), "cluster.replicas: must be 1 to"),
            ("[load]\nreads = 101".to_owned(), "load.reads"),
            ("[load]\nrate = -1.0".to_owned(), "load.rate"),
            ("[probe]\ninterval = \"1ms\"".to_owned(), "probe.interval"),
            ("[probe]\ntimeout = \"1ms\"".to_owned(), "probe.timeout"),
            (event(""), "one of `kill`"),
            (event("kill = [1]\nreconnect = 5"), "one of `kill`"),
            (event("kill = []"), "event 1 (kill []): it names no node"),
            (event("kill = [6]"), "there is no node 6; nodes are 1 to 5"),
            (event("kill_percent = 0"), "1 to 100"),
            (event("freeze = [1]"), "`freeze` needs `for`"),
            (event("kill = [1]\nfor = \"1s\""), "`for` belongs to `freeze`"),
            (event("start = \"all\""), "start = \"stopped\""),
            (event("reconnect = 0"), "clients can connect"),
            ("[[event]]\nat = \"30s\"\nkill = [1]".to_owned(), "not before the end"),
        ] {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(wanted), "{text}: {message}");
        }
    }
}
