//! What a cluster is and what its controller is at, for people and machines.

use std::fmt::Write as _;

use generation_client::Client;
use generation_node::records::Cluster;
use generation_node::records::preflight::SETTINGS;
use generation_node::records::records::{Config, NodeState};
use generation_proto::cluster::{Progress, Verb};
use generation_proto::map::{Map, NodeState as Liveness};
use serde_json::{Value, json};

use super::{Connection, Exit, Failure, Globals, ask, block_on, held_and_led, serve};

/// A cluster as it is and as it is to be.
pub struct View {
    map: Map,
    records: Cluster,
    progress: Progress,
}

fn unreadable(error: impl std::fmt::Display) -> Failure {
    Failure::new(
        Exit::Rejected,
        format!("what the cluster answers cannot be read: {error}"),
    )
}

impl View {
    /// As the cluster of `client` answers.
    pub async fn of(client: &Client) -> Result<Self, Failure> {
        let map = client.map().await?;
        let records = Cluster::decode(&ask(client, Verb::Records, &[]).await?).map_err(unreadable)?;
        let progress = ask(client, Verb::Progress, &[]).await?;
        let progress = Progress::decode(&progress).ok_or_else(|| unreadable("what the controller is at"))?;
        Ok(Self { map, records, progress })
    }

    /// Whether every shard has a leader and the replicas it is to have.
    pub fn is_settled(&self) -> bool {
        let Some(config) = self.records.config() else {
            return false;
        };
        let nodes = self.records.nodes().filter(|node| node.state.keeps_replicas()).count();
        let replicas = nodes.min(usize::from(config.replication));
        let as_wanted = |(number, shard): (usize, &generation_proto::map::Shard)| {
            let mut nodes: Vec<u64> = shard.replicas.iter().map(|replica| replica.node).collect();
            nodes.sort_unstable();
            let wanted = self.records.shard(number as u16);
            shard.leader != 0
                && wanted.is_some_and(|wanted| wanted.targets == nodes && wanted.targets.len() >= replicas)
        };
        self.map.shards.iter().enumerate().all(as_wanted) && self.progress.steps.is_empty()
    }

    /// Whether leaders are spread evenly over the nodes that live and may lead.
    pub fn is_balanced(&self) -> bool {
        let may_lead = |node: &&generation_node::records::records::Node| {
            node.state == NodeState::Up && self.liveness(node.id) == "up"
        };
        let nodes = self.records.nodes().filter(may_lead);
        let counts: Vec<usize> = nodes.map(|node| self.led_by(node.id)).collect();
        let (least, most) = (counts.iter().min(), counts.iter().max());
        least.zip(most).is_none_or(|(least, most)| most - least <= 1)
    }

    /// How many shards a node leads.
    pub fn led_by(&self, node: u64) -> usize {
        held_and_led(&self.map, node).1
    }

    /// Whether a node has left.
    pub fn is_gone(&self, node: u64) -> bool {
        self.records.node(node).is_none_or(|node| node.state == NodeState::Gone)
    }

    /// What is not done yet.
    pub fn outstanding(&self) -> String {
        let Progress { steps, stuck, .. } = &self.progress;
        let all: Vec<&str> = stuck.iter().chain(steps).take(3).map(String::as_str).collect();
        if all.is_empty() {
            "replicas are being sent what they lack".to_owned()
        } else {
            all.join("; ")
        }
    }

    fn liveness(&self, node: u64) -> &'static str {
        let known = self.map.node(node).map(|node| node.state);
        known.map_or("unknown", |state| if state == Liveness::Down { "down" } else { "up" })
    }

    fn json(&self) -> Value {
        let config = self.records.config();
        let nodes = self.records.nodes().map(|node| {
            let (replicas, leads) = held_and_led(&self.map, node.id);
            json!({
                "id": node.id, "addr": node.addr.to_string(), "zone": node.zone, "cores": node.cores, "state": node.state.name(),
                "liveness": self.liveness(node.id), "replicas": replicas, "leads": leads,
            })
        });
        let shards = self.records.shards().map(|shard| {
            let seen = self.map.shards.get(usize::from(shard.number));
            let nodes: Vec<u64> = seen
                .map(|seen| seen.replicas.iter().map(|replica| replica.node).collect())
                .unwrap_or_default();
            json!({
                "id": shard.number, "targets": shard.targets, "nodes": nodes, "cause": shard.cause.name(),
                "leader": seen.map_or(0, |seen| seen.leader),
            })
        });
        json!({
            "cluster": config.map(|config| config.name.clone()),
            "config": config.map(settings).map(|all| all.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect::<serde_json::Map<_, _>>()),
            "controller": { "leader": self.progress.leader, "nodes": self.records.controller().map(|group| group.targets.clone()) },
            "nodes": nodes.collect::<Vec<_>>(),
            "shards": shards.collect::<Vec<_>>(),
            "steps": self.progress.steps,
            "stuck": self.progress.stuck,
        })
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let name = self.records.config().map_or("", |config| config.name.as_str());
        let members = self
            .records
            .controller()
            .map(|group| group.targets.clone())
            .unwrap_or_default();
        let led = match self.progress.leader {
            0 => "without a leader".to_owned(),
            node => format!("led from node {node}"),
        };
        // Writing to a string does not fail.
        let _ = writeln!(out, "cluster {name}: controller on nodes {members:?}, {led}\n");
        let _ = writeln!(
            out,
            "{:>6}  {:<22} {:<10} {:>5}  {:<9} {:<8} {:>8} {:>5}",
            "node", "address", "zone", "cores", "state", "liveness", "replicas", "leads"
        );
        for node in self.records.nodes() {
            let (replicas, leads) = held_and_led(&self.map, node.id);
            let _ = writeln!(
                out,
                "{:>6}  {:<22} {:<10} {:>5}  {:<9} {:<8} {replicas:>8} {leads:>5}",
                node.id,
                node.addr.to_string(),
                node.zone,
                node.cores,
                node.state.name(),
                self.liveness(node.id),
            );
        }
        let moving = self.records.shards().filter(|shard| {
            let seen = self.map.shards.get(usize::from(shard.number));
            let mut nodes: Vec<u64> = seen
                .map(|seen| seen.replicas.iter().map(|replica| replica.node).collect())
                .unwrap_or_default();
            nodes.sort_unstable();
            nodes != shard.targets
        });
        let moving = moving.count();
        let leaderless = self.map.shards.iter().filter(|shard| shard.leader == 0).count();
        let _ = writeln!(
            out,
            "\n{} shards: {moving} on their way to where they are to be, {leaderless} without a leader",
            self.map.shards.len()
        );
        for step in &self.progress.steps {
            let _ = writeln!(out, "  doing: {step}");
        }
        for stuck in &self.progress.stuck {
            let _ = writeln!(out, "  stuck: {stuck}");
        }
        out
    }
}

/// The configuration's settings by name.
fn settings(config: &Config) -> Vec<(&'static str, String)> {
    SETTINGS
        .iter()
        .map(|setting| (setting.name(), setting.value(config)))
        .collect()
}

/// `generation cluster status`.
pub(super) fn status(connection: &Connection, globals: &Globals) -> Result<Exit, Failure> {
    let view = block_on(async {
        let client = connection.connect().await?;
        let view = View::of(&client).await?;
        client.close().await;
        Ok(view)
    })?;
    serve::print(&if globals.json {
        format!("{}\n", view.json())
    } else {
        view.text()
    })
}

/// `generation cluster config get`.
pub(super) fn setting(connection: &Connection, name: Option<&str>, globals: &Globals) -> Result<Exit, Failure> {
    let records = block_on(async {
        let client = connection.connect().await?;
        let records = ask(&client, Verb::Records, &[]).await?;
        client.close().await;
        Cluster::decode(&records).map_err(unreadable)
    })?;
    let Some(config) = records.config() else {
        return Err(Failure::new(
            Exit::NotFound,
            "the node belongs to no cluster yet: `generation cluster init` founds one",
        ));
    };
    let mut all = settings(config);
    if let Some(name) = name {
        let known: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        let known = known.join(", ");
        all.retain(|(known, _)| *known == name);
        if all.is_empty() {
            return Err(Failure::new(
                Exit::NotFound,
                format!("there is no setting `{name}`; there are {known}"),
            ));
        }
    }
    let text: Vec<String> = all.iter().map(|(name, value)| format!("{name} {value}\n")).collect();
    let json: serde_json::Map<String, Value> = all
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect();
    serve::print(&if globals.json {
        format!("{}\n", Value::Object(json))
    } else {
        text.concat()
    })
}
