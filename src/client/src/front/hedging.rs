//! A read asked of two replicas, the second one a while after the first: the answer that comes first counts, the other request is
//! dropped, and with it its place among those that are unanswered.
//!
//! When, and whether there is budget for it, is the core's decision ([`crate::core::hedge`]).

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::{Either, select};
use generation_proto::{Operation, RequestOptions};
use tokio::time::{Instant, timeout};

use super::dispatch::{Answer, Failure, Inner, To, request_len};
use super::pool::Key;
use crate::core::hedge::HedgePolicy;
use crate::core::routing::Target;

/// What is read.
pub(super) struct Read<'r> {
    pub(super) to: To,
    pub(super) key: &'r [u8],
    pub(super) options: RequestOptions,
    /// When it must be done, and until when this attempt is waited for.
    pub(super) times: (Instant, Instant),
    pub(super) allowed: Duration,
}

impl Inner {
    /// One attempt at a read, at `target` and, when that takes long, at another replica too. Where both fail, it is as
    /// the first did.
    pub(super) async fn hedged(
        self: &Arc<Self>,
        policy: HedgePolicy,
        is_any_replicas: bool,
        target: Target,
        read: &Read<'_>,
    ) -> Result<Answer, Failure> {
        let latencies = &self.latencies[usize::from(!is_any_replicas)];
        let start = Instant::now();
        let mut first = pin!(self.ask(target, read));
        if let Ok(answer) = timeout(latencies.delay(policy.delay), first.as_mut()).await {
            if answer.is_ok() {
                latencies.note(start.elapsed());
            }
            return answer;
        }
        let Some(other) = self.second(read.to, target) else {
            let answer = first.await;
            latencies.note(start.elapsed());
            return answer;
        };
        tracing::debug!(
            first = target.node,
            second = other.node,
            "slow: another replica is asked too"
        );
        self.counters.hedges.fetch_add(1, Ordering::Relaxed);
        let second_start = Instant::now();
        let second = pin!(self.ask(other, read));
        let (answer, loser) = match select(first, second).await {
            Either::Left((Ok(answer), _)) => (Ok(answer), Some((other, second_start))),
            Either::Right((Ok(answer), _)) => {
                self.counters.hedges_won.fetch_add(1, Ordering::Relaxed);
                (Ok(answer), Some((target, start)))
            }
            Either::Left((Err(failure), second)) => (second.await.map_err(|_| failure), None),
            Either::Right((Err(_), first)) => (first.await, None),
        };
        // The first one took at least as long.
        latencies.note(start.elapsed());
        if let Some((loser, since)) = loser {
            let health = self.health.of(loser.node);
            health.load().give_up(since.elapsed(), health.now());
            if health.unanswered(loser.addr, since, self.random()) {
                self.unreachable(loser);
            }
        }
        answer
    }

    async fn ask(self: &Arc<Self>, target: Target, read: &Read<'_>) -> Result<Answer, Failure> {
        let operation = Operation::Get { key: read.key };
        let len = request_len(&operation);
        self.attempt(read.to, target, operation, len, read.options, read.times, read.allowed)
            .await
    }

    /// Another replica that can be asked at once and that the budget allows to ask.
    fn second(self: &Arc<Self>, to: To, first: Target) -> Option<Target> {
        let To::Shard(shard) = to else { return None };
        let other = self.replica(&self.read_routes(), shard, 0, Some(first.node)).ok()?;
        let is_there = other.node != first.node && self.pool.open_at(Key::of(other)).is_some();
        (is_there && self.budget.withdraw_spare()).then_some(other)
    }
}
