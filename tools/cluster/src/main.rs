//! `generation-cluster-load`: a cluster of processes on this machine, a load, a script of events, and what service there was meanwhile.
//!
//! ```text
//! files ─▶ nodes (processes) ◀─ events (kill, start, restart, freeze, reconnect)
//!            ▲       ▲   ▲
//!   load ────┘ probe ┘   └ observe          report: text, JSON, page
//! ```
//!
//! It starts what it measures, so its figures are of this machine: many nodes share few processors here. What it proves anywhere is that
//! nothing acknowledged is lost.

#![forbid(unsafe_code)]

mod events;
mod files;
mod nodes;
mod observe;
mod probe;
mod report;
mod script;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use generation_bench::engine::{Mode, Notes, RunContext, RunSettings, run};
use generation_bench::peers::generation_program;
use generation_bench::result::RunResult;
use generation_bench::schedule::Arrival;
use generation_bench::system::{Environment, Probe as _, ProcessProbe};
use generation_bench::target::cluster::ClusterConnector;
use generation_bench::target::generation::GenerationConnector;
use generation_bench::workload::{Mix, SizeDistribution, WorkloadSpec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use events::{Happened, Stage, play};
use nodes::Nodes;
use probe::{Prober, block_on, lost};
use report::{Measured, Report, Settling, Startup};
use script::{Script, ScriptError, Whole};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long the cluster may take to be whole, at the beginning and at the end.
const PATIENCE: Duration = Duration::from_mins(2);
/// How long even leaders are waited for.
const EVEN: Duration = Duration::from_secs(20);
/// How long the idle cluster is watched.
const IDLE: Duration = Duration::from_secs(2);

/// Starts a cluster on this machine, loads it, does things to it, and reports what service it gave meanwhile.
#[derive(Debug, Parser)]
#[command(
    name = "generation-cluster-load",
    version,
    max_term_width = 100,
    after_help = "Examples:\n  \
        generation-cluster-load --print-script > storm.toml    # a documented script to begin with\n  \
        generation-cluster-load --script storm.toml --html storm.html\n\n\
        Exit codes: 0 good, 1 an acknowledged write is lost or an event could not be carried out, 2 usage, 5 the cluster does not run."
)]
struct Args {
    /// What to do (TOML) [default: the load alone, on five nodes].
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Print the documented default script and exit.
    #[arg(long)]
    print_script: bool,
    /// Check the script and exit.
    #[arg(long)]
    check: bool,
    /// The program to test [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    generation_bin: Option<PathBuf>,
    /// Directory for the nodes' files, kept afterwards; it must be new or empty [default: a temporary one].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as a page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The script.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// A file, a port, a thread.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The program that is tested does not do what it should.
    #[error("{0}")]
    Program(String),
    /// A client was not served.
    #[error("{0}")]
    Client(String),
    /// A client did not get in.
    #[error(transparent)]
    Connect(#[from] generation_client::ConnectError),
    /// The load.
    #[error(transparent)]
    Bench(#[from] generation_bench::BenchError),
    /// The page.
    #[error("the page cannot be drawn: {0}")]
    Page(String),
}

impl LoadError {
    /// What the system said when this was tried.
    pub(crate) fn system(what: &str) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let what = what.to_owned();
        |error| Self::System { what, error }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match perform(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(match error {
                LoadError::Script(_) | LoadError::System { .. } => 2,
                _ => 5,
            })
        }
    }
}

/// Does what the command line asks for; whether the outcome is good.
fn perform(args: &Args) -> Result<bool, LoadError> {
    if args.print_script {
        print!("{}", script::DEFAULT);
        return Ok(true);
    }
    let script = args
        .script
        .as_deref()
        .map(Script::load)
        .transpose()?
        .unwrap_or_default();
    if args.check {
        println!("good: {} events in {:?}", script.events.len(), script.duration);
        return Ok(true);
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The first signal ends the load and reports what there is; the second ends the program, and the nodes with it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(LoadError::system("cannot catch signals"))?;
    }
    more_files();
    let program = generation_program(args.generation_bin.as_deref()).map_err(generation_bench::BenchError::from)?;
    let program = program
        .canonicalize()
        .map_err(LoadError::system(&program.display().to_string()))?;
    let temporary;
    let directory = if let Some(directory) = &args.data {
        std::fs::create_dir_all(directory).map_err(LoadError::system(&directory.display().to_string()))?;
        directory.as_path()
    } else {
        temporary = tempfile::tempdir().map_err(LoadError::system("there is no temporary directory"))?;
        temporary.path()
    };
    let report = measure(script, directory, &program, &stop)?;
    print!("{}", report.text());
    if let Some(path) = &args.json {
        let json = serde_json::to_vec_pretty(&report).map_err(|error| LoadError::Page(error.to_string()))?;
        std::fs::write(path, json).map_err(LoadError::system(&path.display().to_string()))?;
    }
    if let Some(path) = &args.html {
        let page = report.html().map_err(LoadError::Page)?;
        std::fs::write(path, page).map_err(LoadError::system(&path.display().to_string()))?;
    }
    Ok(report.is_good())
}

/// Raises the limit on open files as far as it may be: each client has a socket.
fn more_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where that is refused, fewer clients connect, and the report says so.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// Starts a cluster and brings it to where every node serves and every shard has all its replicas. Today all nodes are in one list
/// that each of them has; where nodes join one by one, it is done here.
fn start(nodes: &Nodes, whole: Whole, client: &Path) -> Result<Startup, LoadError> {
    let began = Instant::now();
    let ids = nodes.ids();
    nodes.start(&ids)?;
    let serving_ms = began.elapsed().as_secs_f64() * 1e3;
    observe::wait_until_whole(client, whole, PATIENCE)?;
    Ok(Startup {
        serving_ms,
        whole_ms: began.elapsed().as_secs_f64() * 1e3,
    })
}

fn measure(script: Script, directory: &Path, program: &Path, stop: &AtomicBool) -> Result<Report, LoadError> {
    let environment = Environment::capture();
    let plan = files::write(directory, program, &script)?;
    let client = plan.client;
    let nodes = Nodes::new(program.to_owned(), plan.nodes)?;
    let startup = start(&nodes, script.cluster.whole(), &client)?;
    observe::wait_until_even(&client, EVEN)?;
    let leaders_before = observe::leaders(&client)?;
    let idle_cpu = idle_cpu(&nodes);
    let began = Instant::now();
    let writers = Prober::start(client.clone(), script.cluster.shards, script.probe.clone(), began)?;
    let outcome = under_load(&script, &nodes, &client, began, stop);
    let probes = writers.finish()?;
    let (events, load) = outcome?;
    // Whatever was left stopped: what was acknowledged is looked for on a whole cluster.
    let ended = Instant::now();
    let running: Vec<u64> = nodes.running().into_iter().map(|(id, _)| id).collect();
    let stopped: Vec<u64> = nodes.ids().into_iter().filter(|id| !running.contains(id)).collect();
    nodes.start(&stopped)?;
    observe::wait_until_whole(&client, script.cluster.whole(), PATIENCE)?;
    let whole_ms = ended.elapsed().as_secs_f64() * 1e3;
    let even = observe::wait_until_even(&client, EVEN)?;
    let keeps = script.cluster.policy == "no-evict";
    let lost = keeps.then(|| block_on(lost(&client, &probes))).transpose()?;
    let leaders = [leaders_before, observe::leaders(&client)?];
    let gossip_bytes = observe::gossip_bytes(&client)?;
    nodes.stop(&nodes.ids());
    Ok(Report::from(Measured {
        environment,
        script,
        startup,
        idle_cpu,
        events,
        probes,
        lost,
        leaders,
        settling: Settling {
            whole_ms,
            even_ms: even.map(|even| even.as_secs_f64() * 1e3),
        },
        gossip_bytes,
        load,
    }))
}

/// Each node's CPU while nobody asks for anything.
fn idle_cpu(nodes: &Nodes) -> BTreeMap<u64, f64> {
    let used = || -> BTreeMap<u64, u64> {
        let used = |(id, pid)| Some((id, ProcessProbe { pids: vec![pid] }.sample()?.cpu_ns));
        nodes.running().into_iter().filter_map(used).collect()
    };
    let (before, began) = (used(), Instant::now());
    std::thread::sleep(IDLE);
    let (after, lasted) = (used(), began.elapsed());
    let share = |(id, ns): (u64, u64)| {
        let since = ns.saturating_sub(*before.get(&id)?);
        Some((id, since as f64 / lasted.as_nanos() as f64))
    };
    after.into_iter().filter_map(share).collect()
}

/// The time of the bench's run.
impl Stage for Notes<'_> {
    fn wait_until(&self, at: Duration) -> bool {
        Notes::wait_until(self, at.as_secs_f64())
    }

    fn now_s(&self) -> f64 {
        Notes::now_s(self)
    }

    fn note(&self, text: &str) {
        Notes::note(self, text);
    }
}

/// The time since the beginning, where there is no load.
struct Quiet<'a> {
    began: Instant,
    stop: &'a AtomicBool,
}

impl Stage for Quiet<'_> {
    fn wait_until(&self, at: Duration) -> bool {
        while !self.stop.load(Ordering::Relaxed) {
            let left = at.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
        false
    }

    fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn note(&self, _text: &str) {}
}

/// Carries out the events under load, and waits for its end.
fn under_load(
    script: &Script,
    nodes: &Nodes,
    client: &Path,
    began: Instant,
    stop: &AtomicBool,
) -> Result<(Vec<Happened>, Option<RunResult>), LoadError> {
    if script.load.rate == 0.0 {
        let stage = Quiet { began, stop };
        let happened = play(script, nodes, client, &stage);
        stage.wait_until(script.duration);
        return Ok((happened, None));
    }
    let connector = ClusterConnector {
        cluster: Arc::new(GenerationConnector {
            config: client.to_owned(),
        }),
    };
    let (reads, writes) = (script.load.reads, 100 - script.load.reads);
    let workload = WorkloadSpec {
        mix: format!("get={reads},put={writes}")
            .parse::<Mix>()
            .map_err(generation_bench::BenchError::Settings)?,
        keys: script.load.keys,
        value_size: SizeDistribution::Fixed {
            bytes: script.load.value,
        },
        ..WorkloadSpec::default()
    };
    let settings = RunSettings {
        mode: Mode::Open {
            rate_per_s: script.load.rate,
            arrival: Arrival::Poisson,
        },
        connections: script.load.connections,
        warmup: Duration::ZERO,
        duration: script.duration,
        interval: Duration::from_millis(200),
        // Many nodes share few processors with it.
        spin: false,
        ..RunSettings::default()
    };
    let happened = Mutex::new(Vec::new());
    let mut progress = |_| ();
    let context = RunContext {
        stop,
        probe: None,
        progress: &mut progress,
        script: Some(Box::new(|notes: &Notes<'_>| {
            let all = play(script, nodes, client, notes);
            *happened.lock().unwrap_or_else(PoisonError::into_inner) = all;
        })),
        keep_operations: false,
    };
    let mut result = run(&connector, &workload, &settings, context)?;
    "cluster".clone_into(&mut result.target);
    Ok((
        happened.into_inner().unwrap_or_else(PoisonError::into_inner),
        Some(result),
    ))
}
