//! What a node tells, as keys and values of chitchat: short keys, and texts that hold packed bytes.
//!
//! ```text
//! l0, l1, …   what core 0, 1, … leads: base64 of 1, then for each shard, ascending: distance from the one before (the first: the
//!             shard itself), epoch, term, all LEB128
//! v           version of the cluster's records, decimal
//! d           load: thousandths of time, thousandths of memory, connections, decimal, between commas
//! p           place: address, a comma, the zone
//! r           release
//! ```
//! What cannot be read is passed over: it comes from a newer release, or says nothing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use generation_node::env::CoreId;
use generation_node::gossip::{Fact, LeaderHint, Load, MAX_LEADS_PER_CORE, Place};

/// Format of packed hints.
const HINTS_FORMAT: u8 = 1;

/// Longest zone or release that is told, in bytes. What is longer is cut off.
const MAX_TEXT_BYTES: usize = 128;

/// Most bytes of a packed hint: a distance, an epoch and a term.
const MAX_HINT_BYTES: usize = 3 + 5 + 10;

// chitchat writes lengths as u16 and cuts what is longer without a word; and one value must fit into a message beside a digest.
const _: () = assert!((1 + MAX_LEADS_PER_CORE * MAX_HINT_BYTES) * 4 / 3 + 4 < 32 << 10);

/// The key and the value of a fact.
pub(super) fn encode(fact: &Fact) -> (String, String) {
    match fact {
        Fact::Leaders { core, leads } => (format!("l{core}"), STANDARD_NO_PAD.encode(pack(leads))),
        Fact::RecordsVersion(version) => ("v".into(), version.to_string()),
        Fact::Load(load) => (
            "d".into(),
            format!("{},{},{}", load.busy_permille, load.memory_permille, load.connections),
        ),
        Fact::Place(Place { addr, zone }) => ("p".into(), format!("{addr},{}", cut(zone))),
        Fact::Release(release) => ("r".into(), cut(release).to_owned()),
    }
}

/// The fact of a key and its value, if it is one.
pub(super) fn decode(key: &str, value: &str) -> Option<Fact> {
    match key {
        "v" => value.parse().ok().map(Fact::RecordsVersion),
        "d" => {
            let mut numbers = value.split(',');
            let (busy, memory, connections) = (numbers.next()?, numbers.next()?, numbers.next()?);
            Some(Fact::Load(Load {
                busy_permille: busy.parse().ok()?,
                memory_permille: memory.parse().ok()?,
                connections: connections.parse().ok()?,
            }))
        }
        "p" => {
            let (addr, zone) = value.split_once(',')?;
            let (addr, zone) = (addr.parse().ok()?, cut(zone).to_owned());
            Some(Fact::Place(Place { addr, zone }))
        }
        "r" => Some(Fact::Release(cut(value).to_owned())),
        _ => {
            let core = key.strip_prefix('l')?;
            let number: CoreId = core.parse().ok()?;
            // One text for each core.
            if number.to_string() != core {
                return None;
            }
            let leads = unpack(&STANDARD_NO_PAD.decode(value).ok()?)?;
            Some(Fact::Leaders { core: number, leads })
        }
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

fn pack(leads: &[LeaderHint]) -> Vec<u8> {
    let mut leads = leads.to_vec();
    // Stable: of a shard that is there twice the first counts.
    leads.sort_by_key(|hint| hint.shard);
    leads.dedup_by_key(|hint| hint.shard);
    leads.truncate(MAX_LEADS_PER_CORE);
    let mut packed = vec![HINTS_FORMAT];
    let mut before = 0;
    for LeaderHint { shard, epoch, term } in leads {
        for number in [u64::from(shard - before), u64::from(epoch), term] {
            put(&mut packed, number);
        }
        before = shard;
    }
    packed
}

fn unpack(packed: &[u8]) -> Option<Vec<LeaderHint>> {
    let (&HINTS_FORMAT, mut rest) = packed.split_first()? else {
        return None;
    };
    let mut leads: Vec<LeaderHint> = Vec::new();
    while !rest.is_empty() {
        let (distance, epoch, term) = (get(&mut rest)?, get(&mut rest)?, get(&mut rest)?);
        let before = leads.last().map(|hint| hint.shard);
        // Only the first may be at no distance.
        if leads.len() == MAX_LEADS_PER_CORE || (before.is_some() && distance == 0) {
            return None;
        }
        leads.push(LeaderHint {
            shard: u16::try_from(distance).ok()?.checked_add(before.unwrap_or(0))?,
            epoch: u32::try_from(epoch).ok()?,
            term,
        });
    }
    Some(leads)
}

/// Appends a number as LEB128.
fn put(packed: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        packed.push(number as u8 | 0x80);
        number >>= 7;
    }
    packed.push(number as u8);
}

/// Takes a number written by [`put`]; `None` if there is none, or if it is more than 64 bits.
fn get(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, left) = rest.split_first()?;
        *rest = left;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hint() -> impl Strategy<Value = LeaderHint> {
        (any::<u16>(), any::<u32>(), any::<u64>()).prop_map(|(shard, epoch, term)| LeaderHint { shard, epoch, term })
    }

    proptest! {
        #[test]
        fn hints_survive_packing(mut leads in prop::collection::vec(hint(), 0..100), core in 0_u16..256) {
            let (key, value) = encode(&Fact::Leaders { core, leads: leads.clone() });
            leads.sort_by_key(|hint| hint.shard);
            leads.dedup_by_key(|hint| hint.shard);
            prop_assert_eq!(decode(&key, &value), Some(Fact::Leaders { core, leads }));
        }

        #[test]
        fn no_text_is_more_than_passed_over(key in "[lvdpr]?[0-9]{0,6}|.{0,4}", value in ".{0,40}", packed in prop::collection::vec(any::<u8>(), 0..60)) {
            decode(&key, &value);
            if let Some(leads) = unpack(&packed) {
                prop_assert_eq!(unpack(&pack(&leads)), Some(leads));
            }
        }
    }

    #[test]
    fn every_fact_survives_its_text() {
        let place = |addr: &str, zone: &str| {
            Fact::Place(Place {
                addr: addr.parse().unwrap(),
                zone: zone.into(),
            })
        };
        for fact in [
            Fact::Leaders {
                core: 0,
                leads: Vec::new(),
            },
            Fact::RecordsVersion(u64::MAX),
            Fact::Load(Load {
                busy_permille: 1000,
                memory_permille: 7,
                connections: u32::MAX,
            }),
            place("10.0.0.1:7400", ""),
            place("[2001:db8::1]:7400", "eu-west-1a"),
            place("10.0.0.1:7400", "a,b"),
            Fact::Release("generation 0.1.0".into()),
        ] {
            let (key, value) = encode(&fact);
            assert_eq!(decode(&key, &value), Some(fact));
        }
    }

    #[test]
    fn sixteen_shards_of_a_young_cluster_take_few_bytes() {
        let leads = (0..16).map(|shard| LeaderHint {
            shard,
            epoch: 1,
            term: 3,
        });
        let (_, value) = encode(&Fact::Leaders {
            core: 0,
            leads: leads.collect(),
        });
        assert!(value.len() <= 66, "{} bytes", value.len());
    }

    #[test]
    fn what_is_too_long_is_cut_and_nothing_else_is_said() {
        let leads = |count: u16| Fact::Leaders {
            core: 0,
            leads: (0..count)
                .map(|shard| LeaderHint {
                    shard,
                    epoch: u32::MAX,
                    term: u64::MAX,
                })
                .collect(),
        };
        let (key, value) = encode(&leads(4_096));
        assert_eq!(decode(&key, &value), Some(leads(MAX_LEADS_PER_CORE as u16)));
        let (_, release) = encode(&Fact::Release("ä".repeat(100)));
        assert_eq!(release, "ä".repeat(64));
        for (key, value) in [
            ("l01", "AQ"),
            ("l70000", "AQ"),
            ("l0", "Ag"),
            ("l0", ""),
            ("l0", "AQE"),
            ("v", "-1"),
            ("d", "1,2"),
            ("p", "nowhere,z"),
            ("x", "1"),
            ("", ""),
        ] {
            assert_eq!(decode(key, value), None, "{key} = {value}");
        }
    }
}
