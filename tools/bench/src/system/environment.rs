//! Where a run was measured: part of every JSON report.

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

/// The machine and its state before the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Model of the first CPU.
    pub cpu: String,
    /// CPUs this process may run on.
    pub cpus: usize,
    /// Hypervisor flag of the CPU: virtual machines share their cores.
    pub virtual_machine: bool,
    /// Frequency governor of the first CPU, where there is one.
    pub governor: Option<String>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Load averages over 1, 5 and 15 minutes before the run.
    pub load_before: [f64; 3],
    /// Transparent huge pages setting.
    pub huge_pages: Option<String>,
    /// Versions of the programs involved.
    pub versions: BTreeMap<String, String>,
    /// What each server that was started for the report has done with a write before it acknowledges it.
    #[serde(default)]
    pub durability: BTreeMap<String, String>,
    /// Seconds since 1970 at the start.
    pub unix_time_s: u64,
    /// The command line.
    pub command: Vec<String>,
    /// Whether this program was built with optimisation.
    pub optimised: bool,
}

fn first_line(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .and_then(|text| text.lines().next().map(|line| line.trim().to_owned()))
}

impl Environment {
    /// Reads it now; what cannot be read stays empty.
    pub fn capture() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu_field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(':'))
                .map(|(_, value)| value.trim())
        };
        let mut load_before = [0.0; 3];
        let loadavg = first_line("/proc/loadavg").unwrap_or_default();
        for (slot, field) in load_before.iter_mut().zip(loadavg.split_ascii_whitespace()) {
            *slot = field.parse().unwrap_or(0.0);
        }
        let memory_kib = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))
                .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        });
        Self {
            cpu: cpu_field("model name")
                .or(cpu_field("Processor"))
                .unwrap_or_default()
                .to_owned(),
            cpus: super::allowed_cpus().len(),
            virtual_machine: cpu_field("flags").is_some_and(|flags| flags.contains("hypervisor")),
            governor: first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            memory_bytes: memory_kib.unwrap_or(0) * 1_024,
            kernel: first_line("/proc/sys/kernel/osrelease").unwrap_or_default(),
            load_before,
            huge_pages: first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            versions: BTreeMap::from([("generation-bench".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]),
            durability: BTreeMap::new(),
            unix_time_s: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            command: std::env::args().collect(),
            optimised: !cfg!(debug_assertions),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        let environment = Environment::capture();
        assert!(environment.cpus > 0 && environment.memory_bytes > 0 && !environment.kernel.is_empty());
        let json = serde_json::to_string(&environment).unwrap();
        assert_eq!(serde_json::from_str::<Environment>(&json).unwrap(), environment);
    }
}
