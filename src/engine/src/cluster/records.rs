//! The records of the controller, byte for byte.
//!
//! # Keys
//! ASCII; numbers are decimal without leading zeros, so that each record has exactly one key.
//! ```text
//! config            controller            node/ID            shard/NUMBER
//! ```
//!
//! # Values, version 1
//! Numbers are little-endian; a *text* is u8 length, UTF-8; *ids* are u8 count, then u64 each, not 0, strictly
//! ascending.
//! ```text
//! config       u8 version, text name, u128 id, u16 shards, u8 replication, u64 replace_after_ms, u16 moves_per_node,
//!              u16 moves_total
//! controller   u8 version, u8 cause, ids targets
//! node/ID      u8 version, u8 state, u8 4 | 6, IPv4 (4 bytes) | IPv6 (16 bytes), u16 port, text zone, u16 cores,
//!              u128 directory, u64 generation
//! shard/N      u8 version, u32 epoch, u8 cause, u8 load, u64 home (0: none), ids targets
//! ```
//! What follows is of a later release that only added: it is kept as it is ([`Later`]) and written back, so that a node of this
//! release that changes a record loses nothing of it. A change that old releases must not pass over takes a new version.
//!
//! # What holds
//! - Bytes that are no record are a typed error, never a panic.
//! - **One record, one encoding**: what decodes encodes to the same bytes again.
//! - What could not be read is not written: encoding checks what decoding does.

mod key;
#[cfg(test)]
pub(super) mod tests;

pub use key::{KeyError, RecordKey, key_of, parse_key};

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::codec::Reader;

/// The format version that is written, and the only one that is read.
pub const RECORD_VERSION: u8 = 1;

/// Longest name of a cluster or a zone, in bytes.
pub const MAX_TEXT_BYTES: usize = 255;

/// Most targets of one group: a factor of five, and what is about to replace each.
pub const MAX_TARGETS: usize = 10;

/// Most shards of a cluster: as many as there are slots.
pub const MAX_SHARDS: u16 = 16_384;

/// Most bytes of additions by later releases that a record may carry.
pub const MAX_LATER_BYTES: usize = 4096;

/// The replication factors there are: how many nodes hold each shard. One, two or none of them may fail.
pub const REPLICATION_FACTORS: [u8; 3] = [1, 3, 5];

/// Why bytes are no record, or a record cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a newer release in a format that this one must not guess at.
    #[error("record of format version {0}, this release reads {RECORD_VERSION}: upgrade this node")]
    UnsupportedVersion(u8),
    /// The bytes end inside a field.
    #[error("record is cut short in {0}")]
    Short(&'static str),
    /// A field holds what it never may.
    #[error("{field} of a record {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
}

fn wrong<T>(field: &'static str, problem: &'static str) -> Result<T, RecordError> {
    Err(RecordError::Field { field, problem })
}

/// What a later release has added to a record: unknown here, and kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Later(Vec<u8>);

impl Later {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What is so of the cluster as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Name of the cluster, as certificates have it.
    pub name: String,
    /// Identity of the cluster, drawn once.
    pub id: u128,
    /// Number of shards, fixed when the cluster is founded.
    pub shards: u16,
    /// How many nodes are to hold each shard: one of [`REPLICATION_FACTORS`].
    pub replication: u8,
    /// How long a node is dead before its replicas are made anew elsewhere, in milliseconds.
    pub replace_after_ms: u64,
    /// Most replicas on their way to or copied from one node at a time, at least 1.
    pub moves_per_node: u16,
    /// Most replicas on their way in the whole cluster at a time, at least 1.
    pub moves_total: u16,
    /// Additions of later releases.
    pub later: Later,
}

impl Config {
    /// A cluster with the default limits: two minutes, two replicas on their way a node, sixteen altogether.
    pub fn new(name: impl Into<String>, id: u128, shards: u16, replication: u8) -> Self {
        Self {
            name: name.into(),
            id,
            shards,
            replication,
            replace_after_ms: 120_000,
            moves_per_node: 2,
            moves_total: 16,
            later: Later::default(),
        }
    }

    /// The record as an entry's value.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        let mut out = vec![RECORD_VERSION];
        put_text(&mut out, "name", &self.name)?;
        out.extend(self.id.to_le_bytes());
        out.extend(self.shards.to_le_bytes());
        out.push(self.replication);
        out.extend(self.replace_after_ms.to_le_bytes());
        out.extend(self.moves_per_node.to_le_bytes());
        out.extend(self.moves_total.to_le_bytes());
        put_later(&mut out, &self.later)?;
        Ok(out)
    }

    /// Reads an entry's value.
    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let mut fields = Fields::begin(value)?;
        let config = Self {
            name: fields.text("name")?,
            id: fields.need("id", Reader::u128)?,
            shards: fields.need("shards", Reader::u16)?,
            replication: fields.need("replication", Reader::u8)?,
            replace_after_ms: fields.need("replace_after_ms", Reader::u64)?,
            moves_per_node: fields.need("moves_per_node", Reader::u16)?,
            moves_total: fields.need("moves_total", Reader::u16)?,
            later: fields.later()?,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), RecordError> {
        if self.name.is_empty() {
            return wrong("name", "is empty");
        }
        if !(1..=MAX_SHARDS).contains(&self.shards) {
            return wrong("shards", "is not between 1 and 16,384");
        }
        if !REPLICATION_FACTORS.contains(&self.replication) {
            return wrong("replication", "is none of 1, 3 and 5");
        }
        if self.moves_per_node == 0 {
            return wrong("moves_per_node", "is 0, so nothing would ever move");
        }
        if self.moves_total == 0 {
            return wrong("moves_total", "is 0, so nothing would ever move");
        }
        Ok(())
    }
}

/// What the cluster means to do with a node. Whether it lives is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeState {
    /// Holds replicas and leads shards.
    Up,
    /// Leads nothing and is given nothing, but keeps its replicas: before maintenance. Where that takes longer than
    /// [`Config::replace_after_ms`] they are made anew elsewhere all the same.
    Draining,
    /// Its replicas are to move away; then it is [`NodeState::Gone`].
    Leaving,
    /// Holds nothing and never comes back under this id.
    Gone,
}

impl NodeState {
    /// All states, in the order of a node's life.
    pub const ALL: [Self; 4] = [Self::Up, Self::Draining, Self::Leaving, Self::Gone];

    /// The state as people read it, and as [`NodeState::from_str`] does.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
            Self::Gone => "gone",
        }
    }

    /// Whether the node is to keep the replicas it has.
    pub const fn keeps_replicas(self) -> bool {
        matches!(self, Self::Up | Self::Draining)
    }

    const fn code(self) -> u8 {
        match self {
            Self::Up => 1,
            Self::Draining => 2,
            Self::Leaving => 3,
            Self::Gone => 4,
        }
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No state of a node has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no state of a node: there are up, draining, leaving and gone")]
pub struct UnknownState(pub String);

impl FromStr for NodeState {
    type Err = UnknownState;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let state = Self::ALL.into_iter().find(|state| state.name() == name);
        state.ok_or_else(|| UnknownState(name.to_owned()))
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its id, from 1, never another's; part of the key.
    pub id: u64,
    /// Where it listens, for nodes and clients. Flow and scope of an IPv6 address are not kept.
    pub addr: SocketAddr,
    /// What fails together with it: a rack, a room. Empty where nobody has said; all such nodes count as one zone.
    pub zone: String,
    /// How many cores it serves with, at least 1; its share of replicas and leaders is in proportion.
    pub cores: u16,
    /// Identity of its data directory, drawn when that was made.
    pub directory: u128,
    /// Grows with each start of the node.
    pub generation: u64,
    /// What is meant to become of it.
    pub state: NodeState,
    /// Additions of later releases.
    pub later: Later,
}

impl Node {
    /// A node that has just joined.
    pub fn new(id: u64, addr: SocketAddr, zone: impl Into<String>, cores: u16, directory: u128) -> Self {
        Self {
            id,
            addr,
            zone: zone.into(),
            cores,
            directory,
            generation: 1,
            state: NodeState::Up,
            later: Later::default(),
        }
    }

    /// The record as an entry's value.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        let mut out = vec![RECORD_VERSION, self.state.code()];
        match self.addr.ip() {
            IpAddr::V4(ip) => {
                out.push(4);
                out.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                out.push(6);
                out.extend(ip.octets());
            }
        }
        out.extend(self.addr.port().to_le_bytes());
        put_text(&mut out, "zone", &self.zone)?;
        out.extend(self.cores.to_le_bytes());
        out.extend(self.directory.to_le_bytes());
        out.extend(self.generation.to_le_bytes());
        put_later(&mut out, &self.later)?;
        Ok(out)
    }

    /// Reads the value of `node/id`.
    pub fn decode(id: u64, value: &[u8]) -> Result<Self, RecordError> {
        let mut fields = Fields::begin(value)?;
        let code = fields.need("state", Reader::u8)?;
        let Some(state) = NodeState::ALL.into_iter().find(|state| state.code() == code) else {
            return wrong("state", "is none this release knows");
        };
        let node = Self {
            id,
            addr: fields.addr()?,
            zone: fields.text("zone")?,
            cores: fields.need("cores", Reader::u16)?,
            directory: fields.need("directory", Reader::u128)?,
            generation: fields.need("generation", Reader::u64)?,
            state,
            later: fields.later()?,
        };
        node.check()?;
        Ok(node)
    }

    fn check(&self) -> Result<(), RecordError> {
        if self.cores == 0 {
            return wrong("cores", "is 0");
        }
        Ok(())
    }
}

/// Why targets are what they are. For people: nothing is decided by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// As the cluster was founded.
    Founded,
    /// There were fewer replicas than there should be.
    FillUp,
    /// A node had been dead for too long.
    Dead,
    /// A node is leaving.
    Leaving,
    /// Too many replicas were in one zone.
    Zones,
    /// There were more replicas than there should be.
    Surplus,
    /// Nodes held unequal shares.
    Balance,
    /// Known to a later release.
    Other(u8),
}

impl Cause {
    const NAMED: [Self; 7] = [
        Self::Founded,
        Self::FillUp,
        Self::Dead,
        Self::Leaving,
        Self::Zones,
        Self::Surplus,
        Self::Balance,
    ];

    /// The cause as people read it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Founded => "founded",
            Self::FillUp => "fill-up",
            Self::Dead => "dead node",
            Self::Leaving => "leaving node",
            Self::Zones => "zones",
            Self::Surplus => "surplus",
            Self::Balance => "balance",
            Self::Other(_) => "of a later release",
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Founded => 0,
            Self::FillUp => 1,
            Self::Dead => 2,
            Self::Leaving => 3,
            Self::Zones => 4,
            Self::Surplus => 5,
            Self::Balance => 6,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u8) -> Self {
        let named = Self::NAMED.into_iter().find(|cause| cause.code() == code);
        named.unwrap_or(Self::Other(code))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its number; part of the key.
    pub number: u16,
    /// Which life of the shard this is: raised where it had to be created anew, empty.
    pub epoch: u32,
    /// The nodes that are to have a replica, ascending. What its leader makes of that is no record.
    pub targets: Vec<u64>,
    /// Why the targets were changed last.
    pub cause: Cause,
    /// How busy the shard is, in coarse steps; see [`load_step`](super::load_step).
    pub load: u8,
    /// The node that leads it when all are fit, as last settled: what [`leaders`](super::leaders) changes as little as it can.
    pub home: Option<u64>,
    /// Additions of later releases.
    pub later: Later,
}

impl Shard {
    /// A shard as it is founded, with replicas on `targets` (in any order).
    pub fn new(number: u16, epoch: u32, targets: impl IntoIterator<Item = u64>) -> Self {
        Self {
            number,
            epoch,
            targets: ascending(targets),
            cause: Cause::Founded,
            load: 0,
            home: None,
            later: Later::default(),
        }
    }

    /// The record as an entry's value.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let mut out = vec![RECORD_VERSION];
        out.extend(self.epoch.to_le_bytes());
        out.extend([self.cause.code(), self.load]);
        if self.home == Some(0) {
            return wrong("home", "is node 0, which cannot be");
        }
        out.extend(self.home.unwrap_or(0).to_le_bytes());
        put_ids(&mut out, &self.targets)?;
        put_later(&mut out, &self.later)?;
        Ok(out)
    }

    /// Reads the value of `shard/number`.
    pub fn decode(number: u16, value: &[u8]) -> Result<Self, RecordError> {
        let mut fields = Fields::begin(value)?;
        Ok(Self {
            number,
            epoch: fields.need("epoch", Reader::u32)?,
            cause: Cause::from_code(fields.need("cause", Reader::u8)?),
            load: fields.need("load", Reader::u8)?,
            home: Some(fields.need("home", Reader::u64)?).filter(|home| *home != 0),
            targets: fields.ids()?,
            later: fields.later()?,
        })
    }
}

/// Group 0: the nodes that keep the records themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// The nodes that are to have a replica, ascending.
    pub targets: Vec<u64>,
    /// Why the targets were changed last.
    pub cause: Cause,
    /// Additions of later releases.
    pub later: Later,
}

impl Controller {
    /// Group 0 as it is founded, on `targets` (in any order).
    pub fn new(targets: impl IntoIterator<Item = u64>) -> Self {
        Self {
            targets: ascending(targets),
            cause: Cause::Founded,
            later: Later::default(),
        }
    }

    /// The record as an entry's value.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let mut out = vec![RECORD_VERSION, self.cause.code()];
        put_ids(&mut out, &self.targets)?;
        put_later(&mut out, &self.later)?;
        Ok(out)
    }

    /// Reads an entry's value.
    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let mut fields = Fields::begin(value)?;
        Ok(Self {
            cause: Cause::from_code(fields.need("cause", Reader::u8)?),
            targets: fields.ids()?,
            later: fields.later()?,
        })
    }
}

/// Any record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// What is so of the cluster as a whole.
    Config(Config),
    /// Group 0.
    Controller(Controller),
    /// A node.
    Node(Node),
    /// A shard.
    Shard(Shard),
}

impl Record {
    /// What it is the record of.
    pub fn key(&self) -> RecordKey {
        match self {
            Self::Config(_) => RecordKey::Config,
            Self::Controller(_) => RecordKey::Controller,
            Self::Node(node) => RecordKey::Node(node.id),
            Self::Shard(shard) => RecordKey::Shard(shard.number),
        }
    }

    /// The record as an entry's value.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        match self {
            Self::Config(config) => config.encode(),
            Self::Controller(controller) => controller.encode(),
            Self::Node(node) => node.encode(),
            Self::Shard(shard) => shard.encode(),
        }
    }

    /// Reads the value of the entry `key`.
    pub fn decode(key: RecordKey, value: &[u8]) -> Result<Self, RecordError> {
        Ok(match key {
            RecordKey::Config => Self::Config(Config::decode(value)?),
            RecordKey::Controller => Self::Controller(Controller::decode(value)?),
            RecordKey::Node(id) => Self::Node(Node::decode(id, value)?),
            RecordKey::Shard(number) => Self::Shard(Shard::decode(number, value)?),
        })
    }
}

/// Node ids as records hold them.
pub(super) fn ascending(ids: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut ids: Vec<u64> = ids.into_iter().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn put_text(out: &mut Vec<u8>, field: &'static str, text: &str) -> Result<(), RecordError> {
    let Ok(len) = u8::try_from(text.len()) else {
        return wrong(field, "is longer than 255 bytes");
    };
    out.push(len);
    out.extend(text.as_bytes());
    Ok(())
}

const _: () = assert!(MAX_TEXT_BYTES == u8::MAX as usize, "a text has one byte of length");

fn put_ids(out: &mut Vec<u8>, ids: &[u64]) -> Result<(), RecordError> {
    check_ids(ids)?;
    out.push(ids.len() as u8);
    for id in ids {
        out.extend(id.to_le_bytes());
    }
    Ok(())
}

fn check_ids(ids: &[u64]) -> Result<(), RecordError> {
    if ids.len() > MAX_TARGETS {
        return wrong("targets", "names more than 10 nodes");
    }
    if ids.first() == Some(&0) {
        return wrong("targets", "names node 0, which cannot be");
    }
    if !ids.is_sorted_by(|a, b| a < b) {
        return wrong("targets", "is not strictly ascending");
    }
    Ok(())
}

const _: () = assert!(MAX_TARGETS <= u8::MAX as usize, "ids have one byte of count");

fn put_later(out: &mut Vec<u8>, later: &Later) -> Result<(), RecordError> {
    if later.0.len() > MAX_LATER_BYTES {
        return wrong("later", "is longer than 4,096 bytes");
    }
    out.extend(&later.0);
    Ok(())
}

/// The fields of a record, one after the other.
struct Fields<'a> {
    rest: Reader<'a>,
}

impl<'a> Fields<'a> {
    fn begin(value: &'a [u8]) -> Result<Self, RecordError> {
        let mut rest = Reader::new(value);
        match rest.u8() {
            None => Err(RecordError::Short("version")),
            Some(RECORD_VERSION) => Ok(Self { rest }),
            Some(other) => Err(RecordError::UnsupportedVersion(other)),
        }
    }

    fn need<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&mut Reader<'a>) -> Option<T>,
    ) -> Result<T, RecordError> {
        read(&mut self.rest).ok_or(RecordError::Short(field))
    }

    fn text(&mut self, field: &'static str) -> Result<String, RecordError> {
        let len = self.need(field, Reader::u8)?;
        let bytes = self.need(field, |rest| rest.take(usize::from(len)))?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => wrong(field, "is not UTF-8"),
        }
    }

    fn addr(&mut self) -> Result<SocketAddr, RecordError> {
        let ip: IpAddr = match self.need("addr", Reader::u8)? {
            4 => {
                let bits = self.need("addr", Reader::u32)?;
                Ipv4Addr::from(bits.to_le_bytes()).into()
            }
            6 => {
                let bits = self.need("addr", Reader::u128)?;
                Ipv6Addr::from(bits.to_le_bytes()).into()
            }
            _ => return wrong("addr", "is neither IPv4 nor IPv6"),
        };
        Ok(SocketAddr::new(ip, self.need("addr", Reader::u16)?))
    }

    fn ids(&mut self) -> Result<Vec<u64>, RecordError> {
        let count = self.need("targets", Reader::u8)?;
        if usize::from(count) > MAX_TARGETS {
            return wrong("targets", "names more than 10 nodes");
        }
        let mut ids = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            ids.push(self.need("targets", Reader::u64)?);
        }
        check_ids(&ids)?;
        Ok(ids)
    }

    fn later(mut self) -> Result<Later, RecordError> {
        let len = self.rest.remaining();
        if len > MAX_LATER_BYTES {
            return wrong("later", "is longer than 4,096 bytes");
        }
        Ok(Later(self.need("later", |rest| rest.take(len))?.to_vec()))
    }
}
