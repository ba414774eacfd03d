//! Records of the controller and messages of them: any bytes are read or refused, and what was read encodes to what it was read
//! from.
#![no_main]

use generation_engine::cluster::Cluster;
use generation_engine::cluster::records::{Record, RecordKey, key_of, parse_key};
use libfuzzer_sys::fuzz_target;

const KEYS: [RecordKey; 4] = [
    RecordKey::Config,
    RecordKey::Controller,
    RecordKey::Node(1),
    RecordKey::Shard(1),
];

fuzz_target!(|data: &[u8]| {
    for key in KEYS {
        if let Ok(record) = Record::decode(key, data) {
            assert_eq!(record.encode().as_deref(), Ok(data));
        }
    }
    if let Ok(key) = parse_key(data) {
        assert_eq!(key_of(key), data);
    }
    let mut message = data.to_vec();
    if let Ok(cluster) = Cluster::decode(&message) {
        assert_eq!(cluster.encode_delta(0), message);
    }
    // The same under a checksum that is right, which is hard to guess.
    message.extend(crc32c(data).to_le_bytes());
    if let Ok(cluster) = Cluster::decode(&message) {
        assert_eq!(cluster.encode(), message);
    }
});

/// CRC-32C, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    });
    !crc
}
