//! The cluster map: which slots a shard has, where its replicas are, and who leads it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{MAX_NAME_LEN, MAX_NODES, MAX_REPLICAS, MAX_SHARDS, SLOTS};
use crate::slot::slot_of;
use crate::wire::{take, take_bytes};

/// The map of a cluster at one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Map {
    /// Grows with every change of nodes, slots or replica sets.
    pub epoch: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// The nodes, by ascending id.
    pub nodes: Vec<Node>,
    /// Which shard has which slots: ascending, without gaps, from slot 0 to the last.
    pub ranges: Vec<SlotRange>,
    /// The shards; a shard's place in the list is its number.
    pub shards: Vec<Shard>,
}

/// A node in the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its id, not 0.
    pub id: u64,
    /// Where clients and peers reach it.
    pub addr: SocketAddr,
    /// How many cores it has.
    pub cores: u16,
    /// Whether it serves.
    pub state: NodeState,
}

/// What a node is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum NodeState {
    /// Serving.
    Up = 0,
    /// Not answering.
    Down = 1,
    /// Handing its leaderships over.
    Draining = 2,
}

impl NodeState {
    /// The name, as printed in status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Draining => "draining",
        }
    }

    /// A state that a later minor version added reads as `Down`: a client that cannot tell what a node is doing keeps away.
    const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Up,
            2 => Self::Draining,
            _ => Self::Down,
        }
    }
}

/// A run of slots and the shard that has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRange {
    /// First slot.
    pub first: u16,
    /// Last slot, included.
    pub last: u16,
    /// The shard.
    pub shard: u16,
}

/// A shard in the map.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shard {
    /// Grows with every change of its replica set.
    pub epoch: u32,
    /// Term of the leader below.
    pub term: u64,
    /// Node id of the leader; 0: none is known.
    pub leader: u64,
    /// Its replicas.
    pub replicas: Vec<Replica>,
}

/// A replica of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Replica {
    /// The replica's id, never used again once it is gone.
    pub id: u64,
    /// The node it is on.
    pub node: u64,
    /// The core of that node which owns it.
    pub core: u16,
}

/// Why a map cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The bytes end early or hold a value out of range.
    #[error("the cluster map cannot be read: {0}")]
    Malformed(&'static str),
    /// The slot ranges leave a gap, overlap, or name a shard that does not exist.
    #[error("the cluster map's slot ranges are wrong at slot {slot}")]
    Slots {
        /// The first slot at fault.
        slot: u16,
    },
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MapHead {
    epoch: U32,
    cluster_len: U16,
    nodes: U16,
    ranges: U16,
    shards: U16,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NodeWire {
    id: U64,
    /// IPv4 addresses are mapped into IPv6 (RFC 4291, section 2.5.5.2).
    ip: [u8; 16],
    port: U16,
    cores: U16,
    state: u8,
    reserved: [u8; 3],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RangeWire {
    first: U16,
    last: U16,
    shard: U16,
    reserved: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ShardWire {
    term: U64,
    leader: U64,
    epoch: U32,
    replicas: U16,
    reserved: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ReplicaWire {
    id: U64,
    node: U64,
    core: U16,
    reserved: [u8; 6],
}

/// Most bytes a map takes, with every list at its limit.
pub(crate) const MAX_ENCODED_LEN: usize = size_of::<MapHead>()
    + MAX_NAME_LEN
    + MAX_NODES * size_of::<NodeWire>()
    + SLOTS as usize * size_of::<RangeWire>()
    + MAX_SHARDS * (size_of::<ShardWire>() + MAX_REPLICAS * size_of::<ReplicaWire>());

impl Map {
    /// Slots dealt out in equal runs over `shards` shards, in order; the first ones get one more where they do not divide.
    ///
    /// # Panics
    /// When `shards` is 0 or more than [`MAX_SHARDS`].
    pub fn even_ranges(shards: u16) -> Vec<SlotRange> {
        assert!(
            (1..=MAX_SHARDS).contains(&usize::from(shards)),
            "1 to {MAX_SHARDS} shards, not {shards}"
        );
        let (each, more) = (SLOTS / shards, SLOTS % shards);
        let mut first = 0;
        (0..shards)
            .map(|shard| {
                let last = first + each - 1 + u16::from(shard < more);
                let range = SlotRange { first, last, shard };
                first = last + 1;
                range
            })
            .collect()
    }

    /// Appends the map, as the body of the reply to `Map`.
    ///
    /// # Panics
    /// When a list is longer than its limit in [`crate::limits`].
    pub fn encode(&self, out: &mut BytesMut) {
        let head = MapHead {
            epoch: U32::new(self.epoch),
            cluster_len: U16::new(list_len(self.cluster.len())),
            nodes: U16::new(list_len(self.nodes.len())),
            ranges: U16::new(list_len(self.ranges.len())),
            shards: U16::new(list_len(self.shards.len())),
            reserved: U32::ZERO,
        };
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.cluster.as_bytes());
        for node in &self.nodes {
            let ip = match node.addr.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            let wire = NodeWire {
                id: U64::new(node.id),
                ip: ip.octets(),
                port: U16::new(node.addr.port()),
                cores: U16::new(node.cores),
                state: node.state as u8,
                reserved: [0; 3],
            };
            out.extend_from_slice(wire.as_bytes());
        }
        for range in &self.ranges {
            let wire = RangeWire {
                first: U16::new(range.first),
                last: U16::new(range.last),
                shard: U16::new(range.shard),
                reserved: U16::ZERO,
            };
            out.extend_from_slice(wire.as_bytes());
        }
        for shard in &self.shards {
            let wire = ShardWire {
                term: U64::new(shard.term),
                leader: U64::new(shard.leader),
                epoch: U32::new(shard.epoch),
                replicas: U16::new(list_len(shard.replicas.len())),
                reserved: U16::ZERO,
            };
            out.extend_from_slice(wire.as_bytes());
            for replica in &shard.replicas {
                let wire = ReplicaWire {
                    id: U64::new(replica.id),
                    node: U64::new(replica.node),
                    core: U16::new(replica.core),
                    reserved: [0; 6],
                };
                out.extend_from_slice(wire.as_bytes());
            }
        }
    }

    /// Reads a map and validates it: a map that is `Ok` routes every key to a shard that exists. What a later minor version
    /// appended is skipped.
    pub fn decode(bytes: &[u8]) -> Result<Self, MapError> {
        const CUT: MapError = MapError::Malformed("it ends early");
        let mut rest = bytes;
        let head: &MapHead = take(&mut rest).ok_or(CUT)?;
        if usize::from(head.nodes.get()) > MAX_NODES || usize::from(head.shards.get()) > MAX_SHARDS {
            return Err(MapError::Malformed("too many nodes or shards"));
        }
        if head.ranges.get() > SLOTS {
            return Err(MapError::Malformed("more ranges than slots"));
        }
        if usize::from(head.cluster_len.get()) > MAX_NAME_LEN {
            return Err(MapError::Malformed("the cluster's name is too long"));
        }
        let cluster = take_bytes(&mut rest, usize::from(head.cluster_len.get())).ok_or(CUT)?;
        let cluster =
            std::str::from_utf8(cluster).map_err(|_| MapError::Malformed("the cluster's name is not UTF-8"))?;
        let mut map = Self {
            epoch: head.epoch.get(),
            cluster: cluster.to_owned(),
            ..Self::default()
        };
        for _ in 0..head.nodes.get() {
            let wire: &NodeWire = take(&mut rest).ok_or(CUT)?;
            map.nodes.push(Node {
                id: wire.id.get(),
                addr: SocketAddr::new(Ipv6Addr::from(wire.ip).to_canonical(), wire.port.get()),
                cores: wire.cores.get(),
                state: NodeState::from_code(wire.state),
            });
        }
        for _ in 0..head.ranges.get() {
            let wire: &RangeWire = take(&mut rest).ok_or(CUT)?;
            map.ranges.push(SlotRange {
                first: wire.first.get(),
                last: wire.last.get(),
                shard: wire.shard.get(),
            });
        }
        for _ in 0..head.shards.get() {
            let wire: &ShardWire = take(&mut rest).ok_or(CUT)?;
            if usize::from(wire.replicas.get()) > MAX_REPLICAS {
                return Err(MapError::Malformed("too many replicas of a shard"));
            }
            let mut shard = Shard {
                epoch: wire.epoch.get(),
                term: wire.term.get(),
                leader: wire.leader.get(),
                replicas: Vec::new(),
            };
            for _ in 0..wire.replicas.get() {
                let wire: &ReplicaWire = take(&mut rest).ok_or(CUT)?;
                shard.replicas.push(Replica {
                    id: wire.id.get(),
                    node: wire.node.get(),
                    core: wire.core.get(),
                });
            }
            map.shards.push(shard);
        }
        SlotTable::new(&map.ranges, map.shards.len())?;
        Ok(map)
    }

    /// The node of an id.
    pub fn node(&self, id: u64) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }
}

/// Slot to shard: a shift where the slots are dealt out evenly, otherwise one load a key, of a table as large as a first-level cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotTable {
    shards: Box<[u16]>,
    /// Every slot's shard is the slot shifted by this.
    shift: Option<u32>,
}

impl SlotTable {
    /// Lays `ranges` out, for a cluster of `shards` shards. The ranges must be ascending, cover every slot once, and name
    /// shards that exist.
    pub fn new(ranges: &[SlotRange], shards: usize) -> Result<Self, MapError> {
        let mut table = Vec::with_capacity(usize::from(SLOTS));
        for range in ranges {
            let expected = table.len();
            if usize::from(range.first) != expected
                || range.last < range.first
                || range.last >= SLOTS
                || usize::from(range.shard) >= shards
            {
                return Err(MapError::Slots {
                    slot: expected.min(usize::from(SLOTS - 1)) as u16,
                });
            }
            table.resize(usize::from(range.last) + 1, range.shard);
        }
        if table.len() != usize::from(SLOTS) {
            return Err(MapError::Slots {
                slot: table.len() as u16,
            });
        }
        let shift =
            (0..=SLOTS.ilog2()).find(|shift| (0..SLOTS).zip(&table).all(|(slot, &shard)| slot >> shift == shard));
        Ok(Self {
            shards: table.into_boxed_slice(),
            shift,
        })
    }

    /// The shard that `key` belongs to.
    #[inline]
    pub fn shard_of(&self, key: &[u8]) -> u16 {
        let slot = slot_of(key);
        match self.shift {
            Some(shift) => slot >> shift,
            None => self.shards[usize::from(slot)],
        }
    }
}

fn list_len(len: usize) -> u16 {
    u16::try_from(len).expect("invariant: lists and names in a map below 65,536 by limits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_ranges_cover_every_slot() {
        for shards in [1, 2, 3, 7, 16, 4096] {
            let ranges = Map::even_ranges(shards);
            let table = SlotTable::new(&ranges, usize::from(shards)).unwrap();
            let sizes: Vec<u16> = ranges.iter().map(|range| range.last - range.first + 1).collect();
            assert!(
                sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1,
                "{shards} shards are uneven"
            );
            assert_eq!(table.shards[0], 0);
            assert_eq!(table.shards[usize::from(SLOTS) - 1], shards - 1);
            assert_eq!(table.shift.is_some(), shards.is_power_of_two());
            for key in (0..1_000_u32).map(u32::to_le_bytes) {
                assert_eq!(table.shard_of(&key), table.shards[usize::from(slot_of(&key))]);
            }
        }
    }

    #[test]
    fn a_table_with_a_gap_an_overlap_or_a_foreign_shard_is_refused() {
        let range = |first, last, shard| SlotRange { first, last, shard };
        let last = SLOTS - 1;
        assert_eq!(SlotTable::new(&[], 1), Err(MapError::Slots { slot: 0 }));
        assert_eq!(
            SlotTable::new(&[range(0, 9, 0), range(11, last, 0)], 1),
            Err(MapError::Slots { slot: 10 })
        );
        assert_eq!(
            SlotTable::new(&[range(0, 9, 0), range(9, last, 0)], 1),
            Err(MapError::Slots { slot: 10 })
        );
        assert_eq!(
            SlotTable::new(&[range(0, last, 1)], 1),
            Err(MapError::Slots { slot: 0 })
        );
        assert_eq!(SlotTable::new(&[range(0, 9, 0)], 1), Err(MapError::Slots { slot: 10 }));
        assert_eq!(
            SlotTable::new(&[range(0, SLOTS, 0)], 1),
            Err(MapError::Slots { slot: 0 })
        );
    }
}
