//! A node in a process of its own, and commands run against it.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long a test waits for something that must come.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A `generation dev` that ends with this value.
pub(crate) struct Node {
    child: Child,
    /// The process that serves.
    pid: rustix::process::Pid,
    directory: TempDir,
    config: PathBuf,
}

impl Node {
    /// The node that tests share while several of them run; each uses keys of its own.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Node>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let node = Arc::new(Self::start(&[]));
            *shared = Arc::downgrade(&node);
            node
        })
    }

    /// A node of the test's own.
    pub(crate) fn start(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let mut command = Command::new(env!("CARGO_BIN_EXE_generation"));
        command.args(["dev", "--json", "--port", "0", "--data"]).arg(&data);
        if !options.contains(&"--memory") {
            command.args(["--memory", "64MiB"]);
        }
        let log = directory.path().join("log");
        let mut child = command
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line.is_empty() {
            child.wait().unwrap();
            panic!("the node did not start: {}", fs::read_to_string(&log).unwrap());
        }
        let ready: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["ready"], true, "{line}");
        let config = PathBuf::from(ready["client_config"].as_str().unwrap());
        assert!(config.is_file(), "{line}");
        let pid = ready["nodes"][0]["pid"].as_i64().unwrap();
        Self {
            child,
            pid: rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(),
            directory,
            config,
        }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn config(&self) -> &Path {
        &self.config
    }

    /// Sends the serving process a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid, signal).unwrap();
    }

    /// `generation kv` on this node.
    pub(crate) fn kv(&self, arguments: &[&str]) -> Run {
        self.kv_with_input(arguments, b"")
    }

    /// `generation kv` on this node with standard input.
    pub(crate) fn kv_with_input(&self, arguments: &[&str], input: &[u8]) -> Run {
        let mut child = self.spawn(arguments);
        let mut stdin = child.stdin.take().unwrap();
        // The command may end without having read all.
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let _ = stdin.write_all(input);
            });
            Run::new(child.wait_with_output().unwrap())
        })
    }

    /// `generation kv` on this node, running.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Child {
        generation(self.directory())
            .arg("kv")
            .args(arguments)
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// `generation kv … --json` on this node: its one line.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let run = self.kv(&[arguments, &["--json"]].concat());
        assert_eq!(run.code, 0, "{run:?}");
        run.json()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A stopped process must be killed too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The binary, with a home and a current directory in which nothing is found.
pub(crate) fn generation(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generation"));
    command
        .current_dir(directory)
        .env("HOME", directory)
        .env_remove("GENERATION_CONFIG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A UDP port nobody uses at the moment.
pub(crate) fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn new(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// Standard output as one line of JSON.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.text().matches('\n').count(), 1, "{self:?}");
        serde_json::from_str(self.text()).unwrap()
    }

    /// Standard output as lines of JSON.
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        self.text()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The error on standard error's last line, checked for its shape.
    pub(crate) fn error(&self) -> Value {
        let line = self.stderr.lines().last().unwrap_or_default();
        let mut error: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{self:?}"));
        let error = error["error"].take();
        assert!(error["code"].is_string() && error["message"].is_string(), "{self:?}");
        let state = error["state"].as_str().unwrap();
        assert!(["not_sent", "rejected", "in_doubt"].contains(&state), "{self:?}");
        error
    }
}

/// Ends input, and waits for the rest.
pub(crate) fn finish(child: Child, stdin: ChildStdin) -> Run {
    drop(stdin);
    Run::new(child.wait_with_output().unwrap())
}

/// Asks until the answer is yes.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reads to the end in pieces of a size, for what must not be slurped.
pub(crate) fn read_some(child: &mut Child, bytes: usize) -> Vec<u8> {
    let mut some = vec![0; bytes];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    some
}

/// NDJSON of numbered entries: keys are the prefix and the number.
pub(crate) fn numbered(prefix: &str, numbers: std::ops::RangeInclusive<u32>, value: &str) -> String {
    let lines: Vec<_> = numbers
        .map(|n| format!("{{\"key\":\"{prefix}{n}\",\"value\":\"{value}\"}}\n"))
        .collect();
    lines.concat()
}
