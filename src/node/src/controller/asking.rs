//! What administrators ask, and how it comes to whoever can answer.
//!
//! A node answers for itself what is about itself; everything else it asks of the controller's leader in the administrator's place, so that
//! any node may be asked.

use bytes::{BufMut as _, Bytes, BytesMut};
use generation_engine::cluster::records::{Config, Node, REPLICATION_FACTORS};
use generation_engine::cluster::{Cluster, Step, placement};
use generation_proto::Status;
use generation_proto::cluster::{Founding, NodeInfo, Verb};
use openraft_rt::{AsyncRuntime as _, Instant as _};

use super::{Controller, Duration, PeerId, Unwritten, kind};
use crate::env::disk::Disk;
use crate::raft::runtime::{CoreInstant, Runtime};
use crate::view::CONTROLLER;

/// How long the controller may take to answer.
const PATIENCE: Duration = Duration::from_secs(8);

/// How long a group may take to be formed.
const FORMING: Duration = Duration::from_secs(10);

/// How often it is looked whether something is so.
const PAUSE: Duration = Duration::from_millis(20);

/// How often a change is planned anew where records have changed meanwhile.
const ATTEMPTS: usize = 5;

/// What is said to an administrator: a body, or why not.
pub(crate) type Answer = Result<Bytes, (Status, String)>;

pub(super) fn refused(message: impl Into<String>) -> (Status, String) {
    (Status::InvalidArgument, message.into())
}

pub(super) fn malformed(verb: Verb) -> (Status, String) {
    (Status::Malformed, format!("the body of {verb:?} cannot be read"))
}

impl<D: Disk> Controller<D> {
    /// Answers an administrator.
    pub(crate) async fn ask(&self, verb: Verb, body: Bytes) -> Answer {
        match verb {
            Verb::Describe => {
                let mut out = BytesMut::new();
                self.describe().encode(&mut out);
                Ok(out.freeze())
            }
            Verb::Records => Ok(self.cluster.borrow().encode().into()),
            Verb::Found => self.found(&body).await,
            Verb::Adopt => self.adopt(&body).await,
            _ => self.ask_controller(verb, body).await,
        }
    }

    pub(super) fn describe(&self) -> NodeInfo {
        NodeInfo {
            records: self.cluster.borrow().version(),
            ..self.own.info.clone()
        }
    }

    /// Asks whoever leads the controller.
    pub(super) async fn ask_controller(&self, verb: Verb, body: Bytes) -> Answer {
        if self.cluster.borrow().config().is_none() {
            return Err(refused(
                "this node belongs to no cluster yet: `generation cluster init` founds one, `generation cluster join` takes it into one",
            ));
        }
        let until = CoreInstant::now() + PATIENCE;
        let own = self.own.info.node;
        loop {
            if self.leads() {
                match self.decide(verb, &body).await {
                    Err((Status::Moved, _)) => {}
                    answer => return answer,
                }
            }
            let members: Vec<u64> = self.views.with(|view| view.controller.clone());
            let others = members
                .into_iter()
                .filter(|node| *node != own && self.peers.is_alive(*node));
            for node in others {
                let mut payload = BytesMut::with_capacity(1 + body.len());
                payload.put_u8(verb.code());
                payload.extend_from_slice(&body);
                let to = PeerId { node, core: 0 };
                let call = self
                    .peers
                    .call(to, CONTROLLER, kind::ASK, payload.freeze(), until.get());
                if let Some(answer) = call.await.ok().as_ref().and_then(read_answer) {
                    match answer {
                        Err((Status::Moved, _)) => {}
                        answer => return answer,
                    }
                }
            }
            if CoreInstant::now() >= until {
                let message = "the controller has no leader: a majority of the nodes it lives on must be up";
                return Err((Status::NoQuorum, message.to_owned()));
            }
            Runtime::sleep(PAUSE).await;
        }
    }

    /// Answers another node that asks for an administrator.
    pub(crate) async fn asked(&self, payload: Bytes) -> Bytes {
        let verb = payload.first().and_then(|code| Verb::from_code(*code));
        let answer = match verb {
            Some(verb) if !verb.is_of_node() && self.leads() => self.decide(verb, &payload.slice(1..)).await,
            Some(_) => Err((Status::Moved, String::new())),
            None => Err((
                Status::UnknownOperation,
                "the controller's leader is of a release that does not know this verb; upgrade it".to_owned(),
            )),
        };
        write_answer(&answer)
    }

    /// Begins a cluster, on this node.
    async fn found(&self, body: &[u8]) -> Answer {
        let Founding {
            replication_factor,
            replace_after_ms,
        } = Founding::decode(body).ok_or_else(|| malformed(Verb::Found))?;
        if !REPLICATION_FACTORS.contains(&replication_factor) {
            return Err(refused(format!(
                "a replication factor of {replication_factor} is none of 1, 3 and 5"
            )));
        }
        if let Some(config) = self.cluster.borrow().config() {
            return Err(refused(format!(
                "this node belongs to cluster `{}` already; others are taken in with `generation cluster join`",
                config.name
            )));
        }
        let info = self.describe();
        self.stand_alone();
        self.shards.review();
        let until = CoreInstant::now() + FORMING;
        while !self.leads() {
            if CoreInstant::now() >= until {
                return Err((
                    Status::Busy,
                    "the controller's group is not formed yet; ask again".to_owned(),
                ));
            }
            Runtime::sleep(PAUSE).await;
        }
        let config = Config {
            replace_after_ms,
            ..Config::new(info.cluster.clone(), info.cluster_id, info.shards, replication_factor)
        };
        let node = Node::new(info.node, info.addr, info.zone, info.cores, info.directory);
        // What makes the cluster comes last, so that who died before may do all of it again.
        let records = placement::found(&config, &[node], self.own.epoch);
        let records = records.map_err(|error| refused(error.to_string()))?;
        let mut changes = Vec::new();
        for record in records {
            let step = Step::new(&self.cluster.borrow(), &record, "the cluster is founded");
            changes.push(step.map_err(|error| refused(error.to_string()))?);
        }
        self.change(changes).await.map_err(unwritten)?;
        self.read_group();
        self.hand_out().await;
        tracing::info!(cluster = info.cluster, "the cluster is founded");
        Ok(Bytes::new())
    }

    /// Takes part in a cluster, as an administrator says.
    async fn adopt(&self, body: &[u8]) -> Answer {
        let info = self.describe();
        let records = Cluster::decode(body).map_err(|error| refused(error.to_string()))?;
        let Some(config) = records.config() else {
            return Err(refused("these are the records of no cluster"));
        };
        if config.id != info.cluster_id || config.name != info.cluster {
            return Err(refused(format!(
                "these are the records of cluster `{}` ({:032x}), and this node is configured for `{}` ({:032x}); set `cluster.id`, or ask \
                 the other cluster",
                config.name, config.id, info.cluster, info.cluster_id
            )));
        }
        if config.shards != info.shards {
            return Err(refused(format!(
                "the cluster has {} shards, and this node is configured for {}; set `shards = {}`",
                config.shards, info.shards, config.shards
            )));
        }
        match records.node(info.node) {
            None => return Err(refused(format!("node {} is not among the cluster's nodes", info.node))),
            Some(node) if node.directory != info.directory => {
                return Err(refused(format!(
                    "the cluster knows a node {} with another data directory: two nodes have the same id, or this one has lost its disk",
                    info.node
                )));
            }
            Some(_) => {}
        }
        let of_another_history = |(key, value, version): (&[u8], &[u8], u64)| {
            let own = self.cluster.borrow();
            let mut own = own.delta(version - 1).take_while(|(.., other)| *other == version);
            own.any(|(own_key, own_value, _)| (own_key, own_value) != (key, value))
        };
        if records.delta(0).any(of_another_history) {
            return Err(refused(
                "this node belongs to another cluster of the same name and identity, which was founded apart; give it an empty data directory",
            ));
        }
        let taken = self.cluster.borrow_mut().apply_delta(body);
        taken.map_err(|error| refused(error.to_string()))?;
        self.hand_out().await;
        Ok(Bytes::new())
    }

    /// Whether what a node says of itself may be taken in as its record. One that has lost its disk may come back under its id, with another
    /// directory, as long as nobody hears of the one that was.
    pub(super) fn may_join(&self, info: &NodeInfo) -> Result<(), (Status, String)> {
        if !info.is_managed {
            return Err(refused(format!(
                "node {} cannot belong to a cluster that grows: set `cluster.id` in its configuration, and leave `cluster.nodes` out",
                info.node
            )));
        }
        if info.addr.ip().is_unspecified() || info.addr.port() == 0 {
            return Err(refused(format!(
                "nobody can reach {}; set `advertise` in the configuration of node {}",
                info.addr, info.node
            )));
        }
        if info.records > 0 && self.cluster.borrow().node(info.node).is_none() {
            return Err(refused(format!(
                "node {} belongs to another cluster of the same name and identity, which was founded apart from this one; give it an empty data \
                 directory",
                info.node
            )));
        }
        if info.shards != self.own.info.shards {
            return Err(refused(format!(
                "the cluster has {} shards, and node {} is configured for {}; set `shards = {}` there",
                self.own.info.shards, info.node, info.shards, self.own.info.shards
            )));
        }
        Ok(())
    }

    /// Changes what a request asks for, as the leader of the controller. `Moved`: it does not lead any more.
    async fn decide(&self, verb: Verb, body: &[u8]) -> Answer {
        for _ in 0..ATTEMPTS {
            let Some(replica) = self.replica() else { break };
            if replica.linearize().await.is_err() {
                break;
            }
            self.read_group();
            let (changes, answer) = self.changes(verb, body)?;
            let wanted = changes.len();
            match self.change(changes).await {
                Ok(done) if done == wanted => {
                    self.hand_out().await;
                    return Ok(answer);
                }
                // Somebody else has changed a record: it is decided again by what it is now.
                Ok(_) => {}
                Err(Unwritten::NotLeader) => break,
                Err(error) => return Err(unwritten(error)),
            }
        }
        Err((Status::Moved, String::new()))
    }
}

fn unwritten(error: Unwritten) -> (Status, String) {
    let status = match error {
        Unwritten::NotLeader => Status::NoQuorum,
        Unwritten::InDoubt => Status::InDoubt,
        Unwritten::TooLong => Status::InvalidArgument,
    };
    (status, error.to_string())
}

/// u8 status, then the body or a message.
fn write_answer(answer: &Answer) -> Bytes {
    let mut out = BytesMut::new();
    match answer {
        Ok(body) => {
            out.put_u8(Status::Ok.code());
            out.extend_from_slice(body);
        }
        Err((status, message)) => {
            out.put_u8(status.code());
            out.extend_from_slice(message.as_bytes());
        }
    }
    out.freeze()
}

fn read_answer(bytes: &Bytes) -> Option<Answer> {
    let status = Status::from_code(*bytes.first()?)?;
    let rest = bytes.slice(1..);
    Some(if status == Status::Ok {
        Ok(rest)
    } else {
        Err((status, String::from_utf8_lossy(&rest).into_owned()))
    })
}
