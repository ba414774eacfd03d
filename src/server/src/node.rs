//! One node of this process: from a checked configuration to running cores, and from a request to stop to their end.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use generation_node::env::CoreId;
use generation_node::gossip::{Fact, Gossip, Place, Update};
use generation_node::peers::{PeerLimits, PeerNode, Peers, PeersConfig};
use generation_node::raft::journal::{IdentityError, OpenError, RecoveryError};
use generation_node::raft::replica::ReplicaError;
use generation_node::{
    Authorize, CoreConfig, Durability, Membership, NodeLimits, Policy, Replication, ShardConfig, StartError, Timing,
};
use generation_quic::{ClientCrypto, ServerCrypto};

use crate::config::{self, Config, ConfigError, JournalShare};
use crate::directory::{DataDirectory, DirectoryError};
use crate::env::Shared;
use crate::executors::{ExecutorError, Executors, StartFailure, core_directory};
use crate::gossip::keys::{KeyFileError, KeyRing};
use crate::gossip::{GossipError, UdpGossip};
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
    /// The gossip keys.
    #[error(transparent)]
    GossipKeys(#[from] KeyFileError),
    /// Gossip.
    #[error(transparent)]
    Gossip(#[from] GossipError),
    /// The data directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The executors.
    #[error(transparent)]
    Executors(#[from] ExecutorError),
    /// What a core keeps is of another cluster, node or release, or cannot be read or written.
    #[error("{}: {error}", .directory.display())]
    Core {
        /// The core's directory.
        directory: PathBuf,
        /// What it said.
        error: Box<StartError>,
    },
    /// What a core keeps is damaged.
    #[error(
        "{file}: {damage}; nothing was changed. Where the other nodes are a majority and whole, run \
         `generation repair --data-dir {directory} --discard {file}` and start this node again: its replicas join under new ids and are sent \
         everything. A node that is alone needs a copy of {directory} from before",
        file = .file.display(), directory = .directory.display()
    )]
    Damaged {
        /// The node's data directory.
        directory: PathBuf,
        /// The damaged file, or the directory it is missing from.
        file: PathBuf,
        /// What is wrong, and where.
        damage: String,
    },
}

impl NodeError {
    /// Why `core` of the node with this data directory was not opened.
    fn of_core(data: &Path, core: CoreId, error: StartError) -> Self {
        let own = core_directory(data, core);
        let damaged = |file: PathBuf, damage: String| Self::Damaged {
            directory: data.to_owned(),
            file,
            damage,
        };
        let core = |directory: PathBuf, error: StartError| Self::Core {
            directory,
            error: Box::new(error),
        };
        match error {
            StartError::Journal(OpenError::Corrupt {
                error: RecoveryError::ForeignJournal { .. } | RecoveryError::UnsupportedVersion { .. },
                ..
            }) => core(own, error),
            StartError::Journal(OpenError::Corrupt { file, error }) => damaged(own.join(file), error.to_string()),
            StartError::Journal(OpenError::Identity(error @ IdentityError::Damaged)) => {
                damaged(own.join("journal/identity"), error.to_string())
            }
            StartError::Replica(ReplicaError::Snapshots { shard, error }) if error.kind() == ErrorKind::InvalidData => {
                let own = own.join("snapshots");
                let verify = format!("`generation snapshot verify {}` names the file", own.display());
                damaged(
                    own,
                    format!("a snapshot of shard {shard} is damaged ({error}; {verify})"),
                )
            }
            error => core(own, error),
        }
    }
}

/// What was found good before anything is touched.
pub struct Prepared {
    /// The node's certificates.
    pub certificates: Arc<Certificates>,
    /// With how many cores it is to serve.
    cores: u16,
    /// What its journals take, if it has any.
    journal: Option<JournalShare>,
}

impl Prepared {
    /// Checks the configuration, the certificates, the gossip keys, and what the machine must have.
    pub fn new(config: &Config) -> Result<Self, NodeError> {
        config.validate()?;
        let certificates = Certificates::load(config.tls_files())?;
        let member = config.member(node_id(&certificates.identity()))?;
        let cores = member.map(|member| member.cores).or(config.cores);
        let cores = cores.unwrap_or_else(preflight::processors);
        preflight::check(config, cores)?;
        if let Some(path) = &config.gossip.key_file {
            KeyRing::load(path)?;
        }
        let journal = config
            .is_replicated()
            .then(|| config.journal_share(cores))
            .transpose()?;
        Ok(Self {
            certificates,
            cores,
            journal,
        })
    }
}

fn node_id(identity: &Identity) -> u64 {
    match identity.role {
        Role::Node(id) => id,
        Role::Client(_) | Role::Admin(_) => unreachable!("Certificates::load takes a node's only"),
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
    gossip: Option<Arc<UdpGossip>>,
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
        let Prepared {
            certificates,
            cores,
            journal,
        } = Prepared::new(config)?;
        let directory = match directory {
            Some(directory) => directory,
            None => DataDirectory::open(&config.data_dir)?,
        };
        directory.made_for(config.durability)?;
        let buffer_bytes = config.network.socket_buffer.as_u64() as usize;
        let port = port::open(config.listen, cores, buffer_bytes)?;
        let address = port.address;
        let identity = directory.identity()?;
        let clustered = !config.cluster.nodes.is_empty() || config.cluster.is_managed();
        let start = Start {
            epoch: match journal {
                None => directory.next_epoch(config.cluster.epoch)?,
                Some(_) if clustered => config.cluster.epoch,
                Some(_) => directory.first_epoch()?,
            },
            directory: identity,
            journal,
        };
        let mut core = core_config(config, &certificates, address, &start)?;
        let gossip = gossip(config, &directory, &core, address)?;
        core.gossip = gossip.clone().map(|gossip| -> Arc<dyn Gossip> { gossip });
        let cpus: Option<Vec<usize>> = config.pin.then(|| {
            let cpus = config.cpus.clone().unwrap_or_else(preflight::cpus);
            cpus.into_iter().take(cores.into()).collect()
        });
        let executors = Executors::open(
            port,
            cpus.as_deref(),
            directory.path(),
            move |env| {
                let mut core = core.clone();
                core.mtu_discovery = !env.may_fragment();
                let peers = Peers::new(&env, &core);
                async move { Ok(generation_node::open(env, core, peers).await?.run()) }
            },
            ended,
        );
        let executors = executors.map_err(|failure| match failure {
            StartFailure::Executor(error) => error.into(),
            StartFailure::Open { core, error } => NodeError::of_core(directory.path(), core, error),
        })?;
        if let Some(gossip) = &gossip {
            let shared = executors.shared();
            gossip.wake_with(move || shared.notify(GOSSIP_CORE));
        }
        Ok(Self {
            identity: certificates.identity(),
            address,
            certificates,
            gossip,
            executors,
            _directory: directory,
        })
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        node_id(&self.identity)
    }

    /// What it hears and tells beside its shards, if it gossips.
    pub fn gossip(&self) -> Option<&Arc<UdpGossip>> {
        self.gossip.as_ref()
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

/// The core that is woken when gossip has brought something.
const GOSSIP_CORE: CoreId = 0;

/// Starts gossip, if it is configured. The node tells where it is and which release it is of.
fn gossip(
    config: &Config,
    directory: &DataDirectory,
    core: &CoreConfig,
    address: SocketAddr,
) -> Result<Option<Arc<UdpGossip>>, NodeError> {
    if config.gossip.key_file.is_none() {
        return Ok(None);
    }
    let generation = directory.next_generation()?;
    let Some(settings) = config.gossip_settings(address, core.node, &core.cluster, generation) else {
        return Ok(None);
    };
    let gossip = UdpGossip::start(settings)?;
    let place = Place {
        addr: core.addr,
        zone: config.cluster.zone.clone(),
    };
    for fact in [Fact::Place(place), Fact::Release(core.software.clone())] {
        gossip.publish(Update::Tell(fact));
    }
    tracing::info!(address = %gossip.address(), generation, "gossiping");
    Ok(Some(Arc::new(gossip)))
}

/// What a start finds in, or takes from, the data directory.
struct Start {
    epoch: u32,
    /// Identity of the directory.
    directory: u128,
    journal: Option<JournalShare>,
}

fn core_config(
    config: &Config,
    certificates: &Arc<Certificates>,
    address: SocketAddr,
    start: &Start,
) -> Result<CoreConfig, NodeError> {
    let crypto = |error: &dyn std::fmt::Display| NodeError::Crypto(error.to_string());
    let tls = certificates
        .server_config(&[generation_proto::ALPN_CLIENT, generation_proto::ALPN_PEER])
        .map_err(|error| crypto(&error))?;
    let dialling = certificates
        .dialling_config(generation_proto::ALPN_PEER)
        .map_err(|error| crypto(&error))?;
    let identity = certificates.identity();
    let (node, cluster) = (node_id(&identity), identity.cluster);
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
    let others = config.cluster.nodes.iter().filter(|member| member.id != node);
    let others = others.map(|&config::Member { id, addr, cores }| PeerNode {
        id,
        addr,
        cores,
        directory: None,
    });
    let others = others.collect();
    Ok(CoreConfig {
        cluster: cluster.clone(),
        node,
        addr: advertised,
        shards: config.shards,
        epoch: start.epoch,
        replication: start.journal.map(|journal| Replication {
            // A node that is alone is a cluster by itself.
            cluster: config.cluster.id.unwrap_or(start.directory),
            durability: match config.durability {
                config::Durability::Sync => Durability::Sync,
                config::Durability::Memory => Durability::Memory,
            },
            segment_bytes: journal.segment_bytes,
            segments: journal.segments,
            snapshot_bytes: journal.snapshot_bytes,
            timing: Timing::default(),
            membership: if config.cluster.is_managed() {
                Membership::Managed {
                    zone: config.cluster.zone.clone(),
                }
            } else {
                Membership::Fixed
            },
        }),
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
            connections_per_address: config.limits.connections_per_address,
            session_window: config.sessions.window,
            session_idle: config.sessions.idle_timeout,
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
            nodes: others,
            crypto: Some(ClientCrypto::new(Arc::new(dialling)).map_err(|error| crypto(&error))?),
            directory: start.directory,
            // 0 would say that it is not known.
            incarnation: word(&incarnation) | 1,
            limits: PeerLimits::default(),
        },
        gossip: None,
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
