//! The configuration of a node: a TOML file, every key of which is documented in `default.toml`.
//!
//! What is wrong with a file is reported with file and line. Unknown keys are refused, with the key that was probably meant: a
//! misspelt limit that is silently ignored is a limit that is not there.

mod check;
mod cluster;
mod gossip;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use generation_proto::limits::SESSION_WINDOW;
use serde::Deserialize;

use crate::tls::load::TlsFiles;
pub use cluster::{Cluster, Durability, Journal, JournalShare, Member};
pub use gossip::{Gossip, gossip_port};

/// The documented default configuration, as `--print-default-config` prints it.
pub const DEFAULT: &str = include_str!("default.toml");

/// A node's configuration. The keys are documented in `default.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and UDP port to listen on.
    pub listen: SocketAddr,
    /// What clients are told instead.
    pub advertise: Option<SocketAddr>,
    /// Directory for what outlives the process.
    pub data_dir: PathBuf,
    /// Cores to serve with; `None` = all.
    pub cores: Option<u16>,
    /// Whether threads are bound to processors.
    pub pin: bool,
    /// Which processors they are bound to, by number; `None` = the first the process may run on.
    pub cpus: Option<Vec<usize>>,
    /// Number of shards.
    pub shards: u16,
    /// What an acknowledged write has survived.
    pub durability: Durability,
    /// `[cluster]`.
    pub cluster: Cluster,
    /// `[gossip]`.
    pub gossip: Gossip,
    /// `[tls]`.
    pub tls: Tls,
    /// `[memory]`.
    pub memory: Memory,
    /// `[journal]`.
    pub journal: Journal,
    /// `[sessions]`.
    pub sessions: Sessions,
    /// `[limits]`.
    pub limits: Limits,
    /// `[network]`.
    pub network: Network,
    /// `[log]`.
    pub log: Log,
}

/// `[tls]`: where the certificates are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The node's certificate.
    pub certificate: PathBuf,
    /// The node's private key.
    pub key: PathBuf,
}

/// `[memory]`: how much is kept, and what makes room.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Bytes of entries, over all shards.
    pub budget: ByteSize,
    /// Entries, over all shards.
    pub max_records: Option<u64>,
    /// What makes room.
    pub policy: Policy,
}

/// What makes room when the budget is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The least recently used entry goes.
    Lru,
    /// An entry nobody has asked for again goes: scans do not push out what is in use.
    S3Fifo,
    /// Nothing does; the write is refused.
    NoEvict,
}

/// `[sessions]`: of clients whose writes are executed exactly once.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sessions {
    /// How long one may be idle before it expires.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// Most writes from the oldest without a reply to the newest.
    pub window: u64,
}

/// `[limits]`: bounds on what peers can make a node hold or do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Longest value.
    pub max_value: ByteSize,
    /// Connections of one core.
    pub connections_per_core: usize,
    /// Connections of clients of one address to one core.
    pub connections_per_address: u32,
    /// Silence after which a connection is given up.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// How long a stop waits.
    #[serde(deserialize_with = "duration")]
    pub drain: Duration,
}

/// `[network]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Send and receive buffer of each socket.
    pub socket_buffer: ByteSize,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged.
    pub filter: String,
    /// How.
    pub format: LogFormat,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines, one object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7400)),
            advertise: None,
            data_dir: "generation-data".into(),
            cores: None,
            pin: true,
            cpus: None,
            shards: 16,
            durability: Durability::default(),
            cluster: Cluster::default(),
            gossip: Gossip::default(),
            tls: Tls::default(),
            memory: Memory::default(),
            journal: Journal::default(),
            sessions: Sessions::default(),
            limits: Limits::default(),
            network: Network::default(),
            log: Log::default(),
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            ca: "certs/ca.pem".into(),
            certificate: "certs/node-1.pem".into(),
            key: "certs/node-1.key".into(),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            budget: ByteSize::gib(1),
            max_records: None,
            policy: Policy::Lru,
        }
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_mins(10),
            window: SESSION_WINDOW,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_value: ByteSize::mib(8),
            connections_per_core: 16_384,
            connections_per_address: 4_096,
            idle_timeout: Duration::from_secs(30),
            drain: Duration::from_secs(1),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            socket_buffer: ByteSize::mib(4),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            filter: "info".into(),
            format: LogFormat::Text,
        }
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format!("`{text}` is no duration such as \"30s\" or \"500ms\": {error}"))
    })
}

fn wrong<T>(key: &'static str, message: impl Into<String>) -> Result<T, ConfigError> {
    let message = message.into();
    Err(ConfigError::Value { key, message })
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {reason}{}", .path.display(), if *.missing { "; `generation serve --print-default-config` prints one to begin with" } else { "" })]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// Whether it does not exist.
        missing: bool,
    },
    /// A line of the file is wrong.
    #[error("{}:{line}: {message}", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A value is out of its range, alone or with others, in the file or by a flag.
    #[error("{key}: {message}")]
    Value {
        /// The key, as `section.key`.
        key: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
}

impl Config {
    /// Reads the file at `path`. Paths in it come out relative to where the file is.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            path: path.to_owned(),
            reason: error.to_string(),
            missing: error.kind() == std::io::ErrorKind::NotFound,
        })?;
        let mut config = Self::parse(path, &text)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let Tls { ca, certificate, key } = &mut config.tls;
        let gossip_keys = config.gossip.key_file.as_mut();
        for file in [&mut config.data_dir, ca, certificate, key]
            .into_iter()
            .chain(gossip_keys)
        {
            *file = directory.join(&*file);
        }
        Ok(config)
    }

    /// Parses the text of the file at `path`, which is only named in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        check::keys(path, text)?;
        toml::from_str(text).map_err(|error| check::line_error(path, text, &error))
    }

    /// The files of `[tls]`.
    pub fn tls_files(&self) -> TlsFiles {
        let Tls { ca, certificate, key } = self.tls.clone();
        TlsFiles { ca, certificate, key }
    }

    /// Checks the values against each other and against hard limits. What depends on who the node is ([`Config::member`]) and on its
    /// cores ([`Config::journal_share`]), and what the machine must have, is not checked here.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cores == Some(0) || self.cores.is_some_and(|cores| cores > 256) {
            return wrong("cores", "must be 1 to 256; leave it out to use all the machine has");
        }
        if let Some(cpus) = &self.cpus {
            let distinct: std::collections::BTreeSet<usize> = cpus.iter().copied().collect();
            if !self.pin || distinct.len() != cpus.len() || self.cores.map(usize::from) != Some(cpus.len()) {
                return wrong(
                    "cpus",
                    "must name a processor of its own for each of `cores`, and needs `pin = true`",
                );
            }
        }
        if !self.shards.is_power_of_two() || usize::from(self.shards) > generation_proto::limits::MAX_SHARDS {
            let (shards, limit) = (self.shards, generation_proto::limits::MAX_SHARDS);
            return wrong("shards", format!("{shards} is not a power of two from 1 to {limit}"));
        }
        let advertise = self.advertise.unwrap_or(self.listen);
        if advertise.ip().is_unspecified() {
            return wrong(
                "advertise",
                format!("clients cannot reach {advertise}; set the address of this machine they are to use"),
            );
        }
        self.cluster.validate()?;
        self.validate_gossip()?;
        let shard_bytes = self.memory.budget.as_u64() / u64::from(self.shards);
        let max_value = self.limits.max_value.as_u64();
        if !(1..=generation_node::MAX_VALUE_BYTES as u64).contains(&max_value) {
            let limit = generation_node::MAX_VALUE_BYTES;
            return wrong("limits.max_value", format!("must be 1 to {limit} bytes"));
        }
        if shard_bytes < MIN_SHARD_BYTES {
            let least = ByteSize::b(MIN_SHARD_BYTES * u64::from(self.shards)).display().iec();
            let shards = self.shards;
            return wrong(
                "memory.budget",
                format!("must be at least {least} for {shards} shards; raise it or take fewer shards"),
            );
        }
        if self
            .memory
            .max_records
            .is_some_and(|records| records < u64::from(self.shards))
        {
            return wrong(
                "memory.max_records",
                format!("must be at least the number of shards, {}", self.shards),
            );
        }
        if self.limits.connections_per_core == 0 {
            return wrong("limits.connections_per_core", "must be at least 1");
        }
        if self.limits.connections_per_address == 0 {
            return wrong("limits.connections_per_address", "must be at least 1");
        }
        if !(Duration::from_secs(1)..=Duration::from_hours(1)).contains(&self.limits.idle_timeout) {
            return wrong("limits.idle_timeout", "must be \"1s\" to \"1h\"");
        }
        if self.limits.drain > Duration::from_mins(1) {
            return wrong("limits.drain", "must be at most \"1m\"");
        }
        let (idle, day) = (self.sessions.idle_timeout, Duration::from_hours(24));
        if !(Duration::from_secs(1)..=day * 7).contains(&idle) {
            return wrong("sessions.idle_timeout", "must be \"1s\" to \"7days\"");
        }
        if !(MIN_SESSION_WINDOW..=SESSION_WINDOW).contains(&self.sessions.window) {
            return wrong(
                "sessions.window",
                format!("must be {MIN_SESSION_WINDOW} to {SESSION_WINDOW}"),
            );
        }
        if !(64 << 10..=1 << 30).contains(&self.network.socket_buffer.as_u64()) {
            return wrong("network.socket_buffer", "must be \"64KiB\" to \"1GiB\"");
        }
        Ok(())
    }
}

/// Least window of a session: clients send as many keys in one request.
const MIN_SESSION_WINDOW: u64 = 256;

/// Least budget of one shard: below, fixed costs outweigh the entries.
const MIN_SHARD_BYTES: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("node.toml"), text)
    }

    fn message(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_printed_file_is_the_default() {
        let printed = parse(DEFAULT).unwrap();
        assert_eq!(printed, Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
        printed.validate().unwrap();
    }

    #[test]
    fn the_printed_file_documents_every_key() {
        let documented: Vec<&str> = DEFAULT
            .lines()
            .filter_map(|line| line.trim_start_matches("# ").split_once(" = "))
            .map(|(key, _)| key)
            .filter(|key| !key.contains(' '))
            .collect();
        for key in check::all_keys() {
            let count = documented.iter().filter(|documented| **documented == key).count();
            assert!(count >= 1, "`{key}` is not in default.toml");
        }
        // Those without a default are right as well once they are written out.
        let all: String = DEFAULT
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(setting) if setting.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) => setting,
                _ => line,
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let config = parse(&all).unwrap();
        assert_eq!(config.cores, Some(2));
        assert_eq!(config.memory.max_records, Some(1_000_000));
        assert_eq!(config.advertise, Some("10.0.0.1:7400".parse().unwrap()));
        assert_eq!(config.cluster.nodes.len(), 3);
        assert_eq!(config.gossip.seeds.len(), 1);
        config.validate().unwrap();
        assert_eq!(config.member(1).unwrap().map(|member| member.cores), Some(2));
        config.journal_share(2).unwrap();
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_one_that_was_meant() {
        let text = message("listen = \"127.0.0.1:1\"\n\n[memory]\nbudgett = \"1GiB\"\n");
        assert_eq!(
            text,
            "node.toml:4: unknown key `budgett` in [memory]; did you mean `budget`?"
        );
        let text = message("liste = \"127.0.0.1:1\"\n");
        assert!(
            text.starts_with("node.toml:1: unknown key `liste`; did you mean `listen`?"),
            "{text}"
        );
        let text = message("[memroy]\n");
        assert!(
            text.contains("node.toml:1") && text.contains("did you mean `memory`?"),
            "{text}"
        );
        let text = message("[memory]\nzzzzzzzz = 1\n");
        assert!(text.contains("known are `budget`, `max_records`, `policy`"), "{text}");
        // A key in the wrong section is pointed to the right one.
        let text = message("budget = \"1GiB\"\n");
        assert!(text.contains("belongs into [memory]"), "{text}");
    }

    #[test]
    fn every_policy_has_the_name_the_field_gives_it() {
        for (name, policy) in [
            ("lru", Policy::Lru),
            ("s3-fifo", Policy::S3Fifo),
            ("no-evict", Policy::NoEvict),
        ] {
            let config = parse(&format!("[memory]\npolicy = \"{name}\"\n")).unwrap();
            assert_eq!(config.memory.policy, policy);
        }
    }

    #[test]
    fn a_wrong_type_is_named_with_its_line() {
        for (text, line, wanted) in [
            ("\nshards = \"many\"\n", 2, "u16"),
            ("shards = 70000\n", 1, "u16"),
            ("listen = \"localhost\"\n", 1, "address"),
            ("pin = 1\n", 1, "boolean"),
            ("[memory]\n\nbudget = \"lots\"\n", 3, "lots"),
            ("[memory]\npolicy = \"fifo\"\n", 2, "`lru`"),
            ("[limits]\ndrain = \"soon\"\n", 2, "soon"),
            ("memory = 3\n", 1, "Memory"),
            ("listen = \"127.0.0.1:1\"\nlisten = \"127.0.0.1:2\"\n", 2, "duplicate"),
            ("[tls\n", 1, "]"),
        ] {
            let message = message(text);
            assert!(message.starts_with(&format!("node.toml:{line}: ")), "{message}");
            assert!(message.contains(wanted), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (text, key) in [
            ("cores = 0", "cores"),
            ("cores = 257", "cores"),
            ("cpus = [0, 1]", "cpus"),
            ("cores = 2\ncpus = [0]", "cpus"),
            ("cores = 2\ncpus = [1, 1]", "cpus"),
            ("cores = 1\npin = false\ncpus = [0]", "cpus"),
            ("shards = 0", "shards"),
            ("shards = 12", "shards"),
            ("shards = 8192", "shards"),
            ("listen = \"0.0.0.0:7400\"", "advertise"),
            ("memory.budget = \"1MiB\"\nshards = 64", "memory.budget"),
            ("memory.max_records = 3", "memory.max_records"),
            ("limits.max_value = \"16MiB\"", "limits.max_value"),
            ("limits.max_value = 0", "limits.max_value"),
            ("limits.connections_per_core = 0", "limits.connections_per_core"),
            ("limits.connections_per_address = 0", "limits.connections_per_address"),
            ("limits.idle_timeout = \"1ms\"", "limits.idle_timeout"),
            ("limits.drain = \"1h\"", "limits.drain"),
            ("sessions.idle_timeout = \"10ms\"", "sessions.idle_timeout"),
            ("sessions.window = 255", "sessions.window"),
            ("sessions.window = 1025", "sessions.window"),
            ("network.socket_buffer = 1", "network.socket_buffer"),
        ] {
            let error = parse(text).unwrap().validate().unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: found, .. } if *found == key),
                "{text}: {error}"
            );
        }
        parse("listen = \"[::]:7400\"\nadvertise = \"10.0.0.1:7400\"")
            .unwrap()
            .validate()
            .unwrap();
    }
}
