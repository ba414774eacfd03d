//! Sealing and opening gossip datagrams: AES-256-GCM under keys derived from the cluster's, and a guard against replays. No I/O.
//!
//! ```text
//! 0  format (1)        1  index of the part   2  number of parts   3  id of the key, u16
//! 5  sender, u64       13 its start (generation), u64              21 salt of the start, u64
//! 29 sequence, u64     37 the sender's clock, ms since 1970, u64   45 the part, encrypted       end-16 tag
//! ```
//! All little endian. The header and the cluster's name are the associated data, so a datagram of another cluster, format or key, or one
//! whose header was touched, does not open.
//!
//! # Nonces
//! Every start of every sender seals with a key of its own, derived (HKDF-SHA256, RFC 5869) from the cluster's key by cluster, sender,
//! generation and 64 random bits, and counts its datagrams: the counter is the nonce. Random nonces under the one key that all nodes
//! share would be used up: 2^32 datagrams, two weeks of thirty nodes, and a nonce that GCM sees twice gives the key away.
//!
//! # What the guard covers
//! A datagram is taken once, and only within [`CLOCK_TOLERANCE_MS`] of the receiver's clock; a start that another has followed is not
//! heard any more. Not covered: a receiver that did not get a datagram, because it was for another node or because the receiver started
//! less than the tolerance ago, takes a recording of it within the tolerance. It is a true message then, at most that old, and what
//! chitchat makes of it is versioned: a heartbeat counts if it is newer than the last. Whoever holds a key can say anything.
//! The address that answers go to is in the sealed part, so that a replay from another address makes nobody send there.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::Prk;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::keys::KeyRing;
use super::parts::{Assembly, MAX_MESSAGE_BYTES, Part};
use super::replay::ReplayWindow;

/// The format of datagrams.
const FORMAT: u8 = 1;

/// Longest datagram, in bytes: every path of IPv6 carries it whole, as QUIC's shortest.
pub(super) const DATAGRAM_BYTES: usize = 1_200;

/// Bytes of the tag.
const TAG_BYTES: usize = 16;

/// Bytes of a message that one datagram carries.
pub(super) const PART_BYTES: usize = DATAGRAM_BYTES - size_of::<Header>() - TAG_BYTES;

/// How far the sender's clock may be from the receiver's, in milliseconds.
pub(super) const CLOCK_TOLERANCE_MS: u64 = 30_000;

/// How long a sender must be silent before its start is forgotten, in milliseconds. Whatever was recorded of it before is out of the
/// tolerance by then: it was sent at most one tolerance ahead of the receiver's clock.
const FORGET_MS: u64 = 2 * CLOCK_TOLERANCE_MS + 1_000;

/// Most senders that are remembered. Only holders of a key become one.
const MAX_SENDERS: usize = 4_096;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    format: u8,
    part: u8,
    parts: u8,
    key: U16,
    sender: U64,
    generation: U64,
    salt: U64,
    sequence: U64,
    unix_ms: U64,
}

/// A start of a node, as datagrams name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Start {
    /// The node.
    pub(super) node: u64,
    /// Grows with each start.
    pub(super) generation: u64,
    /// Random: two starts of one generation, after a clock was set back, do not share a key.
    pub(super) salt: u64,
}

/// Why a datagram was not taken. Nothing was changed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is no datagram of ours: too short, or of another format.
    #[error("it is no gossip of this format")]
    Format,
    /// Its sender claims to be this node: a reflection, or a second process with this node's id.
    #[error("it claims to come from this node")]
    Own,
    /// The sender's clock and this node's are too far apart, or it is an old recording.
    #[error("the sender's clock is more than 30 s from this one's")]
    Clock,
    /// Another start of the sender has followed.
    #[error("the sender has started again since")]
    Stale,
    /// It was there before, or is too old to tell.
    #[error("it was there before")]
    Replayed,
    /// It was sealed with a key that is not in the file.
    #[error("it was sealed with a key that this node does not have")]
    UnknownKey,
    /// It was not sealed with the cluster's key, or was changed on its way.
    #[error("it does not open: it was forged or damaged, or is of another cluster")]
    Forged,
    /// It opens, and makes no sense.
    #[error("its content makes no sense")]
    Malformed,
    /// There are too many senders.
    #[error("there are too many senders")]
    Crowded,
}

impl Refusal {
    /// All there are.
    pub const ALL: [Self; 9] = [
        Self::Format,
        Self::Own,
        Self::Clock,
        Self::Stale,
        Self::Replayed,
        Self::UnknownKey,
        Self::Forged,
        Self::Malformed,
        Self::Crowded,
    ];

    /// Its name, as statistics have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Own => "own",
            Self::Clock => "clock",
            Self::Stale => "stale",
            Self::Replayed => "replayed",
            Self::UnknownKey => "unknown_key",
            Self::Forged => "forged",
            Self::Malformed => "malformed",
            Self::Crowded => "crowded",
        }
    }
}

/// The key of a start, derived from a key of the ring.
fn derive(extracted: &Prk, cluster: &str, start: Start) -> LessSafeKey {
    let (len, name) = ((cluster.len() as u64).to_le_bytes(), cluster.as_bytes());
    let (node, generation, salt) = (
        start.node.to_le_bytes(),
        start.generation.to_le_bytes(),
        start.salt.to_le_bytes(),
    );
    let info = [&len[..], name, &node, &generation, &salt];
    let derived = extracted
        .expand(&info, &AES_256_GCM)
        .expect("invariant: a key is shorter than what HKDF can make");
    LessSafeKey::new(UnboundKey::from(derived))
}

fn nonce(sequence: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - 8..].copy_from_slice(&sequence.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn associated(header: &Header, cluster: &str) -> Aad<Vec<u8>> {
    Aad::from([header.as_bytes(), cluster.as_bytes()].concat())
}

/// Seals what one start of a node sends.
pub(super) struct Sealer {
    cluster: String,
    start: Start,
    /// Written in front of each message.
    addr: Vec<u8>,
    /// Of the last datagram.
    sequence: u64,
    /// The ring it was derived from, the key's id there, and the key.
    key: Option<(Arc<KeyRing>, u16, LessSafeKey)>,
}

/// A message does not fit into the parts it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

impl Sealer {
    /// For a start that answers are sent to at `addr`.
    pub(super) fn new(cluster: String, start: Start, addr: SocketAddr) -> Self {
        let mut bytes = Vec::new();
        match addr.ip() {
            IpAddr::V4(ip) => {
                bytes.push(4);
                bytes.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                bytes.push(6);
                bytes.extend(ip.octets());
            }
        }
        bytes.extend(addr.port().to_le_bytes());
        Self {
            cluster,
            start,
            addr: bytes,
            sequence: 0,
            key: None,
        }
    }

    /// Seals a message. `datagrams` holds the datagrams afterwards, each of [`DATAGRAM_BYTES`] but the last.
    pub(super) fn seal(
        &mut self,
        ring: &Arc<KeyRing>,
        unix_ms: u64,
        message: &[u8],
        datagrams: &mut Vec<u8>,
    ) -> Result<(), TooLong> {
        datagrams.clear();
        if self.addr.len() + message.len() > MAX_MESSAGE_BYTES {
            return Err(TooLong);
        }
        let (cluster, start) = (self.cluster.as_str(), self.start);
        let current = self.key.take().filter(|(of, _, _)| Arc::ptr_eq(of, ring));
        let (_, id, key) = self.key.insert(current.unwrap_or_else(|| {
            let (id, extracted) = ring.sealing();
            (Arc::clone(ring), id, derive(extracted, cluster, start))
        }));
        let whole = [&self.addr[..], message].concat();
        let parts = whole.len().div_ceil(PART_BYTES);
        for (part, bytes) in whole.chunks(PART_BYTES).enumerate() {
            self.sequence += 1;
            let header = Header {
                format: FORMAT,
                part: part as u8,
                parts: parts as u8,
                key: U16::new(*id),
                sender: U64::new(start.node),
                generation: U64::new(start.generation),
                salt: U64::new(start.salt),
                sequence: U64::new(self.sequence),
                unix_ms: U64::new(unix_ms),
            };
            datagrams.extend_from_slice(header.as_bytes());
            let begin = datagrams.len();
            datagrams.extend_from_slice(bytes);
            let tag = key
                .seal_in_place_separate_tag(
                    nonce(self.sequence),
                    associated(&header, cluster),
                    &mut datagrams[begin..],
                )
                .expect("invariant: a part is shorter than what GCM can seal");
            datagrams.extend_from_slice(tag.as_ref());
        }
        Ok(())
    }
}

/// What a sender's current start has sent.
struct Sender {
    generation: u64,
    salt: u64,
    window: ReplayWindow,
    /// Derived from keys of the ring, by their ids.
    keys: Vec<(u16, LessSafeKey)>,
    /// When it was heard last, by this node's clock.
    heard_unix_ms: u64,
    unfinished: Option<Assembly>,
}

/// Opens what other nodes send.
pub(super) struct Opener {
    cluster: String,
    /// This node.
    node: u64,
    ring: Option<Arc<KeyRing>>,
    senders: BTreeMap<u64, Sender>,
}

/// A message, and where answers to it go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened<'a> {
    /// The sender's address, as it said itself.
    pub(super) from: SocketAddr,
    /// The message.
    pub(super) message: Cow<'a, [u8]>,
}

impl Opener {
    /// For what node `node` of a cluster receives.
    pub(super) fn new(cluster: String, node: u64) -> Self {
        Self {
            cluster,
            node,
            ring: None,
            senders: BTreeMap::new(),
        }
    }

    /// Opens a datagram. `None`: it is a part of a message that is not complete.
    pub(super) fn open<'a>(
        &mut self,
        ring: &Arc<KeyRing>,
        unix_ms: u64,
        datagram: &'a mut [u8],
    ) -> Result<Option<Opened<'a>>, Refusal> {
        if !self.ring.as_ref().is_some_and(|current| Arc::ptr_eq(current, ring)) {
            // An id may stand for another key now.
            self.senders.values_mut().for_each(|sender| sender.keys.clear());
            self.ring = Some(Arc::clone(ring));
        }
        let (header, sealed) = Header::mut_from_prefix(datagram).map_err(|_| Refusal::Format)?;
        let header = *header;
        let sequence = header.sequence.get();
        let part = Part {
            index: header.part,
            count: header.parts,
            sequence,
        };
        let part_len = sealed.len().checked_sub(TAG_BYTES).ok_or(Refusal::Format)?;
        if header.format != FORMAT || !part.is_possible(part_len) {
            return Err(Refusal::Format);
        }
        let start = Start {
            node: header.sender.get(),
            generation: header.generation.get(),
            salt: header.salt.get(),
        };
        if start.node == self.node {
            return Err(Refusal::Own);
        }
        if header.unix_ms.get().abs_diff(unix_ms) > CLOCK_TOLERANCE_MS {
            return Err(Refusal::Clock);
        }
        let extracted = ring.opening(header.key.get()).ok_or(Refusal::UnknownKey)?;
        // What is known of the sender, if the datagram is of the start that is known.
        let known = match self.senders.get_mut(&start.node) {
            Some(sender) if (sender.generation, sender.salt) == (start.generation, start.salt) => Some(sender),
            Some(sender)
                if start.generation <= sender.generation
                    && unix_ms.saturating_sub(sender.heard_unix_ms) <= FORGET_MS =>
            {
                return Err(Refusal::Stale);
            }
            _ => None,
        };
        if known.as_ref().is_some_and(|sender| !sender.window.is_new(sequence)) {
            return Err(Refusal::Replayed);
        }
        let id = header.key.get();
        let cached = known
            .as_ref()
            .and_then(|sender| sender.keys.iter().find(|(of, _)| *of == id));
        let derived;
        let key = if let Some((_, key)) = cached {
            derived = None;
            key
        } else {
            derived = Some(derive(extracted, &self.cluster, start));
            derived.as_ref().expect("invariant: derived just now")
        };
        let opened: &'a mut [u8] = key
            .open_in_place(nonce(sequence), associated(&header, &self.cluster), sealed)
            .map_err(|_| Refusal::Forged)?;
        // It is authentic from here on.
        let sender = self.sender(start, unix_ms)?;
        sender.window.see(sequence);
        sender.heard_unix_ms = unix_ms;
        if let Some(key) = derived {
            sender.keys.push((id, key));
        }
        let whole: Cow<'a, [u8]> = if part.count == 1 {
            Cow::Borrowed(opened)
        } else {
            match Assembly::add(&mut sender.unfinished, part, opened) {
                Some(whole) => Cow::Owned(whole),
                None => return Ok(None),
            }
        };
        let (from, at) = address(&whole).ok_or(Refusal::Malformed)?;
        let message = match whole {
            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[at..]),
            Cow::Owned(mut bytes) => Cow::Owned(bytes.split_off(at)),
        };
        Ok(Some(Opened { from, message }))
    }

    /// The memory of an authentic start: a new one where it is not known yet.
    fn sender(&mut self, start: Start, unix_ms: u64) -> Result<&mut Sender, Refusal> {
        let is_known = |sender: &Sender| (sender.generation, sender.salt) == (start.generation, start.salt);
        if !self.senders.get(&start.node).is_some_and(is_known) {
            if self.senders.len() >= MAX_SENDERS && !self.senders.contains_key(&start.node) {
                self.senders
                    .retain(|_, sender| unix_ms.saturating_sub(sender.heard_unix_ms) <= FORGET_MS);
                if self.senders.len() >= MAX_SENDERS {
                    return Err(Refusal::Crowded);
                }
            }
            self.senders.insert(
                start.node,
                Sender {
                    generation: start.generation,
                    salt: start.salt,
                    window: ReplayWindow::new(),
                    keys: Vec::new(),
                    heard_unix_ms: unix_ms,
                    unfinished: None,
                },
            );
        }
        Ok(self
            .senders
            .get_mut(&start.node)
            .expect("invariant: it is there or was put there"))
    }
}

/// The address in front of a message, and where the message begins.
fn address(bytes: &[u8]) -> Option<(SocketAddr, usize)> {
    let (&family, rest) = bytes.split_first()?;
    let (ip, rest): (IpAddr, &[u8]) = match family {
        4 => rest
            .split_first_chunk::<4>()
            .map(|(ip, rest)| (IpAddr::from(*ip), rest))?,
        6 => rest
            .split_first_chunk::<16>()
            .map(|(ip, rest)| (IpAddr::from(*ip), rest))?,
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let addr = SocketAddr::new(ip, u16::from_le_bytes(*port));
    Some((addr, bytes.len() - rest.len()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const NOW: u64 = 1_700_000_000_000;

    fn ring(keys: &[(u16, u8)]) -> Arc<KeyRing> {
        let line = |(id, byte): &(u16, u8)| format!("{id}: {}", format!("{byte:02x}").repeat(32));
        let lines: Vec<String> = keys.iter().map(line).collect();
        Arc::new(KeyRing::parse(Path::new("keys"), &lines.join("\n")).unwrap())
    }

    fn start(node: u64, generation: u64) -> Start {
        Start {
            node,
            generation,
            salt: 7,
        }
    }

    fn addr() -> SocketAddr {
        "10.0.0.1:17400".parse().unwrap()
    }

    fn sealer(cluster: &str, start: Start) -> Sealer {
        Sealer::new(cluster.into(), start, addr())
    }

    fn seal(sealer: &mut Sealer, ring: &Arc<KeyRing>, message: &[u8]) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        sealer.seal(ring, NOW, message, &mut datagrams).unwrap();
        datagrams.chunks(DATAGRAM_BYTES).map(<[u8]>::to_vec).collect()
    }

    fn one(sealer: &mut Sealer, ring: &Arc<KeyRing>, message: &[u8]) -> Vec<u8> {
        let mut datagrams = seal(sealer, ring, message);
        assert_eq!(datagrams.len(), 1);
        datagrams.remove(0)
    }

    fn open_at(
        opener: &mut Opener,
        ring: &Arc<KeyRing>,
        unix_ms: u64,
        datagram: &[u8],
    ) -> Result<Option<Vec<u8>>, Refusal> {
        let mut datagram = datagram.to_vec();
        let message = opener.open(ring, unix_ms, &mut datagram)?;
        Ok(message.map(|Opened { from, message }| {
            assert_eq!(from, addr());
            message.into_owned()
        }))
    }

    fn open(opener: &mut Opener, ring: &Arc<KeyRing>, datagram: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
        open_at(opener, ring, NOW, datagram)
    }

    #[test]
    fn a_refusal_is_counted_at_its_place() {
        for (place, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, place);
        }
    }

    #[test]
    fn what_was_sealed_opens_once_whatever_its_length() {
        let ring = ring(&[(1, 1)]);
        let (mut sealer, mut opener) = (sealer("c", start(1, 5)), Opener::new("c".into(), 2));
        for len in [
            0,
            1,
            1_000,
            PART_BYTES - 7,
            PART_BYTES - 6,
            65_507,
            MAX_MESSAGE_BYTES - 7,
        ] {
            let message: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let datagrams = seal(&mut sealer, &ring, &message);
            assert!(datagrams.iter().all(|datagram| datagram.len() <= DATAGRAM_BYTES));
            let (last, others) = datagrams.split_last().unwrap();
            for datagram in others {
                assert_eq!(open(&mut opener, &ring, datagram), Ok(None));
            }
            assert_eq!(open(&mut opener, &ring, last), Ok(Some(message)));
            for datagram in &datagrams {
                assert_eq!(open(&mut opener, &ring, datagram), Err(Refusal::Replayed));
            }
        }
        let too_long = vec![0; MAX_MESSAGE_BYTES - 6];
        assert_eq!(sealer.seal(&ring, NOW, &too_long, &mut Vec::new()), Err(TooLong));
    }

    #[test]
    fn no_bit_can_be_changed_and_nothing_cut_off() {
        let ring = ring(&[(1, 1), (2, 2)]);
        let (mut sealer, mut opener) = (sealer("c", start(1, 5)), Opener::new("c".into(), 2));
        let good = one(&mut sealer, &ring, b"hello");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let refused = open(&mut opener, &ring, &bad);
            assert!(refused.is_err(), "bit {bit}: {refused:?}");
        }
        for len in 0..good.len() {
            assert!(open(&mut opener, &ring, &good[..len]).is_err(), "{len} bytes");
        }
        let longer = [&good[..], &[0]].concat();
        assert_eq!(open(&mut opener, &ring, &longer), Err(Refusal::Forged));
        // None of that has moved anything.
        assert_eq!(open(&mut opener, &ring, &good), Ok(Some(b"hello".to_vec())));
    }

    #[test]
    fn another_cluster_another_key_and_an_unknown_key_are_refused() {
        let ours = ring(&[(1, 1)]);
        let mut opener = Opener::new("c".into(), 2);
        let foreign = one(&mut sealer("d", start(1, 5)), &ours, b"hello");
        assert_eq!(open(&mut opener, &ours, &foreign), Err(Refusal::Forged));
        let theirs = ring(&[(1, 9)]);
        let foreign = one(&mut sealer("c", start(1, 5)), &theirs, b"hello");
        assert_eq!(open(&mut opener, &ours, &foreign), Err(Refusal::Forged));
        let unknown = one(&mut sealer("c", start(1, 5)), &ring(&[(3, 1)]), b"hello");
        assert_eq!(open(&mut opener, &ours, &unknown), Err(Refusal::UnknownKey));
        let own = one(&mut sealer("c", start(2, 5)), &ours, b"hello");
        assert_eq!(open(&mut opener, &ours, &own), Err(Refusal::Own));
    }

    #[test]
    fn a_start_that_was_followed_is_not_heard_until_its_recordings_are_out_of_date() {
        let ring = ring(&[(1, 1)]);
        let mut opener = Opener::new("c".into(), 2);
        let mut old = sealer("c", start(1, 5));
        let (first, second) = (one(&mut old, &ring, b"a"), one(&mut old, &ring, b"b"));
        assert_eq!(open(&mut opener, &ring, &first), Ok(Some(b"a".to_vec())));
        let mut new = sealer("c", start(1, 6));
        let third = one(&mut new, &ring, b"c");
        assert_eq!(open(&mut opener, &ring, &third), Ok(Some(b"c".to_vec())));
        assert_eq!(open(&mut opener, &ring, &second), Err(Refusal::Stale));
        assert_eq!(open(&mut opener, &ring, &first), Err(Refusal::Stale));
        // A second process of the same start.
        let twin = Start { salt: 8, ..start(1, 6) };
        let fourth = one(&mut sealer("c", twin), &ring, b"d");
        assert_eq!(open(&mut opener, &ring, &fourth), Err(Refusal::Stale));
        // By the clock, recordings are out of date before the start is forgotten.
        for later in [CLOCK_TOLERANCE_MS + 1, FORGET_MS, FORGET_MS + 1] {
            assert_eq!(open_at(&mut opener, &ring, NOW + later, &second), Err(Refusal::Clock));
        }
        assert_eq!(
            open_at(&mut opener, &ring, NOW - CLOCK_TOLERANCE_MS - 1, &second),
            Err(Refusal::Clock)
        );
        // A node that has lost its directory, and whose clock was set back, is heard again then.
        let mut datagrams = Vec::new();
        let later = NOW + FORGET_MS + 1;
        old.seal(&ring, later, b"e", &mut datagrams).unwrap();
        assert_eq!(open_at(&mut opener, &ring, later, &datagrams), Ok(Some(b"e".to_vec())));
    }

    #[test]
    fn keys_are_exchanged_without_losing_a_datagram() {
        let (old, both, switched, new) = (
            ring(&[(1, 1)]),
            ring(&[(1, 1), (2, 2)]),
            ring(&[(2, 2), (1, 1)]),
            ring(&[(2, 2)]),
        );
        let mut sealer = sealer("c", start(1, 5));
        let mut opener = Opener::new("c".into(), 2);
        // Sender and receiver are never more than one step apart.
        let steps = [&old, &both, &switched, &new];
        for (step, ring) in steps.iter().enumerate() {
            for receiver in [step.saturating_sub(1), step, (step + 1).min(3)] {
                let datagram = one(&mut sealer, ring, b"x");
                assert_eq!(open(&mut opener, steps[receiver], &datagram), Ok(Some(b"x".to_vec())));
                assert_eq!(open(&mut opener, steps[receiver], &datagram), Err(Refusal::Replayed));
            }
        }
        let datagram = one(&mut sealer, &old, b"x");
        assert_eq!(open(&mut opener, &new, &datagram), Err(Refusal::UnknownKey));
        // The same id for another key: nothing that was derived before is used again.
        let datagram = one(&mut sealer, &ring(&[(2, 9)]), b"x");
        assert_eq!(open(&mut opener, &new, &datagram), Err(Refusal::Forged));
        assert_eq!(open(&mut opener, &ring(&[(2, 9)]), &datagram), Ok(Some(b"x".to_vec())));
    }
}
