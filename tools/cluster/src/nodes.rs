//! The nodes of a run: one process each, `generation serve`, all of which die with this one.
//!
//! They are started by a thread of their own that lasts as long as they do: the kernel kills a child when the *thread* that started it
//! ends. Nothing is started again by itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::LoadError;
use crate::files::NodePlan;

/// How long a node may take to serve.
const START: Duration = Duration::from_mins(1);
/// How long a node may take to stop by itself.
const STOP: Duration = Duration::from_secs(5);
/// How often an end is looked for.
const STEP: Duration = Duration::from_millis(5);

/// Started processes, by node.
type Running = Arc<Mutex<BTreeMap<u64, Child>>>;

/// A node to start, and whom to tell.
type Order = (NodePlan, mpsc::Sender<Result<mpsc::Receiver<String>, String>>);

/// The nodes of a run.
pub(crate) struct Nodes {
    plans: Vec<NodePlan>,
    running: Running,
    orders: Option<mpsc::Sender<Order>>,
    starter: Option<JoinHandle<()>>,
}

impl Nodes {
    /// None runs yet.
    pub(crate) fn new(program: PathBuf, plans: Vec<NodePlan>) -> Result<Self, LoadError> {
        let running = Running::default();
        let (orders, ordered) = mpsc::channel::<Order>();
        let children = Arc::clone(&running);
        let starter = thread::Builder::new()
            .name("starter".into())
            .spawn(move || {
                for (plan, tell) in ordered {
                    // Whoever ordered it may have given up.
                    let _ = tell.send(spawn(&program, &plan, &children).map_err(|error| error.to_string()));
                }
            })
            .map_err(LoadError::system("cannot start a thread"))?;
        Ok(Self {
            plans,
            running,
            orders: Some(orders),
            starter: Some(starter),
        })
    }

    /// Starts these nodes, all at once, and waits until they serve.
    pub(crate) fn start(&self, ids: &[u64]) -> Result<(), LoadError> {
        let mut starting = Vec::new();
        for plan in self.plans.iter().filter(|plan| ids.contains(&plan.id)) {
            let (tell, told) = mpsc::channel();
            let orders = self
                .orders
                .as_ref()
                .expect("invariant: it takes orders until it is dropped");
            let ordered = orders.send((plan.clone(), tell)).is_ok();
            let ready = told.recv().ok().filter(|_| ordered);
            let ready = ready.unwrap_or_else(|| Err("the thread that starts nodes has ended".into()));
            let ready = ready.map_err(|error| LoadError::Program(format!("node {}: {error}", plan.id)))?;
            starting.push((plan, ready));
        }
        for (plan, ready) in starting {
            if ready.recv_timeout(START).is_err() {
                let log = std::fs::read_to_string(&plan.log).unwrap_or_default();
                let last = log.lines().last().unwrap_or("it has said nothing");
                return Err(LoadError::Program(format!("node {} does not serve: {last}", plan.id)));
            }
        }
        Ok(())
    }

    fn children(&self) -> MutexGuard<'_, BTreeMap<u64, Child>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All there are.
    pub(crate) fn ids(&self) -> Vec<u64> {
        self.plans.iter().map(|plan| plan.id).collect()
    }

    /// Those that run, with their processes.
    pub(crate) fn running(&self) -> Vec<(u64, u32)> {
        let mut children = self.children();
        children.retain(|_, child| !matches!(child.try_wait(), Ok(Some(_))));
        children.iter().map(|(id, child)| (*id, child.id())).collect()
    }

    /// Sends a signal to those of these nodes that run.
    pub(crate) fn signal(&self, ids: &[u64], signal: Signal) {
        for (_, child) in self.children().iter().filter(|(id, _)| ids.contains(id)) {
            // It may have ended by itself.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Waits for the end of these nodes; those that have not ended in time are killed. Those that were.
    pub(crate) fn wait(&self, ids: &[u64], patience: Duration) -> Vec<u64> {
        let until = Instant::now() + patience;
        let runs = |id: &u64| self.running().iter().any(|(running, _)| running == id);
        while ids.iter().any(runs) {
            if Instant::now() >= until {
                let late: Vec<u64> = ids.iter().copied().filter(runs).collect();
                self.signal(&late, Signal::KILL);
                while late.iter().any(runs) {
                    thread::sleep(STEP);
                }
                return late;
            }
            thread::sleep(STEP);
        }
        Vec::new()
    }

    /// Kills these nodes, all before any of their ends is waited for.
    pub(crate) fn kill(&self, ids: &[u64]) {
        self.signal(ids, Signal::KILL);
        self.wait(ids, START);
    }

    /// Stops these nodes gracefully; those that had to be killed.
    pub(crate) fn stop(&self, ids: &[u64]) -> Vec<u64> {
        self.signal(ids, Signal::TERM);
        self.wait(ids, STOP)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.kill(&self.ids());
        self.orders = None;
        if let Some(starter) = self.starter.take() {
            let _ = starter.join();
        }
    }
}

/// Starts a node; its first line comes when it serves.
fn spawn(program: &PathBuf, plan: &NodePlan, running: &Running) -> std::io::Result<mpsc::Receiver<String>> {
    let log = File::options().create(true).append(true).open(&plan.log)?;
    let own = std::process::id().to_string();
    let mut child = Command::new(program)
        .args(["serve", "--json", "--exit-with-parent", &own, "--config"])
        .arg(&plan.config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let output = child.stdout.take();
    running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(plan.id, child);
    let (tell, ready) = mpsc::channel();
    thread::Builder::new()
        .name(format!("node-{}", plan.id))
        .spawn(move || {
            // It goes on reading so that the node never writes into a full pipe; only the first line has a reader.
            for line in output
                .into_iter()
                .flat_map(|output| BufReader::new(output).lines())
                .map_while(Result::ok)
            {
                let _ = tell.send(line);
            }
        })?;
    Ok(ready)
}
