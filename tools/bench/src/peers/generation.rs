//! `generation dev` as a server of a comparison.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use serde::Deserialize;

use super::{Control, Node, PeerError, START_TIMEOUT, Server, files_directory, free_port, medium, supervised, version};
use crate::system::ProcessProbe;
use crate::target::generation::GenerationConnector;

/// What a node does with a write before it acknowledges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Durability {
    /// A majority has it on disk
    Sync,
    /// A majority has it in memory
    Memory,
}

impl Durability {
    /// As `generation dev` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Memory => "memory",
        }
    }
}

/// What a `generation` program offers, by its own help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Whether `generation dev` lets one choose the durability. A program that does not serves from memory alone.
    pub durability: bool,
}

impl Features {
    /// Asks the program.
    pub fn of(program: &Path) -> Result<Self, PeerError> {
        let help = Command::new(program)
            .args(["dev", "--help"])
            .output()
            .map_err(PeerError::system(program.display().to_string()))?;
        Ok(Self::read(&String::from_utf8_lossy(&help.stdout)))
    }

    fn read(help: &str) -> Self {
        let offered = |option: &str| help.split_ascii_whitespace().any(|word| word == option);
        Self {
            durability: offered("--durability"),
        }
    }
}

/// How the node is started.
#[derive(Clone, Debug)]
pub struct DevSettings {
    /// Name in reports; that of a cluster gets the number of nodes behind it.
    pub name: String,
    /// The `generation` program.
    pub program: PathBuf,
    /// Nodes; each is a process.
    pub nodes: usize,
    /// Memory of the store of each node, in MiB.
    pub memory_mib: u64,
    /// CPUs it may use. A lone node serves with one core on each; nodes of a cluster have one core each and share them. Empty: one
    /// core, not pinned.
    pub cpus: Vec<usize>,
    /// What it does with a write before it acknowledges it; `None`: what it does by default.
    pub durability: Option<Durability>,
    /// Where its files are; `None`: in memory.
    pub files: Option<PathBuf>,
    /// Further arguments of `generation dev`.
    pub arguments: Vec<String>,
}

/// The line that `generation dev --json` prints when it serves.
#[derive(Debug, Deserialize)]
struct Ready {
    client_config: PathBuf,
    nodes: Vec<ReadyNode>,
}

#[derive(Debug, Deserialize)]
struct ReadyNode {
    addr: SocketAddr,
    pid: u32,
}

impl Server {
    /// Starts `generation dev` and waits for its ready line.
    pub fn start_generation(settings: &DevSettings) -> Result<Self, PeerError> {
        let name = if settings.nodes > 1 {
            format!("{}-{}", settings.name, settings.nodes)
        } else {
            settings.name.clone()
        };
        let durability = durability_arguments(settings, &name)?;
        let directory = files_directory(settings.files.as_deref())?;
        let port = free_ports(settings.nodes)?;
        let mut command = supervised(&settings.program, &settings.cpus);
        command.args(["dev", "--json", "--port", &port.to_string()]);
        if settings.nodes > 1 {
            command.args(["--nodes", &settings.nodes.to_string(), "--cores", "1"]);
        } else {
            command.args(["--cores", &settings.cpus.len().max(1).to_string()]);
        }
        command.args(["--memory", &format!("{}MiB", settings.memory_mib)]);
        command.arg("--data").arg(directory.path().join("data"));
        command.args(durability);
        command.args(&settings.arguments);
        let log = directory.path().join("log");
        let errors = std::fs::File::create(&log).map_err(PeerError::system("cannot make a log"))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(PeerError::system(
                "cannot start generation (setpriv and taskset come with util-linux)",
            ))?;
        let (line_out, line) = channel();
        if let Some(stdout) = child.stdout.take() {
            // The thread ends with the child: it goes on reading so that the child never writes into a full pipe.
            std::thread::spawn(move || {
                for text in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // Only the first line has a reader.
                    let _ = line_out.send(text);
                }
            });
        }
        let ready = line
            .recv_timeout(START_TIMEOUT)
            .ok()
            .and_then(|text| serde_json::from_str::<Ready>(&text).ok());
        let Some(ready) = ready else {
            let _ = child.kill();
            let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
            let words = std::fs::read_to_string(&log).unwrap_or_default();
            let hint = if settings.nodes > 1 {
                "; if this program does not offer --nodes yet, pass --without-generation to measure the peers alone"
            } else {
                ""
            };
            let message = format!("no ready line ({status}): {}{hint}", words.trim());
            return Err(PeerError::NotStarted { name, message });
        };
        Ok(Self {
            name,
            durability: durability_in_words(&settings.program, &ready.client_config, directory.path()),
            version: version(&settings.program),
            processes: vec![child],
            connector: Box::new(GenerationConnector {
                config: ready.client_config.clone(),
            }),
            probe: ProcessProbe {
                pids: ready.nodes.iter().map(|node| node.pid).collect(),
            },
            nodes: ready
                .nodes
                .iter()
                .map(|node| Node {
                    addr: node.addr,
                    pid: node.pid,
                })
                .collect(),
            control: Control::Generation {
                program: settings.program.clone(),
                config: ready.client_config,
            },
            directory,
        })
    }
}

/// The arguments that ask for a durability, where the program knows any.
fn durability_arguments(settings: &DevSettings, name: &str) -> Result<Vec<&'static str>, PeerError> {
    let Some(durability) = settings.durability else {
        return Ok(Vec::new());
    };
    match (Features::of(&settings.program)?.durability, durability) {
        (true, _) => Ok(vec!["--durability", durability.name()]),
        (false, Durability::Memory) => Ok(Vec::new()),
        (false, Durability::Sync) => Err(PeerError::Unable {
            name: name.to_owned(),
            message: format!(
                "cannot sync: {} dev knows no --durability and serves from memory; pass --durability memory, or --without-generation to \
                 measure the peers alone",
                settings.program.display()
            ),
        }),
    }
}

/// What the node itself says of its durability, and where its files are if it writes any.
fn durability_in_words(program: &Path, config: &Path, directory: &Path) -> String {
    let status = Command::new(program)
        .args(["status", "--json", "--config"])
        .arg(config)
        .output()
        .ok()
        .and_then(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).ok());
    match status.as_ref().and_then(|status| status["durability"].as_str()) {
        Some("memory") => "memory".to_owned(),
        Some(level) => format!("{level}: {}", medium(directory)),
        None => "not told by its status".to_owned(),
    }
}

/// The first of `count` neighbouring ports that nobody listens on at present: node i of `generation dev` takes the i-th.
fn free_ports(count: usize) -> Result<u16, PeerError> {
    let free = |port: u16| {
        (0..count as u16).all(|next| {
            port.checked_add(next)
                .is_some_and(|port| UdpSocket::bind(("127.0.0.1", port)).is_ok())
        })
    };
    for _ in 0..100 {
        let port = free_port()?;
        if free(port) {
            return Ok(port);
        }
    }
    Err(PeerError::NotStarted {
        name: "generation".to_owned(),
        message: format!("no {count} neighbouring ports are free"),
    })
}

/// The `generation` program: the one given, else the one beside this program, else one that cargo builds.
pub fn program(given: Option<&Path>) -> Result<PathBuf, PeerError> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let own = std::env::current_exe().map_err(PeerError::system("cannot find this program"))?;
    let beside = own.with_file_name("generation");
    if beside.is_file() {
        return Ok(beside);
    }
    let release = own.components().any(|part| part.as_os_str() == "release");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "-p", "generation-server", "--bin", "generation"]);
    if release {
        command.arg("--release");
    }
    let built = command
        .status()
        .map_err(PeerError::system("cannot run cargo to build generation"))?;
    if built.success() && beside.is_file() {
        return Ok(beside);
    }
    Err(PeerError::NotStarted {
        name: "generation".to_owned(),
        message: format!(
            "no program at {}: build it with cargo build --release -p generation-server, or pass --generation-bin",
            beside.display()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_options_of_the_help_and_not_words_in_its_sentences() {
        let help = "Options:\n      --nodes <N>  Nodes\n      --durability <LEVEL>\n          What a write waits for";
        assert!(Features::read(help).durability);
        assert!(!Features::read("Entries have no durability, and --durability-less nodes neither.").durability);
    }
}
