//! `generation dev` as a server of a comparison.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use serde::Deserialize;

use super::{PeerError, START_TIMEOUT, Server, free_port, supervised, version};
use crate::system::ProcessProbe;
use crate::target::generation::GenerationConnector;

/// How the node is started.
#[derive(Clone, Debug)]
pub struct DevSettings {
    /// The `generation` program.
    pub program: PathBuf,
    /// Memory of the store, in MiB.
    pub memory_mib: u64,
    /// CPUs it may use; one core each. Empty: one core, not pinned.
    pub cpus: Vec<usize>,
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
    pid: u32,
}

impl Server {
    /// Starts `generation dev` and waits for its ready line.
    pub fn start_generation(settings: &DevSettings) -> Result<Self, PeerError> {
        let directory = tempfile::tempdir().map_err(PeerError::system("cannot make a directory for a server"))?;
        let port = free_port().map_err(PeerError::system("cannot find a free port"))?;
        let mut command = supervised(&settings.program, &settings.cpus);
        command.args(["dev", "--json", "--port", &port.to_string()]);
        command.args(["--cores", &settings.cpus.len().max(1).to_string()]);
        command.args(["--memory", &format!("{}MiB", settings.memory_mib)]);
        command.arg("--data").arg(directory.path().join("data"));
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
            let message = format!("no ready line ({status}): {}", words.trim());
            return Err(PeerError::NotStarted {
                name: "generation".to_owned(),
                message,
            });
        };
        Ok(Self {
            name: "generation".to_owned(),
            version: version(&settings.program),
            child,
            connector: Box::new(GenerationConnector {
                config: ready.client_config,
            }),
            probe: ProcessProbe {
                pids: ready.nodes.iter().map(|node| node.pid).collect(),
            },
            directory,
        })
    }
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
