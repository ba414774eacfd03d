//! `generation dev`: a node to try things on, with throw-away certificates and a `client.toml` that finds it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;

use super::certs::write_file;
use super::{Exit, Failure, Globals, running, serve};
use crate::config::{Config, Tls};
use crate::logging;
use crate::node::{DataDirectory, Node, NodeError};
use crate::preflight;
use crate::tls::identity::Role;
use crate::tls::issue::Authority;

/// Name of the cluster.
const CLUSTER: &str = "dev";
/// How long its certificates are good for. They are made anew at each start.
const LIFETIME: Duration = Duration::from_hours(24 * 30);
/// How long a stop waits for requests under way.
const DRAIN: Duration = Duration::from_secs(1);

/// Options of `generation dev`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation dev                                   # one core, port 7400, runs until Ctrl-C\n  \
    generation dev --cores 2 --memory 1GiB --json    # prints one JSON line when it accepts requests\n  \
    generation kv put greeting hello                 # in another terminal, in the same directory\n\n\
    Nothing is kept: the certificates are new at each start, and the entries are gone with the process.")]
pub struct Args {
    /// Nodes to start; more than one arrives with replication.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    nodes: u16,
    /// Cores to serve with.
    #[arg(long, value_name = "C", default_value_t = 1)]
    cores: u16,
    /// Number of shards, a power of two.
    #[arg(long, value_name = "S", default_value_t = 16)]
    shards: u16,
    /// Bytes of entries the node holds.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: ByteSize,
    /// Entries the node holds at most, whatever their size.
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// Directory for the certificates and client.toml.
    #[arg(long, value_name = "DIR", default_value = ".generation")]
    data: PathBuf,
    /// UDP port to listen on; 0 takes any that is free.
    #[arg(long, value_name = "P", default_value_t = 7400)]
    port: u16,
    /// What is logged, such as `info` or `info,generation_node=debug`.
    #[arg(long, value_name = "FILTER", env = "GENERATION_LOG", default_value = "warn")]
    log: String,
}

/// Runs `generation dev`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    if args.nodes > 1 {
        return Err(Failure::usage(format!(
            "--nodes {}: more than one node arrives with replication; start one",
            args.nodes
        )));
    }
    let mut config = Config {
        listen: SocketAddr::from(([127, 0, 0, 1], args.port)),
        data_dir: args.data.clone(),
        cores: Some(args.cores),
        // More cores than the machine has are good enough to try things on.
        pin: args.cores <= preflight::processors(),
        shards: args.shards,
        ..Config::default()
    };
    config.memory.budget = args.memory;
    config.memory.max_records = args.max_records;
    config.limits.drain = DRAIN;
    config.log.filter.clone_from(&args.log);
    logging::start(&config.log).map_err(Failure::usage)?;
    config.validate().map_err(NodeError::from)?;
    // Held before anything is written: a node that runs from here must keep its certificates.
    let directory = DataDirectory::open(&args.data).map_err(NodeError::from)?;
    config.tls = write_certificates(&args.data)?;
    let client_config = args.data.join("client.toml");
    let ready = |node: &Node| {
        write_client_config(&client_config, node.address)?;
        let shown = std::path::absolute(&client_config).unwrap_or_else(|_| client_config.clone());
        serve::print(&announcement(node, &shown, args, globals.json))?;
        Ok(())
    };
    running::run(&config, Some(directory), ready)
}

fn write_certificates(data: &Path) -> Result<Tls, Failure> {
    let directory = data.join("certs");
    fs::create_dir_all(&directory).map_err(|error| Failure::usage(format!("{}: {error}", directory.display())))?;
    let now = SystemTime::now();
    let authority = Authority::new(CLUSTER, LIFETIME, now)?;
    let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let node = authority.issue(Role::Node(1), &hosts, LIFETIME, now)?;
    // An administrator may do all that a client may, so one certificate serves every command.
    let client = authority.issue(Role::Admin("dev".into()), &[], LIFETIME, now)?;
    for (name, text, mode) in [
        ("ca.pem", authority.certificate_pem(), 0o644),
        ("node-1.key", &node.key_pem, 0o600),
        ("node-1.pem", &node.certificate_pem, 0o644),
        ("client.key", &client.key_pem, 0o600),
        ("client.pem", &client.certificate_pem, 0o644),
    ] {
        write_file(&directory.join(name), text.as_bytes(), mode, true)?;
    }
    Ok(Tls {
        ca: directory.join("ca.pem"),
        certificate: directory.join("node-1.pem"),
        key: directory.join("node-1.key"),
    })
}

/// Writes what `generation kv` and the client library read. Paths in it are relative to it.
fn write_client_config(path: &Path, address: SocketAddr) -> Result<(), Failure> {
    let text = format!(
        "# Written by `generation dev`. Paths are relative to this file.\n\
         cluster = \"{CLUSTER}\"\n\
         seeds = [\"{address}\"]\n\
         ca = \"certs/ca.pem\"\n\
         certificate = \"certs/client.pem\"\n\
         key = \"certs/client.key\"\n"
    );
    write_file(path, text.as_bytes(), 0o644, true)
}

fn announcement(node: &Node, client_config: &Path, args: &Args, json: bool) -> String {
    if json {
        let nodes =
            [serde_json::json!({ "id": node.id(), "addr": node.address.to_string(), "pid": std::process::id() })];
        return format!(
            "{}\n",
            serde_json::json!({ "ready": true, "client_config": client_config, "nodes": nodes })
        );
    }
    // The configuration is found by itself in the default place only.
    let option = if args.data == Path::new(".generation") {
        String::new()
    } else {
        format!(" --config {}", client_config.display())
    };
    let (cores, shards, memory) = (args.cores, args.shards, args.memory.display().iec());
    format!(
        "Generation listens on {} (UDP, QUIC): cores {cores}, shards {shards}, memory {memory}. Ctrl-C stops it.\n\
         Client configuration: {}\n\n\
         Try, in another terminal:\n  \
         generation kv put{option} greeting hello\n  \
         generation kv get{option} greeting\n  \
         generation kv incr{option} visits\n  \
         generation kv keys{option}\n",
        node.address,
        client_config.display(),
    )
}
