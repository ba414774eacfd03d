//! What administrators ask about a cluster and its nodes: the verbs of [`Cluster`](crate::Operation::Cluster), and what goes with them.
//!
//! The cluster's records travel as the nodes keep them, without a meaning here.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;
use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::MAX_NAME_LEN;
use crate::wire::{take, take_bytes};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Verb {
    /// What the node that is asked says of itself: no body; the reply is a [`NodeInfo`].
    Describe = 1,
    /// The cluster's records, as the node that is asked knows them: no body.
    Records = 2,
    /// Has a node that belongs to no cluster begin one: a [`Founding`].
    Found = 3,
    /// Has a node that belongs to no cluster take part in one: the cluster's records.
    Adopt = 4,
    /// Takes a node into the cluster: what it says of itself, a [`NodeInfo`].
    Join = 5,
    /// Has a node lead nothing: u64 node.
    Drain = 6,
    /// Has it lead again: u64 node.
    Resume = 7,
    /// Has a node's replicas move away, and then the node leave: u64 node.
    Decommission = 8,
    /// Has another node's replicas come in the place of a dead one's, without waiting: u64 dead node, u64 node or 0 for any.
    Replace = 9,
    /// Has replicas spread evenly, without waiting: no body.
    Rebalance = 10,
    /// Changes the cluster's configuration: u16 length of the name, name, value.
    Configure = 11,
    /// What the controller is at: no body; the reply is a [`Progress`].
    Progress = 12,
}

impl Verb {
    /// All, by their codes.
    pub const ALL: &'static [Verb] = &[
        Self::Describe,
        Self::Records,
        Self::Found,
        Self::Adopt,
        Self::Join,
        Self::Drain,
        Self::Resume,
        Self::Decommission,
        Self::Replace,
        Self::Rebalance,
        Self::Configure,
        Self::Progress,
    ];

    /// The verb of a code; `None` for one of a later minor version.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|verb| verb.code() == code)
    }

    /// The code on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether the node that is asked answers for itself; anything else is the controller's, and the node asks it.
    pub const fn is_of_node(self) -> bool {
        matches!(self, Self::Describe | Self::Records | Self::Found | Self::Adopt)
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its id.
    pub node: u64,
    /// Identity of its data directory.
    pub directory: u128,
    /// Identity of the cluster it is configured for.
    pub cluster_id: u128,
    /// The cluster's name.
    pub cluster: String,
    /// Version of the cluster's records it knows; 0: it belongs to no cluster yet.
    pub records: u64,
    /// Where it is reached.
    pub addr: SocketAddr,
    /// Its zone; empty: none is configured.
    pub zone: String,
    /// Its cores.
    pub cores: u16,
    /// How many shards it is configured for.
    pub shards: u16,
    /// Whether it can belong to a cluster that grows: one that is alone, keeps nothing or lists its nodes cannot.
    pub is_managed: bool,
}

/// What a cluster begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Founding {
    /// Replicas of each shard, once there are nodes enough: 1, 3 or 5.
    pub replication_factor: u8,
    /// Milliseconds after which a dead node's replicas are made elsewhere.
    pub replace_after_ms: u64,
}

/// What the controller is at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// The node whose controller this is.
    pub leader: u64,
    /// What is being done, one line each.
    pub steps: Vec<String>,
    /// What cannot be done, and why, one line each.
    pub stuck: Vec<String>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NodeInfoHead {
    directory: U128,
    cluster_id: U128,
    node: U64,
    records: U64,
    /// IPv4 addresses are mapped into IPv6 (RFC 4291, section 2.5.5.2).
    ip: [u8; 16],
    port: U16,
    cores: U16,
    shards: U16,
    cluster_len: U16,
    zone_len: U16,
    managed: u8,
    reserved: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FoundingWire {
    replace_after_ms: U64,
    replication_factor: u8,
    reserved: [u8; 7],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProgressHead {
    leader: U64,
    steps: U16,
    stuck: U16,
    reserved: U32,
}

impl NodeInfo {
    /// Appends it.
    ///
    /// # Panics
    /// When the cluster's name or the zone is longer than [`MAX_NAME_LEN`].
    pub fn encode(&self, out: &mut BytesMut) {
        let ip = match self.addr.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        let head = NodeInfoHead {
            directory: U128::new(self.directory),
            cluster_id: U128::new(self.cluster_id),
            node: U64::new(self.node),
            records: U64::new(self.records),
            ip: ip.octets(),
            port: U16::new(self.addr.port()),
            cores: U16::new(self.cores),
            shards: U16::new(self.shards),
            cluster_len: U16::new(name_len(&self.cluster)),
            zone_len: U16::new(name_len(&self.zone)),
            managed: u8::from(self.is_managed),
            reserved: 0,
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.cluster.as_bytes());
        out.extend_from_slice(self.zone.as_bytes());
    }

    /// Reads it. `None`: the bytes end early, or hold a text that is too long or not UTF-8. What a later minor version appended is
    /// skipped.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let head: &NodeInfoHead = take(&mut bytes)?;
        let cluster = take_name(&mut bytes, head.cluster_len.get())?;
        let zone = take_name(&mut bytes, head.zone_len.get())?;
        Some(Self {
            node: head.node.get(),
            directory: head.directory.get(),
            cluster_id: head.cluster_id.get(),
            cluster,
            records: head.records.get(),
            addr: SocketAddr::new(Ipv6Addr::from(head.ip).to_canonical(), head.port.get()),
            zone,
            cores: head.cores.get(),
            shards: head.shards.get(),
            is_managed: head.managed != 0,
        })
    }
}

impl Founding {
    /// Appends it.
    pub fn encode(&self, out: &mut BytesMut) {
        let wire = FoundingWire {
            replace_after_ms: U64::new(self.replace_after_ms),
            replication_factor: self.replication_factor,
            reserved: [0; 7],
        };
        out.extend_from_slice(wire.as_bytes());
    }

    /// Reads it. `None`: the bytes end early.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let wire: &FoundingWire = take(&mut bytes)?;
        Some(Self {
            replication_factor: wire.replication_factor,
            replace_after_ms: wire.replace_after_ms.get(),
        })
    }
}

impl Progress {
    /// Appends it; of each list the first 65,535 lines, of each line the first 65,535 bytes.
    pub fn encode(&self, out: &mut BytesMut) {
        let count = |lines: &[String]| U16::new(u16::try_from(lines.len()).unwrap_or(u16::MAX));
        let head = ProgressHead {
            leader: U64::new(self.leader),
            steps: count(&self.steps),
            stuck: count(&self.stuck),
            reserved: U32::ZERO,
        };
        out.extend_from_slice(head.as_bytes());
        for lines in [&self.steps, &self.stuck] {
            for line in lines.iter().take(usize::from(u16::MAX)) {
                let line = &line[..line.floor_char_boundary(usize::from(u16::MAX))];
                out.extend_from_slice(&U16::new(line.len() as u16).to_bytes());
                out.extend_from_slice(line.as_bytes());
            }
        }
    }

    /// Reads it. `None`: the bytes end early, or a line is not UTF-8.
    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let head: &ProgressHead = take(&mut bytes)?;
        let mut lines = |count: u16| -> Option<Vec<String>> {
            let line = |bytes: &mut &[u8]| {
                let len: &U16 = take(bytes)?;
                let line = take_bytes(bytes, usize::from(len.get()))?;
                Some(std::str::from_utf8(line).ok()?.to_owned())
            };
            (0..count).map(|_| line(&mut bytes)).collect()
        };
        Some(Self {
            leader: head.leader.get(),
            steps: lines(head.steps.get())?,
            stuck: lines(head.stuck.get())?,
        })
    }
}

/// Appends the body of [`Verb::Configure`].
///
/// # Panics
/// When the name is longer than [`MAX_NAME_LEN`].
pub fn encode_setting(name: &str, value: &str, out: &mut BytesMut) {
    out.extend_from_slice(&U16::new(name_len(name)).to_bytes());
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(value.as_bytes());
}

/// Reads it: name and value. `None`: the bytes end early, or are not UTF-8.
pub fn decode_setting(mut bytes: &[u8]) -> Option<(&str, &str)> {
    let len: &U16 = take(&mut bytes)?;
    let name = take_bytes(&mut bytes, usize::from(len.get()))?;
    Some((std::str::from_utf8(name).ok()?, std::str::from_utf8(bytes).ok()?))
}

/// Reads the nodes of a verb that is about some: `COUNT` ids and nothing else.
pub fn decode_nodes<const COUNT: usize>(mut bytes: &[u8]) -> Option<[u64; COUNT]> {
    let mut nodes = [0; COUNT];
    for node in &mut nodes {
        let id: &U64 = take(&mut bytes)?;
        *node = id.get();
    }
    bytes.is_empty().then_some(nodes)
}

fn name_len(name: &str) -> u16 {
    assert!(name.len() <= MAX_NAME_LEN, "a name of {} bytes", name.len());
    name.len() as u16
}

fn take_name(bytes: &mut &[u8], len: u16) -> Option<String> {
    let len = usize::from(len);
    if len > MAX_NAME_LEN {
        return None;
    }
    let name = take_bytes(bytes, len)?;
    Some(std::str::from_utf8(name).ok()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> NodeInfo {
        NodeInfo {
            node: 7,
            directory: 1 << 100,
            cluster_id: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
            cluster: "main".into(),
            records: 3 << 16,
            addr: "10.0.0.7:7400".parse().unwrap(),
            zone: "zone b".into(),
            cores: 4,
            shards: 16,
            is_managed: true,
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_shorter_is() {
        let progress = Progress {
            leader: 3,
            steps: vec!["shard 1: node 4 for node 2".into(), String::new()],
            stuck: vec!["shard 2: no leader".into()],
        };
        let founding = Founding {
            replication_factor: 3,
            replace_after_ms: 120_000,
        };
        let mut out = BytesMut::new();
        info().encode(&mut out);
        assert_eq!(NodeInfo::decode(&out), Some(info()));
        assert!((0..out.len()).all(|len| NodeInfo::decode(&out[..len]).is_none()));
        out.clear();
        progress.encode(&mut out);
        assert_eq!(Progress::decode(&out), Some(progress));
        assert!((0..out.len()).all(|len| Progress::decode(&out[..len]).is_none()));
        out.clear();
        founding.encode(&mut out);
        assert_eq!(Founding::decode(&out), Some(founding));
        assert!((0..out.len()).all(|len| Founding::decode(&out[..len]).is_none()));
        out.clear();
        encode_setting("replication-factor", "5", &mut out);
        assert_eq!(decode_setting(&out), Some(("replication-factor", "5")));
        assert_eq!(decode_setting(&out[..9]), None);
        assert_eq!(decode_nodes::<1>(&9_u64.to_le_bytes()), Some([9]));
        assert_eq!(decode_nodes::<2>(&9_u64.to_le_bytes()), None);
        assert_eq!(decode_nodes::<1>(&[0; 9]), None);
    }

    #[test]
    fn texts_that_are_none_are_refused() {
        let mut out = BytesMut::new();
        info().encode(&mut out);
        let last = out.len() - 1;
        out[last] = 0xff;
        assert_eq!(NodeInfo::decode(&out), None);
        assert_eq!(decode_setting(&[1, 0, 0xff]), None);
    }

    #[test]
    fn every_verb_has_a_code_of_its_own() {
        for verb in Verb::ALL {
            assert_eq!(Verb::from_code(verb.code()), Some(*verb));
        }
        assert_eq!(Verb::from_code(0), None);
        assert_eq!(Verb::from_code(13), None);
    }
}
