//! The command line: what is asked, translated into the library's settings.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::compare::Row;
use crate::engine::{Mode, RunSettings};
use crate::peers::{Durability, Kind};
use crate::schedule::{Arrival, LatenessLimit};
use crate::workload::{KeyDistribution, Mix, SizeDistribution, TraceFormat, WorkloadSpec};

const EXAMPLES: &str = "Examples:
  generation-bench                                              the canonical workload against a node of its own
  generation-bench compare --peers redis,memcached --seconds 3  ratios against peers that it starts itself
  generation-bench compare --scenario snapshot --peers redis     the tail while a snapshot is taken
  generation-bench compare --scenario failover --peers etcd      service while a node is killed
  generation-bench run --target redis --rate 20000 --report out.html
  generation-bench run --target generation --closed --connections 50 --depth 64 --mix get
  generation-bench run --trace web.trace.xz --trace-format u32be --refill --mix get
  generation-bench sweep --target memcached --addr 127.0.0.1:11211 --bound 1ms
  generation-bench diff before.json after.json

Exit codes: 0 ok, 1 the run is invalid, 2 usage, 5 a server could not be reached, started or was lost.";

/// Latency benchmark of Generation and its peers.
///
/// Latency counts from the moment an operation was meant to be sent (open loop), so a stalled server cannot hide
/// its stall. A run in which the generator itself fell behind is marked invalid.
#[derive(Debug, Parser)]
#[command(name = "generation-bench", version, about, long_about, max_term_width = 120, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do; without one, the canonical workload runs against a node of its own.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one workload against one running server.
    Run(RunArgs),
    /// Start servers and measure them in alternating rounds.
    Compare(CompareArgs),
    /// Find the highest rate at which the 99.9th percentile stays under a bound.
    Sweep(SweepArgs),
    /// Run the canonical workload (also without any argument): 90 % reads, 10 % writes, zipf, 50,000/s.
    Canonical(CanonicalArgs),
    /// Show what changed between two JSON reports.
    Diff {
        /// The earlier report.
        before: PathBuf,
        /// The later report.
        after: PathBuf,
    },
    /// Draw a JSON report as a page.
    Report {
        /// The report.
        json: PathBuf,
        /// The page.
        html: PathBuf,
    },
}

/// Kind of a running server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum TargetKind {
    /// Redis or Valkey.
    Redis,
    /// Memcached.
    Memcached,
    /// Generation, found through --config.
    Generation,
    /// etcd.
    Etcd,
}

impl TargetKind {
    /// Where such a server listens if nobody says otherwise.
    const fn default_addr(self) -> &'static str {
        match self {
            Self::Redis => "127.0.0.1:6379",
            Self::Memcached => "127.0.0.1:11211",
            Self::Generation => "127.0.0.1:7400",
            Self::Etcd => "127.0.0.1:2379",
        }
    }
}

/// Which server, and how to reach it.
#[derive(Clone, Debug, Args)]
pub struct TargetArgs {
    /// Kind of server
    #[arg(long, default_value = "redis")]
    pub target: TargetKind,
    /// Its address [default: the usual port on this machine]; several for the members of an etcd
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub addr: Vec<String>,
    /// The client configuration that `generation dev` writes
    #[arg(long, value_name = "FILE", default_value = ".generation/client.toml")]
    pub config: PathBuf,
    /// Ask for the slots and speak to every master (redis)
    #[arg(long)]
    pub cluster: bool,
    /// Speak TLS and trust this authority (PEM)
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The client's certificate chain (PEM), where the server asks for one
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The client's key (PEM)
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Name in the server's certificate, if it is not the address
    #[arg(long, value_name = "NAME", requires = "ca")]
    pub server_name: Option<String>,
    /// Process ids of the server, to measure its processor time
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub server_pid: Vec<u32>,
}

impl TargetArgs {
    /// The addresses given, else the usual one.
    pub fn addrs(&self) -> Vec<String> {
        if self.addr.is_empty() {
            vec![self.target.default_addr().to_owned()]
        } else {
            self.addr.clone()
        }
    }
}

/// What is asked.
#[derive(Clone, Debug, Args)]
pub struct WorkloadArgs {
    /// Operations and their weights: get, put, cas, incr, multiget
    #[arg(long, value_name = "MIX", default_value = "get=90,put=10")]
    pub mix: Mix,
    /// Number of keys
    #[arg(long, default_value_t = 1_000_000)]
    pub keys: u64,
    /// uniform, zipf:THETA, hotspot:KEYS:OPERATIONS or sequential
    #[arg(long, value_name = "LAW", default_value = "uniform")]
    pub distribution: KeyDistribution,
    /// Length of a key in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 16)]
    pub key_len: usize,
    /// Value sizes: 100, 50-500 or `lognormal:MEDIAN:SIGMA[:MAX]`
    #[arg(long, value_name = "SIZES", default_value = "100")]
    pub value_size: SizeDistribution,
    /// Time to live of every write, such as 30s
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub ttl: Option<Duration>,
    /// Keys in one multi-get
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub multiget_keys: usize,
    /// Write a key after a read has missed it, as an application in front of a database does
    #[arg(long)]
    pub refill: bool,
    /// Replay a trace instead of drawing keys (.gz, .zst, .xz are decompressed)
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Format of the trace, if its name does not tell
    #[arg(long, value_name = "FORMAT", requires = "trace")]
    pub trace_format: Option<TraceFormat>,
    /// Seed of every random choice
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

impl WorkloadArgs {
    /// The workload they describe.
    pub fn spec(&self) -> WorkloadSpec {
        WorkloadSpec {
            mix: self.mix,
            keys: self.keys,
            distribution: self.distribution.clone(),
            key_len: self.key_len,
            value_size: self.value_size.clone(),
            ttl_ms: self
                .ttl
                .map_or(0, |ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
            multiget_keys: self.multiget_keys,
            refill: self.refill,
            trace: self.trace.clone(),
            trace_format: self.trace_format,
            seed: self.seed,
        }
    }
}

/// How it is asked.
#[derive(Clone, Debug, Args)]
pub struct LoadArgs {
    /// Operations a second, sent on schedule whatever the server does (open loop)
    #[arg(long, value_name = "N", default_value_t = 10_000.0)]
    pub rate: f64,
    /// How arrivals are spaced
    #[arg(long, default_value = "poisson")]
    pub arrival: Arrival,
    /// Send when replies come back instead (closed loop): batches of --depth on each connection
    #[arg(long)]
    pub closed: bool,
    /// Operations on each connection in a closed loop
    #[arg(long, value_name = "N", default_value_t = 1, requires = "closed")]
    pub depth: u32,
    /// One reply lets one operation go, instead of whole batches
    #[arg(long, requires = "closed")]
    pub window: bool,
    /// Connections
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub connections: usize,
    /// Generator threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,
    /// CPUs to pin the generator to
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pub client_cpus: Vec<usize>,
    /// Measured seconds
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    pub seconds: f64,
    /// Seconds before measuring
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub warmup: f64,
    /// Seconds of one interval of the timeline
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub interval: f64,
    /// Seconds to wait for the last replies
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    pub drain: f64,
    /// Sleep in the kernel between sends instead of polling: for a machine the generator shares with the server
    #[arg(long)]
    pub park: bool,
    /// A send later than this is late, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1.0)]
    pub late_after: f64,
    /// Share of late sends that makes a run invalid, in per cent
    #[arg(long, value_name = "PER CENT", default_value_t = 1.0)]
    pub late_limit: f64,
    /// Most unanswered operations of a thread in an open loop
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub max_in_flight: usize,
}

/// Seconds from the command line; nonsense becomes zero, which validation refuses where it matters.
pub fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::ZERO)
}

impl LoadArgs {
    /// The settings they describe.
    pub fn settings(&self) -> RunSettings {
        let mode = if self.closed {
            Mode::Closed {
                depth: self.depth,
                window: self.window,
            }
        } else {
            Mode::Open {
                rate_per_s: self.rate,
                arrival: self.arrival,
            }
        };
        RunSettings {
            mode,
            connections: self.connections,
            threads: self.threads,
            client_cpus: self.client_cpus.clone(),
            warmup: seconds(self.warmup),
            duration: seconds(self.seconds),
            interval: seconds(self.interval),
            drain: seconds(self.drain),
            spin: !self.park,
            lateness: LatenessLimit {
                late_after_ns: crate::clock::duration_ns(seconds(self.late_after / 1e3)),
                max_share: self.late_limit / 100.0,
            },
            max_in_flight: self.max_in_flight,
            operations: None,
        }
    }
}

/// Where results go.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Write everything as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw it as one self-contained page
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write the intervals as an HDR histogram log (V2)
    #[arg(long, value_name = "FILE")]
    pub hdr_log: Option<PathBuf>,
    /// No progress while it runs
    #[arg(long)]
    pub quiet: bool,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Which server.
    #[command(flatten)]
    pub target: TargetArgs,
    /// What is asked.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// How it is asked.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Where results go.
    #[command(flatten)]
    pub output: OutputArgs,
    /// Do not write the data set first
    #[arg(long)]
    pub no_load: bool,
}

/// Arguments of `canonical`.
#[derive(Debug, Default, Args)]
pub struct CanonicalArgs {
    /// The generation program [default: beside this one, else built by cargo]
    #[arg(long, value_name = "FILE")]
    pub generation_bin: Option<PathBuf>,
    /// Write everything as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw it as one self-contained page
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// Arguments of `sweep`.
#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Which server.
    #[command(flatten)]
    pub target: TargetArgs,
    /// What is asked.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// How it is asked.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Where results go.
    #[command(flatten)]
    pub output: OutputArgs,
    /// The 99.9th percentile must stay under it
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "1ms")]
    pub bound: Duration,
    /// No rate above it is tried
    #[arg(long, value_name = "N", default_value_t = 10_000_000.0)]
    pub max_rate: f64,
    /// Gap between a good and a bad rate at which to stop, in per cent
    #[arg(long, value_name = "PER CENT", default_value_t = 5.0)]
    pub precision: f64,
    /// Do not write the data set first
    #[arg(long)]
    pub no_load: bool,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// What is compared
    #[arg(long, default_value = "single")]
    pub scenario: Scenario,
    /// Servers to compare with; in the scenario `single` each comes plaintext and with TLS [default: those usual for the scenario]
    #[arg(long, value_delimiter = ',')]
    pub peers: Vec<Kind>,
    /// Rows to measure, such as get:50x64,put:1x1 (operation:connections x operations written at once)
    #[arg(long, value_delimiter = ',')]
    pub rows: Vec<Row>,
    /// Rounds of each row
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rounds: usize,
    /// Measured seconds of one run [default: 3; snapshot and failover: 30]
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Seconds before measuring
    #[arg(long, value_name = "S", default_value_t = 0.5)]
    pub warmup: f64,
    /// Operations a second of the open loop [default: snapshot 10,000, failover 2,000]
    #[arg(long, value_name = "N")]
    pub rate: Option<f64>,
    /// Operations of the scenario snapshot
    #[arg(long, value_name = "MIX", default_value = "get=90,put=10")]
    pub mix: Mix,
    /// Number of keys
    #[arg(long, default_value_t = 1_000_000)]
    pub keys: u64,
    /// Value sizes
    #[arg(long, value_name = "SIZES", default_value = "100")]
    pub value_size: SizeDistribution,
    /// uniform, zipf:THETA, hotspot:KEYS:OPERATIONS or sequential
    #[arg(long, value_name = "LAW", default_value = "uniform")]
    pub distribution: KeyDistribution,
    /// CPUs of the servers [default: the first]
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pub server_cpus: Vec<usize>,
    /// CPU of the client [default: the last]
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pub client_cpus: Vec<usize>,
    /// The generation program [default: beside this one, else built by cargo]
    #[arg(long, value_name = "FILE")]
    pub generation_bin: Option<PathBuf>,
    /// Further arguments of `generation dev`, such as --generation-args=--shards=4
    #[arg(long, value_name = "ARGS", value_delimiter = ' ', allow_hyphen_values = true)]
    pub generation_args: Vec<String>,
    /// What generation does with a write before it acknowledges it [default: memory, as Redis and memcached are started; sync in
    /// replicated and failover, as etcd]
    #[arg(long, value_name = "LEVEL")]
    pub durability: Option<Durability>,
    /// Directory for the files of servers that sync [default: in memory (/dev/shm), so that no disk is measured]
    #[arg(long, value_name = "DIR")]
    pub files: Option<PathBuf>,
    /// Memory given to each server, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2_048)]
    pub memory: u64,
    /// Compare the peers among themselves; the first is the baseline
    #[arg(long)]
    pub without_generation: bool,
    /// Where results go.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// One server, one core: reads and writes at several depths
    Single,
    /// Resident bytes per entry
    Footprint,
    /// Three nodes: reads and writes that a majority (Redis: one node) must have seen
    Replicated,
    /// The tail of the latency while a snapshot is taken
    Snapshot,
    /// Service while a node is killed, and acknowledged writes afterwards
    Failover,
}

impl Scenario {
    /// Peers of the scenario if none are named.
    pub fn default_peers(self) -> Vec<Kind> {
        match self {
            Self::Single | Self::Footprint => vec![Kind::Redis, Kind::Memcached],
            Self::Replicated | Self::Failover => vec![Kind::Etcd, Kind::GenerationMemory, Kind::Redis],
            Self::Snapshot => vec![Kind::Redis],
        }
    }

    /// Durability of Generation if none is given: that of the peers it stands beside.
    pub const fn default_durability(self) -> Durability {
        match self {
            Self::Single | Self::Footprint | Self::Snapshot => Durability::Memory,
            Self::Replicated | Self::Failover => Durability::Sync,
        }
    }

    /// Nodes of each server.
    pub const fn nodes(self) -> usize {
        match self {
            Self::Replicated | Self::Failover => 3,
            Self::Single | Self::Footprint | Self::Snapshot => 1,
        }
    }

    /// Measured seconds of a run if none are given.
    pub const fn default_seconds(self) -> f64 {
        match self {
            Self::Single | Self::Footprint | Self::Replicated => 3.0,
            Self::Snapshot | Self::Failover => 30.0,
        }
    }

    /// Operations a second of an open loop if none are given.
    pub const fn default_rate(self) -> f64 {
        match self {
            Self::Failover => 2_000.0,
            _ => 10_000.0,
        }
    }
}
