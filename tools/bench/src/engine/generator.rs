//! One generator thread: sends on schedule (open loop) or on reply (closed loop), and times every reply.
//!
//! Invariants: in an open loop the latency of an operation starts at its intended send time, whatever
//! held the send back; an operation in flight has exactly one entry in the slab; nothing here blocks but
//! [`Target::poll`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use slab::Slab;

use super::record::{Classes, Counters, Recorder};
use super::script::Ended;
use super::{Mode, RunSettings};
use crate::clock::{Clock, duration_ns};
use crate::schedule::{Lateness, Schedule};
use crate::system::{CpuSample, Probe};
use crate::target::{Completion, Failure, Outcome, Request, Target, TargetError, Token};
use crate::workload::{Class, KeyBuffer, Operation, Trace, ValuePool, Workload, WorkloadSpec};

/// An operation that was sent and not yet answered.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    operation: Operation,
    intended_ns: u64,
    sent_ns: u64,
    /// Second half of a compare-and-swap.
    conditional: bool,
}

/// What one thread brings back.
#[derive(Debug)]
pub(super) struct ThreadResult {
    pub(super) classes: Classes,
    pub(super) counters: Counters,
    pub(super) lateness: Lateness,
    /// Start and end of the measured time on the run's clock.
    pub(super) measured_ns: (u64, u64),
    /// Operations that completed within the measured time.
    pub(super) in_window: u64,
    /// Operations never answered within the drain time; in the histograms with their age as lower bound.
    pub(super) unfinished: u64,
    /// Processor time of this thread over the measured time, in nanoseconds.
    pub(super) client_cpu_ns: u64,
    /// Measured time in which this thread had nothing to send and nothing to receive, in nanoseconds.
    pub(super) idle_ns: u64,
    /// Every operation, where the run keeps them.
    pub(super) ended: Vec<Ended>,
    /// The server's processor time at start and end of the measured time.
    pub(super) server_cpu: Option<(CpuSample, CpuSample)>,
    pub(super) error: Option<TargetError>,
    pub(super) interrupted: bool,
}

pub(super) struct Generator<'a> {
    target: Box<dyn Target>,
    workload: Workload,
    spec: &'a WorkloadSpec,
    settings: &'a RunSettings,
    clock: Clock,
    stop: &'a AtomicBool,
    probe: Option<&'a dyn Probe>,
    keys: KeyBuffer,
    values: ValuePool,
    in_flight: Slab<InFlight>,
    /// Unanswered operations by connection (closed loop).
    outstanding: Vec<u32>,
    completions: Vec<Completion>,
    recorder: Recorder,
    lateness: Lateness,
    /// Operations still to be sent, in a run that ends by their number.
    budget: Option<u64>,
    phase: Phase,
    /// Start and planned end: arrivals between them are measured.
    measured_ns: (u64, u64),
    /// When the end was noticed: completions are counted until then.
    observed_end_ns: u64,
    unfinished: u64,
    next_interval: u64,
    in_window: u64,
    /// When the loop last came round, and the time of the rounds that did nothing.
    round_ns: u64,
    idle_ns: u64,
    ended: Option<Vec<Ended>>,
    cpu_start_ns: u64,
    client_cpu_ns: u64,
    server_start: Option<CpuSample>,
    server_cpu: Option<(CpuSample, CpuSample)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measure,
    Drain,
}

/// What a generator is built from.
pub(super) struct GeneratorParts<'a> {
    pub(super) target: Box<dyn Target>,
    pub(super) spec: &'a WorkloadSpec,
    pub(super) settings: &'a RunSettings,
    pub(super) trace: Option<Arc<Trace>>,
    pub(super) thread: usize,
    pub(super) clock: Clock,
    pub(super) stop: &'a AtomicBool,
    pub(super) probe: Option<&'a dyn Probe>,
    pub(super) recorder: Recorder,
    /// Whether to keep every operation.
    pub(super) keep: bool,
}

impl<'a> Generator<'a> {
    pub(super) fn new(parts: GeneratorParts<'a>) -> Self {
        let GeneratorParts {
            target,
            spec,
            settings,
            trace,
            thread,
            clock,
            stop,
            probe,
            recorder,
            keep,
        } = parts;
        let max_value = if trace.is_some() {
            crate::workload::MAX_VALUE_BYTES
        } else {
            spec.value_size.max_bytes()
        };
        Self {
            outstanding: vec![0; target.connections()],
            target,
            workload: Workload::new(spec, trace, thread, settings.threads),
            spec,
            settings,
            clock,
            stop,
            probe,
            keys: KeyBuffer::new(spec.key_len, spec.multiget_keys),
            values: ValuePool::new(max_value as usize, spec.seed),
            in_flight: Slab::with_capacity(4_096),
            completions: Vec::with_capacity(4_096),
            recorder,
            lateness: Lateness::default(),
            budget: settings.operations.map(|total| share(total, thread, settings.threads)),
            phase: Phase::WarmUp,
            measured_ns: (0, 0),
            observed_end_ns: 0,
            unfinished: 0,
            next_interval: 0,
            in_window: 0,
            round_ns: 0,
            idle_ns: 0,
            ended: keep.then(Vec::new),
            cpu_start_ns: 0,
            client_cpu_ns: 0,
            server_start: None,
            server_cpu: None,
        }
    }

    /// Runs to the end of the measured time, a stop or a lost target; always brings back what was measured.
    pub(super) fn run(mut self, thread: usize) -> ThreadResult {
        let outcome = match self.settings.mode {
            Mode::Open { rate_per_s, arrival } => {
                let rate = rate_per_s / self.settings.threads as f64;
                let seed = self.spec.seed.wrapping_add(thread as u64);
                let schedule = Schedule::new(arrival, rate, self.clock.now_ns(), seed);
                self.open_loop(schedule)
            }
            Mode::Closed { depth, window } => self.closed_loop(depth, window),
        };
        self.finish(outcome)
    }

    /// Closes the account, whatever ended the run.
    fn finish(mut self, outcome: Result<bool, TargetError>) -> ThreadResult {
        let now_ns = self.clock.now_ns();
        if self.phase == Phase::WarmUp {
            self.measured_ns = (now_ns, now_ns);
            self.observed_end_ns = now_ns;
        } else if self.phase == Phase::Measure {
            self.end_measurement(now_ns);
            self.measured_ns.1 = now_ns;
        }
        let (interrupted, error) = match outcome {
            Ok(interrupted) => (interrupted, None),
            Err(error) => {
                // Replies that came before the target was lost still count.
                for completion in std::mem::take(&mut self.completions) {
                    self.account(&completion, now_ns);
                }
                (false, Some(error))
            }
        };
        let failure = if error.is_some() {
            Failure::ConnectionLost
        } else {
            Failure::Unanswered
        };
        if interrupted {
            // Nobody waited for their replies, so nothing is known of them.
            self.in_flight.clear();
        }
        let left: Vec<_> = self.in_flight.drain().collect();
        for operation in left {
            self.keep(&operation, now_ns, Outcome::Failed(failure));
            self.unanswered(
                operation.operation.class,
                operation.intended_ns,
                operation.sent_ns,
                now_ns,
                failure,
            );
        }
        self.recorder.end_interval(self.next_interval);
        // Ends the recorder, and with it the channel: the monitor waits for that.
        let (classes, counters) = self.recorder.finish();
        ThreadResult {
            classes,
            counters,
            lateness: self.lateness,
            measured_ns: (self.measured_ns.0, self.observed_end_ns),
            in_window: self.in_window,
            unfinished: self.unfinished,
            client_cpu_ns: self.client_cpu_ns,
            idle_ns: self.idle_ns,
            ended: self.ended.unwrap_or_default(),
            server_cpu: self.server_cpu,
            error,
            interrupted,
        }
    }

    /// Accounts an operation that was asked for and never answered: its age so far is a lower bound.
    fn unanswered(&mut self, class: Class, intended_ns: u64, sent_ns: u64, now_ns: u64, failure: Failure) {
        if intended_ns >= self.measured_ns.0 && intended_ns < self.measured_ns.1 {
            self.unfinished += 1;
            let (latency_ns, service_ns) = (now_ns.saturating_sub(intended_ns), now_ns.saturating_sub(sent_ns));
            self.recorder
                .record(class, latency_ns, service_ns, Outcome::Failed(failure));
        }
    }

    /// Sends what is due, whatever is still unanswered. Returns whether it was interrupted.
    fn open_loop(&mut self, mut schedule: Schedule) -> Result<bool, TargetError> {
        let connections = self.target.connections();
        let max_in_flight = self.settings.max_in_flight;
        let mut connection = 0;
        let mut held_before_ns = 0;
        let mut idle = false;
        loop {
            let mut now_ns = self.clock.now_ns();
            if self.advance_phase(now_ns) == Phase::Drain {
                break;
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(true);
            }
            self.round(now_ns, idle);
            idle = schedule.peek_ns() > now_ns;
            while schedule.peek_ns() <= now_ns {
                if self.in_flight.len() >= max_in_flight {
                    // Whatever is due before a place is free again waits for the target, not for us.
                    held_before_ns = now_ns;
                    break;
                }
                let intended_ns = schedule.pop_ns();
                if self.phase == Phase::Measure && intended_ns >= self.measured_ns.0 {
                    let held = intended_ns <= held_before_ns;
                    self.lateness.record(&self.settings.lateness, intended_ns, now_ns, held);
                }
                let operation = self.workload.next_operation();
                self.send(connection, operation, intended_ns, now_ns)?;
                connection = if connection + 1 == connections {
                    0
                } else {
                    connection + 1
                };
                now_ns = self.clock.now_ns();
            }
            self.target.flush()?;
            let wait = self.wait_before(schedule.peek_ns(), now_ns);
            idle &= !self.receive(wait)?;
        }
        // What was due before the end and is late only because this thread overslept goes out now.
        while schedule.peek_ns() < self.measured_ns.1 && self.in_flight.len() < max_in_flight {
            let (intended_ns, now_ns) = (schedule.pop_ns(), self.clock.now_ns());
            if intended_ns >= self.measured_ns.0 {
                self.lateness.record(
                    &self.settings.lateness,
                    intended_ns,
                    now_ns,
                    intended_ns <= held_before_ns,
                );
            }
            let operation = self.workload.next_operation();
            self.send(connection, operation, intended_ns, now_ns)?;
            connection = if connection + 1 == connections {
                0
            } else {
                connection + 1
            };
        }
        // Arrivals that never found a place were still asked for: they are unanswered, not absent.
        let drained = self.drain();
        let now_ns = self.clock.now_ns();
        while schedule.peek_ns() < self.measured_ns.1 {
            let intended_ns = schedule.pop_ns();
            self.lateness.held += u64::from(intended_ns >= self.measured_ns.0);
            let class = self.workload.next_operation().class;
            self.unanswered(class, intended_ns, now_ns, now_ns, Failure::Unanswered);
        }
        drained.map(|()| false)
    }

    /// Keeps `depth` operations on each connection: one for one (`window`), or a whole batch when the last
    /// one has come back.
    fn closed_loop(&mut self, depth: u32, window: bool) -> Result<bool, TargetError> {
        // Without a warm-up the first operation is measured already.
        self.advance_phase(self.clock.now_ns());
        let now_ns = self.clock.now_ns();
        for connection in 0..self.target.connections() {
            self.fill(connection, depth, now_ns)?;
        }
        self.target.flush()?;
        let mut freed = Vec::with_capacity(self.target.connections());
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(true);
            }
            let wait = if self.settings.spin {
                Duration::ZERO
            } else {
                Duration::from_millis(10)
            };
            freed.clear();
            let idle = !self.receive_into(wait, window.then_some(depth), &mut freed)?;
            let now_ns = self.clock.now_ns();
            self.round(now_ns, idle);
            let spent = self.budget == Some(0) && self.in_flight.is_empty();
            if self.advance_phase(now_ns) == Phase::Drain || spent {
                break;
            }
            for connection in freed.drain(..) {
                self.fill(connection, depth, now_ns)?;
            }
            self.target.flush()?;
        }
        self.drain()?;
        Ok(false)
    }

    /// Sends until `depth` operations stand on the connection.
    fn fill(&mut self, connection: usize, depth: u32, now_ns: u64) -> Result<(), TargetError> {
        while self.outstanding[connection] < depth {
            match &mut self.budget {
                Some(0) => break,
                Some(left) => *left -= 1,
                None => {}
            }
            let operation = self.workload.next_operation();
            self.send(connection, operation, now_ns, now_ns)?;
        }
        Ok(())
    }

    /// Waits for what is in flight, up to the drain time.
    fn drain(&mut self) -> Result<(), TargetError> {
        let deadline_ns = self.clock.now_ns() + duration_ns(self.settings.drain);
        self.target.flush()?;
        while !self.in_flight.is_empty() && self.clock.now_ns() < deadline_ns && !self.stop.load(Ordering::Relaxed) {
            self.receive(Duration::from_millis(1))?;
            self.target.flush()?;
        }
        Ok(())
    }

    /// How long the sockets may be waited for before the next send.
    fn wait_before(&self, due_ns: u64, now_ns: u64) -> Duration {
        // The kernel's timers wake up to a millisecond late, so the last two are spun away.
        const SPIN_NS: u64 = 2_000_000;
        if self.settings.spin || due_ns < now_ns + SPIN_NS {
            return Duration::ZERO;
        }
        Duration::from_nanos((due_ns - now_ns - SPIN_NS).clamp(1, 10_000_000))
    }

    #[inline]
    fn send(
        &mut self,
        connection: usize,
        operation: Operation,
        intended_ns: u64,
        now_ns: u64,
    ) -> Result<(), TargetError> {
        let token = self.in_flight.insert(InFlight {
            operation,
            intended_ns,
            sent_ns: now_ns,
            conditional: false,
        }) as Token;
        self.outstanding[connection] += 1;
        self.keys.clear();
        match operation.class {
            Class::Incr => self.keys.push_counter(operation.key),
            _ => self.keys.push(operation.key),
        }
        let request = match operation.class {
            Class::Get => Request::Get {
                key: self.keys.as_bytes(),
                version: false,
            },
            Class::Cas => Request::Get {
                key: self.keys.as_bytes(),
                version: true,
            },
            Class::Incr => Request::Incr {
                key: self.keys.as_bytes(),
            },
            Class::Put | Class::Refill => Request::Put {
                key: self.keys.as_bytes(),
                value: self.values.value(operation.key, operation.value_len),
                ttl_ms: self.spec.ttl_ms,
            },
            Class::MultiGet => {
                for _ in 1..self.spec.multiget_keys {
                    let key = self.workload.next_key();
                    self.keys.push(key);
                }
                Request::MultiGet {
                    keys: self.keys.as_bytes(),
                    key_len: self.spec.key_len,
                }
            }
        };
        self.target.submit(connection, token, &request)
    }

    /// Notes that the loop came round; `idle` when there was nothing to send and nothing had arrived.
    #[inline]
    fn round(&mut self, now_ns: u64, idle: bool) {
        if idle && self.phase == Phase::Measure {
            self.idle_ns += now_ns - self.round_ns.max(self.measured_ns.0).min(now_ns);
        }
        self.round_ns = now_ns;
    }

    /// Polls once and accounts what came back; returns whether anything did.
    fn receive(&mut self, wait: Duration) -> Result<bool, TargetError> {
        let mut freed = Vec::new();
        self.receive_into(wait, Some(0), &mut freed)
    }

    /// As [`Self::receive`]; `freed` gets the connections to fill again: those below `Some(depth)`, or the empty ones when `None`.
    fn receive_into(
        &mut self,
        wait: Duration,
        depth: Option<u32>,
        freed: &mut Vec<usize>,
    ) -> Result<bool, TargetError> {
        self.target.poll(wait, &mut self.completions)?;
        if self.completions.is_empty() {
            return Ok(false);
        }
        let now_ns = self.clock.now_ns();
        let mut completions = std::mem::take(&mut self.completions);
        for completion in completions.drain(..) {
            self.outstanding[completion.connection] -= 1;
            if let Some((operation, version)) = self.account(&completion, now_ns) {
                self.follow_up(completion.connection, operation, version, now_ns)?;
                continue;
            }
            let left = self.outstanding[completion.connection];
            if depth.map_or(left == 0, |depth| left < depth) {
                freed.push(completion.connection);
            }
        }
        self.completions = completions;
        Ok(true)
    }

    /// Keeps one operation, where the run does.
    #[inline]
    fn keep(&mut self, operation: &InFlight, now_ns: u64, outcome: Outcome) {
        let start_ns = self.measured_ns.0;
        if let Some(ended) = &mut self.ended
            && self.phase != Phase::WarmUp
            && operation.intended_ns >= start_ns
        {
            ended.push(Ended {
                class: operation.operation.class,
                key: operation.operation.key,
                intended_ns: operation.intended_ns - start_ns,
                ended_ns: now_ns.saturating_sub(start_ns),
                failure: match outcome {
                    Outcome::Failed(failure) => Some(failure),
                    _ => None,
                },
            });
        }
    }

    /// Records the end of an operation; returns what must follow it: a refill, or the write of a
    /// compare-and-swap with the version it read.
    #[inline]
    fn account(&mut self, completion: &Completion, now_ns: u64) -> Option<(InFlight, Option<u64>)> {
        let operation = self.in_flight.try_remove(completion.token as usize)?;
        let class = operation.operation.class;
        if class == Class::Cas
            && !operation.conditional
            && let Outcome::Hit { version } = completion.outcome
        {
            return Some((operation, Some(version)));
        }
        self.keep(&operation, now_ns, completion.outcome);
        if self.phase != Phase::WarmUp {
            // A server that refuses quickly is not a fast one.
            if self.phase == Phase::Measure && !matches!(completion.outcome, Outcome::Failed(_)) {
                self.in_window += 1;
            }
            let in_time = self.phase == Phase::Measure || operation.intended_ns < self.measured_ns.1;
            if operation.intended_ns >= self.measured_ns.0 && in_time {
                let latency_ns = now_ns.saturating_sub(operation.intended_ns);
                let service_ns = now_ns.saturating_sub(operation.sent_ns);
                self.recorder.record(class, latency_ns, service_ns, completion.outcome);
            }
        }
        if self.spec.refill && class == Class::Get && completion.outcome == Outcome::Miss && self.phase != Phase::Drain
        {
            return Some((operation, None));
        }
        None
    }

    fn follow_up(
        &mut self,
        connection: usize,
        operation: InFlight,
        version: Option<u64>,
        now_ns: u64,
    ) -> Result<(), TargetError> {
        let Some(version) = version else {
            let refill = Operation {
                class: Class::Refill,
                ..operation.operation
            };
            return self.send(connection, refill, now_ns, now_ns);
        };
        let token = self.in_flight.insert(InFlight {
            conditional: true,
            ..operation
        }) as Token;
        self.outstanding[connection] += 1;
        self.keys.clear();
        self.keys.push(operation.operation.key);
        let value = self
            .values
            .value(operation.operation.key, operation.operation.value_len);
        let request = Request::PutIfVersion {
            key: self.keys.as_bytes(),
            value,
            version,
        };
        self.target.submit(connection, token, &request)
    }

    /// Moves from warm-up to measuring to draining, and ends intervals.
    #[inline]
    fn advance_phase(&mut self, now_ns: u64) -> Phase {
        match self.phase {
            Phase::WarmUp if now_ns >= duration_ns(self.settings.warmup) => {
                self.server_start = self.probe.and_then(Probe::sample);
                self.cpu_start_ns = crate::system::thread_cpu_ns();
                let start_ns = self.clock.now_ns();
                self.measured_ns = (start_ns, start_ns + duration_ns(self.settings.duration));
                self.phase = Phase::Measure;
            }
            Phase::Measure if now_ns >= self.measured_ns.1 => {
                self.end_measurement(now_ns);
            }
            Phase::Measure => {
                let interval_ns = duration_ns(self.settings.interval).max(1);
                let index = (now_ns - self.measured_ns.0) / interval_ns;
                while self.next_interval < index {
                    self.recorder.end_interval(self.next_interval);
                    self.next_interval += 1;
                }
            }
            _ => {}
        }
        self.phase
    }

    fn end_measurement(&mut self, now_ns: u64) {
        self.client_cpu_ns = crate::system::thread_cpu_ns().saturating_sub(self.cpu_start_ns);
        if let (Some(start), Some(end)) = (self.server_start.take(), self.probe.and_then(Probe::sample)) {
            self.server_cpu = Some((start, end));
        }
        self.observed_end_ns = now_ns;
        self.phase = Phase::Drain;
    }
}

/// Thread `index`'s part of `total` operations.
fn share(total: u64, index: usize, threads: usize) -> u64 {
    total / threads as u64 + u64::from((index as u64) < total % threads as u64)
}
