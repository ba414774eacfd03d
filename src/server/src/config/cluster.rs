//! Which nodes a cluster has, what an acknowledged write has survived, and how much of the disk the journals take.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bytesize::ByteSize;
use generation_node::Replication;
use generation_node::env::disk::BLOCK_BYTES;
use generation_proto::limits::MAX_NAME_LEN;
use serde::Deserialize;

use super::{Config, ConfigError, wrong};

/// What an acknowledged write has survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// It is on the disks of a majority.
    #[default]
    Sync,
    /// It is in the memory of a majority.
    Memory,
}

impl Durability {
    /// The name, as configuration and status have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Memory => "memory",
        }
    }
}

/// `[cluster]`: the nodes that share the shards.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cluster {
    /// Identity of the cluster, drawn once.
    #[serde(deserialize_with = "identity")]
    pub id: Option<u128>,
    /// Epoch of the cluster's map.
    pub epoch: u32,
    /// All nodes, this one included. Empty: this node is alone, or, with `id`, the controller's records say which nodes there are.
    pub nodes: Vec<Member>,
    /// What fails together with this node: a rack, a room.
    pub zone: String,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its id, as in its certificate.
    pub id: u64,
    /// Where clients and the other nodes reach it.
    pub addr: SocketAddr,
    /// How many cores it serves with.
    pub cores: u16,
}

/// `[journal]`: what the journals of a node take of its disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Journal {
    /// Bytes of the journals of all cores.
    pub size: ByteSize,
    /// Bytes of one segment file.
    pub segment: ByteSize,
    /// Bytes that a shard's log grows by before a snapshot of the shard is taken.
    pub snapshot_after: Option<ByteSize>,
}

/// One core's journal, computed from [`Journal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalShare {
    /// Bytes of one segment file.
    pub segment_bytes: u64,
    /// Most segment files.
    pub segments: usize,
    /// Bytes that a shard's log grows by before a snapshot of the shard is taken.
    pub snapshot_bytes: u64,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            id: None,
            epoch: 1,
            nodes: Vec::new(),
            zone: String::new(),
        }
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            size: ByteSize::gib(1),
            segment: ByteSize::mib(32),
            snapshot_after: None,
        }
    }
}

/// Least number of segments of a core's journal: below, a snapshot that is being taken would hold up writes.
const MIN_SEGMENTS: u64 = 4;

/// Entries of the log with several commands are not longer than this, in bytes.
const BATCH_BYTES: u64 = 512 << 10;

/// What an entry of the log holds beside its commands' values and victims: keys and headers.
const BESIDE_BYTES: u64 = 128 << 10;

/// Least length of a segment. The longest entry of the log must fit half of one: openraft takes an entry that cannot be written for the
/// end of the replica. A value comes with the victims that make room for it, at most five bytes for eight of its own.
fn least_segment_bytes(max_value_bytes: u64) -> u64 {
    let commands = max_value_bytes.max(BATCH_BYTES);
    let least = 2 * (commands + commands * 5 / 8 + BESIDE_BYTES);
    least
        .max(Replication::MIN_SEGMENT_BYTES)
        .next_multiple_of(BLOCK_BYTES as u64)
}

fn identity<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u128>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match u128::from_str_radix(&text, 16) {
        Ok(id) if digits => Ok(Some(id)),
        _ => Err(serde::de::Error::custom(format!(
            "`{text}` is not an identity of 32 hexadecimal digits; `openssl rand -hex 16` draws one"
        ))),
    }
}

impl Cluster {
    /// Whether the controller's records say which nodes there are.
    pub const fn is_managed(&self) -> bool {
        self.id.is_some() && self.nodes.is_empty()
    }

    /// Checks the list by itself.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let Self { id, epoch, nodes, zone } = self;
        if zone.len() > MAX_NAME_LEN {
            return wrong("cluster.zone", format!("must not be longer than {MAX_NAME_LEN} bytes"));
        }
        if !zone.is_empty() && !self.is_managed() {
            return wrong(
                "cluster.zone",
                "means nothing where every node has a replica of every shard; leave `cluster.nodes` out for a cluster that grows, or `zone`",
            );
        }
        match nodes.len() {
            0 | 1 | 3 | 5 => {}
            2 => {
                return wrong(
                    "cluster.nodes",
                    "two nodes survive no failure, because both are needed for a majority; list 1, 3 or 5",
                );
            }
            4 => {
                return wrong(
                    "cluster.nodes",
                    "four nodes survive no more failures than three; list 1, 3 or 5",
                );
            }
            more => return wrong("cluster.nodes", format!("{more} nodes are too many; list 1, 3 or 5")),
        }
        if nodes.len() > 1 && id.is_none() {
            return wrong(
                "cluster.id",
                "must be set where there are several nodes, to the same 32 hexadecimal digits on each; \
                 `openssl rand -hex 16` draws them",
            );
        }
        if *epoch == 0 {
            return wrong("cluster.epoch", "must be at least 1");
        }
        let (mut ids, mut addresses) = (BTreeMap::new(), BTreeMap::new());
        for (place, Member { id, addr, cores }) in (1..).zip(nodes) {
            let entry = |message: String| wrong("cluster.nodes", format!("entry {place}: {message}"));
            if *id == 0 {
                return entry("ids begin at 1".into());
            }
            if let Some(first) = ids.insert(*id, place) {
                return entry(format!("entry {first} is node {id} too"));
            }
            if addr.ip().is_unspecified() || addr.port() == 0 {
                return entry(format!(
                    "nobody can reach {addr}; give the address and port the other nodes are to use"
                ));
            }
            if let Some(first) = addresses.insert(*addr, place) {
                return entry(format!("entry {first} has the address {addr} too"));
            }
            if !(1..=256).contains(cores) {
                return entry(format!("a node has 1 to 256 cores, not {cores}"));
            }
        }
        Ok(())
    }
}

impl Config {
    /// What the cluster's list says of node `id`; `None` where there is no list, and the node is alone.
    pub fn member(&self, id: u64) -> Result<Option<&Member>, ConfigError> {
        let nodes = &self.cluster.nodes;
        if nodes.is_empty() {
            let (key, told) = self
                .advertise
                .map_or(("listen", self.listen), |addr| ("advertise", addr));
            if self.cluster.is_managed() && (told.ip().is_unspecified() || (told.port() == 0 && key == "advertise")) {
                return wrong(
                    key,
                    format!(
                        "nobody can reach {told}; set `advertise` to the address and port the other nodes are to use"
                    ),
                );
            }
            return Ok(None);
        }
        let Some(member) = nodes.iter().find(|node| node.id == id) else {
            let listed: Vec<String> = nodes.iter().map(|node| node.id.to_string()).collect();
            let listed = listed.join(", ");
            return wrong(
                "cluster.nodes",
                format!(
                    "the certificate is of node {id}, and the list has {listed}; list this node, or take its own certificate"
                ),
            );
        };
        let (key, told) = match self.advertise {
            Some(advertise) => ("advertise", advertise),
            None => ("listen", self.listen),
        };
        if told != member.addr {
            return wrong(
                "cluster.nodes",
                format!(
                    "node {id} has the address {} in the list, and `{key}` is {told}; make them the same, or set `advertise`",
                    member.addr
                ),
            );
        }
        if let Some(cores) = self.cores.filter(|cores| *cores != member.cores) {
            return wrong(
                "cluster.nodes",
                format!(
                    "node {id} has {} cores in the list, and `cores` is {cores}; make them the same",
                    member.cores
                ),
            );
        }
        Ok(Some(member))
    }

    /// Whether shards are replicated: kept in a journal, or on several nodes. Otherwise they are in this process's memory alone.
    pub fn is_replicated(&self) -> bool {
        self.durability == Durability::Sync || self.cluster.nodes.len() > 1 || self.cluster.is_managed()
    }

    /// One core's part of the journals on a node of `cores`.
    pub fn journal_share(&self, cores: u16) -> Result<JournalShare, ConfigError> {
        let Journal {
            size,
            segment,
            snapshot_after,
        } = &self.journal;
        let (size, segment) = (size.as_u64(), segment.as_u64());
        let iec = |bytes| ByteSize::b(bytes).display().iec();
        let least = least_segment_bytes(self.limits.max_value.as_u64());
        if segment < least {
            return wrong(
                "journal.segment",
                format!("must be at least {least} bytes, so that a value of `limits.max_value` fits"),
            );
        }
        if !segment.is_multiple_of(BLOCK_BYTES as u64) {
            return wrong("journal.segment", format!("must be a multiple of {BLOCK_BYTES} bytes"));
        }
        let share = size / u64::from(cores);
        let segments = share / segment;
        if segments < MIN_SEGMENTS {
            let needed = iec(segment * MIN_SEGMENTS * u64::from(cores));
            return wrong(
                "journal.size",
                format!("must be at least {needed}: {MIN_SEGMENTS} segments for each of {cores} cores"),
            );
        }
        let snapshot_bytes = snapshot_after.map_or(share / 4, |after| after.as_u64());
        if snapshot_bytes < segment {
            return wrong(
                "journal.snapshot_after",
                format!("must be at least `journal.segment`, {}", iec(segment)),
            );
        }
        Ok(JournalShare {
            segment_bytes: segment,
            segments: segments as usize,
            snapshot_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ID: &str = "id = \"000102030405060708090a0b0c0d0e0f\"";

    fn parse(text: &str) -> Config {
        Config::parse(Path::new("node.toml"), text).unwrap()
    }

    fn nodes(count: u64) -> String {
        let node = |id| format!("{{ id = {id}, addr = \"10.0.0.{id}:7400\", cores = 2 }}");
        let nodes: Vec<String> = (1..=count).map(node).collect();
        format!("nodes = [{}]", nodes.join(", "))
    }

    fn cluster(count: u64) -> String {
        format!("listen = \"10.0.0.1:7400\"\n[cluster]\n{ID}\n{}\n", nodes(count))
    }

    #[test]
    fn a_node_finds_itself_in_the_list() {
        for count in [1, 3, 5] {
            let config = parse(&cluster(count));
            config.validate().unwrap();
            assert_eq!(config.cluster.id, Some(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f));
            assert_eq!(config.member(1).unwrap().unwrap().cores, 2);
        }
        assert_eq!(parse("").member(7).unwrap(), None);
        let advertised = format!("advertise = \"10.0.0.2:7400\"\n{}", cluster(3));
        assert_eq!(parse(&advertised).member(2).unwrap().unwrap().id, 2);
    }

    #[test]
    fn an_identity_without_a_list_is_for_a_cluster_that_grows() {
        let config = parse(&format!("listen = \"10.0.0.1:7400\"\n[cluster]\n{ID}\nzone = \"a\"\n"));
        config.validate().unwrap();
        assert!(config.cluster.is_managed() && config.is_replicated());
        assert_eq!(config.member(7).unwrap(), None);
        assert!(!parse(&cluster(3)).cluster.is_managed() && !parse("").cluster.is_managed());
        let nowhere = parse(&format!("listen = \"0.0.0.0:7400\"\n[cluster]\n{ID}\n"));
        let error = nowhere.member(7).unwrap_err().to_string();
        assert!(error.contains("set `advertise`"), "{error}");
    }

    #[test]
    fn a_list_that_cannot_work_is_refused_with_the_reason() {
        let four = nodes(4);
        let other = |entry: &str| {
            format!(
                "[cluster]\n{ID}\nnodes = [{{ id = 1, addr = \"10.0.0.1:1\", cores = 1 }}, {entry}, {{ id = 3, addr = \"10.0.0.3:1\", cores = 1 }}]"
            )
        };
        for (text, key, wanted) in [
            (format!("[cluster]\n{ID}\n{}", nodes(2)), "cluster.nodes", "majority"),
            (format!("[cluster]\n{ID}\n{four}"), "cluster.nodes", "three"),
            (format!("[cluster]\n{ID}\n{}", nodes(7)), "cluster.nodes", "too many"),
            (format!("[cluster]\n{}", nodes(3)), "cluster.id", "openssl rand"),
            (
                format!("[cluster]\nzone = \"a\"\n{ID}\n{}", nodes(3)),
                "cluster.zone",
                "leave `cluster.nodes` out",
            ),
            (
                format!("[cluster]\n{ID}\nzone = \"{}\"", "z".repeat(1000)),
                "cluster.zone",
                "must not be longer",
            ),
            (
                format!("[cluster]\nepoch = 0\n{}", nodes(1)),
                "cluster.epoch",
                "at least 1",
            ),
            (
                other("{ id = 1, addr = \"10.0.0.2:1\", cores = 1 }"),
                "cluster.nodes",
                "entry 2: entry 1 is node 1 too",
            ),
            (
                other("{ id = 0, addr = \"10.0.0.2:1\", cores = 1 }"),
                "cluster.nodes",
                "begin at 1",
            ),
            (
                other("{ id = 2, addr = \"10.0.0.1:1\", cores = 1 }"),
                "cluster.nodes",
                "address 10.0.0.1:1 too",
            ),
            (
                other("{ id = 2, addr = \"0.0.0.0:1\", cores = 1 }"),
                "cluster.nodes",
                "nobody can reach",
            ),
            (
                other("{ id = 2, addr = \"10.0.0.2:0\", cores = 1 }"),
                "cluster.nodes",
                "nobody can reach",
            ),
            (
                other("{ id = 2, addr = \"10.0.0.2:1\", cores = 0 }"),
                "cluster.nodes",
                "1 to 256",
            ),
        ] {
            let error = parse(&text).validate().unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: found, .. } if *found == key),
                "{text}: {error}"
            );
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn a_node_that_disagrees_with_the_list_is_refused() {
        for (head, id, wanted) in [
            ("", 4, "certificate is of node 4, and the list has 1, 2, 3"),
            ("", 2, "`listen` is 10.0.0.1:7400"),
            ("advertise = \"10.0.0.9:7400\"\n", 1, "`advertise` is 10.0.0.9:7400"),
            ("cores = 1\n", 1, "`cores` is 1"),
        ] {
            let error = parse(&format!("{head}{}", cluster(3)))
                .member(id)
                .unwrap_err()
                .to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn an_identity_has_32_digits() {
        for id in [
            "12",
            "",
            "000102030405060708090a0b0c0d0e0g",
            "+00102030405060708090a0b0c0d0e0f",
        ] {
            let text = format!("[cluster]\nid = \"{id}\"\n");
            let error = Config::parse(Path::new("node.toml"), &text).unwrap_err().to_string();
            assert!(
                error.starts_with("node.toml:2: ") && error.contains("32 hexadecimal"),
                "{error}"
            );
        }
    }

    #[test]
    fn unknown_keys_of_a_node_are_refused_with_the_one_that_was_meant() {
        for (text, wanted) in [
            (
                "[cluster]\nnodes = [\n  { id = 1, adr = \"10.0.0.1:1\", cores = 1 },\n]\n",
                "node.toml:3: unknown key `adr` in [[cluster.nodes]]; did you mean `addr`?",
            ),
            (
                "[[cluster.nodes]]\nid = 1\naddr = \"10.0.0.1:1\"\nkores = 1\n",
                "node.toml:4: unknown key `kores` in [[cluster.nodes]]; did you mean `cores`?",
            ),
            (
                "[cluster]\nadr = 1\n",
                "node.toml:2: unknown key `adr` in [cluster]; known are `id`, `zone`, `epoch`, `nodes`",
            ),
            (
                "addr = \"10.0.0.1:1\"\n",
                "node.toml:1: unknown key `addr`; it belongs into [[cluster.nodes]]",
            ),
            (
                "[[cluster.nodes]]\nid = 1\naddr = \"10.0.0.1:1\"\n",
                "missing field `cores`",
            ),
            ("durability = \"disk\"\n", "node.toml:1: "),
        ] {
            let error = Config::parse(Path::new("node.toml"), text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn journals_are_split_over_the_cores() {
        let share = |text: &str, cores| parse(text).journal_share(cores);
        let whole = share("", 1).unwrap();
        assert_eq!((whole.segments, whole.segment_bytes), (32, 32 << 20));
        assert_eq!(whole.snapshot_bytes, 256 << 20);
        assert_eq!(share("", 8).unwrap().segments, 4);
        for (text, cores, key) in [
            ("", 9, "journal.size"),
            ("journal.size = \"127MiB\"", 1, "journal.size"),
            ("journal.segment = \"16MiB\"", 1, "journal.segment"),
            ("journal.segment = 33554433", 1, "journal.segment"),
            ("limits.max_value = 1\njournal.segment = 4096", 1, "journal.segment"),
            ("journal.snapshot_after = 1", 1, "journal.snapshot_after"),
        ] {
            let error = share(text, cores).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: found, .. } if *found == key),
                "{text}: {error}"
            );
        }
        let small = share("limits.max_value = \"64KiB\"\njournal.segment = \"2MiB\"\njournal.size = \"8MiB\"\njournal.snapshot_after = \"4MiB\"", 1).unwrap();
        assert_eq!((small.segments, small.snapshot_bytes), (4, 4 << 20));
    }

    #[test]
    fn only_a_lone_node_in_memory_is_not_replicated() {
        assert!(parse("").is_replicated());
        assert!(!parse("durability = \"memory\"").is_replicated());
        assert!(parse(&format!("durability = \"memory\"\n{}", cluster(3))).is_replicated());
        assert!(!parse(&format!("durability = \"memory\"\n{}", cluster(1))).is_replicated());
    }
}
