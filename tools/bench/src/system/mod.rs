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
    /// The kernel's own clock of each process: it counts every thread, io_uring's workers and threads that have ended included,
    /// and is exact to the moment. Children (a server that forks to save) count while they run, and by clock ticks once they were
    /// waited for. What the kernel does for a socket on the sender's time is the sender's, for every server alike.
    fn sample(&self) -> Option<CpuSample> {
        let mut cpu_ns = 0;
        for pid in &self.pids {
            cpu_ns += process_cpu_ns(*pid)? + reaped_children_ns(*pid).unwrap_or(0);
            // A child may end between the listing and the reading.
            cpu_ns += children(*pid).into_iter().filter_map(process_cpu_ns).sum::<u64>();
        }
        Some(CpuSample { cpu_ns })
    }
}

fn process_cpu_ns(pid: u32) -> Option<u64> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).ok()?);
    let time = nix::time::clock_getcpuclockid(pid).ok()?.now().ok()?;
    Some(u64::try_from(time.tv_sec()).ok()? * 1_000_000_000 + u64::try_from(time.tv_nsec()).ok()?)
}

/// Processor time of children that have ended and were waited for.
fn reaped_children_ns(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in brackets may hold spaces; cutime and cstime are the 14th and 15th field after it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(13);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1))
}

/// Children of every thread of a process; none where the kernel does not list them.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|list| {
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
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

/// Kind of the file system that a path is on, as the kernel names it.
pub fn filesystem(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            // A space in a mount point is written as an octal number.
            let point = fields.next()?.replace("\\040", " ");
            path.starts_with(&point)
                .then_some((point.len(), fields.next()?.to_owned()))
        })
        // Of mounts on the same point the last one is seen.
        .max_by_key(|(len, _)| *len)
        .map(|(_, kind)| kind)
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
    fn work_of_threads_and_children_that_have_ended_is_counted() {
        let probe = ProcessProbe {
            pids: vec![std::process::id()],
        };
        let start = probe.sample().unwrap().cpu_ns;
        let worker = || {
            let mut sum = 0_u64;
            while thread_cpu_ns() < 30_000_000 {
                sum = std::hint::black_box(sum.wrapping_add(1));
            }
        };
        std::thread::spawn(worker).join().unwrap();
        let with_thread = probe.sample().unwrap().cpu_ns;
        assert!(with_thread - start >= 30_000_000, "{}", with_thread - start);
        let child = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"])
            .status()
            .unwrap();
        assert!(child.success());
        assert!(reaped_children_ns(std::process::id()).unwrap() > 0);
        assert!(probe.sample().unwrap().cpu_ns > with_thread);
    }

    #[test]
    fn the_file_system_of_a_path_is_the_nearest_mount() {
        assert_eq!(filesystem(Path::new("/proc/self/status")).as_deref(), Some("proc"));
        assert!(filesystem(Path::new("/")).is_some());
        assert_eq!(filesystem(Path::new("/no/such/file")), None);
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
