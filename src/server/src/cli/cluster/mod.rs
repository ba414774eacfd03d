//! `generation cluster`: a cluster's life, from the first node to the last that leaves.
//!
//! Everything here is asked of any node and done by the controller; what it takes is an administrator's certificate. Every command may be
//! repeated: what is so already is not done again.

mod show;

pub use show::View;

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use generation_client::{Client, ClientConfig};
use generation_proto::cluster::{Founding, NodeInfo, Verb, encode_setting};
use generation_proto::map::Map;
use serde_json::json;

use super::connection::{Connection, block_on, positive_duration};
use super::{Exit, Failure, Globals, serve};

/// How often it is looked how far something is.
const PAUSE: Duration = Duration::from_millis(100);

/// Options of `generation cluster`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation cluster init                          # the node of client.toml founds the cluster\n  \
    generation cluster join 10.0.0.2:7400 10.0.0.3:7400\n  \
    generation cluster status\n  \
    generation cluster drain 2 && generation cluster resume 2\n  \
    generation cluster decommission 3 --wait 10m\n  \
    generation cluster config set replication 5\n\n\
    Nodes of such a cluster have `cluster.id` in their configuration and no `cluster.nodes`. A node that is started belongs to no cluster\n\
    until it is told to found one or taken into one. Each command needs an administrator's certificate.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Have a node found the cluster. It is alone in it at first.
    Init(Init),
    /// Take nodes into the cluster.
    Join(Join),
    /// Show the nodes, where replicas are and are to be, and what the controller is at.
    Status(Status),
    /// Have a node lead nothing, before maintenance. Its replicas stay.
    Drain(OfNode),
    /// Have a drained node lead again.
    Resume(OfNode),
    /// Have a node's replicas move to the others, and the node leave.
    Decommission(OfNode),
    /// Make a dead node's replicas elsewhere now instead of after `replace-after`; the node is gone for good.
    Replace(Replace),
    /// Have the controller spread replicas evenly without waiting for its next look, and say how far it is.
    Rebalance(Rebalance),
    /// Look at the cluster's configuration, or change it.
    Config(Setting),
}

#[derive(Debug, clap::Args)]
struct Init {
    #[command(flatten)]
    connection: Connection,
    /// Replicas of each shard, once there are nodes enough: 1, 3 or 5.
    #[arg(long, value_name = "N", default_value_t = 3)]
    replication_factor: u8,
    /// How long a node is dead before its replicas are made elsewhere.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = positive_duration)]
    replace_after: Duration,
}

#[derive(Debug, clap::Args)]
struct Join {
    #[command(flatten)]
    connection: Connection,
    /// Addresses of the nodes that are to join.
    #[arg(required = true, value_name = "HOST:PORT")]
    nodes: Vec<String>,
    /// Wait so long at most until every shard has its replicas; 0s: do not wait.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    wait: Duration,
}

#[derive(Debug, clap::Args)]
struct Status {
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Args)]
struct OfNode {
    #[command(flatten)]
    connection: Connection,
    /// The node's id.
    node: u64,
    /// Wait so long at most until it is done; 0s: do not wait.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    wait: Duration,
}

#[derive(Debug, clap::Args)]
struct Replace {
    #[command(flatten)]
    connection: Connection,
    /// The dead node's id.
    dead: u64,
    /// The node that takes its place; without it, whichever is best.
    #[arg(long, value_name = "NODE", default_value_t = 0, hide_default_value = true)]
    with: u64,
}

#[derive(Debug, clap::Args)]
struct Rebalance {
    #[command(flatten)]
    connection: Connection,
    /// Wait so long at most until it is done; 0s: do not wait.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    wait: Duration,
}

#[derive(Debug, clap::Args)]
struct Setting {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Print the configuration, or one setting of it.
    Get {
        /// The setting.
        name: Option<String>,
    },
    /// Change a setting.
    Set {
        /// The setting.
        name: String,
        /// What it is to be.
        value: String,
    },
}

/// Runs `generation cluster`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    match &args.command {
        Command::Init(init) => init.run(globals),
        Command::Join(join) => join.run(globals),
        Command::Status(status) => show::status(&status.connection, globals),
        Command::Drain(of) => of.run(Verb::Drain, globals),
        Command::Resume(of) => of.run(Verb::Resume, globals),
        Command::Decommission(of) => of.run(Verb::Decommission, globals),
        Command::Replace(replace) => replace.run(globals),
        Command::Rebalance(rebalance) => rebalance.run(globals),
        Command::Config(setting) => match &setting.what {
            What::Get { name } => show::setting(&setting.connection, name.as_deref(), globals),
            What::Set { name, value } => set(&setting.connection, name, value, globals),
        },
    }
}

/// What was done, for people or machines.
fn done(globals: &Globals, json: &serde_json::Value, text: &str) -> Result<Exit, Failure> {
    serve::print(&if globals.json {
        format!("{json}\n")
    } else {
        format!("{text}\n")
    })
}

/// Asks `client`'s cluster, or the node it is connected to.
pub async fn ask(client: &Client, verb: Verb, body: &[u8]) -> Result<Bytes, Failure> {
    Ok(client.ask_cluster(None, verb, body).await?)
}

/// A node that belongs to `client`'s cluster, and is not `newcomer`, which may be listed there and know nothing of it.
async fn member(client: &Client, newcomer: u64) -> Result<u64, Failure> {
    let map = client.map().await?;
    for node in map.nodes.iter().filter(|node| node.id != newcomer) {
        let described = client.ask_cluster(Some(node.id), Verb::Describe, &[]).await;
        let info = described.ok().and_then(|body| NodeInfo::decode(&body));
        if info.is_some_and(|info| info.records > 0) {
            return Ok(node.id);
        }
    }
    Err(Failure::new(
        Exit::Unavailable,
        "no node of the cluster answers that could take another in; `generation cluster init` founds one where there is none",
    ))
}

/// What the node that `client` is connected to says of itself.
pub async fn describe(client: &Client) -> Result<NodeInfo, Failure> {
    let body = ask(client, Verb::Describe, &[]).await?;
    let info = NodeInfo::decode(&body);
    info.ok_or_else(|| {
        Failure::new(
            Exit::Rejected,
            "what the node says of itself cannot be read; is it of another release?",
        )
    })
}

impl Init {
    fn run(&self, globals: &Globals) -> Result<Exit, Failure> {
        let info = block_on(async {
            let client = self.connection.connect().await?;
            let founding = Founding {
                replication_factor: self.replication_factor,
                replace_after_ms: self.replace_after.as_millis() as u64,
            };
            found(&client, &founding).await?;
            let info = describe(&client).await?;
            client.close().await;
            Ok(info)
        })?;
        let json = json!({ "cluster": info.cluster, "node": info.node });
        let text = format!(
            "cluster {} is founded on node {} at {}; take others in with `generation cluster join`",
            info.cluster, info.node, info.addr
        );
        done(globals, &json, &text)
    }
}

/// Has the node that `client` is connected to found a cluster.
pub async fn found(client: &Client, founding: &Founding) -> Result<(), Failure> {
    let mut body = BytesMut::new();
    founding.encode(&mut body);
    ask(client, Verb::Found, &body).await?;
    Ok(())
}

impl Join {
    fn run(&self, globals: &Globals) -> Result<Exit, Failure> {
        let config = self.connection.config()?;
        let joined = block_on(async {
            let client = self.connection.connect().await?;
            let mut joined = Vec::new();
            for addr in &self.nodes {
                joined.push(join(&client, &config, addr).await?);
            }
            wait_until(&client, self.wait, is_settled).await?;
            client.close().await;
            Ok(joined)
        })?;
        let ids: Vec<u64> = joined.iter().map(|info| info.node).collect();
        let json = json!({ "joined": ids });
        let all: Vec<String> = joined
            .iter()
            .map(|info| format!("node {} at {} has joined", info.node, info.addr))
            .collect();
        done(globals, &json, &all.join("\n"))
    }
}

/// Takes the node at `addr` into the cluster of `client`, of which `config` is the configuration.
pub async fn join(client: &Client, config: &ClientConfig, addr: &str) -> Result<NodeInfo, Failure> {
    let there = ClientConfig {
        seeds: vec![addr.to_owned()],
        ..config.clone()
    };
    let newcomer = Client::builder()
        .config(there)
        .name(concat!("generation-cli/", env!("CARGO_PKG_VERSION")))
        .connect()
        .await?;
    let info = describe(&newcomer).await?;
    let mut body = BytesMut::new();
    info.encode(&mut body);
    let member = member(client, info.node).await?;
    client.ask_cluster(Some(member), Verb::Join, &body).await?;
    // Whoever is asked may not have heard of it yet.
    let mut adopted = Ok(Bytes::new());
    for _ in 0..50 {
        let records = client.ask_cluster(Some(member), Verb::Records, &[]).await?;
        adopted = ask(&newcomer, Verb::Adopt, &records).await;
        if adopted.is_ok() {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    adopted?;
    newcomer.close().await;
    Ok(info)
}

/// Whether every shard has a leader and the replicas it is to have.
pub fn is_settled(view: &View) -> bool {
    view.is_settled()
}

/// Waits until something is so of the cluster; the failure says how far it is.
pub async fn wait_until(client: &Client, wait: Duration, so: impl Fn(&View) -> bool) -> Result<(), Failure> {
    if wait.is_zero() {
        return Ok(());
    }
    let until = tokio::time::Instant::now() + wait;
    loop {
        let view = View::of(client).await?;
        if so(&view) {
            return Ok(());
        }
        if tokio::time::Instant::now() >= until {
            return Err(Failure::new(
                Exit::Unavailable,
                format!(
                    "it goes on, but is not done within the time given: {}",
                    view.outstanding()
                ),
            ));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl OfNode {
    fn run(&self, verb: Verb, globals: &Globals) -> Result<Exit, Failure> {
        let node = self.node;
        block_on(async {
            let client = self.connection.connect().await?;
            ask(&client, verb, &node.to_le_bytes()).await?;
            wait_until(&client, self.wait, |view| match verb {
                Verb::Drain => view.led_by(node) == 0,
                Verb::Decommission => view.is_gone(node),
                _ => view.is_settled(),
            })
            .await?;
            client.close().await;
            Ok(())
        })?;
        let (name, text) = match verb {
            Verb::Drain => (
                "drain",
                format!("node {node} hands its leaderships over and gets no others"),
            ),
            Verb::Decommission => (
                "decommission",
                format!("node {node}'s replicas move to the others; then it leaves"),
            ),
            _ => ("resume", format!("node {node} leads again")),
        };
        done(globals, &json!({ name: node }), &text)
    }
}

impl Replace {
    fn run(&self, globals: &Globals) -> Result<Exit, Failure> {
        block_on(async {
            let client = self.connection.connect().await?;
            let mut body = BytesMut::new();
            body.put_u64_le(self.dead);
            body.put_u64_le(self.with);
            ask(&client, Verb::Replace, &body).await?;
            client.close().await;
            Ok(())
        })?;
        let text = format!(
            "node {}'s replicas are made elsewhere; it does not come back",
            self.dead
        );
        done(globals, &json!({ "replace": self.dead, "with": self.with }), &text)
    }
}

impl Rebalance {
    fn run(&self, globals: &Globals) -> Result<Exit, Failure> {
        let (settled, outstanding) = block_on(async {
            let client = self.connection.connect().await?;
            ask(&client, Verb::Rebalance, &[]).await?;
            wait_until(&client, self.wait, View::is_settled).await?;
            let view = View::of(&client).await?;
            client.close().await;
            Ok((view.is_settled(), view.outstanding()))
        })?;
        let text = if settled {
            "replicas are spread evenly".to_owned()
        } else {
            format!("replicas are being spread: {outstanding}")
        };
        done(globals, &json!({ "rebalanced": settled }), &text)
    }
}

fn set(connection: &Connection, name: &str, value: &str, globals: &Globals) -> Result<Exit, Failure> {
    block_on(async {
        let client = connection.connect().await?;
        let mut body = BytesMut::new();
        if name.len() > generation_proto::limits::MAX_NAME_LEN {
            return Err(Failure::usage("the setting's name is too long"));
        }
        encode_setting(name, value, &mut body);
        ask(&client, Verb::Configure, &body).await?;
        client.close().await;
        Ok(())
    })?;
    done(globals, &json!({ name: value }), &format!("{name} is {value}"))
}

/// How many replicas of shards a map shows on a node, and how many shards the node leads.
pub(super) fn held_and_led(map: &Map, node: u64) -> (usize, usize) {
    let holds = |shard: &&generation_proto::map::Shard| shard.replicas.iter().any(|replica| replica.node == node);
    let held = map.shards.iter().filter(holds).count();
    let led = map.shards.iter().filter(|shard| shard.leader == node).count();
    (held, led)
}
