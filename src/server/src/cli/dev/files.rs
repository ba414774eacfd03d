//! The files of `generation dev`: certificates, a configuration for each node, and the clients' `client.toml`.
//!
//! The authority is kept as long as it is good, so that clients that went on running while the nodes were started again still
//! trust them, and so is what the cluster was founded with ([`super::founding`]). Everything else is written anew at each start.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::founding::{Added, Founding};
use super::{Args, CLUSTER};
use crate::cli::Failure;
use crate::cli::certs::write_file;
use crate::tls::identity::Role;
use crate::tls::issue::Authority;

/// How long the authority is good for.
const LIFETIME: Duration = Duration::from_hours(24 * 365);
/// An authority with less left is replaced.
const RENEWED: Duration = Duration::from_hours(24 * 30);

/// Bytes of a node's journals, where its cores are few enough.
const JOURNALS_BYTES: u64 = 256 << 20;
/// Bytes of a segment of them: the longest value fits.
const SEGMENT_BYTES: u64 = 32 << 20;
/// Least bytes of a core's journal.
const JOURNAL_BYTES: u64 = 4 * SEGMENT_BYTES;

/// A node to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodePlan {
    /// Its id, from 1.
    pub(super) id: u64,
    /// Where it is to listen.
    pub(super) listen: SocketAddr,
    /// Its configuration file.
    pub(super) config: PathBuf,
}

/// Writes what the nodes need; the plans are in the order of their ids.
pub(super) fn write(data: &Path, args: &Args, founding: &Founding, cpus: &[usize]) -> Result<Vec<NodePlan>, Failure> {
    let certificates = data.join("certs");
    fs::create_dir_all(&certificates)
        .map_err(|error| Failure::usage(format!("{}: {error}", certificates.display())))?;
    let now = SystemTime::now();
    let authority = authority(&certificates, now)?;
    // An administrator may do all that a client may, so one certificate serves every command.
    let client = authority.issue(Role::Admin("dev".into()), &[], LIFETIME, now)?;
    write_file(&certificates.join("client.key"), client.key_pem.as_bytes(), 0o600, true)?;
    write_file(
        &certificates.join("client.pem"),
        client.certificate_pem.as_bytes(),
        0o644,
        true,
    )?;
    let first = (1..)
        .zip(&founding.ports)
        .map(|(id, port)| (id, *port, founding.zone_of(id)));
    let added = founding
        .added
        .iter()
        .map(|added| (added.id, added.port, added.zone.clone()));
    let nodes = first.chain(added);
    nodes
        .map(|(id, port, zone)| write_node(data, args, founding, cpus, &authority, (id, port, &zone)))
        .collect()
}

/// Writes what one node more needs.
pub(super) fn write_added(
    data: &Path,
    args: &Args,
    founding: &Founding,
    cpus: &[usize],
    added: &Added,
) -> Result<NodePlan, Failure> {
    let authority = authority(&data.join("certs"), SystemTime::now())?;
    write_node(
        data,
        args,
        founding,
        cpus,
        &authority,
        (added.id, added.port, &added.zone),
    )
}

fn write_node(
    data: &Path,
    args: &Args,
    founding: &Founding,
    cpus: &[usize],
    authority: &Authority,
    (id, port, zone): (u64, u16, &str),
) -> Result<NodePlan, Failure> {
    let certificates = data.join("certs");
    let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let issued = authority.issue(Role::Node(id), &hosts, LIFETIME, SystemTime::now())?;
    let name = format!("node-{id}");
    write_file(
        &certificates.join(format!("{name}.key")),
        issued.key_pem.as_bytes(),
        0o600,
        true,
    )?;
    write_file(
        &certificates.join(format!("{name}.pem")),
        issued.certificate_pem.as_bytes(),
        0o644,
        true,
    )?;
    let plan = NodePlan {
        id,
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        config: data.join(format!("{name}.toml")),
    };
    let cluster = cluster_section(founding, args, zone);
    let text = node_config(&plan, args, &cluster, &processors(id, args, cpus));
    write_file(&plan.config, text.as_bytes(), 0o644, true)?;
    Ok(plan)
}

/// The authority kept in `directory`, or a new one.
fn authority(directory: &Path, now: SystemTime) -> Result<Authority, Failure> {
    let (certificate, key) = (directory.join("ca.pem"), directory.join("ca.key"));
    if let (Ok(certificate), Ok(key)) = (fs::read_to_string(&certificate), fs::read_to_string(&key))
        && let Ok(kept) = Authority::from_pem(&certificate, &key)
        && kept.cluster() == CLUSTER
        && kept.is_valid_at(now + RENEWED)
    {
        return Ok(kept);
    }
    let made = Authority::new(CLUSTER, LIFETIME, now)?;
    write_file(&key, made.key_pem().as_bytes(), 0o600, true)?;
    write_file(&certificate, made.certificate_pem().as_bytes(), 0o644, true)?;
    Ok(made)
}

/// The processors of node `id`'s cores: nodes follow each other round the machine. None when there are fewer than all nodes
/// have cores.
fn processors(id: u64, args: &Args, cpus: &[usize]) -> Vec<usize> {
    let cores = usize::from(args.cores);
    let first = (id as usize - 1) * cores;
    if usize::from(args.nodes) * cores > cpus.len() || first + cores > cpus.len() {
        return Vec::new();
    }
    cpus[first..first + cores].to_vec()
}

/// What a node is told of its cluster. One that is alone and keeps nothing needs none.
fn cluster_section(founding: &Founding, args: &Args, zone: &str) -> String {
    let Founding { id, epoch, .. } = founding;
    if args.is_alone() {
        return format!("[cluster]\nepoch = {epoch}\n");
    }
    format!("[cluster]\nid = \"{id}\"\nepoch = {epoch}\nzone = {zone:?}\n")
}

fn node_config(plan: &NodePlan, args: &Args, cluster: &str, cpus: &[usize]) -> String {
    let mut text = format!(
        "# Written by `generation dev` at each start. Paths are relative to this file.\n\
         listen = \"{listen}\"\n\
         data_dir = \"node-{id}\"\n\
         cores = {cores}\n\
         pin = {pin}\n",
        listen = plan.listen,
        id = plan.id,
        cores = args.cores,
        pin = !cpus.is_empty(),
    );
    if !cpus.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "cpus = {cpus:?}");
    }
    let _ = write!(
        text,
        "shards = {shards}\n\
         durability = \"{durability}\"\n\n\
         {cluster}\n\
         [tls]\n\
         ca = \"certs/ca.pem\"\n\
         certificate = \"certs/node-{id}.pem\"\n\
         key = \"certs/node-{id}.key\"\n\n\
         [memory]\n\
         budget = {budget}\n",
        shards = args.shards,
        durability = args.durability.name(),
        id = plan.id,
        budget = args.memory.as_u64(),
    );
    if let Some(records) = args.max_records {
        let _ = writeln!(text, "max_records = {records}");
    }
    let journals = JOURNALS_BYTES.max(JOURNAL_BYTES * u64::from(args.cores));
    let _ = write!(text, "\n[journal]\nsize = {journals}\nsegment = {SEGMENT_BYTES}\n");
    // A filter is a free text; Rust's escapes are TOML's for what can stand on a command line.
    let _ = write!(text, "\n[log]\nfilter = {:?}\n", args.log);
    text
}

/// Writes what `generation kv` and the client library read. Paths in it are relative to it.
pub(super) fn write_client_config(path: &Path, seeds: &[String]) -> Result<(), Failure> {
    let text = format!(
        "# Written by `generation dev`. Paths are relative to this file.\n\
         cluster = \"{CLUSTER}\"\n\
         seeds = {seeds:?}\n\
         ca = \"certs/ca.pem\"\n\
         certificate = \"certs/client.pem\"\n\
         key = \"certs/client.key\"\n"
    );
    write_file(path, text.as_bytes(), 0o644, true)
}
