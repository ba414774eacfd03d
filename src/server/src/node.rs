//! One node of this process: from a checked configuration to running cores, and from a request to stop to their end.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use generation_node::env::CoreId;
use generation_node::peers::{PeerLimits, PeersConfig};
use generation_node::{Authorize, CoreConfig, NodeLimits, Policy, ShardConfig};
use generation_quic::{ClientCrypto, ServerCrypto};

use crate::config::{self, Config, ConfigError};
use crate::env::Shared;
use crate::executors::{ExecutorError, Executors};
use crate::net::port::{self, PortError};
use crate::preflight::{self, PreflightError};
use crate::tls::identity::{Identity, Role};
use crate::tls::load::{Certificates, LoadError};

/// Why a node did not start, or how it ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] LoadError),
    /// TLS refuses its own configuration.
    #[error("TLS cannot be set up: {0}")]
    Crypto(String),
    /// The machine lacks something.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The data directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The executors.
    #[error(transparent)]
    Executors(#[from] ExecutorError),
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Another process serves from it.
    #[error("{} is in use by the process with id {pid}; stop that one, or name another directory", .path.display())]
    Held {
        /// The directory.
        path: PathBuf,
        /// The process, as it wrote itself down.
        pid: String,
    },
    /// It cannot be written.
    #[error("{}: {error}; the user that runs the server must be able to write there, or set another data directory", .path.display())]
    NotWritable {
        /// The directory or the file in it.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The identity's file holds something else.
    #[error("{}: `{text}` is not an identity of 32 hexadecimal digits; restore the file, or remove the whole directory", .path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The epoch's file holds something else.
    #[error("{}: `{text}` is not an epoch; restore the file, or remove it if no client has seen this node", .path.display())]
    Epoch {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

/// A data directory that this process holds. Let go when dropped, and by the system when the process dies.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    _lock: File,
}

impl DataDirectory {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory if it does not exist, and locks it.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| DirectoryError::NotWritable { path, error }
        };
        fs::create_dir_all(path).map_err(at(path))?;
        let file = path.join("lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .map_err(at(&file))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = fs::read_to_string(&file).unwrap_or_default();
                let pid = pid.trim();
                let pid = if pid.is_empty() { "unknown" } else { pid }.to_owned();
                return Err(DirectoryError::Held {
                    path: path.to_owned(),
                    pid,
                });
            }
            Err(TryLockError::Error(error)) => return Err(at(&file)(error)),
        }
        lock.set_len(0).map_err(at(&file))?;
        writeln!(lock, "{}", std::process::id()).map_err(at(&file))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Takes the next epoch: larger than any before, durably. A node begins with empty shards, and clients must not take its
    /// map for the one they know.
    pub fn next_epoch(&self) -> Result<u32, DirectoryError> {
        let path = self.path.join("epoch");
        let failure = |error| DirectoryError::NotWritable {
            path: path.clone(),
            error,
        };
        let last: u32 = match fs::read_to_string(&path) {
            Ok(text) => {
                let text = text.trim();
                text.parse().map_err(|_| DirectoryError::Epoch {
                    path: path.clone(),
                    text: text.to_owned(),
                })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(failure(error)),
        };
        // Seconds since the epoch as a floor: a directory that was thrown away and made again does not start over.
        let now_s = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let epoch = last.saturating_add(1).max(u32::try_from(now_s).unwrap_or(0));
        self.keep(&path, &epoch.to_string())?;
        Ok(epoch)
    }

    /// The directory's own identity, drawn when it was made. Other nodes see by it that a node has lost what it had.
    pub fn identity(&self) -> Result<u128, DirectoryError> {
        let path = self.path.join("identity");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let digits = text.trim();
                let identity = u128::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 32);
                identity.ok_or_else(|| DirectoryError::Identity {
                    path: path.clone(),
                    text: digits.to_owned(),
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut bytes = [0; 16];
                let drawn = getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()));
                drawn.map_err(|error| DirectoryError::NotWritable {
                    path: path.clone(),
                    error,
                })?;
                let identity = u128::from_le_bytes(bytes);
                self.keep(&path, &format!("{identity:032x}"))?;
                Ok(identity)
            }
            Err(error) => Err(DirectoryError::NotWritable { path, error }),
        }
    }

    /// Writes a file of one line durably, in place of the one before.
    fn keep(&self, path: &Path, line: &str) -> Result<(), DirectoryError> {
        let failure = |error| DirectoryError::NotWritable {
            path: path.to_owned(),
            error,
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.path).map_err(failure)?;
        writeln!(file, "{line}").map_err(failure)?;
        file.as_file().sync_all().map_err(failure)?;
        file.persist(path).map_err(|error| failure(error.error))?;
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failure)
    }
}

/// A node that runs.
pub struct Node {
    /// Who it is.
    pub identity: Identity,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificates, for reloading them.
    pub certificates: Arc<Certificates>,
    executors: Executors<()>,
    _directory: DataDirectory,
}

impl Node {
    /// Checks what the machine must have and starts the node. It serves when this returns. `directory` is the data
    /// directory if the caller holds it already. `ended` is called, on any thread, for
    /// each core that has ended.
    pub fn start(
        config: &Config,
        directory: Option<DataDirectory>,
        ended: impl Fn(CoreId) + Clone + Send + 'static,
    ) -> Result<Self, NodeError> {
        config.validate()?;
        let cores = config.cores_of(preflight::processors());
        preflight::check(config, cores)?;
        let certificates = Certificates::load(config.tls_files())?;
        let directory = match directory {
            Some(directory) => directory,
            None => DataDirectory::open(&config.data_dir)?,
        };
        let buffer_bytes = config.network.socket_buffer.as_u64() as usize;
        let port = port::open(config.listen, cores, buffer_bytes)?;
        let address = port.address;
        let start = (directory.next_epoch()?, directory.identity()?);
        let core = core_config(config, &certificates, address, start)?;
        let cpus: Option<Vec<usize>> = config.pin.then(|| {
            let cpus = config.cpus.clone().unwrap_or_else(preflight::cpus);
            cpus.into_iter().take(cores.into()).collect()
        });
        let executors = Executors::start(
            port,
            cpus.as_deref(),
            directory.path(),
            move |env| {
                let mut core = core.clone();
                core.mtu_discovery = !env.may_fragment();
                generation_node::run(env, core)
            },
            ended,
        )?;
        Ok(Self {
            identity: certificates.identity(),
            address,
            certificates,
            executors,
            _directory: directory,
        })
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        match self.identity.role {
            Role::Node(id) => id,
            Role::Client(_) | Role::Admin(_) => unreachable!("Certificates::load takes a node's only"),
        }
    }

    /// A handle to stop it from any thread.
    pub fn shared(&self) -> Arc<Shared> {
        self.executors.shared()
    }

    /// Waits until it has ended.
    pub fn join(self) -> Result<(), NodeError> {
        self.executors.join()?;
        Ok(())
    }
}

fn core_config(
    config: &Config,
    certificates: &Arc<Certificates>,
    address: SocketAddr,
    (epoch, directory): (u32, u128),
) -> Result<CoreConfig, NodeError> {
    let crypto = |error: &dyn std::fmt::Display| NodeError::Crypto(error.to_string());
    let tls = certificates
        .server_config(&[generation_proto::ALPN_CLIENT, generation_proto::ALPN_PEER])
        .map_err(|error| crypto(&error))?;
    let dialling = certificates
        .dialling_config(generation_proto::ALPN_PEER)
        .map_err(|error| crypto(&error))?;
    let Identity { cluster, role } = certificates.identity();
    let Role::Node(node) = role else {
        unreachable!("Certificates::load takes a node's only")
    };
    let shards = u64::from(config.shards);
    let (mut secret, mut seed, mut incarnation) = ([0; 32], [0; 16], [0; 8]);
    for bytes in [&mut secret[..], &mut seed[..], &mut incarnation[..]] {
        getrandom::fill(bytes).map_err(|error| crypto(&error))?;
    }
    let (low, high) = seed.split_at(8);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("invariant: eight bytes"));
    let max_value_bytes = config.limits.max_value.as_u64() as usize;
    let mut advertised = config.advertise.unwrap_or(config.listen);
    if config.advertise.is_none() {
        // The real port, where any was asked for.
        advertised.set_port(address.port());
    }
    Ok(CoreConfig {
        cluster: cluster.clone(),
        node,
        addr: advertised,
        shards: config.shards,
        epoch,
        replication: None,
        shard: ShardConfig {
            budget_bytes: config.memory.budget.as_u64() / shards,
            max_records: config.memory.max_records.map(|records| records / shards),
            policy: match config.memory.policy {
                config::Policy::Lru => Policy::Lru,
                config::Policy::S3Fifo => Policy::S3Fifo,
                config::Policy::NoEvict => Policy::NoEvict,
            },
            seed: [word(low), word(high)],
            max_value_bytes,
        },
        limits: generation_proto::Limits {
            max_value_len: max_value_bytes,
            ..generation_proto::Limits::default()
        },
        node_limits: NodeLimits {
            drain: config.limits.drain,
            ..NodeLimits::default()
        },
        quic_limits: generation_quic::Limits {
            connections: config.limits.connections_per_core,
            idle_timeout: config.limits.idle_timeout,
            ..generation_quic::Limits::default()
        },
        mtu_discovery: true,
        crypto: ServerCrypto::new(Arc::new(tls)).map_err(|error| crypto(&error))?,
        secret,
        authorize: authorize(cluster),
        peers: PeersConfig {
            nodes: Vec::new(),
            crypto: Some(ClientCrypto::new(Arc::new(dialling)).map_err(|error| crypto(&error))?),
            directory,
            // 0 would say that it is not known.
            incarnation: word(&incarnation) | 1,
            limits: PeerLimits::default(),
        },
        software: concat!("generation ", env!("CARGO_PKG_VERSION")).to_owned(),
    })
}

/// Who a peer is: whom its certificate names, if it names somebody of this cluster.
fn authorize(cluster: String) -> Authorize {
    Arc::new(move |certificates| {
        let own = certificates.first().ok_or("no certificate was shown")?;
        let identity =
            Identity::from_certificate(own).map_err(|error| format!("the certificate is no use here: {error}"))?;
        if identity.cluster != cluster {
            return Err(format!("{identity} is of another cluster than {cluster}"));
        }
        let (role, name) = match identity.role {
            Role::Node(id) => (generation_node::Role::Node, id.to_string()),
            Role::Client(name) => (generation_node::Role::Client, name),
            Role::Admin(name) => (generation_node::Role::Admin, name),
        };
        Ok(generation_node::Identity { role, name })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_by_one_and_its_epochs_grow() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let held = DataDirectory::open(&path).unwrap();
        let epochs: Vec<u32> = (0..3).map(|_| held.next_epoch().unwrap()).collect();
        assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
        let error = DataDirectory::open(&path).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(held);
        let held = DataDirectory::open(&path).unwrap();
        assert!(held.next_epoch().unwrap() > epochs[2]);
        let identity = held.identity().unwrap();
        assert_eq!(held.identity().unwrap(), identity);
        let other = DataDirectory::open(&directory.path().join("other")).unwrap();
        assert_ne!(other.identity().unwrap(), identity);
        fs::write(path.join("identity"), "12").unwrap();
        assert!(matches!(held.identity(), Err(DirectoryError::Identity { .. })));
        fs::write(path.join("epoch"), "x").unwrap();
        assert!(matches!(held.next_epoch(), Err(DirectoryError::Epoch { .. })));
    }
}
