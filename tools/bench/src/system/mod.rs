//! The machine: processor time of processes and threads, pinning, resident memory, and what a report must say
//! about where it was measured. Linux only, from `/proc`.

mod environment;

use std::fs;
use std::path::Path;

pub use environment::Environment;

/// Processor time a server has used since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSample {
    /// Nanoseconds over all its threads.
    pub cpu_ns: u64,
}

/// Reads a server's processor time.
pub trait Probe: Sync {
    /// The time used until now; `None` when it cannot be read.
    fn sample(&self) -> Option<CpuSample>;
}

/// The processes of a server on this machine.
#[derive(Clone, Debug)]
pub struct ProcessProbe {
    /// Process ids.
    pub pids: Vec<u32>,
}

impl Probe for ProcessProbe {
    fn sample(&self) -> Option<CpuSample> {
        let mut cpu_ns = 0;
        for pid in &self.pids {
            for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
                // A thread may end between the listing and the reading.
                cpu_ns += task.ok().and_then(|task| task_cpu_ns(&task.path())).unwrap_or(0);
            }
        }
        Some(CpuSample { cpu_ns })
    }
}

/// Time on a processor: `schedstat` counts nanoseconds; `stat` only clock ticks, for kernels without it.
fn task_cpu_ns(task: &Path) -> Option<u64> {
    if let Ok(schedstat) = fs::read_to_string(task.join("schedstat"))
        && let Some(run_ns) = schedstat
            .split_ascii_whitespace()
            .next()
            .and_then(|field| field.parse().ok())
    {
        return Some(run_ns);
    }
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    // The command in brackets may hold spaces; utime and stime are the 12th and 13th field after it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

impl ProcessProbe {
    /// Resident memory of the processes in bytes.
    pub fn resident_bytes(&self) -> Option<u64> {
        let mut total = 0;
        for pid in &self.pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            total += line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1_024;
        }
        Some(total)
    }
}

/// Processor time of the calling thread in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Pins the calling thread to one CPU; returns whether the kernel agreed.
pub fn pin_thread(cpu: usize) -> bool {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return false;
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).is_ok()
}

/// CPUs this process may run on.
pub fn allowed_cpus() -> Vec<usize> {
    rustix::thread::sched_getaffinity(None).map_or_else(
        |_| vec![0],
        |set| {
            (0..rustix::thread::CpuSet::MAX_CPU)
                .filter(|cpu| set.is_set(*cpu))
                .collect()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_processor_time_grows_with_work() {
        let probe = ProcessProbe {
            pids: vec![std::process::id()],
        };
        let start = probe.sample().unwrap();
        // The kernel brings its account up to date at ticks, so the growth may show a little later.
        let mut sum = 0_u64;
        while probe.sample().unwrap().cpu_ns <= start.cpu_ns {
            sum = std::hint::black_box(sum.wrapping_add(1));
            assert!(
                thread_cpu_ns() < 10_000_000_000,
                "ten seconds of work are not in the account"
            );
        }
        assert!(probe.resident_bytes().unwrap() > 100_000);
        assert!(!allowed_cpus().is_empty());
    }

    #[test]
    fn a_process_that_is_gone_has_no_sample() {
        assert_eq!(
            ProcessProbe {
                pids: vec![u32::MAX - 1]
            }
            .sample(),
            None
        );
    }
}
