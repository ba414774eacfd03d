//! Servers that a comparison starts itself: found, started on loopback with private ports, without
//! persistence, pinned, and ended with the comparison.
//!
//! Every process runs under `setpriv --pdeathsig`, so that it ends even if this program is killed. Servers that cannot do without
//! files (etcd, Generation when it syncs) keep them in memory (`/dev/shm`) where that exists and no other place is asked for, so that
//! no disk is measured, or the same one for all. What each has done with a write before it acknowledges it is part of the report.

mod certificates;
mod etcd;
mod generation;
mod install;
mod redis;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::Notes;
use crate::result::{Finding, Unit};
use crate::system::{self, Environment, ProcessProbe};
use crate::target::cluster::{Cluster, Place};
use crate::target::etcd::EtcdConnector;
use crate::target::generation::GenerationConnector;
use crate::target::memcached::MemcachedConnector;
use crate::target::resp::{RespCluster, RespConnector};
use crate::target::tls::TlsFiles;
use crate::target::{Connector, TargetError};

pub use certificates::Certificates;
pub use generation::{DevSettings, Durability, Features, program as generation_program};
use install::Program;

/// A kind of server that can be started.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Redis, plaintext.
    Redis,
    /// Redis, TLS.
    RedisTls,
    /// Valkey, plaintext.
    Valkey,
    /// Valkey, TLS.
    ValkeyTls,
    /// Memcached, plaintext.
    Memcached,
    /// Memcached, TLS.
    MemcachedTls,
    /// etcd, plaintext.
    Etcd,
    /// etcd, TLS.
    EtcdTls,
    /// Generation once more, acknowledging what a majority has in memory.
    GenerationMemory,
    /// Generation once more, acknowledging what a majority has on disk.
    GenerationSync,
}

impl Kind {
    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::RedisTls => "redis-tls",
            Self::Valkey => "valkey",
            Self::ValkeyTls => "valkey-tls",
            Self::Memcached => "memcached",
            Self::MemcachedTls => "memcached-tls",
            Self::Etcd => "etcd",
            Self::EtcdTls => "etcd-tls",
            Self::GenerationMemory => "generation-memory",
            Self::GenerationSync => "generation-sync",
        }
    }

    /// The durability of the kinds that are Generation itself.
    pub const fn durability(self) -> Option<Durability> {
        match self {
            Self::GenerationMemory => Some(Durability::Memory),
            Self::GenerationSync => Some(Durability::Sync),
            _ => None,
        }
    }

    /// The kind with its TLS twin, where asked for.
    pub fn variants(self, with_tls: bool) -> Vec<Self> {
        let twin = match self {
            Self::Redis => Some(Self::RedisTls),
            Self::Valkey => Some(Self::ValkeyTls),
            Self::Memcached => Some(Self::MemcachedTls),
            Self::Etcd => Some(Self::EtcdTls),
            _ => None,
        };
        std::iter::once(self).chain(twin.filter(|_| with_tls)).collect()
    }

    const fn tls(self) -> bool {
        matches!(
            self,
            Self::RedisTls | Self::ValkeyTls | Self::MemcachedTls | Self::EtcdTls
        )
    }

    /// The program; `None` for Generation, which comes with this program.
    const fn program(self) -> Option<Program> {
        Some(match self {
            Self::Redis | Self::RedisTls => Program::REDIS,
            Self::Valkey | Self::ValkeyTls => Program::VALKEY,
            Self::Memcached | Self::MemcachedTls => Program::MEMCACHED,
            Self::Etcd | Self::EtcdTls => Program::ETCD,
            Self::GenerationMemory | Self::GenerationSync => return None,
        })
    }

    fn find(self) -> Result<PathBuf, PeerError> {
        let program = self
            .program()
            .ok_or_else(|| PeerError::not_started(self.name(), "it is started as the baseline is".to_owned()))?;
        program.find().ok_or_else(|| install::missing(&[program]))
    }

    /// Checks that every program is installed, so that all that is missing is said at once and before anything was started.
    pub fn check_installed(kinds: &[Self]) -> Result<(), PeerError> {
        let mut missing: Vec<Program> = Vec::new();
        for program in kinds.iter().filter_map(|kind| kind.program()) {
            if program.find().is_none() && !missing.contains(&program) {
                missing.push(program);
            }
        }
        if missing.is_empty() {
            Ok(())
        } else {
            Err(install::missing(&missing))
        }
    }
}

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its program is not installed.
    #[error("not installed: {programs}. {advice}")]
    Missing {
        /// The programs.
        programs: String,
        /// Where they come from.
        advice: String,
    },
    /// It ended at once or never listened.
    #[error("{name} did not start: {message}")]
    NotStarted {
        /// Which server.
        name: String,
        /// Its last words.
        message: String,
    },
    /// Files or processes failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The operating system's words.
        source: std::io::Error,
    },
    /// It cannot do what the scenario asks.
    #[error("{name} {message}")]
    Unable {
        /// Which server.
        name: String,
        /// What it lacks, and what to do.
        message: String,
    },
    /// Its certificates could not be made.
    #[error("cannot make certificates: {0}")]
    Certificates(String),
}

impl PeerError {
    fn not_started(name: &str, message: String) -> Self {
        Self::NotStarted {
            name: name.to_owned(),
            message,
        }
    }

    fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// How long a server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// One node of a server.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Where clients reach it.
    pub addr: SocketAddr,
    /// Its process.
    pub pid: u32,
}

/// How a server is asked for what no data protocol has.
enum Control {
    Generation { program: PathBuf, config: PathBuf },
    Redis,
    RedisCluster,
    Etcd(EtcdConnector),
    Memcached,
}

/// A running server, of one node or of several; ended when dropped.
pub struct Server {
    name: String,
    version: String,
    /// What it has done with a write before it acknowledges it.
    durability: String,
    processes: Vec<Child>,
    connector: Box<dyn Connector>,
    probe: ProcessProbe,
    nodes: Vec<Node>,
    control: Control,
    /// Holds what the server reads; goes with it.
    directory: tempfile::TempDir,
}

impl Server {
    /// Starts one node pinned to `cpus` (empty: not pinned) and waits until it accepts connections. `files` is where a server that
    /// cannot do without files keeps them; `None`: in memory.
    pub fn start(kind: Kind, cpus: &[usize], memory_mib: u64, files: Option<&Path>) -> Result<Self, PeerError> {
        let path = kind.find()?;
        if matches!(kind, Kind::Etcd | Kind::EtcdTls) {
            return Self::start_etcd(kind, &path, cpus, 1, files);
        }
        let directory = directory()?;
        let certificates = certificates(kind, directory.path())?;
        let port = free_port()?;
        let addr: SocketAddr = ([127, 0, 0, 1], port).into();
        let mut command = supervised(&path, cpus);
        let tls = tls_files(certificates.as_ref());
        let (connector, control, durability): (Box<dyn Connector>, _, _) = match kind {
            Kind::Memcached | Kind::MemcachedTls => {
                memcached_arguments(&mut command, port, cpus.len().max(1), memory_mib, certificates.as_ref());
                let addr = addr.to_string();
                (Box::new(MemcachedConnector { addr, tls }), Control::Memcached, "memory")
            }
            _ => {
                redis::arguments(&mut command, directory.path(), port, certificates.as_ref());
                let connector = RespConnector {
                    addr: addr.to_string(),
                    tls,
                    cluster: false,
                };
                (Box::new(connector), Control::Redis, redis::DURABILITY)
            }
        };
        let mut server = Self::new(
            kind.name(),
            version(&path),
            durability.to_owned(),
            connector,
            control,
            directory,
        );
        server.spawn(command, addr)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Starts the replicated form of a peer, all its nodes on the same `cpus`: three members of etcd, or a cluster of three masters
    /// with a replica each of redis and valkey. `files` as in [`Self::start`].
    pub fn start_replicated(kind: Kind, cpus: &[usize], files: Option<&Path>) -> Result<Self, PeerError> {
        let path = kind.find()?;
        match kind {
            Kind::Etcd | Kind::EtcdTls => Self::start_etcd(kind, &path, cpus, 3, files),
            Kind::Redis | Kind::Valkey => Self::start_redis_cluster(kind, &path, cpus),
            _ => Err(PeerError::Unable {
                name: kind.name().to_owned(),
                message: "has no replication that is compared here: leave it out of --peers".to_owned(),
            }),
        }
    }

    fn start_etcd(
        kind: Kind,
        path: &Path,
        cpus: &[usize],
        count: usize,
        files: Option<&Path>,
    ) -> Result<Self, PeerError> {
        let directory = files_directory(files)?;
        let certificates = certificates(kind, directory.path())?;
        let members = (0..count)
            .map(|_| {
                Ok(etcd::Member {
                    client: ([127, 0, 0, 1], free_port()?).into(),
                    peer: ([127, 0, 0, 1], free_port()?).into(),
                })
            })
            .collect::<Result<Vec<_>, PeerError>>()?;
        let connector = EtcdConnector {
            endpoints: members.iter().map(|member| member.client.to_string()).collect(),
            tls: tls_files(certificates.as_ref()),
        };
        let name = if count > 1 {
            format!("{}-{count}", kind.name())
        } else {
            kind.name().to_owned()
        };
        let control = Control::Etcd(connector.clone());
        let durability = format!(
            "sync: the write-ahead log of {} is synced before the reply, {}",
            if count > 1 { "a majority" } else { "the one member" },
            medium(directory.path())
        );
        let mut server = Self::new(
            &name,
            version(path),
            durability,
            Box::new(connector),
            control,
            directory,
        );
        for (index, member) in members.iter().enumerate() {
            let mut command = supervised(path, cpus);
            etcd::arguments(
                &mut command,
                server.directory.path(),
                &members,
                index,
                certificates.as_ref(),
            );
            server.spawn(command, member.client)?;
        }
        server.wait_until_ready()?;
        Ok(server)
    }

    fn start_redis_cluster(kind: Kind, path: &Path, cpus: &[usize]) -> Result<Self, PeerError> {
        let directory = directory()?;
        let nodes = (0..2 * redis::MASTERS)
            .map(|_| Ok((SocketAddr::from(([127, 0, 0, 1], free_port()?)), free_port()?)))
            .collect::<Result<Vec<_>, PeerError>>()?;
        let connector = RespConnector {
            addr: nodes[0].0.to_string(),
            tls: None,
            cluster: true,
        };
        let name = format!("{}-cluster", kind.name());
        let mut server = Self::new(
            &name,
            version(path),
            redis::CLUSTER_DURABILITY.to_owned(),
            Box::new(connector),
            Control::RedisCluster,
            directory,
        );
        for (index, (addr, bus)) in nodes.iter().enumerate() {
            let own = server.directory.path().join(format!("node{index}"));
            std::fs::create_dir(&own).map_err(PeerError::system(own.display().to_string()))?;
            let mut command = supervised(path, cpus);
            redis::arguments(&mut command, &own, addr.port(), None);
            redis::cluster_arguments(&mut command, *bus);
            server.spawn(command, *addr)?;
        }
        let formed = redis::form_cluster(&name, &nodes);
        server.explain(formed)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    fn new(
        name: &str,
        version: String,
        durability: String,
        connector: Box<dyn Connector>,
        control: Control,
        directory: tempfile::TempDir,
    ) -> Self {
        Self {
            name: name.to_owned(),
            version,
            durability,
            processes: Vec::new(),
            connector,
            probe: ProcessProbe { pids: Vec::new() },
            nodes: Vec::new(),
            control,
            directory,
        }
    }

    /// Spawns one node with its output in the directory.
    fn spawn(&mut self, mut command: Command, addr: SocketAddr) -> Result<(), PeerError> {
        let cannot = || PeerError::system("cannot make a log");
        let log = self.directory.path().join(format!("log{}", self.processes.len()));
        let log = std::fs::File::create(log).map_err(cannot())?;
        let errors = log.try_clone().map_err(cannot())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(PeerError::system(format!(
                "cannot start {} (setpriv and taskset come with util-linux)",
                self.name
            )))?;
        self.probe.pids.push(child.id());
        self.nodes.push(Node { addr, pid: child.id() });
        self.processes.push(child);
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<(), PeerError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let failed: TargetError = match self.connector.connect(self.nodes.len()) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if self.ended() || Instant::now() > deadline {
                return self.explain(Err(PeerError::NotStarted {
                    name: self.name.clone(),
                    message: failed.to_string(),
                }));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ended(&mut self) -> bool {
        self.processes
            .iter_mut()
            .any(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Puts the last words of a process that has ended in the place of what was seen from outside.
    fn explain(&mut self, outcome: Result<(), PeerError>) -> Result<(), PeerError> {
        let Err(error) = outcome else { return Ok(()) };
        for (index, child) in self.processes.iter_mut().enumerate() {
            let Some(status) = child.try_wait().ok().flatten() else {
                continue;
            };
            let log = self.directory.path().join(format!("log{index}"));
            let log = std::fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(5).collect();
            let words = tail.into_iter().rev().collect::<Vec<_>>().join("; ");
            return Err(PeerError::NotStarted {
                name: self.name.clone(),
                message: format!("{status}: {words}"),
            });
        }
        Err(error)
    }

    /// Name for reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes down in a report which server this is.
    pub fn describe(&self, environment: &mut Environment) {
        environment.versions.insert(self.name.clone(), self.version.clone());
        environment
            .durability
            .insert(self.name.clone(), self.durability.clone());
    }

    /// Opens connections to it.
    pub fn connector(&self) -> &dyn Connector {
        &*self.connector
    }

    /// Its processes.
    pub fn probe(&self) -> &ProcessProbe {
        &self.probe
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The server as a cluster whose nodes may die.
    pub fn cluster(&self) -> Result<Arc<dyn Cluster>, PeerError> {
        match &self.control {
            Control::Etcd(connector) => Ok(Arc::new(connector.clone())),
            Control::RedisCluster => Ok(Arc::new(RespCluster {
                nodes: self.nodes.iter().map(|node| node.addr).collect(),
            })),
            Control::Generation { config, .. } => Ok(Arc::new(GenerationConnector { config: config.clone() })),
            Control::Redis | Control::Memcached => Err(self.unable("is one node: nothing takes over from it")),
        }
    }

    /// The node whose loss hurts most: etcd's leader, else the one that serves most slots.
    pub fn leader(&self) -> Result<Node, PeerError> {
        let cluster = self.cluster()?;
        if let Control::Etcd(connector) = &self.control {
            return self
                .nodes
                .iter()
                .copied()
                .find(|node| connector.leads(node.addr).unwrap_or(false))
                .ok_or_else(|| self.unable("has no leader"));
        }
        let layout = self
            .nodes
            .iter()
            .find_map(|node| cluster.layout(node.addr).ok())
            .ok_or_else(|| self.unable("does not say who serves what"))?;
        let slots = |node: &Node| -> usize {
            let of_node = layout.places.iter().filter(|place| place.addr == node.addr);
            of_node.map(|place: &Place| layout.slots_of(*place)).sum()
        };
        self.nodes
            .iter()
            .copied()
            .max_by_key(slots)
            .ok_or_else(|| self.unable("has no nodes"))
    }

    /// Whether [`Self::snapshot`] can be asked for.
    pub fn can_snapshot(&self) -> Result<(), PeerError> {
        match &self.control {
            Control::Redis => Ok(()),
            Control::Generation { program, .. } => {
                let offered = Command::new(program)
                    .args(["snapshot", "now", "--help"])
                    .output()
                    .is_ok_and(|output| output.status.success());
                if offered {
                    Ok(())
                } else {
                    Err(self.unable(
                        "does not offer `generation snapshot now` yet: pass --without-generation to measure the peers alone",
                    ))
                }
            }
            _ => Err(self.unable("takes no snapshot on command: leave it out of --peers")),
        }
    }

    /// Takes a snapshot while a run goes on, notes its begin and end, and returns what the server itself says of it.
    pub fn snapshot(&self, notes: &Notes<'_>) -> Result<Vec<Finding>, String> {
        match &self.control {
            Control::Redis => {
                let node = self.nodes[0].addr;
                redis::command(node, &["BGSAVE"])?;
                notes.note(SNAPSHOT_BEGINS);
                loop {
                    let info = redis::command(node, &["INFO", "persistence"])?;
                    if redis::field(&info, "rdb_bgsave_in_progress") == Some("0") {
                        if redis::field(&info, "rdb_last_bgsave_status") != Some("ok") {
                            return Err("BGSAVE failed".to_owned());
                        }
                        notes.note(SNAPSHOT_ENDS);
                        let stats = redis::command(node, &["INFO", "stats"])?;
                        let number =
                            |info: &str, name: &str| redis::field(info, name).and_then(|text| text.parse::<f64>().ok());
                        let fork = number(&stats, "latest_fork_usec");
                        let copied = number(&info, "rdb_last_cow_size");
                        return Ok(fork
                            .map(|us| Finding::new("fork stall, as the server says", us, Unit::Time))
                            .into_iter()
                            .chain(
                                copied.map(|bytes| {
                                    Finding::new("copied on write, as the server says", bytes, Unit::Bytes)
                                }),
                            )
                            .collect());
                    }
                    if notes.over() {
                        return Err("the run ended before the snapshot: pass more --seconds".to_owned());
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            Control::Generation { program, config } => {
                notes.note(SNAPSHOT_BEGINS);
                let output = Command::new(program)
                    .args(["snapshot", "now", "--config"])
                    .arg(config)
                    .output()
                    .map_err(|error| error.to_string())?;
                notes.note(SNAPSHOT_ENDS);
                if output.status.success() {
                    Ok(Vec::new())
                } else {
                    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
                }
            }
            _ => Err("takes no snapshot on command".to_owned()),
        }
    }

    fn unable(&self, message: &str) -> PeerError {
        PeerError::Unable {
            name: self.name.clone(),
            message: message.to_owned(),
        }
    }
}

/// What [`Server::snapshot`] notes.
pub const SNAPSHOT_BEGINS: &str = "snapshot begins";
/// What [`Server::snapshot`] notes.
pub const SNAPSHOT_ENDS: &str = "snapshot ends";

/// Sends a signal to a process; one that has gone is left alone.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        // It may have ended by itself; whoever waits for it sees that.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for child in &self.processes {
            signal(child.id(), rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if self
                .processes
                .iter_mut()
                .all(|child| !matches!(child.try_wait(), Ok(None)))
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for child in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn directory() -> Result<tempfile::TempDir, PeerError> {
    tempfile::tempdir().map_err(PeerError::system("cannot make a directory for a server"))
}

/// A directory for what a server must write: below `parent`, else in memory where the system has that.
fn files_directory(parent: Option<&Path>) -> Result<tempfile::TempDir, PeerError> {
    match parent {
        Some(parent) => tempfile::tempdir_in(parent).map_err(PeerError::system(parent.display().to_string())),
        None => tempfile::tempdir_in("/dev/shm").or_else(|_| directory()),
    }
}

/// Where files are, for a reader who must know whether a sync reaches a device.
fn medium(directory: &Path) -> String {
    match system::filesystem(directory).as_deref() {
        Some("tmpfs" | "ramfs") => "its files in memory: a sync costs no device".to_owned(),
        Some(kind) => format!("its files on {kind}"),
        None => "its files on an unknown file system".to_owned(),
    }
}

fn certificates(kind: Kind, directory: &Path) -> Result<Option<Certificates>, PeerError> {
    kind.tls().then(|| Certificates::make(directory)).transpose()
}

fn tls_files(certificates: Option<&Certificates>) -> Option<TlsFiles> {
    certificates.map(|made| TlsFiles {
        ca: made.ca.clone(),
        identity: None,
        server_name: None,
    })
}

/// A command that dies with this thread and is pinned to `cpus`.
fn supervised(program: &Path, cpus: &[usize]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if !cpus.is_empty() {
        let list = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        command.args(["taskset", "-c", &list]);
    }
    command.arg(program);
    command
}

fn memcached_arguments(
    command: &mut Command,
    port: u16,
    threads: usize,
    memory_mib: u64,
    certificates: Option<&Certificates>,
) {
    command.args(["-l", "127.0.0.1", "-p", &port.to_string(), "-U", "0", "-c", "4096"]);
    command.args(["-t", &threads.to_string(), "-m", &memory_mib.to_string(), "-u", "root"]);
    if let Some(certificates) = certificates {
        let files = format!(
            "ssl_chain_cert={},ssl_key={}",
            certificates.certificate.display(),
            certificates.key.display()
        );
        command.args(["-Z", "-o", &files]);
    }
}

fn version(program: &Path) -> String {
    Command::new(program)
        .arg("--version")
        .output()
        .ok()
        .and_then(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .map(str::to_owned)
        })
        .unwrap_or_default()
}

/// A port nobody listens on at present. Another process may take it before the server does; then the server
/// says so.
fn free_port() -> Result<u16, PeerError> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| Ok(listener.local_addr()?.port()))
        .map_err(PeerError::system("cannot find a free port"))
}
