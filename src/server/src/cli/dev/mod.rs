//! `generation dev`: nodes to try things on, with throw-away certificates and a `client.toml` that finds them.
//!
//! Each node is a process of its own, `generation serve` with a configuration written here ([`files`], [`nodes`]), so that what is
//! tried on it is what runs elsewhere, and any of them can be killed. This process holds the directory, watches them, and takes
//! requests of other commands ([`control`]).

mod control;
mod files;
mod founding;
mod growing;
mod nodes;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Exit, Failure, Globals, serve};
use crate::config::{Durability, Log};
use crate::directory::DataDirectory;
use crate::logging;
use crate::node::NodeError;
use crate::preflight;
use control::{Answer, Asked, Request};
use files::NodePlan;
use founding::{Added, Founding};
use nodes::Running;

/// Most nodes that are started on one machine.
const MAX_NODES: u16 = 100;

/// Name of the cluster.
const CLUSTER: &str = "dev";
/// How long a node may take to stop before it is killed: what it waits for requests under way, and some more.
const STOP: Duration = Duration::from_millis(1_700);

/// Options of `generation dev`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
    generation dev                                   # one node, port 7400, runs until Ctrl-C\n  \
    generation dev --nodes 3                         # three nodes, of which any one may fail\n  \
    generation dev --cores 2 --memory 1GiB --json    # prints one JSON line when it accepts requests\n  \
    generation kv put greeting hello                 # in another terminal, in the same directory\n  \
    generation dev restart-node 1                    # in another terminal: end it if it runs, start it again\n  \
    generation dev add-node                          # in another terminal: one node more\n\n\
    Entries lie in the directory and are there again at the next start; with --durability memory they are gone with `generation dev`.\n\
    A directory is started with the nodes, cores, shards and durability that it was made with."
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<DevCommand>,
    /// Nodes to start. Each shard has replicas on three of them, on five where there are five, of which any minority may fail.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = number_of_nodes)]
    nodes: u16,
    /// Zones the nodes are dealt out to; 0: none.
    #[arg(long, value_name = "Z", default_value_t = 0)]
    zones: u16,
    /// What an acknowledged write has survived: it is on the disks of a majority of the nodes, or in their memory.
    #[arg(long, value_name = "sync|memory", default_value = "sync", value_parser = durability)]
    durability: Durability,
    /// Cores each node serves with.
    #[arg(long, value_name = "C", default_value_t = 1)]
    cores: u16,
    /// Number of shards, a power of two.
    #[arg(long, value_name = "S", default_value_t = 16)]
    shards: u16,
    /// Bytes of entries each node holds.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: ByteSize,
    /// Entries each node holds at most, whatever their size.
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// Directory for everything that is written.
    #[arg(long, value_name = "DIR", default_value = ".generation")]
    data: PathBuf,
    /// UDP port of the first node; the others listen on those that follow. 0 takes any that are free.
    #[arg(long, value_name = "P", default_value_t = 7400)]
    port: u16,
    /// What is logged, such as `info` or `info,generation_node=debug`.
    #[arg(long, value_name = "FILTER", env = "GENERATION_LOG", default_value = "warn")]
    log: String,
}

#[derive(Debug, clap::Subcommand)]
enum DevCommand {
    /// End a node of the running `generation dev` if it still runs, and start it again.
    RestartNode {
        /// Id of the node, from 1.
        id: u64,
        /// Directory of the `generation dev` that runs.
        #[arg(long, value_name = "DIR", default_value = ".generation")]
        data: PathBuf,
    },
    /// Start one node more beside the running ones, and take it into their cluster.
    AddNode {
        /// Its zone; without it, the next in turn.
        #[arg(long)]
        zone: Option<String>,
        /// Directory of the `generation dev` that runs.
        #[arg(long, value_name = "DIR", default_value = ".generation")]
        data: PathBuf,
    },
}

impl Args {
    /// Whether there is one node, which keeps nothing: no cluster at all.
    fn is_alone(&self) -> bool {
        self.nodes == 1 && self.durability == Durability::Memory
    }

    /// How many replicas each shard is to have, once there are nodes enough.
    fn replication_factor(&self) -> u8 {
        if self.nodes == 5 { 5 } else { 3 }
    }
}

/// What the main thread waits for.
enum Happened {
    Signal,
    NodeEnded(u64),
    Asked(Asked),
}

/// Runs `generation dev`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    match &args.command {
        Some(DevCommand::RestartNode { id, data }) => return tell(data, &Request::RestartNode(*id), globals),
        Some(DevCommand::AddNode { zone, data }) => {
            return tell(data, &Request::AddNode { zone: zone.clone() }, globals);
        }
        None => {}
    }
    let log = Log {
        filter: args.log.clone(),
        ..Log::default()
    };
    logging::start(&log).map_err(Failure::usage)?;
    // Held before anything is written: nodes that run from here must keep their certificates.
    let _directory = DataDirectory::open(&args.data).map_err(NodeError::from)?;
    let founding = Founding::of(&args.data, args, || ports(args))?;
    let plans = files::write(&args.data, args, &founding, &preflight::cpus())?;
    let (tell, happened) = mpsc::channel();
    watch_signals(tell.clone())?;
    let mut supervisor = Supervisor {
        nodes: plans.into_iter().map(|plan| (plan, None)).collect(),
        tell: tell.clone(),
        args,
        founding,
    };
    let all: Vec<usize> = (0..supervisor.nodes.len()).collect();
    supervisor.start(&all)?;
    control::listen(&args.data, move |asked| {
        // Nobody listens any more while everything is being stopped.
        let _ = tell.send(Happened::Asked(asked));
    })
    .map_err(|error| Failure::usage(format!("{}: {error}", args.data.display())))?;
    let client_config = args.data.join("client.toml");
    let running: Vec<&Running> = supervisor.running().collect();
    let seeds: Vec<String> = running.iter().map(|node| node.addr.to_string()).collect();
    files::write_client_config(&client_config, &seeds)?;
    if !args.is_alone() {
        growing::grow(&client_config, &seeds, supervisor.founding.replication_factor)?;
    }
    let running: Vec<&Running> = supervisor.running().collect();
    let shown = std::path::absolute(&client_config).unwrap_or_else(|_| client_config.clone());
    serve::print(&announcement(&running, &shown, args, globals.json))?;
    let exit = supervisor.watch(&happened);
    supervisor.stop()?;
    Ok(exit)
}

fn number_of_nodes(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(nodes @ 1..=MAX_NODES) => Ok(nodes),
        _ => Err(format!("take 1 to {MAX_NODES}")),
    }
}

fn durability(text: &str) -> Result<Durability, String> {
    let known = [Durability::Sync, Durability::Memory];
    let found = known.into_iter().find(|durability| durability.name() == text);
    found.ok_or_else(|| "take sync or memory".to_owned())
}

/// Has the `generation dev` that runs on `data` do something.
fn tell(data: &Path, request: &Request, globals: &Globals) -> Result<Exit, Failure> {
    match control::ask(data, request)? {
        Answer::Running { id, addr, pid } => serve::print(&if globals.json {
            format!("{}\n", serde_json::json!({ "id": id, "addr": addr, "pid": pid }))
        } else {
            format!("node {id} serves on {addr} with pid {pid}\n")
        }),
        Answer::Refused(why) => Err(Failure::new(Exit::Rejected, why)),
    }
}

/// The ports the nodes are to listen on.
fn ports(args: &Args) -> Result<Vec<u16>, Failure> {
    if args.port > 0 {
        let last = args.port.checked_add(args.nodes - 1);
        let last = last.ok_or_else(|| Failure::usage("--port: there is no port for the last node"))?;
        return Ok((args.port..=last).collect());
    }
    // Each node is told the others' ports, so they are chosen here. All are held until all are chosen, so that they differ.
    let bind = |_| UdpSocket::bind("127.0.0.1:0");
    let sockets: std::io::Result<Vec<UdpSocket>> = (0..args.nodes).map(bind).collect();
    let ports = sockets.and_then(|sockets| {
        let port = |socket: &UdpSocket| Ok(socket.local_addr()?.port());
        sockets.iter().map(port).collect()
    });
    ports.map_err(|error| Failure::usage(format!("no free port: {error}")))
}

fn watch_signals(tell: mpsc::Sender<Happened>) -> Result<(), Failure> {
    // A terminal's hang-up stops it like Ctrl-C.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| Failure::new(Exit::Rejected, format!("cannot watch for signals: {error}")))?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if tell.send(Happened::Signal).is_err() {
                    break;
                }
            }
        })
        .map_err(|error| Failure::new(Exit::Rejected, format!("cannot start a thread: {error}")))?;
    Ok(())
}

/// The nodes, those that run and those that do not.
struct Supervisor<'a> {
    nodes: Vec<(NodePlan, Option<Running>)>,
    tell: mpsc::Sender<Happened>,
    args: &'a Args,
    founding: Founding,
}

impl Supervisor<'_> {
    fn running(&self) -> impl Iterator<Item = &Running> {
        self.nodes.iter().filter_map(|(_, running)| running.as_ref())
    }

    /// Starts the nodes at these places, all at once, and waits until they serve.
    fn start(&mut self, places: &[usize]) -> Result<(), Failure> {
        let mut starting = Vec::new();
        for &place in places {
            let tell = self.tell.clone();
            let started = nodes::start(&self.nodes[place].0, move |id| {
                // Nobody listens any more while everything is being stopped.
                let _ = tell.send(Happened::NodeEnded(id));
            })?;
            starting.push((place, started));
        }
        for (place, started) in starting {
            self.nodes[place].1 = Some(started.wait()?);
        }
        Ok(())
    }

    /// Serves requests until it is to stop: told so, or no node is left.
    fn watch(&mut self, happened: &mpsc::Receiver<Happened>) -> Exit {
        loop {
            match happened.recv() {
                Ok(Happened::Signal) | Err(mpsc::RecvError) => return Exit::Ok,
                Ok(Happened::Asked(asked)) => {
                    let answer = match asked.request.clone() {
                        Request::RestartNode(id) => self.restart(id),
                        Request::AddNode { zone } => self
                            .add(zone)
                            .unwrap_or_else(|failure| Answer::Refused(failure.message)),
                    };
                    asked.answer(&answer);
                }
                Ok(Happened::NodeEnded(id)) => self.node_ended(id),
            }
            if self.running().next().is_none() {
                return Exit::Rejected;
            }
        }
    }

    /// Takes note of the end of a node that nobody asked for.
    fn node_ended(&mut self, id: u64) {
        let Some((_, running)) = self.nodes.iter_mut().find(|(plan, _)| plan.id == id) else {
            return;
        };
        // One that was started again since has not ended.
        if let Some(status) = running.as_ref().and_then(Running::ended) {
            *running = None;
            tracing::warn!("node {id} has ended ({status}); `generation dev restart-node {id}` starts it again");
        }
    }

    fn restart(&mut self, id: u64) -> Answer {
        let Some(place) = self.nodes.iter().position(|(plan, _)| plan.id == id) else {
            let last = self.nodes.len();
            return Answer::Refused(format!("there is no node {id}; nodes are 1 to {last}"));
        };
        if let Some(running) = self.nodes[place].1.take() {
            running.stop();
            running.wait(STOP);
        }
        let started = self.start(&[place]).and_then(|()| self.take_in(place));
        match started {
            Ok(()) => match &self.nodes[place].1 {
                Some(running) => Answer::Running {
                    id,
                    addr: running.addr.to_string(),
                    pid: running.pid,
                },
                None => Answer::Refused(format!("node {id} has ended at once")),
            },
            Err(failure) => Answer::Refused(format!("{}; `generation dev` has printed why", failure.message)),
        }
    }

    /// Has the node at `place` belong to the cluster: one that has lost its directory, or is new, does not.
    fn take_in(&self, place: usize) -> Result<(), Failure> {
        match &self.nodes[place].1 {
            Some(running) if !self.args.is_alone() => {
                let others: Vec<String> = self.running().map(|node| node.addr.to_string()).collect();
                growing::add(&self.args.data.join("client.toml"), &running.addr.to_string(), &others)
            }
            _ => Ok(()),
        }
    }

    fn add(&mut self, zone: Option<String>) -> Result<Answer, Failure> {
        if self.args.is_alone() {
            let message = "a node that is alone and keeps nothing takes in no other; start `generation dev` with --nodes 3, or without \
                           --durability memory";
            return Ok(Answer::Refused(message.to_owned()));
        }
        let id = self.nodes.iter().map(|(plan, _)| plan.id).max().unwrap_or(0) + 1;
        let free = || Ok(UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port());
        let taken: Vec<u16> = self.nodes.iter().map(|(plan, _)| plan.listen.port()).collect();
        let next = taken.iter().max().and_then(|port| port.checked_add(1));
        let next = next.filter(|port| self.args.port > 0 && UdpSocket::bind(("127.0.0.1", *port)).is_ok());
        let port = next.map_or_else(free, Ok);
        let port = port.map_err(|error: std::io::Error| Failure::usage(format!("no free port: {error}")))?;
        let added = Added {
            id,
            port,
            zone: zone.unwrap_or_else(|| self.founding.zone_of(id)),
        };
        let plan = files::write_added(&self.args.data, self.args, &self.founding, &preflight::cpus(), &added)?;
        self.founding.add(&self.args.data, added)?;
        self.nodes.push((plan, None));
        let place = self.nodes.len() - 1;
        self.start(&[place])?;
        self.take_in(place)?;
        let seeds: Vec<String> = self.running().map(|node| node.addr.to_string()).collect();
        files::write_client_config(&self.args.data.join("client.toml"), &seeds)?;
        match &self.nodes[place].1 {
            Some(running) => Ok(Answer::Running {
                id,
                addr: running.addr.to_string(),
                pid: running.pid,
            }),
            None => Ok(Answer::Refused(format!("node {id} has ended at once"))),
        }
    }

    /// Stops every node, all at once.
    fn stop(&mut self) -> Result<(), Failure> {
        let until = Instant::now() + STOP;
        for running in self.running() {
            running.stop();
        }
        let mut killed = Vec::new();
        for (plan, running) in &mut self.nodes {
            if let Some(running) = running.take()
                && !running.wait(until.saturating_duration_since(Instant::now()))
            {
                killed.push(plan.id);
            }
        }
        if killed.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Rejected,
            format!("not every node stopped by itself: {killed:?}"),
        ))
    }
}

fn announcement(running: &[&Running], client_config: &Path, args: &Args, json: bool) -> String {
    if json {
        let nodes: Vec<_> = running
            .iter()
            .map(|node| serde_json::json!({ "id": node.id, "addr": node.addr.to_string(), "pid": node.pid }))
            .collect();
        return format!(
            "{}\n",
            serde_json::json!({ "ready": true, "client_config": client_config, "nodes": nodes })
        );
    }
    // The configuration is found by itself in the default place only.
    let option = if args.data == Path::new(".generation") {
        String::new()
    } else {
        format!(" --config {}", client_config.display())
    };
    let addresses: Vec<String> = running.iter().map(|node| node.addr.to_string()).collect();
    let (cores, shards, memory) = (args.cores, args.shards, args.memory.display().iec());
    let durability = args.durability.name();
    format!(
        "Generation listens on {} (UDP, QUIC): cores {cores}, shards {shards}, memory {memory}, durability {durability}. Ctrl-C stops \
         it.\n\
         Client configuration: {}\n\n\
         Try, in another terminal:\n  \
         generation kv put{option} greeting hello\n  \
         generation kv get{option} greeting\n  \
         generation kv incr{option} visits\n  \
         generation kv keys{option}\n",
        addresses.join(", "),
        client_config.display(),
    )
}
