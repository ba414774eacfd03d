//! Whether, and when, a failed attempt is made again.
//!
//! Three things bound retries: the request's deadline, what is known of its effect (in doubt is final, unless the write belongs
//! to a session), and a budget that all requests of a client share, so that retries cannot multiply the load on a cluster that
//! is already failing. An attempt that found no connection has sent nothing and costs nothing of it: the pause between connection
//! attempts bounds those. The budget is a token bucket fed by requests, not by time (Finagle's `RetryBudget`, gRPC's retry
//! throttling, proposal A6).

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::error::{Error, NotSent, State};

/// How retries are paced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Wait before the first retry; it doubles with each.
    pub initial_backoff: Duration,
    /// Longest wait between two attempts, before what a node asks for.
    pub max_backoff: Duration,
    /// Retries, or hedges, earned by a hundred requests: 20 is one for five requests in the long run.
    pub budget_percent: u32,
    /// Retries that can be saved up. It is also what a new client starts with. 0 switches retries and hedges off.
    pub budget_capacity: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            initial_backoff: Duration::from_millis(5),
            max_backoff: Duration::from_millis(500),
            budget_percent: 20,
            budget_capacity: 1000,
        }
    }
}

/// The token bucket all requests of a client share.
#[derive(Debug)]
pub struct Budget {
    /// Thousandths of a retry.
    tokens: AtomicU32,
    capacity: u32,
    earned: u32,
}

/// Thousandths of a retry that one retry costs.
const RETRY_COST: u32 = 1000;

impl Budget {
    /// A full bucket.
    pub fn new(policy: &RetryPolicy) -> Self {
        let capacity = policy.budget_capacity.saturating_mul(RETRY_COST);
        Self {
            tokens: AtomicU32::new(capacity),
            capacity,
            earned: policy.budget_percent.saturating_mul(RETRY_COST / 100),
        }
    }

    /// A request begins: it earns its part of a retry.
    pub fn deposit(&self) {
        // A bucket that is full, which is the usual case, is only read.
        let mut tokens = self.tokens.load(Ordering::Relaxed);
        while tokens < self.capacity {
            let more = tokens.saturating_add(self.earned).min(self.capacity);
            match self
                .tokens
                .compare_exchange_weak(tokens, more, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(now) => tokens = now,
            }
        }
    }

    /// Pays for one retry, if there is enough.
    pub fn withdraw(&self) -> bool {
        self.tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| {
                tokens.checked_sub(RETRY_COST)
            })
            .is_ok()
    }

    /// Pays for what would be good to have, such as a hedge: only while more than half of the capacity is left, so that retries always
    /// find something.
    pub fn withdraw_spare(&self) -> bool {
        let floor = self.spare_above();
        self.tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| {
                (tokens > floor).then(|| tokens - RETRY_COST)
            })
            .is_ok()
    }

    /// Whether there is anything for what would be good to have.
    pub fn has_spare(&self) -> bool {
        self.tokens.load(Ordering::Relaxed) > self.spare_above()
    }

    fn spare_above(&self) -> u32 {
        (self.capacity / 2).max(RETRY_COST)
    }

    /// Whole retries that are left.
    pub fn left(&self) -> u32 {
        self.tokens.load(Ordering::Relaxed) / RETRY_COST
    }
}

/// The attempts of one request.
#[derive(Debug, Clone, Copy)]
pub struct Attempts {
    deadline: Duration,
    /// Whether a retry of what is in doubt is deduplicated by the cluster.
    in_session: bool,
    /// Whether it is a read whose attempts may have less time than the request.
    is_read: bool,
    /// Attempts after the first.
    made: u32,
    /// Those of them that waited.
    paced: u32,
    /// Those that followed a redirect, as far as they count.
    redirects: u32,
}

/// Redirects that are followed at once. A chain longer than this means that leadership is moving about: wait.
const FREE_REDIRECTS: u32 = 4;

impl Attempts {
    /// A request that must be done by `deadline`.
    pub const fn new(deadline: Duration, in_session: bool) -> Self {
        Self {
            deadline,
            in_session,
            is_read: false,
            made: 0,
            paced: 0,
            redirects: 0,
        }
    }

    /// The same, for a read: an attempt that was not answered in its time is followed by another.
    #[must_use]
    pub const fn of_read(self) -> Self {
        Self { is_read: true, ..self }
    }

    /// When the request must be done.
    pub const fn deadline(&self) -> Duration {
        self.deadline
    }

    /// How many attempts were made after the first.
    pub const fn retries(&self) -> u32 {
        self.made
    }

    /// An attempt failed with `error`. Says how long to wait before the next one, or `None` when the error is final.
    ///
    /// `redirected`: the node named a leader newer than the one known, or is a replica that cannot answer what another can, so the next
    /// attempt goes elsewhere at once and costs nothing. `random` is any 64 random bits.
    pub fn after(
        &mut self,
        error: &Error,
        redirected: bool,
        now: Duration,
        policy: &RetryPolicy,
        budget: &Budget,
        random: u64,
    ) -> Option<Duration> {
        if !self.may_repeat(error, redirected) || now >= self.deadline {
            return None;
        }
        if redirected && self.redirects < FREE_REDIRECTS {
            self.redirects += 1;
            self.made += 1;
            return Some(Duration::ZERO);
        }
        let backoff = jittered(backoff(policy, self.paced), random);
        // The node's advice is a floor, and the jitter on top of it keeps the refused from coming back all at once.
        let delay = error.retry_after().map_or(backoff, |floor| floor + backoff);
        if now + delay >= self.deadline {
            return None;
        }
        if matches!(error, Error::NotSent(NotSent::Connect(_))) {
            // A redirect that could not be followed has closed no circle.
            self.redirects = self.redirects.saturating_sub(1);
        } else if !budget.withdraw() && !self.gave_up(error) {
            return None;
        }
        self.paced += 1;
        self.made += 1;
        Some(delay)
    }

    /// Whether a read gave up an attempt before its time. It did so while there was budget, and must not fail for it now.
    const fn gave_up(&self, error: &Error) -> bool {
        self.is_read && matches!(error, Error::NotSent(NotSent::Timeout { .. }))
    }

    fn may_repeat(&self, error: &Error, redirected: bool) -> bool {
        match error {
            Error::Rejected(_) => false,
            Error::InDoubt(_) => self.in_session,
            Error::NotSent(error) => match error {
                // An attempt may have less time than the request.
                NotSent::Timeout { .. } => self.in_session || self.is_read,
                // Asking again gives the same answer.
                NotSent::ReadOnly { .. } | NotSent::DiskFailed { .. } | NotSent::Protocol { .. } | NotSent::Closed => {
                    false
                }
                // Unless another is asked.
                NotSent::TooStale { .. } => redirected,
                NotSent::Connect(error) => error.is_transient(),
                NotSent::ConnectionLost { .. }
                | NotSent::Busy { .. }
                | NotSent::NoQuorum { .. }
                | NotSent::NoLeader { .. }
                | NotSent::ShuttingDown { .. }
                | NotSent::Other { .. } => true,
            },
        }
    }
}

/// What is known of the earlier attempts at one write in a session.
#[derive(Debug, Clone, Default)]
pub struct Doubt(Option<Error>);

impl Doubt {
    /// An attempt failed.
    pub fn note(&mut self, error: &Error) {
        if self.0.is_none() && error.state() == State::InDoubt {
            self.0 = Some(error.clone());
        }
    }

    /// Whether no attempt can have been executed: only then may the write be given a new number, in a new session.
    pub const fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// The error of the write whose last attempt failed with `last`: what an earlier one may have done outweighs what the last one did
    /// not.
    pub fn outweighs(self, last: Error) -> Error {
        self.0.unwrap_or(last)
    }
}

/// Exponential backoff: the `n`-th wait without jitter.
pub fn backoff(policy: &RetryPolicy, n: u32) -> Duration {
    policy
        .initial_backoff
        .saturating_mul(1 << n.min(20))
        .min(policy.max_backoff)
}

/// Between half of `delay` and all of it ("equal jitter": M. Brooker, Exponential Backoff and Jitter, AWS 2015).
pub fn jittered(delay: Duration, random: u64) -> Duration {
    let half = delay / 2;
    let part = (half.as_nanos() as u64).saturating_add(1);
    half + Duration::from_nanos(random % part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::error::{ConnectError, InDoubt, Rejected};

    const NOW: Duration = Duration::from_secs(100);
    const DEADLINE: Duration = Duration::from_secs(101);

    fn busy(retry_after_ms: u64) -> Error {
        NotSent::Busy {
            peer: String::new(),
            retry_after: Duration::from_millis(retry_after_ms),
        }
        .into()
    }

    fn lost() -> Error {
        InDoubt::ConnectionLost {
            peer: String::new(),
            reason: String::new(),
        }
        .into()
    }

    #[test]
    fn what_is_in_doubt_is_repeated_in_a_session_only() {
        let policy = RetryPolicy::default();
        let budget = Budget::new(&policy);
        let mut plain = Attempts::new(DEADLINE, false);
        assert_eq!(plain.after(&lost(), false, NOW, &policy, &budget, 1), None);
        assert_eq!(plain.after(&lost(), true, NOW, &policy, &budget, 1), None);
        let mut session = Attempts::new(DEADLINE, true);
        assert!(session.after(&lost(), false, NOW, &policy, &budget, 1).is_some());
    }

    #[test]
    fn an_earlier_doubt_outweighs_a_later_refusal() {
        let mut doubt = Doubt::default();
        doubt.note(&busy(1));
        assert!(doubt.is_none());
        assert_eq!(
            doubt.clone().outweighs(Rejected::SessionExpired.into()),
            Rejected::SessionExpired.into()
        );
        doubt.note(&lost());
        doubt.note(&busy(1));
        assert!(!doubt.is_none());
        assert_eq!(doubt.outweighs(Rejected::SessionExpired.into()), lost());
    }

    #[test]
    fn a_rejection_is_final() {
        let policy = RetryPolicy::default();
        let budget = Budget::new(&policy);
        let error = Rejected::NotANumber.into();
        assert_eq!(
            Attempts::new(DEADLINE, true).after(&error, false, NOW, &policy, &budget, 1),
            None
        );
    }

    #[test]
    fn retry_after_is_a_floor_and_the_deadline_a_ceiling() {
        let policy = RetryPolicy::default();
        let budget = Budget::new(&policy);
        for random in [0, 1, u64::MAX] {
            let mut attempts = Attempts::new(DEADLINE, false);
            let delay = attempts
                .after(&busy(200), false, NOW, &policy, &budget, random)
                .unwrap();
            assert!(
                delay >= Duration::from_millis(200) && delay <= Duration::from_millis(205),
                "{delay:?}"
            );
            assert_eq!(attempts.after(&busy(2000), false, NOW, &policy, &budget, random), None);
            assert_eq!(
                attempts.after(&busy(0), false, DEADLINE, &policy, &budget, random),
                None
            );
        }
    }

    #[test]
    fn redirects_are_free_until_they_go_in_circles() {
        let policy = RetryPolicy {
            budget_capacity: 1,
            budget_percent: 0,
            ..RetryPolicy::default()
        };
        let budget = Budget::new(&policy);
        let moved = NotSent::NoLeader { shard: 0 }.into();
        let mut attempts = Attempts::new(DEADLINE, false);
        for _ in 0..FREE_REDIRECTS {
            assert_eq!(
                attempts.after(&moved, true, NOW, &policy, &budget, 7),
                Some(Duration::ZERO)
            );
        }
        assert!(attempts.after(&moved, true, NOW, &policy, &budget, 7).unwrap() > Duration::ZERO);
        assert_eq!(
            attempts.after(&moved, true, NOW, &policy, &budget, 7),
            None,
            "the budget is spent"
        );
    }

    #[test]
    fn a_read_that_gave_an_attempt_up_makes_another_whatever_is_left_and_a_write_does_not() {
        let policy = RetryPolicy {
            budget_capacity: 1,
            budget_percent: 0,
            ..RetryPolicy::default()
        };
        let budget = Budget::new(&policy);
        let timeout = NotSent::Timeout { after: NOW }.into();
        let mut write = Attempts::new(DEADLINE, false);
        assert_eq!(write.after(&timeout, false, NOW, &policy, &budget, 1), None);
        let mut read = Attempts::new(DEADLINE, false).of_read();
        for left in [0, 0] {
            assert!(read.after(&timeout, false, NOW, &policy, &budget, 1).is_some());
            assert_eq!(budget.left(), left);
        }
        assert_eq!(
            read.after(&busy(1), false, NOW, &policy, &budget, 1),
            None,
            "others do fail for it"
        );
        assert_eq!(read.after(&timeout, false, DEADLINE, &policy, &budget, 1), None);
    }

    #[test]
    fn what_found_no_connection_costs_nothing_of_the_budget() {
        let policy = RetryPolicy {
            budget_capacity: 1,
            budget_percent: 0,
            ..RetryPolicy::default()
        };
        let budget = Budget::new(&policy);
        let mut attempts = Attempts::new(DEADLINE, false);
        let unreachable = |transient| {
            let peer = String::new();
            Error::from(if transient {
                ConnectError::NoAnswer {
                    peer,
                    after: Duration::ZERO,
                }
            } else {
                ConnectError::ServerCertificate {
                    peer,
                    reason: String::new(),
                }
            })
        };
        let mut waited = Duration::ZERO;
        while let Some(delay) = attempts.after(&unreachable(true), false, NOW + waited, &policy, &budget, 7) {
            assert!(delay > Duration::ZERO, "it never spins");
            waited += delay;
        }
        assert!(
            waited > Duration::from_millis(400),
            "only the deadline ends it: {waited:?}"
        );
        assert_eq!(budget.left(), 1);
        let mut attempts = Attempts::new(DEADLINE, false);
        assert_eq!(
            attempts.after(&unreachable(false), false, NOW, &policy, &budget, 7),
            None
        );
    }

    #[test]
    fn requests_earn_retries_up_to_the_capacity() {
        let policy = RetryPolicy {
            budget_capacity: 2,
            budget_percent: 50,
            ..RetryPolicy::default()
        };
        let budget = Budget::new(&policy);
        assert!(budget.withdraw() && budget.withdraw() && !budget.withdraw());
        budget.deposit();
        assert!(!budget.withdraw());
        budget.deposit();
        assert!(budget.withdraw());
        for _ in 0..100 {
            budget.deposit();
        }
        assert_eq!(budget.left(), 2);
    }

    #[test]
    fn hedges_leave_half_of_the_budget_to_retries() {
        let policy = RetryPolicy {
            budget_capacity: 10,
            budget_percent: 0,
            ..RetryPolicy::default()
        };
        let budget = Budget::new(&policy);
        let hedges = (0..20).filter(|_| budget.withdraw_spare()).count();
        assert_eq!((hedges, budget.left()), (5, 5));
        let retries = (0..20).filter(|_| budget.withdraw()).count();
        assert_eq!(retries, 5);
        let none = Budget::new(&RetryPolicy {
            budget_capacity: 0,
            ..policy
        });
        assert!(!none.withdraw_spare() && !none.withdraw());
    }

    #[test]
    fn backoff_doubles_up_to_its_bound_and_never_overflows() {
        let policy = RetryPolicy::default();
        assert_eq!(backoff(&policy, 0), Duration::from_millis(5));
        assert_eq!(backoff(&policy, 3), Duration::from_millis(40));
        assert_eq!(backoff(&policy, u32::MAX), policy.max_backoff);
    }
}
