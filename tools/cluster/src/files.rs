//! What the nodes and the clients of a run read: certificates, gossip keys, a configuration each.
//!
//! All of it is made by the program that is tested, through its command line, as an operator would.

use std::fmt::Write as _;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::LoadError;
use crate::script::Script;

/// Name of the cluster.
const CLUSTER: &str = "load";

/// Longest value, a segment that it fits, and a node's journals: small, for there are many.
const MAX_VALUE: &str = "64KiB";
const SEGMENT: &str = "4MiB";
const JOURNALS: &str = "64MiB";

/// A node to be started.
#[derive(Debug, Clone)]
pub(crate) struct NodePlan {
    /// Its id, from 1.
    pub(crate) id: u64,
    /// Its configuration.
    pub(crate) config: PathBuf,
    /// What it prints to standard error.
    pub(crate) log: PathBuf,
}

/// Everything a run needs on disk.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The nodes, by id.
    pub(crate) nodes: Vec<NodePlan>,
    /// The clients' configuration.
    pub(crate) client: PathBuf,
}

/// Writes it all below `directory`.
pub(crate) fn write(directory: &Path, program: &Path, script: &Script) -> Result<Plan, LoadError> {
    let certs = |arguments: &[&str]| certs(program, directory, arguments);
    certs(&["ca", "--cluster", CLUSTER])?;
    certs(&["admin", "load"])?;
    let count = script.cluster.nodes;
    for id in 1..=count {
        certs(&["node", &id.to_string()])?;
    }
    if script.cluster.gossip {
        certs(&["gossip-key"])?;
    }
    let addresses = free_addresses(2 * count).map_err(LoadError::system("there are no free ports"))?;
    let (own, gossip) = addresses.split_at(count as usize);
    let mut cluster = format!("[cluster]\nid = \"{}\"\nnodes = [\n", identity());
    for (id, addr) in (1_u64..).zip(own) {
        // Writing to a string cannot fail.
        let _ = writeln!(cluster, "    {{ id = {id}, addr = \"{addr}\", cores = 1 }},");
    }
    cluster.push_str("]\n");
    let mut nodes = Vec::new();
    for ((id, addr), gossip_addr) in (1_u64..).zip(own).zip(gossip) {
        let seeds: Vec<String> = gossip
            .iter()
            .filter(|seed| *seed != gossip_addr)
            .map(SocketAddr::to_string)
            .collect();
        let gossip = if script.cluster.gossip {
            format!("[gossip]\nkey_file = \"certs/gossip.keys\"\nlisten = \"{gossip_addr}\"\nseeds = {seeds:?}\n")
        } else {
            String::new()
        };
        let text = format!(
            "listen = \"{addr}\"\ndata_dir = \"node-{id}\"\ncores = 1\npin = false\nshards = {shards}\ndurability = \"{durability}\"\n\n\
             {cluster}\n{gossip}\n[tls]\nca = \"certs/ca.pem\"\ncertificate = \"certs/node-{id}.pem\"\nkey = \"certs/node-{id}.key\"\n\n\
             [memory]\nbudget = \"{memory}\"\npolicy = \"{policy}\"\n\n[journal]\nsize = \"{JOURNALS}\"\nsegment = \"{SEGMENT}\"\n\n\
             [limits]\nmax_value = \"{MAX_VALUE}\"\n",
            shards = script.cluster.shards,
            durability = script.cluster.durability,
            memory = script.cluster.memory,
            policy = script.cluster.policy,
        );
        let plan = NodePlan {
            id,
            config: directory.join(format!("node-{id}.toml")),
            log: directory.join(format!("node-{id}.log")),
        };
        put(&plan.config, &text)?;
        nodes.push(plan);
    }
    let seeds: Vec<String> = own.iter().map(SocketAddr::to_string).collect();
    let client = directory.join("client.toml");
    put(
        &client,
        &format!(
            "cluster = \"{CLUSTER}\"\nseeds = {seeds:?}\nca = \"certs/ca.pem\"\ncertificate = \"certs/admin-load.pem\"\n\
             key = \"certs/admin-load.key\"\n"
        ),
    )?;
    Ok(Plan { nodes, client })
}

fn put(path: &Path, text: &str) -> Result<(), LoadError> {
    fs::write(path, text).map_err(LoadError::system(&format!("cannot write {}", path.display())))
}

fn certs(program: &Path, directory: &Path, arguments: &[&str]) -> Result<(), LoadError> {
    let output = Command::new(program)
        .current_dir(directory)
        .arg("certs")
        .args(arguments)
        .output()
        .map_err(LoadError::system(&format!("cannot run {}", program.display())))?;
    if output.status.success() {
        return Ok(());
    }
    Err(LoadError::Program(format!(
        "{} certs {}: {}",
        program.display(),
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// Addresses with ports that nobody listens on. All are held until all are chosen, so that they differ.
fn free_addresses(count: u64) -> std::io::Result<Vec<SocketAddr>> {
    let sockets: Vec<UdpSocket> = (0..count)
        .map(|_| UdpSocket::bind("127.0.0.1:0"))
        .collect::<std::io::Result<_>>()?;
    sockets.iter().map(UdpSocket::local_addr).collect()
}

/// An identity for a cluster that lives as long as this process.
fn identity() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanoseconds = since.map_or(1, |since| since.as_nanos());
    format!("{:032x}", nanoseconds << 32 | u128::from(std::process::id()))
}
