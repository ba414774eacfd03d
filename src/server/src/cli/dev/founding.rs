//! What the cluster of a `generation dev` directory was founded with: a file that outlives its nodes.
//!
//! Nodes with journals can be started again only as they were: the same nodes, cores and shards in the same cluster. Where nothing is
//! kept (`--durability memory`), every start founds the cluster anew, under a higher epoch and in empty directories.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Args;
use crate::cli::certs::write_file;
use crate::cli::{Exit, Failure};
use crate::config::Durability;

/// Name of the file.
const FILE: &str = "cluster.toml";

/// What a cluster was founded with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Founding {
    /// Its identity, 32 hexadecimal digits.
    pub(super) id: String,
    /// Its epoch: seconds since the Unix epoch when it was founded.
    pub(super) epoch: u32,
    nodes: u16,
    cores: u16,
    shards: u16,
    durability: Durability,
    /// Replicas of each shard, where there are nodes enough.
    pub(super) replication_factor: u8,
    /// How many zones the nodes are dealt out to; 0: nothing is said of zones.
    pub(super) zones: u16,
    /// Nodes that were added since.
    #[serde(default)]
    pub(super) added: Vec<Added>,
    /// The nodes' ports, which they keep.
    pub(super) ports: Vec<u16>,
}

/// A node that was added to a running cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Added {
    pub(super) id: u64,
    pub(super) port: u16,
    /// Its zone, if one was said.
    pub(super) zone: String,
}

impl Founding {
    /// The cluster of the directory `data`, which the caller holds; founded now if there is none, or if it kept nothing.
    pub(super) fn of(
        data: &Path,
        args: &Args,
        ports: impl FnOnce() -> Result<Vec<u16>, Failure>,
    ) -> Result<Self, Failure> {
        let path = data.join(FILE);
        let kept: Option<Self> = match fs::read_to_string(&path) {
            Ok(text) => Some(toml::from_str(&text).map_err(|error| {
                let message = error.message();
                Failure::usage(format!(
                    "{}: {message}; name another directory with --data",
                    path.display()
                ))
            })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Failure::usage(format!("{}: {error}", path.display()))),
        };
        let founding = match kept {
            Some(kept) if kept.durability == Durability::Sync => {
                kept.check(data, args)?;
                return Ok(kept);
            }
            Some(kept) => Self::new(kept.id, kept.epoch.saturating_add(1), args, ports()?),
            None => Self::new(draw_id()?, 1, args, ports()?),
        };
        // In this order: directories of nodes never outlive what they were founded with.
        remove_nodes(data)?;
        write_file(&path, founding.text().as_bytes(), 0o644, true)?;
        Ok(founding)
    }

    fn new(id: String, least_epoch: u32, args: &Args, ports: Vec<u16>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_s = now.map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(0));
        let &Args {
            nodes,
            cores,
            shards,
            durability,
            zones,
            ..
        } = args;
        Self {
            id,
            epoch: now_s.max(least_epoch),
            nodes,
            cores,
            shards,
            durability,
            replication_factor: args.replication_factor(),
            zones,
            added: Vec::new(),
            ports,
        }
    }

    /// The zone of one of the first nodes.
    pub(super) fn zone_of(&self, id: u64) -> String {
        match self.zones {
            0 => String::new(),
            zones => format!("zone-{}", (id - 1) % u64::from(zones) + 1),
        }
    }

    /// Adds a node, and keeps it.
    pub(super) fn add(&mut self, data: &Path, added: Added) -> Result<(), Failure> {
        self.added.push(added);
        write_file(&data.join(FILE), self.text().as_bytes(), 0o644, true)
    }

    /// Refuses what the directory was not founded with.
    fn check(&self, data: &Path, args: &Args) -> Result<(), Failure> {
        let number = |number: u16| number.to_string();
        let options = [
            ("--nodes", number(self.nodes), number(args.nodes)),
            ("--cores", number(self.cores), number(args.cores)),
            ("--shards", number(self.shards), number(args.shards)),
            ("--zones", number(self.zones), number(args.zones)),
            (
                "--durability",
                self.durability.name().to_owned(),
                args.durability.name().to_owned(),
            ),
        ];
        let first = self.ports.first().copied().unwrap_or(0);
        let port = (args.port > 0 && args.port != first).then(|| ("--port", number(first), number(args.port)));
        match options.iter().chain(&port).find(|(_, kept, asked)| kept != asked) {
            None => Ok(()),
            Some((option, kept, asked)) => Err(Failure::usage(format!(
                "{data} holds a cluster of {option} {kept}, not {asked}; start it with {option} {kept}, name another directory with --data, \
                 or remove {data} with everything in it",
                data = data.display(),
            ))),
        }
    }

    fn text(&self) -> String {
        let Self {
            id,
            epoch,
            nodes,
            cores,
            shards,
            durability,
            replication_factor,
            zones,
            added,
            ports,
        } = self;
        let mut more = String::new();
        for Added { id, port, zone } in added {
            // Writing to a string cannot fail.
            let _ = write!(more, "\n[[added]]\nid = {id}\nport = {port}\nzone = {zone:?}\n");
        }
        format!(
            "# Written by `generation dev` when it founded the cluster whose nodes lie beside this file.\n\
             id = \"{id}\"\n\
             epoch = {epoch}\n\
             nodes = {nodes}\n\
             cores = {cores}\n\
             shards = {shards}\n\
             durability = \"{}\"\n\
             replication_factor = {replication_factor}\n\
             zones = {zones}\n\
             ports = {ports:?}\n\
             {more}",
            durability.name()
        )
    }
}

fn draw_id() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Failure::new(Exit::Rejected, format!("no random numbers: {error}")))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Removes the directories of all nodes.
fn remove_nodes(data: &Path) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::usage(format!("{}: {error}", data.display()));
    for entry in fs::read_dir(data).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node-"));
        if number.is_some_and(|number| number.parse::<u64>().is_ok()) && entry.path().is_dir() {
            fs::remove_dir_all(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &[&str]) -> Args {
        Line::parse_from([&["dev"], line].concat()).args
    }

    #[allow(clippy::unnecessary_wraps, reason = "choosing ports may fail")]
    fn ports() -> Result<Vec<u16>, Failure> {
        Ok(vec![7400, 7401, 7402])
    }

    #[test]
    fn what_is_kept_is_started_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        let founded = Founding::of(data, &args(&["--nodes", "3"]), ports).unwrap();
        fs::create_dir(data.join("node-1")).unwrap();
        assert_eq!(
            Founding::of(data, &args(&["--nodes", "3", "--memory", "1GiB"]), ports).unwrap(),
            founded
        );
        assert!(data.join("node-1").exists());
        for (line, wanted) in [
            (&["--nodes", "1"][..], "--nodes 3, not 1"),
            (&["--nodes", "3", "--cores", "2"], "--cores 1, not 2"),
            (&["--nodes", "3", "--shards", "4"], "--shards 16, not 4"),
            (&["--nodes", "3", "--port", "9000"], "--port 7400, not 9000"),
            (&["--nodes", "3", "--zones", "3"], "--zones 0, not 3"),
            (
                &["--nodes", "3", "--durability", "memory"],
                "--durability sync, not memory",
            ),
        ] {
            let failure = Founding::of(data, &args(line), ports).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(
                failure.message.contains(wanted) && failure.message.contains("--data"),
                "{}",
                failure.message
            );
        }
        assert_eq!(Founding::of(data, &args(&["--nodes", "3"]), ports).unwrap(), founded);
    }

    #[test]
    fn what_keeps_nothing_is_founded_anew() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        let memory = args(&["--durability", "memory"]);
        let first = Founding::of(data, &memory, ports).unwrap();
        for name in ["node-1", "certs", "node-x"] {
            fs::create_dir(data.join(name)).unwrap();
        }
        let second = Founding::of(data, &memory, ports).unwrap();
        assert_eq!(second.id, first.id);
        assert!(second.epoch > first.epoch);
        assert!(!data.join("node-1").exists() && data.join("certs").exists() && data.join("node-x").exists());
        let third = Founding::of(data, &args(&["--nodes", "5"]), ports).unwrap();
        assert!(third.epoch > second.epoch);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "id = 3\n").unwrap();
        let failure = Founding::of(directory.path(), &args(&[]), ports).unwrap_err();
        assert!(failure.message.contains(FILE), "{}", failure.message);
    }
}
