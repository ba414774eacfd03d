//! What the machine must have before a node starts. Each check names its remedy.

use std::io;

use bytesize::ByteSize;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::config::Config;

/// Memory one executor locks for its rings and buffers.
pub const LOCKED_PER_CORE_BYTES: u64 = 512 << 10;

/// What the machine lacks.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The kernel has no io_uring.
    #[error("this kernel has no io_uring (io_uring_setup: {0}); run Linux 5.8 or newer with CONFIG_IO_URING")]
    NoRing(io::Error),
    /// io_uring is forbidden.
    #[error(
        "io_uring is forbidden here (io_uring_setup: {0}); set the sysctl kernel.io_uring_disabled to 0, or allow io_uring_setup, \
         io_uring_enter and io_uring_register in the container's seccomp profile"
    )]
    RingForbidden(io::Error),
    /// io_uring fails for another reason.
    #[error("io_uring cannot be used: {0}")]
    Ring(io::Error),
    /// Too little memory may be locked.
    #[error(
        "{cores} cores need {need} of locked memory, and this process may lock {have}; raise it with `ulimit -l {need_kib}`, \
         LimitMEMLOCK={need_bytes} in the systemd unit or --ulimit memlock={need_bytes} of the container, or serve with fewer cores",
        need = ByteSize::b(*.need_bytes).display().iec(),
        have = ByteSize::b(*.have_bytes).display().iec(),
        need_kib = .need_bytes >> 10,
    )]
    Locked {
        /// Cores asked for.
        cores: u16,
        /// Bytes they need.
        need_bytes: u64,
        /// Bytes the limit allows.
        have_bytes: u64,
    },
    /// More cores than processors.
    #[error(
        "{cores} cores are configured and this process may run on {processors} processors; lower `cores`, or leave it out"
    )]
    Cores {
        /// Cores asked for.
        cores: u16,
        /// Processors there are.
        processors: u16,
    },
    /// A processor that is not there.
    #[error(
        "`cpus` names processor {cpu}, and this process may run on {allowed:?}; name some of those, or leave `cpus` out"
    )]
    Processor {
        /// The processor.
        cpu: usize,
        /// Those there are.
        allowed: Vec<usize>,
    },
    /// More memory than the machine has.
    #[error(
        "a memory budget of {} is configured and this machine or container has {}; lower `memory.budget` and leave some \
         for the system",
        ByteSize::b(*.budget_bytes).display().iec(),
        ByteSize::b(*.total_bytes).display().iec()
    )]
    Memory {
        /// The budget.
        budget_bytes: u64,
        /// What there is.
        total_bytes: u64,
    },
}

/// Checks all that can be checked without starting. The port and the files are checked as they are opened.
pub fn check(config: &Config, cores: u16) -> Result<(), PreflightError> {
    let processors = processors();
    if config.pin && cores > processors {
        return Err(PreflightError::Cores { cores, processors });
    }
    let allowed = cpus();
    if let Some(&cpu) = config.cpus.iter().flatten().find(|cpu| !allowed.contains(cpu)) {
        return Err(PreflightError::Processor { cpu, allowed });
    }
    let budget_bytes = config.memory.budget.as_u64();
    let total_bytes = memory_bytes();
    if budget_bytes > total_bytes {
        return Err(PreflightError::Memory {
            budget_bytes,
            total_bytes,
        });
    }
    ring()?;
    let need_bytes = LOCKED_PER_CORE_BYTES * u64::from(cores);
    match getrlimit(Resource::Memlock).current {
        Some(have_bytes) if have_bytes < need_bytes && !may_lock() => Err(PreflightError::Locked {
            cores,
            need_bytes,
            have_bytes,
        }),
        _ => Ok(()),
    }
}

/// Processors this process may run on, by number.
pub fn cpus() -> Vec<usize> {
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(_) => vec![0],
    }
}

/// How many processors this process may run on, at most 256: a core's number is one byte of its connection ids.
pub fn processors() -> u16 {
    cpus().len().clamp(1, 256) as u16
}

/// Tries to make a ring and lets it go again.
fn ring() -> Result<(), PreflightError> {
    match io_uring::IoUring::new(1) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::ENOSYS) => PreflightError::NoRing(error),
            Some(libc::EPERM | libc::EACCES) => PreflightError::RingForbidden(error),
            _ => PreflightError::Ring(error),
        }),
    }
}

/// Whether the limit on locked memory does not apply to this process (the capability `IPC_LOCK`).
fn may_lock() -> bool {
    const IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .map(str::trim);
    effective
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .is_some_and(|bits| bits & (1 << IPC_LOCK) != 0)
}

/// Memory of the machine, or of the control group where that is less.
fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    // Version 2 of the control groups, then version 1; "max" and huge numbers mean no limit.
    let limits = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let limit = limits
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib << 10).min(limit.unwrap_or(u64::MAX))
}
