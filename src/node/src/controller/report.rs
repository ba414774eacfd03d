//! What a node tells the others of itself and of the shards it leads, byte by byte.
//!
//! Hints: whoever reads one takes it for what was so a moment ago. Numbers are little-endian.
//! ```text
//!  0  u64  version of the records the node knows
//!  8  ids  the nodes it hears nothing of
//!     u16  shards it leads; for each
//!          u16 shard, u64 term, u64 bytes, u8 1 while the members are changing, ids of the nodes that vote, ids of those that do not yet
//!          (ids: u8 count, then u64 each)
//! ```

use std::collections::BTreeSet;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// A shard as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Led {
    /// The shard, or [the controller](crate::view::CONTROLLER).
    pub shard: u16,
    /// The term it is led in.
    pub term: u64,
    /// What its entries take, roughly.
    pub bytes: u64,
    /// Whether its members are changing.
    pub changing: bool,
    /// The nodes whose replicas vote.
    pub voters: BTreeSet<u64>,
    /// The nodes whose replicas do not vote yet.
    pub learners: BTreeSet<u64>,
}

/// What a node says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) records: u64,
    pub(crate) silent: BTreeSet<u64>,
    pub(crate) led: Vec<Led>,
}

fn put_ids(out: &mut BytesMut, ids: &BTreeSet<u64>) {
    let count = ids.len().min(usize::from(u8::MAX));
    out.put_u8(count as u8);
    ids.iter().take(count).for_each(|id| out.put_u64_le(*id));
}

fn ids(from: &mut Bytes) -> Option<BTreeSet<u64>> {
    let count = from.try_get_u8().ok()?;
    (0..count).map(|_| from.try_get_u64_le().ok()).collect()
}

impl Report {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u64_le(self.records);
        put_ids(&mut out, &self.silent);
        let count = self.led.len().min(usize::from(u16::MAX));
        out.put_u16_le(count as u16);
        for led in self.led.iter().take(count) {
            out.put_u16_le(led.shard);
            out.put_u64_le(led.term);
            out.put_u64_le(led.bytes);
            out.put_u8(u8::from(led.changing));
            put_ids(&mut out, &led.voters);
            put_ids(&mut out, &led.learners);
        }
        out.freeze()
    }

    /// `None`: malformed.
    pub(crate) fn decode(mut bytes: Bytes) -> Option<Self> {
        let records = bytes.try_get_u64_le().ok()?;
        let silent = ids(&mut bytes)?;
        let count = bytes.try_get_u16_le().ok()?;
        let led = |bytes: &mut Bytes| {
            Some(Led {
                shard: bytes.try_get_u16_le().ok()?,
                term: bytes.try_get_u64_le().ok()?,
                bytes: bytes.try_get_u64_le().ok()?,
                changing: bytes.try_get_u8().ok()? != 0,
                voters: ids(bytes)?,
                learners: ids(bytes)?,
            })
        };
        let led = (0..count).map(|_| led(&mut bytes)).collect::<Option<_>>()?;
        Some(Self { records, silent, led })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood_and_nothing_shorter_is() {
        let report = Report {
            records: 7 << 16,
            silent: [5, 6].into(),
            led: vec![
                Led {
                    shard: 3,
                    term: 9,
                    bytes: 1 << 40,
                    changing: true,
                    voters: [1, 2, u64::MAX].into(),
                    learners: [4].into(),
                },
                Led {
                    shard: crate::view::CONTROLLER,
                    term: 1,
                    bytes: 0,
                    changing: false,
                    voters: BTreeSet::new(),
                    learners: BTreeSet::new(),
                },
            ],
        };
        let bytes = report.encode();
        assert_eq!(Report::decode(bytes.clone()), Some(report));
        for len in 0..bytes.len() {
            assert_eq!(Report::decode(bytes.slice(..len)), None, "cut at {len}");
        }
    }
}
