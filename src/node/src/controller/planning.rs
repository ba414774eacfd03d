//! What the controller's leader does by itself, and what it makes of an administrator's request.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use generation_engine::cluster::planner::{Moving, plan};
use generation_engine::cluster::preflight::{Membership, Refusal};
use generation_engine::cluster::records::{Node, NodeState, Record};
use generation_engine::cluster::{GroupSeen, NodeSeen, Observed, Step, preflight};
use generation_proto::Status;
use generation_proto::cluster::{NodeInfo, Progress, Verb, decode_nodes, decode_setting};
use openraft_rt::Instant as _;

use super::asking::{malformed, refused};
use super::report::Led;
use super::{Controller, Heard};
use crate::env::disk::Disk;
use crate::raft::runtime::CoreInstant;
use crate::view::CONTROLLER;

/// How often it is planned.
const PLAN: Duration = Duration::from_millis(250);

/// How old a report may be.
const STALE: Duration = Duration::from_secs(5);

/// How often a node that the records have wrong says so.
const INTRODUCE: Duration = Duration::from_secs(1);

impl<D: Disk> Controller<D> {
    /// What is seen of the cluster now.
    fn observe(&self, now: Instant) -> Observed {
        let cluster = self.cluster.borrow();
        let own = self.own.info.node;
        let heard = self.heard.borrow();
        let own_report = self.own_report();
        let fresh = heard
            .iter()
            .filter(|(_, heard)| now.saturating_duration_since(heard.at) < STALE);
        let reports = fresh.map(|(node, Heard { report, .. })| (*node, report));
        let wrong = self.clocks.borrow().wrong.clone();
        let silent = self.silent.borrow();
        let mut seen = Observed::default();
        for node in cluster.nodes() {
            let dead_for = silent.get(&node.id).map(|since| now.saturating_duration_since(*since));
            let node_seen = NodeSeen {
                alive: node.id == own || self.peers.is_alive(node.id),
                dead_for_ms: dead_for.map_or(0, |dead_for| dead_for.as_millis() as u64),
                clock_ok: !wrong.contains(&node.id),
                ..NodeSeen::default()
            };
            seen.nodes.insert(node.id, node_seen);
        }
        let mut terms = BTreeMap::new();
        for (node, report) in reports.chain([(own, &own_report)]) {
            let silent: BTreeSet<u64> = report.silent.iter().copied().collect();
            for led in &report.led {
                let newest = terms.entry(led.shard).or_insert(0);
                if led.term < *newest {
                    continue;
                }
                *newest = led.term;
                let group = group_seen(node, led, &silent);
                for id in group.voters.iter().chain(group.learners.keys()) {
                    if let Some(holder) = seen.nodes.get_mut(id) {
                        holder.used_bytes += group.bytes;
                    }
                }
                if led.shard == CONTROLLER {
                    seen.controller = group;
                } else {
                    seen.shards.insert(led.shard, group);
                }
            }
        }
        seen
    }

    /// Changes what the records want changed next.
    pub(super) async fn plan(&self, now: Instant) {
        if now.saturating_duration_since(self.planned.get()) < PLAN || self.cluster.borrow().config().is_none() {
            return;
        }
        self.planned.set(now);
        let planned = plan(&self.cluster.borrow(), &self.observe(now));
        let under_way = planned.progress.moving.iter().map(on_its_way);
        let next = planned.steps.iter().map(|step| step.text.clone());
        self.progress.replace(Progress {
            leader: self.own.info.node,
            steps: under_way.chain(next).collect(),
            stuck: planned.stuck.iter().map(ToString::to_string).collect(),
        });
        for step in planned.steps {
            tracing::info!(step = step.text, "the controller changes a record");
            // What was not changed is planned again.
            if self.change(vec![step]).await.is_err() {
                return;
            }
        }
    }

    /// Says what this node is, where the records say otherwise: it has another address, or other cores, than before its restart.
    /// The answer may take long, and nothing waits for it.
    pub(super) fn introduce(self: &Rc<Self>, now: Instant) {
        let info = self.describe();
        let is_known = {
            let cluster = self.cluster.borrow();
            let Some(known) = cluster.node(info.node) else { return };
            known.addr == info.addr && known.cores == info.cores && known.zone == info.zone
        };
        let rests = now.saturating_duration_since(self.introduced.get()) < INTRODUCE;
        if is_known || rests || self.introducing.replace(true) {
            return;
        }
        self.introduced.set(now);
        let mut body = BytesMut::new();
        info.encode(&mut body);
        let this = Rc::clone(self);
        self.shards.spawn(async move {
            if let Err((_, message)) = this.ask_controller(Verb::Join, body.freeze()).await {
                tracing::warn!(message, "the cluster does not know where this node is by now");
            }
            this.introducing.set(false);
        });
    }

    /// The changes that an administrator asks for, and what is answered when they are made.
    pub(super) fn changes(&self, verb: Verb, body: &[u8]) -> Result<(Vec<Step>, Bytes), (Status, String)> {
        let cluster = self.cluster.borrow();
        let seen = self.observe(CoreInstant::now().get());
        let one = || {
            decode_nodes::<1>(body)
                .map(|[node]| node)
                .ok_or_else(|| malformed(verb))
        };
        let steps = match verb {
            Verb::Join => {
                let info = NodeInfo::decode(body).ok_or_else(|| malformed(verb))?;
                self.may_join(&info)?;
                let mut node = Node::new(info.node, info.addr, info.zone, info.cores, info.directory);
                let known = cluster.node(info.node);
                node.generation = known.map_or(1, |known| known.generation);
                let lost = known.filter(|known| {
                    known.directory != node.directory && known.state != NodeState::Gone && !seen.is_alive(info.node)
                });
                if let Some(known) = lost {
                    // It has lost its disk, and comes back with nothing: its replicas join under new ids.
                    node.state = known.state;
                    node.generation += 1;
                    let text = format!("node {} is back with another directory", info.node);
                    Step::new(&cluster, &Record::Node(node), text)
                        .map(|step| vec![step])
                        .map_err(Refusal::from)
                } else {
                    let of = Membership {
                        name: &info.cluster,
                        id: info.cluster_id,
                    };
                    preflight::join(&cluster, &seen, of, &node)
                }
            }
            Verb::Drain => preflight::drain(&cluster, &seen, one()?),
            Verb::Resume => preflight::resume(&cluster, one()?),
            Verb::Decommission => preflight::decommission(&cluster, &seen, one()?),
            Verb::Replace => {
                let [dead, with] = decode_nodes::<2>(body).ok_or_else(|| malformed(verb))?;
                let any = || seen.fit(&cluster).into_iter().find(|node| *node != dead);
                let with = if with == 0 { any().unwrap_or(0) } else { with };
                preflight::replace(&cluster, &seen, dead, with)
            }
            // It is what the planner is at in any case; whoever asks does not wait for its next look.
            Verb::Rebalance => Ok(plan(&cluster, &seen).steps),
            Verb::Configure => {
                let (name, value) = decode_setting(body).ok_or_else(|| malformed(verb))?;
                preflight::set_config(&cluster, name, value)
            }
            Verb::Progress => {
                let mut out = BytesMut::new();
                let progress = Progress {
                    leader: self.own.info.node,
                    ..self.progress.borrow().clone()
                };
                progress.encode(&mut out);
                return Ok((Vec::new(), out.freeze()));
            }
            Verb::Describe | Verb::Records | Verb::Found | Verb::Adopt => return Err(malformed(verb)),
        };
        let steps = steps.map_err(|refusal| refused(refusal.to_string()))?;
        Ok((steps, Bytes::new()))
    }
}

/// What a group is at, for people.
fn on_its_way(moving: &Moving) -> String {
    let mut text = format!("{}:", moving.about);
    for (node, lag) in &moving.joining {
        // Writing to a string does not fail.
        let _ = match lag {
            Some(lag) if *lag > 0 => write!(text, " node {node} catches up ({lag} entries behind);"),
            _ => write!(text, " node {node} is to get a replica;"),
        };
    }
    for node in &moving.parting {
        let _ = write!(text, " node {node} is to have none;");
    }
    let _ = write!(text, " because of: {}", moving.cause);
    text
}

/// A group as the leader on `node` reports it, which hears nothing of `silent` nodes.
fn group_seen(node: u64, led: &Led, silent: &BTreeSet<u64>) -> GroupSeen {
    GroupSeen {
        leader: Some(node),
        learners: led.learners.iter().map(|learner| (*learner, 0)).collect(),
        changing: led.changing,
        silent: led.voters.intersection(silent).copied().collect(),
        bytes: led.bytes,
        load: 0,
        voters: led.voters.clone(),
    }
}
