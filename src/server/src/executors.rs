//! The executors of a node: one per core, pinned where that makes sense, started together and stopped together.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use generation_node::env::CoreId;
use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement};

use crate::env::{CoreParts, GlommioEnv, MESH_CAPACITY, Shared, mesh};
use crate::net::port::Port;

/// Memory registered with io_uring per executor, in bytes; it counts against `RLIMIT_MEMLOCK`.
pub const IO_MEMORY_BYTES: usize = 512 << 10;

/// glommio's preemption timer: never, in effect. When it fires between two steps of the executor, that sleeps although a task is
/// runnable; [`GlommioEnv`] has the core look at its timers and files itself.
const PREEMPT: Duration = Duration::from_hours(24);

/// Why the executors could not be started, or how one ended.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// An operating system resource is missing.
    #[error("cannot start core {core}: {error}")]
    Start {
        /// The core.
        core: CoreId,
        /// What the system said.
        error: io::Error,
    },
    /// A core ended by a panic: a defect of the program. The other cores were asked to stop.
    #[error("core {core} panicked: {message}")]
    Panicked {
        /// The core.
        core: CoreId,
        /// The panic's message.
        message: String,
    },
}

/// Why the cores were not started.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure<E> {
    /// An executor.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// A core was not opened. All that were have been stopped.
    #[error("core {core}: {error}")]
    Open {
        /// The core.
        core: CoreId,
        /// Why.
        error: E,
    },
}

/// The directory of a core, in its node's.
pub fn core_directory(directory: &Path, core: CoreId) -> PathBuf {
    directory.join(format!("core-{core}"))
}

/// The running cores of a node.
pub struct Executors<T: Send + 'static> {
    shared: Arc<Shared>,
    handles: Vec<ExecutorJoinHandle<Option<T>>>,
}

/// Tells that a core has ended, however it ended.
struct Ended<E: Fn(CoreId)> {
    core: CoreId,
    shared: Arc<Shared>,
    tell: E,
}

impl<E: Fn(CoreId)> Drop for Ended<E> {
    fn drop(&mut self) {
        // A node is one whole: its cores serve one port and its shards are spread over all of them. When one ends, all do.
        self.shared.stop();
        (self.tell)(self.core);
    }
}

impl<T: Send + 'static> Executors<T> {
    /// As [`Executors::open`], with nothing to open.
    pub fn start<F, M, N>(
        port: Port,
        cpus: Option<&[usize]>,
        directory: &Path,
        main: M,
        ended: N,
    ) -> Result<Self, ExecutorError>
    where
        M: Fn(GlommioEnv) -> F + Clone + Send + 'static,
        F: Future<Output = T> + 'static,
        N: Fn(CoreId) + Clone + Send + 'static,
    {
        let open = move |env| {
            let running = main(env);
            async { Ok::<_, Infallible>(running) }
        };
        Self::open(port, cpus, directory, open, ended).map_err(|failure| match failure {
            StartFailure::Executor(error) => error,
            StartFailure::Open { error, .. } => match error {},
        })
    }

    /// Starts one executor per socket of `port`, pinned to `cpus` by core, or where the operating system likes without them; each has
    /// a directory of its own in `directory`. `open` is run on each and returns what runs there. Returns when every core has been
    /// opened and runs; if one was not, the others have been stopped. `ended` is called on a core's thread when that core has ended,
    /// however it did; the other cores have been asked to stop by then.
    pub fn open<F, G, M, E, N>(
        port: Port,
        cpus: Option<&[usize]>,
        directory: &Path,
        open: M,
        ended: N,
    ) -> Result<Self, StartFailure<E>>
    where
        M: Fn(GlommioEnv) -> F + Clone + Send + 'static,
        F: Future<Output = Result<G, E>> + 'static,
        G: Future<Output = T> + 'static,
        E: Send + 'static,
        N: Fn(CoreId) + Clone + Send + 'static,
    {
        let cores = port.sockets.len() as CoreId;
        let start = |core, error| StartFailure::Executor(ExecutorError::Start { core, error });
        let shared = Shared::new(cores).map_err(|error| start(0, error))?;
        let (ready_tell, ready) = mpsc::channel();
        let mut executors = Self {
            shared: Arc::clone(&shared),
            handles: Vec::new(),
        };
        for ((core, socket), end) in (0..cores).zip(port.sockets).zip(mesh(cores, MESH_CAPACITY)) {
            let placement = match cpus {
                Some(cpus) => Placement::Fixed(cpus[usize::from(core)]),
                None => Placement::Unbound,
            };
            let parts = CoreParts {
                core,
                socket,
                mesh: end,
                shared: Arc::clone(&shared),
                directory: core_directory(directory, core),
            };
            let ended = Ended {
                core,
                shared: Arc::clone(&shared),
                tell: ended.clone(),
            };
            let (open, ready_tell) = (open.clone(), ready_tell.clone());
            let handle = LocalExecutorBuilder::new(placement)
                .name(&format!("core-{core}"))
                .io_memory(IO_MEMORY_BYTES)
                .preempt_timer(PREEMPT)
                .spawn(move || async move {
                    let _ended = ended;
                    let env = match GlommioEnv::new(parts) {
                        Ok(env) => env,
                        Err(error) => {
                            // The starter waits for exactly one report of each core.
                            let _ = ready_tell.send((core, Err(start(core, error))));
                            return None;
                        }
                    };
                    let running = match env.drive(open(env.clone())).await {
                        Ok(running) => running,
                        Err(error) => {
                            let _ = ready_tell.send((core, Err(StartFailure::Open { core, error })));
                            return None;
                        }
                    };
                    let _ = ready_tell.send((core, Ok(())));
                    drop(ready_tell);
                    Some(env.drive(running).await)
                });
            match handle {
                Ok(handle) => executors.handles.push(handle),
                Err(error) => return Err(executors.abandon(start(core, io::Error::other(error.to_string())))),
            }
        }
        drop(ready_tell);
        for _ in 0..cores {
            match ready.recv() {
                Ok((_, Ok(()))) => {}
                Ok((_, Err(failure))) => return Err(executors.abandon(failure)),
                Err(mpsc::RecvError) => {
                    let error = io::Error::other(
                        "the executor ended before it ran; the machine lacks io_uring or memory to lock",
                    );
                    return Err(executors.abandon(start(0, error)));
                }
            }
        }
        Ok(executors)
    }

    fn abandon<E>(self, failure: E) -> E {
        self.shared.stop();
        for handle in self.handles {
            // The first error is the one to report.
            let _ = handle.join();
        }
        failure
    }

    /// A handle to stop the node from any thread.
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Waits until every core has ended and returns what each returned, by core. The error is the first core's that panicked.
    pub fn join(self) -> Result<Vec<T>, ExecutorError> {
        let mut results = Vec::new();
        let mut first_error = None;
        for (core, handle) in (0..).zip(self.handles) {
            match handle.join() {
                Ok(Some(result)) => results.push(result),
                Ok(None) => {}
                Err(error) => {
                    let message = error.to_string();
                    first_error.get_or_insert(ExecutorError::Panicked { core, message });
                }
            }
        }
        first_error.map_or(Ok(results), Err)
    }
}
