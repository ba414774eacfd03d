//! A `generation dev` with its nodes, each a process.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long a test waits for something that must come, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// Asks until the answer is yes.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A `generation dev` that ends with this value.
pub(crate) struct Cluster {
    directory: TempDir,
    options: Vec<String>,
    dev: Option<Child>,
    pids: Vec<Pid>,
}

impl Cluster {
    /// Founds a cluster.
    pub(crate) fn start(options: &[&str]) -> Self {
        // Not in /tmp, which may be a file system that does not know O_DIRECT.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut cluster = Self {
            directory,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            dev: None,
            pids: Vec::new(),
        };
        cluster.start_again();
        cluster
    }

    /// Starts `generation dev` on the same directory, after it has ended.
    pub(crate) fn start_again(&mut self) {
        let mut child = self
            .dev_command()
            .stdout(Stdio::piped())
            .stderr(self.log())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        self.dev = Some(child);
        assert!(!line.is_empty(), "it did not start: {}", self.errors());
        let ready: Value = serde_json::from_str(&line).unwrap();
        let nodes = ready["nodes"].as_array().unwrap();
        self.pids = nodes.iter().map(|node| pid(&node["pid"])).collect();
    }

    /// The command that starts it.
    pub(crate) fn dev_command(&self) -> Command {
        let mut command = self.command();
        command
            .args(["dev", "--json", "--port", "0", "--memory", "64MiB", "--data"])
            .arg(self.data())
            .args(&self.options)
            .stdin(Stdio::null());
        command
    }

    fn log(&self) -> File {
        let log = self.directory.path().join("log");
        File::options().create(true).append(true).open(log).unwrap()
    }

    /// What `generation dev` and its nodes have printed to standard error.
    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_generation"));
        command
            .current_dir(self.directory.path())
            .env_remove("GENERATION_CONFIG")
            .env_remove("GENERATION_LOG");
        command
    }

    /// The directory of `generation dev`.
    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The data directory of a node.
    pub(crate) fn node(&self, id: usize) -> PathBuf {
        self.data().join(format!("node-{id}"))
    }

    /// The clients' configuration.
    pub(crate) fn config(&self) -> PathBuf {
        self.data().join("client.toml")
    }

    pub(crate) fn pid(&self, id: usize) -> Pid {
        self.pids[id - 1]
    }

    /// Kills nodes, all before any of their ends is waited for.
    pub(crate) fn kill(&self, ids: &[usize]) {
        for id in ids {
            kill_process(self.pid(*id), Signal::KILL).unwrap();
        }
        for id in ids {
            wait_until("the end of a node", || !is_running(self.pid(*id)));
        }
    }

    /// `generation dev restart-node`.
    pub(crate) fn restart(&mut self, id: usize) -> Output {
        let output = self
            .command()
            .args(["dev", "restart-node", &id.to_string(), "--json", "--data"])
            .arg(self.data())
            .output()
            .unwrap();
        if output.status.success() {
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            self.pids[id - 1] = pid(&answer["pid"]);
        }
        output
    }

    /// As [`Cluster::restart`]; it must succeed.
    pub(crate) fn restart_well(&mut self, id: usize) {
        let output = self.restart(id);
        assert!(output.status.success(), "{output:?}: {}", self.errors());
    }

    /// Waits for the end of `generation dev`, which ends with its last node.
    pub(crate) fn wait_for_end(&mut self) {
        let mut dev = self.dev.take().unwrap();
        let _ = dev.wait().unwrap();
    }

    /// Stops everything gracefully.
    pub(crate) fn stop(&mut self) {
        let mut dev = self.dev.take().unwrap();
        kill_process(Pid::from_child(&dev), Signal::TERM).unwrap();
        let status = dev.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.errors());
    }

    /// `generation status --json`, once it can be had.
    pub(crate) fn status(&self) -> Value {
        let mut status = Value::Null;
        wait_until("status", || {
            let output = self
                .command()
                .args(["status", "--json", "--timeout", "5s", "--config"])
                .arg(self.config())
                .output()
                .unwrap();
            output.status.success() && {
                status = serde_json::from_slice(&output.stdout).unwrap();
                true
            }
        });
        status
    }

    /// The node that leads a shard.
    pub(crate) fn leader(&self, shard: usize) -> usize {
        let mut leader = None;
        wait_until("a leader", || {
            leader = self.status()["shards"][shard]["leader"].as_u64();
            leader.is_some()
        });
        leader.unwrap() as usize
    }

    /// The replica of a shard on a node, as status has it.
    pub(crate) fn replica(&self, shard: usize, node: usize) -> Option<Value> {
        let status = self.status();
        let replicas = status["shards"][shard]["replicas"].as_array().unwrap();
        replicas.iter().find(|replica| replica["node"] == node).cloned()
    }

    /// Waits until every shard is led by the node that founded it, which spreads leaders evenly.
    pub(crate) fn wait_until_founders_lead(&self, nodes: usize) {
        wait_until("leaderships to return", || {
            let status = self.status();
            let shards = status["shards"].as_array().unwrap();
            shards
                .iter()
                .enumerate()
                .all(|(number, shard)| shard["leader"] == number % nodes + 1)
        });
    }

    /// Waits until every shard has a replica on each of `nodes` nodes, and all of a shard are in one state at one index.
    pub(crate) fn wait_until_alike(&self, nodes: usize) {
        let mut last = Value::Null;
        let start = Instant::now();
        loop {
            let status = self.status();
            let alike = status["shards"].as_array().unwrap().iter().all(|shard| {
                let replicas = shard["replicas"].as_array().unwrap();
                let first = &replicas.first().map_or(Value::Null, |first| first["applied"].clone());
                replicas.len() == nodes
                    && first.is_string()
                    && replicas.iter().all(|replica| replica["applied"] == *first)
            });
            if alike {
                for shard in status["shards"].as_array().unwrap() {
                    let replicas = shard["replicas"].as_array().unwrap();
                    let hashes: Vec<&Value> = replicas.iter().map(|replica| &replica["state_hash"]).collect();
                    assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]), "{shard}");
                }
                return;
            }
            last = if last == Value::Null { status } else { last };
            assert!(
                start.elapsed() < PATIENCE,
                "replicas stay apart: {last}, then {}",
                self.status()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The nodes die with it.
        if let Some(mut dev) = self.dev.take() {
            let _ = dev.kill();
            let _ = dev.wait();
        }
    }
}

/// A `generation serve` by the configuration of node 1, in a process of its own.
pub(crate) struct Serving(Child);

impl Serving {
    /// Starts it and waits until it serves.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let mut node = cluster
            .command()
            .args(["serve", "--json", "--config"])
            .arg(cluster.data().join("node-1.toml"))
            .stdout(Stdio::piped())
            .stderr(cluster.log())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(node.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let serving = Self(node);
        assert!(line.contains("\"ready\":true"), "{line}: {}", cluster.errors());
        serving
    }

    /// Stops it gracefully.
    pub(crate) fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pid(number: &Value) -> Pid {
    Pid::from_raw(i32::try_from(number.as_i64().unwrap()).unwrap()).unwrap()
}

fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // The state stands behind the name, which is in brackets.
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    !state.is_empty() && !state.starts_with('Z')
}

/// Flips one bit of a file.
pub(crate) fn flip(path: &Path, offset: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, offset).unwrap();
    file.sync_all().unwrap();
}
