//! Servers that a comparison starts itself: found, started on loopback with private ports, without
//! persistence, pinned, and ended with the comparison.
//!
//! Every server runs under `setpriv --pdeathsig`, so that it ends even if this program is killed.

mod certificates;
mod generation;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::system::ProcessProbe;
use crate::target::memcached::MemcachedConnector;
use crate::target::resp::RespConnector;
use crate::target::tls::TlsFiles;
use crate::target::{Connector, TargetError};

pub use certificates::Certificates;
pub use generation::{DevSettings, program as generation_program};

/// A kind of server that can be started.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Redis, plaintext.
    Redis,
    /// Redis, TLS.
    RedisTls,
    /// Valkey, plaintext.
    Valkey,
    /// Valkey, TLS.
    ValkeyTls,
    /// Memcached, plaintext.
    Memcached,
    /// Memcached, TLS.
    MemcachedTls,
}

impl Kind {
    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::RedisTls => "redis-tls",
            Self::Valkey => "valkey",
            Self::ValkeyTls => "valkey-tls",
            Self::Memcached => "memcached",
            Self::MemcachedTls => "memcached-tls",
        }
    }

    /// The kind with its TLS twin, where asked for.
    pub fn variants(self, with_tls: bool) -> Vec<Self> {
        let twin = match self {
            Self::Redis => Some(Self::RedisTls),
            Self::Valkey => Some(Self::ValkeyTls),
            Self::Memcached => Some(Self::MemcachedTls),
            _ => None,
        };
        std::iter::once(self).chain(twin.filter(|_| with_tls)).collect()
    }

    const fn tls(self) -> bool {
        matches!(self, Self::RedisTls | Self::ValkeyTls | Self::MemcachedTls)
    }

    /// The program, and the Debian package that has it.
    const fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Redis | Self::RedisTls => ("redis-server", "redis-server"),
            Self::Valkey | Self::ValkeyTls => ("valkey-server", "valkey-server"),
            Self::Memcached | Self::MemcachedTls => ("memcached", "memcached"),
        }
    }
}

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its program is not installed.
    #[error("{program} is not installed: apt-get install {package}  (or leave it out of --peers)")]
    Missing {
        /// The program.
        program: String,
        /// The package that has it.
        package: String,
    },
    /// It ended at once or never listened.
    #[error("{name} did not start: {message}")]
    NotStarted {
        /// Which server.
        name: String,
        /// Its last words.
        message: String,
    },
    /// Files or processes failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The operating system's words.
        source: std::io::Error,
    },
    /// Its certificates could not be made.
    #[error("cannot make certificates: {0}")]
    Certificates(String),
}

impl PeerError {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// How long a server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A running server; ended when dropped.
pub struct Server {
    name: String,
    version: String,
    child: Child,
    connector: Box<dyn Connector>,
    probe: ProcessProbe,
    /// Holds what the server reads; goes with it.
    directory: tempfile::TempDir,
}

impl Server {
    /// Starts a server pinned to `cpus` (empty: not pinned) and waits until it accepts connections.
    pub fn start(kind: Kind, cpus: &[usize], memory_mib: u64) -> Result<Self, PeerError> {
        let (program, package) = kind.program();
        let path = find_program(program).ok_or_else(|| PeerError::Missing {
            program: program.to_owned(),
            package: package.to_owned(),
        })?;
        let directory = tempfile::tempdir().map_err(PeerError::system("cannot make a directory for a server"))?;
        let certificates = if kind.tls() {
            Some(Certificates::make(directory.path())?)
        } else {
            None
        };
        let port = free_port().map_err(PeerError::system("cannot find a free port"))?;
        let threads = cpus.len().max(1);
        let mut command = supervised(&path, cpus);
        match kind {
            Kind::Redis | Kind::RedisTls | Kind::Valkey | Kind::ValkeyTls => {
                redis_arguments(&mut command, directory.path(), port, certificates.as_ref());
            }
            Kind::Memcached | Kind::MemcachedTls => {
                memcached_arguments(&mut command, port, threads, memory_mib, certificates.as_ref());
            }
        }
        let addr = format!("127.0.0.1:{port}");
        let tls = certificates.map(|made| TlsFiles {
            ca: made.ca,
            identity: None,
            server_name: None,
        });
        let connector: Box<dyn Connector> = match kind {
            Kind::Memcached | Kind::MemcachedTls => Box::new(MemcachedConnector { addr, tls }),
            _ => Box::new(RespConnector {
                addr,
                tls,
                cluster: false,
            }),
        };
        let mut server = Self::spawn(kind.name().to_owned(), version(&path), command, connector, directory)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Spawns `command` with its output in the directory.
    pub(crate) fn spawn(
        name: String,
        version: String,
        mut command: Command,
        connector: Box<dyn Connector>,
        directory: tempfile::TempDir,
    ) -> Result<Self, PeerError> {
        let log =
            std::fs::File::create(directory.path().join("log")).map_err(PeerError::system("cannot make a log"))?;
        let errors = log.try_clone().map_err(PeerError::system("cannot make a log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(PeerError::system(format!(
                "cannot start {name} (setpriv and taskset come with util-linux)"
            )))?;
        let probe = ProcessProbe { pids: vec![child.id()] };
        Ok(Self {
            name,
            version,
            child,
            connector,
            probe,
            directory,
        })
    }

    fn wait_until_ready(&mut self) -> Result<(), PeerError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let failed: TargetError = match self.connector.connect(1) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            let exited = self.child.try_wait().ok().flatten();
            if exited.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                let words = tail.into_iter().rev().collect::<Vec<_>>().join("; ");
                let message = exited.map_or_else(|| failed.to_string(), |status| format!("{status}: {words}"));
                return Err(PeerError::NotStarted {
                    name: self.name.clone(),
                    message,
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Name for reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own version line.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Opens connections to it.
    pub fn connector(&self) -> &dyn Connector {
        &*self.connector
    }

    /// Its processes.
    pub fn probe(&self) -> &ProcessProbe {
        &self.probe
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended by itself; waiting below tells.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command that dies with this thread and is pinned to `cpus`.
pub(crate) fn supervised(program: &Path, cpus: &[usize]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if !cpus.is_empty() {
        let list = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        command.args(["taskset", "-c", &list]);
    }
    command.arg(program);
    command
}

fn redis_arguments(command: &mut Command, directory: &Path, port: u16, certificates: Option<&Certificates>) {
    let port = port.to_string();
    command.args([
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
    ]);
    command.arg("--dir").arg(directory);
    if let Some(certificates) = certificates {
        command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"]);
        command.arg("--tls-cert-file").arg(&certificates.certificate);
        command.arg("--tls-key-file").arg(&certificates.key);
        command.arg("--tls-ca-cert-file").arg(&certificates.ca);
    } else {
        command.args(["--port", &port]);
    }
}

fn memcached_arguments(
    command: &mut Command,
    port: u16,
    threads: usize,
    memory_mib: u64,
    certificates: Option<&Certificates>,
) {
    command.args(["-l", "127.0.0.1", "-p", &port.to_string(), "-U", "0", "-c", "4096"]);
    command.args(["-t", &threads.to_string(), "-m", &memory_mib.to_string(), "-u", "root"]);
    if let Some(certificates) = certificates {
        let files = format!(
            "ssl_chain_cert={},ssl_key={}",
            certificates.certificate.display(),
            certificates.key.display()
        );
        command.args(["-Z", "-o", &files]);
    }
}

/// The program on the path, `/usr/sbin` and `/usr/local/sbin` included.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

fn version(program: &Path) -> String {
    Command::new(program)
        .arg("--version")
        .output()
        .ok()
        .and_then(|output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .map(str::to_owned)
        })
        .unwrap_or_default()
}

/// A port nobody listens on at present. Another process may take it before the server does; then the server
/// says so.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
