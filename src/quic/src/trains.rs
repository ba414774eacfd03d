//! Trains of datagrams of several connections.
//!
//! What a datagram costs is mostly the kernel's way through its layers, once per send. GSO spares a connection that by sending
//! its datagrams as one train; a process with many connections to this core, each with a small reply to be sent, gains nothing
//! from that. But the kernel does not care whose datagrams a train holds: they must go to one address and have one size, which
//! replies to the same kind of request mostly have. So small datagrams are put off until every connection of the turn was asked,
//! and leave together.
//!
//! The order of one connection's datagrams is kept as long as they have one size; where sizes differ, one may pass another by a
//! few places, as on any network.
//!
//! A train reaches one socket of the receiver whole. Where the receiver's sockets share a port and it steers by connection id,
//! datagrams for different cores must not share a train: only those with the same first byte of the connection id do.

use std::collections::VecDeque;

use crate::config::MAX_TRAIN_BYTES;
use crate::driver::Transmit;

/// Datagrams up to this size are put off. Of larger ones a train holds so few that copying them costs more than it saves.
const SMALL_BYTES: usize = 12 << 10;

const _: () = assert!(
    MAX_TRAIN_BYTES / SMALL_BYTES >= 5,
    "what is put off shares a send with several others"
);

/// Sizes and destinations waiting at a time; then the oldest train leaves.
const OPEN: usize = 32;

/// The bit of a datagram's first byte that tells a long header, of a handshake (RFC 9000, section 17.2).
const LONG_HEADER: u8 = 0x80;

#[derive(Debug)]
struct Train {
    transmit: Transmit,
    /// Length of each datagram.
    size: usize,
    /// First byte of their destination connection ids.
    core: u8,
    datagrams: usize,
    bytes: Vec<u8>,
}

/// Trains being put together.
#[derive(Debug, Default)]
pub(crate) struct Trains {
    open: VecDeque<Train>,
    /// Memory of trains that have left.
    spare: Vec<Vec<u8>>,
}

impl Trains {
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Puts a datagram off if it is fit for that, emptying `buffer`. What must leave at once, because a train is complete or too
    /// many are open, is returned with its bytes in `buffer`.
    pub(crate) fn add(&mut self, transmit: Transmit, buffer: &mut Vec<u8>, max_train: usize) -> Option<Transmit> {
        let size = buffer.len();
        let small = transmit.segment_size.is_none() && (2..=SMALL_BYTES).contains(&size);
        if !small || buffer[0] & LONG_HEADER != 0 || max_train < 2 {
            return Some(transmit);
        }
        let core = buffer[1];
        let fits = |train: &Train| train.size == size && train.core == core && train.transmit == transmit;
        // The newest is looked at first: connections of one kind come in runs.
        if let Some(place) = self.open.iter().rposition(fits) {
            let train = &mut self.open[place];
            train.bytes.extend_from_slice(buffer);
            train.datagrams += 1;
            buffer.clear();
            let complete = train.datagrams == max_train || train.bytes.len() + size > MAX_TRAIN_BYTES;
            return complete.then(|| self.leave(place, buffer)).flatten();
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        std::mem::swap(&mut bytes, buffer);
        buffer.clear();
        self.open.push_back(Train {
            transmit,
            size,
            core,
            datagrams: 1,
            bytes,
        });
        (self.open.len() > OPEN).then(|| self.leave(0, buffer)).flatten()
    }

    /// The oldest train, whether or not it is complete, with its bytes in `buffer`.
    pub(crate) fn next(&mut self, buffer: &mut Vec<u8>) -> Option<Transmit> {
        self.leave(0, buffer)
    }

    fn leave(&mut self, place: usize, buffer: &mut Vec<u8>) -> Option<Transmit> {
        let Train {
            transmit,
            size,
            datagrams,
            mut bytes,
            ..
        } = self.open.remove(place)?;
        std::mem::swap(buffer, &mut bytes);
        bytes.clear();
        self.spare.push(bytes);
        Some(Transmit {
            segment_size: (datagrams > 1).then_some(size),
            ..transmit
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn to(port: u16) -> Transmit {
        Transmit {
            remote: ([127, 0, 0, 1], port).into(),
            local_ip: None,
            ecn: 0,
            segment_size: None,
        }
    }

    fn datagram(first: u8, core: u8, size: usize, tag: u8) -> Vec<u8> {
        let mut bytes = vec![tag; size];
        bytes[0] = first;
        bytes[1] = core;
        bytes
    }

    #[test]
    fn equal_datagrams_to_one_address_share_a_train() {
        let mut trains = Trains::default();
        for tag in 0..5 {
            assert_eq!(trains.add(to(1), &mut datagram(0x40, 0, 100, tag), 64), None);
        }
        let mut buffer = datagram(0x40, 0, 100, 9);
        assert_eq!(trains.add(to(2), &mut buffer, 64), None, "another address");
        buffer = datagram(0x40, 1, 100, 9);
        assert_eq!(trains.add(to(1), &mut buffer, 64), None, "another core of the receiver");
        let first = trains.next(&mut buffer).unwrap();
        assert_eq!(
            (first.segment_size, buffer.len(), first.remote.port()),
            (Some(100), 500, 1)
        );
        assert!(buffer.chunks(100).map(|datagram| datagram[2]).eq(0..5), "in order");
        for port in [2, 1] {
            let next = trains.next(&mut buffer).unwrap();
            assert_eq!((next.segment_size, buffer.len(), next.remote.port()), (None, 100, port));
        }
        assert_eq!(trains.next(&mut buffer), None);
        assert!(trains.is_empty());
    }

    #[test]
    fn handshakes_trains_and_large_datagrams_leave_at_once() {
        let mut trains = Trains::default();
        let mut buffer = datagram(0xC0, 0, 1200, 0);
        assert_eq!(trains.add(to(1), &mut buffer, 64), Some(to(1)));
        let mut buffer = datagram(0x40, 0, SMALL_BYTES + 1, 0);
        assert_eq!(trains.add(to(1), &mut buffer, 64), Some(to(1)));
        let train = Transmit {
            segment_size: Some(50),
            ..to(1)
        };
        let mut buffer = datagram(0x40, 0, 100, 0);
        assert_eq!(trains.add(train, &mut buffer, 64), Some(train));
        assert_eq!(trains.add(to(1), &mut buffer, 1), Some(to(1)), "trains are off");
        assert_eq!(buffer.len(), 100);
        assert!(trains.is_empty());
    }

    proptest! {
        /// Every datagram leaves once, to where it should, in trains that the kernel takes.
        #[test]
        fn nothing_is_lost_or_misdirected(
            sizes in prop::collection::vec((1_u16..4, 0_u8..3, 20_usize..24), 0..400),
            max_train in 2_usize..70,
        ) {
            let mut trains = Trains::default();
            let mut left = Vec::new();
            let mut take = |transmit: Transmit, bytes: &[u8]| {
                let size = transmit.segment_size.unwrap_or(bytes.len());
                assert!(bytes.len() <= MAX_TRAIN_BYTES && bytes.len() <= size * max_train);
                for datagram in bytes.chunks(size) {
                    assert_eq!(datagram[1], bytes[1]);
                    left.push((transmit.remote.port(), datagram.to_vec()));
                }
            };
            let mut given = Vec::new();
            let mut buffer = Vec::new();
            for (tag, &(port, core, size)) in sizes.iter().enumerate() {
                buffer = datagram(0x40, core, size, 0);
                buffer[2..6].copy_from_slice(&(tag as u32).to_le_bytes());
                given.push((port, buffer.clone()));
                if let Some(transmit) = trains.add(to(port), &mut buffer, max_train) {
                    take(transmit, &buffer);
                }
                prop_assert!(trains.open.len() <= OPEN);
            }
            while let Some(transmit) = trains.next(&mut buffer) {
                take(transmit, &buffer);
            }
            given.sort();
            left.sort();
            prop_assert_eq!(given, left);
        }
    }
}
