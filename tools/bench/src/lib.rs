//! `generation-bench`: a latency harness that is fair to Generation and to its peers.
//!
//! The library is the engine behind the command line; load tests and latency benches call the same code.
//! Its method: open loop by default with latency from the intended send time (wrk2), a verdict on the
//! generator's own lateness (Lancet), HDR histograms throughout, and paired, alternating rounds for every
//! comparison.
//!
//! Boundaries: [`engine`] knows targets only through [`target::Target`]; [`target`] never times anything;
//! [`workload`] knows no protocol; only [`system`] reads `/proc`.

pub mod cli;
pub mod clock;
pub mod compare;
pub mod engine;
pub mod peers;
pub mod report;
pub mod result;
pub mod scenario;
pub mod schedule;
pub mod sweep;
pub mod system;
pub mod target;
pub mod workload;

/// What ends a benchmark before anything was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A setting outside its bounds.
    #[error("{0}")]
    Settings(String),
    /// The workload cannot be built.
    #[error(transparent)]
    Workload(#[from] workload::WorkloadError),
    /// The target cannot be reached.
    #[error(transparent)]
    Target(#[from] target::TargetError),
    /// A server that the comparison starts itself does not run.
    #[error(transparent)]
    Peer(#[from] peers::PeerError),
    /// A run on which others depend went wrong.
    #[error("{0}")]
    Load(String),
    /// A report cannot be read or written.
    #[error("{path}: {message}")]
    Report {
        /// The file.
        path: String,
        /// What went wrong.
        message: String,
    },
}
