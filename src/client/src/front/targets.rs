//! Whom a request goes to: the leader of its shard, the replica that looks quickest, one node, or any.
//!
//! What is known of leaders and nodes is the core's ([`crate::core::routing`], [`crate::core::breaker`]), and so is the choice between
//! replicas ([`crate::core::choice`]). Here candidates are gathered, and those without a connection or an answer seen to in the
//! background, so that no request waits for a node that another can stand in for.

use std::sync::Arc;

use generation_proto::{Operation, RequestOptions};
use tokio::time::Instant;

use super::dispatch::{Inner, To};
use super::pool::Key;
use crate::core::breaker::Admission;
use crate::core::choice::{Candidate, Turn, choose};
use crate::core::error::{ConnectError, Error, NotSent, Rejected};
use crate::core::routing::{Routes, Target};

impl Inner {
    /// Whom to ask in the attempt of this number. A node that is asked for by its id and does not answer is an error at once, unless it is
    /// time to see whether it does.
    pub(super) fn target(&self, to: To, attempt: u32) -> Result<Target, Error> {
        let routes = self.read_routes();
        let any = |id: u64| {
            routes.node(id).map(|node| Target {
                node: node.id,
                addr: node.addr,
                core: 0,
            })
        };
        match to {
            To::Shard(shard) => leader_or_any(&routes, shard, attempt),
            To::Node(id) => {
                let target = any(id)
                    .ok_or_else(|| Rejected::InvalidArgument(format!("there is no node {id} in the cluster's map")))?;
                let health = self.health.of(id);
                match health.admit() {
                    Admission::Refuse => health
                        .down(&target.addr.to_string())
                        .map_or(Ok(target), |down| Err(down.into())),
                    // The request is the probe.
                    Admission::Probe => {
                        self.pool.forgive(Key::of(target));
                        Ok(target)
                    }
                    Admission::Pass => Ok(target),
                }
            }
            To::Any => {
                let nodes = &routes.map().nodes;
                let first = attempt as usize % nodes.len().max(1);
                let in_turn = || nodes[first..].iter().chain(&nodes[..first]).map(|node| node.id);
                in_turn()
                    .find(|&id| !self.health.of(id).is_down())
                    .or_else(|| in_turn().next())
                    .and_then(any)
                    .ok_or_else(|| NotSent::NoLeader { shard: 0 }.into())
            }
        }
    }

    /// Whom to ask what any replica may answer, in the attempt of this number after one at `asked`. Nodes that do not answer are left
    /// out; it is an error when that leaves none. Those without a connection are connected to for the reads to come, and waited for only
    /// where there is no other.
    pub(super) fn replica(
        self: &Arc<Self>,
        routes: &Routes,
        shard: u16,
        number: u32,
        asked: Option<u64>,
    ) -> Result<Target, Error> {
        if Turn::of_attempt(number) == Turn::Leader
            && let Some(leader) = routes.leader(shard)
            && asked != Some(leader.node)
            && !self.health.of(leader.node).is_down()
        {
            return Ok(leader);
        }
        let now = self.now();
        let (mut connected, mut others, mut down) = (Vec::new(), Vec::new(), None);
        for target in routes.replicas(shard) {
            let health = self.health.of(target.node);
            match health.admit() {
                Admission::Pass => {
                    let is_ready = self.pool.is_ready(Key::of(target), target.node);
                    let candidates = if is_ready { &mut connected } else { &mut others };
                    candidates.push(Candidate {
                        target,
                        // The map does not say where a node is.
                        zone: None,
                        estimate: health.load().estimate(now),
                    });
                    continue;
                }
                Admission::Probe => self.probe(target),
                Admission::Refuse => {}
            }
            down = down.or_else(|| health.down(&target.addr.to_string()));
        }
        // Whoever was asked last comes after one that has to be connected to first.
        let has_another =
            |candidates: &[Candidate<'_>]| candidates.iter().any(|other| asked != Some(other.target.node));
        let from = if has_another(&connected) || !has_another(&others) && !connected.is_empty() {
            &connected
        } else {
            &others
        };
        if let Some(chosen) = choose(from, None, asked, self.random()) {
            return Ok(chosen);
        }
        match down {
            Some(down) => Err(down.into()),
            // A shard without replicas in the map: whoever there is may know better.
            None => leader_or_any(routes, shard, number),
        }
    }

    /// Whom to ask for a read that must be linearizable and that `asked` did not answer: another replica, which has the leader confirm.
    pub(super) fn instead_of(self: &Arc<Self>, shard: u16, asked: Option<u64>, number: u32) -> Result<Target, Error> {
        let routes = self.read_routes();
        self.replica(&routes, shard, 0, asked)
            .or_else(|_| leader_or_any(&routes, shard, number))
    }

    /// Sees in the background whether a node answers again.
    fn probe(self: &Arc<Self>, target: Target) {
        let (inner, target) = (self.clone(), Target { core: 0, ..target });
        tokio::spawn(async move {
            inner.pool.forgive(Key::of(target));
            let allowed = inner.settings.connect_timeout;
            let until = Instant::now() + allowed;
            let ping = Operation::Ping { payload: b"generation" };
            let options = RequestOptions::default();
            let asked = inner.attempt(
                To::Node(target.node),
                target,
                ping,
                64,
                options,
                (until, until),
                allowed,
            );
            if asked.await.is_err() {
                let no_answer = ConnectError::NoAnswer {
                    peer: target.addr.to_string(),
                    after: allowed,
                };
                inner.health.of(target.node).failed(&no_answer, inner.random());
            }
        });
    }
}

/// Where the leader of a shard is, or whom to ask about it.
fn leader_or_any(routes: &Routes, shard: u16, attempt: u32) -> Result<Target, Error> {
    routes.target(shard, attempt).ok_or_else(|| {
        Rejected::InvalidArgument(format!(
            "there is no shard {shard}: the cluster has {}, counted from 0",
            routes.shards()
        ))
        .into()
    })
}
