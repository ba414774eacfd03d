//! The nodes of `generation dev`: one process each, `generation serve`, which dies with this one.
//!
//! Nothing is started again by itself: a node that ended stays ended until somebody asks for it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;

use super::files::NodePlan;
use crate::cli::{Exit, Failure};

/// How long a node may take until it serves. It reads its data back before.
const START: Duration = Duration::from_secs(90);

/// A node that serves.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) id: u64,
    /// Where it listens.
    pub(super) addr: SocketAddr,
    /// Its process.
    pub(super) pid: u32,
    /// The process itself: its number may be another's once it has ended.
    process: OwnedFd,
    /// How it ended, when it has.
    ended: mpsc::Receiver<ExitStatus>,
}

/// What a node prints when it serves.
#[derive(Debug, Deserialize)]
struct Ready {
    nodes: Vec<ReadyNode>,
}

#[derive(Debug, Deserialize)]
struct ReadyNode {
    addr: SocketAddr,
}

/// A process that was started and does not serve yet.
#[derive(Debug)]
pub(super) struct Starting {
    id: u64,
    pid: u32,
    process: OwnedFd,
    ready: mpsc::Receiver<Option<SocketAddr>>,
    ended: mpsc::Receiver<ExitStatus>,
}

/// Starts the node of `plan`. `on_end` is called on a thread of its own when it has ended, however it ends. Must be called on a
/// thread that lives as long as this process: the node dies with the thread that started it.
pub(super) fn start(plan: &NodePlan, on_end: impl FnOnce(u64) + Send + 'static) -> Result<Starting, Failure> {
    let id = plan.id;
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new(
            Exit::Rejected,
            format!("the process of node {id} cannot be started: {error}"),
        )
    };
    let program = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut child = Command::new(program)
        .args([
            "serve",
            "--json",
            "--exit-with-parent",
            &std::process::id().to_string(),
            "--config",
        ])
        .arg(&plan.config)
        // The filter is in the file; the environment's would win over it.
        .env_remove("GENERATION_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error))?;
    let pid = child.id();
    let opened = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let process = match opened {
        Ok(process) => process,
        Err(error) => {
            // It has just been started and is worth nothing without a handle.
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(&error));
        }
    };
    let (tell_ready, ready) = mpsc::channel();
    let (tell_end, ended) = mpsc::channel();
    thread::Builder::new()
        .name(format!("node-{id}"))
        .spawn(move || watch(child, &tell_ready, &tell_end, move || on_end(id)))
        .map_err(|error| failed(&error))?;
    Ok(Starting {
        id,
        pid,
        process,
        ready,
        ended,
    })
}

/// Reads what a node prints and waits for its end.
fn watch(
    mut child: Child,
    ready: &mpsc::Sender<Option<SocketAddr>>,
    ended: &mpsc::Sender<ExitStatus>,
    on_end: impl FnOnce(),
) {
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let addr = serde_json::from_str::<Ready>(&line)
                .ok()
                .and_then(|ready| ready.nodes.first().map(|node| node.addr));
            // Only the first line has a reader.
            let _ = ready.send(addr);
        }
    }
    if let Ok(status) = child.wait() {
        // Nobody may be waiting for it.
        let _ = ended.send(status);
    }
    on_end();
}

impl Starting {
    /// Waits until the node serves. What was wrong the node itself has printed on standard error.
    pub(super) fn wait(self) -> Result<Running, Failure> {
        match self.ready.recv_timeout(START) {
            Ok(Some(addr)) => Ok(Running {
                id: self.id,
                addr,
                pid: self.pid,
                process: self.process,
                ended: self.ended,
            }),
            Ok(None) | Err(mpsc::RecvTimeoutError::Timeout) => {
                signal(&self.process, Signal::KILL);
                Err(Failure::new(
                    Exit::Rejected,
                    format!("node {} does not serve after {} s", self.id, START.as_secs()),
                ))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let exit = self
                    .ended
                    .recv_timeout(START)
                    .ok()
                    .and_then(|status| Exit::from_code(status.code()?))
                    .unwrap_or(Exit::Rejected);
                Err(Failure::new(exit, format!("node {} did not start", self.id)))
            }
        }
    }
}

impl Running {
    /// Whether it has ended, and how.
    pub(super) fn ended(&self) -> Option<ExitStatus> {
        self.ended.try_recv().ok()
    }

    /// Asks it to stop.
    pub(super) fn stop(&self) {
        signal(&self.process, Signal::TERM);
    }

    /// Waits for its end, at most `patience`; then it is killed. Whether it stopped by itself.
    pub(super) fn wait(self, patience: Duration) -> bool {
        if let Ok(status) = self.ended.recv_timeout(patience) {
            return status.success();
        }
        signal(&self.process, Signal::KILL);
        // A process that was killed ends; its end is waited for so that its directory is free.
        let _ = self.ended.recv_timeout(START);
        false
    }
}

fn signal(process: &OwnedFd, signal: Signal) {
    if let Err(error) = pidfd_send_signal(process, signal) {
        tracing::debug!(%error, "the process has ended already");
    }
}
