//! The loss of a node under load: how long its keys have no service, what fails, and whether an acknowledged write is missing
//! afterwards.
//!
//! Every write has a key of its own, so what was acknowledged can be looked for afterwards, one key after the other.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{ScenarioSettings, Watch};
use crate::BenchError;
use crate::engine::{Ended, Notes, RunContext, run};
use crate::peers::{Server, signal};
use crate::result::{Finding, RunResult, Unit};
use crate::system::Probe;
use crate::target::cluster::ClusterConnector;
use crate::target::{Connector, Outcome, Request, Token};
use crate::workload::{Class, KeyBuffer, KeyDistribution, Mix, WorkloadSpec};

/// Keys asked for at a time while looking for acknowledged writes.
const BATCH: usize = 64;
/// How long looking for them may take.
const SEARCH: Duration = Duration::from_mins(1);

/// Writes to a running cluster, kills the node whose loss hurts most, and draws the account.
pub fn failover(server: &Server, settings: &ScenarioSettings, watch: &mut Watch<'_>) -> Result<RunResult, BenchError> {
    let connector = ClusterConnector {
        cluster: server.cluster()?,
    };
    let victim = server.leader()?;
    let seconds = (settings.duration + settings.warmup).as_secs_f64();
    // More keys than arrivals, so that no key is written twice.
    let keys = (settings.rate_per_s * seconds * 2.0).clamp(1_000.0, 1e12);
    let workload = WorkloadSpec {
        mix: Mix::only(Class::Put),
        distribution: KeyDistribution::Sequential,
        keys: whole(keys),
        ..settings.workload.clone()
    };
    let killed = Mutex::new(None);
    let script = |notes: &Notes<'_>| {
        if notes.wait_until(settings.event_s()) {
            let at_s = notes.note(format!("SIGKILL of {}", victim.addr));
            signal(victim.pid, Signal::KILL);
            *killed.lock().unwrap_or_else(PoisonError::into_inner) = Some(at_s);
        }
    };
    let context = RunContext {
        stop: watch.stop,
        probe: Some(server.probe() as &dyn Probe),
        progress: &mut *watch.progress,
        script: Some(Box::new(script)),
        keep_operations: true,
    };
    let mut result = run(&connector, &workload, &settings.run_settings(), context)?;
    server.name().clone_into(&mut result.target);
    // A process that is gone has no account of its time.
    result.server_cpu = None;
    let Some(killed_s) = killed.into_inner().unwrap_or_else(PoisonError::into_inner) else {
        return Ok(result);
    };
    let mut findings = account(&result.ended, killed_s);
    let acknowledged: Vec<u64> = result
        .ended
        .iter()
        .filter(|operation| operation.failure.is_none())
        .map(|operation| operation.key)
        .collect();
    findings.push(Finding::new(
        "acknowledged writes",
        acknowledged.len() as f64,
        Unit::Count,
    ));
    match missing(&connector, &acknowledged, workload.key_len) {
        Ok(lost) => findings.push(Finding::new("acknowledged writes lost", lost as f64, Unit::Count)),
        Err(reason) => {
            result.valid = false;
            result
                .invalid
                .push(format!("the acknowledged writes could not be looked for: {reason}"));
        }
    }
    result.findings = findings;
    Ok(result)
}

#[allow(clippy::cast_sign_loss, reason = "the caller clamps it to what is positive")]
fn whole(number: f64) -> u64 {
    number.ceil() as u64
}

/// What the loss did to the operations.
fn account(operations: &[Ended], kill_s: f64) -> Vec<Finding> {
    let us = |ns: u64| ns as f64 / 1e3;
    let killed_us = kill_s * 1e6;
    let failed = operations.iter().filter(|operation| operation.failure.is_some());
    let last_failed_us = failed
        .clone()
        .map(|operation| us(operation.intended_ns))
        .fold(killed_us, f64::max);
    let slow_us = operations
        .iter()
        .filter(|operation| us(operation.intended_ns) >= killed_us)
        .map(|operation| us(operation.ended_ns.saturating_sub(operation.intended_ns)))
        .fold(0.0, f64::max);
    let mut acknowledged: Vec<f64> = operations
        .iter()
        .filter(|operation| operation.failure.is_none() && us(operation.ended_ns) >= killed_us)
        .map(|operation| us(operation.ended_ns))
        .collect();
    acknowledged.sort_by(f64::total_cmp);
    let (mut gap_us, mut last_us) = (0.0_f64, killed_us);
    for at_us in acknowledged {
        gap_us = gap_us.max(at_us - last_us);
        last_us = at_us;
    }
    vec![
        Finding::new(
            "last failed write, after the kill",
            last_failed_us - killed_us,
            Unit::Time,
        ),
        Finding::new("longest time without any acknowledgement", gap_us, Unit::Time),
        Finding::new("longest wait of a write", slow_us, Unit::Time),
        Finding::new("failed writes", failed.count() as f64, Unit::Count),
    ]
}

/// Looks for every key once, over new connections, and counts those that are not there.
///
/// # Errors
/// Why some could not be looked for.
fn missing(connector: &dyn Connector, keys: &[u64], key_len: usize) -> Result<u64, String> {
    let mut target = connector.connect(1).map_err(|error| error.to_string())?;
    let deadline = Instant::now() + SEARCH;
    let (mut lost, mut left) = (
        0,
        keys.iter()
            .copied()
            .collect::<HashSet<_>>()
            .into_iter()
            .collect::<Vec<_>>(),
    );
    let mut buffer = KeyBuffer::new(key_len, 1);
    while !left.is_empty() {
        let batch = left.split_off(left.len().saturating_sub(BATCH));
        for (token, key) in batch.iter().enumerate() {
            buffer.clear();
            buffer.push(*key);
            let request = Request::Get {
                key: buffer.as_bytes(),
                version: false,
            };
            target
                .submit(0, token as Token, &request)
                .map_err(|error| error.to_string())?;
        }
        let mut completions = Vec::new();
        while completions.len() < batch.len() {
            if Instant::now() > deadline {
                return Err(format!(
                    "{} keys are not answered within {SEARCH:?}",
                    left.len() + batch.len()
                ));
            }
            target.flush().map_err(|error| error.to_string())?;
            target
                .poll(Duration::from_millis(1), &mut completions)
                .map_err(|error| error.to_string())?;
        }
        for completion in completions {
            match completion.outcome {
                Outcome::Miss => lost += 1,
                // Not known: ask again.
                Outcome::Failed(_) => left.push(batch[completion.token as usize]),
                _ => {}
            }
        }
    }
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Failure;

    fn write(intended_ms: u64, ended_ms: u64, failed: bool) -> Ended {
        Ended {
            class: Class::Put,
            key: intended_ms,
            intended_ns: intended_ms * 1_000_000,
            ended_ns: ended_ms * 1_000_000,
            failure: failed.then_some(Failure::Unavailable),
        }
    }

    #[test]
    fn the_account_starts_at_the_kill() {
        let operations = [
            write(100, 101, false),
            // Under way when the node died.
            write(999, 2_000, true),
            write(1_200, 1_201, false),
            write(1_500, 1_501, true),
            write(1_600, 1_900, false),
            write(1_950, 1_951, false),
        ];
        let findings = account(&operations, 1.0);
        let value = |name: &str| findings.iter().find(|finding| finding.name == name).unwrap().value;
        assert!((value("last failed write, after the kill") - 500_000.0).abs() < 1.0);
        assert!((value("longest time without any acknowledgement") - 699_000.0).abs() < 1.0);
        assert!((value("longest wait of a write") - 300_000.0).abs() < 1.0);
        assert!((value("failed writes") - 2.0).abs() < 1e-9);
    }
}
